"""Rates and rooflines: every one from a known size and a known time, computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("onnx", reason="needs the build extra")

import onnx

from nemostream.benchmarks.harness import roofline
from nemostream.benchmarks.harness.roofline import Machine, Work
from nemostream.bundle import ChunkConfig

SIZE = 64  # of the square matrices
OPERATIONS = 524_288  # 64 rows by 64 columns, 64 products and 64 sums each


def test_shortest_time_after_a_warm_up(clock: Any) -> None:
    times = iter([0.001, 0.5, 0.25, 0.75])  # the first call is the warm-up
    assert roofline.best_seconds(lambda: clock.sleep(next(times)), 3, clock) == pytest.approx(0.25)
    assert next(times, None) is None


@pytest.mark.parametrize(
    ("precision", "rows", "memory", "compute", "roofline_ms", "bound_by"),
    [
        ("fp32", 1, 50.0, 0.4, 50.0, "memory"),  # 2 GB at 40 GB/s; 0.2 GFLOP at 500 GFLOP/s
        ("fp32", 125, 50.0, 50.0, 50.0, "compute"),
        ("fp32", 250, 50.0, 100.0, 100.0, "compute"),
        ("int8", 250, 50.0, 25.0, 50.0, "memory"),
        ("fp8", 250, 50.0, 0.0, 50.0, "memory"),  # no rate is known
    ],
)
def test_bounds(precision: str, rows: int, memory: float, compute: float, roofline_ms: float, bound_by: str) -> None:
    machine = Machine(40e9, {"fp32": 500e9, "int8": 2000e9}, {})
    assert Work(2_000_000_000, 0.2e9).roofline_ms(machine, precision, rows) == {
        "memory": pytest.approx(memory),
        "compute": pytest.approx(compute),
        "roofline": pytest.approx(roofline_ms),
        "bound_by": bound_by,
    }


# -- rates of a CPU ----------------------------------------------------------------------------------------------------


class Session(onnxruntime.InferenceSession):
    """Records graph, threads and provider of the session, and its results."""

    made: dict[str, Any]

    def __init__(self, model: bytes, options: Any, providers: Any) -> None:
        super().__init__(model, options, providers=providers)
        graph = onnx.load_from_string(model).graph
        shapes = [[d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input]
        shapes += [list(tensor.dims) for tensor in graph.initializer]
        Session.made = {
            "op": graph.node[0].op_type,
            "shapes": shapes,
            "types": [value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]],
            "threads": options.intra_op_num_threads,
            "providers": providers,
        }

    def run_with_iobinding(self, binding: Any, run_options: Any = None) -> np.ndarray:
        super().run_with_iobinding(binding, run_options)
        return binding.copy_outputs_to_cpu()[0]


def known_time(seconds: float, results: list[Any]) -> Callable[..., float]:
    """Return a replacement of `best_seconds` that runs the work once and returns a known time."""

    def best_seconds(work: Callable[[], Any], repeats: int) -> float:
        assert repeats == 7
        results.append(work())
        return seconds

    return best_seconds


@pytest.mark.parametrize(
    ("precision", "op", "types"),
    [("fp32", "MatMul", [1, 1]), ("fp16", "MatMul", [10, 10]), ("int8", "MatMulInteger", [2, 6])],
)
def test_rate_of_a_product(precision: str, op: str, types: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of [64, 64] matrices that takes 0.25 ms: 2 * 64^3 operations in this time."""
    results: list[Any] = []
    monkeypatch.setattr(roofline, "best_seconds", known_time(0.25e-3, results))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert roofline.product_rate(precision, 3, SIZE, 7) == pytest.approx(OPERATIONS / 0.25e-3)
    assert Session.made == {
        "op": op,
        "shapes": [[SIZE, SIZE], [SIZE, SIZE]],
        "types": types,
        "threads": 3,
        "providers": ["CPUExecutionProvider"],
    }
    assert results[0].shape == (SIZE, SIZE) and (results[0] == SIZE).all()  # of matrices of ones


