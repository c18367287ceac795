"""Live streams that continue while servers are killed, restarted and frozen, and while their state store fails.

    nemostream bench survival
    nemostream bench survival --streams 6 --seconds 20 --faults kill cut --seed 1

`--servers` processes of `nemostream serve` share a state store in a folder, behind HAProxy if it is installed, else
behind a TCP balancer in this process. Clients (`nemostream.client.AsyncStream`) send audio in real time, while faults
are injected at times and servers that `--seed` determines:

* *kill*: SIGKILL; *terminate*: SIGTERM. The process is started again after it has ended.
* *freeze*: SIGSTOP for 8 s, at most a quarter of `--seconds`; then SIGCONT.
* *cut*: all connections between the balancer and a server are closed; with `--direct`, those of half of the clients.
* *full*: the disk of the store is full for 4 s: a tmpfs that a file fills, or, if none can be mounted, fsync fails.
* *slow*: each fsync of a server takes one second longer, for 4 s.

The oracle is a stream of the same audio to one of the servers, before any fault. All events must be equal to its
events, field by field except `audio` (which depends on the time of the connection), and their numbers must be 1, 2, 3
and so on. A reconnection belongs to the fault that began last before it was noticed. A gap is the time from the moment
at which the client notices the loss to the next new event. The command fails with exit code 1 if an event differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nemostream.benchmarks.command import make_parser, open_bundle, run
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress
from nemostream.bundle import Bundle
from nemostream.client import AsyncStream, Event
from nemostream.engines import speech
from nemostream.errors import BackendError, NemostreamError, OptionError

FAULTS = ("kill", "terminate", "freeze", "cut", "full", "slow")
_RATE = 16000  # Hz
_PACKET = 0.1  # seconds of audio per message
_AUDIOS = 4  # different recordings; streams use them in turn
_FAULT_SECONDS = 6.0  # between two faults, on average
_FREEZE_SECONDS, _STORE_SECONDS = 8.0, 4.0  # durations of `freeze`, and of `full` and `slow`
_STORE_BYTES = 256 << 20  # of the tmpfs
_START_SECONDS, _STOP_SECONDS = 60.0, 30.0
_END_SECONDS = 120.0  # for a stream to end after its last audio


@dataclass
class Injected:
    """A fault: its kind, and when it began, in seconds of the event loop."""

    kind: str
    began: float


@dataclass
class Transcript:
    """What the client of one stream received."""

    audio: int  # number of the recording
    events: list[Event] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # when each loss was noticed, and its gap, in seconds
    reconnects: int = 0
    error: str = ""  # why the stream was lost


def measure_survival(
    bundle: Bundle,
    streams: int = 60,
    seconds: float = 120.0,
    *,
    servers: int = 3,
    chunk_ms: int = 560,
    faults: Sequence[str] = FAULTS,
    seed: int = 0,
    direct: bool = False,
    progress: Progress = no_progress,
) -> Record:
    """Run `streams` streams of `seconds` of audio while faults are injected, and return the result.

    With `direct`, clients have the addresses of all servers and there is no balancer. Raises `OptionError` for invalid
    options, and `BackendError` if a server does not start.
    """
    if streams < 1 or servers < 2 or not seconds >= 5:
        raise OptionError(
            f"streams is {streams}, servers {servers} and seconds {seconds:g}; there must be a stream, two servers "
            "and 5 seconds."
        )
    if unknown := sorted(set(faults) - set(FAULTS)):
        raise OptionError(f"there is no fault {unknown[0]!r}; the faults are {', '.join(FAULTS)}.")
    chunk, others = bundle.manifest.chunk(chunk_ms).ms, OtherWork()
    recordings = _recordings(bundle, seconds)
    with tempfile.TemporaryDirectory(prefix="survival-") as name, _store(Path(name)) as store:
        kind = "tmpfs" if store.is_mount() else "folder"
        cluster = Cluster(bundle, chunk, Path(name), store, servers, streams)
        try:
            found = asyncio.run(
                _run(cluster, recordings, streams, seconds, list(faults), seed, direct, chunk, progress)
            )
        finally:
            cluster.kill()
    expected, transcripts, injected, balancer = found
    return records.record(
        "survival",
        rows_of(expected, transcripts, injected, list(dict.fromkeys(faults))),
        model=records.model_of(bundle.manifest),
        method={
            "streams": streams,
            "seconds": seconds,
            "servers": servers,
            "chunk_ms": chunk,
            "faults": list(faults),
            "seed": seed,
            "balancer": balancer,
            "store": kind,
            "threads": records.cores(),
            "device": "cpu",
            "other_work_cores": round(others.cores(), 3),  # the servers have ended, and count as this process
        },
    )


def _recordings(bundle: Bundle, seconds: float) -> list[bytes]:
    """Return recordings of `seconds`: the packaged clips with pauses, which begin at different positions."""
    pause = (np.random.default_rng(0).standard_normal(_RATE) * 1e-3).astype(np.float32)
    whole = np.concatenate([part for clip in speech(bundle.manifest) for part in (clip, pause)])
    starts = [len(whole) * index // _AUDIOS for index in range(_AUDIOS)]
    rotated = [np.resize(np.roll(whole, -start), round(seconds * _RATE)) for start in starts]
    return [np.clip(np.rint(32768 * each), -32768, 32767).astype("<i2").tobytes() for each in rotated]


@contextlib.contextmanager
def _store(folder: Path) -> Iterator[Path]:
    """Yield the folder of the store: a small file system, if one can be mounted."""
    store = folder / "states"
    store.mkdir(0o700)
    options = f"size={_STORE_BYTES},mode=700"
    try:
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "nemostream", str(store)], capture_output=True
        ).returncode
    except OSError:
        mounted = False
    try:
        yield store
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(store)], check=True)


# -- servers -----------------------------------------------------------------------------------------------------------


class Server:
    """A process of `nemostream serve`, which can be started again on its port."""

    def __init__(self, command: Sequence[str], port: int, log: Path) -> None:
        self.port, self.is_up = port, False
        self._command, self._log = [*command, "--port", str(port)], log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises `BackendError`."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdout=asyncio.subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(_START_SECONDS):
                line = await self._process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line.startswith(b"http"):
            *_, last = ["it printed nothing", *self._log.read_text(errors="replace").splitlines()]
            raise BackendError(f"the server did not start: {last}")
        self.is_up = True

    def signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def restart(self, number: int) -> None:
        """End the process with a signal and start it again."""
        assert self._process is not None
        self.is_up = False
        self.signal(number)
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self.start()

    async def stop(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            await self._process.wait()

    def kill(self) -> None:
        """End the process after an error, when its event loop is closed."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)


