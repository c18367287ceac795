"""Time of one streaming step compared with other implementations: same weights, same audio, same batch, one run.

    nemostream bench baseline --checkpoint model.nemo --batch 1 8 --chunk-ms 80

Without `--checkpoint`, a full-size model with random weights is created (`harness.synthetic`). The competitors use
their fastest configuration (`harness.runners`, `harness.nemo`): NeMo in fp32, in bf16, with torch.compile, and on a GPU
with its encoder step in a CUDA graph, captured by this benchmark ("nemo graph") and by NeMo itself ("nemo built-in
graph", for versions newer than 3.0.0); the encoder of Hugging Face transformers; ONNX Runtime on NeMo's export; on a
CPU sherpa-onnx and, for one stream, transcribe.cpp (`pip install transcribe-cpp gguf`; `harness.transcribe_cpp`). All
run on `--device`. Method, for each chunk size and batch:

* Every runner processes the same audio from the start until its attention caches are full; the following steps are
  timed. After warm-up rounds come the timed rounds. In each round every runner takes two steps, in random order, after
  a pause in which the thread pools stop spinning. The second is timed, as in continuous operation: during the first,
  the processor's caches have the weights and streams of the other runners. All runners use the same number of threads.
* Ratios to each nemostream runner are computed per round; median, minimum and maximum are shown.
* Runners that compute the same function as NeMo (`exact`: fp32 on a CPU) must emit the same tokens, otherwise the run
  fails, because the times would be meaningless. For the others, the share of NeMo's tokens that they emit is shown.
* All differences are to the disadvantage of nemostream: its step starts with PCM, those of the others (except
  sherpa-onnx and transcribe.cpp) with precomputed features; the step of transformers does not decode.
* The load by other processes and other guests of the host is measured during the timed rounds. Above 0.1 cores the
  report marks the figures as unreliable, because the threads of a step wait for the slowest one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemostream.benchmarks import command
from nemostream.benchmarks.gpu.roofline import measure_gpu
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.competitors import NEMOSTREAM, RUNNER_NAMES, RUNNERS, TRANSCRIBE_CPP, RunnerFactory
from nemostream.benchmarks.harness.plots import Bar, BarChart, BarPanel, Chart
from nemostream.benchmarks.harness.records import (
    OtherWork,
    Progress,
    Record,
    Row,
    Tokens,
    agreement,
    no_progress,
    quartiles,
)
from nemostream.benchmarks.harness.roofline import Machine, encoder_work, measure_machine
from nemostream.benchmarks.harness.runners import Runner
from nemostream.benchmarks.harness.synthetic import speech, synthetic_model
from nemostream.benchmarks.harness.timed import AudioFeed, longest
from nemostream.bundle import Bundle, ChunkConfig, sha256
from nemostream.errors import NemostreamError, OptionError, ParityError
from nemostream.extras import install_command

_WARM_UP = 3  # rounds
_PAUSE = 0.02  # seconds before the steps of a runner
_ROUND_STEPS = 2  # of each runner, of which the last is timed


def compare_steps(
    bundle: Bundle,
    checkpoint: Path,
    runners: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    chunk_ms: Sequence[int] | None = None,
    repeats: int = 15,
    threads: int | None = None,
    device: str = "cpu",
    engines: Path | None = None,
    machine: Machine | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Time the step of all runners and return the result.

    `bundle` must be an export of `checkpoint`. On a GPU, `device` is "cuda" or "cuda:onnxruntime", the backend of the
    nemostream runners. Raises `ParityError` if runners that must agree emit different tokens, and `OptionError` for
    invalid options.
    """
    import torch

    device_type = device.partition(":")[0]
    if device_type not in RUNNERS:
        raise OptionError(f"device is {device!r}; choose cpu or cuda.")
    names = RUNNERS[device_type] if runners is None else runners
    if repeats < 1 or min(batches, default=0) < 1:
        raise OptionError("repeats and batch sizes must be at least 1.")
    if unknown := [name for name in names if name not in RUNNER_NAMES]:
        raise OptionError(f"unknown runner {unknown[0]!r}; choose from {', '.join(RUNNER_NAMES)}.")
    source = bundle.manifest.checkpoint.get("sha256")
    if source and source != sha256(checkpoint):
        raise ParityError(f"{bundle.path} is an export of another checkpoint than {checkpoint}; export it again.")
    threads, threads_before = threads or records.cores(), torch.get_num_threads()
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    torch.set_num_threads(threads)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    try:
        if machine is None:
            machine = measure_machine(threads) if device == "cpu" else measure_gpu()
        with RunnerFactory(bundle, checkpoint, device, threads, engines, progress) as factory:
            for chunk in chunks:
                for batch in batches:
                    progress(f"{chunk.ms} ms, batch {batch}")
                    available = [name for name in names if name not in skipped and _supports(name, batch)]
                    more, unavailable = _compare(factory, available, chunk, batch, repeats, machine)
                    rows += more
                    skipped |= unavailable
                    gc.collect()
                factory.discard_exports()
    finally:
        torch.set_num_threads(threads_before)
    several = [batch for batch in batches if batch > 1]
    if several:
        for name in names:
            if not _supports(name, several[0]):
                skipped.setdefault(name, f"not at batch {', '.join(map(str, several))}: one stream per model")
    manifest = bundle.manifest
    return records.record(
        "baseline",
        rows,
        model=records.model_of(manifest) | {"checkpoint": dict(manifest.checkpoint)},
        method={
            "repeats": repeats,
            "warm_up": _WARM_UP,
            "round_steps": _ROUND_STEPS,
            "threads": threads,
            "device": device,
            "order": "random in each round",
            "machine": dict(machine.rates),
            "skipped": skipped,
        },
    )


