"""Words to subtitles: SubRip and WebVTT."""

from __future__ import annotations

from collections.abc import Sequence

from nemostream.serving.session import Word

_CHARACTERS, _SECONDS, _GAP = 84, 6.0, 0.8  # two lines of 42; longest on screen; a pause that begins a new one


def cues(words: Sequence[Word]) -> list[tuple[float, float, str]]:
    """Start, end and text of each subtitle."""
    found: list[list[Word]] = []
    for word in words:
        last = found[-1] if found else []
        length = sum(len(other.text) + 1 for other in last) + len(word.text)
        if not last or length > _CHARACTERS or word.end - last[0].start > _SECONDS or word.start - last[-1].end > _GAP:
            found.append([])
        found[-1].append(word)
    return [(cue[0].start, cue[-1].end, " ".join(word.text for word in cue)) for cue in found]


def srt(words: Sequence[Word]) -> str:
    """SubRip."""
    return "\n".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(cues(words), 1)
    )


def vtt(words: Sequence[Word]) -> str:
    """WebVTT (W3C)."""
    shown = (
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{_escape(text)}\n" for start, end, text in cues(words)
    )  # fmt: skip
    return "WEBVTT\n\n" + "\n".join(shown)


def _clock(seconds: float, point: str) -> str:
    ms = round(1000 * seconds)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
