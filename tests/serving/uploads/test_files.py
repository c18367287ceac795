"""Audio files sent instead of samples: in every protocol, WAV is decoded and other containers are rejected by name."""

from __future__ import annotations

import base64
import io
import json
import struct
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

import nemostream

FORMATS = {
    "WAV": "PCM_16",
    "FLAC": "PCM_16",
    "OGG": "VORBIS",
    "MP3": "MPEG_LAYER_III",
    "AIFF": "PCM_16",
    "AU": "PCM_16",
    "CAF": "PCM_16",
    "W64": "PCM_16",
}
DISPLAY_NAMES = {"OGG": "Ogg"}
TAIL = b"LIST" + struct.pack("<I", 300_000) + (np.sin(np.arange(150_000) / 7) * 20_000).astype("<i2").tobytes()


def encode(clip: Any, container: str = "WAV", rate: int = 16000, channels: int = 1, subtype: str = "") -> bytes:
    audio = np.frombuffer(clip.pcm, np.int16) / np.float32(32768)
    audio = soxr.resample(audio, 16000, rate) if rate != 16000 else audio
    file = io.BytesIO()
    options = {"format": container, "subtype": subtype or FORMATS[container]}
    soundfile.write(file, np.stack([audio] * channels, 1), rate, **options)
    return file.getvalue()


def transcribe_offline(data: bytes, folder: Path) -> str:
    path = folder / "a.bin"
    path.write_bytes(data)
    with nemostream.load() as model:
        return model.transcribe(path).text


def stream(server: Any, messages: list[bytes | str], query: str = "") -> dict[str, Any]:
    """Send messages and return the last event."""
    events = []
    with connect(f"{server.socket}/v1/stream?{query}") as socket:
        assert json.loads(socket.recv())["type"] == "ready"
        with suppress(ConnectionClosed):  # an error may close it before the last message
            for message in [*messages, '{"type": "finish"}']:
                socket.send(message)
        with suppress(ConnectionClosed):
            while True:
                events.append(json.loads(socket.recv(timeout=60)))
    return events[-1]


def split(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 3200, 1 << 18])
@pytest.mark.parametrize("container", [name for name in FORMATS if name != "WAV"])
def test_websocket_rejects_containers_by_name(server: Any, spoken: Any, container: str, size: int) -> None:
    data = encode(spoken[0], container)[: 3000 * size]
    last = stream(server, split(data[:6400], size) if size < 1000 else split(data, size))
    assert last["type"] == "error" and last["code"] == "audio"
    assert f"of type {DISPLAY_NAMES.get(container, container)}" in last["message"]


@pytest.mark.parametrize("magic", [b"\x1a\x45\xdf\xa3", b"\0\0\0\x20ftypisom", b"#!AMR\n", b"caff\0\1\0\0"])
@pytest.mark.parametrize("encoding", ["pcm_s16le", "pcm_f32le", "mulaw", "alaw"])
def test_websocket_rejects_browser_recordings_in_every_encoding(
    server: Any, spoken: Any, magic: bytes, encoding: str
) -> None:
    last = stream(server, split(magic + spoken[0].pcm, 3200), f"encoding={encoding}")
    assert (last["type"], last["code"]) == ("error", "audio") and "is a file of type" in last["message"]


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"),
    [
        (16000, 1, "PCM_16"),
        (48000, 1, "PCM_16"),
        (44100, 2, "FLOAT"),
        (16000, 1, "ULAW"),
    ],
)
@pytest.mark.parametrize("size", [7, 3200, 1 << 18])
def test_websocket_decodes_wav(
    server: Any, spoken: Any, tmp_path: Path, rate: int, channels: int, subtype: str, size: int
) -> None:
    data = encode(spoken[0], "WAV", rate, channels, subtype)
    messages = split(data + TAIL, size) if size > 7 else [*split(data[:700], size), *split(data[700:], 32_000)]
    last = stream(server, [*messages], "sample_rate=8000&encoding=pcm_f32le")
    assert last["type"] == "done" and last["text"] == transcribe_offline(data, tmp_path)
    assert last["audio"] == pytest.approx(spoken[0].seconds, abs=0.01)


