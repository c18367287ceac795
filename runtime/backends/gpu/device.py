"""Device interface of the GPU backend: memory, kernels, and capture of a step into one launch.

`cuda.CudaDevice` is the implementation. Tests use another that runs the same kernel sources on a CPU
(`tests/simt/host_device.py`), so that slots, buckets, host buffers, and the decoding loop with its fallbacks are tested
without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import BackendError


class OutOfMemory(BackendError):
    """The device cannot allocate `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.amount = f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size} bytes"
        super().__init__(f"the GPU is out of memory: {self.amount} cannot be allocated.")


class Launchable(Protocol):
    """Captured work."""

    def launch(self) -> None:
        """Queue the captured work."""
        ...


class DeviceEvent(Protocol):
    """A point in the device's queue."""

    def wait(self) -> None:
        """Block until all work queued before the event is done. Raises `BackendError` if any of it failed."""
        ...


class Kernels(Protocol):
    """The compiled kernels of one model."""

    conditional: bool  # whether they can end a loop on the device
    failures: list[str]  # errors of the preferred variants that could not be loaded

    def launch(self, entry: str, grid: tuple[int, int, int], step: np.void) -> None:
        """Queue the kernel `entry` with `BLOCK` threads per block and the struct `Step` as its argument."""
        ...


class Device(Protocol):
    """One device with one queue. Operations run in the order of the calls, `close` included.

    Addresses are integers. Every method may raise `BackendError`.
    """

    name: str
    architecture: str  # "sm90"

    @property
    def free_bytes(self) -> int:
        """Memory that can still be allocated."""
        ...

    def make_current(self) -> None:
        """Make the device current in the calling thread. Cheap if it already is."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate zeroed device memory, aligned to 256 bytes, freed by `close`. Raises `OutOfMemory`."""
        ...

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """Allocate zeroed host memory that kernels access at the same address, freed by `close`."""
        ...

    def write(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array to the device and wait for the copy."""
        ...

    def read(self, address: int, array: NDArray[Any]) -> None:
        """Wait for all queued work, then fill `array` from the device."""
        ...

    def kernels(self, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> Kernels:
        """Compile and load the kernels `entries` with the given preprocessor macros."""
        ...

    def capture(self, work: Callable[[], None]) -> Launchable:
        """Capture what `work` queues, without running it."""
        ...

    def condition(self) -> int:
        """Create a condition for `loop` while capturing. A kernel sets its handle to 0 to end the loop."""
        ...

    def loop(self, condition: int, work: Callable[[], None]) -> None:
        """Capture a loop over `work`; the condition is checked before each iteration.

        `work` is called more than once.
        """
        ...

    def record_event(self) -> DeviceEvent:
        """Record an event at the end of the queue."""
        ...

    def elapsed_ms(self, work: Iterable[Callable[[], None]]) -> float:
        """Run functions that queue work, wait for it, and return the milliseconds it took on the device."""
        ...

    def close(self) -> None:
        """Wait for the queue and free all memory."""
        ...
