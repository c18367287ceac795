"""Whole recordings: the order of calls, progress with a clock that the test advances, snapshots and early ends."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest

from nemostream.runtime.streaming import offline
from nemostream.runtime.streaming.offline import SourceStopped, transcribe_recording


class Session:
    """A session that records its calls. A block is the number of seconds that are processed with it."""

    def __init__(self, replayed: int = 0) -> None:
        self.calls: list[Any] = []
        self.replayed, self.fed, self.decoded, self.saved_samples = replayed, 0, 0.0, 5

    @property
    def replaying(self) -> bool:
        return self.fed < self.replayed

    def feed(self, block: float) -> None:
        self.calls.append(("feed", block))
        self.fed += 1
        self.decoded += block

    def wait(self, backlog: int = 0) -> None:
        self.calls.append(("wait", backlog))

    def collect(self) -> list[Any]:
        self.calls.append("collect")
        return [f"result {self.fed}"]

    def discard_results(self) -> None:
        self.calls.append("discard")

    saveable = True

    def save(self) -> Any:
        self.calls.append("save")
        return types.SimpleNamespace(samples=self.saved_samples)

    def finish(self) -> None:
        self.calls.append("finish")

    def final(self) -> str:
        return "final"


class Checkpointer:
    def __init__(self, calls: list[Any], due: list[bool]) -> None:
        self.calls, self._due = calls, iter(due)

    @property
    def due(self) -> bool:
        return next(self._due)

    def save(self, snapshot: Any) -> None:
        self.calls.append(("store", snapshot.samples))


END = ["finish", ("wait", 0), "discard"]


def block(seconds: float) -> list[Any]:
    return [("feed", seconds), ("wait", 2), "discard"]


def test_blocks_are_read_ahead_and_every_result_is_collected_or_discarded() -> None:
    session, partials = Session(), []
    assert transcribe_recording(session, [1.0, 2.0], 3.0) == "final"
    assert session.calls == [*block(1.0), *block(2.0), *END]
    session = Session()
    transcribe_recording(session, [1.0, 2.0], 3.0, on_partial=partials.append)
    assert session.calls == [("collect" if call == "discard" else call) for call in [*block(1.0), *block(2.0), *END]]
    assert partials == ["result 1", "result 2", "result 2"]


def test_progress_is_estimated_from_the_audio_processed_by_this_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two blocks are from a snapshot. Then 2 s are processed in 0.5 s, and 6 s in 4.5 s."""
    now = iter([100.0, 100.5, 104.5, 105.0])
    monkeypatch.setattr(offline, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    session, found = Session(replayed=2), []
    transcribe_recording(session, [10.0, 10.0, 1.0, 2.0, 4.0], 30.0, on_progress=found.append)
    assert [(float(one), one.duration) for one in found] == [(21.0, 30.0), (23.0, 30.0), (27.0, 30.0), (27.0, 30.0)]
    assert math.isnan(found[0].remaining)
    assert [one.remaining for one in found[1:]] == [7 * 0.5 / 2, 3 * 4.5 / 6, 3 * 5.0 / 6]


def test_progress_of_an_unknown_duration_and_beyond_the_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    for duration in (0.0, 2.0):
        now = iter([100.0, 101.0, 102.0])
        monkeypatch.setattr(offline, "time", types.SimpleNamespace(monotonic=lambda now=now: next(now)))
        found: list[Any] = []
        transcribe_recording(Session(), [1.0, 3.0], duration, on_progress=found.append)
        remaining = [one.remaining for one in found[1:]]
        assert all(map(math.isnan, remaining)) if not duration else remaining == [0.0, 0.0]


def test_audio_of_a_snapshot_is_not_waited_for_and_a_due_snapshot_is_complete() -> None:
    session = Session(replayed=2)
    checkpointer = Checkpointer(session.calls, [False, True])
    transcribe_recording(session, [1.0] * 4, 4.0, checkpointer=checkpointer)
    replayed = [("feed", 1.0)] * 2
    assert session.calls == [*replayed, *block(1.0), *block(1.0), ("wait", 0), "save", ("store", 5), *END]


def stopped_after(count: int) -> Any:
    for _ in range(count):
        yield 1.0
    raise SourceStopped


def test_a_recording_that_is_stopped_is_saved_and_its_result_is_returned() -> None:
    session = Session()
    checkpointer = Checkpointer(session.calls, [False])
    assert transcribe_recording(session, stopped_after(1), 4.0, checkpointer=checkpointer) == "final"
    assert session.calls == [*block(1.0), ("wait", 0), "save", ("store", 5), *END]
    session = Session()
    assert transcribe_recording(session, stopped_after(1), 4.0) == "final"
    assert session.calls == [*block(1.0), ("wait", 0), *END]
    session = Session()
    session.saved_samples = 0  # nothing to resume
    checkpointer = Checkpointer(session.calls, [])
    assert transcribe_recording(session, stopped_after(0), 4.0, checkpointer=checkpointer) == "final"
    assert session.calls == [("wait", 0), "save", *END]


def test_a_recording_that_is_stopped_before_the_position_of_its_snapshot_keeps_it() -> None:
    session = Session(replayed=3)
    checkpointer = Checkpointer(session.calls, [])
    assert transcribe_recording(session, stopped_after(2), 4.0, checkpointer=checkpointer) == "final"
    assert session.calls == [("feed", 1.0)] * 2
