"""Reading a `.nemo` checkpoint: its configuration checked, its weights as numpy arrays.

A `.nemo` file is a tar of `model_config.yaml`, `model_weights.ckpt` (a PyTorch state dict) and the tokenizer. The
configuration decides everything; a field we do not support is refused by its name before any work is done. Defaults of
absent fields are NeMo's own (`collections/asr/modules/conformer_encoder.py`, `rnnt.py`, `audio_preprocessing.py`).
"""

from __future__ import annotations

import gzip
import math
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import yaml
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, DecoderConfig, EncoderConfig, FeatureConfig
from nemostream.errors import CheckpointError
from nemostream.untrusted import MIB, open_regular, short_repr

_WEIGHTS, _CONFIG, _TOKENIZER = "model_weights.ckpt", "model_config.yaml", "tokenizer.model"
_REQUIRED = object()
# Of what is read from an archive. The largest published checkpoint of this kind has 2.5 GB of weights and 220 kB of
# configuration, most of it the vocabulary.
_MOST_CONFIG = 4 * MIB
_MOST_TOKENIZER = 64 * MIB
_MOST_WEIGHTS = 65536 * MIB
_MOST_MEMBERS = 10_000
_MOST_RATIO = 200  # of a compressed archive's contents to the archive; weights hardly compress
_LEAST_LIMIT = 64 * MIB  # whatever the ratio, as zeros compress well
_MOST_READ = 16 * MIB  # at once; a header of an archive that is larger is read as a whole
_MOST_ALIASES = 100  # in a configuration; NeMo's own have none
_MOST_DEPTH = 50


@dataclass(frozen=True)
class Checkpoint:
    """An unpacked checkpoint that the exporter supports. Weights stay memory-mapped until `array` is asked for one."""

    name: str
    features: FeatureConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    chunks: tuple[ChunkConfig, ...]
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
    with _opened(path) as (archive, most):
        for member, name in _members(path, archive, most):
            if name == _CONFIG:
                return _parse_config(path, _content(path, archive, member, _MOST_CONFIG))
    raise CheckpointError(f"{path} is not a .nemo checkpoint: it holds no {_CONFIG}.")


def open_checkpoint(path: Path, workdir: Path) -> Checkpoint:
    """Check the configuration, then copy weights and tokenizer into `workdir` (as large as the checkpoint)."""
    import torch  # here, so that a refusal costs no import

    config = read_config(path)
    features, encoder, decoder, chunks, extra = check_config(config)
    if not path.stem.isprintable():
        raise CheckpointError(f"{short_repr(path.name)} has characters that cannot be printed; rename the checkpoint.")
    found = _unpack(path, workdir, _tokenizer_name(config))
    if _WEIGHTS not in found:
        raise CheckpointError(f"{path} holds no {_WEIGHTS}; sharded or distributed checkpoints are not supported.")
    try:
        state = torch.load(found[_WEIGHTS], map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise many kinds
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path}: {_WEIGHTS} is not a PyTorch state dict that can be read safely "
            f"({type(error).__name__}: {reason})."
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{path}: {_WEIGHTS} is not a state dict, which is tensors by name.")
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


# -- the archive -------------------------------------------------------------------------------------------------------


