"""Handling of CUDA errors, with a fake driver. The behaviour of a real driver is tested on a GPU only."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu import cuda
from nemostream.runtime.backends.gpu.device import OutOfMemory

OK, ERROR = SimpleNamespace(name="OK"), SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")


class Builder:
    def __init__(self, driver: Driver) -> None:
        self.driver, self.stream, self.closed = driver, SimpleNamespace(handle=7), 0

    def begin_building(self, mode: str) -> None:
        assert mode == "relaxed"
        self.driver.capture = "active"

    def end_building(self) -> Builder:
        if self.driver.capture == "invalidated":
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        return self

    def while_loop(self, condition: Any) -> Builder:
        self.body = Builder(self.driver)
        return self.body

    def create_condition(self, default_value: int) -> Any:
        return SimpleNamespace(handle=3)

    def close(self) -> None:
        self.closed += 1
        raise RuntimeError("cuda.core raises for a builder that is still building")


class Driver:
    """The functions of cuda.bindings.driver that are used; `fails` selects the calls that fail."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=OK)
    CUstreamCaptureStatus = SimpleNamespace(CU_STREAM_CAPTURE_STATUS_INVALIDATED="invalidated")

    def __init__(self, fails: Callable[..., bool] = lambda *call: False) -> None:
        self.fails, self.capture, self.called = fails, "none", []

    def cuStreamIsCapturing(self, stream: int) -> tuple[Any, str]:
        return OK, self.capture

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.called.append(name)
            return (ERROR, None) if self.fails(name, *arguments) else (OK, arguments)

        return call


def make_device(monkeypatch: pytest.MonkeyPatch, driver: Driver, version: str = "1.2.2") -> tuple[Any, list[Builder]]:
    builders: list[Builder] = []

    def builder() -> Builder:
        builders.append(Builder(driver))
        return builders[-1]

    class Device:
        compute_capability, name = SimpleNamespace(major=9, minor=0), "fake"

        def __init__(self, ordinal: int) -> None: ...

        def set_current(self) -> None: ...

        def create_stream(self) -> Any:
            return SimpleNamespace(handle=1, create_graph_builder=builder)

    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=Device, __version__=version))
    return cuda.CudaDevice(), builders


def test_old_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=re.escape(f"cuda-core 0.9.1 is too old: {install_command('gpu')}")):
        make_device(monkeypatch, Driver(), "0.9.1")


@pytest.mark.parametrize("invalidated", [False, True])
def test_failed_capture_is_aborted(invalidated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder is closed. One whose capture CUDA has invalidated must be neither closed nor garbage collected."""
    driver = Driver()
    device, builders = make_device(monkeypatch, driver)

    def work() -> None:
        if invalidated:
            driver.capture = "invalidated"
        raise BackendError("the step failed.")

    with pytest.raises(BackendError, match=r"the step failed."):
        device.capture(lambda: device.loop(device.condition(), work))
    (builder,) = builders
    assert builder.closed == (not invalidated)
    assert builder.body.closed == 1, "the body is closed first"
    assert ("cuStreamEndCapture" in driver.called) == invalidated
    reference = weakref.ref(builder)
    builders.clear()
    del builder
    gc.collect()
    assert (reference() is not None) == invalidated
    assert device.stream == 1, "work is queued on the device's stream again"


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is distinguished from other errors, because a smaller capacity is a remedy."""
    failing = {"cuMemAlloc": SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")}
    driver = Driver()
    monkeypatch.setattr(driver, "cuMemAlloc", lambda size: (failing["cuMemAlloc"], None), raising=False)
    device, _ = make_device(monkeypatch, driver)
    with pytest.raises(OutOfMemory, match=r"3\.0 MB cannot be allocated") as raised:
        device.allocate(3_000_000)
    assert raised.value.size == 3_000_000
    failing["cuMemAlloc"] = ERROR
    with pytest.raises(BackendError, match="cuMemAlloc returned CUDA_ERROR_INVALID_VALUE") as other:
        device.allocate(3_000_000)
    assert not isinstance(other.value, OutOfMemory)


@pytest.mark.parametrize("where", ["compile", "cuModuleLoadData", "cuModuleGetFunction"])
def test_first_loadable_kernel_variant_is_used(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two variants fail at different points; the third is used, and the failures are recorded."""
    tried: list[tuple[str, int]] = []

    def compile_kernels(macros: dict[str, int], architecture: str, kind: str) -> bytes:
        tried.append((kind, macros["CONDITIONAL"]))
        if where == "compile" and len(tried) < 3:
            raise BackendError("unresolved external symbol.")
        return b""

    monkeypatch.setattr(cuda, "compile_kernels", compile_kernels)
    device, _ = make_device(monkeypatch, Driver(lambda name, *_: name == where and len(tried) < 3))
    loaded = device.kernels({"CONDITIONAL": 1}, ("begin", "finish"))
    assert tried == [("cubin", 1), ("ptx", 1), ("cubin", 0)]
    assert (loaded.format, loaded.conditional, len(loaded.failures)) == ("cubin", False, 2)
    wanted = "unresolved external symbol." if where == "compile" else f"{where} returned CUDA_ERROR_INVALID_VALUE."
    assert all(wanted in failure for failure in loaded.failures) and "ptx with conditions" in loaded.failures[1]
    with pytest.raises(BackendError, match=r"no variant of the kernels can be loaded: cubin with conditions: .* ptx: "):
        make_device(monkeypatch, Driver(lambda name, *_: name == "cuModuleLoadData"))[0].kernels({"CONDITIONAL": 1}, ())
