"""Fixtures of the runtime's tests: a manifest with the real model's sizes, a trained tokenizer, the fake backend."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from nemostream.bundle import Bundle, ChunkConfig, DecoderConfig, EncoderConfig, FeatureConfig, File, Manifest
from nemostream.runtime.text.tokenizer import Tokenizer


def module_at(path: str):
    """Import a module of the tests, which is not on `sys.path` in pytest's importlib mode."""
    file = Path(__file__).parent / path
    name = f"nemostream_tests_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake():
    """The module `fake_backend.py`."""
    return module_at("fake_backend.py")


@pytest.fixture(scope="session")
def reference():
    """The module `streaming/reference.py`."""
    return module_at("streaming/reference.py")


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A SentencePiece model with byte fallback, the hardest case for incremental text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog again and again"] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, tokenizer_model) -> Bundle:
    path = tmp_path_factory.mktemp("bundle")
    (path / "tokenizer.model").write_bytes(tokenizer_model)
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).get_piece_size()
    manifest = Manifest(
        name="fake",
        features=FeatureConfig(sample_rate=16000, mels=128, window=400, hop=160, n_fft=512, preemphasis=0.97),
        encoder=EncoderConfig(layers=24, d_model=1024, heads=8, subsampling=8, cache=70, conv_cache=8),
        decoder=DecoderConfig(
            layers=2, hidden=640, joint=640, vocabulary=vocabulary, max_symbols=10, activation="relu"
        ),
        chunks=tuple(ChunkConfig(ms=80 * t, frames=t, left=70, samples=1280 * t) for t in (1, 2, 7, 14)),
        graphs={},
        weights=File("weights.bin", "", 0),
        tensors={},
        tokenizer=File("tokenizer.model", "", 0),
    )
    return Bundle(path, manifest)


@pytest.fixture
def character_tokenizer(tmp_path) -> Callable[[str], Tokenizer]:
    """Return a function that makes a tokenizer with a piece for each character of a text."""

    def make(text: str) -> Tokenizer:
        model, path = io.BytesIO(), tmp_path / "characters.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 20),
            model_writer=model,
            vocab_size=40,
            model_type="char",
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            minloglevel=2,
        )
        path.write_bytes(model.getvalue())
        return Tokenizer(path, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size())

    return make


@pytest.fixture(scope="session")
def tagged_bundle(tmp_path_factory, bundle) -> Bundle:
    """A bundle whose tokenizer has tags of languages, of the end of an utterance and of a backchannel."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["yes, no. go on? stop wait now <EOU> ja nein \u4f60\u597d\u3002 again"] * 20),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=[".", ",", "?", "<en-US>", "<de-DE>", "\u2581<zh-CN>", "<EOU>", "<EOB>"],
    )
    path = tmp_path_factory.mktemp("tagged")
    (path / "tokenizer.model").write_bytes(model.getvalue())
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    decoder = replace(bundle.manifest.decoder, vocabulary=vocabulary)
    return Bundle(path, replace(bundle.manifest, decoder=decoder))


@pytest.fixture(scope="session")
def tagged(tagged_bundle) -> Tokenizer:
    return Tokenizer(tagged_bundle.path / "tokenizer.model", tagged_bundle.manifest.decoder.vocabulary)


@pytest.fixture(scope="session")
def manifest(bundle) -> Manifest:
    return bundle.manifest
