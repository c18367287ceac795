"""`nemostream transcribe`: files, a pipe or the microphone become transcripts, in the order they were named."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from nemostream.captions import Captions
from nemostream.errors import AudioError, BackendError, NemostreamError, OptionError
from nemostream.formats import Format, Transcript, render

if TYPE_CHECKING:
    from nemostream.itn import InverseNormalizer
    from nemostream.runtime.recognizer import LiveStream, Model
    from nemostream.runtime.words import Result

STDIN, STDIN_RATE, MICROPHONE = "-", 16000, "microphone"
TOGETHER = 16  # files decoded side by side; their chunks share batches
_BLOCK_SECONDS = 0.08  # of live audio pushed at a time


class Output:
    """Where transcripts go: standard output, a file for all, or a folder with a file for each.

    `out` is a folder if it is one or ends as one does. Raises `OptionError` if the recordings cannot be told apart
    there, or if one of them would be written over; `OSError` if the folder cannot be made. A context manager.
    """

    def __init__(
        self, names: Sequence[str], format: Format, out: str | None = None, itn: InverseNormalizer | None = None
    ) -> None:
        self._format, self._itn = format, itn
        self._label = sum(name != MICROPHONE for name in names) > 1
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
        recordings = {_identity(Path(name)): name for name in names}
        owners: dict[Path, str] = {}
        for name in names:
            target = self._target(name)
            if target is None:
                break
            if (identity := _identity(target)) is not None and identity in recordings:
                raise OptionError(f"--out would write over {recordings[identity]}.")
            if self._folder is not None and target in owners:
                raise OptionError(f"{owners[target]} and {name} would both be {target}; name another folder for one.")
            owners[target] = name
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, result: Result) -> None:
        """Write what was said in a recording, now and whole. Raises `OSError`."""
        words, text, spoken = result.words, result.text, None
        if self._itn is not None:
            words, spoken = self._itn(words), text
            text = " ".join(word.text for word in words)
        transcript = Transcript(name, text, words, result.duration, result.tokens, result.chunk_ms, spoken)
        line = render(transcript, self._format)
        if self._format is Format.text and self._label and name != MICROPHONE and self._folder is None:
            line = f"{name}: {line}"
        if self._folder is not None:
            target = self._target(name)
            assert target is not None
            with _create(target) as file:
                file.write(line)
            return
        if self._path is not None and self._file is None:
            self._file = _create(self._path)  # not before: what is there is lost only to something
        print(line, end="", flush=True, file=self._file or sys.stdout)

    def _target(self, name: str) -> Path | None:
        if self._folder is None:
            return self._path
        return self._folder / f"{'stdin' if name == STDIN else Path(name).stem}{self._format.suffix}"

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


def complain(sentence: str) -> None:
    """One sentence on standard error."""
    print(f"nemostream: {sentence}", file=sys.stderr, flush=True)


def transcribe_files(model: Model, names: Sequence[str], output: Output, *, realtime: bool, live: bool) -> int:
    """Write every result in order as soon as it is its turn; return the exit code of the first failure, or 0."""
    code, pool = 0, ThreadPoolExecutor(min(len(names), TOGETHER))
    with Captions(names, live) as captions:
        jobs = [
            pool.submit(_transcribe_one, model, name, realtime, captions, index) for index, name in enumerate(names)
        ]
        try:
            for index, (name, job) in enumerate(zip(names, jobs, strict=True)):
                try:
                    result = job.result()
                except NemostreamError as error:
                    captions.over(index)
                    with captions.aside():
                        complain(str(error))
                    code = code or error.exit_code
                else:
                    captions.over(index)
                    with captions.aside():
                        output.write(name, result)
        finally:  # on Ctrl-C, or when nobody reads our output: do not decode the rest first
            pool.shutdown(wait=False, cancel_futures=True)
    return code


def listen(model: Model, *, live: bool) -> Result:
    """What the microphone hears until Ctrl-C. Raises `BackendError` without its library, `AudioError` without one."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # the module, or the PortAudio library it wants
        raise BackendError(
            "the microphone needs sounddevice and PortAudio: pip install 'nemostream[mic]' (Debian: libportaudio2)"
        ) from error
    try:
        device = sounddevice.InputStream(samplerate=STDIN_RATE, channels=1, dtype="float32")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise AudioError(f"no microphone could be opened: {error}.") from error

    def blocks() -> Generator[Any]:
        while True:
            yield device.read(round(STDIN_RATE * _BLOCK_SECONDS))[0][:, 0].copy()

    with device, model.stream(sample_rate=STDIN_RATE) as stream, Captions([MICROPHONE], live) as captions:
        print("listening; Ctrl-C ends", file=sys.stderr, flush=True)
        result = _follow(stream, blocks(), captions, 0, ends=KeyboardInterrupt)
        captions.over(0)
        return result


def _transcribe_one(model: Model, name: str, realtime: bool, captions: Captions, index: int) -> Result:
    from nemostream.runtime.audio import Recording, read_pcm16

    if name == STDIN:
        captions.begins(index, 0.0)
        with model.stream(sample_rate=STDIN_RATE) as stream:
            return _follow(stream, read_pcm16(sys.stdin.buffer), captions, index)
    try:
        with Recording(name) as file:
            captions.begins(index, file.duration)
            if realtime:
                stream = model.stream(sample_rate=file.sample_rate, channels=file.channels)
                with stream, closing(_paced(file.blocks(), file.sample_rate)) as blocks:
                    return _follow(stream, blocks, captions, index)
    except (OSError, UnicodeEncodeError) as error:  # of a name that the system, or libsndfile's wrapper, cannot take
        raise AudioError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    return model.transcribe(
        name,
        on_partial=lambda partial: captions.said(index, partial.text, _settled(partial)),
        on_progress=lambda seconds: captions.heard(index, seconds),
    )


def _follow(
    stream: LiveStream, blocks: Iterable[Any], captions: Captions, index: int, ends: type[BaseException] | None = None
) -> Result:
    """Push blocks as they come, until there are no more or `ends` is raised."""
    with suppress(*[ends] if ends else []):
        for block in blocks:
            if partials := stream.push(block):  # none but the last is worth a look
                captions.said(index, partials[-1].text, _settled(partials[-1]))
                captions.heard(index, partials[-1].duration)
    result = stream.finish()
    captions.said(index, result.text, len(result.text))
    return result


def _settled(partial: Result) -> int:
    """Characters of a text that will not change. No token is ever taken back, but the last word may still grow."""
    return partial.text.rfind(" ") + 1


def _paced(blocks: Iterable[Any], rate: int) -> Generator[Any]:
    """The same audio in short pieces, each no sooner than its end would have been spoken."""
    started, heard, step = time.monotonic(), 0, max(1, round(rate * _BLOCK_SECONDS))
    for block in blocks:
        for begin in range(0, len(block), step):
            piece = block[begin : begin + step]
            heard += len(piece)
            time.sleep(max(0.0, started + heard / rate - time.monotonic()))
            yield piece
