"""All fields of the published schemas against docs/protocols.md and a running server; 15 MiB appends; ITN."""

from __future__ import annotations

import base64
import json
import re
import typing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import riva.client
import soxr
from openai.types.audio import transcription_create_params
from openai.types.realtime import realtime_client_event_param, realtime_transcription_session_create_request_param
from riva.client.proto import riva_asr_pb2, riva_common_pb2
from websockets.sync.client import connect

DOCS = Path(__file__).parents[3] / "docs" / "protocols.md"
COMPLETED = "conversation.item.input_audio_transcription.completed"


def table(heading: str) -> dict[str, str]:
    """Return the status of each field of a table."""
    text = DOCS.read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \|", text, re.M)
    assert len(dict(rows)) == len(rows) and {status for _, status in rows} <= {"supported", "rejected", "ignored"}
    return dict(rows)


def leaves(kind: Any, path: str = "") -> set[str]:
    """Return the dotted names of all nested fields of a TypedDict; noise reduction counts as one field."""
    kind = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Required else kind
    if hasattr(kind, "__annotations__") and hasattr(kind, "__total__"):
        names: set[str] = set()
        for name, inner in typing.get_type_hints(kind).items():
            where = f"{path}.{name}" if path else name
            names |= {where} if name == "noise_reduction" else leaves(inner, where)
        return names
    options = [leaves(one, path) for one in typing.get_args(kind) if hasattr(one, "__total__")]
    return set().union(*options) if options else {path}


# -- tables and schemas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "RecognitionConfig",
        "EndpointingConfig",
        "SpeakerDiarizationConfig",
        "StreamingRecognitionConfig",
        "StreamingRecognizeRequest",
    ],
)
def test_tables_have_all_fields_of_riva(name: str) -> None:
    assert set(table(name)) == {field.name for field in getattr(riva_asr_pb2, name).DESCRIPTOR.fields}


def test_tables_have_all_fields_of_openai() -> None:
    create = set(typing.get_type_hints(transcription_create_params.TranscriptionCreateParamsNonStreaming))
    assert set(table("TranscriptionCreateParams")) == create
    session = realtime_transcription_session_create_request_param.RealtimeTranscriptionSessionCreateRequestParam
    assert set(table("Session")) == leaves(session)
    union = typing.get_args(realtime_client_event_param.RealtimeClientEventParam)
    events = {
        typing.get_args(typing.get_args(typing.get_type_hints(one, include_extras=True)["type"])[0])[0] for one in union
    }
    assert set(table("Events")) == events


# -- tables and the server ---------------------------------------------------------------------------------------------

RIVA_REJECTED = {
    "profanity_filter": {"profanity_filter": True},
    "enable_separate_recognition_per_channel": {"enable_separate_recognition_per_channel": True},
    "diarization_config": {"diarization_config": {"enable_speaker_diarization": True}},
}
RIVA_IGNORED = {
    "max_alternatives": 3,
    "enable_automatic_punctuation": True,
    "model": "parakeet",
    "endpointing_config": {
        "start_history": 100,
        "start_threshold": 0.5,
        "stop_threshold": 0.5,
        "stop_history_eou": 100,
        "stop_threshold_eou": 0.5,
    },
    "diarization_config": {"max_speaker_count": 2},
}


def recognise(running: Any, audio: bytes, **config: Any) -> str:
    service = riva.client.ASRService(riva.client.Auth(uri=running.address))
    answer = service.offline_recognize(audio, riva.client.RecognitionConfig(sample_rate_hertz=16000, **config))
    return "".join(result.alternatives[0].transcript for result in answer.results).strip()


def test_riva_matches_its_table(server: Any, spoken: Any) -> None:
    statuses = table("RecognitionConfig")
    assert set(RIVA_REJECTED) == {name for name, status in statuses.items() if status == "rejected"}
    for name, config in RIVA_REJECTED.items():
        with pytest.raises(grpc.RpcError) as caught:
            recognise(server, spoken[1].pcm, **config)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert name.split("_")[0].removesuffix("ion") in caught.value.details() or "channel" in caught.value.details()
    ignored = {name for name, status in statuses.items() if status == "ignored"}
    assert ignored <= set(RIVA_IGNORED)
    inner = {name for name, status in table("EndpointingConfig").items() if status == "ignored"}
    assert inner == set(RIVA_IGNORED["endpointing_config"])
    assert recognise(server, spoken[1].pcm, **RIVA_IGNORED) == spoken[1].text
    for config in ({"custom_configuration": {"x": "1"}}, {"custom_configuration": {"itn": "x"}}):
        with pytest.raises(grpc.RpcError, match=r"custom_configuration|itn"):
            recognise(server, spoken[1].pcm, **config)


