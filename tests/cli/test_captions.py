"""Captions and progress on a pseudo terminal, read through the terminal emulator `pyte`."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyte
import pytest
import soundfile
import wcwidth
from hypothesis import given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.cli import captions
from nemostream.cli.captions import Captions

COMMAND = [sys.executable, "-m", "nemostream", "transcribe"]


class Screen(pyte.Screen):
    """A screen that records dim characters as italic, because pyte does not support dim. Italic is not used."""

    def select_graphic_rendition(self, *attributes: int, **kinds: object) -> None:
        for number in attributes or (0,):
            super().select_graphic_rendition({2: 3, 22: 23}.get(number, number))

    def draw(self, data: str) -> None:
        """Omit invisible characters that pyte does not support: it drops the text after them."""
        super().draw(without_marks(data))

    def text(self) -> list[str]:
        """Return the lines down to the last one that is not empty."""
        return "\n".join(line.rstrip() for line in self.display).rstrip().split("\n")

    def dim(self) -> str:
        """Return the dim characters of all lines, concatenated."""
        return "".join(
            self.buffer[row][column].data
            for row in range(self.lines)
            for column in range(self.columns)
            if self.buffer[row][column].italics
        ).strip()


def without_marks(text: str) -> str:
    return "".join(each for each in text if wcwidth.wcwidth(each) > 0)


class Terminal:
    def __init__(self, columns: int = 80, lines: int = 8) -> None:
        self.controller, self.tty = pty.openpty()
        self.screen = Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.resize(columns)
        os.write(self.tty, b"$ nemostream\n")

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.tty, termios.TIOCSWINSZ, struct.pack("HHHH", self.screen.lines, columns, 0, 0))
        self.screen.resize(columns=columns)

    def read(self) -> bool:
        """Process the available output. Return False if the other end is closed."""
        with contextlib.suppress(OSError):  # raised by Linux if the other end is closed
            if data := os.read(self.controller, 65536):
                self._stream.feed(data)
                return True
        return False

    def read_all(self, seconds: float = 0.05) -> None:
        """Process output until none has arrived for `seconds`."""
        while select.select([self.controller], [], [], seconds)[0] and self.read():
            pass

    def close(self) -> None:
        for descriptor in (self.controller, self.tty):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def run_in_terminal(
    terminal: Terminal, *arguments: object, stdout: bool = False
) -> tuple[list[list[str]], list[str], str]:
    """Run the command. Return the screen and its dim text after each redraw, and standard output."""
    command = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=terminal.tty if stdout else subprocess.PIPE,
        stderr=terminal.tty,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal.tty)
    frames, dim = [], []
    while terminal.read():
        frames.append(terminal.screen.text())
        dim.append(terminal.screen.dim())
    out, _ = command.communicate()
    assert command.returncode == 0
    return frames, dim, (out or b"").decode()


@pytest.fixture(scope="module")
def text() -> str:
    with nemostream.load() as model:
        return model.transcribe(nemostream.demo_clip()).text


# -- the command -------------------------------------------------------------------------------------------------------


def test_progress_with_output_to_a_pipe(terminal: Terminal, text: str) -> None:
    frames, _, out = run_in_terminal(terminal, nemostream.demo_clip(), "--realtime")
    assert out == text + "\n"
    shown = [frame[1] for frame in frames if len(frame) > 1]
    assert all(len(frame) <= 2 for frame in frames)
    found = [re.fullmatch(r" *\d+ %(?: \d:\d\d left)? ?…?(.*)", line) for line in shown]
    assert all(match and text.startswith(match[1].strip()) for match in found), shown
    assert any(match and len(match[1].split()) > 2 for match in found)
    shares = [int(line.split("%")[0]) for line in shown]
    assert shares == sorted(shares) and shares[-1] > 60
    assert terminal.screen.text() == ["$ nemostream"]  # the progress line is removed at the end
    assert (terminal.screen.cursor.y, terminal.screen.cursor.x) == (1, 0)


def test_live_captions(terminal: Terminal, text: str) -> None:
    frames, dim, out = run_in_terminal(terminal, nemostream.demo_clip(), "--realtime", "--live", "--chunk-ms", 80)
    assert out == text + "\n"
    shown = [" ".join(frame[1:]) for frame in frames if len(frame) > 1]
    assert all(text.startswith(line) for line in shown), shown
    assert len(set(shown)) > 5
    # Only the last word may change; only that word is dim.
    changing = [
        (line.split()[-1], part) for line, part in zip((" ".join(f[1:]) for f in frames), dim, strict=True) if part
    ]
    assert len(changing) > 3 and all(last == part for last, part in changing)
    assert (terminal.screen.text(), terminal.screen.dim()) == (["$ nemostream"], "")


def test_captions_wrap_between_words(text: str) -> None:
    terminal = Terminal(columns=16)
    frames, _, _ = run_in_terminal(terminal, nemostream.demo_clip(), "--realtime", "--live", "--chunk-ms", 80)
    terminal.close()
    lines = [line for frame in frames for line in frame[1:]]
    assert {len(frame) for frame in frames} >= {2, 3}
    assert max(len(frame) for frame in frames) == 3  # the prompt and two lines
    full = textwrap.wrap(text, 15)
    assert len(full) > 2 and all(line in lines for line in full[:-1])  # the last line may be complete only at the end
    assert all(line == "" or f" {text}".find(f" {line}") >= 0 for line in lines)
    assert terminal.screen.text() == ["$ nemostream"]


def test_result_replaces_captions(terminal: Terminal, text: str) -> None:
    """Standard output and standard error are the same terminal."""
    run_in_terminal(terminal, nemostream.demo_clip(), "--realtime", "--live", stdout=True)
    assert terminal.screen.text() == ["$ nemostream", text]


@pytest.mark.parametrize("dumb", [False, True])
def test_captions_without_cursor_movement(text: str, dumb: bool) -> None:
    terminal = Terminal()
    environment = os.environ | {"TERM": "dumb"}
    command = [*COMMAND, nemostream.demo_clip(), "--realtime", "--live"]
    if dumb:
        done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal.tty, env=environment)
        os.close(terminal.tty)
        err = b""
        with contextlib.suppress(OSError):
            while data := os.read(terminal.controller, 4096):
                err += data
        out, _ = done.communicate()
        shown = err.decode().replace("\r\n", "\n").removeprefix("$ nemostream\n")
    else:
        completed = subprocess.run(command, capture_output=True)
        out, shown = completed.stdout, completed.stderr.decode()
    terminal.close()
    assert (out.decode(), shown) == (text + "\n", text + "\n")


def test_live_on_standard_input(terminal: Terminal, text: str) -> None:
    """The second half is sent after the captions of the first half have appeared."""
    pcm, rate = soundfile.read(nemostream.demo_clip(), dtype="int16")
    assert rate == 16000
    with subprocess.Popen(
        [*COMMAND, "-", "--live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal.tty
    ) as command:
        os.close(terminal.tty)
        assert command.stdin and command.stdout
        command.stdin.write(pcm[: len(pcm) // 2].tobytes())
        command.stdin.flush()
        while len(terminal.screen.text()) < 2 and terminal.read():
            pass
        half = " ".join(terminal.screen.text()[1:])
        assert half.split() and text.startswith(half) and half != text
        command.stdin.write(pcm[len(pcm) // 2 :].tobytes())
        command.stdin.close()
        while terminal.read():
            pass
        assert command.stdout.read().decode() == text + "\n"
    assert terminal.screen.text() == ["$ nemostream"]


def test_utterances_replace_their_captions(terminal: Terminal) -> None:
    """Two utterances separated by silence; standard output and standard error are the same terminal."""
    pcm, rate = soundfile.read(nemostream.demo_clip(), dtype="int16")
    audio = np.concatenate([pcm, np.zeros(2 * rate, np.int16), pcm])
    with nemostream.load() as model:
        finals = [event.text for event in model.listen(audio) if event.kind == "final"]
    assert len(finals) == 2
    with subprocess.Popen(
        [*COMMAND, "-", "--live", "--endpoint-ms", "800"],
        stdin=subprocess.PIPE,
        stdout=terminal.tty,
        stderr=terminal.tty,
        env=os.environ | {"TERM": "xterm"},
    ) as command:
        os.close(terminal.tty)
        assert command.stdin
        command.stdin.write(audio.tobytes())
        command.stdin.close()
        while terminal.read():
            pass
    assert terminal.screen.text() == ["$ nemostream", *finals]


# -- the class ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def captions_on(terminal: Terminal, live: bool, names: tuple[str, ...] = ("a",)) -> Iterator[Captions]:
    """Captions in this process, redrawn at every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.TextIOWrapper(os.fdopen(os.dup(terminal.tty), "wb", 0), write_through=True))
        patch.setattr(captions, "_REDRAW_SECONDS", 0.0)
        patch.setenv("TERM", "xterm")
        with Captions(names, live) as shown:
            yield shown
        sys.stderr.close()


WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=14), min_size=1, max_size=30)


@settings(max_examples=25, deadline=None)
@given(WORDS, st.integers(15, 60))
def test_two_lines_of_any_text(words: list[str], columns: int) -> None:
    """The last two lines are those of `textwrap`, for any growth of the text."""
    text, terminal = " ".join(words), Terminal(columns)
    with captions_on(terminal, live=True) as shown:
        for end in range(1, len(text) + 1):
            shown.set_text(0, text[:end], text[:end].rfind(" ") + 1)
            shown.set_progress(0, 0.0)
            terminal.read_all(0)  # keeps the pseudo terminal's buffer from filling up
        terminal.read_all()
        assert terminal.screen.text()[1:] == textwrap.wrap(text, columns - 1)[-2:]
        shown.finish(0)
    terminal.read_all()
    assert terminal.screen.text() == ["$ nemostream"]
    terminal.close()


def test_a_word_longer_than_the_screen() -> None:
    terminal = Terminal(columns=11)
    with captions_on(terminal, live=True) as shown:
        shown.set_text(0, "a " + "0123456789" * 2 + "x", 0)
        shown.set_progress(0, 0.0)
        terminal.read_all()
        assert terminal.screen.text()[-2:] == ["0123456789", "x"]
    terminal.close()


def test_wide_characters_and_control_characters() -> None:
    terminal = Terminal(columns=13)  # twelve cells, six of these characters
    with captions_on(terminal, live=True) as shown:
        shown.set_text(0, "東京大阪京都神戸 \x1b[2Jab", 0)
        shown.set_progress(0, 0.0)
        terminal.read_all()
        assert [line.replace(" ", "") for line in terminal.screen.text()[1:]] == ["東京大阪京都", "神戸?[2Jab"]
    terminal.close()


