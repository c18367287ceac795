"""The language of text, from the language tags among its tokens.

A model that detects the language emits a tag such as <de-DE> after the text that the tag labels.

This module does not depend on tokens, the tokenizer or streams.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

AUTO = "auto"  # set for a stream whose language the model detects


class LanguageTags:
    """The language tags of a growing sequence of tokens."""

    __slots__ = ("_languages", "_positions", "count")

    def __init__(self) -> None:
        self.count = 0  # tokens in the sequence
        self._positions: list[int] = []  # of each tag in the sequence
        self._languages: list[str] = []  # of each tag

    def copy(self) -> LanguageTags:
        copy = LanguageTags()
        copy.count, copy._positions, copy._languages = self.count, [*self._positions], [*self._languages]
        return copy

    def extend(self, languages: Iterable[str | None]) -> None:
        """Append tokens: for each the language if it is a tag, else None."""
        for language in languages:
            self.append(language)

    def append(self, language: str | None) -> None:
        """Append one token, as `extend`."""
        if language is not None:
            self._positions.append(self.count)
            self._languages.append(language)
        self.count += 1

    def last(self, count: int) -> str | None:
        """Return the language of the last tag among the first `count` tokens."""
        tags = bisect_left(self._positions, count)
        return self._languages[tags - 1] if tags else None

    def after(self, position: int, count: int) -> str | None:
        """Return the language of the first tag from `position` on, if it is among the first `count` tokens."""
        tags = bisect_left(self._positions, position)
        return self._languages[tags] if tags < len(self._positions) and self._positions[tags] < count else None

    def labelled(self, count: int) -> int:
        """Return the number of tokens up to the last tag among the first `count` tokens, the tag included."""
        tags = bisect_left(self._positions, count)
        return self._positions[tags - 1] + 1 if tags else 0


def reported_language(language: str, last_tag: str | None) -> str | None:
    """Return the language of a result for which `language` was set. If the model detects it, that is the last tag's."""
    return last_tag if language == AUTO else language
