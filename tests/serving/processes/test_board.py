"""The board: entries of several transports, the lock, and the load."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream.serving.load import MAX_LATENCIES
from nemostream.serving.processes.board import Board, Kind, Row

CLIENTS = ["one", "two", "192.0.2.1"]


@pytest.fixture
def file() -> Any:
    file = Board.create(2, 6)
    yield file
    os.close(file)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(Kind), st.sampled_from(CLIENTS), st.integers(0, 9)), max_size=40
    )
)
def test_counts_are_those_of_all_transports(operations: list[Any]) -> None:
    """The model: a list of entries. Every third operation removes the oldest entry; a full transport adds none."""
    file = Board.create(2, 6)
    boards = [Board(file, 2, 6) for _ in range(2)]
    rows, entries = [Row(board, index) for index, board in enumerate(boards)], []
    for number, (transport, kind, client, size) in enumerate(operations):
        if number % 3 == 2 and entries:
            owner, _, _, _, entry = entries.pop(0)
            rows[owner].remove(entry)
        if sum(owner == transport for owner, *_ in entries) < 6:
            entries.append((transport, kind, client, size, rows[transport].add(kind, client, size)))
        for board in boards:
            for one in Kind:
                found = [(name, bytes_) for _, of, name, bytes_, _ in entries if of == one]
                assert board.count(one) == len(found) and board.size(one) == sum(bytes_ for _, bytes_ in found)
                for name in CLIENTS:
                    assert board.count(one, name) == sum(client == name for client, _ in found)
    os.close(file)


def test_a_transport_that_ended_leaves_nothing(file: int) -> None:
    board = Board(file, 2, 6)
    for index in range(2):
        row = Row(board, index)
        row.add(Kind.STREAM, "one")
        row.add(Kind.UPLOAD, "one", 5)
        row.set_sessions(2)
        row.set_open_lanes(1 + index)
        row.audio[0] += 1.5
    assert board.sessions == 4 and board.open_lanes == 3
    board.clear(0)
    assert (board.count(Kind.STREAM), board.count(Kind.UPLOAD), board.size(Kind.UPLOAD), board.sessions) == (1, 1, 5, 2)
    assert board.open_lanes == 2
    assert board.totals == (0.0, 3.0)  # audio that was received remains counted
    successor = Row(board, 0)
    assert [successor.add(Kind.CONNECTION, "one") for _ in range(6)] == list(range(6))
    with pytest.raises(IndexError):
        successor.add(Kind.CONNECTION, "one")


def test_the_lock_excludes_other_processes_and_ends_with_them(file: int) -> None:
    board = Board(file, 2, 6)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with board.locked():
            os.write(write, b"x")
            threading.Event().wait()  # until it is killed
    assert os.read(read, 1) == b"x"
    order: list[str] = []

    def lock() -> None:
        with board.locked():
            order.append("locked")

    thread = threading.Thread(target=lock)
    thread.start()
    thread.join(0.2)
    order.append("killed")
    os.kill(child, 9)
    os.waitpid(child, 0)
    thread.join(20)
    assert order == ["killed", "locked"]
    for end in (read, write):
        os.close(end)


def test_the_lock_is_released_after_an_error(file: int) -> None:
    board = Board(file, 2, 6)

    def locks() -> int:
        inode = os.fstat(file).st_ino
        return sum(f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines())

    with pytest.raises(ZeroDivisionError), board.locked():
        assert locks() == 1
        raise ZeroDivisionError
    assert locks() == 0


def test_latencies_since_the_last_time(file: int) -> None:
    board = Board(file, 2, 6)
    row, values = Row(board, 1), np.random.default_rng(0).random(3 * MAX_LATENCIES).astype(np.float32).tolist()
    assert board.latencies(1, 0) == ([], 0)
    since = 0
    for begin, end in ((0, 3), (3, 4), (4, MAX_LATENCIES + 4), (MAX_LATENCIES + 4, 3 * MAX_LATENCIES)):
        for value in values[begin:end]:
            row.add_latency(value)
        found, since = board.latencies(1, since)
        assert found == values[begin:end][-MAX_LATENCIES:] and since == end
    assert board.latencies(1, since) == ([], since) and board.latencies(0, 0) == ([], 0)


def test_seconds_of_steps(file: int) -> None:
    board = Board(file, 2, 6)
    board.add_step(0.25)
    board.add_step(0.5)
    assert Board(file, 2, 6).totals == (0.75, 0.0)
