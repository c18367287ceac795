"""`POST /v1/audio/transcriptions`: OpenAI's transcription endpoint, for recordings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute

from nemostream.errors import NemostreamError, OptionError
from nemostream.runtime.text import formats
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.scripts import separator
from nemostream.serving.client import shorten
from nemostream.serving.languages import english_name, languages_of, select_language, to_openai
from nemostream.serving.protocols.dependencies import ERROR_RESPONSES, ServiceDependency
from nemostream.serving.uploads.upload import Upload

_MAX_FIELDS, _MAX_FIELD_BYTES = 32, 64 << 10  # of a form, besides its one file
_FORM_FIELDS = (
    "file",
    "model",
    "language",
    "languages[]",
    "keywords[]",
    "prompt",
    "response_format",
    "temperature",
    "stream",
    "timestamp_granularities[]",
    "chunking_strategy",
    "chunk_ms",
    "itn",
)


class _UploadRequest(Request):
    """A request whose form has one file and few, short fields."""

    def form(self, **limits: Any) -> Any:
        return super().form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)


class _UploadRoute(APIRoute):
    """Sets the limits of a form where the request is created: FastAPI reads the form before it calls the endpoint."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_upload(request: Request) -> Response:
            return await handle(_UploadRequest(request.scope, request.receive))

        return handle_upload


router = APIRouter(tags=["OpenAI"], route_class=_UploadRoute)


@router.post("/v1/audio/transcriptions", responses=ERROR_RESPONSES, response_model=None)
async def transcriptions(
    request: Request,
    service: ServiceDependency,
    file: Annotated[UploadFile, File(description="WAV, FLAC, Ogg or MP3.")],
    model: Annotated[str, Form(description="Ignored: the server has one model.")] = "nemostream",
    language: Annotated[
        str | None, Form(description="Language of the recording: de, de-DE, or auto. Default: the server's.")
    ] = None,
    languages: Annotated[
        list[str] | None,
        Form(alias="languages[]", description="Possible languages; among several, the model detects the language."),
    ] = None,
    keywords: Annotated[list[str] | None, Form(alias="keywords[]", description="Phrases to boost.")] = None,
    prompt: Annotated[str | None, Form(description="Ignored.")] = None,
    response_format: Annotated[Literal["json", "text", "srt", "vtt", "verbose_json"], Form()] = "json",
    temperature: Annotated[float, Form(description="Ignored: decoding is greedy.")] = 0.0,
    stream: Annotated[bool, Form(description="Send server-sent events while the recording is transcribed.")] = False,
    granularities: Annotated[list[Literal["word", "segment"]] | None, Form(alias="timestamp_granularities[]")] = None,
    chunking_strategy: Annotated[
        str | None, Form(description="auto, which has no effect; other values are rejected.")
    ] = None,
    chunk_ms: Annotated[int | None, Form(description="Chunk size (not part of OpenAI's API).")] = None,
    itn: Annotated[
        bool,
        Form(description="Write numbers, dates and amounts in digits; needs the itn extra (not part of OpenAI's API)."),
    ] = False,
) -> Response:
    """Transcribe a recording."""
    _check_fields((await request.form()).keys())
    _check_options(chunking_strategy, stream, response_format)
    name = select_language(service.model.manifest.languages, language, languages or ())
    recording = Upload(
        service,
        "http",
        _descriptor(file),
        shorten(file.filename or "the file"),
        # Server-sent events end by themselves when the client disconnects.
        None if stream else request.is_disconnected,
        chunk_ms=chunk_ms,
        language=name,
        client=request.scope["nemostream.client"],
        phrases=await service.compile_phrases(keywords or None),
        normalizer=await service.normalizer(itn, name),
    )
    # Only models that detect the language report the languages, as OpenAI's do.
    reported = service.check_language(name) if service.model.manifest.languages.prompts else None
    if stream:
        first = await anext(recording)  # raises errors before the response starts
        assert first is None
        events = _server_sent_events(recording, reported, finals_only=itn)
        return StreamingResponse(events, media_type="text/event-stream")
    finals = [event async for event in recording if event and event.kind == "final"]
    return _response(recording, finals, reported, response_format, granularities or ["segment"])


