"""Writing ONNX graphs whose weights all live in one external file.

A graph is written node by node with `onnx.helper` instead of being traced out of PyTorch: the step is our own
arrangement of the checkpoint's numbers (fused projections, a ring instead of a shifted cache), so there is no module
to trace, tracing 0.6B parameters four times costs minutes and gigabytes, and here every node is one we meant.
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

OPSET = 20  # the newest that TensorRT 11, TensorRT for RTX and ONNX Runtime all read, with LayerNormalization
IR_VERSION = 10
ALIGNMENT = 64  # bytes: whole cache lines, and enough for any vector load from the memory-mapped file

Shape = Sequence[int | str]
Array = NDArray[np.generic]


class WeightStore:
    """The bundle's `weights.bin`. A weight is written when a graph first names it, and shared by name afterwards.

    Weights are given as functions, so the folded copy of a tensor exists only while it is written: exporting needs
    memory for one tensor at a time beside the memory-mapped checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file = path.open("wb")
        self._entries: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}

    def add(self, name: str, make: Callable[[], Array]) -> None:
        if name in self._entries:
            return
        array = np.ascontiguousarray(make())
        padding = -self.size % ALIGNMENT
        self._file.write(b"\0" * padding)
        self._file.write(array.data)
        self._entries[name] = (self.size + padding, array.dtype, array.shape)
        self.size += padding + array.nbytes

    def tensor(self, name: str, rows: slice | None = None) -> TensorProto:
        """The initializer that refers to a stored weight, or to a run of its leading rows (which costs no bytes)."""
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
        """Where the weights lie whose names begin so."""
        return {
            name: Weight(dtype.name, shape, offset)
            for name, (offset, dtype, shape) in self._entries.items()
            if name.startswith(prefixes)
        }

    def close(self) -> None:
        self._file.close()


class GraphWriter:
    """One graph under construction. Values are names; every method that computes returns the name of its result."""

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
        """Prefix of the nodes that follow, so that profilers and error messages name the layer."""
        self._scope = f"{name}/" if name else ""

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, value: str, dtype: int, shape: Shape) -> None:
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"output/{name}"))
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, name: str, make: Callable[[], Array], rows: slice | None = None) -> str:
        self._store.add(name, make)
        proto = self._store.tensor(name, rows)
        self._initializers[proto.name] = proto
        return proto.name

    def const(self, value: object, dtype: type = np.int64) -> str:
        """A small constant, kept inside the graph."""
        array: Array = np.asarray(value, dtype=dtype)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{digest}"
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        self._count += 1
        stem = f"{self._scope}{kind}_{self._count}"
        names = [f"{stem}:{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=stem, **attributes))
        return names

    # -- the few phrases the graphs are made of ---------------------------------------------------------------------

    def linear(self, x: str, weight: str, bias: str | None = None) -> str:
        y = self.op("MatMul", x, weight)
        return y if bias is None else self.op("Add", y, bias)

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 infers one."""
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
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="nemostream")
        model.ir_version = IR_VERSION
        return model
