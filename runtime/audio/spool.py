"""Write in-memory audio and file objects to temporary files, because decoders need to seek."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeGuard

from nemostream.errors import AudioError

_BLOCK = 1 << 20


class Readable(Protocol):
    """A binary file object; it need not be seekable."""

    def read(self, size: int, /) -> bytes: ...


def is_file_content(source: object) -> TypeGuard[bytes | bytearray | memoryview | Readable]:
    """Return whether `source` is the content of a file, which `spool` accepts: bytes or a file object."""
    if isinstance(source, bytes | bytearray | memoryview):
        return True
    return callable(getattr(source, "read", None)) and not isinstance(source, os.PathLike | AsyncIterable)


@contextmanager
def spool(source: bytes | bytearray | memoryview | Readable) -> Iterator[tuple[Path, str]]:
    """Write the content to a temporary file; yield its path and the name to use in errors. A context manager.

    A file object is read from its position to its end and stays open. Raises `AudioError` if it is empty or returns
    text.
    """
    name = getattr(source, "name", None)
    if not isinstance(name, str):
        name = "the file object"
    if isinstance(source, bytes | bytearray | memoryview):
        name = "the audio given as bytes"
    handle, path = tempfile.mkstemp(prefix="nemostream-", suffix=".audio")
    try:
        with os.fdopen(handle, "wb") as copy:
            if isinstance(source, bytes | bytearray | memoryview):
                copy.write(source)
            else:
                while data := source.read(_BLOCK):
                    if not isinstance(data, bytes | bytearray | memoryview):
                        raise AudioError(
                            f"read() of {name} returns {type(data).__name__}, not bytes; open it with 'rb'."
                        )
                    copy.write(data)
            if not copy.tell():
                raise AudioError(f"{name} is empty; it must be the content of an audio file.")
        yield Path(path), name
    finally:
        os.unlink(path)
