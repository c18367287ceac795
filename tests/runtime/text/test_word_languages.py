"""The languages of words: that of the next language tag, in whole sequences and incrementally."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.runtime.text.languages import AUTO, LanguageTags, reported_language
from nemostream.runtime.text.words import Token, WordGrouper, group_words


def tokens_of(pieces: list[str]) -> list[Token]:
    """Return a token per piece, 80 ms each; a piece such as "<de-DE>" is a language tag."""
    return [
        Token(
            i,
            "" if "-" in piece else piece,
            i * 0.08,
            i * 0.08 + 0.08,
            -0.5,
            0.5,
            piece[1:-1] if "-" in piece else None,
            "-" in piece,
        )
        for i, piece in enumerate(pieces)
    ]


def languages(pieces: list[str], final: bool = True) -> list[tuple[str, str | None]]:
    return [(word.text, word.language) for word in group_words(tokens_of(pieces), final=final)]


def test_a_tag_labels_the_words_before_it_back_to_the_previous_tag() -> None:
    assert languages([" hello", " wor", "ld", ".", "<en-US>", " gu", "ten", " Tag", "<de-DE>", " bon"]) == [
        ("hello", "en-US"),
        ("world.", "en-US"),
        ("guten", "de-DE"),
        ("Tag", "de-DE"),
        ("bon", None),
    ]


def test_tags_at_unusual_places() -> None:
    assert languages([" a", "b"]) == [("ab", None)]
    assert languages(["<en-US>"]) == []
    assert languages(["<en-US>", " a"]) == [("a", None)]
    assert languages([" a", "<en-US>", "<de-DE>", " b"]) == [("a", "en-US"), ("b", None)]
    # A tag within a word: the word continues, and has the language in which it ends.
    assert languages([" a", "<en-US>", "b", " c", "<de-DE>"]) == [("ab", "de-DE"), ("c", "de-DE")]
    assert languages([" a", " ", "<en-US>", " b", "<de-DE>"]) == [("a", "en-US"), ("b", "de-DE")]
    assert languages([" \u4f60", "<0xE4>", "<0xBD>", "<0xA0>", "<zh-CN>"]) == [("\u4f60", "zh-CN")] * 2


PIECES = st.lists(st.sampled_from([" a", "b", " cd", " ", ".", "<en-US>", "<de-DE>", "<0xC3>", "<0xA4>"]), max_size=40)


@given(pieces=PIECES, data=st.data())
@settings(max_examples=300, deadline=None)
def test_words_are_the_same_incrementally(pieces: list[str], data: st.DataObject) -> None:
    """Prefixes in any order, as events of an utterance are read; and only what is new, in increasing order."""
    tokens = tokens_of(pieces)
    grouper, known, words = WordGrouper("min"), 0, ()
    for count in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6))):
        first, new = grouper.changed_words(tokens, known, count, final=False)
        words, known = (*words[:first], *new), count
        assert words == group_words(tokens[:count], final=False)
        earlier = data.draw(st.integers(0, count))
        assert grouper.words(tokens, False, earlier) == group_words(tokens[:earlier], final=False)


@given(pieces=PIECES)
@settings(max_examples=200, deadline=None)
def test_the_language_of_a_word_is_that_of_the_next_tag(pieces: list[str]) -> None:
    """Tags only remove the white space before them; the language by definition, from the last token of a word."""
    tokens = tokens_of(pieces)
    for word in group_words(tokens):
        last = max(i for i, token in enumerate(tokens) if token.text.strip() and token.end == word.end)
        following = [token.language for token in tokens[last:] if token.language]
        assert word.language == (following[0] if following else None)
    if not any(piece.startswith("<0x") for piece in pieces):  # a tag between the bytes of a character divides it
        # Without the tags and the white space before them, which the text does not have.
        kept: list[Token] = []
        for token in tokens:
            while token.tag and kept and kept[-1].text.isspace():
                kept.pop()
            kept += [] if token.tag else [token]
        untagged = group_words(kept)
        assert [word.text for word in group_words(tokens)] == [word.text for word in untagged]


def test_the_number_of_words_read_again_is_proportional_to_the_tokens() -> None:
    """Each tag repeats the words that it labels, and no others."""
    pieces = ([" a", " b", " c", " d", "<en-US>"] * 200)[:-1]
    tokens, grouper, read = tokens_of(pieces), WordGrouper("min"), 0
    for count in range(1, len(tokens) + 1):
        _, new = grouper.changed_words(tokens, count - 1, count, final=False)
        read += len(new)
    assert read < 3 * len(tokens)


@given(st.lists(st.lists(st.sampled_from([None, None, "en-US", "de-DE", "fr-FR"]), max_size=5), max_size=4))
@settings(max_examples=100, deadline=None)
def test_tags_of_a_growing_sequence(parts: list[list[str | None]]) -> None:
    """Every position and every number of tokens, by definition."""
    tags, tokens = LanguageTags(), []
    for part in parts:
        tags.extend(part)
        tokens += part
        assert tags.count == len(tokens)
        for count in range(len(tokens) + 1):
            before = [language for language in tokens[:count] if language]
            assert tags.last(count) == (before[-1] if before else None)
            assert tags.labelled(count) == max((i + 1 for i in range(count) if tokens[i]), default=0)
            for position in range(count + 1):
                following = [language for language in tokens[position:count] if language]
                assert tags.after(position, count) == (following[0] if following else None)


def test_reported_language() -> None:
    """The language that was set; that of the last tag if the model detects it."""
    assert [reported_language(language, tag) for language in ("de", AUTO) for tag in ("en-US", None)] == [
        "de",
        "de",
        "en-US",
        None,
    ]
