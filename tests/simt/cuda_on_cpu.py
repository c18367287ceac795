"""CUDA kernels on a CPU, for tests: compiles a kernel source with g++ against `cuda_on_cpu.h` and launches its entries.

    unit = compile_for_cpu(source, {"VOCAB": 12})
    unit.launch("join", grid=(3, 1, 1), block=(128, 1, 1), arguments=[array, 7, np.float32(0.5)])

Arguments are numpy arrays (their address), numpy scalars (their bytes), Python ints (32 bit) and floats (32 bit).
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
CACHE = cache_folder("simt")  # not in a folder that others can write to: what is in it is loaded
MISSING = shutil.which("g++") is None


class Unit:
    """One compiled source."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def launch(
        self, entry: str, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], order: int = 0
    ) -> None:
        """Run a kernel to its end. `order` other than 0 shuffles threads and blocks."""
        held = [_boxed(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(box.ctypes.data for box in held))
        self._library.simt_order(ctypes.c_uint(order))
        function = getattr(self._library, f"launch_{entry}")
        function((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), pointers)


def _boxed(argument: Any) -> np.ndarray:
    """An array of one element whose bytes are the argument as the kernel takes it."""
    if isinstance(argument, np.ndarray):
        return np.array([argument.ctypes.data], np.uint64)
    if isinstance(argument, np.generic):
        return np.array([argument])
    return np.array([argument], np.int32 if isinstance(argument, int) else np.float32)


def compile_for_cpu(source: str, defines: Mapping[str, Any], entries: Sequence[str]) -> Unit:
    """Compile (or find again) a source with the macros given; `entries` are the kernels that can be launched."""
    text = '#include "cuda_on_cpu.h"\n' + source + "\n" + "".join(f"SIMT_ENTRY({entry})\n" for entry in entries)
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-D_FORTIFY_SOURCE=0", "-ffp-contract=off", f"-I{HERE}"]
    flags += [f"-D{name}={value}" for name, value in defines.items()]
    key = hashlib.sha256("\0".join([text, (HERE / "cuda_on_cpu.h").read_text(), *flags]).encode()).hexdigest()[:24]
    check_private(CACHE)
    library = CACHE / f"{key}.so"
    if not library.exists():
        make_private(CACHE)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            file, made = Path(folder) / "unit.cpp", Path(folder) / "unit.so"
            file.write_text(text)
            done = subprocess.run(["g++", *flags, "-o", str(made), str(file)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"g++ does not compile the kernels:\n{done.stderr}")
            made.replace(library)
    return Unit(library)
