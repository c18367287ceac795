"""Reports and the pages that quote results: written from the files, and nothing typed by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the bench extra")

from nemostream.benchmarks import record, report
from nemostream.cli import _run
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


def some_result(step: float) -> record.Record:
    case = {"chunk_ms": 80, "batch": 1, "precision": "fp32"}
    samples = {"step": [step] * 10, "push": [step + 1] * 10}
    row = record.row(case, samples, {"other_work_cores": 0.0, "launches": 3})
    method = {"device": "cpu", "threads": 1, "repeats": 10, "machine": {"read": 10.0}}
    return record.record("latency", [row], model={"name": "m", "layers": 1, "d_model": 2}, method=method)


def test_against_an_earlier_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.write(some_result(2.0), tmp_path / "new.json")
    record.write(some_result(1.0), tmp_path / "old.json")
    arguments = ["bench", "report", str(tmp_path / "new.json"), "--against", str(tmp_path / "old.json")]
    assert _run([*arguments, "--out", str(tmp_path / "out" / "r.md")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out" / "r.md").read_text()
    assert "| chunk_ms 80 batch 1 precision fp32 | step | 1.00 | 2.00 | 2.00 | **slower** |" in text
    assert (tmp_path / "out" / "r-breakdown.png").exists()


def test_another_machine_is_told() -> None:
    new, old = some_result(2.0), some_result(2.0)
    assert "another" not in report.changes(new, old)
    old["hardware"] = old["hardware"] | {"cores": 999}
    old["model"] = {"name": "another"}
    told = report.changes(new, old)
    assert "The hardware is another" in told and "The model is another" in told


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
)  # fmt: skip
def test_commands_are_shown_without_folders(command: str, wanted: str) -> None:
    assert report.shown(command) == wanted


def test_plots_are_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        report.write_report([some_result(2.0)], tmp_path / folder / "x.md")
    for name in ("x-breakdown.png", "x-breakdown.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
