"""Riva's gRPC: what each field does, access, and each way a call ends. The model and the transport are fakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from riva.client.proto import health_pb2, riva_asr_pb2, riva_audio_pb2

from nemostream.errors import AudioError, BackendError, CapacityError, OptionError
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.serving.errors import Draining
from nemostream.serving.protocols import riva

STREAM = "/nvidia.riva.asr.RivaSpeechRecognition/StreamingRecognize"
RECOGNIZE = "/nvidia.riva.asr.RivaSpeechRecognition/Recognize"
CONFIG = "/nvidia.riva.asr.RivaSpeechRecognition/GetRivaSpeechRecognitionConfig"
HEALTH = "/grpc.health.v1.Health/Check"
WAIT = object()  # the client sends nothing more
Request = riva_asr_pb2.StreamingRecognizeRequest
Code = grpc.StatusCode


class Aborted(Exception):
    """The call ended with a status."""


class Call:
    """A call of a client: the handlers' context, and what they send."""

    def __init__(
        self, here: Any, method: str, *requests: Any, peer: str = "ipv4:192.0.2.7:55", **metadata: Any
    ) -> None:
        self._here, self._method, self._requests, self._peer = here, method, requests, peer
        self._metadata = tuple((name.replace("_", "-"), value) for name, value in metadata.items())
        self.responses: list[Any] = []
        self.code, self.details, self.trailing = Code.OK, "", {}
        self.received = 0  # requests that the server read
        self.write_seconds = 0.0

    # -- the interface of grpc.aio -------------------------------------------------------------------------------------

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> Any:
        return self._metadata

    async def write(self, response: Any) -> None:
        await asyncio.sleep(self.write_seconds)
        self.responses.append(response)

    async def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> None:
        self.code, self.details, self.trailing = code, details, dict(trailing_metadata)
        raise Aborted

    # -- the client ----------------------------------------------------------------------------------------------------

    async def _messages(self) -> AsyncIterator[Any]:
        for request in self._requests:
            if request is WAIT:
                await asyncio.sleep(1e6)
            self.received += 1
            yield request

    async def run(self) -> Call:
        generic: list[Any] = []

        class Server:
            def add_generic_rpc_handlers(self, handlers: Any) -> None:
                generic.extend(handlers)

            def add_registered_method_handlers(self, *arguments: Any) -> None:
                pass

        class Details:
            method, invocation_metadata = self._method, self._metadata

        async def continuation(details: Any) -> Any:
            return next(filter(None, (handler.service(details) for handler in generic)), None)

        riva.add_to(Server(), self._here)  # type: ignore[arg-type]
        handler = await riva.AccessInterceptor(self._here).intercept_service(continuation, Details())  # type: ignore[arg-type]
        with contextlib.suppress(Aborted):
            if handler.stream_stream:
                await handler.stream_stream(self._messages(), self)
            elif handler.stream_unary:
                self.responses.append(await handler.stream_unary(self._messages(), self))
            else:
                self.responses.append(await handler.unary_unary(self._requests[0], self))
        return self

    @property
    def results(self) -> list[Any]:
        return [result for response in self.responses for result in response.results]


@pytest.fixture
def here(fakes: Any, model: Any, clock: Any) -> Any:
    return fakes.start(model, clock)


def call(fakes: Any, here: Any, method: str, *requests: Any, **options: Any) -> Call:
    result: Call = fakes.run(here.clock, Call(here, method, *requests, **options).run())
    return result


def config(interim: bool = True, **fields: Any) -> Any:
    streaming = riva_asr_pb2.StreamingRecognitionConfig(
        config=riva_asr_pb2.RecognitionConfig(**fields), interim_results=interim
    )
    return Request(streaming_config=streaming)


def audio(samples: int = 1600, **fields: Any) -> Any:
    return Request(audio_content=b"\1\2" * samples, **fields)


