"""The NumPy reference equals NeMo and transformers: both, because no comparison of the exporter needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemostream.benchmarks.harness.synthetic import Sizes, model_config, synthetic_model, train_tokenizer
from nemostream.bundle import ChunkConfig
from nemostream.clips import read_clip
from nemostream.export.reference import NemoReference, NumpyReference, Reference, TransformersReference
from nemostream.export.sources import Source

pytestmark = pytest.mark.nemo

SIZES = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 2,
    "conv_channels": 16,
    "pred_hidden": 24,
    "joint_hidden": 40,
    "vocab": 96,
    "contexts": ((56, 3), (56, 0), (56, 13)),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "batch norm, biases and xscaling, tied position biases": {
        "conv_norm_type": "batch_norm",
        "use_bias": True,
        "xscaling": True,
        "untie_biases": False,
    },
    "subsampling by four, 80 mel bins, wide kernel, one LSTM layer": {
        "subsampling": 4,
        "mels": 80,
        "conv_kernel": 15,
        "pred_layers": 1,
    },
}
SAMPLES = 5 * 16000 + 137


def assert_equal(got: Reference, wanted: Reference, checkpoint: Any) -> None:
    """All outputs for the same inputs. The other implementation's fp32 arithmetic is the difference."""
    audio = read_clip("speech", 16000)[:SAMPLES]
    mel = wanted.features(audio)
    assert mel.shape == (SAMPLES // 160, checkpoint.features.mels)
    close(got.features(audio), mel, 1e-5)
    for chunk in checkpoint.chunks:
        encoded = wanted.encode(mel, chunk)
        assert np.std(encoded) > 0.1
        close(got.encode(mel, chunk), encoded, 2e-5)
        assert got.prompts == wanted.prompts == checkpoint.languages.count
        if wanted.prompts:
            prompts = np.arange(len(encoded)) % wanted.prompts
            prompted = wanted.apply_prompt(encoded, prompts)
            close(got.apply_prompt(encoded, prompts), prompted, 1e-5)
            assert np.abs(prompted - wanted.apply_prompt(encoded, prompts[::-1].copy())).max() > 1e-2
    other = ChunkConfig(560, 7, 56, 8960)
    assert np.abs(got.encode(mel, other) - encoded).max() > 1e-3, "the chunk size matters"
    tokens = [checkpoint.decoder.blank, 5, 1, 1, 95]
    predicted = wanted.predict(tokens)
    close(got.predict(tokens), predicted, 1e-5)
    projected = wanted.project(encoded)
    close(got.project(encoded), projected, 1e-5)
    joined = wanted.join(projected[: len(tokens)], predicted)
    assert joined.shape == (len(tokens), checkpoint.decoder.vocabulary + 1)
    close(got.join(projected[: len(tokens)], predicted), joined, 1e-5)


def close(got: NDArray[Any], wanted: NDArray[Any], tolerance: float) -> None:
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


def test_numpy_equals_nemo_with_the_options_of_the_english_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Source("tiny", tiny_checkpoint).open(tmp_path / "unpacked")
    assert_equal(NumpyReference(checkpoint), NemoReference(tiny_checkpoint), checkpoint)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_numpy_equals_nemo(changes: dict[str, Any], tmp_path: Path) -> None:
    path = synthetic_model(tmp_path / "variant.nemo", **(SIZES | changes))
    checkpoint = Source("variant", path).open(tmp_path / "unpacked")
    assert_equal(NumpyReference(checkpoint), NemoReference(path), checkpoint)


def test_numpy_equals_nemo_for_one_speaker_of_a_multitalker_model(tmp_path: Path) -> None:
    import torch
    from nemo.collections.asr.models import EncDecMultiTalkerRNNTBPEModel
    from omegaconf import OmegaConf

    sizes = Sizes(**(SIZES | {"n_layers": 1, "contexts": ((56, 3),)}))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        train_tokenizer(tmp_path, sizes.vocab, 0)
        speaker = {"spk_kernel_type": "ff", "spk_kernel_layers": [0], "add_bg_spk_kernel": True}
        target = "nemo.collections.asr.models.multitalker_asr_models.EncDecMultiTalkerRNNTBPEModel"
        config = OmegaConf.merge(model_config(sizes, tmp_path), {"target": target, **speaker})
        EncDecMultiTalkerRNNTBPEModel(cfg=config).eval().save_to(str(tmp_path / "speakers.nemo"))
    checkpoint = Source("speakers", tmp_path / "speakers.nemo").open(tmp_path / "unpacked")
    assert len(checkpoint.speaker_kernels) == 2
    assert_equal(NumpyReference(checkpoint), NemoReference(tmp_path / "speakers.nemo"), checkpoint)


@pytest.mark.parametrize("options", [{"xscaling": False}, {"xscaling": True, "biases": True}], ids=str)
def test_numpy_equals_transformers(
    options: dict[str, bool], transformers_factory: Callable[..., Path], tmp_path: Path
) -> None:
    encoder = {
        "scale_input": options["xscaling"],
        "attention_bias": options.get("biases", False),
        "convolution_bias": options.get("biases", False),
    }
    folder = transformers_factory(tmp_path / "model", prompted=options["xscaling"], encoder=encoder)
    checkpoint = Source("model", folder).open(tmp_path / "unpacked")
    assert_equal(NumpyReference(checkpoint), TransformersReference(folder, checkpoint), checkpoint)
