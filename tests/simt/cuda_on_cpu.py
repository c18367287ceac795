"""Run CUDA kernels on a CPU: compile a kernel source with g++ against `cuda_on_cpu.h` and launch its entries.

    unit = compile_for_cpu(source, {"VOCAB": 12})
    unit.launch("join", grid=(3, 1, 1), block=(128, 1, 1), arguments=[array, 7, np.float32(0.5)])

Arguments are numpy arrays (passed by address), numpy scalars (by value), Python ints and floats (32 bit).
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemostream.plans import cache_folder, check_private, make_private

HERE = Path(__file__).parent
CACHE = cache_folder("simt")  # private to this user, because its libraries are loaded
MISSING = shutil.which("g++") is None


class Unit:
    """A compiled source."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self._library = ctypes.CDLL(str(library))
        self._library.simt_problem.restype = ctypes.c_char_p

    def launch(
        self, entry: str, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], order: int = 0
    ) -> None:
        """Run a kernel to completion, with the order of threads and blocks of `cuda_on_cpu.h`.

        Raises `AssertionError` for a use of fences that is undefined on a GPU.
        """
        values = [_as_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        self._library.simt_order(ctypes.c_uint(order))
        function = getattr(self._library, f"launch_{entry}")
        function((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), pointers)
        problem = self._library.simt_problem()
        assert problem is None, f"{entry}: {problem.decode()}"


def _as_value(argument: Any) -> np.ndarray:
    """Return an array of one element whose bytes are the argument as the kernel receives it."""
    if isinstance(argument, np.ndarray):
        return np.array([argument.ctypes.data], np.uint64)
    if isinstance(argument, np.generic):
        return np.array([argument])
    return np.array([argument], np.int32 if isinstance(argument, int) else np.float32)


def compile_for_cpu(source: str, defines: Mapping[str, Any], entries: Sequence[str]) -> Unit:
    """Compile a source with the given macros, or load it from the cache. `entries` are the kernels to launch."""
    text = '#include "cuda_on_cpu.h"\n' + source + "\n" + "".join(f"SIMT_ENTRY({entry})\n" for entry in sorted(entries))
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-D_FORTIFY_SOURCE=0", "-ffp-contract=off", f"-I{HERE}"]
    flags += [f"-D{name}={value}" for name, value in defines.items()]
    key = hashlib.sha256("\0".join([text, (HERE / "cuda_on_cpu.h").read_text(), *flags]).encode()).hexdigest()[:24]
    check_private(CACHE)
    library = CACHE / f"{key}.so"
    if not library.exists():
        make_private(CACHE)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            file, compiled = Path(folder) / "unit.cpp", Path(folder) / "unit.so"
            file.write_text(text)
            process = subprocess.run(["g++", *flags, "-o", str(compiled), str(file)], capture_output=True, text=True)
            if process.returncode:
                raise RuntimeError(f"g++ cannot compile the kernels:\n{process.stderr}")
            compiled.replace(library)
    return Unit(library)
