"""NeMo: its streaming step in several configurations, its ONNX export, and its offline transcripts.

All configurations use batched greedy decoding with label looping, without beam search, timestamps or confidence (on a
GPU with NeMo's CUDA graphs), inference mode, and features computed in advance.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.benchmarks.harness.records import Tokens
from nemostream.benchmarks.harness.timed import AudioFeed, longest
from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import BackendError, OptionError

KINDS = {
    "fp32": "`conformer_stream_step`, weights and caches in fp32 (on a GPU products in TF32)",
    "bf16": "`conformer_stream_step`, weights, inputs and caches in bf16 (autocast would run attention in fp32)",
    "compile": "fp32, forward of the encoder under torch.compile (static shapes, frozen weights, autotuned products)",
    "compile bf16": (
        "bf16, forward of the encoder under torch.compile (static shapes, frozen weights, autotuned products)"
    ),
    "graph": "bf16, encoder step captured in a CUDA graph with static buffers, cache update included",
    "built-in graph": "bf16, NeMo's own CUDA graph of the encoder step (`set_streaming_cuda_graphs`)",
}


class NemoRunner:
    """NeMo's official step `conformer_stream_step` with its caches and hypotheses; `kind` is a key of `KINDS`.

    Runners may share a model, except that "built-in graph" needs one of its own: it changes the encoder.
    """

    covers = "mel to tokens"

    def __init__(self, model: Any, feed: AudioFeed, chunk: ChunkConfig, kind: str = "fp32") -> None:
        import torch

        self.name, self.setup = f"NeMo, {kind}", KINDS[kind]
        self._torch, self._model, self._feed, self._target_chunk = torch, model, feed, chunk
        self._device = next(model.parameters()).device
        # On a GPU, products in TF32 may change the tokens of a model with random weights.
        self.exact = kind in ("fp32", "compile") and self._device.type == "cpu"
        self._dtype = torch.bfloat16 if "graph" in kind or "bf16" in kind else torch.float32
        with torch.inference_mode():
            self._mel = feed.mel(model).to(self._device, self._dtype)
            model.to(self._dtype)
        self._set_chunk(longest(feed.manifest, chunk))
        self._caches = model.encoder.get_initial_cache_state(
            batch_size=feed.rows, dtype=self._dtype, device=self._device
        )
        self._hypotheses: Any = None
        self._kind = kind
        self._replay: Callable[[], None] | None = None
        self._eager = self._forward = model.encoder.forward_internal

    def fill_caches(self, frames: int) -> None:
        position = 0
        while position < frames:
            self.step(position)
            position += self._chunk.frames
        if int(self._caches[2].min()) < self._chunk.left:
            raise BackendError(f"NeMo caches {int(self._caches[2].min())} frames of context, not {self._chunk.left}.")
        self._set_chunk(self._target_chunk)
        if self._kind.startswith("compile"):
            options = {"freezing": True, "max_autotune": True}
            self._forward = self._torch.compile(self._eager, dynamic=False, options=options)
            # The first call compiles; its caches are discarded.
            with self._torch.inference_mode():
                self._model.encoder.forward_internal = self._forward
                self._model.encoder.cache_aware_stream_step(**self._inputs(position))
        if self._kind == "graph":
            self._capture(position)
        if self._kind == "built-in graph":
            self._enable_built_in_graph(position)

    def step(self, position: int) -> None:
        with self._torch.inference_mode():
            if self._replay:
                self._static["processed_signal"].copy_(self._mel[:, :, self._window(position)])
                self._replay()
                encoded, lengths = self._outputs
                self._hypotheses = self._model.decoding.rnnt_decoder_predictions_tensor(
                    encoder_output=encoded,
                    encoded_lengths=lengths,
                    return_hypotheses=True,
                    partial_hypotheses=self._hypotheses,
                )
                return
            self._model.encoder.forward_internal = self._forward  # several runners may share a model
            _, _, *caches, self._hypotheses = self._model.conformer_stream_step(
                **self._inputs(position), previous_hypotheses=self._hypotheses, return_transcription=True
            )
        self._caches = tuple(caches)

    def tokens(self) -> Tokens:
        return [[int(token) for token in hypothesis.y_sequence] for hypothesis in self._hypotheses]

    def close(self) -> None:
        self._model.encoder.forward_internal = self._eager
        if self._kind == "built-in graph":
            self._model.encoder.set_streaming_cuda_graphs(False)
        self._caches = self._hypotheses = self._replay = None

    def _set_chunk(self, chunk: ChunkConfig) -> None:
        self._chunk = chunk
        with quiet():
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

    def _enable_built_in_graph(self, position: int) -> None:
        """Let NeMo capture the step; the caches of these runs are discarded."""
        check_built_in_graph(self._model)
        encoder = self._model.encoder
        helper = encoder.set_streaming_cuda_graphs(True, warmup_steps=1)
        helper.force_cuda_graphs_mode("full_graph")  # otherwise NeMo runs eager, without an error, if capture fails
        with self._torch.inference_mode():
            for _ in range(helper.warmup_steps + 1):
                encoder.cache_aware_stream_step(**self._inputs(position))

    def _capture(self, position: int) -> None:
        """Capture the encoder step on static copies of its inputs; the graph also updates the caches."""
        torch, encoder = self._torch, self._model.encoder
        inputs = self._inputs(position)
        self._static = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
        names = ("cache_last_channel", "cache_last_time", "cache_last_channel_len")
        initial = {name: self._static[name].clone() for name in names}

        def encoder_step() -> None:
            encoded, lengths, *caches = encoder.cache_aware_stream_step(**self._static)
            for name, cache in zip(names, caches, strict=True):
                self._static[name].copy_(cache)
            self._outputs = encoded, lengths

        with torch.inference_mode():
            self._replay = record_graph(encoder_step)
            for name in names:
                self._static[name].copy_(initial[name])


def check_built_in_graph(model: Any) -> None:
    """Raise `OptionError` unless the installed NeMo can capture the encoder step itself, on a GPU.

    Source: pull request 15863 of NVIDIA-NeMo/Speech (merged in 2026), in no release up to 3.0.0.
    """
    import nemo
    import torch

    if not hasattr(model.encoder, "set_streaming_cuda_graphs"):
        raise OptionError(
            f"NeMo {nemo.__version__} has no CUDA graph of its own for the encoder step; install a version with "
            "`set_streaming_cuda_graphs` (newer than 3.0.0)."
        )
    if not torch.cuda.is_available():
        raise OptionError("a CUDA graph needs a GPU.")


def record_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Capture the work that `work` queues in a CUDA graph, after three warm-up runs. Return a function to launch it.

    Raises `OptionError` without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise OptionError("a CUDA graph needs a GPU.")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return lambda: graph.replay()


class NemoOffline:
    """NeMo's offline transcripts of whole recordings, with the attention mask of a chunk size and greedy decoding."""

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        self._model = load_nemo(checkpoint, device)

    def transcribe(self, samples: NDArray[np.float32], chunk: ChunkConfig) -> tuple[list[int], str]:
        """Return token ids and text of one recording; `samples` [N] at the sample rate of the model."""
        import torch

        model = self._model
        device = next(model.parameters()).device
        model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        model.preprocessor.featurizer.dither = 0.0
        with torch.inference_mode():
            signal = torch.from_numpy(np.asarray(samples, np.float32))[None].to(device)
            mel, length = model.preprocessor(input_signal=signal, length=torch.tensor([signal.shape[1]], device=device))
            encoded, length = model.encoder(audio_signal=mel, length=length)
            hypothesis = model.decoding.rnnt_decoder_predictions_tensor(encoded, length, return_hypotheses=True)[0]
        tokens = [int(token) for token in hypothesis.y_sequence]
        return tokens, model.tokenizer.ids_to_text(tokens)


