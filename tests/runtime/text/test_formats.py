"""Output formats, read by third-party programs: subtitle parsers, NeMo's and lhotse's readers, sclite.

The limits of subtitles are those of the Netflix Timed Text Style Guide, stated here independently.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pysubs2
import pytest
import srt
import wcwidth
import webvtt
from hypothesis import example, given
from hypothesis import strategies as st

from nemostream.runtime.text import formats
from nemostream.runtime.text.formats import Cue, Format, Transcript, Utterance
from nemostream.runtime.text.scripts import columns
from nemostream.runtime.text.words import Token

MIN_DURATION, MAX_DURATION, GAP, SPEED, WIDTH = 5 / 6, 7.0, 1 / 12, 20, 42
MS = 0.0011  # seconds: two rounding errors


@dataclass(frozen=True)
class Word:
    text: str
    start: float
    end: float
    confidence: float = 0.9
    after_space: bool = True
    language: str | None = None


@dataclass(frozen=True)
class Shown:
    start: float
    end: float
    lines: list[str]


def make_words(text: str, start: float = 0.0, rate: float = 15.0, rest: float = 0.0) -> list[Word]:
    """Return words at `rate` characters per second, with `rest` seconds after each sentence."""
    words = []
    for word in text.split():
        end = start + len(word) / rate
        words.append(Word(word, start, end))
        start = end + 1 / rate + (rest if word[-1] in ".?!" else 0.0)
    return words


def read_srt(document: str) -> list[Shown]:
    """Parse with `srt`, whose result must equal that of `pysubs2`."""
    found = [
        Shown(cue.start.total_seconds(), cue.end.total_seconds(), cue.content.split("\n"))
        for cue in srt.parse(document, ignore_errors=False)
    ]
    if document:
        other = pysubs2.SSAFile.from_string(document, format_="srt", keep_unknown_html_tags=True)
        assert [(line.start, line.end) for line in other] == [
            (round(1000 * cue.start), round(1000 * cue.end)) for cue in found
        ]
    return found


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


# -- subtitles ---------------------------------------------------------------------------------------------------------

# Realistic speech: short words with silences between them.
TEXTS = st.one_of(
    st.text("abcdefghijklmnopqrstuvwxyzäß'", min_size=1, max_size=12),
    st.sampled_from(
        ["Yes.", "no,", "why?", "a", "1999", "&", "<i>", "x>y", "-->", "é…", "東京", "w" * 41, "w" * 42, "w" * 60]
    ),
)


@st.composite
def speech(draw: st.DrawFn) -> list[Word]:
    """Words, some of which overlap slightly, have no duration, or occur at the same time."""
    words, at = [], draw(st.floats(0, 5))
    for text in draw(st.lists(TEXTS, max_size=40)):
        takes = draw(st.sampled_from([0.0, 0.08, 0.16, 0.4, 0.9, 9.0]))
        words.append(Word(text, at, at + takes))
        at += takes + draw(st.sampled_from([-0.08, 0.0, 0.04, 0.3, 1.2, 30.0])) if takes else draw(st.just(0.0))
    return words


def check(words: Sequence[Word], shown: Sequence[Shown], duration: float | None) -> None:
    """Check all properties that `cues` documents."""
    texts = [word.text.replace("-->", "→") for word in words]
    at = 0
    for index, cue in enumerate(shown):
        inside = " ".join(cue.lines).split()
        first, last = words[at], words[at + len(inside) - 1]
        assert inside == texts[at : at + len(inside)]  # in order, none missing, none duplicated
        at += len(inside)
        after = shown[index + 1] if index + 1 < len(shown) else None
        assert 0 <= cue.start < cue.end
        assert cue.start >= first.start - MS
        assert len(cue.lines) <= 2
        assert all(width(line) <= WIDTH or " " not in line for line in cue.lines)
        assert cue.end - cue.start <= MAX_DURATION + MS
        if after is not None:
            assert after.start - cue.end >= GAP - MS
        # A subtitle is shown too briefly only if there is no more time.
        needed = max(MIN_DURATION, width(" ".join(cue.lines)) / SPEED)
        if cue.end - cue.start < min(needed, MAX_DURATION) - MS:
            if after is not None:
                assert after.start - cue.end <= GAP + MS
            else:
                assert duration is not None and cue.end >= max(duration, last.end) - MS
    assert at == len(words)


@given(speech(), st.one_of(st.none(), st.floats(0, 2)))
@example(make_words("hm " * 60, rate=200.0), None)  # faster than readable
@example([Word(f"all{i}", 1.0, 1.0) for i in range(50)], 0.0)  # all at the same time
def test_subtitles_of_arbitrary_words(words: list[Word], more: float | None) -> None:
    words = [word for word in words if word.text.strip()]
    duration = None if more is None else (words[-1].end if words else 0.0) + more
    read = read_srt(formats.srt(words, duration))
    check(words, read, duration)
    vtt_times = [(_seconds(cue.start), _seconds(cue.end)) for cue in webvtt.from_string(formats.vtt(words, duration))]
    assert [round(1000 * time) for cue in vtt_times for time in cue] == [
        round(1000 * time) for cue in read for time in (cue.start, cue.end)
    ]


def test_pause_starts_a_new_subtitle() -> None:
    words = [*make_words("one two"), *make_words("three four", start=10.0)]
    first, second = read_srt(formats.srt(words))
    assert (first.lines, second.lines) == (["one two"], ["three four"])
    assert (first.start, second.start) == (0.0, 10.0)
    # It is spoken in less time than it takes to read, and is shown for the latter.
    assert first.end == pytest.approx(MIN_DURATION, abs=MS)


def test_sentences_end_subtitles() -> None:
    """Two sentences of 50 and 60 characters: a break after 84 characters would be within the second."""
    one = "There was nobody in the house when we came to it."
    two = "So we sat down on the stairs, and waited for the people to come."
    shown = read_srt(formats.srt(make_words(f"{one} {two}", rest=0.3)))
    assert [" ".join(cue.lines) for cue in shown] == [one, two]
    assert shown[1].lines == ["So we sat down on the stairs,", "and waited for the people to come."]


def test_break_at_a_short_pause_is_preferred() -> None:
    words = make_words("the quick brown fox jumps over the lazy dog and then it runs")
    held = make_words("into the dark and wide and lonely forest of the north", start=words[-1].end + 0.5)
    shown = read_srt(formats.srt([*words, *held]))
    assert [" ".join(cue.lines).split()[0] for cue in shown] == ["the", "into"]


def test_last_subtitle_is_shown_long_enough_within_the_recording() -> None:
    words = make_words("Good night.", start=4.0, rate=50.0)
    assert [cue.end for cue in read_srt(formats.srt(words))] == [pytest.approx(4 + MIN_DURATION, abs=MS)]
    assert [cue.end for cue in read_srt(formats.srt(words, 60.0))] == [pytest.approx(4 + MIN_DURATION, abs=MS)]
    assert [cue.end for cue in read_srt(formats.srt(words, 4.5))] == [4.5]


@pytest.mark.parametrize("rate", [12.0, 18.0])
def test_readable_speech_satisfies_all_limits(rate: float) -> None:
    """At a readable speed, and with pauses, all limits are satisfied."""
    text = "Well, it is like this: nobody knew what to do next. " * 40
    words = make_words(text, rate=rate, rest=0.4)
    shown = read_srt(formats.srt(words, words[-1].end + 1))
    check(words, shown, None)
    for cue in shown:
        assert cue.end - cue.start >= max(MIN_DURATION, len(" ".join(cue.lines)) / SPEED) - MS
        assert all(len(line) <= WIDTH for line in cue.lines)
    assert {" ".join(cue.lines) for cue in shown} == {"Well, it is like this: nobody knew what to do next."}


def test_word_longer_than_a_line_has_its_own_line() -> None:
    word = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk"
    shown = read_srt(formats.srt(make_words(f"the {word} is closed")))
    assert word in [line for cue in shown for line in cue.lines]
    assert " ".join(line for cue in shown for line in cue.lines) == f"the {word} is closed"


def shown_ms(words: Sequence[Word], duration: float | None = None) -> list[tuple[int, int, str]]:
    """Return the start and end in milliseconds and the text of each subtitle."""
    return [
        (round(1000 * cue.start), round(1000 * cue.end), "/".join(cue.lines)) for cue in formats.cues(words, duration)
    ]


LONG = "w" * 30  # is read in 1.5 s at 20 characters per second


@pytest.mark.parametrize(
    ("words", "duration", "expected"),
    [
        # Long enough to be read, for the minimum duration, and until its words end; at most 7 s.
        ([Word(LONG, 1.0, 1.5)], None, [(1000, 2500, LONG)]),
        ([Word("w" * 31, 1.0, 1.5)], None, [(1000, 2550, "w" * 31)]),
        ([Word("w" * 16, 1.0, 1.5)], None, [(1000, 1833, "w" * 16)]),
        ([Word("w", 1.0, 2.75)], None, [(1000, 2750, "w")]),
        ([Word("w", 1.0, 8.0)], None, [(1000, 8000, "w")]),
        ([Word("w", 1.0, 8.001)], None, [(1000, 8000, "w")]),
        # Not after the recording ends, unless its words do; at least 100 ms.
        ([Word(LONG, 1.0, 1.5)], 2.0, [(1000, 2000, LONG)]),
        ([Word(LONG, 1.0, 1.5)], 1.25, [(1000, 1500, LONG)]),
        ([Word("w", 1.0, 1.0)], 1.0, [(1000, 1100, "w")]),
        # Two frames of film before the next subtitle, which a pause of 1 s begins.
        ([Word(LONG, 0.0, 0.5), Word("x", 1.5, 1.75)], None, [(0, 1417, LONG), (1500, 2333, "x")]),
        ([Word(LONG, 0.0, 0.5), Word("x", 1.499, 1.749)], None, [(0, 1749, f"{LONG} x")]),
        ([Word("v", 0.0, 0.5), Word("x", 9.0, 9.25)], None, [(0, 833, "v"), (9000, 9833, "x")]),
        # Words of more than 7 s are two subtitles.
        ([Word("v", 0.0, 3.5), Word("x", 3.5, 7.0)], None, [(0, 7000, "v x")]),
        ([Word("v", 0.0, 3.5), Word("x", 3.5, 7.001)], None, [(0, 3417, "v"), (3500, 7001, "x")]),
        # Words at the same time do not fit on two lines: the next subtitle begins after the previous one and the gap.
        ([Word("w" * 42, 1.0, 1.0)] * 3, 1.0, [(1000, 1100, "w" * 42), (1183, 1283, f"{'w' * 42}/{'w' * 42}")]),
        # A word whose end is before its start ends there; white space is not a word.
        ([Word("v", 1.0, 0.5), Word("x", 1.999, 2.0)], None, [(1000, 2000, "v x")]),
        ([Word("v", 1.0, 0.5), Word("x", 2.0, 2.0)], None, [(1000, 1833, "v"), (2000, 2833, "x")]),
        ([Word("v", 1.0, 2.0), Word(" ", 2.0, 9.0), Word("x y", 2.0, 2.5)], None, [(1000, 2500, "v x y")]),
    ],
)
def test_times_are_exact_to_the_millisecond(
    words: list[Word], duration: float | None, expected: list[tuple[int, int, str]]
) -> None:
    assert shown_ms(words, duration) == expected


def test_times_are_rounded_to_milliseconds() -> None:
    assert formats.cues([Word("w", 1.0004, 3.0006)]) == [Cue(1.0, 3.001, ("w",))]
    assert formats.cues([Word("w", 1.0006, 3.0004)]) == [Cue(1.001, 3.0, ("w",))]


def lines_of(marks: dict[int, str], pauses: dict[int, float], spaced: Sequence[int] = range(12)) -> tuple[str, ...]:
    """Return the lines of 12 words of 4 characters, which do not fit on one line.

    `marks` are appended to the n-th words, `pauses` are in seconds after the n-th words, `spaced` are the words after
    a space.
    """
    words, at = [], 0.0
    for number in range(12):
        words.append(Word("word" + marks.get(number, ""), at, at + 0.25, after_space=number in spaced))
        at += 0.25 + pauses.get(number, 0.0)
    (cue,) = formats.cues(words)
    return cue.lines


@pytest.mark.parametrize(
    ("marks", "pauses", "first"),
    [
        ({}, {}, 6),  # lines of the same length
        ({4: ","}, {}, 5),  # the end of a clause is better
        ({4: ","}, {6: 0.25}, 5),
        ({3: "."}, {}, 4),  # and the end of a sentence
        ({3: ".", 5: ","}, {}, 4),
        ({3: '."'}, {}, 4),
        ({}, {4: 0.5}, 5),  # and a pause, by its duration
        ({}, {4: 0.5, 6: 0.625}, 7),
        ({6: ","}, {4: 0.5}, 7),
        ({6: ","}, {4: 0.75}, 5),
        ({4: ",", 6: ","}, {4: 0.75}, 5),
        ({5: "."}, {4: 0.9}, 6),
    ],
)
def test_lines_are_broken_at_the_best_place(marks: dict[int, str], pauses: dict[int, float], first: int) -> None:
    upper, lower = lines_of(marks, pauses)
    assert (len(upper.split()), len(lower.split())) == (first, 12 - first)


def test_lines_are_broken_at_a_space_rather_than_within_text_without_spaces() -> None:
    for first in (4, 8):
        upper, lower = lines_of({}, {}, spaced=[first])
        assert (len(upper), len(lower)) == (4 * first, 48 - 4 * first)


def test_line_of_42_columns_is_full() -> None:
    assert shown_ms([Word("w" * 20, 0.0, 1.0), Word("x" * 21, 1.0, 2.0)]) == [(0, 2100, f"{'w' * 20} {'x' * 21}")]
    assert shown_ms([Word("w" * 20, 0.0, 1.0), Word("x" * 22, 1.0, 2.0)]) == [(0, 2150, f"{'w' * 20}/{'x' * 22}")]


def test_documents() -> None:
    """SubRip and WebVTT, character by character."""
    words = [Word("w" * 40, 0.5, 2.0), Word("&<x>", 2.0, 3.5), Word("-->", 3661.0045, 3663.25)]
    assert formats.srt(words) == (
        f"1\n00:00:00,500 --> 00:00:03,500\n{'w' * 40}\n&<x>\n\n2\n01:01:01,004 --> 01:01:03,250\n→\n"
    )
    assert formats.vtt(words) == (
        f"WEBVTT\n\n00:00:00.500 --> 00:00:03.500\n{'w' * 40}\n&amp;&lt;x&gt;\n"
        "\n01:01:01.004 --> 01:01:03.250\n--&gt;\n"
    )


# -- subtitles in all scripts ------------------------------------------------------------------------------------------


def make_unspaced(text: str, rate: float = 6.0) -> list[Word]:
    """Return a word per character, at `rate` characters per second; punctuation belongs to its neighbour."""
    words: list[Word] = []
    for index, part in enumerate(re.findall(r"\s?[「（“]*(?:[A-Za-z0-9]+|[^\s])[^\w\s「（“]*", text)):
        words.append(Word(part.strip(), index / rate, (index + 1) / rate, after_space=part[0].isspace()))
    assert "".join(" " * word.after_space + word.text for word in words) == text
    return words


def width(line: str) -> int:
    """Return the columns of a terminal, by an independent implementation."""
    return wcwidth.wcswidth(line)


CHINESE = "我用iPhone打电话给她（我的姐姐），问她“今天下午有没有时间”，她说没有时间，因为明天要去北京出差。" * 3
JAPANESE = "「これは本です」と先生が言って、みんなはその本を開いて読みました。明日はテストがあるそうです。" * 3


@pytest.mark.parametrize("text", [CHINESE, JAPANESE])
def test_wide_characters(text: str) -> None:
    """Lines have at most 42 columns; no line begins with closing or ends with opening punctuation."""
    words = make_unspaced(text)
    shown = read_srt(formats.srt(words, words[-1].end))
    lines = [line for cue in shown for line in cue.lines]
    assert "".join(lines) == text
    assert all(20 < width(line) <= WIDTH for line in lines[:-1]) and width(lines[-1]) <= WIDTH
    assert not any(line[0] in "，。、」）”" or line[-1] in "「（“" for line in lines)
    assert sum(line[-1] in "，。、」”" for line in lines) > len(lines) / 2  # breaks at the end of clauses
    for cue, after in pairwise(shown):
        assert cue.end - cue.start >= min(sum(map(width, cue.lines)) / SPEED, after.start - GAP - cue.start) - MS


def test_combining_marks_have_no_width() -> None:
    thai = "น้ำแข็งกี่ก้อนก็ได้ที่นี่ดีที่สุด"
    assert width(thai) < len(thai) and columns(thai) == width(thai)
    words = [Word(thai, 0.0, 2.0), Word("ที่นี่ที่นี่ที่นี่", 2.0, 4.0)]
    assert sum(len(word.text) for word in words) > WIDTH
    assert formats.cues(words)[0].lines == (f"{thai} {words[1].text}",)


@pytest.mark.parametrize(
    "text", ["東京", "a", "é", "ไทย", "한국어", "ｱｲ", "（", "العربية", "😀", "e\u0301", "می\u200cخواهم", "नमस्ते"]
)
def test_columns(text: str) -> None:
    assert columns(text) == width(text)


@pytest.mark.parametrize(
    "text",
    [
        "قال الرجل: «مرحبا بكم في بيتي»، ثم جلس على الكرسي 25 دقيقة وشرب كوبا من الشاي؛ هل تريد أن تأكل شيئا؟",
        'הוא אמר "שלום" (בשקט), ואז הלך הביתה ב-10:30; מה קרה אחר כך?',
        "او گفت: «نمی\u200cدانم کجا هستم»، اما iPhone را دید و رفت.",
    ],
)
def test_right_to_left_text_is_in_logical_order(text: str) -> None:
    """Players order the text; lines have no marks of direction and nothing else than the text."""
    words = make_words(text)
    transcript = Transcript("talk.wav", text, words, 20.0)
    for lines in (
        [line for cue in read_srt(render(transcript, "srt")) for line in cue.lines],
        [line for cue in webvtt.from_string(render(transcript, "vtt")) for line in cue.lines],
    ):
        assert " ".join(lines) == text
    assert render(transcript, "text") == text + "\n"
    assert json.loads(render(transcript, "json"))["text"] == text
    assert [line.split()[4] for line in render(transcript, "ctm").splitlines()] == text.split()


def test_marks_that_stand_alone_stay_beside_their_words() -> None:
    """French puts spaces inside quotation marks."""
    text = "Elle a demandé à tout le monde de venir « ici » ! Alors nous sommes venus « ici » avec nos « amis » ."
    words = make_words(text)
    lines = [line for cue in read_srt(formats.srt(words)) for line in cue.lines]
    assert " ".join(lines) == text
    assert not any(line[0] in "»!." or line[-1] == "«" for line in lines) and len(lines) > 2


def test_words_of_other_recognisers_are_separated_by_spaces() -> None:
    @dataclass(frozen=True)
    class Plain:
        text: str
        start: float
        end: float
        confidence: float

    (cue,) = formats.cues([Plain("one", 0.0, 0.4, 1.0), Plain("two", 0.4, 0.8, 1.0)])
    assert cue.lines == ("one two",)


def test_markup_is_escaped() -> None:
    words = make_words("a < b & c --> <i>d</i>")
    (cue,) = webvtt.from_string(formats.vtt(words))
    assert "--> <i>" not in cue.raw_text
    assert cue.raw_text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == "a < b & c --> <i>d</i>"
    (shown,) = read_srt(formats.srt(words))
    assert shown.lines == ["a < b & c → <i>d</i>"]


def test_hours() -> None:
    (cue,) = read_srt(formats.srt([Word("late", 99 * 3600 + 1.5, 99 * 3600 + 2.5)]))
    assert (cue.start, cue.end) == (356401.5, 356402.5)
    (vtt_cue,) = webvtt.from_string(formats.vtt([Word("late", 3 * 3600 + 62.007, 3 * 3600 + 63)]))
    assert (vtt_cue.start, vtt_cue.end) == ("03:01:02.007", "03:01:03.000")


def test_empty_transcript() -> None:
    nothing = Transcript("a.wav", "", (), 3.0)
    assert [render(nothing, format) for format in ("text", "srt", "ctm")] == ["\n", "", ""]
    assert list(webvtt.from_string(render(nothing, "vtt"))) == []
    assert json.loads(render(nothing, "json"))["words"] == json.loads(render(nothing, "manifest"))["words"] == []


# -- machine-readable --------------------------------------------------------------------------------------------------


def render(transcript: Transcript, format: str) -> str:
    return formats.render(transcript, Format(format))


@pytest.fixture(scope="module")
def transcript() -> Transcript:
    words = make_words("It's the second, and last, of 3 tests.", start=0.4)
    return Transcript("talks/my talk.flac", " ".join(word.text for word in words), words, 9.5, chunk_ms=560)


def test_json(transcript: Transcript) -> None:
    row = json.loads(render(transcript, "json"))
    assert {key: row[key] for key in ("file", "duration", "text", "chunk_ms")} == {
        "file": "talks/my talk.flac",
        "duration": 9.5,
        "text": transcript.text,
        "chunk_ms": 560,
    }
    assert [(w["text"], w["start"], w["end"], w["confidence"]) for w in row["words"]] == [
        (w.text, pytest.approx(w.start, abs=5e-4), pytest.approx(w.end, abs=5e-4), 0.9) for w in transcript.words
    ]
    assert "spoken" not in row


FULL = Transcript(
    file="talks/é.wav",
    text="$2 é.",
    words=[Word("$2", 0.1234, 0.5678, 0.87654, language="en-US"), Word("é.", 1.0006, 2.0, 0.5)],
    duration=9.87654,
    tokens=[Token(7, " two", 0.1234, 0.2034, -0.123456, 0.87654), Token(9, " é.", 1.0006, 2.0, -2.0, 0.5, "en-US")],
    chunk_ms=560,
    utterances=[Utterance("$2", 0.1234, 0.5678, "en-US"), Utterance("é.", 1.0006, 2.0)],
    spoken="two é.",
    channel=2,
    language="en",
)


def test_every_field_of_json() -> None:
    document = render(FULL, "json")
    assert document.endswith("\n") and document.count("\n") == 1 and "é" in document
    assert json.loads(document) == {
        "file": "talks/é.wav",
        "duration": 9.877,
        "text": "$2 é.",
        "words": [
            {"text": "$2", "start": 0.123, "end": 0.568, "confidence": 0.8765, "language": "en-US"},
            {"text": "é.", "start": 1.001, "end": 2.0, "confidence": 0.5},
        ],
        "tokens": [
            {"id": 7, "text": " two", "time": 0.123, "score": -0.1235, "confidence": 0.8765},
            {"id": 9, "text": " é.", "time": 1.001, "score": -2.0, "confidence": 0.5},
        ],
        "chunk_ms": 560,
        "language": "en",
        "utterances": [
            {"text": "$2", "start": 0.123, "end": 0.568, "language": "en-US"},
            {"text": "é.", "start": 1.001, "end": 2.0},
        ],
        "spoken": "two é.",
        "channel": 2,
    }
    escaped = formats.render(FULL, Format.json, ascii=True)
    assert escaped.isascii() and json.loads(escaped) == json.loads(document)
    plain = Transcript(FULL.file, "", [], 0.0)
    assert list(json.loads(render(plain, "json"))) == ["file", "duration", "text", "words", "tokens", "chunk_ms"]


def test_every_field_of_the_manifest() -> None:
    """Offsets are in encoder frames of 80 ms."""
    document = render(FULL, "manifest")
    assert document.endswith("\n") and document.isascii()
    assert json.loads(document) == {
        "audio_filepath": "talks/é.wav",
        "duration": 9.877,
        "pred_text": "$2 é.",
        "word": [
            {"word": "$2", "start_offset": 2, "end_offset": 7, "start": 0.123, "end": 0.568},
            {"word": "é.", "start_offset": 13, "end_offset": 25, "start": 1.001, "end": 2.0},
        ],
        "words": ["$2", "é."],
        "word_confidence": [0.8765, 0.5],
    }


def test_every_field_of_ctm_and_text() -> None:
    assert render(FULL, "ctm") == "é 2 0.123 0.444 $2 0.8765\né 2 1.001 0.999 é. 0.5000\n"
    assert render(Transcript("a.wav", "", [Word("of  all", 0.0, 1.0)], 1.0), "ctm") == (
        "a 1 0.000 1.000 of_all 0.9000\n"
    )
    assert render(FULL, "text") == "$2\né.\n"  # a line for each utterance
    assert render(Transcript("a.wav", "$2 é.", [], 1.0, utterances=()), "text") == ""
    assert render(Transcript("a.wav", "$2 é.", [], 1.0), "text") == "$2 é.\n"


def test_subtitles_end_with_the_recording() -> None:
    nothing_more = Transcript("a.wav", "w", [Word("w", 1.0, 1.25)], 1.5)
    assert "00:00:01,000 --> 00:00:01,500" in render(nothing_more, "srt")
    assert "00:00:01.000 --> 00:00:01.500" in render(nothing_more, "vtt")


def test_suffixes_of_files() -> None:
    assert {format.value: format.suffix for format in Format} == {
        "text": ".txt",
        "json": ".json",
        "srt": ".srt",
        "vtt": ".vtt",
        "ctm": ".ctm",
        "manifest": ".json",
    }
    assert [format.value for format in Format if format.one_per_file] == ["srt", "vtt"]


@pytest.fixture
def ctm(transcript: Transcript, tmp_path: Path) -> Path:
    path = tmp_path / "my_talk.ctm"
    path.write_text(render(transcript, "ctm"))
    return path


@pytest.mark.nemo
def test_nemo_reads_ctm(transcript: Transcript, ctm: Path) -> None:
    from nemo.collections.asr.parts.utils.diarization_utils import convert_ctm_to_text
    from nemo.collections.asr.parts.utils.manifest_utils import get_ctm_line

    assert convert_ctm_to_text(str(ctm)) == ([transcript.text], transcript.text)
    for line, word in zip(ctm.read_text().splitlines(), transcript.words, strict=True):
        theirs = get_ctm_line(
            "my_talk",
            None,
            word.start,
            word.end - word.start,
            word.text,
            word.confidence,
            "lex",
            None,
            output_precision=3,
        ).split()[:6]
        ours = line.split()
        assert (ours[0], ours[1], ours[4]) == (theirs[0], theirs[1], theirs[4])
        assert [float(ours[i]) for i in (2, 3, 5)] == pytest.approx([float(theirs[i]) for i in (2, 3, 5)], abs=1e-3)


@pytest.mark.nemo
def test_lhotse_reads_ctm(transcript: Transcript, ctm: Path) -> None:
    from lhotse.supervision import SupervisionSegment, SupervisionSet

    segment = SupervisionSegment("a", "my_talk", 0.0, transcript.duration, channel=1)
    (aligned,) = SupervisionSet.from_segments([segment]).with_alignment_from_ctm(ctm, match_channel=True)
    assert [(item.symbol, item.start, item.duration, item.score) for item in aligned.alignment["word"]] == [
        (w.text, pytest.approx(w.start, abs=1e-3), pytest.approx(w.end - w.start, abs=1e-3), 0.9)
        for w in transcript.words
    ]


def test_sclite_scores_ctm(transcript: Transcript, ctm: Path) -> None:
    """NIST's program, if it is installed (Debian: sctk). The reference has one word that was not spoken."""
    tools = os.pathsep.join([os.environ.get("PATH", ""), "/usr/lib/sctk/bin"])
    sclite = shutil.which("sclite", path=tools)
    if sclite is None:
        pytest.skip("needs sclite (Debian: sctk)")
    reference = ctm.with_suffix(".stm")
    reference.write_text(f"my_talk 1 someone 0.0 {transcript.duration} {transcript.text.replace('last', 'final')}\n")
    done = subprocess.run(
        [sclite, "-h", ctm, "ctm", "-r", reference, "stm", "-o", "sum", "stdout"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line for line in done.stdout.splitlines() if "Sum/Avg" in line)
    counts = total.replace("|", " ").split()[1:]
    assert counts[:2] == ["1", str(len(transcript.words))]
    assert [float(share) for share in counts[2:7]] == pytest.approx([87.5, 12.5, 0.0, 0.0, 12.5], abs=0.1)


def test_file_names_are_a_single_field() -> None:
    word = [Word("x", 0.0, 0.08)]
    assert formats.ctm(word, "/a b/c d.e.wav") == "c_d.e 1 0.000 0.080 x 0.9000\n"
    assert formats.ctm(word, ";;notes.wav").startswith("_notes 1 ")


@pytest.mark.nemo
def test_nemo_reads_the_manifest(transcript: Transcript, tmp_path: Path) -> None:
    """NeMo's readers and metrics accept the manifest."""
    from nemo.collections.asr.parts.utils.manifest_utils import read_manifest
    from nemo.collections.asr.parts.utils.transcribe_utils import compute_metrics_per_sample
    from nemo.collections.common.parts.preprocessing.manifest import item_iter

    path = tmp_path / "manifest.json"
    path.write_text(render(transcript, "manifest") * 2)
    row, again = read_manifest(path)
    assert row == again
    assert row["audio_filepath"] == "talks/my talk.flac"
    assert (row["duration"], row["pred_text"]) == (9.5, transcript.text)
    first, *_ = item_iter(str(path))
    assert (first["audio_file"], first["duration"]) == (row["audio_filepath"], 9.5)  # the file does not exist
    path.write_text(json.dumps(row | {"text": transcript.text}) + "\n")
    (scored,) = compute_metrics_per_sample(str(path))
    assert scored["wer"] == 0


@pytest.mark.nemo
def test_manifest_equals_that_of_nemo(transcript: Transcript, tmp_path: Path) -> None:
    """Compared with the function that `transcribe_speech.py` calls, with timestamps and confidence."""
    from nemo.collections.asr.parts.utils.rnnt_utils import Hypothesis
    from nemo.collections.asr.parts.utils.timestamp_utils import process_timestamp_outputs
    from nemo.collections.asr.parts.utils.transcribe_utils import write_transcription
    from omegaconf import OmegaConf

    frames = [(round(word.start / 0.08), round(word.end / 0.08)) for word in transcript.words]
    words = [Word(word.text, 0.08 * a, 0.08 * b) for word, (a, b) in zip(transcript.words, frames, strict=True)]
    hypothesis = Hypothesis(1.0, [], text=transcript.text, word_confidence=[0.9] * len(words))
    hypothesis.timestamp = {
        "word": [
            {"word": word.text, "start_offset": a, "end_offset": b} for word, (a, b) in zip(words, frames, strict=True)
        ]
    }
    out = tmp_path / "nemo.json"
    settings = OmegaConf.create(
        {
            "append_pred": False,
            "output_filename": str(out),
            "audio_dir": "talks",
            "decoding": {"beam": {"return_best_hypothesis": True}},
        }
    )
    write_transcription(
        process_timestamp_outputs([hypothesis], 8, 0.01),
        settings,
        "x",
        [transcript.file],
        timestamps=True,
        confidence=True,
    )
    theirs = json.loads(out.read_text())
    ours = json.loads(render(Transcript(transcript.file, transcript.text, words, transcript.duration), "manifest"))
    assert ours.keys() == theirs.keys() | {"duration"}
    for key in theirs.keys() - {"word"}:
        assert ours[key] == theirs[key]
    assert ours["word"] == [
        entry | {k: pytest.approx(entry[k], abs=1e-3) for k in ("start", "end")} for entry in theirs["word"]
    ]
