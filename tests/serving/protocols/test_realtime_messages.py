"""`/v1/realtime`: what each event and field does, and each way a connection ends. The model is a fake."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from nemostream.errors import AudioError, BackendError, CapacityError, OptionError
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.serving.protocols import realtime
from nemostream.serving.protocols.http import create_app

COMMIT = {"type": "input_audio_buffer.commit"}
CLEAR = {"type": "input_audio_buffer.clear"}
PREFIX = "conversation.item.input_audio_transcription."


@pytest.fixture
def here(fakes: Any, model: Any, clock: Any) -> Any:
    return fakes.start(model, clock, endpoint_ms=700)


def append(samples: int) -> dict[str, Any]:
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(b"\1\2" * samples).decode()}


def update(**input_: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"type": "transcription", "audio": {"input": input_}}}


def connect(fakes: Any, here: Any, *events: Any, query: str = "", **options: Any) -> Any:
    return fakes.FakeSocket(create_app(here), "/v1/realtime" + query, **options).push(*events)


def exchange(fakes: Any, here: Any, *events: Any, query: str = "", **options: Any) -> list[dict[str, Any]]:
    """Send events, disconnect, and return the responses after `session.created`."""
    created, *responses = serve(fakes, here, *events, 1000, query=query, **options).events
    assert created["type"] == "session.created"
    ids = [one.pop("event_id") for one in (created, *responses)]
    assert len(set(ids)) == len(ids) and all(name.startswith("event_") for name in ids)
    return responses


def serve(fakes: Any, here: Any, *events: Any, query: str = "", **options: Any) -> Any:
    return fakes.run(here.clock, connect(fakes, here, *events, query=query, **options).serve())


def brief(responses: list[dict[str, Any]]) -> list[Any]:
    """Return the responses as tuples of type and the field that matters, with items numbered by their order."""
    items: dict[str, int] = {}

    def item(name: str | None) -> int | None:
        return None if name is None else items.setdefault(name, len(items))

    found: list[Any] = []
    for one in responses:
        kind = one["type"].removeprefix(PREFIX).removeprefix("input_audio_buffer.")
        match kind:
            case "speech_started":
                found.append((kind, item(one["item_id"]), one["audio_start_ms"]))
            case "speech_stopped":
                found.append((kind, item(one["item_id"]), one["audio_end_ms"]))
            case "committed":
                found.append((kind, item(one["item_id"]), item(one["previous_item_id"])))
            case "delta":
                assert one["content_index"] == 0
                found.append((kind, item(one["item_id"]), one["delta"]))
            case "completed":
                assert one["content_index"] == 0 and one["usage"]["type"] == "duration"
                found.append((kind, item(one["item_id"]), one["transcript"], one["usage"]["seconds"]))
            case "error":
                found.append((kind, one["error"]["code"]))
            case _:
                found.append(kind)
    return found


# -- sessions ----------------------------------------------------------------------------------------------------------


def session_object(**changes: Any) -> dict[str, Any]:
    input_: dict[str, Any] = {
        "format": {"type": "audio/pcm", "rate": 24000},
        "transcription": {"model": "nemostream", "language": "en"},
        "noise_reduction": None,
        "turn_detection": {
            "type": "server_vad",
            "silence_duration_ms": 700,
            "threshold": 0.5,
            "prefix_padding_ms": 0,
        },
    }
    return {
        "type": "transcription",
        "object": "realtime.transcription_session",
        "audio": {"input": input_ | changes},
    }


def detection(silence_ms: int) -> dict[str, Any]:
    return {"type": "server_vad", "silence_duration_ms": silence_ms, "threshold": 0.5, "prefix_padding_ms": 0}


def test_the_session_that_is_created(fakes: Any, here: Any, model: Any) -> None:
    socket = serve(fakes, here, 1000, query="?model=whisper-1&intent=transcription", subprotocols=["x", "realtime"])
    assert socket.sent[0] == {"type": "websocket.accept", "subprotocol": "realtime", "headers": []}
    (created,) = socket.events
    session = created["session"]
    assert session.pop("id").startswith("sess_")
    assert session == session_object(transcription={"model": "whisper-1", "language": "en"})
    (stream,) = model.streams
    assert (stream.sample_rate, stream.channels) == (24000, 1)
    assert stream.options == {
        "chunk_ms": 560,
        "final_chunk_ms": None,
        "endpoint": Endpoint(700, 300_000, "keep", True),
        "phrases": None,
        "vad": False,
        "language": "en",
    }
    assert fakes.metric(here, "streams_opened_total", transport="realtime") == 1
    assert serve(fakes, here, 1000, subprotocols=["x"]).sent[0]["subprotocol"] is None
    assert serve(fakes, here, query="?call_id=1").rejection[0] == 400
    here.max_streams = 0
    assert serve(fakes, here).rejection[0] == 429


@pytest.mark.parametrize(
    ("event", "changes", "rate", "endpoint"),
    [
        (update(), {}, 24000, Endpoint(700, 300_000)),
        (
            update(format={"type": "audio/pcm", "rate": 16000}),
            {"format": {"type": "audio/pcm", "rate": 16000}},
            16000,
            Endpoint(700, 300_000),
        ),
        (update(format={"type": "audio/pcmu"}), {"format": {"type": "audio/pcmu"}}, 8000, Endpoint(700, 300_000)),
        (
            update(format={"type": "audio/pcma", "rate": 8000}),
            {"format": {"type": "audio/pcma"}},
            8000,
            Endpoint(700, 300_000),
        ),
        (update(turn_detection=None), {"turn_detection": None}, 24000, Endpoint(None, 300_000, model=False)),
        (update(turn_detection={}), {}, 24000, Endpoint(700, 300_000)),
        (
            update(turn_detection={"silence_duration_ms": 80}),
            {"turn_detection": detection(80)},
            24000,
            Endpoint(80, 300_000),
        ),
        (
            update(turn_detection={"silence_duration_ms": 60_000}),
            {"turn_detection": detection(60_000)},
            24000,
            Endpoint(60_000, 300_000),
        ),
        (
            {"type": "transcription_session.update", "session": {"input_audio_format": "g711_ulaw"}},
            {"format": {"type": "audio/pcmu"}},
            8000,
            Endpoint(700, 300_000),
        ),
        (
            {"type": "transcription_session.update", "session": {"input_audio_format": "g711_alaw"}},
            {"format": {"type": "audio/pcma"}},
            8000,
            Endpoint(700, 300_000),
        ),
        (
            {
                "type": "transcription_session.update",
                "session": {
                    "input_audio_format": "pcm16",
                    "turn_detection": {"type": "server_vad", "silence_duration_ms": 99},
                    "input_audio_transcription": {"model": "m" * 300, "language": "en-US"},
                    "input_audio_noise_reduction": {"type": "near_field"},
                    "modalities": ["text"],
                    "include": None,
                    "client_secret": None,
                },
            },
            {"turn_detection": detection(99), "transcription": {"model": "m" * 200, "language": "en"}},
            24000,
            Endpoint(99, 300_000),
        ),
        (
            update(transcription={"keywords": ["nine"], "model": "", "prompt": "x"}),
            {"transcription": {"model": "nemostream", "language": "en", "keywords": ["nine"]}},
            24000,
            Endpoint(700, 300_000),
        ),
    ],
)
def test_updates_change_what_they_name(
    fakes: Any, here: Any, model: Any, event: Any, changes: Any, rate: int, endpoint: Endpoint
) -> None:
    (updated,) = exchange(fakes, here, event)
    assert updated["type"] == event["type"] + "d"
    updated["session"].pop("id")
    assert updated["session"] == session_object(**changes)
    stream = model.streams[-1]
    assert stream.sample_rate == rate and stream.options["endpoint"] == endpoint
    keywords = changes.get("transcription", {}).get("keywords")
    assert stream.options["phrases"] == (("compiled", keywords) if keywords else None)
    assert all(one.closed for one in model.streams)


@pytest.mark.parametrize(("name", "first"), [("audio/pcmu", -32124), ("audio/pcma", -5504), ("audio/pcm", 0)])
def test_audio_is_decoded_in_the_format_of_the_session(
    fakes: Any, here: Any, model: Any, name: str, first: int
) -> None:
    audio = {"type": "input_audio_buffer.append", "audio": base64.b64encode(bytes(16)).decode()}
    exchange(fakes, here, update(format={"type": name}), audio)
    assert model.streams[-1].pushed[0] == first and len(model.streams[-1].pushed) == (8 if name == "audio/pcm" else 16)


def test_updates_keep_what_they_do_not_name(fakes: Any, here: Any, model: Any) -> None:
    responses = exchange(
        fakes,
        here,
        update(format={"type": "audio/pcm", "rate": 16000}, transcription={"keywords": ["nine"], "model": "m"}),
        update(turn_detection={"silence_duration_ms": 90}),
        update(transcription={"language": "en"}),
        update(transcription={"keywords": []}),
    )
    for response in responses:
        response["session"].pop("id")
    format_ = {"type": "audio/pcm", "rate": 16000}
    transcription = {"model": "m", "language": "en", "keywords": ["nine"]}
    assert responses[1]["session"] == session_object(
        format=format_, transcription=transcription, turn_detection=detection(90)
    )
    assert responses[2]["session"] == responses[1]["session"]
    assert "keywords" not in responses[3]["session"]["audio"]["input"]["transcription"]
    phrases = [stream.options["phrases"] for stream in model.streams]
    assert phrases == [None, ("compiled", ["nine"]), ("compiled", ["nine"]), None]
    assert [stream.sample_rate for stream in model.streams] == [24000, 16000, 16000, 16000]


def test_a_change_of_the_language_keeps_the_stream(fakes: Any, languages_bundle: Any, clock: Any) -> None:
    model = fakes.FakeModel(languages_bundle)
    here = fakes.start(model, clock)
    responses = exchange(
        fakes,
        here,
        append(4800),
        update(transcription={"language": "de", "model": "m"}),
        update(transcription={"language": "de-DE"}),
        update(turn_detection=None),
        CLEAR,
        update(turn_detection=None),
    )
    languages = [one["session"]["audio"]["input"]["transcription"] for one in responses[:2] + responses[-1:]]
    assert languages == [{"model": "m", "language": "de-DE"}] * 3
    assert [call for call in model.streams[0].calls if isinstance(call, tuple)] == [("language", "de-DE")]
    assert responses[2]["error"]["message"].startswith("format, turn_detection and keywords can change only while")
    assert len(model.streams) == 2 and model.streams[1].options["language"] == "de-DE"


def test_the_chunk_size_of_finals_keeps_the_stream(fakes: Any, model: Any, clock: Any) -> None:
    here = fakes.start(model, clock, chunk_ms=80, final_chunk_ms=560)
    sizes = [1120, None, 80, 560.0, 560]
    responses = exchange(fakes, here, append(4800), *(update(transcription={"final_chunk_ms": ms}) for ms in sizes))
    found = [one["session"]["audio"]["input"]["transcription"] for one in responses if one["type"] != "error"]
    assert [one.get("final_chunk_ms") for one in found] == [1120, None, 560]
    errors = [one["error"] for one in responses if one["type"] == "error"]
    assert [(one["code"], one["param"]) for one in errors] == [
        ("invalid_value", None),
        ("invalid_type", "session.audio.input.transcription.final_chunk_ms"),
    ]
    (stream,) = model.streams
    assert stream.options["final_chunk_ms"] == 560
    changes = [call[1] for call in stream.calls if isinstance(call, tuple)]
    assert changes == [1120, None, 560]
    exchange(fakes, here, update(transcription={"final_chunk_ms": None}, turn_detection=None))
    assert model.streams[-1].options["final_chunk_ms"] is None
    small = fakes.start(model, clock, chunk_ms=80, max_streams=2)
    (full,) = exchange(fakes, small, update(transcription={"final_chunk_ms": 560}))
    assert "slots are in use or reserved" in full["error"]["message"]


def test_the_slot_of_a_session_is_kept_in_an_update(fakes: Any, model: Any, clock: Any) -> None:
    here = fakes.start(model, clock, max_streams=1)
    (updated,) = exchange(fakes, here, update(turn_detection=None))
    assert updated["type"] == "session.updated"
    assert [stream.closed > 0 for stream in model.streams] == [True, True] and not here.sessions
    assert (fakes.metric(here, "streams_failed_total", transport="realtime") or 0) == 1  # the client disconnected


def test_an_update_that_cannot_be_applied_keeps_the_session(fakes: Any, here: Any, model: Any) -> None:
    responses = exchange(
        fakes,
        here,
        update(turn_detection={"silence_duration_ms": 90}),
        update(format={"type": "audio/pcm", "rate": 16000}, turn_detection=None, transcription={"language": "xx"}),
        update(),
    )
    assert brief(responses) == ["session.updated", ("error", "invalid_value"), "session.updated"]
    assert responses[1]["error"]["param"] == "session.audio.input.transcription.language"
    assert responses[2]["session"]["audio"]["input"]["turn_detection"]["silence_duration_ms"] == 90
    assert len(model.streams) == 2


def test_a_session_that_cannot_be_opened_is_the_previous_one_again(fakes: Any, here: Any, model: Any) -> None:
    opened, astream = [], model.astream

    def reject_16_khz(**options: Any) -> Any:
        opened.append(options["sample_rate"])
        if options["sample_rate"] == 16000:
            raise OptionError("sample_rate is 16000.")
        return astream(**options)

    model.astream = reject_16_khz
    responses = exchange(fakes, here, update(format={"type": "audio/pcm", "rate": 16000}), append(2400), update())
    assert opened == [24000, 16000, 24000]
    assert responses[0]["error"]["message"] == "sample_rate is 16000." and brief(responses)[1] == "session.updated"
    assert responses[1]["session"]["audio"]["input"]["format"]["rate"] == 24000
    assert len(model.streams[1].pushed) == 2400

    def reject(**options: Any) -> Any:
        if model.streams[2:]:
            raise OptionError("no more.")
        return astream(**options)

    model.astream = reject
    socket = serve(fakes, here, update(turn_detection=None))
    assert socket.events[-1]["error"]["message"] == "no more." and socket.close == (1011, "no more.")
    assert not here.sessions


def test_the_rate_limit_continues_after_an_update(fakes: Any, model: Any, clock: Any) -> None:
    """Each message counts as 8 KiB, and each update as 50 ms."""
    here = fakes.start(model, clock, max_bytes_per_second=81920)
    exchange(fakes, here, *[update(turn_detection={"silence_duration_ms": 90 + number}) for number in range(20)])
    assert clock() == pytest.approx(20 * 0.15 - 2)


@pytest.mark.parametrize(
    ("session", "code", "param", "message"),
    [
        (7, "invalid_type", "session", "session must be an object."),
        ({"type": "realtime"}, "invalid_value", "session.type", "session.type is 'realtime'"),
        ({"include": ["x"]}, "invalid_value", "session.include", "no log probabilities"),
        ({"client_secret": {"x": 1}}, "invalid_value", "session.client_secret", "no client secrets"),
        ({"audio": 7}, "invalid_type", "session.audio", "session.audio must be an object."),
        ({"audio": {"input": {"format": "x"}}}, "invalid_value", "session.audio.input.format", "'x'"),
        ({"audio": {"input": {"format": {"rate": 8000}}}}, "invalid_value", "session.audio.input.format", "rate"),
        (
            {"audio": {"input": {"format": {"type": "audio/pcmu", "rate": 16000}}}},
            "invalid_value",
            "session.audio.input.format.rate",
            "rate is 16000; the rate of audio/pcmu is 8000.",
        ),
        (
            {"audio": {"input": {"format": {"type": "audio/pcm", "rate": "24000"}}}},
            "invalid_value",
            "session.audio.input.format.rate",
            "rate is '24000'; the rate of audio/pcm is 24000.",
        ),
        ({"turn_detection": 7}, "invalid_type", "session.turn_detection", "must be an object"),
        ({"turn_detection": {"type": "x"}}, "invalid_value", "session.turn_detection.type", "null and server_vad"),
        *(
            (
                {"turn_detection": {"silence_duration_ms": value}},
                "invalid_value",
                "session.turn_detection.silence_duration_ms",
                f"silence_duration_ms is {value!r}; it must be from 80 to 60000.",
            )
            for value in (79, 60_001, True, 100.0, None)
        ),
        (
            {"turn_detection": {"idle_timeout_ms": 0}},
            "invalid_value",
            "session.turn_detection.idle_timeout_ms",
            "not supported",
        ),
        (
            {"turn_detection": {"eagerness": "low"}},
            "invalid_value",
            "session.turn_detection.eagerness",
            "not supported",
        ),
        (
            {"input_audio_transcription": None},
            "invalid_value",
            "session.input_audio_transcription",
            "cannot be turned off",
        ),
        (
            {"input_audio_transcription": {"delay": "low"}},
            "invalid_value",
            "session.input_audio_transcription.delay",
            "chunk size",
        ),
        (
            {"input_audio_transcription": {"languages": "de"}},
            "invalid_type",
            "session.input_audio_transcription.languages",
            "must be a list of strings",
        ),
        (
            {"input_audio_transcription": {"languages": ["en", 7]}},
            "invalid_type",
            "session.input_audio_transcription.languages",
            "must be a list of strings",
        ),
        (
            {"input_audio_transcription": {"keywords": "nine"}},
            "invalid_type",
            "session.input_audio_transcription.keywords",
            "must be a list of strings",
        ),
        ({"x" * 400: 1}, "unknown_parameter", "session." + "x" * 192, "is not a field of this event"),
    ],
)
def test_invalid_updates_name_the_field(
    fakes: Any, here: Any, model: Any, session: Any, code: str, param: str, message: str
) -> None:
    event = {"type": "session.update", "session": session, "event_id": "mine"}
    (response, unchanged) = exchange(fakes, here, event, update())
    assert response["error"]["type"] == "invalid_request_error" and response["error"]["event_id"] == "mine"
    assert (response["error"]["code"], response["error"]["param"]) == (code, param)
    assert message in response["error"]["message"]
    unchanged["session"].pop("id")
    assert unchanged["session"] == session_object() and len(model.streams) == 1


# -- audio -------------------------------------------------------------------------------------------------------------


def test_items_of_turn_detection(fakes: Any, here: Any, model: Any) -> None:
    model.events = {
        "push": [
            [fakes.event("partial", "one", start=0.1234)],
            [fakes.event("backchannel", "one"), fakes.event("partial", "one two")],
            [fakes.event("final", "one two three", start=0.1234, end=0.9876), fakes.end()],
            [],
            [fakes.event("final", "four", start=2.0, end=2.5), fakes.event("partial", "five", start=3.0)],
        ]
    }
    responses = exchange(fakes, here, *[append(2400)] * 5)
    assert brief(responses) == [
        ("speech_started", 0, 123),
        ("delta", 0, "one"),
        ("delta", 0, " two"),
        ("delta", 0, " three"),
        ("speech_stopped", 0, 988),
        ("committed", 0, None),
        ("completed", 0, "one two three", 0.3),
        ("speech_started", 1, 2000),
        ("delta", 1, "four"),
        ("speech_stopped", 1, 2500),
        ("committed", 1, 0),
        ("completed", 1, "four", 0.2),
        ("speech_started", 2, 3000),
        ("delta", 2, "five"),
    ]
    assert all(one["item_id"].startswith("item_") for one in responses)


def test_deltas_have_what_is_stable(fakes: Any, here: Any, model: Any) -> None:
    model.events = {
        "push": [
            [fakes.event("partial", "one", start=0.1)],
            [fakes.event("partial", "won to three")],
            [fakes.event("partial", "won to")],
            [fakes.event("final", "won to three", end=2.0), fakes.end()],
            [fakes.event("partial", "noise", start=3.0)],
            [fakes.event("final", "", end=3.5), fakes.end()],
        ]
    }
    set_ = update(transcription={"final_chunk_ms": 1120})
    responses = brief(exchange(fakes, here, set_, *[append(2400)] * 6))
    assert responses == [
        "session.updated",
        ("speech_started", 0, 100),
        ("delta", 0, "won to"),
        ("delta", 0, " three"),
        ("speech_stopped", 0, 2000),
        ("committed", 0, None),
        ("completed", 0, "won to three", 0.4),
        ("speech_started", 1, 3000),
        ("speech_stopped", 1, 3500),
        ("committed", 1, 0),
        ("completed", 1, "", 0.2),
    ]


def test_items_of_commits(fakes: Any, here: Any, model: Any) -> None:
    """A commit ends an item also without text; utterances that a silence had ended before are items of their own."""
    model.events = {
        "push": [[fakes.event("partial", "one")], []],
        "end_utterance": [
            [fakes.event("final", "one two"), fakes.end("forced")],
            [fakes.end("forced")],
            [
                fakes.event("final", "three", start=1.0, end=1.5),
                fakes.end(),
                fakes.event("backchannel", "x"),
                fakes.event("final", "four"),
                fakes.end("forced"),
            ],
        ],
    }
    responses = exchange(fakes, here, append(2400), COMMIT, append(4800), COMMIT, append(2400), COMMIT)
    assert brief(responses) == [
        ("speech_started", 0, 123),
        ("delta", 0, "one"),
        ("committed", 0, None),
        ("delta", 0, " two"),
        ("completed", 0, "one two", 0.1),
        ("committed", 1, 0),
        ("completed", 1, "", 0.2),
        ("delta", 2, "three"),
        ("speech_stopped", 2, 1500),
        ("committed", 2, 1),
        ("completed", 2, "three", 0.1),
        ("committed", 3, 2),
        ("delta", 3, "four"),
        ("completed", 3, "four", 0.0),
    ]


def test_a_commit_needs_100_ms_of_audio(fakes: Any, here: Any, model: Any) -> None:
    """However many messages it was sent in."""
    responses = exchange(fakes, here, append(2399), COMMIT, append(1), COMMIT, append(2399), COMMIT)
    assert brief(responses) == [
        ("error", "input_audio_buffer_commit_empty"),
        ("committed", 0, None),
        ("completed", 0, "", 0.1),
        ("error", "input_audio_buffer_commit_empty"),
    ]
    assert responses[0]["error"]["message"] == "the buffer has 99 ms of audio; a commit needs at least 100 ms."
    assert sum(isinstance(call, str) and call == "end_utterance" for call in model.streams[0].calls) == 1


def test_clear_discards_the_item(fakes: Any, here: Any, model: Any) -> None:
    model.events = {
        "push": [[fakes.event("partial", "one")], [fakes.event("partial", "two")]],
        "end_utterance": [[fakes.event("final", "one")], [fakes.event("final", "two")]],
    }
    responses = exchange(fakes, here, append(2400), CLEAR, COMMIT, append(2400), COMMIT)
    assert brief(responses) == [
        ("speech_started", 0, 123),
        ("delta", 0, "one"),
        "cleared",
        ("error", "input_audio_buffer_commit_empty"),
        ("speech_started", 1, 123),
        ("delta", 1, "two"),
        ("committed", 1, None),
        ("completed", 1, "two", 0.1),
    ]


def test_languages_of_completed_items(fakes: Any, languages_bundle: Any, clock: Any) -> None:
    model = fakes.FakeModel(languages_bundle)
    here = fakes.start(model, clock)
    model.events = {"end_utterance": [[fakes.event("final", "one", set_language="de-DE")], []]}
    responses = exchange(fakes, here, append(2400), COMMIT, append(2400), COMMIT)
    assert [one["languages"] for one in responses if "transcript" in one] == [[{"code": "de"}], []]


@pytest.mark.parametrize("slice_", [4, 8, 12, 1 << 20])
def test_long_appends_are_decoded_in_slices(
    fakes: Any, here: Any, model: Any, monkeypatch: pytest.MonkeyPatch, slice_: int
) -> None:
    """Of any length modulo the slice, and with escapes that two slices share."""
    monkeypatch.setattr(realtime, "_BASE64_SLICE", slice_)
    monkeypatch.setattr(realtime, "MAX_TEXT_CHARACTERS", 200)  # longer messages are parsed without their audio
    for size in range(200, 212, 2):
        audio = bytes([255, 255, 191, 239, 1, 254, 127]) * (size // 7 + 1)
        text = base64.b64encode(audio[:size]).decode()
        assert "//" in text
        event = '{"type": "input_audio_buffer.append", "audio" : "' + text.replace("/", "\\/") + '", "event_id": "x"}'
        assert not exchange(fakes, here, event)
        assert model.streams[-1].pushed.tobytes() == audio[:size]


def test_appends_are_processed_in_parts(fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts have the maximum size of a message of a live stream; audio that is too long or invalid is not used."""
    monkeypatch.setattr(realtime, "_MAX_AUDIO_BYTES", 5000)
    here = fakes.start(model, clock, max_message_bytes=2048)
    responses = exchange(
        fakes, here, append(2500), append(2501), {**append(2500), "audio": append(2500)["audio"] + "?"}
    )
    assert [one["error"]["param"] for one in responses] == ["audio", "audio"]
    assert responses[0]["error"]["message"] == "audio has 5002 bytes; the maximum is 5000: send smaller messages."
    assert [len(call) for call in model.streams[0].calls if call is not None and not isinstance(call, str)] == [
        1024,
        1024,
        452,
    ]


