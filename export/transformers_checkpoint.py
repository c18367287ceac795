"""Read a checkpoint of transformers' `nemotron_asr_streaming` or `nemotron3_5_asr`: a folder of safetensors and JSON.

Needs neither transformers nor torch. The configuration is translated to NeMo's, so that the same checks apply, and the
tensors get their names in NeMo back. Source of both: `convert_nemotron_asr_streaming_to_hf.py` and
`convert_nemotron3_5_asr_to_hf.py` in transformers, which go the other way.

The front end has no weights in this format: transformers computes window and mel filters, and so does `frontend`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import FeatureConfig
from nemostream.errors import CheckpointError
from nemostream.export.checkpoint import MAX_TOKENIZER_BYTES, Checkpoint, ModelConfig, check_config
from nemostream.export.safetensors import SafeTensors, files_of
from nemostream.export.sentencepiece_model import convert_tokenizer
from nemostream.untrusted import (
    MIB,
    Check,
    integer,
    list_of,
    mapping,
    number,
    one_of,
    parse_json,
    read_regular,
    short_repr,
)

CONFIG, PROCESSOR, FEATURES = "config.json", "processor_config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
FILES = (CONFIG, PROCESSOR, FEATURES, *WEIGHTS, "model-*.safetensors", *TOKENIZERS)  # patterns of a download
MODEL_TYPES = ("nemotron_asr_streaming", "nemotron3_5_asr")
_MAX_JSON_BYTES = 16 * MIB
_REQUIRED = object()

# Names in transformers and in NeMo. In NeMo's Sequential of the subsampling, 0 is the first convolution, 2 and 5 are
# depthwise, 3 and 6 pointwise convolutions; the others are ReLUs. In that of the joint, 2 is the output layer.
_RENAMED = (
    (r"encoder\.subsampling\.conv_in\.", "encoder.pre_encode.conv.0."),
    (r"encoder\.subsampling\.layers\.0\.depthwise_conv\.", "encoder.pre_encode.conv.2."),
    (r"encoder\.subsampling\.layers\.0\.pointwise_conv\.", "encoder.pre_encode.conv.3."),
    (r"encoder\.subsampling\.layers\.1\.depthwise_conv\.", "encoder.pre_encode.conv.5."),
    (r"encoder\.subsampling\.layers\.1\.pointwise_conv\.", "encoder.pre_encode.conv.6."),
    (r"encoder\.subsampling\.linear\.", "encoder.pre_encode.out."),
    (r"(encoder\.layers\.\d+)\.self_attn\.([qkv])_proj\.", r"\1.self_attn.linear_\2."),
    (r"(encoder\.layers\.\d+)\.self_attn\.o_proj\.", r"\1.self_attn.linear_out."),
    (r"(encoder\.layers\.\d+)\.self_attn\.relative_k_proj\.", r"\1.self_attn.linear_pos."),
    (r"(encoder\.layers\.\d+)\.self_attn\.bias_([uv])$", r"\1.self_attn.pos_bias_\2"),
    (r"(encoder\.layers\.\d+)\.conv\.norm\.", r"\1.conv.batch_norm."),
    (r"(encoder\.layers\.\d+\.(?:feed_forward[12]|conv|norm_\w+)\.)", r"\1"),
    (r"encoder_projector\.", "joint.enc."),
    (r"decoder\.embedding\.", "decoder.prediction.embed."),
    (r"decoder\.lstm\.", "decoder.prediction.dec_rnn.lstm."),
    (r"decoder\.decoder_projector\.", "joint.pred."),
    (r"joint\.head\.", "joint.joint_net.2."),
    (r"prompt_projector\.linear_1\.", "prompt_kernel.0."),
    (r"prompt_projector\.linear_2\.", "prompt_kernel.2."),
)
_BUFFERS = frozenset({"encoder.encode_positions.inv_freq"})  # computed


def check_transformers(folder: Path) -> ModelConfig:
    """Return the sizes of the model without reading its weights. Raises `CheckpointError` if it is not supported."""
    model = check_config(_nemo_config(folder))
    if not model.languages.count:
        return model
    default = _Document.read(folder / CONFIG).get("default_prompt_id", integer(0, model.languages.count - 1), 101)
    names = [name for name, prompt in model.languages.prompts.items() if prompt == default]
    if not names:
        raise CheckpointError(
            f"not supported: {folder / CONFIG}: default_prompt_id is {default}, which has no name in the "
            f"prompt_dictionary of {PROCESSOR}."
        )
    return dataclasses.replace(model, languages=dataclasses.replace(model.languages, default=names[0]))


def open_transformers(folder: Path, name: str, workdir: Path) -> Checkpoint:
    """Open a checkpoint as `name`; copy its tokenizer into `workdir`, converted if necessary.

    Raises `CheckpointError` if the checkpoint is damaged or not supported.
    """
    model = check_transformers(folder)
    state = _State(folder, model.features)
    source = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
    if source is None:
        raise CheckpointError(f"{folder} has no {' or '.join(TOKENIZERS)}; copy the one of the checkpoint there.")
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = workdir / TOKENIZERS[0]
    if source.suffix == ".json":
        convert_tokenizer(source, tokenizer, model.decoder.vocabulary)
    else:
        try:
            tokenizer.write_bytes(read_regular(source, MAX_TOKENIZER_BYTES))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source} cannot be read: {error}; download it again.") from error
    return Checkpoint(name=name, tokenizer=tokenizer, state=state, **vars(model))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that the weights are read from: an index first. Raises `CheckpointError` if there are none."""
    for name in WEIGHTS:
        if (path := folder / name).is_file():
            return files_of(path)
    raise CheckpointError(f"{folder} has a {CONFIG} but no {WEIGHTS[0]}; download the weights of the checkpoint.")


