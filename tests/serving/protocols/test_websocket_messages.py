"""`/v1/stream`: what each option, message and event field means, and each way a connection ends, with a fake model."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest

from nemostream.errors import AudioError, BackendError, CapacityError, OptionError
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.serving import service as service_module
from nemostream.serving.protocols.http import create_app

FINISH = {"type": "finish"}


@pytest.fixture
def here(fakes: Any, model: Any, clock: Any) -> Any:
    return fakes.start(model, clock)


def serve(fakes: Any, here: Any, *messages: Any, query: str = "", **options: Any) -> Any:
    """Serve one connection of a client that sends these messages, and return the client."""
    socket = fakes.FakeSocket(create_app(here), "/v1/stream" + query, **options).push(*messages)
    return fakes.run(here.clock, socket.serve())


# -- options -----------------------------------------------------------------------------------------------------------


def test_each_option_sets_what_it_names(fakes: Any, here: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "find_spec", lambda name: name)
    phrases = quote('{"nine": 2.5}')
    query = (
        "?sample_rate=8000&channels=2&encoding=mulaw&chunk_ms=160&final_chunk_ms=560&language=en-GB&endpoint_ms=1234&endpoint_model=0"
        f"&max_utterance_ms=5678&decoder=reset&phrases={phrases}&vad=1"
    )
    serve(fakes, here, b"\0\0\0\0\0\0\0\0", FINISH, query=query)
    (stream,) = model.streams
    assert (stream.sample_rate, stream.channels) == (8000, 2) and stream.pushed[0, 0] == -32124  # code 0 of mu-law
    assert stream.options == {
        "chunk_ms": 160,
        "final_chunk_ms": 560,
        "endpoint": Endpoint(1234, 5678, "reset", False),
        "phrases": ("compiled", {"nine": 2.5}),
        "vad": True,
        "language": "en",
    }


@pytest.mark.parametrize(("value", "silence_ms"), [("-1", None), ("0", 800), ("80", 80), ("60000", 60_000)])
def test_values_of_endpoint_ms(fakes: Any, here: Any, model: Any, value: str, silence_ms: int | None) -> None:
    serve(fakes, here, FINISH, query=f"?endpoint_ms={value}")
    assert model.streams[0].options["endpoint"] == Endpoint(silence_ms, 300_000)


@pytest.mark.parametrize(
    ("value", "flag"), [("1", True), ("true", True), ("TRUE", True), ("0", False), ("false", False), ("False", False)]
)
def test_values_of_flags(fakes: Any, here: Any, model: Any, value: str, flag: bool) -> None:
    serve(fakes, here, FINISH, query=f"?endpoint_model={value}")
    assert model.streams[0].options["endpoint"].model is flag


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("voice=1", "there is no option 'voice'; the options are sample_rate, channels, encoding, chunk_ms"),
        ("endpoint_ms=-2", "endpoint_ms is -2"),
        ("endpoint_model=yes", "endpoint_model has an invalid value: 'yes'."),
        ("words=", "words has an invalid value: ''."),
        ("chunk_ms=8e1", "chunk_ms has an invalid value: '8e1'."),
        ("phrases=7", "phrases has an invalid value: '7'."),
        ("phrases=" + "[" * 20_000, "phrases has an invalid value"),
    ],
)
def test_invalid_options_are_named(fakes: Any, here: Any, model: Any, query: str, message: str) -> None:
    status, body = serve(fakes, here, query="?" + query).rejection
    assert status == 400 and message in body["error"]["message"] and body["error"]["code"] == "option"
    assert not model.streams


def test_a_full_server_rejects_the_handshake(fakes: Any, here: Any, model: Any) -> None:
    here.max_streams = 0
    socket = serve(fakes, here)
    assert socket.rejection[0] == 429 and socket.rejection[1]["error"]["code"] == "capacity"
    start = socket.sent[0]
    assert (b"retry-after", b"2") in start["headers"] and not here.sessions


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_inverse_text_normalization_is_an_option(
    fakes: Any, here: Any, monkeypatch: pytest.MonkeyPatch, enabled: str
) -> None:
    requested: list[Any] = []

    async def normalizer(enabled: bool, language: str | None = None) -> Any:
        requested.append((enabled, language))

    monkeypatch.setattr(here, "normalizer", normalizer)
    serve(fakes, here, FINISH, query=f"?itn={enabled}&language=en-GB")
    serve(fakes, here, FINISH)
    assert requested == [(enabled == "1", "en-GB"), (False, None)]


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "selected"),
    [([], None), (["other"], None), (["openai-insecure-api-key.k", "nemostream"], "nemostream")],
)
def test_the_subprotocol_is_selected_if_it_is_offered(fakes: Any, here: Any, offered: Any, selected: Any) -> None:
    socket = serve(fakes, here, FINISH, subprotocols=offered)
    assert socket.sent[0]["type"] == "websocket.accept" and socket.sent[0]["subprotocol"] == selected


def test_events_of_a_stream_from_ready_to_done(fakes: Any, here: Any, model: Any) -> None:
    final = fakes.event("final", "one two", 4, stable="one two", language=None)
    model.events = {
        "push": [
            [fakes.event("partial", "one two"), fakes.event("backchannel", "one")],
            [final, fakes.end(utterance=4)],
        ],
        "end_utterance": [[fakes.event("final", "three"), fakes.end("forced")]],
        "finish": [[fakes.event("final", "four"), fakes.end("finish")]],
    }
    socket = serve(
        fakes,
        here,
        bytes(3202),
        b"",
        {"type": "keepalive"},
        bytes(6400),
        {"type": "commit"},
        FINISH,
        query="?chunk_ms=160&language=en-US",
    )
    ready, partial, backchannel, first, end, second, committed, third, done = socket.events
    assert ready == {
        "type": "ready",
        "stream": ready["stream"],
        "chunk_ms": 160,
        "final_chunk_ms": None,
        "language": "en",
        "model": "demo",
    }
    common = {"language": "en", "start": 0.123, "end": 1.235, "audio": 2.346, "chunk_ms": 160}
    assert partial == common | {"type": "partial", "utterance": 0, "text": "one two", "stable": "one"}
    assert backchannel == common | {"type": "backchannel", "utterance": 0, "text": "one", "stable": ""}
    expected = {"type": "final", "utterance": 4, "text": "one two", "stable": "one two", "language": None}
    assert first == common | expected
    assert end == {
        "type": "end",
        "utterance": 4,
        "reason": "silence",
        "time": 1.5,
        "audio": 2.5,
        "chunk_ms": 80,
    }
    assert (second["text"], third["text"]) == ("three", "four")
    assert committed == {"type": "committed", "audio": 0.3}  # 4801 samples
    assert done == {"type": "done", "text": "one two three four", "audio": 0.3}
    assert socket.close == (1000, "") and not here.sessions
    assert (fakes.metric(here, "streams_failed_total", transport="websocket") or 0) == 0
    assert fakes.metric(here, "streams_opened_total", transport="websocket") == 1
    assert fakes.metric(here, "timeouts_total") == 0


@pytest.mark.parametrize(
    ("reason", "sent"), [("model", 1), ("silence", 1), ("length", 1), ("forced", 0), ("finish", 0)]
)
def test_ends_that_the_client_requested_are_not_sent(fakes: Any, here: Any, model: Any, reason: str, sent: int) -> None:
    model.events = {"push": [[fakes.end(reason)]]}
    socket = serve(fakes, here, bytes(32), FINISH)
    assert [one.get("reason") for one in socket.events[1:-1]] == [reason] * sent


def test_words_of_events(fakes: Any, here: Any, model: Any) -> None:
    """A partial has the words that are new since the last event, a final has all."""
    later = fakes.event("partial", "one two three", tokens_from=2, text_from=7)
    model.events = {"push": [[fakes.event("partial", "one two"), later, fakes.event("final", "one two three")]]}
    socket = serve(fakes, here, bytes(32), FINISH, query="?words=1")
    _, first, second, final, _ = socket.events
    words = [
        {"text": "one", "start": 0.0, "end": 0.25, "confidence": 0.9},
        {"text": "two", "start": 0.5, "end": 0.75, "confidence": 0.65},
        {"text": "three", "start": 1.0, "end": 1.25, "confidence": 0.4},
    ]
    assert (first["words_from"], first["words"]) == (0, words[:2])
    assert (second["words_from"], second["words"]) == (1, words[1:])
    assert (final["words_from"], final["words"]) == (0, words)
    assert "words" not in serve(fakes, here, bytes(32), FINISH, query="?words=0").events[-1]


def test_configure_changes_what_it_names(fakes: Any, here: Any, model: Any) -> None:
    socket = serve(
        fakes,
        here,
        {"type": "configure", "chunk_ms": 80},
        {"type": "configure", "language": "en-GB"},
        {"type": "configure"},
        {"type": "configure", "chunk_ms": None},
        {"type": "configure", "language": None, "chunk_ms": 80},
        {"type": "configure", "chunk_ms": 81},
        FINISH,
    )
    assert model.streams[0].calls[:2] == [("chunk_ms", 80), ("language", "en")]
    assert [call for call in model.streams[0].calls if isinstance(call, tuple)] == model.streams[0].calls[:2]
    _, *rejected, done = socket.events
    assert [(one["type"], one["code"]) for one in rejected] == [("rejected", "option")] * 4 and done["type"] == "done"
    assert [one["message"].partition(";")[0] for one in rejected] == [
        "configure has no option",
        "chunk_ms of configure is null",
        "language of configure is null",
        "chunk_ms is 81",
    ]


def test_configure_changes_the_chunk_size_of_finals(fakes: Any, here: Any, model: Any) -> None:
    here.max_streams = 4  # slots: this stream, its accurate lane and one that is reserved
    messages = [
        {"type": "configure", "final_chunk_ms": 1120},
        {"type": "configure", "final_chunk_ms": 1120.5},
        {"type": "configure", "final_chunk_ms": None},
        {"type": "configure", "chunk_ms": 80, "final_chunk_ms": 160},
        {"type": "configure", "final_chunk_ms": 0},
        {"type": "configure", "chunk_ms": 560, "final_chunk_ms": 560},
    ]
    socket = serve(fakes, here, *messages, FINISH)
    (stream,) = model.streams
    assert [call for call in stream.calls if isinstance(call, tuple)] == [
        ("final_chunk_ms", 1120),
        ("final_chunk_ms", None),
        ("chunk_ms", 80),
        ("final_chunk_ms", 160),
        ("final_chunk_ms", None),
    ]
    ready, *rejected, _ = socket.events
    assert ready["final_chunk_ms"] is None and [one["code"] for one in rejected] == ["option"] * 2
    here.max_streams = 2
    rejected = [one for one in serve(fakes, here, *messages, FINISH).events if one["type"] == "rejected"]
    assert [one["code"] for one in rejected] == ["capacity", "option", "capacity", "option"]
    ready = serve(fakes, fakes.start(model, here.clock, chunk_ms=80, final_chunk_ms=560), FINISH).events[0]
    assert (ready["chunk_ms"], ready["final_chunk_ms"]) == (80, 560)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no message of type 'None'; send commit, configure, finish, keepalive, or audio."),
        ('{"type": "unknown"}', "there is no message of type 'unknown'"),
        ("[]", "a text message must be a JSON object"),
        ("{", "a text message must be JSON"),
        ("[" * 50_000, "a text message must be JSON"),
        ('{"type": "' + "x" * 65536 + '"}', "a text message has 65548 characters; the maximum is 65536."),
    ],
)
def test_invalid_text_messages(fakes: Any, here: Any, text: str, message: str) -> None:
    socket = serve(fakes, here, text)
    error = socket.events[-1]
    assert (error["type"], error["code"]) == ("error", "option") and message in error["message"]
    assert socket.close is not None and socket.close[0] == 1008
    assert fakes.metric(here, "streams_failed_total", transport="websocket") == 1 and not here.sessions


def test_the_longest_text_message(fakes: Any, here: Any) -> None:
    text = json.dumps(FINISH)
    assert serve(fakes, here, text + " " * (65536 - len(text))).close == (1000, "")


def test_a_text_message_counts_as_8_kib_of_audio(fakes: Any, model: Any, clock: Any) -> None:
    """Also if that is more than a message may have."""
    here = fakes.start(model, clock, max_message_bytes=1024, max_bytes_per_second=8192)
    socket = serve(fakes, here, *[{"type": "keepalive"}] * 4, bytes(1024), FINISH)
    assert socket.close == (1000, "") and clock() == pytest.approx(2 + 2048 / 8192 + 1)
    socket = serve(fakes, here, {"type": "keepalive", "x": "x" * 1000})
    assert "a message has 1030 bytes; the maximum is 1024" in socket.events[-1]["message"]


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1000, 1001, 1006, None])
def test_a_client_that_disconnects(fakes: Any, here: Any, model: Any, caplog: Any, code: int | None) -> None:
    """Nothing is sent to it, its session is closed as failed, and no message after the disconnection is read."""
    caplog.set_level("INFO")
    socket = serve(fakes, here, bytes(32), code, bytes(32), FINISH)
    assert [one["type"] for one in socket.events] == ["ready"] and socket.close is None
    assert not here.sessions and model.streams[0].closed and len(model.streams[0].pushed) == 16
    assert fakes.metric(here, "streams_failed_total", transport="websocket") == 1
    assert fakes.metric(here, "streams", transport="websocket") == 0 and fakes.metric(here, "timeouts_total") == 0
    (closed,) = fakes.records(caplog, "stream closed")
    assert closed.error == "the client disconnected"


def test_a_connection_that_the_system_closed_because_it_is_not_read(fakes: Any, here: Any) -> None:
    socket = fakes.FakeSocket(create_app(here), "/v1/stream").push(1006)
    socket.scope["nemostream.timed_out"] = True
    fakes.run(here.clock, socket.serve())
    assert fakes.metric(here, "timeouts_total") == 1 and not here.sessions


@pytest.mark.parametrize(
    ("error", "code", "close"),
    [
        (AudioError("the audio is bad."), "audio", 1007),
        (OptionError("no."), "option", 1008),
        (BackendError("the step failed."), "model", 1011),
        (CapacityError("full."), "capacity", 1013),
    ],
)
def test_errors_close_the_connection_with_their_code(
    fakes: Any, here: Any, model: Any, error: Any, code: str, close: int
) -> None:
    model.error = error
    socket = serve(fakes, here, bytes(32))
    assert socket.events[-1] == {"type": "error", "code": code, "message": str(error)}
    assert socket.close == (close, str(error))
    assert fakes.metric(here, "streams_failed_total", transport="websocket") == 1
    assert not here.sessions and fakes.metric(here, "timeouts_total") == 0


def test_the_reason_of_a_close_frame_is_at_most_120_bytes(fakes: Any, here: Any, model: Any) -> None:
    model.error = AudioError("a" * 119 + "ü" * 9)
    assert serve(fakes, here, bytes(32)).close == (1007, "a" * 119)  # no half of a character
    model.error = AudioError("a" * 118 + "ü" * 9)
    assert serve(fakes, here, bytes(32)).close == (1007, "a" * 118 + "ü")


def test_a_client_that_sends_nothing(fakes: Any, model: Any, clock: Any) -> None:
    here = fakes.start(model, clock, idle_seconds=30)
    socket = serve(fakes, here, bytes(32))
    assert clock() == 30 and socket.events[-1]["code"] == "expired"
    assert socket.close == (1008, "nothing was received for 30 s; open a new stream.")
    assert fakes.metric(here, "timeouts_total") == 1 and not here.sessions
    assert fakes.metric(here, "streams_failed_total", transport="websocket") == 1


def test_a_client_that_does_not_read(fakes: Any, model: Any, clock: Any) -> None:
    """It is not sent another event, which would block too."""
    here = fakes.start(model, clock, send_seconds=10)
    model.events = {"push": [[fakes.event("partial")]]}
    socket = fakes.FakeSocket(create_app(here), "/v1/stream").push(bytes(32))

    async def on_send(message: Any) -> None:
        if message["type"] == "websocket.send" and "partial" in message["text"]:
            await asyncio.sleep(1e6)
        assert "error" not in message.get("text", "")

    socket.on_send = on_send
    fakes.run(clock, socket.serve())
    assert clock() == 10 and socket.close == (1008, "results were not read for 10 s.")
    assert fakes.metric(here, "timeouts_total") == 1 and not here.sessions


def test_a_client_that_is_gone_when_an_error_is_sent(fakes: Any, here: Any, model: Any) -> None:
    model.error = BackendError("the step failed.")
    socket = fakes.FakeSocket(create_app(here), "/v1/stream").push(bytes(32))

    async def on_send(message: Any) -> None:
        if "error" in message.get("text", ""):
            raise OSError

    socket.on_send = on_send
    fakes.run(here.clock, socket.serve())
    assert not here.sessions and fakes.metric(here, "streams_failed_total", transport="websocket") == 1


@pytest.mark.parametrize("at", ["websocket.accept", "websocket.send"])
def test_an_internal_error_closes_the_session(fakes: Any, here: Any, model: Any, at: str) -> None:
    socket = fakes.FakeSocket(create_app(here), "/v1/stream").push(FINISH)
    with pytest.raises(ZeroDivisionError):
        fakes.run(here.clock, socket.fail_at(at).serve())
    assert not here.sessions and model.streams[0].closed
    assert fakes.metric(here, "streams_failed_total", transport="websocket") == 1
