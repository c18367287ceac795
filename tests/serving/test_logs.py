"""Log lines: JSON, and text for people."""

from __future__ import annotations

import json
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.serving import logs


def record(message: str = "the event", level: str = "WARNING", **fields: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "levelname": level, "created": 86399.25, "msecs": 250.9, **fields})


def failed() -> Any:
    try:
        raise ValueError("the cause")
    except ValueError:
        return sys.exc_info()


def test_json_log_lines() -> None:
    line = logs.JsonLines().format(record(stream="x", number=7, nothing=None, path=SimpleNamespace))
    assert json.loads(line) == {
        "time": "1970-01-01T23:59:59.250Z",
        "level": "warning",
        "event": "the event",
        "stream": "x",
        "number": 7,
        "nothing": None,
        "path": str(SimpleNamespace),
    }
    assert "ValueError: the cause" in json.loads(logs.JsonLines().format(record(exc_info=failed())))["error"]


def test_text_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.time, "localtime", logs.time.gmtime)
    line = logs.TextLines().format(record(stream="x", number=7, nothing=None, empty="", words="a b", tab="a\tb"))
    assert line == '23:59:59 warning the event stream=x number=7 empty="" words="a b" tab="a\\tb"'
    assert logs.TextLines().format(record("a\x1bb")) == '23:59:59 warning "a\\u001bb"'
    first, *trace = logs.TextLines().format(record(exc_info=failed())).splitlines()
    assert first == "23:59:59 warning the event" and trace[-1] == "ValueError: the cause"


@pytest.mark.parametrize("text", [False, True])
def test_the_log_is_written_to_standard_error(text: bool, capfd: pytest.CaptureFixture[str]) -> None:
    root, uvicorn, errors = (logging.getLogger(name) for name in (None, "uvicorn", "uvicorn.error"))
    before = root.handlers[:], root.level, uvicorn.level, errors.filters[:]
    try:
        logs.log_to_stderr(text)
        logging.getLogger("nemostream.serving").info("hello", extra={"number": 7})
        logging.getLogger("nemostream.serving").debug("not shown")
        logging.getLogger("uvicorn.error").info("not shown")
        errors.warning("ASGI callable returned without completing handshake.")
        errors.warning("shown")
    finally:
        root.handlers[:], root.level, uvicorn.level, errors.filters[:] = before
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert len(lines) == 2 and not out and "not shown" not in err
    if text:
        assert lines[0].endswith(" info hello number=7") and lines[1].endswith(" warning shown")
    else:
        assert json.loads(lines[0])["number"] == 7 and json.loads(lines[1])["event"] == "shown"


def test_lines_have_the_name_of_their_process(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        logs.log_to_stderr(False, "transport-1")
        logging.getLogger("nemostream.serving").info("hello", extra={"number": 7})
        logging.getLogger("other").warning("more")
    finally:
        root.handlers[:], root.level = before
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["event"], line["worker"]) for line in lines] == [("hello", "transport-1"), ("more", "transport-1")]
