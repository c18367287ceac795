"""What users install: the wheel holds the tree, no more and no less, and runs where only its own requirements are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import nemostream

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def files(folder: Path) -> set[str]:
    """Everything in a folder of the package that a user needs: all but what Python and people leave there."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    left_out = {"__pycache__", "results"}
    return {p.as_posix() for p in found if not left_out.intersection(p.parts) and p.suffix not in (".md", ".pyc")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a release is made: from the source distribution, of a copy that has no `build/` from earlier days."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "LICENSE", "NOTICE", "README.md"):
        shutil.copy(ROOT / name, tree)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        # Empty or another file of the same name would be in the list all the same.
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    expected = {
        f"{package.replace('.', '/')}/{name}": ROOT / folder / name
        for package, folder in FOLDERS.items()
        for name in files(ROOT / folder)
    }
    assert shipped == expected.keys()
    assert {name: sizes[name] for name in shipped} == {name: path.stat().st_size for name, path in expected.items()}
    needed = {"py.typed", "clip.flac", "demo/manifest.json", "demo/weights.bin", "speech.flac"}
    assert {f"nemostream/{name}" for name in needed} <= shipped


def test_every_folder_with_code_is_a_package() -> None:
    packages = {f"nemostream.{folder.parent.name}" for folder in ROOT.glob("*/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | {"nemostream"} == set(FOLDERS)


def test_what_the_wheel_asks_for(metadata: Message) -> None:
    needs = metadata.get_all("Requires-Dist", [])
    base = {re.split(r"[^\w-]", need)[0] for need in needs if "extra ==" not in need}
    assert base == {"numpy", "onnxruntime", "soundfile", "soxr", "sentencepiece", "typer", "rich"}
    assert all(">=" in need or need.startswith("nemostream[") for need in needs)  # what nobody bounded is what breaks
    extras = {
        "export",
        "build",
        "tensorrt",
        "tensorrt-rtx",
        "gpu",
        "cuda",
        "bench",
        "serve",
        "ray",
        "mic",
        "vad",
        "itn",
        "av",
    }
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Version"] == nemostream.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-SA-3.0 AND CC-BY-SA-4.0"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command of a new environment that has the wheel and nothing that it did not ask for."""
    place = tmp_path_factory.mktemp("fresh")
    venv.create(place / "venv", with_pip=True)
    scripts = place / "venv" / ("Scripts" if os.name == "nt" else "bin")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(command: str, *arguments: str) -> str:
        # Elsewhere than the checkout, whose folders could be imported by accident.
        done = subprocess.run(
            [str(scripts / command), *arguments], cwd=place, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("python", "-m", "pip", "install", "--quiet", "--prefer-binary", str(wheel))
    return run


@pytest.mark.slow
def test_a_fresh_install_has_neither_torch_nor_nemo(fresh: Callable[..., str]) -> None:
    lines = fresh("python", "-m", "pip", "list", "--format", "freeze").lower().splitlines()
    installed = {line.partition("==")[0] for line in lines}
    assert {"nemostream", "numpy", "onnxruntime"} <= installed
    assert not installed & {"torch", "nemo_toolkit", "nemo-toolkit", "onnx", "transformers", "tensorrt"}


@pytest.mark.slow
def test_a_fresh_install_runs(fresh: Callable[..., str]) -> None:
    assert fresh("nemostream", "--version") == f"nemostream {nemostream.__version__}\n"
    assert re.search(r"ONNX Runtime, CPU +works ", fresh("nemostream", "doctor"))
    assert "1120 ms" in fresh("nemostream", "info")
    clip = fresh("python", "-c", "import nemostream; print(nemostream.demo_clip())").strip()
    with nemostream.load() as model:
        text = model.transcribe(nemostream.demo_clip()).text
    assert text.split()
    assert (
        fresh("nemostream", "transcribe", clip)
        == fresh("python", "-m", "nemostream", "transcribe", clip)
        == f"{text}\n"
    )


@pytest.mark.slow
def test_a_fresh_install_says_what_exporting_needs(fresh: Callable[..., str]) -> None:
    script = "import nemostream.cli.main; nemostream.cli.main._run(['export', 'a.nemo', 'out']) == 7 or exit(1)"
    assert fresh("python", "-c", script) == ""
