"""Inverse text normalization in a process of its own.

The rules (`nemostream.runtime.text.itn`) hold Python's interpreter lock for tenths of a second, and for a whole one while they load:
on a thread they would keep the event loop from all streams. The process speaks JSON lines over its standard input and
output, inherits no API key and ends with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
from typing import Any

from nemostream.errors import BackendError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Word

log = logging.getLogger("nemostream.serving")

_START_SECONDS = 120.0
_SECONDS = 60.0  # for one utterance
_LINE_BYTES = 64 << 20  # of one answer


class Normalizer:
    """Writes numbers, dates and amounts of final events in digits. One utterance at a time; the others wait."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._number = 0  # of the last request

    async def start(self) -> None:
        """Load the rules, if they are not. Raises `BackendError` if that fails."""
        async with self._lock:
            await self._running()

    async def rewrite(self, event: Event) -> Event:
        """A final event in written form. Returns it unchanged if the process fails: no text is lost."""
        try:
            async with self._lock:
                process = await self._running()
                rows = [[word.text, word.start, word.end, word.confidence] for word in event.words]
                answer = await self._ask(process, rows, _SECONDS)
        except BackendError as error:
            log.error("inverse text normalization failed", extra={"why": str(error)})
            return event
        words = tuple(Word(*row) for row in answer)
        return event if words == event.words else event.with_words(words)

    def close(self) -> None:
        """End the process. May be called from any thread."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        variables = {name: value for name, value in os.environ.items() if not name.startswith("NEMOSTREAM_")}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "nemostream.serving.normalizer",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=variables,
                start_new_session=True,
                limit=_LINE_BYTES,
            )
        except OSError as error:
            raise BackendError(f"the process for inverse text normalization cannot be started: {error}.") from error
        await self._ask(self._process, [], _START_SECONDS)
        return self._process

    async def _ask(self, process: asyncio.subprocess.Process, rows: list[Any], seconds: float) -> list[Any]:
        """Its answer. One that a cancelled caller left behind is skipped by its number."""
        assert process.stdin is not None and process.stdout is not None
        self._number += 1
        number = self._number
        try:
            async with asyncio.timeout(seconds):
                process.stdin.write(json.dumps([number, rows]).encode() + b"\n")
                await process.stdin.drain()
                while line := await process.stdout.readline():
                    found = json.loads(line)
                    if found[0] == number:
                        return list(found[1])
            reason = "it ended"
        except TimeoutError:
            reason = f"no answer in {seconds:.0f} s"
        except (OSError, ValueError) as error:
            reason = str(error)
        self.close()
        raise BackendError(f"the process for inverse text normalization failed: {reason}.")


def main() -> None:
    """Answer requests until the server closes the pipe."""
    import nemostream

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the rules print is no answer
    os.nice(10)
    normalizer = nemostream.InverseNormalizer()
    for line in sys.stdin:
        number, rows = json.loads(line)
        words = normalizer([Word(*row) for row in rows])
        answers.write(json.dumps([number, [[w.text, w.start, w.end, w.confidence] for w in words]]) + "\n")


if __name__ == "__main__":
    main()
