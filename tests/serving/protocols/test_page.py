"""The web page in headless Chromium with a WAV file as the microphone."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import difflib
import hashlib
import itertools
import json
import re
import shutil
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pysubs2
import pytest
import soundfile
import srt
import webvtt
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.client import connect

from nemostream.runtime.text import formats
from nemostream.runtime.text.scripts import columns
from nemostream.runtime.text.words import Word

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

RATE = 16000  # Hz
SIZES = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1440, 900)}

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


@contextmanager
def open_page(browser: Any, url: str, size: str = "phone", console: bool = False, **options: Any) -> Iterator[Any]:
    """Open the page of a server. Its `errors` are exceptions and, with `console`, also those of lost connections."""
    width, height = SIZES[size]
    with browser.new_context(viewport={"width": width, "height": height}, **options) as context:
        page = context.new_page()
        page.urls, page.sockets, page.errors = [], [], []
        page.on("request", lambda request: page.urls.append(request.url))
        page.on("websocket", lambda socket: page.sockets.append(socket.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        if console:
            page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.goto(url)
        page.wait_for_selector("#mic:enabled")
        yield page


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Any]:
    with open_page(browser, server.url, console=True) as page:
        yield page


def choose(page: Any, chunk_ms: int) -> None:
    page.evaluate("showPanel(true)")
    page.check(f"#chunks input[value='{chunk_ms}']", force=True)
    page.evaluate("showPanel(false)")


def write_clips(path: Path, clips: Sequence[Any], channels: int = 1) -> float:
    """Write clips to a file, each followed by a second of silence. Return its length in seconds."""
    silence = np.zeros(RATE, np.int16)
    samples = np.concatenate([part for clip in clips for part in (np.frombuffer(clip.pcm, np.int16), silence)])
    soundfile.write(path, np.repeat(samples[:, None], channels, axis=1), RATE)
    return len(samples) / RATE


def play(page: Any, path: Path) -> None:
    """Start the sample, with another recording."""
    page.route("**/sample.flac", lambda route: route.fulfill(path=path))
    page.click("#sample")


def test_microphone(page: Any, server: Any, spoken: Any) -> None:
    words = spoken[0].text.split()
    page.click("#mic")
    page.wait_for_function("() => parseFloat(document.getElementById('level').style.width) > 30", timeout=20_000)
    page.wait_for_selector("#captions p.live", timeout=20_000)
    page.wait_for_selector("#captions p:not(.live)", timeout=20_000)
    shown = " ".join(captions(page)).split()
    # Resampling in the browser and other leading silence may change a word; most words must be present.
    assert sum(word in shown for word in words) >= len(words) - 2 and shown[:1] == words[:1]
    assert re.fullmatch(r"median \d\.\d\d s, 95 % \d\.\d\d s", page.inner_text("#delay"))
    assert page.inner_text("#mic") == "Stop" and page.is_disabled("#file") and page.is_hidden("#sources")
    page.click("#mic")
    page.wait_for_selector("#status:text-is('Done')")
    assert page.inner_text("#mic") == "Start" and page.is_enabled("#file")
    assert page.evaluate("document.getElementById('level').style.width") in ("0", "0px")
    assert all(url.startswith((server.url, "blob:")) for url in page.urls if not url.startswith("data:")), page.urls
    assert page.errors == []


def test_sample_with_a_change_of_the_chunk_size(page: Any, spoken: Any) -> None:
    choose(page, 80)
    page.click("#sample")
    page.wait_for_selector("#captions p.live", timeout=20_000)
    choose(page, 160)
    page.wait_for_selector("#status:text-is('Done')", timeout=20_000)
    shown, words = " ".join(captions(page)).split(), spoken[0].text.split()
    assert sum(word in shown for word in words) >= len(words) - 2
    assert page.errors == []


def test_sample_on_an_http_page_of_another_machine(page: Any, spoken: Any) -> None:
    """Browsers have no AudioWorklet there: the sample is transcribed like a file."""
    page.evaluate("Object.defineProperty(window, 'isSecureContext', { value: false })")
    page.evaluate("delete AudioContext.prototype.__proto__.audioWorklet")
    page.click("#sample")
    page.wait_for_selector("#status:text-is('Done')", timeout=20_000)
    assert " ".join(captions(page)).split()[:3] == spoken[0].text.split()[:3] and page.errors == []


def test_partials_settle_into_finals(page: Any, spoken: Any, tmp_path: Path) -> None:
    """What is shown as stable is not changed, in the same elements; the grey rest is replaced."""
    write_clips(tmp_path / "voice.wav", spoken[:3])
    page.emulate_media(reduced_motion="reduce")  # colours do not fade
    choose(page, 80)
    page.evaluate("showPanel(true)")
    assert not page.is_checked("#accurate")
    page.check("#accurate")
    page.evaluate(
        """() => {
            const original = show;
            window.seen = [];
            let number = 0;  // of the word
            show = (...parts) => {
                const words = original(...parts), [{ type, text }] = parts;
                const line = document.querySelector("#captions .utterance:last-child p");
                const spans = [...line.children].map((span) => {
                    span.number ??= ++number;
                    return [span.textContent, span.className, getComputedStyle(span).color, span.number];
                });
                seen.push({ type, text, shown: line.textContent, spans,
                            utterance: document.querySelectorAll("#captions .utterance").length });
                return words;
            };
        }"""
    )
    play(page, tmp_path / "voice.wav")
    page.wait_for_selector("#status:text-is('Done')", timeout=40_000)
    assert "chunk_ms=80&final_chunk_ms=1120&words=1" in page.sockets[-1]
    seen, revised, mixed = page.evaluate("seen"), 0, 0
    for before, after in itertools.pairwise(seen):
        assert after["shown"] == after["text"]
        if before["utterance"] != after["utterance"]:
            continue
        settled = [span for span in before["spans"] if span[1] != "open"]
        if after["type"] == "partial":
            assert after["spans"][: len(settled)] == settled  # the same elements, with the same text and marks
        else:
            assert after["text"].startswith(" ".join(span[0] for span in settled))
        revised += not after["text"].startswith(before["text"])
        mixed += 0 < len(settled) < len(before["spans"])
    assert revised > 0 and mixed > 0
    for one in seen:
        assert not {color for _, name, color, _ in one["spans"] if name == "open"} & {
            color for _, name, color, _ in one["spans"] if name != "open"
        }
        # Words that can change follow those that cannot.
        names = [name == "open" for _, name, _, _ in one["spans"]]
        assert names == sorted(names)
    finals = [one for one in seen if one["type"] == "final"]
    assert len(finals) == 3 and not any(name == "open" for one in finals for _, name, _, _ in one["spans"])
    assert page.query_selector_all("#captions .live") == [] and page.errors == []
    choose(page, 1120)
    assert page.is_disabled("#accurate")


def test_note_about_the_demo_model(page: Any) -> None:
    note = page.inner_text("#note")
    assert "The demo model is in use" in note and "English numbers" in note and "--bundle" in note


def test_layout_on_a_phone(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert all(
        box["height"] >= 40 for box in map(lambda b: b.bounding_box(), page.query_selector_all("button:visible, .file"))
    )


def test_one_language_has_no_selector(page: Any) -> None:
    page.click("#settings")
    assert page.is_hidden("#language") and page.is_visible("#chunks")
    assert all("language" not in url for url in page.urls)


def test_language_selector(browser: Any, languages_server: Any, spoken: Any) -> None:
    with open_page(browser, languages_server.url) as page:
        page.click("#settings")
        options = page.eval_on_selector_all("#language option", "all => all.map((one) => [one.value, one.text])")
        assert options == [
            ["auto", "Detect language"],
            ["ar-AR", "Arabic"],
            ["en-US", "English"],
            ["de-DE", "German"],
        ]
        assert page.input_value("#language") == "en-US"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

        def transcribe(language: str) -> list[list[str]]:
            page.evaluate("document.getElementById('clear').click()")
            page.select_option("#language", language)
            page.set_input_files("#file", spoken[5].path)
            page.wait_for_selector("#captions p")
            page.wait_for_selector("#status:text-is('Done')", timeout=20_000)
            return page.eval_on_selector_all(
                "#captions .utterance",
                "all => all.map(({ lastChild: p, firstChild: { lastChild: name } }) => "
                "[p.lang, p.dir, p.innerText, name.innerText])",
            )

        first = spoken[5].text.split()[0]  # resampling in the browser may change a word
        ((lang, direction, text, name),) = transcribe("en-US")
        assert (lang, direction, text.split()[0], name) == ("en-US", "auto", first, "English")
        assert "language=en-US" in page.sockets[-1]
        # Detected: the demo model's "." is the tag of German.
        ((lang, direction, text, name),) = transcribe("auto")
        assert (lang, direction, text.split()[0], name) == ("de-DE", "auto", first, "German") and "<" not in text
        # A change during a stream. The sample is English if another language is selected.
        page.select_option("#language", "de-DE")
        page.evaluate("document.getElementById('sample').click()")
        page.wait_for_selector("#captions p.live", timeout=20_000)
        assert "language=en-US" in page.sockets[-1]
        page.select_option("#language", "ar-AR")
        page.wait_for_selector("#captions p[lang=ar-AR]", timeout=20_000)


def test_message_when_all_streams_are_in_use(page: Any, server: Any) -> None:
    def full(route: Any) -> None:
        body = json.loads(server.get("/readyz")[1]) | {"streams": 64}
        route.fulfill(body=json.dumps(body), content_type="application/json")

    page.route("**/readyz", full)
    page.evaluate("chunk = 33")  # an invalid size, rejected like a stream over the limit
    page.click("#mic")
    page.wait_for_selector("#alert b", timeout=10_000)
    assert page.inner_text("#alert b") == "All streams of the server are in use."
    assert "Try again in a minute." in page.inner_text("#alert") and page.inner_text("#status") == "Stopped"


# -- resumption: a scripted server that loses connections --------------------------------------------------------------

BLOCK = 9001  # bytes of which the scripted server makes a word: its states are inside of messages and of samples
WORDS = 4  # of an utterance
STORED = 3  # blocks between two states


def word_of(block: bytes) -> str:
    return base64.b32encode(hashlib.sha256(block).digest())[:6].decode()


def captions_of(audio: bytes) -> list[str]:
    """Return the finals of a stream of which no connection was lost."""
    words = [word_of(audio[start : start + BLOCK]) for start in range(0, len(audio), BLOCK)]
    return [" ".join(words[start : start + WORDS]) for start in range(0, len(words), WORDS)]


@dataclass
class Stream:
    """What the scripted server has of a stream; the state that it stores is a copy."""

    audio: bytes = b""
    controls: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # (bytes before it, message)
    blocks: int = 0
    words: list[str] = field(default_factory=list)  # of the open utterance
    events: list[dict[str, Any]] = field(default_factory=list)  # number n has the sequence n + 1
    finished: bool = False

    def position(self) -> dict[str, int]:
        return {"bytes": len(self.audio), "controls": len(self.controls), "sequence": len(self.events)}

    def stored(self) -> Stream:
        """Return the state at the end of the newest block, or of the stream."""
        state = dataclasses.replace(self, words=[*self.words], controls=[*self.controls], events=[*self.events])
        if not self.finished:
            state.audio = self.audio[: self.blocks * BLOCK]
            state.controls = [control for control in self.controls if control[0] <= len(state.audio)]
        return state

    def next_block(self) -> bool:
        """Make a word of the next complete block. Return whether there is one."""
        block = self.audio[self.blocks * BLOCK : (self.blocks + 1) * BLOCK]
        if len(block) < BLOCK:
            return False
        self.blocks += 1
        self._add(word_of(block))
        return True

    def finish(self) -> None:
        if rest := self.audio[self.blocks * BLOCK :]:
            self._add(word_of(rest))
        if self.words:
            self._event("final")
        self.finished = True
        self.events.append({"type": "done", "text": "", "audio": len(self.audio) / (2 * RATE)})

    def _add(self, word: str) -> None:
        self.words.append(word)
        self._event("partial")
        if len(self.words) == WORDS:
            self._event("final")
            self.words = []

    def _event(self, kind: str) -> None:
        text = " ".join(self.words)
        stable = text if kind == "final" else " ".join(self.words[:-1])
        ends = [number * BLOCK / (2 * RATE) for number in range(self.blocks - len(self.words), self.blocks + 1)]
        words = [
            {"text": word, "start": start, "end": end, "confidence": 0.5}
            for word, start, end in zip(self.words, ends[:-1], ends[1:], strict=True)
        ]
        new = 0 if kind == "final" else len(words) - 1
        event = {"type": kind, "text": text, "stable": stable, "language": None, "start": ends[0], "end": ends[-1]}
        event |= {"audio": len(self.audio) / (2 * RATE), "words": words[new:], "words_from": new}
        self.events.append(event)


class Proxy:
    """A TCP proxy of a local port, which loses connections. While `down`, new ones are aborted."""

    def __init__(self, target: int = 0) -> None:
        self.target, self.url, self.down = target, "", False
        self._connections: list[_Forwarded] = []

    def freeze(self) -> None:
        """Forward nothing more on the open connections, and close nothing."""
        for connection in self._connections:
            connection.frozen = True

    def abort(self) -> None:
        """Close all open connections without a close frame."""
        self._loop.call_soon_threadsafe(self._abort)

    def _abort(self) -> None:
        for connection in self._connections:
            for writer in connection.writers:
                writer.transport.abort()
        self._connections.clear()

    async def run(self, started: threading.Event, stopped: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        async with await asyncio.start_server(self._accept, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            started.set()
            await asyncio.to_thread(stopped.wait)
            self._abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            return writer.transport.abort()
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target)
        connection = _Forwarded((writer, target_writer))
        self._connections.append(connection)
        await asyncio.gather(connection.forward(reader, target_writer), connection.forward(target_reader, writer))


@dataclass
class _Forwarded:
    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    frozen: bool = False

    async def forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                if not self.frozen:
                    target.write(data)
                    await target.drain()
        if not self.frozen:
            target.close()


class ScriptedServer:
    """The page, and one stream with version 1 of resumption behind a proxy.

    `cuts` are (bytes, way): after how many bytes of the stream a connection is lost, and how: "abort" and "freeze" are
    methods of the proxy; "moved", "model", "1011" and "1000" are what a server may send. `ready` are the fields of
    /readyz, `refuse` is the status of a handshake, 0 if it is accepted.
    """

    def __init__(self) -> None:
        self.proxy = Proxy()
        self.state = Stream()
        self.cuts: list[tuple[int, str]] = []
        self.resumption: dict[str, Any] | None = {"version": 1, "token": "t" * 22, "seconds": 300.0}
        self.ready = {"status": "ready", "streams": 1, "max_streams": 4, "model": "scripted", "chunks_ms": [80, 560]}
        self.ready |= {"chunk_ms": 560, "final_chunk_ms": None, "languages": ["en"], "language": "en"}
        self.refuse = 0
        self.blocked = False  # whether `done` is delayed
        self.stores = True  # whether states can be stored
        self.queries: list[dict[str, str]] = []
        self.received: list[int] = []
        self._epoch = 0  # of the newest connection

    # -- HTTP

    def _respond(self, connection: ServerConnection, request: Request) -> Response | None:
        path = urlsplit(request.path).path
        if path == "/v1/stream":
            if not self.refuse:
                return None
            self.queries.append(dict(parse_qsl(urlsplit(request.path).query)))
            return connection.respond(HTTPStatus(self.refuse), "{}")
        if path == "/":
            page = resources.files("nemostream.serving.protocols") / "page.html"
            response = connection.respond(HTTPStatus.OK, page.read_text(encoding="utf-8"))
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/html; charset=utf-8"
            return response
        status = HTTPStatus.OK if self.ready["status"] == "ready" else HTTPStatus.SERVICE_UNAVAILABLE
        return connection.respond(status, json.dumps(self.ready))

    # -- the stream

    async def _serve(self, socket: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            await self._run(socket)

    async def _run(self, socket: ServerConnection) -> None:
        assert socket.request is not None
        query = dict(parse_qsl(urlsplit(socket.request.path).query))
        self.queries.append(query)
        self._epoch += 1
        epoch = self._epoch
        if "resume" not in query:
            self.state = Stream()
        stream, sent = self.state.stored(), 0
        position = stream.position()
        resumption = self.resumption and self.resumption | position
        await socket.send(json.dumps({"type": "ready", "resumption": resumption}))

        async def send_events() -> None:
            """Send events, the known ones too, which clients ignore."""
            nonlocal sent
            while sent < len(stream.events) and not (self.blocked and stream.events[sent]["type"] == "done"):
                sent += 1
                await socket.send(json.dumps(stream.events[sent - 1] | {"sequence": sent}))

        async def store() -> None:
            if self.resumption and self.stores and epoch == self._epoch:
                self.state = stream.stored()
                await socket.send(json.dumps({"type": "stored"} | self.state.position()))

        await send_events()
        while not stream.finished:
            message = await socket.recv()
            if isinstance(message, bytes):
                stream.audio += message
                while stream.next_block():
                    await send_events()
                    if stream.blocks % STORED == 0:
                        await store()
            else:
                control = json.loads(message)
                if control["type"] == "received":
                    self.received.append(control["sequence"])
                    continue
                stream.controls.append((len(stream.audio), control))
                if control["type"] == "finish":
                    stream.finish()
                    await send_events()
                    await store()
            if self.cuts and len(stream.audio) > self.cuts[0][0]:
                return await self._lose(socket, self.cuts.pop(0)[1])  # messages that are buffered are lost too
        while self.blocked:
            await asyncio.sleep(0.01)
        await send_events()
        self.state = stream

    async def _lose(self, socket: ServerConnection, way: str) -> None:
        if way in ("abort", "freeze"):
            getattr(self.proxy, way)()
        elif way == "moved":
            await socket.send(json.dumps({"type": "moved", "message": "the server is stopping."}))
            await socket.wait_closed()  # the client need not wait for the close frame
        elif way == "model":
            await socket.send(json.dumps({"type": "error", "code": "model", "message": "the engine failed."}))
            await socket.close(1011)
        else:
            await socket.close(int(way))

    async def run(self, started: threading.Event, stopped: threading.Event) -> None:
        options: dict[str, Any] = {"ping_interval": None, "close_timeout": 0.1, "process_request": self._respond}
        async with serve(self._serve, "127.0.0.1", 0, subprotocols=["nemostream"], **options) as server:
            self.proxy.target = next(iter(server.sockets)).getsockname()[1]
            await self.proxy.run(started, stopped)


@contextmanager
def on_thread(run: Any) -> Iterator[None]:
    started, stopped = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run(started, stopped)), daemon=True)
    thread.start()
    assert started.wait(10)
    yield
    stopped.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    with on_thread(server.run):
        yield server


RECORD = """() => {
    window.recorded = [];  // audio, and controls as text, in the order in which the page has them
    window.states = [];
    const { push, control, change } = ResumableStream.prototype;
    ResumableStream.prototype.push = function (pcm) {
        window.stream = this;
        const kept = push.call(this, pcm);
        recorded.push(kept ? btoa(String.fromCharCode(...new Uint8Array(pcm))) : null);
        return kept;
    };
    ResumableStream.prototype.control = function (message) {
        recorded.push(message);
        control.call(this, message);
    };
    ResumableStream.prototype.change = function (state, reason) {
        states.push(state);
        change.call(this, state, reason);
    };
    // Noise in messages of 20 ms, eight times as fast as a microphone.
    window.speak = async (seconds) => {
        call ??= open(16000, () => { call = null; setMode("idle"); });
        setMode("live", "mic");
        for (let n = 0; n < 50 * seconds && call; n++) {
            call.audio(Float32Array.from({ length: 320 }, () => Math.random() - 0.5));
            if (n % 4 === 0) await new Promise((resolve) => setTimeout(resolve, 10));
        }
    };
}"""


@pytest.fixture
def live(browser: Any, scripted: ScriptedServer) -> Iterator[Any]:
    """The page of the scripted server."""
    with open_page(browser, scripted.proxy.url) as page:
        page.evaluate(RECORD)
        yield page
        assert page.errors == []


def recorded(page: Any) -> tuple[bytes, list[tuple[int, dict[str, Any]]]]:
    """Return the audio of the page, and its controls with their places."""
    audio, controls = b"", []
    for message in page.evaluate("recorded"):
        if isinstance(message, str):
            audio += base64.b64decode(message)
        elif message is not None:
            controls.append((len(audio), message))
    return audio, controls


def captions(page: Any) -> list[str]:
    return page.eval_on_selector_all("#captions p", "all => all.map((one) => one.innerText)")


def finish(page: Any) -> None:
    page.evaluate("call.finish()")
    page.wait_for_selector("#status:text-is('Done')", timeout=20_000)


def check(page: Any, server: ScriptedServer) -> None:
    """Check that the server has everything that the page recorded, once, and the page has every caption once."""
    audio, controls = recorded(page)
    assert server.state.finished and server.state.audio == audio and server.state.controls == controls
    assert captions(page) == captions_of(audio) and len(audio) > 10 * BLOCK
    assert page.is_hidden("#connection") and not page.query_selector("#captions .live")
    for query in [query for query in server.queries if "resume" in query]:
        events = server.state.events[: int(query["received"])]
        assert int(query["results"]) == sum(event["type"] != "partial" for event in events)


@pytest.mark.parametrize("way", ["abort", "freeze", "moved", "model", "1011", "1000"])
def test_no_audio_is_lost_or_repeated(live: Any, scripted: ScriptedServer, way: str) -> None:
    scripted.cuts = [(BLOCK // 2, way), (5 * BLOCK + 7, way), (6 * BLOCK - 8, way)]
    live.evaluate(f"ResumableStream.answerTimeoutMs = {1000 if way == 'freeze' else 1e9}")
    live.evaluate("speak(2)")
    for chunk_ms in (80, 560):  # controls in between
        choose(live, chunk_ms)
        live.evaluate("speak(2)")
    for _ in range(200):
        if live.evaluate("states.filter((state) => state === 'open').length") > 3:
            break
        live.evaluate("speak(0.1)")
        live.wait_for_timeout(100)
    live.evaluate("speak(2)")
    live.wait_for_function("() => stream.bufferedBytes < 40000")  # `stored` was received
    assert live.evaluate("stream.failures === 0 && stream.lostAt === null")
    finish(live)
    check(live, scripted)
    first, *resumes = scripted.queries
    assert first["resumable"] == "1" and "resume" not in first and len(resumes) >= 3
    assert all(query.keys() == {"resume", "received", "results"} and query["resume"] == "t" * 22 for query in resumes)
    assert scripted.received == sorted(scripted.received) and scripted.received[-1] >= WORDS


def test_microphone_with_lost_connections(live: Any, scripted: ScriptedServer) -> None:
    scripted.cuts = [(7 * BLOCK, "abort"), (20 * BLOCK + 1, "moved")]
    live.click("#mic")
    live.wait_for_function("() => states.filter((state) => state === 'open').length === 3", timeout=20_000)
    live.wait_for_function("() => document.querySelectorAll('#captions p').length > 8", timeout=20_000)
    live.click("#mic")
    live.wait_for_selector("#status:text-is('Done')")
    check(live, scripted)
    assert live.inner_text("#mic") == "Start"


def test_recording_continues_while_the_server_is_unreachable(live: Any, scripted: ScriptedServer) -> None:
    live.evaluate("speak(3)")
    scripted.proxy.down = True
    scripted.proxy.abort()
    live.context.set_offline(True)
    live.wait_for_selector("#connection:visible")
    live.evaluate("speak(3)")
    assert live.inner_text("#status") == "Reconnecting" and live.is_disabled("#file")
    assert re.fullmatch(r"0:\d\d", live.inner_text("[role=timer]"))
    live.wait_for_selector("#connection:has-text('the server is unreachable')")
    live.wait_for_function("() => /Recording continues: 0:0[3-6] of at most 2:00/.test(document.body.innerText)")
    assert live.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert live.query_selector("#abandon").bounding_box()["height"] >= 40
    live.evaluate("ResumableStream.maxDelayMs = 1e6")  # so that only the event `online` leads to an attempt
    live.wait_for_function("() => stream.state === 'waiting' && stream.failures > 2")
    live.evaluate("() => { clearTimeout(stream.timer); stream.loss = null; }")
    scripted.proxy.down = False
    live.context.set_offline(False)
    live.wait_for_selector("#connection", state="hidden")
    assert live.inner_text("#status") == "Listening"
    live.evaluate("speak(1)")
    finish(live)
    check(live, scripted)


def test_a_visible_page_reconnects_at_once(live: Any, scripted: ScriptedServer) -> None:
    live.evaluate("ResumableStream.maxDelayMs = 0")
    live.evaluate("speak(3)")
    scripted.proxy.down = True
    scripted.proxy.abort()
    live.wait_for_function("() => stream.state === 'waiting' && stream.failures > 1")
    live.evaluate("() => { stream.resume = () => {}; }")
    live.wait_for_function("() => stream.state === 'waiting'")
    scripted.proxy.down = False
    live.evaluate("() => { delete stream.resume; document.dispatchEvent(new Event('visibilitychange')); }")
    finish(live)
    check(live, scripted)


def test_finish_while_the_connection_is_lost(live: Any, scripted: ScriptedServer) -> None:
    live.evaluate("speak(3)")
    scripted.proxy.down = True
    scripted.proxy.abort()
    live.wait_for_selector("#connection:visible")
    live.evaluate("call.finish()")
    live.wait_for_selector("#kept:has-text('The recording has ended')")
    scripted.proxy.down = False
    live.wait_for_selector("#status:text-is('Done')", timeout=20_000)
    check(live, scripted)


@pytest.mark.parametrize("way", ["abort", "freeze"])
def test_the_connection_is_lost_before_done(live: Any, scripted: ScriptedServer, way: str) -> None:
    """The server has stored `finish`; it sends the remaining events after the resume."""
    scripted.blocked = True
    live.evaluate("speak(4)")
    live.evaluate("call.finish()")
    live.wait_for_function("() => stream.queue.length === 0")
    live.evaluate("ResumableStream.answerTimeoutMs = 1000")
    getattr(scripted.proxy, way)()
    live.wait_for_function("() => states.includes('waiting')")
    scripted.blocked = False
    live.wait_for_selector("#status:text-is('Done')", timeout=20_000)
    check(live, scripted)


@pytest.mark.parametrize("state", [{"status": "draining"}, {"streams": 4}])
def test_a_server_that_accepts_no_streams_is_tried_again(
    live: Any, scripted: ScriptedServer, state: dict[str, Any]
) -> None:
    before = scripted.ready
    live.evaluate("ResumableStream.maxDelayMs = 100")
    live.evaluate("speak(3)")
    scripted.ready, scripted.refuse = before | state, 503
    scripted.proxy.abort()
    live.wait_for_function("() => stream.failures > ResumableStream.maxRefusals + 1")
    reason = "the server is draining" if "status" in state else "all streams of the server are in use"
    live.wait_for_selector(f"#connection:has-text('{reason}')")
    scripted.ready, scripted.refuse = before, 0
    live.wait_for_selector("#connection", state="hidden")
    finish(live)
    check(live, scripted)


def test_a_refused_resume_ends_the_stream(live: Any, scripted: ScriptedServer) -> None:
    live.evaluate("speak(4)")
    live.wait_for_selector("#captions .live")
    scripted.refuse = 404
    scripted.proxy.abort()
    live.wait_for_selector("#alert:has-text('The server rejects the resumption')", timeout=20_000)
    assert "The transcript so far is kept. Start again to continue." in live.inner_text("#alert")
    assert live.is_hidden("#connection") and live.is_enabled("#file") and live.evaluate("call === null")
    assert len(scripted.queries) == 4  # a refusal is confirmed twice
    kept = captions(live)
    words = " ".join(kept).split()
    assert words == " ".join(captions_of(recorded(live)[0])).split()[: len(words)]
    assert not live.query_selector("#captions .live")
    scripted.refuse, first = 0, len(scripted.queries)
    live.evaluate("recorded.length = 0")
    live.evaluate("speak(4)")  # a new stream, after the captions of the old one
    finish(live)
    assert "resume" not in scripted.queries[first]
    assert captions(live) == [*kept, *captions_of(recorded(live)[0])]


def test_a_stream_ends_when_its_state_has_expired(live: Any, scripted: ScriptedServer) -> None:
    scripted.resumption |= {"seconds": 0.5}
    live.evaluate("speak(3)")
    scripted.proxy.down = True
    scripted.proxy.abort()
    live.wait_for_selector("#alert:has-text('No connection for 0.5 s')", timeout=20_000)
    assert live.is_hidden("#connection") and captions(live)


def hold_readyz(page: Any, scripted: ScriptedServer) -> Any:
    """Lose the connection, and wait until the page asks the server for the reason. Return the route of that request."""
    routes: list[Any] = []
    page.evaluate("speak(3)")
    page.route("**/readyz", lambda route: routes.append(route))
    scripted.proxy.down = True
    scripted.proxy.abort()
    while not routes:
        page.wait_for_timeout(10)
    scripted.proxy.down = False
    return routes[0]


def test_a_stream_is_given_up(live: Any, scripted: ScriptedServer) -> None:
    route = hold_readyz(live, scripted)
    live.click("#abandon")
    text = "The stream was given up. The end of the transcript is missing."
    assert live.inner_text("#alert p") == text and live.inner_text("#status") == "Stopped"
    assert live.is_hidden("#connection") and live.evaluate("call === null") and captions(live)
    with live.expect_response("**/readyz"):
        route.fulfill(json=scripted.ready)
    live.evaluate("() => new Promise((resolve) => setTimeout(resolve, 50))")
    assert live.inner_text("#alert p") == text and live.is_hidden("#connection") and len(scripted.queries) == 1


def test_the_reason_of_an_earlier_failure_has_no_effect(live: Any, scripted: ScriptedServer) -> None:
    route = hold_readyz(live, scripted)
    live.evaluate("dispatchEvent(new Event('online'))")
    live.wait_for_selector("#connection", state="hidden")
    with live.expect_response("**/readyz"):
        route.fulfill(json=scripted.ready)
    live.evaluate("() => new Promise((resolve) => setTimeout(resolve, 50))")
    assert live.inner_text("#status") == "Listening" and live.evaluate("stream.state") == "open"
    finish(live)
    check(live, scripted)
    assert len(scripted.queries) == 2


def test_the_buffer_is_bounded(live: Any, scripted: ScriptedServer) -> None:
    """What does not fit is discarded, and the user is informed; the rest is transcribed."""
    live.evaluate("ResumableStream.bufferSeconds = 4")
    live.evaluate("speak(2)")
    scripted.proxy.down = True
    scripted.proxy.abort()
    live.wait_for_selector("#connection:visible")
    live.evaluate("speak(6)")
    live.wait_for_selector("#connection.full:has-text('new audio is discarded')")
    assert live.evaluate("stream.bufferedBytes <= stream.capacity")
    discarded = live.evaluate("recorded.filter((one) => one === null).length") * 0.02
    assert 2 <= discarded < 5
    scripted.proxy.down = False
    live.wait_for_selector(f"#alert:has-text('{int(np.ceil(discarded))} s of audio were discarded')")
    live.evaluate("speak(2)")
    finish(live)
    check(live, scripted)


def test_the_server_cannot_store(live: Any, scripted: ScriptedServer) -> None:
    """A connection is not limited by the buffer; only a resume from an old position is impossible."""
    live.evaluate("ResumableStream.bufferSeconds = 2")
    scripted.stores = False
    live.evaluate("speak(5)")
    audio = recorded(live)[0]
    live.wait_for_function(f"() => document.querySelectorAll('#captions p').length >= {len(audio) // BLOCK // WORDS}")
    assert live.evaluate("stream.droppedBytes") == 0 and live.evaluate("stream.bufferedBytes <= stream.capacity")
    scripted.proxy.abort()
    live.wait_for_selector("#alert:has-text('The stream cannot be resumed')", timeout=20_000)
    assert [text for text in captions(live) if len(text.split()) == WORDS] == captions_of(audio)[:-1]


def test_a_server_without_resumption(live: Any, scripted: ScriptedServer) -> None:
    scripted.resumption = None
    live.evaluate("speak(4)")
    assert live.evaluate("stream.queue.length") == 0  # nothing is kept
    live.evaluate("ResumableStream.answerTimeoutMs = 0")  # no `stored` is sent, so there is no timeout
    live.evaluate("stream.tick()")
    live.evaluate("speak(1)")
    finish(live)
    audio = recorded(live)[0]
    assert scripted.state.audio == audio and captions(live) == captions_of(audio)
    live.evaluate("ResumableStream.answerTimeoutMs = 15000")
    live.evaluate("speak(3)")
    scripted.proxy.down = True
    scripted.proxy.abort()
    live.wait_for_selector("#alert:has-text('The server is unreachable')")
    assert live.is_hidden("#connection") and live.evaluate("call === null")


def test_cuts_do_not_change_the_transcript(browser: Any, server: Any, spoken: Any, tmp_path: Path) -> None:
    """With the real server. The same audio is sent again, on a connection that is not lost."""
    with connect(f"{server.socket}/v1/stream?resumable=1") as socket:
        if "resumption" not in json.loads(socket.recv()):
            pytest.skip("the server has no resumption")
    write_clips(tmp_path / "voice.wav", spoken[:4])
    proxy = Proxy(server.http)
    with on_thread(proxy.run), open_page(browser, proxy.url) as page:
        page.evaluate(RECORD)
        page.evaluate("ResumableStream.answerTimeoutMs = 6000")
        play(page, tmp_path / "voice.wav")
        page.wait_for_selector("#captions p.live", timeout=20_000)
        proxy.abort()
        page.wait_for_function("() => document.querySelectorAll('#captions p').length > 1", timeout=20_000)
        proxy.freeze()
        page.wait_for_selector("#status:text-is('Done')", timeout=60_000)
        audio, texts = recorded(page)[0], captions(page)
        opened = page.evaluate("states.filter((state) => state === 'open').length")
    urls = page.sockets
    assert opened == 3 and "resumable=1" in urls[0] and "resume=" in urls[1]
    with connect(
        urls[0].replace(proxy.url.replace("http", "ws"), server.socket).replace("resumable=1", "resumable=0")
    ) as socket:
        for start in range(0, len(audio), 3200):
            socket.send(audio[start : start + 3200])
        socket.send(json.dumps({"type": "finish"}))
        events = [json.loads(event) for event in socket]
    assert texts == [event["text"] for event in events if event["type"] == "final"] and len(texts) >= 4


# -- files -------------------------------------------------------------------------------------------------------------


def test_file_with_progress(page: Any, spoken: Any, tmp_path: Path) -> None:
    """A file is sent faster than real time, in the largest chunks, and the page shows how much has been transcribed."""
    length = write_clips(tmp_path / "two channels.flac", spoken[:8] * 2, channels=2)
    page.evaluate(
        """() => {
            window.values = [];
            const bar = $("progress"), seconds = $("seconds"), level = document.querySelector(".level");
            const note = () => values.push([bar.value, bar.hidden, seconds.textContent, level.checkVisibility()]);
            new MutationObserver(note).observe(seconds, { childList: true });
        }"""
    )
    page.set_input_files("#file", tmp_path / "two channels.flac")
    page.wait_for_selector("#status:text-is('Done')", timeout=40_000)
    *values, (_, _, done, _) = page.evaluate("values")
    total = f"{int(length // 60)}:{int(length % 60):02}"
    shares = [value for value, hidden, text, _ in values if text.endswith(f" of {total}") and not hidden]
    assert not any(level for *_, level in values) and page.is_hidden("#delay")
    assert shares == sorted(shares) and sum(0 < share < 1 for share in shares) > 5
    assert re.fullmatch(rf"{total} of audio in \d+ s", done) and page.is_hidden("#progress")
    assert "sample_rate=16000" in page.sockets[-1] and "chunk_ms=1120&final_chunk_ms=0" in page.sockets[-1]
    words, shown = " ".join(clip.text for clip in spoken[:8]).split() * 2, " ".join(captions(page)).split()
    matcher = difflib.SequenceMatcher(a=words, b=shown, autojunk=False)
    assert sum(block.size for block in matcher.get_matching_blocks()) > 0.8 * len(words)  # other chunks: other words
    assert page.errors == []


def test_file_with_lost_connections(live: Any, scripted: ScriptedServer, tmp_path: Path) -> None:
    """All of a file is transcribed, also if more of it must be sent again than is kept of a microphone."""
    live.evaluate("ResumableStream.bufferSeconds = 1")
    noise = np.random.default_rng(5).integers(-9000, 9000, 16000 * 20, np.int16)
    soundfile.write(tmp_path / "noise.wav", noise, 16000)
    scripted.cuts = [(9 * BLOCK + 7, "abort"), (30 * BLOCK, "1011"), (45 * BLOCK + 1, "moved")]
    live.set_input_files("#file", tmp_path / "noise.wav")
    live.wait_for_selector("#status:text-is('Done')", timeout=20_000)
    check(live, scripted)
    assert len(scripted.state.audio) == 2 * len(noise) and len(scripted.queries) == 4


def test_a_file_that_is_no_recording(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("not audio")
    page.set_input_files("#file", tmp_path / "notes.wav")
    page.wait_for_selector("#alert b")
    assert page.inner_text("#alert b") == "This browser cannot read notes.wav."
    assert "Convert it to WAV, FLAC, MP3 or Ogg" in page.inner_text("#alert")
    assert page.inner_text("#mic") == "Start" and page.is_enabled("#mic")
    page.click("#alert [aria-label=Dismiss]")
    assert page.inner_text("#alert") == "" and page.evaluate("document.activeElement.id") == "mic"


# -- downloads ---------------------------------------------------------------------------------------------------------

SPACED = (  # texts of several scripts, with the punctuation that subtitles break at
    "after the tone , please leave a message: name, number (and time). then hang up!",
    "¿qué hora es? «las tres» , dijo; y se fue… 10 % & <b> --> end",
    "สวัสดี ครับ ผม ชื่อ สมชาย नमस्ते दुनिया । यह एक परीक्षा है ॥",
    "안녕하세요 여러분 ， 오늘은 좋은 날입니다 。 e\u0301te\u0301",
)
UNSPACED = ("我们明天在北京开会，请准备好文件。", "東京タワーで「会う」ことにした。")
TEXTS = [*map(str.split, SPACED), *map(list, UNSPACED)]


def random_words(seed: int, count: int) -> list[Word]:
    random, words, time = np.random.default_rng(seed), list[Word](), 0.0
    while len(words) < count:
        text = TEXTS[random.integers(len(TEXTS))]
        for word in text:
            time += float(random.choice([0, 0.08, 0.2, 0.5, 1.0, 1.3, 4.0], p=[0.2, 0.3, 0.2, 0.15, 0.05, 0.05, 0.05]))
            end = time + float(random.choice([0.0, 0.08, 0.24, 0.64]))
            words.append(
                Word(word, round(time, 3), round(end, 3), 0.5, after_space=len(word) > 1 or not word > "\u2e80")
            )
            time = end
    return words


def test_subtitles_equal_those_of_the_server(page: Any) -> None:
    """The page has a translation of `nemostream.runtime.text.formats`."""
    for seed, count in enumerate([0, 1, 2, 3, 7, 20, 20, 60, 200, 600]):
        words = random_words(seed, count)
        duration = words[-1].end + seed / 3 if words else 1.0
        shown = [{"text": word.text, "start": word.start, "end": word.end, "space": word.after_space} for word in words]
        found = page.evaluate("([words, duration]) => cues(words, duration)", [shown, duration])
        expected = formats.cues(words, duration)
        assert [(cue["start"] / 1000, cue["end"] / 1000, tuple(cue["lines"])) for cue in found] == [
            (cue.start, cue.end, cue.lines) for cue in expected
        ]


def test_columns_equal_those_of_the_server(page: Any) -> None:
    """Of the assigned characters of the scripts of the world; emoji and symbols may differ."""
    letters = [
        chr(code)
        for code in (*range(0x20, 0x3000), *range(0x3000, 0xD7A4), *range(0xF900, 0xFFF0), *range(0x20000, 0x20400))
        if unicodedata.category(chr(code))[0] in "LMNPZ"
    ]
    assert len(letters) > 30_000
    widths = page.evaluate("(letters) => letters.map(columns)", letters)
    # Two Unicode versions may disagree about new characters.
    wrong = [letter for letter, width in zip(letters, widths, strict=True) if width != columns(letter)]
    assert len(wrong) < 20, wrong


def download(page: Any, format: str) -> str:
    page.click("#download")
    with page.expect_download() as download:
        page.click(f"#formats [data-format={format}]")
    assert download.value.suggested_filename.endswith("." + format)
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_downloads(page: Any, spoken: Any, tmp_path: Path) -> None:
    """Two streams: the times of the second one follow those of the first one. Everything can be parsed by others."""
    first = write_clips(tmp_path / "talk.wav", spoken[:3])
    for file in (tmp_path / "talk.wav", spoken[1].path):
        page.evaluate("status('')")
        page.set_input_files("#file", file)
        page.wait_for_selector("#status:text-is('Done')", timeout=20_000)
    texts = captions(page)
    assert len(texts) >= 4 and download(page, "txt") == "".join(f"{text}\n" for text in texts)

    data = json.loads(download(page, "json"))
    assert data["file"] == f"talk.wav, {spoken[1].path.name}" and data["text"] == " ".join(texts)
    assert data["duration"] == pytest.approx(first + len(spoken[1].pcm) / 32000, abs=0.01)
    assert [one["text"] for one in data["utterances"]] == texts
    assert " ".join(word["text"] for word in data["words"]) == data["text"]
    times = [time for word in data["words"] for time in (word["start"], word["end"])]
    assert times == sorted(times) and all(word["confidence"] > 0 for word in data["words"])
    assert data["utterances"][-1]["start"] > first - 0.1
    shown = page.eval_on_selector_all("#captions time", "all => all.map((one) => one.innerText)")
    assert shown == [f"0:{int(one['start']):02}" for one in data["utterances"]]

    subtitles = download(page, "srt")
    words = [Word(word["text"], word["start"], word["end"], word["confidence"]) for word in data["words"]]
    assert subtitles == formats.srt(words, data["duration"])
    parsed = list(srt.parse(subtitles, ignore_errors=False))
    assert " ".join(" ".join(one.content.split()) for one in parsed) == data["text"]
    assert all(before.end < after.start for before, after in itertools.pairwise(parsed))
    assert max(len(line) for one in parsed for line in one.content.splitlines()) <= 42
    (tmp_path / "a.vtt").write_text(download(page, "vtt"), encoding="utf-8")
    web = list(webvtt.read(str(tmp_path / "a.vtt")))
    assert [(one.start_in_seconds, one.text) for one in web] == [
        (int(one.start.total_seconds()), one.content) for one in parsed
    ]
    sub_rip, web_vtt = pysubs2.SSAFile.from_string(subtitles), pysubs2.load(str(tmp_path / "a.vtt"))
    assert [(one.start, one.end, one.text) for one in sub_rip] == [(one.start, one.end, one.text) for one in web_vtt]
    assert page.errors == []


def test_special_characters_in_downloads(page: Any) -> None:
    """Markup, arrows, scripts without spaces and right-to-left text."""
    for text in ("a <b> & --> c", "我们明天开会。", "请准备好文件。", "שלום עולם", "x ?"):
        page.evaluate(
            """(text) => {
                const segments = new Intl.Segmenter("zh", { granularity: "word" }).segment(text.replace(" ?", "?"));
                const texts = [...segments].map(({ segment }) => segment.trim()).filter(Boolean);
                const start = duration, end = duration + 2;
                const time = (i) => start + i / 9;
                const words = texts.map((text, i) => ({ text, start: time(i), end: time(i), confidence: 1 }));
                show({ type: "final", text, stable: text, start, end, words, words_from: 0, language: null });
                duration += 3;
            }""",
            text,
        )
    assert download(page, "txt").splitlines() == [
        "a <b> & --> c",
        "我们明天开会。",
        "请准备好文件。",
        "שלום עולם",
        "x ?",
    ]
    data = json.loads(download(page, "json"))
    assert data["text"] == "a <b> & --> c 我们明天开会。请准备好文件。שלום עולם x ?"
    contents = [one.content for one in srt.parse(download(page, "srt"), ignore_errors=False)]
    assert "→" in contents[0] and "我们明天开会。" in contents and "שלום עולם" in contents
    assert "&lt;b&gt; &amp; --&gt;" in download(page, "vtt").replace(" > ", "&gt;")


def test_copy_clear_and_undo(browser: Any, scripted: ScriptedServer) -> None:
    with open_page(browser, scripted.proxy.url, permissions=["clipboard-read", "clipboard-write"]) as page:
        assert all(page.is_disabled(f"#{name}") for name in ("copy", "download", "clear"))
        page.evaluate(TALK)
        page.evaluate("talk(3)")
        texts = captions(page)
        page.click("#copy")
        page.wait_for_selector("#notice:has-text('The text is copied.')")
        assert page.evaluate("navigator.clipboard.readText()") == "".join(f"{text}\n" for text in texts)
        page.evaluate("navigator.clipboard.writeText('')")
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as on http pages
        page.click("#copy")
        page.focus("body")
        assert page.evaluate("document.querySelector('textarea') === null")
        page.click("#clear")
        assert captions(page) == [] and page.is_visible("#empty") and page.is_disabled("#copy")
        page.evaluate("talk(1)")
        page.click("#notice button:has-text('Undo')")
        assert captions(page)[:3] == texts and len(captions(page)) == 4


# -- captions of a long session ----------------------------------------------------------------------------------------

# `talk(n)` shows n utterances of ten words, 4 s each, with a partial for every word, or every `step` words.
TALK = """() => {
    const vocabulary = ["after", "the", "tone", "please", "leave", "a", "message", "with", "your", "number"];
    window.second = 0;
    window.talk = (count, finals = true, step = 1) => {
        for (let n = 0; n < count; n++) {
            const start = second, words = [];
            const event = () => {
                const text = words.map((word) => word.text).join(" ");
                const stable = words.slice(0, -2).map((word) => word.text).join(" ");
                return { text, stable, start, end: second, language: null };
            };
            vocabulary.forEach((text, i) => {
                words.push({ text, start: second, end: second + 0.3, confidence: ((n + i) * 37 % 100) / 100 });
                second += 0.4;
                if (words.length % step) return;
                show({ ...event(), type: "partial", words: words.slice(-step), words_from: words.length - step });
            });
            if (finals) show({ ...event(), type: "final", stable: event().text, words, words_from: 0 });
        }
        duration = second;
    };
}"""


def in_viewport(page: Any, selector: str) -> bool:
    box, size = page.query_selector(selector).bounding_box(), page.viewport_size
    return bool(
        box
        and box["x"] >= 0
        and box["y"] >= 0
        and box["x"] + box["width"] <= size["width"]
        and box["y"] + box["height"] <= size["height"]
    )


def memory(page: Any) -> tuple[int, int]:
    """Return the bytes of the JavaScript heap and the number of DOM nodes, without garbage."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    used = session.send("Runtime.getHeapUsage")["usedSize"]
    nodes = session.send("Memory.getDOMCounters")["nodes"]
    session.detach()
    return int(used), int(nodes)