def recording(samples: int = 1600, id_: str = "", **fields: Any) -> Any:
    request = riva_asr_pb2.RecognizeRequest(config=riva_asr_pb2.RecognitionConfig(**fields), audio=b"\1\2" * samples)
    if id_:
        request.id.value = id_
    return request


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [STREAM, RECOGNIZE])
def test_each_field_sets_what_it_names(fakes: Any, here: Any, model: Any, method: str) -> None:
    fields: dict[str, Any] = {
        "encoding": riva_audio_pb2.AudioEncoding.MULAW,
        "sample_rate_hertz": 8000,
        "audio_channel_count": 2,
        "language_code": "en-GB",
        "custom_configuration": {"chunk_ms": "160", "final_chunk_ms": "1120"},
        "endpointing_config": riva_asr_pb2.EndpointingConfig(stop_history=1234),
        "speech_contexts": [
            riva_asr_pb2.SpeechContext(phrases=["nine", "ten"], boost=400),
            riva_asr_pb2.SpeechContext(phrases=["two"], boost=20),
            riva_asr_pb2.SpeechContext(phrases=["three"]),
        ],
    }
    requests = [recording(8, **fields)] if method == RECOGNIZE else [config(**fields), audio(8)]
    assert call(fakes, here, method, *requests).code is Code.OK
    (stream,) = model.streams
    assert (stream.sample_rate, stream.channels, stream.pushed.shape) == (8000, 2, (8, 2))
    assert stream.pushed[0].tolist() == [-31100, -30076]  # the codes 1 and 2 of mu-law
    sizes = {STREAM: (160, 1120), RECOGNIZE: (1120, None)}[method]  # a recording has no partials
    assert stream.options == {
        "chunk_ms": sizes[0],
        "final_chunk_ms": sizes[1],
        "endpoint": Endpoint(1234, 300_000, "keep", True),
        "phrases": ("compiled", {"nine": 20.0, "ten": 20.0, "two": 1.0, "three": 1.0}),
        "vad": False,
        "language": "en",
    }
    assert stream.closed and not here.sessions


def test_options_that_are_not_set_have_defaults(fakes: Any, here: Any, model: Any) -> None:
    empty = riva_asr_pb2.SpeechContext(boost=20)
    for request in (
        config(),
        config(speech_contexts=[empty], custom_configuration={"chunk_ms": "", "final_chunk_ms": ""}),
    ):
        call(fakes, here, STREAM, request, audio(8))
        stream = model.streams[-1]
        assert (stream.sample_rate, stream.channels) == (16000, 1) and stream.pushed.tolist() == [513] * 8
        assert stream.options == {
            "chunk_ms": 560,
            "final_chunk_ms": None,
            "endpoint": Endpoint(800, 300_000),
            "phrases": None,
            "vad": False,
            "language": "en",
        }


@pytest.mark.parametrize(("name", "value"), [("LINEAR_PCM", 513), ("ALAW", -5248), ("MULAW", -31100)])
def test_samples_are_decoded_by_their_encoding(fakes: Any, here: Any, model: Any, name: str, value: int) -> None:
    call(fakes, here, STREAM, config(encoding=riva_audio_pb2.AudioEncoding.Value(name)), audio(8))
    assert model.streams[0].pushed[0] == value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoding": 4}, "streams of OGGOPUS are not supported"),
        ({"encoding": 99}, "streams of encoding 99 are not supported"),
        ({"diarization_config": {"enable_speaker_diarization": True}}, "speaker diarization is not supported."),
        ({"enable_separate_recognition_per_channel": True}, "separate recognition per channel is not supported."),
        ({"profanity_filter": True}, "a profanity filter is not supported."),
        (
            {"custom_configuration": {"x": "1"}},
            "custom_configuration has no 'x'; its keys are chunk_ms, final_chunk_ms, itn.",
        ),
        ({"custom_configuration": {"chunk_ms": "-80"}}, "chunk_ms is '-80'; it must be a whole number"),
        ({"custom_configuration": {"final_chunk_ms": "560"}}, "final_chunk_ms is 560; with chunk_ms 560"),
        ({"custom_configuration": {"final_chunk_ms": "8e1"}}, "final_chunk_ms is '8e1'; it must be a whole number"),
        ({"custom_configuration": {"itn": "yes"}}, "itn is 'yes'; it must be true or false."),
        ({"custom_configuration": {"itn": "TRUE"}, "verbatim_transcripts": True}, "exclude each other"),
        ({"endpointing_config": {"stop_history": -1}}, "endpoint_ms is -1"),
        ({"endpointing_config": {"stop_history": 79}}, "endpoint_ms is 79"),
    ],
)
def test_invalid_options(fakes: Any, here: Any, model: Any, fields: Any, message: str) -> None:
    done = call(fakes, here, STREAM, config(**fields), WAIT)
    assert done.code is Code.INVALID_ARGUMENT and message in done.details and not done.trailing
    assert not model.streams and not here.sessions


