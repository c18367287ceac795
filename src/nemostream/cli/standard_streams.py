"""Standard input, output and error in practice: closed, non-blocking, or written to by C libraries."""

from __future__ import annotations

import io
import os
import re
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

if TYPE_CHECKING:
    from nemostream.cli.interrupt import StopRequest

# Messages of libmpg123 (inside libsndfile) about damaged or unusual MP3 files. libsndfile cannot disable them.
_DECODER_MESSAGE = re.compile(rb"\[src/libmpg123/|Note: |Warning: .*(Xing|Frankenstein)|\s*$")

# After a signal, standard input is drained up to these limits; Linux pipes hold at most 1 MiB.
_MAX_DRAIN_BYTES, _MAX_DRAIN_SECONDS = 1 << 20, 0.2


def print_message(message: str) -> None:
    """Print a one-line message to standard error."""
    with suppress(OSError):  # the reader has closed it
        print(f"nemostream: {message}", file=sys.stderr, flush=True)


def open_closed_streams() -> None:
    """Open closed standard descriptors on the null device.

    Otherwise the next opened file would become standard output, and messages would be written into it. `sys.stdin` and
    `sys.stdout` stay None, so that a command can detect that they are closed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - `print` would use standard output


@contextmanager
def suppress_decoder_messages() -> Iterator[None]:
    """Within the context, keep libmpg123's messages out of standard error.

    Descriptor 2 becomes a pipe; a thread forwards all lines except those messages. `sys.stderr` bypasses the pipe, so
    nothing that Python writes is delayed or lost.
    """
    try:
        original = sys.stderr if sys.stderr.fileno() == 2 else None
    except (OSError, ValueError, AttributeError):  # not a file
        original = None
    stderr_copy = os.dup(2)
    read_end, write_end = os.pipe()
    relay = threading.Thread(target=_relay, args=(read_end, stderr_copy), name="nemostream-stderr", daemon=True)
    relay.start()
    if original is not None:
        original.flush()
        sys.stderr = open(  # noqa: SIM115
            os.dup(stderr_copy), "w", buffering=1, encoding=original.encoding, errors=original.errors
        )
    os.dup2(write_end, 2)
    os.close(write_end)
    try:
        yield
    finally:
        os.dup2(stderr_copy, 2)  # closes the pipe's last write end, which ends the thread
        if original is not None:
            sys.stderr.close()
            sys.stderr = original
        relay.join(1.0)  # a child process may keep the pipe open


def _relay(source: int, target: int) -> None:
    with open(source, "rb", buffering=0) as pipe, open(target, "wb", buffering=0) as out:
        rest = b""
        while data := pipe.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            _forward([line + b"\n" for line in lines], out)
        _forward([rest], out)


def _forward(lines: list[bytes], out: BinaryIO | io.FileIO) -> None:
    data = b"".join(line for line in lines if not _DECODER_MESSAGE.match(line))
    with suppress(OSError):
        if data:
            out.write(data)


def standard_input(stop: StopRequest) -> BinaryIO:
    """Return standard input as a binary stream. When `stop` is set, it ends after the data received so far."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):  # not a file
        return sys.stdin.buffer
    return io.BufferedReader(_StoppableInput(descriptor, stop), 1 << 17)


class _StoppableInput(io.RawIOBase):
    def __init__(self, descriptor: int, stop: StopRequest) -> None:
        self._descriptor, self._stop = descriptor, stop
        self._drain_bytes = _MAX_DRAIN_BYTES
        self._drain_deadline: float | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while True:
            if not self._stop.is_set():
                ready, _, _ = select.select([self._descriptor, self._stop.fileno()], [], [])
                if self._descriptor not in ready:
                    continue
            else:
                self._drain_deadline = self._drain_deadline or time.monotonic() + _MAX_DRAIN_SECONDS
                timeout = max(0.0, self._drain_deadline - time.monotonic())
                if not self._drain_bytes or not select.select([self._descriptor], [], [], timeout)[0]:
                    return 0
                view = view[: self._drain_bytes]
            try:
                data = os.read(self._descriptor, len(view))
            except BlockingIOError:  # another process has read the data
                continue
            if self._stop.is_set():
                self._drain_bytes -= len(data)
            view[: len(data)] = data
            return len(data)


def write_unbuffered(stream: TextIO, data: bytes) -> None:
    """Write bytes to the file under a text stream without buffering: a failed write is not retried later.

    Raises `OSError`.
    """
    stream.flush()
    binary = stream.buffer
    write_all(getattr(binary, "raw", binary), data)


def write_all(file: Any, data: bytes) -> None:
    """Write all of `data` to an unbuffered file. Raises `OSError`."""
    rest = memoryview(data)
    while len(rest):
        written = file.write(rest)
        if written is None:  # a full non-blocking pipe
            select.select([], [file], [])
            continue
        rest = rest[written:]
