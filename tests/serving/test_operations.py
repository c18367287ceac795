"""Operation of the server: readiness, metrics, logs, keys, TLS, origins, draining, settings."""

from __future__ import annotations

import asyncio
import datetime
import hmac
import json
import logging
import os
import re
import shutil
import signal
import socket as sockets
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import riva.client
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import WebSocketDenialResponse
from websockets.asyncio.client import connect as asyncio_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import nemostream
from nemostream.errors import NemostreamError, OptionError
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.serving import logs, service
from nemostream.serving import server as server_module
from nemostream.serving.errors import Draining
from nemostream.serving.network.access import key_number
from nemostream.serving.protocols.http import create_app
from nemostream.serving.service import DEMO_NOTE
from nemostream.serving.settings import Settings, read_settings


def finish(socket: Any) -> dict[str, Any]:
    socket.send(json.dumps({"type": "finish"}))
    *_, last = (json.loads(event) for event in socket)
    return last


def test_health_and_readiness(server: Any) -> None:
    assert server.get("/healthz") == (200, '{"status":"alive"}')
    status, body = server.get("/readyz")
    state = json.loads(body)
    assert status == 200 and state["status"] == "ready" and state["max_streams"] == 64
    assert state["http_port"] == server.http and state["grpc_port"] == server.grpc


def test_readiness_requires_all_engines_to_be_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[int] = []
    seen: list[tuple[str, int, int]] = []
    warm_up = service.warm_up

    def recording_warm_up(model: Any, chunk_ms: int) -> None:
        warmed.append(chunk_ms)
        seen.append((here.state, *get_status("/readyz", "/healthz")))
        warm_up(model, chunk_ms)

    def get_status(*paths: str) -> list[int]:
        with TestClient(create_app(here, {"http_port": 1})) as client:
            return [client.get(path).status_code for path in paths]

    monkeypatch.setattr(service, "warm_up", recording_warm_up)
    here = service.Service(Settings(chunks=[80, 560], measure=False))
    with pytest.raises(Draining):
        here.open("test")
    here.start()
    try:
        assert set(warmed) == {80, 560} and set(seen) == {("starting", 503, 200)}
        assert get_status("/readyz") == [200]
    finally:
        here.close()
    assert get_status("/readyz") == [503]


