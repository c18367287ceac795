"""Reading files that may be malformed or hostile: bounded in size, regular files only, every field checked.

Manifests, engine descriptions and stream snapshots are untrusted data. The functions raise `ValueError` (`OSError` if a
file cannot be read) with a fragment of a sentence: the problem, the value and what is allowed. The callers add the file
name and the remedy, and raise a class of `nemostream.errors`.

This module does not depend on the meaning of the files.
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

Check = Callable[[Any, str], Any]  # (value, field name) -> validated value; raises `ValueError`
T = TypeVar("T")

MIB = 1 << 20

# -- files -------------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises `OSError` for any other kind of file.

    Opening a FIFO blocks until a writer opens it, and a device may block or never end, so the file is opened in
    non-blocking mode. Its kind is checked by descriptor, so that the file cannot be replaced between check and use.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Return the content of a regular file. Raises `OSError`, and `ValueError` if it is larger than `max_bytes`."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is larger than the limit of {max_bytes} bytes")
    return content


def regular_inside(folder: Path, name: str) -> Path:
    """Return the path of the regular file `name` in a folder. Raises `ValueError` if it does not exist.

    Symbolic links are followed if their target is inside the folder.
    """
    path = folder / relative_name(name, "file")
    try:
        resolved = path.resolve(strict=True)
        mode = resolved.stat().st_mode
        root = folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ValueError("is missing") from error
    if not resolved.is_relative_to(root):
        raise ValueError(f"leads outside the folder, to {resolved}")
    if not stat.S_ISREG(mode):
        raise ValueError("is not a regular file")
    return path


# -- JSON --------------------------------------------------------------------------------------------------------------


def parse_json(content: bytes | str) -> Any:
    """Parse a JSON document in UTF-8. Raises `ValueError` if it is invalid or nested too deeply.

    NaN and infinities, which are not JSON, and unpaired surrogates, which cannot be printed, are rejected.
    """
    try:
        document = json.loads(content, parse_constant=_reject_constant)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return document


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


# -- fields ------------------------------------------------------------------------------------------------------------


def short_repr(value: Any, max_length: int = 80) -> str:
    """Return `repr(value)`, truncated to a length that fits into a sentence."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: an integer with too many digits to print
        text = f"a {type(value).__name__}"
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def describe_invalid(details: Mapping[str, Any], secret: bool = False) -> str:
    """Return the message of one of pydantic's errors, with the value unless it is `secret`."""
    message = str(details["msg"]).removeprefix("Value error, ").split(", unable to")[0]
    return message.replace("Input should", f"{'the value' if secret else short_repr(details['input'])} must", 1)


def invalid(name: str, value: Any, allowed: str) -> ValueError:
    """Return the error for a field whose value is not allowed."""
    return ValueError(f"{name} is {short_repr(value)}; it must be {allowed}")


def integer(minimum: int, maximum: int) -> Check:
    """Accept an integer in a range; reject booleans, and floats with an integral value."""

    def check(value: Any, name: str) -> int:
        if type(value) is not int or not minimum <= value <= maximum:
            raise invalid(name, value, f"a whole number from {minimum} to {maximum}")
        return value

    return check


def number(minimum: float, maximum: float) -> Check:
    """Accept a finite integer or float in a range."""

    def check(value: Any, name: str) -> int | float:
        # The comparison is first: isfinite converts, and an integer may be too large for a float.
        if type(value) not in (int, float) or not minimum <= value <= maximum or not math.isfinite(value):
            raise invalid(name, value, f"a number from {minimum:g} to {maximum:g}")
        return value

    return check


def text(pattern: str = r".{0,1000}", allowed: str = "a short printable text") -> Check:
    """Accept a printable string that fully matches the pattern."""
    compiled = re.compile(pattern)

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value) or not value.isprintable():
            raise invalid(name, value, allowed)
        return value

    return check


SHA256 = text(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")


def one_of(*allowed: Any) -> Check:
    """Accept one of the values, of the same type."""

    def check(value: Any, name: str) -> Any:
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise invalid(name, value, f"one of {', '.join(map(str, allowed))}")
        return value

    return check


def relative_name(value: Any, name: str) -> str:
    """Accept a file name relative to its folder: no absolute path, no `.` or `..`, no backslash, no colon."""
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
    """Accept a file name without a folder."""
    if "/" in relative_name(value, name):
        raise invalid(name, value, "the name of a file, without a folder")
    return str(value)


def mapping(value: Any, name: str) -> dict[str, Any]:
    """Accept a JSON object; its values are not checked."""
    if not isinstance(value, dict):
        raise invalid(name, value, "an object")
    return value


def mapping_of(check: Check, max_length: int = 10_000) -> Check:
    """Accept a JSON object whose values pass the check."""

    def checked(value: Any, name: str) -> dict[str, Any]:
        if len(mapping(value, name)) > max_length:
            raise ValueError(f"{name} is an object of {len(value)} entries; it must be one of at most {max_length}")
        return {key: check(entry, f"{name}.{short_repr(key)[1:-1]}") for key, entry in value.items()}

    return checked


def list_of(check: Check, min_length: int = 0, max_length: int = 10_000) -> Check:
    """Accept a JSON array whose values pass the check; return a tuple."""

    def checked(value: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not min_length <= len(value) <= max_length:
            found = f"a list of {len(value)}" if isinstance(value, list) else short_repr(value)
            raise ValueError(f"{name} is {found}; it must be a list of {min_length} to {max_length} values")
        return tuple(check(entry, f"{name}[{index}]") for index, entry in enumerate(value))

    return checked


def dataclass_of(kind: type[T], **checks: Check) -> Check:
    """Accept a JSON object with exactly the fields of a dataclass, each checked; return an instance of it."""
    names = tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    assert set(names) == set(checks), f"{kind.__name__}: every field needs a check"

    def checked(value: Any, name: str) -> T:
        return kind(**fields(value, name, checks))

    return checked


def fields(value: Any, name: str, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Return the checked fields of a JSON object. Raises `ValueError` if fields are missing, unknown or invalid."""
    found = mapping(value, name or "the document")
    prefix = f"{name}." if name else ""
    for missing in (field for field in checks if field not in found):
        raise ValueError(f"the field '{missing}'{f' of {name}' if name else ''} is missing")
    for unknown in (field for field in found if field not in checks):
        raise ValueError(f"the field {short_repr(unknown)}{f' of {name}' if name else ''} is unknown")
    return {field: check(found[field], prefix + field) for field, check in checks.items()}
