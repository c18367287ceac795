"""The arithmetic that all benchmarks share, against cases worked out by hand, and result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream.benchmarks import record, tables
from nemostream.errors import OptionError


def test_percentiles_are_samples() -> None:
    hundred = [float(number) for number in range(100, 0, -1)]
    assert [record.percentile(hundred, p) for p in (50, 90, 95, 99, 100)] == [50, 90, 95, 99, 100]
    assert [record.percentile([3.0, 1.0, 2.0], p) for p in (1, 33, 34, 50, 66, 67, 99)] == [1, 1, 2, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="no samples"):
        record.percentile([], 50)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from(record.PERCENTILES))
def test_percentile_by_its_definition(samples: list[float], percent: int) -> None:
    found = record.percentile(samples, percent)
    assert found in samples
    assert 100 * sum(sample <= found for sample in samples) >= percent * len(samples)
    assert all(
        100 * sum(other <= each for other in samples) < percent * len(samples) for each in samples if each < found
    )


def test_figures() -> None:
    found = record.figures([1.0, 2.0, 3.0, 6.0])
    assert found == {"n": 4, "avg": 3.0, "p50": 2.0, "p90": 6.0, "p95": 6.0, "p99": 6.0, "min": 1.0, "max": 6.0}
    assert record.rtfx(90.0, 1.5) == 60.0


def test_agreement() -> None:
    assert record.agreement([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1.0
    assert record.agreement([[1, 2, 3, 4]], [[1, 9, 3, 4]]) == 0.75
    assert record.agreement([[1, 2, 3], [5]], [[2, 3], []]) == 0.5
    assert record.agreement([[]], [[]]) == 1.0


def result(**ms: list[float]) -> record.Record:
    rows = [record.row({"chunk_ms": 80, "batch": 1}, ms)]
    return record.record("latency", rows, model={"name": "m"}, method={})


def test_a_file_and_back(tmp_path: Path) -> None:
    made = result(step=[1.0, 2.0], none=[])
    record.write(made, tmp_path / "deep" / "x.json")
    assert record.read(tmp_path / "deep" / "x.json") == made == json.loads(json.dumps(made))
    assert made["schema"] == record.SCHEMA and made["hardware"]["cores"] >= 1
    assert {"python", "numpy", "onnxruntime"} <= made["versions"].keys()
    assert made["rows"][0]["figures"]["step"]["p50"] == 1.0 and "none" not in made["rows"][0]["figures"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "another/1"}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(OptionError, match="is not a benchmark's result"):
        record.read(tmp_path / "x.json")
    with pytest.raises(OptionError, match="is not a benchmark's result"):
        record.read(tmp_path / "missing.json")


def test_changes_beyond_noise() -> None:
    old = result(step=[10.0, 10.1, 9.9, 10.0, 10.2, 9.8] * 5)
    slower = result(step=[12.0, 12.1, 11.9, 12.0, 12.2, 11.8] * 5)
    alike = result(step=[10.1, 10.0, 9.9, 10.1, 10.2, 9.9] * 5)
    wild = result(step=[5.0, 20.0, 12.0, 6.0, 30.0, 9.0])
    (found,) = record.compare(slower, old)
    assert found["beyond_noise"] and found["ratio"] == pytest.approx(1.2)
    assert (found["before"], found["now"]) == (10.0, 12.0)
    assert [each["beyond_noise"] for each in record.compare(alike, old)] == [False]
    assert [each["beyond_noise"] for each in record.compare(wild, old)] == [False]
    assert record.compare(result(other=[1.0]), old) == []


def test_other_work_is_seen() -> None:
    assert 0 <= record.OtherWork().cores() <= 1024
    assert record.available_memory() >= 0


def test_tables() -> None:
    assert [tables.digits(x) for x in (0, 0.01234, 0.5, 1.234, 12.34, 123.4)] == [
        "0", "0.012", "0.500", "1.23", "12.3", "123",
    ]  # fmt: skip
    assert tables.spread([3.0, 1.0, 2.0]) == "2.00 [1.00–3.00]"
    table = tables.markdown(["a", "b", "c"], [[1, "", 2], [3, "", ""]])
    assert table.splitlines() == ["| a | c |", "| --- | --- |", "| 1 | 2 |", "| 3 |  |"]
