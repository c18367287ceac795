"""Model bundles: file layout, manifest, and the definitions of shapes and times that all packages share.

`nemostream.export` writes bundles; `nemostream.engine` and `nemostream.runtime` read them. These packages import this
module, not each other. A bundle is a folder::

    manifest.json            this module's `Manifest`
    weights.bin              the weights of all graphs, each stored once
    features-{ms}ms.onnx     front end, PCM to log-mel: one graph per chunk size
    encoder-{ms}ms.onnx      encoder step: one graph per chunk size
    decoder.onnx             prediction network: one LSTM step
    joint.onnx               joint network: logits of one (frame, prediction) pair
    tokenizer.model          SentencePiece model

Shape letters in all docstrings: B batch rows, S samples of a step, N samples, F mel frames, M mel bins, T encoder
frames of a step, D encoder width, L encoder layers, C cached frames of K and V (the ring), K cached convolution frames,
P prediction-network width, R prediction-network layers, J joint width, V vocabulary with blank.

Time axis: an encoder frame lasts `samples_per_frame` samples (1280, 80 ms). Frame i of a stream is aligned with mel
frame 8i, which is centred on sample 1280i: the alignment of an offline forward, as in NeMo's streaming script and
Hugging Face. Step k consumes the samples [1280Tk - lead, 1280T(k+1) - lead), so `lead` samples of silence precede the
audio of a stream, and every step consumes exactly 1280T samples.

This module does not depend on ONNX, torch or devices.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import BackendError, BundleError, OptionError
from nemostream.external_data import external_files, initializer_shapes
from nemostream.untrusted import (
    MIB,
    SHA256,
    Check,
    dataclass_of,
    fields,
    integer,
    invalid,
    list_of,
    mapping,
    mapping_of,
    number,
    one_of,
    open_regular,
    parse_json,
    read_regular,
    regular_inside,
    relative_name,
    short_repr,
    text,
)

FORMAT = "nemostream-bundle"
VERSION = 3
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 * MIB
LANGUAGE_NAME = r"[A-Za-z]{2,20}([-_][A-Za-z0-9]{2,20}){0,3}"  # "de-DE"
MAX_GRAPH_BYTES = 2048 * MIB  # protobuf's own limit


@dataclass(frozen=True)
class FeatureConfig:
    """Mel front end (NeMo's `AudioToMelSpectrogramPreprocessor` with `normalize: NA`)."""

    sample_rate: int  # Hz
    mels: int  # M
    window: int  # samples, 400
    hop: int  # samples, 160
    n_fft: int
    preemphasis: float

    @property
    def tail(self) -> int:
        """Samples before the new ones that a step needs: 239 for a window of 400 and a hop of 160.

        Mel frame t reads the samples hop*t - window/2 to hop*t + window/2 - 2, both included: the ends of the Hann
        window are zero, and pre-emphasis reads one sample more before it. Consecutive frames are `hop` samples apart.
        """
        return self.window - 1 - self.hop


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the cache-aware FastConformer that define the state of a stream."""

    layers: int  # L
    d_model: int  # D
    heads: int
    subsampling: int  # mel frames per encoder frame, 8
    cache: int  # C: rows of the K and V rings, in encoder frames
    conv_cache: int  # K: cached input frames of the depthwise convolution

    @property
    def mel_cache(self) -> int:
        """Mel frames before the new ones that a step needs (NeMo's `pre_encode_cache_size`): 9."""
        return self.subsampling + 1


@dataclass(frozen=True)
class DecoderConfig:
    """Prediction network and joint."""

    layers: int  # R
    hidden: int  # P
    joint: int  # J
    vocabulary: int  # tokens without blank
    max_symbols: int  # per encoder frame
    activation: str  # of the joint: "relu", "sigmoid" or "tanh"

    @property
    def blank(self) -> int:
        """Id of blank, the last one."""
        return self.vocabulary


@dataclass(frozen=True)
class LanguageConfig:
    """Languages of a model. A prompted model has several, selected per stream by a prompt id."""

    default: str = "en"  # of a stream that sets none
    # Prompt id by name, in the checkpoint's spelling ("de-DE", "de", "auto"). Results report the first name of an id.
    # Empty for a model of one language.
    prompts: Mapping[str, int] = field(default_factory=dict)
    count: int = 0  # of prompt ids, 0 for a model of one language

    @cached_property
    def by_prompt(self) -> Mapping[int, str]:
        """The name of each prompt id; 0 is that of a model of one language."""
        names: dict[int, str] = {}
        for name, prompt in self.prompts.items():
            names.setdefault(prompt, name)
        return names or {0: self.default}

    @property
    def names(self) -> tuple[str, ...]:
        """The languages, one name each."""
        return tuple(self.by_prompt.values())

    def name(self, language: str | None) -> str:
        """Return the name of a language ("de" is "de-DE"); of the default for None.

        Case is ignored and "_" is read as "-". A language without a region that is not in `prompts` selects the first
        of its regions. Raises `OptionError` with suggestions if the model does not support the language.
        """
        if language is None:
            language = self.default
        if not isinstance(language, str):
            raise OptionError(f"language is {short_repr(language)}; it must be a text such as {self.names[0]!r}.")
        key = _language_key(language)
        if not self.prompts:
            if key.split("-")[0] == _language_key(self.default).split("-")[0]:
                return self.default
            raise OptionError(f"language is {short_repr(language)}; this model supports {self.default!r} only.")
        known = self._prompts_by_key
        found = known.get(key)
        if found is None:
            found = next((prompt for other, prompt in known.items() if other.startswith(f"{key}-")), None)
        if found is None:
            hint = self._hint(key)
            raise OptionError(f"language is {short_repr(language)}, which this model does not support; {hint}.")
        return self.by_prompt[found]

    def prompt(self, language: str | None) -> int:
        """Return the prompt id of a language, 0 for a model of one language. Raises `OptionError` as `name` does."""
        return self.prompts.get(self.name(language), 0)

    @cached_property
    def _prompts_by_key(self) -> Mapping[str, int]:
        prompts: dict[str, int] = {}
        for name, prompt in self.prompts.items():
            prompts.setdefault(_language_key(name), prompt)
        return prompts

    def _hint(self, key: str) -> str:
        names = {_language_key(name): name for name in self.names}
        related = [other for other in names if other.split("-")[0] == key.split("-")[0]]
        near = related or difflib.get_close_matches(key[:40], names, 3, 0.5)
        if near:
            return f"similar ones are {', '.join(names[other] for other in names if other in near)}"
        return f"choose one of {', '.join(sorted(names.values()))}"


def _language_key(name: str) -> str:
    """Return the form of a language's name that is compared: "de-de" for "de_DE"."""
    return name.replace("_", "-").lower()


@dataclass(frozen=True)
class ChunkConfig:
    """A chunk size that the model was trained for."""

    ms: int  # duration of a chunk
    frames: int  # T: encoder frames per step
    left: int  # encoder frames of attention context before the chunk
    samples: int  # S: new samples per step


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]  # a string names a dynamic axis ("B")


@dataclass(frozen=True)
class Weight:
    """Location of an array in `weights.bin`, for code that uses it outside the graphs (the GPU kernels)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class Graph:
    """An ONNX graph of the bundle."""

    file: str
    sha256: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class File:
    """A file of the bundle, or of an engine, with its SHA-256 and size."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Description of a bundle. `from_json` validates it; `Bundle.verify` compares the files with it."""

    name: str
    features: FeatureConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    chunks: tuple[ChunkConfig, ...]
    graphs: Mapping[str, Graph]  # "features-80ms", "encoder-80ms", ..., "decoder", "joint"
    weights: File
    tensors: Mapping[str, Weight]  # by name: front end, prediction network, joint
    tokenizer: File
    languages: LanguageConfig = field(default_factory=LanguageConfig)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)  # source, sha256, config excerpt
    parity: Mapping[str, Any] = field(default_factory=dict)  # reference, and largest differences from it
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries used for the export

    # -- time axis -----------------------------------------------------------------------------------------------------

    @property
    def samples_per_frame(self) -> int:
        """Samples per encoder frame (1280)."""
        return self.features.hop * self.encoder.subsampling

    @property
    def lead(self) -> int:
        """Samples of silence before the audio of a stream, so that all steps consume equally many samples (1081)."""
        return self.samples_per_frame - (self.features.window // 2 - 1)

    def mel_frames(self, samples: int) -> int:
        """Return the number of mel frames that NeMo computes for a recording (`FilterbankFeatures.get_seq_len`)."""
        return max(samples, 0) // self.features.hop

    def encoder_frames(self, samples: int) -> int:
        """Return the number of encoder frames of NeMo's offline forward for a recording.

        A stride-2 convolution with NeMo's causal padding turns n frames into n // 2 + 1
        (`nemo/collections/asr/parts/submodules/subsampling.py`). Without a whole mel frame there are none.
        """
        frames = self.mel_frames(samples)
        if frames == 0:
            return 0
        for _ in range(self.encoder.subsampling.bit_length() - 1):
            frames = frames // 2 + 1
        return frames

    def seconds(self, frame: int) -> float:
        """Return the position of an encoder frame in the audio of the stream, in seconds."""
        return frame * self.samples_per_frame / self.features.sample_rate

    def chunk(self, ms: int) -> ChunkConfig:
        """Return the chunk size of `ms` milliseconds. Raises `OptionError` listing the available ones."""
        for chunk in self.chunks:
            if chunk.ms == ms:
                return chunk
        known = ", ".join(str(chunk.ms) for chunk in self.chunks)
        raise OptionError(f"chunk size {ms!r} ms is not supported by this model; choose one of {known}.")

    # -- serialization -------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the content of `manifest.json`."""
        document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and validate a manifest. Raises `BundleError` naming the invalid field; `where` names the file."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{where} is larger than the limit of {MAX_MANIFEST_BYTES} bytes; export the checkpoint again."
            )
        try:
            document = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{where} is not JSON ({error}); export the checkpoint again.") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BundleError(f"{where} is not a nemostream manifest: its 'format' is not '{FORMAT}'.")
        version = document.get("version")
        if version == 2 and type(version) is int:  # the same, without languages
            document = {**document, "version": VERSION, "languages": dataclasses.asdict(LanguageConfig())}
            version = VERSION
        if type(version) is not int or version != VERSION:
            raise BundleError(
                f"{where} has bundle version {short_repr(version)}, but this nemostream reads version {VERSION}; "
                "export the checkpoint again with this nemostream."
            )
        try:
            manifest = cls(
                **fields({k: v for k, v in document.items() if k not in ("format", "version")}, "", _MANIFEST)
            )
            _check_sizes(manifest)
            _check_graphs(manifest)
            _check_tensors(manifest)
        except ValueError as error:
            raise BundleError(f"{where} is not a valid manifest: {error}; export the checkpoint again.") from error
        return manifest


