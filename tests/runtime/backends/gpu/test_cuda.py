"""Handling of CUDA errors, with a fake driver. The behaviour of a real driver is tested on a GPU only."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream.bundle import Bundle
from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.runtime.backends.gpu import cuda, kernels
from nemostream.runtime.backends.gpu.device import OutOfMemory

PTXAS = shutil.which("ptxas")

OK, ERROR = SimpleNamespace(name="OK"), SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")


class Builder:
    """A graph builder on a stream of its own. `driver.crashes` counts the calls that crash cuda.core or the driver."""

    def __init__(self, driver: Driver, parent: Builder | None = None) -> None:
        self.driver, self.parent, self.bodies = driver, parent, weakref.WeakSet()
        self.stream = SimpleNamespace(handle=100 + len(driver.builders))
        self.state, self.closed, self.ended = "none", False, False
        driver.builders.append(weakref.ref(self))

    def begin_building(self, mode: str) -> None:
        assert mode == "relaxed"
        self.state = "active"

    def end_building(self) -> Builder:
        if self.state == "invalidated":
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        assert self.state == "active" and not any(body.state == "active" for body in self.bodies)
        self.state, self.ended = "none", True
        if self.driver.unjoined:
            self.state, self.ended = "none", False
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_UNJOINED")
        return self

    def complete(self) -> Any:
        assert self.ended
        called = self.driver.called
        return SimpleNamespace(
            upload=lambda stream: called.append(("upload", stream.handle)),
            launch=lambda stream: called.append(("launch", stream.handle)),
        )

    def while_loop(self, condition: Any) -> Builder:
        assert self.state == "active" and condition.handle == 3
        body = Builder(self.driver, self)
        self.bodies.add(body)
        return body

    def create_condition(self, default_value: int) -> Any:
        assert default_value == 0, "a loop that no kernel starts does not run"
        return SimpleNamespace(handle=3)

    def end_capture(self) -> None:
        """`cuStreamEndCapture`."""
        assert self.state != "none" and not any(body.state == "active" for body in self.bodies)
        if self.state == "invalidated" and (self.parent or any(body.state == "invalidated" for body in self.bodies)):
            self.driver.crashes += 1
        self.state = "none"

    def close(self) -> None:
        if self.state == "invalidated" or (self.state == "none" and not self.ended):  # cuda.core destroys it again
            self.driver.crashes += 1
        if self.state != "none":
            self.end_capture()
        self.closed = self.ended = True

    def __del__(self) -> None:
        if not self.closed:
            self.close()


class Driver:
    """The functions of cuda.bindings.driver that are used; they return their arguments, or `results`.

    `fails` selects the calls that fail.
    """

    CUresult = SimpleNamespace(CUDA_SUCCESS=OK)
    CUevent_flags = SimpleNamespace(CU_EVENT_BLOCKING_SYNC=1, CU_EVENT_DISABLE_TIMING=2)
    CU_MEMHOSTALLOC_PORTABLE, CU_MEMHOSTALLOC_DEVICEMAP = 1, 2
    CUstreamCaptureStatus = SimpleNamespace(
        CU_STREAM_CAPTURE_STATUS_ACTIVE="active", CU_STREAM_CAPTURE_STATUS_INVALIDATED="invalidated"
    )

    def __init__(self, fails: Callable[..., bool] = lambda *call: False) -> None:
        self.fails, self.called = fails, []
        self.results: dict[str, Any] = {"cuDriverGetVersion": 13000, "cuEventElapsedTime": 1.5}
        self.builders: list[weakref.ref[Builder]] = []
        self.unjoined, self.crashes = False, 0

    def builder(self, stream: int) -> Builder:
        return next(found for reference in self.builders if (found := reference()) and found.stream.handle == stream)

    def cuStreamIsCapturing(self, stream: int) -> tuple[Any, str]:
        return OK, self.builder(stream).state

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, int]:
        self.builder(stream).end_capture()
        return OK, 0

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.called.append((name, *arguments))
            return (ERROR, None) if self.fails(name, *arguments) else (OK, self.results.get(name, arguments))

        return call

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.called)


class MemoryDriver(Driver):
    """A driver whose memory is that of this process, filled with 7. What is queued runs when the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[int, Any] = {}
        self.queued: list[Callable[[], Any]] = []
        self.launches: list[tuple[Any, ...]] = []

    def block(self, size: int) -> int:
        block = (ctypes.c_uint8 * size)(*[7] * size)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def check(self, address: int, size: int) -> None:
        assert any(begin <= address and address + size <= begin + len(block) for begin, block in self.blocks.items())

    def cuMemGetInfo(self) -> tuple[Any, int, int]:
        return OK, 5_000_000_000, 8_000_000_000

    def cuMemAlloc(self, size: int) -> tuple[Any, int]:
        return OK, self.block(size)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[Any, int]:
        assert flags == self.CU_MEMHOSTALLOC_PORTABLE | self.CU_MEMHOSTALLOC_DEVICEMAP, "kernels access it"
        return OK, self.block(size)

    def free(self, address: int) -> tuple[Any]:
        del self.blocks[address]
        return (OK,)

    cuMemFree = cuMemFreeHost = free

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:
        self.check(address, size)
        self.queued.append(lambda: ctypes.memset(address, value, size))
        return (OK,)

    def copy(self, target: int, source: int, size: int, stream: int, on_device: tuple[int, ...]) -> tuple[Any]:
        assert stream == 1
        for address in on_device:
            self.check(address, size)
        self.queued.append(lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any]:
        return self.copy(target, source, size, stream, (target,))

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any]:
        return self.copy(target, source, size, stream, (source,))

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any]:
        return self.copy(target, source, size, stream, (target, source))

    def cuStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert stream == 1
        while self.queued:
            self.queued.pop(0)()
        return (OK,)

    def cuLaunchKernel(self, function: Any, *arguments: int) -> tuple[Any]:
        """Copies the argument, as a driver does before it returns."""
        *sizes, stream, pointers, extra = arguments
        assert not extra
        argument = ctypes.string_at(ctypes.c_uint64.from_address(pointers).value, kernels.STEP.itemsize)
        self.launches.append((function, tuple(sizes), stream, argument))
        return (OK,)