def test_websocket_decodes_one_wav_per_utterance(server: Any, spoken: Any) -> None:
    """A `commit` follows each file, and the header's size is a placeholder."""
    first, second = (bytearray(encode(clip)) for clip in spoken[:2])
    for data in (first, second):
        data[data.index(b"data") + 4 : data.index(b"data") + 8] = b"\xff" * 4
    commit = '{"type": "commit"}'
    last = stream(server, [bytes(first), commit, bytes(second), commit])
    assert last["text"] == f"{spoken[0].text} {spoken[1].text}"
    other = encode(spoken[1], rate=8000)
    last = stream(server, [bytes(first), commit, other])
    assert last["type"] == "error" and "8000 Hz" in last["message"] and "16000 Hz" in last["message"]


def test_websocket_rejects_unsupported_wav_formats(server: Any, spoken: Any) -> None:
    last = stream(server, [encode(spoken[0], "WAV", subtype="PCM_24")])
    assert last["type"] == "error" and "24 bits" in last["message"]
    data = bytearray(encode(spoken[0]))
    data[24:28] = struct.pack("<I", 4_000_000)
    last = stream(server, [bytes(data)])
    assert last["type"] == "error" and "4000000" in last["message"]


@pytest.mark.parametrize("begin", [b"RI", b"RIFF", b"RIFF\0\0\0\0WAVX", b"\0\0", b"\xff\xfb\x90\x00", b"Og", b"fLa\0"])
def test_samples_that_resemble_a_container_are_kept(server: Any, begin: bytes) -> None:
    """No sample is lost, even if the stream is shorter than a header."""
    for data in (begin, begin + bytes(32_000)):
        last = stream(server, split(data, 3200))
        assert last["type"] == "done" and last["audio"] == pytest.approx(len(data) // 2 / 16000, abs=1e-3)


def test_websocket_rejects_floats_in_integer_range(server: Any, spoken: Any) -> None:
    unscaled = np.frombuffer(spoken[0].pcm, np.int16).astype("<f4").tobytes()
    last = stream(server, split(unscaled, 6400), "encoding=pcm_f32le")
    assert (last["type"], last["code"]) == ("error", "audio") and "divide by 32768" in last["message"]


def realtime(server: Any, data: bytes, size: int) -> dict[str, Any]:
    with connect(f"{server.socket}/v1/realtime?intent=transcription") as socket:
        for part in split(data, size):
            audio = base64.b64encode(part).decode()
            socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
        socket.send('{"type": "input_audio_buffer.commit"}')
        while True:
            event = json.loads(socket.recv(timeout=60))
            if event["type"] == "error" or event["type"].endswith("transcription.completed"):
                return event


@pytest.mark.parametrize("size", [100, 20_000])
def test_files_in_a_realtime_session(server: Any, spoken: Any, tmp_path: Path, size: int) -> None:
    data = encode(spoken[1], "WAV", 48000)
    assert realtime(server, data, size).get("transcript", "").strip() == transcribe_offline(data, tmp_path)
    for container in ("FLAC", "OGG", "MP3"):
        event = realtime(server, encode(spoken[1], container), size)
        assert event["type"] == "error" and "of type" in event["error"]["message"]


def test_riva_ignores_wav_chunks_after_the_samples(server: Any, spoken: Any) -> None:
    riva = pytest.importorskip("riva.client")
    data = bytearray(encode(spoken[0]) + TAIL)
    data[4:8] = struct.pack("<I", len(data) - 8)
    service = riva.ASRService(riva.Auth(uri=server.address))
    config = riva.StreamingRecognitionConfig(config=riva.RecognitionConfig(language_code="en-US"))
    for size in (3200, 777, len(data)):
        answers = service.streaming_response_generator(split(bytes(data), size), config)
        results = [result for answer in answers for result in answer.results]
        assert "".join(result.alternatives[0].transcript for result in results).strip() == spoken[0].text
        assert max(result.audio_processed for result in results) == pytest.approx(spoken[0].seconds, abs=0.01)


@pytest.mark.parametrize("container", FORMATS)
@pytest.mark.parametrize("encoding", ["LINEAR_PCM", "ENCODING_UNSPECIFIED", "MULAW"])
def test_riva_detects_containers_despite_a_wrong_config(
    server: Any, spoken: Any, tmp_path: Path, container: str, encoding: str
) -> None:
    riva = pytest.importorskip("riva.client")
    data = encode(spoken[0], container, 16000)
    service = riva.ASRService(riva.Auth(uri=server.address))
    kind = riva.AudioEncoding.Value(encoding)
    config = riva.RecognitionConfig(language_code="en-US", encoding=kind, sample_rate_hertz=8000)
    answer = service.offline_recognize(data, config)
    text = "".join(result.alternatives[0].transcript for result in answer.results).strip()
    assert text == transcribe_offline(data, tmp_path)
    if container in ("WAV", "FLAC", "AIFF"):
        assert text == spoken[0].text
    if container != "WAV":
        live = riva.StreamingRecognitionConfig(config=config)
        with pytest.raises(Exception, match="of type"):
            list(service.streaming_response_generator(split(data, 3200), live))


def upload(server: Any, data: bytes, name: str) -> tuple[int, str]:
    edge = "edge7"
    body = (
        f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
        + data
        + f"\r\n--{edge}--\r\n".encode()
    )
    kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
    request = urllib.request.Request(f"{server.url}/v1/audio/transcriptions", body, kind)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)["text"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    ("name", "codec"), [("a.webm", "libopus"), ("a.m4a", "aac"), ("a.mp4", "aac"), ("a.m4a", "alac")]
)
def test_uploads_of_browsers_and_phones(server: Any, spoken: Any, name: str, codec: str) -> None:
    av = pytest.importorskip("av", reason="needs the av extra")
    file = io.BytesIO()
    with av.open(file, "w", format="webm" if name.endswith("webm") else "mp4") as output:
        stream = output.add_stream(codec, rate=16000, layout="mono")
        stream.format = stream.codec.audio_formats[0].name
        resampler = av.AudioResampler(stream.format.name, "mono", stream.rate)
        frame = av.AudioFrame.from_ndarray(np.frombuffer(spoken[0].pcm, np.int16)[None], "s16", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(part))
    status, text = upload(server, file.getvalue(), name)
    assert status == 200
    if codec == "alac":
        assert text == spoken[0].text
    else:
        assert len(set(text.split()) & set(spoken[0].text.split())) >= len(set(spoken[0].text.split())) // 2


