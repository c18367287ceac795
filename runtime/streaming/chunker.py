"""Cut a stream's audio into the chunks that the model processes.

A plain state machine without threads, locks or a model. It belongs to the thread that feeds the stream; others may use
only `set_chunk` and `prompt`. The scheduler receives the complete items.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import StreamError
from nemostream.runtime.streaming.compiled import BlockFields, ChunkerFields, Queue, RecordingFields, compiled
from nemostream.runtime.streaming.items import INT16_SCALE, Floats, Samples, WorkItem, new_item
from nemostream.runtime.streaming.snapshot import saved_array, saved_counts

_NO_AUDIO: Floats = np.zeros(0, np.float32)
_INT16, _FLOAT32 = np.dtype(np.int16), np.dtype(np.float32)
_BLOCK_SAMPLES = 2560  # of a block; at least one chunk
_SPARE_BLOCKS = 2  # that a stream keeps


class Block(BlockFields):
    """Memory for consecutive chunks of one size. `chunks` are views of `audio`.

    Audio that is received as int16 is kept as int16: it takes half the memory, and thousands of streams write to it in
    turn, so that it is rarely in the CPU's caches.
    """

    __slots__ = ()

    def __init__(self, samples: int, dtype: np.dtype[Any]) -> None:
        count = max(1, _BLOCK_SAMPLES // samples)
        self.audio: Samples = np.empty(count * samples, dtype)
        self.chunks = [self.audio[begin : begin + samples] for begin in range(0, count * samples, samples)]


class ChunkFilter(Protocol):
    """Decides which chunks are run. Called in the order of the audio."""

    lead_ms: int  # audio that is also run before a chunk that passes

    def passes(self, begin: int, end: int) -> bool:
        """Return whether the chunk of samples [begin, end) of the stream is run."""
        ...

    def restart(self, at: int) -> None:
        """Treat the audio from sample `at` on as a new stream."""
        ...


class _Chunk(NamedTuple):
    """A chunk that was closed."""

    config: ChunkConfig
    audio: Samples  # [config.samples], undefined from `length` on
    length: int  # samples in it
    prompt: int  # the stream's `prompt` when it was closed
    scale: float  # by which `audio` must be multiplied
    block: Block | None  # if it is the last chunk in its block


_new_chunk = partial(tuple.__new__, _Chunk)


@dataclass(slots=True)
class _Recording(RecordingFields):
    """Counters of the current recording. A forced end of an utterance and digital silence start a new one.

    A recording is what a slot processes from one reset to the next.
    """

    begin_sample: int = 0
    end_sample: int = 0  # end of the chunks queued so far, where the next encoder frame begins
    run_frames: int = 0  # encoder frames of the chunks queued to be run
    skipped_samples: int = 0
    reset_slot: bool = False  # the slot must be reset before its next chunk


class Chunker(ChunkerFields):
    """Audio in, work items out.

    Each sample is copied once, into its chunk, so the cost of a push is proportional to its length and the caller may
    reuse the array. Consecutive chunks are adjacent in a block, so most pushes are one copy, and blocks are used again.
    The chunks cover exactly the encoder frames of NeMo's offline forward pass.

    With a filter, chunks that do not pass are skipped, and the model processes the others as if they were contiguous.
    The first chunk of a recording is always run, because it contains the lead silence.

    Digital silence (`skip_silence`) ends a recording. The audio after it starts a new one, as after `end_utterance`.
    """

    __slots__ = ("_filter", "_held", "_in_silence", "_manifest", "ended")

    def __init__(
        self, manifest: Manifest, chunk: ChunkConfig, chunk_filter: ChunkFilter | None = None, prompt: int = 0
    ) -> None:
        self.chunk = chunk  # size of the chunks after the one being filled
        self.prompt = prompt  # language of the chunk being filled and of those after it
        self.samples = 0  # samples accepted so far, without the lead silence
        self.taken = 0  # items returned by `take`
        self.ended = False
        self._manifest, self._filter = manifest, chunk_filter
        self._frame = manifest.samples_per_frame
        self._queue: list[WorkItem] = []
        self._held: deque[_Chunk] = deque()  # did not pass, but are the lead of the next chunk if that passes
        self._recording = _Recording()
        self._in_silence = False  # digital silence is being skipped; the next audio starts a recording
        self._direct: np.dtype[Any] | None = None  # type of audio that may be written across the end of a chunk, if any
        self._spare: Queue[Block] = Queue(maxlen=_SPARE_BLOCKS)
        # The chunk being filled is `_audio[_begin:_chunk_end]`: number `_number` of block `_block`, of size `_config`.
        # It has the samples up to `_at`, of which the first `_lead` are the lead silence.
        self._at: int
        self._chunk_end: int
        self._open_block(chunk, _FLOAT32)
        self._begin_with_lead()

    @property
    def end_sample(self) -> int:
        """Sample up to which the audio was cut into chunks or skipped."""
        return self._recording.end_sample

    @property
    def room(self) -> int:
        """Number of samples that complete the chunk being filled."""
        self._resize()
        return self._chunk_end - self._at - (self._manifest.lead if self._in_silence else 0)

    def copy(self, chunk_filter: ChunkFilter | None = None) -> Chunker:
        """Return a chunker in the same state. All queued items must have been taken."""
        copy = Chunker(self._manifest, self.chunk, chunk_filter, self.prompt)
        copy.load(self.save())
        return copy

    def take(self) -> list[WorkItem]:
        """Return the items that are complete since the last call."""
        items, self._queue = self._queue, []
        self.taken += len(items)
        return items

    def recycle(self, block: Block) -> None:
        """Use a block again, once all items in it are in batches. May be called by any thread."""
        self._spare.append(block)

    def set_chunk(self, chunk: ChunkConfig) -> None:
        """Change the chunk size, also of the chunk being filled unless that already contains more samples.

        May be called by any thread.
        """
        self.chunk = chunk  # `_resize` changes the chunk being filled, on the thread that fills it

    @compiled(ChunkerFields)
    def accept(self, samples_N: NDArray[Any]) -> None:
        """Append audio: mono, at the model's rate, float32 in [-1, 1] or int16. Raises `StreamError` after `finish`."""
        begin = self._at
        end = begin + len(samples_N)
        if samples_N.dtype is not self._direct or end > self._block_end or self.chunk is not self._config:
            return self._accept_parts(samples_N)
        self._audio[begin:end] = samples_N
        self._at = end
        self.samples += end - begin
        while self._at >= self._chunk_end:
            self._run_full_chunk()

    def _accept_parts(self, samples_N: NDArray[Any]) -> None:
        """Append audio in parts that do not extend beyond a chunk."""
        self._check_open()
        if self._in_silence and len(samples_N):
            self._begin_recording()
        scale = INT16_SCALE if samples_N.dtype == _INT16 else 1.0
        if scale < self._scale and self._length == self._lead:  # there is only silence before it
            self._reopen(self._config, _INT16)
        elif scale > self._scale:
            self._reopen(self._config, _FLOAT32)
        elif scale < self._scale:
            samples_N = samples_N * np.float32(scale)
        self._direct = self._audio.dtype if self._filter is None and not self._in_silence else None
        while len(samples_N):
            self._resize()
            part = samples_N[: self._chunk_end - self._at]
            end = self._at + len(part)
            self._audio[self._at : end] = part
            self._at = end
            self.samples += len(part)
            samples_N = samples_N[len(part) :]
            if end == self._chunk_end:
                self._close_chunk()

    def skip_silence(self, samples: int) -> None:
        """Append digital silence, which is not run. The audio before it is completed as at the end of a recording.

        Raises `StreamError` after `finish`.
        """
        self._check_open()
        if not self._in_silence:
            self._flush()
            self._in_silence, self._direct = True, None
        self.samples += samples
        chunk = self.chunk.samples  # read once: `set_chunk` may be called meanwhile
        self._queue_silence((self.samples - self.end_sample) // chunk * chunk)

    def finish(self) -> None:
        """End the stream: queue the remaining audio in zero-padded chunks, one for each encoder frame still missing."""
        if not self.ended:
            self.ended, self._direct = True, None
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
        self._resize()
        recording, length = self._recording, self._length
        counts = [
            self.samples,
            recording.begin_sample,
            recording.end_sample,
            recording.run_frames,
            recording.skipped_samples,
            length,
            self._chunk_begin_sample,
        ]
        sizes = [self._config.ms, self.chunk.ms, *(held.config.ms for held in self._held)]
        return {
            "counts": np.array(counts, np.int64),
            "flags": np.array([self._in_silence, recording.reset_slot]),
            "sizes": np.array(sizes, np.int64),
            "prompts": np.array([self.prompt, *(held.prompt for held in self._held)], np.int64),
            "filling": self._audio[self._begin : self._at] * np.float32(self._scale),
            "held": np.concatenate([_NO_AUDIO, *(held.audio * np.float32(held.scale) for held in self._held)]),
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
            latest = samples + 2 * manifest.samples_per_frame  # a frame ends less than two frames after its audio
            consistent = not length and not held and begin <= chunk_begin <= samples and end <= latest
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
        self._open_block(filling, _FLOAT32)
        self._at = length
        self._audio[:length] = filling_audio
        self._lead = chunk_begin - (samples - length)
        at = 0
        for config, held_prompt in zip(held, held_prompts, strict=True):
            audio = held_audio[at : at + config.samples]
            self._held.append(_Chunk(config, audio, config.samples, held_prompt, 1.0, None))
            at += config.samples

    def _check_open(self) -> None:
        if self.ended:
            raise StreamError("the stream was finished; open a new one for more audio.")

    @property
    def _length(self) -> int:
        return self._at - self._begin

    @property
    def _chunk_begin_sample(self) -> int:
        """The stream's `samples` when the chunk being filled was opened."""
        return self.samples - self._length + self._lead

    def _open_block(self, chunk: ChunkConfig, dtype: np.dtype[Any]) -> None:
        """Fill the first chunk of a block next."""
        self._config = chunk
        self._scale = 1.0 if dtype == _FLOAT32 else INT16_SCALE  # by which its audio must be multiplied
        spare = self._spare
        block = spare.popleft() if spare else None
        if block is None or len(block.chunks[0]) != chunk.samples or block.audio.dtype != dtype:
            block = Block(chunk.samples, dtype)
        self._block, self._audio, self._block_end = block, block.audio, len(block.audio)
        self._begin = self._at = self._number = self._lead = 0
        self._chunk_end = chunk.samples

    def _reopen(self, chunk: ChunkConfig, dtype: np.dtype[Any]) -> None:
        """Move the audio of the chunk being filled to another block."""
        filled, lead, scale = self._audio[self._begin : self._at], self._lead, self._scale
        self._open_block(chunk, dtype)
        self._audio[: len(filled)] = filled if scale == self._scale else filled * np.float32(scale)
        self._at, self._lead = len(filled), lead

    def _begin_with_lead(self) -> None:
        """Put the silence before a recording into the chunk being filled, which is longer."""
        self._lead = self._manifest.lead
        self._audio[self._begin : self._begin + self._lead] = 0
        self._at = self._begin + self._lead

    def _take_chunk(self) -> _Chunk:
        """Close the chunk being filled, and open the next one, which has the samples beyond its end."""
        config, end = self._config, self._chunk_end
        length = (self._at if self._at < end else end) - self._begin
        block, audio, prompt, scale = self._block, self._block.chunks[self._number], self.prompt, self._scale
        if end == self._block_end:
            self._open_block(self.chunk, audio.dtype)
            return _new_chunk((config, audio, length, prompt, scale, block))
        self._number += 1
        self._begin, self._lead, self._chunk_end = end, 0, end + config.samples
        if self._at < end:
            self._at = end
        if self.chunk is not config:
            self._resize()
        return _new_chunk((config, audio, length, prompt, scale, None))

    def _run_full_chunk(self) -> None:
        """Queue the chunk being filled, which is full, and open the next one: `_close_chunk` without a filter.

        Most chunks are closed here, so that is done in one function.
        """
        config, end, recording, block = self._config, self._chunk_end, self._recording, self._block
        origin = recording.end_sample - self._frame * recording.run_frames
        recording.end_sample = end_sample = recording.end_sample + self._frame * config.frames
        recording.run_frames += config.frames
        reset_slot, recording.reset_slot = recording.reset_slot, False
        audio, last = block.chunks[self._number], end == self._block_end
        self._queue.append(
            new_item(
                (
                    "run",
                    config,
                    end_sample,
                    origin,
                    audio,
                    config.samples,
                    reset_slot,
                    self.prompt,
                    self._scale,
                    block if last else None,
                )
            )
        )
        if last:
            return self._open_block(self.chunk, audio.dtype)
        self._number += 1
        self._begin, self._lead, self._chunk_end = end, 0, end + config.samples
        if self.chunk is not config:
            self._resize()

    def _resize(self) -> None:
        """Apply `set_chunk` to the chunk being filled, unless it has as many samples."""
        chunk = self.chunk  # read once: `set_chunk` may be called meanwhile
        if self._config is not chunk and self._length < chunk.samples:
            self._reopen(chunk, self._audio.dtype)

    def _begin_recording(self) -> None:
        """Start a new recording in the same slot. Positions keep counting from the stream's start."""
        self._recording = _Recording(self.samples, self.samples, reset_slot=True)
        self._in_silence = False
        if self._filter:
            self._filter.restart(self.samples)
        self._begin_with_lead()

    def _passes(self) -> bool:
        """Return whether the chunk being filled is run. The first of a recording is run without asking the filter."""
        if not self._filter or not self._recording.run_frames:
            return True
        return self._filter.passes(self._chunk_begin_sample, self.samples)

    def _close_chunk(self) -> None:
        """Run, hold or skip the chunk that is full, and open the next one."""
        if self._filter is None:
            chunk = self._take_chunk()
            return self._queue_run(chunk, chunk.config.frames)
        passes = self._passes()
        self._held.append(self._take_chunk())
        if passes:
            self._run_held()
            return
        while len(self._held) > 1 and self._lead_ms_without_first() >= self._filter.lead_ms:
            self._queue_skip(self._held.popleft())

    def _flush(self) -> None:
        """Complete the recording: run or skip all audio that is not queued yet. The next chunk is empty."""
        self._resize()
        if self._in_silence:
            self._queue_silence(self.samples - self.end_sample)
            return
        if not self._passes():
            while self._held:
                self._queue_skip(self._held.popleft())
            self._take_chunk()  # the chunks that were run have no frames left over
            return
        self._run_held()
        recording = self._recording
        frames = self._manifest.encoder_frames(self.samples - recording.begin_sample - recording.skipped_samples)
        while recording.run_frames < frames:
            missing = frames - recording.run_frames
            self._queue_run(self._take_chunk(), missing)
        if self._length:
            self._take_chunk()

    def _lead_ms_without_first(self) -> int:
        return sum(chunk.config.ms for chunk in itertools.islice(self._held, 1, None))

    def _run_held(self) -> None:
        while self._held:
            chunk = self._held.popleft()
            self._queue_run(chunk, chunk.config.frames)

    def _queue_run(self, chunk: _Chunk, max_frames: int) -> None:
        """Queue the recording's next chunk to be run. At most `max_frames` of its encoder frames are in the audio."""
        config, audio, length, prompt, scale, block = chunk
        recording, frame, frames = self._recording, self._frame, config.frames
        origin = recording.end_sample - frame * recording.run_frames
        end_sample = recording.end_sample + frame * (frames if frames < max_frames else max_frames)
        recording.end_sample = end_sample
        recording.run_frames += frames
        if length < config.samples:
            audio[length:] = 0
        reset_slot, recording.reset_slot = recording.reset_slot, False
        self._queue.append(
            new_item(("run", config, end_sample, origin, audio, length, reset_slot, prompt, scale, block))
        )

    def _queue_skip(self, chunk: _Chunk) -> None:
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
