"""The model as its users see it: live streams and whole recordings.

What the module does not know: which backend it was given, batches, transports.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

import numpy as np

from nemostream.errors import AudioError, OptionError
from nemostream.runtime.audio import Source, opened
from nemostream.runtime.backend import Backend
from nemostream.runtime.confidence import Confidence
from nemostream.runtime.endpoint import Endpoint
from nemostream.runtime.recognition import BACKLOG, Options, Pcm, Recognition
from nemostream.runtime.scheduler import Scheduler
from nemostream.runtime.tokenizer import Tokenizer
from nemostream.runtime.utterance import Event
from nemostream.runtime.words import Result
from nemostream.spec import Bundle, Chunk

if TYPE_CHECKING:
    from nemostream.runtime.aio import AsyncLiveStream
    from nemostream.runtime.vad import Silero, SpeechGate


class Model:
    """A bundle on a backend. Any thread may use it; closing it fails the streams still open. A context manager.

    `chunk_ms` is the chunk size, and `confidence` the measure, of streams that do not choose their own. Raises
    `OptionError` if the model was not trained for the chunk size, `BundleError` for a damaged tokenizer.
    """

    def __init__(
        self, bundle: Bundle, backend: Backend, chunk_ms: int = 560, confidence: Confidence | None = None
    ) -> None:
        self.manifest = bundle.manifest
        self.chunk_ms = self.manifest.chunk(chunk_ms).ms
        self.confidence = confidence or Confidence()
        self._tokenizer = Tokenizer(bundle.path / self.manifest.tokenizer.file, self.manifest.decoder.vocabulary)
        self._silero: Silero | None = None
        # Where `submit` is the step itself, overlap would hold each result back by a whole step and hide nothing.
        self._scheduler = Scheduler(self.manifest, backend, overlap=backend.asynchronous)

    def stream(self, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]) -> LiveStream:
        """A live stream of audio pushed at `sample_rate`.

        Raises `OptionError` for options that cannot be, `CapacityError` if no slot is free.
        """
        return LiveStream(Recognition(self, sample_rate, channels, **options))

    def astream(self, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]) -> AsyncLiveStream:
        """`stream` for asyncio: no thread per stream, `push` and `finish` are awaited."""
        from nemostream.runtime.aio import AsyncLiveStream  # asyncio only for those who use it

        return AsyncLiveStream(lambda listener: Recognition(self, sample_rate, channels, listener, **options))

    def listen(
        self, source: Source, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]
    ) -> Listening:
        """The events of a source, to be iterated over once, with `for` or with `async for`.

        A source is a file, an array, or anything that gives arrays, asynchronously too (then with `async for` only).
        `sample_rate` and `channels` are those of what it gives; a file knows its own. Utterances end by `Endpoint()`
        unless `endpoint` says otherwise. Iterating raises what `transcribe` raises; leaving it closes the stream.
        """
        options.setdefault("endpoint", Endpoint())
        return Listening(self, source, sample_rate, channels, options)

    def transcribe(
        self,
        source: str | Path | Pcm,
        *,
        sample_rate: int = 16000,
        on_partial: Callable[[Result], None] | None = None,
        on_progress: Callable[[float], None] | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """The text of a recording: a file, or an array [N] or [N, channels] at `sample_rate` (a file knows its own).

        Reads a file block by block, so its length does not matter. `on_partial` hears of every step, `on_progress` of
        the seconds decoded so far; both on this thread. Calls from several threads share batches. Raises `AudioError`
        for audio that cannot be read or is empty, and what `stream` raises.
        """
        if not isinstance(source, np.ndarray | str | os.PathLike):
            raise AudioError(f"transcribe takes a path or a numpy array, not {type(source).__name__}.")
        with (
            opened(source, sample_rate, 1) as (rate, channels, blocks),
            closing(Recognition(self, rate, channels, **options)) as recognition,
        ):
            if isinstance(source, np.ndarray):
                recognition.intake.check(source)  # all of it, so that an error says where
            return recognition.run(blocks, on_partial, on_progress)

    def watch(self, on_step: Callable[[Chunk, int, float], None] | None) -> None:
        """Have `on_step` told of every step: its chunk, how many streams it had, and the seconds it took.

        It is called on the scheduler's thread, between two steps; it must be quick and must not raise.
        """
        self._scheduler.on_step = on_step

    def _gate(self) -> SpeechGate:
        """Lets chunks with speech through."""
        from nemostream.runtime.vad import RATE, Silero, SpeechGate  # only for those who use it

        if self.manifest.features.sample_rate != RATE:
            raise OptionError(f"vad works with models of {RATE} Hz only.")
        if self._silero is None:  # two threads may load it twice; either will do
            self._silero = Silero()
        return SpeechGate(self._silero)

    def close(self) -> None:
        """Fail the streams still open and give back what the backend holds. Does nothing the second time."""
        self._scheduler.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Listening:
    """The events of a source; see `Model.listen`."""

    def __init__(self, model: Model, source: Source, sample_rate: int, channels: int, options: Options) -> None:
        self._model, self._source, self._options = model, source, options
        self._sample_rate, self._channels = sample_rate, channels

    def __iter__(self) -> Iterator[Event]:
        source, options = self._source, self._options
        # Of a whole recording the next block is read while the model works.
        backlog = BACKLOG if isinstance(source, np.ndarray | str | os.PathLike) else 0
        with (
            opened(source, self._sample_rate, self._channels) as (rate, channels, blocks),
            closing(Recognition(self._model, rate, channels, **options)) as recognition,
        ):
            for block in blocks:
                recognition.feed(block)
                recognition.wait(backlog)
                yield from recognition.events()
            recognition.end()
            recognition.wait()
            yield from recognition.events()

    def __aiter__(self) -> AsyncIterator[Event]:
        from nemostream.runtime.aio import listen  # asyncio only for those who use it

        return listen(self._model, self._source, self._sample_rate, self._channels, self._options)


class LiveStream:
    """One stream of audio. A context manager: leaving it without `finish` gives its slot back.

    Follow it in results (`push`, `finish`) or in events (`hear`, `end`). For one thread at a time (`close` may come
    from another).
    """

    def __init__(self, recognition: Recognition) -> None:
        self._recognition = recognition

    @property
    def result(self) -> Result:
        """The current result; after `finish` the final one."""
        return self._recognition.result

    @property
    def steps(self) -> int:
        """Chunks decoded that a result or an event told of, or would have."""
        return self._recognition.steps

    @property
    def chunk_ms(self) -> int:
        """Size of the last of them."""
        return self._recognition.chunk_ms

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

    def hear(self, pcm: Pcm) -> list[Event]:
        """As `push`, in events: what became known of the stream's utterances."""
        self._recognition.feed(pcm)
        self._recognition.wait()
        return self._recognition.events()

    def endpoint(self) -> list[Event]:
        """End the utterance here: everything pushed is decoded as at the end of a stream, and what follows begins anew.

        Times go on. Raises as `push` does.
        """
        self._recognition.cut()
        self._recognition.wait()
        return self._recognition.events()

    def end(self) -> list[Event]:
        """As `finish`, in events; `result` is then the final one."""
        self.finish()
        return self._recognition.events()

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
