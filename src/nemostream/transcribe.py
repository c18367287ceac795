"""`nemostream transcribe`: files, a pipe or the microphone become transcripts, in the order they were named."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemostream.captions import Captions
from nemostream.errors import AudioError, BackendError, NemostreamError, OptionError, TruncatedAudioError
from nemostream.output import MICROPHONE, STDIN, Output

if TYPE_CHECKING:
    from nemostream.runtime.recognition import Options
    from nemostream.runtime.recognizer import LiveStream, Model
    from nemostream.runtime.utterance import Event
    from nemostream.runtime.words import Result

STDIN_RATE = 16000
TOGETHER = 16  # files decoded side by side; their chunks share batches
_BLOCK_SECONDS = 0.08  # of live audio pushed at a time


def complain(sentence: str) -> None:
    """One sentence on standard error."""
    print(f"nemostream: {sentence}", file=sys.stderr, flush=True)


def read_phrases(given: Sequence[str]) -> dict[str, float]:
    """Phrases with their weights. Each given is a phrase, or a file with one in each line and maybe, after a tab, its
    weight. Raises `OptionError`."""
    phrases: dict[str, float] = {}
    for text in given:
        if _is_file(text):
            phrases |= _phrases_of(Path(text))
            continue
        if re.search(r"^(\.{0,2}/|~)|\.(txt|tsv|csv|lst|list)$", text):
            raise OptionError(f"--phrases: {text} looks like a file, and is none (a phrase like it goes into a file).")
        phrases[text] = 1.0
    return phrases


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # of what no path could be
        return False


def _phrases_of(path: Path) -> dict[str, float]:
    found = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OptionError(f"--phrases: {path} is not text in UTF-8.") from error
    for number, line in enumerate(lines, 1):
        phrase, _, weight = (part.strip() for part in line.partition("\t"))
        if not phrase:
            continue
        try:
            found[phrase] = float(weight or 1)
        except ValueError as error:
            raise OptionError(f"--phrases: {path}, line {number}: {weight!r} is not a weight.") from error
    return found


def transcribe_files(
    model: Model,
    names: Sequence[str],
    output: Output,
    options: Options,
    *,
    realtime: bool = False,
    live: bool = False,
    resume: Path | None = None,
) -> int:
    """Write every result in order as soon as it is its turn; return the exit code of the first failure, or 0.

    `resume` is a file for the state of a single recording.
    """
    from nemostream.runtime.resume import discard

    code, pool = 0, ThreadPoolExecutor(min(len(names), TOGETHER))
    with Captions(names, live) as captions:
        jobs = [
            pool.submit(_transcribe_one, model, name, output, options, realtime, resume, captions, index)
            for index, name in enumerate(names)
        ]
        try:
            for index, (name, job) in enumerate(zip(names, jobs, strict=True)):
                truncated: TruncatedAudioError | None = None
                try:
                    try:
                        said, duration = job.result()
                    except TruncatedAudioError as error:
                        if error.result is None:
                            raise
                        truncated, (said, duration) = error, error.result
                except NemostreamError as error:
                    captions.over(index)
                    with captions.aside():
                        complain(str(error))
                    code = code or error.exit_code
                else:
                    captions.over(index)
                    with captions.aside():
                        output.write(name, said, duration, model.chunk_ms)
                        if truncated:
                            complain(str(truncated))
                            code = code or truncated.exit_code
                    if resume:
                        discard(resume)  # not before what was said is written
        finally:  # on Ctrl-C, or when nobody reads our output: do not decode the rest first
            pool.shutdown(wait=False, cancel_futures=True)
    return code


def listen(model: Model, output: Output, options: Options, *, live: bool) -> None:
    """Write what the microphone hears until Ctrl-C. Raises `BackendError` without its library, `AudioError` without
    one."""
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

    stream = model.stream(sample_rate=STDIN_RATE, **options)
    with device, stream, Captions([MICROPHONE], live) as captions:
        print("listening; Ctrl-C ends", file=sys.stderr, flush=True)
        speech = _Speech(output, MICROPHONE, captions, 0)
        speech.follow(stream, blocks(), STDIN_RATE, ends=KeyboardInterrupt)
        captions.over(0)
    output.write(MICROPHONE, speech.finals, speech.duration, model.chunk_ms)


def _transcribe_one(
    model: Model,
    name: str,
    output: Output,
    options: Options,
    realtime: bool,
    resume: Path | None,
    captions: Captions,
    index: int,
) -> tuple[Sequence[Result | Event], float]:
    """What was said, in utterances or as a whole, and how many seconds there were."""
    speech = _Speech(output, name, captions, index)
    try:
        return _transcribe_to(speech, model, name, options, realtime, resume, captions, index)
    except TruncatedAudioError as error:  # all that is there was transcribed
        result = error.result
        error.result = ([result], result.duration) if result else (speech.finals, speech.duration)
        raise


def _transcribe_to(
    speech: _Speech,
    model: Model,
    name: str,
    options: Options,
    realtime: bool,
    resume: Path | None,
    captions: Captions,
    index: int,
) -> tuple[Sequence[Result | Event], float]:
    from nemostream.runtime.audio import opened, piped

    if name == STDIN:
        captions.begins(index, 0.0)
        with piped(sys.stdin.buffer, STDIN_RATE) as sound:
            with model.stream(sample_rate=sound.sample_rate, channels=sound.channels, **options) as stream:
                speech.follow(stream, sound.blocks, sound.sample_rate)
            return speech.finals, speech.duration
    try:
        with opened(name, STDIN_RATE, 1) as sound:
            captions.begins(index, sound.duration)
            if realtime:
                stream = model.stream(sample_rate=sound.sample_rate, channels=sound.channels, **options)
                with stream, closing(_paced(sound.blocks, sound.sample_rate)) as blocks:
                    speech.follow(stream, blocks, sound.sample_rate)
                return speech.finals, speech.duration
    except (OSError, UnicodeEncodeError) as error:  # of a name that the system, or libsndfile's wrapper, cannot take
        raise AudioError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if options.get("endpoint"):
        for event in model.listen(name, **options):
            speech.take([event])
            captions.heard(index, event.audio)
        return speech.finals, speech.duration
    result = model.transcribe(
        name,
        on_partial=lambda partial: captions.said(index, partial.text, partial.text.rfind(" ") + 1),
        on_progress=lambda seconds: captions.heard(index, seconds),
        resume=resume,
        keep_state=True,
        **options,
    )
    return [result], result.duration


class _Speech:
    """A recording's utterances, as they become known."""

    def __init__(self, output: Output, name: str, captions: Captions, index: int) -> None:
        self.finals: list[Event] = []
        self.duration = 0.0  # seconds that came
        self._output, self._name, self._captions, self._index = output, name, captions, index
        self._before = ""  # utterances that captions still show

    def follow(
        self, stream: LiveStream, blocks: Iterable[Any], rate: int, ends: type[BaseException] | None = None
    ) -> None:
        """Push blocks as they come, until there are no more or `ends` is raised."""
        pushed = 0
        with suppress(*[ends] if ends else []):
            for block in blocks:
                pushed += len(block)
                self.take(stream.hear(block))
                self._captions.heard(self._index, pushed / rate)
        self.take(stream.end())

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            self.duration = event.audio
            if event.kind == "end":
                continue
            self._captions.said(self._index, self._before + event.text, len(self._before) + len(event.stable))
            if event.kind == "final":
                self.finals.append(event)
                with self._captions.aside():
                    told = self._output.tell(self._name, event)
                if told:
                    self._captions.afresh(self._index)
                self._before = "" if told else f"{self._before}{event.text} "


def _paced(blocks: Iterable[Any], rate: int) -> Generator[Any]:
    """The same audio in short pieces, each no sooner than its end would have been spoken."""
    started, heard, step = time.monotonic(), 0, max(1, round(rate * _BLOCK_SECONDS))
    for block in blocks:
        for begin in range(0, len(block), step):
            piece = block[begin : begin + step]
            heard += len(piece)
            time.sleep(max(0.0, started + heard / rate - time.monotonic()))
            yield piece
