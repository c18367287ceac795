"""Temporary copies of audio that is given as bytes or as a file object."""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemostream.errors import AudioError
from nemostream.runtime.audio.spool import is_file_content, spool

CONTENT = np.random.default_rng(1).bytes((1 << 20) + 4097)  # more than one block


class Upload:
    """A file object that cannot seek, and returns fewer bytes than requested."""

    def __init__(self, name: Any = None, parts: tuple[Any, ...] = (b"ab", bytearray(b"c"), memoryview(b"de"))) -> None:
        self._parts = list(parts)
        if name is not None:
            self.name = name

    def read(self, size: int) -> Any:
        assert size == 1 << 20  # a bounded amount, not all
        return self._parts.pop(0) if self._parts else b""


class Scratch:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check_empty(self) -> None:
        assert list(self.folder.iterdir()) == []


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scratch:
    """The folder of temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return Scratch(folder)


def test_content_is_copied_and_the_copy_deleted(scratch: Scratch, tmp_path: Path) -> None:
    file = tmp_path / "talk.flac"
    file.write_bytes(CONTENT)
    with file.open("rb") as opened, file.open("rb") as half, open(os.dup(half.fileno()), "rb") as numbered:
        half.seek(1000)
        for source, content, name in (
            (CONTENT, CONTENT, "the audio given as bytes"),
            (bytearray(CONTENT), CONTENT, "the audio given as bytes"),
            (memoryview(CONTENT)[5:], CONTENT[5:], "the audio given as bytes"),
            (opened, CONTENT, str(file)),
            (half, CONTENT[1000:], str(file)),  # from its position
            (io.BytesIO(CONTENT), CONTENT, "the file object"),
            (Upload(), b"abcde", "the file object"),
            (Upload("call.wav"), b"abcde", "call.wav"),
            (Upload(5), b"abcde", "the file object"),  # `open` names a file by its descriptor
        ):
            with spool(source) as (path, found):
                assert (path.read_bytes(), found) == (content, name)
                assert path.parent == scratch.folder
            scratch.check_empty()
        assert not opened.closed and not half.closed and not numbered.closed


def test_invalid_content_is_an_error_that_names_it(scratch: Scratch) -> None:
    for source, message in (
        (b"", "the audio given as bytes is empty"),
        (Upload("call.wav", ()), r"call\.wav is empty"),
        (io.StringIO("text"), r"read\(\) of the file object returns str, not bytes"),
        (Upload("call.wav", (b"a", "b")), r"read\(\) of call\.wav returns str, not bytes"),
    ):
        with pytest.raises(AudioError, match=message), spool(source):
            raise AssertionError
        scratch.check_empty()


def test_copy_is_deleted_after_an_error_of_the_caller(scratch: Scratch) -> None:
    with pytest.raises(KeyError), spool(b"abc"):
        raise KeyError
    scratch.check_empty()


class AsyncUpload(Upload):
    def __aiter__(self) -> AsyncIterator[bytes]:
        raise NotImplementedError


class PathWithRead(os.PathLike[str]):
    def __fspath__(self) -> str:
        return "a.wav"

    def read(self, size: int) -> bytes:
        return b""


def test_which_sources_are_the_content_of_a_file() -> None:
    for source in (b"", bytearray(), memoryview(b""), io.BytesIO(), Upload()):
        assert is_file_content(source), source
    for source in ("a.wav", Path("a.wav"), PathWithRead(), AsyncUpload(), [np.zeros(1)], np.zeros(1), None):
        assert not is_file_content(source), source
