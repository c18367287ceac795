"""ONNX Runtime's telemetry is off: nothing is written below an empty home folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nemostream

LIBRARY = "import nemostream\nwith nemostream.load() as model: model.transcribe(nemostream.demo_clip())"
STARTS = {
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


def written(home: Path, arguments: list[str], **variables: str) -> list[str]:
    """Files in `home` after a process with it as its home folder, in which nothing else turns telemetry off."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    kept.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, *arguments], env=kept | {"HOME": str(home)} | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("start", STARTS)
def test_nothing_is_written_below_an_empty_home(start: str, tmp_path: Path) -> None:
    for needed in {"server": ("fastapi", "prometheus_client"), "calibration": ("onnx",), "benchmarks": ("onnx",)}.get(
        start, ()
    ):
        pytest.importorskip(needed)
    assert written(tmp_path, STARTS[start]) == []


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_variable_of_the_user_is_kept(value: str, tmp_path: Path) -> None:
    check = f"import os, nemostream\nassert os.environ['ORT_DISABLE_TELEMETRY'] == {value!r}"
    written(tmp_path, ["-c", check], ORT_DISABLE_TELEMETRY=value)


@pytest.mark.parametrize(("value", "calls"), [(None, 1), ("1", 1), ("0", 0)])
def test_events_stop_for_an_onnxruntime_that_was_imported_first(value: str | None, calls: int, tmp_path: Path) -> None:
    """The variable is too late then; the library's own switch is used, unless the user wants telemetry."""
    check = (
        "import onnxruntime\ncalled = []\nonnxruntime.disable_telemetry_events = lambda: called.append(1)\n"
        f"import nemostream.runtime.backends.cpu\nassert len(called) == {calls}, called"
    )
    written(tmp_path, ["-c", check], **({} if value is None else {"ORT_DISABLE_TELEMETRY": value}))
