"""The service of a transport, and the supervisor's measurement of load, without processes."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import BackendError, BundleError, CapacityError, OptionError
from nemostream.serving.client import Client
from nemostream.serving.errors import Draining
from nemostream.serving.load import LoadControl
from nemostream.serving.processes import supervisor
from nemostream.serving.processes.board import Board, Kind, Row
from nemostream.serving.processes.control import Start, digest_of, start_file
from nemostream.serving.processes.link import SharedAudio
from nemostream.serving.processes.supervisor import Supervisor, supervise
from nemostream.serving.processes.transport import SharedConnections, SharedUploadAdmission, TransportService
from nemostream.serving.settings import Settings, read_settings
from nemostream.serving.state.sealing import stored_name

ONE, TWO = Client("one", "192.0.2.1"), Client("two", "192.0.2.2")


@pytest.fixture
def file() -> Iterator[int]:
    file = Board.create(2, 20)
    yield file
    os.close(file)


def services(fakes: Any, file: int, **settings: Any) -> list[TransportService]:
    """Return the services of two transports with fake models, ready for streams."""
    found = []
    for index in range(2):
        service = TransportService(Settings(**settings), Row(Board(file, 2, 20), index))
        service.start()
        assert service._model is not None
        service._model = fakes.FakeModel()
        service.handle({"engine": "ready", "max_streams": service.settings.max_streams}, [])
        found.append(service)
    return found


def test_streams_are_admitted_when_the_engine_is_ready(fakes: Any, file: int) -> None:
    async def main() -> None:
        service = TransportService(Settings(max_streams=9), Row(Board(file, 2, 20), 0))
        with pytest.raises(Draining, match="still starting"):
            service.open("test")
        service.start()
        assert service.describe()["status"] == "starting" and service.describe()["model"] == "demo"
        with pytest.raises(Draining, match="still starting"):
            service.open("test")
        service.handle({"engine": "ready", "max_streams": 5}, [])
        assert (service.state, service.describe()["max_streams"]) == ("ready", 5)
        service._engine_ended()
        assert service.state == "starting"
        for state in ("failed", "ready"):
            service.handle({"engine": state, "max_streams": 5}, [])
            assert service.state == state
            service._engine_ended()  # may be noted after the supervisor's message about it
            assert service.state == ("failed" if state == "failed" else "starting")
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        service.handle({"engine": "ready", "max_streams": 5}, [])
        service._engine_ended()
        assert service.state == "draining"
        await draining
        assert Board(file, 2, 20).count(Kind.STREAM) == 0  # rejected streams leave no entry

    asyncio.run(main())


def test_a_stream_that_cannot_be_opened_leaves_no_entry(fakes: Any, file: int) -> None:
    async def main() -> None:
        one, two = services(fakes, file, max_streams=2)
        for error in (BackendError("no."), ZeroDivisionError()):
            one._model.open_error = error  # type: ignore[union-attr]
            with pytest.raises(type(error)):
                one.open("test")
            assert one.streams == two.streams == 0
        with pytest.raises(OptionError):
            two.open("test", chunk_ms=100)
        session = two.open("test")
        assert one.streams == 1
        session.close()
        session.close()
        assert one.streams == two.streams == 0 and two._row.board.sessions == 0

    asyncio.run(main())


def test_limits_count_the_streams_of_both_transports(fakes: Any, file: int) -> None:
    async def main() -> None:
        one, two = services(fakes, file, max_streams=3, max_streams_per_client=2)
        sessions = [one.open("test", client=ONE), two.open("test", client=ONE)]
        for service in (one, two):
            with pytest.raises(CapacityError, match="this client has 2 open streams"):
                service.open("test", client=ONE)
            assert service.streams == 2
        sessions.append(one.open("test", client=TWO))
        for service in (one, two):
            with pytest.raises(CapacityError, match="all 3 streams are in use"):
                service.open("test", client=TWO)
        sessions.append(two.open("test", client=TWO, upload=True))  # uploads are limited elsewhere
        assert two._row.board.sessions == 4 and one.streams == 3
        sessions[0].close()
        two.open("test", client=ONE)

    asyncio.run(main())


def test_limits_count_the_recordings_of_both_transports(file: int) -> None:
    settings = Settings(max_uploads=3, max_streams_per_client=2, max_upload_total_bytes=10_000, max_upload_bytes=6000)
    boards = [Board(file, 2, 20) for _ in range(2)]

    class Gauge:
        value = 0

        def inc(self) -> None:
            self.value += 1

        def dec(self) -> None:
            self.value -= 1

    rejected = SimpleNamespace(labels=lambda reason: SimpleNamespace(inc=lambda: None))
    metrics = [SimpleNamespace(uploads=Gauge(), rejected=rejected) for _ in range(2)]
    one, two = (
        SharedUploadAdmission(settings, own, Row(board, index))  # type: ignore[arg-type]
        for index, (board, own) in enumerate(zip(boards, metrics, strict=True))
    )
    with one.admit(4000, ONE):
        with two.admit(1024, ONE):
            assert one.count == two.count == 2 and one.size == two.size == 5024
            assert [own.uploads.value for own in metrics] == [1, 1]
            with pytest.raises(CapacityError, match="already sends 2 recordings"):
                one.admit(1, ONE)
            with pytest.raises(CapacityError, match="already have 0 MiB"):
                two.admit(None, TWO)
            with one.admit(2000, TWO), pytest.raises(CapacityError, match="all 3 slots"):
                two.admit(1, TWO)
        assert one.count == 1 and one.size == 4000 and one.count_of(ONE) == 1 and two.count_of(TWO) == 0
    assert one.count == 0 and [own.uploads.value for own in metrics] == [0, 0]


def test_limits_count_the_connections_of_both_transports(file: int) -> None:
    settings = Settings(max_connections=8, max_connections_per_client=5)

    class Protocol:
        def __init__(self, address: str) -> None:
            self.client, self.transport, self.phase = (address, 1), self, "body"
            self.since, self.aborted = 0.0, False

        def abort(self) -> None:
            self.aborted = True

    one, two = (SharedConnections(Row(Board(file, 2, 20), index), settings, 100, 5, 9.0) for index in range(2))
    opened = [Protocol("a") for _ in range(5)]
    assert all(limits.admit(protocol) for limits, protocol in zip([one, two, one, two, one], opened, strict=True))  # type: ignore[arg-type]
    assert not one.admit(Protocol("a")) and not two.admit(Protocol("a"))  # type: ignore[arg-type]
    others = [Protocol("b") for _ in range(3)]
    assert all(two.admit(protocol) for protocol in others)  # type: ignore[arg-type]
    assert not one.admit(Protocol("c")) and not two.reassign(others[0], "a")  # type: ignore[arg-type]
    opened[0].phase = "head"
    assert one.admit(Protocol("c")) and opened[0].aborted  # type: ignore[arg-type]  # an idle one made room
    one.closed(opened[2])
    one.closed(opened[2])
    board = Board(file, 2, 20)
    assert [board.count(Kind.CONNECTION, address) for address in (None, "a", "b", "c")] == [7, 3, 3, 1]
    assert two.reassign(others[0], "a")
    assert [board.count(Kind.CONNECTION, address) for address in (None, "a", "b", "c")] == [7, 4, 2, 1]


def test_the_load_of_the_server_applies_to_each_transport(fakes: Any, file: int) -> None:
    async def main() -> None:
        one, two = services(fakes, file, max_streams=4)
        session = one.open("test", chunk_ms=80)
        two.handle({"load": [False, True, 0, False]}, [])
        assert two.is_late and not two.overloaded and not one.is_late
        session.close()
        assert not two.is_late  # without live streams, recordings do not wait
        session = one.open("test", chunk_ms=80)
        for level, chunk_ms in ((1, 160), (2, 560), (0, 80)):
            one.handle({"load": [True, True, level, False]}, [])
            assert session._stream.chunk_ms == chunk_ms == one.effective_chunk_ms(80)
        with pytest.raises(CapacityError, match="overloaded"):
            one.open("test")

    asyncio.run(main())


def test_latencies_are_recorded_for_the_supervisor(fakes: Any, file: int) -> None:
    async def main() -> None:
        one, two = services(fakes, file)
        one.record_latency(80, 0.25, 0.5)
        two.record_latency(160, 0.5, 0.25)
        two.record_latency(160, 0.25, 0.25)
        two.record_latency(160, 0.08, 0.02)  # the budget of a message is at least a chunk
        for service in (one, two):
            service.update_metrics()
        board = Board(file, 2, 20)
        assert [board.latencies(index, 0) for index in range(2)] == [([0.5], 1), ([2.0, 1.0, 0.5], 3)]
        assert not one._latencies and not two._latencies  # the supervisor evaluates them
        found = two.metrics.registry.get_sample_value("nemostream_latency_seconds_sum", {"chunk_ms": "160"})
        assert found == pytest.approx(0.83)

    asyncio.run(main())


def test_a_state_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "share_metrics", lambda *names: None)
    sent: list[Any] = []

    async def main() -> None:
        here = Supervisor(Settings(transports=1, max_streams=7), {"http_port": 1}, lambda *state: None, False, "")
        here._transports = {0: SimpleNamespace(send=lambda **message: sent.append(message))}  # type: ignore[dict-item]
        here._set_state("failed")

    asyncio.run(main())
    assert sent == [{"engine": "failed", "max_streams": 7, "load": (False, False, 0, False)}]


def test_the_supervisor_measures_the_load_of_all_transports(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Each second: the 90th percentile of the latencies of both, and step time per audio."""
    monkeypatch.setattr(supervisor, "share_metrics", lambda *names: None)
    sent: list[Any] = []

    async def main() -> None:
        settings = Settings(transports=2, degrade=True)
        here = Supervisor(settings, {"http_port": 1}, lambda *state: None, False, str(tmp_path))
        here._transports = {0: SimpleNamespace(send=lambda **message: sent.append(message))}  # type: ignore[dict-item]
        rows = [Row(here._board, index) for index in range(2)]
        seconds, expected = 0, LoadControl()
        wait = asyncio.Event()

        async def sleep(duration: float) -> None:
            nonlocal seconds
            assert duration == 1
            if seconds:
                assert here._load.history == expected.history and here._load.level == expected.level
            if seconds == 7:
                await wait.wait()
            seconds += 1
            # Nine of ten latencies are low in the first transport, all are high in the second one.
            slow = seconds <= 3 or seconds == 5
            for _ in range(9):
                rows[0].add_latency(0.125)
            rows[0].add_latency(0.25)
            for _ in range(5 if slow else 0):
                rows[1].add_latency(1.5)
            expected.update(1.5 if slow else 0.25, 3, False)
            rows[1].audio[0] += 2.0
            here._board.add_step(0.5)

        monkeypatch.setattr(supervisor.asyncio, "sleep", sleep)
        monitoring = asyncio.get_running_loop().create_task(here._monitor())
        while seconds < 7:
            await asyncio.wait([monitoring], timeout=0.001)
        monitoring.cancel()
        assert here._metrics.registry.get_sample_value("nemostream_real_time_factor") == 0.25
        assert here._metrics.registry.get_sample_value("nemostream_degradation_level") == 1

    asyncio.run(main())
    assert [message["load"] for message in sent] == [
        (False, True, 0, False),
        (False, False, 1, False),  # after three seconds; the history begins anew
        (False, True, 1, False),
        (False, False, 1, False),
    ]


