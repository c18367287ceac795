"""A stream: audio on its way to the model, cut into the model's chunks, and what the model said of it so far.

A plain state machine without threads, locks or a model; the scheduler owns it once it runs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import StreamError
from nemostream.spec import Chunk, Manifest

Floats = NDArray[np.float32]


@dataclass
class Hypothesis:
    """What the model said. Only ever grows, so a prefix read by another thread stays true."""

    tokens: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # encoder frame each was emitted at
    scores: list[float] = field(default_factory=list)  # log-probability of each

    def extend(self, tokens: NDArray[np.int32], frames: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        self.tokens += tokens.tolist()
        self.frames += frames.tolist()
        self.scores += scores.tolist()


class Stream:
    """Samples in, chunks out.

    Each sample is copied once, into the chunk it will be run in: pushes of any size cost what their samples cost, and
    the caller's array is free again. Chunks cover the encoder frames of NeMo's offline forward, all and none more.
    """

    def __init__(self, manifest: Manifest, chunk: Chunk) -> None:
        self.chunk = chunk
        self.hypothesis = Hypothesis()
        self.samples = 0  # accepted, the lead silence not counted
        self.ended = False
        self._manifest = manifest
        self._ready: deque[tuple[Chunk, Floats, int]] = deque()  # chunk, its audio, how much of that is the stream's
        self._covered = 0  # encoder frames of the chunks cut so far, taken or not
        # The chunk being filled. The lead silence is part of the first; it is shorter than any chunk.
        self._filling = chunk  # its size; `chunk` is that of the ones after it
        self._next = np.zeros(chunk.samples, np.float32)
        self._filled = manifest.lead

    @property
    def queued(self) -> int:
        """Chunks that can be run now."""
        return len(self._ready)

    @property
    def head(self) -> Chunk:
        """Size of the chunk that `take` gives next."""
        return self._ready[0][0]

    def use(self, chunk: Chunk) -> None:
        """Cut chunks of this size from now on; the one being filled too, unless it holds more than that already."""
        self.chunk = chunk
        if self._filled < chunk.samples:
            began = self._next[: self._filled]
            self._next = np.zeros(chunk.samples, np.float32)
            self._next[: self._filled] = began
            self._filling = chunk

    def accept(self, samples_N: Floats) -> None:
        """Append audio: mono, at the model's rate."""
        if self.ended:
            raise StreamError("the stream was finished; open a new one for more audio.")
        self.samples += len(samples_N)
        while len(samples_N):
            part = samples_N[: len(self._next) - self._filled]
            self._next[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            samples_N = samples_N[len(part) :]
            if self._filled == len(self._next):
                self._close_chunk()

    def end(self) -> None:
        """No more audio: the rest becomes zero-padded chunks, as many as there are encoder frames still to come."""
        if self.ended:
            return
        self.ended = True
        frames = self._manifest.encoder_frames(self.samples)
        while self._covered < frames:
            self._close_chunk()

    def take(self) -> tuple[Floats, int]:
        """The next chunk [head.samples] and how many of its leading samples belong to the stream."""
        _, audio, length = self._ready.popleft()
        return audio, length

    def _close_chunk(self) -> None:
        self._ready.append((self._filling, self._next, self._filled))
        self._covered += self._filling.frames
        self._filling = self.chunk
        self._next, self._filled = np.zeros(self.chunk.samples, np.float32), 0
