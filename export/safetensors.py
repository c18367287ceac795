"""Read safetensors files as memory-mapped NumPy arrays. The files are untrusted: every length and offset is checked.

A file is the length of its header (8 bytes, little-endian), the header (JSON: type, shape and byte range of each
tensor), and the data, which the byte ranges cover without gaps or overlaps
(https://github.com/huggingface/safetensors#format). Large models have several files and an index of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import CheckpointError
from nemostream.untrusted import MIB, list_of, mapping, open_regular, parse_json, plain_name, read_regular, short_repr

_MAX_HEADER_BYTES = 16 * MIB  # also of an index; the 0.6B model's header has 75 kB
_MAX_TENSORS = 100_000
# Little-endian, as in the file. NumPy has no bfloat16: its 16 bits are the upper half of a float32.
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_RANGE = list_of(lambda value, name: _size(value, name), 2, 2)
_SHAPE = list_of(lambda value, name: _size(value, name), 0, 16)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is, and what."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def to_native(array: NDArray[Any], bfloat16: bool) -> NDArray[Any]:
    """Return a little-endian array in the byte order of this machine; with `bfloat16`, the floats of its bits."""
    if bfloat16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array if sys.byteorder == "little" else array.astype(array.dtype.newbyteorder("="))


class SafeTensors(Mapping[str, NDArray[Any]]):
    """The tensors of a `.safetensors` file, or of all files of a `.safetensors.index.json`, by name.

    An array is read when it is used; only bfloat16 is converted, to float32. Raises `CheckpointError` if a file is
    damaged.
    """

    def __init__(self, path: Path) -> None:
        with _checkpoint_errors(path):
            self._entries = _read_files(path) if path.suffix == ".json" else _read_header(path)

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self._entries[name]
        dtype = np.dtype(_DTYPES[entry.dtype])
        array: NDArray[Any] = np.memmap(entry.path, dtype, "r", entry.offset, entry.shape)
        return to_native(array, entry.dtype == "BF16")

    def is_floating(self, name: str) -> bool:
        """Return whether the tensor has a floating-point type."""
        return self._entries[name].dtype in ("F64", "F32", "F16", "BF16")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def files_of(path: Path) -> list[Path]:
    """Return the files that `SafeTensors(path)` reads, `path` first. Raises `CheckpointError`."""
    if path.suffix != ".json":
        return [path]
    with _checkpoint_errors(path):
        return [path, *(path.parent / file for file in sorted(set(_read_index(path).values())))]


@contextmanager
def _checkpoint_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}; download it again.") from error


def _read_header(path: Path) -> dict[str, _Entry]:
    """Return the tensors of a file. Raises `OSError`, and `ValueError` if the file is damaged."""
    with open_regular(path) as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        data = 8 + length  # start of the data
        if size < 8 or data > size:
            raise ValueError(f"it has {size} bytes, less than its header of {length} bytes")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes; at most {_MAX_HEADER_BYTES} are allowed")
        header = mapping(parse_json(file.read(length)), "the header")
    header.pop("__metadata__", None)
    if len(header) > _MAX_TENSORS:
        raise ValueError(f"it has {len(header)} tensors; at most {_MAX_TENSORS} are allowed")
    entries, ranges = {}, []
    for name, fields in header.items():
        where = f"the tensor {short_repr(name)}"
        if not {"dtype", "shape", "data_offsets"} <= mapping(fields, where).keys():
            raise ValueError(f"{where} has no dtype, shape or data_offsets")
        dtype = fields["dtype"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{where} has the type {short_repr(dtype)}; supported are {', '.join(_DTYPES)}")
        shape = _SHAPE(fields["shape"], f"the shape of {where}")
        if not prod(shape):
            raise ValueError(f"{where} of shape {list(shape)} is empty")
        begin, end = _RANGE(fields["data_offsets"], f"data_offsets of {where}")
        if end - begin != prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise ValueError(f"{where} of type {dtype} and shape {list(shape)} has {end - begin} bytes")
        ranges.append((begin, end, where))
        entries[name] = _Entry(path, dtype, shape, data + begin)
    position = 0
    for begin, end, where in sorted(ranges):
        if begin != position:
            raise ValueError(f"the data of {where} starts at byte {begin}, but the tensor before it ends at {position}")
        position = end
    if data + position != size:
        raise ValueError(f"it has {size} bytes, but its tensors end at byte {data + position}")
    return entries


def _read_index(path: Path) -> dict[str, str]:
    """Return the names of all tensors, and of the file of each."""
    index = mapping(parse_json(read_regular(path, _MAX_HEADER_BYTES)), "the index")
    names = mapping(index.get("weight_map"), "weight_map")
    if len(names) > _MAX_TENSORS:
        raise ValueError(f"it has {len(names)} tensors; at most {_MAX_TENSORS} are allowed")
    return {name: plain_name(file, "weight_map") for name, file in names.items()}


def _read_files(path: Path) -> dict[str, _Entry]:
    """Return the tensors of all files that an index names."""
    names = _read_index(path)
    files = {file: _read_header(path.parent / file) for file in sorted(set(names.values()))}
    for name, file in names.items():
        if name not in files[file]:
            raise ValueError(f"{file} has no tensor {short_repr(name)}, which the index places there")
    return {name: files[file][name] for name, file in names.items()}


def _size(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= 1 << 48:
        raise ValueError(f"{name} is {short_repr(value)}; it must be a whole number of at least 0")
    return value
