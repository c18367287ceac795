"""The embedded backend: ONNX Runtime on a CPU.

All state of all streams lies in arenas allocated once, slot by slot; K and V are rings that a step writes T rows of.
A step of B streams reads its rows through IO binding: in place if the slots are neighbours (one stream always is),
through a staging copy if not. Every buffer a graph reads or writes is ours and bound by address once per chunk size and
batch; only where the rings lie is bound anew, when it changes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError
from nemostream.plans import Plan, no_engine
from nemostream.runtime.backends.base import Batch, Emissions, at_least_one, check_state
from nemostream.runtime.backends.cpus import default_threads
from nemostream.runtime.decoding.boosting import NO_PHRASES, Boosting
from nemostream.runtime.decoding.greedy import DecoderState, label_looping

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# `nemostream/__init__.py` sets the variable; this stops the events of an ONNX Runtime that was imported before it.
if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":
    ort.disable_telemetry_events()


class OrtBackend:
    """A bundle on ONNX Runtime's CPU provider. Not thread-safe: one thread calls it, as the seam demands.

    `capacity` streams have their state here; `threads` is what ONNX Runtime may use (default: every CPU that
    this process may use, see `cpus`). `plans`, by chunk size in ms, are encoder steps to use instead of the bundle's
    own; other chunk sizes are then refused. Raises `BackendError` if the graphs cannot be loaded.
    """

    asynchronous = False

    def __init__(
        self,
        bundle: Bundle,
        capacity: int = 64,
        max_batch: int | None = None,
        threads: int | None = None,
        plans: Mapping[int, Plan] | None = None,
    ) -> None:
        at_least_one(capacity=capacity, max_batch=max_batch, threads=threads)
        self.capacity = capacity
        self.max_batch = min(max_batch or 64, capacity)
        self.manifest = bundle.manifest
        self._bundle = bundle
        self._threads = threads or default_threads()
        self._plans = plans
        self._transducer = _Transducer(bundle)
        cells = sorted({plan.recipe.cache_dtype for plan in plans.values()} if plans else {"float32"})
        if cells not in (["float32"], ["float16"]):
            raise BackendError(f"a CPU cannot run engines whose caches are {' and '.join(cells)}.")
        self._state = _Arena(bundle, capacity, np.dtype(cells[0]))
        self._start = DecoderState.initial(self._transducer, self.manifest.decoder.layers, self.manifest.decoder.hidden)
        self._boosts: list[Boosting | None] = [None] * capacity
        # Rows of slots that are not neighbours are copied together. Untouched pages of zeros cost no memory.
        self._staged = [
            np.zeros((rings.shape[0], self.max_batch, *rings.shape[2:]), rings.dtype)
            for rings in (self._state.k, self._state.v, self._state.conv)
        ]
        self._steps: dict[int, _Step] = {}

    def prepare(self, chunk: ChunkConfig) -> None:
        """Load a chunk size's graphs now instead of at its first step."""
        if chunk.ms not in self._steps:
            encoder = self._bundle.file(f"encoder-{chunk.ms}ms")
            if self._plans is not None:
                if chunk.ms not in self._plans:
                    raise no_engine(chunk.ms, self._plans)
                encoder = self._plans[chunk.ms].path
            self._steps[chunk.ms] = _Step(
                self._bundle, encoder, chunk, self._state, self._staged, self.max_batch, self._threads
            )

    @property
    def bytes_per_stream(self) -> int:
        """Memory of one slot."""
        return self._state.nbytes // self.capacity

    def reset(self, slots: Ints) -> None:
        self._state.reset(slots)
        for slot in slots.tolist():
            self._boosts[slot] = None
        self.reset_decoder(slots)

    def reset_decoder(self, slots: Ints) -> None:
        self._state.place(slots, self._start)

    def set_phrases(self, slot: int, phrases: Boosting | None) -> None:
        self._boosts[slot] = phrases
        self._state.node[slot] = 0

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        phrases = self._boosts[slot]
        arrays = {name: array.copy() for name, array in self._state.rows(slot).items()}
        return {**arrays, "phrases": NO_PHRASES if phrases is None else phrases.digest}

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        check_state(state, self.save(slot))
        for name, array in self._state.rows(slot).items():
            array[...] = state[name]

    def submit(self, batch: Batch) -> Done:
        self.prepare(batch.chunk)
        encoded, counts = self.encode(batch)
        slots, state = batch.slots, self._state
        start = state.position[slots] - batch.chunk.frames
        rows = DecoderState(state.predicted[slots], state.h[slots], state.c[slots], state.node[slots])
        boosts = [self._boosts[slot] for slot in slots.tolist()]
        said, failed = label_looping(
            self._transducer, encoded, counts, rows, boosts if boosts.count(None) < len(boosts) else ()
        )
        state.place(slots, rows)
        return Done(
            Emissions(
                tuple(np.array(row.tokens, np.int32) for row in said),
                tuple(np.array(row.frames, np.int64) + begin for row, begin in zip(said, start, strict=True)),
                tuple(np.array(row.scores, np.float32) for row in said),
                tuple(np.array(row.sum_p_alpha, np.float32) for row in said),
                failed,
            )
        )

    def encode(self, batch: Batch) -> tuple[Floats, Ints]:
        """The step without decoding: `encoded_joint` [B, T, J] (valid until the next step) and frames per row."""
        self.prepare(batch.chunk)
        manifest, chunk, state = self.manifest, batch.chunk, self._state
        position = state.position[batch.slots]
        heard = position * manifest.samples_per_frame - manifest.lead + batch.lengths  # samples, the new ones included
        factor = manifest.encoder.subsampling
        valid = heard // manifest.features.hop - factor * (position - 2)
        valid = np.minimum(valid, manifest.encoder.mel_cache + factor * chunk.frames)
        total = np.array([manifest.encoder_frames(int(samples)) for samples in heard])
        counts = np.clip(total - position, 0, chunk.frames)
        try:
            encoded = self._steps[chunk.ms].run(batch, position, valid)
        except Exception as error:  # ONNX Runtime raises its own kinds
            raise BackendError(f"ONNX Runtime failed in a {chunk.ms} ms step: {error}") from error
        state.position[batch.slots] += chunk.frames
        return encoded, counts

    def close(self) -> None:
        self._steps.clear()


