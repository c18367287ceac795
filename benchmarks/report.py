"""Render results as tables and plots, and compare them with earlier results.

    nemostream bench report bench-results/latency.json --against older/latency.json
    nemostream bench report --pages      # performance section of the README and docs/performance.md, in a checkout

The module of each benchmark defines `show(result)`, which returns its tables, and `charts(result)`, which returns its
plots, if it has any. The speed and accuracy figures in README.md and docs/performance.md are generated from the results
in `benchmarks/results`, the largest of which are compressed; a test checks that they are up to date.

A change of a time counts as more than noise if the 99 % bootstrap interval of the ratio of the medians is more than 3 %
away from 1, because two runs differ by more than the samples of one run do. For word error rates, the utterances are
resampled. For numbers of streams, the threshold is two steps of the search.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from nemostream.benchmarks import module_name
from nemostream.benchmarks.harness import plots, records, tables
from nemostream.benchmarks.harness.load import SEARCH_RESOLUTION
from nemostream.benchmarks.harness.plots import Chart
from nemostream.benchmarks.harness.records import Record, Row
from nemostream.errors import NemostreamError, OptionError

ROOT = Path(__file__).resolve().parents[1]
_NOISE = 0.03  # relative difference between two runs of the same program on the same machine
_PER_RUN = ("machine", "skipped", "other_work_cores")  # keys of `method` that differ between runs
_BEGIN, _END = "<!-- performance: written by `nemostream bench report --pages` -->", "<!-- performance: end -->"


def show(result: Record) -> str:
    """Return a result as Markdown: where it was measured, and its tables."""
    return f"{measured_on(result)}\n\n{_module(result).show(result)}"


def charts(result: Record) -> dict[str, Chart]:
    """Return the plots of a result by name; empty if its benchmark has none."""
    module = _module(result)
    return module.charts(result) if hasattr(module, "charts") else {}


def _module(result: Record) -> Any:
    return import_module(module_name(result["benchmark"]))


def measured_on(result: Record) -> str:
    """Return a paragraph with command, time, commit, hardware, versions and model."""
    hardware, versions = result["hardware"], result["versions"]
    libraries = ", ".join(
        f"{name} {number}" for name, number in versions.items() if name not in ("python", "nemostream")
    )
    gpu = f"{hardware['gpu']}; " if hardware.get("gpu") else ""
    machine = f"{gpu}{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
    return (
        f"`{short_command(result['command'])}`, {result['time']}, commit {result['commit'] or 'unknown'}. {machine}. "
        f"{libraries}. Model: {describe(result['model'])}."
    )


def short_command(command: str) -> str:
    """Return a command line without the interpreter and without absolute folders."""
    _, found, rest = command.partition("nemostream.benchmarks.")
    if found:
        name, _, options = rest.partition(" ")
        command = f"python -m nemostream.benchmarks.{name} {options}" if "." in name else f"nemostream bench {rest}"
    elif " bench " in command:
        command = "nemostream bench " + command.partition(" bench ")[2]
    return re.sub(r"(?<=\s)/\S*/", "", command).strip()


def describe(model: dict[str, Any]) -> str:
    """Return name and size of a model as text."""
    size = f", {model['layers']} layers, d_model {model['d_model']}" if "layers" in model else ""
    return f"{model.get('name', '?')}{size}"


def footer(results: Sequence[Record]) -> str:
    """Return machine, model, commits and dates of results of the same machine and model, for their plot."""
    machine = tables.machine(results[0]["hardware"])
    commits = dict.fromkeys(re.sub(r"^(\w{8})\w+", r"\1", result["commit"] or "unknown") for result in results)
    dates = sorted({result["time"][:10] for result in results})
    return f"{machine} · model {describe(results[0]['model'])} · commit {', '.join(commits)} · {', '.join(dates)}"


def write_report(results: Sequence[Record], path: Path, against: Sequence[Record] = ()) -> tuple[str, list[Path]]:
    """Write a Markdown report to `path` and its plots as PNG and SVG next to it. Needs matplotlib.

    Returns the text and the files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parts, files = [], [path]
    for result in results:
        stem = path.with_name(f"{path.stem}-{result['benchmark']}" if len(results) > 1 else path.stem)
        pictures = []
        for name, chart in charts(result).items():
            files += [stem.with_name(f"{stem.name}-{name}.{kind}") for kind in ("png", "svg")]
            for picture in files[-2:]:
                plots.write(chart, picture, footer([result]))
            pictures.append(f"![{chart.title}]({files[-1].name})")
        parts.append("\n".join([f"## {result['benchmark']}\n\n{show(result)}", *pictures, ""]))
        for old in against:
            if old["benchmark"] == result["benchmark"]:
                parts.append(changes(result, old))
    path.write_text("\n".join(parts), encoding="utf-8")
    return "\n".join(parts), files


