"""The walls between the rooms: who may import what, read from the source, and what importing really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACT = {
    "nemostream", "nemostream.bundle", "nemostream.plans", "nemostream.clips", "nemostream.errors", "nemostream.runtime.text.formats",
    "nemostream.extras", "nemostream.untrusted",
}  # fmt: skip
TRAINING = {"torch", "nemo", "lightning", "omegaconf", "transformers"}
ROOM_NAMES = ("runtime", "engine", "export", "serving", "benchmarks")


@dataclass(frozen=True)
class Room:
    """What the files of a folder may import; `only` adds to it for single files.

    `at_import` says that the rule is about importing the file: what its functions import when called is their business.
    """

    package: str
    third_party: frozenset[str]
    rooms: frozenset[str] = frozenset()
    only: tuple[tuple[str, frozenset[str]], ...] = ()
    forbidden: frozenset[str] = frozenset()  # of the standard library
    at_import: bool = False


ROOMS = {
    "src/nemostream": Room(
        "nemostream",
        frozenset({"numpy"}),
        only=(("cli.py", frozenset({"typer"})), ("doctor.py", frozenset({"rich"}))),
        at_import=True,
    ),
    "export": Room(
        "nemostream.export",
        frozenset({"numpy", "torch", "nemo", "onnx", "onnxruntime", "omegaconf", "yaml", "soundfile", "soxr"}),
    ),
    "engine": Room(
        "nemostream.engine",
        frozenset({"numpy", "onnx", "ml_dtypes"}),
        only=(
            ("tensorrt.py", frozenset({"tensorrt", "tensorrt_rtx"})),
            ("calibration.py", frozenset({"onnxruntime"})),
        ),
    ),
    "runtime": Room(
        "nemostream.runtime",
        frozenset({"numpy"}),
        only=(
            ("audio.py", frozenset({"soxr"})),
            ("files.py", frozenset({"soundfile", "soxr"})),
            ("libav.py", frozenset({"av"})),
            ("tokenizer.py", frozenset({"sentencepiece"})),
            ("ort.py", frozenset({"onnxruntime"})),
            ("ort_cuda.py", frozenset({"onnxruntime"})),
            ("vad.py", frozenset({"onnxruntime"})),
            ("trt.py", frozenset({"tensorrt", "tensorrt_rtx"})),
            ("cuda.py", frozenset({"cuda"})),
            ("aio.py", frozenset({"asyncio"})),
        ),
        forbidden=frozenset({"asyncio"}),
    ),
}
ROOMS["serving"] = Room(
    "nemostream.serving",
    frozenset({"numpy"}),
    rooms=frozenset({"nemostream.runtime"}),
    only=(
        ("settings.py", frozenset({"pydantic", "pydantic_settings"})),
        ("metrics.py", frozenset({"prometheus_client"})),
        ("access.py", frozenset({"starlette"})),
        ("connections.py", frozenset({"h11", "uvicorn", "websockets"})),
        ("http.py", frozenset({"fastapi", "pydantic", "starlette"})),
        ("websocket.py", frozenset({"starlette"})),
        ("realtime.py", frozenset({"starlette"})),
        ("riva.py", frozenset({"grpc", "riva"})),
        ("server.py", frozenset({"grpc", "uvicorn"})),
        ("ray_app.py", frozenset({"ray", "starlette"})),
        ("triton.py", frozenset({"triton_python_backend_utils"})),
    ),
)
FILES = [(folder, file) for folder in ROOMS for file in sorted((ROOT / folder).rglob("*.py"))]


def imports(tree: ast.Module, package: str, at_import: bool) -> Iterator[str]:
    """Full names of the modules a file imports, those inside functions too unless `at_import`."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [base])])
            # `from nemostream import runtime` imports a module, `from nemostream.bundle import Bundle` a name of one.
            yield from ([f"{base}.{alias.name}" for alias in node.names] if base == "nemostream" else [base])
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and _called(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)