@pytest.mark.parametrize(
    ("fields", "enabled"),
    [
        ({}, False),
        ({"verbatim_transcripts": True}, False),
        ({"custom_configuration": {"itn": "True"}}, True),
        ({"custom_configuration": {"itn": "1"}}, True),
        ({"custom_configuration": {"itn": "0"}}, False),
        ({"custom_configuration": {"itn": "false"}, "verbatim_transcripts": True}, False),
    ],
)
def test_inverse_text_normalization_is_an_option(
    fakes: Any, here: Any, monkeypatch: pytest.MonkeyPatch, fields: Any, enabled: bool
) -> None:
    requested: list[Any] = []

    async def normalizer(enabled: bool, language: str | None = None) -> Any:
        requested.append((enabled, language))

    monkeypatch.setattr(here, "normalizer", normalizer)
    call(fakes, here, STREAM, config(language_code="en-US", **fields), audio(8))
    assert requested == [(enabled, "en")]


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interim", [True, False])
@pytest.mark.parametrize("words", [True, False])
def test_fields_of_results(fakes: Any, here: Any, model: Any, interim: bool, words: bool) -> None:
    model.events = {
        "push": [
            [fakes.event("partial", "one"), fakes.event("backchannel", "one")],
            [fakes.event("final", "one two"), fakes.end()],
        ],
        "finish": [[fakes.event("final", "three"), fakes.end("finish")]],
    }
    first = config(interim, enable_word_time_offsets=words)
    first.id.value = "mine"
    done = call(fakes, here, STREAM, first, audio(), audio())
    assert done.code is Code.OK and {one.id.value for one in done.responses} == {"mine"}
    assert [len(one.results) for one in done.responses] == [1] * len(done.responses)
    partials, finals = [one for one in done.results if not one.is_final], [one for one in done.results if one.is_final]
    assert [one.alternatives[0].transcript for one in partials] == ["one"] * interim
    assert [one.alternatives[0].transcript for one in finals] == ["one two ", "three "]
    for result in done.results:
        assert (result.stability, result.channel_tag) == (1.0, 1) and len(result.alternatives) == 1
        assert result.audio_processed == pytest.approx(2.345678)
    alternative = finals[0].alternatives[0]
    assert alternative.confidence == pytest.approx(0.65) and list(alternative.language_code) == ["en-US"]
    found = [(one.word, one.start_time, one.end_time, one.language_code) for one in alternative.words]
    assert found == ([("one", 0, 250, "en-US"), ("two", 500, 750, "en-US")] if words else [])
    assert [one.confidence for one in alternative.words] == pytest.approx([0.9, 0.65] if words else [])
    assert (fakes.metric(here, "streams_failed_total", transport="riva") or 0) == 0 and not here.sessions
    assert fakes.metric(here, "streams_opened_total", transport="riva") == 1


def test_stability_is_the_share_that_is_not_revised(fakes: Any, here: Any, model: Any) -> None:
    events = [fakes.event("partial", "one two"), fakes.event("final", ""), fakes.event("final", "six", stable="six")]
    for custom, stabilities in (({"chunk_ms": "80", "final_chunk_ms": "560"}, [3 / 7, 1, 1]), ({}, [1, 1, 1])):
        model.events = {"push": [events]}
        done = call(fakes, here, STREAM, config(custom_configuration=custom), audio())
        assert [one.stability for one in done.results] == pytest.approx(stabilities)
        assert [one.alternatives[0].transcript for one in done.results] == ["one two", "", "six "]


