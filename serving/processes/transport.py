"""A transport process: TLS, protocols and sessions for some of the server's clients. Started by the supervisor.

It runs the same service and the same event loop as a server of one process, with a scheduler whose steps run in the
engine process (`RemoteScheduler`). Limits count the streams, recordings and connections of all transports (`Board`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn

from nemostream.bundle import Manifest
from nemostream.errors import NemostreamError
from nemostream.runtime.model import Model
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.serving.client import UNKNOWN_CLIENT, Client
from nemostream.serving.logs import log_to_stderr
from nemostream.serving.memory import freeze_heap
from nemostream.serving.metrics import Metrics, share_metrics
from nemostream.serving.network.connections import Connections, HttpProtocol
from nemostream.serving.processes.board import Board, Kind, Row
from nemostream.serving.processes.control import Control, Start, connect
from nemostream.serving.processes.remote import RemoteScheduler
from nemostream.serving.server import serve_clients
from nemostream.serving.service import CLEANUP_SECONDS, SWITCH_SECONDS, Service, available_chunks, open_bundle
from nemostream.serving.session import Session
from nemostream.serving.settings import MEMORY, Settings
from nemostream.serving.uploads.admission import UploadAdmission

_UPDATES = 10  # of the metrics per second: the supervisor evaluates the latencies of each second
_POLL_SECONDS = 0.05  # between two checks whether other transports have open streams


class SharedUploadAdmission(UploadAdmission):
    """Limits the recordings of all transports together."""

    def __init__(self, settings: Settings, metrics: Metrics, row: Row) -> None:
        super().__init__(settings, metrics)
        self._row = row

    @property
    def count(self) -> int:
        """Number of recordings of all transports."""
        return self._row.board.count(Kind.UPLOAD)

    @property
    def size(self) -> int:
        """Bytes that are reserved for them."""
        return self._row.board.size(Kind.UPLOAD)

    def count_of(self, client: Client) -> int:
        """Return the number of recordings of a client, at all transports."""
        return self._row.board.count(Kind.UPLOAD, client.name)

    def admit(self, size: int | None, client: Client) -> AbstractContextManager[None]:
        """As in a server of one process. The context must be entered."""
        with self._row.board.locked():
            return super().admit(size, client)

    def _reserve(self, size: int, client: Client) -> AbstractContextManager[None]:
        entry = self._row.add(Kind.UPLOAD, client.name, size)  # now, while the board is locked
        self._metrics.uploads.inc()
        return self._release_at_end(entry)

    @contextmanager
    def _release_at_end(self, entry: int) -> Iterator[None]:
        try:
            yield
        finally:
            self._row.remove(entry)
            self._metrics.uploads.dec()


class SharedConnections(Connections):
    """Limits the connections of all transports together, and those of this process by its file descriptors.

    Only an idle connection of this process is closed to make room for a new one.
    """

    def __init__(self, row: Row, settings: Settings, *arguments: Any, **options: Any) -> None:
        """Set the limits of the settings; `arguments` and `options` are those of `Connections`."""
        super().__init__(*arguments, **options)
        self._row, self._all = row, settings.max_connections
        self.max_per_client = settings.max_connections_per_client or max(1, 3 * self._all // 4)
        self._entries: dict[Any, int] = {}

    def admit(self, protocol: HttpProtocol) -> bool:
        """As in a server of one process."""
        with self._row.board.locked():
            return super().admit(protocol)

    def reassign(self, transport: Any, address: str) -> bool:
        """As in a server of one process."""
        with self._row.board.locked():
            return super().reassign(transport, address)

    def is_full(self, address: str | None) -> bool:
        """Return whether the limit of one address, or (None) of all, is reached."""
        limit = self._all if address is None else self.max_per_client
        return super().is_full(address) or self._row.board.count(Kind.CONNECTION, address) >= limit

    def add(self, transport: Any, address: str) -> None:
        """Count a connection for an address."""
        super().add(transport, address)
        self._entries[transport] = self._row.add(Kind.CONNECTION, address)

    def remove(self, transport: Any) -> None:
        """Stop counting a connection. Later calls have no effect."""
        super().remove(transport)
        entry = self._entries.pop(transport, None)
        if entry is not None:
            self._row.remove(entry)


class TransportService(Service):
    """The service of a transport: the engine and the load are those of the server."""

    def __init__(
        self, settings: Settings, row: Row, check_manifest: Callable[[Manifest], None] = lambda manifest: None
    ) -> None:
        """`check_manifest` raises if the bundle is not that of the engine."""
        super().__init__(settings, metrics=Metrics(shared=True))
        self._check_manifest = check_manifest
        self.uploads = SharedUploadAdmission(settings, self.metrics, row)
        self._row = row
        self._add_latency = row.add_latency
        self._entries: dict[Session, int] = {}  # of the board, for live streams
        self._lanes: dict[Session, int] = {}  # entries of the board, for their accurate lanes
        self._admitted: list[int] = []  # entries of the stream that is being opened: its own, and that of its lane
        self._overloaded = self._late = self._sheds_lanes = False
        self._loop = asyncio.get_running_loop()
        self._scheduler: RemoteScheduler | None = None
        self._engine: tuple[socket.socket, int] | None = None  # attached before the start

    # -- start and stop ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read the bundle, which the engine verifies. Streams are accepted when the engine is ready (`handle`).

        Blocks. Raises `BundleError` and `OptionError`.
        """
        settings = self.settings
        self.open_states()
        self.open_tracing()
        bundle = open_bundle(settings)
        self._check_manifest(bundle.manifest)
        self.chunks = available_chunks(bundle.manifest, settings)
        self.language = bundle.manifest.languages.name(settings.language)
        model = Model(bundle, None, settings.chunk_ms, open_scheduler=self._open_scheduler)
        model.watch(None, None, self.record_fallback)  # the engine process records steps and failures
        self._model = model
        self._loop.call_soon_threadsafe(self._attach)

    def _open_scheduler(self, manifest: Manifest, tokenizer: Tokenizer) -> RemoteScheduler:
        self._scheduler = RemoteScheduler(manifest, tokenizer, self._loop, self._engine_ended)
        return self._scheduler

    def handle(self, message: dict[str, Any], files: list[int]) -> None:
        """Process a message of the supervisor."""
        if files:
            link, audio = files
            if self._engine is not None:  # an engine that ended before this process was ready
                self._engine[0].close()
                os.close(self._engine[1])
            self._engine = socket.socket(fileno=link), audio
            self._attach()
        if "engine" in message and self.state != "draining":
            self.state, self.max_streams = message["engine"], message["max_streams"]
        if "load" in message:
            self._overloaded, self._late, level, self._sheds_lanes = message["load"]
            self.set_degradation_level(level)
            self.update_lanes()

    def _attach(self) -> None:
        if self._engine is None or self._model is None or self._scheduler is None:
            return
        (link, audio), self._engine = self._engine, None
        self._scheduler.attach(link, audio)
        os.close(audio)

    def _engine_ended(self) -> None:
        if self.state == "ready":
            self.state = "starting"

    async def drain(self) -> None:
        """Reject new streams, hand over resumable ones, and wait for the others for at most `drain_seconds`.

        The others are those of all transports.
        """
        self.state = "draining"
        await self.hand_over()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_seconds):
                while self.sessions or self._row.board.sessions:
                    await asyncio.sleep(_POLL_SECONDS)

    # -- streams -------------------------------------------------------------------------------------------------------

    def open(self, transport: str, *, client: Client = UNKNOWN_CLIENT, upload: bool = False, **options: Any) -> Session:
        """As in a server of one process, with the limits of all transports together."""
        self._admitted = []
        try:
            session = super().open(transport, client=client, upload=upload, **options)
        except BaseException:
            for entry in self._admitted:
                self._row.remove(entry)
            raise
        for entries, entry in zip((self._entries, self._lanes), self._admitted, strict=False):
            entries[session] = entry
        self._row.set_sessions(len(self.sessions))
        return session

    def _admit(self, client: Client, accurate: bool) -> None:
        with self._row.board.locked():
            super()._admit(client, accurate)
            kinds = (Kind.STREAM, Kind.LANE) if accurate else (Kind.STREAM,)
            self._admitted = [self._row.add(kind, client.name) for kind in kinds]

    def _admit_lane(self, session: Session) -> None:
        with self._row.board.locked():
            super()._admit_lane(session)
            self._lanes[session] = self._row.add(Kind.LANE, session.client.name)

    def configure(self, session: Session, **options: Any) -> None:
        """As in a server of one process, with the slots of all transports together."""
        try:
            super().configure(session, **options)
        finally:
            if session.requested_final_ms is None or session not in self.sessions:
                self._remove(self._lanes, session)

    def _remove(self, entries: dict[Session, int], session: Session) -> None:
        """Remove the board's entry of a session, if it has one."""
        entry = entries.pop(session, None)
        if entry is not None:
            self._row.remove(entry)

    def session_closed(self, session: Session) -> None:
        """Remove a session that was closed."""
        super().session_closed(session)
        self.update_metrics()
        self._remove(self._entries, session)
        self._remove(self._lanes, session)
        self._row.set_sessions(len(self.sessions))

    @property
    def streams(self) -> int:
        """Number of open live streams of all transports."""
        return self._row.board.count(Kind.STREAM)

    @property
    def accurate_streams(self) -> int:
        """Number of open live streams of all transports that have slots for an accurate lane."""
        return self._row.board.count(Kind.LANE)

    def streams_of(self, client: Client) -> int:
        """Return the number of open live streams of a client, at all transports."""
        return self._row.board.count(Kind.STREAM, client.name)

    # -- load ----------------------------------------------------------------------------------------------------------

    def record_audio(self, seconds: float) -> None:
        """Count audio that a session received."""
        self._audio += seconds
        self._row.audio[0] += seconds

    @property
    def is_late(self) -> bool:
        """Whether results of live streams were late in the last second, at all transports together."""
        return self._late and self.streams > 0

    @property
    def overloaded(self) -> bool:
        """Whether results were late for three seconds, at all transports together."""
        return self._overloaded

    @property
    def lanes_shed(self) -> bool:
        """Whether accurate lanes are disabled because of the load of all transports."""
        return self._sheds_lanes or self.degradation_level > 0

    def update_lanes(self) -> None:
        """As in a server of one process, and report how many are open."""
        super().update_lanes()
        self._row.set_open_lanes(sum(session.final_chunk_ms is not None for session in self.sessions))

    async def monitor(self) -> None:
        """Update the accurate lanes once per second, and clean up now and then, until cancelled.

        The supervisor measures the load.
        """
        for update in itertools.count(1):
            await asyncio.sleep(1 / _UPDATES)
            self.update_metrics()  # for the other processes
            if update % _UPDATES == 0:
                self.update_lanes()
            if update % (_UPDATES * CLEANUP_SECONDS) == 0:
                await self.clean_up()


