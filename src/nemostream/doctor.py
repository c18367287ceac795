"""What a person asks before anything else: what is this bundle, and what runs here?"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from nemostream.errors import NemostreamError
from nemostream.spec import Bundle

Finding = tuple[bool, str]  # works here, and what was found or what would mend it


def describe(bundle: Bundle) -> None:
    """Print a bundle's manifest for people."""
    manifest, console = bundle.manifest, Console(highlight=False)
    encoder, decoder, features = manifest.encoder, manifest.decoder, manifest.features
    size = manifest.weights.bytes + sum((bundle.path / g.file).stat().st_size for g in manifest.graphs.values())
    console.print(f"[bold]{manifest.name}[/bold]  {bundle.path}  {size / 1e6:.1f} MB")
    rows = {
        "audio": f"{features.sample_rate} Hz, {features.mels} mel bins, {features.window}/{features.hop} samples",
        "encoder": f"{encoder.layers} layers, {encoder.d_model} wide, {encoder.heads} heads, "
        f"{encoder.cache} frames of context, x{encoder.subsampling} subsampling",
        "decoder": f"{decoder.layers} LSTM layer(s) of {decoder.hidden}, joint {decoder.joint}, "
        f"{decoder.vocabulary} tokens, at most {decoder.max_symbols} per frame",
        "checkpoint": f"{manifest.checkpoint.get('source')}  sha256 {manifest.checkpoint.get('sha256', '?')[:16]}…",
        "made with": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
    }
    for name, text in rows.items():
        console.print(f"  [dim]{name:10}[/dim] {text}")
    table = Table(
        "chunk", "frames", "context", "steps compared", "features", "encoder", title="chunk sizes, and parity"
    )
    for chunk in manifest.chunks:
        figures = manifest.parity.get(f"{chunk.ms}ms", {})
        compared = (f"{figures[key]:.1e}" if key in figures else "–" for key in ("features", "encoder"))
        table.add_row(
            f"{chunk.ms} ms", str(chunk.frames), f"{chunk.left} frames", str(figures.get("steps", "–")), *compared
        )
    console.print(table)
    console.print("[dim]parity: largest absolute difference from NeMo, fp32, measured when the bundle was made[/dim]")


def examine() -> bool:
    """Try every backend, print what works and what mends the rest. Returns whether speech can be recognised here."""
    console = Console(highlight=False)
    console.print(f"nemostream {version('nemostream')}, Python {platform.python_version()}, {platform.platform()}")
    checks: dict[str, Callable[[], Finding]] = {
        "ONNX Runtime, CPU": _onnxruntime_cpu,
        "ONNX Runtime, CUDA": _onnxruntime_cuda,
        "TensorRT": lambda: _library("tensorrt", "pip install 'nemostream[tensorrt]'"),
        "TensorRT for RTX": lambda: _library("tensorrt_rtx", "pip install 'nemostream[tensorrt-rtx]'"),
        "NVIDIA driver": _driver,
        "exporting (NeMo)": _exporting,
        "microphone": lambda: _library("sounddevice", "pip install 'nemostream[mic]'"),
    }
    table = Table("", "works here", "")
    works = {}
    for name, check in checks.items():
        works[name], found = check()
        table.add_row(name, "[green]yes[/green]" if works[name] else "[yellow]no[/yellow]", found)
    console.print(table)
    console.print("This version runs streams on ONNX Runtime's CPU provider; the GPU rows tell what is installed.")
    return works["ONNX Runtime, CPU"]


def _onnxruntime_cpu() -> Finding:
    """Really recognise a second of silence with the packaged bundle."""
    try:
        import numpy as np
        import onnxruntime

        import nemostream

        with nemostream.load(capacity=1) as model:
            model.transcribe(np.zeros(16000, np.float32))
        return True, f"onnxruntime {onnxruntime.__version__}, the packaged model runs"
    except ImportError as error:
        return False, f"{error.name} is missing: pip install --force-reinstall nemostream"
    except NemostreamError as error:
        return False, str(error)


def _onnxruntime_cuda() -> Finding:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return True, "provider present (not used by this version)"
    return False, "pip uninstall onnxruntime, then pip install 'nemostream[cuda]'"


def _library(name: str, mend: str) -> Finding:
    try:
        module = import_module(name)
    except (ImportError, OSError):
        return False, mend
    return True, f"{name} {getattr(module, '__version__', '')} present"


def _driver() -> Finding:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False, "no NVIDIA driver (libcuda.so.1); CUDA 13 backends need r580 or newer"
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    return True, f"driver for CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def _exporting() -> Finding:
    found = {}
    for package in ("nemo_toolkit", "torch", "onnx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            return False, f"{package} is missing: pip install 'nemostream[export]'"
    return True, ", ".join(f"{name} {number}" for name, number in found.items())
