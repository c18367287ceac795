"""Clients of streaming speech servers for `bench load`, each through the protocol of its server.

A target is a URL whose scheme names the protocol. The query has options:

=============================== =============================== =================================================
target                          server                          options in the query
=============================== =============================== =================================================
nemostream+ws://HOST:PORT       `nemostream serve`              those of `/v1/stream`, such as `chunk_ms`
riva://HOST:PORT                NIM, Riva, NeMo-Speech.cpp,     `language_code`, `model`; others are sent as
                                `nemostream serve`              `custom_configuration`
openai-realtime+ws://HOST:PORT  OpenAI's realtime API           `model`, `language`, `rate` (Hz, 24000),
                                (transcription sessions)        `silence_ms`; the path is `/v1/realtime`
openai+http://HOST:PORT         OpenAI's transcription API      form fields, such as `model`; the path is `/v1`
sherpa+ws://HOST:PORT           sherpa-onnx's online server     none
                                (C++ or Python)
vllm+ws://HOST:PORT             vLLM's realtime API             `model` (required)
MODULE:CLASS@ADDRESS            any: a class of yours           defined by the class
=============================== =============================== =================================================

TLS: `nemostream+wss`, `riva+tls`, `openai-realtime+wss`, `openai+https`, `sherpa+wss`, `vllm+wss`. The environment
variable NEMOSTREAM_API_KEY is sent as `Authorization: Bearer KEY`.

An HTTP server receives a recording when it is complete, as from a client that waits for the end of speech.

For another server, write a class with the interface of `Target`. It is created with ADDRESS ("" without `@`):

    class MyTarget:
        sample_rate = 16000                     # Hz of the audio that `send` receives

        def __init__(self, address): ...

        @contextlib.asynccontextmanager
        async def connect(self):                # opens a stream, and closes it
            yield MyStream(...)

    class MyStream:
        async def send(self, pcm): ...          # bytes: 16-bit little-endian samples, one channel
        async def finish(self): ...             # no more audio follows
        async def updates(self):                # ends when the server has sent everything
            yield Update(utterance=0, text="the text so far", final=False)

`OSError` (such as `ConnectionError`) from an open stream counts as a disconnect, any other exception as an error.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import json
import os
import re
import ssl
import sys
import wave
from collections.abc import AsyncIterator, Hashable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ClassVar, NamedTuple, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np

from nemostream.errors import OptionError, StreamError

API_KEY = "NEMOSTREAM_API_KEY"  # environment variable
_CLASS = re.compile(r"([\w.]+):(\w+)(?:@(.*))?")
_CLOSE_SECONDS = 2.0  # for the closing handshake of a WebSocket


class Update(NamedTuple):
    """The newest text of an utterance: all of it, not only what was added."""

    utterance: Hashable  # identifies the utterance; those of a stream are ordered by their first update
    text: str
    final: bool = False  # the text does not change any more


class Stream(Protocol):
    """An open stream of a server."""

    async def send(self, pcm: bytes) -> None: ...

    async def finish(self) -> None: ...

    def updates(self) -> AsyncIterator[Update]: ...


class Target(Protocol):
    """A server, and how to open a stream of it."""

    @property
    def sample_rate(self) -> int: ...

    def connect(self) -> AbstractAsyncContextManager[Stream]: ...


def create_target(text: str) -> Target:
    """Return the target of a URL or of MODULE:CLASS@ADDRESS. Raises `OptionError` for another text."""
    url = urlsplit(text)
    if found := _TARGETS.get(url.scheme):
        if not url.hostname:
            raise OptionError(f"target {text!r} has no host; write {url.scheme}://HOST:PORT.")
        return found(text)
    if (match := _CLASS.fullmatch(text)) and "://" not in text[: match.end(2) + 3]:
        if (folder := os.getcwd()) not in sys.path:
            sys.path.append(folder)
        try:
            created: Target = getattr(importlib.import_module(match[1]), match[2])(match[3] or "")
        except (ImportError, AttributeError) as error:
            raise OptionError(f"target {text!r} cannot be loaded: {error}.") from error
        return created
    known = ", ".join(f"{scheme}://" for scheme in _TARGETS)
    raise OptionError(f"target {text!r} is unknown: it must begin with one of {known} or be MODULE:CLASS@ADDRESS.")


def _headers() -> dict[str, str]:
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


class _Options:
    """The query of a target's URL. Each option is used once; `rest` returns those that were not used."""

    def __init__(self, target: str) -> None:
        self._target, self._values = target, dict(parse_qsl(urlsplit(target).query, keep_blank_values=True))

    def take(self, name: str, default: str = "") -> str:
        return self._values.pop(name, default)

    def take_int(self, name: str, default: str) -> int:
        if not (value := self.take(name, default)).isascii() or not value.isdigit():
            raise OptionError(f"{name} of target {self._target!r} is {value!r}; it must be a whole number.")
        return int(value)

    def rest(self) -> dict[str, str]:
        return self._values

    def reject_rest(self) -> None:
        """Raise `OptionError` if there is an option that was not used."""
        if self._values:
            raise OptionError(f"target {self._target!r} has the unknown option {next(iter(self._values))!r}.")


