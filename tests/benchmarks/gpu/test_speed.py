"""Times and rates of the GPU benchmarks with a backend whose steps take known times on a controlled clock."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream.benchmarks.gpu import speed
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engines import speech
from nemostream.runtime.backends.base import Batch, Emissions

WARM_UP = 5


class Pending:
    """A step. Its event is waited for until `end`; the result takes the host another `reading` seconds."""

    def __init__(self, backend: Backend, tokens: int, rows: int) -> None:
        self._backend, self._tokens, self._rows = backend, tokens, rows
        self.end = max(backend.clock.now, backend.busy_until) + backend.step_seconds()
        backend.busy_until = self.end
        self.event = self

    def wait(self) -> None:
        self._backend.clock.sleep(max(0.0, self.end - self._backend.clock.now))

    def result(self) -> Emissions:
        self.wait()
        self._backend.clock.sleep(self._backend.reading)
        self._backend.collected += 1
        empty = np.zeros(0, np.int32)
        tokens = [np.zeros(self._tokens, np.int32), *[empty] * (self._rows - 1)]
        failed = np.arange(self._rows) < self._backend.failing
        return Emissions.of_rows(tokens, tokens, tokens, tokens, failed)


class Backend:
    """Steps take `seconds` in turn on the device, `submitting` and `reading` on the host."""

    cache_dtype, bytes_per_stream = "float16", 4321

    def __init__(self, bundle: Bundle, clock: Any, seconds: Sequence[float], capacity: int = 8) -> None:
        self.manifest, self.clock, self.capacity, self.max_batch = bundle.manifest, clock, capacity, capacity - 1
        self.submitting, self.reading, self.busy_until, self.failing = 0.0, 0.0, 0.0, 0
        self._seconds, self._tokens = list(seconds), 0
        self.batches: list[Batch] = []
        self.resets: list[list[int]] = []
        self.copies: list[tuple[list[int], list[int]]] = []
        self.phrases: dict[int, Any] = {}
        self.tokens: list[int] = []  # of each step; none later
        self.collected = 0
        self.device = self
        self.closed = False

    def step_seconds(self) -> float:
        return self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]

    def reset(self, slots: np.ndarray) -> None:
        self.resets.append(slots.tolist())
        for slot in slots.tolist():
            self.phrases.pop(slot, None)

    def set_phrases(self, slot: int, phrases: Any) -> None:
        self.phrases[slot] = phrases

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self.copies.append((sources.tolist(), targets.tolist()))

    def submit(self, batch: Batch) -> Pending:
        self.clock.sleep(self.submitting)
        self.batches.append(batch)
        return Pending(self, self.tokens.pop(0) if self.tokens else 0, len(batch.slots))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def chunk(demo_bundle: Bundle) -> ChunkConfig:
    return demo_bundle.manifest.chunk(560)


def test_step_times(demo_bundle: Bundle, chunk: ChunkConfig, clock: Any) -> None:
    """Four steps after the warm-up, of 1, 4, 2 and 3 ms: percentiles are samples, as in all results."""
    backend = Backend(demo_bundle, clock, [9.0] * WARM_UP + [0.001, 0.004, 0.002, 0.003])
    backend.tokens = [100] * WARM_UP + [7, 0, 0, 14]
    found = speed.step_times(backend, chunk, 3, 4, clock=clock)  # type: ignore[arg-type]
    assert found == {
        "chunk_ms": 560,
        "batch": 3,
        "gathered": False,
        "repeats": 4,
        "tokens_per_second": pytest.approx(21 / (3 * 4 * 0.56)),
        "p50_ms": pytest.approx(2.0),
        "p99_ms": pytest.approx(4.0),
        "min_ms": pytest.approx(1.0),
        "raw_ms": [1.0, 4.0, 2.0, 3.0],
    }
    assert backend.resets == [[0, 1, 2]] and len(backend.batches) == WARM_UP + 4
    more = Backend(demo_bundle, clock, [0.001])
    speed.step_times(more, chunk, 3, 40, clock=clock)  # type: ignore[arg-type]
    clip = speech(demo_bundle.manifest)[0]
    period = len(clip) - chunk.samples
    assert 44 * chunk.samples > len(clip)  # the streams begin again at the start of the clip
    for step, batch in [*enumerate(backend.batches), *enumerate(more.batches)]:
        assert batch.slots.tolist() == [0, 1, 2] and batch.lengths.tolist() == [chunk.samples] * 3
        for row in range(3):
            start = (9973 * row % period + step * chunk.samples) % period
            assert np.array_equal(batch.audio[row], clip[start : start + chunk.samples])


def test_gathered_slots_and_phrases(demo_bundle: Bundle, chunk: ChunkConfig, clock: Any) -> None:
    backend = Backend(demo_bundle, clock, [0.001])
    boosts: Any = ["a", "b"]
    found = speed.step_times(backend, chunk, 3, 1, True, boosts, clock)  # type: ignore[arg-type]
    assert found["gathered"] and backend.resets == [[5, 6, 7]]
    assert {tuple(batch.slots.tolist()) for batch in backend.batches} == {(5, 6, 7)}
    assert backend.phrases == {5: "a", 6: "b", 7: "a"}


def test_steps_back_to_back(demo_bundle: Bundle, chunk: ChunkConfig, clock: Any) -> None:
    """The device needs 10 ms a step, the host 1 ms to submit and 2 ms to read, while the next step runs."""
    backend = Backend(demo_bundle, clock, [0.010])
    backend.submitting, backend.reading = 0.001, 0.002
    found = speed.device_times(backend, chunk, 3, 50, clock)  # type: ignore[arg-type]
    assert found == {"pipelined_ms": pytest.approx(10.0, rel=0.01), "host_ms": pytest.approx(3.0)}
    assert backend.collected == len(backend.batches) == 51 and backend.resets == [[0, 1, 2]]


def test_busy_host_limits_steps_back_to_back(demo_bundle: Bundle, chunk: ChunkConfig, clock: Any) -> None:
    backend = Backend(demo_bundle, clock, [0.001])
    backend.submitting, backend.reading = 0.004, 0.006
    found = speed.device_times(backend, chunk, 1, 50, clock)  # type: ignore[arg-type]
    assert found == {"pipelined_ms": pytest.approx(10.0, rel=0.02), "host_ms": pytest.approx(10.0)}


@pytest.mark.parametrize("whole", [True, False])
def test_time_of_each_stage(demo_bundle: Bundle, chunk: ChunkConfig, clock: Any, whole: bool) -> None:
    """Launched 2 * 6 times between two events: 12 launches of 1.5 ms take 18 ms, so each takes 1.5 ms."""

    class Launches(Backend):
        launched: list[str]

        def launches(self, batch: Batch) -> Any:
            assert self.collected == 1  # a step before, which builds what is captured
            self.launched = []
            return SimpleNamespace(
                encoder=[self._launch("encoder", 1.5)],
                undecoded=[self._launch("undecoded", 2.0), self._launch("undecoded", 0.5)],
                whole=[self._launch("whole", 4.0)] if whole else None,
            )

        def _launch(self, name: str, milliseconds: float) -> Any:
            return lambda: (self.launched.append(name), milliseconds)[1]

        def elapsed_ms(self, work: Sequence[Any]) -> float:
            return sum(run() for run in work)

    backend = Launches(demo_bundle, clock, [0.001])
    found = speed.stage_times(backend, chunk, 2, 6)  # type: ignore[arg-type]
    assert found == {"encoder_ms": 1.5, "undecoded_ms": 2.5} | ({"whole_ms": 4.0} if whole else {})
    counts = {name: backend.launched.count(name) for name in dict.fromkeys(backend.launched)}
    assert counts == {"encoder": 12, "undecoded": 24} | ({"whole": 12} if whole else {})
    assert backend.resets == [[0, 1]]


def test_rate_of_copies(clock: Any) -> None:
    """A device that copies 1 GiB in 2 ms, and in 1 ms in the third of eight rounds, reads and writes 2 GiB in it."""

    class Device:
        queued, copies, allocated, freed = 0.0, 0, 0, list[int]()

        def allocate(self, size: int) -> int:
            assert size == 1 << 30
            self.allocated += 1
            return self.allocated

        def copy(self, target: int, source: int, size: int) -> None:
            assert (target, source, size) == (2, 1, 1 << 30)
            self.queued += 0.001 if self.copies // 8 == 2 else 0.002
            self.copies += 1

        def record_event(self) -> Any:
            return SimpleNamespace(wait=self._wait)

        def _wait(self) -> None:
            clock.sleep(self.queued)
            self.queued = 0.0

        def free(self, memory: int) -> None:
            self.freed.append(memory)

    device = Device()
    device.queued = 5.0  # earlier work is not timed
    assert speed.copy_rate(device, clock) == pytest.approx(2 * 2**30 / 0.001)
    assert (device.copies, sorted(device.freed)) == (64, [1, 2])


def test_time_of_a_copy(demo_bundle: Bundle, clock: Any) -> None:
    """Of the first slot to the last: the mean of copies that are launched back to back."""

    class Timed(Backend):
        def elapsed_ms(self, work: Sequence[Any]) -> float:
            assert [run() for run in work] == [None] * 5
            return 15.0

    backend = Timed(demo_bundle, clock, [0.001])
    assert speed.copy_ms(backend, 5) == 3.0  # type: ignore[arg-type]
    assert backend.copies == [([0], [7])] * 5


def test_blank_is_calibrated_to_the_token_rate(
    demo_bundle: Bundle, chunk: ChunkConfig, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate of 10 - bias / 2 tokens per second, the wanted 3.5 are emitted at a bias of 13."""
    written: list[float] = []
    wanted_rows: list[int] = []
    backend = Backend(demo_bundle, clock, [0.001])
    original = np.array(demo_bundle.weight("joint.out.bias"))

    def write(name: str, bias: np.ndarray) -> None:
        assert name == "joint_bias" and np.array_equal(bias[:-1], original[:-1])
        written.append(float(bias[-1]))

    def step_times(backend: Any, given: ChunkConfig, rows: int, repeats: int) -> dict[str, float]:
        assert given is chunk
        wanted_rows.append(rows)
        return {"tokens_per_second": 10 - written[-1] / 2}

    backend.arena = SimpleNamespace(write=write)  # type: ignore[attr-defined]
    monkeypatch.setattr(speed, "step_times", step_times)
    rate = speed.calibrate_blank(backend, demo_bundle, chunk, 5)  # type: ignore[arg-type]
    assert written[:3] == [0.0, 20.0, 10.0] and set(wanted_rows) == {5}
    assert written[-1] == pytest.approx(13.0, abs=0.02) and rate == pytest.approx(3.5, abs=0.01)
    assert rate == 10 - written[-1] / 2 and len(written) == len(wanted_rows) + 1


