"""The output of `nemostream doctor`: which backends work on this machine, and how to install the others."""

from __future__ import annotations

import ctypes
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape

from nemostream.errors import NemostreamError
from nemostream.extras import install_command


@dataclass(frozen=True)
class Finding:
    """The state of one component."""

    state: str  # "works" (tested), "installed" (found, not tested), "missing" or "broken"
    detail: str  # version, error, or the command that installs it


# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_COMPUTE_CAPABILITY = (75, 76)
_COLOURS = {"works": "green", "installed": "cyan", "missing": "yellow", "broken": "red"}


def check_machine(as_json: bool = False) -> bool:
    """Print the state of every backend and how to install missing ones. Return whether any backend works."""
    checks: dict[str, Callable[[], Finding]] = {
        "ONNX Runtime, CPU": _check_onnxruntime_cpu,
        "int8 operators": _check_int8_operators,
        "ONNX Runtime, CUDA": _check_onnxruntime_cuda,
        "TensorRT": lambda: _check_library("tensorrt", "tensorrt"),
        "TensorRT for RTX": _check_tensorrt_rtx,
        "CUDA for Python": _check_cuda_python,
        "NVIDIA driver": _check_driver,
        "building engines": lambda: _check_library("onnx", "build"),
        "exporting": _check_export,
        "microphone": lambda: _check_library("sounddevice", "mic"),
    }
    return _print_json(checks) if as_json else _print_lines(checks)


