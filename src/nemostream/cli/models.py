"""`nemostream export`, `build` and `info`: make and show bundles and engines."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemostream.cli.options import ENGINE, OUTPUT, EnginesOption, JsonOption
from nemostream.errors import BackendError, OptionError
from nemostream.extras import install_command

if TYPE_CHECKING:
    from logging import LogRecord

    from nemostream.plans import Plan


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Checkpoint: a .nemo file, a folder with one, or a model as owner/name or owner/name@revision.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the bundle.")],
    language: Annotated[
        str | None,
        typer.Option(
            metavar="CODE",
            help="Language of streams that set none, like hi or de-DE: the default of a model with several languages, "
            "or the language of a model that was fine-tuned for another one than English. Default: auto or en.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    triton: Annotated[
        bool,
        typer.Option(
            "--triton",
            help="Write a Triton model repository to OUT. CHECKPOINT can also be a bundle.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> None:
    """Export a checkpoint to a bundle, and compare the bundle's outputs with those of NeMo, transformers or NumPy."""
    if not triton:
        _export(checkpoint, out, language)
        return print(out)
    from nemostream.bundle import MANIFEST_NAME, Bundle
    from nemostream.serving.integrations.triton import bundle_in, write_repository

    if (Path(checkpoint) / MANIFEST_NAME).is_file():
        if language is not None:
            raise OptionError("--language applies to the export of a checkpoint, not to the copy of a bundle.")
        Bundle.open(checkpoint)
        shutil.copytree(checkpoint, bundle_in(out), dirs_exist_ok=True)
    else:
        _export(checkpoint, bundle_in(out), language)
    write_repository(out)
    print(out)


def _export(checkpoint: str, out: Path, language: str | None) -> None:
    missing = [name for name in ("onnx", "yaml") if find_spec(name) is None]
    if missing:
        raise BackendError(f"exporting needs {' and '.join(missing)}: {install_command('export')}")
    from rich.console import Console

    start, console = time.monotonic(), Console(stderr=True, highlight=False)
    # NeMo and its dependencies print to standard output, which is reserved for results.
    with redirect_stdout(sys.stderr), console.status("loading") as status:
        try:
            _silence_libraries()
            from nemostream.export import export_checkpoint
        except ImportError as error:
            raise BackendError(f"the export extra cannot be imported ({error}): {install_command('export')}") from error

        def progress(message: str) -> None:
            console.print(f"[dim]{time.monotonic() - start:6.1f} s[/dim]  ", end="")
            console.print(message, markup=False, soft_wrap=True)
            status.update("exporting")

        exported = export_checkpoint(checkpoint, out, progress, language=language)
    parity = exported.manifest.parity
    for name, figures in parity.items():
        if isinstance(figures, dict):
            steps, worst, reference = figures["steps"], figures["encoder"], parity["reference"]
            console.print(f"{name:>8}: {steps} steps, encoder within {worst:.1e} of {reference}")


def _silence_libraries() -> None:
    """Suppress what NeMo and huggingface_hub print besides errors: training data, optimizers, failed requests."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # the error that it raises is shown
    warnings.filterwarnings("ignore")
    # NeMo sets the level of its logger when it is imported, which takes seconds and is not needed for every checkpoint.
    logging.getLogger("nemo_logger").addFilter(_is_error)


def _is_error(record: LogRecord) -> bool:
    from logging import ERROR

    return record.levelno >= ERROR


def build(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE",
            help="Model bundle: a folder written by `nemostream export`. Default: the packaged demo.",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend: tensorrt or onnxruntime.", rich_help_panel=ENGINE)] = (
        "tensorrt"
    ),
    precision: Annotated[
        str, typer.Option(help="Precision: fp32, fp16, bf16, fp8 or int8.", rich_help_panel=ENGINE)
    ] = "fp16",
    target: Annotated[
        str | None,
        typer.Option(
            help="GPU architecture to build for, like sm89; with onnxruntime, cuda or cpu. Default: the GPU of this "
            "machine; with onnxruntime, cpu.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    chunk_ms: Annotated[
        list[int] | None,
        typer.Option(help="Chunk size in ms. Can be repeated. Default: all sizes.", rich_help_panel=ENGINE),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Maximum number of streams per step on a GPU.", rich_help_panel=ENGINE)
    ] = 64,
    engines: EnginesOption = None,
) -> None:
    """Build optimised encoder engines for one machine, one per chunk size.

    Every engine that can run on this machine is compared with fp32 on recorded speech, and rejected if its output
    differs. Existing engines are kept, so that an interrupted build continues where it stopped.

    Building for a GPU (the default) needs TensorRT; use `--target` for another GPU than the one in this machine. For a
    CPU, use `--backend onnxruntime --precision int8`.
    """
    from rich.console import Console

    import nemostream
    from nemostream.cli.doctor import has_gpu
    from nemostream.engines import build_engine, check_chunks
    from nemostream.plans import PlanStore

    opened, store = nemostream.Bundle.open(bundle or nemostream.demo_bundle()), PlanStore(engines)
    if backend == "tensorrt" and target is None and not has_gpu():
        command = shlex.join(["nemostream", "build", *([str(bundle)] if bundle else [])])
        command += " --backend onnxruntime --precision int8"
        raise BackendError(
            f"there is no NVIDIA GPU to build for: name one with --target (sm89), or build for this CPU: {command}"
        )
    start, console = time.monotonic(), Console(stderr=True, highlight=False)
    for chunk in check_chunks(opened, chunk_ms):
        name = f"{precision} for {chunk.ms} ms"
        with console.status(name) as status:

            def progress(stage: str, share: float, name: str = name, status: Any = status) -> None:
                status.update(f"{name}: {time.monotonic() - start:.0f} s, {100 * share:.0f} % of {stage}")

            plan, built = build_engine(
                opened, chunk, precision, store, backend=backend, target=target, max_batch=max_batch, progress=progress
            )
        console.print(f"{name}: {_describe_plan(plan, built)}", soft_wrap=True)
        print(plan.path, flush=True)


def _describe_plan(plan: Plan, built: bool) -> str:
    origin = f"built in {plan.seconds:.1f} s" if built else "already built"
    validation = "not validated yet: it will be compared with fp32 when it is loaded"
    if {"cosine", "tokens", "steps"} <= plan.validation.keys():
        cosine, tokens, steps = (plan.validation[key] for key in ("cosine", "tokens", "steps"))
        validation = f"cosine {cosine:.5f} and {tokens} equal tokens in {steps} steps"
    if {"rows", "batch_difference"} <= plan.validation.keys():
        rows, difference = plan.validation["rows"], plan.validation["batch_difference"]
        change = f"change a row by up to {100 * difference:.2g} %" if difference else "do not change a row"
        validation += f"; batches of up to {rows} rows {change}"
    return f"{plan.bytes / 1e6:.1f} MB, {origin}; {validation}"


def info(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle to show. Default: the packaged demo.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the contents of a bundle."""
    import nemostream
    from nemostream.cli.info import print_bundle, print_bundle_json

    (print_bundle_json if as_json else print_bundle)(nemostream.Bundle.open(bundle or nemostream.demo_bundle()))
