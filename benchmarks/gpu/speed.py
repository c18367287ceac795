"""Speed and memory tests of the GPU backend. They run on any device, so that they can be tested without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.harness.random_weights import TOKENS_PER_SECOND
from nemostream.benchmarks.harness.records import Progress, percentile
from nemostream.benchmarks.harness.roofline import encoder_work
from nemostream.benchmarks.studies.features import random_phrases
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engines import speech
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.decoding.boosting import Boosting

_WARM_UP = 5  # steps

Report = dict[str, Any]


class NoEncoder:
    """An encoder that does nothing and leaves its outputs unchanged, to time the rest of a step."""

    capturable = True

    def __init__(self, cache_dtype: str) -> None:
        self.cache_dtype = cache_dtype

    def memory_bytes(self, rows: int) -> int:
        return 0

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None: ...


def soak(backend: GpuBackend, chunk: ChunkConfig, steps: int, seed: int = 0) -> Report:
    """Run `steps` steps in which streams start and end at random; free memory must stay the same.

    The number of rows is random. Half of the streams have phrases. Every 50 steps, the state of one stream is saved and
    loaded, its decoder is reset, and it is copied to the slot of another one.
    """
    rng = np.random.default_rng(seed)
    audio = speech(backend.manifest)[0]
    device, slots = backend.device, np.arange(backend.capacity)
    positions = rng.integers(0, len(audio) - chunk.samples, backend.capacity)
    backend.reset(slots)
    phrases = [random_phrases(seed, [], backend.manifest.decoder.vocabulary) for seed in range(16)]
    free_before, tokens, failed, pending = None, 0, 0, list[Any]()

    def collect() -> None:
        nonlocal tokens, failed
        emissions = pending.pop(0).result()
        tokens += len(emissions.all_tokens)
        failed += int(emissions.failed.sum())

    for step in range(steps):
        if step == min(100, steps // 2):
            free_before = device.free_bytes
        new = slots[rng.random(backend.capacity) < 0.02]
        if len(new):
            backend.reset(new)
            positions[new] = rng.integers(0, len(audio) - chunk.samples, len(new))
            for slot in new[rng.random(len(new)) < 0.5].tolist():
                backend.set_phrases(slot, phrases[rng.integers(len(phrases))])
        if step % 50 == 49:
            slot = int(rng.choice(slots))
            backend.load(slot, backend.save(slot))
            backend.reset_decoder(slots[slot : slot + 1])
            target = int(rng.choice(np.delete(slots, slot)))
            backend.copy(slots[slot : slot + 1], slots[target : target + 1])
            positions[target] = positions[slot]
        rows = np.sort(rng.choice(slots, rng.integers(1, min(backend.max_batch, backend.capacity) + 1), replace=False))
        samples = np.stack([audio[start : start + chunk.samples] for start in positions[rows]])
        positions[rows] = (positions[rows] + chunk.samples) % (len(audio) - chunk.samples)
        pending.append(backend.submit(Batch(chunk, rows, samples, np.full(len(rows), chunk.samples))))
        if len(pending) == 2:
            collect()
    while pending:
        collect()
    free_after = device.free_bytes
    return {
        "steps": steps,
        "tokens": tokens,
        "failed_rows": failed,
        "free_before": free_before,
        "free_after": free_after,
        "flat": free_before == free_after,
    }


def step_times(
    backend: GpuBackend,
    chunk: ChunkConfig,
    rows: int,
    repeats: int,
    gathered: bool = False,
    boosts: Sequence[Boosting] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Return the milliseconds from audio to tokens of steps with `rows` streams, one step at a time.

    With `gathered`, the slots are not the first ones, so that their caches must be gathered. The streams use the
    phrases `boosts` in turn.
    """
    slots = np.arange(rows) + (backend.capacity - rows if gathered else 0)
    clip = speech(backend.manifest)[0]
    starts = np.arange(rows) * 9973 % (len(clip) - chunk.samples)
    backend.reset(slots)
    for index, slot in enumerate(slots.tolist() if boosts else ()):
        backend.set_phrases(slot, boosts[index % len(boosts)])
    seconds, tokens = [], 0
    for step in range(_WARM_UP + repeats):
        positions = (starts + step * chunk.samples) % (len(clip) - chunk.samples)
        samples = np.stack([clip[start : start + chunk.samples] for start in positions])
        batch = Batch(chunk, slots, samples, np.full(rows, chunk.samples))
        start = clock()
        emissions = backend.submit(batch).result()
        seconds.append(clock() - start)
        tokens += len(emissions.all_tokens) if step >= _WARM_UP else 0
    milliseconds = 1000 * np.array(seconds[_WARM_UP:])
    return {
        "chunk_ms": chunk.ms,
        "batch": rows,
        "gathered": gathered,
        "repeats": repeats,
        "tokens_per_second": tokens / (rows * repeats * chunk.ms / 1000),
        "p50_ms": percentile(milliseconds.tolist(), 50),
        "p99_ms": percentile(milliseconds.tolist(), 99),
        "min_ms": float(milliseconds.min()),
        "raw_ms": milliseconds.round(4).tolist(),
    }


