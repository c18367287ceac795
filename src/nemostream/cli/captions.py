"""The last lines of a terminal while speech is decoded: how far it is and what was said so far, or live captions.

They go to standard error; `aside` takes them away while something else is printed. Where that is no terminal, progress
is not shown, and captions come line by line, each when it is full.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

_PAUSE = 0.05  # seconds between two drawings: more often nobody can read it
_PATIENCE = 2.0  # seconds of work before what is left can be told
_LINES = 2  # of live captions
_PLAIN_WIDTH = 79  # of a line that goes to a file


@dataclass
class _Row:
    name: str
    text: str = ""
    settled: int = 0  # characters of the text that will not change
    heard: float = 0.0
    duration: float | None = None  # None until it begins, 0 if nobody knows


class Captions:
    """One row per input, of which the first unfinished one is shown. Threads may share it.

    `live` shows two lines of words, as a television does: full lines roll up, and what may still change is dim.
    """

    def __init__(self, names: Sequence[str], live: bool = False) -> None:
        self._rows = [_Row(name) for name in names]
        self._turn = 0
        self._live = live
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._plain = live and (not terminal or os.environ.get("TERM") == "dumb")  # it cannot go up a line
        self._shown = (terminal or live) and sys.stderr is not None
        self._drawn = 0.0  # when
        self._height = 0  # lines that are drawn now
        self._top = 0  # where in the text the first line of live captions begins
        self._began: tuple[float, float] | None = None  # when, with how much heard
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

    def said(self, index: int, text: str, settled: int) -> None:
        """The text so far, of which so many characters will not change; shown with the next `heard`."""
        self._rows[index].text, self._rows[index].settled = text, settled

    def heard(self, index: int, seconds: float) -> None:
        """How much of the audio is decoded."""
        self._rows[index].heard = seconds
        if self._began is None:
            self._began = time.monotonic(), sum(row.heard for row in self._rows)
        self._draw()

    def afresh(self, index: int) -> None:
        """What was said was printed, and need not be shown any more."""
        row = self._rows[index]
        with self._lock:
            if self._plain and self._shown:
                self._roll(row, rest=True)
            row.text, row.settled, self._top = "", 0, 0

    def over(self, index: int) -> None:
        """Input `index` is done or has failed, and its result is about to be printed; the next one is on."""
        row = self._rows[index]
        row.heard = row.duration or 0.0
        row.settled = len(row.text)
        with self._lock:
            if self._plain and self._shown:
                self._roll(row, rest=True)
            self._turn, self._top = index + 1, 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The lines are empty meanwhile."""
        with self._lock:
            if self._height:
                blank = " " * _width()
                self._write(self._home() + "\n".join([blank] * self._height) + self._home())
                self._height = 0
            yield

    def _draw(self) -> None:
        with self._lock:
            if not self._shown or time.monotonic() - self._drawn < _PAUSE:
                return
            row = self._rows[min(self._turn, len(self._rows) - 1)]
            if self._plain:
                self._roll(row)
            else:
                lines = self._captions(row, _width()) if self._live else [self._status(row, _width())]
                self._write(self._home() + "\n".join(lines))
                self._height = len(lines)
            self._drawn = time.monotonic()

    def _home(self) -> str:
        """To the begin of the first line that is drawn."""
        return "\r" + "\x1b[A" * max(0, self._height - 1)

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    # -- live captions -------------------------------------------------------------------------------------------------

    def _captions(self, row: _Row, width: int) -> list[str]:
        from rich.cells import cell_len

        text, settled = _printable(row.text[self._top :]), row.settled - self._top
        bounds = _wrapped(text, width)[-_LINES:]
        lines = []
        for begin, end in bounds:
            firm = max(begin, min(settled, end))
            dim = f"\x1b[2m{text[firm:end]}\x1b[22m" if firm < end else ""
            # Spaces rub out what was there on every terminal.
            lines.append(text[begin:firm] + dim + " " * (width - cell_len(text[begin:end])))
        if bounds:
            self._top += bounds[0][0]  # what has rolled up is gone: lines do not break anew while they are read
        return lines + [" " * width] * (_LINES - len(lines))

    def _roll(self, row: _Row, rest: bool = False) -> None:
        """Write out the lines that are full, or all."""
        text = _printable(row.text[self._top : row.settled])
        bounds = _wrapped(text, _PLAIN_WIDTH)
        if not rest:
            del bounds[-1:]
        for begin, end in bounds:
            self._write(text[begin:end] + "\n")
        self._top += bounds[-1][1] if bounds else 0

    # -- progress ------------------------------------------------------------------------------------------------------

    def _status(self, row: _Row, width: int) -> str:
        from rich.cells import cell_len, set_cell_size

        head = self._progress()
        if len(self._rows) > 1:
            head += f"{os.path.basename(row.name)}: "
        room, text = width - cell_len(head), row.text[-width:]
        if len(text) < len(row.text) or cell_len(text) > room:  # the newest words matter most
            while cell_len(text) >= room and text:
                text = text[1:]
            text = f"…{text}"
        return set_cell_size(_printable(head + text), width)

    def _progress(self) -> str:
        """What part is done, and what time is left at the pace so far; a file not begun is as long as others."""
        known = [row.duration for row in self._rows if row.duration]
        if not known:
            return ""
        waiting = sum(row.duration is None for row in self._rows)
        total = sum(known) * (1 + waiting / len(known))
        heard = sum(row.heard for row in self._rows if row.duration)
        head = f"{100 * heard / total:3.0f} % "
        assert self._began is not None
        began, then = self._began
        passed = time.monotonic() - began
        if passed >= _PATIENCE and heard > then:
            left = round((total - heard) * passed / (heard - then))
            hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
            head += f"{hours}:{minutes:02}:{seconds:02} left " if hours else f"{minutes}:{seconds:02} left "
        return head


def _wrapped(text: str, width: int) -> list[tuple[int, int]]:
    """Where the lines of a text begin and end, broken between words; a word longer than a line is broken too."""
    from rich.cells import cell_len

    lines: list[tuple[int, int]] = []
    begin = end = 0
    for word in re.finditer(r"\S+", text):
        if end and cell_len(text[begin : word.end()]) > width:
            lines.append((begin, end))
            end = 0
        begin = begin if end else word.start()
        end = word.end()
        while cell_len(text[begin:end]) > width:
            cut = begin + 1
            while cell_len(text[begin : cut + 1]) <= width:
                cut += 1
            lines.append((begin, cut))
            begin = cut
    return [*lines, (begin, end)] if end else lines


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _width() -> int:
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return (columns or 80) - 1  # text in the last column would wrap
