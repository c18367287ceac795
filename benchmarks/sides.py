"""The implementations of one streaming step, behind the same verbs, on the same audio.

All walk through the same `Feed`: rows of B streams that go on for ever. Position is counted in encoder frames; a step
of T frames at position p consumes the samples of `Batch`, or the mel frames [8p - 16, 8p + 8T - 8], 9 of them history.

Each opponent is set up at its best: weights loaded once, inference mode, every buffer it can keep kept, features
computed beforehand where its step begins with features, batched decoding where it has it. `covers` says what its time
holds; whatever is left out is to our cost.

Letters: B rows, T frames, D model width, F mel frames, M mel bins.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.record import Tokens
from nemostream.errors import BackendError, OptionError
from nemostream.plans import Plan, PlanStore, Recipe
from nemostream.runtime.backend import Backend, Batch
from nemostream.runtime.greedy import Predictions, label_looping
from nemostream.runtime.ort import OrtBackend
from nemostream.spec import Bundle, Chunk, Manifest

Floats = NDArray[np.float32]

FULL = "PCM to tokens"
DECODED = "mel to tokens"
ENCODED = "mel to encoder frames"


class Feed:
    """B streams cut out of one clip, each starting at another place of it and going round."""

    def __init__(self, manifest: Manifest, clip: Floats, rows: int, frames: int) -> None:
        samples = frames * manifest.samples_per_frame
        starts = np.arange(rows) * len(clip) // rows
        self.manifest, self.rows = manifest, rows
        self.audio: Floats = np.stack([np.resize(np.roll(clip, -start), samples) for start in starts])
        self._padded = np.pad(self.audio, ((0, 0), (manifest.lead, 0)))
        self._mel: Any = None

    def batch(self, chunk: Chunk, position: int) -> Batch:
        start = position * self.manifest.samples_per_frame
        audio = self._padded[:, start : start + chunk.samples]
        if audio.shape[1] < chunk.samples:
            raise IndexError(f"the feed ends before frame {position + chunk.frames}")
        return Batch(chunk, np.arange(self.rows), audio, np.full(self.rows, chunk.samples))

    def mel(self, model: Any) -> Any:
        """NeMo's log-mel [B, M, F] by its own code in fp64: its fp32 FFT alone is off by up to 2e-4 in quiet bins."""
        import torch

        if self._mel is None:
            featurizer = copy.deepcopy(model.preprocessor.featurizer).double()
            window = featurizer.window.double()
            featurizer.stft = lambda x: torch.stft(
                x, featurizer.n_fft, featurizer.hop_length, featurizer.win_length, window, return_complex=True,
                center=True, pad_mode="constant",
            )  # fmt: skip
            samples = torch.from_numpy(self.audio).double()
            with torch.inference_mode():
                lengths = torch.full((len(samples),), samples.shape[1])
                self._mel = featurizer(samples, lengths)[0].float().contiguous()
        return self._mel

    def window(self, chunk: Chunk, position: int) -> slice:
        """Mel frames a step reads, history included; begins below 0 at the start of a stream."""
        factor = self.manifest.encoder.subsampling
        return slice(factor * (position - 2), factor * (position + chunk.frames - 1) + 1)


def longest(manifest: Manifest, chunk: Chunk) -> Chunk:
    """The longest chunk size with the same left context."""
    return max((other for other in manifest.chunks if other.left == chunk.left), key=lambda other: other.frames)


class Side(Protocol):
    """One implementation. `fill` first, then `step` after `step`, each where the one before ended.

    Sides that can change their chunk size while they run `fill` with the longest: it takes the fewest steps, and with
    80 ms NeMo's very first step has no frame and stumbles over that.
    """

    name: str
    covers: str
    exact: bool  # must say the same tokens as NeMo in fp32

    def fill(self, frames: int) -> None:
        """Hear so many frames from the start of the streams, so that every cache is full. Not timed."""
        ...

    def step(self, position: int) -> None:
        """One chunk of every row."""
        ...

    def tokens(self) -> Tokens | None:
        """Ids each row has said since the start; None if it does not decode. Not timed."""
        ...

    def close(self) -> None: ...


