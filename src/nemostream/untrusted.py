"""Reading files that may be malformed or hostile: bounded in size, regular files only, every field checked.

Manifests, descriptions of engines and saved states are data that somebody else may have written. The functions here
raise `ValueError` (`OSError` where a file cannot be read) with a sentence fragment that states what is wrong, the value
and what is allowed; the callers add the file's name and the remedy, and raise their own class of `nemostream.errors`.

What the module does not know: what any of the files means.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

Check = Callable[[Any, str], Any]  # (value, the field's name) -> the value to use; raises `ValueError`
T = TypeVar("T")

MIB = 1 << 20

# -- files -------------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. Raises `OSError` for anything but a regular file.

    Opening a FIFO blocks until somebody writes to it, and a device may block or never end: the file is opened without
    blocking, and checked by its descriptor, so that it cannot be exchanged between the two.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises `OSError`, and `ValueError` for a larger one."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than the limit of {most} bytes")
    return content


def regular_inside(folder: Path, name: str) -> Path:
    """The path of the regular file `name` in a folder. Raises `ValueError` if there is none.

    A symbolic link is followed as long as it stays inside the folder.
    """
    path = folder / relative_name(name, "file")
    try:
        whole = path.resolve(strict=True)
        mode = whole.stat().st_mode
        root = folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ValueError("is missing") from error
    if not whole.is_relative_to(root):
        raise ValueError(f"leads outside the folder, to {whole}")
    if not stat.S_ISREG(mode):
        raise ValueError("is not a regular file")
    return path


# -- JSON --------------------------------------------------------------------------------------------------------------


def parse_json(content: bytes | str) -> Any:
    """A JSON document in UTF-8. Raises `ValueError` for anything else, whatever its depth.

    NaN and infinities, which JSON does not have, and halves of surrogate pairs, which cannot be printed, are rejected.
    """
    try:
        document = json.loads(content, parse_constant=_no_constant)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


# -- fields ------------------------------------------------------------------------------------------------------------


def short_repr(value: Any, most: int = 80) -> str:
    """`repr` of a value, cut to a length that fits into a sentence."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def invalid(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{name} is {short_repr(value)}; it must be {allowed}")


def integer(least: int, most: int) -> Check:
    """An integer. A bool or a float with an integral value is none."""

    def check(value: Any, name: str) -> int:
        if type(value) is not int or not least <= value <= most:
            raise invalid(name, value, f"a whole number from {least} to {most}")
        return value

    return check


def number(least: float, most: float) -> Check:
    """A finite number, whole or not."""

    def check(value: Any, name: str) -> int | float:
        # Compared before converted: an integer may be too large for a float.
        if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):
            raise invalid(name, value, f"a number from {least:g} to {most:g}")
        return value

    return check


def text(pattern: str = r".{0,1000}", allowed: str = "a short printable text") -> Check:
    """A string that matches the pattern as a whole."""
    compiled = re.compile(pattern)

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value) or not value.isprintable():
            raise invalid(name, value, allowed)
        return value

    return check


SHA256 = text(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")


def one_of(*allowed: Any) -> Check:
    def check(value: Any, name: str) -> Any:
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise invalid(name, value, f"one of {', '.join(map(str, allowed))}")
        return value

    return check


def relative_name(value: Any, name: str) -> str:
    """A file's name relative to its folder, spelled plainly: no absolute path, no `..`, no backslash."""
    if (
        not isinstance(value, str)
        or not value.isprintable()
        or not 0 < len(value) <= 1000
        or "\\" in value
        or ":" in value
        or any(not part or part.strip(".") == "" or len(part.encode()) > 255 for part in value.split("/"))
        or PurePosixPath(value).is_absolute()
    ):
        raise invalid(name, value, "the name of a file inside the folder")
    return value


def plain_name(value: Any, name: str) -> str:
    """A file's name without any folder."""
    if "/" in relative_name(value, name):
        raise invalid(name, value, "the name of a file, without a folder")
    return str(value)


def mapping(value: Any, name: str) -> dict[str, Any]:
    """A JSON object, its values unchecked."""
    if not isinstance(value, dict):
        raise invalid(name, value, "an object")
    return value


def mapping_of(check: Check, most: int = 10_000) -> Check:
    def checked(value: Any, name: str) -> dict[str, Any]:
        if len(mapping(value, name)) > most:
            raise invalid(name, f"an object of {len(value)} entries", f"one of at most {most}")
        return {key: check(entry, f"{name}.{short_repr(key)[1:-1]}") for key, entry in value.items()}

    return checked


def list_of(check: Check, least: int = 0, most: int = 10_000) -> Check:
    """A JSON array, as a tuple."""

    def checked(value: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            found = f"a list of {len(value)}" if isinstance(value, list) else value
            raise invalid(name, found, f"a list of {least} to {most} values")
        return tuple(check(entry, f"{name}[{index}]") for index, entry in enumerate(value))

    return checked


def dataclass_of(kind: type[T], **checks: Check) -> Check:
    """A JSON object with exactly the fields of a dataclass, each checked, as an instance of it."""
    names = tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    assert set(names) == set(checks), f"{kind.__name__}: every field has a check"

    def checked(value: Any, name: str) -> T:
        return kind(**fields(value, name, checks))

    return checked


def fields(value: Any, name: str, checks: Mapping[str, Check]) -> dict[str, Any]:
    """The fields of a JSON object, which must have these and no others."""
    found = mapping(value, name or "the document")
    prefix = f"{name}." if name else ""
    for missing in (field for field in checks if field not in found):
        raise ValueError(f"the field '{missing}'{f' of {name}' if name else ''} is missing")
    for surprise in (field for field in found if field not in checks):
        raise ValueError(f"the field {short_repr(surprise)}{f' of {name}' if name else ''} is unknown")
    return {field: check(found[field], prefix + field) for field, check in checks.items()}