def make_device(monkeypatch: pytest.MonkeyPatch, driver: Driver, version: str = "1.2.2") -> Any:
    class Device:
        compute_capability, name = SimpleNamespace(major=9, minor=0), "fake"

        def __init__(self, ordinal: int) -> None:
            driver.called.append(("device", ordinal))

        def set_current(self) -> None:
            driver.called.append(("set_current", threading.get_ident()))
            if driver.fails("set_current"):
                raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT: no context.")

        def create_stream(self) -> Any:
            return SimpleNamespace(handle=1, close=lambda: driver.called.append("close"))

        def create_graph_builder(self) -> Builder:
            return Builder(driver)

    cuda_core = SimpleNamespace(Device=Device, __version__=version)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    utils = SimpleNamespace(
        get_ptx_ver=lambda ptx: ptx.split()[1],
        get_minimal_required_cuda_ver_from_ptx_ver=lambda version: {"9.5": 13050, "9.0": 13000}[version],
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver, utils=utils))
    monkeypatch.setitem(sys.modules, "cuda.core", cuda_core)
    return cuda.CudaDevice()


def test_old_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.9.1", "1.1.9"):
        with pytest.raises(BackendError, match=re.escape(f"cuda-core {version} is too old: {install_command('gpu')}")):
            make_device(monkeypatch, Driver(), version)
    make_device(monkeypatch, Driver(), "1.2.0")
    make_device(monkeypatch, Driver(), "1.10.0")


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    make_device(monkeypatch, Driver())
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(BackendError, match=r"needs cuda-python \(.*\): " + re.escape(install_command("gpu"))):
        cuda.CudaDevice()


@pytest.mark.parametrize("failing", ["set_current", "cuDriverGetVersion"])
def test_device_that_cannot_be_used(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"no usable NVIDIA GPU \(.*CUDA_ERROR_INVALID.*; run `nemostream doctor`"):
        make_device(monkeypatch, Driver(lambda name, *_: name == failing))


