"""What `nemostream build` leaves for the runtime: encoder steps made for one machine, in a folder of their own.

A plan is a file that a library loads (a TensorRT engine, or an ONNX graph with its weights beside it) and a JSON file
that says what it is: which graph it was made of, by what, for what, and how far it is from fp32. The folder's names can
be read; what counts is the JSON, and that the files are the ones it vouches for.

`engine` makes plans, `runtime` runs them, neither imports the other. What the module does not know: either library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemostream.errors import BackendError
from nemostream.spec import Bundle, File, sha256

FORMAT = "nemostream-plan"
VERSION = 1
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")


@dataclass(frozen=True)
class Recipe:
    """What a plan is made of and for: everything that would make it another one. Two alike are interchangeable."""

    graph: str  # "encoder-80ms"
    graph_sha256: str
    weights_sha256: str
    backend: str  # "tensorrt", "tensorrt-rtx" or "onnxruntime"
    library: str  # the version of the library that made it, which must be the one that runs it
    precision: str  # one of PRECISIONS
    device: str  # "cpu", "cuda" (any NVIDIA GPU), or the GPU it was made for: "sm89"
    max_batch: int
    cell: str  # type of the caches: "float32", "float16" or "bfloat16"

    @classmethod
    def of(cls, bundle: Bundle, chunk_ms: int, **rest: Any) -> Recipe:
        graph = f"encoder-{chunk_ms}ms"
        made_of = bundle.manifest.graphs[graph].sha256, bundle.manifest.weights.sha256
        return cls(graph, *made_of, **rest)

    @property
    def stem(self) -> str:
        """The plan's name: for people, and, by its end, no other plan's."""
        key = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.graph}-{self.backend}-{self.precision}-{self.device}-b{self.max_batch}-{key}"


@dataclass(frozen=True)
class Plan:
    """A plan on disk."""

    recipe: Recipe
    folder: Path
    files: tuple[File, ...]  # the one to load first
    seconds: float  # it took to build
    gate: Mapping[str, Any] = field(default_factory=dict)  # what `runtime.gate` measured; empty: it was never run

    @property
    def path(self) -> Path:
        return self.folder / self.files[0].file

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


class PlanStore:
    """A folder of plans. Several processes may share it: what appears in it is whole."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder else cache_folder("engines")

    def find(self, recipe: Recipe) -> Plan | None:
        """The plan of that recipe, or None if there is none.

        Raises `BackendError` for one that is damaged or of something else, saying so; `put` replaces it.
        """
        described = self.folder / f"{recipe.stem}.json"
        if not described.exists():
            return None
        plan = self._read(described)
        if plan.recipe != recipe:
            raise BackendError(f"{described} describes something else than its name; build the engine again.")
        for file in plan.files:
            path = self.folder / file.file
            if path.parent != self.folder or not path.is_file() or sha256(path) != file.sha256:
                raise BackendError(f"{path} is missing or damaged; build the engine again.")
        return plan

    def all(self) -> list[Plan]:
        """Every plan that says what it is; `find` tells whether its files are what it says."""
        plans = []
        for described in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(BackendError):
                plans.append(self._read(described))
        return plans

    def _read(self, described: Path) -> Plan:
        try:
            document = json.loads(described.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BackendError(f"{described} cannot be read ({error}); build the engine again.") from error
        try:
            if (document["format"], document["version"]) != (FORMAT, VERSION):
                raise BackendError(f"{described} is of another nemostream; build the engine again.")
            recipe, files = Recipe(**document["recipe"]), tuple(File(**file) for file in document["files"])
            plan = Plan(recipe, self.folder, files, document["seconds"], document["gate"])
            plan.path  # noqa: B018 - a plan has a file
        except (KeyError, TypeError, IndexError) as error:
            raise BackendError(f"{described} lacks or misnames a field ({error}); build the engine again.") from error
        return plan

    def put(
        self, recipe: Recipe, make: Callable[[Path], list[Path]], check: Callable[[Plan], Mapping[str, Any]]
    ) -> Plan:
        """Make a plan and keep it, unless making or checking it raises.

        `make` fills an empty folder and returns the files, the one to load first. `check` runs the plan, which is
        whole but not yet kept, and returns the figures to keep with it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{recipe.stem}-") as temporary:
            start = time.perf_counter()
            made = make(Path(temporary))
            seconds = time.perf_counter() - start
            files = tuple(File(path.name, sha256(path), path.stat().st_size) for path in made)
            tried = Plan(recipe, Path(temporary), files, seconds)
            plan = dataclasses.replace(tried, folder=self.folder, gate=dict(check(tried)))
            # The description goes first and comes last: whoever finds it finds all of it.
            described = self.folder / f"{recipe.stem}.json"
            with self._alone():
                described.unlink(missing_ok=True)
                for path in made:
                    path.replace(self.folder / path.name)
                self._describe(plan, described)
        return plan

    def record(self, plan: Plan, gate: Mapping[str, Any]) -> Plan:
        """Keep figures of a plan that was made for another machine and is now on it."""
        plan = dataclasses.replace(plan, gate=dict(gate))
        self._describe(plan, self.folder / f"{plan.recipe.stem}.json")
        return plan

    def _describe(self, plan: Plan, path: Path) -> None:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "recipe": dataclasses.asdict(plan.recipe),
            "files": [dataclasses.asdict(file) for file in plan.files],
            "seconds": round(plan.seconds, 2),
            "gate": dict(plan.gate),
        }
        draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process is putting files in place meanwhile, or two builds of one recipe would be mixed."""
        with (self.folder / ".lock").open("w") as lock:
            with contextlib.suppress(ImportError):  # no such lock on Windows
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def cache_folder(kind: str) -> Path:
    """Where things are kept that can be made again: `$XDG_CACHE_HOME/nemostream/{kind}`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemostream" / kind


def no_engine(chunk_ms: int, loaded: Iterable[int]) -> BackendError:
    """Why a backend that has engines of some chunk sizes cannot run a step of another."""
    return BackendError(
        f"there is no engine for chunks of {chunk_ms} ms, only for {', '.join(map(str, loaded))} ms; build one with "
        f"`nemostream build BUNDLE --chunk-ms {chunk_ms}` and the --precision and --backend of the others, or choose "
        "one of theirs."
    )
