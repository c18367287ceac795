"""The demo model: its training recipe, its figures, and the packaged bundle."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import nemostream
from nemostream.bundle import Bundle, sha256
from nemostream.clips import CLIP_TEXT

FOLDER = Path(__file__).parents[1] / "examples" / "demo_model"


def recipe(name: str) -> ModuleType:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # its files import each other
    spec = importlib.util.spec_from_file_location(f"demo_model_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.nemo
@pytest.mark.parametrize("whole_lattice", [True, False])
def test_the_loss_is_the_sum_over_all_paths_in_the_band(whole_lattice: bool) -> None:
    """Compare with Graves' definition: enumerate all alignments of a small lattice."""
    import torch

    recipe_loss = recipe("rnnt_loss")
    rng = np.random.default_rng(0)
    frames, labels = [5, 3, 1], [3, 0, 2]
    times = [[-1] * count for count in labels] if whole_lattice else [[1, 1, 3], [], [0, 0]]
    first, cells = recipe_loss.band(times, frames, early=0, late=2)
    width = int(cells.max())
    stay, emit = (torch.from_numpy(rng.uniform(-3, -0.1, (3, 5, width))).requires_grad_(True) for _ in range(2))
    loss = recipe_loss.band_loss(stay, emit, first, cells, torch.tensor(frames), torch.tensor(labels))
    for row in range(3):
        total = -np.inf
        moves = ["blank"] * (frames[row] - 1) + ["label"] * labels[row]
        for path in set(itertools.permutations(moves)):
            t = u = 0
            score = 0.0
            for move in [*path, "blank"]:
                s = u - int(first[row, t])
                if not 0 <= s < int(cells[row, t]) or (move == "label" and s + 1 >= int(cells[row, t])):
                    score = -np.inf
                    break
                score += float((stay if move == "blank" else emit)[row, t, s])
                t, u = (t + 1, u) if move == "blank" else (t, u + 1)
            total = np.logaddexp(total, score)
        assert float(loss[row]) == pytest.approx(-total, abs=1e-6)

    def of(stay: torch.Tensor, emit: torch.Tensor) -> torch.Tensor:
        return recipe_loss.band_loss(stay, emit, first, cells, torch.tensor(frames), torch.tensor(labels))

    assert torch.autograd.gradcheck(of, (stay, emit)), "the gradient equals finite differences"
    loss.sum().backward()
    assert float(stay.grad[2, 1:].abs().sum()) == 0, "frames after the end of a row do not contribute to its loss"


@pytest.mark.nemo
def test_the_band_starts_at_the_end_of_a_word() -> None:
    first, cells = recipe("rnnt_loss").band([[2, 4]], [8], early=0, late=2)
    # Label counts allowed at each frame: a label is emitted at its time, or up to two frames later.
    low, high = first[0].tolist(), (first + cells - 1)[0].tolist()
    assert low == [0, 0, 0, 0, 0, 1, 1, 2]
    assert high == [0, 0, 1, 1, 2, 2, 2, 2]


def test_numbers_are_spelled_out() -> None:
    inflect = pytest.importorskip("inflect").engine()
    sentences = recipe("sentences")
    for n in [*range(131), 199, 200, 342, 1000, 1001, 20_015, 999_999, 1_000_000, 6_310_402]:
        wanted = inflect.number_to_words(n, andword="").replace(",", "").replace("-", " ")
        assert sentences.cardinal(n) == wanted
        assert sentences.ordinal(n) == inflect.ordinal(wanted)
    assert [sentences.year(n) for n in (1705, 1900, 1984, 2004, 2031)] == [
        "seventeen oh five",
        "nineteen hundred",
        "nineteen eighty four",
        "two thousand four",
        "twenty thirty one",
    ]


