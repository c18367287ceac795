"""CPU backend on ONNX Runtime.

The state of all streams is kept in arrays allocated once, indexed by slot. K and V are ring buffers into which a step
writes T rows. Graphs with operators of our own (`operators`) read and update the caches of their slots in place. For
other graphs, a step of B streams reads its rows through IO binding: in place if the slots are adjacent (always the case
for one stream), from a staging copy otherwise. All graph inputs and outputs are preallocated and bound by address once
per chunk size and batch size; only the caches are bound again, when their address changes.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError
from nemostream.plans import Plan, missing_engine_error
from nemostream.runtime.backends.base import (
    DEFAULT_MAX_BATCH,
    Batch,
    Emissions,
    at_least_one,
    check_copy,
    check_state,
)
from nemostream.runtime.backends.cpus import default_threads
from nemostream.runtime.backends.operators import WEIGHTS, library
from nemostream.runtime.decoding.boosting import NO_PHRASES, Boosting
from nemostream.runtime.decoding.greedy import DecoderState, label_looping

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
StageWrapper = Callable[[str, Callable[..., Any]], Callable[..., Any]]  # name and function to function

# A network with weights of this size is slow if one thread reads them, or most joined frames are in vain. The joints of
# published models have 2.6 MB (one language) and 33.5 MB (40 languages), their prediction networks 26 MB. The products
# of 32 pairs take about as long as reading the weights of a joint.
_LARGE_BYTES = 16 << 20
_LARGE_JOINT_PAIRS = 32

# `nemostream/__init__.py` sets the variable; this also disables telemetry if ONNX Runtime was imported earlier.
if os.environ.get("ORT_DISABLE_TELEMETRY") == "1":
    ort.disable_telemetry_events()


class OrtBackend:
    """A bundle on ONNX Runtime's CPU provider. Not thread-safe: called by one thread, as `Backend` requires.

    `capacity` is the number of slots, `threads` the number of ONNX Runtime threads (default: all CPUs available to this
    process, see `cpus`). `plans`, by chunk size in ms, replace the bundle's own encoder steps; other chunk sizes then
    raise `BackendError`, and so do graphs that cannot be loaded.
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
        self.max_batch = min(max_batch or DEFAULT_MAX_BATCH, capacity)
        self.manifest = bundle.manifest
        self._bundle = bundle
        self._threads = threads or default_threads()
        self._plans = plans
        self.transducer = OrtTransducer(bundle, self._threads)
        cache_dtypes = sorted({plan.recipe.cache_dtype for plan in plans.values()} if plans else {"float32"})
        if cache_dtypes not in (["float32"], ["float16"]):
            raise BackendError(
                f"a CPU cannot run engines with caches of {' and '.join(cache_dtypes)}; float32 or float16 is required."
            )
        self._state = _SlotArrays(bundle, capacity, np.dtype(cache_dtypes[0]))
        self._start = DecoderState.initial(self.transducer, self.manifest.decoder.layers, self.manifest.decoder.hidden)
        self._phrases: list[Boosting | None] = [None] * capacity
        # Staging copies for slots that are not adjacent. Untouched pages of zeros use no memory.
        self._staged = [
            np.zeros((rings.shape[0], self.max_batch, *rings.shape[2:]), rings.dtype)
            for rings in (self._state.k, self._state.v, self._state.conv)
        ]
        self._steps: dict[int, _ChunkStep] = {}  # by chunk size in ms
        self._shared_weights: dict[Path, ort.OrtValue] = {}  # by file; used where they are by the graphs of `_steps`

    def prepare(self, chunk: ChunkConfig) -> None:
        """Load the graphs of a chunk size now instead of at its first step."""
        if chunk.ms not in self._steps:
            if self._plans is None:
                session = _session(self._bundle.file(f"encoder-{chunk.ms}ms"), self._threads)
            elif chunk.ms in self._plans:
                plan = self._plans[chunk.ms]
                session = _session(plan.path, self._threads, operators=library(), weights=self._weights(plan.shared))
            else:
                raise missing_engine_error(chunk.ms, self._plans)
            self._steps[chunk.ms] = _ChunkStep(
                self._bundle, session, chunk, self._state, self._staged, self.max_batch, self._threads
            )

    @property
    def bytes_per_stream(self) -> int:
        """Memory of one slot."""
        return self._state.nbytes // self.capacity

    def reset(self, slots: Ints) -> None:
        self._state.reset(slots)
        for slot in slots.tolist():
            self._phrases[slot] = None
        self.reset_decoder(slots)

    def reset_decoder(self, slots: Ints) -> None:
        self._state.set_decoder(slots, self._start)

    def set_phrases(self, slot: int, phrases: Boosting | None) -> None:
        self._phrases[slot] = phrases
        self._state.node[slot] = 0

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        phrases = self._phrases[slot]
        arrays = {name: array.copy() for name, array in self._state.rows(slot).items()}
        return {**arrays, "phrases": NO_PHRASES if phrases is None else phrases.digest}

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        check_state(state, self.save(slot))
        for name, array in self._state.rows(slot).items():
            array[...] = state[name]

    def copy(self, sources: Ints, targets: Ints) -> None:
        check_copy(sources, targets, self.capacity)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._state.copy(source, target)
            self._phrases[target] = self._phrases[source]

    def submit(self, batch: Batch) -> CompletedStep:
        self.prepare(batch.chunk)
        encoded, counts = self.encode(batch)
        slots, state = batch.slots, self._state
        start = state.position[slots] - batch.chunk.frames
        predictions = DecoderState(state.predicted[slots], state.h[slots], state.c[slots], state.node[slots])
        phrases = [self._phrases[slot] for slot in slots.tolist()]
        labels, failed = label_looping(
            self.transducer,
            encoded,
            counts,
            predictions,
            phrases if phrases.count(None) < len(phrases) else (),
            self.transducer.max_pairs,
        )
        state.set_decoder(slots, predictions)
        return CompletedStep(
            Emissions.of_rows(
                [row.tokens for row in labels],
                [[frame + first for frame in row.frames] for row, first in zip(labels, start.tolist(), strict=True)],
                [row.scores for row in labels],
                [row.sum_p_alpha for row in labels],
                failed,
            )
        )

    def encode(self, batch: Batch) -> tuple[Floats, Ints]:
        """Run the step without decoding.

        Returns `encoded_joint` [B, T, J], valid until the next step, and the number of frames to decode per row.
        """
        self.prepare(batch.chunk)
        manifest, chunk, state = self.manifest, batch.chunk, self._state
        prompts = batch.prompt_ids(manifest.languages)
        position = state.position[batch.slots]
        received = position * manifest.samples_per_frame - manifest.lead + batch.lengths  # samples, this step included
        factor = manifest.encoder.subsampling
        valid = received // manifest.features.hop - factor * (position - 2)
        valid = np.minimum(valid, manifest.encoder.mel_cache + factor * chunk.frames)
        total = np.array([manifest.encoder_frames(int(samples)) for samples in received])
        counts = np.clip(total - position, 0, chunk.frames)
        try:
            encoded = self._steps[chunk.ms].run(batch, position, valid, prompts)
        except Exception as error:  # ONNX Runtime has its own exceptions
            raise BackendError(f"ONNX Runtime failed in a {chunk.ms} ms step: {error}") from error
        state.position[batch.slots] += chunk.frames
        return encoded, counts

    @contextlib.contextmanager
    def wrapped_stages(self, chunk: ChunkConfig, wrap: StageWrapper) -> Iterator[None]:
        """Replace each stage of a chunk size's steps by `wrap(name, stage)` in a `with` block, to time or count calls.

        Stages: "encode" (this method, which includes the next two and copies), "features", "encoder", "decoder" (the
        prediction network) and "joint".
        """
        self.prepare(chunk)
        step, transducer = self._steps[chunk.ms], self.transducer
        stages: list[tuple[str, object, str]] = [
            ("encode", self, "encode"),
            ("features", step, "run_features"),
            ("encoder", step, "run_encoder"),
            ("decoder", transducer, "run_decoder"),
            ("joint", transducer, "run_joint"),
        ]
        originals = [getattr(owner, attribute) for _, owner, attribute in stages]
        for (name, owner, attribute), stage in zip(stages, originals, strict=True):
            setattr(owner, attribute, wrap(name, stage))
        try:
            yield
        finally:
            for (_, owner, attribute), stage in zip(stages, originals, strict=True):
                setattr(owner, attribute, stage)
            del self.encode  # the method again

    def close(self) -> None:
        self._steps.clear()
        self._shared_weights.clear()

    def _weights(self, path: Path | None) -> ort.OrtValue | None:
        """Return the contents of a weight file that several engines share, read once."""
        if path is None:
            return None
        if path not in self._shared_weights:
            self._shared_weights[path] = _read_into_huge_pages(path)
        return self._shared_weights[path]


