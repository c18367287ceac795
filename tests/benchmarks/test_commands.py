"""Options of the command lines: each reaches the measurement, and the defaults are those that the help shows."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nemostream
from nemostream.benchmarks import command, module_name, report
from nemostream.benchmarks.harness import records
from nemostream.errors import BackendError, OptionError

pytest.importorskip("matplotlib", reason="needs the bench extra")
pytest.importorskip("onnx", reason="needs the build extra")

DEFAULTS: dict[str, dict[str, Any]] = {
    "accuracy": {
        "sets": ["packaged"],
        "precisions": ["fp32"],
        "chunk_ms": None,
        "normalise": "english",
        "checkpoint": None,
        "device": "cpu",
        "threads": None,
    },
    "capacity": {
        "precision": "fp32",
        "chunk_ms": [560],
        "seconds": 180.0,
        "probe_seconds": 15.0,
        "max_streams": 512,
        "max_batch": 64,
        "simulate_realtime": None,
        "device": "cpu",
        "threads": None,
        "engines": None,
    },
    "cost": {
        "precision": "fp32",
        "batches": [1, 2, 4, 8, 16],
        "chunk_ms": None,
        "hours": 1.0,
        "repeats": 20,
        "device": "cpu",
        "threads": None,
        "engines": None,
    },
    "finals": {
        "utterances": 1,
        "modes": ["80", "160", "560", "1120", "80+560", "80+1120", "160+1120"],
        "noise": False,
        "normalise": "english",
        "precision": "fp32",
        "device": "cpu",
        "threads": None,
        "engines": None,
    },
    "lanes": {
        "precision": "fp32",
        "batches": [1, 8, 64],
        "chunk_ms": 80,
        "final_chunk_ms": 1120,
        "capacity": False,
        "seconds": 60.0,
        "probe_seconds": 8.0,
        "max_streams": 512,
        "random_weights": False,
        "device": "cpu",
        "threads": None,
        "engines": None,
    },
    "host": {
        "streams": 2400,
        "chunk_ms": [80, 160, 560],
        "max_batch": 256,
        "sweeps": 100,
        "asynchronous": True,
        "protocols": ["websocket", "riva", "realtime"],
        "transports": [0, 1],
        "clients": 200,
        "max_clients": 2400,
        "seconds": 5.0,
        "step_ms": 5.0,
        "generators": 1,
        "options": [],
    },
    "latency": {
        "precisions": ["fp32"],
        "batches": [1, 4, 16],
        "chunk_ms": None,
        "repeats": 50,
        "devices": ["cpu"],
        "threads": None,
        "engines": None,
    },
    "quick": {"repeats": 30, "device": "cpu", "engines": None},
    "serve": {
        "streams": [50, 100, 200],
        "chunk_ms": 560,
        "seconds": 60.0,
        "packet_ms": 100,
        "manifest": None,
        "options": [],
    },
    "survival": {
        "streams": 60,
        "seconds": 120.0,
        "servers": 3,
        "chunk_ms": 560,
        "faults": ["kill", "terminate", "freeze", "cut", "full", "slow"],
        "seed": 0,
        "direct": False,
    },
    "throughput": {
        "sources": 32 * 2,
        "precisions": ["fp32"],
        "batches": [1, 8, 32],
        "chunk_ms": None,
        "repeats": 3,
        "device": "cpu",
        "threads": None,
        "engines": None,
    },
}
# Options, and what they change.
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "accuracy": (
        "--manifest a/b.jsonl --precision int8 fp32 --chunk-ms 80 --normalizer basic --checkpoint c.nemo --threads 3",
        {
            "sets": ["b"],
            "precisions": ["int8", "fp32"],
            "chunk_ms": [80],
            "normalise": "basic",
            "checkpoint": Path("c.nemo"),
            "threads": 3,
        },
    ),
    "capacity": (
        "--precision int8 --chunk-ms 80 560 --seconds 2.5 --probe-seconds 1.5 --max-streams 7 --max-batch 5 "
        "--simulate_realtime 9 --device cuda --threads 3 --engines e",
        {
            "precision": "int8",
            "chunk_ms": [80, 560],
            "seconds": 2.5,
            "probe_seconds": 1.5,
            "max_streams": 7,
            "max_batch": 5,
            "simulate_realtime": 9,
            "device": "cuda",
            "threads": 3,
            "engines": Path("e"),
        },
    ),
    "cost": (
        "--precision int8 --batch 1 3 --chunk-ms 80 --hours 0.5 --repeats 7 --device cuda --threads 3 --engines e",
        {
            "precision": "int8",
            "batches": [1, 3],
            "chunk_ms": [80],
            "hours": 0.5,
            "repeats": 7,
            "device": "cuda",
            "threads": 3,
            "engines": Path("e"),
        },
    ),
    "finals": (
        "--manifest m.jsonl --mode 80 80+560 --noise --normalizer basic --precision int8 --device cuda --threads 3 "
        "--engines e",
        {
            "utterances": 2,
            "modes": ["80", "80+560"],
            "noise": True,
            "normalise": "basic",
            "precision": "int8",
            "device": "cuda",
            "threads": 3,
            "engines": Path("e"),
        },
    ),
    "lanes": (
        "--precision int8 --batch 1 3 --chunk-ms 160 --final-chunk-ms 560 --capacity --seconds 2.5 --probe-seconds 1.5 "
        "--max-streams 7 --random-weights --device cuda --threads 3 --engines e",
        {
            "precision": "int8",
            "batches": [1, 3],
            "chunk_ms": 160,
            "final_chunk_ms": 560,
            "capacity": True,
            "seconds": 2.5,
            "probe_seconds": 1.5,
            "max_streams": 7,
            "random_weights": True,
            "device": "cuda",
            "threads": 3,
            "engines": Path("e"),
        },
    ),
    "host": (
        "--streams 3 --chunk-ms 560 --max-batch 2 --sweeps 4 --synchronous --protocols riva --clients 5 "
        "--max-clients 6 --seconds 1.5 --step-ms 2.5 --generators 3 --transports 2 0 --threads 3",
        {
            "streams": 3,
            "chunk_ms": [560],
            "max_batch": 2,
            "sweeps": 4,
            "asynchronous": False,
            "protocols": ["riva"],
            "transports": [2, 0],
            "clients": 5,
            "max_clients": 6,
            "seconds": 1.5,
            "step_ms": 2.5,
            "generators": 3,
            "options": ["--threads", "3"],  # of the server
        },
    ),
    "latency": (
        "--precision int8 fp16 --batch 1 3 --chunk-ms 80 --repeats 7 --device cpu cuda --threads 3 --engines e",
        {
            "precisions": ["int8", "fp16"],
            "batches": [1, 3],
            "chunk_ms": [80],
            "repeats": 7,
            "devices": ["cpu", "cuda"],
            "threads": 3,
            "engines": Path("e"),
        },
    ),
    "quick": (
        "--device cuda --engines e --repeats 7",
        {"repeats": 7, "device": "cuda", "engines": Path("e")},
    ),
    "serve": (
        "--streams 3 4 --chunk-ms 80 --seconds 5.5 --packet-ms 20 --manifest m.jsonl --threads 3",
        {
            "streams": [3, 4],
            "chunk_ms": 80,
            "seconds": 5.5,
            "packet_ms": 20,
            "manifest": Path("m.jsonl"),
            "options": ["--threads", "3"],  # of the server
        },
    ),
    "survival": (
        "--streams 3 --seconds 5.5 --servers 2 --chunk-ms 80 --faults cut kill --seed 4 --direct",
        {
            "streams": 3,
            "seconds": 5.5,
            "servers": 2,
            "chunk_ms": 80,
            "faults": ["cut", "kill"],
            "seed": 4,
            "direct": True,
        },
    ),
    "throughput": (
        "--copies 3 --repeats 7 --precision int8 --batch 2 5 --chunk-ms 80 --device cuda --threads 3 --engines e",
        {
            "sources": 3 * 2,
            "precisions": ["int8"],
            "batches": [2, 5],
            "chunk_ms": [80],
            "repeats": 7,
            "device": "cuda",
            "threads": 3,
            "engines": Path("e"),
        },
    ),
}
MEASURES = {"serve": "measure_serving"}


def called(module: Any, measure: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments of the measurement by name when the command runs."""
    found: dict[str, Any] = {}
    signature = inspect.signature(getattr(module, measure))

    def capture(*given: Any, **options: Any) -> records.Record:
        found.update(signature.bind(*given, **options).arguments)
        return {"benchmark": "x", "rows": []}

    def run(measure: Callable[[], Any], options: Any, display: Any = None) -> Any:
        result = measure()
        found["out"], found["name"] = options.out, options.name
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, measure, capture)
        for target in (module, command):
            if hasattr(target, "run"):
                patch.setattr(target, "run", run)
        module.main(arguments)
    return found


