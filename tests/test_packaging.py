"""What users install: the wheel has every file of the tree, and runs where nothing but its own requirements are."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"export": "export", "engine": "engine", "runtime": "runtime", "benchmarks": "benchmarks"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git would commit, so that a stale `build/` cannot help or harm."""
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file() and not name.startswith(("tests/", "examples/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(tree)], check=True)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"nemostream/{p.relative_to(ROOT / 'src/nemostream')}" for p in files(ROOT / "src/nemostream")}
    for room, folder in ROOMS.items():
        expected |= {f"nemostream/{room}/{p.relative_to(ROOT / folder)}" for p in files(ROOT / folder)}
    assert names == expected
    assert {"nemostream/py.typed", "nemostream/demo/weights.bin", "nemostream/clip.flac"} <= names


def files(folder: Path) -> list[Path]:
    kept = (".py", ".typed", ".flac", ".cu", ".json", ".bin", ".onnx", ".model")
    return [
        p for p in folder.rglob("*") if p.suffix in kept and "__pycache__" not in p.parts and "results" not in p.parts
    ]


def test_the_base_install_is_light(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) == 7
    heavy = ("torch", "nemo", "onnx>", "onnxscript", "transformers", "tensorrt", "cuda")
    assert not [need for need in project["dependencies"] if need.startswith(heavy)]
    extras = {"export", "tensorrt", "tensorrt-rtx", "cuda", "bench", "serve", "ray"}
    assert extras <= project["optional-dependencies"].keys()


def test_the_wheel_runs_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
    subprocess.run([*pip, str(wheel)], check=True)

    def run(*command: str) -> str:
        ran = subprocess.run(
            [str(tmp_path / "venv" / "bin" / command[0]), *command[1:]],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert run("nemostream", "--version").startswith("nemostream ")
    report = run("nemostream", "doctor")
    assert "the packaged model runs" in " ".join(report.split())
    clip = run("python", "-c", "import nemostream; print(nemostream.demo_clip())").strip()
    assert run("nemostream", "transcribe", clip).split(), "the packaged clip has words in it"
    assert "80 ms" in run("nemostream", "info")
    installed = run("python", "-m", "pip", "list", "--format=freeze").lower()
    assert "torch==" not in installed
    assert "nemo" not in installed.replace("nemostream", "")
