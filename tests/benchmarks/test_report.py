"""Reports and the pages that quote results: written from the files, and nothing typed by hand."""

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


def test_pages_are_what_the_results_say() -> None:
    results = report.committed(ROOT)
    assert results, "no results are kept"
    for path, text in report.pages(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: nemostream bench report --pages"


def test_pictures_of_the_pages_are_there() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", page)
    assert pictures and all((ROOT / "docs" / picture).is_file() for picture in pictures)


def some_result(*steps: float) -> records.Record:
    case = {"chunk_ms": 80, "batch": 1, "precision": "fp32", "backend": "cpu"}
    samples = {"step": list(steps) * 10, "push": [step + 1 for step in steps] * 10}
    floor = {"memory": 0.5, "compute": 0.1, "floor": 0.5, "binding": "memory"}
    row = records.row(case, samples, {"other_work_cores": 0.0, "launches": 3, "floor_ms": floor})
    method = {"device": "cpu", "threads": 1, "repeats": 10, "warm_up": 5, "machine": {"cpu": {"read": 10.0}}}
    return records.record("latency", [row], model={"name": "m", "layers": 1, "d_model": 2}, method=method)


def test_against_an_earlier_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.write(some_result(2.0), tmp_path / "new.json")
    records.write(some_result(1.0), tmp_path / "old.json")
    arguments = ["bench", "report", str(tmp_path / "new.json"), "--against", str(tmp_path / "old.json")]
    assert _run([*arguments, "--out", str(tmp_path / "out" / "r.md")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out" / "r.md").read_text()
    assert "| chunk_ms 80 batch 1 precision fp32 backend cpu | step, ms | 1.00 | 2.00 | 2.00 | **slower** |" in text
    assert "| 0.500, memory | 25 % |" in text  # the floor of 0.5 ms, of which 2 ms reach a quarter
    assert (tmp_path / "out" / "r-breakdown.png").exists()


def test_times_changed_beyond_noise() -> None:
    old = some_result(10.0, 10.1, 9.9, 10.0, 10.2, 9.8)
    slower, alike = some_result(12.0, 12.1, 11.9, 12.0, 12.2, 11.8), some_result(10.1, 10.0, 9.9, 10.1, 10.2, 9.9)
    wild = some_result(5.0, 20.0, 12.0, 6.0, 30.0, 9.0)
    step = report.compare(slower, old)[0]
    assert (step.what, step.before, step.now, step.verdict) == ("step, ms", 10.0, 12.0, "slower")
    assert report.compare(old, slower)[0].verdict == "faster"
    assert not any(change.beyond_noise for other in (alike, wild) for change in report.compare(other, old))
    elsewhere = some_result(10.0)
    elsewhere["rows"][0]["case"]["batch"] = 2
    assert report.compare(elsewhere, old) == []
    assert "No case" in report.changes(elsewhere, old)


def words(*errors: int) -> records.Record:
    """Utterances of ten words each."""
    values = {"wer": sum(errors) / (10 * len(errors)), "by_utterance": [[each, 10] for each in errors]}
    rows = [records.row({"set": "s", "chunk_ms": 80, "precision": "int8"}, {}, values)]
    return records.record("accuracy", rows, model={"name": "m"}, method={})


def test_words_changed_beyond_noise() -> None:
    old = words(*[1, 0, 2, 1] * 25)
    worse = report.compare(words(*[2, 1, 2, 1] * 25), old)
    assert [(change.what, change.before, change.now, change.verdict) for change in worse] == [
        ("WER, %", pytest.approx(10.0), pytest.approx(15.0), "worse")
    ]
    assert report.compare(old, words(*[2, 1, 2, 1] * 25))[0].verdict == "better"
    # As many more wrong here as fewer there, and one more in a hundred: that is noise.
    assert report.compare(words(*[0, 1, 1, 2] * 25), old)[0].verdict == ""
    assert report.compare(words(*[1, 0, 2, 1] * 24, 1, 1, 2, 1), old)[0].verdict == ""
    assert report.compare(words(1, 0), old) == []  # other utterances
    assert "| set s chunk_ms 80 precision int8 | WER, % | 10.0 | 15.0 | 1.50 | **worse** |" in report.changes(
        words(*[2, 1, 2, 1] * 25), old
    )


def test_streams_changed_beyond_noise() -> None:
    def holding(streams: int | None, chunk_ms: str = "560") -> records.Record:
        method = {"streams": streams, "chunk_ms": chunk_ms, "precision": "fp32"}
        return records.record("capacity", [], model={"name": "m"}, method=method)

    assert [c.verdict for c in report.compare(holding(120), holding(100))] == ["better"]
    assert [c.verdict for c in report.compare(holding(80), holding(100))] == ["worse"]
    assert [c.verdict for c in report.compare(holding(108), holding(100))] == [""]
    assert report.compare(holding(None), holding(100)) == report.compare(holding(9), holding(9, "80")) == []


def test_runs_that_belong_together() -> None:
    """A benchmark run in pieces on one machine is one; another machine or number of rounds is another."""
    first, second, elsewhere, longer = (some_result(2.0) for _ in range(4))
    second["method"]["machine"] = {"cpu": {"read": 11.0}}
    elsewhere["hardware"] = elsewhere["hardware"] | {"cores": 999}
    longer["method"]["repeats"] = 99
    found = report.together([first, second, elsewhere, longer])
    assert [len(result["rows"]) for result in found] == [2, 1, 1]
    assert len(first["rows"]) == 1 and found[0]["method"]["machine"] == first["method"]["machine"]


def test_another_machine_is_told() -> None:
    new, old = some_result(2.0), some_result(2.0)
    assert "another" not in report.changes(new, old)
    old["hardware"] = old["hardware"] | {"cores": 999}
    old["model"] = {"name": "another"}
    told = report.changes(new, old)
    assert "The hardware is another" in told and "The model is another" in told


def test_committed_results_were_measured_in_peace() -> None:
    """On a machine that did little else, each by its own account."""
    for name, result in report.committed(ROOT).items():
        busy = [row["values"]["other_work_cores"] for row in result["rows"] if "other_work_cores" in row["values"]]
        busy += [result["method"]["other_work_cores"]] if "other_work_cores" in result["method"] else []
        assert max(busy, default=0.0) <= tables.QUIET, name


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        _run(["bench", "report"])
    assert left.value.code == OptionError.exit_code
    assert "give the RESULT files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("/usr/bin/python3 -m nemostream.benchmarks.latency --bundle /me/b", "nemostream bench latency --bundle b"),
        ("/x/python /x/bin/nemostream bench cost --hours 1", "nemostream bench cost --hours 1"),
    ],
)
def test_commands_are_shown_without_folders(command: str, wanted: str) -> None:
    assert report.shown(command) == wanted


def test_plots_are_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        report.write_report([some_result(2.0)], tmp_path / folder / "x.md")
    for name in ("x-breakdown.png", "x-breakdown.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