class _Bounded:
    """A file of which `most` bytes can be read, and little at once: `tarfile` allocates what a header declares."""

    def __init__(self, file: BufferedReader | gzip.GzipFile, most: int) -> None:
        self._file, self.most = file, most

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_READ:
            raise OSError(f"a header of it has {size} bytes; at most {_MOST_READ} are allowed")
        return self._file.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence == 0 and position > self.most:
            raise OSError(f"it ends before byte {position}, or has more than the {self.most} bytes that are allowed")
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, int]]:
    """The archive, and how many bytes it may have. Damage, wherever it is met, is a `CheckpointError`."""
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            most = min(max(size * _MOST_RATIO, _LEAST_LIMIT), 2 * _MOST_WEIGHTS) if compressed else size
            bounded: Any = _Bounded(gzip.GzipFile(fileobj=file) if compressed else file, most)
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                yield archive, most
    except CheckpointError:
        raise
    except (OSError, EOFError, ValueError, LookupError, tarfile.TarError, zlib.error, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as a .nemo checkpoint: {error}.") from error


def _members(path: Path, archive: tarfile.TarFile, most: int) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The regular files of an archive and their names without folders.

    Raises `CheckpointError` for what NeMo never writes: links, devices, FIFOs, sparse files, names that lead out of the
    folder, and two members of one name. NeMo reads the same archive when parity is measured, and extracts all of it.
    """
    seen: set[str] = set()
    for member in archive:
        where = f"{path} is not a checkpoint that NeMo wrote: its member {short_repr(member.name)}"
        if len(seen) >= _MOST_MEMBERS:
            raise CheckpointError(f"{path} has more than {_MOST_MEMBERS} members, so it is not a .nemo checkpoint.")
        if member.size < 0 or member.offset_data + member.size > most:
            raise CheckpointError(f"{where} has {member.size} bytes, more than the archive can hold.")
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
            raise CheckpointError(f"{where} is not inside the archive's folder.")
        if str(name) in seen:
            raise CheckpointError(f"{where} is there twice.")
        seen.add(str(name))
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise CheckpointError(f"{where} is a link, a device or a sparse file; only regular files are read.")
        yield member, name.name


def _content(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    _check_member(path, member, most)
    file = archive.extractfile(member)
    assert file is not None, "a regular file"
    content = b"".join(iter(lambda: file.read(MIB), b""))
    if len(content) != member.size:
        raise CheckpointError(f"{path} is truncated: it has not all of {short_repr(member.name)}.")
    return content


def _check_member(path: Path, member: tarfile.TarInfo, most: int) -> None:
    if member.size > most:
        raise CheckpointError(f"{path}: {short_repr(member.name)} has {member.size} bytes; at most {most} are allowed.")


def _unpack(path: Path, workdir: Path, tokenizer: str) -> dict[str, Path]:
    """Copy weights and tokenizer of an archive into a folder; nothing else of it reaches the disk.

    `tokenizer` is the name of the tokenizer's file; empty for the first that ends with "tokenizer.model". Returns the
    files by their name in the archive, without its folder. Of equal names in different folders the first counts.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    with _opened(path) as (archive, most):
        for member, name in _members(path, archive, most):
            is_tokenizer = name == tokenizer or (not tokenizer and name.endswith(_TOKENIZER))
            if name in found or not (name == _WEIGHTS or is_tokenizer):
                continue
            _check_member(path, member, _MOST_WEIGHTS if name == _WEIGHTS else _MOST_TOKENIZER)
            target = workdir / (_WEIGHTS if name == _WEIGHTS else f"tokenizer-{len(found)}.model")
            source = archive.extractfile(member)
            assert source is not None, "a regular file"
            with source, target.open("xb") as copy:
                shutil.copyfileobj(source, copy, MIB)
            if target.stat().st_size != member.size:
                raise CheckpointError(f"{path} is truncated: it has not all of {short_repr(member.name)}.")
            found[name] = target
    return found


# -- the configuration -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML's plain values only, of bounded depth, with few aliases: nine of them nested are a billion values."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._aliases = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            self._aliases += 1
            if self._aliases > _MOST_ALIASES:
                raise yaml.composer.ComposerError(None, None, f"it has more than {_MOST_ALIASES} aliases", None)
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {_MOST_DEPTH} deep", None)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _parse_config(path: Path, content: bytes) -> dict[str, Any]:
    """A configuration. Raises `CheckpointError` for anything but an object of plain values of bounded size."""
    try:
        config = yaml.load(content, _Loader)
        _check_size(config)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise CheckpointError(f"{path} cannot be read as a .nemo checkpoint: {_CONFIG}: {reason[:300]}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a .nemo checkpoint: its {_CONFIG} is no mapping of fields.")
    return config


def _check_size(config: Any, most: int = 1_000_000) -> None:
    """Raise `ValueError` for a configuration that aliases make larger than its text, or that contains itself."""
    waiting, count = [config], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > most:
            raise ValueError(f"it has more than {most} values")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def check_config(
    config: Mapping[str, Any],
) -> tuple[FeatureConfig, EncoderConfig, DecoderConfig, tuple[ChunkConfig, ...], dict[str, Any]]:
    """Read the sizes, refuse what is not supported. Raises `CheckpointError` naming the field and its value."""
    _expect(config, "target", ("EncDecRNNTBPEModel", "EncDecHybridRNNTCTCBPEModel"), cut=True)
    for field in ("loss.loss_name", "decoding.model_type"):
        _expect(config, field, ("rnnt", "default", "warprnnt_numba", "warprnnt", None), None)
    for field in ("model_defaults.tdt_durations", "decoding.durations", "model_defaults.initialize_prompt_feature"):
        _expect(config, field, (None, [], False), None)
    _expect(config, "adapters", (None, {}), None)
    features, log_guard = _features(config)
    encoder, chunks = _encoder(config, features)
    labels = _get(config, "joint.vocabulary", None)
    if labels is not None and not isinstance(labels, list):
        _refuse("joint.vocabulary", labels, "a list of tokens")
    vocabulary = len(labels) if labels else 0
    for field in ("decoder.vocab_size", "joint.num_classes"):
        if not vocabulary and (stated := _get(config, field, None)) is not None:
            vocabulary = max(_whole(config, field, stated, -1, 1 << 20), 0)
    if not 0 < vocabulary <= 1 << 20:
        _refuse("joint.num_classes", vocabulary, "a positive number of tokens")
    _expect(config, "decoder._target_", ("RNNTDecoder",), cut=True)
    _expect(config, "decoder.normalization_mode", (None,), None)
    _expect(config, "decoder.blank_as_pad", (True,), True)
    hidden = _whole(config, "decoder.prednet.pred_hidden", _REQUIRED, 1, 1 << 16)
    _expect(config, "decoder.prednet.rnn_hidden_size", (None, -1, 0, hidden), -1)
    _expect(config, "joint._target_", ("RNNTJoint",), cut=True)
    _expect(config, "joint.num_extra_outputs", (0, None), 0)
    _expect(config, "joint.jointnet.activation", ("relu", "sigmoid", "tanh"))
    _expect(config, "tokenizer.type", ("bpe",))
    decoder = DecoderConfig(
        layers=_whole(config, "decoder.prednet.pred_rnn_layers", 1, 1, 100),
        hidden=hidden,
        joint=_whole(config, "joint.jointnet.joint_hidden", _REQUIRED, 1, 1 << 16),
        vocabulary=vocabulary,
        max_symbols=_max_symbols(config),
        activation=_get(config, "joint.jointnet.activation"),
    )
    _expect(config, "encoder.xscaling", (True, False), True)
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
            if type(most) is not int or not 1 <= most <= 10_000:
                _refuse(field, most, "a number from 1 to 10000")
            return most
    _refuse("decoding.greedy.max_symbols", None, "a number; without one NeMo never stops at a frame")


def _features(config: Mapping[str, Any]) -> tuple[FeatureConfig, float]:
    _expect(config, "preprocessor._target_", ("AudioToMelSpectrogramPreprocessor",), cut=True)
    _expect(config, "preprocessor.normalize", ("NA", None), "per_feature")
    _expect(config, "preprocessor.window", ("hann",), "hann")
    _expect(config, "preprocessor.log", (True,), True)
    _expect(config, "preprocessor.log_zero_guard_type", ("add",), "add")
    _expect(config, "preprocessor.mag_power", (2.0,), 2.0)
    for field, value in (("exact_pad", False), ("frame_splicing", 1)):
        _expect(config, f"preprocessor.{field}", (value,), value)
    rate = _whole(config, "preprocessor.sample_rate", 16000, 1000, 384_000)
    guard = _number(config, "preprocessor.log_zero_guard_value", 2**-24, 0, 1)
    window = round(rate * _number(config, "preprocessor.window_size", 0.02, 0.001, 1))
    n_fft = 2 ** math.ceil(math.log2(max(window, 1)))
    if _get(config, "preprocessor.n_fft", None) is not None:
        n_fft = _whole(config, "preprocessor.n_fft", None, 0, 1 << 17) or n_fft
    preemphasis = 0.0
    if _get(config, "preprocessor.preemph", 0.97) is not None:
        preemphasis = _number(config, "preprocessor.preemph", 0.97, 0, 1)
    features = FeatureConfig(
        sample_rate=rate,
        mels=_whole(config, "preprocessor.features", 64, 1, 4096),
        window=window,
        hop=round(rate * _number(config, "preprocessor.window_stride", 0.01, 0.001, 1)),
        n_fft=n_fft,
        preemphasis=preemphasis,
    )
    if n_fft < window:
        _refuse("preprocessor.n_fft", n_fft, f"at least the window of {window} samples")
    if features.window % 2 or features.window <= features.hop:
        _refuse("preprocessor.window_size", features.window, "an even number of samples, more than the stride")
    return features, guard


def _encoder(config: Mapping[str, Any], features: FeatureConfig) -> tuple[EncoderConfig, tuple[ChunkConfig, ...]]:
    _expect(config, "encoder._target_", ("ConformerEncoder",), cut=True)
    _expect(config, "encoder.att_context_style", ("chunked_limited",), "regular")
    _expect(config, "encoder.subsampling", ("dw_striding",), "striding")
    _expect(config, "encoder.subsampling_factor", (4, 8), 4)
    _expect(config, "encoder.causal_downsampling", (True,), False)
    _expect(config, "encoder.self_attention_model", ("rel_pos",), "rel_pos")
    _expect(config, "encoder.conv_norm_type", ("layer_norm", "batch_norm"), "batch_norm")
    _expect(config, "encoder.conv_context_style", ("regular",), "regular")
    _expect(config, "encoder.reduction", (None,), None)
    d_model = _whole(config, "encoder.d_model", _REQUIRED, 1, 1 << 16)
    kernel = _whole(config, "encoder.conv_kernel_size", 31, 1, 4096)
    heads = _whole(config, "encoder.n_heads", 4, 1, 1024)
    if d_model % heads:
        _refuse("encoder.d_model", d_model, f"a multiple of n_heads, which is {heads}")
    _expect(config, "encoder.feat_out", (None, -1, 0, d_model), -1)
    _expect(config, "encoder.feat_in", (features.mels,))
    _expect(config, "encoder.conv_context_size", ("causal", [kernel - 1, 0]), None)
    factor = _get(config, "encoder.subsampling_factor", 4)
    frame_ms = 1000 * factor * features.hop / features.sample_rate
    contexts = _get(config, "encoder.att_context_size")
    if isinstance(contexts, list) and contexts and type(contexts[0]) is int:
        contexts = [contexts]
    if not isinstance(contexts, list) or not 0 < len(contexts) <= 64:
        _refuse("encoder.att_context_size", contexts, "a list of [left, right] pairs")
    chunks: dict[int, ChunkConfig] = {}
    for pair in contexts:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(size) is not int for size in pair):
            _refuse("encoder.att_context_size", pair, "[left, right] pairs of whole numbers")
        left, right = pair
        frames = right + 1
        if not 1 <= left <= 1 << 16 or not 0 <= right < 10_000 or left % frames:
            _refuse("encoder.att_context_size", [left, right], "limited contexts with left a multiple of right + 1")
        ms = round(frames * frame_ms)
        if ms in chunks:
            _refuse("encoder.att_context_size", contexts, "one left context per chunk size")
        chunks[ms] = ChunkConfig(ms, frames, left, frames * factor * features.hop)
    encoder = EncoderConfig(
        layers=_whole(config, "encoder.n_layers", _REQUIRED, 1, 1000),
        d_model=d_model,
        heads=heads,
        subsampling=factor,
        cache=max(chunk.left for chunk in chunks.values()),
        conv_cache=kernel - 1,
    )
    return encoder, tuple(sorted(chunks.values(), key=lambda chunk: chunk.ms))


