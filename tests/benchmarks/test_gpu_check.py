"""Parts of the GPU check on an emulated device: they run, and their counts are correct. Times are not tested."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder

import nemostream
from nemostream import engines
from nemostream.benchmarks import baseline, gpu_check
from nemostream.benchmarks.gpu import correctness
from nemostream.benchmarks.gpu import report as gpu_report
from nemostream.benchmarks.gpu import speed as gpu_speed
from nemostream.benchmarks.harness import roofline
from nemostream.benchmarks.harness.random_bundle import random_bundle
from nemostream.benchmarks.harness.synthetic import Sizes
from nemostream.benchmarks.studies import features
from nemostream.bundle import Bundle, ChunkConfig, Tensor
from nemostream.errors import BackendError, EngineValidationError, OptionError
from nemostream.extras import install_command
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import LOOPS, GpuBackend

SMALL = Sizes(n_layers=2, d_model=64, n_heads=4, conv_channels=32, pred_hidden=48, joint_hidden=48, vocab=128)
needs_compiler = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("random") / "bundle", sizes=SMALL)


def make_backend(bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int, device: Any = None) -> GpuBackend:
    device = device or HostDevice()
    encoders = {chunk.ms: OrtEncoder(bundle, chunk, device) for chunk in chunks}
    return GpuBackend(bundle, device, encoders, capacity=capacity, max_batch=capacity - 1)


@pytest.mark.nemo
def test_random_bundle_has_the_shape_of_a_real_one(small: Bundle, tiny_bundle: Bundle) -> None:
    """All graphs, inputs, outputs and weights outside the graphs are those of an export of the same sizes."""
    for name, graph in tiny_bundle.manifest.graphs.items():
        made = small.manifest.graphs[name]
        assert (made.file, made.inputs, made.outputs) == (graph.file, graph.inputs, graph.outputs)
    assert small.manifest.chunks == tiny_bundle.manifest.chunks
    assert {name: (w.dtype, w.shape) for name, w in small.manifest.tensors.items()} == {
        name: (w.dtype, w.shape) for name, w in tiny_bundle.manifest.tensors.items()
    }
    assert small.manifest.weights.bytes == tiny_bundle.manifest.weights.bytes


def test_random_bundle_runs_and_is_reproducible(small: Bundle, tmp_path: Path) -> None:
    Bundle.open(small.path)  # checks all hashes
    chunk = small.manifest.chunk(560)
    backend = OrtBackend(small, capacity=1)
    backend.reset(np.array([0]))
    audio = np.random.default_rng(0).standard_normal((1, chunk.samples)).astype(np.float32) * 0.1
    encoded, _ = backend.encode(Batch(chunk, np.array([0]), audio, np.array([chunk.samples])))
    assert np.isfinite(encoded).all() and encoded.std() > 0.1
    again = random_bundle(tmp_path / "again", sizes=SMALL)
    other = random_bundle(tmp_path / "other", seed=1, sizes=SMALL)
    assert again.manifest.weights.sha256 == small.manifest.weights.sha256 != other.manifest.weights.sha256


@needs_compiler
def test_soak(small: Bundle) -> None:
    chunk = small.manifest.chunk(80)
    backend = make_backend(small, [chunk], 4)
    figures = gpu_speed.soak(backend, chunk, 60)
    assert (figures["steps"], figures["flat"], figures["failed_rows"]) == (60, True, 0)
    assert {"set_phrases", "reset_decoder", "copy"} < set(backend.device.launches)
    leaking = HostDevice()
    backend = make_backend(small, [chunk], 4, leaking)
    launch = leaking.queue

    def leak(work: Any) -> None:
        leaking.free_bytes -= 1
        launch(work)

    leaking.queue = leak  # type: ignore[method-assign]
    assert not gpu_speed.soak(backend, chunk, 10)["flat"]


@pytest.mark.slow
@needs_compiler
def test_speed(small: Bundle) -> None:
    messages: list[str] = []

    def make(bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[GpuBackend, str]:
        return make_backend(bundle, chunks, capacity), "on a CPU"

    def make_for_one(bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[GpuBackend, str]:
        return make_backend(bundle, chunks, 2), "on a CPU"

    short = dataclasses.replace(small.manifest, chunks=small.manifest.chunks[:2])
    figures = gpu_speed.measure_speed(Bundle(small.path, short), make, (1, 2), 3, 1e9, messages.append)
    found = [(row["chunk_ms"], row["batch"]) for row in figures["rows"]]
    assert found == [(80, 1), (80, 2), (160, 1), (160, 2)]
    for row in figures["rows"]:
        assert len(row["raw_ms"]) == 3 and min(row["raw_ms"]) == pytest.approx(row["min_ms"], abs=1e-4)
        assert row["min_ms"] <= row["p50_ms"] <= row["p99_ms"] <= max(row["raw_ms"]) + 1e-4
        weights = roofline.encoder_work(small, small.manifest.chunk(row["chunk_ms"])).weight_bytes
        assert row["roofline_ms"] == pytest.approx(1000 * weights / 1e9)
        assert row["calibrated_tokens_per_second"] > 0 and row["boosted_p50_ms"] > 0
        assert row["encoder_ms"] > 0 and row["undecoded_ms"] > 0 and row["whole_ms"] > 0
        assert 0 < row["host_ms"] < row["pipelined_ms"] and row["copy_ms"] > 0
    assert set(figures["streams"]) == {80, 160} and figures["skipped_rows"] == 0
    one = Bundle(small.path, dataclasses.replace(small.manifest, chunks=small.manifest.chunks[:1]))
    largest = gpu_speed.measure_speed(one, make_for_one, (1, 2), 1, None, messages.append)
    assert [row["batch"] for row in largest["rows"]] == [1] and largest["skipped_rows"] == 1
    late = gpu_speed.measure_speed(Bundle(small.path, short), make, (1, 2), 3, None, messages.append, deadline=0.0)
    assert late["rows"] == [] and late["skipped_rows"] == 4
    table = gpu_report.show({"environment": {"gpu": "none"}, "speed": figures, "seconds": 1.0})
    assert table.count(" ms | 1 |") == table.count(" ms | 2 |") == 2 and table.count("| on a CPU |") == 4


@needs_compiler
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("loop", ["while", *(pytest.param(loop, marks=pytest.mark.slow) for loop in LOOPS[1:])])
def test_stage_times(small: Bundle, loop: str, capturable: bool) -> None:
    """Each is run as often as it is counted, and the two lanes are as they were: the next step says what it would."""
    chunk, device = small.manifest.chunk(160), HostDevice()
    encoders = {chunk.ms: OrtEncoder(small, chunk, device, capturable)}
    backend = GpuBackend(small, device, encoders, capacity=3, max_batch=2, loop=loop)
    backend.arena.write("joint_bias", np.zeros(SMALL.vocab + 1, np.float32))
    before = gpu_speed.step_times(backend, chunk, 2, 3)["tokens_per_second"]
    device.launches.clear()
    figures = gpu_speed.stage_times(backend, chunk, 2, 3)
    assert set(figures) == {"encoder_ms", "undecoded_ms"} | ({"whole_ms"} if loop == "while" else set())
    launches = Counter(device.launches)
    steps = 1 + 6 * (len(figures) - 1)  # the encoder alone is none of our kernels
    assert launches["begin"] == launches["scatter"] == steps
    assert launches["start"] == 1 + (6 if loop == "while" else 0)
    assert before > 0 and gpu_speed.step_times(backend, chunk, 2, 3)["tokens_per_second"] == before


@pytest.mark.slow
@needs_compiler
def test_calibrated_blank(small: Bundle) -> None:
    """The calibrated rate is positive and of the right order; `force_blank` can be undone."""
    chunk = small.manifest.chunk(160)
    backend = make_backend(small, [chunk], 4)
    rate = gpu_speed.calibrate_blank(backend, small, chunk, 3)
    assert 0 < rate < 4 * gpu_speed.TOKENS_PER_SECOND
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] == pytest.approx(rate)
    before = gpu_speed.force_blank(backend, small)
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] == 0
    backend.arena.write("joint_bias", before)
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] == pytest.approx(rate)


@needs_compiler
def test_decoding_without_an_encoder(small: Bundle) -> None:
    chunk = small.manifest.chunk(160)
    device = HostDevice()
    encoders = {chunk.ms: gpu_speed.NoEncoder("float32")}
    backend = GpuBackend(small, device, encoders, capacity=4, max_batch=3)
    gpu_speed.fill_encoder_output(backend)
    gpu_speed.calibrate_blank(backend, small, chunk, 3)
    backend.arena.write("joint_bias", np.zeros(SMALL.vocab + 1, np.float32))
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] > 0


@needs_compiler
def test_phrases_of_timed_steps(small: Bundle) -> None:
    """The streams have their own phrases while they are timed."""
    chunk = small.manifest.chunk(160)
    backend = make_backend(small, [chunk], 4)
    backend.arena.write("joint_bias", np.zeros(SMALL.vocab + 1, np.float32))
    phrases = [features.random_phrases(seed, [], SMALL.vocab) for seed in range(2)]
    plain, boosted = (
        gpu_speed.step_times(backend, chunk, 3, 6),
        gpu_speed.step_times(backend, chunk, 3, 6, boosts=phrases),
    )
    assert plain["tokens_per_second"] > 0 and len(boosted["raw_ms"]) == 6
    found = [backend.save(slot)["phrases"].tobytes() for slot in range(3)]
    assert found == [phrases[index].digest.tobytes() for index in (0, 1, 0)]


def test_number_of_streams() -> None:
    rows = [
        {"chunk_ms": 80, "batch": 1, "p99_ms": 1.0, "gathered_p99_ms": 1.0},  # 80 steps one after another
        {"chunk_ms": 80, "batch": 64, "p99_ms": 30.0, "gathered_p99_ms": 49.0},  # the second step is slower, but fits
        {"chunk_ms": 80, "batch": 256, "p99_ms": 81.0, "gathered_p99_ms": 1.0},  # too slow
        {"chunk_ms": 560, "batch": 256, "p99_ms": 81.0, "gathered_p99_ms": 100.0},
        {"chunk_ms": 1120, "batch": 1, "p99_ms": 1121.0, "gathered_p99_ms": 1121.0},
    ]
    assert gpu_speed._streams(rows, 80) == 128
    assert gpu_speed._streams(rows, 560) == (1 + 4) * 256
    assert gpu_speed._streams(rows, 1120) == 0


SECTION_SCRIPT = """
import json, os, pathlib, subprocess, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
write = lambda found: (folder / f"{name}.json").write_text(json.dumps(found))
write({"so far": 1})
print("output of", name)
sys.stdout.flush()
if name == "crashes":
    os.abort()
