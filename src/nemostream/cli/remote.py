"""Transcription by a server: `RemoteModel` takes the place of a local model for live audio."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from nemostream.errors import BackendError, NemostreamError
from nemostream.extras import install_command
from nemostream.runtime.text.words import Word

if TYPE_CHECKING:
    from nemostream import client
    from nemostream.runtime.text.events import Event

_RATE = 16000  # Hz of the audio that is sent


class RemoteModel:
    """The model of a server, or of one of several. Of `Model`, it has what live transcription uses."""

    def __init__(self, servers: Sequence[str], api_key: str | None, chunk_ms: int, itn: bool) -> None:
        self.chunk_ms = chunk_ms
        self._servers, self._api_key, self._itn = servers, api_key, itn

    def stream(self, *, sample_rate: int = _RATE, channels: int = 1, **options: Any) -> RemoteStream:
        """Open a stream, as `Model.stream` with the same options.

        Raises `BackendError` without the `client` extra, and as `client.AsyncStream`.
        """
        try:
            from nemostream.client import Stream
        except ImportError as error:
            raise BackendError(f"the client extra cannot be imported ({error}): {install_command('client')}") from error
        endpoint = options.pop("endpoint", None)
        rules = (
            {"endpoint_ms": -1, "endpoint_model": False}
            if endpoint is None
            else {"endpoint_ms": endpoint.silence_ms, "decoder": endpoint.decoder, "endpoint_model": endpoint.model}
        )
        # The defaults of a server may differ from those of a local model.
        options = {"chunk_ms": self.chunk_ms, "final_chunk_ms": 0, "vad": False, "itn": self._itn, **rules, **options}
        stream = Stream(
            self._servers, api_key=self._api_key, sample_rate=_RATE, encoding="pcm_f32le", words=True, **options
        )
        return RemoteStream(stream, sample_rate, channels)


class RemoteStream:
    """A stream of a server, with the interface of `LiveStream` for events. A context manager.

    Events are returned as iterators, which must be consumed: audio is sent while they are. They raise the error of a
    lost stream after its last events. The text of an unfinished utterance is then a final.
    """

    def __init__(self, stream: client.Stream, sample_rate: int, channels: int) -> None:
        """Connect. Raises as `client.Stream.open`."""
        from nemostream.runtime.audio.preprocessor import AudioPreprocessor

        self._audio = AudioPreprocessor(sample_rate, channels, _RATE)
        self._stream = stream
        self._received: deque[Event | NemostreamError] = deque()
        stream.open()
        self._reader = threading.Thread(target=self._read, name="nemostream-events", daemon=True)
        self._reader.start()

    def push_events(self, pcm: Any) -> Iterator[Event]:
        """Send audio as `LiveStream.push_events` accepts it, and yield the events received so far."""
        return self._send([*self._audio.push(pcm)], last=False)

    def finish_events(self) -> Iterator[Event]:
        """End the audio, and yield the remaining events."""
        return self._send([self._audio.finish()], last=True)

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, blocks: Sequence[Any], last: bool) -> Iterator[Event]:
        from nemostream.runtime.audio.preprocessor import as_float32

        try:
            for block in blocks:
                self._stream.send(as_float32(block))
            if last:
                self._stream.finish()
        except NemostreamError:  # the stream has ended: `_read` appends the error after the last events
            last = True
        if last:
            self._reader.join()
        while self._received:
            if isinstance(item := self._received.popleft(), NemostreamError):
                raise item
            yield item

    def _read(self) -> None:
        """Receive events until the stream ends."""
        words: list[client.Word] = []
        partial: client.Event | None = None
        try:
            for event in self._stream:
                if event.type in ("partial", "backchannel", "final"):
                    words = [*words[: event.words_from], *event.words]
                    final = event.type == "final"
                    self._received.append(_to_event(event, words if final else None))
                    partial, words = (None, []) if final else (event, words)
                elif event.type in ("end", "done"):
                    self._received.append(_to_event(event, None))
        except NemostreamError as error:
            if partial is not None:
                self._received.append(_to_event(partial, words))
            self._received.append(error)


def _to_event(event: client.Event, words: Sequence[client.Word] | None) -> Event:
    """Return an event of the runtime; with `words`, a final. A `done` becomes the end of the last utterance."""
    from nemostream.runtime.text.events import Event

    kind: Any = "end" if event.type == "done" else event.type if words is None else "final"
    made = Event(
        kind,
        event.utterance or 0,
        "" if kind == "end" else event.text,
        event.text if kind == "final" else event.stable,
        event.start,
        event.end,
        event.audio,
        event.chunk_ms or 0,
        (),
        language=event.language,
    )
    return made if words is None else made.with_words(_to_words(words, event.text), event.text)


def _to_words(words: Sequence[client.Word], text: str) -> list[Word]:
    """Return words of the runtime, with the field `after_space` according to the text."""
    made, position = [], 0
    for word in words:
        start = text.find(word.text, position)
        after_space = start <= 0 or text[start - 1].isspace()
        position = max(start, position) + len(word.text)
        made.append(Word(word.text, word.start, word.end, word.confidence, word.language, after_space))
    return made
