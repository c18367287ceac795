"""Rewrite the fp32 encoder step with other tensor types.

TensorRT 11 has no precision flags: the type of a tensor is the type in the graph. One pass over the bundle's graph
makes every value fp32 or 16 bit and inserts casts between the two:

* 16 bit: matrix products (linear layers, attention), convolutions except the first, the operations between them, and
  the caches.
* fp32: layer norms, softmax and the sums that feed it, masks, sums along the residual path, mel, the first convolution,
  and the last product of the subsampling. Inputs and outputs other than the caches stay fp32.

The last product of the subsampling contains the factor sqrt(d_model) of models with xscaling: its output is in the
thousands times 22.6, while the largest fp16 number is 65504. It is the start of the residual path, which is fp32.

In 8-bit precisions, the large linear layers are also quantised: weights per column, inputs with one range per layer,
measured on speech (`calibration`). Not quantised: attention and position products, convolutions, subsampling, and the
joint projection; quantising everything cost another project a third of its word accuracy (`docs/engines.md`). For a CPU
the graph stays fp32 except for the same linear layers, quantised in the form that its instructions support.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engine.attention import fuse_attention
from nemostream.engine.fusion import fuse_for_cpu
from nemostream.engine.patterns import replace
from nemostream.engine.weights import MAX_VALUE, Array, WeightFile, named_after_contents, quantise_columns
from nemostream.errors import BackendError
from nemostream.runtime.backends import operators

CACHE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16", "fp8": "float16"}

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SUBSAMPLED_WEIGHT = "encoder.pre_encode.out.weight"
_QUANTISED_WEIGHTS = re.compile(
    r"\.(feed_forward[12]\.linear[12]|self_attn\.(qkv|linear_out)|conv\.pointwise_conv[12])\.weight$"
)
_CACHES = ("k_cache.", "v_cache.", "conv_cache.", "k_new", "v_new", "conv_next")
_OPSET = 22  # the first with bf16 convolutions


def read_encoder(bundle: Bundle, chunk: ChunkConfig) -> onnx.ModelProto:
    """Load the bundle's encoder graph without its weights and without the output `encoded`, which is not used."""
    model = onnx.load(bundle.file(f"encoder-{chunk.ms}ms"), load_external_data=False)
    graph = model.graph
    for values in (graph.node, graph.output):
        for value in [v for v in values if v.name in ("encoded", "output/encoded")]:
            values.remove(value)
    return model


def quantisable(model: onnx.ModelProto) -> dict[str, str]:
    """Return the linear layers that 8-bit precisions quantise: weight name to input name."""
    return {
        node.input[1]: node.input[0]
        for node in model.graph.node
        if node.op_type == "MatMul" and _QUANTISED_WEIGHTS.search(node.input[1])
    }


def write_typed(
    bundle: Bundle,
    chunk: ChunkConfig,
    precision: str,
    ranges: Mapping[str, float] | None,
    folder: Path,
    stem: str,
    *,
    fused_attention: bool = False,
) -> list[Path]:
    """Write the step in `precision` as `{stem}.onnx` and `{stem}.bin`, for TensorRT or ONNX Runtime's CUDA provider.

    `ranges` is the largest input magnitude of each quantisable layer by weight name, required for "int8" and "fp8".
    With `fused_attention`, the attention is that of `fuse_attention`, which is experimental.
    """
    model = read_encoder(bundle, chunk)
    if fused_attention:
        fuse_attention(model)
    with WeightFile(bundle, model, folder / f"{stem}.bin") as weights:
        writer = _GraphConverter(model, weights, precision, ranges or {})
        return writer.write(folder / f"{stem}.onnx")


def write_int8_for_cpu(
    bundle: Bundle, chunk: ChunkConfig, folder: Path, stem: str, *, fused: bool = False
) -> list[Path]:
    """Write the fp32 step with its large linear layers in 8 bit, for ONNX Runtime's CPU provider.

    Weights are scaled per column, inputs per frame by their largest magnitude. ONNX Runtime's dynamic quantisation has
    one scale per batch, so that the results of a stream would depend on the other streams; static ranges were less
    accurate in all experiments (`docs/engines.md`). With `fused`, most of the step are operators of
    `runtime.backends.operators` (see `fuse_for_cpu`). Otherwise all are ONNX Runtime's; inputs are unsigned and weights
    signed, as its VNNI and AMX kernels require.

    The `fused` steps of all chunk sizes share the file of their quantised weights. It is named after its contents, and
    is the initializer `WEIGHTS`. A process that runs several has one copy in memory (`runtime.backends.cpu`).
    """
    model = read_encoder(bundle, chunk)
    graph, names = model.graph, quantisable(model)
    files = [folder / f"{stem}.onnx", folder / f"{stem}.bin"]
    with WeightFile(bundle, model, files[1]) as weights:
        if fused:
            with (folder / f"{stem}-int8.bin").open("wb") as quantised:
                added = fuse_for_cpu(graph, names, weights, quantised)
            tensor, path = named_after_contents(Path(quantised.name), operators.WEIGHTS)
            added.append(tensor)
            files.append(path)
        else:
            added = _separate_layers(graph, names, weights)
        used = {name for node in graph.node for name in node.input}
        copied = [weights.copy(tensor) for tensor in graph.initializer if tensor.name in used]
        replace(graph.initializer, copied + added)
    domain, version = (operators.DOMAIN, operators.VERSION) if fused else ("com.microsoft", 1)
    model.opset_import.append(helper.make_opsetid(domain, version))
    files[0].write_bytes(model.SerializeToString(deterministic=True))
    return files