@pytest.mark.parametrize("size", SIZES)
def test_ten_minutes_of_captions(browser: Any, scripted: ScriptedServer, size: str) -> None:
    """Controls stay visible, a reader who scrolls up is not moved, and the newest captions are shown to others."""
    with open_page(browser, scripted.proxy.url, size) as page:
        page.evaluate(TALK)
        page.click("#mic")
        page.wait_for_selector("#mic:has-text('Stop')")
        page.evaluate("() => { call.stream.handlers.event = () => {}; }")  # what the fake microphone plays
        for minutes in range(1, 6):
            page.evaluate("talk(15)")
            assert page.evaluate("bottom()") < 2 and page.is_hidden("#newest")
            assert all(in_viewport(page, f"#{name}") for name in ("mic", "settings", "download", "status")), minutes
        page.hover("#view")
        page.mouse.wheel(0, -2000)
        page.wait_for_selector("#newest:visible")
        page.wait_for_timeout(100)
        # The first utterance that is visible.
        top = """() => {
            const all = [...document.querySelectorAll("#captions .utterance")];
            const one = all.find((each) => each.getBoundingClientRect().top > 80);
            return [one.innerText, Math.round(one.getBoundingClientRect().top)];
        }"""
        before = page.evaluate(top)
        for _ in range(5):
            page.evaluate("talk(15)")
            assert page.evaluate(top) == before
            assert all(in_viewport(page, f"#{name}") for name in ("mic", "newest"))
        page.click("#newest")
        assert page.evaluate("bottom()") < 2 and page.is_hidden("#newest")
        page.keyboard.press("PageUp")  # the view has the focus
        page.wait_for_selector("#newest:visible")
        page.keyboard.press("End")
        page.wait_for_selector("#newest", state="hidden")
        assert page.evaluate("utterances.length") == 150 and len(page.evaluate("FORMATS.txt()").splitlines()) == 150
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_memory_of_a_long_session(browser: Any, scripted: ScriptedServer) -> None:
    """After an hour the document has no more nodes than after ten minutes; the heap has only the words, once."""
    with open_page(browser, scripted.proxy.url) as page:
        page.evaluate(TALK)
        page.evaluate("talk(450, true, 5)")  # half an hour
        heap, nodes = memory(page)
        page.evaluate("talk(450, true, 5)")
        heap_after, nodes_after = memory(page)
        assert max(nodes, nodes_after) < 5000
        assert heap_after - heap < 300 * 450 * 10  # bytes per word
        subtitles = srt.parse(page.evaluate("FORMATS.srt()"), ignore_errors=False)
        assert sum(len(one.content.split()) for one in subtitles) == 9000 and len(captions(page)) <= 200
        # Everything can be read.
        shown = set()
        for direction in ("earlier", "later"):
            while page.is_visible(f"#{direction}"):
                page.evaluate(f"document.getElementById('{direction}').click()")
                shown |= set(page.eval_on_selector_all("#captions time", "all => all.map((one) => one.innerText)"))
                assert page.evaluate("document.getElementById('captions').children.length") <= 200
        assert len(shown) == 900
        assert page.evaluate("last === 900") and page.inner_text("#captions .utterance:last-child time") == "59:56"


