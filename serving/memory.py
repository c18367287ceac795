"""Memory of a server process: garbage collection of many streams, and memory of finished requests.

A full garbage collection examines all objects, and no other code runs meanwhile. With hundreds of streams that takes
longer than a chunk of 80 ms, so full collections must be rare.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress

_TRIM_BYTES = 16 << 20  # growth of the process, besides that for more streams, after which memory is freed
_STREAM_BYTES = 256 << 10  # of an open stream and its connection; most have half of it
_MIDDLE_COLLECTIONS = 1000  # between two full ones


def freeze_heap() -> None:
    """Exclude the present objects, the model and the modules, from garbage collections, and make full ones rare."""
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _MIDDLE_COLLECTIONS)


class Trimmer:
    """Free memory of finished requests: reference cycles of cancelled calls, which hold messages, and heap pages.

    Python rarely collects old objects, and glibc keeps pages that many threads freed; together a few hundred MiB after
    a burst of large requests. Without such a burst, nothing is done.
    """

    def __init__(self) -> None:
        self._bytes: int | None = None  # size of the process after the last time, or less
        self._streams = 0  # that were open then

    def trim(self, streams: int) -> None:
        """Free memory if the process has grown since the last time, or if its size is not known.

        The first call only reads the size. Growth of up to 16 MiB is ignored, and so is that for additional streams;
        `streams` is the number of open ones.
        """
        size = _resident_bytes()
        if size is not None:
            if self._bytes is None:
                self._bytes, self._streams = size, streams
            if size <= self._bytes + _TRIM_BYTES + max(streams - self._streams, 0) * _STREAM_BYTES:
                if size < self._bytes:
                    self._bytes, self._streams = size, streams
                return
        gc.collect()
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        self._bytes, self._streams = _resident_bytes(), streams


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return None
