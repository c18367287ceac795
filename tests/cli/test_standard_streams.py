"""Standard streams, pipes and files in unusual states: closed, full, not UTF-8, unreadable, given twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import nemostream
from nemostream.clips import CLIP_TEXT
from nemostream.errors import AudioError
from nemostream.runtime.audio.files import AudioFile

COMMAND = [sys.executable, "-m", "nemostream", "transcribe"]
CLIP = str(nemostream.demo_clip())
Run = Callable[..., tuple[int, str, str]]


def close(*descriptors: int) -> Callable[[], None]:
    return lambda: [os.close(descriptor) for descriptor in descriptors] and None


# -- closed streams ----------------------------------------------------------------------------------------------------


def test_closed_standard_output(tmp_path: Path) -> None:
    """No traceback, and no message in the output file, which would otherwise become descriptor 1."""
    out = tmp_path / "out.txt"
    done = subprocess.run(
        [*COMMAND, CLIP, "missing.wav", "--out", out], preexec_fn=close(1), stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (3, "nemostream: missing.wav does not exist.\n")
    assert out.read_text() == f"{CLIP}: {CLIP_TEXT}\n"
    done = subprocess.run([*COMMAND, CLIP], preexec_fn=close(1), stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "nemostream: standard output is closed: give --out FILE.\n")


def test_all_streams_closed(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    arguments = [*COMMAND, CLIP, "missing.wav", "--out", str(out)]
    assert subprocess.run(arguments, preexec_fn=close(0, 1, 2)).returncode == 3
    assert out.read_text() == f"{CLIP}: {CLIP_TEXT}\n"


def test_closed_standard_error() -> None:
    """Messages do not go to standard output."""
    done = subprocess.run([*COMMAND, CLIP, "missing.wav"], preexec_fn=close(2), stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (3, f"{CLIP}: {CLIP_TEXT}\n")


def test_closed_standard_input() -> None:
    done = subprocess.run([*COMMAND, "-"], preexec_fn=close(0), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "standard input is closed" in done.stderr


@pytest.mark.parametrize("command", ["info", "doctor"])
def test_other_commands_with_closed_standard_output(command: str) -> None:
    done = subprocess.run([*COMMAND[:-1], command], preexec_fn=close(1), stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_standard_input_twice(run: Run) -> None:
    code, out, err = run("-", CLIP, "-")
    assert (code, out, err.count("\n")) == (2, "", 1) and "more than once" in err


# -- standard output ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "utf-8"])
def test_json_and_webvtt_ignore_the_locale(encoding: str, tmp_path: Path) -> None:
    """JSON is valid and WebVTT is UTF-8. The file name has one character in Latin-1 and one outside it."""
    name = str(tmp_path / "é😀.flac")
    shutil.copyfile(CLIP, name)
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*COMMAND, name, name, "--format", "json"], capture_output=True, env=environment)
    assert [json.loads(line)["file"] for line in done.stdout.splitlines()] == [name, name]
    done = subprocess.run([*COMMAND, name, "--format", "vtt"], capture_output=True, env=environment)
    assert done.stdout.decode("utf-8").startswith("WEBVTT\n\n00:00:00")
    done = subprocess.run([*COMMAND, CLIP, CLIP], capture_output=True, env=environment)
    assert done.stdout.decode(encoding) == f"{CLIP}: {CLIP_TEXT}\n" * 2


@pytest.mark.parametrize("out", ["-", "/dev/stdout", "/dev/fd/1"])
def test_out_is_standard_output(run: Run, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(CLIP, "-o", out) == (0, CLIP_TEXT + "\n", "")
    assert list(tmp_path.iterdir()) == []


def test_appending_to_standard_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with log.open("ab") as file:
        subprocess.run([*COMMAND, CLIP, "-o", "/dev/stdout"], stdout=file, check=True)
    assert log.read_text() == f"before\n{CLIP_TEXT}\n"


def test_full_non_blocking_pipe() -> None:
    """Node.js passes such pipes to subprocesses."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    filled = os.write(write, bytes(1 << 20))
    with subprocess.Popen([*COMMAND, CLIP], stdout=write, stderr=subprocess.PIPE) as command:
        os.close(write)
        with open(read, "rb") as pipe:
            assert pipe.read(filled) == bytes(filled)
            assert pipe.read().decode() == CLIP_TEXT + "\n"
        assert command.wait() == 0


# -- failures of single files ------------------------------------------------------------------------------------------


def test_full_disk(tmp_path: Path) -> None:
    """Each failed write prints one line, later files are tried, and the exit code is that of the first failure."""
    for options, stdout in ((["--out", "/dev/full"], subprocess.PIPE), ([], "/dev/full")):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*COMMAND, CLIP, "missing.wav", CLIP, *options],
                stdout=full if stdout == "/dev/full" else stdout,
                stderr=subprocess.PIPE,
                text=True,
            )
        first, second, third = done.stderr.splitlines()
        assert done.returncode == 1
        assert first == third and CLIP in first and "No space left on device" in first
        assert second == "nemostream: missing.wav does not exist."


