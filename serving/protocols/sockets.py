"""What the WebSocket protocols share: the cost of text messages, rejected handshakes, closing with an error."""

from __future__ import annotations

import json
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from nemostream.errors import NemostreamError
from nemostream.serving.errors import Expired, status_of
from nemostream.serving.network.responses import exception_response

MIN_TEXT_BYTES = 8192  # of audio that a text message counts as: handling one costs about as much
MAX_TEXT_CHARACTERS = 1 << 16  # of a message without audio: parsing one must not block the event loop
_MAX_REASON_BYTES = 120  # of a close frame (RFC 6455: 123)


async def reject(socket: WebSocket, error: NemostreamError) -> None:
    """Reject a handshake with the HTTP response for `error`."""
    await socket.send_denial_response(exception_response(error))


def timed_out(socket: WebSocket) -> bool:
    """Return whether the system closed a disconnected socket because its client did not read (`TCP_USER_TIMEOUT`)."""
    return bool(socket.scope.get("nemostream.timed_out"))


async def close_with_error(socket: WebSocket, error: NemostreamError, event: dict[str, Any]) -> None:
    """Send `event` and close the socket with the code for `error`. A client that is gone is ignored."""
    try:
        unread = isinstance(error, Expired) and error.unread  # sending one more event would block too
        if socket.application_state == WebSocketState.CONNECTED and not unread:
            await socket.send_text(json.dumps(event))
        reason = str(error).encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        await socket.close(status_of(error).close, reason)
    except (RuntimeError, WebSocketDisconnect):
        pass
