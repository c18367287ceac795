"""The contract between the folders: what a bundle holds and what the numbers in it mean.

`export` writes a bundle, `engine` and `runtime` read it; none of them imports another, all of them import this.
A bundle is a folder::

    manifest.json            this module's `Manifest`
    weights.bin              every weight of every graph, once
    features-{ms}ms.onnx     PCM -> log-mel, one graph per chunk size
    encoder-{ms}ms.onnx      the encoder step, one graph per chunk size
    decoder.onnx             prediction net: one LSTM step
    joint.onnx               joint: logits of one (frame, prediction) pair
    tokenizer.model          SentencePiece

Shape letters used all over the project: B batch row, T encoder frames of a step, F mel frames, M mel bins, N samples,
L encoder layer, C cached frames (the ring), D model width, K cached convolution frames, P prediction-net width,
R prediction-net layer, J joint width, V vocabulary with blank.

Time. An encoder frame lasts `samples_per_frame` samples (1280, 80 ms). A stream's frame i is aligned with mel frame
8i, centred on sample 1280i (offline-aligned, as NeMo's own streaming script and Hugging Face). Step k of a stream
consumes the samples [1280Tk - lead, 1280T(k+1) - lead), so a stream's audio starts with `lead` samples of silence
that are not part of it, and every step eats exactly 1280T samples whatever its number.

What the module does not know: ONNX, torch, devices, files other than the manifest and its hashes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import BackendError, BundleError, OptionError
from nemostream.external_data import external_files
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
VERSION = 2
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 * MIB
MAX_GRAPH_BYTES = 2048 * MIB  # protobuf's own limit


@dataclass(frozen=True)
class FeatureConfig:
    """The mel front end (NeMo `AudioToMelSpectrogramPreprocessor`, `normalize: NA`)."""

    sample_rate: int  # Hz
    mels: int  # M
    window: int  # samples, 400
    hop: int  # samples, 160
    n_fft: int
    preemphasis: float

    @property
    def tail(self) -> int:
        """Samples of old audio a step needs before its new ones: 239 for a 400/160 front end.

        Mel frame t reads samples [hop*t - window/2, hop*t + window/2 - 2] (the Hann window's ends are zero and
        pre-emphasis reaches one sample back); consecutive frames are `hop` apart.
        """
        return self.window - 1 - self.hop


@dataclass(frozen=True)
class EncoderConfig:
    """The cache-aware FastConformer's sizes, as far as whoever keeps its state must know them."""

    layers: int  # L
    d_model: int  # D
    heads: int
    subsampling: int  # mel frames per encoder frame, 8
    cache: int  # C: encoder frames kept of K and V, a ring
    conv_cache: int  # K: frames kept of the depthwise convolution's input

    @property
    def mel_cache(self) -> int:
        """Mel frames of history a step needs (NeMo's `pre_encode_cache_size`): 9."""
        return self.subsampling + 1


@dataclass(frozen=True)
class DecoderConfig:
    """Prediction net and joint."""

    layers: int  # R
    hidden: int  # P
    joint: int  # J
    vocabulary: int  # without blank; blank is the last id
    max_symbols: int  # per encoder frame
    activation: str  # of the joint: "relu", "sigmoid" or "tanh"

    @property
    def blank(self) -> int:
        return self.vocabulary


@dataclass(frozen=True)
class ChunkConfig:
    """One chunk size the model was trained for."""

    ms: int
    frames: int  # T: encoder frames per step
    left: int  # encoder frames of attention context before the chunk
    samples: int  # new samples per step


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int | str, ...]  # a name marks a free axis ("B")


