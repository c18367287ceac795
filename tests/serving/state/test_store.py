"""State stores: one contract, several processes, and failures of disks, processes and Redis."""

from __future__ import annotations

import builtins
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemostream.errors import BackendError, OptionError
from nemostream.serving.errors import StateError, StateNotFound, StateStoreError, StateSuperseded
from nemostream.serving.state import redis_store, store
from nemostream.serving.state.redis_store import RedisStore
from nemostream.serving.state.sealing import Sealer, stored_name
from nemostream.serving.state.store import DirectoryStore, MemoryStore, SealedStore, StateStore, open_store

KEY = bytes(range(32))
FOREVER = 3600.0  # seconds
Fork = Callable[..., int]


def new_token() -> str:
    return uuid.uuid4().hex


class Place:
    """A place where states are stored, for any number of stores that share it."""

    def __init__(self, kind: str, folder: Path, url: str) -> None:
        self.kind, self._folder, self._url = kind, folder, url
        self._memory: dict[float, StateStore | None] = {}

    @property
    def spec(self) -> str:
        return {"memory": "memory", "folder": f"{self._folder}/states", "redis": self._url}[self.kind.partition("+")[0]]

    @property
    def key(self) -> bytes | None:
        return KEY if self.kind.endswith("+key") else None

    def open(self, retention_seconds: float = FOREVER) -> StateStore:
        if self.kind != "memory":
            found = open_store(self.spec, retention_seconds, self.key)
        else:
            found = self._memory.setdefault(retention_seconds, open_store("memory", retention_seconds))
        assert found is not None
        return found


KINDS = ["memory", "folder", "folder+key", "redis", "redis+key"]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param.endswith("+key"):
        pytest.importorskip("cryptography", reason="needs the state extra")
    url = request.getfixturevalue("redis_server").url if request.param.startswith("redis") else ""
    return Place(request.param, tmp_path, url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "states"


def files(folder: Path) -> list[str]:
    """Return the names of the files of all streams in a folder."""
    return sorted(path.name for path in folder.glob("*/*"))


# -- contract ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"state", bytes(range(256)) * 8192])
def test_the_newest_state_is_returned(place: Place, data: bytes) -> None:
    token = new_token()
    place.open().put(token, 1, b"older")
    place.open().put(token, 1, data)
    epoch, found = place.open().claim(token)
    assert (epoch, found) == (2, data) and type(found) is bytes


def test_streams_are_independent(place: Place) -> None:
    here, first, second = place.open(), new_token(), new_token()
    here.put(first, 1, b"first")
    here.put(second, 1, b"second")
    assert here.claim(first) == (2, b"first")
    here.put(second, 1, b"second again")
    here.delete(first)
    assert here.claim(second) == (2, b"second again")


def test_an_older_epoch_is_superseded(place: Place) -> None:
    token, old, new = new_token(), place.open(), place.open()
    old.put(token, 1, b"old")
    assert new.claim(token) == (2, b"old")
    with pytest.raises(StateSuperseded, match=r"resumed over another connection"):
        old.put(token, 1, b"frozen")
    new.put(token, 2, b"new")
    with pytest.raises(StateSuperseded):
        old.put(token, 1, b"frozen")
    new.put(token, 2, b"newer")
    assert new.claim(token) == (3, b"newer")


def test_a_claim_without_a_state_does_not_hide_the_older_state(place: Place) -> None:
    """Processes that claimed an epoch die before they store a state."""
    token, here = new_token(), place.open()
    here.put(token, 1, b"old")
    assert [here.claim(token) for _ in range(3)] == [(2, b"old"), (3, b"old"), (4, b"old")]
    for epoch in (1, 2, 3):
        with pytest.raises(StateSuperseded):
            here.put(token, epoch, b"frozen")
    here.put(token, 4, b"new")
    assert here.claim(token) == (5, b"new")


def test_a_stream_without_a_state_is_not_found(place: Place) -> None:
    for token in (new_token(), "../" + new_token(), "short", "", "a" * 65, new_token() + "/1.state", "é" * 30):
        with pytest.raises(StateNotFound, match="open a new stream"):
            place.open().claim(token)
    for token in ("../" + new_token(), "short"):
        with pytest.raises(StateNotFound):
            place.open().put(token, 1, b"data")
        with pytest.raises(StateNotFound):
            place.open().delete(token)
    place.open().delete(new_token())


def test_a_deleted_stream_is_not_found_and_not_stored_again(place: Place) -> None:
    token, here = new_token(), place.open()
    here.put(token, 1, b"old")
    here.claim(token)
    here.put(token, 2, b"new")
    for _ in range(2):
        here.delete(token)
        with pytest.raises(StateNotFound):
            here.claim(token)
        for epoch in (1, 2):
            with pytest.raises(StateSuperseded, match="or has ended"):
                here.put(token, epoch, b"frozen")
    with pytest.raises(StateNotFound):
        here.claim(token)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["put", "put", "claim", "delete"]), st.integers(0, 3)),
    max_size=30,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_any_sequence_of_operations_agrees_with_a_model(place: Place, operations: list[tuple[str, str, int]]) -> None:
    """The model is a table of the newest epoch and state; a deleted stream accepts no epoch that was ever claimed."""
    here, tokens = place.open(), {name: new_token() for name in "ab"}
    epochs, states, ended = dict.fromkeys("ab", 1), dict.fromkeys("ab", b""), set()
    for step, (name, operation, back) in enumerate(operations):
        token, known = tokens[name], bool(states[name]) and name not in ended
        if operation == "put":
            epoch, data = max(1, epochs[name] - back), str(step).encode()
            if name in ended or epoch < epochs[name]:
                with pytest.raises(StateSuperseded):
                    here.put(token, epoch, data)
            else:
                here.put(token, epoch, data)
                states[name] = data
        elif operation == "delete":
            here.delete(token)
            ended |= {name} if known else set()
        elif known:
            epochs[name] += 1
            assert here.claim(token) == (epochs[name], states[name])
        else:
            with pytest.raises(StateNotFound):
                here.claim(token)


