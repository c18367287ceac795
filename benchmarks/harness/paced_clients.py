"""Load generator of `bench host`, in a process of its own: clients that send one message per chunk in real time.

    python -m nemostream.benchmarks.harness.paced_clients --protocol websocket --port 8000 --streams 100

WebSocket clients are plain sockets with messages that are made in advance, so that one process can run thousands of
them. Riva's clients are gRPC clients, which need more CPU time.

Protocol with the parent process: all clients connect, "connected" is written; a line is read; the clients start at
random times within `--ramp` seconds, then "begin" is written, after `--seconds` "end", and the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

PROTOCOLS = ("websocket", "riva", "realtime")
_RATES = {"websocket": 16000, "riva": 16000, "realtime": 24000}  # Hz
_PATHS = {"websocket": "/v1/stream", "realtime": "/v1/realtime"}
_RECORDINGS = 8  # distinct messages, so that not all clients send the same memory
_CLOSE = 8  # opcode of a frame
_AUDIO_POSITION = re.compile(rb'.*"audio": ([0-9.]+)', re.DOTALL)  # the last one of an event
_TIMEOUT = 30.0  # seconds for a connection
_GRACE = 0.5  # seconds after the last client has started, before the measured time


@dataclass(frozen=True)
class Load:
    """What the clients of a process send, and when."""

    port: int
    streams: int
    packet: float  # seconds of audio in a message
    seconds: float  # measured time
    ramp: float  # seconds in which the clients start


@dataclass
class ClientFigures:
    """What the clients measure from the "begin" of the measured time to its end, in seconds."""

    latencies: list[float] = field(default_factory=list)  # from the time that a message is due to an event of its audio
    lateness: list[float] = field(default_factory=list)  # of each message: from the time it is due to sending it
    errors: list[str] = field(default_factory=list)  # of the whole time
    messages: int = 0
    events: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process

    def summary(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        values = asdict(self)
        for name in ("latencies", "lateness"):
            values[name] = [round(sample, 6) for sample in values[name]]
        return values


def take_frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return opcode and payload of the complete frames of a server (which are not masked), and the remaining bytes."""
    frames, at = [], 0
    while len(data) - at >= 2:
        size, begin = data[at + 1] & 0x7F, at + 2
        extended = {126: 2, 127: 8}.get(size, 0)
        if len(data) < begin + extended:
            break
        if extended:
            size, begin = int.from_bytes(data[begin : begin + extended], "big"), begin + extended
        if len(data) < begin + size:
            break
        frames.append((data[at] & 0x0F, data[begin : begin + size]))
        at = begin + size
    return frames, data[at:]


def recordings(rate: int, seconds: float) -> list[bytes]:
    """Return 16-bit noise, one message each."""
    rng = np.random.default_rng(0)
    return [(1600 * rng.standard_normal(round(rate * seconds))).astype("<i2").tobytes() for _ in range(_RECORDINGS)]


def messages(protocol: str, packet: float) -> list[bytes]:
    """Return the bytes that a client of a protocol sends for each packet of `packet` seconds."""
    audio = recordings(_RATES[protocol], packet)
    if protocol == "riva":
        return audio
    from websockets.frames import Frame, Opcode

    if protocol == "websocket":
        return [Frame(Opcode.BINARY, each).serialize(mask=True) for each in audio]
    from nemostream.benchmarks.harness.targets import append_message

    return [Frame(Opcode.TEXT, append_message(each).encode()).serialize(mask=True) for each in audio]


def audio_position(payload: bytes) -> float | None:
    """Return the seconds of audio received as an event of `/v1/stream` states them; None for other messages."""
    found = _AUDIO_POSITION.match(payload)
    return float(found[1]) if found else None


