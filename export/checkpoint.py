"""Checkpoints: the sizes and weights that the graphs are written from, and the reader of `.nemo` files.

`Checkpoint` is independent of the file format: names of weights and configuration fields are NeMo's, and weights are
NumPy arrays. `check_config` turns a NeMo configuration into a `ModelConfig`. Neither needs NeMo or torch.

A `.nemo` file is a tar archive of `model_config.yaml`, `model_weights.ckpt` (a PyTorch state dict) and the tokenizer.
The configuration defines the model; unsupported values are rejected by field name before any work is done. Absent
fields have NeMo's defaults (`collections/asr/modules/conformer_encoder.py`, `rnnt.py`, `audio_preprocessing.py`).
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import sentencepiece
import yaml
from numpy.typing import NDArray

from nemostream.bundle import LANGUAGE_NAME, ChunkConfig, DecoderConfig, EncoderConfig, FeatureConfig, LanguageConfig
from nemostream.errors import CheckpointError
from nemostream.export.state_dict import StateDict
from nemostream.untrusted import MIB, open_regular, short_repr

_TRANSDUCERS = ("EncDecRNNTBPEModel", "EncDecHybridRNNTCTCBPEModel")
_PROMPTED = ("EncDecRNNTBPEModelWithPrompt", "EncDecHybridRNNTCTCBPEModelWithPrompt")
_MULTITALKER = "EncDecMultiTalkerRNNTBPEModel"
_STREAMING_MODEL = "nvidia/nemotron-speech-streaming-en-0.6b"

_WEIGHTS, _CONFIG, _TOKENIZER = "model_weights.ckpt", "model_config.yaml", "tokenizer.model"
_REQUIRED = object()
# Limits for archives. The largest published checkpoint of this kind has 2.5 GB of weights and 220 kB of configuration,
# most of it the vocabulary.
_MAX_CONFIG_BYTES = 4 * MIB
MAX_TOKENIZER_BYTES = 64 * MIB
_MAX_WEIGHTS_BYTES = 65536 * MIB
_MAX_MEMBERS = 10_000
_MAX_RATIO = 200  # size of the contents of a compressed archive / size of the archive; weights hardly compress
_MIN_CONTENT_LIMIT = 64 * MIB  # contents allowed at any ratio, because zeros compress well
_MAX_READ_BYTES = 16 * MIB  # per call: tarfile reads an extended header in one call
_NEMO_MAX_SYMBOLS = 10  # per frame, of a configuration that has no section for greedy decoding
_MAX_ALIASES = 100  # in a configuration; those of NeMo have none
_MAX_DEPTH = 50


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the configuration of a supported model determines."""

    features: FeatureConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    chunks: tuple[ChunkConfig, ...]
    log_guard: float  # added to mel energies before the logarithm
    conv_norm: str  # "layer_norm" or "batch_norm"
    input_scale: float  # sqrt(d_model) with xscaling, else 1
    use_bias: bool = True  # in the linear layers and convolutions of the encoder's layers
    languages: LanguageConfig = dataclasses.field(
        default_factory=LanguageConfig
    )  # with prompts, in the checkpoint's order
    speaker_kernels: tuple[str, ...] = ()  # of a multitalker model, before the first layer
    warnings: tuple[str, ...] = ()  # for the user, one sentence each


