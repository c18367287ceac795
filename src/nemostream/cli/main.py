"""The command line. Standard output carries results and nothing else; the rest goes to standard error.

Every expected failure is one sentence and an exit code of its own: those of `errors`, 2 for usage too, 1 for what the
operating system refused, 130 for Ctrl-C, 143 for SIGTERM, 141 when nobody reads the output any more.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nemostream.cli.interrupt import Interrupted, exit_on_signals, exiting, finishing, raising
from nemostream.cli.output import MICROPHONE, STDIN, Output, check_writable
from nemostream.cli.standard_streams import open_closed_streams
from nemostream.cli.transcribe import TOGETHER, complain, listen, read_phrases, transcribe_files
from nemostream.errors import BackendError, NemostreamError, OptionError
from nemostream.extras import install_command
from nemostream.runtime.text.formats import Format

if TYPE_CHECKING:
    from nemostream.runtime.streaming.session import Options

_ENGINES = "Folder of engines. Default: ~/.cache/nemostream/engines."
_COMPLETION = "_NEMOSTREAM_COMPLETE"  # set by the shell's completion script

# Panels of `--help`.
_INPUT, _RECOGNITION, _OUTPUT, _ENGINE = "Input", "StreamSession", "Output", "Model and engine"
_SPEECH, _MODELS, _MACHINE = "Speech to text", "Models", "This machine"

app = typer.Typer(
    name="nemostream",
    help="Streaming speech recognition with NVIDIA's FastConformer-RNNT, without NeMo and PyTorch.",
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Decoder(StrEnum):
    """What the decoder does when an utterance ends."""

    keep = "keep"
    reset = "reset"


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


@app.command(rich_help_panel=_SPEECH)
def transcribe(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE", help="Audio files or pipes; - is standard input: a file, or raw 16 kHz mono 16-bit PCM."
        ),
    ] = None,
    mic: Annotated[
        bool, typer.Option("--mic", help="Transcribe the microphone until Ctrl-C.", rich_help_panel=_INPUT)
    ] = False,
    channel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Channel of each FILE to transcribe, from 1, as in two-party recordings. Default: a mix of all.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    realtime: Annotated[
        bool,
        typer.Option("--realtime", help="Feed files at the pace they were spoken.", rich_help_panel=_INPUT),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Save the state of a long FILE there as it goes; the same command continues from it if interrupted.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    chunk_ms: Annotated[
        int,
        typer.Option(
            help="Chunk size in ms. Smaller: lower latency, more compute; larger: more accurate.",
            rich_help_panel=_RECOGNITION,
        ),
    ] = 560,
    endpoint_ms: Annotated[
        int | None,
        typer.Option(
            min=80,
            help="Silence in ms that ends an utterance: each gets a line, or its times in JSON.",
            rich_help_panel=_RECOGNITION,
        ),
    ] = None,
    decoder: Annotated[
        Decoder,
        typer.Option(
            help="State of the decoder when an utterance ends (--endpoint-ms): reset recovers a decoder that is stuck "
            "in one output style.",
            rich_help_panel=_RECOGNITION,
        ),
    ] = Decoder.keep,
    phrases: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT[:WEIGHT]|FILE",
            help="Phrases to boost, as the model writes them, or a file with one on each line (and a tab and its "
            "weight). Weight: above 0 to 100, default 1. May be repeated.",
            rich_help_panel=_RECOGNITION,
        ),
    ] = None,
    vad: Annotated[
        bool,
        typer.Option("--vad", help="Skip chunks without speech (extra `vad`).", rich_help_panel=_RECOGNITION),
    ] = False,
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            help="Format of the output. json: one object per line. srt, vtt: subtitles. ctm, manifest: for NIST's and "
            "NeMo's tools.",
            rich_help_panel=_OUTPUT,
        ),
    ] = Format.text,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|FOLDER/",
            help="File for all transcripts, or folder with a file for each. - is standard output, the default.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Show captions in two lines; for --mic, --realtime and standard input.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    itn: Annotated[
        bool,
        typer.Option(
            "--itn", help="Write numbers, dates and amounts in digits (extra `itn`).", rich_help_panel=_OUTPUT
        ),
    ] = False,
    delay_ms: Annotated[
        int,
        typer.Option(help="Delay of the model's words in ms, subtracted from all times.", rich_help_panel=_OUTPUT),
    ] = 0,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Folder that `nemostream export` wrote. Default: the packaged demo.", rich_help_panel=_ENGINE
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: cpu, or cuda for a GPU.", rich_help_panel=_ENGINE)] = "cpu",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of the engines. Default: fp32 on a CPU, which needs none; fp16 on a GPU.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    engines: Annotated[Path | None, typer.Option(help=_ENGINES, rich_help_panel=_ENGINE)] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads of ONNX Runtime on a CPU. Default: the CPUs this process may use, by affinity and container "
            "quota.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
) -> None:
    """Transcribe audio files, a pipe or the microphone.

    One line per file, in the order given; with several files, text lines begin with the file's name. A file that cannot
    be used, or whose transcript cannot be written, is reported on standard error and the others go on; the exit code is
    that of the first failure. On a terminal the words appear as they are recognised.

    Ctrl-C or SIGTERM ends the input: the text so far is written, and the exit code is 130 or 143. A second one aborts.
    """
    import nemostream

    names = files or []
    if not names and not mic:
        raise OptionError("nothing to transcribe: give a FILE, - for standard input, or --mic.")
    if names.count(STDIN) > 1:
        raise OptionError("standard input (-) is given more than once; it can be read once only.")
    if STDIN in names and sys.stdin is None:
        raise OptionError("standard input is closed: feed raw 16 kHz mono 16-bit PCM into it.")
    if STDIN in names and sys.stdin.isatty():
        raise OptionError("standard input is not a pipe: feed raw 16 kHz mono 16-bit PCM into it.")
    sources = [*names, *[MICROPHONE] * mic]
    if live and (len(sources) > 1 or not (mic or realtime or names == [STDIN])):
        raise OptionError("--live shows one input as it is spoken: give --mic, - or one FILE with --realtime.")
    if resume and (len(sources) > 1 or mic or realtime or names == [STDIN] or endpoint_ms is not None):
        raise OptionError("--resume is for one FILE, without --realtime and --endpoint-ms.")
    if channel is not None and (mic or STDIN in names):
        raise OptionError("--channel is for files; standard input and the microphone have one channel.")
    if decoder is not Decoder.keep and endpoint_ms is None:
        raise OptionError(f"--decoder {decoder} needs --endpoint-ms, which ends utterances.")
    options = _options(endpoint_ms, decoder, phrases, vad)
    lanes = max(1, min(len(names), TOGETHER))
    # Twice: a failed file's slot may still be in the step under way when the next file wants one.
    capacity = 2 * lanes
    with ExitStack() as stack:
        output = stack.enter_context(Output(sources, format, out, apart=endpoint_ms is not None, channel=channel))
        if resume:
            _check_resume(resume, out, names[0])
        if itn:
            output.itn = nemostream.InverseNormalizer()  # takes seconds: after what fails at once
        model = stack.enter_context(
            nemostream.load(
                bundle,
                chunk_ms,
                capacity=capacity,
                threads=threads,
                device=device,
                precision=precision,
                engines=engines,
                delay_ms=delay_ms,
            )
        )
        model.stream(**options).close()  # what cannot be is refused once, and not for every file
        stop, code = stack.enter_context(finishing()), 0
        if names:
            code = transcribe_files(
                model, names, output, options, stop, realtime=realtime, live=live, resume=resume, channel=channel
            )
        stopped = stop.number
        if mic and not stopped:
            listen(model, output, options, stop, live=live)
            stopped = stop.number if stop.number == signal.SIGTERM else None  # Ctrl-C is how a recording ends
        if stopped:
            raise Interrupted(stopped, told=True)
    if code:
        raise typer.Exit(code)


def _options(endpoint_ms: int | None, decoder: Decoder, phrases: list[str] | None, vad: bool) -> Options:
    """How streams are recognised: what was asked for only."""
    options: Options = {}
    if endpoint_ms is not None:
        from nemostream.runtime.text.endpointing import Endpoint

        options["endpoint"] = Endpoint(silence_ms=endpoint_ms, decoder="reset" if decoder is Decoder.reset else "keep")
    if phrases:
        options["phrases"] = read_phrases(phrases)
    if vad:
        options["vad"] = True
    return options


def _check_resume(resume: Path, out: str | None, name: str) -> None:
    """Raise `OptionError` if no state can be saved there."""
    if not resume.absolute().parent.is_dir():
        raise OptionError(f"--resume: there is no folder {resume.parent} for {resume.name}.")
    for other, what in ((out, "--out"), (name, "the recording")):
        if other is not None and os.path.abspath(other) == os.path.abspath(resume):
            raise OptionError(f"--resume and {what} are the same file, {resume}; name another one for the state.")
    check_writable(resume, "--resume")


@app.command(rich_help_panel=_MODELS)
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint: a .nemo file, or the name of a model that NeMo can download.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the bundle.")],
    triton: Annotated[
        bool,
        typer.Option(
            "--triton",
            help="Make OUT a model repository of Triton; CHECKPOINT may be a bundle too.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
) -> None:
    """Export a NeMo checkpoint to a bundle, and measure that both compute the same."""
    if not triton:
        _export(checkpoint, out)
        return print(out)
    from nemostream.bundle import Bundle
    from nemostream.serving.integrations.triton import bundle_in, write_repository

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
        raise BackendError(f"exporting needs {' and '.join(missing)}: {install_command('export')}")
    from rich.console import Console

    started, console = time.monotonic(), Console(stderr=True, highlight=False)
    # NeMo and what it brings print things; standard output is ours.
    with redirect_stdout(sys.stderr), console.status("loading NeMo") as status:
        try:
            _quiet_nemo()
            from nemostream.export import export_checkpoint
        except ImportError as error:
            raise BackendError(f"the export extra does not load ({error}): {install_command('export')}") from error

        def progress(message: str) -> None:
            console.print(f"[dim]{time.monotonic() - started:6.1f} s[/dim]  ", end="")
            console.print(message, markup=False)
            status.update("working")

        exported = export_checkpoint(checkpoint, out, progress)
    for name, figures in exported.manifest.parity.items():
        if isinstance(figures, dict):
            console.print(f"{name:>8}: {figures['steps']} steps, encoder within {figures['encoder']:.1e} of NeMo")


@app.command(rich_help_panel=_MODELS)
def build(
    bundle: Annotated[Path, typer.Argument(help="Folder that `nemostream export` wrote.")],
    backend: Annotated[
        str, typer.Option(help="Backend: tensorrt, or onnxruntime.", rich_help_panel=_ENGINE)
    ] = "tensorrt",
    precision: Annotated[
        str, typer.Option(help="Precision: fp32, fp16, bf16, fp8 or int8.", rich_help_panel=_ENGINE)
    ] = "fp16",
    target: Annotated[
        str | None,
        typer.Option(
            help="GPU to build for if it is not the one here (sm89); with onnxruntime, cuda instead of cpu.",
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    chunk_ms: Annotated[
        list[int] | None,
        typer.Option(help="Chunk size in ms; may be repeated. Default: all.", rich_help_panel=_ENGINE),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Maximum number of streams in one step of a GPU.", rich_help_panel=_ENGINE)
    ] = 64,
    engines: Annotated[Path | None, typer.Option(help=_ENGINES, rich_help_panel=_OUTPUT)] = None,
) -> None:
    """Build engines that make the encoder fast on one machine, one for each chunk size.

    Every engine that can run here is compared with fp32 on real speech before it is kept, and rejected if its output
    differs. Engines that exist are kept, so a build that was interrupted continues where it stopped.

    A CPU: `--backend onnxruntime --precision int8`. A GPU, the default, needs TensorRT; another GPU than the one here,
    `--target`.
    """
    from rich.console import Console

    import nemostream
    from nemostream.cli.doctor import has_gpu
    from nemostream.engines import build_engine, check_chunks
    from nemostream.plans import PlanStore

    opened, store = nemostream.Bundle.open(bundle), PlanStore(engines)
    if backend == "tensorrt" and target is None and not has_gpu():
        command = f"nemostream build {shlex.quote(str(bundle))} --backend onnxruntime --precision int8"
        raise BackendError(
            f"there is no NVIDIA GPU to build for: name one with --target (sm89), or build for this CPU: {command}"
        )
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
        validation = "not yet run: it will be compared with fp32 where it is loaded"
        if {"cosine", "tokens", "steps"} <= plan.validation.keys():
            figures = plan.validation
            validation = (
                f"cosine {figures['cosine']:.5f} and {figures['tokens']} equal tokens in {figures['steps']} steps"
            )
        console.print(f"{name}: {plan.bytes / 1e6:.1f} MB, {how}; {validation}", soft_wrap=True)
        print(plan.path, flush=True)


@app.command(rich_help_panel=_MODELS)
def info(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle to show. Default: the packaged demo.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Show the contents of a bundle."""
    import nemostream
    from nemostream.cli.doctor import describe, describe_json

    (describe_json if as_json else describe)(nemostream.Bundle.open(bundle or nemostream.demo_bundle()))


