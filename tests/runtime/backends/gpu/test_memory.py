"""Memory of the GPU backend: sizes compared with allocations, limits, and errors that name a capacity that fits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder
from hypothesis import given
from hypothesis import strategies as st

from nemostream.bundle import Bundle, ChunkConfig, File, Manifest
from nemostream.engines import open_gpu
from nemostream.errors import BackendError, OptionError
from nemostream.external_data import initializer_shapes
from nemostream.plans import Plan, Recipe
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu import arena, kernels
from nemostream.runtime.backends.gpu.arena import Arena
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.backends.gpu.device import OutOfMemory
from nemostream.runtime.backends.gpu.memory import (
    MAX_ELEMENTS,
    RESERVED_BYTES,
    MemoryLayout,
    activation_bytes,
    check_max_batch,
    encoder_sizes,
    encoder_tensors,
)

GIB = 1 << 30
needs_compiler = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")


class LimitedDevice(HostDevice):
    """A device that has `limit` bytes, of which another process takes `taken` before the first allocation."""

    def __init__(self, limit: int, taken: int = 0) -> None:
        self.limit, self.taken, self.sizes = limit, taken, list[int]()
        super().__init__()

    @property
    def free_bytes(self) -> int:  # type: ignore[override]
        return self.limit - sum(self.sizes)

    @free_bytes.setter
    def free_bytes(self, value: int) -> None: ...

    def allocate(self, size: int) -> int:
        self.limit, self.taken = self.limit - self.taken, 0
        if size > self.free_bytes:
            raise OutOfMemory(size)
        self.sizes.append(size)
        return super().allocate(size)


def no_encoder(rows: int) -> int:
    return 0


# -- layout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("capacity", "max_batch"), [(1, 1), (7, 5), (40, 8)])
def test_layout_is_what_is_allocated(cache_dtype: str, capacity: int, max_batch: int, demo_bundle: Bundle) -> None:
    device = LimitedDevice(GIB)
    layout = MemoryLayout(demo_bundle.manifest, cache_dtype, capacity, max_batch, demo_bundle.manifest.chunks)
    memory = Arena(demo_bundle, device, layout, no_encoder)
    assert sum(device.sizes) == layout.nbytes
    for name, size in (layout.slot_bytes() | layout.buffer_bytes() | layout.weight_bytes()).items():
        assert len(device.arrays[int(memory.step[name])]) == size, name
    # By these the kernels find the parts of an array.
    parts = {
        "list_rows": 2 * memory.step["max_rows"] * 4,
        "list_pairs": 2 * memory.step["max_pairs"] * 4,
        "lstm_weight": demo_bundle.manifest.decoder.layers * memory.step["lstm_words"] * 4,
        "slot_automaton": memory.step["slots"] * 4,
        "host_input": 2 * memory.step["host_input_bytes"],
        "host_output": 2 * memory.step["host_output_bytes"],
    }
    assert parts == {name: len(device.arrays[int(memory.step[name])]) for name in parts}
    pointers = {name for kind, name in kernels.FIELDS if "*" in kind} - {"host_input", "host_output", "reset_slots"}
    assert pointers == (layout.slot_bytes() | layout.buffer_bytes() | layout.weight_bytes()).keys()


def published(manifest: Manifest) -> Manifest:
    """The sizes of nemotron-speech-streaming-en-0.6b; its front end and chunks are those of the packaged model."""
    return dataclasses.replace(
        manifest,
        encoder=dataclasses.replace(manifest.encoder, layers=24, d_model=1024, heads=8, cache=70, conv_cache=8),
        decoder=dataclasses.replace(manifest.decoder, layers=2, hidden=640, joint=640, vocabulary=1024),
    )


@pytest.mark.parametrize(("cache_dtype", "itemsize"), [("float16", 2), ("float32", 4)])
def test_published_model(cache_dtype: str, itemsize: int, demo_bundle: Bundle) -> None:
    """Figures computed by hand from the sizes of the model."""
    manifest = published(demo_bundle.manifest)
    caches = 24 * 1024 * (70 + 70 + 8) * itemsize
    others = 4 * (9 * 128 + 239 + 640 + 2 * 2 * 640) + 4 + 8
    layout = MemoryLayout(manifest, cache_dtype, 4096, 4096, (manifest.chunk(560),))
    assert layout.bytes_per_stream == caches + others
    assert round(layout.bytes_per_stream / 1e6, 1) == {2: 7.3, 4: 14.6}[itemsize]
    # 4096 slots, and buffers for 4096 rows: twice 30 GB with 16-bit caches.
    assert sum(layout.slot_bytes().values()) == 4096 * (caches + others)
    rows = layout.buffer_bytes()
    assert rows["row_k"] + rows["row_v"] + rows["row_conv"] == 4096 * caches
    assert round(4096 * caches / 1e9) == {2: 30, 4: 60}[itemsize]
    assert rows["k_new"] == rows["v_new"] == 4096 * 24 * 1024 * 7 * itemsize
    assert rows["mel"] == 4096 * 56 * 128 * 4
    small = dataclasses.replace(layout, capacity=4096, max_batch=64)
    assert sum(small.buffer_bytes().values()) < 0.6e9 * itemsize / 2 * 1.1


@pytest.mark.parametrize(("cache_dtype", "itemsize"), [("float16", 2), ("bfloat16", 2), ("float32", 4)])
def test_buffers_of_the_published_model(cache_dtype: str, itemsize: int, demo_bundle: Bundle) -> None:
    """The sizes of the arrays that `kernels.FIELDS` describes, for 64 rows of 7 frames, and the whole phrase pool."""
    manifest = published(demo_bundle.manifest)
    layout = MemoryLayout(manifest, cache_dtype, 200, 61, (manifest.chunk(80), manifest.chunk(560)))
    assert (layout.max_rows, layout.max_frames, layout.max_samples) == (64, 7, 8960)
    symbols = manifest.decoder.max_symbols
    integers = ("slot", "length", "count", "failed", "frame", "end", "label_frame", "symbols", "label", "automaton")
    ring, frames = 64 * 24 * 1024 * 70 * itemsize, 64 * 24 * 1024 * 7 * itemsize
    conv = 64 * 24 * 1024 * 8 * itemsize
    assert layout.buffer_bytes() == {
        **{f"row_{name}": 64 * 4 for name in integers},
        **dict.fromkeys(("row_position", "row_valid", "row_prompt"), 64 * 8),
        "waveform": 64 * (239 + 8960) * 4,
        "mel": 64 * 56 * 128 * 4,
        "row_mel_cache": 64 * 9 * 128 * 4,
        "mel_cache_next": 64 * 9 * 128 * 4,
        **{"row_k": ring, "row_v": ring, "row_conv": conv},
        **{"k_new": frames, "v_new": frames, "conv_next": conv},
        "encoded": 64 * 7 * 640 * 4,
        "control": 9 * 4,
        "list_rows": 2 * 64 * 4,
        "list_first": 2 * 64 * 4,
        "list_pairs": 2 * 64 * 7 * 4,
        "partial": 64 * 7 * 33 * 16,  # 1,025 logits are 33 tiles of at most 32
        "boosted": 64 * 7 * 33 * 16,
        "bias": 64 * 1024 * 4,
        "emitted": 64 * 4,
        "h_next": 64 * 2 * 640 * 4,
        "tokens": 64 * 7 * symbols * 20,
        "slot_automaton": 200 * 4,
        "phrase_pool": 32 << 20,
    }
    assert layout.weight_bytes() == {
        "window": 398 * 8,
        "twiddles": 256 * 2 * 8,
        "filters": 257 * 128 * 8,
        "filter_bins": 128 * 2 * 4,
        "guard": 8,
        "embedding": 1025 * 640 * 4,
        "lstm_weight": 2 * 1280 * 2560 * itemsize,
        "lstm_bias": 2 * 2560 * 4,
        "project_weight": 640 * 640 * itemsize,
        "project_bias": 640 * 4,
        "joint_weight": 640 * 33 * 32 * itemsize,
        "joint_bias": 1025 * 4,
        "start_predicted": 640 * 4,
        "start_h": 2 * 640 * 4,
        "start_c": 2 * 640 * 4,
    }


@given(
    available=st.integers(0, 1 << 36),
    max_batch=st.integers(1, 3000),
    cache_dtype=st.sampled_from(["float16", "float32"]),
    d_model=st.sampled_from([176, 1024]),
)
def test_largest_capacity(available: int, max_batch: int, cache_dtype: str, d_model: int, demo_bundle: Bundle) -> None:
    manifest = published(demo_bundle.manifest)
    manifest = dataclasses.replace(manifest, encoder=dataclasses.replace(manifest.encoder, d_model=d_model))
    layout = MemoryLayout(manifest, cache_dtype, 1, max_batch, manifest.chunks)

    def nbytes(capacity: int) -> int:
        return dataclasses.replace(layout, capacity=capacity).nbytes

    capacity = layout.largest_capacity(available)
    assert nbytes(capacity + 1) > available
    assert capacity == 0 or nbytes(capacity) <= available


# -- encoder -----------------------------------------------------------------------------------------------------------


def test_initializer_shapes(demo_bundle: Bundle) -> None:
    onnx = pytest.importorskip("onnx")
    for chunk in demo_bundle.manifest.chunks:
        path = demo_bundle.file(f"encoder-{chunk.ms}ms")
        graph = onnx.load(path, load_external_data=False).graph
        shapes = initializer_shapes(path.read_bytes())
        assert shapes == {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        sizes = encoder_sizes(demo_bundle, chunk)
        assert sizes.channels == 32
        assert sizes.parameters == sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    with pytest.raises(ValueError, match="truncated"):
        initializer_shapes(path.read_bytes()[:-1])


def tensors_per_row(path: Path, bundle: Bundle, chunk: ChunkConfig) -> tuple[dict[str, tuple[int, int]], Any]:
    """Run a graph with 2 and 3 rows; return elements and bytes that every tensor has for each row, and the graph."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(path, load_external_data=False)
    known = {value.name for value in model.graph.output}
    for node in model.graph.node:
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name not in known)
    copy = path.with_name(f"all-{path.name}")
    copy.write_bytes(model.SerializeToString())
    session = ort.InferenceSession(copy, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    found = []
    for rows in (2, 3):
        inputs = {
            value.name: np.zeros([rows if isinstance(n, str) else n for n in value.shape], types[value.type])
            for value in session.get_inputs()
        }
        names = [value.name for value in session.get_outputs()]
        arrays = inputs | dict(zip(names, session.run(names, inputs), strict=True))
        found.append({name: (array.size, array.nbytes) for name, array in arrays.items()})
    two, three = found
    return {name: (three[name][0] - two[name][0], three[name][1] - two[name][1]) for name in two}, model.graph


@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
def test_encoder_tensors(ms: int, demo_bundle: Bundle, tmp_path: Path) -> None:
    """The largest tensor, and the largest operation of the typed graph, as ONNX Runtime computes them."""
    pytest.importorskip("onnx")
    from nemostream.engine.precision import write_typed

    manifest, chunk = demo_bundle.manifest, demo_bundle.manifest.chunk(ms)
    graph, _ = write_typed(demo_bundle, chunk, "fp16", None, tmp_path, "typed")
    per_row, nodes = tensors_per_row(graph, demo_bundle, chunk)
    channels = encoder_sizes(demo_bundle, chunk).channels
    assert max(elements for elements, _ in per_row.values()) == max(encoder_tensors(manifest, chunk, channels).values())
    operations = [
        sum(per_row[name][1] for name in {*node.input, *node.output} if name in per_row) for node in nodes.node
    ]
    assert 0.999 < activation_bytes(manifest, chunk, channels) / max(operations) < 1.35


def test_largest_max_batch(demo_bundle: Bundle) -> None:
    """At 560 ms, the output of the first convolution has 256 channels of 33 frames and 65 bins in each row."""
    manifest = published(demo_bundle.manifest)
    elements = 256 * 33 * 65
    fit = (2**31 - 1) // elements
    check_max_batch(manifest, [manifest.chunk(560)], 256, fit)
    message = f"max_batch is 4096: with chunks of 560 ms, the output of the first convolution.* {4096 * elements:,} "
    with pytest.raises(OptionError, match=f"{message}.*choose max_batch={fit} or less"):
        check_max_batch(manifest, [manifest.chunk(560)], 256, 4096)
    with pytest.raises(OptionError, match=f"choose max_batch={fit} or less"):
        check_max_batch(manifest, [manifest.chunk(560)], 256, fit + 1)
    with pytest.raises(OptionError, match=r"chunks of 1120 ms.*choose max_batch=2115 or less"):
        check_max_batch(manifest, manifest.chunks, 256, 4096)
    assert all(1024 * max(encoder_tensors(manifest, c, 256).values()) <= MAX_ELEMENTS for c in manifest.chunks)


def test_build_rejects_a_batch_that_is_too_large(demo_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from nemostream.engines import build_engine
    from nemostream.plans import PlanStore

    chunk = demo_bundle.manifest.chunk(1120)
    with pytest.raises(OptionError, match=r"max_batch is 100000: with chunks of 1120 ms"):
        build_engine(demo_bundle, chunk, "fp16", PlanStore(tmp_path), target="sm89", max_batch=100_000)
    assert not list(tmp_path.iterdir())


# -- errors ------------------------------------------------------------------------------------------------------------


def fitting_capacity(error: pytest.ExceptionInfo[BackendError]) -> int:
    (capacity,) = re.findall(r"capacity=(\d+) or less", str(error.value))
    return int(capacity)


def test_encoder_memory_counts(demo_bundle: Bundle) -> None:
    """The arena leaves the encoder what it needs, and names the largest capacity with which both fit."""
    limit, chunks = GIB, (demo_bundle.manifest.chunk(80),)

    def encoder(rows: int) -> int:
        return rows * (100 << 20)

    def open_arena(capacity: int, max_batch: int) -> LimitedDevice:
        device = LimitedDevice(limit)
        layout = MemoryLayout(demo_bundle.manifest, "float32", capacity, max_batch, chunks)
        Arena(demo_bundle, device, layout, encoder)
        return device

    with pytest.raises(BackendError, match=r"3000 streams in batches of 2 need .* 1\.1 GB are free") as error:
        open_arena(3000, 2)
    fit = fitting_capacity(error)
    device = open_arena(fit, 2)
    assert 0 <= device.free_bytes - RESERVED_BYTES - encoder(2) < 2 * sum(device.sizes) / fit
    with pytest.raises(BackendError, match=f"capacity={fit} or less"):
        open_arena(fit + 1, 2)

    # Buffers and encoder alone do not fit.
    with pytest.raises(BackendError, match=r"load the model with capacity=(\d+) or less") as error:
        open_arena(3000, 64)
    fit = fitting_capacity(error)
    open_arena(fit, fit)
    with pytest.raises(BackendError, match="capacity="):
        open_arena(fit + 1, fit + 1)

    limit = 100 << 20
    with pytest.raises(BackendError, match="free memory on this GPU, or use one with more"):
        open_arena(1, 1)


@pytest.mark.parametrize("taken", [520 << 20, 600 << 20, 900 << 20])
def test_failed_allocation(taken: int, demo_bundle: Bundle) -> None:
    """Memory that was free at first cannot be allocated; the error names the largest capacity that fits now."""
    layout = MemoryLayout(demo_bundle.manifest, "float32", 1, 2, demo_bundle.manifest.chunks)

    def open_arena(capacity: int, device: HostDevice) -> None:
        Arena(demo_bundle, device, dataclasses.replace(layout, capacity=capacity), no_encoder)

    limit = 2 * GIB
    capacity = layout.largest_capacity(limit - RESERVED_BYTES)
    with pytest.raises(BackendError, match=r"MB cannot be allocated on a GPU simulated on the CPU for") as error:
        open_arena(capacity, LimitedDevice(limit, taken))
    assert isinstance(error.value.__cause__, OutOfMemory)
    fit = fitting_capacity(error)
    open_arena(fit, LimitedDevice(limit - taken))
    with pytest.raises(BackendError, match=f"capacity={fit} or less"):
        open_arena(fit + 1, LimitedDevice(limit - taken))


class GreedyEncoder(OrtEncoder):
    """Allocates `size` bytes when it is first bound, although it states that it needs none."""

    size = 20 << 20

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Any:
        if self.size:
            self._device.allocate(self.size)
            self.size = 0
        return super().bind(rows, addresses)


@needs_compiler
def test_encoder_that_runs_out_of_memory(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, limit = demo_bundle.manifest.chunk(80), 100 << 20
    monkeypatch.setattr(arena, "RESERVED_BYTES", 8 << 20)

    def open_backend(capacity: int) -> GpuBackend:
        device = LimitedDevice(limit)
        encoder = GreedyEncoder(demo_bundle, chunk, device)
        return GpuBackend(demo_bundle, device, {80: encoder}, capacity=capacity, max_batch=1)

    layout = MemoryLayout(demo_bundle.manifest, "float32", 1, 1, (chunk,))
    capacity = layout.largest_capacity(limit - (8 << 20))
    with pytest.raises(BackendError, match=r"21\.0 MB cannot be allocated") as error:
        open_backend(capacity)
    open_backend(fitting_capacity(error)).close()


@pytest.fixture
def opened(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that opens a backend like `nemostream.load`, and the lists of its encoders and devices."""
    encoders, devices = list[OrtEncoder](), list[LimitedDevice]()

    class Encoder(OrtEncoder):
        closed = False

        def __init__(self, path: Path, library: str, cache_dtype: str, device: Any, sha256: str) -> None:
            super().__init__(demo_bundle, demo_bundle.manifest.chunk(80), device)
            encoders.append(self)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr("nemostream.runtime.backends.gpu.tensorrt.TrtEncoder", Encoder)
    recipe = Recipe.of(
        demo_bundle,
        80,
        backend="tensorrt",
        library="11",
        precision="fp32",
        device="sm00",
        max_batch=0,
        cache_dtype="float32",
    )
    plan = Plan(recipe, tmp_path, (File("engine", "", 0),), 0.0)

    def open_backend(capacity: int, max_batch: int) -> GpuBackend:
        devices.append(LimitedDevice(600 << 20))
        return open_gpu(demo_bundle, devices[-1], {80: plan}, capacity, max_batch)

    return open_backend, encoders, devices


@needs_compiler
def test_another_attempt_with_the_named_capacity(opened: Any) -> None:
    """A failed attempt releases its memory, so that the named capacity fits in the next one."""
    open_backend, encoders, devices = opened
    with pytest.raises(BackendError, match="1000 streams in batches of 2") as error:
        open_backend(1000, 2)
    assert encoders[0].closed and devices[0].closed
    backend = open_backend(fitting_capacity(error), 2)
    assert not encoders[1].closed and not devices[1].closed
    backend.close()


def test_max_batch_is_checked_before_anything_is_loaded(opened: Any) -> None:
    open_backend, encoders, devices = opened
    with pytest.raises(OptionError, match=r"max_batch is 1000000: .* choose max_batch=\d+ or less"):
        open_backend(1_000_000, 1_000_000)
    assert not encoders and devices[0].closed


# -- alignment ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model with d_model 176, whose K cache of a layer is not a multiple of 256 bytes."""
    pytest.importorskip("onnx")
    from nemostream.benchmarks.harness.random_bundle import random_bundle
    from nemostream.benchmarks.harness.synthetic import Sizes

    sizes = Sizes(n_layers=3, d_model=176, n_heads=4, conv_channels=8, pred_hidden=48, joint_hidden=48, vocab=128)
    return random_bundle(tmp_path_factory.mktemp("odd") / "bundle", sizes=sizes)


@pytest.fixture
def odd_backend(odd_bundle: Bundle) -> Iterator[GpuBackend]:
    device = HostDevice()
    encoders = {ms: OrtEncoder(odd_bundle, odd_bundle.manifest.chunk(ms), device) for ms in (80, 560)}
    backend = GpuBackend(odd_bundle, device, encoders, capacity=5)
    yield backend
    backend.close()


@needs_compiler
def test_d_model_176(odd_backend: GpuBackend, odd_bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
    """Every address of the encoder is a multiple of 256 bytes (`OrtEncoder.bind` checks it), tokens are the CPU's.

    Batches are read in place and gathered; a stream is saved and continues in another slot.
    """
    manifest, gpu = odd_bundle.manifest, odd_backend
    ring = manifest.encoder.cache * manifest.encoder.d_model * 4
    assert ring % kernels.ALIGNMENT
    cpu = OrtBackend(odd_bundle, capacity=5, threads=1)
    for backend in (gpu, cpu):
        backend.reset(np.arange(5))
    audio = np.stack([np.resize(clip, 400_000) for clip in [*clips.values()][:5]])
    position, emitted = np.zeros(5, int), 0
    for step, slots in enumerate([[0, 1, 2, 3, 4], [1, 3], [0], [0, 1, 2], [2, 4], [4], [0, 1, 2, 3, 4], [3, 4]]):
        chunk = manifest.chunk((560, 80)[step % 2])
        rows = np.stack([audio[slot, position[slot] :][: chunk.samples] for slot in slots])
        position[slots] += chunk.samples
        batch = Batch(chunk, np.array(slots), rows, np.full(len(slots), chunk.samples))
        got, wanted = gpu.submit(batch).result(), cpu.submit(batch).result()
        for row in range(len(slots)):
            assert got.tokens[row].tolist() == wanted.tokens[row].tolist()
            assert got.frames[row].tolist() == wanted.frames[row].tolist()
            emitted += len(got.tokens[row])
        if step == 3:
            for backend in (gpu, cpu):
                backend.load(4, backend.save(2))
            audio[4], position[4] = audio[2], position[2]
    assert emitted > 20
    for slot in range(5):
        saved, expected = gpu.save(slot), cpu.save(slot)
        for name in ("k", "v", "conv"):
            np.testing.assert_allclose(saved[name], expected[name], atol=1e-3)
