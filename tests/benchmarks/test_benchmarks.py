"""All benchmarks for a few seconds on the packaged model: they run, and their figures follow from their samples."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream.benchmarks import capacity, latency, module_name, quick, report, throughput
from nemostream.benchmarks.harness import load, records
from nemostream.benchmarks.harness.roofline import Machine, Work, encoder_work, measure_machine
from nemostream.benchmarks.studies import cost
from nemostream.bundle import Bundle
from nemostream.cli.main import _BENCHMARKS, _run
from nemostream.clips import CLIP_TEXT
from nemostream.engines import open_backend, speech
from nemostream.errors import BackendError, OptionError, StreamError
from nemostream.runtime.backends.cpu import OrtBackend

pytest.importorskip("onnx", reason="needs the build extra")
pytest.importorskip("matplotlib", reason="needs the bench extra")

MACHINE = Machine(1e10, {"fp32": 1e11, "int8": 4e11}, {"read": 10.0})


def shown(result: records.Record, folder: Path) -> str:
    """Write and read the result and return its report."""
    records.write(result, folder / "x.json")
    text, _ = report.write_report([records.read(folder / "x.json")], folder / "x.md")
    assert (folder / "x.md").read_text() == text
    for picture in [line for line in text.splitlines() if line.startswith("![")]:
        name = picture.rpartition("(")[2].rstrip(")")
        assert "<svg" in (folder / name).read_text()
        assert (folder / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return text


# -- roofline ----------------------------------------------------------------------------------------------------------


def test_roofline_example() -> None:
    work = Work(weight_bytes=2_000_000_000, flops_per_row=1e9)
    one = work.roofline_ms(MACHINE, "fp32", 1)
    assert one == {"memory": 200, "compute": 10, "roofline": 200, "bound_by": "memory"}
    batch = work.roofline_ms(MACHINE, "fp32", 64)
    assert batch == {"memory": 200, "compute": 640, "roofline": 640, "bound_by": "compute"}
    assert work.roofline_ms(MACHINE, "bf16", 64)["compute"] == 0  # no rate is known


@pytest.mark.parametrize("frames", [1, 14])
def test_work_example(frames: int, demo_bundle: Bundle) -> None:
    """The operations of a step of the packaged model, counted by hand."""
    chunk = next(chunk for chunk in demo_bundle.manifest.chunks if chunk.frames == frames)
    spec, keys = demo_bundle.manifest.encoder, chunk.left + frames
    assert (spec.d_model, chunk.left) == (128, 70)
    # Per layer two feed-forward nets (16 D^2), Q, K, V and output (4 D^2), two pointwise convolutions (3 D^2).
    # Outside the layers: output of the subsampling (32 channels of 17 bins), encoder projection of the joint.
    weights = spec.layers * 23 * 128**2 + 544 * 128 + 128 * 128
    attention = spec.layers * 3 * 128 * keys  # queries by keys, queries by positions, weights by values
    assert encoder_work(demo_bundle, chunk).flops_per_row == 2 * frames * (weights + attention)


def test_work_grows_with_chunk_and_shrinks_with_precision(demo_bundle: Bundle) -> None:
    short, long = (encoder_work(demo_bundle, demo_bundle.manifest.chunk(ms)) for ms in (80, 1120))
    spec = demo_bundle.manifest.encoder
    # Two feed-forward nets of 4D, four attention projections and two pointwise convolutions: 23 D^2 per layer.
    assert long.flops_per_row > 14 * short.flops_per_row > 14 * 2 * 23 * spec.layers * spec.d_model**2
    assert 4 * 23 * spec.layers * spec.d_model**2 < short.weight_bytes <= demo_bundle.manifest.weights.bytes
    int8 = encoder_work(demo_bundle, demo_bundle.manifest.chunk(80), "int8")
    assert short.weight_bytes - int8.weight_bytes >= 3 * 20 * spec.layers * spec.d_model**2
    half = encoder_work(demo_bundle, demo_bundle.manifest.chunk(80), "fp16", "cuda")
    assert half.weight_bytes == short.weight_bytes // 2


def test_measured_rates() -> None:
    machine = measure_machine(1, 1 << 20, repeats=1, size=128)
    assert machine.bandwidth > 0 and min(machine.flops.values()) > 0
    assert machine.bandwidth == 1e9 * max(rate for name, rate in machine.rates.items() if name.startswith("read"))
    for precision in ("fp32", "int8"):
        rates = [rate for name, rate in machine.rates.items() if name.startswith(f"{precision} product")]
        assert machine.flops[precision] == 1e9 * max(rates)


def test_measured_rates_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are measured with PyTorch on the given device; here the CPU replaces the GPU."""
    pytest.importorskip("torch")
    from nemostream.benchmarks.gpu import roofline as gpu_roofline

    products = gpu_roofline.gpu_products("cpu", size=64, repeats=1)
    assert {"fp32 product", "fp32 product (TF32)", "fp16 product", "bf16 product", "int8 product"} <= products.keys()
    monkeypatch.setattr(gpu_roofline, "copy_rate", lambda device: 2e12)
    monkeypatch.setattr(
        gpu_roofline, "gpu_products", lambda: {"fp32 product": 6e4, "fp32 product (TF32)": 4e5, "fp8 product": 1}
    )
    machine = gpu_roofline.measure_gpu(object())
    assert machine.bandwidth == 2e12 and machine.flops == {"fp32": 4e14, "fp8": 1e9}
    assert machine.rates["copy"] == 2000
    # Without PyTorch, ONNX Runtime is used; without its CUDA provider, no products are measured.
    monkeypatch.setattr(gpu_roofline, "_import_torch", lambda device: None)
    assert gpu_roofline._products_without_torch(64, 1) == {}
    assert gpu_roofline.product_rate("fp16", 1, 64, 1) > 0