class Cluster:
    """The servers and their store."""

    def __init__(self, bundle: Bundle, chunk_ms: int, folder: Path, store: Path, count: int, streams: int) -> None:
        self.folder, self.store = folder, store
        command = [sys.executable, "-m", "nemostream.benchmarks.harness.faulty_server", str(folder), "serve"]
        command += ["--bundle", str(bundle.path), "--chunk-ms", str(chunk_ms), "--chunks", str(chunk_ms)]
        command += ["--grpc-port", "-1", "--no-measure", "--threads", "1", "--max-streams", str(2 * streams + _AUDIOS)]
        command += ["--state-store", str(store), "--state-seconds", "1"]
        self.servers = [Server(command, port, folder / f"{port}.log") for port in _free_ports(count)]

    def kill(self) -> None:
        for server in self.servers:
            server.kill()

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Fill the file system of the store, or let writes fail."""
        if not self.store.is_mount():
            with self.marked("full"):
                yield
            return
        ballast = self.store / "ballast"
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
            yield
        finally:
            ballast.unlink()

    @contextlib.contextmanager
    def marked(self, name: str) -> Iterator[None]:
        """Let a file exist that `faulty_server` looks for."""
        (self.folder / name).touch()
        try:
            yield
        finally:
            (self.folder / name).unlink()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


# -- balancers ---------------------------------------------------------------------------------------------------------


class Balancer(Protocol):
    """Forwards connections of clients to servers."""

    name: str
    urls: list[str]  # for clients

    async def cut(self, server: Server) -> None:
        """Close all connections to a server."""


class HaProxy:
    """HAProxy. It closes connections to servers that do not answer two checks in a row."""

    name = "HAProxy"

    def __init__(self, servers: Sequence[Server], folder: Path) -> None:
        (port,) = _free_ports(1)
        self.urls = [f"http://127.0.0.1:{port}"]
        self.config, self._admin = folder / "haproxy.cfg", folder / "haproxy.sock"
        lines = ["global", f" stats socket {self._admin} level admin", " maxconn 4096", "defaults", " mode tcp"]
        lines += [" timeout connect 1s", " timeout client 1h", " timeout server 1h", " timeout check 1s"]
        lines += [" option redispatch", "listen streams", f" bind 127.0.0.1:{port}", " balance leastconn"]
        lines += [" option httpchk", " http-check send meth GET uri /readyz ver HTTP/1.1 hdr Host 127.0.0.1"]
        for server in servers:
            check = "check inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions"
            lines.append(f" server s{server.port} 127.0.0.1:{server.port} {check}")
        self.config.write_text("\n".join(lines) + "\n")

    async def cut(self, server: Server) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self._admin))
        writer.write(f"shutdown sessions server streams/s{server.port}\n".encode())
        await reader.read()
        writer.close()


class TcpBalancer:
    """A balancer in this process, which connects to servers in random order."""

    name = "TCP balancer"

    def __init__(self, servers: Sequence[Server], rng: random.Random) -> None:
        self.urls: list[str] = []
        self._servers, self._rng = servers, rng
        self._writers: dict[int, set[asyncio.StreamWriter]] = {server.port: set() for server in servers}

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for server in self._rng.sample(self._servers, len(self._servers)):
            with contextlib.suppress(OSError):
                back, out = await asyncio.open_connection("127.0.0.1", server.port)
                break
        else:
            writer.transport.abort()
            return
        pair = {writer, out}
        self._writers[server.port] |= pair
        copies = [asyncio.create_task(self._copy(*each)) for each in ((reader, out), (back, writer))]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in copies:
                task.cancel()
            self._writers[server.port] -= pair
            for each in pair:
                each.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()

    async def cut(self, server: Server) -> None:
        for writer in self._writers[server.port]:
            writer.transport.abort()


class NoBalancer:
    """Clients have the addresses of all servers."""

    name = "none"

    def __init__(self, servers: Sequence[Server], clients: Sequence[AsyncStream], rng: random.Random) -> None:
        self.urls = [server.url for server in servers]
        self._clients, self._rng = clients, rng

    async def cut(self, server: Server) -> None:
        for client in self._rng.sample(self._clients, (len(self._clients) + 1) // 2):
            if (connection := client._connection) is not None:
                connection.socket.transport.abort()


def haproxy() -> str | None:
    """Return the path of HAProxy, or None."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")


