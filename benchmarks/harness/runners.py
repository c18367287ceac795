"""The implementations of one streaming step, behind the same verbs, on the same audio.

All walk through the same `Feed`: rows of B streams that go on for ever. Position is counted in encoder frames; a step
of T frames at position p consumes the samples of `Batch`, or the mel frames [8p - 16, 8p + 8T - 8], 9 of them history.

Each opponent is set up at its best, and `setup` says how: weights loaded once, every buffer it can keep kept, features
computed beforehand where its step begins with features, batched decoding where it has it. `covers` says what its time
holds; whatever is left out is to our cost. (NeMo: `nemo`.)

Letters: B rows, T frames, D model width, F mel frames, M mel bins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.harness.records import Tokens
from nemostream.benchmarks.harness.timed import Feed, longest
from nemostream.bundle import ChunkConfig, Manifest
from nemostream.runtime.backends.base import Backend
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.decoding.greedy import DecoderState, label_looping

Floats = NDArray[np.float32]

FULL = "PCM to tokens"
DECODED = "mel to tokens"
ENCODED = "mel to encoder frames"


class Side(Protocol):
    """One implementation. `fill` first, then `step` after `step`, each where the one before ended.

    Sides that can change their chunk size while they run `fill` with the longest: it takes the fewest steps, and with
    80 ms NeMo's very first step has no frame and stumbles over that.
    """

    name: str
    setup: str  # for the report
    covers: str
    exact: bool  # must say the same tokens as NeMo in fp32

    def fill(self, frames: int) -> None:
        """Hear so many frames from the start of the streams, so that every cache is full. Not timed."""
        ...

    def step(self, position: int) -> None:
        """One chunk of every row; over when it returns, on a GPU too."""
        ...

    def tokens(self) -> Tokens | None:
        """Ids each row has said since the start; None if it does not decode. Not timed."""
        ...

    def close(self) -> None: ...


class Ours:
    """Any backend of ours. A step begins with PCM."""

    covers = FULL

    def __init__(self, name: str, backend: Backend, feed: Feed, chunk: ChunkConfig, exact: bool = True) -> None:
        self.name, self.exact = name, exact
        self.setup = "`Backend.submit` until its result, as the scheduler calls it"
        self._backend, self._feed, self._chunk = backend, feed, chunk
        self._said: list[list[int]] = [[] for _ in range(feed.rows)]
        backend.reset(np.arange(feed.rows))

    def fill(self, frames: int) -> None:
        filler = longest(self._feed.manifest, self._chunk)
        for position in range(0, frames, filler.frames):
            self._step(filler, position)
        if filler != self._chunk and isinstance(self._backend, OrtBackend):
            del self._backend._steps[filler.ms]  # gigabytes, for nothing more

    def step(self, position: int) -> None:
        self._step(self._chunk, position)

    def tokens(self) -> Tokens:
        return [list(row) for row in self._said]

    def _step(self, chunk: ChunkConfig, position: int) -> None:
        emissions = self._backend.submit(self._feed.batch(chunk, position)).result()
        for row, new in zip(self._said, emissions.tokens, strict=True):
            row.extend(new.tolist())

    def close(self) -> None:
        self._backend.close()


class NemoOnnx:
    """NeMo's own ONNX export in ONNX Runtime: caches stay in buffers that are bound, decoding is label looping as ours.

    At the start of a stream its step sees nine frames of zeros that NeMo's offline forward does not, so its first words
    may differ.
    """

    name, covers, exact = "ONNX Runtime, NeMo's export", DECODED, False
    setup = "NeMo's own export; caches stay in bound buffers (on a GPU there); our label looping around its joint"

    def __init__(
        self, exported: Path, model: Any, feed: Feed, chunk: ChunkConfig, threads: int, device: str = "cpu"
    ) -> None:
        import onnxruntime as ort

        self._feed, self._chunk, self._device = feed, chunk, device
        history = -feed.window(chunk, 0).start
        self._mel = np.pad(feed.mel(model).numpy(), ((0, 0), (0, 0), (history, 0)))
        self._history = history
        self._encoder = _session(exported / "encoder.onnx", threads, device)
        self._net = _NemoTransducer(exported, feed.manifest, device)
        spec, net = feed.manifest.encoder, feed.manifest.decoder
        caches = {
            "cache_last_channel": np.zeros((feed.rows, spec.layers, spec.cache, spec.d_model), np.float32),
            "cache_last_time": np.zeros((feed.rows, spec.layers, spec.d_model, spec.conv_cache), np.float32),
            "cache_last_channel_len": np.zeros(feed.rows, np.int64),
        }
        self._caches = {n: ort.OrtValue.ortvalue_from_numpy(array, device, 0) for n, array in caches.items()}
        self._binding = self._encoder.io_binding()
        start = DecoderState.initial(self._net, net.layers, net.hidden)
        self._state = start.repeat(feed.rows)
        self._said: list[list[int]] = [[] for _ in range(feed.rows)]

    def fill(self, frames: int) -> None:
        for position in range(0, frames, self._chunk.frames):
            self.step(position)

    def step(self, position: int) -> None:
        window = self._feed.window(self._chunk, position)
        signal = np.ascontiguousarray(self._mel[:, :, window.start + self._history : window.stop + self._history])
        binding = self._binding
        binding.bind_cpu_input("audio_signal", signal)
        binding.bind_cpu_input("length", np.full(self._feed.rows, signal.shape[2], np.int64))
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(name, value)
        for index, output in enumerate(self._encoder.get_outputs()):
            binding.bind_output(output.name, self._device if index > 1 else "cpu")  # frames, lengths, then the caches
        self._encoder.run_with_iobinding(binding)
        encoded, _, *after = binding.get_outputs()
        self._caches = dict(zip(self._caches, after, strict=True))
        frames = np.ascontiguousarray(encoded.numpy().transpose(0, 2, 1))
        counts = np.full(self._feed.rows, frames.shape[1], np.int64)
        for row, new in zip(self._said, label_looping(self._net, frames, counts, self._state)[0], strict=True):
            row.extend(new.tokens)

    def tokens(self) -> Tokens:
        return [list(row) for row in self._said]

    def close(self) -> None:
        del self._encoder, self._net


class _NemoTransducer:
    """NeMo's exported prediction net and joint, as label looping calls them. Frames and predictions are unprojected."""

    def __init__(self, exported: Path, manifest: Manifest, device: str = "cpu") -> None:
        self.blank, self.max_symbols = manifest.decoder.blank, manifest.decoder.max_symbols
        self._decoder = _session(exported / "decoder.onnx", 1, device)
        self._joint = _session(exported / "joiner.onnx", 1, device)
        self._names = [each.name for each in self._decoder.get_inputs()]

    def predict(self, tokens: Any, h: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
        rows = len(tokens)
        inputs = (
            tokens.astype(np.int32)[:, None],
            np.ones(rows, np.int32),
            np.ascontiguousarray(h.transpose(1, 0, 2)),
            np.ascontiguousarray(c.transpose(1, 0, 2)),
        )
        predicted, _, h, c = self._decoder.run(None, dict(zip(self._names, inputs, strict=True)))
        return predicted[:, :, -1], h.transpose(1, 0, 2), c.transpose(1, 0, 2)

    def join(self, encoded: Floats, predicted: Floats) -> Floats:
        pair = {"encoder_outputs": encoded[:, :, None], "decoder_outputs": predicted[:, :, None]}
        logits = self._joint.run(None, pair)[0]
        return logits.reshape(len(encoded), -1)


class Sherpa:
    """sherpa-onnx's online recogniser, greedy search, on NeMo's export in its format, all rows in `decode_streams`.

    It computes its own features, and its window begins with frames that NeMo's offline forward does not have, so tokens
    may differ here and there. int8 is its own recipe: ONNX Runtime's dynamic quantisation with unsigned weights.
    """

    covers, exact = FULL, False
    setup = (
        "its online recogniser, greedy, NeMo's export in its format (int8 by its own recipe), `decode_streams` of all"
    )

    def __init__(self, exported: Path, feed: Feed, chunk: ChunkConfig, threads: int, precision: str = "fp32") -> None:
        import sherpa_onnx

        self.name = f"sherpa-onnx, {precision}"
        self._feed, self._chunk = feed, chunk
        suffix = ".onnx" if precision == "fp32" else f".{precision}.onnx"
        files = {name: str(exported / f"{name}{suffix}") for name in ("encoder", "decoder", "joiner")}
        self._recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(
            tokens=str(exported / "tokens.txt"),
            **files,
            num_threads=threads,
            decoding_method="greedy_search",
            sample_rate=feed.manifest.features.sample_rate,
            feature_dim=feed.manifest.features.mels,
        )
        self._streams = [self._recognizer.create_stream() for _ in range(feed.rows)]
        self._ids = {line.rsplit(" ", 1)[0]: index for index, line in enumerate(_lines(exported / "tokens.txt"))}
        self.decoded = 0  # chunks of all rows, since the start

    def fill(self, frames: int) -> None:
        for position in range(0, frames, self._chunk.frames):
            self.step(position)

    def step(self, position: int) -> None:
        rate, start = self._feed.manifest.features.sample_rate, position * self._feed.manifest.samples_per_frame
        for stream, audio in zip(self._streams, self._feed.audio, strict=True):
            stream.accept_waveform(rate, audio[start : start + self._chunk.samples])
        while ready := [stream for stream in self._streams if self._recognizer.is_ready(stream)]:
            self._recognizer.decode_streams(ready)
            self.decoded += len(ready)

    def tokens(self) -> Tokens:
        said = [self._recognizer.tokens(stream) for stream in self._streams]
        return [[self._ids.get(token.replace(" ", "▁"), -1) for token in row] for row in said]

    def close(self) -> None:
        del self._streams, self._recognizer


class Transformers:
    """Hugging Face's `nemotron_asr_streaming`, its encoder with its caches; in fp32, or in bf16 (`kind`).

    Encoder alone: its `generate` decodes token by token in Python and cannot be stopped at a chunk's end, so decoding
    is left out of its time.
    """

    covers, exact = ENCODED, False
    setup = "its encoder with its own caches, sdpa attention"

    def __init__(
        self, theirs: Any, model: Any, feed: Feed, chunk: ChunkConfig, kind: str = "fp32", device: str = "cpu"
    ) -> None:
        import torch

        self.name = "transformers" if kind == "fp32" else f"transformers, {kind}"
        self._torch, self._feed, self._chunk, self._device = torch, feed, chunk, device
        form = torch.bfloat16 if kind == "bf16" else torch.float32
        self._model = theirs.to(device, form)
        self._mel = feed.mel(model).transpose(1, 2).contiguous().to(device, form)
        self._caches: dict[str, Any] = {}

    def fill(self, frames: int) -> None:
        for position in range(0, frames, self._chunk.frames):
            self.step(position)

    def step(self, position: int) -> None:
        # Their convolutions keep their own history: a step reads new frames only.
        window = self._feed.window(self._chunk, position)
        start = max(window.stop - 8 * self._chunk.frames, 0)
        with self._torch.inference_mode():
            out = self._model.encoder(
                self._mel[:, start : window.stop],
                num_lookahead_tokens=self._chunk.frames - 1,
                use_cache=True,
                **self._caches,
            )
        self._caches = {"past_key_values": out.past_key_values, "padding_cache": out.padding_cache}
        if self._device != "cpu":
            self._torch.cuda.synchronize()

    def tokens(self) -> None:
        return None

    def close(self) -> None:
        self._caches = {}


def _session(graph: Path, threads: int, device: str = "cpu") -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    providers = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return ort.InferenceSession(graph, options, providers=providers)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
