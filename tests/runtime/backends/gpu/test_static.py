"""What the compiler makes of the kernels at the sizes of the 0.6B model: resources, machine code, symbols.

Needs NVRTC, and for some tests NVIDIA's disassemblers, but no GPU. Nothing here measures speed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

import nemostream
from nemostream.bundle import Bundle, DecoderConfig, EncoderConfig, Manifest
from nemostream.runtime.backends.gpu import kernels

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")

CACHE_DTYPES = ("float32", "float16", "bfloat16")
# Compilers of one generation of instructions produce similar code; the others are slow tests.
ARCHITECTURES = [
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm86", "sm89", "sm100", "sm120")),
    "sm80",
    "sm90",
]


@functools.cache
def full_size() -> Manifest:
    """Return a manifest with the sizes of the 0.6B model."""
    encoder = EncoderConfig(layers=24, d_model=1024, heads=8, subsampling=8, cache=70, conv_cache=8)
    decoder = DecoderConfig(layers=2, hidden=640, joint=640, vocabulary=1024, max_symbols=10, activation="relu")
    demo = Bundle.open(nemostream.demo_bundle()).manifest
    return dataclasses.replace(demo, encoder=encoder, decoder=decoder)


def compile_source(source: str, options: Iterable[str], kind: str = "CUBIN") -> tuple[bytes, str]:
    """Return the compiled source and the compiler's log."""
    from cuda.bindings import nvrtc

    def check(status: object, *results: object) -> object:
        assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, status
        return results[0] if results else None

    program = check(*nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, None, None))
    flags = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    log = b" " * check(*nvrtc.nvrtcGetProgramLogSize(program))
    check(*nvrtc.nvrtcGetProgramLog(program, log))
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    image = b" " * check(*getattr(nvrtc, f"nvrtcGet{kind}Size")(program))
    check(*getattr(nvrtc, f"nvrtcGet{kind}")(program, image))
    nvrtc.nvrtcDestroyProgram(program)
    return image, log.decode()


@functools.cache
def compile_kernels(architecture: str, cache_dtype: str) -> tuple[bytes, str]:
    macros = kernels.macros(full_size(), cache_dtype, conditional=True)
    options = [f"-arch={architecture.replace('sm', 'sm_')}", "--std=c++17", "--ptxas-options=-v"]
    return compile_source(kernels.source(), [*options, *(f"-D{name}={value}" for name, value in macros.items())])


def tool(name: str) -> str:
    """Return the path of a CUDA tool, from a package of NVIDIA's or from PATH; skip the test if there is none."""
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [str(path) for folder in folders or () for path in Path(folder).glob(f"*/bin/{name}")]
    path = found[0] if found else shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (the package nvidia-cuda-{name})")
    return path


# -- resources ---------------------------------------------------------------------------------------------------------

# The most registers a thread may use and the most bytes of shared memory, by kernel. A multiprocessor has 65,536
# registers: blocks of 256 threads with 40, 64, 80 and 128 registers run six, four, three and two at a time.
REGISTERS = {
    "begin": 40,
    "features": 64,
    "gather": 40,
    "scatter": 64,
    "start": 40,
    "join": 128,
    "decide": 64,
    "lstm_0": 128,
    "lstm_1": 128,
    "project": 128,
    "finish": 40,
    "reset": 40,
    "reset_decoder": 40,
    "set_phrases": 40,
}
TILE_BYTES = {"float32": 16 * (512 + 4) * 4, "float16": 8 * 16 * 33 * 4, "bfloat16": 8 * 16 * 33 * 4}
SHARED_BYTES = {"features": 2 * 512 * 8, "start": 1024, "decide": 8192}


