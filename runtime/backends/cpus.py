"""Number of CPUs available to this process: CPU affinity and container quota (cgroup v1 and v2)."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath


def usable_cpus(proc: Path = Path("/proc/self")) -> int:
    """Return the number of CPUs available to this process, at least 1; a quota is rounded down.

    `proc` is the process's directory in /proc.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(proc)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def default_threads() -> int:
    """Return the default number of ONNX Runtime threads: 0, its own default, unless CPUs are limited.

    ONNX Runtime's default counts the cores of the machine; in a container its spinning threads would exhaust the quota.
    """
    usable = usable_cpus()
    return 0 if usable >= (os.cpu_count() or 1) else usable


def _quota(proc: Path) -> float | None:
    """Return the smallest CPU quota of the process's cgroups, in CPUs; None without a quota."""
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
            filesystem, read = "cgroup2", _cpu_max
        elif "cpu" in controllers.split(","):
            filesystem, read = "cgroup", _cfs_quota
        else:
            continue
        for folder in _folders(mounts, filesystem, path):
            quota = read(folder)
            if quota is not None:
                found.append(quota)
    return min(found, default=None)


def _folders(mounts: list[str], filesystem: str, path: str) -> list[Path]:
    """Return the directory of a cgroup and those of its parents, as far as they are mounted."""
    for line in mounts:
        # ID parent major:minor root mount-point options [optional fields] - type source super-options
        fields, _, rest = line.partition(" - ")
        try:
            _, _, _, root, point, *_ = fields.split(" ")
            type_, _, options = rest.split(" ", 2)
        except ValueError:
            continue
        if type_ != filesystem or (filesystem == "cgroup" and "cpu" not in options.split(",")):
            continue
        # In a container `path` is the path on the host, while only the cgroup itself is mounted.
        inside = PurePosixPath(path).relative_to(root) if PurePosixPath(path).is_relative_to(root) else PurePosixPath()
        folder = Path(point.replace("\\040", " ")) / inside
        depth = 0 if ".." in inside.parts else len(inside.parts)
        return [folder, *list(folder.parents)[:depth]]
    return []


def _cpu_max(folder: Path) -> float | None:
    """Return the quota of a cgroup v2: `cpu.max` contains quota and period, the quota possibly "max"."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _cfs_quota(folder: Path) -> float | None:
    """Return the quota of a cgroup v1: microseconds of CPU time per period, -1 without a limit."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None
