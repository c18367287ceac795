"""The central tests: streaming equals NeMo offline for any pushes, batches and slots."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import StreamError
from nemostream.export.parity import stream_encoder
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.model import Model

pytestmark = pytest.mark.nemo

CHUNKS = (80, 160, 560, 1120)
Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def demo_model(demo_bundle: Bundle) -> Iterator[Model]:
    with nemostream.load(demo_bundle.path, capacity=8) as model:
        yield model


@pytest.fixture(scope="module")
def tiny_model(tiny_bundle: Bundle) -> Iterator[Model]:
    with nemostream.load(tiny_bundle.path, capacity=8) as model:
        yield model


def ids(result: nemostream.Result) -> list[int]:
    return [token.id for token in result.tokens]


# -- against NeMo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ms", CHUNKS)
@pytest.mark.parametrize("which", ["demo", "tiny"])
def test_tokens_equal_nemos_for_every_clip(
    which: str, ms: int, clips: dict[str, Floats], request: pytest.FixtureRequest
) -> None:
    model, oracle = request.getfixturevalue(f"{which}_model"), request.getfixturevalue(f"{which}_oracle")
    chunk, total = model.manifest.chunk(ms), 0
    for name, audio in clips.items():
        wanted = oracle.tokens(audio, chunk)
        assert ids(model.transcribe(audio, chunk_ms=ms)) == wanted, name
        total += len(wanted)
    assert total > 20, "too few reference tokens for a meaningful comparison"


@pytest.mark.parametrize("ms", CHUNKS)
@pytest.mark.parametrize("which", ["demo", "tiny"])
def test_encoder_and_features_equal_nemos(
    which: str, ms: int, clips: dict[str, Floats], request: pytest.FixtureRequest
) -> None:
    bundle, oracle = request.getfixturevalue(f"{which}_bundle"), request.getfixturevalue(f"{which}_oracle")
    chunk = bundle.manifest.chunk(ms)
    for name, audio in clips.items():
        mel, encoded, _ = stream_encoder(bundle, chunk, audio)
        exact = oracle.features(audio, exact=True)
        np.testing.assert_allclose(mel, exact, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(encoded, oracle.encode(exact, chunk), rtol=0, atol=1e-4, err_msg=name)
        # NeMo's fp32 transform differs from the exact one by its rounding; ours differs from it by no more than that.
        rounded = oracle.features(audio)
        assert np.abs(mel - rounded).max() <= np.abs(exact - rounded).max() + 1e-5


LENGTHS = [160, 161, 319, 320, 1279, 1280, 1281, 2560, 1478, 1480, 7879, 16838, 16839, 16840, 33000]


@pytest.mark.parametrize("ms", CHUNKS)
def test_all_frames_of_the_offline_forward_pass_are_emitted(
    ms: int, tiny_bundle: Bundle, tiny_oracle: Any, clips: Any
) -> None:
    """Lengths at and around every boundary: no frame at the end may be missing or added."""
    audio = clips["librivox-sense-0880"][4000:]
    for length in LENGTHS:
        _, encoded, _ = stream_encoder(tiny_bundle, tiny_bundle.manifest.chunk(ms), audio[:length])
        wanted = tiny_oracle.encode(tiny_oracle.features(audio[:length], exact=True), tiny_bundle.manifest.chunk(ms))
        assert encoded.shape == wanted.shape, length
        np.testing.assert_allclose(encoded, wanted, rtol=0, atol=1e-4, err_msg=str(length))


# -- streaming against itself ------------------------------------------------------------------------------------------


def test_streams_at_different_steps_share_a_batch(tiny_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """Streams that start at different steps, in scattered slots that earlier streams used, in one batch."""
    manifest, names = tiny_bundle.manifest, list(clips)[:5]
    for ms in CHUNKS:
        chunk = manifest.chunk(ms)
        backend = OrtBackend(tiny_bundle, capacity=9)
        noise = np.random.default_rng(0).standard_normal((9, chunk.samples)).astype(np.float32)
        backend.submit(Batch(chunk, np.arange(9), noise, np.full(9, chunk.samples))).result()
        slots = dict(zip(names, (7, 0, 3, 4, 8), strict=True))
        backend.reset(np.array(sorted(slots.values())))
        waiting = {name: cut_chunks(manifest, chunk, clips[name]) for name in names}
        tokens: dict[str, list[int]] = {name: [] for name in names}
        step = 0
        while any(waiting.values()):
            live = [n for i, n in enumerate(names) if waiting[n] and step >= 2 * i]
            live.sort(key=slots.__getitem__)
            parts = [waiting[name].pop(0) for name in live]
            step += 1
            if not live:
                continue
            batch = Batch(
                chunk,
                np.array([slots[name] for name in live]),
                np.stack([audio for audio, _ in parts]),
                np.array([length for _, length in parts]),
            )
            emissions = backend.submit(batch).result()
            assert not emissions.failed.any()
            for name, ids_n in zip(live, emissions.tokens, strict=True):
                tokens[name] += ids_n.tolist()
        with nemostream.load(tiny_bundle.path, capacity=1) as alone:
            assert tokens == {name: ids(alone.transcribe(clips[name], chunk_ms=ms)) for name in names}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_results_do_not_depend_on_pushes_other_streams_and_slots(
    data: st.DataObject, tiny_model: Model, clips: Any
) -> None:
    """Concurrent streams of several chunk sizes start and end at random, with pushes of any size."""
    jobs = data.draw(
        st.lists(
            st.tuples(st.sampled_from(sorted(clips)), st.sampled_from(CHUNKS), st.integers(0, 2**32 - 1)),
            min_size=1,
            max_size=6,
        )
    )
    streams = []
    for name, ms, seed in jobs:
        audio = clips[name][: 16000 * 4]
        cuts = np.sort(np.random.default_rng(seed).integers(0, len(audio), 8))
        streams.append((audio, ms, np.diff(np.concatenate([[0], cuts, [len(audio)]])).tolist()))
    order = data.draw(st.permutations([i for i, (_, _, pieces) in enumerate(streams) for _ in range(len(pieces) + 1)]))
    # Draw everything before opening a stream: hypothesis may abort an example at any draw, and slots are limited.
    got, at = {}, [0] * len(streams)
    with contextlib.ExitStack() as stack:
        live = [stack.enter_context(tiny_model.stream(chunk_ms=ms)) for _, ms, _ in streams]
        for i in order:
            audio, _, pieces = streams[i]
            if pieces:
                size = pieces.pop(0)
                live[i].push(audio[at[i] : at[i] + size])
                at[i] += size
            else:
                got[i] = ids(live[i].finish())
    for i, (audio, ms, _) in enumerate(streams):
        assert got[i] == ids(tiny_model.transcribe(audio, chunk_ms=ms)), jobs[i]


def test_pushes_of_single_samples(tiny_model: Model, clips: Any) -> None:
    audio = clips["cards-001"][:6000]
    with tiny_model.stream(chunk_ms=80) as stream:
        partials = [partial for sample in audio for partial in stream.push(sample[None])]
        final = stream.finish()
    assert ids(final) == ids(tiny_model.transcribe(audio, chunk_ms=80))
    assert len(partials) == (6000 + tiny_model.manifest.lead) // 1280
    assert all(final.tokens[: len(partial.tokens)] == partial.tokens for partial in partials), "a partial was revised"


def test_int16_and_float_audio_give_the_same_tokens(tiny_model: Model, clips: Any) -> None:
    audio = clips["cards-002"]
    whole = np.round(audio * 32768).astype(np.int16)
    assert ids(tiny_model.transcribe(whole)) == ids(tiny_model.transcribe(whole.astype(np.float32) / 32768))


def test_a_stream_with_nan_state_fails_alone(tiny_bundle: Bundle, tiny_model: Model, clips: Any) -> None:
    """NaN in the state of one slot fails its stream, leaves the others unchanged and is removed by the next reset."""
    audio, backend = clips["cards-003"], tiny_model._scheduler._backend
    assert isinstance(backend, OrtBackend)
    wanted = ids(tiny_model.transcribe(audio))
    with tiny_model.stream() as failing, tiny_model.stream() as healthy:
        half = len(audio) // 2
        failing.push(audio[:half])
        healthy.push(audio[:half])
        backend._state.v[:, failing._session._stream.slot] = np.nan
        with pytest.raises(StreamError, match="not finite"):
            failing.push(audio[half:])
            failing.finish()
        healthy.push(audio[half:])
        assert ids(healthy.finish()) == wanted
    for _ in range(backend.capacity):
        assert ids(tiny_model.transcribe(audio)) == wanted, "a slot kept its NaN state after a reset"


def test_a_large_position(tiny_bundle: Bundle, clips: Any, cut_chunks: Any) -> None:
    """A stream continues after a month as after a minute: only `position` differs, by full turns of the ring."""
    chunk, spec = tiny_bundle.manifest.chunk(560), tiny_bundle.manifest.encoder
    audio = np.tile(clips["librivox-sense-0870"], 2)
    tokens = []
    for turns in (0, 460_000):  # 70 frames each: a month of audio
        backend, emitted = OrtBackend(tiny_bundle, capacity=1), []
        backend.reset(np.array([0]))
        for step, (samples, length) in enumerate(cut_chunks(tiny_bundle.manifest, chunk, audio)):
            if step == 12:  # the ring is full; any congruent position is equivalent from here on
                backend._state.position[0] += turns * spec.cache
            row = Batch(chunk, np.array([0]), samples[None], np.array([length]))
            emissions = backend.submit(row).result()
            offset = turns * spec.cache if step >= 12 else 0
            emitted += list(zip(emissions.tokens[0].tolist(), (emissions.frames[0] - offset).tolist(), strict=True))
        tokens.append(emitted)
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) > 10


def test_state_and_buffers_do_not_grow(tiny_bundle: Bundle, clips: Any) -> None:
    """Ten minutes in one slot: no array of the state is reallocated or changes its size."""
    backend, chunk = OrtBackend(tiny_bundle, capacity=2), tiny_bundle.manifest.chunk(1120)
    backend.reset(np.array([0, 1]))

    def sizes() -> dict[str, tuple[int, int]]:
        return {name: (array.ctypes.data, array.nbytes) for name, array in vars(backend._state).items()}

    before = sizes()
    rng = np.random.default_rng(0)
    for _ in range(540):
        audio = rng.standard_normal((2, chunk.samples)).astype(np.float32) * 0.01
        backend.submit(Batch(chunk, np.array([0, 1]), audio, np.full(2, chunk.samples))).result()
    assert sizes() == before
    assert backend._state.position.tolist() == [540 * chunk.frames] * 2
    assert len(backend._steps[1120]._bound) == 1


def test_a_stream_that_changes_its_chunk_size(tiny_bundle: Bundle, tiny_model: Model, clips: Any) -> None:
    """A stream with `set_chunk_ms` between pushes equals chunks cut by hand and run by the backend alone."""
    manifest, audio = tiny_bundle.manifest, clips["librivox-sense-0870"]
    order = [560, 80, 80, 160, 1120, 560, 80, 560, 160]
    backend, tokens, at = OrtBackend(tiny_bundle, capacity=1), [], 0
    backend.reset(np.array([0]))
    padded = np.concatenate([np.zeros(manifest.lead, np.float32), audio])
    with tiny_model.stream() as stream:
        for ms in order:
            chunk = manifest.chunk(ms)
            part = padded[at : at + chunk.samples]
            emissions = backend.submit(Batch(chunk, np.array([0]), part[None], np.array([len(part)]))).result()
            tokens += emissions.tokens[0].tolist()
            stream.set_chunk_ms(ms)
            (partial,) = stream.push(part if at else part[manifest.lead :])
            assert partial.chunk_ms == ms and ids(partial) == tokens
            at += chunk.samples
        stream.push(audio[at - manifest.lead :])
        assert stream.finish().duration == len(audio) / 16000
    assert len(tokens) > 5


def test_all_batch_sizes_share_memory(demo_bundle: Bundle) -> None:
    """A server uses all batch sizes; separate buffers of the large model would add up to gigabytes."""
    backend, chunk = OrtBackend(demo_bundle, capacity=5, threads=1), demo_bundle.manifest.chunk(560)
    audio = np.random.default_rng(0).standard_normal((5, chunk.samples)).astype(np.float32) * 0.1
    encoded = []
    for rows in (5, 2, 3, 5):
        backend.reset(np.arange(5))
        batch = Batch(chunk, np.arange(rows), audio[:rows], np.full(rows, chunk.samples))
        encoded.append(backend.encode(batch)[0].copy())
    bound = backend._steps[560]._bound
    for name in ("k_new", "v_new", "conv_next", "mel", "encoded_joint", "audio"):
        assert all(np.shares_memory(bound[2][name], bound[rows][name]) for rows in (3, 5)), name
    np.testing.assert_array_equal(encoded[0], encoded[3])
    for part in encoded[1:3]:
        np.testing.assert_allclose(part, encoded[0][: len(part)], atol=1e-4)


def test_short_digital_silence_equals_nemo_and_long_silence_keeps_the_words(
    demo_model: Model, demo_oracle: Any, demo_bundle: Bundle, clips: Any
) -> None:
    """Within the limit of `runtime/audio/silence.py` all tokens equal NeMo's.

    After a minute of zeros NeMo's words change, which is the reason for the rule; ours do not.
    """
    speech, other = clips["cards-001"], clips["cards-002"]
    audio = np.concatenate([other, np.zeros(9 * 16000, np.float32), speech])
    for ms in CHUNKS:
        chunk = demo_bundle.manifest.chunk(ms)
        assert ids(demo_model.transcribe(audio, chunk_ms=ms)) == demo_oracle.tokens(audio, chunk)
        delayed = np.concatenate([np.zeros(60 * 16000, np.float32), speech])
        alone = demo_oracle.tokens(speech, chunk)
        assert demo_oracle.tokens(delayed, chunk) != alone
        assert ids(demo_model.transcribe(delayed, chunk_ms=ms)) == alone


# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_the_demo_models_word_error_rate(demo_model: Model) -> None:
    """WER on the packaged held-out recordings; the model card has the figures for the complete sets."""
    import json

    import soundfile

    folder = Path(__file__).parents[1] / "examples" / "demo_model" / "heldout"
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    wrong = words = 0
    for row in rows:
        audio, rate = soundfile.read(folder / row["audio_filepath"], dtype="int16")
        transcript = demo_model.transcribe(audio, sample_rate=rate).text
        got, wanted = (re.findall(r"[a-z']+", text.lower()) for text in (transcript, row["text"]))
        wrong, words = wrong + edits(wanted, got), words + len(wanted)
    assert len(rows) >= 24
    assert wrong / words <= 0.45, f"{wrong} of {words} words"  # a third of the clips are unconstrained texts


def edits(wanted: list[str], got: list[str]) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(got, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]