# -- latency -----------------------------------------------------------------------------------------------------------


def test_latency(demo_bundle: Bundle, tmp_path: Path) -> None:
    result = latency.measure_latency(
        demo_bundle, ("fp32", "int8"), (1, 3), (560, 1120), repeats=4, machine=MACHINE, engines=tmp_path / "engines"
    )
    cases = [(row["case"]["precision"], row["case"]["chunk_ms"], row["case"]["batch"]) for row in result["rows"]]
    assert {row["case"]["backend"] for row in result["rows"]} == {"cpu"}
    assert cases == [(p, ms, batch) for p in ("fp32", "int8") for ms in (560, 1120) for batch in (1, 3)]
    for row in result["rows"]:
        ms, batch = row["ms"], row["case"]["batch"]
        assert len(ms["step"]) == 4 and len(ms["push"]) == 4 * batch
        for step, *parts in zip(ms["step"], *(ms[part] for part in latency.PARTS), strict=True):
            assert sum(parts) == pytest.approx(step, abs=0.01) and min(parts) > -0.01
        assert row["figures"]["encoder"]["p50"] > row["figures"]["copies"]["p50"]
        assert row["values"]["launches"] >= 3  # front end, encoder, joint
        assert row["values"]["roofline_ms"]["roofline"] > 0
        assert row["values"]["bytes_per_stream"] == OrtBackend(demo_bundle, 1).bytes_per_stream
    text = shown(result, tmp_path)
    assert text.count("| 1120 ms | 3 | int8 | cpu |") == 3  # step, push, breakdown
    assert list((tmp_path / "engines").glob("*not validated*.json"))  # not used outside of benchmarks
    with pytest.raises(BackendError, match="has no int8 engine"):
        open_backend(demo_bundle, precision="int8", engines=tmp_path / "engines")


def test_latency_restores_the_backend(demo_bundle: Bundle) -> None:
    chunk, backend = demo_bundle.manifest.chunk(560), OrtBackend(demo_bundle, 2)
    backend.prepare(chunk)
    sessions = backend._steps[560].run_encoder, backend.transducer.run_joint
    with latency._timed_stages(backend, chunk) as stages:
        backend.reset(np.arange(2))
        feed = latency.AudioFeed(demo_bundle.manifest, speech(demo_bundle.manifest)[0], 2, 7)
        backend.submit(feed.batch(chunk, 0)).result()
        assert stages["encoder"] > 0 and stages["calls"] >= 3
    assert (backend._steps[560].run_encoder, backend.transducer.run_joint) == sessions
    assert "encode" not in vars(backend)


