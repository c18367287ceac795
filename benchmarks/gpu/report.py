"""What a GPU check found, as Markdown, and beside it what a full-size model shall reach on an H100."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemostream.benchmarks.harness import tables

Report = dict[str, Any]

STREAMS = {80: 2400, 160: 4000, 560: 6000, 1120: 8000}  # by chunk size
_MANY = 1024  # rows of the largest steps: with 4,000 streams and more, what is launched


@dataclass(frozen=True)
class Goal:
    """`found` is None where a report does not have it; of `most` less is better, otherwise more."""

    what: str
    wanted: float
    most: bool
    found: float | None

    @property
    def reached(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.wanted if self.most else self.found >= self.wanted


def goals(report: Report) -> Iterator[Goal]:
    """In the order in which they were set. Of steps without an encoder nothing is said: they reach too much."""
    speed = report.get("speed", {})
    whole_steps = [row for row in speed.get("rows", []) if not row["encoder"].startswith("none")]
    rows = {(row["chunk_ms"], row["batch"]): row for row in whole_steps}

    def of(chunk_ms: int, batch: int, value: Callable[[Report], float]) -> float | None:
        try:
            return value(rows[chunk_ms, batch])
        except KeyError:
            return None

    whole = "PCM to tokens, 80 ms, batch 1"
    yield Goal("encoder, 80 ms, batch 1, ÷ its floor", 2.2, True, of(80, 1, lambda r: r["encoder_ms"] / r["floor_ms"]))
    yield Goal(f"{whole}, p50, ms", 1.5, True, of(80, 1, lambda r: r["p50_ms"]))
    yield Goal(f"{whole}, p99, ms", 2.5, True, of(80, 1, lambda r: r["p99_ms"]))
    for side, times in (("NeMo, bf16", 15), ("NeMo, graph", 3)):
        yield Goal(f"{side}, 80 ms, batch 1, ÷ ours", times, False, _ratio(report, side))
    streams = speed.get("streams", {}) if whole_steps else {}
    for ms, many in STREAMS.items():
        yield Goal(f"streams in real time at {ms} ms", many, False, streams.get(ms, streams.get(f"{ms}")))
    decoding = of(560, 64, lambda r: 1 - r["undecoded_ms"] / r["whole_ms"])
    yield Goal("decoding's share of a step, 560 ms, batch 64", 0.10, True, decoding)
    host = [of(ms, _MANY, lambda r: r["host_ms"] / r["pipelined_ms"]) for ms in STREAMS]
    known = [share for share in host if share is not None]
    yield Goal(f"the host's share of a step, batch {_MANY}, at worst", 0.05, True, max(known, default=None))


def _ratio(report: Report, side: str) -> float | None:
    """How many times ours it takes."""
    for row in report.get("baseline", {}).get("rows", []):
        if row["case"] == {"chunk_ms": 80, "batch": 1, "side": side}:
            return next((float(times["median"]) for times in row["values"]["times"].values()), None)
    return None


def _goals_table(report: Report) -> str:
    """A table, as Markdown; empty if the report has none of the figures."""
    found = list(goals(report))
    if all(goal.found is None for goal in found):
        return ""
    verdict = {True: "reached", False: "missed", None: "not measured"}
    lines = [
        [
            goal.what,
            f"{'≤' if goal.most else '≥'} {tables.digits(goal.wanted)}",
            "–" if goal.found is None else tables.digits(goal.found),
            verdict[goal.reached],
        ]
        for goal in found
    ]
    return tables.markdown(["to reach on an H100", "goal", "found", ""], lines)


def show(report: Report) -> str:
    """The report as Markdown."""
    lines = ["# GPU check", ""]
    env = report.get("environment", {})
    lines += [f"{env.get('nvidia_smi') or env.get('gpu')}; commit {env.get('commit')}; {report['seconds']:.0f} s", ""]
    for name, section in report.items():
        if not isinstance(section, dict) or name == "environment":
            continue
        if "error" in section:
            lines.append(f"* **{name}**: not done: {section['error']}")
        elif name != "speed":  # which has a table
            told = {k: v for k, v in section.items() if not isinstance(v, list | dict)}
            lines.append(f"* **{name}**: {told or 'see the JSON'}")
    rows = report.get("speed", {}).get("rows", [])
    if rows:
        columns = {
            "p50 ms": "p50_ms",
            "p99 ms": "p99_ms",
            "silent p50": "silent_p50_ms",
            "gathered p50": "gathered_p50_ms",
            "boosted p50": "boosted_p50_ms",
            "pipelined": "pipelined_ms",
            "host": "host_ms",
            "encoder": "encoder_ms",
            "undecoded": "undecoded_ms",
            "floor": "floor_ms",
            "tokens/s": "tokens_per_second",
        }
        lines += ["", f"Encoder: {rows[0]['encoder']}.", "", f"| chunk | batch | {' | '.join(columns)} |"]
        lines.append("|---" * (2 + len(columns)) + "|")
        for row in rows:
            figures = (f"{row[field]:.2f}" if field in row else "–" for field in columns.values())
            lines.append(f"| {row['chunk_ms']} ms | {row['batch']} | {' | '.join(figures)} |")
    if reached := _goals_table(report):
        lines += ["", reached]
    return "\n".join(lines) + "\n"


def joined(before: Report, report: Report) -> Report:
    """The report, with the other sections of the one before if that was made here, of the same code."""
    if before.get("environment") != report.get("environment"):
        return report
    return before | report | {"seconds": before["seconds"] + report["seconds"]}
