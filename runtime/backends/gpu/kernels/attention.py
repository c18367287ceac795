"""The attention kernel: source, arguments, and macros for a model and chunk size.

`attention.cu` is a translation unit of its own, because it becomes part of a TensorRT engine
(`attention_plugin.py`) and is not launched by the backend. Like the other kernels it runs on a CPU in `tests/simt`.
"""

from __future__ import annotations

from importlib import resources

from nemostream.errors import BackendError

ENTRY = "ring_attention"
BLOCK = 256  # threads per block; the grid is (rows, heads)
# Arguments of the kernel in order. TensorRT passes the inputs of a plugin, then its scalars, then its outputs.
INPUTS = (
    "qkv",
    "k_ring",
    "v_ring",
    "positions",
    "bias_u",
    "bias_v",
    "row_slot",
    "position",
    "old_frames",
    "new_frames",
)
ARGUMENTS = (*INPUTS, "slots", "out")

_CELL_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
_VECTOR_BYTES = 16
_SHARED_BYTES = 48 << 10  # shared memory of a block; more would need an attribute that TensorRT does not set
_TILES = (128, 64, 32)  # rows staged at once: the fewer tiles, the fewer waits for memory


def source() -> str:
    """Return the translation unit."""
    return (resources.files(__package__) / "attention.cu").read_text(encoding="utf-8")


def macros(frames: int, cache: int, heads: int, d_k: int, cache_dtype: str) -> dict[str, int]:
    """Return the preprocessor macros for T = `frames`, C = `cache` and tensors of type `cache_dtype`.

    Raises `BackendError` for sizes that the kernel does not support.
    """
    row_bytes = d_k * (4 if cache_dtype == "float32" else 2)
    if row_bytes % _VECTOR_BYTES:
        raise BackendError(
            f"the attention kernel does not support heads of {row_bytes} bytes; a multiple of {_VECTOR_BYTES} is "
            "required: build the engine without it."
        )
    staged = (row_bytes // _VECTOR_BYTES | 1) * _VECTOR_BYTES  # bytes of a staged row
    others = 4 * frames * (d_k + cache + frames)  # queries and scores
    for tile in _TILES:
        if tile * staged + others <= _SHARED_BYTES:
            break
    else:
        raise BackendError(
            f"the attention kernel needs {_TILES[-1] * staged + others} bytes of shared memory for {frames} frames and "
            f"heads of {row_bytes} bytes, {_SHARED_BYTES} are available: build the engine without it."
        )
    return {
        "FRAMES": frames,
        "CACHE": cache,
        "HEADS": heads,
        "D_K": d_k,
        "TILE": tile,
        "BLOCK": BLOCK,
        "CELL_TYPE": _CELL_TYPES[cache_dtype],
    }
