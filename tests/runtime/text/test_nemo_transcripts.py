"""Words, confidences and utterances compared with NeMo, on real speech."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import nemostream
from nemostream.runtime.model import Model

pytestmark = pytest.mark.nemo

Floats = NDArray[np.float32]
# Silences, in seconds, between additional recordings of digits.
PAUSES = (0.0, 0.5, 0.8, 0.9, 1.0, 2.0)
ENCODED: dict[
    tuple[int, int, int], list[Any]
] = {}  # NeMo's encoder frames by oracle, chunk size and length of the recording


@pytest.fixture(scope="module", params=["demo", "tiny"])
def model_and_oracle(request: pytest.FixtureRequest) -> Iterator[tuple[Model, Any]]:
    """A model and its oracle. (Words of the demo model have one token; those of random weights have many.)"""
    bundle = request.getfixturevalue(f"{request.param}_bundle")
    with nemostream.load(bundle.path, capacity=4) as model:
        yield model, request.getfixturevalue(f"{request.param}_oracle")


@pytest.fixture(scope="module")
def speech(clips: dict[str, Floats], heldout: list[Floats]) -> list[Floats]:
    pauses = [np.zeros(round(16000 * seconds), np.float32) for seconds in PAUSES]
    spaced = [part for pair in zip(heldout[:16], itertools.cycle(pauses), strict=False) for part in pair]
    return [clips["cards-001"], clips["cards-002"], clips["librivox-sense-0880"], np.concatenate(spaced)]


def nemo_hypothesis(oracle: Any, chunk: Any, audio: Floats, **decoding: Any) -> Any:
    """Return NeMo's hypothesis of a recording, with the options `decoding`."""
    import torch
    from omegaconf import open_dict

    config = copy.deepcopy(oracle.model.cfg.decoding)
    with open_dict(config):
        config.strategy = "greedy_batch"
        for name, value in decoding.items():
            config[name] = value
    before = oracle.model.decoding
    oracle.model.change_decoding_strategy(config, verbose=False)
    try:
        kept = ENCODED.setdefault((id(oracle), chunk.ms, len(audio)), [])
        if not kept:
            kept.append(torch.from_numpy(oracle.encode(oracle.features(audio), chunk).T[None].copy()))
        encoded = kept[0]
        with torch.inference_mode():
            return oracle.model.decoding.rnnt_decoder_predictions_tensor(
                encoded, torch.tensor([encoded.shape[2]]), return_hypotheses=True
            )[0]
    finally:
        oracle.model.decoding = before


@pytest.mark.parametrize("ms", [80, 1120])
def test_words_and_times_equal_nemo(model_and_oracle: tuple[Model, Any], speech: list[Floats], ms: int) -> None:
    model, oracle = model_and_oracle
    compared = 0
    for audio in speech:
        expected = nemo_hypothesis(oracle, model.manifest.chunk(ms), audio, compute_timestamps=True).timestamp["word"]
        words = list(model.transcribe(audio, chunk_ms=ms).words)
        for nemos in expected:
            # Text after an unknown piece is a separate word in NeMo's text, but not in its words; ours follow the text.
            ours = [words.pop(0) for _ in nemos["word"].split()]
            assert " ".join(word.text for word in ours) == " ".join(nemos["word"].split())
            # NeMo's last frame may extend beyond the recording.
            inside = [min(nemos[key] * 0.08, len(audio) / 16000) for key in ("start_offset", "end_offset")]
            assert [ours[0].start, ours[-1].end] == pytest.approx(inside, abs=1e-6)
            compared += len(ours)
        assert not words
    assert compared > 20


MEASURES = [
    nemostream.Confidence(),
    nemostream.Confidence(norm="lin", aggregation="mean"),
    nemostream.Confidence("renyi", "exp", aggregation="prod"),
    nemostream.Confidence("renyi", "lin", aggregation="max"),
    nemostream.Confidence("max_prob", aggregation="mean"),
    nemostream.Confidence("max_prob", alpha=1.0),
]


@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_confidences_equal_nemo(
    model_and_oracle: tuple[Model, Any], speech: list[Floats], measure: nemostream.Confidence
) -> None:
    model, oracle = model_and_oracle
    method = (
        {"name": "max_prob"}
        if measure.measure == "max_prob"
        else {"name": "entropy", "entropy_type": measure.measure, "entropy_norm": measure.norm}
    )
    confidence = {
        "preserve_frame_confidence": True,
        "preserve_token_confidence": True,
        "preserve_word_confidence": True,
        "aggregation": measure.aggregation,
        "method_cfg": method | {"alpha": measure.alpha},
    }
    greedy = {"max_symbols": model.manifest.decoder.max_symbols, "preserve_frame_confidence": True}
    compared = 0
    for audio in speech:
        expected = nemo_hypothesis(oracle, model.manifest.chunk(560), audio, confidence_cfg=confidence, greedy=greedy)
        found = model.transcribe(audio, confidence=measure)
        # Both compute in fp32. Random weights yield confidences close to 0, hence the absolute tolerance.
        for ours, nemos in (
            ([token.confidence for token in found.tokens], expected.token_confidence),
            ([word.confidence for word in found.words], expected.word_confidence),
        ):
            np.testing.assert_allclose(ours, [float(value) for value in nemos], rtol=2e-3, atol=2e-6)
            compared += len(ours)
    assert compared > 80


