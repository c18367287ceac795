"""Prometheus and Grafana files of `deploy/`: promtool's unit tests of the alerts, and a real Prometheus that scrapes a
server, evaluates every expression of the dashboard, and evaluates the alerts."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import socket as sockets
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import riva.client
import yaml
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as sync_connect

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "nemostream.json").read_text())
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="needs Prometheus (Debian: prometheus)"
)
# What Grafana replaces in an expression: the variables of the dashboard, and the range of four scrapes.
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "30s"}


def promtool(*arguments: object) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> list[tuple[str, str]]:
    """Return the title of the panel and the expression of every query, with the variables replaced."""
    found = []
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found.append((panel["title"], expression))
    return found


# -- Prometheus' own checks --------------------------------------------------------------------------------------------


@needs_prometheus
def test_promtool_accepts_the_files(tmp_path: Path) -> None:
    promtool("check", "rules", ALERTS)
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    config = tmp_path / "prometheus" / "prometheus.yml"
    key = tmp_path / "key"
    key.write_text("key")
    config.write_text(config.read_text().replace("/run/secrets/nemostream-api-key", str(key)))
    promtool("check", "config", config)
    # Debian's Prometheus is built without the discovery of Kubernetes, so that part is not checked.
    cluster = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus.yaml").read_text())
    (job,) = cluster["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}] and job["job_name"] == "nemostream"
    job["authorization"]["credentials_file"] = str(key)
    config.write_text(yaml.safe_dump(cluster))
    promtool("check", "config", config)
    rules = [{"record": f"panel:{index}", "expr": expr} for index, (_, expr) in enumerate(dashboard_expressions())]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "panels.yaml")


@needs_prometheus
def test_alerts_fire_when_they_should() -> None:
    file = Path(__file__).with_name("alerts.yaml")
    promtool("test", "rules", file)
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert re.findall(r"^\| `(Nemostream\w+)` \|", page, re.MULTILINE) == [alert["alert"] for alert in alerts()]
    cases = [case for test in yaml.safe_load(file.read_text())["tests"] for case in test["alert_rule_test"]]
    for alert in alerts():
        outcomes = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == alert["alert"]}
        assert outcomes == {True, False}, f"{alert['alert']}: a case with and one without an alert are needed"


# -- names and labels against real servers -----------------------------------------------------------------------------


def exposed(text: str) -> dict[str, set[str]]:
    """Return the names of the samples that a server exposes, also those that have none yet, with their labels."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    names: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for suffix in suffixes[family.type]:
            names.setdefault(family.name + suffix, set())
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def label_values(text: str) -> set[tuple[str, str]]:
    """Return the values of labels of counters and gauges, by the name of the metric."""
    families = [family for family in text_string_to_metric_families(text) if family.type != "histogram"]
    found = [
        (sample.name, value) for family in families for sample in family.samples for value in sample.labels.values()
    ]
    return {(name, value) for name, value in found if not name.endswith("_created")}


def test_labels_exist_before_they_are_used(serve_process: Any, spoken: Any) -> None:
    """Otherwise the first failure or rejection is not part of any rate."""
    with serve_process("--no-measure", "--max-streams", "1") as running:
        first = label_values(running.get("/metrics")[1])
        with sync_connect(f"{running.socket}/v1/stream"), pytest.raises(InvalidStatus):
            sync_connect(f"{running.socket}/v1/stream")
        with pytest.raises(InvalidStatus):
            sync_connect(f"{running.socket}/v1/stream?chunk_ms=1")
        with sync_connect(f"{running.socket}/v1/realtime") as socket:
            socket.recv()
        recognizer = riva.client.ASRService(riva.client.Auth(uri=running.address))
        config = riva.client.RecognitionConfig(sample_rate_hertz=16000)
        assert recognizer.offline_recognize(spoken[0].pcm, config).results
        with spoken[0].path.open("rb") as file:
            answer = httpx.post(f"{running.url}/v1/audio/transcriptions", files={"file": file}, data={"model": "any"})
        assert answer.status_code == 200
        assert running.get("/v1/models", Origin="https://evil.example")[0] == 403
        assert running.get("/v1/models", Host="evil.example")[0] == 403
        assert running.metric("nemostream_streams_opened_total") == 4
        assert running.metric("nemostream_streams_rejected_total") == 2
        assert running.metric("nemostream_requests_denied_total") == 2
        assert label_values(running.get("/metrics")[1]) == first
    assert {name for name, _ in first} == {
        "nemostream_info",
        "nemostream_streams",
        "nemostream_streams_opened_total",
        "nemostream_streams_failed_total",
        "nemostream_streams_rejected_total",
        "nemostream_requests_denied_total",
    }


