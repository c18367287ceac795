"""The GPU check's parts on a device that the CPU plays: they run, and what they count is right. No time is judged."""

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
def test_a_random_bundle_has_a_real_ones_shape(small: Bundle, tiny_bundle: Bundle) -> None:
    """Every graph, input and output, and every weight outside the graphs, is what an export of that shape has."""
    for name, graph in tiny_bundle.manifest.graphs.items():
        made = small.manifest.graphs[name]
        assert (made.file, made.inputs, made.outputs) == (graph.file, graph.inputs, graph.outputs)
    assert small.manifest.chunks == tiny_bundle.manifest.chunks
    assert {name: (w.dtype, w.shape) for name, w in small.manifest.tensors.items()} == {
        name: (w.dtype, w.shape) for name, w in tiny_bundle.manifest.tensors.items()
    }
    assert small.manifest.weights.bytes == tiny_bundle.manifest.weights.bytes


def test_a_random_bundle_runs_and_comes_from_its_seed(small: Bundle, tmp_path: Path) -> None:
    Bundle.open(small.path)  # every hash is right
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


@needs_compiler
def test_speed(small: Bundle) -> None:
    said: list[str] = []

    def make(bundle: Bundle, chunks: Sequence[ChunkConfig], capacity: int) -> tuple[GpuBackend, str]:
        return make_backend(bundle, chunks, capacity), "a CPU's"

    short = dataclasses.replace(small.manifest, chunks=small.manifest.chunks[:2])
    figures = gpu_speed.speed(Bundle(small.path, short), make, (1, 2), 3, 1e9, said.append)
    found = [(row["chunk_ms"], row["batch"]) for row in figures["rows"]]
    assert found == [(80, 1), (80, 2), (160, 1), (160, 2)]
    for row in figures["rows"]:
        assert len(row["raw_ms"]) == 3 and min(row["raw_ms"]) == pytest.approx(row["min_ms"], abs=1e-4)
        assert row["min_ms"] <= row["p50_ms"] <= row["p99_ms"] <= max(row["raw_ms"]) + 1e-4
        weights = roofline.encoder_work(small, small.manifest.chunk(row["chunk_ms"])).weight_bytes
        assert row["floor_ms"] == pytest.approx(1000 * weights / 1e9)
        assert row["settled_tokens_per_second"] > 0 and row["boosted_p50_ms"] > 0
        assert row["encoder_ms"] > 0 and row["undecoded_ms"] > 0 and row["whole_ms"] > 0
        assert 0 < row["host_ms"] < row["pipelined_ms"]
    assert set(figures["streams"]) == {80, 160} and figures["left_out_for_time"] == 0
    late = gpu_speed.speed(Bundle(small.path, short), make, (1, 2), 3, None, said.append, until=0.0)
    assert late["rows"] == [] and late["left_out_for_time"] == 4
    table = gpu_report.show({"environment": {"gpu": "none"}, "speed": figures, "seconds": 1.0})
    assert table.count(" ms | 1 |") == table.count(" ms | 2 |") == 2 and "Encoder: a CPU's." in table


@needs_compiler
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("loop", LOOPS)
def test_stages_are_the_steps_own(small: Bundle, loop: str, capturable: bool) -> None:
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


@needs_compiler
def test_blank_is_settled(small: Bundle) -> None:
    """Between silence and chatter lies the rate wanted; twice the labels would be too many."""
    chunk = small.manifest.chunk(160)
    backend = make_backend(small, [chunk], 4)
    rate = gpu_speed.settle_blank(backend, small, chunk, 3)
    assert 0 < rate < 4 * gpu_speed.TOKENS_PER_SECOND
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] == pytest.approx(rate)
    before = gpu_speed.hush(backend, small)
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] == 0
    backend.arena.write("joint_bias", before)
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] == pytest.approx(rate)


@needs_compiler
def test_without_an_encoder_there_is_something_to_decode(small: Bundle) -> None:
    chunk = small.manifest.chunk(160)
    device = HostDevice()
    encoders = {chunk.ms: gpu_speed.NoEncoder("float32")}
    backend = GpuBackend(small, device, encoders, capacity=4, max_batch=3)
    gpu_speed.give_frames(backend)
    gpu_speed.settle_blank(backend, small, chunk, 3)
    backend.arena.write("joint_bias", np.zeros(SMALL.vocab + 1, np.float32))
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] > 0


