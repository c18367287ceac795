"""tokenizer.json to SentencePiece: the original SentencePiece model and the tokenizers library are the oracles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from nemostream.errors import CheckpointError
from nemostream.export.sentencepiece_model import convert_tokenizer

SENTENCES = [
    "the quick brown fox jumps over the lazy dog, and then it says: hello world!",
    "Übermorgen fährt der Zug nach München ab, wenn das Wetter schön bleibt.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "今日は天気がいいから、散歩しましょう。明日も晴れるでしょうか。",
    "오늘은 날씨가 좋아서 산책을 하고 싶어요.",
    "नमस्ते दुनिया, आप कैसे हैं? मैं ठीक हूँ।",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "สวัสดีชาวโลก วันนี้อากาศดีมาก",
]
UNSEEN = [
    "hello quick lazy fox",
    "München schön",
    "ещё чаю",
    "今日も晴れ",
    "날씨가 좋아요",
    "दुनिया ठीक",
    "العالم اليوم",
    "ชาวโลก",
    "ﬁ １２ Ａ",
]
VOCABULARY = 360


def train(folder: Path, model_type: str, **options: Any) -> sentencepiece.SentencePieceProcessor:
    (folder / "text.txt").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    settings = {
        "input": str(folder / "text.txt"),
        "model_prefix": str(folder / "original"),
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "character_coverage": 1.0,
        "bos_id": -1,
        "eos_id": -1,
        "user_defined_symbols": ["<EOU>", "<EOB>", "<en-US>", "<de-DE>"],
        "num_threads": 1,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(**(settings | options))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "original.model"))


@pytest.mark.nemo
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [False, True], ids=["", "bytes"])
def test_the_tokenizer_of_transformers(
    model_type: str, byte_fallback: bool, convert_tokenizer_json: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    """transformers converts both types to BPE: encoding equals its tokenizer, decoding the original too."""
    import tokenizers

    original = train(tmp_path, model_type, byte_fallback=byte_fallback, vocab_size=VOCABULARY + 256 * byte_fallback)
    convert_tokenizer_json(tmp_path / "original.model", tmp_path / "tokenizer.json")
    size = original.get_piece_size()
    convert_tokenizer(tmp_path / "tokenizer.json", tmp_path / "converted.model", size)
    converted = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "converted.model"))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert_same_pieces(converted, original)
    random = np.random.default_rng(0)
    for _ in range(100):
        ids = random.integers(0, size, 20).tolist()
        assert converted.decode(ids) == original.decode(ids)
    for text in [*SENTENCES, *UNSEEN]:
        assert converted.encode(text) == library.encode(text, add_special_tokens=False).ids, text
        if model_type == "bpe":
            assert converted.encode(text) == original.encode(text), text


def test_unigram_models(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")

    original = train(tmp_path, "unigram")
    size = original.get_piece_size()
    pieces = [(original.id_to_piece(i), original.get_score(i)) for i in range(size)]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    names = [piece for piece, _ in pieces if piece.startswith("<") and piece.endswith(">") and piece != "<unk>"]
    library.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    convert_tokenizer(tmp_path / "tokenizer.json", tmp_path / "converted.model", size)
    converted = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "converted.model"))
    assert_same_pieces(converted, original)
    random = np.random.default_rng(0)
    for _ in range(100):
        ids = random.integers(0, size, 20).tolist()
        assert converted.decode(ids) == original.decode(ids)
    for text in (*SENTENCES, *UNSEEN[:-1]):  # this one is normalised, for which the library has no rules here
        assert converted.encode(text) == original.encode(text) == library.encode(text).ids, text


def assert_same_pieces(converted: Any, original: Any) -> None:
    size = original.get_piece_size()
    assert converted.get_piece_size() == size and converted.unk_id() == original.unk_id()
    assert (converted.bos_id(), converted.eos_id(), converted.pad_id()) == (-1, -1, -1)
    for i in range(size):
        assert converted.id_to_piece(i) == original.id_to_piece(i)
        assert converted.is_byte(i) == original.is_byte(i)
        assert converted.is_unknown(i) == original.is_unknown(i)
    for name in ("<EOU>", "<EOB>", "<en-US>", "<de-DE>"):
        identifier = converted.piece_to_id(name)
        assert original.id_to_piece(identifier) == name and not converted.is_control(identifier)
        assert identifier in converted.encode(f"hello {name} world"), "user-defined pieces are never split"


MODEL = {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"], "unk_token": "<unk>"}
ADDED = [{"id": 4, "content": "<pad>", "special": True}, {"id": 5, "content": "<blank>", "special": True}]


def test_a_minimal_model(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"model": MODEL, "added_tokens": ADDED}))
    convert_tokenizer(tmp_path / "t.json", tmp_path / "t.model", 4)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert [model.id_to_piece(i) for i in range(model.get_piece_size())] == ["<unk>", "a", "b", "ab"]
    assert model.decode([3, 1, 2]) == "abab"


@pytest.mark.parametrize("charsmap", ["", "AAEC"])
def test_every_field_of_a_model(charsmap: str, tmp_path: Path) -> None:
    """protobuf reads the file. Ids of -1 are stated, because SentencePiece has beginning and end by default."""
    protocol = pytest.importorskip("transformers.utils.sentencepiece_model_pb2_new", exc_type=ImportError)
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None
    (tmp_path / "t.json").write_text(json.dumps({"model": MODEL, "added_tokens": ADDED, "normalizer": normalizer}))
    convert_tokenizer(tmp_path / "t.json", tmp_path / "t.model", 4)
    found = protocol.ModelProto.FromString((tmp_path / "t.model").read_bytes())
    kinds = protocol.ModelProto.SentencePiece.Type
    assert [(piece.piece, piece.score, piece.type) for piece in found.pieces] == [
        ("<unk>", -1, kinds.UNKNOWN),
        ("a", -2, kinds.NORMAL),
        ("b", -3, kinds.NORMAL),
        ("ab", 0, kinds.NORMAL),
    ]
    assert found.trainer_spec == protocol.TrainerSpec(
        model_type=protocol.TrainerSpec.ModelType.BPE,
        vocab_size=4,
        byte_fallback=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_piece="<unk>",
    )
    assert found.normalizer_spec == protocol.NormalizerSpec(
        name="nmt_nfkc" if charsmap else "identity",
        precompiled_charsmap=bytes([0, 1, 2] if charsmap else []),
        add_dummy_prefix=True,
        remove_extra_whitespaces=True,
        escape_whitespaces=True,
    )


def converted(tmp_path: Path, document: Any, size: int) -> sentencepiece.SentencePieceProcessor:
    (tmp_path / "t.json").write_text(json.dumps(document))
    convert_tokenizer(tmp_path / "t.json", tmp_path / "t.model", size)
    return sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))


def test_scores_follow_the_order_of_merges(tmp_path: Path) -> None:
    """The first merge has the highest score; tokens that no merge makes have lower ones, in the order of their ids."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6, "x": 7}
    merges = ["b c", ["a", "b"], "a bc", "ab c"]  # the last makes a token again
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>"}
    found = converted(tmp_path, {"model": model}, 8)
    assert [found.get_score(i) for i in range(8)] == [-3, -4, -5, -6, -1, 0, -2, -7]
    assert found.encode("abc", out_type=str) != ["ab", "c"]
    assert found.unk_id() == 0 and found.is_unknown(0)


