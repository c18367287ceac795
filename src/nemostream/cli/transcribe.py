"""`nemostream transcribe`: files, a pipe or the microphone become transcripts, in the order they were named."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemostream.cli.captions import Captions
from nemostream.cli.interrupt import Stop
from nemostream.cli.output import MICROPHONE, STDIN, Output
from nemostream.cli.standard_streams import decoder_messages_dropped, standard_input
from nemostream.errors import AudioError, BackendError, NemostreamError, OptionError, TruncatedAudioError
from nemostream.extras import install_command
from nemostream.runtime.text.formats import Format

if TYPE_CHECKING:
    from nemostream.runtime.audio.files import AudioFile
    from nemostream.runtime.model import LiveStream, Model
    from nemostream.runtime.streaming.session import Options
    from nemostream.runtime.text.events import Event
    from nemostream.runtime.text.words import Result

STDIN_RATE = 16000
TOGETHER = 16  # files decoded side by side; their chunks share batches
_BLOCK_SECONDS = 0.08  # of live audio pushed at a time
_WEIGHTED = re.compile(r"(.*[^\W\d_].*):\s*([0-9.]+)", re.DOTALL)


def complain(sentence: str) -> None:
    """One sentence on standard error."""
    with suppress(OSError):  # nobody reads it
        print(f"nemostream: {sentence}", file=sys.stderr, flush=True)


def read_phrases(given: Sequence[str]) -> dict[str, float]:
    """Phrases with their weights. Raises `OptionError`.

    Each of `given` is a file, a phrase, or a phrase with its weight: PHRASE:WEIGHT, if the phrase has a letter (10:30
    is a phrase). A line of a file is a phrase, maybe with a tab and its weight behind it.
    """
    phrases: dict[str, float] = {}
    for text in given:
        if _is_file(text):
            phrases |= _phrases_of(Path(text))
            continue
        if re.search(r"^(\.{0,2}/|~)|\.(txt|tsv|csv|lst|list)$", text):
            raise OptionError(f"--phrases: there is no file {text} (a phrase like it goes into a file).")
        phrase, weight = text, 1.0
        if match := _WEIGHTED.fullmatch(text):
            phrase = match[1].rstrip()
            weight = _weight(match[2], f"--phrases {text}")
        phrases[phrase] = weight
    return phrases


def _weight(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"{where}: {text!r} is not a weight; it must be a number.") from error


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
    except OSError as error:
        raise OptionError(f"--phrases: {path} cannot be read: {error.strerror or error}.") from error
    for number, line in enumerate(lines, 1):
        phrase, _, weight = (part.strip() for part in line.partition("\t"))
        if phrase:
            found[phrase] = _weight(weight or "1", f"--phrases: {path}, line {number}")
    return found


@dataclass(frozen=True)
class _Transcribed:
    said: Sequence[Result | Event]  # in utterances or as a whole
    duration: float  # seconds of audio that came
    stopped: bool = False  # before its end
    warning: str = ""
    truncated: TruncatedAudioError | None = None  # the input ended before the end that its header states

    @property
    def said_something(self) -> bool:
        return any(one.text for one in self.said)


class _NotStarted(Exception):
    """A signal came before the input was opened."""


def transcribe_files(
    model: Model,
    names: Sequence[str],
    output: Output,
    options: Options,
    stop: Stop,
    *,
    realtime: bool = False,
    live: bool = False,
    resume: Path | None = None,
    channel: int | None = None,
) -> int:
    """Write every result in order as soon as it is its turn; return the exit code of the first failure, or 0.

    What goes wrong with one input or its output concerns that one only. Once `stop` is set no other input is started,
    and those that were are transcribed as far as they have come. `resume` is a file for the state of a single
    recording, `channel` the one to take of each.
    """
    from nemostream.runtime.streaming.snapshot import discard

    code, left_out, pool = 0, 0, ThreadPoolExecutor(min(len(names), TOGETHER))
    with decoder_messages_dropped(), Captions(names, live) as captions:
        jobs = [
            _Job(model, name, output, options, stop, captions, index, realtime=realtime, resume=resume, channel=channel)
            for index, name in enumerate(names)
        ]
        running = [pool.submit(job.run) for job in jobs]
        try:
            for index, (name, job, future) in enumerate(zip(names, jobs, running, strict=True)):
                try:
                    done = _outcome(job, future, stop)
                    captions.over(index)
                    with captions.aside():
                        if done.said_something or not (done.stopped and output.format is Format.text):
                            output.write(name, done.said, done.duration, model.chunk_ms)
                        if done.warning:
                            complain(f"{name}: {done.warning}")
                        if done.truncated:
                            complain(str(done.truncated))
                            code = code or done.truncated.exit_code
                        if done.stopped:
                            complain(_stopped(name, done, resume, len(names)))
                    if resume and not done.stopped:
                        discard(resume)  # not before what was said is written
                except _NotStarted:
                    captions.over(index)
                    left_out += 1
                except NemostreamError as error:
                    captions.over(index)
                    with captions.aside():
                        complain(str(error))
                    code = code or error.exit_code
        finally:  # on Ctrl-C, or when nobody reads our output: do not decode the rest first
            pool.shutdown(wait=False, cancel_futures=True)
        if left_out:
            complain("interrupted." if left_out == len(names) == 1 else f"interrupted; {left_out} not transcribed.")
    return code


def _outcome(job: _Job, future: Future[_Transcribed], stop: Stop) -> _Transcribed:
    """What the job gave, or raised. Whoever waits for an input to open when `stop` is set is not waited for."""
    while not future.done() and not (stop.is_set() and not job.opened):
        wait([future], timeout=0.1)
    if not future.done():
        raise _NotStarted
    try:
        return future.result()
    except (NemostreamError, _NotStarted, BrokenPipeError):
        raise
    except OSError as error:
        raise NemostreamError(f"{job.name}: {error.strerror or error}.") from error
    except Exception as error:  # a fault of ours or of a library: the other files are not concerned
        traceback.print_exception(error)
        raise NemostreamError(f"{job.name}: unexpected {type(error).__name__}: {error}") from error


def _stopped(name: str, done: _Transcribed, resume: Path | None, inputs: int) -> str:
    sentence = f"{name}: interrupted" if inputs > 1 else "interrupted"
    if done.said_something:
        sentence += f" after {done.duration:.2f} s; the text up to there is written"
    if resume and resume.exists():
        sentence += f"; the state is saved in {resume}, and the same command continues from it"
    return f"{sentence}."


def listen(model: Model, output: Output, options: Options, stop: Stop, *, live: bool) -> None:
    """Write what the microphone records until Ctrl-C. Raises `BackendError` without its library, `AudioError` without
    a microphone."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # the module, or the PortAudio library it wants
        raise BackendError(
            f"the microphone needs sounddevice and PortAudio (Debian: libportaudio2): {install_command('mic')}"
        ) from error
    try:
        device = sounddevice.InputStream(samplerate=STDIN_RATE, channels=1, dtype="float32")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise AudioError(f"no microphone could be opened: {error}.") from error

    def blocks() -> Generator[Any]:
        while not stop.is_set():
            yield device.read(round(STDIN_RATE * _BLOCK_SECONDS))[0][:, 0].copy()

    stream = model.stream(sample_rate=STDIN_RATE, **options)
    with device, stream, Captions([MICROPHONE], live) as captions:
        print("listening; Ctrl-C ends", file=sys.stderr, flush=True)
        speech = _Speech(output, MICROPHONE, captions, 0)
        speech.follow(stream, blocks(), STDIN_RATE, ends=KeyboardInterrupt)
        captions.over(0)
    output.write(MICROPHONE, speech.finals, speech.duration, model.chunk_ms)


