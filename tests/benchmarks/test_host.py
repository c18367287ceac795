"""`bench host`: figures computed by hand with a controlled clock, and a small real run."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemostream.bundle import Bundle
from nemostream.errors import BackendError, OptionError

pytest.importorskip("fastapi", reason="needs the serve extra")
pytest.importorskip("grpc", reason="needs the serve extra")
pytest.importorskip("matplotlib", reason="needs the bench extra")

from nemostream.benchmarks import host, report
from nemostream.benchmarks.harness import host_layers, host_server, records
from nemostream.benchmarks.harness.host_server import NullServer, Usage, evaluate, run_clients, search
from nemostream.benchmarks.harness.plots import Bar, BarChart
from nemostream.benchmarks.serve import parse_step_metrics

CASE = {"paced": "websocket", "chunk_ms": 80, "transports": 0, "streams": 10}


class Ticks:
    """A clock that advances by one at each reading."""

    def __init__(self) -> None:
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return float(self.readings)


# -- layers ------------------------------------------------------------------------------------------------------------


class Answer:
    """A backend and its pending step: it returns what it was given."""

    capacity, max_batch = 7, 5

    def submit(self, batch: Any) -> Any:
        return self

    def result(self) -> Any:
        return self


class Rows:
    def __init__(self, count: int) -> None:
        self.slots = range(count)


def test_step_meter_divides_the_time_of_a_thread() -> None:
    """Two overlapping steps, with a clock that is set by hand."""
    now, landed = [100.0], list[int]()
    meter = host_layers.StepMeter(Answer(), lambda: now[0])  # type: ignore[arg-type]
    meter.on_rows = landed.append
    assert (meter.capacity, meter.max_batch) == (7, 5)

    def after(seconds: float, call: Callable[..., Any], *arguments: Any) -> Any:
        now[0] += seconds
        return call(*arguments)

    first = after(1, meter.submit, Rows(3))  # the first reading of the clock is the start
    second = after(10, meter.submit, Rows(2))  # 10 of assembly
    after(100, first.result)  # 100 of assembly: nothing else happens between `submit` and the wait for a result
    after(1000, meter.on_step, None, 3, 0.5)  # 1000 of landing
    after(10_000, second.result)
    after(100_000, meter.on_step, None, 2, 0.5)
    assert meter.seconds == {"assembly": 10_110, "backend": 0, "landing": 101_000}
    assert (meter.steps, meter.rows, landed) == (2, 5, [3, 2])
    meter.clear()
    assert meter.seconds == {"assembly": 0, "backend": 0, "landing": 0} and (meter.steps, meter.rows) == (0, 0)


def test_time_of_the_backend_is_separate() -> None:
    ticks = Ticks()

    class Slow(Answer):
        def submit(self, batch: Any) -> Any:
            ticks.readings += 10
            return self

        def result(self) -> Any:
            ticks.readings += 100
            return self

    meter = host_layers.StepMeter(Slow(), ticks)  # type: ignore[arg-type]
    meter.submit(Rows(1)).result()
    # Readings: before and after `submit` (11 apart), before (1) and after (101) `result`; the first one starts.
    assert meter.seconds == {"assembly": 1, "backend": 11 + 101, "landing": 0}


def test_sweeps_account_for_the_time_of_the_process(demo_bundle: Bundle) -> None:
    """Every stream gets one chunk per sweep, in full batches; what no layer used is in "other"."""
    process = iter([50.0, 53.0])
    run = host_layers.Sweeps(demo_bundle, 6, 4, thread_clock=lambda: 7.0, process_clock=lambda: next(process))
    chunk, calls = demo_bundle.manifest.chunk(80), list[str]()
    try:
        streams = [run.scheduler.open(host_layers.Chunker(demo_bundle.manifest, chunk)) for _ in range(6)]
        blocks = host_layers.pcm(chunk.samples, 6)

        def accept() -> None:
            calls.append("accept")
            for stream, block in zip(streams, blocks, strict=True):
                run.scheduler.accept(stream, block)

        def collect() -> None:
            calls.append("collect")
            assert [len(run.scheduler.collect(stream)) for stream in streams] == [1] * 6

        parts = run.run(10, accept, collect)
    finally:
        run.close()
    assert calls == ["accept", "collect"] * (10 + host_layers.WARM_UP)
    assert parts == {"accept": 0, "assembly": 0, "backend": 0, "landing": 0, "collect": 0, "other": 50_000}
    assert (run.meter.steps, run.meter.rows, run.rows_per_step) == (20, 60, 3.0)  # 4 and 2 rows, 10 times
    # 15 frames, from frame 37 s of slot s: a token in every third frame of the first 84 of a period of 100.
    places = [[(37 * slot + frame) % 100 for frame in range(15)] for slot in range(6)]
    expected = [sum(place < 84 and place % 3 == 0 for place in each) for each in places]
    assert [len(stream.hypothesis.tokens) for stream in streams] == expected and sum(expected) == 23


def test_streams_receive_different_audio() -> None:
    blocks = host_layers.pcm(1280, 40)
    assert [len(block) for block in blocks] == [1280] * 40
    assert len({block.tobytes() for block in blocks}) == 40
    assert all((block != 0).all() for block in blocks)  # digital silence would not be run


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("run", host.RUNS)
def test_runs_of_the_layers(run: str, asynchronous: bool, demo_bundle: Bundle) -> None:
    measure, arguments = host.RUNS[run]
    parts, rows = measure(demo_bundle, 6, 80, 4, 3, asynchronous=asynchronous, **arguments)
    assert rows == 3.0 and set(parts) == {*host.LAYERS, "backend"}
    assert all(parts[name] > 0 for name in parts if name != "other")


def test_layers_of_the_gpu_backend(demo_bundle: Bundle) -> None:
    """Each part reads the clock once at its begin and once at its end, and the device once in between."""
    parts, rows = host_layers.gpu_backend_layers(demo_bundle, 12, 80, 8, 5, Ticks())
    assert rows == 8.0
    assert parts == {"prepare": 125_000, "launch": 125_000, "read": 125_000}  # one tick for 8 rows


# -- figures -----------------------------------------------------------------------------------------------------------


def test_rows_of_the_layers() -> None:
    row = host.layer_row({"run": "scheduler"}, {"accept": 1.0004, "backend": 5.0, "other": -0.25}, 3.14)
    assert row["values"] == {"us": {"accept": 1.0, "backend": 5.0, "other": -0.25, "total": 0.75}, "rows_per_step": 3.1}


def test_row_of_a_protocol() -> None:
    """The null backend is part of what the processes used, and not of the figures."""
    stages = {
        "receive": (Usage(1.0, 0.9, 0.0, 0.0, 0, 0), 10_000),  # 100 us
        "session": (Usage(3.2, 2.0, 0.0, 0.2, 20_000, 1), 30_000),  # 150 us: a third was not processed
        "all": (Usage(1.9, 1.5, 0.3, 0.1, 10_000, 4000), 12_500),  # 180 us, 20 in the engine process
    }
    row = host.protocol_row({"protocol": "riva"}, stages)
    us = {"receive": 100.0, "session": 50.0, "send": 30.0, "total": 180.0}
    us |= {"event loop": 150.0, "engine process": 20.0, "backend": 10.0}
    assert row["values"] == {"us": us, "rows_per_step": 2.5, "processed": 0.8}
    stages["all"] = Usage(1.9, 1.5, 0.0, 0.1, 0, 0), 10_000  # one process, which ran no step
    values = host.protocol_row({"protocol": "riva"}, stages)["values"]
    assert values["us"]["engine process"] == 0 == values["rows_per_step"] == values["processed"]


def clients(**changes: Any) -> dict[str, Any]:
    figures = {"latencies": [0.012] * 98 + [0.025, 0.4], "lateness": [0.0005] * 100, "errors": []}
    figures |= {"messages": 1250, "events": 100, "seconds": 10.0, "cpu_seconds": 2.0}
    return figures | changes


def test_paced_streams_are_held() -> None:
    row = evaluate([clients(), clients(cpu_seconds=4.0)], Usage(5.0, 4.0, 0.5, 0.2, 70, 20), CASE, 5.0)
    values = row["values"]
    assert row["case"] == CASE and values["passed"] and values["failures"] == []
    assert values["added_latency_ms"]["p50"] == 7.0  # 12 ms, 5 of them in the backend
    assert values["added_latency_ms"]["p99"] == 20.0 and values["added_latency_ms"]["n"] == 200
    assert (values["messages_per_second"], values["events_per_second"]) == (250.0, 20.0)
    names = "server_cores", "event_loop_cores", "engine_cores", "backend_cores", "generator_cores"
    assert [values[name] for name in names] == [0.5, 0.4, 0.05, 0.02, 0.4]
    assert values["rows_per_step"] == 3.5 and values["rows_per_second"] == 7.0 and values["lateness_ms"]["p99"] == 0.5


def test_clients_that_do_not_start() -> None:
    started = clients(seconds=0.0, messages=0, errors=["the server rejected a connection"])
    row = evaluate([clients(), started], Usage(0, 0, 0, 0, 0, 0), CASE, 5.0)
    failures = ["the server rejected a connection"]
    assert row["values"] == {"passed": False, "failures": failures}
    assert host._paced_line(row) == ["websocket", "80 ms", 0, 10, *[""] * 6, f"no: {failures[0]}"]


def test_paced_streams_that_are_not_held() -> None:
    for changes, failures in (
        ({"latencies": [0.012] * 98 + [0.0251] * 2}, ["p99 of the added latency is 20.1 ms"]),
        ({"latencies": []}, ["no events"]),
        ({"errors": ["gone"] * 2400}, ["2400 errors, first: gone"]),
        (
            {"lateness": [0.001] * 98 + [0.0051] * 2},
            ["the load generator fell behind (p99 5.1 ms late, 0.20 cores)"],
        ),
        ({"cpu_seconds": 9.1}, ["the load generator fell behind (p99 0.5 ms late, 0.91 cores)"]),
        ({"lateness": [], "messages": 0}, ["no messages"]),
        ({"lateness": [], "messages": 0, "latencies": []}, ["no messages", "no events"]),
    ):
        values = evaluate([clients(**changes)], Usage(5.0, 4.0, 0, 0, 0, 0), CASE, 5.0)["values"]
        assert not values["passed"] and values["failures"] == failures, changes


@pytest.mark.parametrize(
    ("capacity", "first", "numbers", "found"),
    [
        (140, 100, [100, 125, 156, 156], 125),  # grows
        (70, 100, [100, 100, 50, 62, 78, 78], 62),  # is halved, and grows
        (1000, 100, [100, 125, 156, 195, 200], 200),  # the maximum
        (0, 2, [2, 2, 1, 1], 0),
        (1, 500, [200, 200, 100, 100, 50, 50, 25, 25, 12, 12, 6, 6, 3, 3, 1, 2, 2], 1),
    ],
)
def test_search(capacity: int, first: int, numbers: list[int], found: int) -> None:
    measured: list[int] = []

    def measure(number: int) -> records.Row:
        measured.append(number)
        return records.row({"streams": number}, {}, {"passed": number <= capacity})

    rows = search(measure, first, 200)
    assert measured == numbers and [row["case"]["streams"] for row in rows] == numbers
    assert max((row["case"]["streams"] for row in rows if row["values"]["passed"]), default=0) == found


def test_search_measures_a_failure_again() -> None:
    answers = iter([False, True, False, True, False, False])
    rows = search(lambda n: records.row({"streams": n}, {}, {"passed": next(answers)}), 100, 200)
    assert [row["case"]["streams"] for row in rows] == [100, 100, 125, 125, 156, 156]


def test_summary_takes_the_first_chunk_size() -> None:
    rows = [
        host.layer_row({"run": "scheduler", "chunk_ms": 80}, {"accept": 3.0}, 1.0),
        host.layer_row({"run": "session", "chunk_ms": 80}, {"accept": 8.0}, 1.0),
        host.layer_row({"run": "scheduler", "chunk_ms": 560}, {"accept": 30.0}, 1.0),
    ]
    names = "engine_us_per_stream_step", "full_us_per_stream_step"
    names += "engine_process_us_per_stream_step", "websocket_streams_per_core"
    assert host.summary([]) == dict.fromkeys(names)
    paced = [("riva", 80, 0, 900, True), ("websocket", 80, 0, 300, True), ("websocket", 80, 0, 400, True)]
    paced += [("websocket", 80, 0, 500, False), ("websocket", 560, 0, 900, True)]

    def add(protocol: str, ms: int, transports: int, streams: int, held: bool) -> None:
        case = {"paced": protocol, "chunk_ms": ms, "transports": transports, "streams": streams}
        cores = {"server_cores": 0.8, "engine_cores": 0.3 if transports else 0.0, "backend_cores": 0.1}
        rows.append(records.row(case, {}, {"passed": held, "rows_per_second": 12.5 * streams, **cores}))

    for each in paced:
        add(*each)
    assert host.summary(rows) == dict(zip(names, [3.0, 8.0, None, 500.0], strict=True))  # 400 / 0.8
    add("websocket", 80, 1, 320, True)
    add("websocket", 80, 1, 160, True)
    # The engine process used 0.2 cores besides the backend, for 4000 rows per second: 50 us; 320 / 0.5.
    assert host.summary(rows) == dict(zip(names, [3.0, 8.0, 50.0, 640.0], strict=True))
    assert host.summary(rows[3:4])["websocket_streams_per_core"] is None


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_ramp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_server, "RAMP_SECONDS", 0.2)


def test_cpu_time_includes_descendants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with one child, which has a child; ticks in the fields of `/proc/PID/stat`."""
    proc = {
        "/proc/1/task/1/children": "2 ",
        "/proc/2/task/2/children": "3 ",
        "/proc/3/task/3/children": "",
    }
    commands = {1: "python\0-m\0engine-like\0", 2: "python\0-m\0module\0engine\0", 3: "python\0transport-0\0"}
    for pid, (ticks, main) in {1: (100, 60), 2: (40, 30), 3: (5, 5)}.items():
        for path, number in ((f"/proc/{pid}/stat", ticks), (f"/proc/{pid}/task/{pid}/stat", main)):
            proc[path] = f"{pid} (a) b) S " + " ".join(["0"] * 10) + f" {number - 1} 1 0"
        proc[f"/proc/{pid}/cmdline"] = commands[pid]
    monkeypatch.setattr(host_server, "Path", lambda path: type("File", (), {"read_text": lambda _: proc[path]})())
    monkeypatch.setattr(host_server.os, "sysconf", lambda name: 100)
    assert host_server.cpu_time(1) == (1.45, 0.65, 0.4)
    assert Usage(3.0, 2.0, 1.0, 0.5, 9, 4) - Usage(1.0, 0.5, 0.25, 0.5, 5, 1) == Usage(2.0, 1.5, 0.75, 0.0, 4, 3)


