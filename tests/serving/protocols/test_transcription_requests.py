"""`POST /v1/audio/transcriptions`: what each field does, and each field of responses, with a fake model."""

from __future__ import annotations

import asyncio
import json
import tempfile
from typing import Any

import httpx
import pytest

from nemostream.errors import AudioError, BackendError, StreamError
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.serving.client import Client
from nemostream.serving.errors import Expired
from nemostream.serving.protocols.http import create_app
from nemostream.serving.uploads.upload import Upload


def start(
    fakes: Any, model: Any, clock: Any, *blocks: int, seconds: float = 2.0, warning: str = "", **settings: Any
) -> Any:
    here = fakes.start(model, clock, **settings)
    here._decoders = fakes.FakeDecoders(*(blocks or (16000,)), seconds=seconds, warning=warning)
    return here


def post(fakes: Any, here: Any, file: Any = ("a.wav", b"recording"), **form: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(here), client=("192.0.2.7", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/audio/transcriptions", files={"file": file}, data=form)

    response: httpx.Response = fakes.run(here.clock, main())
    return response


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts]


# -- fields of the form ------------------------------------------------------------------------------------------------


def test_each_field_sets_what_it_names(fakes: Any, model: Any, clock: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    here = start(fakes, model, clock, endpoint_ms=900)
    form = {"chunk_ms": "160", "language": "english", "keywords[]": ["nine", "ten"]}
    assert post(fakes, here, ("b" * 400 + ".wav", b"x"), **form).status_code == 200
    assert post(fakes, here, ("a.wav", b"x"), prompt="x", temperature="0.5").status_code == 200
    assert here.decoders.names == ["b" * 300 + "... (404 characters)", "a.wav"]
    first, second = model.streams
    assert (first.sample_rate, first.channels) == (16000, 1) and len(first.pushed) == 16000
    options = {"final_chunk_ms": None, "endpoint": Endpoint(900, 300_000), "vad": False, "language": "en"}
    assert first.options == options | {"chunk_ms": 160, "phrases": ("compiled", ["nine", "ten"])}
    assert second.options == options | {"chunk_ms": 560, "phrases": None}
    opened = fakes.records(caplog, "stream opened")
    assert [(one.transport, one.peer) for one in opened] == [("http", "192.0.2.7")] * 2
    assert not here.sessions and here.uploads.count == here.decoders.open == 0
    assert (fakes.metric(here, "streams_failed_total", transport="http") or 0) == 0


def test_inverse_text_normalization_is_an_option(
    fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, requested = start(fakes, model, clock), []

    async def normalizer(enabled: bool, language: str | None = None) -> Any:
        requested.append((enabled, language))

    monkeypatch.setattr(here, "normalizer", normalizer)
    for form in ({}, {"itn": "true", "language": "en-US"}, {"itn": "false"}):
        post(fakes, here, **form)
    assert requested == [(False, None), (True, "en"), (False, None)]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"chunking_strategy": "server_vad"}, "chunking_strategy is 'server_vad'; only auto is supported."),
        ({"chunking_strategy[type]": "server_vad"}, "chunking_strategy is an object; only auto is supported"),
        ({"stream": "true", "response_format": "srt"}, "stream works with response_format json or text, not srt."),
        ({"x": "1"}, "the form field 'x' is not supported; use file, model, language"),
        ({"language": "de"}, "language is 'de'"),
        ({"languages[]": ["en", "fr"]}, "'fr'"),
        ({"chunk_ms": "81"}, "chunk_ms is 81"),
        ({"stream": "maybe"}, "stream: 'maybe' must be a valid boolean."),
    ],
)
def test_invalid_fields(fakes: Any, model: Any, clock: Any, form: Any, message: str) -> None:
    here = start(fakes, model, clock)
    response = post(fakes, here, **form)
    assert response.status_code == 400 and message in response.json()["error"]["message"]
    assert not model.streams and not here.sessions and here.uploads.count == here.decoders.open == 0
    for accepted in (
        {"chunking_strategy": "auto"},
        {"chunking_strategy": ""},
        {"stream": "true", "response_format": "text"},
    ):
        assert post(fakes, here, **accepted).status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(AudioError("no recording."), 400, "audio"), (BackendError("no process."), 500, "model")],
)
@pytest.mark.parametrize("stream", ["true", "false"])
def test_files_that_cannot_be_decoded(
    fakes: Any, model: Any, clock: Any, error: Any, status: int, code: str, stream: str
) -> None:
    """Also of a stream: the response has not begun."""
    here = start(fakes, model, clock)
    here.decoders.error = error
    response = post(fakes, here, stream=stream)
    assert response.status_code == status and response.json()["error"]["code"] == code
    assert not model.streams and here.uploads.count == 0


