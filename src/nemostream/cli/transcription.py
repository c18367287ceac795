"""Transcription of files, standard input and the microphone, with results in the order of the inputs."""

from __future__ import annotations

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
from nemostream.cli.interrupt import StopRequest
from nemostream.cli.output import MICROPHONE, STDIN, Output
from nemostream.cli.standard_streams import print_message, standard_input, suppress_decoder_messages
from nemostream.errors import AudioError, BackendError, NemostreamError, StreamError, TruncatedAudioError
from nemostream.extras import install_command
from nemostream.runtime.text.formats import Format
from nemostream.runtime.text.scripts import separator

if TYPE_CHECKING:
    from nemostream.runtime.audio.files import AudioFile
    from nemostream.runtime.model import LiveStream, Model
    from nemostream.runtime.streaming.session import Options
    from nemostream.runtime.text.events import Event
    from nemostream.runtime.text.words import Result

STDIN_RATE = 16000
MAX_PARALLEL = 16  # files transcribed at the same time; their chunks share batches
_BLOCK_SECONDS = 0.08  # length of one push of live audio


@dataclass(frozen=True)
class _Transcription:
    """The outcome of one input."""

    parts: Sequence[Result | Event]  # one per utterance, or one for the whole input
    duration: float  # seconds of audio received
    stopped: bool = False  # by a signal, before the end of the input
    warning: str = ""
    error: NemostreamError | None = None  # that ended the input early: a truncated file, or a stream that was lost

    @property
    def has_text(self) -> bool:
        return any(part.text for part in self.parts)


class _NotStarted(Exception):
    """A signal arrived before the input was opened."""


def transcribe_files(
    model: Model,
    names: Sequence[str],
    output: Output,
    options: Options,
    stop: StopRequest,
    *,
    realtime: bool = False,
    live: bool = False,
    resume: Path | None = None,
    channel: int | None = None,
) -> int:
    """Transcribe the inputs and write the results in order. Return the exit code of the first failure, or 0.

    A failure of one input or its output does not affect the others. Once `stop` is set, no further input is started,
    and the started ones are written as far as they were transcribed. `resume` is the state file of a single recording,
    `channel` the channel to transcribe, from 1 (default: the mean of all).
    """
    pool = ThreadPoolExecutor(min(len(names), MAX_PARALLEL))
    exit_code, not_started = 0, 0
    chunk_ms = options.get("final_chunk_ms") or model.chunk_ms
    with suppress_decoder_messages(), Captions(names, live) as captions:
        jobs = [
            _InputJob(
                model, name, output, options, stop, captions, index, realtime=realtime, resume=resume, channel=channel
            )
            for index, name in enumerate(names)
        ]
        futures = [pool.submit(job.run) for job in jobs]
        try:
            for index, (job, future) in enumerate(zip(jobs, futures, strict=True)):
                try:
                    try:
                        transcription = _wait_for(job, future, stop)
                    finally:
                        captions.finish(index)
                    with captions.hidden():
                        code = _write(transcription, job.name, output, chunk_ms, resume, len(names))
                except _NotStarted:
                    not_started += 1
                    continue
                except NemostreamError as error:
                    with captions.hidden():
                        print_message(str(error))
                    code = error.exit_code
                exit_code = exit_code or code
        finally:  # after Ctrl-C or a closed output: do not wait for the remaining inputs
            pool.shutdown(wait=False, cancel_futures=True)
        if not_started:
            alone = not_started == len(names) == 1
            print_message("interrupted." if alone else f"interrupted; {not_started} not transcribed.")
    return exit_code


def _write(
    transcription: _Transcription, name: str, output: Output, chunk_ms: int, resume: Path | None, inputs: int
) -> int:
    """Write a transcription and its messages. Return its exit code. Raises `NemostreamError`."""
    from nemostream.runtime.streaming.snapshot import discard

    code = 0
    incomplete = transcription.stopped or isinstance(transcription.error, StreamError)
    if transcription.has_text or not (incomplete and output.format is Format.text):
        output.write(name, transcription.parts, transcription.duration, chunk_ms)
    if transcription.warning:
        print_message(f"{name}: {transcription.warning}")
    if transcription.error:
        print_message(str(transcription.error))
        code = transcription.error.exit_code
    if transcription.stopped:
        print_message(_interrupted_message(name, transcription, resume, inputs))
    elif resume:
        discard(resume)  # only after the result has been written
    return code


