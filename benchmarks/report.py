"""Results as tables and plots; results beside an earlier one; the pages that quote them.

    nemostream bench report bench-results/latency.json --against older/latency.json
    nemostream bench report --pages      # README's performance section and docs/performance.md, from a checkout

Every benchmark's module knows how its result is shown: `show(result, plot)`. What README and docs/performance.md say
about speed and accuracy is written here from `benchmarks/results/*.json`; a test compares.

Noise, beside an earlier result, is what a bootstrap of both sets of samples says about the ratio of their medians (99
of 100 resamples), and at least 3 %, because runs differ by more than the samples within one tell. Of words it is a
bootstrap of the utterances, of numbers of streams two steps of the search.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from nemostream.benchmarks import module_name
from nemostream.benchmarks.capacity import RESOLUTION
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.records import Record
from nemostream.errors import NemostreamError, OptionError

ROOT = Path(__file__).resolve().parents[1]
_NOISE = 0.03  # two runs of one program on one machine differ by about that much
_PER_RUN = ("machine", "left_out", "other_work_cores")  # of a method, what is measured or comes about in each run
_BEGIN, _END = "<!-- performance: written by `nemostream bench report --pages` -->", "<!-- performance: end -->"


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """A result's tables as Markdown, under what was measured where; `plot(name)` gives axes to draw on."""
    module = import_module(module_name(result["benchmark"]))
    return f"{measured_on(result)}\n\n{module.show(result, plot)}"


def measured_on(result: Record) -> str:
    hard, versions = result["hardware"], result["versions"]
    libraries = ", ".join(
        f"{name} {number}" for name, number in versions.items() if name not in ("python", "nemostream")
    )
    gpu = f"{hard['gpu']}; " if hard.get("gpu") else ""
    return (
        f"`{shown(result['command'])}`, {result['time']}, commit "
        f"{result['commit'] or 'unknown'}. {gpu}{hard['cpu']}, {hard['cores']} cores, {hard['memory_gib']} GiB. "
        f"{libraries}. Model: {describe(result['model'])}."
    )


def shown(command: str) -> str:
    """A command line without the interpreter and the folders of whoever ran it."""
    _, found, rest = command.partition("nemostream.benchmarks.")
    if found:
        name, _, options = rest.partition(" ")
        command = f"nemostream bench {name.rpartition('.')[2]} {options}"
    elif " bench " in command:
        command = "nemostream bench " + command.partition(" bench ")[2]
    return re.sub(r"(?<=\s)/\S*/", "", command).strip()


def describe(model: dict[str, Any]) -> str:
    size = f", {model['layers']} layers, {model['d_model']} wide" if "layers" in model else ""
    return f"{model.get('name', '?')}{size}"


def write_report(results: Sequence[Record], path: Path, against: Sequence[Record] = ()) -> str:
    """Markdown at `path` with its plots beside it as PNG and SVG; the text. Plots need matplotlib."""
    parts = []
    for result in results:
        stem = path.with_name(f"{path.stem}-{result['benchmark']}" if len(results) > 1 else path.stem)
        with plots(stem) as (plot, names):
            text = show(result, plot)
        pictures = "\n".join(f"![{name}]({name}.png)" for name in names)
        parts.append(f"## {result['benchmark']}\n\n{text}\n{pictures}\n")
        for old in against:
            if old["benchmark"] == result["benchmark"]:
                parts.append(changes(result, old))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return "\n".join(parts)


@dataclass(frozen=True)
class Change:
    """A figure that both results have: medians in milliseconds, words wrong in percent, or a number of streams."""

    case: dict[str, Any]
    what: str
    before: float
    now: float
    beyond_noise: bool
    more_is: str  # "slower", "worse" or "better"

    @property
    def verdict(self) -> str:
        other = {"slower": "faster", "worse": "better", "better": "worse"}
        return (self.more_is if self.now > self.before else other[self.more_is]) if self.beyond_noise else ""