def test_an_invalid_part_ends_an_append_but_not_the_session(fakes: Any, here: Any, model: Any) -> None:
    model.check_error = AudioError("the audio has NaN.")
    (response,) = exchange(fakes, here, {**append(2400), "event_id": 7})
    assert response["error"] == {
        "message": "the audio has NaN.",
        "type": "invalid_request_error",
        "code": "invalid_value",
        "param": None,
        "event_id": None,
    }


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (b"ab", "invalid_value", "binary messages are not supported"),
        ('{"type": "x", "y": "' + "x" * 65536 + '"}', "invalid_value", "has 65558 characters besides its audio"),
        ('{"x": {"audio": "' + "A" * 65536 + '"}}', "invalid_type", "audio must be a top-level string"),
        ('{"audio": "' + "A" * 65536 + '", "audio": "A"}', "invalid_type", "audio must be a top-level string"),
        ('{"audio": "' + "A" * 65536, "invalid_value", "has 65547 characters"),
        ("[" * 60_000, "invalid_json", "the message is not JSON"),
        ('{"type": ["x"]}', "invalid_value", "type is ['x']"),
        ('{"type": "session.update"}', "missing_required_parameter", "session is missing; it must be an object."),
        ('{"type": "input_audio_buffer.commit", "audio": ""}', "unknown_parameter", "audio is not a field"),
    ],
)
def test_invalid_messages_keep_the_session(fakes: Any, here: Any, message: Any, code: str, text: str) -> None:
    (response, updated) = exchange(fakes, here, message, update())
    assert response["error"]["code"] == code and text in response["error"]["message"]
    assert updated["type"] == "session.updated"


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed_out", [False, True])
@pytest.mark.parametrize("code", [1000, 1006, None])
def test_a_client_that_disconnects(
    fakes: Any, here: Any, model: Any, caplog: Any, code: int | None, timed_out: bool
) -> None:
    caplog.set_level("INFO")
    socket = connect(fakes, here, append(2400), code, append(2400))
    socket.scope["nemostream.timed_out"] = timed_out
    fakes.run(here.clock, socket.serve())
    assert not here.sessions and model.streams[0].closed and len(model.streams[0].pushed) == 2400
    assert socket.close is None and fakes.metric(here, "timeouts_total") == timed_out
    assert fakes.metric(here, "streams_failed_total", transport="realtime") == 1
    (closed,) = fakes.records(caplog, "stream closed")
    assert closed.error == "the client disconnected"