@pytest.mark.parametrize("realtime", [False, True])
def test_failed_write_of_an_utterance_is_not_an_audio_error(realtime: bool) -> None:
    done = subprocess.run(
        [*COMMAND, CLIP, "--endpoint-ms", "400", "--out", "/dev/full", *["--realtime"] * realtime],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"nemostream: the transcript of {CLIP} cannot be written to /dev/full: No space left on device.\n"
    )


def test_outputs_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    """Two recordings of the same name, one that would be overwritten, one whose output is a folder; others succeed."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path in (folder / "b.txt", other):
        path.mkdir(parents=True)
    for name in ("a.flac", "b.flac", "c.flac"):
        shutil.copyfile(CLIP, tmp_path / name)
    shutil.copyfile(CLIP, other / "a.flac")
    shutil.copyfile(CLIP, folder / "d.txt")  # recordings are recognised by content, not by name
    names = [tmp_path / "a.flac", other / "a.flac", tmp_path / "b.flac", folder / "d.txt", tmp_path / "c.flac"]
    code, out, err = run(*names, "--out", folder)
    assert (code, out) == (2, "")
    same, is_folder, overwritten = err.splitlines()
    assert f"{other / 'a.flac'} would both be written to" in same
    assert f"{folder / 'b.txt'} is a folder" in is_folder
    assert f"would overwrite {folder / 'd.txt'}" in overwritten
    assert (folder / "a.txt").read_text() == (folder / "c.txt").read_text() == CLIP_TEXT + "\n"
    assert (folder / "d.txt").read_bytes() == Path(CLIP).read_bytes()


def test_unexpected_error_does_not_affect_other_files(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The traceback is printed, and the other files are transcribed."""
    bad = tmp_path / "bad.flac"
    shutil.copyfile(CLIP, bad)
    open_recording = AudioFile._open

    def fail(recording: AudioFile, part: Any) -> Any:
        if recording.path == bad:
            raise RuntimeError("out of luck")
        return open_recording(recording, part)

    monkeypatch.setattr(AudioFile, "_open", fail)
    code, out, err = run(CLIP, bad, CLIP)
    assert (code, out) == (1, f"{CLIP}: {CLIP_TEXT}\n" * 2)
    assert err.splitlines()[-1] == f"nemostream: {bad}: unexpected RuntimeError: out of luck"


