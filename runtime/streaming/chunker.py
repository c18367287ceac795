"""A stream: audio on its way to the model, cut into the model's chunks, and what the model said of it so far.

A plain state machine without threads, locks or a model; the scheduler owns it once it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import StreamError
from nemostream.runtime.streaming.snapshot import saved_array, saved_counts

Floats = NDArray[np.float32]


@dataclass
class Hypothesis:
    """What the model said. Only ever grows, so a prefix read by another thread stays true."""

    tokens: list[int] = field(default_factory=list)
    sample_positions: list[int] = field(
        default_factory=list
    )  # sample of the stream that each one's encoder frame stands at
    scores: list[float] = field(default_factory=list)  # log-probability of each
    sum_p_alpha: list[float] = field(default_factory=list)  # `Emissions.sum_p_alpha` of each

    def save(self) -> dict[str, NDArray[Any]]:
        return {
            "tokens": np.array(self.tokens, np.int32),
            "sample_positions": np.array(self.sample_positions, np.int64),
            "scores": np.array(self.scores, np.float32),
            "sum_p_alpha": np.array(self.sum_p_alpha, np.float32),
        }

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add what was saved. Raises `ValueError` if it is not what `save` gives."""
        kinds = {"tokens": np.int32, "sample_positions": np.int64, "scores": np.float32, "sum_p_alpha": np.float32}
        count = len(saved_array(state, "tokens", np.int32, None))
        arrays = {name: saved_array(state, name, dtype, count) for name, dtype in kinds.items()}
        saved_counts(state, "sample_positions")
        if not all(np.isfinite(arrays[name]).all() for name in ("scores", "sum_p_alpha")):
            raise ValueError("a score is not finite")
        self.extend(*(array.tolist() for array in arrays.values()))

    def extend(
        self, tokens: list[int], sample_positions: list[int], scores: list[float], sum_p_alpha: list[float]
    ) -> None:
        self.tokens += tokens
        self.sample_positions += sample_positions
        self.scores += scores
        self.sum_p_alpha += sum_p_alpha


@dataclass(frozen=True)
class WorkItem:
    """What is next in a stream: a chunk to run, one to pass over, or the place where an utterance was ended by force.

    Samples count from the stream's start. The slot's state may be younger, or have heard less: its frame f stands at
    sample `origin_sample` + f frames' worth.
    """

    kind: Literal["run", "skip", "end_of_utterance"]
    chunk: ChunkConfig
    end_sample: int  # samples of the stream that were heard, or passed over, with it
    origin_sample: int = 0
    audio: Floats = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)  # [chunk.samples]
    length: int = 0  # leading samples of it that belong to the stream
    fresh: bool = False  # the slot must be reset before it is run


class ChunkFilter(Protocol):
    """Says which chunks are worth running. Called in the order of the audio."""

    lead_ms: int  # audio let through before a chunk that passes, though itself it did not

    def passes(self, begin: int, end: int) -> bool:
        """Whether the chunk of the samples [begin, end) of the stream is let through."""
        ...

    def restart(self, at: int) -> None:
        """What follows from this sample on is a stream of its own."""
        ...


