"""Inverse text normalization in separate processes, one per language.

The rules (`nemostream.runtime.text.itn`) hold Python's interpreter lock for tenths of a second, and for seconds while
they load: on a thread they would block the event loop. A process exchanges JSON lines over its standard input and
output, inherits no secrets and ends with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from nemostream.errors import BackendError, CapacityError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.itn import check_language, code_of
from nemostream.runtime.text.languages import AUTO
from nemostream.runtime.text.words import Word
from nemostream.serving.subprocesses import start_process, worker_environment

log = logging.getLogger("nemostream.serving")

_START_SECONDS = 600.0  # for loading the rules, which takes a minute in some languages
_UTTERANCE_SECONDS = 60.0  # for one utterance
_MAX_LINE_BYTES = 64 << 20  # of one response
_MAX_MEMORY_BYTES = 8 << 30  # of one process; the rules of some languages need gigabytes while they load
_MAX_PROCESSES = 4  # so that clients cannot use up the memory by requesting every language
_IDLE_SECONDS = 60.0  # after which a process can be ended for another language
_RETRY_SECONDS = 300.0  # after a failed load; without this pause, each utterance would repeat it


class Normalizer:
    """Rewrites final events with numbers, dates and amounts in digits, in the languages that have rules."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._processes: dict[str, _Process] = {}  # by language, also those that do not run
        self._first_loads = asyncio.Lock()  # the rules of one new language are loaded at a time
        self._full = False  # whether the lack of a free process was logged
        self._closed = False

    async def start(self, language: str) -> None:
        """Load the rules of a language unless they are loaded; with "auto", they are loaded when they are needed.

        Raises `OptionError` if there are none, `BackendError` if they cannot be loaded, `CapacityError` if the
        processes of other languages are all in use.
        """
        if (code := check_language(language)) != AUTO:
            process = self._process(code)
            self._reserve(process)
            await process.start()

    async def rewrite(self, event: Event) -> Event:
        """Return a final event in written form.

        With "auto", the language of words is that of their tags. Words are unchanged if their language has no rules,
        while its rules are loaded for the first time, which can take minutes, and if its process fails, so that no text
        is lost.
        """
        words: list[Word] = []
        language = event.set_language
        for tag, group in itertools.groupby(event.words, lambda word: word.language if language == AUTO else language):
            part = list(group)
            words += await self._rewrite(part, code) if (code := code_of(tag)) else part
        return event if tuple(words) == event.words else event.with_words(words)

    def close(self) -> None:
        """End the processes, and start no other. May be called from any thread."""
        self._closed = True
        for process in list(self._processes.values()):
            process.close()

    async def _rewrite(self, words: list[Word], code: str) -> list[Word]:
        process = self._process(code)
        if process.failed:  # was logged when it failed
            return words
        try:
            self._reserve(process)
            if process.loaded:
                return await process.rewrite(words)
            process.load()
        except CapacityError as error:
            if not self._full:
                self._full = True
                log.warning("inverse text normalization skipped", extra={"language": code, "reason": str(error)})
        except BackendError as error:
            log.error("inverse text normalization failed", extra={"language": code, "reason": str(error)})
        return words

    def _process(self, code: str) -> _Process:
        process = self._processes.setdefault(code, _Process(code, self._first_loads, self._clock))
        if self._closed:
            process.close()
        return process

    def _reserve(self, process: _Process) -> None:
        """End the process that is idle for the longest time if a new one would exceed the limit.

        Raises `CapacityError` if none is idle.
        """
        held = [one for one in self._processes.values() if one.held]
        if process.held or process.failed or len(held) < _MAX_PROCESSES:
            return
        idle = [one for one in held if one.idle_seconds >= _IDLE_SECONDS]
        if not idle:
            raise CapacityError(
                f"inverse text normalization is in use for {_MAX_PROCESSES} other languages, the maximum; try again "
                "in a minute."
            )
        max(idle, key=lambda one: one.idle_seconds).end()
        self._full = False


