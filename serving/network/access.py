"""Who may use the server: the Host header, the Origin header, API keys, and limits on what a request may send.

Every HTTP request and WebSocket passes `AccessMiddleware` before the application; gRPC uses the same functions.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from nemostream.errors import CapacityError
from nemostream.serving.network.proxies import TrustedProxies
from nemostream.serving.settings import Settings

if TYPE_CHECKING:
    from nemostream.serving.service import Service

log = logging.getLogger("nemostream.serving")

KEY_PROTOCOL = "openai-insecure-api-key."  # how browsers, which cannot set headers, send a key with a WebSocket
UPLOAD_PATH = "/v1/audio/transcriptions"
_DISCARD_SECONDS = 5.0  # during which the rest of an oversized recording is read and discarded
_OPEN = ("/", "/healthz", "/readyz")  # without a key
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_SHOWN = 300  # characters of a client's text in a log line


@dataclass(frozen=True)
class Client:
    """Who sends a request: `name` is what limits count (an API key's number, or else the address)."""

    name: str = ""
    address: str = ""


class AccessMiddleware:
    """Rejects what must not reach the application, and limits what reaches it.

    Browsers send WebSockets and forms to foreign origins without asking, so CORS alone does not keep a foreign page
    from using the model through its visitor's browser: the Origin header is checked. The Host header is checked
    because a page may rebind its own name to this server's address (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        settings = service.settings
        self._app, self._service, self._settings = app, service, settings
        self._keys = keys_of(settings)
        self._origins = {origin.rstrip("/") for origin in settings.origins}
        self._proxies = TrustedProxies(settings.trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if scope.get("nemostream.no_room"):
            response = answer(
                503,
                "this client has as many connections open as it may; close one first.",
                "rate_limit_error",
                code="capacity",
                headers={"Connection": "close", "Retry-After": "5"},
            )
            return await response(scope, receive, send)
        address = self._forwarded(scope, headers)
        hosts, origin = self._hosts(scope, headers), headers.get("origin")
        for name, host in hosts.items():
            if not host_allowed(host, self._settings):
                return await self._reject(
                    scope,
                    receive,
                    send,
                    "host",
                    address,
                    answer(
                        403,
                        f"the {name} header is {shown(host)!r}, which this server does not serve; add the name to "
                        "option hosts.",
                        "permission_error",
                        code="host",
                    ),
                )
        allowed = origin is not None and origin in self._origins
        if origin is not None and not allowed and _netloc(origin) not in hosts.values():
            return await self._reject(
                scope,
                receive,
                send,
                "origin",
                address,
                answer(
                    403,
                    f"pages of {shown(origin)} may not use this server (option origins).",
                    "permission_error",
                    code="origin",
                ),
            )
        if allowed and scope["type"] == "http":
            send = _with_cors(send, cast(str, origin))
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                # `*` does not cover Authorization (Fetch standard), so it is named.
                allow = {
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Allow-Headers": "Authorization, *",
                }
                return await Response(status_code=204, headers=allow)(scope, receive, send)
        number = None
        if self._keys:
            number = key_number(given_key(headers), self._keys)
            if number is None and scope["path"] not in _OPEN:
                return await self._reject(
                    scope,
                    receive,
                    send,
                    "key",
                    address,
                    answer(
                        401,
                        "an API key is required: send Authorization: Bearer KEY.",
                        "authentication_error",
                        code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    ),
                )
        client = scope["nemostream.client"] = Client(address if number is None else f"key {number}", address)
        if scope["type"] == "websocket":
            return await self._app(scope, receive, send)
        receive, reader = self._limited(headers, receive), _Reader(send, self._settings.send_seconds)
        try:
            if scope["path"] != UPLOAD_PATH or scope["method"] != "POST":
                return await self._app(scope, receive, reader.send)
            try:
                place = self._service.uploads.admit(_announced(headers), client)
            except CapacityError as error:
                from nemostream.serving.protocols.http import refusal

                return await refusal(error)(scope, receive, reader.send)
            # From before the body is read until the answer is complete: a client that has it may send the next one.
            with ExitStack() as places:
                places.enter_context(place)
                reader.complete = places.close
                await self._app(scope, receive, reader.send)
        except Exception:
            if not reader.gone:
                raise
            self._service.metrics.dropped.inc()

    def _forwarded(self, scope: Scope, headers: Headers) -> str:
        """The client's address, which a trusted proxy forwards."""
        return self._proxies.client(_address(scope), ",".join(headers.getlist("x-forwarded-for")))

    def _hosts(self, scope: Scope, headers: Headers) -> dict[str, str]:
        """The names under which the request reaches this server, by header.

        A proxy may send its upstream's name as Host and the one of the browser as X-Forwarded-Host. Both must be
        allowed: a page that rebinds its name to a trusted (loopback) address may set any header but Host.
        """
        hosts = {"Host": headers.get("host", "")}
        if "x-forwarded-host" in headers and _address(scope) in self._proxies:
            hosts["X-Forwarded-Host"] = headers["x-forwarded-host"].partition(",")[0].strip()
        return hosts

    async def _reject(
        self, scope: Scope, receive: Receive, send: Send, why: str, address: str, response: Response
    ) -> None:
        self._service.metrics.denied.labels(why).inc()
        log.warning("denied", extra={"why": why, "peer": address, "path": shown(scope["path"])})
        if scope["type"] == "http":
            return await response(scope, receive, send)
        await WebSocket(scope, receive, send).send_denial_response(response)

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """Limit the size of the body, the time between its parts and the time in all."""
        idle, most, size, whole = self._settings.idle_seconds, self._settings.max_upload_bytes, 0, False
        end = time.monotonic() + self._settings.body_seconds
        too_large = _announced(headers, 0) > most

        async def limited() -> Message:
            nonlocal size, too_large, whole
            if whole:  # the next message says that the client disconnected
                return await receive()
            try:
                async with asyncio.timeout(min(idle, end - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request is not complete within the time limit; send it faster.") from None
            size, whole = size + len(message.get("body", b"")), not message.get("more_body")
            too_large = too_large or size > most
            if not too_large:
                return message
            # A client that is disconnected while it sends may never read the answer: discard the rest for a moment.
            with suppress(TimeoutError):
                async with asyncio.timeout(_DISCARD_SECONDS):
                    while message.get("more_body"):
                        message = await receive()
            raise HTTPException(413, f"the recording is larger than {most} bytes; send it in parts.")

        return limited


class _Reader:
    """A client that reads its answer, or is disconnected: `send` raises, and the connection closes."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self.gone = False
        self.complete: Callable[[], None] = lambda: None  # called before the last part of the answer is sent

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete()
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError:
            self.gone = True
            raise


def answer(
    status: int, message: str, kind: str, *, code: str | None = None, param: str | None = None, headers: Any = None
) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    body = {"error": {"message": message, "type": kind, "code": code, "param": param}}
    return JSONResponse(body, status, headers=headers)


def shown(text: str) -> str:
    """A client's text, cut to what a log line or an error may hold."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + f"... ({len(text)} characters)"


def host_allowed(host: str, settings: Settings) -> bool:
    """Whether a Host header names this server: a loopback name, a name of the option `hosts`, a name without a dot
    (of a container or a machine: nobody can register one to rebind it), or, where the server is reachable from other
    machines, a literal address (which cannot be rebound)."""
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
    """The keys that clients must send one of, as bytes on the wire; none: no key is required."""
    return [key.get_secret_value().encode() for key in settings.api_keys or ()]


def given_key(headers: Mapping[str, str]) -> str:
    """The key that a request carries, or an empty string; header names are lower case."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key:
        return key.strip()
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(KEY_PROTOCOL):
            return protocol.strip().removeprefix(KEY_PROTOCOL)
    return headers.get("x-api-key", "")


def key_number(key: str, keys: list[bytes]) -> int | None:
    """Which of `keys` it is; None if it is none of them. Takes the same time for every key.

    HTTP header values are bytes, which the server decodes as ISO 8859-1. A key that is not ASCII arrives as UTF-8 from
    most clients and as ISO 8859-1 from some.
    """
    try:
        sent = key.encode("latin-1")
        sent.decode()
    except UnicodeError:
        sent = key.encode(errors="replace")
    found = [hmac.compare_digest(sent, known) for known in keys]
    return found.index(True) if any(found) else None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _address(scope: Scope) -> str:
    return str((scope.get("client") or ("",))[0])


def _announced(headers: Headers, default: int | None = None) -> Any:
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 19 else default


def _with_cors(send: Send, origin: str) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sent