@pytest.mark.parametrize("threads", [1, 3])
def test_rate_of_reading(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reduction reads the whole array, of 64 rows of 4,096 fp32 numbers, in 2 ms."""
    results: list[Any] = []
    monkeypatch.setattr(roofline, "best_seconds", known_time(2e-3, results))
    rates = roofline._read_rates(threads, 1 << 20, 7)
    assert rates == dict.fromkeys(("sum", "maximum", "matrix-vector product"), pytest.approx((1 << 20) / 2e-3))
    sums, maxima, product = results
    assert len(sums) == len(maxima) == threads and sum(sums) == 64 * 4096
    assert product.shape == (64,) and (product == 4096).all()


def test_rates_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are in GB/s and GFLOP/s; bandwidth and operations per second are the highest of each kind."""
    products: list[tuple[Any, ...]] = []

    def product_rate(*arguments: Any) -> float:
        products.append(arguments)
        return {"fp32": 3e9, "int8": 9e9}[arguments[0]]

    read = {"sum": 10e9, "maximum": 30e9, "matrix-vector product": 20e9}
    arguments, results = list[Any](), list[Any]()

    def read_rates(*given: Any) -> dict[str, float]:
        arguments.append(given)
        return read

    monkeypatch.setattr(roofline, "_read_rates", read_rates)
    monkeypatch.setattr(roofline, "product_rate", product_rate)
    monkeypatch.setattr(roofline, "best_seconds", known_time(OPERATIONS / 4e9, results))
    machine = roofline.measure_machine(3, 12345, 7, SIZE)
    assert machine.bandwidth == 30e9 and machine.flops == {"fp32": pytest.approx(4e9), "int8": 9e9}
    assert machine.rates == {
        "read (sum)": 10.0,
        "read (maximum)": 30.0,
        "read (matrix-vector product)": 20.0,
        "fp32 product (NumPy)": pytest.approx(4.0),
        "fp32 product (ONNX Runtime)": 3.0,
        "int8 product (ONNX Runtime)": 9.0,
    }
    assert arguments == [(3, 12345, 7)]
    assert products == [("fp32", 3, SIZE, 7), ("int8", 3, SIZE, 7)]
    assert results[0].dtype == np.float32 and results[0].shape == (SIZE, SIZE) and (results[0] == SIZE).all()


# -- work of a graph ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "device", "weight_bytes"),
    [
        ("fp32", "cpu", 4 * 896),
        ("fp32", "cuda", 4 * 896),
        ("fp16", "cuda", 2 * 896),
        ("bf16", "cuda", 2 * 896),
        ("int8", "cpu", 512 + 4 * 384),  # the quantised layer, and the others in fp32
        ("int8", "cuda", 512 + 2 * 384),
        ("fp8", "cuda", 512 + 2 * 384),
    ],
)
def test_work_of_a_graph(precision: str, device: str, weight_bytes: int, tmp_path: Path) -> None:
    """Two products with weights, of which one may be quantised, a bias, and a product of two inputs."""
    from onnx import TensorProto, helper

    counts = {"layers.0.feed_forward1.linear1.weight": [16, 32], "other": [32, 8], "bias": [32], "convolution": [96]}
    nodes = [
        helper.make_node("MatMul", ["x", "layers.0.feed_forward1.linear1.weight"], ["y"]),
        helper.make_node("Add", ["y", "bias"], ["z"]),
        helper.make_node("Conv", ["z", "convolution"], ["c"]),
        helper.make_node("Gemm", ["z", "other"], ["w"]),
        helper.make_node("MatMul", ["w", "w"], ["v"]),
    ]
    tensors = [helper.make_tensor(name, TensorProto.FLOAT, dims, np.ones(dims)) for name, dims in counts.items()]
    model = helper.make_model(helper.make_graph(nodes, "encoder", [], [], tensors))
    onnx.save(model, tmp_path / "encoder.onnx")
    calls: list[str] = []

    def file(name: str) -> Path:
        calls.append(name)
        return tmp_path / "encoder.onnx"

    encoder = SimpleNamespace(layers=3, d_model=10)
    bundle: Any = SimpleNamespace(file=file, manifest=SimpleNamespace(encoder=encoder))
    work = roofline.encoder_work(bundle, ChunkConfig(560, 7, 70, 8960), precision, device)
    assert calls == ["encoder-560ms"]
    assert work.weight_bytes == weight_bytes
    # 7 frames by each of 16 * 32 + 32 * 8 weights; and in 3 layers 3 products of 7 queries, 77 keys and 10 channels.
    assert work.flops_per_row == 2 * 7 * (512 + 256) + 2 * 3 * 3 * 7 * 77 * 10
