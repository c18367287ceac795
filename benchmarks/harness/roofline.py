"""The least time one encoder step can take on this machine, from what the graph must do and what the machine can do.

Two bounds, both measured in the same run, on a CPU with the same number of threads:

* memory: every weight of the encoder must be read once per step (a step's weights do not fit into a near cache); their
  bytes over the fastest rate at which a gigabyte was read (on a GPU, read and written by a copy);
* compute: its matrix products, useful ones only, over the fastest rate of a large matrix product of that precision
  (on a GPU by PyTorch, and by ONNX Runtime where PyTorch has no CUDA; without either there is no such bound).

The larger one binds. Both are optimistic: caches, activations, convolutions and everything between the products are
left out, a large product runs nearer to peak than the step's thin ones do, and of a machine whose last-level cache
holds a part of the weights the memory floor is too high by that part.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.runtime.backends.base import Backend
from nemostream.runtime.backends.gpu.backend import GpuBackend

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


def measure_for(backend: Backend, threads: int) -> Machine:
    """The machine that a backend runs on."""
    return measure_gpu(backend.device) if isinstance(backend, GpuBackend) else measure_machine(threads)


def measure_gpu(device: Any = None) -> Machine:
    """A GPU's rates; `device` is a `CudaDevice`, by default the GPU here. Raises `BackendError` without."""
    from nemostream.benchmarks.gpu.speed import copy_rate
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    own = None if device else CudaDevice()
    try:
        bandwidth = copy_rate(device or own)
    finally:
        if own:
            own.close()
    products = gpu_products()
    flops = {
        precision: 1e9 * max(rate for name, rate in products.items() if name.startswith(precision))
        for precision in {name.partition(" ")[0] for name in products}
    }
    return Machine(bandwidth, flops, {"copy": bandwidth / 1e9, **products})


def gpu_products(where: str = "cuda", size: int = 8192, repeats: int = 20) -> dict[str, float]:
    """GFLOP/s of a large product by name, each beginning with a precision; what cannot be done here is left out."""
    torch = _torch_with(where)
    if torch is None:
        return _products_without_torch(size, repeats)

    def to_16bit(kind: Any) -> Any:
        # fp8's second factor must be stored by column, int8's may be.
        values = torch.randn(size, size, device=where).clamp(-1, 1)
        return (100 * values if kind == torch.int8 else values).to(kind)

    def times(kind: Any) -> Callable[[], Any]:
        a, b = to_16bit(kind), to_16bit(kind)
        return lambda: a @ b

    def eight(kind: Any) -> Callable[[], Any]:
        a, b = to_16bit(kind), to_16bit(kind).t()
        if kind == torch.int8:
            return lambda: torch._int_mm(a, b)
        one = torch.ones((), device=where)
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    ways: dict[str, tuple[str, Callable[[Any], Callable[[], Any]], Any]] = {
        "fp32 product": ("highest", times, torch.float32),
        "fp32 product, TF32": ("high", times, torch.float32),
        "fp16 product": ("high", times, torch.float16),
        "bf16 product": ("high", times, torch.bfloat16),
        "int8 product": ("high", eight, torch.int8),
        "fp8 product": ("high", eight, torch.float8_e4m3fn),
    }
    before, found = torch.get_float32_matmul_precision(), {}
    try:
        for name, (precision, make, kind) in ways.items():
            torch.set_float32_matmul_precision(precision)
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a card or a build that cannot
                found[name] = 2 * size**3 / _best_of_torch(torch, make(kind), repeats, where) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def _torch_with(where: str) -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if where == "cpu" or torch.cuda.is_available() else None


def _best_of_torch(torch: Any, work: Callable[[], Any], repeats: int, where: str) -> float:
    """Seconds, on a GPU between two events."""
    if where == "cpu":
        return _best(work, repeats)
    work()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return min(found)


def _products_without_torch(size: int, repeats: int) -> dict[str, float]:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return {}
    return {
        f"{precision} product, ONNX Runtime": _product(precision, 0, size, repeats, "CUDAExecutionProvider") / 1e9
        for precision in ("fp32", "fp16")
    }


def encoder_work(bundle: Bundle, chunk: ChunkConfig, precision: str = "fp32", device: str = "cpu") -> Work:
    """Bytes of the encoder graph's weights, and the products it makes with them and with K and V, for one row.

    What 8 bit leaves out is fp32 on a CPU and 16 bit on a GPU ("cuda").
    """
    import onnx

    from nemostream.engine.precision import quantisable

    model = onnx.load(bundle.file(f"encoder-{chunk.ms}ms"), load_external_data=False)
    graph, eight = model.graph, precision in ("int8", "fp8")
    rest = 4 if precision == "fp32" or device == "cpu" else 2
    to_16bit = quantisable(model) if eight else {}
    counts = {t.name: math.prod(t.dims) for t in graph.initializer}
    size = sum(count * (_BYTES[precision] if name in to_16bit else rest) for name, count in counts.items())
    flops = 0.0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            # A weight is met by each of the T frames once.
            flops += sum(2.0 * counts[name] * chunk.frames for name in node.input if name in counts)
    spec = bundle.manifest.encoder
    # Queries by keys, by positions, and the values: no initializer is in these products as it is.
    flops += 6.0 * spec.layers * spec.d_model * chunk.frames * (chunk.left + chunk.frames)
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


def _product(precision: str, threads: int, size: int, repeats: int, provider: str = "CPUExecutionProvider") -> float:
    """Operations per second of one large product in ONNX Runtime, its factors where the provider wants them."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    whole, types = precision == "int8", {"fp32": np.float32, "fp16": np.float16, "int8": np.uint8}
    a = helper.np_dtype_to_tensor_dtype(np.dtype(types[precision]))
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger" if whole else "MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", a, [size, size])],
        [helper.make_tensor_value_info("c", TensorProto.INT32 if whole else a, [size, size])],
        [numpy_helper.from_array(np.ones((size, size), np.int8 if whole else types[precision]), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(onnx.ModelProto.SerializeToString(model), options, providers=[provider])
    device, binding = "cuda" if provider.startswith("CUDA") else "cpu", session.io_binding()
    factor = ort.OrtValue.ortvalue_from_numpy(np.ones((size, size), types[precision]), device, 0)
    binding.bind_ortvalue_input("a", factor)
    binding.bind_output("c", device)
    return 2 * size**3 / _best(lambda: session.run_with_iobinding(binding), repeats)


def _best(work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
