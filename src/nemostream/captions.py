"""The last line of a terminal while speech is decoded: how far it is, and what was said so far.

It goes to standard error, and only if that is a terminal; `aside` takes it away while something else is printed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

_PAUSE = 0.05  # seconds between two drawings: more often nobody can read it


@dataclass
class _Row:
    name: str
    text: str = ""
    heard: float = 0.0
    duration: float = 0.0  # 0 if nobody knows


class Captions:
    """One row per input, of which the first unfinished one is shown. Threads may share it."""

    def __init__(self, names: Sequence[str]) -> None:
        self._rows = [_Row(name) for name in names]
        self._turn = 0
        self._shown = sys.stderr.isatty()
        self._drawn = 0.0  # when; 0 if the line is empty
        self._lock = threading.Lock()

    def __enter__(self) -> Captions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.aside():
            self._shown = False  # a thread that still decodes must not draw over the shell's prompt

    def begins(self, index: int, duration: float) -> None:
        self._rows[index].duration = duration

    def said(self, index: int, text: str) -> None:
        """The text so far; shown with the next `heard`."""
        self._rows[index].text = text

    def heard(self, index: int, seconds: float) -> None:
        """How much of the audio is decoded."""
        self._rows[index].heard = seconds
        self._draw()

    def over(self, index: int) -> None:
        """The result of input `index` is about to be printed; the next one is on."""
        self._turn = index + 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The line is empty meanwhile."""
        with self._lock:
            if self._drawn:
                sys.stderr.write("\r" + " " * _width() + "\r")
                sys.stderr.flush()
                self._drawn = 0.0
            yield

    def _draw(self) -> None:
        if not self._shown:
            return
        with self._lock:
            if self._shown and time.monotonic() - self._drawn >= _PAUSE:
                sys.stderr.write("\r" + self._line(_width()))
                sys.stderr.flush()
                self._drawn = time.monotonic()

    def _line(self, width: int) -> str:
        """Filled up with spaces: they rub out what was there on every terminal, whatever control sequences it knows."""
        from rich.cells import cell_len, set_cell_size

        row = self._rows[min(self._turn, len(self._rows) - 1)]
        total = sum(row.duration for row in self._rows)
        head = f"{100 * sum(row.heard for row in self._rows) / total:3.0f} % " if total else ""
        if len(self._rows) > 1:
            head += f"{os.path.basename(row.name)}: "
        room, text = width - cell_len(head), row.text
        if cell_len(text) > room:  # the newest words matter most
            text = text[-max(room, 1) :]
            while cell_len(text) >= room and text:
                text = text[1:]
            text = f"…{text}"
        line = "".join(c if c.isprintable() else "?" for c in head + text)
        return set_cell_size(line, width)


def _width() -> int:
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return (columns or 80) - 1  # text in the last column would wrap
