"""A clock that only the test advances; versions of packages are read once."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

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


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that advances its own time to its next timer. It starts at 1000 s."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if not (events := super().select(0)):
            assert timeout is not None, "every task is blocked, and no timer is set"
            self._loop.now += timeout
        return events


@pytest.fixture
def run_virtual() -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Run a coroutine in virtual time."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            return runner.run(main)

    return run
