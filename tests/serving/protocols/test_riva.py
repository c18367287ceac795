"""The Riva gRPC API, tested with NVIDIA's client."""

from __future__ import annotations

import threading
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import riva.client
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from riva.client.proto import health_pb2, health_pb2_grpc, riva_asr_pb2, riva_audio_pb2


def recogniser(running: Any, *metadata: list[str]) -> Any:
    return riva.client.ASRService(riva.client.Auth(uri=running.address, metadata_args=list(metadata)))


def wav(clip: Any, folder: Path, **options: Any) -> Path:
    audio, rate = soundfile.read(clip.path, dtype="int16")
    path = folder / f"{clip.path.stem}.wav"
    soundfile.write(path, audio, rate, **options)
    return path


def streaming(**options: Any) -> Any:
    interim = options.pop("interim_results", True)
    options.setdefault("language_code", "en-US")
    return riva.client.StreamingRecognitionConfig(
        config=riva.client.RecognitionConfig(**options), interim_results=interim
    )


def collect(responses: Any) -> tuple[str, list[Any], list[Any]]:
    """Return the whole text, the partial results and the final results."""
    partial, final = [], []
    for response in responses:
        for result in response.results:
            (final if result.is_final else partial).append(result)
    return "".join(result.alternatives[0].transcript for result in final).strip(), partial, final


@pytest.mark.parametrize("chunk_ms", [None, 80, 1120])
def test_a_streamed_file_gives_the_same_text_as_transcribe(
    server: Any, spoken: Any, tmp_path: Path, chunk_ms: Any
) -> None:
    import nemostream

    clip = spoken[0]
    config = streaming(enable_word_time_offsets=True)
    if chunk_ms:
        config.config.custom_configuration["chunk_ms"] = str(chunk_ms)
    path = wav(clip, tmp_path)
    riva.client.add_audio_file_specs_to_config(config, path)
    with riva.client.AudioChunkFileIterator(path, 1600) as chunks:
        text, partial, final = collect(recogniser(server).streaming_response_generator(chunks, config))
    with nemostream.load(chunk_ms=chunk_ms or 560) as model:
        offline = model.transcribe(clip.path)
    assert text == offline.text and len(text.split()) >= 4
    partials = [result.alternatives[0].transcript for result in partial]
    assert len(partials) >= 3 and all(text.startswith(part) for part in partials)
    words = [word for result in final for word in result.alternatives[0].words]
    assert [word.word for word in words] == text.split()
    starts = [round(1000 * token.time) for token in offline.tokens if token.text.startswith(" ")]
    assert [word.start_time for word in words] == starts
    assert all(word.start_time < word.end_time and 0 < word.confidence <= 1 for word in words)


def test_interim_results_of_small_and_finals_of_large_chunks(server: Any, spoken: Any) -> None:
    import nemostream

    service, revised = recogniser(server), 0
    with nemostream.load(chunk_ms=1120) as model:
        expected = [model.transcribe(clip.path).text for clip in spoken]
    for clip, text in zip(spoken, expected, strict=True):
        config = streaming(encoding=riva.client.AudioEncoding.LINEAR_PCM, sample_rate_hertz=16000)
        config.config.endpointing_config.stop_history = 60_000
        riva.client.add_custom_configuration_to_config(config, "chunk_ms:80,final_chunk_ms:1120")
        chunks = [clip.pcm[start : start + 2560] for start in range(0, len(clip.pcm), 2560)]
        found, partial, final = collect(service.streaming_response_generator(chunks, config))
        assert found == text and len(final) == 1
        assert all(0 <= one.stability <= 1 for one in partial) and final[0].stability == 1
        assert {0.0} < {one.stability for one in partial}
        revised += any(not text.startswith(one.alternatives[0].transcript) for one in partial)
        recording = service.offline_recognize(clip.pcm, config.config)
        assert "".join(one.alternatives[0].transcript for one in recording.results).strip() == text
    assert revised > 0


def test_interim_results_and_words_are_optional(server: Any, spoken: Any) -> None:
    clip = spoken[1]
    chunks = [clip.pcm[start : start + 3200] for start in range(0, len(clip.pcm), 3200)]
    config = streaming(interim_results=False, encoding=riva.client.AudioEncoding.LINEAR_PCM, sample_rate_hertz=16000)
    text, partial, final = collect(recogniser(server).streaming_response_generator(chunks, config))
    assert text == clip.text and not partial and not final[0].alternatives[0].words