@pytest.mark.parametrize("measure", [False, True])
def test_measure_option(monkeypatch: pytest.MonkeyPatch, measure: bool) -> None:
    measured: list[int] = []
    steps: dict[int, int] = {}

    def throughput(model: Any, chunk_ms: int, streams: int, **options: Any) -> float:
        measured.append(chunk_ms)
        return 20.0

    load = service.nemostream.load

    def load_and_count(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        model.watch(lambda chunk, rows, seconds: steps.update({chunk.ms: steps.get(chunk.ms, 0) + rows}), print)
        return model

    monkeypatch.setattr(service, "measure_throughput", throughput)
    monkeypatch.setattr(service.nemostream, "load", load_and_count)
    here = service.Service(Settings(measure=measure, max_streams=100))
    here.start()
    try:
        assert measured == ([560] if measure else []) and here.max_streams == (10 if measure else 100)
        assert steps == dict.fromkeys(here.chunks, 1)  # every engine is warmed up
    finally:
        here.close()


def test_threads_leave_a_cpu_of_the_quota_free(monkeypatch: pytest.MonkeyPatch) -> None:
    thread_counts: list[int] = []

    def load(*args: Any, threads: int, **options: Any) -> Any:
        thread_counts.append(threads)
        raise OptionError("stop here.")

    monkeypatch.setattr(service.nemostream, "load", load)
    for cpus in (1, 2, 5):
        monkeypatch.setattr(service, "usable_cpus", lambda cpus=cpus: cpus)
        with pytest.raises(OptionError):
            service.Service(Settings()).start()
    with pytest.raises(OptionError):
        service.Service(Settings(threads=3)).start()
    assert thread_counts == [1, 1, 4, 3]


@pytest.mark.parametrize(("max_batch", "largest", "rows"), [(None, 64, 64), (3, 3, 3), (100, 100, 90)])
def test_max_batch(monkeypatch: pytest.MonkeyPatch, max_batch: int | None, largest: int, rows: int) -> None:
    """Steps have at most `max_batch` streams, and as many are used to measure the throughput."""
    measured: list[int] = []
    backends: list[Any] = []

    def throughput(model: Any, chunk_ms: int, streams: int, **options: Any) -> float:
        measured.append(streams)
        return 1000.0

    class Recorded(OrtBackend):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            backends.append(self)

    monkeypatch.setattr(service, "measure_throughput", throughput)
    monkeypatch.setattr("nemostream.runtime.backends.cpu.OrtBackend", Recorded)
    here = service.Service(Settings(max_streams=90, max_batch=max_batch))
    here.start()
    here.close()
    (backend,) = backends
    assert measured == [rows] and backend.max_batch == largest


@pytest.fixture(scope="module")
def server_with_key(serve_here: Any) -> Any:
    with serve_here(api_keys=["k"], measure=False) as running:
        yield running


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/", "/sample.flac"])
def test_head_is_get_without_a_body(path: str, server: Any, server_with_key: Any) -> None:
    responses = {}
    for method in ("GET", "HEAD"):
        with sockets.create_connection(("127.0.0.1", server.http)) as socket:
            # The server closes the connection, so that the whole response is read.
            socket.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            head, _, body = b"".join(iter(lambda: socket.recv(65536), b"")).partition(b"\r\n\r\n")
        status, *headers = head.decode().split("\r\n")
        responses[method] = (
            status,
            sorted(line for line in headers if not line.startswith(("date", "content-length"))),
            body,
        )
    assert responses["HEAD"][:2] == responses["GET"][:2] and " 200 " in responses["HEAD"][0]
    assert responses["GET"][2] and not responses["HEAD"][2]
    status = httpx.head(server_with_key.url + path).status_code  # no key is required for the same paths
    assert status == server_with_key.get(path)[0] == (401 if path == "/metrics" else 200)


def test_models_endpoint_with_openai_client(server: Any) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
    (listed,) = client.models.list().data
    assert client.models.retrieve(listed.id) == listed and listed.id == "demo"
    for unknown in ("whisper-1", "nvidia/parakeet", "é" * 1000):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(unknown)
        body = caught.value.response.json()["error"]
        assert set(body) == {"message", "type", "code", "param"} and "'demo'" in body["message"]
        assert (body["type"], body["code"], body["param"]) == ("invalid_request_error", "model_not_found", "model")
    assert service.Service(Settings()).state == "starting"
    with TestClient(create_app(service.Service(Settings()))) as starting:
        assert starting.get("/v1/models/demo").status_code == 503
        for query in ("", "?itn=1", "?language=de"):
            with pytest.raises(WebSocketDenialResponse) as denied, starting.websocket_connect(f"/v1/stream{query}"):
                pass
            assert denied.value.status_code == 503


def test_invalid_forms_have_openai_errors(server: Any, spoken: Any) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
    for name, value in (
        ("response_format", "diarized_json"),
        ("temperature", "hot"),
        ("stream", "maybe"),
        ("chunk_ms", "x"),
        ("timestamp_granularities[]", "letter"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.audio.transcriptions.create(model="any", file=spoken[0].path, extra_body={name: value})
        body = caught.value.response.json()["error"]
        assert body["type"] == "invalid_request_error" and body["param"].startswith(name), body
    response = httpx.post(server.url + "/v1/audio/transcriptions", files={"model": (None, "any")})
    assert response.status_code == 400 and response.json()["error"]["param"] == "file"
    schema = json.loads(server.get("/openapi.json")[1])
    for methods in schema["paths"].values():
        assert all("422" not in operation["responses"] for operation in methods.values())
    assert "400" in schema["paths"]["/v1/audio/transcriptions"]["post"]["responses"]


def test_preflight_allows_the_headers_of_the_openai_client(serve_here: Any) -> None:
    """`*` in Access-Control-Allow-Headers does not cover Authorization (Fetch standard)."""
    sent: list[str] = []
    client = openai.OpenAI(
        base_url="http://x/v1",
        api_key="k",
        organization="o",
        project="p",
        http_client=httpx.Client(
            transport=httpx.MockTransport(
                lambda request: sent.extend(request.headers) or httpx.Response(200, json={"data": []})  # type: ignore[func-returns-value]
            )
        ),
    )
    client.models.list()
    assert {"authorization", "openai-organization", "x-stainless-lang"} <= set(sent)
    with serve_here(origins=["https://app.example"], api_keys=["k"], measure=False) as running:
        for path, method in (("/v1/audio/transcriptions", "POST"), ("/v1/models", "GET"), ("/v1/models/demo", "GET")):
            response = httpx.options(
                running.url + path,
                headers={
                    "Origin": "https://app.example",
                    "Access-Control-Request-Method": method,
                    "Access-Control-Request-Headers": ",".join(sorted(sent)),
                },
            )
            assert (
                response.status_code == 204 and response.headers["Access-Control-Allow-Origin"] == "https://app.example"
            )
            allowed = [name.strip().lower() for name in response.headers["Access-Control-Allow-Headers"].split(",")]
            assert "authorization" in allowed and "*" in allowed
            assert method in response.headers["Access-Control-Allow-Methods"]


def test_invalid_bundle_ends_the_server_without_a_traceback(serve_process: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught, serve_process("--bundle", str(tmp_path)):
        pass
    assert "not a bundle" in str(caught.value) and "Traceback" not in str(caught.value)


def test_stopped_is_logged_only_after_a_successful_start(
    serve_process: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = asyncio.Event()
    caplog.set_level("INFO")
    with pytest.raises(NemostreamError, match="not a bundle"):
        asyncio.run(server_module.serve(Settings(port=0, grpc_port=0, bundle=tmp_path), stop=stop))
    assert "stopped" not in caplog.messages
    with serve_process("--no-measure") as running:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
    assert [line["event"] for line in running.log][-1] == "stopped"


# -- output on a terminal ----------------------------------------------------------------------------------------------


def run_on_a_terminal(*arguments: str) -> tuple[str, str]:
    """Start a server whose standard error is a terminal and stop it when it is ready. Return the URL and stderr."""
    controller, terminal = os.openpty()
    command = [sys.executable, "-m", "nemostream", "serve", "--port", "0", "--grpc-port", "0", "--no-measure"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEMOSTREAM_")}
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=terminal, text=True, env=environment
    )
    os.close(terminal)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    httpx.get(f"{url}/v1/models", headers={"Origin": "https://evil.example/ \x1b[2J"})
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    shown = b""
    with suppress(OSError):  # EIO: the other side is closed
        while data := os.read(controller, 65536):
            shown += data
    os.close(controller)
    return url, shown.decode()


def test_log_on_a_terminal_is_plain_text() -> None:
    url, shown = run_on_a_terminal()
    assert re.search(rf"^Page:  {re.escape(url)}/\s*$", shown, re.MULTILINE), shown
    assert re.search(r"^gRPC:  127\.0\.0\.1:\d+\s*$", shown, re.MULTILINE)
    assert re.search(r"^Ready: model demo, at most 256 streams", shown, re.MULTILINE)
    assert "recognises English numbers" in shown and "--bundle" in shown
    assert re.search(
        r"^\d\d:\d\d:\d\d warning request denied reason=origin peer=127\.0\.0\.1 path=/v1/models\s*$",
        shown,
        re.MULTILINE,
    )
    assert "{" not in shown and "\x1b" not in shown


def test_log_format_option(serve_process: Any) -> None:
    _, shown = run_on_a_terminal("--log-format", "json")
    lines = [json.loads(line) for line in shown.splitlines()]
    assert {"ready", "stopped"} <= {line["event"] for line in lines} and "Page:" not in shown
    with serve_process("--no-measure", "--log-format", "text") as running:  # not a terminal
        pass
    text = "".join(line["event"] for line in running.log)
    assert f"Page:  {running.url}/" in text and "ready load_seconds=" in text
    with serve_process("--no-measure") as running:
        pass
    assert "time" in running.log[0] and next(line["demo"] for line in running.log if line["event"] == "ready") is True


def test_control_characters_are_escaped_in_text_logs() -> None:
    record = logging.makeLogRecord(
        {"msg": "request denied", "path": "/a b\x1b[2J\n00:00:00 info ready", "levelname": "INFO"}
    )
    line = logs.TextLines().format(record)
    assert line.isprintable() and json.loads(line.partition("path=")[2]) == "/a b\x1b[2J\n00:00:00 info ready"


def test_only_the_demo_model_has_a_note(server: Any, tmp_path: Path) -> None:
    status = json.loads(server.get("/readyz")[1])
    assert status["demo"] is True and "recognises English numbers" in status["note"]
    copy = tmp_path / "bundle"
    shutil.copytree(nemostream.demo_bundle(), copy)
    for bundle, demo in ((nemostream.demo_bundle(), True), (copy, False)):
        here = service.Service(Settings(bundle=bundle, measure=False, chunks=[560]))
        here.start()
        try:
            assert here.describe()["demo"] is demo and ("note" in here.describe()) is demo
        finally:
            here.close()


# -- logs --------------------------------------------------------------------------------------------------------------


def test_log_lines_about_clients_have_the_address(serve_process: Any, spoken: Any) -> None:
    peer = {"X-Forwarded-For": "192.0.2.7"}
    with serve_process("--no-measure", "--log-transcripts") as running:
        with connect(f"{running.socket}/v1/stream", additional_headers=peer) as socket:
            socket.send(spoken[0].pcm)
            finish(socket)
        with pytest.raises(InvalidStatus), connect(f"{running.socket}/v1/stream?chunk_ms=1", additional_headers=peer):
            pass
        assert running.get("/readyz", Host="evil.example", **peer)[0] == 403
        with sockets.create_connection(("127.0.0.1", running.http)) as bare:
            bare.sendall(b"nonsense\r\n\r\n")
            bare.recv(100)
    general = {"ready", "draining", "stopped", DEMO_NOTE}
    peers = {line["event"]: line.get("peer") for line in running.log if line["event"] not in general}
    assert peers == {
        "stream opened": "192.0.2.7",
        "utterance": "192.0.2.7",
        "stream closed": "192.0.2.7",
        "stream rejected": "192.0.2.7",
        "request denied": "192.0.2.7",
        "Invalid HTTP request received.": "127.0.0.1",
    }


def test_wrong_keys_are_counted_and_logged_in_every_protocol(serve_process: Any) -> None:
    with serve_process("--no-measure", "--api-keys", "k") as running:
        assert running.get("/v1/models", Authorization="Bearer wrong")[0] == 401
        for path in ("/v1/stream", "/v1/realtime"):
            with pytest.raises(InvalidStatus), connect(running.socket + path):
                pass
        with pytest.raises(grpc.RpcError):
            riva.client.ASRService(riva.client.Auth(uri=running.address)).offline_recognize(
                b"", riva.client.RecognitionConfig()
            )
        lines = running.get("/metrics", Authorization="Bearer k")[1].splitlines()
        assert 'nemostream_requests_denied_total{reason="key"} 4.0' in lines
    denied = [line for line in running.log if line["event"] == "request denied"]
    assert [(line["reason"], line["peer"]) for line in denied] == [("key", "127.0.0.1")] * 4


def test_metrics_of_a_stream(serve_here: Any, spoken: Any) -> None:
    with serve_here(max_streams=2, measure=False) as running:
        with connect(f"{running.socket}/v1/stream?chunk_ms=160") as socket:
            socket.recv()
            pcm = spoken[0].pcm
            for start in range(0, len(pcm), 3200):
                socket.send(pcm[start : start + 3200])
            assert finish(socket)["text"] and running.metric("nemostream_streams_opened_total") == 1
        with pytest.raises(InvalidStatus), connect(f"{running.socket}/v1/stream?chunk_ms=1"):
            pass
        assert running.metric("nemostream_streams") == 0 and running.metric("nemostream_max_streams") == 2
        assert (
            running.metric("nemostream_streams_rejected_total") == 1
            and running.metric("nemostream_utterances_total") == 1
        )
        assert running.metric("nemostream_audio_seconds_total") == pytest.approx(spoken[0].seconds, abs=1e-3)
        lines, name = running.get("/metrics")[1].splitlines(), 'nemostream_step_seconds_count{chunk_ms="160"'
        chunks = float(next(line.split()[-1] for line in lines if line.startswith(name)))
        # One step per chunk. The first chunk starts with 1081 samples of silence; the last one may be partial.
        frames = (len(spoken[0].pcm) // 2 + 1081) / 1280
        assert abs(chunks - frames / 2) <= 1
        assert running.metric("nemostream_step_streams_sum") == chunks
        assert chunks - 2 <= running.metric("nemostream_latency_seconds_count") <= chunks


def test_metrics_are_prometheus_and_complete(serve_here: Any, spoken: Any) -> None:
    with serve_here(max_streams=1, idle_seconds=1, measure=False) as running:
        with connect(f"{running.socket}/v1/stream") as socket:
            socket.recv()
            with pytest.raises(InvalidStatus), connect(f"{running.socket}/v1/stream"):
                pass
            factor, end = 0.0, time.monotonic() + 30
            while not factor:  # covers the last second, so it is only above 0 while audio is processed
                assert time.monotonic() < end
                socket.send(spoken[0].pcm)
                factor = running.metric("nemostream_real_time_factor")
            with pytest.raises(ConnectionClosed):
                while True:
                    socket.recv()
        parsed = text_string_to_metric_families(running.get("/metrics")[1])
        families = {family.name: family for family in parsed if not family.name.endswith("_created")}
    assert {name.removeprefix("nemostream_"): family.type for name, family in families.items()} == {
        "streams": "gauge",
        "max_streams": "gauge",
        "streams_opened": "counter",
        "streams_failed": "counter",
        "streams_rejected": "counter",
        "timeouts": "counter",
        "audio_seconds": "counter",
        "utterances": "counter",
        "step_seconds": "histogram",
        "step_streams": "histogram",
        "step_waiting_streams": "histogram",
        "step_failures": "counter",
        "info": "gauge",
        "start_time_seconds": "gauge",
        "latency_seconds": "histogram",
        "final_fallbacks": "counter",
        "lanes_shed": "counter",
        "states_stored": "counter",
        "state_errors": "counter",
        "state_seconds": "histogram",
        "streams_resumed": "counter",
        "streams_moved": "counter",
        "real_time_factor": "gauge",
        "degradation_level": "gauge",
        "requests_denied": "counter",
        "uploads": "gauge",
    }
    rejected = [s for s in families["nemostream_streams_rejected"].samples if s.name.endswith("_total")]
    counts = {sample.labels["reason"]: sample.value for sample in rejected}
    assert counts == {"CapacityError": 1, "Draining": 0, "OptionError": 0}
    (timeouts,) = (s for s in families["nemostream_timeouts"].samples if s.name.endswith("_total"))
    assert timeouts.value == 1
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    assert all(f"`{name}" in page for name in families)


def test_logs_have_a_stream_id_and_no_transcripts_by_default(serve_process: Any, spoken: Any) -> None:
    for flag, transcripts in (("--no-log-transcripts", False), ("--log-transcripts", True)):
        with serve_process("--no-measure", flag) as running:
            with connect(f"{running.socket}/v1/stream") as socket:
                stream = json.loads(socket.recv())["stream"]
                socket.send(spoken[0].pcm)
                finish(socket)
            with pytest.raises(InvalidStatus), connect(f"{running.socket}/v1/stream?chunk_ms=1"):
                pass
            time.sleep(0.2)
        lines = [line for line in running.log if line.get("stream") == stream]
        assert [line["event"] for line in lines] == [
            "stream opened",
            *(["utterance"] if transcripts else []),
            "stream closed",
        ]
        assert all(line["time"].endswith("Z") and line["level"] == "info" for line in lines)
        assert (spoken[0].text in json.dumps(running.log)) == transcripts
        (rejected,) = (line for line in running.log if line["event"] == "stream rejected")
        assert "chunk_ms" in rejected["reason"] and all(line["level"] == "info" for line in running.log)


def test_keys(serve_here: Any, spoken: Any) -> None:
    with serve_here(api_keys=["first", "second"], measure=False) as running:
        assert running.get("/healthz")[0] == running.get("/readyz")[0] == running.get("/")[0] == 200
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing"):
            assert running.get(path)[0] == 401
            assert running.get(path, Authorization="Bearer wrong")[0] == 401
        assert running.get("/v1/models", Authorization="Bearer second")[0] == 200
        assert running.get("/v1/models", **{"X-API-Key": "first"})[0] == 200
        with pytest.raises(InvalidStatus) as caught, connect(f"{running.socket}/v1/stream"):
            pass
        assert caught.value.response.status_code == 401
        with connect(f"{running.socket}/v1/stream", additional_headers={"Authorization": "Bearer first"}) as socket:
            socket.recv()
            socket.send(spoken[0].pcm)
            assert finish(socket)["text"] == spoken[0].text
        protocols = ["nemostream", "openai-insecure-api-key.second"]
        with connect(f"{running.socket}/v1/stream", subprotocols=protocols) as socket:
            assert socket.subprotocol == "nemostream" and json.loads(socket.recv())["type"] == "ready"
        config = riva.client.RecognitionConfig(sample_rate_hertz=16000)
        without_key = riva.client.ASRService(riva.client.Auth(uri=running.address))
        with pytest.raises(grpc.RpcError) as wrong:
            without_key.offline_recognize(spoken[0].pcm, config)
        assert wrong.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with_key = riva.client.Auth(uri=running.address, metadata_args=[["authorization", "Bearer first"]])
        assert riva.client.ASRService(with_key).offline_recognize(spoken[0].pcm, config).results


def test_a_key_is_compared_with_every_key_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def recording_compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr("nemostream.serving.network.access.hmac.compare_digest", recording_compare)
    keys = [b"first", b"second", b"third"]
    for key, allowed in (("first", True), ("third", True), ("firs", False), ("", False), ("sécond", False)):
        compared.clear()
        assert (key_number(key, keys) is not None) is allowed
        assert [known for _, known in compared] == keys  # not only up to the matching key


def test_origins_are_checked(serve_here: Any) -> None:
    with serve_here(origins=["https://friend.example"], measure=False) as running:
        assert running.get("/v1/models", Origin="https://evil.example")[0] == 403
        assert running.get("/v1/models", Origin="null")[0] == 403
        assert running.get("/v1/models", Origin=running.url)[0] == 200
        request = urllib.request.Request(running.url + "/v1/models", headers={"Origin": "https://friend.example"})
        with urllib.request.urlopen(request) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == "https://friend.example"
        for origin, status in (("https://evil.example", 403), ("https://friend.example", 204)):  # preflight
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            request = urllib.request.Request(
                running.url + "/v1/audio/transcriptions", headers=headers, method="OPTIONS"
            )
            try:
                with urllib.request.urlopen(request) as answer:
                    code, allowed = answer.status, answer.headers["Access-Control-Allow-Origin"]
            except urllib.error.HTTPError as error:
                code, allowed = error.code, error.headers["Access-Control-Allow-Origin"]
            assert (code, allowed) == (status, origin if status == 204 else None)
        for origin, open_ in (("https://evil.example", False), ("https://friend.example", True), (running.url, True)):
            try:
                with connect(f"{running.socket}/v1/stream", origin=origin):
                    assert open_
            except InvalidStatus as error:
                assert not open_ and error.response.status_code == 403


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "cert.pem", folder / "key.pem"


def test_tls(serve_here: Any, spoken: Any, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with serve_here(tls_cert=cert, tls_key=key, measure=False) as running:
        trust = ssl.create_default_context(cafile=str(cert))
        with urllib.request.urlopen(f"https://localhost:{running.http}/healthz", context=trust) as answer:
            assert answer.status == 200

        async def stream() -> str:
            # Not websockets.sync: its two threads sometimes corrupt the state of an SSL socket.
            async with asyncio_connect(f"wss://localhost:{running.http}/v1/stream", ssl=trust) as socket:
                await socket.recv()
                await socket.send(spoken[0].pcm)
                await socket.send(json.dumps({"type": "finish"}))
                *_, last = [json.loads(event) async for event in socket]
                return str(last["text"])

        assert asyncio.run(stream()) == spoken[0].text
        auth = riva.client.Auth(uri=f"localhost:{running.grpc}", use_ssl=True, ssl_root_cert=str(cert))
        config = riva.client.RecognitionConfig(sample_rate_hertz=16000)
        answer = riva.client.ASRService(auth).offline_recognize(spoken[0].pcm, config)
        assert answer.results[0].alternatives[0].transcript.strip() == spoken[0].text


def test_sigterm_finishes_streams_and_rejects_new_ones(serve_process: Any, spoken: Any) -> None:
    with serve_process("--no-measure", "--drain-seconds", "20") as running:
        half = len(spoken[0].pcm) // 4 * 2
        with connect(f"{running.socket}/v1/stream") as socket:
            socket.recv()
            socket.send(spoken[0].pcm[:half])
            running.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while running.get("/readyz")[0] == 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert json.loads(running.get("/readyz")[1])["status"] == "draining"
            with pytest.raises(InvalidStatus) as caught, connect(f"{running.socket}/v1/stream"):
                pass
            assert caught.value.response.status_code == 503 and caught.value.response.headers["Retry-After"]
            with pytest.raises(grpc.RpcError) as rejected:
                riva.client.ASRService(riva.client.Auth(uri=running.address)).offline_recognize(
                    spoken[0].pcm, riva.client.RecognitionConfig(sample_rate_hertz=16000)
                )
            assert rejected.value.code() == grpc.StatusCode.UNAVAILABLE
            socket.send(spoken[0].pcm[half:])
            assert finish(socket)["text"] == spoken[0].text
        assert running.process.wait(20) == 0


def test_draining_has_a_time_limit(serve_process: Any) -> None:
    with serve_process("--no-measure", "--drain-seconds", "1") as running:
        with connect(f"{running.socket}/v1/stream") as socket:
            socket.recv()
            running.process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=20)
        assert running.process.wait(20) == 0


def test_port_in_use(server: Any, serve_process: Any) -> None:
    for flags in (["--port", str(server.http)], ["--grpc-port", str(server.grpc)]):
        with pytest.raises(AssertionError) as caught, serve_process(*flags):
            pass
        message = str(caught.value)
        assert f"cannot listen at 127.0.0.1:{flags[1]} (Address already in use); choose another {flags[0]}" in message
        assert "Traceback" not in message and "Failed to add port" not in message  # the second is gRPC's own


# -- settings ----------------------------------------------------------------------------------------------------------


def test_precedence_of_flags_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax_streams = 1\nhost = "::1"\napi_keys = ["a", "b"]\n')
    monkeypatch.setenv("NEMOSTREAM_PORT", "2")
    monkeypatch.setenv("NEMOSTREAM_MAX_STREAMS", "2")
    settings = read_settings(["--config", str(file), "--port", "3", "--degrade"])
    assert (settings.port, settings.max_streams, settings.host, settings.degrade) == (3, 2, "::1", True)
    assert [key.get_secret_value() for key in settings.api_keys] == ["a", "b"] and "a" not in repr(settings.api_keys)
    file.write_text("max_batch = 5\n")
    assert read_settings(["--config", str(file)]).max_batch == 5
    monkeypatch.setenv("NEMOSTREAM_MAX_BATCH", "6")
    assert read_settings(["--config", str(file)]).max_batch == 6
    assert read_settings(["--config", str(file), "--max-batch", "7"]).max_batch == 7
    file.write_text('api_keys = ["a", "b"]\n')
    monkeypatch.setenv("NEMOSTREAM_API_KEYS", "c, d")
    monkeypatch.setenv("NEMOSTREAM_CONFIG", str(file))
    assert [key.get_secret_value() for key in read_settings().api_keys] == ["c", "d"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--port", "x"], "port"),
        (["--max-streams", "0"], "max_streams"),
        (["--max-batch", "0"], "max_batch"),
        (["--sing"], "--sing"),
        (["--endpoint-ms", "60001"], "endpoint_ms"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
        (["--tls-cert", "/nowhere.pem"], "tls_key"),
        (["--log-format", "xml"], "log_format"),
        (["--trusted-proxies", "x"], "'x'"),
        (["--trusted-proxies", "10.0.0.1/8"], "host bits"),
        (["--api-keys-file", "/nowhere"], "/nowhere"),
        (["--api-keys-file", "/dev/null"], "no key"),
        (["--api-keys-file", "/"], "Is a directory"),
    ],
)
def test_invalid_settings(arguments: list[str], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        read_settings(arguments)


def test_api_keys_file(tmp_path: Path, serve_here: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the app\n  first \n\nsch\u00f6n\r\n", encoding="utf-8-sig")
    keys = read_settings(["--api-keys-file", str(file), "--api-keys", "other,first"]).api_keys or []
    assert [key.get_secret_value() for key in keys] == ["other", "first", "sch\u00f6n"]
    with serve_here(api_keys_file=file, measure=False) as running:
        assert running.get("/v1/models")[0] == 401
        assert running.get("/v1/models", Authorization="Bearer first")[0] == 200
        assert running.get("/v1/models", Authorization="Bearer # of the app")[0] == 401
    for content, message in ((b"# none\n\n", "no key"), (b"\xff\xfe", "not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(OptionError, match=message):
            read_settings(["--api-keys-file", str(file)])


def test_options_are_documented_with_their_defaults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    table = page.split("| flag | default |")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| `")]
    documented = {
        flag: default
        for flags, defaults in rows
        for flag, default in zip_longest(re.findall(r"`--([\w-]+)`", flags), defaults.split(", "))
    }
    fields = {name.replace("_", "-"): field for name, field in Settings.model_fields.items()}
    assert documented.keys() == fields.keys()
    for name, field in fields.items():
        if isinstance(field.default, bool):
            assert documented[name] == ("yes" if field.default else "no"), name
        elif isinstance(field.default, int | float) and "bytes" not in name:
            assert documented[name] == str(field.default), name
        elif "bytes" in name:
            assert documented[name] == f"{field.default >> 20} MiB", name


def test_unknown_name_in_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("max_stream = 1\n")
    with pytest.raises(OptionError, match="max_stream"):
        read_settings(["--config", str(file)])


def test_default_host_is_loopback(server: Any, serve_here: Any) -> None:
    for port in (server.http, server.grpc):
        sockets.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            sockets.create_connection(("127.0.0.2", port))
    with serve_here(host="0.0.0.0", measure=False) as running:  # 127.0.0.2 is a local address too
        for port in (running.http, running.grpc):
            sockets.create_connection(("127.0.0.2", port)).close()
    assert not Settings().public and Settings().host == "127.0.0.1"
    assert Settings(host="0.0.0.0").public and not Settings(host="::1").public and not Settings(host="localhost").public