def _wait_for(job: _InputJob, future: Future[_Transcription], stop: StopRequest) -> _Transcription:
    """Return the result of the job or raise its error.

    Raises `_NotStarted` if `stop` is set while the job still waits for its input to open, which may take forever.
    """
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
    except Exception as error:  # a bug here or in a library; the other inputs continue
        traceback.print_exception(error)
        raise NemostreamError(f"{job.name}: unexpected {type(error).__name__}: {error}") from error


def _interrupted_message(name: str, transcription: _Transcription, resume: Path | None, inputs: int) -> str:
    message = f"{name}: interrupted" if inputs > 1 else "interrupted"
    if transcription.has_text:
        message += f" after {transcription.duration:.2f} s; the text up to there is written"
    if resume and resume.exists():
        message += f"; the state is saved in {resume}, and the same command continues from it"
    return f"{message}."


def transcribe_microphone(model: Model, output: Output, options: Options, stop: StopRequest, *, live: bool) -> None:
    """Transcribe the microphone until Ctrl-C. Raises `BackendError` without sounddevice, `AudioError` without a
    microphone."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # the module, or the PortAudio library that it loads
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
        print("listening; press Ctrl-C to stop", file=sys.stderr, flush=True)
        collector = _EventCollector(output, MICROPHONE, captions, 0)
        collector.run(stream, blocks(), STDIN_RATE, stop_on=KeyboardInterrupt)
        captions.finish(0)
    chunk_ms = options.get("final_chunk_ms") or model.chunk_ms
    output.write(MICROPHONE, collector.finals, collector.duration, chunk_ms)
    if collector.error:
        raise collector.error


class _InputJob:
    """Transcribes one file or standard input; `run` is called on a worker thread."""

    def __init__(
        self,
        model: Model,
        name: str,
        output: Output,
        options: Options,
        stop: StopRequest,
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

    def run(self) -> _Transcription:
        """Transcribe the input. Raises `_NotStarted` if `stop` is set before it is opened."""
        if self._stop.is_set():
            raise _NotStarted
        if error := self._output.errors.get(self._index):
            raise error
        collector = _EventCollector(self._output, self.name, self._captions, self._index)
        return self._run_standard_input(collector) if self.name == STDIN else self._run_file(collector)

    def _run_standard_input(self, collector: _EventCollector) -> _Transcription:
        from nemostream.runtime.audio.sources import open_pipe

        self.opened = True
        self._captions.start(self._index, 0.0)
        cut = None
        try:
            with (
                open_pipe(standard_input(self._stop), STDIN_RATE) as source,
                self._model.stream(sample_rate=source.sample_rate, channels=source.channels, **self._options) as stream,
            ):
                collector.run(stream, self._ignore_errors_when_stopped(source.blocks), source.sample_rate)
        except TruncatedAudioError as error:  # the audio before the cut was transcribed; expected after a signal
            cut = None if self._stop.is_set() else error
        return _Transcription(collector.finals, collector.duration, self._stop.is_set(), error=collector.error or cut)

    def _ignore_errors_when_stopped(self, blocks: Iterable[Any]) -> Generator[Any]:
        try:
            yield from blocks
        except AudioError:  # a signal may leave an empty input or half a sample
            if not self._stop.is_set():
                raise

    def _run_file(self, collector: _EventCollector) -> _Transcription:
        try:
            file = _open_stoppable(self.name, self._channel, self._stop, saves_state=self._resume is not None)
        except (OSError, UnicodeEncodeError) as error:  # including names that the system or soundfile cannot encode
            raise AudioError(f"{self.name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        with file:
            if self._stop.is_set():
                raise _NotStarted
            self.opened = True
            self._captions.start(self._index, file.duration)
            cut = None
            try:
                parts, duration = self._transcribe(file, collector)
            except TruncatedAudioError as error:  # the audio before the cut was transcribed
                cut, result = error, error.result
                parts, duration = ([result], result.duration) if result else (collector.finals, collector.duration)
            stopped = file.stopped or (self._realtime and self._stop.is_set())
            warning = _cancelling_channels(file) if file.cancels else ""
            return _Transcription(parts, duration, stopped, warning, collector.error or cut)

    def _transcribe(self, file: AudioFile, collector: _EventCollector) -> tuple[Sequence[Result | Event], float]:
        if self._realtime:
            return self._stream_in_real_time(file, collector)
        if self._options.get("endpoint"):
            for event in self._model.listen(file, **self._options):
                collector.add([event])
                self._captions.set_progress(self._index, event.audio)
            return collector.finals, collector.duration
        return self._transcribe_whole(file)

    def _stream_in_real_time(self, file: AudioFile, collector: _EventCollector) -> tuple[Sequence[Event], float]:
        from nemostream.runtime.audio.sources import defer_truncation

        stream = self._model.stream(sample_rate=file.sample_rate, channels=file.channels, **self._options)
        with (
            defer_truncation(file.blocks()) as available,
            stream,
            closing(_pace(available, file.sample_rate, self._stop)) as blocks,
        ):
            collector.run(stream, blocks, file.sample_rate)
        return collector.finals, collector.duration

    def _transcribe_whole(self, file: AudioFile) -> tuple[Sequence[Result], float]:
        captions, index = self._captions, self._index
        source: Any = file  # accepted, although the public type of `transcribe` does not include recordings
        try:
            result = self._model.transcribe(
                source,
                on_partial=lambda partial: captions.set_text(index, partial.text, partial.text.rfind(" ") + 1),
                on_progress=lambda seconds: captions.set_progress(index, seconds),
                resume=self._resume,
                keep_state=True,
                **self._options,
            )
        except OSError as error:
            if self._resume is None:
                raise
            raise NemostreamError(
                f"--resume: the state cannot be saved in {self._resume}: {error.strerror or error}."
            ) from error
        return [result], result.duration


def _open_stoppable(name: str, channel: int | None, stop: StopRequest, saves_state: bool) -> Any:
    """Open a recording whose blocks end early once `stop` is set (then it is `stopped`).

    With `saves_state`, the blocks end with `SourceStopped`, so that the transcription saves its state.
    """
    from nemostream.runtime.audio.files import AudioFile
    from nemostream.runtime.streaming.offline import SourceStopped

    class StoppableFile(AudioFile):
        stopped = False

        def blocks(self) -> Generator[Any]:
            for block in super().blocks():
                if stop.is_set():
                    self.stopped = True
                    if saves_state:
                        raise SourceStopped
                    return
                yield block

    return StoppableFile(name, channel=channel)


def _cancelling_channels(file: AudioFile) -> str:
    return (
        f"its {file.channels} channels cancel out when they are mixed to mono (opposite phase), so speech may be "
        "missing; transcribe a single channel with --channel 1."
    )


class _EventCollector:
    """Collects the final events of one input, writes utterances as they end, and updates the captions."""

    def __init__(self, output: Output, name: str, captions: Captions, index: int) -> None:
        self.finals: list[Event] = []
        self.duration = 0.0  # seconds received
        self.error: StreamError | None = None  # that ended the stream early
        self._output, self._name, self._captions, self._index = output, name, captions, index
        self._caption_prefix = ""  # previous utterances that the captions still show

    def run(
        self, stream: LiveStream, blocks: Iterable[Any], rate: int, stop_on: type[BaseException] | None = None
    ) -> None:
        """Push blocks until they end or `stop_on` is raised, then finish the stream.

        A `StreamError` is kept as `error`, so that the text before it is written.
        """
        samples = 0
        try:
            with suppress(*[stop_on] if stop_on else []):
                for block in blocks:
                    samples += len(block)
                    self.add(stream.push_events(block))
                    self._captions.set_progress(self._index, samples / rate)
            self.add(stream.finish_events())
        except StreamError as error:
            self.error = error

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            self.duration = event.audio
            if event.kind == "end":
                continue
            prefix = self._caption_prefix
            self._captions.set_text(self._index, prefix + event.text, len(prefix) + len(event.stable))
            if event.kind == "final" and event.text:  # without text, it only withdraws the partials
                self.finals.append(event)
                with self._captions.hidden():
                    written = self._output.write_utterance(self._name, event)
                if written:
                    self._captions.clear_text(self._index)
                self._caption_prefix = "" if written else f"{prefix}{event.text}{separator(event.text)}"


def _pace(blocks: Iterable[Any], rate: int, stop: StopRequest) -> Generator[Any]:
    """Yield the same audio in short blocks in real time, each when its last sample is due, until `stop` is set."""
    start_time, samples, size = time.monotonic(), 0, max(1, round(rate * _BLOCK_SECONDS))
    for block in blocks:
        for offset in range(0, len(block), size):
            part = block[offset : offset + size]
            samples += len(part)
            if stop.is_set():
                return
            time.sleep(max(0.0, start_time + samples / rate - time.monotonic()))
            yield part
