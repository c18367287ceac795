"""The synthetic checkpoint: the same from the same seed, lifelike where it must be, of the published shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("nemo")

from nemostream.benchmarks.synthetic import Sizes, model_config, synthetic_model

pytestmark = pytest.mark.nemo

TINY: dict[str, Any] = {"n_layers": 1, "d_model": 32, "n_heads": 2, "conv_channels": 8, "vocab": 64}
TINY |= {"pred_hidden": 24, "joint_hidden": 24}


def weights(checkpoint: Path) -> dict[str, NDArray[np.float32]]:
    from nemo.collections.asr.models import ASRModel

    model = ASRModel.restore_from(str(checkpoint), map_location="cpu")
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_same_seed_same_weights(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    first = weights(synthetic_model(tmp_path / "a.nemo", seed=1, **TINY))
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    again_path = synthetic_model(tmp_path / "b.nemo", seed=1, **TINY)
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's random numbers are disturbed
    again = weights(again_path)
    other = weights(synthetic_model(tmp_path / "c.nemo", seed=2, **TINY))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["joint.enc.weight"], other["joint.enc.weight"])


def test_nothing_is_at_a_default_that_hides_mistakes(tmp_path: Path) -> None:
    options = {"conv_norm_type": "batch_norm", "use_bias": True, "xscaling": True, "pred_layers": 1}
    state = weights(synthetic_model(tmp_path / "x.nemo", **TINY, **options))
    constants = ("preprocessor.", "num_batches_tracked")
    for name, tensor in state.items():
        if not any(part in name for part in constants):
            assert tensor.std() > 0.01, name


def test_speaks_like_a_speaker(tiny_checkpoint: Path, clips: dict[str, NDArray[np.float32]]) -> None:
    """On speech it was not calibrated on: two to six labels a second, seldom several at one frame, and many kinds."""
    import torch
    from nemo.collections.asr.models import ASRModel

    model = ASRModel.restore_from(str(tiny_checkpoint), map_location="cpu").eval()
    for name in ("librispeech-1088-134315-0000", "librivox-sense-0870"):
        audio = torch.from_numpy(clips[name])[None]
        with torch.inference_mode():
            mel, length = model.preprocessor(input_signal=audio, length=torch.tensor([audio.shape[1]]))
            encoded, length = model.encoder(audio_signal=mel, length=length)
            (said,) = model.decoding.rnnt_decoder_predictions_tensor(encoded, length, return_hypotheses=True)
        rate = len(said.y_sequence) / (audio.shape[1] / 16000)
        assert 2 <= rate <= 6, f"{name}: {rate:.1f} labels a second"
        assert len(set(said.timestamp)) > 0.8 * len(said.y_sequence)
        assert len(set(said.y_sequence.tolist())) > 0.4 * len(said.y_sequence)


def test_full_size_has_its_number_of_parameters() -> None:
    from nemo.core.classes import Serialization

    def parameters(layers: int) -> int:
        encoder = Serialization.from_config_dict(model_config(Sizes(n_layers=layers), Path("nowhere")).encoder)
        return sum(parameter.numel() for parameter in encoder.parameters())

    one, two = parameters(1), parameters(2)
    assert round((one + (Sizes().n_layers - 1) * (two - one)) / 1e6, 1) == 609.1  # 609.6 if it had biases
