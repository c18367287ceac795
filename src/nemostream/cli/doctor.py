"""What a person asks before anything else: what is this bundle, and what runs here?"""

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
from rich.table import Table

from nemostream.bundle import Bundle
from nemostream.errors import NemostreamError
from nemostream.extras import install_command


def describe_json(bundle: Bundle) -> None:
    """Print a bundle's folder, the size of its files and its manifest as JSON."""
    manifest = bundle.manifest
    sizes = {name: bundle.file(name).stat().st_size for name in manifest.graphs}
    print(
        json.dumps(
            {
                "path": str(bundle.path),
                "bytes": {"graphs": sizes, "weights": manifest.weights.bytes},
                "manifest": json.loads(manifest.to_json()),
            },
            indent=2,
        )
    )


def describe(bundle: Bundle) -> None:
    """Print a bundle's manifest for people."""
    manifest, console = bundle.manifest, Console(highlight=False)
    encoder, decoder, features, source = manifest.encoder, manifest.decoder, manifest.features, manifest.checkpoint
    sizes = {name: bundle.file(name).stat().st_size for name in manifest.graphs}
    rows = {
        "model": f"{manifest.name}, {_size(sum(sizes.values()) + manifest.weights.bytes)} in {bundle.path}",
        "audio": f"{features.sample_rate} Hz, {features.mels} mel bins, {features.window}/{features.hop} samples",
        "encoder": f"{encoder.layers} layers, {encoder.d_model} wide, {encoder.heads} heads, "
        f"{encoder.cache} frames of context, x{encoder.subsampling} subsampling",
        "decoder": f"{decoder.layers} LSTM layer(s) of {decoder.hidden}, joint {decoder.joint}, "
        f"{decoder.vocabulary} tokens, at most {decoder.max_symbols} per frame",
        "checkpoint": f"{source.get('source', '?')}, sha256 {source.get('sha256', '?')[:16]}…",
        "made with": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }
    for name, text in rows.items():
        console.print(f"[dim]{name:10}[/dim] {escape(text)}", soft_wrap=True)

    chunks = Table(
        "chunk", "frames", "context", "steps compared", "features", "encoder", title="chunk sizes and parity"
    )
    for chunk in manifest.chunks:
        figures = manifest.parity.get(f"{chunk.ms}ms", {})
        compared = (_difference(figures.get(key)) for key in ("features", "encoder"))
        steps = str(figures.get("steps", "–"))
        chunks.add_row(f"{chunk.ms} ms", str(chunk.frames), f"{chunk.left} frames", steps, *compared)
    console.print(chunks)
    others = (f"{name} {_difference(manifest.parity.get(name))}" for name in ("decoder", "joint"))
    console.print(
        f"Parity is the largest difference from NeMo, fp32, measured while exporting. Also: {', '.join(others)}."
    )

    graphs = Table("graph", "size", "inputs", "outputs", title="graphs")
    for name, graph in manifest.graphs.items():
        graphs.add_row(name, _size(sizes[name]), str(len(graph.inputs)), str(len(graph.outputs)))
    graphs.add_row("weights of all", _size(manifest.weights.bytes), "", "")
    console.print(graphs)


def _difference(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.1e}"


def _size(count: int) -> str:
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


# -- doctor ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    state: str  # "works" (tried), "installed" (there, but nothing here was run on it), "missing", "broken"
    detail: str  # what was found, or the command that mends it


_COLOURS = {"works": "green", "installed": "cyan", "missing": "yellow", "broken": "red"}


