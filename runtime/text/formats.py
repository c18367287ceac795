"""What was said, as others read it: text, JSON Lines, SubRip, WebVTT, NIST's CTM, NeMo's manifest.

Words in, text out: nothing here knows where words come from or where the text goes. Any object with the attributes of
`Word` is one. Times are seconds of the recording.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

# A subtitle's limits are those of the Netflix Timed Text Style Guide (general requirements; English, adult programmes).
CHARACTERS, LINES = 42, 2  # of a line; of a subtitle
SHORTEST, LONGEST = 5 / 6, 7.0  # seconds on screen
SPEED = 20.0  # characters that are read in a second
GAP = 1 / 12  # seconds of nothing between two subtitles: two frames of film
# A silence that always begins a new subtitle. Longer than SHORTEST + GAP, so that it never makes one too short.
PAUSE = 1.0

_LEAST_MS = 100  # that words spoken all at once, which are none, get on screen
_OFFSET = 0.08  # seconds that one of NeMo's offsets counts: an encoder frame
_SENTENCE, _CLAUSE = re.compile(r"[.?!…]+[\"'”’)\]]*$"), re.compile(r"[,;:–—]+[\"'”’)\]]*$")


class Word(Protocol):
    @property
    def text(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def confidence(self) -> float: ...


class Token(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def time(self) -> float: ...
    @property
    def score(self) -> float: ...
    @property
    def confidence(self) -> float: ...


@dataclass(frozen=True)
class Utterance:
    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Transcript:
    """A recording and what was said in it."""

    file: str
    text: str
    words: Sequence[Word]
    duration: float
    tokens: Sequence[Token] = ()
    chunk_ms: int = 0
    utterances: Sequence[Utterance] | None = None  # if they are to be kept apart
    spoken: str | None = None  # the text as it was spoken, if `text` was normalised
    channel: int | None = None  # of the recording, from 1, if one was chosen


class Format(StrEnum):
    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"
    ctm = "ctm"
    manifest = "manifest"

    @property
    def suffix(self) -> str:
        """How the name of such a file ends."""
        return {"text": ".txt", "manifest": ".json"}.get(self, f".{self}")

    @property
    def one_per_file(self) -> bool:
        """Whether a file of it tells of one recording only."""
        return self in (Format.srt, Format.vtt)


def render(transcript: Transcript, format: Format, *, ascii: bool = False) -> str:
    """The transcript in a format, to its last newline; those of several recordings may follow each other, if it is not
    `one_per_file`. With `ascii`, JSON escapes all other characters."""
    if format is Format.text and transcript.utterances is not None:
        return "".join(utterance.text + "\n" for utterance in transcript.utterances)
    if format is Format.text:
        return transcript.text + "\n"
    if format is Format.json:
        return json.dumps(transcript_to_dict(transcript), ensure_ascii=ascii) + "\n"
    if format is Format.manifest:
        return json.dumps(manifest_entry(transcript)) + "\n"  # ASCII: NeMo reads it in whatever the locale is
    if format is Format.ctm:
        return ctm(transcript.words, transcript.file, str(transcript.channel or 1))
    return (srt if format is Format.srt else vtt)(transcript.words, transcript.duration)


# -- for programs ------------------------------------------------------------------------------------------------------


def transcript_to_dict(transcript: Transcript) -> dict[str, Any]:
    """`file`, `duration`, `text`, `words`, `tokens`, `chunk_ms`; `utterances` if they are kept apart, `spoken` if the
    text was normalised, `channel` if one was chosen."""
    body: dict[str, Any] = {
        "file": transcript.file,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "words": [
            {
                "text": word.text,
                "start": round(word.start, 3),
                "end": round(word.end, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in transcript.words
        ],
        "tokens": [
            {
                "id": token.id,
                "text": token.text,
                "time": round(token.time, 3),
                "score": round(token.score, 4),
                "confidence": round(token.confidence, 4),
            }
            for token in transcript.tokens
        ],
        "chunk_ms": transcript.chunk_ms,
    }
    if transcript.utterances is not None:
        body["utterances"] = [
            {"text": one.text, "start": round(one.start, 3), "end": round(one.end, 3)} for one in transcript.utterances
        ]
    if transcript.spoken is not None:
        body["spoken"] = transcript.spoken
    if transcript.channel is not None:
        body["channel"] = transcript.channel
    return body


def manifest_entry(transcript: Transcript) -> dict[str, Any]:
    """A line of NeMo's manifest, as its `transcribe_speech.py` writes it with `timestamps=true` and confidence
    (nemo/collections/asr/parts/utils/transcribe_utils.py: write_transcription).

    The text is `pred_text`: `text` is what a reference would be.
    """
    words = transcript.words
    return {
        "audio_filepath": transcript.file,
        "duration": round(transcript.duration, 3),
        "pred_text": transcript.text,
        "word": [
            {
                "word": word.text,
                "start_offset": round(word.start / _OFFSET),
                "end_offset": round(word.end / _OFFSET),
                "start": round(word.start, 3),
                "end": round(word.end, 3),
            }
            for word in words
        ],
        "words": [word.text for word in words],
        "word_confidence": [round(word.confidence, 4) for word in words],
    }


def ctm(words: Sequence[Word], file: str, channel: str = "1") -> str:
    """NIST's time marks (sclite): file, channel, start, duration, word and confidence of each word.

    The file goes by its name without folder and ending, as in NeMo.
    """
    # A name is one field, and ;; would make the line a comment.
    name = re.sub(r"\s|^;;", "_", os.path.splitext(os.path.basename(file))[0])
    lines = []
    for word in words:
        text = "_".join(word.text.split())  # one field too
        lines.append(f"{name} {channel} {word.start:.3f} {word.end - word.start:.3f} {text} {word.confidence:.4f}\n")
    return "".join(lines)


# -- subtitles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cue:
    """One subtitle: whole milliseconds, in seconds."""

    start: float
    end: float
    lines: tuple[str, ...]


def srt(words: Sequence[Word], duration: float | None = None) -> str:
    """SubRip."""
    return "\n".join(
        f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{_lines(cue).replace('-->', '→')}\n"
        for number, cue in enumerate(cues(words, duration), 1)
    )


def vtt(words: Sequence[Word], duration: float | None = None) -> str:
    """WebVTT (W3C)."""
    shown = (
        f"\n{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n"
        f"{_lines(cue).replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}\n"
        for cue in cues(words, duration)
    )
    return "WEBVTT\n" + "".join(shown)


def cues(words: Sequence[Word], duration: float | None = None) -> list[Cue]:
    """Subtitles for words in the order of their starts, in a recording of `duration` seconds.

    No subtitle overlaps the next, begins before its words, has more than `LINES` lines, stays longer than `LONGEST`, or
    loses a word. A line is longer than `CHARACTERS` only if it is a single word. One stays for `SHORTEST` and for what
    reading takes wherever the next one's words and the recording's end leave that much time. Breaks are where a
    sentence or a clause ends or the voice rests; among all ways to break, the least bad one is found (as Knuth and
    Plass break paragraphs, 1981).
    """
    timed = _Timed(words, duration)
    least, came_from = [0.0], [0]  # of the best way to show the first n words; where its last subtitle begins
    for end in range(1, timed.count + 1):
        ways = [(least[begin] + timed.badness(begin, end), begin) for begin in timed.begins(end)]
        cost, begin = min(ways)
        least.append(cost)
        came_from.append(begin)
    bounds, end = [], timed.count
    while end:
        bounds.append((came_from[end], end))
        end = came_from[end]
    return timed.shown(bounds[::-1])


class _Timed:
    """Words, in whole milliseconds and in order."""

    def __init__(self, words: Sequence[Word], duration: float | None) -> None:
        kept = [(" ".join(word.text.split()), word) for word in words if word.text.split()]
        self.texts = [text for text, _ in kept]
        self.count = len(kept)
        self.starts: list[int] = []
        self.ends: list[int] = []
        for _, word in kept:
            self.starts.append(max(_ms(word.start), self.starts[-1] if self.starts else 0))
            self.ends.append(max(_ms(word.end), self.starts[-1]))
        # Players stop where the recording does.
        self.last = math.inf if duration is None else max([_ms(duration), *self.ends[-1:]])
        self.at = [0]  # characters before each word, each with a space behind it
        for text in self.texts:
            self.at.append(self.at[-1] + len(text) + 1)

    def begins(self, end: int) -> list[int]:
        """Where a subtitle whose last word is the one before `end` may begin. Never empty: a word can stand alone."""
        found, begin = [end - 1], end - 2
        while (
            begin >= 0
            and self._pause(begin + 1) < _ms(PAUSE)
            and self.ends[end - 1] - self.starts[begin] <= _ms(LONGEST)
            and self._splits(begin, end)
        ):
            found.append(begin)
            begin -= 1
        return found

    def badness(self, begin: int, end: int) -> float:
        """What is wrong with a subtitle of the words from `begin` to before `end`: too little time, a bad break."""
        until = self.starts[end] - _ms(GAP) if end < self.count else self.last
        room = max(0.0, min(_ms(LONGEST), until - self.starts[begin]))
        haste = max(0.0, 1 - room / self._need(begin, end))
        return 0.5 + 8 * haste + (self._tear(end) if end < self.count else 0.0)

    def shown(self, bounds: Sequence[tuple[int, int]]) -> list[Cue]:
        """The subtitles of words from and to these bounds."""
        found: list[Cue] = []
        free = 0  # when the next one can begin
        gap = _ms(GAP)
        for begin, end in bounds:
            start = max(self.starts[begin], free)
            until = max(self.starts[end] - gap if end < self.count else self.last, start + _LEAST_MS)
            wanted = max(self.ends[end - 1], start + self._need(begin, end))
            stop = int(min(wanted, until, start + _ms(LONGEST)))
            free = stop + gap
            found.append(Cue(start / 1000, stop / 1000, self._broken(begin, end)))
        return found

    def _need(self, begin: int, end: int) -> int:
        """Milliseconds that these words should stay."""
        return max(_ms(SHORTEST), math.ceil(1000 * self._length(begin, end) / SPEED))

    def _length(self, begin: int, end: int) -> int:
        return self.at[end] - self.at[begin] - 1

    def _pause(self, word: int) -> int:
        return self.starts[word] - self.ends[word - 1]

    def _tear(self, word: int) -> float:
        """How bad it is to break before a word: 0 after a sentence, 2 within a phrase."""
        before = self.texts[word - 1]
        if _SENTENCE.search(before):
            return 0.0
        voice = 2.0 * max(0.0, 1 - max(0, self._pause(word)) / _ms(PAUSE))
        return min(voice, 0.75) if _CLAUSE.search(before) else voice

    def _fits(self, begin: int, end: int) -> bool:
        return self._length(begin, end) <= CHARACTERS or end - begin == 1

    def _splits(self, begin: int, end: int) -> list[int]:
        """Words that the second line can begin with; `end` if one line does. Empty if two do not do either."""
        if self._fits(begin, end):
            return [end]
        return [at for at in range(begin + 1, end) if self._fits(begin, at) and self._fits(at, end)]

    def _broken(self, begin: int, end: int) -> tuple[str, ...]:
        """In lines: of like length, broken where the sense allows it."""

        def worth(at: int) -> float:
            uneven = abs(self._length(begin, at) - self._length(at, end)) / CHARACTERS if at < end else 0.0
            return uneven + (self._tear(at) if at < end else 0.0)

        at = min(self._splits(begin, end), key=worth)
        lines = (self.texts[begin:at], self.texts[at:end])
        return tuple(" ".join(line) for line in lines if line)


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _clock(seconds: float, point: str) -> str:
    ms = _ms(seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


def _lines(cue: Cue) -> str:
    return "\n".join(cue.lines)