def _check_fields(names: Iterable[str]) -> None:
    """Raise `OptionError` for the first form field that is not supported."""
    for name in names:
        if name.startswith("chunking_strategy["):
            raise OptionError("chunking_strategy is an object; only auto is supported: the server streams recordings.")
        if name not in _FORM_FIELDS:
            raise OptionError(f"the form field {shorten(name)!r} is not supported; use {', '.join(_FORM_FIELDS)}.")


def _check_options(chunking_strategy: str | None, stream: bool, response_format: str) -> None:
    if chunking_strategy not in (None, "", "auto"):
        raise OptionError(f"chunking_strategy is {shorten(chunking_strategy)!r}; only auto is supported.")
    if stream and response_format not in ("json", "text"):
        raise OptionError(f"stream works with response_format json or text, not {response_format}.")


def _descriptor(file: UploadFile) -> int:
    """Return the descriptor of the (anonymous) temporary file that holds an upload."""
    spooled = cast(tempfile.SpooledTemporaryFile[bytes], file.file)
    spooled.rollover()
    spooled.flush()
    return spooled.fileno()


def _response(
    recording: Upload,
    finals: list[Event],
    stream_language: str | None,
    response_format: str,
    granularities: list[Literal["word", "segment"]],
) -> Response:
    """Return the response. `stream_language` is the language that is set, None if languages are not reported."""
    warning = recording.warning.encode("ascii", "replace").decode()
    headers = {"Nemostream-Warning": warning} if warning else None
    words = [word for event in finals for word in event.words]
    match response_format:
        case "text":
            return PlainTextResponse(recording.text + "\n", headers=headers)
        case "srt":
            return PlainTextResponse(formats.srt(words, recording.seconds), headers=headers)
        case "vtt":
            return PlainTextResponse(formats.vtt(words, recording.seconds), headers=headers)
    body: dict[str, Any] = {
        "text": recording.text,
        "usage": {"type": "duration", "seconds": round(recording.seconds)},
    }
    if response_format == "json":
        if stream_language is not None:
            body["languages"] = to_openai(languages_of(words, stream_language))
        return JSONResponse(body, headers=headers)
    language = english_name(recording.language)
    body |= {"task": "transcribe", "language": language, "duration": round(recording.seconds, 3)}
    if "word" in granularities:
        body["words"] = [{"word": word.text, **formats.time_span(word)} for word in words]
    if "segment" in granularities:
        body["segments"] = [_segment(event) for event in finals]
    return JSONResponse(body, headers=headers)


def _segment(event: Event) -> dict[str, Any]:
    return {
        "id": event.utterance,
        "seek": 0,
        **formats.time_span(event),
        "text": event.text,
        "tokens": [token.id for token in event.tokens],
        "temperature": 0.0,
        "avg_logprob": sum(token.score for token in event.tokens) / len(event.tokens),
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }


async def _server_sent_events(recording: Upload, stream_language: str | None, finals_only: bool) -> AsyncIterator[str]:
    """Yield OpenAI's server-sent events: what was added to the text, then the whole text.

    `stream_language` is the language that is set, None if languages are not reported. With `finals_only` a delta is an
    utterance: the written form of a partial text could change.
    """
    sent, utterance, space, languages = "", -1, "", list[str]()
    try:
        async for event in recording:
            assert event is not None
            if event.kind not in (("final",) if finals_only else ("partial", "final")):
                continue
            if event.utterance != utterance:
                sent, utterance = "", event.utterance
            if delta := event.text[len(sent) :]:
                yield _sse({"type": "transcript.text.delta", "delta": (space if not sent else "") + delta})
                sent, space = event.text, separator(event.text)  # before the next utterance
            if event.kind == "final" and stream_language is not None:
                languages += languages_of(event.words, stream_language)
        done: dict[str, Any] = {"type": "transcript.text.done", "text": recording.text}
        yield _sse(done if stream_language is None else done | {"languages": to_openai(languages)})
    except NemostreamError as error:
        yield _sse({"error": {"message": str(error), "type": "server_error"}})


def _sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"