@dataclass(frozen=True)
class CompletedStep:
    """A step that was complete when `submit` returned."""

    emissions: Emissions

    def result(self) -> Emissions:
        return self.emissions


class _SlotArrays:
    """The state of all slots. Caches are layer first, so that one layer of adjacent slots is contiguous."""

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
        # Position 0 masks K and V until they are written, but a masked NaN would still propagate, so they are zeroed.
        for rings in (self.k, self.v, self.conv):
            rings[:, slots] = 0
        for rows in (self.audio_tail, self.mel_cache, self.position):
            rows[slots] = 0

    def set_decoder(self, slots: Ints, rows: DecoderState) -> None:
        """Set the decoder state of slots to `rows`: one row per slot, or one row for all."""
        self.predicted[slots], self.h[slots], self.c[slots] = rows.predicted, rows.h, rows.c
        self.node[slots] = rows.node

    def copy(self, source: int, target: int) -> None:
        for array in (self.k, self.v, self.conv):
            for layer in array:  # of all layers at once, NumPy copies through a temporary array
                layer[target] = layer[source]
        for array in (self.audio_tail, self.mel_cache, self.predicted, self.h, self.c, self.node, self.position):
            array[target] = array[source]

    def rows(self, slot: int) -> dict[str, NDArray[Any]]:
        """Return views of one slot's part of every array."""
        by_layer = ("k", "v", "conv")
        return {name: array[:, slot] if name in by_layer else array[slot, ...] for name, array in vars(self).items()}


