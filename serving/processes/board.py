"""What the processes of a server share: the streams, accurate lanes, recordings and connections, and the load.

The board is anonymous shared memory. Each transport writes to its own rows only, and reads all rows. A lock makes
"count, compare with the limit, add" one operation, so limits hold exactly over all transports. The system releases the
lock of a process that ends, and the supervisor clears the row of a transport that ended, so a process that crashed
leaves no lock and no entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from nemostream.serving.load import MAX_LATENCIES


class Kind(IntEnum):
    """The kind of an entry."""

    STREAM = 1  # an open live stream
    UPLOAD = 2  # a recording that is being received or transcribed
    CONNECTION = 3  # an HTTP or WebSocket connection
    LANE = 4  # the slots of an accurate lane, of a live stream that requested one


class Board:
    """The shared memory, for one process. `entries` is the maximum number of entries of each transport."""

    def __init__(self, file: int, transports: int, entries: int) -> None:
        """Map the memory with descriptor `file`, from `create`. The descriptor must stay open."""
        layout = _layout(transports, entries)
        self._file = file
        self._memory = mmap.mmap(file, layout.itemsize)
        board = np.frombuffer(self._memory, layout, 1)[0]
        self._kinds: NDArray[np.uint8] = board["kinds"]  # [transports, entries]; 0: no entry
        self._clients: NDArray[np.uint64] = board["clients"]  # [transports, entries]
        self._sizes: NDArray[np.int64] = board["sizes"]  # [transports, entries]
        self._sessions: NDArray[np.int64] = board["sessions"]  # [transports]
        self._open_lanes: NDArray[np.int64] = board["open_lanes"]  # [transports]
        self._audio: NDArray[np.float64] = board["audio"]  # [transports]
        self._latency_counts: NDArray[np.int64] = board["latency_counts"]  # [transports]; since the start
        self._latencies: NDArray[np.float32] = board["latencies"]  # [transports, MAX_LATENCIES]: a ring
        self._step_seconds: NDArray[np.float64] = board["step_seconds"]  # [1]

    @staticmethod
    def create(transports: int, entries: int) -> int:
        """Create the memory and return its descriptor."""
        file = os.memfd_create("nemostream-board", os.MFD_CLOEXEC)
        os.ftruncate(file, _layout(transports, entries).itemsize)
        return file

    # -- all processes -------------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the board. Only one thread of a process may use it, and calls must not be nested."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def count(self, kind: Kind, client: str | None = None) -> int:
        """Return the number of entries of a kind at all transports; with `client`, of one client."""
        found = self._kinds == kind
        if client is not None:
            found &= self._clients == _digest(client)
        return int(np.count_nonzero(found))

    def size(self, kind: Kind) -> int:
        """Return the sum of the sizes of the entries of a kind at all transports."""
        return int(self._sizes[self._kinds == kind].sum())

    @property
    def sessions(self) -> int:
        """Number of open sessions of all transports: streams, and recordings that are being transcribed."""
        return int(self._sessions.sum())

    @property
    def open_lanes(self) -> int:
        """Number of accurate lanes of all transports that process audio; those that are disabled keep their slots."""
        return int(self._open_lanes.sum())

    # -- the engine ----------------------------------------------------------------------------------------------------

    def add_step(self, seconds: float) -> None:
        """Add the duration of a step."""
        self._step_seconds[0] += seconds

    # -- the supervisor ------------------------------------------------------------------------------------------------

    @property
    def totals(self) -> tuple[float, float]:
        """Seconds of steps and seconds of audio since the start."""
        return float(self._step_seconds[0]), float(self._audio.sum())

    def latencies(self, transport: int, since: int) -> tuple[list[float], int]:
        """Return a transport's latencies since the `since`-th, at most `MAX_LATENCIES`, and their number until now."""
        count = int(self._latency_counts[transport])
        first = max(since, count - MAX_LATENCIES)
        positions = np.arange(first, count) % MAX_LATENCIES
        return self._latencies[transport, positions].tolist(), count

    def clear(self, transport: int) -> None:
        """Remove the entries and sessions of a transport that has ended."""
        with self.locked():
            self._kinds[transport] = 0
        self._sessions[transport] = self._open_lanes[transport] = 0


class Row:
    """The part of the board that one transport writes. For one thread."""

    def __init__(self, board: Board, transport: int) -> None:
        self.board = board
        self._kinds, self._clients = board._kinds[transport], board._clients[transport]
        self._sizes = board._sizes[transport]
        self._free = list(range(len(self._kinds)))[::-1]
        self._latencies: memoryview[float] = memoryview(cast(Any, board._latencies[transport]))
        self._latency_count: memoryview[int] = _item(board._latency_counts, transport)
        self.audio: memoryview[float] = _item(board._audio, transport)  # seconds of received audio, to be added to
        self._sessions: memoryview[int] = _item(board._sessions, transport)
        self._open_lanes: memoryview[int] = _item(board._open_lanes, transport)

    def add(self, kind: Kind, client: str, size: int = 0) -> int:
        """Add an entry and return its number, for `remove`. Raises `IndexError` if the row is full."""
        entry = self._free.pop()
        self._clients[entry] = _digest(client)
        self._sizes[entry] = size
        self._kinds[entry] = kind
        return entry

    def remove(self, entry: int) -> None:
        """Remove an entry."""
        self._kinds[entry] = 0
        self._free.append(entry)

    def set_sessions(self, count: int) -> None:
        """Set the number of open sessions."""
        self._sessions[0] = count

    def set_open_lanes(self, count: int) -> None:
        """Set the number of accurate lanes that process audio."""
        self._open_lanes[0] = count

    def add_latency(self, chunks: float) -> None:
        """Record a latency, in chunks."""
        count = self._latency_count[0]
        self._latencies[count % MAX_LATENCIES] = chunks
        self._latency_count[0] = count + 1


def _item(array: NDArray[Any], index: int) -> memoryview[Any]:
    """Return a view of one item [1]. An item of a memory view is read and written faster than one of an array."""
    return memoryview(cast(Any, array))[index : index + 1]


def _layout(transports: int, entries: int) -> np.dtype[Any]:
    return np.dtype(
        [
            ("step_seconds", np.float64, (1,)),
            ("audio", np.float64, (transports,)),
            ("sessions", np.int64, (transports,)),
            ("open_lanes", np.int64, (transports,)),
            ("latency_counts", np.int64, (transports,)),
            ("clients", np.uint64, (transports, entries)),
            ("sizes", np.int64, (transports, entries)),
            ("latencies", np.float32, (transports, MAX_LATENCIES)),
            ("kinds", np.uint8, (transports, entries)),
        ]
    )


def _digest(client: str) -> int:
    """Return a number for a client; two clients have the same one with a probability of 1 in 2 ** 64."""
    return int.from_bytes(hashlib.blake2b(client.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
