"""How many CPUs this process may use: its affinity, and the quota of its container (cgroup v1 and v2)."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath


def usable_cpus(proc: Path = Path("/proc/self")) -> int:
    """Return how many CPUs this process can keep busy, at least 1. A fraction of a CPU does not count.

    `proc` is the process's folder in /proc.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(proc)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def default_threads() -> int:
    """Return the threads that ONNX Runtime gets if nobody chooses: 0, its own default, if the machine is all ours.

    ONNX Runtime counts the machine's cores: in a container with a quota its spinning threads would use the quota up.
    """
    usable = usable_cpus()
    return 0 if usable >= (os.cpu_count() or 1) else usable


def _quota(proc: Path) -> float | None:
    """CPUs that the tightest of the process's cgroups grants; None if none limits it."""
    try:
        groups = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found: list[float] = []
    for line in groups:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            kind, read = "cgroup2", _cpu_max
        elif "cpu" in controllers.split(","):
            kind, read = "cgroup", _cfs_quota
        else:
            continue
        for folder in _folders(mounts, kind, path):
            quota = read(folder)
            if quota is not None:
                found.append(quota)
    return min(found, default=None)


def _folders(mounts: list[str], kind: str, path: str) -> list[Path]:
    """The folder of a cgroup and those of its parents, as far as they are mounted."""
    for line in mounts:
        # ID parent major:minor root mount-point options [optional fields] - type source super-options
        fields, _, rest = line.partition(" - ")
        try:
            _, _, _, root, point, *_ = fields.split(" ")
            type_, _, options = rest.split(" ", 2)
        except ValueError:
            continue
        if type_ != kind or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        # A container sees the host's path of its cgroup while only the cgroup itself is mounted.
        inside = PurePosixPath(path).relative_to(root) if PurePosixPath(path).is_relative_to(root) else PurePosixPath()
        folder = Path(point.replace("\\040", " ")) / inside
        depth = 0 if ".." in inside.parts else len(inside.parts)
        return [folder, *list(folder.parents)[:depth]]
    return []


def _cpu_max(folder: Path) -> float | None:
    """Of cgroup v2: `cpu.max` holds quota and period, the quota maybe "max"."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _cfs_quota(folder: Path) -> float | None:
    """Of cgroup v1: microseconds of CPU time in a period, -1 if there is no limit."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None