def test_defaults_equal_nemo() -> None:
    from nemo.collections.asr.parts.utils.asr_confidence_utils import ConfidenceConfig

    config = ConfidenceConfig()
    nemos = (config.method_cfg.name, config.method_cfg.entropy_type, config.method_cfg.entropy_norm)
    ours = nemostream.Confidence()
    assert nemos == ("entropy", ours.measure, ours.norm)
    assert (config.method_cfg.alpha, config.aggregation) == (ours.alpha, ours.aggregation)
    assert set(asdict(ours)) == {"measure", "norm", "alpha", "aggregation"}


@pytest.mark.parametrize("ms", [80, 560])
def test_utterances_equal_nemo_segments(model_and_oracle: tuple[Model, Any], speech: list[Floats], ms: int) -> None:
    """NeMo splits text at gaps of this number of frames between words; ours is the same split, during streaming."""
    model, oracle = model_and_oracle
    rule, several = nemostream.Endpoint(silence_ms=800), 0
    for audio in speech:
        gap = 800 // 80 + 1
        hypothesis = nemo_hypothesis(
            oracle,
            model.manifest.chunk(ms),
            audio,
            compute_timestamps=True,
            segment_gap_threshold=gap,
            segment_seperators=["\0"],
        )
        expected = hypothesis.timestamp["segment"]
        finals = [event for event in model.listen(audio, chunk_ms=ms, endpoint=rule) if event.kind == "final"]
        joined: list[list[nemostream.Event]] = []  # utterances split within a word are one segment in NeMo
        for event in finals:
            if joined and not event.tokens[0].text.startswith(" "):
                joined[-1].append(event)
            else:
                joined.append([event])
        assert [
            (
                "".join(event.text for event in events).split(),
                round(events[0].start / 0.08),
                round(events[-1].end / 0.08),
            )
            for events in joined
        ] == [
            # NeMo's last frame may extend beyond the recording.
            (one["segment"].split(), one["start_offset"], min(one["end_offset"], round(len(audio) / 1280)))
            for one in expected
        ]
        several += len(finals) > 1
    assert several


def test_ends_of_utterances_equal_nemo_pipeline(demo_oracle: Any, demo_bundle: Any, speech: list[Floats]) -> None:
    """NeMo's cache-aware pipeline keeps the labels of the last frames and looks for silence before the newest one
    (`cache_aware_rnnt_pipeline.py`, `run_greedy_decoder`). Called after every frame, it ends the same utterances one
    frame later, and assigns tokens of that frame to the utterance before; ours are assigned to the next."""
    from nemo.collections.asr.inference.streaming.endpointing.greedy.greedy_rnnt_endpointing import (
        RNNTGreedyEndpointing,
    )
    from nemo.collections.asr.inference.streaming.state.cache_aware_rnnt_state import CacheAwareRNNTStreamingState

    vocabulary = list(demo_oracle.model.tokenizer.vocab)
    blank, several = len(vocabulary), 0
    with nemostream.load(demo_bundle.path, capacity=1) as model:
        listened = [list(model.listen(audio, chunk_ms=80)) for audio in speech]
    for audio, events in zip(speech, listened, strict=True):
        spoken = [t for e in events if e.kind == "final" for t in e.tokens]
        tokens = {round(t.time / 0.08): t.id for t in spoken}
        counts = Counter(round(t.time / 0.08) for t in spoken)  # some frames have several
        nemo = RNNTGreedyEndpointing(vocabulary, 80, stop_history_eou=800, residue_tokens_at_end=2)
        state = CacheAwareRNNTStreamingState()
        state.setup_label_buffer(800 // 80 + 2, blank)
        expected, count = [], 0
        for frame in range(demo_bundle.manifest.encoder_frames(len(audio))):
            state.update_label_buffer([tokens.get(frame, blank)])
            labels = state.get_label_buffer()
            ended, _ = nemo.detect_eou_near_pivot(labels, len(labels) - 1, stop_history_eou=800)
            if ended and count:
                expected.append((count, frame))
                count = 0
            count += counts[frame]
        found, count = [], 0
        for event in events:
            count = len(event.tokens) if event.kind == "final" else count
            if event.kind == "end" and event.reason == "silence":
                found.append((count, round(event.end / 0.08)))
        if found[len(expected) :]:  # the last one may need one more frame than there are
            assert found.pop()[1] == demo_bundle.manifest.encoder_frames(len(audio))
        assert found == expected
        several += len(found) > 1
    assert several
