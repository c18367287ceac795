"""nemostream: streaming speech recognition with NVIDIA's FastConformer-RNNT models, without NeMo and PyTorch.

    import nemostream

    model = nemostream.load()
    print(model.transcribe("voice.flac").text)

    with model.stream(sample_rate=48000) as stream:
        for pcm in microphone:
            for partial in stream.push(pcm):
                print(partial.text)
        print(stream.finish().text)

    for event in model.listen("voice.flac"):  # also with `async for`
        print(event.kind, event.text, event.words)

The import is fast: all names but the errors are loaded on first use.
"""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemostream.errors import (
    AudioError,
    BackendError,
    BundleError,
    CapacityError,
    CheckpointError,
    EngineValidationError,
    NemostreamError,
    OptionError,
    ParityError,
    StreamError,
    TruncatedAudioError,
)

# ONNX Runtime 1.29 and newer sends telemetry and writes to ~/.cache/Microsoft unless this variable is set when it is
# imported. Every entry point imports this package first, and child processes inherit the variable.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from nemostream.bundle import Bundle, Manifest
    from nemostream.runtime.decoding.confidence import Confidence
    from nemostream.runtime.model import Model
    from nemostream.runtime.text.endpointing import Endpoint
    from nemostream.runtime.text.events import Event
    from nemostream.runtime.text.itn import InverseNormalizer
    from nemostream.runtime.text.words import Result, Token, Word

_LAZY = {
    "Bundle": "nemostream.bundle",
    "InverseNormalizer": "nemostream.runtime.text.itn",
    "Manifest": "nemostream.bundle",
    "Model": "nemostream.runtime.model",
    "Confidence": "nemostream.runtime.decoding.confidence",
    "Endpoint": "nemostream.runtime.text.endpointing",
    "Event": "nemostream.runtime.text.events",
    "Result": "nemostream.runtime.text.words",
    "Token": "nemostream.runtime.text.words",
    "Word": "nemostream.runtime.text.words",
}

__all__ = [
    "AudioError",
    "BackendError",
    "Bundle",
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "Confidence",
    "Endpoint",
    "EngineValidationError",
    "Event",
    "InverseNormalizer",
    "Manifest",
    "Model",
    "NemostreamError",
    "OptionError",
    "ParityError",
    "Result",
    "StreamError",
    "Token",
    "TruncatedAudioError",
    "Word",
    "__version__",
    "demo_bundle",
    "demo_clip",
    "load",
]


def load(
    bundle: str | Path | None = None,
    chunk_ms: int = 560,
    *,
    capacity: int = 64,
    threads: int | None = None,
    device: str = "cpu",
    precision: str | None = None,
    max_batch: int | None = None,
    engines: str | Path | None = None,
    confidence: Confidence | None = None,
    delay_ms: int = 0,
) -> Model:
    """Load a model.

    Parameters
    ----------
    bundle
        Folder written by `nemostream export`. Default: the small demo model in the package, for trying and testing.
    chunk_ms
        Default chunk size of streams, in milliseconds.
    capacity
        Maximum number of open streams. Memory for the state of all of them is reserved.
    threads
        ONNX Runtime threads on a CPU. Default: all CPUs that the process may use, by its affinity and its container's
        quota.
    device
        "cpu" or "cuda".
    precision
        Numeric precision. Default: "fp32" on a CPU, "fp16" on a GPU. Except for "fp32" on a CPU, an engine made by
        `nemostream build` is required.
    max_batch
        Maximum number of streams in one step. Default: 64, or `capacity` if that is less.
    engines
        Folder of the engines. Default: `~/.cache/nemostream/engines`.
    confidence
        Default confidence measure of streams. Default: NeMo's, `Confidence()`.
    delay_ms
        Milliseconds subtracted from the times of tokens and words, to compensate for a model that was trained to emit
        them late (`docs/transcripts.md`). Default: 0, as in NeMo.

    Raises
    ------
    BundleError
        If the folder is not a bundle or is damaged.
    OptionError
        If an option is invalid or the model does not support the chunk size.
    BackendError
        If the device cannot be used or an engine is not built.
    """
    from nemostream.bundle import Bundle
    from nemostream.engines import open_backend
    from nemostream.runtime.model import Model

    opened = Bundle.open(demo_bundle() if bundle is None else bundle)
    backend = partial(
        open_backend,
        opened,
        device=device,
        precision=precision,
        capacity=capacity,
        max_batch=max_batch,
        threads=threads,
        engines=engines,
        chunk_ms=chunk_ms,
    )
    return Model(opened, backend, chunk_ms, confidence, delay_ms, f"{device}, {precision or 'default'} precision")


def demo_bundle() -> Path:
    """Return the path of the demo bundle in the package."""
    folder = Path(str(resources.files("nemostream") / "demo"))
    if not (folder / "manifest.json").is_file():
        raise BundleError(f"this nemostream was built without its demo bundle ({folder}); pass the path of a bundle.")
    return folder


def demo_clip() -> Path:
    """Return the path of a speech recording that the demo model can transcribe."""
    return Path(str(resources.files("nemostream") / "clip.flac"))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("nemostream")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'nemostream' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