def test_rows_of_a_speed_test(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of a row comes from the case of its name; rows of too large batches are counted as skipped."""
    backends: list[Backend] = []

    def make(bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[Any, str]:
        assert capacity == 301 and len(chunks) == 1
        backends.append(Backend(bundle, clock, [0.001], capacity=101))
        backends[-1].cache_dtype = "float32" if chunks[0].ms == 80 else "float16"
        backends[-1].arena = SimpleNamespace(read=read, write=write)  # type: ignore[attr-defined]
        return backends[-1], "trt fp16 (why)"

    biases: list[np.ndarray] = []

    def read(name: str, bias: np.ndarray) -> None:
        assert name == "joint_bias"
        bias.fill(1.0)

    def write(name: str, bias: np.ndarray) -> None:
        assert name == "joint_bias"
        biases.append(bias.copy())

    def step_times(
        backend: Any, chunk: ChunkConfig, rows: int, repeats: int, gathered: bool = False, boosts: Any = ()
    ) -> dict[str, Any]:
        silent = bool(biases) and biases[-1][-1] == 1e4
        base = 1.0 + 10 * gathered + 20 * bool(boosts) + 40 * silent
        assert repeats == 4 and (not boosts or len(boosts) == 64)
        return {"chunk_ms": chunk.ms, "batch": rows, "p50_ms": base, "p99_ms": base + 0.5}

    calibrated: list[int] = []

    def calibrate(backend: Any, bundle: Bundle, chunk: ChunkConfig, rows: int) -> float:
        calibrated.append(rows)
        return 3.25

    monkeypatch.setattr(speed, "step_times", step_times)

    def known(name: str, value: float) -> Any:
        def times(backend: Any, chunk: ChunkConfig, rows: int, repeats: int) -> dict[str, float]:
            assert rows in (1, 80) and repeats == 4 and backend is backends[-1]
            return {name: value}

        return times

    monkeypatch.setattr(speed, "device_times", known("pipelined_ms", 0.75))
    monkeypatch.setattr(speed, "stage_times", known("encoder_ms", 0.5))
    monkeypatch.setattr(speed, "calibrate_blank", calibrate)
    monkeypatch.setattr(speed, "copy_ms", lambda backend, repeats: len(backends) + repeats / 8)
    monkeypatch.setattr(speed, "random_phrases", lambda seed, tokens, vocabulary: seed)
    works: list[tuple[int, str, str]] = []

    def encoder_work(bundle: Bundle, chunk: ChunkConfig, precision: str, device: str) -> Any:
        works.append((chunk.ms, precision, device))
        return SimpleNamespace(weight_bytes=6_000_000)

    monkeypatch.setattr(speed, "encoder_work", encoder_work)
    saved: list[int] = []
    messages: list[str] = []
    found = speed.measure_speed(
        demo_bundle, make, (1, 80, 300), 4, 3e9, messages.append, save=lambda report: saved.append(len(report["rows"]))
    )
    sizes = [chunk.ms for chunk in demo_bundle.manifest.chunks]
    assert [(row["chunk_ms"], row["batch"]) for row in found["rows"]] == [(ms, n) for ms in sizes for n in (1, 80)]
    for row in found["rows"]:
        assert row == {
            "chunk_ms": row["chunk_ms"],
            "batch": row["batch"],
            "p50_ms": 1.0,
            "p99_ms": 1.5,
            "pipelined_ms": 0.75,
            "encoder_ms": 0.5,
            "gathered_p50_ms": 11.0,
            "gathered_p99_ms": 11.5,
            "boosted_p50_ms": 21.0,
            "silent_p50_ms": 41.0,
            "encoder": "trt fp16 (why)",
            "calibrated_tokens_per_second": 3.25,
            "bytes_per_stream": 4321,
            "copy_ms": 1.5 + sizes.index(row["chunk_ms"]),
            "roofline_ms": 2.0,  # 6 MB at 3 GB/s
        }
    assert found["skipped_rows"] == len(sizes) and saved == list(range(1, 2 * len(sizes) + 1))
    # One step of 1.5 ms, then steps of 11.5 ms with gathered caches: 7 in 80 ms, 14 in 160 ms, 49 in 560 ms, 98 in
    # 1,120 ms.
    assert found["streams"] == {80: 80 * 7, 160: 80 * 14, 560: 80 * 49, 1120: 80 * 98}
    assert calibrated == [64] * len(sizes) and sizes == [80, 160, 560, 1120]
    assert works == [(80, "fp32", "cuda"), *((ms, "fp16", "cuda") for ms in sizes[1:])]
    assert biases[0][-1] == 1e4 and (biases[0][:-1] == 1).all() and (biases[1] == 1).all()
    assert messages[0] == "80 ms, batch 1, encoder trt fp16" and all(backend.closed for backend in backends)


def test_rows_after_the_deadline_are_skipped(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row takes 1 s. After 2.5 s, the third row is finished, and no other one or backend is begun."""
    made: list[Backend] = []

    def make(bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[Any, str]:
        made.append(Backend(bundle, clock, [0.001], capacity))
        return made[-1], "e"

    def row(backend: Any, chunk: ChunkConfig, rows: int, *arguments: Any, **options: Any) -> dict[str, Any]:
        clock.sleep(0.25)  # four cases in each row
        return {"chunk_ms": chunk.ms, "batch": rows, "p50_ms": 1.0, "p99_ms": 1.0}

    for name, value in {
        "time": SimpleNamespace(perf_counter=clock),
        "step_times": row,
        "random_phrases": lambda *arguments: None,
        "device_times": lambda *arguments: {},
        "stage_times": lambda *arguments: {},
        "calibrate_blank": lambda *arguments: 1.0,
        "encoder_work": lambda *arguments: None,
        "force_blank": lambda *arguments: None,
        "copy_ms": lambda *arguments: 1.0,
    }.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(Backend, "arena", SimpleNamespace(write=lambda *arguments: None), raising=False)
    found = speed.measure_speed(demo_bundle, make, (1, 2), 4, None, lambda message: None, clock.now + 2.5)
    assert [(row["chunk_ms"], row["batch"]) for row in found["rows"]] == [(80, 1), (80, 2), (160, 1)]
    assert found["skipped_rows"] == 5 and len(made) == 2 and all(backend.closed for backend in made)
    assert not any("roofline_ms" in row for row in found["rows"])  # the bandwidth is not known


def test_steps_of_a_soak_test(demo_bundle: Bundle, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and failures of every step count; the memory after 100 steps, or half of them, is that of the end."""

    class Counting(Backend):
        allocating = 60  # steps, the first half

        @property
        def free_bytes(self) -> int:
            return 5000 + (len(self.batches) < self.allocating)

        def save(self, slot: int) -> Any:
            return [slot, len(self.batches)]

        def load(self, slot: int, state: Any) -> None:
            restored.append((slot, state))

        def reset_decoder(self, slots: np.ndarray) -> None:
            restored.append(slots.tolist())

        def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
            restored.append((sources.tolist(), targets.tolist()))

        def submit(self, batch: Batch) -> Pending:
            in_flight.append(len(self.batches) - self.collected)
            return super().submit(batch)

    restored: list[Any] = []
    in_flight: list[int] = []
    monkeypatch.setattr(speed, "random_phrases", lambda seed, tokens, vocabulary: f"phrases {seed}")
    backend = Counting(demo_bundle, clock, [0.001], capacity=4)
    backend.tokens, backend.failing = [2] * 120, 1
    found = speed.soak(backend, demo_bundle.manifest.chunk(80), 120)  # type: ignore[arg-type]
    assert found == {
        "steps": 120,
        "tokens": 240,
        "failed_rows": 120,
        "free_before": 5000,
        "free_after": 5000,
        "flat": True,
    }
    assert backend.collected == 120 and in_flight == [0] + [1] * 119  # one step is submitted while another runs
    assert len(restored) == 6  # every 50 steps
    for step, ((slot, state), reset, (sources, targets)) in ((49, restored[:3]), (99, restored[3:])):
        assert (state, reset, sources) == ([slot, step], [slot], [slot])
        assert len(targets) == 1 and targets != sources and targets[0] in range(4)
    # Each of four streams ends with a probability of 2 %: in 9 of 120 steps; about half of the new ones have phrases.
    assert backend.resets[0] == [0, 1, 2, 3] and 4 < len(backend.resets) < 18
    assert backend.phrases and set(backend.phrases) <= {0, 1, 2, 3}
    assert all(phrases.startswith("phrases") for phrases in backend.phrases.values())
    assert {len(batch.slots) for batch in backend.batches} == {1, 2, 3}
    for batch in backend.batches:
        assert 1 <= len(batch.slots) <= 3 and len(set(batch.slots.tolist())) == len(batch.slots)
    restored.clear()
    longer = Counting(demo_bundle, clock, [0.001], capacity=4)
    longer.allocating = 101
    found = speed.soak(longer, demo_bundle.manifest.chunk(80), 240)  # type: ignore[arg-type]
    assert (found["free_before"], found["free_after"], found["flat"]) == (5001, 5000, False)


def test_audio_of_a_soak_test(demo_bundle: Bundle, clock: Any) -> None:
    """The chunks of a stream follow each other in the clip, at the end of which they begin again; new streams do not
    continue the previous one, copied streams continue their source.
    """
    chunk, clip = demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest)[0]
    period, heads = len(clip) - chunk.samples, np.lib.stride_tricks.sliding_window_view(clip, 16)
    following: dict[int, int] = {}  # of each slot, the place in the clip
    ended: dict[int, int] = {}
    continued, repeated = [], 0

    class Following(Backend):
        free_bytes = 0
        save, load, reset_decoder = (lambda self, *arguments: None,) * 3

        def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
            if sources[0] in following:
                following[int(targets[0])] = following[int(sources[0])]
            else:
                following.pop(int(targets[0]), None)

        def reset(self, slots: np.ndarray) -> None:
            super().reset(slots)
            ended.update({slot: following.pop(slot) for slot in slots.tolist() if slot in following})

        def submit(self, batch: Batch) -> Pending:
            nonlocal repeated
            for slot, audio in zip(batch.slots.tolist(), batch.audio, strict=True):
                if slot in following:
                    start = following[slot]
                    assert np.array_equal(audio, clip[start : start + chunk.samples])
                else:
                    places = np.flatnonzero((heads == audio[:16]).all(axis=1)).tolist()
                    (start,) = [at for at in places if np.array_equal(audio, clip[at : at + chunk.samples])]
                    continued.append(start == ended.pop(slot, None))
                following[slot] = (start + chunk.samples) % period
                repeated += following[slot] < start
            return super().submit(batch)

    backend = Following(demo_bundle, clock, [0.001], capacity=4)
    speed.soak(backend, chunk, 120)  # type: ignore[arg-type]
    assert len(continued) > 8 and not any(continued) and repeated