def test_a_state_expires(place: Place) -> None:
    """The clocks that decide are those of this process, the file system and Redis, so the test waits."""
    token, brief = new_token(), place.open(0.02)
    brief.put(token, 1, b"old")
    time.sleep(0.1)
    with pytest.raises(StateNotFound):
        brief.claim(token)
    brief.put(token, 1, b"again")  # of the process that still has the stream, after an interruption
    time.sleep(0.1)
    assert brief.sweep() == (0 if place.kind.startswith("redis") else 1)
    assert brief.sweep() == 0
    with pytest.raises(StateNotFound):
        brief.claim(token)


def test_a_state_that_has_not_expired_is_kept(place: Place) -> None:
    token, here = new_token(), place.open()
    here.put(token, 1, b"data")
    assert here.sweep() == 0
    assert here.claim(token) == (2, b"data")
    assert here.sweep() == 0
    assert here.claim(token) == (3, b"data")


def test_threads_obtain_different_epochs(place: Place) -> None:
    token, here, found = new_token(), place.open(), []
    here.put(token, 1, b"data")

    def claim() -> None:
        for _ in range(10):
            found.append(here.claim(token))

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(epoch, b"data") for epoch in range(2, 42)]


def test_stores_are_closed(place: Place) -> None:
    here, token = place.open(), new_token()
    here.put(token, 1, b"data")
    here.close()
    if place.kind == "memory":
        with pytest.raises(StateNotFound):
            here.claim(token)
    else:
        assert place.open().claim(token) == (2, b"data")


# -- choosing a store --------------------------------------------------------------------------------------------------


def test_specs(tmp_path: Path) -> None:
    assert open_store("none", 1) is None
    assert type(open_store("memory", 1)) is MemoryStore
    assert type(open_store(f"{tmp_path}/new/states", 1)) is SealedStore
    assert (tmp_path / "new" / "states").is_dir()
    with pytest.raises(OptionError, match="the key of the state store has 3 bytes"):
        open_store(f"{tmp_path}/new/states", 1, b"key")


@pytest.mark.parametrize("spec", ["", "Memory", "redis", "states", "http://user:secret@host/path", "redis:host"])
def test_other_specs_are_rejected(spec: str) -> None:
    with pytest.raises(OptionError, match=r"it must be memory, none, redis://HOST, .+ such as \./states\.") as caught:
        open_store(spec, 1)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("place", KINDS[1:], indirect=True)
