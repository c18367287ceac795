"""Prometheus metrics. Names and units follow Prometheus' conventions: base units, `_total` for counters."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import prometheus_client.values
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

import nemostream

# Dense around the chunk sizes, 80 to 1120 ms: what matters is whether a step or a result takes less than its chunk.
_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.28, 0.4, 0.56, 0.8, 1.12, 2.24, 5.0)
_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The values of labels, which are exported before they are first used: a rate needs the value before an increase.
_TRANSPORTS = ("websocket", "riva", "realtime", "http")
_REJECTIONS = ("CapacityError", "Draining", "OptionError")
_DENIALS = ("key", "origin", "host")
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # where `prometheus_client` keeps the values of several processes


class BatchHistogram(Histogram):
    """A histogram for many values at a time."""

    def observe_all(self, values: Sequence[float]) -> None:
        """Observe values, in less time than one by one."""
        counts = np.bincount(np.searchsorted(self._upper_bounds, values), minlength=len(self._buckets))
        self._sum.inc(math.fsum(values))
        for bucket, count in zip(self._buckets, counts.tolist(), strict=True):
            if count:
                bucket.inc(count)


class _BeforeCollect(Collector):
    """The first collector of a registry, without metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        self._metrics.on_collect()
        return ()


class Metrics:
    """The metrics of one server, in a registry of their own: several servers may run in one process.

    With `shared`, `text` has the metrics of all processes of the server: sums, also of gauges (`share_metrics`).
    `on_collect` is called, on any thread, before the metrics of this process are collected.
    """

    def __init__(self, shared: bool = False) -> None:
        self._shared = shared
        self.registry = registry = CollectorRegistry()
        self.on_collect: Callable[[], None] = lambda: None
        registry.register(_BeforeCollect(self))  # before all metrics
        self._info = _gauge(
            registry, "nemostream_info", "The server; the value is 1.", ["version", "model", "device", "transports"]
        )
        self._started = _gauge(
            registry, "nemostream_start_time_seconds", "Start of the server, in seconds since the epoch."
        )
        self.streams = _gauge(registry, "nemostream_streams", "Open streams.", ["transport"])
        self.max_streams = _gauge(registry, "nemostream_max_streams", "Maximum number of open live streams.")
        self.opened = Counter("nemostream_streams_opened", "Streams opened.", ["transport"], registry=registry)
        self.failed = Counter("nemostream_streams_failed", "Streams that failed.", ["transport"], registry=registry)
        self.rejected = Counter(
            "nemostream_streams_rejected", "Streams and recordings rejected.", ["reason"], registry=registry
        )
        self.denied = Counter(
            "nemostream_requests_denied",
            "Requests denied because of their API key, Origin header or Host header.",
            ["reason"],
            registry=registry,
        )
        self.uploads = _gauge(registry, "nemostream_uploads", "Recordings that are being received or transcribed.")
        self.timeouts = Counter(
            "nemostream_timeouts",
            "Clients disconnected by an idle, slow-reader or maximum-duration timeout.",
            registry=registry,
        )
        self.audio = Counter("nemostream_audio_seconds", "Seconds of audio received.", registry=registry)
        self.final_fallbacks = Counter(
            "nemostream_final_fallbacks",
            "Finals with tokens of the small chunks because the accurate lane failed.",
            registry=registry,
        )
        self.lanes_shed = Counter(
            "nemostream_lanes_shed",
            "Accurate lanes that were disabled or not opened under overload.",
            registry=registry,
        )
        self.states_stored = Counter("nemostream_states_stored", "States of streams stored.", registry=registry)
        self.state_errors = Counter(
            "nemostream_state_errors", "States of streams that could not be stored.", registry=registry
        )
        self.state_seconds = Histogram(
            "nemostream_state_seconds",
            "Time from the request of a stream's state until it is stored.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.resumed = Counter("nemostream_streams_resumed", "Streams resumed.", registry=registry)
        self.moved = Counter(
            "nemostream_streams_moved", "Streams handed over when the server stops.", registry=registry
        )
        self.utterances = Counter("nemostream_utterances", "Final utterances.", registry=registry)
        self.steps = Histogram(
            "nemostream_step_seconds",
            "Duration of a batched step.",
            ["chunk_ms"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.step_failures = Counter("nemostream_step_failures", "Steps that failed.", registry=registry)
        self.waiting = Histogram(
            "nemostream_step_waiting_streams",
            "Streams with a chunk that waited for a further step when a step ended.",
            buckets=(0, *_STREAMS),
            registry=registry,
        )
        self.batch = Histogram("nemostream_step_streams", "Streams per step.", buckets=_STREAMS, registry=registry)
        self.latency = BatchHistogram(
            "nemostream_latency_seconds",
            "Time from receiving the last audio of a chunk to its result.",
            ["chunk_ms"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.real_time = _gauge(
            registry, "nemostream_real_time_factor", "Step time per second of audio received, over the last second."
        )
        self.degradation_level = _gauge(
            registry, "nemostream_degradation_level", "Number of sizes by which chunks are larger than requested."
        )
        labelled: list[tuple[Counter | Gauge, Sequence[str]]] = [
            (self.streams, _TRANSPORTS),
            (self.opened, _TRANSPORTS),
            (self.failed, _TRANSPORTS),
            (self.rejected, _REJECTIONS),
            (self.denied, _DENIALS),
        ]
        for metric, values in labelled:
            for value in values:
                metric.labels(value)

    def describe(self, model: str, device: str, transports: int) -> None:
        """Set what the server is, and now as its start. Called by one process of a server."""
        self._info.labels(nemostream.__version__, model, device, transports).set(1)
        self._started.set(time.time())

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._all())

    def families(self) -> Iterable[Metric]:
        """Return all metrics."""
        return self._all().collect()

    def _all(self) -> CollectorRegistry:
        if not self._shared:
            return self.registry
        self.on_collect()
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return registry


def share_metrics(folder: str, process: str) -> None:
    """Keep the values of this process's metrics in a folder, with those of the server's other processes.

    Called before the metrics are made. A process that is started again with the same name continues its counters.
    `process` has no underscore.
    """
    os.environ[_FOLDER] = folder
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue(lambda: process)


def remove_gauges(process: str) -> None:
    """Remove the gauges of a process that ended; its counters remain in the sums."""
    mark_process_dead(process)


def _gauge(registry: CollectorRegistry, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
    return Gauge(name, text, labels, registry=registry, multiprocess_mode="livesum")
