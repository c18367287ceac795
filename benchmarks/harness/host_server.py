"""CPU time and latency of a server with the null backend: its process, its clients' process, and what they measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.records import Row, percentile
from nemostream.benchmarks.harness.server_process import parse_cpu_ticks, server_process
from nemostream.bundle import Bundle
from nemostream.errors import BackendError

MAX_ADDED_MS = 20.0  # 99th percentile of the added latency up to which streams are held
MAX_LATENESS_MS = 5.0  # 99th percentile of the clients' lateness beyond which the load generator has fallen behind
MAX_GENERATOR_CORES = 0.9
RAMP_SECONDS = 4.0  # in which the clients start: half the period of the null backend's text
_MAX_STREAMS = 4096  # of the server
_OVERLOAD_SECONDS = 1.5  # without streams, after which no server is overloaded (`Service.monitor`)
GROWTH = 1.25  # between the numbers of streams of the search

Measure = Callable[[int], Row]  # of a number of streams


class NullServer:
    """`null_server` in a process of its own; a context manager. Raises `BackendError` if it does not start."""

    def __init__(
        self,
        bundle: Bundle,
        chunk_ms: int,
        *,
        stage: str = "all",
        step_ms: float = 0.0,
        max_batch: int = 256,
        options: Sequence[str] = (),
    ) -> None:
        # All clients have the same address.
        limits = {"max-streams": _MAX_STREAMS, "max-connections": 2 * _MAX_STREAMS + 64}
        limits["max-connections-per-client"] = limits["max-connections"]
        arguments = {"bundle": bundle.path, "chunk-ms": chunk_ms, "chunks": chunk_ms, "port": 0, "grpc-port": 0}
        arguments |= {"max-batch": max_batch, "drain-seconds": 0, **limits}
        self._command = [sys.executable, "-m", "nemostream.benchmarks.harness.null_server"]
        self._folder = tempfile.TemporaryDirectory(prefix="nemostream-")
        self._report = Path(self._folder.name) / "report.json"
        self._command += ["--stage", stage, "--step-ms", str(step_ms), "--report", str(self._report)]
        self._command += ["--", "--no-measure"]
        self._command += [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
        self._command += options

    def __enter__(self) -> NullServer:
        with contextlib.ExitStack() as stack:
            stack.callback(self._folder.cleanup)
            process, url = stack.enter_context(server_process(self._command))
            self.pid = process.pid
            with urllib.request.urlopen(f"{url}/readyz") as response:
                self.ports = json.load(response)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def usage(self) -> Usage:
        """Return what the server has used since its start."""
        return Usage(*cpu_time(self.pid), *json.loads(self._report.read_text()))

    def port(self, protocol: str) -> int:
        return int(self.ports["grpc_port" if protocol == "riva" else "http_port"])


@dataclass(frozen=True)
class Usage:
    """What a server used: CPU seconds, and rows and steps of the null backend."""

    all: float  # of all processes
    event_loops: float  # of the event loops' threads
    engine: float  # of the engine process, if it has one of its own
    backend: float  # of the null backend, which is part of the others
    rows: int
    steps: int

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(after - before for after, before in zip(astuple(self), astuple(other), strict=True)))


def cpu_time(pid: int) -> tuple[float, float, float]:
    """Return the first three fields of `Usage` for a process and its descendants.

    An event loop runs on the main thread of its process.
    """
    tick = os.sysconf("SC_CLK_TCK")
    processes, total, main, engine = [pid], 0, 0, 0
    for process in processes:
        folder = f"/proc/{process}"
        processes += [int(child) for child in Path(f"{folder}/task/{process}/children").read_text().split()]
        ticks = parse_cpu_ticks(Path(f"{folder}/stat").read_text())
        total += ticks
        if Path(f"{folder}/cmdline").read_text().rstrip("\0").endswith("\0engine"):  # as the supervisor starts it
            engine += ticks
        else:
            main += parse_cpu_ticks(Path(f"{folder}/task/{process}/stat").read_text())
    return total / tick, main / tick, engine / tick


def run_clients(
    server: NullServer, protocol: str, streams: int, packet_ms: int, seconds: float, generators: int = 1
) -> tuple[list[dict[str, Any]], Usage]:
    """Run clients in `generators` processes; return their figures, and what the server used meanwhile.

    Raises `BackendError` if the clients fail.
    """
    command = [sys.executable, "-m", "nemostream.benchmarks.harness.paced_clients"]
    command += ["--protocol", protocol, "--port", str(server.port(protocol)), "--packet-ms", str(packet_ms)]
    command += ["--seconds", str(seconds), "--ramp", str(RAMP_SECONDS)]
    shares = [(streams + index) // generators for index in range(generators)]
    processes = [
        subprocess.Popen(
            [*command, "--streams", str(share)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        for share in shares
        if share
    ]
    try:
        for process in processes:
            _expect(process, "connected")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            _expect(process, "begin")
        before = server.usage()
        for process in processes:
            _expect(process, "end")
        usage = server.usage() - before
        return [json.loads(_line(process)) for process in processes], usage
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if line := process.stdout.readline().strip():
        return line
    _, error = process.communicate()
    lines = error.strip().splitlines() or [f"exit code {process.returncode}"]
    raise BackendError(f"the load generator failed: {lines[-1]}")


def _expect(process: subprocess.Popen[str], line: str) -> None:
    if (found := _line(process)) != line:
        raise BackendError(f"the load generator wrote {found!r}; expected {line!r}.")


def evaluate(results: Sequence[dict[str, Any]], usage: Usage, case: dict[str, Any], step_ms: float) -> Row:
    """Return the row of a number of paced streams: whether they were held, or why not.

    The added latency is the time from the due time of a message, when its last sample is available, to an event from
    its audio, without the `step_ms` that the backend takes.
    """
    latencies = [1000 * each - step_ms for result in results for each in result["latencies"]]
    lateness = [1000 * each for result in results for each in result["lateness"]]
    errors = [error for result in results for error in result["errors"]]
    if not all(result["seconds"] for result in results):  # the clients could not start
        return records.row(case, {}, {"passed": False, "failures": errors[:1]})
    seconds = sum(result["seconds"] for result in results) / len(results)
    messages = sum(result["messages"] for result in results)
    generator_cores = max(result["cpu_seconds"] / result["seconds"] for result in results)
    failures = []
    if not lateness:
        failures.append("no messages")
    elif (late := percentile(lateness, 99)) > MAX_LATENESS_MS or generator_cores > MAX_GENERATOR_CORES:
        failures.append(f"the load generator fell behind (p99 {late:.1f} ms late, {generator_cores:.2f} cores)")
    if errors:
        failures.append(f"{len(errors)} errors, first: {errors[0]}")
    if not latencies:
        failures.append("no events")
    elif (slow := percentile(latencies, 99)) > MAX_ADDED_MS:
        failures.append(f"p99 of the added latency is {slow:.1f} ms")
    values: dict[str, Any] = {
        "passed": not failures,
        "failures": failures,
        "messages_per_second": round(messages / seconds, 1),
        "rows_per_second": round(usage.rows / seconds, 1),
        "events_per_second": round(sum(result["events"] for result in results) / seconds, 1),
        "server_cores": round(usage.all / seconds, 3),
        "event_loop_cores": round(usage.event_loops / seconds, 3),
        "engine_cores": round(usage.engine / seconds, 3),
        "backend_cores": round(usage.backend / seconds, 3),
        "generator_cores": round(generator_cores, 3),
        "rows_per_step": round(usage.rows / max(usage.steps, 1), 1),
    }
    for name, samples in (("added_latency_ms", latencies), ("lateness_ms", lateness)):
        if samples:
            values[name] = {key: round(value, 3) for key, value in records.figures(samples).items()}
    return records.row(case, {}, values)


def search(measure: Measure, first: int, most: int) -> list[Row]:
    """Measure numbers of streams, to find the largest one that is held, up to `most`; return all measured rows.

    From `first`, the numbers are halved until one is held, and then grow by `GROWTH`, as long as they are below all
    that were not held. A number that is not held is measured twice, because other work on the machine may be the
    reason.
    """
    rows: list[Row] = []

    def is_held(number: int) -> bool:
        for _ in range(2):
            rows.append(measure(number))
            if rows[-1]["values"]["passed"]:
                return True
        return False

    held, failed, number = 0, most + 1, max(1, min(first, most))
    while held < number < failed:
        if is_held(number):
            held = number
            number = min(max(held + 1, round(held * GROWTH)), most)
        else:
            failed = number
            number = held or failed // 2
    return rows


def wait_until_idle(server: NullServer, seconds: float = 20.0) -> None:
    """Wait until the server has closed all streams of earlier clients, and does not count as overloaded any more."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['http_port']}/readyz") as response:
            if not json.load(response)["streams"]:
                time.sleep(_OVERLOAD_SECONDS)
                return
        time.sleep(0.1)
    raise BackendError(f"the server did not close the streams of its clients within {seconds:.0f} s.")
