"""Python processes that the server starts."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any


async def start_process(module: str, *arguments: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a Python process that runs `module`, whose command line ends with `arguments`.

    `options` are those of `asyncio.create_subprocess_exec`. The process inherits the environment without the server's
    options, which may contain API keys. It has a session of its own: signals of a terminal go to the server only.
    Raises `OSError` if it cannot be started.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        env={name: value for name, value in os.environ.items() if not name.startswith("NEMOSTREAM_")},
        start_new_session=True,
        **options,
    )