class _Process:
    """The process of one language. One utterance at a time; the others wait."""

    def __init__(self, language: str, first_loads: asyncio.Lock, clock: Callable[[], float]) -> None:
        self.loaded = False  # whether its rules were loaded; a process that then exits is started again
        self._language, self._first_loads, self._clock = language, first_loads, clock
        self._process: asyncio.subprocess.Process | None = None
        self._loading: asyncio.Task[None] | None = None
        self._failure, self._failed_at = "", -math.inf  # of the last load
        self._used_at = self._clock()
        self._closed = False
        self._lock = asyncio.Lock()
        self._request = 0  # number of the last request

    @property
    def held(self) -> bool:
        """Whether it counts as a process: it runs, or was loaded and starts again when it is needed."""
        return self.loaded or self._is_loading

    @property
    def failed(self) -> bool:
        """Whether its rules could not be loaded a short time ago."""
        return self._clock() < self._failed_at + _RETRY_SECONDS

    @property
    def idle_seconds(self) -> float:
        """The time since it was used; -1 while it is."""
        return -1.0 if self._is_loading or self._lock.locked() else self._clock() - self._used_at

    async def start(self) -> None:
        """Load the rules unless they are loaded. Raises `BackendError` if that fails, or failed a short time ago."""
        self._used_at = self._clock()
        if not self._runs and not self.failed:
            await asyncio.shield(self.load())  # other clients need the rules also if this one does not wait for them
        if not self.loaded:
            raise BackendError(self._failure)

    async def rewrite(self, words: list[Word]) -> list[Word]:
        """Return the written words. Raises `BackendError` if the process fails."""
        rows = [dataclasses.astuple(word) for word in words]
        while True:
            await self.start()
            async with self._lock:
                if self._process is not None and self._runs:  # it can exit while this utterance waits for another
                    response = await self._call(self._process, rows, _UTTERANCE_SECONDS)
                    self._used_at = self._clock()
                    return [Word(*row) for row in response]

    def load(self) -> asyncio.Task[None]:
        """Load the rules in a task, which records a failure instead of raising it."""
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load())
        return self._loading

    def end(self) -> None:
        """End the process and free its memory; it is loaded again when it is needed."""
        self.loaded = False
        self._kill()

    def close(self) -> None:
        """End the process and start no other. May be called from any thread."""
        self._closed = True
        self._kill()

    @property
    def _runs(self) -> bool:
        return self.loaded and self._process is not None and self._process.returncode is None

    @property
    def _is_loading(self) -> bool:
        return self._loading is not None and not self._loading.done()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _load(self) -> None:
        try:
            # A process that starts again does not wait for the first load of another language, which can take minutes.
            async with contextlib.nullcontext() if self.loaded else self._first_loads, self._lock:
                log.info("loading rules of inverse text normalization", extra={"language": self._language})
                await self._call(await self._spawn(), [], _START_SECONDS)
                self.loaded, self._used_at = True, self._clock()
        except BackendError as error:
            self.loaded = False
            self._failure, self._failed_at = str(error), self._clock()
            if not self._closed:
                log.error(
                    "rules of inverse text normalization cannot be loaded",
                    extra={"language": self._language, "reason": str(error), "retry_seconds": _RETRY_SECONDS},
                )

    async def _spawn(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise BackendError("inverse text normalization is closed; the server is stopping.")
        try:
            process = await start_process(
                "nemostream.serving.normalizer",
                self._language,
                environment=worker_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                limit=_MAX_LINE_BYTES,
            )
        except OSError as error:
            raise BackendError(f"the process for inverse text normalization cannot be started: {error}.") from error
        self._process = process
        if self._closed:  # while it was started
            self._kill()
            raise BackendError("inverse text normalization is closed; the server is stopping.")
        return process

    async def _call(self, process: asyncio.subprocess.Process, rows: list[Any], seconds: float) -> list[Any]:
        """Return the response to a request. Responses to cancelled requests are skipped by their number."""
        assert process.stdin is not None and process.stdout is not None
        self._request += 1
        request = self._request
        try:
            async with asyncio.timeout(seconds):
                process.stdin.write(json.dumps([request, rows]).encode() + b"\n")
                await process.stdin.drain()
                while line := await process.stdout.readline():
                    number, response = json.loads(line)
                    if number == request:
                        return list(response)
            reason = "it exited"
        except TimeoutError:
            reason = f"no response in {seconds:.0f} s"
        except (OSError, ValueError) as error:
            reason = str(error)
        self._kill()
        raise BackendError(f"the process for inverse text normalization failed: {reason}.")


def main() -> None:
    """Process requests until the server closes the pipe."""
    import nemostream

    responses = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of the rules must not mix with responses
    os.nice(10)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MAX_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    normalizer = nemostream.InverseNormalizer(sys.argv[1])
    for line in sys.stdin:
        number, rows = json.loads(line)
        words = normalizer([Word(*row) for row in rows])
        responses.write(json.dumps([number, [dataclasses.astuple(word) for word in words]]) + "\n")


if __name__ == "__main__":
    main()
