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


# Sections of each library: the comparison of tokens, and the speed of a full-size model.
_LIBRARIES = {
    "TensorRT": ("tokens_tensorrt", "speed_tensorrt"),
    "TensorRT for RTX": ("tokens_tensorrt_rtx", "speed_tensorrt_rtx"),
    "ONNX Runtime": ("tokens_onnxruntime", "speed_onnxruntime"),
}
# How a section without a result ended.
_OUTCOMES = {"error": "failed", "unavailable": "not available", "not_run": "not run"}


def verdict(report: Report) -> list[str]:
    """Return the first lines of the report: whether the tokens are correct, and the first step time.

    Empty if the report has none of these sections.
    """
    if not any(section in report for sections in _LIBRARIES.values() for section in sections):
        return []
    equal = {name: report.get(tokens, {}).get("equal") for name, (tokens, _) in _LIBRARIES.items()}
    correct = [name for name, value in equal.items() if value]
    wrong = [name for name, value in equal.items() if value is False]
    lines = []
    if wrong:
        lines.append(f"**Incorrect**: tokens differ from those of the CPU backend with {_list(wrong)}.")
    if correct:
        beginning = "Tokens equal" if wrong else "**Correct**: tokens equal"
        lines.append(f"{beginning} those of the CPU backend with {_list(correct)}.")
    if not lines:
        lines.append("**No verdict**: no library has run to the end of the comparison of tokens.")
    lines.append(_first_step_time(report))
    return lines


def _list(names: list[str]) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def _first_step_time(report: Report) -> str:
    for index, model in ((1, "full-size model"), (0, "packaged model (small)")):
        for name, sections in _LIBRARIES.items():
            for row in report.get(sections[index], {}).get("rows", []):
                return (
                    f"**Step time**: {tables.digits(row['p50_ms'])} ms (p50) for {row['batch']} streams at "
                    f"{row['chunk_ms']} ms, {model}, {name} fp16."
                )
    return "**Step time**: none was measured."


def _verdict_table(report: Report) -> str:
    """Return a Markdown table of the first sections."""
    lines = []
    for name, sections in _LIBRARIES.items():
        tokens, speed = (report.get(section, {}) for section in sections)
        if tokens or speed:
            built = speed.get("engine_bytes")
            size = f"{built / 1e9:.2f}" if built else "–"
            lines.append([name, _tokens(tokens), _step_times(tokens), _step_times(speed), size])
    head = ["library, fp16", "tokens", "packaged model, p50 ms", "full-size model, p50 ms", "its engine, GB"]
    return tables.markdown(head, lines)


def _tokens(section: Report) -> str:
    if section.get("validation_error"):
        return "engine failed validation"
    if "equal" not in section:
        return _outcome(section)
    if section["equal"]:
        return f"equal ({section['tokens']} in {section['streams']} streams)"
    return f"different in {section['different_streams']} of {section['streams']} streams"


def _step_times(section: Report) -> str:
    """Return the median times by batch size ("1: 2.1, 8: 4.3")."""
    times = ", ".join(f"{row['batch']}: {tables.digits(row['p50_ms'])}" for row in section.get("rows", []))
    return times or _outcome(section)


def _outcome(section: Report) -> str:
    return next((text for key, text in _OUTCOMES.items() if key in section), "–")


def show(report: Report) -> str:
    """Return the report as Markdown."""
    lines = ["# GPU check", ""]
    if found := verdict(report):
        lines += [*(f"* {line}" for line in found), "", _verdict_table(report), ""]
    env = report.get("environment", {})
    lines += [f"{env.get('nvidia_smi') or env.get('gpu')}; commit {env.get('commit')}; {report['seconds']:.0f} s", ""]
    not_run: dict[str, list[str]] = {}  # names of sections by reason
    for name, section in report.items():
        if not isinstance(section, dict) or name == "environment":
            continue
        if "not_run" in section:
            not_run.setdefault(section["not_run"], []).append(name)
        elif "unavailable" in section:
            lines.append(f"* **{name}**: not available: {section['unavailable']}")
        elif "error" in section:
            lines.append(f"* **{name}**: failed: {section['error']}")
        elif name != "speed":  # shown as a table below
            values = {key: value for key, value in section.items() if not isinstance(value, list | dict)}
            lines.append(f"* **{name}**: {values or 'see the JSON file'}")
    for reason, names in not_run.items():
        lines += ["", f"Not run ({reason}); run them with `--only {' '.join(names)}`."]
    sections = [sections[1] for sections in _LIBRARIES.values()] + ["speed"]
    rows = [row for section in sections for row in report.get(section, {}).get("rows", [])]
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
            "slot copy": "copy_ms",
        }
        head = ["engine", "chunk", "batch", *columns]
        figures = [
            [
                row["encoder"],
                f"{row['chunk_ms']} ms",
                row["batch"],
                *(f"{row[field]:.2f}" if field in row else "–" for field in columns.values()),
            ]
            for row in rows
        ]
        lines += ["", tables.markdown(head, figures)]
    if table := _targets_table(report):
        lines += ["", table]
    return "\n".join(lines) + "\n"


def joined(before: Report, report: Report) -> Report:
    """Add the other sections of an earlier report if it has the same environment (machine, libraries, commit).

    Sections that have not run do not replace earlier results.
    """
    if before.get("environment") != report.get("environment"):
        return report
    new = {
        name: section
        for name, section in report.items()
        if name not in before or not (isinstance(section, dict) and "not_run" in section)
    }
    return before | new | {"seconds": before["seconds"] + report["seconds"]}
