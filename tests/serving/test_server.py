"""The server process: its life cycle, signals, sockets and log lines. The model is a fake."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from riva.client.proto import health_pb2, health_pb2_grpc

from nemostream.errors import BackendError
from nemostream.serving import server
from nemostream.serving.network import listening
from nemostream.serving.settings import Settings


@pytest.fixture
def model(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    model = fakes.FakeModel()
    monkeypatch.setattr("nemostream.load", lambda *arguments, **options: model)
    return model


@pytest.fixture(autouse=True)
def enough_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits do not depend on those of this process, which are not changed."""
    monkeypatch.setattr(server, "available_connections", lambda maximum: maximum)


def run(script: Callable[..., Any] | None = None, stop_at_once: bool = False, **settings: Any) -> Any:
    """Serve; when the server is ready, run `script`, a coroutine function, and stop. Return its result."""
    results: list[Any] = []

    async def main() -> None:
        stop = asyncio.Event()
        if stop_at_once:
            stop.set()

        async def run_script(ports: Any, service: Any) -> None:
            try:
                if script:
                    results.append(await script(ports, service))
            finally:
                stop.set()

        tasks: list[Any] = []

        def started(ports: Any, service: Any) -> None:
            results.append(ports)
            tasks.append(asyncio.create_task(run_script(ports, service)))

        options = {"port": 0, "grpc_port": 0, "measure": False, "drain_seconds": 0, **settings}
        await asyncio.wait_for(server.serve(Settings(**options), started, stop), 60)
        for task in tasks:
            if task.done():
                task.result()
            else:
                task.cancel()

    asyncio.run(main())
    return results


async def get(ports: Any, path: str) -> int:
    def request() -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{ports['http_port']}{path}", timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    return await asyncio.to_thread(request)


