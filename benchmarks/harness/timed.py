"""Backends and schedulers for timing, and the audio that all implementations process.

`device` is "cpu" (ONNX Runtime), "cuda" (TensorRT engines for this GPU) or "cuda:onnxruntime" (CUDA provider of ONNX
Runtime). Missing engines are built but not validated: the time of a step does not depend on the values of the weights,
and random weights would not pass the validation in 8 bit.
"""

from __future__ import annotations

import copy
import tempfile
import threading
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
from nemostream.runtime.streaming.scheduler import Scheduler, StreamScheduler

Floats = NDArray[np.float32]

# Precisions that each device supports.
DEVICE_PRECISIONS = {"cpu": ("fp32", "int8"), "cuda": PRECISIONS, "cuda:onnxruntime": ("fp32", "fp16", "bf16")}


class AudioFeed:
    """Audio of `rows` streams: one clip in a loop, from a different start sample for each stream.

    `audio` is [rows, N] float32 for `frames` encoder frames. Positions are in encoder frames.
    """

    def __init__(self, manifest: Manifest, clip: Floats, rows: int, frames: int) -> None:
        samples = frames * manifest.samples_per_frame
        starts = np.arange(rows) * len(clip) // rows
        self.manifest, self.rows = manifest, rows
        self.audio: Floats = np.stack([np.resize(np.roll(clip, -start), samples) for start in starts])
        self._padded = np.pad(self.audio, ((0, 0), (manifest.lead, 0)))
        self._mel: Any = None

    def batch(self, chunk: ChunkConfig, position: int) -> Batch:
        """Return the batch of the chunk that starts at encoder frame `position`. Raises `IndexError` at the end."""
        start = position * self.manifest.samples_per_frame
        audio = self._padded[:, start : start + chunk.samples]
        if audio.shape[1] < chunk.samples:
            raise IndexError(f"the audio ends before frame {position + chunk.frames}")
        return Batch(chunk, np.arange(self.rows), audio, np.full(self.rows, chunk.samples))

    def mel(self, model: Any) -> Any:
        """Return the log-mel features [B, M, F] computed by NeMo's code.

        They are computed in fp64 because the error of NeMo's fp32 FFT is up to 2e-4 in quiet bins.
        """
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
        """Return the mel frames that a step reads, including history; starts below 0 at the start of a stream."""
        factor = self.manifest.encoder.subsampling
        return slice(factor * (position - 2), factor * (position + chunk.frames - 1) + 1)


def longest(manifest: Manifest, chunk: ChunkConfig) -> ChunkConfig:
    """Return the longest chunk size with the same left context."""
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
    max_batch: int | None = None,
) -> Iterator[Backend]:
    """Open a backend with `rows` slots and the engines of all `chunks` loaded; close it on exit.

    `max_batch` is the maximum number of streams in a step (default: all `rows`). Engines are stored in the folder
    `engines`, by default a temporary one. Raises `OptionError` for an unknown device or a precision that it does not
    support, and `BackendError` if it is not available.
    """
    if device not in DEVICE_PRECISIONS:
        raise OptionError(f"device is {device!r}; choose one of {', '.join(DEVICE_PRECISIONS)}.")
    if precision not in DEVICE_PRECISIONS[device]:
        supported = ", ".join(DEVICE_PRECISIONS[device])
        advice = " or another --device" if precision in PRECISIONS else ""
        raise OptionError(f"{device} supports {supported}, not {precision}; choose one of them{advice}.")
    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        store = PlanStore(engines or Path(folder))
        if device == "cpu":
            backend = _open_cpu(bundle, chunks, precision, rows, max_batch or rows, threads, store)
        else:
            library = device.partition(":")[2] or "tensorrt"
            backend = _open_gpu(bundle, chunks, precision, rows, max_batch or rows, library, store)
        try:
            yield backend
        finally:
            backend.close()


@contextmanager
def blocked(scheduler: StreamScheduler) -> Iterator[threading.Event]:
    """Keep a scheduler from running steps until the end of the `with` block, or until the yielded event is set.

    Streams that receive a chunk meanwhile are then processed in as few steps as possible.
    """
    assert isinstance(scheduler, Scheduler)
    started, resume = threading.Event(), threading.Event()

    def block(_: Backend) -> None:
        started.set()
        resume.wait()

    thread = threading.Thread(target=scheduler.call, args=(block,))
    thread.start()
    started.wait()
    try:
        yield resume
    finally:
        resume.set()
        thread.join()


def _open_cpu(
    bundle: Bundle,
    chunks: Sequence[ChunkConfig],
    precision: str,
    rows: int,
    max_batch: int,
    threads: int | None,
    store: PlanStore,
) -> Backend:
    from nemostream.engines import build_engine

    plans = None
    if precision != "fp32":
        plans = {
            chunk.ms: build_engine(bundle, chunk, precision, store, backend="onnxruntime", validate=False)[0]
            for chunk in chunks
        }
    backend = OrtBackend(bundle, capacity=rows, max_batch=max_batch, threads=threads, plans=plans)
    for chunk in chunks:
        backend.prepare(chunk)
    return backend


def _open_gpu(
    bundle: Bundle,
    chunks: Sequence[ChunkConfig],
    precision: str,
    rows: int,
    max_batch: int,
    library: str,
    store: PlanStore,
) -> Backend:
    from nemostream.engines import build_engine, open_gpu
    from nemostream.runtime.backends.gpu.cuda import CudaDevice

    gpu = CudaDevice()  # before building: raises if there is no GPU
    target = "cuda" if library == "onnxruntime" else None
    try:
        plans = {
            chunk.ms: build_engine(
                bundle, chunk, precision, store, backend=library, target=target, max_batch=max_batch, validate=False
            )[0]
            for chunk in chunks
        }
        backend: Backend = open_gpu(bundle, gpu, plans, rows, max_batch)
    except BaseException:
        gpu.close()
        raise
    return backend