@pytest.mark.parametrize(
    ("error", "type_", "code", "close"),
    [
        (BackendError("the step failed."), "server_error", "model", 1011),
        (CapacityError("full."), "rate_limit_error", "capacity", 1013),
    ],
)
def test_errors_of_the_model_close_the_connection(
    fakes: Any, here: Any, model: Any, error: Any, type_: str, code: str, close: int
) -> None:
    model.error = error
    socket = serve(fakes, here, append(2400))
    last = socket.events[-1]
    assert last["type"] == "error" and last["error"] == {
        "message": str(error),
        "type": type_,
        "code": code,
        "param": None,
        "event_id": None,
    }
    assert socket.close == (close, str(error)) and not here.sessions
    assert fakes.metric(here, "streams_failed_total", transport="realtime") == 1
    assert fakes.metric(here, "timeouts_total") == 0


def test_a_client_that_sends_nothing(fakes: Any, here: Any, clock: Any) -> None:
    socket = serve(fakes, here, append(2400))
    assert clock() == 30 and socket.events[-1]["error"]["code"] == "session_expired"
    assert socket.close == (1008, "nothing was received for 30 s; open a new stream.")
    assert fakes.metric(here, "timeouts_total") == 1 and not here.sessions


def test_a_client_that_does_not_read(fakes: Any, here: Any, clock: Any) -> None:
    socket = connect(fakes, here, append(2400))

    async def on_send(message: Any) -> None:
        if message["type"] == "websocket.send":
            await asyncio.sleep(1e6)

    socket.on_send = on_send
    fakes.run(clock, socket.serve())
    assert clock() == 10 and not socket.events and socket.close == (1008, "results were not read for 10 s.")
    assert fakes.metric(here, "timeouts_total") == 1 and not here.sessions


@pytest.mark.parametrize("at", ["websocket.accept", "websocket.send"])
def test_an_internal_error_closes_the_session(fakes: Any, here: Any, model: Any, at: str) -> None:
    socket = connect(fakes, here)
    with pytest.raises(ZeroDivisionError):
        fakes.run(here.clock, socket.fail_at(at).serve())
    assert not here.sessions and model.streams[0].closed


def test_ids_are_those_of_the_log(fakes: Any, here: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    (created,) = serve(fakes, here, 1000).events
    (opened,) = fakes.records(caplog, "stream opened")
    assert created["session"]["id"] == "sess_" + opened.stream
