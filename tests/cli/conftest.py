"""Fixtures for the tests of the command line."""

from __future__ import annotations

import pytest


class Clock:
    """A clock that only `sleep` and the test advance; replaces the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()
