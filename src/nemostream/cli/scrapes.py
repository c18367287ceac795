"""The metrics of a server at two times, and what happened between them: increases, and percentiles of histograms.

The rules are those of Prometheus. The names of the metrics are in `serving/metrics.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

Labels = tuple[tuple[str, str], ...]  # names and values, in the order of the names

HISTORY_SECONDS = 60  # of scrapes that are kept, one per second
_CHART_SECONDS = 240  # of points that are kept: more than a screen has columns
_FIGURES_SECONDS = 10  # over which figures are computed: a stream of 560 ms chunks has 18 steps in this time
_COUNTER_SUFFIXES = ("_total", "_bucket", "_count")


@dataclass(frozen=True)
class Scrape:
    """The values of a server's metrics at a time; `at` is in seconds."""

    at: float
    values: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, at: float) -> Scrape:
        """Return the metrics of a response in Prometheus' text format.

        Raises `ValueError` for another format, and `ImportError` without the `serve` extra.
        """
        from prometheus_client.parser import text_string_to_metric_families

        values: dict[str, dict[Labels, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sorted((name, _printable(value)) for name, value in sample.labels.items()))
                values.setdefault(sample.name, {})[labels] = sample.value
        return cls(at, values)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over its labels except those given; 0 if it is missing."""
        return sum(self.by(name, "", **labels).values())

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Return a metric by the value of a label, summed over the other labels except those given."""
        sums: dict[str, float] = {}
        for found, value in self.values.get(name, {}).items():
            if labels.items() <= dict(found).items():
                key = dict(found).get(label, "")
                sums[key] = sums.get(key, 0.0) + value
        return sums

    def restarted_since(self, before: Scrape) -> bool:
        """Return whether the server was started again since `before`: its start differs, or a counter is lower.

        Counters of seconds are sums of fractions in any order: a relative difference of 1e-6 is none.
        """
        if before.total("nemostream_start_time_seconds") not in (0, self.total("nemostream_start_time_seconds")):
            return True
        return any(
            self.values.get(name, {}).get(labels, 0.0) < value * (1 - 1e-6)
            for name, series in before.values.items()
            if name.endswith(_COUNTER_SUFFIXES)
            for labels, value in series.items()
        )


def _printable(text: str) -> str:
    """Return a text of a server without control codes of the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


@dataclass(frozen=True)
class Buckets:
    """The observations of a histogram between two scrapes: `counts` up to each of the ascending `bounds`."""

    bounds: tuple[float, ...]  # the last one is infinite
    counts: tuple[float, ...]
    sum: float

    @property
    def count(self) -> float:
        """Number of observations."""
        return self.counts[-1] if self.counts else 0.0

    @property
    def mean(self) -> float:
        """Mean of the observations; NaN without any."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """Return a quantile as Prometheus' `histogram_quantile`; 0 < `share` <= 1. NaN without observations.

        Observations are assumed to be above 0 and spread evenly in their bucket. In the last bucket, which has no upper
        bound, the result is its lower bound.
        """
        if not self.count:
            return math.nan
        rank = share * self.count
        bucket = next((index for index, count in enumerate(self.counts[:-1]) if count >= rank), len(self.counts) - 1)
        lower, before = (self.bounds[bucket - 1], self.counts[bucket - 1]) if bucket else (0.0, 0.0)
        if bucket == len(self.counts) - 1:
            return lower
        return lower + (self.bounds[bucket] - lower) * ((rank - before) / (self.counts[bucket] - before))

    @property
    def highest(self) -> tuple[float, bool]:
        """The bound of the highest bucket with observations, and whether it is an upper one. NaN without any."""
        if not self.count:
            return math.nan, True
        bucket = self.counts.index(self.count)
        return (self.bounds[bucket], True) if bucket < len(self.counts) - 1 else (self.bounds[bucket - 1], False)


@dataclass(frozen=True)
class Change:
    """What happened between two scrapes of a server that was not restarted between them."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """The time between them."""
        return self.after.at - self.before.at

    def increase(self, name: str, **labels: str) -> float:
        """Return the increase of a counter, summed over its labels except those given."""
        return self.after.total(name, **labels) - self.before.total(name, **labels)

    def rate(self, name: str, **labels: str) -> float:
        """Return the increase per second."""
        return self.increase(name, **labels) / self.seconds

    def histogram(self, name: str, **labels: str) -> Buckets:
        """Return the new observations of a histogram, summed over its labels except those given."""
        before, after = (_cumulative(scrape, name, labels) for scrape in (self.before, self.after))
        bounds = tuple(sorted(after))
        counts = tuple(after[bound] - before.get(bound, 0.0) for bound in bounds)
        return Buckets(bounds, counts, self.increase(f"{name}_sum", **labels))


def _cumulative(scrape: Scrape, name: str, labels: Mapping[str, str]) -> dict[float, float]:
    """Return the number of observations up to each bound."""
    return {float(bound): count for bound, count in scrape.by(f"{name}_bucket", "le", **labels).items()}


class History:
    """The scrapes of the last minute. After a restart of the server, its counters begin at 0."""

    def __init__(self) -> None:
        self._scrapes: deque[Scrape] = deque(maxlen=HISTORY_SECONDS + 1)
        self.restarted_at: float | None = None  # the first scrape after the last restart
        # Of each second, None if there was no scrape: open streams, and the 95th percentile of latencies (NaN: none)
        self.points: deque[tuple[float, float] | None] = deque(maxlen=_CHART_SECONDS)

    @property
    def last(self) -> Scrape | None:
        """The newest scrape."""
        return self._scrapes[-1] if self._scrapes else None

    def add(self, scrape: Scrape) -> None:
        """Add a scrape."""
        if self._scrapes and scrape.restarted_since(self._scrapes[-1]):
            before = Scrape(self._scrapes[-1].at)
            self._scrapes.clear()
            self._scrapes.append(before)
            self.restarted_at = scrape.at
        self._scrapes.append(scrape)
        latency = math.nan
        if len(self._scrapes) > 1:
            latency = Change(self._scrapes[-2], scrape).histogram("nemostream_latency_seconds").quantile(0.95)
        self.points.append((scrape.total("nemostream_streams"), latency))

    def add_failure(self) -> None:
        """Add a second in which the server did not respond."""
        self.points.append(None)

    def change(self, seconds: float = _FIGURES_SECONDS) -> Change | None:
        """Return what happened in the last `seconds`, or since the first scrape. None with less than two scrapes."""
        if len(self._scrapes) < 2:
            return None
        after, earlier = self._scrapes[-1], [*self._scrapes][-2::-1]
        begin = after.at - seconds + 0.5  # scrapes are not exactly a second apart
        return Change(next((scrape for scrape in earlier if scrape.at <= begin), earlier[-1]), after)
