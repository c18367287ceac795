"""Ctrl-C and SIGTERM: the text so far is written, a second signal aborts, and no traceback is printed."""

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

# A command that sends itself a signal after five seconds of its input have been decoded.
INTERRUPTED = """
import os, sys
from nemostream.cli.captions import Captions
from nemostream.cli.main import main
set_progress, sent = Captions.set_progress, []
def interrupt(self, index, seconds):
    if seconds > 5 and not sent:
        sent.append(os.kill(os.getpid(), {number}))
    set_progress(self, index, seconds)
Captions.set_progress = interrupt
main(["transcribe", *sys.argv[1:]])
"""


def restore_sigint() -> None:
    """Undo an ignored SIGINT, which these tests inherit as a background job of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_python(code: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, preexec_fn=restore_sigint, env=os.environ | variables, timeout=300
    )


def run_interrupted(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(INTERRUPTED.format(number=int(number)), *arguments)


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five minutes of speech."""
    path = tmp_path_factory.mktemp("long") / "long.flac"
    soundfile.write(path, np.tile(np.append(CLIP, np.zeros(RATE, np.int16)), 52), RATE)
    return path


@pytest.fixture(scope="module")
def uninterrupted(long_file: Path) -> nemostream.Result:
    with nemostream.load() as model:
        return model.transcribe(long_file)