@dataclass(frozen=True)
class Change:
    """A figure present in both results: a median in milliseconds, a word error rate in percent, or a stream count."""

    case: dict[str, Any]
    metric: str
    before: float
    after: float
    significant: bool
    increase: str  # meaning of a larger value: "slower", "worse" or "better"

    @property
    def verdict(self) -> str:
        """Meaning of the change; empty if it is within noise."""
        if not self.significant:
            return ""
        opposite = {"slower": "faster", "worse": "better", "better": "worse"}
        return self.increase if self.after > self.before else opposite[self.increase]


def compare(new: Record, old: Record) -> list[Change]:
    """Return the changes of all figures whose case occurs in both results; repeated cases are paired in order."""
    old_rows: dict[str, deque[Row]] = {}
    for row in old["rows"]:
        old_rows.setdefault(json.dumps(row["case"], sort_keys=True), deque()).append(row)
    changes = []
    for row in new["rows"]:
        candidates = old_rows.get(json.dumps(row["case"], sort_keys=True))
        if not candidates:
            continue
        old_row = candidates.popleft()
        for name in row["ms"]:
            if row["ms"][name] and old_row["ms"].get(name):
                changes.append(_compare_times(row["case"], name, row["ms"][name], old_row["ms"][name]))
        after, before = (each["values"].get("by_utterance") for each in (row, old_row))
        if after and before and [words for _, words in after] == [words for _, words in before]:
            changes.append(_compare_word_errors(row["case"], np.array(after), np.array(before)))
    return changes + _compare_streams(new, old)


def _compare_streams(new: Record, old: Record) -> list[Change]:
    """Return the change of the number of streams of two capacity results with the same chunk sizes and precision."""
    after, before = new["method"].get("streams"), old["method"].get("streams")
    if new["benchmark"] != "capacity" or after is None or before is None:
        return []
    case, old_case = ({name: each["method"].get(name) for name in ("chunk_ms", "precision")} for each in (new, old))
    if case != old_case:
        return []
    noise = max(1, 2 * SEARCH_RESOLUTION * before)
    return [Change(case, "streams", before, after, abs(after - before) > noise, "better")]


def _compare_times(case: dict[str, Any], name: str, after: Sequence[float], before: Sequence[float]) -> Change:
    new, old, rng = np.array(after), np.array(before), np.random.default_rng(0)
    medians = [np.median(rng.choice(samples, (1000, len(samples))), axis=1) for samples in (new, old)]
    low, high = np.quantile(medians[0] / medians[1], [0.005, 0.995])
    significant = bool(low > 1 + _NOISE or high < 1 - _NOISE)
    return Change(case, f"{name}, ms", float(np.median(old)), float(np.median(new)), significant, "slower")


def _compare_word_errors(case: dict[str, Any], after: np.ndarray, before: np.ndarray) -> Change:
    """Compare word error rates; `after` and `before` [N, 2] are errors and words of the same N utterances."""
    words, difference = after[:, 1].sum(), after[:, 0] - before[:, 0]
    resampled = np.random.default_rng(0).integers(0, len(difference), (1000, len(difference)))
    low, high = np.quantile(difference[resampled].sum(axis=1), [0.005, 0.995])
    old, new = (100 * float(errors[:, 0].sum() / words) for errors in (before, after))
    return Change(case, "WER, %", old, new, bool(low > 0 or high < 0), "worse")


def changes(new: Record, old: Record) -> str:
    """Return the changes since an earlier result as Markdown."""
    lines = [
        [
            " ".join(f"{key} {value}" for key, value in change.case.items()),
            change.metric,
            tables.digits(change.before),
            tables.digits(change.after),
            f"{change.after / change.before:.2f}" if change.before else "",
            f"**{change.verdict}**" if change.verdict else "within noise",
        ]
        for change in compare(new, old)
    ]
    if not lines:
        return f"No comparable case in the {old['benchmark']} result of {old['time']}.\n"
    differing = [key for key in ("hardware", "model") if new[key] != old[key]]
    differing += ["device"] if new["method"].get("device") != old["method"].get("device") else []
    warning = "".join(
        f" **The {key} differs**, so the comparison does not show the effect of the code." for key in differing
    )
    table = tables.markdown(["case", "metric", "before", "after", "after ÷ before", ""], lines)
    title = f"### Changes since {old['time']}, commit {old['commit'] or 'unknown'}"
    return f"{title}\n\nTimes are medians.{warning}\n\n{table}\n"


# -- the pages ---------------------------------------------------------------------------------------------------------


