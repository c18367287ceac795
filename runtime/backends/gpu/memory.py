"""Device memory of the GPU backend: its arrays, their sizes, and the capacity that fits.

Arithmetic only, without a GPU: `arena` allocates these arrays, and `nemostream doctor --plan` prints their sizes. Only
its library knows what an encoder allocates; without an engine, this module estimates it from the sizes of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.errors import BundleError, OptionError
from nemostream.runtime.backends.gpu import kernels

Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, np.dtype]]  # shape and type of each array, by name

PHRASE_POOL_BYTES = 32 << 20  # automata of 1.6 million tokens
# Left free: for captured graphs, for what libraries load on first use, and for rounding of allocations.
RESERVED_BYTES = 512 << 20
MAX_ELEMENTS = 2**31 - 1  # of a tensor: TensorRT rejects larger ones
BY_LAYER = ("k", "v", "conv")  # slot arrays whose first axis is the layer

_FEED_FORWARD = 4  # width of a feed-forward module, in d_model
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


@dataclass(frozen=True)
class MemoryLayout:
    """Arrays of a backend with `capacity` slots, for steps of up to `max_batch` rows of the given chunk sizes.

    Array names are those of `kernels.FIELDS`.
    """

    manifest: Manifest
    cache_dtype: str  # "float32", "float16" or "bfloat16"
    capacity: int
    max_batch: int
    chunks: tuple[ChunkConfig, ...]

    @property
    def max_rows(self) -> int:
        """Rows that the buffers have room for."""
        return -(-self.max_batch // 4) * 4

    @property
    def max_frames(self) -> int:
        return max(chunk.frames for chunk in self.chunks)

    @property
    def max_samples(self) -> int:
        return max(chunk.samples for chunk in self.chunks)

    @property
    def max_tokens(self) -> int:
        """Tokens that a step can emit."""
        return self.max_rows * self.max_frames * self.manifest.decoder.max_symbols

    @property
    def bytes_per_stream(self) -> int:
        """Memory of one slot."""
        return sum(array_bytes(self.slot()).values())

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(sum(part.values()) for part in (self.slot_bytes(), self.buffer_bytes(), self.weight_bytes()))

    # -- arrays --------------------------------------------------------------------------------------------------------

    def slot(self) -> Layout:
        """Return the arrays of one slot that are its state."""
        spec, net, cache = self.manifest.encoder, self.manifest.decoder, self._cache
        ring = (spec.layers, spec.heads, spec.cache, spec.d_model // spec.heads)
        return {
            "k": (ring, cache),
            "v": (ring, cache),
            "conv": ((spec.layers, spec.d_model, spec.conv_cache), cache),
            "mel_cache": ((spec.mel_cache, self.manifest.features.mels), _FLOAT32),
            "tail": ((self.manifest.features.tail,), _FLOAT32),
            "predicted": ((net.joint,), _FLOAT32),
            "h": ((net.layers, net.hidden), _FLOAT32),
            "c": ((net.layers, net.hidden), _FLOAT32),
            "node": ((), _INT32),
            "position": ((), _INT64),
        }

    def step(self) -> Layout:
        """Return the buffers of a step besides the slots, for the largest batch and the longest chunk."""
        manifest, rows, frames, cache = self.manifest, self.max_rows, self.max_frames, self._cache
        spec, net, mels = manifest.encoder, manifest.decoder, manifest.features.mels
        d_k, tiles = spec.d_model // spec.heads, kernels.tiles(net.vocabulary + 1)
        ring = (spec.layers, rows, spec.heads, spec.cache, d_k)
        new = (spec.layers, rows, spec.heads, frames, d_k)
        conv = (spec.layers, rows, spec.d_model, spec.conv_cache)
        words = ("slot", "length", "count", "failed", "frame", "end", "label_frame", "symbols", "label", "automaton")
        return {
            **{f"row_{word}": ((rows,), _INT32) for word in words},
            "row_position": ((rows,), _INT64),
            "row_valid": ((rows,), _INT64),
            "row_prompt": ((rows,), _INT64),
            "waveform": ((rows, manifest.features.tail + self.max_samples), _FLOAT32),
            "mel": ((rows, spec.subsampling * frames, mels), _FLOAT32),
            "row_mel_cache": ((rows, spec.mel_cache, mels), _FLOAT32),
            "mel_cache_next": ((rows, spec.mel_cache, mels), _FLOAT32),
            "row_k": (ring, cache),
            "row_v": (ring, cache),
            "row_conv": (conv, cache),
            "k_new": (new, cache),
            "v_new": (new, cache),
            "conv_next": (conv, cache),
            "encoded": ((rows, frames, net.joint), _FLOAT32),
            "control": ((len(kernels.CONTROL),), _INT32),
            "list_rows": ((2, rows), _INT32),
            "list_first": ((2, rows), _INT32),
            "list_pairs": ((2, rows * frames), _INT32),
            "partial": ((rows * frames, tiles, 4), _FLOAT32),
            "boosted": ((rows * frames, tiles, 4), _FLOAT32),
            "bias": ((rows, net.vocabulary), _FLOAT32),
            "emitted": ((rows,), _INT32),
            "h_next": ((rows, net.layers, net.hidden), _FLOAT32),
            "tokens": ((self.max_tokens,), kernels.TOKEN),
        }

    def weights(self) -> Layout:
        """Return the arrays of `kernels.weights` and `kernels.start_state`."""
        front, net = self.manifest.features, self.manifest.decoder
        hidden, logits, state = net.hidden, net.vocabulary + 1, (net.layers, net.hidden)
        word = np.dtype(np.uint32)
        return {
            "window": ((front.window - 2,), _FLOAT64),
            "twiddles": ((front.n_fft // 2, 2), _FLOAT64),
            "filters": ((front.n_fft // 2 + 1, front.mels), _FLOAT64),
            "filter_bins": ((front.mels, 2), _INT32),
            "guard": ((1,), _FLOAT64),
            "embedding": ((logits, hidden), _FLOAT32),
            "lstm_weight": ((net.layers, self._packed_words(2 * hidden, 4 * hidden)), word),
            "lstm_bias": ((net.layers, 4 * hidden), _FLOAT32),
            "project_weight": ((self._packed_words(hidden, net.joint),), word),
            "project_bias": ((net.joint,), _FLOAT32),
            "joint_weight": ((self._packed_words(net.joint, logits),), word),
            "joint_bias": ((logits,), _FLOAT32),
            "start_predicted": ((net.joint,), _FLOAT32),
            "start_h": (state, _FLOAT32),
            "start_c": (state, _FLOAT32),
        }

    def layer_bytes(self, name: str, rows: int) -> int:
        """Return the bytes from one layer to the next of an array in `BY_LAYER` with `rows` rows or slots.

        Every layer is an input of the encoder, whose address must be aligned.
        """
        shape, dtype = self.slot()[name]
        return _align(rows * prod(shape[1:]) * dtype.itemsize)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def slot_bytes(self) -> dict[str, int]:
        """Return the bytes of each array of all slots."""
        layers, sizes = self.manifest.encoder.layers, array_bytes(self.slot())
        return {
            name: layers * self.layer_bytes(name, self.capacity) if name in BY_LAYER else self.capacity * size
            for name, size in sizes.items()
        }

    def buffer_bytes(self) -> dict[str, int]:
        """Return the bytes of each buffer of a step, and of the phrases."""
        layers = self.manifest.encoder.layers
        rows = {f"row_{name}": layers * self.layer_bytes(name, self.max_rows) for name in BY_LAYER}
        phrases = {"slot_automaton": self.capacity * _INT32.itemsize, "phrase_pool": PHRASE_POOL_BYTES}
        return array_bytes(self.step()) | rows | phrases

    def weight_bytes(self) -> dict[str, int]:
        """Return the bytes of each array of `weights`."""
        return array_bytes(self.weights())

    # -- limits --------------------------------------------------------------------------------------------------------

    def largest_capacity(self, available: int) -> int:
        """Return the largest capacity, with the same `max_batch`, whose arrays fit in `available` bytes; 0 if none."""
        capacity = max(0, available - replace(self, capacity=0).nbytes) // self.bytes_per_stream
        while capacity and replace(self, capacity=capacity).nbytes > available:  # layers are padded
            capacity -= 1
        return capacity

    def largest_single_batch(self, available: int, encoder_bytes: Callable[[int], int]) -> int:
        """Return the largest capacity below `max_batch` that fits, with encoders, if one batch holds all streams.

        `encoder_bytes` returns the memory of the encoders for a batch size.
        """

        def fits(rows: int) -> bool:
            return replace(self, capacity=rows, max_batch=rows).nbytes + encoder_bytes(rows) <= available

        low, high = 0, self.max_batch
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    @property
    def _cache(self) -> np.dtype:
        # numpy has no bfloat16; its bits are stored.
        return np.dtype({"float32": "f4", "float16": "f2", "bfloat16": "u2"}[self.cache_dtype])

    def _packed_words(self, depth: int, columns: int) -> int:
        """Return the number of words of a matrix packed by `kernels.pack`."""
        elements = -(-depth // 16) * 16 * kernels.tiles(columns) * kernels.TILE_COLUMNS
        return elements * self._cache.itemsize // 4


def _align(size: int) -> int:
    return -(-size // kernels.ALIGNMENT) * kernels.ALIGNMENT


def array_bytes(layout: Mapping[str, tuple[Shape, np.dtype]]) -> dict[str, int]:
    """Return the bytes of each array."""
    return {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in layout.items()}


# -- encoder -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of an encoder graph that are not in the manifest."""

    channels: int  # of the convolutions of the subsampling
    parameters: int  # elements of all weights


