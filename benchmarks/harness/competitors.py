"""Who takes part in the comparison of steps, and what they are made of, loaded once."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

from nemostream.benchmarks.harness.nemo import Nemo, export_nemo, load_nemo
from nemostream.benchmarks.harness.records import Say
from nemostream.benchmarks.harness.runners import NemoOnnx, Ours, Sherpa, Side, Transformers
from nemostream.benchmarks.harness.timed import Feed, longest, timed_backend
from nemostream.bundle import Bundle, ChunkConfig

# Who takes part unless named, by device; the first is the one that all are measured by in a headline.
SIDES = {
    "cpu": (
        "ours fp32",
        "ours int8",
        "nemo fp32",
        "nemo bf16",
        "nemo compile",
        "nemo compile bf16",
        "transformers",
        "onnx",
        "sherpa fp32",
        "sherpa int8",
    ),
    "cuda": (
        "ours fp16",
        "ours fp32",
        "ours int8",
        "nemo fp32",
        "nemo bf16",
        "nemo graph",
        "nemo compile bf16",
        "transformers",
        "transformers bf16",
        "onnx",
    ),
}
KNOWN = tuple(dict.fromkeys([*SIDES["cpu"], *SIDES["cuda"], "ours bf16", "ours fp8"]))
OURS = "nemostream"


class Ring:
    """What sides are made of, loaded once."""

    def __init__(
        self, bundle: Bundle, checkpoint: Path, device: str, threads: int, engines: Path | None, say: Say
    ) -> None:
        self.bundle, self.kind, self.say = bundle, device.partition(":")[0], say
        self._checkpoint, self._device, self._threads = checkpoint, device, threads
        self._narrow: Any = None
        self._theirs: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="nemostream-")
        self._engines = engines or Path(self._folder.name)
        self._exported: dict[int, tempfile.TemporaryDirectory[str]] = {}
        say("loading NeMo")
        self._model = load_nemo(checkpoint, self.kind)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *error: object) -> None:
        self.forget_export()
        self._folder.cleanup()

    def enter(self, name: str, feed: Feed, chunk: ChunkConfig, stack: contextlib.ExitStack) -> Side:
        who, _, kind = name.partition(" ")
        if who == "ours":
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
            return Ours(f"{OURS}, {kind}", backend, feed, chunk, exact=(kind, self.kind) == ("fp32", "cpu"))
        if who == "nemo":
            # Sides of one type share a model.
            if "bf16" not in kind and kind != "graph":
                return Nemo(self._model, feed, chunk, kind)
            self._narrow = self._narrow or load_nemo(self._checkpoint, self.kind)
            return Nemo(self._narrow, feed, chunk, kind)
        if who == "transformers":
            from nemostream.benchmarks.harness.huggingface import load_transformers

            self._theirs = self._theirs or load_transformers(self._checkpoint, self.bundle.manifest)[1]
            theirs = copy.deepcopy(self._theirs) if kind else self._theirs
            return Transformers(theirs, self._model, feed, chunk, kind or "fp32", self.kind)
        exported = self.export(chunk)
        if who == "onnx":
            return NemoOnnx(exported, self._model, feed, chunk, self._threads, self.kind)
        return Sherpa(exported, feed, chunk, self._threads, kind)

    def forget_export(self) -> None:
        # Gigabytes: the next chunk size's need the room.
        for folder in self._exported.values():
            folder.cleanup()
        self._exported.clear()

    def export(self, chunk: ChunkConfig) -> Path:
        if chunk.ms not in self._exported:
            self.say(f"exporting NeMo's own graphs for {chunk.ms} ms")
            self._exported[chunk.ms] = tempfile.TemporaryDirectory(prefix="nemostream-")
            folder = Path(self._exported[chunk.ms].name) / "exported"
            model = self._model if self.kind == "cpu" else load_nemo(self._checkpoint)
            export_nemo(model, self.bundle.manifest, chunk, folder, int8=self.kind == "cpu")
        return Path(self._exported[chunk.ms].name) / "exported"