def test_latency_of_the_gpu_backend(small_bundle: Bundle, make_device: Any, tmp_path: Path) -> None:
    """On the emulated device: the stages and events of the benchmark are tested, the times are meaningless."""
    from host_device import OrtEncoder

    from nemostream.runtime.backends.gpu.backend import GpuBackend

    chunk, device = small_bundle.manifest.chunk(560), make_device()
    backend = GpuBackend(small_bundle, device, {560: OrtEncoder(small_bundle, chunk, device, True)}, capacity=2)
    try:
        case = {"chunk_ms": 560, "batch": 2, "precision": "fp32", "backend": "cuda"}
        row = latency._measure(small_bundle, backend, chunk, case, 2, MACHINE)
    finally:
        backend.close()
    assert {"device", "features", "encoder", "copies", "step", "push"} <= row["figures"].keys()
    assert len(row["ms"]["device"]) == 2 and row["values"]["launches"] >= 1


def test_latency_of_several_backends(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU and emulated GPU in one result: an engine is built for the GPU, with a roofline from the GPU's rates."""
    host_device, emulator = pytest.importorskip("host_device"), pytest.importorskip("cuda_on_cpu")
    if emulator.MISSING:
        pytest.skip("needs g++ to run the kernels on a CPU")
    from nemostream import engines
    from nemostream.benchmarks.gpu import roofline as gpu_roofline
    from nemostream.runtime.backends.gpu import cuda
    from nemostream.runtime.backends.gpu.backend import GpuBackend

    opened = []

    def open_gpu(bundle: Bundle, device: Any, plans: Any, capacity: int, max_batch: int) -> Any:
        opened.extend(plan.recipe for plan in plans.values())
        encoders = {ms: host_device.OrtEncoder(bundle, bundle.manifest.chunk(ms), device, True) for ms in plans}
        return GpuBackend(bundle, device, encoders, capacity, max_batch)

    monkeypatch.setattr(cuda, "CudaDevice", host_device.HostDevice)
    monkeypatch.setattr(engines, "open_gpu", open_gpu)
    gpu = Machine(1e12, {"fp32": 1e13}, {"copy": 1000.0})
    monkeypatch.setattr(gpu_roofline, "measure_gpu", lambda device: gpu)
    monkeypatch.setattr(gpu_roofline, "measure_machine", lambda threads: MACHINE)
    result = latency.measure_latency(
        demo_bundle,
        ("fp32", "int8"),
        (1,),
        (560,),
        2,
        devices=("cpu", "cuda:onnxruntime"),
        engines=tmp_path / "engines",
    )
    cases = [(row["case"]["backend"], row["case"]["precision"]) for row in result["rows"]]
    assert cases == [
        ("cpu", "fp32"),
        ("cpu", "int8"),
        ("cuda:onnxruntime", "fp32"),
    ]  # no 8 bit with ONNX Runtime on a GPU
    assert [(recipe.backend, recipe.device) for recipe in opened] == [("onnxruntime", "cuda, not validated")]
    work = encoder_work(demo_bundle, demo_bundle.manifest.chunk(560))
    assert result["rows"][2]["values"]["roofline_ms"] == work.roofline_ms(gpu, "fp32", 1)
    assert result["rows"][0]["values"]["roofline_ms"] == work.roofline_ms(MACHINE, "fp32", 1)
    assert "device" in result["rows"][2]["figures"]
    text = shown(result, tmp_path)
    assert (
        "| 560 ms | 1 | fp32 | cuda:onnxruntime | device |" in text and "Measured rates, cuda: copy 1000 GB/s" in text
    )


# -- capacity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "maximum"), [(0, 64), (1, 64), (2, 64), (3, 64), (37, 64), (63, 64), (64, 64), (200, 512)]
)
def test_search_finds_the_maximum(limit: int, maximum: int) -> None:
    tried: list[int] = []

    def passes(streams: int) -> bool:
        tried.append(streams)
        return streams <= limit

    found = capacity.search(passes, maximum)
    assert found <= limit and found >= limit - max(1, load.SEARCH_RESOLUTION * limit)
    assert max(tried) <= maximum and len(tried) == len(set(tried)) <= 14