@dataclass(frozen=True)
class Weight:
    """Where in `weights.bin` an array lies, for who computes with it outside the graphs (the GPU runtime's kernels)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes


@dataclass(frozen=True)
class Graph:
    file: str
    sha256: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class File:
    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says of itself. `Manifest.load` checks it, `Bundle.verify` checks the files against it."""

    name: str
    features: FeatureConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    chunks: tuple[ChunkConfig, ...]
    graphs: Mapping[str, Graph]  # "features-80ms", "encoder-80ms", ..., "decoder", "joint"
    weights: File
    tensors: Mapping[str, Weight]  # of front end, prediction net and joint, by name
    tokenizer: File
    checkpoint: Mapping[str, Any] = field(default_factory=dict)  # source, sha256, config excerpt
    parity: Mapping[str, Any] = field(default_factory=dict)  # measured while exporting, per chunk size
    versions: Mapping[str, str] = field(default_factory=dict)  # libraries that made the bundle

    # -- time ------------------------------------------------------------------------------------------------------

    @property
    def samples_per_frame(self) -> int:
        return self.features.hop * self.encoder.subsampling

    @property
    def lead(self) -> int:
        """Silent samples before a stream's first one, so that every step eats the same number (1081)."""
        return self.samples_per_frame - (self.features.window // 2 - 1)

    def mel_frames(self, samples: int) -> int:
        """Mel frames NeMo computes for a recording of so many samples (`FilterbankFeatures.get_seq_len`)."""
        return max(samples, 0) // self.features.hop

    def encoder_frames(self, samples: int) -> int:
        """Encoder frames NeMo's offline forward emits for a recording of so many samples.

        Each stride-2 convolution with NeMo's causal padding makes n // 2 + 1 of n frames
        (`nemo/collections/asr/parts/submodules/subsampling.py`). Under one mel frame of audio there is nothing to say.
        """
        frames = self.mel_frames(samples)
        if frames == 0:
            return 0
        for _ in range(self.encoder.subsampling.bit_length() - 1):
            frames = frames // 2 + 1
        return frames

    def seconds(self, frame: int) -> float:
        """Where encoder frame `frame` stands in the stream's audio, in seconds."""
        return frame * self.samples_per_frame / self.features.sample_rate

    def chunk(self, ms: int) -> ChunkConfig:
        """The chunk of `ms` milliseconds; `OptionError` names the ones there are."""
        for chunk in self.chunks:
            if chunk.ms == ms:
                return chunk
        known = ", ".join(str(chunk.ms) for chunk in self.chunks)
        raise OptionError(f"chunk size {ms!r} ms is not one this model was trained for; choose one of {known}.")

    # -- the file --------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and check a manifest. Raises `BundleError` naming the field that is wrong."""
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
        if type(version) is not int or version != VERSION:
            raise BundleError(
                f"{where} is a bundle of version {short_repr(version)}, this nemostream reads version {VERSION}; "
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


# -- what a manifest may say -------------------------------------------------------------------------------------------

_NAME = text(r".{1,500}", "a printable text of 1 to 500 characters")
_AXIS = text(r"[A-Za-z_]\w{0,63}", "the name of an axis or a positive number")
_DIMENSION = integer(1, 1 << 24)
_MOST_BYTES = 1 << 42  # of any file
_MOST_STATE = 1 << 28  # values of one stream's caches; the 0.6B model has 3.6 million
_INPUTS = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
# Numpy reads these from a file as they are; an object's would be taken for addresses.
_WEIGHTS = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def _axis(value: Any, name: str) -> int | str:
    return _AXIS(value, name) if isinstance(value, str) else _DIMENSION(value, name)


def _parity(value: Any, name: str) -> dict[str, Any]:
    """Differences from NeMo: numbers, or for a chunk size an object of numbers."""
    figure = number(0, 1e12)
    return {
        key: mapping_of(figure)(entry, f"{name}.{key}") if isinstance(entry, dict) else figure(entry, f"{name}.{key}")
        for key, entry in mapping(value, name).items()
    }


_FILE = dataclass_of(File, file=relative_name, sha256=SHA256, bytes=integer(1, _MOST_BYTES))
_TENSORS = list_of(
    dataclass_of(Tensor, name=_NAME, dtype=one_of(*_INPUTS), shape=list_of(_axis, 0, 8)),
    most=10_000,
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
        dataclass_of(Weight, dtype=one_of(*_WEIGHTS), shape=list_of(_DIMENSION, 0, 8), offset=integer(0, _MOST_BYTES))
    ),
    "tokenizer": _FILE,
    "checkpoint": mapping,
    "parity": _parity,
    "versions": mapping_of(text()),
}


def _check_sizes(manifest: Manifest) -> None:
    """Raise `ValueError` unless the numbers of a manifest go together."""
    front, encoder = manifest.features, manifest.encoder
    if front.window % 2 or not front.hop < front.window <= front.n_fft:
        raise invalid("features.window", front.window, "even, larger than hop and at most n_fft")
    if encoder.d_model % encoder.heads:
        raise invalid("encoder.d_model", encoder.d_model, f"a multiple of heads, which is {encoder.heads}")
    state = encoder.layers * encoder.d_model * (2 * encoder.cache + encoder.conv_cache)
    if state > _MOST_STATE:
        raise ValueError(f"its caches have {state} values for each stream; at most {_MOST_STATE} are allowed")
    if not 0 <= manifest.lead < manifest.samples_per_frame:
        raise invalid("features.window", front.window, f"at most {2 * manifest.samples_per_frame} samples, two frames")
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
    """Raise `ValueError` unless there are all graphs, of inputs and outputs that can be allocated."""
    wanted = {f"{kind}-{chunk.ms}ms" for chunk in manifest.chunks for kind in ("features", "encoder")}
    wanted |= {"decoder", "joint"}
    if missing := sorted(wanted - manifest.graphs.keys()):
        raise ValueError(f"it has no graph '{missing[0]}'")
    for name, graph in manifest.graphs.items():
        for tensor in (*graph.inputs, *graph.outputs):
            if prod(axis for axis in tensor.shape if isinstance(axis, int)) > _MOST_STATE:
                raise invalid(
                    f"graphs.{short_repr(name)[1:-1]}: the shape of {tensor.name}", list(tensor.shape), "smaller"
                )


def _check_tensors(manifest: Manifest) -> None:
    """Raise `ValueError` unless every weight lies within `weights.bin`, and those known by name have their shape."""
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
            raise invalid(f"{where}.shape", list(weight.shape), f"{list(expected)}, by the sizes of the model")
        end = weight.offset + prod(weight.shape) * np.dtype(weight.dtype).itemsize
        if end > manifest.weights.bytes:
            raise ValueError(
                f"{where} ends at byte {end} of {short_repr(manifest.weights.file)}, which has {manifest.weights.bytes}"
            )


@dataclass(frozen=True)
class Bundle:
    """A folder with its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Bundle:
        """Read the manifest in `path` and check every file against its hash.

        Raises `BundleError` for a folder that is no bundle, one of another version, or a missing or damaged file.
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
        """Raise `BundleError` naming the first file that is missing or is not the one that was exported.

        A graph is also refused if it reads weights from another file than the bundle's; one that is no graph is a
        `BackendError`.
        """
        manifest = self.manifest
        entries: list[Graph | File] = [*manifest.graphs.values(), manifest.tokenizer, manifest.weights]
        for entry in entries:
            file = self._inside(entry.file)
            size = file.stat().st_size
            if isinstance(entry, File) and size != entry.bytes:
                raise BundleError(
                    f"{file} is damaged (it has {size} bytes, not the manifest's {entry.bytes}); "
                    "copy or export it again."
                )
            if sha256(file) != entry.sha256:
                raise BundleError(f"{file} is damaged (its hash is not the manifest's); copy or export it again.")
            if isinstance(entry, Graph):
                self._check_external_data(file)

    def weight(self, name: str) -> NDArray[Any]:
        """One of the manifest's `tensors`, mapped from the file, read-only. Raises `BundleError` if there is none."""
        try:
            where = self.manifest.tensors[name]
        except KeyError as error:
            raise BundleError(f"{self.path} has no tensor '{name}'; export the checkpoint again.") from error
        file = self._inside(self.manifest.weights.file)
        return np.memmap(file, where.dtype, "r", where.offset, where.shape)

    def file(self, graph: str) -> Path:
        """Path of a graph by its name in the manifest ("decoder"). Raises `BundleError` if there is none."""
        return self.path / self.graph(graph).file

    def graph(self, name: str) -> Graph:
        """A graph's description by its name. Raises `BundleError` if there is none."""
        try:
            return self.manifest.graphs[name]
        except KeyError as error:
            raise BundleError(f"{self.path} has no graph '{name}'; export the checkpoint again.") from error

    def _inside(self, name: str) -> Path:
        try:
            return regular_inside(self.path, name)
        except ValueError as error:
            found = self.path / name
            if not found.exists():
                raise BundleError(f"{found} is missing from the bundle; copy or export it again.") from error
            raise BundleError(
                f"{found} {error}; a bundle is a folder of its own files: copy them into it (cp --dereference)."
            ) from error

    def _check_external_data(self, graph: Path) -> None:
        try:
            names = external_files(read_regular(graph, MAX_GRAPH_BYTES))
        except (OSError, ValueError) as error:  # as if the library had met it, which it would
            raise BackendError(f"the runtime cannot load {graph}: {error}; export the checkpoint again.") from error
        if strange := sorted(names - {self.manifest.weights.file}):
            raise BundleError(
                f"{graph} reads weights from {short_repr(strange[0])}; a bundle's graphs read them from "
                f"{self.manifest.weights.file} only: export the checkpoint again."
            )


def sha256(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
