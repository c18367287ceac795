"""CUDA kernels for everything in a step except the encoder: sources, argument struct, macros and packed weights.

The `.cu` files form one translation unit, concatenated in the order of `SOURCES`. Model sizes are preprocessor macros,
so that the compiler knows all bounds. Every kernel takes one argument, the struct `Step`, whose fields are listed here
for both languages. This module does not depend on CUDA: `cuda.py` compiles and launches the kernels, and `tests/simt`
runs the same sources on a CPU.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Bundle, Manifest
from nemostream.errors import BackendError
from nemostream.runtime.decoding.boosting import MAX_TOKENS, Boosting
from nemostream.runtime.decoding.greedy import ALPHA

SOURCES = ("tile.cu", "features.cu", "slots.cu", "boosting.cu", "greedy.cu")
BLOCK = 256  # threads per block of every kernel
TILE_ROWS, TILE_COLUMNS = 16, 32
ALIGNMENT = 256  # bytes, of the address of every encoder input and output; required by TensorRT
GATHER_BLOCKS = 8  # blocks that share one row and layer in `gather` and `copy` (grid z)
COPY_SLOTS = 8  # slots that a launch of `copy` can copy
MATMUL_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # the macro MATMUL_TYPE, by `cache_dtype`

# Elements of `Step.control`, counters in device memory.
CONTROL = ("ITERATION", "TICKET", "TOKENS", "EMITTED", "BUFFER", "PAIRS", "PAIRS_ODD", "ROWS", "ROWS_ODD")

# Fields of the struct `Step`. B = `rows`, T = `frames`, N = `samples`, S = `slots`, L encoder layers, D d_model,
# C cache frames, K convolution cache frames, M mel bins, J joint size, R prediction network layers, P its hidden size,
# V logits (blank included). Arrays are C-ordered; caches have elements of CACHE_ITEMSIZE bytes.
FIELDS: tuple[tuple[str, str], ...] = (
    ("int", "rows"),
    ("int", "frames"),
    ("int", "samples"),
    ("int", "slots"),
    ("int", "max_rows"),  # rows that buffers have room for, a multiple of 4
    ("int", "max_pairs"),  # (row, frame) pairs that buffers have room for
    ("int", "in_place"),  # row b is slot b: the encoder reads the slots directly
    ("int", "looping"),  # the decoding loop is a conditional graph node
    ("int", "slot"),  # argument of `reset_decoder` and `set_phrases`
    ("int", "automaton"),  # argument of `set_phrases`: word in the phrase pool where the automaton starts, -1 for none
    ("SlotList", "sources"),  # arguments of `copy`
    ("SlotList", "targets"),
    ("unsigned long long", "condition"),  # handle of the conditional node
    # -- host memory, two buffers of each
    # int slots [max_rows], lengths [max_rows], prompts [max_rows]; float audio [B, N]
    ("const char*", "host_input"),
    # int token count, undecided pairs, 2 unused; int failed [max_rows]; EmittedToken tokens[]
    ("char*", "host_output"),
    ("long long", "host_input_bytes"),  # of one buffer
    ("long long", "host_output_bytes"),
    # -- slots
    ("char*", "k"),  # [L, S, heads, C, d_k], each layer padded to a multiple of ALIGNMENT bytes
    ("char*", "v"),
    ("char*", "conv"),  # [L, S, D, K], padded
    ("float*", "mel_cache"),  # [S, 9, M]
    ("float*", "tail"),  # [S, tail]
    ("float*", "predicted"),  # [S, J]
    ("float*", "h"),  # [S, R, P]
    ("float*", "c"),  # [S, R, P]
    ("int*", "node"),  # [S], current node of the phrase automaton
    ("long long*", "position"),  # [S], in encoder frames
    ("int*", "slot_automaton"),  # [S], as `automaton`
    ("const int*", "phrase_pool"),  # automata (see `automaton`)
    ("const int*", "reset_slots"),
    # -- weights
    ("const double*", "window"),  # [window - 2], without its zeros at both ends
    ("const double2*", "twiddles"),  # [n_fft / 2] cosine, sine
    ("const double*", "filters"),  # [n_fft / 2 + 1, M]
    ("const int*", "filter_bins"),  # [M, 2], first bin and end
    ("const double*", "guard"),  # [1]
    ("const float*", "embedding"),  # [V, P]
    ("const unsigned*", "lstm_weight"),  # packed, `lstm_words` per layer
    ("const float*", "lstm_bias"),  # [R, 4, P]
    ("const unsigned*", "project_weight"),  # packed
    ("const float*", "project_bias"),  # [J]
    ("const unsigned*", "joint_weight"),  # packed
    ("const float*", "joint_bias"),  # [V]
    ("long long", "lstm_words"),
    ("const float*", "start_predicted"),  # [J], decoder state before the first token
    ("const float*", "start_h"),  # [R, P]
    ("const float*", "start_c"),
    # -- rows of the step
    ("int*", "row_slot"),  # [B], -1 for an idle row
    ("int*", "row_length"),
    ("int*", "row_count"),  # frames to decode
    ("int*", "row_failed"),
    ("int*", "row_frame"),  # frame being decoded
    ("int*", "row_end"),
    ("int*", "row_label_frame"),  # frame of the last label, -1 for none
    ("int*", "row_symbols"),  # labels emitted at that frame
    ("int*", "row_label"),
    ("int*", "row_automaton"),  # `slot_automaton` of its slot
    ("long long*", "row_position"),  # [B], also an encoder input
    ("long long*", "row_valid"),
    ("long long*", "row_prompt"),  # prompt ids; only the encoders of prompted models read them
    ("float*", "waveform"),  # [B, tail + N]
    ("float*", "mel"),  # [B, 8T, M]
    ("float*", "row_mel_cache"),  # [B, 9, M]
    ("float*", "mel_cache_next"),
    ("char*", "row_k"),  # [L, B, heads, C, d_k], gathered, padded like the slots
    ("char*", "row_v"),
    ("char*", "row_conv"),  # [L, B, D, K], padded
    ("const char*", "k_new"),  # [L, B, heads, T, d_k]
    ("const char*", "v_new"),
    ("const char*", "conv_next"),  # [L, B, D, K]
    ("const float*", "encoded"),  # [B, T, J]
    # -- decoding
    ("int*", "control"),
    ("int*", "list_rows"),  # [2, max_rows], by parity: rows with frames left
    ("int*", "list_first"),  # [2, max_rows], index of their first pair
    ("int*", "list_pairs"),  # [2, max_pairs], row * T + frame
    ("float4*", "partial"),  # [max_pairs, tiles], largest logit, its id, sums of exponentials and of their powers
    ("float4*", "boosted"),  # [max_pairs, tiles], rows with phrases: largest biased logit, its id, its plain logit
    ("float*", "bias"),  # [max_rows, V - 1]
    ("int*", "emitted"),  # [max_rows], rows that emitted a label in this iteration
    ("float*", "h_next"),  # [B, R, P]
    ("EmittedToken*", "tokens"),  # see `TOKEN`
)
_NUMPY = {
    "int": np.dtype("i4"),
    "unsigned long long": np.dtype("u8"),
    "long long": np.dtype("i8"),
    "SlotList": np.dtype(("i4", COPY_SLOTS)),
}
_POINTER = np.dtype("u8")
STEP = np.dtype([(name, _NUMPY.get(kind, _POINTER)) for kind, name in FIELDS], align=True)
TOKEN = np.dtype([("row", "i4"), ("token", "i4"), ("frame", "i4"), ("score", "f4"), ("sum_p_alpha", "f4")])


def source() -> str:
    """Return the translation unit."""
    fields = "".join(f"  {kind} {name};\n" for kind, name in FIELDS)
    head = (
        "typedef unsigned long long cudaGraphConditionalHandle;\n"
        "#if CONDITIONAL && !defined(CUDA_ON_CPU)\n"
        'extern "C" __device__ void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value);\n'
        "#endif\n"
        "#ifndef CUDA_ON_CPU\n"
        "#define isfinite(x) (fabsf(x) < __uint_as_float(0x7f800000u))\n"
        "#define isnan(x) ((x) != (x))\n"
        "#endif\n"
        f"#define BLOCK {BLOCK}\n#define GATHER_BLOCKS {GATHER_BLOCKS}\n#define ALIGNMENT {ALIGNMENT}\n"
        f"#define TILE_ROWS {TILE_ROWS}\n#define TILE_COLUMNS {TILE_COLUMNS}\n"
        f"#define ALPHA {ALPHA}f\n#define MAX_PHRASE_TOKENS {MAX_TOKENS}\n"
        f"enum {{ {', '.join(CONTROL)} }};\n"
        "struct EmittedToken { int row, token, frame; float score, sum_p_alpha; };\n"
        f"struct SlotList {{ int slot[{COPY_SLOTS}]; }};\n"
        f"struct Step {{\n{fields}}};\n"
    )
    folder = resources.files(__name__)
    parts = (f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in SOURCES)
    return head + "\n".join(parts)


def macros(manifest: Manifest, cache_dtype: str, conditional: bool) -> dict[str, int | str]:
    """Return the preprocessor macros for a model; `cache_dtype` is the type of caches and of the decoder's matmuls.

    Raises `BackendError` for sizes that the kernels do not support.
    """
    features, encoder, net = manifest.features, manifest.encoder, manifest.decoder
    itemsize = 4 if cache_dtype == "float32" else 2
    head_bytes = encoder.d_model // encoder.heads * itemsize
    unsupported = {
        f"an FFT of {features.n_fft} (a power of two is required)": features.n_fft & (features.n_fft - 1),
        f"a window of {features.window} in an FFT of {features.n_fft}": features.window - 2 > features.n_fft,
        f"a prediction network of {net.layers} layers (1 or 2 are supported)": net.layers > 2,
        f"a prediction network of {net.hidden} units (a multiple of 8 is required)": net.hidden % 8,
        f"attention heads of {head_bytes} bytes (a multiple of 16 is required)": head_bytes % 16,
    }
    for what, wrong in unsupported.items():
        if wrong:
            raise BackendError(f"the GPU kernels do not support {what}; use device='cpu'.")
    return {
        "MELS": features.mels,
        "WINDOW": features.window,
        "HOP": features.hop,
        "N_FFT": features.n_fft,
        "TAIL": features.tail,
        "PREEMPHASIS": repr(float(features.preemphasis)),
        "LEAD": manifest.lead,
        "LAYERS": encoder.layers,
        "D_MODEL": encoder.d_model,
        "HEADS": encoder.heads,
        "SUBSAMPLING": encoder.subsampling,
        "CACHE": encoder.cache,
        "CONV_CACHE": encoder.conv_cache,
        "NET_LAYERS": net.layers,
        "HIDDEN": net.hidden,
        "JOINT": net.joint,
        "VOCABULARY": net.vocabulary + 1,
        "MAX_SYMBOLS": net.max_symbols,
        "ACTIVATION": ("relu", "sigmoid", "tanh").index(net.activation),
        "MATMUL_TYPE": MATMUL_TYPES[cache_dtype],
        "CACHE_ITEMSIZE": itemsize,
        "CONDITIONAL": int(conditional),
    }


def tiles(columns: int) -> int:
    """Return the number of column tiles of a matrix product."""
    return -(-columns // TILE_COLUMNS)


def entries(manifest: Manifest) -> tuple[str, ...]:
    """Return the names of the kernels."""
    lstm = tuple(f"lstm_{layer}" for layer in range(manifest.decoder.layers))
    step = ("begin", "features", "gather", "scatter", "start", "join", "decide", *lstm, "project", "finish")
    return (*step, "reset", "reset_decoder", "copy", "set_phrases")


# -- weights -----------------------------------------------------------------------------------------------------------


def weights(bundle: Bundle, cache_dtype: str) -> dict[str, NDArray[Any]]:
    """Return the weights in `FIELDS`, by field name."""
    manifest = bundle.manifest
    features, net = manifest.features, manifest.decoder
    turn = -2 * np.pi * np.arange(features.n_fft // 2) / features.n_fft
    filters = np.array(bundle.weight("features.filters"))
    used = filters != 0
    # argmax returns the first bin; a filter without bins gets an empty range.
    last = len(used) - used[::-1].argmax(axis=0)
    bins = np.where(used.any(axis=0), np.stack([used.argmax(axis=0), last]), 0).T
    lstm = [np.array(bundle.weight(f"decoder.lstm.{layer}.weight")) for layer in range(net.layers)]
    # A tile of 32 columns holds the four gates of eight units.
    order = np.arange(4 * net.hidden).reshape(4, net.hidden // 8, 8).transpose(1, 0, 2).ravel()
    packed = [pack(weight[:, order], cache_dtype) for weight in lstm]
    arrays = {
        "window": np.concatenate([bundle.weight("features.window_left"), bundle.weight("features.window_right")[::-1]]),
        "twiddles": np.stack([np.cos(turn), np.sin(turn)], axis=1),
        "filters": filters,
        "filter_bins": bins.astype(np.int32),
        "guard": bundle.weight("features.guard"),
        "embedding": bundle.weight("decoder.embedding"),
        "lstm_weight": np.stack(packed),
        "lstm_bias": np.stack([bundle.weight(f"decoder.lstm.{layer}.bias") for layer in range(net.layers)]),
        "project_weight": pack(bundle.weight("joint.pred.weight"), cache_dtype),
        "project_bias": bundle.weight("joint.pred.bias"),
        "joint_weight": pack(bundle.weight("joint.out.weight"), cache_dtype),
        "joint_bias": bundle.weight("joint.out.bias"),
    }
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def pack(matrix: NDArray[np.float32], cache_dtype: str) -> NDArray[np.uint32]:
    """Pack a matrix [K, N] as 32-bit words in the order that `product` (`tile.cu`) reads, K and N zero-padded.

    fp32: tile of 32 columns, k, column. 16 bit: tile, 16 k, 8 columns, lane, and the lane's two words of the B fragment
    of `mma.m16n8k16` (PTX manual): lane 4g + m holds column g, elements k = 2m, 2m + 1 and 2m + 8, 2m + 9.
    """
    depth, columns = matrix.shape
    column_tiles = tiles(columns)
    padded = np.zeros((-(-depth // 16) * 16, column_tiles * TILE_COLUMNS), np.float32)
    padded[:depth, :columns] = matrix
    if cache_dtype == "float32":
        split = padded.reshape(-1, column_tiles, TILE_COLUMNS).transpose(1, 0, 2)
        return np.ascontiguousarray(split).view(np.uint32).ravel()
    bits = to_16bit(padded, cache_dtype)
    # Axes: 16 k, half of them, m, pair | tile, 8 columns, g
    fragments = bits.reshape(-1, 2, 4, 2, column_tiles, 4, 8).transpose(4, 0, 5, 6, 2, 1, 3)
    return np.ascontiguousarray(fragments).view(np.uint32).ravel()


def automaton(phrases: Boosting) -> NDArray[np.int32]:
    """Return a phrase automaton as 32-bit words in the layout that `boosting.cu` reads."""
    parts = (phrases.first, phrases.token, phrases.score.view(np.int32), phrases.fail, phrases.penalty.view(np.int32))
    return np.concatenate([np.array([len(phrases)], np.int32), *parts])


def to_16bit(array: NDArray[np.float32], cache_dtype: str) -> NDArray[np.uint16]:
    """Round an fp32 array to nearest even in a 16-bit type and return its bits."""
    if cache_dtype == "float16":
        return array.astype(np.float16).view(np.uint16)
    words = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)  # bfloat16: the upper half


def start_state(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Return the decoder state before the first token: one LSTM step on blank, whose embedding is zero."""
    net = bundle.manifest.decoder
    x, h, c = np.zeros(net.hidden), [], []
    for layer in range(net.layers):
        joined = np.concatenate([x, np.zeros(net.hidden)])
        gates = joined @ bundle.weight(f"decoder.lstm.{layer}.weight") + bundle.weight(f"decoder.lstm.{layer}.bias")
        i, _, g, o = gates.reshape(4, net.hidden)
        c.append(_sigmoid(i) * np.tanh(g))
        x = _sigmoid(o) * np.tanh(c[-1])
        h.append(x)
    predicted = x @ bundle.weight("joint.pred.weight") + bundle.weight("joint.pred.bias")
    arrays = {"start_predicted": predicted, "start_h": np.stack(h), "start_c": np.stack(c)}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))
