"""Figures as text: Markdown tables, and as many digits as a figure deserves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


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


def markdown(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table; columns that are empty in every line are left out."""
    kept = [column for column in range(len(head)) if any(str(line[column]) for line in lines)]
    rows = [[head[column] for column in kept], ["---"] * len(kept)]
    rows += [[str(line[column]) for column in kept] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
