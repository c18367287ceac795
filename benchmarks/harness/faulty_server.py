"""`nemostream serve` with a disk that becomes slow or full while the file `slow` or `full` exists in a folder.

    python -m nemostream.benchmarks.harness.faulty_server FOLDER serve --state-store ./states

The state store in a folder calls `os.fsync` after each write; this function is delayed, or fails.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

SLOW_SECONDS = 1.0  # added to each call


def inject(folder: Path) -> None:
    """Replace `os.fsync` of this process."""
    fsync = os.fsync

    def faulty(descriptor: int) -> None:
        if (folder / "slow").exists():
            time.sleep(SLOW_SECONDS)
        if (folder / "full").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = faulty  # type: ignore[assignment]


if __name__ == "__main__":
    from nemostream.__main__ import main

    inject(Path(sys.argv.pop(1)))
    main()
