"""How the protocols name languages. `LanguageConfig` (`nemostream/bundle.py`) defines the languages of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nemostream.bundle import LanguageConfig
from nemostream.errors import OptionError
from nemostream.runtime.text.languages import AUTO
from nemostream.runtime.text.words import Word

_MAX_CANDIDATES = 128  # checking more would block the event loop
UNKNOWN = "unknown"  # in OpenAI's responses: the model detects the language and has not detected any

# English names by code of ISO 639, as OpenAI's API returns them: the languages of Whisper, and those in the prompt
# dictionaries of NVIDIA's checkpoints.
_NAMES: dict[str, str] = dict(
    re.findall(
        r"([a-z-]+) ([^,]+)",
        "af afrikaans, am amharic, ar arabic, as assamese, ay aymara, az azerbaijani, ba bashkir, be belarusian, "
        "bg bulgarian, bn bengali, bo tibetan, br breton, bs bosnian, ca catalan, cs czech, cy welsh, da danish, "
        "de german, el greek, en english, es spanish, et estonian, eu basque, fa persian, fi finnish, fil filipino, "
        "fo faroese, fr french, ga irish, gl galician, gn guarani, gu gujarati, ha hausa, haw hawaiian, he hebrew, "
        "hi hindi, hr croatian, ht haitian creole, hu hungarian, hy armenian, id indonesian, ig igbo, is icelandic, "
        "it italian, ja japanese, jv javanese, jw javanese, ka georgian, kk kazakh, km khmer, kn kannada, ko korean, "
        "ku kurdish, ky kyrgyz, la latin, lb luxembourgish, ln lingala, lo lao, lt lithuanian, lv latvian, "
        "mg malagasy, mi maori, mk macedonian, ml malayalam, mn mongolian, mr marathi, ms malay, mt maltese, "
        "my myanmar, nah nahuatl, nb norwegian bokmål, ne nepali, nl dutch, nn nynorsk, no norwegian, ny chichewa, "
        "oc occitan, om oromo, or odia, or-ke oromo, pa punjabi, pl polish, ps pashto, pt portuguese, qu quechua, "
        "ro romanian, ru russian, rw kinyarwanda, sa sanskrit, sd sindhi, si sinhala, sk slovak, sl slovenian, "
        "sm samoan, sn shona, so somali, sq albanian, sr serbian, su sundanese, sv swedish, sw swahili, ta tamil, "
        "te telugu, tg tajik, th thai, tk turkmen, tl tagalog, to tongan, tr turkish, tt tatar, uk ukrainian, "
        "ur urdu, uz uzbek, vi vietnamese, xh xhosa, yi yiddish, yo yoruba, yue cantonese, zh chinese, zu zulu",
    )
)


def english_name(language: str | None) -> str:
    """Return the lowercase English name of a language: "german" for "de-DE"; the code itself if it is not known."""
    if language is None:
        return UNKNOWN
    code = language.lower()
    return _NAMES.get(code) or _NAMES.get(code.partition("-")[0], language)


_CODES = {name: code for code, name in reversed(_NAMES.items())}


def _find(languages: LanguageConfig, language: str) -> str:
    """Return the name of a language that a client gives as a code, or by its English name as Whisper's clients do.

    A model of one language accepts every name that begins with its code, such as "eng". Raises `OptionError` if the
    model does not support the language.
    """
    language = _CODES.get(language.lower(), language)
    if not languages.prompts and language.lower().startswith(languages.default.lower()):
        return languages.default
    return languages.name(language)


def select_language(languages: LanguageConfig, language: str | None, candidates: Sequence[str] = ()) -> str | None:
    """Return the name of the language that OpenAI's `language` and `languages` select; None if both are empty.

    `candidates` are possible languages of the audio: one is the language, among several the model detects it. Raises
    `OptionError` if the model does not support one of them, or cannot detect the language.
    """
    if len(candidates) > _MAX_CANDIDATES:
        raise OptionError(f"languages has {len(candidates)} entries; the maximum is {_MAX_CANDIDATES}.")
    names = list(dict.fromkeys(_find(languages, one) for one in candidates if one))
    if language:
        return _find(languages, language)
    if len(names) > 1:
        if AUTO not in languages.prompts:
            raise OptionError(
                f"languages is {', '.join(names)}, but this model cannot detect the language; set one of them."
            )
        return languages.name(AUTO)
    return names[0] if names else None


def from_riva(languages: LanguageConfig, code: str) -> str | None:
    """Return the name of the language that Riva's `language_code` selects; None for the server's default.

    Riva's "multi" requests the detection of the language. A model of one language accepts it. Raises `OptionError` if
    the model does not support the language.
    """
    if not code or (code.lower().startswith("multi") and not languages.prompts):
        return None
    if code.lower().replace("_", "-") in ("multi", "multi-language") and AUTO in languages.prompts:
        return languages.name(AUTO)
    return _find(languages, code)


def languages_of(words: Iterable[Word], language: str) -> list[str]:
    """Return the languages of words in order: those of their tags, else `language`, which is set for the stream.

    Words without a tag have no language if the model detects it.
    """
    default = None if language == AUTO else language
    return [name for name in dict.fromkeys(word.language or default for word in words) if name]


def to_openai(names: Iterable[str]) -> list[dict[str, str]]:
    """Return languages as OpenAI's list of detected languages, by codes of ISO 639."""
    return [{"code": code} for code in dict.fromkeys(name.partition("-")[0] for name in names)]


def to_riva(language: str | None) -> str:
    """Return Riva's code of a language, with a region for English; empty if the language is not known."""
    if language is None or language == AUTO:
        return ""
    return "en-US" if language == "en" else language