if name == "hangs":
    child = subprocess.Popen(["sleep", "1000"])
    write({"so far": child.pid})
    time.sleep(1000)
write({"all": 2})
"""


def test_sections_are_isolated(tmp_path: Path) -> None:
    """One section crashes, one hangs with a child process: their results so far are kept, their processes end."""
    waiting: list[list[str]] = []  # sections that had not run, at each save
    report = gpu_check.in_processes(
        sections(crashes=20, hangs=3, works=20),
        lambda name, minutes: [sys.executable, "-c", SECTION_SCRIPT, str(tmp_path), name],
        tmp_path,
        1,
        lambda report: waiting.append([name for name in report if name != "seconds" and "not_run" in report[name]]),
    )
    assert report["works"] == {"all": 2}
    assert report["crashes"] == {"so far": 1, "error": "exited with SIGABRT", "log": ["output of crashes"]}
    assert report["hangs"]["error"] == "timed out after 3 s"
    state = Path(f"/proc/{report['hangs']['so far']}/stat")
    assert not state.exists() or ") Z " in state.read_text()
    assert waiting == [["hangs", "works"], ["works"], []]
    assert "**crashes**: failed: exited with SIGABRT" in gpu_report.show(report)
    assert "**speed**: failed: it hung" in gpu_report.show({"speed": {"error": "it hung"}, "seconds": 1.0})


# -- order and time limits of the sections -----------------------------------------------------------------------------

HANGS = float("inf")
FIRST = [name for name, section in gpu_check.SECTIONS.items() if section.reserved]


def sections(**seconds: float) -> dict[str, gpu_check.Section]:
    return {name: gpu_check.Section(lambda context: {}, limit) for name, limit in seconds.items()}


class SimulatedRun:
    """A run of `in_processes` with a simulated clock. A section takes `seconds[name]` (default 5)."""

    def __init__(self, scratch: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.scratch, self.seconds, self.now = scratch, seconds, 0.0
        self.times: dict[str, float] = {}  # at the end of each section
        monkeypatch.setattr(gpu_check, "run", self.run)
        monkeypatch.setattr(gpu_check, "time", argparse.Namespace(perf_counter=lambda: self.now))

    def run(self, command: Sequence[str], output: Path, limit: float) -> str:
        name, seconds = command[0], self.seconds.get(command[0], 5)
        self.now += min(seconds, limit)
        self.times[name] = self.now
        output.write_text("")
        if seconds > limit:
            return f"timed out after {limit} s"
        (self.scratch / f"{name}.json").write_text('{"finished": true}')
        return ""

    def report(self, chosen: dict[str, gpu_check.Section] = gpu_check.SECTIONS, minutes: float = 8) -> dict[str, Any]:
        return gpu_check.in_processes(chosen, lambda name, minutes: [name], self.scratch, minutes, lambda report: None)


def test_first_sections_fit_into_eight_minutes() -> None:
    """They are the verdict and the speed of every library, in this order, before all other sections."""
    assert sum(gpu_check.SECTIONS[name].seconds for name in FIRST) == 480
    assert list(gpu_check.SECTIONS)[: len(FIRST)] == FIRST
    libraries = {library.replace("-", "_") for library in gpu_check.LIBRARIES}
    tokens = [name for name in FIRST if name.startswith("tokens_")]
    speed = [name for name in FIRST if name.startswith("speed_")]
    assert {name.removeprefix("tokens_") for name in tokens} == {name.removeprefix("speed_") for name in speed}
    assert {name.removeprefix("speed_") for name in speed} == libraries
    assert ["environment", *tokens, "full_size_model", *speed] == FIRST


@pytest.mark.parametrize("name", FIRST)
def test_a_first_section_has_its_time_if_all_others_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seconds = {other: HANGS for other in gpu_check.SECTIONS} | {name: gpu_check.SECTIONS[name].seconds}
    simulated = SimulatedRun(tmp_path, monkeypatch, seconds)
    report = simulated.report()
    assert report.pop("seconds") <= 480 + 60
    assert [section for section in report if "finished" in report[section]] == [name]
    assert simulated.times[name] <= 480
    for other in FIRST:
        assert other == name or "timed out" in report[other]["error"]


@pytest.mark.parametrize("name", gpu_check.SECTIONS)
def test_one_section_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """All verdicts and step times are measured, whichever section hangs."""
    simulated = SimulatedRun(tmp_path, monkeypatch, {name: HANGS})
    report = simulated.report()
    assert "timed out" in report[name]["error"]
    assert all("finished" in report[other] for other in FIRST if other != name)
    assert all(simulated.times[other] <= 480 for other in FIRST)


def test_unused_time_is_for_later_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow TensorRT build may use the time that the others leave; sections after eight minutes do not run."""
    report = SimulatedRun(tmp_path, monkeypatch, {"speed_tensorrt": 430}).report()
    assert "finished" in report["speed_tensorrt"]
    names = list(gpu_check.SECTIONS)
    finished = [name for name in names if "finished" in report[name]]
    assert finished == names[: len(finished)] and len(FIRST) < len(finished) < len(names)
    assert all(report[name] == {"not_run": "8 minutes are over"} for name in names[len(finished) :])
    text = gpu_report.show(report)
    assert f"Not run (8 minutes are over); run them with `--only {' '.join(names[len(finished) :])}`." in text


