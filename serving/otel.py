"""OpenTelemetry: a span for each stream and each utterance, and the metrics of `/metrics`, sent to a collector.

The OTEL_* environment variables configure exporters, sampling and the resource, as the OpenTelemetry specification
defines them. Spans and metrics are sent by threads of the SDK: a collector that is slow or down blocks no stream; what
its queue has no space for is dropped.

The metrics are read from the Prometheus registry, so both systems have the same metrics with the same names. The API
has no asynchronous histogram, so the reader converts all metrics to the SDK's data itself.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from opentelemetry.sdk.metrics import export as otlp
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import nemostream
from nemostream.errors import OptionError
from nemostream.runtime.streaming.state import StepTimes, StreamTrace
from nemostream.runtime.text.endpointing import NEVER
from nemostream.runtime.text.events import Event
from nemostream.serving.client import Client, shorten

_CLOSE_SECONDS = 3.0  # for the last spans and metrics when the server stops
_ARRIVAL_SECONDS = 16.0  # of audio for which the times of arrival are kept
_FRAME_SECONDS = 0.08  # an encoder frame
_SCOPE = "nemostream"


# -- spans -------------------------------------------------------------------------------------------------------------


class Tracing:
    """Creates the spans of a process. `processor` is by default the exporter of the environment."""

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        """Raise `OptionError` for an exporter that is not installed."""
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._tracer = self._provider.get_tracer(_SCOPE, nemostream.__version__)
        if processor is None and (exporter := _exporter("traces")) is not None:
            processor = BatchSpanProcessor(exporter)
        if processor is not None:
            self._provider.add_span_processor(processor)

    def open(
        self, client: Client, sample_rate: int, protocol: str, attributes: Mapping[str, Any]
    ) -> StreamSpans | None:
        """Begin the span of a stream, in the trace of the client's request if it has one; None if it is not sampled.

        `sample_rate` is the model's. Attributes that are None are omitted.
        """
        headers = {"traceparent": client.traceparent, "tracestate": client.tracestate}
        context = TraceContextTextMapPropagator().extract({name: text for name, text in headers.items() if text})
        named = _attributes({"protocol": protocol, **attributes})
        span = self._tracer.start_span("stream", context, SpanKind.SERVER, named)
        return StreamSpans(self._tracer, span, sample_rate, protocol) if span.is_recording() else None

    def shutdown(self) -> None:
        """Send the remaining spans. Blocks while the collector does not respond (`close`)."""
        self._provider.shutdown()


@dataclass
class _Steps:
    """The steps of an utterance. Seconds in which steps overlap count once."""

    count: int = 0
    began: float | None = None  # the first chunk was complete, `time.perf_counter()`
    queue_seconds: float = 0.0
    step_seconds: float = 0.0
    streams: int = 0  # in all of these steps

    def add(self, ready: float, step: StepTimes, previous_end: float) -> None:
        """Add a chunk that was complete at `ready`; the step of the previous one ended at `previous_end`."""
        started, ended, streams = step
        if self.began is None:
            self.began = ready
        if ready < previous_end:
            ready = previous_end
        if started < previous_end:
            started = previous_end
        if started > ready:
            self.queue_seconds += started - ready
        if ended > started:
            self.step_seconds += ended - started
        self.count += 1
        self.streams += streams


class StreamSpans:
    """The span of a stream, and those of its utterances (`SessionTrace`). For one thread.

    Chunks belong to an utterance from the one in which its first token is to the one in which its end was found. Chunks
    of silence between utterances belong to none.
    """

    def __init__(self, tracer: Tracer, span: Span, sample_rate: int, protocol: str) -> None:
        self._tracer, self._span, self._rate, self._protocol = tracer, span, sample_rate, protocol
        self._context = set_span_in_context(span)
        self._trace = StreamTrace()
        self._arrivals: deque[tuple[float, float]] = deque()  # seconds of audio up to a message, and its time
        self._known_from = 0.0  # seconds of audio before the first of them
        self._steps, self._current = _Steps(), False  # of the current utterance, and whether there is one
        self._final: tuple[Event, float] | None = None  # of it, and when it was received
        self._last_sample, self._last_end = 0, 0.0  # of the last chunk: its end, and that of its step
        self._all_steps = self._utterances = 0

    def attach(self, trace: StreamTrace) -> None:
        """Read the times of chunks from `trace` from now on."""
        self._trace = trace

    def received(self, before: float, after: float) -> None:
        """Record that audio was received: the seconds received before and after it."""
        if not self._arrivals:
            self._known_from = before
        self._arrivals.append((after, time.perf_counter()))
        while self._arrivals[0][0] < after - _ARRIVAL_SECONDS:
            self._known_from = self._arrivals.popleft()[0]

    def add(self, events: Sequence[Event], end_sample: int) -> None:
        """Record new events; the results of chunks up to `end_sample` are known."""
        now = time.perf_counter()
        for event in events:
            if event.kind == "end":
                # The step of the chunk with the end found it; a model marks an end in the encoder frame before.
                end = event.start - (_FRAME_SECONDS if event.reason == "model" else 0.0)
                self._take(end_sample, self._current, round(end * self._rate))
                if self._final is not None:
                    self._end_utterance(*self._final, event.reason)
                self._steps, self._current, self._final = _Steps(), False, None
                continue
            if not self._current:
                self._take(min(end_sample, round(event.start * self._rate)), False)
                self._current = True
            if event.kind == "final":  # without text, it only withdraws partials
                self._final = (event, now) if event.text else None
        self._take(end_sample, self._current)

    def discard(self, end_sample: int) -> None:
        """Discard the current utterance, on request of the client."""
        self._take(end_sample, False)
        self._steps, self._current, self._final = _Steps(), False, None

    def close(self, error: str | None, audio_seconds: float) -> None:
        """End the span of the stream."""
        totals = {"audio_seconds": audio_seconds, "steps": self._all_steps, "utterances": self._utterances}
        self._span.set_attributes(_attributes(totals))
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, shorten(error)))
        self._span.end()

    def _take(self, end_sample: int, belongs: bool, up_to: int = NEVER) -> None:
        """Consume the chunks that end up to `end_sample`; not those after the first that ends at `up_to` or later.

        `belongs`: they are of the current utterance.
        """
        chunks = self._trace.chunks
        while chunks and chunks[0][0] <= end_sample and self._last_sample < up_to:
            self._last_sample, ready, step = chunks.popleft()
            if belongs:
                self._steps.add(ready, step, self._last_end)
            self._last_end = step.ended
            self._all_steps += 1

    def _end_utterance(self, final: Event, ended: float, reason: str | None) -> None:
        """Create the span of an utterance."""
        steps = self._steps
        began = ended if steps.began is None else steps.began
        attributes = {
            "protocol": self._protocol,
            "utterance": final.utterance,
            "chunk_ms": final.chunk_ms,
            "audio_start_seconds": final.start,
            "audio_end_seconds": final.end,
            "words": len(final.words),
            "end_reason": reason,
            "language": final.language or final.set_language,
            "steps": steps.count,
            "queue_seconds": steps.queue_seconds,
            "step_seconds": steps.step_seconds,
            "mean_step_streams": steps.streams / steps.count if steps.count else None,
            "final_latency_seconds": self._latency(final.end, ended),
        }
        offset = time.time_ns() - round(1e9 * time.perf_counter())
        begin_ns, end_ns = (offset + round(1e9 * seconds) for seconds in (began, ended))
        span = self._tracer.start_span(
            "utterance", self._context, attributes=_attributes(attributes), start_time=begin_ns
        )
        span.end(end_ns)
        self._utterances += 1

    def _latency(self, audio_seconds: float, ended: float) -> float | None:
        """Return the time from the arrival of the audio at `audio_seconds` to `ended`; None if it is not known."""
        if audio_seconds < self._known_from:
            return None
        arrived = next((at for after, at in self._arrivals if after >= audio_seconds - 1e-6), None)
        return None if arrived is None else ended - arrived


def _attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a span, without those that are None."""
    return {f"nemostream.{name}": value for name, value in values.items() if value is not None}


