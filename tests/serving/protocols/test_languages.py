"""Languages, language tags and model-based ends of utterances in every protocol, each with its real client.

The model is the demo model with prompts and tags (`languages_bundle`). The references are its streams in Python.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import openai
import pytest
import riva.client
import soundfile
from riva.client.proto import riva_asr_pb2
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import nemostream
from nemostream.bundle import Bundle, LanguageConfig
from nemostream.errors import OptionError
from nemostream.runtime.text import itn
from nemostream.runtime.text.scripts import separator
from nemostream.serving.languages import english_name, from_riva, select_language
from nemostream.serving.service import Service
from nemostream.serving.settings import Settings, read_settings

COMPLETED = "conversation.item.input_audio_transcription.completed"
DELTA = "conversation.item.input_audio_transcription.delta"


@pytest.fixture(scope="module")
def model(languages_bundle: Any) -> Iterator[nemostream.Model]:
    with nemostream.load(languages_bundle.path) as model:
        yield model


@pytest.fixture(scope="module")
def speech(spoken: Any) -> np.ndarray[Any, Any]:
    """A recording with the tags <EOU>, <EOB> and <de-DE>."""
    return np.frombuffer(spoken[0].pcm, np.int16)


@pytest.fixture(scope="module")
def texts(model: nemostream.Model, speech: Any) -> dict[str, str]:
    """The text of `speech` by language; it differs for each of them."""
    texts = {name: model.transcribe(speech, language=name).text for name in ("en-US", "de-DE", "ar-AR")}
    assert len(set(texts.values())) == 3 and all(texts.values()) and "<" not in "".join(texts.values())
    return texts


def finals(model: nemostream.Model, audio: Any, **options: Any) -> list[nemostream.Event]:
    return [event for event in model.listen(audio, **options) if event.kind == "final"]


def text_with_change(model: nemostream.Model, audio: Any, at: int, first: str, second: str) -> str:
    """Return the text of a stream whose language changes after `at` samples."""
    with model.stream(language=first) as stream:
        stream.push(audio[:at])
        stream.set_language(second)
        stream.push(audio[at:])
        return stream.finish().text


# -- names -------------------------------------------------------------------------------------------------------------


def test_english_names_are_those_of_whisper() -> None:
    whisper = pytest.importorskip("transformers.models.whisper.tokenization_whisper").LANGUAGES
    assert {code: english_name(code) for code in whisper} == whisper
    assert english_name("de-DE") == "german" and english_name("or-KE") == "oromo" and english_name("xx") == "xx"
    assert english_name(None) == "unknown"


def test_utterances_of_scripts_without_spaces_are_not_separated() -> None:
    texts = ["你好。", "再见", "こんにちは！", "OK.", "ก็ดี", "Sí"]
    assert "".join(text + separator(text) for text in texts) == "你好。再见こんにちは！OK. ก็ดีSí "


def test_candidate_languages_are_detected() -> None:
    prompted = LanguageConfig("en-US", {"en-US": 0, "en": 0, "de-DE": 1, "auto": 2}, 3)
    assert select_language(prompted, None) is None and select_language(prompted, "", [""]) is None
    assert select_language(prompted, None, ["de"]) == "de-DE"
    assert select_language(prompted, None, ["en", "en-US"]) == "en-US"
    assert select_language(prompted, None, ["en", "de"]) == "auto"
    assert select_language(prompted, "de", ["en", "de"]) == "de-DE"
    with pytest.raises(OptionError, match="fr"):
        select_language(prompted, "de", ["fr"])
    without_detection = LanguageConfig("en-US", {"en-US": 0, "de-DE": 1}, 2)
    with pytest.raises(OptionError, match="cannot detect"):
        select_language(without_detection, None, ["en", "de"])
    assert select_language(LanguageConfig(), None, ["en", "en-GB"]) == "en"
    with pytest.raises(OptionError, match="the maximum is 128"):
        select_language(prompted, None, ["de"] * 129)


def test_codes_of_riva() -> None:
    prompted = LanguageConfig("en-US", {"en-US": 0, "en": 0, "de-DE": 1, "auto": 2}, 3)
    assert from_riva(prompted, "") is None
    for code in ("multi", "multi-language", "Multi"):
        assert from_riva(prompted, code) == "auto" and from_riva(LanguageConfig(), code) is None
    with pytest.raises(OptionError, match="multi"):
        from_riva(LanguageConfig("en-US", {"en-US": 0, "de-DE": 1}, 2), "multi")
    assert from_riva(LanguageConfig(), "en-GB") == "en"


def test_languages_as_clients_write_them() -> None:
    """English names, as Whisper's clients write them, and codes of three letters for a model of one language."""
    prompted = LanguageConfig("en-US", {"en-US": 0, "en": 0, "de-DE": 1, "auto": 2}, 3)
    assert select_language(prompted, "German") == "de-DE" and from_riva(prompted, "german") == "de-DE"
    assert select_language(prompted, None, ["english"]) == "en-US"
    for name in ("english", "English", "eng", "EN-us"):
        assert select_language(LanguageConfig(), name) == from_riva(LanguageConfig(), name) == "en"
    assert select_language(LanguageConfig("de"), "german") == "de"
    for name in ("german", "de", "e"):
        with pytest.raises(OptionError, match="this model supports 'en' only"):
            select_language(LanguageConfig(), name)


