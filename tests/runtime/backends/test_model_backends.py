"""The public API on the GPU backend: results equal the CPU's, with decoder resets, phrases and resumed files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder

from nemostream.bundle import Bundle
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.model import Model
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.text.endpointing import Endpoint

CHUNKS = (80, 560)
needs_compiler = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")


@pytest.fixture(params=[pytest.param("kernels", marks=needs_compiler), pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "kernels":
        return HostDevice()
    from nemostream.errors import BackendError
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        return CudaDevice()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture
def both(talker: Bundle, device: Any) -> Iterator[tuple[Model, Model]]:
    """Return a model on the CPU and one on the GPU backend."""
    encoders = {ms: OrtEncoder(talker, talker.manifest.chunk(ms), device) for ms in CHUNKS}
    gpu = GpuBackend(talker, device, encoders, capacity=3)
    assert gpu.asynchronous
    with Model(talker, OrtBackend(talker, capacity=3, threads=1)) as cpu_model, Model(talker, gpu) as gpu_model:
        yield cpu_model, gpu_model


def final_events(events: list[Any]) -> list[tuple[Any, ...]]:
    return [
        (event.kind, event.utterance, event.text, event.start, event.end, event.reason)
        for event in events
        if event.kind != "partial"
    ]


def transcribe(model: Model, audio: np.ndarray, ms: int, **options: Any) -> list[tuple[Any, ...]]:
    with model.stream(chunk_ms=ms, **options) as stream:
        half = len(audio) // 2
        events = [
            event for at in range(0, half, 7000) for event in stream.push_events(audio[at : min(at + 7000, half)])
        ]
        events += stream.end_utterance()
        events += [
            event for at in range(half, len(audio), 30_000) for event in stream.push_events(audio[at : at + 30_000])
        ]
        return final_events(events + stream.finish_events())


def test_events_are_equal(both: tuple[Model, Model], clips: dict[str, np.ndarray]) -> None:
    cpu, gpu = both
    pause = np.zeros(16000, np.float32)
    audio = np.concatenate([clips["librivox-sense-0880"], pause, clips["cards-002"], pause, clips["cards-001"]])
    frequent = sorted(set(cpu.transcribe(audio).text.split()))[:3]
    cases: list[dict[str, Any]] = [
        {"endpoint": Endpoint(silence_ms=160, max_utterance_ms=1000)},
        {"endpoint": Endpoint(silence_ms=160, decoder="reset")},
        {"endpoint": Endpoint(silence_ms=160, decoder="reset"), "phrases": dict.fromkeys(frequent, 3.0)},
    ]
    for ms in CHUNKS:
        wanted = [transcribe(cpu, audio, ms, **case) for case in cases]
        assert wanted[0] != wanted[1] and all(len(events) > 4 for events in wanted)
        assert {event[-1] for events in wanted for event in events} >= {"silence", "forced", "finish"}
        with ThreadPoolExecutor(3) as pool:  # concurrently, so that steps are batched
            jobs = [pool.submit(transcribe, gpu, audio, ms, **case) for case in cases]
            assert [job.result(60) for job in jobs] == wanted


def test_resume(
    both: tuple[Model, Model], clips: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    _, gpu = both
    audio, state = np.tile(clips["librivox-sense-0870"], 3), tmp_path / "state"
    wanted = gpu.transcribe(audio, chunk_ms=560)
    left = 3

    def stop(seconds: float) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.transcribe(audio, chunk_ms=560, resume=state, on_progress=stop)
    assert state.exists()
    with gpu.stream() as other:  # the stream gets another slot
        other.push(audio[:20_000])
        assert gpu.transcribe(audio, chunk_ms=560, resume=state) == wanted