# -- validation of a manifest ------------------------------------------------------------------------------------------

_NAME = text(r".{1,500}", "a printable text of 1 to 500 characters")
_AXIS = text(r"[A-Za-z_]\w{0,63}", "the name of an axis or a positive number")
_DIMENSION = integer(1, 1 << 24)
_LANGUAGE = text(LANGUAGE_NAME, "the name of a language, such as 'de-DE'")
_MAX_PROMPTS = 1 << 16
_MAX_FILE_BYTES = 1 << 42
_MAX_STATE = 1 << 28  # values in the caches of a stream; the 0.6B model has 3.6 million
_TENSOR_DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
# Types that NumPy can map from a file; the bytes of an object array would be used as addresses.
_WEIGHT_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def _axis(value: Any, name: str) -> int | str:
    """Accept the size of an axis, or the name of a dynamic one."""
    return _AXIS(value, name) if isinstance(value, str) else _DIMENSION(value, name)


def _parity(value: Any, name: str) -> dict[str, Any]:
    """Accept differences from the reference, a number each, or for a chunk size an object of numbers; and its name."""
    figure = number(0, 1e12)
    reference = text(r".{1,100}", "the name of an implementation, such as 'NeMo 3.0.0'")
    checks = {"reference": reference}
    return {
        key: checks.get(key, mapping_of(figure) if isinstance(entry, dict) else figure)(entry, f"{name}.{key}")
        for key, entry in mapping(value, name).items()
    }


