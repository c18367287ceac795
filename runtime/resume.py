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
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import OptionError

VERSION = 2
SECONDS = 30.0  # of work between two savings

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Saved:
    """What a stream is; every part by the one that it belongs to."""

    parts: Mapping[str, Arrays]  # "slot", "stream", "said", "guard", "endpoint", "gate"
    samples: int  # of audio that went in, at the model's rate
    digest: str  # of that audio


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


class Keeper:
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

    def load(self) -> Saved | None:
        """What was saved; None if nothing was yet."""
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            document = json.loads(arrays.pop("document").tobytes())
            about, samples, digest = document["about"], int(document["samples"]), str(document["digest"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise self._refusal("is damaged, or no such file at all") from error
        for name, value in self._about.items():
            if about.get(name) != value:
                raise self._refusal(f"was written with {name} {about.get(name)!r}, not {value!r}")
        parts: dict[str, dict[str, NDArray[Any]]] = {}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = array
        return Saved(parts, samples, digest)

    @property
    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() >= self._next

    def save(self, saved: Saved) -> None:
        """Put a new file in the place of the old one, at once: whoever is killed leaves one of the two."""
        document = {"about": self._about, "samples": saved.samples, "digest": saved.digest}
        arrays = {f"{part}.{name}": array for part, rows in saved.parts.items() for name, array in rows.items()}
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, document=np.frombuffer(json.dumps(document).encode(), np.uint8), **arrays)
        with self._part.open("wb") as file:
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
