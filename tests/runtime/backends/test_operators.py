"""The operators of the CPU compared with NumPy; the linear layers for each instruction set of this processor."""

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

from nemostream.runtime.backends import operators

Floats = np.ndarray[Any, np.dtype[np.float32]]
Layer = Callable[..., Floats]
LIBRARY = operators.compiled()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the operators are not compiled")
EPSILON = 1e-3
INTEGERS = ("position", "old", "new", "slots")


@pytest.fixture(params=["amx", "vnni", "portable"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    assert LIBRARY
    if not operators.select(LIBRARY, request.param):
        pytest.skip(f"this processor does not have {request.param}")
    yield request.param
    operators.select(LIBRARY, None)


def layer(
    weights: np.ndarray[Any, np.dtype[np.int8]],
    scales: Floats,
    *,
    bias: bool = False,
    residual: bool = False,
    silu: bool = False,
    norm: bool = False,
    threads: int = 1,
    offset: int = 0,
) -> Layer:
    """Return a function that runs the operator in ONNX Runtime."""
    names = ["x", "weights", "scales", "bias" if bias else "", "residual" if residual else ""]
    names += ["norm_weight", "norm_bias"] if norm else []
    before = np.arange(offset).astype(np.uint8)  # weights of another layer
    constants = {"weights": np.concatenate([before, operators.panels(weights).reshape(-1)]), "scales": scales}
    place = {"depth": len(weights), "offset": offset}
    run = operator("Int8Linear", names, ["y"], constants, threads, silu=int(silu), epsilon=EPSILON, **place)
    return lambda **feeds: run(**feeds)[0]


def operator(
    kind: str,
    inputs: list[str],
    outputs: list[str],
    constants: dict[str, Any] | None = None,
    threads: int = 1,
    **attributes: float,
) -> Callable[..., list[Any]]:
    """Return a function that runs one node in ONNX Runtime, and returns its outputs."""
    node = helper.make_node(kind, inputs, outputs, domain=operators.DOMAIN, **attributes)
    constants = constants or {}
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name in INTEGERS else TensorProto.FLOAT, None)
        for name in inputs
        if name and name not in constants
    ]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "node", values, results, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(operators.DOMAIN, operators.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(LIBRARY))
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda **feeds: session.run(outputs, feeds)


def reference(x: Floats, weights: np.ndarray[Any, np.dtype[np.int8]], scales: Floats) -> Floats:
    """Return the product in NumPy: integers are exact, the other operations have the order of the operator."""
    unit = np.maximum(np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127), np.float32(1e-9))
    values = np.rint(x * (1 / unit)).astype(np.int64)
    return (values @ weights.astype(np.int64)).astype(np.float32) * scales * unit


def drawn(depth: int, columns: int, *shape: int, seed: int = 0) -> tuple[Floats, Any, Floats]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*shape, depth)).astype(np.float32) * rng.uniform(0.01, 30, (*shape, 1)).astype(np.float32)
    weights = rng.integers(-127, 128, (depth, columns), np.int8)
    return x, weights, rng.uniform(1e-4, 1e-2, columns).astype(np.float32)