@dataclass(frozen=True, kw_only=True)
class Checkpoint(ModelConfig):
    """A checkpoint that the exporter supports: its sizes, and its weights by their names in NeMo's state dict.

    `state` reads an array when it is looked up, so that export needs memory for one tensor at a time.
    """

    name: str
    tokenizer: Path  # SentencePiece model
    state: Mapping[str, NDArray[Any]]

    @property
    def joint_output(self) -> str:
        """Name of the joint's last layer, "joint.joint_net.2". Raises `CheckpointError` if there is none."""
        layers = [n.removesuffix(".weight") for n in self.state if re.fullmatch(r"joint\.joint_net\..+\.weight", n)]
        if not layers:
            raise CheckpointError("the checkpoint has no tensor 'joint.joint_net.*.weight', the output of the joint.")
        return max(layers)

    def array(self, name: str) -> NDArray[Any]:
        """Return a tensor, in fp32 if it is a floating-point one. Raises `CheckpointError` if it is missing."""
        if name not in self.state:
            raise CheckpointError(f"the checkpoint has no tensor '{name}', which its configuration requires.")
        array, shape = self.state[name], self._shapes.get(name)
        if shape is not None and array.shape != shape:
            raise CheckpointError(
                f"the tensor '{name}' of the checkpoint has the shape {list(array.shape)}, but its configuration "
                f"requires {list(shape)}."
            )
        floating = np.issubdtype(array.dtype, np.floating)
        if shape is not None and not floating:
            raise CheckpointError(
                f"the tensor '{name}' of the checkpoint has the type {array.dtype.name}, but weights must be floating "
                "point; save the model in fp32, fp16 or bf16."
            )
        return array.astype(np.float32, copy=False) if floating else array

    def has(self, name: str) -> bool:
        """Return whether the state dict has the tensor."""
        return name in self.state

    def pieces(self) -> list[str]:
        """Return the pieces of the tokenizer. Raises `CheckpointError` if they are not the model's vocabulary."""
        try:
            tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"the tokenizer of {self.name} is not a SentencePiece model.") from error
        size, vocabulary = tokenizer.get_piece_size(), self.decoder.vocabulary
        if size != vocabulary:
            raise CheckpointError(
                f"the tokenizer of {self.name} has {size} pieces, but the model has {vocabulary} tokens; use the "
                "tokenizer that the model was trained with."
            )
        return [tokenizer.id_to_piece(index) for index in range(size)]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors that the graphs use, those of the largest ones taken from the first of their kind.

        The configuration does not determine the widths of feed-forward, prompt and speaker kernels, and the number of
        channels of the subsampling.
        """

        def size(name: str) -> int:
            return self.state[name].shape[0] if name in self.state and self.state[name].ndim else 0

        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, outputs: int, inputs: int, *kernel: int) -> None:
            shapes.update({f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)})

        front, encoder, net = self.features, self.encoder, self.decoder
        width, bins = encoder.d_model, front.mels
        shapes["preprocessor.featurizer.window"] = (front.window,)
        shapes["preprocessor.featurizer.fb"] = (1, front.mels, front.n_fft // 2 + 1)
        channels = size("encoder.pre_encode.conv.0.weight")
        for stage in range(encoder.subsampling.bit_length() - 1):
            linear(f"encoder.pre_encode.conv.{3 * stage - 1 if stage else 0}", channels, 1, 3, 3)
            if stage:
                linear(f"encoder.pre_encode.conv.{3 * stage}", channels, channels, 1, 1)
            bins = bins // 2 + 1
        linear("encoder.pre_encode.out", width, channels * bins)
        for kernel in self.speaker_kernels:
            linear(f"{kernel}.0", inner := size(f"{kernel}.0.weight"), width)
            linear(f"{kernel}.3", width, inner)
        for layer in (f"encoder.layers.{index}" for index in range(encoder.layers)):
            for part in ("feed_forward1", "feed_forward2"):
                linear(f"{layer}.{part}.linear1", inner := size(f"{layer}.{part}.linear1.weight"), width)
                linear(f"{layer}.{part}.linear2", width, inner)
            for part in ("q", "k", "v", "out", "pos"):
                linear(f"{layer}.self_attn.linear_{part}", width, width)
            for letter in "uv":
                shapes[f"{layer}.self_attn.pos_bias_{letter}"] = (encoder.heads, width // encoder.heads)
            linear(f"{layer}.conv.pointwise_conv1", 2 * width, width, 1)
            linear(f"{layer}.conv.depthwise_conv", width, 1, encoder.conv_cache + 1)
            linear(f"{layer}.conv.pointwise_conv2", width, width, 1)
            norms = ("norm_feed_forward1", "norm_self_att", "norm_conv", "norm_feed_forward2", "norm_out")
            for name in (*(f"{layer}.{norm}" for norm in norms), f"{layer}.conv.batch_norm"):
                shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        if self.languages.count:
            linear("prompt_kernel.0", inner := size("prompt_kernel.0.weight"), width + self.languages.count)
            linear("prompt_kernel.2", width, inner)
        shapes["decoder.prediction.embed.weight"] = (net.vocabulary + 1, net.hidden)
        for layer_index in range(net.layers):
            for side in "ih":
                lstm = f"decoder.prediction.dec_rnn.lstm.{{}}_{side}h_l{layer_index}"
                shapes[lstm.format("weight")] = (4 * net.hidden, net.hidden)
                shapes[lstm.format("bias")] = (4 * net.hidden,)
        linear("joint.enc", net.joint, width)
        linear("joint.pred", net.joint, net.hidden)
        linear(self.joint_output, net.vocabulary + 1, net.joint)
        return shapes


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a `.nemo` file without reading its weights. Raises `CheckpointError`."""
    with _open_archive(path) as (archive, limit):
        for member, name in _members(path, archive, limit):
            if name == _CONFIG:
                return _parse_config(path, _content(path, archive, member, _MAX_CONFIG_BYTES))
    raise CheckpointError(f"{path} is not a .nemo checkpoint: it contains no {_CONFIG}.")