def test_a_state_of_the_largest_size_is_stored(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    token, here = new_token(), place.open()
    here.put(token, 1, b"")
    overhead = len(Sealer(place.key).seal(token, b""))
    for module in (store, redis_store):
        monkeypatch.setattr(module, "MAX_STATE_BYTES", 1000)
    here.put(token, 1, bytes(1000 - overhead))
    with pytest.raises(StateStoreError, match=r"the state has 1001 bytes; at most 1000 can be stored\."):
        here.put(token, 1, bytes(1001 - overhead))
    assert here.claim(token) == (2, bytes(1000 - overhead))
    for module in (store, redis_store):
        monkeypatch.setattr(module, "MAX_STATE_BYTES", 999)
    with pytest.raises(StateError, match=r"cannot be used: it has 1000 bytes") as caught:
        here.claim(token)
    assert type(caught.value) is StateError


@pytest.mark.parametrize("place", ["folder+key", "redis+key"], indirect=True)
def test_servers_with_other_keys_do_not_harm_a_stream(place: Place) -> None:
    token, here = new_token(), place.open()
    here.put(token, 1, b"data")
    for key, message in ((bytes(32), "another key"), (None, "is encrypted, and this server has no key")):
        other = open_store(place.spec, FOREVER, key)
        assert other is not None
        with pytest.raises(StateError, match=message):
            other.claim(token)
    assert here.claim(token) == (4, b"data")


def test_a_state_cannot_be_moved_to_another_stream(folder: Path) -> None:
    here = open_store(str(folder), FOREVER)
    assert here is not None
    first, second = new_token(), new_token()
    here.put(first, 1, b"first")
    (folder / stored_name(first)).rename(folder / stored_name(second))
    with pytest.raises(StateError, match="belongs to another stream"):
        here.claim(second)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_oldest_states_are_evicted() -> None:
    here, (a, b, c, d) = MemoryStore(FOREVER, max_bytes=100), (new_token() for _ in range(4))
    here.put(a, 1, bytes(40))
    here.put(b, 1, bytes(40))
    here.put(c, 1, bytes(20))
    assert here.claim(a) == (2, bytes(40))  # b is now the oldest
    here.put(d, 1, bytes(10))
    with pytest.raises(StateNotFound):
        here.claim(b)
    assert [here.claim(token)[1] for token in (a, c, d)] == [bytes(40), bytes(20), bytes(10)]
    here.put(b, 1, bytes(30))  # its process still has the stream
    assert here.claim(b) == (2, bytes(30))
    here.put(c, 2, bytes(100))
    assert here.claim(c) == (3, bytes(100))
    for token in (a, b, d):
        with pytest.raises(StateNotFound):
            here.claim(token)
    with pytest.raises(StateSuperseded):  # the epoch of a state that was evicted is not forgotten
        here.put(a, 1, b"")


def test_a_state_that_exceeds_the_memory_leaves_the_older_one() -> None:
    here, token = MemoryStore(FOREVER, max_bytes=100), new_token()
    here.put(token, 1, bytes(100))
    message = r"the state has 101 bytes; all states in memory together have at most 100\."
    with pytest.raises(StateStoreError, match=message):
        here.put(token, 1, bytes(101))
    assert here.claim(token) == (2, bytes(100))


def test_deleted_and_replaced_states_free_memory() -> None:
    here, (a, b, c) = MemoryStore(FOREVER, max_bytes=100), (new_token() for _ in range(3))
    here.put(a, 1, bytes(60))
    here.put(a, 1, bytes(10))
    here.put(b, 1, bytes(90))
    here.delete(b)
    here.put(c, 1, bytes(90))
    assert here.claim(a) == (2, bytes(10)) and here.claim(c) == (2, bytes(90))


def test_expired_states_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(store.time, "monotonic", lambda: now)
    here, (a, b, c) = MemoryStore(10, max_bytes=100), (new_token() for _ in range(3))
    here.put(a, 1, bytes(50))
    now = 1006.0
    here.put(b, 1, bytes(50))
    now = 1010.0
    assert here.sweep() == 0
    now = 1010.5
    here.put(c, 1, bytes(50))  # needs no eviction of b
    assert here.claim(b) == (2, bytes(50))
    with pytest.raises(StateNotFound):
        here.claim(a)
    here.delete(b)
    now = 1021.0
    assert here.sweep() == 1  # c; what is kept of b is no state
    here.put(b, 1, bytes(1))


# -- processes ---------------------------------------------------------------------------------------------------------

CLAIMER = """
import sys
from nemostream.serving.state.store import open_store
store = open_store(sys.argv[1], 3600, None)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    epoch, data = store.claim(sys.argv[2])
    print(epoch, data.decode())
"""


@pytest.mark.parametrize("place", ["folder", "redis"], indirect=True)
def test_processes_that_claim_at_the_same_time_obtain_different_epochs(place: Place) -> None:
    token = new_token()
    place.open().put(token, 1, b"data")
    command = [sys.executable, "-c", CLAIMER, place.spec, token]
    claimers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]
    for claimer in claimers:
        assert claimer.stdout is not None and claimer.stdout.readline() == "ready\n"
    for claimer in claimers:
        assert claimer.stdin is not None
        claimer.stdin.write("\n")
    lines = [claimer.communicate()[0].splitlines() for claimer in claimers]
    epochs = [[int(line.removesuffix(" data")) for line in found] for found in lines]
    assert all(found == sorted(found) and len(found) == 40 for found in epochs)
    assert sorted(epochs[0] + epochs[1]) == list(range(2, 82))


WRITER = """
import sys
from nemostream.serving.errors import StateSuperseded
from nemostream.serving.state.store import open_store
store = open_store(sys.argv[1], 3600, None)
count = 0
while True:
    count += 1
    try:
        store.put(sys.argv[2], 1, b"%d" % count * 1000)
    except StateSuperseded:
        break
    print(count, flush=True)
print("superseded")
"""


@pytest.mark.parametrize("place", ["folder", "redis"], indirect=True)
def test_a_writer_that_was_stopped_is_superseded(place: Place) -> None:
    """It is stopped at an arbitrary point; the tests below cover every point."""
    token, here = new_token(), place.open()
    command = [sys.executable, "-c", WRITER, place.spec, token]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        stored = [writer.stdout.readline() for _ in range(20)]
        os.kill(writer.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, writer.pid, os.WSTOPPED | os.WNOWAIT)
        epoch, data = here.claim(token)
        here.put(token, epoch, b"new")
        os.kill(writer.pid, signal.SIGCONT)
        *rest, last = writer.stdout.read().splitlines()
    assert epoch == 2 and last == "superseded" and writer.returncode == 0
    # The state that was claimed is the last one that the writer knows to be stored, or the one after it.
    count = int((stored + rest)[-1])
    assert data in (b"%d" % count * 1000, b"%d" % (count + 1) * 1000)
    assert here.claim(token) == (3, b"new")


