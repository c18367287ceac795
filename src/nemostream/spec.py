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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import BundleError, OptionError

FORMAT = "nemostream-bundle"
VERSION = 2
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Features:
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
class Encoder:
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
class Decoder:
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
class Chunk:
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
    features: Features
    encoder: Encoder
    decoder: Decoder
    chunks: tuple[Chunk, ...]
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

    def chunk(self, ms: int) -> Chunk:
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
        try:
            document = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{where} is not JSON ({error}); export the checkpoint again.") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BundleError(f"{where} is not a nemostream manifest: its 'format' is not '{FORMAT}'.")
        if document.get("version") != VERSION:
            raise BundleError(
                f"{where} is a bundle of version {document.get('version')!r}, this nemostream reads version {VERSION}; "
                "export the checkpoint again with this nemostream."
            )
        try:
            return cls(
                name=document["name"],
                features=Features(**document["features"]),
                encoder=Encoder(**document["encoder"]),
                decoder=Decoder(**document["decoder"]),
                chunks=tuple(Chunk(**chunk) for chunk in document["chunks"]),
                graphs={name: _graph(graph) for name, graph in document["graphs"].items()},
                weights=File(**document["weights"]),
                tensors={
                    name: Weight(weight["dtype"], tuple(weight["shape"]), weight["offset"])
                    for name, weight in document["tensors"].items()
                },
                tokenizer=File(**document["tokenizer"]),
                checkpoint=document["checkpoint"],
                parity=document["parity"],
                versions=document["versions"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{where} lacks or misnames a field ({error}); export the checkpoint again.") from error


def _graph(document: Mapping[str, Any]) -> Graph:
    inputs, outputs = (
        tuple(Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in document[side])
        for side in ("inputs", "outputs")
    )
    return Graph(document["file"], document["sha256"], inputs, outputs)


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
            text = (path / MANIFEST_NAME).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} has no readable {MANIFEST_NAME}, so it is not a bundle.") from error
        bundle = cls(path, Manifest.from_json(text, str(path / MANIFEST_NAME)))
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Raise `BundleError` naming the first file that is missing or is not the one that was exported."""
        manifest = self.manifest
        entries: list[Graph | File] = [*manifest.graphs.values(), manifest.tokenizer, manifest.weights]
        for entry in entries:
            file = self.path / entry.file
            if not file.is_file():
                raise BundleError(f"{file} is missing from the bundle; copy or export it again.")
            if sha256(file) != entry.sha256:
                raise BundleError(f"{file} is damaged (its hash is not the manifest's); copy or export it again.")

    def weight(self, name: str) -> NDArray[Any]:
        """One of the manifest's `tensors`, mapped from the file, read-only."""
        where = self.manifest.tensors[name]
        return np.memmap(self.path / self.manifest.weights.file, where.dtype, "r", where.offset, where.shape)

    def file(self, graph: str) -> Path:
        """Path of a graph by its name in the manifest ("decoder")."""
        return self.path / self.manifest.graphs[graph].file


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