class _State(Mapping[str, NDArray[Any]]):
    """The tensors by their names in NeMo, with the constants of the front end."""

    def __init__(self, folder: Path, features: FeatureConfig) -> None:
        self._tensors = SafeTensors(weight_files(folder)[0])
        self._names: dict[str, str] = {}
        for name in self._tensors.keys() - _BUFFERS:
            renamed = _nemo_name(name)
            if renamed is None:
                raise CheckpointError(
                    f"{folder} has the tensor {short_repr(name)}, which is not part of {' or '.join(MODEL_TYPES)}; "
                    "merge adapters into the weights before the export."
                )
            if not self._tensors.is_floating(name):
                raise CheckpointError(
                    f"{folder} has the tensor {short_repr(name)} in whole numbers; quantised weights are not "
                    "supported: download the checkpoint in fp32, fp16 or bf16."
                )
            self._names[renamed] = name
        self._front_end = frontend(features)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._front_end[name] if name in self._front_end else self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._front_end, *self._names])

    def __len__(self) -> int:
        return len(self._front_end) + len(self._names)


def _nemo_name(name: str) -> str | None:
    """Return the name in NeMo of a tensor, None if it is not part of the model."""
    for pattern, replacement in _RENAMED:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return None


def frontend(features: FeatureConfig) -> dict[str, NDArray[np.float32]]:
    """Return window [window] and mel filters [1, M, bins] as NeMo computes them (`FilterbankFeatures`).

    The window is `torch.hann_window(window, periodic=False)`, in fp32 arithmetic. The filters are those of
    `librosa.filters.mel` with Slaney's mel scale (linear below 1 kHz, logarithmic above) and normalisation to equal
    area.
    """
    time = np.arange(features.window, dtype=np.float32) * np.float32(2 * np.pi / (features.window - 1))
    cosine = np.cos(time.astype(np.float64)).astype(np.float32)
    window = cosine * np.float32(-0.5) + np.float32(0.5)

    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(features.sample_rate / 2), features.mels + 2))
    bins = np.linspace(0.0, features.sample_rate / 2, features.n_fft // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return {"preprocessor.featurizer.window": window, "preprocessor.featurizer.fb": filters[None]}


_BREAK_HZ, _HZ_PER_MEL, _LOG_STEP = 1000.0, 200.0 / 3, np.log(6.4) / 27.0  # Slaney's Auditory Toolbox


def _hz_to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _HZ_PER_MEL
    return float(_BREAK_HZ / _HZ_PER_MEL + np.log(hz / _BREAK_HZ) / _LOG_STEP)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    break_mel = _BREAK_HZ / _HZ_PER_MEL
    return np.where(mel < break_mel, mel * _HZ_PER_MEL, _BREAK_HZ * np.exp(_LOG_STEP * (mel - break_mel)))


# -- the configuration -------------------------------------------------------------------------------------------------


def _nemo_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in NeMo's fields. Absent fields have the defaults of transformers' classes."""
    config = _Document.read(folder / CONFIG)
    model_type = config.get("model_type", one_of(*MODEL_TYPES))
    processor = _Document.read(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else _Document(PROCESSOR, {})
    if "feature_extractor" in processor.fields or not (folder / FEATURES).is_file():
        features = processor.section("feature_extractor")
    else:
        features = _Document.read(folder / FEATURES)
    encoder = config.section("encoder_config")
    for name, value in (("hidden_act", "silu"), ("subsampling_conv_kernel_size", 3), ("subsampling_conv_stride", 2)):
        encoder.get(name, one_of(value), value)
    config.get("durations", list_of(integer(0, 0), 0, 0), [])  # of a TDT decoder
    features.get("mel_filters_dtype", one_of("float32"), "float32")
    left = encoder.get("sliding_window", integer(2, 1 << 16), 71) - 1
    rights = _lookaheads(processor, encoder)
    mels = encoder.get("num_mel_bins", integer(1, 4096), 80)
    features.get("feature_size", one_of(mels), mels)
    rate = features.get("sampling_rate", integer(1000, 384_000), 16000)
    bias = encoder.get("attention_bias", one_of(False, True), True)
    encoder.get("convolution_bias", one_of(bias), True)
    hidden = config.get("decoder_hidden_size", integer(1, 1 << 16), 640)
    prompted = model_type == MODEL_TYPES[1]
    vocabulary = config.get("vocab_size", integer(2, 1 << 20), 13088 if prompted else 1025) - 1
    config.get("blank_token_id", one_of(vocabulary), vocabulary)
    asr = "nemo.collections.asr"
    target = "rnnt_bpe_models_prompt.EncDecRNNTBPEModelWithPrompt" if prompted else "rnnt_bpe_models.EncDecRNNTBPEModel"
    return {
        "target": f"{asr}.models.{target}",
        "model_defaults": _prompts(config, processor) if prompted else {},
        "tokenizer": {"type": "bpe"},
        "preprocessor": {
            "_target_": f"{asr}.modules.AudioToMelSpectrogramPreprocessor",
            "normalize": "NA",
            "sample_rate": rate,
            "window_size": features.get("win_length", integer(2, 1 << 16), 400) / rate,
            "window_stride": features.get("hop_length", integer(1, 1 << 16), 160) / rate,
            "features": mels,
            "n_fft": features.get("n_fft", integer(2, 1 << 17), 512),
            "preemph": None if features.is_null("preemphasis") else features.get("preemphasis", number(0, 1), 0.97),
        },
        "encoder": {
            "_target_": f"{asr}.modules.ConformerEncoder",
            "feat_in": mels,
            "n_layers": encoder.get("num_hidden_layers", integer(1, 1000), 24),
            "use_bias": bias,
            "d_model": encoder.get("hidden_size", integer(1, 1 << 16), 1024),
            "n_heads": encoder.get("num_attention_heads", integer(1, 1024), 8),
            "subsampling": "dw_striding",
            "subsampling_factor": encoder.get("subsampling_factor", one_of(4, 8), 8),
            "causal_downsampling": True,
            "self_attention_model": "rel_pos",
            "att_context_style": "chunked_limited",
            "att_context_size": [[left, right] for right in rights],
            "xscaling": encoder.get("scale_input", one_of(False, True), True),
            "conv_kernel_size": encoder.get("conv_kernel_size", integer(1, 4096), 9),
            "conv_norm_type": "layer_norm",
            "conv_context_size": "causal",
        },
        "decoder": {
            "_target_": f"{asr}.modules.RNNTDecoder",
            "prednet": {
                "pred_hidden": hidden,
                "pred_rnn_layers": config.get("num_decoder_layers", integer(1, 100), 2),
            },
        },
        "joint": {
            "_target_": f"{asr}.modules.RNNTJoint",
            "num_classes": vocabulary,
            "jointnet": {
                "joint_hidden": hidden,
                "activation": config.get("hidden_act", one_of("relu", "sigmoid", "tanh"), "relu"),
            },
        },
        "decoding": {"greedy": {"max_symbols": config.get("max_symbols_per_step", integer(1, 10_000), 10)}},
    }


def _lookaheads(processor: _Document, encoder: _Document) -> list[int]:
    """Return the right contexts, the default first. The first versions of transformers had them in the encoder."""
    name, check = "supported_num_lookahead_tokens", list_of(integer(0, 9999), 1, 64)
    section = processor if processor.fields.get(name) is not None else encoder
    rights = list(section.get(name, check, [13, 6, 1, 0]))
    default = encoder.get("default_num_lookahead_tokens", one_of(*rights), rights[0])
    return sorted(rights, key=lambda right: right != default)


def _prompts(config: _Document, processor: _Document) -> dict[str, Any]:
    """Return NeMo's `model_defaults` of a prompted model."""
    return {
        "initialize_prompt_feature": True,
        "num_prompts": config.get("num_prompts", integer(1, 1 << 16), 128),
        "prompt_dictionary": processor.get("prompt_dictionary", mapping),
    }


class _Document:
    """A JSON object whose fields are checked when they are used."""

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        self.where, self.fields = where, fields

    @classmethod
    def read(cls, path: Path) -> _Document:
        """Read a file. Raises `CheckpointError` if it is not a JSON object."""
        try:
            return cls(str(path), mapping(parse_json(read_regular(path, _MAX_JSON_BYTES)), "the document"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; download it again.") from error

    def section(self, name: str) -> _Document:
        """Return an object in a field."""
        return _Document(f"{self.where}: {name}", self.get(name, mapping))

    def is_null(self, name: str) -> bool:
        """Return whether a field is present without a value, where that differs from an absent field."""
        return name in self.fields and self.fields[name] is None

    def get(self, name: str, check: Check, default: Any = _REQUIRED) -> Any:
        """Return a field that passes the check, or `default` if it is absent or null. Raises `CheckpointError`."""
        value = self.fields.get(name)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.where} has no field '{name}'; download the file again.")
            return default
        try:
            return check(value, name)
        except ValueError as error:
            raise CheckpointError(f"not supported: {self.where}: {error}.") from error