def test_the_supervisor_disables_accurate_lanes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """If a transport has an open one; they are enabled again when results are early and chunks as requested."""
    monkeypatch.setattr(supervisor, "share_metrics", lambda *names: None)
    here = Supervisor(Settings(transports=2, degrade=True), {"http_port": 1}, lambda *state: None, False, str(tmp_path))
    row = Row(here._board, 1)
    states = [(0, False)]
    row.set_open_lanes(1)
    for latency in [2.0] * 3 + [0.1] * 10 + [2.0] * 3:
        here.update_load(latency)
        if here._load_message()[2:] != states[-1]:
            states.append(here._load_message()[2:])
            row.set_open_lanes(0)  # also after they are enabled again: no stream has one any more
    assert states == [(0, False), (0, True), (0, False), (1, False)]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["accurate lanes disabled", "accurate lanes enabled", "chunk sizes changed"]


@pytest.mark.parametrize("final_chunk_ms", [None, 1120])
def test_a_link_has_a_region_for_every_lane_and_its_completion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, final_chunk_ms: int | None
) -> None:
    monkeypatch.setattr(supervisor, "share_metrics", lambda *names: None)
    settings = Settings(transports=1, max_streams=500, max_uploads=8, final_chunk_ms=final_chunk_ms)
    manifest = Bundle.open(nemostream.demo_bundle()).manifest
    regions: list[int] = []

    class Process:
        def send(self, files: tuple[int, ...], **message: Any) -> None:
            regions.append(len(SharedAudio(files[1], manifest).regions))

    async def main() -> None:
        here = Supervisor(settings, {"http_port": 1}, lambda *state: None, False, str(tmp_path))
        here._engine = transport = Process()  # type: ignore[assignment]
        here._link(transport)  # type: ignore[arg-type]

    asyncio.run(main())
    # As many lanes as the admission allows: 500, or 242 of 242 streams (and 16 reserved slots).
    lanes = 500 if final_chunk_ms else 242
    assert regions[0] == regions[1] >= 3 * lanes + 8


