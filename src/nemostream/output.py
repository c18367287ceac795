"""Where the transcripts of `nemostream transcribe` go: standard output, a file, or a folder with many."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from nemostream.errors import OptionError
from nemostream.formats import Format, Transcript, Utterance, Word, render

if TYPE_CHECKING:
    from nemostream.itn import InverseNormalizer
    from nemostream.runtime.utterance import Event
    from nemostream.runtime.words import Result

STDIN, MICROPHONE = "-", "microphone"  # names of what is no file


class Output:
    """Transcripts in a format. `out` is a folder if it is one or ends as one does; `itn` writes numbers as numbers.

    `apart` keeps utterances apart: as lines of text, or in JSON as `utterances`. Raises `OptionError` if recordings
    cannot be told apart there, or if one of them would be written over; `OSError` if the folder cannot be made. A
    context manager.
    """

    def __init__(
        self,
        names: Sequence[str],
        format: Format,
        out: str | None = None,
        *,
        apart: bool = False,
        itn: InverseNormalizer | None = None,
    ) -> None:
        self._format, self._apart, self._itn = format, apart, itn
        self._label = sum(name != MICROPHONE for name in names) > 1
        self._told: dict[str, int] = {}  # utterances that were written already
        self._file: TextIO | None = None
        self._path: Path | None = None
        self._folder: Path | None = None
        if out is not None and (out.endswith(("/", os.sep)) or Path(out).is_dir()):
            self._folder = Path(out)
        elif out is not None:
            self._path = Path(out)
        if format.alone and len(names) > 1 and self._folder is None:
            raise OptionError(f"--format {format} makes a file for each recording: give --out FOLDER/ for several.")
        if self._path is not None and not self._path.absolute().parent.is_dir():
            raise OptionError(f"--out is in {self._path.parent}, which is no folder.")
        if self._path is not None and not os.access(self._path if self._path.exists() else self._path.parent, os.W_OK):
            raise OptionError(f"--out: {self._path} cannot be written.")  # better now than after hours
        self._check_targets(names)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def tell(self, name: str, utterance: Event) -> bool:
        """Write an utterance of a recording that goes on; whether it can be written before the others."""
        if not self._apart or self._format is not Format.text or self._label or self._folder is not None:
            return False
        text, _ = self._written(utterance)
        self._put(name, text + "\n")
        self._told[name] = self._told.get(name, 0) + 1
        return True

    def write(self, name: str, said: Sequence[Result | Event], duration: float, chunk_ms: int) -> None:
        """Write what was said in a recording: its utterances, or one for all. Raises `OSError`."""
        written = [self._written(one) for one in said]
        text = " ".join(text for text, _ in written if text)
        spoken = " ".join(one.text for one in said if one.text)
        utterances = tuple(
            Utterance(text, one.words[0].start, one.words[-1].end)
            for (text, _), one in zip(written, said, strict=True)
            if one.words  # a piece of a word that is nothing but a space makes none
        ) if self._apart else None  # fmt: skip
        transcript = Transcript(
            # NeMo looks for what has no folder in the manifest's own.
            os.path.abspath(name) if self._format is Format.manifest and name not in (STDIN, MICROPHONE) else name,
            text,
            [word for _, words in written for word in words],
            duration,
            [token for one in said for token in one.tokens],
            chunk_ms,
            utterances,
            spoken if self._itn else None,
        )
        if self._format is Format.text and (told := self._told.get(name, 0)):
            assert told == len(said)  # as they were final
            return
        self._put(name, render(transcript, self._format))

    def _written(self, one: Result | Event) -> tuple[str, Sequence[Word]]:
        if self._itn is None:
            return one.text, one.words
        words = self._itn(one.words)
        return " ".join(word.text for word in words), words

    def _put(self, name: str, text: str) -> None:
        if self._folder is not None:
            with _create(self._target(name)) as file:
                file.write(text)
            return
        if self._path is not None and self._file is None:
            self._file = _create(self._path)  # not before: what was there is lost only to something
        if self._format is Format.text and self._label and name != MICROPHONE:
            text = "".join(f"{name}: {line}\n" for line in text.splitlines() or [""])
        print(text, end="", flush=True, file=self._file or sys.stdout)

    def _target(self, name: str) -> Path:
        if self._folder is not None:
            return self._folder / f"{'stdin' if name == STDIN else Path(name).stem}{self._format.suffix}"
        assert self._path is not None
        return self._path

    def _check_targets(self, names: Sequence[str]) -> None:
        if self._folder is None and self._path is None:
            return
        recordings = {_identity(Path(name)): name for name in names}
        owners: dict[Path, str] = {}
        for name in names:
            target = self._target(name)
            if (identity := _identity(target)) is not None and identity in recordings:
                raise OptionError(f"--out would write over {recordings[identity]}.")
            if self._folder is not None and target in owners:
                raise OptionError(f"{owners[target]} and {name} would both be {target}; name another folder for one.")
            owners[target] = name

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError, ValueError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _create(path: Path) -> TextIO:
    # A file's name, which is in some formats, need not be text.
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
