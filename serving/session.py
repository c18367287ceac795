"""A client's conversation with the model: bytes in, events out. Knows no transport.

A session is a row of utterances. An utterance ends by itself after a silence, when the client says so (`commit`) or
with the session (`finish`). Greedy decoding never takes a token back, so a partial's text only ever grows.

`push` returns when the audio that it was given is decoded, so a transport that awaits it before it reads on holds a
client back to what the machine can do, and keeps at most one message of its audio waiting.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import AudioError, BackendError, CapacityError, NemostreamError, OptionError, StreamError
from nemostream.runtime.aio import AsyncLiveStream
from nemostream.runtime.words import Result, Token

if TYPE_CHECKING:
    from nemostream.serving.service import Service

FRAME = 0.08  # seconds of audio that an encoder frame stands for
_BURST = 2.0  # seconds' worth of bytes that may come at once before a client is slowed down


class Draining(CapacityError):
    """The server is about to stop and takes no new streams."""


class Expired(StreamError):
    """A client that said nothing, read nothing, or stayed, for too long."""


@dataclass(frozen=True)
class Word:
    text: str
    start: float  # seconds from the session's start
    end: float
    confidence: float  # least probability of its tokens


@dataclass(frozen=True)
class Event:
    """What is known of an utterance. A partial's text grows; a final one never changes."""

    kind: Literal["partial", "final"]
    utterance: int  # from 0
    text: str
    start: float  # seconds of the session's audio: of the first token
    end: float  # of the last one, or of the utterance's end if it has none
    audio: float  # seconds received by then
    chunk_ms: int
    tokens: tuple[Token, ...] = field(repr=False)
    offset: float = field(repr=False)  # to be added to the tokens' times

    @property
    def words(self) -> tuple[Word, ...]:
        """The text's words: tokens joined up to the next one that begins with a space."""
        groups: list[list[Token]] = []
        for token in self.tokens:
            if not groups or token.text.startswith(" "):
                groups.append([])
            groups[-1].append(token)
        return tuple(
            Word(
                "".join(token.text for token in group).strip(),
                round(self.offset + group[0].time, 3),
                round(self.offset + group[-1].time + FRAME, 3),
                float(np.exp(min(token.score for token in group))),
            )
            for group in groups
            if "".join(token.text for token in group).strip()
        )


