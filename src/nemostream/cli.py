"""The command line. Standard output carries results and nothing else; the rest goes to standard error.

Every expected failure is one sentence and an exit code of its own: those of `errors`, 2 for usage too, 1 for what the
operating system refused, 130 for Ctrl-C, 141 when nobody reads the output any more.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nemostream.errors import BackendError, NemostreamError, OptionError
from nemostream.formats import Format
from nemostream.output import MICROPHONE, STDIN, Output
from nemostream.transcribe import TOGETHER, complain, listen, read_phrases, transcribe_files

if TYPE_CHECKING:
    from nemostream.runtime.recognition import Options

_ENGINES = "Folder of engines. Default: ~/.cache/nemostream/engines."

app = typer.Typer(
    name="nemostream",
    help="NVIDIA's streaming speech recogniser, without NeMo and PyTorch.",
    add_completion=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    format: Annotated[
        Format,
        typer.Option(
            help="json: one object per line. srt, vtt: subtitles. ctm, manifest: for NIST's and NeMo's tools."
        ),
    ] = Format.text,
    out: Annotated[
        str | None, typer.Option(metavar="FILE|FOLDER/", help="Write there; in a folder, a file for each recording.")
    ] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="Feed files at the pace they were spoken.")] = False,
    mic: Annotated[bool, typer.Option("--mic", help="Listen to the microphone until Ctrl-C.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Captions in two lines; for --mic, --realtime and standard input.")
    ] = False,
    endpoint_ms: Annotated[
        int | None,
        typer.Option(min=80, help="Silence that ends an utterance: each gets a line, or its times in JSON."),
    ] = None,
    phrases: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT|FILE", help="To be more ready to hear, as the model writes; may be repeated."),
    ] = None,
    vad: Annotated[bool, typer.Option("--vad", help="Spend no steps on silence.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Keep the state of a long FILE there as it goes, and go on from it if killed.")
    ] = None,
    itn: Annotated[bool, typer.Option("--itn", help="Write numbers, dates and amounts as people write them.")] = False,
    delay_ms: Annotated[int, typer.Option(help="How late this model says words: taken off all times.")] = 0,
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
    sources = [*names, *[MICROPHONE] * mic]
    if live and (len(sources) > 1 or not (mic or realtime or names == [STDIN])):
        raise OptionError("--live shows one voice as it speaks: give it --mic, - or one FILE with --realtime.")
    if resume and (len(sources) > 1 or mic or realtime or names == [STDIN] or endpoint_ms is not None):
        raise OptionError("--resume is for one FILE, without --realtime and --endpoint-ms.")
    options = _options(endpoint_ms, phrases, vad)
    normalizer = nemostream.InverseNormalizer() if itn else None
    lanes = max(1, min(len(names), TOGETHER))
    # Twice: a failed file's slot may still be in the step under way when the next file wants one.
    capacity = 2 * lanes
    with (
        Output(sources, format, out, apart=endpoint_ms is not None, itn=normalizer) as output,
        nemostream.load(
            bundle, chunk_ms, capacity=capacity, device=device, precision=precision, engines=engines, delay_ms=delay_ms
        ) as model,
    ):
        model.stream(**options).close()  # what cannot be is refused once, and not for every file
        code = (
            transcribe_files(model, names, output, options, realtime=realtime, live=live, resume=resume) if names else 0
        )
        if mic:
            listen(model, output, options, live=live)
    if code:
        raise typer.Exit(code)


def _options(endpoint_ms: int | None, phrases: list[str] | None, vad: bool) -> Options:
    """How streams are recognised: what was asked for only."""
    options: Options = {}
    if endpoint_ms is not None:
        from nemostream.runtime.endpoint import Endpoint

        options["endpoint"] = Endpoint(silence_ms=endpoint_ms)
    if phrases:
        options["phrases"] = read_phrases(phrases)
    if vad:
        options["vad"] = True
    return options


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
        if {"cosine", "tokens", "steps"} <= plan.gate.keys():
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
    "quick", "latency", "capacity", "throughput", "accuracy", "baseline", "cost", "serve", "transcripts", "synthetic",
    "report",
)  # fmt: skip


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(_BENCHMARKS)}.")] = "",
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
        complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        _leave(141)
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted.")
        _leave(130)
    except OSError as error:
        complain(f"{error}.")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's errors of usage, whose class moved between its versions
            raise
        complain(error.format_message())
        return OptionError.exit_code
    return 0


def _leave(code: int) -> NoReturn:
    """Exit without waiting for threads: one may sit in a read of standard input that nobody will end."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)


def _quiet_nemo() -> None:
    """NeMo logs pages about training data and optimizers that nobody who exports wants to read."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
