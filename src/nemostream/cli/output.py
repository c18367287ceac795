"""The output of `nemostream transcribe`: standard output, one file, or a folder with one file per input."""

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

from nemostream.cli.standard_streams import write_all, write_unbuffered
from nemostream.errors import NemostreamError, OptionError
from nemostream.runtime.text.formats import Format, Transcript, Utterance, render
from nemostream.runtime.text.scripts import join_texts

if TYPE_CHECKING:
    from nemostream.runtime.text.events import Event
    from nemostream.runtime.text.itn import InverseNormalizer
    from nemostream.runtime.text.words import Result, Word

STDIN, MICROPHONE = "-", "microphone"  # names of the inputs that are not files
_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


class Output:
    """Writes transcripts in one format. A context manager.

    names: the inputs, in order.
    out: a file; a folder, if it exists as one or ends with a slash; "-" or None for standard output.
    split_utterances: write each utterance as a line of text, or in JSON under `utterances`.
    itn: the inverse normalizer to apply (default: none).
    channel: the channel that is transcribed, from 1, if one was selected.

    The output is checked before transcription starts: raises `OptionError` if nothing can be written there. `errors`
    holds errors that concern a single input, by its index in `names`.
    """

    def __init__(
        self,
        names: Sequence[str],
        format: Format,
        out: str | None = None,
        *,
        split_utterances: bool = False,
        itn: InverseNormalizer | None = None,
        channel: int | None = None,
    ) -> None:
        self.format, self._split_utterances, self.itn, self._channel = format, split_utterances, itn, channel
        self._prefix_names = sum(name != MICROPHONE for name in names) > 1
        self._written: dict[str, int] = {}  # utterances already written, by input
        self._file: io.FileIO | None = None
        self._path: Path | None = None
        self._folder: Path | None = None
        self._encoder: codecs.IncrementalEncoder | None = None  # for text on standard output
        self.errors: dict[int, OptionError] = {}
        if out is not None and out not in _STDOUT:
            if out.endswith(("/", os.sep)) or os.path.isdir(out):
                self._folder = Path(out)
            else:
                self._path = Path(out)
        if format.one_per_file and len(names) > 1 and self._folder is None:
            raise OptionError(
                f"--format {format} needs one file per recording: for several recordings give --out FOLDER/."
            )
        if self._folder is not None:
            _check_folder(self._folder)
            self._check_targets(names, self._folder)
        elif self._path is not None:
            if not self._path.absolute().parent.is_dir():
                raise OptionError(f"--out: there is no folder {self._path.parent} for {self._path.name}.")
            if recording := self._recordings(names).get(_inode(self._path)):
                raise OptionError(f"--out would overwrite {recording}.")
            check_writable(self._path, "--out")
        elif sys.stdout is None:
            raise OptionError("standard output is closed: give --out FILE.")

    def write_utterance(self, name: str, utterance: Event) -> bool:
        """Write an utterance before its recording ends. Return False if the format or target does not allow it.

        Raises `NemostreamError` if it cannot be written.
        """
        if (
            not self._split_utterances
            or self.format is not Format.text
            or self._prefix_names
            or self._folder is not None
        ):
            return False
        text, _ = self._normalize(utterance)
        self._write_text(name, text + "\n")
        self._written[name] = self._written.get(name, 0) + 1
        return True

    def write(self, name: str, parts: Sequence[Result | Event], duration: float, chunk_ms: int) -> None:
        """Write the transcript of a recording: one part per utterance, or a single part.

        Raises `NemostreamError` if it cannot be written, `BrokenPipeError` if standard output was closed by its reader.
        """
        if self.format is Format.text and (written := self._written.get(name, 0)):
            assert written == len(parts)  # `write_utterance` has written all of them
            return
        normalized = [self._normalize(part) for part in parts]
        utterances = (
            tuple(
                Utterance(text, part.words[0].start, part.words[-1].end, part.words[-1].language)
                for (text, _), part in zip(normalized, parts, strict=True)
                if part.words  # a token that is only a space makes no word
            )
            if self._split_utterances
            else None
        )
        transcript = Transcript(
            # NeMo resolves relative names against the manifest's folder.
            os.path.abspath(name) if self.format is Format.manifest and name not in (STDIN, MICROPHONE) else name,
            join_texts(text for text, _ in normalized),
            [word for _, words in normalized for word in words],
            duration,
            [token for part in parts for token in part.tokens],
            chunk_ms,
            utterances,
            join_texts(part.text for part in parts) if self.itn else None,
            self._channel,
            next((part.language for part in reversed(parts) if part.language), None),
        )
        # JSON is UTF-8 (RFC 8259); on a standard output with another encoding, escape what is not ASCII.
        ascii = self._folder is None and self._path is None and not _is_utf8(getattr(sys.stdout, "encoding", None))
        self._write_text(name, render(transcript, self.format, ascii=ascii))

    def _normalize(self, part: Result | Event) -> tuple[str, Sequence[Word]]:
        if self.itn is None:
            return part.text, part.words
        from nemostream.runtime.text.words import join_words

        words = self.itn(part.words)
        return join_words(words), words

    def _write_text(self, name: str, text: str) -> None:
        target = "standard output" if self._path is None else str(self._path)
        if self._folder is None and self.format is Format.text and self._prefix_names and name != MICROPHONE:
            text = "".join(f"{name}: {line}\n" for line in text.splitlines() or [""])
        try:
            if self._folder is not None:
                target = str(self._target(name, self._folder))
                with open(target, "wb", buffering=0) as file:
                    write_all(file, _utf8(text))
            elif self._path is not None:
                if self._file is None:
                    # Opened at the first write: without a transcript, an existing file is not overwritten.
                    self._file = io.FileIO(self._path, "w")
                _append(self._file, _utf8(text))
            else:
                self._print(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise NemostreamError(
                f"the transcript of {name} cannot be written to {target}: {error.strerror or error}."
            ) from error

    def _print(self, text: str) -> None:
        if not hasattr(sys.stdout, "buffer"):  # a text stream without a binary buffer
            print(text, end="", flush=True)
        elif self.format is Format.text:
            if self._encoder is None:  # incremental, so that a byte order mark is written only once
                self._encoder = codecs.getincrementalencoder(sys.stdout.encoding)("backslashreplace")
            write_unbuffered(sys.stdout, self._encoder.encode(text))
        else:
            write_unbuffered(sys.stdout, _utf8(text))

    def _target(self, name: str, folder: Path) -> Path:
        return folder / f"{'stdin' if name == STDIN else Path(name).stem}{self.format.suffix}"

    @staticmethod
    def _recordings(names: Sequence[str]) -> dict[tuple[int, int] | None, str]:
        recordings = {_inode(Path(name)): name for name in names if name not in (STDIN, MICROPHONE)}
        recordings.pop(None, None)
        return recordings

    def _check_targets(self, names: Sequence[str], folder: Path) -> None:
        """Record an error for each input whose transcript cannot be written into `folder`."""
        recordings = self._recordings(names)
        owners: dict[Path, str] = {}
        for index, name in enumerate(names):
            target = self._target(name, folder)
            try:
                if target in owners:
                    raise OptionError(
                        f"{owners[target]} and {name} would both be written to {target}; use another folder for {name}."
                    )
                if recording := recordings.get(_inode(target)):
                    raise OptionError(f"--out would overwrite {recording}.")
                if target.exists():
                    check_writable(target, "--out")
                owners[target] = name
            except OptionError as error:
                self.errors[index] = error
            except OSError as error:
                self.errors[index] = OptionError(f"--out: {target} cannot be written: {error.strerror or error}.")

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def check_writable(path: Path, option: str) -> None:
    """Raise `OptionError` if the file cannot be written. An existing file keeps its content."""
    try:
        if path.is_dir():
            raise OptionError(f"{option}: {path} is a folder; give a file.")
        existed = path.exists()
        if not os.access(path if existed else path.absolute().parent, os.W_OK):
            raise OptionError(f"{option}: {path} cannot be written: permission denied.")
        if existed and not path.is_file():
            return  # opening a pipe has side effects
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
        raise OptionError(f"--out: cannot write into {folder}: {error.strerror or error}.") from error


def _inode(path: Path) -> tuple[int, int] | None:
    with suppress(OSError, ValueError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _utf8(text: str) -> bytes:
    # Some formats contain the file's name, which may have bytes that are not text.
    return text.encode("utf-8", "backslashreplace")


def _is_utf8(encoding: str | None) -> bool:
    try:
        return codecs.lookup(encoding or "ascii").name == "utf-8"
    except LookupError:
        return False


def _append(file: io.FileIO, data: bytes) -> None:
    """Write all of `data`, or nothing if the disk is full. Raises `OSError`."""
    start = file.tell() if file.seekable() else None
    try:
        write_all(file, data)
    except OSError:
        if start is not None:
            with suppress(OSError):
                file.truncate(start)
                file.seek(start)
        raise
