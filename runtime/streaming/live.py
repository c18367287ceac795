"""A live stream, for threads; `aio` has its twin for asyncio."""

from __future__ import annotations

from types import TracebackType

from nemostream.runtime.streaming.session import Pcm, StreamSession
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Result


class LiveStream:
    """One stream of audio. A context manager: leaving it without `finish` gives its slot back.

    Follow it in results (`push`, `finish`) or in events (`push_events`, `finish_events`). For one thread at a time (`close` may come
    from another).
    """

    def __init__(self, session: StreamSession) -> None:
        self._session = session

    @property
    def result(self) -> Result:
        """The current result; after `finish` the final one."""
        return self._session.result

    @property
    def steps(self) -> int:
        """Chunks decoded that a result or an event told of, or would have."""
        return self._session.steps

    @property
    def chunk_ms(self) -> int:
        """Size of the last of them."""
        return self._session.chunk_ms

    def push(self, pcm: Pcm) -> list[Result]:
        """Append audio and wait for every chunk it completed; one partial result per step run.

        Raises `AudioError` for audio it cannot take (the stream goes on as if it had not come), `StreamError` after
        `finish` or `close` or when the model cannot go on with this stream, `BackendError` if the backend failed.
        """
        self._session.feed(pcm)
        self._session.wait()
        return self._session.collect()

    def finish(self) -> Result:
        """End the stream and return its final result; the same one again when called again. Raises as `push` does."""
        self._session.finish()
        self._session.wait()
        return self._session.final()

    def push_events(self, pcm: Pcm) -> list[Event]:
        """As `push`, in events: what became known of the stream's utterances."""
        self._session.feed(pcm)
        self._session.wait()
        return self._session.events()

    def end_utterance(self) -> list[Event]:
        """End the utterance here: everything pushed is decoded as at the end of a stream, and what follows begins anew.

        Times go on. Raises as `push` does.
        """
        self._session.end_utterance()
        self._session.wait()
        return self._session.events()

    def finish_events(self) -> list[Event]:
        """As `finish`, in events; `result` is then the final one."""
        self.finish()
        return self._session.events()

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """Go on in chunks of another size: larger ones cost the machine less, smaller ones are sooner.

        What was pushed so far is kept, and so is all that was heard. Raises `OptionError` for a size that the model
        does not have.
        """
        self._session.set_chunk_ms(chunk_ms)

    def close(self) -> None:
        """Give the slot back, now. Does nothing after `finish`."""
        self._session.close()

    def __enter__(self) -> LiveStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