# -- WebSockets --------------------------------------------------------------------------------------------------------


class _SocketStream:
    """A stream over a WebSocket; subclasses define its messages."""

    def __init__(self, socket: Any, options: Any) -> None:
        self.socket, self.options, self.ended = socket, options, False

    async def begin(self) -> None:
        """Exchange the messages that precede the audio."""

    def encode(self, pcm: bytes) -> bytes | str:
        """Return the message for audio."""
        return pcm

    def finish_message(self) -> str:
        raise NotImplementedError

    def read(self, message: str) -> Iterator[Update]:
        """Yield the updates of a message, and set `ended` if it is the last one."""
        raise NotImplementedError

    async def send(self, pcm: bytes) -> None:
        await self._write(self.encode(pcm))

    async def finish(self) -> None:
        await self._write(self.finish_message())

    async def updates(self) -> AsyncIterator[Update]:
        from websockets.exceptions import ConnectionClosed

        try:
            async for message in self.socket:
                for update in self.read(message):
                    yield update
                if self.ended:
                    return
        except ConnectionClosed as error:
            raise ConnectionError(f"the connection was lost: {error}") from error
        raise ConnectionError("the server closed the connection before its last result")

    async def receive(self, kind: str) -> dict[str, Any]:
        """Return the next message of a type. Raises `StreamError` if it is an error."""
        while (event := json.loads(await self.socket.recv()))["type"] != kind:
            _raise_error(event)
        return event

    async def _write(self, message: bytes | str) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            await self.socket.send(message)
        except ConnectionClosed as error:
            raise ConnectionError(f"the connection was lost: {error}") from error


def _raise_error(event: dict[str, Any]) -> None:
    """Raise `StreamError` if an event of a server is an error."""
    if event.get("type") == "error":
        error = event.get("message") or event.get("error")
        raise StreamError(str(error.get("message") if isinstance(error, dict) else error))


class _SocketTarget:
    """A server with WebSockets."""

    stream: ClassVar[type[_SocketStream]]
    path = ""
    query: ClassVar[dict[str, str]] = {}
    sample_rate = 16000

    def __init__(self, target: str) -> None:
        import websockets.asyncio.client  # noqa: F401  (takes long: before the first stream)

        url, options = urlsplit(target), _Options(target)
        self.options = self.read_options(options)
        scheme = "wss" if url.scheme.endswith("wss") else "ws"
        query = urlencode(self.query | options.rest())
        self.url = f"{scheme}://{url.netloc}{url.path.rstrip('/') or self.path}{query and '?' + query}"

    def read_options(self, options: _Options) -> Any:
        """Take the options of the stream; the others become the query of the URL."""
        options.reject_rest()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Stream]:
        from websockets.asyncio.client import connect

        async with connect(
            self.url,
            compression=None,
            ping_interval=None,
            max_size=None,
            close_timeout=_CLOSE_SECONDS,
            additional_headers=_headers(),
        ) as socket:
            stream = self.stream(socket, self.options)
            await stream.begin()
            yield stream


class _NemostreamStream(_SocketStream):
    async def begin(self) -> None:
        await self.receive("ready")

    def finish_message(self) -> str:
        return '{"type": "finish"}'

    def read(self, message: str) -> Iterator[Update]:
        event = json.loads(message)
        _raise_error(event)
        if event["type"] in ("partial", "final"):
            yield Update(event["utterance"], event["text"], event["type"] == "final")
        self.ended = event["type"] == "done"