SCRIPTS = {
    "我们今天去公园（明天去商场），好吗？": ["我们今天去公", "园（明天去商", "场），好吗？"],  # 12 columns
    "「今日は」と言って、雨でした。": ["「今日は」と", "言って、雨で", "した。"],
    "น้ำแข็งกี่ก้อนก็ได้ที่นี่": ["น้ำแข็งกี่ก้อนก็ได้", "ที่นี่"],
    "مرحبا بكم في بيتي، كيف حالكم؟": ["مرحبا بكم في", "بيتي، كيف", "حالكم؟"],
    "می\u200cخواهم این کتاب را": ["می\u200cخواهم این", "کتاب را"],
    "वह घर की ओर जाता है": ["वह घर की ओर", "जाता है"],
}


@pytest.mark.parametrize("text", SCRIPTS)
def test_captions_in_all_scripts(text: str) -> None:
    """Lines break between words, never before closing punctuation, and nothing of earlier captions remains."""
    lines, terminal = SCRIPTS[text], Terminal(columns=13)
    with captions_on(terminal, live=True) as shown:
        for end in range(1, len(text) + 1):
            shown.set_text(0, text[:end], 0)
            shown.set_progress(0, 0.0)
            terminal.read_all(0)
        terminal.read_all()
        # The emulator leaves an empty cell after a wide character.
        assert ["".join(line.split(" ")) for line in terminal.screen.text()[1:]] == [
            without_marks("".join(line.split(" "))) for line in lines[-2:]
        ]
        shown.finish(0)
    terminal.read_all()
    assert terminal.screen.text() == ["$ nemostream"]
    terminal.close()


