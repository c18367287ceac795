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
@settings(max_examples=500, deadline=None)
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


@pytest.mark.parametrize(
    "pieces",
    [
        ["\u2581", "\u2581the"],
        ["\u2581", "he"],
        ["<s>", "\u2581the", "\u2581again"],
        ["</s>", "<s>", "he"],
        ["<unk>", "\u2581the"],
        ["\u2581the", "<unk>", "he"],
        ["\u2581the", "<s>", "\u2581again"],
        ["\u2581the", "\u2581", "\u2581again"],
        ["\u2581the", "<0xE2>", "<0x82>", "<0xAC>", "he"],
        ["<0x20>", "\u2581the", "\u2581again"],
    ],
)
def test_tokens_one_by_one_give_the_text_of_sentencepiece(tokenizer, oracle, pieces):
    ids = [oracle.piece_to_id(piece) for piece in pieces]
    detokenizer = Detokenizer(tokenizer)
    for id_ in ids:
        detokenizer.push([id_])
    assert detokenizer.finish() == oracle.decode(ids)


def test_bytes_of_an_incomplete_character_are_held_back(tokenizer, oracle):
    detokenizer = Detokenizer(tokenizer)
    the, *euro = (oracle.piece_to_id(piece) for piece in ("\u2581the", "<0xE2>", "<0x82>", "<0xAC>"))
    assert [detokenizer.push([i]) for i in (the, *euro)] == ["the", "the", "the", "the€"]


def test_pieces_include_their_space(tokenizer, oracle):
    piece = {name: tokenizer.piece(oracle.piece_to_id(name)) for name in ("\u2581the", "he", "<s>", "<unk>", "<0xE2>")}
    assert piece == {"\u2581the": " the", "he": "he", "<s>": "", "<unk>": " \u2047 ", "<0xE2>": "<0xE2>"}


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_incomplete_bytes_are_counted(tokenizer, oracle, character):
    """0 to 3 bytes of a character, after complete characters and other pieces."""
    the, *data = (oracle.piece_to_id(p) for p in ("\u2581the", *(f"<0x{byte:02X}>" for byte in character.encode())))
    for count in range(len(data) + 1):
        expected = count % len(data)
        for before in ([], [the], data, [the, *data]):
            assert tokenizer.count_incomplete([*before, *data[:count]]) == expected
    assert tokenizer.count_incomplete([*data[:1], the]) == 0  # another piece follows: it remains incomplete
    assert tokenizer.count_incomplete([oracle.piece_to_id("<0xFF>")]) == 0  # begins no character