def test_all_sections_of_a_fast_machine_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = SimulatedRun(tmp_path, monkeypatch, {}).report()
    assert all("finished" in report[name] for name in gpu_check.SECTIONS)
    assert report["seconds"] == 5 * len(gpu_check.SECTIONS)


def test_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer minutes than the reserved time, no section runs more than a minute longer."""
    simulated = SimulatedRun(tmp_path, monkeypatch, {name: HANGS for name in gpu_check.SECTIONS})
    assert simulated.report(minutes=1)["seconds"] <= 60 + 60
    simulated = SimulatedRun(tmp_path, monkeypatch, {})
    assert simulated.report(sections(works=20), minutes=0)["works"] == {"not_run": "0 minutes are over"}


# -- the first sections ------------------------------------------------------------------------------------------------


def test_verdict_is_at_the_top() -> None:
    """Correct, incorrect, or none; the step time of the full-size model before that of the packaged one."""
    row = {"batch": 1, "chunk_ms": 560, "p50_ms": 1.25, "encoder": "onnxruntime fp16"}
    eight = row | {"batch": 8, "p50_ms": 2.5}
    correct = {"equal": True, "tokens": 96, "streams": 8, "rows": [row, eight]}
    sm90 = {"unavailable": "TensorRT for RTX 1.7.1 does not support sm90."}
    report = {
        "environment": {"gpu": "NVIDIA H100"},
        "tokens_onnxruntime": correct,
        "tokens_tensorrt": {"error": "timed out after 85 s"},
        "tokens_tensorrt_rtx": sm90,
        "speed_onnxruntime": {"not_run": "8 minutes are over"},
        "seconds": 480.0,
    }
    lines = gpu_report.show(report).splitlines()
    assert lines[:4] == [
        "# GPU check",
        "",
        "* **Correct**: tokens equal those of the CPU backend with ONNX Runtime.",
        "* **Step time**: 1.25 ms (p50) for 1 streams at 560 ms, packaged model (small), ONNX Runtime fp16.",
    ]
    text = "\n".join(lines)
    assert "| TensorRT | failed | failed | – | – |" in text
    assert "| TensorRT for RTX | not available | not available | – | – |" in text
    assert "| ONNX Runtime | equal (96 in 8 streams) | 1: 1.25, 8: 2.50 | not run | – |" in text
    assert "**tokens_tensorrt_rtx**: not available: TensorRT for RTX 1.7.1 does not support sm90." in text
    assert "Not run (8 minutes are over); run them with `--only speed_onnxruntime`." in text

    wrong = {"equal": False, "different_streams": 2, "tokens": 96, "streams": 8}
    speed = {"rows": [row | {"p50_ms": 3.0}], "engine_bytes": 1.21e9}
    first = gpu_report.verdict(report | {"tokens_tensorrt": wrong, "speed_onnxruntime": speed})
    assert first == [
        "**Incorrect**: tokens differ from those of the CPU backend with TensorRT.",
        "Tokens equal those of the CPU backend with ONNX Runtime.",
        "**Step time**: 3.00 ms (p50) for 1 streams at 560 ms, full-size model, ONNX Runtime fp16.",
    ]
    assert "| different in 2 of 8 streams |" in gpu_report.show(report | {"tokens_tensorrt": wrong})
    invalid = {"equal": False, "validation_error": "the fp16 engine failed validation"}
    assert gpu_report.verdict({"tokens_tensorrt": invalid})[0].startswith("**Incorrect**")
    assert gpu_report.verdict({"tokens_onnxruntime": {"error": "no kernels"}}) == [
        "**No verdict**: no library has run to the end of the comparison of tokens.",
        "**Step time**: none was measured.",
    ]
    assert gpu_report.verdict({"soak": {"flat": True}}) == []


def simulated_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_size: Bundle | None = None
) -> gpu_check.SectionContext:
    """Return a context whose engines are the bundle's own graphs on an emulated device."""
    options = argparse.Namespace(minutes=1, repeats=3, section="tokens_onnxruntime", batch=[1, 2], steps=10)
    context = gpu_check.SectionContext(options, tmp_path)
    built: list[tuple[str, int, str]] = []

    def build(
        library: str,
        bundle: Bundle,
        chunks: Sequence[ChunkConfig],
        max_batch: int,
        precision: str = "fp16",
        validate: bool = True,
    ) -> dict[int, Any]:
        built.append((library, max_batch, precision))
        plan = argparse.Namespace(seconds=2.0, bytes=1000 if precision == "fp16" else 500)
        return {chunk.ms: plan for chunk in chunks}

    def open_plans(bundle: Bundle, plans: dict[int, Any], max_batch: int) -> GpuBackend:
        return make_backend(bundle, [bundle.manifest.chunk(ms) for ms in plans], max_batch + 1)

    monkeypatch.setattr(context, "device", HostDevice)
    monkeypatch.setattr(context, "build", build)
    monkeypatch.setattr(context, "open", open_plans)
    monkeypatch.setattr(context, "full_size_bundle", lambda: full_size)
    monkeypatch.setattr(context, "built", built, raising=False)
    monkeypatch.setattr(gpu_check, "why_unavailable", lambda library, architecture: "")
    return context