def test_phrases_of_speech_contexts_are_boosted(server: Any, spoken: Any, tmp_path: Path) -> None:
    import nemostream

    config = riva.client.RecognitionConfig(sample_rate_hertz=16000, language_code="en-US")
    riva.client.add_word_boosting_to_config(config, ["nine"], 400.0)
    with nemostream.load() as model:
        expected = model.transcribe(spoken[0].path, phrases={"nine": 20.0}).text
    assert expected != spoken[0].text
    service = recogniser(server)
    for data in (spoken[0].pcm, spoken[0].path.read_bytes()):  # raw samples, and a file
        answer = service.offline_recognize(data, config)
        assert "".join(result.alternatives[0].transcript for result in answer.results).strip() == expected
    live = riva.client.StreamingRecognitionConfig(config=config)
    assert collect(service.streaming_response_generator([spoken[0].pcm], live))[0] == expected


def test_utterances_end_by_silence(server: Any, spoken: Any) -> None:
    import nemostream

    silence = bytes(2 * 16000 * 2)
    audio = spoken[0].pcm + silence + spoken[3].pcm + silence
    with nemostream.load() as model:
        whole = model.transcribe(np.frombuffer(audio, np.int16)).text
    config = streaming(encoding=riva.client.AudioEncoding.LINEAR_PCM, sample_rate_hertz=16000)
    chunks = [audio[start : start + 3200] for start in range(0, len(audio), 3200)]
    text, _, final = collect(recogniser(server).streaming_response_generator(chunks, config))
    assert text == whole != spoken[0].text
    assert len(final) >= 2 and final[0].alternatives[0].transcript.strip() == spoken[0].text


@pytest.mark.parametrize(("subtype", "name"), [("ULAW", "MULAW"), ("ALAW", "ALAW")])
def test_mulaw_and_alaw_match_libsndfile(server: Any, spoken: Any, tmp_path: Path, subtype: str, name: str) -> None:
    import nemostream

    path = wav(spoken[0], tmp_path, subtype=subtype)
    with nemostream.load() as model:
        expected = model.transcribe(path).text
    service = recogniser(server)
    for chunks in (
        [path.read_bytes()],
        [path.read_bytes()[start : start + 7] for start in range(0, path.stat().st_size, 7)],
    ):
        assert collect(service.streaming_response_generator(chunks, streaming()))[0] == expected  # format of the header
    audio, _ = soundfile.read(path, dtype="int16")
    raw = path.read_bytes()[-len(audio) :]
    config = streaming(encoding=riva_audio_pb2.AudioEncoding.Value(name), sample_rate_hertz=16000)
    assert collect(service.streaming_response_generator([raw], config))[0] == expected


def test_offline_recognition_of_files_and_raw_samples(server: Any, spoken: Any, tmp_path: Path) -> None:
    clip, service = spoken[0], recogniser(server)
    config = riva.client.RecognitionConfig(
        enable_word_time_offsets=True, sample_rate_hertz=16000, language_code="en-US"
    )
    for data in (clip.path.read_bytes(), wav(clip, tmp_path).read_bytes(), clip.pcm):
        answer = service.offline_recognize(data, config)
        text = "".join(result.alternatives[0].transcript for result in answer.results).strip()
        assert text == clip.text
        assert [word.word for result in answer.results for word in result.alternatives[0].words] == text.split()
    assert not service.offline_recognize(bytes(32000), config).results[0].alternatives


@pytest.mark.parametrize("rate", [16000, 44100])
def test_mp3_without_a_tag(server: Any, spoken: Any, tmp_path: Path, rate: int) -> None:
    """libsndfile writes no ID3 tag. Raw samples that start like an MP3 frame are treated as samples."""
    import soxr

    import nemostream

    audio, _ = soundfile.read(spoken[0].path, dtype="float32")
    path = tmp_path / "clip.mp3"
    soundfile.write(path, soxr.resample(audio, 16000, rate), rate)
    assert path.read_bytes()[:1] == b"\xff"
    with nemostream.load() as model:
        expected = model.transcribe(path).text
        raw = path.read_bytes()[:4] + spoken[0].pcm
        of_samples = model.transcribe(np.frombuffer(raw, "<i2")).text
    config = riva.client.RecognitionConfig(sample_rate_hertz=16000, language_code="en-US")
    service = recogniser(server)
    for data, text in ((path.read_bytes(), expected), (raw, of_samples)):
        results = service.offline_recognize(data, config).results
        assert "".join(result.alternatives[0].transcript for result in results).strip() == text


def test_an_8_khz_stereo_file(server: Any, spoken: Any, tmp_path: Path) -> None:
    import nemostream

    audio, _ = soundfile.read(spoken[0].path, dtype="int16")
    path = tmp_path / "stereo.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(audio[::2].repeat(2).tobytes())
    with riva.client.AudioChunkFileIterator(path, 800) as chunks, nemostream.load() as model:
        text, *_ = collect(recogniser(server).streaming_response_generator(chunks, streaming()))
        assert text == model.transcribe(path).text


