"""The comparison of servers with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")
pytest.importorskip("jiwer", reason="needs the bench extra")
pytest.importorskip("onnx", reason="needs the bench extra")

from nemostream import engines
from nemostream.benchmarks import load
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.studies import servers
from nemostream.bundle import Bundle
from nemostream.errors import BackendError

DEMO_MODEL = Path(__file__).parents[3] / "examples" / "demo_model"
MANIFEST = DEMO_MODEL / "heldout" / "heldout.jsonl"


def test_options_reach_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each server is measured with its process; its result is written, and the comparison has all of them."""
    calls: list[Any] = []

    class Running:
        def __init__(self, name: str, models: Any) -> None:
            assert models.chunk.ms == 80 and models.folder == tmp_path / "servers-models" and models.folder.is_dir()
            self.name = name

        def __enter__(self) -> tuple[str, int]:
            return f"target of {self.name}", len(calls)

        def __exit__(self, *error: object) -> None:
            calls.append(f"{self.name} has ended")

    def measure(target: str, utterances: Any, bundle: Bundle, **options: Any) -> records.Record:
        calls.append((target, len(utterances), options))
        return records.record("load", [], model={}, method={"label": options["label"]})

    monkeypatch.setattr(servers, "running", Running)
    monkeypatch.setattr(servers, "measure_load", measure)
    monkeypatch.setattr(servers, "compare", lambda results: [result["method"]["label"] for result in results])
    compared: list[Any] = []
    monkeypatch.setattr(servers.command, "run", lambda measure, options: compared.append(measure()))
    names = ["sherpa-onnx int8", "nemostream fp32"]
    line = f"--recordings 5 --streams 2 3 --seconds 9 --chunk-ms 80 --out {tmp_path} --manifest {MANIFEST}"
    servers.main(["--servers", *names, *line.split()])
    assert compared == [names]
    (first, size, options), ended, (second, *_), _ = calls
    assert (first, size, second) == (f"target of {names[0]}", 5, f"target of {names[1]}")
    assert ended == "sherpa-onnx int8 has ended"
    given = {name: options[name] for name in ("streams", "seconds", "pids", "max_streams", "label")}
    assert given == {"streams": [2, 3], "seconds": 9.0, "pids": [0], "max_streams": 512, "label": names[0]}
    for name in names:
        result = records.read(tmp_path / f"servers-{name.replace(' ', '-')}.json")
        assert result["method"]["label"] == name and result["model"]["name"] == "demo"


def test_a_failed_build_is_reported(demo_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    models = servers.Models(DEMO_MODEL / "demo.nemo", demo_bundle, demo_bundle.manifest.chunk(560), tmp_path)
    with pytest.raises(BackendError, match="engines is not a folder"):
        models.engines()


@pytest.mark.parametrize("validate", [True, False])
def test_a_server_finds_the_int8_engines(demo_bundle: Bundle, tmp_path: Path, validate: bool) -> None:
    """Also those that are not validated: the check is left out, and the engine is stored like others."""
    chunk, checked = demo_bundle.manifest.chunk(560), []
    models = servers.Models(DEMO_MODEL / "demo.nemo", demo_bundle, chunk, tmp_path, validate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "_validate", lambda *arguments: checked.append(arguments) or {})
        folder = models.engines()
        assert models.engines() == folder  # it is built once
    assert len(checked) == validate
    backend = engines.open_backend(demo_bundle, precision="int8", capacity=1, engines=folder)
    backend.prepare(chunk)  # type: ignore[attr-defined]
    backend.close()


@pytest.mark.slow
@pytest.mark.nemo
def test_all_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nemo", reason="needs the nemo extra")
    monkeypatch.setattr(load, "MAX_LATENESS", float("inf"))  # the machine may be busy: only texts are tested
    line = f"--manifest {MANIFEST} --recordings 1 --streams 2 --seconds 1 --checkpoint {DEMO_MODEL / 'demo.nemo'}"
    servers.main([*line.split(), "--out", str(tmp_path)])
    result = records.read(tmp_path / "servers.json")
    assert list(dict.fromkeys(row["case"]["server"] for row in result["rows"])) == list(servers.SERVERS)
    for row in result["rows"]:
        values = row["values"]
        assert (values["errors"], values["disconnects"], values["differing"]) == (0, 0, 0), row["case"]
        assert values["texts"] >= row["case"]["streams"] and values["wer"] <= 0.4 and values["matched_words"] >= 0.5
        assert values["cpu_seconds_per_audio_hour"] > 0
    assert (tmp_path / "servers-latency.svg").exists() and "**NeMo pipeline fp32**" in load.show(result)