def test_force_eou_ends_the_utterance(server: Any, spoken: Any) -> None:
    """Two recordings without silence between them: `force_eou` ends the first utterance."""
    kind = riva_asr_pb2.StreamingRecognizeRequest
    config = riva_asr_pb2.StreamingRecognitionConfig(
        config=riva_asr_pb2.RecognitionConfig(sample_rate_hertz=16000, endpointing_config={"stop_history": 60000})
    )
    stub = riva.client.ASRService(riva.client.Auth(uri=server.address)).stub

    def finals(*messages: Any) -> list[str]:
        first = kind(streaming_config=config, id=riva_common_pb2.RequestId(value="mine"))
        answers = list(stub.StreamingRecognize(iter([first, *messages])))
        assert all(answer.id.value == "mine" for answer in answers)
        return [result.alternatives[0].transcript.strip() for answer in answers for result in answer.results]

    forced = {"force_eou": "true"}
    one, two = spoken[1].pcm, spoken[2].pcm
    assert len(finals(kind(audio_content=one), kind(audio_content=two))) == 1
    together = finals(kind(audio_content=one, runtime_config=forced), kind(audio_content=two))
    separate = finals(kind(audio_content=one), kind(runtime_config=forced), kind(audio_content=two))
    assert len(together) == 2 and together == separate
    for invalid in ({"force_eou": "maybe"}, {"x": "true"}):
        with pytest.raises(grpc.RpcError, match="force_eou"):
            finals(kind(audio_content=one, runtime_config=invalid))
    with pytest.raises(grpc.RpcError, match="first message"):
        finals(kind(streaming_config=config))


def test_transcriptions_match_their_table(server: Any, spoken: Any) -> None:
    rejected: dict[str, Any] = {
        "chunking_strategy": {"type": "server_vad"},
        "include": ["logprobs"],
        "known_speaker_names": ["a"],
        "known_speaker_references": ["data:audio/wav;base64,AAAA"],
    }
    assert set(rejected) == {n for n, status in table("TranscriptionCreateParams").items() if status == "rejected"}
    create = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0).audio.transcriptions.create
    for name, value in (*rejected.items(), ("languages", ["de"])):
        with pytest.raises(openai.BadRequestError, match=name.removesuffix("s")):
            create(model="any", file=spoken[1].path, **{name: value})
    with pytest.raises(openai.BadRequestError, match="chunk_m'"):
        create(model="any", file=spoken[1].path, extra_body={"chunk_m": 80})
    same = create(
        model="x", file=spoken[1].path, prompt="x", temperature=0.7, chunking_strategy="auto", languages=["en"]
    )
    assert same.text == spoken[1].text
    assert create(model="any", file=spoken[1].path, keywords=["nine"]).text


def exchange(running: Any, *events: Any, max_responses: int = 1) -> list[dict[str, Any]]:
    """Send events and return the responses, without the initial one."""
    responses: list[dict[str, Any]] = []
    with connect(f"{running.socket}/v1/realtime?intent=transcription", max_size=None) as socket:
        for event in events:
            socket.send(event if isinstance(event, str | bytes) else json.dumps(event))
        assert json.loads(socket.recv())["type"] == "session.created"
        while len(responses) < max_responses:
            responses.append(json.loads(socket.recv(timeout=120)))
            if responses[-1]["type"] == COMPLETED:
                break
    return responses


def nested(path: str, value: Any) -> Any:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def test_realtime_matches_its_table(server: Any) -> None:
    values: dict[str, Any] = {
        "include": ["item.input_audio_transcription.logprobs"],
        "audio.input.transcription.delay": "low",
        "audio.input.turn_detection.idle_timeout_ms": 6000,
        "audio.input.turn_detection.eagerness": "low",
        "audio.input.noise_reduction": {"type": "near_field"},
        "audio.input.transcription.model": "gpt-transcribe",
        "audio.input.transcription.prompt": "x",
        "audio.input.turn_detection.threshold": 0.7,
        "audio.input.turn_detection.prefix_padding_ms": 300,
        "audio.input.turn_detection.create_response": True,
        "audio.input.turn_detection.interrupt_response": True,
        "type": "transcription",
        "audio.input.format.type": "audio/pcm",
        "audio.input.transcription.language": "en",
        "audio.input.transcription.languages": ["en"],
        "audio.input.transcription.keywords": ["nine"],
        "audio.input.turn_detection.type": "server_vad",
        "audio.input.turn_detection.silence_duration_ms": 300,
    }
    for path, status in table("Session").items():
        session = nested(path, values.get(path))
        if path == "audio.input.format.rate":
            session = nested("audio.input.format", {"type": "audio/pcm", "rate": 24000})
        (answer,) = exchange(server, {"type": "session.update", "session": session})
        if status == "rejected":
            assert answer["error"]["code"] == "invalid_value" and answer["error"]["param"] == "session." + path
            assert path.rpartition(".")[2] in answer["error"]["message"]
        else:
            assert answer["type"] == "session.updated", (path, answer)
    for kind, status in table("Events").items():
        if status == "rejected":
            (answer,) = exchange(server, {"type": kind})
            assert answer["error"]["code"] == "invalid_value" and kind in answer["error"]["message"]


