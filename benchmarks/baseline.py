"""One streaming step, ours beside everybody else's: the same weights, the same audio, the same batch, one run.

    nemostream bench baseline --checkpoint model.nemo --batch 1 8 --chunk-ms 80

Without `--checkpoint` the model is the full-size one with random weights (`synthetic`), made here. Opponents are set
up at their best (`sides`, `nemo`): NeMo in fp32, in true bf16, under torch.compile, on a GPU with its encoder step
captured in a CUDA graph; Hugging Face transformers' encoder; ONNX Runtime on NeMo's own export; on a CPU sherpa-onnx.
All run on `--device`. Method, for each chunk size and batch:

* Every side hears the same speech from the start until its attention caches are full, then goes on: what is timed is
  the steady state. Then come warm-up rounds, then timed ones. In a round every side takes one step, each time another
  one first, a pause before each so that no thread pool still spins. All have the same number of threads.
* Ratios are taken round by round against each of ours, and their median, least and most are shown.
* Sides that compute what NeMo computes (`exact`: fp32 on a CPU) must have said the same tokens in the end, or the run
  ends with an error: the figures would mean nothing. Of the others the share of NeMo's tokens that they said is told.
* What is not equal is to our cost: our step begins with PCM, theirs (but for sherpa-onnx) with features made before;
  transformers' does not decode.
* Cores that other work (or another guest of the host) kept busy during the timed rounds are counted. With more than a
  tenth of one the figures are worthless, for the threads of a step wait for the slowest: the report says so.
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

from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.competitors import KNOWN, OURS, SIDES, Ring
from nemostream.benchmarks.harness.records import OtherWork, Record, Row, Say, Tokens, agreement
from nemostream.benchmarks.harness.roofline import Machine, encoder_work, measure_gpu, measure_machine
from nemostream.benchmarks.harness.runners import Side
from nemostream.benchmarks.harness.synthetic import speech, synthetic_model
from nemostream.benchmarks.harness.timed import Feed, longest
from nemostream.bundle import Bundle, ChunkConfig, sha256
from nemostream.errors import NemostreamError, OptionError, ParityError
from nemostream.extras import install_command

_WARM_UP = 3
_PAUSE = 0.02  # seconds


def compare_steps(
    bundle: Bundle,
    checkpoint: Path,
    sides: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    chunk_ms: Sequence[int] | None = None,
    repeats: int = 15,
    threads: int | None = None,
    device: str = "cpu",
    engines: Path | None = None,
    machine: Machine | None = None,
    say: Say = lambda message: None,
) -> Record:
    """The result. `bundle` is made of `checkpoint`; on a GPU `device` is "cuda" or "cuda:onnxruntime" for our side.

    Raises `ParityError` if sides that must agree do not, `OptionError` for an unknown side or chunk size.
    """
    import torch

    kind = device.partition(":")[0]
    if kind not in SIDES:
        raise OptionError(f"device is {device!r}; choose cpu or cuda.")
    names = SIDES[kind] if sides is None else sides
    if repeats < 1 or min(batches, default=0) < 1:
        raise OptionError("repeats and batch sizes must be at least 1.")
    if unknown := [name for name in names if name not in KNOWN]:
        raise OptionError(f"there is no side {unknown[0]!r}; choose of {', '.join(KNOWN)}.")
    made_of = bundle.manifest.checkpoint.get("sha256")
    if made_of and made_of != sha256(checkpoint):
        raise ParityError(f"{bundle.path} was made of another checkpoint than {checkpoint}; export it again.")
    threads, before = threads or records.cores(), torch.get_num_threads()
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    torch.set_num_threads(threads)
    rows: list[Row] = []
    absent: dict[str, str] = {}
    try:
        if machine is None:
            machine = measure_machine(threads) if device == "cpu" else measure_gpu()
        with Ring(bundle, checkpoint, device, threads, engines, say) as ring:
            for chunk in chunks:
                for batch in batches:
                    say(f"{chunk.ms} ms, batch {batch}")
                    present = [name for name in names if name not in absent]
                    more, missing = _compare(ring, present, chunk, batch, repeats, machine)
                    rows += more
                    absent |= missing
                    gc.collect()
                ring.forget_export()
    finally:
        torch.set_num_threads(before)
    manifest = bundle.manifest
    return records.record(
        "baseline",
        rows,
        model={
            "name": manifest.name,
            "layers": manifest.encoder.layers,
            "d_model": manifest.encoder.d_model,
            "checkpoint": dict(manifest.checkpoint),
        },
        method={
            "repeats": repeats,
            "warm_up": _WARM_UP,
            "threads": threads,
            "device": device,
            "order": "rounds, each begun by another",
            "machine": dict(machine.rates),
            "left_out": absent,
        },
    )


def _compare(
    ring: Ring, names: Sequence[str], chunk: ChunkConfig, batch: int, repeats: int, machine: Machine
) -> tuple[list[Row], dict[str, str]]:
    """A row per side, and why sides are missing."""
    manifest = ring.bundle.manifest
    filler = longest(manifest, chunk)
    filled = -(-chunk.left // filler.frames) * filler.frames
    feed = Feed(manifest, speech(), batch, filled + (_WARM_UP + repeats) * chunk.frames)
    sides: list[Side] = []
    missing: dict[str, str] = {}
    if any(name.startswith(("onnx", "sherpa")) for name in names):
        ring.export(chunk)  # before anything else is loaded: it takes three times the model's size
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                side = ring.enter(name, feed, chunk, stack)
                stack.callback(side.close)
                side.fill(filled)
            except (ImportError, NemostreamError, RuntimeError) as error:
                missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                ring.say(f"without {name}: {missing[name]}")
                continue
            sides.append(side)
        begun = {side.name: side.tokens() for side in sides}
        others, rounds = OtherWork(), []
        for turn in range(_WARM_UP + repeats):
            if turn == _WARM_UP:
                others = OtherWork()
            position, seconds = filled + turn * chunk.frames, {}
            for side in random.Random(turn).sample(sides, len(sides)):
                time.sleep(_PAUSE)
                start = time.perf_counter()
                side.step(position)
                seconds[side.name] = time.perf_counter() - start
            rounds.append(seconds)
        busy = others.cores()
        # What was said while the caches were filled is left out: not all sides filled them with the same chunk size.
        said = {side.name: _since(begun[side.name], side.tokens()) for side in sides}
    _agree(sides, said)
    rounds = rounds[_WARM_UP:]
    ours = [side.name for side in sides if side.name.startswith(OURS)]
    wanted = said.get("NeMo, fp32") or (said[ours[0]] if ours else None)
    audio = batch * (_WARM_UP + repeats) * chunk.ms / 1000
    rows = []
    for side in sides:
        case = {"chunk_ms": chunk.ms, "batch": batch, "side": side.name}
        tokens = said[side.name]
        values: dict[str, Any] = {
            "covers": side.covers,
            "setup": side.setup,
            "other_work_cores": round(busy, 3),
            "times": {our: ratios([r[side.name] for r in rounds], [r[our] for r in rounds]) for our in ours},
        }
        if tokens is not None:
            values["tokens_per_second"] = sum(map(len, tokens)) / audio
            values["same_tokens"] = agreement(wanted or tokens, tokens)
        if side.name in ours:
            precision = side.name.rpartition(" ")[2]
            work = encoder_work(ring.bundle, chunk, precision, ring.kind)
            values["floor_ms"] = work.floor_ms(machine, precision, batch)
        rows.append(records.row(case, {"step": [1000 * each[side.name] for each in rounds]}, values))
    return rows, missing


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Their times over ours, round by round: median, least and most."""
    found = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def _since(before: Tokens | None, now: Tokens | None) -> Tokens | None:
    return None if before is None or now is None else [b[len(a) :] for a, b in zip(before, now, strict=True)]