def test_cpu_time_of_this_process() -> None:
    total, event_loops, engine = host_server.cpu_time(os.getpid())
    assert 0 < event_loops < total + 0.1 and engine == 0  # the system rounds both to ticks


@pytest.mark.usefixtures("short_ramp")
def test_clients_of_each_protocol(demo_bundle: Bundle) -> None:
    """The server answers all protocols with events of the null backend, and reports that backend's time."""
    with NullServer(demo_bundle, 80) as server:
        for protocol, generators in zip(host.PROTOCOLS, (2, 1, 1), strict=True):
            results, usage = run_clients(server, protocol, 3, 80, 1.0, generators)
            assert len(results) == generators
            for result in results:
                assert result["errors"] == [] and result["events"] == len(result["latencies"]) > 0
                assert result["messages"] == len(result["lateness"]) > 0 and result["seconds"] >= 1.0
            assert usage.engine == 0 and usage.rows >= usage.steps > 0
            host_server.wait_until_idle(server)


@pytest.mark.usefixtures("short_ramp")
def test_server_of_several_processes(demo_bundle: Bundle) -> None:
    """The null backend runs in the engine process, and that process's time is known."""
    with NullServer(demo_bundle, 80, options=["--transports", "2"]) as server:
        results, usage = run_clients(server, "websocket", 4, 80, 1.0)
        assert results[0]["errors"] == [] and results[0]["events"] > 0
        assert usage.rows >= usage.steps > 0
        total = server.usage()
        assert total.engine > total.backend > 0


