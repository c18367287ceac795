"""Real-time streams of servers with the same weights: nemostream, sherpa-onnx, and NeMo's streaming pipeline.

    python -m nemostream.benchmarks.studies.servers --manifest examples/demo_model/heldout/heldout.jsonl

`bench load` measures the servers one after another on this machine, which the load generator shares. All use the same
checkpoint, chunk size, number of threads and manifest, greedy search, and end utterances after 800 ms of silence:

* *nemostream*: `nemostream serve` with engines in fp32 and int8.
* *sherpa-onnx*: `sherpa-onnx-online-websocket-server` of the package sherpa-onnx-bin, with NeMo's ONNX export (int8:
  the recipe of sherpa-onnx), a worker per core with one thread each, batches of up to 50.
* *NeMo pipeline*: `CacheAwareRNNTPipeline` behind a minimal server (`harness/nemo_server.py`), fp32.

Random weights do not pass the accuracy check of int8; `--unvalidated` measures their engines without it.

Exports and engines are kept in `OUT/NAME-models`. The result of each server is written to `OUT/NAME-SERVER.json`; the
comparison has those of this call. `nemostream bench load --compare` joins the results of several calls.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemostream.benchmarks import command
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.corpora import packaged, read_manifest
from nemostream.benchmarks.harness.nemo import export_nemo, load_nemo
from nemostream.benchmarks.harness.records import Progress, Record
from nemostream.benchmarks.harness.server_process import free_ports, server_process
from nemostream.benchmarks.load import MIN_HOLD, compare, measure_load
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engines import build_engine
from nemostream.errors import BackendError
from nemostream.plans import PlanStore

SERVERS = ("nemostream fp32", "nemostream int8", "sherpa-onnx fp32", "sherpa-onnx int8", "NeMo pipeline fp32")
MAX_STREAMS = 512
_SILENCE_MS = 800  # that ends an utterance
_START_SECONDS = 60.0
_BATCH = 50  # of sherpa-onnx, the default of its Python server


@dataclass(frozen=True)
class Models:
    """The model in the formats of the servers, made on first use and kept in a folder."""

    checkpoint: Path
    bundle: Bundle
    chunk: ChunkConfig
    folder: Path
    validate: bool = True  # whether int8 engines must pass the accuracy check

    def engines(self) -> Path:
        """Return the folder of nemostream's int8 engines.

        Raises `BackendError` if the build fails, and `EngineValidationError` if an engine is not accurate enough.
        """
        folder = self.folder / "engines"
        plan, _ = build_engine(
            self.bundle, self.chunk, "int8", PlanStore(folder), backend="onnxruntime", validate=self.validate
        )
        if not self.validate:  # the server does not use such an engine, so it is stored like one that was validated
            recipe = dataclasses.replace(plan.recipe, device="cpu")
            folder = self.folder / "engines-unvalidated"
            files = [plan.folder / file.file for file in plan.files]
            PlanStore(folder).put(
                recipe, lambda into: [Path(shutil.copy(file, into)) for file in files], lambda built: {}
            )
        return folder

    def export(self) -> Path:
        """Return the folder of NeMo's ONNX export."""
        folder = self.folder / f"export-{self.chunk.ms}"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as unfinished:
                export = Path(unfinished) / "export"
                export_nemo(load_nemo(self.checkpoint), self.bundle.manifest, self.chunk, export, int8=True)
                export.rename(folder)
        return folder


@contextlib.contextmanager
def running(name: str, models: Models) -> Iterator[tuple[str, int]]:
    """Run one of `SERVERS` in a `with` block; yield its target and its process id.

    Raises `BackendError` if it does not start.
    """
    implementation, _, precision = name.rpartition(" ")
    chunk, python = models.chunk, [sys.executable, "-m"]
    if implementation == "nemostream":
        options = ["--chunk-ms", str(chunk.ms), "--chunks", str(chunk.ms), "--endpoint-ms", str(_SILENCE_MS)]
        options += ["--max-streams", str(MAX_STREAMS), "--no-measure", "--port", "0", "--grpc-port", "-1"]
        if precision != "fp32":
            options += ["--precision", precision, "--engines", str(models.engines())]
        serve = [*python, "nemostream", "serve", "--bundle", str(models.bundle.path), *options]
        with server_process(serve) as (process, url):
            yield url.replace("http", "nemostream+ws", 1), process.pid
    elif implementation == "sherpa-onnx":
        with _sherpa_server(models.export(), models.bundle.manifest.features.mels, precision) as found:
            yield found
    else:
        context = ["--context", str(chunk.left), str(chunk.frames - 1), "--threads", str(records.cores())]
        options = ["--checkpoint", str(models.checkpoint), *context, "--streams", str(MAX_STREAMS)]
        with server_process([*python, "nemostream.benchmarks.harness.nemo_server", *options]) as (process, url):
            yield url.replace("http", "sherpa+ws", 1), process.pid


