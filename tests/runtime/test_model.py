"""Models and streams with the fake backend: the backend receives the audio that was pushed, in every mode."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sentencepiece
import soundfile
import soxr

from nemostream.bundle import Bundle
from nemostream.errors import AudioError, BackendError, BundleError, CapacityError, OptionError, StreamError
from nemostream.runtime.audio.preprocessor import AudioPreprocessor
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot

TIMEOUT = 20  # seconds after which a hanging test fails


def noise(seed: int, samples: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


@pytest.fixture
def backend(manifest, fake):
    return fake.FakeBackend(manifest, capacity=3, max_batch=2)


@pytest.fixture(params=[False, True], ids=["no overlap", "overlap"])
def model(request, bundle, backend):
    backend.asynchronous = request.param
    with Model(bundle, backend) as model:
        yield model


@pytest.fixture
def check(manifest, fake, tokenizer_model):
    """Asserts that a final result is the one expected for audio at 16 kHz; the reference for text is SentencePiece."""
    oracle = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)

    def check(result, audio, seconds=None, chunk_ms=560):
        tokens, frames = fake.expected(audio, manifest.decoder.vocabulary)
        assert [token.id for token in result.tokens] == tokens
        assert [token.time for token in result.tokens] == [frame * 1280 / 16000 for frame in frames]
        assert result.text == oracle.decode(tokens)
        assert result.duration == (len(audio) / 16000 if seconds is None else seconds)
        assert (result.final, result.chunk_ms) == (True, chunk_ms)

    return check


@pytest.mark.parametrize("samples", [0, 159, 160, 7878, 7879, 30_000])
@pytest.mark.parametrize("size", [333, 8960, 10**6])
def test_a_live_stream_returns_a_partial_per_step_and_a_final_result(model, check, samples, size):
    audio = noise(samples, samples)
    with model.stream() as stream:
        partials = []
        for at in range(0, samples, size):
            ready = (min(at + size, samples) + 1081) // 8960 - (at + 1081) // 8960
            new = stream.push(audio[at : at + size])
            assert len(new) == ready
            assert all(p.duration == min(at + size, samples) / 16000 and not p.final for p in new)
            partials += new
        assert stream.result.duration == samples / 16000 and not stream.result.final
        final = stream.finish()
    check(final, audio)
    assert stream.finish() is final and stream.result is final
    for partial in partials:
        assert final.text.startswith(partial.text) and final.tokens[: len(partial.tokens)] == partial.tokens
    assert [len(p.tokens) for p in partials] == [21 * (i + 1) for i in range(len(partials))]


def test_pushes_after_finish_or_close_are_rejected(model, check):
    stream = model.stream()
    final = stream.finish()
    check(final, noise(0, 0))
    with pytest.raises(StreamError, match="was finished; open a new one"):
        stream.push(noise(0, 10))
    stream.close()
    assert stream.finish() is final
    closed = model.stream()
    closed.close()
    for _ in range(2):
        with pytest.raises(StreamError, match="was closed; open a new one"):
            closed.push(noise(0, 10))
    for _ in range(2):
        with pytest.raises(StreamError, match="was closed"):
            closed.finish()


def test_a_rejected_push_leaves_the_stream_unchanged(model, check):
    audio = noise(1, 40_000)
    with model.stream(sample_rate=48000, channels=2) as stream:
        stereo = np.stack([audio, audio], axis=1)
        stream.push(stereo[:10_000])
        damaged = stereo[10_000:].copy()
        damaged[-1, 1] = np.nan
        for bad in (damaged, audio, audio.tobytes(), stereo.astype(np.int64)):
            before = stream.result
            with pytest.raises(AudioError):
                stream.push(bad)
            assert stream.result == before
        stream.push(stereo[10_000:])
        check(stream.finish(), soxr.resample(audio, 48000, 16000), 40_000 / 48000)


def test_the_callers_buffer_can_be_reused(model, check):
    audio, buffer = noise(2, 20_000), np.zeros(500, np.float32)
    with model.stream() as stream:
        for at in range(0, 20_000, 500):
            buffer[:] = audio[at : at + 500]
            stream.push(buffer)
            buffer[:] = 9
        check(stream.finish(), audio)


def test_invalid_options_do_not_take_a_slot(model, bundle, backend):
    for options in ({"chunk_ms": 100}, {"chunk_ms": 0}, {"sample_rate": 0}, {"channels": 0}):
        for open_ in (model.stream, model.astream, lambda **o: model.transcribe(noise(0, 9), **o)):
            if open_ in (model.stream, model.astream) or "channels" not in options:
                with pytest.raises(OptionError, match=r"chunk size|sample_rate|channels"):
                    open_(**options)
    streams = [model.stream() for _ in range(3)]
    with pytest.raises(CapacityError, match=r"nemostream.load\(capacity=...\)"):
        model.stream()
    for stream in streams:
        with stream:
            pass
    model.stream()
    with pytest.raises(OptionError, match="choose one of 80, 160, 560, 1120"):
        Model(bundle, backend, chunk_ms=100)


def test_a_damaged_tokenizer_is_a_bundle_error(tmp_path, manifest, backend):
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(BundleError, match="not a SentencePiece model"):
        Model(Bundle(tmp_path, manifest), backend)


def test_streams_of_two_chunk_sizes_and_rates_side_by_side(model, check):
    audio = noise(3, 24_000)
    one, other = model.stream(chunk_ms=80), model.stream(sample_rate=8000, chunk_ms=1120)
    for at in range(0, 24_000, 1000):
        one.push(audio[at : at + 1000])
        other.push(audio[at : at + 1000])
    check(one.finish(), audio, chunk_ms=80)
    check(other.finish(), soxr.resample(audio, 8000, 16000), 3.0, 1120)


def test_a_failed_row_fails_its_stream_and_keeps_the_result(model, backend, check):
    backend.fails = lambda slot, position: slot == 0 and position >= 7
    failing, other = model.stream(), model.stream()
    audio = noise(4, 30_000)
    first = failing.push(audio[:8000])[-1]
    with pytest.raises(StreamError, match="not finite"):
        failing.push(audio)
    assert failing.result.tokens == first.tokens
    with pytest.raises(StreamError, match="not finite"):
        failing.finish()
    other.push(audio)
    check(other.finish(), audio)


# -- recordings --------------------------------------------------------------------------------------------------------


def test_transcribe_arrays_and_files_at_any_rate_and_channels(model, check, tmp_path):
    audio = noise(5, 200_001)
    check(model.transcribe(audio), audio)
    stereo = np.stack([audio, audio], axis=1)
    check(model.transcribe(stereo, chunk_ms=1120), audio, chunk_ms=1120)
    pcm = (audio * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", pcm, 44100)
    # The tokens are a checksum of the samples, which differ from soxr's by rounding after four seconds.
    preprocessor = AudioPreprocessor(44100, 1, 16000)
    want = np.concatenate([*preprocessor.push(pcm), preprocessor.finish()])
    oracle = soxr.resample(pcm / np.float32(32768), 44100, 16000)
    assert len(want) == len(oracle) and np.abs(want - oracle).max() < 5e-7
    check(model.transcribe(tmp_path / "a.flac"), want, len(pcm) / 44100)
    check(model.transcribe(str(tmp_path / "a.flac"), chunk_ms=160), want, len(pcm) / 44100, 160)
    check(model.transcribe(pcm, sample_rate=44100), want, len(pcm) / 44100)


def test_transcribe_calls_back_on_the_callers_thread(model, check):
    audio, partials, progress, threads = noise(6, 200_000), [], [], set()

    def partial(result):
        partials.append(result)
        threads.add(threading.get_ident())

    final = model.transcribe(audio, on_partial=partial, on_progress=progress.append)
    check(final, audio)
    assert threads == {threading.get_ident()}
    assert len(partials) == -(-len(final.tokens) // 21) and not any(p.final for p in partials)
    assert progress == sorted(progress) and progress[-1] == 12.5 and len(progress) > 2 and 0 < progress[0] < 12.5
    assert all(final.text.startswith(p.text) for p in partials)


def test_concurrent_transcribes_share_batches(model, backend, check):
    audios = [noise(i, 100_000 + i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for result, audio in zip(pool.map(model.transcribe, audios), audios, strict=True):
            check(result, audio)
    assert {slot for _, slots in backend.batches for slot in slots} <= {0, 1, 2}


def test_transcribe_raises_for_invalid_audio_and_releases_its_slot(model, check, tmp_path):
    damaged = noise(7, 100_000)
    damaged[99_000] = np.nan
    soundfile.write(tmp_path / "nan.wav", damaged, 16000, subtype="FLOAT")

    def interrupt(result):
        raise KeyboardInterrupt

    for _ in range(4):  # more often than there are slots
        for source, message in (
            (np.zeros(0, np.float32), "the audio is empty"),
            (np.zeros(9, np.int64), "not int64"),
            (damaged, "NaN or infinity at sample 99000"),
            (tmp_path / "nan.wav", "nan.wav contains NaN"),
            (tmp_path / "no.wav", "no.wav does not exist"),
            ([0.0], "must be a path, a numpy array, .* not list"),
        ):
            with pytest.raises(AudioError, match=message):
                model.transcribe(source)
        with pytest.raises(KeyboardInterrupt):
            model.transcribe(noise(0, 9000), on_partial=interrupt)
    audio = noise(8, 5000)
    streams = [model.stream() for _ in range(2)]
    check(model.transcribe(audio), audio)
    assert len(streams) == 2


def test_a_backend_error_is_raised_and_the_next_recording_works(model, backend, check, fake):
    def fail(batch):
        raise RuntimeError("out of memory")

    backend.on_submit = fail
    with pytest.raises(BackendError, match="the model failed: RuntimeError: out of memory"):
        model.transcribe(noise(0, 9000))
    backend.on_submit = fake.do_nothing
    check(model.transcribe(noise(0, 9000)), noise(0, 9000))


def test_close_fails_streams_and_is_final(bundle, backend):
    with Model(bundle, backend) as model:
        stream = model.stream()
        stream.push(noise(0, 9000))
    assert backend.closed
    model.close()
    for call in (stream.finish, model.stream, lambda: model.transcribe(noise(0, 10))):
        with pytest.raises(StreamError, match="the model was closed; load it again"):
            call()


# -- asyncio -----------------------------------------------------------------------------------------------------------


def test_async_streams_run_together(model, check):
    async def transcribe(seed: int):
        audio = noise(seed, 20_000 + seed)
        async with model.astream(chunk_ms=160) as stream:
            partials = []
            for at in range(0, len(audio), 3000):
                partials += await stream.push(audio[at : at + 3000])
            final = await stream.finish()
            assert await stream.finish() is final and stream.result is final
            with pytest.raises(StreamError, match="was finished"):
                await stream.push(audio)
        assert len(partials) == (len(audio) + 1081) // 2560
        check(final, audio, chunk_ms=160)

    async def main():
        for _ in range(2):
            await asyncio.wait_for(asyncio.gather(*(transcribe(i) for i in range(3))), TIMEOUT)

    asyncio.run(main())


class BlockingCall:
    """Blocks the scheduler's thread inside a step until the test sets `released`."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.released.wait(TIMEOUT)