@pytest.mark.usefixtures("short_ramp")
@pytest.mark.parametrize(("stage", "steps"), [("receive", False), ("session", True)])
def test_stages_without_events(stage: str, steps: bool, demo_bundle: Bundle) -> None:
    """No stage but the last one returns events, and the first one runs no step of a client."""
    with NullServer(demo_bundle, 80, stage=stage) as server:
        before = _steps(server)
        results, _ = run_clients(server, "websocket", 2, 80, 1.0)
        assert results[0]["events"] == 0 and results[0]["messages"] > 0 and results[0]["errors"] == []
        assert (_steps(server) > before) == steps


def _steps(server: NullServer) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['http_port']}/metrics") as response:
        return parse_step_metrics(response.read().decode())[0]


def test_failures_of_processes(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(BackendError, match=r"^the server did not start: .*max.streams"),
        NullServer(demo_bundle, 80, options=["--max-streams", "0"]),
    ):
        pass
    server = NullServer(demo_bundle, 80)
    server.ports = {"http_port": 1}  # nothing listens there
    monkeypatch.setattr(server, "usage", lambda: Usage(0, 0, 0, 0, 0, 0))
    results, _ = run_clients(server, "websocket", 1, 80, 1.0)
    assert "refused" in results[0]["errors"][0] and results[0]["seconds"] == 0
    with pytest.raises(BackendError, match=r"^the load generator failed: paced_clients.py: error: .*carrier"):
        run_clients(server, "carrier", 1, 80, 1.0)
    failing = subprocess.Popen(["false"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(BackendError, match=r"^the load generator failed: exit code 1$"):
        host_server._line(failing)


@pytest.mark.usefixtures("short_ramp")
def test_benchmark(demo_bundle: Bundle, tmp_path: Path) -> None:
    result = host.measure_host(
        demo_bundle,
        8,
        [80],
        max_batch=4,
        sweeps=2,
        protocols=["websocket"],
        transports=[0],
        clients=2,
        max_clients=2,
        seconds=0.5,
    )
    kinds = [next(iter(row["case"])) for row in result["rows"]]
    assert kinds[:6] == ["run"] * 5 + ["protocol"] and set(kinds[6:]) == {"paced"}
    assert result["engine_us_per_stream_step"] == result["rows"][0]["values"]["us"]["total"] > 0
    assert result["full_us_per_stream_step"] == result["rows"][3]["values"]["us"]["total"] > 0
    assert result["method"]["asynchronous"] and result["hardware"]["cores"] >= 1 and result["versions"]["numpy"]
    records.write(result, tmp_path / "host.json")
    read = records.read(tmp_path / "host.json")
    assert read == result
    text, _ = report.write_report([read], tmp_path / "host.md")
    for line in ("| 80 ms | 8 | scheduler | 4.0 |", "| 80 ms | 4.0 |", "| websocket | 80 ms | 0 | 2 |"):
        assert line in text, line
    assert (tmp_path / "host-layers.png").read_bytes().startswith(b"\x89PNG")


class FakeServer:
    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *error: object) -> None: ...


def measured_with(results: list[dict[str, Any]], bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> records.Record:
    """Return the result if all clients measure `results` and the server used no CPU time."""
    monkeypatch.setattr(host, "RUNS", {})
    monkeypatch.setattr(host, "NullServer", FakeServer)
    monkeypatch.setattr(host, "wait_until_idle", lambda server: None)
    monkeypatch.setattr(host, "run_clients", lambda *arguments: (results, Usage(0, 0, 0, 0, 0, 0)))
    return host.measure_host(
        bundle, 8, [80], max_batch=4, sweeps=1, protocols=["realtime"], transports=[0], clients=2, max_clients=3
    )


def test_errors_of_the_clients_of_a_protocol(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [clients(errors=["gone"]), clients(errors=["full"] * 2399)]
    with pytest.raises(BackendError, match=r"^2400 errors of the realtime clients, first: gone$"):
        measured_with(results, demo_bundle, monkeypatch)


def test_clients_of_a_protocol_that_send_nothing(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured_with([clients(messages=0, lateness=[])], demo_bundle, monkeypatch)["rows"]
    protocol, *paced = (row for row in rows if "run" not in row["case"])
    assert protocol["values"]["processed"] == 0 and set(protocol["values"]["us"].values()) == {0}
    assert [row["case"]["streams"] for row in paced] == [3, 3, 1, 1]
    assert all(row["values"]["failures"] == ["no messages"] for row in paced)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 0}, "streams is 0; it must be at least 1"),
        ({"clients": -1}, "clients is -1; it must be at least 1"),
        ({"generators": 0}, "generators is 0; it must be at least 1"),
        ({"seconds": 0}, "seconds is 0; it must be positive"),
        ({"step_ms": -1.0}, "step_ms is -1.0; it must not be negative"),
        ({"transports": [0, -1]}, r"transports is \[0, -1\]; a number of processes must not be negative"),
        ({"chunk_ms": []}, "chunk_ms is empty; give at least one chunk size"),
        ({"chunk_ms": [81]}, "81"),
        ({"protocols": ["carrier"]}, "no protocol 'carrier'; the protocols are websocket, riva, realtime"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str, demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match=message):
        host.measure_host(demo_bundle, **options)


def test_negative_figures_are_shown() -> None:
    """A difference of two runs may be below zero, and is not hidden."""
    one, two = ((Usage(seconds, 0, 0, 0, 1_000_000, 1), 1_000_000) for seconds in (1, 4))
    row = host.protocol_row({"protocol": "riva"}, {"receive": two, "session": one, "all": one})
    assert host._us(row, "session") == "−3.00" and host._us(row, "send") == "0" and host._us(row, "none") == ""


def test_plot_of_the_layers() -> None:
    """A bar for each run and chunk size; a difference below zero has no length, but is part of the total."""
    rows = []
    for run, ms, other in (("scheduler", 80, -1.0), ("session", 560, 4.0)):
        us = {"accept": 1.0, "assembly": 2.0, "landing": 3.0, "collect": 0.5, "other": other}
        values = {"us": us | {"total": sum(us.values())}}
        rows.append(records.row({"chunk_ms": ms, "streams": 8, "run": run}, {}, values))
    rows.append(records.row({"chunk_ms": 80, "streams": 8, "run": "device"}, {}, {"us": {"total": 99.0}}))
    chart = host.charts(records.record("host", rows, model={}, method={}))["layers"]
    assert isinstance(chart, BarChart)
    assert chart.rows == ["scheduler, 80 ms", "session, 560 ms"] and chart.parts == host.LAYERS
    assert chart.panels[0].bars == [
        Bar([1.0, 2.0, 3.0, 0.5, 0.0], "5.50 µs"),
        Bar([1.0, 2.0, 3.0, 0.5, 4.0], "10.5 µs"),
    ]
    assert chart.title.endswith("the host needs 5.50 to 10.5 µs of CPU time per stream and step")
    assert host.charts(records.record("host", rows[2:], model={}, method={})) == {}
