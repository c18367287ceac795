"""Two replicas on a Ray cluster of this machine, talked to through Ray's proxy."""

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

STREAMS = 8  # of a replica
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
def two(cluster: str) -> str:
    serve.run(build(min_replicas=2, max_replicas=2))
    eventually(lambda: len(replicas()) == 2)
    return cluster


def replicas() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::ServeReplica"):
            found.add(int(folder.name))
    return found


def states() -> set[str]:
    return set(serve.status().applications["default"].deployments["nemostream"].replica_states)


def eventually(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def opened(address: str) -> ClientConnection:
    """A stream; tries again where it is told to."""
    end = time.monotonic() + 60
    while True:
        try:
            socket = connect(f"ws://{address}/v1/stream", additional_headers=KEY)
            assert json.loads(socket.recv())["type"] == "ready"
            return socket
        except (InvalidStatus, ConnectionClosed):
            assert time.monotonic() < end
            time.sleep(0.2)


def finished(socket: ClientConnection) -> str:
    socket.send(json.dumps({"type": "finish"}))
    *_, last = [json.loads(event) for event in socket]
    assert last["type"] == "done" and socket.close_code == 1000
    return str(last["text"])


def test_a_replica_is_killed_and_only_its_clients_notice(two: str, spoken: Any) -> None:
    pcm, text = spoken[0].pcm, spoken[0].text
    half = len(pcm) // 4 * 2
    with ExitStack() as stack:
        voices = [stack.enter_context(opened(two)) for _ in range(8)]
        for socket in voices:
            socket.send(pcm[:half])
        victim = min(replicas())
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: victim not in replicas())
        well, cut = 0, 0
        for socket in voices:
            try:
                socket.send(pcm[half:])
                assert finished(socket) == text
                well += 1
            except ConnectionClosed as error:
                assert error.rcvd is not None and error.rcvd.code == 1012 and "connect again" in error.rcvd.reason
                cut += 1
                with opened(two) as again:
                    again.send(pcm)
                    assert finished(again) == text
        assert well and cut and well + cut == 8
    eventually(lambda: len(replicas()) == 2)  # another one takes its place


def test_a_replica_that_goes_finishes_its_streams(two: str, spoken: Any) -> None:
    pcm, text = spoken[0].pcm, spoken[0].text
    half = len(pcm) // 4 * 2
    with ExitStack() as stack:
        voices = [stack.enter_context(opened(two)) for _ in range(8)]
        for socket in voices:
            socket.send(pcm[:half])
        fewer = build(min_replicas=1, max_replicas=1)
        change = threading.Thread(target=lambda: serve.run(fewer))  # returns when it is done, drained too
        change.start()
        eventually(lambda: "STOPPING" in states())
        assert len(replicas()) == 2  # one of them is to stop, and has streams
        for socket in voices:
            socket.send(pcm[half:])
            assert finished(socket) == text
    change.join(60)
    eventually(lambda: len(replicas()) == 1)


def test_every_replica_is_filled_and_then_a_stream_is_refused(two: str) -> None:
    with ExitStack() as stack:
        for _ in range(2 * STREAMS):
            stack.enter_context(opened(two))
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://{two}/v1/stream", additional_headers=KEY)
        assert refused.value.response.status_code == 429 and refused.value.response.headers["retry-after"]


def test_http_goes_through_the_same_doors(two: str, spoken: Any) -> None:
    import openai

    with urllib.request.urlopen(f"http://{two}/readyz") as answer:
        assert json.load(answer)["status"] == "ready"
    client = openai.OpenAI(base_url=f"http://{two}/v1", api_key="secret", max_retries=0)
    said = client.audio.transcriptions.create(model="nemostream", file=Path(spoken[0].path))
    assert said.text == spoken[0].text
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_streams_of_more_than_a_replica_start_another(cluster: str, spoken: Any) -> None:
    serve.run(build(min_replicas=1, max_replicas=2))
    eventually(lambda: len(replicas()) == 1)
    with ExitStack() as stack:
        voices = [stack.enter_context(opened(cluster)) for _ in range(STREAMS)]
        eventually(lambda: len(replicas()) == 2, seconds=120)
        for socket in voices:
            socket.send(spoken[0].pcm)
            assert finished(socket) == spoken[0].text


def test_options_are_checked_before_anything_is_deployed() -> None:
    with pytest.raises(OptionError, match="http_options"):
        build(port=80)
    with pytest.raises(OptionError, match="chunk_ms"):
        build(chunk_ms="short")
