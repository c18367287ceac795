"""Store of engines: lookup, integrity checks and atomicity."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream import plans
from nemostream.bundle import Bundle
from nemostream.errors import BackendError, EngineValidationError
from nemostream.plans import Plan, PlanStore, Recipe, cache_folder, missing_engine_error

RECIPE = Recipe(
    graph="encoder-80ms",
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    backend="tensorrt",
    library="11.0",
    precision="fp16",
    device="sm90",
    max_batch=64,
    cache_dtype="float16",
)


def build(folder: Path) -> list[Path]:
    files = [folder / f"{RECIPE.stem}.engine", folder / f"{RECIPE.stem}.bin"]
    for index, file in enumerate(files):
        file.write_bytes(bytes([index]) * 100)
    return files


def validate(plan: Plan) -> dict[str, Any]:
    assert plan.path.read_bytes() == bytes(100)
    return {"cosine": 1.0}


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "engines")


def test_put_and_find(store: PlanStore) -> None:
    assert store.find(RECIPE) is None
    put = store.put(RECIPE, build, validate)
    found = store.find(RECIPE)
    assert found is not None
    assert dataclasses.replace(put, seconds=0) == dataclasses.replace(found, seconds=0)
    assert (found.validation, found.bytes, found.path.parent) == ({"cosine": 1.0}, 200, store.folder)
    assert store.all() == [found]
    assert len([*store.folder.glob("[!.]*")]) == 3
    assert {path.name for path in store.folder.glob(".*")} == {".lock"}, "no temporary files remain"
    assert found.path.name.startswith("encoder-80ms-tensorrt-fp16-sm90-b64-")


def test_every_recipe_field_changes_the_name(store: PlanStore) -> None:
    others = {
        "graph": "encoder-560ms",
        "graph_sha256": "c" * 64,
        "weights_sha256": "c" * 64,
        "backend": "tensorrt-rtx",
        "library": "11.1",
        "precision": "bf16",
        "device": "sm89",
        "max_batch": 65,
        "cache_dtype": "bfloat16",
    }
    assert others.keys() == {field.name for field in dataclasses.fields(Recipe)}
    store.put(RECIPE, build, validate)
    stems = {RECIPE.stem}
    for field, value in others.items():
        other = dataclasses.replace(RECIPE, **{field: value})
        assert store.find(other) is None
        stems.add(other.stem)
    assert len(stems) == 1 + len(others)


@pytest.mark.parametrize("damage", ["change", "truncate", "remove"])
@pytest.mark.parametrize("which", [0, 1])
def test_damaged_file_is_reported_and_replaced(store: PlanStore, damage: str, which: int) -> None:
    plan = store.put(RECIPE, build, validate)
    path = store.folder / plan.files[which].file
    if damage == "change":
        path.write_bytes(b"\7" + path.read_bytes()[1:])
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:50])
    else:
        path.unlink()
    with pytest.raises(BackendError, match=f"{path.name} is missing or damaged; build the engine again"):
        store.find(RECIPE)
    store.put(RECIPE, build, validate)
    assert store.find(RECIPE)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: "not json", "cannot be read"),
        (lambda d: json.dumps(d | {"format": "other"}), "written by another version of nemostream"),
        (lambda d: json.dumps(d | {"version": 99}), "written by another version of nemostream"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "validation"}), "has a missing or invalid field"),
        (lambda d: json.dumps(d | {"files": []}), "has a missing or invalid field"),
        (lambda d: json.dumps(d | {"recipe": d["recipe"] | {"device": "sm80"}}), "does not describe the engine"),
        (lambda d: json.dumps(d | {"recipe": d["recipe"] | {"colour": "red"}}), "has a missing or invalid field"),
        (lambda d: json.dumps(d | {"files": [d["files"][0] | {"file": "../x"}]}), "has a missing or invalid field"),
    ],
)
def test_invalid_description(store: PlanStore, edit: Any, message: str) -> None:
    store.put(RECIPE, build, validate)
    path = store.folder / f"{RECIPE.stem}.json"
    path.write_text(edit(json.loads(path.read_text())))
    with pytest.raises(BackendError, match=f"{message}.*build the engine again"):
        store.find(RECIPE)


def test_failed_validation_is_not_stored(store: PlanStore) -> None:
    def fail(plan: Plan) -> dict[str, Any]:
        raise EngineValidationError("the tokens differ.")

    with pytest.raises(EngineValidationError):
        store.put(RECIPE, build, fail)
    assert store.find(RECIPE) is None and not [*store.folder.glob("[!.]*")]
    stored = store.put(RECIPE, build, validate)
    with pytest.raises(EngineValidationError):  # the valid one remains
        store.put(RECIPE, build, fail)
    assert store.find(RECIPE) == dataclasses.replace(stored, seconds=round(stored.seconds, 2))


def test_save_validation(store: PlanStore) -> None:
    plan = store.put(RECIPE, build, lambda plan: {})
    assert not plan.validation
    store.save_validation(plan, {"cosine": 0.9999})
    found = store.find(RECIPE)
    assert found and found.validation == {"cosine": 0.9999}


def test_concurrent_puts(store: PlanStore) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                store.put(RECIPE, build, validate)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.find(RECIPE)


# -- several processes -------------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import sys
from pathlib import Path
from nemostream.plans import PlanStore, Recipe
recipe = Recipe(**eval(sys.argv[2]))
def build(folder):
    files = [folder / f"{recipe.stem}.engine", folder / f"{recipe.stem}.bin"]
    for file in files:
        file.write_bytes(b"other" * 20)
    return files
def validate(plan):
    print("built", flush=True)
    return {"cosine": 0.5}
PlanStore(sys.argv[1]).put(recipe, build, validate)
print("stored", flush=True)
"""