def test_a_stream_that_fails(fakes: Any, model: Any, clock: Any) -> None:
    here = start(fakes, model, clock)
    model.error = BackendError("the step failed.")
    response = post(fakes, here)
    assert response.status_code == 500 and response.json()["error"]["message"] == "the step failed."
    assert events_of(post(fakes, here, stream="true")) == [
        {"error": {"message": "the step failed.", "type": "server_error"}}
    ]
    assert fakes.metric(here, "streams_failed_total", transport="http") == 2 and not here.sessions
    assert here.uploads.count == here.decoders.open == 0


# -- responses ---------------------------------------------------------------------------------------------------------


def script(fakes: Any, model: Any) -> None:
    model.events = {
        "push": [
            [fakes.event("partial", "one"), fakes.event("backchannel", "one")],
            [fakes.event("final", "one two", start=0.1234, end=0.9876), fakes.end()],
        ],
        "finish": [
            [
                fakes.event("partial", "three", 1),
                fakes.event("final", "three", 1, start=1.0, end=1.5),
                fakes.end("finish"),
            ]
        ],
    }


@pytest.mark.parametrize(
    ("format_", "expected"),
    [
        ("json", {"text": "one two three", "usage": {"type": "duration", "seconds": 4}}),
        ("text", "one two three\n"),
        ("srt", "1\n00:00:00,000 --> 00:00:00,"),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:00."),
    ],
)
def test_responses_have_the_requested_format(fakes: Any, model: Any, clock: Any, format_: str, expected: Any) -> None:
    here = start(fakes, model, clock, 100, 100, seconds=3.6)
    script(fakes, model)
    response = post(fakes, here, response_format=format_)
    assert "nemostream-warning" not in response.headers
    if format_ == "json":
        assert response.json() == expected
    elif format_ == "text":
        assert response.text == expected
    else:
        assert response.text.startswith(expected) and "one two" in response.text and "three" in response.text


@pytest.mark.parametrize(
    ("granularities", "words", "segments"),
    [([], False, True), (["segment"], False, True), (["word"], True, False), (["word", "segment"], True, True)],
)
def test_verbose_responses(
    fakes: Any, model: Any, clock: Any, granularities: list[str], words: bool, segments: bool
) -> None:
    here = start(fakes, model, clock, 100, 100, seconds=3.45678)
    script(fakes, model)
    body = post(
        fakes,
        here,
        response_format="verbose_json",
        **({"timestamp_granularities[]": granularities} if granularities else {}),
    ).json()
    expected: dict[str, Any] = {
        "text": "one two three",
        "usage": {"type": "duration", "seconds": 3},
        "task": "transcribe",
        "language": "english",
        "duration": 3.457,
    }
    if words:
        expected["words"] = [
            {"word": "one", "start": 0.0, "end": 0.25},
            {"word": "two", "start": 0.5, "end": 0.75},
            {"word": "three", "start": 0.0, "end": 0.25},
        ]
    constant = {"seek": 0, "temperature": 0.0, "compression_ratio": 1.0, "no_speech_prob": 0.0}
    if segments:
        expected["segments"] = [
            constant
            | {"id": 0, "start": 0.123, "end": 0.988, "text": "one two", "tokens": [0, 1], "avg_logprob": -1.0},
            constant | {"id": 1, "start": 1.0, "end": 1.5, "text": "three", "tokens": [0], "avg_logprob": -0.5},
        ]
    assert body == expected


def test_warnings_are_a_header(fakes: Any, model: Any, clock: Any) -> None:
    here = start(fakes, model, clock, warning="ä.wav is cut short.")
    for format_ in ("json", "text", "srt", "vtt", "verbose_json"):
        response = post(fakes, here, response_format=format_)
        assert response.headers["Nemostream-Warning"] == "?.wav is cut short."


