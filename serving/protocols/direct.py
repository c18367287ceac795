"""Processing of audio messages without a task, in a third of the time; for `websocket` and `realtime`.

A task costs two switches per message, two timers and several wake-ups, more than decoding the frame and feeding the
audio together. With this server's own connections (`network/connections.py`), an audio message is therefore processed
in the callback that receives it, and its events are sent in the callback that reports its results. Everything else is
received by the protocol's task: other messages, errors, and audio that must wait (`Session.start_push`). Other ASGI
servers, such as Ray Serve's, pass every message to the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

from nemostream.runtime.text.events import Event
from nemostream.serving.network.connections import WebSocketProtocol
from nemostream.serving.session import OnPushed


class DirectAudio:
    """Processes audio messages of a connection while its task waits in `receive`; a context manager.

    `scope` is the connection's ASGI scope. `start` processes a message with `Session.start_push`, or returns False if
    the task must receive it. `texts_of` returns the messages to send for the events of such audio. A result that needs
    the task is a message with the key "deferred", to be passed to `deferred`.
    """

    def __init__(
        self,
        scope: Mapping[str, Any],
        start: Callable[[OnPushed, bytes | str], bool],
        texts_of: Callable[[list[Event]], list[str]],
    ) -> None:
        self._connection: WebSocketProtocol | None = scope.get("nemostream.connection")
        self._start, self._texts_of = start, texts_of

    def __enter__(self) -> None:
        if self._connection is not None:
            self._connection.attach(partial(self._start, self._send))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            self._connection.attach(None)

    def _send(self, result: list[Event] | Exception) -> None:
        connection = self._connection
        assert connection is not None
        try:
            if not result:
                connection.done()
            elif isinstance(result, Exception) or not connection.is_writable:
                connection.defer(result)
            else:
                connection.write_text(self._texts_of(result))
                connection.done()
        except Exception as error:  # it must end this connection only, as in the connection's task
            connection.defer(error)


def deferred(result: list[Event] | Exception) -> list[Event]:
    """Return the events of a deferred result, or raise its error."""
    if isinstance(result, Exception):
        raise result
    return result
