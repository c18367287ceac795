"""Two replicas on a local Ray cluster, accessed through Ray's proxy."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket as sockets
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from nemostream.client import Event, Stream
from nemostream.errors import BackendError, OptionError

ray = pytest.importorskip("ray", reason="needs the ray extra")
serve = pytest.importorskip("ray.serve", reason="needs the ray extra")

STREAMS = 8  # per replica
ARGS = {"max_streams": STREAMS, "measure": False, "api_keys": ["secret"], "drain_seconds": 60, "idle_seconds": 120}
KEY = {"Authorization": "Bearer secret"}


def build(**args: Any) -> Any:
    from nemostream.serving.integrations.ray_app import build

    return build({**ARGS, **args})


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with sockets.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "nemostream.serving.integrations.ray_app:proxy_middlewares",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a busy machine, a proxy takes longer to start than 3 * 5 s
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            yield f"127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def two_replicas(cluster: str) -> str:
    serve.run(build(min_replicas=2, max_replicas=2))
    wait_until(lambda: len(replicas()) == 2)
    return cluster


def replicas() -> set[int]:
    """Return the process ids of the replicas."""
    pids = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::ServeReplica"):
            pids.add(int(folder.name))
    return pids


def states() -> set[str]:
    return set(serve.status().applications["default"].deployments["nemostream"].replica_states)


def wait_until(condition: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def open_stream(address: str) -> ClientConnection:
    """Open a stream, with retries."""
    deadline = time.monotonic() + 60
    while True:
        try:
            socket = connect(f"ws://{address}/v1/stream", additional_headers=KEY)
            assert json.loads(socket.recv())["type"] == "ready"
            return socket
        except (InvalidStatus, ConnectionClosed):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def finish(socket: ClientConnection) -> str:
    socket.send(json.dumps({"type": "finish"}))
    *_, last = [json.loads(event) for event in socket]
    assert last["type"] == "done" and socket.close_code == 1000
    return str(last["text"])


@pytest.mark.slow
def test_a_killed_replica_affects_only_its_clients(two_replicas: str, spoken: Any) -> None:
    pcm, text = spoken[0].pcm, spoken[0].text
    half = len(pcm) // 4 * 2
    with ExitStack() as stack:
        streams = [stack.enter_context(open_stream(two_replicas)) for _ in range(8)]
        for socket in streams:
            socket.send(pcm[:half])
        victim = min(replicas())
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in replicas())
        unaffected, disconnected = 0, 0
        for socket in streams:
            try:
                socket.send(pcm[half:])
                assert finish(socket) == text
                unaffected += 1
            except ConnectionClosed as error:
                assert error.rcvd is not None and error.rcvd.code == 1012 and "connect again" in error.rcvd.reason
                disconnected += 1
                with open_stream(two_replicas) as again:
                    again.send(pcm)
                    assert finish(again) == text
        assert unaffected and disconnected and unaffected + disconnected == 8
    wait_until(lambda: len(replicas()) == 2)  # the replica is replaced


@pytest.mark.slow
def test_a_stopping_replica_finishes_its_streams(two_replicas: str, spoken: Any) -> None:
    pcm, text = spoken[0].pcm, spoken[0].text
    half = len(pcm) // 4 * 2
    with ExitStack() as stack:
        streams = [stack.enter_context(open_stream(two_replicas)) for _ in range(8)]
        for socket in streams:
            socket.send(pcm[:half])
        scaled_down = build(min_replicas=1, max_replicas=1)
        change = threading.Thread(target=lambda: serve.run(scaled_down))  # returns after draining
        change.start()
        wait_until(lambda: "STOPPING" in states())
        assert len(replicas()) == 2  # the stopping replica still has streams
        for socket in streams:
            socket.send(pcm[half:])
            assert finish(socket) == text
    change.join(60)
    wait_until(lambda: len(replicas()) == 1)


class ResumableStreams:
    """Streams of the client library on both replicas, half of whose audio is sent and stored."""

    def __init__(self, address: str, pcm: bytes, stack: ExitStack) -> None:
        self._pcm, self._half = pcm, len(pcm) // 4 * 2
        self.uninterrupted = self._transcribe(Stream(f"http://{address}", api_key="secret"))
        assert self.uninterrupted[-1].type == "done"
        self._streams = [
            stack.enter_context(Stream(f"http://{address}", api_key="secret", max_reconnect_seconds=120))
            for _ in range(STREAMS)
        ]
        self._events: list[list[Event]] = []
        for stream in self._streams:
            stream.send(pcm[: self._half])
            self._events.append([next(stream)])

    def _transcribe(self, stream: Stream) -> list[Event]:
        with stream:
            stream.send(self._pcm)
            stream.finish()
            return [replace(event, audio=0.0) for event in stream]

    def finish(self) -> None:
        """Send the rest. The events, except the field `audio`, must be those of a stream without interruption."""
        for stream, events in zip(self._streams, self._events, strict=True):
            stream.send(self._pcm[self._half :])
            stream.finish()
            events += stream
            assert [replace(event, audio=0.0) for event in events] == self.uninterrupted

    @property
    def reconnects(self) -> list[int]:
        return [stream.reconnects for stream in self._streams]


@pytest.fixture
def resumable(cluster: str, tmp_path: Path) -> dict[str, Any]:
    """Two replicas that share a folder for states. Return the arguments of the application."""
    args = {"min_replicas": 2, "max_replicas": 2, "state_store": str(tmp_path / "states"), "state_seconds": 1}
    args["drain_seconds"] = 600  # longer than the tests wait
    serve.run(build(**args))
    wait_until(lambda: len(replicas()) == 2)
    return args


@pytest.mark.slow
def test_streams_of_a_killed_replica_continue_on_the_other_one(
    cluster: str, resumable: dict[str, Any], spoken: Any
) -> None:
    with ExitStack() as stack:
        streams = ResumableStreams(cluster, spoken[0].pcm, stack)
        victim = min(replicas())
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in replicas())
        streams.finish()
        assert 0 < sum(map(bool, streams.reconnects)) < STREAMS
    wait_until(lambda: len(replicas()) == 2)


@pytest.mark.slow
def test_an_update_replaces_replicas_while_resumable_streams_are_open(
    cluster: str, resumable: dict[str, Any], spoken: Any
) -> None:
    """Without hand-over, the old replicas would exist until their streams end: here they do not end before."""
    with ExitStack() as stack:
        streams = ResumableStreams(cluster, spoken[0].pcm, stack)
        old = replicas()
        update = build(**resumable, send_seconds=11)
        change = threading.Thread(target=lambda: serve.run(update), daemon=True)
        change.start()
        wait_until(lambda: len(replicas()) == 2 and not replicas() & old)
        streams.finish()
        assert all(streams.reconnects)
    change.join(60)


@pytest.mark.slow
def test_a_stream_is_rejected_when_all_replicas_are_full(two_replicas: str) -> None:
    with ExitStack() as stack:
        for _ in range(2 * STREAMS):
            stack.enter_context(open_stream(two_replicas))
        with pytest.raises(InvalidStatus) as rejected:
            connect(f"ws://{two_replicas}/v1/stream", additional_headers=KEY)
        assert rejected.value.response.status_code == 429 and rejected.value.response.headers["retry-after"]


def test_http_and_api_keys(two_replicas: str, spoken: Any) -> None:
    import openai

    with urllib.request.urlopen(f"http://{two_replicas}/readyz") as answer:
        assert json.load(answer)["status"] == "ready"
    client = openai.OpenAI(base_url=f"http://{two_replicas}/v1", api_key="secret", max_retries=0)
    transcription = client.audio.transcriptions.create(model="nemostream", file=Path(spoken[0].path))
    assert transcription.text == spoken[0].text
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


@pytest.mark.slow
def test_autoscaling(cluster: str, spoken: Any) -> None:
    serve.run(build(min_replicas=1, max_replicas=2))
    wait_until(lambda: len(replicas()) == 1)
    with ExitStack() as stack:
        streams = [stack.enter_context(open_stream(cluster)) for _ in range(STREAMS)]
        wait_until(lambda: len(replicas()) == 2, seconds=120)
        for socket in streams:
            socket.send(spoken[0].pcm)
            assert finish(socket) == spoken[0].text


def test_options_are_checked_before_deployment() -> None:
    with pytest.raises(OptionError, match="http_options"):
        build(port=80)
    with pytest.raises(OptionError, match="chunk_ms"):
        build(chunk_ms="short")
    with pytest.raises(OptionError, match="transports is not supported with Ray Serve"):
        build(transports=2)


def test_a_store_that_replicas_do_not_share_causes_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nemostream.serving"):
        build(max_replicas=1)
        build(state_store="none")
        build(state_store="./states")
        assert not caplog.messages
        build()
        assert ["state_store is memory" in message for message in caplog.messages] == [True]


# -- without a cluster -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "received", "closed"),
    [
        (["websocket.accept", "websocket.send"], [], True),
        (["websocket.accept", "websocket.close"], [], False),
        (["websocket.accept"], ["websocket.receive"], True),
        (["websocket.accept"], ["websocket.receive", "websocket.disconnect"], False),
        (["websocket.http.response.start", "websocket.http.response.body"], [], False),
        ([], [], False),
    ],
)
def test_a_socket_that_its_replica_left_open_is_closed(sent: list[str], received: list[str], closed: bool) -> None:
    from nemostream.serving.integrations.ray_app import proxy_middlewares

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for kind in sent:
            await send({"type": kind})
        for kind in received:
            assert (await receive())["type"] == kind
        raise ConnectionError

    messages: list[Any] = []
    kinds = iter(received)

    async def receive() -> Any:
        return {"type": next(kinds)}

    async def send(message: Any) -> None:
        messages.append(message)

    (middleware,) = proxy_middlewares()
    with pytest.raises(ConnectionError):
        asyncio.run(middleware.cls(app)({"type": "websocket"}, receive, send))
    last = {"type": "websocket.close", "code": 1012, "reason": "the engine of this stream is gone; connect again."}
    assert messages == [*({"type": kind} for kind in sent), *([last] if closed else [])]
    messages.clear()
    kinds = iter(received)
    with pytest.raises(ConnectionError):
        asyncio.run(middleware.cls(app)({"type": "http"}, receive, send))
    assert messages == [{"type": kind} for kind in sent]


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("max_streams", 7, "--max-streams=7"),
        ("measure", True, "--measure"),
        ("measure", False, "--no-measure"),
        ("chunks", [80, 560], "--chunks=80,560"),
        ("api_keys", ("a", "b"), "--api-keys=a,b"),
        ("device", "cuda", "--device=cuda"),
    ],
)
def test_arguments_are_flags(name: str, value: Any, flag: str) -> None:
    from nemostream.serving.integrations.ray_app import _flag

    assert _flag(name, value) == flag


def test_a_process_that_is_no_replica_is_not_taken_for_one() -> None:
    from nemostream.serving.integrations.ray_app import _ray_replica

    assert _ray_replica() is None


def test_the_deployment_has_the_limits_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}

    def deployment(replica: Any, **values: Any) -> Any:
        options.update(values)
        return SimpleNamespace(bind=lambda settings: settings)

    monkeypatch.setattr(serve, "deployment", deployment)
    settings = build(max_streams=10, drain_seconds=33)
    assert (settings.max_streams, options["max_ongoing_requests"], options["graceful_shutdown_timeout_s"]) == (
        10,
        20,
        33,
    )


@pytest.mark.parametrize(
    ("state", "task_done", "healthy"),
    [("ready", False, True), ("failed", False, False), ("draining", False, False), ("ready", True, False)],
)
def test_a_replica_that_must_be_replaced_is_not_healthy(state: str, task_done: bool, healthy: bool) -> None:
    from nemostream.serving.integrations.ray_app import Replica

    replica = SimpleNamespace(
        _service=SimpleNamespace(state=state),
        _tasks=[SimpleNamespace(done=lambda: False), SimpleNamespace(done=lambda: task_done)],
    )
    with nullcontext() if healthy else pytest.raises(BackendError, match=f"the engine is {state}"):
        asyncio.run(Replica.check_health(replica))  # type: ignore[arg-type]