@needs_compiler
def test_tokens_of_the_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of eight streams equal those of the CPU backend. A wrong bias or NaN is found; it is saved first."""
    monkeypatch.setattr(gpu_check, "_FIRST_BATCHES", (1, 3))
    context = simulated_context(tmp_path, monkeypatch)
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(context, "save", lambda result: saved.append(dict(result)))
    result = gpu_check.SECTIONS["tokens_onnxruntime"].run(context)
    assert context.built == [("onnxruntime", 3, "fp16")]
    assert result["equal"] and result["tokens"] > 3 * 10 and result["streams"] == 3 and result["differences"] == []
    assert (result["failed_steps"], result["engine_bytes"], result["build_seconds"]) == (0, 1000, 2.0)
    assert [(row["chunk_ms"], row["batch"]) for row in result["rows"]] == [(560, 1), (560, 3)]
    assert saved[0]["equal"] and "copy_tokens_equal" not in saved[0]
    assert saved[1]["copy_state_equal"] and "rows" not in saved[1]  # before steps are timed
    assert result["copy_state_equal"] and result["copy_tokens_equal"]

    demo = context.demo
    chunk = demo.manifest.chunk(560)
    clip = engines.speech(demo.manifest)[1]
    candidate, reference = make_backend(demo, [chunk], 4), OrtBackend(demo, capacity=3)
    bias = np.array(demo.weight("joint.out.bias"))
    for value in (bias + np.linspace(0, 5, len(bias), dtype=np.float32), np.full_like(bias, np.nan)):
        candidate.arena.write("joint_bias", value)
        wrong = correctness.compare_tokens(demo.manifest, chunk, candidate, reference, clip, 3)
        assert not wrong["equal"] and wrong["different_streams"] == 3 and wrong["tokens"] == result["tokens"]
        assert (wrong["failed_steps"] > 0) == bool(np.isnan(value).any())
        assert wrong["differences"][1]["emitted"] != wrong["differences"][1]["expected"]


@needs_compiler
def test_copies_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the copied state, of the tokens after it, and of a source that its copy changes."""
    demo = Bundle.open(nemostream.demo_bundle())
    chunk, clip = demo.manifest.chunk(560), engines.speech(demo.manifest)[1]
    backend = make_backend(demo, [chunk], 3)
    copy = backend.copy

    def compare(after: Callable[[np.ndarray, np.ndarray], None]) -> tuple[bool, bool]:
        def copied(sources: np.ndarray, targets: np.ndarray) -> None:
            copy(sources, targets)
            after(sources, targets)

        monkeypatch.setattr(backend, "copy", copied)
        found = correctness.compare_copy(demo.manifest, chunk, backend, clip)
        return found["copy_state_equal"], found["copy_tokens_equal"]

    def share(sources: np.ndarray, targets: np.ndarray) -> None:
        def submit(batch: Batch) -> Any:
            step = type(backend).submit(backend, batch)
            if batch.slots[0] == targets[0]:
                copy(targets, sources)
            return step

        monkeypatch.setattr(backend, "submit", submit)

    assert compare(lambda sources, targets: None) == (True, True)
    assert compare(lambda sources, targets: backend.reset(targets)) == (False, False)
    assert compare(lambda sources, targets: backend.reset(np.concatenate([sources, targets]))) == (True, False)
    assert compare(share) == (True, False)