class _Client:
    """An open WebSocket connection."""

    def __init__(self, protocol: str, port: int, message: bytes) -> None:
        self.message, self.start, self.sent, self.open = message, 0.0, 0, True
        self.socket = socket.create_connection(("127.0.0.1", port), _TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(
            f"GET {_PATHS[protocol]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            "\r\n".encode()
        )
        self.rest = b""
        while b"\r\n\r\n" not in self.rest:
            if not (data := self.socket.recv(1 << 16)):
                break
            self.rest += data
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        status = head.split(b"\r\n")[0].decode(errors="replace")
        if " 101 " not in f"{status} ":
            raise ConnectionError(f"the server rejected a connection: {status or 'no answer'}")
        self.socket.setblocking(False)


def run_sockets(protocol: str, load: Load, synchronize: Callable[[str], None]) -> ClientFigures:
    """Run WebSocket clients; `synchronize` is called with "connected", "begin" and "end"."""
    payloads, clients = messages(protocol, load.packet), list[_Client]()
    try:
        try:
            for index in range(load.streams):
                clients.append(_Client(protocol, load.port, payloads[index % len(payloads)]))
        except OSError as error:
            return _not_connected(f"{type(error).__name__}: {error}", synchronize)
        synchronize("connected")
        return _run_sockets(protocol, load, clients, synchronize)
    finally:
        for client in clients:
            client.socket.close()


def _not_connected(reason: str, synchronize: Callable[[str], None]) -> ClientFigures:
    """Return the figures if a client cannot connect: only the reason, because fewer clients would be less load."""
    for event in ("connected", "begin", "end"):
        synchronize(event)
    return ClientFigures(errors=[reason])


def _run_sockets(
    protocol: str, load: Load, clients: list[_Client], synchronize: Callable[[str], None]
) -> ClientFigures:
    figures, packet = ClientFigures(), load.packet
    poll, by_file = select.epoll(), {client.socket.fileno(): client for client in clients}
    for file in by_file:
        poll.register(file, select.EPOLLIN)
    rng, start = np.random.default_rng(len(clients)), time.perf_counter()
    begin = start + load.ramp + packet + _GRACE  # of the measured time
    end, measuring, cpu = begin + load.seconds, False, 0.0
    for client in clients:
        client.start = start + rng.uniform(0, load.ramp)
    due = [(client.start + packet, index) for index, client in enumerate(clients)]  # a message's last sample exists
    heapq.heapify(due)

    def drop(client: _Client, reason: str) -> None:
        figures.errors.append(reason)
        by_file.pop(client.socket.fileno(), None)
        client.open = False
        client.socket.close()  # which removes it from `poll`

    while (now := time.perf_counter()) < end or not measuring:
        if not measuring and now >= begin:
            measuring, begin, cpu = True, now, time.process_time()
            end = begin + load.seconds
            synchronize("begin")
        for file, _ in poll.poll(max(0.0, min(due[0][0], end if measuring else begin) - time.perf_counter())):
            client = by_file[file]
            try:
                data = client.socket.recv(1 << 18)
            except OSError as error:
                drop(client, f"{type(error).__name__}: {error}")
                continue
            received = time.perf_counter()
            frames, client.rest = take_frames(client.rest + data if client.rest else data)
            for opcode, payload in frames:
                if opcode == _CLOSE or not measuring:
                    continue
                if (position := audio_position(payload) if protocol == "websocket" else client.sent * packet) is None:
                    continue
                figures.events += 1
                figures.latencies.append(received - client.start - position)
            if not data:
                closes = [payload[2:].decode(errors="replace") for opcode, payload in frames if opcode == _CLOSE]
                drop(client, " ".join(["the server closed a connection", *closes]))
        while (now := time.perf_counter()) >= due[0][0]:
            due_time, index = due[0]
            heapq.heapreplace(due, (due_time + packet, index))
            client = clients[index]
            if not client.open:
                continue
            try:
                complete = client.socket.send(client.message) == len(client.message)
            except BlockingIOError:
                complete = False
            except OSError as error:
                drop(client, f"{type(error).__name__}: {error}")
                continue
            if not complete:
                drop(client, "the server did not read a client's messages")
                continue
            client.sent += 1
            if measuring:
                figures.messages += 1
                figures.lateness.append(now - due_time)
    figures.seconds, figures.cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    synchronize("end")
    poll.close()
    return figures


async def run_riva(load: Load, synchronize: Callable[[str], None]) -> ClientFigures:
    """Run Riva's clients, a gRPC connection for every 50 of them."""
    import grpc
    from riva.client.proto import riva_asr_pb2, riva_asr_pb2_grpc, riva_audio_pb2

    figures, rng, packet = ClientFigures(), np.random.default_rng(load.streams), load.packet
    requests = [riva_asr_pb2.StreamingRecognizeRequest(audio_content=each) for each in messages("riva", packet)]
    config = riva_asr_pb2.RecognitionConfig(
        encoding=riva_audio_pb2.AudioEncoding.LINEAR_PCM, sample_rate_hertz=_RATES["riva"], audio_channel_count=1
    )
    first = riva_asr_pb2.StreamingRecognizeRequest(
        streaming_config=riva_asr_pb2.StreamingRecognitionConfig(config=config, interim_results=True)
    )
    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{load.port}", options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(-(-load.streams // 50))
    ]
    window = {"begin": float("inf"), "end": float("inf"), "cpu": 0.0}

    async def read(call: Any, start: float) -> None:
        async for response in call:
            now = time.perf_counter()
            if window["begin"] <= now < window["end"] and response.results:
                figures.events += 1
                # A float of 32 bits: the number of the message is exact.
                position = round(response.results[0].audio_processed / packet) * packet
                figures.latencies.append(now - start - position)

    async def client(index: int, call: Any, start: float) -> None:
        request, sent = requests[index % len(requests)], 0
        reading = asyncio.create_task(read(call, start))
        try:
            while (due := start + (sent + 1) * packet) < window["end"]:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                now = time.perf_counter()
                await call.write(request)
                sent += 1
                if window["begin"] <= now < window["end"]:
                    figures.messages += 1
                    figures.lateness.append(now - due)
        finally:
            call.cancel()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def reason(error: BaseException) -> str:
        if isinstance(error, grpc.aio.AioRpcError):  # its text has several lines
            return f"{error.code().name}: {error.details()}"[:300]
        return f"{type(error).__name__}: {error}"[:300]

    calls = []
    try:
        for index in range(load.streams):
            stub = riva_asr_pb2_grpc.RivaSpeechRecognitionStub(channels[index // 50])
            calls.append(stub.StreamingRecognize(timeout=None))
            await asyncio.wait_for(calls[-1].write(first), _TIMEOUT)
    except (OSError, grpc.aio.AioRpcError) as error:
        for channel in channels:
            await channel.close()
        return _not_connected(reason(error), synchronize)
    await asyncio.to_thread(synchronize, "connected")
    starts = time.perf_counter() + rng.uniform(0, load.ramp, load.streams)
    tasks = [
        asyncio.create_task(client(index, call, begin))
        for index, (call, begin) in enumerate(zip(calls, starts.tolist(), strict=True))
    ]
    await asyncio.sleep(load.ramp + packet + _GRACE)
    window["cpu"], window["begin"] = time.process_time(), time.perf_counter()
    window["end"] = window["begin"] + load.seconds
    synchronize("begin")
    await asyncio.sleep(load.seconds)
    figures.seconds, figures.cpu_seconds = time.perf_counter() - window["begin"], time.process_time() - window["cpu"]
    synchronize("end")
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            figures.errors.append(reason(result))
    for channel in channels:
        await channel.close()
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0])
    parser.add_argument("--port", type=int, required=True, help="of HTTP, or of gRPC for riva")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--packet-ms", type=int, default=80, help="audio in a message")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time")
    parser.add_argument("--ramp", type=float, default=2.0, help="seconds in which the clients start")
    options = parser.parse_args(arguments)

    def synchronize(event: str) -> None:
        print(event, flush=True)
        if event == "connected":
            sys.stdin.readline()

    load = Load(options.port, options.streams, options.packet_ms / 1000, options.seconds, options.ramp)
    if options.protocol == "riva":
        figures = asyncio.run(run_riva(load, synchronize))
    else:
        figures = run_sockets(options.protocol, load, synchronize)
    print(json.dumps(figures.summary()), flush=True)


if __name__ == "__main__":
    main()
