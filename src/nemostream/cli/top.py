"""`nemostream top`: the state of a running server, from its metrics, once per second.

On a terminal a view of the whole screen is drawn. Otherwise one line is printed per second.
"""

from __future__ import annotations

import http.client
import json
import math
import signal
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nemostream.cli.interrupt import Interrupted, signals_raise
from nemostream.cli.scrapes import HISTORY_SECONDS, Buckets, History, Scrape
from nemostream.errors import BackendError, NemostreamError, OptionError
from nemostream.extras import install_command

_INTERVAL_SECONDS = 1.0
_TIMEOUT_SECONDS = 3.0  # of a request
_MAX_BYTES = 16 << 20  # of a response
_LATE = 0.8  # latency in chunks to which overload control reacts (docs/serving.md)

# Counters of what went wrong: the name of the metric, its label, and the text that is shown.
_ERRORS = (
    ("nemostream_streams_failed_total", "transport", "stream failed"),
    ("nemostream_streams_rejected_total", "reason", "rejected"),
    ("nemostream_requests_denied_total", "reason", "denied"),
    ("nemostream_timeouts_total", "", "client timeout"),
    ("nemostream_step_failures_total", "", "step failed"),
    ("nemostream_state_errors_total", "", "state not stored"),
    ("nemostream_final_fallbacks_total", "", "final of small chunks"),
    ("nemostream_lanes_shed_total", "", "accurate lane disabled"),
)


# -- requests ----------------------------------------------------------------------------------------------------------


class _Unreachable(Exception):
    """The server does not respond. The message is the reason."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are not followed: they would send the API key to another server."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class Server:
    """The server at a URL."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """Raise `OptionError` if `url` is not a URL of HTTP."""
        try:
            parts = urlsplit(url)
            is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_valid = False
        if not is_valid or not url.isascii() or any(character <= " " for character in url):
            raise OptionError(f"{url!r} is not the URL of a server; give one such as http://127.0.0.1:8000.")
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._opener = urllib.request.build_opener(_NoRedirect)

    def scrape(self) -> Scrape:
        """Return the server's metrics.

        Raises `_Unreachable`, `OptionError` if the URL is that of something else or the API key is missing or wrong,
        and `BackendError` without the `serve` extra.
        """
        at = time.monotonic()
        status, body = self._get("/metrics")
        if status >= 500 or status in (408, 425, 429):
            raise _Unreachable(f"HTTP {status}")
        if status == 401:
            problem = "does not accept this API key" if self._headers else "requires an API key"
            raise OptionError(f"{self.url} {problem}; set --api-key or NEMOSTREAM_API_KEY.")
        if status != 200:
            raise OptionError(f"{self.url} is not a nemostream server: {self.url}/metrics is HTTP {status}.")
        try:
            scrape = Scrape.parse(body.decode(), at)
        except ImportError as error:
            raise BackendError(f"the serve extra cannot be imported ({error}): {install_command('serve')}") from error
        except ValueError:
            scrape = Scrape(at)
        if "nemostream_max_streams" not in scrape.values:
            raise OptionError(f"{self.url} is not a nemostream server: {self.url}/metrics has no metrics of one.")
        return scrape

    def status(self) -> str:
        """Return the server's status: starting, ready, draining or failed. Raises `_Unreachable`."""
        try:
            status = json.loads(self._get("/readyz")[1])["status"]
        except (ValueError, KeyError, TypeError):  # a proxy that does not forward the path
            return ""
        return status if isinstance(status, str) and status.isalpha() and len(status) < 16 else ""

    def _get(self, path: str) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, headers=self._headers)
        try:
            try:
                with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                    return response.status, response.read(_MAX_BYTES)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read(_MAX_BYTES)
        except urllib.error.URLError as error:
            raise _Unreachable(_reason(error.reason)) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Unreachable(_reason(error)) from error


def _reason(error: object) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return f"no response in {_TIMEOUT_SECONDS:.0f} s"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:100] or type(error).__name__


# -- state -------------------------------------------------------------------------------------------------------------


