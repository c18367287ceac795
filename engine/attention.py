"""Replace the attention nodes of the encoder step by one custom node per layer that reads K and V through a slot table.

In the plain graph the caches have one entry per row [B, ...], so the caches of arbitrary slots are gathered before a
step. In the fused graph they are the arrays of all slots [S, ...], and the additional input `row_slot` [B] int32 has
the slot of each row. `RingAttention` reads the rings directly; the small mel and convolution caches are gathered in the
graph. Rows of negative slots are idle: they are computed with the small caches of slot 0 and without attention.

Experimental. TensorRT runs the node as a plugin (`runtime/backends/gpu/attention_plugin.py`); no other library can.
"""

from __future__ import annotations

import re

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nemostream.engine.patterns import attention_layers, other_structure, replace, replace_nodes

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


def fuse_attention(model: onnx.ModelProto) -> None:
    """Replace the attention of every layer of an encoder step by a `RingAttention` node, in place.

    Weights need not be loaded. Raises `BackendError` if `export/encoder.py` of this version did not write the graph.
    """
    graph = model.graph
    fused = {}
    for layer in attention_layers(graph):
        values = {**layer, "row_slot": "row_slot", "position": "position"}
        fused[layer["context"]] = helper.make_node(
            OP,
            [values[name] for name in INPUTS],
            [layer["context"]],
            name=f"{OP}/{layer['context']}",
            domain=DOMAIN,
            # How TensorRT's parser finds the plugin, and that it is compiled into the engine.
            plugin_namespace=DOMAIN,
            plugin_version="1",
            aot=1,
        )
    if not fused:
        raise other_structure("it has no Softmax")
    _read_slot_arrays(graph)
    replace_nodes(graph, fused)
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
    replace(graph.node, [*added, *graph.node])