def _separate_layers(graph: onnx.GraphProto, layers: Collection[str], weights: WeightFile) -> list[TensorProto]:
    """Quantise inputs with ONNX's operators and multiply with `MatMulIntegerToFloat`. Returns the new initializers."""
    constants: dict[str, Array] = {
        "int8/share": np.array(1 / 127, np.float32),
        "int8/min_scale": np.array(1e-9, np.float32),  # minimum scale, because silence is divided by it
        "int8/one": np.array(1, np.float32),
        "int8/middle": np.array(128, np.uint8),
        "int8/zero": np.array(0, np.int8),
        "int8/last": np.array([-1]),
    }
    nodes: list[NodeProto] = []
    added = [weights.tensor(name, array) for name, array in constants.items()]
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in layers:
            nodes.append(node)
            continue
        (x, weight), (y,) = node.input, node.output
        values, scale = quantise_columns(weights.read(weight), "int8")
        added += [weights.tensor(f"{weight}:int8", values), weights.tensor(f"{weight}:scale", scale)]
        product = [f"{y}:x8", f"{weight}:int8", "int8/one", f"{weight}:scale", "int8/middle", "int8/zero"]
        for kind, inputs, output in (
            ("Abs", [x], f"{y}:magnitude"),
            ("ReduceMax", [f"{y}:magnitude", "int8/last"], f"{y}:largest"),
            ("Mul", [f"{y}:largest", "int8/share"], f"{y}:step"),
            ("Max", [f"{y}:step", "int8/min_scale"], f"{y}:unit"),
            ("Div", [x, f"{y}:unit"], f"{y}:scaled"),
            ("QuantizeLinear", [f"{y}:scaled", "int8/one", "int8/middle"], f"{y}:x8"),
            ("MatMulIntegerToFloat", product, f"{y}:product"),
            ("Mul", [f"{y}:product", f"{y}:unit"], y),
        ):
            domain = "com.microsoft" if kind == "MatMulIntegerToFloat" else ""
            nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}/{output}", domain=domain))
    replace(graph.node, nodes)
    return added


