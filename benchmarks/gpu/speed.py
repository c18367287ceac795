"""How long steps on a GPU take, and whether they leak. Any device will do, so that it is tested without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.harness.roofline import encoder_work
from nemostream.benchmarks.studies.features import some_phrases
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engines import speech
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.decoding.boosting import Boosting

TOKENS_PER_SECOND = 3.5
_WARM_UP = 5

Report = dict[str, Any]


class NoEncoder:
    """Leaves whatever is in its outputs: a step without it is all that is ours."""

    capturable = True

    def __init__(self, cache_dtype: str) -> None:
        self.cache_dtype = cache_dtype

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None: ...


def soak(backend: GpuBackend, chunk: ChunkConfig, steps: int, seed: int = 0) -> Report:
    """Streams come, speak for a while and go; some steps have few rows, some all. Free memory must be what it was.

    Half of them have phrases; now and then one forgets what it said, or is saved and goes on from there.
    """
    rng = np.random.default_rng(seed)
    audio = speech(backend.manifest)[0]
    device, slots = backend.device, np.arange(backend.capacity)
    at = rng.integers(0, len(audio) - chunk.samples, backend.capacity)
    backend.reset(slots)
    lists = [some_phrases(number, [], backend.manifest.decoder.vocabulary) for number in range(16)]
    before, said, failed, pending = None, 0, 0, []
    for step in range(steps):
        if step == min(100, steps // 2):
            before = device.free_bytes
        coming = slots[rng.random(backend.capacity) < 0.02]
        if len(coming):
            backend.reset(coming)
            at[coming] = rng.integers(0, len(audio) - chunk.samples, len(coming))
            for slot in coming[rng.random(len(coming)) < 0.5].tolist():
                backend.set_phrases(slot, lists[rng.integers(len(lists))])
        if step % 50 == 49:
            slot = int(rng.choice(slots))
            backend.load(slot, backend.save(slot))
            backend.reset_decoder(slots[slot : slot + 1])
        rows = np.sort(rng.choice(slots, rng.integers(1, min(backend.max_batch, backend.capacity) + 1), replace=False))
        part = np.stack([audio[start : start + chunk.samples] for start in at[rows]])
        at[rows] = (at[rows] + chunk.samples) % (len(audio) - chunk.samples)
        pending.append(backend.submit(Batch(chunk, rows, part, np.full(len(rows), chunk.samples))))
        if len(pending) == 2:
            emissions = pending.pop(0).result()
            said += sum(map(len, emissions.tokens))
            failed += int(emissions.failed.sum())
    for left in pending:
        left.result()
    after = device.free_bytes
    return {
        "steps": steps,
        "tokens": said,
        "failed_rows": failed,
        "free_before": before,
        "free_after": after,
        "flat": before == after,
    }


def step_times(
    backend: GpuBackend,
    chunk: ChunkConfig,
    rows: int,
    repeats: int,
    gathered: bool = False,
    boosts: Sequence[Boosting] = (),
) -> Report:
    """Milliseconds from audio to tokens of `rows` streams, one step at a time.

    `gathered` uses slots that are not the first ones, so that their caches must be copied together. `boosts` are handed
    out to the streams in turn.
    """
    slots = np.arange(rows) + (backend.capacity - rows if gathered else 0)
    clip = speech(backend.manifest)[0]
    starts = np.arange(rows) * 9973 % (len(clip) - chunk.samples)
    backend.reset(slots)
    for index, slot in enumerate(slots.tolist() if boosts else ()):
        backend.set_phrases(slot, boosts[index % len(boosts)])
    seconds, said = [], 0
    for step in range(_WARM_UP + repeats):
        at = (starts + step * chunk.samples) % (len(clip) - chunk.samples)
        part = np.stack([clip[start : start + chunk.samples] for start in at])
        batch = Batch(chunk, slots, part, np.full(rows, chunk.samples))
        start = time.perf_counter()
        emissions = backend.submit(batch).result()
        seconds.append(time.perf_counter() - start)
        said += sum(map(len, emissions.tokens)) if step >= _WARM_UP else 0
    milliseconds = 1000 * np.array(seconds[_WARM_UP:])
    return {
        "chunk_ms": chunk.ms,
        "batch": rows,
        "gathered": gathered,
        "repeats": repeats,
        "tokens_per_second": said / (rows * repeats * chunk.ms / 1000),
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "min_ms": float(milliseconds.min()),
        "raw_ms": milliseconds.round(4).tolist(),
    }


def device_times(backend: GpuBackend, chunk: ChunkConfig, rows: int, repeats: int) -> Report:
    """Milliseconds a step by throughput: launched back to back, two in flight, as a loaded server does; and of that
    what the host spends on it, in `submit` and in reading the result."""
    batch = _same_audio(backend, chunk, rows)
    pending = [backend.submit(batch)]
    host, start = 0.0, time.perf_counter()
    for _ in range(repeats):
        begin = time.perf_counter()
        pending.append(backend.submit(batch))
        host += time.perf_counter() - begin
        step = pending.pop(0)
        assert step.event
        step.event.wait()
        begin = time.perf_counter()
        step.result()
        host += time.perf_counter() - begin
    total = time.perf_counter() - start
    pending.pop().result()
    return {"pipelined_ms": 1000 * total / repeats, "host_ms": 1000 * host / repeats}


def stage_times(backend: GpuBackend, chunk: ChunkConfig, rows: int, repeats: int) -> Report:
    """Milliseconds on the device of the step as it is launched, of one that decodes nothing, and of the encoder alone.

    Each recorded, where that is possible, and launched back to back. Where the host has a part in the loop the whole
    step is left out.
    """
    batch = _same_audio(backend, chunk, rows)
    backend.submit(batch).result()
    launches = backend.launches(batch)
    stages = {"encoder_ms": launches.encoder, "undecoded_ms": launches.undecoded}
    if launches.whole is not None:
        stages["whole_ms"] = launches.whole
    return {name: backend.device.elapsed_ms(work * 2 * repeats) / (2 * repeats) for name, work in stages.items()}


def _same_audio(backend: GpuBackend, chunk: ChunkConfig, rows: int) -> Batch:
    """A batch of the first slots, which are reset for it, to be launched over and over."""
    slots = np.arange(rows)
    audio = np.resize(speech(backend.manifest)[0], (rows, chunk.samples))
    backend.reset(slots)
    return Batch(chunk, slots, audio, np.full(rows, chunk.samples))


def settle_blank(backend: GpuBackend, bundle: Bundle, chunk: ChunkConfig, rows: int) -> float:
    """Make the streams say about `TOKENS_PER_SECOND`, by blank's bias on the device; what they say then."""
    bias = np.array(bundle.weight("joint.out.bias"))
    low, high, tried = -40.0, 40.0, []
    for _ in range(12):
        bias[-1] = middle = (low + high) / 2
        backend.arena.write("joint_bias", bias)
        rate = step_times(backend, chunk, rows, 6)["tokens_per_second"]
        tried.append((abs(rate - TOKENS_PER_SECOND), middle, rate))
        low, high = (middle, high) if rate > TOKENS_PER_SECOND else (low, middle)
    _, bias[-1], rate = min(tried)  # few streams say more or nothing, and little in between
    backend.arena.write("joint_bias", bias)
    return rate