def test_uploads_of_chained_ogg_and_of_unscaled_floats(server: Any, spoken: Any, tmp_path: Path) -> None:
    data = encode(spoken[0], "OGG", subtype="OPUS") + encode(spoken[1], "OGG", subtype="OPUS")
    status, text = upload(server, data, "a.opus")
    assert (status, text) == (200, transcribe_offline(data, tmp_path))
    assert len(text.split()) > len(spoken[0].text.split())
    file = io.BytesIO()
    soundfile.write(file, np.frombuffer(spoken[0].pcm, np.int16).astype(np.float32), 16000, "FLOAT", format="WAV")
    status, text = upload(server, file.getvalue(), "big.wav")
    assert status in (400, 415, 422) and "big.wav" in text and "divide by 32768" in text


@pytest.fixture(scope="module")
def triton_model(fakes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Triton's backend, with a function that makes a request."""
    from nemostream.serving.integrations.triton import TritonPythonModel, bundle_in

    bundle = bundle_in(tmp_path_factory.mktemp("triton"))
    bundle.parent.mkdir(parents=True)
    bundle.symlink_to(nemostream.demo_bundle())
    strings = {"chunk_ms": "560", "device": "cpu", "precision": "", "engines": "", "threads": ""}
    config = {"parameters": {name: {"string_value": value} for name, value in strings.items()}, "max_batch_size": 4}
    model = TritonPythonModel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", fakes.triton_utils())
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_version": "1",
                "model_repository": str(bundle.parents[1]),
            }
        )
        try:
            yield model
        finally:
            model.finalize()


@pytest.mark.parametrize("container", FORMATS)
def test_triton_rejects_file_content(spoken: Any, triton_model: Any, container: str) -> None:
    """The file's bytes are sent as float samples, converted from 16-bit and from 32-bit values."""

    def request(audio: Any) -> Any:
        flag = np.array([[1]])
        return SimpleNamespace(AUDIO=audio, START=flag, END=flag, correlation_id=lambda: 7, parameters=lambda: "")

    data = encode(spoken[0], container)[:4096]
    for audio in (np.frombuffer(data, "<i2") / np.float32(32768), np.frombuffer(data, "<f4")):
        with np.errstate(all="ignore"):
            (error,) = triton_model.execute([request(audio[None])])
        assert error and ("bytes of a" in error or "NaN" in error or "scale" in error)
    (response,) = triton_model.execute([request(np.zeros((1, 16000), "<f4"))])
    assert response["TEXT"].shape == (1, 1)
