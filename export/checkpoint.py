"""Reading a `.nemo` checkpoint: its configuration checked, its weights as numpy arrays.

A `.nemo` file is a tar of `model_config.yaml`, `model_weights.ckpt` (a PyTorch state dict) and the tokenizer. The
configuration decides everything; a field we do not support is refused by its name before any work is done. Defaults of
absent fields are NeMo's own (`collections/asr/modules/conformer_encoder.py`, `rnnt.py`, `audio_preprocessing.py`).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml
from numpy.typing import NDArray

from nemostream.errors import CheckpointError
from nemostream.spec import Chunk, Decoder, Encoder, Features

_WEIGHTS, _CONFIG = "model_weights.ckpt", "model_config.yaml"
_REQUIRED = object()


@dataclass(frozen=True)
class Checkpoint:
    """An unpacked checkpoint that the exporter supports. Weights stay memory-mapped until `array` is asked for one."""

    name: str
    features: Features
    encoder: Encoder
    decoder: Decoder
    chunks: tuple[Chunk, ...]
    log_guard: float  # added to mel energies before the logarithm
    conv_norm: str  # "layer_norm" or "batch_norm"
    input_scale: float  # sqrt(d_model) with xscaling, else 1
    joint_output: str  # the joint's last layer in the state dict, "joint.joint_net.2"
    tokenizer: Path
    state: Mapping[str, Any]  # name -> torch tensor

    def array(self, name: str) -> NDArray[Any]:
        """A tensor of the state dict as numpy, floating ones in fp32. Raises `CheckpointError` if it is not there."""
        if name not in self.state:
            raise CheckpointError(f"the checkpoint has no tensor '{name}', which its configuration promises.")
        tensor = self.state[name]
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def has(self, name: str) -> bool:
        return name in self.state


def read_config(path: Path) -> dict[str, Any]:
    """The configuration inside a `.nemo` file, without touching its weights."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if Path(member.name).name == _CONFIG and (file := archive.extractfile(member)):
                    config = yaml.safe_load(file)
                    if isinstance(config, dict):
                        return config
    except (OSError, tarfile.TarError, yaml.YAMLError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as a .nemo checkpoint: {error}.") from error
    raise CheckpointError(f"{path} is not a .nemo checkpoint: it holds no {_CONFIG}.")


def open_checkpoint(path: Path, workdir: Path) -> Checkpoint:
    """Check the configuration, then unpack the weights into `workdir` (as large as the checkpoint)."""
    import torch  # here, so that a refusal costs no import

    config = read_config(path)
    features, encoder, decoder, chunks, extra = check_config(config)
    with tarfile.open(path) as archive:
        archive.extractall(workdir, filter="data")
    found = {file.name: file for file in workdir.rglob("*") if file.is_file()}
    if _WEIGHTS not in found:
        raise CheckpointError(f"{path} holds no {_WEIGHTS}; sharded or distributed checkpoints are not supported.")
    state = torch.load(found[_WEIGHTS], map_location="cpu", mmap=True, weights_only=True)
    outputs = sorted(n.removesuffix(".weight") for n in state if n.startswith("joint.joint_net.") and "weight" in n)
    if not outputs:
        raise CheckpointError(f"{path} has no joint network in its weights.")
    return Checkpoint(
        name=path.stem,
        features=features,
        encoder=encoder,
        decoder=decoder,
        chunks=chunks,
        joint_output=outputs[-1],
        tokenizer=_tokenizer(config, found),
        state=state,
        **extra,
    )


def check_config(config: Mapping[str, Any]) -> tuple[Features, Encoder, Decoder, tuple[Chunk, ...], dict[str, Any]]:
    """Read the sizes, refuse what is not supported. Raises `CheckpointError` naming the field and its value."""
    _expect(config, "target", ("EncDecRNNTBPEModel", "EncDecHybridRNNTCTCBPEModel"), cut=True)
    for field in ("loss.loss_name", "decoding.model_type"):
        _expect(config, field, ("rnnt", "default", "warprnnt_numba", "warprnnt", None), None)
    for field in ("model_defaults.tdt_durations", "decoding.durations", "model_defaults.initialize_prompt_feature"):
        _expect(config, field, (None, [], False), None)
    _expect(config, "adapters", (None, {}), None)
    features, log_guard = _features(config)
    encoder, chunks = _encoder(config, features)
    vocabulary = _get(config, "decoder.vocab_size", -1)
    if vocabulary is None or vocabulary <= 0:
        vocabulary = _get(config, "joint.num_classes", -1)
    labels = _get(config, "joint.vocabulary", None)
    if labels:
        vocabulary = len(labels)
    if vocabulary is None or vocabulary <= 0:
        _refuse("joint.num_classes", vocabulary, "a positive number of tokens")
    _expect(config, "decoder._target_", ("RNNTDecoder",), cut=True)
    _expect(config, "decoder.normalization_mode", (None,), None)
    _expect(config, "decoder.blank_as_pad", (True,), True)
    hidden = _get(config, "decoder.prednet.pred_hidden")
    _expect(config, "decoder.prednet.rnn_hidden_size", (None, -1, 0, hidden), -1)
    _expect(config, "joint._target_", ("RNNTJoint",), cut=True)
    _expect(config, "joint.num_extra_outputs", (0, None), 0)
    _expect(config, "joint.jointnet.activation", ("relu", "sigmoid", "tanh"))
    _expect(config, "tokenizer.type", ("bpe",))
    decoder = Decoder(
        layers=_get(config, "decoder.prednet.pred_rnn_layers", 1),
        hidden=hidden,
        joint=_get(config, "joint.jointnet.joint_hidden"),
        vocabulary=vocabulary,
        max_symbols=_max_symbols(config),
        activation=_get(config, "joint.jointnet.activation"),
    )
    scaled = _get(config, "encoder.xscaling", True)
    extra = {
        "log_guard": log_guard,
        "conv_norm": _get(config, "encoder.conv_norm_type", "batch_norm"),
        "input_scale": float(np.sqrt(encoder.d_model)) if scaled else 1.0,
    }
    return features, encoder, decoder, chunks, extra


def _max_symbols(config: Mapping[str, Any]) -> int:
    """As `rnnt_decoding.py` reads it: by its newer name, else by its older one."""
    for field in ("decoding.greedy.max_symbols", "decoding.greedy.max_symbols_per_step"):
        if (most := _get(config, field, None)) is not None:
            if not isinstance(most, int) or most < 1:
                _refuse(field, most, "a number above 0")
            return most
    _refuse("decoding.greedy.max_symbols", None, "a number; without one NeMo never stops at a frame")


def _features(config: Mapping[str, Any]) -> tuple[Features, float]:
    _expect(config, "preprocessor._target_", ("AudioToMelSpectrogramPreprocessor",), cut=True)
    _expect(config, "preprocessor.normalize", ("NA", None), "per_feature")
    _expect(config, "preprocessor.window", ("hann",), "hann")
    _expect(config, "preprocessor.log", (True,), True)
    _expect(config, "preprocessor.log_zero_guard_type", ("add",), "add")
    _expect(config, "preprocessor.mag_power", (2.0,), 2.0)
    for field, value in (("exact_pad", False), ("frame_splicing", 1)):
        _expect(config, f"preprocessor.{field}", (value,), value)
    rate = _get(config, "preprocessor.sample_rate", 16000)
    guard = _get(config, "preprocessor.log_zero_guard_value", 2**-24)
    if not isinstance(guard, int | float):
        _refuse("preprocessor.log_zero_guard_value", guard, "a number")
    window = round(rate * _get(config, "preprocessor.window_size", 0.02))
    features = Features(
        sample_rate=rate,
        mels=_get(config, "preprocessor.features", 64),
        window=window,
        hop=round(rate * _get(config, "preprocessor.window_stride", 0.01)),
        n_fft=_get(config, "preprocessor.n_fft", None) or 2 ** int(np.ceil(np.log2(window))),
        preemphasis=_get(config, "preprocessor.preemph", 0.97) or 0.0,
    )
    if features.window % 2 or features.window <= features.hop:
        _refuse("preprocessor.window_size", features.window, "an even number of samples, more than the stride")
    return features, float(guard)


def _encoder(config: Mapping[str, Any], features: Features) -> tuple[Encoder, tuple[Chunk, ...]]:
    _expect(config, "encoder._target_", ("ConformerEncoder",), cut=True)
    _expect(config, "encoder.att_context_style", ("chunked_limited",), "regular")
    _expect(config, "encoder.subsampling", ("dw_striding",), "striding")
    _expect(config, "encoder.subsampling_factor", (4, 8), 4)
    _expect(config, "encoder.causal_downsampling", (True,), False)
    _expect(config, "encoder.self_attention_model", ("rel_pos",), "rel_pos")
    _expect(config, "encoder.conv_norm_type", ("layer_norm", "batch_norm"), "batch_norm")
    _expect(config, "encoder.conv_context_style", ("regular",), "regular")
    _expect(config, "encoder.reduction", (None,), None)
    d_model, kernel = _get(config, "encoder.d_model"), _get(config, "encoder.conv_kernel_size", 31)
    _expect(config, "encoder.feat_out", (None, -1, 0, d_model), -1)
    _expect(config, "encoder.feat_in", (features.mels,))
    _expect(config, "encoder.conv_context_size", ("causal", [kernel - 1, 0]), None)
    factor = _get(config, "encoder.subsampling_factor", 4)
    frame_ms = 1000 * factor * features.hop / features.sample_rate
    contexts = _get(config, "encoder.att_context_size")
    if contexts and isinstance(contexts[0], int):
        contexts = [contexts]
    if not contexts:
        _refuse("encoder.att_context_size", contexts, "a list of [left, right] pairs")
    chunks: dict[int, Chunk] = {}
    for left, right in contexts:
        frames = right + 1
        if left < 1 or right < 0 or left % frames:
            _refuse("encoder.att_context_size", [left, right], "limited contexts with left a multiple of right + 1")
        ms = round(frames * frame_ms)
        if ms in chunks:
            _refuse("encoder.att_context_size", contexts, "one left context per chunk size")
        chunks[ms] = Chunk(ms, frames, left, frames * factor * features.hop)
    encoder = Encoder(
        layers=_get(config, "encoder.n_layers"),
        d_model=d_model,
        heads=_get(config, "encoder.n_heads", 4),
        subsampling=factor,
        cache=max(chunk.left for chunk in chunks.values()),
        conv_cache=kernel - 1,
    )
    return encoder, tuple(sorted(chunks.values(), key=lambda chunk: chunk.ms))


def _tokenizer(config: Mapping[str, Any], found: Mapping[str, Path]) -> Path:
    wanted = str(_get(config, "tokenizer.model_path", "")).removeprefix("nemo:")
    for name, file in found.items():
        if name == wanted or (not wanted and name.endswith("tokenizer.model")):
            return file
    raise CheckpointError(f"the checkpoint does not hold its SentencePiece model (tokenizer.model_path is {wanted!r}).")


def _get(config: Mapping[str, Any], path: str, default: Any = _REQUIRED) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            if default is _REQUIRED:
                raise CheckpointError(f"the checkpoint's configuration has no field '{path}'.")
            return default
        value = value[key]
    return value


def _expect(
    config: Mapping[str, Any], path: str, supported: Iterable[Any], default: Any = _REQUIRED, cut: bool = False
) -> None:
    """Refuse the field unless its value is a supported one. `cut` compares the last part of a dotted class name."""
    value = _get(config, path, default)
    seen = str(value).rpartition(".")[2] if cut else value
    supported = tuple(supported)
    if not any(seen == known and isinstance(seen, bool) == isinstance(known, bool) for known in supported):
        _refuse(path, value, " or ".join(repr(known) for known in supported if known is not None) or "leaving it out")


def _refuse(path: str, value: Any, supported: str) -> NoReturn:
    raise CheckpointError(f"not supported: {path} is {value!r}; nemostream supports {supported}.")
