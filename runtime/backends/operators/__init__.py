"""Operators for int8 engines on ONNX Runtime's CPU provider: linear layers, relative attention, convolution modules.

Their C code is compiled when the package is installed, if there is a C compiler. It has fast code for x86-64 processors
with AVX-512 VNNI, and uses AMX if there is; on other processors, and without the compiled library, engines use ONNX
Runtime's own operators (`engine.precision`).
"""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DOMAIN, VERSION = "nemostream", 4
WEIGHTS = "int8/weights"  # initializer of an engine: the weights of all its linear layers
_ZERO = 128  # the unsigned number of a weight of 0


@functools.cache
def library() -> Path | None:
    """Return the library of operators, or None if it is not compiled or has no fast code for this processor."""
    found = compiled()
    return found if found and select(found, None) else None


def compiled() -> Path | None:
    """Return the compiled library, or None."""
    spec = find_spec(f"{__name__}._library")
    return Path(spec.origin) if spec and spec.origin else None


def select(path: Path, name: str | None) -> str:
    """Use the code for an instruction set ("amx", "vnni", "portable"; None: the fastest). Return its name.

    Returns an empty string, and changes nothing, if the processor does not have it. All have the same results.
    """
    function = ctypes.CDLL(str(path)).nemostream_int8_select
    function.restype = ctypes.c_char_p
    return bytes(function(name.encode() if name else None) or b"").decode()


def engine_suffix() -> str:
    """Return the suffix of the library version of an engine with these operators; empty if they are not used here."""
    return f"+operators.{VERSION}" if library() else ""


def panels(weights: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return weights [K, N] in the order of `Int8Linear` [N / 32, K / 64, 2, 16, 16, 4]: w + 128, padded with 128."""
    depth, columns = weights.shape
    padded = np.full((-(-depth // 64) * 64, -(-columns // 32) * 32), _ZERO, np.uint8)
    padded[:depth, :columns] = weights.astype(np.int16) + _ZERO
    order = padded.reshape(-1, 16, 4, len(padded[0]) // 32, 2, 16).transpose(3, 0, 4, 1, 5, 2)
    return np.ascontiguousarray(order)
