"""Format figures as text: significant digits, percentages and Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_OTHER_CORES = 0.1  # cores used by other processes beyond which CPU figures are unreliable


def digits(number: float) -> str:
    """Return about three significant digits, without an exponent."""
    if number == 0:
        return "0"
    size = abs(number)
    places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{number:.{places}f}"


def spread(samples: Sequence[float]) -> str:
    """Return "median [minimum–maximum]"."""
    return f"{digits(statistics.median(samples))} [{digits(min(samples))}–{digits(max(samples))}]"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 stream" or "8 streams"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def percent(share: float | None, places: int = 2) -> str:
    """Return a percentage; an empty string for None."""
    return "" if share is None else f"{100 * share:.{places}f} %"


def low_to_high(low: float, high: float, form: str = "{:.1f}") -> str:
    """Return "LOW to HIGH", or only one number if both have the same text."""
    first, second = form.format(low), form.format(high)
    return first if first == second else f"{first} to {second}"


def verdict(values: Mapping[str, Any]) -> str:
    """Return whether a row passed, or its failures."""
    return "yes" if values["passed"] else "no: " + "; ".join(values["failures"])


def machine(hardware: Mapping[str, Any]) -> str:
    """Return the GPU of a result, or its CPU and number of cores."""
    return hardware.get("gpu") or f"{hardware['cpu']}, {counted(hardware['cores'], 'core')}"


def other_load(cores: Iterable[float]) -> str:
    """Return a sentence about the largest load by other processes, in cores."""
    highest = max(cores, default=0.0)
    warning = "" if highest <= MAX_OTHER_CORES else ": **the figures are unreliable**"
    return f"Other processes used {highest:.2f} cores{warning}."


def rates(machine: Mapping[str, float]) -> str:
    """Return the measured rates of a machine as text; `machine` has GB/s of memory and GFLOP/s of products by name."""
    units = {name: "GB/s" if name.startswith(("read", "copy")) else "GFLOP/s" for name in machine}
    return "; ".join(f"{name} {rate:.0f} {units[name]}" for name, rate in machine.items()) or "none"


def markdown(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; columns that are empty in every line are omitted."""
    kept = [column for column in range(len(head)) if any(str(line[column]) for line in lines)]
    rows = [[head[column] for column in kept], ["---"] * len(kept)]
    rows += [[str(line[column]) for column in kept] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
