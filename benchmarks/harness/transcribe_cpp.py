"""Runner of transcribe.cpp, which runs these models on ggml, and the conversion of a checkpoint to its GGUF format.

Its packages belong to no extra, because the native one has 67 MB: `pip install transcribe-cpp gguf`. The conversion
needs neither NeMo nor the converter of transcribe.cpp's repository, and reads one tensor at a time. The types of the
weights are those of its tool `transcribe-quantize`: in q8 and fp16, the linear layers have blocks of 8-bit integers
(Q8_0) or fp16, the pointwise convolutions fp16, and everything else fp32.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.harness.records import Tokens
from nemostream.benchmarks.harness.runners import PCM_TO_TOKENS
from nemostream.benchmarks.harness.timed import AudioFeed
from nemostream.bundle import ChunkConfig
from nemostream.errors import BackendError, CheckpointError, OptionError
from nemostream.export.checkpoint import Checkpoint, open_checkpoint

_TYPES = {"fp32": "F32", "fp16": "F16", "q8": "Q8_0"}  # of linear layers, as `gguf` names them
# Parts of the names of weights: NeMo's, and those of transcribe.cpp.
_NAMES = {
    "encoder.pre_encode.": "enc.pre_encode.",
    "encoder.layers.": "enc.blocks.",
    "feed_forward": "ff",
    "self_att.": "attn.",
    "self_attn.": "attn.",
    "pointwise_conv": "pointwise",
    "depthwise_conv": "depthwise",
    "batch_norm": "bn",
    "decoder.prediction.embed.": "pred.embed.",
}
_LSTM = "decoder.prediction.dec_rnn.lstm."


class TranscribeCppRunner:
    """One stream of transcribe.cpp on the CPU. A model has one stream at a time, so the batch size is 1.

    `gguf` is a file of `write_gguf`. A step feeds the samples of a chunk and ends when its tokens can be read; the
    features are its own. Raises `BackendError` if the package is missing, and `OptionError` for more than one row.
    """

    covers, exact = PCM_TO_TOKENS, False

    def __init__(self, gguf: Path, feed: AudioFeed, chunk: ChunkConfig, threads: int, precision: str) -> None:
        transcribe_cpp = _import("transcribe_cpp")
        if feed.rows != 1:
            raise OptionError(f"transcribe.cpp has one stream per model, not {feed.rows}; choose --batch 1.")
        transcribe_cpp.set_log_callback(None)
        self.name = f"transcribe.cpp, {precision}"
        self.setup = (
            f"stream of transcribe.cpp {transcribe_cpp.__version__} (ggml, CPU), linear layers in {_TYPES[precision]}"
        )
        self._feed, self._chunk = feed, chunk
        self._model = transcribe_cpp.Model(gguf, backend="cpu")
        self._session = self._model.session(n_threads=threads)
        options = transcribe_cpp.ParakeetStreamOptions(att_context_right=chunk.frames - 1)
        self._stream = self._session.stream(family=options)
        self.processed_ms = 0  # audio that the encoder has read since the start

    def fill_caches(self, frames: int) -> None:
        for position in range(0, frames, self._chunk.frames):
            self.step(position)

    def step(self, position: int) -> None:
        start = position * self._feed.manifest.samples_per_frame
        update = self._stream.feed(self._feed.audio[0, start : start + self._chunk.samples])
        self.processed_ms = update.audio_committed_ms

    def tokens(self) -> Tokens:
        return [[token.id for token in self._stream.snapshot().tokens]]

    def close(self) -> None:
        self._session.close()
        self._model.close()


def write_gguf(checkpoint: Path, target: Path, precision: str) -> Path:
    """Write a `.nemo` checkpoint as the GGUF file that transcribe.cpp reads; return `target`.

    `precision` is "fp32", "fp16" or "q8". Raises `BackendError` if the package `gguf` is missing, and `CheckpointError`
    for models with language prompts or speaker kernels, which this conversion does not support.
    """
    gguf = _import("gguf")
    with tempfile.TemporaryDirectory(prefix="nemostream-", dir=target.parent) as folder:
        model = open_checkpoint(checkpoint, Path(folder))
        if model.languages.count or model.speaker_kernels:
            raise CheckpointError(
                f"{checkpoint} has language prompts or speaker kernels; choose a model without them for transcribe.cpp."
            )
        writer = gguf.GGUFWriter(target, "parakeet", use_temp_file=True)
        try:
            _add_settings(writer, model, gguf)
            linear = getattr(gguf.GGMLQuantizationType, _TYPES[precision])
            for name, array in _weights(model):
                _add_weight(writer, name, array, linear, gguf)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return target


def _add_settings(writer: Any, model: Checkpoint, gguf: ModuleType) -> None:
    """Add sizes and vocabulary. transcribe.cpp reads them by these names and types (its `parakeet/weights.cpp`)."""
    front, encoder, net = model.features, model.encoder, model.decoder
    contexts = sorted(((chunk.left, chunk.frames - 1) for chunk in model.chunks), key=lambda pair: -pair[1])
    writer.add_string("stt.variant", "nemotron-speech-streaming-en-0.6b")
    writer.add_bool("stt.capability.streaming", True)
    writer.add_array("general.languages", ["en"])
    writer.add_string("stt.parakeet.head_kind", "rnnt")

    kinds = gguf.TokenType
    pieces = [*model.pieces(), "<blank>"]
    writer.add_string("tokenizer.ggml.model", "bpe")
    writer.add_array("tokenizer.ggml.tokens", pieces)
    writer.add_array("tokenizer.ggml.scores", [0.0] * len(pieces))
    special = {"<unk>": kinds.UNKNOWN, "<blank>": kinds.CONTROL}
    writer.add_array("tokenizer.ggml.token_type", [int(special.get(piece, kinds.NORMAL)) for piece in pieces])
    writer.add_uint32("tokenizer.ggml.blank_token_id", net.vocabulary)

    for name, size in {
        "encoder.n_layers": encoder.layers,
        "encoder.d_model": encoder.d_model,
        "encoder.n_heads": encoder.heads,
        "encoder.d_ff": len(model.array("encoder.layers.0.feed_forward1.linear1.weight")),
        "encoder.conv_kernel": encoder.conv_cache + 1,
        "encoder.subsampling_factor": encoder.subsampling,
        "encoder.subsampling_channels": len(model.array("encoder.pre_encode.conv.0.weight")),
        "encoder.pos_emb_max_len": 5000,
        "predictor.hidden": net.hidden,
        "predictor.n_layers": net.layers,
        "predictor.vocab": net.vocabulary + 1,
        "joint.hidden": net.joint,
        "joint.num_extra_outputs": 0,
    }.items():
        writer.add_uint32(f"stt.parakeet.{name}", size)
    writer.add_string("stt.parakeet.joint.activation", net.activation)
    writer.add_string("stt.parakeet.encoder.att_context_style", "chunked_limited")
    writer.add_string("stt.parakeet.encoder.conv_norm_type", model.conv_norm)
    writer.add_bool("stt.parakeet.encoder.use_bias", model.use_bias)
    writer.add_bool("stt.parakeet.encoder.xscaling", model.input_scale != 1)
    writer.add_array("stt.parakeet.encoder.att_context_size_choices", [size for pair in contexts for size in pair])
    for name, size in {
        "att_context_left": contexts[0][0],
        "att_context_right": contexts[0][1],
        "conv_context_left": encoder.conv_cache,
        "conv_context_right": 0,
        "streaming.pre_encode_cache_size": encoder.mel_cache,
        "streaming.drop_extra_pre_encoded": 2,
        "streaming.sampling_frames_first": 1,
    }.items():
        writer.add_int32(f"stt.parakeet.encoder.{name}", size)

    for name, text in {"type": "mel", "window": "hann", "normalize": "none"}.items():
        writer.add_string(f"stt.frontend.{name}", text)
    for name, size in {
        "num_mels": front.mels,
        "sample_rate": front.sample_rate,
        "n_fft": front.n_fft,
        "win_length": front.window,
        "hop_length": front.hop,
    }.items():
        writer.add_uint32(f"stt.frontend.{name}", size)
    filters = {"dither": 0.0, "pre_emphasis": front.preemphasis, "f_min": 0.0, "f_max": front.sample_rate / 2}
    for name, value in filters.items():
        writer.add_float32(f"stt.frontend.{name}", value)


def _weights(model: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the weights by their names in transcribe.cpp. An LSTM of PyTorch has two biases, whose sum counts."""
    names = _NAMES | {f"{model.joint_output}.": "joint.out."}
    for name in model.state:
        if name.startswith(("encoder.", "joint.", "decoder.prediction.embed.")) and "num_batches_tracked" not in name:
            renamed = name
            for old, new in names.items():
                renamed = renamed.replace(old, new)
            yield renamed, model.array(name)
    for layer in range(model.decoder.layers):
        yield f"pred.lstm.{layer}.Wx", model.array(f"{_LSTM}weight_ih_l{layer}")
        yield f"pred.lstm.{layer}.Wh", model.array(f"{_LSTM}weight_hh_l{layer}")
        biases = (model.array(f"{_LSTM}bias_{side}h_l{layer}") for side in "ih")
        yield f"pred.lstm.{layer}.bias", np.add(*biases)


def _add_weight(writer: Any, name: str, array: NDArray[np.float32], linear: Any, gguf: ModuleType) -> None:
    kind = gguf.GGMLQuantizationType.F32
    if linear != kind and re.search(r"\.pointwise\d\.weight", name):
        kind = gguf.GGMLQuantizationType.F16
    elif array.ndim == 2 and ".pos_bias_" not in name:
        kind = linear
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)


def _import(package: str) -> ModuleType:
    """Import a package of the runner. Raises `BackendError` with the command that installs it."""
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise BackendError(f"transcribe.cpp cannot be imported ({error}): pip install transcribe-cpp gguf") from error
