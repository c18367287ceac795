"""The connection between the supervisor and a process that it started: messages with descriptors, and end-of-file.

The process reads its start-up data and then JSON messages from its standard input, a socket that keeps messages apart.
When the supervisor has ended, it reads end-of-file and exits, so no process remains.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
from dataclasses import dataclass
from typing import Any

from nemostream.bundle import Manifest
from nemostream.errors import BundleError, NemostreamError
from nemostream.serving.settings import Settings

_MAX_MESSAGE_BYTES = 1 << 16
_MAX_FILES = 4


@dataclass(frozen=True)
class Start:
    """The start-up data of a process."""

    settings: dict[str, Any]  # of `Settings`; they were validated
    name: str  # in log lines and metrics
    text: bool  # whether log lines are plain text
    folder: str  # temporary, of the server: for metrics (`share_metrics`), and the states of `state_store` memory
    transports: int
    entries: int  # of the board
    manifest: str  # digest of the bundle's manifest (`digest_of`)
    transport: int = 0  # index of a transport

    def restore_settings(self) -> Settings:
        """Return the settings."""
        return Settings.model_construct(**self.settings)

    def check(self, manifest: Manifest) -> None:
        """Raise `BundleError` if the bundle is not the one that the other processes have read."""
        if digest_of(manifest) != self.manifest:
            raise BundleError("the bundle has changed since the server was started; start the server again.")


def digest_of(manifest: Manifest) -> str:
    """Return a digest of a manifest, which has the digests of all files of its bundle."""
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()


class Control:
    """One end of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def send(self, files: tuple[int, ...] = (), **message: Any) -> None:
        """Send a message. Raises `OSError` if the other process ended or does not read."""
        socket.send_fds(self.socket, [json.dumps(message).encode()], list(files))

    def send_error(self, error: NemostreamError) -> None:
        """Send the error because of which this process cannot start (`error_of`). Raises `OSError` as `send`."""
        self.send(error=[type(error).__name__, str(error)])

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next message and its descriptors, which the caller closes; None at end-of-file."""
        try:
            data, files, _, _ = socket.recv_fds(self.socket, _MAX_MESSAGE_BYTES, _MAX_FILES)
        except ConnectionResetError:
            return None
        return (json.loads(data), files) if data else None


def start_file(start: Start) -> int:
    """Return the descriptor of a file in memory with `start`, which may contain API keys: a command line is public."""
    file = os.memfd_create("nemostream-start", os.MFD_CLOEXEC)
    os.write(file, pickle.dumps(start))
    return file


def connect() -> tuple[Control, Start, int]:
    """Return the connection to the supervisor, the start-up data and the descriptor of the board, in a new process."""
    control = Control(socket.socket(fileno=0))
    message = control.receive()
    if message is None:
        raise SystemExit(0)  # the supervisor has ended
    start, board = message[1]
    with open(start, "rb") as file:
        file.seek(0)
        data = pickle.load(file)
    assert isinstance(data, Start)
    return control, data, board