# -- metrics -----------------------------------------------------------------------------------------------------------


class MetricSender(otlp.PeriodicExportingMetricReader):
    """Sends metrics to a collector every OTEL_METRIC_EXPORT_INTERVAL milliseconds.

    `collect_families` returns Prometheus' metric families.
    """

    def __init__(self, collect_families: Callable[[], Iterable[Any]], exporter: otlp.MetricExporter) -> None:
        self._families = collect_families
        self._scope, self._resource = InstrumentationScope(_SCOPE, nemostream.__version__), _resource()
        self._started_ns = time.time_ns()
        super().__init__(exporter)

    @classmethod
    def start(cls, collect_families: Callable[[], Iterable[Any]]) -> MetricSender | None:
        """Begin to send metrics; None if the environment disables it. Raises `OptionError` as `Tracing`."""
        exporter = _exporter("metrics")
        return None if exporter is None else cls(collect_families, exporter)

    def collect(self, timeout_millis: float = 10_000) -> None:
        """Send the present values."""
        scope = otlp.ScopeMetrics(self._scope, metrics_of(self._families(), self._started_ns, time.time_ns()), "")
        self._receive_metrics(otlp.MetricsData([otlp.ResourceMetrics(self._resource, [scope], "")]), timeout_millis)


def metrics_of(families: Iterable[Any], started_ns: int, now_ns: int) -> list[otlp.Metric]:
    """Return Prometheus' metric families as those of OpenTelemetry, with cumulative values since `started_ns`."""
    found = []
    for family in families:
        name, unit = family.name, "s" if family.name.endswith("_seconds") else ""
        data: otlp.Sum | otlp.Gauge | otlp.Histogram
        if family.type == "histogram":
            points = _histogram_points(family.samples, started_ns, now_ns)
            data = otlp.Histogram(points, otlp.AggregationTemporality.CUMULATIVE)
        else:
            numbers = [
                otlp.NumberDataPoint(sample.labels, started_ns, now_ns, sample.value)
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            data = otlp.Gauge(numbers)
            if family.type == "counter":
                name += "_total"
                data = otlp.Sum(numbers, otlp.AggregationTemporality.CUMULATIVE, True)
        if data.data_points:
            found.append(otlp.Metric(name, family.documentation, unit, data))
    return found


def _histogram_points(samples: Iterable[Any], started_ns: int, now_ns: int) -> list[otlp.HistogramDataPoint]:
    """Return a point for each set of labels. Prometheus' buckets are cumulative, those of OpenTelemetry are not."""
    buckets: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    sums: dict[tuple[tuple[str, str], ...], float] = {}
    for sample in samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            buckets.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            sums[labels] = sample.value
    points = []
    for labels, found in buckets.items():
        bounds, counts = zip(*sorted(found), strict=True)
        of_buckets = [round(count - before) for count, before in zip(counts, (0.0, *counts), strict=False)]
        total, seconds = round(counts[-1]), sums.get(labels, 0.0)
        point = (dict(labels), started_ns, now_ns, total, seconds, of_buckets, list(bounds[:-1]))
        points.append(otlp.HistogramDataPoint(*point, min=None, max=None))
    return points


# -- environment -------------------------------------------------------------------------------------------------------


def _resource() -> Resource:
    """Return the resource of the environment. The default name of the service is "nemostream"."""
    defaults = {
        "service.name": "nemostream",
        "service.version": nemostream.__version__,
        "service.instance.id": str(uuid.uuid4()),
    }
    found = OTELResourceDetector().detect().attributes
    return Resource.create({name: value for name, value in defaults.items() if name not in found})


def _exporter(signal: Literal["traces", "metrics"]) -> Any:
    """Return the exporter that the environment selects, or None. Raises `OptionError` if it is not installed."""
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    name = os.environ.get(variable) or "otlp"
    if name == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if name == "otlp":
        common = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
        protocol = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL") or common
        name = "otlp_proto_" + protocol.removesuffix("/protobuf")
    found = [*entry_points(group=f"opentelemetry_{signal}_exporter", name=name)]
    if not found:
        raise OptionError(
            f"{variable} and OTEL_EXPORTER_OTLP_PROTOCOL select {shorten(name)!r}, an exporter that is not installed; "
            "use otlp or none, and http/protobuf or grpc."
        )
    return found[0].load()()


def close(*senders: Tracing | MetricSender | None) -> None:
    """Send the remaining spans and the last values of the metrics, for a few seconds at most."""
    threads = [
        threading.Thread(target=sender.shutdown, name="nemostream-otel-close", daemon=True)
        for sender in senders
        if sender is not None
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _CLOSE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
