"""Times of steps, of their parts and of pushes, from work that takes known times on a controlled clock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream.benchmarks import latency
from nemostream.benchmarks.harness.roofline import Machine, Work
from nemostream.benchmarks.harness.timed import AudioFeed
from nemostream.bundle import Bundle
from nemostream.engines import speech
from nemostream.errors import OptionError
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import GpuBackend

pytest.importorskip("onnx", reason="needs the build extra")

SECONDS = {"encode": 0.5, "features": 1.0, "encoder": 8.0, "decoder": 0.25, "joint": 0.125, "submit": 2.0}


def test_parts_of_a_step(demo_bundle: Bundle, clock: Any) -> None:
    """The stages of the CPU backend take known seconds: *copies* is the rest of `encode`, *host* that of the step."""
    chunk = demo_bundle.manifest.chunk(560)
    backend = OrtBackend(demo_bundle, 2)
    feed = AudioFeed(demo_bundle.manifest, speech(demo_bundle.manifest)[1], 2, 8 * chunk.frames)
    calls: list[str] = []
    slow = 100.0  # the warm-up steps take this many seconds more

    def stage(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def known(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            clock.sleep(SECONDS[name])
            return work(*arguments, **options)

        return known

    submit = backend.submit

    def slow_submit(batch: Batch) -> Any:
        calls.append("step")
        clock.sleep(SECONDS["submit"] + (slow if calls.count("step") <= 3 else 0))
        return submit(batch)

    backend.submit = slow_submit  # type: ignore[method-assign]
    with backend.wrapped_stages(chunk, stage):
        times, launches = latency._step_times(backend, feed, chunk, 3, 4, clock)
    starts = [index for index, name in enumerate(calls) if name == "step"]
    steps = [calls[start:end] for start, end in zip(starts, [*starts[1:], len(calls)], strict=True)]
    assert len(steps) == 7
    decoding = [sum(SECONDS[name] for name in step if name in ("decoder", "joint")) for step in steps[3:]]
    assert len(set(decoding)) > 1  # steps with different numbers of tokens
    assert times["features"] == pytest.approx([1000.0] * 4)
    assert times["encoder"] == pytest.approx([8000.0] * 4)
    assert times["copies"] == pytest.approx([500.0] * 4)
    assert times["host"] == pytest.approx([2000.0] * 4)
    assert times["decode"] == pytest.approx([1000 * seconds for seconds in decoding])
    assert times["step"] == pytest.approx([1000 * (11.5 + seconds) for seconds in decoding])
    # Calls into ONNX Runtime: all but the two that only surround others.
    assert launches == sum(len(step) - 2 for step in steps[3:]) / 4


def test_steps_are_consecutive(demo_bundle: Bundle, clock: Any) -> None:
    chunk, batches = demo_bundle.manifest.chunk(160), list[Batch]()
    feed = AudioFeed(demo_bundle.manifest, speech(demo_bundle.manifest)[1], 1, 10)

    class Backend:
        def submit(self, batch: Batch) -> Any:
            batches.append(batch)
            clock.sleep(0.001 * len(batches))
            return SimpleNamespace(result=lambda: clock.sleep(0.5))

    times, launches = latency._step_times(Backend(), feed, chunk, 2, 3, clock)  # type: ignore[arg-type]
    assert times["step"] == pytest.approx([503.0, 504.0, 505.0]) and launches == 0
    assert all(times[part] == [] for part in latency.PARTS)
    for step, batch in enumerate(batches):
        assert np.array_equal(batch.audio, feed.batch(chunk, 2 * step).audio)


def test_push_is_timed_from_the_audio_of_each_stream_to_its_result(demo_bundle: Bundle, clock: Any) -> None:
    """Feeding takes 1 ms; each stream waits 10 ms for its own result, after those of the streams before it."""
    manifest, chunk = demo_bundle.manifest, demo_bundle.manifest.chunk(160)
    feed = AudioFeed(manifest, speech(manifest)[1], 3, 10)
    sessions: list[Session] = []

    class Session:
        def __init__(self) -> None:
            self.received: list[np.ndarray] = []
            self.collected, self.closed = 0, False

        def feed(self, pcm: np.ndarray) -> None:
            clock.sleep(0.001)
            self.received.append(pcm)

        def wait(self) -> None:
            clock.sleep(0.010 if len(self.received) > 2 else 5.0)

        def collect(self) -> None:
            self.collected += 1

        def close(self) -> None:
            self.closed = True

    def open_session(rate: int, channels: int, *, chunk_ms: int) -> Session:
        assert (rate, channels, chunk_ms) == (16000, 1, 160)
        sessions.append(Session())
        return sessions[-1]

    model: Any = SimpleNamespace(manifest=manifest, open_session=open_session)
    times = latency.push_times(model, feed, chunk, 2, 2, clock)
    assert times == pytest.approx([13.0, 22.0, 31.0] * 2)
    for row, session in enumerate(sessions):
        assert session.closed and session.collected == 4
        assert [len(pcm) for pcm in session.received] == [2560 - manifest.lead, 2560, 2560, 2560]
        pcm = np.concatenate(session.received)
        assert pcm.dtype == np.int16
        assert np.abs(pcm / 32767 - feed.audio[row, : len(pcm)]).max() < 1 / 32767


def test_stages_on_a_device(demo_bundle: Bundle) -> None:
    """Times between events: begin and features 3 ms, gather 0.5, encoder 4, scatter 1.5; the whole step 11 ms."""
    chunk = demo_bundle.manifest.chunk(160)
    feed = AudioFeed(demo_bundle.manifest, speech(demo_bundle.manifest)[1], 1, 10)
    milliseconds = {"begin": 1.0, "features": 2.0, "gather": 0.5, "encoder": 4.0, "scatter": 1.5, "finish": 99.0}
    log: list[Any] = []

    class Backend:
        def __init__(self) -> None:
            self.device, self.elapsed = self, 0.0

        def elapsed_ms(self, work: Iterable[Callable[[], None]]) -> float:
            self.elapsed = 0.0
            for run in work:
                run()
            return self.elapsed

        def submit(self, batch: Batch) -> Any:
            self.elapsed += 11.0
            log.append(batch)
            return SimpleNamespace(result=lambda: log.append("result"), launches=7)

        def stages(self, batch: Batch) -> dict[str, Callable[[], None]]:
            assert batch is log[-2] and log[-1] == "result"  # of the chunk again
            return {name: self._stage(name) for name in milliseconds}

        def _stage(self, name: str) -> Callable[[], None]:
            def run() -> None:
                self.elapsed += milliseconds[name]
                log.append(name)

            return run

        def record_event(self) -> Any:
            return SimpleNamespace(wait=lambda: log.append("waited"))

    times, launches = latency._device_times(Backend(), feed, chunk, range(3, 5))  # type: ignore[arg-type]
    assert times == {
        "device": [11.0] * 2,
        "features": [3.0] * 2,
        "encoder": [4.0] * 2,
        "decode": [2.0] * 2,
        "copies": [2.0] * 2,
    }
    assert launches == 7
    per_step = ["result", *milliseconds, "waited"]
    assert [each for each in log if isinstance(each, str)] == per_step * 2
    for step, batch in zip((3, 4), (each for each in log if not isinstance(each, str)), strict=True):
        assert np.array_equal(batch.audio, feed.batch(chunk, 2 * step).audio)


def test_decoding_on_a_device_is_not_negative() -> None:
    """The stages, launched one by one, may take longer than the whole step."""

    class Backend:
        device: Any
        stages = staticmethod(
            lambda batch: {n: lambda: None for n in ("begin", "features", "gather", "encoder", "scatter", "finish")}
        )
        submit = staticmethod(lambda batch: SimpleNamespace(result=lambda: None, launches=1))

    def elapsed_ms(work: Iterable[Callable[[], None]]) -> float:
        for run in work:
            run()
        return 2.0

    backend: Any = Backend()
    backend.device = SimpleNamespace(elapsed_ms=elapsed_ms, record_event=lambda: SimpleNamespace(wait=lambda: None))
    feed: Any = SimpleNamespace(batch=lambda chunk, position: None)
    times, _ = latency._device_times(backend, feed, SimpleNamespace(frames=1), range(1))  # type: ignore[arg-type]
    assert times["decode"] == [0.0]


def test_row_of_a_case(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of 70 frames are full after 10 chunks of 7 frames, so 15 steps are not timed."""
    chunk = demo_bundle.manifest.chunk(560)
    calls: dict[str, Any] = {}

    class Backend:
        bytes_per_stream = 1234

        def reset(self, slots: np.ndarray) -> None:
            calls["reset"] = slots.tolist()

    def step_times(backend: Any, feed: AudioFeed, chunk: Any, warm_up: int, repeats: int) -> Any:
        calls["step"] = (feed.rows, feed.audio.shape[1], chunk.ms, warm_up, repeats)
        return {"step": [4.0, 5.0]}, 6.5

    def push_times(model: Any, feed: AudioFeed, chunk: Any, warm_up: int, repeats: int) -> list[float]:
        calls["push"] = (feed.rows, chunk.ms, warm_up, repeats)
        return [7.0]

    class Model:
        def __init__(self, bundle: Bundle, backend: Any, ms: int) -> None:
            assert ms == 560 and bundle is demo_bundle and backend.bytes_per_stream == 1234
            backend.close()  # does not close the measured backend, which has no such method

        def __enter__(self) -> Model:
            return self

        def __exit__(self, *error: object) -> None: ...

    class OtherWork:
        def cores(self) -> float:
            return 0.01234

    def encoder_work(bundle: Bundle, chunk: Any, precision: str, device: str) -> Work:
        assert (chunk.ms, precision, device) == (560, "int8", "cpu")
        return Work(3_000_000, 2e6)

    replaced = {"_step_times": step_times, "push_times": push_times, "encoder_work": encoder_work}
    for name, value in {**replaced, "Model": Model, "OtherWork": OtherWork}.items():
        monkeypatch.setattr(latency, name, value)
    case = {"chunk_ms": 560, "batch": 3, "precision": "int8", "backend": "cpu"}
    machine = Machine(1e9, {"int8": 1e9}, {})
    row = latency._measure(demo_bundle, Backend(), chunk, case, 20, machine)  # type: ignore[arg-type]
    assert row["case"] == case and row["ms"] == {"step": [4.0, 5.0], "push": [7.0]}
    assert row["values"] == {
        "bytes_per_stream": 1234,
        "launches": 6.5,
        # 3 MB at 1 GB/s; 3 rows of 2 million operations at 1 GFLOP/s
        "roofline_ms": {"memory": 3.0, "compute": 6.0, "roofline": 6.0, "bound_by": "compute"},
        "other_work_cores": 0.012,
    }
    samples = (10 + 2 * (5 + 20)) * chunk.samples
    assert calls == {"reset": [0, 1, 2], "step": (3, samples, 560, 15, 20), "push": (3, 560, 15, 20)}

    class Gpu(GpuBackend):
        bytes_per_stream = 1234  # type: ignore[assignment]

        def __init__(self) -> None: ...

        def reset(self, slots: np.ndarray) -> None: ...

    def device_times(backend: Any, feed: AudioFeed, chunk: Any, steps: range) -> Any:
        calls["device"] = (chunk.ms, steps)
        return {"device": [3.0]}, 9

    def gpu_work(bundle: Bundle, chunk: Any, precision: str, device: str) -> Work:
        assert device == "cuda"
        return Work(1_000_000, 1.0)

    monkeypatch.setattr(latency, "_device_times", device_times)
    monkeypatch.setattr(latency, "encoder_work", gpu_work)
    row = latency._measure(demo_bundle, Gpu(), chunk, case, 20, machine)
    assert row["ms"] == {"step": [4.0, 5.0], "device": [3.0], "push": [7.0]}
    assert calls["device"] == (560, range(35, 55)) and row["values"]["launches"] == 9  # after the timed steps
    assert row["values"]["roofline_ms"]["memory"] == 1.0