_FILE = dataclass_of(File, file=relative_name, sha256=SHA256, bytes=integer(1, _MAX_FILE_BYTES))
_TENSORS = list_of(
    dataclass_of(Tensor, name=_NAME, dtype=one_of(*_TENSOR_DTYPES), shape=list_of(_axis, 0, 8)),
    max_length=10_000,
)
_MANIFEST: dict[str, Check] = {
    "name": _NAME,
    "features": dataclass_of(
        FeatureConfig,
        sample_rate=integer(1000, 384_000),
        mels=integer(1, 4096),
        window=integer(2, 1 << 16),
        hop=integer(1, 1 << 16),
        n_fft=integer(2, 1 << 17),
        preemphasis=number(0, 1),
    ),
    "encoder": dataclass_of(
        EncoderConfig,
        layers=integer(1, 1000),
        d_model=integer(1, 1 << 16),
        heads=integer(1, 1024),
        subsampling=one_of(1, 2, 4, 8, 16, 32),
        cache=integer(1, 1 << 16),
        conv_cache=integer(0, 4096),
    ),
    "decoder": dataclass_of(
        DecoderConfig,
        layers=integer(1, 100),
        hidden=integer(1, 1 << 16),
        joint=integer(1, 1 << 16),
        vocabulary=integer(1, 1 << 20),
        max_symbols=integer(1, 10_000),
        activation=one_of("relu", "sigmoid", "tanh"),
    ),
    "chunks": list_of(
        dataclass_of(
            ChunkConfig,
            ms=integer(1, 600_000),
            frames=integer(1, 10_000),
            left=integer(0, 1 << 16),
            samples=integer(1, 1 << 24),
        ),
        1,
        64,
    ),
    "graphs": mapping_of(dataclass_of(Graph, file=relative_name, sha256=SHA256, inputs=_TENSORS, outputs=_TENSORS)),
    "weights": _FILE,
    "tensors": mapping_of(
        dataclass_of(
            Weight, dtype=one_of(*_WEIGHT_DTYPES), shape=list_of(_DIMENSION, 0, 8), offset=integer(0, _MAX_FILE_BYTES)
        )
    ),
    "tokenizer": _FILE,
    "languages": dataclass_of(
        LanguageConfig,
        default=_LANGUAGE,
        prompts=mapping_of(integer(0, _MAX_PROMPTS - 1)),
        count=integer(0, _MAX_PROMPTS),
    ),
    "checkpoint": mapping,
    "parity": _parity,
    "versions": mapping_of(text()),
}


