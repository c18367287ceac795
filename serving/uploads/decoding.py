"""Decoding of uploaded recordings in a pool of processes, each with limits of time and memory.

Nothing that a client uploads is parsed by native code in the server's own process (see `decoder_process`). A process
serves one recording at a time and is used again; one that crashes, stalls or is left in the middle of a recording is
replaced.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream import errors
from nemostream.errors import AudioError, BackendError, NemostreamError
from nemostream.serving.uploads.decoder_process import FRAME, MEMORY

BLOCK_SECONDS = 60.0  # for one answer of a process: the file's head, or one block
_STOP_SECONDS = 2.0  # for a process to stop in the middle of a recording
_IDLE = 2  # processes that are kept for the next recordings
_LARGEST = 64 << 20  # bytes of one answer
_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV")


class DecoderPool:
    """Processes that decode recordings. The caller bounds how many are in use at once."""

    def __init__(self, rate: int, max_seconds: float) -> None:
        """`rate` is that of the samples to produce, in Hz; a recording longer than `max_seconds` is rejected."""
        self.rate, self.max_seconds = rate, max_seconds
        self._idle: list[_Process] = []
        self._tasks: set[asyncio.Task[Any]] = set()  # that no request waits for
        self._closed = False

    def decode(self, file: int, name: str) -> Decoding:
        """Decode the file behind the descriptor `file`; errors call it `name`. An asynchronous context manager."""
        return Decoding(self, file, name)

    def close(self) -> None:
        """End all idle processes; those in use end with their recordings."""
        self._closed = True
        while self._idle:
            self._idle.pop().end()

    async def _take(self) -> _Process:
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            process.end()
        starting = self._in_background(_Process.start())
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(self._started)
            raise

    def _started(self, task: asyncio.Task[_Process]) -> None:
        """A process whose request was cancelled."""
        if not task.cancelled() and not task.exception():
            self._keep(task.result())

    def _give_back(self, process: _Process, at_rest: bool) -> None:
        """Does not wait, so that it can run while a task is cancelled."""
        if at_rest:
            self._keep(process)
        else:
            self._in_background(self._stop(process))

    async def _stop(self, process: _Process) -> None:
        """Make a process leave its recording; end it if that takes too long."""
        try:
            process.send(b"s")
            async with asyncio.timeout(_STOP_SECONDS):
                while (await process.receive())[0] not in (b"e", b"x"):
                    pass
        except (OSError, EOFError):  # a timeout is an OSError
            process.end()
        else:
            self._keep(process)

    def _keep(self, process: _Process) -> None:
        if process.alive and not self._closed and len(self._idle) < _IDLE:
            self._idle.append(process)
        else:
            process.end()

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Decoding:
    """A recording in a process of the pool: `duration` in seconds by the file's head, and at the end `seconds` it held.

    Entering raises `AudioError` for a file that is not an accepted recording; iterating yields mono float32 blocks [N]
    and raises `AudioError` where the file is damaged, too long, or ends the process.
    """

    duration = 0.0
    seconds = 0.0
    warning = ""  # at the end, if the file was cut short

    def __init__(self, pool: DecoderPool, file: int, name: str) -> None:
        self._pool, self._file, self._name = pool, file, name
        self._process: _Process | None = None
        self._at_rest = False  # the process waits for a file, so another recording may use it

    async def __aenter__(self) -> Decoding:
        self._process = await self._pool._take()
        request = {"name": self._name, "rate": self._pool.rate, "max_seconds": self._pool.max_seconds}
        try:
            self._process.send_file(self._file, json.dumps(request).encode())
            _, payload = await self._answer()
            self.duration = float(json.loads(payload)["duration"])
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    async def __aiter__(self) -> AsyncIterator[NDArray[np.float32]]:
        assert self._process is not None
        self._process.send(b"n")
        while True:
            kind, payload = await self._answer()
            if kind == b"e":
                self._at_rest = True
                document = json.loads(payload)
                self.seconds, self.warning = float(document["seconds"]), str(document["warning"])
                return
            self._process.send(b"n")  # the next block is decoded while the model works on this one
            yield np.frombuffer(payload, np.float32)

    async def _answer(self) -> tuple[bytes, bytes]:
        assert self._process is not None
        try:
            async with asyncio.timeout(BLOCK_SECONDS):
                kind, payload = await self._process.receive()
        except TimeoutError:
            raise AudioError(f"{self._name} takes more than {BLOCK_SECONDS:.0f} s to decode; convert it.") from None
        except (OSError, EOFError) as error:
            raise AudioError(
                f"{self._name} cannot be decoded: the decoder process ended (damaged file, more than "
                f"{MEMORY >> 20} MiB of memory, or too much time); convert it to FLAC with ffmpeg."
            ) from error
        if kind == b"x":
            self._at_rest = True
            document = json.loads(payload)
            known = getattr(errors, document["kind"], AudioError)
            raise (known if issubclass(known, NemostreamError) else AudioError)(document["message"])
        return kind, payload

    def _leave(self) -> None:
        if self._process is not None:
            self._pool._give_back(self._process, self._at_rest)
            self._process = None


class _Process:
    """A decoder process and the socket to it."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket, reader: Any, writer: Any) -> None:
        self._process, self._link, self._reader, self._writer = process, link, reader, writer
        self._head: tuple[bytes, int] | None = None  # of an answer whose payload has not been read

    @classmethod
    async def start(cls) -> _Process:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.to_thread(_spawn, theirs)
        except OSError as error:
            ours.close()
            raise BackendError(f"the decoder process cannot be started: {error.strerror}.") from error
        finally:
            theirs.close()
        link = ours.dup()  # for the descriptors, which a transport cannot send
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, link, reader, writer)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None and not self._reader.at_eof()

    def send_file(self, file: int, request: bytes) -> None:
        socket.send_fds(self._link, [request], [file])

    def send(self, command: bytes) -> None:
        self._writer.write(command)

    async def receive(self) -> tuple[bytes, bytes]:
        """One answer. A cancelled call loses nothing: the next one returns the same answer."""
        if self._head is None:
            self._head = FRAME.unpack(await self._reader.readexactly(FRAME.size))
        kind, size = self._head
        if size > _LARGEST:
            raise EOFError(f"an answer of {size} bytes")
        payload = await self._reader.readexactly(size)
        self._head = None
        return kind, payload

    def end(self) -> None:
        self._writer.close()
        self._link.close()
        self._process.kill()
        self._process.wait()  # a killed process is gone at once: it waits for no device


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    variables = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-m", "nemostream.serving.uploads.decoder_process"],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=variables | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