def test_held_out_texts_do_not_depend_on_case_or_punctuation() -> None:
    texts = recipe("texts")
    sentences = [
        f"Press {a} to call {b}." for a in ("one", "two", "nine", "star") for b in ("Anna", "Bob", "me", "Rome")
    ]
    held_out = [texts.is_held_out(text) for text in sentences]
    assert held_out == [texts.is_held_out(text.upper().replace(".", "!")) for text in sentences]
    spread = sum(texts.is_held_out(str(n) + " " + chr(97 + n % 26) * (n // 26 + 1)) for n in range(2000)) / 2000
    assert 1 / 16 * 0.6 < spread < 1 / 16 * 1.4


def test_grammar_sentences_consist_of_words() -> None:
    """No unexpanded rule, option or alternative remains in a sentence."""
    sentences = recipe("sentences")
    if not recipe("texts").WORDNET.is_dir():
        pytest.skip("needs Debian's wordnet-base")
    grammar = sentences.Grammar(FOLDER / "grammar.txt", random.Random(4))
    for rule in ("prompt", "command", "everyday"):
        for _ in range(800):
            sentence = sentences.tidy(grammar.expand(rule), True)
            assert re.fullmatch(r"[A-Za-z',.?! ]+", sentence), sentence
            assert not re.search(r"\b[A-Z]{2,}\b", sentence), sentence


@pytest.mark.nemo
def test_token_times_are_proportional_to_letters() -> None:
    pieces = ["▁Wash", "ing", "▁up", "."]

    class Pieces:
        def encode(self, text: str, out_type: type = int) -> list:
            return pieces if out_type is str else list(range(4))

    clips = recipe("mixer").Clips.__new__(recipe("mixer").Clips)
    clips.pieces = Pieces()
    tokens, times = clips.tokens("Washing up.", [0.0, 1.0], [0.7, 1.4])
    assert tokens == [0, 1, 2, 3]
    assert times == pytest.approx([0.4, 0.7, 1.4, 1.4])
    assert clips.tokens("Washing up.", None, None)[1].size == 0


@pytest.mark.nemo
def test_word_error_rates_equal_jiwers() -> None:
    """The rates of `evaluate.py`, which runs nemostream, equal those of jiwer."""
    jiwer = pytest.importorskip("jiwer", reason="needs the bench extra")
    import soundfile

    evaluate = recipe("evaluate")
    rows = [json.loads(line) for line in (FOLDER / "heldout" / "heldout.jsonl").read_text().splitlines()][:4]
    clips = [
        evaluate.Scored(soundfile.read(FOLDER / "heldout" / row["audio_filepath"], dtype="float32")[0], row["text"], "")
        for row in rows
    ]
    clips[0].text += " and more"  # at least two errors
    with nemostream.load(threads=1, capacity=8) as model:
        results = evaluate.transcribe(model, clips, 560)
    found, transcripts = (
        evaluate.rate(clips, results),
        [re.sub("[.,?!]", "", result.text.lower()) for result in results],
    )
    wanted = jiwer.wer([re.sub("[.,?!]", "", clip.text.lower()) for clip in clips], transcripts)
    assert 0 < wanted == pytest.approx(found["wer"], abs=1e-4)
    assert found["clips"] == 4 and found["exact_match"] <= 0.75
    tokens = sum(len(result.tokens) for result in results)
    seconds = sum(len(clip.audio) for clip in clips) / 16000
    assert evaluate.emission(clips, results)["tokens_per_second"] == pytest.approx(tokens / seconds, abs=1e-3)


def test_the_packaged_bundle_is_of_this_checkpoint(demo_bundle: Bundle) -> None:
    checkpoint = FOLDER / "demo.nemo"
    assert demo_bundle.manifest.checkpoint["sha256"] == sha256(checkpoint)
    bundled = sum(file.stat().st_size for file in demo_bundle.path.iterdir())
    assert checkpoint.stat().st_size + bundled <= 24e6
    assert [chunk.ms for chunk in demo_bundle.manifest.chunks] == [80, 160, 560, 1120]
    assert demo_bundle.manifest.features.mels == 128


def test_the_model_card_has_the_measured_figures() -> None:
    figures = json.loads((FOLDER / "demo.json").read_text())
    card = (FOLDER / "model_card.md").read_text()
    sets = {"held_out": 500, "free": 200, "digits": 80, "prompts": 90, "people": 5}
    for chunk in ("80ms", "160ms", "560ms", "1120ms"):
        found = figures["chunks"][chunk]
        for name, clips in sets.items():
            assert found[name]["clips"] >= clips
            assert found[name]["wer"] == pytest.approx(found[name]["errors"] / found[name]["words"], abs=1e-4)
        rates = " | ".join(f"{found[name]['wer']:.1%}".replace("%", " %") for name in sets)
        assert f"| {chunk} | {rates} |" in card


def test_the_clip_is_transcribed_without_error() -> None:
    with nemostream.load() as model:
        assert model.transcribe(nemostream.demo_clip()).text == CLIP_TEXT


def test_no_words_are_emitted_for_silence_and_noise() -> None:
    rng = np.random.default_rng(5)
    with nemostream.load() as model:
        for level in (0.0, 1e-4, 1e-2):
            noise = (rng.standard_normal(30 * 16000) * level).astype(np.float32)
            assert model.transcribe(noise).text == "", level
