"""The runner of transcribe.cpp on the packaged checkpoint, compared with nemostream."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nemostream import engines
from nemostream.benchmarks.harness import transcribe_cpp
from nemostream.benchmarks.harness.records import agreement
from nemostream.benchmarks.harness.runners import NemostreamRunner
from nemostream.benchmarks.harness.timed import AudioFeed, longest, timed_backend
from nemostream.bundle import Bundle, LanguageConfig
from nemostream.errors import BackendError, CheckpointError, OptionError

pytest.importorskip("yaml", reason="needs the export extra")

CHECKPOINT = Path(__file__).parents[3] / "examples" / "demo_model" / "demo.nemo"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The converted checkpoint by precision."""
    for package in ("transcribe_cpp", "gguf"):
        pytest.importorskip(package, reason="needs pip install transcribe-cpp gguf")
    folder = tmp_path_factory.mktemp("gguf")
    return {
        precision: transcribe_cpp.write_gguf(CHECKPOINT, folder / f"{precision}.gguf", precision)
        for precision in ("fp32", "fp16", "q8")
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "q8"])
@pytest.mark.parametrize("ms", [80, 560])
def test_tokens(demo_bundle: Bundle, gguf: dict[str, Path], ms: int, precision: str) -> None:
    """In fp32 and fp16 they equal those of nemostream in fp32, and most of them in 8 bit."""
    chunk, frames = demo_bundle.manifest.chunk(ms), 210
    clip = engines.speech(demo_bundle.manifest)[1]  # speech like the training data
    feed = AudioFeed(demo_bundle.manifest, np.append(clip, np.zeros(8000, np.float32)), 1, frames)
    tokens = []
    with timed_backend(demo_bundle, [*{chunk, longest(demo_bundle.manifest, chunk)}], "fp32", 1, threads=1) as backend:
        for runner in (
            NemostreamRunner("nemostream", backend, feed, chunk),
            transcribe_cpp.TranscribeCppRunner(gguf[precision], feed, chunk, 1, precision),
        ):
            runner.fill_caches(70)
            for position in range(70, frames, chunk.frames):
                runner.step(position)
            tokens.append(runner.tokens())
            runner.close()
    assert len(tokens[0][0]) > 40
    if precision == "q8":
        assert agreement(*tokens) > 0.9
    else:
        assert tokens[1] == tokens[0]


def test_a_step_processes_its_chunk(demo_bundle: Bundle, gguf: dict[str, Path]) -> None:
    """The encoder has read the mel frames of the chunk when the step ends: all but the last seven of 10 ms."""
    chunk = demo_bundle.manifest.chunk(160)
    feed = AudioFeed(demo_bundle.manifest, engines.speech(demo_bundle.manifest)[0], 1, 80)
    runner = transcribe_cpp.TranscribeCppRunner(gguf["q8"], feed, chunk, 1, "q8")
    for position in range(0, 80, 2):
        runner.step(position)
        assert runner.processed_ms == 80 * (position + 2) - 70
    runner.close()


def test_one_stream(demo_bundle: Bundle, gguf: dict[str, Path]) -> None:
    chunk = demo_bundle.manifest.chunk(560)
    feed = AudioFeed(demo_bundle.manifest, np.zeros(16000, np.float32), 2, 14)
    with pytest.raises(OptionError, match="one stream per model, not 2; choose --batch 1"):
        transcribe_cpp.TranscribeCppRunner(gguf["q8"], feed, chunk, 1, "q8")


@pytest.mark.parametrize("package", ["transcribe_cpp", "gguf"])
def test_missing_package(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    chunk = demo_bundle.manifest.chunk(560)
    feed = AudioFeed(demo_bundle.manifest, np.zeros(16000, np.float32), 1, 7)
    with pytest.raises(BackendError, match=f"{package}.*: pip install transcribe-cpp gguf"):
        if package == "gguf":
            transcribe_cpp.write_gguf(CHECKPOINT, tmp_path / "x.gguf", "q8")
        else:
            transcribe_cpp.TranscribeCppRunner(tmp_path / "x.gguf", feed, chunk, 1, "q8")


def test_prompts_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="needs pip install transcribe-cpp gguf")
    prompted = SimpleNamespace(languages=LanguageConfig("en", {"en": 0, "de": 1}, 2), speaker_kernels=())
    monkeypatch.setattr(transcribe_cpp, "open_checkpoint", lambda checkpoint, folder: prompted)
    with pytest.raises(CheckpointError, match=r"x\.nemo has language prompts or speaker kernels"):
        transcribe_cpp.write_gguf(Path("x.nemo"), tmp_path / "x.gguf", "q8")
