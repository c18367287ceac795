"""A NeMo checkpoint in Hugging Face's `nemotron_asr_streaming` (transformers ≥ 5.13), for benchmarks and parity tests.

The published checkpoint is available in this format; the weights of other checkpoints are renamed.
"""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import yaml

from nemostream.bundle import Manifest
from nemostream.errors import OptionError

# Names in NeMo and in transformers. In the Sequential of the subsampling, 0 is the first convolution, 2 and 5 are
# depthwise, 3 and 6 pointwise convolutions; the others are ReLUs.
_RENAMED = (
    (r"^encoder\.pre_encode\.conv\.0\.", "encoder.subsampling.conv_in."),
    (r"^encoder\.pre_encode\.conv\.2\.", "encoder.subsampling.layers.0.depthwise_conv."),
    (r"^encoder\.pre_encode\.conv\.3\.", "encoder.subsampling.layers.0.pointwise_conv."),
    (r"^encoder\.pre_encode\.conv\.5\.", "encoder.subsampling.layers.1.depthwise_conv."),
    (r"^encoder\.pre_encode\.conv\.6\.", "encoder.subsampling.layers.1.pointwise_conv."),
    (r"^encoder\.pre_encode\.out\.", "encoder.subsampling.linear."),
    (r"\.self_attn\.linear_(q|k|v)\.", r".self_attn.\1_proj."),
    (r"\.self_attn\.linear_out\.", ".self_attn.o_proj."),
    (r"\.self_attn\.linear_pos\.", ".self_attn.relative_k_proj."),
    (r"\.self_attn\.pos_bias_(u|v)$", r".self_attn.bias_\1"),
    (r"\.conv\.batch_norm\.", ".conv.norm."),
    (r"^decoder\.prediction\.embed\.", "decoder.embedding."),
    (r"^decoder\.prediction\.dec_rnn\.lstm\.", "decoder.lstm."),
    (r"^joint\.pred\.", "decoder.decoder_projector."),
    (r"^joint\.enc\.", "encoder_projector."),
    (r"^joint\.joint_net\.[12]\.", "joint.head."),  # index 2 if there is a dropout before it
)
PREPROCESSOR = {
    "preprocessor.featurizer.fb",
    "preprocessor.featurizer.window",
}  # constants that the feature extractor computes itself


def read_nemo(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return configuration and weights of a .nemo file."""
    import torch

    with tarfile.open(checkpoint) as archive:
        files = {Path(member.name).name: file for member in archive if (file := archive.extractfile(member))}
        config = yaml.safe_load(files["model_config.yaml"].read())
        return config, torch.load(io.BytesIO(files["model_weights.ckpt"].read()), weights_only=True)


def their_name(name: str) -> str:
    """Return the name in transformers of a weight in NeMo."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def load_transformers(checkpoint: Path, manifest: Manifest) -> tuple[Any, Any]:
    """Return feature extractor and model with the weights of a checkpoint.

    Sizes come from the manifest, and from the checkpoint if the manifest does not contain them. Raises `OptionError` if
    transformers does not support the model.
    """
    from transformers import (
        NemotronAsrStreamingConfig,
        NemotronAsrStreamingEncoderConfig,
        NemotronAsrStreamingFeatureExtractor,
        NemotronAsrStreamingForRNNT,
    )

    config, state = read_nemo(checkpoint)
    features, encoder, decoder = manifest.features, manifest.encoder, manifest.decoder
    if decoder.hidden != decoder.joint or {chunk.left for chunk in manifest.chunks} != {encoder.cache}:
        raise OptionError(
            "transformers supports only models whose prediction network and joint have the same width, and whose chunk "
            f"sizes have one left context; here {decoder.hidden} and {decoder.joint}, left contexts "
            f"{sorted({chunk.left for chunk in manifest.chunks})}."
        )
    extractor = NemotronAsrStreamingFeatureExtractor(
        feature_size=features.mels,
        sampling_rate=features.sample_rate,
        hop_length=features.hop,
        n_fft=features.n_fft,
        win_length=features.window,
        preemphasis=features.preemphasis,
    )
    settings = NemotronAsrStreamingConfig(
        vocab_size=decoder.vocabulary + 1,
        blank_token_id=decoder.blank,
        decoder_hidden_size=decoder.hidden,
        num_decoder_layers=decoder.layers,
        max_symbols_per_step=decoder.max_symbols,
        hidden_act=config["joint"]["jointnet"]["activation"],
        encoder_config=NemotronAsrStreamingEncoderConfig(
            hidden_size=encoder.d_model,
            num_hidden_layers=encoder.layers,
            num_attention_heads=encoder.heads,
            intermediate_size=len(state["encoder.layers.0.feed_forward1.linear1.weight"]),
            attention_bias=config["encoder"]["use_bias"],
            convolution_bias=config["encoder"]["use_bias"],
            conv_kernel_size=encoder.conv_cache + 1,
            subsampling_factor=encoder.subsampling,
            subsampling_conv_channels=len(state["encoder.pre_encode.conv.0.weight"]),
            num_mel_bins=features.mels,
            scale_input=config["encoder"]["xscaling"],
            sliding_window=encoder.cache + 1,
        ),
        attn_implementation="sdpa",
    )
    model = NemotronAsrStreamingForRNNT(settings).eval()
    model.load_state_dict({their_name(name): value for name, value in state.items() if name not in PREPROCESSOR})
    return extractor, model
