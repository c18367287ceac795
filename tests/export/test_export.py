"""Export: supported and rejected checkpoints, and the files of a bundle. Every export is compared with NeMo."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from nemostream.benchmarks.harness.synthetic import synthetic_model
from nemostream.bundle import Bundle, Manifest, sha256
from nemostream.errors import CheckpointError, OptionError, ParityError
from nemostream.export import export_checkpoint
from nemostream.export.checkpoint import check_config, open_checkpoint, read_config
from nemostream.export.parity import MIN_STEPS, TOLERANCE, measure_parity
from nemostream.export.reference import NemoReference

pytestmark = pytest.mark.nemo

SMALL = {
    "n_layers": 1,
    "d_model": 32,
    "n_heads": 2,
    "conv_channels": 16,
    "pred_hidden": 24,
    "joint_hidden": 24,
    "vocab": 96,
    "contexts": ((70, 6), (70, 0)),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "batch norm": {"conv_norm_type": "batch_norm"},
    "biases": {"use_bias": True},
    "batch norm, biases and xscaling": {"conv_norm_type": "batch_norm", "use_bias": True, "xscaling": True},
    "tied position biases": {"untie_biases": False},
    "80 mel bins": {"mels": 80},
    "one LSTM layer": {"pred_layers": 1},
    "three LSTM layers": {"pred_layers": 3},
    "other contexts, of different lengths": {"contexts": ((56, 3), (28, 1), (40, 4))},
    "wider kernel, more layers and heads": {"conv_kernel": 31, "n_layers": 3, "n_heads": 4},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_supported_variant_equals_nemo(changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = synthetic_model(tmp_path / "variant.nemo", **(SMALL | changes))
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    for chunk in bundle.manifest.chunks:
        figures = bundle.manifest.parity[f"{chunk.ms}ms"]
        assert figures["steps"] >= MIN_STEPS
        assert 0 < figures["encoder"] <= TOLERANCE
        assert figures["features"] <= 1e-5


def test_subsampling_by_four(tmp_path: Path) -> None:
    checkpoint = synthetic_model(tmp_path / "four.nemo", **(SMALL | {"subsampling": 4}))
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    assert [chunk.ms for chunk in bundle.manifest.chunks] == [40, 280]
    assert bundle.manifest.encoder.mel_cache == 5


REJECTED = [
    ("target", "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE"),
    ("target", "nemo.collections.asr.models.rnnt_models.EncDecRNNTModel"),
    ("target", 5),
    ("model_defaults.initialize_prompt_feature", True),
    ("loss.loss_name", "tdt"),
    ("model_defaults.tdt_durations", [0, 1, 2, 3, 4]),
    ("decoding.durations", [0, 1, 2]),
    ("joint.num_extra_outputs", 5),
    ("encoder._target_", "nemo.collections.asr.modules.SqueezeformerEncoder"),
    ("encoder.att_context_style", "regular"),
    ("encoder.att_context_style", "chunked_limited_with_rc"),
    ("encoder.conv_context_style", "dcc"),
    ("encoder.att_context_size", [[-1, -1]]),
    ("encoder.att_context_size", [[70, 13], [70, 12]]),
    ("encoder.conv_context_size", None),
    ("encoder.causal_downsampling", False),
    ("encoder.subsampling", "striding"),
    ("encoder.subsampling_factor", 16),
    ("encoder.self_attention_model", "abs_pos"),
    ("encoder.conv_norm_type", "instance_norm"),
    ("encoder.reduction", "pooling"),
    ("preprocessor.normalize", "per_feature"),
    ("preprocessor.window", "hamming"),
    ("preprocessor.frame_splicing", 2),
    ("decoder._target_", "nemo.collections.asr.modules.StatelessTransducerDecoder"),
    ("decoder.normalization_mode", "layer"),
    ("joint.jointnet.activation", "gelu"),
    ("decoding.strategy", ["greedy"]),
    ("decoding.greedy.max_symbols", None),
    ("decoding.greedy.max_symbols", 0),
    ("tokenizer.type", "wpe"),
    ("adapters", {"speaker": {"enabled": True}}),
]


@pytest.mark.parametrize(("field", "value"), REJECTED, ids=[f"{f}={v}"[:60] for f, v in REJECTED])
def test_unsupported_values_are_rejected_by_field_name(field: str, value: Any, tiny_checkpoint: Path) -> None:
    config = read_config(tiny_checkpoint)
    check_config(config)
    section = config
    *path, last = field.split(".")
    for key in path:
        section = section.setdefault(key, {})
    section[last] = value
    with pytest.raises(CheckpointError) as rejected:
        check_config(config)
    assert field in str(rejected.value)
    reported = value[-1] if field == "encoder.att_context_size" else value  # of several contexts, the invalid one
    assert repr(reported) in str(rejected.value)
    assert "supports" in str(rejected.value)


def test_hybrid_models_with_rnnt_are_supported(tiny_checkpoint: Path) -> None:
    config = read_config(tiny_checkpoint)
    config["target"] = "nemo.collections.asr.models.hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel"
    assert [chunk.ms for chunk in check_config(config).chunks] == [80, 160, 560, 1120]


def test_unsupported_checkpoints_are_rejected_before_any_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The configuration is checked before the weights are read: this archive has none."""
    config = read_config(tiny_checkpoint)
    config["encoder"]["att_context_style"] = "regular"
    document = yaml.safe_dump(config).encode()
    with tarfile.open(tmp_path / "regular.nemo", "w") as archive:
        member = tarfile.TarInfo("./model_config.yaml")
        member.size = len(document)
        archive.addfile(member, io.BytesIO(document))
    with pytest.raises(CheckpointError, match="att_context_style is 'regular'"):
        export_checkpoint(tmp_path / "regular.nemo", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "noise.nemo").write_bytes(b"not a tar" * 100)
    with pytest.raises(CheckpointError, match=r"noise\.nemo cannot be read as a \.nemo checkpoint"):
        export_checkpoint(tmp_path / "noise.nemo", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"missing\.nemo does not exist"):
        export_checkpoint(tmp_path / "missing.nemo", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("do not delete")
    with pytest.raises(OptionError, match="exists and is not a bundle"):
        export_checkpoint(tmp_path / "noise.nemo", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_a_wrong_graph_is_not_written(tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """If one element of a weight changes, the parity check fails and reports the location."""
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    model = onnx.load(copy / "encoder-560ms.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "encoder.layers.1.feed_forward1.linear1.weight")
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    with (copy / "weights.bin").open("r+b") as weights:
        weights.seek(offset)
        weights.write(np.float32(3.0).tobytes())
    with pytest.raises(ParityError, match=r"encoder-80ms differs from NeMo by .* most at frame \d+, step \d+"):
        measure_parity(Bundle(copy, tiny_bundle.manifest), NemoReference(tiny_checkpoint), lambda message: None)


def test_the_bundle(tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    manifest = tiny_bundle.manifest
    assert Bundle.open(tiny_bundle.path).manifest == Manifest.from_json(manifest.to_json())
    assert manifest.checkpoint["sha256"] == sha256(tiny_checkpoint)
    assert [chunk.ms for chunk in manifest.chunks] == [80, 160, 560, 1120]
    names = {f"{kind}-{chunk.ms}ms" for chunk in manifest.chunks for kind in ("features", "encoder")}
    assert set(manifest.graphs) == names | {"decoder", "joint"}
    for graph in manifest.graphs.values():
        model = onnx.load(tiny_bundle.path / graph.file, load_external_data=False)
        for side, values in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            assert [tensor.name for tensor in side] == [value.name for value in values]
            for tensor in side:
                assert [axis for axis in tensor.shape if isinstance(axis, str)] == ["B"], tensor
        for tensor in model.graph.initializer:
            if np.prod(tensor.dims) > 1024:
                external = {entry.key: entry.value for entry in tensor.external_data}
                assert external["location"] == manifest.weights.file, tensor.name
    # Export is deterministic.
    again = export_checkpoint(tiny_checkpoint, tmp_path / "again").manifest
    assert again.weights == manifest.weights
    assert again.graphs == manifest.graphs


def test_an_older_bundle_is_replaced(tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, copy)
    document = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(document | {"version": 0}))
    export_checkpoint(tiny_checkpoint, copy)
    assert Bundle.open(copy).manifest.weights == tiny_bundle.manifest.weights
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "no temporary folder is left"


@pytest.mark.slow
def test_full_size_within_16_gb(full_export: Any, tmp_path: Path) -> None:
    """Export of the 0.6B sizes: at most 16 GB of memory, at most 1.15 times the fp32 weights on disk, full parity."""
    peak, before = full_export.peak_kib, full_export.checkpoint_peak_kib
    assert peak < 16e9 / 1024, f"peak {peak / 1e6:.1f} GB (creating the checkpoint: {before / 1e6:.1f} GB)"
    assert "comparing 1120 ms with NeMo" in full_export.stderr
    bundle = Bundle.open(full_export.bundle)
    source = open_checkpoint(full_export.checkpoint, tmp_path / "unpacked")
    weights = sum(array.size * 4 for array in source.state.values())
    on_disk = sum(file.stat().st_size for file in bundle.path.iterdir())
    assert 2.3e9 < weights < 2.6e9
    assert on_disk <= 1.15 * weights
    for ms in (80, 160, 560, 1120):
        assert bundle.manifest.parity[f"{ms}ms"]["steps"] >= MIN_STEPS