@pytest.mark.parametrize("text", ["今天天气很好我们去公园", "น้ำแข็งกี่ก้อนก็ได้ที่นี่", "مرحبا بكم في بيتي"])
def test_progress_line_of_all_scripts_has_the_width_of_the_terminal(text: str) -> None:
    row = captions._Row("a.wav", text, processed=1.0, duration=2.0)
    shown = Captions(["a.wav", "b.wav"])
    shown._started = 0.0, 0.0
    for width in range(24, 60):
        line = shown._status_line(row, width)
        assert wcwidth.wcswidth(line) == width
        _, _, end = line.rstrip().rpartition("…")
        assert text.endswith(end.rpartition("a.wav: ")[2]) and not unicodedata.combining(end[0])


def test_printed_utterances_are_removed(terminal: Terminal) -> None:
    """The caption disappears when its text has been printed to the same terminal."""
    with captions_on(terminal, live=True) as shown:
        for text in ("one two", "three"):
            shown.set_text(0, text, len(text))
            shown.set_progress(0, 0.0)
            terminal.read_all()
            assert terminal.screen.text()[-1] == text
            with shown.hidden():
                os.write(terminal.tty, f"{text}.\n".encode())
            shown.clear_text(0)
        shown.set_text(0, "four", 0)
        shown.set_progress(0, 0.0)
        terminal.read_all()
        assert terminal.screen.text() == ["$ nemostream", "one two.", "three.", "four"]
        shown.finish(0)
    terminal.read_all()
    assert terminal.screen.text() == ["$ nemostream", "one two.", "three."]


def test_resized_terminal() -> None:
    terminal = Terminal(columns=40)
    text = "one two three four five six seven eight nine ten eleven twelve"
    with captions_on(terminal, live=True) as shown:
        for columns, end in ((40, 30), (20, 45), (60, len(text))):
            terminal.resize(columns)
            shown.set_text(0, text[:end], 0)
            shown.set_progress(0, 0.0)
            terminal.read_all()
            *_, last = terminal.screen.text()
            assert text[:end].rstrip().endswith(last.strip()) and len(last) < columns
        shown.finish(0)
    terminal.read_all()
    assert terminal.screen.text()[0] == "$ nemostream"
    terminal.close()


