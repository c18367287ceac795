"""A session: encodings, rates, latency, slices, timeouts and its end, with a controlled clock and a fake model."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import AudioError, BackendError, OptionError, StreamError
from nemostream.serving.errors import Expired

MAX_BYTES = 1 << 20


def pcm(count: int, start: int = 1) -> np.ndarray[Any, Any]:
    """Return 16-bit samples with both bytes in use, so that their order matters."""
    return (np.arange(start, start + count) * 257 % 60000 - 30000).astype(np.int16)


def wav(samples: Any, rate: int = 16000, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def kinds(calls: list[Any]) -> list[Any]:
    """Return the calls of a stream, with the number of samples instead of the samples."""
    return [len(call) if isinstance(call, np.ndarray) else call for call in calls]


# -- encodings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "subtype"), [("mulaw", "ULAW"), ("alaw", "ALAW")])
def test_every_code_of_g711_is_decoded_as_libsndfile_does(
    fakes: Any, model: Any, clock: Any, encoding: str, subtype: str
) -> None:
    codes = bytes(range(256))
    expected, _ = soundfile.read(
        io.BytesIO(codes), samplerate=8000, channels=1, format="RAW", subtype=subtype, dtype="int16"
    )
    session = fakes.start(model, clock).open("test", encoding=encoding)
    fakes.run(clock, session.push(b"\x00\x01\x02" + codes))  # codes at the start resemble no container
    pushed = model.streams[0].pushed
    assert pushed.dtype == np.int16 and np.array_equal(pushed[3:], expected)


@pytest.mark.parametrize(
    ("encoding", "dtype"), [("pcm_s16le", "<i2"), ("pcm_f32le", "<f4"), ("mulaw", "u1"), ("alaw", "u1")]
)
@settings(max_examples=25)
@given(data=st.data())
def test_messages_may_end_inside_a_sample(fakes: Any, encoding: str, dtype: str, data: Any) -> None:
    """All samples arrive, whatever the size of messages; bytes of an incomplete sample wait for the rest."""
    channels = data.draw(st.integers(1, 3))
    values = np.linspace(-0.9, 0.9, 8 * channels) if dtype == "<f4" else np.arange(1, 8 * channels + 1) * 3
    raw = values.astype(dtype).tobytes()
    extra = data.draw(st.integers(0, channels * np.dtype(dtype).itemsize - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    model, clock = fakes.FakeModel(), fakes.VirtualClock()
    here = fakes.start(model, clock)
    session, whole = (here.open("test", encoding=encoding, channels=channels) for _ in range(2))

    async def main() -> None:
        await whole.push(raw)
        for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            await session.push(raw[start:stop])
        await session.push(raw[:extra])  # an incomplete sample of all channels is never pushed
        await session.finish()

    fakes.run(clock, main())
    pushed = model.streams[0].pushed
    assert pushed.shape == ((8,) if channels == 1 else (8, channels))
    assert session.audio == 8 / 16000
    assert pushed.dtype == model.streams[1].pushed.dtype and np.array_equal(pushed, model.streams[1].pushed)
    if dtype in ("<i2", "<f4"):
        assert np.array_equal(pushed.reshape(-1), values.astype(dtype))


def test_unknown_encodings_are_rejected(fakes: Any, model: Any) -> None:
    with pytest.raises(OptionError, match="encoding is 'mp3'; it must be one of pcm_s16le, pcm_f32le, mulaw, alaw"):
        fakes.start(model).open("test", encoding="mp3")
    assert not model.streams


@pytest.mark.parametrize("last", ["commit", "finish"])
def test_a_start_that_resembles_a_container_is_decoded_at_the_end(
    fakes: Any, model: Any, clock: Any, last: str
) -> None:
    session = fakes.start(model, clock).open("test")

    async def main() -> None:
        await session.push(b"RIFF")
        assert not len(model.streams[0].pushed) and session.audio == 0
        await getattr(session, last)()

    fakes.run(clock, main())
    assert model.streams[0].pushed.tobytes() == b"RIFF" and session.audio == 2 / 16000


def test_an_incomplete_sample_does_not_reach_the_next_utterance(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")

    async def main() -> None:
        for end in (session.commit, session.clear):
            await session.push(pcm(2).tobytes() + b"\x7f")
            await end()
        await session.push(pcm(2, 9).tobytes())

    fakes.run(clock, main())
    assert model.streams[0].pushed.tolist() == [*pcm(2), *pcm(2), *pcm(2, 9)]


@pytest.mark.parametrize("end", ["commit", "clear"])
def test_each_utterance_may_be_a_wav_file(fakes: Any, model: Any, clock: Any, end: str) -> None:
    session = fakes.start(model, clock).open("test")

    async def main() -> None:
        for start in (1, 50):
            await session.push(wav(pcm(20, start)))
            await getattr(session, end)()

    fakes.run(clock, main())
    (stream,) = model.streams
    assert stream.pushed.tolist() == [*pcm(20, 1), *pcm(20, 50)]


def test_an_utterance_may_end_inside_a_wav_file(fakes: Any, model: Any, clock: Any) -> None:
    """The rest is still read as its header states, and the chunks after the samples are not audio."""
    data = wav(pcm(20)) + b"LIST\x03\0\0\0abc\0"
    session = fakes.start(model, clock).open("test", encoding="mulaw")

    async def main() -> None:
        await session.push(data[:64])
        await session.commit()
        await session.push(data[64:])
        await session.commit()

    fakes.run(clock, main())
    assert model.streams[0].pushed.tolist() == pcm(20).tolist()


@pytest.mark.parametrize("size", [1, 3, 8, 9, 20])
def test_chunks_before_the_samples_may_have_any_size(fakes: Any, model: Any, clock: Any, size: int) -> None:
    """A chunk of an odd size is followed by a byte of padding (RIFF)."""
    data = wav(pcm(20))
    chunk = b"LIST" + size.to_bytes(4, "little") + b"d" * (size + size % 2)
    session = fakes.start(model, clock).open("test", sample_rate=8000)
    fakes.run(clock, session.push(data[:12] + chunk + data[12:36] + chunk + data[36:]))
    assert model.streams[-1].pushed.tolist() == pcm(20).tolist() and model.streams[-1].sample_rate == 16000


def test_a_wav_header_sets_rate_channels_and_encoding(fakes: Any, languages_bundle: Any, clock: Any) -> None:
    """The stream is opened again with the same options, in the language that is set by then."""
    model = fakes.FakeModel(languages_bundle)
    session = fakes.start(model, clock).open("test", chunk_ms=160, language="de", encoding="mulaw", endpoint_ms=99)
    stereo = np.stack([pcm(30), pcm(30, 90)], 1)

    async def main() -> None:
        session.set_language("ar-AR")
        await session.push(wav(stereo, 8000))
        await session.push(b"")

    fakes.run(clock, main())
    first, second = model.streams
    assert (first.sample_rate, first.channels, first.closed) == (16000, 1, 1) and not len(first.pushed)
    assert (second.sample_rate, second.channels, second.closed) == (8000, 2, 0)
    assert second.options == first.options | {"language": "ar-AR"} and first.options["chunk_ms"] == 160
    assert np.array_equal(second.pushed, stereo) and session.audio == 30 / 8000


def test_a_wav_header_keeps_the_chunk_sizes_that_were_set(fakes: Any, model: Any, clock: Any) -> None:
    here = fakes.start(model, clock, chunk_ms=560)

    async def main() -> None:
        session = here.open("test")
        here.configure(session, chunk_ms=80, final_chunk_ms=1120)
        await session.push(wav(pcm(20), 8000))
        first, second = model.streams
        assert (first.options["chunk_ms"], first.options["final_chunk_ms"], first.closed) == (560, None, 1)
        assert (second.options["chunk_ms"], second.options["final_chunk_ms"], second.sample_rate) == (80, 1120, 8000)
        assert session.revises and session.final_chunk_ms == 1120

    fakes.run(clock, main())


def test_a_final_without_text_is_not_an_utterance(fakes: Any, model: Any, clock: Any) -> None:
    """It withdraws the partials."""
    here = fakes.start(model, clock, chunk_ms=80, final_chunk_ms=1120)
    events = [fakes.event("final", "one"), fakes.event("partial", "x"), fakes.event("final", "", 1)]
    model.events = {"push": [[*events, fakes.event("final", "two", 2)]]}

    async def main() -> None:
        session = here.open("test")
        assert [event.text for event in await session.push(bytes(32))] == ["one", "x", "", "two"]
        assert session.text == "one two" and fakes.metric(here, "utterances_total") == 2

    fakes.run(clock, main())


def test_a_wav_header_cannot_change_the_rate_after_audio(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")

    async def main() -> None:
        await session.push(pcm(100).tobytes())
        await session.commit()
        await session.push(wav(pcm(100)))  # of the same rate
        await session.commit()
        with pytest.raises(AudioError, match=r"8000 Hz and 1 channel\(s\) was received on a stream of 16000 Hz and 1"):
            await session.push(wav(pcm(100), 8000))

    fakes.run(clock, main())
    assert len(model.streams) == 1 and len(model.streams[0].pushed) == 200


def test_other_containers_are_rejected(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")
    with pytest.raises(AudioError, match="a file of type FLAC; a stream accepts samples"):
        fakes.run(clock, session.push(b"fLaC" + bytes(100)))
    assert not len(model.streams[0].pushed)


# -- audio -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "channels", "frames", "sizes"),
    [
        (16000, 1, 40000, [16000, 16000, 8000]),  # one second at a time
        (16000, 1, 16000, [16000]),
        (16000, 1, 16001, [16000, 1]),
        (44100, 2, 70000, [32768, 32768, 4464]),  # at most 65536 values
        (96000, 1, 70000, [65536, 4464]),
        (8000, 1, 0, []),
    ],
)
def test_long_messages_are_processed_in_slices(
    fakes: Any, model: Any, clock: Any, rate: int, channels: int, frames: int, sizes: list[int]
) -> None:
    here = fakes.start(model, clock)
    session = here.open("test", sample_rate=rate, channels=channels)
    samples = pcm(frames * channels)
    if channels > 1:
        samples = samples.reshape(-1, channels)
    model.events = {"push": [[fakes.event("partial", str(number))] for number in range(len(sizes))]}
    others: list[int] = []  # slices that were processed whenever another task runs

    async def other() -> None:
        while True:
            others.append(len(model.streams[0].calls) - 1)
            await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(other())
        await asyncio.sleep(0)
        events = await session.push_pcm(samples)
        task.cancel()
        assert [event.text for event in events] == [str(number) for number in range(len(sizes))]

    fakes.run(clock, main())
    stream = model.streams[0]
    assert kinds(stream.calls) == ["check", *sizes] and np.array_equal(stream.pushed.reshape(samples.shape), samples)
    assert set(range(1, len(sizes))) <= set(others)
    assert session.audio == pytest.approx(frames / rate)
    assert fakes.metric(here, "audio_seconds_total") == pytest.approx(frames / rate)


def test_a_message_that_is_invalid_anywhere_is_not_processed(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")
    model.check_error = AudioError("NaN.")
    with pytest.raises(AudioError):
        fakes.run(clock, session.push(pcm(40000).tobytes()))
    assert kinds(model.streams[0].calls) == ["check"] and session.audio == 0


def test_no_slice_is_processed_after_the_session_is_closed(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")

    async def main() -> None:
        pushing = asyncio.create_task(session.push_pcm(pcm(64000)))
        await asyncio.sleep(0)
        session.close()
        await pushing

    fakes.run(clock, main())
    assert kinds(model.streams[0].calls) == ["check", 16000] and session.audio == 1.0


@pytest.mark.parametrize(
    ("chunk_ms", "frames", "steps", "is_live"),
    [
        (560, 1600, 1, True),  # a message is shorter than the chunk that it completes
        (80, 3200, 3, True),  # a message of several chunks
        (80, 24000, 1, True),
        (80, 24001, 1, False),  # more than 1.5 s at once
        (80, 1600, 0, False),  # no chunk is complete
    ],
)
def test_latency_of_messages(
    fakes: Any,
    model: Any,
    clock: Any,
    monkeypatch: pytest.MonkeyPatch,
    chunk_ms: int,
    frames: int,
    steps: int,
    is_live: bool,
) -> None:
    here = fakes.start(model, clock)
    session = here.open("test", chunk_ms=chunk_ms)
    model.seconds, model.steps = 0.25, steps
    recorded: list[Any] = []
    monkeypatch.setattr(here, "record_latency", lambda *values: recorded.append(values))
    fakes.run(clock, session.push(pcm(frames).tobytes()))
    slices = -(-frames // 16000)
    assert recorded == [(chunk_ms, pytest.approx(0.25 * slices), pytest.approx(frames / 16000))] * is_live


# -- utterances --------------------------------------------------------------------------------------------------------


def test_events_of_a_session(fakes: Any, model: Any, clock: Any) -> None:
    """Finals are recorded and are the text; a cleared utterance is not."""
    here = fakes.start(model, clock)
    session = here.open("test")
    partial, first, second, third = (
        fakes.event("partial", "one"),
        fakes.event("final", "one two"),
        fakes.event("final", "three", 1),
        fakes.event("final", "four", 2),
    )
    model.events = {
        "push": [[partial], [partial, first, fakes.end()]],
        "end_utterance": [[second], [fakes.event("final", "cleared", 1)]],
        "finish": [[third]],
    }

    async def main() -> None:
        assert session.text == ""
        assert await session.push(pcm(16).tobytes()) == [partial] and session.text == ""
        assert await session.push(pcm(16).tobytes()) == [partial, first, fakes.end()]
        assert await session.commit() == [second]
        assert await session.clear() is None
        assert session.text == "one two three"
        assert await session.finish() == [third]
        assert await session.finish() == await session.commit() == []
        await session.clear()

    fakes.run(clock, main())
    assert session.text == "one two three four" and fakes.metric(here, "utterances_total") == 3
    stream = model.streams[0]
    assert kinds(stream.calls) == ["check", 16] * 2 + ["check", "end_utterance", "end_utterance", "check", "finish"]
    assert stream.closed == 1 and not here.sessions and session.error is None
    with pytest.raises(StreamError, match="the stream was finished"):
        fakes.run(clock, session.push(b"ab"))


def test_the_texts_of_scripts_without_spaces_are_joined(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")
    model.events = {"end_utterance": [[fakes.event("final", text)] for text in ("你好。", "再见", "OK", "Sí")]}

    async def main() -> None:
        for _ in range(4):
            await session.commit()

    fakes.run(clock, main())
    assert session.text == "你好。再见OK Sí"


def test_finals_are_normalized(fakes: Any, model: Any, clock: Any) -> None:
    class Upper:
        async def rewrite(self, event: Any) -> Any:
            assert event.kind == "final"
            return dataclasses.replace(event, text=event.text.upper())

    here = fakes.start(model, clock)
    session = here.open("test", normalizer=Upper())
    here.settings.log_transcripts = True
    partial, final = fakes.event("partial", "one"), fakes.event("final", "one two")
    model.events = {"push": [[partial, final, fakes.end()]], "end_utterance": [[final]], "finish": [[final]]}

    async def main() -> list[Any]:
        return [await session.push(pcm(16).tobytes()), await session.commit(), await session.finish()]

    pushed, committed, finished = fakes.run(clock, main())
    assert [event.text for event in pushed] == ["one", "ONE TWO", ""]
    assert [event.text for event in (*committed, *finished)] == [
        "ONE TWO"
    ] * 2 and session.text == "ONE TWO " * 2 + "ONE TWO"


def test_the_language_of_a_session(fakes: Any, model: Any) -> None:
    session = fakes.start(model).open("test")
    model.streams[0].language, model.streams[0].detected = "auto", None
    assert session.language == "auto" and session.text_language is None
    model.streams[0].detected = "de-DE"
    assert session.text_language == "de-DE"


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "recorded"),
    [
        (None, None),
        (AudioError("the audio is bad."), "the audio is bad."),
        (asyncio.CancelledError(), "cancelled"),
        (ValueError("internal"), "cancelled"),
    ],
)
def test_leaving_the_context_closes_the_session(
    fakes: Any, model: Any, clock: Any, error: Any, recorded: str | None
) -> None:
    here = fakes.start(model, clock)
    session = here.open("test")

    async def main() -> None:
        async with session as entered:
            assert entered is session
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            fakes.run(clock, main())
    else:
        fakes.run(clock, main())
    assert session.error == recorded and model.streams[0].closed == 1 and not here.sessions
    assert (fakes.metric(here, "streams_failed_total", transport="test") or 0) == (recorded is not None)
    with pytest.raises(StreamError):
        fakes.run(clock, session.push_pcm(pcm(1)))


def test_a_failed_call_leaves_the_session_to_its_protocol(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")
    model.error = BackendError("the step failed.")
    for call in (lambda: session.push(b"ab"), session.commit):
        with pytest.raises(BackendError):
            fakes.run(clock, call())
    assert model.streams[0].closed == 0 and session.error is None


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("idle_seconds", "max_seconds", "waits", "at", "message"),
    [
        (30, 100, [], 30.0, "nothing was received for 30 s; open a new stream."),
        (30, 100, [29, 29], 88.0, "nothing was received for 30 s; open a new stream."),
        (30, 100, [29, 29, 29], 100.0, "the stream was open for 100 s, the longest allowed."),
        (30, 30, [], 30.0, "the stream was open for 30 s, the longest allowed."),
        (30, 100, [25, 25, 25, 25], 100.0, "the stream was open for 100 s, the longest allowed."),
    ],
)
def test_timeouts_of_receiving(
    fakes: Any,
    model: Any,
    clock: Any,
    idle_seconds: float,
    max_seconds: float,
    waits: list[int],
    at: float,
    message: str,
) -> None:
    clock.now = 1000.0
    session = fakes.start(model, clock, idle_seconds=idle_seconds, max_seconds=max_seconds).open("test")

    async def main() -> None:
        for seconds in [*waits, 1000]:
            async with session.receiving():
                await asyncio.sleep(seconds)

    with pytest.raises(Expired) as caught:
        fakes.run(clock, main())
    assert str(caught.value) == message and not caught.value.unread and clock() - 1000 == at


def test_timeout_of_sending(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock, send_seconds=7).open("test")

    async def main() -> None:
        async with session.sending():
            await asyncio.sleep(6.9)
        async with session.sending():
            await asyncio.sleep(100)

    with pytest.raises(Expired, match="results were not read for 7 s") as caught:
        fakes.run(clock, main())
    assert caught.value.unread and clock() == pytest.approx(13.9)


def delays(fakes: Any, clock: Any, steps: list[Any]) -> list[float]:
    """Return how long each step is delayed; a number is time that passes before the next step."""
    found: list[float] = []

    async def main() -> None:
        for step in steps:
            if isinstance(step, int | float):
                await asyncio.sleep(step)
                continue
            before = clock()
            await step()
            found.append(round(clock() - before, 6))

    fakes.run(clock, main())
    return found


def test_the_byte_rate_of_a_client_is_limited(fakes: Any, model: Any, clock: Any) -> None:
    """Two seconds at the maximum rate are not delayed; time that passes makes room for more."""
    session = fakes.start(model, clock, max_bytes_per_second=100_000).open("test")
    second = lambda: session.pace(100_000)  # noqa: E731
    assert delays(fakes, clock, [second, second, second, second]) == [0, 0, 1, 1]
    assert delays(fakes, clock, [0.5, second, 10, second, second, second]) == [0.5, 0, 0, 1]


def test_small_messages_count_as_2048_bytes(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock, max_bytes_per_second=2048).open("test")
    one = lambda: session.push(b"ab")  # noqa: E731
    assert delays(fakes, clock, [one, one, one]) == [0, 0, 1]
    exact = fakes.start(model, clock, max_bytes_per_second=2048).open("test")
    assert delays(fakes, clock, [lambda: exact.pace(2048), lambda: exact.pace(4096)]) == [0, 1]


def test_each_end_of_an_utterance_counts_as_50_ms(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")
    assert delays(fakes, clock, [session.commit] * 20 + [session.clear] * 20) == [0] * 40
    assert delays(fakes, clock, [session.commit, session.clear, session.pace_operation]) == [0.05] * 3


def test_the_rate_continues_in_the_next_session_of_the_client(fakes: Any, model: Any, clock: Any) -> None:
    here = fakes.start(model, clock, max_bytes_per_second=100_000)
    first = here.open("test")
    assert delays(fakes, clock, [lambda: first.pace(200_000), 0.5]) == [0]
    second = here.open("test")
    second.continue_pace(first)
    assert delays(fakes, clock, [lambda: second.pace(100_000)]) == [0.5]


def test_the_size_of_messages_is_limited(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock, max_message_bytes=2000).open("test")

    async def main() -> None:
        await session.push(bytes(2000))
        await session.pace(5000, 5000)
        with pytest.raises(AudioError, match="a message has 2001 bytes; the maximum is 2000"):
            await session.push(bytes(2001))
        with pytest.raises(AudioError, match="a message has 5001 bytes; the maximum is 5000"):
            await session.pace(5001, 5000)

    fakes.run(clock, main())
    assert session.audio == 1000 / 16000


def test_other_tasks_run_between_messages(fakes: Any, model: Any, clock: Any) -> None:
    session, ran = fakes.start(model, clock).open("test"), []

    async def main() -> None:
        asyncio.get_running_loop().call_soon(ran.append, "other")
        await session.pace(1)
        assert ran == ["other"]

    fakes.run(clock, main())


# -- audio without a task ----------------------------------------------------------------------------------------------


def start_push(session: Any, data: bytes, **options: int) -> asyncio.Future[Any]:
    """Call `Session.start_push`, and return a future of its result."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_pushed(result: Any) -> None:
        future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    assert session.start_push(data, on_pushed, **options)
    return future