@dataclass
class Monitor:
    """What is known about a server."""

    server: Server
    history: History = field(default_factory=History)
    status: str = ""
    problem: str = ""  # why the server does not respond
    lost_at: float | None = None  # when the first request without a response was sent, `time.monotonic()`

    def update(self) -> None:
        """Request the metrics. Raises as `Server.scrape` if the server has never responded; later errors are shown."""
        began = time.monotonic()
        try:
            scrape = self.server.scrape()
            self.status = self.server.status()
        except (_Unreachable, NemostreamError) as error:
            if isinstance(error, NemostreamError) and self.history.last is None:
                raise
            self.problem = str(error)
            self.lost_at = began if self.lost_at is None else self.lost_at
            self.history.add_failure()
        else:
            self.problem, self.lost_at = "", None
            self.history.add(scrape)

    @property
    def errors(self) -> list[tuple[str, float, float]]:
        """What went wrong since the start of the server: its kind, its number in the last minute, and in total."""
        last, change = self.history.last, self.history.change(HISTORY_SECONDS)
        if last is None:
            return []
        found = []
        for name, label, text in _ERRORS:
            for value, total in last.by(name, label).items():
                recent = change.increase(name, **({label: value} if label else {})) if change else 0.0
                if total:
                    found.append((f"{text}: {value}" if value else text, recent, total))
        return sorted(found, key=lambda row: (-row[1], -row[2], row[0]))


def chunk_sizes(scrape: Scrape) -> list[int]:
    """Return the chunk sizes (ms) of which there were steps or results, ascending."""
    names = ("nemostream_step_seconds_count", "nemostream_latency_seconds_count")
    return sorted({int(ms) for name in names for ms, count in scrape.by(name, "chunk_ms").items() if count})


# -- one line ----------------------------------------------------------------------------------------------------------


def line(monitor: Monitor) -> str:
    """Return the state as one line of names and values. Without a terminal, one is printed per second."""
    now = time.strftime("%H:%M:%S")
    last, change = monitor.history.last, monitor.history.change()
    if monitor.problem:
        return f"{now} unreachable reason={json.dumps(monitor.problem)}"
    if last is None or change is None:
        return f"{now} {monitor.status or 'up'}"
    steps = change.histogram("nemostream_step_seconds")
    latency = change.histogram("nemostream_latency_seconds")
    fields = {
        "streams": f"{last.total('nemostream_streams'):.0f}/{last.total('nemostream_max_streams'):.0f}",
        "waiting": _number(change.histogram("nemostream_step_waiting_streams").mean, ".1f"),
        "uploads": f"{last.total('nemostream_uploads'):.0f}",
        "audio_per_second": f"{change.rate('nemostream_audio_seconds_total'):.1f}",
        "steps_per_second": f"{steps.count / change.seconds:.1f}",
        "batch": _number(change.histogram("nemostream_step_streams").mean, ".1f"),
        "step_ms": "/".join(_milliseconds(steps, share) for share in _SHARES),
        "latency_ms": "/".join(_milliseconds(latency, share) for share in _SHARES),
        "degradation": f"{last.total('nemostream_degradation_level'):.0f}",
        "errors": f"{sum(total for _, _, total in monitor.errors):.0f}",
    }
    return " ".join([now, monitor.status or "up", *(f"{name}={value}" for name, value in fields.items())])


# -- screen ------------------------------------------------------------------------------------------------------------

_SHARES = (0.5, 0.95, 0.99)  # percentiles
_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_CHART_LINES = 14
_MIN_CHUNK_WIDTH = 72  # columns of the screen for all percentiles of each chunk size
_NO_OBSERVATIONS = Buckets((), (), 0.0)
_STATUS_COLOURS = {"ready": "green", "": "green", "failed": "red"}  # others: yellow


