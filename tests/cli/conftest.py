"""A fixture for the tests of `nemostream transcribe`."""

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
