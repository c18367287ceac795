"""A Redis server of its own for the tests, and processes that stop or end at a chosen point."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REDIS = shutil.which("redis-server") or shutil.which("valkey-server")


class RedisServer:
    """A Redis server on a free port of this machine. It keeps nothing when it is stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        assert REDIS is not None
        command = [REDIS, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        assert any("eady to accept connections" in line for line in self.process.stdout)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def send_signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@pytest.fixture
def idle_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test starts and stops."""
    if REDIS is None:
        pytest.skip("needs Redis (Debian: redis-server)")
    pytest.importorskip("redis", reason="needs the state extra")
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running server for all tests that do not stop it."""
    if REDIS is None:
        pytest.skip("needs Redis (Debian: redis-server)")
    pytest.importorskip("redis", reason="needs the state extra")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def forked() -> Iterator[Callable[..., int]]:
    """Call a function in a copy of this process, until the copy has ended or stopped; return the copy's process ID.

    It ends with the status 0, or with 1 if the function raised an exception. If it has stopped, it still exists.
    """
    children: list[int] = []

    def fork(function: Callable[..., object], *arguments: Any) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                function(*arguments)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
        os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        return child

    yield fork
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
