"""Inverse text normalization by language in separate processes, with small grammars installed as a package."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemostream.errors import BackendError, CapacityError, OptionError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Token
from nemostream.serving import normalizer as module
from nemostream.serving.normalizer import Normalizer

GRAMMARS = """
import os, time

class InverseNormalizer:
    def __init__(self, lang):
        with open(__file__ + ".log", "a") as log:
            log.write(lang + "\\n")
        if lang == "sv":
            raise MemoryError
        while os.path.exists(__file__ + ".hold-" + lang):
            time.sleep(0.02)
        self.spoken = {"es": "veintidós", "de": "zweiundzwanzig", "en": "twenty two", "zh": "二十二"}[lang]

    def inverse_normalize(self, text, verbose):
        while "slow" in text and os.path.exists(__file__ + ".hold-text"):
            time.sleep(0.02)
        print("output of the rules")
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


def hold(log: Path, language: str) -> Path:
    """Hold up the load of a language until the returned file is deleted."""
    file = log.with_name(f"inverse_normalize.py.hold-{language}")
    file.touch()
    return file


async def loading(log: Path, language: str) -> None:
    """Return when the load of a language has begun."""
    while not log.exists() or language not in log.read_text().split():
        await asyncio.sleep(0.02)


@asynccontextmanager
async def open_normalizer(clock: Callable[[], float] = time.monotonic) -> AsyncIterator[Normalizer]:
    """Yield a normalizer. At the end its processes are closed, and awaited while their event loop runs."""
    normalizer = Normalizer(clock)
    try:
        yield normalizer
    finally:
        await close(normalizer)


async def close(normalizer: Normalizer) -> None:
    """Close a normalizer and await its processes. A process that outlives its event loop fails when it is collected."""
    processes = [one._process for one in normalizer._processes.values() if one._process]
    normalizer.close()
    for process in processes:
        await end(process)