def test_device_is_made_current_once_in_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    device = make_device(monkeypatch, driver)
    assert driver.called[:2] == [("device", 0), ("set_current", threading.get_ident())]
    failures: list[BackendError] = []

    def work() -> None:
        driver.fails = lambda name, *_: name == "set_current"
        try:
            device.make_current()
        except BackendError as error:
            failures.append(error)
        driver.fails = lambda *_: False
        device.make_current()  # again, because it failed
        device.make_current()

    driver.called.clear()
    device.make_current()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    device.make_current()
    assert driver.called == [("set_current", thread.ident)] * 2
    assert str(failures[0]) == "the GPU cannot be used: CUDA_ERROR_INVALID_CONTEXT: no context."


# -- memory and launches -----------------------------------------------------------------------------------------------


def test_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are complete when a call returns, and change no other memory."""
    driver = MemoryDriver()
    device = make_device(monkeypatch, driver)
    assert (device.name, device.architecture, device.free_bytes) == ("fake", "sm90", 5_000_000_000)
    first, second, empty = (device.allocate(size) for size in (24, 40, 0))
    assert len({first, second, empty}) == 3
    assert empty, "an address, although nothing is stored there"
    found = np.full(10, 9, np.int32)
    device.read(second, found)
    assert not found.any(), "memory is zeroed"

    array = np.arange(12, dtype=np.int32)
    device.write(first + 4, array[2:10:2])  # not contiguous
    array[:] = -1  # the caller may change it
    device.write(first, array[:0])
    device.read(first, found[:6])
    assert found.tolist() == [0, 2, 4, 6, 8, 0, 0, 0, 0, 0]

    device.copy(second + 8, first, 24)
    device.read(second, found)
    assert found.tolist() == [0, 0, 0, 2, 4, 6, 8, 0, 0, 0]
    device.free(first)
    assert first not in driver.blocks and second in driver.blocks
    device.close()
    assert not driver.blocks


def test_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = MemoryDriver()
    device = make_device(monkeypatch, driver)
    for size in (0, 5, 100):
        array = device.allocate_host(size)
        assert array.dtype == np.uint8 and len(array) >= size and not array.any()
        block = driver.blocks[array.ctypes.data]
        block[size // 2] = 3  # as a kernel does
        assert array[size // 2] == 3
        array[0] = 4
        assert block[0] == 4 and len(array) == len(block)
    device.close()
    assert not driver.blocks


def test_kernel_is_launched_with_its_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device's stream; during a capture on the captured stream."""
    driver = MemoryDriver()
    monkeypatch.setattr(cuda, "compile_kernels", lambda *_: b"")
    device = make_device(monkeypatch, driver)
    loaded = device.kernels({"CONDITIONAL": 0}, ("begin", "join"))
    step = np.zeros(1, kernels.STEP)[0]
    step["rows"], step["tokens"] = 7, 1 << 40
    expected = step.tobytes()
    loaded.launch("join", (5, 2, 3), step)
    step["rows"] = 8
    device.capture(lambda: loaded.launch("begin", (1, 1, 1), step))
    module = (b"",)  # the fake driver returns its arguments
    assert driver.launches == [
        ((module, b"join"), (5, 2, 3, kernels.BLOCK, 1, 1, 0), 1, expected),
        ((module, b"begin"), (1, 1, 1, kernels.BLOCK, 1, 1, 0), 100, step.tobytes()),
    ]


# -- captures ----------------------------------------------------------------------------------------------------------


def test_captured_graph_is_uploaded_and_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both on the device's stream: the first launch does not have to upload the graph."""
    driver, streams = Driver(), []
    device = make_device(monkeypatch, driver)
    driver.called.clear()
    graph = device.capture(lambda: streams.append(device.stream))
    assert streams == [100], "the work is captured once, on a stream of its own"
    graph.launch()
    graph.launch()
    assert driver.called == [("upload", 1), ("launch", 1), ("launch", 1)]


