"""The command line. Standard output carries results and nothing else; the rest goes to standard error.

Every expected failure is one sentence and an exit code of its own: those of `errors`, 2 for usage too, 1 for what the
operating system refused, 130 for Ctrl-C, 141 when nobody reads the output any more.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stdout, suppress
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nemostream.captions import Captions
from nemostream.errors import AudioError, BackendError, NemostreamError, OptionError

if TYPE_CHECKING:
    from nemostream.runtime.recognizer import LiveStream, Model
    from nemostream.runtime.stream import Result

STDIN, STDIN_RATE = "-", 16000
_TOGETHER = 16  # files decoded side by side; their chunks share batches
_BLOCK_SECONDS = 0.08  # of live audio pushed at a time

_ENGINES = "Folder of engines. Default: ~/.cache/nemostream/engines."

app = typer.Typer(
    name="nemostream",
    help="NVIDIA's streaming speech recogniser, without NeMo and PyTorch.",
    add_completion=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Format(StrEnum):
    text = "text"
    json = "json"


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        import nemostream

        print(f"nemostream {nemostream.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def transcribe(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Audio files; - is raw 16 kHz mono 16-bit PCM.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder that `nemostream export` wrote. Default: the packaged demo.")
    ] = None,
    chunk_ms: Annotated[int, typer.Option(help="Chunk size in ms: smaller is sooner, larger is more accurate.")] = 560,
    format: Annotated[Format, typer.Option(help="json: one object per line.")] = Format.text,
    realtime: Annotated[bool, typer.Option("--realtime", help="Feed files at the pace they were spoken.")] = False,
    mic: Annotated[bool, typer.Option("--mic", help="Listen to the microphone until Ctrl-C.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda for a GPU.")] = "cpu",
    precision: Annotated[
        str | None, typer.Option(help="Of the engines to use. Default: fp32 on a CPU, which needs none; fp16 on a GPU.")
    ] = None,
    engines: Annotated[Path | None, typer.Option(help=_ENGINES)] = None,
) -> None:
    """Turn speech into text.

    One line per file, in the order given; with several files, text lines begin with the file's name. A file that cannot
    be used is reported on standard error, the others are done all the same, and the exit code is that of the first
    failure. On a terminal the words appear as they are recognised.
    """
    import nemostream

    names = files or []
    if not names and not mic:
        raise OptionError("nothing to transcribe: give a FILE, - for standard input, or --mic.")
    if STDIN in names and (sys.stdin is None or sys.stdin.isatty()):
        raise OptionError("standard input is not a pipe: feed raw 16 kHz mono 16-bit PCM into it.")
    lanes = max(1, min(len(names), _TOGETHER))
    # Twice: a failed file's slot may still be in the step under way when the next file wants one.
    capacity = 2 * lanes
    with nemostream.load(
        bundle, chunk_ms, capacity=capacity, device=device, precision=precision, engines=engines
    ) as model:
        code = _transcribe_files(model, names, format, realtime) if names else 0
        if mic:
            _print(_listen(model), "microphone", format, prefix=False)
    if code:
        raise typer.Exit(code)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A .nemo file, or the name of a model NeMo can fetch.")],
    out: Annotated[Path, typer.Argument(help="Folder for the bundle.")],
    triton: Annotated[
        bool, typer.Option("--triton", help="Make OUT a model repository of Triton; CHECKPOINT may be a bundle too.")
    ] = False,
) -> None:
    """Turn a NeMo checkpoint into a bundle, and measure that both compute the same."""
    if not triton:
        _export(checkpoint, out)
        return print(out)
    from nemostream.serving.triton import bundle_in, write_repository
    from nemostream.spec import Bundle

    if Path(checkpoint).is_dir():
        Bundle.open(checkpoint)
        shutil.copytree(checkpoint, bundle_in(out), dirs_exist_ok=True)
    else:
        _export(checkpoint, bundle_in(out))
    write_repository(out)
    print(out)


def _export(checkpoint: str, out: Path) -> None:
    missing = [name for name in ("nemo", "torch", "onnx") if find_spec(name) is None]
    if missing:
        raise BackendError(f"exporting needs {' and '.join(missing)}: pip install 'nemostream[export]'")
    from rich.console import Console

    started, console = time.monotonic(), Console(stderr=True, highlight=False)
    # NeMo and what it brings print things; standard output is ours.
    with redirect_stdout(sys.stderr), console.status("loading NeMo") as status:
        try:
            _quiet_nemo()
            from nemostream.export import export_checkpoint
        except ImportError as error:
            raise BackendError(f"the export extra does not load ({error}): pip install 'nemostream[export]'") from error

        def progress(message: str) -> None:
            console.print(f"[dim]{time.monotonic() - started:6.1f} s[/dim]  ", end="")
            console.print(message, markup=False)
            status.update("working")

        exported = export_checkpoint(checkpoint, out, progress)
    for name, figures in exported.manifest.parity.items():
        if isinstance(figures, dict):
            console.print(f"{name:>8}: {figures['steps']} steps, encoder within {figures['encoder']:.1e} of NeMo")


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="Folder that `nemostream export` wrote.")],
    backend: Annotated[str, typer.Option(help="tensorrt, or onnxruntime.")] = "tensorrt",
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, fp8 or int8.")] = "fp16",
    chunk_ms: Annotated[list[int] | None, typer.Option(help="Chunk size in ms; may be repeated. Default: all.")] = None,
    max_batch: Annotated[int, typer.Option(help="Most streams in one step of a GPU.")] = 64,
    target: Annotated[
        str | None, typer.Option(help="Build for another GPU (sm89), or, with onnxruntime, for cuda instead of cpu.")
    ] = None,
    engines: Annotated[Path | None, typer.Option(help=_ENGINES)] = None,
) -> None:
    """Make the encoder fast on one machine: an engine for each chunk size.

    Every engine that can run here is compared with fp32 on real speech before it is kept, and refused if it says
    anything else. Engines that are there already are kept, so a build that was interrupted goes on where it stopped.
    """
    from rich.console import Console

    import nemostream
    from nemostream.engines import build_engine, check_chunks
    from nemostream.plans import PlanStore

    opened, store = nemostream.Bundle.open(bundle), PlanStore(engines)
    started, console = time.monotonic(), Console(stderr=True, highlight=False)
    for chunk in check_chunks(opened, chunk_ms):
        name = f"{precision} for {chunk.ms} ms"
        with console.status(name) as status:

            def progress(what: str, share: float, name: str = name, status: Any = status) -> None:
                status.update(f"{name}: {time.monotonic() - started:.0f} s, {100 * share:.0f} % of {what}")

            plan, built = build_engine(
                opened, chunk, precision, store, backend=backend, target=target, max_batch=max_batch, progress=progress
            )
        how = f"built in {plan.seconds:.1f} s" if built else "was there"
        gate = "not yet run: it will be compared with fp32 where it is loaded"
        if plan.gate:
            gate = (
                f"cosine {plan.gate['cosine']:.5f} and {plan.gate['tokens']} equal tokens in {plan.gate['steps']} steps"
            )
        console.print(f"{name}: {plan.bytes / 1e6:.1f} MB, {how}; {gate}", soft_wrap=True)
        print(plan.path, flush=True)


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


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def serve(context: typer.Context) -> None:
    """Serve live speech to many clients: Riva gRPC, OpenAI's HTTP and realtime WebSocket, a plain one, a web page.

    `nemostream serve --help` shows its options.
    """
    try:
        from nemostream.serving.server import main as run
    except ImportError as error:
        raise BackendError(f"serving needs more ({error}): pip install 'nemostream[serve]'") from error
    run(context.args)


_BENCHMARKS = (
    "quick", "latency", "capacity", "throughput", "accuracy", "baseline", "cost", "serve", "synthetic", "report",
)  # fmt: skip


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(_BENCHMARKS)}.")] = "",
) -> None:
    """Measure this machine.

    *quick* takes less than a minute. *latency*, *capacity*, *throughput*, *accuracy*, *baseline* (beside NeMo and
    others) and *cost* have options of their own: `nemostream bench NAME --help`. Results are written under
    `bench-results/` as JSON, tables and plots; *report* shows them again, beside earlier ones. *synthetic* makes the
    full-size model of random weights to measure with.
    """
    if name in ("", "-h", "--help"):
        print(context.get_help())
        return
    if name not in _BENCHMARKS:
        raise OptionError(f"there is no benchmark {name!r}; choose one of {', '.join(_BENCHMARKS)}.")
    import_module(f"nemostream.benchmarks.{name}").main(context.args)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    with suppress(AttributeError):  # names and words that the terminal's encoding lacks must not end in a traceback
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    command = typer.main.get_command(app)
    try:
        # Not `command()`: it has its own ways with Ctrl-C and broken pipes.
        try:
            with command.make_context("nemostream", list(arguments)) as context:
                command.invoke(context)
        finally:
            sys.stdout.flush()
    except typer.Exit as leave:
        return leave.exit_code
    except NemostreamError as error:
        _complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        _leave(141)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted.")
        _leave(130)
    except OSError as error:
        _complain(f"{error}.")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors of usage, whose class moved between its versions
            raise
        _complain(error.format_message())
        return OptionError.exit_code
    return 0


def _leave(code: int) -> NoReturn:
    """Exit without waiting for threads: one may sit in a read of standard input that nobody will end."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _complain(sentence: str) -> None:
    print(f"nemostream: {sentence}", file=sys.stderr, flush=True)


