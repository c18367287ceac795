"""Save and restore a stream, so that a transcription can be resumed after its process has ended.

A snapshot contains the state of the slot, of the stream and of its hypothesis, and a digest of the audio received so
far. On resuming, the recording is read and resampled again from the start, which is cheap. The part that was already
processed is compared with the digest and not run. The result is bit-identical to that of an uninterrupted run.

The file is a NumPy `.npz` archive without pickles. It is replaced atomically.

A server continues a stream without its earlier audio (`dump`, `load`): the snapshot then also contains the state of the
resampler and of the events.
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
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import OptionError
from nemostream.untrusted import MIB, open_regular, parse_json, short_repr

VERSION = 5
SECONDS = 30.0  # between two snapshots

# Limits of a snapshot file. Its arrays are not compressed, so reading one takes no more memory than the file's size.
MAX_BYTES = 4096 * MIB
_MAX_ARRAYS = 64
_MAX_DOCUMENT_BYTES = MIB
_WINDOW, _CONTEXT = 512, 64  # as in `runtime.audio.vad`, which cannot be imported without ONNX Runtime
_NAME = re.compile(r"(document|[a-z]+\.[a-z_]+)\.npy")

SavedArrays = Mapping[str, NDArray[Any]]


class Stateful(Protocol):
    """An object whose state can be saved."""

    def save(self) -> dict[str, NDArray[Any]]: ...

    def load(self, state: SavedArrays) -> None: ...


@dataclass(frozen=True)
class StreamSnapshot:
    """The state of a stream: the arrays of each of its parts."""

    # "slot", "chunker", "hypothesis", "guard", "endpoint", "vad"; with an accurate lane also "joined", "lane" and that
    # lane's "laneslot", "lanechunker", "lanehypothesis", "laneguard", "lanevad". Of a stream that continues without its
    # earlier audio also "audio", "silence", "events".
    parts: Mapping[str, SavedArrays]
    samples: int  # audio received, in samples at the model's rate
    digest: str  # `Digest.value` of that audio


def saved_array(state: SavedArrays, name: str, dtype: Any, *shape: int | None) -> NDArray[Any]:
    """Return an array of a saved state.

    Raises `ValueError` unless its type is `dtype` and its shape is `shape`, in which None matches any length.
    """
    array = state[name] if name in state else np.empty(0, np.void)
    if array.dtype != np.dtype(dtype) or len(array.shape) != len(shape):
        raise ValueError(f"{name} is not an array of {len(shape)} dimensions of {np.dtype(dtype)}")
    if any(expected is not None and found != expected for found, expected in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{name} has the shape {array.shape}")
    return array


def saved_counts(state: SavedArrays, name: str, size: int | None = None) -> list[int]:
    """Return the counters in an array of a saved state. Raises `ValueError` unless all are in [0, 2 ** 53)."""
    counts: list[int] = saved_array(state, name, np.int64, size).tolist()
    if counts and not 0 <= min(counts) <= max(counts) < 1 << 53:
        raise ValueError(f"{name} are {short_repr(counts)}; a counter must be in [0, 2 ** 53)")
    return counts


def discard(path: Path) -> None:
    """Delete a snapshot file and an incomplete one that a killed process left behind."""
    for file in (path, _part_file(path)):
        file.unlink(missing_ok=True)


def _part_file(path: Path) -> Path:
    return path.with_name(path.name + ".part")


class Digest:
    """A digest of audio, updated block by block. Reading the same recording again gives the same blocks."""

    def __init__(self) -> None:
        self.samples, self.value = 0, ""

    def add(self, block_N: NDArray[np.float32]) -> None:
        if not len(block_N):
            return
        digest = hashlib.blake2b(self.value.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(block_N).data)
        self.samples, self.value = self.samples + len(block_N), digest.hexdigest()


class Checkpointer:
    """Saves and loads the snapshot file of one transcription.

    `about` identifies the transcription: model, engine, options. `load` rejects a file with other values.
    Raises `OptionError` if the folder does not exist or the path is a folder.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any]) -> None:
        self.path, self._about = Path(path), {"version": VERSION, **about}
        self._part_file = _part_file(self.path)
        self._next_save = time.monotonic() + SECONDS
        if not self.path.parent.is_dir():
            raise OptionError(f"resume is {self.path}, but there is no folder {self.path.parent}.")
        if self.path.is_dir():
            raise OptionError(f"resume is {self.path}, which is a folder; it must be the path of a file.")

    def load(self) -> StreamSnapshot | None:
        """Return the saved snapshot, or None if there is no file.

        Raises `OptionError` if the file is damaged or belongs to another transcription.
        """
        if not self.path.exists():
            return None
        try:
            with open_regular(self.path) as file:
                about, saved = load(file, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            raise self._error("is damaged or not a snapshot file") from error
        for name, value in self._about.items():
            if name not in about or about[name] != value:
                raise self._error(f"was written with {name} {short_repr(about.get(name), 300)}, not {value!r}")
        return saved

    def restore(self, saved: StreamSnapshot, parts: Mapping[str, Stateful], vocabulary: int, nodes: int) -> None:
        """As `restore`. Raises `OptionError` if the saved parts are invalid or inconsistent."""
        try:
            restore(saved, parts, vocabulary, nodes)
        except ValueError as error:
            raise self._error(f"is damaged ({error})") from error

    @property
    def due(self) -> bool:
        """Whether the next snapshot should be saved."""
        return time.monotonic() >= self._next_save

    def save(self, saved: StreamSnapshot) -> None:
        """Replace the file atomically: a process that is killed leaves the old file or the new one."""
        data = dump(self._about, saved)
        self._part_file.unlink(missing_ok=True)
        # The file contains a transcript: it is created anew, readable by this user only, and links are not followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with open(os.open(self._part_file, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._part_file, self.path)
        self._next_save = time.monotonic() + SECONDS

    def wrong_recording(self) -> OptionError:
        """Return the error for a recording that is not the one that the file was written for."""
        return self._error("was written for another recording")

    def done(self) -> None:
        """Delete the file. Called when the transcription is complete."""
        discard(self.path)

    def _error(self, problem: str) -> OptionError:
        return OptionError(f"resume: {self.path} {problem}; delete it to start over, or use another file.")


def restore(saved: StreamSnapshot, parts: Mapping[str, Stateful], vocabulary: int, nodes: int) -> None:
    """Load each saved part into the part of the stream with the same name. Slots are loaded by the scheduler.

    `vocabulary` is the size of the model's vocabulary, `nodes` that of the automaton of the stream's phrases.
    Raises `ValueError` if the saved parts are invalid or inconsistent.
    """
    try:
        slots = {"slot", "laneslot"} if "lane" in parts else {"slot"}
        if saved.parts.keys() != parts.keys() | slots:
            raise ValueError(f"its parts are {', '.join(sorted(saved.parts))}")
        for name, part in parts.items():
            part.load(saved.parts[name])
        _check_consistent(saved.parts, saved.samples, vocabulary, nodes)
        if "lane" in parts:
            lane = {name: saved.parts[f"lane{name}"] for name in ("slot", "chunker", "hypothesis", "guard")}
            _check_consistent(lane, saved.samples, vocabulary, nodes)
            _check_lane(saved.parts)
    except (TypeError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(str(error)) from error


def dump(about: Mapping[str, Any], saved: StreamSnapshot) -> bytes:
    """Return the content of a snapshot file. `about` can be written as JSON."""
    document = {"about": about, "samples": saved.samples, "digest": saved.digest}
    arrays = {f"{part}.{name}": array for part, rows in saved.parts.items() for name, array in rows.items()}
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, document=np.frombuffer(json.dumps(document).encode(), np.uint8), **arrays)
    return data.getvalue()


def load(file: IO[bytes], size: int) -> tuple[dict[str, Any], StreamSnapshot]:
    """Return what was written with `dump`. Raises `ValueError` if the file, of `size` bytes, is damaged."""
    try:
        arrays = _read_arrays(file, size)
        document = parse_json(arrays.pop("document").tobytes())
        about, samples, digest = document["about"], document["samples"], document["digest"]
        if not isinstance(about, dict) or type(samples) is not int or not 0 <= samples < 1 << 53:
            raise ValueError("a field of the document has the wrong type")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{0,32}", digest):
            raise ValueError("the digest is not a hexadecimal string")
    except Exception as error:  # zipfile and NumPy raise many kinds of errors, not all documented
        raise ValueError(f"the snapshot is damaged ({error})") from error
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in arrays.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = array
    return about, StreamSnapshot(parts, samples, digest)


def _read_arrays(file: IO[bytes], size: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file written by `dump`. Raises many kinds of errors for other files."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(members) > _MAX_ARRAYS or len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
            raise ValueError("it contains files that are not saved arrays")
        if any(m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members):
            raise ValueError("an array is compressed")
        if size > MAX_BYTES or sum(member.file_size for member in members) > size:
            raise ValueError("its arrays are larger than the file")
        return {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members}


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("an array has an unsupported .npy version")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        # Checked before that size is allocated. Arrays of objects are rejected: they are pickles.
        if dtype.kind not in "biuf" or prod(shape) * dtype.itemsize != member.file_size - stream.tell():
            raise ValueError("the size of an array differs from its header")
        if member.filename == "document.npy" and member.file_size > _MAX_DOCUMENT_BYTES:
            raise ValueError("the document is too large")
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        stream.read(1)  # reading to the end verifies the checksum
    return array


def _check_lane(parts: Mapping[str, SavedArrays]) -> None:
    """Raise `ValueError` unless the accurate lane is consistent with its stream and with the fast lane."""
    outputs, tokens = parts["lane"]["outputs"], len(parts["lanehypothesis"]["tokens"])
    if (int(outputs[-1, 0]) if len(outputs) else 0) != tokens:
        raise ValueError("the accurate lane and its stream differ in their number of tokens")
    if int(parts["lane"]["counts"][0]) > len(parts["hypothesis"]["tokens"]):
        raise ValueError("the utterance begins after the last token")


def _check_consistent(parts: Mapping[str, SavedArrays], received: int, vocabulary: int, nodes: int) -> None:
    """Raise `ValueError` unless all saved parts of a stream are consistent with each other."""
    samples, _, _, run_frames, *_ = parts["chunker"]["counts"].tolist()
    if samples != received:
        raise ValueError(f"the chunker has {samples} samples, but {received} were received")
    tokens = parts["hypothesis"]["tokens"]
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise ValueError(f"a token is not in the vocabulary of {vocabulary} tokens")
    if parts["guard"]["counts"][0] > len(tokens):
        raise ValueError("the repetition guard has more tokens than the stream")
    if "endpoint" in parts and parts["endpoint"]["counts"][0] != len(tokens):
        raise ValueError("the endpointer and the stream differ in their number of tokens")
    if "vad" in parts:
        vad, (windows_used, *_) = parts["vad"], parts["vad"]["counts"].tolist()
        if (windows_used + len(vad["windows"])) * _WINDOW + len(vad["audio"]) - _CONTEXT != samples:
            raise ValueError("the VAD and the stream differ in the audio received")
    slot = parts["slot"]
    # The node is an index into the automaton, unchecked on a GPU. `check_state` compares types and shapes only.
    if "node" in slot and not 0 <= int(slot["node"]) < nodes:
        raise ValueError(f"its node is {int(slot['node'])}; the automaton has {nodes} nodes")
    _, reset_slot = parts["chunker"]["flags"].tolist()
    if "position" in slot and not reset_slot and int(slot["position"]) != run_frames:
        raise ValueError("the slot and the chunker differ in the number of frames run")
