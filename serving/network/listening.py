"""Sockets at which a server listens."""

from __future__ import annotations

import errno
import os
import socket

from nemostream.errors import BackendError
from nemostream.serving.settings import Settings

GRPC_PORT_OPTION = "--grpc-port, or -1 to disable gRPC"


def listen(settings: Settings) -> socket.socket:
    """Return the socket for HTTP and WebSockets.

    With `transports`, all of them listen at the port, and the system distributes the connections. Raises `BackendError`
    if the port is not available.
    """
    listening = _create(settings.host, settings.port, "--port", shared=settings.transports > 0)
    # Inherited by the connections. The system closes one whose peer is connected but does not read: the server cannot
    # close it while data is left to send.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * settings.send_seconds))
    return listening


def reserve_port(host: str, port: int, option: str) -> socket.socket:
    """Return a socket that is bound to a port for processes that share it; it does not listen itself.

    With port 0 it is a free port, which the system assigns to no other program. Raises `BackendError` that names the
    `option` if another server listens there, also one that shares its port.
    """
    with _create(host, port, option, shared=False) as probe:
        free, family = probe.getsockname()[1], probe.family
    reserved = socket.socket(family, socket.SOCK_STREAM)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:  # as `socket.create_server`: a server of IPv4 may use the same port
            reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        reserved.bind((host, free))
    except OSError as error:  # another program has bound it since
        reserved.close()
        raise _unavailable(host, free, option, error) from error
    return reserved


def check_port(host: str, port: int, option: str) -> None:
    """Raise `BackendError` that names the `option` and the system's reason if no server can listen at a port."""
    _create(host, port, option, shared=False).close()


def bracketed(host: str) -> str:
    """Return a host as it is written before a port."""
    return f"[{host}]" if ":" in host else host


def _create(host: str, port: int, option: str, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=shared)
    except OSError as error:
        raise _unavailable(host, port, option, error) from error


def _unavailable(host: str, port: int, option: str, error: OSError) -> BackendError:
    # `create_server` adds the address to the text; the numbers of failed name resolutions are not those of `strerror`.
    number = error.errno or 0
    reason = os.strerror(number) if number > 0 else "the host name cannot be resolved"
    if number <= 0 or number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        option = "--host"
    return BackendError(f"cannot listen at {bracketed(host)}:{port} ({reason}); choose another {option}.")
