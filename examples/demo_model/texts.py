"""Sentences of freely licensed texts, the text of the recorded prompts, and the selection of test data."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")  # Debian's wordnet-base
FIGURES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def is_held_out(text: str) -> bool:
    """Return whether a text is for testing: one in sixteen, by the hash of its words."""
    words = " ".join(re.findall(r"[a-z']+", text.lower()))
    return hashlib.sha256(words.encode()).digest()[0] % 16 == 0


def tidy(text: str, sentence: bool) -> str:
    """Normalise spaces and punctuation, and a/an; capitalise a sentence."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([.,?!])", r"\1", text)
    text = re.sub(r"([.?!])\.$", r"\1", text)
    text = re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", text)
    return text[:1].upper() + text[1:] if sentence else text


def quoted_texts(texts: Path) -> list[str]:
    """Return sentences of 3 to 16 words with plain letters, in which each word occurs in at least four sentences."""
    found: list[str] = []
    for file in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{file}").read_text().splitlines():
            for example in re.findall(r'"([^"]+)"', line.split("|")[-1]):
                found.append(example.split("- ")[0])
    books = [
        *sorted(texts.glob("**/data/chapter_*.json")),
        *sorted(texts.glob("**/data/19[3-9]?_*.json")),
        *sorted(texts.glob("**/data/20??_*.json")),
    ]
    for path in books:
        body = json.loads(path.read_text())
        body = body["text"] if isinstance(body, dict) else " ".join(map(str, body))
        found += re.split(r"(?<=[.?!])\s+(?=[A-Z])", re.sub(r"\s+", " ", body))
    for path in sorted(texts.glob("**/english/*.yml")):
        found += [line.strip(" -'\"") for line in path.read_text().splitlines() if line.strip().startswith("-")]
    kept, seen = [], set()
    for text in found:
        text = text.replace("--", ", ").replace("’", "'").replace(" ,", ",").strip(" ;:,")
        if re.fullmatch(r"[A-Za-z',;.?! -]{8,110}", text) and 3 <= len(text.split()) <= 16 and "--" not in text:
            text = text.replace(";", ",").replace(" - ", ", ").strip(" ,-")
            if not re.search(r"[.?!]$", text):
                text += "."
            text = tidy(text, True)
            if text.lower() not in seen:
                seen.add(text.lower())
                kept.append(text)
    count = Counter(word for text in kept for word in set(re.findall("[a-z']+", text.lower())))
    return [t for t in kept if all(count[w] >= 4 for w in re.findall("[a-z']+", t.lower()))]


def prompts(speech: Path | None) -> list[str]:
    """Return the texts of the training prompts, which are also synthesised."""
    if speech is None:
        return []
    rows = [json.loads(line) for line in (speech / "prompts.jsonl").read_text().splitlines()]
    texts = [prompt_text(row["text"]) for row in rows if not is_test_prompt(row["audio_filepath"])]
    tested = {prompt_text(row["text"]) for row in rows if is_test_prompt(row["audio_filepath"])}
    return sorted({text for text in texts if text and text not in tested})


def is_test_prompt(name: str) -> bool:
    """Return whether a human prompt is for testing: one in five, by the hash of the file name."""
    return hashlib.sha256(Path(name).name.encode()).digest()[0] % 5 == 0


def prompt_text(text: str) -> str:
    """Return the spoken text, with digits as words; empty if the row is not speech or its text is incomplete."""
    text = re.sub(r"\b(\d)\b", lambda m: FIGURES[int(m[1])], text)
    text = re.sub(r"\s*\[[^\]]*\]", "", text).replace("...", "").strip()
    return "" if re.search(r"[<>\d]", text) or not re.search("[A-Za-z]{2}", text) else text
