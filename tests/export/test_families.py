"""Prompted, hybrid and multitalker models: each graph is compared with NeMo's own class of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from nemostream.benchmarks.harness.synthetic import Sizes, model_config, train_tokenizer
from nemostream.bundle import Bundle
from nemostream.clips import read_clip
from nemostream.export.bundle import write_bundle
from nemostream.export.checkpoint import open_checkpoint
from nemostream.step_loop import padded_chunks, run_steps

pytestmark = pytest.mark.nemo

Floats = NDArray[np.float32]

TINY = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 2,
    "conv_channels": 16,
    "pred_hidden": 24,
    "joint_hidden": 24,
    "vocab": 96,
}
ASR = "nemo.collections.asr.models"
PROMPTS = {"en": 0, "en-US": 0, "ja-JA": 3, "ja-JP": 3, "zh": 5, "auto": 6}
DEFAULTS = {"initialize_prompt_feature": True, "num_prompts": 7, "prompt_dictionary": PROMPTS}
AUX_CTC = {
    "ctc_loss_weight": 0.3,
    "ctc_reduction": "mean_batch",
    "decoder": {
        "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
        "feat_in": None,
        "num_classes": -1,
        "vocabulary": [],
    },
    "decoding": {"strategy": "greedy"},
}


def nemo_model(out: Path, target: str, changes: dict[str, Any], **sizes: Any) -> Any:
    """Create a model of a NeMo class with random weights, save it to `out`, and return it."""
    import torch
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    tiny = Sizes(**(TINY | sizes))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        train_tokenizer(out.parent, tiny.vocab, 0)
        config = OmegaConf.merge(model_config(tiny, out.parent), {"target": target, **changes})
        model = get_class(target)(cfg=config).eval()
        for name, parameter in model.named_parameters():
            if "kernel" in name:  # of the prompt, or of the speaker
                parameter.normal_(0, 0.1)
        model.save_to(str(out))
    return model


def write(checkpoint: Path, folder: Path) -> Bundle:
    (folder / "bundle").mkdir()
    return write_bundle(open_checkpoint(checkpoint, folder / "unpacked"), folder / "bundle", {})


class Rows:
    """A session of an encoder graph that repeats one stream in several rows, each with another prompt."""

    def __init__(self, bundle: Bundle, graph: str, prompts: list[int]) -> None:
        self.session = onnxruntime.InferenceSession(bundle.file(graph), providers=["CPUExecutionProvider"])
        self.prompts, self.get_outputs = prompts, self.session.get_outputs
        self.encoded: list[Floats] = []
        self.joint: list[Floats] = []

    def run(self, names: Any, feed: Any) -> list[Any]:
        rows = {name: np.repeat(value, len(self.prompts), axis=0) for name, value in feed.items()}
        outputs = self.session.run(names, rows | {"prompt": np.array(self.prompts)})
        by_name = dict(zip(names, outputs, strict=True))
        self.encoded.append(by_name["encoded"])
        self.joint.append(by_name["encoded_joint"])
        batch = [1 if name in ("k_new", "v_new", "conv_next") else 0 for name in names]
        return [output.take([0], axis) for output, axis in zip(outputs, batch, strict=True)]


@pytest.mark.parametrize("kind", ["rnnt_bpe_models_prompt.EncDecRNNTBPEModelWithPrompt"])
def test_prompted_models_equal_nemo_with_a_prompt_per_row(kind: str, tmp_path: Path) -> None:
    import torch

    changes = {"model_defaults": DEFAULTS, "aux_ctc": AUX_CTC}
    model = nemo_model(tmp_path / "prompted.nemo", f"{ASR}.{kind}", changes, contexts=((56, 3), (56, 0)))
    bundle = write(tmp_path / "prompted.nemo", tmp_path)
    audio = read_clip("speech", 16000)[: 5 * 16000]
    prompts = [6, 0, 3, 5]
    for chunk in bundle.manifest.chunks:
        features = onnxruntime.InferenceSession(bundle.file(f"features-{chunk.ms}ms"))
        rows = Rows(bundle, f"encoder-{chunk.ms}ms", prompts)
        steps = padded_chunks(bundle.manifest, chunk, audio)
        mel = np.concatenate([o["mel"][0] for o in run_steps(bundle.manifest, chunk, steps, features, rows)])
        mel = mel[7:][: bundle.manifest.mel_frames(len(audio))]
        model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        with torch.inference_mode():
            wanted, _ = model.forward(
                processed_signal=torch.from_numpy(mel.T[None].repeat(len(prompts), 0)),
                processed_signal_length=torch.tensor([len(mel)] * len(prompts)),
                prompt_indices=torch.tensor(prompts),
            )
            projected = model.joint.project_encoder(wanted.transpose(1, 2)).numpy()
        got, joint = (np.concatenate(parts, axis=1)[:, : wanted.shape[2]] for parts in (rows.encoded, rows.joint))
        np.testing.assert_allclose(got, wanted.transpose(1, 2).numpy(), rtol=0, atol=2e-5)
        np.testing.assert_allclose(joint, projected, rtol=0, atol=2e-5)
        differences = [np.abs(got[0] - row).max() for row in got[1:]]
        assert min(differences) > 0.1, "every prompt gives another output"
    languages = bundle.manifest.languages
    assert (languages.default, languages.count) == ("auto", 7)
    assert languages.names == ("en-US", "ja-JA", "zh", "auto") and languages.prompt("ja") == 3
