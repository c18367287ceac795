"""Traces and metrics for OpenTelemetry: in memory, and of servers that send them to a collector over HTTP and gRPC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream.client import Event, Stream
from nemostream.errors import BackendError, OptionError
from nemostream.runtime.streaming.items import WorkItem
from nemostream.runtime.streaming.state import StepTimes, StreamTrace
from nemostream.serving.client import UNKNOWN_CLIENT, Client
from nemostream.serving.metrics import Metrics

pytest.importorskip("opentelemetry.sdk", reason="needs the otel extra")
pytest.importorskip("opentelemetry.proto", reason="needs the otel extra")

from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nemostream.serving import otel

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


# -- spans in memory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(memory: InMemorySpanExporter) -> otel.Tracing:
    return otel.Tracing(SimpleSpanProcessor(memory))


class Clock:
    """The clock of `otel` and of the trace of a stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("nemostream.runtime.streaming.state.time.perf_counter", lambda: self.now)

    def to(self, seconds: float) -> None:
        self.now = 1000.0 + seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Traced:
    """A stream of 80 ms chunks at 16 kHz, whose steps the test runs."""

    def __init__(self, tracing: otel.Tracing, clock: Clock, fakes: Any) -> None:
        found = tracing.open(UNKNOWN_CLIENT, 16000, "test", {"stream": "abc", "final_chunk_ms": None})
        assert found is not None
        self.spans, self.trace, self.clock, self.fakes = found, StreamTrace(), clock, fakes
        self.spans.attach(self.trace)
        self.chunk, self.number = nemostream.Bundle.open(nemostream.demo_bundle()).manifest.chunk(80), 0

    def step(self, ready: float, started: float, ended: float, streams: int = 1) -> None:
        self.number += 1
        item = WorkItem("run", self.chunk, 1280 * self.number)
        self.clock.to(ready)
        before = 0.08 * (self.number - 1)
        self.spans.received(before, before + 0.08)
        self.trace.enqueued([item])
        self.trace.ran(item, StepTimes(1000 + started, 1000 + ended, streams))
        self.clock.to(ended)

    def add(self, *events: Any) -> None:
        self.spans.add(events, 1280 * self.number)

    def event(self, kind: str, start: float, end: float = 0.0, text: str = "one two", **fields: Any) -> Any:
        return self.fakes.event(kind, text, start=start, end=end, **fields)


@pytest.fixture
def traced(tracing: otel.Tracing, clock: Clock, fakes: Any) -> Traced:
    return Traced(tracing, clock, fakes)


def attributes(span: Any) -> dict[str, Any]:
    return {name.removeprefix("nemostream."): value for name, value in span.attributes.items()}


def test_the_times_of_an_utterance(traced: Traced, memory: InMemorySpanExporter) -> None:
    traced.step(0.08, 0.09, 0.10)  # silence
    traced.add()
    traced.step(0.16, 0.17, 0.20, streams=3)  # the first token: 0.10 s
    traced.add(traced.event("partial", 0.10, 0.12))
    traced.step(0.24, 0.30, 0.34, streams=5)
    traced.add(traced.event("partial", 0.10, 0.20))
    traced.step(0.32, 0.33, 0.36, streams=4)  # was ready before the step before it ended
    final, end = traced.event("final", 0.10, 0.22, utterance=4), traced.event("end", 0.30, text="", reason="silence")
    traced.clock.to(0.40)
    traced.add(final, end)
    traced.spans.close(None, 0.32)
    utterance, stream = memory.get_finished_spans()
    assert (utterance.name, stream.name) == ("utterance", "stream")
    assert utterance.parent.span_id == stream.context.span_id and stream.parent is None
    found = attributes(utterance)
    assert found.pop("queue_seconds") == pytest.approx(0.01 + 0.06 + 0.0)  # the third waited for its predecessor
    assert found.pop("step_seconds") == pytest.approx(0.03 + 0.04 + 0.02)
    assert found.pop("final_latency_seconds") == pytest.approx(0.40 - 0.24)  # 0.22 s arrived with the third chunk
    assert found.pop("language") is not None
    assert found == {
        "protocol": "test",
        "utterance": 4,
        "chunk_ms": 160,
        "audio_start_seconds": 0.10,
        "audio_end_seconds": 0.22,
        "words": 2,
        "end_reason": "silence",
        "steps": 3,
        "mean_step_streams": 4.0,
    }
    assert (utterance.end_time - utterance.start_time) / 1e9 == pytest.approx(0.40 - 0.16, abs=1e-6)
    assert attributes(stream) == {
        "protocol": "test",
        "stream": "abc",
        "audio_seconds": 0.32,
        "steps": 4,
        "utterances": 1,
    }


