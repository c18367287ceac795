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
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemostream.bundle import MOST_GRAPH, Bundle, File, sha256
from nemostream.errors import BackendError
from nemostream.external_data import external_files
from nemostream.untrusted import (
    MIB,
    SHA256,
    Check,
    fields,
    list_of,
    mapping_of,
    number,
    one_of,
    parse_json,
    plain_name,
    read_regular,
    record,
    regular_inside,
    shown,
    text,
    whole,
)

FORMAT = "nemostream-plan"
VERSION = 1
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
MOST_DESCRIPTION = MIB


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
    cache_dtype: str  # type of the caches: "float32", "float16" or "bfloat16"

    @classmethod
    def of(cls, bundle: Bundle, chunk_ms: int, **rest: Any) -> Recipe:
        graph = f"encoder-{chunk_ms}ms"
        made_of = bundle.graph(graph).sha256, bundle.manifest.weights.sha256
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
    validation: Mapping[str, Any] = field(default_factory=dict)  # what `runtime.gate` measured; empty: it was never run

    @property
    def path(self) -> Path:
        return self.folder / self.files[0].file

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


_WORD = text(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", "a name of letters, digits and _.+-")
_PLAN: dict[str, Check] = {
    "format": one_of(FORMAT),
    "version": one_of(VERSION),
    "recipe": record(
        Recipe,
        graph=_WORD,
        graph_sha256=SHA256,
        weights_sha256=SHA256,
        backend=one_of("tensorrt", "tensorrt-rtx", "onnxruntime"),
        library=_WORD,
        precision=one_of(*PRECISIONS),
        device=text(r"[a-z0-9_]+(, not validated)?", "a device"),
        max_batch=whole(0, 1 << 20),
        cache_dtype=one_of("float32", "float16", "bfloat16"),
    ),
    "files": list_of(record(File, file=plain_name, sha256=SHA256, bytes=whole(0, 1 << 42)), 1, 16),
    "seconds": number(0, 1e9),
    "validation": mapping_of(number(-1e12, 1e12)),
}


class PlanStore:
    """A folder of plans. Several processes may share it: what appears in it is whole.

    A plan is code for the library that loads it, so whoever can write to the folder decides what this process runs. The
    default folder is therefore created for this user only, and refused if another user owns it or may write to it.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._private = not folder
        self.folder = Path(folder) if folder else cache_folder("engines")

    def find(self, recipe: Recipe) -> Plan | None:
        """The plan of that recipe, every file of it checked against its hash, or None if there is none.

        Raises `BackendError` for one that is damaged or of something else, saying so; `put` replaces it.
        """
        self._check_owner()
        described = self.folder / f"{recipe.stem}.json"
        if not os.path.lexists(described):
            return None
        plan = self._read(described)
        if plan.recipe != recipe:
            raise BackendError(f"{described} describes something else than its name; build the engine again.")
        for file in plan.files:
            path = self.folder / file.file
            try:
                regular_inside(self.folder, file.file)
                intact = path.stat().st_size == file.bytes and sha256(path) == file.sha256
                read = external_files(read_regular(path, MOST_GRAPH)) if intact and path.suffix == ".onnx" else set()
            except (OSError, ValueError):
                intact = False
            if not intact:
                raise BackendError(f"{path} is missing or damaged; build the engine again.")
            if strange := sorted(read - {other.file for other in plan.files}):
                raise BackendError(f"{path} reads {shown(strange[0])}, which is not of it; build the engine again.")
        return plan

    def all(self) -> list[Plan]:
        """Every plan that is described under its own name; `find` checks whether its files are what it describes."""
        self._check_owner()
        plans = []
        for described in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(BackendError):
                plan = self._read(described)
                if described.name == f"{plan.recipe.stem}.json":
                    plans.append(plan)
        return plans

    def _check_owner(self) -> None:
        if self._private:
            check_private(self.folder)

    def _read(self, described: Path) -> Plan:
        try:
            regular_inside(self.folder, described.name)
            document = parse_json(read_regular(described, MOST_DESCRIPTION))
        except (OSError, ValueError) as error:
            raise BackendError(f"{described} cannot be read ({error}); build the engine again.") from error
        if isinstance(document, dict):
            marks = document.get("format"), document.get("version")
            if marks != (FORMAT, VERSION) and None not in marks:
                raise BackendError(f"{described} is of another nemostream; build the engine again.")
        try:
            found = fields(document, "", _PLAN)
        except ValueError as error:
            raise BackendError(f"{described} lacks or misnames a field ({error}); build the engine again.") from error
        return Plan(found["recipe"], self.folder, found["files"], found["seconds"], found["validation"])

    def put(
        self, recipe: Recipe, make: Callable[[Path], list[Path]], check: Callable[[Plan], Mapping[str, Any]]
    ) -> Plan:
        """Make a plan and keep it, unless making or checking it raises.

        `make` fills an empty folder and returns the files, the one to load first. `check` runs the plan, which is
        whole but not yet kept, and returns the figures to keep with it.
        """
        make_private(self.folder)
        self._check_owner()
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{recipe.stem}-") as temporary:
            start = time.perf_counter()
            made = make(Path(temporary))
            seconds = time.perf_counter() - start
            files = tuple(File(path.name, sha256(path), path.stat().st_size) for path in made)
            tried = Plan(recipe, Path(temporary), files, seconds)
            plan = dataclasses.replace(tried, folder=self.folder, validation=dict(check(tried)))
            # The description goes first and comes last: whoever finds it finds all of it.
            described = self.folder / f"{recipe.stem}.json"
            with self._alone():
                described.unlink(missing_ok=True)
                for path in made:
                    path.replace(self.folder / path.name)
                self._describe(plan, described)
        return plan

    def save_validation(self, plan: Plan, validation: Mapping[str, Any]) -> Plan:
        """Keep figures of a plan that was made for another machine and is now on it."""
        plan = dataclasses.replace(plan, validation=dict(validation))
        self._describe(plan, self.folder / f"{plan.recipe.stem}.json")
        return plan

    def _describe(self, plan: Plan, path: Path) -> None:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "recipe": dataclasses.asdict(plan.recipe),
            "files": [dataclasses.asdict(file) for file in plan.files],
            "seconds": round(plan.seconds, 2),
            "validation": dict(plan.validation),
        }
        draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process is putting files in place meanwhile, or two builds of one recipe would be mixed."""
        path = self.folder / ".lock"
        # Neither followed, if it is a link, nor truncated: whoever may write here must not choose what is emptied.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError as error:
            raise BackendError(f"{path} cannot be opened as a lock ({error.strerror}); remove it.") from error
        with os.fdopen(descriptor, "r+b", buffering=0) as lock:
            if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
                raise BackendError(f"{path} is not a regular file, so it cannot be the lock; remove it.")
            with contextlib.suppress(ImportError):  # no such lock on Windows
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def cache_folder(kind: str) -> Path:
    """Where things are kept that can be made again: `$XDG_CACHE_HOME/nemostream/{kind}`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemostream" / kind


def make_private(folder: Path) -> None:
    """Create a folder, and those above it that are missing, for this user only."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise BackendError(f"the folder {path} cannot be created ({error.strerror}); give another one.") from error
    if not folder.is_dir():
        raise BackendError(f"{folder} is not a folder; give another one.")


def check_private(folder: Path) -> None:
    """Raise `BackendError` if another user owns a cache folder, or may write to it. One that is missing is none."""
    for path in (folder, folder.parent):
        try:
            found = path.stat()
        except OSError:
            continue
        if not hasattr(os, "geteuid"):
            return
        if found.st_uid not in (os.geteuid(), 0):
            raise BackendError(
                f"{path} belongs to another user, who could replace what is loaded from it; remove it, or name a "
                "folder of your own with --engines or XDG_CACHE_HOME."
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BackendError(
                f"{path} can be written by other users, who could replace what is loaded from it: chmod go-w {path}"
            )


def no_engine(chunk_ms: int, loaded: Iterable[int]) -> BackendError:
    """Why a backend that has engines of some chunk sizes cannot run a step of another."""
    return BackendError(
        f"there is no engine for chunks of {chunk_ms} ms, only for {', '.join(map(str, loaded))} ms; build one with "
        f"`nemostream build BUNDLE --chunk-ms {chunk_ms}` and the --precision and --backend of the others, or choose "
        "one of theirs."
    )