class Session:
    """One client's stream; made by `Service.open`. For one task at a time; an asynchronous context manager."""

    def __init__(
        self, service: Service, *, transport: str, sample_rate: int, channels: int, encoding: str, chunk_ms: int,
        endpoint_ms: int | None,
    ) -> None:  # fmt: skip
        self.id = secrets.token_hex(6)
        self.transport = transport
        self.wanted_ms = chunk_ms
        self.audio = 0.0  # seconds received
        self.error: str | None = None
        self._service, self._limits = service, service.settings
        self._decode = _Decoder(encoding, channels)
        self._open: Callable[[], AsyncLiveStream] = lambda: service.model.astream(
            sample_rate=sample_rate, channels=channels, chunk_ms=service.chunk_now(self.wanted_ms)
        )
        self._rate, self._endpoint = sample_rate, None if endpoint_ms is None else endpoint_ms / 1000
        self._stream: AsyncLiveStream | None = self._open()
        self._utterance, self._said, self._at = 0, 0, 0  # its number; tokens and characters of earlier ones
        self._known = 0  # tokens that an event told
        self._offset = 0.0  # seconds of audio before the current stream's first
        self._began = time.monotonic()
        self._bytes, self._bytes_at = 0.0, self._began
        self._texts: list[str] = []
        self._ended = False

    @property
    def text(self) -> str:
        """All that was said, once the session is finished."""
        return " ".join(self._texts)

    # -- what a transport calls ----------------------------------------------------------------------------------------

    async def push(self, data: bytes) -> list[Event]:
        """Take in audio; what it made known. Raises `AudioError`, `StreamError`, `BackendError` as a stream does."""
        await self._pace(len(data))
        return await self.push_pcm(self._decode(data))

    async def push_pcm(self, pcm: NDArray[Any]) -> list[Event]:
        """As `push`, of samples [N] or [N, channels], and as fast as they come."""
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")
        if not len(pcm):
            return []
        if self._stream is None:
            self._stream, self._offset = self._open(), self.audio
        seconds, began = len(pcm) / self._rate, time.perf_counter()
        self.audio += seconds
        self._service.metrics.audio.inc(seconds)
        try:
            partials = await self._stream.push(pcm)
        except BackendError:
            self._service.failed()
            raise
        if len(partials) == 1:  # a client that sends more at once is not talking live
            self._service.heard(partials[0].chunk_ms, time.perf_counter() - began)
        return [event for partial in partials for event in self._events(partial)]

    async def commit(self) -> list[Event]:
        """End the utterance here: everything up to now is decoded and final, what follows begins anew."""
        events = await self._finish()
        self.clear()
        return events

    def clear(self) -> None:
        """Forget the utterance that is not final yet; what follows begins anew."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._decode.reset()
        self._said = self._at = self._known = 0

    async def finish(self) -> list[Event]:
        """No more audio comes. The last utterance's final event, if there is one."""
        if self._ended:
            return []
        self._ended = True
        events = await self._finish()
        self.close()
        return events

    def close(self, error: str | None = None) -> None:
        """Give back what the session holds. Does nothing the second time."""
        self._ended = True
        self.error = self.error or error
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._service.closed(self)

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        """Around waiting for the client. Raises `Expired` if it sends nothing, or stays, for too long."""
        limits, left = self._limits, self._limits.max_seconds - (time.monotonic() - self._began)
        try:
            async with asyncio.timeout(min(limits.idle_seconds, left)):
                yield
        except TimeoutError:
            if left <= limits.idle_seconds:
                raise Expired(f"the stream was open for {limits.max_seconds:.0f} s, the longest allowed.") from None
            raise Expired(f"nothing came for {limits.idle_seconds:.0f} s; open a new stream.") from None

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Around sending to the client. Raises `Expired` if it does not read."""
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                yield
        except TimeoutError:
            raise Expired(f"results were not read for {self._limits.send_seconds:.0f} s.") from None

    def use(self, chunk_ms: int) -> None:
        """Go on in chunks of this size."""
        if self._stream is not None:
            self._stream.use(chunk_ms)

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close(str(error) if isinstance(error, NemostreamError) else "cut off" if error else None)

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _finish(self) -> list[Event]:
        if self._stream is None:
            return []
        result = await self._stream.finish()
        if result.text:
            self._texts.append(result.text)
        return [self._event("final", result)] if len(result.tokens) > self._said else []

    def _events(self, partial: Result) -> list[Event]:
        if len(partial.tokens) == self._said:
            return []
        silence = partial.decoded - partial.tokens[-1].time
        if self._endpoint is not None and silence >= self._endpoint:
            event = self._event("final", partial)
            self._said = self._known = len(partial.tokens)
            self._at = len(partial.text)
            return [event]
        if len(partial.tokens) == self._known:
            return []
        self._known = len(partial.tokens)
        return [self._event("partial", partial)]

    def _event(self, kind: Literal["partial", "final"], result: Result) -> Event:
        tokens = result.tokens[self._said :]
        event = Event(
            kind, self._utterance, result.text[self._at :].strip(), round(self._offset + tokens[0].time, 3),
            round(self._offset + tokens[-1].time + FRAME, 3), self.audio, result.chunk_ms, tokens, self._offset,
        )  # fmt: skip
        if kind == "final":
            self._utterance += 1
            self._service.said(self, event)
        return event

    async def _pace(self, size: int) -> None:
        """A bucket that leaks `max_bytes_per_second`; who fills it waits."""
        limits, now = self._limits, time.monotonic()
        if size > limits.max_message_bytes:
            raise AudioError(
                f"a message of {size} bytes came; the most is {limits.max_message_bytes}: send less at once."
            )
        rate = limits.max_bytes_per_second
        self._bytes = max(0.0, self._bytes - rate * (now - self._bytes_at)) + size
        self._bytes_at = now
        if self._bytes > _BURST * rate:
            await asyncio.sleep(self._bytes / rate - _BURST)


# -- encodings ---------------------------------------------------------------------------------------------------------


def _g711(law: str) -> NDArray[np.int16]:
    """What each byte of G.711 stands for, 16 bit (ITU-T G.711)."""
    code = np.arange(256)
    if law == "mulaw":
        code = ~code & 0xFF
        size = (((code & 0x0F) << 3) + 0x84 << ((code & 0x70) >> 4)) - 0x84
        return np.where(code & 0x80, -size, size).astype(np.int16)
    code = code ^ 0x55
    segment, size = (code & 0x70) >> 4, (code & 0x0F) << 4
    size = np.where(segment == 0, size + 8, (size + 0x108) << np.maximum(segment - 1, 0))
    return np.where(code & 0x80, size, -size).astype(np.int16)


ENCODINGS: dict[str, tuple[str, NDArray[np.int16] | None]] = {
    "pcm_s16le": ("<i2", None),
    "pcm_f32le": ("<f4", None),
    "mulaw": ("u1", _g711("mulaw")),
    "alaw": ("u1", _g711("alaw")),
}


class _Decoder:
    """Bytes of an encoding to samples [N] or [N, channels]; keeps the bytes of a sample that is not whole yet."""

    def __init__(self, encoding: str, channels: int) -> None:
        if encoding not in ENCODINGS:
            raise OptionError(f"encoding is {encoding!r}; it must be one of {', '.join(ENCODINGS)}.")
        name, self._table = ENCODINGS[encoding]
        self._type, self._channels, self._rest = np.dtype(name), channels, b""

    def __call__(self, data: bytes) -> NDArray[Any]:
        if self._rest:
            data = self._rest + data
        size = self._type.itemsize * self._channels
        whole = len(data) - len(data) % size
        self._rest = data[whole:]
        samples = np.frombuffer(data, self._type, whole // self._type.itemsize)
        if self._table is not None:
            samples = self._table[samples]
        return samples if self._channels == 1 else samples.reshape(-1, self._channels)

    def reset(self) -> None:
        self._rest = b""