@needs_compiler
def test_boosted_steps_are_boosted(small: Bundle) -> None:
    """Timed with phrases: the streams have them, each its own, and say other things."""
    chunk = small.manifest.chunk(160)
    backend = make_backend(small, [chunk], 4)
    backend.arena.write("joint_bias", np.zeros(SMALL.vocab + 1, np.float32))
    lists = [features.some_phrases(number, [], SMALL.vocab) for number in range(2)]
    plain, boosted = (
        gpu_speed.step_times(backend, chunk, 3, 6),
        gpu_speed.step_times(backend, chunk, 3, 6, boosts=lists),
    )
    assert plain["tokens_per_second"] > 0 and len(boosted["raw_ms"]) == 6
    found = [backend.save(slot)["phrases"].tobytes() for slot in range(3)]
    assert found == [lists[index].digest.tobytes() for index in (0, 1, 0)]


def test_streams_are_what_fits_into_a_chunk() -> None:
    rows = [
        {"chunk_ms": 80, "batch": 1, "p99_ms": 1.0, "gathered_p99_ms": 1.0},  # 80 such steps one after another
        {"chunk_ms": 80, "batch": 64, "p99_ms": 30.0, "gathered_p99_ms": 49.0},  # the second is slower, but fits
        {"chunk_ms": 80, "batch": 256, "p99_ms": 81.0, "gathered_p99_ms": 1.0},  # none
        {"chunk_ms": 560, "batch": 256, "p99_ms": 81.0, "gathered_p99_ms": 100.0},
        {"chunk_ms": 1120, "batch": 1, "p99_ms": 1121.0, "gathered_p99_ms": 1121.0},
    ]
    assert gpu_speed._streams(rows, 80) == 128
    assert gpu_speed._streams(rows, 560) == (1 + 4) * 256
    assert gpu_speed._streams(rows, 1120) == 0


SAYS = """
import json, os, pathlib, subprocess, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
write = lambda found: (folder / f"{name}.json").write_text(json.dumps(found))
write({"by now": 1})
print("words of", name)
sys.stdout.flush()
if name == "crashes":
    os.abort()
if name == "hangs":
    child = subprocess.Popen(["sleep", "1000"])
    write({"by now": child.pid})
    time.sleep(1000)
write({"all": 2})
"""


def test_a_section_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    """One that crashes, one that hangs with a child of its own: what they found until then is kept, and nothing of them
    goes on."""
    kept: list[list[str]] = []
    report = gpu_check.in_processes(
        {"crashes": 20, "hangs": 3, "works": 20},
        lambda name, minutes: [sys.executable, "-c", SAYS, str(tmp_path), name],
        tmp_path,
        1,
        lambda report: kept.append([*report]),
    )
    assert report["works"] == {"all": 2}
    assert report["crashes"] == {"by now": 1, "error": "ended with SIGABRT", "log": ["words of crashes"]}
    assert report["hangs"]["error"] == "was not done after 3 s"
    state = Path(f"/proc/{report['hangs']['by now']}/stat")
    assert not state.exists() or ") Z " in state.read_text()
    assert [len(names) for names in kept] == [2, 3, 4] and "works" in kept[-1]
    late = gpu_check.in_processes({"works": 20}, lambda name, minutes: ["false"], tmp_path, 0, lambda report: None)
    assert "run it alone with --only works" in late["works"]["error"]
    assert "**crashes**: not done: ended with SIGABRT" in gpu_report.show(report)
    assert "**speed**: not done: it hung" in gpu_report.show({"speed": {"error": "it hung"}, "seconds": 1.0})


