"""Handling of Ctrl-C (SIGINT) and SIGTERM on the command line.

By default a signal ends the process at once with a one-line message and no traceback. `signals_raise` lets a command
clean up first; `signals_stop` lets it finish its input and write what it has. Exit codes follow the shell: 128 plus the
signal's number. Signals that were ignored when the process started (`nohup`, background jobs) stay ignored.
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
    """The command received a signal. With `reported`, the message about it has already been printed."""

    def __init__(self, number: int, reported: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.reported = number, reported


class StopRequest:
    """A thread-safe flag that a signal sets."""

    def __init__(self) -> None:
        self.number: int | None = None  # the first signal
        self._event = threading.Event()
        self._read_end, self._write_end = os.pipe()

    def set(self, number: int = signal.SIGINT) -> None:
        self.number = number
        self._event.set()
        os.write(self._write_end, b"!")

    def is_set(self) -> bool:
        return self._event.is_set()

    def fileno(self) -> int:
        """Return a file descriptor for `select` that becomes readable when the flag is set."""
        return self._read_end


def exit_on_signals() -> None:
    """From now on, end the process at the first signal."""
    _set_handler(lambda number, frame: _exit(number, "interrupted"))


@contextmanager
def signals_exit() -> Iterator[None]:
    """Within the context, a signal ends the process."""
    with _handler(lambda number, frame: _exit(number, "interrupted")):
        yield


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within the context, a signal raises `Interrupted` in the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handler(handle):
        yield


@contextmanager
def signals_stop() -> Iterator[StopRequest]:
    """Within the context, the first signal sets the `StopRequest` and the second one ends the process."""
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            _exit(number, "aborted")
        stop.set(number)

    with _handler(handle):
        yield stop


def _set_handler(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Set the handler and return the previous ones. Does nothing outside the main thread."""
    previous: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    return previous


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = _set_handler(handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)  # type: ignore[arg-type]


def _exit(number: int, message: str) -> None:
    # Not `print`: the handler may run while the same stream is being written.
    with suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"nemostream: {message}.\n".encode())
    os._exit(128 + number)