# -- transcribing ----------------------------------------------------------------------------------------------------


def _transcribe_files(model: Model, names: list[str], format: Format, realtime: bool) -> int:
    """Print every result in order as soon as it is its turn; return the exit code of the first failure, or 0."""
    code, pool = 0, ThreadPoolExecutor(min(len(names), _TOGETHER))
    with Captions(names) as captions:
        jobs = [
            pool.submit(_transcribe_one, model, name, realtime, captions, index) for index, name in enumerate(names)
        ]
        try:
            for index, (name, job) in enumerate(zip(names, jobs, strict=True)):
                try:
                    result = job.result()
                except NemostreamError as error:
                    with captions.aside():
                        _complain(str(error))
                    code = code or error.exit_code
                else:
                    with captions.aside():
                        _print(result, name, format, prefix=len(names) > 1)
                captions.over(index)
        finally:  # on Ctrl-C, or when nobody reads our output: do not decode the rest first
            pool.shutdown(wait=False, cancel_futures=True)
    return code


def _transcribe_one(model: Model, name: str, realtime: bool, captions: Captions, index: int) -> Result:
    from nemostream.runtime.audio import Recording, read_pcm16

    if name == STDIN:
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
        on_partial=lambda partial: captions.said(index, partial.text),
        on_progress=lambda seconds: captions.heard(index, seconds),
    )


