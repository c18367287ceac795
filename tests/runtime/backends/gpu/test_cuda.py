"""What becomes of calls that CUDA refuses. The driver here is made up: what a real one does, only a GPU can show."""

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

OK, WRONG = SimpleNamespace(name="OK"), SimpleNamespace(name="CUDA_ERROR_WRONG")


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
        raise RuntimeError("as cuda.core does of a builder that is not done")


class Driver:
    """As much of cuda.bindings.driver as is called; `refuses` has what fails."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=OK)
    CUstreamCaptureStatus = SimpleNamespace(CU_STREAM_CAPTURE_STATUS_INVALIDATED="invalidated")

    def __init__(self, refuses: Callable[..., bool] = lambda *call: False) -> None:
        self.refuses, self.capture, self.called = refuses, "none", []

    def cuStreamIsCapturing(self, stream: int) -> tuple[Any, str]:
        return OK, self.capture

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.called.append(name)
            return (WRONG, None) if self.refuses(name, *arguments) else (OK, arguments)

        return call


def a_device(monkeypatch: pytest.MonkeyPatch, driver: Driver, version: str = "1.2.2") -> tuple[Any, list[Builder]]:
    builders: list[Builder] = []

    def builder() -> Builder:
        builders.append(Builder(driver))
        return builders[-1]

    class Device:
        compute_capability, name = SimpleNamespace(major=9, minor=0), "made up"

        def __init__(self, ordinal: int) -> None: ...

        def set_current(self) -> None: ...

        def create_stream(self) -> Any:
            return SimpleNamespace(handle=1, create_graph_builder=builder)

    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=Device, __version__=version))
    return cuda.CudaDevice(), builders


def test_a_library_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=re.escape(f"cuda-core 0.9.1 is too old: {install_command('gpu')}")):
        a_device(monkeypatch, Driver(), "0.9.1")


@pytest.mark.parametrize("invalidated", [False, True])
def test_a_recording_that_fails_is_given_up(invalidated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder is closed; but one whose recording CUDA has thrown away must never be, nor be collected."""
    driver = Driver()
    device, builders = a_device(monkeypatch, driver)

    def work() -> None:
        if invalidated:
            driver.capture = "invalidated"
        raise BackendError("the step is wrong.")

    with pytest.raises(BackendError, match=r"the step is wrong."):
        device.capture(lambda: device.loop(device.condition(), work))
    (builder,) = builders
    assert builder.closed == (not invalidated)
    assert builder.body.closed == 1, "the body first"
    assert ("cuStreamEndCapture" in driver.called) == invalidated
    left = weakref.ref(builder)
    builders.clear()
    del builder
    gc.collect()
    assert (left() is not None) == invalidated
    assert device.stream == 1, "work is queued on the device's own stream again"


@pytest.mark.parametrize("where", ["compile", "cuModuleLoadData", "cuModuleGetFunction"])
def test_kernels_are_loaded_in_the_best_way_that_works(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two ways fail, at one point or another; the third is taken, and why is told."""
    tried: list[tuple[str, int]] = []

    def compile_kernels(macros: dict[str, int], architecture: str, kind: str) -> bytes:
        tried.append((kind, macros["CONDITIONAL"]))
        if where == "compile" and len(tried) < 3:
            raise BackendError("an extern is unresolved.")
        return b""

    monkeypatch.setattr(cuda, "compile_kernels", compile_kernels)
    device, _ = a_device(monkeypatch, Driver(lambda name, *_: name == where and len(tried) < 3))
    loaded = device.kernels({"CONDITIONAL": 1}, ("begin", "finish"))
    assert tried == [("cubin", 1), ("ptx", 1), ("cubin", 0)]
    assert (loaded.format, loaded.conditional, len(loaded.failures)) == ("cubin", False, 2)
    wanted = "an extern is unresolved." if where == "compile" else f"{where} returned CUDA_ERROR_WRONG."
    assert all(wanted in failure for failure in loaded.failures) and "ptx with conditions" in loaded.failures[1]
    with pytest.raises(BackendError, match=r"no variant of the kernels can be loaded: cubin with conditions: .* ptx: "):
        a_device(monkeypatch, Driver(lambda name, *_: name == "cuModuleLoadData"))[0].kernels({"CONDITIONAL": 1}, ())
