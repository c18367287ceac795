"""CPU time of the host per stream and chunk, and paced streams that a server holds, without a model.

    nemostream bench host
    nemostream bench host --streams 2400 --chunk-ms 80 160 560 --protocols websocket riva realtime

A null backend takes the place of the model: it emits a fixed text at 3.5 tokens per second and stream and computes
nothing. What is measured is everything else:

* *Layers*: CPU microseconds per stream and step of `--streams` streams in one process, first the scheduler alone
  (`engine_us_per_stream_step`: from `accept` to the collected result), then with endpointing, and with sessions up to
  their events (`full_us_per_stream_step`). The null backend's own time is excluded; `other` is what no layer accounts
  for. `GpuBackend` runs on a device that computes nothing.
* *Protocols*: CPU microseconds of a server per message of one chunk, from three runs: sessions that discard audio
  (receive), that process it and return no events (session), and the whole server (send). With `--transports 0 1`, each
  is measured with one process for everything, and with an engine process and one transport process.
* *Paced streams*: the largest number of clients, each of which sends one message per chunk in real time, with a 99th
  percentile of the added latency of at most 20 ms: the time from a message to the events of its audio, without the
  step of the backend. The clients run in `--generators` processes of their own; a row does not count if the clients
  were more than 5 ms late (99th percentile), or one of these processes used more than 0.9 cores. Steps take
  `--step-ms`, one after another as on a device, so that a step has the rows of all streams whose chunks are complete
  meanwhile. `websocket_streams_per_core`: the largest number of WebSocket streams at the first chunk size, with an
  engine process if that was measured, divided by the cores that the server used for them, without the engine process;
  `engine_process_us_per_stream_step`: what that engine process used, without the null backend.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemostream.benchmarks import command
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.host_layers import gpu_backend_layers, scheduler_layers, session_layers
from nemostream.benchmarks.harness.host_server import (
    MAX_ADDED_MS,
    NullServer,
    Usage,
    evaluate,
    run_clients,
    search,
    wait_until_idle,
)
from nemostream.benchmarks.harness.paced_clients import PROTOCOLS
from nemostream.benchmarks.harness.plots import Bar, BarChart, BarPanel, Chart
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress
from nemostream.bundle import Bundle
from nemostream.errors import BackendError, OptionError
from nemostream.runtime.backends.base import at_least_one

# Runs of the layers: the function that measures each, and its arguments.
RUNS: dict[str, tuple[Callable[..., tuple[dict[str, float], float]], dict[str, bool]]] = {
    "scheduler": (scheduler_layers, {"rules": False}),
    "with endpointing": (scheduler_layers, {"rules": True}),
    "session, no text": (session_layers, {"events": False}),
    "session": (session_layers, {"events": True}),
}
LAYERS = ("accept", "assembly", "landing", "collect", "other")  # of a run; the rest is the null backend
CORES = ("server cores", "engine cores", "backend cores", "generator cores")  # of paced streams
PARTS = ("receive", "session", "send", "total", "event loop", "engine process")  # of a protocol


def measure_host(
    bundle: Bundle,
    streams: int = 2400,
    chunk_ms: Sequence[int] = (80, 160, 560),
    *,
    max_batch: int = 256,
    sweeps: int = 100,
    asynchronous: bool = True,
    protocols: Sequence[str] = PROTOCOLS,
    transports: Sequence[int] = (0, 1),
    clients: int = 200,
    max_clients: int = 2400,
    seconds: float = 5.0,
    step_ms: float = 5.0,
    generators: int = 1,
    options: Sequence[str] = (),
    progress: Progress = no_progress,
) -> Record:
    """Measure layers with `streams` streams, each protocol with `clients` clients, and search for paced streams.

    `options` are passed to `nemostream serve`. Raises `OptionError` for invalid options, and `BackendError` if a server
    or the clients do not start, or a client of a protocol fails.
    """
    at_least_one(streams=streams, max_batch=max_batch, sweeps=sweeps)
    at_least_one(clients=clients, max_clients=max_clients, generators=generators)
    if not seconds > 0:
        raise OptionError(f"seconds is {seconds}; it must be positive.")
    if not step_ms >= 0:
        raise OptionError(f"step_ms is {step_ms}; it must not be negative.")
    if not chunk_ms:
        raise OptionError("chunk_ms is empty; give at least one chunk size.")
    if min(transports, default=0) < 0:
        raise OptionError(f"transports is {list(transports)}; a number of processes must not be negative.")
    if unknown := sorted(set(protocols) - set(PROTOCOLS)):
        raise OptionError(f"there is no protocol {unknown[0]!r}; the protocols are {', '.join(PROTOCOLS)}.")
    sizes = [bundle.manifest.chunk(ms).ms for ms in chunk_ms]
    others, rows = OtherWork(), list[Row]()
    for ms in sizes:
        for name, (measure, arguments) in RUNS.items():
            progress(f"{ms} ms: {name}, {streams} streams")
            found = measure(bundle, streams, ms, max_batch, sweeps, asynchronous=asynchronous, **arguments)
            rows.append(layer_row({"run": name, "chunk_ms": ms, "streams": streams}, *found))
        progress(f"{ms} ms: GpuBackend")
        found = gpu_backend_layers(bundle, streams, ms, max_batch, sweeps)
        rows.append(layer_row({"run": "GpuBackend", "chunk_ms": ms, "streams": streams}, *found))
    for protocol, processes, ms in itertools.product(protocols, transports, sizes):
        server = functools.partial(
            NullServer,
            bundle,
            ms,
            max_batch=max_batch,
            step_ms=step_ms,
            options=[*options, *(["--transports", str(processes)] if processes else [])],
        )
        setup = {"chunk_ms": ms, "transports": processes}
        stages = dict[str, tuple[Usage, int]]()
        for stage in ("receive", "session", "all"):
            progress(f"{ms} ms: {protocol}, {processes} transports, {stage}, {clients} clients")
            with server(stage=stage) as running:
                results, usage = run_clients(running, protocol, clients, ms, seconds, generators)
            if errors := [error for result in results for error in result["errors"]]:
                raise BackendError(f"{len(errors)} errors of the {protocol} clients, first: {errors[0]}")
            stages[stage] = usage, sum(result["messages"] for result in results)
        rows.append(protocol_row({"protocol": protocol, **setup, "streams": clients}, stages))
        per_stream = rows[-1]["values"]["us"]["total"] / (1000 * ms)  # cores
        with server() as running:

            def measure_clients(
                number: int, running: NullServer = running, protocol: str = protocol, setup: dict[str, Any] = setup
            ) -> Row:
                ms = setup["chunk_ms"]
                progress(f"{ms} ms: {number} paced clients, {protocol}, {setup['transports']} transports")
                wait_until_idle(running)
                found = run_clients(running, protocol, number, ms, seconds, generators)
                return evaluate(*found, {"paced": protocol, **setup, "streams": number}, step_ms)

            first = int(0.7 / per_stream) if per_stream > 0 else max_clients
            rows += search(measure_clients, first, max_clients)
    result = records.record(
        "host",
        rows,
        model=records.model_of(bundle.manifest),
        method={
            "threads": records.cores(),
            "device": "cpu",
            "max_batch": max_batch,
            "sweeps": sweeps,
            "asynchronous": asynchronous,
            "seconds": seconds,
            "step_ms": step_ms,
            "generators": generators,
            "max_added_ms": MAX_ADDED_MS,
            "options": list(options),
            "other_work_cores": round(others.cores(), 3),
        },
    )
    return result | summary(rows)


def layer_row(case: dict[str, Any], parts: dict[str, float], rows_per_step: float) -> Row:
    """Return the row of a run; its total is the sum of all parts except the null backend."""
    total = sum(value for name, value in parts.items() if name != "backend")
    us = {name: round(value, 3) for name, value in (parts | {"total": total}).items()}
    return records.row(case, {}, {"us": us, "rows_per_step": round(rows_per_step, 1)})


def protocol_row(case: dict[str, Any], stages: dict[str, tuple[Usage, int]]) -> Row:
    """Return the row of a protocol from what each of the three runs used, and the messages sent. See `PARTS`.

    A server that falls behind processes less than what was sent, so its time is divided by the rows of its steps.
    """
    per_message = {}
    for stage, (usage, sent) in stages.items():
        messages = sent if stage == "receive" else usage.rows
        per_message[stage] = 1e6 * (usage.all - usage.backend) / max(messages, 1)
    usage, sent = stages["all"]
    messages = max(usage.rows, 1)
    us = {
        "receive": per_message["receive"],
        "session": per_message["session"] - per_message["receive"],
        "send": per_message["all"] - per_message["session"],
        "total": per_message["all"],
        "event loop": 1e6 * usage.event_loops / messages,
        "engine process": 1e6 * max(usage.engine - usage.backend, 0) / messages,
        "backend": 1e6 * usage.backend / messages,
    }
    values: dict[str, Any] = {"us": {name: round(value, 1) for name, value in us.items()}}
    values |= {
        "rows_per_step": round(usage.rows / max(usage.steps, 1), 1),
        "processed": round(usage.rows / max(sent, 1), 3),
    }
    return records.row(case, {}, values)


def summary(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return the figures of the result, at the first chunk size; None for those that were not measured."""
    totals: dict[str, float] = {}
    for row in rows:
        if "run" in row["case"]:
            totals.setdefault(row["case"]["run"], row["values"]["us"]["total"])
    paced = [row for row in rows if row["case"].get("paced") == "websocket"]
    passed = [
        row for row in paced if row["values"]["passed"] and row["case"]["chunk_ms"] == paced[0]["case"]["chunk_ms"]
    ]
    # With an engine process if there is one; among those, the row with the most streams.
    best = max(passed, key=lambda row: (row["case"]["transports"] > 0, row["case"]["streams"]), default=None)
    engine_us = streams_per_core = None
    if best:
        case, values = best["case"], best["values"]
        streams_per_core = round(case["streams"] / (values["server_cores"] - values["engine_cores"]), 1)
        if case["transports"]:
            engine_cores = values["engine_cores"] - values["backend_cores"]
            engine_us = round(1e6 * engine_cores / values["rows_per_second"], 2)
    return {
        "engine_us_per_stream_step": totals.get("scheduler"),
        "full_us_per_stream_step": totals.get("session"),
        "engine_process_us_per_stream_step": engine_us,
        "websocket_streams_per_core": streams_per_core,
    }


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the tables of a result as Markdown."""
    method, rows = result["method"], result["rows"]
    runs = [row for row in rows if "run" in row["case"]]
    text = [
        f"{'Asynchronous' if method['asynchronous'] else 'Synchronous'} null backend, steps of at most "
        f"{method['max_batch']} rows. {tables.other_load([method['other_work_cores']])}",
        "",
        "CPU microseconds per stream and step, without the null backend:",
        "",
        tables.markdown(
            ["chunk", "streams", "run", "rows per step", *LAYERS, "total"],
            [
                [
                    f"{row['case']['chunk_ms']} ms",
                    row["case"]["streams"],
                    row["case"]["run"],
                    row["values"]["rows_per_step"],
                    *(_us(row, layer) for layer in (*LAYERS, "total")),
                ]
                for row in runs
                if row["case"]["run"] in RUNS
            ],
        ),
        "",
        "`GpuBackend` on a device that computes nothing, CPU microseconds per row:",
        "",
        tables.markdown(
            ["chunk", "rows per step", "prepare", "launch", "read", "total"],
            [
                [
                    f"{row['case']['chunk_ms']} ms",
                    row["values"]["rows_per_step"],
                    *(_us(row, part) for part in ("prepare", "launch", "read", "total")),
                ]
                for row in runs
                if row["case"]["run"] not in RUNS
            ],
        ),
    ]
    if protocols := [row for row in rows if "protocol" in row["case"]]:
        text += [
            "",
            "CPU microseconds of a server per message of one chunk, without the null backend; *event loop*: the part "
            "of the event loops' threads, *engine process*: that of the engine, if it has a process of its own. "
            "If less than 100 % of the messages were *processed*, the server fell behind. A step of the backend takes "
            f"{method['step_ms']:g} ms:",
            "",
            tables.markdown(
                ["protocol", "chunk", "transports", "clients", "processed", "rows per step", *PARTS],
                [
                    [
                        row["case"]["protocol"],
                        f"{row['case']['chunk_ms']} ms",
                        row["case"]["transports"],
                        row["case"]["streams"],
                        tables.percent(min(row["values"]["processed"], 1.0), 0),
                        row["values"]["rows_per_step"],
                        *(_us(row, part) for part in PARTS),
                    ]
                    for row in protocols
                ],
            ),
        ]
    if paced := [row for row in rows if "paced" in row["case"]]:
        text += [
            "",
            "Paced streams: one message per chunk; added latency in milliseconds, without the step of the backend. "
            f"{method['generators']} load generator process(es), on the same {method['threads']} cores as the server:",
            "",
            tables.markdown(
                ["protocol", "chunk", "transports", "streams", "p50", "p99", *CORES, "passed"],
                [_paced_line(row) for row in paced],
            ),
        ]
    return "\n".join(text) + "\n"


def _us(row: Row, name: str) -> str:
    value = row["values"]["us"].get(name)
    return "" if value is None else tables.digits(value) if value >= 0 else f"−{tables.digits(-value)}"


def _paced_line(row: Row) -> list[Any]:
    values = row["values"]
    latency = values.get("added_latency_ms")
    return [
        row["case"]["paced"],
        f"{row['case']['chunk_ms']} ms",
        row["case"]["transports"],
        row["case"]["streams"],
        *(tables.digits(latency[name]) if latency else "" for name in ("p50", "p99")),
        *(f"{values[key]:.2f}" if (key := name.replace(" ", "_")) in values else "" for name in CORES),
        tables.verdict(values),
    ]


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the CPU time by layer."""
    rows = [row for row in result["rows"] if row["case"].get("run") in RUNS]
    if not rows:
        return {}
    totals = [row["values"]["us"]["total"] for row in rows]
    names = [f"{row['case']['run']}, {row['case']['chunk_ms']} ms" for row in rows]
    bars = []
    for row in rows:
        parts = [max(row["values"]["us"][layer], 0.0) for layer in LAYERS]  # a difference may be below zero
        bars.append(Bar(parts, f"{tables.digits(row['values']['us']['total'])} µs"))
    title = (
        f"Without the model, the host needs {tables.digits(min(totals))} to {tables.digits(max(totals))} µs of CPU "
        "time per stream and step"
    )
    subtitle = "CPU time per stream and step by layer, µs, for parts of the program and chunk sizes."
    return {"layers": BarChart(title, subtitle, names, [BarPanel("", "µs per stream and step", bars)], parts=LAYERS)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("host", __doc__)
    parser.add_argument(
        "--bundle", type=Path, help="bundle whose tokenizer and sizes are used (default: the packaged model)"
    )
    parser.add_argument("--streams", type=int, default=2400, help="streams of the layers")
    parser.add_argument("--chunk-ms", type=int, nargs="+", default=[80, 160, 560], help="chunk sizes in ms")
    parser.add_argument("--max-batch", type=int, default=256, help="maximum number of rows in a step")
    parser.add_argument("--sweeps", type=int, default=100, help="measured sweeps over all streams")
    parser.add_argument("--synchronous", action="store_true", help="the backend computes in `submit`, as on a CPU")
    parser.add_argument(
        "--protocols", nargs="*", default=list(PROTOCOLS), help=f"protocols to measure, of {', '.join(PROTOCOLS)}"
    )
    parser.add_argument(
        "--transports", type=int, nargs="+", default=[0, 1], help="transport processes; 0: one process for everything"
    )
    parser.add_argument("--clients", type=int, default=200, help="clients of each protocol")
    parser.add_argument("--max-clients", type=int, default=2400, help="maximum number of paced clients")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured seconds of a number of clients")
    parser.add_argument("--step-ms", type=float, default=5.0, help="duration of a step of the server's null backend")
    parser.add_argument("--generators", type=int, default=1, help="processes of the clients")
    options, server_options = parser.parse_known_args(arguments)

    def measure() -> Record:
        return measure_host(
            command.open_bundle(options.bundle),
            options.streams,
            options.chunk_ms,
            max_batch=options.max_batch,
            sweeps=options.sweeps,
            asynchronous=not options.synchronous,
            protocols=options.protocols,
            transports=options.transports,
            clients=options.clients,
            max_clients=options.max_clients,
            seconds=options.seconds,
            step_ms=options.step_ms,
            generators=options.generators,
            options=server_options,
            progress=records.report_progress,
        )

    command.run(measure, options)


if __name__ == "__main__":
    main()
