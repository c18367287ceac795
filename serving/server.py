"""The server process: sockets, signals and logs; HTTP and gRPC servers of one `Service`, in one event loop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Sequence

import grpc
import uvicorn

import nemostream
from nemostream.errors import BackendError
from nemostream.serving.logs import log_to_stderr
from nemostream.serving.memory import freeze_heap
from nemostream.serving.network.connections import (
    MAX_HEAD_BYTES,
    Connections,
    Server,
    available_connections,
    protocol_classes,
)
from nemostream.serving.network.listening import GRPC_PORT_OPTION, bracketed, check_port, listen
from nemostream.serving.network.proxies import TrustedProxies
from nemostream.serving.processes.supervisor import supervise
from nemostream.serving.protocols import riva
from nemostream.serving.protocols.http import create_app
from nemostream.serving.protocols.realtime import MAX_MESSAGE_BYTES
from nemostream.serving.service import SWITCH_SECONDS, Service
from nemostream.serving.settings import Settings, read_settings

log = logging.getLogger("nemostream.serving")

_GRPC_IDLE_SECONDS = 60.0  # after which a gRPC connection without a call is closed
_GRPC_PING_SECONDS = 20.0  # between gRPC's pings, for their response, and for a handshake
_GRPC_SPARE_CALLS = 64  # besides streams and recordings
_GRPC_MAX_RECORDING = 16 << 20  # bytes of a recording in one gRPC message, which is held in memory


async def serve(
    settings: Settings,
    started: Callable[[dict[str, int], Service], None] = lambda ports, service: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve with this process until `stop` is set, or without `stop` until SIGTERM or SIGINT.

    `started` is called with the ports and the service when the server is ready. Raises `BackendError` if a port is not
    available, and what loading the model raises.
    """
    _warn_if_open(settings)
    await serve_clients(Service(settings), settings, started, stop)
    log.info("stopped")


