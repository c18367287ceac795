"""The web page in headless Chromium with a WAV file as the microphone."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")


@pytest.fixture(scope="module")
def microphone(spoken: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file that the fake microphone repeats: a clip and ten seconds of silence."""
    path = tmp_path_factory.mktemp("microphone") / "voice.wav"
    audio = np.frombuffer(spoken[0].pcm, np.int16)
    soundfile.write(path, np.concatenate([np.zeros(16000, np.int16), audio, np.zeros(160_000, np.int16)]), 16000)
    return path


@pytest.fixture(scope="module")
def browser(microphone: Path) -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--use-file-for-fake-audio-capture={microphone}"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 390, "height": 844})  # a phone
    page = context.new_page()
    page.urls, page.errors = [], []
    page.on("request", lambda request: page.urls.append(request.url))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#chunks input")
    yield page
    context.close()


def test_microphone(page: Any, server: Any, spoken: Any) -> None:
    words = spoken[0].text.split()
    page.click("#mic")
    page.wait_for_function("() => parseFloat(document.getElementById('level').style.width) > 30", timeout=20_000)
    page.wait_for_selector("#captions p.live", timeout=20_000)
    page.wait_for_selector("#captions p:not(.live)", timeout=20_000)
    captions = page.inner_text("#captions").split()
    # Resampling in the browser and other leading silence may change a word; most words must be present.
    assert sum(word in captions for word in words) >= len(words) - 2 and captions[:1] == words[:1]
    assert re.fullmatch(r"\d+ ms", page.inner_text("#latency"))
    page.click("#mic")
    page.wait_for_selector("#status:text-is('done')")
    assert page.get_attribute("#mic", "aria-pressed") == "false"
    assert page.evaluate("document.getElementById('level').style.width") in ("0", "0px")
    assert all(url.startswith((server.url, "blob:")) for url in page.urls if not url.startswith("data:")), page.urls
    assert page.errors == []


def test_file_with_a_change_of_the_chunk_size(page: Any, spoken: Any) -> None:
    page.check("#chunks input[value='80']", force=True)
    page.set_input_files("#file", spoken[0].path)
    page.wait_for_selector("#captions p.live", timeout=20_000)
    page.check("#chunks input[value='160']", force=True)
    page.wait_for_selector("#status:text-is('done')", timeout=20_000)
    captions, words = page.inner_text("#captions").split(), spoken[0].text.split()
    assert sum(word in captions for word in words) >= len(words) - 2
    assert page.errors == []


def test_partials_settle_into_finals(page: Any, spoken: Any, tmp_path: Path) -> None:
    """What is shown as stable is not changed, in the same elements; the grey rest is replaced."""
    urls: list[str] = []
    page.on("websocket", lambda socket: urls.append(socket.url))
    silence = np.zeros(16000, np.int16)
    clips = [part for clip in spoken[:3] for part in (np.frombuffer(clip.pcm, np.int16), silence)]
    soundfile.write(tmp_path / "voice.wav", np.concatenate(clips), 16000)
    page.check("#chunks input[value='80']", force=True)
    assert not page.is_checked("#accurate")
    page.check("#accurate", force=True)
    page.evaluate(
        """() => {
            const original = show;
            window.seen = [];
            show = (event) => {
                original(event);
                const line = document.querySelector("#captions p:last-child");
                const [stable, open] = line.children;
                const colors = [stable, open].map((part) => getComputedStyle(part).color);
                seen.push({ type: event.type, stable: stable.textContent, open: open.textContent, colors,
                            number: [...line.parentNode.children].indexOf(line) });
            };
        }"""
    )
    page.set_input_files("#file", tmp_path / "voice.wav")
    page.wait_for_selector("#status:text-is('done')", timeout=40_000)
    assert "chunk_ms=80&final_chunk_ms=1120" in urls[-1]
    seen, revised = page.evaluate("seen"), 0
    for before, after in itertools.pairwise(seen):
        if before["number"] == after["number"]:
            assert (after["stable"] + after["open"]).startswith(before["stable"])
            revised += not (after["stable"] + after["open"]).startswith(before["stable"] + before["open"])
    assert revised > 0 and any(one["stable"] and one["open"] for one in seen)
    assert all(one["colors"][0] == seen[0]["colors"][0] != one["colors"][1] for one in seen)
    finals = [one for one in seen if one["type"] == "final"]
    assert len(finals) == 3 and all(one["stable"] and not one["open"] for one in finals)
    assert page.query_selector_all("#captions p.live") == [] and page.errors == []
    page.check("#chunks input[value='1120']", force=True)
    assert page.is_disabled("#accurate")


