"""Run all checks that need a GPU, the most important first. No section starts after `--minutes` (8).

    python -m nemostream.benchmarks.gpu_check --out benchmarks/results

Run it from a checkout, because the tests marked `gpu` are part of it. Each section runs in its own process: if one
fails, crashes or hangs, its error is reported and the others are not affected. The report is written after each
section; it starts with the verdict (whether the tokens are those of the CPU backend) and the first step times.

The first sections have reserved time, so that eight minutes always give a verdict and a step time for each library
whose engines can run here (ONNX Runtime, TensorRT, TensorRT for RTX), even if other sections hang. They use one chunk
size (560 ms), fp16 and batches of up to 8:

* environment: GPU, driver, libraries.
* tokens_LIBRARY: build the engine of the packaged model, compare the tokens of eight streams with those of the CPU
  backend and those of a copied stream with its source's, and time steps of one stream and of eight.
* full_size_model: create a full-size model with random weights that emits about `TOKENS_PER_SECOND` per stream.
* speed_LIBRARY: build its engine and measure what `speed` measures. TensorRT, whose builds take longest, is last and
  may use all time that is left.

The other sections run in the time that is left:

* tests: `pytest -m gpu`: kernels and the whole backend compared with NumPy and the CPU backend.
* loading: format of the loaded kernels of each type, type of loop that the driver can capture, and why not a better
  one.
* bandwidth: of a copy on the device.
* int8: size and time of an int8 engine compared with fp16, because int8 may be weight-only in TensorRT for RTX: its
  encoder is then smaller, but not faster with many rows.
* baseline: the step of NeMo (eager in bf16, captured in a CUDA graph, and with NeMo's own CUDA graph) and of
  nemostream, if NeMo is installed.
* speed: all chunk sizes and batches of the full-size model: the whole step as the caller sees it, the same without
  tokens, with caches that must be gathered, with phrases for all streams, and launched back to back; the encoder alone,
  and the step without decoding; a copy of a slot; the roofline; the resulting number of streams. If no engine runs,
  everything but the encoder (features, gather, scatter, decoding).
* engines: for each precision and chunk size, whether the engine of the packaged model can be built and passes the
  validation against fp32 (`engine.validate`), and its size.
* soak: 10,000 steps in which streams start and end, with and without phrases; free memory before and after.
* sanitizer: NVIDIA's compute-sanitizer on the decoding kernels.
* engine_for_other_gpu: whether this GPU accepts an engine that was built for another one.
* engine_in_while_node: whether the body of a WHILE node can contain the work of an engine. This section is last because
  the driver crashes if it is not supported.

The report lists the sections that did not run, and ends with the performance targets. Sections run with `--only` are
added to an existing report of the same environment and commit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream.benchmarks.baseline import compare_steps, prepared
from nemostream.benchmarks.gpu.correctness import compare_copy, compare_tokens
from nemostream.benchmarks.gpu.report import joined, show, verdict
from nemostream.benchmarks.gpu.speed import (
    NoEncoder,
    Report,
    copy_rate,
    fill_encoder_output,
    measure_speed,
    soak,
    stage_times,
    step_times,
)
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.competitors import NEMOSTREAM
from nemostream.benchmarks.harness.random_bundle import random_bundle
from nemostream.benchmarks.harness.records import Progress, no_progress
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engines import build_engine, open_gpu, speech
from nemostream.errors import BackendError, EngineValidationError
from nemostream.extras import install_command
from nemostream.plans import PRECISIONS, Plan, PlanStore
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.backends.gpu.onnxruntime import check_provider

LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt-rtx")
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
_RUNNERS = ("nemostream fp16", "nemo bf16", "nemo graph", "nemo built-in graph")
# Of the first sections. One optimisation profile covers these batches, so the engine is built quickly.
_FIRST_CHUNK_MS = 560
_FIRST_BATCHES = (1, 8)
_INT8_BATCHES = (1, 64)  # bound by memory, and by arithmetic
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

    def full_size_bundle(self) -> Bundle:
        """Return the full-size model, which is created on first use."""
        path = self.scratch / "full-size"
        if not path.exists():
            self.progress("creating a full-size model")
            partial = path.with_suffix(".partial")
            random_bundle(partial)
            partial.replace(path)
        return Bundle.open(path)

    def build(
        self,
        library: str,
        bundle: Bundle,
        chunks: Sequence[ChunkConfig],
        max_batch: int,
        precision: str = "fp16",
        validate: bool = True,
    ) -> dict[int, Plan]:
        """Return the engines of `chunks` by chunk size in ms; they are kept for later sections.

        `library` is one of `LIBRARIES`; `why_unavailable` selects between the two kinds of TensorRT.
        """
        if library == "onnxruntime":
            check_provider()  # before writing the graph of a full-size model, which takes long
        backend, target = (library, "cuda") if library == "onnxruntime" else ("tensorrt", None)
        options: dict[str, Any] = {"backend": backend, "target": target, "max_batch": max_batch, "validate": validate}
        return {chunk.ms: build_engine(bundle, chunk, precision, self.store, **options)[0] for chunk in chunks}

    def open(self, bundle: Bundle, plans: Mapping[int, Plan], max_batch: int) -> GpuBackend:
        backend: GpuBackend = open_gpu(bundle, self.device(), plans, max_batch + 1, max_batch)
        return backend

    def open_largest(self, bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[GpuBackend, str]:
        """Open a backend with TensorRT engines, else ONNX Runtime, else without an encoder.

        If it does not fit into the memory, batches are smaller. Returns the backend and the name of its encoder.
        """
        for library in ("tensorrt", "onnxruntime"):
            if library in self._unusable:
                continue
            try:
                plans = self.build(library, bundle, chunks, capacity - 1, validate=False)
                backend = _largest(functools.partial(self.open, bundle, plans), capacity - 1)
                return backend, f"{plans[chunks[0].ms].recipe.backend} fp16"
            except Exception as error:  # libraries raise their own types
                self._unusable[library] = f"{type(error).__name__}: {error}"

        def without_encoder(rows: int) -> GpuBackend:
            encoders = {chunk.ms: NoEncoder("float16") for chunk in chunks}
            device = self.device()
            try:
                return GpuBackend(bundle, device, encoders, capacity=rows + 1, max_batch=rows)
            except BaseException:
                device.close()  # another attempt, with a smaller batch, needs the memory
                raise

        backend = _largest(without_encoder, capacity - 1)
        fill_encoder_output(backend)
        return backend, f"none ({'; '.join(self._unusable.values())})"


def _largest(open_backend: Callable[[int], GpuBackend], max_batch: int) -> GpuBackend:
    """Open a backend for `max_batch` rows, or half as many, and so on down to 64."""
    while True:
        try:
            return open_backend(max_batch)
        except BackendError:
            if max_batch <= 64:
                raise
            max_batch //= 2


def why_unavailable(library: str, architecture: str) -> str:
    """Return why engines of `library` cannot run on this machine, or an empty string if they can.

    `library` is one of `LIBRARIES`, `architecture` the GPU ("sm90"). Selects "tensorrt-rtx" for the rest of this
    process if TensorRT is installed too.
    """
    from nemostream.engine.tensorrt import architectures, unsupported_gpu

    if library == "onnxruntime":
        try:
            check_provider()
        except BackendError as error:
            return str(error)
        return ""
    if library == "tensorrt-rtx":
        # `build_engine` prefers TensorRT; None makes its import fail.
        sys.modules["tensorrt"] = None  # type: ignore[assignment]
    try:
        module = import_module(library.replace("-", "_"))
    except ImportError as error:
        index = " --extra-index-url https://pypi.nvidia.com" if library == "tensorrt" else ""
        return f"{library} is not installed ({error}): {install_command(library)}{index}."
    if library == "tensorrt-rtx" and architecture not in architectures(module):
        return f"{unsupported_gpu(module, architecture)}."
    return ""


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


def first_tokens(library: str, context: SectionContext) -> Report:
    """Compare the tokens of the packaged model with those of the CPU backend, copy a stream, then time steps."""
    if reason := why_unavailable(library, context.device().architecture):
        return {"unavailable": reason}
    demo, streams = context.demo, max(_FIRST_BATCHES)
    chunk = demo.manifest.chunk(_FIRST_CHUNK_MS)
    result: Report = {"chunk_ms": chunk.ms, "precision": "fp16"}
    context.progress(f"building the {library} engine")
    try:
        plans = context.build(library, demo, [chunk], streams)
    except EngineValidationError as error:
        return result | {"equal": False, "validation_error": str(error)}
    backend = context.open(demo, plans, streams)
    result |= {"build_seconds": plans[chunk.ms].seconds, "engine_bytes": plans[chunk.ms].bytes, "loop": backend.loop}
    context.progress("comparing tokens")
    reference = OrtBackend(demo, capacity=streams)
    clip = speech(demo.manifest)[1]  # the model recognises this clip with confidence, so fp16 gives the same tokens
    result |= compare_tokens(demo.manifest, chunk, backend, reference, clip, streams)
    context.save(result)
    result |= compare_copy(demo.manifest, chunk, backend, clip)
    context.save(result)
    context.progress("timing steps")
    result["rows"] = [step_times(backend, chunk, batch, context.options.repeats) for batch in _FIRST_BATCHES]
    return result


def full_size_model(context: SectionContext) -> Report:
    return {"parameters_bytes": context.full_size_bundle().manifest.weights.bytes}


def first_speed(library: str, context: SectionContext) -> Report:
    """Time the full-size model. Its engine is not validated: random weights do not change the time of a step."""
    if reason := why_unavailable(library, context.device().architecture):
        return {"unavailable": reason}
    bundle = _one_chunk_size(context.full_size_bundle())
    context.progress(f"building the {library} engine")
    plans = context.build(library, bundle, bundle.manifest.chunks, max(_FIRST_BATCHES), validate=False)
    built = {"build_seconds": plans[_FIRST_CHUNK_MS].seconds, "engine_bytes": plans[_FIRST_CHUNK_MS].bytes}

    def make(bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[GpuBackend, str]:
        return context.open(bundle, plans, capacity - 1), f"{library} fp16"

    def save(figures: Report) -> None:
        context.save(figures | built)

    repeats = context.options.repeats
    return measure_speed(bundle, make, _FIRST_BATCHES, repeats, None, context.progress, save=save) | built


def _one_chunk_size(bundle: Bundle) -> Bundle:
    """Return the bundle with the chunk size of the first sections only."""
    chunks = (bundle.manifest.chunk(_FIRST_CHUNK_MS),)
    return Bundle(bundle.path, dataclasses.replace(bundle.manifest, chunks=chunks))


def int8(context: SectionContext) -> Report:
    """Compare size and time of the full-size encoder in int8 and in fp16."""
    architecture = context.device().architecture
    library = next((name for name in LIBRARIES[1:] if not why_unavailable(name, architecture)), None)
    if not library:
        return {"unavailable": f"neither TensorRT nor TensorRT for RTX runs on {architecture} here"}
    bundle = _one_chunk_size(context.full_size_bundle())
    (chunk,) = bundle.manifest.chunks
    result: Report = {"library": library, "chunk_ms": chunk.ms}
    for precision in ("fp16", "int8"):
        context.progress(f"building the {precision} engine")
        plans = context.build(library, bundle, [chunk], max(_INT8_BATCHES), precision, validate=False)
        backend = context.open(bundle, plans, max(_INT8_BATCHES))
        result[precision] = figures = {"engine_bytes": plans[chunk.ms].bytes}
        for batch in _INT8_BATCHES:
            times = stage_times(backend, chunk, batch, context.options.repeats)
            figures[f"encoder_ms_{batch}"] = times["encoder_ms"]
        backend.close()
        context.save(result)
    return result | {f"{name}_ratio": round(result["int8"][name] / value, 3) for name, value in result["fp16"].items()}


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
                    figures: Report = {"recipe": plan.recipe.stem, "seconds": plan.seconds, "bytes": plan.bytes}
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
    backend, encoder = context.open_largest(context.demo, [chunk], 9)
    return soak(backend, chunk, context.options.steps) | {"encoder": encoder, "loop": backend.loop}


def full_speed(context: SectionContext) -> Report:
    bundle = context.full_size_bundle()
    rate = context.report.get("bandwidth", {}).get("copy_bytes_per_second")
    options = context.options
    return measure_speed(
        bundle,
        context.open_largest,
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
    """Capture and launch an engine in the body of a WHILE node: whether the driver accepts it.

    The body does not run, because no kernel sets the condition.
    """
    chunk = context.demo.manifest.chunk(80)
    plans = context.build("tensorrt", context.demo, [chunk], 1, validate=False)
    backend = context.open(context.demo, plans, 1)
    device = backend.device
    silence = Batch(chunk, np.array([0]), np.zeros((1, chunk.samples), np.float32), np.array([chunk.samples]))
    enqueue = backend.stages(silence)["encoder"]

    def work() -> None:
        device.loop(device.condition(), enqueue)

    device.capture(work).launch()
    device.record_event().wait()
    return {"captured_and_launched": True, "engine": plans[chunk.ms].recipe.stem}


@dataclass(frozen=True)
class Section:
    run: Callable[[SectionContext], Report]
    seconds: float  # time limit
    reserved: bool = False  # whether earlier sections must leave this time


# In the order of execution. The reserved times add up to 480 s, the default of `--minutes`.
SECTIONS: dict[str, Section] = {
    "environment": Section(environment, 20, reserved=True),
    "tokens_onnxruntime": Section(functools.partial(first_tokens, "onnxruntime"), 75, reserved=True),
    "tokens_tensorrt": Section(functools.partial(first_tokens, "tensorrt"), 85, reserved=True),
    "tokens_tensorrt_rtx": Section(functools.partial(first_tokens, "tensorrt-rtx"), 60, reserved=True),
    "full_size_model": Section(full_size_model, 60, reserved=True),
    "speed_onnxruntime": Section(functools.partial(first_speed, "onnxruntime"), 60, reserved=True),
    "speed_tensorrt_rtx": Section(functools.partial(first_speed, "tensorrt-rtx"), 50, reserved=True),
    "speed_tensorrt": Section(functools.partial(first_speed, "tensorrt"), 70, reserved=True),
    "tests": Section(tests, 180),
    "loading": Section(loading, 90),
    "bandwidth": Section(bandwidth, 60),
    "int8": Section(int8, 300),
    "baseline": Section(baseline, 300),
    "speed": Section(full_speed, 480),
    "engines": Section(engines, 300),
    "soak": Section(soaking, 120),
    "sanitizer": Section(sanitizer, 120),
    "engine_for_other_gpu": Section(engine_for_other_gpu, 90),
    "engine_in_while_node": Section(engine_in_while_node, 60),
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
    sections: Mapping[str, Section],
    command: Callable[[str, float], Sequence[str]],
    scratch: Path,
    minutes: float,
    save: Callable[[Report], None],
    progress: Progress = no_progress,
) -> Report:
    """Run each section in its own process and return the report.

    `command` returns the command of a section that should end within the given minutes; it writes its result to
    `scratch`/SECTION.json. A section with reserved time may also use all time that is not reserved for later sections.
    If a section fails, its result so far is kept together with the error. `save` is called with the report after each
    section; sections that have not run yet have the key `not_run`.
    """
    started = time.perf_counter()
    report: Report = {name: {"not_run": "this run has not reached it"} for name in sections}
    names = list(sections)
    for index, name in enumerate(names):
        left = 60 * minutes - (time.perf_counter() - started)
        later = sum(sections[other].seconds for other in names[index + 1 :] if sections[other].reserved)
        limit = min(sections[name].seconds, left + _GRACE)
        if sections[name].reserved:
            limit = max(limit, left - later)
        progress(name)
        if left <= 0:
            report[name] = {"not_run": f"{minutes:g} minutes are over"}
        else:
            log = scratch / f"{name}.log"
            error = run(command(name, min(limit, left) / 60), log, limit)
            report[name] = read(scratch / f"{name}.json")
            if error:
                report[name] |= {"error": error, "log": log.read_text(errors="replace").splitlines()[-25:]}
        for problem in ("not_run", "unavailable", "error"):
            if problem in report[name]:
                progress(f"{name}: {problem.replace('_', ' ')}: {report[name][problem]}")
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
    sections = {name: section for name, section in SECTIONS.items() if name in names}
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

        shown: list[str] = []

        def save(report: Report) -> None:
            report = joined(earlier, report) | {"command": shlex.join(sys.argv)}
            for line in verdict(report):
                if line not in shown:
                    progress(line.replace("**", ""))
            shown[:] = verdict(report)
            write(scratch / "report.json", as_json(report))
            write(path, as_json(report))
            write(path.with_suffix(".md"), show(report))

        in_processes(sections, command, scratch, options.minutes, save, progress)
        print(path.with_suffix(".md").read_text(), end="")


def _run_section(options: argparse.Namespace) -> None:
    """Run one section in this process and write its result."""
    context = SectionContext(options, options.scratch)
    try:
        result = SECTIONS[options.section].run(context)
    except Exception as error:  # any error is part of the report
        result = context.result | {"error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
    context.save(result)


if __name__ == "__main__":
    main()