def test_time_left(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of 100 s: 20 s took 10 s, so the remaining 180 s take 90 s."""
    now = [1000.0]
    monkeypatch.setattr(captions.time, "monotonic", lambda: now[0])
    with captions_on(terminal, live=False, names=("x/a.wav", "b.wav")) as shown:
        shown.start(0, 100.0)
        shown.set_progress(0, 0.0)
        terminal.read_all()
        assert terminal.screen.text()[1] == "  0 % a.wav:"
        now[0] += 10
        shown.set_text(0, "hello", 5)
        shown.set_progress(0, 20.0)
        terminal.read_all()
        assert terminal.screen.text()[1] == " 10 % 1:30 left a.wav: hello"  # the other file counts as equally long
        shown.start(1, 7100.0)
        shown.set_progress(0, 20.0)
        terminal.read_all()
        assert terminal.screen.text()[1] == "  0 % 59:50 left a.wav: hello"
        shown.finish(0)  # failed: no time left for it
        shown.set_progress(1, 0.0)
        terminal.read_all()
        assert terminal.screen.text()[1].startswith("  1 % 11:50 left b.wav:")
    terminal.read_all()
    assert terminal.screen.text() == ["$ nemostream"]


def test_no_output_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Captions(["a"]) as shown:
        shown.start(0, 1.0)
        shown.set_text(0, "one", 3)
        shown.set_progress(0, np.float64(0.5))
        shown.finish(0)
    assert capfd.readouterr().err == ""


# -- what is written, with a controlled clock --------------------------------------------------------------------------


class StandardError(io.StringIO):
    """Standard error of 80 columns."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def fileno(self) -> int:
        raise OSError

    def take(self) -> str:
        """Return what was written since the last call."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


Writing = Callable[..., contextlib.AbstractContextManager[tuple[Captions, StandardError, Any]]]


@pytest.fixture
def writing(clock: Any) -> Writing:
    """Return captions, standard error and the clock, which runs on from one call to the next."""

    @contextlib.contextmanager
    def call(
        *names: str, live: bool = False, terminal: bool = True, kind: str = "xterm"
    ) -> Iterator[tuple[Captions, StandardError, Any]]:
        with pytest.MonkeyPatch.context() as patch:
            err = StandardError(terminal)
            patch.setattr(sys, "stderr", err)
            patch.setattr(captions, "time", clock)
            patch.setenv("TERM", kind)
            with Captions(names or ("a.wav",), live) as shown:
                yield shown, err, clock

    return call


def line(text: str) -> str:
    """One line that is drawn over the previous one."""
    return "\r" + text.ljust(79)


def test_lines_are_redrawn_at_most_every_50_ms(writing: Writing) -> None:
    with writing() as (shown, err, clock):
        shown.start(0, 10.0)
        shown.set_progress(0, 1.0)
        assert err.take() == line(" 10 % ")
        for seconds, drawn in ((0.04, False), (0.009, False), (0.0015, True), (0.049, False), (0.002, True)):
            clock.now += seconds
            shown.set_progress(0, 2.0)
            assert err.take() == (line(" 20 % ") if drawn else "")


def test_nothing_is_drawn_after_the_end(writing: Writing) -> None:
    """A thread that still decodes would draw over the shell's prompt."""
    for live, count in ((False, 1), (True, 2)):
        with writing(live=live) as (shown, err, clock):
            shown.start(0, 10.0)
            shown.set_text(0, "one", 3)
            shown.set_progress(0, 1.0)
            up = "\r" + "\x1b[A" * (count - 1)
            assert err.take().startswith("\r")
            with shown:
                pass
            assert err.take() == up + "\n".join([" " * 79] * count) + up
            clock.now += 9
            shown.set_progress(0, 2.0)
            shown.set_text(0, "one two", 7)
            shown.set_progress(0, 3.0)
            shown.finish(0)
            assert err.take() == ""
    with writing(live=True, terminal=False) as (shown, err, clock):
        shown.set_text(0, "one", 3)
        with shown:
            pass
        shown.set_progress(0, 3.0)
        shown.clear_text(0)
        shown.set_text(0, "two", 3)
        shown.finish(0)
        assert err.take() == ""


def test_nothing_is_drawn_while_something_else_is_printed(writing: Writing) -> None:
    with writing() as (shown, err, clock):
        shown.start(0, 10.0)
        shown.set_progress(0, 1.0)
        clock.now += 1
        err.take()
        done = threading.Event()
        thread = threading.Thread(target=lambda: (shown.set_progress(0, 5.0), done.set()))
        with shown.hidden():
            assert err.take() == "\r" + " " * 79 + "\r"
            thread.start()
            assert not done.wait(0.1) and err.take() == ""
        thread.join(60)
        assert err.take() == line(" 50 % ")
        with shown.hidden():
            err.take()
        with shown.hidden():
            assert err.take() == ""  # there is nothing to remove


@pytest.mark.parametrize("method", ["set_progress", "clear_text", "finish"])
def test_no_line_is_printed_while_something_else_is_printed(writing: Writing, method: str) -> None:
    words = " ".join(["word"] * 20)
    with writing("a", "b", live=True, terminal=False) as (shown, err, _):
        shown.set_text(0, words, len(words))
        done = threading.Event()

        def work() -> None:
            getattr(shown, method)(0, *([1.0] if method == "set_progress" else []))
            done.set()

        thread = threading.Thread(target=work, daemon=True)
        with shown.hidden():
            thread.start()
            assert not done.wait(0.1) and err.take() == ""
        thread.join(60)
        lines = textwrap.wrap(words, 79)
        assert err.take() == "".join(f"{one}\n" for one in (lines[:-1] if method == "set_progress" else lines))


@pytest.mark.parametrize(
    ("steps", "shown_line"),
    [
        ([(0, 0, 0.0), (1.99, 0, 50.0)], " 50 % "),  # too early for an estimate
        ([(0, 0, 0.0), (2.0, 0, 50.0)], " 50 % 0:02 left "),
        ([(0, 0, 50.0), (10, 0, 60.0)], " 60 % 0:40 left "),  # what was resumed took no time
        ([(0, 0, 50.0), (10, 0, 50.0)], " 50 % "),
        ([(0, 0, 0.0), (61, 0, 1.0)], "  1 % 1:40:39 left "),
        ([(0, 0, 0.0), (37, 0, 1.0)], "  1 % 1:01:03 left "),
        ([(0, 0, 0.0), (36, 0, 1.0)], "  1 % 59:24 left "),
        ([(0, 0, 0.0), (3, 0, 99.6)], "100 % 0:00 left "),
        ([(0, 0, 0.0), (5, 0, 20.0), (5, 0, 50.0)], " 50 % 0:10 left "),
    ],
)
def test_share_and_time_left(writing: Writing, steps: list[tuple[float, int, float]], shown_line: str) -> None:
    with writing() as (shown, err, clock):
        shown.start(0, 100.0)
        for seconds, index, processed in steps:
            clock.now += seconds
            err.take()
            shown.set_progress(index, processed)
        assert err.take() == line(shown_line)


def test_inputs_of_unknown_length_do_not_count(writing: Writing) -> None:
    """Neither in the total nor in what is processed; those that have not started count as the mean of the others."""
    with writing("a", "b", "c/d.wav", "e") as (shown, err, clock):
        shown.start(0, 0.0)
        shown.set_text(0, "live", 2)
        shown.set_progress(0, 7.0)
        assert err.take() == line("a: live")
        shown.start(1, 30.0)
        shown.start(2, 10.0)
        clock.now += 1
        shown.set_progress(1, 6.0)
        assert err.take() == line(" 10 % a: live")  # of 30 + 10 + 20 seconds
        shown.finish(0)
        clock.now += 1
        shown.set_progress(2, 3.0)
        assert err.take() == line(" 15 % 0:11 left b: ")  # 9 seconds took 2, and 51 are left
        shown.finish(1)
        clock.now += 0.1
        shown.set_progress(3, 0.0)
        assert err.take().startswith("\r 55 % ")
        for index in (2, 3):
            shown.finish(index)
        clock.now += 1
        shown.set_progress(3, 0.0)
        assert err.take().rstrip().endswith("e:")  # the last one stays


def test_newest_words_are_shown_if_the_line_is_too_short(writing: Writing) -> None:
    text = " ".join(str(number) for number in range(100, 150))
    with writing() as (shown, err, clock):
        shown.start(0, 10.0)
        for size in (73, 74, 75, 199):
            shown.set_text(0, text[:size], 0)
            clock.now += 1 / 16
            shown.set_progress(0, 1.0)
            visible = text[:size] if size <= 73 else "…" + text[size - 72 : size]
            assert err.take() == line(f" 10 % {visible}")
    with writing("a" * 100, "b") as (shown, err, clock):  # a name that is longer than the line
        shown.set_progress(0, 1.0)
        assert err.take() == line("a" * 79)


def test_lines_that_scrolled_off_do_not_return(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wider terminal shows the text from the first visible line on."""
    with writing(live=True) as (shown, err, clock):
        shown.set_text(0, "aaaa bbbb cccc dddd eeee", 24)
        for width, first, second in ((9, "cccc dddd", "eeee"), (40, "cccc dddd eeee", ""), (9, "cccc dddd", "eeee")):
            monkeypatch.setattr(captions, "_width", lambda width=width: width)
            clock.now += 1
            err.take()
            shown.set_progress(0, 1.0)
            assert err.take().rpartition("\r")[2].removeprefix("\x1b[A") == f"{first:{width}}\n{second:{width}}"


def test_lines_that_may_still_change_do_not_scroll_off(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are those of the last text, whatever was shown before."""
    monkeypatch.setattr(captions, "_width", lambda: 9)
    with writing(live=True) as (shown, err, clock):
        for text, stable, first, second in (
            ("aaaa bbbb cccc dddd eeee ffff", 4, "cccc dddd", "eeee ffff"),
            ("aaaa bb", 4, "aaaa bb", ""),
            ("aaaa bb ccc dddd eeee ff", 16, "ccc dddd", "eeee ff"),
            ("aaaa bb ccc dddd", 16, "ccc dddd", ""),
        ):
            shown.set_text(0, text, stable)
            clock.now += 1
            err.take()
            shown.set_progress(0, 1.0)
            drawn = re.sub(r"\x1b\[\d*m", "", err.take()).rpartition("\r")[2].removeprefix("\x1b[A")
            assert drawn == f"{first:9}\n{second:9}"


def test_captions_of_a_file_are_printed_when_a_line_is_full(writing: Writing) -> None:
    """Only what cannot change any more; the rest at the end of the input, or when the utterance is printed."""
    text = " ".join(f"word{number * 7919}" for number in range(40))
    lines = textwrap.wrap(text, 79)
    for end in ("finish", "clear"):
        with writing("a", "b", live=True, terminal=False) as (shown, err, clock):
            printed = ""
            for size in range(0, len(text) + 1, 3):
                stable = max(0, text[:size].rfind(" "))
                shown.set_text(0, text[:size], stable)
                clock.now += 1
                shown.set_progress(0, 1.0)
                printed += err.take()
                assert printed == "".join(f"{one}\n" for one in textwrap.wrap(text[:stable], 79)[:-1])
            shown.set_text(0, text, len(text) if end == "clear" else 0)
            if end == "clear":
                shown.clear_text(0)
            else:
                shown.finish(0)
            assert printed + err.take() == "".join(f"{one}\n" for one in lines)
            index = int(end == "finish")  # the next utterance, or the next input
            shown.set_text(index, "next one", 8)
            clock.now += 1
            shown.set_progress(index, 2.0)
            assert err.take() == ""
            shown.finish(index)
            assert err.take() == "next one\n"


def test_which_standard_errors_show_captions(writing: Writing) -> None:
    for live, terminal, kind, expected in (
        (False, False, "xterm", ""),
        (True, False, "xterm", "one\n"),
        (True, True, "dumb", "one\n"),
        (False, True, "dumb", line("one")),
        (False, True, "xterm", line("one")),
        (True, True, "xterm", "\rone" + " " * 76 + "\n" + " " * 79),
    ):
        with writing(live=live, terminal=terminal, kind=kind) as (shown, err, _):
            shown.set_text(0, "one", 3)
            shown.set_progress(0, 1.0)
            found = err.take()
            if expected == "one\n":
                assert found == ""
                shown.finish(0)
                found = err.take()
            assert found == expected, (live, terminal, kind)


def test_closed_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    for live in (False, True):
        with Captions(["a"], live) as shown:
            shown.start(0, 1.0)
            shown.set_text(0, "one", 3)
            shown.set_progress(0, 1.0)
            shown.clear_text(0)
            with shown.hidden():
                pass
            shown.finish(0)