class _Job:
    """One input on its way to a transcript; `run` it on a thread."""

    def __init__(
        self,
        model: Model,
        name: str,
        output: Output,
        options: Options,
        stop: Stop,
        captions: Captions,
        index: int,
        *,
        realtime: bool,
        resume: Path | None,
        channel: int | None,
    ) -> None:
        self.name, self.opened = name, False
        self._model, self._output, self._options, self._stop = model, output, options, stop
        self._captions, self._index = captions, index
        self._realtime, self._resume, self._channel = realtime, resume, channel

    def run(self) -> _Transcribed:
        """Raises `_NotStarted` if that is too late."""
        if self._stop.is_set():
            raise _NotStarted
        if refusal := self._output.refused.get(self._index):
            raise refusal
        speech = _Speech(self._output, self.name, self._captions, self._index)
        if self.name == STDIN:
            return self._standard_input(speech)
        try:
            file = _stoppable(self.name, self._channel, self._stop, saves=self._resume is not None)
        except (
            OSError,
            UnicodeEncodeError,
        ) as error:  # of a name that the system, or libsndfile's wrapper, cannot take
            raise AudioError(f"{self.name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        with file:
            if self._stop.is_set():
                raise _NotStarted
            self.opened = True
            self._captions.begins(self._index, file.duration)
            truncated = None
            try:
                said, duration = self._recording(file, speech)
            except TruncatedAudioError as error:  # what is there was transcribed
                truncated, result = error, error.result
                said, duration = ([result], result.duration) if result else (speech.finals, speech.duration)
            cut = file.cut or (self._realtime and self._stop.is_set())
            return _Transcribed(said, duration, cut, _mixed_down(file) if file.cancels else "", truncated)

    def _standard_input(self, speech: _Speech) -> _Transcribed:
        from nemostream.runtime.audio.sources import open_pipe

        self.opened = True
        self._captions.begins(self._index, 0.0)
        truncated = None
        try:
            with (
                open_pipe(standard_input(self._stop), STDIN_RATE) as sound,
                self._model.stream(sample_rate=sound.sample_rate, channels=sound.channels, **self._options) as stream,
            ):
                speech.follow(stream, self._until_stopped(sound.blocks), sound.sample_rate)
        except TruncatedAudioError as error:  # what is there was transcribed; after a signal that is no fault
            truncated = None if self._stop.is_set() else error
        return _Transcribed(speech.finals, speech.duration, self._stop.is_set(), truncated=truncated)

    def _until_stopped(self, blocks: Iterable[Any]) -> Generator[Any]:
        try:
            yield from blocks
        except AudioError:  # nothing came, or half a sample: no wonder in an input that was cut off
            if not self._stop.is_set():
                raise

    def _recording(self, file: AudioFile, speech: _Speech) -> tuple[Sequence[Result | Event], float]:
        from nemostream.runtime.audio.sources import defer_truncation

        model, options, captions, index = self._model, self._options, self._captions, self._index
        source: Any = file
        if self._realtime:
            stream = model.stream(sample_rate=file.sample_rate, channels=file.channels, **options)
            with (
                defer_truncation(file.blocks()) as there,
                stream,
                closing(_paced(there, file.sample_rate, self._stop)) as blocks,
            ):
                speech.follow(stream, blocks, file.sample_rate)
            return speech.finals, speech.duration
        if options.get("endpoint"):
            for event in model.listen(source, **options):
                speech.take([event])
                captions.heard(index, event.audio)
            return speech.finals, speech.duration
        try:
            result = model.transcribe(
                source,
                on_partial=lambda partial: captions.said(index, partial.text, partial.text.rfind(" ") + 1),
                on_progress=lambda seconds: captions.heard(index, seconds),
                resume=self._resume,
                keep_state=True,
                **options,
            )
        except OSError as error:
            if self._resume is None:
                raise
            raise NemostreamError(
                f"--resume: the state cannot be saved in {self._resume}: {error.strerror or error}."
            ) from error
        return [result], result.duration


def _stoppable(name: str, channel: int | None, stop: Stop, saves: bool) -> Any:
    """The file, which seems to end once `stop` is set (then it is `cut`); a transcription that `saves` its state is
    made to do so."""
    from nemostream.runtime.audio.files import AudioFile
    from nemostream.runtime.streaming.offline import SourceStopped

    class Stoppable(AudioFile):
        cut = False

        def blocks(self) -> Generator[Any]:
            for block in super().blocks():
                if stop.is_set():
                    self.cut = True
                    if saves:
                        raise SourceStopped
                    return
                yield block

    return Stoppable(name, channel=channel)


def _mixed_down(file: AudioFile) -> str:
    return (
        f"its {file.channels} channels cancel out when they are mixed to one, as those in opposite phase do, so speech "
        "may be missing; transcribe one of them with --channel 1."
    )


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
                self.take(stream.push_events(block))
                self._captions.heard(self._index, pushed / rate)
        self.take(stream.finish_events())

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


def _paced(blocks: Iterable[Any], rate: int, stop: Stop) -> Generator[Any]:
    """The same audio in short pieces, each no sooner than its end would have been spoken, until `stop` is set."""
    started, heard, step = time.monotonic(), 0, max(1, round(rate * _BLOCK_SECONDS))
    for block in blocks:
        for begin in range(0, len(block), step):
            piece = block[begin : begin + step]
            heard += len(piece)
            if stop.is_set():
                return
            time.sleep(max(0.0, started + heard / rate - time.monotonic()))
            yield piece
