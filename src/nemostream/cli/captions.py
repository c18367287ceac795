"""The last lines of a terminal during transcription: progress and the text so far, or live captions.

They are drawn on standard error; `hidden` removes them while something else is printed. If standard error is not a
terminal, progress is not shown and captions are printed line by line, each line once it is full.
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

from nemostream.runtime.text.scripts import columns, unbreakable_spans

_REDRAW_SECONDS = 0.05  # minimum time between two redraws
_MIN_ETA_SECONDS = 2.0  # minimum elapsed time before the remaining time is estimated
_CAPTION_LINES = 2
_JOINERS = "\u200b\u200c\u200d"  # invisible characters of Khmer, Persian and Hindi words
_FILE_WIDTH = 79  # columns of a line if standard error is not a terminal


@dataclass
class _Row:
    name: str
    text: str = ""
    stable: int = 0  # characters of the text that will not change
    processed: float = 0.0  # seconds
    duration: float | None = None  # seconds; None until the input starts, 0 if unknown


class Captions:
    """One row per input; the first unfinished input is shown. Thread-safe.

    With `live`, shows two lines of text in the way of television captions: full lines scroll up, and text that may
    still change is dim.
    """

    def __init__(self, names: Sequence[str], live: bool = False) -> None:
        self._rows = [_Row(name) for name in names]
        self._current = 0  # index of the row that is shown
        self._live = live
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._line_by_line = live and (not terminal or os.environ.get("TERM") == "dumb")  # no cursor movement
        self._enabled = (terminal or live) and sys.stderr is not None
        self._drawn_at = 0.0
        self._height = 0  # number of lines on the screen
        self._caption_start = 0  # offset in the text of the first caption line
        self._started: tuple[float, float] | None = None  # time and processed seconds at the first update
        self._lock = threading.Lock()

    def __enter__(self) -> Captions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.hidden():
            self._enabled = False  # a thread that still decodes must not draw over the shell's prompt

    def start(self, index: int, duration: float) -> None:
        """Set the duration of input `index` in seconds, 0 if unknown."""
        self._rows[index].duration = duration

    def set_text(self, index: int, text: str, stable: int) -> None:
        """Set the text so far; its first `stable` characters will not change. Drawn at the next `set_progress`."""
        self._rows[index].text, self._rows[index].stable = text, stable

    def set_progress(self, index: int, seconds: float) -> None:
        """Set the seconds of audio processed so far and redraw."""
        self._rows[index].processed = seconds
        if self._started is None:
            self._started = time.monotonic(), self._processed()
        self._draw()

    def clear_text(self, index: int) -> None:
        """Remove the text, because it has been printed to the output."""
        row = self._rows[index]
        with self._lock:
            if self._line_by_line and self._enabled:
                self._print_lines(row, all_lines=True)
            row.text, row.stable, self._caption_start = "", 0, 0

    def finish(self, index: int) -> None:
        """Mark input `index` as done or failed, before its result is printed, and show the next one."""
        row = self._rows[index]
        row.processed = row.duration or 0.0
        row.stable = len(row.text)
        with self._lock:
            if self._line_by_line and self._enabled:
                self._print_lines(row, all_lines=True)
            self._current, self._caption_start = index + 1, 0

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Clear the lines and draw nothing within the context."""
        with self._lock:
            if self._height:
                blank = " " * _width()
                self._write(self._home() + "\n".join([blank] * self._height) + self._home())
                self._height = 0
            yield

    def _draw(self) -> None:
        with self._lock:
            if not self._enabled or time.monotonic() - self._drawn_at < _REDRAW_SECONDS:
                return
            row = self._rows[min(self._current, len(self._rows) - 1)]
            if self._line_by_line:
                self._print_lines(row)
            else:
                lines = self._caption_lines(row, _width()) if self._live else [self._status_line(row, _width())]
                self._write(self._home() + "\n".join(lines))
                self._height = len(lines)
            self._drawn_at = time.monotonic()

    def _home(self) -> str:
        """Return the control codes that move the cursor to the start of the first drawn line."""
        return "\r" + "\x1b[A" * max(0, self._height - 1)

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    # -- live captions -------------------------------------------------------------------------------------------------

    def _caption_lines(self, row: _Row, width: int) -> list[str]:
        text, stable = _printable(row.text[self._caption_start :]), row.stable - self._caption_start
        wrapped = _wrap(text, width)
        bounds = wrapped[-_CAPTION_LINES:]
        lines = []
        for start, end in bounds:
            split = max(start, min(stable, end))
            dim = f"\x1b[2m{text[split:end]}\x1b[22m" if split < end else ""
            # Trailing spaces erase the previous text on every terminal.
            lines.append(text[start:split] + dim + " " * (width - columns(text[start:end])))
        # Drop lines that scrolled off, so that line breaks stay the same; not after text that may still change.
        self._caption_start += max((start for start, _ in wrapped[: 1 - _CAPTION_LINES] if start <= stable), default=0)
        return lines + [" " * width] * (_CAPTION_LINES - len(lines))

    def _print_lines(self, row: _Row, all_lines: bool = False) -> None:
        """Print the lines that are full, or all lines."""
        text = _printable(row.text[self._caption_start : row.stable])
        bounds = _wrap(text, _FILE_WIDTH)
        if not all_lines:
            del bounds[-1:]
        for start, end in bounds:
            self._write(text[start:end] + "\n")
        self._caption_start += bounds[-1][1] if bounds else 0

    # -- progress ------------------------------------------------------------------------------------------------------

    def _status_line(self, row: _Row, width: int) -> str:
        head = self._progress()
        if len(self._rows) > 1:
            head += f"{os.path.basename(row.name)}: "
        head = _printable(head)
        room, text = width - columns(head), _printable(row.text[-width:])
        if len(text) < len(row.text) or columns(text) > room:  # keep the newest words
            while columns(text) >= room and text:
                text = text[1:]
            text = text[_marks(text) :]
            text = f"…{text}"
        line = head + text
        while columns(line) > width:
            line = line[:-1]
        return line + " " * (width - columns(line))

    def _processed(self) -> float:
        """Return the seconds processed of all inputs whose duration is known."""
        return sum(row.processed for row in self._rows if row.duration)

    def _progress(self) -> str:
        """Return the processed share in percent and the estimated time left.

        Inputs that have not started count with the mean duration of the others.
        """
        durations = [row.duration for row in self._rows if row.duration]
        if not durations:
            return ""
        not_started = sum(row.duration is None for row in self._rows)
        total = sum(durations) * (1 + not_started / len(durations))
        processed = self._processed()
        head = f"{100 * processed / total:3.0f} % "
        assert self._started is not None
        start_time, start_processed = self._started
        elapsed = time.monotonic() - start_time
        if elapsed >= _MIN_ETA_SECONDS and processed > start_processed:
            left = round((total - processed) * elapsed / (processed - start_processed))
            hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
            head += f"{hours}:{minutes:02}:{seconds:02} left " if hours else f"{minutes}:{seconds:02} left "
        return head


def _wrap(text: str, width: int) -> list[tuple[int, int]]:
    """Return the start and end of every line, broken between words; a word longer than a line is broken too."""
    lines: list[tuple[int, int]] = []
    start = end = 0
    for word_start, word_end in unbreakable_spans(text):
        if end and columns(text[start:word_end]) > width:
            lines.append((start, end))
            end = 0
        start = start if end else word_start
        end = word_end
        while columns(text[start:end]) > width:
            cut = start + 1
            while columns(text[start : cut + 1]) <= width:
                cut += 1
            lines.append((start, cut))
            start = cut
    return [*lines, (start, end)] if end else lines


def _marks(text: str) -> int:
    """Return the number of combining marks at the start of a text, whose character has been cut off."""
    return next((index for index, character in enumerate(text) if columns(character)), len(text))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in _JOINERS else "?" for c in text)


def _width() -> int:
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    return (columns or 80) - 1  # text in the last column would wrap