@pytest.mark.parametrize(
    ("event", "code", "param"),
    [
        ({"type": "input_audio_buffer.commit", "event_id": "c1"}, "input_audio_buffer_commit_empty", None),
        ("{", "invalid_json", None),
        ("[]", "invalid_json", None),
        ({}, "missing_required_parameter", "type"),
        ({"type": "input_audio_buffer.append"}, "missing_required_parameter", "audio"),
        ({"type": "input_audio_buffer.append", "audio": 7}, "invalid_type", "audio"),
        ({"type": "input_audio_buffer.append", "audio": "?"}, "invalid_value", "audio"),
        ({"type": "input_audio_buffer.clear", "x": 7}, "unknown_parameter", "x"),
        (
            {"type": "session.update", "session": nested("audio.input.x", 7)},
            "unknown_parameter",
            "session.audio.input.x",
        ),
        (
            {"type": "session.update", "session": nested("audio.input.turn_detection.type", "semantic_vad")},
            "invalid_value",
            "session.audio.input.turn_detection.type",
        ),
        (
            {"type": "session.update", "session": nested("audio.input.transcription", None)},
            "invalid_value",
            "session.audio.input.transcription",
        ),
    ],
)
def test_codes_of_realtime_errors(server: Any, event: Any, code: str, param: str | None) -> None:
    (answer,) = exchange(server, event)
    assert (answer["error"]["code"], answer["error"]["param"]) == (code, param)
    assert answer["error"]["message"].endswith(".")
    assert answer["error"]["event_id"] == (event.get("event_id") if isinstance(event, dict) else None)


# -- large messages ----------------------------------------------------------------------------------------------------


def test_an_append_of_15_mib(server: Any, spoken: Any) -> None:
    """15 MiB are accepted in one frame, also with escaped slashes, and the last seconds are transcribed."""
    speech = soxr.resample(np.frombuffer(spoken[1].pcm, np.int16), 16000, 24000).tobytes()
    pcm = bytes((15 << 20) - len(speech)) + speech
    manual = {"type": "session.update", "session": nested("audio.input.turn_detection", None)}
    commit = {"type": "input_audio_buffer.commit"}
    text = json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm).decode()})
    assert len(pcm) == 15 << 20 and "/" in text
    events = exchange(server, manual, text.replace("/", "\\/"), commit, max_responses=1000)
    assert events[-1]["type"] == COMPLETED and events[-1]["usage"]["seconds"] == pytest.approx(len(pcm) / 48000)
    assert set(events[-1]["transcript"].split()) & set(spoken[1].text.split())


def test_limits_of_large_messages(server: Any) -> None:
    for path, message, code in (
        ("realtime", json.dumps({"type": "x", "audio": "ü" * (2 << 20)}, ensure_ascii=False), 1008),
        ("realtime", "A" * (21 << 20), 1009),
        ("stream", bytes((1 << 20) + 1), 1009),
    ):
        with connect(f"{server.socket}/v1/{path}", max_size=None) as socket:
            socket.recv()
            try:
                socket.send(message)
                while True:
                    socket.recv(timeout=30)
            except Exception:  # closed while sending or afterwards
                pass
        assert socket.protocol.close_code == code


# -- inverse text normalization ----------------------------------------------------------------------------------------


def test_itn_in_every_protocol(server: Any, spoken: Any) -> None:
    """The final text is normalized; without the extra, the error names it."""
    clip = spoken[1]
    create = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0).audio.transcriptions.create
    if find_spec("nemo_text_processing") is None:
        with pytest.raises(openai.BadRequestError, match="itn extra"):
            create(model="any", file=clip.path, extra_body={"itn": "true"})
        with pytest.raises(grpc.RpcError, match="itn extra"):
            recognise(server, clip.pcm, custom_configuration={"itn": "true"})
        assert server.get("/v1/stream?itn=1")[0] in (400, 404)
        return
    import nemostream

    with nemostream.load() as model:
        normalize = nemostream.InverseNormalizer()
        clip = next(
            one
            for one in spoken
            if [w.text for w in normalize(model.transcribe(one.path).words)] != model.transcribe(one.path).text.split()
        )
        expected = " ".join(word.text for word in normalize(model.transcribe(clip.path).words))
    assert expected != clip.text
    assert create(model="any", file=clip.path, extra_body={"itn": "true"}).text == expected
    events = list(create(model="any", file=clip.path, stream=True, extra_body={"itn": "true"}))
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == events[-1].text == expected
    assert recognise(server, clip.pcm, custom_configuration={"itn": "true"}) == expected
    assert recognise(server, clip.pcm) == clip.text
    with pytest.raises(grpc.RpcError, match="verbatim_transcripts"):
        recognise(server, clip.pcm, verbatim_transcripts=True, custom_configuration={"itn": "true"})
    with connect(f"{server.socket}/v1/stream?itn=1&words=1") as socket:
        socket.send(clip.pcm)
        socket.send('{"type": "finish"}')
        received = [json.loads(message) for message in socket]
    finals = [event for event in received if event["type"] == "final"]
    assert received[-1]["text"] == " ".join(event["text"] for event in finals) == expected
    assert [word["text"] for event in finals for word in event["words"]] == expected.split()
