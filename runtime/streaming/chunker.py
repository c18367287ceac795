"""Cut a stream's audio into the chunks that the model processes.

A plain state machine without threads, locks or a model. The scheduler owns it once the stream is open.
"""

from __future__ import annotations

import itertools
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


@dataclass(frozen=True)
class WorkItem:
    """The next item of a stream: a chunk to run, a chunk to skip, or the forced end of an utterance.

    Samples count from the stream's start. The slot counts frames from its last reset and only those that were run: its
    frame f begins at sample `origin_sample` + f * `Manifest.samples_per_frame`.
    """

    kind: Literal["run", "skip", "end_of_utterance"]
    chunk: ChunkConfig
    end_sample: int  # samples of the stream processed or skipped, this item included
    origin_sample: int = 0
    audio: Floats = field(default_factory=lambda: np.zeros(0, np.float32), repr=False)  # [chunk.samples]
    length: int = 0  # leading samples of `audio` that belong to the stream; the rest is zero
    reset_slot: bool = False  # the slot must be reset before the item is run
    prompt: int = 0  # id of the language (`LanguageConfig.prompts`)


class ChunkFilter(Protocol):
    """Decides which chunks are run. Called in the order of the audio."""

    lead_ms: int  # audio that is also run before a chunk that passes

    def passes(self, begin: int, end: int) -> bool:
        """Return whether the chunk of samples [begin, end) of the stream is run."""
        ...

    def restart(self, at: int) -> None:
        """Treat the audio from sample `at` on as a new stream."""
        ...


@dataclass
class _AudioChunk:
    """A chunk of audio, complete or being filled."""

    config: ChunkConfig
    audio: Floats  # [config.samples], zero from `length` on
    length: int  # samples in it
    begin_sample: int  # the stream's `samples` when it was opened
    prompt: int = 0  # the stream's `prompt` when it was completed


@dataclass
class _Recording:
    """Counters of the current recording. A forced end of an utterance and digital silence start a new one.

    A recording is what a slot processes from one reset to the next.
    """

    begin_sample: int = 0
    end_sample: int = 0  # end of the chunks queued so far, where the next encoder frame begins
    run_frames: int = 0  # encoder frames of the chunks queued to be run
    skipped_samples: int = 0
    reset_slot: bool = False  # the slot must be reset before its next chunk