def test_chunks_between_two_ends_of_one_message(traced: Traced, memory: InMemorySpanExporter) -> None:
    """Several chunks are collected at once: each belongs to the utterance that ended with it or after it."""
    for number in range(10):
        traced.step(0.1, 0.1 + 0.1 * number, 0.2 + 0.1 * number)
    # The end of the first is in the third chunk; <EOU> of the second is in the frame at 0.52 s, in the seventh.
    one = [traced.event("final", 0.0, 0.1), traced.event("end", 0.20, text="", reason="silence")]
    two = [traced.event("final", 0.41, 0.5), traced.event("end", 0.60, text="", reason="model")]
    traced.add(*one, *two, traced.event("partial", 0.73, 0.75))  # the last chunk
    traced.step(1.2, 1.3, 1.4)
    traced.add(traced.event("final", 0.73, 0.8), traced.event("end", 0.88, text="", reason="finish"))
    assert [attributes(span)["steps"] for span in memory.get_finished_spans()] == [3, 2, 2]
    traced.spans.close("the client disconnected", 0.88)
    stream = memory.get_finished_spans()[-1]
    assert attributes(stream)["steps"] == 11 and attributes(stream)["utterances"] == 3
    assert not stream.status.is_ok and stream.status.description == "the client disconnected"


def test_results_that_were_not_collected_yet(traced: Traced, memory: InMemorySpanExporter) -> None:
    traced.step(0.08, 0.09, 0.10)
    traced.step(0.16, 0.17, 0.18)
    events = [traced.event("final", 0.0, 0.05), traced.event("end", 0.08, text="", reason="forced")]
    traced.spans.add(events, 1280)
    (utterance,) = memory.get_finished_spans()
    assert attributes(utterance)["steps"] == 1


def test_utterances_without_a_final(traced: Traced, memory: InMemorySpanExporter) -> None:
    traced.step(0.08, 0.09, 0.10)
    traced.add(traced.event("end", 0.08, text="", reason="forced"))
    traced.step(0.16, 0.17, 0.18)
    traced.add(traced.event("partial", 0.1, 0.15))
    traced.add(traced.event("final", 0.1, 0.15, text=""), traced.event("end", 0.16, text="", reason="silence"))
    traced.step(0.24, 0.25, 0.26)
    traced.add(traced.event("partial", 0.2, 0.22))
    traced.spans.discard(1280 * 3)
    traced.step(0.32, 0.33, 0.34)
    traced.add(traced.event("final", 0.25, 0.3), traced.event("end", 0.31, text="", reason="silence"))
    (utterance,) = memory.get_finished_spans()
    assert attributes(utterance)["steps"] == 1 and attributes(utterance)["audio_start_seconds"] == 0.25


def test_a_final_latency_that_is_not_known(traced: Traced, memory: InMemorySpanExporter) -> None:
    """The word ended before a stream was resumed, or long before the final."""
    traced.spans.received(10.0, 10.08)
    traced.add(traced.event("final", 9.0, 9.9), traced.event("end", 10.0, text="", reason="silence"))
    for number in range(1000):
        traced.spans.received(10.08 + 0.08 * number, 10.16 + 0.08 * number)
    assert len(traced.spans._arrivals) <= 16 / 0.08 + 2
    traced.add(traced.event("final", 20.0, 21.0), traced.event("end", 90.0, text="", reason="silence"))
    traced.add(traced.event("final", 80.0, 89.0), traced.event("end", 90.0, text="", reason="silence"))
    found = [attributes(span) for span in memory.get_finished_spans()]
    assert ["final_latency_seconds" in one for one in found] == [False, False, True]
    assert [one["steps"] for one in found] == [0, 0, 0] and "mean_step_streams" not in found[0]


def test_the_trace_of_a_request(tracing: otel.Tracing, memory: InMemorySpanExporter) -> None:
    client = UNKNOWN_CLIENT.with_trace({"traceparent": TRACEPARENT, "tracestate": "vendor=1", "other": "x"})
    for one in (client, Client(traceparent="nonsense"), UNKNOWN_CLIENT):
        spans = tracing.open(one, 16000, "test", {})
        assert spans is not None
        spans.close(None, 0.0)
    joined, invalid, own = memory.get_finished_spans()
    assert f"{joined.context.trace_id:032x}" == TRACE and f"{joined.parent.span_id:016x}" == PARENT
    assert joined.context.trace_state.get("vendor") == "1"
    assert invalid.parent is None and own.parent is None and own.context.trace_id != joined.context.trace_id