# -- WebSocket ---------------------------------------------------------------------------------------------------------


def events_of(socket: Any, *messages: Any) -> list[dict[str, Any]]:
    """Send messages, finish the stream, and return all events after `ready`."""
    for message in messages:
        socket.send(message if isinstance(message, bytes) else json.dumps(message))
    socket.send(json.dumps({"type": "finish"}))
    events = [json.loads(event) for event in socket]
    assert socket.close_code == 1000
    return events


@pytest.mark.parametrize(("language", "name"), [("de", "de-DE"), ("DE_de", "de-DE"), ("ar-AR", "ar-AR")])
def test_websocket_language(
    languages_server: Any, speech: Any, texts: dict[str, str], language: str, name: str
) -> None:
    with connect(f"{languages_server.socket}/v1/stream?language={language}") as socket:
        assert json.loads(socket.recv())["language"] == name
        *events, done = events_of(socket, speech.tobytes())
    assert done["text"] == texts[name] != texts["en-US"]
    assert {event["language"] for event in events if event["type"] in ("partial", "final")} == {name}


def test_websocket_language_changes_during_a_stream(
    languages_server: Any, model: Any, speech: Any, texts: dict[str, str]
) -> None:
    """The change takes effect at the same chunk as in Python, for any message size."""
    at = 3 * 8960 + 100
    expected = text_with_change(model, speech, at, "en", "ar")
    assert expected not in texts.values()
    first = [speech[begin : min(begin + 1111, at)].tobytes() for begin in range(0, at, 1111)]
    change = {"type": "configure", "language": "ar", "chunk_ms": 560}
    with connect(f"{languages_server.socket}/v1/stream") as socket:
        assert json.loads(socket.recv())["language"] == "en-US"
        *events, done = events_of(socket, *first, change, speech[at:].tobytes())
    assert done["text"] == expected
    languages = [event["language"] for event in events if event["type"] in ("partial", "final")]
    assert languages[0] == "en-US" and languages[-1] == "ar-AR" and languages == sorted(languages, reverse=True)


def test_a_language_that_is_set_after_the_text_does_not_change_its_language(
    languages_server: Any, model: Any, speech: Any
) -> None:
    """The utterance ends in a chunk of the next language, and the text is of the chunks before."""
    audio = np.append(speech, np.zeros(8000, np.int16)).tobytes()
    with connect(f"{languages_server.socket}/v1/stream?language=de") as socket:
        change = {"type": "configure", "language": "ar"}
        *events, _ = events_of(socket, audio, change, bytes(3200), {"type": "commit"})
    expected = [event.text for event in finals(model, speech, language="de")]
    results = [(event["text"], event["language"]) for event in events if event["type"] == "final"]
    assert results == [(text, "de-DE") for text in expected]


def test_websocket_language_is_kept_for_a_wav_file(
    languages_server: Any, model: Any, spoken: Any, texts: dict[str, str]
) -> None:
    """A header with another sample rate opens a new stream."""
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(spoken[0].pcm, np.int16)[::2], 8000, format="WAV")
    file.seek(0)
    audio, _ = soundfile.read(file, dtype="int16")
    expected = model.transcribe(audio, sample_rate=8000, language="de").text
    assert expected != model.transcribe(audio, sample_rate=8000).text
    with connect(f"{languages_server.socket}/v1/stream") as socket:
        socket.recv()
        *_, done = events_of(socket, {"type": "configure", "language": "de"}, file.getvalue())
    assert done["text"] == expected


