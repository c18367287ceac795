"""Find the checkpoint that the user means, and open it: files, folders, and models by name.

A checkpoint is a `.nemo` file, or a folder in transformers' format. It is given as a path, as `owner/name` or
`owner/name@revision` on Hugging Face, or as the name of a model that NeMo can fetch from NGC. Names on Hugging Face are
looked up in its cache, whose layout is::

    models--owner--name/refs/<branch, tag or pull request>    a commit
    models--owner--name/snapshots/<commit>/                   links to the files, in blobs/

and downloaded with `huggingface_hub` if that is installed and not offline.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemostream.bundle import sha256
from nemostream.errors import CheckpointError
from nemostream.export.checkpoint import Checkpoint, ModelConfig, check_config, open_checkpoint, read_config
from nemostream.export.transformers_checkpoint import (
    CONFIG,
    FILES,
    WEIGHTS,
    check_transformers,
    open_transformers,
    weight_files,
)
from nemostream.extras import install_command
from nemostream.untrusted import read_regular, short_repr

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = frozenset({"1", "on", "yes", "true"})

Report = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine: a `.nemo` file, or a folder in transformers' format."""

    given: str  # what the user gave
    path: Path

    @property
    def name(self) -> str:
        """Name of the model: of the file, or of the folder; of the repository if the folder is a snapshot of one."""
        if not self.path.is_dir():
            return self.path.stem
        folder = self.path.resolve()
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent.name.rpartition("--")[2]
        return folder.name or "model"

    def check(self) -> ModelConfig:
        """Return the sizes of the model. Raises `CheckpointError` if it is not supported; weights are not read."""
        return check_transformers(self.path) if self.path.is_dir() else check_config(read_config(self.path))

    def open(self, workdir: Path) -> Checkpoint:
        """Open the checkpoint; files that have to be unpacked or converted are written into `workdir`.

        Raises `CheckpointError` if the checkpoint is damaged or not supported.
        """
        if not self.path.is_dir():
            return open_checkpoint(self.path, workdir)
        if not self.name.isprintable():
            raise CheckpointError(f"{short_repr(self.name)} has unprintable characters; rename the folder.")
        return open_transformers(self.path, self.name, workdir)

    def describe(self) -> dict[str, Any]:
        """Return the origin for the manifest: what was given, and hash and size of the weights."""
        files = weight_files(self.path) if self.path.is_dir() else [self.path]
        origin: dict[str, Any] = {"source": self.given, "sha256": sha256(files[0])}
        if len(files) > 1:
            origin["shards"] = {file.name: sha256(file) for file in files[1:]}
        commit = (self.path if self.path.is_dir() else self.path.parent).name
        if _COMMIT.fullmatch(commit):
            origin["revision"] = commit
        return origin | {"bytes": sum(file.stat().st_size for file in files)}


def find_source(checkpoint: str | Path, report: Report) -> Source:
    """Return the checkpoint that `checkpoint` names, downloaded if necessary.

    `report` is called with a message before a download. Raises `CheckpointError` stating what was found instead.
    """
    return Source(str(checkpoint), _find(checkpoint, report))


def _find(checkpoint: str | Path, report: Report) -> Path:
    given = str(checkpoint)
    try:
        path = Path(checkpoint).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a user without a home, a folder without access
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        raise CheckpointError(
            f"{short_repr(given)} cannot be found ({reason}); give a .nemo file, a folder with a checkpoint, or a "
            "model as owner/name."
        ) from error
    if is_folder:
        return _in_folder(path)
    if path.name in WEIGHTS and path.is_file():
        return _in_folder(path.parent)
    if exists:
        return path  # the reader of archives rejects other files
    name, at, revision = given.partition("@")
    if isinstance(checkpoint, Path) or path.suffix == ".nemo" or not name or given[0] in "./~" or name.count("/") > 1:
        raise CheckpointError(
            f"{checkpoint} does not exist; give a .nemo file, a folder with a checkpoint, or a model as owner/name."
        )
    if at and not _REVISION.fullmatch(revision):
        raise CheckpointError(
            f"{short_repr(revision)} is not a revision; give a branch, tag or commit, as in {name}@main."
        )
    if "/" not in name:
        return _from_nemo(name, revision, report)
    if not _REPOSITORY.fullmatch(name):
        raise CheckpointError(f"{short_repr(given)} is neither a file nor the name of a model, such as owner/name.")
    return _from_hub(name, revision or "main", report)