@app.command(rich_help_panel=_MACHINE)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Show which backends work here, and how to install the others."""
    from nemostream.cli.doctor import examine

    if not examine(as_json):
        raise typer.Exit(BackendError.exit_code)


_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(rich_help_panel=_SPEECH, context_settings=_PASSED_ON)
def serve(context: typer.Context) -> None:
    """Serve live speech to many clients: Riva gRPC, OpenAI's HTTP and realtime WebSocket, a plain one, a web page.

    `nemostream serve --help` shows its options.
    """
    try:
        from nemostream.serving.server import main as run
    except ImportError as error:
        if {"-h", "--help"} & set(context.args):
            from nemostream.cli.serve_help import serve_help

            return print(serve_help())
        raise BackendError(f"serving needs more ({error}): {install_command('serve')}") from error
    run(context.args)


_BENCHMARKS = (
    "quick",
    "latency",
    "capacity",
    "throughput",
    "accuracy",
    "baseline",
    "cost",
    "serve",
    "transcripts",
    "synthetic",
    "report",
)


def _complete_benchmarks(begun: str) -> list[str]:
    return [name for name in _BENCHMARKS if name.startswith(begun)]


@app.command(rich_help_panel=_MACHINE, context_settings=_PASSED_ON)
def bench(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help=f"Benchmark: {', '.join(_BENCHMARKS)}.", autocompletion=_complete_benchmarks)
    ] = "",
) -> None:
    """Measure this machine.

    *quick* takes less than a minute. *latency*, *capacity*, *throughput*, *accuracy*, *baseline* (beside NeMo and
    others), *cost* and *serve* (a server and its callers) have options of their own: `nemostream bench NAME --help`.
    Results are written under `bench-results/` as JSON, tables and plots; *report* shows them again, beside earlier
    ones. *synthetic* makes the full-size model of random weights to measure with.
    """
    if name in ("", "-h", "--help"):
        print(context.get_help())
        return
    if name not in _BENCHMARKS:
        raise OptionError(f"there is no benchmark {name!r}; choose one of {', '.join(_BENCHMARKS)}.")
    from nemostream.benchmarks import module_name

    import_module(module_name(name)).main(context.args)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    open_closed_streams()
    with suppress(AttributeError):  # names and words that the terminal's encoding lacks must not end in a traceback
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    command = typer.main.get_command(app)
    if _COMPLETION in os.environ:  # set by the shell's script: it prints proposals and exits
        command.main(list(arguments), prog_name="nemostream", complete_var=_COMPLETION)
    try:
        # Not `command()`: it has its own ways with Ctrl-C and broken pipes.
        try:
            # Commands that make files clean up after themselves; the others have nothing to lose while they start.
            signals = raising() if arguments[:1] in (["export"], ["build"], ["bench"]) else exiting()
            with signals, command.make_context("nemostream", list(arguments)) as context:
                command.invoke(context)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except typer.Exit as leave:
        return leave.exit_code
    except NemostreamError as error:
        complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        _leave(141)
    except Interrupted as interrupted:
        if not interrupted.told:
            complain("interrupted.")
        _leave(128 + interrupted.number)
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted.")
        _leave(130)
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else f"{error}.")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors of usage, whose class moved between its versions
            raise
        complain(error.format_message())
        return OptionError.exit_code
    return 0


def _leave(code: int) -> NoReturn:
    """Exit without waiting for threads: one may wait for an input that never comes."""
    exit_on_signals()  # no traceback for one that comes now
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os._exit(code)


def _quiet_nemo() -> None:
    """NeMo logs pages about training data and optimizers that nobody who exports wants to read."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
