"""Measured rates of a GPU for the roofline: bandwidth of a copy and rates of large matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from nemostream.benchmarks.gpu.speed import copy_rate
from nemostream.benchmarks.harness.roofline import Machine, best_seconds, measure_machine, product_rate
from nemostream.runtime.backends.base import Backend
from nemostream.runtime.backends.gpu.backend import GpuBackend


def measure_for(backend: Backend, threads: int) -> Machine:
    """Measure the machine that a backend runs on."""
    return measure_gpu(backend.device) if isinstance(backend, GpuBackend) else measure_machine(threads)


def measure_gpu(device: Any = None) -> Machine:
    """Measure the rates of a GPU; `device` is a `CudaDevice`, by default a new one.

    Raises `BackendError` if there is no GPU.
    """
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


def gpu_products(device: str = "cuda", size: int = 8192, repeats: int = 20) -> dict[str, float]:
    """Return GFLOP/s of supported [size, size] products by name; names start with the precision."""
    torch = _import_torch(device)
    if torch is None:
        return _products_without_torch(size, repeats)

    def random_matrix(dtype: Any) -> Any:
        values = torch.randn(size, size, device=device).clamp(-1, 1)
        return (100 * values if dtype == torch.int8 else values).to(dtype)

    def matmul(dtype: Any) -> Callable[[], Any]:
        a, b = random_matrix(dtype), random_matrix(dtype)
        return lambda: a @ b

    def matmul_8bit(dtype: Any) -> Callable[[], Any]:
        a, b = random_matrix(dtype), random_matrix(dtype).t()  # fp8 requires the second factor in column-major order
        if dtype == torch.int8:
            return lambda: torch._int_mm(a, b)
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    # By name: PyTorch's precision of fp32 products, the product, the type.
    products: dict[str, tuple[str, Callable[[Any], Callable[[], Any]], Any]] = {
        "fp32 product": ("highest", matmul, torch.float32),
        "fp32 product (TF32)": ("high", matmul, torch.float32),
        "fp16 product": ("high", matmul, torch.float16),
        "bf16 product": ("high", matmul, torch.bfloat16),
        "int8 product": ("high", matmul_8bit, torch.int8),
        "fp8 product": ("high", matmul_8bit, torch.float8_e4m3fn),
    }
    before, rates = torch.get_float32_matmul_precision(), {}
    try:
        for name, (precision, make, dtype) in products.items():
            torch.set_float32_matmul_precision(precision)
            with contextlib.suppress(RuntimeError, NotImplementedError):  # not supported by this GPU or build
                rates[name] = 2 * size**3 / _best_torch_seconds(torch, make(dtype), repeats, device) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    return rates


def _import_torch(device: str) -> Any:
    """Return PyTorch if it is installed and supports `device`, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if device == "cpu" or torch.cuda.is_available() else None


def _best_torch_seconds(torch: Any, work: Callable[[], Any], repeats: int, device: str) -> float:
    """Return the shortest time of `repeats` calls, in seconds; on a GPU measured between two events."""
    if device == "cpu":
        return best_seconds(work, repeats)
    work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return min(times)


def _products_without_torch(size: int, repeats: int) -> dict[str, float]:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return {}
    return {
        f"{precision} product (ONNX Runtime)": product_rate(precision, 0, size, repeats, "CUDAExecutionProvider") / 1e9
        for precision in ("fp32", "fp16")
    }
