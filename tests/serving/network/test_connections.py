"""Limits of connections: numbers, phases of requests, frames and large messages, with a controlled clock."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode

from nemostream.serving.network import connections
from nemostream.serving.network.connections import Connections, FrameSplitter, protocol_classes
from nemostream.serving.network.proxies import TrustedProxies

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
KIB = 1024


class Peer:
    """The part of an HTTP connection that `Connections` uses."""

    def __init__(self, address: str | None, since: float = 0.0, phase: str = "head") -> None:
        self.client = (address, 1) if address else None
        self.since, self.phase = since, phase
        self.aborted, self.resumed = False, 0
        self.transport = self

    def abort(self) -> None:
        self.aborted = True

    def proceed(self) -> None:
        self.resumed += 1


def admitted(limits: Any, *peers: Peer) -> list[bool]:
    return [limits.admit(peer) for peer in peers]


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_connections_are_limited_in_total_and_per_address() -> None:
    limits = Connections(4, 2, 1)
    busy = [Peer(address, phase="") for address in ("a", "a", "a", "b", "c", "d")]
    assert admitted(limits, *busy) == [True, True, False, True, True, False] and len(limits) == 4
    assert not any(peer.aborted for peer in busy)
    for _ in range(2):  # later calls have no effect
        limits.closed(busy[0].transport)
    assert len(limits) == 3 and admitted(limits, Peer("a", phase=""), Peer("e")) == [True, False]


@pytest.mark.parametrize(("total", "per_client"), [(8, 6), (9, 6), (4, 3), (1, 1), (1024, 768)])
def test_an_address_has_three_quarters_of_the_connections(total: int, per_client: int) -> None:
    assert Connections(total, 0, 1).max_per_client == per_client
    assert Connections(total, 5, 1).max_per_client == 5


def test_the_connection_that_waits_for_longest_makes_room() -> None:
    limits = Connections(4, 2, 1)
    first, second = Peer("a", since=5.0), Peer("a", since=3.0)
    other, busy = Peer("b", since=1.0), Peer("c", since=0.0, phase="body")
    assert admitted(limits, first, second, other, busy) == [True] * 4
    third = Peer("a", since=9.0)
    assert limits.admit(third) and second.aborted and not (first.aborted or other.aborted)  # of the same address
    assert limits.admit(Peer("d", since=10.0)) and other.aborted and not (first.aborted or busy.aborted)  # of all
    assert len(limits) == 4
    for waiting in (first, third):
        waiting.phase = ""
    assert not limits.admit(Peer("a")) and limits.admit(Peer("e")) and not limits.admit(Peer("a"))


def test_websockets_do_not_make_room() -> None:
    limits = Connections(1, 1, 1)
    socket = Peer("a")
    assert limits.admit(socket)
    limits.upgraded(socket.transport)
    assert not limits.admit(Peer("a")) and not limits.admit(Peer("b")) and not socket.aborted
    limits.closed(socket.transport)
    assert limits.admit(Peer("b")) and len(limits) == 1


def test_connections_of_a_proxy_count_for_its_clients() -> None:
    limits = Connections(9, 2, 1)
    peers = [Peer("proxy", phase="") for _ in range(2)]
    assert admitted(limits, *peers) == [True, True] and not limits.admit(Peer("proxy"))
    assert limits.reassign(peers[0].transport, "a") and limits.reassign(peers[0].transport, "a")
    more = [Peer("proxy", phase="") for _ in range(1)]
    assert admitted(limits, *more) == [True]
    assert limits.reassign(peers[1].transport, "a")
    assert not limits.reassign(more[0].transport, "a") and len(limits) == 3
    limits.closed(peers[0].transport)
    assert limits.reassign(more[0].transport, "a") and not limits.reassign(admit(limits, "proxy").transport, "a")
    assert limits.reassign(object(), "z")  # closed meanwhile
    assert limits._addresses == {"a": 2, "proxy": 1}


def admit(limits: Any, address: str) -> Peer:
    peer = Peer(address, phase="")
    assert limits.admit(peer)
    return peer


def test_large_messages_wait_for_a_slot_in_order() -> None:
    limits = Connections(99, 99, 1)
    holders, waiting = [Peer("a") for _ in range(16)], [Peer("a") for _ in range(4)]
    assert [limits.admit_large(peer) for peer in holders] == [True] * 16
    assert [limits.admit_large(peer) for peer in (*waiting, *holders)] == [False] * 4 + [True] * 16
    assert not limits.admit_large(waiting[0])  # keeps its place
    limits.release_large(waiting[1])  # disconnected
    limits.release_large(Peer("b"))  # has none
    assert [peer.resumed for peer in waiting] == [0, 0, 0, 0]
    limits.release_large(holders[0])
    limits.release_large(holders[0])
    assert [peer.resumed for peer in waiting] == [1, 0, 0, 0]
    assert limits.admit_large(waiting[0]) and not limits.admit_large(waiting[2])
    limits.release_large(holders[1])
    assert [peer.resumed for peer in waiting] == [1, 0, 1, 0]
    for holder in holders[2:]:
        limits.release_large(holder)
    assert [peer.resumed for peer in waiting] == [1, 0, 1, 1]
    assert [limits.admit_large(Peer("c")) for _ in range(14)] == [True] * 13 + [False]


# -- HTTP --------------------------------------------------------------------------------------------------------------


class Transport:
    """The transport of a connection: records what the protocol does with it."""

    def __init__(self, address: str = "192.0.2.7") -> None:
        self._address = address
        self.written = b""
        self.closing = self.aborted = False
        self.reading = True
        self.protocol: Any = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": (self._address, 55), "sockname": ("127.0.0.1", 80)}.get(name, default)

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def is_closing(self) -> bool:
        return self.closing

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high


async def turns(count: int = 20) -> None:
    """Let the event loop run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def ok(scope: Any, receive: Any, send: Any) -> None:
    """An application that does not read the body."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def silent(scope: Any, receive: Any, send: Any) -> None:
    """An application that does not respond until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Site:
    """A server's connections, and the protocol of the connection that is tested."""

    def __init__(self, clock: Any, app: Any = ok, **limits: Any) -> None:
        arguments: dict[str, Any] = {"max_connections": 9, "max_per_client": 0, "body_seconds": 50.0, **limits}
        self.clock = clock
        self.limits = Connections(**arguments, clock=clock)
        http, websocket = protocol_classes(self.limits)
        self.config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            http=http,
            ws=websocket,
            ws_max_size=100 * KIB,
            ws_per_message_deflate=False,
            h11_max_incomplete_event_size=connections.MAX_HEAD_BYTES,
            timeout_keep_alive=10**6,
        )
        self.config.load()

    def connect(self, address: str = "192.0.2.7") -> tuple[Any, Transport]:
        protocol = self.config.http_protocol_class(self.config, ServerState(), {})  # type: ignore[operator, union-attr]
        transport = Transport(address)
        protocol.connection_made(transport)
        return protocol, transport


