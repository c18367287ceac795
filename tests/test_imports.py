"""Import rules: which package may import what, no import cycles, and what importing really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "nemostream"
# Modules that every package may import.
CONTRACT = {
    "nemostream",
    "nemostream.bundle",
    "nemostream.clips",
    "nemostream.errors",
    "nemostream.extras",
    "nemostream.plans",
    "nemostream.step_loop",
    "nemostream.untrusted",
}
TRAINING = {"torch", "nemo", "lightning", "omegaconf", "transformers"}


@dataclass(frozen=True)
class Rule:
    """What the modules of a package may import; `only` extends it for single modules.

    With `at_import`, the rule covers what importing a module loads, not what its functions import when called.
    """

    modules: frozenset[str]  # third-party packages, and single modules of nemostream
    packages: frozenset[str] = frozenset()  # of nemostream, besides itself and the contract
    only: dict[str, frozenset[str]] = field(default_factory=dict)
    forbidden: frozenset[str] = frozenset()  # of the standard library
    at_import: bool = False


RULES = {
    # The composition root: functions load what they need when they are called.
    "nemostream": Rule(
        frozenset({"numpy"}), only={"nemostream.__main__": frozenset({"nemostream.cli.interrupt"})}, at_import=True
    ),
    "nemostream.cli": Rule(
        frozenset({"numpy", *(f"nemostream.runtime.text.{name}" for name in ("formats", "scripts", "words"))}),
        only={
            "nemostream.cli.main": frozenset({"typer"}),
            "nemostream.cli.options": frozenset({"typer"}),
            "nemostream.cli.transcribe": frozenset({"typer"}),
            "nemostream.cli.models": frozenset({"typer"}),
            "nemostream.cli.info": frozenset({"rich"}),
            "nemostream.cli.top": frozenset({"rich"}),
            "nemostream.cli.doctor": frozenset({"rich"}),
            "nemostream.cli.gpu_memory": frozenset({"rich"}),
        },
        at_import=True,
    ),
    # One module, which clients install without anything else.
    "nemostream.client": Rule(frozenset({"websockets"})),
    "nemostream.export": Rule(
        frozenset({"numpy", "onnx", "onnxruntime", "sentencepiece", "yaml"}),
        only={
            "nemostream.export.reference": frozenset({"nemo", "omegaconf", "torch", "transformers"}),
            "nemostream.export.sources": frozenset({"huggingface_hub", "nemo"}),
        },
    ),
    "nemostream.engine": Rule(
        frozenset({"numpy", "onnx", "ml_dtypes"}),
        only={
            "nemostream.engine.tensorrt": frozenset({"tensorrt", "tensorrt_rtx"}),
            "nemostream.engine.calibration": frozenset({"onnxruntime"}),
            "nemostream.engine.fusion": frozenset({"nemostream.runtime.backends.operators"}),
            "nemostream.engine.precision": frozenset({"nemostream.runtime.backends.operators"}),
            "nemostream.engine.validate": frozenset({"nemostream.runtime.backends.base"}),
        },
    ),
    "nemostream.runtime": Rule(
        frozenset({"numpy"}),
        only={
            "nemostream.runtime.audio.files": frozenset({"soundfile", "soxr"}),
            "nemostream.runtime.audio.libav": frozenset({"av"}),
            "nemostream.runtime.audio.preprocessor": frozenset({"soxr"}),
            "nemostream.runtime.audio.vad": frozenset({"onnxruntime"}),
            "nemostream.runtime.backends.cpu": frozenset({"onnxruntime"}),
            "nemostream.runtime.backends.gpu.attention_plugin": frozenset({"tensorrt"}),
            "nemostream.runtime.backends.gpu.cuda": frozenset({"cuda"}),
            "nemostream.runtime.backends.gpu.onnxruntime": frozenset({"onnxruntime"}),
            "nemostream.runtime.backends.gpu.tensorrt": frozenset({"tensorrt", "tensorrt_rtx"}),
            "nemostream.runtime.streaming.aio": frozenset({"asyncio"}),
            "nemostream.runtime.text.itn": frozenset({"nemo_text_processing"}),
            "nemostream.runtime.text.tokenizer": frozenset({"sentencepiece"}),
        },
        forbidden=frozenset({"asyncio"}),
    ),
    "nemostream.serving": Rule(
        frozenset({"numpy"}),
        packages=frozenset({"nemostream.runtime"}),
        only={
            "nemostream.serving.settings": frozenset({"pydantic", "pydantic_settings"}),
            "nemostream.serving.metrics": frozenset({"prometheus_client"}),
            "nemostream.serving.otel": frozenset({"opentelemetry"}),
            "nemostream.serving.server": frozenset({"grpc", "uvicorn"}),
            "nemostream.serving.processes.transport": frozenset({"uvicorn"}),
            "nemostream.serving.network.access": frozenset({"starlette"}),
            "nemostream.serving.network.connections": frozenset({"h11", "uvicorn", "websockets"}),
            "nemostream.serving.network.responses": frozenset({"starlette"}),
            "nemostream.serving.protocols.dependencies": frozenset({"fastapi", "pydantic", "starlette"}),
            "nemostream.serving.protocols.http": frozenset({"fastapi", "starlette"}),
            "nemostream.serving.protocols.sockets": frozenset({"starlette"}),
            "nemostream.serving.protocols.transcriptions": frozenset({"fastapi"}),
            "nemostream.serving.protocols.websocket": frozenset({"starlette"}),
            "nemostream.serving.protocols.realtime": frozenset({"starlette"}),
            "nemostream.serving.protocols.riva": frozenset({"grpc", "riva"}),
            "nemostream.serving.state.redis_store": frozenset({"redis"}),
            "nemostream.serving.state.sealing": frozenset({"cryptography"}),
            "nemostream.serving.integrations.ray_app": frozenset({"ray", "starlette"}),
            "nemostream.serving.integrations.triton": frozenset({"triton_python_backend_utils"}),
        },
    ),
}


def module_name(file: Path) -> str:
    parts = ("nemostream", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(file): file
    for folder in (PACKAGE, *(link for link in PACKAGE.iterdir() if link.is_symlink()))  # rglob skips links to folders
    for file in sorted(folder.rglob("*.py"))
}


def package_of(module: str) -> str:
    """The package whose rule covers a module."""
    return max((name for name in RULES if f"{module}.".startswith(f"{name}.")), key=len)


def imports(source: str, package: str, at_import: bool = False) -> Iterator[str]:
    """Full names of the modules that the source of a module in `package` imports, inside functions too unless
    `at_import`."""
    pending: list[ast.AST] = [ast.parse(source)]
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
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from ([name if name in MODULES else base for name in names] if base[:10] == "nemostream" else [base])
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


def violations(module: str, source: str) -> list[str]:
    rule = RULES[package_of(module)]
    allowed = rule.modules | rule.only.get(module, frozenset())
    found = []
    for name in imports(source, module.rpartition(".")[0], rule.at_import):
        top = name.partition(".")[0]
        if top == "nemostream":
            own = package_of(name) == package_of(module)
            if not (own or name in CONTRACT or name in allowed or package_of(name) in rule.packages):
                found.append(name)
        elif not ((top in sys.stdlib_module_names and top not in rule.forbidden - allowed) or top in allowed):
            found.append(name)
    return found


@pytest.mark.parametrize("module", sorted(name for name in MODULES if ".benchmarks" not in name))
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_every_package_has_a_rule() -> None:
    links = {f"nemostream.{path.name}" for path in PACKAGE.iterdir() if path.is_symlink()}
    # Benchmarks compare the packages, so they may import all of them.
    assert set(RULES) == (links - {"nemostream.benchmarks"}) | {"nemostream", "nemostream.cli", "nemostream.client"}
    assert {module for rule in RULES.values() for module in rule.only} <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("runtime.streaming.chunker", "def f():\n    import torch.nn", ["torch.nn"]),
        ("runtime.streaming.chunker", "from nemostream.export import graph", ["nemostream.export.graph"]),
        ("runtime.streaming.chunker", "from nemostream import engine", ["nemostream.engine"]),
        ("runtime.streaming.chunker", "from ...export import graph", ["nemostream.export.graph"]),
        ("runtime.model", "from . import text\nfrom nemostream.bundle import Chunk\nimport numpy.typing", []),
        ("runtime.streaming.chunker", "import onnxruntime", ["onnxruntime"]),
        ("runtime.backends.cpu", "import onnxruntime", []),
        ("runtime.streaming.chunker", "import asyncio", ["asyncio"]),
        ("runtime.streaming.aio", "import asyncio", []),
        ("runtime.streaming.chunker", "import runtime.model", ["runtime.model"]),
        ("runtime.streaming.chunker", "import_module('nemo.core')", ["nemo.core"]),
        ("export.graph", "from nemostream.runtime.model import Model", ["nemostream.runtime.model"]),
        ("export.graph", "import tensorrt", ["tensorrt"]),
        ("engine.precision", "if TYPE_CHECKING:\n    import torch", ["torch"]),
        ("engine.precision", "import nemostream.runtime.backends.base", ["nemostream.runtime.backends.base"]),
        ("engine.validate", "import nemostream.runtime.backends.base", []),
        ("bundle", "import onnxruntime", ["onnxruntime"]),
        ("engines", "from nemostream.runtime.model import Model", ["nemostream.runtime.model"]),
        ("engines", "def f():\n    from nemostream.runtime.model import Model", []),
        ("engines", "if TYPE_CHECKING:\n    from nemostream.runtime.model import Model", []),
        ("bundle", "class C:\n    import rich", ["rich"]),
        ("bundle", "from nemostream.errors import BundleError", []),
        ("client", "from websockets.exceptions import ConnectionClosed\nfrom nemostream.errors import StreamError", []),
        ("client", "def f():\n    import numpy", ["numpy"]),
        ("client", "from nemostream.runtime.text.words import Word", ["nemostream.runtime.text.words"]),
    ],
)
def test_the_rule_finds_violations(module: str, source: str, found: list[str]) -> None:
    assert violations(f"nemostream.{module}", source) == found


def test_nothing_imports_the_benchmarks() -> None:
    users = [
        name
        for name, file in MODULES.items()
        if not name.startswith("nemostream.benchmarks")
        and any(m.startswith("nemostream.benchmarks") for m in imports(file.read_text(), name.rpartition(".")[0]))
    ]
    assert users == ["nemostream.cli.main"]  # `nemostream bench` resolves the name of a benchmark


# -- cycles ------------------------------------------------------------------------------------------------------------


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's algorithm, as an iteration)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found = []
    for root in graph:
        if root in order:
            continue
        work = [(root, iter(sorted(graph[root])))]
        order[root] = lowest[root] = len(order)
        path.append(root)
        while work:
            module, targets = work[-1]
            for target in targets:
                if target not in order:
                    order[target] = lowest[target] = len(order)
                    path.append(target)
                    work.append((target, iter(sorted(graph[target]))))
                    break
                if target in path:
                    lowest[module] = min(lowest[module], order[target])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[module])
                if lowest[module] == order[module]:
                    group = set(path[path.index(module) :])
                    del path[path.index(module) :]
                    if len(group) > 1 or module in graph[module]:
                        found.append(group)
    return found


def test_there_are_no_import_cycles() -> None:
    """Counting imports inside functions and for type checkers too: a cycle is a design fault wherever it is hidden."""
    graph = {
        name: {m for m in imports(file.read_text(), name.rpartition(".")[0]) if m in MODULES} - {"nemostream"}
        for name, file in MODULES.items()
        if name != "nemostream"  # the public API imports everything, lazily; modules use it to load a model
    }
    assert cycles(graph) == []


def test_cycles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a"}}) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [{"b", "c"}, {"d"}]
    assert cycles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": {"a"}}) == [{"a", "b", "c", "d"}]


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
    found = loaded(f"import {', '.join(sorted(CONTRACT))}") - sys.stdlib_module_names
    assert found <= {"nemostream", "numpy"}


def test_the_client_needs_only_websockets() -> None:
    found = loaded("import nemostream.client") - sys.stdlib_module_names
    assert found == {"nemostream", "websockets"}


def test_importing_runtime_and_engine_loads_neither_torch_nor_nemo() -> None:
    found = loaded(
        "import importlib, pkgutil, nemostream.runtime, nemostream.engine\n"
        "for package in (nemostream.runtime, nemostream.engine):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if module.name.endswith('.operators._library'): continue\n"  # of C
        "        try:\n"
        "            importlib.import_module(module.name)\n"
        "        except ModuleNotFoundError as error:\n"  # a GPU module on a machine without its libraries
        "            known = 'tensorrt', 'tensorrt_rtx', 'cuda', 'onnx', 'ml_dtypes', 'av'\n"
        "            if error.name.split('.')[0] not in known: raise\n"
        "assert 'nemostream.runtime.backends.gpu.kernels' in sys.modules\n"
    )
    assert {"nemostream", "onnxruntime", "soundfile"} <= found
    assert not found & TRAINING


def test_recognising_loads_neither_torch_nor_nemo() -> None:
    found = loaded(
        "import nemostream, nemostream.cli.main, nemostream.cli.info, nemostream.cli.doctor\n"
        "with nemostream.load() as model:\n    model.transcribe(nemostream.demo_clip())"
    )
    assert "onnxruntime" in found
    assert not found & (TRAINING | {"onnx", "tensorrt", "cuda"})


def test_triton_needs_no_extra() -> None:
    found = loaded("import nemostream.serving.integrations.triton") - sys.stdlib_module_names
    assert "nemostream" in found
    assert not found & {"fastapi", "starlette", "pydantic", "uvicorn", "grpc", "prometheus_client", "ray"}


def test_the_package_is_found_by_its_links() -> None:
    """`packages.find` follows relative links; an absolute one would break every other checkout."""
    where = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["where"]
    assert where == ["src"]
    for link in (path for path in PACKAGE.iterdir() if path.is_symlink()):
        assert str(link.readlink()) == f"../../{link.name}"
