"""The web application: operations and OpenAI's transcription endpoint, behind `access.AccessMiddleware`.

WebSockets are in `websocket` (ours) and `realtime` (OpenAI's); the page is a file beside this one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from importlib import resources
from typing import Annotated, Any, Literal, cast

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

import nemostream
from nemostream.errors import AudioError, CapacityError, NemostreamError, OptionError
from nemostream.runtime.text import formats
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Word
from nemostream.serving.network.access import AccessMiddleware, answer, shown
from nemostream.serving.protocols import realtime, websocket
from nemostream.serving.service import Service
from nemostream.serving.session import Draining, Expired
from nemostream.serving.uploads.upload import Upload

_FIELDS, _FIELD_BYTES = 32, 64 << 10  # of an upload's form, besides its one file
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' blob:; worker-src 'self' blob:; style-src 'unsafe-inline'; "
    "connect-src 'self' ws: wss:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Refusal(BaseModel):
    """An error, as OpenAI's API writes it."""

    class Error(BaseModel):
        message: str
        type: str
        code: str | None = None
        param: str | None = None

    error: Error


_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": what}
    for status, what in {
        400: "The audio, an option or the form cannot be used.",
        401: "A key is missing or wrong.",
        403: "A foreign web page, or an unknown host.",
        408: "Too slow.",
        413: "The recording is too large.",
        429: "No stream is free.",
        500: "The model failed.",
        503: "The server is starting or stopping.",
    }.items()
}
_NO_MODEL: dict[int | str, dict[str, Any]] = {
    404: {"model": Refusal, "description": "No such model."},
    503: _REFUSALS[503],
}


