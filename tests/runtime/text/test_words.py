"""Words compared with SentencePiece's text and with expected groups."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import threading
import unicodedata

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import OptionError
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.text.scripts import CLOSING, OPENING, WordBreaker
from nemostream.runtime.text.tokenizer import Detokenizer, Tokenizer
from nemostream.runtime.text.words import Result, Token, Word, WordGrouper, group_words, join_words


def make_tokens(*pieces: str) -> list[Token]:
    """Return consecutive tokens of 80 ms with increasing confidence."""
    return [Token(i, piece, 0.08 * i, 0.08 * (i + 1), -1.0, 0.5 + 0.01 * i) for i, piece in enumerate(pieces)]


def spans(*pieces: str) -> list[tuple[str, int, int]]:
    """Return the text, first token and last token of each word."""
    return [
        (word.text, round(word.start / 0.08), round(word.end / 0.08) - 1) for word in group_words(make_tokens(*pieces))
    ]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        ([" the", " quick", "er"], [("the", 0, 0), ("quicker", 1, 2)]),
        (["er", " the"], [("er", 0, 0), ("the", 1, 1)]),  # starts within a word
        ([" don", "'", "t", "."], [("don't.", 0, 3)]),
        ([" yes", " ,", " no"], [("yes,", 0, 1), ("no", 2, 2)]),  # punctuation after a space
        ([" yes", " ", "?", " no"], [("yes?", 0, 2), ("no", 3, 3)]),
        ([" ,", " no"], [(",", 0, 0), ("no", 1, 1)]),  # no preceding word
        ([" yes", " &", " no"], [("yes", 0, 0), ("&", 1, 1), ("no", 2, 2)]),
        ([" ", "a", "b"], [("ab", 0, 2)]),  # a space token belongs to the next word
        ([" ", " ab"], [("ab", 1, 1)]),
        ([" of the", "m"], [("of", 0, 0), ("them", 0, 1)]),  # a token of two words
        ([" a", " \u2047 ", "b"], [("a", 0, 0), ("\u2047", 1, 1), ("b", 2, 2)]),  # unknown
        ([" a", "", "b"], [("ab", 0, 2)]),  # a control token
        ([" ", "<0xE2>", "<0x82>", "<0xAC>", "s"], [("\u20acs", 0, 4)]),
        ([" a", "<0xE2>", "<0x82>"], [("a\ufffd\ufffd", 0, 2)]),
        ([" a", "<0x20>", "<0xC3>", "<0xA9>"], [("a", 0, 0), ("\u00e9", 1, 3)]),
    ],
)
def test_expected_words(pieces, expected):
    assert spans(*pieces) == expected


def test_tokens_are_equal_if_only_their_end_differs():
    """The end of a token may be clipped to the recording after it was reported."""
    token = Token(1, " a", 0.08, 0.16, -1.0, 0.5, "de-DE", True)
    others = {"id": 2, "text": "a", "time": 0.0, "score": -2.0, "confidence": 0.25, "language": None, "tag": False}
    assert {*others, "end"} == {item.name for item in dataclasses.fields(Token)}
    assert token == dataclasses.replace(token, end=0.1)
    assert all(token != dataclasses.replace(token, **{name: value}) for name, value in others.items())


def test_incomplete_character_is_omitted_until_the_result_is_final():
    tokens = tuple(make_tokens(" a", "<0xE2>", "<0x82>"))
    assert [word.text for word in Result("a", tokens, 1.0, 80, False).words] == ["a"]
    assert [word.text for word in Result("a\ufffd\ufffd", tokens, 1.0, 80, True).words] == ["a\ufffd\ufffd"]


@pytest.mark.parametrize(("aggregation", "expected"), [("min", 0.5), ("max", 0.52), ("mean", 0.51), ("prod", 0.13260)])
def test_confidence_of_a_word_is_aggregated_over_its_tokens(aggregation, expected):
    (word,) = group_words(make_tokens(" a", "b", "c"), aggregation)
    assert word == Word("abc", 0.0, 0.24, pytest.approx(expected))


@pytest.mark.parametrize("aggregation", ["min", "max", "mean", "prod"])
def test_words_of_a_result_have_its_aggregation(aggregation):
    tokens = tuple(make_tokens(" a", "b", " c", "d"))
    result = Result("ab cd", tokens, 1.0, 80, True, aggregation=aggregation)
    assert result.words == group_words(tokens, aggregation)
    assert pickle.loads(pickle.dumps(WordGrouper(aggregation))).words(tokens, True) == result.words


def test_word_does_not_start_after_the_end_of_the_recording():
    """The frame of the last tokens may begin after the end, to which the ends of tokens are clipped."""
    tokens = [dataclasses.replace(token, end=min(token.end, 0.14)) for token in make_tokens(" a", "b", " c", "d")]
    assert [(word.start, word.end) for word in group_words(tokens)] == [(0.0, 0.14), (0.14, 0.14)]


@pytest.mark.parametrize("interrupted", [0, 1, 2])
def test_grouper_may_be_used_by_several_threads(interrupted):
    """A second thread reads the words while the first one reads its tokens for the n-th time."""
    tokens = make_tokens(*[" a", "b", " c", "", " d"] * 9)
    tokens = [token if token.text else dataclasses.replace(token, language="de-DE", tag=True) for token in tokens]
    plain, found, reads = tokens[:25], [], []
    grouper = WordGrouper("min")
    thread = threading.Thread(target=lambda: found.append(grouper.words(plain, False)), daemon=True)

    class Tokens(list):
        def __getitem__(self, index):
            if isinstance(index, slice):
                reads.append(index)
                if len(reads) == interrupted + 1:
                    thread.start()
                    thread.join(0.2)  # it ends here only if it does not wait for this thread
            return super().__getitem__(index)

    found.append(grouper.words(Tokens(plain), False))
    thread.join(20)
    assert not thread.is_alive()
    assert found == [group_words(plain, final=False)] * 2
    assert grouper.words(tokens, False) == group_words(tokens, final=False)


@pytest.fixture(scope="module")
def punctuated(tmp_path_factory) -> Tokenizer:
    """A tokenizer whose punctuation marks are pieces."""
    model = io.BytesIO()
    marks = ['"', "¿", "¡", "-", "&", "«", "»", "?", "!"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["he said hi there Hola qué tal sí rock roll now oui"] * 20),
        model_writer=model,
        vocab_size=70,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=marks,
    )
    path = tmp_path_factory.mktemp("marks") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size())


@pytest.fixture(scope="session")
def oracle(tokenizer_model):
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)


BYTES = st.binary(min_size=1, max_size=4).map(lambda data: [f"<0x{byte:02X}>" for byte in data])
PIECES = st.one_of(
    st.sampled_from(["\u2581", "\u2581the", "he", "\u2581again", "z", "<unk>", "<s>", "</s>"]).map(lambda p: [p]),
    st.sampled_from(["€", "é", "😀", " ", "\u2003"]).map(lambda c: [f"<0x{byte:02X}>" for byte in c.encode()]),
    BYTES,
)


@given(pieces=st.lists(PIECES, max_size=12))
@settings(max_examples=300, deadline=None)
def test_words_equal_those_of_sentencepiece(bundle, oracle, pieces):
    """For arbitrary pieces, the words are those of the text, in order, and their tokens cover the text."""
    tokenizer = Tokenizer(bundle.path / "tokenizer.model", bundle.manifest.decoder.vocabulary)
    ids = [oracle.piece_to_id(piece) for group in pieces for piece in group]
    text = oracle.decode(ids)
    words = group_words(make_tokens(*map(tokenizer.piece, ids)))
    # Punctuation beside a space and scripts without spaces are the only intended differences; these pieces form some by
    # chance.
    assert "".join(word.text for word in words) == "".join(text.split())
    if not set(text) & (CLOSING | OPENING) and all(each < "\u0e00" or each in "€😀\u2003\ufffd" for each in text):
        assert [word.text for word in words] == text.split()
    # The same incrementally, including a request for earlier tokens.
    tokens, grouper = make_tokens(*map(tokenizer.piece, ids)), WordGrouper("min")
    for count in [*range(len(ids) + 1), len(ids) // 2]:
        assert grouper.words(tokens[:count], False) == group_words(tokens[:count], final=False)
    assert grouper.words(tokens, True) == words
    starts, ends = [word.start for word in words], [word.end for word in words]
    assert starts == sorted(starts) and ends == sorted(ends) and all(a < b for a, b in zip(starts, ends, strict=True))


# -- scripts without spaces --------------------------------------------------------------------------------------------

# The text, with a line between its words.
DIVIDED = [
    "我|用|iPhone|打|电|话，|好|吗？",
    "他|说：|“你|好”|（谢|谢）。|Hello,| world!| 再|见",
    "今|天|2024|年，|GDP|增|长|5.2%。|花|了|$5",
    "「ティ|ン|ブ|ク|トゥー」、|人々|が|いっ|た。",
    "カ\u3099|ス|ﾃﾞｰ|ﾀ",
    "葛\U000e0100|城|市",  # a variant of a character
    "ส|วั|ส|ดี|ค|รั|บ| ผ|ม|ชื่|อ|เส|ม|ชา|ย| 25| บา|ท",
    "น้ำ|แข็|ง|เก้า|อี้|ใน|โร|ง|เรี|ย|น",
    "ພາ|ສາ|ລາ|ວ| ເກົ້າ",
    "ភា|សា|ខ្មែ|រ។\u200b|ខ្ញុំ",
    "မြ|န်|မာ|စာ။| မ|န္တ|လေး",
    "Hola,| ¿qué| tal?| (Bien)| «Sí»| „Ja“| »Nein«",
    "한국어는| 띄어쓰기가| 있습니다.",
    "قال:| «مرحبا»،| كيف| حالك؟| می\u200cخواهم",
    "क्या| हाल| है।| नमस्ते",
]


@pytest.mark.parametrize("divided", DIVIDED)
def test_words_of_all_scripts(divided):
    """The words do not depend on the tokens, and with their spaces they are the text."""
    text, expected = divided.replace("|", ""), [part.strip() for part in divided.split("|")]
    for pieces in (text, [text], re.split("(?<= )", text), [text[i : i + 3] for i in range(0, len(text), 3)]):
        words = group_words(make_tokens(*pieces))
        assert [word.text for word in words] == expected
        assert join_words(words) == text


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["我", "用", "i", "Phone"], [("我", 0, 0), ("用", 1, 1), ("iPhone", 2, 3)]),
        (
            [" 東京", "で", "す", "。"],
            [("東", 0, 0), ("京", 0, 0), ("で", 1, 1), ("す。", 2, 3)],
        ),  # a token of two words
        (["ก", "ั", "บ"], [("กั", 0, 1), ("บ", 2, 2)]),
        ([" ก", " ั", " า", " เ", " ก"], [("กัา", 0, 2), ("เก", 3, 4)]),  # marks and vowels after a space
        (["「", "好", "」", " ", "。"], [("「好」。", 0, 4)]),
        ([" «", " a", " »"], [("«a", 0, 1), ("»", 2, 2)]),  # » opens a quotation in German
        ([" ¿", " que", " ?"], [("¿que?", 0, 2)]),
        (["好", " ,", "好"], [("好,", 0, 1), ("好", 2, 2)]),
        (["<0xE5>", "<0xA5>", "<0xBD>", "<0xE5>", "<0x90>", "<0x97>"], [("好", 0, 2), ("吗", 3, 5)]),
        (["好", " ", "。", "吗"], [("好。", 0, 2), ("吗", 3, 3)]),
        (["っ"], [("っ", 0, 0)]),  # no preceding word
    ],
)
def test_tokens_of_words_without_spaces(pieces, expected):
    assert spans(*pieces) == expected


MIXED = st.lists(
    st.sampled_from(
        [
            *"我好「」（。，、？ーっ々ティกเั้าあ",
            "hello",
            "a",
            "5",
            ".",
            ",",
            '"',
            "(",
            "«",
            "»",
            " ",
            " ",
            " ?",
            "東京",
            "العربية",
        ]
    ),
    max_size=14,
)


@given(pieces=MIXED)
@settings(max_examples=300, deadline=None)
def test_incremental_words_of_mixed_scripts(pieces):
    """Words are in order and complete, never change once another word follows, and never divide a cluster."""
    tokens, grouper, known, words = make_tokens(*pieces), WordGrouper("min"), 0, ()
    for count in range(len(tokens) + 1):
        first, new = grouper.changed_words(tokens, known, count, False)
        before, known, words = words, count, words[:first] + new
        assert words[: max(len(before) - 1, 0)] == before[:-1]  # only the last word may change
        assert words == group_words(tokens[:count]) == WordGrouper("min").words(tokens, False, count)
    text = "".join(pieces)
    assert "".join(word.text for word in words) == "".join(text.split())
    starts = [word.start for word in words]
    assert starts == sorted(starts) and all(word.start < word.end for word in words)
    assert all(unicodedata.category(word.text[0])[0] != "M" for word in words[1:])
    assert not any(word.text[0] in "」。，、？ーっ々า" for word in words[1:])


def test_space_before_punctuation_of_the_vocabulary_is_kept(punctuated):
    """NeMo deletes white space before every punctuation mark of the vocabulary, which joins words (see below)."""
    for text in ('he said "hi" there', "Hola ¿qué tal? ¡sí!", "rock & roll - now", "« oui »"):
        ids = punctuated.encode(text)
        assert any(punctuated.piece(i) in ('"', "¿", "¡", "-", "«") for i in ids)
        assert punctuated.decode(ids) == text
        words = group_words(make_tokens(*map(punctuated.piece, ids)))
        assert "".join(word.text for word in words) == "".join(text.split())
        assert [word.text for word in words] == (["«oui", "»"] if "«" in text else text.split())


@pytest.mark.nemo
def test_nemo_deletes_the_space(punctuated):
    """The documented difference, with NeMo's own function."""
    from nemo.collections.asr.parts.submodules.rnnt_decoding import AbstractRNNTDecoding
    from nemo.collections.asr.parts.utils.tokenizer_utils import extract_punctuation_from_vocab

    class Decoding(AbstractRNNTDecoding):
        def __init__(self) -> None:
            marks = extract_punctuation_from_vocab([punctuated.piece(i) for i in range(punctuated.vocabulary)])
            self.supported_punctuation, self.strip_lang_tags = marks, False
            self.space_before_punct_pattern = re.compile(rf"(\s)({'|'.join(map(re.escape, marks))})")

        def decode_ids_to_str(self, tokens: list[int]) -> str:
            return punctuated.decode(tokens)

    Decoding.__abstractmethods__ = frozenset()
    decode = Decoding().decode_tokens_to_str_with_strip_punctuation
    assert decode(punctuated.encode('he said "hi" there')) == 'he said"hi" there'
    assert decode(punctuated.encode("Hola ¿qué tal?")) == "Hola¿qué tal?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "gibbs"}, "measure is 'gibbs'; choose one of max_prob, tsallis, renyi"),
        ({"norm": "log"}, "norm is 'log'"),
        ({"aggregation": "median"}, "aggregation is 'median'"),
        ({"alpha": 0.5}, "alpha is 0.5; tsallis and renyi support 0.33 only"),
        ({"measure": "max_prob", "alpha": 0}, "alpha is 0; it must be above 0"),
        ({"measure": "max_prob", "alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_invalid_confidence_is_rejected(options, message):
    with pytest.raises(OptionError, match=message):
        Confidence(**options)


# -- tags --------------------------------------------------------------------------------------------------------------

TAGS = ["<en-US>", "<de-DE>", "\u2581<zh-CN>", "<EOU>", "<EOB>"]
PLAIN = ["\u2581", "\u2581yes", "\u2581no", "on", "o", "\u4f60", "\u597d", "<unk>", "<s>", "\u2581ja"]
CHARACTERS = st.sampled_from(["\u4e16", "\u2003", "(", "\u300c", "\u0e40", "\u0e01", "é"])
TAGGED = st.one_of(
    st.sampled_from([*TAGS, *PLAIN, ".", ",", "?", "<0x20>"]).map(lambda piece: [piece]),
    CHARACTERS.map(lambda character: [f"<0x{byte:02X}>" for byte in character.encode()]),
    st.binary(min_size=1, max_size=3).map(lambda data: [f"<0x{byte:02X}>" for byte in data]),
)


def tagged_tokens(tokenizer: Tokenizer, pieces: list[str]) -> list[Token]:
    ids = [tokenizer._model.piece_to_id(piece) for piece in pieces]
    return [
        Token(
            id_,
            tokenizer.piece(id_),
            float(index),
            index + 1.0,
            -1.0,
            0.5,
            tokenizer.languages.get(id_),
            id_ in tokenizer.tags,
        )
        for index, id_ in enumerate(ids)
    ]


def without_space(text: str) -> str:
    """Return a text without the white space that words do not have, from the text alone.

    Words have a space before some closing punctuation, depending on the division into pieces; it is removed.
    """
    joined = space = ""
    for part, kind in WordBreaker().split(text):
        if kind == "space":
            space = " "
        else:
            joined += part if kind == "rest" else space + part
            space = ""
    return re.sub(f" (?=[{re.escape(''.join(CLOSING))}])", "", joined.lstrip())


@given(pieces=st.lists(TAGGED, max_size=14), data=st.data())
@settings(max_examples=400, deadline=None)
def test_words_follow_the_text_around_tags(tagged, pieces, data):
    tokens = tagged_tokens(tagged, [piece for group in pieces for piece in group])
    text = tagged.decode([token.id for token in tokens])
    words = group_words(tokens)
    assert without_space(join_words(words)) == without_space(text)
    if all(group[0] in TAGS + PLAIN for group in pieces):
        assert [word.text for word in words if word.text.isascii()] == re.findall(r"[a-z]+", text)
        assert join_words(words) == re.sub(r"\s+", " ", text)
    grouper, detokenizer, known, found = WordGrouper("min"), Detokenizer(tagged), 0, ()
    for count in (*sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6))), len(tokens)):
        partial = detokenizer.push([token.id for token in tokens[known:count]])
        first, new = grouper.changed_words(tokens, known, count, final=False)
        found, known = (*found[:first], *new), count
        assert found == group_words(tokens[:count], final=False)
        assert without_space(join_words(found)) == without_space(partial)
    assert grouper.words(tokens, True) == words


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["\u4f60", "\u597d", "\u2581", "\u2581<zh-CN>", "\u4f60"], [("\u4f60", 0), ("\u597d", 1), ("\u4f60", 4)]),
        (["\u2581yes", "\u2581", "<de-DE>", "on"], [("yeson", 0)]),
        (["\u2581yes", "\u2581", "<EOU>", "\u2581no"], [("yes", 0), ("no", 3)]),
        (["\u2581yes", "<EOB>", "\u2581", "on"], [("yes", 0), ("on", 2)]),
        (["\u2581", "<de-DE>", "on"], [("on", 2)]),
        (["\u2581yes", "\u2581", "<s>", "on"], [("yes", 0), ("on", 1)]),  # a control piece is not a tag
    ],
)
def test_white_space_before_a_tag_is_not_part_of_words(tagged, pieces, expected):
    tokens = tagged_tokens(tagged, pieces)
    words = group_words(tokens)
    assert [(word.text, word.start) for word in words] == expected
    assert join_words(words) == tagged.decode([token.id for token in tokens])
