"""The rules of the CUDA stub, each provoked through cuda.bindings. Run by `test_cuda_stub.py` in its own process."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cu
from cuda_on_cpu import compile_for_cpu
from cuda_stub import Stub, host_function, image

from nemostream.errors import BackendError
from nemostream.runtime.backends.gpu.cuda import CudaDevice

RELAXED = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
THREAD_LOCAL = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
GLOBAL = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
NON_BLOCKING = cu.CUstream_flags.CU_STREAM_NON_BLOCKING

KERNELS = """
typedef unsigned long long cudaGraphConditionalHandle;
struct Step { int* counter; int* target; int size; unsigned long long condition; };
extern "C" __global__ void count(const Step s) {
  if (threadIdx.x == 0) {
    cudaGraphSetConditional(s.condition, --*s.counter > 0);
    s.target[*s.counter] = 7;
  }
}
extern "C" __global__ void fill(const Step s) {
  for (int i = threadIdx.x; i < s.size; i += blockDim.x) s.target[i] = i;
}
"""
STEP = np.dtype([("counter", "u8"), ("target", "u8"), ("size", "i4"), ("condition", "u8")], align=True)


def call(function: str, *arguments: Any) -> Any:
    """Call a driver function that must succeed and return its results."""
    status, *results = getattr(cu, function)(*arguments)
    assert status == cu.CUresult.CUDA_SUCCESS, f"{function}: {status.name}"
    return results[0] if len(results) == 1 else tuple(results)


def error(function: str, *arguments: Any) -> str:
    """Call a driver function that must fail and return its error without "CUDA_ERROR_"."""
    status, *_ = getattr(cu, function)(*arguments)
    assert status != cu.CUresult.CUDA_SUCCESS, function
    return str(status.name).removeprefix("CUDA_ERROR_")


def in_thread(work: Callable[[], Any], current: bool = True) -> Any:
    """Return the result of `work` in another thread."""
    results: list[Any] = []

    def run() -> None:
        if current:
            call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", 0))
        results.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture(autouse=True)
def current() -> None:
    call("cuInit", 0)
    call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", 0)))


@pytest.fixture
def stream() -> Any:
    return call("cuStreamCreate", NON_BLOCKING)


@pytest.fixture
def memory() -> int:
    return int(call("cuMemAlloc", 4096))


@pytest.fixture
def expect(stub: Stub) -> Iterator[Callable[[str], None]]:
    """Return a function that checks the only violation and clears it."""

    def check(wanted: str) -> None:
        (violation,) = stub.violations
        assert wanted in violation
        stub.clear()

    yield check


def status_of(stream: Any) -> str:
    return str(call("cuStreamIsCapturing", stream).name).removeprefix("CU_STREAM_CAPTURE_STATUS_")


def functions(*names: str) -> list[Any]:
    unit = compile_for_cpu(KERNELS, {}, ("count", "fill"))
    pointers = [STEP.fields[name][1] for name in ("counter", "target")]  # type: ignore[index]
    module = call("cuModuleLoadData", image(unit.path, STEP.itemsize, pointers))
    return [module, *(call("cuModuleGetFunction", module, name.encode()) for name in names)]


def launch(function: Any, stream: Any, grid: int = 1, threads: int = 32, **fields: int) -> tuple[Any, ...]:
    """Launch a kernel and return the status."""
    step = np.zeros(1, STEP)
    for name, value in fields.items():
        step[name] = value
    pointers = np.array([step.ctypes.data], np.uint64)
    return cu.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, 0, stream, pointers.ctypes.data, 0)


def ints(address: int, count: int, stream: Any) -> list[int]:
    array = np.empty(count, np.int32)
    call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)
    return array.tolist()


# -- queues ------------------------------------------------------------------------------------------------------------


def test_work_runs_when_the_host_waits(stream: Any) -> None:
    _, fill = functions("fill")
    pinned = int(call("cuMemHostAlloc", 64, cu.CU_MEMHOSTALLOC_PORTABLE))
    view = np.ctypeslib.as_array((ctypes.c_int32 * 16).from_address(pinned))
    view[:] = -1
    launch(fill, stream, target=pinned, size=16)
    event = call("cuEventCreate", 0)
    call("cuEventRecord", event, stream)
    time.sleep(0.01)
    assert view.tolist() == [-1] * 16
    call("cuEventSynchronize", event)
    assert view.tolist() == [*range(16)]
    call("cuMemFreeHost", pinned)


def test_query_reports_pending_work_once(stream: Any, memory: int) -> None:
    call("cuMemsetD8Async", memory, 1, 16, stream)
    assert error("cuStreamQuery", stream) == "NOT_READY"
    call("cuStreamQuery", stream)


def test_another_stream_waits_for_an_event(stream: Any, memory: int) -> None:
    other, event = call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 0)
    call("cuMemsetD32Async", memory, 5, 4, stream)
    call("cuEventRecord", event, stream)
    call("cuStreamWaitEvent", other, event, 0)
    call("cuMemcpyDtoDAsync", memory + 256, memory, 16, other)
    call("cuStreamSynchronize", other)
    assert ints(memory + 256, 4, other) == [5] * 4


def test_memory_is_not_zeroed(stream: Any, memory: int) -> None:
    assert ints(memory, 1, stream) != [0]


def test_copy_from_pageable_memory_is_staged(stream: Any, memory: int) -> None:
    array = np.arange(4, dtype=np.int32)
    call("cuMemcpyHtoDAsync", memory, array.ctypes.data, array.nbytes, stream)
    array[:] = 9
    assert ints(memory, 4, stream) == [0, 1, 2, 3]


# -- threads and contexts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("cuMemAlloc", (16,)),
        ("cuStreamCreateWithPriority", (1, 0)),
        ("cuCtxSynchronize", ()),
        ("cuMemGetInfo", ()),
        ("cuEventCreate", (0,)),
    ],
)
def test_thread_without_context(function: str, arguments: tuple[int, ...], expect: Any) -> None:
    assert in_thread(lambda: error(function, *arguments), current=False) == "INVALID_CONTEXT"
    expect(f"{function} was called in a thread without a current context")


@pytest.mark.parametrize(("mode", "result"), [(GLOBAL, "STREAM_CAPTURE_WRONG_THREAD"), (RELAXED, "SUCCESS")])
def test_capture_ended_in_another_thread(mode: Any, result: str, stream: Any, stub: Stub) -> None:
    call("cuStreamBeginCapture", stream, mode)
    status, _ = in_thread(lambda: cu.cuStreamEndCapture(stream))
    assert status.name.removeprefix("CUDA_").removeprefix("ERROR_") == result
    assert len(stub.violations) == (mode == GLOBAL)
    if mode == GLOBAL:
        assert error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_INVALIDATED"
    stub.clear()


def test_host_function_must_not_call_the_driver(expect: Any) -> None:
    device, found = CudaDevice(), []
    host_function(device, lambda: found.append(error("cuMemAlloc", 16)))()
    device.record_event().wait()
    assert found == ["NOT_PERMITTED"]
    expect("cuMemAlloc was called by a host function")
    device.close()


# -- captures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL])
@pytest.mark.parametrize(
    ("function", "arguments"), [("cuMemAlloc", (16,)), ("cuMemHostAlloc", (16, 0)), ("cuModuleLoadData", (b"",))]
)
def test_unsafe_call_in_a_capture(
    mode: Any, function: str, arguments: tuple[Any, ...], stream: Any, expect: Any
) -> None:
    call("cuStreamBeginCapture", stream, mode)
    assert error(function, *arguments) == "STREAM_CAPTURE_UNSUPPORTED"
    expect(f"{function} was called during a capture")
    assert status_of(stream) == "INVALIDATED"
    assert error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_INVALIDATED"
    assert status_of(stream) == "NONE"


def test_unsafe_call_in_a_relaxed_capture_is_noted(stream: Any, stub: Stub) -> None:
    call("cuStreamBeginCapture", stream, RELAXED)
    call("cuMemFree", call("cuMemAlloc", 16))
    call("cuGraphDestroy", call("cuStreamEndCapture", stream))
    assert stub.notes == [f"{name} was called during a relaxed capture" for name in ("cuMemAlloc", "cuMemFree")]


@pytest.mark.parametrize(("mode", "prohibited"), [(GLOBAL, True), (THREAD_LOCAL, False), (RELAXED, False)])
def test_unsafe_call_in_another_thread(mode: Any, prohibited: bool, stream: Any, stub: Stub) -> None:
    call("cuStreamBeginCapture", stream, mode)
    status, _ = in_thread(lambda: cu.cuMemAlloc(16))
    assert (status.name == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED") == prohibited == bool(stub.violations)
    assert status_of(stream) == ("INVALIDATED" if prohibited else "ACTIVE")
    cu.cuStreamEndCapture(stream)
    stub.clear()


@pytest.mark.parametrize("mode", [GLOBAL, RELAXED])
@pytest.mark.parametrize("function", ["cuStreamSynchronize", "cuStreamQuery", "cuCtxSynchronize"])
def test_waiting_for_a_capturing_stream(mode: Any, function: str, stream: Any, expect: Any) -> None:
    call("cuStreamBeginCapture", stream, mode)
    arguments = () if function == "cuCtxSynchronize" else (stream,)
    assert error(function, *arguments) == "STREAM_CAPTURE_UNSUPPORTED"
    expect(function)
    assert error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_INVALIDATED"


@pytest.mark.parametrize("function", ["cuEventSynchronize", "cuEventQuery"])
def test_waiting_for_a_captured_event(function: str, stream: Any, expect: Any) -> None:
    event = call("cuEventCreate", 0)
    call("cuStreamBeginCapture", stream, RELAXED)
    call("cuEventRecord", event, stream)
    assert error(function, event) == "CAPTURED_EVENT"
    expect(f"{function} was called for an event that was recorded in a capture")
    assert error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_INVALIDATED"


@pytest.mark.parametrize("blocking", [True, False])
def test_legacy_stream_during_a_capture(blocking: bool, memory: int, stub: Stub) -> None:
    stream = call("cuStreamCreate", 0 if blocking else NON_BLOCKING)
    call("cuStreamBeginCapture", stream, RELAXED)
    (status,) = cu.cuMemsetD8Async(memory, 0, 16, 0)
    assert (status.name == "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT") == blocking == bool(stub.violations)
    assert status_of(stream) == ("INVALIDATED" if blocking else "ACTIVE")
    cu.cuStreamEndCapture(stream)
    stub.clear()


def test_legacy_stream_cannot_be_captured(expect: Any) -> None:
    assert error("cuStreamBeginCapture", 0, RELAXED) == "STREAM_CAPTURE_UNSUPPORTED"
    expect("the legacy stream cannot be captured")


def test_capture_begins_and_ends_once(stream: Any, expect: Any) -> None:
    assert error("cuStreamEndCapture", stream) == "ILLEGAL_STATE"
    expect("the stream is not capturing")
    call("cuStreamBeginCapture", stream, RELAXED)
    assert error("cuStreamBeginCapture", stream, RELAXED) == "ILLEGAL_STATE"
    expect("the stream is capturing already")
    call("cuGraphDestroy", call("cuStreamEndCapture", stream))


@pytest.mark.parametrize("joined", [True, False])
def test_forked_capture_must_be_joined(joined: bool, stream: Any, memory: int, stub: Stub) -> None:
    other, fork, join = call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 2), call("cuEventCreate", 2)
    call("cuStreamBeginCapture", stream, RELAXED)
    call("cuMemsetD32Async", memory, 3, 4, stream)
    call("cuEventRecord", fork, stream)
    call("cuStreamWaitEvent", other, fork, 0)
    assert status_of(other) == "ACTIVE"
    call("cuMemcpyDtoDAsync", memory + 256, memory, 16, other)
    assert error("cuStreamEndCapture", other) == "STREAM_CAPTURE_UNMATCHED" if not joined else True
    stub.clear()
    if not joined:  # the failed end has invalidated the capture
        assert error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_INVALIDATED"
        call("cuStreamBeginCapture", stream, RELAXED)
        call("cuEventRecord", fork, stream)
        call("cuStreamWaitEvent", other, fork, 0)
        call("cuMemsetD32Async", memory, 3, 4, other)
        assert error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_UNJOINED"
        assert stub.violations == ["a capture was ended before its forked streams were joined"]
        stub.clear()
        assert status_of(other) == "NONE"
        return
    call("cuEventRecord", join, other)
    call("cuStreamWaitEvent", stream, join, 0)
    graph = call("cuStreamEndCapture", stream)
    exec_ = call("cuGraphInstantiate", graph, 0)
    call("cuGraphLaunch", exec_, stream)
    assert ints(memory + 256, 4, stream) == [3] * 4
    call("cuGraphExecDestroy", exec_)
    call("cuGraphDestroy", graph)


def test_capture_must_not_wait_for_other_work(stream: Any, memory: int, expect: Any) -> None:
    other, event = call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 0)
    call("cuMemsetD8Async", memory, 0, 16, other)
    call("cuEventRecord", event, other)
    call("cuStreamBeginCapture", stream, RELAXED)
    assert error("cuStreamWaitEvent", stream, event, 0) == "STREAM_CAPTURE_ISOLATION"
    expect("waits for work outside the capture")
    assert error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_INVALIDATED"


def test_captures_must_not_be_merged(stream: Any, expect: Any) -> None:
    other, event = call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 0)
    for each in (stream, other):
        call("cuStreamBeginCapture", each, RELAXED)
    call("cuEventRecord", event, other)
    assert error("cuStreamWaitEvent", stream, event, 0) == "STREAM_CAPTURE_MERGE"
    expect("joins two captures")
    for each in (stream, other):
        assert error("cuStreamEndCapture", each) == "STREAM_CAPTURE_INVALIDATED"


def test_lazy_loading_in_a_capture_is_noted(stream: Any, memory: int, stub: Stub) -> None:
    _, count, fill = functions("count", "fill")
    call("cuFuncLoad", count)
    call("cuStreamBeginCapture", stream, RELAXED)
    for function in (count, fill):
        launch(function, stream, counter=memory, target=memory)
    call("cuGraphDestroy", call("cuStreamEndCapture", stream))
    assert stub.notes == ["fill was loaded during a capture"]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_is_limited(stub: Stub) -> None:
    free, total = call("cuMemGetInfo")
    assert error("cuMemAlloc", free + 1) == "OUT_OF_MEMORY"
    memory = call("cuMemAlloc", 1 << 20)
    assert call("cuMemGetInfo") == (free - (1 << 20), total)
    before = stub.live["device_memory"]
    call("cuMemFree", memory)
    assert stub.live["device_memory"] == before - 1


def test_memory_is_freed_once(memory: int, expect: Any) -> None:
    call("cuMemFree", memory)
    assert error("cuMemFree", memory) == "INVALID_VALUE"
    expect("is not allocated")
    assert error("cuMemFreeHost", memory) == "INVALID_VALUE"
    expect("is not allocated")


@pytest.mark.parametrize("freed", [False, True])
@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuMemsetD8Async"])
def test_copies_stay_within_allocations(function: str, freed: bool, stream: Any, memory: int, expect: Any) -> None:
    other, host = int(call("cuMemAlloc", 4096)), np.zeros(4096, np.uint8).ctypes.data
    if freed:
        call("cuMemFree", memory)
    arguments: tuple[int, ...] = {
        "cuMemcpyHtoDAsync": (memory + 1, host, 4096),
        "cuMemcpyDtoHAsync": (host, memory + 1, 4096),
        "cuMemcpyDtoDAsync": (other, memory + 1, 4096),
        "cuMemsetD8Async": (memory + 1, 0, 4096),
    }[function]
    assert error(function, *arguments[:2], arguments[2] - freed, stream) == "INVALID_VALUE"
    expect("freed memory" if freed else "memory that is not allocated")


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"])
def test_device_memory_is_not_host_memory(function: str, stream: Any, memory: int, expect: Any) -> None:
    assert error(function, memory, memory + 256, 16, stream) == "INVALID_VALUE"
    expect("device memory is used as host memory")


def test_memset_is_aligned(stream: Any, memory: int, expect: Any) -> None:
    assert error("cuMemsetD32Async", memory + 2, 0, 1, stream) == "INVALID_VALUE"
    expect("the address is not aligned")


# -- kernels -----------------------------------------------------------------------------------------------------------


def test_launch_runs_a_kernel(stream: Any, memory: int) -> None:
    _, fill = functions("fill")
    launch(fill, stream, target=memory, size=8)
    assert ints(memory, 8, stream) == [*range(8)]


@pytest.mark.parametrize(
    ("address", "result", "wanted"),
    [
        (lambda memory: memory + 4, "MISALIGNED_ADDRESS", "is not aligned to 16 bytes"),
        (lambda memory: memory + 4096, "ILLEGAL_ADDRESS", "memory that is not allocated"),
        (lambda memory: (call("cuMemFree", memory), memory)[1], "ILLEGAL_ADDRESS", "freed memory"),
    ],
)
def test_pointers_of_a_launch(address: Any, result: str, wanted: str, stream: Any, memory: int, stub: Stub) -> None:
    """The launch succeeds, the wait and everything after it fail."""
    _, fill = functions("fill")
    (status,) = launch(fill, stream, target=address(memory), size=0)
    assert status == cu.CUresult.CUDA_SUCCESS
    assert error("cuStreamSynchronize", stream) == result
    assert error("cuMemAlloc", 16) == result
    (violation,) = stub.violations
    assert violation.startswith("the kernel fill, argument byte 8") and wanted in violation
    stub.clear()
    call("cuStreamSynchronize", stream)


@pytest.mark.parametrize(("grid", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_size_of_a_launch(grid: int, threads: int, stream: Any, memory: int, expect: Any) -> None:
    _, fill = functions("fill")
    (status,) = launch(fill, stream, grid, threads, target=memory)
    assert status == cu.CUresult.CUDA_ERROR_INVALID_VALUE
    expect("a launch of fill with grid")


def test_argument_of_a_launch_is_aligned(stream: Any, expect: Any) -> None:
    _, fill = functions("fill")
    raw = np.zeros(STEP.itemsize + 16, np.uint8)
    pointers = np.array([raw.ctypes.data + 4], np.uint64)
    assert error("cuLaunchKernel", fill, 1, 1, 1, 32, 1, 1, 0, stream, pointers.ctypes.data, 0) == "INVALID_VALUE"
    expect("a launch with an unaligned argument: fill")


def test_missing_kernel_and_bad_image(stub: Stub) -> None:
    module, _ = functions("fill")
    assert error("cuModuleGetFunction", module, b"missing") == "NOT_FOUND"
    assert error("cuModuleLoadData", b"\x7fELF" + bytes(64)) == "INVALID_IMAGE"
    before = stub.live["modules"]
    call("cuModuleUnload", module)
    assert stub.live["modules"] == before - 1


# -- graphs ------------------------------------------------------------------------------------------------------------


class Loop:
    """A captured WHILE loop: `stream` captures the graph and `body` its loop, until `end`."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.body = stream, call("cuStreamCreate", NON_BLOCKING)
        call("cuStreamBeginCapture", stream, RELAXED)
        _, _, graph, *_ = call("cuStreamGetCaptureInfo", stream)
        self.condition = int(call("cuGraphConditionalHandleCreate", graph, 0, 1, cu.CU_GRAPH_COND_ASSIGN_DEFAULT))
        self.graph, self.params = graph, cu.CUgraphNodeParams()
        self.params.type = cu.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        self.params.conditional.handle = self.condition
        self.params.conditional.type = cu.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        self.params.conditional.size = 1
        self.params.conditional.ctx = call("cuCtxGetCurrent")

    def begin(self) -> None:
        node = call("cuGraphAddNode", self.graph, None, None, 0, self.params)
        call("cuStreamUpdateCaptureDependencies", self.stream, [node], None, 1, 1)
        graph = self.params.conditional.phGraph_out[0]
        call("cuStreamBeginCaptureToGraph", self.body, graph, None, None, 0, RELAXED)

    def end(self) -> Any:
        call("cuStreamEndCapture", self.body)
        return call("cuStreamEndCapture", self.stream)


