"""Decoding of uploaded recordings in a pool of processes with time and memory limits.

The server's own process never parses uploads with native code (see `decoder_process`). A process decodes one recording
at a time and is reused; one that crashes, stalls or cannot be stopped in the middle of a recording is replaced.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import AudioError, BackendError
from nemostream.serving.errors import error_of
from nemostream.serving.subprocesses import worker_environment
from nemostream.serving.uploads.decoder_process import FRAME, MAX_MEMORY

BLOCK_SECONDS = 60.0  # for one frame of a process: the file's head, or one block
_STOP_SECONDS = 2.0  # for a process to stop in the middle of a recording
_MAX_IDLE = 2  # processes that are kept for the next recordings
_MAX_FRAME_BYTES = 64 << 20


class DecoderPool:
    """Processes that decode recordings. The caller limits how many are in use at once."""

    def __init__(self, rate: int, max_seconds: float) -> None:
        """`rate` is the sample rate of the output in Hz; recordings longer than `max_seconds` are rejected."""
        self.rate, self.max_seconds = rate, max_seconds
        self._idle: list[_DecoderProcess] = []
        self._tasks: set[asyncio.Task[Any]] = set()  # in the background
        self._closed = False

    def decode(self, file: int, name: str) -> Decoding:
        """Decode the file with descriptor `file`, called `name` in errors. Returns an asynchronous context manager."""
        return Decoding(self, file, name)

    def close(self) -> None:
        """Kill all idle processes; those in use are killed after their recordings."""
        self._closed = True
        while self._idle:
            self._idle.pop().kill()

    async def _acquire(self) -> _DecoderProcess:
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            process.kill()
        starting = self._in_background(_DecoderProcess.start())
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(self._keep_started)
            raise

    def _keep_started(self, task: asyncio.Task[_DecoderProcess]) -> None:
        """Keep a process whose request was cancelled while it started."""
        if not task.cancelled() and not task.exception():
            self._keep(task.result())

    def _release(self, process: _DecoderProcess, finished: bool) -> None:
        """Return a process to the pool. Does not wait, so it can run while a task is cancelled."""
        if finished:
            self._keep(process)
        else:
            self._in_background(self._stop(process))

    async def _stop(self, process: _DecoderProcess) -> None:
        """Stop the recording of a process; kill the process if that takes too long."""
        try:
            process.send(b"s")
            async with asyncio.timeout(_STOP_SECONDS):
                while (await process.receive())[0] not in (b"e", b"x"):
                    pass
        except (OSError, EOFError):  # a timeout is an OSError
            process.kill()
        else:
            self._keep(process)

    def _keep(self, process: _DecoderProcess) -> None:
        if process.alive and not self._closed and len(self._idle) < _MAX_IDLE:
            self._idle.append(process)
        else:
            process.kill()

    def _in_background(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Decoding:
    """A recording that is decoded by a process of the pool.

    Entering raises `AudioError` for a file that is not an accepted recording. Iterating yields mono float32 blocks [N]
    and raises `AudioError` if the file is damaged, is too long, or ends the process.
    """

    duration = 0.0  # seconds, as stated by the file's header
    seconds = 0.0  # decoded; set at the end
    warning = ""  # set at the end if the file was cut short

    def __init__(self, pool: DecoderPool, file: int, name: str) -> None:
        self._pool, self._file, self._name = pool, file, name
        self._process: _DecoderProcess | None = None
        self._finished = False  # the process is ready for another recording

    async def __aenter__(self) -> Decoding:
        self._process = await self._pool._acquire()
        request = {"name": self._name, "rate": self._pool.rate, "max_seconds": self._pool.max_seconds}
        try:
            self._process.send_file(self._file, json.dumps(request).encode())
            _, payload = await self._receive()
            self.duration = float(json.loads(payload)["duration"])
        except BaseException:
            self._release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    async def __aiter__(self) -> AsyncIterator[NDArray[np.float32]]:
        assert self._process is not None
        self._process.send(b"n")
        while True:
            kind, payload = await self._receive()
            if kind == b"e":
                self._finished = True
                document = json.loads(payload)
                self.seconds, self.warning = float(document["seconds"]), str(document["warning"])
                return
            self._process.send(b"n")  # the next block is decoded while the model works on this one
            yield np.frombuffer(payload, np.float32)

    async def _receive(self) -> tuple[bytes, bytes]:
        assert self._process is not None
        try:
            async with asyncio.timeout(BLOCK_SECONDS):
                kind, payload = await self._process.receive()
        except TimeoutError:
            raise AudioError(
                f"{self._name} takes more than {BLOCK_SECONDS:.0f} s to decode; convert it to FLAC."
            ) from None
        except (OSError, EOFError) as error:
            raise AudioError(
                f"{self._name} cannot be decoded: the decoder process ended (damaged file, more than "
                f"{MAX_MEMORY >> 20} MiB of memory, or too much time); convert it to FLAC with ffmpeg."
            ) from error
        if kind == b"x":
            self._finished = True
            document = json.loads(payload)
            raise error_of(document["kind"], document["message"], AudioError)
        return kind, payload

    def _release(self) -> None:
        if self._process is not None:
            self._pool._release(self._process, self._finished)
            self._process = None


class _DecoderProcess:
    """A decoder process and the socket to it."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket, reader: Any, writer: Any) -> None:
        self._process, self._link, self._reader, self._writer = process, link, reader, writer
        self._head: tuple[bytes, int] | None = None  # of a frame whose payload has not been read

    @classmethod
    async def start(cls) -> _DecoderProcess:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await asyncio.to_thread(_spawn, theirs)
        except OSError as error:
            ours.close()
            raise BackendError(f"the decoder process cannot be started: {error.strerror}.") from error
        finally:
            theirs.close()
        link = ours.dup()  # for descriptors, which a transport cannot send
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
        """Return one frame: kind and payload. After a cancelled call the next one returns the same frame."""
        if self._head is None:
            self._head = FRAME.unpack(await self._reader.readexactly(FRAME.size))
        kind, size = self._head
        if size > _MAX_FRAME_BYTES:
            raise EOFError(f"a frame of {size} bytes")
        payload = await self._reader.readexactly(size)
        self._head = None
        return kind, payload

    def kill(self) -> None:
        self._writer.close()
        self._link.close()
        self._process.kill()
        self._process.wait()  # returns at once: the process waits for no device


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "nemostream.serving.uploads.decoder_process"],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=worker_environment(),
    )
