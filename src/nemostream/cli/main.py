"""The command line. Only results go to standard output; everything else goes to standard error.

Every expected failure prints one line and has its own exit code: those of `nemostream.errors`, 2 also for usage errors,
1 for errors of the operating system, 130 for Ctrl-C, 143 for SIGTERM, 141 if the reader of standard output closed it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from nemostream.cli import models
from nemostream.cli.interrupt import Interrupted, exit_on_signals, signals_exit, signals_raise
from nemostream.cli.options import OUTPUT, ApiKeyOption, JsonOption
from nemostream.cli.standard_streams import open_closed_streams, print_message
from nemostream.cli.transcribe import transcribe
from nemostream.errors import BackendError, NemostreamError, OptionError
from nemostream.extras import install_command
from nemostream.untrusted import describe_invalid

_COMPLETION = "_NEMOSTREAM_COMPLETE"  # environment variable set by the shell's completion script

# Help panels of the commands.
_SPEECH, _MODELS, _MACHINE = "Speech to text", "Models", "This machine"
_PLAN = "Memory of a GPU"  # panel of options

app = typer.Typer(
    name="nemostream",
    help="Streaming speech recognition with NVIDIA FastConformer-RNNT models, without NeMo or PyTorch.",
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


app.command(rich_help_panel=_SPEECH)(transcribe)

# `serve` and `bench` parse their own options.
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(rich_help_panel=_SPEECH, context_settings=_PASS_THROUGH)
def serve(context: typer.Context) -> None:
    """Serve live transcription over Riva gRPC, OpenAI-compatible HTTP and WebSocket, a plain WebSocket and a web page.

    `nemostream serve --help` lists the options.
    """
    try:
        from nemostream.serving.server import main as run
    except ImportError as error:
        if {"-h", "--help"} & set(context.args):
            from nemostream.cli.serve_help import serve_help

            return print(serve_help())
        raise BackendError(f"the serve extra cannot be imported ({error}): {install_command('serve')}") from error
    run(context.args)


@app.command(rich_help_panel=_SPEECH)
def top(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of the server.")] = "http://127.0.0.1:8000",
    once: Annotated[
        bool, typer.Option("--once", help="Show the state of one second, and exit.", rich_help_panel=OUTPUT)
    ] = False,
    api_key: ApiKeyOption = None,
) -> None:
    """Show the state of a running server, once per second, until Ctrl-C.

    Open streams, batches, percentiles of step times and latencies, seconds of audio per second, and errors, from the
    server's metrics. Figures are those of the last ten seconds, charts have a column for each second. If standard
    output is not a terminal, each second is one line of names and values. If the server does not respond, it is tried
    again. Needs the `serve` extra.
    """
    from nemostream.cli.top import show

    show(url, api_key, once)


app.command(rich_help_panel=_MODELS)(models.export)
app.command(rich_help_panel=_MODELS)(models.build)
app.command(rich_help_panel=_MODELS)(models.info)


@app.command(rich_help_panel=_MACHINE)
def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE", help="With --plan: the model bundle. Default: the sizes of the published 0.6B model."
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Compute how many streams fit in the memory of a GPU. Nothing is run on it.",
            rich_help_panel=_PLAN,
        ),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --plan: a GPU, such as h100-80gb. Default: the GPU of this machine.", rich_help_panel=_PLAN
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which backends work on this machine and how to install the others."""
    if plan:
        from nemostream.cli.gpu_memory import print_plan

        return print_plan(bundle, gpu, as_json)
    if bundle is not None or gpu is not None:
        raise OptionError("BUNDLE and --gpu need --plan.")
    from nemostream.cli.doctor import check_machine

    if not check_machine(as_json):
        raise typer.Exit(BackendError.exit_code)


_BENCHMARKS = (
    "quick",
    "latency",
    "capacity",
    "throughput",
    "accuracy",
    "finals",
    "baseline",
    "cost",
    "lanes",
    "serve",
    "load",
    "host",
    "survival",
    "transcripts",
    "synthetic",
    "report",
)


def _complete_benchmarks(prefix: str) -> list[str]:
    return [name for name in _BENCHMARKS if name.startswith(prefix)]


@app.command(rich_help_panel=_MACHINE, context_settings=_PASS_THROUGH)
def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help=f"Benchmark: {', '.join(_BENCHMARKS)}.", autocompletion=_complete_benchmarks
        ),
    ] = "",
) -> None:
    """Measure speed and accuracy on this machine.

    *quick* takes less than a minute. *latency* measures the time of a step, *cost* that by duration and batch size,
    *capacity* the number of live streams, *throughput* recordings, *accuracy* word error rates, *transcripts* word
    times and confidences, *finals* and *lanes* streams with two chunk sizes. *baseline* compares with NeMo and other
    systems; *serve* starts a server and measures it under load; *load* measures any running server through its own
    protocol; *survival* ends and freezes servers; *host* measures everything except the model; *synthetic* creates a
    full-size model with random weights to measure with; *report* shows earlier results side by side.
    `nemostream bench NAME --help` lists the options of a benchmark.

    Benchmarks need the extra `bench`, those of servers `serve` too. Results are written to `bench-results/` as JSON,
    tables and plots.
    """
    if name in ("", "-h", "--help"):
        print(context.get_help())
        return
    if name not in _BENCHMARKS:
        raise OptionError(f"unknown benchmark {name!r}; choose one of {', '.join(_BENCHMARKS)}.")
    from nemostream.benchmarks import module_name

    try:
        module = import_module(module_name(name))
    except ModuleNotFoundError as error:
        command = install_command("bench", "serve")
        raise BackendError(f"the benchmark needs the package {error.name}: {command}") from error
    module.main(context.args)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. `arguments` default to those of the process."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code."""
    open_closed_streams()
    with suppress(AttributeError):  # characters that the terminal's encoding lacks must not raise
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    command = typer.main.get_command(app)
    if _COMPLETION in os.environ:  # prints the completions and exits
        command.main(list(arguments), prog_name="nemostream", complete_var=_COMPLETION)
    try:
        # Not `command()`, which handles Ctrl-C and broken pipes itself.
        try:
            # Commands that write files clean up after a signal; the others have nothing to clean up while they start.
            writes_files = arguments[:1] in (["export"], ["build"], ["bench"])
            signals = signals_raise() if writes_files else signals_exit()
            with signals, command.make_context("nemostream", list(arguments)) as context:
                command.invoke(context)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except typer.Exit as error:
        return error.exit_code
    except NemostreamError as error:
        print_message(str(error))
        return error.exit_code
    except BrokenPipeError:
        _exit_now(141)
    except Interrupted as error:
        if not error.reported:
            print_message("interrupted.")
        _exit_now(128 + error.number)
    except (KeyboardInterrupt, typer.Abort):
        print_message("interrupted.")
        _exit_now(130)
    except OSError as error:
        print_message(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else f"{error}.")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error, whose class depends on the version of typer
            raise
        message = error.format_message()
        cause: Any = error.__cause__
        if hasattr(cause, "errors"):  # newer versions of typer validate with pydantic
            details = cause.errors()[0]
            message = message.replace(details["msg"], describe_invalid(details))
        print_message(message)
        return OptionError.exit_code
    return 0


def _exit_now(code: int) -> NoReturn:
    """Exit without waiting for threads, which may wait for input forever."""
    exit_on_signals()  # no traceback for a further signal
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    os._exit(code)