def test_websocket_rejects_unknown_languages(languages_server: Any, speech: Any, texts: dict[str, str]) -> None:
    with pytest.raises(InvalidStatus) as caught, connect(f"{languages_server.socket}/v1/stream?language=de-AT"):
        pass
    answer = caught.value.response
    assert answer.status_code == 400 and "similar ones are de-DE" in json.loads(answer.body or b"")["error"]["message"]
    invalid = [
        {"type": "configure", "language": "de-AT"},
        {"type": "configure", "language": 7},
        {"type": "configure", "language": None},
        {"type": "configure", "language": "ar", "chunk_ms": 100},
        {"type": "configure", "language": "fr", "chunk_ms": 80},
        {"type": "configure"},
    ]
    with connect(f"{languages_server.socket}/v1/stream?language=de") as socket:
        socket.recv()
        *events, done = events_of(socket, *invalid, speech.tobytes())
    rejected = [event for event in events if event["type"] == "rejected"]
    assert len(rejected) == len(invalid) and "de-DE" in rejected[0]["message"]
    assert all(event["code"] == "option" and event["message"].endswith(".") for event in rejected)
    # Nothing was changed, and the stream continues.
    assert done["text"] == texts["de-DE"]
    assert {event["chunk_ms"] for event in events if event["type"] == "final"} == {560}


