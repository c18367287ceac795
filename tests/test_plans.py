"""Store of engines: lookup, integrity checks and atomicity."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from nemostream.errors import BackendError, EngineValidationError
from nemostream.plans import Plan, PlanStore, Recipe, cache_folder

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
    assert PlanStore().find(RECIPE)
    for path in (folder, folder.parent):
        for mode in (0o720, 0o702):
            path.chmod(mode)
            for use in (lambda: PlanStore().find(RECIPE), lambda: PlanStore().all()):
                with pytest.raises(BackendError, match=f"can be written by other users.*chmod go-w {path}$"):
                    use()
        path.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1000)
    if os.getuid():  # folders of root are trusted
        with pytest.raises(BackendError, match="belongs to another user"):
            PlanStore().find(RECIPE)
    else:
        os.chown(folder, 12345, -1)
        with pytest.raises(BackendError, match="belongs to another user"):
            PlanStore().find(RECIPE)