async def serve_clients(
    service: Service,
    settings: Settings,
    started: Callable[[dict[str, int], Service], None],
    stop: asyncio.Event | None = None,
    connections: Callable[..., Connections] = Connections,
) -> None:
    """As `serve`, for a service. With `transports`, it is that of one of them, and all listen at the same ports.

    `connections` is called with the arguments of `Connections`.
    """
    listening = listen(settings)
    ports = {"http_port": listening.getsockname()[1]}
    http = _http(service, settings, ports, connections)
    riva_server = None
    if settings.grpc_port >= 0:
        riva_server, ports["grpc_port"] = _riva(service, settings)
        await riva_server.start()
    stop = _on_signals(http) if stop is None else stop
    serving = asyncio.create_task(http.serve(sockets=[listening]))
    stopping = asyncio.create_task(stop.wait())
    loading = asyncio.create_task(asyncio.to_thread(service.start))
    try:
        await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            monitoring = asyncio.create_task(service.monitor())
            started(ports, service)
            await asyncio.wait({stopping, serving, monitoring}, return_when=asyncio.FIRST_COMPLETED)
            monitoring.cancel()
        draining = asyncio.create_task(service.drain())
        await asyncio.wait({draining, serving}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
    finally:
        stopping.cancel()
        if riva_server:
            await riva_server.stop(grace=1)
        http.should_exit = True
        await serving
        await asyncio.wait({loading})
        await asyncio.to_thread(service.close)
    loading.result()  # raises if loading failed after the stop was requested


def _warn_if_open(settings: Settings) -> None:
    if settings.public and not settings.api_keys:
        log.warning("other machines can use this server without a key: set api_keys")


def _on_signals(http: Server) -> asyncio.Event:
    """Return an event that the first SIGTERM or SIGINT sets. The second signal stops the server at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        http.should_exit = http.force_exit = stop.is_set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


def _http(
    service: Service,
    settings: Settings,
    ports: dict[str, int],
    connections: Callable[..., Connections] = Connections,
) -> Server:
    limits = connections(
        available_connections(settings.max_connections),
        settings.max_connections_per_client,
        settings.body_seconds,
        TrustedProxies(settings.trusted_proxies),
        {"/v1/realtime": max(MAX_MESSAGE_BYTES, settings.max_message_bytes)},
        clock=service.clock,
    )
    http, websocket = protocol_classes(limits)
    config = uvicorn.Config(
        create_app(service, ports),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        http=http,
        ws=websocket,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        ws_max_size=settings.max_message_bytes,
        proxy_headers=False,  # `AccessMiddleware` and `riva` read the headers of trusted proxies
        ws_per_message_deflate=False,
        # No pings: the idle timeout detects clients that are gone, and the pong of a client that sends faster than it
        # is served would wait behind its audio.
        ws_ping_interval=None,
        timeout_graceful_shutdown=2,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    return Server(config, limits)


def _riva(service: Service, settings: Settings) -> tuple[grpc.aio.Server, int]:
    calls = settings.max_streams + settings.max_uploads + _GRPC_SPARE_CALLS
    ping_ms = int(1000 * _GRPC_PING_SECONDS)
    server = grpc.aio.server(
        interceptors=[riva.AccessInterceptor(service)],
        maximum_concurrent_rpcs=calls,
        options=[
            ("grpc.max_receive_message_length", min(settings.max_upload_bytes, _GRPC_MAX_RECORDING)),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.absolute_max_metadata_size", 32 << 10),
            ("grpc.max_concurrent_streams", calls),
            ("grpc.so_reuseport", int(settings.transports > 0)),
            ("grpc.max_connection_idle_ms", int(1000 * _GRPC_IDLE_SECONDS)),
            ("grpc.server_handshake_timeout_ms", ping_ms),
            ("grpc.keepalive_time_ms", ping_ms),
            ("grpc.keepalive_timeout_ms", ping_ms),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ("grpc.http2.max_ping_strikes", 2),
            ("grpc.max_allowed_incoming_connections", max(8, available_connections(settings.max_connections) // 2)),
        ],
    )
    riva.add_to(server, service)
    address = f"{bracketed(settings.host)}:{settings.grpc_port}"
    if not settings.transports:  # otherwise the supervisor has reserved the port
        # Before gRPC, which prints a message of its own and raises an error without the reason.
        check_port(settings.host, settings.grpc_port, GRPC_PORT_OPTION)
    try:
        if settings.tls_cert and settings.tls_key:
            pair = settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
            return server, server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        return server, server.add_insecure_port(address)
    except RuntimeError as error:
        raise BackendError(f"cannot listen at {address}; choose another {GRPC_PORT_OPTION}.") from error


def _model_name(settings: Settings) -> str:
    return "the demo model" if settings.bundle is None else f"{settings.bundle}"


def _url(settings: Settings, host: str, ports: dict[str, int]) -> str:
    return f"{'https' if settings.tls_cert else 'http'}://{bracketed(host)}:{ports['http_port']}"


def _summary(settings: Settings, ports: dict[str, int], model: str, max_streams: int) -> str:
    """Return the text that a terminal shows when the server is ready."""
    all_addresses = settings.host in ("0.0.0.0", "::")
    host = "localhost" if all_addresses else settings.host
    suffix = "  (and every other address of this machine)" if all_addresses else ""
    lines = [f"Page:  {_url(settings, host, ports)}/{suffix}"]
    if "grpc_port" in ports:
        lines.append(f"gRPC:  {bracketed(host)}:{ports['grpc_port']}{suffix}")
    lines.append(f"Ready: model {model}, at most {max_streams} streams. Ctrl-C stops.")
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> None:
    """Run `nemostream serve`."""
    settings = read_settings(arguments)
    # The scheduler's thread gives up the interpreter lock in each call of a graph, some hundred times per step. While
    # another thread computes in Python, it waits for this interval (default: 5 ms) each time.
    sys.setswitchinterval(SWITCH_SECONDS)
    text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    log_to_stderr(text)
    if text:
        print(
            f"nemostream {nemostream.__version__} is loading {_model_name(settings)} ...", file=sys.stderr, flush=True
        )

    def ready(ports: dict[str, int], model: str, max_streams: int) -> None:
        if text:
            print(_summary(settings, ports, model, max_streams), file=sys.stderr, flush=True)
        print(_url(settings, settings.host, ports), flush=True)

    def started(ports: dict[str, int], service: Service) -> None:
        freeze_heap()
        ready(ports, service.model.manifest.name, service.max_streams)

    if settings.transports:
        _warn_if_open(settings)
        asyncio.run(supervise(settings, ready, text))
        log.info("stopped")
        return
    uvicorn_loop = uvicorn.Config(app="", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=uvicorn_loop) as runner:
        runner.run(serve(settings, started))
