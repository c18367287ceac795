"""Our CUDA kernels: everything of a step but the encoder. Sources, sizes, the one argument they take, packed weights.

The files in `kernels/` are one translation unit, read in the order of `SOURCES`. The model's sizes are macros,
so the compiler knows every bound; a kernel takes one argument, the struct `Step`, whose fields are listed here once for
both languages. What the module does not know: CUDA. `runtime.cuda` compiles and launches, tests run the same sources on
a CPU (`tests/simt`).
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
BLOCK = 256  # threads of every block
TILE_ROWS, TILE_COLUMNS = 16, 32
PIECES = 8  # blocks that share a row's layer while gathering: `gather`'s grid, z
NARROW = {"float32": 0, "float16": 1, "bfloat16": 2}

# Words of `Step.control`, the device's own counters.
CONTROL = ("ITERATION", "TICKET", "RECORDS", "EMITTED", "LANE", "PAIRS", "PAIRS_ODD", "ROWS", "ROWS_ODD")

# What a kernel knows: sizes of the step, the slots' state, the model's weights, the step's own buffers.
# B rows (`rows`), T `frames`, N `samples`, S `slots`; shapes are C-ordered; caches in cells of CELL bytes.
FIELDS: tuple[tuple[str, str], ...] = (
    ("int", "rows"),
    ("int", "frames"),
    ("int", "samples"),
    ("int", "slots"),
    ("int", "most_rows"),  # rows the buffers have room for, a multiple of 4
    ("int", "most_pairs"),  # (row, frame) pairs they have room for
    ("int", "in_place"),  # row b is slot b: the encoder reads the arena itself
    ("int", "looping"),  # the decoding loop is a conditional node
    ("int", "slot"),  # what `reset_decoder` and `set_phrases` are for
    ("int", "automaton"),  # where in the pool `set_phrases` finds the slot's phrases, in words; -1: nowhere
    ("unsigned long long", "condition"),  # its handle
    # -- the host's memory, two lanes of each
    ("const char*", "host_in"),  # slots [most_rows] and lengths [most_rows], int; audio [B, N] float
    ("char*", "host_out"),  # records, undecided, -, -; failed [most_rows], int; records
    ("long long", "host_in_bytes"),  # of a lane
    ("long long", "host_out_bytes"),
    # -- the arena
    ("char*", "k"),  # [L, S, heads, C, d_k]
    ("char*", "v"),
    ("char*", "conv"),  # [L, S, D, K]
    ("float*", "mel_cache"),  # [S, 9, M]
    ("float*", "tail"),  # [S, tail]
    ("float*", "predicted"),  # [S, J]
    ("float*", "h"),  # [S, R, P]
    ("float*", "c"),  # [S, R, P]
    ("int*", "node"),  # [S] of the automaton
    ("long long*", "position"),  # [S]
    ("int*", "boost_at"),  # [S], as `automaton`
    ("const int*", "pool"),  # automata (`automaton` below)
    ("const int*", "reset_slots"),
    # -- weights
    ("const double*", "window"),  # [window - 2], its zero ends left out
    ("const double2*", "twiddles"),  # [n_fft / 2] cosine, sine
    ("const double*", "filters"),  # [n_fft / 2 + 1, M]
    ("const int*", "filter_bins"),  # [M, 2] first bin and the one after the last
    ("const double*", "guard"),  # [1]
    ("const float*", "embedding"),  # [V, P]
    ("const unsigned*", "lstm_weight"),  # packed, a layer every `lstm_words`
    ("const float*", "lstm_bias"),  # [R, 4, P]
    ("const unsigned*", "project_weight"),  # packed
    ("const float*", "project_bias"),  # [J]
    ("const unsigned*", "joint_weight"),  # packed
    ("const float*", "joint_bias"),  # [V]
    ("long long", "lstm_words"),
    ("const float*", "start_predicted"),  # [J]: a stream that has said nothing
    ("const float*", "start_h"),  # [R, P]
    ("const float*", "start_c"),
    # -- the step's rows
    ("int*", "row_slot"),  # [B], -1: idle
    ("int*", "row_length"),
    ("int*", "row_count"),  # frames to decode
    ("int*", "row_failed"),
    ("int*", "row_at"),  # the frame decoding stands at
    ("int*", "row_end"),
    ("int*", "row_last"),  # the frame of the last label, -1
    ("int*", "row_symbols"),  # labels at that frame
    ("int*", "row_label"),
    ("int*", "row_boost"),  # its slot's automaton
    ("long long*", "row_position"),  # [B], for the encoder too
    ("long long*", "row_valid"),
    ("float*", "wave"),  # [B, tail + N]
    ("float*", "mel"),  # [B, 8T, M]
    ("float*", "row_mel_cache"),  # [B, 9, M]
    ("float*", "mel_cache_next"),
    ("char*", "row_k"),  # [L, B, heads, C, d_k], gathered
    ("char*", "row_v"),
    ("char*", "row_conv"),  # [L, B, D, K]
    ("const char*", "k_new"),  # [L, B, heads, T, d_k]
    ("const char*", "v_new"),
    ("const char*", "conv_next"),  # [L, B, D, K]
    ("const float*", "encoded"),  # [B, T, J]
    # -- decoding
    ("int*", "control"),
    ("int*", "list_rows"),  # [2, most_rows]: rows with frames left, by parity
    ("int*", "list_first"),  # [2, most_rows]: where their pairs begin
    ("int*", "list_pairs"),  # [2, most_pairs]: row * T + frame
    ("float4*", "partial"),  # [most_pairs, tiles]: largest logit, its id, sums of exponentials and of their powers
    ("float4*", "boosted"),  # [most_pairs, tiles], of boosted rows: largest logit with its bias, its id, without it
    ("float*", "bias"),  # [most_rows, V - 1]
    ("int*", "emitted"),  # [most_rows]: rows that got a label in this iteration
    ("float*", "h_next"),  # [B, R, P]
    ("Record*", "records"),  # what was said: see `RECORD`
)
_NUMPY = {"int": "i4", "unsigned long long": "u8", "long long": "i8"}
STEP = np.dtype([(name, _NUMPY.get(kind, "u8")) for kind, name in FIELDS], align=True)
RECORD = np.dtype([("row", "i4"), ("token", "i4"), ("frame", "i4"), ("score", "f4"), ("power", "f4")])


def source() -> str:
    """The translation unit."""
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
        f"#define BLOCK {BLOCK}\n#define PIECES {PIECES}\n"
        f"#define TILE_ROWS {TILE_ROWS}\n#define TILE_COLUMNS {TILE_COLUMNS}\n"
        f"#define ALPHA {ALPHA}f\n#define DEEPEST {MAX_TOKENS}\n"
        f"enum {{ {', '.join(CONTROL)} }};\n"
        "struct Record { int row, token, frame; float score, power; };\n"
        f"struct Step {{\n{fields}}};\n"
    )
    folder = resources.files(__name__)
    parts = (f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in SOURCES)
    return head + "\n".join(parts)


def macros(manifest: Manifest, cache_dtype: str, conditional: bool) -> dict[str, int | str]:
    """The model's sizes as the sources want them; `cache_dtype` is the type of the caches and of decoding's products.

    Raises `BackendError` for sizes the kernels were not written for.
    """
    features, encoder, net = manifest.features, manifest.encoder, manifest.decoder
    line = encoder.d_model // encoder.heads * np.dtype("f4" if cache_dtype == "float32" else "f2").itemsize
    unsupported = {
        f"an FFT of {features.n_fft} (a power of two is needed)": features.n_fft & (features.n_fft - 1),
        f"a window of {features.window} in an FFT of {features.n_fft}": features.window - 2 > features.n_fft,
        f"a prediction net of {net.layers} layers (1 or 2 are known)": net.layers > 2,
        f"a prediction net {net.hidden} wide (a multiple of 8 is needed)": net.hidden % 8,
        f"attention heads of {line} bytes (a multiple of 16 is needed)": line % 16,
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
        "NARROW": NARROW[cache_dtype],
        "CELL": 4 if cache_dtype == "float32" else 2,
        "CONDITIONAL": int(conditional),
    }


def tiles(columns: int) -> int:
    """How many tiles a product of so many columns has."""
    return -(-columns // TILE_COLUMNS)


def entries(manifest: Manifest) -> tuple[str, ...]:
    """Names of the kernels."""
    lstm = tuple(f"lstm_{layer}" for layer in range(manifest.decoder.layers))
    step = ("begin", "features", "gather", "scatter", "start", "join", "decide", *lstm, "project", "finish")
    return (*step, "reset", "forget", "boost")


# -- weights -----------------------------------------------------------------------------------------------------------


def weights(bundle: Bundle, cache_dtype: str) -> dict[str, NDArray[Any]]:
    """The arrays of the fields above that are weights, by field name; `lstm_words` is the number it says."""
    manifest = bundle.manifest
    features, net = manifest.features, manifest.decoder
    turn = -2 * np.pi * np.arange(features.n_fft // 2) / features.n_fft
    filters = np.array(bundle.weight("features.filters"))
    used = filters != 0
    # argmax finds the first; a filter without bins has none to sum.
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
    """A matrix [K, N] in the order in which `product` (`tile.cu`) reads it, as 32-bit words; K and N padded with zeros.

    fp32: tile of 32 columns, k, column. 16 bit: tile, 16 k, 8 columns, lane, the lane's two words of the B fragment of
    `mma.m16n8k16` (PTX manual): lane 4g + m has column g, elements k = 2m, 2m + 1 and 2m + 8, 2m + 9.
    """
    depth, columns = matrix.shape
    wide = tiles(columns)
    padded = np.zeros((-(-depth // 16) * 16, wide * TILE_COLUMNS), np.float32)
    padded[:depth, :columns] = matrix
    if cache_dtype == "float32":
        return np.ascontiguousarray(padded.reshape(-1, wide, TILE_COLUMNS).transpose(1, 0, 2)).view(np.uint32).ravel()
    bits = to_16bit(padded, cache_dtype)
    # axes: 16 k, half of them, m, pair | tile, 8 columns, g
    split = bits.reshape(-1, 2, 4, 2, wide, 4, 8).transpose(4, 0, 5, 6, 2, 1, 3)
    return np.ascontiguousarray(split).view(np.uint32).ravel()


def automaton(phrases: Boosting) -> NDArray[np.int32]:
    """Phrases as the kernels read them (`kernels/boosting.cu`)."""
    parts = (phrases.first, phrases.token, phrases.score.view(np.int32), phrases.fail, phrases.penalty.view(np.int32))
    return np.concatenate([np.array([len(phrases)], np.int32), *parts])


def to_16bit(array: NDArray[np.float32], cache_dtype: str) -> NDArray[np.uint16]:
    """The bits of an fp32 array rounded to nearest even in 16 bit."""
    if cache_dtype == "float16":
        return array.astype(np.float16).view(np.uint16)
    words = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)  # bfloat16: the upper half


def start_state(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """The prediction of a stream that has said nothing: the LSTM one step on, on blank, whose embedding is zero."""
    net = bundle.manifest.decoder
    x, h, c = np.zeros(net.hidden), [], []
    for layer in range(net.layers):
        joined = np.concatenate([x, np.zeros(net.hidden)])
        gates = joined @ bundle.weight(f"decoder.lstm.{layer}.weight") + bundle.weight(f"decoder.lstm.{layer}.bias")
        i, _, cache_dtype, o = gates.reshape(4, net.hidden)
        c.append(_sigmoid(i) * np.tanh(cache_dtype))
        x = _sigmoid(o) * np.tanh(c[-1])
        h.append(x)
    predicted = x @ bundle.weight("joint.pred.weight") + bundle.weight("joint.pred.bias")
    arrays = {"start_predicted": predicted, "start_h": np.stack(h), "start_c": np.stack(c)}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))