def test_cases_of_several_devices(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device runs the precisions that it supports, with the rates of its own machine, measured once."""
    opened, measured, rated, engines = list[Any](), list[Any](), list[Any](), Path("engines")

    @contextlib.contextmanager
    def timed_backend(bundle: Bundle, chunks: Any, precision: str, rows: int, **options: Any) -> Any:
        assert bundle is demo_bundle and options["engines"] == engines
        opened.append((options["device"], precision, [chunk.ms for chunk in chunks], rows, options["threads"]))
        yield options["device"]

    def measure_for(backend: str, threads: int) -> Machine:
        rated.append((backend, threads))
        return Machine(1.0, {}, {backend: 5.0})

    def measure(bundle: Bundle, backend: Any, chunk: Any, case: Any, repeats: int, machine: Machine) -> Any:
        measured.append((*case.values(), repeats, *machine.rates))
        return {"case": case}

    monkeypatch.setattr(latency, "gc", SimpleNamespace(collect=lambda: None))  # slow in a process with PyTorch
    monkeypatch.setattr(latency, "timed_backend", timed_backend)
    monkeypatch.setattr(latency, "measure_for", measure_for)
    monkeypatch.setattr(latency, "_measure", measure)
    devices = ("cpu", "cuda:onnxruntime", "cuda")
    precisions, options = ("int8", "fp16"), {"devices": devices, "threads": 2, "engines": engines}
    result = latency.measure_latency(demo_bundle, precisions, (1, 3), (80, 560), 7, **options)  # type: ignore[arg-type]
    cases = [("cpu", "int8", "cpu"), ("cuda:onnxruntime", "fp16", "cuda:onnxruntime")]
    cases += [("cuda", "int8", "cuda:onnxruntime"), ("cuda", "fp16", "cuda:onnxruntime")]
    assert opened == [(device, precision, [ms], 3, 2) for device, precision, _ in cases for ms in (80, 560)]
    assert measured == [
        (ms, batch, precision, device, 7, rates)
        for device, precision, rates in cases
        for ms in (80, 560)
        for batch in (1, 3)
    ]
    assert rated == [("cpu", 2), ("cuda:onnxruntime", 2)]  # the GPU once
    assert result["benchmark"] == "latency" and len(result["rows"]) == 16
    assert result["rows"][0]["case"] == {"chunk_ms": 80, "batch": 1, "precision": "int8", "backend": "cpu"}
    assert result["method"] == {
        "repeats": 7,
        "warm_up": 5,
        "threads": 2,
        "device": "cpu cuda:onnxruntime cuda",
        "machine": {"cpu": {"cpu": 5.0}, "cuda": {"cuda:onnxruntime": 5.0}},
    }
    given = Machine(9.0, {}, {"given": 1.0})
    latency.measure_latency(demo_bundle, machine=given, engines=engines)
    assert measured[-1] == (1120, 4, "fp32", "cpu", 50, "given") and len(rated) == 2
    for invalid in ({"repeats": 0}, {"batches": (1, 0)}, {"batches": ()}):
        with pytest.raises(OptionError, match="at least 1"):
            latency.measure_latency(demo_bundle, **invalid)
