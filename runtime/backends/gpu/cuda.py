"""An NVIDIA GPU as a `runtime.device.Device`, by cuda-python alone.

Kernels are compiled by NVRTC when they are first needed and kept on disk. A recorded step is a CUDA graph; its decoding
loop is a WHILE conditional node (driver 550 or newer), whose body the device runs again without asking the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import BackendError
from nemostream.extras import install_command
from nemostream.plans import cache_folder, check_private, make_private
from nemostream.runtime.backends.gpu import kernels
from nemostream.untrusted import MIB, read_regular

_OLDEST_CORE = (1, 2)
# What other threads do with the GPU, and cuda.core itself while it adds a loop, would end a stricter recording.
_MODE = "relaxed"


class CudaDevice:
    """The GPU of that ordinal. Raises `BackendError` if there is none, or if cuda-python is missing."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import driver
            from cuda.core import Device, __version__
        except ImportError as error:
            raise BackendError(f"a GPU needs cuda-python ({error}): {install_command('gpu')}.") from error
        if tuple(map(int, __version__.split(".")[:2])) < _OLDEST_CORE:
            raise BackendError(f"cuda-core {__version__} is too old: {install_command('gpu')}.")
        self._driver = driver
        self._adopted = threading.local()  # a context is current in a thread
        self._closed = False
        try:
            self._device = Device(ordinal)
            self._device.set_current()
            self._adopted.here = True
            self._main = self._device.create_stream()
        except Exception as error:  # cuda.core raises its own kinds, and others where there is no driver at all
            raise BackendError(f"no NVIDIA GPU can be used here ({error}); `nemostream doctor` tells more.") from error
        capability = self._device.compute_capability
        self.name = str(self._device.name)
        self.architecture = f"sm{capability.major}{capability.minor}"
        self._streams = [self._main]  # the innermost builder's is where work is queued
        self._builders: list[Any] = []
        self._conditions: dict[int, Any] = {}
        self._memory: list[Any] = []
        self._host_memory: list[int] = []

    @property
    def stream(self) -> int:
        """Handle of the stream that work is queued on now; while recording, the one that is recorded."""
        return int(self._streams[-1].handle)

    @property
    def free_bytes(self) -> int:
        free, _ = self._call("cuMemGetInfo")
        return int(free)

    def make_current(self) -> None:
        if not getattr(self._adopted, "here", False):
            self._device.set_current()
            self._adopted.here = True

    def allocate(self, size: int) -> int:
        memory = self._call("cuMemAlloc", max(size, 16))
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
        self._call("cuStreamSynchronize", self.stream)  # the array may go, and pageable memory was copied anyway

    def read(self, address: int, array: NDArray[Any]) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self.stream)
        self._call("cuStreamSynchronize", self.stream)

    def kernels(self, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> CudaKernels:
        return CudaKernels(self, macros, entries)

    def record(self, work: Callable[[], None]) -> CudaGraph:
        builder = self._main.create_graph_builder()
        try:
            builder.begin_building(_MODE)
            self._enter(builder, work)
            graph = builder.end_building().complete()
            graph.upload(self._main)
        except Exception as error:  # ours, or cuda.core's own kinds
            self._abandon(builder)
            if isinstance(error, BackendError):
                raise
            raise BackendError(f"the step cannot be recorded as a CUDA graph: {error}") from error
        return CudaGraph(self, graph)

    def condition(self) -> int:
        condition = self._builders[-1].create_condition(default_value=0)
        handle = int(condition.handle)
        self._conditions[handle] = condition
        return handle

    def loop(self, condition: int, work: Callable[[], None]) -> None:
        body = self._builders[-1].while_loop(self._conditions.pop(condition))
        body.begin_building(_MODE)
        try:
            self._enter(body, work)
        except BaseException:
            with contextlib.suppress(Exception):
                body.close()  # before the recording that it is part of
            raise
        body.end_building()

    def mark(self) -> CudaEvent:
        return CudaEvent(self, self._main.record())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._driver.cuStreamSynchronize(self.stream)  # whatever it says: everything goes now
        for memory in self._memory:
            self._driver.cuMemFree(memory)
        for address in self._host_memory:
            self._driver.cuMemFreeHost(address)
        self._memory.clear()
        self._host_memory.clear()
        self._main.close()

    def _abandon(self, builder: Any) -> None:
        """The stream must not go on recording, or no other kind of loop could be tried."""
        _, capture = self._driver.cuStreamIsCapturing(self._main.handle)
        if capture == self._driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_INVALIDATED:
            # What was recorded is gone, and cuda.core (1.2) crashes when it destroys it once more: let it never.
            self._driver.cuStreamEndCapture(self._main.handle)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(builder))
        else:
            with contextlib.suppress(Exception):
                builder.close()

    def _enter(self, builder: Any, work: Callable[[], None]) -> None:
        self._builders.append(builder)
        self._streams.append(builder.stream)
        try:
            work()
        finally:
            self._streams.pop()
            self._builders.pop()

    def _call(self, function: str, *arguments: Any) -> Any:
        """A driver function; its results without the status, which is raised if it is not success."""
        status, *results = getattr(self._driver, function)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"the GPU failed: {function} says {status.name}.")
        return results[0] if len(results) == 1 else tuple(results)


