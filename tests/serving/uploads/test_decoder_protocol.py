"""The protocol of the decoder process: its frames for a file and a sequence of commands."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import pytest
import soundfile

from nemostream.serving.uploads import decoder_process


def recording(seconds: float, rate: int = 16000, container: str = "WAV") -> bytes:
    file = io.BytesIO()
    samples = np.arange(int(seconds * rate), dtype=np.int16) % 1000
    soundfile.write(file, samples, rate, format=container, subtype="PCM_16")
    return file.getvalue()


def frames(data: bytes, commands: bytes = b"n" * 50, max_seconds: float = 60.0) -> list[tuple[str, Any]]:
    """Return kind and payload of the frames; a block is its samples, another payload is JSON."""
    here, there = socket.socketpair()
    with here, there, tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        here.sendall(commands)
        here.shutdown(socket.SHUT_WR)
        try:
            decoder_process._decode(there, {"name": "a.wav", "rate": 16000, "max_seconds": max_seconds}, file.fileno())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        there.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: here.recv(1 << 20), b""))
    found: list[tuple[str, Any]] = []
    while received:
        kind, size = struct.unpack_from("<cI", received)
        payload, received = received[5 : 5 + size], received[5 + size :]
        assert len(payload) == size
        found.append((kind.decode(), np.frombuffer(payload, "<f4") if kind == b"b" else json.loads(payload)))
    return found


def test_a_file_is_a_head_blocks_and_an_end() -> None:
    head, *blocks, end = frames(recording(0.5))
    assert head == ("h", {"duration": 0.5}) and end == ("e", {"seconds": 0.5, "warning": ""})
    assert {kind for kind, _ in blocks} == {"b"}
    samples = np.concatenate([block for _, block in blocks])
    assert np.array_equal(samples, (np.arange(8000) % 1000).astype(np.float32) / 32768)


def test_a_block_is_sent_for_each_request() -> None:
    assert [kind for kind, _ in frames(recording(0.5), b"n")] == ["h", "b", "e"]
    assert frames(recording(0.5), b"s")[1:] == [("e", {"seconds": 0.0, "warning": ""})]
    assert frames(recording(0.5), b"ns")[-1] == ("e", {"seconds": 0.0, "warning": ""})


@pytest.mark.parametrize(("seconds", "accepted"), [(1.0, True), (1.01, False)])
@pytest.mark.parametrize("stated", [True, False])
def test_the_longest_recording(seconds: float, accepted: bool, stated: bool) -> None:
    """As its header states, or as it is decoded if the header does not state it."""
    data = bytearray(recording(seconds, container="AU"))
    if not stated:
        data[8:12] = b"\xff" * 4
    *_, (kind, last) = frames(bytes(data), max_seconds=1.0)
    if accepted:
        assert (kind, last["seconds"]) == ("e", 1.0)
    else:
        message = "a.wav lasts 1 s or more; a recording may last 1 s. Send it in parts."
        assert (kind, last) == ("x", {"kind": "AudioError", "message": message})


def test_a_file_that_is_cut_short_has_a_warning() -> None:
    *blocks, end = frames(recording(0.5)[:-4000])
    assert end[0] == "e" and end[1]["seconds"] == 0.375 and "a.wav" in end[1]["warning"]
    assert sum(len(block) for kind, block in blocks if kind == "b") == 6000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.wav is not a recording of a known format; send WAV, FLAC, Ogg, MP3, AIFF, AU, CAF, W64, MP4 or WebM."),
        (bytes(100), "a.wav is not a recording of a known format"),
        (b"#!AMR\n" + bytes(100), "a.wav is a file of type AMR; send WAV"),
    ],
    ids=["empty", "samples", "AMR"],
)
def test_other_files_are_rejected(data: bytes, message: str) -> None:
    ((kind, error),) = frames(data)
    assert kind == "x" and error["kind"] == "AudioError" and error["message"].startswith(message)


def test_an_error_has_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError

    (error,) = frames(b"\xff\xff" + bytes(100))  # only the library can detect MP3
    assert error[0] == "x" and "a.wav" in error[1]["message"]
    monkeypatch.setattr(decoder_process, "AudioFile", fail)
    (error,) = frames(recording(0.1))
    assert error == (
        "x",
        {
            "kind": "AudioError",
            "message": "a.wav needs more than 512 MiB of memory to decode; convert it to FLAC.",
        },
    )


def read_kind(received: Any) -> bytes:
    """Read one frame and return its kind."""
    kind, size = struct.unpack("<cI", received.read(5))
    received.read(size)
    return bytes(kind)


def test_the_process_closes_each_file() -> None:
    """A process decodes many recordings, and may have 64 open files."""
    here, there = socket.socketpair()
    command = [sys.executable, "-m", "nemostream.serving.uploads.decoder_process"]
    open_files = []
    with here, subprocess.Popen(command, stdin=there) as process, here.makefile("rb") as received:
        there.close()
        try:
            for _ in range(3):
                with tempfile.TemporaryFile() as file:
                    file.write(recording(0.1))
                    file.flush()
                    request = json.dumps({"name": "a.wav", "rate": 16000, "max_seconds": 60.0})
                    socket.send_fds(here, [request.encode()], [file.fileno()])
                assert read_kind(received) == b"h"
                open_files.append(len(os.listdir(f"/proc/{process.pid}/fd")))  # while it waits for a command
                here.sendall(b"s")
                assert read_kind(received) == b"e"
        finally:
            process.kill()
    assert open_files == [open_files[0]] * 3
