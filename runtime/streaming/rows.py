"""Chunks that another process has cut, as rows of arrays: no object per chunk.

A process that runs the streams of others receives tens of thousands of chunks per second. `Scheduler.enqueue_rows`
accepts them as `ROW` records, and a `RowFeed` receives and delivers them. Whatever a row cannot describe, such as a
reset of the slot, is a `WorkItem`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.void]  # [N] of `ROW`

# A chunk to run in a slot that is not reset for it; the fields are those of `WorkItem`.
ROW = np.dtype(
    [
        ("slot", np.int64),
        ("size", np.int64),  # index of the chunk size (`Manifest.chunks`)
        ("end_sample", np.int64),
        ("origin_sample", np.int64),
        ("length", np.int64),
        ("prompt", np.int64),
        ("source", np.int64),  # these four belong to the feed: where its audio is, and which stream it is of
        ("is_int16", np.bool_),
        ("begin", np.int64),
        ("stream", np.int64),
        ("arrival", np.int64),  # set by the queue: number of the call of `append`
    ]
)


class RowQueue:
    """Rows in the order of their arrival, for slots below `capacity`. Guarded by the scheduler's lock."""

    def __init__(self, capacity: int) -> None:
        self.count_of = np.zeros(capacity, np.int64)  # rows of each slot
        self._in_flight = np.zeros(capacity, np.int64)  # rows of each slot that were taken and have not landed
        self.arrivals = 0  # calls of `append`
        self._blocks: list[Rows] = []
        self._first = np.empty(capacity, np.int64)

    def __bool__(self) -> bool:
        return bool(self._blocks)

    @property
    def oldest(self) -> Any:
        """The row that has waited longest."""
        return self._blocks[0][0]

    @property
    def streams(self) -> int:
        """Number of slots that have rows."""
        return int(np.count_nonzero(self.count_of))

    def append(self, rows: Rows) -> None:
        """Append rows, at least one. Sets their `arrival`."""
        rows["arrival"] = self.arrivals
        self.arrivals += 1
        self._blocks.append(rows)
        np.add.at(self.count_of, rows["slot"], 1)

    def take(self, size: int, count: int) -> Rows:
        """Remove and return up to `count` rows of a chunk size, oldest first, and at most one per slot: its first."""
        rows = self._blocks[0] if len(self._blocks) == 1 else np.concatenate(self._blocks)
        slots, numbers = rows["slot"], np.arange(len(rows))
        self._first[slots[::-1]] = numbers[::-1]  # of several rows of a slot, the value of the oldest remains
        taken = np.flatnonzero((self._first[slots] == numbers) & (rows["size"] == size))[:count]
        self._blocks = [np.delete(rows, taken)] if len(taken) < len(rows) else []
        found = rows[taken]
        self.count_of[found["slot"]] -= 1
        self._in_flight[found["slot"]] += 1
        return found

    def landed(self, slots: NDArray[np.int64] | int) -> None:
        """Count one row of each of the slots as done."""
        self._in_flight[slots] -= 1

    def pending(self, slot: int) -> int:
        """Return the number of rows of a slot that have not landed."""
        return int(self.count_of[slot] + self._in_flight[slot])

    def precede(self, slot: int, wait_for_results: bool) -> bool:
        """Return whether a slot has rows that must be taken first, or with `wait_for_results` that must land first."""
        return bool(self.count_of[slot] or (wait_for_results and self._in_flight[slot]))

    def remove(self, slot: int) -> Rows:
        """Remove and return the rows of a slot."""
        if not self.count_of[slot]:
            return np.empty(0, ROW)
        rows = np.concatenate(self._blocks)
        of_slot = rows["slot"] == slot
        rest = rows[~of_slot]
        self._blocks = [rest] if len(rest) else []
        self.count_of[slot] = 0
        return rows[of_slot]
