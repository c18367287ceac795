"""Live streams for threads. `aio` contains the counterparts for asyncio."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from types import TracebackType

import numpy as np

from nemostream.runtime.audio.sources import SourceLike, open_source
from nemostream.runtime.audio.spool import is_file_content
from nemostream.runtime.streaming.offline import BACKLOG
from nemostream.runtime.streaming.session import OpenSession, Pcm, StreamSession
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Result


class LiveStream:
    """One stream of audio. A context manager: leaving it without `finish` releases its slot.

    Read it either as results (`push`, `finish`) or as events (`push_events`, `finish_events`). For one thread at a
    time, except `close`.
    """

    def __init__(self, session: StreamSession) -> None:
        self._session = session

    @property
    def result(self) -> Result:
        """The current result; after `finish` the final one."""
        return self._session.result

    @property
    def steps(self) -> int:
        """Number of chunks processed up to the last result or event returned."""
        return self._session.steps

    @property
    def chunk_ms(self) -> int:
        """Size of the last of these chunks, in milliseconds."""
        return self._session.chunk_ms

    @property
    def language(self) -> str:
        """The name of the language that is set, one of the model's `languages`."""
        return self._session.language

    def push(self, pcm: Pcm) -> list[Result]:
        """Append audio, wait for the chunks it completes and return one partial result for each.

        `pcm` is [N] or [N, channels]: int16, int32, or float in [-1, 1]. Raises `AudioError` if it is not (the stream
        is unchanged), `StreamError` after `finish` or `close` or if the stream has failed, `BackendError` if the
        backend failed.
        """
        self._session.feed(pcm)
        self._session.wait()
        return self._session.collect()

    def finish(self) -> Result:
        """End the stream and return its final result; later calls return the same one. Raises as `push` does."""
        self._session.finish()
        self._session.wait()
        return self._session.final()

    def push_events(self, pcm: Pcm) -> list[Event]:
        """Append audio as `push` does, and return events of utterances instead of results."""
        self._session.feed(pcm)
        self._session.wait()
        return self._session.events()

    def end_utterance(self) -> list[Event]:
        """End the utterance: process all pushed audio as at the end of a stream, then start anew.

        Times continue to count from the stream's start. Raises as `push` does.
        """
        self._session.end_utterance()
        self._session.wait()
        return self._session.events()

    def finish_events(self) -> list[Event]:
        """End the stream as `finish` does, and return its last events. `result` is then the final result."""
        self.finish()
        return self._session.events()

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """Change the chunk size. Larger: less compute. Smaller: lower latency.

        Pushed audio and the encoder's context are kept. Raises `OptionError` if the model does not support the size.
        """
        self._session.set_chunk_ms(chunk_ms)

    @property
    def final_chunk_ms(self) -> int | None:
        """Chunk size of the finals of the next utterance; None: that of partials."""
        return self._session.final_chunk_ms

    def set_final_chunk_ms(self, final_chunk_ms: int | None) -> None:
        """Change the chunk size of finals (option `final_chunk_ms`); None: to that of partials.

        A size takes effect with the next utterance if there was none before. Raises `OptionError` if it is not one of
        the model's that are larger than `chunk_ms`, `CapacityError` if no slot is free, `StreamError` after `finish`.
        """
        self._session.set_final_chunk_ms(final_chunk_ms)

    def set_language(self, language: str | None) -> None:
        """Change the language; None: to the model's default. Raises `OptionError` if the model does not support it.

        The change takes effect with the chunk being filled: audio of chunks that are already complete is transcribed in
        the previous language. The encoder's context is kept.
        """
        self._session.set_language(language)

    def close(self) -> None:
        """Release the slot at once. Does nothing after `finish`."""
        self._session.close()

    def __enter__(self) -> LiveStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EventStream:
    """The events of a source, for `for` or `async for`; see `Model.listen`.

    `open_session` opens a session for a sample rate and a number of channels; `sample_rate` and `channels` are those of
    a source that does not define its own.
    """

    def __init__(self, open_session: OpenSession, source: SourceLike, sample_rate: int, channels: int) -> None:
        self._open_session, self._source = open_session, source
        self._sample_rate, self._channels = sample_rate, channels

    def __iter__(self) -> Iterator[Event]:
        source = self._source
        recorded = isinstance(source, np.ndarray | str | os.PathLike) or is_file_content(source)
        backlog = BACKLOG if recorded else 0  # of a recording, the next block is read while the model processes
        with (
            open_source(source, self._sample_rate, self._channels) as audio,
            closing(self._open_session(audio.sample_rate, audio.channels)) as session,
        ):
            for block in audio.blocks:
                session.feed(block)
                session.wait(backlog)
                yield from session.events()
            session.finish()
            session.wait()
            yield from session.events()

    def __aiter__(self) -> AsyncIterator[Event]:
        from nemostream.runtime.streaming.aio import events_of  # imports asyncio, which only this needs

        return events_of(self._open_session, self._source, self._sample_rate, self._channels)