@dataclass(frozen=True)
class Done:
    """A step that was over when `submit` returned: a CPU gains nothing by pretending otherwise."""

    emissions: Emissions

    def result(self) -> Emissions:
        return self.emissions


class _Arena:
    """The state of every slot. Layer first, so that the rows of one layer and neighbouring slots are contiguous."""

    def __init__(self, bundle: Bundle, slots: int, cache_dtype: np.dtype) -> None:
        manifest = bundle.manifest
        spec, net = manifest.encoder, manifest.decoder
        d_k = spec.d_model // spec.heads
        self.audio_tail = np.zeros((slots, manifest.features.tail), np.float32)
        self.mel_cache = np.zeros((slots, spec.mel_cache, manifest.features.mels), np.float32)
        self.k = np.zeros((spec.layers, slots, spec.heads, spec.cache, d_k), cache_dtype)
        self.v = np.zeros_like(self.k)
        self.conv = np.zeros((spec.layers, slots, spec.d_model, spec.conv_cache), cache_dtype)
        self.predicted = np.zeros((slots, net.joint), np.float32)
        self.h = np.zeros((slots, net.layers, net.hidden), np.float32)
        self.c = np.zeros_like(self.h)
        self.node = np.zeros(slots, np.int64)
        self.position = np.zeros(slots, np.int64)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())

    def reset(self, slots: Ints) -> None:
        # K and V are masked until written, but a masked NaN would still spread: zeros, not just a position of zero.
        for rings in (self.k, self.v, self.conv):
            rings[:, slots] = 0
        for rows in (self.audio_tail, self.mel_cache, self.position):
            rows[slots] = 0

    def place(self, slots: Ints, rows: DecoderState) -> None:
        """Give slots the decoder's state of `rows`, one each, or one for all."""
        self.predicted[slots], self.h[slots], self.c[slots] = rows.predicted, rows.h, rows.c
        self.node[slots] = rows.node

    def rows(self, slot: int) -> dict[str, NDArray[Any]]:
        """A slot's part of every array, in place."""
        by_layer = ("k", "v", "conv")
        return {name: array[:, slot] if name in by_layer else array[slot, ...] for name, array in vars(self).items()}