class Ours:
    """Any backend of ours. A step begins with PCM."""

    covers = FULL

    def __init__(self, name: str, backend: Backend, feed: Feed, chunk: Chunk, exact: bool = True) -> None:
        self.name, self.exact = name, exact
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

    def _step(self, chunk: Chunk, position: int) -> None:
        emissions = self._backend.submit(self._feed.batch(chunk, position)).result()
        for row, new in zip(self._said, emissions.tokens, strict=True):
            row.extend(new.tolist())

    def close(self) -> None:
        self._backend.close()


class Nemo:
    """NeMo's official step, `conformer_stream_step`: batched label looping, caches and hypotheses carried.

    `kind` is "fp32"; "bf16", weights, inputs and caches truly so (autocast would bring attention back to fp32);
    "compile", fp32 with the encoder's forward under torch.compile; "graph", bf16 on a GPU with the encoder's step
    (`cache_aware_stream_step`) captured in a CUDA graph over static buffers, its caches moved on within the graph.
    """

    covers = DECODED

    def __init__(self, model: Any, feed: Feed, chunk: Chunk, kind: str = "fp32") -> None:
        import torch

        self.name, self.exact = f"NeMo, {kind}", kind in ("fp32", "compile")
        self._torch, self._model, self._feed, self._wanted = torch, model, feed, chunk
        self._device = next(model.parameters()).device
        self._type = torch.bfloat16 if kind in ("bf16", "graph") else torch.float32
        with torch.inference_mode():
            self._mel = feed.mel(model).to(self._device, self._type)
            model.to(self._type)
        self._use(longest(feed.manifest, chunk))
        self._caches = model.encoder.get_initial_cache_state(batch_size=feed.rows, dtype=self._type)
        self._hypotheses: Any = None
        self._kind, self._graph = kind, None
        self._eager = self._forward = model.encoder.forward_internal
        if kind == "graph" and self._device.type != "cuda":
            raise OptionError("a CUDA graph needs a GPU.")

    def fill(self, frames: int) -> None:
        position = 0
        while position < frames:
            self.step(position)
            position += self._chunk.frames
        if int(self._caches[2].min()) < self._chunk.left:
            raise BackendError(f"NeMo holds {int(self._caches[2].min())} frames of context, not {self._chunk.left}.")
        self._use(self._wanted)
        if self._kind == "compile":
            self._forward = self._torch.compile(self._eager, dynamic=False)
        if self._kind == "graph":
            self._capture(position)

    def step(self, position: int) -> None:
        with self._torch.inference_mode():
            if self._graph:
                signal = self._mel[:, :, self._window(position)]
                self._static["processed_signal"].copy_(signal)
                self._graph.replay()
                encoded, lengths = self._outputs
                self._hypotheses = self._model.decoding.rnnt_decoder_predictions_tensor(
                    encoder_output=encoded, encoded_lengths=lengths, return_hypotheses=True,
                    partial_hypotheses=self._hypotheses,
                )  # fmt: skip
                return
            self._model.encoder.forward_internal = self._forward  # one model may serve several sides
            _, _, *caches, self._hypotheses = self._model.conformer_stream_step(
                **self._inputs(position), previous_hypotheses=self._hypotheses, return_transcription=True
            )
        self._caches = tuple(caches)

    def tokens(self) -> Tokens:
        return [[int(token) for token in hypothesis.y_sequence] for hypothesis in self._hypotheses]

    def close(self) -> None:
        self._model.encoder.forward_internal = self._eager
        self._caches = self._hypotheses = self._graph = None

    def _use(self, chunk: Chunk) -> None:
        self._chunk = chunk
        with _quiet():
            self._model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])

    def _window(self, position: int) -> slice:
        window = self._feed.window(self._chunk, position)
        return slice(max(window.start, 0), window.stop)

    def _inputs(self, position: int) -> dict[str, Any]:
        signal = self._mel[:, :, self._window(position)]
        channel, time, length = self._caches
        first = position == 0
        return {
            "processed_signal": signal,
            "processed_signal_length": self._torch.full((self._feed.rows,), signal.shape[2], device=self._device),
            "cache_last_channel": channel,
            "cache_last_time": time,
            "cache_last_channel_len": length,
            "keep_all_outputs": False,
            "drop_extra_pre_encoded": 0 if first else self._model.encoder.streaming_cfg.drop_extra_pre_encoded,
        }

    def _capture(self, position: int) -> None:
        """Record the encoder's step over copies of its inputs; the graph ends by moving the caches on."""
        torch, encoder = self._torch, self._model.encoder
        inputs = self._inputs(position)
        self._static = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        names = ("cache_last_channel", "cache_last_time", "cache_last_channel_len")
        kept = {name: self._static[name].clone() for name in names}
        side = torch.cuda.Stream()
        with torch.inference_mode():
            with torch.cuda.stream(side):
                for _ in range(3):
                    encoder.cache_aware_stream_step(**self._static)
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                encoded, lengths, *caches = encoder.cache_aware_stream_step(**self._static)
                for name, cache in zip(names, caches, strict=True):
                    self._static[name].copy_(cache)
            for name in names:
                self._static[name].copy_(kept[name])
        self._outputs = encoded, lengths


