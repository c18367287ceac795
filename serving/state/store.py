"""Where the states of resumable streams are stored: in memory, in a folder, or in Redis.

A stream has a token, and an epoch that increases each time it is resumed (`StateStore.claim`). A process stores states
of its own epoch only. So a process that was suspended, and continues after its stream was resumed elsewhere, cannot
replace a newer state.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nemostream.errors import OptionError
from nemostream.serving.errors import StateNotFound, StateStoreError, StateSuperseded
from nemostream.serving.state.redis_store import RedisStore
from nemostream.serving.state.sealing import MAX_STATE_BYTES, TOKEN, Sealer, check_token, stored_name, too_large

_MEMORY_BYTES = 2 << 30  # of `MemoryStore`: about 290 states of the 0.6B model


class StateStore(Protocol):
    """Stores the newest state of each stream. Called on threads; thread-safe.

    A state is kept for the retention of the store after the last `put` or `claim`. Then the epoch of its stream is
    deleted too.
    """

    def put(self, token: str, epoch: int, data: bytes) -> None:
        """Replace the state of a stream. The epoch of a new stream is 1.

        Raises `StateSuperseded` if a newer epoch was claimed or the stream was deleted, and `StateStoreError` if the
        state cannot be stored; the older one is then kept.
        """

    def claim(self, token: str) -> tuple[int, bytes]:
        """Return a new epoch of a stream, and its newest state. Afterwards, `put` of older epochs raises an error.

        Atomic between threads, processes and machines: every caller receives another, increasing epoch. Raises
        `StateNotFound` if there is no state, `StateError` if it is damaged, and `StateStoreError` if it cannot be read.
        """

    def delete(self, token: str) -> None:
        """Delete the state of a stream, if there is one. Afterwards, `put` of its epochs raises an error.

        Raises `StateStoreError`.
        """

    def sweep(self) -> int:
        """Delete expired states, and return their number; 0 where the store expires them itself.

        Raises `StateStoreError`.
        """

    def close(self) -> None:
        """Close connections. The states are kept, except those in memory."""


def open_store(spec: str, retention_seconds: float, key: bytes | None = None) -> StateStore | None:
    """Return the store that `spec` describes: `memory`, `none`, a Redis URL, or the path of a folder.

    States in folders and in Redis are sealed, and encrypted if there is a key of 32 bytes. Does not connect to Redis.
    Raises `OptionError` for other values, and `BackendError` if a package is missing.
    """
    if spec == "none":
        return None
    if spec == "memory":
        return MemoryStore(retention_seconds)
    if spec.startswith(("redis://", "rediss://")):
        return SealedStore(RedisStore(spec, retention_seconds), key)
    # A name without a slash is more likely a misspelt word than a folder, and a URL may contain a password.
    if "/" not in spec or "://" in spec:
        raise OptionError(
            f"state_store is {spec.partition('://')[0]!r}; it must be memory, none, redis://HOST, rediss://HOST, or "
            "the path of a folder with a slash, such as ./states."
        )
    return SealedStore(DirectoryStore(Path(spec), retention_seconds), key)


class SealedStore:
    """Seals the states of another store (`sealing`), which receives neither tokens nor unprotected states."""

    def __init__(self, store: StateStore, key: bytes | None) -> None:
        self._store, self._sealer = store, Sealer(key)

    def put(self, token: str, epoch: int, data: bytes) -> None:
        check_token(token)
        sealed = self._sealer.seal(token, data)
        if len(sealed) > MAX_STATE_BYTES:
            raise StateStoreError(f"the state has {len(sealed)} bytes; at most {MAX_STATE_BYTES} can be stored.")
        self._store.put(stored_name(token), epoch, sealed)

    def claim(self, token: str) -> tuple[int, bytes]:
        check_token(token)
        epoch, sealed = self._store.claim(stored_name(token))
        return epoch, self._sealer.unseal(token, sealed)

    def delete(self, token: str) -> None:
        check_token(token)
        self._store.delete(stored_name(token))

    def sweep(self) -> int:
        return self._store.sweep()

    def close(self) -> None:
        self._store.close()


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    epoch: int
    data: bytes | None  # None: evicted or deleted. The epoch is kept, so that older ones cannot store a state
    written: float  # time of the last `put`, `claim` or `delete`, in seconds


class MemoryStore:
    """A `StateStore` in the memory of this process. If the limit is exceeded, the oldest states are deleted first."""

    def __init__(self, retention_seconds: float, max_bytes: int = _MEMORY_BYTES) -> None:
        self._retention, self._max_bytes = retention_seconds, max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # in the order of `written`
        self._bytes = 0

    def put(self, token: str, epoch: int, data: bytes) -> None:
        check_token(token)
        if len(data) > self._max_bytes:
            raise StateStoreError(
                f"the state has {len(data)} bytes; all states in memory together have at most {self._max_bytes}."
            )
        with self._lock:
            self._expire()
            if token in self._entries and epoch < self._entries[token].epoch:
                raise StateSuperseded
            self._write(token, epoch, data)
            for entry in self._entries.values():
                if self._bytes <= self._max_bytes:
                    break
                self._bytes -= len(entry.data or b"")
                entry.data = None

    def claim(self, token: str) -> tuple[int, bytes]:
        check_token(token)
        with self._lock:
            self._expire()
            entry = self._entries.get(token)
            if entry is None or entry.data is None:
                raise StateNotFound
            self._write(token, entry.epoch + 1, entry.data)
            return entry.epoch + 1, entry.data

    def delete(self, token: str) -> None:
        check_token(token)
        with self._lock:
            if entry := self._entries.get(token):
                self._write(token, entry.epoch + 1, None)

    def sweep(self) -> int:
        with self._lock:
            return self._expire()

    def close(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def _write(self, token: str, epoch: int, data: bytes | None) -> None:
        self._remove(token)
        self._entries[token] = _Entry(epoch, data, time.monotonic())
        self._bytes += len(data or b"")

    def _remove(self, token: str) -> None:
        if entry := self._entries.pop(token, None):
            self._bytes -= len(entry.data or b"")

    def _expire(self) -> int:
        """Delete expired entries. Return the number of states among them."""
        oldest = time.monotonic() - self._retention
        expired = list(itertools.takewhile(lambda token: self._entries[token].written < oldest, self._entries))
        states = sum(self._entries[token].data is not None for token in expired)
        for token in expired:
            self._remove(token)
        return states


# -- folder ------------------------------------------------------------------------------------------------------------

_FILE = re.compile(r"([1-9]\d{0,17})\.(?:[0-9a-f]{16}\.)?(claim|state|draft|end)")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    epoch: int
    kind: str


class DirectoryStore:
    """A `StateStore` in a folder, which may be on a volume that several machines share (NFS).

    Each stream has a folder, named after its token, with the files

    * `EPOCH.claim`: the epoch was claimed; created exclusively, so that only one process obtains it
    * `EPOCH.state`: the newest state that was stored with this epoch
    * `EPOCH.RANDOM.draft`: a state that is being written; renamed to `EPOCH.state` when it is complete
    * `EPOCH.end`: the stream was deleted; kept for the retention, so that no process stores a state again

    A process replaces only the state of its own epoch, and deletes those of older epochs. After each change it lists
    the folder again: `claim` finds every state whose `put` did not find the claim. (An NFS client may answer a listing
    from its cache, but not after a change of its own.)

    Files and folders can be accessed by their owner only, and links are not followed. States expire by the modification
    time of their folder and the clock of the file server. Raises `OptionError` if the folder cannot be used or if
    others can access it.
    """

    def __init__(self, folder: Path, retention_seconds: float) -> None:
        self._folder, self._retention = folder, retention_seconds
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(folder.stat().st_mode)
            self._now()
        except OSError as error:
            raise OptionError(
                f"state_store is {folder}, which cannot be used ({error.strerror}); it must be a folder in which the "
                "server may create files."
            ) from error
        if mode & 0o077:
            raise OptionError(
                f"state_store is {folder}, which other users can access (mode {mode:o}), and states contain "
                "transcripts; run chmod 700, or name a new folder in it, which the server creates."
            )

    def put(self, token: str, epoch: int, data: bytes) -> None:
        check_token(token)
        draft = f"{epoch}.{secrets.token_hex(8)}.draft"
        with self._errors("written"), self._open(token, create=True) as folder:
            _check_newest(folder, epoch)
            try:
                with open(os.open(draft, _NEW_FILE, 0o600, dir_fd=folder), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(draft, f"{epoch}.state", src_dir_fd=folder, dst_dir_fd=folder)
            except FileNotFoundError:
                _check_newest(folder, epoch)  # a newer epoch deletes the drafts of older ones
                raise
            except BaseException:
                _delete(folder, draft)
                raise
            os.fsync(folder)
            for older in _check_newest(folder, epoch):
                if older.epoch < epoch:
                    _delete(folder, older.name)

    def claim(self, token: str) -> tuple[int, bytes]:
        check_token(token)
        with self._errors("read"):
            now = self._now()
            with self._open(token) as folder:
                if now - os.fstat(folder).st_mtime > self._retention:
                    raise StateNotFound
                while True:  # a newer epoch may delete the state before it is read; that epoch has then stored one
                    epoch = _claim_epoch(folder, _resumable(folder))
                    states = [file for file in _resumable(folder) if file.kind == "state" and file.epoch < epoch]
                    if states:
                        with suppress(FileNotFoundError):
                            return epoch, _read(folder, max(states, key=lambda file: file.epoch).name)

    def delete(self, token: str) -> None:
        check_token(token)
        with self._errors("written"), suppress(StateNotFound), self._open(token) as folder:
            newest = max((file.epoch for file in _list(folder) if file.kind != "end"), default=None)
            if newest is None:
                return
            with suppress(OSError):  # on a full disk the state is deleted all the same
                _create(folder, f"{newest + 1}.end")
            _delete_all(folder, [file for file in _list(folder) if file.kind != "end"])
            os.fsync(folder)

    def sweep(self) -> int:
        expired, failed = 0, None
        with self._errors("written"):
            oldest = self._now() - self._retention
            for token in filter(TOKEN.fullmatch, os.listdir(self._folder)):
                try:
                    expired += self._sweep(token, oldest)
                except OSError as error:  # the other streams are swept first
                    failed = error
            if failed is not None:
                raise failed
        return expired

    def close(self) -> None:
        pass

    def _sweep(self, token: str, oldest: float) -> bool:
        """Delete the files of a stream if they were last written before `oldest`. Return whether a state expired."""
        with suppress(StateNotFound), self._open(token) as folder:
            if os.fstat(folder).st_mtime >= oldest:
                return False
            files = _list(folder)
            _delete_all(folder, files)
            with suppress(OSError):  # a state was stored meanwhile
                os.rmdir(self._folder / token)
            return any(file.kind == "state" for file in files)
        return False

    def _now(self) -> float:
        """Return the time of the file server in seconds, from which the clock of this machine may differ."""
        clock = os.open(self._folder / "clock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.utime(clock)
            return os.fstat(clock).st_mtime
        finally:
            os.close(clock)

    @contextmanager
    def _open(self, token: str, create: bool = False) -> Iterator[int]:
        """Open the folder of a stream. Without `create`, raises `StateNotFound` if it is missing or deleted."""
        root = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(token, 0o700, dir_fd=root)
                    os.fsync(root)
            folder = os.open(token, _OPEN_FOLDER, dir_fd=root)
        except (FileNotFoundError, NotADirectoryError) as error:
            if create:
                raise
            raise StateNotFound from error
        finally:
            os.close(root)
        try:
            yield folder
        except FileNotFoundError as error:
            if create:
                raise
            raise StateNotFound from error
        finally:
            os.close(folder)

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"the state store {self._folder} cannot be {action}: {error.strerror}."
            raise StateStoreError(message) from error


def _list(folder: int) -> list[_File]:
    """Return the files of a stream. Links and other kinds of files are ignored."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    return [_File(name, int(match[1]), match[2]) for name in names if (match := _FILE.fullmatch(name))]


