"""ONNX Runtime's telemetry is disabled: no process writes files into an empty home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nemostream

LIBRARY = "import nemostream\nwith nemostream.load() as model: model.transcribe(nemostream.demo_clip())"
ENTRY_POINTS = {
    "command line": ["-m", "nemostream", "transcribe", str(nemostream.demo_clip())],
    "doctor": ["-m", "nemostream", "doctor"],
    "library": ["-c", LIBRARY],
    "calibration": ["-c", "import nemostream.engine.calibration"],
    "server": ["-c", "import nemostream.serving.service"],
    "Triton": ["-c", "import nemostream.serving.integrations.triton, nemostream.runtime.backends.cpu"],
    "benchmarks": ["-c", "import nemostream.benchmarks.studies.precision"],
    "subprocess": [
        "-c",
        "import nemostream, subprocess, sys\n"
        "sys.exit(subprocess.call([sys.executable, '-c', 'import onnxruntime, time; time.sleep(0.2)']))",
    ],
}


def files_written(home: Path, arguments: list[str], **variables: str) -> list[str]:
    """Run Python with `home` as its home folder and no variable that disables telemetry; return the files in `home`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment | {"HOME": str(home)} | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_no_file_is_written_into_an_empty_home(entry_point: str, tmp_path: Path) -> None:
    needed = {"server": ("fastapi", "prometheus_client"), "calibration": ("onnx",), "benchmarks": ("onnx",)}
    for package in needed.get(entry_point, ()):
        pytest.importorskip(package)
    assert files_written(tmp_path, ENTRY_POINTS[entry_point]) == []


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_value_set_by_the_user_is_kept(value: str, tmp_path: Path) -> None:
    check = f"import os, nemostream\nassert os.environ['ORT_DISABLE_TELEMETRY'] == {value!r}"
    files_written(tmp_path, ["-c", check], ORT_DISABLE_TELEMETRY=value)


@pytest.mark.parametrize(("value", "calls"), [(None, 1), ("1", 1), ("0", 0)])
def test_events_are_disabled_if_onnxruntime_was_imported_first(value: str | None, calls: int, tmp_path: Path) -> None:
    """The variable has no effect after the import: `disable_telemetry_events` is called, unless the user set 0."""
    check = (
        "import onnxruntime\ncalled = []\nonnxruntime.disable_telemetry_events = lambda: called.append(1)\n"
        f"import nemostream.runtime.backends.cpu\nassert len(called) == {calls}, called"
    )
    files_written(tmp_path, ["-c", check], **({} if value is None else {"ORT_DISABLE_TELEMETRY": value}))