def test_earlier_captions_do_not_move_the_reader(browser: Any, scripted: ScriptedServer) -> None:
    with open_page(browser, scripted.proxy.url, "tablet") as page:
        page.evaluate(TALK)
        page.evaluate("talk(400, true, 10)")
        page.evaluate("talk(1, false)")  # an open utterance
        for button in ["earlier"] * 4 + ["later"] * 4:
            page.evaluate(f"view.scrollTop = {0 if button == 'earlier' else 1e9}")
            page.wait_for_timeout(50)
            edge = "firstChild" if button == "earlier" else "lastChild"
            page.evaluate(f"window.anchor = $('captions').{edge}")
            where = "anchor.getBoundingClientRect().top"
            before = page.evaluate(where)
            page.evaluate(f"$('{button}').click()")
            if page.evaluate("anchor.isConnected"):
                assert abs(page.evaluate(where) - before) < 2
        assert page.query_selector_all("#captions > :last-child > .live")


# -- delay -------------------------------------------------------------------------------------------------------------


def test_the_delay_is_that_of_words(live: Any) -> None:
    """From the capture of the end of a word to its display. A word that grows counts again, a revised one does not."""
    live.evaluate(
        """() => {
            window.now = 0;
            performance.now = () => now;
            window.requestAnimationFrame = (run) => run();
            call = open(16000, () => {});
            setMode("live", "mic");
            for (now of [1000, 2000, 3000]) call.audio(new Float32Array(16000));
            stream.detach().close();  // the events are those below
        }"""
    )

    def event(now: float, texts: str, ends: list[float], words_from: int = 0) -> None:
        words = [
            {"text": text, "start": 0, "end": end, "confidence": 1}
            for text, end in zip(texts.split(), ends, strict=True)
        ]
        message = {"type": "partial", "text": texts, "stable": "", "start": 0, "end": ends[-1], "language": None}
        message |= {"words": words[words_from:], "words_from": words_from, "audio": 3}
        live.evaluate("([time, event]) => { now = time; stream.receive(event); }", [now, message])

    event(3500, "one two", [1.5, 2.8])
    assert live.evaluate("delays.map(Math.round)") == [2000, 700]
    assert live.inner_text("#delay") == "median 0.70 s, 95 % 2.00 s"
    event(3600, "one twofold", [1.5, 3.0], 1)
    assert live.evaluate("delays.map(Math.round)") == [2000, 700, 600]
    event(9000, "won twofold", [1.4, 3.0])
    assert live.evaluate("delays.length") == 3
    event(3900, "won twofold three", [1.4, 3.0, 3.0], 2)
    assert live.evaluate("delays.map(Math.round)") == [2000, 700, 600, 900]
    assert live.inner_text("#delay") == "median 0.70 s, 95 % 2.00 s"
    live.evaluate("addDelays(Array.from({ length: 1000 }, (_, i) => i))")
    assert live.evaluate("delays.length") == 200 and live.inner_text("#delay") == "median 0.90 s, 95 % 0.99 s"
    live.evaluate("stream.abandon()")