def resources(log: str) -> dict[str, tuple[int, int, int]]:
    """Return registers, bytes of shared memory, and bytes of stack and spills of each kernel, from the log of ptxas."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        stack = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part))
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers, part
        found[name] = (int(registers[1]), int(shared[1]) if shared else 0, stack)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_kernels_stay_within_their_resources(architecture: str, cache_dtype: str) -> None:
    found = resources(compile_kernels(architecture, cache_dtype)[1])
    assert found.keys() == set(kernels.entries(full_size())) == REGISTERS.keys()
    limits = dict.fromkeys(("join", "lstm_0", "lstm_1", "project"), TILE_BYTES[cache_dtype]) | SHARED_BYTES
    for name, (registers, shared, spilled) in found.items():
        assert registers <= REGISTERS[name], (name, registers)
        assert shared <= limits.get(name, 0), (name, shared)
        assert spilled == 0, name


# -- machine code ------------------------------------------------------------------------------------------------------


def disassemble(cubin: bytes, tmp_path: Path) -> dict[str, list[str]]:
    """Return the instructions of each kernel in the order of their addresses."""
    (tmp_path / "kernels.cubin").write_bytes(cubin)
    command = [tool("nvdisasm"), "--print-code", str(tmp_path / "kernels.cubin")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"^\.text\.(?=\w+:)", text, flags=re.MULTILINE)[1:]:
        name, _, code = part.partition(":")
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", code)
    return found


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?\w+\s+", "", instruction).split()[0]


def split(opcodes: list[str], separator: str) -> list[list[str]]:
    """Return the parts of a list between the opcodes that start with `separator`."""
    parts: list[list[str]] = [[]]
    for name in opcodes:
        if name.startswith(separator):
            parts.append([])
        else:
            parts[-1].append(name)
    return parts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_machine_code(architecture: str, cache_dtype: str, tmp_path: Path) -> None:
    code = disassemble(compile_kernels(architecture, cache_dtype)[0], tmp_path)
    assert code.keys() == set(kernels.entries(full_size()))
    opcodes = {name: [opcode(instruction) for instruction in code[name]] for name in code}

    # The rows of a product: each vector of four elements is stored at once, and loaded at once from each of its arrays.
    store = "STS.128" if cache_dtype == "float32" else "STS.64"
    for name, arrays in {"join": 2, "lstm_0": 1, "lstm_1": 1, "project": 1}.items():
        staging = [part for part in split(opcodes[name], "BAR.SYNC") if store in part]
        used = Counter(itertools.chain(*staging))
        loads = sum(count for used_name, count in used.items() if used_name.startswith("LDG.E.128"))
        assert loads == arrays * used[store] > 0, (name, used)
        assert not [used_name for used_name in used if used_name.startswith(("I2F", "MUFU.RCP"))], name  # divisions
        assert sum(used.values()) <= 10 * 4 * used[store], (name, used)
        assert any(used_name.startswith("HMMA") for used_name in opcodes[name]) == (cache_dtype != "float32")

    # Without a label, a block exits after one load.
    for name in ("lstm_0", "lstm_1", "project"):
        before = opcodes[name][: opcodes[name].index("EXIT")]
        assert sum(used_name.startswith(("LDG", "BAR", "STS")) for used_name in before) == 1, (name, before)

    # Loads of a copy are in flight together.
    before, *_ = split(opcodes["gather"], "STG.E.128")
    assert sum(used_name.startswith("LDG.E.128") for used_name in before) >= 4

    # A fence of the device also invalidates the L1 cache, before anything is read.
    for name in ("start", "decide", "finish"):
        fences = split(opcodes[name], "MEMBAR.SC.GPU")[1:]
        assert fences, name
        for after in fences:
            read = next(i for i, used_name in enumerate(after) if used_name.startswith(("LD", "ATOM", "EXIT")))
            assert "CCTL.IVALL" in after[:read], (name, after)


# -- symbols and PTX ---------------------------------------------------------------------------------------------------


def test_condition_function_is_declared_as_in_cuda() -> None:
    """The cubin is the same, byte for byte, with the declaration of `cuda_device_runtime_api.h`."""
    ours = re.search(r'^extern "C" __device__ void cudaGraphSetConditional\(.*\);$', kernels.source(), re.MULTILINE)
    handle = re.search(r"^typedef .* cudaGraphConditionalHandle;$", kernels.source(), re.MULTILINE)
    assert ours and handle
    cuda = """
        typedef __device_builtin__ unsigned long long cudaGraphConditionalHandle;
        extern "C" {
        extern __device__ __cudart_builtin__ void cudaGraphSetConditional(
            cudaGraphConditionalHandle handle, unsigned int value);
        }
    """
    kernel = """
        extern "C" __global__ void set(cudaGraphConditionalHandle handle, int value) {
            cudaGraphSetConditional(handle, value > 0);
        }
    """
    for architecture in ("sm_80", "sm_90", "sm_120"):
        options = [f"-arch={architecture}", "--std=c++17"]
        one, _ = compile_source(f"{handle[0]}\n{ours[0]}\n{kernel}", options)
        other, _ = compile_source(cuda + kernel, options)
        assert b"cudaGraphSetConditional" in one
        assert one == other
