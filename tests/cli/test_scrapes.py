"""Increases and percentiles between two scrapes; the oracles are NumPy and Prometheus itself (promtool)."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream.cli.scrapes import HISTORY_SECONDS, Buckets, Change, History, Scrape

prometheus_client = pytest.importorskip("prometheus_client", reason="needs the serve extra")

BOUNDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.28, 0.4, 0.56, 0.8, 1.12, 2.24, 5.0, math.inf)


def buckets_of(values: np.ndarray) -> Buckets:
    counts = tuple(float(np.count_nonzero(values <= bound)) for bound in BOUNDS)
    return Buckets(BOUNDS, counts, float(values.sum()))


# -- percentiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95, 0.99, 1.0])
def test_a_quantile_is_within_the_bucket_of_the_exact_one(share: float) -> None:
    generator = np.random.default_rng(3)
    for values in (
        generator.lognormal(-3, 0.8, 5000),
        generator.uniform(0.0, 4.9, 5000),
        generator.exponential(0.1, 5000),
        np.concatenate([generator.normal(0.02, 0.002, 3000), generator.normal(0.5, 0.05, 200)]),
    ):
        values = np.clip(values, 1e-6, 4.99)
        exact = np.quantile(values, share, method="inverted_cdf")
        found = buckets_of(values).quantile(share)
        index = np.searchsorted(BOUNDS, exact)
        assert (0, *BOUNDS)[index] <= found <= BOUNDS[index]
    # Evenly spread observations are what the interpolation assumes.
    even = np.linspace(0, 5, 100_001)[1:]
    assert buckets_of(even).quantile(share) == pytest.approx(np.quantile(even, share), abs=1e-4)


@given(st.lists(st.integers(0, 50), min_size=16, max_size=16), st.floats(0.001, 1.0))
def test_quantiles_interpolate_the_cumulative_distribution(observed: list[int], share: float) -> None:
    counts = np.cumsum(observed).astype(float)
    found = Buckets(BOUNDS, tuple(counts.tolist()), 0.0).quantile(share)
    if not counts[-1]:
        assert math.isnan(found)
        return
    # The inverse of the distribution function, which is linear in each bucket.
    start = np.concatenate([[0.0], counts[:-1]])
    rank = share * counts[-1]
    if rank > counts[-2]:
        assert found == BOUNDS[-2]
        return
    bucket = int(np.argmax(counts >= rank))
    expected = np.interp(rank, [start[bucket], counts[bucket]], [(0.0, *BOUNDS)[bucket], BOUNDS[bucket]])
    assert found == pytest.approx(expected, rel=1e-9)


def test_quantiles_equal_those_of_prometheus(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (the package prometheus)")
    generator = np.random.default_rng(5)
    series, tests = [], []
    shares = (0.01, 0.5, 0.9, 0.95, 0.99, 1.0)
    found = {share: [] for share in shares}
    for case in range(20):
        observed = generator.integers(0, 40, len(BOUNDS)) * (generator.random(len(BOUNDS)) < 0.5)
        observed[case % 3 * 5] += 1
        buckets = Buckets(BOUNDS, tuple(np.cumsum(observed).astype(float).tolist()), 0.0)
        for bound, count in zip(buckets.bounds, buckets.counts, strict=True):
            le = "+Inf" if math.isinf(bound) else repr(bound)
            series.append({"series": f'h_bucket{{case="{case}",le="{le}"}}', "values": f"{count:.0f}"})
        for share in shares:
            found[share].append({"labels": f'{{case="{case}"}}', "value": buckets.quantile(share)})
    for share in shares:
        expression = f"histogram_quantile({share}, h_bucket)"
        tests.append({"expr": expression, "eval_time": "0m", "exp_samples": found[share]})
    rules = {"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": tests}]}
    (tmp_path / "quantiles.yml").write_text(json.dumps(rules))  # JSON is YAML

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["promtool", "test", "rules", str(tmp_path / "quantiles.yml")], capture_output=True, text=True
        )

    done = check()
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr
    found[0.95][0]["value"] += 0.001
    (tmp_path / "quantiles.yml").write_text(json.dumps(rules))
    assert check().returncode  # it compares


def test_the_mean_and_the_highest_bucket() -> None:
    values = np.array([1.0, 1.0, 3.0, 7.0])
    bounds = (1.0, 2.0, 4.0, 8.0, math.inf)
    counts = tuple(float(np.count_nonzero(values <= bound)) for bound in bounds)
    assert Buckets(bounds, counts, 12.0).mean == 3.0
    assert Buckets(bounds, counts, 12.0).highest == (8.0, True)
    assert Buckets(bounds, (2.0, 2.0, 3.0, 3.0, 3.0), 5.0).highest == (4.0, True)
    assert Buckets(bounds, (2.0, 2.0, 3.0, 3.0, 4.0), 5.0).highest == (8.0, False)
    empty = Buckets((), (), 0.0)
    assert math.isnan(empty.mean) and math.isnan(empty.highest[0]) and math.isnan(empty.quantile(0.5))
    assert math.isnan(Buckets(bounds, (0.0,) * 5, 0.0).highest[0])


# -- scrapes -----------------------------------------------------------------------------------------------------------


class Registry:
    """Metrics as a server's, written by Prometheus' client."""

    def __init__(self) -> None:
        self.registry = registry = prometheus_client.CollectorRegistry()
        self.streams = prometheus_client.Gauge("nemostream_streams", "", ["transport"], registry=registry)
        self.audio = prometheus_client.Counter("nemostream_audio_seconds", "", registry=registry)
        self.rejected = prometheus_client.Counter("nemostream_streams_rejected", "", ["reason"], registry=registry)
        self.latency = prometheus_client.Histogram(
            "nemostream_latency_seconds", "", ["chunk_ms"], buckets=BOUNDS, registry=registry
        )
        self.started = prometheus_client.Gauge("nemostream_start_time_seconds", "", registry=registry)
        self.started.set(1000)

    def scrape(self, at: float) -> Scrape:
        return Scrape.parse(prometheus_client.generate_latest(self.registry).decode(), at)


def test_sums_over_labels() -> None:
    server = Registry()
    server.streams.labels("websocket").set(3)
    server.streams.labels("riva").set(4)
    server.latency.labels(80).observe(0.01)
    server.latency.labels(560).observe(0.3)
    scrape = server.scrape(0)
    assert scrape.total("nemostream_streams") == 7 and scrape.total("nemostream_streams", transport="riva") == 4
    assert scrape.by("nemostream_streams", "transport") == {"websocket": 3, "riva": 4}
    assert scrape.by("nemostream_latency_seconds_count", "chunk_ms") == {"80": 1, "560": 1}
    assert scrape.total("nemostream_missing") == 0 and scrape.by("nemostream_missing", "x") == {}


def test_labels_have_no_control_codes() -> None:
    server = Registry()
    server.streams.labels("a\x1b[2Jb\n").set(1)
    assert server.scrape(0).by("nemostream_streams", "transport") == {"a?[2Jb?": 1}


@pytest.mark.parametrize("text", ["<html><body>hello</body></html>", "{}", 'a{b="c} 1', "a b c d e", "\x00"])
def test_another_format_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        Scrape.parse(text, 0)


@given(st.text(max_size=60))
def test_any_text_is_a_value_error_or_metrics(text: str) -> None:
    with suppress(ValueError):
        Scrape.parse(text, 0)


def test_what_happened_between_two_scrapes() -> None:
    server = Registry()
    for value in (0.01, 0.3, 4.0):
        server.latency.labels(80).observe(value)
    server.audio.inc(100.5)
    before = server.scrape(10.0)
    new = [0.03] * 8 + [0.07, 0.5]
    for value in new:
        server.latency.labels(80).observe(value)
    server.latency.labels(560).observe(0.3)
    server.audio.inc(20)
    server.rejected.labels("CapacityError").inc(2)  # a new label
    change = Change(before, server.scrape(14.0))
    assert change.seconds == 4.0
    assert change.rate("nemostream_audio_seconds_total") == pytest.approx(5.0)
    assert change.increase("nemostream_streams_rejected_total", reason="CapacityError") == 2
    of_size = change.histogram("nemostream_latency_seconds", chunk_ms="80")
    assert (of_size.bounds, of_size.counts) == (BOUNDS, buckets_of(np.array(new)).counts)
    assert of_size.mean == pytest.approx(np.mean(new))
    both = change.histogram("nemostream_latency_seconds")
    assert both.counts == buckets_of(np.array([*new, 0.3])).counts
    assert change.histogram("nemostream_missing_seconds").count == 0


# -- history -----------------------------------------------------------------------------------------------------------


def test_figures_are_of_the_last_seconds() -> None:
    server, history = Registry(), History()
    assert history.last is None and history.change() is None
    for second in range(100):
        history.add(server.scrape(second + (second % 3) * 0.1))
        server.audio.inc(second)
    change = history.change(10)
    assert change is not None and (change.before.at, change.after.at) == (89.2, 99.0)
    assert change.increase("nemostream_audio_seconds_total") == sum(range(89, 99))
    longest = history.change(1000)
    assert longest is not None and longest.before.at == pytest.approx(99 - HISTORY_SECONDS, abs=0.3)


def test_the_first_scrapes() -> None:
    server, history = Registry(), History()
    history.add(server.scrape(5))
    assert history.change() is None
    server.audio.inc(3)
    history.add(server.scrape(6))
    change = history.change()
    assert change is not None and change.rate("nemostream_audio_seconds_total") == 3


@pytest.mark.parametrize("knows_start", [True, False])
def test_counters_of_a_restarted_server_begin_at_zero(knows_start: bool) -> None:
    old, new, history = Registry(), Registry(), History()
    old.started.set(1000 if knows_start else 0)
    new.started.set(2000 if knows_start else 0)
    old.audio.inc(500)
    old.latency.labels(80).observe(0.3)
    new.audio.inc(600 if knows_start else 4)  # more than before: only the time of the start reveals it
    new.latency.labels(80).observe(0.01)
    history.add(old.scrape(1))
    history.add(old.scrape(2))
    assert history.restarted_at is None
    history.add_failure()
    history.add(new.scrape(4))
    assert history.restarted_at == 4
    change = history.change()
    assert change is not None and change.seconds == 2
    assert change.increase("nemostream_audio_seconds_total") == (600 if knows_start else 4)
    assert change.histogram("nemostream_latency_seconds").quantile(1.0) == 0.01
    history.add(new.scrape(5))
    assert history.restarted_at == 4  # once


def test_rounding_is_no_restart() -> None:
    """Counters of several processes are summed in any order."""
    server, history = Registry(), History()
    server.audio.inc(0.1 + 0.2 + 0.3)
    history.add(server.scrape(1))
    other = Registry()
    other.audio.inc(0.3 + 0.2 + 0.1)
    assert 0.3 + 0.2 + 0.1 < 0.1 + 0.2 + 0.3
    history.add(other.scrape(2))
    assert history.restarted_at is None


def test_points_of_the_charts() -> None:
    server, history = Registry(), History()
    server.streams.labels("websocket").set(3)
    history.add(server.scrape(1))
    server.latency.labels(80).observe(0.01)
    history.add(server.scrape(2))
    history.add_failure()
    server.streams.labels("riva").set(1)
    history.add(server.scrape(4))
    (first, quiet), second, lost, (last, nothing) = history.points
    assert (first, last, lost) == (3, 4, None) and math.isnan(quiet) and math.isnan(nothing)
    assert second == (3, pytest.approx(0.005 + 0.95 * 0.005))