def _check_sizes(manifest: Manifest) -> None:
    """Raise `ValueError` if sizes of the model contradict each other."""
    front, encoder = manifest.features, manifest.encoder
    if front.window % 2 or not front.hop < front.window <= front.n_fft:
        raise invalid("features.window", front.window, "even, larger than hop and at most n_fft")
    if encoder.d_model % encoder.heads:
        raise invalid("encoder.d_model", encoder.d_model, f"a multiple of heads, which is {encoder.heads}")
    state = encoder.layers * encoder.d_model * (2 * encoder.cache + encoder.conv_cache)
    if state > _MAX_STATE:
        raise ValueError(f"its caches have {state} values for each stream; at most {_MAX_STATE} are allowed")
    if not 0 <= manifest.lead < manifest.samples_per_frame:
        raise invalid("features.window", front.window, f"at most {2 * manifest.samples_per_frame} samples, two frames")
    languages = manifest.languages
    for name, prompt in languages.prompts.items():
        _LANGUAGE(name, "languages.prompts")
        if prompt >= languages.count:
            raise invalid(f"languages.prompts.{name}", prompt, f"less than languages.count, which is {languages.count}")
    if bool(languages.prompts) != bool(languages.count) or (
        languages.prompts and languages.default not in languages.prompts
    ):
        raise invalid("languages.default", languages.default, "one of languages.prompts")
    seen: set[int] = set()
    for index, chunk in enumerate(manifest.chunks):
        name = f"chunks[{index}]"
        if chunk.ms in seen:
            raise invalid(f"{name}.ms", chunk.ms, "different from the other chunks'")
        seen.add(chunk.ms)
        if chunk.samples != chunk.frames * manifest.samples_per_frame:
            raise invalid(f"{name}.samples", chunk.samples, f"frames times {manifest.samples_per_frame}")
        if chunk.ms != round(1000 * chunk.samples / front.sample_rate):
            raise invalid(f"{name}.ms", chunk.ms, f"the duration of {chunk.samples} samples")
        if chunk.left > encoder.cache:
            raise invalid(f"{name}.left", chunk.left, f"at most encoder.cache, which is {encoder.cache}")