class NemoOnnx:
    """NeMo's own ONNX export in ONNX Runtime: caches stay in buffers that are bound, decoding is label looping as ours.

    At the start of a stream its step sees nine frames of zeros that NeMo's offline forward does not, so its first words
    may differ.
    """

    covers, exact = DECODED, False

    def __init__(self, exported: Path, model: Any, feed: Feed, chunk: Chunk, threads: int) -> None:
        import onnxruntime as ort

        self.name = "ONNX Runtime, NeMo's export"
        self._ort, self._feed, self._chunk = ort, feed, chunk
        history = -feed.window(chunk, 0).start
        self._mel = np.pad(feed.mel(model).numpy(), ((0, 0), (0, 0), (history, 0)))
        self._history = history
        self._encoder = _session(exported / "encoder.onnx", threads)
        self._net = _NemoTransducer(exported, feed.manifest)
        spec, net = feed.manifest.encoder, feed.manifest.decoder
        caches = {
            "cache_last_channel": np.zeros((feed.rows, spec.layers, spec.cache, spec.d_model), np.float32),
            "cache_last_time": np.zeros((feed.rows, spec.layers, spec.d_model, spec.conv_cache), np.float32),
            "cache_last_channel_len": np.zeros(feed.rows, np.int64),
        }
        self._caches = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in caches.items()}
        self._binding = self._encoder.io_binding()
        start = Predictions.start(self._net, net.layers, net.hidden)
        self._state = start.repeated(feed.rows)
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
        for output in self._encoder.get_outputs():
            binding.bind_output(output.name)
        self._encoder.run_with_iobinding(binding)
        encoded, _, *caches = binding.get_outputs()
        self._caches = dict(zip(self._caches, caches, strict=True))
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

    def __init__(self, exported: Path, manifest: Manifest) -> None:
        self.blank, self.max_symbols = manifest.decoder.blank, manifest.decoder.max_symbols
        self._decoder = _session(exported / "decoder.onnx", 1)
        self._joint = _session(exported / "joiner.onnx", 1)
        self._names = [each.name for each in self._decoder.get_inputs()]

    def predict(self, tokens: Any, h: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
        rows = len(tokens)
        inputs = (
            tokens.astype(np.int32)[:, None], np.ones(rows, np.int32),
            np.ascontiguousarray(h.transpose(1, 0, 2)), np.ascontiguousarray(c.transpose(1, 0, 2)),
        )  # fmt: skip
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

    def __init__(self, exported: Path, feed: Feed, chunk: Chunk, threads: int, precision: str = "fp32") -> None:
        import sherpa_onnx

        self.name = f"sherpa-onnx, {precision}"
        self._feed, self._chunk = feed, chunk
        suffix = ".onnx" if precision == "fp32" else f".{precision}.onnx"
        files = {name: str(exported / f"{name}{suffix}") for name in ("encoder", "decoder", "joiner")}
        self._recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(
            tokens=str(exported / "tokens.txt"), **files, num_threads=threads, decoding_method="greedy_search",
            sample_rate=feed.manifest.features.sample_rate, feature_dim=feed.manifest.features.mels,
        )  # fmt: skip
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
    """Hugging Face's `nemotron_asr_streaming`, its encoder with its caches.

    Encoder alone: its `generate` decodes token by token in Python and cannot be stopped at a chunk's end, so decoding
    is left out of its time.
    """

    name, covers, exact = "transformers", ENCODED, True

    def __init__(self, theirs: Any, model: Any, feed: Feed, chunk: Chunk) -> None:
        import torch

        self._torch, self._model, self._feed, self._chunk = torch, theirs, feed, chunk
        self._mel = feed.mel(model).transpose(1, 2).contiguous()
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
                self._mel[:, start : window.stop], num_lookahead_tokens=self._chunk.frames - 1, use_cache=True,
                **self._caches,
            )  # fmt: skip
        self._caches = {"past_key_values": out.past_key_values, "padding_cache": out.padding_cache}

    def tokens(self) -> None:
        return None

    def close(self) -> None:
        self._caches = {}