def _supports(runner: str, batch: int) -> bool:
    return batch == 1 or not runner.startswith(TRANSCRIBE_CPP)


def _compare(
    factory: RunnerFactory, names: Sequence[str], chunk: ChunkConfig, batch: int, repeats: int, machine: Machine
) -> tuple[list[Row], dict[str, str]]:
    """Return a row for each runner, and the reasons why runners are skipped."""
    manifest = factory.bundle.manifest
    filler = longest(manifest, chunk)
    filled = -(-chunk.left // filler.frames) * filler.frames  # encoder frames until the caches are full
    feed = AudioFeed(manifest, speech(), batch, filled + (_WARM_UP + repeats) * _ROUND_STEPS * chunk.frames)
    if any(name.startswith(("onnx", "sherpa")) for name in names):
        factory.export(chunk)  # before the runners are loaded: an export needs three times the memory of the model
    with contextlib.ExitStack() as stack:
        runners, skipped = _create_runners(factory, names, feed, chunk, filled, stack)
        # Tokens emitted while the caches are filled are excluded: the runners fill them with different chunk sizes.
        initial = {runner.name: runner.tokens() for runner in runners}
        rounds, other_cores = _time_rounds(runners, chunk, filled, repeats)
        tokens = {runner.name: _new_tokens(initial[runner.name], runner.tokens()) for runner in runners}
    _check_parity(runners, tokens)
    own = [runner.name for runner in runners if runner.name.startswith(NEMOSTREAM)]
    reference = tokens.get("NeMo, fp32") or (tokens[own[0]] if own else None)
    audio_seconds = batch * (_WARM_UP + repeats) * _ROUND_STEPS * chunk.ms / 1000
    rows = []
    for runner in runners:
        seconds = [times[runner.name] for times in rounds]
        values: dict[str, Any] = {
            "covers": runner.covers,
            "setup": runner.setup,
            "other_work_cores": round(other_cores, 3),
            "relative_time": {name: ratios(seconds, [times[name] for times in rounds]) for name in own},
        }
        emitted = tokens[runner.name]
        if emitted is not None:
            values["tokens_per_second"] = sum(map(len, emitted)) / audio_seconds
            values["same_tokens"] = agreement(reference or emitted, emitted)
        if runner.name in own:
            precision = runner.name.rpartition(" ")[2]
            work = encoder_work(factory.bundle, chunk, precision, factory.device_type)
            values["roofline_ms"] = work.roofline_ms(machine, precision, batch)
        case = {"chunk_ms": chunk.ms, "batch": batch, "runner": runner.name}
        rows.append(records.row(case, {"step": [1000 * each for each in seconds]}, values))
    return rows, skipped


def _create_runners(
    factory: RunnerFactory,
    names: Sequence[str],
    feed: AudioFeed,
    chunk: ChunkConfig,
    filled: int,
    stack: contextlib.ExitStack,
) -> tuple[list[Runner], dict[str, str]]:
    """Create runners and fill their caches. Return the runners, and the errors of those that cannot be created."""
    runners: list[Runner] = []
    skipped: dict[str, str] = {}
    for name in names:
        try:
            runner = factory.create(name, feed, chunk, stack)
            stack.callback(runner.close)
            runner.fill_caches(filled)
        except (ImportError, NemostreamError, RuntimeError) as error:
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            factory.progress(f"skipping {name}: {skipped[name]}")
        else:
            runners.append(runner)
    return runners, skipped


def _time_rounds(
    runners: Sequence[Runner],
    chunk: ChunkConfig,
    position: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[dict[str, float]], float]:
    """Return the seconds of a step by runner for each timed round, and the cores that other processes used."""
    other_work, rounds = OtherWork(), []
    for number in range(_WARM_UP + repeats):
        if number == _WARM_UP:
            other_work = OtherWork()
        seconds = {}
        for runner in random.Random(number).sample(runners, len(runners)):
            sleep(_PAUSE)
            for step in range(_ROUND_STEPS):
                start = clock()
                runner.step(position + (number * _ROUND_STEPS + step) * chunk.frames)
                seconds[runner.name] = clock() - start
        rounds.append(seconds)
    return rounds[_WARM_UP:], other_work.cores()


def ratios(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum of the ratios of paired times."""
    found = [a / b for a, b in zip(times, reference, strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def _new_tokens(before: Tokens | None, after: Tokens | None) -> Tokens | None:
    return None if before is None or after is None else [b[len(a) :] for a, b in zip(before, after, strict=True)]


def _check_parity(runners: Sequence[Runner], tokens: dict[str, Tokens | None]) -> None:
    """Raise `ParityError` if exact runners emitted different tokens."""
    exact = [runner for runner in runners if runner.exact and tokens[runner.name] is not None]
    for runner in exact[1:]:
        if tokens[runner.name] != tokens[exact[0].name]:
            raise ParityError(
                f"{runner.name} and {exact[0].name} emitted different tokens, so their times cannot be compared; check "
                "that the bundle is an export of this checkpoint."
            )


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    method, rows = result["method"], result["rows"]
    own = list(dict.fromkeys(name for row in rows for name in row["values"]["relative_time"]))
    before = ", each after a step that is not timed" if method.get("round_steps", 1) > 1 else ""
    text = [
        "Time of one step (features, encoder, greedy decoding, unless *covers* is less) in milliseconds: median "
        f"[minimum–maximum]; {method['device']}, {method['threads']} threads, {method['repeats']} rounds after "
        f"{method['warm_up']} warm-up rounds{before}. Ratios are computed per round; above 1 is slower than "
        "nemostream.",
        "",
    ]
    head = ["chunk", "batch", "runner", "step, ms", "p99, ms", *(f"÷ {name}" for name in own)]
    head += ["roofline, ms", "roofline ÷ p50", "tokens/s per stream", "same tokens as NeMo", "covers"]
    lines = []
    for row in rows:
        case, values, step = row["case"], row["values"], row["figures"]["step"]
        line = [f"{case['chunk_ms']} ms", case["batch"], case["runner"]]
        line += [tables.spread(row["ms"]["step"]), tables.digits(step["p99"])]
        relative = values["relative_time"]
        line += [
            "{median:.2f} [{min:.2f}–{max:.2f}]".format(**relative[name]) if name in relative else "" for name in own
        ]
        bound = values.get("roofline_ms")
        line += [f"{tables.digits(bound['roofline'])}, {bound['bound_by']}" if bound else ""]
        line.append(tables.percent(bound["roofline"] / step["p50"], 0) if bound else "")
        rate = values.get("tokens_per_second")
        line.append("" if rate is None else f"{rate:.1f}")
        lines.append([*line, tables.percent(values.get("same_tokens"), 1), values["covers"]])
    load = tables.other_load(row["values"]["other_work_cores"] for row in rows)
    text += [tables.markdown(head, lines), "", f"{load} Measured rates: {tables.rates(method['machine'])}."]
    text += ["", _SAME_TOKENS, "", "Configurations:", ""]
    setup = {row["case"]["runner"]: row["values"]["setup"] for row in rows}
    text += [f"* {name}: {description}." for name, description in setup.items()]
    if method["skipped"]:
        text += ["", "Skipped: " + "; ".join(f"{name} ({why})" for name, why in method["skipped"].items()) + "."]
    return "\n".join(text) + "\n"


_SAME_TOKENS = (
    "*Same tokens as NeMo* is the share of the tokens of NeMo in fp32 that a runner emits in order. On a CPU, fp32 "
    "runners that compute the same function as NeMo must emit all of them, otherwise the benchmark fails. For the "
    "other runners it is not a measure of quality if the weights are random: such a model amplifies every difference "
    "(rounding in bf16 or int8, the features of sherpa-onnx and the two frames that it drops at the start of a "
    "stream), and all tokens after the first different one may differ. The *accuracy* benchmark measures the effect "
    "of a precision on word error rates with a trained model."
)


def headline(result: Record) -> str:
    """Return a sentence for the README: the step times of every runner for the largest chunk size and batch."""
    method, model = result["method"], result["model"]
    case = max((row["case"]["chunk_ms"], row["case"]["batch"]) for row in result["rows"])
    rows = {
        row["case"]["runner"]: row for row in result["rows"] if (row["case"]["chunk_ms"], row["case"]["batch"]) == case
    }
    references = [name for name in rows if name.startswith(NEMOSTREAM)]
    times = []
    for name, row in rows.items():
        factors = ""
        if references and name not in references:
            medians = [row["values"]["relative_time"][reference]["median"] for reference in references]
            factors = f" ({', '.join(f'{median:.2f}' for median in medians)})"
        times.append(f"{name} {tables.digits(row['figures']['step']['p50'])} ms{factors}")
    note = f" In parentheses: time relative to {' and to '.join(references)}, above 1 = slower." if references else ""
    return (
        f"**One step of {case[1]} streams at {case[0]} ms**, median: {'; '.join(times)}.{note} Model "
        f"*{model['name']}* ({model['layers']} layers, d_model {model['d_model']}), {method['threads']} threads, "
        f"{tables.machine(result['hardware'])}."
    )


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the step times."""
    return {"steps": _step_chart(result["rows"], result["method"]["repeats"])}


def overview(result: Record) -> tuple[str, Chart]:
    """Return name and plot for the README: the step times with the largest number of streams."""
    batch = max(row["case"]["batch"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["case"]["batch"] == batch]
    return "step-times", _step_chart(rows, result["method"]["repeats"])


def _step_chart(rows: Sequence[Row], repeats: int) -> BarChart:
    """Return bars of every runner, the fastest first, with a panel for each chunk size and batch."""
    reference = next((row["case"]["runner"] for row in rows if row["case"]["runner"].startswith(NEMOSTREAM)), None)
    groups: dict[tuple[int, int], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (row["case"]["chunk_ms"], row["case"]["batch"])):
        groups.setdefault((row["case"]["chunk_ms"], row["case"]["batch"]), {})[row["case"]["runner"]] = row

    def relative(name: str) -> float:
        """Return the mean over the panels of the time relative to the slowest runner."""
        found = [
            group[name]["figures"]["step"]["p50"] / max(row["figures"]["step"]["p50"] for row in group.values())
            for group in groups.values()
            if name in group
        ]
        return statistics.mean(found)

    def bar(row: Row) -> Bar:
        median, factor = row["figures"]["step"]["p50"], row["values"]["relative_time"].get(reference)
        other = factor and not row["case"]["runner"].startswith(NEMOSTREAM)
        text = f"{tables.digits(median)} ms" + (f", {factor['median']:.1f}×" if other else "")
        return Bar([median], text, quartiles(row["ms"]["step"]))

    names = sorted(dict.fromkeys(row["case"]["runner"] for row in rows), key=relative)
    panels = [
        BarPanel(
            f"{ms} ms chunks, {tables.counted(batch, 'stream')}",
            "ms per step",
            [bar(group[name]) if name in group else None for name in names],
        )
        for (ms, batch), group in groups.items()
    ]
    subtitle = f"Time of one step (shorter is better), median of {repeats} rounds; whiskers: 25th to 75th percentile."
    subtitle += f" ×: relative to {reference}." if reference else ""
    partial = {row["case"]["runner"]: row["values"]["covers"] for row in rows}
    subtitle += "".join(f" {name}: {covers}." for name, covers in partial.items() if not covers.endswith("tokens"))
    own = [name for name in names if name.startswith(NEMOSTREAM)]
    return BarChart(_finding(rows, reference), subtitle, names, panels, own)


def _finding(rows: Sequence[Row], reference: str | None) -> str:
    """Return the times of the other systems in the precision of the reference, relative to it."""
    factors: dict[str, list[float]] = {}
    own, _, precision = str(reference).partition(", ")
    for row in rows:
        system, _, kind = row["case"]["runner"].partition(", ")
        factor = row["values"]["relative_time"].get(reference)
        if factor and system != own and kind == precision:
            factors.setdefault(system, []).append(factor["median"])
    if not factors:
        return "Time of one step"
    first, *more = (f"{system} {tables.low_to_high(min(each), max(each))} times" for system, each in factors.items())
    first = first.replace(" ", " takes ", 1)
    return f"{', '.join([f'{first} as long as {own}', *more])} ({precision})"


def _release_memory() -> None:
    """Return freed memory to the system: glibc keeps up to 7 GB after an export."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def prepared(checkpoint: Path | None, bundle: Path | None, progress: Progress) -> Iterator[tuple[Path, Bundle]]:
    """Yield checkpoint and bundle; missing ones are created in a temporary folder.

    Raises `OptionError` if NeMo is not installed or if there is too little free memory.
    """
    if find_spec("nemo") is None:
        raise OptionError(f"the baseline needs NeMo: {install_command('nemo', 'bench')}")
    from nemostream.export import export_checkpoint

    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        if checkpoint is None:
            progress("creating a full-size model with random weights")
            checkpoint = synthetic_model(Path(folder) / "random-0.6b.nemo")
            _release_memory()
        if bundle:
            opened = Bundle.open(bundle)
        else:
            opened = export_checkpoint(checkpoint, Path(folder) / "bundle", progress=progress)
        _release_memory()
        # Three models in NeMo, two nemostream engines, two sessions of NeMo's export.
        needed, available = int(7 * checkpoint.stat().st_size) + (1 << 30), records.available_memory()
        if 0 < available < needed:
            raise OptionError(
                f"all runners together need about {needed >> 30} GiB of free memory, {available >> 30} GiB are "
                "available; free memory or choose fewer runners with --runners."
            )
        yield checkpoint, opened


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("baseline", __doc__)
    parser.add_argument("--checkpoint", type=Path, help=".nemo file (default: a full-size model with random weights)")
    parser.add_argument("--bundle", type=Path, help="bundle exported from the checkpoint (default: export it)")
    runners = ", ".join(map(repr, RUNNER_NAMES))
    parser.add_argument("--runners", nargs="+", default=None, metavar="RUNNER", help=f"one or more of {runners}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="streams per step")
    command.add_chunk_option(parser)
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--threads", type=int, help="threads of each runner (default: all cores)")
    parser.add_argument("--device", help="cpu, cuda or cuda:onnxruntime (default: cuda if PyTorch finds a GPU)")
    parser.add_argument("--engines", type=Path, help="folder of engines (default: a temporary folder)")
    options = parser.parse_args(arguments)
    if options.bundle and not options.checkpoint:
        parser.error("--bundle needs --checkpoint, the source of the bundle.")

    def measure() -> Record:
        with prepared(options.checkpoint, options.bundle, records.report_progress) as (checkpoint, bundle):
            return compare_steps(
                bundle,
                checkpoint,
                options.runners,
                options.batch,
                options.chunk_ms,
                options.repeats,
                options.threads,
                options.device or _default_device(),
                options.engines,
                progress=records.report_progress,
            )

    command.run(measure, options)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
