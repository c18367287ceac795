"""Figures as text: Markdown tables, and as many digits as a figure deserves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

QUIET = 0.1  # cores that other work may take before the figures of a CPU mean little


def digits(number: float) -> str:
    """Three significant digits, never an exponent."""
    if number == 0:
        return "0"
    size = abs(number)
    places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{number:.{places}f}"


def spread(samples: Sequence[float]) -> str:
    """Median [least–most]."""
    return f"{digits(statistics.median(samples))} [{digits(min(samples))}–{digits(max(samples))}]"


def percent(share: float | None, places: int = 2) -> str:
    """Empty for None."""
    return "" if share is None else f"{100 * share:.{places}f} %"


def busy(cores: Iterable[float]) -> str:
    """A sentence on how much other work there was, of a figure or several."""
    most = max(cores, default=0.0)
    return f"Other work kept {most:.2f} cores busy{'' if most <= QUIET else ': **too much for these figures**'}."


def rates(machine: Mapping[str, float]) -> str:
    """What a machine reached, GB/s read and GFLOP/s."""
    return ", ".join(f"{name} {rate:.0f} G/s" for name, rate in machine.items()) or "nothing"


def markdown(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table; columns that are empty in every line are left out."""
    kept = [column for column in range(len(head)) if any(str(line[column]) for line in lines)]
    rows = [[head[column] for column in kept], ["---"] * len(kept)]
    rows += [[str(line[column]) for column in kept] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
