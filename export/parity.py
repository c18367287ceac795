"""Compare the exported graphs with NeMo on recorded speech. A bundle is written only if they agree.

The reference is NeMo's *offline* forward of the whole clip with the attention mask of the chunk size. A correct stream
reproduces it frame by frame, first and last chunk included. The front end is compared with NeMo's code run in fp64,
because NeMo's fp32 FFT has errors of up to 2e-4 in quiet bins; the same features are the input of NeMo's encoder.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.clips import read_clip
from nemostream.errors import CheckpointError, ParityError
from nemostream.step_loop import padded_chunks, run_steps

TOLERANCE = 1e-4  # fp32, largest absolute difference
MIN_STEPS = 12

Floats = NDArray[np.float32]


def measure_parity(bundle: Bundle, checkpoint: Path, progress: Callable[[str], None]) -> Manifest:
    """Return the manifest with the measured differences from NeMo.

    `progress` is called with a message before each comparison. Raises `ParityError` naming the graph, frame and step
    that differ by more than `TOLERANCE`, `CheckpointError` if NeMo cannot restore the checkpoint.
    """
    import torch
    from nemo.collections.asr.models import ASRModel

    progress("loading the checkpoint in NeMo")
    try:
        with torch.inference_mode():
            model = ASRModel.restore_from(str(checkpoint), map_location="cpu").eval().float()
    except Exception as error:  # NeMo raises many types of exceptions
        raise CheckpointError(f"NeMo cannot restore {checkpoint}: {error}") from error
    manifest = bundle.manifest
    audio = _test_audio(manifest)
    figures: dict[str, Any] = {"audio_seconds": round(len(audio) / manifest.features.sample_rate, 2)}
    with torch.inference_mode():
        mel = _nemo_features(model, audio)
        for chunk in manifest.chunks:
            progress(f"comparing {chunk.ms} ms with NeMo")
            model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
            encoded, _ = model.encoder(
                audio_signal=torch.from_numpy(mel.T[None].copy()), length=torch.tensor([len(mel)])
            )
            wanted = encoded[0].T.numpy()
            got_mel, got, steps = stream_encoder(bundle, chunk, audio)
            figures[f"{chunk.ms}ms"] = {
                "steps": steps,
                "features": _compare(
                    f"features-{chunk.ms}ms", got_mel, mel, chunk.frames * manifest.encoder.subsampling
                ),
                "encoder": _compare(f"encoder-{chunk.ms}ms", got, wanted, chunk.frames),
            }
        progress("comparing prediction network and joint with NeMo")
        figures |= _compare_decoder(bundle, model, wanted)
    return dataclasses.replace(manifest, parity=figures)


def stream_encoder(bundle: Bundle, chunk: ChunkConfig, audio: Floats) -> tuple[Floats, Floats, int]:
    """Run a recording [N] through the graphs; return mel frames [F, M], encoder frames [T, D] and number of steps."""
    manifest, subsampling = bundle.manifest, bundle.manifest.encoder.subsampling
    features, encoder = (_session(bundle, f"{kind}-{chunk.ms}ms") for kind in ("features", "encoder"))
    mels, frames = [], []
    for outputs in run_steps(manifest, chunk, padded_chunks(manifest, chunk, audio), features, encoder):
        mels.append(outputs["mel"][0])
        frames.append(outputs["encoded"][0])
    # The first step's window begins 7 frames (of 8) before the stream.
    mel = np.concatenate(mels)[subsampling - 1 :][: manifest.mel_frames(len(audio))]
    return mel, np.concatenate(frames)[: manifest.encoder_frames(len(audio))], len(frames)


def _test_audio(manifest: Manifest) -> Floats:
    """Return recorded speech [N] of at least `MIN_STEPS` steps of the longest chunk, repeated if necessary."""
    audio = read_clip("speech", manifest.features.sample_rate)
    needed = MIN_STEPS * max(chunk.samples for chunk in manifest.chunks)
    return np.tile(audio, -(-needed // len(audio)))


def _nemo_features(model: Any, audio: Floats) -> Floats:
    """Return NeMo's log-mel [F, M] of a clip, computed in fp64."""
    import torch

    featurizer = copy.deepcopy(model.preprocessor.featurizer).double()
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
    mel, length = featurizer(torch.from_numpy(audio).double()[None], torch.tensor([len(audio)]))
    return mel[0, :, : int(length[0])].T.float().numpy()


def _compare_decoder(bundle: Bundle, model: Any, encoded: Floats) -> dict[str, float]:
    """Run blank and 12 random tokens through the prediction network, and join each prediction with an encoder frame."""
    import torch

    spec = bundle.manifest.decoder
    decoder, joint = _session(bundle, "decoder"), _session(bundle, "joint")
    tokens = [spec.blank, *np.random.default_rng(0).integers(0, spec.vocabulary, MIN_STEPS)]
    h = c = np.zeros((1, spec.layers, spec.hidden), np.float32)
    state, predictions, logits = None, [], []
    projected = model.joint.project_encoder(torch.from_numpy(encoded[None])).numpy()[0]
    for step, token in enumerate(tokens):
        predicted, h, c = decoder.run(["predicted", "h_next", "c_next"], {"token": np.array([token]), "h": h, "c": c})
        output, state = model.decoder.predict(torch.tensor([[int(token)]]), state, add_sos=False)
        nemo_predicted = model.joint.project_prednet(output)
        predictions.append((predicted[0], nemo_predicted[0, 0].numpy()))
        frame = projected[step % len(projected)][None]
        (joined,) = joint.run(["logits"], {"encoded_joint": frame, "predicted": predicted})
        nemo_joined = model.joint.joint_after_projection(torch.from_numpy(frame[None]), nemo_predicted)
        logits.append((_log_softmax(joined[0]), _log_softmax(nemo_joined.reshape(-1).numpy())))
    figures = {}
    for name, pairs in (("decoder", predictions), ("joint", logits)):
        got, wanted = (np.stack(side) for side in zip(*pairs, strict=True))
        figures[name] = _compare(name, got, wanted, 1)
    return figures


def _log_softmax(logits: Floats) -> Floats:
    """Normalise logits [V]: NeMo's joint returns normalised values on a CPU, but not on a GPU."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _compare(graph: str, got: Floats, wanted: Floats, frames_per_step: int) -> float:
    """Return the largest absolute difference. Raises `ParityError` if it exceeds `TOLERANCE`."""
    if got.shape != wanted.shape:
        raise ParityError(f"the output of {graph} has the shape {got.shape}; NeMo's has {wanted.shape}.")
    difference = np.abs(got - wanted)
    worst = float(difference.max(initial=0.0))
    if not worst <= TOLERANCE:
        frame = int(np.unravel_index(np.nanargmax(np.nan_to_num(difference, nan=np.inf)), difference.shape)[0])
        raise ParityError(
            f"{graph} differs from NeMo by {worst:.2g} (allowed: {TOLERANCE}), most at frame {frame}, step "
            f"{frame // frames_per_step}; the bundle was not written."
        )
    return worst


def _session(bundle: Bundle, graph: str) -> ort.InferenceSession:
    return ort.InferenceSession(bundle.file(graph), providers=["CPUExecutionProvider"])