def test_loop_runs_until_its_condition_is_false(stream: Any, memory: int) -> None:
    _, count = functions("count")
    loop = Loop(stream)
    loop.begin()
    launch(count, loop.body, counter=memory, target=memory + 256, condition=loop.condition)
    graph = loop.end()
    exec_ = call("cuGraphInstantiate", graph, 0)
    call("cuGraphDestroy", graph)  # not needed by the executable graph
    for turns in (5, 3):  # the default value is assigned at each launch
        call("cuMemsetD32Async", memory, turns, 1, stream)
        call("cuMemsetD32Async", memory + 256, 0, 8, stream)
        call("cuGraphLaunch", exec_, stream)
        assert ints(memory, 1, stream) == [0]
        assert ints(memory + 256, 8, stream) == [7] * turns + [0] * (8 - turns)
    call("cuGraphExecDestroy", exec_)


def test_loop_body_must_not_have_host_functions(stream: Any, expect: Any) -> None:
    loop = Loop(stream)
    loop.begin()
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    call("cuLaunchHostFunc", loop.body, ctypes.cast(callback, ctypes.c_void_p).value, 0)
    graph = loop.end()
    assert error("cuGraphInstantiate", graph, 0) == "NOT_SUPPORTED"
    expect("the body of a conditional node contains a host function")
    call("cuGraphDestroy", graph)