def encoder_sizes(bundle: Bundle, chunk: ChunkConfig) -> EncoderSizes:
    """Return the sizes of a chunk size's graph.

    Raises `BundleError` if it is not an encoder graph, or has a table of other prompt ids than the manifest, beyond
    which the device would read.
    """
    graph, bias = f"encoder-{chunk.ms}ms", "encoder.pre_encode.conv.0.bias"
    shapes = bundle.weight_shapes(graph)
    if len(shapes.get(bias, ())) != 1:
        raise BundleError(f"{bundle.file(graph)} has no weight {bias!r}; export the checkpoint again.")
    prompts, count = (shapes.get("prompt.table") or (0,))[0], bundle.manifest.languages.count
    if prompts != count:
        raise BundleError(
            f"{bundle.file(graph)} has a table of {prompts} prompt ids, the manifest states {count}; export the "
            "checkpoint again."
        )
    return EncoderSizes(shapes[bias][0], sum(map(prod, shapes.values())))


def encoder_tensors(manifest: Manifest, chunk: ChunkConfig, channels: int) -> dict[str, int]:
    """Return the elements per row of the encoder's large tensors; no other tensor of the graph is larger than all."""
    spec, frames = manifest.encoder, chunk.frames
    d_k, window = spec.d_model // spec.heads, spec.mel_cache + spec.subsampling * frames
    return {
        "the output of the first convolution": channels * (window // 2 + 1) * (manifest.features.mels // 2 + 1),
        "the hidden layer of a feed-forward module": frames * _FEED_FORWARD * spec.d_model,
        "the attention scores": spec.heads * frames * (spec.cache + 2 * frames - 1),
        "the K cache of a layer": spec.heads * spec.cache * d_k,
        "the new rows of K": spec.layers * spec.heads * frames * d_k,
        "the convolution caches": spec.layers * spec.d_model * spec.conv_cache,
    }


def activation_bytes(manifest: Manifest, chunk: ChunkConfig, channels: int) -> int:
    """Return an estimate of the encoder's working memory per row: input and output of the largest operation.

    It is usually the one that masks the output of the first convolution, which is fp32 in every precision.
    """
    return 2 * _FLOAT32.itemsize * max(encoder_tensors(manifest, chunk, channels).values())


def check_max_batch(manifest: Manifest, chunks: Iterable[ChunkConfig], channels: int, max_batch: int) -> None:
    """Raise `OptionError` if a tensor of the encoder would have too many elements, with the largest batch that fits."""
    tensors = {
        (name, chunk.ms): elements
        for chunk in chunks
        for name, elements in encoder_tensors(manifest, chunk, channels).items()
    }
    (name, ms), elements = max(tensors.items(), key=lambda item: item[1])
    if max_batch * elements > MAX_ELEMENTS:
        raise OptionError(
            f"max_batch is {max_batch}: with chunks of {ms} ms, {name} of the encoder would have "
            f"{max_batch * elements:,} elements, and a tensor can have at most {MAX_ELEMENTS:,}; choose max_batch="
            f"{MAX_ELEMENTS // elements} or less."
        )
