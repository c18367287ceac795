"""Python processes that the server starts, and what they inherit of its environment."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from typing import Any

_WORKER_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TMPDIR")


async def start_process(
    module: str, *arguments: str, environment: Mapping[str, str], **options: Any
) -> asyncio.subprocess.Process:
    """Start a Python process that runs `module`, whose command line ends with `arguments`.

    `options` are those of `asyncio.create_subprocess_exec`. The process has a session of its own: signals of a terminal
    go to the server only. Raises `OSError` if it cannot be started.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, env=environment, start_new_session=True, **options
    )


def server_environment() -> dict[str, str]:
    """Return the environment of a process of the server itself: without options, which may contain API keys."""
    return {name: value for name, value in os.environ.items() if not name.startswith("NEMOSTREAM_")}


def worker_environment() -> dict[str, str]:
    """Return the environment of a process that computes for clients: no secrets, and one thread for NumPy."""
    inherited = {name: os.environ[name] for name in _WORKER_VARIABLES if name in os.environ}
    return inherited | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
