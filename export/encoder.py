"""Graph of the encoder step: T new frames of B streams at any positions, with the state as inputs and outputs.

Source: NeMo `collections/asr/modules/conformer_encoder.py` and `parts/submodules/`; the papers are Rekesh et al. 2023
(Fast Conformer), Noroozi et al. 2023 (cache-aware streaming) and Dai et al. 2019 (relative positions).

Deviations from NeMo, all mathematically equivalent:

* K and V are cached after their projections, so frames are projected only once, and in a *ring*: row r of the cache
  holds the encoder frame that is congruent to r modulo C. The graph reads the ring and returns the T new rows; nothing
  is shifted. Masks and relative positions are computed from the stream's `position`.
* One graph serves first, steady and last steps: `position` determines how much of the window precedes the stream,
  `valid` where the stream ends. Everything outside is set to zero where NeMo pads with zeros.
* The projected relative positions are constants, stored once for the longest chunk; shorter chunks use a range of the
  rows.
* Folded into weights: 1/sqrt(d_k) into W_q and the position biases, the factor 1/2 of the macaron feed-forward into its
  second matrix, xscaling into the last matrix of the subsampling, batch norm into the depthwise convolution. Q, K and V
  are one matrix product.
* The prompt kernel of a prompted model multiplies a one-hot vector: its columns and the bias are a table of rows, one
  per prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from nemostream.bundle import ChunkConfig
from nemostream.export.checkpoint import Checkpoint
from nemostream.export.graph import Array, GraphWriter, Shape, WeightStore

FLOAT = TensorProto.FLOAT
_MASKED = -10000.0  # NeMo's INF_VAL: finite, so the softmax of a fully masked row sums to one; exp(-10000) is 0 in fp32


def write_encoder(checkpoint: Checkpoint, chunk: ChunkConfig, store: WeightStore) -> onnx.ModelProto:
    """Return the graph of one encoder step of B streams.

    Inputs:
        `mel` [B, F, M], new log-mel frames; `mel_cache` [B, 9, M], the frames before them (9 with subsampling 8);
        `position` [B] int64, encoder frames before this step;
        `valid` [B] int64, mel frames of the window (cache and new frames) before the end of the stream;
        `prompt` [B] int64, the language of each row; only of prompted models;
        `k_cache.l`, `v_cache.l` [B, heads, C, d_k], rings; `conv_cache.l` [B, D, K]; for each layer l.
    Outputs:
        `encoded` [B, T, D], after the prompt kernel of a prompted model;
        `encoded_joint` [B, T, J], `encoded` after the joint's projection;
        `mel_cache_next` [B, 9, M]; `conv_next` [L, B, D, K];
        `k_new`, `v_new` [L, B, heads, T, d_k], the new rows: row t belongs at ring row (position + t) mod C.
    """
    return _EncoderWriter(checkpoint, chunk, store).write()


class _EncoderWriter:
    def __init__(self, checkpoint: Checkpoint, chunk: ChunkConfig, store: WeightStore) -> None:
        self.ckpt, self.chunk = checkpoint, chunk
        self.spec = checkpoint.encoder
        self.d_k = self.spec.d_model // self.spec.heads
        self.g = GraphWriter(f"encoder-{chunk.ms}ms", store)

    def write(self) -> onnx.ModelProto:
        g, spec, ckpt, frames = self.g, self.spec, self.ckpt, self.chunk.frames
        mels, new_mels = ckpt.features.mels, frames * spec.subsampling
        mel = g.input("mel", FLOAT, ["B", new_mels, mels])
        mel_cache = g.input("mel_cache", FLOAT, ["B", spec.mel_cache, mels])
        position = g.input("position", TensorProto.INT64, ["B"])
        valid = g.input("valid", TensorProto.INT64, ["B"])
        prompt = g.input("prompt", TensorProto.INT64, ["B"]) if ckpt.languages.count else None
        ring: Shape = ["B", spec.heads, spec.cache, self.d_k]
        caches = [
            (
                g.input(f"k_cache.{layer}", FLOAT, ring),
                g.input(f"v_cache.{layer}", FLOAT, ring),
                g.input(f"conv_cache.{layer}", FLOAT, ["B", spec.d_model, spec.conv_cache]),
            )
            for layer in range(spec.layers)
        ]

        g.scope("subsampling")
        window = g.concat(mel_cache, mel, axis=1)
        g.output(
            "mel_cache_next",
            g.slice(window, new_mels, new_mels + spec.mel_cache, 1),
            FLOAT,
            ["B", spec.mel_cache, mels],
        )
        x, new_valid = self._subsample(window, position, valid)
        for kernel in ckpt.speaker_kernels:
            g.scope(kernel)
            x = self._add_speaker(x, kernel)
        g.scope("masks")
        frame_mask = self._frame_mask(new_valid)
        bias, index = self._attention_geometry(position, new_valid)

        k_new: list[str] = []
        v_new: list[str] = []
        conv_next: list[str] = []
        for layer, (k_cache, v_cache, conv_cache) in enumerate(caches):
            g.scope(f"layers.{layer}")
            x = g.op("Add", x, self._feed_forward(x, layer, 1))
            attended, k, v = self._attention(x, layer, k_cache, v_cache, bias, index)
            x = g.op("Add", x, attended)
            convolved, state = self._convolution(x, layer, conv_cache, frame_mask)
            x = g.op("Add", x, convolved)
            x = g.op("Add", x, self._feed_forward(x, layer, 2))
            x = self._layer_norm(x, f"encoder.layers.{layer}.norm_out")
            for outputs, value in ((k_new, k), (v_new, v), (conv_next, state)):
                outputs.append(g.unsqueeze(value, 0))
        if prompt is not None:
            g.scope("prompt")
            x = self._apply_prompt(x, prompt)
        g.scope("")
        rows: Shape = [spec.layers, "B", spec.heads, frames, self.d_k]
        g.output("encoded", x, FLOAT, ["B", frames, spec.d_model])
        g.output("encoded_joint", self._linear(x, "joint.enc"), FLOAT, ["B", frames, ckpt.decoder.joint])
        g.output("k_new", g.concat(*k_new, axis=0), FLOAT, rows)
        g.output("v_new", g.concat(*v_new, axis=0), FLOAT, rows)
        conv: Shape = [spec.layers, "B", spec.d_model, spec.conv_cache]
        g.output("conv_next", g.concat(*conv_next, axis=0), FLOAT, conv)
        return g.finish()

    # -- subsampling ------------------------------------------------------------------------------------------------

    def _subsample(self, window: str, position: str, valid: str) -> tuple[str, str]:
        """Subsample the window [B, 9 + 8T, M] to encoder frames [B, T, D]; also return the valid frames per row [B].

        The window starts at mel frame 8 (position - 2), a multiple of 8, so its phase is the same at every stage.
        `low` and `high` bound the frames of the window that belong to the stream.
        """
        g, spec, frames = self.g, self.spec, self.chunk.frames
        factor, stages = spec.subsampling, spec.subsampling.bit_length() - 1
        before_stream = g.op("Sub", g.const(2 * factor), g.op("Mul", position, g.const(factor)))
        low, high = g.op("Max", before_stream, g.const(0)), valid
        length, width = spec.mel_cache + frames * factor, self.ckpt.features.mels
        x = g.unsqueeze(window, 1)
        for stage in range(stages):
            x = g.op("Mul", x, self._inside(low, high, length))
            name = f"encoder.pre_encode.conv.{0 if stage == 0 else 3 * stage - 1}"
            channels = self.ckpt.array(f"{name}.bias").shape[0]
            # CausalConv2D pads with zeros: two frames and bins before, one after.
            x = self._conv(x, name, pads=[2, 2, 1, 1], strides=[2, 2], group=1 if stage == 0 else channels)
            if stage:
                x = self._conv(x, f"encoder.pre_encode.conv.{3 * stage}")
            x = g.op("Relu", x)
            low, high = g.op("Div", low, g.const(2)), g.op("Add", g.op("Div", high, g.const(2)), g.const(1))
            length, width = length // 2 + 1, width // 2 + 1
        # The first two frames were computed from padding instead of the frames before the window: drop them.
        x = g.op("Mul", x, self._inside(low, high, length))
        x = g.slice(x, 2, 2 + frames, 2)
        x = g.reshape(g.transpose(x, 0, 2, 1, 3), 0, 0, -1)
        x = self._linear(x, "encoder.pre_encode.out", scale=self.ckpt.input_scale)
        new_valid = g.op("Min", g.op("Sub", high, g.const(2)), g.const(frames))
        return x, new_valid

    def _conv(self, x: str, name: str, **attributes: Any) -> str:
        g, ckpt = self.g, self.ckpt
        weight = g.weight(f"{name}.weight", lambda: ckpt.array(f"{name}.weight"))
        return g.op("Conv", x, weight, g.weight(f"{name}.bias", lambda: ckpt.array(f"{name}.bias")), **attributes)

    def _inside(self, low: str, high: str, length: int) -> str:
        """Return a mask [B, 1, length, 1]: 1 for indices in [low, high), else 0."""
        g = self.g
        index = g.const(np.arange(length)[None])
        not_before = g.op("GreaterOrEqual", index, g.unsqueeze(low, 1))
        inside = g.op("And", not_before, g.op("Less", index, g.unsqueeze(high, 1)))
        return g.unsqueeze(g.op("Cast", inside, to=FLOAT), 1, 3)

    # -- masks and positions ----------------------------------------------------------------------------------------

    def _frame_mask(self, new_valid: str) -> str:
        """Return a mask [B, 1, T]: 1 for new frames of the stream, 0 after its end."""
        g = self.g
        inside = g.op("Less", g.const(np.arange(self.chunk.frames)[None]), g.unsqueeze(new_valid, 1))
        return g.unsqueeze(g.op("Cast", inside, to=FLOAT), 1)

    def _attention_geometry(self, position: str, new_valid: str) -> tuple[str, str]:
        """Return an additive mask [B, 1, 1, C + T] and the position-score column of every key [B, heads, T, C + T].

        Ring row r holds the frame of age (position - 1 - r) mod C + 1: 1 for the newest, C for the oldest. It is
        visible if it was written before and its age is within the chunk's left context. Query i is i + age frames after
        that frame, and i - t frames after new key t; distance d is column C + T - 1 - d of the position scores.
        """
        g, cache, frames = self.g, self.spec.cache, self.chunk.frames
        row = g.const(np.arange(cache)[None])
        newest = g.op("Sub", g.unsqueeze(position, 1), g.const(1))
        age = g.op("Add", g.op("Mod", g.op("Sub", newest, row), g.const(cache)), g.const(1))
        old = g.op("LessOrEqual", age, g.op("Min", g.unsqueeze(position, 1), g.const(self.chunk.left)))
        new = g.op("Less", g.const(np.arange(frames)[None]), g.unsqueeze(new_valid, 1))
        visible = g.concat(old, new, axis=1)
        bias = g.op("Where", visible, g.const(0, np.float32), g.const(_MASKED, np.float32))

        query = np.arange(frames)
        old_columns = g.op("Sub", g.const((cache + frames - 1 - query)[None, :, None]), g.unsqueeze(age, 1))
        new_columns = g.const((cache + frames - 1 - query[:, None] + query[None, :])[None])
        batch = g.op("Shape", position)
        tiled = g.op("Expand", new_columns, g.concat(batch, g.const([frames, frames]), axis=0))
        index = g.unsqueeze(g.concat(old_columns, tiled, axis=2), 1)
        shape = g.concat(batch, g.const([self.spec.heads, frames, cache + frames]), axis=0)
        return g.unsqueeze(bias, 1, 2), g.op("Expand", index, shape)

    def _positions(self, layer: int) -> str:
        """Return [1, heads, d_k, C + 2T - 1]: projected sinusoids of the distances C + T - 1 down to 1 - T."""
        spec, ckpt = self.spec, self.ckpt
        longest = max(chunk.frames for chunk in ckpt.chunks)
        offset, rows = longest - self.chunk.frames, spec.cache + 2 * self.chunk.frames - 1

        def make() -> Array:
            distance = np.arange(spec.cache + longest - 1, -longest, -1, dtype=np.float64)
            angle = np.outer(distance, np.exp(np.arange(0, spec.d_model, 2) * -(np.log(10000.0) / spec.d_model)))
            table = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(len(distance), spec.d_model)
            weight = ckpt.array(f"encoder.layers.{layer}.self_attn.linear_pos.weight").astype(np.float64)
            return (table @ weight.T).astype(np.float32)

        g = self.g
        table = g.weight(f"encoder.layers.{layer}.positions", make, rows=slice(offset, offset + rows))
        return g.transpose(g.reshape(table, 1, rows, spec.heads, self.d_k), 0, 2, 3, 1)

    # -- the conformer layer ----------------------------------------------------------------------------------------

    def _feed_forward(self, x: str, layer: int, which: int) -> str:
        """Return half of feed-forward module 1 or 2, x [B, T, D]."""
        name = f"encoder.layers.{layer}.feed_forward{which}"
        x = self._layer_norm(x, f"encoder.layers.{layer}.norm_feed_forward{which}")
        x = self.g.silu(self._layer_linear(x, f"{name}.linear1"))
        return self._layer_linear(x, f"{name}.linear2", scale=0.5)

    def _attention(self, x: str, layer: int, k_cache: str, v_cache: str, bias: str, index: str) -> tuple[str, str, str]:
        """Return the attention output [B, T, D], and the new K and V [B, heads, T, d_k]."""
        g, ckpt, heads, d_k = self.g, self.ckpt, self.spec.heads, self.d_k
        name, width, scale = f"encoder.layers.{layer}.self_attn", self.spec.d_model, self.d_k**-0.5

        def qkv(part: str) -> Array:
            q, k, v = (ckpt.array(f"{name}.linear_{letter}.{part}") for letter in "qkv")
            return np.concatenate([q * np.float32(scale), k, v], axis=0).T

        def biased(query: str, letter: str) -> str:
            shift = g.weight(
                f"{name}.pos_bias_{letter}", lambda: ckpt.array(f"{name}.pos_bias_{letter}") * np.float32(scale)
            )
            return g.transpose(g.op("Add", query, shift), 0, 2, 1, 3)

        x = self._layer_norm(x, f"encoder.layers.{layer}.norm_self_att")
        fused_bias = g.weight(f"{name}.qkv.bias", lambda: qkv("bias")) if ckpt.use_bias else None
        fused = g.linear(x, g.weight(f"{name}.qkv.weight", lambda: qkv("weight")), fused_bias)
        q, k, v = (g.reshape(part, 0, 0, heads, d_k) for part in g.split(fused, [width] * 3, 2))
        k, v = g.transpose(k, 0, 2, 1, 3), g.transpose(v, 0, 2, 1, 3)
        content = biased(q, "u")
        scores = g.concat(
            g.op("MatMul", content, g.transpose(k_cache, 0, 1, 3, 2)),
            g.op("MatMul", content, g.transpose(k, 0, 1, 3, 2)),
            axis=3,
        )
        distances = g.op("MatMul", biased(q, "v"), self._positions(layer))
        scores = g.op("Add", scores, g.op("GatherElements", distances, index, axis=3))
        weights = g.op("Softmax", g.op("Add", scores, bias), axis=3)
        old, new = g.split(weights, [self.spec.cache, self.chunk.frames], 3)
        context = g.op("Add", g.op("MatMul", old, v_cache), g.op("MatMul", new, v))
        context = g.reshape(g.transpose(context, 0, 2, 1, 3), 0, 0, width)
        return self._layer_linear(context, f"{name}.linear_out"), k, v

    def _convolution(self, x: str, layer: int, cache: str, frame_mask: str) -> tuple[str, str]:
        """Return the output of the convolution module [B, T, D], and its next cache [B, D, K]."""
        g, spec, frames = self.g, self.spec, self.chunk.frames
        name = f"encoder.layers.{layer}.conv"
        x = self._layer_norm(x, f"encoder.layers.{layer}.norm_conv")
        value, gate = g.split(self._layer_linear(x, f"{name}.pointwise_conv1"), [spec.d_model] * 2, 2)
        x = g.op("Mul", value, g.op("Sigmoid", gate))
        x = g.op("Mul", g.transpose(x, 0, 2, 1), frame_mask)
        x = g.concat(cache, x, axis=2)
        state = g.slice(x, frames, frames + spec.conv_cache, 2)
        weight, bias = self._depthwise(name)
        # Two dimensions: with one, ONNX Runtime has no kernel for depthwise convolutions, and takes ten times as long.
        x = g.op("Conv", g.unsqueeze(x, 2), *([weight, bias] if bias else [weight]), group=spec.d_model)
        x = g.reshape(g.transpose(x, 0, 3, 1, 2), 0, 0, spec.d_model)
        if self.ckpt.conv_norm == "layer_norm":
            x = self._layer_norm(x, f"{name}.batch_norm")
        return self._layer_linear(g.silu(x), f"{name}.pointwise_conv2"), state

    def _depthwise(self, name: str) -> tuple[str, str | None]:
        """Return weight [D, 1, 1, K + 1] and bias [D], with the running statistics of a batch norm folded in."""
        g, ckpt = self.g, self.ckpt

        def kernel() -> NDArray[Any]:
            return ckpt.array(f"{name}.depthwise_conv.weight")[:, :, None]

        if ckpt.conv_norm == "layer_norm":
            weight = g.weight(f"{name}.depthwise_conv.weight", kernel)
            if not ckpt.use_bias:
                return weight, None
            return weight, g.weight(f"{name}.depthwise_conv.bias", lambda: ckpt.array(f"{name}.depthwise_conv.bias"))

        def fold() -> tuple[Array, Array]:
            norm = {
                key: ckpt.array(f"{name}.batch_norm.{key}").astype(np.float64)
                for key in ("weight", "bias", "running_mean", "running_var")
            }
            scale = norm["weight"] / np.sqrt(norm["running_var"] + 1e-5)
            shift = ckpt.array(f"{name}.depthwise_conv.bias") if ckpt.use_bias else 0.0
            weight = kernel() * scale[:, None, None, None]
            bias = (shift - norm["running_mean"]) * scale + norm["bias"]
            return weight.astype(np.float32), bias.astype(np.float32)

        weight = g.weight(f"{name}.depthwise_conv.folded.weight", lambda: fold()[0])
        return weight, g.weight(f"{name}.depthwise_conv.folded.bias", lambda: fold()[1])

    # -- multitalker and prompted models -----------------------------------------------------------------------------

    def _add_speaker(self, x: str, kernel: str) -> str:
        """Return x + kernel(x) [B, T, D] for the only speaker of a recording, x + kernel(0) for the background."""
        g, ckpt = self.g, self.ckpt
        if kernel.startswith("bg_"):

            def background() -> Array:
                hidden = np.maximum(ckpt.array(f"{kernel}.0.bias"), 0)
                return ckpt.array(f"{kernel}.3.weight") @ hidden + ckpt.array(f"{kernel}.3.bias")

            return g.op("Add", x, g.weight(f"{kernel}.background", background))
        return g.op("Add", x, self._linear(g.op("Relu", self._linear(x, f"{kernel}.0")), f"{kernel}.3"))

    def _apply_prompt(self, x: str, prompt: str) -> str:
        """Return the prompt kernel of x [B, T, D] and a one-hot prompt: ReLU(x W1^T + table[prompt]) W2^T + b2."""
        g, ckpt, width = self.g, self.ckpt, self.spec.d_model

        def first() -> Array:
            return ckpt.array("prompt_kernel.0.weight")

        table = g.weight("prompt.table", lambda: first()[:, width:].T + ckpt.array("prompt_kernel.0.bias"))
        row = g.unsqueeze(g.op("Gather", table, prompt, axis=0), 1)
        hidden = g.linear(x, g.weight("prompt.in.weight", lambda: first()[:, :width].T), row)
        return g.linear(
            g.op("Relu", hidden),
            g.weight("prompt.out.weight", lambda: ckpt.array("prompt_kernel.2.weight").T),
            g.weight("prompt.out.bias", lambda: ckpt.array("prompt_kernel.2.bias")),
        )

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _layer_linear(self, x: str, name: str, scale: float = 1.0) -> str:
        """Return scale * (x W^T + b) of an encoder layer, where `use_bias` decides whether there is a b."""
        return self._linear(x, name, scale, self.ckpt.use_bias)

    def _linear(self, x: str, name: str, scale: float = 1.0, use_bias: bool = True) -> str:
        """Return scale * (x W^T + b), for a Linear or a pointwise convolution."""
        g, ckpt = self.g, self.ckpt

        def weight() -> Array:
            array = ckpt.array(f"{name}.weight")
            return (array.reshape(array.shape[:2]) * np.float32(scale)).T

        bias = None
        if use_bias:
            bias = g.weight(f"{name}.bias", lambda: ckpt.array(f"{name}.bias") * np.float32(scale))
        return g.linear(x, g.weight(f"{name}.weight", weight), bias)

    def _layer_norm(self, x: str, name: str) -> str:
        g, ckpt = self.g, self.ckpt
        weight = g.weight(f"{name}.weight", lambda: ckpt.array(f"{name}.weight"))
        bias = g.weight(f"{name}.bias", lambda: ckpt.array(f"{name}.bias"))
        return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=1e-5)