def test_inverse_text_normalization_needs_rules_for_the_language(
    languages_bundle: Any, serve_here: Any, speech: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is loaded here: with "auto", the first tag of a language loads its rules."""
    pytest.importorskip("nemo_text_processing", reason="needs the itn extra")
    monkeypatch.setattr(itn, "LANGUAGES", ("en", "sv"))
    message = "does not support the language 'de-DE'; it supports en, sv"
    with serve_here(bundle=str(languages_bundle.path), measure=False) as running:
        with pytest.raises(InvalidStatus) as caught, connect(f"{running.socket}/v1/stream?itn=1&language=de"):
            pass
        answer = caught.value.response
        assert answer.status_code == 400 and message in json.loads(answer.body or b"")["error"]["message"]
        create = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0).audio.transcriptions.create
        with pytest.raises(openai.BadRequestError, match=message):
            create(model="any", file=nemostream.demo_clip(), language="de", extra_body={"itn": "true"})
        with connect(f"{running.socket}/v1/stream?itn=1&language=auto") as socket:
            socket.recv()
            *events, done = events_of(socket, {"type": "configure", "language": "de"}, speech[:8000].tobytes())
        (rejected,) = [event for event in events if event["type"] == "rejected"]
        assert message in rejected["message"] and done["type"] == "done"


def test_websocket_detected_languages(languages_server: Any, model: Any, spoken: Any) -> None:
    """Events and words have the language of the tags; the demo model's "of" and "." are tags of en-US and de-DE."""
    audio = np.frombuffer(spoken[6].pcm, np.int16)
    expected = [(word.text, word.language) for event in finals(model, audio, language="auto") for word in event.words]
    assert [language for _, language in expected[:2]] == ["en-US"] * 2
    assert {language for _, language in expected[2:]} == {None, "de-DE"}
    with connect(f"{languages_server.socket}/v1/stream?language=auto&words=1") as socket:
        assert json.loads(socket.recv())["language"] == "auto"
        *events, _ = events_of(socket, audio.tobytes())
    received = [event for event in events if event["type"] == "final"]
    words = [word for event in received for word in event["words"]]
    assert [(word["text"], word.get("language")) for word in words] == expected
    assert received[-1]["language"] == "de-DE"
    languages = [event["language"] for event in events if event["type"] == "partial"]
    assert languages[0] is None or languages[0] == "en-US"


def test_websocket_ends_by_the_model(languages_server: Any, model: Any, speech: Any) -> None:
    reference = [event for event in model.listen(speech) if event.kind != "partial"]
    with connect(f"{languages_server.socket}/v1/stream") as socket:
        socket.recv()
        *events, _ = events_of(socket, speech.tobytes())
    assert not any("<" in event.get("text", "") for event in events)
    received = [(e["type"], e.get("text", ""), e.get("reason")) for e in events if e["type"] != "partial"]
    expected = [e for e in reference if e.reason != "finish"]
    assert received == [(event.kind, event.text, event.reason) for event in expected]
    assert ("end", "", "model") in received and "backchannel" in {kind for kind, _, _ in received}
    for kind, name in (("end", "time"), ("backchannel", "end")):
        times = [event.end for event in expected if event.kind == kind]
        assert [event[name] for event in events if event["type"] == kind] == [
            pytest.approx(time, abs=1e-3) for time in times
        ]
    with connect(f"{languages_server.socket}/v1/stream?endpoint_model=0") as socket:
        socket.recv()
        *events, _ = events_of(socket, speech.tobytes())
    assert {event["type"] for event in events} == {"partial", "final"}


# -- Riva --------------------------------------------------------------------------------------------------------------


def recognise(running: Any, pcm: bytes, language_code: str) -> list[Any]:
    """Return the final results of a stream."""
    service = riva.client.ASRService(riva.client.Auth(uri=running.address))
    config = riva.client.StreamingRecognitionConfig(
        config=riva.client.RecognitionConfig(
            encoding=riva.client.AudioEncoding.LINEAR_PCM,
            sample_rate_hertz=16000,
            language_code=language_code,
            enable_word_time_offsets=True,
        ),
        interim_results=True,
    )
    chunks = [pcm[begin : begin + 3200] for begin in range(0, len(pcm), 3200)]
    results = [result for answer in service.streaming_response_generator(chunks, config) for result in answer.results]
    assert not any("<" in result.alternatives[0].transcript for result in results)
    return [result for result in results if result.is_final]


@pytest.mark.parametrize(("code", "name"), [("", "en-US"), ("de-DE", "de-DE"), ("de", "de-DE"), ("ar-AR", "ar-AR")])
def test_riva_language(
    languages_server: Any, model: Any, speech: Any, texts: dict[str, str], code: str, name: str
) -> None:
    results = recognise(languages_server, speech.tobytes(), code)
    assert "".join(result.alternatives[0].transcript for result in results).strip() == texts[name]
    expected = finals(model, speech, language=code or None)
    for result, event in zip(results, expected, strict=True):
        alternative, codes = result.alternatives[0], [word.language or name for word in event.words]
        assert [word.language_code for word in alternative.words] == codes
        assert list(alternative.language_code) == list(dict.fromkeys(codes))
    assert results[0].alternatives[0].language_code == [name]  # it has no tag
    service = riva.client.ASRService(riva.client.Auth(uri=languages_server.address))
    config = riva.client.RecognitionConfig(sample_rate_hertz=16000, language_code=code)
    offline = service.offline_recognize(speech.tobytes(), config).results
    assert "".join(result.alternatives[0].transcript for result in offline).strip() == texts[name]


def test_riva_detected_languages(languages_server: Any, model: Any, spoken: Any) -> None:
    audio = np.frombuffer(spoken[6].pcm, np.int16)
    expected = finals(model, audio, language="auto")
    results = recognise(languages_server, audio.tobytes(), "multi")
    alternatives = [result.alternatives[0] for result in results]
    assert [alternative.transcript.strip() for alternative in alternatives] == [event.text for event in expected]
    words = [(word.word, word.language_code) for one in alternatives for word in one.words]
    assert words == [(word.text, word.language or "") for event in expected for word in event.words]
    assert [list(one.language_code) for one in alternatives] == [["en-US"], ["de-DE"]]
    assert {language for _, language in words} == {"en-US", "", "de-DE"}  # the tag of some words was never emitted


def test_riva_finals_end_by_the_model(languages_server: Any, model: Any, speech: Any) -> None:
    expected = [event.text for event in finals(model, speech)]
    assert len(expected) >= 2
    results = recognise(languages_server, speech.tobytes(), "")
    assert [result.alternatives[0].transcript for result in results] == [text + " " for text in expected]


def test_riva_configuration_and_unknown_languages(languages_server: Any, speech: Any) -> None:
    service = riva.client.ASRService(riva.client.Auth(uri=languages_server.address))
    answer = service.stub.GetRivaSpeechRecognitionConfig(riva_asr_pb2.RivaSpeechRecognitionConfigRequest())
    (entry,) = answer.model_config
    assert entry.parameters["language_code"].split(",") == ["en-US", "de-DE", "ar-AR", "multi"]
    for code, suggestion in (("de-AT", "de-DE"), ("xx", "en-US")):
        with pytest.raises(grpc.RpcError) as caught:
            recognise(languages_server, speech.tobytes(), code)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and suggestion in caught.value.details()


# -- OpenAI ------------------------------------------------------------------------------------------------------------


def test_openai_languages(languages_server: Any, model: Any, spoken: Any, texts: dict[str, str]) -> None:
    create = openai.OpenAI(
        base_url=languages_server.url + "/v1", api_key="any", max_retries=0
    ).audio.transcriptions.create
    path = spoken[0].path
    for options, name, english in (
        ({}, "en-US", "english"),
        ({"language": "de"}, "de-DE", "german"),
        ({"language": "ar-AR"}, "ar-AR", "arabic"),
        ({"languages": ["de"]}, "de-DE", "german"),
        ({"languages": ["de", "en"]}, "en-US", "german"),  # detected: the model emits the tag of German
        ({"language": "auto"}, "en-US", "german"),
    ):
        verbose = create(model="any", file=path, response_format="verbose_json", **options)
        assert (verbose.text, verbose.language) == (texts[name], english), options
    # The languages of both utterances; only the second one has a tag, that of German.
    for language, name, codes in (("ar", "ar-AR", ["ar"]), ("en", "en-US", ["en", "de"]), ("auto", "en-US", ["de"])):
        answer = create(model="any", file=path, language=language)
        assert [language.code for language in answer.languages] == codes
        events = list(create(model="any", file=path, language=language, stream=True))
        assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == texts[name]
        assert events[-1].text == texts[name] and [language.code for language in events[-1].languages] == codes
    for options in ({"language": "de-AT"}, {"languages": ["en", "de-AT"]}, {"language": "de", "languages": ["de-AT"]}):
        with pytest.raises(openai.BadRequestError, match="similar ones are de-DE"):
            create(model="any", file=path, **options)


def test_models_and_readiness_list_the_languages(languages_server: Any, server: Any) -> None:
    names = ["en-US", "de-DE", "ar-AR", "auto"]
    client = openai.OpenAI(base_url=languages_server.url + "/v1", api_key="any")
    (model,) = client.models.list()
    assert model.languages == client.models.retrieve("languages").languages == names
    ready = json.loads(languages_server.get("/readyz")[1])
    assert (ready["languages"], ready["language"]) == (names, "en-US")
    ready = json.loads(server.get("/readyz")[1])
    assert (ready["languages"], ready["language"]) == (["en"], "en")


async def until(connection: Any, *kinds: str) -> list[Any]:
    """Return the events up to and including the first one of the given types."""
    events = []
    async with asyncio.timeout(30):
        while True:
            events.append(await connection.recv())
            if events[-1].type in kinds:
                return events


def transcription(**options: Any) -> dict[str, Any]:
    format_ = {"type": "audio/pcm", "rate": 16000}
    input_ = {"format": format_, "turn_detection": None, "transcription": options}
    return {"type": "transcription", "audio": {"input": input_}}


def test_realtime_language(languages_server: Any, model: Any, speech: Any, texts: dict[str, str]) -> None:
    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=languages_server.url + "/v1", api_key="any")
        async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:

            async def update(**options: Any) -> Any:
                await connection.session.update(session=transcription(**options))
                (event,) = await until(connection, "session.updated", "error")
                return event

            async def append(audio: Any) -> None:
                await connection.input_audio_buffer.append(audio=base64.b64encode(audio.tobytes()).decode())

            (created,) = await until(connection, "session.created")
            assert created.session.audio.input.transcription.language == "en-US"
            for options, name in (
                ({"language": "de"}, "de-DE"),
                ({}, "de-DE"),  # unchanged
                ({"languages": ["en", "de"]}, "auto"),
                ({"language": "ar-AR"}, "ar-AR"),
            ):
                event = await update(**options)
                assert event.session.audio.input.transcription.language == name
            error = await update(language="de-AT")
            assert "similar ones are de-DE" in error.error.message
            assert error.error.param == "session.audio.input.transcription.language"
            assert (await update()).session.audio.input.transcription.language == "ar-AR"
            # While audio is buffered, the language can change, and takes effect at the same chunk as in Python.
            at = 3 * 8960 + 100
            expected = text_with_change(model, speech, at, "en", "ar")
            assert expected not in texts.values()
            await update(language="en")
            await append(speech[:at])
            await connection.session.update(session=transcription(language="ar"))
            events = await until(connection, "session.updated")
            assert events[-1].session.audio.input.transcription.language == "ar-AR"
            await append(speech[at:])
            await connection.input_audio_buffer.commit()
            events += await until(connection, COMPLETED)
            assert events[-1].transcript == expected
            assert [language.code for language in events[-1].languages] == ["ar"]
            # After the text, it changes the language of the next item only.
            await append(np.append(speech, np.zeros(8000, np.int16)))
            await connection.session.update(session=transcription(language="de"))
            await append(np.zeros(1600, np.int16))
            await connection.input_audio_buffer.commit()
            events = await until(connection, COMPLETED)
            assert [language.code for language in events[-1].languages] == ["ar"]

    asyncio.run(main())


