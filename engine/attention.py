"""Replace the attention nodes of the encoder step by one custom node per layer that reads K and V through a slot table.

In the plain graph the caches have one entry per row [B, ...], so the caches of arbitrary slots are gathered before a
step. In the fused graph they are the arrays of all slots [S, ...], and the additional input `row_slot` [B] int32 has
the slot of each row. `RingAttention` reads the rings directly; the small mel and convolution caches are gathered in the
graph. Rows of negative slots are idle: they are computed with the small caches of slot 0 and without attention.

Experimental. TensorRT runs the node as a plugin (`runtime/backends/gpu/attention_plugin.py`); no other library can.
"""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from nemostream.errors import BackendError

DOMAIN, OP = "nemostream", "RingAttention"
# Inputs of the node, in the order of the kernel's arguments; its output is [B, T, D] before the output projection.
INPUTS = (
    "qkv",  # [B, T, 3 D], projected queries (scaled, without position biases), keys and values of the new frames
    "k_ring",  # [S, heads, C, d_k]
    "v_ring",
    "positions",  # [C + 2 T - 1, D], projected positions of the distances C + T - 1 down to 1 - T
    "bias_u",  # [heads, d_k]
    "bias_v",
    "row_slot",  # [B]
    "position",  # [B]
    "old_frames",  # [B, 1], visible ring rows: those of age 1 to `old_frames`
    "new_frames",  # [B, 1], visible new frames: the first `new_frames`
)

_SLOT_ARRAYS = re.compile(r"(k_cache|v_cache|conv_cache)\.\d+|mel_cache")
_RINGS = re.compile(r"[kv]_cache\.\d+")
# A path from a value to the value it was computed from: the type of each node, and which of its inputs is followed.
_Path = tuple[tuple[str, int], ...]
_SCORES: _Path = (("Add", 0), ("Add", 0), ("Concat", 0))  # from the softmax to content scores of the ring
_DISTANCES: _Path = (("Add", 0), ("Add", 1), ("GatherElements", 0))
_VISIBLE: _Path = (("Add", 1), ("Unsqueeze", 0), ("Where", 0))
_INPUT_PATHS: dict[str, _Path] = {
    "qkv": (*_SCORES, ("MatMul", 0), ("Transpose", 0), ("Add", 0), ("Reshape", 0), ("Split", 0)),
    "k_ring": (*_SCORES, ("MatMul", 1), ("Transpose", 0)),
    "positions": (*_DISTANCES, ("MatMul", 1), ("Transpose", 0), ("Reshape", 0)),
    "bias_u": (*_SCORES, ("MatMul", 0), ("Transpose", 0), ("Add", 1)),
    "bias_v": (*_DISTANCES, ("MatMul", 0), ("Transpose", 0), ("Add", 1)),
    "old_frames": (*_VISIBLE, ("Concat", 0), ("LessOrEqual", 1)),
    "new_frames": (*_VISIBLE, ("Concat", 1), ("Less", 1)),
}


def fuse_attention(model: onnx.ModelProto) -> None:
    """Replace the attention of every layer of an encoder step by a `RingAttention` node, in place.

    Weights need not be loaded. Raises `BackendError` if `export/encoder.py` of this version did not write the graph.
    """
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    fused: dict[str, NodeProto] = {}  # by the name of the output
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        values = {name: _source(producers, softmax.input[0], path) for name, path in _INPUT_PATHS.items()}
        split = _user(users, softmax.output[0], "Split")
        product = _user(users, split.output[0], "MatMul")
        context = _user(users, _user(users, product.output[0], "Add").output[0], "Transpose")
        output = _user(users, context.output[0], "Reshape").output[0]
        values |= {"v_ring": product.input[1], "row_slot": "row_slot", "position": "position"}
        fused[output] = helper.make_node(
            OP,
            [values[name] for name in INPUTS],
            [output],
            name=f"{OP}/{output}",
            domain=DOMAIN,
            # How TensorRT's parser finds the plugin, and that it is compiled into the engine.
            plugin_namespace=DOMAIN,
            plugin_version="1",
            aot=1,
        )
    if not fused:
        raise _other_structure("it has no Softmax")
    _read_slot_arrays(graph)
    nodes = [fused.get(node.output[0], node) for node in graph.node]
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def _read_slot_arrays(graph: onnx.GraphProto) -> None:
    """Make the caches slot arrays, and add the input `row_slot` and nodes that gather the small caches."""
    graph.input.append(helper.make_tensor_value_info("row_slot", TensorProto.INT32, ["B"]))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int32), "slots/first"))
    added = [helper.make_node("Max", ["row_slot", "slots/first"], ["slots/rows"], name="slots/rows")]
    gathered = {}
    for value in graph.input:
        if not _SLOT_ARRAYS.fullmatch(value.name):
            continue
        value.type.tensor_type.shape.dim[0].dim_param = "S"
        if not _RINGS.fullmatch(value.name):
            rows = gathered[value.name] = f"slots/{value.name}"
            added.append(helper.make_node("Gather", [value.name, "slots/rows"], [rows], name=rows, axis=0))
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in gathered:
                node.input[index] = gathered[name]
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _source(producers: dict[str, NodeProto], value: str, path: _Path) -> str:
    for kind, index in path:
        node = producers.get(value)
        if node is None or node.op_type != kind:
            raise _other_structure(f"{value} is not the output of a {kind}")
        value = node.input[index]
    return value


def _user(users: dict[str, list[NodeProto]], value: str, kind: str) -> NodeProto:
    found = users[value]
    if [node.op_type for node in found] != [kind]:
        raise _other_structure(f"{value} is not the input of one {kind} only")
    return found[0]


def _other_structure(reason: str) -> BackendError:
    return BackendError(
        f"the attention of this encoder graph cannot be fused ({reason}); export the checkpoint with this version."
    )
