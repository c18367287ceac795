"""Fuzz the parsers of client data with valid and random messages: they succeed or raise nemostream's errors.

`NEMOSTREAM_FUZZ_EXAMPLES` sets the number of examples per test (300 by default).
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemostream.bundle import LanguageConfig
from nemostream.errors import NemostreamError

pytest.importorskip("fastapi", reason="needs the serve extra")

from google.protobuf.message import DecodeError
from riva.client.proto import riva_asr_pb2 as messages
from starlette.datastructures import Headers, QueryParams

from nemostream.runtime.audio.containers import undecided
from nemostream.serving.network.access import host_allowed, key_number, request_key
from nemostream.serving.protocols import realtime, riva, websocket
from nemostream.serving.session import ENCODINGS, _AudioDecoder
from nemostream.serving.settings import Settings

fuzz = settings(
    max_examples=int(os.environ.get("NEMOSTREAM_FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

KEYS = st.sampled_from(
    [
        "type",
        "session",
        "audio",
        "input",
        "format",
        "rate",
        "transcription",
        "language",
        "model",
        "turn_detection",
        "silence_duration_ms",
        "event_id",
        "chunk_ms",
        "input_audio_format",
        "input_audio_transcription",
    ]
) | st.text(max_size=8)
VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["audio/pcm", "pcm16", "server_vad", "transcription", "en", "", "AAAA", 24000, 8000, 500]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
TYPES = st.sampled_from(
    [
        "commit",
        "configure",
        "finish",
        "keepalive",
        "session.update",
        "transcription_session.update",
        "input_audio_buffer.append",
        "input_audio_buffer.commit",
        "input_audio_buffer.clear",
    ]
)
MESSAGES = st.builds(lambda kind, rest: {**rest, "type": kind}, TYPES, st.dictionaries(KEYS, VALUES, max_size=6))
TEXTS = MESSAGES.map(json.dumps) | st.text() | VALUES.map(json.dumps) | st.just("[" * 100_000)


@fuzz
@given(text=TEXTS)
def test_websocket_messages(text: str) -> None:
    try:
        kind, order = websocket._parse(text)
    except NemostreamError as error:
        assert len(str(error)) < 1000
    else:
        assert (isinstance(kind, str) and order == json.loads(text)) or order != order


NAMES = [
    "sample_rate",
    "channels",
    "encoding",
    "chunk_ms",
    "endpoint_ms",
    "max_utterance_ms",
    "decoder",
    "phrases",
    "vad",
    "words",
]
PAIRS = st.tuples(
    st.sampled_from(NAMES) | st.text(max_size=5),
    st.integers().map(str) | st.text(max_size=30) | VALUES.map(json.dumps) | st.just("[" * 50_000),
)


@fuzz
@given(pairs=st.lists(PAIRS, max_size=6))
def test_websocket_options(pairs: list[tuple[str, str]]) -> None:
    try:
        options = websocket._options(QueryParams(pairs))
    except NemostreamError as error:
        assert len(str(error)) < 1000
    else:
        assert set(options) <= {*NAMES, "itn", "resumable"}


async def decoded(audio: Any) -> bytes:
    return b"".join([part async for part in realtime._decode_base64(audio)])


@fuzz
@given(text=TEXTS | st.builds(lambda data: '{"type": "input_audio_buffer.append", "audio": "' + data + '"}', st.text()))
def test_realtime_messages(text: str) -> None:
    try:
        order = realtime._parse(text)
        if isinstance(audio := order.get("audio"), realtime._TextSpan):
            asyncio.run(decoded(audio))
        realtime._parse_format(order.get("format"))
    except NemostreamError as error:
        assert len(str(error)) < 10_000


@fuzz
@given(key=st.sampled_from(["audio", "x"]), size=st.integers(0, 100_000), tail=TEXTS)
def test_long_realtime_messages_are_parsed_like_json(key: str, size: int, tail: str) -> None:
    """The fast path that extracts the audio of a long message gives the same result as `json.loads`."""
    text = json.dumps({"type": "input_audio_buffer.append", key: "QUJD" * size, "event_id": tail[:1000]})
    try:
        order = realtime._parse(text)
    except NemostreamError:
        assert key == "x" and len(text) > websocket.MAX_TEXT_CHARACTERS
        return
    if isinstance(audio := order.get("audio"), realtime._TextSpan):
        assert asyncio.run(decoded(audio)) == b"ABC" * size
        order["audio"] = audio.text[audio.start : audio.end]
    assert order == json.loads(text)


def wav(tag: int, channels: int, rate: int, bits: int, extra: bytes, data: bytes, size: int) -> bytes:
    shape = struct.pack("<HHIIHH", tag, channels, rate, rate * channels * bits // 8 & 0xFFFFFFFF, 4, bits)
    chunks = b"fmt " + struct.pack("<I", len(shape)) + shape + extra + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(chunks) + 4 & 0xFFFFFFFF) + b"WAVE" + chunks


U16, U32 = st.integers(0, 65535), st.integers(0, 2**32 - 1)
WAVS = st.builds(
    wav,
    st.sampled_from([1, 3, 6, 7, 0xFFFE]) | U16,
    st.sampled_from([1, 2]) | U16,
    st.sampled_from([8000, 16000]) | U32,
    st.sampled_from([8, 16, 32]) | U16,
    st.binary(max_size=30),
    st.binary(max_size=100),
    st.integers(0, 200) | U32,
)


@fuzz
@given(data=WAVS | st.binary(max_size=200), cut=st.integers(0, 300))
@example(data=wav(1, 0, 16000, 16, b"", b"abcd", 4), cut=30)  # no channels
def test_container_detection(data: bytes, cut: int) -> None:
    for parts in ((data,), (data[:cut], data[cut:])):
        decoder = _AudioDecoder("pcm_s16le", 1, 16000)
        try:
            for part in parts:
                decoder(part)
            decoder(b"", last=True)
        except NemostreamError as error:
            assert len(str(error)) < 1000
        undecided(data[:cut])


CONFIGS = st.builds(
    lambda language, chunk, boost, phrases, stop: messages.RecognitionConfig(
        language_code=language,
        custom_configuration={"chunk_ms": chunk},
        speech_contexts=[messages.SpeechContext(phrases=phrases, boost=boost)],
        endpointing_config=messages.EndpointingConfig(stop_history=stop),
    ),
    st.sampled_from(["", "en-US", "multi"]) | st.text(max_size=20),
    st.sampled_from(["", "80"]) | st.text(max_size=20),
    st.floats(width=32),
    st.lists(st.text(max_size=10), max_size=4),
    st.integers(-(2**31), 2**31 - 1),
)


@fuzz
@given(config=CONFIGS, data=st.binary(max_size=100))
def test_grpc_configurations(config: Any, data: bytes) -> None:
    any_config = messages.RecognitionConfig()
    try:
        any_config.ParseFromString(data)
    except DecodeError:
        any_config = config
    for candidate in (config, any_config):
        try:
            riva._options(candidate, LanguageConfig())
        except NemostreamError as error:
            assert len(str(error)) < 1000


LATIN = st.text(st.characters(max_codepoint=255), max_size=40)


@fuzz
@given(authorization=LATIN | st.text(max_size=10).map(lambda key: f"Bearer {key}"), protocol=LATIN, host=LATIN)
def test_access_headers(authorization: str, protocol: str, host: str) -> None:
    headers = {"authorization": authorization, "sec-websocket-protocol": protocol}
    assert key_number(request_key(headers), [b"right \xff key", b"other"]) is None
    host_allowed(host, Settings())
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    request_key(Headers(raw=raw))


@fuzz
@given(encoding=st.sampled_from(list(ENCODINGS)), channels=st.integers(1, 4), parts=st.lists(st.binary(max_size=50)))
def test_samples_may_be_split_anywhere(encoding: str, channels: int, parts: list[bytes]) -> None:
    decoder, whole = _AudioDecoder(encoding, channels, 16000), _AudioDecoder(encoding, channels, 16000)
    try:
        wanted = whole(b"".join(parts)).tobytes() + whole(b"", last=True).tobytes()
    except NemostreamError:  # the data starts like a container
        return
    assert b"".join(decoder(part).tobytes() for part in [*parts]) + decoder(b"", last=True).tobytes() == wanted
