"""Parts of the encoder step that one node can replace, found by their structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx
from onnx import NodeProto

from nemostream.errors import BackendError

# A path from a value to the value it was computed from: the type of each node, and which of its inputs is followed.
_Path = tuple[tuple[str, int], ...]
_SCORES: _Path = (("Add", 0), ("Add", 0), ("Concat", 0))  # from the softmax to content scores of the ring
_DISTANCES: _Path = (("Add", 0), ("Add", 1), ("GatherElements", 0))
_VISIBLE: _Path = (("Add", 1), ("Unsqueeze", 0), ("Where", 0))
_ATTENTION: dict[str, _Path] = {
    "qkv": (*_SCORES, ("MatMul", 0), ("Transpose", 0), ("Add", 0), ("Reshape", 0), ("Split", 0)),
    "k_ring": (*_SCORES, ("MatMul", 1), ("Transpose", 0)),
    "positions": (*_DISTANCES, ("MatMul", 1), ("Transpose", 0), ("Reshape", 0)),
    "bias_u": (*_SCORES, ("MatMul", 0), ("Transpose", 0), ("Add", 1)),
    "bias_v": (*_DISTANCES, ("MatMul", 0), ("Transpose", 0), ("Add", 1)),
    "old_frames": (*_VISIBLE, ("Concat", 0), ("LessOrEqual", 1)),
    "new_frames": (*_VISIBLE, ("Concat", 1), ("Less", 1)),
}


class Index:
    """The node that computes a value, and the nodes that use it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.producers = {output: node for node in graph.node for output in node.output}
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.users[name].append(node)

    def producer(self, value: str, kind: str) -> NodeProto:
        """Return the node that computes a value. Raises `BackendError` if its type is not `kind`."""
        node = self.producers.get(value)
        if node is None or node.op_type != kind:
            raise other_structure(f"{value} is not the output of a {kind}")
        return node

    def source(self, value: str, path: _Path) -> str:
        """Return the value that a value is computed from. Raises `BackendError` if a node of the path is missing."""
        for kind, index in path:
            value = self.producer(value, kind).input[index]
        return value

    def user(self, value: str, kind: str) -> NodeProto:
        """Return the only node that uses a value. Raises `BackendError` if it is another one."""
        found = self.users[value]
        if [node.op_type for node in found] != [kind]:
            raise other_structure(f"{value} is not the input of one {kind} only")
        return found[0]


def attention_layers(graph: onnx.GraphProto) -> Iterator[dict[str, str]]:
    """Yield the names of the values of the attention of each layer.

    "qkv" [B, T, 3 D], rings and biases; "old_frames" and "new_frames" [B, 1], the numbers of visible frames; "context"
    [B, T, D], the output before the projection.
    """
    index = Index(graph)
    for softmax in (node for node in index.nodes if node.op_type == "Softmax"):
        values = {name: index.source(softmax.input[0], path) for name, path in _ATTENTION.items()}
        product = index.user(index.user(softmax.output[0], "Split").output[0], "MatMul")
        context = index.user(index.user(product.output[0], "Add").output[0], "Transpose")
        output = index.user(context.output[0], "Reshape").output[0]
        yield {**values, "v_ring": product.input[1], "context": output}


def convolution_modules(graph: onnx.GraphProto) -> Iterator[dict[str, Any]]:
    """Yield the names of the values of the convolution of each layer, and the `epsilon` of its norm.

    "x" [B, T, 2 D] before the gate; "valid" [B, 1, T]; "cache" [B, D, K - 1]; "weight" [D, 1, 1, K]; "bias",
    "norm_weight" and "norm_bias" are empty if there is none; "y" [B, T, D] after the SiLU.
    """
    index = Index(graph)
    for conv in (node for node in index.nodes if node.op_type == "Conv"):
        if index.producers[conv.input[0]].op_type != "Unsqueeze":
            continue  # of the subsampling
        frames = index.source(conv.input[0], (("Unsqueeze", 0),))
        cache, masked = index.producer(frames, "Concat").input
        gated, valid = index.producer(masked, "Mul").input
        x = index.source(gated, (("Transpose", 0), ("Mul", 0), ("Split", 0)))
        y = index.user(index.user(conv.output[0], "Transpose").output[0], "Reshape").output[0]
        values = {"x": x, "valid": valid, "cache": cache, "weight": conv.input[1]}
        values |= {"bias": conv.input[2] if len(conv.input) > 2 else "", "norm_weight": "", "norm_bias": ""}
        norm = index.users[y][0]
        if norm.op_type == "LayerNormalization":
            values |= dict(zip(("norm_weight", "norm_bias"), norm.input[1:], strict=True), epsilon=epsilon(norm))
            y = norm.output[0]
        (product,) = (node for node in index.users[y] if node.op_type == "Mul")
        yield {"epsilon": 0.0, **values, "y": product.output[0]}


def epsilon(norm: NodeProto) -> float:
    """Return the epsilon of a layer norm."""
    return next(attribute.f for attribute in norm.attribute if attribute.name == "epsilon")


def replace_nodes(graph: onnx.GraphProto, replaced: Mapping[str, NodeProto]) -> None:
    """Put nodes in the place of those with the given outputs, and remove nodes and weights that no output needs."""
    nodes = [replaced.get(node.output[0], node) for node in graph.node]
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    replace(graph.node, reversed(kept))
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in needed])


def replace(repeated: Any, values: Iterable[Any]) -> None:
    """Replace the contents of a repeated protobuf field."""
    values = list(values)
    del repeated[:]
    repeated.extend(values)


def other_structure(reason: str) -> BackendError:
    """Return the error for a graph whose structure is not that of this version's export."""
    return BackendError(
        f"a part of this encoder graph cannot be fused ({reason}); export the checkpoint with this version."
    )
