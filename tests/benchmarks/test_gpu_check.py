"""Parts of the GPU check on an emulated device: they run, and their counts are correct. Times are not tested."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder

from nemostream.benchmarks import baseline, gpu_check
from nemostream.benchmarks.gpu import report as gpu_report
from nemostream.benchmarks.gpu import speed as gpu_speed
from nemostream.benchmarks.harness import roofline
from nemostream.benchmarks.harness.random_bundle import random_bundle
from nemostream.benchmarks.harness.synthetic import Sizes
from nemostream.benchmarks.studies import features
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError, OptionError
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
    assert {"set_phrases", "reset_decoder"} < set(backend.device.launches)
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
        assert 0 < row["host_ms"] < row["pipelined_ms"]
    assert set(figures["streams"]) == {80, 160} and figures["skipped_rows"] == 0
    late = gpu_speed.measure_speed(Bundle(small.path, short), make, (1, 2), 3, None, messages.append, deadline=0.0)
    assert late["rows"] == [] and late["skipped_rows"] == 4
    table = gpu_report.show({"environment": {"gpu": "none"}, "speed": figures, "seconds": 1.0})
    assert table.count(" ms | 1 |") == table.count(" ms | 2 |") == 2 and "Encoder: on a CPU." in table


@needs_compiler
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
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
    saved: list[list[str]] = []
    report = gpu_check.in_processes(
        {"crashes": 20, "hangs": 3, "works": 20},
        lambda name, minutes: [sys.executable, "-c", SECTION_SCRIPT, str(tmp_path), name],
        tmp_path,
        1,
        lambda report: saved.append([*report]),
    )
    assert report["works"] == {"all": 2}
    assert report["crashes"] == {"so far": 1, "error": "exited with SIGABRT", "log": ["output of crashes"]}
    assert report["hangs"]["error"] == "timed out after 3 s"
    state = Path(f"/proc/{report['hangs']['so far']}/stat")
    assert not state.exists() or ") Z " in state.read_text()
    assert [len(names) for names in saved] == [2, 3, 4] and "works" in saved[-1]
    late = gpu_check.in_processes({"works": 20}, lambda name, minutes: ["false"], tmp_path, 0, lambda report: None)
    assert "run it with --only works" in late["works"]["error"]
    assert "**crashes**: failed: exited with SIGABRT" in gpu_report.show(report)
    assert "**speed**: failed: it hung" in gpu_report.show({"speed": {"error": "it hung"}, "seconds": 1.0})


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
    with pytest.raises(OptionError, match=re.escape(f"the baseline needs NeMo: {install_command('export', 'bench')}")):
        gpu_check.baseline(context)


def test_results_of_a_failed_section_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(context: gpu_check.SectionContext) -> dict[str, Any]:
        assert context.report == {"bandwidth": {"copy_bytes_per_second": 5}}
        context.save({"rows": [1]})
        raise ValueError("odd")

    (tmp_path / "report.json").write_text('{"bandwidth": {"copy_bytes_per_second": 5}}')
    monkeypatch.setitem(gpu_check.SECTIONS, "speed", (fails, 1))
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
