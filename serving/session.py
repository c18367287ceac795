"""One client's stream: bytes in, events out. Independent of the protocol.

The events are those of the stream (`runtime/text/events.py`): ``(partial* final? end)*``. An utterance ends after a
silence, on the client's request (`commit`) or with the session (`finish`).

`push` returns when its audio is decoded. A protocol that awaits it before it reads the next message slows a client down
to the speed of the machine, and keeps at most one message of its audio waiting. `start_push` does the same without a
task: switching between tasks would take longer than everything else that is done for a message.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import AudioError, NemostreamError, OptionError, StreamError
from nemostream.runtime.audio.containers import WavStream, container_of, undecided
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.aio import AsyncLiveStream
from nemostream.runtime.streaming.session import Options
from nemostream.runtime.streaming.snapshot import StreamSnapshot
from nemostream.runtime.streaming.state import StreamTrace
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.scripts import join_texts
from nemostream.serving.client import Client
from nemostream.serving.errors import Expired
from nemostream.serving.normalizer import Normalizer
from nemostream.serving.settings import Limits

_MAX_LIVE_SECONDS = 1.5  # audio per message; a client that sends more at once is not live and has no latency
_MIN_MESSAGE_BYTES = 2048  # the rate limit counts a smaller message as this many bytes
_SLICE_SECONDS, _SLICE_VALUES = 1.0, 1 << 16  # audio of a message that is processed before other tasks run
_BURST_SECONDS = 2.0  # of messages at the maximum rate that a client may send at once before it is slowed down
_BUSY_SECONDS = 0.1  # between two checks of whether a stream that is open for too long is still decoding
_OPERATION_SECONDS = 0.05  # that each end of an utterance and each new stream counts as: both need a step of the model


OnPushed = Callable[[list[Event] | Exception], None]


class SessionObserver(Protocol):
    """Receives what happens in a session (`Service`)."""

    def record_audio(self, seconds: float) -> None:
        """Audio was received."""

    def record_latency(self, chunk_ms: int, seconds: float, audio_seconds: float) -> None:
        """A message with `audio_seconds` was decoded in `seconds`, in chunks of `chunk_ms`."""

    def record_utterance(self, session: Session, event: Event) -> None:
        """An utterance is final."""

    def session_closed(self, session: Session) -> None:
        """The session was closed; may be called more than once."""


class SessionTrace(Protocol):
    """Receives the times of a session (`otel.StreamSpans`)."""

    def attach(self, trace: StreamTrace) -> None:
        """The stream's chunks are recorded in `trace` from now on."""

    def received(self, before: float, after: float) -> None:
        """Audio was received: the seconds before and after it."""

    def add(self, events: Sequence[Event], end_sample: int) -> None:
        """Results of the chunks up to `end_sample` were received; `events` are their new events."""

    def discard(self, end_sample: int) -> None:
        """The client discards the current utterance."""

    def close(self, error: str | None, audio_seconds: float) -> None:
        """The session was closed."""


@dataclass(frozen=True)
class SavedSession:
    """The state of a session that another one continues, except that of its stream (`Session.save`).

    Its fields can be written as JSON. The options of `Service.open` are not part of it.
    """

    id: str
    audio: float  # seconds received
    texts: list[str]  # of finals
    revises: bool
    open_seconds: float  # since the stream was opened
    decoder: dict[str, Any]  # arguments of `_AudioDecoder.resumed`


