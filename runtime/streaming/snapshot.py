"""A transcription that outlives its process: all that a stream is, in a file that is whole or not there.

What is kept is the state of the slot, of the stream and of what was said, and a digest of the audio that went in. The
recording itself is read again from the start, through the same resampler, which is cheap; the part of it that was heard
is only compared with the digest. So the result is the one that an uninterrupted run gives, to the bit.

The file is numpy's `.npz`, without pickles.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import OptionError
from nemostream.untrusted import MIB, open_regular, parse_json, short_repr

VERSION = 2
SECONDS = 30.0  # of work between two savings

# What a state file may have. Nothing in it is compressed, so it takes no more memory than it is long.
MOST_BYTES = 4096 * MIB
_MOST_ARRAYS = 64
_MOST_DOCUMENT = MIB
_WINDOW, _CONTEXT = 512, 64  # of `runtime.vad`, which cannot be imported without ONNX Runtime
_NAME = re.compile(r"(document|[a-z]+\.[a-z_]+)\.npy")

Arrays = Mapping[str, NDArray[Any]]


class Stateful(Protocol):
    """Something that can be saved."""

    def save(self) -> dict[str, NDArray[Any]]: ...

    def load(self, state: Mapping[str, NDArray[Any]]) -> None: ...


@dataclass(frozen=True)
class StreamSnapshot:
    """What a stream is; every part by the one that it belongs to."""

    parts: Mapping[str, Arrays]  # "slot", "stream", "hypothesis", "guard", "endpoint", "gate"
    samples: int  # of audio that went in, at the model's rate
    digest: str  # of that audio


def saved_array(state: Arrays, name: str, dtype: Any, *shape: int | None) -> NDArray[Any]:
    """An array of a saved state. Raises `ValueError` unless its type and shape are these; None is any length."""
    array = state[name] if name in state else np.empty(0, np.void)
    if array.dtype != np.dtype(dtype) or len(array.shape) != len(shape):
        raise ValueError(f"{name} is not an array of {len(shape)} dimensions of {np.dtype(dtype)}")
    if any(wanted is not None and found != wanted for found, wanted in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{name} has the shape {array.shape}")
    return array


def saved_counts(state: Arrays, name: str, size: int | None = None) -> list[int]:
    """Counters of a saved state: whole numbers from 0 on. Raises `ValueError` for anything else."""
    counts: list[int] = saved_array(state, name, np.int64, size).tolist()
    if counts and not 0 <= min(counts) <= max(counts) < 1 << 53:
        raise ValueError(f"{name} are {short_repr(counts)}; no counter is negative or above 2 ** 53")
    return counts


def discard(path: Path) -> None:
    """Delete a state, and what a process that was killed left of the next."""
    for file in (path, _part(path)):
        file.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


class Digest:
    """Of audio block by block; the blocks are the same when the same recording is read again."""

    def __init__(self) -> None:
        self.samples, self.value = 0, ""

    def add(self, block_N: NDArray[np.float32]) -> None:
        if not len(block_N):
            return
        found = hashlib.blake2b(self.value.encode(), digest_size=16)
        found.update(np.ascontiguousarray(block_N).data)
        self.samples, self.value = self.samples + len(block_N), found.hexdigest()


class Checkpointer:
    """The file. `about` says what it is the state of: model, engine, options; another's is refused, never mixed in.

    Raises `OptionError` if there is no such folder, or the file is something else.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any]) -> None:
        self.path, self._about = Path(path), {"version": VERSION, **about}
        self._part = _part(self.path)
        self._next = time.monotonic() + SECONDS
        if not self.path.parent.is_dir():
            raise OptionError(f"resume is {self.path}, but there is no folder {self.path.parent}.")
        if self.path.is_dir():
            raise OptionError(f"resume is {self.path}, which is a folder; give a file.")

    def load(self) -> StreamSnapshot | None:
        """What was saved; None if nothing was yet."""
        if not self.path.exists():
            return None
        try:
            arrays = _read_arrays(self.path)
            document = parse_json(arrays.pop("document").tobytes())
            about, samples, digest = document["about"], document["samples"], document["digest"]
            if not isinstance(about, dict) or type(samples) is not int or not 0 <= samples < 1 << 53:
                raise ValueError("the document's fields have other types")
            if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{0,32}", digest):
                raise ValueError("the digest is none")
        except Exception as error:  # zipfile and NumPy raise many kinds of damaged files, not all of them documented
            raise self._refusal("is damaged, or no such file at all") from error
        for name, value in self._about.items():
            if about.get(name) != value:
                raise self._refusal(f"was written with {name} {short_repr(about.get(name), 300)}, not {value!r}")
        parts: dict[str, dict[str, NDArray[Any]]] = {}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = array
        return StreamSnapshot(parts, samples, digest)

    def restore(self, saved: StreamSnapshot, parts: Mapping[str, Stateful], vocabulary: int, nodes: int) -> None:
        """Have each part of a stream go on from what was saved of it.

        `vocabulary` and `nodes` are the sizes of the model's vocabulary and of the automaton of the stream's phrases.
        Raises `OptionError` if what was saved cannot be of one stream.
        """
        try:
            if saved.parts.keys() != {*parts, "slot"}:
                raise ValueError(f"it has the parts {', '.join(sorted(saved.parts))}")
            for name, part in parts.items():
                part.load(saved.parts[name])
            _check_together(saved, vocabulary, nodes)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise self._refusal(f"is damaged ({error})") from error

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() >= self._next

    def save(self, saved: StreamSnapshot) -> None:
        """Put a new file in the place of the old one, at once: whoever is killed leaves one of the two."""
        document = {"about": self._about, "samples": saved.samples, "digest": saved.digest}
        arrays = {f"{part}.{name}": array for part, rows in saved.parts.items() for name, array in rows.items()}
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, document=np.frombuffer(json.dumps(document).encode(), np.uint8), **arrays)
        self._part.unlink(missing_ok=True)
        # A new file, for this user only: an existing link is not followed. It contains transcripts.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with open(os.open(self._part, flags, 0o600), "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._part, self.path)
        self._next = time.monotonic() + SECONDS

    def refuse_audio(self) -> OptionError:
        """The recording is not the one that the file began with."""
        return self._refusal("was written of another recording")

    def done(self) -> None:
        """There is nothing to resume any more."""
        discard(self.path)

    def _refusal(self, why: str) -> OptionError:
        return OptionError(f"resume: {self.path} {why}; delete it to begin anew, or give another file.")


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file that `Checkpointer.save` may have written. Raises many kinds of error for any other."""
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        size, members = os.fstat(file.fileno()).st_size, archive.infolist()
        names = [member.filename for member in members]
        if len(members) > _MOST_ARRAYS or len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
            raise ValueError("it holds other files than saved arrays")
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise ValueError("an array is compressed")
        if size > MOST_BYTES or sum(member.file_size for member in members) > size:
            raise ValueError("its arrays are larger than the file")
        return {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members}


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("an array is of another version")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        # Compared before anything of that size is allocated. Objects are pickles, and have no size of their own.
        if dtype.kind not in "biuf" or prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise ValueError("an array is not as large as its header states")
        if member.filename == "document.npy" and member.file_size > _MOST_DOCUMENT:
            raise ValueError("the document is too large")
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # at its end, so that its checksum is compared
    return array


def _check_together(saved: StreamSnapshot, vocabulary: int, nodes: int) -> None:
    """Raise `ValueError` unless all parts that were saved can be of one stream."""
    parts = saved.parts
    samples, *_ = parts["stream"]["counts"].tolist()
    if samples != saved.samples:
        raise ValueError(f"the stream has {samples} samples, and {saved.samples} went in")
    tokens = parts["hypothesis"]["tokens"]
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise ValueError(f"a token is not in the vocabulary of {vocabulary}")
    if parts["guard"]["counts"][0] > len(tokens):
        raise ValueError("the repetition guard counts more tokens than the stream has")
    if "endpoint" in parts and parts["endpoint"]["counts"][0] != len(tokens):
        raise ValueError("the utterances have another number of tokens than the stream")
    if "gate" in parts:
        gate, (judged, *_) = parts["gate"], parts["gate"]["counts"].tolist()
        if (judged + len(gate["windows"])) * _WINDOW + len(gate["audio"]) - _CONTEXT != samples:
            raise ValueError("the search for speech has got other audio than the stream")
    slot = parts["slot"]
    # The automaton is indexed with the node, on a GPU without a check; `check_state` compares types and shapes.
    if "node" in slot and not 0 <= int(slot["node"]) < nodes:
        raise ValueError(f"it stands at node {int(slot['node'])} of {nodes}")
    _, fresh = parts["stream"]["flags"].tolist()
    if "position" in slot and not fresh and int(slot["position"]) != parts["stream"]["counts"][3]:
        raise ValueError("the model stands at another frame than the stream")