def _tokenizer_name(config: Mapping[str, Any]) -> str:
    """The name of the tokenizer's file in the archive; empty if the configuration does not state it."""
    wanted = _get(config, "tokenizer.model_path", None)
    if wanted is None:
        return ""
    if not isinstance(wanted, str):
        _refuse("tokenizer.model_path", wanted, "the name of a file")
    return wanted.removeprefix("nemo:")


def _tokenizer(config: Mapping[str, Any], found: Mapping[str, Path]) -> Path:
    for name, file in found.items():
        if name != _WEIGHTS:
            return file
    wanted = _tokenizer_name(config)
    raise CheckpointError(f"the checkpoint does not hold its SentencePiece model (tokenizer.model_path is {wanted!r}).")


def _whole(config: Mapping[str, Any], path: str, default: Any, least: int, most: int) -> int:
    """A whole number of the configuration, or `default` if it has none. Raises `CheckpointError` for another value."""
    value = _get(config, path, default)
    if type(value) is not int or not least <= value <= most:
        _refuse(path, value, f"a whole number from {least} to {most}")
    return value


def _number(config: Mapping[str, Any], path: str, default: float, least: float, most: float) -> float:
    """As `_whole`, for any finite number."""
    value = _get(config, path, default)
    if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):
        _refuse(path, value, f"a number from {least:g} to {most:g}")
    return float(value)


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
    raise CheckpointError(f"not supported: {path} is {short_repr(value, 300)}; nemostream supports {supported}.")
