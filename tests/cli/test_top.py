"""`nemostream top`: the view, its lines without a terminal, and servers that are down, restarted or something else.

tests/serving/test_top.py runs it with real servers and streams.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from nemostream.cli import top
from nemostream.cli.top import Monitor, Server, View, bars_of, line

pytest.importorskip("prometheus_client", reason="needs the serve extra")


STARTED = time.time() - 11000


class Page(BaseHTTPRequestHandler):
    """Responds with what the test has set, and records the keys of requests."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.requests.append((self.path, self.headers.get("Authorization")))
        status, body, headers = server.answers.get(self.path, (404, "", {}))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: Any) -> None: ...


class Web:
    """A web server whose responses the test sets."""

    def __init__(self, port: int = 0) -> None:
        self.server: Any = ThreadingHTTPServer(("127.0.0.1", port), Page)
        self.server.answers, self.server.requests = {}, []
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, status: int, body: str = "", **headers: str) -> None:
        self.server.answers[path] = status, body, headers

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()


def metrics_of(streams: int = 12, steps: int = 0, errors: int = 0, started: float = 0.0, sizes: Any = (560,)) -> str:
    """Return metrics after `steps` steps of 11 streams, each of 30 ms, with latencies of 70 ms, and of each error."""
    rows = [
        'nemostream_info{version="0.1.0",model="nemotron-speech-streaming-en-0.6b",device="cuda",transports="2"} 1',
        f"nemostream_start_time_seconds {started or STARTED}",
        f'nemostream_streams{{transport="websocket"}} {streams}',
        'nemostream_streams{transport="riva"} 0',
        "nemostream_max_streams 64",
        "nemostream_uploads 1",
        "nemostream_degradation_level 2",
        f"nemostream_audio_seconds_total {12 * steps}",
        f"nemostream_timeouts_total {errors}",
        f"nemostream_step_failures_total {errors}",
        f"nemostream_state_errors_total {errors}",
        f"nemostream_final_fallbacks_total {errors}",
        f"nemostream_lanes_shed_total {errors}",
        *(f'nemostream_streams_rejected_total{{reason="{name}"}} {errors}' for name in ("CapacityError", "Draining")),
        *(f'nemostream_requests_denied_total{{reason="{name}"}} {errors}' for name in ("key", "origin", "host")),
        f'nemostream_streams_failed_total{{transport="websocket"}} {2 * errors}',
    ]

    def histogram(name: str, bounds: dict[str, int], total: float, label: str = "") -> None:
        count = steps * len(bounds) and steps
        for bound, reached in bounds.items():
            labels = ",".join(filter(None, [label, f'le="{bound}"']))
            rows.append(f"{name}_bucket{{{labels}}} {count * reached}")
        braces = f"{{{label}}}" if label else ""
        rows.extend([f"{name}_count{braces} {count}", f"{name}_sum{braces} {total * count}"])

    for ms in sizes:
        label = f'chunk_ms="{ms}"'
        histogram("nemostream_step_seconds", {"0.02": 0, "0.04": 1, "0.08": 1, "+Inf": 1}, 0.03, label)
        histogram("nemostream_latency_seconds", {"0.04": 0, "0.08": 1, "5.0": 1, "+Inf": 1}, 0.07, label)
    histogram("nemostream_step_streams", {"8.0": 0, "16.0": 1, "+Inf": 1}, 11)
    histogram("nemostream_step_waiting_streams", {"0.0": 1, "+Inf": 1}, 0)
    return "\n".join(rows) + "\n"


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic time of `top`, which only the test advances."""
    now = [500.0]
    monkeypatch.setattr(top.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def monitor(web: Web, seconds: list[float]) -> Callable[..., Monitor]:
    """A function that returns a monitor after so many seconds of a server."""

    def call(count: int = 40, **options: Any) -> Monitor:
        web.answer("/readyz", 200, '{"status": "ready"}')
        found = Monitor(Server(web.url, None))
        for second in range(count):
            seconds[0] += 1
            web.answer("/metrics", 200, metrics_of(steps=second + 1, **options))
            found.update()
        return found

    return call


def drawn(monitor: Monitor, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, highlight=False, record=True)
    console.print(View(monitor, height), end="")
    return console.export_text().splitlines()


# -- view --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 24), (60, 24), (60, 16), (40, 12), (120, 40), (200, 60)])
@pytest.mark.parametrize("options", [{}, {"errors": 3, "sizes": (80, 160, 560, 1120)}])
def test_the_view_fits_the_screen(
    monitor: Callable[..., Monitor], size: tuple[int, int], options: dict[str, Any]
) -> None:
    lines = drawn(monitor(**options), *size)
    assert max(map(len, lines)) <= size[0]
    assert len(lines) <= size[1] or size[1] < 24
    if size[1] >= 24:
        assert len(lines) >= min(size[1], 40) - 1  # it uses the screen
        assert lines[-1].startswith("╰") and any("Errors" in text for text in lines)


def test_what_the_view_shows(monitor: Callable[..., Monitor], web: Web) -> None:
    found = monitor(errors=3)
    text = "\n".join(lines := drawn(found, 100, 30))
    assert lines[0].split() == [
        *("nemostream", "0.1.0", "·", "nemotron-speech-streaming-en-0.6b", "·", "cuda", "·", "2", "transports"),
        web.url,
    ]
    assert re.match(r"● ready · up 3 h \d+ min ", lines[1])
    for part in ("12 of 64 open", "12.0 × real time", "0.0 waiting", "websocket 12 · recordings 1"):
        assert part in text, part
    assert "riva" not in text
    assert "batch 11.0, at most 16 · engine busy 3 % · degradation 2" in text
    # 40 to 80 ms and 20 to 40 ms, interpolated as Prometheus does
    assert "60 ms p50" in text and "78 ms p95" in text and "80 ms p99" in text
    (row,) = (one for one in lines if "560 ms" in one)
    assert row.strip("│ ").split() == ["560", "ms", "1.0", "30", "39", "40", "60", "78", "80"]
    assert "stream failed: websocket" in text and "0 in 60 s" in text and "6 in total" in text


def test_new_errors_are_first(monitor: Callable[..., Monitor], web: Web, seconds: list[float]) -> None:
    found = monitor(errors=3)
    seconds[0] += 1
    page = metrics_of(steps=41, errors=3)
    page = page.replace('denied_total{reason="origin"} 3', 'denied_total{reason="origin"} 8')
    web.answer("/metrics", 200, page)
    found.update()
    assert found.errors[0] == ("denied: origin", 5, 8)
    assert found.errors[1] == ("stream failed: websocket", 0, 6) and len(found.errors) == 11
    lines = drawn(found, 80, 24)
    index = next(index for index, text in enumerate(lines) if "Errors" in text)
    assert lines[index + 1].strip("│ ").split() == ["denied:", "origin", "5", "in", "60", "s", "8", "in", "total"]
    hidden = len(found.errors) - (len(lines) - index - 3)
    assert lines[-2].strip("│ ").startswith(f"{hidden} other kinds")


def test_no_errors(monitor: Callable[..., Monitor]) -> None:
    assert "none since the start of the server" in "\n".join(drawn(monitor(), 80, 24))


@pytest.mark.parametrize(
    ("latency", "style"), [(0.0, ""), (0.448, ""), (0.5, "yellow"), (0.56, "yellow"), (0.6, "bold red")]
)
def test_late_results_are_marked(latency: float, style: str) -> None:
    """0.8 of a chunk is where overload control reacts."""
    assert top._lateness(latency, 560) == style


def test_bars() -> None:
    assert bars_of([0, 1, 2, 4, 8, float("nan"), 8], 8, 1) == ["▁▁▂▄█ █"]
    assert bars_of([0, 4, 5, 8], 8, 2) == ["  ▂█", "▁███"]
    assert bars_of([0, 0], 0, 2) == ["  ", "▁▁"]


def test_charts_have_the_newest_seconds(monitor: Callable[..., Monitor], web: Web, seconds: list[float]) -> None:
    found = monitor(count=100)
    found.history.add_failure()
    seconds[0] += 1
    web.answer("/metrics", 200, metrics_of(streams=24, steps=101))
    found.update()
    row = next(text for text in drawn(found, 80, 24) if " 0 │" in text)
    assert row.split()[-4:] == ["█" * 50, "█", "0", "│"]
    top_row = next(text for text in drawn(found, 80, 24) if "of 64 open" in text)
    assert top_row.split()[-3:] == ["█", "24", "│"]


# -- states of the connection ------------------------------------------------------------------------------------------


def test_a_server_that_restarts(
    monitor: Callable[..., Monitor], web: Web, seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = monitor()
    web.close()
    for _ in range(5):
        seconds[0] += 1
        found.update()
    lines = drawn(found, 80, 24)
    assert "○ no response for 4 s" in lines[1] and "Connection refused" in lines[1]
    assert "12.0 × real time" not in "\n".join(lines) and "– of 64 open" in "\n".join(lines)
    seconds[0] += 60
    assert "no response for 1 min 4 s" in drawn(found, 80, 24)[1]
    assert "unreachable reason=" in line(found) and "Connection refused" in line(found)
    again = Web(web.port)
    again.answer("/readyz", 503, '{"status": "starting"}')
    again.answer("/metrics", 200, metrics_of(steps=2, started=time.time() - 1))
    found.update()
    again.close()
    lines = drawn(found, 80, 24)
    assert "● starting" in lines[1] and "restarted 0 s ago" in lines[1]
    change = found.history.change()
    assert change is not None and change.increase("nemostream_audio_seconds_total") == 24


@pytest.mark.parametrize("answer", [(404, "gone", {}), (500, "", {}), (200, "<html>", {}), (401, "", {})])
def test_later_errors_of_a_server_are_shown(monitor: Callable[..., Monitor], web: Web, answer: Any) -> None:
    """For example those of a proxy whose server is started again."""
    found = monitor()
    web.server.answers["/metrics"] = answer
    found.update()
    assert found.problem and "no response for 0 s" in drawn(found, 80, 24)[1]


def test_a_status_that_is_not_known(monitor: Callable[..., Monitor], web: Web) -> None:
    found = monitor()
    for body in ("", "[]", '{"status": "\\u001b[2J"}', '{"status": 3}', "{}"):
        web.answer("/readyz", 200, body)
        found.update()
        assert "● up" in drawn(found, 80, 24)[1], body


def test_the_first_seconds(web: Web, seconds: list[float]) -> None:
    web.answer("/readyz", 503, '{"status": "starting"}')
    web.answer("/metrics", 200, "nemostream_max_streams 4\n")
    found = Monitor(Server(web.url, None))
    found.update()
    text = "\n".join(drawn(found, 80, 24))
    assert "● starting" in text and "0 of 4 open" in text and "– ms p95" in text
    assert line(found).endswith("starting")
    never = Monitor(Server("http://127.0.0.1:1", None))
    never.update()
    lines = drawn(never, 80, 24)
    assert len(lines) == 2 and "no response" in lines[1]


def test_the_line(monitor: Callable[..., Monitor]) -> None:
    clock, status, *fields = line(monitor(errors=1)).split()
    assert time.strptime(clock, "%H:%M:%S") and status == "ready"
    assert dict(field.split("=") for field in fields) == {
        "streams": "12/64",
        "waiting": "0.0",
        "uploads": "1",
        "audio_per_second": "12.0",
        "steps_per_second": "1.0",
        "batch": "11.0",
        "step_ms": "30/39/40",
        "latency_ms": "60/78/80",
        "degradation": "2",
        "errors": "12",
    }


# -- command -----------------------------------------------------------------------------------------------------------


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_main: Run) -> Run:
    """As `run_main`, for `top`."""
    return partial(run_main, "top")


@pytest.mark.parametrize(
    ("status", "body", "headers", "message"),
    [
        (404, "", {}, "is not a nemostream server: URL/metrics is HTTP 404."),
        (200, "<html></html>", {}, "is not a nemostream server: URL/metrics has no metrics of one."),
        (200, "python_gc_objects_collected_total 3\n", {}, "URL/metrics has no metrics of one."),
        (301, "", {"Location": "http://127.0.0.1:1/metrics"}, "URL/metrics is HTTP 301."),
        (401, "", {}, "requires an API key; set --api-key or NEMOSTREAM_API_KEY."),
    ],
)
@pytest.mark.parametrize("once", [True, False])
def test_something_else_at_the_url(
    web: Web, run: Run, status: int, body: str, headers: dict[str, str], message: str, once: bool
) -> None:
    web.answer("/metrics", status, body, **headers)
    code, out, err = run(web.url, *["--once"] * once)
    assert (code, out) == (2, "") and err.startswith("nemostream: ") and err.count("\n") == 1
    assert message.replace("URL", web.url) in err


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ws://127.0.0.1", "http://", "http://a:b", "http://a b", "x", ""])
def test_urls_that_are_none(run: Run, url: str) -> None:
    code, out, err = run(url)
    assert (code, out) == (2, "") and f"{url!r} is not the URL of a server" in err


def test_the_api_key(web: Web, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    web.answer("/metrics", 401)
    code, _, err = run(web.url, "--api-key", "one")
    assert code == 2 and "does not accept this API key" in err
    monkeypatch.setenv("NEMOSTREAM_API_KEY", "two")
    assert run(web.url, "--once")[0] == 2
    assert web.server.requests == [("/metrics", "Bearer one"), ("/metrics", "Bearer two")]


def test_once(web: Web, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    web.answer("/readyz", 200, '{"status": "draining"}')
    web.answer("/metrics", 200, metrics_of(steps=3))
    waited: list[float] = []
    monkeypatch.setattr(top.time, "sleep", waited.append)
    code, out, err = run(f"{web.url}/", "--once")
    assert (code, err, waited) == (0, "", [1.0]) and out.count("\n") == 1
    assert " draining streams=12/64 " in out and "audio_per_second=0.0" in out
    web.answer("/metrics", 503)
    code, out, err = run(web.url, "--once")
    assert (code, out, err) == (1, "", f"nemostream: {web.url} does not respond: HTTP 503.\n")


def test_without_the_extra(web: Web, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    web.answer("/metrics", 200, metrics_of())
    monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)
    code, _, err = run(web.url)
    assert code == 7 and "the serve extra cannot be imported" in err and "[serve]" in err


def command(url: str) -> list[str]:
    return [sys.executable, "-m", "nemostream", "top", url]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_signals_without_a_terminal(web: Web, number: int, code: int) -> None:
    """One line per second, also while the server is down, until a signal."""
    process = subprocess.Popen(command("http://127.0.0.1:1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    lines = [process.stdout.readline() for _ in range(2)]
    assert all("unreachable reason=" in text for text in lines)
    process.send_signal(number)
    assert process.wait(30) == code
    errors = process.stderr.read()
    assert "Traceback" not in errors and (errors == "") == (code == 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_screen_of_a_terminal(web: Web, number: int) -> None:
    pyte = pytest.importorskip("pyte")
    import pty

    web.answer("/readyz", 200, json.dumps({"status": "ready"}))
    web.answer("/metrics", 200, metrics_of(steps=5))
    terminal, inside = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command(web.url), stdin=inside, stdout=inside, stderr=inside, env=variables)
    os.close(inside)
    screen, output = pyte.Screen(80, 24), b""
    stream = pyte.ByteStream(screen)
    while "Errors" not in "\n".join(screen.display):
        output += (data := os.read(terminal, 1 << 16))
        stream.feed(data)
    assert "of 64 open" in "\n".join(screen.display) and screen.display[0].startswith("nemostream 0.1.0")
    process.send_signal(number)
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the end, on Linux
            break
        if not data:
            break
        output += data
    assert process.wait(30) == (0 if number == signal.SIGINT else 143)
    os.close(terminal)
    # The alternative screen was left, and the cursor is shown.
    assert output.rindex(b"\x1b[?1049l") > output.rindex(b"\x1b[?1049h")
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l") and b"Traceback" not in output
