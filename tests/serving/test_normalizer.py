"""Inverse text normalization by language in separate processes, with small grammars installed as a package."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nemostream.errors import BackendError, OptionError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Token
from nemostream.serving.normalizer import Normalizer

GRAMMARS = """
import time

class InverseNormalizer:
    def __init__(self, lang):
        with open(__file__ + ".log", "a") as log:
            log.write(lang + "\\n")
        if lang == "sv":
            raise MemoryError
        if lang == "es":
            time.sleep(1)
        self.spoken = {"es": "veintidós", "de": "zweiundzwanzig", "en": "twenty two", "zh": "二十二"}[lang]

    def inverse_normalize(self, text, verbose):
        return text.replace(self.spoken, "22")
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Install the grammars for child processes; return the file of the languages that have been loaded."""
    folder = tmp_path / "nemo_text_processing" / "inverse_text_normalization"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (folder / "inverse_normalize.py").write_text(GRAMMARS, encoding="utf-8")
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    yield folder / "inverse_normalize.py.log"


@asynccontextmanager
async def open_normalizer() -> AsyncIterator[Normalizer]:
    """Yield a normalizer. At the end its processes are closed, and awaited while their event loop runs."""
    normalizer = Normalizer()
    try:
        yield normalizer
    finally:
        processes = [one._process for one in normalizer._processes.values() if one._process]
        normalizer.close()
        for process in processes:
            assert process.stdout is not None
            await process.wait()
            await process.stdout.read()


def final(*parts: tuple[str, str | None], set_language: str = "auto") -> Event:
    """Return a final event with these texts, each followed by a language tag or None."""
    tokens: list[Token] = []
    for text, language in parts:
        tokens += [Token(0, each, 0.0, 0.1, -1.0, 0.9) for each in text]
        if language:
            tokens.append(Token(1, "", 0.0, 0.1, -1.0, 0.9, language))
    text = "".join(text for text, _ in parts).strip()
    return Event("final", 0, text, text, 0.0, 0.1, 1.0, 80, tuple(tokens), set_language=set_language)


def test_language_of_the_stream_or_of_the_tags(log: Path) -> None:
    async def run() -> list[str]:
        async with open_normalizer() as normalizer:
            await normalizer.start("auto")
            assert not log.exists()
            await normalizer.start("de-DE")
            german = (" Zweiundzwanzig Hunde", None)
            mixed = final(
                (" zweiundzwanzig", "de-DE"), (" twenty two", "fi-FI"), (" twenty two", "en-GB"), (" x", None)
            )
            return [
                (await normalizer.rewrite(event)).text
                for event in (
                    final(german, set_language="de-DE"),
                    final(german, set_language="en-US"),
                    final(("我有二十二只狗。", None), set_language="zh-CN"),
                    final(german),
                    mixed,
                    final(german, set_language="de-DE"),
                )
            ]

    texts = [
        "22 Hunde",
        "Zweiundzwanzig Hunde",
        "我有22只狗。",
        "Zweiundzwanzig Hunde",
        "22 twenty two 22 x",
        "22 Hunde",
    ]
    assert asyncio.run(run()) == texts
    assert log.read_text().split() == ["de", "en", "zh"]  # each once


def test_languages_without_rules_are_rejected(log: Path) -> None:
    with pytest.raises(OptionError, match="does not support the language 'fi-FI'; it supports ar, de"):
        asyncio.run(Normalizer().start("fi-FI"))
    assert not log.exists()


def test_rules_that_cannot_be_loaded_lose_no_text(log: Path) -> None:
    async def run() -> str:
        event = final((" tjugotvå", None), set_language="sv-SE")
        async with open_normalizer() as normalizer:
            with pytest.raises(BackendError, match="it exited"):
                await normalizer.start("sv-SE")
            assert await normalizer.rewrite(event) is event
            return (await normalizer.rewrite(final((" twenty two", None), set_language="en-US"))).text

    assert asyncio.run(run()) == "22"


def test_rules_are_loaded_once_if_the_first_client_leaves(log: Path) -> None:
    async def run() -> str:
        async with open_normalizer() as normalizer:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await normalizer.start("es-ES")
            await normalizer.start("es-US")
            return (await normalizer.rewrite(final((" veintidós", None), set_language="es-ES"))).text

    assert asyncio.run(run()) == "22"
    assert log.read_text().split() == ["es"]