# -- microphone, keys, keyboard ----------------------------------------------------------------------------------------


@pytest.fixture
def contexts(page: Any) -> Any:
    """The page, which keeps its AudioContexts in `contexts`, and its microphone tracks in `tracks`."""
    page.evaluate(
        """() => {
            window.contexts = [];
            window.tracks = [];
            window.AudioContext = class extends AudioContext {
                constructor(...options) { super(...options); contexts.push(this); }
            };
            const get = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
            navigator.mediaDevices.getUserMedia = async (options) => {
                const media = await get(options);
                tracks.push(...media.getTracks());
                return media;
            };
        }"""
    )
    return page


def test_a_suspended_recording(contexts: Any) -> None:
    page = contexts
    page.click("#mic")
    page.wait_for_selector("#status:text-is('Listening')")
    page.evaluate("contexts[0].suspend()")
    page.wait_for_function("() => contexts[0].state === 'running'")  # resumed by the page
    assert page.inner_text("#alert") == ""
    page.evaluate("() => { contexts[0].resume = () => Promise.reject(new Error('a click is needed')); }")
    page.evaluate("contexts[0].suspend()")
    page.wait_for_selector("#alert:has-text('The browser has paused the recording.')")
    page.wait_for_selector("#status:text-is('No audio is received')", timeout=10_000)
    page.evaluate("delete contexts[0].resume")
    page.click("#alert button:has-text('Continue')")
    page.wait_for_function("() => contexts[0].state === 'running'")
    page.wait_for_selector("#status:text-is('Listening')")
    assert page.inner_text("#alert") == ""
    # A page that becomes visible again tries too.
    page.evaluate("() => { contexts[0].resume = () => Promise.resolve(); }")
    page.evaluate("contexts[0].suspend()")
    page.wait_for_selector("#alert b")
    page.evaluate("() => { delete contexts[0].resume; document.dispatchEvent(new Event('visibilitychange')); }")
    page.wait_for_function("() => document.getElementById('alert').textContent === ''")
    assert page.evaluate("contexts[0].state") == "running"
    page.click("#mic")
    page.wait_for_selector("#status:text-is('Done')")
    assert page.evaluate("contexts[0].state") == "closed" and page.errors == []


