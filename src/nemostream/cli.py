"""The command line. Standard output carries results and nothing else; the rest goes to standard error."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nemostream.errors import AudioError, BackendError, NemostreamError

if TYPE_CHECKING:
    from rich.console import Console

    from nemostream.runtime.recognizer import LiveStream, Model
    from nemostream.runtime.stream import Result

STDIN_RATE = 16000
_TOGETHER = 16  # files decoded side by side; their chunks share batches
_BLOCK_SECONDS = 0.08  # of live audio pushed at a time

app = typer.Typer(
    name="nemostream",
    help="NVIDIA's streaming speech recogniser, without NeMo and PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    text = "text"
    json = "json"


BundleOption = Annotated[
    Path | None, typer.Option("--bundle", help="Folder that `nemostream export` wrote. Default: the packaged demo.")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        import nemostream

        print(f"nemostream {nemostream.__version__}")
        raise typer.Exit


@app.command()
def transcribe(
    files: Annotated[list[str] | None, typer.Argument(help="Audio files; - is raw 16 kHz mono 16-bit PCM.")] = None,
    bundle: BundleOption = None,
    chunk_ms: Annotated[int, typer.Option(help="Chunk size in ms: less is sooner, more is better.")] = 560,
    format: Annotated[Format, typer.Option(help="json: one object per line.")] = Format.text,
    realtime: Annotated[bool, typer.Option("--realtime", help="Feed files at the pace they were spoken.")] = False,
    mic: Annotated[bool, typer.Option("--mic", help="Listen to the microphone until Ctrl-C.")] = False,
) -> None:
    """Turn speech into text.

    One line per file, in the order given; with several files, text lines begin with the file's name. A file that cannot
    be read is reported on standard error, the others are done all the same, and the exit code is that of the first
    failure.
    """
    import nemostream

    names = files or []
    if not names and not mic:
        raise typer.BadParameter("give a file, - for standard input, or --mic", param_hint="FILE")
    lanes = min(len(names), _TOGETHER) or 1
    with nemostream.load(bundle, chunk_ms, capacity=lanes + mic) as model:
        code = _transcribe_files(model, names, format, realtime) if names else 0
        if mic:
            _print(_listen(model), "microphone", format, prefix=False)
    if code:
        raise typer.Exit(code)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A .nemo file, or the name of a model NeMo can fetch.")],
    out: Annotated[Path, typer.Argument(help="Folder for the bundle.")],
) -> None:
    """Turn a NeMo checkpoint into a bundle, and measure that both compute the same."""
    missing = [name for name in ("nemo", "torch", "onnx") if find_spec(name) is None]
    if missing:
        raise BackendError(f"exporting needs {' and '.join(missing)}: pip install 'nemostream[export]'")
    from nemostream.export import export_checkpoint

    started, console = time.monotonic(), _stderr()
    _quiet_nemo()
    with console.status("starting") as status:

        def progress(message: str) -> None:
            console.print(f"[dim]{time.monotonic() - started:6.1f} s[/dim]  {message}", highlight=False)
            status.update(message)

        exported = export_checkpoint(checkpoint, out, progress)
    for name, figures in exported.manifest.parity.items():
        if isinstance(figures, dict):
            console.print(
                f"{name:>8}: {figures['steps']} steps, encoder within {figures['encoder']:.1e} of NeMo", highlight=False
            )
    print(out)


@app.command()
def info(bundle: Annotated[Path | None, typer.Argument(help="A bundle. Default: the packaged demo.")] = None) -> None:
    """Show what a bundle is."""
    import nemostream
    from nemostream.doctor import describe

    describe(nemostream.Bundle.open(bundle or nemostream.demo_bundle()))


@app.command()
def doctor() -> None:
    """Show which backends work here, and what the others lack."""
    from nemostream.doctor import examine

    if not examine():
        raise typer.Exit(BackendError.exit_code)


def main() -> NoReturn:
    """Entry point: every expected failure is one sentence and an exit code of its own."""
    try:
        app(standalone_mode=False)
        sys.stdout.flush()
    except NemostreamError as error:
        _complain(str(error))
        sys.exit(error.exit_code)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left; say nothing, not even when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        usage = getattr(error, "exit_code", None), getattr(error, "format_message", None)
        if isinstance(usage[0], int) and callable(usage[1]):  # click's errors of usage
            _complain(usage[1]())
            sys.exit(usage[0])
        raise
    sys.exit(0)


# -- transcribing ----------------------------------------------------------------------------------------------------


def _transcribe_files(model: Model, names: list[str], format: Format, realtime: bool) -> int:
    """Print every result in order as soon as it is its turn; return the exit code of the first failure, or 0."""
    prefix, code = len(names) > 1, 0
    with _Screen(len(names)) as screen, ThreadPoolExecutor(min(len(names), _TOGETHER)) as pool:
        jobs = [pool.submit(_transcribe_one, model, name, realtime, screen) for name in names]
        try:
            for name, job in zip(names, jobs, strict=True):
                try:
                    result = job.result()
                except NemostreamError as error:
                    screen.clear()
                    _complain(str(error))
                    code = code or error.exit_code
                    continue
                screen.clear()
                _print(result, name, format, prefix)
        except BaseException:  # Ctrl-C, or nobody reads our output: do not decode the rest first
            for job in jobs:
                job.cancel()
            model.close()
            raise
    return code


def _transcribe_one(model: Model, name: str, realtime: bool, screen: _Screen) -> Result:
    from nemostream.runtime.audio import Recording, read_pcm16

    if name == "-":
        with model.stream(sample_rate=STDIN_RATE) as stream:
            return _follow(stream, read_pcm16(sys.stdin.buffer), screen, name)
    if realtime:
        with Recording(name) as file:
            blocks = _paced(file.blocks(), file.sample_rate)
            with model.stream(sample_rate=file.sample_rate, channels=file.channels) as stream, closing(blocks):
                return _follow(stream, blocks, screen, name)
    with Recording(name) as file:
        duration = file.duration
    return model.transcribe(
        name,
        on_partial=lambda partial: screen.partial(name, partial.text),
        on_progress=lambda seconds: screen.progress(name, seconds, duration),
    )


def _follow(stream: LiveStream, blocks: Iterator[Any], screen: _Screen, name: str) -> Result:
    for block in blocks:
        for partial in stream.push(block):
            screen.partial(name, partial.text)
    return stream.finish()


def _paced(blocks: Iterator[Any], rate: int) -> Iterator[Any]:
    """The same audio in short pieces, each no sooner than its end would have been spoken."""
    started, heard, step = time.monotonic(), 0, max(1, round(rate * _BLOCK_SECONDS))
    for block in blocks:
        for begin in range(0, len(block), step):
            piece = block[begin : begin + step]
            heard += len(piece)
            time.sleep(max(0.0, started + heard / rate - time.monotonic()))
            yield piece


def _listen(model: Model) -> Result:
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise BackendError(
            "the microphone needs sounddevice and PortAudio: pip install 'nemostream[mic]' (Debian: libportaudio2)"
        ) from error
    try:
        device = sounddevice.InputStream(samplerate=STDIN_RATE, channels=1, dtype="float32")
    except sounddevice.PortAudioError as error:
        raise AudioError(f"no microphone could be opened: {error}") from error
    with device, model.stream(sample_rate=STDIN_RATE) as stream, _Screen(1) as screen:
        _stderr().print("[dim]listening; Ctrl-C ends[/dim]")
        try:
            while True:
                block, _ = device.read(round(STDIN_RATE * _BLOCK_SECONDS))
                for partial in stream.push(block[:, 0].copy()):
                    screen.partial("microphone", partial.text)
        except KeyboardInterrupt:
            screen.clear()
            return stream.finish()


def _print(result: Result, name: str, format: Format, prefix: bool) -> None:
    if format is Format.json:
        tokens = [{"id": token.id, "text": token.text, "time": round(token.time, 3)} for token in result.tokens]
        line = json.dumps(
            {
                "file": name,
                "duration": round(result.duration, 3),
                "text": result.text,
                "tokens": tokens,
                "chunk_ms": result.chunk_ms,
            },
            ensure_ascii=False,
        )
    else:
        line = f"{name}: {result.text}" if prefix else result.text
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class _Screen:
    """What a person watching sees while files are decoded: the partial text and how far we are. Nothing in a pipe."""

    def __init__(self, files: int) -> None:
        self._shown = sys.stderr.isatty()
        self._console = _stderr()
        self._status: Any = None
        self._files, self._progress = files, dict[str, tuple[float, float]]()
        self._lock = threading.Lock()

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def partial(self, name: str, text: str) -> None:
        if self._shown:
            self._show(self._far() + text[-(self._console.width - 30) :])

    def progress(self, name: str, seconds: float, duration: float) -> None:
        with self._lock:
            self._progress[name] = (seconds, duration)

    def clear(self) -> None:
        with self._lock:
            if self._status is not None:
                self._status.stop()
                self._status = None

    def _far(self) -> str:
        with self._lock:
            done = sum(seconds for seconds, _ in self._progress.values())
            total = sum(duration for _, duration in self._progress.values())
        return f"{100 * done / total:3.0f} % of {total:.0f} s  " if total else ""

    def _show(self, line: str) -> None:
        from rich.text import Text

        with self._lock:
            if self._status is None:
                self._status = self._console.status(Text(line))
                self._status.start()
            else:
                self._status.update(Text(line))


# -- small things ----------------------------------------------------------------------------------------------------


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _complain(sentence: str) -> None:
    print(f"nemostream: {sentence}", file=sys.stderr)


def _quiet_nemo() -> None:
    """NeMo logs pages about training data and optimizers that nobody who exports wants to read."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