@pytest.mark.parametrize("name", [*DEFAULTS, "baseline", "report", "features", "boosting", "transcripts"])
def test_help_explains_the_command_and_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each option has a help text, which states the default at most once."""
    module = import_module(module_name(name))
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        module.main(["--help"])
    assert exit_info.value.code == 0
    usage, summary, *groups = capsys.readouterr().out.split("\n\n")
    assert summary == inspect.getdoc(module).partition("\n")[0]  # type: ignore[union-attr]
    # Names and arguments of an option; its help text follows after two spaces, or on the next line.
    entries = re.findall(r"^  (\S.*(?:\n {4,}.*)*)", "\n".join(groups), re.MULTILINE)
    options = [re.split(r" {2,}|\n *", entry.strip(), maxsplit=1) for entry in entries]
    assert {option.split()[0] for option, *_ in options} > set(re.findall("--[a-z_-]+", usage))
    assert [option for option, *text in options if not text] == []
    assert all(text.count("(default: ") < 2 and "None" not in text for _, text in options)


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("changed", [False, True])
def test_options_reach_the_measurement(name: str, changed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(module_name(name))
    expected, arguments = dict(DEFAULTS[name]), []
    if changed:
        line, changes = CHANGED[name]
        assert set(changes) <= set(expected)
        expected |= changes
        arguments = [*line.split(), "--out", "o", "--name", "n", "--bundle", str(nemostream.demo_bundle())]
    if hasattr(module, "read_manifest"):
        recordings = [SimpleNamespace()] * (2 if name == "finals" else 1)
        monkeypatch.setattr(module, "read_manifest", lambda path: recordings)
    found = called(module, MEASURES.get(name, f"measure_{name}"), arguments, monkeypatch)
    assert found["bundle"].manifest.name == "demo"
    assert found["progress"] is records.report_progress
    if "sets" in found:
        found["sets"] = list(found["sets"])
    for recordings_name in ("sources", "utterances"):
        if recordings_name in found:
            found[recordings_name] = len(found[recordings_name])
    assert {key: found[key] for key in expected} == expected
    assert found["out"] == (Path("o") if changed else Path("bench-results"))
    assert found["name"] == ("n" if changed else name)


def test_sets_of_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Manifests are limited, data sets have their limit, and engines for a CPU are temporary."""
    accuracy = import_module(module_name("accuracy"))
    monkeypatch.setattr(accuracy, "read_manifest", lambda path: [path.parent.name, "b", "c"])
    monkeypatch.setattr(accuracy, "Hub", lambda name, limit: (name, limit))
    line = ["--manifest", "x/one.jsonl", "y/two.jsonl", "--dataset", "ami", "--limit", "2"]
    found = called(accuracy, "measure_accuracy", line, monkeypatch)
    assert found["sets"] == {"one": ["x", "b"], "two": ["y", "b"], "ami": ("ami", 2)}
    assert found["engines"].name.startswith("nemostream-") and not found["engines"].exists()
    assert called(accuracy, "measure_accuracy", ["--device", "cuda"], monkeypatch)["engines"] is None
    given = called(accuracy, "measure_accuracy", ["--engines", str(tmp_path)], monkeypatch)
    assert given["engines"] == tmp_path