def test_a_stream_without_audio_is_kept_open(live: Any) -> None:
    live.evaluate("speak(1)")
    sent = live.evaluate(
        """() => {
            const sent = [], { send } = stream.socket, now = performance.now();
            stream.socket.send = (message) => sent.push(message);
            stream.tick();
            performance.now = () => now + 11000;
            stream.tick();
            stream.socket.send = send;
            return sent;
        }"""
    )
    assert sent == ['{"type":"keepalive"}']
    live.evaluate("stream.abandon()")


def test_a_microphone_that_is_disconnected(contexts: Any) -> None:
    page = contexts
    page.click("#mic")
    page.wait_for_selector("#captions p.live", timeout=20_000)
    page.evaluate("tracks[0].dispatchEvent(new Event('ended'))")
    page.wait_for_selector("#alert:has-text('The microphone was disconnected.')")
    page.wait_for_selector("#status:text-is('Done')")
    assert captions(page) and page.inner_text("#mic") == "Start"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NotAllowedError", "does not allow the microphone for this page"),
        ("NotFoundError", "There is no microphone."),
        ("NotReadableError", "Another program may use it"),
        ("AbortError", "The microphone does not work: reason."),
    ],
)
def test_no_microphone(page: Any, name: str, text: str) -> None:
    page.evaluate(
        """(name) => {
            navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("reason", name));
        }""",
        name,
    )
    page.click("#mic")
    page.wait_for_selector("#alert b")
    message = page.inner_text("#alert p")
    assert text in message and "tart again" in message and page.inner_text("#status") == "Ready"
    assert page.is_enabled("#mic") and page.get_attribute("#alert", "role") == "alert"
    boxes = [page.query_selector(selector).bounding_box() for selector in ("#alert", "#controls")]
    assert boxes[0]["y"] + boxes[0]["height"] == pytest.approx(boxes[1]["y"], abs=2)  # beside the controls