# -- setting them up ---------------------------------------------------------------------------------------------------


def load_nemo(checkpoint: Path) -> Any:
    """The checkpoint in NeMo, eval mode, fp32, set to batched label looping without beam, timestamps or confidence.

    On a GPU: products in TF32, and NeMo's own CUDA graphs for decoding.
    """
    import torch
    from nemo.collections.asr.models import ASRModel
    from omegaconf import OmegaConf

    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    with torch.inference_mode(), _quiet():
        model = ASRModel.restore_from(str(checkpoint), map_location="cpu").eval().float()
        symbols = OmegaConf.select(model.cfg, "decoding.greedy.max_symbols", default=10) or 10
        greedy = {"max_symbols": symbols, "loop_labels": True, "use_cuda_graph_decoder": torch.cuda.is_available()}
        model.change_decoding_strategy(OmegaConf.create({"strategy": "greedy_batch", "greedy": greedy}), verbose=False)
    return model.cuda() if torch.cuda.is_available() else model


def export_nemo(model: Any, manifest: Manifest, chunk: Chunk, folder: Path, int8: bool = False) -> Path:
    """NeMo's ONNX export of one chunk size, with metadata and tokens as sherpa-onnx's published recipe has them."""
    import onnx

    folder.mkdir(parents=True)
    with _quiet():
        model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        model.set_export_config({"cache_support": True})
        for part, name in ((model.encoder, "encoder"), (model.decoder, "decoder"), (model.joint, "joiner")):
            part.export(str(folder / f"{name}.onnx"))
    spec, net, factor = manifest.encoder, manifest.decoder, manifest.encoder.subsampling
    described = {
        "vocab_size": net.vocabulary, "window_size": factor * chunk.frames + 9, "chunk_size_ms": chunk.ms,
        "chunk_shift": factor * chunk.frames, "normalize_type": "", "cache_last_channel_dim1": spec.layers,
        "cache_last_channel_dim2": spec.cache, "cache_last_channel_dim3": spec.d_model,
        "cache_last_time_dim1": spec.layers, "cache_last_time_dim2": spec.d_model,
        "cache_last_time_dim3": spec.conv_cache, "pred_rnn_layers": net.layers, "pred_hidden": net.hidden,
        "subsampling_factor": factor, "feat_dim": manifest.features.mels,
        "model_type": "EncDecHybridRNNTCTCBPEModel", "version": "1", "model_author": "NeMo",
    }  # fmt: skip
    encoder = onnx.load(folder / "encoder.onnx")
    for name, value in described.items():
        encoder.metadata_props.add(key=name, value=str(value))
    outside = sum(tensor.ByteSize() for tensor in encoder.graph.initializer) > 1 << 30
    for left in folder.glob("*"):  # the exporter leaves a file per large weight
        if left.suffix != ".onnx":
            left.unlink()
    onnx.save(
        encoder, folder / "encoder.onnx", save_as_external_data=outside, all_tensors_to_one_file=True,
        location="encoder.data",
    )  # fmt: skip
    decoder = onnx.load(folder / "decoder.onnx")
    for value in [*decoder.graph.input, *decoder.graph.output]:
        shape = value.type.tensor_type.shape.dim
        if len(shape) == 3 and shape[0].dim_value == net.layers:
            shape[1].dim_param = "B"  # exported as 1 for one of the two states
    onnx.save(decoder, folder / "decoder.onnx")
    pieces = [*model.joint.vocabulary, "<blk>"]
    lines = "".join(f"{piece} {index}\n" for index, piece in enumerate(pieces))
    (folder / "tokens.txt").write_text(lines, encoding="utf-8")
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        for name in ("encoder", "decoder", "joiner"):
            source, target = folder / f"{name}.onnx", folder / f"{name}.int8.onnx"
            quantize_dynamic(source, target, weight_type=QuantType.QUInt8)
    return folder