def pages(root: Path) -> dict[Path, str]:
    """Return the texts of README.md and docs/performance.md generated from the results in `root`/benchmarks/results."""
    results = committed(root)
    performance = [
        "# Performance",
        "",
        "This page is generated by `nemostream bench report --pages` from the results in `benchmarks/results`. The",
        "docstring of each module in `benchmarks/` explains what is measured and how to read the figures. Times are in",
        "milliseconds. Percentiles use the nearest-rank method; with fewer than 100 samples p99 is the maximum. Model",
        "*random-0.6b* has the shape of the published model and random weights (`nemostream bench synthetic`); *demo*",
        "is the packaged model.",
    ]
    for name, result in results.items():
        pictures = [
            f"![{chart.title}](../benchmarks/results/{name}-{kind}.svg)" for kind, chart in charts(result).items()
        ]
        performance += ["", f"## {name}", "", show(result).rstrip(), "", *pictures]
    readme = (root / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(_BEGIN)
    _, after = rest.split(_END)
    overviews = [f"![{chart.title}](benchmarks/results/{name}.svg)" for name, (chart, _) in _overviews(results).items()]
    section = [_BEGIN, "", *overviews, "", *_headlines(results), "", _END]
    return {
        root / "README.md": before + "\n".join(section) + after,
        root / "docs" / "performance.md": "\n".join(performance).rstrip() + "\n",
    }


def committed(root: Path) -> dict[str, Record]:
    """Return the results in the repository by file name, without those that only other pages quote."""
    found = {}
    for path in sorted((root / "benchmarks" / "results").glob("*.json*")):
        result = records.load(path)
        if result.get("schema") == records.SCHEMA and hasattr(_module(result), "show"):
            found[path.name.partition(".")[0]] = result
    return found


def merge(results: Sequence[Record]) -> list[Record]:
    """Merge results of the same benchmark, model, machine and method: all rows, with the head of the first result."""
    merged: dict[str, Record] = {}
    for result in results:
        setup = {name: result[name] for name in ("benchmark", "hardware", "model", "versions")}
        method = {name: value for name, value in result["method"].items() if name not in _PER_RUN}
        group = merged.setdefault(json.dumps([setup, method], sort_keys=True), {**result, "rows": []})
        group["rows"] = [*group["rows"], *result["rows"]]
    return list(merged.values())


def _overviews(results: dict[str, Record]) -> dict[str, tuple[Chart, str]]:
    """Return the plots of the README by name, each with its footer."""
    found: dict[str, tuple[Chart, str]] = {}
    for result in merge(list(results.values())):
        if hasattr(_module(result), "overview"):
            name, chart = _module(result).overview(result)
            setup = [result[key] for key in ("benchmark", "hardware", "model")]
            sources = [
                each for each in results.values() if [each[k] for k in ("benchmark", "hardware", "model")] == setup
            ]
            found.setdefault(name, (chart, footer(sources)))
    return found


def _headlines(results: dict[str, Record]) -> list[str]:
    """Return a bullet of each benchmark's first result that has a headline."""
    lines: dict[str, str] = {}
    for result in merge(list(results.values())):
        if hasattr(_module(result), "headline") and (line := _module(result).headline(result)):
            lines.setdefault(result["benchmark"], f"* {line}")
    return [
        *lines.values(),
        "",
        "All tables, plots, methods and machines are in [docs/performance.md](docs/performance.md).",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="nemostream bench report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT", help="JSON files written by benchmarks")
    parser.add_argument(
        "--against", nargs="+", type=Path, default=[], metavar="RESULT", help="earlier results to compare with"
    )
    parser.add_argument("--out", type=Path, default=records.FOLDER / "report.md", help="Markdown file to write")
    parser.add_argument("--pages", action="store_true", help="write the README section and docs/performance.md")
    options = parser.parse_args(arguments)
    try:
        if not options.results and not options.pages:
            raise OptionError("nothing to report: give RESULT files or --pages.")
        if options.results:
            results, against = ([records.read(path) for path in paths] for paths in (options.results, options.against))
            print(write_report(results, options.out, against)[0], end="")
        if options.pages:
            found, folder = committed(ROOT), ROOT / "benchmarks" / "results"
            for name, result in found.items():
                for kind, chart in charts(result).items():
                    plots.write(chart, folder / f"{name}-{kind}.svg", footer([result]))
            for name, (chart, source) in _overviews(found).items():
                plots.write(chart, folder / f"{name}.svg", source)
            for path, text in pages(ROOT).items():
                path.write_text(text, encoding="utf-8")
                records.report_progress(f"written: {path}")
    except NemostreamError as error:
        records.report_progress(f"nemostream: {error}")
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