def _agree(sides: Sequence[Side], said: dict[str, Tokens | None]) -> None:
    exact = [side for side in sides if side.exact and said[side.name] is not None]
    for side in exact[1:]:
        if said[side.name] != said[exact[0].name]:
            raise ParityError(
                f"{side.name} and {exact[0].name} have not said the same: no point in comparing their times; was the "
                "bundle made of this checkpoint?"
            )


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Tables and plots of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    method, rows = result["method"], result["rows"]
    ours = list(dict.fromkeys(name for row in rows for name in row["values"]["times"]))
    text = [
        "One whole step (features, encoder, greedy decoding; what a side leaves out is told), milliseconds, "
        f"{method['device']}, {method['threads']} threads, {method['repeats']} rounds after {method['warm_up']} to "
        "warm up: median [least–most]. Ratios are taken by round.",
        "",
    ]
    head = ["chunk", "batch", "side", "step, ms", "p99", *(f"÷ ours, {name.partition(', ')[2]}" for name in ours)]
    head += ["floor, ms", "of the floor", "tokens a second", "NeMo's tokens", "covers"]
    lines = []
    for row in rows:
        case, values, step = row["case"], row["values"], row["figures"]["step"]
        line = [f"{case['chunk_ms']} ms", case["batch"], case["side"]]
        line += [tables.spread(row["ms"]["step"]), tables.digits(step["p99"])]
        times = values["times"]
        line += ["{median:.2f} [{min:.2f}–{max:.2f}]".format(**times[name]) if name in times else "" for name in ours]
        floor = values.get("floor_ms")
        line += [f"{tables.digits(floor['floor'])}, {floor['binding']}" if floor else ""]
        line.append(tables.percent(floor["floor"] / step["p50"], 0) if floor else "")
        rate = values.get("tokens_per_second")
        line.append("" if rate is None else f"{rate:.1f}")
        lines.append([*line, tables.percent(values.get("same_tokens"), 1), values["covers"]])
    busy = tables.busy(row["values"]["other_work_cores"] for row in rows)
    text += [tables.markdown(head, lines), "", f"{busy} Measured: {tables.rates(method['machine'])}."]
    text += ["", _NOT_NEMOS, "", "How each was set up:", ""]
    setup = {row["case"]["side"]: row["values"]["setup"] for row in rows}
    text += [f"* {name}: {how}." for name, how in setup.items()]
    if method["left_out"]:
        text += ["", "Left out: " + "; ".join(f"{name} ({why})" for name, why in method["left_out"].items()) + "."]
    _draw(result, plot("steps"))
    return "\n".join(text) + "\n"