# -- loading and export ------------------------------------------------------------------------------------------------


def load_nemo(checkpoint: Path, device: str = "cpu") -> Any:
    """Load a checkpoint in NeMo: eval mode, fp32, batched label looping without beam, timestamps or confidence.

    On a GPU (`device` "cuda"), products use TF32 and decoding uses NeMo's CUDA graphs.
    """
    import torch
    from nemo.collections.asr.models import ASRModel
    from omegaconf import OmegaConf

    gpu = device != "cpu"
    if gpu:
        torch.set_float32_matmul_precision("high")
    with torch.inference_mode(), quiet():
        model = ASRModel.restore_from(str(checkpoint), map_location="cpu").eval().float()
        symbols = OmegaConf.select(model.cfg, "decoding.greedy.max_symbols", default=10) or 10
        greedy = {"max_symbols": symbols, "loop_labels": True, "use_cuda_graph_decoder": gpu}
        model.change_decoding_strategy(OmegaConf.create({"strategy": "greedy_batch", "greedy": greedy}), verbose=False)
    return model.cuda() if gpu else model


def export_nemo(model: Any, manifest: Manifest, chunk: ChunkConfig, folder: Path, int8: bool = False) -> Path:
    """Export one chunk size to ONNX with NeMo, with metadata and tokens as in the published recipe of sherpa-onnx."""
    import onnx

    folder.mkdir(parents=True)
    with quiet():
        model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        model.set_export_config({"cache_support": True})
        for part, name in ((model.encoder, "encoder"), (model.decoder, "decoder"), (model.joint, "joiner")):
            part.export(str(folder / f"{name}.onnx"))
    spec, net, factor = manifest.encoder, manifest.decoder, manifest.encoder.subsampling
    metadata = {
        "vocab_size": net.vocabulary,
        "window_size": factor * chunk.frames + 9,
        "chunk_size_ms": chunk.ms,
        "chunk_shift": factor * chunk.frames,
        "normalize_type": "",
        "cache_last_channel_dim1": spec.layers,
        "cache_last_channel_dim2": spec.cache,
        "cache_last_channel_dim3": spec.d_model,
        "cache_last_time_dim1": spec.layers,
        "cache_last_time_dim2": spec.d_model,
        "cache_last_time_dim3": spec.conv_cache,
        "pred_rnn_layers": net.layers,
        "pred_hidden": net.hidden,
        "subsampling_factor": factor,
        "feat_dim": manifest.features.mels,
        "model_type": "EncDecHybridRNNTCTCBPEModel",
        "version": "1",
        "model_author": "NeMo",
    }
    encoder = onnx.load(folder / "encoder.onnx")
    for name, value in metadata.items():
        encoder.metadata_props.add(key=name, value=str(value))
    external = sum(tensor.ByteSize() for tensor in encoder.graph.initializer) > 1 << 30
    for file in folder.glob("*"):  # the exporter writes one file for each large weight
        if file.suffix != ".onnx":
            file.unlink()
    onnx.save(
        encoder,
        folder / "encoder.onnx",
        save_as_external_data=external,
        all_tensors_to_one_file=True,
        location="encoder.data",
    )
    decoder = onnx.load(folder / "decoder.onnx")
    for value in [*decoder.graph.input, *decoder.graph.output]:
        shape = value.type.tensor_type.shape.dim
        if len(shape) == 3 and shape[0].dim_value == net.layers:
            shape[1].dim_param = "B"  # one of the two states is exported with batch size 1
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


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress NeMo's log messages below errors, and warnings."""
    from nemo.utils import logging as nemo_logging

    level = nemo_logging.getEffectiveLevel()
    nemo_logging.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        nemo_logging.setLevel(level)
