"""`nemostream serve` with the null backend, to measure the transports.

    python -m nemostream.benchmarks.harness.null_server --stage all --step-ms 5 -- OPTIONS OF nemostream serve

With `--stage receive`, sessions discard the audio that they receive; with `--stage session` they process it, but return
no events; `all` is the whole server. The differences between the three are the costs of the session and of sending.

With `--transports` among the options of `nemostream serve`, the supervisor starts this module for its processes too;
they find the options in the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemostream import engines
from nemostream.benchmarks.harness.host_layers import StepMeter
from nemostream.benchmarks.harness.null_backend import NullBackend, script
from nemostream.bundle import Bundle
from nemostream.runtime.text.events import Event
from nemostream.serving import server, service
from nemostream.serving.processes import engine, supervisor, transport
from nemostream.serving.session import OnPushed, Session

_OPTIONS = "NULL_SERVER_OPTIONS"  # environment variable: stage, duration of a step, file of the report
_REPORT_SECONDS = 0.2  # between two reports
_MODULE = "nemostream.benchmarks.harness.null_server"


class _ReceivingSession(Session):
    async def push(self, data: bytes) -> list[Event]:
        return []

    def start_push(self, data: bytes, on_pushed: OnPushed, message_bytes: int = 0) -> bool:
        on_pushed([])
        return True


class _SilentSession(Session):
    async def push(self, data: bytes) -> list[Event]:
        await super().push(data)
        return []

    def start_push(self, data: bytes, on_pushed: OnPushed, message_bytes: int = 0) -> bool:
        def without_events(result: list[Event] | Exception) -> None:
            on_pushed(result if isinstance(result, Exception) else [])

        return super().start_push(data, without_events, message_bytes)


_SESSIONS: dict[str, type[Session]] = {"receive": _ReceivingSession, "session": _SilentSession, "all": Session}
STAGES = tuple(_SESSIONS)


def install(stage: str, step_ms: float, report: Path | None) -> None:
    """Make this process use the null backend and the sessions of a stage.

    If it opens the backend, it writes that backend's CPU seconds, rows and steps to the file `report` every
    `_REPORT_SECONDS`.
    """

    def open_backend(bundle: Bundle, *, capacity: int, max_batch: int | None, **_: Any) -> StepMeter:
        meter = StepMeter(NullBackend(bundle.manifest, script(bundle), capacity, max_batch, step_ms=step_ms))
        if report is not None:
            threading.Thread(target=_write_reports, args=(meter, report), daemon=True).start()
        return meter

    # `nemostream serve` has no option for a backend without a model.
    engines.open_backend = open_backend  # type: ignore[assignment]
    service.Session = _SESSIONS[stage]  # type: ignore[misc]


def _write_reports(meter: StepMeter, path: Path) -> None:
    new = path.with_suffix(".new")
    while path.parent.exists():
        new.write_text(json.dumps([meter.seconds["backend"], meter.rows, meter.steps]))
        os.replace(new, path)
        time.sleep(_REPORT_SECONDS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server, or a process of its supervisor."""
    if _OPTIONS in os.environ:
        options = json.loads(os.environ[_OPTIONS])
        install(options["stage"], options["step_ms"], options["report"] and Path(options["report"]))
        return engine.main() if sys.argv[1] == "engine" else transport.main()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stage", choices=STAGES, default=STAGES[-1], help="what is run of each stream")
    parser.add_argument("--step-ms", type=float, default=0.0, help="duration of a step of the backend")
    parser.add_argument("--report", type=Path, help="file for CPU seconds, rows and steps of the null backend")
    parser.add_argument("options", nargs="*", help="options of nemostream serve")
    found = parser.parse_args(arguments)
    install(found.stage, found.step_ms, found.report)
    report = found.report and str(found.report.absolute())
    os.environ[_OPTIONS] = json.dumps({"stage": found.stage, "step_ms": found.step_ms, "report": report})
    supervisor.MODULES.update(engine=_MODULE, transport=_MODULE)
    server.main(found.options)


if __name__ == "__main__":
    main()