def test_streams_that_are_not_sampled_cost_nothing(
    memory: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_sampled = UNKNOWN_CLIENT.with_trace({"traceparent": TRACEPARENT[:-1] + "0"})
    assert otel.Tracing(SimpleSpanProcessor(memory)).open(not_sampled, 16000, "test", {}) is None
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert otel.Tracing(SimpleSpanProcessor(memory)).open(UNKNOWN_CLIENT, 16000, "test", {}) is None


# -- environment -------------------------------------------------------------------------------------------------------


def test_the_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    found = otel._resource().attributes
    assert (found["service.name"], found["service.version"]) == ("nemostream", nemostream.__version__)
    assert found["service.instance.id"] != otel._resource().attributes["service.instance.id"]
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=one,team=speech")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "captions")
    found = otel._resource().attributes
    assert (found["service.name"], found["service.instance.id"], found["team"]) == ("captions", "one", "speech")


def test_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(otel._exporter("traces")).__module__.startswith("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert type(otel._exporter("metrics")).__module__.startswith("opentelemetry.exporter.otlp.proto.grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf")
    assert type(otel._exporter("metrics")).__module__.startswith("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert otel._exporter("metrics") is None and otel.MetricSender.start(list) is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert otel._exporter("traces") is None and otel.Tracing().open(UNKNOWN_CLIENT, 16000, "test", {}) is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(OptionError, match=r"OTEL_TRACES_EXPORTER .* select 'zipkin'"):
        otel.Tracing()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, fakes: Any, model: Any) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "nemostream.serving.otel")
    monkeypatch.delattr("nemostream.serving.otel", raising=False)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendError, match=r"the otel extra cannot be imported .*\[otel\]"):
        fakes.start(model, otel=True)
    assert model.loaded_with is None


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_prometheus() -> None:
    metrics = Metrics()
    metrics.describe("demo", "cpu", 0)
    metrics.audio.inc(12.5)
    metrics.streams.labels("websocket").set(3)
    metrics.streams.labels("riva").set(1)
    for seconds in (0.01, 0.03, 0.03, 9.0):
        metrics.latency.labels(80).observe(seconds)
    metrics.latency.labels(560).observe(0.5)
    found = {metric.name: metric for metric in otel.metrics_of(metrics.families(), 5, 7)}
    names = {family.name + "_total" * (family.type == "counter") for family in metrics.families() if family.samples}
    assert set(found) == names and len(names) > 20
    (audio,) = found["nemostream_audio_seconds_total"].data.data_points
    assert (audio.value, audio.start_time_unix_nano, audio.time_unix_nano) == (12.5, 5, 7)
    assert found["nemostream_audio_seconds_total"].data.is_monotonic
    streams = {point.attributes["transport"]: point.value for point in found["nemostream_streams"].data.data_points}
    assert streams == {"websocket": 3, "riva": 1, "realtime": 0, "http": 0}
    latency = {point.attributes["chunk_ms"]: point for point in found["nemostream_latency_seconds"].data.data_points}
    assert found["nemostream_latency_seconds"].unit == "s"
    assert (latency["80"].count, latency["80"].sum, latency["560"].count) == (4, pytest.approx(9.07), 1)
    observed = dict(zip([*latency["80"].explicit_bounds, float("inf")], latency["80"].bucket_counts, strict=True))
    assert {bound: count for bound, count in observed.items() if count} == {0.01: 1, 0.04: 2, float("inf"): 1}


# -- collectors --------------------------------------------------------------------------------------------------------