@pytest.mark.parametrize("options", [(), ("--transports", "2")], ids=["one process", "transports"])
def test_expressions_use_metrics_of_the_server(
    options: tuple[str, ...], serve_process: Any, spoken: Any, tmp_path: Path
) -> None:
    with serve_process("--no-measure", "--state-store", str(tmp_path / "states"), *options) as running:

        async def use() -> None:
            """Use every chunk size. Latencies are recorded for messages of at most a second."""
            for chunk_ms in (80, 160, 560, 1120):
                async with connect(f"{running.socket}/v1/stream?chunk_ms={chunk_ms}") as socket:
                    for start in range(0, len(spoken[0].pcm), 16 * chunk_ms):
                        await socket.send(spoken[0].pcm[start : start + 16 * chunk_ms])
                    await socket.send(json.dumps({"type": "finish"}))
                    _ = [event async for event in socket]

        asyncio.run(use())
        names = exposed(running.get("/metrics")[1])
        buckets = {
            (sample.labels["chunk_ms"], sample.labels["le"])
            for family in text_string_to_metric_families(running.get("/metrics")[1])
            for sample in family.samples
            if sample.name == "nemostream_latency_seconds_bucket"
        }
    used: dict[str, set[str]] = {}
    target = {"job", "instance"}  # added by Prometheus
    for expression in [alert["expr"] for alert in alerts()] + [expr for _, expr in dashboard_expressions()]:
        for name, matchers in re.findall(r"\b(nemostream_\w+)(?:\{(.*?)\})?", expression):
            used.setdefault(name, set()).update(re.findall(r"(\w+)=", matchers))
        grouped = {label.strip() for group in re.findall(r"by \((.*?)\)", expression) for label in group.split(",")}
        metrics = re.findall(r"\bnemostream_\w+", expression)
        assert all(any(label in names[name] for name in metrics) for label in grouped - target), expression
    for name, labels in used.items():
        assert name in names, f"the server has no metric {name}"
        assert labels - target <= names[name], (name, labels, names[name])
    # The bucket that counts results in time exists for every chunk size.
    expression = next(alert["expr"] for alert in alerts() if alert["alert"] == "NemostreamLate")
    pairs = set(re.findall(r'chunk_ms="(\d+)", le="([\d.]+)"', expression))
    assert len(pairs) == 4 and pairs <= buckets
    assert all(int(chunk_ms) == round(1000 * float(le)) for chunk_ms, le in pairs)
    late = next(expr for title, expr in dashboard_expressions() if title == "Results later than their chunk")
    assert set(re.findall(r'chunk_ms="(\d+)", le="([\d.]+)"', late)) == pairs


# -- the dashboard -----------------------------------------------------------------------------------------------------


def test_the_dashboard_is_one_of_grafana() -> None:
    """Grafana's published schema reads every field. (Grafana itself is not run.)"""
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins", reason="needs grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))

    def lost(written: Any, kept: Any, path: str) -> list[str]:
        if isinstance(written, dict) and isinstance(kept, dict):
            return [
                one
                for name, value in written.items()
                for one in (lost(value, kept[name], f"{path}.{name}") if name in kept else [f"{path}.{name}"])
            ]
        if isinstance(written, list) and isinstance(kept, list) and len(written) == len(kept):
            return [
                one for i, pair in enumerate(zip(written, kept, strict=True)) for one in lost(*pair, f"{path}[{i}]")
            ]
        return [] if written == kept else [path]

    assert lost(DASHBOARD, read, "") == []


