"""Runners: implementations of one streaming step with a common interface, on the same audio.

All runners process the same `AudioFeed` of B streams. Positions are in encoder frames. A step of T frames at position p
consumes the samples of `Batch`, or the mel frames [8p - 16, 8p + 8T - 8], of which 9 are history.

Each competing implementation uses its fastest configuration, described by `setup`: weights are loaded once, buffers are
reused, features are computed in advance if the step starts with features, and decoding is batched if supported.
`covers` describes which part of the step is timed; every omitted part is to the disadvantage of nemostream. NeMo's
runner is in `nemo`.

Shapes: B rows, T frames, D model width, F mel frames, M mel bins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.harness.records import Tokens
from nemostream.benchmarks.harness.timed import AudioFeed, longest
from nemostream.bundle import ChunkConfig, Manifest
from nemostream.runtime.backends.base import Backend
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.decoding.greedy import DecoderState, label_looping

Floats = NDArray[np.float32]

# Values of `covers`.
PCM_TO_TOKENS = "PCM to tokens"
MEL_TO_TOKENS = "mel to tokens"
MEL_TO_FRAMES = "mel to encoder frames"


class Runner(Protocol):
    """One implementation. Call `fill_caches` first, then `step` for consecutive chunks.

    Runners that support it use the longest chunk size in `fill_caches`: it needs the fewest steps, and NeMo fails in
    the first step with 80 ms chunks, which has no frame.
    """

    name: str
    setup: str  # configuration, for the report
    covers: str  # timed part of a step
    exact: bool  # must emit the same tokens as NeMo in fp32

    def fill_caches(self, frames: int) -> None:
        """Process the first `frames` encoder frames of all streams, so that all caches are full. Not timed."""
        ...

    def step(self, position: int) -> None:
        """Process one chunk of each row. Returns when the step is complete, on a GPU too."""
        ...

    def tokens(self) -> Tokens | None:
        """Return the token ids of each row since the start, or None if the runner does not decode. Not timed."""
        ...

    def close(self) -> None: ...


class NemostreamRunner:
    """A backend of nemostream. A step starts with PCM."""

    covers = PCM_TO_TOKENS

    def __init__(self, name: str, backend: Backend, feed: AudioFeed, chunk: ChunkConfig, exact: bool = True) -> None:
        self.name, self.exact = name, exact
        self.setup = "`Backend.submit` until its result, as called by the scheduler"
        self._backend, self._feed, self._chunk = backend, feed, chunk
        self._tokens: list[list[int]] = [[] for _ in range(feed.rows)]
        backend.reset(np.arange(feed.rows))

    def fill_caches(self, frames: int) -> None:
        filler = longest(self._feed.manifest, self._chunk)
        for position in range(0, frames, filler.frames):
            self._step(filler, position)
        if filler != self._chunk and isinstance(self._backend, OrtBackend):
            del self._backend._steps[filler.ms]  # gigabytes, for nothing more

    def step(self, position: int) -> None:
        self._step(self._chunk, position)

    def tokens(self) -> Tokens:
        return [list(row) for row in self._tokens]

    def _step(self, chunk: ChunkConfig, position: int) -> None:
        emissions = self._backend.submit(self._feed.batch(chunk, position)).result()
        for row, new in zip(self._tokens, emissions.tokens, strict=True):
            row.extend(new.tolist())

    def close(self) -> None:
        self._backend.close()


class NemoOnnxRunner:
    """NeMo's ONNX export in ONNX Runtime. Caches stay in bound buffers; decoding is nemostream's label looping.

    At the start of a stream the step reads nine frames of zeros that NeMo's offline forward does not have, so the first
    words may differ.
    """

    name, covers, exact = "ONNX Runtime, NeMo's export", MEL_TO_TOKENS, False
    setup = "NeMo's ONNX export; caches in bound buffers on the device; nemostream's label looping with NeMo's joint"

    def __init__(
        self, exported: Path, model: Any, feed: AudioFeed, chunk: ChunkConfig, threads: int, device: str = "cpu"
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
        self._tokens: list[list[int]] = [[] for _ in range(feed.rows)]

    def fill_caches(self, frames: int) -> None:
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
        for row, new in zip(self._tokens, label_looping(self._net, frames, counts, self._state)[0], strict=True):
            row.extend(new.tokens)

    def tokens(self) -> Tokens:
        return [list(row) for row in self._tokens]

    def close(self) -> None:
        del self._encoder, self._net


class _NemoTransducer:
    """NeMo's exported prediction network and joint with the interface of `label_looping`; inputs are not projected."""

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


class SherpaRunner:
    """Online recogniser of sherpa-onnx with greedy search on NeMo's export, all rows in one `decode_streams`.

    It computes its own features, and its window starts with frames that NeMo's offline forward does not have, so some
    tokens may differ. int8 follows the recipe of sherpa-onnx: dynamic quantisation by ONNX Runtime, unsigned weights.
    """

    covers, exact = PCM_TO_TOKENS, False
    setup = (
        "online recogniser of sherpa-onnx, greedy search, NeMo's ONNX export (int8: recipe of sherpa-onnx), "
        "one `decode_streams` for all rows"
    )

    def __init__(
        self, exported: Path, feed: AudioFeed, chunk: ChunkConfig, threads: int, precision: str = "fp32"
    ) -> None:
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
        self.decoded = 0  # chunks of all rows since the start

    def fill_caches(self, frames: int) -> None:
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
        rows = [self._recognizer.tokens(stream) for stream in self._streams]
        return [[self._ids.get(token.replace(" ", "▁"), -1) for token in row] for row in rows]

    def close(self) -> None:
        del self._streams, self._recognizer


class TransformersRunner:
    """Encoder of `nemotron_asr_streaming` in Hugging Face transformers with its caches, in fp32 or bf16.

    Only the encoder is timed: `generate` decodes token by token in Python and cannot stop at the end of a chunk.
    """

    covers, exact = MEL_TO_FRAMES, False
    setup = "encoder of Hugging Face transformers with its caches, sdpa attention"

    def __init__(
        self,
        transformers_model: Any,
        model: Any,
        feed: AudioFeed,
        chunk: ChunkConfig,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        import torch

        self.name = "transformers" if precision == "fp32" else f"transformers, {precision}"
        self._torch, self._feed, self._chunk, self._device = torch, feed, chunk, device
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._model = transformers_model.to(device, dtype)
        self._mel = feed.mel(model).transpose(1, 2).contiguous().to(device, dtype)
        self._caches: dict[str, Any] = {}

    def fill_caches(self, frames: int) -> None:
        for position in range(0, frames, self._chunk.frames):
            self.step(position)

    def step(self, position: int) -> None:
        # The convolutions cache their history: a step reads new frames only.
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