def test_goals_by_hand() -> None:
    """What a report does not have is not called missed."""
    times = {"p50_ms": 1.4, "p99_ms": 2.6, "encoder_ms": 0.8, "floor_ms": 0.4}
    row = {"chunk_ms": 80, "batch": 1, **times}
    many = {"chunk_ms": 80, "batch": 1024, "host_ms": 2.0, "pipelined_ms": 100.0}
    half = {"chunk_ms": 560, "batch": 64, "whole_ms": 10.0, "undecoded_ms": 8.5}
    rows = [
        each | {"encoder": "tensorrt fp16"} for each in (row, many, {**many, "chunk_ms": 160, "host_ms": 6.0}, half)
    ]
    case = {"chunk_ms": 80, "batch": 1, "side": "NeMo, bf16"}
    report = {
        "speed": {"rows": rows, "streams": {"80": 2400, "160": 9}},
        "baseline": {"rows": [{"case": case, "values": {"times": {"nemostream, fp16": {"median": 16.0}}}}]},
    }
    found = {goal.what: goal for goal in gpu_report.goals(report)}
    assert [goal.reached for goal in found.values()] == [
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
    assert found["encoder, 80 ms, batch 1, ÷ its floor"].found == pytest.approx(2.0)
    assert found["decoding's share of a step, 560 ms, batch 64"].found == pytest.approx(0.15)
    assert found["the host's share of a step, batch 1024, at worst"].found == pytest.approx(0.06)
    table = gpu_report._goals_table(report)
    assert "| streams in real time at 80 ms | ≥ 2400 | 2400 | reached |" in table and "| not measured |" in table
    assert gpu_report._goals_table({"speed": {"error": "no GPU"}}) == ""


def test_nothing_is_reached_without_an_encoder() -> None:
    row = {"chunk_ms": 80, "batch": 1, "encoder": "none (TensorRT is not here)", "p50_ms": 0.1, "p99_ms": 0.1}
    report = {"speed": {"rows": [row], "streams": {"80": 9999}}}
    assert {goal.reached for goal in gpu_report.goals(report)} == {None}


def test_a_section_run_alone_joins_the_others() -> None:
    """Those of the same machine and code: others are not its own."""
    here = {"gpu": "one", "commit": "abc"}
    alone = {"environment": here, "soak": {"flat": True}, "seconds": 2.0}
    assert gpu_report.joined({}, alone) == alone
    before = {"environment": here, "loading": {"loop": "while"}, "soak": {}, "seconds": 3.0}
    both = gpu_report.joined(before, alone)
    assert both == {"environment": here, "loading": {"loop": "while"}, "soak": {"flat": True}, "seconds": 5.0}
    other = alone | {"environment": here | {"commit": "def"}}
    assert gpu_report.joined(before, other) == other


def test_the_baseline_takes_the_engine_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compared(*given: Any, device: str, **options: Any) -> dict[str, Any]:
        asked.append(device)
        sides = ["NeMo, bf16"] + (["nemostream, fp16"] if device == "cuda:onnxruntime" else [])
        return {"rows": [{"case": {"side": side}} for side in sides], "device": device}

    monkeypatch.setattr(gpu_check, "compare_steps", compared)
    here = gpu_check.Here(argparse.Namespace(minutes=1, repeats=3, section="baseline"), tmp_path)
    with monkeypatch.context() as given:
        given.setattr(gpu_check, "prepared", lambda *given: contextlib.nullcontext((Path("x.nemo"), None)))
        assert gpu_check.baseline(here)["device"] == "cuda:onnxruntime" and asked == ["cuda", "cuda:onnxruntime"]
    monkeypatch.setattr(baseline, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=re.escape(f"the baseline needs NeMo: {install_command('export', 'bench')}")):
        gpu_check.baseline(here)


def test_what_a_section_knew_before_it_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(here: gpu_check.Here) -> dict[str, Any]:
        assert here.report == {"bandwidth": {"copy_bytes_per_second": 5}}
        here.keep({"rows": [1]})
        raise ValueError("odd")

    (tmp_path / "report.json").write_text('{"bandwidth": {"copy_bytes_per_second": 5}}')
    monkeypatch.setitem(gpu_check.SECTIONS, "speed", (fails, 1))
    gpu_check.main(["--section", "speed", "--scratch", str(tmp_path)])
    assert json.loads((tmp_path / "speed.json").read_text()) == {"rows": [1], "error": "ValueError: odd"}


def test_without_a_gpu_it_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core")
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    try:
        CudaDevice().close()
    except BackendError:
        pass
    else:
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as leaving:
        gpu_check.main(["--out", str(tmp_path)])
    assert leaving.value.code == 7 and "no usable NVIDIA GPU" in capsys.readouterr().err
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
