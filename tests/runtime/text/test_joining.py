"""Two transcripts of the same audio are joined without losing or repeating a word."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.runtime.text.joining import Joiner, TokenSpan
from nemostream.runtime.text.tokenizer import Tokenizer

FRAME = 1280


@pytest.fixture(scope="module")
def tokenizer(bundle) -> Tokenizer:
    return Tokenizer.of_bundle(bundle)


@pytest.fixture(scope="module")
def joiner(manifest, tokenizer) -> Joiner:
    return Joiner(manifest, tokenizer)


def span_of(tokenizer: Tokenizer, transcript: str) -> TokenSpan:
    """Return the tokens of words with their frames: "the@3 quick@7" has all tokens of a word in its frame."""
    ids, positions = [], []
    for part in transcript.split():
        word, frame = part.split("@")
        tokens = tokenizer.encode(word)
        ids += tokens
        positions += [FRAME * int(frame)] * len(tokens)
    return TokenSpan(ids, positions, 0, len(ids))


def text(tokenizer: Tokenizer, span: TokenSpan, begin: int, end: int | None = None) -> str:
    return tokenizer.decode(list(span.ids[begin : span.end if end is None else end]))


@pytest.mark.parametrize(
    ("done", "other", "boundary", "expected"),
    [
        ("", "", 10, ""),
        ("", "the@3 quick@7", 0, "the quick"),
        ("the@3 quick@7", "the@3 quick@7 fox@12", 10, "fox"),
        ("the@3 quick@9", "the@3 quick@11 fox@15", 10, "fox"),  # later than the boundary: not repeated
        ("the@3", "the@3 quick@8 fox@12", 10, "quick fox"),  # earlier than the boundary: not lost
        ("the@3 brown@8", "the@3 quick@8 fox@12", 10, "fox"),  # another word
        ("the@3 lazy@8 dog@9", "the@3 quick@8 fox@12", 10, "fox"),  # other words
        ("the@3 quick@9", "the@1 lazy@8 quick@11 fox@15", 10, "fox"),  # a word that `done` does not have
        ("", "the@1 quick@8 fox@12", 10, "quick fox"),  # words long before the boundary are complete
        ("the@9", "The@9 fox@12", 10, "fox"),
        ("again@3 again@8", "again@3 again@11 again@14", 10, "again"),  # the nearest of equal words
        # Other words in the same audio, of which the first are complete: they replace those that are not
        ("the@6 brown@9 lazy@20 dog@22", "the@6 again@9 over@13 jumps@14 fox@21", 28, ""),
        ("lazy@20 dog@22", "over@13 jumps@14 fox@21 again@25 quick@30", 28, "quick"),
        ("lazy@20", "over@13 jumps@14 fox@21 again@25", 28, "again"),
    ],
)
def test_continuation(joiner, tokenizer, done, other, boundary, expected) -> None:
    other_span = span_of(tokenizer, other)
    begin = joiner.continuation(span_of(tokenizer, done), other_span, FRAME * boundary)
    assert text(tokenizer, other_span, begin) == expected


@pytest.mark.parametrize(
    ("other", "done", "boundary", "silence", "expected"),
    [
        ("the@3 fox@5", "the@3 fox@5", 20, True, "the fox"),
        ("the@3 fox@5", "the@3 fox@5 jumps@18", 20, True, "the fox"),  # shortly before the end: the next utterance
        ("the@3 fox@5", "the@3 fox@5 jumps@18", 20, False, "the fox jumps"),  # the model ended it: a missed word
        ("the@3 fox@18", "the@3 fox@21 jumps@23", 20, False, "the fox"),  # later than the end
        ("the@3", "the@3 fox@5", 20, True, "the fox"),
        ("the@3", "", 20, True, ""),
    ],
)
def test_end(joiner, tokenizer, other, done, boundary, silence, expected) -> None:
    span = span_of(tokenizer, done)
    end = joiner.end(span_of(tokenizer, other), span, FRAME * boundary, silence)
    assert text(tokenizer, span, 0, end) == expected


@pytest.mark.parametrize(
    ("done", "other", "boundary", "expected"),
    [
        ("the@3 quick@7", "the@3 quick@7 fox@12", 10, ("the quick", "fox")),
        ("the@3 qu@9", "the@3 quick@9 fox@12", 10, ("the", "quick fox")),  # `done` ends within a word
        ("the@3 qu@9", "the@3 fox@12", 10, ("the qu", "fox")),
        ("the@3 qu@9", "", 10, ("the qu", "")),
    ],
)
def test_join(joiner, tokenizer, done, other, boundary, expected) -> None:
    done_span, other_span = span_of(tokenizer, done), span_of(tokenizer, other)
    end, following = joiner.join(done_span, other_span, FRAME * boundary)
    assert (text(tokenizer, done_span, 0, end), text(tokenizer, other_span, following)) == expected


def test_complete_words_end_before_the_last(joiner, tokenizer) -> None:
    span = span_of(tokenizer, "the@3 quick@7 fox@9")
    assert text(tokenizer, span, 0, joiner.complete_words(span)) == "the quick"
    assert joiner.complete_words(TokenSpan([], [], 0, 0)) == 0


@given(
    words=st.lists(st.tuples(st.sampled_from(["the", "quick", "fox", "dog", "lazy"]), st.integers(2, 9)), max_size=12),
    shifts=st.lists(st.integers(-2, 2), min_size=12, max_size=12),
    boundary=st.integers(0, 90),
)
@settings(max_examples=300, deadline=None)
def test_distinct_neighbours_are_neither_lost_nor_repeated(joiner, tokenizer, words, shifts, boundary) -> None:
    """One transcript ends at the boundary; the other has each word up to two frames earlier or later."""
    frame, one, other, previous, expected = 2, [], [], "", []
    for (word, gap), shift in zip(words, shifts, strict=False):
        if word == previous:
            continue
        frame, previous = frame + gap + 4, word  # so far apart that the order is the same in both
        expected.append(word)
        if frame < boundary:
            one.append(f"{word}@{frame}")
        other.append(f"{word}@{frame + shift}")
    other_span = span_of(tokenizer, " ".join(other))
    begin = joiner.continuation(span_of(tokenizer, " ".join(one)), other_span, FRAME * boundary)
    assert [part.split("@")[0] for part in one] + text(tokenizer, other_span, begin).split() == expected
