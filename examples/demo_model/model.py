"""The demo model: nemotron-speech-streaming's architecture with small sizes, and its tokenizer.

Every field of the configuration that is not a size is the big model's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
import torch
from clips import DIGITS, RATE
from nemo.collections.asr.models import EncDecRNNTBPEModel
from omegaconf import OmegaConf

CONTEXTS = ([70, 13], [70, 6], [70, 1], [70, 0])  # 1120, 560, 160 and 80 ms chunks
D_MODEL, LAYERS, HEADS, CHANNELS, HIDDEN = 128, 4, 4, 32, 128


def make_tokenizer(folder: Path) -> Path:
    """A SentencePiece BPE of digit strings, merged until each digit is one piece.

    One token a word keeps tokens far rarer than encoder frames, without which a transducer hardly trains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(DIGITS[(i + j * (i // 10 + 1)) % 10] for j in range(6)) for i in range(400)]
    (folder / "digits.txt").write_text("\n".join(lines) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "digits.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=64,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",  # the default's Unicode table weighs 240 kB
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    split = [digit for digit in DIGITS if len(processor.encode(digit)) != 1]
    if split:
        raise RuntimeError(f"not one piece of the tokenizer: {split}")
    return folder


def configuration(tokenizer: Path) -> dict[str, Any]:
    modules = "nemo.collections.asr.modules"
    return {
        "sample_rate": RATE,
        "preprocessor": {
            "_target_": f"{modules}.AudioToMelSpectrogramPreprocessor",
            "sample_rate": RATE,
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
            "_target_": f"{modules}.ConformerEncoder",
            "feat_in": 128,
            "feat_out": -1,
            "n_layers": LAYERS,
            "d_model": D_MODEL,
            "use_bias": False,
            "subsampling": "dw_striding",
            "subsampling_factor": 8,
            "subsampling_conv_channels": CHANNELS,
            "causal_downsampling": True,
            "ff_expansion_factor": 4,
            "self_attention_model": "rel_pos",
            "n_heads": HEADS,
            "att_context_size": [list(context) for context in CONTEXTS],
            "att_context_probs": None,  # in training every batch draws one of the four, all as likely
            "att_context_style": "chunked_limited",
            "xscaling": False,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": 9,
            "conv_norm_type": "layer_norm",
            "conv_context_size": "causal",
            "dropout": 0.05,
            "dropout_pre_encoder": 0.05,
            "dropout_emb": 0.0,
            "dropout_att": 0.05,
        },
        "decoder": {
            "_target_": f"{modules}.RNNTDecoder",
            "normalization_mode": None,
            "random_state_sampling": False,
            "blank_as_pad": True,
            "prednet": {"pred_hidden": HIDDEN, "pred_rnn_layers": 1, "t_max": None, "dropout": 0.1},
        },
        "joint": {
            "_target_": f"{modules}.RNNTJoint",
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


def make_model(tokenizer: Path, seed: int = 0) -> EncDecRNNTBPEModel:
    torch.manual_seed(seed)
    model = EncDecRNNTBPEModel(cfg=OmegaConf.create(configuration(tokenizer)))
    first = model.encoder.pre_encode.conv[0]
    with torch.no_grad():
        # With `normalize: NA` log-mel is about -10 +- 5: start as if the convolution saw (mel + 10) / 5.
        first.bias += 2.0 * first.weight.sum(dim=(1, 2, 3))
        first.weight /= 5.0
    return model