@pytest.mark.parametrize(
    "texts", [["one two.", "three"], ["你好。", "再见。"], ["OK.", "こんにちは。", "Sí."], ["一", "one"]]
)
def test_streamed_segments_concatenate_to_the_text(fakes: Any, here: Any, model: Any, texts: list[str]) -> None:
    """Finals end with a space if their script has spaces between words; partials do not."""
    events = [fakes.event("partial", texts[0]), *(fakes.event("final", text) for text in texts)]
    model.events = {"push": [events]}
    done = call(fakes, here, STREAM, config(), audio())
    assert done.results[0].alternatives[0].transcript == texts[0]
    expected = "".join(text + ("" if text[-1] in "。一" else " ") for text in texts)
    assert "".join(one.alternatives[0].transcript for one in done.results[1:]) == expected


def test_force_eou_ends_the_utterance_after_the_audio_of_its_message(fakes: Any, here: Any, model: Any) -> None:
    model.events = {"end_utterance": [[fakes.event("final", "one")], [fakes.event("final", "two")]]}
    done = call(
        fakes,
        here,
        STREAM,
        config(),
        audio(10, runtime_config={"force_eou": "TRUE"}),
        audio(20, runtime_config={"force_eou": "false"}),
        audio(0, runtime_config={"force_eou": "1"}),
        audio(30, runtime_config={"force_eou": "0"}),
    )
    calls = [call if isinstance(call, str) else len(call) for call in model.streams[0].calls]
    assert [one for one in calls if one != "check"] == [10, "end_utterance", 20, "end_utterance", 30, "finish"]
    assert [one.alternatives[0].transcript for one in done.results] == ["one ", "two "]


def test_a_recording_of_samples(fakes: Any, model: Any, clock: Any) -> None:
    """It is processed in parts of the maximum size of a message, as an upload."""
    here = fakes.start(model, clock, max_message_bytes=1024, max_streams=1)
    here.open("test")
    uploads: list[Any] = []
    model.events = {
        "push": [[fakes.event("partial", "one")], [fakes.event("final", "one two"), fakes.end()]],
        "finish": [[fakes.event("final", "three", audio=7.5)]],
    }
    opened = here.open

    def recorded_open(*arguments: Any, **options: Any) -> Any:
        uploads.append((here.uploads.count, options["upload"], options["client"].address))
        return opened(*arguments, **options)

    here.open = recorded_open
    done = call(fakes, here, RECOGNIZE, recording(1300, "mine", enable_word_time_offsets=True))
    (response,) = done.responses
    assert response.id.value == "mine" and uploads == [(1, True, "192.0.2.7")] and here.uploads.count == 0
    assert [len(one) for one in model.streams[1].calls if not isinstance(one, str)] == [512, 512, 276]
    assert [one.alternatives[0].transcript for one in done.results] == ["one two ", "three "]
    assert [one.word for one in done.results[0].alternatives[0].words] == ["one", "two"]
    assert [one.channel_tag for one in done.results] == [1, 1]
    assert [one.audio_processed for one in done.results] == pytest.approx([2.345678, 7.5])
    assert len(here.sessions) == 1


def test_a_recording_without_speech(fakes: Any, here: Any) -> None:
    (response,) = call(fakes, here, RECOGNIZE, recording(4000)).responses
    (result,) = response.results
    assert (result.channel_tag, result.audio_processed, len(result.alternatives)) == (1, 0.25, 0)
    assert not response.HasField("id")