def test_server_configuration_and_health(server: Any) -> None:
    service = recogniser(server)
    answer = service.stub.GetRivaSpeechRecognitionConfig(riva_asr_pb2.RivaSpeechRecognitionConfigRequest())
    (model,) = answer.model_config
    assert model.model_name == "demo" and model.parameters["chunks_ms"] == "80,160,560,1120"
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.ServingStatus.SERVING


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"language_code": "de-DE"}, "supports 'en' only"),
        ({"profanity_filter": True}, "profanity"),
        ({"enable_separate_recognition_per_channel": True}, "channel"),
        ({"encoding": riva_audio_pb2.AudioEncoding.FLAC}, "FLAC"),
        ({"sample_rate_hertz": 5}, "sample_rate"),
        ({"audio_channel_count": 1000}, "channels"),
        ({"custom_configuration": {"chunk_ms": "33"}}, "chunk_ms"),
        ({"speech_contexts": [riva_asr_pb2.SpeechContext(phrases=["Zürich"], boost=20)]}, "Zürich"),
        ({"speech_contexts": [riva_asr_pb2.SpeechContext(phrases=["nine"], boost=-20)]}, "weight"),
        ({"custom_configuration": {"chunk_ms": "x"}}, "chunk_ms"),
        ({"custom_configuration": {"chunk_ms": "²"}}, "chunk_ms"),
    ],
)
def test_invalid_options(server: Any, spoken: Any, change: dict[str, Any], word: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(recogniser(server).streaming_response_generator([spoken[0].pcm], streaming(**change)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and word in caught.value.details()


def test_invalid_first_messages_and_audio(server: Any) -> None:
    stub = recogniser(server).stub
    for first, word in (
        (riva_asr_pb2.StreamingRecognizeRequest(audio_content=b"1234"), "streaming_config"),
        (None, "streaming_config"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.StreamingRecognize(iter([first] if first else [])))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and word in caught.value.details()
    for data in (b"fLaC" + bytes(100), b"RIFF\0\0\0\0WAVEdata" + bytes(100), b"RIFF\0\0\0\0WAVE" + bytes(70_000)):
        with pytest.raises(grpc.RpcError) as caught:
            list(recogniser(server).streaming_response_generator([data], streaming()))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_rejection_over_the_stream_limit_has_a_retry_hint(serve_here: Any, spoken: Any) -> None:
    with serve_here(max_streams=1) as running:
        release, entered = threading.Event(), threading.Event()

        def slow_audio() -> Any:
            yield spoken[0].pcm[:32000]
            entered.set()
            release.wait(30)

        with ThreadPoolExecutor(1) as pool:
            service = recogniser(running)
            first = pool.submit(lambda: collect(service.streaming_response_generator(slow_audio(), streaming())))
            assert entered.wait(30)
            with pytest.raises(grpc.RpcError) as caught:
                list(service.streaming_response_generator([spoken[0].pcm], streaming()))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "try again" in caught.value.details()
            assert ("grpc-retry-pushback-ms", "2000") in [tuple(pair) for pair in caught.value.trailing_metadata()]
            release.set()
            assert first.result()[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.builds(
        riva_asr_pb2.RecognitionConfig,
        encoding=st.integers(0, 25),
        sample_rate_hertz=st.integers(-(2**31), 2**31 - 1),
        language_code=st.sampled_from(["", "en", "en-US", "\0"]),
        audio_channel_count=st.integers(-5, 300),
        custom_configuration=st.dictionaries(st.sampled_from(["chunk_ms", "x"]), st.text(max_size=5), max_size=2),
    ),
    parts=st.lists(st.binary(max_size=5000), max_size=4),
)
def test_any_message_gives_a_response_or_invalid_argument(server: Any, config: Any, parts: list[bytes]) -> None:
    stub = recogniser(server).stub
    requests = [
        riva_asr_pb2.StreamingRecognizeRequest(streaming_config=riva_asr_pb2.StreamingRecognitionConfig(config=config)),
        *(riva_asr_pb2.StreamingRecognizeRequest(audio_content=part) for part in parts),
    ]
    allowed = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    call = stub.StreamingRecognize(iter(requests))
    try:
        list(call)
    except grpc.RpcError as error:
        assert error.code() in allowed, error
    try:
        stub.Recognize(riva_asr_pb2.RecognizeRequest(config=config, audio=b"".join(parts)))
    except grpc.RpcError as error:
        assert error.code() in allowed, error
    try:
        name = config.language_code
        stub.GetRivaSpeechRecognitionConfig(riva_asr_pb2.RivaSpeechRecognitionConfigRequest(model_name=name))
    except grpc.RpcError as error:
        assert error.code() in allowed, error
