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
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest

import nemostream
from nemostream.bundle import Bundle, DecoderConfig, EncoderConfig, Manifest
from nemostream.runtime.backends.gpu import kernels

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python")

CACHE_DTYPES = ("float32", "float16", "bfloat16")
# A compilation takes seconds, so the relatives of an architecture that is tested are slow tests.
ARCHITECTURES = [
    "sm80",
    "sm90",
    "sm120",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm86", "sm89", "sm100")),
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
    # At least two bytes: CPython shares all objects of one byte, and NVRTC writes into this one.
    log = bytes(max(2, check(*nvrtc.nvrtcGetProgramLogSize(program))))
    check(*nvrtc.nvrtcGetProgramLog(program, log))
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    image = bytes(check(*getattr(nvrtc, f"nvrtcGet{kind}Size")(program)))
    check(*getattr(nvrtc, f"nvrtcGet{kind}")(program, image))
    nvrtc.nvrtcDestroyProgram(program)
    return image, log.rstrip(b"\0").decode()


@functools.cache
def compile_kernels(architecture: str, cache_dtype: str) -> tuple[bytes, str]:
    return compile_source(kernels.source(), [*options(architecture, cache_dtype), "--ptxas-options=-v"])


def options(architecture: str, cache_dtype: str) -> list[str]:
    macros = kernels.macros(full_size(), cache_dtype, conditional=True)
    defines = [f"-D{name}={value}" for name, value in macros.items()]
    return [f"-arch={architecture.replace('sm', 'sm_')}", "--std=c++17", *defines]


def tool(name: str) -> str:
    """Return the path of a CUDA tool, from a package of NVIDIA's or from PATH; skip the test if there is none."""
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [str(path) for folder in folders or () for path in Path(folder).glob(f"*/bin/{name}")]
    path = found[0] if found else shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} of the CUDA toolkit")
    return path


# -- resources ---------------------------------------------------------------------------------------------------------

# The most registers of a thread and the most bytes of shared memory of a block. A multiprocessor has 65,536 registers:
# six blocks of 256 threads fit with 40 registers, four with 64, two with 128.
REGISTERS = dict.fromkeys(
    ("begin", "features", "gather", "scatter", "start", "finish", "reset", "reset_decoder", "copy", "set_phrases"), 40
) | {"decide": 64}
PRODUCTS = ("join", "lstm_0", "lstm_1", "project")
PRODUCT_REGISTERS = {"float32": 128, "float16": 64, "bfloat16": 64}
PRODUCT_BYTES = {"float32": 16 * (512 + 4) * 4, "float16": 8 * 16 * 33 * 4, "bfloat16": 8 * 16 * 33 * 4}
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
    most_registers = REGISTERS | dict.fromkeys(PRODUCTS, PRODUCT_REGISTERS[cache_dtype])
    most_shared = SHARED_BYTES | dict.fromkeys(PRODUCTS, PRODUCT_BYTES[cache_dtype])
    assert found.keys() == set(kernels.entries(full_size()))
    for name, (registers, shared, stack) in found.items():
        assert registers <= most_registers[name], (name, registers)
        assert shared <= most_shared.get(name, 0), (name, shared)
        assert stack == 0, name


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


def opcode_of(instruction: str) -> str:
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


def count(opcodes: list[str], *prefixes: str) -> int:
    return sum(opcode.startswith(prefixes) for opcode in opcodes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_machine_code(architecture: str, cache_dtype: str, tmp_path: Path) -> None:
    code = disassemble(compile_kernels(architecture, cache_dtype)[0], tmp_path)
    assert code.keys() == set(kernels.entries(full_size()))
    opcodes = {name: [opcode_of(instruction) for instruction in code[name]] for name in code}

    # Products: each vector of four staged elements is stored at once, and loaded at once from each of its arrays. The
    # compiler may move loads before the barrier that precedes the stores.
    store = "STS.128" if cache_dtype == "float32" else "STS.64"
    for name in PRODUCTS:
        staging = list(itertools.chain(*(part for part in split(opcodes[name], "BAR.SYNC") if store in part)))
        elements, loads = 4 * staging.count(store), count(opcodes[name], "LDG.E.128")
        assert 4 * loads == (2 if name == "join" else 1) * elements > 0, (name, loads, elements)
        assert count(staging, "I2F", "MUFU.RCP") == 0, name  # no divisions
        moved = loads - count(staging, "LDG.E.128")
        assert len(staging) + moved <= (7 if name == "join" else 4) * elements, (name, len(staging), elements)
        assert (count(opcodes[name], "HMMA") > 0) == (cache_dtype != "float32"), name

    # Without a label, a block exits after one load.
    for name in ("lstm_0", "lstm_1", "project"):
        before = opcodes[name][: opcodes[name].index("EXIT")]
        assert count(before, "LDG", "BAR", "STS") == 1, (name, before)

    # Loads of a copy are in flight together.
    for name in ("gather", "copy"):
        assert max(count(part, "LDG.E.128") for part in split(opcodes[name], "STG.E.128")) >= 3, name

    # A fence of the device also invalidates the L1 cache, before anything is read.
    for name in ("start", "decide", "finish"):
        fences = split(opcodes[name], "MEMBAR.SC.GPU")[1:]
        assert fences, name
        for after in fences:
            read = next(i for i, opcode in enumerate(after) if opcode.startswith(("LD", "ATOM", "EXIT")))
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
        flags = [f"-arch={architecture}", "--std=c++17"]
        one, _ = compile_source(f"{handle[0]}\n{ours[0]}\n{kernel}", flags)
        other, _ = compile_source(cuda + kernel, flags)
        assert b"cudaGraphSetConditional" in one
        assert one == other


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_ptx_needs_no_newer_version(cache_dtype: str, tmp_path: Path) -> None:
    """Labelled as PTX 9.0, which the first drivers for CUDA 13 read, the PTX assembles."""
    image, _ = compile_source(kernels.source(), options("sm90", cache_dtype), "PTX")
    text, replaced = re.subn(r"^\.version \d+\.\d+$", ".version 9.0", image.rstrip(b"\0").decode(), flags=re.MULTILINE)
    assert replaced == 1
    (tmp_path / "kernels.ptx").write_text(text)
    command = [tool("ptxas"), "-arch=sm_90", "-o", str(tmp_path / "kernels.cubin"), str(tmp_path / "kernels.ptx")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert b"cudaGraphSetConditional" in (tmp_path / "kernels.cubin").read_bytes()
