"""NVIDIA Riva's speech recognition over gRPC: `RivaSpeechRecognition` and gRPC's health service.

The messages are those of NVIDIA's own package, `nvidia-riva-client`. Its clients send files with their headers, also
to `StreamingRecognize`: a session (`session.py`) takes WAV, other containers are for `Recognize`.

Every field of the messages is supported, rejected by name or ignored; docs/protocols.md lists them. Riva advises a
boost of 20 to 100 for phrases; 20 is NeMo's usual weight, 1.
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

from nemostream.errors import AudioError, CapacityError, NemostreamError, OptionError
from nemostream.runtime.containers import container_of
from nemostream.runtime.utterance import Event
from nemostream.serving.access import Client, given_key, key_number, keys_of, shown
from nemostream.serving.proxies import TrustedProxies
from nemostream.serving.service import Service
from nemostream.serving.session import Draining, Expired, Session
from nemostream.serving.upload import Upload

log = logging.getLogger("nemostream.serving")

_ENCODINGS = {
    riva_audio_pb2.AudioEncoding.ENCODING_UNSPECIFIED: "pcm_s16le",
    riva_audio_pb2.AudioEncoding.LINEAR_PCM: "pcm_s16le",
    riva_audio_pb2.AudioEncoding.MULAW: "mulaw",
    riva_audio_pb2.AudioEncoding.ALAW: "alaw",
}
_FIRST_SECONDS = 10.0  # for the first message of a stream
_CLIENT: ContextVar[Client] = ContextVar("client")  # of the call that this task handles
_BOOST = 20.0  # of Riva's, that is a weight of 1
_CUSTOM = ("chunk_ms", "itn")  # keys of custom_configuration
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def add_to(server: grpc.aio.Server, service: Service) -> None:
    """Serve Riva's recognition, and gRPC's health."""
    riva_asr_pb2_grpc.add_RivaSpeechRecognitionServicer_to_server(_Riva(service), server)
    health_pb2_grpc.add_HealthServicer_to_server(_Health(service), server)


class _Health(health_pb2_grpc.HealthServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    async def Check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        kinds = health_pb2.HealthCheckResponse.ServingStatus
        serving = self._service.state == "ready"
        return health_pb2.HealthCheckResponse(status=kinds.SERVING if serving else kinds.NOT_SERVING)


class Admission(grpc.aio.ServerInterceptor):
    """Rejects a call before its first message is read: without a key, and where there is no place for a recording.

    gRPC reads the message of a unary call before it calls the handler, whatever its size. The handlers returned here
    have the streaming kind, which is the same on the wire, and read when they ask for it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._keys = keys_of(service.settings)
        self._proxies = TrustedProxies(service.settings.trusted_proxies)

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc.health."):
            return handler
        sent = {name: _text(value) for name, value in details.invocation_metadata or ()}
        sent.setdefault("authorization", sent.get("authorization-bin", ""))  # gRPC's way to send a key beyond ASCII
        number = key_number(given_key(sent), self._keys) if self._keys else None
        if self._keys and number is None:
            return grpc.stream_stream_rpc_method_handler(self._deny)
        key = "" if number is None else f"key {number}"
        if not handler.unary_unary:
            return grpc.stream_stream_rpc_method_handler(
                self._with_client(handler.stream_stream, key), handler.request_deserializer, handler.response_serializer
            )

        async def handle(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            _CLIENT.set(self._client(context, key))
            if details.method.endswith("/Recognize"):
                try:
                    place = self._service.uploads.admit(None, _CLIENT.get())
                except CapacityError as error:
                    await _abort(context, error)
                with place:
                    return await handler.unary_unary(await self._first(requests, context), context)
            return await handler.unary_unary(await self._first(requests, context), context)

        return grpc.stream_unary_rpc_method_handler(handle, handler.request_deserializer, handler.response_serializer)

    async def _first(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
        """The one message of a unary call."""
        try:
            async with asyncio.timeout(self._service.settings.body_seconds):
                return await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message.")

    async def _deny(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        self._service.metrics.denied.labels("key").inc()
        log.warning("denied", extra={"why": "key", "peer": self._client(context, "").address})
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, "an API key is required: send authorization: Bearer KEY in the metadata."
        )

    def _with_client(self, handler: Any, key: str) -> Any:
        async def handle(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            _CLIENT.set(self._client(context, key))
            await handler(requests, context)

        return handle

    def _client(self, context: grpc.aio.ServicerContext, key: str) -> Client:
        kind, _, rest = str(context.peer()).partition(":")
        peer = unquote(rest).rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else str(context.peer())
        sent = [_text(value) for name, value in context.invocation_metadata() or () if name == "x-forwarded-for"]
        address = self._proxies.client(peer, ",".join(sent))
        return Client(key or address, address)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


class _Riva(riva_asr_pb2_grpc.RivaSpeechRecognitionServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    async def StreamingRecognize(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        try:
            await self._stream(requests, context)
        except NemostreamError as error:
            if isinstance(error, Expired):
                self._service.metrics.dropped.inc()
            await _abort(context, error)

    async def Recognize(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            answer = await self._recognize(request)
            if request.HasField("id"):
                answer.id.CopyFrom(request.id)
            return answer
        except NemostreamError as error:
            await _abort(context, error)

    async def GetRivaSpeechRecognitionConfig(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            manifest = self._service.model.manifest
        except NemostreamError as error:
            await _abort(context, error)
        if request.model_name not in ("", manifest.name):
            await _abort(
                context, OptionError(f"there is no model {shown(request.model_name)!r}, only {manifest.name!r}.")
            )
        answer = riva_asr_pb2.RivaSpeechRecognitionConfigResponse
        parameters = {
            "language_code": "en-US", "sample_rate": str(manifest.features.sample_rate), "type": "online",
            "streaming": "True", "offline": "True", "chunk_ms": str(self._service.settings.chunk_ms),
            "chunks_ms": ",".join(map(str, self._service.chunks)),
        }  # fmt: skip
        return answer(model_config=[answer.Config(model_name=manifest.name, parameters=parameters)])

    async def _stream(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        """Take in a client's audio, and write what it says."""
        try:
            async with asyncio.timeout(min(_FIRST_SECONDS, self._service.settings.idle_seconds)):
                first = await anext(aiter(requests), None)
        except TimeoutError:
            raise Expired(f"no streaming_config came in {_FIRST_SECONDS:.0f} s.") from None
        if first is None or not first.HasField("streaming_config"):
            raise OptionError("the first message of a stream must be its streaming_config.")
        wanted = first.streaming_config
        _forced(first)
        request_id = first.id if first.HasField("id") else None
        options = await self._options(wanted.config)
        session: Session | None = None
        try:
            session = self._open(wanted.config, options)
            while True:
                async with session.receiving():
                    request = await anext(aiter(requests), None)
                if request is None:
                    break
                if request.HasField("streaming_config"):
                    raise OptionError("streaming_config can only be in the first message of a stream.")
                await _write(context, session, wanted, request_id, await session.push(request.audio_content))
                if _forced(request):  # the end of the utterance is after the audio of its message
                    await _write(context, session, wanted, request_id, await session.commit())
            await _write(context, session, wanted, request_id, await session.finish())
        except BaseException as error:
            if session:
                session.close(str(error) if isinstance(error, NemostreamError) else "the client hung up")
            raise
        session.close()

    async def _options(self, config: Any) -> dict[str, Any]:
        """The options of `Service.open`; phrases are compiled on a thread."""
        options = _options(config)
        return options | {
            "phrases": await self._service.compile_phrases(options.get("phrases")),
            "normalizer": await self._service.normalizer(_itn(config)),
        }

    def _open(self, config: Any, options: dict[str, Any], upload: bool = False) -> Session:
        encoding = _ENCODINGS.get(config.encoding)
        if encoding is None:
            names = {number: name for name, number in riva_audio_pb2.AudioEncoding.items()}
            name = names.get(config.encoding, f"encoding {config.encoding}")
            raise OptionError(f"a stream of {name} cannot be read; send LINEAR_PCM, MULAW or ALAW, or use Recognize.")
        rate, channels = config.sample_rate_hertz or 16000, config.audio_channel_count or 1
        return self._service.open(
            "riva",
            sample_rate=rate,
            channels=channels,
            encoding=encoding,
            upload=upload,
            client=_CLIENT.get(),
            **options,
        )

    async def _recognize(self, request: Any) -> Any:
        config, options = request.config, await self._options(request.config)
        files = riva_audio_pb2.AudioEncoding.FLAC, riva_audio_pb2.AudioEncoding.OGGOPUS
        if container_of(request.audio) or config.encoding in files:
            with tempfile.TemporaryFile(prefix="nemostream-", buffering=0) as file:
                file.write(request.audio)
                upload = Upload(self._service, "riva", file.fileno(), "the audio", client=_CLIENT.get(), **options)
                events = [event async for event in upload if event and event.kind == "final"]
                seconds = upload.seconds
        else:
            block = self._service.settings.max_message_bytes
            async with self._open(config, options, upload=True) as session:
                most = self._service.settings.max_upload_seconds
                events = []
                for start in range(0, len(request.audio), block):
                    events += await session.push(request.audio[start : start + block])
                    if session.audio > most:
                        raise AudioError(f"the audio lasts more than {most:.0f} s, the longest allowed.")
                events = [event for event in [*events, *await session.finish()] if event.kind == "final"]
                seconds = session.audio
        results = [
            riva_asr_pb2.SpeechRecognitionResult(
                alternatives=[_alternative(event, config)], channel_tag=1, audio_processed=event.audio
            )
            for event in events
        ]
        if not results:
            results = [riva_asr_pb2.SpeechRecognitionResult(channel_tag=1, audio_processed=seconds)]
        return riva_asr_pb2.RecognizeResponse(results=results)


async def _write(
    context: grpc.aio.ServicerContext, session: Session, wanted: Any, request_id: Any, events: Iterable[Event]
) -> None:
    for event in events:
        if event.kind == "end" or (event.kind == "partial" and not wanted.interim_results):
            continue
        result = riva_asr_pb2.StreamingRecognitionResult(
            alternatives=[_alternative(event, wanted.config)], is_final=event.kind == "final", stability=1.0,
            channel_tag=1, audio_processed=event.audio,
        )  # fmt: skip
        async with session.sending():
            await context.write(riva_asr_pb2.StreamingRecognizeResponse(results=[result], id=request_id))


def _alternative(event: Event, config: Any) -> Any:
    words = event.words
    alternative = riva_asr_pb2.SpeechRecognitionAlternative(
        # Clients join the results of a recording as they are, so a final one ends with a space, as Riva's do.
        transcript=event.text + (" " if event.kind == "final" else ""),
        confidence=min((word.confidence for word in words), default=0.0), language_code=["en-US"],
    )  # fmt: skip
    if config.enable_word_time_offsets:
        alternative.words.extend(
            riva_asr_pb2.WordInfo(
                word=word.text, start_time=round(1000 * word.start), end_time=round(1000 * word.end),
                confidence=word.confidence, language_code="en-US",
            )
            for word in words
        )  # fmt: skip
    return alternative


def _options(config: Any) -> dict[str, Any]:
    """What `Service.open` is to know. Raises `OptionError` for what cannot be done."""
    language = config.language_code.lower()
    if language and not language.startswith(("en", "multi")):
        raise OptionError(f"language_code is {shown(config.language_code)!r}; this model knows English.")
    for wanted, name in (
        (config.diarization_config.enable_speaker_diarization, "speaker diarization"),
        (config.enable_separate_recognition_per_channel, "separate recognition per channel"),
        (config.profanity_filter, "a profanity filter"),
    ):
        if wanted:
            raise OptionError(f"{name} is not available here.")
    for key in config.custom_configuration:
        if key not in _CUSTOM:
            raise OptionError(f"custom_configuration has no {shown(key)!r}; its keys are {', '.join(_CUSTOM)}.")
    options: dict[str, Any] = {}
    if chunk := config.custom_configuration.get("chunk_ms"):
        if not (chunk.isascii() and chunk.isdigit()):  # int() raises ValueError for digits such as "²"
            raise OptionError(f"chunk_ms is {shown(chunk)!r}; it must be whole milliseconds.")
        options["chunk_ms"] = int(chunk)
    if config.endpointing_config.stop_history:
        options["endpoint_ms"] = config.endpointing_config.stop_history
    if config.speech_contexts:
        options["phrases"] = {
            phrase: context.boost / _BOOST if context.boost else 1.0
            for context in config.speech_contexts
            for phrase in context.phrases
        } or None
    return options


def _itn(config: Any) -> bool:
    """Whether finals are wanted in written form. verbatim_transcripts is false for a client that does not set it, so
    only its true has a meaning: no normalization."""
    given = config.custom_configuration.get("itn", "false")
    if given.lower() not in _FLAGS:
        raise OptionError(f"itn is {shown(given)!r}; it must be true or false.")
    wanted = _FLAGS[given.lower()]
    if wanted and config.verbatim_transcripts:
        raise OptionError("verbatim_transcripts and custom_configuration itn exclude each other; set one of them.")
    return wanted


def _forced(request: Any) -> bool:
    """Whether a message ends the utterance: runtime_config force_eou."""
    for key in request.runtime_config:
        if key != "force_eou":
            raise OptionError(f"runtime_config has no {shown(key)!r}; its only key is force_eou.")
    given = request.runtime_config.get("force_eou", "false")
    if given.lower() not in _FLAGS:
        raise OptionError(f"force_eou is {shown(given)!r}; it must be true or false.")
    return _FLAGS[given.lower()]


async def _abort(context: grpc.aio.ServicerContext, error: NemostreamError) -> NoReturn:
    kinds = grpc.StatusCode
    code, hint = kinds.INTERNAL, _hint()
    if isinstance(error, Draining):
        code, hint = kinds.UNAVAILABLE, _hint(5000)
    elif isinstance(error, CapacityError):
        code, hint = kinds.RESOURCE_EXHAUSTED, _hint(2000)
    elif isinstance(error, OptionError | AudioError):
        code = kinds.INVALID_ARGUMENT
    elif isinstance(error, Expired):
        code = kinds.DEADLINE_EXCEEDED
    await context.abort(code, str(error), hint)
    raise AssertionError  # abort never returns


def _hint(ms: int | None = None) -> tuple[tuple[str, str], ...]:
    """When to try again, as gRPC's own retries read it."""
    return () if ms is None else (("grpc-retry-pushback-ms", str(ms)),)
