"""The public API of a loaded model: live streams and whole recordings.

This module does not depend on the kind of backend, on batches or on transports.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.errors import AudioError, NemostreamError, OptionError, TruncatedAudioError
from nemostream.runtime.audio.sources import AudioSource, Content, SourceLike, open_source
from nemostream.runtime.audio.spool import is_file_content
from nemostream.runtime.backends.base import Backend, at_least_one
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.streaming.live import EventStream, LiveStream
from nemostream.runtime.streaming.offline import Progress, transcribe_recording
from nemostream.runtime.streaming.scheduler import Scheduler, StreamScheduler
from nemostream.runtime.streaming.session import Options, Pcm, SessionContext, StreamSession, with_options
from nemostream.runtime.streaming.snapshot import Checkpointer, StreamSnapshot
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.runtime.text.words import Result

if TYPE_CHECKING:
    from nemostream.runtime.audio.vad import Silero, VadFilter
    from nemostream.runtime.streaming.aio import AsyncLiveStream


_MAX_DELAY_MS = 5000


class Model:
    """A bundle on a backend. Thread-safe. A context manager; `close` fails the streams that are still open.

    `chunk_ms` and `confidence` are the defaults for streams. `delay_ms` is subtracted from the times of all tokens, to
    compensate for a model that emits them late. `engine` describes the backend; a transcription can only be resumed
    with the same one. `backend` is a backend, or a function that opens one on the thread that runs it (`Scheduler`);
    `open_scheduler` opens a scheduler that needs none, because its backend is in another process.
    Raises `OptionError` if the model does not support the chunk size or `delay_ms` is out of range, `BundleError` if
    the tokenizer is damaged, and the errors of a `backend` function.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend | Callable[[], Backend] | None,
        chunk_ms: int = 560,
        confidence: Confidence | None = None,
        delay_ms: int = 0,
        engine: str = "",
        *,
        open_scheduler: Callable[[Manifest, Tokenizer], StreamScheduler] | None = None,
    ) -> None:
        self.manifest = bundle.manifest
        self.chunk_ms = self.manifest.chunk(chunk_ms).ms
        self.confidence = confidence or Confidence()
        if isinstance(delay_ms, bool) or not isinstance(delay_ms, int) or not 0 <= delay_ms <= _MAX_DELAY_MS:
            raise OptionError(f"delay_ms is {delay_ms!r}; it must be whole milliseconds from 0 to {_MAX_DELAY_MS}.")
        self.delay_ms = delay_ms
        self.engine = engine
        self._tokenizer = Tokenizer.of_bundle(bundle)
        self._silero: Silero | None = None
        if open_scheduler is not None:
            self._scheduler = open_scheduler(self.manifest, self._tokenizer)
        else:
            assert backend is not None, "a model without a backend needs open_scheduler"
            self._scheduler = Scheduler(self.manifest, backend)
        self._context = SessionContext(self._scheduler, self.manifest, self._tokenizer, delay_ms)

    @property
    def context(self) -> SessionContext:
        """What all sessions share."""
        return self._context

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that a stream can be opened with, one name each; "auto" stands for detection."""
        return self.manifest.languages.names

    @with_options
    def stream(self, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]) -> LiveStream:
        """Open a live stream, to which audio is pushed at `sample_rate`.

        Raises `OptionError` for invalid options, `CapacityError` if no slot is free.
        """
        return LiveStream(self.open_session(sample_rate, channels, **options))

    @with_options
    def astream(self, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]) -> AsyncLiveStream:
        """Open a live stream for asyncio: `push` and `finish` are awaited, and no thread waits for the stream.

        Raises as `stream` does.
        """
        from nemostream.runtime.streaming.aio import AsyncLiveStream  # imports asyncio, which only this needs

        return AsyncLiveStream(self.open_session(sample_rate, channels, **options))

    @with_options
    def listen(
        self, source: SourceLike, *, sample_rate: int = 16000, channels: int = 1, **options: Unpack[Options]
    ) -> EventStream:
        """Return the events of a source, an iterable for `for` or `async for`.

        A source is a file (as in `transcribe`), an array, an iterable of arrays, or an asynchronous iterable of arrays
        (for `async for` only). `sample_rate` and `channels` describe the arrays; a file defines its own. Utterances end
        by the rules of `endpoint`, by default `Endpoint()`. Iterating raises the errors of `transcribe`. Leaving the
        loop closes the stream.
        """
        _check_shape(source)
        options.setdefault("endpoint", Endpoint())

        def open_session(sample_rate: int, channels: int) -> StreamSession:
            return self.open_session(sample_rate, channels, **options)

        return EventStream(open_session, source, sample_rate, channels)

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
        """Transcribe a recording: a file, or an array [N] or [N, channels] at `sample_rate` (a file defines its own).

        A file is given by its path, its content as bytes, or a binary file object, which is read from its current
        position to its end, need not be seekable and is not closed. A path is read block by block, so memory does not
        depend on the length. `on_partial` is called with the result of every step, `on_progress` with the seconds
        processed so far (a float with an estimate of the remaining time), both on the calling thread. Calls from
        several threads share batches.

        With `resume`, the path of a file, a snapshot is saved there every 30 seconds. A call with the same file
        continues from it, with a bit-identical result. The file is deleted when the transcription is complete, unless
        `keep_state` is set; the caller then deletes it, for example after storing the result.

        Raises `AudioError` if the audio is empty or cannot be read, `TruncatedAudioError` with the `result` so far for
        a WAV file that ends early, `OptionError` if the snapshot is of another recording, model or options, and the
        errors of `stream`.
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
        """Transcribe many recordings, `together` at a time, and yield their results in order.

        For a recording that fails, its error is yielded instead of a result, and the others continue. Recordings are
        opened when they are started, and wait for free slots. Leaving the iterator cancels the rest.
        """
        at_least_one(together=together)
        jobs: deque[Future[Result]] = deque()
        pool, stop = ThreadPoolExecutor(together, "nemostream-recording"), threading.Event()
        try:
            for source in sources:
                jobs.append(pool.submit(self._transcribe, source, sample_rate, options, stop=stop))
                if len(jobs) == 2 * together:  # bounds the number of results that wait for a slow first one
                    yield _result_or_error(jobs.popleft())
            while jobs:
                yield _result_or_error(jobs.popleft())
        finally:
            stop.set()
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
        stop: threading.Event | None = None,
    ) -> Result:
        """Transcribe a recording. With `stop`, wait for a free slot, and end early when it is set."""
        if not (isinstance(source, np.ndarray | str | os.PathLike) or is_file_content(source)):
            raise AudioError(
                "the source must be a path, a numpy array, the bytes of an audio file or a binary file object, "
                f"not {type(source).__name__}."
            )
        _check_shape(source)
        if not isinstance(resume, str | os.PathLike | None):
            raise OptionError(f"resume is {resume!r}; it must be the path of a file.")
        result = None
        try:
            with open_source(source, sample_rate, 1) as audio:
                checkpointer = None if resume is None else Checkpointer(resume, self._identity(audio, options))
                session = self.open_session(
                    audio.sample_rate, audio.channels, checkpointer=checkpointer, block=stop is not None, **options
                )
                with closing(session):
                    if isinstance(source, np.ndarray):
                        session.preprocessor.check(source)  # all of it, so that an error contains the sample's index
                    blocks = audio.blocks
                    if stop is not None:
                        blocks = itertools.takewhile(lambda _: not stop.is_set(), blocks)
                    result = transcribe_recording(
                        session, blocks, audio.duration, on_partial, on_progress, checkpointer
                    )
                if checkpointer and not keep_state:
                    checkpointer.done()
                return result
        except TruncatedAudioError as error:  # raised after all of the file was transcribed
            error.result = result
            raise

    def open_session(
        self,
        sample_rate: int,
        channels: int,
        *,
        checkpointer: Checkpointer | None = None,
        snapshot: StreamSnapshot | None = None,
        block: bool = False,
        **options: Unpack[Options],
    ) -> StreamSession:
        """Open a session, the non-blocking interface that all kinds of streams are built on; see `StreamSession`.

        Raises as `stream` does, and `ValueError` if the snapshot is not one of a stream with these options.
        """
        self._scheduler.check_process()
        chunk_ms, phrases = options.get("chunk_ms"), options.get("phrases")
        final_chunk_ms = options.get("final_chunk_ms")
        language = self.manifest.languages.name(options.get("language"))  # first: it is quick to check
        return StreamSession(
            self._context,
            sample_rate,
            channels,
            chunk=self.manifest.chunk(self.chunk_ms if chunk_ms is None else chunk_ms),
            final_chunk_ms=final_chunk_ms,
            confidence=options.get("confidence") or self.confidence,
            endpoint=options.get("endpoint"),
            phrases=None if phrases is None else self._compiled(phrases),
            vad=self._new_vad_filter() if options.get("vad") else None,
            language=language,
            checkpointer=checkpointer,
            snapshot=snapshot,
            block=block,
        )

    def compile_phrases(self, phrases: Mapping[str, float] | Sequence[str]) -> Boosting:
        """Compile phrases once for use in many streams (option `phrases`). Raises `OptionError` as `stream` does."""
        return Boosting.from_phrases(phrases, self._tokenizer)

    def watch(
        self,
        on_step: Callable[[ChunkConfig, int, float], None] | None,
        on_failure: Callable[[Exception], None] | None = None,
        on_fallback: Callable[[NemostreamError], None] | None = None,
    ) -> None:
        """Set the callbacks for monitoring.

        `on_step` is called after every step with its chunk, its number of streams and its duration in seconds.
        `on_failure` is called with every error raised by the backend, once for all streams of a step. Both run on the
        scheduler's thread, between two steps; they must be fast and must not raise. `on_fallback` is called on the
        thread of a stream for each final that has tokens of the stream's `chunk_ms` because its accurate lane
        (`final_chunk_ms`) failed, with the lane's error.
        """
        scheduler = self._scheduler
        scheduler.on_step, scheduler.on_failure, scheduler.on_fallback = on_step, on_failure, on_fallback

    @property
    def waiting(self) -> int:
        """Number of streams with a chunk that is complete and not in a step yet."""
        return self._scheduler.waiting

    def close(self) -> None:
        """Fail the streams that are still open and close the backend. Does nothing if already closed."""
        self._scheduler.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _identity(self, audio: AudioSource, options: Options) -> dict[str, Any]:
        """Return what must be the same for a transcription to be resumed."""
        phrases = options.get("phrases")
        return {
            "model": f"{self.manifest.name} {self.manifest.weights.sha256[:16]}",
            "engine": self.engine,
            "sample_rate": audio.sample_rate,
            "channels": audio.channels,
            "chunk_ms": options.get("chunk_ms") or self.chunk_ms,
            "final_chunk_ms": options.get("final_chunk_ms"),
            "endpoint": repr(options.get("endpoint")),
            "phrases": phrases and self._compiled(phrases).digest.tobytes().hex(),
            "vad": bool(options.get("vad")),
            "language": self.manifest.languages.name(options.get("language")),
        }

    def _compiled(self, phrases: Mapping[str, float] | Sequence[str] | Boosting) -> Boosting:
        return phrases if isinstance(phrases, Boosting) else self.compile_phrases(phrases)

    def _new_vad_filter(self) -> VadFilter:
        from nemostream.runtime.audio.vad import RATE, Silero, VadFilter  # imports ONNX Runtime, which only this needs

        if self.manifest.features.sample_rate != RATE:
            raise OptionError(
                f"vad requires a model with a sample rate of {RATE} Hz, not {self.manifest.features.sample_rate} Hz."
            )
        if self._silero is None:  # two threads may both load it, which is harmless
            self._silero = Silero()
        return VadFilter(self._silero)


def _check_shape(source: object) -> None:
    if isinstance(source, np.ndarray) and not source.ndim:
        raise AudioError("the audio is an array without dimensions; it must be [N] or [N, channels].")


def _result_or_error(job: Future[Result]) -> Result | NemostreamError:
    try:
        return job.result()
    except NemostreamError as error:
        return error
