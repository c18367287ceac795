"""Everything that only a GPU can show, in one command; after `--minutes` (8) nothing more is begun.

    python -m nemostream.benchmarks.gpu_check --out benchmarks/results

Run it from a checkout: the tests marked `gpu` are part of it. Sections, each of which may fail without stopping the
others, and says then why:

* environment: GPU, driver, libraries;
* loading: how each type's kernels were loaded, and what kind of loop the driver can record;
* tests: `pytest -m gpu`, our kernels and the whole backend against numpy and the CPU backend;
* sanitizer: NVIDIA's compute-sanitizer over the decoding kernels;
* engines, engine_from_afar, engine_in_a_loop: for each precision, is the packaged model's engine built, accepted by
  this GPU, recorded, and as good as fp32 (`runtime.gate`) at every chunk size? Is one that was built for another GPU?
  Can an engine's work be in the body of a WHILE node?
* soak: 10,000 steps, streams coming and going, boosted and not; free memory before and after;
* speed: a full-size model of random weights that says about `TOKENS_PER_SECOND` per stream; per chunk size and batch
  the whole step as the caller sees it, the same when nobody speaks, with caches that must be gathered, with phrases for
  every stream, and launched back to back; the floor; how many streams that makes.

Without an engine that runs here, speed is measured of all but the encoder (features, gather, scatter, decoding).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import nemostream
from nemostream.benchmarks import record
from nemostream.benchmarks.gpu_speed import NoEncoder, Report, copy_rate, give_frames, soak, speed
from nemostream.benchmarks.random_bundle import random_bundle
from nemostream.engines import build_engine, open_gpu
from nemostream.errors import BackendError, NemostreamError
from nemostream.plans import PRECISIONS, Plan, PlanStore
from nemostream.runtime import kernels
from nemostream.runtime.backend import Batch
from nemostream.runtime.gpu import GpuBackend
from nemostream.spec import Bundle, Chunk

_BATCHES = (1, 8, 64, 256, 1024)

# -- sections ----------------------------------------------------------------------------------------------------------


def environment(device: Any) -> Report:
    return {
        "gpu": device.name, "architecture": device.architecture, "nvidia_smi": record.hardware()["gpu"],
        "platform": platform.platform(), "libraries": record.versions(), "command": shlex.join(sys.argv),
        "commit": record.commit(),
    }  # fmt: skip


def loading(device: Any, bundle: Bundle) -> Report:
    found = {}
    for cell in kernels.NARROW:
        start = time.perf_counter()
        loaded = device.kernels(kernels.macros(bundle.manifest, cell, True), kernels.entries(bundle.manifest))
        seconds = time.perf_counter() - start
        found[cell] = {"format": loaded.format, "conditional": loaded.conditional, "seconds": round(seconds, 2)}
    chunk = bundle.manifest.chunk(560)
    backend = GpuBackend(bundle, device, {560: NoEncoder("float16")}, capacity=2)
    backend.submit(Batch(chunk, np.array([0]), np.zeros((1, chunk.samples), np.float32), np.array([8960]))).result()
    loop = backend.loop
    backend.close()
    return {"kernels": found, "loop": loop}


def tests(checkout: Path, limit: float) -> Report:
    if not (checkout / "tests" / "runtime").is_dir():
        raise BackendError(f"{checkout} has no tests; run this from a checkout.")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "--no-header", "tests/runtime"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=limit)
    return {"passed": done.returncode == 0, "tail": done.stdout.splitlines()[-15:]}


def sanitizer(checkout: Path, limit: float) -> Report:
    tool = shutil.which("compute-sanitizer")
    if not tool:
        raise BackendError("compute-sanitizer is not on the PATH (it comes with CUDA).")
    chosen = "test_decoding_equals_the_definition and gpu and random"
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-k", chosen,
               "tests/runtime/test_kernels.py"]  # fmt: skip
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=limit)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR SUMMARY" in line or "passed" in line]
    return {"clean": done.returncode == 0, "said": said}


def engines(bundle: Bundle, store: PlanStore, say: Callable[[str], None]) -> Report:
    """Every engine of the packaged model that this GPU takes, gated."""
    found: Report = {}
    for backend, target in (("tensorrt", None), ("onnxruntime", "cuda")):
        for precision in PRECISIONS:
            for chunk in bundle.manifest.chunks:
                say(f"{backend} {precision} {chunk.ms} ms")
                try:
                    plan, _ = build_engine(bundle, chunk, precision, store, backend=backend, target=target, max_batch=8)
                    figures = {"recipe": plan.recipe.stem, "seconds": plan.seconds, **plan.gate}
                except NemostreamError as error:
                    figures = {"refused": str(error)}
                found[f"{backend} {precision} {chunk.ms}"] = figures
                if "refused" in figures and "refused:" not in figures["refused"]:
                    break  # not the gate: the library is missing, or cannot do this precision here
    return found


def from_afar(device: Any, bundle: Bundle, store: PlanStore) -> Report:
    """What this GPU says of an engine that TensorRT for RTX built for another one."""
    import tensorrt_rtx as trt

    plan, _ = build_engine(bundle, bundle.manifest.chunk(80), "fp16", store, target="sm89", max_batch=1)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    blob = plan.path.read_bytes()
    validity, diagnostics = runtime.get_engine_validity(blob)
    return {
        "built_for": "sm89", "here": device.architecture, "validity": validity.name, "diagnostics": hex(diagnostics),
        "deserializes": runtime.deserialize_cuda_engine(blob) is not None,
    }  # fmt: skip


def engine_in_a_loop(device: Any, plan: Plan, bundle: Bundle) -> Report:
    """Is an engine's work allowed in the body of a WHILE node? The body runs once: nobody sets the condition."""
    backend = open_gpu(bundle, device, {80: plan}, 2, 2)
    enqueue = backend._recordings[80, 1, False].enqueue

    def work() -> None:
        condition = device.condition()
        device.loop(condition, enqueue)

    device.record(work).launch()
    device.mark().wait()
    return {"recorded_and_launched": True}


