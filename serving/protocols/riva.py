"""NVIDIA Riva's speech recognition over gRPC: `RivaSpeechRecognition` and gRPC's health service.

The messages are those of NVIDIA's package `nvidia-riva-client`. Its clients send files with their headers, also to
`StreamingRecognize`: a session (`session.py`) accepts WAV, other containers need `Recognize`.

Every field of the messages is supported, rejected by name or ignored; docs/protocols.md lists them. Riva recommends a
boost of 20 to 100 for phrases; a boost of 20 is a weight of 1, NeMo's usual weight.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
from riva.client.proto import health_pb2, health_pb2_grpc, riva_asr_pb2, riva_asr_pb2_grpc, riva_audio_pb2

from nemostream.bundle import LanguageConfig
from nemostream.errors import AudioError, CapacityError, NemostreamError, OptionError
from nemostream.runtime.audio.containers import container_of
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.scripts import separator
from nemostream.serving.client import Client, shorten
from nemostream.serving.errors import Expired, status_of
from nemostream.serving.languages import from_riva, languages_of, to_riva
from nemostream.serving.network.access import key_number, keys_of, request_key
from nemostream.serving.network.proxies import TrustedProxies
from nemostream.serving.service import Service
from nemostream.serving.session import Session
from nemostream.serving.uploads.upload import Upload

log = logging.getLogger("nemostream.serving")

_ENCODINGS = {
    riva_audio_pb2.AudioEncoding.ENCODING_UNSPECIFIED: "pcm_s16le",
    riva_audio_pb2.AudioEncoding.LINEAR_PCM: "pcm_s16le",
    riva_audio_pb2.AudioEncoding.MULAW: "mulaw",
    riva_audio_pb2.AudioEncoding.ALAW: "alaw",
}
_FILE_ENCODINGS = (riva_audio_pb2.AudioEncoding.FLAC, riva_audio_pb2.AudioEncoding.OGGOPUS)
_CONFIG_SECONDS = 10.0  # for the first message of a stream
_CLIENT: ContextVar[Client] = ContextVar("client")  # of the call that the current task handles
_UNIT_BOOST = 20.0  # Riva's boost for a weight of 1
_CUSTOM_KEYS = ("chunk_ms", "final_chunk_ms", "itn")  # of custom_configuration
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def add_to(server: grpc.aio.Server, service: Service) -> None:
    """Add Riva's recognition and gRPC's health service to a server."""
    riva_asr_pb2_grpc.add_RivaSpeechRecognitionServicer_to_server(_Recognizer(service), server)
    health_pb2_grpc.add_HealthServicer_to_server(_Health(service), server)


class _Health(health_pb2_grpc.HealthServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        statuses = health_pb2.HealthCheckResponse.ServingStatus
        serving = self._service.state == "ready"
        return health_pb2.HealthCheckResponse(status=statuses.SERVING if serving else statuses.NOT_SERVING)


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Rejects calls before their first message is read: those without a valid key, and recordings above the limits.

    gRPC reads the message of a unary call before it calls the handler, whatever its size. The handlers returned here
    are of the streaming kind, which is the same on the wire, and read the message themselves.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._keys = keys_of(service.settings)
        self._proxies = TrustedProxies(service.settings.trusted_proxies)

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc.health."):
            return handler
        metadata = {name: _text(value) for name, value in details.invocation_metadata or ()}
        # authorization-bin is gRPC's way to send a key that is not ASCII.
        metadata.setdefault("authorization", metadata.get("authorization-bin", ""))
        number = key_number(request_key(metadata), self._keys) if self._keys else None
        if self._keys and number is None:
            return grpc.stream_stream_rpc_method_handler(self._deny)
        key = "" if number is None else f"key {number}"
        if handler.unary_unary:
            is_recording = details.method.endswith("/Recognize")
            return grpc.stream_unary_rpc_method_handler(
                self._unary(handler.unary_unary, key, is_recording),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.stream_stream_rpc_method_handler(
            self._streaming(handler.stream_stream, key), handler.request_deserializer, handler.response_serializer
        )

    def _streaming(self, handler: Any, key: str) -> Any:
        async def handle(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            _CLIENT.set(self._client(context, key))
            await handler(requests, context)

        return handle

    def _unary(self, handler: Any, key: str, is_recording: bool) -> Any:
        async def handle(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            _CLIENT.set(self._client(context, key))
            if not is_recording:
                return await handler(await self._receive_one(requests, context), context)
            try:
                admission = self._service.uploads.admit(None, _CLIENT.get())
            except CapacityError as error:
                await _abort(context, error)
            with admission:
                return await handler(await self._receive_one(requests, context), context)

        return handle

    async def _receive_one(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
        """Return the message of a unary call."""
        try:
            async with asyncio.timeout(self._service.settings.body_seconds):
                return await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message.")

    async def _deny(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        self._service.metrics.denied.labels("key").inc()
        log.warning("request denied", extra={"reason": "key", "peer": self._client(context, "").address})
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED,
            "a valid API key is required: send authorization: Bearer KEY in the metadata.",
        )

    def _client(self, context: grpc.aio.ServicerContext, key: str) -> Client:
        kind, _, rest = str(context.peer()).partition(":")
        peer = unquote(rest).rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else str(context.peer())
        metadata = context.invocation_metadata() or ()
        forwarded = [_text(value) for name, value in metadata if name == "x-forwarded-for"]
        address = self._proxies.client(peer, ",".join(forwarded))
        client = Client(key or address, address)
        if self._service.settings.otel:
            return client.with_trace({name: _text(value) for name, value in metadata})
        return client


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


class _Recognizer(riva_asr_pb2_grpc.RivaSpeechRecognitionServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    async def StreamingRecognize(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        try:
            await self._stream(requests, context)
        except NemostreamError as error:
            if isinstance(error, Expired):
                self._service.metrics.timeouts.inc()
            await _abort(context, error)

    async def Recognize(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            response = await self._recognize(request)
            if request.HasField("id"):
                response.id.CopyFrom(request.id)
            return response
        except NemostreamError as error:
            await _abort(context, error)

    async def GetRivaSpeechRecognitionConfig(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            manifest = self._service.model.manifest
        except NemostreamError as error:
            await _abort(context, error)
        if request.model_name not in ("", manifest.name):
            await _abort(
                context, OptionError(f"there is no model {shorten(request.model_name)!r}, only {manifest.name!r}.")
            )
        response = riva_asr_pb2.RivaSpeechRecognitionConfigResponse
        parameters = {
            # As Riva's models of several languages: clients split it at the commas.
            "language_code": ",".join(to_riva(name) or "multi" for name in manifest.languages.names),
            "sample_rate": str(manifest.features.sample_rate),
            "type": "online",
            "streaming": "True",
            "offline": "True",
            "chunk_ms": str(self._service.settings.chunk_ms),
            "chunks_ms": ",".join(map(str, self._service.chunks)),
        }
        return response(model_config=[response.Config(model_name=manifest.name, parameters=parameters)])

    async def _stream(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        """Transcribe a stream. Raises `NemostreamError`."""
        seconds = min(_CONFIG_SECONDS, self._service.settings.idle_seconds)
        try:
            async with asyncio.timeout(seconds):
                first = await anext(aiter(requests), None)
        except TimeoutError:
            raise Expired(f"no streaming_config was received in {seconds:.0f} s.") from None
        if first is None or not first.HasField("streaming_config"):
            raise OptionError("the first message of a stream must be its streaming_config.")
        _force_eou(first)
        config = first.streaming_config
        writer = _ResponseWriter(context, config, first.id if first.HasField("id") else None)
        options = await self._options(config.config)
        session: Session | None = None
        try:
            session = self._open(config.config, options)
            while True:
                async with session.receiving():
                    request = await anext(aiter(requests), None)
                if request is None:
                    break
                if request.HasField("streaming_config"):
                    raise OptionError("streaming_config can only be in the first message of a stream.")
                await writer.write(session, await session.push(request.audio_content))
                if _force_eou(request):  # the utterance ends after the audio of its message
                    await writer.write(session, await session.commit())
            await writer.write(session, await session.finish())
        except BaseException as error:
            if session:
                session.close(str(error) if isinstance(error, NemostreamError) else "the client disconnected")
            raise
        session.close()

    async def _options(self, config: Any) -> dict[str, Any]:
        """Return the options for `Service.open`; phrases are compiled on a thread."""
        options = _options(config, self._service.model.manifest.languages)
        return options | {
            "phrases": await self._service.compile_phrases(options.get("phrases")),
            "normalizer": await self._service.normalizer(_itn(config), options["language"]),
        }

    def _open(self, config: Any, options: dict[str, Any], upload: bool = False) -> Session:
        encoding = _ENCODINGS.get(config.encoding)
        if encoding is None:
            names = {number: name for name, number in riva_audio_pb2.AudioEncoding.items()}
            name = names.get(config.encoding, f"encoding {config.encoding}")
            raise OptionError(f"streams of {name} are not supported; send LINEAR_PCM, MULAW or ALAW, or use Recognize.")
        return self._service.open(
            "riva",
            sample_rate=config.sample_rate_hertz or 16000,
            channels=config.audio_channel_count or 1,
            encoding=encoding,
            upload=upload,
            client=_CLIENT.get(),
            **options,
        )

    async def _recognize(self, request: Any) -> Any:
        """Transcribe a recording. Raises `NemostreamError`."""
        config, options = request.config, await self._options(request.config)
        if container_of(request.audio) or config.encoding in _FILE_ENCODINGS:
            events, seconds = await self._recognize_file(request.audio, options)
        else:
            events, seconds = await self._recognize_samples(request.audio, config, options)
        results = [
            riva_asr_pb2.SpeechRecognitionResult(
                alternatives=[_alternative(event, config)], channel_tag=1, audio_processed=event.audio
            )
            for event in events
            if event.kind == "final"
        ]
        if not results:
            results = [riva_asr_pb2.SpeechRecognitionResult(channel_tag=1, audio_processed=seconds)]
        return riva_asr_pb2.RecognizeResponse(results=results)

    async def _recognize_file(self, audio: bytes, options: dict[str, Any]) -> tuple[list[Event], float]:
        """Return the final events and the duration in seconds of a file."""
        with tempfile.TemporaryFile(prefix="nemostream-", buffering=0) as file:
            file.write(audio)
            upload = Upload(self._service, "riva", file.fileno(), "the audio", client=_CLIENT.get(), **options)
            return [event async for event in upload if event and event.kind == "final"], upload.seconds

    async def _recognize_samples(self, audio: bytes, config: Any, options: dict[str, Any]) -> tuple[list[Event], float]:
        """Return the events and the duration in seconds of samples in the encoding of `config`."""
        block, max_seconds = self._service.settings.max_message_bytes, self._service.settings.max_upload_seconds
        async with self._open(config, options, upload=True) as session:
            events = []
            for start in range(0, len(audio), block):
                events += await session.push(audio[start : start + block])
                if session.audio > max_seconds:
                    raise AudioError(f"the audio is longer than {max_seconds:.0f} s, the longest allowed.")
            return events + await session.finish(), session.audio


class _ResponseWriter:
    """Writes the results of a stream."""

    def __init__(self, context: grpc.aio.ServicerContext, config: Any, request_id: Any) -> None:
        self._context, self._config, self._request_id = context, config, request_id

    async def write(self, session: Session, events: Iterable[Event]) -> None:
        for event in events:
            if event.kind != "final" and not (event.kind == "partial" and self._config.interim_results):
                continue
            result = riva_asr_pb2.StreamingRecognitionResult(
                alternatives=[_alternative(event, self._config.config)],
                is_final=event.kind == "final",
                stability=_stability(event) if session.revises else 1.0,
                channel_tag=1,
                audio_processed=event.audio,
            )
            response = riva_asr_pb2.StreamingRecognizeResponse(results=[result], id=self._request_id)
            async with session.sending():
                await self._context.write(response)


def _stability(event: Event) -> float:
    """Return the share of the text that is not revised any more."""
    return event.stable_length / len(event.text) if event.text else 1.0


def _alternative(event: Event, config: Any) -> Any:
    """Return the alternative of an event. Words without a tag have the language that was set for the event."""
    words, default = event.words, to_riva(event.set_language)
    alternative = riva_asr_pb2.SpeechRecognitionAlternative(
        # Clients concatenate the results of a recording, so a final one ends with a space, as Riva's do.
        transcript=event.text + (separator(event.text) if event.kind == "final" and event.text else ""),
        confidence=min((word.confidence for word in words), default=0.0),
        language_code=map(to_riva, languages_of(words, event.set_language)),
    )
    if config.enable_word_time_offsets:
        alternative.words.extend(
            riva_asr_pb2.WordInfo(
                word=word.text,
                start_time=round(1000 * word.start),
                end_time=round(1000 * word.end),
                confidence=word.confidence,
                language_code=to_riva(word.language) or default,
            )
            for word in words
        )
    return alternative


def _options(config: Any, languages: LanguageConfig) -> dict[str, Any]:
    """Return the options of a recognition config. Raises `OptionError` for those that are not supported."""
    for enabled, name in (
        (config.diarization_config.enable_speaker_diarization, "speaker diarization"),
        (config.enable_separate_recognition_per_channel, "separate recognition per channel"),
        (config.profanity_filter, "a profanity filter"),
    ):
        if enabled:
            raise OptionError(f"{name} is not supported.")
    for key in config.custom_configuration:
        if key not in _CUSTOM_KEYS:
            raise OptionError(f"custom_configuration has no {shorten(key)!r}; its keys are {', '.join(_CUSTOM_KEYS)}.")
    options: dict[str, Any] = {"language": from_riva(languages, config.language_code)}
    for name in ("chunk_ms", "final_chunk_ms"):
        if value := config.custom_configuration.get(name):
            if not (value.isascii() and value.isdigit()):  # int() raises ValueError for digits such as "²"
                raise OptionError(f"{name} is {shorten(value)!r}; it must be a whole number of milliseconds.")
            options[name] = int(value)
    if config.endpointing_config.stop_history:
        options["endpoint_ms"] = config.endpointing_config.stop_history
    if config.speech_contexts:
        options["phrases"] = {
            phrase: context.boost / _UNIT_BOOST if context.boost else 1.0
            for context in config.speech_contexts
            for phrase in context.phrases
        } or None
    return options


def _itn(config: Any) -> bool:
    """Return whether inverse text normalization is enabled. Raises `OptionError`.

    verbatim_transcripts is false for clients that do not set it, so only true has a meaning: no normalization.
    """
    enabled = _flag("itn", config.custom_configuration.get("itn", "false"))
    if enabled and config.verbatim_transcripts:
        raise OptionError("verbatim_transcripts and custom_configuration itn exclude each other; set one of them.")
    return enabled


def _force_eou(request: Any) -> bool:
    """Return whether a message ends the utterance (runtime_config force_eou). Raises `OptionError`."""
    for key in request.runtime_config:
        if key != "force_eou":
            raise OptionError(f"runtime_config has no {shorten(key)!r}; its only key is force_eou.")
    return _flag("force_eou", request.runtime_config.get("force_eou", "false"))


def _flag(name: str, value: str) -> bool:
    if value.lower() not in _FLAGS:
        raise OptionError(f"{name} is {shorten(value)!r}; it must be true or false.")
    return _FLAGS[value.lower()]


async def _abort(context: grpc.aio.ServicerContext, error: NemostreamError) -> NoReturn:
    """End a call with the status for `error`, and when to retry as gRPC's own retries read it."""
    status = status_of(error)
    metadata: tuple[tuple[str, str], ...] = ()
    if status.retry_seconds is not None:
        metadata = (("grpc-retry-pushback-ms", str(1000 * status.retry_seconds)),)
    await context.abort(grpc.StatusCode[status.grpc], str(error), metadata)
    raise AssertionError  # abort never returns
