"""The model as its users see it: live streams and whole recordings.

What the module does not know: which backend it was given, batches, transports.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import AudioError, StreamError
from nemostream.runtime.audio import BLOCK, Intake, Recording
from nemostream.runtime.backend import Backend
from nemostream.runtime.scheduler import Scheduler
from nemostream.runtime.tokenizer import Detokenizer, Tokenizer
from nemostream.runtime.words import Result, Token
from nemostream.spec import Bundle, Chunk

if TYPE_CHECKING:
    from nemostream.runtime.aio import AsyncLiveStream

Pcm = NDArray[Any]  # [N] or [N, channels]: int16, int32, or float in [-1, 1]

# Chunks of a recording that may wait at the scheduler while the next block is read: enough that it need not.
_BACKLOG = 2


class Model:
    """A bundle on a backend. Any thread may use it; closing it fails the streams still open. A context manager.

    `chunk_ms` is the chunk size of streams that do not choose their own. Raises `OptionError` if the model was not
    trained for it, `BundleError` for a damaged tokenizer.
    """

    def __init__(self, bundle: Bundle, backend: Backend, chunk_ms: int = 560) -> None:
        self.manifest = bundle.manifest
        self.chunk_ms = self.manifest.chunk(chunk_ms).ms
        self._tokenizer = Tokenizer(bundle.path / self.manifest.tokenizer.file, self.manifest.decoder.vocabulary)
        # Where `submit` is the step itself, overlap would hold each result back by a whole step and hide nothing.
        self._scheduler = Scheduler(self.manifest, backend, overlap=backend.asynchronous)

    def stream(self, *, sample_rate: int = 16000, channels: int = 1, chunk_ms: int | None = None) -> LiveStream:
        """A live stream of audio pushed at `sample_rate`.

        Raises `OptionError` for options that cannot be, `CapacityError` if no slot is free.
        """
        return LiveStream(self._recognition(sample_rate, channels, chunk_ms, None))

    def astream(self, *, sample_rate: int = 16000, channels: int = 1, chunk_ms: int | None = None) -> AsyncLiveStream:
        """`stream` for asyncio: no thread per stream, `push` and `finish` are awaited."""
        from nemostream.runtime.aio import AsyncLiveStream  # asyncio only for those who use it

        return AsyncLiveStream(lambda listener: self._recognition(sample_rate, channels, chunk_ms, listener))

    def transcribe(
        self,
        source: str | Path | Pcm,
        *,
        sample_rate: int = 16000,
        chunk_ms: int | None = None,
        on_partial: Callable[[Result], None] | None = None,
        on_progress: Callable[[float], None] | None = None,
    ) -> Result:
        """The text of a recording: a file, or an array [N] or [N, channels] at `sample_rate` (a file knows its own).

        Reads a file block by block, so its length does not matter. `on_partial` hears of every step, `on_progress` of
        the seconds decoded so far; both on this thread. Calls from several threads share batches. Raises `AudioError`
        for audio that cannot be read or is empty, and what `stream` raises.
        """
        if isinstance(source, np.ndarray):
            if not source.size:
                raise AudioError("the audio is empty.")
            channels = source.shape[1] if source.ndim == 2 else 1
            with closing(self._recognition(sample_rate, channels, chunk_ms, None)) as recognition:
                recognition.intake.check(source)  # all of it, so that an error says where
                blocks = (source[start : start + BLOCK] for start in range(0, len(source), BLOCK))
                return recognition.run(blocks, on_partial, on_progress)
        if not isinstance(source, str | os.PathLike):
            raise AudioError(f"transcribe takes a path or a numpy array, not {type(source).__name__}.")
        with (
            Recording(source) as file,
            closing(self._recognition(file.sample_rate, file.channels, chunk_ms, None)) as recognition,
        ):
            return recognition.run(file.blocks(), on_partial, on_progress)

    def watch(self, on_step: Callable[[Chunk, int, float], None] | None) -> None:
        """Have `on_step` told of every step: its chunk, how many streams it had, and the seconds it took.

        It is called on the scheduler's thread, between two steps; it must be quick and must not raise.
        """
        self._scheduler.on_step = on_step

    def close(self) -> None:
        """Fail the streams still open and give back what the backend holds. Does nothing the second time."""
        self._scheduler.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recognition(
        self, sample_rate: int, channels: int, chunk_ms: int | None, listener: Callable[[], None] | None
    ) -> Recognition:
        return Recognition(self, sample_rate, channels, self.chunk_ms if chunk_ms is None else chunk_ms, listener)


class Recognition:
    """What a live stream and its asyncio twin share: all but the waiting."""

    def __init__(
        self, model: Model, sample_rate: int, channels: int, chunk_ms: int, listener: Callable[[], None] | None
    ) -> None:
        chunk = model.manifest.chunk(chunk_ms)
        self.intake = Intake(sample_rate, channels, model.manifest.features.sample_rate)
        self._scheduler, self._manifest, self._tokenizer = model._scheduler, model.manifest, model._tokenizer
        self._text = Detokenizer(self._tokenizer)
        self._ended = False
        self._frames = 0  # decoded
        self._last = Result("", (), 0.0, chunk.ms, False)
        self._seat = self._scheduler.open(chunk, listener)  # last: whatever fails above must not cost a slot

    @property
    def result(self) -> Result:
        """What was said up to now, of all the audio received up to now."""
        if self._last.final:
            return self._last
        self.collect()
        return dataclasses.replace(self._last, duration=self.intake.seconds)

    def feed(self, pcm: Pcm) -> None:
        """Hand audio to the scheduler. Raises `AudioError` before, and `StreamError` after the end of the stream."""
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")
        for block in self.intake.push(pcm):
            self._scheduler.accept(self._seat, block)

    def use(self, chunk_ms: int) -> None:
        """Go on in chunks of another size. Raises `OptionError` if the model was not trained for it."""
        self._scheduler.use(self._seat, self._manifest.chunk(chunk_ms))

    def end(self) -> None:
        """No more audio. Does nothing the second time."""
        if self._ended:
            return
        self._ended = True
        self._scheduler.accept(self._seat, self.intake.finish())
        self._scheduler.end(self._seat)

    @property
    def ended(self) -> bool:
        """Whether `end` was called: when it has settled, the result is final."""
        return self._ended

    def settled(self) -> bool:
        """Whether every chunk that is complete is decoded. Raises what the stream died of."""
        return self._scheduler.settled(self._seat)

    def wait(self, backlog: int = 0) -> None:
        """Block until all but `backlog` complete chunks are decoded. Raises what the stream died of."""
        self._scheduler.wait(self._seat, backlog)

    def close(self) -> None:
        """Give the slot back, now. Does nothing if that is done."""
        self._scheduler.leave(self._seat)

    def collect(self) -> list[Result]:
        """A partial result of every step since the last call."""
        return [self._advance(chunk, count) for chunk, count in self._scheduler.collect(self._seat)]

    def final(self) -> Result:
        """The final result, once every step is in."""
        if not self._last.final:
            self.collect()
            text = self._text.finish()
            self._last = dataclasses.replace(self._last, text=text, duration=self.intake.seconds, final=True)
        return self._last

    def run(
        self,
        blocks: Iterable[Pcm],
        on_partial: Callable[[Result], None] | None,
        on_progress: Callable[[float], None] | None,
    ) -> Result:
        """Recognise a whole recording, reading on while the model works; about a block of it waits in memory."""

        def report() -> None:
            for partial in self.collect():
                if on_partial:
                    on_partial(partial)
            if on_progress:
                on_progress(self.decoded)

        for block in blocks:
            self.feed(block)
            self.wait(_BACKLOG)
            report()
        self.end()
        self.wait()
        report()
        return self.final()

    @property
    def decoded(self) -> float:
        """Seconds of audio decoded so far. The last steps, which run when the stream has ended, leave nothing over."""
        seconds = self.intake.seconds
        return seconds if self._ended else min(self._manifest.seconds(self._frames), seconds)

    def _advance(self, chunk: Chunk, count: int) -> Result:
        """Take in a step that left `count` tokens in the hypothesis."""
        self._frames += chunk.frames
        hypothesis, known = self._seat.stream.hypothesis, self._last.tokens
        text, tokens = self._last.text, known
        if count > len(known):  # a step that said nothing shares text and tokens with the one before
            new = slice(len(known), count)
            ids, frames, scores = hypothesis.tokens[new], hypothesis.frames[new], hypothesis.scores[new]
            text = self._text.push(ids)
            piece, seconds = self._tokenizer.piece, self._manifest.seconds
            said = zip(ids, frames, scores, strict=True)
            tokens = (
                *known,
                *(Token(i, piece(i), seconds(f), seconds(f + 1), score, math.exp(score)) for i, f, score in said),
            )
        self._last = Result(text, tokens, self.intake.seconds, chunk.ms, False, self.decoded)
        return self._last


class LiveStream:
    """One stream of audio. A context manager: leaving it without `finish` gives its slot back.

    For one thread at a time (`close` may come from another).
    """

    def __init__(self, recognition: Recognition) -> None:
        self._recognition = recognition

    @property
    def result(self) -> Result:
        """The current result; after `finish` the final one."""
        return self._recognition.result

    def push(self, pcm: Pcm) -> list[Result]:
        """Append audio and wait for every chunk it completed; one partial result per step run.

        Raises `AudioError` for audio it cannot take (the stream goes on as if it had not come), `StreamError` after
        `finish` or `close` or when the model cannot go on with this stream, `BackendError` if the backend failed.
        """
        self._recognition.feed(pcm)
        self._recognition.wait()
        return self._recognition.collect()

    def finish(self) -> Result:
        """End the stream and return its final result; the same one again when called again. Raises as `push` does."""
        self._recognition.end()
        self._recognition.wait()
        return self._recognition.final()

    def use(self, chunk_ms: int) -> None:
        """Go on in chunks of another size: larger ones cost the machine less, smaller ones are sooner.

        What was pushed so far is kept, and so is all that was heard. Raises `OptionError` for a size that the model
        does not have.
        """
        self._recognition.use(chunk_ms)

    def close(self) -> None:
        """Give the slot back, now. Does nothing after `finish`."""
        self._recognition.close()

    def __enter__(self) -> LiveStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