def _follow(stream: LiveStream, blocks: Iterable[Any], captions: Captions, index: int) -> Result:
    for block in blocks:
        for partial in stream.push(block):
            captions.said(index, partial.text)
            captions.heard(index, partial.duration)
    return stream.finish()


def _paced(blocks: Iterable[Any], rate: int) -> Generator[Any]:
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
    except (ImportError, OSError) as error:  # the module, or the PortAudio library it wants
        raise BackendError(
            "the microphone needs sounddevice and PortAudio: pip install 'nemostream[mic]' (Debian: libportaudio2)"
        ) from error
    try:
        device = sounddevice.InputStream(samplerate=STDIN_RATE, channels=1, dtype="float32")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise AudioError(f"no microphone could be opened: {error}.") from error
    with device, model.stream(sample_rate=STDIN_RATE) as stream, Captions(["microphone"]) as captions:
        print("listening; Ctrl-C ends", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                block, _ = device.read(round(STDIN_RATE * _BLOCK_SECONDS))
                for partial in stream.push(block[:, 0].copy()):
                    captions.said(0, partial.text)
                    captions.heard(0, partial.duration)
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
    print(line, flush=True)


def _quiet_nemo() -> None:
    """NeMo logs pages about training data and optimizers that nobody who exports wants to read."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