def device_times(
    backend: GpuBackend, chunk: ChunkConfig, rows: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> Report:
    """Return the milliseconds per step at full load, and the part of the host in `submit` and in reading the result.

    Steps are launched back to back with two in flight, as in a loaded server.
    """
    batch = _same_audio(backend, chunk, rows)
    pending = [backend.submit(batch)]
    host, start = 0.0, clock()
    for _ in range(repeats):
        begin = clock()
        pending.append(backend.submit(batch))
        host += clock() - begin
        step = pending.pop(0)
        assert step.event
        step.event.wait()
        begin = clock()
        step.result()
        host += clock() - begin
    total = clock() - start
    pending.pop().result()
    return {"pipelined_ms": 1000 * total / repeats, "host_ms": 1000 * host / repeats}


def stage_times(backend: GpuBackend, chunk: ChunkConfig, rows: int, repeats: int) -> Report:
    """Return the milliseconds on the device of the whole step, of a step without decoding, and of the encoder alone.

    Each is captured if possible and launched back to back. The whole step is omitted if the host takes part in its
    loop.
    """
    batch = _same_audio(backend, chunk, rows)
    backend.submit(batch).result()
    launches = backend.launches(batch)
    stages = {"encoder_ms": launches.encoder, "undecoded_ms": launches.undecoded}
    if launches.whole is not None:
        stages["whole_ms"] = launches.whole
    return {name: backend.device.elapsed_ms(work * 2 * repeats) / (2 * repeats) for name, work in stages.items()}


def copy_ms(backend: GpuBackend, repeats: int) -> float:
    """Return the milliseconds to copy one slot; copies are launched back to back."""
    source, target = np.array([0]), np.array([backend.capacity - 1])
    return backend.device.elapsed_ms([lambda: backend.copy(source, target)] * repeats) / repeats


def _same_audio(backend: GpuBackend, chunk: ChunkConfig, rows: int) -> Batch:
    """Reset the first slots and return a batch for them, to be launched repeatedly."""
    slots = np.arange(rows)
    audio = np.resize(speech(backend.manifest)[0], (rows, chunk.samples))
    backend.reset(slots)
    return Batch(chunk, slots, audio, np.full(rows, chunk.samples))


def calibrate_blank(backend: GpuBackend, bundle: Bundle, chunk: ChunkConfig, rows: int) -> float:
    """Set the bias of blank on the device so that streams emit about `TOKENS_PER_SECOND`. Return the resulting rate."""
    bias = np.array(bundle.weight("joint.out.bias"))
    low, high, tried = -40.0, 40.0, []
    for _ in range(12):
        bias[-1] = middle = (low + high) / 2
        backend.arena.write("joint_bias", bias)
        rate = step_times(backend, chunk, rows, 6)["tokens_per_second"]
        tried.append((abs(rate - TOKENS_PER_SECOND), middle, rate))
        low, high = (middle, high) if rate > TOKENS_PER_SECOND else (low, middle)
    _, bias[-1], rate = min(tried)  # with few streams, rates between 0 and a higher value may not occur
    backend.arena.write("joint_bias", bias)
    return rate


def fill_encoder_output(backend: GpuBackend) -> None:
    """Write random frames into the output of the encoder, for decoding without an encoder."""
    size = (int(backend.arena.step["max_pairs"]), backend.manifest.decoder.joint)
    frames = np.random.default_rng(0).standard_normal(size, np.float32)
    backend.arena.write("encoded", frames)


def force_blank(backend: GpuBackend, bundle: Bundle) -> NDArray[np.float32]:
    """Set the bias of blank so that no tokens are emitted. Return the previous biases [V + 1]."""
    before = np.empty(bundle.manifest.decoder.vocabulary + 1, np.float32)
    backend.arena.read("joint_bias", before)
    silent = before.copy()
    silent[-1] = 1e4
    backend.arena.write("joint_bias", silent)
    return before


def copy_rate(device: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the bytes per second read and written by copies of one gigabyte on the device; the best of eight."""
    size = 1 << 30
    first, second = device.allocate(size), device.allocate(size)
    best = 0.0
    for _ in range(8):
        device.record_event().wait()
        start = clock()
        for _ in range(8):
            device.copy(second, first, size)
        device.record_event().wait()
        best = max(best, 8 * 2 * size / (clock() - start))
    for memory in (first, second):
        device.free(memory)
    return best


def measure_speed(
    bundle: Bundle,
    make: Callable[[Bundle, Sequence[ChunkConfig], int], tuple[GpuBackend, str]],
    batches: Sequence[int],
    repeats: int,
    bandwidth: float | None,
    progress: Progress,
    deadline: float = float("inf"),
    save: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Return rows by chunk size and batch, and the number of streams that follows.

    `make` opens a backend for chunk sizes and a capacity, or a smaller one, and returns it with the name of its
    encoder. `bandwidth` is in bytes per second. No row is started after `deadline` (`time.perf_counter`);
    `skipped_rows` counts the missing rows and those of larger batches than the backend's. `save` is called with the
    rows so far after each row.
    """
    rows: list[Report] = []
    vocabulary = bundle.manifest.decoder.vocabulary
    phrases = [random_phrases(seed, [], vocabulary) for seed in range(min(64, max(batches)))]
    for chunk in bundle.manifest.chunks:
        if time.perf_counter() > deadline:
            break
        capacity = max(batches) + 1
        backend, encoder = make(bundle, [chunk], capacity)
        try:
            rate = calibrate_blank(backend, bundle, chunk, min(64, max(batches), backend.max_batch))
            copying = copy_ms(backend, repeats)
            work = encoder_work(bundle, chunk, "fp32" if backend.cache_dtype == "float32" else "fp16", "cuda")
            for batch in batches:
                if time.perf_counter() > deadline:
                    break
                if batch > backend.max_batch:
                    continue
                progress(f"{chunk.ms} ms, batch {batch}, encoder {encoder.partition(' (')[0]}")
                row = step_times(backend, chunk, batch, repeats) | device_times(backend, chunk, batch, repeats)
                row |= stage_times(backend, chunk, batch, repeats)
                gathered = step_times(backend, chunk, batch, repeats, gathered=True)
                row |= {f"gathered_{name}": gathered[name] for name in ("p50_ms", "p99_ms")}
                row["boosted_p50_ms"] = step_times(backend, chunk, batch, repeats, boosts=phrases)["p50_ms"]
                bias = force_blank(backend, bundle)
                row["silent_p50_ms"] = step_times(backend, chunk, batch, repeats)["p50_ms"]
                backend.arena.write("joint_bias", bias)
                row |= {"encoder": encoder, "calibrated_tokens_per_second": rate}
                row |= {"bytes_per_stream": backend.bytes_per_stream, "copy_ms": copying}
                if bandwidth:
                    row["roofline_ms"] = 1000 * work.weight_bytes / bandwidth
                rows.append(row)
                save({"rows": rows})
        finally:
            backend.close()
    skipped = len(bundle.manifest.chunks) * len(batches) - len(rows)
    return {
        "rows": rows,
        "skipped_rows": skipped,
        "streams": {ms: _streams(rows, ms) for ms in {row["chunk_ms"] for row in rows}},
    }


def _streams(rows: Iterable[Report], ms: int) -> int:
    """Return the maximum number of streams whose steps, one batch after another, have a p99 within one chunk.

    Only the first batch uses the first slots; the caches of the others must be gathered.
    """
    fits = [
        row["batch"] * (1 + int((ms - row["p99_ms"]) // row["gathered_p99_ms"]))
        for row in rows
        if row["chunk_ms"] == ms and row["p99_ms"] <= ms
    ]
    return max(fits, default=0)
