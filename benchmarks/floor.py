"""The least time one encoder step can take on this machine, from what the graph must do and what the machine can do.

Two bounds, both measured in the same run with the same number of threads:

* memory: every weight of the encoder must be read once per step (a step's weights do not fit into a near cache); their
  bytes over the fastest rate at which a gigabyte was read;
* compute: its matrix products, useful ones only, over the fastest rate of a large matrix product of that precision.

The larger one binds. Both are optimistic: caches, activations, convolutions and everything between the products are
left out, a large product runs nearer to peak than the step's thin ones do, and of a machine whose last-level cache
holds a part of the weights the memory floor is too high by that part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemostream.spec import Bundle, Chunk

_GIGABYTE = 1 << 30
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class Machine:
    """What the machine reached: bytes read and, by precision, floating point (or integer) operations per second."""

    bandwidth: float
    flops: Mapping[str, float]
    rates: Mapping[str, float]  # GB/s and GFLOP/s of each way that was tried


@dataclass(frozen=True)
class Work:
    """What one encoder step of one chunk size must do."""

    weight_bytes: int
    flops_per_row: float

    def floor_ms(self, machine: Machine, precision: str, rows: int) -> dict[str, Any]:
        """Milliseconds each bound allows, the larger one, and its name. Without a rate there is no compute bound."""
        memory = 1000 * self.weight_bytes / machine.bandwidth
        rate = machine.flops.get(precision)
        compute = 1000 * self.flops_per_row * rows / rate if rate else 0.0
        binding = "memory" if memory > compute else "compute"
        return {"memory": memory, "compute": compute, "floor": max(memory, compute), "binding": binding}


def measure_machine(threads: int, array_bytes: int = _GIGABYTE, repeats: int = 5, size: int = 2048) -> Machine:
    """A CPU's rates with so many threads (NumPy's products take every core). The best of `repeats` counts."""
    rates = {f"read, {name}": rate / 1e9 for name, rate in _reading(threads, array_bytes, repeats).items()}
    bandwidth = 1e9 * max(rates.values())
    square = np.ones((size, size), np.float32)
    products = {
        "fp32 product, NumPy": 2 * size**3 / _best(lambda: square @ square, repeats) / 1e9,
        "fp32 product, ONNX Runtime": _product("fp32", threads, size, repeats) / 1e9,
        "int8 product, ONNX Runtime": _product("int8", threads, size, repeats) / 1e9,
    }
    flops = {
        precision: 1e9 * max(rate for name, rate in products.items() if name.startswith(precision))
        for precision in ("fp32", "int8")
    }
    return Machine(bandwidth, flops, rates | products)


def encoder_work(bundle: Bundle, chunk: Chunk, precision: str = "fp32", device: str = "cpu") -> Work:
    """Bytes of the encoder graph's weights, and the products it makes with them and with K and V, for one row.

    What 8 bit leaves out is fp32 on a CPU and 16 bit on a GPU ("cuda").
    """
    import onnx

    from nemostream.engine.precision import quantisable

    model = onnx.load(bundle.file(f"encoder-{chunk.ms}ms"), load_external_data=False)
    graph, eight = model.graph, precision in ("int8", "fp8")
    rest = 4 if precision == "fp32" or device == "cpu" else 2
    narrow = quantisable(model) if eight else {}
    counts = {t.name: math.prod(t.dims) for t in graph.initializer}
    size = sum(count * (_BYTES[precision] if name in narrow else rest) for name, count in counts.items())
    flops = 0.0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            # A weight is met by each of the T frames once; a batched one (the positions) is met head by head.
            flops += sum(2.0 * counts[name] * chunk.frames for name in node.input if name in counts)
    spec = bundle.manifest.encoder
    flops += 4.0 * spec.layers * spec.d_model * chunk.frames * (chunk.left + chunk.frames)  # q k and the values
    return Work(size, flops)


def _reading(threads: int, array_bytes: int, repeats: int) -> dict[str, float]:
    """Bytes per second that `threads` threads read, each its own part of one array."""
    columns = 4096
    array = np.ones((max(array_bytes // 4 // columns, threads), columns), np.float32)
    vector, parts = np.ones(columns, np.float32), np.array_split(array, threads)
    with ThreadPoolExecutor(threads) as pool:
        ways: dict[str, Callable[[], Any]] = {
            "sum": lambda: list(pool.map(np.sum, parts)),
            "largest": lambda: list(pool.map(np.max, parts)),
            "matrix by vector": lambda: array @ vector,
        }
        return {name: array.nbytes / _best(work, repeats) for name, work in ways.items()}


def _product(precision: str, threads: int, size: int, repeats: int) -> float:
    """Operations per second of one large product in ONNX Runtime."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    whole = precision == "int8"
    a, b, out = (TensorProto.UINT8, np.int8, TensorProto.INT32) if whole else (1, np.float32, TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger" if whole else "MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", a, [size, size])],
        [helper.make_tensor_value_info("c", out, [size, size])],
        [numpy_helper.from_array(np.ones((size, size), b), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(onnx.ModelProto.SerializeToString(model), options)
    feed = {"a": np.ones((size, size), np.uint8 if whole else np.float32)}
    return 2 * size**3 / _best(lambda: session.run(None, feed), repeats)


def _best(work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
