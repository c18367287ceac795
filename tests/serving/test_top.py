"""`nemostream top` with real servers and streams."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import nemostream
from nemostream.cli.top import Monitor, Server, View
from nemostream.client import Rejected, Stream


def drawn(monitor: Monitor) -> list[str]:
    console = Console(width=80, height=24, file=io.StringIO(), force_terminal=True, highlight=False, record=True)
    console.print(View(monitor, 24), end="")
    return console.export_text().splitlines()


@pytest.mark.parametrize("transports", [0, 2])
def test_figures_of_a_server(serve_process: Callable[..., Any], spoken: Any, transports: int) -> None:
    with serve_process("--no-measure", "--max-streams", "8", "--transports", str(transports)) as running:
        monitor = Monitor(Server(running.url, None))
        monitor.update()
        assert monitor.status == "ready" and monitor.history.last is not None
        assert monitor.history.last.total("nemostream_streams") == 0 and monitor.errors == []
        with Stream(running.url, chunk_ms=160) as waiting:
            for chunk_ms in (160, 560):
                with Stream(running.url, chunk_ms=chunk_ms) as stream:
                    stream.send(np.frombuffer(spoken[0].pcm, np.int16))
                    stream.finish()
                    list(stream)
            with pytest.raises(Rejected), Stream(running.url, chunk_ms=100):
                pass
            monitor.update()
            waiting.finish()
            list(waiting)
        last, change = monitor.history.last, monitor.history.change()
        assert last is not None and change is not None
        assert (last.total("nemostream_streams"), last.total("nemostream_max_streams")) == (1, 8)
        audio = change.increase("nemostream_audio_seconds_total")
        assert audio == pytest.approx(2 * spoken[0].seconds, abs=1e-3)
        for chunk_ms in ("160", "560"):
            steps = change.histogram("nemostream_step_seconds", chunk_ms=chunk_ms)
            needed = spoken[0].seconds * 1000 / int(chunk_ms)
            assert needed - 1 <= steps.count <= needed + 2
            assert 0 < steps.quantile(0.5) <= steps.quantile(0.99) and steps.mean > 0
        batches = change.histogram("nemostream_step_streams")
        assert batches.mean >= 1 and change.histogram("nemostream_step_waiting_streams").count == batches.count
        assert monitor.errors == [("rejected: OptionError", 1, 1)]
        lines = drawn(monitor)
        processes = " · 2 transports" if transports else ""
        assert lines[0].startswith(f"nemostream {nemostream.__version__} · demo · cpu{processes} ")
        assert "● ready · up " in lines[1] and "1 of 8 open" in "\n".join(lines)
        assert running.process.poll() is None
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
        monitor.update()
        assert "no response" in drawn(monitor)[1]


def test_the_command(server: Any) -> None:
    command = [sys.executable, "-m", "nemostream", "top", server.url]
    done = subprocess.run([*command, "--once"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    assert " ready streams=" in done.stdout
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert lines[0].endswith(" ready\n") and "audio_per_second=" in lines[1]


def test_the_api_key(serve_here: Callable[..., Any]) -> None:
    with serve_here(api_keys=["secret-key-of-a-client"], measure=False) as running:
        monitor = Monitor(Server(running.url, "secret-key-of-a-client"))
        monitor.update()
        assert monitor.status == "ready" and monitor.problem == ""
        with pytest.raises(nemostream.OptionError, match="requires an API key"):
            Monitor(Server(running.url, None)).update()