class Session:
    """One client's stream; opened by `Service.open`. For one task at a time; an asynchronous context manager.

    `requested_ms` is the chunk size that the client requested, and `requested_final_ms` that of finals (None: none).
    The stream starts with those of `options`, which overload may change.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        observer: SessionObserver,
        *,
        transport: str,
        sample_rate: int,
        channels: int,
        encoding: str,
        requested_ms: int,
        options: Options,
        client: Client,
        upload: bool = False,
        normalizer: Normalizer | None = None,
        clock: Callable[[], float] = time.monotonic,
        requested_final_ms: int | None = None,
        saved: SavedSession | None = None,
        snapshot: StreamSnapshot | None = None,
    ) -> None:
        self.id = saved.id if saved else secrets.token_hex(6)
        self.transport, self.client, self.upload = transport, client, upload
        self.requested_ms, self.requested_final_ms = requested_ms, requested_final_ms
        self.revises = options.get("final_chunk_ms") is not None  # whether partials may revise what is not stable
        self.audio = 0.0  # seconds received
        self.error: str | None = None
        self._model, self._limits, self._observer = model, limits, observer
        self._normalizer, self._clock = normalizer, clock
        self._decode = _AudioDecoder(encoding, channels, sample_rate)
        self._rate, self._channels, self._options = sample_rate, channels, options.copy()  # as they are set
        self._opened_at = self._quiet_since = clock()
        self._texts: list[str] = []
        if saved:
            self._decode = _AudioDecoder.resumed(**saved.decoder)
            self._rate, self._channels = self._decode.sample_rate, self._decode.channels
            self.audio, self._texts, self.revises = saved.audio, [*saved.texts], saved.revises
            self._opened_at -= saved.open_seconds
        self._stream: AsyncLiveStream
        if snapshot is None:
            self._stream = model.astream(sample_rate=self._rate, channels=self._channels, **options)
        else:
            session = model.open_session(self._rate, self._channels, snapshot=snapshot, **options)
            self._stream = AsyncLiveStream(session)
        self._needs_task = normalizer is not None or self._stream.session.has_vad  # for each message
        self._on_pushed: OnPushed | None = None  # of a call of `start_push` whose audio is not decoded yet
        self._push_start = 0.0, 0.0, 0  # of the last call: the time, seconds of its audio, the stream's steps
        self._pending_seconds, self._pending_at = 0.0, clock()  # leaky bucket of `pace`
        self._ended = False
        self._trace: SessionTrace | None = None

    def trace(self, trace: SessionTrace) -> None:
        """Report the times of the session to `trace`. Called before the first audio."""
        self._trace = trace
        trace.attach(self._stream.trace())

    @property
    def text(self) -> str:
        """The text of all final utterances."""
        return join_texts(self._texts)

    @property
    def itn(self) -> bool:
        """Whether finals are in written form."""
        return self._normalizer is not None

    @property
    def language(self) -> str:
        """The language that is set."""
        return self._stream.language

    @property
    def text_language(self) -> str | None:
        """The language that is set; if the model detects it, the last one detected, and None before."""
        return self._stream.result.language

    @property
    def final_chunk_ms(self) -> int | None:
        """Chunk size of the accurate lane, which provides the text of finals; None without one."""
        return self._stream.final_chunk_ms

    @property
    def lane_can_change(self) -> bool:
        """Whether `set_final_chunk_ms` may be called: not after the end, and not while a thread accepts audio (VAD)."""
        return not (self._ended or self._stream.feeding)

    # -- for protocols -------------------------------------------------------------------------------------------------

    async def push(self, data: bytes) -> list[Event]:
        """Process audio in the session's encoding and return new events.

        Raises `AudioError`, `StreamError` and `BackendError`, as a stream does.
        """
        await self.pace(len(data))
        pcm = self._samples(data)
        start, steps = self._clock(), self._stream.steps
        events = await self.push_pcm(pcm)
        seconds = len(pcm) / self._rate
        if self._stream.steps > steps and seconds <= _MAX_LIVE_SECONDS:
            self._observer.record_latency(self._stream.chunk_ms, self._clock() - start, seconds)
        return events

    def start_push(self, data: bytes, on_pushed: OnPushed, message_bytes: int = 0) -> bool:
        """Start to process audio as `push` does; `on_pushed` is called with the new events, or with an error.

        `on_pushed` is called in the event loop, maybe before this method returns. Nothing else may be pushed before.
        For the rate limit, `message_bytes` are added to the size of the audio. Returns False, without any effect, if
        the session cannot process the audio without a task: if the client must be slowed down, if the message is long,
        and with VAD or inverse text normalization.
        """
        size, now = len(data), self._clock()
        limits = self._limits
        seconds = (max(size, _MIN_MESSAGE_BYTES) + message_bytes) / limits.max_bytes_per_second
        pending = self._pending_seconds - (now - self._pending_at)
        pending = pending + seconds if pending > 0 else seconds
        if (
            pending > _BURST_SECONDS
            or size > self._decode.slice_bytes
            or size > limits.max_message_bytes
            or self._needs_task
        ):
            return False
        self._pending_seconds, self._pending_at = pending, now
        self._on_pushed = on_pushed
        try:
            pcm = self._samples(data)
            stream = self._stream  # `_samples` may have opened another one
            if stream.on_progress is None:
                stream.listen(self._continue_push)
            session, count = stream.session, len(pcm)
            self._push_start = now, count / self._rate, session.steps
            if count:
                session.feed(pcm)
        except Exception as error:
            self._on_pushed = None
            on_pushed(error)
            return True
        before = self.audio
        self.audio += (seconds := self._push_start[1])
        self._observer.record_audio(seconds)
        if self._trace is not None:
            self._trace.received(before, self.audio)
        self._continue_push()
        return True

    def _continue_push(self) -> None:
        """Complete `start_push` if its audio is decoded."""
        on_pushed = self._on_pushed
        if on_pushed is None:
            return
        session = self._stream.session
        result: list[Event] | Exception
        try:
            events = session.poll()
            if events is None:
                return
            result = events
            for event in events:
                if event.kind == "final":
                    self._record_final(event)
            if self._trace is not None:
                self._trace.add(events, session.end_sample)
            started, seconds, steps = self._push_start
            self._quiet_since = now = self._clock()
            if session.steps > steps:
                self._observer.record_latency(session.chunk_ms, now - started, seconds)
        except Exception as error:
            result = error
        self._on_pushed = None
        on_pushed(result)

    async def push_pcm(self, pcm: NDArray[Any]) -> list[Event]:
        """Process samples [N] or [N, channels], without a rate limit, and return new events."""
        self._check_open()
        self._stream.check(pcm)  # the whole message, before any of it is processed
        events: list[Event] = []
        # One slice at a time: a message with minutes of audio must not block the event loop.
        size = _slice_samples(self._rate, pcm.shape[1] if pcm.ndim == 2 else 1)
        for start in range(0, len(pcm), size):
            samples = pcm[start : start + size]
            before, seconds = self.audio, len(samples) / self._rate
            self.audio += seconds
            self._observer.record_audio(seconds)
            if self._trace is not None:
                self._trace.received(before, self.audio)
            events += await self._record(await self._stream.push_events(samples))
            if start + size < len(pcm):
                await asyncio.sleep(0)
                if self._ended:
                    break
        return events

    async def commit(self) -> list[Event]:
        """End the utterance: decode all audio received and return the events. A new utterance begins."""
        await self.pace_operation()
        if self._ended:
            return []
        events = await self.push_pcm(self._samples(b"", last=True))
        self._decode.reset()
        return events + await self._record(await self._stream.end_utterance())

    async def clear(self) -> None:
        """Discard the current utterance. A new one begins."""
        await self.pace_operation()
        if not self._ended:
            self._decode.reset()
            await self._stream.end_utterance()
            if self._trace is not None:
                self._trace.discard(self._stream.end_sample)

    async def finish(self) -> list[Event]:
        """End the stream: decode all audio received, return the last events, and close the session."""
        if self._ended:
            return []
        events = await self.push_pcm(self._samples(b"", last=True))
        self._ended = True
        events += await self._record(await self._stream.finish_events())
        self.close()
        return events

    @property
    def is_open(self) -> bool:
        """Whether the session was neither finished nor closed."""
        return not self._ended

    def save(self) -> tuple[SavedSession, int, Callable[[], StreamSnapshot]] | None:
        """Begin to save the session, so that another one can continue it.

        Returns the state, the number of the bytes received last that are not part of it, because they are the beginning
        of a sample or of a WAV header, and a function that returns the snapshot of the stream (`AsyncLiveStream.save`).
        None if the session cannot be saved at present. All events must have been returned. Raises the stream's error.
        """
        if self._ended or self._on_pushed or (pending := self._decode.pending) is None:
            return None
        if (complete := self._stream.save()) is None:
            return None
        open_seconds = self._clock() - self._opened_at
        saved = SavedSession(self.id, self.audio, [*self._texts], self.revises, open_seconds, self._decode.save())
        return saved, pending, complete

    def close(self, error: str | None = None) -> None:
        """Release the stream. Later calls have no effect."""
        self._ended = True
        self.error = self.error or error
        self._on_pushed = self._stream.on_progress = None
        self._stream.close()
        if self._trace is not None:
            trace, self._trace = self._trace, None
            trace.close(self.error, self.audio)
        self._observer.session_closed(self)

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[None]:
        """Limit the time of waiting for the client. Raises `Expired` after the idle or the maximum-duration timeout.

        Audio of `start_push` that is received meanwhile restarts the idle timeout, which does not pass before that
        audio is decoded.
        """
        limits = self._limits
        self._quiet_since = self._clock()
        end = self._opened_at + limits.max_seconds
        timeout = asyncio.timeout(None)
        timer = _ReceiveTimer(self._receiving_seconds, timeout)
        try:
            async with timeout:
                timer.check()
                yield
        except TimeoutError:
            if end <= self._quiet_since + limits.idle_seconds:
                raise Expired(f"the stream was open for {limits.max_seconds:.0f} s, the longest allowed.") from None
            raise Expired(f"nothing was received for {limits.idle_seconds:.0f} s; open a new stream.") from None
        finally:
            timer.cancel()

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """Limit the time of sending to the client. Raises `Expired` if it does not read."""
        try:
            async with asyncio.timeout(self._limits.send_seconds):
                yield
        except TimeoutError:
            error = Expired(f"results were not read for {self._limits.send_seconds:.0f} s.")
            error.unread = True
            raise error from None

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """Set the chunk size of the stream from the next chunk on."""
        self._options["chunk_ms"] = chunk_ms
        self._stream.set_chunk_ms(chunk_ms)

    def set_final_chunk_ms(self, final_chunk_ms: int | None) -> None:
        """Set the chunk size of finals from the next utterance on; None: that of partials.

        Raises `CapacityError` if no slot is free, and the stream's error if it failed.
        """
        self._stream.set_final_chunk_ms(final_chunk_ms)
        self._options["final_chunk_ms"] = final_chunk_ms
        self.revises = self.revises or final_chunk_ms is not None

    def set_language(self, language: str) -> None:
        """Set the language of the stream from the next chunk on. `language` is a name of the model's languages."""
        self._stream.set_language(language)

    async def pace(self, size: int, max_bytes: int | None = None, min_bytes: int = _MIN_MESSAGE_BYTES) -> None:
        """Delay a client that sends faster than `max_bytes_per_second`, and let other tasks run.

        Every message counts as at least `min_bytes`, so that many small ones cannot bypass the limit. Raises
        `AudioError` for a message of more than `max_bytes` (None: `max_message_bytes`).
        """
        max_bytes = self._limits.max_message_bytes if max_bytes is None else max_bytes
        if size > max_bytes:
            raise AudioError(f"a message has {size} bytes; the maximum is {max_bytes}: send smaller messages.")
        await self._pace(max(size, min_bytes) / self._limits.max_bytes_per_second)

    async def pace_operation(self) -> None:
        """Delay a client that requests the end of utterances, or new streams, faster than the model can follow."""
        await self._pace(_OPERATION_SECONDS)

    def continue_pace(self, session: Session) -> None:
        """Continue the rate limit of `session`, which the same client used before this one."""
        self._pending_seconds, self._pending_at = session._pending_seconds, session._pending_at

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close(str(error) if isinstance(error, NemostreamError) else "cancelled" if error else None)

    # -- private -------------------------------------------------------------------------------------------------------

    async def _pace(self, seconds: float) -> None:
        now = self._clock()
        self._pending_seconds = max(0.0, self._pending_seconds - (now - self._pending_at)) + seconds
        self._pending_at = now
        await asyncio.sleep(max(0.0, self._pending_seconds - _BURST_SECONDS))

    def _receiving_seconds(self) -> float:
        """Return for how long to wait for the client from now on; while audio is decoded, at least a short time."""
        now, limits = self._clock(), self._limits
        quiet_since = now if self._on_pushed else self._quiet_since
        seconds = min(self._opened_at + limits.max_seconds, quiet_since + limits.idle_seconds) - now
        return max(seconds, _BUSY_SECONDS) if self._on_pushed else seconds

    def _check_open(self) -> None:
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")

    def _samples(self, data: bytes, last: bool = False) -> NDArray[Any]:
        """Decode a client's bytes. A WAV header among them sets the stream's sample rate and channels."""
        self._check_open()
        pcm, decode = self._decode(data, last), self._decode
        if (decode.sample_rate, decode.channels) != (self._rate, self._channels):
            if self.audio:
                raise AudioError(
                    f"a WAV file of {decode.sample_rate} Hz and {decode.channels} channel(s) was received on a stream "
                    f"of {self._rate} Hz and {self._channels}; open a new stream for it."
                )
            self._stream.close()
            self._rate, self._channels = decode.sample_rate, decode.channels
            options = self._options | Options(language=self.language)
            self._stream = self._model.astream(sample_rate=self._rate, channels=self._channels, **options)
            if self._trace is not None:
                self._trace.attach(self._stream.trace())
        return pcm

    async def _record(self, events: list[Event]) -> list[Event]:
        """Normalize and record final events."""
        for index, event in enumerate(events):
            if event.kind == "final":
                if self._normalizer is not None:
                    event = events[index] = await self._normalizer.rewrite(event)
                self._record_final(event)
        if self._trace is not None:
            self._trace.add(events, self._stream.end_sample)
        return events

    def _record_final(self, event: Event) -> None:
        if not event.text:  # it only withdraws the partials
            return
        self._texts.append(event.text)
        self._observer.record_utterance(self, event)