@pytest.mark.parametrize("method", ["push", "finish"])
def test_a_cancelled_task_loses_no_audio(model, backend, check, method):
    audio = noise(9, 30_000)

    async def main():
        backend.on_result = block = BlockingCall()
        stream, other = model.astream(), model.astream()
        if method == "finish":
            block.released.set()
            await stream.push(audio)
            block.released.clear()
        block.entered.clear()
        task = asyncio.create_task(stream.push(audio) if method == "push" else stream.finish())
        await asyncio.to_thread(block.entered.wait, TIMEOUT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        block.released.set()
        if method == "push":
            assert len(await stream.push(noise(0, 0))) == 3  # the results of the cancelled push
        check(await stream.finish(), audio)
        await other.push(audio)
        check(await other.finish(), audio)

    asyncio.run(main())


def test_an_abandoned_async_stream_releases_its_slot(model, backend, check):
    async def main():
        backend.on_result = block = BlockingCall()
        async with model.astream() as stream:
            task = asyncio.create_task(stream.push(noise(0, 30_000)))
            await asyncio.to_thread(block.entered.wait, TIMEOUT)
            task.cancel()
        block.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    streams = []
    for _ in range(1000):  # the last step ends after the event loop
        try:
            streams.append(model.stream())
        except CapacityError:
            threading.Event().wait(0.002)
        if len(streams) == 3:
            break
    assert len(streams) == 3


def test_errors_are_raised_in_the_awaiting_task(model, backend):
    def fail(batch):
        raise RuntimeError("gone")

    async def main():
        async with model.astream() as stream:
            await stream.push(noise(0, 8000))
            with pytest.raises(AudioError, match="not int64"):
                await stream.push(np.zeros(3, np.int64))
            backend.on_submit = fail
            with pytest.raises(BackendError, match="gone"):
                await asyncio.wait_for(stream.push(noise(0, 9000)), TIMEOUT)

    asyncio.run(main())


def test_asyncio_is_imported_only_when_used():
    code = "import sys, nemostream.runtime.model as r; print('nemostream.runtime.streaming.aio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_models_delay_is_subtracted_from_all_times(bundle, fake):
    audio = noise(1, 30_000)
    with Model(bundle, fake.FakeBackend(bundle.manifest)) as model:
        wanted = model.transcribe(audio)
    with Model(bundle, fake.FakeBackend(bundle.manifest), delay_ms=100) as model:
        found = model.transcribe(audio)
        events = list(model.listen(audio))
    assert found.text == wanted.text and found.duration == wanted.duration
    for undelayed, token in zip(wanted.tokens, found.tokens, strict=True):
        assert token.time == pytest.approx(max(undelayed.time - 0.1, 0))
        assert token.end == pytest.approx(min(token.time + 0.08, wanted.duration))
    assert events[-2].tokens == found.tokens and events[-2].start == 0.0
    for delay in (-1, 5001, 0.1, True):
        with pytest.raises(OptionError, match="delay_ms is"):
            Model(bundle, fake.FakeBackend(bundle.manifest), delay_ms=delay)
    with Model(bundle, fake.FakeBackend(bundle.manifest), delay_ms=5000) as model:
        assert {token.time for token in model.transcribe(audio).tokens} == {0.0}


# -- options of a model ------------------------------------------------------------------------------------------------


def test_the_models_confidence_is_the_default_of_its_streams(bundle, fake):
    audio, probability = noise(1, 9000), Confidence("max_prob", alpha=1.0)
    with Model(bundle, fake.FakeBackend(bundle.manifest)) as model:
        default = model.transcribe(audio)
        wanted = model.transcribe(audio, confidence=probability)
        assert default.tokens != wanted.tokens
    with Model(bundle, fake.FakeBackend(bundle.manifest), confidence=probability) as model:
        assert model.transcribe(audio) == wanted
        assert model.transcribe(audio, confidence=Confidence()) == default
        assert next(event for event in model.listen(audio) if event.kind == "final").tokens == wanted.tokens
    size = bundle.manifest.decoder.vocabulary + 1
    for token in wanted.tokens:  # 1 for certainty, 0 for a uniform distribution over the vocabulary and blank
        assert token.confidence == pytest.approx((size * np.exp(token.score) - 1) / (size - 1))


def test_listening_without_a_rule_has_one_utterance(model):
    audio = np.concatenate([noise(1, 9000), np.full(30_000, 1e-4, np.float32)])
    assert [event.reason for event in model.listen(audio, endpoint=None) if event.kind == "end"] == ["finish"]
    with model.stream() as stream:
        stream.push(audio)
        assert stream.finish_events()[-1].reason == "finish"


def test_callbacks_for_monitoring_are_set_and_removed(model, backend):
    def fail(batch):
        raise raised

    raised, steps, failures = RuntimeError("gone"), [], []
    model.watch(lambda *step: steps.append(step), failures.append)
    model.transcribe(noise(1, 9000), chunk_ms=1120)
    assert [(chunk.ms, rows) for chunk, rows, _ in steps] == [(1120, 1)] and failures == []
    submit, backend.on_submit = backend.on_submit, fail
    for _ in range(2):
        with pytest.raises(BackendError, match="gone"):
            model.transcribe(noise(1, 9000))
        model.watch(None)
    assert failures == [raised] and len(steps) == 1
    backend.on_submit = submit
    model.transcribe(noise(1, 9000))
    assert len(steps) == 1


def test_the_graph_of_the_voice_activity_detection_is_loaded_once(model, monkeypatch):
    from nemostream.runtime.audio import vad

    loaded = []
    monkeypatch.setattr(vad, "Silero", lambda: loaded.append("graph") or object())
    streams = [model.open_session(16000, 1, vad=vad_) for vad_ in (False, True, True)]
    assert [stream.has_vad for stream in streams] == [False, True, True] and loaded == ["graph"]
    for stream in streams:
        stream.close()


def test_a_snapshot_is_kept_on_request(model, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    audio, state = noise(1, 200_000), tmp_path / "state"
    wanted = model.transcribe(audio)
    assert model.transcribe(audio, resume=state, keep_state=True) == wanted
    assert state.exists()
    assert model.transcribe(audio, resume=str(state), keep_state=True) == wanted and state.exists()
    assert model.transcribe(audio, resume=state) == wanted and not list(tmp_path.iterdir())
    with pytest.raises(OptionError, match="resume is 3; it must be the path of a file"):
        model.transcribe(audio, resume=3)


def test_many_recordings_are_started_ahead_of_the_results(model):
    """The results of twice as many recordings as run at the same time may wait for the first one."""
    opened = []

    def sources():
        for number in range(20):
            opened.append(number)
            yield noise(number, 300)

    results = model.transcribe_many(sources(), together=3)
    assert opened == []
    next(results)
    assert len(opened) == 6
    next(results)
    assert len(opened) == 7
    assert len(list(results)) == 18 and len(opened) == 20
