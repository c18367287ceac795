"""Our backends as they are timed, and the audio that everybody hears.

`device` is "cpu" (ONNX Runtime), "cuda" (engines that TensorRT makes for this GPU) or "cuda:onnxruntime" (its CUDA
provider). Engines are built when they are not there and not gated: how long a step takes does not depend on what its
weights have learnt, and random ones would not pass in 8 bit.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.errors import OptionError
from nemostream.plans import PRECISIONS, PlanStore
from nemostream.runtime.backends.base import Backend, Batch
from nemostream.runtime.backends.cpu import OrtBackend

Floats = NDArray[np.float32]

CAN = {"cpu": ("fp32", "int8"), "cuda": PRECISIONS, "cuda:onnxruntime": ("fp32", "fp16", "bf16")}


class Feed:
    """B streams cut out of one clip, each starting at another place of it and going round."""

    def __init__(self, manifest: Manifest, clip: Floats, rows: int, frames: int) -> None:
        samples = frames * manifest.samples_per_frame
        starts = np.arange(rows) * len(clip) // rows
        self.manifest, self.rows = manifest, rows
        self.audio: Floats = np.stack([np.resize(np.roll(clip, -start), samples) for start in starts])
        self._padded = np.pad(self.audio, ((0, 0), (manifest.lead, 0)))
        self._mel: Any = None

    def batch(self, chunk: ChunkConfig, position: int) -> Batch:
        start = position * self.manifest.samples_per_frame
        audio = self._padded[:, start : start + chunk.samples]
        if audio.shape[1] < chunk.samples:
            raise IndexError(f"the feed ends before frame {position + chunk.frames}")
        return Batch(chunk, np.arange(self.rows), audio, np.full(self.rows, chunk.samples))

    def mel(self, model: Any) -> Any:
        """NeMo's log-mel [B, M, F] by its own code in fp64: its fp32 FFT alone is off by up to 2e-4 in quiet bins."""
        import torch

        if self._mel is None:
            featurizer = copy.deepcopy(model.preprocessor.featurizer).cpu().double()
            window = featurizer.window.double()
            featurizer.stft = lambda x: torch.stft(
                x,
                featurizer.n_fft,
                featurizer.hop_length,
                featurizer.win_length,
                window,
                return_complex=True,
                center=True,
                pad_mode="constant",
            )
            samples = torch.from_numpy(self.audio).double()
            with torch.inference_mode():
                lengths = torch.full((len(samples),), samples.shape[1])
                self._mel = featurizer(samples, lengths)[0].float().contiguous()
        return self._mel

    def window(self, chunk: ChunkConfig, position: int) -> slice:
        """Mel frames a step reads, history included; begins below 0 at the start of a stream."""
        factor = self.manifest.encoder.subsampling
        return slice(factor * (position - 2), factor * (position + chunk.frames - 1) + 1)


def longest(manifest: Manifest, chunk: ChunkConfig) -> ChunkConfig:
    """The longest chunk size with the same left context."""
    return max((other for other in manifest.chunks if other.left == chunk.left), key=lambda other: other.frames)


@contextmanager
def timed_backend(
    bundle: Bundle,
    chunks: Sequence[ChunkConfig],
    precision: str,
    rows: int,
    *,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
) -> Iterator[Backend]:
    """A backend of `rows` slots whose steps are to be timed, the chunk sizes loaded; engines are kept in `engines`.

    Raises `OptionError` for what the device cannot be or do, `BackendError` if it is not there.
    """
    if device not in CAN:
        raise OptionError(f"device is {device!r}; choose one of {', '.join(CAN)}.")
    if precision not in CAN[device]:
        others = " or another --device" if precision in PRECISIONS else ""
        raise OptionError(f"{device} runs {', '.join(CAN[device])}, not {precision}; choose one of them{others}.")
    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        store = PlanStore(engines or Path(folder))
        if device == "cpu":
            backend = _on_the_cpu(bundle, chunks, precision, rows, threads, store)
        else:
            backend = _on_the_gpu(bundle, chunks, precision, rows, device.partition(":")[2] or "tensorrt", store)
        try:
            yield backend
        finally:
            backend.close()


def _on_the_cpu(
    bundle: Bundle, chunks: Sequence[ChunkConfig], precision: str, rows: int, threads: int | None, store: PlanStore
) -> Backend:
    from nemostream.engines import build_engine

    plans = None
    if precision != "fp32":
        plans = {
            chunk.ms: build_engine(bundle, chunk, precision, store, backend="onnxruntime", validate=False)[0]
            for chunk in chunks
        }
    cpu = OrtBackend(bundle, capacity=rows, max_batch=rows, threads=threads, plans=plans)
    for chunk in chunks:
        cpu.prepare(chunk)
    return cpu


def _on_the_gpu(
    bundle: Bundle, chunks: Sequence[ChunkConfig], precision: str, rows: int, library: str, store: PlanStore
) -> Backend:
    from nemostream.engines import build_engine, open_gpu
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    gpu = CudaDevice()  # before anything is built for nothing
    target = "cuda" if library == "onnxruntime" else None
    try:
        plans = {
            chunk.ms: build_engine(
                bundle, chunk, precision, store, backend=library, target=target, max_batch=rows, validate=False
            )[0]
            for chunk in chunks
        }
        opened: Backend = open_gpu(bundle, gpu, plans, rows, rows)
    except BaseException:
        gpu.close()
        raise
    return opened