# -- interruptions of the folder's operations at every point -----------------------------------------------------------

CALLS = ("open", "mkdir", "fsync", "replace", "unlink", "rmdir", "utime", "fstat", "scandir", "listdir", "close")


@contextmanager
def interrupted(point: int, action: Callable[..., object], *arguments: Any) -> Iterator[list[str]]:
    """Call `action` before call number `point` of the functions of `os` that the store uses. Yields their names."""
    calls: list[str] = []
    patches = pytest.MonkeyPatch()

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*own: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == point + 1:
                patches.undo()
                action(*arguments)
                wrap_all()
            return real(*own, **options)

        patches.setattr(os, name, wrapped)

    def wrap_all() -> None:
        for name in CALLS:
            wrap(name)

    wrap_all()
    try:
        yield calls
    finally:
        patches.undo()


def with_two_epochs(here: StateStore) -> str:
    """Return the token of a stream that was resumed once, with the epoch 2."""
    token = new_token()
    here.put(token, 1, b"older")
    here.claim(token)
    here.put(token, 2, b"old")
    return token


def points(
    here: StateStore, operation: Callable[[str], object], prepare: Callable[..., str] = with_two_epochs
) -> range:
    """Return the points at which an operation can be interrupted."""
    token = prepare(here)
    with interrupted(-1, print) as calls:
        operation(token)
    assert len(calls) >= 5
    return range(len(calls))


