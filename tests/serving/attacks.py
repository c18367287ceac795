"""Attacks on a server on this machine, as threads of one process: `python attacks.py HTTP_PORT GRPC_PORT SECONDS`.

Every attack is repeated for the given time; the number of runs of each is printed as JSON. Only 127.0.0.1 is attacked.
"""

from __future__ import annotations

import io
import json
import os
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import grpc
import numpy as np
import soundfile
from riva.client.proto import riva_asr_pb2 as messages
from riva.client.proto import riva_asr_pb2_grpc as calls

import nemostream

EDGE = "AaB03x"
HTTP, GRPC, SECONDS = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
DEADLINE = time.monotonic() + SECONDS
CLIP = nemostream.demo_clip().read_bytes()


def time_is_up() -> bool:
    return time.monotonic() > DEADLINE


def client(port: int = HTTP) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.settimeout(2)
    return sock


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def frame(kind: int, data: bytes, final: bool = True) -> bytes:
    size = len(data)
    head = bytes([(0x80 if final else 0) | kind])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + struct.pack(">H", size)
    else:
        head += bytes([0x80 | 127]) + struct.pack(">Q", size)
    return head + bytes(4) + data


def upgrade(path: str, extra: str = "") -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{extra}"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode("latin-1")


def upload(data: bytes, **fields: str) -> bytes:
    parts = [
        f'--{EDGE}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()
    ]
    head = "".join(parts) + f'--{EDGE}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    body = head.encode() + data + f"\r\n--{EDGE}--\r\n".encode()
    return (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: multipart/form-data; boundary={EDGE}\r\n\r\n"
    ).encode() + body


def slow_flac() -> bytes:
    noise = np.random.default_rng(0).integers(-(2**23), 2**23, (655350, 8)).astype(np.int32) << 8
    file = io.BytesIO()
    soundfile.write(file, noise, 655350, format="FLAC", subtype="PCM_24")
    return file.getvalue()


def long_flac() -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 4000, 1, format="FLAC") as out:
        for _ in range(720):
            out.write(np.zeros(40000, np.int16))
    return file.getvalue()


SLOW, LONG = slow_flac(), long_flac()


def hang_up_during_upload(chance: random.Random) -> None:
    with client() as sock:
        sock.sendall(upload(chance.choice((CLIP, SLOW)), stream=chance.choice(("true", "false"))))
        sock.settimeout(0.2 * chance.random() + 0.01)
        with suppress(TimeoutError):
            sock.recv(100)
        if chance.random() < 0.5:
            reset(sock)


