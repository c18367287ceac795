"""Figures of the serve benchmark on known measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream import Endpoint
from nemostream.benchmarks import serve
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.paced_streams import Recording, RunResult, StreamResult
from nemostream.benchmarks.harness.plots import CurveChart
from nemostream.bundle import Bundle
from nemostream.errors import OptionError


def test_metrics_of_steps() -> None:
    """Summed over the labels; buckets and other metrics do not count."""
    text = """# HELP nemostream_step_streams Streams of a step.
nemostream_step_streams_bucket{le="1"} 5.0
nemostream_step_streams_count{chunk="80",model="a b"} 10.0
nemostream_step_streams_sum{chunk="80"} 25.0
nemostream_step_streams_count{chunk="560"} 2.0
nemostream_step_streams_sum{chunk="560"} 4.5
nemostream_step_seconds_count 12.0
nemostream_step_seconds_sum 0.75
nemostream_streams 3.0
"""
    assert serve.parse_step_metrics(text) == (12.0, 29.5, 0.75)


def test_clips_are_16_bit_samples(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "speech", lambda manifest: [np.array([-2.0, -1.0, -0.5 / 32768, 0.6 / 32768, 0.5, 1.0])])
    (clip,) = serve.pcm_clips(demo_bundle)
    assert clip.dtype == np.int16 and clip.tolist() == [-32768, -32768, 0, 1, 16384, 32767]


CASE = {"streams": 2, "chunk_ms": 560, "packet_ms": 100}
RECORDINGS = [Recording(b"", 1.5)]


def run_result(finals: Sequence[float] = (0.1,) * 100, text: str = "one", **changes: Any) -> RunResult:
    """Streams of a recording of 1.5 s, whose results end `finals` seconds after their audio."""
    streams = [StreamResult(0, 3.0, 4.5, [(4.5, text)], ended=4.5 + final) for final in finals]
    passing = {"lateness": [0.001] * 100, "audio_seconds": 20.04, "cpu_seconds": 1.2361, "max_open": 2}
    return RunResult(streams, **(passing | changes))


def evaluate(results: RunResult, seconds: float = 10.0, **case: Any) -> records.Row:
    return serve.evaluate(results, RECORDINGS, ["one"], CASE | case, seconds, 0.51234)


@pytest.mark.parametrize(
    ("results", "failure"),
    [
        (run_result([0.1] * 98 + [0.76, 5.0]), None),  # one chunk and 200 ms
        (run_result([0.1] * 98 + [0.761] * 2), "p99 of the final text is 761 ms"),
        (run_result(lateness=[0.0] * 98, blocked=[0.1, 5.0]), None),  # one packet
        (run_result(lateness=[0.0] * 98, blocked=[0.1001] * 2), "the clients fell behind"),
        (run_result([0.1] * 3, "two"), "3 texts differ from the offline transcripts"),
        (run_result(max_open=1), "only 1 connections were open at the same time"),
        (run_result([]), "no results"),
    ],
)
def test_failures(results: RunResult, failure: str | None) -> None:
    values = evaluate(results)["values"]
    assert values["failures"] == ([failure] if failure else []) and values["passed"] == (failure is None)


def test_streams_that_fail_are_errors_without_text() -> None:
    results = run_result([0.1] * 3)
    results.streams[1].error, results.streams[1].texts = "gone", []
    values = evaluate(results)["values"]
    assert values["failures"] == ["1 errors, first: gone"] and (values["utterances"], values["wrong"]) == (2, 0)


def test_streams_of_the_first_seconds_are_not_timed() -> None:
    """Their texts are compared."""
    early = StreamResult(0, 2.99, 4.49, [(4.5, "two")], ended=9.0)
    results = run_result([0.1])
    results.streams.append(early)
    row = evaluate(results)
    assert row["ms"] == {"final text": [pytest.approx(100.0)]} and row["values"]["wrong"] == 1


def test_figures_of_a_row() -> None:
    row = evaluate(run_result([0.1, 0.3], lateness=[0.002], blocked=[0.004]), 10.016)
    assert row["case"] == CASE and row["ms"] == {"final text": [100.0, 300.0]}
    assert row["values"] == {
        "passed": True,
        "failures": [],
        "seconds": 10.02,
        "utterances": 2,
        "wrong": 0,
        "audio_seconds": 20.0,
        "rtfx": 20.04 / 10.016,
        "server_cores": 0.512,
        "client_cores": 0.123,
        "lateness_ms": records.figures([2.0, 4.0]),
    }


def test_table_headline_and_plot() -> None:
    rows = []
    for streams, seconds, text in ((4, [0.1, 0.2, 0.3], "one"), (2, [0.2], "one"), (8, [0.4], "two")):
        row = evaluate(run_result(seconds, text, max_open=streams), streams=streams)
        row["values"]["mean_batch"] = 1.25 * streams
        rows.append(row)
    rows.append(evaluate(run_result([])))
    method = {"recordings": 7, "packet_ms": 100, "seconds": 30.0, "threads": 2, "other_work_cores": 0.05}
    result = records.record("serve", rows, model={"name": "m", "layers": 3, "d_model": 4}, method=method)
    result["hardware"] |= {"cores": 2, "cpu": "CPU"}
    lines = serve.show(result).splitlines()
    assert lines[0] == (
        "**4 WebSocket streams** with 560 ms chunks: 3 layers, d_model 4, all texts equal to the offline transcripts, "
        "final text 200 ms (p99 300 ms) after the last audio. Clients and server together on 2 cores of CPU."
    )
    assert lines[2] == (
        "Time in milliseconds from the last audio of an utterance to its final text. 7 recordings, 100 ms of audio per "
        "message, 30 s per row; clients and server on the same 2 cores. Other processes used 0.05 cores."
    )
    assert lines[6:] == [
        "| 4 | 560 ms | 3 | 0 | 200 | 200 | 300 | 300 | 0.51 | 0.12 | 5.0 | yes |",
        "| 2 | 560 ms | 1 | 0 | 200 | 200 | 200 | 200 | 0.51 | 0.12 | 2.5 | yes |",
        "| 8 | 560 ms | 1 | 1 | 400 | 400 | 400 | 400 | 0.51 | 0.12 | 10.0 "
        "| no: 1 texts differ from the offline transcripts |",
        "| 2 | 560 ms | 0 | 0 |  |  |  |  | 0.51 | 0.12 |  | no: no results |",
    ]
    chart = serve.charts(result)["final"]
    assert isinstance(chart, CurveChart)
    assert chart.title == "4 WebSocket streams: the final text comes 200 ms (p99 300 ms) after the last audio"
    (panel,) = chart.panels
    assert panel.limit == 760
    lines_drawn = {curve.label: curve.points for curve in panel.curves if curve.label}
    assert lines_drawn["p99"] == [(2, 200.0), (4, 300.0), (8, 400.0)] and lines_drawn["p50"][1] == (4, 200.0)
    marks = [(curve.style, curve.points) for curve in panel.curves if not curve.label and curve.series == 0]
    assert marks == [("points", [(2, 200.0), (4, 300.0)]), ("crosses", [(8, 400.0)])]
    result["rows"] = rows[2:]
    assert serve.headline(result) == ""
    assert serve.charts(result)["final"].title == "No number of clients passed"
    assert serve.charts(result | {"rows": rows[3:]}) == {}


def test_measurement_of_a_server(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores are CPU seconds by elapsed seconds, batches are rows by steps, of each number of clients."""
    commands, log = list[Any](), list[str]()
    cpu = [7.0]
    metrics = [(10.0, 20.0, 1.0)]

    @contextlib.contextmanager
    def server_process(command: Any) -> Iterator[tuple[Any, str]]:
        commands.append(command)
        yield SimpleNamespace(pid=42), "http://host:1"
        log.append("ended")

    def cpu_seconds(pid: int) -> float:
        assert pid == 42
        return cpu[0]

    async def run_clients(url: str, sent: Any, streams: int, seconds: float, packet: float) -> RunResult:
        assert (url, sent, seconds, packet) == ("http://host:1", recordings, 30.0, 0.02)
        clock.sleep(40.0)
        cpu[0] += 60.0 / streams
        steps, rows, step_seconds = metrics[-1]
        metrics.append((steps + 100, rows + 100 * streams, step_seconds + 1.23456) if streams < 9 else metrics[-1])
        return run_result(text="text 0", max_open=streams, audio_seconds=80.0, cpu_seconds=10.0 / streams)

    class OtherWork:
        def cores(self) -> float:
            assert log == ["ended"]  # its CPU time is known
            return 0.0567

    results = iter(range(9))

    def listen(clip: Any, endpoint: Any) -> list[Any]:
        assert endpoint == Endpoint()
        texts = [("partial", "no"), ("final", "text"), ("final", str(next(results)))]
        return [SimpleNamespace(kind=kind, text=text) for kind, text in texts]

    model = SimpleNamespace(listen=listen)
    loaded: list[Any] = []

    def load(path: Any, ms: int, capacity: int) -> Any:
        loaded.append((path, ms))
        return contextlib.nullcontext(model)

    monkeypatch.setattr(serve.nemostream, "load", load)
    clips = [np.arange(8000, dtype=np.int16), np.zeros(16000, np.int16)]
    recordings = [Recording(clips[0].tobytes(), 0.5), Recording(bytes(32000), 1.0)]
    monkeypatch.setattr(serve, "pcm_clips", lambda bundle, manifest: clips)
    monkeypatch.setattr(serve, "server_process", server_process)
    monkeypatch.setattr(serve, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(serve, "cpu_seconds", cpu_seconds)
    monkeypatch.setattr(serve, "_step_metrics", lambda url: metrics[-1])
    monkeypatch.setattr(serve, "_run_clients", run_clients)
    monkeypatch.setattr(serve, "OtherWork", OtherWork)
    result = serve.measure_serving(demo_bundle, [3, 2, 9], 160, seconds=30.0, packet_ms=20, options=["--threads", "1"])
    assert loaded == [(demo_bundle.path, 160)] and result["benchmark"] == "serve"
    ((_, *command),) = commands
    expected = {"--bundle": str(demo_bundle.path), "--chunk-ms": "160", "--chunks": "160", "--port": "0"}
    expected |= {"--grpc-port": "-1", "--max-streams": "18", "--threads": "1"}
    assert command[:3] == ["-m", "nemostream", "serve"] and "--no-measure" in command
    assert {name: command[command.index(name) + 1] for name in expected} == expected
    three, two, nine = result["rows"]
    assert three["values"]["wrong"] == 0 and three["case"] == {"streams": 3, "chunk_ms": 160, "packet_ms": 20}
    assert (three["values"]["server_cores"], three["values"]["client_cores"]) == (0.5, 0.083)
    assert (three["values"]["seconds"], three["values"]["rtfx"]) == (40.0, 2.0)
    assert (three["values"]["mean_batch"], three["values"]["step_ms"]) == (3.0, 12.35)
    assert (two["values"]["server_cores"], two["values"]["mean_batch"]) == (0.75, 2.0)
    assert "mean_batch" not in nine["values"]  # no steps
    assert result["method"] == {
        "threads": records.cores(),
        "device": "cpu",
        "seconds": 30.0,
        "packet_ms": 20,
        "recordings": 2,
        "grace_ms": 200,
        "options": ["--threads", "1"],
        "other_work_cores": 0.057,
    }


@pytest.mark.parametrize("options", [{"streams": []}, {"streams": [0]}, {"seconds": 3.0}, {"packet_ms": 0}])
def test_invalid_options(options: dict[str, Any], demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="must be positive, and seconds greater than 3"):
        serve.measure_serving(demo_bundle, **options)