def open_checkpoint(path: Path, workdir: Path) -> Checkpoint:
    """Validate the configuration, then copy weights and tokenizer into `workdir` (as large as the checkpoint).

    Raises `CheckpointError` if the checkpoint is damaged or not supported.
    """
    config = read_config(path)
    model = check_config(config)
    if not path.stem.isprintable():
        raise CheckpointError(f"{short_repr(path.name)} has unprintable characters; rename the checkpoint.")
    found = _unpack(path, workdir, _tokenizer_name(config))
    if _WEIGHTS not in found:
        raise CheckpointError(f"{path} contains no {_WEIGHTS}; sharded or distributed checkpoints are not supported.")
    state = _read_state(path, found[_WEIGHTS])
    if not any(name.startswith("joint.joint_net.") for name in state):
        raise CheckpointError(f"the weights of {path} contain no joint network.")
    return Checkpoint(name=path.stem, tokenizer=_tokenizer(config, found), state=state, **vars(model))


def _read_state(path: Path, weights: Path) -> StateDict:
    """Return the state dict in `weights`, a file of the checkpoint `path`. Raises `CheckpointError`."""
    try:
        return StateDict(weights)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {_WEIGHTS} is not a PyTorch state dict that can be read safely ({error}); save the model again."
        ) from error


# -- the archive -------------------------------------------------------------------------------------------------------