def test_realtime_turns_end_by_the_model(languages_server: Any, model: Any, speech: Any) -> None:
    """With server_vad, turns also end by the model; without turn detection, only commits end them."""
    expected = [event.text for event in finals(model, speech)]

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=languages_server.url + "/v1", api_key="any")
        async with client.realtime.connect(model="any") as connection:
            session = transcription()
            session["audio"]["input"]["turn_detection"] = {"type": "server_vad", "silence_duration_ms": 60000}
            await connection.session.update(session=session)
            await until(connection, "session.updated")
            await connection.input_audio_buffer.append(audio=base64.b64encode(speech.tobytes()).decode())
            events = await until(connection, COMPLETED)
            assert [event.type for event in events if event.type != DELTA] == [
                "input_audio_buffer.speech_started",
                "input_audio_buffer.speech_stopped",
                "input_audio_buffer.committed",
                COMPLETED,
            ]
            assert events[-1].transcript == expected[0]
            await connection.input_audio_buffer.clear()
            await until(connection, "input_audio_buffer.cleared")
            await connection.session.update(session=transcription())
            await until(connection, "session.updated")
            await connection.input_audio_buffer.append(audio=base64.b64encode(speech.tobytes()).decode())
            await connection.input_audio_buffer.commit()
            events = await until(connection, COMPLETED)
            assert events[-1].transcript == " ".join(expected)

    asyncio.run(main())