def outcome(operation: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of an operation, or the class of its error."""
    try:
        return operation(*arguments)
    except StateError as error:
        return type(error)


@pytest.fixture
def here(folder: Path) -> StateStore:
    return SealedStore(DirectoryStore(folder, FOREVER), None)


@pytest.mark.parametrize("stores", [True, False])
def test_a_put_interrupted_by_a_resume(here: StateStore, stores: bool) -> None:
    """As if its process was frozen at this point. If `put` succeeds, the resume has obtained its state."""

    def resume(token: str, claimed: list[Any]) -> None:
        claimed.append(here.claim(token))
        if stores:
            here.put(token, 3, b"resumed")

    outcomes = set()
    for point in points(here, lambda token: here.put(token, 2, b"new")):
        token, claimed = with_two_epochs(here), []
        with interrupted(point, resume, token, claimed):
            result = outcome(here.put, token, 2, b"new")
        ((epoch, data),) = claimed
        assert epoch == 3 and data in (b"old", b"new") and result in (None, StateSuperseded), point
        if result is None:
            assert data == b"new", point
        outcomes.add((result, data))
        assert outcome(here.put, token, 2, b"frozen") is StateSuperseded
        if stores:
            assert here.claim(token) == (4, b"resumed"), point
        else:  # the process that resumed dies; the state is the newest one of the older epochs
            assert here.claim(token) in ((4, b"old"), (4, b"new")), point
        here.put(token, 4, b"after")
        assert here.claim(token) == (5, b"after")
    assert outcomes == {(StateSuperseded, b"old"), (StateSuperseded, b"new"), (None, b"new")}


@pytest.mark.parametrize("states", [0, 1, 2])
def test_a_resume_interrupted_by_another_one(here: StateStore, states: int) -> None:
    """Both obtain a state; only the one with the newer epoch can store one, and no stored state is lost."""

    def resume(token: str, other: list[Any]) -> None:
        other.append(here.claim(token)[0])
        for index in range(states):
            other.append(outcome(here.put, token, other[0], b"state %d" % index))

    for point in points(here, here.claim):
        token, other = with_two_epochs(here), []
        with interrupted(point, resume, token, other):
            epoch, data = here.claim(token)
        theirs, *stored = other
        # (The interrupted resume takes another epoch if its state was deleted before it was read.)
        assert {epoch, theirs} in ({3, 4}, {4, 5}), point
        if epoch > theirs and None in stored:
            assert data == b"state %d" % (states - 1), point
        else:
            assert data == b"old", point
        assert outcome(here.put, token, min(epoch, theirs), b"lost") is StateSuperseded
        here.put(token, max(epoch, theirs), b"kept")
        assert here.claim(token)[1] == b"kept"


def test_a_resume_interrupted_by_the_writer(here: StateStore) -> None:
    """If the last `put` of the old process succeeded, its state is the one that the resume obtains."""

    def write(token: str, results: list[Any]) -> None:
        results.append(outcome(here.put, token, 2, b"new"))

    outcomes = set()
    for point in points(here, here.claim):
        token, results = with_two_epochs(here), []
        with interrupted(point, write, token, results):
            epoch, data = here.claim(token)
        (result,) = results
        assert epoch == 3 and result in (None, StateSuperseded)
        assert data == b"new" or result is StateSuperseded, point
        outcomes.add((result, data))
    assert outcomes >= {(None, b"new"), (StateSuperseded, b"old")}


def test_a_delete_interrupted_by_the_writer_and_the_reverse(here: StateStore) -> None:
    """The stream is deleted in each case."""

    def put(token: str) -> None:
        assert outcome(here.put, token, 2, b"new") in (None, StateSuperseded)

    for first, second in ((put, here.delete), (here.delete, put)):
        for point in points(here, first):
            token = with_two_epochs(here)
            with interrupted(point, second, token):
                first(token)
            assert outcome(here.claim, token) is StateNotFound, point
            assert outcome(here.put, token, 2, b"frozen") is StateSuperseded, point


@pytest.mark.parametrize("operation", ["put", "claim", "delete"])
def test_an_operation_interrupted_by_the_deletion_of_all_files(here: StateStore, folder: Path, operation: str) -> None:
    """As when the state has expired and is swept. A process that still has the stream can store its state again."""
    runs: dict[str, Callable[[str], object]]
    runs = {"put": lambda token: here.put(token, 2, b"new"), "claim": here.claim, "delete": here.delete}
    allowed = {"put": [None, StateStoreError], "claim": [(3, b"old"), StateNotFound], "delete": [None]}
    for point in points(here, runs[operation]):
        token = with_two_epochs(here)
        with interrupted(point, shutil.rmtree, folder / stored_name(token)):
            result = outcome(runs[operation], token)
        assert result in allowed[operation], point
        if operation == "delete":
            assert outcome(here.claim, token) is StateNotFound, point
        else:
            here.put(token, 3, b"again")
            assert here.claim(token) == (4, b"again"), point


def test_a_sweep_interrupted_by_the_writer(here: StateStore, folder: Path) -> None:
    """A process that continues after the retention loses at most the state that it stores at this moment."""

    def expired(here: StateStore) -> str:
        token = with_two_epochs(here)
        os.utime(folder / stored_name(token), (1, 1))
        return token

    for point in points(here, lambda token: here.sweep(), expired):
        token = expired(here)
        with interrupted(point, here.put, token, 2, b"new"):
            assert here.sweep() in (0, 1)
        assert outcome(here.claim, token) in ((3, b"new"), StateNotFound), point
        here.put(token, 3, b"newer")
        assert here.claim(token) == (4, b"newer")
        here.delete(token)


def test_a_process_that_is_killed_in_a_put(here: StateStore, folder: Path, forked: Fork) -> None:
    """The older state or the new one is left, complete; and the next epoch deletes the rest."""
    new = bytes(range(256)) * 100

    def put(token: str, point: int) -> None:
        with interrupted(point, os.kill, os.getpid(), signal.SIGKILL):
            here.put(token, 2, new)

    found = set()
    for point in points(here, lambda token: here.put(token, 2, new)):
        token = with_two_epochs(here)
        ended = os.waitid(os.P_PID, forked(put, token, point), os.WEXITED | os.WNOWAIT)
        assert ended is not None and ended.si_status == signal.SIGKILL
        epoch, data = here.claim(token)
        assert epoch == 3 and data in (b"old", new), point
        found.add(data)
        here.put(token, 3, b"next")
        assert sorted(os.listdir(folder / stored_name(token))) == ["3.claim", "3.state"], point
    assert len(found) == 2


@pytest.mark.parametrize("operation", ["claim", "delete", "sweep", "sweep after delete"])
def test_a_process_that_is_killed_in_another_operation(
    here: StateStore, folder: Path, forked: Fork, operation: str
) -> None:
    """The newest state is left, or none. The files that are left do no harm, and are swept later."""

    def prepare(here: StateStore) -> str:
        token = with_two_epochs(here)
        if operation == "sweep after delete":
            here.delete(token)
        (folder / stored_name(token) / "1.state").write_bytes(b"of a process that was frozen")
        if operation.startswith("sweep"):
            os.utime(folder / stored_name(token), (1, 1))
        return token

    def run(token: str) -> None:
        here.sweep() if operation.startswith("sweep") else getattr(here, operation)(token)

    def killed(token: str, point: int) -> None:
        with interrupted(point, os.kill, os.getpid(), signal.SIGKILL):
            run(token)

    for point in points(here, run, prepare):
        token = prepare(here)
        ended = os.waitid(os.P_PID, forked(killed, token, point), os.WEXITED | os.WNOWAIT)
        assert ended is not None and ended.si_status == signal.SIGKILL
        found = outcome(here.claim, token)
        if operation == "claim":
            assert found in ((3, b"old"), (4, b"old")), point
            here.put(token, 4, b"next")
            assert here.claim(token) == (5, b"next"), point
        else:
            assert found is StateNotFound or (found == (3, b"old") and operation != "sweep after delete"), point
        for path in folder.glob(f"{'?' * 48}"):
            os.utime(path, (1, 1))
        here.sweep()
        assert os.listdir(folder) == ["clock"], point


def test_a_process_that_is_stopped_in_a_put_and_continues(here: StateStore, forked: Fork) -> None:
    def put(token: str, point: int) -> None:
        with interrupted(point, os.kill, os.getpid(), signal.SIGSTOP):
            assert outcome(here.put, token, 2, b"frozen") in (None, StateSuperseded)
        assert outcome(here.put, token, 2, b"frozen") is StateSuperseded

    for point in points(here, lambda token: here.put(token, 2, b"new")):
        token = with_two_epochs(here)
        process = forked(put, token, point)
        assert here.claim(token)[0] == 3
        here.put(token, 3, b"resumed")
        os.kill(process, signal.SIGCONT)
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        assert ended is not None and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0), point
        assert here.claim(token) == (4, b"resumed"), point


# -- folder ------------------------------------------------------------------------------------------------------------


def test_files_are_readable_by_the_user_only(folder: Path) -> None:
    old = os.umask(0)
    try:
        here = DirectoryStore(folder, FOREVER)
        token = with_two_epochs(here)
        here.claim(token)
        ended = with_two_epochs(here)
        here.delete(ended)
    finally:
        os.umask(old)
    modes = {path.relative_to(folder).as_posix(): path.stat().st_mode & 0o7777 for path in folder.rglob("*")}
    assert folder.stat().st_mode & 0o7777 == 0o700
    assert modes == {
        "clock": 0o600,
        token: 0o700,
        f"{token}/2.claim": 0o600,
        f"{token}/2.state": 0o600,
        f"{token}/3.claim": 0o600,
        ended: 0o700,
        f"{ended}/3.end": 0o600,
    }


def test_names_of_files_do_not_contain_the_token(folder: Path) -> None:
    here, token = open_store(str(folder), FOREVER), new_token()
    assert here is not None
    here.put(token, 1, b"data")
    assert files(folder) == ["1.state"] and not list(folder.rglob(f"*{token}*"))


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_folder_that_others_can_access_is_rejected(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(OptionError, match=rf"which other users can access \(mode {mode:o}\).+run chmod 700"):
        DirectoryStore(folder, FOREVER)
    folder.chmod(0o700)
    DirectoryStore(folder, FOREVER)


def test_a_path_that_is_no_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o600)
    for path in (tmp_path / "file", tmp_path / "file" / "states", Path("/proc/states")):
        with pytest.raises(OptionError, match=r"which cannot be used \(.+\); it must be a folder in which"):
            DirectoryStore(path, FOREVER)


def test_a_state_that_is_damaged_at_any_position_is_reported(folder: Path) -> None:
    here, token = open_store(str(folder), FOREVER), new_token()
    assert here is not None
    here.put(token, 1, b"state")
    file = folder / stored_name(token) / "1.state"
    content = file.read_bytes()
    for position in range(len(content)):
        file.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
        with pytest.raises(StateError, match="cannot be used: it is"):
            here.claim(token)
        file.write_bytes(content[:position])
        with pytest.raises(StateError, match="it is damaged"):
            here.claim(token)
    file.write_bytes(content)
    assert here.claim(token)[1] == b"state"


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    here, token, linked = DirectoryStore(folder, FOREVER), new_token(), new_token()
    here.put(token, 1, b"data")
    (folder / linked).symlink_to(folder / token)
    with pytest.raises(StateNotFound):
        here.claim(linked)
    with pytest.raises(StateStoreError, match="cannot be written: Not a directory"):
        here.put(linked, 1, b"data")
    here.delete(linked)
    os.utime(folder / linked, (1, 1), follow_symlinks=False)
    assert here.sweep() == 0 and here.claim(token) == (2, b"data")

    (tmp_path / "secret").write_bytes(b"secret")
    (folder / token / "1.state").unlink()
    (folder / token / "1.state").symlink_to(tmp_path / "secret")
    with pytest.raises(StateNotFound):
        here.claim(token)
    (folder / "clock").unlink()
    (folder / "clock").symlink_to(tmp_path / "secret")
    with pytest.raises(StateStoreError, match="cannot be read: Too many levels of symbolic links"):
        here.claim(token)
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_other_kinds_of_files_are_ignored(folder: Path) -> None:
    here, token = DirectoryStore(folder, FOREVER), new_token()
    here.put(token, 1, b"data")
    own = folder / token
    os.mkfifo(own / "7.state")
    (own / "8.state").mkdir()
    for name in ("0.state", "01.state", "9.state.bak", ".nfs0000001", "99999999999999999999.state", "x.claim"):
        (own / name).write_bytes(b"other")
    (own / "1.0123456789abcdef.draft").write_bytes(b"incompl")
    assert here.claim(token) == (2, b"data")


def test_a_folder_that_was_removed_is_reported_and_can_return(folder: Path) -> None:
    here, token = DirectoryStore(folder, FOREVER), new_token()
    folder.rename(folder.with_name("away"))
    for operation in (
        lambda: here.put(token, 1, b""),
        lambda: here.claim(token),
        lambda: here.delete(token),
        here.sweep,
    ):
        with pytest.raises(
            StateStoreError, match=rf"the state store {folder} cannot be \w+: No such file or directory\."
        ):
            operation()
    folder.with_name("away").rename(folder)
    here.put(token, 1, b"data")
    assert here.claim(token) == (2, b"data")


def test_errors_do_not_contain_the_token(folder: Path) -> None:
    here, token = DirectoryStore(folder, FOREVER), new_token()
    (folder / token).touch()
    with pytest.raises(StateStoreError) as caught:
        here.put(token, 1, b"data")
    assert token not in str(caught.value)


def test_expired_streams_are_swept(folder: Path) -> None:
    here = DirectoryStore(folder, FOREVER)
    old, ended, kept = with_two_epochs(here), with_two_epochs(here), with_two_epochs(here)
    here.delete(ended)
    (folder / "0123456789abcdef0123456789").touch()
    (folder / "other").mkdir()
    (folder / ("empty" * 5)).mkdir()
    for name in (old, ended, "other", "empty" * 5, "0123456789abcdef0123456789"):
        os.utime(folder / name, (1, 1))
    assert here.sweep() == 1  # the number of states
    assert sorted(os.listdir(folder)) == sorted([kept, "0123456789abcdef0123456789", "other", "clock"])
    assert here.claim(kept) == (3, b"old")


def test_a_claim_and_a_put_extend_the_retention(folder: Path) -> None:
    here = DirectoryStore(folder, FOREVER)
    for renew in (lambda token: here.claim(token), lambda token: here.put(token, 2, b"new")):
        token = with_two_epochs(here)
        almost = time.time() - FOREVER + 60
        os.utime(folder / token, (almost, almost))
        renew(token)
        assert (folder / token).stat().st_mtime > almost + 60
        os.utime(folder / token, (almost - 120, almost - 120))
        with pytest.raises(StateNotFound):
            here.claim(token)


@pytest.mark.parametrize("difference", [-1e6, 1e6])
def test_the_clock_of_the_machine_does_not_matter(
    folder: Path, difference: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that share a volume have different clocks; only that of the file server counts."""
    here, token, now = DirectoryStore(folder, FOREVER), new_token(), time.time
    monkeypatch.setattr(time, "time", lambda: now() + difference)
    here.put(token, 1, b"data")
    assert here.sweep() == 0 and here.claim(token) == (2, b"data")


def test_a_sweep_continues_after_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = DirectoryStore(folder, FOREVER)
    tokens = [with_two_epochs(here) for _ in range(3)]
    for token in tokens:
        os.utime(folder / token, (1, 1))
    real, failed = os.open, []

    def failing(path: Any, *arguments: Any, **options: Any) -> int:
        if path in tokens and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(StateStoreError, match="cannot be written: Input/output error"):
        here.sweep()
    assert sorted(os.listdir(folder)) == sorted([*failed, "clock"])


def test_a_state_is_on_the_disk_before_it_gets_its_name(folder: Path) -> None:
    """Otherwise a power failure could leave an incomplete file under the name."""
    here, token = DirectoryStore(folder, FOREVER), new_token()
    here.put(token, 1, b"old")
    with interrupted(-1, print) as calls:
        here.put(token, 1, b"new")
    named = calls.index("replace")
    assert calls[:named].count("fsync") == 1 and calls[named + 1] == "fsync"  # the file; and the folder with its name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB and 32 files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=32,mode=700", "none", disk], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"may not mount a file system: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    here, token, other = DirectoryStore(small_disk, FOREVER), new_token(), new_token()
    here.put(token, 1, bytes(300_000))
    for size in (800_000, 5_000_000):
        with pytest.raises(
            StateStoreError, match=rf"the state store {small_disk} cannot be written: No space left on device"
        ):
            here.put(token, 1, b"x" * size)
    assert files(small_disk) == ["1.state"]
    assert here.claim(token) == (2, bytes(300_000))
    here.put(other, 1, b"small")
    with (small_disk / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError):
        while rest.write(bytes(4096)):
            pass
    with pytest.raises(OSError):
        for name in range(32):
            (small_disk / str(name)).touch()
    for operation in (lambda: here.put(token, 2, b"x"), lambda: here.claim(token)):
        with pytest.raises(StateStoreError, match="No space left"):
            operation()
    here.delete(token)
    os.utime(small_disk / other, (1, 1))
    assert here.sweep() == 1
    here.put(new_token(), 1, bytes(200_000))


def test_a_limit_of_the_file_size(folder: Path, forked: Fork) -> None:
    """The error comes in the middle of the file, as on a full disk."""
    here, token = DirectoryStore(folder, FOREVER), new_token()
    here.put(token, 1, b"old")

    def put() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(StateStoreError, match="cannot be written: File too large"):
            here.put(token, 1, bytes(200_000))

    details = os.waitid(os.P_PID, forked(put), os.WEXITED | os.WNOWAIT)
    assert details is not None and (details.si_code, details.si_status) == (os.CLD_EXITED, 0)
    assert files(folder) == ["1.state"] and here.claim(token) == (2, b"old")


# -- Redis -------------------------------------------------------------------------------------------------------------


def client(url: str) -> Any:
    import redis

    return redis.Redis.from_url(url)


def test_redis_expires_states(redis_server: Any) -> None:
    here, token = RedisStore(redis_server.url, 100.0), new_token()
    name, direct = f"nemostream:state:{token}", client(redis_server.url)
    for operation in (lambda: here.put(token, 1, b"data"), lambda: here.claim(token), lambda: here.delete(token)):
        direct.persist(name)
        operation()
        assert 0 < direct.pttl(name) <= 100_000
    assert direct.hgetall(name) == {b"epoch": b"3"}
    assert here.sweep() == 0


def test_redis_receives_neither_tokens_nor_the_content(redis_server: Any) -> None:
    pytest.importorskip("cryptography", reason="needs the state extra")
    here, token = open_store(redis_server.url, FOREVER, KEY), new_token()
    assert here is not None
    here.put(token, 1, b"the secret transcript")
    direct = client(redis_server.url)
    state = direct.hgetall(f"nemostream:state:{stored_name(token)}")
    assert state[b"epoch"] == b"1" and b"secret" not in state[b"data"]
    assert not direct.keys(f"*{token}*")


def test_a_damaged_state_in_redis_is_reported(redis_server: Any) -> None:
    here, token = open_store(redis_server.url, FOREVER), new_token()
    assert here is not None
    here.put(token, 1, b"data")
    client(redis_server.url).hset(f"nemostream:state:{stored_name(token)}", "data", b"other")
    with pytest.raises(StateError, match="it is damaged"):
        here.claim(token)


def test_redis_that_is_down_and_comes_back(idle_redis: Any) -> None:
    here, token = RedisStore(idle_redis.url, FOREVER), new_token()  # the server can start without it
    for operation in (lambda: here.put(token, 1, b""), lambda: here.claim(token), lambda: here.delete(token)):
        with pytest.raises(
            StateStoreError, match=rf"the state store, Redis at 127\.0\.0\.1:{idle_redis.port}, failed: "
        ):
            operation()
    idle_redis.start()
    here.put(token, 1, b"first")
    assert here.claim(token) == (2, b"first")
    # The connection to the old process is closed; the first call afterwards succeeds.
    idle_redis.stop()
    idle_redis.start()
    here.put(token, 2, b"second")
    assert here.claim(token) == (3, b"second")
    idle_redis.stop()
    with pytest.raises(StateStoreError):
        here.put(token, 3, b"third")


def test_redis_that_is_stopped_and_continues(idle_redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    idle_redis.start()
    default, token = RedisStore(idle_redis.url, FOREVER), new_token()
    default.put(token, 1, b"old")
    monkeypatch.setattr(redis_store, "_TIMEOUT", 0.1)
    here = RedisStore(idle_redis.url, FOREVER)
    idle_redis.send_signal(signal.SIGSTOP)
    for operation in (lambda: here.put(token, 1, b"new"), lambda: here.claim(token), lambda: here.delete(new_token())):
        with pytest.raises(StateStoreError, match=r"failed: Timeout"):
            operation()
    idle_redis.send_signal(signal.SIGCONT)
    # Requests that were sent may have been executed meanwhile, the claim too.
    epoch, data = default.claim(token)
    assert epoch in (2, 3) and data in (b"old", b"new")
    with pytest.raises(StateSuperseded):
        default.put(token, 1, b"frozen")
    default.put(token, epoch, b"resumed")
    assert default.claim(token) == (epoch + 1, b"resumed")


def test_redis_without_memory_keeps_the_older_state(idle_redis: Any) -> None:
    idle_redis.start()
    here, token = RedisStore(idle_redis.url, FOREVER), new_token()
    here.put(token, 1, b"old")
    client(idle_redis.url).config_set("maxmemory", 1)
    with pytest.raises(StateStoreError, match="used memory > 'maxmemory'"):
        here.put(token, 1, b"new")
    client(idle_redis.url).config_set("maxmemory", 0)
    assert here.claim(token) == (2, b"old")


def test_passwords_of_redis(idle_redis: Any) -> None:
    idle_redis.start()
    client(idle_redis.url).config_set("requirepass", "right-secret")
    token, address = new_token(), f"127.0.0.1:{idle_redis.port}"
    RedisStore(f"redis://:right-secret@{address}/3", FOREVER).put(token, 1, b"data")
    for url in (f"redis://{address}/3", f"redis://:wrong-secret@{address}/3"):
        with pytest.raises(StateStoreError) as caught:
            RedisStore(url, FOREVER).claim(token)
        assert "secret" not in str(caught.value)
    assert RedisStore(f"redis://:right-secret@{address}/3", FOREVER).claim(token) == (2, b"data")


def test_a_value_of_another_program_is_reported(redis_server: Any) -> None:
    token = new_token()
    client(redis_server.url).set(f"nemostream:state:{token}", "text")
    with pytest.raises(StateStoreError, match="WRONGTYPE"):
        RedisStore(redis_server.url, FOREVER).claim(token)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@host:port",
        "redis://:secret@host:70000",
        "redis://:secret@host?unknown=1",
        "redis://:secret@[::1",
        "redis://:secret/word@host",
    ],
)
def test_invalid_urls_are_rejected(url: str) -> None:
    pytest.importorskip("redis", reason="needs the state extra")
    with pytest.raises(
        OptionError, match=r"state_store is not a valid Redis URL \(.+\); it must be redis://"
    ) as caught:
        open_store(url, FOREVER)
    assert "secret" not in str(caught.value)


def test_the_package_redis_is_needed_only_for_its_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] == "redis":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert open_store("memory", FOREVER) and open_store(str(folder), FOREVER)
    with pytest.raises(
        BackendError, match=r"a state store in Redis needs the package redis \(No module.+\): .+\[state\]"
    ):
        open_store("redis://localhost", FOREVER)
