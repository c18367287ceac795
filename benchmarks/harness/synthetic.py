"""Create a NeMo checkpoint with the exact shape of a published one and random weights.

`FAMILIES` are the published checkpoints, from nemotron-speech-streaming-en-0.6b, the default, to models with language
prompts, control tokens or an auxiliary CTC head. Each has its class, configuration fields and kind of tokenizer.

The time of a step depends on shapes and not on the values of the weights, with two exceptions:

* For parity tests, no parameter may have a default value that hides errors: LayerNorm gains and offsets, positional
  biases and batch-norm statistics are random.
* The time of decoding depends on the number of emitted tokens: `random_weights` calibrates the token rate.

The same seed gives the same weights with the same version of PyTorch on the same type of processor. Transcripts are
meaningless.

    nemostream bench synthetic OUT.nemo --like nemotron-3.5 --layers 2 --seed 0
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nemostream.benchmarks.harness.random_weights import MAX_SYMBOLS, calibrate_random_weights
from nemostream.benchmarks.harness.tokenizers import train_tokenizer, write_multilingual_tokenizer
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
    piece_model: str = "bpe"  # or "unigram", as in SentencePiece
    punctuation: bool = True  # and capital letters in the tokenizer
    controls: Sequence[str] = ()  # control tokens, the last pieces of the tokenizer
    aux_ctc: bool = False  # an auxiliary CTC head: EncDecHybridRNNTCTCBPEModel
    # Prompt id by language. If not empty: an EncDecRNNTBPEModelWithPrompt, with a tokenizer of many scripts.
    prompts: Mapping[str, int] = field(default_factory=dict)
    num_prompts: int = 128


# A part of the published prompt dictionary, with names that share an id. There is no prompt "sl-SL", although the
# tokenizer has the tag <sl-SL>.
_PROMPTS = {
    **{"en-US": 0, "en": 0, "en-GB": 1, "es-ES": 2, "es-US": 3, "es": 3, "zh-CN": 4, "zh-TW": 5, "hi-IN": 6, "hi": 6},
    **{"ar-AR": 7, "ar": 7, "fr-FR": 8, "fr": 8, "de-DE": 9, "de": 9, "ja-JP": 10, "ja-JA": 10, "ru-RU": 11},
    **{"pt-BR": 12, "ko-KR": 14, "el-GR": 21, "bg-BG": 30, "th-TH": 32, "sl-SI": 62, "he-IL": 64, "auto": 101},
}
_LARGE: Mapping[str, Any] = {"n_layers": 17, "d_model": 512, "pred_layers": 1, "punctuation": False}

# Fields of `Sizes` that differ from the defaults, by the name of a published checkpoint.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "nemotron-en": {},  # nemotron-speech-streaming-en-0.6b
    "nemotron-3.5": {  # nemotron-3.5-asr-streaming-0.6b: chunks of 320, 80, 560 and 1120 ms
        "contexts": ((56, 3), (56, 0), (56, 6), (56, 13)),
        "vocab": 13087,
        "piece_model": "unigram",
        "prompts": _PROMPTS,
    },
    # parakeet_realtime_eou_120m-v1; `use_bias` is not published and has NeMo's default
    "eou-120m": {**_LARGE, "contexts": ((70, 1),), "use_bias": True, "vocab": 1026, "controls": ("<EOU>", "<EOB>")},
    "hybrid-large": {  # stt_en_fastconformer_hybrid_large_streaming_multi
        **_LARGE,
        "mels": 80,
        "use_bias": True,
        "xscaling": True,
        "piece_model": "unigram",
        "aux_ctc": True,
    },
}


def synthetic_model(out: str | Path, seed: int = 0, like: str = "nemotron-en", **overrides: Any) -> Path:
    """Write a checkpoint with random weights to `out` and return its path.

    `like` is one of `FAMILIES`, and `overrides` are fields of `Sizes`. Needs NeMo, and twice the size of the model both
    in memory and in the temporary folder while saving.
    """
    import torch
    from nemo.collections.asr import models

    out, sizes = Path(out), replace(Sizes(), **{**FAMILIES[like], **overrides})
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed)
        if sizes.prompts:
            write_multilingual_tokenizer(Path(folder), sizes.vocab, seed)
        else:
            train_tokenizer(Path(folder), sizes.vocab, seed, sizes.piece_model, sizes.punctuation, sizes.controls)
        config = model_config(sizes, Path(folder))
        model = getattr(models, config.target.rpartition(".")[2])(cfg=config)
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
    """Return a NeMo configuration with the values of the published models.

    Source of the structure: `fastconformer_transducer_bpe_streaming.yaml` in NeMo.
    """
    from omegaconf import OmegaConf

    models = "nemo.collections.asr.models"
    target = f"{models}.rnnt_bpe_models.EncDecRNNTBPEModel"
    defaults: dict[str, Any] = {
        "enc_hidden": sizes.d_model,
        "pred_hidden": sizes.pred_hidden,
        "joint_hidden": sizes.joint_hidden,
    }
    if sizes.aux_ctc:
        target = f"{models}.hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel"
    if sizes.prompts:
        target = f"{models}.rnnt_bpe_models_prompt.EncDecRNNTBPEModelWithPrompt"
        defaults |= {"initialize_prompt_feature": True, "num_prompts": sizes.num_prompts}
        defaults["prompt_dictionary"] = dict(sizes.prompts)
    asr = "nemo.collections.asr.modules"
    contexts = [list(context) for context in sizes.contexts]
    # NeMo adds the sizes to `aux_ctc`. The prompted model has no CTC head, but its configuration has this section.
    ctc: dict[str, Any] = {
        "ctc_loss_weight": 0.3,
        "use_cer": False,
        "ctc_reduction": "mean_batch",
        "decoder": {"_target_": f"{asr}.ConvASRDecoder", "feat_in": None, "num_classes": -1, "vocabulary": []},
        "decoding": {"strategy": "greedy"},
    }
    return OmegaConf.create(
        {
            "target": target,
            "sample_rate": _SAMPLE_RATE,
            "compute_eval_loss": False,
            "log_prediction": False,
            "rnnt_reduction": "mean_volume",
            "model_defaults": defaults,
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
                **({} if sizes.use_bias else {"use_bias": False}),  # as published
                "subsampling": "dw_striding",
                "subsampling_factor": sizes.subsampling,
                "subsampling_conv_channels": sizes.conv_channels,
                "causal_downsampling": True,
                "ff_expansion_factor": 4,
                "self_attention_model": "rel_pos",
                "n_heads": sizes.n_heads,
                "att_context_size": contexts if len(contexts) > 1 else contexts[0],
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
                "fuse_loss_wer": sizes.aux_ctc or bool(sizes.prompts),
                "fused_batch_size": 4,
                "jointnet": {"joint_hidden": sizes.joint_hidden, "activation": "relu", "dropout": 0.2},
            },
            "decoding": {
                "strategy": "greedy_batch",
                "greedy": {"max_symbols": MAX_SYMBOLS, "loop_labels": True, "use_cuda_graph_decoder": False},
            },
            **({"aux_ctc": ctc} if sizes.aux_ctc or sizes.prompts else {}),
            "loss": {"loss_name": "default", "warprnnt_numba_kwargs": {"fastemit_lambda": 0.005, "clamp": -1.0}},
        }
    )


def _encode(model: Any, sizes: Sizes, audio: Any) -> Any:
    """Return the output [N, T, D] of encoder and prompt kernel for one recording and N conditions.

    The conditions are all chunk sizes, and the longest chunk size at a gain of 0.3 and 2; for a prompted model each
    with two of its prompts.
    """
    import torch

    longest = max(sizes.contexts, key=lambda context: context[1])
    conditions = [(context, 1.0) for context in sizes.contexts] + [(longest, gain) for gain in (0.3, 2.0)]
    prompts = itertools.cycle(sorted(set(sizes.prompts.values())))
    outputs, samples = [], torch.tensor([len(audio)])
    for context, gain in conditions:
        model.encoder.set_default_att_context_size(list(context))
        mel, length = model.preprocessor(input_signal=gain * audio[None], length=samples)
        encoded = model.encoder(audio_signal=mel, length=length)[0][0].T
        if not sizes.prompts:
            outputs.append(encoded)
        for prompt in itertools.islice(prompts, 2):
            rows = torch.nn.functional.one_hot(torch.tensor(prompt), sizes.num_prompts).expand(len(encoded), -1)
            outputs.append(model.prompt_kernel(torch.cat([encoded, rows.to(encoded)], dim=1)))
    model.encoder.set_default_att_context_size(list(sizes.contexts[0]))
    return torch.stack(outputs)


def _randomise_constants(model: Any) -> None:
    """Randomise all parameters that NeMo initialises to a constant, and make prompts change the encoder's output."""
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
    if hasattr(model, "prompt_kernel"):
        # The prompt is one input among the encoder's D, so with the same scale its effect would be 1/sqrt(D).
        model.prompt_kernel[0].weight[:, model.encoder.d_model :].normal_(0.0, 0.3)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="nemostream bench synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.nemo", help="checkpoint to write")
    parser.add_argument("--like", choices=FAMILIES, default="nemotron-en", help="published checkpoint with this shape")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    for size in fields(Sizes):
        name, default = "--" + size.name.removeprefix("n_").replace("_", "-"), size.default
        if isinstance(default, bool):
            parser.add_argument(
                name, dest=size.name, action=argparse.BooleanOptionalAction, help=f"{size.name} in NeMo"
            )
        elif isinstance(default, int | str):
            parser.add_argument(name, dest=size.name, type=type(default), help=f"nemotron-en: {default}")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if find_spec("nemo") is None:
        raise BackendError(f"creating a checkpoint needs NeMo: {install_command('nemo')}")
    path = synthetic_model(options.pop("out"), options.pop("seed"), options.pop("like"), **options)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
