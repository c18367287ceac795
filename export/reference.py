"""What the graphs are compared with: the offline forward of NeMo, of transformers, or of NumPy.

`NumpyReference` needs neither library. It computes a whole recording at once in fp64, from the tensors of the
checkpoint: front end, subsampling, attention with the mask of a chunk size, and nothing is cached, folded or fused. It
shares no code with the graphs, and `tests/export/test_reference.py` compares it with both libraries.

Sources: NeMo `collections/asr/parts/preprocessing/features.py`, `modules/conformer_encoder.py`, `parts/submodules/`
and `modules/rnnt.py`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig
from nemostream.errors import CheckpointError
from nemostream.export.checkpoint import Checkpoint, read_config
from nemostream.export.sources import Source

Floats = NDArray[np.floating[Any]]


class Reference(Protocol):
    """An implementation of the model that processes a whole recording."""

    library: str  # for messages: "NeMo"
    version: str  # empty for NumPy
    prompts: int  # number of prompt ids, 0 for a model of one language

    def features(self, audio: Floats) -> NDArray[np.float32]:
        """Return log-mel frames [F, M] of a recording [N], computed in fp64."""

    def encode(self, mel: NDArray[np.float32], chunk: ChunkConfig) -> Floats:
        """Return encoder frames [T, D] of a recording with the attention mask of a chunk size, before the prompt."""

    def apply_prompt(self, encoded: Floats, prompts: NDArray[np.int64]) -> Floats:
        """Return encoder frames [T, D] after the prompt layer, with a prompt id for each frame [T]."""

    def predict(self, tokens: Sequence[int]) -> Floats:
        """Return predictions [n, J], projected for the joint, after each of the tokens of one stream."""

    def project(self, encoded: Floats) -> Floats:
        """Return encoder frames [T, J], projected for the joint."""

    def join(self, projected: Floats, predicted: Floats) -> Floats:
        """Return log-probabilities [n, V] for pairs of an encoder frame and a prediction [n, J], both projected."""


def open_reference(source: Source, workdir: Path) -> Reference:
    """Return NeMo for a `.nemo` file and transformers for its own format, if they are installed, else NumPy.

    The checkpoint may be unpacked into `workdir`. Raises `CheckpointError` if the library cannot load the checkpoint.
    """
    if source.path.is_file() and find_spec("nemo") is not None:
        return NemoReference(source.path)
    checkpoint = source.open(workdir)
    if source.path.is_dir() and find_spec("torch") is not None and find_spec("transformers") is not None:
        import transformers

        if hasattr(transformers, "NemotronAsrStreamingForRNNT") and (
            not checkpoint.languages.count or hasattr(transformers, "Nemotron3_5AsrForRNNT")
        ):
            return TransformersReference(source.path, checkpoint)
    return NumpyReference(checkpoint)


# -- NumPy -------------------------------------------------------------------------------------------------------------


class NumpyReference:
    """The model in plain NumPy, fp64."""

    library, version = "NumPy", ""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.prompts = checkpoint.languages.count

    def features(self, audio: Floats) -> NDArray[np.float32]:
        spec = self._checkpoint.features
        x = audio.astype(np.float64)
        x = np.concatenate([x[:1], x[1:] - spec.preemphasis * x[:-1]])
        x = np.pad(x, spec.n_fft // 2)  # frame t is centred on sample hop * t
        frames = np.lib.stride_tricks.sliding_window_view(x, spec.n_fft)[:: spec.hop][: len(audio) // spec.hop]
        window = np.zeros(spec.n_fft)
        start = (spec.n_fft - spec.window) // 2
        window[start : start + spec.window] = self._array("preprocessor.featurizer.window")
        power = np.abs(np.fft.rfft(frames * window)) ** 2
        filters = self._array("preprocessor.featurizer.fb")[0]
        return np.log(power @ filters.T + self._checkpoint.log_guard).astype(np.float32)

    def encode(self, mel: NDArray[np.float32], chunk: ChunkConfig) -> Floats:
        spec = self._checkpoint.encoder
        x: Floats = self._subsample(mel.astype(np.float64)) * self._checkpoint.input_scale
        for kernel in self._checkpoint.speaker_kernels:  # one speaker: its mask is one, that of the background zero
            masked = np.zeros_like(x) if kernel.startswith("bg_") else x
            x = x + self._linear(_relu(self._linear(masked, f"{kernel}.0")), f"{kernel}.3")
        number = np.arange(len(x)) // chunk.frames
        behind = number[:, None] - number[None]  # chunks between query and key
        visible = (behind >= 0) & (behind <= chunk.left // chunk.frames)
        distance = np.arange(len(x) - 1, -len(x), -1)
        angle = np.outer(distance, 10000.0 ** (-np.arange(0, spec.d_model, 2) / spec.d_model))
        positions = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(len(distance), spec.d_model)
        for layer in range(spec.layers):
            name = f"encoder.layers.{layer}"
            x = x + 0.5 * self._feed_forward(self._norm(x, f"{name}.norm_feed_forward1"), f"{name}.feed_forward1")
            x = x + self._attend(self._norm(x, f"{name}.norm_self_att"), f"{name}.self_attn", positions, visible)
            x = x + self._convolve(self._norm(x, f"{name}.norm_conv"), f"{name}.conv")
            x = x + 0.5 * self._feed_forward(self._norm(x, f"{name}.norm_feed_forward2"), f"{name}.feed_forward2")
            x = self._norm(x, f"{name}.norm_out")
        return x

    def apply_prompt(self, encoded: Floats, prompts: NDArray[np.int64]) -> Floats:
        one_hot = np.eye(self.prompts)[prompts]
        hidden = self._linear(np.concatenate([encoded, one_hot], axis=1), "prompt_kernel.0")
        return self._linear(_relu(hidden), "prompt_kernel.2")

    def predict(self, tokens: Sequence[int]) -> Floats:
        net = self._checkpoint.decoder
        embedding = self._checkpoint.array("decoder.prediction.embed.weight")
        x = embedding[np.asarray(tokens)].astype(np.float64)
        for layer in range(net.layers):
            name = "decoder.prediction.dec_rnn.lstm."
            inputs = x @ self._array(f"{name}weight_ih_l{layer}").T + self._array(f"{name}bias_ih_l{layer}")
            recurrent, bias = self._array(f"{name}weight_hh_l{layer}").T, self._array(f"{name}bias_hh_l{layer}")
            h = c = np.zeros(net.hidden)
            outputs = []
            for row in inputs:
                i, f, g, o = np.split(row + h @ recurrent + bias, 4)  # the order of PyTorch
                c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
                h = _sigmoid(o) * np.tanh(c)
                outputs.append(h)
            x = np.stack(outputs)
        return self._linear(x, "joint.pred")

    def project(self, encoded: Floats) -> Floats:
        return self._linear(encoded.astype(np.float64), "joint.enc")

    def join(self, projected: Floats, predicted: Floats) -> Floats:
        x = _ACTIVATIONS[self._checkpoint.decoder.activation](projected + predicted)
        return log_softmax(self._linear(x, self._checkpoint.joint_output))

    def _subsample(self, mel: Floats) -> Floats:
        """Return encoder inputs [T, D] of mel frames [F, M]: causal convolutions of stride 2, kernel 3 x 3."""
        x = mel[None]  # channels, time, mel
        for stage in range(self._checkpoint.encoder.subsampling.bit_length() - 1):
            name = f"encoder.pre_encode.conv.{3 * stage - 1 if stage else 0}"
            weight = self._array(f"{name}.weight")[:, 0]  # channels, 3, 3: one input channel each
            padded = np.pad(x, ((0, 0), (2, 1), (2, 1)))
            height, width = (padded.shape[1] - 3) // 2 + 1, (padded.shape[2] - 3) // 2 + 1
            x = np.zeros((len(weight), height, width))
            for row in range(3):
                for column in range(3):
                    taps = padded[:, row : row + 2 * height - 1 : 2, column : column + 2 * width - 1 : 2]
                    x += weight[:, row, column, None, None] * taps
            x += self._array(f"{name}.bias")[:, None, None]
            if stage:
                name = f"encoder.pre_encode.conv.{3 * stage}"
                x = np.tensordot(self._array(f"{name}.weight")[:, :, 0, 0], x, 1)
                x += self._array(f"{name}.bias")[:, None, None]
            x = _relu(x)
        return self._linear(x.transpose(1, 0, 2).reshape(x.shape[1], -1), "encoder.pre_encode.out")

    def _feed_forward(self, x: Floats, name: str) -> Floats:
        return self._linear(_silu(self._linear(x, f"{name}.linear1")), f"{name}.linear2")

    def _attend(self, x: Floats, name: str, positions: Floats, visible: NDArray[np.bool_]) -> Floats:
        """Return attention of all frames with relative positions (Dai et al. 2019), x [T, D]."""
        frames, heads = len(x), self._checkpoint.encoder.heads

        def split(x: Floats) -> Floats:
            return x.reshape(len(x), heads, -1).transpose(1, 0, 2)

        q, k, v = (split(self._linear(x, f"{name}.linear_{letter}")) for letter in "qkv")
        p = split(positions @ self._array(f"{name}.linear_pos.weight").T)
        bias_u, bias_v = (self._array(f"{name}.pos_bias_{letter}")[:, None] for letter in "uv")
        by_distance = (q + bias_v) @ p.transpose(0, 2, 1)  # column c is the distance frames - 1 - c
        column = frames - 1 - (np.arange(frames)[:, None] - np.arange(frames)[None])
        relative = np.take_along_axis(by_distance, np.broadcast_to(column, (heads, frames, frames)), axis=2)
        scores = ((q + bias_u) @ k.transpose(0, 2, 1) + relative) / np.sqrt(q.shape[2])
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        return self._linear((weights @ v).transpose(1, 0, 2).reshape(frames, -1), f"{name}.linear_out")

    def _convolve(self, x: Floats, name: str) -> Floats:
        """Return the convolution module, x [T, D]: the depthwise convolution is causal."""
        value, gate = np.split(self._linear(x, f"{name}.pointwise_conv1"), 2, axis=1)
        weight = self._array(f"{name}.depthwise_conv.weight")[:, 0]  # channels, kernel
        kernel = weight.shape[1]
        padded = np.pad(value * _sigmoid(gate), ((kernel - 1, 0), (0, 0)))
        x = sum((padded[tap : tap + len(x)] * weight[:, tap] for tap in range(kernel)), np.zeros(1))
        if self._checkpoint.has(f"{name}.depthwise_conv.bias"):
            x = x + self._array(f"{name}.depthwise_conv.bias")
        if self._checkpoint.conv_norm == "layer_norm":
            x = self._norm(x, f"{name}.batch_norm")
        else:
            mean, variance, scale, shift = (
                self._array(f"{name}.batch_norm.{part}") for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / np.sqrt(variance + 1e-5) * scale + shift
        return self._linear(_silu(x), f"{name}.pointwise_conv2")

    def _norm(self, x: Floats, name: str) -> Floats:
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
        return x * self._array(f"{name}.weight") + self._array(f"{name}.bias")

    def _linear(self, x: Floats, name: str) -> Floats:
        """Return x W^T + b, for a Linear or a pointwise convolution."""
        weight = self._array(f"{name}.weight")
        y = x @ weight.reshape(weight.shape[:2]).T
        return y + self._array(f"{name}.bias") if self._checkpoint.has(f"{name}.bias") else y

    def _array(self, name: str) -> NDArray[np.float64]:
        return self._checkpoint.array(name).astype(np.float64)


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities [n, V] of logits, or of log-probabilities themselves."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _silu(x: Floats) -> Floats:
    return x * _sigmoid(x)


def _relu(x: Floats) -> Floats:
    return np.maximum(x, 0)


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {"relu": _relu, "sigmoid": _sigmoid, "tanh": np.tanh}


# -- NeMo --------------------------------------------------------------------------------------------------------------


class NemoReference:
    """NeMo's model in fp32, except for the front end, which runs in fp64.

    Its fp32 FFT has errors of up to 2e-4 in quiet bins.
    """

    library = "NeMo"

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from nemo.collections.asr.models import ASRModel
        from omegaconf import OmegaConf

        self.version = version("nemo_toolkit")
        config, override = read_config(checkpoint), None
        if config["encoder"].get("conv_context_style", "") is None:  # the default; NeMo 3.0 does not accept it
            config["encoder"]["conv_context_style"] = "regular"
            override = OmegaConf.create(config)
        try:
            with torch.inference_mode():
                self._model = ASRModel.restore_from(str(checkpoint), override, map_location="cpu").eval().float()
        except Exception as error:  # NeMo raises many types of exceptions
            raise CheckpointError(f"NeMo cannot restore {checkpoint}: {error}") from error
        # The class without prompts has no such attribute. NeMo applies the layer only if a prompt is set.
        self.prompts = int(self._model.num_prompts) if hasattr(self._model, "prompt_kernel") else 0

    def features(self, audio: Floats) -> NDArray[np.float32]:
        import torch

        featurizer = copy.deepcopy(self._model.preprocessor.featurizer).double()
        window = featurizer.window.double()
        featurizer.stft = lambda x: torch.stft(
            x,
            n_fft=featurizer.n_fft,
            hop_length=featurizer.hop_length,
            win_length=featurizer.win_length,
            window=window,
            center=True,
            return_complex=True,
            pad_mode="constant",
        )
        with torch.inference_mode():
            mel, length = featurizer(torch.from_numpy(audio).double()[None], torch.tensor([len(audio)]))
        features: NDArray[np.float32] = mel[0, :, : int(length[0])].T.float().numpy()
        return features

    def encode(self, mel: NDArray[np.float32], chunk: ChunkConfig) -> Floats:
        import torch

        self._model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        with torch.inference_mode():
            signal = torch.from_numpy(mel.T[None].copy())
            encoded, _ = self._model.encoder(audio_signal=signal, length=torch.tensor([len(mel)]))
        frames: Floats = encoded[0].T.numpy()
        return frames

    def apply_prompt(self, encoded: Floats, prompts: NDArray[np.int64]) -> Floats:
        import torch

        with torch.inference_mode():
            one_hot = torch.nn.functional.one_hot(torch.from_numpy(prompts), self.prompts).float()
            frames: Floats = self._model.prompt_kernel(torch.cat([torch.tensor(encoded), one_hot], dim=1)).numpy()
        return frames

    def predict(self, tokens: Sequence[int]) -> Floats:
        import torch

        state, predictions = None, []
        with torch.inference_mode():
            for token in tokens:
                output, state = self._model.decoder.predict(torch.tensor([[int(token)]]), state, add_sos=False)
                predictions.append(self._model.joint.project_prednet(output)[0, 0].numpy())
        return np.stack(predictions)

    def project(self, encoded: Floats) -> Floats:
        import torch

        with torch.inference_mode():
            projected: Floats = self._model.joint.project_encoder(torch.tensor(encoded[None]))[0].numpy()
        return projected

    def join(self, projected: Floats, predicted: Floats) -> Floats:
        import torch

        pairs = (torch.tensor(side[:, None]) for side in (projected, predicted))
        with torch.inference_mode():
            logits = self._model.joint.joint_after_projection(*pairs)
        return log_softmax(logits.numpy().reshape(len(projected), -1))  # NeMo normalises them on a CPU only


# -- transformers ------------------------------------------------------------------------------------------------------

_MAX_FRONT_END_ERROR = 1e-3  # mean over all bins; rounding causes 1e-6, a window of 398 instead of 400 samples 8e-3


class TransformersReference:
    """transformers' model in fp32, and NumPy's front end.

    transformers computes the front end in fp32, with errors of up to 5e-4 in quiet bins, and cannot use fp64. The two
    are compared loosely: NumPy's uses the fields that the exporter read from the configuration.
    """

    library = "transformers"

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        import torch
        import transformers

        self.version = version("transformers")
        self.prompts = checkpoint.languages.count
        self._front_end = NumpyReference(checkpoint)
        self._folder, self._sample_rate = folder, checkpoint.features.sample_rate
        model = "Nemotron3_5AsrForRNNT" if self.prompts else "NemotronAsrStreamingForRNNT"
        log = logging.getLogger("transformers")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            self._extractor = transformers.NemotronAsrStreamingFeatureExtractor.from_pretrained(
                str(folder), local_files_only=True
            )
            self._model = getattr(transformers, model).from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="sdpa",  # "eager" negates an additive mask
                local_files_only=True,
                use_safetensors=True,
            )
        except Exception as error:  # transformers raises many types of exceptions
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"transformers cannot load {folder} ({type(error).__name__}: {reason}).") from error
        finally:
            log.setLevel(level)
        self._model.eval()

    def features(self, audio: Floats) -> NDArray[np.float32]:
        features = self._front_end.features(audio)
        out = self._extractor(audio, sampling_rate=self._sample_rate, return_tensors="pt")
        theirs = out["input_features"][0, out["attention_mask"][0]].numpy()
        if theirs.shape != features.shape or not np.abs(theirs - features).mean() <= _MAX_FRONT_END_ERROR:
            raise CheckpointError(
                f"the features of transformers' front end for {self._folder} differ from the exporter's; report this "
                "with the feature_extractor of its configuration."
            )
        return features

    def encode(self, mel: NDArray[np.float32], chunk: ChunkConfig) -> Floats:
        import torch

        inputs = torch.from_numpy(mel[None])
        with torch.inference_mode():
            out = self._model.encoder(
                inputs,
                attention_mask=torch.ones(inputs.shape[:2], dtype=torch.bool),
                num_lookahead_tokens=chunk.frames - 1,
            )
        frames: Floats = out.last_hidden_state[0].numpy()
        return frames

    def apply_prompt(self, encoded: Floats, prompts: NDArray[np.int64]) -> Floats:
        import torch

        with torch.inference_mode():
            one_hot = torch.nn.functional.one_hot(torch.from_numpy(prompts), self.prompts).float()
            frames: Floats = self._model.prompt_projector(torch.cat([torch.tensor(encoded), one_hot], dim=1)).numpy()
        return frames

    def predict(self, tokens: Sequence[int]) -> Floats:
        import torch

        with torch.inference_mode():
            predictions: Floats = self._model.decoder(torch.tensor([[int(token) for token in tokens]]))[0].numpy()
        return predictions

    def project(self, encoded: Floats) -> Floats:
        import torch

        with torch.inference_mode():
            projected: Floats = self._model.encoder_projector(torch.tensor(encoded)).numpy()
        return projected

    def join(self, projected: Floats, predicted: Floats) -> Floats:
        import torch

        with torch.inference_mode():
            logits = self._model.joint(
                encoder_hidden_states=torch.tensor(projected), decoder_hidden_states=torch.tensor(predicted)
            )
        return log_softmax(logits.numpy())