def _print_json(checks: dict[str, Callable[[], Finding]]) -> bool:
    findings = {name: check() for name, check in checks.items()}
    works = any(finding.state == "works" for finding in findings.values())
    report = {
        "nemostream": version("nemostream"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "works": works,
        "checks": [{"name": name, **asdict(finding)} for name, finding in findings.items()],
    }
    print(json.dumps(report, indent=2))
    return works


def _print_lines(checks: dict[str, Callable[[], Finding]]) -> bool:
    """Print each finding as soon as it is known, without wrapping, so that commands can be copied."""
    console = Console(highlight=False)
    console.print(
        f"nemostream {version('nemostream')}, Python {platform.python_version()}, {platform.platform()}", soft_wrap=True
    )
    works = False
    for name, check in checks.items():
        finding = check()
        works = works or finding.state == "works"
        state = f"[{_COLOURS[finding.state]}]{finding.state:9}[/]"
        console.print(f"{name:18}  {state}  {escape(finding.detail)}", soft_wrap=True)
    console.print(
        "A CPU needs nothing else. A GPU needs a driver, CUDA for Python, and engines built by `nemostream build` with "
        "TensorRT, TensorRT for RTX or ONNX Runtime CUDA. The GPU backend has not been tested on a GPU yet.",
        soft_wrap=True,
    )
    return works


def _check_onnxruntime_cpu() -> Finding:
    """Transcribe a second of silence with the packaged bundle."""
    try:
        import numpy as np
        import onnxruntime

        import nemostream

        with nemostream.load(capacity=1) as model:
            model.transcribe(np.zeros(16000, np.float32))
    except NemostreamError as error:
        return Finding("broken", str(error))
    except Exception as error:  # a missing or broken library; the type depends on the library
        return Finding("broken", f"{_first_line(error)}: {install_command()} --force-reinstall")
    return Finding("works", f"onnxruntime {onnxruntime.__version__}; the packaged model runs")


def _check_int8_operators() -> Finding:
    """Name the instruction set that int8 engines use on this CPU."""
    from nemostream.runtime.backends import operators

    found, otherwise = operators.compiled(), "ONNX Runtime's own operators are used"
    if found is None:
        install = f"install a C compiler, then {install_command()} --force-reinstall"
        return Finding("missing", f"not compiled, {otherwise}: {install}")
    if name := operators.select(found, None):
        return Finding("installed", f"with {name.upper()} instructions")
    return Finding("installed", f"no code for this processor (AVX-512 VNNI is needed), {otherwise}")


def _check_onnxruntime_cuda() -> Finding:
    try:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return Finding("installed", f"onnxruntime {onnxruntime.__version__} with the CUDA provider")
    except Exception as error:
        return Finding("broken", _first_line(error))
    # Both packages install into the folder `onnxruntime`, so the GPU package must overwrite the other one.
    command = f"{install_command('cuda')} && pip install --force-reinstall --no-deps onnxruntime-gpu"
    return Finding("missing", command)


def _check_library(module: str, extra: str) -> Finding:
    try:
        found = import_module(module)
    except ModuleNotFoundError:
        return Finding("missing", install_command(extra))
    except Exception as error:  # installed, but a library that it needs is missing
        return Finding("broken", f"{module} cannot be imported ({_first_line(error)})")
    return Finding("installed", f"{module} {getattr(found, '__version__', '')}".rstrip())


def _check_tensorrt_rtx() -> Finding:
    """Compare the architectures that the library lists with the first GPU, the one that the GPU backend uses."""
    finding = _check_library("tensorrt_rtx", "tensorrt-rtx")
    try:
        gpu = next(iter(_gpus()[1]), None)
    except (OSError, RuntimeError):
        gpu = None
    if finding.state != "installed" or gpu is None:
        return finding
    from nemostream.engine.tensorrt import architectures, unsupported_gpu

    library = import_module("tensorrt_rtx")
    if gpu.architecture in architectures(library):
        return Finding("installed", f"{finding.detail}, for {gpu.architecture}")
    return Finding("broken", unsupported_gpu(library, f"{gpu.name} ({gpu.architecture})"))


def _check_cuda_python() -> Finding:
    versions = []
    for module, package in (("cuda.bindings", "cuda-bindings"), ("cuda.core", "cuda-core")):
        finding = _check_library(module, "gpu")
        if finding.state != "installed":
            return finding
        versions.append(f"{package} {version(package)}")
    return Finding("installed", ", ".join(versions))


def _check_driver() -> Finding:
    """Query the driver itself; installed libraries do not show whether there is a GPU."""
    try:
        cuda_version, gpus = _gpus()
    except OSError:
        return Finding("missing", "no NVIDIA driver (libcuda); install NVIDIA's driver 580 or newer for CUDA 13")
    except RuntimeError as error:
        return Finding(
            "broken", f"the driver is installed but returns {error}; check that a GPU is visible to this process"
        )
    names = ", ".join(f"{gpu.name} ({gpu.architecture})" for gpu in gpus)
    return Finding("installed", f"CUDA {cuda_version}: {names or 'no GPU'}")


def has_gpu() -> bool:
    """Return whether the NVIDIA driver is installed and finds a GPU."""
    try:
        return bool(_gpus()[1])
    except (OSError, RuntimeError):
        return False


@dataclass(frozen=True)
class _Gpu:
    name: str
    architecture: str  # "sm89"


def _gpus() -> tuple[str, list[_Gpu]]:
    """Return the driver's CUDA version and the GPUs.

    Raises `OSError` without a driver, `RuntimeError` if the driver returns an error.
    """
    cuda = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    number, count = ctypes.c_int(), ctypes.c_int()
    code = cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(number)) or cuda.cuDeviceGetCount(ctypes.byref(count))
    name, capability = ctypes.create_string_buffer(256), (ctypes.c_int(), ctypes.c_int())
    gpus = []
    for ordinal in range(0 if code else count.value):
        code = code or cuda.cuDeviceGetName(name, len(name), ordinal)
        for value, attribute in zip(capability, _COMPUTE_CAPABILITY, strict=True):
            code = code or cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, ordinal)
        gpus.append(_Gpu(name.value.decode(errors="replace"), f"sm{capability[0].value}{capability[1].value}"))
    if code:
        raise RuntimeError(f"CUDA error {code}")
    return f"{number.value // 1000}.{number.value % 1000 // 10}", gpus


def _check_export() -> Finding:
    """Read the packages' metadata, because importing NeMo takes half a minute."""
    versions = []
    for package in ("onnx", "pyyaml", "huggingface_hub", "nemo_toolkit", "transformers"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            if package in ("onnx", "pyyaml"):
                return Finding("missing", f"{package}: {install_command('export')}")
    return Finding("installed", ", ".join(versions))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