def _check_graphs(manifest: Manifest) -> None:
    """Raise `ValueError` if a graph or its prompt input is missing, or one of its tensors is too large to allocate."""
    required = {f"{kind}-{chunk.ms}ms" for chunk in manifest.chunks for kind in ("features", "encoder")}
    required |= {"decoder", "joint"}
    if missing := sorted(required - manifest.graphs.keys()):
        raise ValueError(f"it has no graph '{missing[0]}'")
    for name in (f"encoder-{chunk.ms}ms" for chunk in manifest.chunks):
        prompted = any(tensor.name == "prompt" for tensor in manifest.graphs[name].inputs)
        if prompted != bool(manifest.languages.count):
            state = f"{'an' if prompted else 'no'} input 'prompt'"
            raise ValueError(f"graph '{name}' has {state}, but languages.count is {manifest.languages.count}")
    for name, graph in manifest.graphs.items():
        for tensor in (*graph.inputs, *graph.outputs):
            if prod(axis for axis in tensor.shape if isinstance(axis, int)) > _MAX_STATE:
                raise invalid(
                    f"graphs.{short_repr(name)[1:-1]}: the shape of {tensor.name}", list(tensor.shape), "smaller"
                )


def _check_tensors(manifest: Manifest) -> None:
    """Raise `ValueError` if a weight is outside `weights.bin`, or a known one does not have the model's shape."""
    net, front = manifest.decoder, manifest.features
    known: dict[str, tuple[int, ...]] = {
        "features.filters": (front.n_fft // 2 + 1, front.mels),
        "decoder.embedding": (net.vocabulary + 1, net.hidden),
        "joint.pred.weight": (net.hidden, net.joint),
        "joint.pred.bias": (net.joint,),
        "joint.enc.weight": (manifest.encoder.d_model, net.joint),
        "joint.enc.bias": (net.joint,),
        "joint.out.weight": (net.joint, net.vocabulary + 1),
        "joint.out.bias": (net.vocabulary + 1,),
    }
    for layer in range(net.layers):
        known[f"decoder.lstm.{layer}.weight"] = (2 * net.hidden, 4 * net.hidden)
        known[f"decoder.lstm.{layer}.bias"] = (4 * net.hidden,)
    for name, weight in manifest.tensors.items():
        where = f"tensors.{short_repr(name)[1:-1]}"
        if weight.shape != (expected := known.get(name, weight.shape)):
            raise invalid(f"{where}.shape", list(weight.shape), f"{list(expected)}, given the sizes of the model")
        end = weight.offset + prod(weight.shape) * np.dtype(weight.dtype).itemsize
        if end > manifest.weights.bytes:
            raise ValueError(
                f"{where} ends at byte {end} of {short_repr(manifest.weights.file)}, of {manifest.weights.bytes} bytes"
            )


@dataclass(frozen=True)
class Bundle:
    """A bundle folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Open the bundle folder `path`; with `verify`, compare every file with its hash.

        Raises `BundleError` if the folder is not a bundle, its version is not supported, or a file is missing or
        damaged.
        """
        path = Path(path)
        if not path.is_dir():
            raise BundleError(f"{path} is not a folder; give the folder that `nemostream export` wrote.")
        try:
            regular_inside(path, MANIFEST_NAME)
            content = read_regular(path / MANIFEST_NAME, MAX_MANIFEST_BYTES).decode()
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise BundleError(f"{path} has no readable {MANIFEST_NAME} ({error}), so it is not a bundle.") from error
        bundle = cls(path, Manifest.from_json(content, str(path / MANIFEST_NAME)))
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Raise `BundleError` naming the first file that is missing, or differs from the exported one.

        Graphs must read their weights from the bundle's weights file. Raises `BackendError` for a graph that is not a
        serialized ONNX model.
        """
        manifest = self.manifest
        entries: list[Graph | File] = [*manifest.graphs.values(), manifest.tokenizer, manifest.weights]
        for entry in entries:
            file = self._inside(entry.file)
            size = file.stat().st_size
            if isinstance(entry, File) and size != entry.bytes:
                raise BundleError(
                    f"{file} is damaged (it has {size} bytes; the manifest states {entry.bytes}); "
                    "copy or export it again."
                )
            if sha256(file) != entry.sha256:
                raise BundleError(f"{file} is damaged (its hash differs from the manifest); copy or export it again.")
            if isinstance(entry, Graph):
                self._check_external_data(file)

    def weight(self, name: str) -> NDArray[Any]:
        """Return a tensor of the manifest, memory-mapped read-only. Raises `BundleError` if it does not exist."""
        try:
            weight = self.manifest.tensors[name]
        except KeyError as error:
            raise BundleError(f"{self.path} has no tensor '{name}'; export the checkpoint again.") from error
        file = self._inside(self.manifest.weights.file)
        return np.memmap(file, weight.dtype, "r", weight.offset, weight.shape)

    def weight_shapes(self, graph: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight of a graph, by name. Raises `BundleError` if the graph cannot be read."""
        path = self.file(graph)
        try:
            return initializer_shapes(read_regular(path, MAX_GRAPH_BYTES))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read ({error}); copy or export it again.") from error

    def file(self, graph: str) -> Path:
        """Return the path of a graph by its name ("decoder"). Raises `BundleError` if it does not exist."""
        return self.path / self.graph(graph).file

    def graph(self, name: str) -> Graph:
        """Return the description of a graph by its name. Raises `BundleError` if it does not exist."""
        try:
            return self.manifest.graphs[name]
        except KeyError as error:
            raise BundleError(f"{self.path} has no graph '{name}'; export the checkpoint again.") from error

    def _inside(self, name: str) -> Path:
        try:
            return regular_inside(self.path, name)
        except ValueError as error:
            path = self.path / name
            if not path.exists():
                raise BundleError(f"{path} is missing from the bundle; copy or export it again.") from error
            raise BundleError(
                f"{path} {error}; files of a bundle must be inside its folder: copy them into it (cp --dereference)."
            ) from error

    def _check_external_data(self, graph: Path) -> None:
        try:
            names = external_files(read_regular(graph, MAX_GRAPH_BYTES))
        except (OSError, ValueError) as error:  # the error that loading the graph would raise
            raise BackendError(f"the runtime cannot load {graph}: {error}; export the checkpoint again.") from error
        if others := sorted(names - {self.manifest.weights.file}):
            raise BundleError(
                f"{graph} reads weights from {short_repr(others[0])}; the graphs of a bundle may read them only from "
                f"{self.manifest.weights.file}: export the checkpoint again."
            )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
