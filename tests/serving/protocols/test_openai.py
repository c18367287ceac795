"""The OpenAI-compatible API, tested with the `openai` package."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import soxr
import srt
import webvtt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

import nemostream


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


def test_response_formats(client: Any, spoken: Any) -> None:
    clip = spoken[0]
    create = client.audio.transcriptions.create
    assert create(model="any", file=clip.path).text == clip.text
    assert create(model="any", file=clip.path, response_format="text").strip() == clip.text
    verbose = create(
        model="any", file=clip.path, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert verbose.text == clip.text and verbose.duration == pytest.approx(clip.seconds, abs=1e-3)
    assert [word.word for word in verbose.words] == clip.text.split()
    assert " ".join(segment.text for segment in verbose.segments) == clip.text
    assert all(word.start < word.end <= clip.seconds + 0.2 for word in verbose.words)
    cues = list(srt.parse(create(model="any", file=clip.path, response_format="srt")))
    assert " ".join(cue.content.replace("\n", " ") for cue in cues) == clip.text
    assert [cue.start.total_seconds() for cue in cues[:1]] == [verbose.words[0].start]
    assert all(cue.end.total_seconds() <= max(clip.seconds, verbose.words[-1].end) for cue in cues)
    captions = webvtt.from_string(create(model="any", file=clip.path, response_format="vtt"))
    assert [cue.text for cue in captions] == [cue.content for cue in cues]


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_containers(client: Any, spoken: Any, format: str) -> None:
    audio, file = np.frombuffer(spoken[0].pcm, np.int16), io.BytesIO()
    soundfile.write(file, audio, 16000, format=format)
    with nemostream.load() as model:
        decoded, rate = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
        expected = model.transcribe(decoded, sample_rate=rate).text
    text = client.audio.transcriptions.create(model="any", file=(f"x.{format.lower()}", file.getvalue())).text
    assert text == expected and len(text.split()) >= 4


def test_streamed_deltas_form_the_text(client: Any, spoken: Any) -> None:
    events = list(client.audio.transcriptions.create(model="any", file=spoken[0].path, stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert events[-1].type == "transcript.text.done" and events[-1].text == spoken[0].text
    assert "".join(deltas) == spoken[0].text and len(deltas) >= 3


def test_silence_gives_empty_text(client: Any) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16000, np.int16), 16000, format="WAV")
    assert client.audio.transcriptions.create(model="any", file=("x.wav", file.getvalue())).text == ""
    assert client.audio.transcriptions.create(
        model="any", file=("x.wav", file.getvalue()), response_format="vtt"
    ).startswith("WEBVTT")


def test_invalid_requests(client: Any, spoken: Any) -> None:
    create = client.audio.transcriptions.create
    for options, word in (
        ({"file": ("cat.png", b"\x89PNG" + bytes(99))}, "cat.png"),
        ({"file": ("empty.wav", b"")}, "empty.wav"),
        ({"file": spoken[0].path, "language": "de"}, "language"),
        ({"file": spoken[0].path, "extra_body": {"chunk_ms": 33}}, "chunk_ms"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="any", **options)
        assert word in caught.value.message and "/tmp" not in caught.value.message
    with pytest.raises(openai.BadRequestError, match="response_format"):
        create(model="any", file=spoken[0].path, response_format="diarized_json")


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


# -- realtime ----------------------------------------------------------------------------------------------------------


def at_24_khz(pcm: bytes) -> bytes:
    return soxr.resample(np.frombuffer(pcm, np.int16), 16000, 24000).tobytes()


def encoded(pcm: bytes) -> str:
    return base64.b64encode(pcm).decode()


async def until(connection: Any, *kinds: str) -> list[Any]:
    """Return the events up to and including the first one of the given types."""
    events = []
    async with asyncio.timeout(30):
        while True:
            event = await connection.recv()
            events.append(event)
            if event.type in kinds:
                return events


COMPLETED = "conversation.item.input_audio_transcription.completed"
DELTA = "conversation.item.input_audio_transcription.delta"


def manual(**input_: Any) -> dict[str, Any]:
    return {"type": "transcription", "audio": {"input": {"turn_detection": None, **input_}}}


def test_a_realtime_session_with_commits(server: Any, spoken: Any) -> None:
    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any")
        async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            (created,) = await until(connection, "session.created")
            assert created.session.type == "transcription"
            await connection.session.update(session=manual())
            (updated,) = await until(connection, "session.updated")
            assert updated.session.audio.input.turn_detection is None
            last = None
            for clip in spoken[:2]:
                pcm = at_24_khz(clip.pcm)
                for start in range(0, len(pcm), 4800):
                    await connection.input_audio_buffer.append(audio=encoded(pcm[start : start + 4800]))
                await connection.input_audio_buffer.commit()
                events = await until(connection, COMPLETED)
                committed = next(event for event in events if event.type == "input_audio_buffer.committed")
                with nemostream.load() as model:
                    expected = model.transcribe(np.frombuffer(pcm, np.int16), sample_rate=24000).text
                assert events[-1].transcript == expected
                assert "".join(event.delta for event in events if event.type == DELTA) == expected
                assert {event.item_id for event in events} == {committed.item_id}
                assert committed.previous_item_id == last
                last = committed.item_id

    asyncio.run(main())


def test_a_realtime_session_with_accurate_finals(server: Any, spoken: Any) -> None:
    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any")
        async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            await until(connection, "session.created")
            session: Any = manual(transcription={"final_chunk_ms": 1120})
            await connection.session.update(session=session)
            await until(connection, "session.updated")
            early = 0
            with nemostream.load(chunk_ms=1120) as model:
                for clip in spoken:
                    pcm = at_24_khz(clip.pcm)
                    for start in range(0, len(pcm), 4800):
                        await connection.input_audio_buffer.append(audio=encoded(pcm[start : start + 4800]))
                    await connection.input_audio_buffer.commit()
                    events = await until(connection, COMPLETED)
                    expected = model.transcribe(np.frombuffer(pcm, np.int16), sample_rate=24000).text
                    assert events[-1].transcript == expected
                    deltas = [event.delta for event in events if event.type == DELTA]
                    assert "".join(deltas) == expected
                    early += len(deltas) > 1
            assert early > 0

    asyncio.run(main())


def test_a_realtime_session_with_turn_detection(server: Any, spoken: Any) -> None:
    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any")
        async with client.realtime.connect(model="any") as connection:
            await until(connection, "session.created")
            detection = {"type": "server_vad", "silence_duration_ms": 900}
            format_ = {"type": "audio/pcmu"}
            await connection.session.update(session=manual(turn_detection=detection, format=format_))
            await until(connection, "session.updated")
            resampled = soxr.resample(np.frombuffer(spoken[0].pcm, np.int16), 16000, 8000)
            file = io.BytesIO()
            soundfile.write(file, resampled, 8000, format="RAW", subtype="ULAW")
            await connection.input_audio_buffer.append(audio=encoded(file.getvalue() + b"\xff" * 16000))
            events = await until(connection, COMPLETED)
            kinds = [event.type for event in events if event.type != DELTA]
            assert kinds == [
                "input_audio_buffer.speech_started",
                "input_audio_buffer.speech_stopped",
                "input_audio_buffer.committed",
                COMPLETED,
            ]
            assert events[-1].transcript.split()[:2] == spoken[0].text.split()[:2]

    asyncio.run(main())


def test_realtime_errors_keep_the_session_open(server: Any, spoken: Any) -> None:
    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any")
        async with client.realtime.connect(model="any") as connection:
            await until(connection, "session.created")
            for message, word in (
                ({"type": "response.create"}, "response.create"),
                ({"type": "session.update", "session": {"type": "realtime"}}, "transcription"),
                ({"type": "session.update", "session": manual(format={"type": "audio/mp3"})}, "format"),
                ({"type": "session.update", "session": 7}, "session"),
                ({"type": "session.update", "session": manual(format={"type": "audio/pcm", "rate": 1})}, "sample_rate"),
                ({"type": "session.update", "session": manual(format={"type": ["audio/pcm"]})}, "format"),
                ({"type": "input_audio_buffer.append", "audio": "not base64!"}, "base64"),
                ({"type": "input_audio_buffer.append"}, "base64"),
                ({"type": "input_audio_buffer.commit"}, "100 ms"),
            ):
                await connection.send({**message, "event_id": "mine"})
                (error,) = await until(connection, "error")
                assert word in error.error.message and error.error.event_id == "mine"
            # The session still works after the errors; cleared audio is not transcribed.
            await connection.session.update(session=manual())
            await connection.input_audio_buffer.append(audio=encoded(at_24_khz(spoken[1].pcm)))
            await connection.input_audio_buffer.clear()
            await until(connection, "input_audio_buffer.cleared")
            pcm = at_24_khz(spoken[0].pcm)
            await connection.input_audio_buffer.append(audio=encoded(pcm))
            await connection.input_audio_buffer.commit()
            events = await until(connection, COMPLETED)
            with nemostream.load() as model:
                expected = model.transcribe(np.frombuffer(pcm, np.int16), sample_rate=24000).text
            assert events[-1].transcript == expected

    asyncio.run(main())


texts = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.just("audio/pcm"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "audio",
                    "input",
                    "format",
                    "type",
                    "rate",
                    "turn_detection",
                    "silence_duration_ms",
                    "transcription",
                    "language",
                    "model",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
messages = st.one_of(
    st.binary(max_size=100),
    texts,
    values.map(json.dumps),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(
                [
                    "session.update",
                    "input_audio_buffer.append",
                    "input_audio_buffer.commit",
                    "input_audio_buffer.clear",
                    "transcription_session.update",
                    "response.create",
                ]
            )
        },
        optional={
            "session": values,
            "audio": st.one_of(values, st.binary(max_size=20_000).map(encoded)),
            "event_id": values,
        },
    ).map(json.dumps),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(messages, max_size=8))
def test_a_realtime_session_survives_any_messages(server: Any, spoken: Any, sent: list[Any]) -> None:
    with connect(f"{server.socket}/v1/realtime?intent=transcription") as socket:
        for message in sent:
            socket.send(message)
        session = {"type": "transcription", "audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}
        pcm = encoded(spoken[1].pcm)
        for last in (
            {"type": "input_audio_buffer.clear"},
            {"type": "session.update", "session": session},
            {"type": "input_audio_buffer.append", "audio": pcm},
            {"type": "input_audio_buffer.commit"},
        ):
            socket.send(json.dumps(last))
        while (event := json.loads(socket.recv(timeout=30)))["type"] != COMPLETED or not event["transcript"]:
            assert event["type"] != "error" or event["error"]["message"].endswith(".")
    assert socket.close_code == 1000  # closed by the client
