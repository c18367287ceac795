"""The supervisor: starts the engine and the transports, restarts processes that end, and stops all at a signal.

It connects each transport with the engine (`link`), and measures the load of all transports together. It does not
process data of clients, so such data cannot cause a fault in it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from nemostream.errors import BackendError, NemostreamError, OptionError
from nemostream.serving.errors import error_of
from nemostream.serving.load import LoadControl, percentile_90
from nemostream.serving.metrics import Metrics, remove_gauges, share_metrics
from nemostream.serving.network.listening import GRPC_PORT_OPTION, reserve_port
from nemostream.serving.processes.board import Board, Kind
from nemostream.serving.processes.control import Control, Start, digest_of, start_file
from nemostream.serving.processes.link import SharedAudio, socket_pair
from nemostream.serving.service import available_chunks, live_slots, load_otel, open_bundle
from nemostream.serving.settings import Settings
from nemostream.serving.subprocesses import server_environment, start_process

log = logging.getLogger("nemostream.serving")

# Modules that the processes run. The benchmark `host` replaces both, to run a backend without a model.
MODULES = {"engine": "nemostream.serving.processes.engine", "transport": "nemostream.serving.processes.transport"}
_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 30.0  # before a process is started again; doubles each time
_STABLE_SECONDS = 60.0  # after which the end of a process is the first one again
_MAX_FAILURES = 5  # of a process to start, in a row; then only a restart of the server may help
_STOP_SECONDS = 10.0  # for a process to end after its clients are gone
_SPARE_REGIONS = 64  # of a link, beyond twice the number of slots

Ready = Callable[[dict[str, int], str, int], None]


class _Process:
    """The engine or a transport, and the connection to it."""

    def __init__(self, name: str, subprocess: asyncio.subprocess.Process, control: Control) -> None:
        self.name, self.subprocess, self.control = name, subprocess, control
        self.error: NemostreamError | None = None  # why it could not start
        self.ready = False

    def send(self, files: tuple[int, ...] = (), **message: Any) -> None:
        """Send a message. Does nothing if the process has ended (`_watch`); kills a process that does not read."""
        try:
            self.control.send(files, **message)
        except BlockingIOError:
            self.kill()
        except OSError:
            pass

    def terminate(self) -> None:
        """Send SIGTERM: a transport drains. Does nothing if the process has ended."""
        with suppress(ProcessLookupError):
            self.subprocess.terminate()

    def stop(self) -> None:
        """Send SIGINT: a transport that drains stops at once. A second SIGTERM may be merged with the first one."""
        with suppress(ProcessLookupError):
            self.subprocess.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Send SIGKILL. Does nothing if the process has ended."""
        with suppress(ProcessLookupError):
            self.subprocess.kill()


