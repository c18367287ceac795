"""Statistics of the benchmarks compared with examples computed by hand, and result files."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream.benchmarks import report
from nemostream.benchmarks.harness import records, tables
from nemostream.bundle import Bundle
from nemostream.errors import OptionError

RESULTS = report.ROOT / "benchmarks" / "results"


def test_percentiles_are_samples() -> None:
    hundred = [float(number) for number in range(100, 0, -1)]
    assert [records.percentile(hundred, p) for p in (50, 90, 95, 99, 100)] == [50, 90, 95, 99, 100]
    assert [records.percentile([3.0, 1.0, 2.0], p) for p in (1, 33, 34, 50, 66, 67, 99)] == [1, 1, 2, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="no samples"):
        records.percentile([], 50)


def test_bootstrap_interval() -> None:
    """Of 400 recordings of 10 words with 0 to 4 errors, the standard error is sqrt(2 / 400) / 10."""
    counts = np.stack([np.arange(400) % 5, np.full(400, 10)], axis=1)
    rate, low, high = records.rate_interval(counts)
    assert rate == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.2 - 1.96 * 0.00707, 0.2 + 1.96 * 0.00707), abs=0.0015)
    assert records.rate_interval([[1, 10]] * 5) == pytest.approx((0.1, 0.1, 0.1))


def test_quartiles() -> None:
    assert records.quartiles([float(each) for each in range(1, 16)]) == (4.0, 12.0)
    assert records.quartiles([5.0]) == (5.0, 5.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from(records.PERCENTILES))
def test_percentile_definition(samples: list[float], percent: int) -> None:
    found = records.percentile(samples, percent)
    assert found in samples
    assert 100 * sum(sample <= found for sample in samples) >= percent * len(samples)
    assert all(
        100 * sum(other <= each for other in samples) < percent * len(samples) for each in samples if each < found
    )


def test_figures() -> None:
    found = records.figures([1.0, 2.0, 3.0, 6.0])
    assert found == {"n": 4, "avg": 3.0, "p50": 2.0, "p90": 6.0, "p95": 6.0, "p99": 6.0, "min": 1.0, "max": 6.0}
    assert records.rtfx(90.0, 1.5) == 60.0


def test_agreement() -> None:
    assert records.agreement([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1.0
    assert records.agreement([[1, 2, 3, 4]], [[1, 9, 3, 4]]) == 0.75
    assert records.agreement([[1, 2, 3], [5]], [[2, 3], []]) == 0.5
    assert records.agreement([[]], [[]]) == 1.0


def result(**ms: list[float]) -> records.Record:
    rows = [records.row({"chunk_ms": 80, "batch": 1}, ms)]
    return records.record("latency", rows, model={"name": "m"}, method={})


def test_result_file_round_trip(tmp_path: Path) -> None:
    made = result(step=[1.0, 2.0], none=[])
    records.write(made, tmp_path / "deep" / "x.json")
    assert records.read(tmp_path / "deep" / "x.json") == made == json.loads(json.dumps(made))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress((tmp_path / "deep" / "x.json").read_bytes()))
    assert records.read(tmp_path / "x.json.gz") == made
    assert made["schema"] == records.SCHEMA and made["hardware"]["cores"] >= 1
    assert {"python", "numpy", "onnxruntime"} <= made["versions"].keys()
    assert made["rows"][0]["figures"]["step"]["p50"] == 1.0 and "none" not in made["rows"][0]["figures"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "another/1"}'])
def test_other_files_are_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(OptionError, match="is not a benchmark result"):
        records.read(tmp_path / "x.json")
    with pytest.raises(OptionError, match="is not a benchmark result"):
        records.read(tmp_path / "missing.json")
    for content in (b"", text.encode(), gzip.compress(text.encode()), gzip.compress(text.encode())[:-9] + b"x"):
        (tmp_path / "x.json.gz").write_bytes(content)
        with pytest.raises(OptionError, match="is not a benchmark result"):
            records.read(tmp_path / "x.json.gz")


def test_other_work_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= records.OtherWork().cores() <= 1024
    assert records.available_memory() >= 0
    # Two cores are busy for ten seconds; this process and its children use eight seconds of them.
    ticks, clock = os.sysconf("SC_CLK_TCK"), iter([100.0, 110.0])
    monkeypatch.setattr(records, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    busy = iter([1000 * ticks, 1020 * ticks])
    monkeypatch.setattr(records, "_cpu_ticks", lambda: next(busy))
    mine = iter([(1.0, 0.0, 0.0, 0.0, 3.0), (5.0, 1.0, 2.0, 1.0, 13.0)])  # the last is the time since boot
    monkeypatch.setattr(records, "os", SimpleNamespace(times=lambda: next(mine), sysconf=os.sysconf))
    assert records.OtherWork().cores() == pytest.approx((20 - 8) / 10)


def test_commit_of_own_checkout_only(tmp_path: Path) -> None:
    """The commit is that of a nemostream checkout, also of a package installed in it, not of another project."""
    here = Path(records.__file__).resolve().relative_to(report.ROOT)  # benchmarks/...
    nested = Path(".venv") / "lib" / "nemostream" / here
    for project, path in (("ours", here), ("theirs", Path("source") / here.name)):
        top = tmp_path / project
        for file in (top / path, top / nested):
            file.parent.mkdir(parents=True)
            file.write_text("")
        git = ["git", "-C", str(top), "-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", path], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    head = subprocess.run(
        ["git", "-C", str(tmp_path / "ours"), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert records.commit(tmp_path / "ours" / here) == records.commit(tmp_path / "ours" / nested) == head
    assert records.commit(tmp_path / "theirs" / nested) is None
    assert records.commit(tmp_path / here.name) is None
    (tmp_path / "ours" / here).write_text("changed")
    assert records.commit(tmp_path / "ours" / here) == f"{head}-dirty"


def test_tables() -> None:
    assert [tables.digits(x) for x in (0, 0.01234, 0.5, 1, 1.234, 10, 12.34, 100, 123.4)] == [
        "0",
        "0.012",
        "0.500",
        "1.00",
        "1.23",
        "10.0",
        "12.3",
        "100",
        "123",
    ]
    assert tables.spread([3.0, 1.0, 2.0]) == "2.00 [1.00–3.00]"
    assert [tables.percent(x) for x in (0.12345, 1, None)] == ["12.35 %", "100.00 %", ""]
    assert tables.percent(0.746, 0) == "75 %"
    assert tables.other_load([0.02, 0.1]) == "Other processes used 0.10 cores."
    assert "unreliable" in tables.other_load([0.02, 0.11])
    table = tables.markdown(["a", "b", "c"], [[1, "", 2], [3, "", ""]])
    assert table.splitlines() == ["| a | c |", "| --- | --- |", "| 1 | 2 |", "| 3 |  |"]


# -- environment -------------------------------------------------------------------------------------------------------


def test_busy_ticks(tmp_path: Path) -> None:
    """User, nice, system, irq, softirq and steal of all cores; not idle, iowait, and guests, which count as user."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  1 20 300 4000 50000 600000 7000000 80000000 900000000 5\ncpu0 9 9 9 9 9 9 9 9 9 9\n")
    assert records._cpu_ticks(str(stat)) == 87600321
    assert records._cpu_ticks(str(tmp_path / "missing")) == 0


