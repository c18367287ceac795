"""Models and streams over the fake backend: what was pushed is what was heard, in every way there is to push it."""

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
from nemostream.runtime.model import Model

WAIT = 20


def noise(seed: int, samples: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.1).astype(np.float32)


@pytest.fixture
def backend(manifest, fake):
    return fake.FakeBackend(manifest, capacity=3, max_batch=2)


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def model(request, bundle, backend):
    backend.asynchronous = request.param
    with Model(bundle, backend) as model:
        yield model


@pytest.fixture
def check(manifest, fake, tokenizer_model):
    """Asserts that a final result is what the fake says of audio at 16 kHz; text by SentencePiece itself."""
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
def test_a_live_stream_says_every_step_and_then_all(model, check, samples, size):
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


def test_pushes_after_finish_or_close_are_refused(model, check):
    stream = model.stream()
    final = stream.finish()
    check(final, noise(0, 0))
    with pytest.raises(StreamError, match="was finished; open a new one"):
        stream.push(noise(0, 10))
    stream.close()
    assert stream.finish() is final
    left = model.stream()
    left.close()
    for _ in range(2):
        with pytest.raises(StreamError, match="was closed; open a new one"):
            left.push(noise(0, 10))
    for _ in range(2):
        with pytest.raises(StreamError, match="was closed"):
            left.finish()


def test_a_push_that_is_no_audio_leaves_the_stream_unharmed(model, check):
    audio = noise(1, 40_000)
    with model.stream(sample_rate=48000, channels=2) as stream:
        stereo = np.stack([audio, audio], axis=1)
        stream.push(stereo[:10_000])
        hurt = stereo[10_000:].copy()
        hurt[-1, 1] = np.nan
        for bad in (hurt, audio, audio.tobytes(), stereo.astype(np.int64)):
            before = stream.result
            with pytest.raises(AudioError):
                stream.push(bad)
            assert stream.result == before
        stream.push(stereo[10_000:])
        check(stream.finish(), soxr.resample(audio, 48000, 16000), 40_000 / 48000)


def test_a_callers_buffer_may_be_used_again(model, check):
    audio, buffer = noise(2, 20_000), np.zeros(500, np.float32)
    with model.stream() as stream:
        for at in range(0, 20_000, 500):
            buffer[:] = audio[at : at + 500]
            stream.push(buffer)
            buffer[:] = 9
        check(stream.finish(), audio)


def test_options_that_cannot_be_cost_no_slot(model, bundle, backend):
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


def test_a_bundle_with_a_damaged_tokenizer(tmp_path, manifest, backend):
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


def test_a_row_that_fails_ends_its_stream_and_keeps_what_was_said(model, backend, check):
    backend.fails = lambda slot, position: slot == 0 and position >= 7
    hurt, well = model.stream(), model.stream()
    audio = noise(4, 30_000)
    first = hurt.push(audio[:8000])[-1]
    with pytest.raises(StreamError, match="not finite"):
        hurt.push(audio)
    assert hurt.result.tokens == first.tokens
    with pytest.raises(StreamError, match="not finite"):
        hurt.finish()
    well.push(audio)
    check(well.finish(), audio)


# -- recordings --------------------------------------------------------------------------------------------------------


