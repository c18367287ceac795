"""Garbage collection and freeing memory of a server process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from nemostream.serving import memory


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


def test_trimming_collects_reference_cycles() -> None:
    gc.disable()
    reference = weakref.ref(Node())
    assert reference() is not None
    memory.Trimmer().trim()
    assert reference() is None


def test_trimming_returns_heap_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries: list[Any] = []

    def load(name: str | None) -> Any:
        libraries.append((name, mock.Mock()))
        return libraries[-1][1]

    monkeypatch.setattr(memory.ctypes, "CDLL", load)
    memory.Trimmer().trim()
    ((name, library),) = libraries
    assert name is None and library.mock_calls == [mock.call.malloc_trim(0)]


def test_memory_is_trimmed_after_growth_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection of all objects, of which a server with many streams has many, waits until there is much to free."""
    collections: list[int] = []
    sizes = [100, 115, 117, 105, 100, 116, 117, 110]  # MiB; after a collection the size is read again
    collected = [False, False, True, False, False, True]
    monkeypatch.setattr(memory, "_resident_bytes", lambda: sizes.pop(0) << 20)
    monkeypatch.setattr(memory.gc, "collect", lambda: collections.append(1))
    trimmer = memory.Trimmer()
    trimmer._bytes = 100 << 20
    for expected in collected:
        before = len(collections)
        trimmer.trim()
        assert (len(collections) > before) is expected
    assert not sizes and trimmer._bytes == 110 << 20


def test_memory_is_trimmed_if_its_size_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    collections: list[int] = []
    monkeypatch.setattr(memory, "_resident_bytes", lambda: None)
    monkeypatch.setattr(memory.gc, "collect", lambda: collections.append(1))
    trimmer = memory.Trimmer()
    trimmer.trim()
    trimmer.trim()
    assert len(collections) == 2


def test_size_of_the_process_grows_with_its_memory() -> None:
    before = memory._resident_bytes()
    held = bytearray(32 << 20)
    held[::4096] = bytes([1]) * len(held[::4096])
    after = memory._resident_bytes()
    assert before is not None and after is not None and after - before > 24 << 20


def test_a_frozen_heap_is_not_examined() -> None:
    """Present objects are excluded, and full collections become rare."""
    young, middle, full = gc.get_threshold()
    kept = [Node()]
    memory.freeze_heap()
    assert not any(found is kept for found in gc.get_objects())
    assert gc.get_threshold() == (young, middle, 1000) and full < 1000
