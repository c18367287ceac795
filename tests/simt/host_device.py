"""`gpu.device.Device` on the CPU: the kernels run through `cuda_on_cpu.h`, the encoder through ONNX Runtime.

It checks what a GPU does not report: work is queued and runs only when the host waits for it, a capture runs nothing, a
thread must make the device current before it calls, and memory that is read or written must have been allocated.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from cuda_on_cpu import compile_for_cpu
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError
from nemostream.runtime.backends.gpu import kernels

Work = Callable[[], None]
MARGIN = 0xFF  # bytes of it are NaN in every floating-point type


def surrounded(size: int) -> tuple[NDArray[np.uint8], tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Return an aligned array of zeros, and the memory before and after it, which is filled with `MARGIN`."""
    align = kernels.ALIGNMENT
    raw = np.zeros(size + 3 * align, np.uint8)
    begin = align + -raw.ctypes.data % align
    margins = raw[begin - align : begin], raw[begin + size :][:align]
    for margin in margins:
        margin[:] = MARGIN
    return raw[begin : begin + size], margins


class HostDevice:
    """A simulated device. `order` other than 0 shuffles threads and blocks (`cuda_on_cpu`).

    With `conditional=False` the driver has no conditional nodes, with `capturable=False` it cannot capture.
    """

    name, architecture = "a GPU simulated on the CPU", "sm00"

    def __init__(
        self, free_bytes: int = 1 << 33, conditional: bool = True, capturable: bool = True, order: int = 0
    ) -> None:
        self.free_bytes = free_bytes
        self.conditional, self.capturable, self.order = conditional, capturable, order
        self.thread = threading.get_ident()
        self.threads: set[int] = set()  # that used the device
        self.arrays: dict[int, NDArray[np.uint8]] = {}
        self._margins: list[tuple[NDArray[np.uint8], ...]] = []  # around each array
        self.closed = False
        self.launches: list[str] = []  # names of the kernels run
        self.grids: dict[str, tuple[int, int, int]] = {}  # of the last launch of each
        self.steps: deque[np.void] = deque(maxlen=1000)  # arguments of the last launches
        self.queued = 0  # number of launches by the host
        self._queue: deque[Work] = deque()
        self._finished = 0  # work that has left the queue
        self._capture: list[Work] | None = None
        self._conditions: list[NDArray[np.uint32]] = []

    def make_current(self) -> None:
        self.thread = threading.get_ident()

    def allocate(self, size: int) -> int:
        return self.allocate_host(size).ctypes.data

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        self._check()
        array, margins = surrounded(size)
        self.arrays[array.ctypes.data] = array
        self._margins.append(margins)
        return array

    def write(self, address: int, array: NDArray[Any]) -> None:
        self.drain()
        self.view(address, array.shape, array.dtype)[...] = array

    def read(self, address: int, array: NDArray[Any]) -> None:
        self.drain()
        array[...] = self.view(address, array.shape, array.dtype)

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return device memory as an array. Asserts that it is allocated."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for start, array in self.arrays.items():
            if start <= address and address + size <= start + len(array):
                return array[address - start :][:size].view(dtype).reshape(shape)
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated")

    def kernels(self, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> HostKernels:
        return HostKernels(self, macros, entries)

    def capture(self, work: Work) -> HostGraph:
        self._check()
        assert self._capture is None, "captures do not nest"
        if not self.capturable:
            raise BackendError("this device cannot capture.")
        self._capture = []
        try:
            work()
            return HostGraph(self, self._capture)
        finally:
            self._capture = None

    def condition(self) -> int:
        assert self._capture is not None
        self._conditions.append(np.zeros(1, np.uint32))
        return self._conditions[-1].ctypes.data

    def loop(self, condition: int, work: Work) -> None:
        outer, body = self._capture, []
        assert outer is not None
        for captured in ([], body):  # first a plain capture, which is discarded, as on a GPU
            self._capture = captured
            work()
        self._capture = outer
        value = ctypes.c_uint32.from_address(condition)

        def run() -> None:
            for turn in itertools.count():
                if not value.value:
                    return
                assert turn < 10_000, "the loop does not end"
                for step in body:
                    step()

        outer.append(run)

    def record_event(self) -> HostEvent:
        self._check()
        return HostEvent(self)

    def elapsed_ms(self, work: Iterable[Work]) -> float:
        start = time.perf_counter()
        for run in work:
            run()
        self.drain()
        return 1000 * (time.perf_counter() - start)

    def close(self) -> None:
        with contextlib.suppress(BackendError):
            self.drain()
        self.closed = True
        self.arrays.clear()

    # -- for tests, kernels and encoders ---------------------------------------------------------------------------

    def queue(self, work: Work) -> None:
        self._check()
        if self._capture is not None:
            self._capture.append(work)
        else:
            self.queued += 1
            self._queue.append(work)

    @property
    def end(self) -> int:
        """The number of pieces of work that have been queued."""
        return self._finished + len(self._queue)

    def drain(self, end: int | None = None) -> None:
        """Run what was queued while `self.end` was at most `end`; everything if it is None."""
        self._check()
        assert self._capture is None, "waiting during a capture"
        while self._queue and (end is None or self._finished < end):
            work = self._queue.popleft()
            self._finished += 1
            work()
        written = [margin for pair in self._margins for margin in pair if not (margin == MARGIN).all()]
        assert not written, "memory outside the arrays was written"

    def _check(self) -> None:
        assert not self.closed, "the device was used after close"
        assert self.thread == threading.get_ident(), "a thread used the device without making it current"
        self.threads.add(self.thread)


class HostGraph:
    def __init__(self, device: HostDevice, work: list[Work]) -> None:
        self.device, self.work = device, work

    def launch(self) -> None:
        self.device.queue(lambda: [run() for run in self.work] and None)


class HostEvent:
    """An event for which a wait runs only the work that was queued before it."""

    def __init__(self, device: HostDevice) -> None:
        self.device, self.end = device, device.end

    def wait(self) -> None:
        self.device.drain(self.end)


class HostKernels:
    def __init__(self, device: HostDevice, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> None:
        self.conditional = device.conditional and bool(macros["CONDITIONAL"])
        self.failures = [] if device.conditional else ["this device has no conditional nodes"]
        macros = {**macros, "CONDITIONAL": int(self.conditional)}
        self._device, self._unit = device, compile_for_cpu(kernels.source(), macros, entries)
        self._entries = entries

    def launch(self, entry: str, grid: tuple[int, int, int], step: np.void) -> None:
        assert entry in self._entries and min(grid) > 0 and max(grid[1:]) < 65536, (entry, grid)
        step = step.copy()  # a launch copies its argument

        def run() -> None:
            self._device.launches.append(entry)
            self._device.grids[entry] = grid
            self._device.steps.append(step)
            self._unit.launch(entry, grid, (kernels.BLOCK, 1, 1), [step], self._device.order)

        self._device.queue(run)


@functools.lru_cache(maxsize=4)
def open_session(path: Path, modified: int) -> ort.InferenceSession:
    """Return a session of a graph, shared by all encoders of the file: tests create hundreds of them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class OrtEncoder:
    """The bundle's fp32 encoder graph as a `StepEncoder`.

    On a GPU it copies memory to the CPU, which cannot be captured.
    """

    cache_dtype = "float32"

    def __init__(self, bundle: Bundle, chunk: ChunkConfig, device: Any, capturable: bool = True) -> None:
        graph = f"encoder-{chunk.ms}ms"
        path = bundle.file(graph)
        self._session = open_session(path, path.stat().st_mtime_ns)
        self._graph, self._device = bundle.manifest.graphs[graph], device
        self.capturable = capturable and isinstance(device, HostDevice)

    def memory_bytes(self, rows: int) -> int:
        return 0

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Work:
        unaligned = [name for name, address in addresses.items() if address % kernels.ALIGNMENT]
        assert not unaligned, f"TensorRT rejects the addresses of {unaligned}"

        def shape(tensor: Any) -> tuple[int, ...]:
            return tuple(rows if axis == "B" else int(axis) for axis in tensor.shape)

        if not isinstance(self._device, HostDevice):
            return lambda: self._run_copied(addresses, shape)

        def view(tensor: Any) -> NDArray[Any]:
            return self._device.view(addresses[tensor.name], shape(tensor), tensor.dtype)

        inputs = {tensor.name: view(tensor) for tensor in self._graph.inputs}
        outputs = {tensor.name: view(tensor) for tensor in self._graph.outputs if tensor.name != "encoded"}

        def run() -> None:
            for name, value in zip(outputs, self._session.run(list(outputs), inputs), strict=True):
                outputs[name][...] = value

        return lambda: self._device.queue(run)

    def _run_copied(self, addresses: Mapping[str, int], shape: Callable[[Any], tuple[int, ...]]) -> None:
        inputs = {}
        for tensor in self._graph.inputs:
            inputs[tensor.name] = np.empty(shape(tensor), tensor.dtype)
            self._device.read(addresses[tensor.name], inputs[tensor.name])
        names = [tensor.name for tensor in self._graph.outputs if tensor.name != "encoded"]
        for name, value in zip(names, self._session.run(names, inputs), strict=True):
            self._device.write(addresses[name], value)

    def close(self) -> None: ...


class ThreadBoundEncoder(OrtEncoder):
    """An encoder that runs only on the thread that bound it.

    ONNX Runtime's CUDA provider captures its graphs again on every other thread, while streams wait.
    """

    def __init__(self, bundle: Bundle, chunk: ChunkConfig, device: Any) -> None:
        super().__init__(bundle, chunk, device, capturable=False)

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Work:
        enqueue, thread = super().bind(rows, addresses), threading.get_ident()

        def run() -> None:
            if threading.get_ident() != thread:
                raise BackendError("the encoder was bound on another thread.")
            enqueue()

        return run
