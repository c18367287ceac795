"""Comparison of the tokens of a GPU backend with those of the CPU backend, and of copied slots with their sources."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.runtime.backends.base import Backend, Batch, Pending
from nemostream.step_loop import padded_chunks

_MAX_DIFFERENCES = 3  # streams whose tokens are reported


def compare_tokens(
    manifest: Manifest,
    chunk: ChunkConfig,
    candidate: Backend,
    reference: Backend,
    clip: NDArray[np.float32],
    streams: int,
) -> dict[str, Any]:
    """Transcribe `clip` [N] on both backends in `streams` streams and return the numbers and the differences.

    Stream n starts with step n. So batches of 1 to `streams` rows occur, the rows of a batch have different audio and
    positions, and the last batches do not use the first slots.
    """
    emitted, failed_steps = _staggered_tokens(manifest, chunk, candidate, clip, streams)
    expected, _ = _staggered_tokens(manifest, chunk, reference, clip, streams)
    pairs = enumerate(zip(emitted, expected, strict=True))
    different = [{"stream": n, "emitted": got, "expected": wanted} for n, (got, wanted) in pairs if got != wanted]
    tokens = sum(map(len, expected))
    return {
        "streams": streams,
        "tokens": tokens,
        "failed_steps": failed_steps,
        "equal": tokens > 0 and not different and not failed_steps,
        "different_streams": len(different),
        "differences": different[:_MAX_DIFFERENCES],
    }


def compare_copy(manifest: Manifest, chunk: ChunkConfig, backend: Backend, clip: NDArray[np.float32]) -> dict[str, Any]:
    """Copy the first slot to the last one in the middle of `clip` [N], while a step of the first is pending.

    Returns `copy_state_equal`, whether both slots then have the same state, bit for bit, and `copy_tokens_equal`,
    whether both emit the tokens of a stream that is not copied. The copy runs to the end before its source continues.
    """
    source, target = np.array([0]), np.array([backend.capacity - 1])
    steps = list(padded_chunks(manifest, chunk, clip))
    middle = len(steps) // 2

    def submit(slots: NDArray[np.int64], number: int) -> Pending:
        step = steps[number]
        return backend.submit(Batch(chunk, slots, step.audio[None], np.array([step.length])))

    def run(slots: NDArray[np.int64], first: int, end: int) -> list[int]:
        return [token for number in range(first, end) for token in submit(slots, number).result().all_tokens.tolist()]

    backend.reset(source)
    expected = run(source, 0, len(steps))
    backend.reset(source)
    backend.reset(target)
    run(target, 0, 1)  # leaves another state in the slot
    begin = run(source, 0, middle)
    pending = submit(source, middle)
    backend.copy(source, target)
    begin += pending.result().all_tokens.tolist()
    states = [backend.save(int(slots[0])) for slots in (source, target)]
    ends = [run(slots, middle + 1, len(steps)) for slots in (target, source)]
    return {
        "copy_state_equal": all(array.tobytes() == states[1][name].tobytes() for name, array in states[0].items()),
        "copy_tokens_equal": all(begin + end == expected for end in ends),
    }


def _staggered_tokens(
    manifest: Manifest, chunk: ChunkConfig, backend: Backend, clip: NDArray[np.float32], streams: int
) -> tuple[list[list[int]], int]:
    """Return the tokens of each stream, and the number of steps of a stream with values that are not finite."""
    steps = list(padded_chunks(manifest, chunk, clip))
    tokens: list[list[int]] = [[] for _ in range(streams)]
    failed = 0
    backend.reset(np.arange(streams))
    for number in range(len(steps) + streams - 1):
        slots = [slot for slot in range(streams) if 0 <= number - slot < len(steps)]
        rows = [steps[number - slot] for slot in slots]
        lengths = np.array([row.length for row in rows])
        batch = Batch(chunk, np.array(slots), np.stack([row.audio for row in rows]), lengths)
        emissions = backend.submit(batch).result()
        failed += int(emissions.failed.sum())
        for slot, found in zip(slots, emissions.tokens, strict=True):
            tokens[slot] += found.tolist()
    return tokens, failed
