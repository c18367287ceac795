"""Fixtures for the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nemostream.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `transcribe`; return its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main(["transcribe", *map(str, arguments)])
        assert isinstance(exited.value.code, int)
        return (exited.value.code, *capfd.readouterr())

    return call


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
