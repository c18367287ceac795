"""Store of engines built by `nemostream build`: encoder steps for one machine.

A plan consists of files for a library (a TensorRT engine, or an ONNX graph and its weights) and a JSON description: the
graph it was built from, the library that built it, the target device, and its validation figures. File names are for
humans; the JSON and the hashes in it are authoritative.

`engine` builds plans and `runtime` runs them; neither imports the other. This module depends on neither library.
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

from nemostream.bundle import MAX_GRAPH_BYTES, Bundle, File, sha256
from nemostream.errors import BackendError
from nemostream.external_data import external_files
from nemostream.untrusted import (
    MIB,
    SHA256,
    Check,
    dataclass_of,
    fields,
    integer,
    list_of,
    mapping_of,
    number,
    one_of,
    parse_json,
    plain_name,
    read_regular,
    regular_inside,
    short_repr,
    text,
)

FORMAT = "nemostream-plan"
VERSION = 3  # raised when engines are built or validated differently: plans of other versions are built again
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
MAX_DESCRIPTION_BYTES = MIB


@dataclass(frozen=True)
class Recipe:
    """Everything that identifies a plan. Plans with equal recipes are interchangeable."""

    graph: str  # "encoder-80ms"
    graph_sha256: str
    weights_sha256: str
    backend: str  # "tensorrt", "tensorrt-rtx" or "onnxruntime"
    library: str  # version of the library that built it; the same version must run it
    precision: str  # one of PRECISIONS
    device: str  # "cpu", "cuda" (any NVIDIA GPU), or a GPU architecture: "sm89"
    max_batch: int
    cache_dtype: str  # type of the caches: "float32", "float16" or "bfloat16"

    @classmethod
    def of(cls, bundle: Bundle, chunk_ms: int, **rest: Any) -> Recipe:
        """Return the recipe for the encoder step of a chunk size; `rest` are the other fields."""
        graph = f"encoder-{chunk_ms}ms"
        return cls(graph, bundle.graph(graph).sha256, bundle.manifest.weights.sha256, **rest)

    @property
    def stem(self) -> str:
        """Base of the plan's file names: readable, and unique because it ends with a hash of the recipe."""
        key = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.graph}-{self.backend}-{self.precision}-{self.device}-b{self.max_batch}-{key}"


@dataclass(frozen=True)
class Plan:
    """A plan on disk."""

    recipe: Recipe
    folder: Path
    files: tuple[File, ...]  # the first is the one to load
    seconds: float  # build time
    validation: Mapping[str, Any] = field(default_factory=dict)  # figures of `engine.validate`; empty if never run

    @property
    def path(self) -> Path:
        return self.folder / self.files[0].file

    @property
    def shared(self) -> Path | None:
        """The file of weights that the plans of several chunk sizes have in common, if there is one."""
        return self.folder / self.files[2].file if len(self.files) > 2 else None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