class View:
    """The state as a view of a screen with `height` lines."""

    def __init__(self, monitor: Monitor, height: int) -> None:
        self._monitor, self._height = monitor, height
        self._last = monitor.history.last
        # What happened in the last seconds; None while the server does not respond: figures would be old
        self._change = None if monitor.problem else monitor.history.change()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        last, width = self._last, options.max_width
        yield self._title(last)
        yield self._state(last)
        if last is None:
            return
        errors, sizes = self._monitor.errors, chunk_sizes(last)
        lines = self._height - 2 - (3 + max(1, len(sizes)))  # for the charts and the errors
        wanted = min(max(1, len(errors)), 8)
        chart = min(max((lines - 2 * 2 - 2 - min(wanted, 3)) // 2, 1), _MAX_CHART_LINES)
        yield self._streams(last, width, chart)
        yield self._latency(width, chart)
        yield self._chunks(last, sizes, width)
        if (lines := min(wanted, lines - 2 * (chart + 2) - 2)) > 0:
            yield self._errors(errors, lines)

    def _title(self, last: Scrape | None) -> Table:
        series = [*last.values.get("nemostream_info", {})] if last else []
        info = dict(series[0]) if series else {}
        left = Text("nemostream", style="bold").append(f" {info.get('version', 'top')}")
        transports = info.get("transports", "0")
        for part in (info.get("model"), info.get("device"), f"{transports} transports" if transports != "0" else ""):
            if part:
                left.append(" · ", style="dim").append(part, style="not bold")
        return _two_ends(left, Text(self._monitor.server.url, style="cyan"))

    def _state(self, last: Scrape | None) -> Table:
        monitor, left = self._monitor, Text()
        if monitor.lost_at is not None:
            seconds = time.monotonic() - monitor.lost_at
            left.append(f"○ no response for {_duration(seconds)}", style="bold red")
            left.append(f", since {time.strftime('%H:%M:%S', time.localtime(time.time() - seconds))}")
            left.append(" · ", style="dim").append(monitor.problem)
        elif last is not None:
            colour = _STATUS_COLOURS.get(monitor.status, "yellow")
            left.append(f"● {monitor.status or 'up'}", style=f"bold {colour}")
            if started := last.total("nemostream_start_time_seconds"):
                left.append(" · ", style="dim").append(f"up {_duration(time.time() - started)}")
            restarted = monitor.history.restarted_at
            if restarted is not None and (seconds := time.monotonic() - restarted) < HISTORY_SECONDS:
                left.append(" · ", style="dim").append(f"restarted {_duration(seconds)} ago", style="yellow")
        return _two_ends(left, Text(time.strftime("%H:%M:%S"), style="dim"))

    def _streams(self, last: Scrape, width: int, lines: int) -> Panel:
        shown = not self._monitor.problem
        audio = self._change.rate("nemostream_audio_seconds_total") if self._change else math.nan
        waiting = self._histogram("nemostream_step_waiting_streams")
        labels = [
            _label(
                f"{last.total('nemostream_streams'):.0f}" if shown else "–", f"of {_count(last, 'max_streams')} open"
            ),
            _label(_number(audio, ".1f"), "× real time"),
            _label(_number(waiting.mean, ".1f"), "waiting"),
        ]
        values = [math.nan if point is None else point[0] for point in self._monitor.history.points]
        protocols = sorted(last.by("nemostream_streams", "transport").items(), key=lambda item: (-item[1], item[0]))
        notes = [f"{name} {count:.0f}" for name, count in protocols if count and shown]
        if shown and last.total("nemostream_uploads"):
            notes.append(f"recordings {_count(last, 'uploads')}")
        return _panel("Streams", _chart(labels, values, "cyan", width, lines), " · ".join(notes))

    def _latency(self, width: int, lines: int) -> Panel:
        latency = self._histogram("nemostream_latency_seconds")
        labels = [_label(_milliseconds(latency, share), f"ms p{100 * share:.0f}") for share in _SHARES]
        values = [math.nan if point is None else 1000 * point[1] for point in self._monitor.history.points]
        labels = labels[1:2] if lines == 1 else labels
        return _panel("Latency", _chart(labels, values, "magenta", width, lines), "p95 of each second")

    def _chunks(self, last: Scrape, sizes: Sequence[int], width: int) -> Panel:
        shares = _SHARES if width >= _MIN_CHUNK_WIDTH else _SHARES[1:]
        narrow = max(5, (width - 4 - 18) // (2 * len(shares) + 2))  # of a percentile; the first one has twice as much
        table = Table.grid(expand=True, padding=0)
        for columns in (8, 10, *[None, *[narrow] * (len(shares) - 1)] * 2):
            table.add_column(width=columns, ratio=None if columns else 1, justify="right", no_wrap=True)
        percentiles = [f"p{100 * share:.0f}" for share in shares]
        heads = [f"step {percentiles[0]}", *percentiles[1:], f"latency {percentiles[0]}", *percentiles[1:]]
        table.add_row("chunk", "steps/s", *heads, style="dim")
        for ms in sizes or [0]:
            label = {"chunk_ms": str(ms)}
            steps = self._histogram("nemostream_step_seconds", **label)
            latency = self._histogram("nemostream_latency_seconds", **label)
            rate = steps.count / self._change.seconds if self._change and steps.count else math.nan
            table.add_row(
                f"{ms} ms" if ms else "–",
                _number(rate, ".1f"),
                *(_milliseconds(steps, share) for share in shares),
                *(Text(_milliseconds(latency, share), _lateness(latency.quantile(share), ms)) for share in shares),
            )
        return _panel("Milliseconds by chunk size", table, self._engine(last))

    def _engine(self, last: Scrape) -> str:
        """Return the figures of the engine: the batch, its load, and the degradation level."""
        if self._change is None:
            return ""
        batch = self._histogram("nemostream_step_streams")
        highest, is_upper = batch.highest
        busy = 100 * self._change.rate("nemostream_step_seconds_sum")
        largest = f", at most {highest:.0f}" if is_upper else f", some more than {highest:.0f}"
        notes = [f"batch {_number(batch.mean, '.1f')}{largest if batch.count else ''}", f"engine busy {busy:.0f} %"]
        if level := last.total("nemostream_degradation_level"):
            notes.append(f"degradation {level:.0f}")
        return " · ".join(notes)

    def _errors(self, errors: Sequence[tuple[str, float, float]], lines: int) -> Panel:
        if not errors:
            return _panel("Errors", Text("none since the start of the server", style="dim"), "")
        table = Table.grid(expand=True, padding=(0, 0, 0, 2))
        for ratio in (1, None, None):
            table.add_column(ratio=ratio, justify="left" if ratio else "right", no_wrap=True)
        shown = list(errors) if len(errors) <= lines else list(errors[: lines - 1])
        if hidden := errors[len(shown) :]:
            sums = sum(recent for _, recent, _ in hidden), sum(total for _, _, total in hidden)
            shown.append((f"{len(hidden)} {'other ' if shown else ''}kinds", *sums))
        for kind, recent, total in shown:
            style = "bold red" if recent else ""
            table.add_row(
                Text(kind, style), Text(f"{recent:.0f} in {HISTORY_SECONDS} s", style), f"{total:.0f} in total"
            )
        return _panel("Errors", table, "")

    def _histogram(self, name: str, **labels: str) -> Buckets:
        return self._change.histogram(name, **labels) if self._change else _NO_OBSERVATIONS


def _two_ends(left: Text, right: Text) -> Table:
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, justify="right", overflow="ellipsis")
    table.add_row(left, right)
    return table


def _panel(title: str, content: RenderableType, notes: str) -> Panel:
    return Panel(
        content,
        title=Text(title, "bold not dim"),
        title_align="left",
        subtitle=Text(notes, "not dim") if notes else None,
        subtitle_align="right",
        border_style="dim",
        padding=(0, 1),
    )


_LABEL_WIDTH, _SCALE_WIDTH = 19, 5  # columns beside a chart


def _label(value: str, name: str) -> Text:
    return Text.assemble((f"{value:>5}", "bold"), f" {name}")


def _chart(labels: Sequence[Text], values: Sequence[float], colour: str, width: int, lines: int) -> Table:
    """Return labels beside a chart of the newest values, a column for each second, and the value of its top."""
    columns = max(1, width - 4 - _LABEL_WIDTH - _SCALE_WIDTH)
    shown = values[-columns:]
    top = max((value for value in shown if not math.isnan(value)), default=0.0)
    grid = Table.grid(expand=True, padding=0)
    grid.add_column(width=_LABEL_WIDTH, no_wrap=True)
    grid.add_column(width=columns, no_wrap=True, style=colour)
    grid.add_column(ratio=1, no_wrap=True, justify="right", style="dim")
    scale = [f"{top:.0f}" if top else "", *[""] * (lines - 2), "0"]
    for line, bars in enumerate(bars_of(shown, top, lines)):
        label = labels[line] if line < min(len(labels), lines) else Text()
        grid.add_row(label, Text(bars.rjust(columns)), scale[line] if lines > 1 else scale[0])
    return grid


def bars_of(values: Sequence[float], top: float, lines: int) -> list[str]:
    """Return a bar for each value in the characters of `lines` lines, the uppermost first. NaN is a gap."""
    steps = [0 if math.isnan(value) else max(1, round(8 * lines * value / top)) if top else 1 for value in values]
    rows = []
    for line in reversed(range(lines)):
        levels = (min(step - 8 * line, 8) for step in steps)
        rows.append("".join(_BLOCKS[level - 1] if level > 0 else " " for level in levels))
    return rows


# -- numbers -----------------------------------------------------------------------------------------------------------


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _count(scrape: Scrape, name: str) -> str:
    return f"{scrape.total(f'nemostream_{name}'):.0f}"


def _milliseconds(buckets: Buckets, share: float) -> str:
    """Return a percentile in milliseconds. One in the last bucket, which has no upper bound, is marked."""
    value = buckets.quantile(share)
    prefix = ">" if buckets.count and buckets.counts[-2] < share * buckets.count else ""
    return prefix + _number(1000 * value, ".1f" if value < 0.00995 else ".0f")


def _lateness(seconds: float, chunk_ms: int) -> str:
    """Return the style of a latency: late results are those that overload control reacts to."""
    if math.isnan(seconds) or not chunk_ms or 1000 * seconds <= _LATE * chunk_ms:
        return ""
    return "bold red" if 1000 * seconds > chunk_ms else "yellow"


def _duration(seconds: float) -> str:
    total = max(0, round(seconds))
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {total % 60} s" if minutes else f"{total} s"


# -- command -----------------------------------------------------------------------------------------------------------


def show(url: str, api_key: str | None, once: bool) -> None:
    """Show the state of a server until Ctrl-C, or with `once` the state of a second. Raises as `Server`.

    With `once`, raises `NemostreamError` if the server does not respond.
    """
    monitor, console = Monitor(Server(url, api_key)), Console(highlight=False)
    draws = console.is_terminal and not console.is_dumb_terminal and console.encoding.lower().startswith("utf")
    try:
        with signals_raise():
            if once:
                for _ in range(2):
                    monitor.update()
                    if monitor.problem:
                        raise NemostreamError(f"{monitor.server.url} does not respond: {monitor.problem}.")
                    if len(monitor.history.points) == 1:
                        time.sleep(_INTERVAL_SECONDS)
                if draws:
                    console.print(View(monitor, 24))
                else:
                    print(line(monitor))
            elif draws:
                monitor.update()  # a wrong URL is an error, not a view
                with Live(console=console, screen=True, auto_refresh=False) as live:
                    for _ in _seconds(monitor):
                        live.update(View(monitor, console.height), refresh=True)
            else:
                monitor.update()
                for _ in _seconds(monitor):
                    print(line(monitor), flush=True)
    except Interrupted as error:
        if error.number != signal.SIGINT:  # Ctrl-C is the normal end
            raise


def _seconds(monitor: Monitor) -> Iterator[None]:
    """Yield after each update, one per second."""
    yield
    due = time.monotonic()
    while True:
        due = max(due + _INTERVAL_SECONDS, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        monitor.update()
        yield
