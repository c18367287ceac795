"""Checkpoints in transformers' format: the same numbers as transformers, and malformed files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemostream.bundle import FeatureConfig, sha256
from nemostream.errors import CheckpointError
from nemostream.export import export_checkpoint
from nemostream.export.checkpoint import Checkpoint
from nemostream.export.reference import NumpyReference, TransformersReference
from nemostream.export.safetensors import SafeTensors
from nemostream.export.sources import Source
from nemostream.export.transformers_checkpoint import PROCESSOR, frontend, open_transformers

pytestmark = pytest.mark.nemo


def opened(folder: Path, tmp_path: Path) -> Checkpoint:
    return open_transformers(folder, "x", tmp_path / "opened")


def test_front_end_equals_transformers() -> None:
    import torch
    from transformers import NemotronAsrStreamingFeatureExtractor

    for rate, mels, window, n_fft in ((16000, 128, 400, 512), (16000, 80, 400, 512), (8000, 64, 200, 256)):
        constants = frontend(FeatureConfig(rate, mels, window, 160, n_fft, 0.97))
        extractor = NemotronAsrStreamingFeatureExtractor(
            feature_size=mels, sampling_rate=rate, n_fft=n_fft, win_length=window
        )
        filters = constants["preprocessor.featurizer.fb"]
        np.testing.assert_array_equal(filters[0], extractor.mel_filters.numpy())
        # torch's cosine depends on the processor: it is off by one unit in the last place for few samples.
        hann = torch.hann_window(window, periodic=False).numpy()
        np.testing.assert_allclose(constants["preprocessor.featurizer.window"], hann, rtol=0, atol=6e-8)


def test_sharded_files_in_bfloat16(transformers_factory: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = transformers_factory(tmp_path / "model", prompted=True, dtype=torch.bfloat16, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (folder / "model.safetensors").exists()
    wanted = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    tensors = SafeTensors(folder / "model.safetensors.index.json")
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.dtype == torch.bfloat16 and tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], tensor.float().numpy())
    manifest = export_checkpoint(folder, tmp_path / "bundle").manifest
    assert manifest.parity["reference"].startswith("transformers ")
    assert manifest.checkpoint["shards"].keys() == {shard.name for shard in shards}
    assert all(manifest.parity[f"{ms}ms"]["encoder"] < 1e-5 for ms in (80, 320, 560, 1120))


def test_all_types_of_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    arrays = {
        str(dtype): (rng.standard_normal((3, 4)) * 50).astype(dtype)
        for dtype in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")
    }
    arrays |= {"scalar": np.array(3.5, np.float32)}
    save_file(arrays, tmp_path / "all.safetensors", {"format": "np"})
    tensors = SafeTensors(tmp_path / "all.safetensors")
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name], array)
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)


# -- malformed files ---------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "less than its header"),
        (b"\x05", "less than its header"),
        (safetensors({}, length=10**18), "less than its header of 1000000000000000000 bytes"),
        (safetensors(b"{"), "Expecting|property name"),
        (safetensors([]), "an object"),
        (safetensors({"a": 5}), "an object"),
        (safetensors({"a": {"dtype": "F32"}}), "no dtype, shape or data_offsets"),
        (safetensors({"a": entry(0, 8, [2])}, b"\0" * 4), "its tensors end at byte"),
        (safetensors({"a": entry(0, 8, [2])}, b"\0" * 12), "its tensors end at byte"),
        (safetensors({"a": entry(4, 12, [2])}, b"\0" * 12), "starts at byte 4"),
        (safetensors({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12), "starts at byte 4"),
        (safetensors({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, b"\0" * 8), "starts at byte 0"),
        (safetensors({"a": entry(0, 8, [3])}, b"\0" * 8), r"shape \[3\] has 8 bytes"),
        (safetensors({"a": entry(8, 0, [2])}, b"\0" * 8), "has -8 bytes"),
        (safetensors({"a": entry(0, 8, [-2])}, b"\0" * 8), "whole number"),
        (safetensors({"a": entry(0, 8, [2.0])}, b"\0" * 8), "whole number"),
        (safetensors({"a": entry(0, 8, [2], "F8_E4M3")}, b"\0" * 8), "type 'F8_E4M3'"),
        (safetensors({"a": entry(0, 8, [2], [])}, b"\0" * 8), "the type"),
        (safetensors({"a": entry(0, 0, [1 << 47, 1 << 47])}), "has 0 bytes"),
        (safetensors({"a": entry(0, 8, [2])}, b"\0" * 8)[:-1], "its tensors end at byte"),
        (safetensors({"a": entry(0, 0, [0, 3])}), r"'a' of shape \[0, 3\] is empty"),
        (safetensors({"a": entry(0, 0, [1 << 48, 1 << 48, 0])}), "is empty"),
        (safetensors(b" " * (17 << 20)), "header has 17825792 bytes; at most 16777216 are allowed"),
    ],
)
def test_malformed_safetensors(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafeTensors(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "none.safetensors", 5, ""])
def test_malformed_index(name: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        SafeTensors(tmp_path / "model.safetensors.index.json")


def test_limits_of_documents(prompted_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(prompted_folder, folder)
    for name in ("tokenizer.json", "model.safetensors.index.json", "tokenizer.model"):
        with (folder / name).open("wb") as file:
            file.truncate(65 << 20 if name == "tokenizer.model" else 17 << 20)
    with pytest.raises(CheckpointError, match="larger than the limit of 16777216 bytes"):
        SafeTensors(folder / "model.safetensors.index.json")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.model cannot be read: it is larger than the limit of 67108864"
    ):
        opened(folder, tmp_path)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="larger than the limit of 16777216 bytes"):
        opened(folder, tmp_path)


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_the_number_of_tensors_is_limited(names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file, and of an index before its files are read; at the limit and above it."""
    monkeypatch.setattr("nemostream.export.safetensors._MAX_TENSORS", 2)
    header = {name: entry(4 * position, 4 * position + 4, [1]) for position, name in enumerate(names)}
    paths = tmp_path / "model.safetensors.index.json", tmp_path / "x.safetensors"
    paths[0].write_text(json.dumps({"weight_map": dict.fromkeys(names, paths[1].name if names == "ab" else "none")}))
    paths[1].write_bytes(safetensors({"__metadata__": {"format": "np"}} | header, bytes(4 * len(names))))
    for path in paths:
        if names == "ab":
            assert SafeTensors(path).keys() == {"a", "b"}
        else:
            with pytest.raises(CheckpointError, match="it has 3 tensors; at most 2 are allowed"):
                SafeTensors(path)