async def end(process: asyncio.subprocess.Process) -> None:
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
            for language in ("de-DE", "en-US", "zh-CN"):
                await normalizer.start(language)
            german, chinese = (" Zweiundzwanzig Hunde", None), ("我有二十二只狗。", None)
            mixed = final(
                (" zweiundzwanzig", "de-DE"), (" twenty two", "fi-FI"), (" twenty two", "en-GB"), (" x", None)
            )
            return [
                (await normalizer.rewrite(event)).text
                for event in (
                    final(german, set_language="de-DE"),
                    final(german, set_language="en-US"),
                    final(chinese, set_language="zh-CN"),
                    final(chinese, set_language="ZH_cn"),
                    final(german),
                    mixed,
                    final(german, set_language="de-DE"),
                )
            ]

    texts = [
        "22 Hunde",
        "Zweiundzwanzig Hunde",
        "我有22只狗。",
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


def test_rules_that_cannot_be_loaded_lose_no_text(log: Path, clock: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A failed load is repeated after five minutes only, and is logged once."""

    async def run() -> None:
        event = final((" tjugotvå", None), set_language="sv-SE")
        async with open_normalizer(clock) as normalizer:
            for _ in range(2):
                with pytest.raises(BackendError, match="it exited"):
                    await normalizer.start("sv-SE")
                assert await normalizer.rewrite(event) is event
            await normalizer.start("en")
            mixed = final((" tjugotvå", "sv-SE"), (" twenty two", "en-US"))
            assert (await normalizer.rewrite(mixed)).text == "tjugotvå 22"
            clock.now = 299.9
            assert await normalizer.rewrite(event) is event
            with pytest.raises(BackendError, match="it exited"):
                await normalizer.start("sv-SE")
            assert log.read_text().split() == ["sv", "en"]
            errors = [record for record in caplog.records if record.levelname == "ERROR"]
            assert [(one.language, one.retry_seconds) for one in errors] == [("sv", 300)]  # type: ignore[attr-defined]
            clock.now = 300
            with pytest.raises(BackendError, match="it exited"):
                await normalizer.start("sv-SE")

    asyncio.run(run())
    assert log.read_text().split() == ["sv", "en", "sv"]


def test_rules_are_loaded_once_if_the_first_client_leaves(log: Path) -> None:
    async def run() -> str:
        held = hold(log, "es")
        async with open_normalizer() as normalizer:
            first = asyncio.create_task(normalizer.start("es-ES"))
            await loading(log, "es")
            first.cancel()
            held.unlink()
            await normalizer.start("es-US")
            return (await normalizer.rewrite(final((" veintidós", None), set_language="es-ES"))).text

    assert asyncio.run(run()) == "22"
    assert log.read_text().split() == ["es"]


def test_a_process_starts_again_while_other_rules_are_loaded(log: Path) -> None:
    async def run() -> str:
        held = hold(log, "zh")
        async with open_normalizer() as normalizer, asyncio.timeout(60):
            await normalizer.start("en")
            chinese = asyncio.create_task(normalizer.start("zh"))
            await loading(log, "zh")
            process = normalizer._processes["en"]._process
            assert process is not None
            process.kill()
            await process.wait()
            text = (await normalizer.rewrite(final((" twenty two", None), set_language="en-US"))).text
            assert not chinese.done()
            held.unlink()
            await chinese
        return text

    assert asyncio.run(run()) == "22"
    assert log.read_text().split() == ["en", "zh", "en"]


@pytest.mark.parametrize("language", ["auto", "zh-CN"])  # detected, and set after the stream was opened
def test_utterances_do_not_wait_for_new_rules(log: Path, language: str, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> str:
        held = hold(log, "zh")
        event = final(("二十二", "zh-CN"), set_language=language)
        async with open_normalizer() as normalizer, asyncio.timeout(60):
            for _ in range(2):
                assert await normalizer.rewrite(event) is event
            await loading(log, "zh")
            assert await normalizer.rewrite(event) is event
            opened = asyncio.create_task(normalizer.start("zh"))  # waits for the same load
            await asyncio.sleep(0)
            assert not opened.done()
            held.unlink()
            await opened
            return (await normalizer.rewrite(event)).text

    with caplog.at_level(logging.INFO, "nemostream.serving"):
        assert asyncio.run(run()) == "22"
    assert log.read_text().split() == ["zh"]
    assert [record.message for record in caplog.records] == ["loading rules of inverse text normalization"]


def test_the_number_of_processes_is_limited(
    log: Path, clock: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process that is idle for the longest time, at least a minute, ends, but not one that is in use."""
    monkeypatch.setattr(module, "_MAX_PROCESSES", 2)

    async def run() -> None:
        held = hold(log, "es")
        german = final((" zweiundzwanzig", None), set_language="de")
        chinese = final(("二十二", None), set_language="zh")
        async with open_normalizer(clock) as normalizer, asyncio.timeout(60):
            await normalizer.start("de")
            clock.now = 5
            await normalizer.start("en")
            clock.now = 40
            assert (await normalizer.rewrite(german)).text == "22"
            clock.now = 64.9
            with pytest.raises(CapacityError, match="in use for 2 other languages"):
                await normalizer.start("zh")
            for _ in range(2):
                assert await normalizer.rewrite(chinese) is chinese
            skipped = [one.language for one in caplog.records if "skipped" in one.message]  # type: ignore[attr-defined]
            assert skipped == ["zh"]  # logged once
            assert log.read_text().split() == ["de", "en"]
            clock.now = 65
            processes = [normalizer._processes[code]._process for code in ("en", "de")]
            assert processes[0] is not None and processes[1] is not None
            await normalizer.start("zh")
            assert await processes[0].wait() != 0 and processes[1].returncode is None
            assert (await normalizer.rewrite(german)).text == "22"
            clock.now += 1
            assert (await normalizer.rewrite(chinese)).text == "22"
            assert log.read_text().split() == ["de", "en", "zh"]
            clock.now += 60
            spanish = asyncio.create_task(normalizer.start("es"))  # German ends
            await loading(log, "es")
            assert await normalizer.rewrite(german) is german  # Chinese ends, and German is loaded again
            assert await processes[1].wait() != 0
            with pytest.raises(CapacityError, match="in use"):  # both are loading
                await normalizer.start("zh")
            held.unlink()
            await spanish
            await normalizer.start("de")
            assert (await normalizer.rewrite(german)).text == "22"

    asyncio.run(run())
    assert log.read_text().split() == ["de", "en", "zh", "es", "de"]


def test_an_utterance_does_not_receive_the_response_to_another(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled call, a timeout and a process that ends leave the next utterance unaffected."""
    monkeypatch.setenv("NEMOSTREAM_API_KEYS", "hidden")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hidden")
    held = log.with_name("inverse_normalize.py.hold-text")
    slow, quick = final((" slow twenty two", None), set_language="en"), final((" twenty two", None), set_language="en")

    async def run() -> None:
        async with open_normalizer() as normalizer, asyncio.timeout(60):
            await normalizer.start("en")
            process = normalizer._processes["en"]._process
            assert process is not None
            status = Path("/proc", str(process.pid))
            assert os.getsid(process.pid) == process.pid  # Ctrl-C in the server's terminal does not end it
            assert b"hidden" not in (status / "environ").read_bytes()
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            limit = 8 << 30 if hard == resource.RLIM_INFINITY else min(8 << 30, hard)
            (line,) = [one for one in (status / "limits").read_text().splitlines() if "address space" in one]
            assert line.split()[3] == str(limit)
            nice = int((status / "stat").read_text().rpartition(")")[2].split()[16])
            assert nice == min(19, os.nice(0) + 10)
            held.touch()
            cancelled = asyncio.create_task(normalizer.rewrite(slow))
            await asyncio.sleep(0)
            while not normalizer._processes["en"]._lock.locked():
                await asyncio.sleep(0.01)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            held.unlink()
            assert (await normalizer.rewrite(quick)).text == "22"
            assert (await normalizer.rewrite(slow)).text == "slow 22"
            assert log.read_text().split() == ["en"]
            held.touch()
            monkeypatch.setattr(module, "_UTTERANCE_SECONDS", 0.2)
            other = final((" slow twenty two slow", None), set_language="en")
            assert await normalizer.rewrite(other) is other  # no response in time
            await end(process)
            assert process.returncode != 0
            held.unlink()
            monkeypatch.setattr(module, "_UTTERANCE_SECONDS", 60.0)
            assert (await normalizer.rewrite(quick)).text == "22"
            assert log.read_text().split() == ["en", "en"]
            await close(normalizer)
            with pytest.raises(BackendError, match="is closed"):
                await normalizer.start("de")
            assert await normalizer.rewrite(quick) is quick
        assert log.read_text().split() == ["en", "en"]

    asyncio.run(run())


def test_an_utterance_may_be_long(log: Path) -> None:
    async def run() -> str:
        async with open_normalizer() as normalizer, asyncio.timeout(60):
            await normalizer.start("en")
            return (await normalizer.rewrite(final((" word" * 2000 + " twenty two", None), set_language="en"))).text

    assert asyncio.run(run()) == "word " * 2000 + "22"


def test_a_process_that_starts_while_the_server_stops_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    normalizer, killed = Normalizer(), []

    async def create(*arguments: Any, **options: Any) -> Any:
        normalizer.close()
        return SimpleNamespace(returncode=None, kill=lambda: killed.append(arguments[-1]))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create)
    with pytest.raises(BackendError, match="is closed; the server is stopping"):
        asyncio.run(normalizer.start("en"))
    assert killed == ["en"]
