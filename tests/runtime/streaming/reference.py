"""A reference of the scheduler: one stream and one chunk at a time, without threads, batches and queues.

It cuts the audio by its own code, runs each chunk at once as a batch of one row, and lets the endpointer and the
repetition guard process every step. Nothing is skipped because it could have no effect, and nothing overlaps, so the
order of resets, steps and results is that of the statements below.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.runtime.backends.base import Backend, Batch
from nemostream.runtime.text.endpointing import Endpointer, RepetitionGuard, UtteranceEnd

SLOT = np.array([0])


class ReferenceStream:
    """A stream in slot 0 of its own backend. `encoder_frames` counts the frames of a recording of so many samples."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        chunk: ChunkConfig,
        encoder_frames: Any,
        endpointer: Endpointer | None = None,
        prompt: int = 0,
    ) -> None:
        self.manifest, self.backend, self.encoder_frames = manifest, backend, encoder_frames
        self.endpointer, self.guard = endpointer, RepetitionGuard(manifest)
        self.chunk = self.filling = chunk  # size of the next chunk, and of the one being filled
        self.prompt = prompt
        self.pending = np.zeros(manifest.lead, np.float32)  # in the chunk being filled
        self.samples = 0  # accepted
        self.begin = self.end = 0  # of the recording; where its next frame begins
        self.run_frames = 0  # of the recording
        self.in_silence = self.reset_slot = self.failed = False
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.scores: list[float] = []
        self.sums: list[float] = []
        # Kind of the item, end sample, chunk size (of a chunk that was run), language, count of tokens, ends
        self.outputs: list[tuple[str, int, int, int, int, list[UtteranceEnd]]] = []
        backend.reset(SLOT)

    # -- audio ---------------------------------------------------------------------------------------------------------

    def accept(self, audio: np.ndarray) -> None:
        if not len(audio):
            return
        if self.in_silence:
            self._begin_recording()
        self._resize()
        scale = np.float32(1 if audio.dtype == np.float32 else 1 / 32768)
        self.pending = np.concatenate([self.pending, audio.astype(np.float32) * scale])
        self.samples += len(audio)
        while len(self.pending) >= self.filling.samples:
            self._run(self.filling.frames)

    def skip_silence(self, samples: int) -> None:
        if not self.in_silence:
            self._complete_recording()
            self.in_silence = True
        self.samples += samples
        self._skip((self.samples - self.end) // self.chunk.samples * self.chunk.samples)

    def end_utterance(self) -> None:
        self._complete_recording()
        if not self.failed:
            end = UtteranceEnd(len(self.tokens), self.samples, "forced")
            self.outputs.append(("end_of_utterance", self.samples, 0, self.prompt, len(self.tokens), [end]))
            if self.endpointer:
                self.endpointer.reset()
        self._begin_recording()

    def finish(self) -> None:
        self._complete_recording()

    # -- chunks --------------------------------------------------------------------------------------------------------

    def _resize(self) -> None:
        if len(self.pending) < self.chunk.samples:
            self.filling = self.chunk

    def _begin_recording(self) -> None:
        self.begin = self.end = self.samples
        self.run_frames, self.in_silence, self.reset_slot = 0, False, True
        self.pending = np.zeros(self.manifest.lead, np.float32)

    def _complete_recording(self) -> None:
        self._resize()
        if self.in_silence:
            return self._skip(self.samples - self.end)
        frames = self.encoder_frames(self.samples - self.begin)
        while self.run_frames < frames:
            self._run(frames - self.run_frames)
        self.pending = self.pending[:0]

    def _run(self, frames: int) -> None:
        """Run the chunk being filled, which has at most `frames` frames of the recording."""
        chunk, part = self.filling, self.pending[: self.filling.samples]
        self.pending, self.filling = self.pending[chunk.samples :], self.chunk
        self.run_frames += chunk.frames
        self.end += self.manifest.samples_per_frame * min(chunk.frames, frames)
        self._step(chunk, part)

    def _step(self, chunk: ChunkConfig, part: np.ndarray) -> None:
        if self.failed:
            return
        first, self.reset_slot = self.reset_slot, False
        if first:
            self.backend.reset(SLOT)
            self.guard.restart(len(self.tokens))
        audio = np.zeros((1, chunk.samples), np.float32)
        audio[0, : len(part)] = part
        prompts = np.array([self.prompt]) if self.manifest.languages.count else None
        row = self.backend.submit(Batch(chunk, SLOT, audio, np.array([len(part)]), prompts)).result()
        if row.failed[0]:
            self.failed = True
            return
        tokens = row.tokens[0].tolist()
        positions = [self.begin + frame * self.manifest.samples_per_frame for frame in row.frames[0].tolist()]
        self.tokens += tokens
        self.positions += positions
        self.scores += row.scores[0].tolist()
        self.sums += row.sum_p_alpha[0].tolist()
        self._record("run", tokens, positions, chunk.ms)
        if self.guard.step(self.tokens, self.positions, self.end):
            self.backend.reset_decoder(SLOT)

    def _skip(self, samples: int) -> None:
        if samples > 0:
            self.end += samples
            if not self.failed:
                self._record("skip", [], [], 0)

    def _record(self, kind: str, tokens: list[int], positions: list[int], ms: int) -> None:
        ends: list[UtteranceEnd] = []
        if self.endpointer:
            ends = self.endpointer.step(tokens, positions, self.end)
            if self.endpointer.reset_due:
                self.backend.reset_decoder(SLOT)
        self.outputs.append((kind, self.end, ms, self.prompt, len(self.tokens), ends))
