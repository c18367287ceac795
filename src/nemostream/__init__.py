"""nemostream: NVIDIA's streaming FastConformer-RNNT recogniser without NeMo and PyTorch.

    import nemostream

    model = nemostream.load()
    print(model.transcribe("voice.flac").text)

    with model.stream(sample_rate=48000) as stream:
        for pcm in microphone:
            for partial in stream.push(pcm):
                print(partial.text)
        print(stream.finish().text)

    for event in model.listen("voice.flac"):  # and `async for`
        print(event.kind, event.text, event.words)

Importing it is cheap: everything but the errors and the manifest is loaded when it is first used.
"""

from __future__ import annotations

import os
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

# ONNX Runtime 1.29 and newer sends telemetry and writes to ~/.cache/Microsoft; it reads this variable when it is
# imported. Every entry point imports this package first, and the processes it starts inherit the variable.
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
    """Load a bundle and make its engine ready.

    `bundle` is a folder that `nemostream export` wrote; without one, the small model that comes with the package (for
    trying and testing, not for work). `chunk_ms` is what streams use unless they ask otherwise; `capacity` is how many
    streams can be open at once, each with its state reserved; `threads` is what ONNX Runtime may use on a CPU
    (default: every CPU that this process may use: its affinity, and the quota of its container).

    `device` is "cpu" or "cuda". Any `precision` but a CPU's "fp32" runs engines that `nemostream build` made, kept in
    the folder `engines` (default: `~/.cache/nemostream/engines`); a GPU's default is "fp16". `max_batch` is how many
    streams a step may have at most (default: 64, or `capacity` if that is less). `confidence` is the measure of streams
    that choose none (default: NeMo's, `Confidence()`). `delay_ms` is taken off the times of tokens and words: how late
    the model says them, which depends on its training (`docs/transcripts.md`; default: none, NeMo's times).

    Raises `BundleError` for a folder that is no bundle, or a damaged one, `OptionError` for a chunk size that the model
    does not have, and `BackendError` if the device cannot be used or an engine is not built.
    """
    from nemostream.bundle import Bundle
    from nemostream.engines import open_backend
    from nemostream.runtime.model import Model

    opened = Bundle.open(demo_bundle() if bundle is None else bundle)
    opened.manifest.chunk(chunk_ms)
    backend = open_backend(
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
    """The bundle inside the package."""
    folder = Path(str(resources.files("nemostream") / "demo"))
    if not (folder / "manifest.json").is_file():
        raise BundleError(f"this nemostream was built without its demo bundle ({folder}); give a bundle of your own.")
    return folder


def demo_clip() -> Path:
    """A recording of a human voice that the demo bundle understands."""
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
