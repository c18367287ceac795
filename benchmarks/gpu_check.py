"""Run all checks that need a GPU. No section starts after `--minutes` (8).

    python -m nemostream.benchmarks.gpu_check --out benchmarks/results

Run it from a checkout, because the tests marked `gpu` are part of it. Each section runs in its own process: if one
fails, crashes or hangs, its error is reported and the others are not affected. The report is written after each
section.

* environment: GPU, driver, libraries.
* loading: format of the loaded kernels of each type, type of loop that the driver can capture, and why not a better
  one.
* bandwidth: of a copy on the device.
* tests: `pytest -m gpu`: kernels and the whole backend compared with NumPy and the CPU backend.
* sanitizer: NVIDIA's compute-sanitizer on the decoding kernels.
* engine_for_other_gpu: whether this GPU accepts an engine that was built for another one.
* engines: for each precision and chunk size, whether the engine of the packaged model can be built and passes the
  validation against fp32 (`engine.validate`).
* soak: 10,000 steps in which streams start and end, with and without phrases; free memory before and after.
* speed: a full-size model with random weights that emits about `TOKENS_PER_SECOND` per stream. For each chunk size and
  batch: the whole step as the caller sees it, the same without tokens, with caches that must be gathered, with phrases
  for all streams, and launched back to back; the encoder alone, and the step without decoding; the roofline; the
  resulting number of streams.
* baseline: the step of NeMo (eager in bf16, and captured in a CUDA graph) and of nemostream, if NeMo is installed.
* engine_in_while_node: whether the body of a WHILE node can contain the work of an engine. This section is last because
  the driver crashes if it is not supported.

If no engine runs on this machine, speed is measured without the encoder (features, gather, scatter, decoding). The
report ends with the performance targets. Sections run with `--only` are added to an existing report of the same
environment and commit.
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
from nemostream.benchmarks.gpu.speed import NoEncoder, Report, copy_rate, fill_encoder_output, measure_speed, soak
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.competitors import NEMOSTREAM
from nemostream.benchmarks.harness.random_bundle import random_bundle
from nemostream.benchmarks.harness.records import Progress, no_progress
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engines import build_engine, open_gpu
from nemostream.errors import BackendError
from nemostream.plans import PRECISIONS, PlanStore
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.backends.gpu.onnxruntime import check_provider

_BATCHES = (1, 8, 64, 256, 1024)
# Test modules, those with few dependencies first.
_TESTS = (
    "gpu/test_kernels",
    "gpu/test_slots",
    "gpu/test_backend",
    "test_model_backends",
    "gpu/test_attention",
    "gpu/test_attention_plugin",
)
_RUNNERS = ("nemostream fp16", "nemo bf16", "nemo graph")
_GRACE = 60.0  # seconds that a running section may take beyond `--minutes`


class SectionContext:
    """Context of a section: options, a folder shared by all sections, the packaged model, earlier results."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.started = time.perf_counter()
        self.deadline = self.started + 60 * options.minutes
        self.demo = Bundle.open(nemostream.demo_bundle())
        self.store = PlanStore(scratch / "engines")
        self.report = read(scratch / "report.json")  # of earlier sections
        self.result: Report = {}
        self._unusable: dict[str, str] = {}  # errors by engine backend

    def device(self) -> Any:
        from nemostream.runtime.backends.gpu.cuda import CudaDevice

        return CudaDevice()

    def progress(self, message: str) -> None:
        print(f"{time.perf_counter() - self.started:6.1f} s  {message}", file=sys.stderr, flush=True)

    def save(self, result: Report) -> None:
        """Write the result so far, so that it is kept if this process crashes."""
        self.result = result
        write(self.scratch / f"{self.options.section}.json", as_json(result))

    def open_backend(self, bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[GpuBackend, str]:
        """Open a backend with TensorRT engines, else ONNX Runtime, else without an encoder.

        Returns the backend and the name of its encoder.
        """
        device = self.device()
        for backend, target in (("tensorrt", device.architecture), ("onnxruntime", "cuda")):
            if backend in self._unusable:
                continue
            try:
                if backend == "onnxruntime":
                    check_provider()  # before writing the graph, which takes minutes
                plans = {
                    chunk.ms: build_engine(
                        bundle, chunk, "fp16", self.store, backend=backend, target=target, max_batch=capacity - 1
                    )[0]
                    for chunk in chunks
                }
                return open_gpu(bundle, self.device(), plans, capacity, capacity - 1), f"{backend} fp16"
            except Exception as error:  # libraries raise their own types
                self._unusable[backend] = f"{type(error).__name__}: {error}"
        encoders = {chunk.ms: NoEncoder("float16") for chunk in chunks}
        without_encoder = GpuBackend(bundle, device, encoders, capacity=capacity, max_batch=capacity - 1)
        fill_encoder_output(without_encoder)
        return without_encoder, f"none ({'; '.join(self._unusable.values())})"


# -- sections ----------------------------------------------------------------------------------------------------------


def environment(context: SectionContext) -> Report:
    device = context.device()
    return {
        "gpu": device.name,
        "architecture": device.architecture,
        "nvidia_smi": records.hardware()["gpu"],
        "platform": platform.platform(),
        "libraries": records.versions(),
        "commit": records.commit(),
    }


def loading(context: SectionContext) -> Report:
    manifest, device, loaded_kernels = context.demo.manifest, context.device(), {}
    for cache_dtype in kernels.MATMUL_TYPES:
        start = time.perf_counter()
        loaded = device.kernels(kernels.macros(manifest, cache_dtype, True), kernels.entries(manifest))
        seconds = time.perf_counter() - start
        loaded_kernels[cache_dtype] = {
            "format": loaded.format,
            "conditional": loaded.conditional,
            "seconds": round(seconds, 2),
        }
        context.progress(f"{cache_dtype}: {loaded_kernels[cache_dtype]}")
    chunk = manifest.chunk(560)
    backend = GpuBackend(context.demo, device, {560: NoEncoder("float16")}, capacity=2)
    backend.submit(Batch(chunk, np.array([0]), np.zeros((1, chunk.samples), np.float32), np.array([8960]))).result()
    loop, failures = backend.loop, backend.failures
    backend.close()
    return {"kernels": loaded_kernels, "loop": loop, "loop_failures": failures}


def bandwidth(context: SectionContext) -> Report:
    return {"copy_bytes_per_second": copy_rate(context.device())}


def tests(context: SectionContext) -> Report:
    return _pytest(
        context, ["-m", "gpu", "--maxfail=10", *(f"tests/runtime/backends/{name}.py" for name in _TESTS)], 150
    )


def sanitizer(context: SectionContext) -> Report:
    tool = shutil.which("compute-sanitizer")
    if not tool:
        raise BackendError("compute-sanitizer is not on the PATH; it is part of the CUDA toolkit.")
    selection = [
        "-k",
        "test_decoding_matches_reference and gpu and random",
        "tests/runtime/backends/gpu/test_kernels.py",
    ]
    result = _pytest(context, selection, 90, [tool, "--error-exitcode", "9"])
    summary = [line for line in result["tail"] if "ERROR SUMMARY" in line]
    return {"clean": result["passed"], "sanitizer_summary": summary, **result}


def _pytest(context: SectionContext, arguments: Sequence[str], limit: float, tool: Sequence[str] = ()) -> Report:
    """Run pytest and return its outcome and output, which is kept if the time limit is exceeded."""
    if not Path("tests/runtime").is_dir():
        raise BackendError(f"{Path.cwd()} has no tests; run the GPU check from a checkout.")
    command = [*tool, sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-header", *arguments]
    output = context.scratch / "pytest.txt"
    error = run(command, output, min(limit, context.deadline - time.perf_counter() + _GRACE / 2))
    lines = output.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "passed": not error,
        "error_of_pytest": error,
        "summary": lines[-1] if lines else "",
        "failed": failed,
        "tail": lines[-150:],
    }


def engine_for_other_gpu(context: SectionContext) -> Report:
    """Check whether this GPU accepts an engine that TensorRT for RTX built for another one."""
    import tensorrt_rtx as trt

    plan, _ = build_engine(
        context.demo, context.demo.manifest.chunk(80), "fp16", context.store, target="sm89", max_batch=1
    )
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    blob = plan.path.read_bytes()
    validity, diagnostics = runtime.get_engine_validity(blob)
    return {
        "built_for": "sm89",
        "this_gpu": context.device().architecture,
        "validity": validity.name,
        "diagnostics": hex(diagnostics),
        "deserializes": runtime.deserialize_cuda_engine(blob) is not None,
    }


def engines(context: SectionContext) -> Report:
    """Build and validate every engine of the packaged model that this GPU supports."""
    result: Report = {}
    for backend, target in (("tensorrt", None), ("onnxruntime", "cuda")):
        for precision in PRECISIONS:
            for chunk in context.demo.manifest.chunks:
                if time.perf_counter() > context.deadline:
                    return result | {"skipped": "time limit"}
                context.progress(f"{backend} {precision} {chunk.ms} ms")
                try:
                    if backend == "onnxruntime":
                        check_provider()
                    plan, _ = build_engine(
                        context.demo, chunk, precision, context.store, backend=backend, target=target, max_batch=8
                    )
                    figures: Report = {"recipe": plan.recipe.stem, "seconds": plan.seconds}
                    figures |= {"validated": bool(plan.validation), **plan.validation}
                except Exception as error:  # libraries raise their own types
                    figures = {"failure": f"{error}"}
                result[f"{backend} {precision} {chunk.ms}"] = figures
                context.save(result)
                if "failure" in figures and "failed validation:" not in figures["failure"]:
                    break  # the library is missing or does not support this precision: skip the other chunk sizes
    return result


def soaking(context: SectionContext) -> Report:
    chunk = context.demo.manifest.chunk(80)
    backend, encoder = context.open_backend(context.demo, [chunk], 9)
    return soak(backend, chunk, context.options.steps) | {"encoder": encoder, "loop": backend.loop}


def full_speed(context: SectionContext) -> Report:
    context.progress("creating a full-size model")
    bundle = random_bundle(context.scratch / "random")
    rate = context.report.get("bandwidth", {}).get("copy_bytes_per_second")
    options = context.options
    return measure_speed(
        bundle,
        context.open_backend,
        options.batch,
        options.repeats,
        rate,
        context.progress,
        context.deadline,
        context.save,
    )


def baseline(context: SectionContext) -> Report:
    result: Report = {}
    with prepared(None, None, context.progress) as (checkpoint, bundle):
        for device in ("cuda", "cuda:onnxruntime"):
            result = compare_steps(
                bundle,
                checkpoint,
                _RUNNERS,
                (1,),
                (80, 560),
                context.options.repeats,
                device=device,
                engines=context.scratch / "engines",
                progress=context.progress,
            )
            context.save(result)
            if any(row["case"]["runner"].startswith(NEMOSTREAM) for row in result["rows"]):
                break
    return result


def engine_in_while_node(context: SectionContext) -> Report:
    """Capture and launch an engine in the body of a WHILE node, which runs once as no kernel sets the condition."""
    device = context.device()
    plans = [plan for plan in context.store.all() if plan.recipe.device == device.architecture]
    plan = next((plan for plan in plans if plan.recipe.graph == "encoder-80ms"), None)
    if not plan:
        raise BackendError("there is no engine for this GPU; run the section engines first.")
    backend = open_gpu(context.demo, device, {80: plan}, 2, 2)
    chunk = context.demo.manifest.chunk(80)
    silence = Batch(chunk, np.array([0]), np.zeros((1, chunk.samples), np.float32), np.array([chunk.samples]))
    enqueue = backend.stages(silence)["encoder"]

    def work() -> None:
        device.loop(device.condition(), enqueue)

    device.capture(work).launch()
    device.record_event().wait()
    return {"captured_and_launched": True, "engine": plan.recipe.stem}


# Sections in the order of execution, with their time limits in seconds.
SECTIONS: dict[str, tuple[Callable[[SectionContext], Report], float]] = {
    "environment": (environment, 60),
    "loading": (loading, 90),
    "bandwidth": (bandwidth, 60),
    "tests": (tests, 180),
    "sanitizer": (sanitizer, 120),
    "engine_for_other_gpu": (engine_for_other_gpu, 90),
    "engines": (engines, 300),
    "soak": (soaking, 120),
    "speed": (full_speed, 480),
    "baseline": (baseline, 300),
    "engine_in_while_node": (engine_in_while_node, 60),
}


# -- processes ---------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], output: Path, limit: float) -> str:
    """Run a command with its output in a file, and kill all its processes at the end.

    Returns the reason if it failed or exceeded `limit` seconds, else an empty string.
    """
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"timed out after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exited with {signal.Signals(-code).name if code < 0 else code}" if code else ""


def in_processes(
    sections: Mapping[str, float],
    command: Callable[[str, float], Sequence[str]],
    scratch: Path,
    minutes: float,
    save: Callable[[Report], None],
    progress: Progress = no_progress,
) -> Report:
    """Run each section in its own process and return the report; `sections` maps names to time limits in seconds.

    `command` returns the command of a section for the remaining minutes; it writes its result to
    `scratch`/SECTION.json. If a section fails, its result so far is kept together with the error. `save` is called with
    the report after each section.
    """
    started, report = time.perf_counter(), Report()
    for name, limit in sections.items():
        left = 60 * minutes - (time.perf_counter() - started)
        progress(name)
        if left <= 0:
            report[name] = {"error": f"not started: {minutes} minutes are over; run it with --only {name}."}
        else:
            log = scratch / f"{name}.log"
            error = run(command(name, left / 60), log, min(limit, left + _GRACE))
            report[name] = read(scratch / f"{name}.json")
            if error:
                report[name] |= {"error": error, "log": log.read_text(errors="replace").splitlines()[-25:]}
        if "error" in report[name]:
            progress(f"{name}: {report[name]['error']}")
        report["seconds"] = time.perf_counter() - started
        save(report)
    return report


def read(path: Path) -> Report:
    """Return a report from a file; empty if there is none."""
    report: Report = json.loads(path.read_text()) if path.is_file() else {}
    return report


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
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
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to run, in addition to environment")
    parser.add_argument("--batch", type=int, nargs="+", default=list(_BATCHES), help="batch sizes of section speed")
    parser.add_argument("--repeats", type=int, default=60, help="timed steps per case")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of section soak")
    parser.add_argument("--minutes", type=float, default=8, help="time after which no section starts")
    # Internal: run one section in this process, with the folder of the parent process.
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section:
        _run_section(options)
    else:
        _run_all(options)


def _run_all(options: argparse.Namespace) -> None:
    """Run the sections in processes and write the report. Exits if there is no GPU."""
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        device = CudaDevice()
        path = options.out / f"gpu-{device.name.replace(' ', '-')}.json"
        device.close()
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    names = ["environment", *(options.only or SECTIONS)]
    sections = {name: limit for name, (_, limit) in SECTIONS.items() if name in names}
    started, earlier = time.perf_counter(), read(path) if options.only else {}

    def progress(message: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {message}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        scratch = Path(folder)

        def command(section: str, minutes: float) -> list[str]:
            arguments = ["--section", section, "--scratch", folder, "--minutes", f"{minutes}"]
            arguments += ["--steps", f"{options.steps}", "--repeats", f"{options.repeats}"]
            arguments += ["--batch", *map(str, options.batch)]
            return [sys.executable, "-m", "nemostream.benchmarks.gpu_check", *arguments]

        def save(report: Report) -> None:
            report = joined(earlier, report) | {"command": shlex.join(sys.argv)}
            write(scratch / "report.json", as_json(report))
            write(path, as_json(report))
            write(path.with_suffix(".md"), show(report))

        in_processes(sections, command, scratch, options.minutes, save, progress)
        print(path.with_suffix(".md").read_text(), end="")


def _run_section(options: argparse.Namespace) -> None:
    """Run one section in this process and write its result."""
    context = SectionContext(options, options.scratch)
    try:
        result = SECTIONS[options.section][0](context)
    except Exception as error:  # any error is part of the report
        result = context.result | {"error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    context.save(result)


if __name__ == "__main__":
    main()