class CudaGraph:
    def __init__(self, device: CudaDevice, graph: Any) -> None:
        self._device, self._graph = device, graph

    def launch(self) -> None:
        try:
            self._graph.launch(self._device._main)
        except Exception as error:
            raise BackendError(f"the GPU failed to start a step: {error}") from error


class CudaEvent:
    def __init__(self, device: CudaDevice, event: Any) -> None:
        self._device, self._event = device, event

    def wait(self) -> None:
        try:
            self._event.sync()
        except Exception as error:
            raise BackendError(f"the GPU failed in a step: {error}") from error


class CudaKernels:
    """The translation unit of one model on one device.

    What loads is found by trying, newest driver interface first: a cubin that sets loop conditions, the same as PTX (a
    driver that resolves the function only while it compiles), then without conditions, for which the backend unrolls.
    """

    def __init__(self, device: CudaDevice, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> None:
        self._device = device
        wanted = bool(macros["CONDITIONAL"])
        attempts = [("cubin", True), ("ptx", True)] if wanted else []
        self.failures: list[str] = []  # of the attempts before the one that loaded
        for kind, conditional in [*attempts, ("cubin", False), ("ptx", False)]:
            try:
                image = compile_kernels({**macros, "CONDITIONAL": int(conditional)}, device.architecture, kind)
                module = device._call("cuModuleLoadData", image)
                # Some drivers load lazily, and find out only here what is missing.
                find = functools.partial(device._call, "cuModuleGetFunction", module)
                self._functions = {entry: find(entry.encode()) for entry in entries}
                break
            except BackendError as error:
                self.failures.append(f"{kind}{' with conditions' if conditional else ''}: {error}")
        else:
            raise BackendError(f"none of our kernels can be loaded: {' '.join(self.failures)}")
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


def compile_kernels(macros: Mapping[str, int | str], architecture: str, kind: str = "cubin") -> bytes:
    """Our kernels compiled for a GPU ("sm90") as "cubin" or "ptx". Needs NVRTC, not a GPU; kept on disk once done.

    Raises `BackendError` with the compiler's words, or if NVRTC is missing.
    """
    try:
        from cuda.bindings import nvrtc

        status, *release = nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings load the library when they are first asked, and raise their own kinds
        raise BackendError(
            f"NVRTC, which compiles our kernels, is missing ({error}): {install_command('gpu')}."
        ) from error
    options = [f"-arch={architecture.replace('sm', 'sm_')}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in macros.items()]
    text = _source()
    key = hashlib.sha256("\0".join([text, kind, repr(release), *options]).encode()).hexdigest()[:32]
    cached = cache_folder("kernels") / f"{key}.{kind}"
    check_private(cached.parent)  # what is read from it runs on the device
    try:
        return read_regular(cached, 64 * MIB)
    except (OSError, ValueError):
        pass
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), b"nemostream.cu", 0, None, None)
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        words = log.rstrip(b"\0 \n").decode(errors="replace")
        raise BackendError(f"NVRTC does not compile our kernels for {architecture} ({status.name}):\n{words}")
    name = "CUBIN" if kind == "cubin" else "PTX"
    _, size = getattr(nvrtc, f"nvrtcGet{name}Size")(program)
    image = b" " * size
    getattr(nvrtc, f"nvrtcGet{name}")(program, image)
    nvrtc.nvrtcDestroyProgram(program)
    _keep(cached, image)
    return image


@functools.cache
def _source() -> str:
    return kernels.source()


def _keep(path: Path, image: bytes) -> None:
    """Another process may write the same at once; a folder that cannot be written costs a second each time."""
    try:
        make_private(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(image)
        os.replace(file.name, path)
    except (OSError, BackendError):
        pass
