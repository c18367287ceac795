"""A device that computes nothing, to measure what `GpuBackend` does on the host.

Work that is queued is done at once: only the kernel `finish` has an effect, and writes tokens to the host's output
buffer at the rate of the null backend. Calls of the driver cost nothing here; on a GPU, the launch of a graph and the
events take some microseconds per step in addition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.harness.null_backend import tokens_before
from nemostream.runtime.backends.gpu import kernels

Work = Callable[[], None]


class NullDevice:
    """A `Device`. `launched` is the time of the last launch, `seconds` the time that the device itself has taken."""

    name, architecture, free_bytes = "a device that computes nothing", "sm00", 1 << 50

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        self.launched = self.seconds = 0.0
        self.memory: dict[int, NDArray[np.uint8]] = {}  # by address
        self.captured: list[np.void] | None = None  # arguments of `finish`, while capturing
        self.steps = 0

    def make_current(self) -> None: ...

    def allocate(self, size: int) -> int:
        return self.allocate_host(size).ctypes.data

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        memory = np.zeros(size + kernels.ALIGNMENT, np.uint8)  # pages that nothing writes take no memory
        begin = -memory.ctypes.data % kernels.ALIGNMENT
        aligned = memory[begin : begin + size]
        self.memory[aligned.ctypes.data] = aligned
        return aligned

    def write(self, address: int, array: NDArray[Any]) -> None: ...

    def read(self, address: int, array: NDArray[Any]) -> None:
        array.fill(0)

    def kernels(self, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> _NullKernels:
        return _NullKernels(self)

    def capture(self, work: Work) -> _NullGraph:
        self.captured = []
        try:
            work()
            return _NullGraph(self, self.captured)
        finally:
            self.captured = None

    def condition(self) -> int:
        return 1

    def loop(self, condition: int, work: Work) -> None:
        work()

    def record_event(self) -> _NullEvent:
        return _NullEvent()

    def elapsed_ms(self, work: Iterable[Work]) -> float:
        for run in work:
            run()
        return 0.0

    def close(self) -> None:
        self.memory.clear()

    def finish(self, step: np.void) -> None:
        """Write the tokens of a step to the host's current output buffer, as the kernel does."""
        rows, frames, max_rows = int(step["rows"]), int(step["frames"]), int(step["max_rows"])
        buffer_index = self.steps % 2
        self.steps += 1
        inputs, outputs = (
            self.memory[int(step[f"host_{name}"])][buffer_index * int(step[f"host_{name}_bytes"]) :]
            for name in ("input", "output")
        )
        slots = inputs[: 4 * rows].view(np.int32)
        begin = self.steps * frames + slots.astype(np.int64) * 37
        counts = np.where(slots < 0, 0, tokens_before(begin + frames) - tokens_before(begin))
        row = np.repeat(np.arange(rows, dtype=np.int32), counts)
        head = outputs[: 16 + 4 * max_rows].view(np.int32)
        head[:2] = len(row), 0  # tokens, undecided rows
        tokens = outputs[16 + 4 * max_rows :][: len(row) * kernels.TOKEN.itemsize].view(kernels.TOKEN)
        tokens["row"], tokens["token"], tokens["frame"] = row, 1, self.steps * frames
        tokens["score"], tokens["sum_p_alpha"] = -0.05, 1.2


class _NullKernels:
    conditional, failures = True, list[str]()

    def __init__(self, device: NullDevice) -> None:
        self._device = device

    def launch(self, entry: str, grid: tuple[int, int, int], step: np.void) -> None:
        if entry == "finish" and self._device.captured is not None:
            self._device.captured.append(step.copy())


class _NullGraph:
    def __init__(self, device: NullDevice, finishes: list[np.void]) -> None:
        self._device, self._finishes = device, finishes

    def launch(self) -> None:
        device = self._device
        device.launched = device.clock()
        for step in self._finishes:
            device.finish(step)
        device.seconds += device.clock() - device.launched


class _NullEvent:
    def wait(self) -> None: ...


class NullEncoder:
    """A `StepEncoder` that computes nothing."""

    cache_dtype, capturable = "float16", True

    def memory_bytes(self, rows: int) -> int:
        return 0

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Work:
        return lambda: None

    def close(self) -> None: ...
