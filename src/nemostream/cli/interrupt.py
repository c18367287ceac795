"""Ctrl-C and SIGTERM on the command line.

By default a signal ends the process at once, with one sentence and without a traceback. `raising` lets a command clean
up first; `finishing` lets one write what it has. Exit codes are those of a shell: 128 and the signal's number. Signals
that were ignored when the process started, as `nohup` and background jobs have it, stay ignored.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal that a command was sent; `told` says that its user knows what became of the work."""

    def __init__(self, number: int, told: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.told = number, told


class Stop:
    """Whether a signal asked for the end. Threads share it."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal
        self._event = threading.Event()
        self._woken, self._wake = os.pipe()

    def set(self, number: int = signal.SIGINT) -> None:
        self.number = number
        self._event.set()
        os.write(self._wake, b"!")

    def is_set(self) -> bool:
        return self._event.is_set()

    def fileno(self) -> int:
        """A descriptor that is readable once it is set: for `select`."""
        return self._woken


def exit_on_signals() -> None:
    """End the process at the first signal."""
    _handle(lambda number, frame: _exit(number, "interrupted"))


@contextmanager
def exiting() -> Iterator[None]:
    """As `exit_on_signals`, for a while."""
    with _handling(lambda number, frame: _exit(number, "interrupted")):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """Meanwhile a signal raises `Interrupted` in the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handling(handle):
        yield


@contextmanager
def finishing() -> Iterator[Stop]:
    """Meanwhile the first signal sets the `Stop`, and the second one ends the process."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            _exit(number, "aborted")
        stop.set(number)

    with _handling(handle):
        yield stop


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Set the handler; return those it replaces. Only the main thread can."""
    before: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = _handle(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)  # type: ignore[arg-type]


def _exit(number: int, what: str) -> None:
    # Not `print`: a handler may run while the same stream is being written.
    with suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"nemostream: {what}.\n".encode())
    os._exit(128 + number)