_NOT_NEMOS = (
    "*NeMo's tokens* is the share of NeMo's fp32 tokens that a side said too. On a CPU, sides in fp32 that compute "
    "what NeMo computes must have said all of them, or there would be no table. Of the others it is no verdict where "
    "weights are random: such a model amplifies any difference (bf16's or int8's rounding, sherpa-onnx's own features "
    "and the two frames it drops at the start of a stream), and after the first other token the rest follows from that "
    "one. What a precision costs in words is for *accuracy* to say, of a model that has learnt some."
)


def headline(result: Record) -> str:
    """For the README: ours beside each opponent, per chunk size and batch."""
    hard, method = result["hardware"], result["method"]
    by_case = {(row["case"]["chunk_ms"], row["case"]["batch"], row["case"]["side"]): row for row in result["rows"]}
    names = list(dict.fromkeys(side for _, _, side in by_case))
    ours, cases = [name for name in names if name.startswith(OURS)], sorted({case[:2] for case in by_case})

    def cache_dtype(row: Row | None) -> str:
        if not row:
            return ""
        times = " / ".join(f"{row['values']['times'][our]['median']:.2f}" for our in ours)
        return f"{tables.digits(row['figures']['step']['p50'])} ({times})"

    lines = [[name, *(cache_dtype(by_case.get((*case, name))) for case in cases)] for name in names]
    where = hard["gpu"] or f"{hard['cpu']}, {hard['cores']} cores"
    return (
        f"One whole step, median milliseconds (and how many times ours: {' / '.join(ours)}), "
        f"{result['model']['layers']} layers of {result['model']['d_model']}, *{result['model']['name']}*, "
        f"{method['threads']} threads, {where}:\n\n"
        + tables.markdown(["", *(f"{ms} ms, batch {batch}" for ms, batch in cases)], lines)
    )


