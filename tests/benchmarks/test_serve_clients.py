"""Clients of the serve benchmark against a server that answers at known times, and the figures of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream import Endpoint
from nemostream.benchmarks import serve
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.plots import CurveChart
from nemostream.bundle import Bundle
from nemostream.errors import OptionError

websockets = pytest.importorskip("websockets.asyncio.client", reason="needs the serve extra")


class Socket:
    """A connection whose server takes `sending` seconds per message and answers `answer` seconds after "finish"."""

    def __init__(self, clock: Any, sending: float, answer: float, events: list[dict[str, Any]]) -> None:
        self.clock, self.sending, self.answer, self.events = clock, sending, answer, events
        self.received: list[tuple[float, Any]] = []
        self.close_code = 1013

    async def __aenter__(self) -> Socket:
        self.clock.sleep(0.5)  # connecting is not timed
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def recv(self) -> str:
        return "{}"

    async def send(self, message: Any) -> None:
        self.received.append((self.clock.now, message))
        self.clock.sleep(self.sending)

    async def __aiter__(self) -> AsyncIterator[str]:
        self.clock.sleep(self.answer)
        for event in self.events:
            yield json.dumps(event)


@pytest.fixture
def connect(clock: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Socket]]:
    """Return a function that prepares connections; they are used in turn."""

    async def sleep(seconds: float) -> None:
        clock.sleep(seconds)

    monkeypatch.setattr(serve, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(serve, "asyncio", SimpleNamespace(sleep=sleep))

    def prepare(*sockets: tuple[float, float, list[dict[str, Any]]]) -> list[Socket]:
        prepared = [Socket(clock, *each) for each in sockets]
        unused = iter(prepared)

        def open_socket(url: str, **options: Any) -> Socket:
            assert url == "ws://host/v1/stream"
            return next(unused)

        monkeypatch.setattr(websockets, "connect", open_socket)
        return prepared

    return prepare


DONE = [{"type": "partial", "text": "o"}, {"type": "done", "text": "one"}]
CLIP = np.arange(4000, dtype=np.int16)  # 250 ms


def test_final_text_is_timed_from_the_time_the_last_audio_is_due(clock: Any, connect: Any) -> None:
    """Messages of 100 ms are due at 100 and 200 ms, and the last 50 ms at 250 ms; the text arrives at 300 ms."""
    (socket,) = connect((0.0, 0.05, DONE))
    results = serve.ClientResults()
    found = asyncio.run(serve._send_clip("ws://host/v1/stream", CLIP, results, 0.1))
    assert found == ("one", pytest.approx(0.05))
    *audio, (finished, last) = [(round(1000 * (at - 1000.5), 6), message) for at, message in socket.received]
    assert [at for at, _ in audio] == [100.0, 200.0, 250.0] and json.loads(last) == {"type": "finish"}
    assert finished == 250.0
    assert np.array_equal(np.frombuffer(b"".join(message for _, message in audio), np.int16), CLIP)
    assert results.lateness == pytest.approx([0.0] * 3) and results.audio_seconds == 0.25
    assert (results.connections, results.max_connections) == (0, 1)


def test_late_messages_are_measured(clock: Any, connect: Any) -> None:
    """Sending takes 130 ms: the second message is 30 ms late, the third 110 ms. The text is timed from 250 ms."""
    connect((0.13, 0.05, DONE))
    results = serve.ClientResults()
    _, final = asyncio.run(serve._send_clip("ws://host/v1/stream", CLIP, results, 0.1))
    assert results.lateness == pytest.approx([0.0, 0.03, 0.11])
    assert final == pytest.approx(0.1 + 4 * 0.13 + 0.05 - 0.25)


@pytest.mark.parametrize(
    ("events", "message"),
    [([{"type": "error", "message": "full"}], "full"), ([{"type": "partial"}], r"closed the connection \(code 1013\)")],
)
def test_errors_of_the_server(events: list[dict[str, Any]], message: str, clock: Any, connect: Any) -> None:
    connect((0.0, 0.0, events))
    results = serve.ClientResults()
    results.connections = 4
    with pytest.raises(RuntimeError, match=message):
        asyncio.run(serve._send_clip("ws://host/v1/stream", CLIP, results, 0.1))
    assert (results.connections, results.max_connections) == (4, 5)


def test_a_client_sends_clips_until_the_end(clock: Any, connect: Any) -> None:
    """Clips of 0.25 s after connections of 0.5 s; those that start in the first three seconds are not timed."""
    # They start at 1002, 1002.76, 1003.51 (fails, waits a second), 1005.26, 1006.01, 1006.76 (wrong text).
    wrong = [{"type": "done", "text": "two"}]
    failing = [{"type": "error", "message": "full"}]
    answers = [(0.0, 0.01, DONE), (0.0, 0.0, DONE), (0.0, 0.0, failing), (0.0, 0.02, DONE), (0.0, 0.03, wrong)]
    sockets = connect(*answers, (0.0, 0.0, DONE))
    results, rng = serve.ClientResults(), np.random.default_rng(0)
    begin, start, end = 1001.0, 1002.0, 1006.2
    asyncio.run(serve._client("http://host", [CLIP], ["one"], results, start, begin, end, 0.1, rng))
    assert results.finals == pytest.approx([0.02, 0.03])
    assert results.wrong == [("one", "two")]
    assert results.errors == ["RuntimeError: full"]
    assert [bool(socket.received) for socket in sockets] == [True] * 5 + [False]
    assert results.audio_seconds == 1.25


def test_clips_are_drawn_at_random_with_their_texts(clock: Any, connect: Any) -> None:
    connect(*[(0.0, 0.0, [{"type": "done", "text": "b"}])] * 12)
    results, clips = serve.ClientResults(), [np.zeros(160, np.int16), np.zeros(320, np.int16)]
    rng = np.random.default_rng(3)
    asyncio.run(serve._client("http://host", clips, ["a", "b"], results, 1000.0, 0.0, 1006.0, 0.1, rng))
    drawn = np.random.default_rng(3).integers(2, size=12)
    assert len(results.finals) == 12 and len(results.wrong) == (drawn == 0).sum() > 0
    assert results.audio_seconds == pytest.approx(0.01 * (drawn == 0).sum() + 0.02 * (drawn == 1).sum())


# -- the server --------------------------------------------------------------------------------------------------------


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


def client_results(**changes: Any) -> serve.ClientResults:
    passing = {"finals": [0.1] * 100, "lateness": [0.001] * 100, "audio_seconds": 20.04, "max_connections": 2}
    return serve.ClientResults(**(passing | changes))


def test_limits() -> None:
    """One chunk and 200 ms to the final text, one packet of lateness: the limits themselves pass."""
    for changes in ({"finals": [0.1] * 98 + [0.76, 5.0]}, {"lateness": [0.0] * 98 + [0.1, 5.0]}):
        assert serve.evaluate(client_results(**changes), CASE, 10.0, 0.5, 0.1)["values"]["passed"], changes
    for changes in ({"finals": [0.1] * 98 + [0.7601] * 2}, {"lateness": [0.0] * 98 + [0.1001] * 2}):
        assert not serve.evaluate(client_results(**changes), CASE, 10.0, 0.5, 0.1)["values"]["passed"], changes


def test_figures_of_a_row() -> None:
    row = serve.evaluate(client_results(finals=[0.1, 0.3], lateness=[0.002, 0.004]), CASE, 10.016, 0.51234, 0.12341)
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
    for streams, seconds, wrong in ((4, [0.1, 0.2, 0.3], []), (2, [0.2], []), (8, [0.4], [("one", "two")])):
        found = client_results(finals=seconds, wrong=wrong, max_connections=streams)
        row = serve.evaluate(found, CASE | {"streams": streams}, 10.0, 0.4, 0.126)
        row["values"]["mean_batch"] = 1.25 * streams
        rows.append(row)
    rows.append(serve.evaluate(client_results(finals=[]), CASE, 10.0, 0.4, 0.1))
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
        "| 4 | 560 ms | 3 | 0 | 200 | 200 | 300 | 300 | 0.40 | 0.13 | 5.0 | yes |",
        "| 2 | 560 ms | 1 | 0 | 200 | 200 | 200 | 200 | 0.40 | 0.13 | 2.5 | yes |",
        "| 8 | 560 ms | 1 | 1 | 400 | 400 | 400 | 400 | 0.40 | 0.13 | 10.0 "
        "| no: 1 texts differ from the offline transcripts |",
        "| 2 | 560 ms | 0 | 0 |  |  |  |  | 0.40 | 0.10 |  | no: no results |",
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
    process_time = [50.0]
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

    async def run_clients(
        url: str, clips: Any, texts: Any, streams: int, seconds: float, packet: float
    ) -> serve.ClientResults:
        assert (url, len(clips), texts, seconds, packet) == ("http://host:1", 2, ["text 0", "text 1"], 30.0, 0.02)
        clock.sleep(40.0)
        cpu[0] += 60.0 / streams
        process_time[0] += 10.0 / streams
        steps, rows, step_seconds = metrics[-1]
        metrics.append((steps + 100, rows + 100 * streams, step_seconds + 1.23456) if streams < 9 else metrics[-1])
        return client_results(max_connections=streams, audio_seconds=80.0)

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
    monkeypatch.setattr(serve, "pcm_clips", lambda bundle, manifest: ["a", "b"])
    monkeypatch.setattr(serve, "server_process", server_process)
    times = SimpleNamespace(perf_counter=clock, process_time=lambda: process_time[0])
    monkeypatch.setattr(serve, "time", times)
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
    assert three["case"] == {"streams": 3, "chunk_ms": 160, "packet_ms": 20}
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


def test_clients_start_at_random(monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
    """Within two seconds or a quarter of the test, after half a second; all end at the same time."""
    starts: list[tuple[float, ...]] = []

    async def client(
        url: str, clips: Any, texts: Any, results: Any, start: float, begin: float, end: float, packet: float, rng: Any
    ) -> None:
        assert (url, clips, texts) == ("url", ["clip"], ["text"])
        starts.append((start - begin, begin, end, packet, float(rng.random())))

    monkeypatch.setattr(serve, "_client", client)
    monkeypatch.setattr(serve, "time", SimpleNamespace(perf_counter=clock))
    for seconds, latest in ((4.0, 1.0), (60.0, 2.0)):
        starts.clear()
        asyncio.run(serve._run_clients("url", ["clip"], ["text"], 50, seconds, 0.1))
        offsets = [offset for offset, *_ in starts]
        assert 0 <= min(offsets) < 0.2 * latest and 0.8 * latest < max(offsets) < latest
        assert {(begin, end, packet) for _, begin, end, packet, _ in starts} == {(1000.5, 1000.5 + seconds, 0.1)}
        assert len({drawn for *_, drawn in starts}) == 50  # other clips for each client
