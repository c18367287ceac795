"""The web application: the page, operations, OpenAI's models, and the other protocols, behind `AccessMiddleware`.

Recordings are in `transcriptions`, WebSockets in `websocket` (nemostream's) and `realtime` (OpenAI's).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp

import nemostream
from nemostream.errors import NemostreamError
from nemostream.serving.client import shorten
from nemostream.serving.network.access import AccessMiddleware
from nemostream.serving.network.responses import error_response, exception_response
from nemostream.serving.protocols import realtime, websocket
from nemostream.serving.protocols.dependencies import ERROR_RESPONSES, ErrorResponse, PortsDependency, ServiceDependency
from nemostream.serving.protocols.transcriptions import router as transcriptions_router
from nemostream.serving.service import Service
from nemostream.untrusted import describe_invalid

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' blob:; worker-src 'self' blob:; style-src 'unsafe-inline'; "
    "connect-src 'self' ws: wss:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NOT_ALIVE: dict[int | str, dict[str, Any]] = {503: {"description": "The server must be restarted."}}
_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"description": "The server accepts no streams now."}}
_NO_MODEL: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "No such model."},
    503: ERROR_RESPONSES[503],
}

operations = APIRouter(tags=["operations"])
models = APIRouter(tags=["OpenAI"])
pages = APIRouter(include_in_schema=False)
sockets = APIRouter()


def create_app(service: Service, ports: dict[str, int] | None = None) -> ASGIApp:
    """Return the application. `ports` are reported by `/readyz`."""
    app = _Application(
        title="nemostream",
        version=nemostream.__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would contain the host that a proxy uses, without its path prefix
        exception_handlers={
            NemostreamError: _on_error,
            RequestValidationError: _on_invalid_request,
            StarletteHTTPException: _on_http_error,
        },
    )
    app.state.service, app.state.ports = service, ports or {}
    for router in (pages, operations, models, transcriptions_router, sockets):
        app.include_router(router)
    return AccessMiddleware(app, service.settings, service.metrics, service.uploads, service.clock)


class _Application(FastAPI):
    """FastAPI documents status 422 wherever a parameter may be invalid; this server responds with 400, as OpenAI's."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            for methods in super().openapi()["paths"].values():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
        return super().openapi()


# -- errors ------------------------------------------------------------------------------------------------------------


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, NemostreamError)
    return exception_response(error)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    return error_response(
        400, f"{name or 'the form'}: {describe_invalid(first)}.", "invalid_request_error", param=name or None
    )


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return error_response(error.status_code, str(error.detail), "invalid_request_error", headers=error.headers)


# -- page and operations -----------------------------------------------------------------------------------------------


@pages.head("/")
@pages.get("/", response_class=HTMLResponse)
def page() -> Response:
    text = (resources.files("nemostream.serving.protocols") / "page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})


@pages.head("/sample.flac")
@pages.get("/sample.flac", response_class=FileResponse)
def sample() -> Response:
    """Return the recording that the page plays as an example."""
    return FileResponse(nemostream.demo_clip(), media_type="audio/flac")


@operations.head("/healthz", responses=_NOT_ALIVE)
@operations.get("/healthz", responses=_NOT_ALIVE)
def alive(service: ServiceDependency) -> JSONResponse:
    """Liveness: fails when the engine failed repeatedly and only a restart helps."""
    if service.state == "failed":
        return JSONResponse({"status": "failed"}, 503)
    return JSONResponse({"status": "alive"})


@operations.head("/readyz", responses=_NOT_READY)
@operations.get("/readyz", responses=_NOT_READY)
def ready(service: ServiceDependency, ports: PortsDependency) -> JSONResponse:
    """Readiness: whether streams are accepted. The engines are loaded and warm, and the server is not stopping."""
    return JSONResponse(service.describe() | ports, 200 if service.state == "ready" else 503)


@operations.head("/metrics", response_class=PlainTextResponse)
@operations.get("/metrics", response_class=PlainTextResponse)
def metrics(service: ServiceDependency) -> Response:
    """Metrics for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# -- OpenAI's models ---------------------------------------------------------------------------------------------------


@models.get("/v1/models")
def list_models(service: ServiceDependency) -> dict[str, Any]:
    """List the one model that is served."""
    state = service.describe()
    return {"object": "list", "data": [_model(state.get("model", "none"), state.get("languages", []))]}


@models.get("/v1/models/{model_id:path}", responses=_NO_MODEL, response_model=None)
def get_model(model_id: str, service: ServiceDependency) -> dict[str, Any] | Response:
    """Return the model, if it is the one that is served."""
    manifest = service.model.manifest
    name = manifest.name
    if model_id == name:
        return _model(name, manifest.languages.names)
    return error_response(
        404,
        f"there is no model {shorten(model_id)!r}, only {name!r}.",
        "invalid_request_error",
        code="model_not_found",
        param="model",
    )


def _model(name: str, languages: Iterable[str]) -> dict[str, Any]:
    """Return a model object of OpenAI's API; `languages` is not part of that."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "nemostream", "languages": list(languages)}


# -- WebSockets --------------------------------------------------------------------------------------------------------


@sockets.websocket("/v1/stream")
async def stream(socket: WebSocket, service: ServiceDependency) -> None:
    await websocket.serve(socket, service)


@sockets.websocket("/v1/realtime")
async def realtime_session(socket: WebSocket, service: ServiceDependency) -> None:
    await realtime.serve(socket, service)


@sockets.websocket("/{path:path}")
async def no_socket(socket: WebSocket, path: str) -> None:
    message = f"there is no WebSocket at {shorten('/' + path)}; connect to /v1/stream or /v1/realtime."
    await socket.send_denial_response(error_response(404, message, "invalid_request_error"))
