"""Memory of a server process: garbage collection of many streams, and memory of finished requests.

A full garbage collection examines all objects, and no other code runs meanwhile. With hundreds of streams that takes
longer than a chunk of 80 ms, so full collections must be rare.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress

_TRIM_BYTES = 16 << 20  # growth of the process after which memory of finished requests is freed
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
        self._bytes = 0  # size of the process after the last time, or less

    def trim(self) -> None:
        """Free memory if the process has grown by 16 MiB since the last time, or if its size is not known."""
        size = _resident_bytes()
        if size is not None and size <= self._bytes + _TRIM_BYTES:
            self._bytes = min(self._bytes, size)
            return
        gc.collect()
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        self._bytes = _resident_bytes() or 0


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return None
