"""Errors of the server and of its processes.

How every protocol reports an error is in one table (`status_of`): the only exception-to-status table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemostream import errors
from nemostream.errors import AudioError, BackendError, CapacityError, NemostreamError, OptionError, StreamError


class Draining(CapacityError):
    """The server is starting or stopping and accepts no new streams."""


class Expired(StreamError):
    """A client exceeded the idle, slow-reader or maximum-duration timeout."""

    unread = False  # whether the client does not read its results


class StateError(StreamError):
    """The stored state of a resumable stream cannot be used: it is damaged, or of another key, model or version."""


class StateNotFound(StateError):
    """No state is stored for a token: it is unknown, its stream has ended, or its state has expired."""

    def __init__(
        self,
        message: str = "the stream cannot be resumed: its state is unknown to this server, has expired, or was deleted "
        "at the end of the stream; open a new stream.",
    ) -> None:
        super().__init__(message)


class StateSuperseded(StateError):
    """Another process has resumed the stream, or the stream has ended: this process must not store its state."""

    def __init__(self, message: str = "the stream was resumed over another connection, or has ended.") -> None:
        super().__init__(message)


class StateConflict(StateError):
    """Events between the last one that the client received and the oldest one in the state are lost."""


class StateStoreError(StateError):
    """The state store cannot be read or written. Trying again later may succeed."""


@dataclass(frozen=True)
class ErrorStatus:
    """How the protocols report one class of errors."""

    error: type[NemostreamError]
    code: str  # in events of `/v1/stream` and in OpenAI's error objects
    http: int
    type: str  # in OpenAI's error objects
    grpc: str  # name of a `grpc.StatusCode`
    close: int  # WebSocket close code (RFC 6455)
    retry_seconds: int | None = None  # when the client may retry: Retry-After, grpc-retry-pushback-ms
    realtime_code: str | None = None  # in events of `/v1/realtime`, where OpenAI's API has a code of its own


# The first matching row applies; the last one matches every error.
_STATUSES = (
    ErrorStatus(Draining, "draining", 503, "server_error", "UNAVAILABLE", 1012, retry_seconds=5),
    ErrorStatus(CapacityError, "capacity", 429, "rate_limit_error", "RESOURCE_EXHAUSTED", 1013, retry_seconds=2),
    ErrorStatus(OptionError, "option", 400, "invalid_request_error", "INVALID_ARGUMENT", 1008),
    ErrorStatus(AudioError, "audio", 400, "invalid_request_error", "INVALID_ARGUMENT", 1007),
    ErrorStatus(
        Expired, "expired", 408, "invalid_request_error", "DEADLINE_EXCEEDED", 1008, realtime_code="session_expired"
    ),
    ErrorStatus(StateStoreError, "state", 503, "server_error", "UNAVAILABLE", 1013, retry_seconds=5),
    ErrorStatus(StateConflict, "state", 409, "invalid_request_error", "OUT_OF_RANGE", 1008),
    ErrorStatus(StateSuperseded, "state", 409, "invalid_request_error", "ABORTED", 1008),
    ErrorStatus(StateError, "state", 404, "invalid_request_error", "NOT_FOUND", 1008),
    ErrorStatus(NemostreamError, "model", 500, "server_error", "INTERNAL", 1011),
)


def status_of(error: NemostreamError) -> ErrorStatus:
    """Return how an error is reported."""
    return next(status for status in _STATUSES if isinstance(error, status.error))


def error_of(name: str, message: str, default: type[NemostreamError] = BackendError) -> NemostreamError:
    """Return the error that another process has raised, from the name of its class and its message.

    It is of the class `default` if nemostream has no class of errors of this name.
    """
    found = getattr(errors, name, None)
    return (found if isinstance(found, type) and issubclass(found, NemostreamError) else default)(message)


def openai_error(message: str, type: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error object of OpenAI's API."""
    return {"message": message, "type": type, "code": code, "param": param}
