"""CPU affinity and quota, read from fake /proc and cgroup directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemostream.runtime.backends.cpus import default_threads, usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


def process(folder: Path, cgroup: str, mountinfo: str, **files: str) -> Path:
    """Create a process's directory in /proc; `files` are below its cgroup mount, with "__" for "/" and "_" for "."."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mountinfo.replace("MOUNT", str(folder / "mount")))
    for name, text in files.items():
        path = folder / "mount" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc


V2 = "31 23 0:27 / MOUNT rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 23 0:28 / /elsewhere rw - cgroup cgroup rw,memory\n"
V1 += "33 23 0:29 ROOT MOUNT rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("1600000 100000", 8)],
)
def test_version_2(tmp_path: Path, quota: str, cpus: int) -> None:
    assert usable_cpus(process(tmp_path, "0::/\n", V2, cpu_max=quota)) == cpus


def test_smallest_quota_of_nested_groups(tmp_path: Path) -> None:
    proc = process(tmp_path, "0::/a/b\n", V2, a__cpu_max="300000 100000", a__b__cpu_max="500000 100000")
    assert usable_cpus(proc) == 3


@pytest.mark.parametrize(("quota", "cpus"), [("400000", 4), ("-1", 8), ("10000", 1)])
def test_version_1(tmp_path: Path, quota: str, cpus: int) -> None:
    """In a container, the cgroup path is that of the host, but the mount is the container's group."""
    proc = process(
        tmp_path,
        "4:memory:/docker/1234\n3:cpu,cpuacct:/docker/1234\n0::/\n",
        V1.replace("ROOT", "/docker/1234"),
        cpu_cfs_quota_us=quota,
        cpu_cfs_period_us="100000",
    )
    assert usable_cpus(proc) == cpus


def test_version_1_on_the_host(tmp_path: Path) -> None:
    proc = process(
        tmp_path,
        "3:cpu,cpuacct:/job\n",
        V1.replace("ROOT", "/"),
        job__cpu_cfs_quota_us="200000",
        job__cpu_cfs_period_us="100000",
        cpu_cfs_quota_us="-1",
        cpu_cfs_period_us="100000",
    )
    assert usable_cpus(proc) == 2


def test_mount_point_with_a_space(tmp_path: Path) -> None:
    """The kernel writes it as an octal escape."""
    (folder := tmp_path / "a b").mkdir()
    proc = process(folder, "0::/\n", V2, cpu_max="300000 100000")
    text = (proc / "mountinfo").read_text()
    (proc / "mountinfo").write_text(text.replace("a b", "a\\040b"))
    assert usable_cpus(proc) == 3


@pytest.mark.parametrize("files", [{}, {"cpu_max": "invalid"}, {"cpu_max": "1 0"}])
def test_unreadable_quota_is_ignored(tmp_path: Path, files: dict[str, str]) -> None:
    assert usable_cpus(process(tmp_path, "0::/../up\n", V2, **files)) == 8
    assert usable_cpus(tmp_path / "none") == 8
    (tmp_path / "proc" / "mountinfo").write_text("broken\n")
    assert usable_cpus(tmp_path / "proc") == 8


def test_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    assert usable_cpus(process(tmp_path, "0::/\n", V2, cpu_max="400000 100000")) == 2


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemostream.runtime.backends.cpus.usable_cpus", lambda: 8)
    assert default_threads() == 0
    monkeypatch.setattr("nemostream.runtime.backends.cpus.usable_cpus", lambda: 3)
    assert default_threads() == 3
