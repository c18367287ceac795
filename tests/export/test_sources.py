"""How a checkpoint is found: files, folders, Hugging Face's cache and downloads, names in NeMo."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemostream.bundle import Bundle, sha256
from nemostream.errors import CheckpointError
from nemostream.export.sources import Source, find_source

COMMITS = {"main": "a" * 40, "nemotron-speech-streaming-jan2026": "b" * 40, "refs/pr/3": "c" * 40}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def found(checkpoint: str | Path) -> Path:
    return find_source(checkpoint, lambda message: None).path


def rejected(checkpoint: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_source(checkpoint, lambda message: None)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 600
    return message


def cached(home: Path, repository: str, files: dict[str, bytes], commits: dict[str, str] = COMMITS) -> Path:
    """Write the cache of a repository as huggingface_hub does: links from the snapshots to blobs."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    for revision, commit in commits.items():
        snapshot = folder / "snapshots" / commit
        for name, content in files.items():
            blob = folder / "blobs" / f"{commit[0]}-{name}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
        reference = folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return folder


# -- paths -------------------------------------------------------------------------------------------------------------


def test_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "some folder"
    folder.mkdir()
    assert "neither a .nemo file nor config.json and model.safetensors; it has no files" in rejected(folder)
    (folder / "README.md").touch()
    assert "it has README.md: give the folder of a checkpoint" in rejected(folder)
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    assert found(folder) == found(str(folder)) == found(folder / "model.safetensors") == folder
    assert Source("x", folder).name == "some folder"
    (folder / "voice.nemo").touch()  # what the original repositories have beside the weights
    assert found(folder) == found(folder / "voice.nemo") == folder / "voice.nemo"
    (folder / "other.nemo").touch()
    assert rejected(folder).endswith("has several .nemo files; give one of other.nemo, voice.nemo.")


def test_other_kinds_of_files_are_rejected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nemo")
    (tmp_path / "voice.pt").write_bytes(b"x" * 1000)
    for path in (tmp_path / "pipe.nemo", tmp_path / "voice.pt", Path("/dev/null")):
        with pytest.raises(CheckpointError, match=r"cannot be read as a \.nemo checkpoint"):
            find_source(path, print).check()


@pytest.mark.parametrize("given", ["no.nemo", "./voice", "/none", "a/b/c", "~/none", "folder/no.nemo", ""])
def test_paths_that_do_not_exist(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = rejected(given or Path("no-model"))
    assert "does not exist; give a .nemo file, a folder with a checkpoint, or a model as owner/name." in message


@pytest.mark.parametrize("given", ["~nosuchuser/x", "a" * 300, f"./{'a' * 300}", "a/" * 3000])
def test_paths_that_cannot_be_looked_up(given: str) -> None:
    assert "give a .nemo file, a folder with a checkpoint, or a model as owner/name." in rejected(given)
    assert "give a .nemo file" in rejected(Path(given))


@pytest.mark.parametrize("home", ["~nosuchuser/x", "/" + "a" * 300])
def test_a_cache_that_cannot_be_looked_up(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", home)
    assert "the cache cannot be read: " in rejected("a/b")


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_revisions_in_the_cache(tmp_path: Path) -> None:
    folder = cached(tmp_path / "home", "nvidia/streaming", {"streaming.nemo": b"x"})
    for revision, commit in COMMITS.items():
        wanted = folder / "snapshots" / commit / "streaming.nemo"
        assert found(f"nvidia/streaming@{revision}") == found(f"nvidia/streaming@{commit}") == wanted
        assert wanted.is_symlink() and found(wanted) == wanted
        source = find_source(f"nvidia/streaming@{revision}", print)
        assert source.describe() == {
            "source": f"nvidia/streaming@{revision}",
            "sha256": sha256(wanted),
            "revision": commit,
            "bytes": 1,
        }
    assert found("nvidia/streaming") == found(folder) == folder / "snapshots" / COMMITS["main"] / "streaming.nemo"


def test_a_snapshot_of_transformers_files_has_the_name_of_its_repository(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"", "tokenizer.json": b"{}"}
    folder = cached(tmp_path / "home", "someone/fine-tune", files)
    source = find_source("someone/fine-tune@refs/pr/3", print)
    assert source.path == folder / "snapshots" / ("c" * 40)
    assert source.name == "fine-tune"


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("HF_HUB_CACHE", "x/hub"), ("HUGGINGFACE_HUB_CACHE", "x/hub"), ("HF_HOME", "x"), ("XDG_CACHE_HOME", "")],
)
def test_the_folder_of_the_cache(variable: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, str(tmp_path / folder))
    cached(tmp_path / ("x" if folder else "huggingface"), "a/b", {"b.nemo": b""})
    assert found("a/b").name == "b.nemo"