def test_languages_of_responses(fakes: Any, languages_bundle: Any, clock: Any) -> None:
    """Of models that detect the language: those of the words, without duplicates; the language of the last tag."""
    model = fakes.FakeModel(languages_bundle)
    here = start(fakes, model, clock)

    def respond(**form: Any) -> Any:
        model.events = {"push": [[fakes.event("final", "one two"), fakes.event("final", "three", 1)]]}
        return post(fakes, here, **form)

    assert respond(language="de").json()["languages"] == [{"code": "de"}]
    assert respond(language="auto").json()["languages"] == []
    assert respond().json()["languages"] == [{"code": "en"}]
    assert [stream.options["language"] for stream in model.streams] == ["de-DE", "auto", "en-US"]
    assert respond(response_format="verbose_json", language="ar").json()["language"] == "arabic"
    assert "languages" not in respond(response_format="verbose_json").json()
    assert events_of(respond(stream="true", language="de"))[-1]["languages"] == [{"code": "de"}]
    assert events_of(respond(stream="true", language="auto"))[-1]["languages"] == []


@pytest.mark.parametrize(
    ("texts", "deltas"),
    [
        (["one two.", "three"], ["one", " two.", " three"]),
        (["你好。", "再见", "OK", "Sí"], ["你", "好。", "再见", "OK", " Sí"]),
        (["OK.", "你好"], ["O", "K.", " 你好"]),
    ],
)
def test_streamed_deltas_concatenate_to_the_text(
    fakes: Any, model: Any, clock: Any, texts: list[str], deltas: list[str]
) -> None:
    here = start(fakes, model, clock)
    finals = [fakes.event("final", text, number) for number, text in enumerate(texts)]
    model.events = {
        "push": [[fakes.event("partial", deltas[0]), fakes.event("backchannel", "x"), *finals[:1], fakes.end()]],
        "finish": [[*finals[1:], fakes.end("finish")]],
    }
    *received, done = events_of(post(fakes, here, stream="true"))
    assert received == [{"type": "transcript.text.delta", "delta": delta} for delta in deltas]
    assert done == {"type": "transcript.text.done", "text": "".join(deltas)}


