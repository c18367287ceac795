"""Tiny checkpoints in transformers' format with random weights, written by transformers' own classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nemostream.benchmarks.harness.synthetic import train_tokenizer

PROMPTS = {"en": 0, "en-US": 0, "de": 3, "de-DE": 3, "ja-JA": 5, "ja-JP": 5, "auto": 6}
VOCABULARY = 96


def save_tokenizer_json(model: Path, out: Path) -> None:
    """Convert a SentencePiece model as transformers' conversion scripts do."""
    from tokenizers import AddedToken
    from transformers.utils import sentencepiece_model_pb2_new

    module = import_module("transformers.convert_slow_tokenizer")
    # The module in sentencepiece may need a newer protobuf than the installed one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "import_protobuf", lambda *_: sentencepiece_model_pb2_new)
        tokenizer = module.ParakeetConverter(str(model)).converted()
    for name in ("<unk>", "<pad>"):
        if tokenizer.token_to_id(name) is None:
            tokenizer.add_tokens([AddedToken(name, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken("<blank>", normalized=False, special=True)])
    special = ["<unk>", "<pad>", *(t for t in tokenizer.get_vocab() if re.fullmatch(r"<[a-z]{2,3}-[A-Za-z]{2}>", t))]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.save(str(out))


def save_transformers(folder: Path, prompted: bool, **options: Any) -> Path:
    """Write a model with two layers to `folder`, as `nemotron3_5_asr` if `prompted`, else `nemotron_asr_streaming`.

    `options`: of `save_pretrained`; `encoder`, fields of the encoder's configuration; `dtype`, of the weights.
    """
    import torch
    import transformers

    encoder = options.pop("encoder", {})
    dtype = options.pop("dtype", torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(folder, VOCABULARY, 0)
    save_tokenizer_json(folder / "tokenizer.model", folder / "tokenizer.json")
    for name in ("tokenizer.model", "tokenizer.vocab", "vocab.txt", "text.txt"):
        (folder / name).unlink()
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "attention_bias": False,
        "convolution_bias": False,
        "subsampling_conv_channels": 16,
        "num_mel_bins": 128,
        "scale_input": False,
        "sliding_window": 57,
        "default_num_lookahead_tokens": 3,
    }
    prompts = {"num_prompts": 7, "prompt_intermediate_size": 48, "default_prompt_id": 6} if prompted else {}
    name = "Nemotron3_5Asr" if prompted else "NemotronAsrStreaming"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY + 1,
        blank_token_id=VOCABULARY,
        decoder_hidden_size=24,
        encoder_config=transformers.NemotronAsrStreamingEncoderConfig(**(sizes | encoder)),
        **prompts,
    )
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForRNNT")(config).eval()
        for parameter in model.parameters():  # no value that hides errors, and prompts that make a difference
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.to(dtype).save_pretrained(folder, **options)
    extractor = transformers.NemotronAsrStreamingFeatureExtractor(feature_size=(sizes | encoder)["num_mel_bins"])
    tokenizer = transformers.ParakeetTokenizer(tokenizer_file=str(folder / "tokenizer.json"))
    processor = getattr(transformers, f"{name}Processor")(
        feature_extractor=extractor,
        tokenizer=tokenizer,
        supported_num_lookahead_tokens=[3, 0, 6, 13],
        default_num_lookahead_tokens=3,
        **({"num_prompts": 7, "prompt_dictionary": PROMPTS} if prompted else {}),
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def convert_tokenizer_json() -> Callable[[Path, Path], None]:
    """Factory: the tokenizer.json of a SentencePiece model."""
    return save_tokenizer_json


@pytest.fixture(scope="session")
def transformers_factory() -> Callable[..., Path]:
    """Factory: a folder in transformers' format."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.23")
    return save_transformers


@pytest.fixture(scope="session")
def transformers_folder(transformers_factory: Callable[..., Path], shared_folder: Callable[..., Path]) -> Path:
    """A model of one language."""

    def make(folder: Path) -> None:
        transformers_factory(folder / "tiny", prompted=False)

    return shared_folder("transformers", make) / "tiny"


@pytest.fixture(scope="session")
def prompted_folder(transformers_factory: Callable[..., Path], shared_folder: Callable[..., Path]) -> Path:
    """A prompted model."""

    def make(folder: Path) -> None:
        transformers_factory(folder / "prompted", prompted=True)

    return shared_folder("transformers-prompted", make) / "prompted"