def examine(as_json: bool = False) -> bool:
    """Look for every backend, print what works and how to install the rest. Whether speech can be recognised here."""
    console = Console(highlight=False)
    checks: dict[str, Callable[[], Finding]] = {
        "ONNX Runtime, CPU": _onnxruntime_cpu,
        "ONNX Runtime, CUDA": _onnxruntime_cuda,
        "TensorRT": lambda: _library("tensorrt", "tensorrt"),
        "TensorRT for RTX": lambda: _library("tensorrt_rtx", "tensorrt-rtx"),
        "CUDA for Python": _cuda_python,
        "NVIDIA driver": _driver,
        "building engines": lambda: _library("onnx", "build"),
        "exporting": _exporting,
        "microphone": lambda: _library("sounddevice", "mic"),
    }
    if as_json:
        found = {name: check() for name, check in checks.items()}
        works = any(finding.state == "works" for finding in found.values())
        report = {
            "nemostream": version("nemostream"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "works": works,
            "checks": [{"name": name, **asdict(finding)} for name, finding in found.items()],
        }
        print(json.dumps(report, indent=2))
        return works
    console.print(
        f"nemostream {version('nemostream')}, Python {platform.python_version()}, {platform.platform()}", soft_wrap=True
    )
    works = False
    for name, check in checks.items():
        finding = check()
        works = works or finding.state == "works"
        state = f"[{_COLOURS[finding.state]}]{finding.state:9}[/]"
        console.print(f"{name:18}  {state}  {escape(finding.detail)}", soft_wrap=True)  # lines that can be copied whole
    console.print(
        "A CPU needs nothing else. A GPU needs a driver, CUDA for Python, and engines that `nemostream build` makes "
        "with TensorRT, TensorRT for RTX or ONNX Runtime CUDA; that backend has not yet been run on a GPU.",
        soft_wrap=True,
    )
    return works


def _onnxruntime_cpu() -> Finding:
    """Really recognise a second of silence with the packaged bundle."""
    try:
        import numpy as np
        import onnxruntime

        import nemostream

        with nemostream.load(capacity=1) as model:
            model.transcribe(np.zeros(16000, np.float32))
    except NemostreamError as error:
        return Finding("broken", str(error))
    except Exception as error:  # a library that is missing, or does not load: its own kinds
        return Finding("broken", f"{_sentence(error)}: {install_command()} --force-reinstall")
    return Finding("works", f"onnxruntime {onnxruntime.__version__}; the packaged model runs")


def _onnxruntime_cuda() -> Finding:
    try:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return Finding("installed", f"onnxruntime {onnxruntime.__version__} with the CUDA provider")
    except Exception as error:
        return Finding("broken", _sentence(error))
    # Both packages bring the folder `onnxruntime`; the one that is to run must be laid over the other.
    mend = f"{install_command('cuda')} && pip install --force-reinstall --no-deps onnxruntime-gpu"
    return Finding("missing", mend)


def _library(module: str, extra: str) -> Finding:
    mend = install_command(extra)
    try:
        found = import_module(module)
    except ModuleNotFoundError:
        return Finding("missing", mend)
    except Exception as error:  # there, but a library under it is not
        return Finding("broken", f"{module} does not load ({_sentence(error)})")
    return Finding("installed", f"{module} {getattr(found, '__version__', '')}".rstrip())


def _cuda_python() -> Finding:
    found = []
    for module, package in (("cuda.bindings", "cuda-bindings"), ("cuda.core", "cuda-core")):
        finding = _library(module, "gpu")
        if finding.state != "installed":
            return finding
        found.append(f"{package} {version(package)}")
    return Finding("installed", ", ".join(found))


def _driver() -> Finding:
    """Ask the driver itself: libraries tell nothing of whether there is a GPU."""
    try:
        version, names = _gpus()
    except OSError:
        return Finding("missing", "no NVIDIA driver (libcuda); install NVIDIA's driver 580 or newer for CUDA 13")
    except RuntimeError as error:
        return Finding("broken", f"the driver is there, but returns {error} (is a GPU visible here?)")
    return Finding("installed", f"for CUDA {version}: {', '.join(names) or 'no GPU'}")


def has_gpu() -> bool:
    """Whether the NVIDIA driver is installed and has a GPU."""
    try:
        return bool(_gpus()[1])
    except (OSError, RuntimeError):
        return False


def _gpus() -> tuple[str, list[str]]:
    """The driver's CUDA version and its GPUs. Raises `OSError` without a driver, `RuntimeError` if it fails."""
    cuda = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    number, count = ctypes.c_int(), ctypes.c_int()
    code = cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(number)) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code:
        raise RuntimeError(f"CUDA error {code}")
    name = ctypes.create_string_buffer(256)
    names = [
        name.value.decode(errors="replace") for i in range(count.value) if not cuda.cuDeviceGetName(name, len(name), i)
    ]
    return f"{number.value // 1000}.{number.value % 1000 // 10}", names


def _exporting() -> Finding:
    """By the packages' metadata: importing NeMo takes half a minute."""
    found = []
    for package in ("nemo_toolkit", "torch", "onnx"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return Finding("missing", f"{package}: {install_command('export')}")
    return Finding("installed", ", ".join(found))


def _sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