class _ReceiveTimer:
    """Ends a timeout when `seconds_left` returns 0 or less.

    There is one timer for all audio that is received meanwhile: setting one for each message would cost more. It is not
    a nested function that sets itself again, because the cycle of references would keep the session until a garbage
    collection.
    """

    def __init__(self, seconds_left: Callable[[], float], timeout: asyncio.Timeout) -> None:
        self._seconds_left, self._timeout, self._loop = seconds_left, timeout, asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None

    def check(self) -> None:
        if (seconds := self._seconds_left()) > 0:
            self._handle = self._loop.call_later(seconds, self.check)
        else:
            self._timeout.reschedule(self._loop.time())

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


def _slice_samples(rate: int, channels: int) -> int:
    """Return the number of samples per channel that are processed before other tasks run."""
    return max(1, min(round(_SLICE_SECONDS * rate), _SLICE_VALUES // channels))


# -- encodings ---------------------------------------------------------------------------------------------------------


def _g711(law: str) -> NDArray[np.int16]:
    """Return the 16-bit sample of each byte of G.711 (ITU-T G.711), shape [256]."""
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


class _AudioDecoder:
    """Decodes the bytes of an encoding to samples [N] or [N, channels]; buffers incomplete samples.

    The first bytes, and the first ones after `reset`, may be a WAV file: its samples are decoded as its header states,
    and the bytes around them are discarded. Raises `AudioError` for another container.
    """

    def __init__(self, encoding: str, channels: int, sample_rate: int) -> None:
        if encoding not in ENCODINGS:
            raise OptionError(f"encoding is {encoding!r}; it must be one of {', '.join(ENCODINGS)}.")
        self.sample_rate, self.channels = sample_rate, channels
        self._set_encoding(encoding)
        self._rest = b""  # bytes of an incomplete sample
        self._start: bytes | None = b""  # bytes received while they may be the start of a container
        self._wav: WavStream | None = None

    def __call__(self, data: bytes, last: bool = False) -> NDArray[Any]:
        """Decode `data`; with `last` no more bytes follow."""
        if self._start is not None:
            data = self._start + data
            if undecided(data) and not last:
                self._start = data
                data = b""
            else:
                self._start = None
                if container := container_of(data):
                    self._unwrap(container)
        if self._wav:
            data = self._wav.push(data)
            if header := self._wav.header:
                self.sample_rate, self.channels = header.sample_rate, header.channels
                self._set_encoding(header.encoding)
        if self._rest:
            data = self._rest + data
        complete = len(data) - len(data) % self._frame_bytes
        self._rest = data[complete:]
        samples: NDArray[Any] = np.frombuffer(data, self._dtype, complete // self._dtype.itemsize)
        if self._table is not None:
            samples = self._table[samples]
        return samples if self.channels == 1 else samples.reshape(-1, self.channels)

    @property
    def pending(self) -> int | None:
        """Number of bytes received last that `save` does not include: the beginning of a sample or of a WAV header.

        None if bytes between them were processed.
        """
        header = self._wav.pending if self._wav else 0
        return None if header and self._rest else len(self._rest) + len(self._start or b"") + header

    def save(self) -> dict[str, Any]:
        """Return the state without the pending bytes, as arguments of `resumed`. It can be written as JSON."""
        wav = self._wav.state() if self._wav else None
        if wav and wav[4] is not None:
            wav[4] += len(self._rest)  # they are received again
        return {
            "encoding": self._encoding,
            "channels": self.channels,
            "sample_rate": self.sample_rate,
            "started": self._start is None,
            "wav": wav,
        }

    @classmethod
    def resumed(
        cls, encoding: str, channels: int, sample_rate: int, started: bool, wav: list[int | None] | None
    ) -> _AudioDecoder:
        """Return a decoder in a saved state. `started`: it is known whether the audio is a WAV file; `wav`: its state.

        Raises `ValueError` if the state is not valid.
        """
        decoder = cls(encoding, channels, sample_rate)
        decoder._start = None if started else b""
        decoder._wav = None if wav is None else WavStream.resumed(wav)
        return decoder

    def reset(self) -> None:
        """Discard incomplete samples; the next bytes may be a new WAV file."""
        self._rest, self._start = b"", b""
        if self._wav and self._wav.complete:
            self._wav = None

    def _set_encoding(self, encoding: str) -> None:
        self._encoding = encoding
        name, self._table = ENCODINGS[encoding]
        self._dtype = np.dtype(name)
        self._frame_bytes = self._dtype.itemsize * self.channels
        # Bytes that are processed at once. The stream rejects invalid numbers of channels, later.
        self.slice_bytes = _slice_samples(self.sample_rate, max(self.channels, 1)) * self._frame_bytes

    def _unwrap(self, container: str) -> None:
        if container != "WAV":
            raise AudioError(
                f"the audio is a file of type {container}; a stream accepts samples ({', '.join(ENCODINGS)}) "
                "or WAV. Send the file to POST /v1/audio/transcriptions or Riva's Recognize, or decode it first: "
                "ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -."
            )
        self._wav, self._rest = WavStream(), b""
