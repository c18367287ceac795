"""A clock that only the test advances; versions of packages are read once."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable

import pytest

from nemostream.benchmarks.harness import records

versions = functools.cache(records.versions)


@pytest.fixture(autouse=True)
def cached_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the versions for all results of a session once: it takes longer than most of these tests."""
    monkeypatch.setattr(records, "versions", lambda: dict(versions()))


class Clock:
    """A clock in seconds. It advances in `sleep` only; a callback of `after` runs at its time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._order), callback))

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            self.now, _, callback = heapq.heappop(self._due)
            callback()
        self.now = end


@pytest.fixture
def clock() -> Clock:
    return Clock()
