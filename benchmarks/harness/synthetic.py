"""Create a NeMo checkpoint with the exact shape of nemotron-speech-streaming-en-0.6b and random weights.

The time of a step depends on shapes and not on the values of the weights, with two exceptions:

* For parity tests, no parameter may have a default value that hides errors: LayerNorm gains and offsets, positional
  biases and batch-norm statistics are random.
* The time of decoding depends on the number of emitted tokens: `random_weights` calibrates the token rate.

The same seed gives the same weights with the same version of PyTorch on the same type of processor. Transcripts are
meaningless.

    nemostream bench synthetic OUT.nemo --seed 0
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nemostream.benchmarks.harness.random_weights import MAX_SYMBOLS, calibrate_random_weights
from nemostream.clips import read_clip
from nemostream.errors import BackendError
from nemostream.extras import install_command

_SAMPLE_RATE = 16000  # Hz


@dataclass(frozen=True)
class Sizes:
    """Sizes and options of the model. The defaults are those of nemotron-speech-streaming-en-0.6b.

    Source: `model_config.yaml` of the published checkpoint, nvidia/nemotron-speech-streaming-en-0.6b. Tests use smaller
    sizes. Names follow NeMo's configuration.
    """

    n_layers: int = 24
    d_model: int = 1024
    n_heads: int = 8
    subsampling: int = 8  # mel frames per encoder frame
    conv_channels: int = 256  # of the subsampling
    conv_kernel: int = 9  # frames, depthwise convolution of a Conformer layer
    conv_norm_type: str = "layer_norm"
    use_bias: bool = False
    xscaling: bool = False
    untie_biases: bool = True
    # (left, right) attention context in encoder frames of 80 ms: chunks of 1120, 560, 160 and 80 ms
    contexts: Sequence[Sequence[int]] = ((70, 13), (70, 6), (70, 1), (70, 0))
    mels: int = 128  # mel bins
    pred_hidden: int = 640
    pred_layers: int = 2
    joint_hidden: int = 640
    vocab: int = 1024  # without blank


def synthetic_model(out: str | Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a checkpoint with random weights to `out` and return its path; `overrides` are fields of `Sizes`.

    Needs NeMo, and twice the size of the model both in memory and in the temporary folder while saving.
    """
    import torch
    from nemo.collections.asr.models import EncDecRNNTBPEModel

    out, sizes = Path(out), replace(Sizes(), **overrides)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed)
        train_tokenizer(Path(folder), sizes.vocab, seed)
        model = EncDecRNNTBPEModel(cfg=model_config(sizes, Path(folder)))
        model.eval()
        with torch.no_grad():
            _randomise_constants(model)
            clip = torch.from_numpy(speech())
            frames = _encode(model, sizes, clip.repeat(2))
            calibrate_random_weights(model, frames, len(frames) * len(clip) / _SAMPLE_RATE)
        out.parent.mkdir(parents=True, exist_ok=True)
        model.save_to(str(out))
    return out


def speech() -> np.ndarray:
    """Return 18 seconds of speech, float32 [N] at 16 kHz: the clip that the exporter uses for parity."""
    return read_clip("speech", _SAMPLE_RATE)


def model_config(sizes: Sizes, tokenizer: Path) -> Any:
    """Return a NeMo configuration with the values of the 0.6B model.

    Source of the structure: `fastconformer_transducer_bpe_streaming.yaml` in NeMo.
    """
    from omegaconf import OmegaConf

    asr = "nemo.collections.asr.modules"
    return OmegaConf.create(
        {
            "target": "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel",
            "sample_rate": _SAMPLE_RATE,
            "compute_eval_loss": False,
            "log_prediction": False,
            "rnnt_reduction": "mean_volume",
            "model_defaults": {
                "enc_hidden": sizes.d_model,
                "pred_hidden": sizes.pred_hidden,
                "joint_hidden": sizes.joint_hidden,
            },
            "tokenizer": {"dir": str(tokenizer), "type": "bpe"},
            "preprocessor": {
                "_target_": f"{asr}.AudioToMelSpectrogramPreprocessor",
                "sample_rate": _SAMPLE_RATE,
                "normalize": "NA",
                "window_size": 0.025,
                "window_stride": 0.01,
                "window": "hann",
                "features": sizes.mels,
                "n_fft": 512,
                "log": True,
                "frame_splicing": 1,
                "dither": 1e-5,
                "pad_to": 0,
            },
            "encoder": {
                "_target_": f"{asr}.ConformerEncoder",
                "feat_in": sizes.mels,
                "feat_out": -1,
                "n_layers": sizes.n_layers,
                "d_model": sizes.d_model,
                "use_bias": sizes.use_bias,
                "subsampling": "dw_striding",
                "subsampling_factor": sizes.subsampling,
                "subsampling_conv_channels": sizes.conv_channels,
                "causal_downsampling": True,
                "ff_expansion_factor": 4,
                "self_attention_model": "rel_pos",
                "n_heads": sizes.n_heads,
                "att_context_size": [list(context) for context in sizes.contexts],
                "att_context_style": "chunked_limited",
                "xscaling": sizes.xscaling,
                "untie_biases": sizes.untie_biases,
                "pos_emb_max_len": 5000,
                "conv_kernel_size": sizes.conv_kernel,
                "conv_norm_type": sizes.conv_norm_type,
                "conv_context_size": "causal",
                "dropout": 0.1,
                "dropout_pre_encoder": 0.1,
                "dropout_emb": 0.0,
                "dropout_att": 0.1,
            },
            "decoder": {
                "_target_": f"{asr}.RNNTDecoder",
                "normalization_mode": None,
                "random_state_sampling": False,
                "blank_as_pad": True,
                "prednet": {
                    "pred_hidden": sizes.pred_hidden,
                    "pred_rnn_layers": sizes.pred_layers,
                    "t_max": None,
                    "dropout": 0.2,
                },
            },
            "joint": {
                "_target_": f"{asr}.RNNTJoint",
                "log_softmax": None,
                "preserve_memory": False,
                "fuse_loss_wer": False,
                "fused_batch_size": 4,
                "jointnet": {"joint_hidden": sizes.joint_hidden, "activation": "relu", "dropout": 0.2},
            },
            "decoding": {
                "strategy": "greedy_batch",
                "greedy": {"max_symbols": MAX_SYMBOLS, "loop_labels": True, "use_cuda_graph_decoder": False},
            },
            "loss": {"loss_name": "default", "warprnnt_numba_kwargs": {"fastemit_lambda": 0.005, "clamp": -1.0}},
        }
    )


