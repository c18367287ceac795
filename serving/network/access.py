"""Access control: the Host header, the Origin header, API keys, and limits on what a request may send.

Every HTTP request and WebSocket passes `AccessMiddleware` before the application; gRPC uses the same functions.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from nemostream.errors import CapacityError
from nemostream.serving.client import Client, shorten
from nemostream.serving.metrics import Metrics
from nemostream.serving.network.proxies import TrustedProxies
from nemostream.serving.network.responses import error_response, exception_response
from nemostream.serving.settings import Settings
from nemostream.serving.uploads.admission import UploadAdmission

log = logging.getLogger("nemostream.serving")

KEY_PROTOCOL = "openai-insecure-api-key."  # how browsers, which cannot set headers, send a key with a WebSocket
UPLOAD_PATH = "/v1/audio/transcriptions"
_DISCARD_SECONDS = 5.0  # during which the rest of an oversized recording is read and discarded
_PUBLIC_PATHS = ("/", "/sample.flac", "/healthz", "/readyz")  # that need no key
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class _Denial:
    """A request that is denied: the label of the metric, and the response."""

    reason: str
    response: Response


class AccessMiddleware:
    """Rejects requests that must not reach the application, and limits the others.

    Browsers send WebSockets and forms to foreign origins without a CORS preflight, so CORS alone does not keep a
    foreign page from using the model through its visitor's browser: the Origin header is checked. The Host header is
    checked because a page may rebind its own name to this server's address (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        uploads: UploadAdmission,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._settings, self._metrics, self._uploads = app, settings, metrics, uploads
        self._clock = clock
        self._keys = keys_of(settings)
        self._origins = {origin.rstrip("/") for origin in settings.origins}
        self._proxies = TrustedProxies(settings.trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        if scope.get("nemostream.over_capacity"):  # set by `connections`
            return await _OVER_CAPACITY(scope, receive, send)
        headers = Headers(scope=scope)
        address = self._client_address(scope, headers)
        hosts, origin = self._hosts(scope, headers), headers.get("origin")
        denial = self._check_hosts(hosts) or self._check_origin(origin, hosts)
        if denial is not None:
            return await self._deny(scope, receive, send, denial, address)
        if origin in self._origins and scope["type"] == "http":
            send = _with_cors(send, origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                # `*` does not include Authorization (Fetch standard), so it is listed.
                allow = {
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Allow-Headers": "Authorization, *",
                }
                return await Response(status_code=204, headers=allow)(scope, receive, send)
        number = key_number(request_key(headers), self._keys) if self._keys else None
        if self._keys and number is None and scope["path"] not in _PUBLIC_PATHS:
            return await self._deny(scope, receive, send, _KEY_REQUIRED, address)
        client = (
            Client(address, address)
            if number is None
            else Client(f"key {number}", address, hashlib.sha256(self._keys[number]).hexdigest())
        )
        if self._settings.otel:
            client = client.with_trace(headers)
        scope["nemostream.client"] = client
        if scope["type"] == "websocket":
            return await self._app(scope, receive, send)
        await self._call_limited(scope, headers, client, receive, send)

    async def _call_limited(self, scope: Scope, headers: Headers, client: Client, receive: Receive, send: Send) -> None:
        """Call the application with limits on the request body and on the time that the client takes to read."""
        receive, sender = self._limited(headers, receive), _TimedSender(send, self._settings.send_seconds)
        try:
            if scope["path"] != UPLOAD_PATH or scope["method"] != "POST":
                return await self._app(scope, receive, sender.send)
            try:
                admission = self._uploads.admit(_content_length(headers), client)
            except CapacityError as error:
                return await exception_response(error)(scope, receive, sender.send)
            # The slot is held from before the body is read until the response is complete: a client that has the
            # response may send its next recording.
            with ExitStack() as slot:
                slot.enter_context(admission)
                sender.on_complete = slot.close
                await self._app(scope, receive, sender.send)
        except Exception:
            if not sender.timed_out:
                raise
            self._metrics.timeouts.inc()

    def _client_address(self, scope: Scope, headers: Headers) -> str:
        """Return the client's address, as forwarded by a trusted proxy."""
        return self._proxies.client(_peer_address(scope), ",".join(headers.getlist("x-forwarded-for")))

    def _hosts(self, scope: Scope, headers: Headers) -> dict[str, str]:
        """Return the host names that the request was sent to, by header.

        A proxy may send the name of its upstream as Host and that of the browser as X-Forwarded-Host. Both must be
        allowed: a page that rebinds its name to a trusted (loopback) address may set any header except Host.
        """
        hosts = {"Host": headers.get("host", "")}
        if "x-forwarded-host" in headers and _peer_address(scope) in self._proxies:
            hosts["X-Forwarded-Host"] = headers["x-forwarded-host"].partition(",")[0].strip()
        return hosts

    def _check_hosts(self, hosts: dict[str, str]) -> _Denial | None:
        for name, host in hosts.items():
            if not host_allowed(host, self._settings):
                message = (
                    f"the {name} header is {shorten(host)!r}, which this server does not serve; add the name to "
                    "option hosts."
                )
                return _Denial("host", error_response(403, message, "permission_error", code="host"))
        return None

    def _check_origin(self, origin: str | None, hosts: dict[str, str]) -> _Denial | None:
        if origin is None or origin in self._origins or _netloc(origin) in hosts.values():
            return None
        message = f"pages of {shorten(origin)} may not use this server (option origins)."
        return _Denial("origin", error_response(403, message, "permission_error", code="origin"))

    async def _deny(self, scope: Scope, receive: Receive, send: Send, denial: _Denial, address: str) -> None:
        self._metrics.denied.labels(denial.reason).inc()
        log.warning("request denied", extra={"reason": denial.reason, "peer": address, "path": shorten(scope["path"])})
        if scope["type"] == "http":
            return await denial.response(scope, receive, send)
        await WebSocket(scope, receive, send).send_denial_response(denial.response)

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """Limit the size of the body, the time between its parts and the total time."""
        idle_seconds, max_bytes, size = self._settings.idle_seconds, self._settings.max_upload_bytes, 0
        deadline = self._clock() + self._settings.body_seconds
        too_large, complete = (_content_length(headers) or 0) > max_bytes, False

        async def limited() -> Message:
            nonlocal size, too_large, complete
            if complete:  # the next message is the client's disconnection
                return await receive()
            try:
                async with asyncio.timeout(min(idle_seconds, deadline - self._clock())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request is not complete within the time limit; send it faster.") from None
            size, complete = size + len(message.get("body", b"")), not message.get("more_body")
            too_large = too_large or size > max_bytes
            if not too_large:
                return message
            # A client that is disconnected while it sends may never read the response: discard the rest for a moment.
            with suppress(TimeoutError):
                async with asyncio.timeout(_DISCARD_SECONDS):
                    while message.get("more_body"):
                        message = await receive()
            raise HTTPException(413, f"the recording is larger than {max_bytes} bytes; send it in parts.")

        return limited


_OVER_CAPACITY = error_response(
    503,
    "this client has the maximum number of open connections; close one first.",
    "rate_limit_error",
    code="capacity",
    headers={"Connection": "close", "Retry-After": "5"},
)
_KEY_REQUIRED = _Denial(
    "key",
    error_response(
        401,
        "a valid API key is required: send Authorization: Bearer KEY.",
        "authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    ),
)


class _TimedSender:
    """Sends a response with a timeout for each part: `send` raises, and the connection closes."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self.timed_out = False
        self.on_complete: Callable[[], None] = lambda: None  # called before the last part of the response is sent

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.on_complete()
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            self.timed_out = True
            raise


def host_allowed(host: str, settings: Settings) -> bool:
    """Return whether a Host header names this server.

    Allowed are loopback names, the names of option `hosts`, names without a dot (of a container or a machine: nobody
    can register one to rebind it), and, if other machines can reach the server, literal addresses (which cannot be
    rebound).
    """
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if "*" in settings.hosts or name in _LOOPBACK_NAMES or name in settings.hosts or name == settings.host:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return bool(name) and "." not in name
    return address.is_loopback or settings.public


def keys_of(settings: Settings) -> list[bytes]:
    """Return the valid API keys as bytes on the wire; empty if no key is required."""
    return [key.get_secret_value().encode() for key in settings.api_keys or ()]


def request_key(headers: Mapping[str, str]) -> str:
    """Return the API key of a request, or an empty string. Header names are lower case."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key:
        return key.strip()
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(KEY_PROTOCOL):
            return protocol.strip().removeprefix(KEY_PROTOCOL)
    return headers.get("x-api-key", "")


def key_number(key: str, keys: list[bytes]) -> int | None:
    """Return the index of `key` in `keys`, or None. Takes the same time for every key.

    HTTP header values are bytes, which the server decodes as ISO 8859-1. A key that is not ASCII arrives as UTF-8 from
    most clients and as ISO 8859-1 from some.
    """
    try:
        key_bytes = key.encode("latin-1")
        key_bytes.decode()
    except UnicodeError:
        key_bytes = key.encode(errors="replace")
    matches = [hmac.compare_digest(key_bytes, valid) for valid in keys]
    return matches.index(True) if any(matches) else None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _peer_address(scope: Scope) -> str:
    return str((scope.get("client") or ("",))[0])


def _content_length(headers: Headers) -> int | None:
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 19 else None


def _with_cors(send: Send, origin: str) -> Send:
    async def send_with_cors(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return send_with_cors