class Fp16Encoder(OrtEncoder):
    """The fp16 graph of an engine, on ONNX Runtime."""

    cache_dtype = "float16"

    def __init__(self, graph: Path, bundle: Bundle, chunk: ChunkConfig, device: HostDevice) -> None:
        super().__init__(bundle, chunk, device)
        self._session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        tensors = [*self._session.get_inputs(), *self._session.get_outputs()]
        half = {tensor.name for tensor in tensors if tensor.type == "tensor(float16)"}

        def typed(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(
                dataclasses.replace(tensor, dtype="float16") if tensor.name in half else tensor for tensor in tensors
            )

        self._graph = dataclasses.replace(
            self._graph, inputs=typed(self._graph.inputs), outputs=typed(self._graph.outputs)
        )


@needs_compiler
def test_tokens_of_the_packaged_model_in_fp16(tmp_path: Path) -> None:
    """Rounding to fp16, in the encoder and in the decoder, does not change the tokens that give the verdict."""
    pytest.importorskip("onnx", reason="needs the build extra")
    from nemostream.engine.precision import write_typed

    demo = Bundle.open(nemostream.demo_bundle())
    chunk = demo.manifest.chunk(560)
    graph, _ = write_typed(demo, chunk, "fp16", None, tmp_path, "encoder")
    device = HostDevice()
    backend = GpuBackend(demo, device, {chunk.ms: Fp16Encoder(graph, demo, chunk, device)}, capacity=4, max_batch=3)
    assert backend.cache_dtype == "float16"
    reference, clip = OrtBackend(demo, capacity=3), engines.speech(demo.manifest)[1]
    result = correctness.compare_tokens(demo.manifest, chunk, backend, reference, clip, 3)
    assert result["equal"] and result["tokens"] > 3 * 10


def test_engine_that_fails_validation_is_incorrect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = simulated_context(tmp_path, monkeypatch)

    def build(*arguments: Any, **options: Any) -> Any:
        raise EngineValidationError("the fp16 engine for 560 ms failed validation.")

    monkeypatch.setattr(context, "build", build)
    result = gpu_check.SECTIONS["tokens_tensorrt"].run(context)
    assert result["equal"] is False and "failed validation" in result["validation_error"]


@needs_compiler
def test_first_speed(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk size, one engine, its size and build time."""
    monkeypatch.setattr(gpu_check, "_FIRST_CHUNK_MS", 80)  # 560 ms is slow on a CPU
    monkeypatch.setattr(gpu_check, "_FIRST_BATCHES", (1, 2))
    monkeypatch.setattr(gpu_speed, "calibrate_blank", lambda *arguments: 5.0)
    context = simulated_context(tmp_path, monkeypatch, small)
    result = gpu_check.SECTIONS["speed_tensorrt"].run(context)
    assert context.built == [("tensorrt", 2, "fp16")]
    rows = [(row["chunk_ms"], row["batch"], row["encoder"]) for row in result["rows"]]
    assert rows == [(80, 1, "tensorrt fp16"), (80, 2, "tensorrt fp16")]
    assert (result["build_seconds"], result["engine_bytes"], result["skipped_rows"]) == (2.0, 1000, 0)
    saved = json.loads((tmp_path / "tokens_onnxruntime.json").read_text())
    assert len(saved["rows"]) == 2 and saved["engine_bytes"] == 1000


@needs_compiler
def test_int8_is_compared_with_fp16(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_FIRST_CHUNK_MS", 80)
    monkeypatch.setattr(gpu_check, "_INT8_BATCHES", (1, 2))
    context = simulated_context(tmp_path, monkeypatch, small)
    available = ["tensorrt-rtx"]
    monkeypatch.setattr(gpu_check, "why_unavailable", lambda name, _: "" if name in available else "not installed")
    result = gpu_check.SECTIONS["int8"].run(context)
    assert context.built == [("tensorrt-rtx", 2, "fp16"), ("tensorrt-rtx", 2, "int8")]
    assert result["engine_bytes_ratio"] == 0.5 and result["library"] == "tensorrt-rtx"
    for name in ("encoder_ms_1", "encoder_ms_2"):
        assert result["int8"][name] > 0
        assert result[f"{name}_ratio"] == pytest.approx(result["int8"][name] / result["fp16"][name], abs=1e-3)
    available.clear()
    assert "neither TensorRT nor" in gpu_check.SECTIONS["int8"].run(context)["unavailable"]


def tensorrt_module(version: str, *architectures: str) -> Any:
    names = [architecture.upper() for architecture in architectures]
    return argparse.Namespace(__version__=version, ComputeCapability=Enum("ComputeCapability", names))


def test_libraries_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX does not support every GPU. If both are installed, each section uses its own."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_module("1.7.1", "sm75", "sm86", "sm89", "sm120"))
    reason = gpu_check.why_unavailable("tensorrt-rtx", "sm90")
    assert reason.startswith("TensorRT for RTX 1.7.1 does not support sm90, only sm75, sm86, sm89, sm120: install T")
    assert gpu_check.why_unavailable("tensorrt-rtx", "sm89") == ""
    assert gpu_check.why_unavailable("tensorrt", "sm89").startswith("tensorrt is not installed (")

    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module("10.15.0"))
    assert gpu_check.why_unavailable("tensorrt", "sm90") == ""
    assert import_module("tensorrt").__version__ == "10.15.0"
    assert gpu_check.why_unavailable("tensorrt-rtx", "sm89") == ""
    with pytest.raises(ImportError):
        import_module("tensorrt")

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert gpu_check.why_unavailable("tensorrt-rtx", "sm89").startswith("tensorrt-rtx is not installed (")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has no CUDA provider" in gpu_check.why_unavailable("onnxruntime", "sm90")


def test_backend_with_smaller_batches_if_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def open_backend(max_batch: int) -> Any:
        tried.append(max_batch)
        if max_batch > 300:
            raise BackendError("the device has too little memory.")
        return "backend"

    assert gpu_check._largest(open_backend, 1024) == "backend" and tried == [1024, 512, 256]

    def missing(max_batch: int) -> Any:
        tried.append(max_batch)
        raise BackendError("no kernels.")

    tried.clear()
    with pytest.raises(BackendError, match="no kernels"):
        gpu_check._largest(missing, 8)
    assert tried == [8]


def test_full_size_model_is_created_once(small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was not completed is not used."""
    options = argparse.Namespace(minutes=1, repeats=3, section="full_size_model")
    context, created = gpu_check.SectionContext(options, tmp_path), []

    def create(folder: Path) -> None:
        created.append(folder)
        if len(created) == 1:
            folder.mkdir()
            raise OSError("no space left on device")
        shutil.copytree(small.path, folder, dirs_exist_ok=True)

    monkeypatch.setattr(gpu_check, "random_bundle", create)
    with pytest.raises(OSError, match="no space"):
        context.full_size_bundle()
    for _ in range(2):
        assert context.full_size_bundle().manifest.weights == small.manifest.weights
    assert len(created) == 2


def test_targets() -> None:
    """Figures that a report does not have are not reported as missed."""
    times = {"p50_ms": 1.4, "p99_ms": 2.6, "encoder_ms": 0.8, "roofline_ms": 0.4}
    row = {"chunk_ms": 80, "batch": 1, **times}
    many = {"chunk_ms": 80, "batch": 1024, "host_ms": 2.0, "pipelined_ms": 100.0}
    half = {"chunk_ms": 560, "batch": 64, "whole_ms": 10.0, "undecoded_ms": 8.5}
    rows = [
        each | {"encoder": "tensorrt fp16"} for each in (row, many, {**many, "chunk_ms": 160, "host_ms": 6.0}, half)
    ]
    case = {"chunk_ms": 80, "batch": 1, "runner": "NeMo, bf16"}
    report = {
        "speed": {"rows": rows, "streams": {"80": 2400, "160": 9}},
        "baseline": {"rows": [{"case": case, "values": {"relative_time": {"nemostream, fp16": {"median": 16.0}}}}]},
    }
    found = {target.name: target for target in gpu_report.targets(report)}
    assert [target.reached for target in found.values()] == [
        True,
        True,
        False,
        True,
        None,
        True,
        False,
        None,
        None,
        False,
        False,
    ]
    assert found["encoder, 80 ms, batch 1, ÷ roofline"].measured == pytest.approx(2.0)
    assert found["share of decoding in a step, 560 ms, batch 64"].measured == pytest.approx(0.15)
    assert found["largest share of the host in a step, batch 1024"].measured == pytest.approx(0.06)
    table = gpu_report._targets_table(report)
    assert "| real-time streams at 80 ms | ≥ 2400 | 2400 | reached |" in table and "| not measured |" in table
    assert gpu_report._targets_table({"speed": {"error": "no GPU"}}) == ""


def test_no_target_is_reached_without_an_encoder() -> None:
    row = {"chunk_ms": 80, "batch": 1, "encoder": "none (TensorRT is not installed)", "p50_ms": 0.1, "p99_ms": 0.1}
    report = {"speed": {"rows": [row], "streams": {"80": 9999}}}
    assert {target.reached for target in gpu_report.targets(report)} == {None}


def test_section_is_added_to_an_earlier_report() -> None:
    """Only to a report of the same machine and commit."""
    environment = {"gpu": "one", "commit": "abc"}
    alone = {"environment": environment, "soak": {"flat": True}, "seconds": 2.0}
    assert gpu_report.joined({}, alone) == alone
    before = {"environment": environment, "loading": {"loop": "while"}, "soak": {}, "seconds": 3.0}
    both = gpu_report.joined(before, alone)
    assert both == {"environment": environment, "loading": {"loop": "while"}, "soak": {"flat": True}, "seconds": 5.0}
    waiting = {"environment": environment, "loading": {"not_run": "8 minutes are over"}, "seconds": 2.0}
    assert gpu_report.joined(before, waiting)["loading"] == {"loop": "while"}
    assert gpu_report.joined(before, waiting | {"tests": {"not_run": ""}})["tests"] == {"not_run": ""}
    other = alone | {"environment": environment | {"commit": "def"}}
    assert gpu_report.joined(before, other) == other


def test_baseline_uses_the_backend_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []

    def compare(*arguments: Any, device: str, **options: Any) -> dict[str, Any]:
        devices.append(device)
        runners = ["NeMo, bf16"] + (["nemostream, fp16"] if device == "cuda:onnxruntime" else [])
        return {"rows": [{"case": {"runner": runner}} for runner in runners], "device": device}

    monkeypatch.setattr(gpu_check, "compare_steps", compare)
    context = gpu_check.SectionContext(argparse.Namespace(minutes=1, repeats=3, section="baseline"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "prepared", lambda *arguments: contextlib.nullcontext((Path("x.nemo"), None)))
        assert gpu_check.baseline(context)["device"] == "cuda:onnxruntime" and devices == ["cuda", "cuda:onnxruntime"]
    monkeypatch.setattr(baseline, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=re.escape(f"the baseline needs NeMo: {install_command('nemo', 'bench')}")):
        gpu_check.baseline(context)


def test_results_of_a_failed_section_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(context: gpu_check.SectionContext) -> dict[str, Any]:
        assert context.report == {"bandwidth": {"copy_bytes_per_second": 5}}
        context.save({"rows": [1]})
        raise ValueError("odd")

    (tmp_path / "report.json").write_text('{"bandwidth": {"copy_bytes_per_second": 5}}')
    monkeypatch.setitem(gpu_check.SECTIONS, "speed", gpu_check.Section(fails, 1))
    gpu_check.main(["--section", "speed", "--scratch", str(tmp_path)])
    assert json.loads((tmp_path / "speed.json").read_text()) == {"rows": [1], "error": "ValueError: odd"}


def test_missing_gpu_is_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        CudaDevice().close()
    except BackendError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as exit_info:
        gpu_check.main(["--out", str(tmp_path)])
    assert exit_info.value.code == 7 and "no usable NVIDIA GPU" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.gpu
def test_copy_rate() -> None:
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        device = CudaDevice()
    except BackendError as error:
        pytest.skip(str(error))
    free = device.free_bytes
    assert 1e10 < gpu_speed.copy_rate(device) < 1e14
    assert device.free_bytes == free
    device.close()