class _BoundedFile:
    """Limit a file to `max_bytes`, and each read to `_MAX_READ_BYTES`: `tarfile` allocates the size in a header."""

    def __init__(self, file: BufferedReader | gzip.GzipFile, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_READ_BYTES:
            raise OSError(f"it has a header of {size} bytes; at most {_MAX_READ_BYTES} are allowed")
        return self._file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0 and position > self._max_bytes:
            raise OSError(f"it ends before byte {position}, or is larger than the limit of {self._max_bytes} bytes")
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _open_archive(path: Path) -> Iterator[tuple[tarfile.TarFile, int]]:
    """Open an archive; yield it and the limit of its uncompressed size. Raises `CheckpointError` if it is damaged."""
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            limit = min(max(size * _MAX_RATIO, _MIN_CONTENT_LIMIT), 2 * _MAX_WEIGHTS_BYTES) if compressed else size
            bounded: Any = _BoundedFile(gzip.GzipFile(fileobj=file) if compressed else file, limit)
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                yield archive, limit
    except CheckpointError:
        raise
    except (OSError, EOFError, ValueError, LookupError, tarfile.TarError, zlib.error, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as a .nemo checkpoint: {error}.") from error


def _members(path: Path, archive: tarfile.TarFile, max_bytes: int) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield the regular files of an archive and their names without folders.

    Raises `CheckpointError` for members that NeMo never writes: links, devices, FIFOs, sparse files, names outside the
    folder, and duplicate names. These are rejected because NeMo extracts the whole archive when parity is measured.
    """
    seen: set[str] = set()
    for member in archive:
        where = f"{path} is not a valid .nemo checkpoint: its member {short_repr(member.name)}"
        if len(seen) >= _MAX_MEMBERS:
            raise CheckpointError(f"{path} is not a .nemo checkpoint: it has more than {_MAX_MEMBERS} members.")
        if member.size < 0 or member.offset_data + member.size > max_bytes:
            raise CheckpointError(f"{where} has {member.size} bytes, more than the archive contains.")
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
            raise CheckpointError(f"{where} is not inside the archive's folder.")
        if str(name) in seen:
            raise CheckpointError(f"{where} occurs twice.")
        seen.add(str(name))
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise CheckpointError(f"{where} is a link, a device or a sparse file; only regular files are allowed.")
        yield member, name.name


def _content(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> bytes:
    """Return the content of a regular member. Raises `CheckpointError` if it is too large or truncated."""
    _check_member(path, member, max_bytes)
    file = archive.extractfile(member)
    assert file is not None, "a regular file"
    content = b"".join(iter(lambda: file.read(MIB), b""))
    if len(content) != member.size:
        raise CheckpointError(f"{path} is truncated: {short_repr(member.name)} is incomplete.")
    return content


def _check_member(path: Path, member: tarfile.TarInfo, max_bytes: int) -> None:
    if member.size > max_bytes:
        name = short_repr(member.name)
        raise CheckpointError(f"{path}: {name} has {member.size} bytes; at most {max_bytes} are allowed.")


def _unpack(path: Path, workdir: Path, tokenizer: str) -> dict[str, Path]:
    """Copy only weights and tokenizer of an archive into a folder.

    `tokenizer` is the file name of the tokenizer; if empty, the first name that ends with "tokenizer.model" is used.
    Returns the copies by their names in the archive, without folders. If a name occurs in several folders, the first
    member is used.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    with _open_archive(path) as (archive, limit):
        for member, name in _members(path, archive, limit):
            is_tokenizer = name == tokenizer or (not tokenizer and name.endswith(_TOKENIZER))
            if name in found or not (name == _WEIGHTS or is_tokenizer):
                continue
            _check_member(path, member, _MAX_WEIGHTS_BYTES if name == _WEIGHTS else MAX_TOKENIZER_BYTES)
            target = workdir / (_WEIGHTS if name == _WEIGHTS else f"tokenizer-{len(found)}.model")
            source = archive.extractfile(member)
            assert source is not None, "a regular file"
            with source, target.open("xb") as copy:
                shutil.copyfileobj(source, copy, MIB)
            if target.stat().st_size != member.size:
                raise CheckpointError(f"{path} is truncated: {short_repr(member.name)} is incomplete.")
            found[name] = target
    return found


# -- the configuration -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Load plain YAML values with limits on depth and aliases (nine nested levels can expand to a billion values)."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._aliases = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            self._aliases += 1
            if self._aliases > _MAX_ALIASES:
                raise yaml.composer.ComposerError(None, None, f"it has more than {_MAX_ALIASES} aliases", None)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {_MAX_DEPTH} deep", None)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _parse_config(path: Path, content: bytes) -> dict[str, Any]:
    """Parse a configuration. Raises `CheckpointError` if it is not a mapping of plain values of limited size."""
    try:
        config = yaml.load(content, _Loader)
        _check_size(config)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise CheckpointError(f"{path} cannot be read as a .nemo checkpoint: {_CONFIG}: {reason[:300]}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a .nemo checkpoint: its {_CONFIG} is not a mapping.")
    return config


def _check_size(config: Any, max_values: int = 1_000_000) -> None:
    """Raise `ValueError` if a configuration with expanded aliases has too many values, or contains itself."""
    pending, count = [config], 0
    while pending:
        value = pending.pop()
        count += 1
        if count > max_values:
            raise ValueError(f"it has more than {max_values} values")
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def check_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the sizes of the model. Raises `CheckpointError` naming the first unsupported field and its value."""
    _check_kind(config)
    _expect(config, "adapters", (None, {}), None)
    features, log_guard = _features(config)
    encoder, chunks = _encoder(config, features)
    decoder, warnings = _decoder(config)
    for path in ("encoder.xscaling", "encoder.use_bias"):
        _expect(config, path, (True, False), True)
    scaled = _get(config, "encoder.xscaling", True)
    return ModelConfig(
        features=features,
        encoder=encoder,
        decoder=decoder,
        chunks=chunks,
        log_guard=log_guard,
        conv_norm=_get(config, "encoder.conv_norm_type", "batch_norm"),
        input_scale=float(np.sqrt(encoder.d_model)) if scaled else 1.0,
        use_bias=_get(config, "encoder.use_bias", True),
        languages=_languages(config),
        speaker_kernels=_speaker_kernels(config),
        warnings=warnings,
    )


def _check_kind(config: Mapping[str, Any]) -> None:
    """Reject models that are not streaming transducers, naming an engine or a checkpoint to use instead."""
    kind = _kind(config)
    hint = ""
    if "CTC" in kind and "RNNT" not in kind:
        hint = "a CTC model has no transducer; use sherpa-onnx or NeMo for it"
    elif kind in ("EncDecRNNTModel", "EncDecHybridRNNTCTCModel"):
        hint = "a vocabulary of characters has no SentencePiece model; use NeMo for it"
    _expect(config, "target", (*_TRANSDUCERS, *_PROMPTED, _MULTITALKER), class_name=True, hint=hint)
    tdt = "a token-and-duration transducer (TDT) skips frames; use onnx-asr, sherpa-onnx or NeMo for it"
    for path in ("loss.loss_name", "decoding.model_type"):
        hint = tdt if _get(config, path, None) == "tdt" else ""
        _expect(config, path, ("rnnt", "default", "warprnnt_numba", "warprnnt", "pytorch", None), None, hint=hint)
    for path in ("model_defaults.tdt_durations", "decoding.durations"):
        _expect(config, path, (None, []), None, hint=tdt)
    style = _get(config, "encoder.att_context_style", "regular")
    if style == "chunked_limited_with_rc":
        hint = "this encoder has no caches and recomputes its left context; use sherpa-onnx or NeMo for it"
    else:
        hint = f"an offline encoder needs the complete recording; use a streaming one such as {_STREAMING_MODEL}"
    _expect(config, "encoder.att_context_style", ("chunked_limited",), "regular", hint=hint)
    prompted = "model_defaults.initialize_prompt_feature"
    _expect(config, prompted, (True,) if kind in _PROMPTED else (None, False), None)


def _kind(config: Mapping[str, Any]) -> str:
    """Return the name of the model's class in NeMo."""
    return str(_get(config, "target")).rpartition(".")[2]


def _languages(config: Mapping[str, Any]) -> LanguageConfig:
    """Return the prompt ids of a prompted model; the default is that of NeMo, "auto", if the model has it."""
    if _kind(config) not in _PROMPTED:
        return LanguageConfig()
    count = _integer(config, "model_defaults.num_prompts", 128, 1, 1 << 16)
    path = "model_defaults.prompt_dictionary"
    names = _get(config, path)
    if not isinstance(names, dict) or not names:
        _reject(path, names, "a mapping from languages to prompt ids")
    for name, prompt in names.items():
        if not isinstance(name, str) or not re.fullmatch(LANGUAGE_NAME, name):
            _reject(path, name, "names of languages, such as 'de-DE'")
        if type(prompt) is not int or not 0 <= prompt < count:
            _reject(f"{path}.{name}", prompt, f"a whole number from 0 to num_prompts - 1, which is {count - 1}")
    default = next((name for name in ("auto", "en-US") if name in names), next(iter(names)))
    return LanguageConfig(default, dict(names), count)


def _speaker_kernels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the speaker kernels that NeMo applies to a recording of one speaker.

    It skips kernels of later layers without speaker targets, but applies them if the targets are all ones, so only
    those of layer 0 are well defined (NeMo, `multitalker_asr_mixins.py`).
    """
    if _kind(config) != _MULTITALKER or _get(config, "spk_kernel_type", None) is None:
        return ()
    _expect(config, "spk_kernel_type", ("ff",))
    _expect(config, "spk_kernel_layers", ([0], ["0"]))
    _expect(config, "add_bg_spk_kernel", (True, False), True)
    return ("spk_kernels.0", "bg_spk_kernels.0")[: 1 + _get(config, "add_bg_spk_kernel", True)]


def _decoder(config: Mapping[str, Any]) -> tuple[DecoderConfig, tuple[str, ...]]:
    """Return the sizes of prediction network and joint, and warnings about the decoding strategy."""
    _expect(config, "decoder._target_", ("RNNTDecoder",), class_name=True)
    _expect(config, "decoder.normalization_mode", (None,), None)
    _expect(config, "decoder.blank_as_pad", (True,), True)
    hidden = _integer(config, "decoder.prednet.pred_hidden", _REQUIRED, 1, 1 << 16)
    _expect(config, "decoder.prednet.rnn_hidden_size", (None, -1, 0, hidden), -1)
    _expect(config, "joint._target_", ("RNNTJoint",), class_name=True)
    _expect(config, "joint.num_extra_outputs", (0, None), 0)
    _expect(config, "joint.jointnet.activation", ("relu", "sigmoid", "tanh"))
    _expect(config, "tokenizer.type", ("bpe",))
    strategy = _get(config, "decoding.strategy", "greedy_batch")
    if not isinstance(strategy, str):
        _reject("decoding.strategy", strategy, "the name of a strategy")
    greedy = strategy in ("greedy", "greedy_batch")
    decoder = DecoderConfig(
        layers=_integer(config, "decoder.prednet.pred_rnn_layers", 1, 1, 100),
        hidden=hidden,
        joint=_integer(config, "joint.jointnet.joint_hidden", _REQUIRED, 1, 1 << 16),
        vocabulary=_vocabulary(config),
        max_symbols=_max_symbols(config, None if greedy else _NEMO_MAX_SYMBOLS),
        activation=_get(config, "joint.jointnet.activation"),
    )
    if greedy:
        return decoder, ()
    return decoder, (
        f"decoding.strategy is {short_repr(strategy)}, but nemostream decodes greedily: transcripts equal NeMo's with "
        "the strategy greedy_batch.",
    )


def _vocabulary(config: Mapping[str, Any]) -> int:
    """Return the number of tokens, without blank."""
    labels = _get(config, "joint.vocabulary", None)
    if labels is not None and not isinstance(labels, list):
        _reject("joint.vocabulary", labels, "a list of tokens")
    vocabulary = len(labels) if labels else 0
    for field in ("decoder.vocab_size", "joint.num_classes"):
        if not vocabulary and (stated := _get(config, field, None)) is not None:
            vocabulary = max(_integer(config, field, stated, -1, 1 << 20), 0)
    if not 0 < vocabulary <= 1 << 20:
        _reject("joint.num_classes", vocabulary, "a positive number of tokens")
    return vocabulary


def _max_symbols(config: Mapping[str, Any], default: int | None) -> int:
    """Return the limit of symbols per frame: as in `rnnt_decoding.py`, the newer field takes precedence."""
    for field in ("decoding.greedy.max_symbols", "decoding.greedy.max_symbols_per_step"):
        if (max_symbols := _get(config, field, None)) is not None:
            if type(max_symbols) is not int or not 1 <= max_symbols <= 10_000:
                _reject(field, max_symbols, "a number from 1 to 10000")
            return max_symbols
    if default is not None:
        return default
    _reject("decoding.greedy.max_symbols", None, "a number; without a limit decoding may never leave a frame")


def _features(config: Mapping[str, Any]) -> tuple[FeatureConfig, float]:
    _expect(config, "preprocessor._target_", ("AudioToMelSpectrogramPreprocessor",), class_name=True)
    _expect(config, "preprocessor.normalize", ("NA", None), "per_feature")
    _expect(config, "preprocessor.window", ("hann",), "hann")
    _expect(config, "preprocessor.log", (True,), True)
    _expect(config, "preprocessor.log_zero_guard_type", ("add",), "add")
    _expect(config, "preprocessor.mag_power", (2.0,), 2.0)
    for field, value in (("exact_pad", False), ("frame_splicing", 1)):
        _expect(config, f"preprocessor.{field}", (value,), value)
    rate = _integer(config, "preprocessor.sample_rate", 16000, 1000, 384_000)
    guard = _number(config, "preprocessor.log_zero_guard_value", 2**-24, 0, 1)
    window = round(rate * _number(config, "preprocessor.window_size", 0.02, 0.001, 1))
    n_fft = 2 ** math.ceil(math.log2(max(window, 1)))
    if _get(config, "preprocessor.n_fft", None) is not None:
        n_fft = _integer(config, "preprocessor.n_fft", None, 0, 1 << 17) or n_fft
    preemphasis = 0.0
    if _get(config, "preprocessor.preemph", 0.97) is not None:
        preemphasis = _number(config, "preprocessor.preemph", 0.97, 0, 1)
    features = FeatureConfig(
        sample_rate=rate,
        mels=_integer(config, "preprocessor.features", 64, 1, 4096),
        window=window,
        hop=round(rate * _number(config, "preprocessor.window_stride", 0.01, 0.001, 1)),
        n_fft=n_fft,
        preemphasis=preemphasis,
    )
    if n_fft < window:
        _reject("preprocessor.n_fft", n_fft, f"at least the window of {window} samples")
    if features.window % 2 or features.window <= features.hop:
        _reject("preprocessor.window_size", features.window, "an even number of samples, more than the stride")
    return features, guard


def _encoder(config: Mapping[str, Any], features: FeatureConfig) -> tuple[EncoderConfig, tuple[ChunkConfig, ...]]:
    _expect(config, "encoder._target_", ("ConformerEncoder",), class_name=True)
    _expect(config, "encoder.subsampling", ("dw_striding",), "striding")
    _expect(config, "encoder.subsampling_factor", (4, 8), 4)
    _expect(config, "encoder.causal_downsampling", (True,), False)
    _expect(config, "encoder.self_attention_model", ("rel_pos",), "rel_pos")
    _expect(config, "encoder.conv_norm_type", ("layer_norm", "batch_norm"), "batch_norm")
    _expect(config, "encoder.conv_context_style", ("regular", None), "regular")
    _expect(config, "encoder.reduction", (None,), None)
    d_model = _integer(config, "encoder.d_model", _REQUIRED, 1, 1 << 16)
    kernel = _integer(config, "encoder.conv_kernel_size", 31, 1, 4096)
    heads = _integer(config, "encoder.n_heads", 4, 1, 1024)
    if d_model % heads:
        _reject("encoder.d_model", d_model, f"a multiple of n_heads, which is {heads}")
    _expect(config, "encoder.feat_out", (None, -1, 0, d_model), -1)
    _expect(config, "encoder.feat_in", (features.mels,))
    _expect(config, "encoder.conv_context_size", ("causal", [kernel - 1, 0]), None)
    factor = _get(config, "encoder.subsampling_factor", 4)
    frame_ms = 1000 * factor * features.hop / features.sample_rate
    contexts = _get(config, "encoder.att_context_size")
    if isinstance(contexts, list) and contexts and type(contexts[0]) is int:
        contexts = [contexts]
    if not isinstance(contexts, list) or not 0 < len(contexts) <= 64:
        _reject("encoder.att_context_size", contexts, "a list of [left, right] pairs")
    chunks: dict[int, ChunkConfig] = {}
    for pair in contexts:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(size) is not int for size in pair):
            _reject("encoder.att_context_size", pair, "[left, right] pairs of whole numbers")
        left, right = pair
        frames = right + 1
        if not 1 <= left <= 1 << 16 or not 0 <= right < 10_000 or left % frames:
            _reject("encoder.att_context_size", [left, right], "limited contexts with left a multiple of right + 1")
        ms = round(frames * frame_ms)
        if ms in chunks:
            _reject("encoder.att_context_size", contexts, "one left context per chunk size")
        chunks[ms] = ChunkConfig(ms, frames, left, frames * factor * features.hop)
    encoder = EncoderConfig(
        layers=_integer(config, "encoder.n_layers", _REQUIRED, 1, 1000),
        d_model=d_model,
        heads=heads,
        subsampling=factor,
        cache=max(chunk.left for chunk in chunks.values()),
        conv_cache=kernel - 1,
    )
    return encoder, tuple(sorted(chunks.values(), key=lambda chunk: chunk.ms))


def _tokenizer_name(config: Mapping[str, Any]) -> str:
    """Return the file name of the tokenizer in the archive; empty if the configuration has none."""
    path = _get(config, "tokenizer.model_path", None)
    if path is None:
        return ""
    if not isinstance(path, str):
        _reject("tokenizer.model_path", path, "the name of a file")
    return path.removeprefix("nemo:")


def _tokenizer(config: Mapping[str, Any], found: Mapping[str, Path]) -> Path:
    for name, file in found.items():
        if name != _WEIGHTS:
            return file
    name = _tokenizer_name(config)
    raise CheckpointError(f"the checkpoint does not contain its SentencePiece model (tokenizer.model_path: {name!r}).")


def _integer(config: Mapping[str, Any], path: str, default: Any, minimum: int, maximum: int) -> int:
    """Return an integer field, or `default` if it is absent. Raises `CheckpointError` for other values."""
    value = _get(config, path, default)
    if type(value) is not int or not minimum <= value <= maximum:
        _reject(path, value, f"a whole number from {minimum} to {maximum}")
    return value


def _number(config: Mapping[str, Any], path: str, default: float, minimum: float, maximum: float) -> float:
    """Return a finite number field, or `default` if it is absent. Raises `CheckpointError` for other values."""
    value = _get(config, path, default)
    if type(value) not in (int, float) or not minimum <= value <= maximum or not math.isfinite(value):
        _reject(path, value, f"a number from {minimum:g} to {maximum:g}")
    return float(value)


def _get(config: Mapping[str, Any], path: str, default: Any = _REQUIRED) -> Any:
    """Return a field by its dotted path. Raises `CheckpointError` if it is absent and has no default."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            if default is _REQUIRED:
                raise CheckpointError(f"the checkpoint's configuration has no field '{path}'.")
            return default
        value = value[key]
    return value


def _expect(
    config: Mapping[str, Any],
    path: str,
    supported: Iterable[Any],
    default: Any = _REQUIRED,
    class_name: bool = False,
    hint: str = "",
) -> None:
    """Reject a field whose value is not supported. With `class_name`, only the last part of a dotted name counts."""
    value = _get(config, path, default)
    compared = str(value).rpartition(".")[2] if class_name else value
    supported = tuple(supported)
    if not any(compared == known and isinstance(compared, bool) == isinstance(known, bool) for known in supported):
        _reject(path, value, " or ".join(repr(known) for known in supported if known is not None) or "null", hint)


def _reject(path: str, value: Any, supported: str, hint: str = "") -> NoReturn:
    hint = hint and f"; {hint}"
    raise CheckpointError(f"not supported: {path} is {short_repr(value, 300)}; nemostream supports {supported}{hint}.")
