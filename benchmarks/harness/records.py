"""A benchmark's result file, and the arithmetic that all benchmarks share.

A result is JSON: `schema`, `benchmark`, `command`, `time` (UTC), `commit`, `hardware`, `versions`, `model`, `method`
and `rows`. A row is one case measured: `case` says which (chunk size, batch, precision, ...), `ms` holds every sample
of every time measured, in milliseconds, `figures` what they come to, and `values` whatever else was found. A case is
the same from run to run, so that two results can be laid beside each other.

Percentiles are by nearest rank: the smallest sample that p percent of the samples do not exceed. So every figure shown
is one that was measured; of fewer than 100 samples p99 is the largest.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemostream.errors import BackendError, NemostreamError, OptionError
from nemostream.extras import install_command

SCHEMA = "nemostream-benchmark/1"
FOLDER = Path("bench-results")
PERCENTILES = (50, 90, 95, 99)
LIBRARIES = (
    "nemostream",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt_rtx",
    "tensorrt-rtx-cu13",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "torch",
    "nemo_toolkit",
    "transformers",
    "sherpa-onnx",
    "jiwer",
    "whisper-normalizer",
)
_GIGABYTE = 1 << 30

Record = dict[str, Any]
Row = dict[str, Any]
Say = Callable[[str], None]
Tokens = Sequence[Sequence[int]]  # of each stream or utterance


# -- figures -----------------------------------------------------------------------------------------------------------


def percentile(samples: Sequence[float], percent: float) -> float:
    """By nearest rank. Raises `ValueError` if there is no sample."""
    if not len(samples):
        raise ValueError("no samples, no percentile")
    rank = math.ceil(percent / 100 * len(samples) - 1e-9)
    return sorted(samples)[max(rank, 1) - 1]


def figures(samples: Sequence[float]) -> dict[str, float]:
    """Count, mean, percentiles, least and most."""
    return {
        "n": len(samples),
        "avg": sum(samples) / len(samples),
        **{f"p{percent}": percentile(samples, percent) for percent in PERCENTILES},
        "min": min(samples),
        "max": max(samples),
    }


def rtfx(audio_seconds: float, seconds: float) -> float:
    """Seconds of audio recognised per second, as the Open ASR leaderboard defines it: sums over sums."""
    return audio_seconds / seconds


def agreement(wanted: Tokens, said: Tokens) -> float:
    """Share of the wanted tokens that were said, in order (longest common blocks), over all rows."""
    total = sum(map(len, wanted))
    same = sum(
        sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
        for a, b in zip(wanted, said, strict=True)
    )
    return same / total if total else 1.0


def row(case: Mapping[str, Any], ms: Mapping[str, Sequence[float]], values: Mapping[str, Any] | None = None) -> Row:
    """One case measured; `ms` by name."""
    rounded = {name: [round(float(sample), 4) for sample in samples] for name, samples in ms.items()}
    return {
        "case": dict(case),
        "ms": rounded,
        "figures": {name: figures(samples) for name, samples in rounded.items() if samples},
        "values": dict(values or {}),
    }


# -- files -------------------------------------------------------------------------------------------------------------


def record(benchmark: str, rows: Sequence[Row], *, model: Mapping[str, Any], method: Mapping[str, Any]) -> Record:
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "command": shlex.join(sys.orig_argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "model": dict(model),
        "method": dict(method),
        "rows": list(rows),
    }


def read(path: str | Path) -> Record:
    """Raises `OptionError` for a file that is not a benchmark's result."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} is not a benchmark's result: {error}.") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise OptionError(f"{path} is not a benchmark's result: its schema is not {SCHEMA}.")
    return result


