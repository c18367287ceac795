"""Words and lines of single texts: divisions, breaks and joints, with expected results."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.runtime.text.scripts import (
    WordBreaker,
    begins_unspaced,
    begins_word,
    can_break,
    columns,
    ends_unspaced,
    join_texts,
    separate_characters,
    separator,
    unbreakable_spans,
)


@pytest.mark.parametrize(
    ("text", "begins", "ends"),
    [
        ("", False, False),
        ("a", False, False),
        (" 好", False, True),
        ("好 ", True, False),
        ("好a", True, False),
        ("a。", False, True),
        ("「a", True, False),
        ("a.", False, False),
        ("กa", True, False),
        ("aา", False, True),
        ("한국", False, False),  # Korean has spaces
        ("кот", False, False),
    ],
)
def test_texts_of_scripts_without_spaces(text: str, begins: bool, ends: bool) -> None:
    assert (begins_unspaced(text), ends_unspaced(text)) == (begins, ends)
    assert separator(text) == ("" if ends else " ")


@pytest.mark.parametrize(
    ("text", "begins"),
    [(" a", True), ("a", False), ("", False), ("好", True), ("。", False), ("「", True), ("ー", False), ("า", False)],
)
def test_beginning_of_a_word(text: str, begins: bool) -> None:
    assert begins_word(text) == begins


def test_texts_of_utterances_are_joined_by_their_script() -> None:
    assert join_texts([]) == join_texts([""]) == join_texts(["", ""]) == ""
    assert join_texts(["yes", "", "no."]) == "yes no."
    assert join_texts(["你好。", "我", "ok", "好"]) == "你好。我ok 好"
    assert join_texts(iter(["", "yes", ""])) == "yes"


@pytest.mark.parametrize(
    ("before", "after", "spaced", "expected"),
    [
        ("yes", "no", True, True),
        ("«", "no", True, False),
        ("¿(", "no", True, False),
        ("a(", "no", True, True),  # only marks that stand alone
        ("yes", "»", True, False),
        ("yes", "?!", True, False),
        ("yes", "?a", True, True),
        ("yes", "-", True, True),
        ("你", "好", False, True),
        ("你（", "好", False, False),
        ("（你", "好", False, True),
        ("你", "。好", False, False),
        ("你", "好。", False, True),
    ],
)
def test_breaks_of_lines(before: str, after: str, spaced: bool, expected: bool) -> None:
    assert can_break(before, after, spaced) == expected


@pytest.mark.parametrize(
    "text",
    [
        "yes| no",
        "« yes »| no !",
        "  yes|  no  ",
        "yes ?|no",
        "yes .»|no",
        "你|好。|（你）",
        "我|用|iPhone|打。",
        "你| 好",
        "你-|好",
        "",
    ],
)
def test_parts_that_are_not_broken(text: str) -> None:
    spans = unbreakable_spans(text.replace("|", ""))
    assert [text.replace("|", "")[slice(*span)] for span in spans] == [
        part.strip() for part in text.split("|") if part.strip()
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello, world", "hello, world"),
        ("我用iPhone打。", "我 用 iPhone 打 。"),
        ("  hello  ", "  hello  "),  # unchanged without such a character
        (" 你  好 a ", "你 好 a"),
    ],
)
def test_characters_are_separated(text: str, expected: str) -> None:
    assert separate_characters(text) == expected


def test_width_of_texts() -> None:
    assert [columns(text) for text in ("", "ab", "é", "e\u0301", "好a", "a\u200b", "\u20dd", "Ａ")] == [
        0,
        2,
        1,
        1,
        3,
        1,
        0,
        2,
    ]


@given(
    text=st.text(st.sampled_from([*'我好「」（）。，、？ーっ々ティกเั้าあa5.,"(«»?! \u2003é한']), max_size=12),
    data=st.data(),
)
@settings(max_examples=500, deadline=None)
def test_division_does_not_depend_on_the_pieces(text: str, data: st.DataObject) -> None:
    """Words begin at the same places if each character is a piece, if the text is one piece, and between."""

    def beginnings(pieces: list[str]) -> list[int]:
        breaker, position, found = WordBreaker(), 0, []
        for piece in pieces:
            for part, kind in breaker.split(piece):
                assert (kind == "space") == part.isspace()
                if kind == "word":
                    found.append(position)
                position += len(part)
        assert position == sum(map(len, pieces))
        return found

    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert beginnings([text]) == beginnings([*text]) == beginnings(pieces)
