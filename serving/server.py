"""The process: sockets, signals, logs; HTTP and gRPC around one `Service`, in one event loop."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import uvicorn

import nemostream
from nemostream.errors import BackendError
from nemostream.serving.network.connections import HEAD_BYTES, Connections, Server, connections_for, protocols
from nemostream.serving.network.proxies import TrustedProxies
from nemostream.serving.protocols import riva
from nemostream.serving.protocols.http import create_app
from nemostream.serving.protocols.realtime import MESSAGE_BYTES
from nemostream.serving.service import Service
from nemostream.serving.settings import Settings, read_settings

log = logging.getLogger("nemostream.serving")

_GRPC_IDLE = 60.0  # seconds after which a gRPC connection without a call is closed
_GRPC_PING = 20.0  # seconds between gRPC's pings, for their answer, and for a handshake
_SPARE_CALLS = 64  # gRPC calls beside streams and recordings
_GRPC_UPLOAD = 16 << 20  # bytes of a recording in one gRPC message, which is held in memory
_KNOWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


async def serve(
    settings: Settings,
    started: Callable[[dict[str, int], Service], None] = lambda ports, service: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until `stop` is set, or, where none is given, until SIGTERM or SIGINT.

    `started` is told the ports, and the service, when streams are taken. Raises `BackendError` if a port cannot be had,
    and what loading the model raises.
    """
    service = Service(settings)
    listening = _listen(settings)
    ports = {"http_port": listening.getsockname()[1]}
    http = _http(service, settings, ports)
    riva_server = None
    if settings.grpc_port >= 0:
        riva_server, ports["grpc_port"] = _riva(service, settings)
        await riva_server.start()
    if settings.public and not settings.api_keys:
        log.warning("everyone on the network can use this server: it has no api_keys")
    stop = _on_signals(http) if stop is None else stop
    serving = asyncio.create_task(http.serve(sockets=[listening]))
    stopping = asyncio.create_task(stop.wait())
    loading = asyncio.create_task(asyncio.to_thread(service.start))
    try:
        await asyncio.wait({loading, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            watching = asyncio.create_task(service.watch())
            started(ports, service)
            await asyncio.wait({stopping, serving, watching}, return_when=asyncio.FIRST_COMPLETED)
            watching.cancel()
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
    loading.result()  # it may have failed after the stop was requested
    log.info("stopped")


def _on_signals(http: Server) -> asyncio.Event:
    """Set by the first signal; the second one does not wait for anybody."""
    stop = asyncio.Event()

    def asked() -> None:
        http.should_exit = http.force_exit = stop.is_set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked)
    return stop


def _listen(settings: Settings) -> socket.socket:
    host, port = settings.host, settings.port
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise BackendError(f"cannot listen at {host}:{port} ({error.strerror}); choose another --port.") from error
    # Of the connections too: one whose peer neither reads nor is gone is closed by the system, as no one else can
    # close it while there is something left to send.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * settings.send_seconds))
    return listening


def _http(service: Service, settings: Settings, ports: dict[str, int]) -> Server:
    most = connections_for(settings.max_connections)
    limits = Connections(
        most,
        settings.max_connections_per_client,
        settings.body_seconds,
        TrustedProxies(settings.trusted_proxies),
        {"/v1/realtime": max(MESSAGE_BYTES, settings.max_message_bytes)},
    )
    http, websocket = protocols(limits)
    config = uvicorn.Config(
        create_app(service, ports),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        http=http,
        ws=websocket,
        h11_max_incomplete_event_size=HEAD_BYTES,
        ws_max_size=settings.max_message_bytes,
        # No pings: a client that is gone sends nothing (`idle_seconds`), and the answer of a client that sends
        # faster than it is served would wait behind its audio.
        # `AccessMiddleware` reads the headers of trusted proxies, for gRPC too.
        proxy_headers=False,
        ws_per_message_deflate=False,
        ws_ping_interval=None,
        timeout_graceful_shutdown=2,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    return Server(config, limits)


def _riva(service: Service, settings: Settings) -> tuple[grpc.aio.Server, int]:
    calls = settings.max_streams + settings.max_uploads + _SPARE_CALLS
    ping = int(1000 * _GRPC_PING)
    server = grpc.aio.server(
        interceptors=[riva.Admission(service)],
        maximum_concurrent_rpcs=calls,
        options=[
            ("grpc.max_receive_message_length", min(settings.max_upload_bytes, _GRPC_UPLOAD)),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.absolute_max_metadata_size", 32 << 10),
            ("grpc.max_concurrent_streams", calls),
            ("grpc.so_reuseport", 0),
            ("grpc.max_connection_idle_ms", int(1000 * _GRPC_IDLE)),
            ("grpc.server_handshake_timeout_ms", ping),
            ("grpc.keepalive_time_ms", ping),
            ("grpc.keepalive_timeout_ms", ping),
            ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ("grpc.http2.max_ping_strikes", 2),
            ("grpc.max_allowed_incoming_connections", max(8, connections_for(settings.max_connections) // 2)),
        ],
    )
    riva.add_to(server, service)
    address = f"{_bracketed(settings.host)}:{settings.grpc_port}"
    try:
        if settings.tls_cert and settings.tls_key:
            pair = settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
            return server, server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        return server, server.add_insecure_port(address)
    except RuntimeError as error:
        raise BackendError(f"cannot listen at {address}; choose another --grpc-port, or -1 for none.") from error


def _known_of(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _KNOWN}


class _TextLines(logging.Formatter):
    """For people: time, level, what happened, and what is known about it as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        known = [f"{name}={_one_line(value)}" for name, value in _known_of(record).items() if value is not None]
        line = " ".join([clock, record.levelname.lower(), _escaped(record.getMessage()), *known])
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def _one_line(value: Any) -> str:
    """A value without spaces as it is; others in quotes, with control characters escaped: a client may choose it."""
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, what happened, and what is known about it."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{clock}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **_known_of(record)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(text: bool = False) -> None:
    """Write everything that is logged to standard error, one line each: JSON, or plain text."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_TextLines() if text else _JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # uvicorn takes a WebSocket that was refused with an answer for one that was forgotten. What was refused we log.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing handshake" not in str(record.msg))


def _model_of(settings: Settings) -> str:
    return "the demo model" if settings.bundle is None else f"{settings.bundle}"


def _url(settings: Settings, host: str, ports: dict[str, int]) -> str:
    return f"{'https' if settings.tls_cert else 'http'}://{_bracketed(host)}:{ports['http_port']}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _summary(settings: Settings, ports: dict[str, int], service: Service) -> str:
    """What a person at a terminal reads when streams are accepted."""
    anywhere = settings.host in ("0.0.0.0", "::")
    host = "localhost" if anywhere else settings.host
    where = "  (and every other address of this machine)" if anywhere else ""
    lines = [f"Page:  {_url(settings, host, ports)}/{where}"]
    if "grpc_port" in ports:
        lines.append(f"gRPC:  {_bracketed(host)}:{ports['grpc_port']}{where}")
    lines.append(f"Ready: model {service.model.manifest.name}, at most {service.admitted} streams. Ctrl-C stops.")
    return "\n".join(lines)


def main(arguments: Sequence[str] = ()) -> None:
    """`nemostream serve`."""
    settings = read_settings(arguments)
    text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    log_to_stderr(text)
    if text:
        print(f"nemostream {nemostream.__version__} loads {_model_of(settings)} ...", file=sys.stderr, flush=True)

    def started(ports: dict[str, int], service: Service) -> None:
        gc.freeze()  # the model and the modules stay: looking for cycles among them again and again would cost time
        if text:
            print(_summary(settings, ports, service), file=sys.stderr, flush=True)
        print(_url(settings, settings.host, ports), flush=True)

    uvicorn_loop = uvicorn.Config(app="", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=uvicorn_loop) as runner:
        runner.run(serve(settings, started))