def test_transcribe_an_array_or_a_file_at_any_rate_and_channels(model, check, tmp_path):
    audio = noise(5, 200_001)
    check(model.transcribe(audio), audio)
    stereo = np.stack([audio, audio], axis=1)
    check(model.transcribe(stereo, chunk_ms=1120), audio, chunk_ms=1120)
    pcm = (audio * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", pcm, 44100)
    want = soxr.resample(pcm / np.float32(32768), 44100, 16000)
    check(model.transcribe(tmp_path / "a.flac"), want, len(pcm) / 44100)
    check(model.transcribe(str(tmp_path / "a.flac"), chunk_ms=160), want, len(pcm) / 44100, 160)
    check(model.transcribe(pcm, sample_rate=44100), want, len(pcm) / 44100)


def test_transcribe_tells_partials_and_progress_on_the_callers_thread(model, check):
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


def test_transcribe_refuses_by_a_sentence_and_gives_its_slot_back(model, check, tmp_path):
    hurt = noise(7, 100_000)
    hurt[99_000] = np.nan
    soundfile.write(tmp_path / "nan.wav", hurt, 16000, subtype="FLOAT")

    def leave(result):
        raise KeyboardInterrupt

    for _ in range(4):  # more often than there are slots
        for source, sentence in (
            (np.zeros(0, np.float32), "the audio is empty"),
            (np.zeros(9, np.int64), "not int64"),
            (hurt, "NaN or infinity at sample 99000"),
            (tmp_path / "nan.wav", "nan.wav contains NaN"),
            (tmp_path / "no.wav", "no.wav does not exist"),
            ([0.0], "takes a path or a numpy array, not list"),
        ):
            with pytest.raises(AudioError, match=sentence):
                model.transcribe(source)
        with pytest.raises(KeyboardInterrupt):
            model.transcribe(noise(0, 9000), on_partial=leave)
    audio = noise(8, 5000)
    streams = [model.stream() for _ in range(2)]
    check(model.transcribe(audio), audio)
    assert len(streams) == 2


def test_a_backend_that_fails_is_heard_and_the_next_recording_runs(model, backend, check, fake):
    def fail(batch):
        raise RuntimeError("out of memory")

    backend.on_submit = fail
    with pytest.raises(BackendError, match="the model failed: RuntimeError: out of memory"):
        model.transcribe(noise(0, 9000))
    backend.on_submit = fake.nothing
    check(model.transcribe(noise(0, 9000)), noise(0, 9000))


def test_close_ends_streams_and_is_final(bundle, backend):
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
    async def speak(seed: int):
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
            await asyncio.wait_for(asyncio.gather(*(speak(i) for i in range(3))), WAIT)

    asyncio.run(main())


class ChunkFilter:
    """Holds the scheduler's thread inside a step."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT)


@pytest.mark.parametrize("verb", ["push", "finish"])
def test_a_cancelled_task_loses_no_audio_and_hurts_nobody(model, backend, check, verb):
    audio = noise(9, 30_000)

    async def main():
        backend.on_result = gate = ChunkFilter()
        stream, other = model.astream(), model.astream()
        if verb == "finish":
            gate.opened.set()
            await stream.push(audio)
            gate.opened.clear()
        gate.entered.clear()
        task = asyncio.create_task(stream.push(audio) if verb == "push" else stream.finish())
        await asyncio.to_thread(gate.entered.wait, WAIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        if verb == "push":
            assert len(await stream.push(noise(0, 0))) == 3  # what the cancelled push would have told
        check(await stream.finish(), audio)
        await other.push(audio)
        check(await other.finish(), audio)

    asyncio.run(main())


def test_an_abandoned_async_stream_frees_its_slot(model, backend, check):
    async def main():
        backend.on_result = gate = ChunkFilter()
        async with model.astream() as stream:
            task = asyncio.create_task(stream.push(noise(0, 30_000)))
            await asyncio.to_thread(gate.entered.wait, WAIT)
            task.cancel()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    streams = []
    for _ in range(1000):  # the last step ends soon, but after the loop's end
        try:
            streams.append(model.stream())
        except CapacityError:
            threading.Event().wait(0.002)
        if len(streams) == 3:
            break
    assert len(streams) == 3


def test_errors_reach_an_awaiting_task(model, backend):
    def fail(batch):
        raise RuntimeError("gone")

    async def main():
        async with model.astream() as stream:
            await stream.push(noise(0, 8000))
            with pytest.raises(AudioError, match="not int64"):
                await stream.push(np.zeros(3, np.int64))
            backend.on_submit = fail
            with pytest.raises(BackendError, match="gone"):
                await asyncio.wait_for(stream.push(noise(0, 9000)), WAIT)

    asyncio.run(main())


def test_asyncio_is_imported_by_those_who_use_it_only():
    code = "import sys, nemostream.runtime.model as r; print('nemostream.runtime.streaming.aio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_models_delay_is_taken_off_every_time(bundle, fake):
    audio = noise(1, 30_000)
    with Model(bundle, fake.FakeBackend(bundle.manifest)) as model:
        wanted = model.transcribe(audio)
    with Model(bundle, fake.FakeBackend(bundle.manifest), delay_ms=100) as model:
        found = model.transcribe(audio)
        events = list(model.listen(audio))
    assert found.text == wanted.text and found.duration == wanted.duration
    for late, token in zip(wanted.tokens, found.tokens, strict=True):
        assert token.time == pytest.approx(max(late.time - 0.1, 0))
        assert token.end == pytest.approx(min(token.time + 0.08, wanted.duration))
    assert events[-2].tokens == found.tokens and events[-2].start == 0.0
    for delay in (-1, 5001, 0.1, True):
        with pytest.raises(OptionError, match="delay_ms is"):
            Model(bundle, fake.FakeBackend(bundle.manifest), delay_ms=delay)