@pytest.mark.parametrize(("samples", "accepted"), [(16000, True), (16001, False), (40000, False)])
def test_the_duration_of_recordings_is_limited(
    fakes: Any, model: Any, clock: Any, samples: int, accepted: bool
) -> None:
    here = fakes.start(model, clock, max_upload_seconds=1, max_message_bytes=32768)
    done = call(fakes, here, RECOGNIZE, recording(samples))
    assert done.code is (Code.OK if accepted else Code.INVALID_ARGUMENT) and not here.sessions
    assert accepted or done.details == "the audio is longer than 1 s, the longest allowed."
    assert here.uploads.count == 0 and model.streams[0].closed


def test_the_configuration_of_the_server(fakes: Any, languages_bundle: Any, clock: Any) -> None:
    here = fakes.start(fakes.FakeModel(languages_bundle), clock, chunks=[560, 80], chunk_ms=80)
    request = riva_asr_pb2.RivaSpeechRecognitionConfigRequest
    for name in ("", "languages"):
        (response,) = call(fakes, here, CONFIG, request(model_name=name)).responses
        (entry,) = response.model_config
        assert entry.model_name == "languages" and dict(entry.parameters) == {
            "language_code": "en-US,de-DE,ar-AR,multi",
            "sample_rate": "16000",
            "type": "online",
            "streaming": "True",
            "offline": "True",
            "chunk_ms": "80",
            "chunks_ms": "80,560",
        }
    done = call(fakes, here, CONFIG, request(model_name="other"))
    assert done.code is Code.INVALID_ARGUMENT and done.details == "there is no model 'other', only 'languages'."


def test_health_is_that_of_the_service(fakes: Any, model: Any, clock: Any) -> None:
    """Also without a key."""
    here = fakes.start(model, clock, api_keys=["k"])
    statuses = health_pb2.HealthCheckResponse.ServingStatus
    for state in ("ready", "starting", "failed", "draining"):
        here.state = state
        (response,) = call(fakes, here, HEALTH, health_pb2.HealthCheckRequest()).responses
        assert response.status == (statuses.SERVING if state == "ready" else statuses.NOT_SERVING)


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "retry_ms"),
    [
        (AudioError("no."), Code.INVALID_ARGUMENT, None),
        (BackendError("no."), Code.INTERNAL, None),
        (CapacityError("no."), Code.RESOURCE_EXHAUSTED, "2000"),
        (Draining("no."), Code.UNAVAILABLE, "5000"),
    ],
)
@pytest.mark.parametrize("method", [STREAM, RECOGNIZE])
def test_errors_end_the_call_with_their_status(
    fakes: Any, here: Any, model: Any, caplog: Any, error: Any, code: Any, retry_ms: str | None, method: str
) -> None:
    caplog.set_level("INFO")
    model.error = error
    done = call(fakes, here, method, *([recording()] if method == RECOGNIZE else [config(), audio(), WAIT]))
    assert (done.code, done.details) == (code, "no.")
    assert done.trailing == ({} if retry_ms is None else {"grpc-retry-pushback-ms": retry_ms})
    assert not here.sessions and model.streams[0].closed and here.uploads.count == 0
    assert fakes.metric(here, "streams_failed_total", transport="riva") == 1
    (closed,) = fakes.records(caplog, "stream closed")
    assert closed.error == "no." and fakes.metric(here, "timeouts_total") == 0


@pytest.mark.parametrize("when", ["waiting", "pushing"])
def test_a_cancelled_call_closes_its_session(fakes: Any, here: Any, model: Any, caplog: Any, when: str) -> None:
    caplog.set_level("INFO")

    async def main() -> None:
        model.seconds = 100.0 if when == "pushing" else 0.0
        task = asyncio.create_task(Call(here, STREAM, config(), audio(), WAIT).run())
        await asyncio.sleep(5)
        assert len(here.sessions) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    fakes.run(here.clock, main())
    assert not here.sessions and model.streams[0].closed
    assert fakes.metric(here, "streams_failed_total", transport="riva") == 1
    (closed,) = fakes.records(caplog, "stream closed")
    assert closed.error == "the client disconnected"


