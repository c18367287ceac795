"""The demo model: the architecture of nemotron-speech-streaming, small enough to ship in a Python package.

The configuration is that of the large model with smaller sizes (3.6 M parameters). The tokenizer has nearly as many
pieces, so that tokens are emitted at a similar rate.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import sentencepiece
import torch
from nemo.collections.asr.models import EncDecRNNTBPEModel
from omegaconf import OmegaConf
from torch.nn import functional

CONTEXTS = [[70, 13], [70, 6], [70, 1], [70, 0]]  # 1120, 560, 160 and 80 ms
CONTEXT_PROBABILITIES = [0.2, 0.25, 0.2, 0.35]  # short contexts are harder, so the shortest is the most frequent
D_MODEL, LAYERS, HIDDEN, PIECES = 128, 8, 128, 896  # checkpoint and bundle have 23.8 MB
FRAME = 0.08  # seconds per encoder frame


def make_tokenizer(folder: Path, sentences: list[str]) -> Path:
    """Train a SentencePiece BPE model on the training sentences: common words become one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "sentences.txt"
    text.write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        unk_id=0,
        normalization_rule_name="identity",  # the table of other rules would add 2 x 0.25 MB
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    return folder


def make_model(tokenizer: Path) -> EncDecRNNTBPEModel:
    """Create the untrained model."""
    asr = "nemo.collections.asr.modules"
    config = {
        "sample_rate": 16000,
        "preprocessor": {
            "_target_": f"{asr}.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000,
            "normalize": "NA",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": 128,
            "n_fft": 512,
            "log": True,
            "frame_splicing": 1,
            "dither": 1e-5,
            "pad_to": 0,
        },
        "encoder": {
            "_target_": f"{asr}.ConformerEncoder",
            "feat_in": 128,
            "feat_out": -1,
            "n_layers": LAYERS,
            "d_model": D_MODEL,
            "use_bias": False,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": 32,
            "causal_downsampling": True,
            "ff_expansion_factor": 4,
            "self_attention_model": "rel_pos",
            "n_heads": 4,
            "att_context_size": CONTEXTS,
            "att_context_probs": CONTEXT_PROBABILITIES,
            "att_context_style": "chunked_limited",
            "xscaling": False,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": 9,
            "conv_norm_type": "layer_norm",
            "conv_context_size": "causal",
            "dropout": 0.0,
            "dropout_pre_encoder": 0.0,
            "dropout_emb": 0.0,
            "dropout_att": 0.0,
        },
        "decoder": {
            "_target_": f"{asr}.RNNTDecoder",
            "normalization_mode": None,
            "random_state_sampling": False,
            "blank_as_pad": True,
            "prednet": {"pred_hidden": HIDDEN, "pred_rnn_layers": 1, "t_max": None, "dropout": 0.0},
        },
        "joint": {
            "_target_": f"{asr}.RNNTJoint",
            "log_softmax": None,
            "preserve_memory": False,
            "fuse_loss_wer": False,
            "jointnet": {
                "joint_hidden": HIDDEN,
                "activation": "relu",
                "dropout": 0.0,
                "encoder_hidden": D_MODEL,
                "pred_hidden": HIDDEN,
            },
        },
        "model_defaults": {"enc_hidden": D_MODEL, "pred_hidden": HIDDEN, "joint_hidden": HIDDEN},
        "decoding": {"strategy": "greedy_batch", "greedy": {"max_symbols": 10}},
        "loss": {"loss_name": "default", "warprnnt_numba_kwargs": {"fastemit_lambda": 0.0}},
        "tokenizer": {"dir": str(tokenizer), "type": "bpe"},
        "optim": {"name": "adamw", "lr": 1e-3},
    }
    model = EncDecRNNTBPEModel(cfg=OmegaConf.create(config))
    first = model.encoder.pre_encode.conv[0]
    with torch.no_grad():
        # Log-mel values are about -10 +- 5 with `normalize: NA`: initialise the first convolution for (x + 10) / 5.
        first.bias += 2.0 * first.weight.sum(dim=(1, 2, 3))
        first.weight /= 5.0
    return model


def save(model: EncDecRNNTBPEModel, path: Path) -> None:
    """Write a .nemo file with float16 weights, half the size; `restore_from` converts them to float32.

    The weights of `model` are rounded in place, so that tests and exports use the values of the file.
    """
    half = {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            rounds = tensor.is_floating_point() and not name.startswith("preprocessor.")
            if rounds:
                tensor.copy_(tensor.half())
            half[name] = tensor.half() if rounds else tensor.clone()
    model.save_to(str(path))
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member)) for member in archive.getmembers()]
        contents = [(member, file.read() if file else None) for member, file in members]
    weights = io.BytesIO()
    torch.save(half, weights)
    with tarfile.open(path, "w") as archive:
        for member, content in contents:
            if member.name.endswith("model_weights.ckpt"):
                content = weights.getvalue()
            if content is not None:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if content is not None else None)


def convolve_fast(model: EncDecRNNTBPEModel) -> None:
    """Run depthwise convolutions in channels-last float32, four times faster on a CPU (README.md).

    Otherwise PyTorch's backward of a depthwise convolution loops over the channels.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d) and (module.weight.dim() == 4 or module.groups > 1):
            module._conv_forward = _channels_last.__get__(module)


def _channels_last(
    conv: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    flat = x.dim() == 3
    with torch.autocast("cpu", enabled=False):
        x = x.float()
        if flat:
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
        stride, padding = ((1, *conv.stride), (0, *conv.padding)) if flat else (conv.stride, conv.padding)
        x = x.contiguous(memory_format=torch.channels_last)
        out = functional.conv2d(x, weight, bias, stride, padding, 1, conv.groups)
        return out.squeeze(2) if flat else out
