"""Creation of the runners that `baseline` compares, from models and exports that are loaded once."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

from nemostream.benchmarks.harness.nemo import NemoRunner, check_built_in_graph, export_nemo, load_nemo
from nemostream.benchmarks.harness.records import Progress
from nemostream.benchmarks.harness.runners import (
    NemoOnnxRunner,
    NemostreamRunner,
    Runner,
    SherpaRunner,
    TransformersRunner,
)
from nemostream.benchmarks.harness.timed import AudioFeed, longest, timed_backend
from nemostream.benchmarks.harness.transcribe_cpp import TranscribeCppRunner, write_gguf
from nemostream.bundle import Bundle, ChunkConfig

# Default runners by device.
RUNNERS = {
    "cpu": (
        "nemostream fp32",
        "nemostream int8",
        "nemo fp32",
        "nemo bf16",
        "nemo compile",
        "nemo compile bf16",
        "transformers",
        "onnx",
        "sherpa fp32",
        "sherpa int8",
        "transcribe.cpp q8",
    ),
    "cuda": (
        "nemostream fp16",
        "nemostream fp32",
        "nemostream int8",
        "nemo fp32",
        "nemo bf16",
        "nemo graph",
        "nemo built-in graph",
        "nemo compile bf16",
        "transformers",
        "transformers bf16",
        "onnx",
    ),
}
_MORE_RUNNERS = ("nemostream bf16", "nemostream fp8", "transcribe.cpp fp16", "transcribe.cpp fp32")
RUNNER_NAMES = tuple(dict.fromkeys([*RUNNERS["cpu"], *RUNNERS["cuda"], *_MORE_RUNNERS]))
NEMOSTREAM = "nemostream"
TRANSCRIBE_CPP = "transcribe.cpp"


class RunnerFactory:
    """Creates runners; loads NeMo, transformers and the exports once. Use as a context manager."""

    def __init__(
        self, bundle: Bundle, checkpoint: Path, device: str, threads: int, engines: Path | None, progress: Progress
    ) -> None:
        self.bundle, self.device_type, self.progress = bundle, device.partition(":")[0], progress
        self._checkpoint, self._device, self._threads = checkpoint, device, threads
        self._bf16_model: Any = None
        self._built_in_graph_model: Any = None
        self._transformers_model: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="nemostream-")
        self._engines = engines or Path(self._folder.name)
        self._exports: dict[int, tempfile.TemporaryDirectory[str]] = {}
        progress("loading NeMo")
        self._model = load_nemo(checkpoint, self.device_type)

    def __enter__(self) -> RunnerFactory:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard_exports()
        self._folder.cleanup()

    def create(self, name: str, feed: AudioFeed, chunk: ChunkConfig, stack: contextlib.ExitStack) -> Runner:
        """Return the runner `name` (one of `RUNNER_NAMES`); `stack` owns its backend."""
        implementation, _, kind = name.partition(" ")
        if implementation == NEMOSTREAM:
            chunks = list({chunk, longest(self.bundle.manifest, chunk)})
            backend = stack.enter_context(
                timed_backend(
                    self.bundle,
                    chunks,
                    kind,
                    feed.rows,
                    device=self._device,
                    threads=self._threads,
                    engines=self._engines,
                )
            )
            exact = (kind, self.device_type) == ("fp32", "cpu")
            return NemostreamRunner(f"{NEMOSTREAM}, {kind}", backend, feed, chunk, exact=exact)
        if implementation == "nemo":
            if kind == "built-in graph":
                check_built_in_graph(self._model)  # before loading a model of its own
                self._built_in_graph_model = self._built_in_graph_model or load_nemo(self._checkpoint, self.device_type)
                return NemoRunner(self._built_in_graph_model, feed, chunk, kind)
            # Runners of the same type share a model.
            if "bf16" not in kind and kind != "graph":
                return NemoRunner(self._model, feed, chunk, kind)
            self._bf16_model = self._bf16_model or load_nemo(self._checkpoint, self.device_type)
            return NemoRunner(self._bf16_model, feed, chunk, kind)
        if implementation == "transformers":
            return self._transformers(feed, chunk, kind)
        if implementation == TRANSCRIBE_CPP:
            return TranscribeCppRunner(self._gguf(kind), feed, chunk, self._threads, kind)
        exported = self.export(chunk)
        if implementation == "onnx":
            return NemoOnnxRunner(exported, self._model, feed, chunk, self._threads, self.device_type)
        return SherpaRunner(exported, feed, chunk, self._threads, kind)

    def _transformers(self, feed: AudioFeed, chunk: ChunkConfig, precision: str) -> Runner:
        from nemostream.benchmarks.harness.huggingface import load_transformers

        if self._transformers_model is None:
            self._transformers_model = load_transformers(self._checkpoint, self.bundle.manifest)[1]
        model = copy.deepcopy(self._transformers_model) if precision else self._transformers_model
        return TransformersRunner(model, self._model, feed, chunk, precision or "fp32", self.device_type)

    def _gguf(self, precision: str) -> Path:
        """Return the checkpoint as a GGUF file for transcribe.cpp, converting it on first use."""
        file = Path(self._folder.name) / f"{precision}.gguf"
        if not file.exists():
            self.progress(f"converting the checkpoint to GGUF ({precision})")
            write_gguf(self._checkpoint, file, precision)
        return file

    def export(self, chunk: ChunkConfig) -> Path:
        """Return the folder of NeMo's ONNX export of a chunk size, exporting it on first use."""
        if chunk.ms not in self._exports:
            self.progress(f"exporting NeMo's ONNX graphs for {chunk.ms} ms")
            self._exports[chunk.ms] = tempfile.TemporaryDirectory(prefix="nemostream-")
            folder = Path(self._exports[chunk.ms].name) / "exported"
            model = self._model if self.device_type == "cpu" else load_nemo(self._checkpoint)
            export_nemo(model, self.bundle.manifest, chunk, folder, int8=self.device_type == "cpu")
        return Path(self._exports[chunk.ms].name) / "exported"

    def discard_exports(self) -> None:
        """Delete all exports; each has several gigabytes."""
        for folder in self._exports.values():
            folder.cleanup()
        self._exports.clear()
