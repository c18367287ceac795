"""Prometheus metrics. Names and units follow Prometheus' conventions: base units, `_total` for counters."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Dense around the chunk sizes, 80 to 1120 ms: what matters is whether a step or a result takes less than its chunk.
_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.28, 0.4, 0.56, 0.8, 1.12, 2.24, 5.0)
_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server, in a registry of their own: several servers may run in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.streams = Gauge("nemostream_streams", "Open streams.", ["transport"], registry=registry)
        self.max_streams = Gauge("nemostream_max_streams", "Maximum number of open live streams.", registry=registry)
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
        self.uploads = Gauge(
            "nemostream_uploads", "Recordings that are being received or transcribed.", registry=registry
        )
        self.timeouts = Counter(
            "nemostream_timeouts",
            "Clients disconnected by an idle, slow-reader or maximum-duration timeout.",
            registry=registry,
        )
        self.audio = Counter("nemostream_audio_seconds", "Seconds of audio received.", registry=registry)
        self.utterances = Counter("nemostream_utterances", "Final utterances.", registry=registry)
        self.steps = Histogram(
            "nemostream_step_seconds",
            "Duration of a batched step.",
            ["chunk_ms"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch = Histogram("nemostream_step_streams", "Streams per step.", buckets=_STREAMS, registry=registry)
        self.latency = Histogram(
            "nemostream_latency_seconds",
            "Time from receiving the last audio of a chunk to its result.",
            ["chunk_ms"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.real_time = Gauge(
            "nemostream_real_time_factor",
            "Step time per second of audio received, over the last second.",
            registry=registry,
        )
        self.degradation_level = Gauge(
            "nemostream_degradation_level",
            "Number of sizes by which chunks are larger than requested.",
            registry=registry,
        )

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
