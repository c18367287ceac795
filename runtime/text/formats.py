"""Output formats of transcripts: text, JSON Lines, SubRip, WebVTT, NIST's CTM, NeMo's manifest.

This module depends neither on where words come from nor on where the text is written. Times are seconds from the start
of the recording.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from nemostream.runtime.text.scripts import can_break, columns

if TYPE_CHECKING:
    from nemostream.runtime.text.events import Event
    from nemostream.runtime.text.words import Token, Word

# Limits of subtitles by the Netflix Timed Text Style Guide (general requirements; English, adult programmes). Lengths
# are columns: a wide character of East Asia counts as two, a combining mark as none.
MAX_LINE_LENGTH, MAX_LINES = 42, 2  # columns per line; lines per subtitle
MIN_DURATION, MAX_DURATION = 5 / 6, 7.0  # seconds on screen
READING_SPEED = 20.0  # columns per second
MIN_GAP = 1 / 12  # seconds between two subtitles: two frames of film
PAUSE = 1.0  # seconds of silence that always start a new subtitle; must be longer than MIN_DURATION + MIN_GAP

_MIN_SHOWN_MS = 100  # on screen, even for words without any duration
_OFFSET_SECONDS = 0.08  # unit of NeMo's offsets: an encoder frame
_QUOTES = r"[\"'”’“»«)\]」』）】》]*$"
_SENTENCE_END = re.compile(rf"[.?!…。．！？｡؟۔।॥։።፧။។\u037e]+{_QUOTES}")
_CLAUSE_END = re.compile(rf"[,;:–—、，；：､،؛·\u0387፣፤፥፦၊៖]+{_QUOTES}")


@dataclass(frozen=True)
class Utterance:
    """An utterance of a transcript. Times are seconds."""

    text: str
    start: float
    end: float
    language: str | None = None  # if the model detected it


@dataclass(frozen=True)
class Transcript:
    """The transcript of a recording."""

    file: str  # path of the recording
    text: str
    words: Sequence[Word]
    duration: float  # seconds
    tokens: Sequence[Token] = ()
    chunk_ms: int = 0  # milliseconds
    utterances: Sequence[Utterance] | None = None  # None: not separated
    spoken: str | None = None  # the text before inverse text normalization; None: not normalized
    channel: int | None = None  # the selected channel of the recording, from 1; None: all
    language: str | None = None  # None: unknown


class Format(StrEnum):
    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"
    ctm = "ctm"
    manifest = "manifest"

    @property
    def suffix(self) -> str:
        """The file name suffix."""
        return {"text": ".txt", "manifest": ".json"}.get(self, f".{self}")

    @property
    def one_per_file(self) -> bool:
        """Whether a file can contain one recording only."""
        return self in (Format.srt, Format.vtt)


def render(transcript: Transcript, format: Format, *, ascii: bool = False) -> str:
    """Return the transcript in a format, including the final newline.

    Transcripts of several recordings may be concatenated unless the format is `one_per_file`. With `ascii`, non-ASCII
    characters are escaped in JSON.
    """
    if format is Format.text and transcript.utterances is not None:
        return "".join(utterance.text + "\n" for utterance in transcript.utterances)
    if format is Format.text:
        return transcript.text + "\n"
    if format is Format.json:
        return json.dumps(transcript_to_dict(transcript), ensure_ascii=ascii) + "\n"
    if format is Format.manifest:
        return json.dumps(manifest_entry(transcript)) + "\n"  # ASCII: NeMo reads it in the encoding of the locale
    if format is Format.ctm:
        return ctm(transcript.words, transcript.file, str(transcript.channel or 1))
    return (srt if format is Format.srt else vtt)(transcript.words, transcript.duration)


# -- machine-readable --------------------------------------------------------------------------------------------------


def time_span(item: Word | Utterance | Event) -> dict[str, float]:
    """Return the JSON fields `start` and `end` of an item: seconds, rounded to milliseconds."""
    return {"start": round(item.start, 3), "end": round(item.end, 3)}


def word_to_dict(word: Word) -> dict[str, Any]:
    """Return a word as in JSON output and the WebSocket protocol.

    The keys are `text`, `start`, `end` and `confidence`; also `language` if the model detected it.
    """
    body = {"text": word.text, **time_span(word), "confidence": round(word.confidence, 4)}
    return body if word.language is None else {**body, "language": word.language}


def transcript_to_dict(transcript: Transcript) -> dict[str, Any]:
    """Return a transcript as in JSON output.

    The keys are `file`, `duration`, `text`, `words`, `tokens` and `chunk_ms`; also `language` if it is known,
    `utterances` if they are separated, `spoken` if the text was normalized, and `channel` if one was selected.
    """
    body: dict[str, Any] = {
        "file": transcript.file,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "words": [word_to_dict(word) for word in transcript.words],
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
    if transcript.language is not None:
        body["language"] = transcript.language
    if transcript.utterances is not None:
        body["utterances"] = [
            {"text": one.text, **time_span(one)} | ({"language": one.language} if one.language else {})
            for one in transcript.utterances
        ]
    if transcript.spoken is not None:
        body["spoken"] = transcript.spoken
    if transcript.channel is not None:
        body["channel"] = transcript.channel
    return body


def manifest_entry(transcript: Transcript) -> dict[str, Any]:
    """Return a line of NeMo's manifest, as `transcribe_speech.py` writes it with `timestamps=true` and confidence.

    Source: nemo/collections/asr/parts/utils/transcribe_utils.py, write_transcription. The text is `pred_text`; in a
    manifest, `text` is the reference.
    """
    words = transcript.words
    return {
        "audio_filepath": transcript.file,
        "duration": round(transcript.duration, 3),
        "pred_text": transcript.text,
        "word": [
            {
                "word": word.text,
                "start_offset": round(word.start / _OFFSET_SECONDS),
                "end_offset": round(word.end / _OFFSET_SECONDS),
                **time_span(word),
            }
            for word in words
        ],
        "words": [word.text for word in words],
        "word_confidence": [round(word.confidence, 4) for word in words],
    }


def ctm(words: Sequence[Word], file: str, channel: str = "1") -> str:
    """Return NIST's CTM (sclite): file, channel, start, duration, word and confidence, one word per line.

    The file is named without folder and suffix, as in NeMo.
    """
    # The name must be a single field, and a line that starts with ;; is a comment.
    name = re.sub(r"\s|^;;", "_", os.path.splitext(os.path.basename(file))[0])
    lines = []
    for word in words:
        text = "_".join(word.text.split())  # must be a single field too
        lines.append(f"{name} {channel} {word.start:.3f} {word.end - word.start:.3f} {text} {word.confidence:.4f}\n")
    return "".join(lines)


# -- subtitles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cue:
    """One subtitle. Times are seconds, in whole milliseconds."""

    start: float
    end: float
    lines: tuple[str, ...]


def srt(words: Sequence[Word], duration: float | None = None) -> str:
    """Return SubRip subtitles."""
    return "\n".join(
        f"{number}\n{_timestamp(cue.start, ',')} --> {_timestamp(cue.end, ',')}\n"
        f"{_join_lines(cue).replace('-->', '→')}\n"
        for number, cue in enumerate(cues(words, duration), 1)
    )


def vtt(words: Sequence[Word], duration: float | None = None) -> str:
    """Return WebVTT subtitles (W3C)."""
    blocks = (
        f"\n{_timestamp(cue.start, '.')} --> {_timestamp(cue.end, '.')}\n"
        f"{_join_lines(cue).replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}\n"
        for cue in cues(words, duration)
    )
    return "WEBVTT\n" + "".join(blocks)


def cues(words: Sequence[Word], duration: float | None = None) -> list[Cue]:
    """Return subtitles for words, which are ordered by `start`, in a recording of `duration` seconds.

    Subtitles contain every word, do not overlap, do not begin before their words, have at most `MAX_LINES` lines and
    are shown for at most `MAX_DURATION`. Only a single word may exceed `MAX_LINE_LENGTH`. A subtitle is shown for at
    least `MIN_DURATION` and the time to read it if the next words and the end of the recording leave that much time.
    No line begins with closing or ends with opening punctuation. Breaks are preferred at the end of a sentence or
    clause, at pauses and at spaces. Dynamic programming minimizes the total cost (as Knuth and Plass break paragraphs,
    1981). The text is in logical order in every script.
    """
    layout = _Layout(words, duration)
    costs, best_begin = [0.0], [0]  # of the best layout of the first n words; where its last subtitle begins
    for end in range(1, layout.count + 1):
        cost, begin = min((costs[begin] + layout.cost(begin, end), begin) for begin in layout.possible_begins(end))
        costs.append(cost)
        best_begin.append(begin)
    bounds, end = [], layout.count
    while end:
        bounds.append((best_begin[end], end))
        end = best_begin[end]
    return layout.make_cues(bounds[::-1])


class _Layout:
    """Words in order, with times in whole milliseconds. `begin` and `end` are the word range [begin, end).

    Words that must be on the same line are one word here.
    """

    def __init__(self, words: Sequence[Word], duration: float | None) -> None:
        self.texts: list[str] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.spaces: list[str] = []  # before each word
        for word in words:
            if not (text := " ".join(word.text.split())):
                continue
            # Words of other recognisers may lack the field.
            space = " " if getattr(word, "after_space", True) else ""
            start = max(_ms(word.start), self.starts[-1] if self.starts else 0)
            end = max(_ms(word.end), start)
            if (
                self.texts
                and start - self.ends[-1] < _ms(PAUSE)
                and not can_break(self.texts[-1], text, bool(space))
                and columns(joined := self.texts[-1] + space + text) <= MAX_LINE_LENGTH
            ):
                self.texts[-1], self.ends[-1] = joined, max(end, self.ends[-1])
                continue
            self.texts.append(text)
            self.starts.append(start)
            self.ends.append(end)
            self.spaces.append(space)
        self.count = len(self.texts)
        # Players stop at the end of the recording.
        self.recording_end = math.inf if duration is None else max([_ms(duration), *self.ends[-1:]])
        # Columns at which each word begins and ends if all of them are on one line.
        self.left: list[int] = []
        self.right: list[int] = []
        for text, space in zip(self.texts, self.spaces, strict=True):
            self.left.append((self.right[-1] if self.right else 0) + len(space))
            self.right.append(self.left[-1] + columns(text))
        self._break_costs = [0.0, *(self._break_cost(word) for word in range(1, self.count)), 0.0]

    def possible_begins(self, end: int) -> list[int]:
        """Return where a subtitle that ends before the word `end` may begin; a single word is always allowed."""
        begins, begin = [end - 1], end - 2
        second = end - 1  # with which the second line begins if it is full
        while second and self._fits(second - 1, end):
            second -= 1
        while (
            begin >= 0
            and self._pause(begin + 1) < _ms(PAUSE)
            and self.ends[end - 1] - self.starts[begin] <= _ms(MAX_DURATION)
            and (begin >= second or self._fits(begin, second))
        ):
            begins.append(begin)
            begin -= 1
        return begins

    def cost(self, begin: int, end: int) -> float:
        """Return the cost of a subtitle: a constant, too little time to read it, and a bad break after it."""
        until = self.starts[end] - _ms(MIN_GAP) if end < self.count else self.recording_end
        available = max(0.0, min(_ms(MAX_DURATION), until - self.starts[begin]))
        shortage = max(0.0, 1 - available / self._needed_ms(begin, end))
        return 0.5 + 8 * shortage + self._break_costs[end]

    def make_cues(self, bounds: Sequence[tuple[int, int]]) -> list[Cue]:
        """Return the subtitles of these word ranges."""
        cues: list[Cue] = []
        free = 0  # when the next subtitle may begin
        gap = _ms(MIN_GAP)
        for begin, end in bounds:
            start = max(self.starts[begin], free)
            until = max(self.starts[end] - gap if end < self.count else self.recording_end, start + _MIN_SHOWN_MS)
            desired = max(self.ends[end - 1], start + self._needed_ms(begin, end))
            stop = int(min(desired, until, start + _ms(MAX_DURATION)))
            free = stop + gap
            cues.append(Cue(start / 1000, stop / 1000, self._lines(begin, end)))
        return cues

    def _needed_ms(self, begin: int, end: int) -> int:
        """Return the milliseconds for which these words should be shown."""
        return max(_ms(MIN_DURATION), math.ceil(1000 * self._length(begin, end) / READING_SPEED))

    def _length(self, begin: int, end: int) -> int:
        return self.right[end - 1] - self.left[begin]

    def _pause(self, word: int) -> int:
        return self.starts[word] - self.ends[word - 1]

    def _break_cost(self, word: int) -> float:
        """Return the cost of a break before a word: from 0 after a sentence to 2.5 within a phrase."""
        before = self.texts[word - 1]
        if _SENTENCE_END.search(before):
            return 0.0
        cost = 2.0 * max(0.0, 1 - max(0, self._pause(word)) / _ms(PAUSE))
        if not self.spaces[word]:  # perhaps within a word of the language
            cost += 0.5
        return min(cost, 0.75) if _CLAUSE_END.search(before) else cost

    def _fits(self, begin: int, end: int) -> bool:
        return self._length(begin, end) <= MAX_LINE_LENGTH or end - begin == 1

    def _line_breaks(self, begin: int, end: int) -> list[int]:
        """Return the words with which the second line may begin; `end` if one line suffices."""
        if self._fits(begin, end):
            return [end]
        return [word for word in range(begin + 1, end) if self._fits(begin, word) and self._fits(word, end)]

    def _lines(self, begin: int, end: int) -> tuple[str, ...]:
        """Break words into lines of similar length, preferably at the end of a sentence or clause or at a pause."""

        def cost(word: int) -> float:
            if word == end:
                return 0.0
            unevenness = abs(self._length(begin, word) - self._length(word, end)) / MAX_LINE_LENGTH
            return unevenness + self._break_costs[word]

        second = min(self._line_breaks(begin, end), key=cost)
        return tuple(self._text(*span) for span in ((begin, second), (second, end)) if span[0] < span[1])

    def _text(self, begin: int, end: int) -> str:
        return "".join(self.spaces[word] + self.texts[word] for word in range(begin, end)).lstrip()


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _timestamp(seconds: float, separator: str) -> str:
    ms = _ms(seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{separator}{ms % 1000:03}"


def _join_lines(cue: Cue) -> str:
    return "\n".join(cue.lines)
