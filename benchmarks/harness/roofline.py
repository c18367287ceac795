"""Roofline of an encoder step: a lower bound of its time from the work of the graph and the rates of the machine.

There are two bounds. The rates are measured in the same run, on a CPU with the same number of threads:

* memory: each step reads every weight of the encoder once (the weights do not fit into a near cache). The bound is
  their size divided by the highest rate at which one gigabyte is read (on a GPU: read and written by a copy).
* compute: the useful operations of the matrix products divided by the highest rate of a large matrix product in the
  same precision (on a GPU measured with PyTorch, or with ONNX Runtime if PyTorch has no CUDA; otherwise no bound).

The larger bound is the roofline. It is optimistic: it excludes caches, activations, convolutions and all other
operators, and a large product runs closer to the peak rate than the thin products of a step. If the last-level cache
holds a part of the weights, the memory bound is too high by that part.

`gpu.roofline` measures the rates of a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemostream.bundle import Bundle, ChunkConfig

_GIGABYTE = 1 << 30
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class Machine:
    """Highest measured rates of a machine."""

    bandwidth: float  # bytes per second
    flops: Mapping[str, float]  # floating-point or integer operations per second, by precision
    rates: Mapping[str, float]  # GB/s and GFLOP/s of each measurement, by name


@dataclass(frozen=True)
class Work:
    """Work of one encoder step of one chunk size."""

    weight_bytes: int
    flops_per_row: float  # operations for each stream of the batch

    def roofline_ms(self, machine: Machine, precision: str, rows: int) -> dict[str, Any]:
        """Return both bounds in milliseconds, the larger one as "roofline", and its name as "bound_by".

        The compute bound is 0 if the machine has no rate for `precision`.
        """
        memory = 1000 * self.weight_bytes / machine.bandwidth
        rate = machine.flops.get(precision)
        compute = 1000 * self.flops_per_row * rows / rate if rate else 0.0
        bound_by = "memory" if memory > compute else "compute"
        return {"memory": memory, "compute": compute, "roofline": max(memory, compute), "bound_by": bound_by}


def measure_machine(threads: int, array_bytes: int = _GIGABYTE, repeats: int = 5, size: int = 2048) -> Machine:
    """Measure the rates of the CPU with `threads` threads (NumPy uses all cores); each is the best of `repeats`."""
    rates = {f"read ({name})": rate / 1e9 for name, rate in _read_rates(threads, array_bytes, repeats).items()}
    bandwidth = 1e9 * max(rates.values())
    square = np.ones((size, size), np.float32)
    products = {
        "fp32 product (NumPy)": 2 * size**3 / best_seconds(lambda: square @ square, repeats) / 1e9,
        "fp32 product (ONNX Runtime)": product_rate("fp32", threads, size, repeats) / 1e9,
        "int8 product (ONNX Runtime)": product_rate("int8", threads, size, repeats) / 1e9,
    }
    flops = {
        precision: 1e9 * max(rate for name, rate in products.items() if name.startswith(precision))
        for precision in ("fp32", "int8")
    }
    return Machine(bandwidth, flops, rates | products)


def encoder_work(bundle: Bundle, chunk: ChunkConfig, precision: str = "fp32", device: str = "cpu") -> Work:
    """Return the size of the encoder's weights and the operations of its matrix products for one stream.

    Tensors that an 8-bit engine does not quantise are fp32 on a CPU and 16 bit on a GPU (`device` "cuda").
    """
    import onnx

    from nemostream.engine.precision import quantisable

    model = onnx.load(bundle.file(f"encoder-{chunk.ms}ms"), load_external_data=False)
    graph = model.graph
    other_bytes = 4 if precision == "fp32" or device == "cpu" else 2
    quantised = quantisable(model) if precision in ("int8", "fp8") else {}
    counts = {t.name: math.prod(t.dims) for t in graph.initializer}
    size = sum(count * (_BYTES[precision] if name in quantised else other_bytes) for name, count in counts.items())
    flops = 0.0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            # Each weight is multiplied by each of the T frames once.
            flops += sum(2.0 * counts[name] * chunk.frames for name in node.input if name in counts)
    spec = bundle.manifest.encoder
    # Attention: queries by keys, queries by positions, and weights by values. These products have no initializer.
    flops += 6.0 * spec.layers * spec.d_model * chunk.frames * (chunk.left + chunk.frames)
    return Work(size, flops)


def _read_rates(threads: int, array_bytes: int, repeats: int) -> dict[str, float]:
    """Return bytes per second read by `threads` threads from an array, by kind of reduction."""
    columns = 4096
    array = np.ones((max(array_bytes // 4 // columns, threads), columns), np.float32)
    vector, parts = np.ones(columns, np.float32), np.array_split(array, threads)
    with ThreadPoolExecutor(threads) as pool:
        reductions: dict[str, Callable[[], Any]] = {
            "sum": lambda: list(pool.map(np.sum, parts)),
            "maximum": lambda: list(pool.map(np.max, parts)),
            "matrix-vector product": lambda: array @ vector,
        }
        return {name: array.nbytes / best_seconds(work, repeats) for name, work in reductions.items()}


def product_rate(
    precision: str, threads: int, size: int, repeats: int, provider: str = "CPUExecutionProvider"
) -> float:
    """Return the operations per second of a [size, size] matrix product in ONNX Runtime, with inputs on the device."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    integer, types = precision == "int8", {"fp32": np.float32, "fp16": np.float16, "int8": np.uint8}
    a = helper.np_dtype_to_tensor_dtype(np.dtype(types[precision]))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger" if integer else "MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", a, [size, size])],
        [helper.make_tensor_value_info("c", TensorProto.INT32 if integer else a, [size, size])],
        [numpy_helper.from_array(np.ones((size, size), np.int8 if integer else types[precision]), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(onnx.ModelProto.SerializeToString(model), options, providers=[provider])
    device, binding = "cuda" if provider.startswith("CUDA") else "cpu", session.io_binding()
    factor = ort.OrtValue.ortvalue_from_numpy(np.ones((size, size), types[precision]), device, 0)
    binding.bind_ortvalue_input("a", factor)
    binding.bind_output("c", device)
    return 2 * size**3 / best_seconds(lambda: session.run_with_iobinding(binding), repeats)


def best_seconds(work: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the shortest time of `repeats` calls, in seconds, after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)