def _check_newest(folder: int, epoch: int) -> list[_File]:
    """Return the files of a stream. Raises `StateSuperseded` if a newer epoch was claimed or the stream was deleted."""
    files = _list(folder)
    if any(file.epoch > epoch for file in files):
        raise StateSuperseded
    return files


def _resumable(folder: int) -> list[_File]:
    """Return the files of a stream. Raises `StateNotFound` if it has no state or was deleted."""
    files = _list(folder)
    kinds = {file.kind for file in files}
    if "state" not in kinds or "end" in kinds:
        raise StateNotFound
    return files


def _claim_epoch(folder: int, files: list[_File]) -> int:
    """Return an epoch that no other process obtains, newer than those of `files`."""
    epoch = max(file.epoch for file in files) + 1
    while True:
        with suppress(FileExistsError):
            _create(folder, f"{epoch}.claim")
            os.fsync(folder)
            return epoch
        epoch += 1


def _create(folder: int, name: str) -> None:
    os.close(os.open(name, _NEW_FILE, 0o600, dir_fd=folder))


def _delete(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _delete_all(folder: int, files: list[_File]) -> None:
    """Delete files, in an order in which no state becomes the newest one, and none is left without its end."""
    for file in sorted(files, key=lambda file: (file.kind == "end", file.epoch)):
        _delete(folder, file.name)


def _read(folder: int, name: str) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=folder), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_STATE_BYTES:
            raise too_large(size)
        return file.read(size)
