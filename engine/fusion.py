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

import numpy as np
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

_FAR_BELOW = -1e30  # below all values of a convolution; its sums are finite
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
    _fuse_mask(graph, weights, added)
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


def _fuse_mask(graph: onnx.GraphProto, weights: WeightFile, added: list[TensorProto]) -> None:
    """Make the mask of the first convolution's output a second channel of its input. The results are equal.

    The output is the largest value of a step. It stays in the layout of ONNX Runtime's convolutions if no product with
    a mask is between the first one and the second one. At masked frames, the channel is so far below 0 that the ReLU of
    the convolution returns 0; at the others it is 0. The last of the input's frames in output frame t is frame 2 t.
    """
    index = Index(graph)
    conv = next(node for node in index.nodes if node.op_type == "Conv")
    relu = index.user(conv.output[0], "Relu")
    product = index.user(relu.output[0], "Mul")
    (x, weight, bias), (y,), mask = conv.input, product.output, product.input[1]
    sizes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    taps = weights.read(weight)
    both = np.concatenate([taps, np.zeros_like(taps)], axis=1)
    both[:, 1, -1] = 1
    constants = {
        "taps": both,
        "one": np.array(1, np.float32),
        "frames": np.arange(sizes["mel_cache"][1] + sizes["mel"][1]) // 2,
        "below": np.full((1, 1, 1, sizes["mel"][2]), _FAR_BELOW, np.float32),
    }
    added += [weights.tensor(f"{y}:{name}", array) for name, array in constants.items()]
    nodes = [
        helper.make_node("Sub", [f"{y}:one", mask], [f"{y}:outside"], f"Sub/{y}"),
        helper.make_node("Gather", [f"{y}:outside", f"{y}:frames"], [f"{y}:rows"], f"Gather/{y}", axis=2),
        helper.make_node("Mul", [f"{y}:rows", f"{y}:below"], [f"{y}:channel"], f"Mul/{y}"),
        helper.make_node("Concat", [x, f"{y}:channel"], [f"{y}:channels"], f"Concat/{y}", axis=1),
        helper.make_node("Conv", [f"{y}:channels", f"{y}:taps", bias], [f"{y}:convolved"], f"Conv/{y}"),
        helper.make_node("Relu", [f"{y}:convolved"], [y], f"Relu/{y}"),
    ]
    nodes[-2].attribute.extend(conv.attribute)
    replaced: dict[str, list[NodeProto]] = {conv.output[0]: [], relu.output[0]: [], y: nodes}
    replace(graph.node, [new for node in index.nodes for new in replaced.get(node.output[0], [node])])


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