def compare(new: Record, old: Record) -> list[Change]:
    """How the figures of cases that both results have changed, and whether by more than noise."""
    before = {json.dumps(each["case"], sort_keys=True): each for each in old["rows"]}
    found = []
    for each in new["rows"]:
        other = before.get(json.dumps(each["case"], sort_keys=True))
        if not other:
            continue
        for name in each["ms"]:
            if each["ms"][name] and other["ms"].get(name):
                found.append(_times(each["case"], name, each["ms"][name], other["ms"][name]))
        mine, theirs = (row["values"].get("by_utterance") for row in (each, other))
        if mine and theirs and [words for _, words in mine] == [words for _, words in theirs]:
            found.append(_words(each["case"], np.array(mine), np.array(theirs)))
    streams = new["method"].get("streams"), old["method"].get("streams")
    if new["benchmark"] == "capacity" and None not in streams:
        now, then = streams
        case = {name: new["method"].get(name) for name in ("chunk_ms", "precision")}
        if case == {name: old["method"].get(name) for name in case}:
            noise = max(1, 2 * RESOLUTION * then)
            found.append(Change(case, "streams", then, now, abs(now - then) > noise, "better"))
    return found


def _times(case: dict[str, Any], name: str, now: Sequence[float], then: Sequence[float]) -> Change:
    a, b, rng = np.array(now), np.array(then), np.random.default_rng(0)
    medians = [np.median(rng.choice(side, (1000, len(side))), axis=1) for side in (a, b)]
    low, high = np.quantile(medians[0] / medians[1], [0.005, 0.995])
    beyond = bool(low > 1 + _NOISE or high < 1 - _NOISE)
    return Change(case, f"{name}, ms", float(np.median(b)), float(np.median(a)), beyond, "slower")


def _words(case: dict[str, Any], now: np.ndarray, then: np.ndarray) -> Change:
    """`now` and `then` are [N, 2]: errors and words of each utterance, the same ones."""
    total, more = now[:, 1].sum(), now[:, 0] - then[:, 0]
    chosen = np.random.default_rng(0).integers(0, len(more), (1000, len(more)))
    low, high = np.quantile(more[chosen].sum(axis=1), [0.005, 0.995])
    before, after = (100 * float(side[:, 0].sum() / total) for side in (then, now))
    return Change(case, "WER, %", before, after, bool(low > 0 or high < 0), "worse")


def changes(new: Record, old: Record) -> str:
    """What changed since an earlier result, as Markdown."""
    lines = [
        [
            " ".join(f"{key} {value}" for key, value in each.case.items()),
            each.what,
            tables.digits(each.before),
            tables.digits(each.now),
            f"{each.now / each.before:.2f}" if each.before else "",
            f"**{each.verdict}**" if each.verdict else "within noise",
        ]
        for each in compare(new, old)
    ]
    if not lines:
        return f"No case of the {old['benchmark']} of {old['time']} is in this one, or none that can be compared.\n"
    others = [what for what in ("hardware", "model") if new[what] != old[what]]
    others += ["device"] if new["method"].get("device") != old["method"].get("device") else []
    where = "".join(f" **The {what} is another**, so this says nothing of the code." for what in others)
    table = tables.markdown(["case", "what", "before", "now", "now ÷ before", ""], lines)
    return f"### Since {old['time']}, commit {old['commit'] or 'unknown'}\n\nTimes are medians.{where}\n\n{table}\n"


