"""The `--phrases` option."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nemostream.errors import OptionError

# A weight counts only after a phrase with a letter, so that 10:30 is a phrase.
_WEIGHTED = re.compile(r"(.*[^\W\d_].*):\s*([0-9.]+)", re.DOTALL)
_LOOKS_LIKE_A_FILE = re.compile(r"^(\.{0,2}/|~)|\.(txt|tsv|csv|lst|list)$")


def read_phrases(values: Sequence[str]) -> dict[str, float]:
    """Return phrases with their weights. Raises `OptionError`.

    Each value is a file, PHRASE, or PHRASE:WEIGHT. A line of a file is a phrase, optionally followed by a tab and its
    weight.
    """
    phrases: dict[str, float] = {}
    for value in values:
        if _is_file(value):
            phrases |= _read_file(Path(value))
            continue
        if _LOOKS_LIKE_A_FILE.search(value):
            raise OptionError(f"--phrases: no such file: {value} (to boost this text itself, put it into a file).")
        phrase, weight = value, 1.0
        if match := _WEIGHTED.fullmatch(value):
            phrase = match[1].rstrip()
            weight = _weight(match[2], f"--phrases {value}")
        phrases[phrase] = weight
    return phrases


def _read_file(path: Path) -> dict[str, float]:
    phrases = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OptionError(f"--phrases: {path} is not UTF-8 text.") from error
    except OSError as error:
        raise OptionError(f"--phrases: {path} cannot be read: {error.strerror or error}.") from error
    for number, line in enumerate(lines, 1):
        phrase, _, weight = (part.strip() for part in line.partition("\t"))
        if phrase:
            phrases[phrase] = _weight(weight or "1", f"--phrases: {path}, line {number}")
    return phrases


def _weight(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"{where}: {text!r} is not a weight; it must be a number.") from error


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # not a valid path
        return False
