"""Report of the GPU check as Markdown, with the performance targets of a full-size model on an H100."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemostream.benchmarks.harness import tables

Report = dict[str, Any]

STREAMS = {80: 2400, 160: 4000, 560: 6000, 1120: 8000}  # target number of streams by chunk size in ms
_LARGE_BATCH = 1024  # batch of the steps with 4,000 and more streams


@dataclass(frozen=True)
class Target:
    """A performance target and the measured value, None if not measured.

    `target` is a maximum if `is_maximum`, else a minimum.
    """

    name: str
    target: float
    is_maximum: bool
    measured: float | None

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.target if self.is_maximum else self.measured >= self.target


def targets(report: Report) -> Iterator[Target]:
    """Return all targets. Steps without an encoder do not count."""
    speed = report.get("speed", {})
    whole_steps = [row for row in speed.get("rows", []) if not row["encoder"].startswith("none")]
    rows = {(row["chunk_ms"], row["batch"]): row for row in whole_steps}

    def value(chunk_ms: int, batch: int, compute: Callable[[Report], float]) -> float | None:
        try:
            return compute(rows[chunk_ms, batch])
        except KeyError:
            return None

    relative = value(80, 1, lambda row: row["encoder_ms"] / row["roofline_ms"])
    yield Target("encoder, 80 ms, batch 1, ÷ roofline", 2.2, True, relative)
    step = "PCM to tokens, 80 ms, batch 1"
    yield Target(f"{step}, p50, ms", 1.5, True, value(80, 1, lambda row: row["p50_ms"]))
    yield Target(f"{step}, p99, ms", 2.5, True, value(80, 1, lambda row: row["p99_ms"]))
    for runner, ratio in (("NeMo, bf16", 15), ("NeMo, graph", 3)):
        yield Target(f"{runner}, 80 ms, batch 1, ÷ nemostream", ratio, False, _relative_time(report, runner))
    streams = speed.get("streams", {}) if whole_steps else {}
    for ms, count in STREAMS.items():
        yield Target(f"real-time streams at {ms} ms", count, False, streams.get(ms, streams.get(f"{ms}")))
    decoding = value(560, 64, lambda row: 1 - row["undecoded_ms"] / row["whole_ms"])
    yield Target("share of decoding in a step, 560 ms, batch 64", 0.10, True, decoding)
    host = [value(ms, _LARGE_BATCH, lambda row: row["host_ms"] / row["pipelined_ms"]) for ms in STREAMS]
    worst = max((share for share in host if share is not None), default=None)
    yield Target(f"largest share of the host in a step, batch {_LARGE_BATCH}", 0.05, True, worst)


def _relative_time(report: Report, runner: str) -> float | None:
    """Return the time of a runner relative to nemostream, or None."""
    for row in report.get("baseline", {}).get("rows", []):
        if row["case"] == {"chunk_ms": 80, "batch": 1, "runner": runner}:
            return next((float(each["median"]) for each in row["values"]["relative_time"].values()), None)
    return None


def _targets_table(report: Report) -> str:
    """Return a Markdown table of the targets; empty if nothing was measured."""
    found = list(targets(report))
    if all(target.measured is None for target in found):
        return ""
    verdict = {True: "reached", False: "missed", None: "not measured"}
    lines = [
        [
            target.name,
            f"{'≤' if target.is_maximum else '≥'} {tables.digits(target.target)}",
            "–" if target.measured is None else tables.digits(target.measured),
            verdict[target.reached],
        ]
        for target in found
    ]
    return tables.markdown(["target on an H100", "target", "measured", ""], lines)


def show(report: Report) -> str:
    """Return the report as Markdown."""
    lines = ["# GPU check", ""]
    env = report.get("environment", {})
    lines += [f"{env.get('nvidia_smi') or env.get('gpu')}; commit {env.get('commit')}; {report['seconds']:.0f} s", ""]
    for name, section in report.items():
        if not isinstance(section, dict) or name == "environment":
            continue
        if "error" in section:
            lines.append(f"* **{name}**: failed: {section['error']}")
        elif name != "speed":  # shown as a table below
            values = {key: value for key, value in section.items() if not isinstance(value, list | dict)}
            lines.append(f"* **{name}**: {values or 'see the JSON file'}")
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
            "roofline": "roofline_ms",
            "tokens/s": "tokens_per_second",
        }
        lines += ["", f"Encoder: {rows[0]['encoder']}.", "", f"| chunk | batch | {' | '.join(columns)} |"]
        lines.append("|---" * (2 + len(columns)) + "|")
        for row in rows:
            figures = (f"{row[field]:.2f}" if field in row else "–" for field in columns.values())
            lines.append(f"| {row['chunk_ms']} ms | {row['batch']} | {' | '.join(figures)} |")
    if table := _targets_table(report):
        lines += ["", table]
    return "\n".join(lines) + "\n"


def joined(before: Report, report: Report) -> Report:
    """Add the other sections of an earlier report if it has the same environment (machine, libraries, commit)."""
    if before.get("environment") != report.get("environment"):
        return report
    return before | report | {"seconds": before["seconds"] + report["seconds"]}
