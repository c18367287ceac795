"""Synthetic checkpoints: reproducible, with a realistic token rate and the properties of the published models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("nemo")

from nemostream.benchmarks.harness.synthetic import FAMILIES, Sizes, model_config, speech, synthetic_model
from nemostream.benchmarks.harness.timed import AudioFeed, timed_backend
from nemostream.benchmarks.harness.tokenizers import train_tokenizer, write_multilingual_tokenizer
from nemostream.bundle import Bundle
from nemostream.export import export_checkpoint
from nemostream.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.nemo

TINY: dict[str, Any] = {"n_layers": 1, "d_model": 32, "n_heads": 2, "conv_channels": 8, "vocab": 64}
TINY |= {"pred_hidden": 24, "joint_hidden": 24}


def weights(checkpoint: Path) -> dict[str, NDArray[np.float32]]:
    from nemo.collections.asr.models import ASRModel

    model = ASRModel.restore_from(str(checkpoint), map_location="cpu")
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_labels_are_counted_as_row_by_row() -> None:
    """The plain twin of the count over all rows: one row, frame and label after another."""
    import torch
    from nemo.collections.asr.modules import RNNTDecoder, RNNTJoint

    from nemostream.benchmarks.harness import random_weights

    def count(model: Any, frames: Any, blank_bias: float) -> int:
        blank, found = model.joint.num_classes_with_blank - 1, 0
        output, state = model.decoder.predict(torch.tensor([[blank]]), None, add_sos=False)
        for t, frame in enumerate(frames):
            for _ in range(random_weights.MAX_SYMBOLS):
                logits = model.joint.joint_net(frame + model.joint.project_prednet(output)[0, 0])
                logits[blank] += blank_bias
                label = int(logits.argmax())
                if label == blank:
                    break
                found += t >= len(frames) // 2
                output, state = model.decoder.predict(torch.tensor([[label]]), state, add_sos=False)
        return found

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        sizes = {"pred_hidden": 16, "encoder_hidden": 16, "joint_hidden": 24, "activation": "relu"}
        decoder = RNNTDecoder({"pred_hidden": 16, "pred_rnn_layers": 2}, vocab_size=30).eval()
        joint = RNNTJoint(sizes, num_classes=30, vocabulary=[str(label) for label in range(30)]).eval()
        for parameter in (*decoder.parameters(), *joint.parameters()):
            parameter *= 3  # so that the state matters
        model = SimpleNamespace(decoder=decoder, joint=joint)
        frames, blank_bias = torch.randn(16, 20, 24), torch.linspace(0.0, 6.0, 16)
        found = random_weights._count_labels(model, frames, blank_bias).tolist()
        assert found == [count(model, *row) for row in zip(frames, blank_bias.tolist(), strict=True)]
    assert len(set(found)) > 8 and max(found) > 50 > 10 > min(found)


@pytest.mark.slow
def test_same_seed_same_weights(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    first = weights(synthetic_model(tmp_path / "a.nemo", seed=1, **TINY))
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    again_path = synthetic_model(tmp_path / "b.nemo", seed=1, **TINY)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global random state does not change
    again = weights(again_path)
    other = weights(synthetic_model(tmp_path / "c.nemo", seed=2, **TINY))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["joint.enc.weight"], other["joint.enc.weight"])


def test_no_parameter_is_constant(tmp_path: Path) -> None:
    options = {"conv_norm_type": "batch_norm", "use_bias": True, "xscaling": True, "pred_layers": 1}
    state = weights(synthetic_model(tmp_path / "x.nemo", **TINY, **options))
    constants = ("preprocessor.", "num_batches_tracked")
    for name, tensor in state.items():
        if not any(part in name for part in constants):
            assert tensor.std() > 0.01, name


def test_token_rate_is_realistic(tiny_checkpoint: Path, clips: dict[str, NDArray[np.float32]]) -> None:
    """With full caches: the rate of speech on the clip of the benchmarks, near it on other speakers.

    Several labels at one frame are rare, and there are many different labels.
    """
    import torch
    from nemo.collections.asr.models import ASRModel

    model = ASRModel.restore_from(str(tiny_checkpoint), map_location="cpu").eval()
    others = np.concatenate(list(clips.values()))
    for audio, min_rate, max_rate in ((np.tile(speech(), 2), 3.0, 4.0), (others, 1.5, 6.0)):
        samples = torch.from_numpy(audio)[None]
        with torch.inference_mode():
            mel, length = model.preprocessor(input_signal=samples, length=torch.tensor([samples.shape[1]]))
            encoded, length = model.encoder(audio_signal=mel, length=length)
            (hypothesis,) = model.decoding.rnnt_decoder_predictions_tensor(encoded, length, return_hypotheses=True)
        settled = [frame for frame in hypothesis.timestamp if frame >= encoded.shape[2] // 2]
        rate = len(settled) / (len(audio) / 16000 / 2)
        assert min_rate <= rate <= max_rate, f"{rate:.1f} labels per second"
        assert len(set(settled)) > 0.8 * len(settled)
        assert len(set(hypothesis.y_sequence.tolist())) > 0.4 * min(len(hypothesis.y_sequence), 100)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nemostream.cli.main import _run

    options = [f"--{name.removeprefix('n_').replace('_', '-')}={value}" for name, value in TINY.items()]
    assert _run(["bench", "synthetic", str(tmp_path / "x.nemo"), "--seed", "3", *options]) == 0
    assert f"wrote {tmp_path / 'x.nemo'}" in capsys.readouterr().out
    assert weights(tmp_path / "x.nemo")["encoder.pre_encode.out.weight"].shape[0] == TINY["d_model"]


@pytest.mark.slow
@pytest.mark.parametrize("ms", [560, 1120])
def test_token_rate_of_the_full_size_model(ms: int, full_bundle: Bundle) -> None:
    """With full caches, as measured by benchmarks: eight streams."""
    chunk = full_bundle.manifest.chunk(ms)
    settling, counted = 18_000 // ms, 9_000 // ms
    feed = AudioFeed(full_bundle.manifest, speech(), 8, (settling + counted) * chunk.frames)
    labels = 0
    with timed_backend(full_bundle, [chunk], "fp32", 8) as backend:
        backend.reset(np.arange(8))
        for step in range(settling + counted):
            tokens = backend.submit(feed.batch(chunk, step * chunk.frames)).result().tokens
            labels += sum(map(len, tokens)) if step >= settling else 0
    assert 3 <= labels / (8 * counted * ms / 1000) <= 4.5


def parameters(sizes: Sizes) -> int:
    """Return the number of parameters of the model, from an encoder of one and of two layers."""
    from nemo.core.classes import Serialization

    def count(sizes: Sizes) -> int:
        encoder = Serialization.from_config_dict(model_config(sizes, Path("nowhere")).encoder)
        return sum(parameter.numel() for parameter in encoder.parameters())

    one, two = count(replace(sizes, n_layers=1)), count(replace(sizes, n_layers=2))
    return one + (sizes.n_layers - 1) * (two - one)


def test_number_of_parameters_of_the_full_size_model() -> None:
    encoder = parameters(Sizes())
    assert round(encoder / 1e6, 1) == 609.1  # 609.6 with biases
    # The published tensors of nemotron-3.5-asr-streaming-0.6b have 637,997,088 elements.
    sizes = replace(Sizes(), **FAMILIES["nemotron-3.5"])
    outputs, hidden, width = sizes.vocab + 1, sizes.pred_hidden, sizes.d_model
    lstm = sizes.pred_layers * 8 * hidden * (hidden + 1)
    joint = sizes.joint_hidden * (width + 1 + hidden + 1) + outputs * (sizes.joint_hidden + 1)
    prompts = 2 * width * (width + sizes.num_prompts + 1) + width * (2 * width + 1)
    assert encoder + outputs * hidden + lstm + joint + prompts == 637_997_088


# -- families ----------------------------------------------------------------------------------------------------------

# Two layers, so that there is a layer after the first; few pieces, but every kind of them.
SMALL: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 2, "conv_channels": 8}
SMALL |= {"pred_hidden": 24, "joint_hidden": 24}
PIECES = {"nemotron-3.5": 400, "eou-120m": 66, "hybrid-large": 64}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Bundle]]:
    """Return the checkpoint and the bundle of a family, created on first use."""
    folder = tmp_path_factory.mktemp("families")

    def make(like: str) -> tuple[Path, Bundle]:
        path, bundle = folder / f"{like}.nemo", folder / like
        if not path.is_file():
            synthetic_model(path, 0, like, **SMALL, vocab=PIECES[like])
            export_checkpoint(path, bundle)
        return path, Bundle.open(bundle)

    return make


def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer(bundle.path / "tokenizer.model", bundle.manifest.decoder.vocabulary)


@pytest.mark.parametrize("like", PIECES)  # the English one is the model of most tests
def test_families_are_restored_and_exported(like: str, family: Callable[[str], tuple[Path, Bundle]]) -> None:
    """NeMo restores the class of the published checkpoint; the bundle has passed parity at every chunk size."""
    from nemo.collections.asr.models import ASRModel

    path, bundle = family(like)
    model = ASRModel.restore_from(str(path), map_location="cpu")
    classes = {"nemotron-3.5": "EncDecRNNTBPEModelWithPrompt", "hybrid-large": "EncDecHybridRNNTCTCBPEModel"}
    assert type(model).__name__ == classes.get(like, "EncDecRNNTBPEModel")
    chunks = {"nemotron-3.5": [80, 320, 560, 1120], "eou-120m": [160], "hybrid-large": [80, 160, 560, 1120]}
    assert [chunk.ms for chunk in bundle.manifest.chunks] == chunks[like]
    assert model.joint.num_classes_with_blank == PIECES[like] + 1 == bundle.manifest.decoder.vocabulary + 1
    assert bundle.manifest.features.mels == (80 if like == "hybrid-large" else 128)


def test_the_prompted_family(family: Callable[[str], tuple[Path, Bundle]]) -> None:
    """The bundle has the prompts, and the tokenizer tags, wide characters and punctuation of several scripts."""
    _, bundle = family("nemotron-3.5")
    languages, text = bundle.manifest.languages, tokenizer(bundle)
    assert languages.count == 128 and languages.prompt("auto") == 101
    assert languages.prompt("de") == languages.prompt("de-DE") == 9
    assert {"en-US", "de-DE", "ja-JP", "th-TH", "zh-CN", "sl-SL"} <= set(text.languages.values())
    assert sorted(text.languages) != list(
        range(min(text.languages), max(text.languages) + 1)
    )  # scattered, as published
    for phrase in ("一丁七", "ก", "ぁ", "א", "¿", "？", "。"):
        assert text.unknown not in text.encode(phrase), phrase
        assert text.decode(text.encode(phrase)) == phrase


def test_the_family_with_control_tokens(family: Callable[[str], tuple[Path, Bundle]]) -> None:
    """They are the last two pieces, as 1024 and 1025 of the published model, and no part of a text."""
    _, bundle = family("eou-120m")
    text = tokenizer(bundle)
    assert (text.end_of_utterance, text.backchannel) == (PIECES["eou-120m"] - 2, PIECES["eou-120m"] - 1)
    assert text.decode([*text.encode("a"), text.end_of_utterance]) == "a"
    assert replace(Sizes(), **FAMILIES["eou-120m"]).vocab - 2 == 1024


def test_the_prompt_changes_the_tokens(family: Callable[[str], tuple[Path, Bundle]]) -> None:
    """Otherwise a parity check on this checkpoint would not find a graph without prompts."""
    import nemostream

    _, bundle = family("nemotron-3.5")
    with nemostream.load(bundle.path) as model:
        results = {name: model.transcribe(speech(), language=name).tokens for name in ("en-US", "de-DE", "auto")}
    assert len({tuple(tokens) for tokens in results.values()}) == 3
    assert all(len(tokens) > 5 for tokens in results.values())


def test_punctuation_and_capital_letters_of_the_english_family(tmp_path: Path) -> None:
    sizes = replace(Sizes(), **FAMILIES["nemotron-en"])
    train_tokenizer(tmp_path, sizes.vocab, 0, sizes.piece_model, sizes.punctuation, sizes.controls)
    text = Tokenizer(tmp_path / "tokenizer.model", 1024)
    assert text.unknown not in text.encode("Tea, no? Go!") and not text.tags
    assert text.decode(text.encode("Tea, no? Go!")) == "Tea, no? Go!"


def test_the_published_number_of_pieces(tmp_path: Path) -> None:
    """A tokenizer of full size, with the ids of its tags reproducible."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_multilingual_tokenizer(tmp_path / name, 13087, seed=3)
    first, again = (Tokenizer(tmp_path / name / "tokenizer.model", 13087) for name in "ab")
    assert first.languages == again.languages and len(first.languages) >= 16
    with pytest.raises(ValueError, match="vocab is 30"):
        write_multilingual_tokenizer(tmp_path / "a", 30, seed=3)
