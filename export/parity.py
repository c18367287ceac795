"""Compare the exported graphs with a reference on recorded speech. A bundle is written only if they agree.

The reference is the *offline* forward of the whole clip with the attention mask of the chunk size
(`nemostream.export.reference`). A correct stream reproduces it frame by frame, first and last chunk included. Features
are computed in fp64, because NeMo's fp32 FFT has errors of up to 2e-4 in quiet bins; the same features are the input of
the reference's encoder.

In a stream of a prompted model the prompt id changes with every step, so that one pass per chunk size covers as many
ids as it has steps, the default and `auto` first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.clips import read_clip
from nemostream.errors import ParityError
from nemostream.export.reference import Reference, log_softmax
from nemostream.step_loop import padded_chunks, run_steps

# Largest absolute difference in fp32. Outputs of a linear layer have no normalisation: if their largest value exceeds
# 10, the tolerance grows in proportion, because rounding errors of a sum are relative to its terms.
TOLERANCE = 1e-4
LARGE_VALUE = 10.0
MIN_STEPS = 12

Floats = NDArray[np.float32]


def measure_parity(bundle: Bundle, reference: Reference, progress: Callable[[str], None]) -> Manifest:
    """Return the manifest with the reference, and the measured differences from it.

    `progress` is called with a message before each comparison. Raises `ParityError` naming the graph, frame and step
    that differ by more than the tolerance.
    """
    manifest, library = bundle.manifest, reference.library
    if reference.prompts != manifest.languages.count:
        raise ParityError(
            f"the bundle has {manifest.languages.count} prompt ids, but the model in {library} has "
            f"{reference.prompts}; the bundle was not written."
        )
    audio = _test_audio(manifest)
    figures: dict[str, Any] = {
        "reference": f"{library} {reference.version}".strip(),
        "audio_seconds": round(len(audio) / manifest.features.sample_rate, 2),
    }
    prompts = prompt_order(manifest)
    mel = reference.features(audio)
    for chunk in manifest.chunks:
        progress(f"comparing {chunk.ms} ms with {library}")
        wanted = reference.encode(mel, chunk)
        got = _run_stream(bundle, chunk, audio, prompts)
        if prompts:
            wanted = reference.apply_prompt(wanted, _repeat(prompts, len(wanted), chunk.frames))
        projected = reference.project(wanted)
        encoder_tolerance = _tolerance(wanted) if prompts else TOLERANCE  # otherwise it is a layer norm's output
        new_mels = chunk.frames * manifest.encoder.subsampling
        figures[f"{chunk.ms}ms"] = {
            "steps": got.steps,
            "features": _compare(f"features-{chunk.ms}ms", got.mel, mel, new_mels, library),
            "encoder": _compare(f"encoder-{chunk.ms}ms", got.encoded, wanted, chunk.frames, library, encoder_tolerance),
            "projection": _compare(
                f"encoder-{chunk.ms}ms", got.projected, projected, chunk.frames, library, _tolerance(projected)
            ),
        } | ({"prompts": min(got.steps, len(prompts))} if prompts else {})
    progress(f"comparing prediction network and joint with {library}")
    figures |= _compare_decoder(bundle, reference, projected)
    return dataclasses.replace(manifest, parity=figures)


def stream_encoder(bundle: Bundle, chunk: ChunkConfig, audio: Floats) -> tuple[Floats, Floats, int]:
    """Run a recording [N] through the graphs; return mel frames [F, M], encoder frames [T, D] and number of steps."""
    outputs = _run_stream(bundle, chunk, audio, ())
    return outputs.mel, outputs.encoded, outputs.steps


@dataclass(frozen=True)
class _Outputs:
    """The outputs of all steps of a recording."""

    mel: Floats  # [F, M]
    encoded: Floats  # [T, D]
    projected: Floats  # [T, J]
    steps: int


def _run_stream(bundle: Bundle, chunk: ChunkConfig, audio: Floats, prompts: Sequence[int]) -> _Outputs:
    """Run a recording [N] through the graphs.

    Step k has the k-th of the prompt ids, which repeat; without any, all steps have that of the default language.
    """
    manifest = bundle.manifest
    features, encoder = (_session(bundle, f"{kind}-{chunk.ms}ms") for kind in ("features", "encoder"))
    steps = list(padded_chunks(manifest, chunk, audio))
    if prompts:
        steps = [dataclasses.replace(step, prompt=prompts[k % len(prompts)]) for k, step in enumerate(steps)]
    outputs = list(run_steps(manifest, chunk, steps, features, encoder))
    mel, encoded, projected = (
        np.concatenate([output[name][0] for output in outputs]) for name in ("mel", "encoded", "encoded_joint")
    )
    frames = manifest.encoder_frames(len(audio))
    # The first step's window begins 7 frames (of 8) before the stream.
    mel = mel[manifest.encoder.subsampling - 1 :][: manifest.mel_frames(len(audio))]
    return _Outputs(mel, encoded[:frames], projected[:frames], len(outputs))


def prompt_order(manifest: Manifest) -> list[int]:
    """Return the prompt ids that have a name, that of the default language and of `auto` first."""
    languages = manifest.languages
    first = [languages.default, *(["auto"] if "auto" in languages.prompts else [])]
    return (
        list(dict.fromkeys(languages.prompts[name] for name in [*first, *languages.names])) if languages.count else []
    )


def _repeat(prompts: Sequence[int], frames: int, frames_per_step: int) -> NDArray[np.int64]:
    """Return the prompt id of each encoder frame [T]."""
    return np.array(prompts, np.int64)[np.arange(frames) // frames_per_step % len(prompts)]


def _test_audio(manifest: Manifest) -> Floats:
    """Return recorded speech [N] of at least `MIN_STEPS` steps of the longest chunk, repeated if necessary."""
    audio = read_clip("speech", manifest.features.sample_rate)
    needed = MIN_STEPS * max(chunk.samples for chunk in manifest.chunks)
    return np.tile(audio, -(-needed // len(audio)))


def _compare_decoder(bundle: Bundle, reference: Reference, projected: NDArray[Any]) -> dict[str, float]:
    """Run blank and 12 random tokens through the prediction network, and join each prediction with an encoder frame."""
    spec = bundle.manifest.decoder
    decoder, joint = _session(bundle, "decoder"), _session(bundle, "joint")
    tokens = [spec.blank, *np.random.default_rng(0).integers(0, spec.vocabulary, MIN_STEPS).tolist()]
    h = c = np.zeros((1, spec.layers, spec.hidden), np.float32)
    predictions = []
    for token in tokens:
        predicted, h, c = decoder.run(["predicted", "h_next", "c_next"], {"token": np.array([token]), "h": h, "c": c})
        predictions.append(predicted[0])
    predicted = np.stack(predictions)
    wanted_predicted = reference.predict(tokens)
    frames = projected[np.arange(len(tokens)) % len(projected)]
    (logits,) = joint.run(["logits"], {"encoded_joint": frames.astype(np.float32), "predicted": predicted})
    wanted = reference.join(frames, wanted_predicted)
    return {
        "decoder": _compare("decoder", predicted, wanted_predicted, 1, reference.library),
        "joint": _compare("joint", log_softmax(logits), wanted, 1, reference.library, _tolerance(wanted)),
    }


def _tolerance(wanted: NDArray[Any]) -> float:
    """Return the tolerance for the output of a linear layer."""
    return TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0.0)) / LARGE_VALUE)


def _compare(
    graph: str,
    got: NDArray[Any],
    wanted: NDArray[Any],
    frames_per_step: int,
    library: str,
    tolerance: float = TOLERANCE,
) -> float:
    """Return the largest absolute difference. Raises `ParityError` if it exceeds `tolerance`."""
    if got.shape != wanted.shape:
        raise ParityError(f"the output of {graph} has the shape {got.shape}; {library}'s has {wanted.shape}.")
    difference = np.abs(got - wanted)
    worst = float(difference.max(initial=0.0))
    if not worst <= tolerance or np.isinf(worst):  # the tolerance is infinite if the reference's output is
        frame = int(np.unravel_index(np.nanargmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)[0])
        raise ParityError(
            f"{graph} differs from {library} by {worst:.2g} (allowed: {tolerance:.3g}), most at frame {frame}, step "
            f"{frame // frames_per_step}; the bundle was not written."
        )
    return worst


def _session(bundle: Bundle, graph: str) -> ort.InferenceSession:
    return ort.InferenceSession(bundle.file(graph), providers=["CPUExecutionProvider"])
