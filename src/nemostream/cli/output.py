"""Where the transcripts of `nemostream transcribe` go: standard output, a file, or a folder with many."""

from __future__ import annotations

import codecs
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from nemostream.cli.standard_streams import write_all, write_whole
from nemostream.errors import NemostreamError, OptionError
from nemostream.runtime.text.formats import Format, Transcript, Utterance, render

if TYPE_CHECKING:
    from nemostream.runtime.text.events import Event
    from nemostream.runtime.text.itn import InverseNormalizer
    from nemostream.runtime.text.words import Result, Word

STDIN, MICROPHONE = "-", "microphone"  # names of what is no file
_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


class Output:
    """Transcripts in a format. `out` is a folder if it is one or ends as one does, and "-" is standard output; `itn`
    writes numbers as numbers, `channel` is the one that was chosen of each recording.

    `apart` keeps utterances apart: as lines of text, or in JSON as `utterances`. Everything that would fail after hours
    is tried at once: raises `OptionError` if nothing can be written there. What keeps single recordings from being
    written is in `refused`, by their index in `names`. A context manager.
    """

    def __init__(
        self,
        names: Sequence[str],
        format: Format,
        out: str | None = None,
        *,
        apart: bool = False,
        itn: InverseNormalizer | None = None,
        channel: int | None = None,
    ) -> None:
        self.format, self._apart, self.itn, self._channel = format, apart, itn, channel
        self._label = sum(name != MICROPHONE for name in names) > 1
        self._told: dict[str, int] = {}  # utterances that were written already
        self._file: io.FileIO | None = None
        self._path: Path | None = None
        self._folder: Path | None = None
        self._encoder: codecs.IncrementalEncoder | None = None  # of text on standard output
        self.refused: dict[int, OptionError] = {}
        if out is not None and out not in _STDOUT:
            if out.endswith(("/", os.sep)) or os.path.isdir(out):
                self._folder = Path(out)
            else:
                self._path = Path(out)
        if format.one_per_file and len(names) > 1 and self._folder is None:
            raise OptionError(f"--format {format} makes a file for each recording: give --out FOLDER/ for several.")
        if self._folder is not None:
            _check_folder(self._folder)
            self._check_targets(names, self._folder)
        elif self._path is not None:
            if not self._path.absolute().parent.is_dir():
                raise OptionError(f"--out: there is no folder {self._path.parent} for {self._path.name}.")
            if recording := self._recordings(names).get(_identity(self._path)):
                raise OptionError(f"--out would write over {recording}.")
            check_writable(self._path, "--out")
        elif sys.stdout is None:
            raise OptionError("standard output is closed: give --out FILE.")

    def tell(self, name: str, utterance: Event) -> bool:
        """Write an utterance of a recording that goes on; whether it can be written before the others.

        Raises `NemostreamError` if it cannot be written.
        """
        if not self._apart or self.format is not Format.text or self._label or self._folder is not None:
            return False
        text, _ = self._written(utterance)
        self._put(name, text + "\n")
        self._told[name] = self._told.get(name, 0) + 1
        return True

    def write(self, name: str, said: Sequence[Result | Event], duration: float, chunk_ms: int) -> None:
        """Write what was said in a recording: its utterances, or one for all.

        Raises `NemostreamError` if it cannot be written, `BrokenPipeError` if nobody reads it.
        """
        written = [self._written(one) for one in said]
        text = " ".join(text for text, _ in written if text)
        spoken = " ".join(one.text for one in said if one.text)
        utterances = (
            tuple(
                Utterance(text, one.words[0].start, one.words[-1].end)
                for (text, _), one in zip(written, said, strict=True)
                if one.words  # a piece of a word that is nothing but a space makes none
            )
            if self._apart
            else None
        )
        transcript = Transcript(
            # NeMo looks for what has no folder in the manifest's own.
            os.path.abspath(name) if self.format is Format.manifest and name not in (STDIN, MICROPHONE) else name,
            text,
            [word for _, words in written for word in words],
            duration,
            [token for one in said for token in one.tokens],
            chunk_ms,
            utterances,
            spoken if self.itn else None,
            self._channel,
        )
        if self.format is Format.text and (told := self._told.get(name, 0)):
            assert told == len(said)  # as they were final
            return
        # JSON is UTF-8 (RFC 8259), wherever a terminal or locale has another encoding.
        ascii = self._folder is None and self._path is None and not _is_utf8(getattr(sys.stdout, "encoding", None))
        self._put(name, render(transcript, self.format, ascii=ascii))

    def _written(self, one: Result | Event) -> tuple[str, Sequence[Word]]:
        if self.itn is None:
            return one.text, one.words
        words = self.itn(one.words)
        return " ".join(word.text for word in words), words

    def _put(self, name: str, text: str) -> None:
        where = "standard output" if self._path is None else str(self._path)
        if self._folder is None and self.format is Format.text and self._label and name != MICROPHONE:
            text = "".join(f"{name}: {line}\n" for line in text.splitlines() or [""])
        try:
            if self._folder is not None:
                where = str(self._target(name, self._folder))
                with open(where, "wb", buffering=0) as file:
                    write_all(file, _utf8(text))
            elif self._path is not None:
                if self._file is None:
                    # Not before: what was there is lost to something.
                    self._file = io.FileIO(self._path, "w")
                _append(self._file, _utf8(text))
            else:
                self._print(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise NemostreamError(
                f"the transcript of {name} cannot be written to {where}: {error.strerror or error}."
            ) from error

    def _print(self, text: str) -> None:
        if not hasattr(sys.stdout, "buffer"):  # a text stream without bytes under it
            print(text, end="", flush=True)
        elif self.format is Format.text:
            if self._encoder is None:  # it remembers whether a byte order mark was written
                self._encoder = codecs.getincrementalencoder(sys.stdout.encoding)("backslashreplace")
            write_whole(sys.stdout, self._encoder.encode(text))
        else:
            write_whole(sys.stdout, _utf8(text))

    def _target(self, name: str, folder: Path) -> Path:
        return folder / f"{'stdin' if name == STDIN else Path(name).stem}{self.format.suffix}"

    @staticmethod
    def _recordings(names: Sequence[str]) -> dict[tuple[int, int] | None, str]:
        found = {_identity(Path(name)): name for name in names if name not in (STDIN, MICROPHONE)}
        found.pop(None, None)
        return found

    def _check_targets(self, names: Sequence[str], folder: Path) -> None:
        """Find the recordings that cannot be written; the others are not concerned."""
        recordings = self._recordings(names)
        owners: dict[Path, str] = {}
        for index, name in enumerate(names):
            target = self._target(name, folder)
            try:
                if target in owners:
                    raise OptionError(
                        f"{owners[target]} and {name} would both be {target}; name another folder for {name}."
                    )
                if recording := recordings.get(_identity(target)):
                    raise OptionError(f"--out would write over {recording}.")
                if target.exists():
                    check_writable(target, "--out")
                owners[target] = name
            except OptionError as error:
                self.refused[index] = error
            except OSError as error:
                self.refused[index] = OptionError(f"--out: {target} cannot be written: {error.strerror or error}.")

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def check_writable(path: Path, option: str) -> None:
    """Raise `OptionError` if this file cannot be written. It is opened and kept."""
    try:
        if path.is_dir():
            raise OptionError(f"{option}: {path} is a folder; give a file.")
        existed = path.exists()
        if not os.access(path if existed else path.absolute().parent, os.W_OK):
            raise OptionError(f"{option}: {path} cannot be written: permission denied.")
        if existed and not path.is_file():
            return  # opening a pipe has effects
        with open(path, "ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise OptionError(f"{option}: {path} cannot be written: {error.strerror or error}.") from error


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OptionError(f"--out: nothing can be written into {folder}: {error.strerror or error}.") from error


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError, ValueError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _utf8(text: str) -> bytes:
    # A file's name, which is in some formats, need not be text.
    return text.encode("utf-8", "backslashreplace")


def _is_utf8(encoding: str | None) -> bool:
    try:
        return codecs.lookup(encoding or "ascii").name == "utf-8"
    except LookupError:
        return False


def _append(file: io.FileIO, data: bytes) -> None:
    """Write all or, where a disk is full, nothing. Raises `OSError`."""
    before = file.tell() if file.seekable() else None
    try:
        write_all(file, data)
    except OSError:
        if before is not None:
            with suppress(OSError):
                file.truncate(before)
                file.seek(before)
        raise
