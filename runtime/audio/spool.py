"""Audio files that are in memory or behind a file object, as files: decoders want to seek."""

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
    """Whether `spool` takes it."""
    if isinstance(source, bytes | bytearray | memoryview):
        return True
    return callable(getattr(source, "read", None)) and not isinstance(source, os.PathLike | AsyncIterable)


@contextmanager
def spool(source: bytes | bytearray | memoryview | Readable) -> Iterator[tuple[Path, str]]:
    """The path of a temporary file with the content, and its name in errors.

    A file object is read from its position to its end and stays open. Raises `AudioError` if there is nothing, or if
    it returns text.
    """
    given = getattr(source, "name", None)
    name = given if isinstance(given, str) else "the file object"
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
                        raise AudioError(f"read() of {name} gives {type(data).__name__}, not bytes; open it with 'rb'.")
                    copy.write(data)
            if not copy.tell():
                raise AudioError(f"{name} is empty; it must be the content of an audio file.")
        yield Path(path), name
    finally:
        os.unlink(path)