_WORD = text(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", "a name of letters, digits and _.+-")
_PLAN: dict[str, Check] = {
    "format": one_of(FORMAT),
    "version": one_of(VERSION),
    "recipe": dataclass_of(
        Recipe,
        graph=_WORD,
        graph_sha256=SHA256,
        weights_sha256=SHA256,
        backend=one_of("tensorrt", "tensorrt-rtx", "onnxruntime"),
        library=_WORD,
        precision=one_of(*PRECISIONS),
        device=text(r"[a-z0-9_]+(, not validated)?", "a device"),
        max_batch=integer(0, 1 << 20),
        cache_dtype=one_of("float32", "float16", "bfloat16"),
    ),
    "files": list_of(dataclass_of(File, file=plain_name, sha256=SHA256, bytes=integer(0, 1 << 42)), 1, 16),
    "seconds": number(0, 1e9),
    "validation": mapping_of(number(-1e12, 1e12)),
}


class PlanStore:
    """A folder of plans. Several processes may share it: plans appear in it atomically.

    A plan is code for the library that loads it, so write access to the folder is control over this process. The
    default folder is therefore created for this user only; if another user owns it or may write to it, `BackendError`
    is raised.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._private = not folder
        self.folder = Path(folder) if folder else cache_folder("engines")

    def find(self, recipe: Recipe) -> Plan | None:
        """Return the plan of a recipe, after checking the hashes of its files, or None if there is none.

        Raises `BackendError` if the plan is damaged or does not match the recipe; `put` replaces it.
        """
        self._check_owner()
        described = self.folder / f"{recipe.stem}.json"
        if not os.path.lexists(described):
            return None
        plan = self._read(described)
        if plan.recipe != recipe:
            raise BackendError(f"{described} does not describe the engine it is named after; build the engine again.")
        for file in plan.files:
            path = self.folder / file.file
            try:
                regular_inside(self.folder, file.file)
                intact = path.stat().st_size == file.bytes and sha256(path) == file.sha256
                read = (
                    external_files(read_regular(path, MAX_GRAPH_BYTES)) if intact and path.suffix == ".onnx" else set()
                )
            except (OSError, ValueError):
                intact = False
            if not intact:
                raise BackendError(f"{path} is missing or damaged; build the engine again.")
            if foreign := sorted(read - {other.file for other in plan.files}):
                raise BackendError(
                    f"{path} reads {short_repr(foreign[0])}, which is not one of the engine's files; build the engine "
                    "again."
                )
        return plan

    def all(self) -> list[Plan]:
        """Return all plans whose description has the right name. Their files are not checked; `find` does that."""
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
            document = parse_json(read_regular(described, MAX_DESCRIPTION_BYTES))
        except (OSError, ValueError) as error:
            raise BackendError(f"{described} cannot be read ({error}); build the engine again.") from error
        if isinstance(document, dict):
            version = document.get("format"), document.get("version")
            if version != (FORMAT, VERSION) and None not in version:
                raise BackendError(f"{described} was written by another version of nemostream; build the engine again.")
        try:
            found = fields(document, "", _PLAN)
        except ValueError as error:
            raise BackendError(
                f"{described} has a missing or invalid field ({error}); build the engine again."
            ) from error
        return Plan(found["recipe"], self.folder, found["files"], found["seconds"], found["validation"])

    def put(
        self, recipe: Recipe, build: Callable[[Path], list[Path]], validate: Callable[[Plan], Mapping[str, Any]]
    ) -> Plan:
        """Build a plan and store it, unless building or validating it raises.

        `build` fills an empty folder and returns the files, the one to load first. `validate` runs the complete plan
        before it is stored and returns its validation figures.
        """
        make_private(self.folder)
        self._check_owner()
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{recipe.stem}-") as temporary:
            start = time.perf_counter()
            built = build(Path(temporary))
            seconds = time.perf_counter() - start
            files = tuple(File(path.name, sha256(path), path.stat().st_size) for path in built)
            plan = Plan(recipe, Path(temporary), files, seconds)
            plan = dataclasses.replace(plan, folder=self.folder, validation=dict(validate(plan)))
            # The description is removed first and written last, so that it exists only beside complete files.
            described = self.folder / f"{recipe.stem}.json"
            with self._lock():
                described.unlink(missing_ok=True)
                for path in Path(temporary).iterdir():  # also what `validate` left, such as compiled kernels
                    path.replace(self.folder / path.name)
                self._describe(plan, described)
        return plan

    def save_validation(self, plan: Plan, validation: Mapping[str, Any]) -> Plan:
        """Store the validation figures of a plan that was built on another machine, and return the updated plan."""
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
    def _lock(self) -> Iterator[None]:
        """Hold a lock on the folder, so that the files of two builds of one recipe are not mixed."""
        path = self.folder / ".lock"
        # Links are not followed and files not truncated: others who may write here must not choose what is emptied.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
        except OSError as error:
            raise BackendError(f"{path} cannot be opened as a lock ({error.strerror}); remove it.") from error
        with os.fdopen(descriptor, "r+b", buffering=0) as lock:
            if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
                raise BackendError(f"{path} is the lock but not a regular file; remove it.")
            with contextlib.suppress(ImportError):  # not available on Windows
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def cache_folder(kind: str) -> Path:
    """Return the cache folder `$XDG_CACHE_HOME/nemostream/{kind}`; `$XDG_CACHE_HOME` defaults to `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemostream" / kind


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents with access for this user only."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise BackendError(
                f"the folder {path} cannot be created ({error.strerror}); choose another one."
            ) from error
    if not folder.is_dir():
        raise BackendError(f"{folder} is not a folder; choose another one.")


def check_private(folder: Path) -> None:
    """Raise `BackendError` if another user owns a cache folder or may write to it. A missing folder is accepted."""
    for path in (folder, folder.parent):
        try:
            found = path.stat()
        except OSError:
            continue
        if not hasattr(os, "geteuid"):
            return
        if found.st_uid not in (os.geteuid(), 0):
            raise BackendError(
                f"{path} belongs to another user, who could replace the files loaded from it; remove it, or choose "
                "your own folder with --engines or XDG_CACHE_HOME."
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BackendError(
                f"{path} can be written by other users, who could replace the files loaded from it: chmod go-w {path}"
            )


def missing_engine_error(chunk_ms: int, loaded: Iterable[int]) -> BackendError:
    """Return the error for a step of a chunk size without an engine; `loaded` are those with one."""
    return BackendError(
        f"there is no engine for chunks of {chunk_ms} ms, only for {', '.join(map(str, loaded))} ms; build one with "
        f"`nemostream build BUNDLE --chunk-ms {chunk_ms}` and the --precision and --backend of the others, or choose "
        "one of these chunk sizes."
    )