class _GraphConverter:
    """One pass over the graph. A value's type is "float32", the 16-bit type, or None for integers and booleans."""

    def __init__(
        self, model: onnx.ModelProto, weights: WeightFile, precision: str, ranges: Mapping[str, float]
    ) -> None:
        self._model, self._weights, self._ranges = model, weights, ranges
        self._dtype = CACHE_DTYPES[precision]
        self._quantised_type = precision if precision in MAX_VALUE else None
        graph = model.graph
        self._floats = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self._types: dict[str, str | None] = {}
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._casts: dict[tuple[str, str], str] = {}
        self._sources = {output: node for node in graph.node for output in node.output}
        self._score_sums = self._find_score_sums()

    def write(self, path: Path) -> list[Path]:
        """Convert the graph, write it, and return the files: graph and weights."""
        graph = self._model.graph
        for value in graph.input:
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                self._types[value.name] = self._dtype if value.name.startswith(_CACHES) else "float32"
                value.type.tensor_type.elem_type = _TYPES[self._types[value.name] or ""]
        first = next(node.name for node in graph.node if node.op_type == "Conv")
        for node in graph.node:
            self._convert(node, fp32=node.name == first or _SUBSAMPLED_WEIGHT in node.input)
        for value in graph.output:
            value.type.tensor_type.elem_type = _TYPES[self._types[value.name] or ""]
        others = {name for node in self._nodes for name in node.input} - self._floats
        for tensor in graph.initializer:
            if tensor.name in others:
                self._initializers[tensor.name] = self._weights.copy(tensor)
        replace(graph.node, self._nodes)
        replace(graph.initializer, list(self._initializers.values()))
        custom = [opset for opset in self._model.opset_import if opset.domain]
        replace(self._model.opset_import, [helper.make_opsetid("", _OPSET), *custom])
        del graph.value_info[:]
        path.write_bytes(self._model.SerializeToString(deterministic=True))
        return [path, self._weights.path]

    def _find_score_sums(self) -> set[str]:
        """Return the sums of attention scores, which feed softmax."""
        found: set[str] = set()
        pending = [node.input[0] for node in self._model.graph.node if node.op_type == "Softmax"]
        while pending:
            node = self._sources.get(pending.pop())
            if node is not None and node.op_type == "Add":
                found.add(node.name)
                pending += node.input
        return found

    def _convert(self, node: NodeProto, fp32: bool) -> None:
        """Append the node with its inputs converted to the type it computes in; `fp32` forces fp32."""
        floats = [name for name in node.input if name in self._floats]
        types = {self._types.get(name) for name in node.input if name not in self._floats} - {None}
        if node.name.startswith("output/"):
            kind: str | None = None
            if types:
                kind = self._dtype if node.output[0].startswith(_CACHES) else "float32"
        elif fp32 or node.op_type in ("LayerNormalization", "Softmax") or node.name in self._score_sums:
            kind = "float32"
        elif node.op_type in ("MatMul", "Conv"):
            kind = self._dtype
        elif node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT:
            kind = "float32"  # a mask
        elif node.op_type == "Add" and "float32" in types:
            kind = "float32"  # along the residual path, which begins in fp32
        elif types:
            kind = self._dtype if self._dtype in types else "float32"
        elif floats:
            kind = "float32" if node.op_type == "Where" else self._dtype
        else:
            kind = None
        inputs = list(node.input)
        if kind:
            inputs = [self._typed(name, kind) for name in inputs]
            if self._quantised_type and node.op_type == "MatMul" and _QUANTISED_WEIGHTS.search(node.input[1]):
                inputs = self._quantise(inputs[0], node.input[1])
        copy = NodeProto()
        copy.CopyFrom(node)
        replace(copy.input, inputs)
        self._nodes.append(copy)
        for output in node.output:
            self._types[output] = kind

    def _typed(self, name: str, kind: str) -> str:
        """Return the name of the value in the given type, converted or cast if needed."""
        if name in self._floats:
            if self._quantised_type and _QUANTISED_WEIGHTS.search(name):
                return name
            typed = f"{name}:{kind}"
            if typed not in self._initializers:
                self._initializers[typed] = self._weights.tensor(typed, self._weights.read(name).astype(_NUMPY[kind]))
            return typed
        if self._types.get(name) in (None, kind):
            return name
        if (name, kind) not in self._casts:
            cast = self._casts[name, kind] = f"{name}:{kind}"
            self._nodes.append(helper.make_node("Cast", [name], [cast], name=f"cast/{cast}", to=_TYPES[kind]))
        return self._casts[name, kind]

    def _quantise(self, x: str, name: str) -> list[str]:
        """Quantise and dequantise both inputs of a product; the compiler replaces the pattern by an 8-bit product."""
        assert self._quantised_type
        values, scale = quantise_columns(self._weights.read(name), self._quantised_type)
        step = np.float32(_range(self._ranges, name) / MAX_VALUE[self._quantised_type])
        zero = np.zeros((), values.dtype)
        dtype = _NUMPY[self._dtype]
        constants = {"values": values, "scale": scale.astype(dtype), "step": step.astype(dtype), "zero": zero}
        constants["zeros"] = np.zeros(len(scale), values.dtype)
        for key, array in constants.items():
            self._initializers[f"{name}:{key}"] = self._weights.tensor(f"{name}:{key}", np.asarray(array))
        steps = [f"{name}:step", f"{name}:zero"]
        for kind, inputs, output, axis in (
            ("QuantizeLinear", [x, *steps], f"{name}:x8", None),
            ("DequantizeLinear", [f"{name}:x8", *steps], f"{name}:x", None),
            ("DequantizeLinear", [f"{name}:values", f"{name}:scale", f"{name}:zeros"], f"{name}:w", 1),
        ):
            attributes = {} if axis is None else {"axis": axis}
            self._nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}/{output}", **attributes))
        return [f"{name}:x", f"{name}:w"]


def _range(ranges: Mapping[str, float], name: str) -> float:
    found = ranges.get(name, 0.0)
    if not (math.isfinite(found) and found > 0):
        raise BackendError(
            f"the measured input range of {name} is {found}; it must be positive and finite: calibrate on other audio."
        )
    return found