def test_kinds_of_added_tokens(tmp_path: Path) -> None:
    """Special tokens are control pieces, except tags of languages; others are user-defined; bytes need all 256."""
    texts = ["<unk>", "a", "<en-US>", "<EOU>", "<ctl>", "<eng-US>", "<en-USA>", "<0x41>"]
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(texts)}, "merges": [], "unk_token": "<unk>"}
    special = {"<en-US>": True, "<EOU>": False, "<ctl>": True, "<eng-US>": True, "<en-USA>": True}
    added = [{"id": texts.index(text), "content": text, "special": kind} for text, kind in special.items()]
    found = converted(tmp_path, {"model": model, "added_tokens": added}, len(texts))
    assert [texts[i] for i in range(len(texts)) if found.is_control(i)] == ["<ctl>", "<en-USA>"]
    assert not any(found.is_byte(i) for i in range(len(texts)))
    texts = ["a", "<unk>", *(f"<0x{value:02X}>" for value in range(256))]
    model = {"type": "Unigram", "vocab": [[t, -float(i)] for i, t in enumerate(texts)], "unk_id": 1}
    found = converted(tmp_path, {"model": model}, len(texts))
    assert [found.is_byte(i) for i in range(258)] == [False] * 2 + [True] * 256
    assert found.unk_id() == 1 and found.decode([2 + 0xC3, 2 + 0xA9]) == "é"
    assert [found.get_score(i) for i in (0, 2, 257)] == [0, -2, -257]
    assert [found.encode("é")[-2:]] == [[2 + 0xC3, 2 + 0xA9]]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "not an object"),
        ({}, "model is None"),
        ({"model": {"type": "WordPiece"}}, "'WordPiece'; BPE and Unigram are supported"),
        ({"model": MODEL | {"vocab": {"<unk>": 0, "a": 0}}}, "invalid or used twice"),
        ({"model": MODEL | {"vocab": {"<unk>": 0, "a": "1"}}}, "invalid or used twice"),
        ({"model": MODEL | {"vocab": {"<unk>": 0, "a": 1, "b": 2}, "merges": []}}, "no token of id 3"),
        ({"model": MODEL | {"vocab": MODEL["vocab"] | {"c": 4}}}, "1 tokens more than the 4 of the model, such as 'c'"),
        ({"model": MODEL | {"merges": [["a", "a"]]}}, "which makes no token"),
        ({"model": MODEL | {"merges": [5]}}, "not a pair of tokens"),
        ({"model": MODEL | {"unk_token": None}}, "no token for unknown text"),
        ({"model": MODEL, "added_tokens": [{"id": 1, "content": "x"}]}, "id 1 of another token"),
        ({"model": MODEL, "added_tokens": 5}, "added_tokens is 5, not a list"),
        ({"model": MODEL, "added_tokens": [5]}, "added_tokens is 5, not an object"),
        ({"model": MODEL, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "not base64"),
        ({"model": {"type": "Unigram", "vocab": [["a", "b"]]}}, "not a token and its score"),
        ({"model": {"type": "Unigram", "vocab": [["a", 1e300]]}}, "not a float32"),
        ({"model": {"type": "Unigram", "vocab": [["", 0.0]]}}, "not a text"),
        (
            {"model": {"type": "Unigram", "vocab": [["a", 0], ["a", 0], ["b", 0], ["c", 0]], "unk_id": 0}},
            "occurs twice",
        ),
    ],
)
def test_malformed_documents(document: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert_tokenizer(tmp_path / "t.json", tmp_path / "t.model", 4)
    assert "\n" not in str(caught.value) and not (tmp_path / "t.model").exists()