class Supervisor:
    """All processes of one server. Use `supervise`."""

    def __init__(self, settings: Settings, ports: dict[str, int], ready: Ready, text: bool, folder: str) -> None:
        grpc_port = ports.get("grpc_port", settings.grpc_port)
        self._settings = settings.model_copy(update={"port": ports["http_port"], "grpc_port": grpc_port})
        self._manifest = open_bundle(settings).manifest
        self._chunk_sizes = len(available_chunks(self._manifest, settings))  # raises before any process is started
        self._ports, self._on_ready, self._text, self._folder = ports, ready, text, folder
        # A stream with an accurate lane has two entries.
        streams = 2 * settings.max_streams
        self._entries = streams + settings.max_uploads + settings.max_connections + _SPARE_REGIONS
        self._board_file = Board.create(settings.transports, self._entries)
        self._board = Board(self._board_file, settings.transports, self._entries)
        self._metrics = Metrics(shared=True)
        self._metrics.describe(self._manifest.name, settings.device, settings.transports)
        self._load = LoadControl()
        self._engine: _Process | None = None
        self._transports: dict[int, _Process] = {}
        self._state, self._max_streams = "starting", settings.max_streams
        self._model = self._manifest.name
        self._announced = False  # whether `ready` was called
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until a signal. Raises what the first start of a process raises, and as `Service.open_tracing`."""
        sender = load_otel().MetricSender.start(self._metrics.families) if self._settings.otel else None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        count = self._settings.transports
        keeping = [asyncio.create_task(self._keep_running("engine", 0))]
        keeping += [asyncio.create_task(self._keep_running("transport", index)) for index in range(count)]
        monitoring = asyncio.create_task(self._monitor())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({*keeping, monitoring, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._stopping.set()
            for task in done:
                task.result()
            log.info("draining", extra={"streams": self._board.count(Kind.STREAM)})
            for transport in self._transports.values():
                transport.terminate()
            await asyncio.wait(keeping[1:], timeout=self._settings.drain_seconds + _STOP_SECONDS)
        finally:
            self._stopping.set()
            monitoring.cancel()
            stopping.cancel()
            for transport in self._transports.values():
                transport.kill()
            if self._engine is not None and self._announced:
                with suppress(OSError):
                    self._engine.control.socket.shutdown(socket.SHUT_RDWR)  # it ends at end-of-file
                await asyncio.wait(keeping[:1], timeout=_STOP_SECONDS)
            if self._engine is not None:
                self._engine.kill()
            await asyncio.wait(keeping)
            if sender is not None:
                await asyncio.to_thread(load_otel().close, sender)

    def _on_signal(self) -> None:
        """Stop; a second signal stops at once."""
        if self._stopping.is_set():
            for transport in self._transports.values():
                transport.stop()
        self._stopping.set()

    # -- processes -----------------------------------------------------------------------------------------------------

    async def _keep_running(self, kind: str, index: int) -> None:
        """Run a process, and start it again whenever it ends, until the server stops.

        Raises the error of a process that could not start before the server was ready.
        """
        name = kind if kind == "engine" else f"{kind}-{index}"
        delay = _BACKOFF_SECONDS / 2  # before the next start; doubled first
        failures = 0  # starts in a row that did not make the process ready
        while not self._stopping.is_set():
            began, ready = time.monotonic(), False
            error: NemostreamError | None
            try:
                process = await self._start(kind, name, index)
            except BackendError as failure:  # for example no file descriptor is free
                event, error, reason = "process cannot be started", failure, str(failure)
            else:
                if self._stopping.is_set():  # while it was started
                    process.kill()
                code = await self._watch(process)
                if kind == "engine":
                    self._engine = None
                else:
                    del self._transports[index]
                    self._board.clear(index)
                remove_gauges(name)
                event, error, ready = "process ended", process.error, process.ready
                reason = str(error or _reason(code))
            if self._stopping.is_set():
                return
            failures = 0 if ready else failures + 1
            if not self._announced and error is not None:
                raise error
            if not self._announced and failures >= _MAX_FAILURES:
                raise BackendError(f"the process {name} ended {failures} times while it started: {reason}.")
            is_stable = time.monotonic() - began > _STABLE_SECONDS
            delay = _BACKOFF_SECONDS if is_stable else min(2 * delay, _MAX_BACKOFF_SECONDS)
            log.error(event, extra={"process_name": name, "reason": reason, "restart_seconds": delay})
            if kind == "engine":
                self._set_state("failed" if failures >= _MAX_FAILURES else "starting")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _start(self, kind: str, name: str, index: int) -> _Process:
        """Start a process and connect it. Raises `BackendError` if it cannot be started."""
        process = await self._spawn(kind, name, index)
        try:
            if kind == "engine":
                self._engine = process
                for transport in self._transports.values():
                    self._link(transport)
            else:
                self._transports[index] = process
                self._send_state(process)
                self._link(process)
        except OSError as error:
            process.error = BackendError(f"the process {name} cannot be connected: {error}.")
            process.kill()
        return process

    async def _spawn(self, kind: str, name: str, index: int) -> _Process:
        start = Start(
            settings=self._settings.__dict__,
            name=name,
            text=self._text,
            folder=self._folder,
            transports=self._settings.transports,
            entries=self._entries,
            manifest=digest_of(self._manifest),
            transport=index,
        )
        with ExitStack() as copied, ExitStack() as failed:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                failed.enter_context(ours)
                copied.enter_context(theirs)
                ours.setblocking(False)
                file = start_file(start)
                copied.callback(os.close, file)
                # The name is for process lists.
                started = await start_process(
                    MODULES[kind],
                    name,
                    environment=server_environment(),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                )
            except OSError as error:
                raise BackendError(f"the process {name} cannot be started: {error}.") from error
            process = _Process(name, started, Control(ours))
            process.send((file, self._board_file))
            failed.pop_all()
        return process

    def _link(self, transport: _Process) -> None:
        """Connect a transport with the engine."""
        if self._engine is None:
            return
        # One for each stream and accurate lane, one for the completion of a final of each lane, and others for streams
        # that are being closed.
        slots = live_slots(self._settings, self._settings.max_streams) + self._settings.max_uploads
        regions = 2 * slots + _SPARE_REGIONS
        audio = SharedAudio.create(regions, self._manifest)
        with ExitStack() as stack:
            stack.callback(os.close, audio)
            one, two = (stack.enter_context(end) for end in socket_pair())
            self._engine.send((one.fileno(), audio))
            transport.send((two.fileno(), audio))

    async def _watch(self, process: _Process) -> int:
        """Receive a process's messages until it ends. Return its exit status."""
        loop = asyncio.get_running_loop()

        def receive() -> None:
            try:
                message = process.control.receive()
            except BlockingIOError:
                return
            if message is None:
                loop.remove_reader(process.control.socket)
            else:
                self._handle(process, message[0])

        loop.add_reader(process.control.socket, receive)
        try:
            code = await process.subprocess.wait()
            with suppress(OSError):
                while (message := process.control.receive()) is not None:  # sent just before the end
                    self._handle(process, message[0])
            return code
        finally:
            loop.remove_reader(process.control.socket)
            process.control.socket.close()

    def _handle(self, process: _Process, message: dict[str, Any]) -> None:
        if "error" in message:
            process.error = error_of(*message["error"])
        elif "ports" in message:
            process.ready = True
            self._announce()
        elif "state" in message:
            process.ready = True
            if "max_streams" in message:
                self._max_streams, self._model = message["max_streams"], message["model"]
                self._metrics.max_streams.set(self._max_streams)
            self._set_state(message["state"])
            self._announce()

    def _announce(self) -> None:
        """Call `ready` when the engine and all transports are ready for the first time."""
        if self._announced or self._state != "ready" or len(self._transports) < self._settings.transports:
            return
        if all(transport.ready for transport in self._transports.values()):
            self._announced = True
            self._on_ready(self._ports, self._model, self._max_streams)

    def _set_state(self, state: str) -> None:
        self._state = state
        for transport in self._transports.values():
            self._send_state(transport)

    def _send_state(self, transport: _Process) -> None:
        transport.send(engine=self._state, max_streams=self._max_streams, load=self._load_message())

    # -- load ----------------------------------------------------------------------------------------------------------

    async def _monitor(self) -> None:
        """Update the load once per second, until cancelled."""
        counts = [0] * self._settings.transports
        totals, reported = self._board.totals, self._load_message()
        while True:
            await asyncio.sleep(1)
            (steps_before, audio_before), totals = totals, self._board.totals
            steps, audio = totals[0] - steps_before, totals[1] - audio_before
            self._metrics.real_time.set(steps / audio if audio > 0 else 0.0)
            latencies: list[float] = []
            for index, since in enumerate(counts):
                new, counts[index] = self._board.latencies(index, since)
                latencies += new
            self.update_load(percentile_90(latencies))
            if (message := self._load_message()) != reported:
                reported = message
                for transport in self._transports.values():
                    transport.send(load=message)

    def update_load(self, latency: float) -> None:
        """Add a second's latency (90th percentile, in chunks), and decide on what depends on the load.

        These are the accurate lanes, and with `degrade` the degradation level.
        """
        max_level = self._chunk_sizes - 1 if self._settings.degrade else 0
        self._load.update(latency, max_level, self._board.open_lanes > 0)
        self._metrics.degradation_level.set(self._load.level)

    def _load_message(self) -> tuple[bool, bool, int, bool]:
        return self._load.overloaded, self._load.is_late, self._load.level, self._load.sheds_lanes


async def supervise(settings: Settings, ready: Ready, text: bool = False) -> None:
    """Serve with `settings.transports` transport processes until SIGTERM or SIGINT.

    `ready` is called with the ports, the name of the model and the maximum number of streams when streams are accepted.
    Raises `OptionError` on other systems than Linux, `BackendError` if a port is not available, and what loading the
    model raises.
    """
    if not hasattr(os, "memfd_create"):
        raise OptionError("transports needs Linux; omit the option to serve with one process.")
    http = reserve_port(settings.host, settings.port, "--port")
    reserved, ports = [http], {"http_port": http.getsockname()[1]}
    folder = tempfile.mkdtemp(prefix="nemostream-")
    try:
        if settings.grpc_port >= 0:
            grpc = reserve_port(settings.host, settings.grpc_port, GRPC_PORT_OPTION)
            reserved.append(grpc)
            ports["grpc_port"] = grpc.getsockname()[1]
        share_metrics(folder, "supervisor")
        await Supervisor(settings, ports, ready, text, folder).run()
    finally:
        for one in reserved:
            one.close()
        shutil.rmtree(folder, ignore_errors=True)


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