def write(result: Record, path: Path) -> None:
    """One line a row: half a million samples on lines of their own help nobody."""
    rows = ",\n".join("  " + json.dumps(each) for each in result["rows"])
    head = json.dumps(result | {"rows": []}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n", encoding="utf-8")


# -- what it ran on ----------------------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    return {
        "cpu": _first_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cpu_id": " ".join(f"{key} {_first_of('/proc/cpuinfo', key)}" for key in ("cpu family", "model", "stepping")),
        "cores": cores(),
        "memory_gib": round(_meminfo("MemTotal") / _GIGABYTE, 1),
        "system": platform.platform(),
        "gpu": _gpu(),
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of Python and of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(file: Path = Path(__file__)) -> str | None:
    """Of the working tree this file is in, or was installed in, if it is ours and not that of somebody who uses us."""
    here = str(file.resolve().parent)
    top = _output("git", "-C", here, "rev-parse", "--show-toplevel")
    if not top or not (Path(top) / "benchmarks" / file.name).is_file():
        return None
    return _output("git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12")


def available_memory() -> int:
    """Bytes that can be had without swapping; 0 if the system does not say."""
    return _meminfo("MemAvailable")


class OtherWork:
    """How many cores somebody else kept busy since this object was made; 0 if the system does not say."""

    def __init__(self) -> None:
        self._start, self._ticks = time.perf_counter(), self._foreign()

    def cores(self) -> float:
        return max(0.0, (self._foreign() - self._ticks) / (time.perf_counter() - self._start))

    @staticmethod
    def _foreign() -> float:
        ours = os.times()  # with the children that have ended: compilers
        return _cpu_ticks() / os.sysconf("SC_CLK_TCK") - sum(ours[:4])


def _gpu() -> str | None:
    """Name, driver, memory, clock and power limit as NVIDIA's tool tells them."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_ticks() -> int:
    """All work of all cores since start, stolen time included (user, nice, system, irq, softirq, steal)."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0
    return sum(int(field) for index, field in enumerate(fields) if index not in (3, 4))  # idle and waiting for a disk


def _meminfo(field: str) -> int:
    value = _first_of("/proc/meminfo", field)
    return int(value.split()[0]) * 1024 if value else 0


def _first_of(path: str, field: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


# -- the command line of every benchmark -------------------------------------------------------------------------------


def say(message: str) -> None:
    """Progress, on standard error."""
    print(message, file=sys.stderr, flush=True)


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """With the options of every benchmark."""
    made = argparse.ArgumentParser(
        prog=f"nemostream bench {name}",
        description=(description or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--out", type=Path, default=FOLDER, help="folder for the result, its tables and plots")
    made.add_argument("--name", default=name, help="of the files written there")
    return made


def engine_options(made: argparse.ArgumentParser, several: bool = False) -> None:
    """What is measured: a bundle on a backend, or on several."""
    made.add_argument("--bundle", type=Path, help="what to run (default: the packaged model)")
    where = "cpu, cuda (engines by TensorRT) or cuda:onnxruntime"
    if several:
        made.add_argument("--device", nargs="+", default=["cpu"], help=where)
    else:
        made.add_argument("--device", default="cpu", help=where)
    made.add_argument("--engines", type=Path, help="folder of engines (default: ~/.cache/nemostream/engines)")
    made.add_argument("--threads", type=int, help="of a CPU (default: every core)")
    made.add_argument("--chunk-ms", type=int, nargs="+", help="default: all that the model has")


def run(measure: Callable[[], Record], options: argparse.Namespace) -> None:
    """Measure, write the result with its tables and plots, and print the tables. Exits as the command line does."""
    from nemostream.benchmarks.report import write_report  # it imports the benchmarks, and they this

    try:
        if missing := [name for name in ("matplotlib", "onnx") if find_spec(name) is None]:
            raise BackendError(f"benchmarks need {' and '.join(missing)}: {install_command('bench')}")
        result = measure()
        write(result, options.out / f"{options.name}.json")
        print(write_report([result], options.out / f"{options.name}.md"), end="")
    except NemostreamError as error:
        say(f"nemostream: {error}")
        sys.exit(error.exit_code)
    say(f"\nwritten: {options.out / options.name}.json, .md and plots")