def test_condition_is_used_once(stream: Any, expect: Any) -> None:
    loop = Loop(stream)
    loop.begin()
    assert error("cuGraphAddNode", loop.graph, None, None, 0, loop.params) == "INVALID_VALUE"
    expect("a condition of its graph that no other node uses")
    call("cuGraphDestroy", loop.end())


def test_condition_must_be_used(stream: Any, expect: Any) -> None:
    graph = (Loop(stream), call("cuStreamEndCapture", stream))[1]
    assert error("cuGraphInstantiate", graph, 0) == "INVALID_VALUE"
    expect("a condition is not used by any node")
    call("cuGraphDestroy", graph)


def test_graph_is_not_instantiated_while_its_body_is_captured(stream: Any, expect: Any) -> None:
    loop = Loop(stream)
    loop.begin()
    graph = call("cuStreamEndCapture", stream)
    assert error("cuGraphInstantiate", graph, 0) == "INVALID_VALUE"
    expect("a graph was instantiated while it was captured")
    call("cuStreamEndCapture", loop.body)
    call("cuGraphDestroy", graph)


def test_destroyed_graph_still_runs(stream: Any, memory: int, stub: Stub) -> None:
    """As a driver, which frees an executable graph in flight when it has run."""
    before = stub.live["execs"]
    call("cuStreamBeginCapture", stream, RELAXED)
    call("cuMemsetD32Async", memory, 11, 2, stream)
    graph = call("cuStreamEndCapture", stream)
    exec_ = call("cuGraphInstantiate", graph, 0)
    call("cuGraphLaunch", exec_, stream)
    call("cuGraphExecDestroy", exec_)
    call("cuGraphDestroy", graph)
    assert stub.live["execs"] == before
    assert ints(memory, 2, stream) == [11, 11]


