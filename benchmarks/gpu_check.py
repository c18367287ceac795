"""Everything that only a GPU can show, in one command; after `--minutes` (8) nothing more is begun.

    python -m nemostream.benchmarks.gpu_check --out benchmarks/results

Run it from a checkout: the tests marked `gpu` are part of it. Each section is a process of its own: one that fails,
crashes or hangs says so and leaves the others' figures alone. The report is written after each.

* environment: GPU, driver, libraries;
* loading: how each type's kernels were loaded, what kind of loop the driver can record, and why no better one;
* bandwidth: of a copy on the device;
* tests: `pytest -m gpu`, our kernels and the whole backend against numpy and the CPU backend;
* sanitizer: NVIDIA's compute-sanitizer over the decoding kernels;
* engine_from_afar, engines: for each precision, is the packaged model's engine built, accepted by this GPU, recorded,
  and as good as fp32 (`runtime.gate`) at every chunk size? Is one that was built for another GPU?
* soak: 10,000 steps, streams coming and going, boosted and not; free memory before and after;
* speed: a full-size model of random weights that says about `TOKENS_PER_SECOND` per stream; per chunk size and batch
  the whole step as the caller sees it, the same when nobody speaks, with caches that must be gathered, with phrases for
  every stream, and launched back to back; the encoder alone, and the step without decoding; the floor; how many streams
  that makes;
* baseline: NeMo's own step beside ours, eager in bf16 and captured in a CUDA graph, if NeMo is installed (`baseline`);
* engine_in_a_loop: can an engine's work be in the body of a WHILE node? Last, for where it cannot the driver crashes.

Without an engine that runs here, speed is measured of all but the encoder (features, gather, scatter, decoding). What
is to be reached, and whether it was, ends the report. A section run with `--only` joins the report of the others that
is there already, if that was made in the same environment, of the same commit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream.benchmarks.baseline import compare_steps, prepared
from nemostream.benchmarks.gpu.report import joined, show
from nemostream.benchmarks.gpu.speed import NoEncoder, Report, copy_rate, give_frames, soak, speed
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.competitors import OURS
from nemostream.benchmarks.harness.random_bundle import random_bundle
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engines import build_engine, open_gpu
from nemostream.errors import BackendError
from nemostream.plans import PRECISIONS, PlanStore
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.backends.gpu.onnxruntime import check_provider

_BATCHES = (1, 8, 64, 256, 1024)
_TESTS = ("gpu/test_kernels", "gpu/test_slots", "gpu/test_backend", "test_model_backends")  # what rests on little first
_SIDES = ("ours fp16", "nemo bf16", "nemo graph")
_GRACE = 60.0  # seconds that what was begun may take beyond `--minutes`


class Here:
    """What a section has: the options, a folder that all share, the GPU, the packaged model."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.started = time.perf_counter()
        self.until = self.started + 60 * options.minutes
        self.demo = Bundle.open(nemostream.demo_bundle())
        self.store = PlanStore(scratch / "engines")
        self.report = read(scratch / "report.json")  # of the sections before
        self.found: Report = {}
        self._unusable: dict[str, str] = {}  # kinds of engine that failed once, and why

    def device(self) -> Any:
        from nemostream.runtime.backends.gpu.cuda import CudaDevice

        return CudaDevice()

    def say(self, message: str) -> None:
        print(f"{time.perf_counter() - self.started:6.1f} s  {message}", file=sys.stderr, flush=True)

    def keep(self, found: Report) -> None:
        """What is known by now, should this process not live to tell."""
        self.found = found
        write(self.scratch / f"{self.options.section}.json", as_json(found))

    def best(self, bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[GpuBackend, str]:
        """TensorRT, else ONNX Runtime, else no encoder at all. Random weights are not gated: nothing is lost."""
        device = self.device()
        for backend, target in (("tensorrt", device.architecture), ("onnxruntime", "cuda")):
            if backend in self._unusable:
                continue
            try:
                if backend == "onnxruntime":
                    check_provider()  # or a graph would first be written for minutes
                plans = {
                    chunk.ms: build_engine(
                        bundle, chunk, "fp16", self.store, backend=backend, target=target, max_batch=capacity - 1
                    )[0]
                    for chunk in chunks
                }
                return open_gpu(bundle, self.device(), plans, capacity, capacity - 1), f"{backend} fp16"
            except Exception as error:  # libraries have their own kinds
                self._unusable[backend] = f"{type(error).__name__}: {error}"
        encoders = {chunk.ms: NoEncoder("float16") for chunk in chunks}
        alone = GpuBackend(bundle, device, encoders, capacity=capacity, max_batch=capacity - 1)
        give_frames(alone)
        return alone, f"none ({'; '.join(self._unusable.values())})"


# -- sections ----------------------------------------------------------------------------------------------------------


def environment(here: Here) -> Report:
    device = here.device()
    return {
        "gpu": device.name,
        "architecture": device.architecture,
        "nvidia_smi": records.hardware()["gpu"],
        "platform": platform.platform(),
        "libraries": records.versions(),
        "commit": records.commit(),
    }


def loading(here: Here) -> Report:
    manifest, device, found = here.demo.manifest, here.device(), {}
    for cache_dtype in kernels.MATMUL_TYPES:
        start = time.perf_counter()
        loaded = device.kernels(kernels.macros(manifest, cache_dtype, True), kernels.entries(manifest))
        seconds = time.perf_counter() - start
        found[cache_dtype] = {"format": loaded.format, "conditional": loaded.conditional, "seconds": round(seconds, 2)}
        here.say(f"{cache_dtype}: {found[cache_dtype]}")
    chunk = manifest.chunk(560)
    backend = GpuBackend(here.demo, device, {560: NoEncoder("float16")}, capacity=2)
    backend.submit(Batch(chunk, np.array([0]), np.zeros((1, chunk.samples), np.float32), np.array([8960]))).result()
    loop, why = backend.loop, backend.failures
    backend.close()
    return {"kernels": found, "loop": loop, "no_better_because": why}


def bandwidth(here: Here) -> Report:
    return {"copy_bytes_per_second": copy_rate(here.device())}


def tests(here: Here) -> Report:
    return _pytest(here, ["-m", "gpu", "--maxfail=10", *(f"tests/runtime/backends/{name}.py" for name in _TESTS)], 150)


def sanitizer(here: Here) -> Report:
    tool = shutil.which("compute-sanitizer")
    if not tool:
        raise BackendError("compute-sanitizer is not on the PATH (it comes with CUDA).")
    chosen = [
        "-k",
        "test_decoding_matches_reference and gpu and random",
        "tests/runtime/backends/gpu/test_kernels.py",
    ]
    found = _pytest(here, chosen, 90, [tool, "--error-exitcode", "9"])
    return {"clean": found["passed"], "said": [line for line in found["tail"] if "ERROR SUMMARY" in line], **found}


def _pytest(here: Here, arguments: Sequence[str], limit: float, tool: Sequence[str] = ()) -> Report:
    """Also what was said until time was up."""
    if not Path("tests/runtime").is_dir():
        raise BackendError(f"{Path.cwd()} has no tests; run this from a checkout.")
    command = [*tool, sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-header", *arguments]
    output = here.scratch / "pytest.txt"
    ended = run(command, output, min(limit, here.until - time.perf_counter() + _GRACE / 2))
    lines = output.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "passed": not ended,
        "ended": ended,
        "summary": lines[-1] if lines else "",
        "failed": failed,
        "tail": lines[-150:],
    }


def engine_from_afar(here: Here) -> Report:
    """What this GPU says of an engine that TensorRT for RTX built for another one."""
    import tensorrt_rtx as trt

    plan, _ = build_engine(here.demo, here.demo.manifest.chunk(80), "fp16", here.store, target="sm89", max_batch=1)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    blob = plan.path.read_bytes()
    validity, diagnostics = runtime.get_engine_validity(blob)
    return {
        "built_for": "sm89",
        "here": here.device().architecture,
        "validity": validity.name,
        "diagnostics": hex(diagnostics),
        "deserializes": runtime.deserialize_cuda_engine(blob) is not None,
    }


def engines(here: Here) -> Report:
    """Every engine of the packaged model that this GPU takes, gated."""
    found: Report = {}
    for backend, target in (("tensorrt", None), ("onnxruntime", "cuda")):
        for precision in PRECISIONS:
            for chunk in here.demo.manifest.chunks:
                if time.perf_counter() > here.until:
                    return found | {"left_out": "for time"}
                here.say(f"{backend} {precision} {chunk.ms} ms")
                try:
                    if backend == "onnxruntime":
                        check_provider()
                    plan, _ = build_engine(
                        here.demo, chunk, precision, here.store, backend=backend, target=target, max_batch=8
                    )
                    figures: Report = {"recipe": plan.recipe.stem, "seconds": plan.seconds}
                    figures |= {"validated": bool(plan.validation), **plan.validation}
                except Exception as error:  # libraries have their own kinds
                    figures = {"refused": f"{error}"}
                found[f"{backend} {precision} {chunk.ms}"] = figures
                here.keep(found)
                if "refused" in figures and "failed validation:" not in figures["refused"]:
                    break  # not the gate: the library is missing, or cannot do this precision here
    return found


def soaking(here: Here) -> Report:
    chunk = here.demo.manifest.chunk(80)
    backend, encoder = here.best(here.demo, [chunk], 9)
    return soak(backend, chunk, here.options.steps) | {"encoder": encoder, "loop": backend.loop}


def full_speed(here: Here) -> Report:
    here.say("filling in a full-size model")
    bundle = random_bundle(here.scratch / "random")
    rate = here.report.get("bandwidth", {}).get("copy_bytes_per_second")
    options = here.options
    return speed(bundle, here.best, options.batch, options.repeats, rate, here.say, here.until, here.keep)


def baseline(here: Here) -> Report:
    found: Report = {}
    with prepared(None, None, here.say) as (checkpoint, bundle):
        for device in ("cuda", "cuda:onnxruntime"):
            found = compare_steps(
                bundle,
                checkpoint,
                _SIDES,
                (1,),
                (80, 560),
                here.options.repeats,
                device=device,
                engines=here.scratch / "engines",
                say=here.say,
            )
            here.keep(found)
            if any(row["case"]["side"].startswith(OURS) for row in found["rows"]):
                break
    return found


def engine_in_a_loop(here: Here) -> Report:
    """The body runs once: nobody sets the condition."""
    device = here.device()
    found = [plan for plan in here.store.all() if plan.recipe.device == device.architecture]
    plan = next((plan for plan in found if plan.recipe.graph == "encoder-80ms"), None)
    if not plan:
        raise BackendError("no engine was built for this GPU.")
    backend = open_gpu(here.demo, device, {80: plan}, 2, 2)
    chunk = here.demo.manifest.chunk(80)
    silence = Batch(chunk, np.array([0]), np.zeros((1, chunk.samples), np.float32), np.array([chunk.samples]))
    enqueue = backend.stages(silence)["encoder"]

    def work() -> None:
        device.loop(device.condition(), enqueue)

    device.capture(work).launch()
    device.record_event().wait()
    return {"recorded_and_launched": True, "engine": plan.recipe.stem}


# In this order, with the seconds that each may take.
SECTIONS: dict[str, tuple[Callable[[Here], Report], float]] = {
    "environment": (environment, 60),
    "loading": (loading, 90),
    "bandwidth": (bandwidth, 60),
    "tests": (tests, 180),
    "sanitizer": (sanitizer, 120),
    "engine_from_afar": (engine_from_afar, 90),
    "engines": (engines, 300),
    "soak": (soaking, 120),
    "speed": (full_speed, 480),
    "baseline": (baseline, 300),
    "engine_in_a_loop": (engine_in_a_loop, 60),
}


# -- processes ---------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], output: Path, limit: float) -> str:
    """Run it with all that it starts, what it says into a file. Why it ended other than well, or nothing."""
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"was not done after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"ended with {signal.Signals(-code).name if code < 0 else code}" if code else ""


def in_processes(
    sections: Mapping[str, float],
    command: Callable[[str, float], Sequence[str]],
    scratch: Path,
    minutes: float,
    keep: Callable[[Report], None],
    say: Callable[[str], None] = lambda message: None,
) -> Report:
    """The report of all sections; `sections` has the seconds that each may take.

    `command` (a section, minutes left) leaves what was found in `scratch`/SECTION.json; what is there of a section that
    did not end well is kept beside the reason. `keep` gets the report after each.
    """
    started, report = time.perf_counter(), Report()
    for name, limit in sections.items():
        left = 60 * minutes - (time.perf_counter() - started)
        say(name)
        if left <= 0:
            report[name] = {"error": f"{minutes} minutes were over; run it alone with --only {name}."}
        else:
            log = scratch / f"{name}.log"
            ended = run(command(name, left / 60), log, min(limit, left + _GRACE))
            report[name] = read(scratch / f"{name}.json")
            if ended:
                report[name] |= {"error": ended, "log": log.read_text(errors="replace").splitlines()[-25:]}
        if "error" in report[name]:
            say(f"{name}: {report[name]['error']}")
        report["seconds"] = time.perf_counter() - started
        keep(report)
    return report


def read(path: Path) -> Report:
    """What was written, or nothing."""
    found: Report = json.loads(path.read_text()) if path.is_file() else {}
    return found


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def as_json(report: Report) -> str:
    return json.dumps(report, indent=1, default=str) + "\n"


# -- the command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.gpu_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to run, beside the environment")
    parser.add_argument("--batch", type=int, nargs="+", default=list(_BATCHES))
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10_000, help="of the soak")
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing more is begun")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # in this process, for ...
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)  # ... the process that has this folder
    options = parser.parse_args(arguments)
    if options.section:
        _section(options)
        return
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        device = CudaDevice()
        name = device.name.replace(" ", "-")
        device.close()
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    wanted = ["environment", *(options.only or SECTIONS)]
    chosen = {name: limit for name, (_, limit) in SECTIONS.items() if name in wanted}
    started = time.perf_counter()

    def say(message: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {message}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        scratch = Path(folder)

        def command(section: str, minutes: float) -> list[str]:
            own = ["--section", section, "--scratch", folder, "--minutes", f"{minutes}"]
            own += ["--steps", f"{options.steps}", "--repeats", f"{options.repeats}"]
            own += ["--batch", *map(str, options.batch)]
            return [sys.executable, "-m", "nemostream.benchmarks.gpu_check", *own]

        path = options.out / f"gpu-{name}.json"
        earlier = read(path) if options.only else {}

        def keep(report: Report) -> None:
            report = joined(earlier, report) | {"command": shlex.join(sys.argv)}
            write(scratch / "report.json", as_json(report))
            write(path, as_json(report))
            write(path.with_suffix(".md"), show(report))

        in_processes(chosen, command, scratch, options.minutes, keep, say)
        print(path.with_suffix(".md").read_text(), end="")


def _section(options: argparse.Namespace) -> None:
    here = Here(options, options.scratch)
    try:
        found = SECTIONS[options.section][0](here)
    except Exception as error:  # whatever it is, it is this section's alone
        found = here.found | {"error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    here.keep(found)


if __name__ == "__main__":
    main()