@pytest.mark.parametrize("seconds", [0.0, 0.25])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "messages",
    [
        [b"a", bytes(2001), b"", pcm(640, 7).tobytes(), pcm(16_000).tobytes()],
        [wav(pcm(2000), 8000)[:50], wav(pcm(2000), 8000)[50:], bytes(100)],
    ],
)
def test_audio_without_a_task_is_processed_as_with_one(
    fakes: Any, clock: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int, messages: list[bytes]
) -> None:
    """The same events, audio, metrics, latencies and rate, for messages that divide samples and for a WAV file."""
    observed: list[Any] = []
    for direct in (False, True):
        model = fakes.FakeModel()
        here = fakes.start(model, clock)
        model.seconds, model.steps = seconds, steps
        model.events = {"push": [[fakes.event("partial", "one")], [fakes.event(), fakes.end()], []]}
        latencies: list[Any] = []
        monkeypatch.setattr(here, "record_latency", lambda *values, to=latencies: to.append(values))
        session = here.open("test")
        events: list[Any] = []

        async def main(session: Any = session, events: Any = events, direct: bool = direct) -> None:
            for data in messages:
                events.append(await (start_push(session, data) if direct else session.push(data)))

        fakes.run(clock, main())
        stream = model.streams[-1]
        observed.append(
            (
                events,
                session.audio,
                session.text,
                kinds([call for call in stream.calls if not isinstance(call, str)]),
                np.concatenate([call for call in stream.calls if not isinstance(call, str)]).tolist(),
                [(ms, round(took, 6), audio) for ms, took, audio in latencies],
                round(session._pending_seconds, 9),
                fakes.metric(here, "audio_seconds_total"),
                fakes.metric(here, "utterances_total"),
            )
        )
    assert observed[0] == observed[1]
    assert session.text == "one two" and len(latencies) == (len(messages) - messages.count(b"") - 1 if steps else 0)


