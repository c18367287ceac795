"""Digital silence: long runs of samples that are exactly zero, which no microphone records.

Muted clients, telephony gateways and editors send such runs for minutes. Their log-mel features are a constant that the
model was not trained on: it leaves the encoder's caches and the decoder in a state in which the words that follow come
out wrong, in NeMo too. A stream therefore transcribes the first `SECONDS` of a run as any other audio, passes over the
rest, and starts at the first sample that is not zero as a new recording, its clock going on.

The rule counts samples of the input, so neither the size of pushes nor the chunk size changes what it does.

What the module does not know: chunks, streams, the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SECONDS = 10  # longer than the encoder's left context (5.6 s) and than pauses in speech


class SilenceSplitter:
    """Find the samples of one stream's input that are passed over."""

    def __init__(self, sample_rate: int) -> None:
        self._longest = SECONDS * sample_rate  # zeros in a row that are transcribed
        self._zeros = 0  # in a row, up to now

    def split(self, pcm: NDArray[Any]) -> list[tuple[NDArray[Any], bool]]:
        """Cut [N] or [N, channels] into parts, in order; True marks a part that is passed over."""
        sound = pcm != 0 if pcm.ndim == 1 else pcm[:, 0] != 0
        for channel in range(1, pcm.shape[1] if pcm.ndim == 2 else 1):
            sound |= pcm[:, channel] != 0
        # Between two neighbours of `edges` all samples are zero; the first edge is in an earlier push.
        edges = np.concatenate([[-1 - self._zeros], np.flatnonzero(sound), [len(pcm)]])
        self._zeros = int(edges[-1] - edges[-2] - 1)
        parts, at = [], 0
        for index in np.flatnonzero(np.diff(edges) - 1 > self._longest).tolist():
            begin, end = max(int(edges[index]) + 1 + self._longest, 0), int(edges[index + 1])
            if begin == end:
                continue
            if at < begin:
                parts.append((pcm[at:begin], False))
            parts.append((pcm[begin:end], True))
            at = end
        if at < len(pcm):
            parts.append((pcm[at:], False))
        return parts

    def restart(self) -> None:
        """Count anew: what follows is another recording."""
        self._zeros = 0
