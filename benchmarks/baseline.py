"""One streaming step, ours beside everybody else's: the same weights, the same audio, the same batch, one run.

    nemostream bench baseline --checkpoint model.nemo --batch 1 8 --chunk-ms 80

Without `--checkpoint` the model is the full-size one with random weights (`synthetic`), made here. Opponents are set up
at their best (`sides`): NeMo in fp32, in true bf16, under torch.compile, on a GPU with its encoder step captured in a
CUDA graph; Hugging Face transformers' encoder; ONNX Runtime on NeMo's own export; on a CPU sherpa-onnx. Method, for
each chunk size and batch:

* Every side hears the same speech from the start until its attention caches are full, then goes on: what is timed is
  the steady state. Then come warm-up rounds, then timed ones. In a round every side takes one step, each time another
  one first, a pause before each so that no thread pool still spins. All have the same number of threads.
* Ratios are taken round by round against ours in fp32, and their median, least and most are shown.
* Sides that compute what NeMo computes (`exact`) must have said the same tokens in the end, or the run ends with an
  error: the figures would mean nothing. Of the others the share of NeMo's tokens that they said is told. With random
  weights it falls to nothing once a single token differs, since the next ones follow from it: what a precision costs in
  words only `accuracy` says, of a model that has learnt some.
* What is not equal is to our cost: our step begins with PCM, theirs (but for sherpa-onnx) with features made before;
  transformers' does not decode.
* Cores that other work (or another guest of the host) kept busy are counted. With more than a tenth of one the figures
  are worthless: the threads of a step wait for the slowest.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemostream.benchmarks import record, tables
from nemostream.benchmarks.floor import Machine, encoder_work, measure_machine
from nemostream.benchmarks.record import OtherWork, Record, Row, Say, Tokens, agreement
from nemostream.benchmarks.sides import (
    Feed,
    Nemo,
    NemoOnnx,
    Ours,
    Sherpa,
    Side,
    Transformers,
    export_nemo,
    load_nemo,
    longest,
    timed_backend,
)  # fmt: skip
from nemostream.benchmarks.synthetic import speech, synthetic_model
from nemostream.errors import NemostreamError, OptionError, ParityError
from nemostream.spec import Bundle, Chunk

SIDES = (
    "ours fp32", "ours int8", "nemo fp32", "nemo bf16", "nemo compile", "nemo graph", "transformers", "onnx",
    "sherpa fp32", "sherpa int8",
)  # fmt: skip
REFERENCE = "nemostream, fp32"
_WARM_UP = 3
_PAUSE = 0.02  # seconds


def compare_steps(
    bundle: Bundle,
    checkpoint: Path,
    sides: Sequence[str],
    batches: Sequence[int] = (1, 8),
    chunk_ms: Sequence[int] | None = None,
    repeats: int = 15,
    threads: int | None = None,
    machine: Machine | None = None,
    say: Say = lambda message: None,
) -> Record:
    """The result. `bundle` is made of `checkpoint`.

    Raises `ParityError` if sides that must agree do not, `OptionError` for an unknown side or chunk size.
    """
    import torch

    if repeats < 1 or min(batches, default=0) < 1:
        raise OptionError("repeats and batch sizes must be at least 1.")
    if unknown := [side for side in sides if side not in SIDES]:
        raise OptionError(f"there is no side {unknown[0]!r}; choose of {', '.join(SIDES)}.")
    threads, before = threads or record.cores(), torch.get_num_threads()
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    torch.set_num_threads(threads)
    rows: list[Row] = []
    absent: dict[str, str] = {}
    try:
        machine = machine or measure_machine(threads)
        say("loading NeMo")
        ring = _Ring(bundle, checkpoint, load_nemo(checkpoint), threads, say)
        for chunk in chunks:
            for batch in batches:
                say(f"{chunk.ms} ms, batch {batch}")
                more, missing = _compare(ring, [s for s in sides if s not in absent], chunk, batch, repeats, machine)
                rows += more
                absent |= missing
                gc.collect()
            ring.forget_export()
    finally:
        torch.set_num_threads(before)
    manifest = bundle.manifest
    return record.record(
        "baseline", rows,
        model={"name": manifest.name, "layers": manifest.encoder.layers, "d_model": manifest.encoder.d_model,
               "checkpoint": dict(manifest.checkpoint)},
        method={"repeats": repeats, "warm_up": _WARM_UP, "threads": threads, "order": "rounds, each begun by another",
                "machine": {"bandwidth_gb_s": machine.bandwidth / 1e9, **machine.rates}, "left_out": absent},
    )  # fmt: skip


class _Ring:
    """What sides are made of, loaded once."""

    def __init__(self, bundle: Bundle, checkpoint: Path, model: Any, threads: int, say: Say) -> None:
        self.bundle, self.checkpoint, self.model, self.threads, self.say = bundle, checkpoint, model, threads, say
        self._theirs: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="nemostream-")
        self._engines = Path(self._folder.name)
        self._exported: dict[int, tempfile.TemporaryDirectory[str]] = {}

    def enter(self, name: str, feed: Feed, chunk: Chunk, stack: contextlib.ExitStack) -> Side:
        who, _, kind = name.partition(" ")
        if who == "ours":
            chunks = list({chunk, longest(self.bundle.manifest, chunk)})
            backend = stack.enter_context(
                timed_backend(self.bundle, chunks, kind, feed.rows, threads=self.threads, engines=self._engines)
            )
            return Ours(f"nemostream, {kind}", backend, feed, chunk, exact=kind == "fp32")
        if who == "nemo":
            # fp32 sides share the model; another type needs one of its own.
            model = self.model if kind in ("fp32", "compile") else load_nemo(self.checkpoint)
            return Nemo(model, feed, chunk, kind)
        if who == "transformers":
            from nemostream.benchmarks.huggingface import load_transformers

            self._theirs = self._theirs or load_transformers(self.checkpoint, self.bundle.manifest)[1]
            return Transformers(self._theirs, self.model, feed, chunk)
        exported = self.export(chunk)
        if who == "onnx":
            return NemoOnnx(exported, self.model, feed, chunk, self.threads)
        return Sherpa(exported, feed, chunk, self.threads, kind)

    def forget_export(self) -> None:
        # Gigabytes: the next chunk size's need the room.
        for folder in self._exported.values():
            folder.cleanup()
        self._exported.clear()

    def export(self, chunk: Chunk) -> Path:
        if chunk.ms not in self._exported:
            self.say(f"exporting NeMo's own graphs for {chunk.ms} ms")
            self._exported[chunk.ms] = tempfile.TemporaryDirectory(prefix="nemostream-")
            folder = Path(self._exported[chunk.ms].name) / "exported"
            export_nemo(self.model, self.bundle.manifest, chunk, folder, int8=True)
        return Path(self._exported[chunk.ms].name) / "exported"


def _compare(
    ring: _Ring, names: Sequence[str], chunk: Chunk, batch: int, repeats: int, machine: Machine
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
    wanted = said.get("NeMo, fp32") or said.get(REFERENCE)
    audio = batch * (_WARM_UP + repeats) * chunk.ms / 1000
    rows = []
    for side in sides:
        case = {"chunk_ms": chunk.ms, "batch": batch, "side": side.name}
        tokens = said[side.name]
        values: dict[str, Any] = {"covers": side.covers, "other_work_cores": round(busy, 3)}
        if REFERENCE in rounds[0]:
            ratios = [each[side.name] / each[REFERENCE] for each in rounds]
            values["times_ours"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        if tokens is not None:
            values["tokens_per_second"] = sum(map(len, tokens)) / audio
            values["same_tokens"] = agreement(wanted or tokens, tokens)
        if side.name.startswith("nemostream"):
            precision = side.name.rpartition(" ")[2]
            values["floor_ms"] = encoder_work(ring.bundle, chunk, precision).floor_ms(machine, precision, batch)
        rows.append(record.row(case, {"step": [1000 * each[side.name] for each in rounds]}, values))
    return rows, missing


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
    method = result["method"]
    text = [
        "One whole step (features, encoder, greedy decoding; what a side leaves out is told), milliseconds, "
        f"{method['threads']} threads, {method['repeats']} rounds: median [least–most]. Ratios are taken by round.",
        "",
    ]
    head = ["chunk", "batch", "side", "step, ms", "p99", "÷ ours, fp32", "floor, ms", "× floor"]
    head += ["NeMo's tokens", "covers"]
    lines = []
    for row in result["rows"]:
        case, values, step = row["case"], row["values"], row["figures"]["step"]
        line = [f"{case['chunk_ms']} ms", case["batch"], case["side"]]
        line += [tables.spread(row["ms"]["step"]), tables.digits(step["p99"])]
        ratio = values.get("times_ours")
        line.append("{median:.2f} [{min:.2f}–{max:.2f}]".format(**ratio) if ratio else "")
        floor = values.get("floor_ms")
        line += (
            [f"{tables.digits(floor['floor'])}, {floor['binding']}", f"{step['p50'] / floor['floor']:.2f}"]
            if floor
            else ["", ""]
        )
        same = values.get("same_tokens")
        lines.append([*line, "" if same is None else f"{100 * same:.1f} %", values["covers"]])
    text.append(tables.markdown(head, lines))
    if method["left_out"]:
        text += ["", "Left out: " + "; ".join(f"{name} ({why})" for name, why in method["left_out"].items()) + "."]
    busy = max((row["values"]["other_work_cores"] for row in result["rows"]), default=0)
    text += ["", f"Other work kept at most {busy:.2f} cores busy. Measured: " + ", ".join(
        f"{name} {rate:.0f} G/s" for name, rate in method["machine"].items()) + "."]  # fmt: skip
    _draw(result, plot("steps"))
    return "\n".join(text) + "\n"


def headline(result: Record) -> str:
    """For the README: ours beside each opponent, per chunk size and batch."""
    hard, method = result["hardware"], result["method"]
    by_case = {(row["case"]["chunk_ms"], row["case"]["batch"], row["case"]["side"]): row for row in result["rows"]}
    names = list(dict.fromkeys(side for _, _, side in by_case))
    lines = []
    for chunk_ms, batch in sorted({case[:2] for case in by_case}):
        line = [f"{chunk_ms} ms", batch]
        for name in names:
            row = by_case.get((chunk_ms, batch, name))
            ratio = row["values"].get("times_ours") if row else None
            step = tables.digits(row["figures"]["step"]["p50"]) if row else ""
            line.append(step if name == REFERENCE or not ratio else f"{step} ({ratio['median']:.2f}×)")
        lines.append(line)
    where = hard["gpu"] or f"{hard['cpu']}, {hard['cores']} cores"
    return (
        f"One whole step, median milliseconds (and × ours in fp32, median of the rounds): {result['model']['layers']} "
        f"layers of {result['model']['d_model']}, {method['threads']} threads, {where}:\n\n"
        f"{tables.markdown(['chunk', 'batch', *names], lines)}"
    )


def _draw(result: Record, axes: Any) -> None:
    """A group of bars for each chunk size and batch, a bar for each side: p50, and up to p99 a whisker."""
    found = {(row["case"]["chunk_ms"], row["case"]["batch"], row["case"]["side"]): row["figures"]["step"]
             for row in result["rows"]}  # fmt: skip
    groups = sorted({case[:2] for case in found})
    names = list(dict.fromkeys(side for _, _, side in found))
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        bars = [(place + width * (index + 0.5), found[(*group, name)])
                for place, group in enumerate(groups) if (*group, name) in found]  # fmt: skip
        at, middle = [place for place, _ in bars], [step["p50"] for _, step in bars]
        axes.bar(at, middle, width, label=name)
        above = [step["p99"] - step["p50"] for _, step in bars]
        axes.errorbar(at, middle, [[0] * len(bars), above], fmt="none", color="black", linewidth=0.7)
    axes.set_xticks([place + 0.4 for place in range(len(groups))], [f"{ms} ms × {batch}" for ms, batch in groups])
    axes.set(ylabel="step, ms (p50, whisker to p99)", title="One step, by chunk size × batch")
    axes.legend(fontsize=7, ncols=2)


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
        # NeMo's model three times, two of our engines, two sessions of its export.
        needed, there = int(7 * checkpoint.stat().st_size) + (1 << 30), record.available_memory()
        if 0 < there < needed:
            raise OptionError(
                f"all sides together need about {needed >> 30} GiB of free memory and {there >> 30} GiB are; free "
                "some, or name fewer with --sides."
            )
        yield checkpoint, made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser("baseline", __doc__)
    parser.add_argument("--checkpoint", type=Path, help="a .nemo file (default: the full-size model, random weights)")
    parser.add_argument("--bundle", type=Path, help="made of that checkpoint (default: export it now)")
    parser.add_argument("--sides", nargs="+", default=None, metavar="SIDE", help=f"of {', '.join(map(repr, SIDES))}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--chunk-ms", type=int, nargs="+", help="default: all that the model has")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of all sides (default: every core)")
    options = parser.parse_args(arguments)
    if options.bundle and not options.checkpoint:
        parser.error("--bundle needs --checkpoint, the file it was made of.")

    def measure() -> Record:
        if find_spec("nemo") is None:
            raise OptionError("the baseline needs NeMo: pip install 'nemostream[export,bench]'")
        with _prepared(options.checkpoint, options.bundle, record.say) as (checkpoint, bundle):
            return compare_steps(
                bundle, checkpoint, options.sides or SIDES, options.batch, options.chunk_ms, options.repeats,
                options.threads, say=record.say,
            )  # fmt: skip

    record.run(measure, options)


if __name__ == "__main__":
    main()