def _draw(result: Record, axes: Any) -> None:
    """A group of bars for each chunk size and batch, a bar for each side: p50, and up to p99 a whisker."""
    found = {
        (row["case"]["chunk_ms"], row["case"]["batch"], row["case"]["side"]): row["figures"]["step"]
        for row in result["rows"]
    }
    groups = sorted({case[:2] for case in found})
    names = list(dict.fromkeys(side for _, _, side in found))
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        bars = [
            (place + width * (index + 0.5), found[(*group, name)])
            for place, group in enumerate(groups)
            if (*group, name) in found
        ]
        at, middle = [place for place, _ in bars], [step["p50"] for _, step in bars]
        axes.bar(at, middle, width, label=name)
        above = [step["p99"] - step["p50"] for _, step in bars]
        axes.errorbar(at, middle, [[0] * len(bars), above], fmt="none", color="black", linewidth=0.7)
    axes.set_xticks([place + 0.4 for place in range(len(groups))], [f"{ms} ms × {batch}" for ms, batch in groups])
    axes.set(ylabel="step, ms (p50, whisker to p99)", title="One step, by chunk size × batch")
    axes.legend(fontsize=7, ncols=2)


def _give_memory_back() -> None:
    """glibc keeps what was freed, 7 GB of it after an export, and others would have to do without."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def prepared(checkpoint: Path | None, bundle: Path | None, say: Say) -> Iterator[tuple[Path, Bundle]]:
    """Checkpoint and bundle, made in a temporary folder as far as they are not given.

    Raises `OptionError` if NeMo is missing, or memory.
    """
    if find_spec("nemo") is None:
        raise OptionError(f"the baseline needs NeMo: {install_command('export', 'bench')}")
    from nemostream.export import export_checkpoint

    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        if checkpoint is None:
            say("making a full-size model of random weights")
            checkpoint = synthetic_model(Path(folder) / "random-0.6b.nemo")
            _give_memory_back()
        made = Bundle.open(bundle) if bundle else export_checkpoint(checkpoint, Path(folder) / "bundle", progress=say)
        _give_memory_back()
        # NeMo's model three times, two of our engines, two sessions of its export.
        needed, there = int(7 * checkpoint.stat().st_size) + (1 << 30), records.available_memory()
        if 0 < there < needed:
            raise OptionError(
                f"all sides together need about {needed >> 30} GiB of free memory and {there >> 30} GiB are; free "
                "some, or name fewer with --sides."
            )
        yield checkpoint, made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = records.parser("baseline", __doc__)
    parser.add_argument("--checkpoint", type=Path, help="a .nemo file (default: the full-size model, random weights)")
    parser.add_argument("--bundle", type=Path, help="made of that checkpoint (default: export it now)")
    parser.add_argument("--sides", nargs="+", default=None, metavar="SIDE", help=f"of {', '.join(map(repr, KNOWN))}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunk-ms", type=int, nargs="+", help="default: all that the model has")
    parser.add_argument("--repeats", type=int, default=15, help="rounds timed")
    parser.add_argument("--threads", type=int, help="of all sides (default: every core)")
    parser.add_argument("--device", help="cpu, cuda, or cuda:onnxruntime (default: cuda if PyTorch finds a GPU)")
    parser.add_argument("--engines", type=Path, help="folder to keep our engines in (default: made anew)")
    options = parser.parse_args(arguments)
    if options.bundle and not options.checkpoint:
        parser.error("--bundle needs --checkpoint, the file it was made of.")

    def measure() -> Record:
        with prepared(options.checkpoint, options.bundle, records.say) as (checkpoint, bundle):
            return compare_steps(
                bundle,
                checkpoint,
                options.sides,
                options.batch,
                options.chunk_ms,
                options.repeats,
                options.threads,
                options.device or _device_here(),
                options.engines,
                say=records.say,
            )

    records.run(measure, options)


def _device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