@contextlib.contextmanager
def _sherpa_server(export: Path, mels: int, precision: str) -> Iterator[tuple[str, int]]:
    program = Path(sys.executable).with_name("sherpa-onnx-online-websocket-server")
    if not program.exists():
        raise BackendError("the server of sherpa-onnx is not installed: pip install sherpa-onnx-bin")
    (port,) = free_ports(1)
    suffix = "" if precision == "fp32" else f".{precision}"
    options = [f"--{name}={export / name}{suffix}.onnx" for name in ("encoder", "decoder", "joiner")]
    options += [f"--tokens={export / 'tokens.txt'}", f"--feat-dim={mels}", f"--max-batch-size={_BATCH}"]
    options += ["--num-threads=1", f"--num-work-threads={records.cores()}", f"--port={port}"]
    options += [f"--rule{rule}-min-trailing-silence={_SILENCE_MS / 1000}" for rule in (1, 2)]
    with (
        tempfile.NamedTemporaryFile() as log,
        subprocess.Popen(
            [program, *options, f"--log-file={log.name}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process,
    ):
        try:
            deadline = time.monotonic() + _START_SECONDS
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BackendError("the server of sherpa-onnx did not start.")
                time.sleep(0.1)
            yield f"sherpa+ws://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def compare_servers(
    models: Models, servers: Sequence[str], measure: Callable[[str, str, int], Record], progress: Progress
) -> list[Record]:
    """Run `servers` one after another and return the results of `measure`, called with target, name and process."""
    results = []
    for name in servers:
        progress(f"starting {name}")
        with running(name, models) as (target, pid):
            results.append(measure(target, name, pid))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("servers", __doc__)
    parser.prog = "python -m nemostream.benchmarks.studies.servers"
    checkpoint = Path("examples/demo_model/demo.nemo")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint, help="NeMo checkpoint of the bundle")
    parser.add_argument("--bundle", type=Path, help="bundle of the checkpoint (default: the packaged model)")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="servers to measure")
    parser.add_argument("--chunk-ms", type=int, default=560, help="chunk size in ms")
    parser.add_argument("--manifest", type=Path, help="NeMo manifest of the recordings (default: the packaged clip)")
    parser.add_argument("--recordings", type=int, default=4, help="number of recordings of the manifest to send")
    parser.add_argument("--streams", type=int, nargs="+", help="numbers of streams (default: search the largest)")
    parser.add_argument("--first-streams", type=int, default=32, help="first number of streams of the search")
    parser.add_argument("--seconds", type=float, default=MIN_HOLD, help="duration of the hold, or of each of --streams")
    parser.add_argument("--probe-seconds", type=float, default=15.0, help="duration of a probe of the search")
    parser.add_argument("--unvalidated", action="store_true", help="int8 without accuracy check, for random weights")
    options = parser.parse_args(arguments)
    command.run(lambda: _measure(options), options)


def _measure(options: argparse.Namespace) -> Record:
    bundle = command.open_bundle(options.bundle)
    utterances = read_manifest(options.manifest) if options.manifest else packaged(bundle.manifest)
    folder = options.out / f"{options.name}-models"
    folder.mkdir(parents=True, exist_ok=True)
    models = Models(
        options.checkpoint, bundle, bundle.manifest.chunk(options.chunk_ms), folder, not options.unvalidated
    )

    def measure(target: str, name: str, pid: int) -> Record:
        result = measure_load(
            target,
            utterances[: options.recordings],
            bundle,
            label=name,
            streams=options.streams,
            first_streams=options.first_streams,
            max_streams=MAX_STREAMS,
            seconds=options.seconds,
            probe_seconds=options.probe_seconds,
            pids=[pid],
            normalise="basic",
            progress=records.report_progress,
        )
        result["model"] = records.model_of(bundle.manifest)
        records.write(result, options.out / f"{options.name}-{name.replace(' ', '-').lower()}.json")
        return result

    return compare(compare_servers(models, options.servers, measure, records.report_progress))


if __name__ == "__main__":
    main()