def test_a_call_that_fails_before_its_session_is_open(fakes: Any, here: Any) -> None:
    here.max_streams = 0
    done = call(fakes, here, STREAM, config(), audio())
    assert done.code is Code.RESOURCE_EXHAUSTED and done.received == 1
    assert (fakes.metric(here, "streams_failed_total", transport="riva") or 0) == 0


@pytest.mark.parametrize(("idle_seconds", "at"), [(30, 10), (4, 4)])
def test_the_first_message_has_a_deadline(fakes: Any, model: Any, clock: Any, idle_seconds: float, at: float) -> None:
    here = fakes.start(model, clock, idle_seconds=idle_seconds)
    done = call(fakes, here, STREAM, WAIT)
    assert done.code is Code.DEADLINE_EXCEEDED and clock() == at and fakes.metric(here, "timeouts_total") == 1
    assert done.details == f"no streaming_config was received in {at:.0f} s." and not model.streams


def test_a_client_that_sends_nothing(fakes: Any, here: Any, clock: Any) -> None:
    done = call(fakes, here, STREAM, config(), audio(), WAIT)
    assert done.code is Code.DEADLINE_EXCEEDED and clock() == 30 and "nothing was received" in done.details
    assert fakes.metric(here, "timeouts_total") == 1 and not here.sessions
    assert fakes.metric(here, "streams_failed_total", transport="riva") == 1


def test_a_client_that_does_not_read(fakes: Any, here: Any, model: Any, clock: Any) -> None:
    model.events = {"push": [[fakes.event("partial", "one")]]}
    done = Call(here, STREAM, config(), audio(), WAIT)
    done.write_seconds = 1e6
    fakes.run(clock, done.run())
    assert done.code is Code.DEADLINE_EXCEEDED and clock() == 10 and not done.responses and not here.sessions


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "the first message of a stream must be its streaming_config."),
        ([audio()], "the first message of a stream must be its streaming_config."),
        ([config(), audio(), config()], "streaming_config can only be in the first message of a stream."),
        ([config(), audio(runtime_config={"x": "1"})], "runtime_config has no 'x'; its only key is force_eou."),
        ([config(), audio(runtime_config={"force_eou": ""})], "force_eou is ''; it must be true or false."),
    ],
)
def test_invalid_messages(fakes: Any, here: Any, requests: Any, message: str) -> None:
    done = call(fakes, here, STREAM, *requests)
    assert done.code is Code.INVALID_ARGUMENT and done.details == message and not here.sessions


def test_an_invalid_runtime_config_in_the_first_message(fakes: Any, here: Any, model: Any) -> None:
    request = config()
    request.runtime_config["x"] = "1"
    assert call(fakes, here, STREAM, request).code is Code.INVALID_ARGUMENT and not model.streams