# -- the server --------------------------------------------------------------------------------------------------------


def test_default_language_of_the_server(
    serve_here: Any, languages_bundle: Bundle, speech: Any, texts: dict[str, str]
) -> None:
    assert read_settings(["--language=de"]).language == "de"
    with serve_here(bundle=languages_bundle.path, measure=False, language="de") as running:
        assert json.loads(running.get("/readyz")[1])["language"] == "de-DE"
        for query, name in (("", "de-DE"), ("?language=ar", "ar-AR")):
            with connect(f"{running.socket}/v1/stream{query}") as socket:
                assert json.loads(socket.recv())["language"] == name
                assert events_of(socket, speech.tobytes())[-1]["text"] == texts[name]
        result, *_ = recognise(running, speech.tobytes(), "")
        assert list(result.alternatives[0].language_code) == ["de-DE"]
    with pytest.raises(OptionError, match="similar ones are de-DE"):
        Service(Settings(bundle=languages_bundle.path, measure=False, language="de-AT")).start()


def test_a_model_of_one_language_reports_it(serve_here: Any, spoken: Any, tmp_path: Any) -> None:
    source = Bundle.open(nemostream.demo_bundle())
    shutil.copytree(source.path, tmp_path / "hindi")
    manifest = dataclasses.replace(source.manifest, languages=LanguageConfig("hi"))
    (tmp_path / "hindi" / "manifest.json").write_text(manifest.to_json())
    clip = spoken[1]
    with serve_here(bundle=tmp_path / "hindi", measure=False) as running:
        with connect(f"{running.socket}/v1/stream?language=hi-IN") as socket:
            assert json.loads(socket.recv())["language"] == "hi"
            *events, _ = events_of(socket, clip.pcm)
            assert {event["language"] for event in events if event["type"] == "final"} == {"hi"}
        with connect(f"{running.socket}/v1/realtime?intent=transcription") as socket:
            session = json.loads(socket.recv())["session"]
            assert session["audio"]["input"]["transcription"]["language"] == "hi"
        for code in ("", "hi-IN", "multi"):
            (result,) = recognise(running, clip.pcm, code)
            assert list(result.alternatives[0].language_code) == ["hi"]
            assert {word.language_code for word in result.alternatives[0].words} == {"hi"}
        create = openai.OpenAI(base_url=running.url + "/v1", api_key="any", max_retries=0).audio.transcriptions.create
        assert create(model="any", file=clip.path, response_format="verbose_json").language == "hindi"
        assert create(model="any", file=clip.path).languages is None
        with pytest.raises(openai.BadRequestError, match="supports 'hi' only"):
            create(model="any", file=clip.path, language="en")