def test_options_are_checked_before_the_model_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nemostream, "load", None)
    (tmp_path / "file").write_text("kept")
    for arguments in (
        ["--resume", "/proc/state"],
        ["--resume", tmp_path / "none" / "state"],
        ["--resume", tmp_path],
        ["--resume", tmp_path / "file", "--out", tmp_path / "file"],
        ["--resume", CLIP],
        ["--out", "/proc/out.txt"],
        ["--out", "/proc/out/"],
        ["--out", tmp_path / "file" / "out/"],
        ["--out", tmp_path / "none" / "out.txt"],
        ["--out", CLIP],
        ["--decoder", "reset"],
        ["--phrases", tmp_path / "none" / "names.txt"],
    ):
        code, out, err = run(CLIP, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert err.startswith("nemostream: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


# -- pipes and permissions ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["flac", "mp3", "wav"])
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"clip.{request.param}"
    soundfile.write(path, *soundfile.read(CLIP, dtype="float32"))
    return path


def test_audio_file_through_a_pipe(clip: Path) -> None:
    """As /dev/stdin, and as a shell's <(...) among files: the same text as from the file itself."""
    with nemostream.load() as model:
        expected = model.transcribe(clip).text
    done = subprocess.run([*COMMAND, "/dev/stdin"], input=clip.read_bytes(), capture_output=True)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected + "\n", b"")
    with subprocess.Popen(["cat", clip], stdout=subprocess.PIPE) as cat:
        assert cat.stdout
        inherited = cat.stdout.fileno()
        done = subprocess.run([*COMMAND, CLIP, f"/dev/fd/{inherited}", CLIP], pass_fds=[inherited], capture_output=True)
    texts = [line.partition(": ")[2] for line in done.stdout.decode().splitlines()]
    assert (done.returncode, texts, done.stderr) == (0, [CLIP_TEXT, expected, CLIP_TEXT], b"")


def test_fifo(run: Run, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', CLIP, fifo]):
        assert run(fifo, "--realtime") == (0, CLIP_TEXT + "\n", "")
    with subprocess.Popen(["sh", "-c", ': > "$0"', fifo]):
        code, out, err = run(fifo)
    assert (code, out) == (3, "") and "is a pipe that was closed without any data" in err


def test_copy_of_a_pipe_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch, fifo = tmp_path / "scratch", tmp_path / "fifo"
    scratch.mkdir()
    os.mkfifo(fifo)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', CLIP, fifo]), AudioFile(fifo) as recording:
        assert sum(map(len, recording.blocks())) == soundfile.info(CLIP).frames
        assert list(scratch.iterdir()) == []  # the copy is an unnamed file
    assert list(scratch.iterdir()) == []
    with subprocess.Popen(["sh", "-c", 'echo no audio > "$0"', fifo]), pytest.raises(AudioError, match="fifo cannot"):
        AudioFile(fifo)
    assert list(scratch.iterdir()) == []


def test_device(run: Run) -> None:
    code, out, err = run("/dev/null")
    assert (code, out) == (3, "") and "/dev/null is a device" in err


def test_permission_denied(tmp_path: Path) -> None:
    secret = tmp_path / "secret.flac"
    shutil.copyfile(CLIP, secret)
    secret.chmod(0)
    command = [*COMMAND, CLIP, str(secret), CLIP]
    if os.geteuid() == 0:  # root can read every file unless it drops that capability
        if not shutil.which("setpriv"):
            pytest.skip("needs setpriv to drop the permission to read every file")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == f"nemostream: {secret} cannot be read: Permission denied.\n"
    assert (done.returncode, done.stdout) == (3, f"{CLIP}: {CLIP_TEXT}\n" * 2)


# -- messages of libraries ---------------------------------------------------------------------------------------------


def test_messages_of_the_mp3_decoder_are_suppressed(tmp_path: Path) -> None:
    """libmpg123 prints messages about this file to standard error."""
    path = tmp_path / "damaged.mp3"
    soundfile.write(path, *soundfile.read(CLIP, dtype="float32"))
    path.write_bytes(path.read_bytes() + bytes(5000))
    plain = subprocess.run(
        [sys.executable, "-c", f"import soundfile; soundfile.read({str(path)!r})"], capture_output=True, text=True
    )
    if not plain.stderr.strip():
        pytest.skip("this libsndfile prints no messages")
    done = subprocess.run([*COMMAND, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "busy message" in done.stdout


def test_other_messages_are_forwarded() -> None:
    code = (
        "import os, sys\nfrom nemostream.cli.standard_streams import suppress_decoder_messages\n"
        "with suppress_decoder_messages():\n"
        "    os.write(2, b'one\\n[src/libmpg123/a.c:f():1] error: x\\nNote: y\\n\\n')\n"
        "    os.write(2, b'Warning: Xing z\\nWarning: two\\nthr')\n"
        "    os.write(2, b'ee')\n    print('ours', file=sys.stderr)\n"
        "print('after', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Python's own messages bypass the pipe, so they may appear before the others.
    lines = done.stderr.replace("three", "three\n").splitlines()
    assert set(lines) == {"one", "Warning: two", "three", "ours", "after"}


# -- channels ----------------------------------------------------------------------------------------------------------


def test_channel_option(run: Run, tmp_path: Path) -> None:
    """Two parties, one per channel: each gives the same text as in a mono file."""
    audio, rate = soundfile.read(CLIP, dtype="int16")
    path = tmp_path / "call.wav"
    soundfile.write(path, np.stack([audio, audio[::-1]], axis=1), rate)
    with nemostream.load() as model:
        parties = [model.transcribe(party) for party in (audio, audio[::-1].copy())]
    for number, party in enumerate(parties, 1):
        for options in ((), ("--realtime",)):
            assert run(path, "--channel", number, *options) == (0, party.text + "\n", "")
        row = json.loads(run(path, "--channel", number, "-f", "json")[1])
        assert (row["channel"], len(row["tokens"])) == (number, len(party.tokens))
    lines = run(path, "--channel", 1, "-f", "ctm")[1].splitlines()
    assert lines and {line.split()[1] for line in lines} == {"1"}
    code, out, err = run(path, "--channel", 3, CLIP)
    assert (code, out) == (3, "") and "2 channel(s); there is no channel 3" in err


@pytest.mark.parametrize("gain", [-1.0, -0.8])
@pytest.mark.parametrize("options", [(), ("--realtime",), ("--endpoint-ms", "400")])
def test_channels_that_cancel_out(run: Run, tmp_path: Path, gain: float, options: tuple[str, ...]) -> None:
    audio, rate = soundfile.read(CLIP, dtype="float32")
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([audio, gain * audio], axis=1), rate, subtype="FLOAT")
    code, _, err = run(path, *options)
    assert code == 0 and err.startswith(f"nemostream: {path}: its 2 channels cancel out") and "--channel 1" in err
    assert run(path, "--channel", 1, *options)[1:] == (CLIP_TEXT + "\n", "")


def test_channels_that_do_not_cancel_out(run: Run, tmp_path: Path) -> None:
    """Equal channels, a silent one, a quieter inverse, unrelated ones, speech in one of many, and silence."""
    audio, rate = soundfile.read(CLIP, dtype="float32")
    silence = np.zeros_like(audio)
    for channels in (
        [audio, audio],
        [audio, silence],
        [audio, -0.4 * audio],
        [audio, audio[::-1]],
        [audio, *[silence] * 7],
        [silence, silence],
    ):
        path = tmp_path / "stereo.wav"
        soundfile.write(path, np.stack(channels, axis=1), rate, subtype="FLOAT")
        code, _, err = run(path)
        assert (code, err) == (0, "")