def test_panels_do_not_overlap() -> None:
    cells: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] >= 0 and grid["x"] + grid["w"] <= 24
        for x in range(grid["x"], grid["x"] + grid["w"]):
            for y in range(grid["y"], grid["y"] + grid["h"]):
                assert (x, y) not in cells, f"{panel['title']} overlaps {cells[x, y]}"
                cells[x, y] = panel["title"]
    height = 1 + max(y for _, y in cells)
    assert len(cells) == 24 * height, "the grid has a gap"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert len(set(legends)) == len(legends) and panel["description"].endswith(".")
        # Series of one query have different names: all labels of the result are in the legend.
        for target in panel["targets"]:
            (labels, *_) = [*re.findall(r"^[\w\s(.,-]*?by \((.*?)\)", target["expr"]), ""]
            for label in (label.strip() for label in labels.split(",") if label.strip() not in ("", "le")):
                assert f"{{{{{label}}}}}" in target["legendFormat"], target


# -- a real Prometheus -------------------------------------------------------------------------------------------------


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self._url}/-/ready", timeout=5).status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def get(self, path: str, **query: Any) -> Any:
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str, moment: float | None = None) -> list[tuple[dict[str, str], float]]:
        result = self.get("query", query=expression, **({"time": moment} if moment else {}))["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str) -> float:
        return sum(value for _, value in self.query(expression))

    def increase(self, counter: str, moment: float) -> float:
        """Return the difference of the last and the first sample in the range that the panels have."""
        (series,) = self.get("query", query=f"{counter}[{VARIABLES['$__rate_interval']}]", time=moment)["result"]
        (_, first), *_, (_, last) = series["values"]
        return float(last) - float(first)


@contextmanager
def prometheus(folder: Path, target: str, key: str) -> Iterator[Prometheus]:
    """Run Prometheus with the configuration of `deploy/` for another target, key and interval."""
    shutil.copytree(DEPLOY / "prometheus", folder / "config")
    (folder / "key").write_text(key)
    file = folder / "config" / "prometheus.yml"
    text = file.read_text()
    for before, after in (
        ("/run/secrets/nemostream-api-key", str(folder / "key")),
        ('targets: ["server:8000"]', f'{{targets: ["{target}"], labels: {{namespace: default, pod: nemostream-0}}}}'),
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
    ):
        assert before in text
        text = text.replace(before, after)
    file.write_text(text)
    with sockets.create_server(("127.0.0.1", 0)) as listening:
        port = int(listening.getsockname()[1])
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
    )
    try:
        server, deadline = Prometheus(port), time.monotonic() + 60
        while not server.ready():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def autoscaler_query() -> str:
    """Return the query that prometheus-adapter derives from its rule for the pods of a Deployment."""
    rules = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"]
    (rule,) = rules["custom"]
    series, labels = re.fullmatch(r"(\w+)\{(.*)\}", rule["seriesQuery"]).groups()  # type: ignore[union-attr]
    assert {label.partition("!")[0] for label in labels.split(", ")} == rule["resources"]["overrides"].keys()
    query = rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.GroupBy>>", "pod")
    return str(query.replace("<<.LabelMatchers>>", 'namespace="default",pod=~"nemostream-0|nemostream-1"'))


