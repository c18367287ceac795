"""Log lines of the server: text for people, or JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_RECORD_FIELDS = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}  # of every log record


def _extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _RECORD_FIELDS}


class TextLines(logging.Formatter):
    """Text for people: time, level, event, and its fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = [f"{name}={_one_line(value)}" for name, value in _extra_fields(record).items() if value is not None]
        line = " ".join([clock, record.levelname.lower(), _escaped(record.getMessage()), *fields])
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def _one_line(value: Any) -> str:
    """Return a value on one line: quoted, with control characters escaped, unless it is a plain word.

    Values may come from clients.
    """
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, event, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{clock}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"event": record.getMessage(), **_extra_fields(record)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(text: bool = False, process: str | None = None) -> None:
    """Write all log records to standard error, one line each: JSON, or with `text` plain text.

    `process` is added to every line, as field `worker`: the name of one of several processes of a server.
    """
    handler = logging.StreamHandler(sys.stderr)
    if process is not None:

        def add_name(record: logging.LogRecord) -> bool:
            record.worker = process
            return True

        handler.addFilter(add_name)
    handler.setFormatter(TextLines() if text else JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # its warnings are one per retry and per dropped span
    # uvicorn reports a WebSocket that was rejected with a response as incomplete; the server logs rejections itself.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing handshake" not in str(record.msg))