def test_the_files_that_are_hashed_are_those_that_are_read(transformers_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = tmp_path / "model"
    shutil.copytree(transformers_folder, folder)
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"no part of the model")
    index = {"weight_map": dict.fromkeys(names, "weights.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    origin = Source("x", folder).describe()
    assert origin["shards"] == {"weights.safetensors": sha256(folder / "weights.safetensors")}
    assert origin["sha256"] == sha256(folder / "model.safetensors.index.json")


def test_a_sentencepiece_model_is_copied(transformers_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(transformers_folder, folder)
    converted = opened(folder, tmp_path).tokenizer.read_bytes()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(converted)
    tokenizer = opened(folder, tmp_path).tokenizer
    assert tokenizer.parent == tmp_path / "opened" and tokenizer.read_bytes() == converted


@pytest.mark.parametrize("preemphasis", [None, 0.0, 0.5])
def test_preemphasis_equals_transformers(
    preemphasis: float | None, transformers_folder: Path, tmp_path: Path, clips: dict[str, Any]
) -> None:
    from transformers import NemotronAsrStreamingFeatureExtractor

    folder = tmp_path / "model"
    shutil.copytree(transformers_folder, folder)
    edit(folder, PROCESSOR, lambda document: set_field(document, "feature_extractor.preemphasis", preemphasis))
    checkpoint = opened(folder, tmp_path)
    assert checkpoint.features.preemphasis == (preemphasis or 0.0)
    audio = clips["cards-003"]
    extractor = NemotronAsrStreamingFeatureExtractor.from_pretrained(folder)
    assert extractor.preemphasis == preemphasis
    out = extractor(audio, sampling_rate=16000, return_tensors="pt")
    wanted = out.input_features[0, out.attention_mask[0]].numpy()
    np.testing.assert_allclose(NumpyReference(checkpoint).features(audio), wanted, rtol=0, atol=1e-3)


def test_a_misread_front_end_is_noticed(transformers_folder: Path, tmp_path: Path, clips: dict[str, Any]) -> None:
    checkpoint, audio = opened(transformers_folder, tmp_path), clips["cards-003"]
    TransformersReference(transformers_folder, checkpoint).features(audio)
    for field, value in (("preemphasis", 0.96), ("preemphasis", 0.0), ("hop", 150), ("window", 398), ("n_fft", 1024)):
        front = dataclasses.replace(checkpoint.features, **{field: value})
        state = {**checkpoint.state, **frontend(front)}
        misread = dataclasses.replace(checkpoint, features=front, state=state)
        with pytest.raises(CheckpointError, match=r"differ from the exporter.s; report"):
            TransformersReference(transformers_folder, misread).features(audio)


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / file).read_text())
    change(document)
    (folder / file).write_text(json.dumps(document))


def set_field(document: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for section in sections:
        document = document[section]
    document[last] = value


INVALID = [
    ("config.json", "model_type", "whisper", "model_type is 'whisper'"),
    ("config.json", "vocab_size", "97", "vocab_size is '97'"),
    ("config.json", "blank_token_id", 0, "blank_token_id is 0"),
    ("config.json", "hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("config.json", "durations", [0, 1, 2], "durations"),
    ("config.json", "default_prompt_id", 4, "default_prompt_id is 4, which has no name"),
    ("config.json", "default_prompt_id", 7, "default_prompt_id is 7"),
    ("config.json", "num_prompts", 3, "prompt_dictionary"),
    ("config.json", "encoder_config", [], "encoder_config is []"),
    ("config.json", "encoder_config.hidden_size", -1, "hidden_size is -1"),
    ("config.json", "encoder_config.hidden_size", 64, "shape"),
    ("config.json", "encoder_config.num_hidden_layers", 3, "no tensor 'encoder.layers.2"),
    ("config.json", "encoder_config.hidden_act", "relu", "hidden_act is 'relu'"),
    ("config.json", "encoder_config.sliding_window", True, "sliding_window is True"),
    ("config.json", "encoder_config.num_mel_bins", 80, "feature_size is 128"),
    ("config.json", "decoder_hidden_size", 25, "shape"),
    ("processor_config.json", "prompt_dictionary", {"en-US": 99}, "prompt_dictionary.en-US is 99"),
    ("processor_config.json", "prompt_dictionary", {"<script>": 0}, "prompt_dictionary is '<script>'"),
    ("processor_config.json", "prompt_dictionary", None, "no field 'prompt_dictionary'"),
    ("processor_config.json", "supported_num_lookahead_tokens", [3, -1], "supported_num_lookahead_tokens"),
    ("processor_config.json", "feature_extractor.mel_filters_dtype", "bfloat16", "mel_filters_dtype is 'bfloat16'"),
    ("processor_config.json", "feature_extractor.sampling_rate", 0, "sampling_rate is 0"),
    ("tokenizer.json", "model.type", "WordPiece", "model.type is 'WordPiece'"),
    ("tokenizer.json", "model.vocab", {"a": 0}, "which makes no token"),
    ("config.json", "vocab_size", 96, "blank_token_id is 96"),
    ("tokenizer.json", "model.merges", [["x", "y", "z"]], "is not a pair of tokens"),
    ("tokenizer.json", "model.unk_token", "none", "no token for unknown text"),
]


@pytest.mark.parametrize(
    ("file", "field", "value", "message"), INVALID, ids=[f"{f}={v}"[:50] for _, f, v, _ in INVALID]
)
def test_invalid_fields_are_rejected_in_one_sentence(
    file: str, field: str, value: Any, message: str, prompted_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(prompted_folder, folder)
    edit(folder, file, lambda document: set_field(document, field, value))
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(folder, tmp_path / "bundle")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is written"


def test_missing_and_truncated_files(prompted_folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        shutil.copytree(prompted_folder, tmp_path / name)
        return tmp_path / name

    def reject(folder: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            export_checkpoint(folder, tmp_path / "bundle")
        assert "\n" not in str(caught.value) and not (tmp_path / "bundle").exists()

    folder = copy("truncated")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1000])
    reject(folder, "cannot be read as safetensors: it has .* bytes, but its tensors end at")
    folder = copy("no tokenizer")
    (folder / "tokenizer.json").unlink()
    reject(folder, "has no tokenizer.model or tokenizer.json")
    folder = copy("other tokenizer")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    tokenizer["model"]["vocab"].pop(next(text for text, i in tokenizer["model"]["vocab"].items() if i == 95))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    reject(folder, "no token of id 95, but the model has 96 tokens: it belongs to another model")
    folder = copy("no json")
    (folder / "config.json").write_text("{")
    reject(folder, "config.json cannot be read")
    folder = copy("adapter")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["encoder.layers.0.self_attn.q_proj.lora_A.weight"] = header.pop("encoder.layers.0.self_attn.q_proj.weight")
    data = content[8 + int.from_bytes(content[:8], "little") :]
    (folder / "model.safetensors").write_bytes(safetensors(header, data))
    reject(folder, "no tensor 'encoder.layers.0.self_attn.linear_q.weight'|not part of")
    header["base_model.adapter"] = header.pop("joint.head.bias")
    (folder / "model.safetensors").write_bytes(safetensors(header, data))
    reject(folder, "'base_model.adapter', which is not part of nemotron_asr_streaming or nemotron3_5_asr; merge")


def test_damaged_safetensors_raise_no_other_errors(tmp_path: Path) -> None:
    """Bytes of the header are changed: it is rejected, or arrays are still inside the file."""
    rng = np.random.default_rng(0)
    content = safetensors({"a": entry(0, 48, [3, 4]), "b": entry(48, 56, [4], "BF16")}, b"\0" * 56)
    (tmp_path / "good").write_bytes(content)
    assert {name: array.shape for name, array in SafeTensors(tmp_path / "good").items()} == {"a": (3, 4), "b": (4,)}
    rejected = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(0, len(content) - 56)] = rng.integers(0, 256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            for array in SafeTensors(tmp_path / "damaged").values():
                assert array.size <= 56
        except CheckpointError as error:
            assert "\n" not in str(error)
            rejected += 1
    assert rejected > 100