# -- undefined behaviour -----------------------------------------------------------------------------------------------

PROLOGUE = """
import sys
sys.path[:0] = {path!r}
from driver_cases import *
call("cuInit", 0)
call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", 0))
stream, memory = call("cuStreamCreate", NON_BLOCKING), int(call("cuMemAlloc", 4096))
"""


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            # A real driver (580 at least) frees the graph of the body twice.
            "loop = Loop(stream); loop.begin(); cu.cuStreamSynchronize(loop.body); cu.cuStreamEndCapture(loop.body)",
            "the invalidated capture of a conditional body was ended",
        ),
        (
            # cuda.core gets the graph when a capture begins; the driver destroys it if the capture fails.
            'call("cuStreamBeginCapture", stream, RELAXED); graph = call("cuStreamGetCaptureInfo", stream)[2]\n'
            "cu.cuStreamSynchronize(stream); cu.cuStreamEndCapture(stream); cu.cuGraphDestroy(graph)",
            "a destroyed graph was used",
        ),
        (
            'call("cuStreamBeginCapture", stream, RELAXED)\n'
            'cu.cuGraphDestroy(call("cuStreamGetCaptureInfo", stream)[2])',
            "a graph was destroyed while it was captured",
        ),
        (
            'call("cuStreamBeginCapture", stream, RELAXED); cu.cuStreamDestroy(stream)',
            "a capturing stream was destroyed",
        ),
        ('call("cuStreamDestroy", stream); cu.cuStreamSynchronize(stream)', "a destroyed stream was used"),
        (
            'event = call("cuEventCreate", 0); call("cuEventDestroy", event); cu.cuEventRecord(event, stream)',
            "a destroyed event was used",
        ),
        (
            'module, fill = functions("fill"); call("cuModuleUnload", module); launch(fill, stream, target=memory)',
            "the kernel fill was launched after its module was unloaded",
        ),
        (
            'module, fill = functions("fill"); call("cuStreamBeginCapture", stream, RELAXED)\n'
            'launch(fill, stream, target=memory); graph = call("cuStreamEndCapture", stream)\n'
            'exec_ = call("cuGraphInstantiate", graph, 0)\n'
            'call("cuModuleUnload", module); call("cuGraphLaunch", exec_, stream); cu.cuStreamSynchronize(stream)',
            "the kernel fill ran after its module was unloaded",
        ),
        (
            '_, fill = functions("fill"); launch(fill, stream, target=memory, size=1025)\n'
            "cu.cuStreamSynchronize(stream)",
            "cuda_stub: the kernel fill accessed 0x",
        ),
        (
            "print(ctypes.c_int32.from_address(memory).value); call('cuMemFree', memory)\n"
            "print(ctypes.c_int32.from_address(memory).value)",
            "",
        ),
    ],
)
def test_undefined_behaviour_ends_the_process(script: str, message: str) -> None:
    text = PROLOGUE.format(path=sys.path) + script + "\nprint('survived')"
    process = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert process.returncode < 0 and "survived" not in process.stdout, process.stderr
    assert message in process.stderr