def timed_plan(bundle: Bundle, chunk: Chunk, precision: str, folder: Path) -> Plan | None:
    """A CPU engine to be timed: not gated, since how long it takes does not depend on what its weights have learnt."""
    if precision == "fp32":
        return None
    if precision != "int8":
        raise OptionError(f"a CPU runs fp32 and int8, not {precision}; choose one of them, or --device cuda.")
    import onnxruntime

    from nemostream.engine.precision import write_int8_for_cpu

    recipe = Recipe.of(
        bundle, chunk.ms, backend="onnxruntime", library=onnxruntime.__version__, precision="int8",
        device="cpu, not gated", max_batch=0, cell="float32",
    )  # fmt: skip
    store = PlanStore(folder)
    return store.find(recipe) or store.put(
        recipe, lambda place: write_int8_for_cpu(bundle, chunk, place, recipe.stem), lambda plan: {}
    )


@contextmanager
def timed_backend(
    bundle: Bundle,
    chunks: Sequence[Chunk],
    precision: str,
    rows: int,
    *,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
) -> Iterator[Backend]:
    """A backend of `rows` slots whose steps are to be timed, the chunk sizes loaded."""
    from nemostream.engines import open_backend

    with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
        if device == "cpu":
            plans = {chunk.ms: timed_plan(bundle, chunk, precision, engines or Path(folder)) for chunk in chunks}
            found = {ms: plan for ms, plan in plans.items() if plan}
            cpu = OrtBackend(bundle, capacity=rows, max_batch=rows, threads=threads, plans=found or None)
            for chunk in chunks:
                cpu.prepare(chunk)
            backend: Backend = cpu
        else:
            backend = open_backend(
                bundle, device=device, precision=precision, capacity=rows, max_batch=rows, engines=engines
            )
        try:
            yield backend
        finally:
            backend.close()


def _session(graph: Path, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    there = ort.get_available_providers()
    wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
    return ort.InferenceSession(graph, options, providers=wanted)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@contextmanager
def _quiet() -> Iterator[None]:
    """NeMo without its information and warnings."""
    from nemo.utils import logging as nemo_logging

    level = nemo_logging.getEffectiveLevel()
    nemo_logging.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        nemo_logging.setLevel(level)
