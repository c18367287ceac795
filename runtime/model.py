"""The model as its users see it: live streams and whole recordings.

What the module does not know: which backend it was given, batches, transports.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event as Flag
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import AudioError, NemostreamError, OptionError, TruncatedAudioError
from nemostream.runtime.audio.sources import AudioSource, Content, SourceLike, open_source
from nemostream.runtime.audio.spool import is_file_content
from nemostream.runtime.backends.base import Backend, at_least_one
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.streaming.live import LiveStream
from nemostream.runtime.streaming.offline import BACKLOG, Progress, recognise
from nemostream.runtime.streaming.scheduler import Scheduler
from nemostream.runtime.streaming.session import Options, Pcm, StreamSession, with_options
from nemostream.runtime.streaming.snapshot import Checkpointer
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.runtime.text.words import Result

if TYPE_CHECKING:
    from nemostream.runtime.audio.vad import Silero, VadFilter
    from nemostream.runtime.streaming.aio import AsyncLiveStream


_LATEST_MS = 5000


class Model:
    """A bundle on a backend. Any thread may use it; closing it fails the streams still open. A context manager.

    `chunk_ms` is the chunk size, and `confidence` the measure, of streams that do not choose their own. `delay_ms` is
    how late the model says a token, and is taken off the times of all. `engine` tells apart what computes otherwise,
    for transcriptions that are resumed. Raises `OptionError` if the model was not trained for the chunk size, or a
    delay that cannot be, `BundleError` for a damaged tokenizer.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        chunk_ms: int = 560,
        confidence: Confidence | None = None,
        delay_ms: int = 0,
        engine: str = "",
    ) -> None:
        self.manifest = bundle.manifest
        self.chunk_ms = self.manifest.chunk(chunk_ms).ms
        self.confidence = confidence or Confidence()
        if isinstance(delay_ms, bool) or not isinstance(delay_ms, int) or not 0 <= delay_ms <= _LATEST_MS:
            raise OptionError(f"delay_ms is {delay_ms!r}; it must be whole milliseconds from 0 to {_LATEST_MS}.")
        self.delay_ms = delay_ms
        self.engine = engine
        self._tokenizer = Tokenizer(bundle.path / self.manifest.tokenizer.file, self.manifest.decoder.vocabulary)
        self._silero: Silero | None = None
        # Where `submit` is the step itself, overlap would hold each result back by a whole step and hide nothing.
        self._scheduler = Scheduler(self.manifest, backend, overlap=backend.asynchronous)

    @with_options
    def stream(self, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]) -> LiveStream:
        """A live stream of audio pushed at `sample_rate`.

        Raises `OptionError` for options that cannot be, `CapacityError` if no slot is free.
        """
        return LiveStream(StreamSession(self, sample_rate, channels, **options))

    @with_options
    def astream(self, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]) -> AsyncLiveStream:
        """`stream` for asyncio: no thread per stream, `push` and `finish` are awaited."""
        from nemostream.runtime.streaming.aio import AsyncLiveStream  # asyncio only for those who use it

        return AsyncLiveStream(lambda listener: StreamSession(self, sample_rate, channels, listener, **options))

    @with_options
    def listen(
        self, source: SourceLike, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]
    ) -> Listening:
        """The events of a source, to be iterated over once, with `for` or with `async for`.

        A source is a file (as in `transcribe`), an array, or anything that gives arrays, asynchronously too (then with
        `async for` only).
        `sample_rate` and `channels` are those of what it gives; a file knows its own. Utterances end by `Endpoint()`
        unless `end_utterance` says otherwise. Iterating raises what `transcribe` raises; leaving it closes the stream.
        """
        _check_shape(source)
        options.setdefault("endpoint", Endpoint())
        return Listening(self, source, sample_rate, channels, options)

    @with_options
    def transcribe(
        self,
        source: str | Path | Pcm | Content,
        *,
        sample_rate: int = 16000,
        on_partial: Callable[[Result], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        resume: str | Path | None = None,
        keep_state: bool = False,
        **options: Unpack[Options],
    ) -> Result:
        """The text of a recording: a file, or an array [N] or [N, channels] at `sample_rate` (a file knows its own).

        A file is its path, its content as bytes, or a binary file object, which is read from its current position to
        its end, need not be seekable and stays open. A path is read block by block, so its length does not matter.
        `on_partial` is called with every step's result, `on_progress` with the seconds decoded so far (a float that
        estimates what is left), both on this thread. Calls from several threads share batches.

        With `resume`, a file, the state is saved there every half a minute, and a call with the same file goes on from
        it to the same result, to the bit; it is deleted at the end, unless `keep_state` leaves that to the caller, who
        may want to see the result safe first. Raises `AudioError` for audio that cannot be read
        or is empty, `TruncatedAudioError` with a `result` for a WAV file that ends early, `OptionError` for a state of
        another recording, model or options, and what `stream` raises.
        """
        return self._transcribe(source, sample_rate, options, on_partial, on_progress, resume, keep_state)

    @with_options
    def transcribe_many(
        self,
        sources: Iterable[str | Path | Pcm | Content],
        *,
        sample_rate: int = 16000,
        together: int = 16,
        **options: Unpack[Options],
    ) -> Iterator[Result | NemostreamError]:
        """The texts of many recordings, in order, each as soon as it is its turn; `together` are decoded side by side.

        A recording that cannot be used gives its error in place of a result, and the others go on. They are opened as
        their turn comes, and wait for slots. Leaving the iterator leaves the rest undone.
        """
        at_least_one(together=together)
        jobs: deque[Future[Result]] = deque()
        pool, left = ThreadPoolExecutor(together, "nemostream-recording"), Flag()
        try:
            for source in sources:
                jobs.append(pool.submit(self._transcribe, source, sample_rate, options, left=left))
                if len(jobs) == 2 * together:  # or the results of a million files would wait for a slow first one
                    yield _outcome(jobs.popleft())
            while jobs:
                yield _outcome(jobs.popleft())
        finally:
            left.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _transcribe(
        self,
        source: str | Path | Pcm | Content,
        sample_rate: int,
        options: Options,
        on_partial: Callable[[Result], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        resume: str | Path | None = None,
        keep_state: bool = False,
        left: Flag | None = None,
    ) -> Result:
        """`left`, one of many recordings has: it waits for a slot, and gives up when it is set."""
        if not (isinstance(source, np.ndarray | str | os.PathLike) or is_file_content(source)):
            raise AudioError(
                f"transcribe takes a path or a numpy array, not {type(source).__name__}; of an audio file "
                "also its bytes or a binary file object."
            )
        _check_shape(source)
        if not isinstance(resume, str | os.PathLike | None):
            raise OptionError(f"resume is {resume!r}; it must be the path of a file.")
        result = None
        try:
            with open_source(source, sample_rate, 1) as sound:
                checkpointer = None if resume is None else Checkpointer(resume, self._about(sound, options))
                session = StreamSession(
                    self,
                    sound.sample_rate,
                    sound.channels,
                    checkpointer=checkpointer,
                    block=left is not None,
                    **options,
                )
                with closing(session):
                    if isinstance(source, np.ndarray):
                        session.preprocessor.check(source)  # all of it, so that an error names the sample
                    blocks = (
                        sound.blocks if left is None else itertools.takewhile(lambda _: not left.is_set(), sound.blocks)
                    )
                    result = recognise(session, blocks, sound.duration, on_partial, on_progress, checkpointer)
                if checkpointer and not keep_state:
                    checkpointer.done()
                return result
        except TruncatedAudioError as error:  # raised when all of the file was decoded
            error.result = result
            raise

    def compile_phrases(self, phrases: Mapping[str, float] | Sequence[str]) -> Boosting:
        """Phrases as any number of streams can take them (option `phrases`). Raises `OptionError` as `stream` does."""
        return Boosting.from_phrases(phrases, self._tokenizer)

    def _about(self, sound: AudioSource, options: Options) -> dict[str, Any]:
        """What a state that is to be resumed must have in common with this."""
        phrases = options.get("phrases")
        return {
            "model": f"{self.manifest.name} {self.manifest.weights.sha256[:16]}",
            "engine": self.engine,
            "sample_rate": sound.sample_rate,
            "channels": sound.channels,
            "chunk_ms": options.get("chunk_ms") or self.chunk_ms,
            "endpoint": repr(options.get("endpoint")),
            "phrases": phrases and self._boosting(phrases).digest.tobytes().hex(),
            "vad": bool(options.get("vad")),
        }

    def _boosting(self, phrases: Mapping[str, float] | Sequence[str] | Boosting) -> Boosting:
        return phrases if isinstance(phrases, Boosting) else self.compile_phrases(phrases)

    def watch(
        self,
        on_step: Callable[[ChunkConfig, int, float], None] | None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        """Have `on_step` told of every step: its chunk, how many streams it had, and the seconds it took; `on_failure`
        of what the engine failed with, once for all the streams of a step.

        They are called on the scheduler's thread, between two steps; they must be quick and must not raise.
        """
        self._scheduler.on_step, self._scheduler.on_failure = on_step, on_failure

    def _gate(self) -> VadFilter:
        """Lets chunks with speech through."""
        from nemostream.runtime.audio.vad import RATE, Silero, VadFilter  # only for those who use it

        if self.manifest.features.sample_rate != RATE:
            raise OptionError(f"vad works with models of {RATE} Hz only.")
        if self._silero is None:  # two threads may load it twice; either will do
            self._silero = Silero()
        return VadFilter(self._silero)

    def close(self) -> None:
        """Fail the streams still open and give back what the backend holds. Does nothing the second time."""
        self._scheduler.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_shape(source: object) -> None:
    if isinstance(source, np.ndarray) and not source.ndim:
        raise AudioError("the audio is one number, an array of no dimension; it must be [N] or [N, channels].")


def _outcome(job: Future[Result]) -> Result | NemostreamError:
    try:
        return job.result()
    except NemostreamError as error:
        return error


class Listening:
    """The events of a source; see `Model.listen`."""

    def __init__(self, model: Model, source: SourceLike, sample_rate: int, channels: int, options: Options) -> None:
        self._model, self._source, self._options = model, source, options
        self._sample_rate, self._channels = sample_rate, channels

    def __iter__(self) -> Iterator[Event]:
        source, options = self._source, self._options
        # Of a whole recording the next block is read while the model works.
        whole = isinstance(source, np.ndarray | str | os.PathLike) or is_file_content(source)
        backlog = BACKLOG if whole else 0
        with (
            open_source(source, self._sample_rate, self._channels) as sound,
            closing(StreamSession(self._model, sound.sample_rate, sound.channels, **options)) as session,
        ):
            for block in sound.blocks:
                session.feed(block)
                session.wait(backlog)
                yield from session.events()
            session.finish()
            session.wait()
            yield from session.events()

    def __aiter__(self) -> AsyncIterator[Event]:
        from nemostream.runtime.streaming.aio import listen  # asyncio only for those who use it

        return listen(self._model, self._source, self._sample_rate, self._channels, self._options)