def create_app(service: Service, ports: dict[str, int] | None = None) -> ASGIApp:
    """The application; `ports` is what `/readyz` tells of them."""
    app = _Application(
        title="nemostream",
        version=nemostream.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host that a proxy uses, without its path prefix
    )
    app.router.route_class = _Route

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> Response:
        text = (resources.files("nemostream.serving.protocols") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.head("/healthz", tags=["operations"], responses={503: {"description": "Only a restart helps."}})
    @app.get("/healthz", tags=["operations"], responses={503: {"description": "Only a restart helps."}})
    def alive() -> JSONResponse:
        """Whether it is worth keeping: not when the engine fails again and again."""
        return JSONResponse(*({"status": "failed"}, 503) if service.state == "failed" else ({"status": "alive"}, 200))

    @app.head("/readyz", tags=["operations"], responses={503: {"description": "It takes no streams now."}})
    @app.get("/readyz", tags=["operations"], responses={503: {"description": "It takes no streams now."}})
    def ready() -> JSONResponse:
        """Whether streams are taken: engines are loaded and warm, and nobody asked it to stop."""
        return JSONResponse(service.describe() | (ports or {}), 200 if service.state == "ready" else 503)

    @app.head("/metrics", tags=["operations"], response_class=PlainTextResponse)
    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", tags=["OpenAI"])
    def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_model(service.describe().get("model", "none"))]}

    @app.get("/v1/models/{model_id:path}", tags=["OpenAI"], responses=_NO_MODEL, response_model=None)
    def model(model_id: str) -> dict[str, Any] | Response:
        """The model, if it is the one that is served."""
        name = service.model.manifest.name
        if model_id == name:
            return _model(name)
        return answer(
            404,
            f"there is no model {shown(model_id)!r}, only {name!r}.",
            "invalid_request_error",
            code="model_not_found",
            param="model",
        )

    @app.post("/v1/audio/transcriptions", tags=["OpenAI"], responses=_REFUSALS, response_model=None)
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File(description="WAV, FLAC, Ogg or MP3.")],
        model: Annotated[str, Form(description="Taken as the one that is served.")] = "nemostream",
        language: Annotated[str | None, Form(description="en, or left out.")] = None,
        languages: Annotated[list[str] | None, Form(alias="languages[]", description="en only, or left out.")] = None,
        keywords: Annotated[list[str] | None, Form(alias="keywords[]", description="Phrases to boost.")] = None,
        prompt: Annotated[str | None, Form(description="Not used.")] = None,
        response_format: Annotated[Literal["json", "text", "srt", "vtt", "verbose_json"], Form()] = "json",
        temperature: Annotated[float, Form(description="Not used: decoding is greedy.")] = 0.0,
        stream: Annotated[bool, Form(description="Server-sent events, as words are recognised.")] = False,
        granularities: Annotated[
            list[Literal["word", "segment"]] | None, Form(alias="timestamp_granularities[]")
        ] = None,
        chunking_strategy: Annotated[str | None, Form(description="auto changes nothing; others are rejected.")] = None,
        chunk_ms: Annotated[int | None, Form(description="Chunk size; ours, not OpenAI's.")] = None,
        itn: Annotated[
            bool, Form(description="Numbers, dates and amounts in digits (needs the itn extra); ours, not OpenAI's.")
        ] = False,
    ) -> Response:
        """Turn a recording into text."""
        _reject_fields((await request.form()).keys())
        for given in (language, *(languages or ())):
            if given and not given.lower().startswith("en"):
                raise OptionError(f"language is {shown(given)!r}; this model knows English.")
        if chunking_strategy not in (None, "", "auto"):
            raise OptionError(f"chunking_strategy is {shown(chunking_strategy)!r}; only auto is supported.")
        if stream and response_format not in ("json", "text"):
            raise OptionError(f"stream works with response_format json or text, not {response_format}.")
        # Server-sent events end by themselves when nobody reads them.
        gone = None if stream else request.is_disconnected
        recording = Upload(
            service,
            "http",
            _descriptor(file),
            shown(file.filename or "the file"),
            gone,
            chunk_ms=chunk_ms,
            client=request.scope["nemostream.client"],
            phrases=await service.compile_phrases(keywords or None),
            normalizer=await service.normalizer(itn),
        )
        if stream:
            first = await anext(recording)  # what can be refused is refused before the answer begins
            return StreamingResponse(_told(recording, first, finals_only=itn), media_type="text/event-stream")
        finals = [event async for event in recording if event and event.kind == "final"]
        words = [word for event in finals for word in event.words]
        warning = recording.warning.encode("ascii", "replace").decode()
        headers = {"Nemostream-Warning": warning} if warning else None
        if response_format in ("text", "srt", "vtt"):
            text = {
                "text": lambda: recording.text + "\n",
                "srt": lambda: formats.srt(words, recording.seconds),
                "vtt": lambda: formats.vtt(words, recording.seconds),
            }[response_format]()
            return PlainTextResponse(text, headers=headers)
        if response_format == "json":
            usage = {"type": "duration", "seconds": round(recording.seconds)}
            return JSONResponse({"text": recording.text, "usage": usage}, headers=headers)
        return JSONResponse(_verbose(recording, finals, words, granularities or ["segment"]), headers=headers)

    @app.websocket("/v1/stream")
    async def stream_socket(socket: WebSocket) -> None:
        await websocket.serve(socket, service)

    @app.websocket("/v1/realtime")
    async def realtime_socket(socket: WebSocket) -> None:
        await realtime.serve(socket, service)

    @app.exception_handler(NemostreamError)
    async def refused(request: Request, error: NemostreamError) -> Response:
        return refusal(error)

    @app.exception_handler(RequestValidationError)
    async def incomplete(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return answer(400, f"{name or 'the form'}: {first['msg']}.", "invalid_request_error", param=name or None)

    @app.exception_handler(StarletteHTTPException)
    async def failed(request: Request, error: StarletteHTTPException) -> Response:
        return answer(error.status_code, str(error.detail), "invalid_request_error", headers=error.headers)

    return AccessMiddleware(app, service)


class _Application(FastAPI):
    """FastAPI describes a 422 wherever a parameter may be invalid; this server, as OpenAI's, answers 400."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            for methods in super().openapi()["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
        return super().openapi()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "nemostream"}


def refusal(error: NemostreamError) -> Response:
    """An error as an answer."""
    if isinstance(error, Draining):
        return answer(503, str(error), "server_error", code="draining", headers={"Retry-After": "5"})
    if isinstance(error, CapacityError):
        return answer(429, str(error), "rate_limit_error", code="capacity", headers={"Retry-After": "2"})
    if isinstance(error, OptionError | AudioError):
        code = "option" if isinstance(error, OptionError) else "audio"
        return answer(400, str(error), "invalid_request_error", code=code)
    if isinstance(error, Expired):
        return answer(408, str(error), "invalid_request_error", code="expired")
    return answer(500, str(error), "server_error", code="model")


# -- recordings --------------------------------------------------------------------------------------------------------


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


def _reject_fields(names: Iterable[str]) -> None:
    """Raise `OptionError` for the first field of a form that has no meaning here."""
    for name in names:
        if name.startswith("chunking_strategy["):
            raise OptionError("chunking_strategy is an object; only auto is supported: the server streams recordings.")
        if name not in _FORM_FIELDS:
            raise OptionError(f"the form field {shown(name)!r} is not supported; use {', '.join(_FORM_FIELDS)}.")


class _UploadRequest(Request):
    """A request whose form has one file and few, short fields."""

    def form(self, **limits: Any) -> Any:
        return super().form(max_files=1, max_fields=_FIELDS, max_part_size=_FIELD_BYTES)


class _Route(APIRoute):
    """FastAPI reads a form before the endpoint is called, so its limits are set where the request is made."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handle(_UploadRequest(request.scope, request.receive))

        return handled


def _descriptor(file: UploadFile) -> int:
    """The descriptor of the (anonymous) temporary file that holds an upload."""
    spooled = cast(tempfile.SpooledTemporaryFile[bytes], file.file)
    spooled.rollover()
    spooled.flush()
    return spooled.fileno()


async def _told(recording: Upload, first: Event | None, finals_only: bool) -> AsyncIterator[str]:
    """Server-sent events as OpenAI's: what was added to the text, then all of it. With `finals_only` a delta is an
    utterance: the written form of a partial text could change."""
    told, utterance, gap = "", -1, ""
    try:
        async for event in recording:
            assert event is not None
            if event.kind == "end" or (finals_only and event.kind == "partial"):
                continue
            if event.utterance != utterance:
                told, utterance = "", event.utterance
            if delta := event.text[len(told) :]:
                yield _sse({"type": "transcript.text.delta", "delta": (gap if not told else "") + delta})
                told, gap = event.text, " "  # between what was told and the next utterance
        yield _sse({"type": "transcript.text.done", "text": recording.text})
    except NemostreamError as error:
        yield _sse({"error": {"message": str(error), "type": "server_error"}})


def _sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def _verbose(recording: Upload, finals: list[Event], words: list[Word], wanted: list[Any]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "task": "transcribe",
        "language": "english",
        "duration": round(recording.seconds, 3),
        "text": recording.text,
        "usage": {"type": "duration", "seconds": round(recording.seconds)},
    }
    if "word" in wanted:
        body["words"] = [{"word": word.text, **formats.time_span(word)} for word in words]
    if "segment" in wanted:
        body["segments"] = [
            {
                "id": event.utterance,
                "seek": 0,
                "start": round(event.start, 3),
                "end": round(event.end, 3),
                "text": event.text,
                "tokens": [token.id for token in event.tokens],
                "temperature": 0.0,
                "avg_logprob": sum(token.score for token in event.tokens) / len(event.tokens),
                "compression_ratio": 1.0,
                "no_speech_prob": 0.0,
            }
            for event in finals
        ]
    return body
