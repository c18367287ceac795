"""Prompted, hybrid and multitalker models: each graph is compared with NeMo's own class of the model."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from numpy.typing import NDArray

from nemostream.benchmarks.harness.synthetic import Sizes, model_config, train_tokenizer
from nemostream.bundle import Bundle, LanguageConfig
from nemostream.cli import models
from nemostream.cli.main import main
from nemostream.clips import read_clip
from nemostream.errors import ParityError
from nemostream.export import checkpoint, export_checkpoint
from nemostream.export.bundle import write_bundle
from nemostream.export.checkpoint import open_checkpoint
from nemostream.export.parity import TOLERANCE
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


def write(path: Path, folder: Path) -> Bundle:
    (folder / "bundle").mkdir()
    return write_bundle(open_checkpoint(path, folder / "unpacked"), folder / "bundle", {})


def set_field(path: Path, section: str, field: str, value: Any) -> None:
    """Change a field of the configuration in a `.nemo` file."""
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member)) for member in archive]
        contents = {member.name: file.read() for member, file in members if file is not None}
    name = next(name for name in contents if name.endswith("model_config.yaml"))
    config = yaml.safe_load(contents[name])
    config[section][field] = value
    contents[name] = yaml.safe_dump(config).encode()
    with tarfile.open(path, "w") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


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


@pytest.mark.parametrize(
    "kind",
    [
        "rnnt_bpe_models_prompt.EncDecRNNTBPEModelWithPrompt",
        "hybrid_rnnt_ctc_bpe_models_prompt.EncDecHybridRNNTCTCBPEModelWithPrompt",
    ],
)
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


def test_multitalker_models_equal_nemo_for_one_speaker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without speaker targets, NeMo's encoder applies the speaker kernel to all frames, the other one to none."""
    speaker = {"spk_kernel_type": "ff", "spk_kernel_layers": [0], "add_bg_spk_kernel": True}
    target = f"{ASR}.multitalker_asr_models.EncDecMultiTalkerRNNTBPEModel"
    changes = {**speaker, "model_defaults": {"enc_hidden": 32}}
    nemo_model(tmp_path / "speakers.nemo", target, changes, n_layers=1, contexts=((70, 1),))
    exported = export_checkpoint(tmp_path / "speakers.nemo", tmp_path / "exported").manifest
    assert 0 < exported.parity["160ms"]["encoder"] <= TOLERANCE
    # Without the kernels the output is another one.
    monkeypatch.setattr(checkpoint, "_speaker_kernels", lambda config: ())
    with pytest.raises(ParityError, match="encoder-160ms differs"):
        export_checkpoint(tmp_path / "speakers.nemo", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_hybrid_model_of_another_language_and_one_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a beam search in the configuration, which is reported, a field of another version, and xscaling."""
    monkeypatch.setattr(models, "_silence_libraries", lambda: None)  # it changes the process
    changes = {
        "aux_ctc": AUX_CTC,
        "encoder": {"att_context_size": [70, 6]},
        "decoding": {"strategy": "beam", "beam": {"beam_size": 2}},
        "loss": {"loss_name": "pytorch"},
    }
    target = f"{ASR}.hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel"
    nemo_model(tmp_path / "hybrid.nemo", target, changes, n_layers=1, pred_layers=1, xscaling=True, mels=80)
    set_field(tmp_path / "hybrid.nemo", "encoder", "conv_context_style", None)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "hybrid.nemo"), str(tmp_path / "exported"), "--language", "hi_IN"])
    assert not ended.value.code
    manifest = Bundle.open(tmp_path / "exported").manifest
    assert 0 < manifest.parity["560ms"]["encoder"] <= TOLERANCE
    assert [chunk.ms for chunk in manifest.chunks] == [560]
    assert manifest.languages == LanguageConfig("hi-IN")
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(tmp_path / "exported")
    assert "warning: decoding.strategy is 'beam', but nemostream decodes greedily" in printed.err
