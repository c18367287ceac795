"""The process that decodes uploaded recordings: files in, mono float32 at the model's rate out.

A bug in a native parser (libsndfile, mpg123, FFmpeg) ends this process and one upload, never the server and its
streams. `decoding.py` starts it with a socket as standard input and speaks this protocol:

* The server sends one JSON line with the open file attached (`SCM_RIGHTS`): ``{"name", "rate", "max_seconds"}``.
* The process answers with frames ``<kind: 1 byte> <size: uint32 LE> <payload>``: ``h`` (JSON: ``duration``) once the
  file is open, then one frame for each ``n`` that the server sends: ``b`` (float32 samples), ``e`` (JSON: ``seconds``,
  ``warning``; the end) or ``x`` (JSON: ``kind``, ``message``, an error). ``s`` ends the file early, with ``e``.

It keeps no file, opens no network connection and inherits no API key.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from nemostream.errors import AudioError, NemostreamError, TruncatedAudioError
from nemostream.runtime.audio.containers import container_of
from nemostream.runtime.audio.files import AudioFile
from nemostream.runtime.audio.preprocessor import AudioPreprocessor

MEMORY = 512 << 20  # bytes that decoding may add to the address space
CPU_SECONDS = 300.0  # for one recording
FRAME = struct.Struct("<cI")
_FILES = 64  # open files
_BEGINNING = 8192  # bytes of a file that show its container: two frames of MPEG audio
ACCEPTED = ("WAV", "FLAC", "Ogg", "MP3", "AIFF", "AU", "CAF", "W64", "MP4", "WebM")  # the last two need the extra `av`
_NICE = 10  # live streams come first


def main() -> None:
    """Serve until the server closes its end of the socket."""
    connection = socket.socket(fileno=0)
    os.nice(_NICE)
    _limit()
    while True:
        request, files, _, _ = socket.recv_fds(connection, 65536, 1)
        if not request or not files:
            return
        try:
            _serve(connection, json.loads(request), files[0])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.close(files[0])


def _limit() -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))


def _serve(connection: socket.socket, request: dict[str, Any], file: int) -> None:
    # The default action of SIGPROF ends the process, also while native code never returns to Python.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        _check_format(file, request["name"])
        with AudioFile(f"/dev/fd/{file}", request["name"]) as recording:
            if recording.duration > request["max_seconds"]:
                raise _too_long(request, recording.duration)
            _send(connection, b"h", {"duration": recording.duration})
            samples = _samples(recording, request)
            while connection.recv(1) == b"n":
                block = next(samples)
                if isinstance(block, dict):
                    return _send(connection, b"e", block)
                connection.sendall(FRAME.pack(b"b", block.nbytes) + block.tobytes())
        _send(connection, b"e", {"seconds": 0.0, "warning": ""})
    except NemostreamError as error:
        _send(connection, b"x", {"kind": type(error).__name__, "message": str(error)})
    except MemoryError:
        error_text = f"{request['name']} needs more than {MEMORY >> 20} MiB of memory to decode; convert it to FLAC."
        _send(connection, b"x", {"kind": "AudioError", "message": error_text})


def _check_format(file: int, name: str) -> None:
    """Reject what is not in the documented list before a native library sees it: libsndfile and FFmpeg read dozens of
    formats, most of them rare and little tested."""
    begin = os.pread(file, _BEGINNING, 0)
    container = container_of(begin)
    # An MP3 file may begin with the rest of a frame; only libsndfile knows whether one follows.
    if container not in ACCEPTED and not (container is None and begin[:1] == b"\xff"):
        what = f"a file of the kind {container}" if container else "not a recording of a known format"
        raise AudioError(f"{name} is {what}; send {', '.join(ACCEPTED[:-1])} or {ACCEPTED[-1]}.")


def _samples(recording: AudioFile, request: dict[str, Any]) -> Iterator[Any]:
    """Blocks of samples, and at the end a document: the seconds that the file held, a warning if it was cut short."""
    preprocessor, warning = AudioPreprocessor(recording.sample_rate, recording.channels, request["rate"]), ""
    try:
        for block in recording.blocks():
            for samples in preprocessor.push(block):
                if len(samples):
                    yield np.ascontiguousarray(samples, np.float32)
            if preprocessor.seconds > request["max_seconds"]:
                raise _too_long(request, preprocessor.seconds)
    except TruncatedAudioError as error:  # raised when all that is there was read
        warning = str(error)
    if len(rest := preprocessor.finish()):
        yield np.ascontiguousarray(rest, np.float32)
    yield {"seconds": float(preprocessor.seconds), "warning": warning}


def _too_long(request: dict[str, Any], seconds: float) -> AudioError:
    return AudioError(
        f"{request['name']} lasts {seconds:.0f} s or more; a recording may last {request['max_seconds']:.0f} s: "
        "send it in parts."
    )


def _send(connection: socket.socket, kind: bytes, document: dict[str, Any]) -> None:
    payload = json.dumps(document).encode()
    connection.sendall(FRAME.pack(kind, len(payload)) + payload)


if __name__ == "__main__":
    main()
