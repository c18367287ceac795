"""Inverse text normalization in separate processes, one per language.

The rules (`nemostream.runtime.text.itn`) hold Python's interpreter lock for tenths of a second, and for seconds while
they load: on a thread they would block the event loop. A process exchanges JSON lines over its standard input and
output, inherits no API key and ends with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import resource
import subprocess
import sys
from typing import Any

from nemostream.errors import BackendError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.itn import LANGUAGES, check_language
from nemostream.runtime.text.languages import AUTO
from nemostream.runtime.text.words import Word

log = logging.getLogger("nemostream.serving")

_START_SECONDS = 600.0  # for loading the rules, which takes a minute in some languages
_UTTERANCE_SECONDS = 60.0  # for one utterance
_MAX_LINE_BYTES = 64 << 20  # of one response
_MAX_MEMORY_BYTES = 8 << 30  # of one process; the rules of some languages need gigabytes while they load


class Normalizer:
    """Rewrites final events with numbers, dates and amounts in digits, in the languages that have rules."""

    def __init__(self) -> None:
        self._processes: dict[str, _Process] = {}  # by language
        self._loading = asyncio.Lock()  # the rules of one language are loaded at a time

    async def start(self, language: str) -> None:
        """Load the rules of a language unless they are loaded; with "auto", they are loaded when they are needed.

        Raises `OptionError` if there are none, `BackendError` if they cannot be loaded.
        """
        if (code := check_language(language)) != AUTO:
            await self._process(code).start()

    async def rewrite(self, event: Event) -> Event:
        """Return a final event in written form.

        If the model detects the language, that of words is the one of their tags. Words of a language without rules are
        unchanged, and so is the event if a process fails, so that no text is lost.
        """
        words: list[Word] = []
        language = event.set_language
        try:
            for tag, group in itertools.groupby(
                event.words, lambda word: word.language if language == AUTO else language
            ):
                part = list(group)
                code = (tag or "").split("-")[0]
                words += await self._process(code).rewrite(part) if code in LANGUAGES else part
        except BackendError as error:
            log.error("inverse text normalization failed", extra={"reason": str(error)})
            return event
        return event if tuple(words) == event.words else event.with_words(words)

    def close(self) -> None:
        """End the processes. May be called from any thread."""
        for process in list(self._processes.values()):
            process.close()

    def _process(self, code: str) -> _Process:
        return self._processes.setdefault(code, _Process(code, self._loading))


class _Process:
    """The process of one language. One utterance at a time; the others wait."""

    def __init__(self, language: str, loading: asyncio.Lock) -> None:
        self._language, self._loading = language, loading
        self._process: asyncio.subprocess.Process | None = None
        self._loaded = False  # whether its rules are loaded
        self._lock = asyncio.Lock()
        self._request = 0  # number of the last request

    async def start(self) -> None:
        """Load the rules unless they are loaded. Raises `BackendError` if that fails."""
        async with self._lock:
            await self._ensure_process()

    async def rewrite(self, words: list[Word]) -> list[Word]:
        """Return the written words. Raises `BackendError` if the process fails."""
        async with self._lock:
            process = await self._ensure_process()
            rows = [dataclasses.astuple(word) for word in words]
            return [Word(*row) for row in await self._call(process, rows, _UTTERANCE_SECONDS)]

    def close(self) -> None:
        """End the process. May be called from any thread."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _ensure_process(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None or not self._loaded:
            async with self._loading:
                return await self._load()
        return self._process

    async def _load(self) -> asyncio.subprocess.Process:
        """Return the process when its rules are loaded, also if the client that started it did not wait for them."""
        if self._process is None or self._process.returncode is not None:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("NEMOSTREAM_")}
            self._loaded = False
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "nemostream.serving.normalizer",
                    self._language,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,
                    limit=_MAX_LINE_BYTES,
                )
            except OSError as error:
                raise BackendError(f"the process for inverse text normalization cannot be started: {error}.") from error
        process = self._process
        await self._call(process, [], _START_SECONDS)
        self._loaded = True
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
        self.close()
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
