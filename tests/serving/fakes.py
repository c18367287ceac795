"""An event loop with a controlled clock, and a model without an engine: for rules and protocols, not for recognition.

`VirtualLoop` does not wait for timers: when all tasks are blocked and no call runs on a thread, its clock jumps to the
next timer. Timeouts, delays and measurements thus have exact values, on any machine.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

import nemostream
from nemostream.bundle import Bundle, Manifest
from nemostream.errors import NemostreamError
from nemostream.runtime.streaming.session import Options
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Result, Token
from nemostream.serving.service import Service
from nemostream.serving.settings import Settings


class VirtualClock:
    """A clock that tests advance. An event loop of `run` advances it to its next timer."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock
        self.calls = 0  # that run on threads of the loop's executors

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or (timeout > 0 and self.calls):
            events = super().select(10)  # a thread may wake the loop
            assert events, "every task is blocked" + ("" if self.calls else ", and no timer is set")
            return events
        events = super().select(0)
        if not events:
            self._clock.now += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is that of a `VirtualClock`."""

    def __init__(self, clock: VirtualClock) -> None:
        self._waiting = _Selector(clock)
        super().__init__(self._waiting)
        self._virtual_clock = clock

    def time(self) -> float:
        return self._virtual_clock.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        future = super().run_in_executor(executor, func, *args)
        self._waiting.calls += 1
        future.add_done_callback(self._call_is_done)
        return future

    def _call_is_done(self, future: Any) -> None:
        self._waiting.calls -= 1

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads. A timeout, which Python 3.12 sets, would pass at once on this clock."""
        await super().shutdown_default_executor()


