"""Processes that print a URL, do not print one, or do not end."""

from __future__ import annotations

import signal
import sys

import pytest

from nemostream.benchmarks.harness import server_process as module
from nemostream.benchmarks.harness.server_process import server_process
from nemostream.errors import BackendError

READY = "import sys, time; print('http://host:1', flush=True); print('a log line', file=sys.stderr); "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_process_runs_within_the_block_and_is_terminated() -> None:
    with server_process(python(READY + "time.sleep(60)")) as (process, url):
        assert url == "http://host:1" and process.poll() is None
    assert process.returncode == -signal.SIGTERM


def test_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.2)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + "time.sleep(60)"
    with pytest.raises(ZeroDivisionError), server_process(python(code)) as (process, _):
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('first line\\nno port is free')", "the server did not start: no port is free"),
        ("print('other'); raise SystemExit(1)", "the server did not start: it printed nothing"),
    ],
)
def test_error_of_a_process_that_does_not_start(code: str, message: str) -> None:
    with pytest.raises(BackendError) as caught, server_process(python(code)):
        pass
    assert str(caught.value) == message
