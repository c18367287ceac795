"""The GPU check's parts on a device that the CPU plays: they run, and what they count is right. No time is judged."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder

from nemostream.benchmarks import features, gpu_check, gpu_speed
from nemostream.benchmarks.random_bundle import random_bundle
from nemostream.benchmarks.synthetic import Sizes
from nemostream.runtime.backend import Batch
from nemostream.runtime.gpu import GpuBackend
from nemostream.runtime.ort import OrtBackend
from nemostream.spec import Bundle, Chunk

SMALL = Sizes(n_layers=2, d_model=64, n_heads=4, conv_channels=32, pred_hidden=48, joint_hidden=48, vocab=128)
needs_compiler = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("random") / "bundle", sizes=SMALL)


def make_backend(bundle: Bundle, chunks: Sequence[Chunk], capacity: int, device: Any = None) -> GpuBackend:
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
    assert {"boost", "forget"} < set(backend._device.launches)
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

    def make(bundle: Bundle, chunks: Sequence[Chunk], capacity: int) -> tuple[GpuBackend, str]:
        return make_backend(bundle, chunks, capacity), "a CPU's"

    short = dataclasses.replace(small.manifest, chunks=small.manifest.chunks[:2])
    figures = gpu_speed.speed(Bundle(small.path, short), make, (1, 2), 3, 1e9, said.append)
    found = [(row["chunk_ms"], row["batch"]) for row in figures["rows"]]
    assert found == [(80, 1), (80, 2), (160, 1), (160, 2)]
    for row in figures["rows"]:
        assert len(row["raw_ms"]) == 3 and min(row["raw_ms"]) == pytest.approx(row["min_ms"], abs=1e-4)
        assert row["min_ms"] <= row["p50_ms"] <= row["p99_ms"] <= max(row["raw_ms"]) + 1e-4
        assert row["floor_ms"] == pytest.approx(1000 * small.manifest.weights.bytes / 1e9)
        assert row["settled_tokens_per_second"] > 0 and row["boosted_p50_ms"] > 0
    assert set(figures["streams"]) == {80, 160} and figures["left_out_for_time"] == 0
    late = gpu_speed.speed(Bundle(small.path, short), make, (1, 2), 3, None, said.append, until=0.0)
    assert late["rows"] == [] and late["left_out_for_time"] == 4
    table = gpu_check.show({"environment": {"gpu": "none"}, "speed": figures, "seconds": 1.0})
    assert table.count("\n| ") == 1 + 4 and "Encoder: a CPU's." in table


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
    backend._device.write(int(backend._memory.step["joint_bias"]), before)
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] == pytest.approx(rate)


@needs_compiler
def test_without_an_encoder_there_is_something_to_decode(small: Bundle) -> None:
    chunk = small.manifest.chunk(160)
    device = HostDevice()
    encoders = {chunk.ms: gpu_speed.NoEncoder("float32")}
    backend = GpuBackend(small, device, encoders, capacity=4, max_batch=3)
    gpu_speed.give_frames(backend)
    gpu_speed.settle_blank(backend, small, chunk, 3)
    backend._device.write(int(backend._memory.step["joint_bias"]), np.zeros(SMALL.vocab + 1, np.float32))
    assert gpu_speed.step_times(backend, chunk, 3, 6)["tokens_per_second"] > 0


@needs_compiler
def test_boosted_steps_are_boosted(small: Bundle) -> None:
    """Timed with phrases: the streams have them, each its own, and say other things."""
    chunk = small.manifest.chunk(160)
    backend = make_backend(small, [chunk], 4)
    backend._device.write(int(backend._memory.step["joint_bias"]), np.zeros(SMALL.vocab + 1, np.float32))
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
        {"chunk_ms": 80, "batch": 1, "p99_ms": 1.0},  # 80 such steps one after another
        {"chunk_ms": 80, "batch": 64, "p99_ms": 30.0},  # 2 of them
        {"chunk_ms": 80, "batch": 256, "p99_ms": 81.0},  # none
        {"chunk_ms": 560, "batch": 256, "p99_ms": 81.0},
    ]
    assert gpu_speed._streams(rows, 80) == 128
    assert gpu_speed._streams(rows, 560) == 6 * 256


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
        tmp_path, 1, lambda report: kept.append([*report]),
    )  # fmt: skip
    assert report["works"] == {"all": 2}
    assert report["crashes"] == {"by now": 1, "error": "ended with SIGABRT", "log": ["words of crashes"]}
    assert report["hangs"]["error"] == "was not done after 3 s"
    state = Path(f"/proc/{report['hangs']['by now']}/stat")
    assert not state.exists() or ") Z " in state.read_text()
    assert [len(names) for names in kept] == [2, 3, 4] and "works" in kept[-1]
    late = gpu_check.in_processes({"works": 20}, lambda name, minutes: ["false"], tmp_path, 0, lambda report: None)
    assert "run it alone with --only works" in late["works"]["error"]
    assert "**crashes**: not done: ended with SIGABRT" in gpu_check.show(report)
    assert "**speed**: not done: it hung" in gpu_check.show({"speed": {"error": "it hung"}, "seconds": 1.0})


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
    from nemostream.errors import BackendError
    from nemostream.runtime.cuda import CudaDevice

    try:
        CudaDevice().close()
    except BackendError:
        pass
    else:
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as leaving:
        gpu_check.main(["--out", str(tmp_path)])
    assert leaving.value.code == 7 and "no NVIDIA GPU can be used here" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.gpu
def test_copy_rate() -> None:
    from nemostream.errors import BackendError
    from nemostream.runtime.cuda import CudaDevice

    try:
        device = CudaDevice()
    except BackendError as error:
        pytest.skip(str(error))
    free = device.free_bytes
    assert 1e10 < gpu_speed.copy_rate(device) < 1e14
    assert device.free_bytes == free
    device.close()
