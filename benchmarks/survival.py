"""Live streams that continue while servers are killed, restarted and frozen, and while their state store fails.

    nemostream bench survival
    nemostream bench survival --streams 6 --seconds 20 --faults kill cut --seed 1

`--servers` processes of `nemostream serve` share a state store in a folder, behind HAProxy if it is installed, else
behind a TCP balancer in this process; with `--direct`, clients have an address for each server. Clients
(`nemostream.client.AsyncStream`) send audio in real time, while faults are injected at times and servers that `--seed`
determines:

* *kill*: SIGKILL; *terminate*: SIGTERM. The process is started again after it has ended.
* *freeze*: SIGSTOP for 8 s, at most a quarter of `--seconds`; then SIGCONT.
* *cut*: all connections to a server are closed.
* *full*: the disk of the store is full for 4 s: a tmpfs that a file fills, or, if none can be mounted, fsync fails.
* *slow*: each fsync of a server takes one second longer, for 4 s.

The oracle is a stream of the same audio to one of the servers, before any fault. All events must be equal to its
events, field by field except `audio` (which depends on the time of the connection), and their numbers must be 1, 2, 3
and so on. A reconnection belongs to the fault that began last before it was detected. A gap is the time from the moment
at which the client detects the loss to the next new event. The command fails with exit code 1 if an event differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from nemostream.benchmarks.command import make_parser, open_bundle, run
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress
from nemostream.benchmarks.harness.server_process import free_ports, server_process
from nemostream.benchmarks.serve import pcm_clips
from nemostream.bundle import Bundle
from nemostream.client import AsyncStream, Event
from nemostream.errors import BackendError, NemostreamError, OptionError

FAULTS = ("kill", "terminate", "freeze", "cut", "full", "slow")
_RATE = 16000  # Hz
_PACKET = 0.1  # seconds of audio per message
_AUDIOS = 4  # different recordings; streams use them in turn
_FAULT_SECONDS = 6.0  # between two faults, on average
_FREEZE_SECONDS, _STORE_SECONDS = 8.0, 4.0  # durations of `freeze`, and of `full` and `slow`
_STORE_BYTES = 256 << 20  # of the tmpfs
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
    gaps: list[tuple[float, float]] = field(default_factory=list)  # seconds: when each loss was detected, and its gap
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
        with cluster.running():
            progress("streams without faults")
            expected = asyncio.run(_undisturbed(cluster, recordings[:streams]))
            transcripts, injected, balancer = asyncio.run(
                _run(cluster, recordings, streams, seconds, list(faults), seed, direct, progress)
            )
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
    pause = np.rint(32 * np.random.default_rng(0).standard_normal(_RATE)).astype(np.int16)
    whole = np.concatenate([part for clip in pcm_clips(bundle) for part in (clip, pause)])
    starts = [len(whole) * index // _AUDIOS for index in range(_AUDIOS)]
    return [np.resize(np.roll(whole, -start), round(seconds * _RATE)).astype("<i2").tobytes() for start in starts]


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

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.port, self.url, self.is_up = port, f"http://127.0.0.1:{port}", False
        self._command = [*command, "--port", str(port)]
        self._running = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process and wait until it is ready. Raises `BackendError`."""
        self._process, _ = self._running.enter_context(server_process(self._command))
        self.is_up = True

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it has not ended."""
        if self._process is not None:
            self._process.send_signal(number)

    def stop(self, kill: bool = True) -> None:
        """End the process with SIGKILL, or else with SIGTERM, and wait until it has ended."""
        self.is_up = False
        if kill:
            self.send_signal(signal.SIGKILL)
        self._running.close()

    def restart(self, kill: bool) -> None:
        """End the process as `stop` and start it again."""
        self.stop(kill)
        self.start()


class Cluster:
    """The servers and their store."""

    def __init__(self, bundle: Bundle, chunk_ms: int, folder: Path, store: Path, count: int, streams: int) -> None:
        self.chunk_ms, self.folder, self.store = chunk_ms, folder, store
        command = [sys.executable, "-m", "nemostream.benchmarks.harness.faulty_server", str(folder), "serve"]
        command += ["--bundle", str(bundle.path), "--chunk-ms", str(chunk_ms), "--chunks", str(chunk_ms)]
        command += ["--grpc-port", "-1", "--no-measure", "--threads", "1", "--max-streams", str(2 * streams + _AUDIOS)]
        command += ["--state-store", str(store), "--state-seconds", "1"]
        self.servers = [Server(command, port) for port in free_ports(count)]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the servers in a `with` block."""
        try:
            with ThreadPoolExecutor(len(self.servers)) as pool:
                list(pool.map(Server.start, self.servers))
            yield
        finally:
            for server in self.servers:
                server.stop()

    def stream(self, urls: Sequence[str]) -> AsyncStream:
        """Return a client of some of the servers."""
        return AsyncStream(urls, chunk_ms=self.chunk_ms, words=True)

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
        """Create a file that `faulty_server` checks, and delete it at the end of the `with` block."""
        (self.folder / name).touch()
        try:
            yield
        finally:
            (self.folder / name).unlink()


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
        (port,) = free_ports(1)
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


class TcpProxy:
    """A proxy in this process. Each of its URLs has servers, to which it connects in random order."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self.urls: list[str] = []
        self._rng = rng
        self._writers: defaultdict[int, set[asyncio.StreamWriter]] = defaultdict(set)  # by the port of the server

    @contextlib.asynccontextmanager
    async def listening(self, servers: Sequence[Server]) -> AsyncIterator[None]:
        """Accept connections to some servers on a new URL in an `async with` block."""
        handle = functools.partial(self._handle, servers)
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as listener:
            self.urls.append(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
            yield

    async def _handle(
        self, servers: Sequence[Server], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        for server in self._rng.sample(servers, len(servers)):
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


def haproxy() -> str | None:
    """Return the path of HAProxy, or None."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")


