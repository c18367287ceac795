"""Prediction net and joint as graphs.

Source: NeMo `collections/asr/modules/rnnt.py`, `RNNTDecoder` (embedding, LSTM) and `RNNTJoint`. The joint's two input
projections move to where their inputs are made: the encoder step ends with its own, the prediction net with its own,
so what greedy decoding repeats per symbol is an addition, an activation and one product.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from nemostream.export.checkpoint import Checkpoint
from nemostream.export.graph import Array, GraphWriter, Shape, WeightStore

_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def write_decoder(checkpoint: Checkpoint, store: WeightStore) -> onnx.ModelProto:
    """One step of the prediction net.

    Inputs: `token` [B] int64 (blank to start), `h`, `c` [B, R, P] float32. Outputs: `predicted` [B, J], already
    projected for the joint, `h_next`, `c_next`. The LSTM is written out: an LSTM node becomes a loop in TensorRT, which
    a CUDA graph cannot capture.
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
        i, f, cell, o = g.split(gates, [spec.hidden] * 4, 1)  # PyTorch's order of gates
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
    """Logits of B (encoder frame, prediction) pairs.

    Inputs: `encoded_joint`, `predicted` [B, J] float32, both projected. Output: `logits` [B, V], blank last.
    """
    spec = checkpoint.decoder
    g = GraphWriter("joint", store)
    encoded = g.input("encoded_joint", TensorProto.FLOAT, ["B", spec.joint])
    predicted = g.input("predicted", TensorProto.FLOAT, ["B", spec.joint])
    x = g.op(_ACTIVATIONS[spec.activation], g.op("Add", encoded, predicted))
    last = checkpoint.joint_output
    logits = g.linear(
        x,
        g.weight("joint.out.weight", lambda: checkpoint.array(f"{last}.weight").T),
        g.weight("joint.out.bias", lambda: checkpoint.array(f"{last}.bias")),
    )
    g.output("logits", logits, TensorProto.FLOAT, ["B", spec.vocabulary + 1])
    return g.finish()
