"""Reports, and the pages that are generated from result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the bench extra")

from nemostream.benchmarks import report
from nemostream.benchmarks.harness import records, tables
from nemostream.cli.main import _run
from nemostream.errors import OptionError

ROOT = Path(__file__).parents[2]


def test_pages_are_up_to_date() -> None:
    results = report.committed(ROOT)
    assert results, "there are no results"
    for path, text in report.pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: nemostream bench report --pages"


def test_a_damaged_result_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "another-schema.json").write_text('{"words": []}', encoding="utf-8")
    assert report.committed(tmp_path) == {}
    (folder / "damaged.json.gz").write_bytes(b"not gzip")
    with pytest.raises(OptionError, match=r"damaged\.json\.gz is not a benchmark result"):
        report.committed(tmp_path)


def test_plots_of_the_pages_exist() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", page)
    assert pictures and all((ROOT / "docs" / picture).is_file() for picture in pictures)


def some_result(*steps: float) -> records.Record:
    case = {"chunk_ms": 80, "batch": 1, "precision": "fp32", "backend": "cpu"}
    samples = {"step": list(steps) * 10, "push": [step + 1 for step in steps] * 10}
    roofline = {"memory": 0.5, "compute": 0.1, "roofline": 0.5, "bound_by": "memory"}
    row = records.row(case, samples, {"other_work_cores": 0.0, "launches": 3, "roofline_ms": roofline})
    method = {"device": "cpu", "threads": 1, "repeats": 10, "warm_up": 5, "machine": {"cpu": {"read": 10.0}}}
    return records.record("latency", [row], model={"name": "m", "layers": 1, "d_model": 2}, method=method)


def test_comparison_with_an_earlier_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.write(some_result(2.0), tmp_path / "new.json")
    records.write(some_result(1.0), tmp_path / "old.json")
    arguments = ["bench", "report", str(tmp_path / "new.json"), "--against", str(tmp_path / "old.json")]
    assert _run([*arguments, "--out", str(tmp_path / "out" / "r.md")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out" / "r.md").read_text()
    assert "| chunk_ms 80 batch 1 precision fp32 backend cpu | step, ms | 1.00 | 2.00 | 2.00 | **slower** |" in text
    assert "| 0.500, memory | 25 % |" in text  # the roofline of 0.5 ms is a quarter of 2 ms
    assert (tmp_path / "out" / "r-roofline.png").exists()


def test_times_changed_beyond_noise() -> None:
    old = some_result(10.0, 10.1, 9.9, 10.0, 10.2, 9.8)
    slower, same = some_result(12.0, 12.1, 11.9, 12.0, 12.2, 11.8), some_result(10.1, 10.0, 9.9, 10.1, 10.2, 9.9)
    noisy = some_result(5.0, 20.0, 12.0, 6.0, 30.0, 9.0)
    step = report.compare(slower, old)[0]
    assert (step.metric, step.before, step.after, step.verdict) == ("step, ms", 10.0, 12.0, "slower")
    assert report.compare(old, slower)[0].verdict == "faster"
    assert not any(change.significant for other in (same, noisy) for change in report.compare(other, old))
    twice = old | {"rows": [*old["rows"], *slower["rows"]]}  # as a failed probe of `capacity` that was repeated
    assert len(report.compare(twice, twice)) == 4
    assert not any(change.significant for change in report.compare(twice, twice))
    other_case = some_result(10.0)
    other_case["rows"][0]["case"]["batch"] = 2
    assert report.compare(other_case, old) == []
    assert "No comparable case" in report.changes(other_case, old)


def words(*errors: int) -> records.Record:
    """Utterances of ten words each."""
    values = {"wer": sum(errors) / (10 * len(errors)), "by_utterance": [[each, 10] for each in errors]}
    rows = [records.row({"set": "s", "chunk_ms": 80, "precision": "int8"}, {}, values)]
    return records.record("accuracy", rows, model={"name": "m"}, method={})


def test_words_changed_beyond_noise() -> None:
    old = words(*[1, 0, 2, 1] * 25)
    worse = report.compare(words(*[2, 1, 2, 1] * 25), old)
    assert [(change.metric, change.before, change.after, change.verdict) for change in worse] == [
        ("WER, %", pytest.approx(10.0), pytest.approx(15.0), "worse")
    ]
    assert report.compare(old, words(*[2, 1, 2, 1] * 25))[0].verdict == "better"
    # Differences that cancel, and one more error in a hundred utterances, are noise.
    assert report.compare(words(*[0, 1, 1, 2] * 25), old)[0].verdict == ""
    assert report.compare(words(*[1, 0, 2, 1] * 24, 1, 1, 2, 1), old)[0].verdict == ""
    assert report.compare(words(1, 0), old) == []  # other utterances
    assert "| set s chunk_ms 80 precision int8 | WER, % | 10.0 | 15.0 | 1.50 | **worse** |" in report.changes(
        words(*[2, 1, 2, 1] * 25), old
    )


def test_streams_changed_beyond_noise() -> None:
    def capacity_result(streams: int | None, chunk_ms: str = "560") -> records.Record:
        method = {"streams": streams, "chunk_ms": chunk_ms, "precision": "fp32"}
        return records.record("capacity", [], model={"name": "m"}, method=method)

    assert [c.verdict for c in report.compare(capacity_result(120), capacity_result(100))] == ["better"]
    assert [c.verdict for c in report.compare(capacity_result(80), capacity_result(100))] == ["worse"]
    assert [c.verdict for c in report.compare(capacity_result(108), capacity_result(100))] == [""]
    assert (
        report.compare(capacity_result(None), capacity_result(100))
        == report.compare(capacity_result(9), capacity_result(9, "80"))
        == []
    )


def test_merge() -> None:
    """Runs of one benchmark on one machine are merged; another machine or number of repeats is a separate result."""
    first, second, other_machine, longer = (some_result(2.0) for _ in range(4))
    second["method"]["machine"] = {"cpu": {"read": 11.0}}
    other_machine["hardware"] = other_machine["hardware"] | {"cores": 999}
    longer["method"]["repeats"] = 99
    found = report.merge([first, second, other_machine, longer])
    assert [len(result["rows"]) for result in found] == [2, 1, 1]
    assert len(first["rows"]) == 1 and found[0]["method"]["machine"] == first["method"]["machine"]


def test_different_machine_is_reported() -> None:
    new, old = some_result(2.0), some_result(2.0)
    assert "differs" not in report.changes(new, old)
    old["hardware"] = old["hardware"] | {"cores": 999}
    old["model"] = {"name": "another"}
    text = report.changes(new, old)
    assert "The hardware differs" in text and "The model differs" in text


def test_committed_results_were_measured_without_other_load() -> None:
    """By their own record of the load by other processes."""
    for name, result in report.committed(ROOT).items():
        busy = [row["values"]["other_work_cores"] for row in result["rows"] if "other_work_cores" in row["values"]]
        busy += [result["method"]["other_work_cores"]] if "other_work_cores" in result["method"] else []
        assert max(busy, default=0.0) <= tables.MAX_OTHER_CORES, name


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        _run(["bench", "report"])
    assert exit_info.value.code == OptionError.exit_code
    assert "nothing to report: give RESULT files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "short"),
    [
        ("/usr/bin/python3 -m nemostream.benchmarks.latency --bundle /me/b", "nemostream bench latency --bundle b"),
        ("python -m nemostream.benchmarks.studies.cost -b 3", "python -m nemostream.benchmarks.studies.cost -b 3"),
        ("/x/python /x/bin/nemostream bench cost --hours 1", "nemostream bench cost --hours 1"),
    ],
)
def test_short_command(command: str, short: str) -> None:
    assert report.short_command(command) == short


def test_plots_are_reproducible(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        report.write_report([some_result(2.0)], tmp_path / folder / "x.md")
    for name in ("x-roofline.png", "x-roofline.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
