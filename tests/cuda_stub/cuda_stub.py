"""A CUDA driver without a GPU (`libcuda.cpp`), on which the real cuda.bindings and cuda.core run.

The driver must be found before `libcuda.so.1` of this machine, and must not be seen by tests that expect no GPU. So the
tests that use it run in another process:

    completed = run_pytest("tests/cuda_stub/driver_cases.py")

That process loads this module as a pytest plugin. It replaces one function of the package: `cuda.compile_kernels`
returns an image with the path of the kernels compiled for the CPU (`tests/simt`), which the driver loads as a module.
The encoder of the tests, `OrtEncoder`, becomes one that can be captured.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import host_device
import numpy as np
import pytest
from host_device import OrtEncoder
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.plans import cache_folder, check_private, make_private

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SONAME = "libcuda.so.1"
NO_COMPILER = shutil.which("g++") is None
NO_CUDA_PYTHON = any(importlib.util.find_spec(name) is None for name in ("cuda", "cuda.core", "cuda.bindings"))
MISSING = NO_COMPILER or NO_CUDA_PYTHON


def build() -> Path:
    """Compile the driver, or find it in the cache. Returns its folder."""
    source = (HERE / "libcuda.cpp").read_text()
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{SONAME}", "-pthread"]
    key = hashlib.sha256("\0".join([source, *flags]).encode()).hexdigest()[:24]
    folder = cache_folder("cuda_stub") / key
    check_private(folder.parent)
    if not (folder / SONAME).exists():
        make_private(folder.parent)
        make_private(folder)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            compiled = Path(temporary) / SONAME
            command = ["g++", *flags, "-o", str(compiled), str(HERE / "libcuda.cpp"), "-ldl"]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode:
                raise RuntimeError(f"g++ cannot compile the CUDA stub:\n{process.stderr}")
            compiled.replace(folder / SONAME)
    return folder


def environment(**settings: int) -> dict[str, str]:
    """Return the environment of a process that uses the driver, with settings such as `DRIVER_VERSION`."""
    paths = [str(HERE), str(HERE.parent / "simt"), os.environ.get("PYTHONPATH", "")]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(build()), os.environ.get("LD_LIBRARY_PATH", "")])),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # importing the plugins of installed packages takes a second
        **{f"CUDA_STUB_{name}": str(value) for name, value in settings.items()},
    }


def run_pytest(
    *arguments: str, small_bundle: Path | None = None, timeout_s: float = 1800, **settings: int
) -> subprocess.CompletedProcess[str]:
    """Run tests in a process that uses the driver. `small_bundle` is the bundle of the fixture of this name."""
    command = [sys.executable, "-m", "pytest", "-p", "cuda_stub", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-q", "-rfEs", *arguments]
    variables = environment(**settings)
    if small_bundle:
        variables["NEMOSTREAM_TEST_BUNDLE"] = str(small_bundle)
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout_s)


# -- in the process that uses the driver -------------------------------------------------------------------------------


class Stub:
    """Control of the driver, see the end of `libcuda.cpp`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(SONAME)
        self._library.cuda_stub_report.restype = ctypes.c_char_p
        self._library.cuda_stub_calls.restype = ctypes.c_long
        self._library.cuda_stub_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]

    @property
    def violations(self) -> list[str]:
        """Misuses of the driver."""
        return self._library.cuda_stub_report(b"violations").decode().splitlines()

    @property
    def notes(self) -> list[str]:
        """Legal calls that the backend should not make."""
        return self._library.cuda_stub_report(b"notes").decode().splitlines()

    @property
    def live(self) -> dict[str, int]:
        """Number of objects of each kind that exist."""
        lines = self._library.cuda_stub_report(b"live").decode().splitlines()
        return {name: int(count) for name, count in map(str.split, lines)}

    def fail(self, function: str, n: int, error: int, sticky: bool = False) -> None:
        """Fail the n-th next call of a function ("*" for any) with an error; every later call too if `sticky`.

        "execute" is the run of a kernel, "capture" a captured operation, which invalidates its capture.
        """
        self._library.cuda_stub_fail(function.encode(), n, error, sticky)

    def calls(self, function: str) -> int:
        """Number of calls since `clear`."""
        return int(self._library.cuda_stub_calls(function.encode()))

    def clear(self) -> None:
        """Forget faults, violations, notes, calls, and the state of a lost device."""
        self._library.cuda_stub_clear()