def _called(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def violations(room: Room, name: str, source: str) -> list[str]:
    allowed = room.third_party.union(*(more for file, more in room.only if file == name))
    found = []
    for module in imports(ast.parse(source), room.package, room.at_import):
        top = module.partition(".")[0]
        if top == "nemostream":
            own = module == room.package or module.startswith(room.package + ".")
            if room.package == "nemostream":  # the façade is the whole package's root: its own files, not the rooms
                own = module.split(".")[1:2] == [] or module.split(".")[1] not in ROOM_NAMES
            contract = any(module == part or module.startswith(part + ".") for part in CONTRACT - {"nemostream"})
            if not (own or contract or module == "nemostream" or module.startswith(tuple(room.rooms))):
                found.append(module)
        elif (top in sys.stdlib_module_names and top not in room.forbidden - allowed) or top in allowed:
            continue
        else:
            found.append(module)
    return found


@pytest.mark.parametrize(("folder", "file"), FILES, ids=[str(file.relative_to(ROOT)) for _, file in FILES])
def test_the_room_keeps_its_walls(folder: str, file: Path) -> None:
    assert violations(ROOMS[folder], file.name, file.read_text(encoding="utf-8")) == []


def test_every_folder_of_the_package_has_a_rule() -> None:
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {setuptools["package-dir"][package] for package in setuptools["packages"]}
    assert folders - {"benchmarks"} == set(ROOMS)  # benchmarks compare the rooms, so they may see all of them
    assert all(any(folder == has for has, _ in FILES) for folder in ROOMS)


@pytest.mark.parametrize(
    ("folder", "name", "source", "found"),
    [
        ("runtime", "stream.py", "def f():\n    import torch.nn", ["torch.nn"]),
        ("runtime", "stream.py", "from nemostream.export import graph", ["nemostream.export"]),
        ("runtime", "stream.py", "from nemostream import engine", ["nemostream.engine"]),
        ("runtime", "stream.py", "from ..export import graph", ["nemostream.export"]),
        ("runtime", "stream.py", "from . import backend\nfrom nemostream.bundle import Chunk\nimport numpy.typing", []),
        ("runtime", "stream.py", "import onnxruntime", ["onnxruntime"]),
        ("runtime", "ort.py", "import onnxruntime", []),
        ("runtime", "stream.py", "import asyncio", ["asyncio"]),
        ("runtime", "aio.py", "import asyncio", []),
        ("runtime", "stream.py", "import runtime.backend", ["runtime.backend"]),
        ("runtime", "stream.py", "import_module('nemo.core')", ["nemo.core"]),
        (
            "export",
            "graph.py",
            "from nemostream.runtime.decoding.greedy import label_looping",
            ["nemostream.runtime.decoding.greedy"],
        ),
        ("export", "graph.py", "import tensorrt", ["tensorrt"]),
        ("engine", "build.py", "if TYPE_CHECKING:\n    import torch", ["torch"]),
        ("src/nemostream", "spec.py", "import onnxruntime", ["onnxruntime"]),
        (
            "src/nemostream",
            "__init__.py",
            "from nemostream.runtime.backends.cpu import OrtBackend",
            ["nemostream.runtime.backends.cpu"],
        ),
        ("src/nemostream", "__init__.py", "def f():\n    from nemostream.runtime.backends.cpu import OrtBackend", []),
        (
            "src/nemostream",
            "__init__.py",
            "if TYPE_CHECKING:\n    from nemostream.runtime.backends.cpu import OrtBackend",
            [],
        ),
        ("src/nemostream", "spec.py", "class C:\n    import rich", ["rich"]),
        ("src/nemostream", "spec.py", "from nemostream.errors import BundleError", []),
    ],
)
def test_the_rule_sees(folder: str, name: str, source: str, found: list[str]) -> None:
    """A wall nobody can bump into is none."""
    assert violations(ROOMS[folder], name, source) == found


def test_nobody_imports_the_benchmarks() -> None:
    users = [
        str(file.relative_to(ROOT))
        for folder, file in FILES
        if any(m.startswith("nemostream.benchmarks") for m in imports(ast.parse(file.read_text()), folder, False))
    ]
    assert users == []


# -- what importing loads --------------------------------------------------------------------------------------------


def loaded(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`, less those it starts with."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT / "tests"
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_nemostream_is_cheap() -> None:
    found = loaded("import nemostream\nassert nemostream.load and nemostream.BundleError") - sys.stdlib_module_names
    assert "nemostream" in found
    assert found <= {"nemostream", "numpy"}


def test_importing_the_contract_is_cheap() -> None:
    found = loaded("import nemostream.bundle, nemostream.errors") - sys.stdlib_module_names
    assert found <= {"nemostream", "numpy"}


def test_importing_runtime_and_engine_loads_neither_torch_nor_nemo() -> None:
    found = loaded(
        "import importlib, pkgutil, nemostream.runtime, nemostream.engine\n"
        "for room in (nemostream.runtime, nemostream.engine):\n"
        "    for module in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
        "        try:\n"
        "            importlib.import_module(module.name)\n"
        "        except ModuleNotFoundError as error:\n"  # a GPU room on a machine without its libraries
        "            known = 'tensorrt', 'tensorrt_rtx', 'cuda', 'onnx', 'ml_dtypes'\n"
        "            if error.name.split('.')[0] not in known: raise\n"
    )
    assert {"nemostream", "onnxruntime", "soundfile"} <= found
    assert not found & TRAINING


def test_recognising_loads_neither_torch_nor_nemo() -> None:
    found = loaded(
        "import nemostream, nemostream.cli.main, nemostream.cli.doctor\n"
        "with nemostream.load() as model:\n    model.transcribe(nemostream.demo_clip())"
    )
    assert "onnxruntime" in found
    assert not found & (TRAINING | {"onnx", "tensorrt", "cuda"})


def test_triton_needs_no_extra() -> None:
    found = loaded("import nemostream.serving.integrations.triton") - sys.stdlib_module_names
    assert "nemostream" in found
    assert not found & {"fastapi", "starlette", "pydantic", "uvicorn", "grpc", "prometheus_client", "ray"}