def _in_folder(folder: Path) -> Path:
    """Return the checkpoint in a folder: its only `.nemo` file, or the folder itself. Raises `CheckpointError`."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}).") from error
    if folder.name.startswith("models--") and "snapshots" in names:
        return _in_folder(_snapshot(folder, "main"))
    archives = [name for name in names if name.endswith(".nemo")]
    if len(archives) == 1 and (folder / archives[0]).is_file():
        return folder / archives[0]
    if len(archives) > 1:
        raise CheckpointError(f"{folder} has several .nemo files; give one of {', '.join(archives[:10])}.")
    if CONFIG in names and any(name in names for name in WEIGHTS):
        return folder
    raise CheckpointError(
        f"{folder} has neither a .nemo file nor {CONFIG} and {WEIGHTS[0]}; it has {_listed(names)}: give the folder "
        "of a checkpoint, completely downloaded."
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6) if names else "no files"


# -- models by name ----------------------------------------------------------------------------------------------------


def _from_hub(repository: str, revision: str, report: Report) -> Path:
    """Return a checkpoint of a repository on Hugging Face, from its cache if it cannot be downloaded."""
    wanted = f"{repository}@{revision}"
    try:
        cached: Path | None = _in_folder(_snapshot(_cache() / f"models--{repository.replace('/', '--')}", revision))
        reason = ""
    except CheckpointError as error:
        cached, reason = None, str(error)
    except (OSError, RuntimeError) as error:  # HF_HOME is too long, of an unknown user, or without access
        cached, reason = None, f"the cache cannot be read: {str(error)[:300]}"
    if os.environ.get("HF_HUB_OFFLINE", os.environ.get("TRANSFORMERS_OFFLINE", "")).lower() in _TRUE:
        reason = f"HF_HUB_OFFLINE is set, and {reason}"
    elif find_spec("huggingface_hub") is None:
        reason = f"{install_command('export')} installs huggingface_hub to download it, and {reason}"
    else:
        try:
            return _download(repository, revision, report)
        except CheckpointError:
            raise
        except Exception as error:  # the hub and its HTTP client raise many types of exceptions
            message = " ".join(str(error).split()).partition(". ")[0][:300]
            reason = f"{type(error).__name__}: {message}"
            if cached is not None:
                report(f"Hugging Face cannot be reached ({reason}); the cached copy of {wanted} is used")
    if cached is None:
        raise CheckpointError(
            f"{wanted} cannot be fetched from Hugging Face ({reason.rstrip('.')}); check the name, or download the "
            "checkpoint and give its path."
        )
    return cached


def _download(repository: str, revision: str, report: Report) -> Path:
    """Download what the exporter needs from a repository; the cache is used for files that did not change."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    files = sorted(HfApi().list_repo_files(repository, revision=revision))
    archives = [file for file in files if file.endswith(".nemo") and "/" not in file]
    if len(archives) == 1:
        report(f"fetching {archives[0]} of {repository}@{revision} from Hugging Face")
        return Path(hf_hub_download(repository, archives[0], revision=revision))
    if archives:
        raise CheckpointError(
            f"{repository}@{revision} has several .nemo files, {_listed(archives)}; download one and give its path."
        )
    needed = [file for file in files if any(fnmatch(file, pattern) for pattern in FILES)]
    if CONFIG not in needed or not any(name in needed for name in WEIGHTS):
        raise CheckpointError(
            f"{repository}@{revision} has neither a .nemo file nor {CONFIG} and {WEIGHTS[0]}; it has {_listed(files)}."
        )
    report(f"fetching {repository}@{revision} from Hugging Face")
    return _in_folder(Path(snapshot_download(repository, revision=revision, allow_patterns=needed)))


def _cache() -> Path:
    """Return the folder of the cache, by the rules of `huggingface_hub`."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if path := os.environ.get(variable):
            return Path(path).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _snapshot(repository: Path, revision: str) -> Path:
    """Return the folder of a revision in a repository's cache. Raises `CheckpointError` if it is not cached."""
    commit = revision
    reference = repository / "refs" / revision
    if reference.is_file():
        try:
            commit = read_regular(reference, 1000).decode().strip()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{reference} cannot be read: {error}.") from error
    folder = repository / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not folder.is_dir():
        branches = sorted(path.name for path in (repository / "refs").glob("*"))
        raise CheckpointError(
            f"the cache {repository.parent} has no snapshot of {repository.name[8:].replace('--', '/')}@{revision}"
            + (f", only of {_listed(branches)}" if branches else "")
        )
    return folder


def _from_nemo(name: str, revision: str, report: Report) -> Path:
    """Fetch a pretrained model by its name in NeMo, for example from NGC."""
    if revision:
        raise CheckpointError(f"{name} is a name in NeMo, which has no revisions; give owner/{name}@{revision}.")
    if find_spec("nemo") is None:
        raise CheckpointError(
            f"{name} is neither a file nor a model on Hugging Face (owner/name); a name in NeMo needs NeMo: "
            f"{install_command('nemo')}."
        )
    from nemo.collections.asr.models import ASRModel

    report(f"fetching {name} with NeMo")
    try:
        return Path(ASRModel.from_pretrained(name, return_model_file=True, map_location="cpu"))
    except Exception as error:  # NeMo and its HTTP client raise many types of exceptions
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name} is neither a file nor a model that NeMo could fetch ({type(error).__name__}: {reason})."
        ) from error
