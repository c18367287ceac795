"""The process that decodes uploaded recordings: files in, mono float32 at the model's sample rate out.

A bug in a native parser (libsndfile, mpg123, FFmpeg) ends this process and one upload, never the server and its
streams. `decoding.py` starts it with a socket as standard input. The protocol:

* The server sends one JSON line with the open file attached (`SCM_RIGHTS`): ``{"name", "rate", "max_seconds"}``.
* The process sends frames ``<kind: 1 byte> <size: uint32 LE> <payload>``: ``h`` (head; JSON: ``duration``) once the
  file is open, then one frame for each ``n`` (next) that the server sends: ``b`` (block; float32 samples), ``e`` (end;
  JSON: ``seconds``, ``warning``) or ``x`` (error; JSON: ``kind``, ``message``). ``s`` (stop) ends the file early, with
  ``e``.

The process keeps no file, opens no network connection and inherits no API key.
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

MAX_MEMORY = 512 << 20  # bytes that decoding may add to the address space
CPU_SECONDS = 300.0  # for one recording
FRAME = struct.Struct("<cI")
_MAX_FILES = 64  # open files
_HEAD_BYTES = 8192  # of a file, which determine its container: two frames of MPEG audio
ACCEPTED = ("WAV", "FLAC", "Ogg", "MP3", "AIFF", "AU", "CAF", "W64", "MP4", "WebM")  # the last two need the `av` extra
_NICE = 10  # lower priority than live streams


def main() -> None:
    """Decode files until the server closes its end of the socket."""
    connection = socket.socket(fileno=0)
    os.nice(_NICE)
    _set_limits()
    while True:
        request, files, _, _ = socket.recv_fds(connection, 65536, 1)
        if not request or not files:
            return
        try:
            _decode(connection, json.loads(request), files[0])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.close(files[0])


def _set_limits() -> None:
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MAX_MEMORY, size + MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_FILES, _MAX_FILES))


def _decode(connection: socket.socket, request: dict[str, Any], file: int) -> None:
    # The default action of SIGPROF ends the process, even if native code never returns to Python.
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
        message = f"{request['name']} needs more than {MAX_MEMORY >> 20} MiB of memory to decode; convert it to FLAC."
        _send(connection, b"x", {"kind": "AudioError", "message": message})


def _check_format(file: int, name: str) -> None:
    """Raise `AudioError` for formats that are not documented, before a native library reads the file.

    libsndfile and FFmpeg read dozens of formats, most of them rare and little tested.
    """
    head = os.pread(file, _HEAD_BYTES, 0)
    container = container_of(head)
    # An MP3 file may start with the rest of a frame; only libsndfile can tell whether a frame follows.
    if container not in ACCEPTED and not (container is None and head[:1] == b"\xff"):
        kind = f"a file of type {container}" if container else "not a recording of a known format"
        raise AudioError(f"{name} is {kind}; send {', '.join(ACCEPTED[:-1])} or {ACCEPTED[-1]}.")


def _samples(recording: AudioFile, request: dict[str, Any]) -> Iterator[Any]:
    """Yield blocks of samples, and at the end a dict: the duration in seconds, a warning if the file was cut short."""
    preprocessor, warning = AudioPreprocessor(recording.sample_rate, recording.channels, request["rate"]), ""
    try:
        for block in recording.blocks():
            for samples in preprocessor.push(block):
                if len(samples):
                    yield np.ascontiguousarray(samples, np.float32)
            if preprocessor.seconds > request["max_seconds"]:
                raise _too_long(request, preprocessor.seconds)
    except TruncatedAudioError as error:  # raised after all available samples were read
        warning = str(error)
    if len(rest := preprocessor.finish()):
        yield np.ascontiguousarray(rest, np.float32)
    yield {"seconds": float(preprocessor.seconds), "warning": warning}


def _too_long(request: dict[str, Any], seconds: float) -> AudioError:
    return AudioError(
        f"{request['name']} lasts {seconds:.0f} s or more; a recording may last {request['max_seconds']:.0f} s. "
        "Send it in parts."
    )


def _send(connection: socket.socket, kind: bytes, document: dict[str, Any]) -> None:
    payload = json.dumps(document).encode()
    connection.sendall(FRAME.pack(kind, len(payload)) + payload)


if __name__ == "__main__":
    main()
