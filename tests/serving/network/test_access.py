"""Access control and limits of HTTP requests, with a controlled clock and a small application."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from nemostream.serving.client import Client
from nemostream.serving.metrics import Metrics
from nemostream.serving.network.access import AccessMiddleware, host_allowed, key_number, request_key
from nemostream.serving.network.proxies import TrustedProxies
from nemostream.serving.settings import Settings
from nemostream.serving.uploads.admission import UploadAdmission

UPLOAD = "/v1/audio/transcriptions"


class Server:
    """A middleware around an application that reads the request and responds with two parts."""

    def __init__(self, fakes: Any, **settings: Any) -> None:
        self._fakes = fakes
        self.clock, self.metrics = fakes.VirtualClock(), Metrics()
        self.settings = Settings(**settings)
        self.uploads = UploadAdmission(self.settings, self.metrics)
        self.middleware = AccessMiddleware(self.app, self.settings, self.metrics, self.uploads, self.clock)
        self.scopes: list[Any] = []  # of the requests that reached the application
        self.body = b""
        self.counts: list[Any] = []  # recordings that are admitted: when it is called, and before each part is sent
        self.reads_body, self.after_body = True, False
        self.error: Exception | None = None
        self.send_seconds = 0.0
        self.received = 0  # parts of the body that were read

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.counts.append(self.uploads.count)
        if scope["type"] == "lifespan":
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            return
        self.body = b""
        while self.reads_body:
            message = await receive()
            self.body += message["body"]
            if not message.get("more_body"):
                break
        if self.after_body:
            self.counts.append((await receive())["type"])
        if self.error:
            raise self.error
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    async def call(
        self, method: str = "GET", path: str = "/v1/models", parts: Any = (b"",), kind: str = "http", **options: Any
    ) -> list[Any]:
        """Return what is sent to the client. `parts` of the body are bytes, or seconds that pass."""
        headers = {"host": "localhost", **options.pop("headers", {})}
        scope = {
            "type": kind,
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
            "client": ("192.0.2.7", 55),
            "query_string": b"",
            "extensions": {"websocket.http.response": {}},
            **options,
        }
        left = list(parts)
        sent: list[Any] = []

        async def receive() -> Any:
            while left:
                part = left.pop(0)
                if isinstance(part, bytes):
                    self.received += 1
                    more = any(isinstance(other, bytes) for other in left)
                    return {"type": "http.request", "body": part, "more_body": more}
                await asyncio.sleep(part)
            await asyncio.sleep(1000)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                self.counts.append(self.uploads.count)
            await asyncio.sleep(self.send_seconds)
            sent.append(message)

        await self.middleware(scope, receive, send)
        return sent

    def request(self, *arguments: Any, **options: Any) -> list[Any]:
        sent: list[Any] = self._fakes.run(self.clock, self.call(*arguments, **options))
        return sent

    def denied(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("nemostream_requests_denied_total", {"reason": reason}) or 0

    @property
    def timeouts(self) -> float | None:
        return self.metrics.registry.get_sample_value("nemostream_timeouts_total")


def outcome(sent: list[Any]) -> tuple[int, Any]:
    """Return the status and the body, which is parsed if it is JSON."""
    assert sent[0]["type"].endswith("response.start")
    body = b"".join(one["body"] for one in sent[1:])
    return sent[0]["status"], json.loads(body)["error"] if body.startswith(b"{") else body


def headers_of(sent: list[Any]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "size", "accepted"),
    [
        (None, 2048, True),
        (None, 2049, False),
        ("2048", 2048, True),
        ("2049", 1, False),  # what is announced counts
        ("1", 2049, False),  # and so does what is sent
        ("", 10, True),
        ("-5", 10, True),
        ("+5000", 10, True),  # not a number of HTTP: the parser rejects it
        ("\u00b2", 10, True),
        ("9" * 18, 10, False),
        ("9" * 19, 10, True),
    ],
)
@pytest.mark.parametrize("path", [UPLOAD, "/v1/models"])
def test_the_size_of_bodies_is_limited(fakes: Any, path: str, length: str | None, size: int, accepted: bool) -> None:
    server = Server(fakes, max_upload_bytes=2048)
    headers = {} if length is None else {"content-length": length}
    parts = [bytes(size // 2), bytes(size - size // 2)]
    if accepted:
        assert outcome(server.request("POST", path, parts, headers=headers)) == (200, b"onetwo")
        assert server.body == bytes(size)
        return
    with pytest.raises(HTTPException) as caught:
        server.request("POST", path, parts, headers=headers)
    assert caught.value.status_code == 413 and caught.value.detail.startswith("the recording is larger than 2048 bytes")
    assert server.received == 2 and server.uploads.count == 0  # the rest was discarded


@pytest.mark.parametrize(
    ("parts", "received", "at"),
    [([bytes(3000), bytes(10), bytes(10)], 3, 0), ([bytes(3000), *[1.5, bytes(10)] * 20], 4, 5)],
)
def test_the_rest_of_an_oversized_body_is_discarded_for_five_seconds(
    fakes: Any, parts: Any, received: int, at: float
) -> None:
    server = Server(fakes, max_upload_bytes=2048)
    with pytest.raises(HTTPException) as caught:
        server.request("POST", UPLOAD, parts)
    assert caught.value.status_code == 413 and (server.received, server.clock()) == (received, at)


@pytest.mark.parametrize(
    ("parts", "at"),
    [
        ([31, b"a"], 30),  # nothing for 30 s
        ([b"a", 29, b"a", 31, b"a"], 59),
        ([b"a", *[20, b"a"] * 20], 100),  # not complete after 100 s
    ],
)
def test_bodies_have_deadlines(fakes: Any, parts: Any, at: float) -> None:
    server = Server(fakes, idle_seconds=30, body_seconds=100)
    with pytest.raises(HTTPException) as caught:
        server.request("POST", UPLOAD, parts)
    assert caught.value.status_code == 408 and server.clock() == at and server.uploads.count == 0


def test_a_complete_body_has_no_deadline(fakes: Any) -> None:
    server = Server(fakes, idle_seconds=30, body_seconds=100)
    server.after_body = True  # the application waits for the disconnection
    assert outcome(server.request("POST", UPLOAD, [b"a"])) == (200, b"onetwo")
    assert server.counts[1] == "http.disconnect" and server.clock() == 1000 and server.timeouts == 0


# -- responses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "counts"),
    [
        ("POST", UPLOAD, [1, 1, 0]),  # released before the last part is sent: the client may send the next recording
        ("GET", UPLOAD, [0, 0, 0]),
        ("POST", "/v1/models", [0, 0, 0]),
    ],
)
def test_an_upload_has_a_slot_until_the_end_of_its_response(
    fakes: Any, method: str, path: str, counts: list[int]
) -> None:
    server = Server(fakes)
    assert outcome(server.request(method, path)) == (200, b"onetwo")
    assert server.counts == counts and server.uploads.count == 0


def test_an_upload_without_a_slot_is_not_read(fakes: Any) -> None:
    server = Server(fakes, max_uploads=1, max_upload_total_bytes=5000)
    with server.uploads.admit(1, Client()):
        sent = server.request("POST", UPLOAD)
        assert outcome(sent)[0] == 429 and headers_of(sent)["retry-after"] == "2" and not server.scopes
        assert server.received == 0 and outcome(server.request("POST"))[0] == 200
    server = Server(fakes, max_uploads=9, max_upload_total_bytes=5000)
    with server.uploads.admit(4000, Client()):
        for length, status in (("1001", 429), ("1000", 200), ("x", 429)):  # unknown: the maximum
            assert outcome(server.request("POST", UPLOAD, headers={"content-length": length}))[0] == status


def test_uploads_are_limited_per_client(fakes: Any) -> None:
    server = Server(fakes, max_streams_per_client=1)
    with server.uploads.admit(1, Client("192.0.2.7")):
        assert outcome(server.request("POST", UPLOAD))[0] == 429
        assert outcome(server.request("POST", UPLOAD, client=("192.0.2.8", 1)))[0] == 200


@pytest.mark.parametrize("path", [UPLOAD, "/v1/models"])
def test_a_client_that_does_not_read_its_response(fakes: Any, path: str) -> None:
    server = Server(fakes, send_seconds=7)
    server.send_seconds = 1e6
    assert server.request("POST", path) == []
    assert server.clock() == 7 and server.timeouts == 1 and server.uploads.count == 0
    slow = Server(fakes, send_seconds=7)
    slow.send_seconds = 6  # for each part
    assert outcome(slow.request("POST", path))[0] == 200 and slow.clock() == 18 and slow.timeouts == 0


def test_an_error_of_the_application_is_not_a_timeout(fakes: Any) -> None:
    server = Server(fakes)
    for error in (ZeroDivisionError(), TimeoutError()):
        server.error = error
        with pytest.raises(type(error)):
            server.request("POST", UPLOAD)
    assert server.timeouts == 0 and server.uploads.count == 0


# -- access ------------------------------------------------------------------------------------------------------------


def test_requests_of_clients_with_too_many_connections(fakes: Any) -> None:
    server = Server(fakes)
    sent = server.request(**{"nemostream.over_capacity": True})
    assert outcome(sent)[0] == 503 and outcome(sent)[1]["code"] == "capacity" and not server.scopes
    assert (headers_of(sent)["connection"], headers_of(sent)["retry-after"]) == ("close", "5")


def test_other_kinds_of_scopes_pass(fakes: Any) -> None:
    server = Server(fakes, api_keys=["k"])
    assert server.request(kind="lifespan") == [] and len(server.scopes) == 1


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_requests_need_one_of_the_keys(fakes: Any, kind: str) -> None:
    server = Server(fakes, api_keys=["one", "two"])
    denials = 0
    for headers, name in (
        ({"authorization": "Bearer two"}, "key 1"),
        ({"x-api-key": "one"}, "key 0"),
        ({}, None),
        ({"authorization": "Bearer three", "x-api-key": "one"}, None),
    ):
        server.scopes.clear()
        sent = server.request(kind=kind, headers=headers)
        if name is None:
            denials += 1
            status, error = outcome(sent)
            assert status == 401 and (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert headers_of(sent)["www-authenticate"] == "Bearer" and not server.scopes
            assert all(one["type"].startswith("websocket.http." if kind == "websocket" else "http.") for one in sent)
        else:
            owner = hashlib.sha256(b"two" if name == "key 1" else b"one").hexdigest()
            assert server.scopes[0]["nemostream.client"] == Client(name, "192.0.2.7", owner)
    assert server.denied("key") == denials
    for path in ("/", "/sample.flac", "/healthz", "/readyz"):
        server.scopes.clear()
        server.request(path=path, kind=kind)
        assert server.scopes[0]["nemostream.client"] == Client("192.0.2.7", "192.0.2.7")
    open_to_all = Server(fakes)
    open_to_all.request(kind=kind, headers={"authorization": "Bearer two"})
    assert open_to_all.scopes[0]["nemostream.client"] == Client("192.0.2.7", "192.0.2.7")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer  a b "}, "a b"),
        ({"authorization": "BEARER a"}, "a"),
        ({"authorization": "Bearer"}, ""),
        ({"authorization": "Basic a", "x-api-key": "b"}, "b"),
        ({"authorization": "Bearer a", "sec-websocket-protocol": "openai-insecure-api-key.b"}, "a"),
        ({"sec-websocket-protocol": "realtime, openai-insecure-api-key.a.b ,x", "x-api-key": "c"}, "a.b"),
        ({"sec-websocket-protocol": "realtime", "x-api-key": "c"}, "c"),
        ({}, ""),
    ],
)
def test_keys_of_requests(headers: dict[str, str], key: str) -> None:
    assert request_key(headers) == key


def test_keys_are_bytes_on_the_wire() -> None:
    keys = [b"one", "schlüssel".encode()]
    assert key_number("one", keys) == 0
    assert key_number("schlüssel".encode().decode("latin-1"), keys) == 1  # sent as UTF-8
    assert key_number("schlüssel", keys) == 1  # sent as ISO 8859-1
    assert key_number("\u043a\ud800", keys) is None


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_hosts_and_origins(fakes: Any, kind: str) -> None:
    server = Server(fakes, origins=["https://friend.example/"], trusted_proxies=["192.0.2.0/24"])
    for headers, reason in (
        ({}, None),
        ({"host": "evil.example"}, "host"),
        ({"x-forwarded-host": "evil.example"}, "host"),
        ({"x-forwarded-host": " localhost , evil.example"}, None),
        ({"origin": "http://localhost"}, None),
        ({"origin": "http://localhost:80"}, "origin"),
        ({"host": "localhost:80", "origin": "http://localhost:80"}, None),
        ({"x-forwarded-host": "nemostream:1", "origin": "https://nemostream:1"}, None),
        ({"origin": "https://friend.example"}, None),
        ({"origin": "https://friend.example:1"}, "origin"),
        ({"origin": "null"}, "origin"),
        ({"origin": "http://["}, "origin"),
        ({"host": "evil.example", "origin": "null"}, "host"),
    ):
        before, server.scopes = {name: server.denied(name) for name in ("host", "origin", "key")}, []
        sent = server.request(kind=kind, headers=headers)
        assert bool(server.scopes) is (reason is None), headers
        if reason:
            status, error = outcome(sent)
            assert (status, error["code"], error["type"]) == (403, reason, "permission_error")
            assert error["message"].endswith(f"option {reason}s." if reason == "host" else "(option origins).")
            before[reason] += 1
        assert {name: server.denied(name) for name in before} == before
    untrusted = Server(fakes, trusted_proxies=[])
    untrusted.request(kind=kind, headers={"x-forwarded-host": "evil.example", "x-forwarded-for": "198.51.100.1"})
    assert untrusted.scopes[0]["nemostream.client"].address == "192.0.2.7"
    server.request(kind=kind, headers={"x-forwarded-for": "198.51.100.1"})
    assert server.scopes[-1]["nemostream.client"] == Client("198.51.100.1", "198.51.100.1")


def test_allowed_hosts() -> None:
    local, public = Settings(), Settings(host="0.0.0.0", hosts=["ASR.example."])
    for host, allowed_locally, allowed_publicly in (
        ("localhost", True, True),
        ("127.0.0.1:8000", True, True),
        ("[::1]:8000", True, True),
        ("nemostream:80", True, True),
        ("192.0.2.7:8000", False, True),
        ("[2001:db8::1]", False, True),
        ("asr.example", False, True),
        ("asr.example.:8000", False, True),
        ("evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("localhost.evil.example", False, False),
        ("", False, False),
        ("[::1", False, False),
        ("*", True, True),
    ):
        assert host_allowed(host, local) is allowed_locally, host
        assert host_allowed(host, public) is allowed_publicly, host
    assert host_allowed("anything.example", Settings(hosts=["*"]))


def test_cross_origin_requests(fakes: Any) -> None:
    server = Server(fakes, origins=["https://friend.example"], api_keys=["k"])
    origin, preflight = {"origin": "https://friend.example"}, {"access-control-request-method": "POST"}
    sent = server.request("OPTIONS", headers=origin | preflight)
    assert outcome(sent)[0] == 204 and not server.scopes
    assert headers_of(sent) == {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": "Authorization, *",
        "access-control-allow-origin": "https://friend.example",
        "vary": "Origin",
    }
    for method, headers in (("OPTIONS", origin), ("GET", origin), ("OPTIONS", preflight)):
        status = outcome(server.request(method, headers=headers))[0]
        assert status == 401, (method, headers)
    allowed = headers_of(server.request(headers=origin | {"x-api-key": "k"}))
    assert allowed == {"x": "y", "access-control-allow-origin": "https://friend.example", "vary": "Origin"}
    assert headers_of(server.request(headers={"x-api-key": "k"})) == {"x": "y"}


def test_the_number_of_forwarded_addresses_is_limited() -> None:
    """A client may put any number of entries before those of the proxies."""
    proxies = TrustedProxies(["10.0.0.0/8"])
    assert proxies.client("10.0.0.1", ",".join(["192.0.2.1"] + ["10.0.0.2"] * 31)) == "192.0.2.1"
    assert proxies.client("10.0.0.1", ",".join(["192.0.2.1"] + ["10.0.0.2"] * 32)) == "10.0.0.2"
