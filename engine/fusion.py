"""Replace most of the encoder step by the operators of `runtime.backends.operators`, for int8 engines on CPUs.

In the plain graph the caches have one entry per row [B, ...]: those of the slots of a step are copied together before
it, and its new entries are copied to the slots afterwards. In the fused graph they are the arrays of all slots
[S, ...], which the operators read and update in place, and the additional input `slots` [B] int64 has the different
slots of the rows. The outputs `k_new`, `v_new` and `conv_next` are omitted. The mel cache is small and stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import BinaryIO

import onnx
from onnx import NodeProto, TensorProto, helper

from nemostream.engine.patterns import (
    Index,
    attention_layers,
    convolution_modules,
    epsilon,
    replace,
    replace_nodes,
)
from nemostream.engine.weights import WeightFile, quantise_columns
from nemostream.runtime.backends.operators import DOMAIN, WEIGHTS, panels

_CACHE = re.compile(r"(k_cache|v_cache|conv_cache)\.\d+")
# Inputs of the operators, in their order.
_ATTENTION = (
    "qkv",
    "k_ring",
    "v_ring",
    "positions",
    "bias_u",
    "bias_v",
    "position",
    "old_frames",
    "new_frames",
    "slots",
)
_CONVOLUTION = ("x", "valid", "cache", "taps", "slots", "bias", "norm_weight", "norm_bias")


def fuse_for_cpu(
    graph: onnx.GraphProto, layers: Collection[str], weights: WeightFile, quantised: BinaryIO
) -> list[TensorProto]:
    """Replace attention, convolution modules and linear layers, and what surrounds them. Returns the new initializers.

    `layers` are the names of the weights that are quantised. They are written to `quantised`, which is the initializer
    `WEIGHTS`. An operator takes the place of the last node that it replaces.
    """
    added: list[TensorProto] = []
    _use_slots(graph)
    _fuse_attention(graph)
    _fuse_convolutions(graph, weights, added)
    _fuse_layers(graph, layers, weights, quantised, added)
    return added


def _use_slots(graph: onnx.GraphProto) -> None:
    """Add the input `slots`, give the caches a size of their own, and omit the outputs with their new entries."""
    for value in graph.input:
        if _CACHE.fullmatch(value.name):
            value.type.tensor_type.shape.dim[0].dim_param = "S"
    graph.input.append(helper.make_tensor_value_info("slots", TensorProto.INT64, ["B"]))
    replace(graph.output, [value for value in graph.output if value.name not in ("k_new", "v_new", "conv_next")])


def _fuse_attention(graph: onnx.GraphProto) -> None:
    fused = {}
    for layer in attention_layers(graph):
        values = {**layer, "position": "position", "slots": "slots"}
        fused[layer["context"]] = _node("RelativeAttention", [values[name] for name in _ATTENTION], layer["context"])
    replace_nodes(graph, fused)


def _fuse_convolutions(graph: onnx.GraphProto, weights: WeightFile, added: list[TensorProto]) -> None:
    fused = {}
    for module in convolution_modules(graph):
        weight = weights.read(module["weight"])
        taps = f"{module['weight']}:taps"
        added.append(weights.tensor(taps, weight.reshape(len(weight), -1).T))
        values = {**module, "taps": taps, "slots": "slots"}
        inputs = [values[name] for name in _CONVOLUTION]
        fused[module["y"]] = _node("CausalConvolution", inputs, module["y"], epsilon=module["epsilon"])
    replace_nodes(graph, fused)


def _fuse_layers(
    graph: onnx.GraphProto,
    layers: Collection[str],
    weights: WeightFile,
    quantised: BinaryIO,
    added: list[TensorProto],
) -> None:
    """Replace each layer, the norm of its input, its bias, and the SiLU or the sum after it."""
    index = Index(graph)
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    results = {value.name for value in graph.output}

    def used_by(y: str, *kinds: str) -> list[NodeProto] | None:
        """Return the nodes that use `y`, in the order of `kinds`, if there is one of each and no other use."""
        users = [] if y in results else sorted(index.users.get(y, []), key=lambda user: user.op_type)
        return users if [user.op_type for user in users] == sorted(kinds) else None

    fused = {}
    for node in index.nodes:
        if node.op_type != "MatMul" or node.input[1] not in layers:
            continue
        (x, weight), (y,) = node.input, node.output
        values, scale = quantise_columns(weights.read(weight), "int8")
        added.append(weights.tensor(f"{weight}:scale", scale))
        offset = quantised.tell()
        quantised.write(panels(values).data)
        bias = residual = norm_weight = norm_bias = ""
        silu, norm, norm_epsilon = False, index.producers.get(x), 0.0
        if norm is not None and norm.op_type == "LayerNormalization":
            x, norm_weight, norm_bias = norm.input
            norm_epsilon = epsilon(norm)
        if found := used_by(y, "Add"):
            (other,) = {*found[0].input} - {y}
            if constants.get(other) == [len(scale)]:
                bias, y = other, found[0].output[0]
        if found := used_by(y, "Mul", "Sigmoid"):
            product, sigmoid = found
            if sigmoid.output[0] in product.input and used_by(sigmoid.output[0], "Mul"):
                silu, y = True, product.output[0]
        elif found := used_by(y, "Add"):
            (other,) = {*found[0].input} - {y}
            if other not in constants:
                residual, y = other, found[0].output[0]
        inputs = [x, WEIGHTS, f"{weight}:scale", bias, residual, norm_weight, norm_bias]
        place = {"depth": len(values), "offset": offset}
        fused[y] = _node("Int8Linear", inputs, y, silu=int(silu), epsilon=norm_epsilon, **place)
    replace_nodes(graph, fused)


def _node(kind: str, inputs: list[str], output: str, **attributes: float) -> NodeProto:
    return helper.make_node(kind, inputs, [output], f"{kind}/{output}", domain=DOMAIN, **attributes)
