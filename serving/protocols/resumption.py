"""Resumable streams of `/v1/stream`: after the loss of its connection, a client continues on any server.

The state of a stream is stored every few seconds and after the end of an utterance. It covers what the client has sent
up to a *position*: a number of bytes of audio, and of *controls* (`commit`, `configure`, `finish`). The client keeps
what follows the position and sends it again. `docs/websocket.md` defines the protocol.

Given the same audio and controls, the stream has the same events again, of which the client already has some. Events
have sequence numbers. *Results* (all events but partials and backchannels) are counted too: under overload, and with
two lanes, the number of partials before a result may differ, but not the number of results.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nemostream.errors import StreamError
from nemostream.runtime.streaming import snapshot as snapshots
from nemostream.runtime.streaming.snapshot import StreamSnapshot
from nemostream.serving.client import Client
from nemostream.serving.errors import StateConflict, StateError, StateSuperseded
from nemostream.serving.service import Service
from nemostream.serving.session import SavedSession, Session
from nemostream.serving.state.store import StateStore

log = logging.getLogger("nemostream.serving")

VERSION = 1
_MAX_EVENTS, _MAX_EVENT_BYTES = 4096, 4 << 20  # that are kept for a client that does not confirm them
_TOKEN_BYTES = 24
_MIN_SECONDS = 1.0  # between two states, at the ends of utterances
_RETRY_SECONDS = 0.02  # between two attempts to save a stream that is not at rest
_REWRITES = 3  # states that are stored within the retention, even if nothing has changed


class EventLog:
    """The sequence of a stream's events: which of them are sent, and those that the client may not have received.

    `sequence` and `results` are the numbers of events and of results so far. A client that resumes the stream has
    received `received` events, `results_received` of them results.
    """

    def __init__(self, sequence: int = 0, results: int = 0, events: Iterable[tuple[int, str]] = ()) -> None:
        self.sequence, self.results = sequence, results
        self._received, self._results_received = sequence, results
        self._events = deque(events)
        self._bytes = sum(len(text) for _, text in self._events)

    def add(self, text: str, is_result: bool) -> str | None:
        """Return the message of an event with its sequence number; None if the client has it."""
        number = self.sequence + 1
        self.results += is_result
        if self._has(number, is_result):
            self.sequence = min(number, self._received)
            return None
        self.sequence = max(number, self._received + 1)
        message = f'{text[:-1]}, "sequence": {self.sequence}}}'
        self._events.append((self.sequence, message))
        self._bytes += len(message)
        while len(self._events) > _MAX_EVENTS or self._bytes > _MAX_EVENT_BYTES:
            self._drop()
        return message

    def _has(self, number: int, is_result: bool) -> bool:
        """Return whether the client has received an event, of which `number` is the number if nothing has changed."""
        if is_result:
            return self.results <= self._results_received
        return self.results < self._results_received or number <= self._received

    def confirm(self, received: int) -> None:
        """Drop the events up to number `received`."""
        while self._events and self._events[0][0] <= received:
            self._drop()

    def _drop(self) -> None:
        _, text = self._events.popleft()
        self._bytes -= len(text)

    def resume(self, received: int, results_received: int) -> list[str]:
        """Return the messages to send again to a client that has received so many events and results.

        Raises `StateConflict` if they are not kept any more.
        """
        oldest = self._events[0][0] if self._events else self.sequence + 1
        if received + 1 < oldest:
            raise StateConflict(
                f"received is {received}, but the events before number {oldest} are not kept; open a new stream."
            )
        self._received, self._results_received = max(received, self.sequence), max(results_received, self.results)
        self.confirm(received)
        return [text for _, text in self._events]

    def save(self) -> dict[str, Any]:
        return {"sequence": self.sequence, "results": self.results, "events": list(self._events)}


class Resumption:
    """What makes a stream resumable: its token, the position of its client, its events, and the storing of its state.

    Used in the event loop only. `options` are those that the client requested. Of a stream that continues,
    `received_bytes` and `controls` are the position, and `resent` the messages that the client has not received.
    """

    def __init__(
        self,
        service: Service,
        states: StateStore,
        client: Client,
        token: str,
        epoch: int,
        options: dict[str, Any],
        *,
        received_bytes: int = 0,
        controls: int = 0,
        events: EventLog | None = None,
        resent: Sequence[str] = (),
    ) -> None:
        self.token, self.options, self.resent = token, options, resent
        self.bytes, self.controls = received_bytes, controls  # processed so far
        self.events = events or EventLog()
        self._service, self._states, self._client, self._epoch = service, states, client, epoch
        self._key = _key_of(token, client)
        self._saving: asyncio.Task[bool] | None = None  # returns whether the state is stored
        self._stored = self._position  # of the last state
        self._stored_at = service.clock()
        self.utterance_ended = False  # since the last state
        self.on_stored: Callable[[dict[str, Any]], None] = lambda message: None
        self.on_superseded: Callable[[StateSuperseded], None] = lambda error: None

    @classmethod
    async def open(cls, service: Service, client: Client, options: dict[str, Any]) -> Resumption | None:
        """Return the resumption of a new stream; None if the server stores no states."""
        if (states := service.states) is None:
            return None
        resumption = cls(service, states, client, secrets.token_urlsafe(_TOKEN_BYTES), 1, options)
        about = resumption._about(None)
        try:  # a connection that is lost before the first state can be resumed too
            await asyncio.to_thread(states.put, resumption._key, 1, _encode(about, None))
        except StateError as error:
            resumption._report(error)
        return resumption

    @classmethod
    async def resume(
        cls, service: Service, client: Client, token: str, received: int, results: int
    ) -> tuple[Resumption, dict[str, Any]]:
        """Return the resumption of a stored stream, whose client has `received` events, `results` of them results.

        The second value is the state of the session, as arguments of `Service.open`. The stream's connection is closed
        if it is open at this server. Raises `StateError` if the stream cannot be resumed.
        """
        if (states := service.states) is None:
            raise StateError("this server stores no states (option state_store); open a new stream.")
        if (move := service.resumable.get(token)) is not None:
            await move()
        epoch, data = await asyncio.to_thread(states.claim, _key_of(token, client))
        about, snapshot = await asyncio.to_thread(_decode, data)
        if about["model"] != _model_of(service):
            raise StateError(
                f"the stream has the model {about['model']}; this server has {_model_of(service)}; open a new stream."
            )
        saved = SavedSession(**about["session"]) if snapshot is not None else None
        events = EventLog(**about["events"])
        resent = events.resume(received, results)
        resumption = cls(
            service,
            states,
            client,
            token,
            epoch,
            about["options"],
            received_bytes=about["bytes"],
            controls=about["controls"],
            events=events,
            resent=resent,
        )
        return resumption, {"saved": saved, "snapshot": snapshot}

    def describe(self) -> dict[str, Any]:
        """Return the field `resumption` of `ready`."""
        return {
            "version": VERSION,
            "token": self.token,
            "seconds": self._service.settings.state_retention,
            **self._position,
        }

    @property
    def _position(self) -> dict[str, int]:
        return {"bytes": self.bytes, "controls": self.controls, "sequence": self.events.sequence}

    # -- storing -------------------------------------------------------------------------------------------------------

    def save_if_due(self, session: Session) -> None:
        """Begin to store the state if that is due. All events of the session must have been returned."""
        if self._saving is not None:
            return
        settings, age = self._service.settings, self._service.clock() - self._stored_at
        due = age >= settings.state_seconds or (self.utterance_ended and age >= _MIN_SECONDS)
        if (due and self._position != self._stored) or age >= settings.state_retention / _REWRITES:
            self._begin(session)

    def _begin(self, session: Session) -> asyncio.Task[bool] | None:
        """Begin to store the state of the session as it is now. Return None if it cannot be saved at present."""
        began = self._service.clock()
        if (state := session.save()) is None:
            return None
        saved, pending, complete = state
        position, about = self._position, self._about(session, saved, pending)
        position["bytes"] -= pending
        self._stored_at, self.utterance_ended = began, False
        self._saving = asyncio.create_task(self._store(session, about, position, complete, began))
        return self._saving

    async def _store(
        self,
        session: Session,
        about: Mapping[str, Any],
        position: dict[str, int],
        complete: Callable[[], StreamSnapshot],
        began: float,
    ) -> bool:
        """Store a state. Return whether it is stored."""
        service = self._service

        def store() -> None:
            self._states.put(self._key, self._epoch, _encode(about, complete()))

        try:
            async with service.saving:
                await asyncio.to_thread(store)
        except StateSuperseded as error:
            self.on_superseded(error)
        except Exception as error:  # the client keeps what it sends; the next state is stored later
            ended = isinstance(error, StreamError) and not isinstance(error, StateError) and not session.is_open
            if not ended:
                self._report(error)
        else:
            self._stored = position
            service.metrics.states_stored.inc()
            service.metrics.state_seconds.observe(service.clock() - began)
            self.on_stored({"type": "stored", **position})
            return True
        finally:
            self._saving = None
        return False

    async def save(self, session: Session) -> bool:
        """Store the state as soon as the stream is at rest. Return whether it is stored. Raises the stream's error."""
        limit = self._service.clock() + self._service.settings.send_seconds
        while session.is_open and self._service.clock() < limit:
            if self._saving is not None:  # an earlier state
                await asyncio.wait([self._saving])
            elif saving := self._begin(session):
                await asyncio.wait([saving])
                return saving.result()
            else:
                await asyncio.sleep(_RETRY_SECONDS)
        return False

    async def delete(self) -> None:
        """Delete the state, at the end of the stream."""
        if self._saving is not None:
            await asyncio.wait([self._saving])
        try:
            await asyncio.to_thread(self._states.delete, self._key)
        except StateError as error:  # it expires
            self._report(error)

    def _report(self, error: Exception) -> None:
        self._service.metrics.state_errors.inc()
        log.warning("state not stored", extra={"reason": str(error), "peer": self._client.address})

    def _about(self, session: Session | None, saved: SavedSession | None = None, pending: int = 0) -> dict[str, Any]:
        options = dict(self.options)
        if session is not None:
            options |= {"chunk_ms": session.requested_ms, "final_chunk_ms": session.requested_final_ms or 0}
            options["language"] = session.language
        return {
            "version": VERSION,
            "model": _model_of(self._service),
            "bytes": self.bytes - pending,
            "controls": self.controls,
            "options": options,
            "session": None if saved is None else dataclasses.asdict(saved),
            "events": self.events.save(),
        }


def _key_of(token: str, client: Client) -> str:
    """Return the token under which the state is stored. A client with another API key does not find it."""
    return hashlib.sha256(f"{client.owner} {token}".encode()).hexdigest()


def _model_of(service: Service) -> str:
    """Return what must be the same where a stream continues."""
    model = service.model
    return f"{model.manifest.name} {model.manifest.weights.sha256[:16]} ({model.engine})"


def _encode(about: Mapping[str, Any], snapshot: StreamSnapshot | None) -> bytes:
    """Return a state. A stream without audio has no snapshot."""
    return snapshots.dump(about, snapshot or StreamSnapshot({}, 0, ""))


def _decode(data: bytes) -> tuple[dict[str, Any], StreamSnapshot | None]:
    """Return what `_encode` was called with. Raises `StateError`."""
    try:
        about, snapshot = snapshots.load(io.BytesIO(data), len(data))
    except ValueError as error:
        raise StateError(f"the stored state is damaged: {error}; open a new stream.") from error
    if about.get("version") != VERSION:
        raise StateError(
            f"the stored state has version {about.get('version')!r}, but this server has {VERSION}; open a new stream."
        )
    return about, snapshot if snapshot.parts else None
