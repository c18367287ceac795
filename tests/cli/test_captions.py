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
import unicodedata
from collections.abc import Iterator

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
