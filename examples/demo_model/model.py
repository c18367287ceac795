"""The demo model: nemotron-speech-streaming's architecture, small enough to ship inside a Python package.

The configuration is the big model's with other sizes (2.4 M parameters); the tokenizer has each digit as one piece.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece
import torch
from nemo.collections.asr.models import EncDecRNNTBPEModel
from omegaconf import OmegaConf

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONTEXTS = [[70, 13], [70, 6], [70, 1], [70, 0]]  # 1120, 560, 160 and 80 ms
D_MODEL, LAYERS, HIDDEN = 128, 6, 128


def make_tokenizer(folder: Path) -> Path:
    """A SentencePiece BPE in which every digit is a piece of its own, and letters stand for whatever else comes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "digits.txt"
    text.write_text("\n".join(" ".join(DIGITS[(i * 7 + j * 3) % 10] for j in range(6)) for i in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=32,
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        unk_id=0,
        user_defined_symbols=[f"▁{digit}" for digit in DIGITS],
        hard_vocab_limit=False,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    for digit in DIGITS:
        if len(processor.encode(digit)) != 1:
            raise RuntimeError(f"'{digit}' is not one piece of the tokenizer")
    return folder


def make_model(tokenizer: Path) -> EncDecRNNTBPEModel:
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
            "att_context_style": "chunked_limited",
            "xscaling": False,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": 9,
            "conv_norm_type": "layer_norm",
            "conv_context_size": "causal",
            "dropout": 0.05,
            "dropout_pre_encoder": 0.0,
            "dropout_emb": 0.0,
            "dropout_att": 0.0,
        },
        "decoder": {
            "_target_": f"{asr}.RNNTDecoder",
            "normalization_mode": None,
            "random_state_sampling": False,
            "blank_as_pad": True,
            "prednet": {"pred_hidden": HIDDEN, "pred_rnn_layers": 1, "t_max": None, "dropout": 0.1},
        },
        "joint": {
            "_target_": f"{asr}.RNNTJoint",
            "log_softmax": None,
            "preserve_memory": False,
            "fuse_loss_wer": False,
            "jointnet": {
                "joint_hidden": HIDDEN,
                "activation": "relu",
                "dropout": 0.05,
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
        # Log-mel is about -10 +- 5 with `normalize: NA`: let the first convolution see (x + 10) / 5.
        first.bias += 2.0 * first.weight.sum(dim=(1, 2, 3))
        first.weight /= 5.0
    return model