def test_note_about_the_demo_model(page: Any) -> None:
    note = page.inner_text("#note")
    assert "The demo model is in use" in note and "English numbers" in note and "--bundle" in note


def test_layout_on_a_phone(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert all(box["height"] >= 40 for box in map(lambda b: b.bounding_box(), page.query_selector_all("button:visible, .file")))


def test_one_language_has_no_selector(page: Any) -> None:
    assert page.is_hidden("#language") and page.is_hidden("#detection")
    assert all("language" not in url for url in page.urls)


def test_language_selector(browser: Any, languages_server: Any, spoken: Any) -> None:
    page = browser.new_context(viewport={"width": 390, "height": 844}).new_page()
    urls: list[str] = []
    page.on("websocket", lambda socket: urls.append(socket.url))
    page.goto(languages_server.url)
    page.wait_for_selector("#language:visible")
    options = page.eval_on_selector_all("#language option", "all => all.map((one) => [one.value, one.text])")
    assert options == [
        ["auto", "Detect language"],
        ["ar-AR", "Arabic"],
        ["en-US", "English"],
        ["de-DE", "German"],
    ]
    assert page.input_value("#language") == "en-US" and page.inner_text("#detected") == "–"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    def transcribe(language: str) -> list[list[str]]:  # while the recording of 2 s is played
        page.evaluate("document.getElementById('captions').replaceChildren()")
        page.select_option("#language", language)
        page.set_input_files("#file", spoken[5].path)
        page.wait_for_selector("#status:text-is('listening')", timeout=20_000)
        page.wait_for_selector("#status:text-is('done')", timeout=20_000)
        return page.eval_on_selector_all("#captions p", "all => all.map((one) => [one.lang, one.dir, one.innerText])")

    first = spoken[5].text.split()[0]  # resampling in the browser may change a word
    ((lang, direction, text),) = transcribe("en-US")
    assert (lang, direction, text.split()[0]) == ("en-US", "auto", first)
    assert page.inner_text("#detected") == "English" and "language=en-US" in urls[-1]
    # Detected: the demo model's "." is the tag of German.
    ((lang, direction, text),) = transcribe("auto")
    assert (lang, direction, text.split()[0]) == ("de-DE", "auto", first) and "<" not in text
    assert page.inner_text("#detected") == "German"
    # A change during a stream.
    page.set_input_files("#file", spoken[0].path)
    page.wait_for_selector("#captions p.live", timeout=20_000)
    page.select_option("#language", "ar-AR")
    page.wait_for_selector("#captions p[lang=ar-AR]", timeout=20_000)
    page.context.close()


def test_message_when_all_streams_are_in_use(page: Any, server: Any) -> None:
    import json

    def full(route: Any) -> None:
        body = json.loads(server.get("/readyz")[1]) | {"streams": 64}
        route.fulfill(body=json.dumps(body), content_type="application/json")

    page.route("**/readyz", full)
    page.evaluate("chunk = 33")  # an invalid size, rejected like a stream over the limit
    page.click("#mic")
    page.wait_for_selector("#status.bad", timeout=10_000)
    assert "in use" in page.inner_text("#status")
