"""HTTP error responses in the format of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from nemostream.errors import NemostreamError
from nemostream.serving.errors import openai_error, status_of


def error_response(
    status: int,
    message: str,
    type: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return an error response with OpenAI's `type`, `code` and `param`."""
    return JSONResponse({"error": openai_error(message, type, code, param)}, status, headers=headers)


def exception_response(error: NemostreamError) -> JSONResponse:
    """Return the response to a request that raised `error`."""
    status = status_of(error)
    headers = None if status.retry_seconds is None else {"Retry-After": str(status.retry_seconds)}
    return error_response(status.http, str(error), status.type, code=status.code, headers=headers)
