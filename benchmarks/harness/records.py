"""Result files of benchmarks, statistics, and the description of the machine.

A result is a JSON object with `schema`, `benchmark`, `command`, `time` (UTC), `commit`, `hardware`, `versions`,
`model`, `method` and `rows`. Each row is one measured case: `case` identifies it (chunk size, batch, precision, ...),
`ms` contains all samples of each time in milliseconds, `figures` their statistics, and `values` everything else.
Cases have the same keys in every run, so that two results can be compared.

Percentiles use the nearest-rank method: the smallest sample that at least p percent of the samples do not exceed. Every
percentile is therefore a measured sample; with fewer than 100 samples p99 is the maximum.
"""

from __future__ import annotations

import difflib
import gzip
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Manifest
from nemostream.errors import OptionError

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
    "transcribe-cpp",
    "jiwer",
    "whisper-normalizer",
)
_GIGABYTE = 1 << 30

Record = dict[str, Any]
Row = dict[str, Any]
Progress = Callable[[str], None]  # receives progress messages
Tokens = Sequence[Sequence[int]]  # token ids of each stream or utterance


# -- statistics --------------------------------------------------------------------------------------------------------


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile. Raises `ValueError` if `samples` is empty."""
    if not len(samples):
        raise ValueError("cannot compute a percentile: there are no samples")
    rank = math.ceil(percent / 100 * len(samples) - 1e-9)
    return sorted(samples)[max(rank, 1) - 1]


def figures(samples: Sequence[float]) -> dict[str, float]:
    """Return count, mean, percentiles, minimum and maximum."""
    return {
        "n": len(samples),
        "avg": sum(samples) / len(samples),
        **{f"p{percent}": percentile(samples, percent) for percent in PERCENTILES},
        "min": min(samples),
        "max": max(samples),
    }


def rtfx(audio_seconds: float, seconds: float) -> float:
    """Return the seconds of audio transcribed per second.

    Source: the Open ASR leaderboard, which divides the total audio duration by the total time.
    """
    return audio_seconds / seconds


def agreement(reference: Tokens, hypothesis: Tokens) -> float:
    """Return the share of reference tokens, over all rows, that `hypothesis` contains in order (matching blocks)."""
    total = sum(map(len, reference))
    same = sum(len(matches(a, b)) for a, b in zip(reference, hypothesis, strict=True))
    return same / total if total else 1.0


def matches(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Return the pairs of positions at which two sequences have equal items, in order (matching blocks)."""
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return [(block.a + offset, block.b + offset) for block in blocks for offset in range(block.size)]


def rate_interval(by_utterance: Sequence[Sequence[float]] | NDArray[Any]) -> tuple[float, float, float]:
    """Return a rate and its 95 % bootstrap interval; `by_utterance` [N, 2] has errors and words of N recordings.

    Differences of errors give a difference of rates.
    """
    errors, words = np.array(by_utterance, float).T
    chosen = np.random.default_rng(0).integers(0, len(errors), (2000, len(errors)))
    low, high = np.quantile(errors[chosen].sum(axis=1) / words[chosen].sum(axis=1), [0.025, 0.975])
    return float(errors.sum() / words.sum()), float(low), float(high)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """Return the 25th and the 75th percentile."""
    return percentile(samples, 25), percentile(samples, 75)


def row(case: Mapping[str, Any], ms: Mapping[str, Sequence[float]], values: Mapping[str, Any] | None = None) -> Row:
    """Return one measured case; `ms` maps the name of a time to its samples in milliseconds."""
    rounded = {name: [round(float(sample), 4) for sample in samples] for name, samples in ms.items()}
    return {
        "case": dict(case),
        "ms": rounded,
        "figures": {name: figures(samples) for name, samples in rounded.items() if samples},
        "values": dict(values or {}),
    }


# -- files -------------------------------------------------------------------------------------------------------------


