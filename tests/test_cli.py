"""The command line as people meet it: results on standard output, one sentence per failure, telling exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import nemostream
from nemostream.spec import Bundle

CLIPS = Path(__file__).parent / "speech" / "human"


def run(*arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run([sys.executable, "-m", "nemostream", *arguments], input=stdin, capture_output=True)
    return subprocess.CompletedProcess(ran.args, ran.returncode, ran.stdout.decode(), ran.stderr.decode())


def assert_one_sentence(ran: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert ran.returncode == code, ran.stderr
    lines = ran.stderr.strip().splitlines()
    assert len(lines) == 1, ran.stderr
    assert lines[0].startswith("nemostream: ")
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.fixture(scope="module")
def expected() -> dict[str, nemostream.Result]:
    with nemostream.load() as model:
        return {path.name: model.transcribe(path) for path in CLIPS.glob("*.flac")}


def test_json_of_several_files_in_order(expected: dict[str, nemostream.Result]) -> None:
    names = [str(CLIPS / name) for name in sorted(expected, reverse=True)]
    ran = run("transcribe", *names, "--format", "json")
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["file"] for row in rows] == names
    for row in rows:
        wanted = expected[Path(row["file"]).name]
        assert row.keys() == {"file", "duration", "text", "tokens", "chunk_ms"}
        assert row["text"] == wanted.text
        assert row["chunk_ms"] == 560
        assert row["duration"] == pytest.approx(soundfile.info(row["file"]).duration, abs=1e-3)
        assert [(t["id"], t["text"]) for t in row["tokens"]] == [(t.id, t.text) for t in wanted.tokens]
        assert all(0 <= t["time"] <= row["duration"] + 0.08 for t in row["tokens"])
    assert sum(len(row["tokens"]) for row in rows) > 5


def test_text(expected: dict[str, nemostream.Result]) -> None:
    one, other = str(CLIPS / "cards-001.flac"), str(CLIPS / "cards-002.flac")
    assert run("transcribe", one).stdout == expected["cards-001.flac"].text + "\n"
    lines = run("transcribe", one, other).stdout.splitlines()
    assert lines == [f"{p}: {expected[Path(p).name].text}" for p in (one, other)]


def test_raw_pcm_on_standard_input(expected: dict[str, nemostream.Result]) -> None:
    pcm, _ = soundfile.read(CLIPS / "cards-002.flac", dtype="int16")
    ran = run("transcribe", "-", "--format", "json", stdin=pcm.tobytes())
    row = json.loads(ran.stdout)
    assert (row["file"], row["text"]) == ("-", expected["cards-002.flac"].text)
    assert_one_sentence(run("transcribe", "-", stdin=b""), 3, "empty")
    assert_one_sentence(run("transcribe", "-", stdin=b"\0" * 3201), 3, "middle of a sample")


def test_realtime_says_the_same(expected: dict[str, nemostream.Result]) -> None:
    ran = run("transcribe", str(CLIPS / "cards-001.flac"), "--realtime")
    assert ran.stdout == expected["cards-001.flac"].text + "\n"


def test_every_kind_of_bad_file_is_one_sentence(tmp_path: Path) -> None:
    good = (CLIPS / "jfk-1961-inaugural.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(good[: len(good) // 2])
    (tmp_path / "notes.txt").write_text("this is not audio " * 100)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    broken = np.zeros(16000, np.float32)
    broken[8000] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 16000, subtype="FLOAT")
    cases = {"missing.wav": "does not exist", "cut.flac": "cut.flac", "notes.txt": "not audio", "empty.wav": "no audio"}
    for name, part in (cases | {"nan.wav": "NaN"}).items():
        assert_one_sentence(run("transcribe", str(tmp_path / name)), 3, name, part)


def test_one_bad_file_fails_alone(tmp_path: Path, expected: dict[str, nemostream.Result]) -> None:
    bad = str(tmp_path / "missing.wav")
    ran = run("transcribe", str(CLIPS / "cards-001.flac"), bad, str(CLIPS / "cards-003.flac"), "--format", "json")
    assert [Path(json.loads(line)["file"]).name for line in ran.stdout.splitlines()] == [
        "cards-001.flac",
        "cards-003.flac",
    ]
    assert_one_sentence(ran, 3, "missing.wav does not exist")


def test_bad_bundles_and_options(tmp_path: Path, demo_bundle: Bundle) -> None:
    clip = str(CLIPS / "cards-001.flac")
    assert_one_sentence(run("transcribe", clip, "--chunk-ms", "500"), 2, "500 ms", "80, 160, 560, 1120")
    assert_one_sentence(run("transcribe", clip, "--bundle", str(tmp_path / "none")), 4, "is not a folder")
    for name in ("weights.bin", "encoder-560ms.onnx"):
        copy = tmp_path / name
        shutil.copytree(demo_bundle.path, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 3] ^= 255
        (copy / name).write_bytes(data)
        assert_one_sentence(run("transcribe", clip, "--bundle", str(copy)), 4, f"{name} is damaged")
    old = tmp_path / "old"
    shutil.copytree(demo_bundle.path, old)
    document = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(document | {"version": 7}))
    assert_one_sentence(run("transcribe", clip, "--bundle", str(old)), 4, "version 7", "reads version 1")
    assert_one_sentence(run("info", str(tmp_path)), 4, "not a bundle")
    assert_one_sentence(run("transcribe"), 2, "FILE")
    assert_one_sentence(run("transcribe", clip, "--format", "xml"), 2, "xml")


def test_export_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert_one_sentence(run("export", str(tmp_path / "no.nemo"), str(tmp_path / "out")), 5, "no.nemo is not a file")


def test_info_and_doctor() -> None:
    shown = run("info")
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("80 ms", "1120 ms", "parity"))
    examined = run("doctor")
    assert examined.returncode == 0, examined.stdout + examined.stderr
    for name in ("ONNX Runtime, CPU", "ONNX Runtime, CUDA", "TensorRT", "TensorRT for RTX", "NVIDIA driver"):
        assert name in examined.stdout


def test_version() -> None:
    assert run("--version").stdout.strip() == f"nemostream {nemostream.__version__}"