def test_deltas_of_normalized_text_are_utterances(
    fakes: Any, model: Any, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written form of a partial text could change."""
    here = start(fakes, model, clock, 100, 100)
    script(fakes, model)

    async def normalizer(enabled: bool, language: str | None = None) -> Any:
        return None

    monkeypatch.setattr(here, "normalizer", normalizer)
    *deltas, done = events_of(post(fakes, here, stream="true", itn="true"))
    assert [one["delta"] for one in deltas] == ["one two", " three"] and done["text"] == "one two three"


# -- recordings --------------------------------------------------------------------------------------------------------


def consume(fakes: Any, here: Any, is_disconnected: Any = None, **options: Any) -> tuple[Any, list[Any]]:
    items: list[Any] = []

    async def main() -> Any:
        with tempfile.TemporaryFile() as file:
            upload = Upload(here, "test", file.fileno(), "a.wav", is_disconnected, client=Client("x"), **options)
            async for item in upload:
                items.append(item)
            return upload

    return fakes.run(here.clock, main()), items


def test_the_events_of_a_recording(fakes: Any, model: Any, clock: Any) -> None:
    here = start(fakes, model, clock, 100, 200, seconds=3.5, warning="cut short.", max_streams=1)
    here.open("live")
    script(fakes, model)
    upload, items = consume(fakes, here, chunk_ms=80)
    kinds = [item and item.kind for item in items]
    assert kinds == [None, "partial", "backchannel", "final", "end", "partial", "final", "end"]
    assert (upload.text, upload.seconds, upload.warning, upload.language) == ("one two three", 3.5, "cut short.", "en")
    stream = model.streams[1]
    assert [len(call) for call in stream.calls if not isinstance(call, str)] == [100, 200]
    assert stream.options["chunk_ms"] == 80 and stream.closed and len(here.sessions) == 1
    assert here.decoders.open == 0 and fakes.metric(here, "streams_opened_total", transport="test") == 1


def test_a_recording_waits_while_live_streams_are_late(fakes: Any, model: Any, clock: Any) -> None:
    here = start(fakes, model, clock, 100, 100, 100)
    here.open("live")
    times: list[float] = []

    async def main() -> None:
        here.update_load(2.0)

        async def recover() -> None:
            await asyncio.sleep(5.01)
            here.update_load(0.1)
            await asyncio.sleep(2)

        with tempfile.TemporaryFile() as file:
            recovering = asyncio.create_task(recover())
            async for item in Upload(here, "test", file.fileno(), "a.wav", client=Client("x")):
                if item is None:
                    times.append(clock())
            times.append(clock())
            recovering.cancel()

    fakes.run(clock, main())
    assert times == [0, pytest.approx(5.05)]


def test_a_recording_has_the_time_limit_of_a_stream(fakes: Any, model: Any, clock: Any) -> None:
    here = start(fakes, model, clock, *[100] * 50, max_seconds=100)
    model.seconds = 7.0
    with pytest.raises(Expired, match=r"the recording took more than 100 s, the longest allowed"):
        consume(fakes, here)
    assert clock() == 105 and not here.sessions and here.decoders.open == 0
    assert fakes.metric(here, "streams_failed_total", transport="test") == 1


def test_a_recording_ends_when_its_client_disconnects(fakes: Any, model: Any, clock: Any) -> None:
    here = start(fakes, model, clock, *[100] * 9)
    answers = [False, False, True]

    async def is_disconnected() -> bool:
        return answers.pop(0)

    with pytest.raises(StreamError, match="the client disconnected"):
        consume(fakes, here, is_disconnected)
    assert len(model.streams[0].pushed) == 200 and not here.sessions and here.decoders.open == 0
    (closed,) = model.streams
    assert closed.closed


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"chunk_ms": "x"}, "chunk_ms"),
        ({"timestamp_granularities[]": ["word", "letter"]}, "timestamp_granularities[].1"),
        ({"response_format": "x"}, "response_format"),
    ],
)
def test_invalid_values_name_the_field(fakes: Any, model: Any, clock: Any, form: Any, param: str) -> None:
    response = post(fakes, start(fakes, model, clock), **form)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (400, "invalid_request_error", None)
    assert error["param"] == param and error["message"].startswith(f"{param}: ") and error["message"].endswith(".")


# -- other routes ------------------------------------------------------------------------------------------------------


def test_states_of_the_service_in_the_operations(fakes: Any, model: Any, clock: Any) -> None:
    from fastapi.testclient import TestClient

    here = fakes.start(model)
    with TestClient(create_app(here, {"http_port": 7, "grpc_port": 8})) as client:
        for state, alive, ready in (
            ("ready", 200, 200),
            ("failed", 503, 503),
            ("draining", 200, 503),
            ("starting", 200, 503),
        ):
            here.state = state
            assert client.get("/healthz").status_code == alive
            assert client.get("/healthz").json() == {"status": "failed" if state == "failed" else "alive"}
            response = client.get("/readyz")
            assert response.status_code == ready
            assert (
                response.json() == here.describe() | {"http_port": 7, "grpc_port": 8}
                and response.json()["status"] == state
            )
        page = client.get("/")
        assert (
            page.headers["content-type"] == "text/html; charset=utf-8"
            and "frame-ancestors 'none'" in page.headers["content-security-policy"]
        )
        assert "default-src 'none'" in page.headers["content-security-policy"]
        response = client.get("/metrics")
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert response.content == here.metrics.text()
        assert client.get("/v1/models").json() == {
            "object": "list",
            "data": [{"id": "demo", "object": "model", "created": 0, "owned_by": "nemostream", "languages": ["en"]}],
        }
        assert client.get("/v1/models/demo").json() == client.get("/v1/models").json()["data"][0]
        assert client.get("/v1/models/").status_code == 404
        for _ in range(2):
            schema = client.get("/openapi.json").json()
            responses = schema["paths"]["/v1/audio/transcriptions"]["post"]["responses"]
            assert {"200", "400", "429"} <= set(responses) and "422" not in responses
        missing = client.get("/nothing")
        assert missing.status_code == 404 and missing.json()["error"] == {
            "message": "Not Found",
            "type": "invalid_request_error",
            "code": None,
            "param": None,
        }
        wrong = client.put("/healthz")
        assert wrong.status_code == 405 and wrong.headers["allow"]
