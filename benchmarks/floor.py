"""The least time one encoder step can take on this machine, from what the graph must do and what the machine can do.

Two bounds, both measured in the same run with the same number of threads:

* memory: every weight the encoder graph names must be read once per step (a step's weights do not fit into a cache);
  its bytes over the fastest rate at which a gigabyte was read or copied;
* compute: its matrix products, useful ones only, over the rate of a large fp32 matrix product.

The larger one binds. Both are optimistic: caches, activations, convolutions and everything between the products are
left out, a large product runs nearer to peak than the step's thin ones do, and of a machine whose last-level cache
holds a part of the weights the memory floor is too high by that part.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemostream.spec import Bundle, Chunk

_GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Machine:
    """What the machine reached: bytes and floating point operations per second."""

    bandwidth: float
    flops: float
    rates: dict[str, float]  # GB/s of each access pattern tried, GFLOP/s of the product


@dataclass(frozen=True)
class Work:
    """What one encoder step of one chunk size must do."""

    weight_bytes: int
    flops_per_row: float

    def floor_ms(self, machine: Machine, rows: int) -> dict[str, Any]:
        memory = 1000 * self.weight_bytes / machine.bandwidth
        compute = 1000 * self.flops_per_row * rows / machine.flops
        return {
            "memory": memory,
            "compute": compute,
            "floor": max(memory, compute),
            "binding": "memory" if memory > compute else "compute",
        }


def measure_machine(array_bytes: int = _GIGABYTE, repeats: int = 5, size: int = 2048) -> Machine:
    """Read and multiply with PyTorch's current number of threads. The best of `repeats` counts, as for any floor."""
    import torch

    with torch.inference_mode():
        columns = 4096
        array = torch.ones(max(array_bytes // 4 // columns, 1), columns)
        vector, other = torch.ones(columns), torch.empty_like(array)
        bytes_ = 4 * array.numel()
        tried: dict[str, tuple[int, Callable[[], Any]]] = {  # bytes moved, how
            "sum": (bytes_, array.sum),
            "matrix-vector": (bytes_, lambda: torch.mv(array, vector)),
            "copy": (2 * bytes_, lambda: other.copy_(array)),  # one read and one write
        }
        rates = {name: moved / _best(work, repeats) for name, (moved, work) in tried.items()}
        left, right = torch.ones(size, size), torch.ones(size, size)
        flops = 2 * size**3 / _best(lambda: torch.mm(left, right), repeats)
    shown = {name: rate / 1e9 for name, rate in rates.items()} | {"sgemm": flops / 1e9}
    return Machine(max(rates.values()), flops, shown)


def encoder_work(bundle: Bundle, chunk: Chunk) -> Work:
    """Bytes of the encoder graph's weights, and the products it makes with them and with K and V, for one row."""
    import onnx

    graph = onnx.load(bundle.file(f"encoder-{chunk.ms}ms"), load_external_data=False).graph
    weights = {
        t.name: (math.prod(t.dims), onnx.helper.tensor_dtype_to_np_dtype(t.data_type)) for t in graph.initializer
    }
    flops = 0.0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            # A weight is met by each of the T frames once; a batched one (the positions) is met head by head.
            flops += sum(2.0 * weights[name][0] * chunk.frames for name in node.input if name in weights)
    spec = bundle.manifest.encoder
    flops += 4.0 * spec.layers * spec.d_model * chunk.frames * (chunk.left + chunk.frames)  # q k and the values
    return Work(sum(count * dtype.itemsize for count, dtype in weights.values()), flops)


def hardware() -> dict[str, Any]:
    return {
        "cpu": _first_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cpu_id": " ".join(f"{key} {_first_of('/proc/cpuinfo', key)}" for key in ("cpu family", "model", "stepping")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(_meminfo("MemTotal") / _GIGABYTE, 1),
        "system": platform.platform(),
    }


def available_memory() -> int:
    """Bytes that can be had without swapping; 0 if the system does not say."""
    return _meminfo("MemAvailable")


class OtherWork:
    """How many cores somebody else kept busy since this object was made; 0 if the system does not say."""

    def __init__(self) -> None:
        self._start, self._ticks = time.perf_counter(), self._foreign()

    def cores(self) -> float:
        return max(0.0, (self._foreign() - self._ticks) / (time.perf_counter() - self._start))

    @staticmethod
    def _foreign() -> float:
        return _cpu_ticks() / os.sysconf("SC_CLK_TCK") - time.process_time()


def _cpu_ticks() -> int:
    """All work of all cores since start, stolen time included (user, nice, system, irq, softirq, steal)."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0
    return sum(int(field) for index, field in enumerate(fields) if index not in (3, 4))  # idle and waiting for a disk


def _best(work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _meminfo(field: str) -> int:
    value = _first_of("/proc/meminfo", field)
    return int(value.split()[0]) * 1024 if value else 0


def _first_of(path: str, field: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
