"""Rates of a GPU, from events at known times."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.benchmarks.gpu import roofline
from nemostream.benchmarks.harness.roofline import Machine


class Cuda:
    """Events of a device that finishes its queue at `end` ms; a recorded event has this time after `synchronize`."""

    def __init__(self) -> None:
        self.end = 100.0
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.time: float | None = None
                self.waited = False

            def record(self) -> None:
                self.time = cuda.end

            def synchronize(self) -> None:
                self.waited = True

            def elapsed_time(self, end: Event) -> float:
                assert self.time is not None and end.time is not None and end.waited
                return end.time - self.time

        self.Event = Event


def test_time_between_events() -> None:
    """The shortest of the timed calls, in seconds; the first call is the warm-up."""
    cuda = Cuda()
    times = iter([0.5, 8.0, 2.0, 4.0])

    def work() -> None:
        cuda.end += next(times)

    found = roofline._best_torch_seconds(SimpleNamespace(cuda=cuda), work, 3, "cuda")
    assert found == pytest.approx(2e-3) and next(times, None) is None


def test_rate_of_each_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of [64, 64] matrices that take 1, 2, 3, ... ms, each with its type and precision of fp32 products."""
    torch = pytest.importorskip("torch")
    made: list[tuple[Any, str]] = []

    def best_torch_seconds(torch: Any, work: Callable[[], Any], repeats: int, device: str) -> float:
        assert (repeats, device) == (5, "cpu")
        result = work()
        assert result.shape == (64, 64)
        made.append((result.dtype, torch.get_float32_matmul_precision()))
        return 1e-3 * len(made)

    monkeypatch.setattr(roofline, "_best_torch_seconds", best_torch_seconds)
    before = torch.get_float32_matmul_precision()
    rates = roofline.gpu_products("cpu", 64, 5)
    operations = 2 * 64**3
    names = ["fp32 product", "fp32 product (TF32)", "fp16 product", "bf16 product", "int8 product"]
    assert [*rates][:5] == names  # fp8 depends on the version of PyTorch
    assert list(rates.values()) == pytest.approx([operations / (1e6 * n) for n in range(1, 1 + len(rates))])  # GFLOP/s
    assert made[:5] == [
        (torch.float32, "highest"),
        (torch.float32, "high"),
        (torch.float16, "high"),
        (torch.bfloat16, "high"),
        (torch.int32, "high"),
    ]
    assert torch.get_float32_matmul_precision() == before


def test_rates_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    calls: list[tuple[Any, ...]] = []

    def product_rate(*arguments: Any) -> float:
        calls.append(arguments)
        return {"fp32": 5e9, "fp16": 9e9}[arguments[0]]

    monkeypatch.setattr(roofline, "_import_torch", lambda device: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(roofline, "product_rate", product_rate)
    found = roofline.gpu_products(size=64, repeats=5)
    assert found == {"fp32 product (ONNX Runtime)": 5.0, "fp16 product (ONNX Runtime)": 9.0}
    assert calls == [(precision, 0, 64, 5, "CUDAExecutionProvider") for precision in ("fp32", "fp16")]


def test_torch_is_used_for_devices_that_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert roofline._import_torch("cpu") is torch and roofline._import_torch("cuda") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert roofline._import_torch("cuda") is torch


def test_device_of_a_measurement_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device, a new one is opened and closed; a given one stays open."""
    from nemostream.runtime.backends.gpu import cuda

    closed: list[object] = []

    class Device:
        def close(self) -> None:
            closed.append(self)

    used: list[Any] = []

    def copy_rate(device: Any) -> float:
        used.append(device)
        return 3e12

    monkeypatch.setattr(cuda, "CudaDevice", Device)
    monkeypatch.setattr(roofline, "copy_rate", copy_rate)
    monkeypatch.setattr(roofline, "gpu_products", lambda: {"fp16 product": 7.0})
    wanted = Machine(3e12, {"fp16": 7e9}, {"copy": 3000.0, "fp16 product": 7.0})
    assert roofline.measure_gpu() == wanted and closed == used
    given = Device()
    assert roofline.measure_gpu(given) == wanted
    assert used[1] is given and len(closed) == 1


def test_machine_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemostream.runtime.backends.gpu.backend import GpuBackend

    backend = GpuBackend.__new__(GpuBackend)
    backend.device = "device"  # type: ignore[assignment]
    monkeypatch.setattr(roofline, "measure_gpu", lambda device: ("gpu", device))
    monkeypatch.setattr(roofline, "measure_machine", lambda threads: ("cpu", threads))
    assert roofline.measure_for(backend, 3) == ("gpu", "device")
    assert roofline.measure_for(object(), 3) == ("cpu", 3)  # type: ignore[arg-type]
