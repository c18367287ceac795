"""Ctrl-C and SIGTERM: what was recognised is written, a second signal aborts, and there is never a traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import nemostream
from nemostream.clips import CLIP_TEXT

COMMAND = [sys.executable, "-m", "nemostream", "transcribe"]
CLIP, RATE = soundfile.read(nemostream.demo_clip(), dtype="int16")
SIGNALS = [signal.SIGINT, signal.SIGTERM]

# A command that sends itself a signal once more than five seconds of its input were decoded.
INTERRUPTED = """
import os, sys
from nemostream.cli.captions import Captions
from nemostream.cli.main import main
decoded, sent = Captions.heard, []
def heard(self, index, seconds):
    if seconds > 5 and not sent:
        sent.append(os.kill(os.getpid(), {number}))
    decoded(self, index, seconds)
Captions.heard = heard
main(["transcribe", *sys.argv[1:]])
"""


def not_ignored() -> None:
    """A shell's background jobs, these tests maybe among them, inherit an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, preexec_fn=not_ignored, env=os.environ | variables, timeout=300
    )


def interrupted(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return python(INTERRUPTED.format(number=int(number)), *arguments)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five minutes of speech."""
    path = tmp_path_factory.mktemp("long") / "long.flac"
    soundfile.write(path, np.tile(np.append(CLIP, np.zeros(RATE, np.int16)), 52), RATE)
    return path


@pytest.fixture(scope="module")
def whole(long: Path) -> nemostream.Result:
    with nemostream.load() as model:
        return model.transcribe(long)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_pipe(number: int) -> None:
    """All that was written into it before the signal is transcribed, though nobody closes it."""
    audio = np.append(CLIP, np.zeros(4 * RATE, np.int16))  # more than a pipe holds: once it is gone, some is read
    with nemostream.load() as model:
        wanted = model.transcribe(audio).text
    with subprocess.Popen(
        [*COMMAND, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=not_ignored
    ) as command:
        assert command.stdin and command.stdout and command.stderr
        command.stdin.write(audio.tobytes())
        command.stdin.flush()
        command.send_signal(number)
        assert command.wait(60) == 128 + number
        assert command.stdout.read().decode() == wanted + "\n"
        assert re.fullmatch(
            r"nemostream: interrupted after 8\.\d\d s; the text .* written\.\n", command.stderr.read().decode()
        )


def test_an_odd_byte_in_a_pipe() -> None:
    """A signal may come in the middle of a sample."""
    data = np.append(CLIP, np.zeros(4 * RATE, np.int16)).tobytes() + b"\x01"
    with subprocess.Popen(
        [*COMMAND, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=not_ignored
    ) as command:
        assert command.stdin and command.stdout
        command.stdin.write(data)
        command.stdin.flush()
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
        assert b"busy message" in command.stdout.read()


@pytest.mark.parametrize(
    "options", [(), ("--endpoint-ms", "400"), ("--realtime",)], ids=["whole", "utterances", "paced"]
)
def test_a_long_file(long: Path, whole: nemostream.Result, options: tuple[str, ...]) -> None:
    done = interrupted(signal.SIGTERM, long, "--format", "json", *options)
    assert done.returncode == 143, done.stderr
    row = json.loads(done.stdout)
    assert 5 < row["duration"] < whole.duration - 10
    assert whole.text.startswith(row["text"][:-10]) and "pound key" in row["text"]  # the last word may be cut
    assert re.fullmatch(r"nemostream: interrupted after [\d.]+ s; the text up to there is written\.\n", done.stderr)


def test_the_state_is_saved(long: Path, whole: nemostream.Result, tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "out.txt"
    done = interrupted(signal.SIGINT, long, "--resume", state, "--out", out)
    assert done.returncode == 130 and state.exists()
    assert f"the state is saved in {state}, and the same command continues from it" in done.stderr
    assert 0 < len(out.read_text()) < len(whole.text)
    # Interrupted before the saved part of the recording was read again: the saved state stays.
    kept, saved_text = state.read_bytes(), out.read_text()
    at_once = INTERRUPTED.format(number=int(signal.SIGINT)).replace("heard", "begins").replace("seconds > 5", "True")
    done = python(at_once, long, "--resume", state, "--out", out)
    assert (done.returncode, state.read_bytes()) == (130, kept), done.stderr
    assert saved_text.startswith(out.read_text().rstrip("\n")[:-10]) and len(out.read_text()) > 20
    # And once more, further on.
    further = INTERRUPTED.format(number=int(signal.SIGINT)).replace("seconds > 5", "seconds > 60")
    done = python(further, long, "--resume", state, "--out", out)
    assert done.returncode == 130 and state.read_bytes() != kept
    done = subprocess.run([*COMMAND, long, "--resume", state, "--out", out], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.read_text() == whole.text + "\n"
    assert not state.exists()


def test_files_that_were_not_started(long: Path, whole: nemostream.Result) -> None:
    done = interrupted(signal.SIGINT, *[long] * 18)
    assert done.returncode == 130
    lines = done.stdout.splitlines()
    assert 0 < len(lines) <= 16
    assert all(0 < len(line) < len(whole.text) for line in lines)
    left_out = re.search(r"^nemostream: interrupted; (\d+) not transcribed\.$", done.stderr, re.MULTILINE)
    assert left_out and int(left_out[1]) >= 2
    assert done.stderr.count(f"{long}: interrupted") + int(left_out[1]) == 18


MICROPHONE = """
import contextlib, os, sys, types
import numpy, soundfile
import nemostream
from nemostream.cli.main import main
audio = soundfile.read(nemostream.demo_clip(), dtype="float32")[0]
class InputStream(contextlib.nullcontext):
    at = 0
    def read(self, frames):
        block = audio[self.at : self.at + frames]
        self.at += frames
        if not len(block):
            os.kill(os.getpid(), int(sys.argv[1]))
        return numpy.pad(block, (0, frames - len(block)))[:, None], False
sys.modules["sounddevice"] = types.SimpleNamespace(InputStream=lambda **given: InputStream(), PortAudioError=OSError)
main(["transcribe", "--mic"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_microphone(number: int, code: int) -> None:
    done = python(MICROPHONE, int(number))
    assert (done.returncode, done.stderr) == (code, "listening; Ctrl-C ends\n")
    assert done.stdout.strip() == CLIP_TEXT


def test_a_pipe_that_nobody_writes_into(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(
        [*COMMAND, fifo], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=not_ignored
    ) as command:
        writer = None
        while writer is None:
            try:
                writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)  # fails until the command has it open
            except OSError:
                assert command.poll() is None
                time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
        os.close(writer)
        assert command.stdout and command.stdout.read() == b""
        assert command.stderr and command.stderr.read() == b"nemostream: interrupted.\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_aborts(number: int) -> None:
    done = python(
        "import os\nfrom nemostream.cli.interrupt import finishing\n"
        f"with finishing() as stop:\n    os.kill(os.getpid(), {int(number)})\n    print(stop.is_set(), flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)})\n    print('not reached')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "True\n", "nemostream: aborted.\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_while_it_starts(number: int, tmp_path: Path) -> None:
    """While its libraries are imported, and while the model is loaded."""
    send = f"import os\nos.kill(os.getpid(), {int(number)})\n"
    (tmp_path / "typer.py").write_text(send)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for done in (
        python("from nemostream.__main__ import main\nmain()", PYTHONPATH=path),
        python(
            f"import nemostream, sys\nfrom nemostream.cli.main import main\ndef load(*given, **options):\n    {send!s}"
            "    raise AssertionError\n".replace("\nos.kill", "; os.kill")
            + "nemostream.load = load\nmain(['transcribe', sys.argv[1]])",
            nemostream.demo_clip(),
        ),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "nemostream: interrupted.\n")


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    done = python(
        "import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom nemostream.cli.interrupt import exiting\n"
        "with exiting():\n    os.kill(os.getpid(), signal.SIGINT)\n    print('on')"
    )
    assert (done.returncode, done.stdout) == (0, "on\n")