@pytest.mark.slow
@needs_prometheus
def test_prometheus_has_data_for_every_panel(serve_process: Any, spoken: Any, tmp_path: Path) -> None:
    options = (
        "--no-measure",
        "--max-streams",
        "3",
        "--state-seconds",
        "0.5",
        "--state-store",
        str(tmp_path / "states"),
    )
    with (
        serve_process(*options, "--transports", "1", NEMOSTREAM_API_KEYS="secret") as running,
        prometheus(tmp_path, f"127.0.0.1:{running.http}", "secret\n") as server,
    ):
        key = {"Authorization": "Bearer secret"}

        async def until(condition: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 60
            while not condition():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.2)

        async def speak(end: asyncio.Event, chunk_ms: int, options: str = "", finish: bool = True) -> str:
            """Send a recording in real time and wait for `end`; without `finish`, disconnect."""
            url = f"{running.socket}/v1/stream?chunk_ms={chunk_ms}{options}"
            async with connect(url, additional_headers=key, max_queue=None) as socket:
                for start in range(0, len(spoken[0].pcm), 3200):
                    await socket.send(spoken[0].pcm[start : start + 3200])
                    await asyncio.sleep(0.1)
                await end.wait()
                if not finish:
                    return ""
                await socket.send(json.dumps({"type": "finish"}))
                *_, last = [json.loads(event) async for event in socket]
                return str(last["text"])

        async def clients() -> None:
            # The first values of counters are scraped before they increase.
            await until(lambda: server.value("count_over_time(nemostream_audio_seconds_total[1m])") >= 2)
            end = asyncio.Event()
            speaking = [
                asyncio.create_task(speak(end, 560)),
                asyncio.create_task(speak(end, 80, "&resumable=1")),
                asyncio.create_task(speak(end, 160, finish=False)),
            ]
            await until(
                lambda: running.get("/metrics", **key)[1].count('nemostream_streams{transport="websocket"} 3.0') == 1
            )
            for _ in range(10):
                await asyncio.sleep(0.2)
                with pytest.raises(InvalidStatus):
                    await connect(f"{running.socket}/v1/stream", additional_headers=key)
                assert running.get("/v1/models")[0] == 401
            # Three of three streams are in use.
            await until(lambda: server.query(autoscaler_query()) == [({"pod": "nemostream-0"}, 1)])
            end.set()
            assert (await speaking[0]) == spoken[0].text and (await speaking[1]) and not (await speaking[2])
            await until(
                lambda: server.value("nemostream_streams") == 0 < server.value("nemostream_streams_failed_total")
            )

        asyncio.run(clients())
        time.sleep(2.5)  # two further scrapes
        now = time.time()  # of all queries, so that no scrape is between two of them
        results = [(title, expression, server.query(expression, now)) for title, expression in dashboard_expressions()]
        for title, expression, result in results:
            assert result, f"{title}: no data for {expression}"
            assert all(math.isfinite(value) for _, value in result), (title, expression, result)
        # The share of late results is that of the samples themselves.
        in_time = server.increase('nemostream_latency_seconds_bucket{chunk_ms="80", le="0.08"}', now)
        all_results = server.increase('nemostream_latency_seconds_count{chunk_ms="80"}', now)
        shares = {
            labels["chunk_ms"]: value
            for title, _, result in results
            for labels, value in result
            if title == "Results later than their chunk"
        }
        assert shares["80"] == pytest.approx(1 - in_time / all_results, abs=1e-9)

        def values(title: str) -> dict[str, float]:
            """Return the values of a panel by their labels."""
            found = [pair for panel, _, result in results if panel == title for pair in result]
            return {" ".join(labels.values()): value for labels, value in found}

        # What happened is in the panels.
        assert values("Servers") == {"": 1} and values("Streams in use") == {"": 0}
        assert values("Rejected")["CapacityError"] > 0
        assert values("Latency").keys() == {"80", "160", "560"} and min(values("Latency").values()) > 0
        assert values("Duration of a step").keys() == values("Latency").keys()
        assert 0 < min(values("Engine").values()) <= max(values("Engine").values()) <= 1.2
        assert min(values("Streams per step").values()) >= 1
        assert 0.1 < sum(values("Audio received").values()) < 3 * spoken[0].seconds
        assert min(values("Time to store a state").values()) > 0 == sum(values("Degradation").values())
        assert values("Failed streams")["websocket"] > 0 == values("Failed streams")["riva"]
        assert values("Denied requests and timeouts")["key"] > 0 == sum(values("Restarts").values())
        # The variables of the dashboard.
        for variable in DASHBOARD["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["query"]["query"])
                assert match
                expected = {"job": "nemostream", "instance": f"127.0.0.1:{running.http}"}
                found = server.get(f"label/{match[2]}/values", **{"match[]": match[1]})
                assert found == [expected[variable["name"]]]
        # The alerts are evaluated; that of rejected streams waits for its five minutes.
        (group,) = server.get("rules")["groups"]
        states = {rule["name"]: (rule["health"], rule["state"]) for rule in group["rules"]}
        assert states.keys() == {alert["alert"] for alert in alerts()}
        assert all(health == "ok" for health, _ in states.values())
        assert states["NemostreamNoCapacity"][1] == "pending" and states["NemostreamDown"][1] == "inactive"
        # `up` is 0 for a server that has ended.
        assert running.process is not None
        running.process.kill()
        deadline = time.monotonic() + 30
        while server.value("up"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