def test_text_is_held_back_only_if_a_character_is_incomplete(tokenizer, oracle):
    """`add` and `flush` return what is new; an incomplete character at the end is replaced by U+FFFD for each byte."""
    euro = [oracle.piece_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    the, he = oracle.piece_to_id("\u2581the"), oracle.piece_to_id("he")
    detokenizer = Detokenizer(tokenizer)
    assert [
        detokenizer.add(ids) for ids in ([the], [], euro[:2], euro[2:], [the, euro[0]], [he], [euro[0], euro[1]])
    ] == [
        "the",
        "",
        "",
        "€",
        " the",
        "\ufffdhe",
        "",
    ]
    assert [detokenizer.flush() for _ in range(2)] == ["\ufffd\ufffd", ""]
    assert detokenizer.add([the]) == " the"


# -- tags --------------------------------------------------------------------------------------------------------------

TAGS = ["<en-US>", "<de-DE>", "\u2581<zh-CN>", "<EOU>", "<EOB>"]
TEXT = ["\u2581", "\u2581yes", "\u2581no", "on", ".", ",", "?", "\u4f60", "\u597d", "<unk>", "<s>", "\u2581ja", "o"]


def strip_tags(texts: list[str]) -> str:
    """The rule, piece by piece: a tag (None) removes the white space before it."""
    whole = ""
    for text in texts:
        whole = whole.rstrip() if text is None else whole + text
    return whole.strip()


def test_tags_are_read_from_the_pieces(tagged, tokenizer):
    ids = {piece: tagged._model.piece_to_id(piece) for piece in TAGS}
    assert tagged.unknown not in ids.values() and set(ids.values()) == tagged.tags
    languages = {ids["<en-US>"]: "en-US", ids["<de-DE>"]: "de-DE", ids["\u2581<zh-CN>"]: "zh-CN"}
    assert tagged.languages == languages
    assert (tagged.end_of_utterance, tagged.backchannel) == (ids["<EOU>"], ids["<EOB>"])
    for token in tagged.tags:
        assert tagged.piece(token) == "" and tagged.decode([token]) == ""
        assert not tagged.word_starts[token] and not tagged.closing_punctuation[token]
    assert (tokenizer.languages, tokenizer.end_of_utterance, tokenizer.backchannel) == ({}, None, None)
    assert not tokenizer.tags
    # Tags and white space; without tags, white space is text as in SentencePiece.
    spaces = {i for i in range(tagged.vocabulary) if tagged.piece(i).isspace()}
    assert spaces == {tagged._model.piece_to_id("\u2581")}
    assert tagged.invisible == tagged.tags | spaces and tokenizer.invisible == set()
    with pytest.raises(TypeError):
        tagged.languages[0] = "de-DE"


@given(
    pieces=st.lists(st.one_of(st.sampled_from(TAGS + TEXT).map(lambda piece: [piece]), BYTES), max_size=14),
    cuts=st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
@settings(max_examples=400, deadline=None)
def test_text_without_tags(tagged, pieces, cuts):
    """The text is that of NeMo's rule, contains no white space at its ends, and only grows."""
    ids = [tagged._model.piece_to_id(piece) for group in pieces for piece in group]
    expected, runs = [], []
    for token in ids:  # byte pieces are decoded together
        if token in tagged.tags:
            runs.append(None)
        elif runs and runs[-1]:
            runs[-1].append(token)
        else:
            runs.append([token])
    yes = tagged._model.piece_to_id("\u2581yes")
    expected = strip_tags([run and tagged._model.decode([yes, *run])[len("yes") :] for run in runs])
    assert tagged.decode(ids) == expected
    detokenizer, at, before = Detokenizer(tagged), 0, ""
    for size in (*cuts, *[1] * len(ids)):
        text = detokenizer.push(ids[at : at + size])
        at += size
        assert text == text.strip() and text.startswith(before) and expected.startswith(text)
        before = text
    assert detokenizer.finish() == expected


@pytest.mark.nemo
@given(pieces=st.lists(st.sampled_from(TAGS[:3] + TEXT), max_size=14))
@settings(max_examples=300, deadline=None)
def test_text_without_language_tags_equals_nemo(tagged, pieces):
    """NeMo's own method, without its removal of spaces before punctuation."""
    decoding = pytest.importorskip("nemo.collections.asr.parts.submodules.rnnt_decoding")
    nemo = object.__new__(decoding.RNNTBPEDecoding)
    nemo.tokenizer, nemo.supported_punctuation = None, None
    nemo.decode_ids_to_str = tagged._model.decode
    nemo.set_strip_lang_tags(True)
    ids = [tagged._model.piece_to_id(piece) for piece in pieces]
    assert tagged.decode(ids) == nemo.decode_tokens_to_str_with_strip_punctuation(ids)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["\u2581yes", "\u2581", "<en-US>", "\u2581no"], "yes no"),
        (["\u2581yes", "\u2581", "<EOU>"], "yes"),
        (["<de-DE>", "\u2581ja", "\u2581"], "ja"),
        (["\u4f60", "\u597d", "\u2581<zh-CN>", "\u4f60", "."], "\u4f60\u597d\u4f60."),
        (["\u2581", "<EOB>", "<EOU>", "\u2581"], ""),
    ],
)
def test_white_space_before_a_tag_is_removed(tagged, pieces, text):
    ids = [tagged._model.piece_to_id(piece) for piece in pieces]
    assert tagged.decode(ids) == Detokenizer(tagged).push(ids) == text


@pytest.mark.parametrize(
    "name", ["<EOU>", "<EOB>", "<en-US>", "\uff1cEOU\uff1e", "yes <de-DE> no", "<zh-CN>", "a<EOU><EOU>"]
)
def test_text_is_never_encoded_as_a_tag(tagged, name):
    ids = tagged.encode(name)
    assert ids and tagged.tags.isdisjoint(ids)
    assert tagged.tags & set(tagged._model.encode(name))  # SentencePiece does


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["\u2581yes", "on"], ["yes", "on"]),
        (["\u2581", "on"], ["on"]),
        (["\u2581o", "o"], ["o", "o"]),
        (["on", "\u2581"], ["on", "\u2581"]),
        (["\u2581"], []),
    ],
)
def test_ids_without_the_space_at_the_start(tagged, pieces, expected):
    to_id = tagged._model.piece_to_id
    assert tagged.unknown not in map(to_id, pieces)
    assert tagged.without_space([*map(to_id, pieces)]) == [*map(to_id, expected)]


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


def test_words_of_scripts_without_spaces_start_at_their_tokens(character_tokenizer):
    """An utterance that is too long ends before such a token; see `Endpointer`."""
    text = "我用iPhone（好）。っー ไม้ да"
    tokenizer = character_tokenizer(text)
    starts = {tokenizer.piece(i): tokenizer.word_starts[i] for i in tokenizer.encode(text)}
    assert {piece for piece, start in starts.items() if start} == {" ", "我", "用", "（", "好", "ไ", "ม"}
    closing = {tokenizer.piece(i) for i in tokenizer.encode(text) if tokenizer.closing_punctuation[i]}
    assert closing == {"）", "。"}
