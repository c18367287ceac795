"""The web application: operations, OpenAI's transcription endpoint, and the doors that all requests pass.

WebSockets are in `websocket` (ours) and `realtime` (OpenAI's); the page is a file beside this one.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from importlib import resources
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

import nemostream
from nemostream import formats
from nemostream.errors import AudioError, CapacityError, NemostreamError, OptionError
from nemostream.runtime.utterance import Event
from nemostream.runtime.words import Word
from nemostream.serving import realtime, websocket
from nemostream.serving.service import Service
from nemostream.serving.session import Draining, Expired
from nemostream.serving.settings import Settings
from nemostream.serving.upload import Upload

KEY_PROTOCOL = "openai-insecure-api-key."  # how browsers, which cannot set headers, send a key with a WebSocket
_LISTENING_ON = 5.0  # seconds that a recording which is too large is still read, and thrown away
_OPEN = ("/", "/healthz", "/readyz")  # without a key
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
        400: "The audio or an option cannot be used.", 401: "A key is missing or wrong.", 403: "A foreign web page.",
        408: "Too slow.", 413: "The recording is too large.", 422: "The form is not complete.",
        429: "No stream is free.", 500: "The model failed.", 503: "The server is starting or stopping.",
    }.items()
}  # fmt: skip


def create_app(service: Service, ports: dict[str, int] | None = None) -> ASGIApp:
    """The application; `ports` is what `/readyz` tells of them."""
    settings = service.settings
    app = FastAPI(title="nemostream", version=nemostream.__version__, docs_url=None, redoc_url=None)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> Response:
        text = (resources.files("nemostream.serving") / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/healthz", tags=["operations"], responses={503: {"description": "Only a restart helps."}})
    def alive() -> JSONResponse:
        """Whether it is worth keeping: not when the engine fails again and again."""
        return JSONResponse(*({"status": "failed"}, 503) if service.state == "failed" else ({"status": "alive"}, 200))

    @app.get("/readyz", tags=["operations"], responses={503: {"description": "It takes no streams now."}})
    def ready() -> JSONResponse:
        """Whether streams are taken: engines are loaded and warm, and nobody asked it to stop."""
        return JSONResponse(service.describe() | (ports or {}), 200 if service.state == "ready" else 503)

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", tags=["OpenAI"])
    def models() -> dict[str, Any]:
        """The one model that is served."""
        name = service.describe().get("model", "none")
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "nemostream"}]}

    @app.post("/v1/audio/transcriptions", tags=["OpenAI"], responses=_REFUSALS, response_model=None)
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File(description="WAV, FLAC, Ogg, MP3, and what else libsndfile reads.")],
        model: Annotated[str, Form(description="Taken as the one that is served.")] = "nemostream",
        language: Annotated[str | None, Form(description="en, or left out.")] = None,
        prompt: Annotated[str | None, Form(description="Not used.")] = None,
        response_format: Annotated[Literal["json", "text", "srt", "vtt", "verbose_json"], Form()] = "json",
        temperature: Annotated[float, Form(description="Not used: decoding is greedy.")] = 0.0,
        stream: Annotated[bool, Form(description="Server-sent events, as words are recognised.")] = False,
        granularities: Annotated[
            list[Literal["word", "segment"]] | None, Form(alias="timestamp_granularities[]")
        ] = None,
        chunk_ms: Annotated[int | None, Form(description="Chunk size; ours, not OpenAI's.")] = None,
    ) -> Response:
        """Turn a recording into text."""
        if language and not language.lower().startswith("en"):
            raise OptionError(f"language is {language!r}; this model knows English.")
        if stream and response_format not in ("json", "text"):
            raise OptionError(f"stream works with response_format json or text, not {response_format}.")
        # Server-sent events end by themselves when nobody reads them.
        gone = None if stream else request.is_disconnected
        recording = Upload(service, "http", file.file, file.filename or "the file", gone, chunk_ms=chunk_ms)
        if stream:
            first = await anext(recording)  # what can be refused is refused before the answer begins
            return StreamingResponse(_told(recording, first), media_type="text/event-stream")
        finals = [event async for event in recording if event and event.kind == "final"]
        words = [word for event in finals for word in event.words]
        if response_format in ("text", "srt", "vtt"):
            text = {"text": lambda: recording.text + "\n", "srt": lambda: formats.srt(words, recording.seconds),
                    "vtt": lambda: formats.vtt(words, recording.seconds)}[response_format]()  # fmt: skip
            return PlainTextResponse(text)
        if response_format == "json":
            usage = {"type": "duration", "seconds": round(recording.seconds)}
            return JSONResponse({"text": recording.text, "usage": usage})
        return JSONResponse(_verbose(recording, finals, words, granularities or ["segment"]))

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
        return _answer(422, f"{name or 'the form'}: {first['msg']}.", "invalid_request_error", param=name or None)

    @app.exception_handler(StarletteHTTPException)
    async def failed(request: Request, error: StarletteHTTPException) -> Response:
        return _answer(error.status_code, str(error.detail), "invalid_request_error", headers=error.headers)

    return Doors(app, settings)


def refusal(error: NemostreamError) -> Response:
    """An error as an answer."""
    if isinstance(error, Draining):
        return _answer(503, str(error), "server_error", code="draining", headers={"Retry-After": "5"})
    if isinstance(error, CapacityError):
        return _answer(429, str(error), "rate_limit_error", code="capacity", headers={"Retry-After": "2"})
    if isinstance(error, OptionError | AudioError):
        code = "option" if isinstance(error, OptionError) else "audio"
        return _answer(400, str(error), "invalid_request_error", code=code)
    if isinstance(error, Expired):
        return _answer(408, str(error), "invalid_request_error", code="expired")
    return _answer(500, str(error), "server_error", code="model")


def _answer(
    status: int, message: str, kind: str, *, code: str | None = None, param: str | None = None, headers: Any = None
) -> JSONResponse:
    body = {"error": {"message": message, "type": kind, "code": code, "param": param}}
    return JSONResponse(body, status, headers=headers)


# -- recordings --------------------------------------------------------------------------------------------------------


async def _told(recording: Upload, first: Event | None) -> AsyncIterator[str]:
    """Server-sent events as OpenAI's: what was added to the text, then all of it."""
    told, utterance, gap = "", -1, ""
    try:
        async for event in recording:
            assert event is not None
            if event.kind == "end":
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
        "task": "transcribe", "language": "english", "duration": round(recording.seconds, 3), "text": recording.text,
        "usage": {"type": "duration", "seconds": round(recording.seconds)},
    }  # fmt: skip
    if "word" in wanted:
        body["words"] = [{"word": w.text, "start": round(w.start, 3), "end": round(w.end, 3)} for w in words]
    if "segment" in wanted:
        body["segments"] = [
            {
                "id": event.utterance, "seek": 0, "start": round(event.start, 3), "end": round(event.end, 3),
                "text": event.text, "tokens": [token.id for token in event.tokens], "temperature": 0.0,
                "avg_logprob": sum(token.score for token in event.tokens) / len(event.tokens),
                "compression_ratio": 1.0, "no_speech_prob": 0.0,
            }
            for event in finals
        ]  # fmt: skip
    return body