def run(fakes: Any, clock: Any, main: Callable[[], Any]) -> None:
    async def bounded() -> None:
        await main()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    fakes.run(clock, bounded())


async def reaped_after(site: Site, transport: Transport) -> float:
    """Return the seconds until the connection is closed, with a check every half second."""
    start = site.clock()
    while not transport.closing:
        await asyncio.sleep(0.5)
        site.limits.reap()
        assert site.clock() - start < 1000
    return float(site.clock() - start)


@pytest.mark.parametrize(
    ("data", "app", "seconds"),
    [
        (b"", ok, 20.5),  # no request
        (HEAD, ok, 20.5),  # an incomplete head
        (HEAD + b"\r\n", ok, 20.5),  # the next request
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na", silent, 50.5),  # an incomplete body
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\na", ok, 2.5),  # one that continues after its response
    ],
)
def test_each_phase_of_a_request_has_a_deadline(fakes: Any, clock: Any, data: bytes, app: Any, seconds: float) -> None:
    async def main() -> None:
        site = Site(clock, app)
        protocol, transport = site.connect()
        await asyncio.sleep(3)
        if data:
            protocol.data_received(data)
        await turns()
        # The first head began with the connection, the next phases with what was received.
        began = 3 if data in (b"", HEAD) else 0
        assert await reaped_after(site, transport) == seconds - began and not transport.aborted

    run(fakes, clock, main)