class NemostreamTarget(_SocketTarget):
    """`/v1/stream` of `nemostream serve` (docs/websocket.md)."""

    stream, path = _NemostreamStream, "/v1/stream"

    def read_options(self, options: _Options) -> None:
        """Take none: the server checks them."""


class _SherpaStream(_SocketStream):
    """Messages of sherpa-onnx: float samples; results `{"text", "segment", "is_final"}`; "Done" and "Done!".

    The Python server has no `is_final`: the number of the segment increases.
    """

    def __init__(self, socket: Any, options: None) -> None:
        super().__init__(socket, options)
        self._utterance, self._segment, self._text = 0, 0, ""  # the utterance that is not final

    def encode(self, pcm: bytes) -> bytes:
        return (np.frombuffer(pcm, "<i2").astype("<f4") / 32768).tobytes()

    def finish_message(self) -> str:
        return "Done"

    def read(self, message: str) -> Iterator[Update]:
        self.ended = message == "Done!"
        event = {} if self.ended else json.loads(message)
        if self.ended or event.get("segment", 0) != self._segment:
            if self._text:
                yield self._end(self._text)
            self._segment = event.get("segment", 0)
        if (text := event.get("text", "").strip()) and event.get("is_final"):
            yield self._end(text)
        elif text:
            self._text = text
            yield Update(self._utterance, text)

    def _end(self, text: str) -> Update:
        self._utterance, self._text = self._utterance + 1, ""
        return Update(self._utterance - 1, text, True)


class SherpaTarget(_SocketTarget):
    """The online WebSocket servers of sherpa-onnx: `sherpa-onnx-online-websocket-server`, `streaming_server.py`."""

    stream = _SherpaStream


class _VllmStream(_SocketStream):
    """Messages of vLLM: a first commit starts the transcription, and a commit with `final` ends the audio."""

    _text = ""

    async def begin(self) -> None:
        await self.receive("session.created")
        await self._write(json.dumps({"type": "session.update", "model": self.options}))
        await self._write(json.dumps({"type": "input_audio_buffer.commit", "final": False}))

    def encode(self, pcm: bytes) -> str:
        return append_message(pcm)

    def finish_message(self) -> str:
        return json.dumps({"type": "input_audio_buffer.commit", "final": True})

    def read(self, message: str) -> Iterator[Update]:
        event = json.loads(message)
        _raise_error(event)
        if event["type"] == "transcription.delta":
            self._text += event["delta"]
            yield Update(0, self._text.strip())
        elif event["type"] == "transcription.done":
            self.ended = True
            yield Update(0, event["text"].strip(), True)


class VllmTarget(_SocketTarget):
    """`/v1/realtime` of vLLM."""

    stream, path = _VllmStream, "/v1/realtime"

    def read_options(self, options: _Options) -> str:
        if not (model := options.take("model")):
            raise OptionError("a target of vLLM needs the name of its model: vllm+ws://HOST:PORT?model=NAME.")
        options.reject_rest()
        return model


def append_message(pcm: bytes) -> str:
    """Return the message of audio of OpenAI's realtime API, which vLLM has too."""
    return f'{{"type": "input_audio_buffer.append", "audio": "{base64.b64encode(pcm).decode()}"}}'


_DELTA, _COMPLETED, _FAILED = (
    f"conversation.item.input_audio_transcription.{kind}" for kind in ("delta", "completed", "failed")
)


