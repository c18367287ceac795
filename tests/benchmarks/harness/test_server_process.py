"""Processes that print a URL, do not print one, or do not end; their CPU time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from nemostream.benchmarks.harness import server_process as module
from nemostream.benchmarks.harness.server_process import (
    cpu_seconds,
    descendants,
    parse_cpu_ticks,
    server_process,
)
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


def test_cpu_ticks_of_a_process() -> None:
    """User time is the 14th field, system time the 15th; the name in the second field may look like others."""
    fields = ["S", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "700", "31", "9000", "9001"]
    assert parse_cpu_ticks(f"42 (a b) c) {' '.join(fields)}\n") == 731


def test_cpu_seconds_of_this_process() -> None:
    before, found, after = os.times(), cpu_seconds(os.getpid()), os.times()
    assert before.user + before.system - 0.02 <= found <= after.user + after.system + 0.02


def test_descendants(tmp_path: Path) -> None:
    for pid, parent in ((10, 1), (11, 10), (12, 11), (20, 1)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) S {parent} 0")
    assert sorted(descendants([10], tmp_path)) == [10, 11, 12]
    assert sorted(descendants([11, 20], tmp_path)) == [11, 12, 20]
    assert descendants([99], tmp_path) == [99]