def test_a_slow_head_is_not_given_more_time_for_each_part(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        site = Site(clock)
        protocol, transport = site.connect()
        for _ in range(20):
            protocol.data_received(b"G")
            await asyncio.sleep(1)
            site.limits.reap()
        assert not transport.closing
        await asyncio.sleep(0.5)
        site.limits.reap()
        assert transport.closing

    run(fakes, clock, main)


def test_a_response_may_take_any_time(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        site = Site(clock, silent)
        protocol, transport = site.connect()
        protocol.data_received(HEAD + b"\r\n")
        for _ in range(100):
            await asyncio.sleep(10)
            site.limits.reap()
        assert not transport.closing

    run(fakes, clock, main)


def test_a_closing_connection_is_aborted_after_two_seconds(fakes: Any, clock: Any) -> None:
    """The peer may not read what is left to send."""

    async def main() -> None:
        site = Site(clock)
        _, transport = site.connect()
        await asyncio.sleep(15)
        transport.close()
        for _ in range(5):
            site.limits.reap()
            assert not transport.aborted
            await asyncio.sleep(0.5)
        site.limits.reap()
        assert transport.aborted

    run(fakes, clock, main)


@pytest.mark.parametrize("step", [1 << 20, 1000])
@pytest.mark.parametrize(("size", "accepted"), [(64 * KIB, True), (64 * KIB + 1, False)])
def test_the_size_of_a_head(fakes: Any, clock: Any, size: int, accepted: bool, step: int) -> None:
    head = HEAD + b"A: "
    head += b"a" * (size - len(head)) + b"\r\n\r\n"

    async def main() -> None:
        site = Site(clock)
        protocol, transport = site.connect()
        for start in range(0, len(head), step):
            if not transport.closing:
                protocol.data_received(head[start : start + step])
            await turns(4)
        await turns()
        status = b"HTTP/1.1 200" if accepted else b"HTTP/1.1 400"
        assert transport.written.startswith(status) and transport.closing is not accepted
        if accepted:  # the count begins again with the next request
            protocol.data_received(head)
            await turns(40)
            assert transport.written.count(b"HTTP/1.1 200") == 2

    run(fakes, clock, main)


@pytest.mark.parametrize(("lines", "accepted"), [(256, True), (257, False)])
def test_the_number_of_lines_of_a_head(fakes: Any, clock: Any, lines: int, accepted: bool) -> None:
    head = HEAD + b"a: b\r\n" * (lines - 1)

    async def main() -> None:
        _, transport = connected = Site(clock).connect()
        connected[0].data_received(head + b"\r\n")
        await turns()
        assert transport.written.startswith(b"HTTP/1.1 200" if accepted else b"HTTP/1.1 400")

    run(fakes, clock, main)


def test_the_body_is_not_counted_as_a_head(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        site = Site(clock, silent)
        protocol, transport = site.connect()
        size = 100 * KIB
        protocol.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"\n" * 300)
        await turns()
        protocol.data_received(b"\n" * (size - 300))
        await turns(60)
        assert not transport.closing and not transport.written

    run(fakes, clock, main)


def test_received_data_is_parsed_in_slices(fakes: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slice of 8 KiB in each turn of the event loop; reading is paused meanwhile."""
    sizes: list[int] = []
    feed = connections.HttpProtocol.feed
    monkeypatch.setattr(
        connections.HttpProtocol, "feed", lambda self, data: sizes.append(len(data)) or feed(self, data)
    )

    async def main() -> None:
        site = Site(clock)
        protocol, transport = site.connect()
        head = HEAD + b"A: " + b"a" * 20_000
        protocol.data_received(head)
        assert sizes == [8192] and not transport.reading
        await asyncio.sleep(0)
        assert sizes == [8192, 8192] and not transport.reading
        await turns()
        assert sizes == [8192, 8192, len(head) - 16384] and transport.reading
        protocol.data_received(b"\r\n\r\n")
        await turns()
        assert transport.written.startswith(b"HTTP/1.1 200")

    run(fakes, clock, main)


def test_an_error_of_the_parser_ends_only_its_connection(fakes: Any, clock: Any, caplog: Any) -> None:
    async def main() -> None:
        site = Site(clock)
        (broken, transport), (healthy, other) = site.connect("192.0.2.1"), site.connect("192.0.2.2")

        def handle_events() -> None:
            raise ZeroDivisionError

        broken.handle_events = handle_events
        broken.data_received(HEAD + b"\r\n")
        healthy.data_received(HEAD + b"\r\n")
        await turns()
        assert transport.aborted and other.written.startswith(b"HTTP/1.1 200")

    run(fakes, clock, main)
    (record,) = fakes.records(caplog, "connection failed")
    assert record.peer == "192.0.2.1"


def test_a_connection_over_the_limit_is_refused(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        site = Site(clock, silent, max_connections=2)
        first, _ = site.connect("192.0.2.1")
        first.data_received(HEAD + b"\r\n")
        _, waiting_transport = site.connect("192.0.2.2")
        third, transport = site.connect("192.0.2.3")
        assert waiting_transport.aborted and not transport.closing
        third.data_received(HEAD + b"\r\n")
        _, refused = site.connect("192.0.2.4")
        assert refused.written.startswith(b"HTTP/1.1 503") and b"Retry-After: 5" in refused.written and refused.closing
        first.connection_lost(None)
        _, accepted = site.connect("192.0.2.4")
        assert not accepted.closing and len(site.limits) == 2

    run(fakes, clock, main)


def test_a_request_of_a_proxy_counts_for_the_client_behind_it(fakes: Any, clock: Any) -> None:
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)

    def request(client: str) -> bytes:
        return HEAD + f"X-Forwarded-For: {client}\r\n\r\n".encode()

    async def main() -> None:
        site = Site(clock, app, max_per_client=1, proxies=TrustedProxies(["10.0.0.0/8"]))
        for proxy, client, over in (
            ("10.0.0.1", "192.0.2.1", None),
            ("10.0.0.2", "192.0.2.2", None),
            ("10.0.0.3", "192.0.2.1", True),
        ):
            protocol, _ = site.connect(proxy)
            protocol.data_received(request(client))
            await turns(3)
            assert scopes[-1].get("nemostream.over_capacity") is over
            if not over:
                assert protocol.peer == client
        untrusted, _ = site.connect("192.0.2.9")
        untrusted.data_received(request("192.0.2.1"))
        await turns(3)
        assert untrusted.peer == "192.0.2.9" and "nemostream.over_capacity" not in scopes[-1]

    run(fakes, clock, main)


# -- WebSockets --------------------------------------------------------------------------------------------------------

UPGRADE = (
    b"GET %s HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n%s\r\n"
)


def frame(opcode: Opcode, data: bytes = b"", fin: bool = True) -> bytes:
    return Frame(opcode, data, fin=fin).serialize(mask=True)


class Reader:
    """An application that reads messages when the test permits it."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.permits = asyncio.Semaphore(0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        await receive()
        await send({"type": "websocket.accept"})
        while not self.messages or self.messages[-1]["type"] != "websocket.disconnect":
            await self.permits.acquire()
            self.messages.append(await receive())


async def upgraded(site: Site, path: bytes = b"/v1/stream", extra: bytes = b"", address: str = "192.0.2.7") -> Any:
    protocol, transport = site.connect(address)
    protocol.data_received(UPGRADE % (path, extra))
    await turns()
    return transport.protocol, transport


@pytest.mark.parametrize(
    "change",
    [
        (b"GET", b"POST"),
        (b"Sec-WebSocket-Key", b"X-Key"),
        (b"Version: 13", b"Version: 12"),
        (b"Host: localhost", b"Host: localhost\r\nX: \xff"),
        (b"Host: localhost", b"Host: localhost\r\nContent-Length: 0"),
        (b"Host: localhost", b"Host: localhost\r\nTransfer-Encoding: chunked"),
    ],
)
def test_malformed_upgrades_are_rejected(fakes: Any, clock: Any, change: tuple[bytes, bytes]) -> None:
    async def main() -> None:
        reader = Reader()
        site = Site(clock, reader)
        protocol, transport = site.connect()
        protocol.data_received((UPGRADE % (b"/", b"")).replace(*change))
        await turns()
        assert transport.written.startswith(b"HTTP/1.1 400") and transport.closing and not transport.protocol
        assert not hasattr(reader, "scope")

    run(fakes, clock, main)


def test_an_upgrade_over_the_limit_of_a_client(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        site = Site(clock, Reader(), max_per_client=1, proxies=TrustedProxies(["10.0.0.0/8"]))
        header = b"X-Forwarded-For: 192.0.2.1\r\n"
        first, transport = await upgraded(site, extra=header, address="10.0.0.1")
        assert first is not None and b" 101 " in transport.written
        second, refused = await upgraded(site, extra=header, address="10.0.0.2")
        assert second is None and refused.written.startswith(b"HTTP/1.1 503") and refused.closing
        first.connection_lost(None)
        third, _ = await upgraded(site, extra=header, address="10.0.0.3")
        assert third is not None

    run(fakes, clock, main)


@pytest.mark.parametrize("opcode", [Opcode.PING, Opcode.PONG])
def test_the_rate_of_control_frames_is_limited(fakes: Any, clock: Any, opcode: Opcode) -> None:
    """A hundred at once, then twenty per second."""

    async def main() -> None:
        reader = Reader()
        protocol, transport = await upgraded(Site(clock, reader))
        protocol.data_received(frame(opcode) * 100)
        assert not transport.closing
        assert transport.written.count(b"\x8a\x00") == (100 if opcode is Opcode.PING else 0)
        await asyncio.sleep(1)
        protocol.data_received(frame(opcode) * 20)
        assert not transport.closing
        assert transport.written.count(b"\x8a\x00") == (120 if opcode is Opcode.PING else 0)
        protocol.data_received(frame(opcode))
        assert transport.closing and transport.written.endswith(b"\x03\xf0too many control frames")  # code 1008
        reader.permits.release()
        await turns()
        assert reader.messages == [{"type": "websocket.disconnect", "code": 1008, "reason": "too many control frames"}]

    run(fakes, clock, main)


def test_the_number_of_fragments_is_limited(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        reader = Reader()
        protocol, transport = await upgraded(Site(clock, reader))
        for fragments in (4096, 4096, 4097):
            protocol.data_received(frame(Opcode.BINARY, b"a", False) + frame(Opcode.CONT, b"", False) * (fragments - 1))
            await turns()
            if fragments == 4096:
                protocol.data_received(frame(Opcode.CONT, b"b"))
                reader.permits.release()
                await turns()
                assert reader.messages[-1] == {"type": "websocket.receive", "bytes": b"ab"} and not transport.closing
            else:
                protocol.data_received(frame(Opcode.CONT, b"", False))
                assert transport.closing and b"too many fragments" in transport.written

    run(fakes, clock, main)


def test_a_message_is_parsed_when_the_one_before_it_is_read(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        reader = Reader()
        protocol, transport = await upgraded(Site(clock, reader))
        protocol.data_received(b"".join(frame(Opcode.TEXT, b"%d" % number) for number in range(3)) + bytes(0))
        await turns()
        assert not transport.reading
        for number in range(3):
            reader.permits.release()
            await turns()
            assert reader.messages[-1] == {"type": "websocket.receive", "text": str(number)}
        reader.permits.release()
        await turns()
        assert transport.reading and transport.high == 16 * KIB

    run(fakes, clock, main)


class Handler:
    """Processes the messages that it is set to accept; the test completes those that it keeps."""

    def __init__(self, protocol: Any, choose: Callable[[bytes | str], str]) -> None:
        self._protocol, self._choose = protocol, choose
        self.accepted: list[bytes | str] = []
        self.kept = 0

    def __call__(self, message: bytes | str) -> bool:
        choice = self._choose(message)
        if choice == "decline":
            return False
        assert not self.kept  # one message at a time
        self.accepted.append(message)
        if choice == "keep":
            self.kept += 1
        elif choice == "defer":
            self._protocol.defer(message)
        else:
            self._protocol.done()
        return True

    def complete(self) -> None:
        if self.kept:
            self.kept -= 1
            self._protocol.done()


def wire_of(messages: list[bytes | str], chance: random.Random) -> tuple[bytes, int]:
    """Return the frames of messages, some of them in fragments, with pings between them; and the number of pings."""
    parts, pings = [], 0
    for message in messages:
        opcode = Opcode.TEXT if isinstance(message, str) else Opcode.BINARY
        data = message.encode() if isinstance(message, str) else message
        cuts = sorted(chance.choices(range(len(data) + 1), k=chance.choice((0, 0, 0, 1, 3))))
        pieces = [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        for index, piece in enumerate(pieces):
            parts.append(frame(Opcode.CONT if index else opcode, piece, index == len(pieces) - 1))
            if chance.random() < 0.1:
                parts.append(frame(Opcode.PING, b"p"))
                pings += 1
    return b"".join(parts), pings


@pytest.mark.parametrize("seed", range(12))
def test_messages_are_received_once_and_in_order(fakes: Any, clock: Any, seed: int) -> None:
    """By the application and a handler together, for any sizes, fragments and partition of the data."""
    chance = random.Random(seed)
    sizes = [0, 1, 5, 125, 126, 127, 2560, 8184, 8185, 65_535, 65_536, 70_000]
    messages: list[bytes | str] = []
    for _ in range(60):
        size = chance.choice(sizes[: 7 if seed % 3 else 12])
        messages.append(chance.randbytes(size) if chance.random() < 0.7 else "é" * (size // 2) + "a" * (size % 2))
    choices = [chance.choice(("done", "keep", "defer", "decline")) for _ in range(7)] if seed % 4 else ["decline"]
    wire, pings = wire_of(messages, chance)

    async def main() -> None:
        received: list[bytes | str] = []  # by either, in order

        def choose(message: bytes | str) -> str:
            choice = choices[len(received) % len(choices)]
            if choice != "decline":
                received.append(message)
            return choice

        class App(Reader):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                await receive()
                await send({"type": "websocket.accept"})
                self.handler = Handler(scope["nemostream.connection"], choose)
                if seed % 4 != 3:
                    scope["nemostream.connection"].attach(self.handler)
                while (message := await receive())["type"] == "websocket.receive":
                    if "deferred" in message:
                        assert message["deferred"] == received[-1]
                    else:
                        received.append(message["text"] if "text" in message else bytes(message["bytes"]))
                    for _ in range(chance.randrange(3)):
                        await asyncio.sleep(0)

        app = App()
        protocol, transport = await upgraded(Site(clock, app))
        position = 0
        while position < len(wire) or len(received) < len(messages):
            if position < len(wire) and transport.reading:
                size = chance.choice((1, 10, 100, 2568, 2568, 5136, 100_000))
                protocol.data_received(wire[position : position + size])
                position += size
            else:
                await asyncio.sleep(0)
                app.handler.complete()
        assert received == messages and not transport.closing
        await turns()
        app.handler.complete()
        await turns()
        assert transport.reading and transport.written.count(b"\x8a\x01p") == pings

    run(fakes, clock, main)


def test_a_message_waits_while_the_handler_is_busy(fakes: Any, clock: Any) -> None:
    """Reading is paused when one message waits. A disconnection is received after the handler's message."""

    async def main() -> None:
        class App(Reader):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                self.connection = scope["nemostream.connection"]
                await receive()
                await send({"type": "websocket.accept"})
                self.handler = Handler(self.connection, lambda message: "keep")
                self.connection.attach(self.handler)
                self.messages.append(await receive())

        app = App()
        protocol, transport = await upgraded(Site(clock, app))
        protocol.data_received(frame(Opcode.BINARY, b"a"))
        assert app.handler.accepted == [b"a"] and transport.reading
        protocol.data_received(frame(Opcode.BINARY, b"b"))
        assert app.handler.accepted == [b"a"] and not transport.reading
        app.handler.complete()
        await turns(2)
        assert app.handler.accepted == [b"a", b"b"] and transport.reading
        protocol.data_received(frame(Opcode.CLOSE, b"\x03\xe8"))
        await turns()
        assert not app.messages
        app.handler.complete()
        await turns()
        assert app.messages[0]["type"] == "websocket.disconnect" and app.messages[0]["code"] == 1000

    run(fakes, clock, main)


@pytest.mark.parametrize(
    "before", [frame(Opcode.PING, b"p"), frame(Opcode.BINARY, b"", False)], ids=["ping", "fragments"]
)
def test_a_turn_of_the_event_loop_processes_one_message(fakes: Any, clock: Any, before: bytes) -> None:
    """Also if a slice begins with a frame that only the general parser accepts, and has a thousand messages."""

    async def main() -> None:
        class App(Reader):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                await receive()
                await send({"type": "websocket.accept"})
                self.handler = Handler(scope["nemostream.connection"], lambda message: "done")
                scope["nemostream.connection"].attach(self.handler)
                self.messages.append(await receive())

        app = App()
        protocol, transport = await upgraded(Site(clock, app))
        if before[0] & 0x0F == Opcode.PING:
            messages = [b"%d" % number for number in range(1000)]
        else:
            messages = [b"0", *(b"%d" % number for number in range(1, 1000))]
        frames = [frame(Opcode.BINARY, message) for message in messages]
        if before[0] & 0x0F != Opcode.PING:
            frames[0] = frame(Opcode.CONT, b"0")
        data = before + b"".join(frames)
        protocol.data_received(data)
        assert len(app.handler.accepted) <= 1 and not transport.reading
        count = len(app.handler.accepted)
        while count < 1000:
            await turns(1)
            assert count <= len(app.handler.accepted) <= count + 1
            count = len(app.handler.accepted)
        assert app.handler.accepted == messages
        await turns()
        assert transport.reading

    run(fakes, clock, main)


@pytest.mark.parametrize("end", [frame(Opcode.CLOSE, b"\x03\xe8"), frame(Opcode.PING) * 100], ids=["close", "pings"])
def test_messages_come_before_the_end_of_the_connection(fakes: Any, clock: Any, end: bytes) -> None:
    """Also if all are in one slice of the general parser, and for a handler that is busy."""

    async def main() -> None:
        class App(Reader):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                await receive()
                await send({"type": "websocket.accept"})
                self.handler = Handler(scope["nemostream.connection"], lambda message: "keep")
                scope["nemostream.connection"].attach(self.handler)
                while not self.messages or self.messages[-1]["type"] == "websocket.receive":
                    self.messages.append(await receive())

        app = App()
        protocol, _ = await upgraded(Site(clock, app))
        protocol.data_received(frame(Opcode.BINARY, b"a"))
        assert app.handler.accepted == [b"a"]
        protocol.feed(frame(Opcode.PING) + frame(Opcode.BINARY, b"b") + frame(Opcode.TEXT, b"c") + end)
        await turns()
        assert not app.messages
        app.handler.complete()
        await turns()
        assert app.messages[:2] == [
            {"type": "websocket.receive", "bytes": b"b"},
            {"type": "websocket.receive", "text": "c"},
        ]
        assert [one["type"] for one in app.messages[2:]] == ["websocket.disconnect"]

    run(fakes, clock, main)


def test_a_handler_sends_texts(fakes: Any, clock: Any) -> None:
    """The client's parser gets them; nothing is sent once the connection is closing."""
    from websockets.protocol import CLIENT, OPEN, Protocol

    texts = ["", "ü" * 62, "a" * 125, "b" * 126, "c" * 65_535, "d" * 65_536]

    async def main() -> None:
        app = Reader()
        protocol, transport = await upgraded(Site(clock, app))
        transport.written = b""
        connection = app.scope["nemostream.connection"]
        connection.write_text(texts)
        client = Protocol(CLIENT, state=OPEN)
        client.receive_data(transport.written)
        assert [one.data.decode() for one in client.events_received()] == texts  # type: ignore[union-attr]
        protocol.pause_writing()
        assert not connection.is_writable
        protocol.resume_writing()
        assert connection.is_writable
        transport.written = b""
        connection.write_text([])
        transport.close()
        connection.write_text(["e"])
        assert transport.written == b""

    run(fakes, clock, main)


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([frame(Opcode.TEXT, b"\xff\xff")], b"\x03\xef"),  # 1007: not UTF-8
        ([bytes((0xC2, 0x85)) + bytes(9)], b"\x03\xea"),  # 1002: a compressed message, which was not negotiated
        ([bytes((0x83, 0x85)) + bytes(9)], b"\x03\xea"),  # an unknown opcode
        ([bytes((0x82, 0x05)) + bytes(5)], b"\x03\xea"),  # not masked
        ([frame(Opcode.CONT, b"abcdef")], b"\x03\xea"),  # no message to continue
        ([frame(Opcode.BINARY, b"a", False), frame(Opcode.BINARY, b"abcdef")], b"\x03\xea"),  # within a message
    ],
)
@pytest.mark.parametrize("first", [[], [frame(Opcode.BINARY, b"abcdef")]])
@pytest.mark.parametrize("together", [False, True])
def test_malformed_frames_close_the_connection(
    fakes: Any, clock: Any, frames: list[bytes], code: bytes, first: list[bytes], together: bool
) -> None:
    """As the general parser requires, also for frames that are complete."""

    async def main() -> None:
        reader = Reader()
        protocol, transport = await upgraded(Site(clock, reader))
        for _ in range(3):
            reader.permits.release()
        await turns()
        for data in [b"".join(first + frames)] if together else first + frames:
            protocol.data_received(data)
            await turns()
        assert transport.closing and code in transport.written
        kinds = [one["type"] for one in reader.messages]
        assert kinds[-1] == "websocket.disconnect" and len(kinds) == 1 + len(first)

    run(fakes, clock, main)


def test_frame_splitter_keeps_messages() -> None:
    """The parser of websockets gets the same messages, for any partition of the data."""
    from websockets.protocol import SERVER, Protocol

    chance = random.Random(5)
    frames = [
        Frame(Opcode.BINARY if begin else Opcode.CONT, chance.randbytes(size), fin=fin)
        for begin, size, fin in ((1, 0, True), (1, 5000, False), (0, 70_000, True), (1, 125, True), (1, 126, True))
    ]
    frames += [Frame(Opcode.BINARY, chance.randbytes(size)) for size in (1000, 1001, 1004, 65_535, 65_536)]
    wire = b"".join(frame.serialize(mask=True) for frame in frames)
    first, begin, rest, *others = (frame.data for frame in frames)
    expected = [first, begin + rest, *others]
    for step in (1, 7, 1000, len(wire)):
        splitter, parser = FrameSplitter(1001), Protocol(SERVER)
        for start in range(0, len(wire), step):
            parser.receive_data(splitter(wire[start : start + step]))
        received: list[bytes] = []
        for frame in parser.events_received():
            assert len(frame.data) <= 1000  # type: ignore[union-attr]
            if frame.opcode == Opcode.CONT:  # type: ignore[union-attr]
                received[-1] += frame.data  # type: ignore[union-attr]
            else:
                received.append(bytes(frame.data))  # type: ignore[union-attr]
        assert parser.parser_exc is None and received == expected


def test_frame_splitter_keeps_small_and_control_frames() -> None:
    """Frames that are not masked are not a client's, and are rejected by the parser."""
    for frame in (
        Frame(Opcode.BINARY, b"a" * 1000),
        Frame(Opcode.PING, b"b" * 125),
        Frame(Opcode.TEXT, b"", fin=False),
    ):
        data = frame.serialize(mask=True)
        assert FrameSplitter(1001)(data) == data and FrameSplitter(8)(data[:0]) == b""
    for mask, opcode in ((False, Opcode.BINARY), (True, Opcode.PING)):
        data = Frame(opcode, b"a" * 100).serialize(mask=mask)
        assert FrameSplitter(8)(data) == data


def test_large_messages_need_a_slot_and_ascii(fakes: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only on the paths that accept them. A slot is held until the application is done with the message."""
    monkeypatch.setattr(connections, "_MAX_LARGE_MESSAGES", 1)
    large = {"/v1/realtime": 300 * KIB}

    async def main() -> None:
        first, second, third = Reader(), Reader(), Reader()
        site = Site(clock, None, message_bytes=large)
        sockets = []
        for reader in (first, second, third):
            site.config.loaded_app = reader
            sockets.append(await upgraded(site, b"/v1/realtime?intent=transcription"))
        message = frame(Opcode.TEXT, b"a" * (300 * KIB))
        for (protocol, _), reader in zip(sockets[:2], (first, second), strict=True):
            protocol.data_received(message)
            reader.permits.release()
            await turns(100)
        assert len(first.messages) == 1 and len(first.messages[0]["text"]) == 300 * KIB
        assert not second.messages and not sockets[1][1].reading
        sockets[2][0].data_received(frame(Opcode.TEXT, b"a" * (90 * KIB)))  # a usual message needs none
        third.permits.release()
        await turns(100)
        assert len(third.messages) == 1
        first.permits.release()  # the application requests the next message
        await turns(200)
        assert len(second.messages) == 1 and len(second.messages[0]["text"]) == 300 * KIB
        sockets[0][0].data_received(message)
        await turns(100)
        assert len(first.messages) == 1
        sockets[1][0].connection_lost(None)
        await turns(200)
        assert len(first.messages) == 2
        first.permits.release()
        await turns()
        sockets[0][0].data_received(frame(Opcode.TEXT, "ü".encode() * (150 * KIB)))
        await turns(100)
        assert b"a large message must be ASCII" in sockets[0][1].written and sockets[0][1].closing
        sockets[0][0].connection_lost(None)
        sockets[2][0].data_received(frame(Opcode.TEXT, b"a" * (300 * KIB + 1)))
        await turns(100)
        assert sockets[2][1].closing

    run(fakes, clock, main)


@pytest.mark.parametrize(("path", "size", "closed"), [("/v1/stream", 100, False), ("/v1/stream", 101, True)])
def test_usual_messages_have_the_usual_limit(fakes: Any, clock: Any, path: str, size: int, closed: bool) -> None:
    async def main() -> None:
        reader = Reader()
        protocol, transport = await upgraded(
            Site(clock, reader, message_bytes={"/v1/realtime": 300 * KIB}), path.encode()
        )
        protocol.data_received(frame(Opcode.TEXT, "é".encode() * (size * KIB // 2)))
        await turns(100)
        assert transport.closing is closed

    run(fakes, clock, main)


def test_messages_of_a_lost_connection_are_discarded(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        for error, timed_out in ((None, False), (TimeoutError(), True), (ConnectionResetError(), False)):
            reader = Reader()
            site = Site(clock, reader)
            protocol, _ = await upgraded(site)
            protocol.data_received(frame(Opcode.TEXT, b"a"))
            protocol.connection_lost(error)
            reader.permits.release()
            await turns()
            assert [one["type"] for one in reader.messages] == ["websocket.disconnect"] and len(site.limits) == 0
            assert reader.scope.get("nemostream.timed_out", False) is timed_out

    run(fakes, clock, main)


def test_sockets_whose_peer_is_gone_are_aborted(fakes: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[Any] = []
    monkeypatch.setattr(connections, "_peer_closed", lambda transport: transport in gone)

    async def main() -> None:
        site = Site(clock, Reader())
        (_, first), (_, second) = await upgraded(site), await upgraded(site)
        gone.append(second)
        site.limits.reap()
        assert not second.aborted  # the event loop reports it, after the data before it
        for transport in (first, second):
            transport.pause_reading()
        site.limits.reap()
        assert (first.aborted, second.aborted) == (False, True)
        for _ in range(100):  # a WebSocket has no deadline of a request
            await asyncio.sleep(10)
            site.limits.reap()
        assert not first.aborted

    run(fakes, clock, main)


def test_a_closed_peer_is_detected() -> None:
    import socket

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        client = socket.create_connection(listening.getsockname())
        server, _ = listening.accept()
        transport = SimpleNamespace(get_extra_info=lambda name: server)
        assert not connections._peer_closed(transport)
        client.sendall(b"data that is left to read")
        assert not connections._peer_closed(transport)
        client.close()
        server.settimeout(5)
        while server.recv(8):  # until the end of the data has arrived
            pass
        assert connections._peer_closed(transport)
        server.close()
        assert not connections._peer_closed(transport)
    assert not connections._peer_closed(SimpleNamespace(get_extra_info=lambda name: None))


@pytest.mark.parametrize(
    ("limits", "used", "wanted", "available", "raised"),
    [
        ((10_000, 10_000), 100, 1024, 1024, None),
        ((256, 256), 100, 1024, 88, None),  # two thirds of 256 - 100 - 24
        ((100, 100), 90, 1024, 8, None),  # at least eight
        ((256, 100_000), 100, 1024, 1024, (2144, 100_000)),  # 1024 connections, 96 files and 1024 for gRPC
        ((256, 500), 100, 1024, 250, (500, 500)),
        ((256, -1), 100, 1024, 1024, (2144, -1)),  # unlimited
        ((-1, -1), 100, 1024, 1024, None),
    ],
)
def test_connections_by_file_descriptors(
    monkeypatch: pytest.MonkeyPatch, limits: Any, used: int, wanted: int, available: int, raised: Any
) -> None:
    changes: list[Any] = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(connections.resource, "setrlimit", lambda kind, values: changes.append(values))
    monkeypatch.setattr(connections, "_used_files", lambda: used)
    assert connections.available_connections(wanted) == available
    assert changes == ([] if raised is None else [raised])


def test_connections_are_checked_once_per_second(fakes: Any, clock: Any) -> None:
    async def main() -> None:
        site = Site(clock)
        reaped: list[int] = []
        site.limits.reap = lambda: reaped.append(counter)  # type: ignore[method-assign]
        server = connections.Server(site.config, site.limits)
        for counter in range(25):  # uvicorn's ticks, ten per second
            assert not await server.on_tick(counter)
        assert reaped == [0, 10, 20]
        server.should_exit = True
        assert await server.on_tick(21)

    run(fakes, clock, main)