def test_audio_that_needs_a_task(fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no effect: the rate, the stream and the decoder are unchanged."""
    monkeypatch.setattr("nemostream.serving.service.find_spec", lambda name: name)
    fail = lambda result: pytest.fail(str(result))  # noqa: E731
    here = fakes.start(model, clock, max_bytes_per_second=100_000, max_message_bytes=40_000)
    refused = [
        (here.open("test"), bytes(32_002)),  # more than a second of audio
        (here.open("test", sample_rate=48_000), bytes(40_002)),  # larger than a message
        (here.open("test", vad=True), bytes(100)),
        (here.open("test", normalizer=object()), bytes(100)),
    ]

    async def main() -> None:
        fast = here.open("test")
        for size in (32_000,) * 6:
            await start_push(fast, bytes(size))
        assert not fast.start_push(bytes(8002), fail)
        await start_push(fast, bytes(8000))
        assert not fast.start_push(b"", fail)
        await asyncio.sleep(1)
        await start_push(fast, bytes(2000), message_bytes=100_000 - 2048)
        assert not fast.start_push(b"", fail, message_bytes=1)
        for session, data in refused:
            assert not session.start_push(data, fail) and session.audio == 0.0 and not session._pending_seconds
            await start_push(refused[0][0], bytes(32_000))

    fakes.run(clock, main())
    assert all(not stream.calls for stream in model.streams[1:4])


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_errors_without_a_task(fakes: Any, model: Any, clock: Any, seconds: float) -> None:
    session = fakes.start(model, clock).open("test")

    async def main() -> None:
        with pytest.raises(AudioError, match="the audio is a file of type FLAC"):
            await start_push(session, b"fLaC" + bytes(100))
        model.seconds = seconds
        await start_push(session, bytes(100))
        model.error = BackendError("the model failed.")
        with pytest.raises(BackendError, match="the model failed"):
            await start_push(session, bytes(100))
        model.error = None
        await session.finish()
        with pytest.raises(StreamError, match="the stream was finished"):
            await start_push(session, bytes(100))

    fakes.run(clock, main())


def test_a_session_that_is_closed_reports_nothing(fakes: Any, model: Any, clock: Any) -> None:
    session = fakes.start(model, clock).open("test")
    model.seconds = 1.0

    async def main() -> None:
        pushed = start_push(session, bytes(100))
        session.close()
        await asyncio.sleep(2)
        assert not pushed.done()

    fakes.run(clock, main())


@pytest.mark.parametrize(
    ("seconds", "pushes", "max_seconds", "at", "message"),
    [
        (0.0, [20, 20], 100, 70.0, "nothing was received for 30 s"),
        (5.0, [20, 20], 100, 75.0, "nothing was received for 30 s"),  # after the audio is decoded
        (50.0, [20], 100, 100.0, "the stream was open for 100 s"),
        (50.0, [20], 60, 70.0, "the stream was open for 60 s"),  # when the audio is decoded
        (0.0, [29, 29, 29], 100, 100.0, "the stream was open for 100 s"),
    ],
)
def test_audio_without_a_task_restarts_the_idle_timeout(
    fakes: Any, model: Any, clock: Any, seconds: float, pushes: list[int], max_seconds: float, at: float, message: str
) -> None:
    session = fakes.start(model, clock, idle_seconds=30, max_seconds=max_seconds).open("test")
    model.seconds = seconds

    async def push() -> None:
        for wait in pushes:
            await asyncio.sleep(wait)
            start_push(session, bytes(100))

    async def main() -> None:
        pushing = asyncio.create_task(push())
        async with session.receiving():
            await asyncio.sleep(1000)
        await pushing

    with pytest.raises(Expired, match=message):
        fakes.run(clock, main())
    assert clock() == pytest.approx(at, abs=0.1)
