"""What Prometheus may know. Names and units follow its conventions: seconds, totals, base units."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Around the real-time budgets, 80 to 1120 ms: what matters is on which side of them a step or a result lies.
_SECONDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.28, 0.4, 0.56, 0.8, 1.12, 2.24, 5.0)
_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.streams = Gauge("nemostream_streams", "Streams open.", ["transport"], registry=registry)
        self.most = Gauge("nemostream_streams_admitted", "Streams admitted at most.", registry=registry)
        self.opened = Counter("nemostream_streams_opened", "Streams opened.", ["transport"], registry=registry)
        self.failed = Counter("nemostream_streams_failed", "Streams that failed.", ["transport"], registry=registry)
        self.rejected = Counter("nemostream_rejected", "Streams refused.", ["reason"], registry=registry)
        self.denied = Counter(
            "nemostream_denied",
            "Requests denied: wrong key, foreign origin, unknown host.",
            ["reason"],
            registry=registry,
        )
        self.uploads = Gauge("nemostream_uploads", "Recordings received or recognised now.", registry=registry)
        self.dropped = Counter("nemostream_dropped", "Clients cut off for breaking a limit.", registry=registry)
        self.audio = Counter("nemostream_audio_seconds", "Audio received.", registry=registry)
        self.words = Counter("nemostream_utterances", "Utterances that became final.", registry=registry)
        self.steps = Histogram(
            "nemostream_step_seconds",
            "Time of a step, all its streams together.",
            ["chunk_ms"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch = Histogram("nemostream_step_streams", "Streams in a step.", buckets=_STREAMS, registry=registry)
        self.latency = Histogram(
            "nemostream_latency_seconds",
            "From the arrival of a chunk's last audio until its result.",
            ["chunk_ms"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.real_time = Gauge(
            "nemostream_real_time_factor",
            "Machine seconds per second of audio, just now.",
            registry=registry,
        )
        self.level = Gauge(
            "nemostream_degraded", "By how many sizes chunks are larger than asked for.", registry=registry
        )

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
