"""Languages of a bundle: the default of a stream, and the order of a prompted model's names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from nemostream.bundle import LanguageConfig
from nemostream.errors import OptionError
from nemostream.untrusted import short_repr

_TAG = re.compile(r"<([a-z]{2}-[A-Z]{2})>")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8}){0,2}")


def select_language(languages: LanguageConfig, language: str | None) -> LanguageConfig:
    """Return `languages` with another default: one of a prompted model's, or the language of any other model.

    Raises `OptionError` if a prompted model does not have the language, or if it is not the name of a language.
    """
    if language is None:
        return languages
    if languages.prompts:
        return dataclasses.replace(languages, default=languages.name(language))
    if not _LANGUAGE.fullmatch(language):
        raise OptionError(f"language is {short_repr(language)}; it must be the code of a language, like hi or hi-IN.")
    return dataclasses.replace(languages, default=language.replace("_", "-"))


def order_languages(languages: LanguageConfig, pieces: Collection[str]) -> LanguageConfig:
    """Return `languages` ordered by prompt id, the canonical name of each id first.

    That is the name that the model itself emits, as a tag in its vocabulary `pieces` ("ja-JP", which checkpoints also
    spell "ja-JA"), else a name with a region, else the first one.
    """
    tags = {match[1] for piece in pieces if (match := _TAG.fullmatch(piece))}

    def rank(name: str) -> tuple[int, int]:
        return languages.prompts[name], 0 if name in tags else 1 if "-" in name else 2

    ordered = dataclasses.replace(
        languages, prompts={n: languages.prompts[n] for n in sorted(languages.prompts, key=rank)}
    )
    return dataclasses.replace(ordered, default=ordered.name(ordered.default))
