"""A server that a benchmark starts as a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

from nemostream.errors import BackendError

_STOP_SECONDS = 30  # for the process to end after SIGTERM


@contextlib.contextmanager
def server_process(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server in a `with` block; yield the process and its URL, which it prints when it is ready.

    Raises `BackendError` with the last line of its standard error if it does not start.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            if not url.startswith("http"):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(_STOP_SECONDS)  # it writes its error before it ends
                log.seek(0)
                *_, last = ["it printed nothing", *log.read().splitlines()]
                raise BackendError(f"the server did not start: {last}")
            yield server, url
        finally:
            server.terminate()
            try:
                server.communicate(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
