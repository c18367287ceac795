"""Two replicas on a local Ray cluster, accessed through Ray's proxy."""

from __future__ import annotations

import json
import os
import signal
import socket as sockets
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from nemostream.errors import OptionError

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


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
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