@contextlib.asynccontextmanager
async def _balancer(cluster: Cluster, direct: bool, rng: random.Random) -> AsyncIterator[Balancer]:
    """Yield what is between clients and servers. With `direct`, each server has a proxy, which can cut connections."""
    if not direct and (path := haproxy()):
        balancer = HaProxy(cluster.servers, cluster.folder)
        command = [path, "-q", "-db", "-f", str(balancer.config)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                await _wait_until_ready(balancer.urls[0])
                yield balancer
            finally:
                process.kill()
        return
    proxy = TcpProxy("none" if direct else "TCP balancer", rng)
    async with contextlib.AsyncExitStack() as stack:
        for servers in [[server] for server in cluster.servers] if direct else [cluster.servers]:
            await stack.enter_async_context(proxy.listening(servers))
        yield proxy


async def _wait_until_ready(url: str) -> None:
    """Wait until a server answers through a balancer. Raises `BackendError`."""

    def request() -> None:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10):
            pass

    for _ in range(100):
        with contextlib.suppress(OSError):  # also for another status than 200
            return await asyncio.to_thread(request)
        await asyncio.sleep(0.1)
    raise BackendError("the balancer has not reached a server for 10 s.")


# -- streams and faults ------------------------------------------------------------------------------------------------


async def _undisturbed(cluster: Cluster, recordings: Sequence[bytes]) -> list[Transcript]:
    """Return the transcript of each recording without faults. Raises `BackendError` if a stream fails."""
    found = []
    for number, audio in enumerate(recordings):
        found.append(await _transcribe(cluster.stream([cluster.servers[0].url]), audio, number, paced=False))
        if found[-1].error:
            raise BackendError(f"a stream without faults failed: {found[-1].error}")
    return found


async def _run(
    cluster: Cluster,
    recordings: Sequence[bytes],
    streams: int,
    seconds: float,
    faults: Sequence[str],
    seed: int,
    direct: bool,
    progress: Progress,
) -> tuple[list[Transcript], list[Injected], str]:
    """Run all streams while faults are injected. Return their transcripts, the faults, and the balancer's name."""
    rng, injected = random.Random(seed), list[Injected]()
    async with _balancer(cluster, direct, random.Random(seed)) as balancer:
        progress(f"{streams} streams for {seconds:.0f} s")
        begin = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            running = []
            for index in range(streams):
                first, number = index % len(balancer.urls), index % len(recordings)
                client = cluster.stream(balancer.urls[first:] + balancer.urls[:first])
                delay = rng.uniform(0, 1)
                running.append(
                    group.create_task(_transcribe(client, recordings[number], number, paced=True, delay=delay))
                )
            group.create_task(_inject(cluster, balancer, faults, begin, seconds, rng, injected, progress))
        return [task.result() for task in running], injected, balancer.name


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
                group.create_task(asyncio.to_thread(server.restart, kind == "kill"))


async def _freeze(server: Server, seconds: float) -> None:
    server.is_up = False
    server.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        server.send_signal(signal.SIGCONT)
    server.is_up = True


# -- report ------------------------------------------------------------------------------------------------------------


def rows_of(
    expected: Sequence[Transcript],
    transcripts: Sequence[Transcript],
    injected: Sequence[Injected],
    kinds: Sequence[str],
) -> list[Row]:
    """Return a row for each kind of fault, of the streams that reconnected after it, and one of all streams."""

    def cause(detected: float) -> str:
        return next((fault.kind for fault in reversed(injected) if fault.began <= detected), "none")

    rows = []
    found = [(each, [(cause(detected), gap) for detected, gap in each.gaps]) for each in transcripts]
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


_HEAD = ["fault", "times", "streams", "reconnections", "p50", "p99", "max", "equal", "events lost", "repeated", "lost"]


def show(result: Record) -> str:
    """Return the table of a result as Markdown."""
    lines = []
    for row in result["rows"]:
        values, gap = row["values"], row["figures"].get("gap")
        times = [tables.digits(gap[name] / 1000) if gap else "–" for name in ("p50", "p99", "max")]
        line = [row["case"]["fault"], *(values[name] for name in ("faults", "streams", "reconnects")), *times]
        # Of no stream, nothing can be equal or lost.
        found = [values[name] for name in ("equal", "lost_events", "repeated_events", "lost_streams")]
        lines.append([*line, *(found if values["streams"] else "–" * len(found))])
    method = result["method"]
    text = (
        f"{method['streams']} streams of {method['seconds']:.0f} s with {method['chunk_ms']} ms chunks, "
        f"{method['servers']} servers, balancer: {method['balancer']}, store: {method['store']}, "
        f"seed {method['seed']}; clients and servers on the same {method['threads']} cores. Gaps in seconds, from the "
        "moment at which a client detects a loss to its next new event. Of each fault: the streams that reconnected "
        "after it, and how many of them have exactly the events of a stream without interruption. "
        f"{tables.other_load([method['other_work_cores']])}"
    )
    return f"{text}\n\n{tables.markdown(_HEAD, lines)}\n"


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

    def measure() -> Record:
        return measure_survival(
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

    if not passed(run(measure, options)):
        records.report_progress("nemostream: events differ from those of streams without interruption.")
        sys.exit(1)


if __name__ == "__main__":
    main()
