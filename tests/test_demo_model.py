"""The demo model's recipe and what it promises."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import nemostream
from nemostream.spec import Bundle, sha256

FOLDER = Path(__file__).parents[1] / "examples" / "demo_model"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_model_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.nemo
def test_the_loss_is_the_sum_over_all_paths() -> None:
    """Against Graves' definition itself: every alignment of a small lattice, one by one."""
    import torch

    rnnt_loss = recipe("rnnt_loss").rnnt_loss
    rng = np.random.default_rng(0)
    rows, steps, most, vocabulary, blank = 3, 4, 3, 5, 4
    logits = torch.from_numpy(rng.standard_normal((rows, steps, most + 1, vocabulary))).log_softmax(-1)
    logits.requires_grad_(True)
    targets = torch.from_numpy(rng.integers(0, blank, (rows, most)))
    frames, labels = [4, 3, 1], [3, 0, 2]
    loss = rnnt_loss(logits, targets, torch.tensor(frames), torch.tensor(labels), blank)
    for row in range(rows):
        total = -np.inf
        moves = ["blank"] * (frames[row] - 1) + ["label"] * labels[row]
        for path in set(itertools.permutations(moves)):
            t = u = 0
            score = 0.0
            for move in path:
                what = blank if move == "blank" else int(targets[row, u])
                score += float(logits[row, t, u, what])
                t, u = (t + 1, u) if move == "blank" else (t, u + 1)
            total = np.logaddexp(total, score + float(logits[row, t, u, blank]))
        assert float(loss[row]) == pytest.approx(-total, rel=1e-6)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert float(logits.grad[2, 1:].abs().sum()) == 0, "frames past a row's end have no part in its loss"


def test_the_package_carries_this_checkpoint(demo_bundle: Bundle) -> None:
    checkpoint = FOLDER / "demo.nemo"
    assert demo_bundle.manifest.checkpoint["sha256"] == sha256(checkpoint)
    bundled = sum(file.stat().st_size for file in demo_bundle.path.iterdir())
    assert checkpoint.stat().st_size + bundled <= 24e6
    assert [chunk.ms for chunk in demo_bundle.manifest.chunks] == [80, 160, 560, 1120]
    assert demo_bundle.manifest.features.mels == 128


def test_the_card_tells_what_was_measured() -> None:
    figures = json.loads((FOLDER / "demo.json").read_text())
    card = (FOLDER / "model_card.md").read_text()
    assert figures["held_out_clips"] >= 200
    assert figures["wer"]["560ms"]["held_out_synthetic"] <= 0.15
    for chunk in figures["wer"].values():
        assert f"{chunk['held_out_synthetic']:.1%}".replace("%", " %") in card
        assert f"{chunk['left_out_human']:.1%}".replace("%", " %") in card


def test_the_clip_is_heard() -> None:
    with nemostream.load() as model:
        assert model.transcribe(nemostream.demo_clip()).text == "two zero two six four one five eight"


def test_silence_and_noise_have_no_words() -> None:
    rng = np.random.default_rng(5)
    with nemostream.load() as model:
        for level in (0.0, 1e-4, 1e-2):
            noise = (rng.standard_normal(30 * 16000) * level).astype(np.float32)
            assert model.transcribe(noise).text == "", level