@dataclass
class Collector:
    """An OTLP receiver, and what it has received."""

    variables: dict[str, str] = field(default_factory=dict)  # of a server that sends to it
    traces: list[Any] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    headers: list[str | None] = field(default_factory=list)

    def spans(self) -> list[Any]:
        return [
            span
            for request in list(self.traces)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def values(self) -> dict[str, float]:
        """Return the newest sums over labels, of histograms the counts."""
        found: dict[str, float] = {}
        for request in list(self.metrics):
            for metric in request.resource_metrics[0].scope_metrics[0].metrics:
                points = getattr(metric, metric.WhichOneof("data")).data_points
                found[metric.name] = sum(
                    getattr(one, "count", None) or getattr(one, "as_double", 0.0) for one in points
                )
        return found


@contextmanager
def http_collector() -> Iterator[Collector]:
    collector = Collector()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.headers.append(self.headers.get("Authorization"))
            if self.path == "/v1/traces":
                collector.traces.append(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            else:
                assert self.path == "/v1/metrics"
                collector.metrics.append(metrics_service_pb2.ExportMetricsServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    collector.variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def grpc_collector() -> Iterator[Collector]:
    import grpc

    collector = Collector()

    class Traces(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            collector.traces.append(request)
            collector.headers.append(dict(context.invocation_metadata()).get("authorization"))
            return trace_service_pb2.ExportTraceServiceResponse()

    class Values(metrics_service_pb2_grpc.MetricsServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:
            collector.metrics.append(request)
            return metrics_service_pb2.ExportMetricsServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Values(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    collector.variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    }
    try:
        yield collector
    finally:
        server.stop(None)


def received(span: Any) -> dict[str, Any]:
    """Return the attributes of a span of a collector."""
    return {
        one.key.removeprefix("nemostream."): getattr(one.value, one.value.WhichOneof("value"))
        for one in span.attributes
    }


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


FAST = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_METRIC_EXPORT_INTERVAL": "300"}


def riva_stream(address: str, pcm: bytes) -> list[Any]:
    """Return the results of a stream whose call has a trace context."""
    import grpc
    from riva.client.proto import riva_asr_pb2, riva_asr_pb2_grpc, riva_audio_pb2

    config = riva_asr_pb2.RecognitionConfig(
        sample_rate_hertz=16000, audio_channel_count=1, encoding=riva_audio_pb2.AudioEncoding.LINEAR_PCM
    )
    request = riva_asr_pb2.StreamingRecognizeRequest
    messages = [
        request(streaming_config=riva_asr_pb2.StreamingRecognitionConfig(config=config)),
        request(audio_content=pcm),
    ]
    with grpc.insecure_channel(address) as channel:
        stub = riva_asr_pb2_grpc.RivaSpeechRecognitionStub(channel)
        return list(stub.StreamingRecognize(iter(messages), metadata=[("traceparent", TRACEPARENT)]))


def websocket_stream(url: str, pcm: bytes) -> list[Any]:
    """Return the finals of a WebSocket whose request has a trace context."""
    from websockets.sync.client import connect

    with connect(f"{url}/v1/stream", additional_headers={"traceparent": TRACEPARENT}) as socket:
        socket.send(pcm)
        socket.send('{"type": "finish"}')
        events = [json.loads(message) for message in socket]
    return [event for event in events if event["type"] == "final"]


def recording(url: str, path: Path) -> list[Any]:
    """Return the segments of a recording whose request has a trace context."""
    import httpx

    answer = httpx.post(
        f"{url}/v1/audio/transcriptions",
        files={"file": path.read_bytes()},
        data={"model": "any", "response_format": "verbose_json"},
        headers={"traceparent": TRACEPARENT},
        timeout=60,
    )
    return list(answer.raise_for_status().json()["segments"])


@pytest.mark.parametrize(("make", "transports"), [(http_collector, 0), (grpc_collector, 2)])
def test_streams_of_a_server(serve_process: Callable[..., Any], spoken: Any, make: Any, transports: int) -> None:
    pcm = b"".join(clip.pcm + bytes(48000) for clip in spoken[:3])
    options = ["--otel", "--no-measure", "--max-streams", "8", "--transports", str(transports)]
    variables = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=secret", **FAST}
    events: dict[int, list[Event]] = {}
    with make() as collector, serve_process(*options, **variables | collector.variables) as running:
        for chunk_ms in (160, 560):
            with Stream(running.url, chunk_ms=chunk_ms) as stream:
                for at in range(0, len(pcm), 3200):
                    stream.send(pcm[at : at + 3200])
                stream.finish()
                events[chunk_ms] = list(stream)
        joined = [
            *riva_stream(running.address, spoken[0].pcm),
            *websocket_stream(running.socket, spoken[0].pcm),
            *recording(running.url, spoken[0].path),
        ]
        finals = {chunk_ms: [event for event in found if event.type == "final"] for chunk_ms, found in events.items()}
        count = sum(map(len, finals.values())) + len(joined)
        assert len(joined) == 3 and count >= 7
        until(lambda: len(collector.spans()) == count + 5)
        until(lambda: collector.values().get("nemostream_utterances_total") == count)
        assert running.metric("nemostream_utterances_total") == count
        values = collector.values()
        for name, same in (
            ("nemostream_audio_seconds_total", "nemostream_audio_seconds_total"),
            ("nemostream_step_seconds", "nemostream_step_seconds_count"),
            ("nemostream_latency_seconds", "nemostream_latency_seconds_count"),
        ):
            assert values[name] == pytest.approx(running.metric(same)) and values[name] > 0, name
        assert values["nemostream_info"] == 1 and values["nemostream_max_streams"] == 8

    spans = collector.spans()
    assert len(spans) == count + 5 and set(collector.headers) == {"secret"}
    streams = {span.span_id: span for span in spans if span.name == "stream"}
    of_requests = [span for span in streams.values() if span.trace_id.hex() == TRACE]
    assert sorted(received(span)["protocol"] for span in of_requests) == ["http", "riva", "websocket"]
    for span in streams.values():
        seconds = spoken[0].seconds if span in of_requests else len(pcm) / 32000
        assert received(span)["audio_seconds"] == pytest.approx(seconds, abs=1e-3)
        assert span.parent_span_id.hex() == (PARENT if span in of_requests else "")
    utterances = [span for span in spans if span.name == "utterance"]
    for span in utterances:
        parent, named = streams[span.parent_span_id], received(span)
        assert span.trace_id == parent.trace_id
        assert parent.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= parent.end_time_unix_nano + 1_000_000  # the clocks differ by their resolution
        wall = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert named["queue_seconds"] >= 0 and named["step_seconds"] > 0
        assert named["queue_seconds"] + named["step_seconds"] <= wall + 1e-6
        # The audio of the last word arrived after the beginning of the utterance, or in the same message.
        assert 0 < named["final_latency_seconds"] <= wall + 0.01
        assert 1 <= named["mean_step_streams"] <= 8 and named["steps"] <= received(parent)["steps"]
    for chunk_ms, of_size in finals.items():
        found = [received(span) for span in utterances if streams[span.parent_span_id] not in of_requests]
        found = sorted((one for one in found if one["chunk_ms"] == chunk_ms), key=lambda one: one["utterance"])
        ends = {event.utterance: event for event in events[chunk_ms] if event.type == "end"}
        assert [one["utterance"] for one in found] == [final.utterance for final in of_size]
        for one, final in zip(found, of_size, strict=True):
            end = ends.get(final.utterance)
            end_seconds = end.start if end else len(pcm) / 32000
            assert one["words"] == len(final.text.split()) and one["language"] == final.language
            assert one["audio_start_seconds"] == pytest.approx(final.start, abs=1e-3)
            assert one["audio_end_seconds"] == pytest.approx(final.end, abs=1e-3)
            assert one["end_reason"] == (end.reason if end else "finish")
            # It begins and ends within a chunk, and the last chunk of a stream may be followed by one of padding.
            needed = (end_seconds - final.start) * 1000 / chunk_ms
            assert needed - 1 <= one["steps"] <= needed + 2
            assert not [text for text in map(str, one.values()) if final.text in text]


def test_a_collector_that_is_down(serve_process: Callable[..., Any], spoken: Any) -> None:
    """Streams are served, the queue drops spans, and the server stops."""
    variables = {**FAST, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_BSP_MAX_QUEUE_SIZE": "4"}
    variables |= {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "2"}
    with serve_process("--otel", "--no-measure", **variables) as running:
        texts = []
        for _ in range(8):
            with Stream(running.url, chunk_ms=560) as stream:
                stream.send(np.frombuffer(spoken[0].pcm, np.int16))
                stream.finish()
                list(stream)
                texts.append(stream.text)
        assert len(set(texts)) == 1 and texts[0]
        assert running.metric("nemostream_streams_failed_total") == 0
        running.process.terminate()
        assert running.process.wait(30) == 0


def test_an_exporter_that_is_not_installed() -> None:
    command = [sys.executable, "-m", "nemostream", "serve", "--otel", "--port", "0", "--grpc-port", "-1"]
    for more in ([], ["--transports", "1"]):
        variables = os.environ | {"OTEL_METRICS_EXPORTER": "carrier pigeon"}
        done = subprocess.run([*command, *more], env=variables, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert "OTEL_METRICS_EXPORTER" in done.stderr and "'carrier pigeon'" in done.stderr