class _ChunkStep:
    """Features and encoder of one chunk size, and the buffers they read and write."""

    def __init__(
        self,
        bundle: Bundle,
        encoder: ort.InferenceSession,
        chunk: ChunkConfig,
        state: _SlotArrays,
        staged: list[Floats],
        max_batch: int,
        threads: int,
    ) -> None:
        spec = bundle.manifest.encoder
        self.state, self.chunk, self.cache = state, chunk, spec.cache
        self.prompted = bundle.manifest.languages.count > 0  # whether the encoder has the input `prompt`
        self.features = _session(bundle.file(f"features-{chunk.ms}ms"), threads)
        self.encoder = encoder
        self.in_place = any(value.name == "slots" for value in encoder.get_inputs())
        graphs = bundle.manifest.graphs
        self._shapes = {
            tensor.name: tensor.shape
            for kind in ("features", "encoder")
            for side in ("inputs", "outputs")
            for tensor in getattr(graphs[f"{kind}-{chunk.ms}ms"], side)
        }
        self.run_features, self.run_encoder = self.features.run_with_iobinding, self.encoder.run_with_iobinding
        self.layers = spec.layers
        self._max_batch = max_batch
        self._staged = staged
        self._buffers: dict[str, NDArray[Any]] = {}  # for the largest batch; smaller ones use the beginning
        self._bound: dict[int, _BatchBindings] = {}  # by batch size

    def run(self, batch: Batch, position: Ints, valid: Ints, prompts: Ints) -> Floats:
        """Run features and encoder, update the slots except `position`, and return `encoded_joint` [B, T, J]."""
        state, slots, rows = self.state, batch.slots, len(batch.slots)
        bound = self._bound.get(rows) or self._bound.setdefault(rows, _BatchBindings(self, rows))
        bound["audio"][:] = batch.audio
        bound["audio_tail"][:] = state.audio_tail[slots]
        bound["lengths"][:] = batch.lengths
        bound["mel_cache"][:] = state.mel_cache[slots]
        bound["position"][:] = position
        bound["valid"][:] = valid
        bound["prompt"][:] = prompts
        bound["slots"][:] = slots
        bound.bind_caches(self._caches(slots))
        self.run_features(bound.features)
        self.run_encoder(bound.encoder)
        state.audio_tail[slots] = bound["audio_tail_next"]
        state.mel_cache[slots] = bound["mel_cache_next"]
        if self.in_place:
            return bound["encoded_joint"]
        state.conv[:, slots] = bound["conv_next"]
        ring = (position[:, None] + np.arange(self.chunk.frames)) % self.cache
        # Indexing by slot and ring row makes the left side [B, T, L, heads, d_k].
        state.k[:, slots[:, None], :, ring] = bound["k_new"].transpose(1, 3, 0, 2, 4)
        state.v[:, slots[:, None], :, ring] = bound["v_new"].transpose(1, 3, 0, 2, 4)
        return bound["encoded_joint"]

    def _caches(self, slots: Ints) -> list[Floats]:
        """Return K, V and convolution caches of the slots of a step [L, B, ...], or, in place, of all slots."""
        arrays, first, rows = [self.state.k, self.state.v, self.state.conv], int(slots[0]), len(slots)
        if self.in_place:
            return arrays
        if int(slots[-1]) - first == rows - 1 and (np.diff(slots) == 1).all():
            return [array[:, first : first + rows] for array in arrays]
        for staged, array in zip(self._staged, arrays, strict=True):
            np.take(array, slots, axis=1, out=staged[:, :rows], mode="clip")
        return [staged[:, :rows] for staged in self._staged]

    def array(self, name: str, rows: int, dtype: Any = np.float32) -> NDArray[Any]:
        """Return the buffer of a graph input or output for batches of `rows`; all batch sizes share its memory."""
        largest, shape = (
            [size if axis == "B" else int(axis) for axis in self._shapes[name]] for size in (self._max_batch, rows)
        )
        buffer = self._buffers.setdefault(name, np.zeros(math.prod(largest), dtype))
        return buffer[: math.prod(shape)].reshape(shape)