@contextlib.asynccontextmanager
async def _balancer(
    cluster: Cluster, clients: Sequence[AsyncStream], direct: bool, rng: random.Random
) -> AsyncIterator[Balancer]:
    if direct:
        yield NoBalancer(cluster.servers, clients, rng)
    elif path := haproxy():
        proxy = HaProxy(cluster.servers, cluster.folder)
        process = await asyncio.create_subprocess_exec(
            path, "-q", "-db", "-f", str(proxy.config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield proxy
        finally:
            process.kill()
            await process.wait()
    else:
        balancer = TcpBalancer(cluster.servers, rng)
        async with await asyncio.start_server(balancer.handle, "127.0.0.1", 0) as listening:
            balancer.urls = [f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"]
            yield balancer


# -- streams and faults ------------------------------------------------------------------------------------------------


async def _run(
    cluster: Cluster,
    recordings: Sequence[bytes],
    streams: int,
    seconds: float,
    faults: Sequence[str],
    seed: int,
    direct: bool,
    chunk_ms: int,
    progress: Progress,
) -> tuple[list[Transcript], list[Transcript], list[Injected], str]:
    rng, clients, injected = random.Random(seed), list[AsyncStream](), list[Injected]()
    options: dict[str, Any] = {"chunk_ms": chunk_ms, "words": True}
    expected = []
    try:
        await asyncio.gather(*(server.start() for server in cluster.servers))
        progress("streams without faults")
        for index, audio in enumerate(recordings[:streams]):
            expected.append(
                await _transcribe(AsyncStream(cluster.servers[0].url, **options), audio, index, paced=False)
            )
        if lost := [each.error for each in expected if each.error]:
            raise BackendError(f"a stream without faults failed: {lost[0]}")
        async with _balancer(cluster, clients, direct, rng) as balancer:
            await _answers(balancer.urls[0])
            clients += [
                AsyncStream(
                    balancer.urls[index % len(balancer.urls) :] + balancer.urls[: index % len(balancer.urls)], **options
                )
                for index in range(streams)
            ]
            progress(f"{streams} streams for {seconds:.0f} s")
            begin = asyncio.get_running_loop().time()
            async with asyncio.TaskGroup() as group:
                running = [
                    group.create_task(
                        _transcribe(
                            client,
                            recordings[index % len(recordings)],
                            index % len(recordings),
                            paced=True,
                            delay=rng.uniform(0, 1),
                        )
                    )
                    for index, client in enumerate(clients)
                ]
                group.create_task(_inject(cluster, balancer, faults, begin, seconds, rng, injected, progress))
            return expected, [task.result() for task in running], injected, balancer.name
    finally:
        for server in cluster.servers:
            await server.stop()


async def _answers(url: str) -> None:
    """Wait until a server answers through a balancer. Raises `BackendError`."""
    address = url.removeprefix("http://")
    for _ in range(100):
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(f"GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.readline()
            writer.close()
            if b" 200 " in answer:
                return
        await asyncio.sleep(0.1)
    raise BackendError("the balancer has not reached a server for 10 s.")


async def _transcribe(stream: AsyncStream, audio: bytes, number: int, *, paced: bool, delay: float = 0.0) -> Transcript:
    """Send a recording, in real time if `paced`, and return what was received."""
    clock, found = asyncio.get_running_loop().time, Transcript(number)

    async def send() -> None:
        size, begin = 2 * round(_RATE * _PACKET), clock()
        for offset in range(0, len(audio), size):
            if paced:
                await asyncio.sleep(begin + (offset + size) / (2 * _RATE) - clock())
            await stream.send(audio[offset : offset + size])
        await stream.finish()

    await asyncio.sleep(delay)
    try:
        async with asyncio.timeout(len(audio) / (2 * _RATE) + _END_SECONDS), stream:
            sending = asyncio.create_task(send())
            try:
                async for event in stream:
                    found.events.append(dataclasses.replace(event, audio=0.0))
                    for gap in stream.gaps[len(found.gaps) :]:
                        found.gaps.append((clock() - gap, gap))
                await sending
            finally:
                sending.cancel()
    except (NemostreamError, TimeoutError) as error:
        found.error = str(error) or "no end of the stream"
    found.reconnects = stream.reconnects
    return found


async def _inject(
    cluster: Cluster,
    balancer: Balancer,
    faults: Sequence[str],
    begin: float,
    seconds: float,
    rng: random.Random,
    injected: list[Injected],
    progress: Progress,
) -> None:
    """Inject faults: each kind in turn, in random order. At least one server is not affected at any time."""
    clock = asyncio.get_running_loop().time
    if not faults:
        return
    count = max(len(faults), round(seconds / _FAULT_SECONDS))
    kinds = list[str]()
    while len(kinds) < count:
        kinds += rng.sample(faults, len(faults))
    times = [begin + 1 + (seconds - 2) * (index + rng.random()) / count for index in range(count)]
    async with asyncio.TaskGroup() as group:
        for kind, due in zip(kinds, times, strict=False):
            await asyncio.sleep(due - clock())
            while sum(server.is_up for server in cluster.servers) < 2:
                await asyncio.sleep(0.05)
            server = rng.choice([server for server in cluster.servers if server.is_up])
            progress(f"{clock() - begin:5.1f} s: {kind}")
            injected.append(Injected(kind, clock()))
            if kind == "cut":
                await balancer.cut(server)
            elif kind in ("full", "slow"):
                with cluster.full_disk() if kind == "full" else cluster.marked("slow"):
                    await asyncio.sleep(min(_STORE_SECONDS, seconds / 4))
            elif kind == "freeze":
                group.create_task(_freeze(server, min(_FREEZE_SECONDS, seconds / 4)))
            else:
                server.is_up = False
                group.create_task(server.restart(signal.SIGKILL if kind == "kill" else signal.SIGTERM))


async def _freeze(server: Server, seconds: float) -> None:
    server.is_up = False
    server.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        server.signal(signal.SIGCONT)
    server.is_up = True


# -- report ------------------------------------------------------------------------------------------------------------


def rows_of(
    expected: Sequence[Transcript],
    transcripts: Sequence[Transcript],
    injected: Sequence[Injected],
    kinds: Sequence[str],
) -> list[Row]:
    """Return a row for each kind of fault, of the streams that reconnected after it, and one of all streams."""

    def cause(noticed: float) -> str:
        return next((fault.kind for fault in reversed(injected) if fault.began <= noticed), "none")

    rows = []
    found = [(each, [(cause(noticed), gap) for noticed, gap in each.gaps]) for each in transcripts]
    for kind in (*kinds, "all"):
        affected = [each for each, gaps in found if kind == "all" or kind in [name for name, _ in gaps]]
        gaps = [gap for _, each in found for name, gap in each if kind in (name, "all")]
        oracles = [expected[each.audio].events for each in affected]
        numbers = [[event.sequence for event in each.events] for each in affected]
        values = {
            "faults": sum(kind in (fault.kind, "all") for fault in injected),
            "streams": len(affected),
            "reconnects": sum(each.reconnects for each in affected) if kind == "all" else len(gaps),
            "equal": sum(each.events == oracle for each, oracle in zip(affected, oracles, strict=True)),
            "lost_events": sum(
                len({*range(1, len(oracle) + 1)} - {*own}) for own, oracle in zip(numbers, oracles, strict=True)
            ),
            "repeated_events": sum(len(own) - len({*own}) for own in numbers),
            "lost_streams": sum(bool(each.error) for each in affected),
            "errors": [each.error for each in affected if each.error][:3],
        }
        rows.append(records.row({"fault": kind}, {"gap": [1000 * gap for gap in gaps]}, values))
    return rows


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Return the table of a result as Markdown."""
    head = [
        "fault",
        "times",
        "streams",
        "reconnections",
        "p50",
        "p99",
        "max",
        "equal",
        "events lost",
        "repeated",
        "lost",
    ]
    lines = []
    for row in result["rows"]:
        values, gap = row["values"], row["figures"].get("gap")
        times = [tables.digits(gap[name] / 1000) if gap else "–" for name in ("p50", "p99", "max")]
        lines.append(
            [
                row["case"]["fault"],
                values["faults"],
                values["streams"],
                values["reconnects"],
                *times,
                values["equal"],
                values["lost_events"],
                values["repeated_events"],
                values["lost_streams"],
            ]
        )
    method = result["method"]
    text = (
        f"{method['streams']} streams of {method['seconds']:.0f} s with {method['chunk_ms']} ms chunks, "
        f"{method['servers']} servers, balancer: {method['balancer']}, store: {method['store']}, "
        f"seed {method['seed']}; "
        f"clients and servers on the same {method['threads']} cores. Gaps in seconds, from the moment at which a "
        "client notices a loss to its next new event. Of each fault: the streams that reconnected after it, and how "
        "many of them have exactly the events of a stream without interruption. "
        f"{tables.other_load([method['other_work_cores']])}"
    )
    return f"{text}\n\n{tables.markdown(head, lines)}\n"


def passed(result: Record) -> bool:
    """Return whether all events of all streams are equal to those without faults."""
    return all(row["values"]["equal"] == row["values"]["streams"] for row in result["rows"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("survival", __doc__)
    parser.add_argument("--bundle", type=Path, help="bundle to serve (default: the packaged model)")
    parser.add_argument("--streams", type=int, default=60, help="number of streams")
    parser.add_argument("--seconds", type=float, default=120.0, help="duration of each stream")
    parser.add_argument("--servers", type=int, default=3, help="number of server processes")
    parser.add_argument("--chunk-ms", type=int, default=560, help="chunk size in ms")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), help="faults to inject")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults' times and servers")
    parser.add_argument("--direct", action="store_true", help="clients have all addresses, without a balancer")
    options = parser.parse_args(arguments)
    results: list[Record] = []

    def measure() -> Record:
        results.append(
            measure_survival(
                open_bundle(options.bundle),
                options.streams,
                options.seconds,
                servers=options.servers,
                chunk_ms=options.chunk_ms,
                faults=options.faults,
                seed=options.seed,
                direct=options.direct,
                progress=records.report_progress,
            )
        )
        return results[0]

    run(measure, options)
    if results and not passed(results[0]):
        records.report_progress("nemostream: events differ from those of streams without interruption.")
        sys.exit(1)


if __name__ == "__main__":
    main()