@contextmanager
def plots(stem: Path) -> Iterator[tuple[Callable[[str], Any], list[str]]]:
    """Gives axes by name, and writes what was drawn on them as `{stem}-{name}.png` and `.svg`, the same each time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures: dict[str, Figure] = {}

    def plot(name: str) -> Any:
        figure = figures[f"{stem.name}-{name}"] = Figure(figsize=(8, 4.5), layout="constrained")
        return figure.add_subplot()

    names: list[str] = []
    yield plot, names
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "nemostream", "svg.fonttype": "none"}):
        for name, figure in figures.items():
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                FigureCanvasAgg(figure)
                figure.savefig(stem.with_name(f"{name}.{kind}"), dpi=110, metadata=metadata)
            names.append(name)


# -- the pages ---------------------------------------------------------------------------------------------------------


def pages(root: Path) -> dict[Path, str]:
    """README and docs/performance.md as they should be, from the results in `root`/benchmarks/results."""
    results = committed(root)
    performance = [
        "# Performance",
        "",
        "Written by `nemostream bench report --pages` from the results in `benchmarks/results`; nothing here was typed",
        "by hand. What each benchmark does and how its figures are to be read: the head of its file in `benchmarks/`.",
        "Times are milliseconds, percentiles by nearest rank: of fewer than 100 samples p99 is the largest. The model",
        "*random-0.6b* is the published one's shape with random weights (`nemostream bench synthetic`), *demo* the",
        "embedded one.",
    ]
    for name, result in results.items():
        stem = root / "benchmarks" / "results" / name
        drawn = sorted(each.name for each in stem.parent.glob(f"{name}-*.svg"))
        text = show(result, _no_plot)
        pictures = [f"![{each}](../benchmarks/results/{each})" for each in drawn]
        performance += ["", f"## {name}", "", text.rstrip(), "", *pictures]
    readme = (root / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(_BEGIN)
    _, after = rest.split(_END)
    section = [_BEGIN, "", *_headlines(results), "", _END]
    return {
        root / "README.md": before + "\n".join(section) + after,
        root / "docs" / "performance.md": "\n".join(performance).rstrip() + "\n",
    }


def committed(root: Path) -> dict[str, Record]:
    """The results kept with the code, by file name."""
    found = {}
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        if f'"schema": "{records.SCHEMA}"' in path.read_text(encoding="utf-8")[:200]:
            result = records.read(path)
            # Some have pages of their own that quote them.
            if hasattr(import_module(module_name(result["benchmark"])), "show"):
                found[path.stem] = result
    return found


def together(results: Sequence[Record]) -> list[Record]:
    """Results of one benchmark, model, machine and method as one: their rows under the first one's head."""
    found: dict[str, Record] = {}
    for result in results:
        alike = {name: result[name] for name in ("benchmark", "hardware", "model", "versions")}
        method = {name: value for name, value in result["method"].items() if name not in _PER_RUN}
        head = found.setdefault(json.dumps([alike, method], sort_keys=True), {**result, "rows": []})
        head["rows"] = [*head["rows"], *result["rows"]]
    return list(found.values())


def _headlines(results: dict[str, Record]) -> list[str]:
    lines = []
    for result in together(list(results.values())):
        module = import_module(module_name(result["benchmark"]))
        if hasattr(module, "headline"):
            lines += [module.headline(result), ""]
    lines.append("All tables, plots, methods and machines: [docs/performance.md](docs/performance.md).")
    return lines


class _Nothing:
    """Takes any drawing and keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: _Nothing()


def _no_plot(name: str) -> Any:
    return _Nothing()


def main(arguments: Sequence[str] | None = None) -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="nemostream bench report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT", help="JSON files that benchmarks wrote")
    parser.add_argument(
        "--against", nargs="+", type=Path, default=[], metavar="RESULT", help="earlier ones to compare with"
    )
    parser.add_argument("--out", type=Path, default=records.FOLDER / "report.md")
    parser.add_argument("--pages", action="store_true", help="write README's section and docs/performance.md")
    options = parser.parse_args(arguments)
    try:
        if not options.results and not options.pages:
            raise OptionError("give the RESULT files to report, or --pages.")
        if options.results:
            results, against = ([records.read(path) for path in paths] for paths in (options.results, options.against))
            print(write_report(results, options.out, against), end="")
        if options.pages:
            for name, result in committed(ROOT).items():
                with plots(ROOT / "benchmarks" / "results" / name) as (plot, _):
                    show(result, plot)
            for path, text in pages(ROOT).items():
                path.write_text(text, encoding="utf-8")
                records.say(f"written: {path}")
    except NemostreamError as error:
        records.say(f"nemostream: {error}")
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