class _Step:
    """Front end and encoder of one chunk size, with every buffer they touch."""

    def __init__(
        self,
        bundle: Bundle,
        encoder: Path,
        chunk: ChunkConfig,
        state: _Arena,
        staged: list[Floats],
        max_batch: int,
        threads: int,
    ) -> None:
        spec = bundle.manifest.encoder
        self.state, self.chunk, self.cache = state, chunk, spec.cache
        self.features = _session(bundle.file(f"features-{chunk.ms}ms"), threads=1)
        self.encoder = _session(encoder, threads)
        graphs = bundle.manifest.graphs
        self._shapes = {
            tensor.name: tensor.shape
            for kind in ("features", "encoder")
            for side in ("inputs", "outputs")
            for tensor in getattr(graphs[f"{kind}-{chunk.ms}ms"], side)
        }
        self._max_batch, self._layers = max_batch, spec.layers
        self._staged = staged
        self._room: dict[str, NDArray[Any]] = {}  # for the largest batch; a smaller one has the beginning of it
        self._bound: dict[int, _Bound] = {}

    def run(self, batch: Batch, position: Ints, valid: Ints) -> Floats:
        state, slots, rows = self.state, batch.slots, len(batch.slots)
        bound = self._bound.get(rows) or self._bound.setdefault(rows, _Bound(self, rows))
        bound["audio"][:] = batch.audio
        bound["audio_tail"][:] = state.audio_tail[slots]
        bound["lengths"][:] = batch.lengths
        bound["mel_cache"][:] = state.mel_cache[slots]
        bound["position"][:] = position
        bound["valid"][:] = valid
        first = int(slots[0])
        if int(slots[-1]) - first == rows - 1 and (np.diff(slots) == 1).all():
            bound.place_caches([array[:, first : first + rows] for array in (state.k, state.v, state.conv)])
        else:
            for staged, array in zip(self._staged, (state.k, state.v, state.conv), strict=True):
                np.take(array, slots, axis=1, out=staged[:, :rows], mode="clip")
            bound.place_caches([staged[:, :rows] for staged in self._staged])
        self.features.run_with_iobinding(bound.features)
        self.encoder.run_with_iobinding(bound.encoder)
        state.audio_tail[slots] = bound["audio_tail_next"]
        state.mel_cache[slots] = bound["mel_cache_next"]
        state.conv[:, slots] = bound["conv_next"]
        ring = (position[:, None] + np.arange(self.chunk.frames)) % self.cache
        # Indexed by (slot, ring row) the arena reads [B, T, L, heads, d_k].
        state.k[:, slots[:, None], :, ring] = bound["k_new"].transpose(1, 3, 0, 2, 4)
        state.v[:, slots[:, None], :, ring] = bound["v_new"].transpose(1, 3, 0, 2, 4)
        return bound["encoded_joint"]

    def array(self, name: str, rows: int, dtype: Any = np.float32) -> NDArray[Any]:
        """What batches of `rows` have of the tensor's memory: a server meets every batch size there is."""
        most, shape = (
            [n if axis == "B" else int(axis) for axis in self._shapes[name]] for n in (self._max_batch, rows)
        )
        room = self._room.setdefault(name, np.zeros(math.prod(most), dtype))
        return room[: math.prod(shape)].reshape(shape)


class _Bound:
    """Everything bound for batches of one size: our arrays by name, and the two bindings that hold their addresses."""

    def __init__(self, step: _Step, rows: int) -> None:
        self.features, self.encoder = step.features.io_binding(), step.encoder.io_binding()
        self._layers = step._layers
        self._caches: tuple[int, ...] = ()
        self._arrays: dict[str, NDArray[Any]] = {}
        for name in ("audio", "audio_tail", "mel_cache", "audio_tail_next", "mel", "mel_cache_next"):
            self._arrays[name] = step.array(name, rows)
        self._arrays["encoded_joint"] = step.array("encoded_joint", rows)
        for name in ("k_new", "v_new", "conv_next"):
            self._arrays[name] = step.array(name, rows, step.state.k.dtype)
        for name in ("lengths", "position", "valid"):
            self._arrays[name] = step.array(name, rows, np.int64)
        for name in ("audio", "audio_tail", "lengths"):
            _bind(self.features.bind_input, name, self[name])
        for name in ("mel", "audio_tail_next"):
            _bind(self.features.bind_output, name, self[name])
        for name in ("mel", "mel_cache", "position", "valid"):
            _bind(self.encoder.bind_input, name, self[name])
        for name in ("encoded_joint", "mel_cache_next", "k_new", "v_new", "conv_next"):
            _bind(self.encoder.bind_output, name, self[name])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def place_caches(self, caches: list[Floats]) -> None:
        """Bind each layer's rows of K, V and convolution caches where they lie, unless they are bound there already."""
        where = tuple(array.ctypes.data for array in caches)
        if where == self._caches:
            return
        for kind, array in zip(("k_cache", "v_cache", "conv_cache"), caches, strict=True):
            for layer in range(self._layers):
                _bind(self.encoder.bind_input, f"{kind}.{layer}", array[layer])
        self._caches = where


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class _Transducer:
    """Prediction net and joint as sessions. They are small and called often: one thread, plain runs."""

    def __init__(self, bundle: Bundle) -> None:
        self.blank, self.max_symbols = bundle.manifest.decoder.blank, bundle.manifest.decoder.max_symbols
        self._decoder = _session(bundle.file("decoder"), threads=1)
        self._joint = _session(bundle.file("joint"), threads=1)

    def predict(self, tokens: Ints, h: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
        predicted, h, c = self._decoder.run(["predicted", "h_next", "c_next"], {"token": tokens, "h": h, "c": c})
        return predicted, h, c

    def join(self, encoded: Floats, predicted: Floats) -> Floats:
        return self._joint.run(["logits"], {"encoded_joint": encoded, "predicted": predicted})[0]


def _session(graph: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # warnings about our own graphs are not the user's business
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own kinds
        raise BackendError(f"ONNX Runtime cannot load {graph}: {error}") from error