SHAPES = [
    *((128, 64, rows) for rows in range(1, 20)),  # every number of rows up to more than a block
    *((64, 64, rows) for rows in (31, 32, 33, 48, 49, 63, 64, 65)),
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


def test_weights_begin_at_their_offset(instructions: str) -> None:
    x, weights, scales = drawn(100, 70, 5)
    found = layer(weights, scales, offset=192)(x=x)
    np.testing.assert_array_equal(found, reference(x, weights, scales))


def test_weights_outside_the_array_are_errors() -> None:
    """The weights of a layer with one column more, and of one that begins outside."""
    constants = {"weights": np.zeros(64 * 64, np.uint8), "scales": np.ones(64, np.float32)}
    for offset, columns in ((0, 65), (1, 64), (-64, 64), (2**62, 64)):
        constants["scales"] = np.ones(columns, np.float32)
        run = operator("Int8Linear", ["x", *constants], ["y"], constants, silu=0, epsilon=0.0, depth=64, offset=offset)
        with pytest.raises(Exception, match="Int8Linear: the shapes of input, weights and scales differ"):
            run(x=np.zeros((1, 64), np.float32))


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
    [((64, 64), 64, 65), ((64, 64), 65, 64)],
    ids=["too many inputs", "too many scales"],
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


def test_norm_of_the_input(instructions: str) -> None:
    """The layer multiplies layer_norm(x), rounded to 8 bits; other roundings of the norm change few of these."""
    x, weights, scales = drawn(200, 96, 3, 4)
    gain, shift = np.linspace(0.5, 2, 200, dtype=np.float32), np.linspace(-1, 1, 200, dtype=np.float32)
    found = layer(weights, scales, norm=True)(x=x, norm_weight=gain, norm_bias=shift)
    exact = normalized(x.astype(np.float64), gain, shift)
    wanted = reference(exact.astype(np.float32), weights, scales)
    step = np.abs(exact).max(axis=-1, keepdims=True) / 127 * scales * 127  # of one input that is rounded differently
    assert (np.abs(found - wanted) <= 2 * step).all() and np.isclose(found, wanted, rtol=1e-5).mean() > 0.9


def test_norm_of_another_size_is_an_error() -> None:
    run = layer(np.zeros((64, 64), np.int8), np.ones(64, np.float32), norm=True)
    for gain, shift in ((63, 64), (64, 1)):
        with pytest.raises(Exception, match="Int8Linear: the norm has another size than the input"):
            run(
                x=np.zeros((2, 64), np.float32),
                norm_weight=np.ones(gain, np.float32),
                norm_bias=np.ones(shift, np.float32),
            )


def normalized(x: Any, gain: Any, shift: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON) * gain + shift


# -- attention ---------------------------------------------------------------------------------------------------------

ATTENTION = ["qkv", "k_ring", "v_ring", "positions", "u", "v", "position", "old", "new", "slots"]
SLOTS = 20  # more than rows


def attention(threads: int = 1) -> Callable[..., Any]:
    """Return a function that runs the operator on copies of the rings. It returns the output and the updated rings."""
    run = operator("RelativeAttention", ATTENTION, ["y"], threads=threads)

    def attend(**feeds: Any) -> tuple[Any, Any, Any]:
        feeds |= {name: feeds[name].copy() for name in ("k_ring", "v_ring")}
        (y,) = run(**feeds)
        return y, feeds["k_ring"], feeds["v_ring"]

    return attend


def attention_inputs(rows: int, frames: int, heads: int, size: int, ring: int, seed: int = 0) -> dict[str, Any]:
    """Return random inputs. Positions cover empty, partly filled and wrapped rings; some rows have few new frames."""
    rng = np.random.default_rng(seed)
    width = heads * size
    shapes = {
        "qkv": (rows, frames, 3 * width),
        "k_ring": (SLOTS, heads, ring, size),
        "v_ring": (SLOTS, heads, ring, size),
        "positions": (ring + 2 * frames - 1, width),
        "u": (heads, size),
        "v": (heads, size),
    }
    feeds: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    position = np.resize([0, 3, ring - 1, ring, 5 * ring + 2, ring + 1], rows).astype(np.int64)
    new = np.resize([frames, frames, frames, max(frames - 2, 0), frames, 1], rows).astype(np.int64)
    feeds |= {"position": position, "old": np.minimum(position, ring)[:, None], "new": new[:, None]}
    return {**feeds, "slots": rng.permutation(SLOTS)[:rows]}


def attention_reference(feeds: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the output in float64, with frames in the order of time and a distance for each pair, and the rings."""
    qkv, k_ring, v_ring = (feeds[name].astype(np.float64) for name in ("qkv", "k_ring", "v_ring"))
    _, heads, ring, size = k_ring.shape
    rows, frames, _ = qkv.shape
    q, k, v = (part.reshape(rows, frames, heads, size) for part in np.split(qkv, 3, axis=2))
    positions = feeds["positions"].astype(np.float64).reshape(-1, heads, size)
    y = np.zeros((rows, frames, heads, size))
    for row, slot in enumerate(feeds["slots"]):
        start, old, new = (int(feeds[name][row].item()) for name in ("position", "old", "new"))
        times = [*range(start - old, start), *range(start, start + new)]
        for head in range(heads if times else 0):
            keys = [k_ring[slot, head, time % ring] if time < start else k[row, time - start, head] for time in times]
            values = [v_ring[slot, head, time % ring] if time < start else v[row, time - start, head] for time in times]
            for t in range(frames):
                query = q[row, t, head]
                places = [positions[ring + frames - 1 - (start + t - time), head] for time in times]
                scores = np.array(keys) @ (query + feeds["u"][head]) + np.array(places) @ (query + feeds["v"][head])
                weights = np.exp(scores - scores.max())
                y[row, t, head] = weights / weights.sum() @ np.array(values)
        for t in range(frames):
            k_ring[slot, :, (start + t) % ring], v_ring[slot, :, (start + t) % ring] = k[row, t], v[row, t]
    return y.reshape(rows, frames, heads * size), k_ring, v_ring


@pytest.mark.parametrize(
    ("rows", "frames", "heads", "size", "ring"),
    [(6, 7, 2, 128, 70), (6, 1, 4, 128, 70), (6, 14, 1, 64, 9), (12, 2, 3, 20, 16), (6, 3, 2, 7, 5), (1, 1, 1, 1, 1)],
)
def test_attention_equals_numpy(rows: int, frames: int, heads: int, size: int, ring: int) -> None:
    feeds = attention_inputs(rows, frames, heads, size, ring)
    (y, *rings), (wanted, *wanted_rings) = attention()(**feeds), attention_reference(feeds)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=2e-5)
    for found, expected in zip(rings, wanted_rings, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_attention_without_visible_frames_is_zero() -> None:
    feeds = attention_inputs(2, 3, 2, 16, 8)
    feeds["old"][0] = feeds["new"][0] = 0
    y, *_ = attention()(**feeds)
    assert not y[0].any() and y[1].all()


def test_invisible_frames_are_not_read() -> None:
    """Their values may be anything, NaN included."""
    feeds = attention_inputs(6, 7, 2, 32, 10)
    clean = attention()(**feeds)[0]
    for row, slot in enumerate(feeds["slots"]):
        start, old, new = (int(feeds[name][row].item()) for name in ("position", "old", "new"))
        hidden = sorted(set(range(10)) - {time % 10 for time in range(start - old, start)})
        feeds["k_ring"][slot, :, hidden] = feeds["v_ring"][slot, :, hidden] = np.nan
        feeds["qkv"][row, new:, 64:] = np.nan
    np.testing.assert_array_equal(attention()(**feeds)[0], clean)


def test_attention_with_large_scores() -> None:
    """One frame has all the weight, and nothing overflows."""
    feeds = attention_inputs(4, 2, 1, 16, 8)
    feeds["qkv"] *= 100
    np.testing.assert_allclose(attention()(**feeds)[0], attention_reference(feeds)[0], rtol=1e-3, atol=1e-3)


def test_attention_does_not_depend_on_the_batch() -> None:
    feeds = attention_inputs(6, 7, 4, 128, 70)
    y, *rings = attention(threads=3)(**feeds)
    for row, slot in enumerate(feeds["slots"]):
        own = ("qkv", "position", "old", "new", "slots")
        alone = {name: array[row : row + 1] if name in own else array for name, array in feeds.items()}
        y_alone, *rings_alone = attention()(**alone)
        np.testing.assert_array_equal(y_alone[0], y[row])
        for ring_alone, ring in zip(rings_alone, rings, strict=True):
            np.testing.assert_array_equal(ring_alone[slot], ring[slot])


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_inputs_of_other_shapes_are_errors(name: str) -> None:
    feeds = attention_inputs(2, 3, 2, 16, 8)
    axis = 1 if name.endswith("ring") else 0
    feeds[name] = np.concatenate([feeds[name]] * 2, axis)
    what = "a row has no slot in the rings" if name == "slots" else "the shapes of the inputs differ"
    with pytest.raises(Exception, match=f"RelativeAttention: {what}"):
        attention()(**feeds)


def test_attention_in_slots_that_do_not_exist_is_an_error() -> None:
    for slot in (-1, SLOTS):
        feeds = attention_inputs(2, 3, 2, 16, 8)
        feeds["slots"][1] = slot
        with pytest.raises(Exception, match="RelativeAttention: a row has no slot in the rings"):
            attention()(**feeds)
    feeds = attention_inputs(2, 3, 2, 16, 8)
    feeds["position"][1] = -1
    with pytest.raises(Exception, match="RelativeAttention: a position is negative"):
        attention()(**feeds)


# -- convolution -------------------------------------------------------------------------------------------------------

CONVOLUTION = ["x", "valid", "cache", "taps", "slots", "bias", "norm_weight", "norm_bias"]


def convolution(*, bias: bool = True, norm: bool = True, threads: int = 1) -> Callable[..., Any]:
    """Return a function that runs the operator on a copy of the caches. It returns the output and the new caches."""
    names = [*CONVOLUTION[:5], "bias" if bias else "", *(CONVOLUTION[6:] if norm else ("", ""))]
    run = operator("CausalConvolution", names, ["y"], threads=threads, epsilon=EPSILON)

    def convolve(**feeds: Any) -> tuple[Any, Any]:
        feeds["cache"] = feeds["cache"].copy()
        (y,) = run(**feeds)
        return y, feeds["cache"]

    return convolve


def convolution_inputs(
    rows: int, frames: int, width: int, taps: int, *, bias: bool = True, norm: bool = True
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "x": (rows, frames, 2 * width),
        "cache": (SLOTS, width, taps - 1),
        "taps": (taps, width),
        **({"bias": (width,)} if bias else {}),
        **({"norm_weight": (width,), "norm_bias": (width,)} if norm else {}),
    }
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    valid = np.arange(frames) < np.resize([frames, 1, max(frames - 1, 0)], rows)[:, None]
    return {**feeds, "valid": valid[:, None].astype(np.float32), "slots": rng.permutation(SLOTS)[:rows]}


def convolution_reference(feeds: dict[str, Any]) -> tuple[Any, Any]:
    x, slots, caches = feeds["x"].astype(np.float64), feeds["slots"], feeds["cache"].astype(np.float64)
    rows, frames, width = x.shape[0], x.shape[1], x.shape[2] // 2
    gated = x[..., :width] / (1 + np.exp(-x[..., width:])) * feeds["valid"].transpose(0, 2, 1)
    together = np.concatenate([caches[slots].transpose(0, 2, 1), gated], axis=1)
    y = np.zeros((rows, frames, width)) + feeds.get("bias", 0)
    for t in range(frames):
        y[:, t] += (together[:, t : t + len(feeds["taps"])] * feeds["taps"]).sum(axis=1)
    if "norm_weight" in feeds:
        y = normalized(y, feeds["norm_weight"], feeds["norm_bias"])
    caches[slots] = together[:, frames:].transpose(0, 2, 1)
    return y / (1 + np.exp(-y)), caches


@pytest.mark.parametrize(
    ("rows", "frames", "width", "taps"), [(3, 7, 1024, 9), (3, 1, 176, 9), (4, 14, 64, 31), (1, 2, 5, 2), (5, 1, 3, 9)]
)
@pytest.mark.parametrize(("bias", "norm"), [(False, True), (True, False), (True, True), (False, False)])
def test_convolution_equals_numpy(rows: int, frames: int, width: int, taps: int, bias: bool, norm: bool) -> None:
    feeds = convolution_inputs(rows, frames, width, taps, bias=bias, norm=norm)
    found = convolution(bias=bias, norm=norm)(**feeds)
    for array, wanted in zip(found, convolution_reference(feeds), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=2e-5)


def test_convolutions_of_chunks_equal_one_convolution() -> None:
    """The cache continues a chunk exactly, for chunks that are shorter and longer than the cache."""
    feeds = convolution_inputs(2, 20, 48, 9)
    feeds["valid"][:] = 1
    whole, last = convolution()(**feeds)
    cache, parts = feeds["cache"], []
    for start, end in ((0, 1), (1, 3), (3, 14), (14, 20)):
        chunk = {**feeds, "x": feeds["x"][:, start:end], "valid": feeds["valid"][..., start:end], "cache": cache}
        y, cache = convolution()(**chunk)
        parts.append(y)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(cache, last)


def test_convolution_does_not_depend_on_the_batch() -> None:
    feeds = convolution_inputs(5, 7, 256, 9)
    y, caches = convolution(threads=3)(**feeds)
    for row, slot in enumerate(feeds["slots"]):
        own = ("x", "valid", "slots")
        alone = {name: array[row : row + 1] if name in own else array for name, array in feeds.items()}
        y_alone, caches_alone = convolution()(**alone)
        np.testing.assert_array_equal(y_alone[0], y[row])
        np.testing.assert_array_equal(caches_alone[slot], caches[slot])


@pytest.mark.parametrize("name", CONVOLUTION)
def test_convolution_inputs_of_other_shapes_are_errors(name: str) -> None:
    feeds = convolution_inputs(2, 3, 16, 5)
    feeds[name] = np.concatenate([feeds[name]] * 2, 1 if name == "cache" else 0)
    what = "a row has no slot in the caches" if name == "slots" else "the shapes of the inputs differ"
    with pytest.raises(Exception, match=f"CausalConvolution: {what}"):
        convolution()(**feeds)


def test_convolution_in_slots_that_do_not_exist_is_an_error() -> None:
    for slot in (-1, SLOTS):
        feeds = convolution_inputs(2, 3, 16, 5)
        feeds["slots"][1] = slot
        with pytest.raises(Exception, match="CausalConvolution: a row has no slot in the caches"):
            convolution()(**feeds)


# -- library -----------------------------------------------------------------------------------------------------------


def test_order_of_the_weights() -> None:
    """Column 32 p + 16 h + n and row 64 t + 4 q + j of W are at [p, t, h, q, n, j], as unsigned numbers."""
    weights = np.arange(-2000, 2000).reshape(80, 50).astype(np.int8)
    found = operators.panels(weights)
    assert found.shape == (2, 2, 2, 16, 16, 4) and found.dtype == np.uint8
    for row, column in ((0, 0), (5, 2), (79, 1), (63, 31), (64, 32), (18, 49)):
        place = column // 32, row // 64, column % 32 // 16, row % 64 // 4, column % 16, row % 4
        assert found[place] == int(weights[row, column]) + 128
    padding = np.ones(found.shape, bool)  # of rows from 80 on, and of columns from 50 on
    padding[0, 0] = padding[0, 1, :, :4] = padding[1, 0, 0] = padding[1, 1, 0, :4] = False
    padding[1, 0, 1, :, :2] = padding[1, 1, 1, :4, :2] = False
    assert (found[padding] == 128).all()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines have no suffix, and unknown instruction sets change nothing."""
    assert LIBRARY and operators.select(LIBRARY, "avx9") == ""
    monkeypatch.setattr(operators, "library", lambda: None)
    assert operators.engine_suffix() == ""


def test_compiled_library_is_in_the_package() -> None:
    assert LIBRARY and LIBRARY.parent.resolve() == Path(operators.__file__).parent.resolve()