# -- accurate lanes ----------------------------------------------------------------------------------------------------


def lanes_of(*services: TransportService) -> list[int | None]:
    return [session.final_chunk_ms for service in services for session in service.sessions]


def test_slots_count_the_lanes_of_both_transports(fakes: Any, file: int) -> None:
    async def main() -> None:
        one, two = services(fakes, file, max_streams=6, chunk_ms=80)
        first, second = one.open("test", final_chunk_ms=560), two.open("test", final_chunk_ms=1120)
        assert one.accurate_streams == two.accurate_streams == 2  # with a reserved slot, 5 of 6
        for service in (one, two):
            with pytest.raises(CapacityError, match="all 6 slots are in use or reserved"):
                service.open("test", final_chunk_ms=560)
        assert one.streams == one.accurate_streams == 2  # rejected streams leave no entry
        third = two.open("test")
        for service in (one, two):
            with pytest.raises(CapacityError, match="all 6 slots"):
                service.open("test")
        with pytest.raises(CapacityError, match="all 6 slots"):
            two.configure(third, final_chunk_ms=560)
        assert third.requested_final_ms is None and one.accurate_streams == 2
        one.configure(first, final_chunk_ms=0)
        assert two.accurate_streams == 1
        for _ in range(2):  # a lane that is already there takes no further slot
            two.configure(third, final_chunk_ms=560)
            assert one.accurate_streams == 2
        two._model.open_error = BackendError("no.")  # type: ignore[union-attr]
        second.close()
        with pytest.raises(BackendError):
            two.open("test", final_chunk_ms=560)
        assert one.streams == 2 and one.accurate_streams == 1
        for session in (first, third, third):
            session.close()
        assert one.streams == one.accurate_streams == 0

    asyncio.run(main())


