"""A client's conversation with the model: bytes in, events out. Knows no transport.

The events are the stream's own (`runtime/text/events.py`): ``(partial* final? end)*``. An utterance ends by itself after
a silence, when the client says so (`commit`) or with the session (`finish`).

`push` returns when the audio that it was given is decoded, so a transport that awaits it before it reads on holds a
client back to what the machine can do, and keeps at most one message of its audio waiting.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import AudioError, CapacityError, NemostreamError, OptionError, StreamError
from nemostream.runtime.audio.containers import WavStream, container_of, undecided
from nemostream.runtime.streaming.aio import AsyncLiveStream
from nemostream.runtime.streaming.session import Options
from nemostream.runtime.text.events import Event
from nemostream.serving.network.access import Client
from nemostream.serving.normalizer import Normalizer

if TYPE_CHECKING:
    from nemostream.serving.service import Service

_LIVE = 1.5  # seconds: who sends more at once is not talking live
_LEAST_BYTES = 2048  # that a message counts as
_SLICE_SECONDS, _SLICE_VALUES = 1.0, 1 << 16  # of a message, handled without a turn of other tasks
_BURST = 2.0  # seconds' worth of bytes that may come at once before a client is slowed down


class Draining(CapacityError):
    """The server is about to stop and takes no new streams."""


class Expired(StreamError):
    """A client that said nothing, read nothing, or stayed, for too long."""

    unread = False  # whether it is the one that reads nothing


class Session:
    """One client's stream; made by `Service.open`. For one task at a time; an asynchronous context manager."""

    def __init__(
        self,
        service: Service,
        *,
        transport: str,
        sample_rate: int,
        channels: int,
        encoding: str,
        chunk_ms: int,
        options: Options,
        client: Client,
        upload: bool = False,
        normalizer: Normalizer | None = None,
    ) -> None:
        self.id = secrets.token_hex(6)
        self.transport, self.client, self.upload = transport, client, upload
        self.wanted_ms = chunk_ms
        self.audio = 0.0  # seconds received
        self.error: str | None = None
        self._service, self._limits = service, service.settings
        self._normalizer = normalizer
        self._decode = _Decoder(encoding, channels, sample_rate)
        self._rate, self._channels, self._options = sample_rate, channels, options
        options["chunk_ms"] = service.chunk_now(chunk_ms)
        self._stream: AsyncLiveStream = service.model.astream(sample_rate=sample_rate, channels=channels, **options)
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
        await self.pace(len(data))
        pcm = self._decoded(data)
        began, steps = time.perf_counter(), self._stream.steps
        events = await self.push_pcm(pcm)
        seconds = len(pcm) / self._rate
        if self._stream.steps > steps and seconds <= _LIVE:
            # Of a message of several chunks no result can be sooner than all of them are.
            due = max(self._stream.chunk_ms / 1000, seconds)
            self._service.heard(self._stream.chunk_ms, time.perf_counter() - began, due)
        return events

    async def push_pcm(self, pcm: NDArray[Any]) -> list[Event]:
        """As `push`, of samples [N] or [N, channels], and as fast as they come."""
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")
        self._stream.check(pcm)  # all of it, before any of it is taken
        events: list[Event] = []
        # A slice at a time: a message of minutes of audio must not keep the event loop from other streams.
        step = max(1, min(round(_SLICE_SECONDS * self._rate), _SLICE_VALUES // (pcm.shape[1] if pcm.ndim == 2 else 1)))
        for start in range(0, len(pcm), step):
            piece = pcm[start : start + step]
            seconds = len(piece) / self._rate
            self.audio += seconds
            self._service.metrics.audio.inc(seconds)
            events += await self._told(await self._stream.push_events(piece))
            if start + step < len(pcm):
                await asyncio.sleep(0)
                if self._ended:
                    break
        return events

    async def commit(self) -> list[Event]:
        """End the utterance here: everything up to now is decoded and final, what follows begins anew."""
        if self._ended:
            return []
        events = await self.push_pcm(self._decoded(b"", last=True))
        self._decode.reset()
        return events + await self._told(await self._stream.end_utterance())

    async def clear(self) -> None:
        """Forget the utterance that is not final yet; what follows begins anew."""
        if not self._ended:
            self._decode.reset()
            await self._stream.end_utterance()

    async def finish(self) -> list[Event]:
        """No more audio comes. The last utterance's final event, if there is one, and the end."""
        if self._ended:
            return []
        events = await self.push_pcm(self._decoded(b"", last=True))
        self._ended = True
        events += await self._told(await self._stream.finish_events())
        self.close()
        return events

    def close(self, error: str | None = None) -> None:
        """Give back what the session holds. Does nothing the second time."""
        self._ended = True
        self.error = self.error or error
        self._stream.close()
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
            error = Expired(f"results were not read for {self._limits.send_seconds:.0f} s.")
            error.unread = True
            raise error from None

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """Go on in chunks of this size."""
        self._stream.set_chunk_ms(chunk_ms)

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close(str(error) if isinstance(error, NemostreamError) else "cut off" if error else None)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _decoded(self, data: bytes, last: bool = False) -> NDArray[Any]:
        """The samples of a client's bytes; a WAV header among them sets the stream's rate and channels."""
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")
        pcm, decode = self._decode(data, last), self._decode
        if (decode.sample_rate, decode.channels) != (self._rate, self._channels):
            if self.audio:
                raise AudioError(
                    f"a WAV file of {decode.sample_rate} Hz and {decode.channels} channel(s) came to a stream of "
                    f"{self._rate} Hz and {self._channels}; open a new one for it."
                )
            self._stream.close()
            self._rate, self._channels = decode.sample_rate, decode.channels
            self._stream = self._service.model.astream(sample_rate=self._rate, channels=self._channels, **self._options)
        return pcm

    async def _told(self, events: list[Event]) -> list[Event]:
        for index, event in enumerate(events):
            if event.kind == "final":
                if self._normalizer is not None:
                    event = events[index] = await self._normalizer.rewrite(event)
                self._texts.append(event.text)
                self._service.said(self, event)
        return events

    async def pace(self, size: int, most: int | None = None) -> None:
        """Delay a client that sends faster than `max_bytes_per_second`, and let other tasks run.

        Every message counts as `_LEAST_BYTES` at least, so that many small ones are no way around the limit. Raises
        `AudioError` for a message of more than `most` bytes (None: `max_message_bytes`).
        """
        limits, now = self._limits, time.monotonic()
        most = limits.max_message_bytes if most is None else most
        if size > most:
            raise AudioError(f"a message of {size} bytes came; the most is {most}: send less at once.")
        rate = limits.max_bytes_per_second
        self._bytes = max(0.0, self._bytes - rate * (now - self._bytes_at)) + max(size, _LEAST_BYTES)
        self._bytes_at = now
        await asyncio.sleep(max(0.0, self._bytes / rate - _BURST))


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
    """Bytes of an encoding to samples [N] or [N, channels]; keeps the bytes of a sample that is not whole yet.

    The first bytes, and the first after `reset`, may be a WAV file's: then its samples are decoded as its header
    states, and the bytes around them are dropped. Raises `AudioError` for another container.
    """

    def __init__(self, encoding: str, channels: int, sample_rate: int) -> None:
        if encoding not in ENCODINGS:
            raise OptionError(f"encoding is {encoding!r}; it must be one of {', '.join(ENCODINGS)}.")
        self.sample_rate, self.channels, self._encoding = sample_rate, channels, encoding
        self._rest = b""
        self._begin: bytes | None = b""  # what came while it may be the beginning of a container
        self._wav: WavStream | None = None

    def __call__(self, data: bytes, last: bool = False) -> NDArray[Any]:
        """`last`: no more bytes come, so the beginning is complete."""
        if self._begin is not None:
            data = self._begin + data
            if undecided(data) and not last:
                self._begin = data
                data = b""
            else:
                self._begin = None
                if container := container_of(data):
                    self._unwrap(container)
        if self._wav:
            data = self._wav.push(data)
            if header := self._wav.header:
                self.sample_rate, self.channels = header.sample_rate, header.channels
                self._encoding = header.encoding
        name, table = ENCODINGS[self._encoding]
        type_ = np.dtype(name)
        if self._rest:
            data = self._rest + data
        size = type_.itemsize * self.channels
        whole = len(data) - len(data) % size
        self._rest = data[whole:]
        samples: NDArray[Any] = np.frombuffer(data, type_, whole // type_.itemsize)
        if table is not None:
            samples = table[samples]
        return samples if self.channels == 1 else samples.reshape(-1, self.channels)

    def reset(self) -> None:
        self._rest, self._begin = b"", b""
        if self._wav and self._wav.complete:
            self._wav = None

    def _unwrap(self, container: str) -> None:
        if container != "WAV":
            raise AudioError(
                f"the audio begins as a file of the kind {container}; a stream takes samples ({', '.join(ENCODINGS)}) "
                "or WAV. Send the file to POST /v1/audio/transcriptions or Riva's Recognize, or decode it first: "
                "ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -."
            )
        self._wav, self._rest = WavStream(), b""
