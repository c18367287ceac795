"""Read a PyTorch state dict as memory-mapped NumPy arrays, without torch.

`torch.save` writes a ZIP archive of uncompressed members: `data.pkl`, a pickle of the dictionary in which each tensor
refers to a storage, and the bytes of the storages, `data/<key>`. A pickle can run any code, so only the operations that
a dictionary of tensors needs are supported, and calls of two functions, `torch._utils._rebuild_tensor_v2` and
`_rebuild_parameter`, which are implemented here.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nemostream.export.safetensors import to_native
from nemostream.untrusted import MIB, open_regular, short_repr

_MAX_PICKLE_BYTES = 4 * MIB  # the 0.6B model's has 0.1 MB; objects in memory are up to 64 times as large
_MAX_READ_BYTES = 16 * MIB  # per call: zipfile reads the directory of an archive in one call
_MAX_ARGUMENTS = 8  # of a call; torch has at most 7
_MAX_AXES = 16
_LOCAL_HEADER_BYTES = 30
# Little-endian, as in the file. NumPy has no bfloat16: its 16 bits are the upper half of a float32.
_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_OPERATIONS = frozenset(
    {"PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2"}
    | {"TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
    | {"GLOBAL", "BINPERSID", "REDUCE", "BUILD"}
)
_PythonUnpickler: Any = pickle._Unpickler  # its memo is a dictionary, not an array


@dataclass(frozen=True)
class _Storage:
    kind: str  # "FloatStorage"
    offset: int  # bytes from the start of the file
    size: int  # values


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # values from the start of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in values


class StateDict(Mapping[str, NDArray[Any]]):
    """The tensors of a file that `torch.save` wrote, by name. An array is read when it is used.

    Raises `OSError`, and `ValueError` with a fragment of a sentence if the file is damaged or has other content.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open_regular(path) as file, zipfile.ZipFile(_BoundedFile(file)) as archive:
                content = _Archive(file, archive, path.stat().st_size)
                loaded = _Unpickler(content).load()
        except (OSError, ValueError):
            raise
        except Exception as error:  # zipfile and pickle raise many types of exceptions
            raise ValueError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(tensor, _Tensor) for name, tensor in loaded.items()
        ):
            raise ValueError("it is not a mapping from names to tensors")
        self._tensors: Mapping[str, _Tensor] = loaded

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        dtype = np.dtype(_DTYPES[tensor.storage.kind])
        values = np.memmap(self._path, dtype, "r", tensor.storage.offset, (tensor.storage.size,))[tensor.offset :]
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        array: NDArray[Any] = np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
        return to_native(array, tensor.storage.kind == "BFloat16Storage")

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _BoundedFile:
    """A file whose reads are limited: `zipfile` allocates the sizes that are in the archive."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.seek, self.tell, self.seekable, self._file = file.seek, file.tell, file.seekable, file

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_READ_BYTES:
            raise OSError(f"a part of it has {size} bytes; at most {_MAX_READ_BYTES} are allowed")
        return self._file.read(size if size >= 0 else _MAX_READ_BYTES)


class _Archive:
    """The members of the ZIP archive, which are in one folder."""

    def __init__(self, file: io.BufferedReader, archive: zipfile.ZipFile, size: int) -> None:
        self._file, self._size = file, size
        self._members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        pickled = self._member("data.pkl")
        if pickled.file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"data.pkl has {pickled.file_size} bytes; at most {_MAX_PICKLE_BYTES} are allowed")
        self.pickle = archive.read(pickled)
        if "byteorder" in self._members and (order := archive.read(self._member("byteorder"))) != b"little":
            raise ValueError(f"its byte order is {short_repr(order)}; little is supported")

    def locate(self, name: str) -> tuple[int, int]:
        """Return offset and size in bytes of an uncompressed member."""
        info = self._member(name)
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER_BYTES)
        if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{short_repr(name)} is damaged")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        offset = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if info.file_size > self._size - offset:
            raise ValueError(f"{short_repr(name)} is truncated")
        return offset, info.file_size

    def _member(self, name: str) -> zipfile.ZipInfo:
        if (info := self._members.get(name)) is None:
            raise ValueError(f"it has no member {short_repr(name)}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{short_repr(name)} is compressed")
        return info


class _Unpickler(_PythonUnpickler):
    """Unpickle dictionaries of tensors. Other classes, functions and operations raise an error."""

    dispatch: ClassVar[dict[int, Any]] = {
        code: _PythonUnpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPERATIONS)
    }

    def __init__(self, archive: _Archive) -> None:
        super().__init__(io.BytesIO(archive.pickle))
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        known = {
            ("collections", "OrderedDict"): _ordered_dict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) not in known:
            raise ValueError(f"it contains {short_repr(f'{module}.{name}')}, which no state dict needs")
        return known[module, name]

    def persistent_load(self, identifier: Any) -> _Storage:
        if not isinstance(identifier, tuple) or len(identifier) != 5 or identifier[0] != "storage":
            raise ValueError("it refers to something that is not a storage")
        kind, key, size = identifier[1], identifier[2], identifier[4]
        if not isinstance(kind, str) or not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError("it refers to an invalid storage")
        if kind not in _DTYPES:
            raise ValueError(f"it refers to a storage of the unknown type {short_repr(kind)}")
        offset, found = self._archive.locate(f"data/{key}")
        if size * np.dtype(_DTYPES[kind]).itemsize > found:
            raise ValueError(f"the storage {short_repr(key)} has {found} bytes, less than {size} values")
        return _Storage(kind, offset, size)

    def load_build(self) -> None:
        """Ignore the attributes of a dictionary: PyTorch adds versions of the modules."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise ValueError("it sets attributes of something that is not a dictionary")

    def load_reduce(self) -> None:
        """Call a function. A tuple in the memo may be the arguments of many calls, so their number is limited."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS or not callable(function):
            raise ValueError("it has an invalid call")
        self.stack[-1] = function(*arguments)

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._store([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._store(self.pop_mark())

    def _store(self, items: list[Any]) -> None:
        """Store keys and values in a dictionary. Keys are strings: the hash of a nested tuple is recursive in C."""
        target = self.stack[-1]
        if len(items) % 2 or not isinstance(target, dict) or not all(isinstance(key, str) for key in items[::2]):
            raise ValueError("it stores something that is not named by a string, or not in a dictionary")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _ordered_dict(*arguments: Any) -> OrderedDict[str, Any]:
    """Return an empty dictionary. With arguments, calls could copy one large dictionary many times."""
    if arguments:
        raise ValueError("it makes a dictionary from arguments")
    return OrderedDict()


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Return a tensor inside a storage, as `torch._utils._rebuild_tensor_v2` does."""
    if (
        not isinstance(storage, _Storage)
        or not (isinstance(shape, tuple) and isinstance(strides, tuple))
        or len(shape) != len(strides)
        or len(shape) > _MAX_AXES
        or any(type(value) is not int or not 0 <= value < 1 << 48 for value in (offset, *shape, *strides))
    ):
        raise ValueError("a tensor has an invalid storage, offset, shape or stride")
    if not prod(shape):
        raise ValueError(f"a tensor of shape {list(shape)} is empty")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if prod(shape) > storage.size or last >= storage.size:
        raise ValueError(f"a tensor of shape {list(shape)} is larger than its storage of {storage.size} values")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor
