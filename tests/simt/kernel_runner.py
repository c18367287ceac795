"""Launch single kernels of the GPU backend on a CPU, over arrays that a test fills and reads.

All memory of a backend is present, with the layout of the backend and random values, so that an element which a kernel
reads or writes at a wrong place changes a result. Arrays are surrounded by NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from cuda_on_cpu import compile_for_cpu
from host_device import MARGIN, surrounded
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, DecoderConfig, EncoderConfig, FeatureConfig, File, Manifest
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.memory import BY_LAYER, MemoryLayout

ORDERS = (0, 1, 2, 3)  # ascending, descending, and both kinds of random schedules
_POOL_WORDS = 1 << 16
_SMALL = ChunkConfig(ms=80, frames=1, left=70, samples=1280)


def manifest(
    encoder: tuple[int, int, int, int] = (2, 64, 2, 8),
    decoder: Mapping[str, Any] | None = None,
    mels: int = 16,
    window: int = 400,
) -> Manifest:
    """Return a manifest. `encoder` has layers, d_model, heads and cache frames; `decoder` overrides a small decoder."""
    layers, d_model, heads, cache = encoder
    net = DecoderConfig(layers=2, hidden=16, joint=40, vocabulary=37, max_symbols=3, activation="relu")
    return Manifest(
        name="test",
        features=FeatureConfig(16000, mels, window, hop=160, n_fft=512 if window <= 512 else 1024, preemphasis=0.97),
        encoder=EncoderConfig(layers, d_model, heads, subsampling=8, cache=cache, conv_cache=8),
        decoder=replace(net, **(decoder or {})),
        chunks=(_SMALL,),
        graphs={},
        weights=File("weights.bin", "", 0),
        tensors={},
        tokenizer=File("tokenizer.model", "", 0),
    )


class KernelRunner:
    """The kernels and the memory of a backend, for steps of `rows` rows of `frames` frames.

    The memory has room for more slots, rows and frames than that.
    """

    def __init__(
        self,
        spec: Manifest,
        cache_dtype: str = "float32",
        *,
        slots: int = 6,
        rows: int = 5,
        frames: int = 3,
        seed: int = 0,
        looping: bool = True,
    ) -> None:
        chunks = tuple(ChunkConfig(80 * n, n, 70, 1280 * n) for n in (frames, frames + 2))
        self.manifest, self.cache_dtype = spec, cache_dtype
        self.layout = MemoryLayout(spec, cache_dtype, slots, rows + 3, chunks)
        self.slots, self.rows, self.frames, self.samples = slots, rows, frames, chunks[0].samples
        self._unit = compile_for_cpu(
            kernels.source(), kernels.macros(spec, cache_dtype, conditional=True), kernels.entries(spec)
        )
        rng = np.random.default_rng(seed)
        layout = self.layout
        sizes = layout.slot_bytes() | layout.buffer_bytes() | layout.weight_bytes() | {"phrase_pool": 4 * _POOL_WORDS}
        max_rows = layout.max_rows
        inputs = 12 * max_rows + 4 * max_rows * layout.max_samples
        outputs = 16 + 4 * max_rows + layout.max_tokens * kernels.TOKEN.itemsize
        sizes |= {"host_input": 2 * inputs, "host_output": 2 * outputs, "reset_slots": 4 * slots, "condition": 4}
        self.memory: dict[str, NDArray[np.uint8]] = {}
        self._margins: dict[str, tuple[NDArray[np.uint8], ...]] = {}
        self.step = np.zeros(1, kernels.STEP)[0]
        for name, size in sizes.items():
            self.memory[name], self._margins[name] = surrounded(size)
            self.memory[name][:] = rng.integers(0, 255, size, np.uint8)
            self.step[name] = self.memory[name].ctypes.data
        for name, shapes in {**layout.slot(), **layout.step(), **layout.weights()}.items():
            if shapes[1].kind == "f" and shapes[1].itemsize > 2:
                view = self.memory[name].view(shapes[1])
                view[:] = rng.standard_normal(len(view))
        self.step["rows"], self.step["frames"], self.step["samples"] = rows, frames, self.samples
        self.step["slots"], self.step["max_rows"], self.step["in_place"] = slots, max_rows, False
        self.step["max_pairs"], self.step["looping"] = max_rows * layout.max_frames, looping
        self.step["host_input_bytes"], self.step["host_output_bytes"] = inputs, outputs
        self.step["lstm_words"] = int(np.prod(layout.weights()["lstm_weight"][0][1:]))
        self["control"][:] = 0
        self.set_slots(rng.permutation(slots)[:rows])

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an array as a kernel indexes it: with the rows and frames of the step, and all slots."""
        rows, frames, layout = self.rows, self.frames, self.layout
        net, encoder = self.manifest.decoder, self.manifest.encoder
        new = (encoder.layers, rows, encoder.heads, frames, encoder.d_model // encoder.heads)
        changed: dict[str, tuple[int, ...]] = {
            "mel": (rows, encoder.subsampling * frames, self.manifest.features.mels),
            "waveform": (rows, self.manifest.features.tail + self.samples),
            "encoded": (rows, frames, net.joint),
            "k_new": new,
            "v_new": new,
            "conv_next": (encoder.layers, rows, encoder.d_model, encoder.conv_cache),
            "h_next": (rows, net.layers, net.hidden),
            "bias": (rows, net.vocabulary),
            "row_mel_cache": (rows, encoder.mel_cache, self.manifest.features.mels),
            "mel_cache_next": (rows, encoder.mel_cache, self.manifest.features.mels),
            "phrase_pool": (_POOL_WORDS,),
            "reset_slots": (self.slots,),
            "slot_automaton": (self.slots,),
            "condition": (1,),
        }
        base = name.removeprefix("row_") if name in ("row_k", "row_v", "row_conv") else name
        if base in BY_LAYER:
            count = rows if name.startswith("row_") else self.slots
            shape, dtype = layout.slot()[base]
            flat = self.memory[name][: shape[0] * layout.layer_bytes(base, count)].reshape(shape[0], -1)
            size = int(np.prod(shape[1:])) * dtype.itemsize
            return flat[:, : count * size].view(dtype).reshape(shape[0], count, *shape[1:])
        if name in layout.slot():
            shape, dtype = layout.slot()[name]
            return self.memory[name].view(dtype).reshape(self.slots, *shape)
        shape, dtype = {**layout.step(), **layout.weights()}.get(name, ((), np.dtype(np.int32)))
        shape = changed.get(name, shape)
        size = int(np.prod(shape)) * dtype.itemsize
        return self.memory[name][:size].view(dtype).reshape(shape)

    def __setitem__(self, name: str, value: Any) -> None:
        self[name][...] = value

    def set_slots(self, slots: Any) -> None:
        """Assign a slot to each row, -1 for an idle one."""
        self["row_slot"][:] = -7  # rows beyond the step's
        self["row_slot"][: self.rows] = slots
        self["row_automaton"][:] = -1

    def host(self, name: str, buffer: int) -> dict[str, NDArray[Any]]:
        """Return the parts of a host buffer, "host_input" or "host_output"."""
        size, max_rows = len(self.memory[name]) // 2, self.layout.max_rows
        part = self.memory[name][buffer * size :][:size]
        if name == "host_input":
            numbers = part[: 12 * max_rows].view(np.int32).reshape(3, max_rows)
            audio = part[12 * max_rows :].view(np.float32)[: self.rows * self.samples]
            parts = dict(zip(("slots", "lengths", "prompts"), numbers, strict=True))
            return {**parts, "audio": audio.reshape(self.rows, self.samples)}
        numbers = part[: 16 + 4 * max_rows].view(np.int32)
        tokens = part[16 + 4 * max_rows :].view(kernels.TOKEN)
        return {"count": numbers[:1], "undecided": numbers[1:2], "failed": numbers[4:], "tokens": tokens}

    def launch(self, entry: str, *grid: int, order: int = 0, **fields: Any) -> None:
        """Run a kernel. `fields` are fields of its argument that differ from those of the step."""
        step = self.step.copy()
        for name, value in fields.items():
            step[name] = value
        self._unit.launch(entry, (*grid, 1, 1)[:3], (kernels.BLOCK, 1, 1), [step], order)
        for name, margins in self._margins.items():
            assert all((margin == MARGIN).all() for margin in margins), f"{entry} wrote beyond {name}"

    def check(
        self,
        entry: str,
        *grid: int,
        expected: Callable[[], None],
        close: Mapping[str, float] = MappingProxyType({}),
        unordered: Collection[str] = (),
        order: int = 0,
        **fields: Any,
    ) -> None:
        """Run a kernel and check that it changes the memory as `expected` does, byte for byte.

        `close` has the absolute and relative tolerance of arrays of floats, in the rows and frames of the step. Arrays
        in `unordered` are not compared. The memory is then that of the kernel.
        """
        start = {name: memory.copy() for name, memory in self.memory.items()}
        expected()
        wanted = {name: memory.copy() for name, memory in self.memory.items()}
        values = {name: self[name].copy() for name in close}
        for name, memory in self.memory.items():
            memory[:] = start[name]
        self.launch(entry, *grid, order=order, **fields)
        found = {name: self[name].copy() for name in close}
        for name, tolerance in close.items():
            np.testing.assert_allclose(found[name], values[name], tolerance, tolerance, err_msg=name)
            self[name] = values[name]  # the rest of the array, beyond the rows of the step, is compared exactly
        compared = self.memory.keys() - set(unordered)
        wrong = [name for name in compared if not np.array_equal(wanted[name], self.memory[name])]
        for name, array in found.items():
            self[name] = array
        assert not wrong, f"{entry} computes wrong values of {', '.join(sorted(wrong))}"

    def restore(self, memory: Mapping[str, NDArray[np.uint8]]) -> None:
        """Set all arrays to a copy of `memory`."""
        for name, array in memory.items():
            self.memory[name][:] = array

    def copy(self) -> dict[str, NDArray[np.uint8]]:
        """Return a copy of all arrays."""
        return {name: memory.copy() for name, memory in self.memory.items()}
