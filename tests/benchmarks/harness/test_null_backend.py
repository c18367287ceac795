"""The backend without a model: what it emits, when its steps are complete, and its twin on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nemostream.benchmarks.harness import null_backend
from nemostream.benchmarks.harness.null_backend import NullBackend, script, tokens_before
from nemostream.benchmarks.harness.null_device import NullDevice, NullEncoder
from nemostream.bundle import Bundle
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import Endpoint, RepetitionGuard

SCRIPT = np.arange(100, 184, dtype=np.int32)  # three periods


def batch(bundle: Bundle, chunk_ms: int, *slots: int) -> Batch:
    chunk, rows = bundle.manifest.chunk(chunk_ms), len(slots)
    audio = np.zeros((rows, chunk.samples), np.float32)
    return Batch(chunk, np.array(slots), audio, np.full(rows, chunk.samples))


def emitted(backend: NullBackend, bundle: Bundle, chunk_ms: int, *slots: int) -> list[list[tuple[int, int]]]:
    """Return frame and token of each emission of each row of a step."""
    found = backend.submit(batch(bundle, chunk_ms, *slots)).result()
    return [
        list(zip(frames.tolist(), tokens.tolist(), strict=True))
        for frames, tokens in zip(found.frames, found.tokens, strict=True)
    ]


def test_rate() -> None:
    """A token in every third frame of the first 84 of 100."""
    at = {0: 0, 1: 1, 3: 1, 4: 2, 81: 27, 82: 28, 99: 28, 100: 28, 101: 29, 250: 56 + 17}
    assert tokens_before(np.array(list(at))).tolist() == list(at.values())
    assert tokens_before(np.array([12_500]))[0] == 3500  # 1000 s with frames of 80 ms


def test_emissions(demo_bundle: Bundle) -> None:
    """Streams have their own places; sizes of chunks and batches do not matter."""
    backend = NullBackend(demo_bundle.manifest, SCRIPT, 4)
    assert emitted(backend, demo_bundle, 80, 2) == [[(0, 100)]]
    assert emitted(backend, demo_bundle, 80, 2) == [[]]
    assert emitted(backend, demo_bundle, 560, 0, 2) == [[(0, 100), (3, 101), (6, 102)], [(3, 101), (6, 102)]]
    assert emitted(backend, demo_bundle, 560, 2) == [[(9, 103), (12, 104), (15, 105)]]
    backend.copy(np.array([2, 0]), np.array([1, 3]))
    assert emitted(backend, demo_bundle, 80, 1, 3) == [[], []]
    assert emitted(backend, demo_bundle, 560, 1, 2) == [[(18, 106), (21, 107)], [(18, 106), (21, 107)]]
    backend.reset(np.array([2]))
    assert emitted(backend, demo_bundle, 560, 2) == [[(0, 100), (3, 101), (6, 102)]]


def test_script_is_repeated(demo_bundle: Bundle) -> None:
    backend = NullBackend(demo_bundle.manifest, SCRIPT, 1)
    tokens = [token for _ in range(50) for _, token in emitted(backend, demo_bundle, 560, 0)[0]]
    assert tokens == (SCRIPT.tolist() * 2)[:101]  # 350 frames: three periods, and 17 tokens in 50 frames


def test_state_is_saved(demo_bundle: Bundle) -> None:
    backend = NullBackend(demo_bundle.manifest, SCRIPT, 2)
    emitted(backend, demo_bundle, 560, 0)
    backend.load(1, backend.save(0))
    first, second = emitted(backend, demo_bundle, 560, 0, 1)
    assert first == second == [(9, 103), (12, 104)]


def test_spread_streams_are_at_different_places(demo_bundle: Bundle) -> None:
    """Slot s is 37 s frames further in its text, and its own frames count from 0."""
    backend = NullBackend(demo_bundle.manifest, SCRIPT, 8, spread=True)
    rows = emitted(backend, demo_bundle, 560, *range(8))
    assert rows[0] == [(0, 100), (3, 101), (6, 102)]
    assert rows[1] == [(2, 113), (5, 114)]  # frames 37 ... 43: tokens at 39 and 42
    assert rows[7] == [(1, 176), (4, 177)]  # frames 259 ... 265: of the third period 59 ... 65, tokens at 60 and 63


@pytest.mark.parametrize("asynchronous", [True, False])
def test_duration_of_steps(asynchronous: bool, demo_bundle: Bundle, clock: Any) -> None:
    """The device runs one step after another; a synchronous backend waits in `submit`."""
    backend = NullBackend(
        demo_bundle.manifest, SCRIPT, 2, asynchronous=asynchronous, step_ms=10.0, clock=clock, sleep=clock.sleep
    )
    start, times = clock(), list[float]()
    steps = []
    for _ in range(2):
        steps.append(backend.submit(batch(demo_bundle, 80, 0, 1)))
        times.append(round(clock() - start, 6))
    for step in steps:
        step.result()
        times.append(round(clock() - start, 6))
    assert times == ([0.0, 0.0, 0.01, 0.02] if asynchronous else [0.01, 0.02, 0.02, 0.02])
    clock.sleep(1.0)  # an idle device starts the next step at once
    backend.submit(batch(demo_bundle, 80, 0, 1)).result()
    assert clock() - start == pytest.approx(1.03)


def test_script_has_words(demo_bundle: Bundle) -> None:
    tokens = script(demo_bundle)
    assert len(tokens) % null_backend.PERIOD_TOKENS == 0
    assert len(tokens) > RepetitionGuard.CYCLE  # a shorter cycle would be taken for a decoder that repeats itself
    assert tokens.min() >= 0 and tokens.max() < demo_bundle.manifest.decoder.vocabulary


@pytest.mark.parametrize("asynchronous", [True, False])
def test_streams_of_a_model(asynchronous: bool, demo_bundle: Bundle) -> None:
    """A stream has the text of the script, and its pauses end utterances."""
    backend = NullBackend(demo_bundle.manifest, script(demo_bundle), 2, asynchronous=asynchronous)
    noise = 0.1 * np.random.default_rng(0).standard_normal(20 * 16000).astype(np.float32)
    with Model(demo_bundle, backend, 80) as model:
        events = list(model.listen(noise, endpoint=Endpoint(800)))
    ends = [event for event in events if event.kind == "end"]
    # The last token of a period begins with frame 81; the utterance ends 12 frames later.
    assert [(round(end.end, 2), end.reason) for end in ends[:2]] == [(7.44, "silence"), (15.44, "silence")]
    text = " ".join(event.text for event in events if event.kind == "final")
    assert text.startswith("please call me on the fifth of march at twenty past seven")
    assert "<" not in text and "⁇" not in text


# -- the device --------------------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> NullDevice:
    ticks = iter(range(1 << 30))
    return NullDevice(lambda: next(ticks))


def test_gpu_backend_emits_tokens(device: NullDevice, demo_bundle: Bundle) -> None:
    """The tokens of rows with a stream, at the usual rate, in the order of the backend's rows."""
    backend = GpuBackend(demo_bundle, device, {560: NullEncoder()}, 20, 8)
    assert backend.loop == "while" and backend.failures == []
    slots, count = [1, 3, 4, 9, 19], 0
    for _ in range(40):
        found = backend.submit(batch(demo_bundle, 560, *slots)).result()
        assert len(found.tokens) == 5 and not found.failed.any()
        assert all(len(row) in (0, 1, 2, 3) for row in found.tokens)
        assert [len(row) for row in found.frames] == [len(row) for row in found.tokens]
        count += sum(map(len, found.tokens))
    assert count == pytest.approx(40 * 5 * 7 * 0.28, rel=0.05)
    backend.close()
    assert not device.memory


def test_time_of_the_device_is_measured(device: NullDevice, demo_bundle: Bundle) -> None:
    backend = GpuBackend(demo_bundle, device, {80: NullEncoder()}, 4, 4)
    before = device.seconds
    backend.submit(batch(demo_bundle, 80, 0, 1, 2, 3)).result()
    assert device.seconds - before == 1  # from one reading of the clock to the next