# -- the report --------------------------------------------------------------------------------------------------------


def show(report: Report) -> str:
    """The report as Markdown."""
    lines = ["# GPU check", ""]
    env = report.get("environment", {})
    lines += [f"{env.get('nvidia_smi') or env.get('gpu')}; commit {env.get('commit')}; {report['seconds']:.0f} s", ""]
    for name, section in report.items():
        if not isinstance(section, dict) or name in ("environment", "speed"):
            continue
        if "error" in section:
            lines.append(f"* **{name}**: not done: {section['error']}")
        else:
            told = {k: v for k, v in section.items() if not isinstance(v, list | dict)}
            lines.append(f"* **{name}**: {told or 'see the JSON'}")
    rows = report.get("speed", {}).get("rows", [])
    if rows:
        columns = {
            "p50 ms": "p50_ms", "p99 ms": "p99_ms", "silent p50": "silent_p50_ms", "gathered p50": "gathered_p50_ms",
            "boosted p50": "boosted_p50_ms", "pipelined": "pipelined_ms", "submit": "submit_ms", "floor": "floor_ms",
            "tokens/s": "tokens_per_second",
        }  # fmt: skip
        lines += ["", f"Encoder: {rows[0]['encoder']}.", "", f"| chunk | batch | {' | '.join(columns)} |"]
        lines.append("|---" * (2 + len(columns)) + "|")
        for row in rows:
            figures = (f"{row[field]:.2f}" if field in row else "–" for field in columns.values())
            lines.append(f"| {row['chunk_ms']} ms | {row['batch']} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.gpu_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")
    parser.add_argument("--only", nargs="+", help="sections to run, beside the environment")
    parser.add_argument("--batch", type=int, nargs="+", default=list(_BATCHES))
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10_000, help="of the soak")
    parser.add_argument("--minutes", type=float, default=8, help="after which nothing more is begun")
    options = parser.parse_args(arguments)
    from nemostream.runtime.cuda import CudaDevice

    try:
        device = CudaDevice()
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    started = time.perf_counter()
    until = started + 60 * options.minutes
    report: Report = {}

    def say(message: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {message}", file=sys.stderr, flush=True)

    def section(name: str, work: Callable[[], Report]) -> None:
        if options.only and name not in (*options.only, "environment"):
            return
        say(name)
        try:
            if time.perf_counter() > until:
                raise BackendError(f"{options.minutes} minutes were over; run it alone with --only {name}.")
            report[name] = work()
        except Exception as error:  # whatever it is, the other sections have figures to give
            report[name] = {"error": f"{type(error).__name__}: {error}"}
            say(f"{name}: {report[name]['error']}")
        report["seconds"] = time.perf_counter() - started
        options.out.mkdir(parents=True, exist_ok=True)
        stem = f"gpu-{device.name.replace(' ', '-')}"
        (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.out / f"{stem}.md").write_text(show(report), encoding="utf-8")

    demo = Bundle.open(nemostream.demo_bundle())
    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        store = PlanStore(Path(folder) / "engines")
        unusable: dict[str, str] = {}  # kinds of engine that failed once, and why

        def best(bundle: Bundle, chunks: Sequence[Chunk], capacity: int) -> tuple[GpuBackend, str]:
            """TensorRT, else ONNX Runtime, else no encoder at all. Random weights are not gated: nothing is lost."""
            for backend, target in (("tensorrt", device.architecture), ("onnxruntime", "cuda")):
                if backend in unusable:
                    continue
                try:
                    plans = {
                        chunk.ms: build_engine(
                            bundle, chunk, "fp16", store, backend=backend, target=target, max_batch=capacity - 1
                        )[0]
                        for chunk in chunks
                    }
                    opened = open_gpu(bundle, CudaDevice(), plans, capacity, capacity - 1)
                    return opened, f"{backend} fp16"
                except NemostreamError as error:
                    unusable[backend] = str(error)
            encoders = {chunk.ms: NoEncoder("float16") for chunk in chunks}
            alone = GpuBackend(bundle, CudaDevice(), encoders, capacity=capacity, max_batch=capacity - 1)
            give_frames(alone)
            return alone, f"none ({'; '.join(unusable.values())})"

        def demo_backend(capacity: int) -> GpuBackend:
            return best(demo, [demo.manifest.chunk(80)], capacity)[0]

        section("environment", lambda: environment(device))
        section("loading", lambda: loading(CudaDevice(), demo))
        section("tests", lambda: tests(Path.cwd(), 150))
        section("sanitizer", lambda: sanitizer(Path.cwd(), 90))
        section("engine_from_afar", lambda: from_afar(device, demo, store))
        section("engines", lambda: engines(demo, store, say))
        found = [plan for plan in store.all() if plan.recipe.device == device.architecture]
        if found:
            section("engine_in_a_loop", lambda: engine_in_a_loop(CudaDevice(), found[0], demo))
        section("soak", lambda: soak(demo_backend(9), demo.manifest.chunk(80), options.steps))
        section("bandwidth", lambda: {"copy_bytes_per_second": copy_rate(device)})

        def full() -> Report:
            say("filling in a full-size model")
            bundle = random_bundle(Path(folder) / "random")
            rate = report.get("bandwidth", {}).get("copy_bytes_per_second")
            return speed(bundle, best, options.batch, options.repeats, rate, say, until)

        section("speed", full)
    device.close()
    print(show(report), end="")


if __name__ == "__main__":
    main()
