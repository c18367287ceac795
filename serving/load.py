"""The rules of overload: when results are late, whether streams have accurate lanes then, and how large chunks are."""

from __future__ import annotations

import logging
from collections import deque

log = logging.getLogger("nemostream.serving")

_LATE_CHUNKS, _EARLY_CHUNKS = 0.8, 0.3  # latency in chunks above which results are late, below which early
_LATE_SECONDS, _EARLY_SECONDS = 3, 10  # after which the degradation level rises, falls
MAX_LATENCIES = 10_000  # that are kept for a second


class LoadControl:
    """The latencies of the last seconds, and the degradation that follows from them.

    Accurate lanes are disabled before the degradation level rises, and enabled again when it is 0.
    """

    def __init__(self) -> None:
        self.level = 0  # index offset into the chunk sizes: how many sizes larger than requested
        self.sheds_lanes = False  # whether accurate lanes (`final_chunk_ms`) are disabled
        self.history: deque[float] = deque(maxlen=_EARLY_SECONDS)  # 90th percentile of each second, in chunks

    @property
    def is_late(self) -> bool:
        """Whether results were late in the last second."""
        return bool(self.history) and self.history[-1] > _LATE_CHUNKS

    @property
    def overloaded(self) -> bool:
        """Whether results were late for three seconds."""
        recent = list(self.history)[-_LATE_SECONDS:]
        return len(recent) == _LATE_SECONDS and min(recent) > _LATE_CHUNKS

    def update(self, latency: float, max_level: int, has_lanes: bool) -> None:
        """Add a second's latency (90th percentile, in chunks), update `level` and `sheds_lanes`, and log a change.

        The level is at most `max_level`. `has_lanes` is whether a stream has an accurate lane.
        """
        self.history.append(latency)
        level, sheds_lanes = self.level, self.sheds_lanes
        if self.overloaded:
            if has_lanes and not sheds_lanes:
                sheds_lanes = True
            else:
                level = min(level + 1, max_level)
        elif len(self.history) == _EARLY_SECONDS and max(self.history) < _EARLY_CHUNKS:
            if level:
                level -= 1
            else:
                sheds_lanes = False
        if (level, sheds_lanes) == (self.level, self.sheds_lanes):
            return
        if level != self.level:
            log.warning("chunk sizes changed", extra={"degradation_level": level})
        else:
            log.warning("accurate lanes disabled" if sheds_lanes else "accurate lanes enabled")
        self.level, self.sheds_lanes = level, sheds_lanes
        self.history.clear()


def percentile_90(latencies: list[float]) -> float:
    """Return the 90th percentile, 0 without latencies."""
    return sorted(latencies)[int(0.9 * len(latencies))] if latencies else 0.0