class _RealtimeStream(_SocketStream):
    """Messages of OpenAI's realtime API. An item is an utterance; a turn detected by the server ends it.

    The stream ends when every committed item is completed, after the answer to the client's own commit, which is an
    error if the buffer is almost empty.
    """

    def __init__(self, socket: Any, options: dict[str, Any]) -> None:
        super().__init__(socket, options)
        self._texts: dict[str, str] = {}  # of the items that are not completed
        self._open: set[str] = set()  # items that are committed and not completed
        self._finishing = self._answered = False

    async def begin(self) -> None:
        await self.receive("session.created")
        await self._write(json.dumps({"type": "session.update", "session": self.options}))
        await self.receive("session.updated")

    def encode(self, pcm: bytes) -> str:
        return append_message(pcm)

    def finish_message(self) -> str:
        self._finishing = True
        return '{"type": "input_audio_buffer.commit"}'

    def read(self, message: str) -> Iterator[Update]:
        event = json.loads(message)
        kind, item = event["type"], event.get("item_id", "")
        if kind == "error" and event["error"].get("code") == "input_audio_buffer_commit_empty":
            self._answered = True
        elif kind == "error":
            _raise_error(event)
        elif kind == "input_audio_buffer.committed":
            self._answered |= self._finishing
            self._open.add(item)
        elif kind == _DELTA:
            self._texts[item] = self._texts.get(item, "") + event["delta"]
            yield Update(item, self._texts[item].strip())
        elif kind == _COMPLETED:
            self._open.discard(item)
            yield Update(item, event["transcript"].strip(), True)
        elif kind == _FAILED:
            raise StreamError(str(event["error"].get("message")))
        self.ended = self._answered and not self._open


class RealtimeTarget(_SocketTarget):
    """`/v1/realtime` of OpenAI's API: a transcription session."""

    stream, path, query = _RealtimeStream, "/v1/realtime", {"intent": "transcription"}

    def read_options(self, options: _Options) -> dict[str, Any]:
        self.sample_rate = options.take_int("rate", "24000")
        turns: dict[str, Any] = {"type": "server_vad"}
        if silence_ms := options.take_int("silence_ms", "0"):
            turns["silence_duration_ms"] = silence_ms
        transcription = {"model": options.take("model", "gpt-4o-transcribe")}
        if language := options.take("language"):
            transcription["language"] = language
        options.reject_rest()
        audio = {"type": "audio/pcm", "rate": self.sample_rate}
        return {
            "type": "transcription",
            "audio": {"input": {"format": audio, "transcription": transcription, "turn_detection": turns}},
        }


# -- gRPC and HTTP -----------------------------------------------------------------------------------------------------


class _RivaStream:
    """A call of `StreamingRecognize`."""

    def __init__(self, call: Any, request: Any) -> None:
        self._call, self._request = call, request

    async def send(self, pcm: bytes) -> None:
        await self._do(self._call.write(self._request(audio_content=pcm)))

    async def finish(self) -> None:
        await self._do(self._call.done_writing())

    async def updates(self) -> AsyncIterator[Update]:
        import grpc

        utterance = 0
        try:
            async for response in self._call:
                interim = ""
                for result in response.results:
                    text = result.alternatives[0].transcript if result.alternatives else ""
                    if result.is_final:
                        yield Update(utterance, text.strip(), True)
                        utterance += 1
                    else:
                        interim += text  # a stable part, and one that may change
                if interim.strip():
                    yield Update(utterance, interim.strip())
        except grpc.aio.AioRpcError as error:
            raise _call_error(error.code(), error.details()) from error

    async def open(self, config: Any) -> None:
        await self._do(self._call.write(self._request(streaming_config=config)))

    async def _do(self, operation: Any) -> None:
        import grpc

        try:
            await operation
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:  # the call has ended, and has a status
            raise _call_error(await self._call.code(), await self._call.details()) from error


def _call_error(code: Any, details: str) -> Exception:
    import grpc

    # gRPC replaces the server's status if the call ends while a message is written.
    unknown = code is grpc.StatusCode.INTERNAL and details == "Internal error from Core"
    text = "the server ended the call; gRPC does not report why" if unknown else f"{code.name}: {details}"
    return ConnectionError(text) if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK) else StreamError(text)