def listening_ports() -> set[int]:
    """Return the TCP ports at which this process listens."""
    own, ports = set(), set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            own.add(os.readlink(file))
    for table in ("tcp", "tcp6"):
        path = Path("/proc/self/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own:
                ports.add(int(address.rpartition(":")[2], 16))
    return ports


def test_both_protocols_are_served_until_the_server_stops(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    services = []

    async def script(ports: Any, service: Any) -> Any:
        services.append(service)
        session = service.open("test")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert service.state == "ready" and session in service.sessions
        assert listening_ports() >= set(ports.values())
        return await get(ports, "/readyz"), health.status

    ports, (status, health) = run(script)
    assert status == 200 and health == health_pb2.HealthCheckResponse.ServingStatus.SERVING
    assert set(ports) == {"http_port", "grpc_port"} and len(set(ports.values())) == 2
    assert model.closed == 1 and services[0].state == "draining"
    assert [one.getMessage() for one in caplog.records if one.getMessage() in ("ready", "draining", "stopped")] == [
        "ready",
        "draining",
        "stopped",
    ]
    assert not listening_ports() & set(ports.values())


def test_grpc_is_an_option(model: Any) -> None:
    (ports,) = run(grpc_port=-1)
    assert set(ports) == {"http_port"}


def test_a_load_that_fails_ends_the_server(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def load(*arguments: Any, **options: Any) -> Any:
        raise BackendError("no engine.")

    caplog.set_level("INFO")
    monkeypatch.setattr("nemostream.load", load)
    for stop_at_once in (False, True):
        with pytest.raises(BackendError, match="no engine"):
            run(stop_at_once=stop_at_once)
    assert "stopped" not in caplog.messages


def test_a_server_that_is_stopped_while_it_loads(model: Any) -> None:
    assert run(stop_at_once=True) == [] and model.closed == 1  # `started` is not called


def test_a_monitor_that_fails_stops_the_server(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def monitor(self: Any) -> None:
        raise ZeroDivisionError

    async def script(ports: Any, service: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr("nemostream.serving.service.Service.monitor", monitor)
    assert len(run(script)) == 1 and model.closed == 1


@pytest.mark.parametrize(
    ("settings", "warned"),
    [({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_keys": ["k"]}, False), ({"host": "127.0.0.1"}, False)],
)
def test_a_public_server_without_keys_logs_a_warning(
    model: Any, caplog: pytest.LogCaptureFixture, settings: Any, warned: bool
) -> None:
    run(grpc_port=-1, **settings)
    assert ("other machines can use this server without a key: set api_keys" in caplog.messages) is warned


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_the_second_signal_stops_at_once(numbers: Any) -> None:
    async def main() -> None:
        http = SimpleNamespace(should_exit=False, force_exit=False)
        stop = server._on_signals(http)  # type: ignore[arg-type]
        assert not stop.is_set()
        os.kill(os.getpid(), numbers[0])
        await asyncio.wait_for(stop.wait(), 10)
        assert (http.should_exit, http.force_exit) == (False, False)
        os.kill(os.getpid(), numbers[1])
        while not http.should_exit:
            await asyncio.sleep(0.001)
        assert http.force_exit

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_listening_socket_limits_the_time_to_send() -> None:
    with listening.listen(Settings(port=0, send_seconds=7)) as bound:
        host, port = bound.getsockname()
        assert host == "127.0.0.1" and bound.family == socket.AF_INET
        # The system closes the connection of a peer that does not read, but later than the send timeout.
        assert bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 14_000
        with pytest.raises(BackendError, match=rf"cannot listen at 127\.0\.0\.1:{port} .*; choose another --port\."):
            listening.listen(Settings(port=port))


def test_processes_share_a_port_that_no_other_server_can_use() -> None:
    with listening.reserve_port("127.0.0.1", 0, "--port") as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        settings = Settings(port=port, transports=2)
        with listening.listen(settings), listening.listen(settings):
            socket.create_connection(("127.0.0.1", port)).close()
            with pytest.raises(BackendError, match=rf"cannot listen at .*:{port} .*; choose another --port\."):
                listening.listen(Settings(port=port))
            with pytest.raises(BackendError, match="choose another --grpc-port"):
                listening.reserve_port("127.0.0.1", port, "--grpc-port")
        with pytest.raises(BackendError, match=r"cannot listen at 192\.0\.2\.1:0 .*; choose another --host\."):
            listening.reserve_port("192.0.2.1", 0, "--port")


def test_a_server_listens_at_an_address_of_ipv6() -> None:
    try:
        socket_v6 = listening.listen(Settings(port=0, host="::1"))
    except BackendError:
        pytest.skip("this machine has no IPv6")
    with socket_v6:
        assert socket_v6.family == socket.AF_INET6


def test_a_port_of_ipv6_is_reserved_beside_one_of_ipv4() -> None:
    """As a server of one process listens. The address is in brackets, and the reason is the system's."""
    with socket.create_server(("0.0.0.0", 0)) as ipv4:
        port = ipv4.getsockname()[1]
        try:
            probe = listening.listen(Settings(port=port, host="::"))
        except BackendError:
            pytest.skip("this machine has no IPv6")
        reason = rf"cannot listen at \[::\]:{port} \(Address already in use\); choose another --port\."
        with probe, pytest.raises(BackendError, match=f"^{reason}$"):
            listening.reserve_port("::", port, "--port")
        with listening.reserve_port("::", port, "--port") as reserved:
            assert reserved.getsockname()[1] == port
    with pytest.raises(BackendError, match=r"unknown\.invalid:0 \(the host name cannot be resolved\)"):
        listening.reserve_port("unknown.invalid", 0, "--port")


def test_the_web_server_has_the_limits_of_the_settings(fakes: Any, model: Any) -> None:
    settings = Settings(
        max_message_bytes=2048,
        max_connections=40,
        max_connections_per_client=7,
        body_seconds=99,
        trusted_proxies=["10.0.0.0/8"],
    )
    here = fakes.start(model, fakes.VirtualClock())
    http = server._http(here, settings, {})
    limits, config = http._limits, http.config
    assert (limits.max_connections, limits.max_per_client, limits.body_seconds) == (40, 7, 99)
    assert "10.1.2.3" in limits.proxies and "127.0.0.1" not in limits.proxies
    assert limits.message_bytes == {"/v1/realtime": (15 << 20) * 4 // 3 + (1 << 16)} and config.ws_max_size == 2048
    assert limits.clock is here.clock
    assert (config.server_header, config.timeout_graceful_shutdown) == (False, 2)
    assert (config.proxy_headers, config.ws_per_message_deflate, config.ws_ping_interval) == (False, False, None)
    larger = server._http(fakes.start(model), Settings(max_message_bytes=1 << 25), {})
    assert larger._limits.message_bytes == {"/v1/realtime": 1 << 25}


def test_the_grpc_server_has_the_limits_of_the_settings(
    fakes: Any, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []

    class Server:
        def __init__(self, **options: Any) -> None:
            self.options = options
            self.ports: list[Any] = []
            made.append(self)

        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            pass

        def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
            pass

        def add_insecure_port(self, address: str) -> int:
            self.ports.append(address)
            return 7

        def add_secure_port(self, address: str, credentials: Any) -> int:
            self.ports.append((address, credentials))
            return 8

    here = fakes.start(model)
    monkeypatch.setattr(grpc.aio, "server", Server)
    monkeypatch.setattr(grpc, "ssl_server_credentials", lambda pairs: pairs)
    cert, key = tmp_path / "cert", tmp_path / "key"
    cert.write_bytes(b"certificate")
    key.write_bytes(b"key")
    assert server._riva(here, Settings(max_streams=5, max_uploads=3, max_upload_bytes=2048)) == (made[0], 7)
    assert made[0].options["maximum_concurrent_rpcs"] == 5 + 3 + 64 and made[0].ports == ["127.0.0.1:50051"]
    options = dict(made[0].options["options"])
    assert options["grpc.max_receive_message_length"] == 2048 and options["grpc.max_concurrent_streams"] == 72
    assert (options["grpc.max_connection_idle_ms"], options["grpc.keepalive_time_ms"]) == (60_000, 20_000)
    assert options["grpc.so_reuseport"] == 0  # another process cannot listen at the same port
    settings = Settings(host="::1", grpc_port=9, tls_cert=cert, tls_key=key, max_connections=40)
    assert server._riva(here, settings) == (made[1], 8)
    assert made[1].ports == [("[::1]:9", [(b"key", b"certificate")])]
    options = dict(made[1].options["options"])
    assert options["grpc.max_receive_message_length"] == 16 << 20
    assert options["grpc.max_allowed_incoming_connections"] == 20


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["Page:  http://127.0.0.1:1/", "gRPC:  127.0.0.1:2"]),
        ({"host": "::1"}, ["Page:  http://[::1]:1/", "gRPC:  [::1]:2"]),
        (
            {"host": "0.0.0.0"},
            [
                "Page:  http://localhost:1/  (and every other address of this machine)",
                "gRPC:  localhost:2  (and every other address of this machine)",
            ],
        ),
        ({"host": "::"}, ["Page:  http://localhost:1/  (and every other address of this machine)"]),
        ({"host": "asr.example"}, ["Page:  http://asr.example:1/"]),
    ],
)
def test_the_summary_of_a_server(settings: Any, expected: list[str]) -> None:
    ports = {"http_port": 1, "grpc_port": 2}
    if len(expected) == 1:
        del ports["grpc_port"]
    lines = server._summary(Settings(**settings), ports, "demo", 9).splitlines()
    assert lines == [*expected, "Ready: model demo, at most 9 streams. Ctrl-C stops."]
    assert server._url(Settings().model_copy(update={"tls_cert": "x"}), "::", ports) == "https://[::]:1"


def test_the_command_prepares_the_interpreter(
    fakes: Any, model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short intervals between switches of threads, and no collection of the objects that exist when it is ready."""
    steps: list[Any] = []
    here = fakes.start(model)

    async def serve(settings: Settings, started: Any) -> None:
        steps.append(settings.max_streams)
        started({"http_port": 7}, here)

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr(server, "log_to_stderr", lambda text: None)
    monkeypatch.setattr(server.sys, "setswitchinterval", steps.append)
    monkeypatch.setattr(server, "freeze_heap", lambda: steps.append("freeze"))
    server.main(["--max-streams", "9", "--log-format", "json"])
    assert steps == [0.0005, 9, "freeze"] and capsys.readouterr().out == "http://127.0.0.1:7\n"