class _BatchBindings:
    """Buffers of one batch size by name, and the two IO bindings with their addresses."""

    def __init__(self, step: _ChunkStep, rows: int) -> None:
        self.features, self.encoder = step.features.io_binding(), step.encoder.io_binding()
        self._layers = step.layers
        self._caches: tuple[int, ...] = ()
        self._arrays: dict[str, NDArray[Any]] = {}
        for name in ("audio", "audio_tail", "mel_cache", "audio_tail_next", "mel", "mel_cache_next"):
            self._arrays[name] = step.array(name, rows)
        added = () if step.in_place else ("k_new", "v_new", "conv_next")
        self._arrays["encoded_joint"] = step.array("encoded_joint", rows)
        for name in added:
            self._arrays[name] = step.array(name, rows, step.state.k.dtype)
        for name in ("lengths", "position", "valid"):
            self._arrays[name] = step.array(name, rows, np.int64)
        self._arrays["prompt"], self._arrays["slots"] = np.zeros((2, rows), np.int64)
        for name in ("audio", "audio_tail", "lengths"):
            _bind(self.features.bind_input, name, self[name])
        for name in ("mel", "audio_tail_next"):
            _bind(self.features.bind_output, name, self[name])
        for name in ("mel", "mel_cache", "position", "valid"):
            _bind(self.encoder.bind_input, name, self[name])
        if step.prompted:
            _bind(self.encoder.bind_input, "prompt", self["prompt"])
        if step.in_place:
            _bind(self.encoder.bind_input, "slots", self["slots"])
        for name in ("encoded_joint", "mel_cache_next", *added):
            _bind(self.encoder.bind_output, name, self[name])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def bind_caches(self, caches: list[Floats]) -> None:
        """Bind K, V and convolution caches [L, ...] per layer, unless they are bound at this address already."""
        addresses = tuple(array.ctypes.data for array in caches)
        if addresses == self._caches:
            return
        for kind, array in zip(("k_cache", "v_cache", "conv_cache"), caches, strict=True):
            for layer in range(self._layers):
                _bind(self.encoder.bind_input, f"{kind}.{layer}", array[layer])
        self._caches = addresses


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


class OrtTransducer:
    """Prediction network and joint network. Their calls are small and frequent: one thread, no IO binding.

    Networks with large weights, which do not fit into a near cache, are an exception: they have `threads` threads, and
    a large joint joins few frames after a label in vain (`max_pairs`). Neither changes a bit of the results.
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        net = bundle.manifest.decoder
        joint_is_large = 4 * net.joint * (net.vocabulary + 1) > _LARGE_BYTES
        prediction_is_large = 4 * net.layers * 8 * net.hidden**2 > _LARGE_BYTES  # four gates, each of input and state
        self.max_pairs = _LARGE_JOINT_PAIRS if joint_is_large else None
        self.blank, self.max_symbols = bundle.manifest.decoder.blank, bundle.manifest.decoder.max_symbols
        self.run_decoder = _session(bundle.file("decoder"), threads if prediction_is_large else 1).run
        self.run_joint = _session(bundle.file("joint"), threads if joint_is_large else 1).run

    def predict(self, tokens: Ints, h: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
        predicted, h, c = self.run_decoder(["predicted", "h_next", "c_next"], {"token": tokens, "h": h, "c": c})
        return predicted, h, c

    def join(self, encoded: Floats, predicted: Floats) -> Floats:
        return self.run_joint(["logits"], {"encoded_joint": encoded, "predicted": predicted})[0]


def _read_into_huge_pages(path: Path) -> ort.OrtValue:
    """Read a file into pages of 2 MB where the system has them.

    A step reads all weights once. With pages of 4 KB it waits for 512 times as many address translations, and the
    processor, which prefetches only within a page, reads ahead less.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
            if file.readinto(memory) != size:
                raise OSError("it was truncated while it was read")
    except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
        raise BackendError(f"{path} cannot be read ({error}); build the engine again.") from error
    return ort.OrtValue.ortvalue_from_numpy(np.frombuffer(memory, np.uint8))


def _session(
    graph: Path, threads: int, operators: Path | None = None, weights: ort.OrtValue | None = None
) -> ort.InferenceSession:
    """Load a graph. `weights`, the initializer `WEIGHTS`, is used where it is and must exist as long as the session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads spin while a graph runs, but not after it: they would slow the next graph down, whose threads are others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors only: users cannot act on warnings about the exported graphs
    try:
        if operators:
            options.register_custom_ops_library(str(operators))
        if weights is not None:
            options.add_initializer(WEIGHTS, weights)
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has its own exceptions
        raise BackendError(f"ONNX Runtime cannot load {graph}: {error}") from error