def test_api_key(browser: Any, serve_here: Any) -> None:
    with serve_here(measure=False, api_keys=["secret.1"]) as running, open_page(browser, running.url) as page:
        page.wait_for_selector("#keys[open]")
        for key, answer in (
            ("secret/1", "characters that a browser cannot send"),
            ("other", "does not accept this key"),
        ):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            page.wait_for_selector(f"#refused:has-text('{answer}')")
        page.keyboard.press("Escape")
        page.click("#sample")  # asks again
        page.wait_for_selector("#keys[open]")
        page.fill("#key", "secret.1")
        page.click("text=Use this key")
        page.wait_for_selector("#keys", state="hidden")
        page.click("#sample")
        page.wait_for_selector("#captions p.live", timeout=20_000)
        page.click("#mic")
        page.wait_for_selector("#status:text-is('Done')")


def test_keyboard_and_screen_reader(live: Any) -> None:
    """The order of the focus, the panel, and what is announced: finals, not partials."""
    order = []
    for _ in range(7):
        live.keyboard.press("Tab")
        order.append(live.evaluate("document.activeElement.id"))
    assert order[:5] == ["settings", "view", "mic", "file", "sample"]
    live.focus("#settings")
    live.keyboard.press("Enter")
    assert live.is_visible("#panel") and live.get_attribute("#settings", "aria-expanded") == "true"
    assert live.evaluate("document.activeElement.id") == "close"
    live.keyboard.press("Tab")
    live.keyboard.press("ArrowLeft")
    assert live.evaluate("chunk") == 80
    live.keyboard.press("Escape")
    assert live.is_hidden("#panel") and live.evaluate("document.activeElement.id") == "settings"
    live.evaluate(TALK)
    live.evaluate("talk(7)")
    live.evaluate("talk(1, false)")
    spoken = live.eval_on_selector_all("#finals p", "all => all.map((one) => one.innerText)")
    assert len(spoken) == 5 and spoken == captions(live)[-6:-1]
    regions = "[aria-live], [role=log], [role=status], [role=alert]"
    announcing = live.eval_on_selector_all(regions, "all => all.map(({ id }) => id)")
    assert set(announcing) == {"finals", "alert", "notice", "status", "refused"}


