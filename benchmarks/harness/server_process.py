"""Servers that a benchmark starts as processes of their own: start, ports and CPU time."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

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


def free_ports(count: int) -> list[int]:
    """Return different TCP ports of 127.0.0.1 that no program uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    return parse_cpu_ticks(Path(f"/proc/{pid}/stat").read_text()) / os.sysconf("SC_CLK_TCK")


def parse_cpu_ticks(stat: str) -> int:
    """Return the user and system ticks of a process from its `/proc/PID/stat`; its name may contain spaces and ")"."""
    fields = stat.rpartition(")")[2].split()  # from the third field, the state
    return int(fields[11]) + int(fields[12])


def descendants(pids: Sequence[int], root: Path = Path("/proc")) -> list[int]:
    """Return the processes and all their descendants."""
    children: dict[int, list[int]] = {}
    for stat in root.glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, pending = list[int](), list(pids)
    while pending:
        pid = pending.pop()
        if pid not in found:
            found.append(pid)
            pending += children.get(pid, [])
    return found