# -- faults ------------------------------------------------------------------------------------------------------------


def test_nth_call_fails(stub: Stub) -> None:
    stub.fail("cuMemAlloc", 2, 2)
    results = [cu.cuMemAlloc(16)[0].name for _ in range(3)]
    assert results == ["CUDA_SUCCESS", "CUDA_ERROR_OUT_OF_MEMORY", "CUDA_SUCCESS"]
    assert stub.calls("cuMemAlloc") == 3


def test_lost_device(stream: Any, stub: Stub) -> None:
    stub.fail("*", 2, 46, sticky=True)
    assert cu.cuMemGetInfo()[0] == cu.CUresult.CUDA_SUCCESS
    for _ in range(2):
        assert error("cuMemGetInfo") == error("cuStreamSynchronize", stream) == "DEVICE_UNAVAILABLE"
    with pytest.raises(BackendError, match="no usable NVIDIA GPU"):
        CudaDevice()


def test_capture_is_invalidated_at_a_call(stream: Any, memory: int, stub: Stub) -> None:
    call("cuStreamBeginCapture", stream, RELAXED)
    stub.fail("capture", 2, 901)
    call("cuMemsetD8Async", memory, 0, 16, stream)
    assert error("cuMemsetD8Async", memory, 0, 16, stream) == "STREAM_CAPTURE_INVALIDATED"
    assert error("cuStreamEndCapture", stream) == "STREAM_CAPTURE_INVALIDATED"


def test_failed_kernel(stream: Any, memory: int, stub: Stub) -> None:
    _, fill = functions("fill")
    stub.fail("execute", 1, 719)
    launch(fill, stream, target=memory)
    assert error("cuStreamSynchronize", stream) == error("cuMemGetInfo") == "LAUNCH_FAILED"