def load_result(latencies: list[float], **changes: Any) -> load.LoadResult:
    """Return a load result with one 560 ms result per second."""
    result = load.LoadResult([(560, float(second), latency) for second, latency in enumerate(latencies)])
    result.lateness, result.seconds, result.audio_seconds = [0.0], float(len(latencies)), 2.0 * len(latencies)
    for name, value in changes.items():
        setattr(result, name, value)
    return result


STEPS = [(560, 2, 40.0)] * 30


@pytest.mark.parametrize(
    ("result", "steps", "failures"),
    [
        (load_result([0.1] * 30), STEPS, []),
        (load_result([0.1] * 20 + [0.15] * 10), STEPS, []),
        (load_result([0.1] * 20 + [0.17] * 10), STEPS, ["latency of the 560 ms results grew by"]),
        (load_result([0.1] * 29 + [0.6]), STEPS, ["p99 of the 560 ms result is 600 ms"]),
        (load_result([0.1] * 30), [*STEPS, (560, 2, 561.0)], ["p99 of the 560 ms step is 561 ms"]),
        (load_result([0.1] * 30, overdue=3), STEPS, ["3 chunks had no result at the end"]),
        (load_result([0.1] * 30, lateness=[0.0] * 97 + [0.5] * 3), STEPS, ["the load generator fell behind"]),
        (load_result([0.1] * 30, errors=["no free slot"]), STEPS, ["1 errors, first: no free slot"]),
        (load_result([]), [], ["no results"]),
    ],
)
def test_failures_of_a_load_test(result: load.LoadResult, steps: list[Any], failures: list[str]) -> None:
    values = capacity.evaluate(result, steps, {})["values"]
    assert values["passed"] == (not failures)
    assert len(values["failures"]) == len(failures)
    assert all(part in failure for part, failure in zip(failures, values["failures"], strict=True))


def test_figures_of_a_load_test() -> None:
    row = capacity.evaluate(load_result([0.1] * 10 + [0.2] * 10 + [0.3] * 10), [(560, 1, 30.0), (560, 3, 50.0)], {})
    assert row["values"]["drift_ms"] == {"560": pytest.approx(200, abs=0.01)}
    assert row["values"]["rtfx"] == 2.0 and row["values"]["mean_batch"] == 2.0
    assert row["ms"]["step 560 ms"] == [30.0, 50.0]
    assert len(row["ms"]["result 560 ms"]) == 28  # the first two seconds are not evaluated