async def _run(control: Control, start: Start, board_file: int) -> None:
    settings = start.restore_settings()
    row = Row(Board(board_file, start.transports, start.entries), start.transport)
    service = TransportService(settings, row, start.check)
    if settings.state_store == MEMORY:  # a stream may be resumed over another transport
        service.state_store = f"{start.folder}/states"

    def receive() -> None:
        message = control.receive()
        if message is None:  # the supervisor has ended
            shutil.rmtree(start.folder, ignore_errors=True)
            os._exit(1)
        service.handle(*message)

    def started(ports: dict[str, int], service: Service) -> None:
        freeze_heap()
        control.send(ports=ports)

    asyncio.get_running_loop().add_reader(control.socket, receive)
    try:
        connections = partial(SharedConnections, row, settings)
        await serve_clients(service, settings, started, connections=connections)
    except NemostreamError as error:
        control.send_error(error)
        raise SystemExit(1) from error


def main() -> None:
    """Serve until SIGTERM."""
    sys.setswitchinterval(SWITCH_SECONDS)
    control, start, board_file = connect()
    log_to_stderr(start.text, start.name)
    share_metrics(start.folder, start.name)
    with asyncio.Runner(loop_factory=uvicorn.Config(app="", log_config=None).get_loop_factory()) as runner:
        runner.run(_run(control, start, board_file))


if __name__ == "__main__":
    main()