def record(benchmark: str, rows: Sequence[Row], *, model: Mapping[str, Any], method: Mapping[str, Any]) -> Record:
    """Return a result with the description of this machine and run."""
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


def model_of(manifest: Manifest) -> dict[str, Any]:
    """Return the `model` of a result: its name, number of layers and width."""
    return {"name": manifest.name, "layers": manifest.encoder.layers, "d_model": manifest.encoder.d_model}


def read(path: str | Path) -> Record:
    """Read a result file, which may be compressed (`.json.gz`). Raises `OptionError` if it is not one."""
    result = load(path)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise OptionError(f"{path} is not a benchmark result: its schema is not {SCHEMA}.")
    return result


def load(path: str | Path) -> Any:
    """Read a JSON file of any schema, which may be compressed (`.json.gz`). Raises `OptionError` if it is damaged."""
    try:
        content = Path(path).read_bytes()
        return json.loads(gzip.decompress(content) if str(path).endswith(".gz") else content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise OptionError(f"{path} is not a benchmark result: {error}.") from error


def write(result: Record, path: Path) -> None:
    """Write a result file with one line for each row, without spaces because some rows have many thousand samples."""
    rows = ",\n".join("  " + json.dumps(each, separators=(",", ":")) for each in result["rows"])
    head = json.dumps(result | {"rows": []}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n", encoding="utf-8")


# -- environment -------------------------------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """Return CPU, cores, memory, operating system and GPU of this machine."""
    return {
        "cpu": _first_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cpu_id": " ".join(f"{key} {_first_of('/proc/cpuinfo', key)}" for key in ("cpu family", "model", "stepping")),
        "cores": cores(),
        "memory_gib": round(_meminfo("MemTotal") / _GIGABYTE, 1),
        "system": platform.platform(),
        "gpu": _gpu(),
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries listed in `LIBRARIES`."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit(file: Path = Path(__file__)) -> str | None:
    """Return the commit of the nemostream checkout that contains `file`, or None.

    A package installed into a virtual environment inside the checkout counts; another project's repository does not.
    """
    folder = str(file.resolve().parent)
    top = _output("git", "-C", folder, "rev-parse", "--show-toplevel")
    if not top or not (Path(top) / "benchmarks" / "harness" / file.name).is_file():
        return None
    return _output("git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12")


def available_memory() -> int:
    """Return the bytes of memory available without swapping; 0 if unknown."""
    return _meminfo("MemAvailable")


class OtherWork:
    """Cores that other processes kept busy since this object was created; 0 if unknown."""

    def __init__(self) -> None:
        self._start, self._initial = time.perf_counter(), self._other_seconds()

    def cores(self) -> float:
        return max(0.0, (self._other_seconds() - self._initial) / (time.perf_counter() - self._start))

    @staticmethod
    def _other_seconds() -> float:
        """Return the CPU seconds of all other processes since boot."""
        own = os.times()  # includes children that have ended, such as compilers
        return _cpu_ticks() / os.sysconf("SC_CLK_TCK") - sum(own[:4])


def _gpu() -> str | None:
    """Return name, driver, memory, clock and power limit as reported by `nvidia-smi`, or None."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_ticks(path: str = "/proc/stat") -> int:
    """Return the busy ticks of all cores since boot: user, nice, system, irq, softirq and steal."""
    try:
        fields = Path(path).read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0
    return sum(int(field) for index, field in enumerate(fields) if index not in (3, 4))  # idle and iowait


def _meminfo(field: str, path: str = "/proc/meminfo") -> int:
    """Return the bytes of a field, which the file states in KiB (as "kB"); 0 if it has none."""
    value = _first_of(path, field)
    return int(value.split()[0]) * 1024 if value else 0


def _first_of(path: str, field: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


# -- progress ----------------------------------------------------------------------------------------------------------


def report_progress(message: str) -> None:
    """Print a progress message on standard error."""
    print(message, file=sys.stderr, flush=True)


def no_progress(message: str) -> None:
    """Discard a progress message."""