@pytest.mark.parametrize("number", SIGNALS)
def test_pipe(number: int) -> None:
    """Everything written before the signal is transcribed, although the pipe stays open."""
    audio = np.append(
        CLIP, np.zeros(4 * RATE, np.int16)
    )  # more than a pipe holds: once written, part of it has been read
    with nemostream.load() as model:
        expected = model.transcribe(audio).text
    with subprocess.Popen(
        [*COMMAND, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=restore_sigint,
    ) as command:
        assert command.stdin and command.stdout and command.stderr
        command.stdin.write(audio.tobytes())
        command.stdin.flush()
        command.send_signal(number)
        assert command.wait(60) == 128 + number
        assert command.stdout.read().decode() == expected + "\n"
        assert re.fullmatch(
            r"nemostream: interrupted after 8\.\d\d s; the text .* written\.\n", command.stderr.read().decode()
        )


def test_pipe_with_half_a_sample() -> None:
    """The signal arrives in the middle of a sample."""
    data = np.append(CLIP, np.zeros(4 * RATE, np.int16)).tobytes() + b"\x01"
    with subprocess.Popen(
        [*COMMAND, "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=restore_sigint,
    ) as command:
        assert command.stdin and command.stdout
        command.stdin.write(data)
        command.stdin.flush()
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
        assert b"busy message" in command.stdout.read()


@pytest.mark.parametrize(
    "options", [(), ("--endpoint-ms", "400"), ("--realtime",)], ids=["whole", "utterances", "realtime"]
)
def test_long_file(long_file: Path, uninterrupted: nemostream.Result, options: tuple[str, ...]) -> None:
    done = run_interrupted(signal.SIGTERM, long_file, "--format", "json", *options)
    assert done.returncode == 143, done.stderr
    row = json.loads(done.stdout)
    assert 5 < row["duration"] < uninterrupted.duration - 10
    assert (
        uninterrupted.text.startswith(row["text"][:-10]) and "pound key" in row["text"]
    )  # the last word may be truncated
    assert re.fullmatch(r"nemostream: interrupted after [\d.]+ s; the text up to there is written\.\n", done.stderr)


def test_state_is_saved(long_file: Path, uninterrupted: nemostream.Result, tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "out.txt"
    done = run_interrupted(signal.SIGINT, long_file, "--resume", state, "--out", out)
    assert done.returncode == 130 and state.exists()
    assert f"the state is saved in {state}, and the same command continues from it" in done.stderr
    assert 0 < len(out.read_text()) < len(uninterrupted.text)
    # Interrupted before the saved part of the recording has been read again: the saved state stays.
    saved_state, saved_text = state.read_bytes(), out.read_text()
    at_once = (
        INTERRUPTED.format(number=int(signal.SIGINT)).replace("set_progress", "start").replace("seconds > 5", "True")
    )
    done = run_python(at_once, long_file, "--resume", state, "--out", out)
    assert (done.returncode, state.read_bytes()) == (130, saved_state), done.stderr
    assert saved_text.startswith(out.read_text().rstrip("\n")[:-10]) and len(out.read_text()) > 20
    # Interrupted again at a later position.
    later = INTERRUPTED.format(number=int(signal.SIGINT)).replace("seconds > 5", "seconds > 60")
    done = run_python(later, long_file, "--resume", state, "--out", out)
    assert done.returncode == 130 and state.read_bytes() != saved_state
    done = subprocess.run([*COMMAND, long_file, "--resume", state, "--out", out], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert out.read_text() == uninterrupted.text + "\n"
    assert not state.exists()


def test_files_that_were_not_started(long_file: Path, uninterrupted: nemostream.Result) -> None:
    done = run_interrupted(signal.SIGINT, *[long_file] * 18)
    assert done.returncode == 130
    lines = done.stdout.splitlines()
    assert 0 < len(lines) <= 16
    assert all(0 < len(line) < len(uninterrupted.text) for line in lines)
    not_started = re.search(r"^nemostream: interrupted; (\d+) not transcribed\.$", done.stderr, re.MULTILINE)
    assert not_started and int(not_started[1]) >= 2
    assert done.stderr.count(f"{long_file}: interrupted") + int(not_started[1]) == 18


MICROPHONE = """
import contextlib, os, sys, types
import numpy, soundfile
import nemostream
from nemostream.cli.main import main
audio = soundfile.read(nemostream.demo_clip(), dtype="float32")[0]
class InputStream(contextlib.nullcontext):
    position = 0
    def read(self, frames):
        block = audio[self.position : self.position + frames]
        self.position += frames
        if not len(block):
            os.kill(os.getpid(), int(sys.argv[1]))
        return numpy.pad(block, (0, frames - len(block)))[:, None], False
sys.modules["sounddevice"] = types.SimpleNamespace(InputStream=lambda **options: InputStream(), PortAudioError=OSError)
main(["transcribe", "--mic"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_microphone(number: int, code: int) -> None:
    done = run_python(MICROPHONE, int(number))
    assert (done.returncode, done.stderr) == (code, "listening; press Ctrl-C to stop\n")
    assert done.stdout.strip() == CLIP_TEXT


def test_pipe_without_a_writer(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(
        [*COMMAND, fifo], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore_sigint
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
    done = run_python(
        "import os\nfrom nemostream.cli.interrupt import signals_stop\n"
        f"with signals_stop() as stop:\n    os.kill(os.getpid(), {int(number)})\n    print(stop.is_set(), flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)})\n    print('not reached')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "True\n", "nemostream: aborted.\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_during_startup(number: int, tmp_path: Path) -> None:
    """A signal while libraries are imported, and while the model is loaded."""
    send = f"import os\nos.kill(os.getpid(), {int(number)})\n"
    (tmp_path / "typer.py").write_text(send)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for done in (
        run_python("from nemostream.__main__ import main\nmain()", PYTHONPATH=path),
        run_python(
            "import nemostream, sys\nfrom nemostream.cli.main import main\n"
            f"def load(*arguments, **options):\n    {send!s}"
            "    raise AssertionError\n".replace("\nos.kill", "; os.kill")
            + "nemostream.load = load\nmain(['transcribe', sys.argv[1]])",
            nemostream.demo_clip(),
        ),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "nemostream: interrupted.\n")


def test_ignored_signal_stays_ignored() -> None:
    done = run_python(
        "import os, signal\nfrom nemostream.cli.interrupt import signals_exit\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with signals_exit():\n    os.kill(os.getpid(), signal.SIGINT)\n    print('on')"
    )
    assert (done.returncode, done.stdout) == (0, "on\n")