# -- doors -------------------------------------------------------------------------------------------------------------


class Doors:
    """What every request passes before the application: its origin, its key, its size.

    Browsers send WebSockets and forms across origins without asking first, so CORS alone, closed as it is, would not
    keep a foreign page from using the model with its visitor's network.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self._origins = {origin.rstrip("/") for origin in settings.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin is not None and origin in self._origins
        if origin is not None and not allowed and urlsplit(origin).netloc != headers.get("host"):
            return await _deny(scope, receive, send, _answer(
                403, f"pages of {origin} may not use this server (option origins).", "permission_error", code="origin"
            ))  # fmt: skip
        if allowed and scope["type"] == "http":
            send = _with_cors(send, cast(str, origin))
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                allow = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": "*"}
                return await Response(status_code=204, headers=allow)(scope, receive, send)
        if self._keys and scope["path"] not in _OPEN and not authorised(given_key(headers), self._keys):
            return await _deny(scope, receive, send, _answer(
                401, "a key is needed: send Authorization: Bearer KEY.", "authentication_error", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            ))  # fmt: skip
        if scope["type"] == "http":
            receive = self._measured(headers, receive)
        await self._app(scope, receive, send)

    def _measured(self, headers: Headers, receive: Receive) -> Receive:
        """What is received, if it is not too much and does not take for ever."""
        announced, idle = headers.get("content-length", "0"), self._settings.idle_seconds
        most, size, whole = self._settings.max_upload_bytes, 0, False
        refused = announced.isdigit() and int(announced) > most

        async def measured() -> Message:
            nonlocal size, refused, whole
            if whole:  # what comes now is that the client hung up
                return await receive()
            try:
                async with asyncio.timeout(idle):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"nothing came for {idle:.0f} s, and the request is not whole.") from None
            size, whole = size + len(message.get("body", b"")), not message.get("more_body")
            refused = refused or size > most
            if not refused:
                return message
            # A client that is cut off while it sends may never see why: let it, for a moment, and keep nothing.
            with suppress(TimeoutError):
                async with asyncio.timeout(_LISTENING_ON):
                    while message.get("more_body"):
                        message = await receive()
            raise HTTPException(413, f"the recording is larger than {most} bytes; send it in parts.")

        return measured


def given_key(headers: Mapping[str, str]) -> str:
    """The key that a request carries, or nothing; headers are asked for by small letters."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key:
        return key.strip()
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(KEY_PROTOCOL):
            return protocol.strip().removeprefix(KEY_PROTOCOL)
    return headers.get("x-api-key", "")


def authorised(key: str, keys: list[bytes]) -> bool:
    """Whether `key` is one of `keys`. Takes the same time whichever it is, or is not."""
    found = [hmac.compare_digest(key.encode(), known) for known in keys]
    return any(found)


def _with_cors(send: Send, origin: str) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            more = [(b"access-control-allow-origin", origin.encode()), (b"vary", b"Origin")]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sent


async def _deny(scope: Scope, receive: Receive, send: Send, response: Response) -> None:
    if scope["type"] == "http":
        return await response(scope, receive, send)
    await WebSocket(scope, receive, send).send_denial_response(response)
