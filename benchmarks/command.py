"""Command line of the benchmarks: common options, and running a measurement."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nemostream
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.report import write_report
from nemostream.bundle import Bundle
from nemostream.errors import BackendError, NemostreamError
from nemostream.extras import install_command

DEVICES = "cpu, cuda (TensorRT engines) or cuda:onnxruntime"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of options that have one, unless the help states it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        known = action.default in (None, []) or "(default: " in (action.help or "")
        return action.help if known else super()._get_help_string(action)


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have; `description` is the docstring of the module."""
    parser = argparse.ArgumentParser(
        prog=f"nemostream bench {name}",
        description=(description or "").split("\n")[0],
        formatter_class=_Formatter,
    )
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder for the result, its tables and plots")
    parser.add_argument("--name", default=name, help="name of the output files, without suffix")
    return parser


def add_engine_options(
    parser: argparse.ArgumentParser, several_devices: bool = False, engines: str = "a temporary one"
) -> None:
    """Add the options that select a bundle and a backend; `engines` describes the default folder of engines."""
    parser.add_argument("--bundle", type=Path, help="bundle to run (default: the packaged model)")
    if several_devices:
        parser.add_argument("--device", dest="devices", nargs="+", default=["cpu"], help=f"one or more of {DEVICES}")
    else:
        parser.add_argument("--device", default="cpu", help=DEVICES)
    parser.add_argument("--engines", type=Path, help=f"folder of engines (default: {engines})")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def add_chunk_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of several chunk sizes; None if it is not given."""
    parser.add_argument("--chunk-ms", type=int, nargs="+", help="chunk sizes in ms (default: all of the model)")


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a measurement from the options of `add_engine_options`, and its `progress`."""
    names = ("device", "devices", "engines", "threads")
    found = {name: value for name, value in vars(options).items() if name in names}
    return found | {"progress": records.report_progress}


def open_bundle(path: Path | None) -> Bundle:
    """Open the bundle that an option names, or the packaged model."""
    return Bundle.open(path or nemostream.demo_bundle())


def write_study(result: records.Record, table: str, options: argparse.Namespace) -> None:
    """Write the result of a study and its table, and print the table."""
    records.write(result, options.out / f"{options.name}.json")
    (options.out / f"{options.name}.md").write_text(table, encoding="utf-8")
    print(table, end="")


def run(
    measure: Callable[[], records.Record],
    options: argparse.Namespace,
    display: Callable[[records.Record], None] | None = None,
) -> records.Record:
    """Run `measure`, write the result with its tables and plots, print the tables, and return the result.

    `display` prints the result instead of the Markdown text. Exits with the exit code of the error if a
    `NemostreamError` is raised.
    """
    try:
        if missing := [name for name in ("matplotlib", "onnx") if find_spec(name) is None]:
            raise BackendError(f"benchmarks need {' and '.join(missing)}: {install_command('bench')}")
        result = measure()
        path = options.out / f"{options.name}.json"
        records.write(result, path)
        text, files = write_report([result], path.with_suffix(".md"))
        if display:
            display(result)
        else:
            print(text, end="")
    except NemostreamError as error:
        records.report_progress(f"nemostream: {error}")
        sys.exit(error.exit_code)
    records.report_progress("\nwritten: " + ", ".join([str(path), *(file.name for file in files)]))
    return result