def test_models_that_are_not_cached(tmp_path: Path) -> None:
    message = rejected("nvidia/streaming")
    assert "HF_HUB_OFFLINE is set" in message and "has no snapshot of nvidia/streaming@main" in message
    cached(tmp_path / "home", "nvidia/streaming", {"streaming.nemo": b"x"}, {"main": "a" * 40})
    assert "only of main" in rejected("nvidia/streaming@next")
    cached(tmp_path / "home", "nvidia/empty", {"README.md": b"x"})
    assert "it has README.md" in rejected("nvidia/empty")
    (tmp_path / "home/hub/models--nvidia--streaming/refs/main").write_text("../../../etc")
    assert "has no snapshot" in rejected("nvidia/streaming")


@pytest.mark.parametrize("given", ["a/b@", "a/b@../x", "a/b@x/../../y", "a/b@-x", "a b/c", "a/b c", "-a/b", "a/b@x y"])
def test_invalid_names(given: str) -> None:
    message = rejected(given)
    assert "is not a revision" in message or "is neither a file nor the name of a model" in message


@pytest.mark.parametrize(
    ("variable", "value", "offline"),
    [
        ("HF_HUB_OFFLINE", "1", True),
        ("HF_HUB_OFFLINE", "ON", True),
        ("HF_HUB_OFFLINE", "yes", True),
        ("HF_HUB_OFFLINE", "true", True),
        ("HF_HUB_OFFLINE", "0", False),
        ("TRANSFORMERS_OFFLINE", "1", True),
        ("TRANSFORMERS_OFFLINE", "", False),
    ],
)
def test_variables_that_forbid_downloads(
    variable: str, value: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library that downloads, the message states which of both is the reason."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("nemostream.export.sources.find_spec", lambda name: None)
    message = rejected("a/b")
    assert ("HF_HUB_OFFLINE is set" in message) == offline == ("installs huggingface_hub" not in message)


def test_files_that_are_found_are_listed(tmp_path: Path) -> None:
    """At most six names, in alphabetical order; hidden files are not listed."""
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("h", "g", "f", "e", "d", "c", ".hidden"):
        (folder / name).touch()
    assert "it has c, d, e, f, g, h: give" in rejected(folder)
    (folder / "b").touch()
    (folder / "a").touch()
    assert "it has a, b, c, d, e, f and 2 more: give" in rejected(folder)
    for index in range(11):
        (folder / f"{index:02}.nemo").touch()
    assert rejected(folder).endswith("give one of " + ", ".join(f"{index:02}.nemo" for index in range(10)) + ".")


def test_each_part_of_a_folder_is_needed(tmp_path: Path) -> None:
    for names, complete in (
        (["config.json", "model.safetensors"], True),
        (["config.json", "model.safetensors.index.json"], True),
        (["config.json"], False),
        (["model.safetensors"], False),
        (["config.json", "model.bin"], False),
    ):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        if complete:
            assert found(folder) == found(folder / names[1]) == folder
        else:
            assert "has neither a .nemo file nor config.json and model.safetensors" in rejected(folder)


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file, of a folder, and of a folder that is given relative to itself or by a link."""
    folder = tmp_path / "voice.v2"
    folder.mkdir()
    (folder / "english.large.nemo").touch()
    assert Source("x", folder / "english.large.nemo").name == "english.large"
    assert Source("x", folder).name == "voice.v2"
    (tmp_path / "link").symlink_to(folder)
    assert Source("x", tmp_path / "link").name == "voice.v2"
    monkeypatch.chdir(folder)
    assert Source("x", Path(".")).name == "voice.v2"
    snapshot = tmp_path / "models--some--one--name" / "snapshots" / ("a" * 40)
    other = tmp_path / "name" / "snapshots" / ("a" * 40)
    for path, name in ((snapshot, "name"), (other, "a" * 40)):
        path.mkdir(parents=True)
        assert Source("x", path).name == name
    (tmp_path / "a\nb").mkdir()
    with pytest.raises(CheckpointError, match="has unprintable characters; rename the folder"):
        Source("x", tmp_path / "a\nb").open(tmp_path)


def test_the_origin_of_a_file_without_a_revision(tmp_path: Path) -> None:
    (tmp_path / "voice.nemo").write_bytes(b"12345")
    origin = Source("given", tmp_path / "voice.nemo").describe()
    assert origin == {"source": "given", "sha256": hashlib.sha256(b"12345").hexdigest(), "bytes": 5}


# -- downloads ---------------------------------------------------------------------------------------------------------


REVISIONS = {name: str(index) * 40 for index, name in enumerate(("main", "fine-tune", "several", "other"))}


class _Hub(http.server.BaseHTTPRequestHandler):
    """The part of Hugging Face's HTTP interface that a download uses."""

    files: dict[str, dict[str, bytes]]  # by revision
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        _, *parts = self.path.partition("?")[0].split("/")
        revision = next(
            (name for name, commit in REVISIONS.items() if parts[-1 if "api" in parts else 3] in (name, commit)), ""
        )
        files = self.files.get(revision, {})
        if parts[:2] == ["api", "models"] and files:
            names = [{"rfilename": name} for name in files]
            info: Any = {"id": "a/b", "sha": REVISIONS[revision], "siblings": names}
            if "tree" in parts:
                info = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
            return self._send(200, json.dumps(info).encode(), revision)
        if len(parts) == 5 and parts[2] == "resolve" and parts[4] in files:
            return self._send(200, files[parts[4]], revision)
        self._send(404, b"{}", "main")

    do_HEAD = do_GET

    def _send(self, status: int, content: bytes, revision: str) -> None:
        self.send_response(status)
        if status == 200:
            self.send_header("X-Repo-Commit", REVISIONS[revision])
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "RevisionNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[_Hub]]]:
    handler = type("Hub", (_Hub,), {"files": {}, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_downloads_with_the_real_client(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads the environment when it is imported."""
    pytest.importorskip("huggingface_hub")
    url, handler = hub
    handler.files = {
        "main": {"b.nemo": b"archive", "README.md": b"", "model.safetensors": b"weights"},
        "fine-tune": {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}", "x.bin": b"no"},
        "several": {"a.nemo": b"", "b.nemo": b""},
        "other": {"weights.bin": b""},
    }
    script = """
import json, sys, time
time.sleep = lambda seconds: None  # between the attempts to reach the server
from nemostream.errors import CheckpointError
from nemostream.export.sources import find_source
results = []
for given in sys.argv[1:]:
    messages = []
    try:
        path = find_source(given, messages.append).path
        files = [path] if path.is_file() else sorted(path.iterdir())
        results.append([str(path), {f.name: f.read_text() for f in files}, messages])
    except CheckpointError as error:
        results.append(str(error))
print(json.dumps(results))
"""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "downloads"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    revisions = ["a/b", "a/b@fine-tune", "a/b@several", "a/b@other", "a/b@unknown"]

    def run(*given: str) -> list[Any]:
        command = [sys.executable, "-c", script, *given]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    archive, folder, several, other, unknown = run(*revisions)
    assert archive[1:] == [{"b.nemo": "archive"}, ["fetching b.nemo of a/b@main from Hugging Face"]]
    assert folder[1] == {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}
    assert folder[0].endswith(f"models--a--b/snapshots/{REVISIONS['fine-tune']}")
    assert not any("README" in request or "x.bin" in request for request in handler.requests)
    assert "several .nemo files, a.nemo, b.nemo" in several and "it has weights.bin" in other
    assert "a/b@unknown cannot be fetched from Hugging Face (RevisionNotFoundError" in unknown
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens
    (again,) = run("a/b")
    assert again[0] == archive[0] and "the cached copy of a/b@main is used" in again[2][0]


class _Client(types.ModuleType):
    """`huggingface_hub` with one repository, `a/b`, whose files are fetched into a folder."""

    def __init__(self, folder: Path, *files: str) -> None:
        super().__init__("huggingface_hub")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self.folder, self.files, self.calls = folder, files, list[tuple[Any, ...]]()
        self.HfApi = lambda: types.SimpleNamespace(list_repo_files=self.list_repo_files)

    def list_repo_files(self, repository: str, *, revision: str) -> list[str]:
        if not self.files:
            raise ConnectionError("no route. Retry")
        self.calls.append(("list", repository, revision))
        return list(self.files)

    def hf_hub_download(self, repository: str, file: str, *, revision: str) -> str:
        self.calls.append(("file", repository, file, revision))
        return str(self._write(file) / file)

    def snapshot_download(self, repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        self.calls.append(("snapshot", repository, revision, *allow_patterns))
        return str(self._write(*(file for file in self.files if file in allow_patterns)))

    def _write(self, *files: str) -> Path:
        for file in files:
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).touch()
        return self.folder


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["README.md", "b.nemo", "config.json", "model.safetensors"], ["b.nemo"]),
        (["old/a.nemo", "old/b.nemo", "c.nemo"], ["c.nemo"]),
        (["config.json", "model.safetensors", "x.bin", "a.nemo.md"], ["config.json", "model.safetensors"]),
        (
            ["x.py", "tokenizer.json", "model.safetensors.index.json", "model-1.safetensors", "config.json"],
            ["config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.json"],
        ),
        (["b.nemo", "a.nemo"], "a/b@v2 has several .nemo files, a.nemo, b.nemo; download one and give its path."),
        (["config.json", "x.bin"], "a/b@v2 has neither a .nemo file nor config.json and model.safetensors; it has "),
        (["model.safetensors", "x.bin"], "it has model.safetensors, x.bin."),
        (["x/y.nemo"], "it has x/y.nemo."),
    ],
)
def test_the_files_of_a_repository_that_are_fetched(
    files: list[str], fetched: list[str] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only archive in its first folder; else what the exporter reads of transformers' format."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    client, messages = _Client(tmp_path / "fetched", *files), list[str]()
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    if isinstance(fetched, str):
        assert fetched in rejected("a/b@v2")
        assert not client.folder.exists()
        return
    path = find_source("a/b@v2", messages.append).path
    what, calls = "", [("list", "a/b", "v2"), ("snapshot", "a/b", "v2", *fetched)]
    if fetched[0].endswith(".nemo"):
        what, calls[1] = f"{fetched[0]} of ", ("file", "a/b", fetched[0], "v2")
    assert client.calls == calls and messages == [f"fetching {what}a/b@v2 from Hugging Face"]
    assert path == (client.folder / fetched[0] if what else client.folder)


def test_the_cache_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", _Client(tmp_path))
    message = rejected("a/b")
    assert message.startswith("a/b@main cannot be fetched from Hugging Face (ConnectionError: no route); check the ")
    folder, messages = cached(tmp_path / "home", "a/b", {"b.nemo": b""}), list[str]()
    assert find_source("a/b", messages.append).path == folder / "snapshots" / COMMITS["main"] / "b.nemo"
    assert messages == [
        "Hugging Face cannot be reached (ConnectionError: no route); the cached copy of a/b@main is used"
    ]


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("nemostream.export.sources.find_spec", lambda name: None)
    assert "installs huggingface_hub to download it" in rejected("a/b")
    folder = cached(tmp_path / "home", "a/b", {"b.nemo": b""})
    assert found("a/b") == folder / "snapshots" / COMMITS["main"] / "b.nemo"
    assert "a name in NeMo needs NeMo: " in rejected("stt_en_fastconformer")


@pytest.mark.nemo
def test_names_in_nemo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` is replaced, because the tests have no network."""
    from nemo.collections.asr.models import ASRModel

    calls = []

    def fetch(name: str, **options: Any) -> str:
        calls.append((name, options["return_model_file"]))
        if "unknown" in name:
            raise FileNotFoundError("no such model on NGC")
        return str(tmp_path / "model.nemo")

    monkeypatch.setattr(ASRModel, "from_pretrained", fetch)
    assert found("stt_en_fastconformer_hybrid_large_streaming_multi") == tmp_path / "model.nemo"
    assert calls == [("stt_en_fastconformer_hybrid_large_streaming_multi", True)]
    assert "neither a file nor a model that NeMo could fetch (FileNotFoundError: no such model" in rejected("unknown")
    assert "which has no revisions; give owner/stt_en@main" in rejected("stt_en@main")


# -- export from every source ------------------------------------------------------------------------------------------

EXPORT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {blocked!r} else find_spec(name, *a)
from nemostream.export import export_checkpoint
bundle = export_checkpoint({source!r}, {out!r})
print(bundle.manifest.parity["reference"])
"""


def export_without_libraries(source: str | Path, out: Path) -> Bundle:
    blocked = ("torch", "nemo", "transformers", "safetensors", "tokenizers", "omegaconf", "huggingface_hub")
    script = EXPORT.format(blocked=blocked, source=str(source), out=str(out))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "NumPy\n"), done.stderr
    return Bundle.open(out)


@pytest.mark.nemo
def test_nemo_files_are_exported_without_nemo_and_torch(
    tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    cached(tmp_path / "home", "a/tiny", {"tiny.nemo": tiny_checkpoint.read_bytes()})
    bundle = export_without_libraries("a/tiny@refs/pr/3", tmp_path / "bundle")
    assert bundle.manifest.name == "tiny" and bundle.manifest.checkpoint["revision"] == "c" * 40
    assert bundle.manifest.graphs == tiny_bundle.manifest.graphs
    assert bundle.manifest.weights == tiny_bundle.manifest.weights
    assert bundle.manifest.tokenizer == tiny_bundle.manifest.tokenizer
    assert tiny_bundle.manifest.parity["reference"].startswith("NeMo ")


@pytest.mark.nemo
def test_prompted_snapshots_are_exported_without_transformers_and_torch(prompted_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--prompted" / "snapshots" / ("d" * 40)
    shutil.copytree(prompted_folder, snapshot)
    bundle = export_without_libraries(snapshot, tmp_path / "bundle")
    manifest = bundle.manifest
    assert manifest.name == "prompted" and manifest.checkpoint["revision"] == "d" * 40
    assert [chunk.ms for chunk in manifest.chunks] == [80, 320, 560, 1120]
    assert {chunk.left for chunk in manifest.chunks} == {56}
    assert (manifest.languages.default, manifest.languages.count) == ("auto", 7)
    for chunk in manifest.chunks:
        figures = manifest.parity[f"{chunk.ms}ms"]
        assert figures["prompts"] == 4 and figures["steps"] >= 12 and 0 < figures["encoder"] < 1e-5
    table = bundle.weight_shapes("encoder-320ms")["prompt.table"]
    assert table == (7, 48) and np.isfinite(manifest.parity["joint"])
