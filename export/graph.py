"""Write ONNX graphs whose weights are stored in one external file.

Graphs are built node by node with `onnx.helper` instead of traced from PyTorch. There is no module to trace, because
the step arranges the checkpoint's weights differently (fused projections, a ring instead of a shifted cache). Tracing
0.6B parameters four times would also take minutes and gigabytes, and add nodes that are not needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from nemostream.bundle import Weight

OPSET = 20  # newest opset that TensorRT 11, TensorRT for RTX and ONNX Runtime all support; has LayerNormalization
IR_VERSION = 10
ALIGNMENT = 64  # bytes: a cache line, sufficient for vector loads from the memory-mapped file

Shape = Sequence[int | str]
Array = NDArray[np.generic]


class WeightStore:
    """Writer of `weights.bin`. A weight is written when a graph first uses it; later uses share it by name.

    Weights are passed as functions, so that the transformed copy of a tensor exists only while it is written: besides
    the memory-mapped checkpoint, export needs memory for one tensor at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file = path.open("wb")
        self._entries: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}

    def add(self, name: str, make: Callable[[], Array]) -> None:
        """Write the array that `make` returns, unless `name` was written before."""
        if name in self._entries:
            return
        array = np.ascontiguousarray(make())
        padding = -self.size % ALIGNMENT
        self._file.write(b"\0" * padding)
        self._file.write(array.data)
        self._entries[name] = (self.size + padding, array.dtype, array.shape)
        self.size += padding + array.nbytes

    def tensor(self, name: str, rows: slice | None = None) -> TensorProto:
        """Return an initializer that refers to a stored weight, or to a contiguous range of its rows (not copied)."""
        offset, dtype, shape = self._entries[name]
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            row = dtype.itemsize * int(np.prod(shape[1:]))
            offset, shape, name = offset + start * row, (stop - start, *shape[1:]), f"{name}[{start}:{stop}]"
        proto = TensorProto()
        proto.name = name
        proto.data_type = helper.np_dtype_to_tensor_dtype(dtype)
        proto.dims.extend(shape)
        proto.data_location = TensorProto.EXTERNAL
        length = dtype.itemsize * int(np.prod(shape))
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            entry = proto.external_data.add()
            entry.key, entry.value = key, str(value)
        return proto

    def tensors(self, *prefixes: str) -> dict[str, Weight]:
        """Return the locations of the weights whose names start with one of the prefixes."""
        return {
            name: Weight(dtype.name, shape, offset)
            for name, (offset, dtype, shape) in self._entries.items()
            if name.startswith(prefixes)
        }

    def close(self) -> None:
        self._file.close()


class GraphWriter:
    """Builder of one graph. Values are referred to by name; methods that add operations return the result's name."""

    def __init__(self, name: str, store: WeightStore) -> None:
        self.name = name
        self._store = store
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scope = ""
        self._count = 0

    def scope(self, name: str) -> None:
        """Set the name prefix of subsequent nodes, for profilers and error messages."""
        self._scope = f"{name}/" if name else ""

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """Add a graph input; return its name."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: int, shape: Shape) -> None:
        """Add a graph output that is equal to `value`."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"output/{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, name: str, make: Callable[[], Array], rows: slice | None = None) -> str:
        """Add a weight of the store, or a range of its rows; return its name."""
        self._store.add(name, make)
        proto = self._store.tensor(name, rows)
        self._initializers[proto.name] = proto
        return proto.name

    def const(self, value: object, dtype: type = np.int64) -> str:
        """Add a small constant that is stored in the graph; return its name."""
        array: Array = np.asarray(value, dtype=dtype)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{digest}"
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; return the name of the output."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node; return the names of its outputs."""
        self._count += 1
        stem = f"{self._scope}{kind}_{self._count}"
        names = [f"{stem}:{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=stem, **attributes))
        return names

    # -- common operations -----------------------------------------------------------------------------------------

    def linear(self, x: str, weight: str, bias: str | None = None) -> str:
        y = self.op("MatMul", x, weight)
        return y if bias is None else self.op("Add", y, bias)

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape; 0 keeps the size of an axis, -1 infers it."""
        return self.op("Reshape", x, self.const(shape))

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def concat(self, *values: str, axis: int) -> str:
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        return self.op("Slice", x, self.const([start]), self.const([stop]), self.const([axis]))

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        return self.ops("Split", x, self.const(list(sizes)), outputs=len(sizes), axis=axis)

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.const(list(axes)))

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def finish(self) -> onnx.ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="nemostream")
        model.ir_version = IR_VERSION
        return model