STATES = {
    "idle": "",
    "running": "() => { setMode('live', 'mic'); status('Listening'); talk(3); talk(1, false); addDelays([700]); }",
    "settings": "() => showPanel(true)",
    "messages": """() => {
        showPanel(false);
        alert('no sound', 'Start again.', ['Start', () => {}]);
        message('notice', 'done');
    }""",
    "reconnecting": """() => {
        const away = { lostAt: Date.now(), reconnecting: true, bufferedBytes: 9, bytesPerSecond: 1, reason: 'offline' };
        showConnection(away);
        showConnection({ ...away, full: true });
    }""",
    "file": "() => { setMode('live', 'file'); view.scrollTop = 0; }",
    "menu": "() => { showPanel(false); document.getElementById('download').click(); }",
    "key": "() => { document.getElementById('formats').hidePopover(); document.getElementById('keys').showModal(); }",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_accessibility(browser: Any, scripted: ScriptedServer, size: str, scheme: str) -> None:
    """axe-core finds no violations in any state."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    scripted.ready["note"] = "The demo model is in use."
    scripted.ready["chunks_ms"] = [80, 160, 560, 1120]
    with open_page(browser, scripted.proxy.url, size, color_scheme=scheme, reduced_motion="reduce") as page:
        page.evaluate(TALK)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) > 600) is (scheme == "light")
        for name, script in STATES.items():
            if size != "phone" and name in ("messages", "file", "key"):  # which look the same
                continue
            if script:
                page.evaluate(script)
            results = axe.run(page)
            assert results.violations_count == 0, (name, results.generate_report())
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
            small = page.evaluate(
                "[...document.querySelectorAll('button, select, .choice label')].filter((one) => "
                "one.checkVisibility() && one.getBoundingClientRect().height < 40).map((one) => one.outerHTML)"
            )
            assert small == [], name
