"""Who may import whom. A rule that only a document knows is broken within a month."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "nemo", "tensorrt", "tensorrt_rtx", "cuda", "cupy", "triton", "omegaconf", "lightning"}
OWN = {"nemostream.spec", "nemostream.errors", "nemostream"}

# folder: (outside packages allowed anywhere in it, rooms of ours it may use)
RULES = {
    "runtime": ({"numpy", "onnxruntime", "soundfile", "soxr", "sentencepiece"}, {"runtime"}),
    "engine": ({"numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"}, {"engine"}),
    "export": ({"numpy", "onnx", "onnxruntime", "torch", "nemo", "yaml", "soundfile", "soxr"}, {"export"}),
}


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, those inside functions too, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            yield node.module or ""


@pytest.mark.parametrize("room", RULES)
def test_rooms_import_only_what_they_may(room: str) -> None:
    outside, inside = RULES[room]
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            top, parts = module.partition(".")[0], module.split(".")
            if top in sys.stdlib_module_names:
                assert top != "asyncio" or path.name == "aio.py", f"{path.name} imports asyncio"
            elif top == "nemostream":
                room_used = parts[1] if len(parts) > 1 else ""
                assert module in OWN or room_used in inside, f"{path.name} imports {module}"
            else:
                assert top in outside, f"{path.name} imports {module}"


def test_onnxruntime_is_known_to_one_file_of_the_runtime() -> None:
    users = {path.name for path in (ROOT / "runtime").rglob("*.py") if "onnxruntime" in set(imports(path))}
    assert users == {"ort.py"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {name.partition(".")[0] for name in ran.stdout.split()}


def test_importing_the_package_costs_nothing() -> None:
    bare = loaded_by("pass")
    extra = loaded_by("import nemostream") - bare - set(sys.stdlib_module_names)
    assert extra <= {"nemostream", "numpy"}, extra


@pytest.mark.parametrize("module", ["runtime.recognizer", "runtime.ort", "runtime.aio", "engine", "cli", "doctor"])
def test_nothing_heavy_is_loaded_at_run_time(module: str) -> None:
    assert not loaded_by(f"import nemostream.{module}") & HEAVY


def test_recognising_loads_nothing_heavy() -> None:
    used = loaded_by("import nemostream; m = nemostream.load(); m.transcribe(nemostream.demo_clip()); m.close()")
    assert "onnxruntime" in used
    assert not used & (HEAVY | {"onnx"})
