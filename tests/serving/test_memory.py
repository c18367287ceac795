"""Garbage collection and freeing memory of a server process."""

from __future__ import annotations

import gc
import http.client
import json
import time
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from websockets.sync.client import connect

from nemostream.serving import memory
from nemostream.serving.network.connections import HttpProtocol, WebSocketProtocol
from nemostream.serving.session import Session


class Node:
    def __init__(self) -> None:
        self.itself = self  # a reference cycle


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    if enabled:
        gc.enable()


def trim_after_growth() -> None:
    trimmer = memory.Trimmer()
    trimmer._bytes = 0
    trimmer.trim(0)


def test_trimming_collects_reference_cycles() -> None:
    gc.disable()
    reference = weakref.ref(Node())
    memory.Trimmer().trim(0)  # only reads the size
    assert reference() is not None
    trim_after_growth()
    assert reference() is None


def test_trimming_returns_heap_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries: list[Any] = []

    def load(name: str | None) -> Any:
        libraries.append((name, mock.Mock()))
        return libraries[-1][1]

    monkeypatch.setattr(memory.ctypes, "CDLL", load)
    trim_after_growth()
    ((name, library),) = libraries
    assert name is None and library.mock_calls == [mock.call.malloc_trim(0)]


@pytest.mark.parametrize(
    ("steps", "collected", "last"),
    [
        # sizes in MiB, streams; after a collection the size is read again
        ([(100, 0), (115, 0), (117, 0)], [False, False, True], 105),
        ([(100, 0), (116, 0), (90, 0), (106, 0), (107, 0)], [False, False, False, False, True], 90),
        ([(100, 10), (140, 106), (141, 106)], [False, False, True], 130),  # 96 more streams: 24 MiB
        ([(100, 10), (117, 2)], [False, True], 100),  # fewer streams explain nothing
        ([(100, 100), (90, 20), (125, 100), (127, 100)], [False, False, False, True], 120),
    ],
)
def test_memory_is_trimmed_after_growth_only(
    steps: list[tuple[int, int]], collected: list[bool], last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection of all objects, of which a server with many streams has many, waits until there is much to free."""
    collections: list[int] = []
    sizes = [*(size for size, _ in steps), last]
    monkeypatch.setattr(memory, "_resident_bytes", lambda: sizes.pop(0) << 20)
    monkeypatch.setattr(memory.gc, "collect", lambda: collections.append(1))
    trimmer = memory.Trimmer()
    for (_, streams), expected in zip(steps, collected, strict=True):
        before = len(collections)
        trimmer.trim(streams)
        assert (len(collections) > before) is expected
    assert not sizes and trimmer._bytes == last << 20


def test_memory_is_trimmed_if_its_size_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    collections: list[int] = []
    monkeypatch.setattr(memory, "_resident_bytes", lambda: None)
    monkeypatch.setattr(memory.gc, "collect", lambda: collections.append(1))
    trimmer = memory.Trimmer()
    trimmer.trim(0)
    trimmer.trim(0)
    assert len(collections) == 2


def test_size_of_the_process_grows_with_its_memory() -> None:
    before = memory._resident_bytes()
    held = bytearray(32 << 20)
    held[::4096] = bytes([1]) * len(held[::4096])
    after = memory._resident_bytes()
    assert before is not None and after is not None and after - before > 24 << 20


def instances(*kinds: type) -> list[Any]:
    return [found for found in gc.get_objects() if isinstance(found, kinds)]


@pytest.mark.parametrize("what", ["finished stream", "disconnected stream", "request"])
def test_closed_connections_are_freed_without_a_collection(serve_here: Any, spoken: Any, what: str) -> None:
    """Otherwise their objects accumulate until a full collection, which delays all streams."""
    kinds = [HttpProtocol] if what == "request" else [Session, WebSocketProtocol]
    others = instances(*kinds)  # of other tests

    def open_instances() -> list[weakref.ref[Any]]:
        known = {id(other) for other in others}
        found = [each for each in instances(*kinds) if id(each) not in known]
        assert all(any(isinstance(each, kind) for each in found) for kind in kinds)
        return [weakref.ref(each) for each in found]

    with serve_here() as running:
        gc.disable()
        if what == "request":
            client = http.client.HTTPConnection("127.0.0.1", running.http)
            client.request("GET", "/healthz")
            assert client.getresponse().status == 200
            open_ones = open_instances()
            client.close()
        else:
            with connect(f"{running.socket}/v1/stream?chunk_ms=80") as socket:
                for start in range(0, 1 << 16, 3200):
                    socket.send(spoken[0].pcm[start : start + 3200])
                while json.loads(socket.recv())["type"] != "partial":
                    pass
                open_ones = open_instances()
                if what == "finished stream":
                    socket.send(json.dumps({"type": "finish"}))
                    assert [json.loads(event) for event in socket][-1]["type"] == "done"
        deadline = time.monotonic() + 20
        while any(reference() is not None for reference in open_ones):
            assert time.monotonic() < deadline, open_ones
            time.sleep(0.01)


def test_a_frozen_heap_is_not_examined() -> None:
    """Present objects are excluded, and full collections become rare."""
    young, middle, full = gc.get_threshold()
    kept = [Node()]
    memory.freeze_heap()
    assert not any(found is kept for found in gc.get_objects())
    assert gc.get_threshold() == (young, middle, 1000) and full < 1000