def test_concurrent_streams_give_the_offline_text(demo_bundle: Bundle) -> None:
    """The texts of concurrent real-time streams are those of offline transcription; every result is timed."""
    clips = [speech(demo_bundle.manifest)[1]]
    with nemostream.load(chunk_ms=80, capacity=12) as model:
        wanted = model.transcribe(clips[0]).text
        found = load.run_load(model, clips, 3, (80, 560), total_clips=6)
    assert not found.errors and found.overdue == 0
    assert found.texts == [(0, wanted)] * 6
    assert len(found.finals) == 6 and min(found.finals) > 0
    assert found.audio_seconds == pytest.approx(6 * len(clips[0]) / 16000)
    # Each complete chunk of each clip has one result, after the end of its audio.
    chunks = {ms: (len(clips[0]) + model.manifest.lead) // model.manifest.chunk(ms).samples for ms in (80, 560)}
    counts = {ms: sum(size == ms for size, _, _ in found.results) for ms in (80, 560)}
    assert sum(counts[ms] / chunks[ms] for ms in counts) == pytest.approx(6)
    assert min(latency for _, _, latency in found.results) > 0
    assert found.seconds >= 2 * len(clips[0]) / 16000  # two clips in sequence, in real time


def test_closing_streams_at_the_end_is_not_an_error(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may be closed while its last results are collected, which raises an error in the callback."""
    with nemostream.load(chunk_ms=80, capacity=2) as model:
        found = load.LoadResult()
        client = load._Client(model, [speech(demo_bundle.manifest)[1]], iter([0]), 80, found, 0.0)
        client.advance(0.0)
        stream = client._stream
        assert stream

        def close_while_collecting() -> list[Any]:
            client.close()
            with pytest.raises(StreamError, match="the stream was closed"):
                stream.settled()
            stream.settled()
            return []

        monkeypatch.setattr(stream, "collect", close_while_collecting)
        client.on_step()
    assert not found.errors and not found.texts


def test_phases_and_chunk_sizes(monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
    """Start times are spread over the chunk with `random_phase`, else equal; the chunk sizes alternate."""
    starts: list[tuple[int, float]] = []

    class Client:
        def __init__(
            self, model: Any, clips: Any, order: Any, chunk_ms: int, result: Any, start: float, *others: Any
        ) -> None:
            self.chunk_ms, self.start = chunk_ms, start

        def advance(self, now: float) -> None:
            starts.append((self.chunk_ms, 1000 * (now - self.start)))

        def overdue(self, now: float) -> int:
            return 0

        def close(self) -> None: ...

    monkeypatch.setattr(load, "_Client", Client)
    controlled: dict[str, Any] = {"clock": clock, "sleep": clock.sleep}
    load.run_load(None, [], 300, (80, 560, 1120), seconds=2.0, **controlled)  # type: ignore[arg-type]
    for ms in (80, 560, 1120):
        offsets = [offset for size, offset in starts if size == ms]
        assert len(offsets) == 100 and min(offsets) >= 0 and max(offsets) < ms
        assert np.histogram(offsets, 4, (0, ms))[0].min() > 10
    starts.clear()
    load.run_load(None, [], 5, (80, 560), seconds=1.0, random_phase=False, **controlled)  # type: ignore[arg-type]
    assert starts == [(80, 0.0), (560, 0.0), (80, 0.0), (560, 0.0), (80, 0.0)]


def test_capacity(demo_bundle: Bundle, tmp_path: Path) -> None:
    result = capacity.measure_capacity(
        demo_bundle, chunk_ms=(560, 1120), seconds=2, probe_seconds=2, max_streams=2, engines=tmp_path
    )
    streams = [(row["case"]["streams"], row["case"]["confirming"]) for row in result["rows"]]
    assert streams[0] == (1, False) and result["method"]["streams"] in (0, 1, 2)
    assert {"step 560 ms", "result 560 ms"} <= result["rows"][0]["figures"].keys()
    assert "real-time streams" in shown(result, tmp_path)


def test_capacity_with_small_batches(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """`max_batch` limits the rows of a step, not the streams."""
    rows: list[int] = []
    evaluate = capacity.evaluate

    def record(load: Any, steps: Any, case: Any) -> records.Row:
        rows.extend(count for _, count, _ in steps)
        return evaluate(load, steps, case)

    monkeypatch.setattr(capacity, "evaluate", record)
    monkeypatch.setattr(capacity, "speech", lambda manifest: [speech(manifest)[1][:16000]])
    result = capacity.measure_capacity(demo_bundle, chunk_ms=(560,), simulate_realtime=4, max_batch=2)
    assert max(rows) == 2 and result["method"]["max_batch"] == 2
    assert len(result["rows"][0]["ms"]["final"]) == 12
    with pytest.raises(OptionError):
        capacity.measure_capacity(demo_bundle, max_batch=0)


def test_a_failed_probe_is_repeated_once(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, verdicts = capacity.evaluate, iter([False, True, False, False, True])

    def fixed_verdict(*arguments: Any) -> records.Row:
        row = evaluate(*arguments)
        row["values"]["passed"] = next(verdicts)
        return row

    monkeypatch.setattr(capacity, "evaluate", fixed_verdict)
    result = capacity.measure_capacity(demo_bundle, chunk_ms=(1120,), seconds=0.5, probe_seconds=0.5, max_streams=2)
    tried = [(row["case"]["streams"], row["case"]["confirming"]) for row in result["rows"]]
    assert tried == [(1, False), (1, False), (2, False), (2, False), (1, True)]
    assert result["method"]["streams"] == 1


def test_nvidias_method(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "speech", lambda manifest: [speech(manifest)[1][:16000]])
    result = capacity.measure_capacity(demo_bundle, chunk_ms=(560,), simulate_realtime=2)
    (row,) = result["rows"]
    assert row["case"]["simulate_realtime"] and len(row["ms"]["final"]) == 6
    assert row["values"]["audio_seconds"] == 6.0
    text = shown(result, tmp_path)
    assert "final" in text and "NVIDIA's method" in text


# -- the others --------------------------------------------------------------------------------------------------------


def test_throughput(demo_bundle: Bundle, tmp_path: Path) -> None:
    clips = [speech(demo_bundle.manifest)[1]] * 3
    result = throughput.measure_throughput(demo_bundle, clips, batches=(1, 2), chunk_ms=(1120,))
    for row in result["rows"]:
        assert row["values"]["audio_seconds"] == pytest.approx(3 * len(clips[0]) / 16000)
        assert len(row["ms"]["whole set"]) == 3
        seconds = statistics.median(row["ms"]["whole set"]) / 1000
        assert row["values"]["rtfx"] == pytest.approx(row["values"]["audio_seconds"] / seconds, rel=1e-3)
    assert "| 1120 ms | 2 | fp32 |" in shown(result, tmp_path)
    with pytest.raises(OptionError, match="at least one recording is needed"):
        throughput.measure_throughput(demo_bundle, [])
    with pytest.raises(OptionError, match="batch 4 needs at least as many recordings; there are 3"):
        throughput.measure_throughput(demo_bundle, clips, batches=(1, 4))


def test_batch_fit() -> None:
    assert cost.fit_batch((1, 2, 4, 8), (12.0, 14.0, 18.0, 26.0)) == pytest.approx((10.0, 2.0))
    assert cost.fit_batch((1, 2, 4), (3.0, 6.0, 12.0)) == pytest.approx((0.0, 3.0))
    assert cost.fit_batch((1, 2, 4), (5.0, 5.0, 5.0)) == pytest.approx((5.0, 0.0))
    fixed, per_stream = cost.fit_batch((1, 2, 4), (4.0, 9.0, 20.0))  # steeper than proportional
    assert fixed == 0 and 4 < per_stream < 5


@pytest.mark.parametrize(
    ("fixed", "weights", "per_stream", "products", "limits"),
    [
        (10.0, 8.0, 2.0, 1.5, ("memory", "compute", 5.0)),
        (10.0, 4.9, 2.0, 0.9, ("overhead", "overhead", 5.0)),
        (10.0, 5.0, 0.0, 0.0, ("memory", "compute", float("inf"))),
        (0.0, 1.0, 3.0, 1.0, ("memory", "overhead", 0.0)),
    ],
)
def test_limits(
    fixed: float, weights: float, per_stream: float, products: float, limits: tuple[str, str, float]
) -> None:
    fit = {"fixed_ms": fixed, "weights_ms": weights, "per_stream_ms": per_stream, "products_ms": products}
    assert cost.limits(fit) == limits


def test_duration_fit() -> None:
    flat = cost.fit_duration([10.0, 10.1, 9.9, 10.0] * 25)
    assert flat["low_ms"] < 0 < flat["high_ms"] and abs(flat["share"]) < 0.01
    growing = cost.fit_duration(np.linspace(10, 11, 100).tolist())
    assert growing["change_ms"] == pytest.approx(1.0) and growing["low_ms"] > 0.9
    assert growing["share"] == pytest.approx(1 / 10.5, rel=0.01)


def test_cost(demo_bundle: Bundle, tmp_path: Path) -> None:
    result = cost.measure_cost(demo_bundle, batches=(1, 3), chunk_ms=(1120,), hours=0.02, repeats=3, machine=MACHINE)
    by_batch, long = result["rows"][:2], result["rows"][2]
    assert [row["case"]["batch"] for row in by_batch] == [1, 3]
    (fit,) = result["method"]["fits"]
    medians = [statistics.median(row["ms"]["step"]) for row in by_batch]
    assert (fit["fixed_ms"], fit["per_stream_ms"]) == pytest.approx(cost.fit_batch((1, 3), medians), rel=1e-3)
    assert len(long["ms"]["segment"]) == 59 and long["values"]["hours"] == 0.02  # 72 s of 1.12 s, five warm-up steps
    text = shown(result, tmp_path)
    assert "limited by" in text and f"then {cost.limits(fit)[1]} |" in text


@pytest.mark.slow
def test_quick_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quick, "measure_machine", lambda *sizes, **more: MACHINE)
    assert _run(["bench", "quick", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert "push to" in out and "p99" in out and CLIP_TEXT in out and "|" not in out
    result = json.loads((tmp_path / "bench-results" / "quick.json").read_text())
    assert len(result["rows"]) == 8 and result["benchmark"] == "quick" and result["method"]["seconds"] > 0
    for row in result["rows"]:
        assert len(row["ms"]["step"]) == 2 and row["values"]["rtfx"] > 0
    assert (tmp_path / "bench-results" / "quick-latency.png").exists()


@pytest.mark.slow
def test_quick_with_bundle_and_device(
    demo_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quick, "measure_machine", lambda *sizes, **more: MACHINE)
    monkeypatch.setattr(nemostream, "demo_bundle", lambda: Path("/nowhere"))  # must not be used
    assert _run(["bench", "quick", "--repeats", "1", "--bundle", str(demo_bundle.path), "--device", "cpu"]) == 0
    assert CLIP_TEXT in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        _run(["bench", "quick", "--bundle", str(demo_bundle.path), "--device", "tpu"])
    assert exit_info.value.code == 2 and "'tpu'; choose one of cpu, cuda" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        _run(["bench", "quick", "--bundle", str(tmp_path / "none")])
    assert exit_info.value.code == 4 and "is not a folder" in capsys.readouterr().err


SHORT = {
    "latency": "--chunk-ms 560 --batch 1 --repeats 2",
    "capacity": "--chunk-ms 560 1120 --seconds 2 --probe-seconds 1 --max-streams 1",
    "throughput": "--chunk-ms 1120 --batch 2 --copies 1 --repeats 1",
    "accuracy": "--chunk-ms 1120 --normalizer basic",
    "cost": "--chunk-ms 1120 --batch 1 2 --repeats 2 --hours 0.005",
}


@pytest.mark.parametrize("name", SHORT)
def test_command_of_every_benchmark(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command writes tables, plots and a file that `report` reads. (For baseline see test_baseline.)"""
    from nemostream.benchmarks.gpu import roofline as gpu_roofline

    monkeypatch.setattr(gpu_roofline, "measure_machine", lambda threads: MACHINE)  # reads gigabytes
    out = ["--out", str(tmp_path), "--name", "it"]
    assert _run(["bench", name, *SHORT[name].split(), *out]) == 0
    output = capsys.readouterr().out
    assert output == (tmp_path / "it.md").read_text() and output.startswith(f"## {name}")
    result = records.read(tmp_path / "it.json")
    assert result["benchmark"] == name and result["rows"] and result["hardware"]["cpu"] and result["command"]
    pictures = list(tmp_path.glob("it-*.png"))
    assert pictures and all(picture.with_suffix(".svg").exists() for picture in pictures)
    arguments = [str(tmp_path / "it.json"), "--against", str(tmp_path / "it.json"), "--out", str(tmp_path / "r.md")]
    assert _run(["bench", "report", *arguments]) == 0
    comparison = capsys.readouterr().out
    assert "slower" not in comparison and "faster" not in comparison and "worse" not in comparison
    assert output.splitlines()[2] in comparison  # machine and model


@pytest.mark.parametrize("name", [*_BENCHMARKS, "gpu_check", "precision", "random_bundle"])
def test_every_benchmark_runs_as_a_module(name: str) -> None:
    command = [sys.executable, "-m", module_name(name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = f"nemostream bench {name}" if name in _BENCHMARKS else module_name(name)
    assert usage in done.stdout


def test_unknown_benchmark_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["bench", "speed"]) == OptionError.exit_code
    assert "choose one of quick" in capsys.readouterr().err
    assert _run(["bench"]) == 0
    assert "latency" in capsys.readouterr().out


def test_invalid_options_are_rejected(demo_bundle: Bundle) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        latency.measure_latency(demo_bundle, batches=(0,))
    with pytest.raises(OptionError, match="must be positive"):
        capacity.measure_capacity(demo_bundle, seconds=0)
    with pytest.raises(OptionError, match="at least 1"):
        cost.measure_cost(demo_bundle, repeats=0)
    with pytest.raises(OptionError, match="cpu supports fp32, int8, not fp16"):
        latency.measure_latency(demo_bundle, ("fp16",), (1,), machine=MACHINE)
    with pytest.raises(OptionError, match="choose one of cpu, cuda"):
        latency.measure_latency(demo_bundle, devices=("tpu",), machine=MACHINE)