class Chunker:
    """Samples in, chunks out.

    Each sample is copied once, into the chunk it will be run in: pushes of any size cost what their samples cost, and
    the caller's array is free again. Chunks cover the encoder frames of NeMo's offline forward, all and none more.

    With a `gate`, chunks that it does not let through are passed over, and the model hears the others as if there had
    been nothing between them. The first chunk is always run, as it begins with the lead silence.

    Digital silence (`pass_over`) ends a recording, and the audio after it begins another one, as at a `end_utterance`.
    """

    def __init__(self, manifest: Manifest, chunk: ChunkConfig, gate: ChunkFilter | None = None) -> None:
        self.chunk = chunk
        self.hypothesis = Hypothesis()
        self.samples = 0  # accepted, the lead silence not counted
        self.ended = False
        self._manifest, self._gate = manifest, gate
        self._ready: deque[WorkItem] = deque()
        self._held: deque[WorkItem] = deque()  # did not pass, but would be the lead of one that does
        # Of the recording that the slot hears; `end_utterance` begins another.
        self._begin = 0  # its first sample
        self._end_sample = 0  # where the next encoder frame stands
        self._covered = 0  # encoder frames of its chunks to be run so far, taken or not
        self._skipped = 0  # samples of it that were passed over
        self._fresh = False
        self._silent = False  # whether digital silence is passed over; the next audio begins a recording
        # The chunk being filled. The lead silence is part of the first; it is shorter than any chunk.
        self._filling = chunk  # its size; `chunk` is that of the ones after it
        self._next = np.zeros(chunk.samples, np.float32)
        self._filled = manifest.lead
        self._opened = 0  # the stream's samples when it was begun

    @property
    def end_sample(self) -> int:
        """Samples up to which chunks were cut, or left out."""
        return self._end_sample

    @property
    def queued(self) -> int:
        """Pieces that can be taken now."""
        return len(self._ready)

    @property
    def head(self) -> WorkItem:
        """What `take` gives next."""
        return self._ready[0]

    def take(self) -> WorkItem:
        return self._ready.popleft()

    def set_chunk(self, chunk: ChunkConfig) -> None:
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
        if self._silent and len(samples_N):
            self._begin_recording()
        while len(samples_N):
            part = samples_N[: len(self._next) - self._filled]
            self._next[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self.samples += len(part)
            samples_N = samples_N[len(part) :]
            if self._filled == len(self._next):
                self._close_chunk()

    def pass_over(self, samples: int) -> None:
        """Append digital silence that is not run: what was accepted is complete, as at the end of a recording."""
        if self.ended:
            raise StreamError("the stream was finished; open a new one for more audio.")
        if not self._silent:
            self._flush()
            self._open_chunk()
            self._silent = True
        self.samples += samples
        self._advance((self.samples - self._end_sample) // self.chunk.samples * self.chunk.samples)

    def finish(self) -> None:
        """No more audio: the rest becomes zero-padded chunks, as many as there are encoder frames still to come."""
        if not self.ended:
            self.ended = True
            self._flush()

    def end_utterance(self) -> None:
        """End the utterance here: the rest is run as at the end, and what follows as a stream of its own."""
        if self.ended:
            return
        self._flush()
        self._ready.append(WorkItem("end_of_utterance", self.chunk, self.samples))
        self._begin_recording()

    def save(self) -> dict[str, NDArray[Any]]:
        """Everything that `load` needs, of a stream all of whose pieces were taken; what was said is not in it."""
        counts = [self.samples, self._begin, self._end_sample, self._covered, self._skipped, self._filled, self._opened]
        return {
            "counts": np.array(counts, np.int64),
            "flags": np.array([self._silent, self._fresh]),
            "sizes": np.array([self._filling.ms, self.chunk.ms, *(held.chunk.ms for held in self._held)], np.int64),
            "filling": self._next[: self._filled].copy(),
            "held": np.concatenate([np.zeros(0, np.float32), *(held.audio for held in self._held)]),
        }

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on as the stream that `state` was saved of. Raises `ValueError` if it is not what `save` gives.

        The counters depend on each other: the stream's audio is in chunks that were run, skipped or held back, or in
        the one being filled.
        """
        manifest = self._manifest
        samples, begin, end_sample, covered, skipped, filled, opened = saved_counts(state, "counts", 7)
        sizes = saved_counts(state, "sizes")
        if len(sizes) < 2:
            raise ValueError(f"sizes are {sizes}; there are two at least")
        silent, fresh = saved_array(state, "flags", np.bool_, 2).tolist()
        filling, chunk, *held = (manifest.chunk(ms) for ms in sizes)
        in_held = sum(chunk.samples for chunk in held)
        heard = manifest.lead + samples - begin
        first = not covered and not skipped and not held
        if silent:  # the recording is complete, and the next one begins anew: only `end_sample` matters
            whole = not filled and not held and begin <= opened <= samples and end_sample <= samples + chunk.samples
        else:
            whole = (
                begin <= samples
                and filled < filling.samples
                and heard == covered * manifest.samples_per_frame + skipped + in_held + filled
                and end_sample == begin + covered * manifest.samples_per_frame + skipped
                and opened == samples - filled + (manifest.lead if first else 0)
            )
        if not whole:
            raise ValueError("the stream's counters contradict each other")
        audio = saved_array(state, "filling", np.float32, filled), saved_array(state, "held", np.float32, in_held)
        if not all(np.isfinite(part).all() for part in audio):
            raise ValueError("its audio is not finite")
        self.samples, self._begin, self._end_sample, self._covered = samples, begin, end_sample, covered
        self._skipped, self._filled, self._opened = skipped, filled, opened
        self._silent, self._fresh = silent, fresh
        self._filling, self.chunk = filling, chunk
        self._next = np.zeros(filling.samples, np.float32)
        self._next[:filled] = audio[0]
        at = 0
        for chunk in held:
            self._held.append(WorkItem("run", chunk, 0, 0, audio[1][at : at + chunk.samples], chunk.samples))
            at += chunk.samples

    def _begin_recording(self) -> None:
        """What follows is a recording of its own, in the same slot; times go on."""
        self._begin = self._end_sample = self.samples
        self._covered = self._skipped = 0
        self._fresh, self._silent = True, False
        if self._gate:
            self._gate.restart(self.samples)
        self._open_chunk(self._manifest.lead)

    def _advance(self, samples: int) -> None:
        """Pass over so many samples of digital silence, if any."""
        if samples > 0:
            self._end_sample += samples
            self._ready.append(WorkItem("skip", self.chunk, self._end_sample))

    def _flush(self) -> None:
        if self._silent:
            self._advance(self.samples - self._end_sample)
            return
        if self._gate and self._covered and not self._gate.passes(self._opened, self.samples):
            while self._held:
                self._queue("skip", self._held.popleft())
            return  # of whole chunks no frame is still to come
        heard = self.samples - self._begin - self._skipped
        while self._held:
            self._queue("run", self._held.popleft())
        frames = self._manifest.encoder_frames(heard)
        while self._covered < frames:
            self._queue("run", WorkItem("run", self._filling, 0, 0, self._next, self._filled), frames - self._covered)
            self._open_chunk()

    def _close_chunk(self) -> None:
        item = WorkItem("run", self._filling, 0, 0, self._next, self._filled)
        if not self._gate or not self._covered or self._gate.passes(self._opened, self.samples):
            while self._held:
                self._queue("run", self._held.popleft())
            self._queue("run", item)
        else:
            self._held.append(item)
            while len(self._held) > 1 and sum(held.chunk.ms for held in self._held) - self._held[0].chunk.ms >= (
                self._gate.lead_ms
            ):
                self._queue("skip", self._held.popleft())
        self._open_chunk()

    def _open_chunk(self, filled: int = 0) -> None:
        self._filling = self.chunk
        self._next, self._filled = np.zeros(self.chunk.samples, np.float32), filled
        self._opened = self.samples

    def _queue(self, kind: Literal["run", "skip"], item: WorkItem, most: int | None = None) -> None:
        """The next chunk in order, now that it is known whether it is run; `most` is how many frames it can have."""
        frame, frames = self._manifest.samples_per_frame, item.chunk.frames
        origin_sample = self._end_sample - frame * self._covered
        self._end_sample += frame * (frames if most is None else min(frames, most))
        if kind == "skip":
            self._skipped += item.length
            self._ready.append(WorkItem("skip", item.chunk, self._end_sample))
            return
        self._covered += frames
        self._ready.append(
            WorkItem("run", item.chunk, self._end_sample, origin_sample, item.audio, item.length, self._fresh)
        )
        self._fresh = False