class RivaTarget:
    """`StreamingRecognize` of NVIDIA Riva; every stream has a connection of its own."""

    sample_rate = 16000

    def __init__(self, target: str) -> None:
        from riva.client.proto import riva_asr_pb2, riva_asr_pb2_grpc, riva_audio_pb2

        url, options = urlsplit(target), _Options(target)
        self._address, self._tls = url.netloc, url.scheme.endswith("tls")
        self._stub, self._request = riva_asr_pb2_grpc.RivaSpeechRecognitionStub, riva_asr_pb2.StreamingRecognizeRequest
        self._config = riva_asr_pb2.StreamingRecognitionConfig(
            config=riva_asr_pb2.RecognitionConfig(
                encoding=riva_audio_pb2.AudioEncoding.LINEAR_PCM,
                sample_rate_hertz=self.sample_rate,
                audio_channel_count=1,
                language_code=options.take("language_code", "en-US"),
                model=options.take("model"),
                custom_configuration=options.rest(),
            ),
            interim_results=True,
        )

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Stream]:
        import grpc

        settings = [("grpc.use_local_subchannel_pool", 1)]
        if self._tls:
            channel = grpc.aio.secure_channel(self._address, grpc.ssl_channel_credentials(), options=settings)
        else:
            channel = grpc.aio.insecure_channel(self._address, options=settings)
        async with channel:
            metadata = [(name.lower(), value) for name, value in _headers().items()]
            call = self._stub(channel).StreamingRecognize(metadata=metadata)
            try:
                stream = _RivaStream(call, self._request)
                await stream.open(self._config)
                yield stream
            finally:
                call.cancel()


class _HttpStream:
    """A recording that is uploaded when it is complete; the text comes as server-sent events or as JSON."""

    def __init__(self, target: HttpTarget, client: Any) -> None:
        self._target, self._client = target, client
        self._pcm, self._complete = bytearray(), asyncio.Event()

    async def send(self, pcm: bytes) -> None:
        self._pcm += pcm

    async def finish(self) -> None:
        self._complete.set()

    async def updates(self) -> AsyncIterator[Update]:
        import httpx

        await self._complete.wait()
        content = io.BytesIO()
        with wave.open(content, "wb") as file:
            file.setparams((1, 2, self._target.sample_rate, 0, "NONE", ""))
            file.writeframes(self._pcm)
        text = ""
        try:
            async with self._client.stream(
                "POST",
                self._target.url,
                data=self._target.fields,
                files={"file": ("audio.wav", content.getvalue(), "audio/wav")},
            ) as response:
                if response.status_code != 200:
                    body = (await response.aread()).decode(errors="replace")
                    raise StreamError(f"HTTP {response.status_code}: {body[:200]}")
                if "event-stream" not in response.headers.get("content-type", ""):
                    yield Update(0, json.loads(await response.aread())["text"].strip(), True)
                    return
                async for line in response.aiter_lines():
                    event = json.loads(line[6:]) if line.startswith("data: {") else {}
                    _raise_error({"type": "error", **event} if "error" in event else event)
                    if event.get("type") == "transcript.text.delta":
                        text += event["delta"]
                        yield Update(0, text.strip())
                    elif event.get("type") == "transcript.text.done":
                        yield Update(0, event["text"].strip(), True)
                        return
        except httpx.TransportError as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        raise ConnectionError("the response ended before transcript.text.done")


class HttpTarget:
    """`POST /v1/audio/transcriptions` of OpenAI's API."""

    sample_rate = 16000

    def __init__(self, target: str) -> None:
        import httpx  # noqa: F401  (takes long: before the first stream)

        url, options = urlsplit(target), _Options(target)
        base = f"{'https' if url.scheme.endswith('https') else 'http'}://{url.netloc}{url.path.rstrip('/') or '/v1'}"
        self.url = f"{base}/audio/transcriptions"
        self._tls: Any = ssl.create_default_context() if base.startswith("https") else False
        self.fields = {"model": "whisper-1", "stream": "true", **options.rest()}

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Stream]:
        import httpx

        async with httpx.AsyncClient(headers=_headers(), timeout=None, verify=self._tls) as client:
            yield _HttpStream(self, client)


_TARGETS: dict[str, Any] = {
    "nemostream+ws": NemostreamTarget,
    "nemostream+wss": NemostreamTarget,
    "riva": RivaTarget,
    "riva+tls": RivaTarget,
    "openai-realtime+ws": RealtimeTarget,
    "openai-realtime+wss": RealtimeTarget,
    "openai+http": HttpTarget,
    "openai+https": HttpTarget,
    "sherpa+ws": SherpaTarget,
    "sherpa+wss": SherpaTarget,
    "vllm+ws": VllmTarget,
    "vllm+wss": VllmTarget,
}