def run(clock: VirtualClock, main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in an event loop with this clock."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
        return runner.run(main)


class FakeStream:
    """Stands in for `AsyncLiveStream` and its session: records calls, and returns the events that the test sets."""

    def __init__(self, model: FakeModel, sample_rate: int, channels: int, options: dict[str, Any]) -> None:
        self._model = model
        self.sample_rate, self.channels, self.options = sample_rate, channels, options
        self.chunk_ms: int = options.get("chunk_ms") or 560
        self.final_chunk_ms: int | None = options.get("final_chunk_ms")
        self.language: str = options.get("language") or model.manifest.languages.name(None)
        self.steps = 0
        self.closed = 0
        self.calls: list[Any] = []  # in order: the samples of each push, or the name of another call
        self.session, self.has_vad, self.end_sample = self, bool(options.get("vad")), 0
        self.on_progress: Callable[[], None] | None = None
        self.feeding = False
        self._pending = 0  # calls of `feed` whose audio is not processed yet
        self._events: list[Event] = []
        self.detected: str | None = self.language

    @property
    def pushed(self) -> np.ndarray[Any, Any]:
        """All samples pushed."""
        return np.concatenate([call for call in self.calls if isinstance(call, np.ndarray)] or [np.zeros(0)])

    @property
    def result(self) -> Result:
        return Result("", (), 0.0, self.chunk_ms, False, language=self.detected)

    def check(self, pcm: np.ndarray[Any, Any]) -> None:
        self.calls.append("check")
        if self._model.check_error:
            raise self._model.check_error

    async def push(self, pcm: np.ndarray[Any, Any]) -> list[Result]:
        await self.push_events(pcm)
        return []

    async def push_events(self, pcm: np.ndarray[Any, Any]) -> list[Event]:
        self.calls.append(np.array(pcm))
        return await self._process("push", len(pcm))

    def listen(self, on_progress: Callable[[], None]) -> None:
        self.on_progress = on_progress

    def feed(self, pcm: np.ndarray[Any, Any]) -> None:
        self.calls.append(np.array(pcm))
        if self._model.error and not self._model.seconds:
            raise self._model.error
        self._pending += 1
        if self._model.seconds:
            asyncio.get_running_loop().call_later(self._model.seconds, self._complete, len(pcm))
        else:
            self._complete(len(pcm))

    def _complete(self, samples: int) -> None:
        self._pending -= 1
        self.steps += self._model.steps if samples else 0
        script = self._model.events.get("push", [])
        self._events += script.pop(0) if script and samples else []
        if self.on_progress and self._model.seconds:
            self.on_progress()

    def poll(self) -> list[Event] | None:
        if self._pending:
            return None
        if self._model.error:
            raise self._model.error
        events, self._events = self._events, []
        return events

    async def end_utterance(self) -> list[Event]:
        self.calls.append("end_utterance")
        return await self._process("end_utterance", 1)

    async def finish_events(self) -> list[Event]:
        self.calls.append("finish")
        return await self._process("finish", 1)

    async def _process(self, name: str, samples: int) -> list[Event]:
        if self._model.seconds:
            await asyncio.sleep(self._model.seconds)
        if self._model.error:
            raise self._model.error
        self.steps += self._model.steps if samples else 0
        script = self._model.events.get(name, [])
        return list(script.pop(0)) if script and samples else []

    def set_chunk_ms(self, chunk_ms: int) -> None:
        self.calls.append(("chunk_ms", chunk_ms))
        self.chunk_ms = chunk_ms

    def set_final_chunk_ms(self, final_chunk_ms: int | None) -> None:
        if self._model.lane_error and final_chunk_ms is not None:
            raise self._model.lane_error
        self.calls.append(("final_chunk_ms", final_chunk_ms))
        self.final_chunk_ms = final_chunk_ms

    def set_language(self, language: str) -> None:
        self.calls.append(("language", language))
        self.language = language

    def close(self) -> None:
        self.closed += 1


@functools.cache
def _demo_manifest() -> Manifest:
    return Bundle.open(nemostream.demo_bundle()).manifest


class FakeModel:
    """Stands in for `Model`."""

    def __init__(self, bundle: Bundle | None = None) -> None:
        self.manifest = bundle.manifest if bundle else _demo_manifest()
        self.streams: list[FakeStream] = []
        self.events: dict[str, list[list[Event]]] = {}  # of the next calls of push, end_utterance and finish
        self.seconds = 0.0  # that each call takes
        self.steps = 1  # of each call
        self.error: NemostreamError | None = None  # of the next calls
        self.check_error: NemostreamError | None = None
        self.open_error: NemostreamError | None = None
        self.lane_error: NemostreamError | None = None  # of the next accurate lanes
        self.closed = 0
        self.loaded_with: tuple[Any, dict[str, Any]] | None = None
        self.on_step: Any = None
        self.on_failure: Any = None
        self.on_fallback: Any = None
        self.waiting = 0

    def astream(self, *, sample_rate: int = 16000, channels: int = 1, **options: Any) -> FakeStream:
        assert set(options) <= set(Options.__annotations__)
        if self.open_error:
            raise self.open_error
        self.streams.append(FakeStream(self, sample_rate, channels, options))
        return self.streams[-1]

    def compile_phrases(self, phrases: Any) -> Any:
        return "compiled", phrases

    def watch(self, on_step: Any, on_failure: Any, on_fallback: Any) -> None:
        self.on_step, self.on_failure, self.on_fallback = on_step, on_failure, on_fallback

    def close(self) -> None:
        self.closed += 1


def start(model: FakeModel, clock: Any = None, **settings: Any) -> Service:
    """Return a service of the model that was started, without its warm-up streams."""

    def load(*arguments: Any, **options: Any) -> FakeModel:
        model.loaded_with = arguments, options
        return model

    service = Service(Settings(**{"measure": False, **settings}), *([clock] if clock else []))
    with mock.patch("nemostream.load", load):
        service.start()
    model.streams.clear()
    return service


def event(kind: Any = "final", text: str = "one two", utterance: int = 0, **fields: Any) -> Event:
    """Return an event. Its tokens are the words of `text`, one each."""
    tokens = tuple(
        Token(number, " " + word, 0.5 * number, 0.5 * number + 0.25, -0.5 - number, 0.9 - 0.25 * number)
        for number, word in enumerate(text.split())
    )
    values: dict[str, Any] = {
        "stable": text.rpartition(" ")[0],
        "start": 0.123456,
        "end": 1.234567,
        "audio": 2.345678,
        "chunk_ms": 160,
        "tokens": tokens,
        "language": "en",
        "set_language": "en",
    }
    return Event(kind, utterance, text, **(values | fields))


def end(reason: Any = "silence", utterance: int = 0, **fields: Any) -> Event:
    """Return the end of an utterance."""
    values: dict[str, Any] = {"stable": "", "start": 1.5, "end": 1.500499, "audio": 2.5, "chunk_ms": 80, "tokens": ()}
    return Event("end", utterance, "", reason=reason, **(values | fields))


def metric(service: Service, name: str, **labels: str) -> float | None:
    """Return a sample of the service's metrics, None if there is none."""
    return service.metrics.registry.get_sample_value(f"nemostream_{name}", labels)


def records(caplog: pytest.LogCaptureFixture, message: str) -> list[Any]:
    """Return the log records with this message."""
    return [record for record in caplog.records if record.getMessage() == message]


class FakeSocket:
    """A client of a WebSocket of an ASGI application. `sent` has what the application sends, in order."""

    def __init__(self, app: Any, url: str, headers: dict[str, str] | None = None, subprotocols: Any = ()) -> None:
        path, _, query = url.partition("?")
        names = {"host": "localhost", **(headers or {})}
        self.scope: dict[str, Any] = {
            "type": "websocket",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in names.items()],
            "client": ("192.0.2.7", 1234),
            "server": ("localhost", 80),
            "subprotocols": list(subprotocols),
            "extensions": {"websocket.http.response": {}},
        }
        self._app = app
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "websocket.connect"})
        self.sent: list[dict[str, Any]] = []
        self.on_send: Callable[[dict[str, Any]], Awaitable[None]] | None = None  # before a message is sent

    def fail_at(self, kind: str) -> FakeSocket:
        """Raise `ZeroDivisionError` when the application sends a message of this type."""

        async def on_send(message: dict[str, Any]) -> None:
            if message["type"] == kind:
                raise ZeroDivisionError

        self.on_send = on_send
        return self

    def push(self, *messages: Any) -> FakeSocket:
        """Queue messages of the client: bytes, text, an object that is sent as JSON, or a disconnection with a code."""
        for message in messages:
            if isinstance(message, int | None):
                code = {} if message is None else {"code": message}
                self._incoming.put_nowait({"type": "websocket.disconnect", **code})
            else:
                name = "bytes" if isinstance(message, bytes) else "text"
                value = message if isinstance(message, bytes | str) else json.dumps(message)
                self._incoming.put_nowait({"type": "websocket.receive", name: value})
        return self

    async def serve(self) -> FakeSocket:
        """Run the application until it is done with this connection."""

        async def send(message: Any) -> None:
            if self.on_send:
                await self.on_send(message)
            self.sent.append(dict(message))

        await self._app(self.scope, self._incoming.get, send)
        return self

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON objects that were received."""
        return [json.loads(message["text"]) for message in self.sent if message["type"] == "websocket.send"]

    @property
    def close(self) -> tuple[int, str] | None:
        """Code and reason of the close frame."""
        for message in self.sent:
            if message["type"] == "websocket.close":
                return message["code"], message.get("reason") or ""
        return None

    @property
    def rejection(self) -> tuple[int, Any]:
        """Status and body of the HTTP response to the handshake."""
        status = next(one["status"] for one in self.sent if one["type"] == "websocket.http.response.start")
        body = b"".join(one["body"] for one in self.sent if one["type"] == "websocket.http.response.body")
        return status, json.loads(body)


class FakeDecoders:
    """Stands in for `DecoderPool`: a recording of the given blocks of samples."""

    rate = 16000

    def __init__(self, *blocks: int, seconds: float = 2.0, warning: str = "") -> None:
        self._blocks, self._seconds, self._warning = blocks, seconds, warning
        self.error: Exception | None = None  # raised when the file is opened
        self.names: list[str] = []
        self.open = 0

    def decode(self, file: int, name: str) -> Any:
        self.names.append(name)
        return _FakeRecording(self, file)


class _FakeRecording:
    seconds, warning = 0.0, ""

    def __init__(self, pool: FakeDecoders, file: int) -> None:
        self._pool, self._file = pool, file

    async def __aenter__(self) -> _FakeRecording:
        if self._pool.error:
            raise self._pool.error
        assert os.fstat(self._file)
        self._pool.open += 1
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._pool.open -= 1

    async def __aiter__(self) -> Any:
        for block in self._pool._blocks:
            yield np.ones(block, np.float32)
        self.seconds, self.warning = self._pool._seconds, self._pool._warning


class TritonTensor:
    """Stands in for a tensor of Triton's Python backend."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def as_numpy(self) -> Any:
        return self.value


def triton_utils() -> Any:
    """Return a module `triton_python_backend_utils`. A response is a dict of its outputs, or the error."""
    return SimpleNamespace(
        Tensor=TritonTensor,
        TritonError=str,
        InferenceResponse=lambda tensors, error=None: error or {one.name: one.value for one in tensors},
        get_input_tensor_by_name=lambda request, name: TritonTensor(name, getattr(request, name)),
    )