class Chunker:
    """Audio in, work items out.

    Each sample is copied once, into its chunk, so the cost of a push is proportional to its length and the caller may
    reuse the array. The chunks cover exactly the encoder frames of NeMo's offline forward pass.

    With a filter, chunks that do not pass are skipped, and the model processes the others as if they were contiguous.
    The first chunk of a recording is always run, because it contains the lead silence.

    Digital silence (`skip_silence`) ends a recording. The audio after it starts a new one, as after `end_utterance`.
    """

    def __init__(
        self, manifest: Manifest, chunk: ChunkConfig, chunk_filter: ChunkFilter | None = None, prompt: int = 0
    ) -> None:
        self.chunk = chunk  # size of the chunks after the one being filled
        self.prompt = prompt  # language of the chunk being filled and of those after it
        self.samples = 0  # samples accepted so far, without the lead silence
        self.ended = False
        self._manifest, self._filter = manifest, chunk_filter
        self._queue: deque[WorkItem] = deque()
        self._held: deque[_AudioChunk] = deque()  # did not pass, but are the lead of the next chunk if that passes
        self._recording = _Recording()
        self._in_silence = False  # digital silence is being skipped; the next audio starts a recording
        # The lead silence is the beginning of the first chunk. It is shorter than any chunk.
        self._filling = self._new_chunk(manifest.lead)

    @property
    def end_sample(self) -> int:
        """Sample up to which the audio was cut into chunks or skipped."""
        return self._recording.end_sample

    @property
    def queued(self) -> int:
        """Number of items that `take` can return now."""
        return len(self._queue)

    @property
    def head(self) -> WorkItem:
        """The item that `take` returns next."""
        return self._queue[0]

    def take(self) -> WorkItem:
        return self._queue.popleft()

    def set_chunk(self, chunk: ChunkConfig) -> None:
        """Change the chunk size, also of the chunk being filled unless that already contains more samples."""
        self.chunk = chunk
        current = self._filling
        if current.length < chunk.samples:
            audio = np.zeros(chunk.samples, np.float32)
            audio[: current.length] = current.audio[: current.length]
            self._filling = _AudioChunk(chunk, audio, current.length, current.begin_sample)

    def accept(self, samples_N: Floats) -> None:
        """Append audio: mono, at the model's rate. Raises `StreamError` after `finish`."""
        self._check_open()
        if self._in_silence and len(samples_N):
            self._begin_recording()
        while len(samples_N):
            filling = self._filling
            part = samples_N[: len(filling.audio) - filling.length]
            filling.audio[filling.length : filling.length + len(part)] = part
            filling.length += len(part)
            self.samples += len(part)
            samples_N = samples_N[len(part) :]
            if filling.length == len(filling.audio):
                self._close_chunk()

    def skip_silence(self, samples: int) -> None:
        """Append digital silence, which is not run. The audio before it is completed as at the end of a recording.

        Raises `StreamError` after `finish`.
        """
        self._check_open()
        if not self._in_silence:
            self._flush()
            self._filling = self._new_chunk()
            self._in_silence = True
        self.samples += samples
        self._queue_silence((self.samples - self.end_sample) // self.chunk.samples * self.chunk.samples)

    def finish(self) -> None:
        """End the stream: queue the remaining audio in zero-padded chunks, one for each encoder frame still missing."""
        if not self.ended:
            self.ended = True
            self._flush()

    def end_utterance(self) -> None:
        """End the utterance: process the remaining audio as at the end of a stream and start a new recording."""
        if self.ended:
            return
        self._flush()
        self._queue.append(WorkItem("end_of_utterance", self.chunk, self.samples, prompt=self.prompt))
        self._begin_recording()

    def save(self) -> dict[str, NDArray[Any]]:
        """Return the state for `load`. All queued items must have been taken."""
        recording, filling = self._recording, self._filling
        counts = [
            self.samples,
            recording.begin_sample,
            recording.end_sample,
            recording.run_frames,
            recording.skipped_samples,
            filling.length,
            filling.begin_sample,
        ]
        sizes = [filling.config.ms, self.chunk.ms, *(held.config.ms for held in self._held)]
        return {
            "counts": np.array(counts, np.int64),
            "flags": np.array([self._in_silence, recording.reset_slot]),
            "sizes": np.array(sizes, np.int64),
            "prompts": np.array([self.prompt, *(held.prompt for held in self._held)], np.int64),
            "filling": filling.audio[: filling.length].copy(),
            "held": np.concatenate([np.zeros(0, np.float32), *(held.audio for held in self._held)]),
        }

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a saved state. Raises `ValueError` if it does not come from `save`.

        The counters are checked against each other: the recording's audio is in chunks that were run, skipped or held,
        or in the chunk being filled.
        """
        manifest = self._manifest
        samples, begin, end, run_frames, skipped, length, chunk_begin = saved_counts(state, "counts", 7)
        sizes = saved_counts(state, "sizes")
        if len(sizes) < 2:
            raise ValueError(f"sizes are {sizes}; at least two are required")
        in_silence, reset_slot = saved_array(state, "flags", np.bool_, 2).tolist()
        filling, chunk, *held = (manifest.chunk(ms) for ms in sizes)
        prompt, *held_prompts = saved_counts(state, "prompts", 1 + len(held))
        unknown = {prompt, *held_prompts} - {*(manifest.languages.prompts.values() or [0])}
        if unknown:
            raise ValueError(f"prompts are {sorted(unknown)}, which the model does not have")
        held_samples = sum(config.samples for config in held)
        first = not run_frames and not skipped and not held  # the chunk being filled contains the lead silence
        if in_silence:  # the recording is complete and the next one starts anew: only `end` matters
            consistent = not length and not held and begin <= chunk_begin <= samples and end <= samples + chunk.samples
        else:
            queued = run_frames * manifest.samples_per_frame + skipped
            consistent = (
                begin <= samples
                and length < filling.samples
                and manifest.lead + samples - begin == queued + held_samples + length
                and end == begin + queued
                and chunk_begin == samples - length + (manifest.lead if first else 0)
            )
        if not consistent:
            raise ValueError("the stream's counters contradict each other")
        filling_audio = saved_array(state, "filling", np.float32, length)
        held_audio = saved_array(state, "held", np.float32, held_samples)
        if not (np.isfinite(filling_audio).all() and np.isfinite(held_audio).all()):
            raise ValueError("its audio is not finite")
        self.samples, self.chunk, self.prompt, self._in_silence = samples, chunk, prompt, in_silence
        self._recording = _Recording(begin, end, run_frames, skipped, reset_slot)
        self._filling = _AudioChunk(filling, np.zeros(filling.samples, np.float32), length, chunk_begin)
        self._filling.audio[:length] = filling_audio
        at = 0
        for config, held_prompt in zip(held, held_prompts, strict=True):
            audio = held_audio[at : at + config.samples]
            self._held.append(_AudioChunk(config, audio, config.samples, 0, held_prompt))
            at += config.samples

    def _check_open(self) -> None:
        if self.ended:
            raise StreamError("the stream was finished; open a new one for more audio.")

    def _new_chunk(self, length: int = 0) -> _AudioChunk:
        """Return an empty chunk, or one that begins with `length` samples of silence."""
        return _AudioChunk(self.chunk, np.zeros(self.chunk.samples, np.float32), length, self.samples)

    def _begin_recording(self) -> None:
        """Start a new recording in the same slot. Positions keep counting from the stream's start."""
        self._recording = _Recording(self.samples, self.samples, reset_slot=True)
        self._in_silence = False
        if self._filter:
            self._filter.restart(self.samples)
        self._filling = self._new_chunk(self._manifest.lead)

    def _passes(self, chunk: _AudioChunk) -> bool:
        """Return whether a chunk is run. The first of a recording is run without asking the filter."""
        if not self._filter or not self._recording.run_frames:
            return True
        return self._filter.passes(chunk.begin_sample, self.samples)

    def _close_chunk(self) -> None:
        """Run, hold or skip the chunk that is full, and open the next one."""
        chunk = self._filling
        chunk.prompt = self.prompt
        self._held.append(chunk)
        if self._passes(chunk):
            self._run_held()
        elif self._filter:
            while len(self._held) > 1 and self._lead_ms_without_first() >= self._filter.lead_ms:
                self._queue_skip(self._held.popleft())
        self._filling = self._new_chunk()

    def _flush(self) -> None:
        """Complete the recording: run or skip all audio that is not queued yet."""
        if self._in_silence:
            self._queue_silence(self.samples - self.end_sample)
            return
        if not self._passes(self._filling):
            while self._held:
                self._queue_skip(self._held.popleft())
            return  # the chunks that were run have no frames left over
        self._run_held()
        recording = self._recording
        frames = self._manifest.encoder_frames(self.samples - recording.begin_sample - recording.skipped_samples)
        while recording.run_frames < frames:
            self._filling.prompt = self.prompt
            self._queue_run(self._filling, frames - recording.run_frames)
            self._filling = self._new_chunk()

    def _lead_ms_without_first(self) -> int:
        return sum(chunk.config.ms for chunk in itertools.islice(self._held, 1, None))

    def _run_held(self) -> None:
        while self._held:
            chunk = self._held.popleft()
            self._queue_run(chunk, chunk.config.frames)

    def _queue_run(self, chunk: _AudioChunk, max_frames: int) -> None:
        """Queue the recording's next chunk to be run. At most `max_frames` of its encoder frames are in the audio."""
        recording, frame = self._recording, self._manifest.samples_per_frame
        origin = recording.end_sample - frame * recording.run_frames
        recording.end_sample += frame * min(chunk.config.frames, max_frames)
        recording.run_frames += chunk.config.frames
        self._queue.append(
            WorkItem(
                "run",
                chunk.config,
                recording.end_sample,
                origin,
                chunk.audio,
                chunk.length,
                recording.reset_slot,
                chunk.prompt,
            )
        )
        recording.reset_slot = False

    def _queue_skip(self, chunk: _AudioChunk) -> None:
        """Queue the recording's next chunk to be skipped."""
        recording = self._recording
        recording.end_sample += self._manifest.samples_per_frame * chunk.config.frames
        recording.skipped_samples += chunk.length
        self._queue.append(WorkItem("skip", chunk.config, recording.end_sample, prompt=chunk.prompt))

    def _queue_silence(self, samples: int) -> None:
        """Queue `samples` of digital silence to be skipped, if any."""
        if samples > 0:
            self._recording.end_sample += samples
            self._queue.append(WorkItem("skip", self.chunk, self._recording.end_sample, prompt=self.prompt))