def test_recordings_of_a_throughput_command(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = import_module(module_name("throughput"))
    recordings = {Path("m.jsonl"): [SimpleNamespace(source=lambda rate: f"source at {rate}")] * 3}
    monkeypatch.setattr(throughput, "read_manifest", recordings.__getitem__)
    found = called(throughput, "measure_throughput", ["--manifest", "m.jsonl"], monkeypatch)
    assert found["sources"] == ["source at 16000"] * 3


def test_options_of_the_baseline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = import_module(module_name("baseline"))
    calls: list[Any] = []

    def prepared(checkpoint: Any, bundle: Any, progress: Any) -> Any:
        calls.append((checkpoint, bundle))
        return contextlib.nullcontext(("checkpoint", "bundle"))

    monkeypatch.setattr(baseline, "prepared", prepared)
    monkeypatch.setattr(baseline, "_default_device", lambda: "cuda")
    found = called(baseline, "compare_steps", [], monkeypatch)
    assert found == {
        "bundle": "bundle",
        "checkpoint": "checkpoint",
        "runners": None,
        "batches": [1, 8],
        "chunk_ms": None,
        "repeats": 15,
        "threads": None,
        "device": "cuda",
        "engines": None,
        "progress": records.report_progress,
        "out": Path("bench-results"),
        "name": "baseline",
    }
    line = "--checkpoint c --bundle b --batch 2 --chunk-ms 80 --repeats 3 --threads 4 --device cpu --engines e"
    found = called(baseline, "compare_steps", [*line.split(), "--runners", "a b", "c"], monkeypatch)
    assert calls == [(None, None), (Path("c"), Path("b"))]
    changed = {"runners": ["a b", "c"], "batches": [2], "chunk_ms": [80], "repeats": 3, "threads": 4, "device": "cpu"}
    assert {key: found[key] for key in changed} == changed and found["engines"] == Path("e")
    with pytest.raises(SystemExit):
        baseline.main(["--bundle", "b"])
    assert "--bundle needs --checkpoint" in capsys.readouterr().err


def test_options_of_studies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The result and its table are written into the folder, with the given name."""
    written: list[Any] = []

    def write_study(result: Any, table: str, options: Any) -> None:
        written.append((table, options.out, options.name))

    monkeypatch.setattr(command, "write_study", write_study)
    features = import_module(module_name("features"))
    boosting = import_module(module_name("boosting"))
    for module in (features, boosting):
        monkeypatch.setattr(module, "table", lambda result: f"table of {result['benchmark']}")
    found = called(features, "measure_features", [], monkeypatch)
    defaults = {"batch": 64, "ms": 560, "steps": 30, "threads": None, "random_weights": False}
    assert {key: found[key] for key in defaults} == defaults and found["progress"] is records.report_progress
    line = "--random-weights --batch 3 --chunk-ms 80 --steps 4 --threads 2 --name n --out o"
    found = called(features, "measure_features", line.split(), monkeypatch)
    changed = {"batch": 3, "ms": 80, "steps": 4, "threads": 2, "random_weights": True}
    assert {key: found[key] for key in changed} == changed
    found = called(boosting, "measure_boosting", ["--manifest", "m"], monkeypatch)
    defaults = {"manifest": Path("m"), "weights": [0.5, 1.0, 2.0, 4.0], "ms": 560, "phrase_file": None}
    assert {key: found[key] for key in defaults} == defaults and found["progress"] is records.report_progress
    line = "--manifest m --phrases p --weight 3 --chunk-ms 80 --name n --out o"
    found = called(boosting, "measure_boosting", line.split(), monkeypatch)
    assert (found["weights"], found["ms"], found["phrase_file"]) == ([3.0], 80, Path("p"))
    folder = Path("bench-results")
    assert written == [
        ("table of x", folder, "features"),
        ("table of x", Path("o"), "n"),
        ("table of x", folder, "boosting"),
        ("table of x", Path("o"), "n"),
    ]


def test_recordings_of_the_transcripts_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result, its tables and its plot are written; the tables are printed."""
    from nemostream.benchmarks.studies import transcripts

    loaded: list[Any] = []

    def load(bundle: Any, **options: Any) -> Any:
        loaded.append((bundle, options["threads"]))
        return contextlib.nullcontext("model")

    result = records.read(report.ROOT / "benchmarks" / "results" / "transcripts-demo-cpu-2-cores.json")

    def measure(model: Any, manifest: Path, progress: Any) -> records.Record:
        assert (model, manifest, progress) == ("model", Path("m.jsonl"), records.report_progress)
        return result

    monkeypatch.setattr(nemostream, "load", load)
    monkeypatch.setattr(transcripts, "measure_transcripts", measure)
    transcripts.main(["--manifest", "m.jsonl", "--out", str(tmp_path / "new"), "--name", "n"])
    transcripts.main(["--manifest", "m.jsonl", "--out", str(tmp_path), "--bundle", "b", "--threads", "3"])
    assert loaded == [(None, None), (Path("b"), 3)]
    assert records.read(tmp_path / "new" / "n.json") == records.read(tmp_path / "transcripts.json") == result
    text = (tmp_path / "new" / "n.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text + (tmp_path / "transcripts.md").read_text(encoding="utf-8")
    assert "expected calibration error" in text and (tmp_path / "new" / "n-reliability.png").exists()


def test_files_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = records.record("features", [], model={}, method={})
    options: Any = SimpleNamespace(out=tmp_path / "new", name="n")
    command.write_study(result, "a table\n", options)
    assert records.read(tmp_path / "new" / "n.json") == result
    assert (tmp_path / "new" / "n.md").read_text() == capsys.readouterr().out == "a table\n"


def test_files_of_a_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = records.record("latency", [], model={}, method={})
    options: Any = SimpleNamespace(out=tmp_path, name="n")
    written = [tmp_path / "n.md", tmp_path / "n-steps.png"]
    monkeypatch.setattr(command, "write_report", lambda results, path: (f"{len(results)} {path.name}\n", written))
    assert command.run(lambda: result, options) is result
    captured = capsys.readouterr()
    assert captured.out == "1 n.md\n"
    assert captured.err == f"\nwritten: {tmp_path / 'n.json'}, n.md, n-steps.png\n"
    assert command.run(lambda: result, options, lambda shown: print(shown["benchmark"])) is result
    assert capsys.readouterr().out == "latency\n"
    assert records.read(tmp_path / "n.json") == result


def test_errors_of_a_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise OptionError("batch is 0.")

    options: Any = SimpleNamespace(out=tmp_path, name="n")
    with pytest.raises(SystemExit) as exit_info:
        command.run(fail, options)
    assert exit_info.value.code == OptionError.exit_code and "nemostream: batch is 0." in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "matplotlib" else "spec")
    with pytest.raises(SystemExit) as exit_info:
        command.run(fail, options)
    assert exit_info.value.code == BackendError.exit_code
    assert "benchmarks need matplotlib: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