def image(library: Path, argument_size: int, pointers: Sequence[int]) -> bytes:
    """Return a module for the driver: kernels compiled for the CPU, whose argument has pointers at these bytes."""
    lines = [
        "cuda_stub",
        ".version 8.0",  # read from PTX
        f"library {library}",
        f"argument {argument_size}",
        f"pointers {' '.join(map(str, pointers))}",
    ]
    return "\n".join(lines).encode() + b"\0"


def compile_kernels(macros: Mapping[str, int | str], architecture: str, kind: str = "cubin") -> bytes:
    """Replace `cuda.compile_kernels`: return an image for the driver."""
    from cuda_on_cpu import compile_for_cpu

    from nemostream.runtime.backends.gpu import kernels

    source, fields = kernels.source(), kernels.STEP.fields
    assert fields is not None
    library = compile_for_cpu(source, macros, _entries(source, tuple(macros.items()))).path
    pointers = [fields[name][1] for declared, name in kernels.FIELDS if declared.endswith("*")]
    return image(library, kernels.STEP.itemsize, pointers)


@functools.cache
def _entries(source: str, macros: tuple[tuple[str, Any], ...]) -> list[str]:
    """Return the kernels that a source has with these macros."""
    defines = ["-DCUDA_ON_CPU", "-D__launch_bounds__(...)=", *(f"-D{name}={value}" for name, value in macros)]
    command = ["g++", "-E", "-P", "-x", "c++", *defines, "-"]
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return re.findall(r"__global__\s+void\s+(\w+)\s*\(", text)


def host_function(device: Any, run: Callable[[], None]) -> Callable[[], None]:
    """Return a function that queues `run` on a `CudaDevice`."""
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: run())
    address = ctypes.cast(callback, ctypes.c_void_p).value

    def enqueue() -> None:
        assert callback  # referenced as long as it may be called
        device._call("cuLaunchHostFunc", device.stream, address, 0)

    return enqueue


class StubEncoder(OrtEncoder):
    """The bundle's encoder graph, queued as a host function, which can be captured: device memory is host memory."""

    def __init__(self, bundle: Bundle, chunk: ChunkConfig, device: Any, capturable: bool = True) -> None:
        super().__init__(bundle, chunk, device, capturable)
        self.capturable = capturable

    def bind(self, rows: int, addresses: Mapping[str, int]) -> Callable[[], None]:
        super().bind(rows, addresses)  # checks the addresses

        def view(tensor: Any) -> NDArray[Any]:
            shape = tuple(rows if axis == "B" else int(axis) for axis in tensor.shape)
            size = int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize
            memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(addresses[tensor.name]))
            return memory.view(tensor.dtype).reshape(shape)

        inputs = {tensor.name: view(tensor) for tensor in self._graph.inputs}
        outputs = {tensor.name: view(tensor) for tensor in self._graph.outputs if tensor.name != "encoded"}

        def run() -> None:
            for name, value in zip(outputs, self._session.run(list(outputs), inputs), strict=True):
                outputs[name][...] = value

        return host_function(self._device, run)


# -- pytest plugin -----------------------------------------------------------------------------------------------------


def pytest_configure(config: Any) -> None:
    from nemostream.runtime.backends.gpu import cuda

    cuda.compile_kernels = compile_kernels
    host_device.OrtEncoder = StubEncoder


@pytest.fixture(autouse=True)
def stub() -> Iterator[Stub]:
    """Control of the driver. A test fails if it leaves violations, so tests that provoke them `clear` them."""
    control = Stub()
    control.clear()
    yield control
    violations = control.violations
    control.clear()
    assert not violations, "\n".join(violations)
