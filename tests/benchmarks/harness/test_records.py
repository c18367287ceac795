"""Statistics of the benchmarks compared with examples computed by hand, and result files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream.benchmarks.harness import records, tables
from nemostream.errors import OptionError


def test_percentiles_are_samples() -> None:
    hundred = [float(number) for number in range(100, 0, -1)]
    assert [records.percentile(hundred, p) for p in (50, 90, 95, 99, 100)] == [50, 90, 95, 99, 100]
    assert [records.percentile([3.0, 1.0, 2.0], p) for p in (1, 33, 34, 50, 66, 67, 99)] == [1, 1, 2, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="no samples"):
        records.percentile([], 50)


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


def test_other_work_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 <= records.OtherWork().cores() <= 1024
    assert records.available_memory() >= 0
    # Two cores are busy for ten seconds; this process and its children use eight seconds of them.
    ticks, clock = os.sysconf("SC_CLK_TCK"), iter([100.0, 110.0])
    monkeypatch.setattr(records.time, "perf_counter", lambda: next(clock))
    busy = iter([1000 * ticks, 1020 * ticks])
    monkeypatch.setattr(records, "_cpu_ticks", lambda: next(busy))
    mine = iter([(1.0, 0.0, 0.0, 0.0, 0.0), (5.0, 1.0, 2.0, 1.0, 0.0)])
    monkeypatch.setattr(records.os, "times", lambda: next(mine))
    assert records.OtherWork().cores() == pytest.approx((20 - 8) / 10)


def test_commit_of_own_checkout_only(tmp_path: Path) -> None:
    """The commit is that of a nemostream checkout, also of a package installed in it, not of another project."""
    for project, folder in (("ours", "benchmarks"), ("theirs", "source")):
        top = tmp_path / project
        (top / folder).mkdir(parents=True)
        (top / folder / "record.py").write_text("")
        installed = top / ".venv" / "lib" / "nemostream" / "benchmarks" / "record.py"
        installed.parent.mkdir(parents=True)
        installed.write_text("")
        git = ["git", "-C", str(top), "-c", "user.name=n", "-c", "user.email=e@x"]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", folder], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    head = subprocess.run(
        ["git", "-C", str(tmp_path / "ours"), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    nested = Path(".venv") / "lib" / "nemostream" / "benchmarks" / "record.py"
    assert records.commit(tmp_path / "ours" / "benchmarks" / "record.py") == head
    assert records.commit(tmp_path / "ours" / nested) == head
    assert records.commit(tmp_path / "theirs" / nested) is None
    assert records.commit(tmp_path / "record.py") is None


def test_tables() -> None:
    assert [tables.digits(x) for x in (0, 0.01234, 0.5, 1.234, 12.34, 123.4)] == [
        "0",
        "0.012",
        "0.500",
        "1.23",
        "12.3",
        "123",
    ]
    assert tables.spread([3.0, 1.0, 2.0]) == "2.00 [1.00–3.00]"
    assert [tables.percent(x) for x in (0.12345, 1, None)] == ["12.35 %", "100.00 %", ""]
    assert tables.percent(0.746, 0) == "75 %"
    assert tables.other_load([0.02, 0.1]) == "Other processes used 0.10 cores."
    assert "unreliable" in tables.other_load([0.02, 0.11])
    table = tables.markdown(["a", "b", "c"], [[1, "", 2], [3, "", ""]])
    assert table.splitlines() == ["| a | c |", "| --- | --- |", "| 1 | 2 |", "| 3 |  |"]