def upload_damaged(chance: random.Random) -> None:
    data = bytearray(chance.choice((CLIP, SLOW[:200_000])))
    for _ in range(chance.choice((1, 10, 1000))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    with client() as sock:
        sock.settimeout(10)
        sock.sendall(upload(bytes(data[: chance.choice((10, 1000, len(data)))])))
        sock.recv(1000)


def upload_hours(chance: random.Random) -> None:
    with client() as sock:
        sock.sendall(upload(LONG))
        time.sleep(1)


def upload_many_parts(chance: random.Random) -> None:
    part = (
        f'--{EDGE}\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n'.encode()
        + bytes(1 << 16)
        + b"\r\n"
    )
    with client() as sock:
        sock.sendall(
            f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {200 << 20}\r\n"
            f"Content-Type: multipart/form-data; boundary={EDGE}\r\n\r\n".encode()
        )
        for _ in range(50):
            sock.sendall(part)


def half_open(chance: random.Random) -> None:
    with ExitStack() as held:
        for _ in range(100):
            sock = held.enter_context(client(chance.choice((HTTP, GRPC))))
            sock.sendall(
                chance.choice((b"", b"GET / HTTP/1.1\r\nHo", upload(CLIP)[:300], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
            )
        time.sleep(3)


def head_flood(chance: random.Random) -> None:
    with client() as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(100):
            sock.sendall(b"x: y\r\n" * 1000)


def bad_upgrade(chance: random.Random) -> None:
    extra = chance.choice(
        ("Sec-WebSocket-Protocol: \xe9\r\n", "Content-Length: 3\r\n", "X: \xff\r\n", "Origin: http://evil\r\n")
    )
    with client() as sock:
        sock.sendall(upgrade("/v1/stream", extra))
        sock.recv(1000)


def garbage(chance: random.Random) -> None:
    with client(chance.choice((HTTP, GRPC))) as sock:
        sock.sendall(chance.randbytes(chance.choice((1, 100, 100_000))))
        with suppress(TimeoutError):
            sock.settimeout(0.1)
            sock.recv(1000)


def session_update(number: int) -> bytes:
    detection = {"type": "server_vad", "silence_duration_ms": 500 + number % 2}
    return json.dumps(
        {"type": "session.update", "session": {"audio": {"input": {"turn_detection": detection}}}}
    ).encode()


FLOODS = (
    ("/v1/stream", frame(1, b'{"type":"keepalive"}') * 500),
    ("/v1/stream", frame(1, b'{"type":"configure","chunk_ms":80}') * 500),
    ("/v1/stream", (frame(2, b"ab") + frame(1, b'{"type":"commit"}')) * 100),
    ("/v1/stream", frame(1, b'{"type":"keepalive","x":[' + b"{}," * 300_000 + b"{}]}")),
    ("/v1/stream", frame(9, b"p" * 125) * 300),
    ("/v1/stream", frame(10, b"") * 2000),
    ("/v1/stream", frame(2, b"", False) + frame(0, b"", False) * 10_000),
    ("/v1/stream?encoding=mulaw&sample_rate=4000", frame(2, bytes(range(256)) * 256)),
    ("/v1/stream?encoding=mulaw&sample_rate=768000&channels=64", frame(2, bytes(range(256)) * 4096)),
    ("/v1/stream?words=1&endpoint_ms=-1", frame(2, bytes(range(256)) * 256)),
    ("/v1/stream?encoding=pcm_f32le", frame(2, b"\xff" * 65536)),
    ("/v1/realtime", b"".join(frame(1, session_update(number)) for number in range(50))),
    ("/v1/realtime", frame(1, b'{"type":"x","audio":"' + b"A" * 900_000 + b'"}')),
)


def websocket_flood(chance: random.Random) -> None:
    path, flood = chance.choice(FLOODS)
    with client() as sock:
        sock.sendall(upgrade(path))
        end = time.monotonic() + 2
        reading = chance.random() < 0.5
        while time.monotonic() < end:
            sock.settimeout(0.05)
            with suppress(TimeoutError):
                sock.sendall(flood)
            if reading:
                with suppress(TimeoutError):
                    if not sock.recv(1 << 16):
                        break
        if chance.random() < 0.5:
            reset(sock)


def phrases(chance: random.Random) -> None:
    words = [" ".join(chance.choice("abcdefghijklmnop") for _ in range(30)) for _ in range(1000)]
    config = messages.RecognitionConfig(speech_contexts=[messages.SpeechContext(phrases=words)])
    recognize(messages.RecognizeRequest(config=config, audio=bytes(3200)))


def recognize(request: messages.RecognizeRequest, cancel: float | None = None) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{GRPC}", options=[("grpc.max_send_message_length", -1)]) as channel:
        call = calls.RivaSpeechRecognitionStub(channel).Recognize.future(request)
        if cancel is not None:
            time.sleep(cancel)
            call.cancel()
        call.exception(10)


def grpc_cancelled(chance: random.Random) -> None:
    with suppress(grpc.FutureCancelledError):
        recognize(messages.RecognizeRequest(audio=chance.choice((CLIP, SLOW[: 8 << 20]))), 0.3 * chance.random())


def grpc_large(chance: random.Random) -> None:
    recognize(messages.RecognizeRequest(audio=bytes(chance.choice((15, 40)) << 20)))


def grpc_silent(chance: random.Random) -> None:
    event = threading.Event()

    def silent() -> Iterator[messages.StreamingRecognizeRequest]:
        event.wait(2)  # is never set
        yield from ()

    with grpc.insecure_channel(f"127.0.0.1:{GRPC}") as channel:
        stub = calls.RivaSpeechRecognitionStub(channel)
        held = [stub.StreamingRecognize(silent()) for _ in range(20)]
        time.sleep(2)
        for call in held:
            call.cancel()


ATTACKS: tuple[tuple[Callable[[random.Random], None], float], ...] = (  # with the seconds between two runs
    (hang_up_during_upload, 0.1),
    (upload_damaged, 0.1),
    (upload_hours, 1),
    (upload_many_parts, 1),
    (half_open, 0.5),
    (head_flood, 0.1),
    (bad_upgrade, 0.02),
    (garbage, 0.05),
    (websocket_flood, 0.1),
    (websocket_flood, 0.1),
    (websocket_flood, 0.1),
    (phrases, 2),
    (grpc_cancelled, 0.2),
    (grpc_large, 2),
    (grpc_silent, 0.5),
)


def main() -> None:
    os.nice(10)  # real attackers would use the CPUs of other machines
    runs: Counter[str] = Counter()

    def repeat(attack: Callable[[random.Random], None], pause: float, seed: int) -> None:
        chance = random.Random(seed)
        while not time_is_up():
            with suppress(OSError, grpc.RpcError, grpc.FutureTimeoutError):
                attack(chance)
            runs[attack.__name__] += 1
            time.sleep(pause)

    threads = [
        threading.Thread(target=repeat, args=(attack, pause, seed)) for seed, (attack, pause) in enumerate(ATTACKS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