def give_frames(backend: GpuBackend) -> None:
    """Without an encoder there are frames to decode all the same: random ones, the same in every step."""
    size = (int(backend.arena.step["max_pairs"]), backend.manifest.decoder.joint)
    frames = np.random.default_rng(0).standard_normal(size, np.float32)
    backend.arena.write("encoded", frames)


def hush(backend: GpuBackend, bundle: Bundle) -> NDArray[np.float32]:
    """Let nobody say anything; the biases before."""
    before = np.empty(bundle.manifest.decoder.vocabulary + 1, np.float32)
    backend.arena.read("joint_bias", before)
    silent = before.copy()
    silent[-1] = 1e4
    backend.arena.write("joint_bias", silent)
    return before


def copy_rate(device: Any) -> float:
    """Bytes per second read and written by a copy on the device, the best of a few gigabytes."""
    size = 1 << 30
    first, second = device.allocate(size), device.allocate(size)
    best = 0.0
    for _ in range(8):
        device.record_event().wait()
        start = time.perf_counter()
        for _ in range(8):
            device.copy(second, first, size)
        device.record_event().wait()
        best = max(best, 8 * 2 * size / (time.perf_counter() - start))
    for memory in (first, second):
        device.free(memory)
    return best


def speed(
    bundle: Bundle,
    make: Callable[[Bundle, Sequence[ChunkConfig], int], tuple[GpuBackend, str]],
    batches: Sequence[int],
    repeats: int,
    bandwidth: float | None,
    say: Callable[[str], None],
    until: float = float("inf"),
    keep: Callable[[Report], None] = lambda found: None,
) -> Report:
    """Rows per chunk size and batch. `make` opens a backend for chunk sizes and a capacity, and names its encoder.

    At `until` (`time.perf_counter`) no more rows are begun; how many were left out is told. `keep` gets what there is
    after each row.
    """
    rows: list[Report] = []
    lists = [some_phrases(number, [], bundle.manifest.decoder.vocabulary) for number in range(min(64, max(batches)))]
    for chunk in bundle.manifest.chunks:
        if time.perf_counter() > until:
            break
        capacity = max(batches) + 1
        backend, encoder = make(bundle, [chunk], capacity)
        try:
            rate = settle_blank(backend, bundle, chunk, min(64, max(batches)))
            work = encoder_work(bundle, chunk, "fp32" if backend.cache_dtype == "float32" else "fp16", "cuda")
            for batch in batches:
                if time.perf_counter() > until:
                    break
                say(f"{chunk.ms} ms, batch {batch}, encoder {encoder.partition(' (')[0]}")
                row = step_times(backend, chunk, batch, repeats) | device_times(backend, chunk, batch, repeats)
                row |= stage_times(backend, chunk, batch, repeats)
                gathered = step_times(backend, chunk, batch, repeats, gathered=True)
                row |= {f"gathered_{name}": gathered[name] for name in ("p50_ms", "p99_ms")}
                row["boosted_p50_ms"] = step_times(backend, chunk, batch, repeats, boosts=lists)["p50_ms"]
                bias = hush(backend, bundle)
                row["silent_p50_ms"] = step_times(backend, chunk, batch, repeats)["p50_ms"]
                backend.arena.write("joint_bias", bias)
                row |= {"encoder": encoder, "settled_tokens_per_second": rate}
                row["bytes_per_stream"] = backend.bytes_per_stream
                if bandwidth:
                    row["floor_ms"] = 1000 * work.weight_bytes / bandwidth
                rows.append(row)
                keep({"rows": rows})
        finally:
            backend.close()
    left_out = len(bundle.manifest.chunks) * len(batches) - len(rows)
    return {
        "rows": rows,
        "left_out_for_time": left_out,
        "streams": {ms: _streams(rows, ms) for ms in {row["chunk_ms"] for row in rows}},
    }


def _streams(rows: Iterable[Report], ms: int) -> int:
    """Most streams whose steps, one batch after another, have their slowest percent within one chunk.

    Only the first batch has the first slots; of the others the caches must be gathered.
    """
    fits = [
        row["batch"] * (1 + int((ms - row["p99_ms"]) // row["gathered_p99_ms"]))
        for row in rows
        if row["chunk_ms"] == ms and row["p99_ms"] <= ms
    ]
    return max(fits, default=0)