def test_a_lane_that_cannot_be_configured_takes_no_slot(fakes: Any, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        one, two = services(fakes, file, max_streams=6, chunk_ms=80)
        session = one.open("test")
        with pytest.raises(OptionError):
            one.configure(session, final_chunk_ms=560, language="xx")
        assert two.accurate_streams == 0

        def fail(chunk_ms: int) -> None:
            raise BackendError("the stream has failed.")

        monkeypatch.setattr(session, "set_chunk_ms", fail)
        with pytest.raises(BackendError):
            one.configure(session, final_chunk_ms=560, chunk_ms=160)
        assert two.accurate_streams == 0 and session.requested_final_ms is None
        closed = one.open("test")
        closed.close()
        one.configure(closed, final_chunk_ms=560)
        assert two.accurate_streams == 0

    asyncio.run(main())


def test_lanes_are_disabled_at_each_transport(fakes: Any, file: int) -> None:
    async def main() -> None:
        one, two = services(fakes, file, max_streams=9, chunk_ms=80)
        one.open("test", final_chunk_ms=1120)
        one.open("test")
        one.update_lanes()
        assert two._row.board.open_lanes == 1
        one.handle({"load": [False, False, 0, True]}, [])
        assert lanes_of(one) == [None, None] and fakes.metric(one, "lanes_shed_total") == 1
        assert two._row.board.open_lanes == 0 and two.accurate_streams == 1  # it keeps its slots
        late = one.open("test", final_chunk_ms=560)
        assert late.final_chunk_ms is None and fakes.metric(one, "lanes_shed_total") == 2
        one.handle({"load": [False, False, 0, False]}, [])
        assert sorted(lanes_of(one), key=str) == [1120, 560, None] and two._row.board.open_lanes == 2
        one.handle({"load": [False, False, 1, False]}, [])
        assert lanes_of(one) == [None] * 3
        one.handle({"load": [False, False, 0, False]}, [])
        assert late.final_chunk_ms == 560

    asyncio.run(main())


def test_a_lane_that_failed_is_opened_again(fakes: Any, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next second's update."""

    async def main() -> None:
        one, _ = services(fakes, file, max_streams=9, chunk_ms=80)
        session = one.open("test", final_chunk_ms=560)
        session._stream.final_chunk_ms = None  # type: ignore[misc]
        delays: list[float] = []

        async def sleep(seconds: float) -> None:
            delays.append(seconds)
            if sum(delays) > 1.05:
                raise asyncio.CancelledError
            assert session.final_chunk_ms is None

        monkeypatch.setattr(asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await one.monitor()
        assert session.final_chunk_ms == 560 and one._row.board.open_lanes == 1

    asyncio.run(main())


def test_a_transport_deletes_expired_states(
    fakes: Any, file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, expired, current = tmp_path / "states", "a" * 32, "b" * 32

    async def main() -> None:
        one, _ = services(fakes, file, state_store=str(store), state_retention=100)
        assert one.states is not None
        one.states.put(expired, 1, b"old")
        one.states.put(current, 1, b"new")
        (folder,) = [path for path in store.iterdir() if path.name == stored_name(expired)]
        os.utime(folder, (0, 0))
        seconds = 0.0

        async def sleep(duration: float) -> None:
            nonlocal seconds
            seconds += duration
            if seconds > 16:
                raise asyncio.CancelledError

        monkeypatch.setattr(asyncio, "sleep", sleep)
        with pytest.raises(asyncio.CancelledError):
            await one.monitor()
        assert not folder.exists() and one.states.claim(current) == (2, b"new")

    asyncio.run(main())


def test_finals_of_the_small_chunks_are_counted(fakes: Any, file: int) -> None:
    async def main() -> None:
        one, _ = services(fakes, file)
        before = fakes.metric(one, "final_fallbacks_total")
        one._scheduler.on_fallback(BackendError("the step failed."))  # type: ignore[union-attr, misc]
        assert fakes.metric(one, "final_fallbacks_total") - before == 1

    asyncio.run(main())


def supervisor_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, delays: list[float], count: int) -> Supervisor:
    """Return one whose server was announced. It waits for no delay, and stops after `count` of them."""
    monkeypatch.setattr(supervisor, "share_metrics", lambda *names: None)
    monkeypatch.setattr(supervisor, "remove_gauges", lambda name: None)
    here = Supervisor(Settings(transports=1), {"http_port": 1}, lambda *state: None, False, str(tmp_path))
    here._announced = True

    async def wait_for(awaitable: Any, delay: float) -> None:
        awaitable.close()
        delays.append(delay)
        if len(delays) == count:
            here._stopping.set()
        raise TimeoutError

    monkeypatch.setattr(supervisor.asyncio, "wait_for", wait_for)
    return here


class Child:
    """A process that ends at once."""

    def __init__(self) -> None:
        self.name, self.ready, self.error = "transport-0", True, None
        self.killed = 0

    def send(self, *files: Any, **message: Any) -> None: ...

    def kill(self) -> None:
        self.killed += 1


def test_a_process_that_always_ends_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Any number of times; the delay doubles up to a maximum, and starts anew after a minute without an end."""
    delays: list[float] = []
    now = [0.0]

    async def main() -> None:
        here = supervisor_of(monkeypatch, tmp_path, delays, 1100)
        monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])

        async def start(kind: str, *arguments: Any) -> Any:
            here._transports[0] = Child()  # type: ignore[assignment]
            return here._transports[0]

        async def watch(child: Any) -> int:
            now[0] += 61 if len(delays) == 1090 else 1
            return 1

        monkeypatch.setattr(here, "_start", start)
        monkeypatch.setattr(here, "_watch", watch)
        await here._keep_running("transport", 0)

    asyncio.run(main())
    assert delays[:11] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
    assert set(delays[11:1090]) == {30.0} and delays[1090:1093] == [0.1, 0.2, 0.4]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("kind", ["transport", "engine"])
@pytest.mark.parametrize("function", ["socketpair", "start_file", "create_subprocess_exec", "create", "socket_pair"])
def test_a_process_that_cannot_be_started_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, function: str, kind: str, announced: bool
) -> None:
    """Without free descriptors or memory. Later, there may be some: the server continues, and nothing is leaked."""
    delays: list[float] = []
    killed: list[int] = []  # signals
    places = {"socketpair": supervisor.socket, "create_subprocess_exec": asyncio, "create": SharedAudio}
    place: Any = places.get(function, supervisor)
    original, calls = getattr(place, function), [0]

    class Process:
        def kill(self) -> None:
            killed.append(9)

        async def wait(self) -> int:
            return -9

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] <= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return original(*arguments, **options)

    async def create_subprocess_exec(*arguments: Any, **options: Any) -> Any:
        return Process()

    async def main() -> None:
        nonlocal original
        here = supervisor_of(monkeypatch, tmp_path, delays, 3)
        here._announced = announced
        if kind == "transport":
            here._engine = Child()  # type: ignore[assignment]
        else:
            here._transports[0] = Child()  # type: ignore[assignment]
        monkeypatch.setattr(supervisor.asyncio, "create_subprocess_exec", create_subprocess_exec)
        original = create_subprocess_exec if function == "create_subprocess_exec" else original
        monkeypatch.setattr(place, function, failing)
        before = len(os.listdir("/proc/self/fd"))
        if announced:
            await here._keep_running(kind, 0)
            assert delays == [0.1, 0.2, 0.4] and calls[0] >= 3
        else:
            with pytest.raises(BackendError, match=r"the process \S+ cannot be .*: \[Errno 24\] Too many open files\."):
                await here._keep_running(kind, 0)
            assert calls[0] == 1 and not delays
        assert len(os.listdir("/proc/self/fd")) == before
        expected = (2 if announced else 1) if function in ("create", "socket_pair") else 0
        assert len(killed) == expected  # processes that were started, but not connected

    asyncio.run(main())


def test_transports_need_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OptionError, match="transports needs Linux"):
        asyncio.run(supervise(Settings(transports=1), lambda *state: None))


def test_reasons_of_ends() -> None:
    assert [supervisor._reason(code) for code in (0, 3, -9, -200)] == [
        "exit status 0",
        "exit status 3",
        "signal SIGKILL",
        "signal 200",
    ]


def test_a_bundle_that_was_replaced_is_not_used(file: int) -> None:
    """A process that starts again reads the bundle again; the others have read the one before."""
    manifest = Bundle.open(nemostream.demo_bundle()).manifest
    other = dataclasses.replace(manifest, name="other")
    start = Start({}, "engine", False, "", 1, 1, digest_of(manifest))
    start.check(manifest)
    with pytest.raises(BundleError, match="the bundle has changed since the server was started"):
        start.check(other)

    async def main() -> None:
        service = TransportService(Settings(), Row(Board(file, 2, 20), 0), Start({}, "", False, "", 1, 1, "x").check)
        with pytest.raises(BundleError, match="start the server again"):
            service.start()

    asyncio.run(main())


def test_settings_are_the_same_in_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """They come from the supervisor: not from the environment, and not from files that may have changed."""
    keys = tmp_path / "keys"
    keys.write_text("secret")
    settings = read_settings(["--api-keys-file", str(keys), "--max-streams", "7", "--hosts", "a,b"])
    keys.unlink()
    monkeypatch.setenv("NEMOSTREAM_MAX_STREAMS", "9")
    file = start_file(Start(settings.__dict__, "engine", True, "folder", 2, 3, "digest", 1))
    with open(file, "rb") as content:
        content.seek(0)
        start = pickle.load(content)
    found = start.restore_settings()
    assert dict(found) == dict(settings) and found.max_streams == 7 and found.public is False
    assert [key.get_secret_value() for key in found.api_keys] == ["secret"]
    assert (start.name, start.text, start.transports, start.entries, start.transport) == ("engine", True, 2, 3, 1)
