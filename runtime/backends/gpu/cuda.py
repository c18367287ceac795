"""`device.Device` for an NVIDIA GPU, implemented with cuda-python only.

NVRTC compiles the kernels on first use; the binaries are cached on disk. A captured step is a CUDA graph. Its decoding
loop is a WHILE conditional node (driver 550 or newer), whose body the device repeats without the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.plans import cache_folder, check_private, make_private
from nemostream.runtime.backends.cpus import usable_cpus
from nemostream.runtime.backends.gpu import kernels
from nemostream.runtime.backends.gpu.device import OutOfMemory
from nemostream.untrusted import MIB, read_regular

_MIN_CUDA_CORE = (1, 2)
# GPU calls of other threads, and of cuda.core while it adds a loop, would invalidate a capture in a stricter mode.
_CAPTURE_MODE = "relaxed"
# With fewer CPUs a thread that waits for an event sleeps: waking up takes some microseconds, but spinning takes a CPU.
_CPUS_TO_SPIN = 4
# After these driver errors all calls of the process fail.
_DEVICE_LOST = (
    "ASSERT",
    "CONTAINED",
    "DEVICE_UNAVAILABLE",
    "ECC_UNCORRECTABLE",
    "EXTERNAL_DEVICE",
    "HARDWARE_STACK_ERROR",
    "ILLEGAL_ADDRESS",
    "ILLEGAL_INSTRUCTION",
    "INVALID_ADDRESS_SPACE",
    "INVALID_PC",
    "LAUNCH_FAILED",
    "LAUNCH_TIMEOUT",
    "MISALIGNED_ADDRESS",
    "MPS_CLIENT_TERMINATED",
    "NVLINK_UNCORRECTABLE",
    "TENSOR_MEMORY_LEAK",
)
_MIN_TENSOR_CORES = 80  # first architecture with the matrix instructions of `kernels/tile.cu`
_CAN_LOAD_FUNCTIONS = 12040  # first driver version with `cuFuncLoad`


class CudaDevice:
    """The GPU with this ordinal. Raises `BackendError` if it does not exist or cuda-python is missing."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device, __version__
        except ImportError as error:
            raise BackendError(f"a GPU needs cuda-python ({error}): {install_command('gpu')}.") from error
        if tuple(map(int, __version__.split(".")[:2])) < _MIN_CUDA_CORE:
            raise BackendError(f"cuda-core {__version__} is too old: {install_command('gpu')}.")
        self._driver = driver
        self._thread = threading.local()  # `current` is set in threads where the device is current
        self._closed = False
        try:
            self._device = Device(ordinal)
            self._device.set_current()
            self._thread.current = True
            self._main = self._device.create_stream()
            self.driver_version = int(self._call("cuDriverGetVersion"))  # 13000 for CUDA 13.0
        except Exception as error:  # cuda.core has its own exceptions, and others apply if there is no driver
            raise BackendError(f"no usable NVIDIA GPU ({error}); run `nemostream doctor` for details.") from error
        flags = driver.CUevent_flags
        self._event_flags = int(flags.CU_EVENT_DISABLE_TIMING)
        if usable_cpus() < _CPUS_TO_SPIN:
            self._event_flags |= int(flags.CU_EVENT_BLOCKING_SYNC)
        capability = self._device.compute_capability
        self.name = str(self._device.name)
        self.architecture = f"sm{capability.major}{capability.minor}"
        self._streams = [self._main]  # the last is the stream that work is queued on
        self._builders: list[Any] = []
        self._leaked: list[Any] = []  # builders whose capture cannot be ended
        self._conditions: dict[int, Any] = {}
        self._modules: list[Any] = []
        self._memory: list[Any] = []
        self._host_memory: list[int] = []

    @property
    def stream(self) -> int:
        """Handle of the stream that work is queued on; during a capture, the captured stream."""
        return int(self._streams[-1].handle)

    @property
    def free_bytes(self) -> int:
        free, _ = self._call("cuMemGetInfo")
        return int(free)

    def make_current(self) -> None:
        if not getattr(self._thread, "current", False):
            with _driver_errors("the GPU cannot be used"):
                self._device.set_current()
            self._thread.current = True

    def allocate(self, size: int) -> int:
        status, memory = self._driver.cuMemAlloc(max(size, 16))
        if status.name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise OutOfMemory(size)
        self._check("cuMemAlloc", status)
        self._memory.append(memory)
        self._call("cuMemsetD8Async", memory, 0, max(size, 16), self.stream)
        return int(memory)

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        flags = self._driver.CU_MEMHOSTALLOC_PORTABLE | self._driver.CU_MEMHOSTALLOC_DEVICEMAP
        address = int(self._call("cuMemHostAlloc", max(size, 16), flags))
        self._host_memory.append(address)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 16)).from_address(address))
        array[:] = 0
        return array

    def write(self, address: int, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array)
        if not array.nbytes:
            return
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self.stream)
        self._call("cuStreamSynchronize", self.stream)  # the caller may free the array

    def read(self, address: int, array: NDArray[Any]) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self.stream)
        self._call("cuStreamSynchronize", self.stream)

    def kernels(self, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> CudaKernels:
        return CudaKernels(self, macros, entries)

    def load_functions(self, image: bytes, entries: tuple[str, ...]) -> dict[str, Any]:
        """Load compiled kernels and return their functions, by name."""
        module = self._call("cuModuleLoadData", image)
        self._modules.append(module)
        # Drivers that load lazily report a missing symbol only here.
        functions = {entry: self._call("cuModuleGetFunction", module, entry.encode()) for entry in entries}
        if self.driver_version >= _CAN_LOAD_FUNCTIONS:  # otherwise at the first launch, which may be in a capture
            for function in functions.values():
                self._call("cuFuncLoad", function)
        return functions

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        with _driver_errors("the step cannot be captured as a CUDA graph"):
            graph = self._captured(work).complete()
            graph.upload(self._main)
        return CudaGraph(self, graph)

    def condition(self) -> int:
        condition = self._builders[-1].create_condition(default_value=0)
        handle = int(condition.handle)
        self._conditions[handle] = condition
        return handle

    def loop(self, condition: int, work: Callable[[], None]) -> None:
        # If the capture of a loop's body is invalidated, the driver frees the body's graph, and crashes when both
        # captures are ended, in either order (NVIDIA/cuda-python issue 2918). Most work that invalidates it also
        # invalidates a plain capture, which can be ended.
        self._captured(work).close()
        parent = self._builders[-1]
        body = parent.while_loop(self._conditions.pop(condition))
        body.begin_building(_CAPTURE_MODE)
        try:
            self._enter(body, work)
            body.end_building()
        except BaseException:
            self._abandon(body, parent)
            raise

    def record_event(self) -> CudaEvent:
        return CudaEvent(self)

    def elapsed_ms(self, work: Iterable[Callable[[], None]]) -> float:
        with self._timing_event() as begin, self._timing_event() as end:
            self._call("cuEventRecord", begin, self.stream)
            for run in work:
                run()
            self._call("cuEventRecord", end, self.stream)
            self._call("cuEventSynchronize", end)
            return float(self._call("cuEventElapsedTime", begin, end))

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes from one device address to another."""
        self._call("cuMemcpyDtoDAsync", target, source, size, self.stream)

    def free(self, address: int) -> None:
        """Free memory of `allocate` before `close`."""
        self._driver.cuMemFree(address)
        self._memory = [memory for memory in self._memory if int(memory) != address]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._driver.cuStreamSynchronize(self.stream)  # errors are ignored: everything is freed now
        for module in self._modules:
            self._driver.cuModuleUnload(module)
        for memory in self._memory:
            self._driver.cuMemFree(memory)
        for address in self._host_memory:
            self._driver.cuMemFreeHost(address)
        self._modules.clear()
        self._memory.clear()
        self._host_memory.clear()
        self._main.close()

    @contextlib.contextmanager
    def _timing_event(self) -> Iterator[Any]:
        event = self._call("cuEventCreate", 0)
        try:
            yield event
        finally:
            self._driver.cuEventDestroy(event)

    def _captured(self, work: Callable[[], None]) -> Any:
        """Capture work and return the graph's builder, which is no longer capturing.

        The builder has a stream of its own: a capture that cannot be ended leaves the main stream usable.
        """
        builder = self._device.create_graph_builder()
        builder.begin_building(_CAPTURE_MODE)
        try:
            self._enter(builder, work)
            builder.end_building()
        except BaseException:
            self._abandon(builder)
            raise
        return builder

    def _abandon(self, builder: Any, parent: Any = None) -> None:
        """End a capture that failed and destroy its graph; `parent` is that of a loop's body.

        Where that would crash, the builder and its parent are kept alive until the process ends.
        """
        if builder in self._leaked:  # with the body of its loop
            return
        stream, status = builder.stream.handle, self._driver.CUstreamCaptureStatus
        _, found = self._driver.cuStreamIsCapturing(stream)
        if found == status.CU_STREAM_CAPTURE_STATUS_ACTIVE:
            try:
                builder.close()
                return
            except Exception:  # cuda.core has its own exceptions
                pass
        elif found == status.CU_STREAM_CAPTURE_STATUS_INVALIDATED and not parent:
            # The driver destroys the graph, and cuda.core (1.2) crashes when it destroys the graph again.
            self._driver.cuStreamEndCapture(stream)
        for leaked in filter(None, (builder, parent)):
            self._leaked.append(leaked)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(leaked))

    def _enter(self, builder: Any, work: Callable[[], None]) -> None:
        self._builders.append(builder)
        self._streams.append(builder.stream)
        try:
            work()
        finally:
            self._streams.pop()
            self._builders.pop()

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a driver function and return its results without the status.

        Raises `BackendError` unless it succeeds.
        """
        status, *results = getattr(self._driver, function)(*arguments)
        self._check(function, status)
        return results[0] if len(results) == 1 else tuple(results)

    def _check(self, function: str, status: Any) -> None:
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise _failure("the GPU failed", f"{function} returned {status.name}")


class CudaGraph:
    """Captured work. See `device.Launchable`."""

    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph

    def launch(self) -> None:
        with _driver_errors("the GPU failed to start a step"):
            self._graph.launch(self._device._main)


class CudaEvent:
    """An event. See `device.DeviceEvent`."""

    def __init__(self, device: CudaDevice) -> None:
        self._device, self._destroy = device, device._driver.cuEventDestroy
        self._event = device._call("cuEventCreate", device._event_flags)
        device._call("cuEventRecord", self._event, device._main.handle)

    def wait(self) -> None:
        self._device._call("cuEventSynchronize", self._event)

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._destroy(self._event)


class CudaKernels:
    """The compiled kernels of one model on one device.

    Variants are tried in order until one loads: a cubin that sets loop conditions, the same as PTX (some drivers
    resolve the condition function only when they compile), then both without conditions, for which the backend unrolls
    its loop.
    """

    def __init__(self, device: CudaDevice, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> None:
        self._device = device
        if macros.get("MATMUL_TYPE") and int(device.architecture.removeprefix("sm")) < _MIN_TENSOR_CORES:
            raise BackendError(
                "16-bit engines need a GPU of compute capability 8.0 or newer, "
                f"{device.name} is {device.architecture}; use precision='fp32' or device='cpu'."
            )
        variants = [("cubin", False), ("ptx", False)]
        if macros["CONDITIONAL"]:
            variants = [("cubin", True), ("ptx", True), *variants]
        self.failures: list[str] = []  # of the variants before the one that loaded
        for kind, conditional in variants:
            try:
                image = compile_kernels({**macros, "CONDITIONAL": int(conditional)}, device.architecture, kind)
                if kind == "ptx":
                    image = lower_ptx_version(image, device.driver_version)
                self._functions = device.load_functions(image, entries)
                break
            except BackendError as error:
                self.failures.append(f"{kind}{' with conditions' if conditional else ''}: {error}")
        else:
            raise BackendError(
                f"no variant of the kernels can be loaded: {' '.join(self.failures)} Update the NVIDIA driver, or run "
                "`nemostream doctor` for details."
            )
        self.conditional = conditional
        self.format = kind  # for reports

    def launch(self, entry: str, grid: tuple[int, int, int], step: np.void) -> None:
        # The driver copies the argument before it returns.
        argument = np.array([step])
        pointers = np.array([argument.ctypes.data], np.uint64)
        threads = kernels.BLOCK
        stream = self._device.stream
        self._device._call(
            "cuLaunchKernel", self._functions[entry], *grid, threads, 1, 1, 0, stream, pointers.ctypes.data, 0
        )


@contextlib.contextmanager
def _driver_errors(problem: str) -> Iterator[None]:
    """Raise `BackendError` for cuda.core's exceptions."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        raise _failure(problem, str(error)) from error


def _failure(problem: str, cause: str) -> BackendError:
    """Return the error for a cause that contains the name of a driver error, with the remedy if there is one."""
    message = f"{problem}: {cause.rstrip('.')}"
    if any(f"CUDA_ERROR_{name}" in cause for name in _DEVICE_LOST):
        message += "; no GPU call of this process can succeed any more, restart it"
    elif "CUDA_ERROR_OUT_OF_MEMORY" in cause:
        message += "; choose a smaller capacity or max_batch, or end other processes that use the GPU"
    return BackendError(f"{message}.")


def compile_kernels(
    macros: Mapping[str, int | str], architecture: str, kind: str = "cubin", source: str | None = None
) -> bytes:
    """Return the kernels compiled for an architecture ("sm90") as "cubin" or "ptx", from the disk cache if possible.

    `source` is another translation unit than that of the backend's kernels.
    Needs NVRTC but no GPU. Raises `BackendError` with the compiler's log, or if NVRTC is missing.
    """
    try:
        from cuda.bindings import nvrtc

        status, *release = nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings load the library on the first call, and have their own exceptions
        raise BackendError(
            f"NVRTC, which compiles the GPU kernels, is missing ({error}): {install_command('gpu')}."
        ) from error
    options = [f"-arch={architecture.replace('sm', 'sm_')}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    text = _source() if source is None else source
    key = hashlib.sha256("\0".join([text, kind, repr(release), *options]).encode()).hexdigest()[:32]
    cached = cache_folder("kernels") / f"{key}.{kind}"
    check_private(cached.parent)  # its files run on the device
    try:
        return read_regular(cached, 64 * MIB)
    except (OSError, ValueError):
        pass
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), b"nemostream.cu", 0, None, None)
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytes(max(2, size))  # CPython shares all objects of one byte, and NVRTC writes into this one
        nvrtc.nvrtcGetProgramLog(program, log)
        message = log.rstrip(b"\0 \n").decode(errors="replace")
        raise BackendError(f"NVRTC cannot compile the kernels for {architecture} ({status.name}):\n{message}")
    name = "CUBIN" if kind == "cubin" else "PTX"
    _, size = getattr(nvrtc, f"nvrtcGet{name}Size")(program)
    image = bytes(size)
    getattr(nvrtc, f"nvrtcGet{name}")(program, image)
    nvrtc.nvrtcDestroyProgram(program)
    _write_cache(cached, image)
    return image


def lower_ptx_version(ptx: bytes, driver_version: int) -> bytes:
    """Return PTX whose `.version` a driver reads; `driver_version` is 13000 for CUDA 13.0.

    NVRTC declares the version of its own release, which older drivers reject even if the kernels need nothing of it. A
    driver reads every version that its GPUs need.
    """
    from cuda.bindings import utils

    major, minor = map(int, utils.get_ptx_ver(ptx.decode(errors="replace")).split("."))
    for number in range(10 * major + minor, 69, -1):
        version = f"{number // 10}.{number % 10}"
        try:
            needed = utils.get_minimal_required_cuda_ver_from_ptx_ver(version)
        except ValueError:  # no such version
            continue
        if needed <= driver_version:
            return with_ptx_version(ptx, version)
    return ptx


def with_ptx_version(ptx: bytes, version: str) -> bytes:
    """Return PTX that declares `version` ("8.5"). Its instructions do not change."""
    return re.sub(rb"(\.version\s+)[0-9.]+", rb"\g<1>" + version.encode(), ptx, count=1)


@functools.cache
def _source() -> str:
    return kernels.source()


def _write_cache(path: Path, image: bytes) -> None:
    """Write a cache file atomically. Errors are ignored: they only cost another compilation next time."""
    try:
        make_private(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(image)
        os.replace(file.name, path)
    except (OSError, BackendError):
        pass