def test_memory_is_in_bytes(tmp_path: Path) -> None:
    """The kernel's "kB" are KiB."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       25165824 kB\nMemFree:         3 kB\nMemAvailable:    12582912 kB\nPages: 7\n")
    assert records._meminfo("MemTotal", str(meminfo)) == 24 << 30
    assert records._meminfo("MemAvailable", str(meminfo)) == 12 << 30
    assert records._meminfo("Mem", str(meminfo)) == records._meminfo("MemTotal", str(tmp_path / "missing")) == 0


def test_description_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        ("/proc/cpuinfo", "model name"): "CPU 1",
        ("/proc/cpuinfo", "cpu family"): "26",
        ("/proc/cpuinfo", "model"): "2",
        ("/proc/cpuinfo", "stepping"): "3",
        ("/proc/meminfo", "MemTotal"): "24641536 kB",
        ("/proc/meminfo", "MemAvailable"): "2048 kB",
    }
    monkeypatch.setattr(records, "_first_of", lambda path, field: files[path, field])
    monkeypatch.setattr(records, "os", SimpleNamespace(sched_getaffinity=lambda pid: {0, 1, 5}))
    monkeypatch.setattr(records, "_output", lambda *command: "GPU" if command[0] == "nvidia-smi" else None)
    assert records.hardware() == {
        "cpu": "CPU 1",
        "cpu_id": "cpu family 26 model 2 stepping 3",
        "cores": 3,
        "memory_gib": 23.5,
        "system": records.platform.platform(),
        "gpu": "GPU",
    }
    assert records.available_memory() == 2 << 20


def test_fields_of_a_file_have_exact_names(tmp_path: Path) -> None:
    (tmp_path / "info").write_text("model name\t: a : b\nmodel\t\t: 7\nmodel\t\t: 8\n")
    found = [records._first_of(str(tmp_path / "info"), field) for field in ("model name", "model", "name")]
    assert found == ["a : b", "7", ""]


def test_missing_programs_have_no_output() -> None:
    assert records._output("no-such-program-here") is None
    assert records._output("false") is None
    assert records._output("echo", " a b ") == "a b"


def test_other_work_is_not_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters with different resolutions may show less work of all processes than of this one."""
    clock = iter([100.0, 101.0])
    monkeypatch.setattr(records, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(records, "_cpu_ticks", lambda: 0)
    mine = iter([(1.0, 0.0, 0.0, 0.0, 0.0), (1.5, 0.0, 0.0, 0.0, 9.0)])
    monkeypatch.setattr(records, "os", SimpleNamespace(times=lambda: next(mine), sysconf=os.sysconf))
    assert records.OtherWork().cores() == 0.0


# -- files and figures -------------------------------------------------------------------------------------------------


def test_samples_of_a_row_are_rounded_to_a_ten_thousandth(tmp_path: Path) -> None:
    """The statistics are those of the samples in the file."""
    row = records.row({"a": 1}, {"step": [1.00004, 2.00006]}, {"b": 2})
    assert row == {
        "case": {"a": 1},
        "ms": {"step": [1.0, 2.0001]},
        "figures": {"step": records.figures([1.0, 2.0001])},
        "values": {"b": 2},
    }
    made = records.record("latency", [row, row], model={"name": "m"}, method={"threads": 2})
    records.write(made, tmp_path / "x.json")
    lines = (tmp_path / "x.json").read_text().splitlines()
    rows = [line for line in lines if line.startswith('  {"case":{"a":1},"ms":{"step":[1.0,2.0001]},"figures":{')]
    assert len(rows) == 2 and rows[0].endswith('"values":{"b":2}},') and rows[1].endswith('"values":{"b":2}}')


def test_figures_of_committed_results() -> None:
    """The statistics of every sample in the repository, computed by NumPy's nearest-rank method."""
    checked = 0
    for path in sorted(RESULTS.glob("*.json*")):
        content = path.read_bytes()
        for row in json.loads(gzip.decompress(content) if path.suffix == ".gz" else content).get("rows", []):
            for name, samples in row["ms"].items():
                if not samples:
                    continue
                ranked = np.percentile(samples, (50, 90, 95, 99), method="inverted_cdf").tolist()
                expected = {"n": len(samples), "avg": np.mean(samples), "min": min(samples), "max": max(samples)}
                expected |= dict(zip(("p50", "p90", "p95", "p99"), ranked, strict=True))
                assert row["figures"][name] == pytest.approx(expected), (path.name, row["case"], name)
                assert records.figures(samples) == row["figures"][name]
                checked += len(samples)
    assert checked > 100_000


def test_model_of_a_result(demo_bundle: Bundle) -> None:
    assert records.model_of(demo_bundle.manifest) == {"name": "demo", "layers": 8, "d_model": 128}


def test_head_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "commit", lambda: "abc")
    monkeypatch.setattr(records.sys, "orig_argv", ["python", "-m", "it", "a b"])
    made = records.record("cost", [], model={"name": "m"}, method={"threads": 2})
    assert list(made) == [
        *("schema", "benchmark", "command", "time", "commit", "hardware", "versions", "model", "method", "rows"),
    ]
    assert (made["benchmark"], made["command"], made["commit"]) == ("cost", "python -m it 'a b'", "abc")
    assert (made["model"], made["method"], made["rows"]) == ({"name": "m"}, {"threads": 2}, [])
    time = datetime.datetime.fromisoformat(made["time"].replace("Z", "+00:00"))
    assert abs((datetime.datetime.now(datetime.UTC) - time).total_seconds()) < 3600


def test_units_of_rates() -> None:
    assert tables.rates({"read (sum)": 12.4, "fp32 product": 99.6, "copy": 3000.0}) == (
        "read (sum) 12 GB/s; fp32 product 100 GFLOP/s; copy 3000 GB/s"
    )
    assert tables.rates({}) == "none"


def test_no_load_is_known() -> None:
    assert tables.other_load([]) == "Other processes used 0.00 cores."
