"""Standard input, output and error as they really are: closed, pipes that block, written to by libraries in C."""

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
    from nemostream.cli.interrupt import Stop

# What libmpg123, inside libsndfile, writes about damaged or unusual MP3 files; it cannot be turned off there.
_DECODER_MESSAGE = re.compile(rb"\[src/libmpg123/|Note: |Warning: .*(Xing|Frankenstein)|\s*$")

# After a signal, what a pipe still holds is read: as much as Linux lets one hold, and not for long.
_LEFT_OVER_BYTES, _LEFT_OVER_SECONDS = 1 << 20, 0.2


def open_closed_streams() -> None:
    """Open closed standard descriptors on the null device.

    Otherwise the next file that is opened would become standard output, and messages would be written into it.
    `sys.stdin` and `sys.stdout` stay None, so that a command can tell.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - `print` would use standard output


@contextmanager
def decoder_messages_dropped() -> Iterator[None]:
    """Meanwhile libmpg123's messages do not reach standard error.

    Descriptor 2 is a pipe whose lines are passed on unless they are such messages; Python's own standard error is not
    part of it, so nothing that we write is delayed or lost.
    """
    try:
        replaced = sys.stderr if sys.stderr.fileno() == 2 else None
    except (OSError, ValueError, AttributeError):  # not a file
        replaced = None
    kept = os.dup(2)
    read, write = os.pipe()
    relay = threading.Thread(target=_relay, args=(read, kept), name="nemostream-stderr", daemon=True)
    relay.start()
    if replaced is not None:
        replaced.flush()
        sys.stderr = open(os.dup(kept), "w", buffering=1, encoding=replaced.encoding, errors=replaced.errors)  # noqa: SIM115
    os.dup2(write, 2)
    os.close(write)
    try:
        yield
    finally:
        os.dup2(kept, 2)  # the pipe's last writer is gone, which ends the thread
        if replaced is not None:
            sys.stderr.close()
            sys.stderr = replaced
        relay.join(1.0)  # a child process may hold the pipe open


def _relay(read: int, to: int) -> None:
    with open(read, "rb", buffering=0) as pipe, open(to, "wb", buffering=0) as out:
        rest = b""
        while data := pipe.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            _pass_on([line + b"\n" for line in lines], out)
        _pass_on([rest], out)


def _pass_on(lines: list[bytes], out: BinaryIO | io.FileIO) -> None:
    kept = b"".join(line for line in lines if not _DECODER_MESSAGE.match(line))
    with suppress(OSError):
        if kept:
            out.write(kept)


def standard_input(stop: Stop) -> BinaryIO:
    """Standard input as a binary stream that ends when `stop` is set, with what had arrived until then."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):  # not a file
        return sys.stdin.buffer
    return io.BufferedReader(_Stoppable(descriptor, stop), 1 << 17)


class _Stoppable(io.RawIOBase):
    def __init__(self, descriptor: int, stop: Stop) -> None:
        self._descriptor, self._stop = descriptor, stop
        self._left_over = _LEFT_OVER_BYTES
        self._until: float | None = None

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
                self._until = self._until or time.monotonic() + _LEFT_OVER_SECONDS
                left = max(0.0, self._until - time.monotonic())
                if not self._left_over or not select.select([self._descriptor], [], [], left)[0]:
                    return 0
                view = view[: self._left_over]
            try:
                data = os.read(self._descriptor, len(view))
            except BlockingIOError:  # somebody else was faster
                continue
            if self._stop.is_set():
                self._left_over -= len(data)
            view[: len(data)] = data
            return len(data)


def write_whole(stream: TextIO, data: bytes) -> None:
    """Write bytes to a text stream's file, unbuffered: what could not be written is not tried again later.

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
        if written is None:  # a pipe that does not block, and is full
            select.select([], [file], [])
            continue
        rest = rest[written:]
