"""The 8-bit linear operator compared with NumPy, for each instruction set of this processor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from nemostream.runtime.backends import int8

Floats = np.ndarray[Any, np.dtype[np.float32]]
Layer = Callable[..., Floats]
LIBRARY = int8.compiled()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="int8_linear.c is not compiled")


@pytest.fixture(params=["amx", "vnni", "portable"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    assert LIBRARY
    if not int8.select(LIBRARY, request.param):
        pytest.skip(f"this processor does not have {request.param}")
    yield request.param
    int8.select(LIBRARY, None)


def layer(
    weights: np.ndarray[Any, np.dtype[np.int8]],
    scales: Floats,
    *,
    bias: bool = False,
    residual: bool = False,
    silu: bool = False,
    threads: int = 1,
) -> Layer:
    """Return a function that runs the operator in ONNX Runtime."""
    constants = {"weights": int8.panels(weights), "scales": scales}
    names = ["x", "weights", "scales", "bias" if bias else "", "residual" if residual else ""]
    node = helper.make_node("Int8Linear", names, ["y"], domain=int8.DOMAIN, silu=int(silu))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names[3:] if name]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "layer", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(int8.DOMAIN, int8.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda **feeds: session.run(["y"], feeds)[0]


def reference(x: Floats, weights: np.ndarray[Any, np.dtype[np.int8]], scales: Floats) -> Floats:
    """Return the product in NumPy: integers are exact, the other operations have the order of the operator."""
    unit = np.maximum(np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127), np.float32(1e-9))
    values = np.rint(x / unit).astype(np.int64)
    return (values @ weights.astype(np.int64)).astype(np.float32) * scales * unit


def drawn(depth: int, columns: int, *shape: int, seed: int = 0) -> tuple[Floats, Any, Floats]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*shape, depth)).astype(np.float32) * rng.uniform(0.01, 30, (*shape, 1)).astype(np.float32)
    weights = rng.integers(-127, 128, (depth, columns), np.int8)
    return x, weights, rng.uniform(1e-4, 1e-2, columns).astype(np.float32)


SHAPES = [
    *((128, 64, rows) for rows in range(1, 20)),  # every number of rows up to more than a block
    *((64, 64, rows) for rows in (31, 32, 33, 48, 49)),
    (1, 1, 2),
    (3, 70, 5),
    (63, 63, 4),
    (65, 129, 7),
    (100, 200, 17),
    (512, 176, 3),
    (4096, 1024, 3),
    (1024, 2048, 9),
]


@pytest.mark.parametrize(("depth", "columns", "rows"), SHAPES)
def test_products_equal_numpy(instructions: str, depth: int, columns: int, rows: int) -> None:
    """Bit for bit, for sizes that fill panels, blocks and vectors, and for others."""
    x, weights, scales = drawn(depth, columns, rows, seed=rows)
    np.testing.assert_array_equal(layer(weights, scales)(x=x), reference(x, weights, scales))


def test_the_largest_sums(instructions: str) -> None:
    """All products have the largest magnitude, with either sign."""
    depth = 8192
    for sign, row in itertools.product((-1, 1), (-2.0, 2.0)):
        weights = np.full((depth, 64), 127 * sign, np.int8)
        x = np.full((4, depth), row, np.float32)
        y = layer(weights, np.ones(64, np.float32))(x=x)
        np.testing.assert_allclose(y, np.full((4, 64), depth * 127 * sign * row), rtol=1e-6)


def test_bias_activation_and_residual(instructions: str) -> None:
    x, weights, scales = drawn(96, 80, 2, 3)
    bias = np.linspace(-3, 3, 80, dtype=np.float32)
    residual = np.random.default_rng(1).standard_normal((2, 3, 80)).astype(np.float32)
    product = reference(x, weights, scales)
    found = layer(weights, scales, bias=True)(x=x, bias=bias)
    np.testing.assert_array_equal(found, product + bias)
    found = layer(weights, scales, residual=True)(x=x, residual=residual)
    np.testing.assert_array_equal(found, product + residual)
    found = layer(weights, scales, bias=True, residual=True, silu=True)(x=x, bias=bias, residual=residual)
    exact = (product + bias).astype(np.float64)
    np.testing.assert_allclose(found, exact / (1 + np.exp(-exact)) + residual, rtol=2e-6, atol=1e-6)


def test_activation_of_all_magnitudes(instructions: str) -> None:
    """From the smallest to the largest inputs, SiLU has the error of a few units in the last place."""
    x = np.concatenate([sign * np.geomspace(1e-6, 1e4, 4000, dtype=np.float32) for sign in (-1, 1)])[:, None]
    y = layer(np.array([[127]], np.int8), np.array([1 / 127], np.float32), silu=True)(x=x)
    product = reference(x, np.array([[127]], np.int8), np.array([1 / 127], np.float32)).astype(np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(y, product / (1 + np.exp(-product)), rtol=1e-6, atol=1e-30)


def test_rows_do_not_depend_on_their_batch(instructions: str) -> None:
    x, weights, scales = drawn(256, 128, 40)
    run = layer(weights, scales, silu=True, threads=2)
    together = run(x=x)
    for first, last in ((0, 1), (7, 8), (39, 40), (3, 12), (10, 37)):
        np.testing.assert_array_equal(run(x=x[first:last]), together[first:last])


def test_silence(instructions: str) -> None:
    _, weights, scales = drawn(64, 64, 1)
    assert not layer(weights, scales)(x=np.zeros((3, 64), np.float32)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 5, 99])
def test_values_that_are_not_finite_stay_in_their_row(instructions: str, value: float, position: int) -> None:
    x, weights, scales = drawn(100, 64, 6)
    x[2, position] = value
    y = layer(weights, scales)(x=x)
    assert not np.isfinite(y[2]).any()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(y[others], reference(x[others], weights, scales))


def test_no_rows(instructions: str) -> None:
    _, weights, scales = drawn(64, 70, 1)
    assert layer(weights, scales)(x=np.zeros((0, 5, 64), np.float32)).shape == (0, 5, 70)


def test_threads_have_the_same_results(instructions: str) -> None:
    x, weights, scales = drawn(1024, 512, 24)
    one, four = (layer(weights, scales, silu=True, threads=threads)(x=x) for threads in (1, 4))
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize(
    ("weights", "scales", "depth"),
    [((64, 64), 64, 65), ((64, 64), 65, 64), ((64, 128), 64, 64)],
    ids=["too many inputs", "too many scales", "too few scales"],
)
def test_other_shapes_are_errors(weights: tuple[int, int], scales: int, depth: int) -> None:
    run = layer(np.zeros(weights, np.int8), np.ones(scales, np.float32))
    with pytest.raises(Exception, match="Int8Linear: the shapes of input, weights and scales differ"):
        run(x=np.zeros((1, depth), np.float32))


@pytest.mark.parametrize(
    ("name", "shape"), [("bias", (63,)), ("bias", (1,)), ("residual", (2, 63)), ("residual", (64,))]
)
def test_bias_and_residual_of_another_size_are_errors(name: str, shape: tuple[int, ...]) -> None:
    run = layer(np.zeros((64, 64), np.int8), np.ones(64, np.float32), **{name: True})
    with pytest.raises(Exception, match="Int8Linear: bias or residual has another size than the output"):
        run(x=np.zeros((2, 64), np.float32), **{name: np.zeros(shape, np.float32)})


def test_order_of_the_weights() -> None:
    """Column 64 p + n and row 4 q + j of W are at [p, q, n, j], as unsigned numbers."""
    weights = np.arange(-120, 120).reshape(80, 3).astype(np.int8)
    found = int8.panels(weights)
    assert found.shape == (1, 32, 64, 4) and found.dtype == np.uint8
    for row, column in ((0, 0), (5, 2), (79, 1)):
        assert found[0, row // 4, column, row % 4] == int(weights[row, column]) + 128
    assert (found[:, 20:] == 128).all() and (found[:, :, 3:] == 128).all()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines have no suffix, and unknown instruction sets change nothing."""
    assert LIBRARY and int8.select(LIBRARY, "avx9") == ""
    monkeypatch.setattr(int8, "library", lambda: None)
    assert int8.engine_suffix() == ""


def test_compiled_library_is_in_the_package() -> None:
    assert LIBRARY and LIBRARY.parent.resolve() == Path(int8.__file__).parent.resolve()