def is_locked(path: Path) -> bool:
    """Return whether another open file holds the lock of a file. Locks of one process exclude each other too."""
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_another_process_waits_until_a_plan_is_complete(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that build one recipe: the files of one never mix with those of the other."""
    arguments = [sys.executable, "-c", OTHER_PROCESS, str(store.folder), repr(dataclasses.asdict(RECIPE))]
    replace, processes, targets = Path.replace, list[subprocess.Popen[str]](), list[str]()

    def watched(path: Path, target: Path) -> Path:
        """Rename a file of the plan; after the first, start a process that has its own plan ready to be stored."""
        assert is_locked(store.folder / ".lock")
        done = replace(path, target)
        targets.append(target.name)
        if not processes:
            processes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
            limit = threading.Timer(60, processes[0].kill)
            limit.daemon = True
            limit.start()
            output = processes[0].stdout
            assert output and output.readline() == "built\n"
            limit.cancel()
        return done

    monkeypatch.setattr(Path, "replace", watched)
    try:
        store.put(RECIPE, build, validate)
        monkeypatch.undo()
        assert sorted(targets[:2]) == [f"{RECIPE.stem}.bin", f"{RECIPE.stem}.engine"]
        assert targets[2:] == [f"{RECIPE.stem}.json"], "the description is written last"
        out, _ = processes[0].communicate(timeout=60)
        assert (processes[0].returncode, out) == (0, "stored\n")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not is_locked(store.folder / ".lock")
    plan = store.find(RECIPE)
    assert plan and plan.validation == {"cosine": 0.5}, "the second one replaced the first"
    assert plan.path.read_bytes() == b"other" * 20


def test_an_interrupted_replacement_leaves_no_description(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of two builds beside the old description would be reported as damaged."""
    store.put(RECIPE, build, validate)
    replace, count = Path.replace, 0

    def fails(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError("no space left")
        return replace(path, target)

    def build_other(folder: Path) -> list[Path]:
        files = build(folder)
        for file in files:
            file.write_bytes(b"x")
        return files

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError):
        store.put(RECIPE, build_other, lambda plan: {})
    monkeypatch.undo()
    assert count == 2 and store.find(RECIPE) is None and store.all() == []
    assert {path.name for path in store.folder.glob(".*")} == {".lock"}, "no temporary files remain"


def test_descriptions_are_replaced_atomically(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = store.put(RECIPE, build, validate)
    before = store.find(RECIPE)
    write_text = Path.write_text

    def interrupted(path: Path, text: str, **options: Any) -> int:
        write_text(path, text[:20], **options)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(OSError):
        store.save_validation(plan, {"cosine": 0.1})
    monkeypatch.undo()
    assert store.find(RECIPE) == before and before is not None


def test_files_that_validation_leaves_are_kept(store: PlanStore) -> None:
    """Such as compiled kernels beside the engine; they are moved, and the description does not list them."""

    def validate_and_compile(plan: Plan) -> dict[str, Any]:
        assert plan.folder.parent == store.folder and plan.folder != store.folder
        assert [file.bytes for file in plan.files] == [100, 100] and plan.seconds >= 0 and not plan.validation
        (plan.folder / "kernels.cubin").write_bytes(b"kernels")
        return {"cosine": 1.0}

    plan = store.put(RECIPE, build, validate_and_compile)
    assert (store.folder / "kernels.cubin").read_bytes() == b"kernels"
    assert plan.folder == store.folder and len(plan.files) == 2


# -- the description ---------------------------------------------------------------------------------------------------


def test_the_description(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content, field by field: another format needs another version."""
    times = iter([100.0, 103.14159])
    monkeypatch.setattr(plans, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    plan = store.put(RECIPE, build, validate)
    assert plan.seconds == pytest.approx(3.14159)
    assert json.loads((store.folder / f"{RECIPE.stem}.json").read_text()) == {
        "format": "nemostream-plan",
        "version": 3,
        "recipe": dataclasses.asdict(RECIPE),
        "files": [
            {
                "file": f"{RECIPE.stem}.{ending}",
                "sha256": hashlib.sha256(bytes([value]) * 100).hexdigest(),
                "bytes": 100,
            }
            for value, ending in enumerate(("engine", "bin"))
        ],
        "seconds": 3.14,
        "validation": {"cosine": 1.0},
    }
    assert (store.find(RECIPE) or plan).seconds == 3.14
    recipe = {name: getattr(RECIPE, name) for name in sorted(vars(RECIPE))}
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    assert RECIPE.stem == f"encoder-80ms-tensorrt-fp16-sm90-b64-{digest[:12]}"
    with pytest.raises(ValueError):  # not valid JSON
        store.save_validation(plan, {"cosine": float("nan")})
    assert (store.find(RECIPE) or plan).validation == {"cosine": 1.0}


def test_the_recipe_of_a_bundle(demo_bundle: Bundle) -> None:
    rest = {name: getattr(RECIPE, name) for name in ("backend", "library", "precision", "device", "max_batch")}
    recipe = Recipe.of(demo_bundle, 560, **rest, cache_dtype="float16")
    manifest = demo_bundle.manifest
    assert (recipe.graph, recipe.graph_sha256) == ("encoder-560ms", manifest.graphs["encoder-560ms"].sha256)
    assert recipe.weights_sha256 == manifest.weights.sha256
    assert {name: getattr(recipe, name) for name in rest} == rest


@pytest.mark.parametrize("version", [2, 4, 3.0, "3", True, None])
def test_descriptions_of_other_versions_are_rejected(store: PlanStore, version: Any) -> None:
    store.put(RECIPE, build, validate)
    path = store.folder / f"{RECIPE.stem}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    message = "another version of nemostream" if version in (2, 4, "3", True) else "missing or invalid field"
    with pytest.raises(BackendError, match=f"{message}.*; build the engine again"):
        store.find(RECIPE)
    assert store.all() == []


INVALID_FIELDS: list[tuple[str, list[Any]]] = [
    ("format", ["x", 5, None]),
    ("recipe", [None, [], {}]),
    ("recipe.graph", ["", "a b", "a/b", "-a", "a" * 101, 5]),
    ("recipe.graph_sha256", ["a" * 63, "A" * 64, "g" * 64, None]),
    ("recipe.weights_sha256", ["a" * 63, "A" * 64, "g" * 64, None]),
    ("recipe.backend", ["openvino", None]),
    ("recipe.library", ["", "a/b", "a" * 101, 11]),
    ("recipe.precision", ["int4", 16]),
    ("recipe.device", ["", "SM90", "sm90, validated", "a/b", 5]),
    ("recipe.max_batch", [-1, (1 << 20) + 1, 64.0, "64", True]),
    ("recipe.cache_dtype", ["int8", None]),
    ("files", [[], {}, None, 17]),
    ("files.0", [[], 5]),
    ("files.0.file", ["../x", "/x", "", ".", "..", "a/b", "a\\b", "c:x", 5]),
    ("files.0.sha256", ["a" * 63, "g" * 64, 5]),
    ("files.0.bytes", [-1, (1 << 42) + 1, 100.0, "100"]),
    ("files.1.sha256", ["a" * 63]),
    ("seconds", [-1, 1e10, "3", None, True]),
    ("validation", [[], None, {"cosine": "1"}, {"cosine": 1e13}, {"cosine": -1e13}, {"cosine": None}]),
]


@pytest.mark.parametrize(("path", "values"), INVALID_FIELDS, ids=[path for path, _ in INVALID_FIELDS])
def test_every_field_of_a_description_is_validated(store: PlanStore, path: str, values: list[Any]) -> None:
    store.put(RECIPE, build, validate)
    described = store.folder / f"{RECIPE.stem}.json"
    content = described.read_text()
    names: list[Any] = [int(name) if name.isdigit() else name for name in path.split(".")]
    name = re.sub(r"\.(\d+)", r"[\1]", path)  # "files[0].bytes"
    section_name, _, last = name.rpartition(".")
    for value in [*values, ...]:
        document = json.loads(content)
        section = document
        for key in names[:-1]:
            section = section[key]
        if value is ...:
            if isinstance(section, list):
                continue
            del section[names[-1]]
        else:
            section[names[-1]] = [document["files"][0]] * 17 if value == 17 else value
        described.write_text(json.dumps(document))
        with pytest.raises(BackendError, match="build the engine again") as caught:
            store.find(RECIPE)
        if path == "format" and isinstance(value, str | int):
            message = "another version"
        elif value is ...:
            message = rf"\(the field '{last}'{f' of {re.escape(section_name)}' if section_name else ''} is missing\)"
        else:  # an empty object lacks its first field
            message = rf"\((the field 'graph' of )?{re.escape(name)}(\.cosine)? is "
        assert re.search(message, str(caught.value)), (value, caught.value)
        assert store.all() == []


def test_limits_of_a_description_are_accepted(store: PlanStore) -> None:
    """Both ends of the ranges, and the device of an engine that is not validated."""
    for max_batch, device in ((0, "cpu, not validated"), (1 << 20, "sm_90")):
        recipe = dataclasses.replace(
            RECIPE, max_batch=max_batch, device=device, library="1.0+cu13_a-b", graph="a" * 100
        )
        files = [f"{index}.bin" for index in range(16)]

        def make(folder: Path, files: list[str] = files) -> list[Path]:
            for name in files:
                (folder / name).write_bytes(b"")
            return [folder / name for name in files]

        store.put(recipe, make, lambda plan: {"low": -1e12, "high": 1e12})
        found = store.find(recipe)
        assert found and found.recipe == recipe and len(found.files) == 16


def test_size_and_hash_of_every_file_are_checked(store: PlanStore) -> None:
    """A description with the size, or the hash, of another content."""
    store.put(RECIPE, build, validate)
    path = store.folder / f"{RECIPE.stem}.json"
    content = path.read_text()
    for index in (0, 1):
        for field, value in (("bytes", 101), ("sha256", "0" * 64)):
            document = json.loads(content)
            document["files"][index][field] = value
            path.write_text(json.dumps(document))
            with pytest.raises(BackendError, match=r"\.(engine|bin) is missing or damaged"):
                store.find(RECIPE)


def test_a_plan_of_another_recipe_under_this_name_is_rejected(store: PlanStore) -> None:
    """Each field of the recipe is compared, not only the name of the file."""
    store.put(RECIPE, build, validate)
    path = store.folder / f"{RECIPE.stem}.json"
    content = json.loads(path.read_text())
    for name, value in {"library": "12.0", "max_batch": 1, "weights_sha256": "c" * 64}.items():
        path.write_text(json.dumps(content | {"recipe": content["recipe"] | {name: value}}))
        with pytest.raises(BackendError, match="does not describe the engine it is named after"):
            store.find(RECIPE)
        assert store.all() == []


def test_folders(tmp_path: Path) -> None:
    """A folder is created with its parents; a file, and a folder that cannot be created, are errors."""
    store = PlanStore(str(tmp_path / "a" / "b"))
    assert store.all() == [] and store.find(RECIPE) is None and not store.folder.exists()
    store.put(RECIPE, build, validate)
    assert isinstance(store.folder, Path) and store.find(RECIPE)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BackendError, match=r"file is not a folder; choose another one\.$"):
        PlanStore(tmp_path / "file").put(RECIPE, build, validate)
    with pytest.raises(BackendError, match=r"cannot be created \(.*\); choose another one\.$"):
        PlanStore(tmp_path / "file" / "inside").put(RECIPE, build, validate)


def test_named_folders_need_not_be_private(tmp_path: Path) -> None:
    """Only the default folder is checked: one that the user names may be shared."""
    store = PlanStore(tmp_path / "shared")
    store.put(RECIPE, build, validate)
    store.folder.chmod(0o777)
    assert store.find(RECIPE) and store.all()


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PlanStore().folder == cache_folder("engines") == tmp_path / "nemostream" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("engines") == tmp_path / ".cache" / "nemostream" / "engines"


# -- untrusted files ---------------------------------------------------------------------------------------------------


def test_description_under_another_name_is_ignored(store: PlanStore) -> None:
    plan = store.put(RECIPE, build, validate)
    described = store.folder / f"{RECIPE.stem}.json"
    described.rename(store.folder / "anything.json")
    assert store.all() == [] and store.find(RECIPE) is None
    (store.folder / "anything.json").rename(described)
    assert store.all() == [dataclasses.replace(plan, seconds=round(plan.seconds, 2))]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "null", "5", '"x"', "{}", "", "\0", " " * (2**20 + 1), "NaN"], ids=range(10)
)
def test_other_json_files_are_ignored(store: PlanStore, content: str) -> None:
    store.put(RECIPE, build, validate)
    (store.folder / "a.json").write_text(content)
    (store.folder / "b.json").mkdir()
    os.mkfifo(store.folder / "c.json")
    (store.folder / "d.json").symlink_to("/dev/zero")
    assert [plan.recipe for plan in store.all()] == [RECIPE] and store.find(RECIPE)


@pytest.mark.parametrize("value", ["/etc/passwd", "../x", "a/b", "", ".", 5, None])
def test_file_names_outside_the_folder_are_rejected(store: PlanStore, value: Any) -> None:
    store.put(RECIPE, build, validate)
    path = store.folder / f"{RECIPE.stem}.json"
    document = json.loads(path.read_text())
    document["files"][0]["file"] = value
    path.write_text(json.dumps(document))
    assert store.all() == []
    with pytest.raises(BackendError, match="build the engine again"):
        store.find(RECIPE)


@pytest.mark.parametrize("kind", ["link outside", "FIFO", "device"])
def test_links_and_special_files_are_rejected(store: PlanStore, tmp_path: Path, kind: str) -> None:
    plan = store.put(RECIPE, build, validate)
    plan.path.rename(tmp_path / "outside")
    if kind == "FIFO":
        os.mkfifo(plan.path)
    else:
        plan.path.symlink_to(tmp_path / "outside" if kind == "link outside" else "/dev/zero")
    with pytest.raises(BackendError, match="missing or damaged; build the engine again"):
        store.find(RECIPE)


def test_descriptions_outside_the_folder_are_rejected(store: PlanStore, tmp_path: Path) -> None:
    store.put(RECIPE, build, validate)
    described = store.folder / f"{RECIPE.stem}.json"
    described.rename(tmp_path / "outside.json")
    described.symlink_to(tmp_path / "outside.json")
    assert store.all() == []
    with pytest.raises(BackendError, match=r"leads outside the folder.*build the engine again"):
        store.find(RECIPE)


def test_the_error_for_a_chunk_size_without_engine_names_the_others() -> None:
    assert str(missing_engine_error(160, [80, 560])).startswith(
        "there is no engine for chunks of 160 ms, only for 80, 560 ms; build one with "
        "`nemostream build BUNDLE --chunk-ms 160`"
    )


def test_external_data_must_be_one_of_the_files(store: PlanStore) -> None:
    def build_reading(location: bytes) -> Any:
        entry = b"\x0a\x08location\x12" + bytes([len(location)]) + location
        tensor = b"\x6a" + bytes([len(entry)]) + entry
        initializer = b"\x2a" + bytes([len(tensor)]) + tensor

        def build_graph(folder: Path) -> list[Path]:
            files = [folder / "a.onnx", folder / "a.bin"]
            files[0].write_bytes(b"\x3a" + bytes([len(initializer)]) + initializer)
            files[1].write_bytes(b"1234")
            return files

        return build_graph

    store.put(RECIPE, build_reading(b"a.bin"), lambda plan: {})
    assert store.find(RECIPE)
    for location in (b"../a.bin", b"/etc/passwd", b"b.bin"):
        store.put(RECIPE, build_reading(location), lambda plan: {})
        with pytest.raises(BackendError, match="which is not one of the engine's files; build the engine again"):
            store.find(RECIPE)


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_lock_is_neither_followed_nor_truncated(store: PlanStore, tmp_path: Path, kind: str) -> None:
    store.folder.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = store.folder / ".lock"
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "FIFO":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(BackendError, match=r"\.lock .*remove it"):
        store.put(RECIPE, build, validate)
    assert victim.read_text() == "precious"
    lock.rmdir() if kind == "folder" else lock.unlink()
    lock.write_text("content")
    store.put(RECIPE, build, validate)
    assert lock.read_text() == "content"


def test_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    old = os.umask(0)
    try:
        PlanStore().put(RECIPE, build, validate)
        PlanStore(tmp_path / "named").put(RECIPE, build, validate)
    finally:
        os.umask(old)
    folder = cache_folder("engines")
    for path in (folder, folder.parent, folder.parent.parent, tmp_path / "named"):
        assert path.stat().st_mode & 0o777 == 0o700, path
    assert (folder / ".lock").stat().st_mode & 0o777 == 0o600
    assert PlanStore().find(RECIPE)
    for path in (folder, folder.parent):
        for mode in (0o720, 0o702):
            path.chmod(mode)
            uses: list[Callable[[], Any]] = [
                lambda: PlanStore().find(RECIPE),
                lambda: PlanStore().all(),
                lambda: PlanStore().put(RECIPE, build, validate),
            ]
            for use in uses:
                with pytest.raises(BackendError, match=f"can be written by other users.*chmod go-w {path}$"):
                    use()
        path.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1000)
    if os.getuid():  # folders of root are trusted
        with pytest.raises(BackendError, match="belongs to another user"):
            PlanStore().find(RECIPE)
    else:
        assert PlanStore().find(RECIPE)  # the folder belongs to root
        os.chown(folder, 12345, -1)
        with pytest.raises(BackendError, match="belongs to another user"):
            PlanStore().find(RECIPE)
