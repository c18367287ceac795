"""What the GPU backend asks of a device: memory, our kernels, and a whole step recorded once and launched as one.

`runtime.cuda` is the real one. Tests have another that runs the same kernel sources on a CPU, so that everything
around them (slots, buckets, lanes, the loop and its fallbacks) is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Launchable(Protocol):
    """Recorded work."""

    def launch(self) -> None: ...


class DeviceEvent(Protocol):
    """A moment in the device's work."""

    def wait(self) -> None:
        """Block until all work queued before the mark is done. Raises `BackendError` if any of it failed."""
        ...


class Kernels(Protocol):
    """The compiled kernels of one model."""

    conditional: bool  # whether they can end a loop on the device
    failures: list[str]  # why better kinds of them were not loaded

    def launch(self, entry: str, grid: tuple[int, int, int], step: np.void) -> None:
        """Queue a kernel of `BLOCK` threads a block, with the struct `Step` as its argument."""
        ...


class Device(Protocol):
    """One device with one queue: whatever is asked of it happens in the order it was asked for, `close` included.

    Addresses are integers. Everything may raise `BackendError`.
    """

    name: str
    architecture: str  # "sm90"

    @property
    def free_bytes(self) -> int:
        """Memory that can still be allocated."""
        ...

    def make_current(self) -> None:
        """From now on this thread is the one that uses the device. Cheap if it was before."""
        ...

    def allocate(self, size: int) -> int:
        """Zeroed device memory, until `close`."""
        ...

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """Zeroed host memory that kernels reach at the same address, until `close`."""
        ...

    def write(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array to the device; done when this returns."""
        ...

    def read(self, address: int, array: NDArray[Any]) -> None:
        """Fill an array from the device, when the work queued before is done."""
        ...

    def kernels(self, macros: Mapping[str, int | str], entries: tuple[str, ...]) -> Kernels: ...

    def record(self, work: Callable[[], None]) -> Launchable:
        """Run `work`, which only queues; nothing of it happens until the result is launched."""
        ...

    def condition(self) -> int:
        """While recording: the handle that a kernel may set to 0 to end a `loop`."""
        ...

    def loop(self, condition: int, work: Callable[[], None]) -> None:
        """While recording: `work` again and again as long as the condition, asked before each time, is not 0."""
        ...

    def mark(self) -> DeviceEvent: ...

    def close(self) -> None: ...
