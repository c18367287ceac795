"""How long does one streaming step take, ours against NeMo's PyTorch step, on the same weights and the same audio?

    python -m nemostream.benchmarks.step --batch 1 4 --repeats 15 --json step.json

Without `--checkpoint` the model is the full-size one with random weights (`synthetic`); without `--bundle` it is
exported first. Method, for each batch size and chunk size:

* Both sides hear the same speech from the start until the attention caches are full (with the longest chunk size of the
  same left context), then go on with the chunk size in question: what is timed is the steady state.
* Before anything is timed, warm-up steps must agree: encoder outputs, as the joint projects them, to 1e-4. So must
  every timed step, and in the end all tokens. Otherwise the run ends with an error: the figures would mean nothing.
* One pair after another, in turns ours first and NeMo first, a pause before each so that no thread pool still spins.
  Both have the same number of threads. Encoder alone first, then whole steps. Shown are median and, in brackets, the
  least and the most of all samples; the ratio is taken pair by pair.
* Cores that other work (or another guest of the host) kept busy are counted and reported row by row. With more than a
  tenth of one the figures are worthless: the threads of a step wait for the slowest, NeMo's more often than ours.
* What is not equal is to our cost: our step begins with PCM and makes the mel features, and our encoder includes the
  joint's projection; NeMo's begins with mel frames computed before.
* The floor of an encoder step is the one of `floor`, measured just before; "x floor" is our median over it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from nemostream.benchmarks.floor import Machine, OtherWork, available_memory, encoder_work, hardware, measure_machine
from nemostream.benchmarks.sides import Feed, Floats, Nemo, Ours, load_nemo
from nemostream.benchmarks.synthetic import speech, synthetic_model
from nemostream.errors import NemostreamError, OptionError, ParityError
from nemostream.spec import Bundle, Chunk, Manifest

TOLERANCE = 1e-4
_WARM_UP = 3
_PAUSE = 0.02  # seconds
_LIBRARIES = ("nemostream", "onnxruntime", "torch", "nemo_toolkit", "numpy")

Say = Callable[[str], None]


def compare_steps(
    bundle: Bundle,
    model: Any,
    batches: Sequence[int] = (1, 4),
    chunk_ms: Sequence[int] | None = None,
    repeats: int = 15,
    threads: int | None = None,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """The report, as JSON has it. `model` is NeMo's, of the weights the bundle was made of.

    Raises `ParityError` if the two sides do not compute the same, `OptionError` for an unknown chunk size.
    """
    import torch

    if repeats < 1 or min(batches, default=0) < 1:
        raise OptionError("repeats and batch sizes must be at least 1.")
    threads = threads or hardware()["cores"]
    manifest, before = bundle.manifest, torch.get_num_threads()
    chunks = [manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(manifest.chunks)
    torch.set_num_threads(threads)
    try:
        say("measuring memory bandwidth and matrix products")
        machine, rows = measure_machine(), []
        for chunk in chunks:
            for batch in batches:
                say(f"{chunk.ms} ms, batch {batch}")
                rows += _compare(bundle, model, chunk, batch, repeats, threads, machine)
                gc.collect()
    finally:
        torch.set_num_threads(before)
    return {
        "benchmark": "step",
        "command": shlex.join(sys.orig_argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "hardware": hardware() | {"threads": threads},
        "machine": {"bandwidth_gb_s": machine.bandwidth / 1e9, "gflop_s": machine.flops / 1e9, "rates": machine.rates},
        "versions": {name: _version(name) for name in _LIBRARIES},
        "model": {"name": manifest.name, "precision": "fp32", "layers": manifest.encoder.layers}
        | {"d_model": manifest.encoder.d_model, "checkpoint": dict(manifest.checkpoint)},
        "method": {"repeats": repeats, "warm_up": _WARM_UP, "tolerance": TOLERANCE, "order": "interleaved in pairs"},
        "rows": rows,
    }


def _compare(
    bundle: Bundle, model: Any, chunk: Chunk, batch: int, repeats: int, threads: int, machine: Machine
) -> list[dict[str, Any]]:
    """Two rows: the encoder alone, the whole step."""
    filler, position, others = _filler(bundle.manifest, chunk), 0, OtherWork()
    steps = 2 * (_WARM_UP + repeats)
    fill = -(-chunk.left // filler.frames)
    feed = Feed(bundle.manifest, speech(), batch, fill * filler.frames + steps * chunk.frames)
    ours, nemo = Ours(bundle, feed, threads), Nemo(model, feed)
    try:
        for side in (ours, nemo):
            side.switch(filler)
        for _ in range(fill):
            _agree(ours.frames(ours.encode(position)), nemo.frames(nemo.encode(position)), position)
            position += filler.frames
        for side in (ours, nemo):
            side.switch(chunk)
        if nemo.cached != chunk.left or position < chunk.left:
            raise ParityError(f"not in the steady state: NeMo holds {nemo.cached} frames, of {chunk.left}.")
        worst, encoder = 0.0, []
        for repeat in range(-_WARM_UP, repeats):
            mine, theirs, seconds = _pair(repeat, position, ours.encode, nemo.encode)
            worst = max(worst, _agree(ours.frames(mine), nemo.frames(theirs), position))
            encoder.append(seconds)
            position += chunk.frames
        whole, said = [], []
        for repeat in range(-_WARM_UP, repeats):
            mine, theirs, seconds = _pair(repeat, position, ours.step, nemo.step)
            said = ours.tokens(mine)
            if said != (wanted := nemo.tokens(theirs)):
                raise ParityError(f"at frame {position} we have said {said}, NeMo {wanted}: no point in comparing.")
            whole.append(seconds)
            position += chunk.frames
    finally:
        ours.close()
        nemo.close()
    audio = batch * (_WARM_UP + repeats) * chunk.ms / 1000
    floor = encoder_work(bundle, chunk).floor_ms(machine, batch)
    key = {"chunk_ms": chunk.ms, "batch": batch, "other_work_cores": others.cores()}
    return [
        key | {"what": "encoder", "max_abs_difference": worst} | _figures(encoder[_WARM_UP:], floor),
        key | {"what": "step", "tokens_per_second": sum(map(len, said)) / audio} | _figures(whole[_WARM_UP:], floor),
    ]


def _filler(manifest: Manifest, chunk: Chunk) -> Chunk:
    """The longest chunk size with the same left context: it fills the caches in the fewest steps."""
    return max((other for other in manifest.chunks if other.left == chunk.left), key=lambda other: other.frames)


def _pair(
    repeat: int, position: int, ours: Callable[[int], Any], nemo: Callable[[int], Any]
) -> tuple[Any, Any, list[float]]:
    """One step of each side: both results, and both times in seconds, ours first."""
    results: list[Any] = [None, None]
    seconds = [0.0, 0.0]
    for side in (0, 1) if repeat % 2 else (1, 0):
        time.sleep(_PAUSE)
        start = time.perf_counter()
        results[side] = (ours, nemo)[side](position)
        seconds[side] = time.perf_counter() - start
    return results[0], results[1], seconds


def _agree(ours: Floats, nemo: Floats, position: int) -> float:
    if ours.shape != nemo.shape:
        raise ParityError(f"at frame {position} our encoder gives {ours.shape} numbers, NeMo's {nemo.shape}.")
    worst = float(np.abs(ours - nemo).max())
    if not worst <= TOLERANCE:
        raise ParityError(
            f"at frame {position} the encoders are {worst:.2g} apart (allowed: {TOLERANCE}), so their times are not "
            "comparable; was the bundle made of this checkpoint?"
        )
    return worst


def _figures(pairs: Sequence[Sequence[float]], floor: dict[str, Any]) -> dict[str, Any]:
    ours, nemo = ([1000 * pair[side] for pair in pairs] for side in (0, 1))
    return {
        "ours_ms": _summary(ours),
        "nemo_ms": _summary(nemo),
        "ratio": _summary([theirs / mine for mine, theirs in zip(ours, nemo, strict=True)]),
        "floor_ms": floor,  # the encoder's
        "over_floor": statistics.median(ours) / floor["floor"],
        "raw_ms": {"ours": ours, "nemo": nemo},
    }


def _summary(samples: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}


def show(report: dict[str, Any]) -> None:
    """The report as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    def cell(figure: dict[str, float], digits: int) -> str:
        median, least, most = (f"{figure[name]:.{digits}f}" for name in ("median", "min", "max"))
        return f"{median} \\[{least}–{most}]"

    machine, hard, busy = report["machine"], report["hardware"], max(row["other_work_cores"] for row in report["rows"])
    table = Table(
        title=f"One streaming step of {report['model']['name']}, fp32, {hard['threads']} threads, ms",
        caption=f"{hard['cpu']}, {hard['cores']} cores, {hard['memory_gib']} GiB, up to {busy:.1f} busy otherwise; "
        f"{machine['bandwidth_gb_s']:.1f} GB/s, {machine['gflop_s']:.0f} GFLOP/s; "
        f"{report['method']['repeats']} pairs, median [least–most]",
    )
    for name in ("chunk", "batch", "what", "ours", "NeMo", "NeMo ÷ ours", "floor: memory", "compute", "x floor"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in report["rows"]:
        floor = row["floor_ms"]
        bounds = [f"{'*' if floor['binding'] == kind else ''}{floor[kind]:.1f}" for kind in ("memory", "compute")]
        times = [cell(row["ours_ms"], 1), cell(row["nemo_ms"], 1), cell(row["ratio"], 2)]
        table.add_row(
            str(row["chunk_ms"]), str(row["batch"]), row["what"], *times, *bounds, f"{row['over_floor']:.2f}",
            end_section=row["what"] == "step",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@contextlib.contextmanager
def _prepared(checkpoint: Path | None, bundle: Path | None, say: Say) -> Iterator[tuple[Path, Bundle]]:
    """Checkpoint and bundle, made in a temporary folder as far as they are not given."""
    from nemostream.export import export_checkpoint

    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        if checkpoint is None:
            say("making a full-size model of random weights")
            checkpoint = synthetic_model(Path(folder) / "synthetic.nemo")
            gc.collect()
        made = Bundle.open(bundle) if bundle else export_checkpoint(checkpoint, Path(folder) / "bundle", progress=say)
        gc.collect()
        # NeMo's model, two sessions with their own copies of the weights, and the arrays of the bandwidth measurement.
        needed, there = int(3.5 * checkpoint.stat().st_size) + (2 << 30), available_memory()
        if 0 < there < needed:
            raise OptionError(
                f"this needs about {needed >> 30} GiB of free memory and {there >> 30} GiB are; free some."
            )
        yield checkpoint, made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nemostream.benchmarks.step", description=__doc__.split("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, help="a .nemo file")
    source.add_argument("--synthetic", action="store_true", help="the full-size model with random weights (default)")
    parser.add_argument("--bundle", type=Path, help="bundle made of that checkpoint (default: export it now)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--chunk-ms", type=int, nargs="+", help="default: all that the model has")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of both sides (default: every core)")
    parser.add_argument("--json", type=Path, help="write the report with every sample here")
    options = parser.parse_args(arguments)

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    if options.bundle and not options.checkpoint:
        parser.error("--bundle needs --checkpoint, the file it was made of.")
    try:
        with _prepared(options.checkpoint, options.bundle, say) as (checkpoint, bundle):
            report = compare_steps(
                bundle, load_nemo(checkpoint), options.batch, options.chunk_ms, options.repeats, options.threads, say
            )
    except NemostreamError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"


def _commit() -> str | None:
    """Of the working tree this file is in, if it is in one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    main()
