"""Comparison with a second reference that shares no code with NeMo: `nemotron_asr_streaming` of transformers 5.23.

The weights of the tiny NeMo checkpoint are renamed and loaded into the Hugging Face model. Its outputs for recorded
speech are compared with those of our graphs, run step by step. The conventions agree (offline-aligned first chunk,
N // 160 mel frames, f(f(f(N))) encoder frames, K and V cached), with these differences:

* The Hugging Face extractor returns one more STFT frame and marks it in `attention_mask`. Given the mask, the encoder
  emits exactly the frames that our flushed stream emits. Its *streaming* encoder does not support a short last chunk,
  so it is compared on whole chunks only; the end of a stream is compared with its offline forward.
* Its convolution keeps padded frames of the last chunk, which our graph sets to zero. The convolution is causal, so
  they do not affect the output.
* Only the default `attn_implementation="sdpa"` is correct. "eager" (5.23.0) applies a logical not to a mask that is
  already additive, so it attends to wrong frames, or to none, which gives NaN.
* It computes pre-emphasis and FFT in fp32; our graph uses fp64. The rounding error is relative to the loudest bin of a
  frame, so after the logarithm quiet bins differ by up to 2.1e-4 (seven clips; on three of them fp32 pre-emphasis alone
  contributes 1.2e-4, the fp32 FFT alone 2.6e-4). The same formulas in fp64 differ from ours by 1e-6.
* `decoder_hidden_size` is the width of both prediction network and joint, and all chunk sizes have one left context.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemostream.benchmarks.harness.huggingface import PREPROCESSOR, load_transformers, read_nemo, their_name
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.export.bundle import export_checkpoint
from nemostream.export.parity import stream_encoder
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend

pytestmark = pytest.mark.nemo

LONG, SHORT = "librispeech-1088-134315-0000", "cards-003"  # 16.04 s; 1.54 s, two chunks of the largest size
MILLISECONDS = (80, 160, 560, 1120)
TOLERANCE = 1e-4

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Oracle:
    """Hugging Face extractor and model with the weights of a NeMo checkpoint."""

    extractor: Any
    model: Any

    def features(self, audio: Floats) -> Any:
        """Return the inputs of the model: `input_features` [1, F + 1, M] and `attention_mask` [1, F + 1]."""
        return self.extractor(audio, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")

    def encode(self, audio: Floats, lookahead: int) -> Floats:
        """Return encoder frames [T, D] of the offline forward."""
        out = self.model.encoder(**self.features(audio), num_lookahead_tokens=lookahead)
        return out.last_hidden_state[0, : int(out.attention_mask.sum())].numpy()

    def stream(self, audio: Floats, lookahead: int) -> Floats:
        """Return encoder frames [T, D] of the cached forward, for all whole chunks."""
        mel = self.features(audio)
        mel = mel.input_features[:, : int(mel.attention_mask.sum())]
        caches: dict[str, Any] = {}
        frames, start, end = [], 0, 1 + 8 * lookahead
        while end <= mel.shape[1]:
            out = self.model.encoder(mel[:, start:end], num_lookahead_tokens=lookahead, use_cache=True, **caches)
            caches = {"past_key_values": out.past_key_values, "padding_cache": out.padding_cache}
            frames.append(out.last_hidden_state[0].numpy())
            start, end = end, end + 8 * (lookahead + 1)
        return np.concatenate(frames)

    def transcribe(self, audio: Floats, lookahead: int) -> tuple[list[int], list[int]]:
        """Return the tokens of `generate` and the encoder frame of each."""
        config = self.model.config
        features = self.features(audio)
        out = self.model.generate(
            **features,
            num_lookahead_tokens=lookahead,
            decoder_start_token_id=config.blank_token_id,
            max_new_tokens=(config.max_symbols_per_step + 1) * features.input_features.shape[1],
        )
        emitted, advances = (
            output[0, 1:].numpy() for output in (out.sequences, out.durations)
        )  # without the start token
        labels = emitted != config.blank_token_id
        return emitted[labels].tolist(), (np.cumsum(advances) - advances)[labels].tolist()


@pytest.fixture(scope="module", autouse=True)
def _torch() -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.23")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the greedy loop consists of many small products
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle(_torch: None, tiny_checkpoint: Path, tiny_bundle: Bundle) -> Oracle:
    return Oracle(*load_transformers(tiny_checkpoint, tiny_bundle.manifest))


@pytest.fixture(scope="module")
def varied(
    oracle: Oracle, tiny_checkpoint: Path, clips: dict[str, Floats], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Oracle, Bundle]:
    """Oracle and bundle of a checkpoint that emits both labels and blanks, which random weights rarely do."""
    folder = tmp_path_factory.mktemp("varied")
    checkpoint = folder / "varied.nemo"
    _calibrate_joint(tiny_checkpoint, checkpoint, oracle, clips[LONG])
    bundle = export_checkpoint(checkpoint, folder / "bundle")
    return Oracle(*load_transformers(checkpoint, bundle.manifest)), bundle


def test_every_weight_is_renamed(oracle: Oracle, tiny_checkpoint: Path) -> None:
    _, state = read_nemo(tiny_checkpoint)
    renamed = {their_name(name) for name in state.keys() - PREPROCESSOR}
    assert state.keys() >= PREPROCESSOR
    assert len(renamed) == len(state) - len(PREPROCESSOR)
    assert renamed == oracle.model.state_dict().keys() >= dict(oracle.model.named_parameters()).keys()


def test_filter_bank_equals_nemos(oracle: Oracle, tiny_checkpoint: Path) -> None:
    _, state = read_nemo(tiny_checkpoint)
    assert np.array_equal(oracle.extractor.mel_filters.numpy(), state["preprocessor.featurizer.fb"][0].numpy())


@pytest.mark.parametrize("ms", MILLISECONDS)
@pytest.mark.parametrize("clip", [LONG, SHORT, "jfk-1961-inaugural"])
def test_features(oracle: Oracle, tiny_bundle: Bundle, clips: dict[str, Floats], clip: str, ms: int) -> None:
    """Differences of at most 5e-4 in all bins (fp32 in quiet bins), 3e-5 in bins within 40 dB of a frame's loudest.

    The fp32 FFT depends on the processor: on an AMD EPYC the difference is 2.1e-5.
    """
    audio = clips[clip]
    features = oracle.features(audio)
    wanted = features.input_features[0, features.attention_mask[0]].numpy()
    got, _, _ = stream_encoder(tiny_bundle, tiny_bundle.manifest.chunk(ms), audio)
    assert got.shape == wanted.shape
    difference = np.abs(got - wanted)
    loud = wanted > wanted.max(axis=1, keepdims=True) - np.log(1e4)
    assert difference.max() <= 5e-4
    assert difference[loud].max() <= 3e-5


@pytest.mark.parametrize("ms", MILLISECONDS)
def test_encoder_of_a_long_stream(oracle: Oracle, tiny_bundle: Bundle, clips: dict[str, Floats], ms: int) -> None:
    chunk, audio = tiny_bundle.manifest.chunk(ms), clips[LONG]
    wanted = oracle.encode(audio, chunk.frames - 1)
    _, got, steps = stream_encoder(tiny_bundle, chunk, audio)
    assert (
        steps >= 12 and len(wanted) > chunk.left + chunk.frames
    )  # the caches are full, and the first frames overwritten
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= TOLERANCE
    # The comparison is sensitive to the attention context: another chunk size differs.
    assert np.abs(got - oracle.encode(audio, chunk.frames)).max() > 100 * TOLERANCE


@pytest.mark.parametrize("ms", MILLISECONDS)
@pytest.mark.parametrize("samples", [160, 399, 1280, 1281, 2720, 10000, 17920, 24611])
def test_encoder_at_the_end_of_a_stream(
    oracle: Oracle, tiny_bundle: Bundle, clips: dict[str, Floats], samples: int, ms: int
) -> None:
    """Our graphs emit exactly the frames of the offline forward."""
    chunk, audio = tiny_bundle.manifest.chunk(ms), clips[SHORT][:samples]
    assert len(audio) == samples
    wanted = oracle.encode(audio, chunk.frames - 1)
    _, got, _ = stream_encoder(tiny_bundle, chunk, audio)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("ms", MILLISECONDS)
def test_encoder_with_their_caches(oracle: Oracle, tiny_bundle: Bundle, clips: dict[str, Floats], ms: int) -> None:
    chunk, audio = tiny_bundle.manifest.chunk(ms), clips[LONG]
    wanted = oracle.stream(audio, chunk.frames - 1)
    _, got, steps = stream_encoder(tiny_bundle, chunk, audio)
    assert len(wanted) == (steps - 1) * chunk.frames
    assert np.abs(got[: len(wanted)] - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("ms", MILLISECONDS)
def test_tokens(
    varied: tuple[Oracle, Bundle], clips: dict[str, Floats], cut_chunks: Callable[..., Any], ms: int
) -> None:
    """Tokens and their frames for the same samples: two streams in one batch, compared with one at a time."""
    oracle, bundle = varied
    manifest, streams = bundle.manifest, [clips[LONG], clips[SHORT]]
    chunk, limit = manifest.chunk(ms), manifest.decoder.max_symbols
    wanted = [oracle.transcribe(audio, chunk.frames - 1) for audio in streams]
    tokens, frames = wanted[0]
    labels = np.bincount(frames, minlength=manifest.encoder_frames(len(streams[0])))
    assert len(set(tokens)) > 5
    assert (labels == 0).any()  # only blank
    assert ((labels > 0) & (labels < limit)).any()  # labels, then blank
    assert labels.max() == limit  # labels up to the limit
    assert _transcribe(bundle, chunk, [cut_chunks(manifest, chunk, audio) for audio in streams]) == wanted


def _transcribe(
    bundle: Bundle, chunk: ChunkConfig, streams: list[list[tuple[Floats, int]]]
) -> list[tuple[list[int], list[int]]]:
    """Return tokens and frames of each stream; the streams are batched until they end."""
    backend = OrtBackend(bundle, capacity=len(streams))
    backend.reset(np.arange(len(streams)))
    results: list[tuple[list[int], list[int]]] = [([], []) for _ in streams]
    for step in range(max(map(len, streams))):
        live = [slot for slot, chunks in enumerate(streams) if step < len(chunks)]
        audio, lengths = zip(*(streams[slot][step] for slot in live), strict=True)
        emissions = backend.submit(Batch(chunk, np.array(live), np.stack(audio), np.array(lengths))).result()
        assert not emissions.failed.any()
        for slot, tokens, frames in zip(live, emissions.tokens, emissions.frames, strict=True):
            results[slot][0].extend(tokens.tolist())
            results[slot][1].extend(frames.tolist())
    backend.close()
    return results


def _calibrate_joint(source: Path, target: Path, oracle: Oracle, audio: Floats) -> None:
    """Write `source` with a joint whose output varies, and is blank in four of five cases.

    Projections with random weights hardly vary around their mean, so the model always emits the same label, or blank.
    Here they are normalised to mean 0, and a standard deviation of 2 over the frames of `audio` and of 1 over the
    predictions after random labels.
    """
    import torch

    _, state = read_nemo(source)
    model, blank = oracle.model, oracle.model.config.blank_token_id
    labels = torch.randint(0, blank, (1, 200), generator=torch.Generator().manual_seed(0))
    frames = torch.from_numpy(oracle.encode(audio, 6))
    projections = {"joint.enc": model.encoder_projector(frames), "joint.pred": model.decoder(labels)[0]}
    for name, target_std in (("joint.enc", 2), ("joint.pred", 1)):
        projected = projections[name]
        mean, deviation = projected.mean(0), projected.std(0) / target_std
        state[f"{name}.weight"] = state[f"{name}.weight"] / deviation[:, None]
        state[f"{name}.bias"] = (state[f"{name}.bias"] - mean) / deviation
        projections[name] = (projected - mean) / deviation
    logits = model.joint(
        encoder_hidden_states=projections["joint.enc"][:, None], decoder_hidden_states=projections["joint.pred"]
    )
    margin = logits[..., :blank].amax(-1) - logits[..., blank]
    state["joint.joint_net.2.bias"][blank] += margin.quantile(0.8)
    weights = io.BytesIO()
    torch.save(state, weights)
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            content: IO[bytes] | None = old.extractfile(member)
            if Path(member.name).name == "model_weights.ckpt":
                member.size, content = weights.tell(), weights
                weights.seek(0)
            new.addfile(member, content)
