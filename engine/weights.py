"""Weights of the encoder step: read from a bundle, quantised, written to files."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from nemostream.bundle import Bundle, sha256

MAX_VALUE = {"int8": 127.0, "fp8": 448.0}  # fp8 is E4M3
_MAX_INLINE_BYTES = 256  # tensors up to this size are stored in the graph file

Array = NDArray[np.generic]


def quantise_columns(weight: Array, precision: str) -> tuple[Array, NDArray[np.float32]]:
    """Quantise a weight [K, N] to 8 bit; returns it and the scale of each of the N columns."""
    values = weight.astype(np.float32)
    scale = np.maximum(np.abs(values).max(axis=0), 1e-12) / np.float32(MAX_VALUE[precision])
    if precision == "fp8":
        return (values / scale).astype(ml_dtypes.float8_e4m3fn), scale
    return np.clip(np.round(values / scale), -127, 127).astype(np.int8), scale


class WeightFile:
    """Reads the bundle's weights one at a time, and writes converted weights to a file."""

    def __init__(self, bundle: Bundle, model: onnx.ModelProto, path: Path) -> None:
        self.path = path
        self._bundle = bundle
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._size = 0

    def __enter__(self) -> WeightFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> Array:
        """Return an initializer of the original graph, mapped into memory if it is external."""
        tensor = self._tensors[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(tensor)
        location = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        path, offset = self._bundle.path / location["location"], int(location["offset"])
        return np.memmap(path, dtype, "r", offset, tuple(tensor.dims))

    def copy(self, tensor: TensorProto) -> TensorProto:
        """Return an initializer of the original graph, copied unchanged to the new weight file if it is external."""
        return self.tensor(tensor.name, self.read(tensor.name)) if tensor.external_data else tensor

    def tensor(self, name: str, array: Array) -> TensorProto:
        """Return an initializer with the array; large arrays are appended to the weight file."""
        if array.nbytes <= _MAX_INLINE_BYTES:
            return onnx.numpy_helper.from_array(np.array(array), name)
        padding = -self._size % 64
        self._file.write(b"\0" * padding)
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        _locate(proto, self.path, self._size + padding, array.nbytes)
        self._size += padding + array.nbytes
        return proto


def named_after_contents(path: Path, name: str) -> tuple[TensorProto, Path]:
    """Rename a file to `int8-{hash}.bin`; return its contents as an initializer, bytes [size], and its path."""
    path = path.rename(path.with_name(f"int8-{sha256(path)[:16]}.bin"))
    size = path.stat().st_size
    proto = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[size])
    _locate(proto, path, 0, size)
    return proto, path


def _locate(tensor: TensorProto, path: Path, offset: int, length: int) -> None:
    """Make a part of a file the data of a tensor."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": path.name, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
