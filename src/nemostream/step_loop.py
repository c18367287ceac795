"""Reference implementation of the step loop: one recording through the step graphs, one stream, no batching.

This is the contract of the graphs in executable form: how a recording is cut into steps, and which output of a step
becomes which input of the next. The exporter's parity check, calibration and engine validation run on it; the runtime
does the same for many streams at once. `nemostream.bundle` defines the shape letters and the time axis.

This module does not depend on ONNX or devices: sessions are passed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest

Floats = NDArray[np.float32]


class GraphSession(Protocol):
    """The part of `onnxruntime.InferenceSession` that is used here."""

    def get_outputs(self) -> Sequence[Any]: ...

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> Sequence[Any]: ...


@dataclass(frozen=True)
class PaddedChunk:
    """The input of one step."""

    audio: Floats  # [S] samples, zero-padded after the end of the recording
    length: int  # samples that belong to the stream, its leading silence included; less than S in the last step
    position: int  # encoder frames before this step
    valid: int  # mel frames of the encoder's window (cache and new frames) before the end of the stream
    prompt: int = 0  # id of the language of this step, for prompted models


def padded_chunks(manifest: Manifest, chunk: ChunkConfig, audio: Floats) -> Iterator[PaddedChunk]:
    """Yield the steps of a recording [N], its end included.

    `manifest.lead` samples of silence precede the recording. The number of steps is the smallest that emits every
    encoder frame of NeMo's offline forward. Their language is the default one.
    """
    encoder, prompt = manifest.encoder, manifest.languages.prompt(None)
    steps = -(-manifest.encoder_frames(len(audio)) // chunk.frames)
    end = manifest.lead + len(audio)
    padded = np.zeros(max(steps * chunk.samples, end), np.float32)
    padded[manifest.lead : end] = audio
    for step in range(steps):
        position, start = step * chunk.frames, step * chunk.samples
        length = min(chunk.samples, max(end - start, 0))
        # The window starts at mel frame subsampling * (position - 2).
        valid = manifest.mel_frames(start + length - manifest.lead) - encoder.subsampling * (position - 2)
        valid = min(valid, encoder.mel_cache + encoder.subsampling * chunk.frames)
        yield PaddedChunk(padded[start : start + chunk.samples], length, position, valid, prompt)


def run_steps(
    manifest: Manifest,
    chunk: ChunkConfig,
    steps: Iterable[PaddedChunk],
    features: GraphSession,
    encoder: GraphSession,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Run a stream's steps through the features and encoder graphs; yield all outputs of both by name, B = 1."""
    inputs = manifest.graphs[f"encoder-{chunk.ms}ms"].inputs
    caches = {
        tensor.name: np.zeros([1 if axis == "B" else int(axis) for axis in tensor.shape], np.float32)
        for tensor in inputs
        if "cache" in tensor.name
    }
    prompted = any(tensor.name == "prompt" for tensor in inputs)
    tail = np.zeros((1, manifest.features.tail), np.float32)
    feature_names, encoder_names = _output_names(features), _output_names(encoder)
    for step in steps:
        audio = {"audio": step.audio[None], "audio_tail": tail, "lengths": np.array([step.length])}
        outputs = dict(zip(feature_names, features.run(feature_names, audio), strict=True))
        tail = outputs["audio_tail_next"]
        window = {"mel": outputs["mel"], "position": np.array([step.position]), "valid": np.array([step.valid])}
        if prompted:
            window["prompt"] = np.array([step.prompt])
        outputs |= zip(encoder_names, encoder.run(encoder_names, window | caches), strict=True)
        advance_caches(manifest, caches, outputs, step.position)
        yield outputs


def advance_caches(
    manifest: Manifest, caches: dict[str, Floats], outputs: Mapping[str, NDArray[Any]], position: int
) -> None:
    """Update an encoder's `caches` in place with the `outputs` of the step at `position`.

    The new rows of K and V replace the oldest rows of their rings: encoder frame i is row i modulo C.
    """
    ring = (position + np.arange(outputs["k_new"].shape[3])) % manifest.encoder.cache
    caches["mel_cache"] = outputs["mel_cache_next"]
    for layer in range(manifest.encoder.layers):
        caches[f"k_cache.{layer}"][:, :, ring] = outputs["k_new"][layer]
        caches[f"v_cache.{layer}"][:, :, ring] = outputs["v_new"][layer]
        caches[f"conv_cache.{layer}"] = outputs["conv_next"][layer]


def _output_names(session: GraphSession) -> list[str]:
    return [output.name for output in session.get_outputs()]
