"""The wheel contains exactly the files of the tree, and runs with only its declared requirements installed."""

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
from nemostream.bundle import Bundle

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCE = ROOT / "src"
COMPILED = {"nemostream/runtime/backends/operators/_library", "nemostream/runtime/streaming/_host"}


def package_files() -> dict[str, Path]:
    """Return every file that a wheel must contain by its name in the wheel; links to folders are followed."""
    found = {}
    for folder, subfolders, names in os.walk(SOURCE / "nemostream", followlinks=True):
        subfolders[:] = [name for name in subfolders if name not in ("__pycache__", "results")]
        paths = (Path(folder, name) for name in names if not name.endswith((".md", ".pyc", ".so")))
        found |= {path.relative_to(SOURCE).as_posix(): path for path in paths}
    return found


def build(tree: Path, out: Path, *arguments: str, **environment: str) -> Path:
    """Build a wheel of a copy of the source in `tree`, without an old `build/`."""
    for name in ("pyproject.toml", "setup.py", "LICENSE", "NOTICE", "README.md"):
        shutil.copy(ROOT / name, tree)
    links = [path.name for path in (SOURCE / "nemostream").iterdir() if path.is_symlink()]
    for folder in ("src", *links):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", *arguments, "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build as for a release, from the source distribution."""
    return build(tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist"))


def test_without_a_c_compiler_the_python_methods_are_used(tmp_path: Path) -> None:
    for name in ("tree", "dist", "installed"):
        (tmp_path / name).mkdir()
    made = build(tmp_path / "tree", tmp_path / "dist", "--wheel", CC="false")
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "installed")
    code = (
        "import nemostream, numpy as np\n"
        "from nemostream.runtime.streaming.compiled import ChunkerFields\n"
        "from nemostream.runtime.backends import operators\n"
        "assert not hasattr(ChunkerFields, 'accept') and operators.compiled() is None\n"
        "with nemostream.load() as model, model.stream() as stream:\n"
        "    print(nemostream.__file__, stream.push(np.zeros(16000, np.int16)) is not None)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [str(tmp_path / "installed" / "nemostream" / "__init__.py"), "True"]


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_contains_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        # The sizes reveal a file that is empty, or another one of the same name.
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    expected = package_files()
    compiled = {name for name in shipped if name.endswith(".so")}
    assert {name.partition(".")[0] for name in compiled} == COMPILED
    shipped -= compiled
    assert shipped == expected.keys()
    assert {name: sizes[name] for name in shipped} == {name: path.stat().st_size for name, path in expected.items()}
    needed = {
        "py.typed",
        "clip.flac",
        "demo/manifest.json",
        "demo/weights.bin",
        "speech.flac",
        "runtime/backends/gpu/kernels/greedy.cu",
        "runtime/backends/operators/int8_linear.c",
        "runtime/backends/operators/onnxruntime_abi.h",
        "runtime/streaming/host.c",
        "serving/protocols/page.html",
    }
    assert {f"nemostream/{name}" for name in needed} <= shipped


def test_every_folder_with_code_is_a_package() -> None:
    """`packages.find` skips folders without `__init__.py`, and all below them."""
    files = package_files()
    folders = {parent for name in files if name.endswith(".py") for parent in Path(name).parents} - {Path(".")}
    assert {folder.as_posix() for folder in folders if f"{folder.as_posix()}/__init__.py" not in files} == set()
    assert len(folders) > 15
    assert PROJECT["tool"]["setuptools"]["packages"]["find"]["where"] == ["src"]


def test_the_requirements_of_the_wheel(metadata: Message) -> None:
    needs = metadata.get_all("Requires-Dist", [])
    base = {re.split(r"[^\w-]", need)[0] for need in needs if "extra ==" not in need}
    assert base == {"numpy", "onnxruntime", "soundfile", "soxr", "sentencepiece", "typer", "rich"}
    assert all(">=" in need or need.startswith("nemostream[") for need in needs)  # every requirement has a lower bound
    extras = {
        "export",
        "nemo",
        "build",
        "tensorrt",
        "tensorrt-rtx",
        "gpu",
        "cuda",
        "bench",
        "serve",
        "state",
        "otel",
        "client",
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
    """Return a function that runs a command of a new environment with only the wheel and its requirements."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=True)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(command: str, *arguments: str) -> str:
        # Outside the checkout, whose folders could be imported by accident.
        done = subprocess.run(
            [str(scripts / command), *arguments], cwd=folder, capture_output=True, text=True, env=environment
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
def test_export_in_a_fresh_install_names_the_missing_extra(fresh: Callable[..., str]) -> None:
    script = "import nemostream.cli.main; nemostream.cli.main._run(['export', 'a.nemo', 'out']) == 7 or exit(1)"
    assert fresh("python", "-c", script) == ""


@pytest.mark.slow
def test_the_export_extra_is_enough(wheel: Path, fresh: Callable[..., str]) -> None:
    """It exports a `.nemo` file without NeMo and PyTorch, to the bundle that the package contains."""
    fresh("python", "-m", "pip", "install", "--quiet", "--prefer-binary", f"{wheel}[export]")
    lines = fresh("python", "-m", "pip", "list", "--format", "freeze").lower().splitlines()
    assert not {line.partition("==")[0] for line in lines} & {"torch", "nemo-toolkit", "nemo_toolkit", "transformers"}
    folder = fresh("nemostream", "export", str(ROOT / "examples" / "demo_model" / "demo.nemo"), "exported").strip()
    script = "import sys; from nemostream.bundle import Bundle; print(Bundle.open(sys.argv[1]).manifest.weights.sha256)"
    packaged = Bundle.open(nemostream.demo_bundle()).manifest
    assert fresh("python", "-c", script, folder).strip() == packaged.weights.sha256