# -- access ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"authorization": "Bearer two"}, "key 1"),
        ({"authorization": "bearer one"}, "key 0"),
        ({"authorization_bin": b"Bearer schl\xc3\xbcssel"}, "key 2"),
        ({"x_api_key": "two"}, "key 1"),
        ({"authorization": "Bearer one", "authorization_bin": b"Bearer two"}, "key 0"),
        ({"authorization": "Basic one"}, None),
        ({"authorization": "Bearer three"}, None),
        ({"authorization": "two"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("method", [STREAM, RECOGNIZE, CONFIG])
def test_calls_need_one_of_the_keys(
    fakes: Any, model: Any, clock: Any, metadata: Any, name: str | None, method: str, caplog: Any
) -> None:
    here = fakes.start(model, clock, api_keys=["one", "two", "schlüssel"])
    clients: list[Any] = []
    opened = here.open
    here.open = lambda *arguments, **options: clients.append(options["client"]) or opened(*arguments, **options)
    requests = {
        STREAM: [config(), audio()],
        RECOGNIZE: [recording()],
        CONFIG: [riva_asr_pb2.RivaSpeechRecognitionConfigRequest()],
    }[method]
    done = call(fakes, here, method, *requests, **metadata)
    denied = fakes.records(caplog, "request denied")
    if name is None:
        assert done.code is Code.UNAUTHENTICATED and done.received == 0 and not clients
        assert [(one.reason, one.peer) for one in denied] == [("key", "192.0.2.7")]
    else:
        assert done.code is Code.OK and [(one.name, one.address) for one in clients] == (
            [] if method == CONFIG else [(name, "192.0.2.7")]
        )
    assert fakes.metric(here, "requests_denied_total", reason="key") == (1 if name is None else 0)


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("ipv4:192.0.2.7:55", None, "192.0.2.7"),
        ("ipv4:192.0.2.7:55", "198.51.100.1", "192.0.2.7"),
        ("ipv4:127.0.0.1:55", "198.51.100.1", "198.51.100.1"),
        ("ipv6:%5B2001:db8::7%5D:55", None, "2001:db8::7"),
        ("ipv6:[::1]:55", "198.51.100.1", "198.51.100.1"),
        ("unix:/run/socket", None, "unix:/run/socket"),
    ],
)
def test_addresses_of_clients(fakes: Any, here: Any, peer: str, forwarded: str | None, address: str) -> None:
    clients: list[Any] = []
    opened = here.open
    here.open = lambda *arguments, **options: clients.append(options["client"]) or opened(*arguments, **options)
    metadata = {} if forwarded is None else {"x_forwarded_for": forwarded}
    call(fakes, here, STREAM, config(), audio(), peer=peer, **metadata)
    assert [(one.name, one.address) for one in clients] == [(address, address)]


def test_a_recording_is_admitted_before_it_is_read(fakes: Any, model: Any, clock: Any) -> None:
    here = fakes.start(model, clock, max_uploads=1, max_upload_bytes=2048, max_upload_total_bytes=4096)
    with here.uploads.admit(1, riva.Client("x", "x")):
        done = call(fakes, here, RECOGNIZE, recording())
        assert done.code is Code.RESOURCE_EXHAUSTED and done.received == 0
        assert done.trailing == {"grpc-retry-pushback-ms": "2000"}
        assert call(fakes, here, STREAM, config(), audio()).code is Code.OK
    assert call(fakes, here, RECOGNIZE, recording()).code is Code.OK and here.uploads.count == 0


@pytest.mark.parametrize("method", [RECOGNIZE, CONFIG])
@pytest.mark.parametrize(("requests", "at"), [([], 0), ([WAIT], 77)])
def test_a_unary_call_without_a_message(
    fakes: Any, model: Any, clock: Any, method: str, requests: list[Any], at: float
) -> None:
    here = fakes.start(model, clock, body_seconds=77)
    done = call(fakes, here, method, *requests)
    assert done.code is Code.INVALID_ARGUMENT and done.details == "the call has no message." and clock() == at
    assert here.uploads.count == 0


def test_unknown_methods_are_left_to_grpc(fakes: Any, here: Any) -> None:
    async def main() -> Any:
        class Details:
            method, invocation_metadata = "/x/y", ()

        async def continuation(details: Any) -> Any:
            return None

        return await riva.AccessInterceptor(here).intercept_service(continuation, Details())  # type: ignore[arg-type]

    assert fakes.run(here.clock, main()) is None


def test_a_starting_server(fakes: Any, clock: Any) -> None:
    from nemostream.serving.service import Service
    from nemostream.serving.settings import Settings

    here = Service(Settings(), clock)
    for method, requests in (
        (STREAM, [config(), audio()]),
        (RECOGNIZE, [recording()]),
        (CONFIG, [riva_asr_pb2.RivaSpeechRecognitionConfigRequest()]),
    ):
        done = call(fakes, here, method, *requests)
        assert done.code is Code.UNAVAILABLE and done.trailing == {"grpc-retry-pushback-ms": "5000"}


def test_options_that_are_checked_by_the_service(fakes: Any, here: Any, model: Any) -> None:
    model.open_error = OptionError("sample_rate is 5.")
    done = call(fakes, here, STREAM, config(sample_rate_hertz=5), audio())
    assert done.code is Code.INVALID_ARGUMENT and done.details == "sample_rate is 5."
