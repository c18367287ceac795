"""What the HTTP routes share: access to the service, and the documentation of error responses."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends
from pydantic import BaseModel
from starlette.requests import HTTPConnection

from nemostream.serving.service import Service


async def _service(connection: HTTPConnection) -> Service:
    service: Service = connection.app.state.service
    return service


async def _ports(connection: HTTPConnection) -> dict[str, int]:
    ports: dict[str, int] = connection.app.state.ports
    return ports


ServiceDependency = Annotated[Service, Depends(_service)]
PortsDependency = Annotated[dict[str, int], Depends(_ports)]


class ErrorResponse(BaseModel):
    """An error in the format of OpenAI's API."""

    class Error(BaseModel):
        message: str
        type: str
        code: str | None = None
        param: str | None = None

    error: Error


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        400: "The audio, an option or the form is invalid.",
        401: "The API key is missing or wrong.",
        403: "The Origin or Host header is not allowed.",
        408: "The request was not complete within the time limit.",
        413: "The recording is too large.",
        429: "No stream is free.",
        500: "The model failed.",
        503: "The server is starting or stopping.",
    }.items()
}
