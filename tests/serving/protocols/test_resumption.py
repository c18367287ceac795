"""Resumable streams: connections are lost at random moments, and no event is lost, repeated or changed.

The oracle is a stream without interruption on the same server. `ResumingClient` is written from docs/websocket.md.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from nemostream.serving.errors import StateConflict
from nemostream.serving.protocols.resumption import EventLog

RESULTS = ("final", "end", "committed", "done")


class ResumingClient:
    """A client that keeps what is not stored. `actions` are audio (bytes) and controls (dict), in order."""

    def __init__(self, actions: list[Any], seed: int | None = None, **options: Any) -> None:
        self.options, self.random = options, random.Random(seed)
        self.items: list[Any] = []  # messages: bytes or dict
        for action in actions:
            if isinstance(action, dict):
                self.items.append(action)
                continue
            while action:
                size = self.random.choice([1, 317, 2560, 5000]) if seed is not None else 2560
                self.items.append(action[:size])
                action = action[size:]
        self.token: str | None = None
        self.stored = (0, 0)
        self.events: list[dict[str, Any]] = []
        self.ready: list[dict[str, Any]] = []
        self.other: list[dict[str, Any]] = []  # moved, rejected, error
        self.resumed = 0

    @property
    def received(self) -> int:
        return self.events[-1]["sequence"] if self.events else 0

    def query(self) -> str:
        if self.token is None:
            return urlencode({"resumable": 1, **self.options})
        results = sum(event["type"] in RESULTS for event in self.events)
        return urlencode({"resume": self.token, "received": self.received, "results": results})

    async def stream(self, server: str, cut_after: int | None = None, pause: float = 0.0, **headers: str) -> bool:
        """Send until `done`, or cut the connection after so many messages. Return whether the stream is done."""
        async with connect(f"{server}/v1/stream?{self.query()}", additional_headers=headers) as socket:
            ready = json.loads(await socket.recv())
            self.ready.append(ready)
            assert ready["type"] == "ready"
            resumption = ready["resumption"]
            assert resumption["version"] == 1 and self.token in (None, resumption["token"])
            self.resumed += self.token is not None
            self.token = resumption["token"]
            self.stored = resumption["bytes"], resumption["controls"]
            receiver = asyncio.create_task(self._receive(socket))
            with suppress(ConnectionClosed):
                for count, item in enumerate(self._rest()):
                    if count == cut_after:
                        break
                    await socket.send(json.dumps(item) if isinstance(item, dict) else item)
                    await asyncio.sleep(pause if not isinstance(item, dict) else 0)
                else:
                    cut_after = None
            if cut_after is not None:
                await asyncio.sleep(pause * self.random.random() * 4)
                socket.transport.abort()
            await receiver
        return bool(self.events) and self.events[-1]["type"] == "done"

    def _rest(self) -> list[Any]:
        """Return the messages after the stored position; the first may be a part of one."""
        skip_bytes, skip_controls = self.stored
        rest = []
        for item in self.items:
            if isinstance(item, dict):
                if skip_controls:
                    skip_controls -= 1
                else:
                    rest.append(item)
            elif skip_bytes >= len(item):
                skip_bytes -= len(item)
            else:
                rest.append(item[skip_bytes:])
                skip_bytes = 0
        assert (skip_bytes, skip_controls) == (0, 0)
        return rest

    async def _receive(self, socket: ClientConnection) -> None:
        with suppress(ConnectionClosed):
            async for text in socket:
                message = json.loads(text)
                if message["type"] == "stored":
                    with suppress(ConnectionClosed):  # messages that have arrived are read nevertheless
                        await socket.send(json.dumps({"type": "received", "sequence": self.received}))
                elif message["type"] in ("rejected", "moved", "error"):
                    self.other.append(message)
                else:
                    assert message["sequence"] > self.received, (message, self.events[-1])
                    self.events.append(message)

    def checked(self) -> list[dict[str, Any]]:
        """Return the events without what depends on the time of the connection."""
        return [{name: value for name, value in event.items() if name != "audio"} for event in self.events]


def finals(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ignored = ("sequence", "words_from")
    return [
        {name: value for name, value in event.items() if name not in ignored}
        for event in events
        if event["type"] in RESULTS
    ]


def pcm(samples: np.ndarray) -> bytes:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


@given(
    partials=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    again=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    saved=st.integers(0, 40),
    received=st.integers(0, 40),
    same=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_events_after_a_resume(partials: list[int], again: list[int], saved: int, received: int, same: bool) -> None:
    """Whether or not the number of partials before each result is the same again: no result is lost or repeated."""

    def events(counts: list[int]) -> list[tuple[str, bool]]:
        rows = []
        for number, count in enumerate(counts):
            rows += [(json.dumps({"partial": f"{number}.{index}"}), False) for index in range(count)]
            rows.append((json.dumps({"result": number}), True))
        return rows

    first = events(partials)
    saved, received = min(saved, len(first)), min(received, len(first))
    log = EventLog()
    messages = [json.loads(log.add(*event) or "") for event in first[:saved]]
    state = json.loads(json.dumps(log.save()))
    messages += [json.loads(log.add(*event) or "") for event in first[saved:]]
    assert [message["sequence"] for message in messages] == list(range(1, len(first) + 1))
    has = messages[:received]
    results = sum("result" in message for message in has)
    resumed = EventLog(**state)
    has += [json.loads(text) for text in resumed.resume(received, results)]
    begun = sum(is_result for _, is_result in first[:saved])  # results before the state
    rest = first[saved:] if same else [*events([0] * begun + again[: len(partials) - begun])[begun:]]
    has += [json.loads(text) for event in rest if (text := resumed.add(*event)) is not None]
    assert [message["sequence"] for message in has] == list(range(1, len(has) + 1))
    assert [message["result"] for message in has if "result" in message] == list(range(len(partials)))
    if same:
        assert has == messages


def test_the_log_of_a_client_that_confirms_nothing_is_bounded() -> None:
    log = EventLog()
    for number in range(5000):
        log.add(json.dumps({"number": number}), False)
    assert len(log.save()["events"]) == 4096
    with pytest.raises(StateConflict, match="received is 903, but the events before number 905"):
        log.resume(903, 0)
    assert json.loads(EventLog(**log.save()).resume(904, 0)[0]) == {"number": 904, "sequence": 905}
    log.confirm(4999)
    assert [json.loads(text)["number"] for text in log.resume(4999, 0)] == [4999]


@pytest.fixture(scope="module")
def speech(heldout: Any) -> np.ndarray:
    pause = (np.random.default_rng(0).standard_normal(16_000) * 1e-3).astype(np.float32)
    return np.concatenate([part for audio in heldout[:3] for part in (audio, pause)])


@pytest.fixture(scope="module")
def resuming(serve_here: Any) -> Any:
    """A server that stores the state of a stream after every few messages."""
    with serve_here(state_seconds=0.05, max_streams=8, measure=False, idle_seconds=2) as server:
        # The tests send audio faster than in real time. On a busy machine, results would be late, and streams rejected.
        server.service.load.history = deque(maxlen=0)
        yield server


async def rest_of(socket: ClientConnection) -> list[dict[str, Any]]:
    """Return all messages until the connection is closed."""
    messages = []
    with suppress(ConnectionClosed):
        async for text in socket:
            messages.append(json.loads(text))
    return messages


async def uninterrupted(server: str, actions: list[Any], **options: Any) -> ResumingClient:
    client = ResumingClient(actions, **options)
    assert await client.stream(server), client.other
    assert [event["sequence"] for event in client.events] == list(range(1, len(client.events) + 1))
    return client


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_ms": 80, "words": 1},
        {"chunk_ms": 160, "endpoint_ms": 300, "decoder": "reset", "phrases": '["voicemail"]'},
        {"chunk_ms": 560, "sample_rate": 8000, "encoding": "mulaw"},
        {"chunk_ms": 80, "final_chunk_ms": 560},
        {"chunk_ms": 80, "vad": 1},
    ],
)
def test_no_event_is_lost_or_repeated(resuming: Any, speech: np.ndarray, options: dict[str, Any]) -> None:
    """Cut at random moments, also while states are being stored and events are being sent."""
    audio = pcm(speech)
    if options.get("encoding") == "mulaw":
        audio = bytes(np.random.default_rng(0).integers(0, 256, len(speech) // 2, np.uint8))  # noise has words too
        audio = audio[:40_000]
    third = len(audio) // 3
    configure = {"type": "configure", "chunk_ms": 160}
    actions = [audio[:third], {"type": "commit"}, audio[third : 2 * third], configure, audio[2 * third :]]
    actions.append({"type": "finish"})

    async def main() -> None:
        expected = await uninterrupted(resuming.socket, actions, **options)
        for seed in range(3):
            client = ResumingClient(actions, seed, **options)
            done, cuts = False, 0
            while not done:
                cuts += 1
                cut = None if cuts > 12 else client.random.choice([0, 1, 3, 8, 20])
                done = await client.stream(resuming.socket, cut, pause=client.random.choice([0, 0.002, 0.01]))
            assert cuts > 2 and not client.other
            if "final_chunk_ms" in options:
                assert finals(client.checked()) == finals(expected.checked())
            else:
                assert client.checked() == expected.checked()

    asyncio.run(main())
    assert resuming.metric("nemostream_state_errors_total") == 0


@pytest.mark.parametrize("encoding", ["PCM_16", "FLOAT", "ULAW"])
def test_a_wav_file_is_resumed(resuming: Any, speech: np.ndarray, encoding: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "speech.wav", speech, 16_000, encoding)
    actions = [(tmp_path / "speech.wav").read_bytes(), {"type": "finish"}]

    async def main() -> None:
        expected = await uninterrupted(resuming.socket, actions, chunk_ms=80)
        client, done, cuts = ResumingClient(actions, 1, chunk_ms=80), False, 0
        while not done:
            cuts += 1
            done = await client.stream(resuming.socket, [1, 3, 9, 30, 50, 90, None][min(cuts, 7) - 1], pause=0.005)
        assert client.checked() == expected.checked() and client.resumed >= 3
        assert len(expected.events) > 20

    asyncio.run(main())


@asynccontextmanager
async def first_connection(client: ResumingClient, server: str, messages: int) -> AsyncIterator[ClientConnection]:
    """Open the stream of a client and send its first messages, without receiving events."""
    async with connect(f"{server}/v1/stream?{client.query()}") as socket:
        client.token = json.loads(await socket.recv())["resumption"]["token"]
        for item in client.items[:messages]:
            await socket.send(item)
        yield socket


def test_a_second_connection_takes_over(resuming: Any, speech: np.ndarray) -> None:
    """The first one is still open, as after a network that drops packets silently."""
    actions = [pcm(speech), {"type": "finish"}]

    async def main() -> None:
        expected = await uninterrupted(resuming.socket, actions, chunk_ms=80)
        client = ResumingClient(actions, chunk_ms=80)
        async with first_connection(client, resuming.socket, 20) as old:
            await asyncio.sleep(0.3)
            assert await client.stream(resuming.socket)
            received = await rest_of(old)
            assert old.close_code == 1012 and received[-1]["type"] == "moved"
        assert client.checked() == expected.checked()

    asyncio.run(main())


def test_an_idle_client_can_resume(resuming: Any, speech: np.ndarray) -> None:
    actions = [pcm(speech), {"type": "finish"}]

    async def main() -> None:
        expected = await uninterrupted(resuming.socket, actions, chunk_ms=80)
        client = ResumingClient(actions, chunk_ms=80)
        async with first_connection(client, resuming.socket, 50) as old:
            received = await rest_of(old)
            assert received[-1]["code"] == "expired"
            events = [message for message in received if "sequence" in message and message["type"] != "stored"]
            client.events += events[:3]
        assert await client.stream(resuming.socket)
        assert client.ready[0]["resumption"]["bytes"] == sum(map(len, client.items[:50]))
        assert client.checked() == expected.checked()

    asyncio.run(main())


def test_the_state_is_deleted_at_the_end(resuming: Any, speech: np.ndarray) -> None:
    async def main() -> None:
        client = await uninterrupted(resuming.socket, [pcm(speech[:8000]), {"type": "finish"}])
        await asyncio.sleep(0.2)
        with pytest.raises(InvalidStatus) as refused:
            await client.stream(resuming.socket)
        assert refused.value.response.status_code == 404
        error = json.loads(refused.value.response.body)["error"]
        assert error["code"] == "state" and "open a new stream" in error["message"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("query", "status", "word"),
    [
        ("resume=short&received=0&results=0", 400, "resume has an invalid value"),
        ("resume=0123456789abcdef0123&received=-1&results=0", 400, "received has an invalid value"),
        ("resume=0123456789abcdef0123&received=0", 400, "resume needs the option results"),
        ("resume=0123456789abcdef0123&received=0&results=0&words=1", 400, "no option besides resume 'words'"),
        ("resume=0123456789abcdef0123&received=0&results=0", 404, "cannot be resumed"),
        ("resumable=2", 400, "resumable has an invalid value"),
    ],
)
def test_invalid_requests_are_rejected(resuming: Any, query: str, status: int, word: str) -> None:
    async def main() -> None:
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"{resuming.socket}/v1/stream?{query}")
        assert refused.value.response.status_code == status
        assert word in json.loads(refused.value.response.body)["error"]["message"]

    asyncio.run(main())


def test_events_that_are_not_kept_are_a_conflict(resuming: Any, speech: np.ndarray) -> None:
    """A client that confirms events, and then claims not to have them."""

    async def main() -> None:
        client = ResumingClient([pcm(speech), {"type": "finish"}], chunk_ms=80)
        assert not await client.stream(resuming.socket, 120, pause=0.005)
        await asyncio.sleep(0.2)
        client.events.clear()
        with pytest.raises(InvalidStatus) as refused:
            await client.stream(resuming.socket)
        assert refused.value.response.status_code == 409
        assert json.loads(refused.value.response.body)["error"]["code"] == "state"

    asyncio.run(main())


def test_an_invalid_message_ends_the_stream_for_good(resuming: Any, speech: np.ndarray) -> None:
    async def main() -> None:
        client = ResumingClient([pcm(speech[:8000]), {"type": "what"}])
        assert not await client.stream(resuming.socket)
        assert [message["code"] for message in client.other] == ["option"]
        with pytest.raises(InvalidStatus, match="404"):
            await client.stream(resuming.socket)

    asyncio.run(main())


def test_without_a_store_streams_are_not_resumable(serve_here: Any, speech: np.ndarray) -> None:
    async def main(server: str) -> None:
        async with connect(f"{server}/v1/stream?resumable=1") as socket:
            assert json.loads(await socket.recv())["resumption"] is None
            await socket.send(pcm(speech[:30_000]))
            await socket.send('{"type": "finish"}')
            messages = [json.loads(text) async for text in socket]
            assert messages[-1]["type"] == "done" and "sequence" not in messages[-1]
        async with connect(f"{server}/v1/stream") as socket:
            assert "resumption" not in json.loads(await socket.recv())
        with pytest.raises(InvalidStatus, match="404"):
            await connect(f"{server}/v1/stream?resume=0123456789abcdef0123&received=0&results=0")

    with serve_here(state_store="none", measure=False) as server:
        asyncio.run(main(server.socket))


@pytest.mark.parametrize("arguments", [[], ["--transports", "1"]])
def test_streams_finish_if_their_states_end_with_the_server(
    serve_process: Any, speech: np.ndarray, arguments: list[str]
) -> None:
    """With states in memory, a stream that was handed over could not be resumed anywhere."""

    async def main() -> None:
        with serve_process("--no-measure", *arguments) as server:
            client = ResumingClient([pcm(speech), {"type": "finish"}], chunk_ms=80)
            streaming = asyncio.create_task(client.stream(server.socket, pause=0.02))
            await asyncio.sleep(1)
            server.process.terminate()
            assert await streaming and not client.other
            assert server.process.wait(30) == 0

    asyncio.run(main())


@pytest.mark.parametrize("store", ["folder", "transports"])
def test_another_server_continues(serve_process: Any, speech: np.ndarray, tmp_path: Path, store: str) -> None:
    """On SIGTERM the streams move; after SIGKILL they continue from the last state. With API keys and encryption."""
    (tmp_path / "key").write_text("00" * 32)
    (tmp_path / "keys").write_text("one\ntwo\n")
    arguments = ["--state-store", f"{tmp_path}/states", "--state-key-file", f"{tmp_path}/key", "--no-measure"]
    arguments += ["--api-keys-file", f"{tmp_path}/keys", "--state-seconds", "0.3"]
    if store == "transports":
        arguments += ["--transports", "2"]
    actions = [pcm(speech), {"type": "finish"}]

    async def main() -> None:
        headers = {"x-api-key": "one"}
        with serve_process(*arguments) as one, serve_process(*arguments) as two:
            expected = ResumingClient(actions, chunk_ms=80)
            assert await expected.stream(two.socket, **headers)
            clients = [ResumingClient(actions, chunk_ms=80) for _ in range(3)]
            streaming = [asyncio.create_task(client.stream(one.socket, pause=0.03, **headers)) for client in clients]
            await asyncio.sleep(1.5)
            one.process.terminate()
            assert await asyncio.gather(*streaming) == [False] * 3
            assert all(client.other[-1]["type"] == "moved" for client in clients)
            one.process.wait(30)
            with pytest.raises(InvalidStatus, match="404"):  # the state belongs to the other key
                await clients[0].stream(two.socket, **{"x-api-key": "two"})
            streaming = [asyncio.create_task(client.stream(two.socket, pause=0.03, **headers)) for client in clients]
            await asyncio.sleep(1.0)
            two.process.kill()
            assert await asyncio.gather(*streaming) == [False] * 3
            with serve_process(*arguments) as three:
                for client in clients:
                    assert await client.stream(three.socket, **headers)
                    assert client.checked() == expected.checked()
                    assert client.ready[1]["resumption"]["bytes"] > 0
                    assert client.ready[2]["resumption"]["bytes"] > client.ready[1]["resumption"]["bytes"]
        assert not [*(tmp_path / "states").rglob("*.state")]

    asyncio.run(main())