def train_tokenizer(folder: Path, vocab: int, seed: int) -> None:
    """Train a SentencePiece BPE model of `vocab` pieces on made-up words with Zipf frequencies.

    Writes `tokenizer.model`, `tokenizer.vocab` and `vocab.txt` into `folder`.
    """
    import sentencepiece

    rng = np.random.default_rng(seed)
    onsets = ["", *"bcdfghjklmnprstvwyz", "st", "tr", "pl", "sh", "ch", "th", "qu"]
    nuclei, codas = ["a", "e", "i", "o", "u", "ea", "ou"], ["", "", "n", "r", "s", "t", "l", "d", "ng", "ck", "x"]
    syllables = [o + n + c for o in onsets for n in nuclei for c in codas]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(4000)]
    frequencies = 1 / np.arange(1, len(words) + 1)
    frequencies /= frequencies.sum()
    lines = [" ".join(rng.choice(words, 12, p=frequencies)) for _ in range(4000)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    pieces = [line.partition("\t")[0] for line in (folder / "tokenizer.vocab").read_text(encoding="utf-8").splitlines()]
    (folder / "vocab.txt").write_text("\n".join(pieces[1:]) + "\n", encoding="utf-8")  # [0] is <unk>


def _encode(model: Any, sizes: Sizes, audio: Any) -> Any:
    """Return the encoder output [N, T, D] of one recording for N conditions.

    The conditions are all chunk sizes, and the longest chunk size at a gain of 0.3 and 2.
    """
    import torch

    conditions = [(context, 1.0) for context in sizes.contexts] + [(sizes.contexts[0], gain) for gain in (0.3, 2.0)]
    outputs, samples = [], torch.tensor([len(audio)])
    for context, gain in conditions:
        model.encoder.set_default_att_context_size(list(context))
        mel, length = model.preprocessor(input_signal=gain * audio[None], length=samples)
        outputs.append(model.encoder(audio_signal=mel, length=length)[0][0].T)
    model.encoder.set_default_att_context_size(list(sizes.contexts[0]))
    return torch.stack(outputs)


def _randomise_constants(model: Any) -> None:
    """Randomise all parameters that NeMo initialises to a constant."""
    import torch

    for module in model.encoder.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm1d):
            module.weight.normal_(1.0, 0.2)
            module.bias.normal_(0.0, 0.1)
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        for name in ("pos_bias_u", "pos_bias_v"):
            if hasattr(module, name):
                getattr(module, name).normal_(0.0, 0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="nemostream bench synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.nemo", help="checkpoint to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    for field in fields(Sizes):
        name, default = "--" + field.name.removeprefix("n_").replace("_", "-"), field.default
        if isinstance(default, bool):
            parser.add_argument(
                name,
                dest=field.name,
                action=argparse.BooleanOptionalAction,
                default=default,
                help=f"{field.name} in NeMo",
            )
        elif isinstance(default, int | str):
            parser.add_argument(name, dest=field.name, type=type(default), default=default, help=f"default: {default}")
    options = vars(parser.parse_args(arguments))
    if find_spec("nemo") is None:
        raise BackendError(f"creating a checkpoint needs NeMo: {install_command('nemo')}")
    path = synthetic_model(options.pop("out"), options.pop("seed"), **options)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
