"""Graphs of the prediction network and the joint.

Source: NeMo `collections/asr/modules/rnnt.py`, `RNNTDecoder` (embedding, LSTM) and `RNNTJoint`. The two input
projections of the joint are moved: one to the end of the encoder step, one to the end of the prediction network. Greedy
decoding then repeats only an addition, an activation and one matrix product per symbol.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from nemostream.export.checkpoint import Checkpoint
from nemostream.export.graph import Array, GraphWriter, Shape, WeightStore

_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def write_decoder(checkpoint: Checkpoint, store: WeightStore) -> onnx.ModelProto:
    """Return the graph of one step of the prediction network.

    Inputs: `token` [B] int64 (blank for the first step), `h` and `c` [B, R, P] float32. Outputs: `predicted` [B, J],
    projected for the joint; `h_next` and `c_next` [B, R, P]. The LSTM is written as elementary operations, because
    TensorRT turns an LSTM node into a loop, which a CUDA graph cannot capture.
    """
    spec = checkpoint.decoder
    g = GraphWriter("decoder", store)
    token = g.input("token", TensorProto.INT64, ["B"])
    shape: Shape = ["B", spec.layers, spec.hidden]
    h, c = (g.input(name, TensorProto.FLOAT, shape) for name in ("h", "c"))

    def squeeze(state: str, layer: int) -> str:
        return g.reshape(g.slice(state, layer, layer + 1, 1), 0, spec.hidden)

    embedding = g.weight("decoder.embedding", lambda: checkpoint.array("decoder.prediction.embed.weight"))
    x = g.op("Gather", embedding, token, axis=0)
    new_h, new_c = [], []
    for layer in range(spec.layers):
        g.scope(f"lstm.{layer}")

        def weight(layer: int = layer) -> Array:
            name = "decoder.prediction.dec_rnn.lstm.weight_{}h_l" + str(layer)
            return np.concatenate([checkpoint.array(name.format(side)) for side in "ih"], axis=1).T

        def bias(layer: int = layer) -> Array:
            name = "decoder.prediction.dec_rnn.lstm.bias_{}h_l" + str(layer)
            return checkpoint.array(name.format("i")) + checkpoint.array(name.format("h"))

        joined = g.concat(x, squeeze(h, layer), axis=1)
        gates = g.linear(
            joined, g.weight(f"decoder.lstm.{layer}.weight", weight), g.weight(f"decoder.lstm.{layer}.bias", bias)
        )
        i, f, cell, o = g.split(gates, [spec.hidden] * 4, 1)  # the order of PyTorch
        kept = g.op("Mul", g.op("Sigmoid", f), squeeze(c, layer))
        new = g.op("Add", kept, g.op("Mul", g.op("Sigmoid", i), g.op("Tanh", cell)))
        x = g.op("Mul", g.op("Sigmoid", o), g.op("Tanh", new))
        new_h.append(g.unsqueeze(x, 1))
        new_c.append(g.unsqueeze(new, 1))
    g.scope("")
    predicted = g.linear(
        x,
        g.weight("joint.pred.weight", lambda: checkpoint.array("joint.pred.weight").T),
        g.weight("joint.pred.bias", lambda: checkpoint.array("joint.pred.bias")),
    )
    g.output("predicted", predicted, TensorProto.FLOAT, ["B", spec.joint])
    g.output("h_next", g.concat(*new_h, axis=1), TensorProto.FLOAT, shape)
    g.output("c_next", g.concat(*new_c, axis=1), TensorProto.FLOAT, shape)
    return g.finish()


def write_joint(checkpoint: Checkpoint, store: WeightStore) -> onnx.ModelProto:
    """Return the graph of the joint, for B pairs of an encoder frame and a prediction.

    Inputs: `encoded_joint` and `predicted` [B, J] float32, both projected. Output: `logits` [B, V], blank last.
    """
    spec = checkpoint.decoder
    g = GraphWriter("joint", store)
    encoded = g.input("encoded_joint", TensorProto.FLOAT, ["B", spec.joint])
    predicted = g.input("predicted", TensorProto.FLOAT, ["B", spec.joint])
    x = g.op(_ACTIVATIONS[spec.activation], g.op("Add", encoded, predicted))
    layer = checkpoint.joint_output
    logits = g.linear(
        x,
        g.weight("joint.out.weight", lambda: checkpoint.array(f"{layer}.weight").T),
        g.weight("joint.out.bias", lambda: checkpoint.array(f"{layer}.bias")),
    )
    g.output("logits", logits, TensorProto.FLOAT, ["B", spec.vocabulary + 1])
    return g.finish()
