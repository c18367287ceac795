from __future__ import annotations

import os

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import BundleError
from nemostream.runtime.text.tokenizer import Detokenizer, Tokenizer


@pytest.fixture(scope="session")
def oracle(tokenizer_model):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)


@pytest.fixture(scope="session")
def tokenizer(bundle):
    return Tokenizer(bundle.path / "tokenizer.model", bundle.manifest.decoder.vocabulary)


# Words, spaces, bytes of valid characters and arbitrary bytes, in any order.
BYTES = st.binary(min_size=1, max_size=4).map(lambda data: [f"<0x{byte:02X}>" for byte in data])
PIECES = st.one_of(
    st.sampled_from(["\u2581", "\u2581the", "he", "\u2581again", "z", "<unk>", "<s>", "</s>"]).map(lambda p: [p]),
    st.sampled_from(["€", "é", "😀", " "]).map(lambda c: [f"<0x{byte:02X}>" for byte in c.encode()]),
    BYTES,
)


@given(pieces=st.lists(PIECES, max_size=12), cuts=st.lists(st.integers(0, 4), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_incremental_text_equals_sentencepiece_and_only_grows(tokenizer, oracle, pieces, cuts):
    ids = [oracle.piece_to_id(piece) for group in pieces for piece in group]
    whole = oracle.decode(ids)
    assert tokenizer.decode(ids) == whole
    detokenizer, at, before = Detokenizer(tokenizer), 0, ""
    for size in (*cuts, *[1] * len(ids)):
        text = detokenizer.push(ids[at : at + size])
        at += size
        assert text.startswith(before) and whole.startswith(text)
        before = text
    assert detokenizer.finish() == detokenizer.finish() == whole


def test_bytes_of_an_incomplete_character_are_held_back(tokenizer, oracle):
    detokenizer = Detokenizer(tokenizer)
    the, *euro = (oracle.piece_to_id(piece) for piece in ("\u2581the", "<0xE2>", "<0x82>", "<0xAC>"))
    assert [detokenizer.push([i]) for i in (the, *euro)] == ["the", "the", "the", "the€"]


def test_pieces_include_their_space(tokenizer, oracle):
    piece = {name: tokenizer.piece(oracle.piece_to_id(name)) for name in ("\u2581the", "he", "<s>", "<unk>", "<0xE2>")}
    assert piece == {"\u2581the": " the", "he": "he", "<s>": "", "<unk>": " \u2047 ", "<0xE2>": "<0xE2>"}


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_damaged_or_missing_model(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=f"{path} is not a SentencePiece model"):
        Tokenizer(path, 300)


def test_truncated_model(tmp_path, tokenizer_model):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer_model[: len(tokenizer_model) // 2])
    with pytest.raises(BundleError):
        Tokenizer(path, 300)


def test_vocabulary_of_another_model(bundle, manifest):
    size = manifest.decoder.vocabulary
    with pytest.raises(BundleError, match=f"has {size} pieces, but the manifest states {size + 1}"):
        Tokenizer(bundle.path / "tokenizer.model", size + 1)


def test_error_for_a_malformed_model_is_one_line(tokenizer_model, tmp_path):
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).get_piece_size()
    at = tokenizer_model.rindex(b"<0xFF>")
    not_text = tokenizer_model[:at] + b"<0\xff\xfe\xff>" + tokenizer_model[at + 6 :]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, content in (
        ("empty", b""),
        ("junk", b"junk"),
        ("truncated", tokenizer_model[:-7]),
        ("not text", not_text),
        ("pipe", None),
        ("zero", None),
        ("none", None),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(BundleError, match="again") as caught:
            Tokenizer(tmp_path / name, vocabulary)
        assert "\n" not in str(caught.value)