@pytest.mark.parametrize(
    ("where", "invalidates", "raises", "leaked"),
    [
        # The builders in the order of their creation: the step's, that of a plain capture of the body, the body's.
        ("before", False, True, []),
        ("before", True, True, [0]),
        ("plain", False, True, []),
        ("plain", True, True, [1]),
        ("plain", True, False, [1]),
        ("body", False, True, []),
        ("body", True, True, [0, 2]),
        ("body", True, False, [0, 2]),  # a library that ignores the error
        ("after", False, True, []),
        ("after", True, True, [0]),
        ("end", False, False, [0]),
    ],
)
def test_failed_captures_are_ended_or_leaked(
    where: str, invalidates: bool, raises: bool, leaked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captures are ended, except where cuda.core or the driver would crash: those builders stay alive forever."""
    driver = Driver()
    device = make_device(monkeypatch, driver)
    calls = []

    def fail(stream: int) -> None:
        if invalidates:
            builder = driver.builder(stream)
            builder.state = "invalidated"
            if builder.parent:
                builder.parent.state = "invalidated"
        if raises:
            raise BackendError("the kernel failed.")

    def body() -> None:
        calls.append(device.stream)
        if where == ("plain", "body")[len(calls) - 1]:
            fail(device.stream)

    def step() -> None:
        if where == "before":
            fail(device.stream)
        device.loop(device.condition(), body)
        if where == "after":
            fail(device.stream)
        driver.unjoined = where == "end"

    message = "the kernel failed." if raises else "the step cannot be captured as a CUDA graph: CUDA_ERROR_STREAM"
    with pytest.raises(BackendError, match=message) as caught:
        device.capture(step)
    assert device.stream == 1, "work is queued on the device's stream again"
    del caught
    gc.collect()
    assert [number for number, reference in enumerate(driver.builders) if reference()] == leaked
    assert driver.crashes == 0


def test_a_captured_loop_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    device, streams = make_device(monkeypatch, driver), []
    graph = device.capture(lambda: device.loop(device.condition(), lambda: streams.append(device.stream)))
    assert streams == [101, 102], "a plain capture, then the body"
    gc.collect()
    assert graph and driver.crashes == 0 and not any(reference() for reference in driver.builders)


@pytest.mark.parametrize(("cpus", "blocking"), [(1, True), (3, True), (4, False), (64, False)])
def test_waiting_sleeps_where_cpus_are_few(cpus: int, blocking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "usable_cpus", lambda: cpus)
    driver = Driver()
    device = make_device(monkeypatch, driver)
    driver.called.clear()
    event = device.record_event()
    event.wait()
    del event
    flags = 2 + blocking
    event = (flags,)  # the fake driver returns its arguments
    assert driver.called == [
        ("cuEventCreate", flags),
        ("cuEventRecord", event, 1),
        ("cuEventSynchronize", event),
        ("cuEventDestroy", event),
    ]


@pytest.mark.parametrize(
    "failing", [None, "cuEventCreate", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime"]
)
def test_timing_destroys_its_events(failing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a call fails, here the last of its kind."""
    calls = {"cuEventCreate": 2, "cuEventRecord": 2, "cuEventSynchronize": 1, "cuEventElapsedTime": 1}
    driver = Driver(lambda name, *_: name == failing and driver.count(name) == calls[name])
    device = make_device(monkeypatch, driver)
    driver.called.clear()
    if failing:
        with pytest.raises(BackendError, match=failing):
            device.elapsed_ms([])
    else:
        assert device.elapsed_ms([lambda: driver.called.append("first"), lambda: driver.called.append("second")]) == 1.5
        event = (0,)  # the fake driver returns its arguments
        assert driver.called[2:-2] == [
            ("cuEventRecord", event, 1),
            "first",
            "second",
            ("cuEventRecord", event, 1),
            ("cuEventSynchronize", event),
            ("cuEventElapsedTime", event, event),
        ]
    assert driver.count("cuEventDestroy") == (1 if failing == "cuEventCreate" else 2)


def test_close_frees_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules too, among them one that could not be used, after the work that uses them."""
    driver = Driver(lambda name, *arguments: name == "cuModuleGetFunction" and arguments[0] == (b"cubin1",))
    monkeypatch.setattr(cuda, "compile_kernels", lambda macros, _, kind: f"{kind}{macros['CONDITIONAL']}".encode())
    monkeypatch.setattr(cuda, "lower_ptx_version", lambda ptx, version: ptx)
    device = make_device(monkeypatch, driver)
    device.kernels({"CONDITIONAL": 1}, ("begin",))
    driver.called.clear()
    device.close()
    device.close()
    assert driver.called == [
        ("cuStreamSynchronize", 1),
        ("cuModuleUnload", (b"cubin1",)),
        ("cuModuleUnload", (b"ptx1",)),
        "close",
    ]


@pytest.mark.parametrize("version", [12030, 12040])
def test_every_kernel_is_loaded_before_a_capture(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers load kernels lazily, at their first launch; drivers before CUDA 12.4 have no call for it."""
    driver = Driver()
    driver.results["cuDriverGetVersion"] = version
    monkeypatch.setattr(cuda, "compile_kernels", lambda *_: b"")
    make_device(monkeypatch, driver).kernels({"CONDITIONAL": 0}, ("begin", "join"))
    found = [call for call in driver.called if call[0] in ("cuModuleGetFunction", "cuFuncLoad")]
    module = (b"",)  # the fake driver returns its arguments
    functions = [("cuModuleGetFunction", module, b"begin"), ("cuModuleGetFunction", module, b"join")]
    loads = [("cuFuncLoad", (module, b"begin")), ("cuFuncLoad", (module, b"join"))]
    assert found == functions + (loads if version >= 12040 else [])


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is distinguished from other errors, because a smaller capacity is a remedy."""
    failing = {"cuMemAlloc": SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY")}
    driver = Driver()
    monkeypatch.setattr(driver, "cuMemAlloc", lambda size: (failing["cuMemAlloc"], None), raising=False)
    device = make_device(monkeypatch, driver)
    with pytest.raises(OutOfMemory, match=r"3\.0 MB cannot be allocated") as raised:
        device.allocate(3_000_000)
    assert raised.value.size == 3_000_000
    failing["cuMemAlloc"] = ERROR
    with pytest.raises(BackendError, match="cuMemAlloc returned CUDA_ERROR_INVALID_VALUE") as other:
        device.allocate(3_000_000)
    assert not isinstance(other.value, OutOfMemory)


def test_architectures_without_the_matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    device = make_device(monkeypatch, Driver())
    device.architecture = "sm75"
    with pytest.raises(BackendError, match=r"compute capability 8\.0 or newer, .* is sm75; use precision='fp32'"):
        device.kernels({"CONDITIONAL": 1, "MATMUL_TYPE": 1}, ("begin",))
    monkeypatch.setattr(cuda, "compile_kernels", lambda *_: b"")
    device.kernels({"CONDITIONAL": 1, "MATMUL_TYPE": 0}, ("begin",))


@pytest.mark.parametrize("where", ["compile", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncLoad"])
def test_first_loadable_kernel_variant_is_used(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two variants fail at different points; the third is used, and the failures are recorded."""
    tried: list[tuple[str, int]] = []

    def compile_kernels(macros: dict[str, int], architecture: str, kind: str) -> bytes:
        assert macros["MELS"] == 128 and architecture == "sm90"
        tried.append((kind, macros["CONDITIONAL"]))
        if where == "compile" and len(tried) < 3:
            raise BackendError("unresolved external symbol.")
        return b".version 9.0" if kind == "ptx" else b""

    monkeypatch.setattr(cuda, "compile_kernels", compile_kernels)
    device = make_device(monkeypatch, Driver(lambda name, *_: name == where and len(tried) < 3))
    loaded = device.kernels({"CONDITIONAL": 1, "MELS": 128}, ("begin", "finish"))
    assert tried == [("cubin", 1), ("ptx", 1), ("cubin", 0)]
    assert (loaded.format, loaded.conditional, len(loaded.failures)) == ("cubin", False, 2)
    wanted = "unresolved external symbol." if where == "compile" else f"{where} returned CUDA_ERROR_INVALID_VALUE."
    assert all(wanted in failure for failure in loaded.failures) and "ptx with conditions" in loaded.failures[1]
    message = r"no variant of the kernels can be loaded: cubin with conditions: .* ptx: .* Update the NVIDIA driver"
    with pytest.raises(BackendError, match=message):
        make_device(monkeypatch, Driver(lambda name, *_: name == "cuModuleLoadData")).kernels(
            {"CONDITIONAL": 1, "MELS": 128}, ()
        )


@pytest.mark.parametrize(
    ("declared", "driver", "expected"),
    [
        ("9.5", 13050, "9.5"),
        ("9.5", 13010, "9.1"),
        ("9.5", 13000, "9.0"),
        ("9.5", 12090, "8.8"),
        ("9.0", 13050, "9.0"),  # never raised
        ("8.6", 12060, "8.5"),  # CUDA 12.6 has no version of its own
        ("99.9", 13000, "9.0"),  # newer than the installed cuda-bindings
    ],
)
def test_ptx_version_is_lowered_to_that_of_the_driver(declared: str, driver: int, expected: str) -> None:
    pytest.importorskip("cuda.bindings.utils", reason="needs cuda-python")
    ptx = "//\n// Cuda compilation tools, release 13.5\n//\n\n.version {}\n.target sm_90\n// .version 9.5\n\0"
    assert cuda.lower_ptx_version(ptx.format(declared).encode(), driver) == ptx.format(expected).encode()


@pytest.mark.skipif(PTXAS is None, reason="needs ptxas")
@pytest.mark.parametrize(
    ("architecture", "driver"), [("sm80", 12040), ("sm90", 12040), ("sm90", 13000), ("sm120", 13000)]
)
def test_lowered_ptx_is_assembled(
    architecture: str, driver: int, demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the oldest drivers: CUDA 12.4 is the first with WHILE nodes, cuda-bindings 13 needs CUDA 13.0."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = kernels.macros(demo_bundle.manifest, "float16", conditional=True)
    ptx = cuda.lower_ptx_version(cuda.compile_kernels(macros, architecture, "ptx"), driver)
    assert re.search(rb"\.version (\S+)", ptx)[1] == {12040: b"8.4", 13000: b"9.0"}[driver]
    (tmp_path / "kernels.ptx").write_bytes(ptx.rstrip(b"\0"))
    command = [PTXAS, "--compile-only", f"-arch={architecture.replace('sm', 'sm_')}", "kernels.ptx", "-o", "kernels.o"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "kernels.o").read_bytes().startswith(b"\x7fELF")


def test_errors_after_which_a_process_must_be_restarted() -> None:
    """Those whose documentation in cuda-python states it, and not those that a smaller model avoids."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python")
    lost = [error.name for error in driver.CUresult if "must be terminated and relaunched" in (error.__doc__ or "")]
    lost = lost or ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_ERROR_LAUNCH_FAILED"]  # a version without documentation
    for name in (*lost, "CUDA_ERROR_ASSERT", "CUDA_ERROR_ECC_UNCORRECTABLE"):
        assert "no GPU call of this process can succeed" in str(cuda._failure("the GPU failed", name)), name
    for name in ("CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        assert "restart" not in str(cuda._failure("the GPU failed", name)), name


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", "choose a smaller capacity or max_batch"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", "no GPU call of this process can succeed any more, restart it"),
        ("CUDA_ERROR_INVALID_VALUE", r"\.$"),
    ],
)
def test_errors_name_a_remedy(error: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both those of the driver's functions and those of cuda.core."""
    device = make_device(monkeypatch, Driver())
    monkeypatch.setattr(ERROR, "name", error)
    event = device.record_event()
    device._driver.fails = lambda *_: True
    for call, function in ((lambda: device.allocate_host(100), "cuMemHostAlloc"), (event.wait, "cuEventSynchronize")):
        with pytest.raises(BackendError, match=f"the GPU failed: {function} returned {error}(; )?{remedy}"):
            call()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{error}: an explanation.")

    graph = cuda.CudaGraph(device, SimpleNamespace(launch=fail))
    with pytest.raises(BackendError, match=f"a step: {error}: an explanation(; )?{remedy}"):
        graph.launch()
