"""The synthetic checkpoint: reproducible, with a realistic token rate and the shape of the published model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("nemo")

from nemostream.benchmarks.harness.synthetic import Sizes, model_config, speech, synthetic_model
from nemostream.benchmarks.harness.timed import AudioFeed, timed_backend
from nemostream.bundle import Bundle

pytestmark = pytest.mark.nemo

TINY: dict[str, Any] = {"n_layers": 1, "d_model": 32, "n_heads": 2, "conv_channels": 8, "vocab": 64}
TINY |= {"pred_hidden": 24, "joint_hidden": 24}


def weights(checkpoint: Path) -> dict[str, NDArray[np.float32]]:
    from nemo.collections.asr.models import ASRModel

    model = ASRModel.restore_from(str(checkpoint), map_location="cpu")
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


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


def test_number_of_parameters_of_the_full_size_model() -> None:
    from nemo.core.classes import Serialization

    def parameters(layers: int) -> int:
        encoder = Serialization.from_config_dict(model_config(Sizes(n_layers=layers), Path("nowhere")).encoder)
        return sum(parameter.numel() for parameter in encoder.parameters())

    one, two = parameters(1), parameters(2)
    assert round((one + (Sizes().n_layers - 1) * (two - one)) / 1e6, 1) == 609.1  # 609.6 with biases
