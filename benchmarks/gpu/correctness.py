"""Comparison of the tokens of a GPU backend with those of the CPU backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.runtime.backends.base import Backend, Batch
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
