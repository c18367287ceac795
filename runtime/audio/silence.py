"""Digital silence: long runs of samples that are exactly zero, which no microphone records.

Muted clients, telephony gateways and editors send such runs for minutes. Their log-mel features are a constant on which
the model was not trained. They bring the encoder's caches and the decoder into a state in which the following words are
transcribed incorrectly, in NeMo too. A stream therefore transcribes the first `SECONDS` of a run like any other audio,
skips the rest, and starts a new recording at the first sample that is not zero; its timestamps continue.

The rule counts samples of the input, so its result does not depend on the size of pushes or the chunk size.

This module does not depend on chunks, streams or the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.runtime.streaming.compiled import SilenceFields
from nemostream.runtime.streaming.snapshot import SavedArrays, saved_counts

SECONDS = 10  # longer than the encoder's left context (5.6 s) and than pauses in speech


class SilenceSplitter(SilenceFields):
    """Find the samples of one stream's input that are skipped."""

    def __init__(self, sample_rate: int) -> None:
        self._max_zeros = SECONDS * sample_rate  # consecutive zeros that are transcribed
        self._zeros = 0  # consecutive zeros at the end of the audio so far

    def split(self, pcm: NDArray[Any]) -> list[tuple[NDArray[Any], bool]]:
        """Split [N] or [N, channels] into consecutive parts; return each part, and whether it is skipped."""
        if self.keeps(pcm):
            return [(pcm, False)]
        nonzero = pcm != 0 if pcm.ndim == 1 else pcm[:, 0] != 0
        for channel in range(1, pcm.shape[1] if pcm.ndim == 2 else 1):
            nonzero |= pcm[:, channel] != 0
        # All samples between two adjacent edges are zero. The first edge is in an earlier push.
        edges = np.concatenate([[-1 - self._zeros], np.flatnonzero(nonzero), [len(pcm)]])
        self._zeros = int(edges[-1] - edges[-2] - 1)
        parts, done = [], 0
        for index in np.flatnonzero(np.diff(edges) - 1 > self._max_zeros).tolist():
            begin, end = max(int(edges[index]) + 1 + self._max_zeros, 0), int(edges[index + 1])
            if begin == end:
                continue
            if done < begin:
                parts.append((pcm[done:begin], False))
            parts.append((pcm[begin:end], True))
            done = end
        if done < len(pcm):
            parts.append((pcm[done:], False))
        return parts

    def keeps(self, pcm: NDArray[Any]) -> bool:
        """Process [N] as `split` if obviously nothing of it is skipped, otherwise return False."""
        if pcm.ndim != 1 or not len(pcm) or self._zeros + len(pcm) > self._max_zeros:
            return False
        if pcm[-1]:
            self._zeros = 0
        else:
            nonzero = np.flatnonzero(pcm)
            self._zeros = len(pcm) - 1 - int(nonzero[-1]) if len(nonzero) else self._zeros + len(pcm)
        return True

    def save(self) -> dict[str, NDArray[Any]]:
        """Return the state for `load`."""
        return {"counts": np.array([self._zeros], np.int64)}

    def load(self, state: SavedArrays) -> None:
        """Restore a saved state. Raises `ValueError` if it does not come from `save`."""
        (self._zeros,) = saved_counts(state, "counts", 1)

    def restart(self) -> None:
        """Reset the count of zeros: a new recording follows."""
        self._zeros = 0
