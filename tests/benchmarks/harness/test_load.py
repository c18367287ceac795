"""The load generator on a controlled clock, with streams whose results arrive at known times.

16 kHz, packets of 20 ms, chunks of 80 ms (1,280 samples) after a lead of 160 samples: the audio of chunk n ends 80 (n +
1) - 10 ms after the start of its stream, and is pushed with the packet that is due at the next multiple of 20 ms.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream.benchmarks.harness import load
from nemostream.errors import StreamError

RATE, LEAD = 16000, 160
START = 0.05  # seconds from the call to the first packet


class Stream:
    """A stream whose chunk n has its result `delays[n]` seconds after it was pushed, and `final_delay` at the end."""

    def __init__(self, model: Model, samples: int, number: int) -> None:
        self.model, self.samples, self.number = model, samples, number
        self.listener: Callable[[list[Any]], None]
        self.opened, self.received, self.pieces = model.clock(), 0, list[np.ndarray]()
        self.chunks, self.ready, self.ended, self.finished, self.closed = 0, 0, False, False, False

    def notify(self, listener: Callable[[list[Any]], None], consumer: Any) -> None:
        self.listener, self.consumer = listener, consumer

    def feed(self, pcm: np.ndarray) -> None:
        assert not self.ended and not self.closed
        self.model.feeding(self)
        self.received += len(pcm)
        self.pieces.append(pcm)
        while self.chunks < (self.received + self.model.manifest.lead) // self.samples:
            delays = self.model.delays
            if self.chunks < len(delays):
                self.model.clock.after(delays[self.chunks], self._emit)
            self.chunks += 1

    def finish(self) -> None:
        self.ended = True
        self.model.clock.after(self.model.final_delay, self._end)

    def _emit(self) -> None:
        self.ready += 1
        self.listener([self])

    def _end(self) -> None:
        self.ready, self.finished = self.ready + 1, True  # the step that flushes the stream has a result too
        self.listener([self])

    def collect(self) -> list[str]:
        if self.model.broken == self.number:
            raise StreamError("the step failed.")
        found, self.ready = self.ready, 0
        return ["result"] * found

    def settled(self) -> bool:
        return self.finished

    def final(self) -> Any:
        return SimpleNamespace(text=f"text {self.number}")

    def close(self) -> None:
        self.closed = True
        self.listener([self])  # a stream may emit while it is closed


class Model:
    """Opens `Stream`s; `feeding` is called for each packet."""

    def __init__(self, clock: Any, delays: Sequence[float] = (), final_delay: float = 0.005) -> None:
        self.clock, self.delays, self.final_delay = clock, delays, final_delay
        self.streams: list[Stream] = []
        self.feeding: Callable[[Stream], None] = lambda stream: None
        self.broken: int | None = None  # number of the stream whose step fails
        self.refused = 0  # streams that cannot be opened
        self.options: list[tuple[int, dict[str, Any]]] = []  # of each stream: chunk size, and the others
        self.manifest = SimpleNamespace(
            lead=LEAD,
            features=SimpleNamespace(sample_rate=RATE),
            chunk=lambda ms: SimpleNamespace(samples=ms * RATE // 1000),
        )

    def open_session(self, rate: int, channels: int, *, chunk_ms: int, **options: Any) -> Stream:
        assert (rate, channels) == (RATE, 1)
        self.options.append((chunk_ms, options))
        if self.refused:
            self.refused -= 1
            raise StreamError("no free slot.")
        self.streams.append(Stream(self, chunk_ms * RATE // 1000, len(self.streams)))
        return self.streams[-1]


def run(model: Model, clips: Sequence[Any], streams: int = 1, **options: Any) -> load.LoadResult:
    options = {"chunk_ms": (80,), "random_phase": False} | options
    return load.run_load(model, clips, streams, clock=model.clock, sleep=model.clock.sleep, **options)  # type: ignore[arg-type]


def clip(samples: int) -> np.ndarray:
    return np.arange(samples, dtype=np.float32)


def test_latency_begins_at_the_end_of_the_audio_that_a_chunk_needs(clock: Any) -> None:
    # 3,000 samples are 187.5 ms: nine packets, and one of 120 samples at 200 ms. Chunk 0 is pushed at 80 ms, its result
    # arrives at 85 ms; chunk 1 is pushed at 160 ms, and needs 40 ms.
    model = Model(clock, delays=(0.005, 0.040), final_delay=0.007)
    result = run(model, [clip(3000)], total_clips=1)
    times = [(ms, round(1000 * audio_end, 6), round(1000 * latency, 6)) for ms, audio_end, latency in result.results]
    assert times == [(80, 70.0, 15.0), (80, 150.0, 50.0)]
    assert result.finals == pytest.approx([0.207 - 0.1875])
    assert result.texts == [(0, "text 0")] and result.errors == [] and result.overdue == 0
    assert result.audio_seconds == pytest.approx(0.1875)
    (stream,) = model.streams
    assert np.array_equal(np.concatenate(stream.pieces), clip(3000))
    assert [len(piece) for piece in stream.pieces] == [320] * 9 + [120]
    assert stream.opened == pytest.approx(1000 + START)
    assert result.lateness == pytest.approx([0.0] * len(result.lateness), abs=1e-9)
    # The end of the stream is detected at the next packet, 220 ms after the start.
    assert result.seconds == pytest.approx(0.220)


def test_several_results_of_one_step_are_paired_in_order(clock: Any) -> None:
    model = Model(clock, delays=(0.1, 0.03))  # at 180 and 190 ms; the first is collected with the second
    collect = Stream.collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "collect", lambda self: collect(self) if self.ready != 1 or self.ended else [])
        result = run(model, [clip(3000)], total_clips=1)
    found = [(round(1000 * audio_end, 6), round(1000 * latency, 6)) for _, audio_end, latency in result.results]
    assert found == [(70.0, 120.0), (150.0, 40.0)]


def test_late_load_generator_is_measured(clock: Any) -> None:
    """The packet at 40 ms takes 50 ms: the next two are 30 and 10 ms late, and the following ones on time."""
    model = Model(clock)

    def feeding(stream: Stream) -> None:
        if stream.received == 320:
            clock.sleep(0.05)

    model.feeding = feeding
    result = run(model, [clip(320 * 8)], total_clips=1)
    late = [round(1000 * each, 6) + 0.0 for each in result.lateness[:7]]
    assert late == [0.0, 0.0, 0.0, 30.0, 10.0, 0.0, 0.0]  # opening, then a packet every 20 ms


def test_latency_of_a_late_packet_counts_from_the_time_it_was_due(clock: Any) -> None:
    model = Model(clock, delays=(0.005,))

    def feeding(stream: Stream) -> None:
        if stream.received == 640:  # the packet before the one that completes the chunk
            clock.sleep(0.1)

    model.feeding = feeding
    result = run(model, [clip(320 * 6)], total_clips=1)
    # Pushed at 160 ms instead of 80 ms, because the packet that is due at 60 ms takes 100 ms.
    assert [round(1000 * latency, 6) for _, _, latency in result.results] == [pytest.approx(165 - 70)]


def test_chunks_without_a_result_are_overdue_after_a_chunk_duration(clock: Any) -> None:
    """Of chunks whose audio ends at 70, 150, 230, ... ms, at 380 ms those before 300 ms are overdue."""
    model = Model(clock, delays=(0.001,))  # only the first chunk has a result
    result = run(model, [clip(RATE)], seconds=0.39)
    assert result.seconds == pytest.approx(0.38) and len(result.results) == 1
    assert result.overdue == 2  # 150 and 230 ms; 310 ms was 70 ms ago
    (stream,) = model.streams
    assert stream.closed and result.finals == [] and result.errors == []


@pytest.mark.parametrize(("end_ms", "overdue"), [(149, 0), (151, 1), (229, 1), (231, 2)])
def test_overdue_is_more_than_one_chunk(end_ms: int, overdue: int, clock: Any) -> None:
    """The audio of two chunks ends at 70 and 150 ms; the last packet, due at 140 or 220 ms, takes until `end_ms`."""
    model, last_ms = Model(clock), end_ms // 20 * 20

    def feeding(stream: Stream) -> None:
        if stream.received == 320 * (last_ms // 20 - 1):
            clock.sleep((end_ms - last_ms) / 1000)

    model.feeding = feeding
    result = run(model, [clip(RATE)], seconds=(last_ms + 10) / 1000)
    assert result.seconds == pytest.approx(end_ms / 1000) and result.results == []
    assert result.overdue == overdue


def test_streams_follow_each_other(clock: Any) -> None:
    """A stream starts when the end of the previous one has been processed; clips are used in turn, in order."""
    model = Model(clock, delays=(0.005,) * 9, final_delay=0.05)
    result = run(model, [clip(640), clip(960)], total_clips=3)
    opened = [round(1000 * (stream.opened - 1000 - START), 6) for stream in model.streams]
    # 640 samples are pushed at 20 and 40 ms, their end is processed at 90 ms and detected at 100 ms; 960 samples at
    # 120, 140 and 160 ms, 210 ms, 220 ms.
    assert opened == [0.0, 100.0, 220.0]
    assert [stream.received for stream in model.streams] == [640, 960, 640]
    assert result.texts == [(0, "text 0"), (1, "text 1"), (0, "text 2")]
    assert result.finals == pytest.approx([0.05, 0.05, 0.05])
    assert result.audio_seconds == pytest.approx(0.04 + 0.06 + 0.04)


def test_clips_are_shared_between_streams(clock: Any) -> None:
    model = Model(clock)
    result = run(model, [clip(640), clip(960), clip(1280)], 2, total_clips=5)
    assert sorted(index for index, _ in result.texts) == [0, 0, 1, 1, 2]
    assert len({stream.opened for stream in model.streams[:2]}) == 1


def test_random_clips_are_reproducible(clock: Any) -> None:
    def order(seed: int) -> list[int]:
        model = Model(type(clock)())
        run(model, [clip(320 * n) for n in range(1, 9)], 2, seconds=3.0, seed=seed, random_phase=True)
        return [stream.received for stream in model.streams if stream.closed or stream.finished]

    assert order(1) == order(1) != order(2)
    assert len(set(order(1))) == 8


def test_failed_stream_is_an_error_and_the_next_one_starts(clock: Any) -> None:
    """Results of the next stream do not count for chunks of the one that failed."""
    model = Model(clock)

    def feeding(stream: Stream) -> None:
        if stream.number == 0 and stream.received == 320 * 5:
            raise StreamError("the stream failed.")

    model.feeding = feeding
    model.delays = ()
    clock.after(START + 0.11, lambda: setattr(model, "delays", (0.005,)))
    result = run(model, [clip(320 * 7)], total_clips=2)
    assert result.errors == ["the stream failed."]
    first, second = model.streams
    assert first.closed and round(1000 * (second.opened - first.opened), 6) == 140.0
    ((_, audio_end, latency),) = result.results
    assert (audio_end, latency) == pytest.approx((0.14 + 0.07, 0.015))
    assert result.texts == [(0, "text 1")]


def test_stream_that_cannot_be_opened_is_an_error(clock: Any) -> None:
    model = Model(clock)
    model.refused = 2
    result = run(model, [clip(640)], total_clips=3)
    assert result.errors == ["no free slot."] * 2 and [text for _, text in result.texts] == ["text 0"]
    assert model.streams[0].opened == pytest.approx(1000 + START + 2 * load.PACKET)


def test_failed_step_is_one_error(clock: Any) -> None:
    model = Model(clock, delays=(0.005,) * 9)
    model.broken = 0
    result = run(model, [clip(640), clip(960)], total_clips=2)
    assert result.errors == ["the step failed."]
    assert result.texts == [(1, "text 1")]


def test_duration_and_phases(clock: Any) -> None:
    """Packets of each stream are 20 ms apart from its random start; none is pushed after the given duration."""
    pushes: dict[int, list[float]] = {}
    model = Model(clock)
    model.feeding = lambda stream: pushes.setdefault(stream.number, []).append(clock() - 1000 - START)
    result = run(model, [clip(RATE)], 4, seconds=0.5, random_phase=True, chunk_ms=(80, 160))
    assert len(model.streams) == 4 and [stream.samples for stream in model.streams].count(2560) == 2
    starts = sorted(times[0] - 0.02 for times in pushes.values())
    assert starts[0] >= 0 and starts[-1] < 0.16 and len(set(starts)) == 4
    for times in pushes.values():
        assert [b - a for a, b in pairwise(times)] == pytest.approx([0.02] * (len(times) - 1))
        assert 0.48 <= times[-1] < 0.5
    assert result.seconds == pytest.approx(max(times[-1] for times in pushes.values()))


# -- recorded steps ----------------------------------------------------------------------------------------------------


def test_steps_are_timed_from_submission_to_result(clock: Any) -> None:
    class Pending:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def result(self) -> str:
            clock.sleep(self.seconds)
            return "emissions"

    class Backend:
        capacity = 7

        def submit(self, batch: Any) -> Pending:
            clock.sleep(0.25)
            return Pending(batch.seconds)

    def batch(ms: int, rows: int, seconds: float) -> Any:
        return SimpleNamespace(chunk=SimpleNamespace(ms=ms), slots=np.arange(rows), seconds=seconds)

    recorder = load.StepRecorder(Backend(), clock)  # type: ignore[arg-type]
    clock.sleep(5)
    assert recorder.submit(batch(560, 3, 1.0)).result() == "emissions"
    later = recorder.submit(batch(80, 1, 0.5))
    assert recorder.steps == [(560, 3, 1250.0)] and recorder.capacity == 7
    clock.sleep(0.25)
    later.result()
    assert recorder.steps == [(560, 3, 1250.0), (80, 1, 1000.0)]


def test_streams_have_the_options(clock: Any) -> None:
    model = Model(clock, delays=(0.005, 0.005))
    run(model, [clip(3000)], streams=2, chunk_ms=(80, 160), total_clips=2, options={"final_chunk_ms": 560})
    assert model.options == [(80, {"final_chunk_ms": 560}), (160, {"final_chunk_ms": 560})]


def test_results_wait_while_a_packet_is_pushed(clock: Any) -> None:
    """A session is for one thread at a time: a step that ends during a push is recorded after it."""
    model, seen = Model(clock, delays=(0.005,)), list[int]()
    threads: list[threading.Thread] = []

    def feeding(stream: Stream) -> None:
        if stream.received == 4 * 320:
            client = stream.consumer
            threads.append(threading.Thread(target=lambda: (client.on_step(), seen.append(stream.received))))
            threads[0].start()
            threads[0].join(0.05)
            seen.append(-1)  # the other thread still waits

    model.feeding = feeding
    run(model, [clip(3000)], total_clips=1)
    threads[0].join()
    assert seen[0] == -1 and seen[1] > 4 * 320
