"""Bundles: serialization, damaged and malformed files, and the formulas of the time axis."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream.bundle import (
    Bundle,
    ChunkConfig,
    DecoderConfig,
    EncoderConfig,
    FeatureConfig,
    File,
    Graph,
    LanguageConfig,
    Manifest,
    Tensor,
    Weight,
    sha256,
)
from nemostream.errors import BundleError, NemostreamError, OptionError
from nemostream.external_data import external_files

CHUNKS = tuple(ChunkConfig(ms=80 * frames, frames=frames, left=70, samples=1280 * frames) for frames in (1, 2, 7, 14))


def graphs(sha256: str) -> dict[str, Graph]:
    """Return all graphs of a bundle, each with the inputs and outputs of the joint."""
    inputs = (Tensor("encoded_joint", "float32", ("B", 640)), Tensor("predicted", "float32", ("B", 640)))
    outputs = (Tensor("logits", "float32", ("B", 1025)),)
    names = [f"{kind}-{chunk.ms}ms" for chunk in CHUNKS for kind in ("features", "encoder")]
    return {name: Graph("joint.onnx", sha256, inputs, outputs) for name in (*names, "decoder", "joint")}


def make_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "contract",
        "features": FeatureConfig(sample_rate=16000, mels=128, window=400, hop=160, n_fft=512, preemphasis=0.97),
        "encoder": EncoderConfig(layers=24, d_model=1024, heads=8, subsampling=8, cache=70, conv_cache=8),
        "decoder": DecoderConfig(layers=2, hidden=640, joint=640, vocabulary=1024, max_symbols=10, activation="relu"),
        "chunks": CHUNKS,
        "graphs": graphs("0" * 64),
        "weights": File("weights.bin", "1" * 64, 4100),
        "tensors": {"joint.out.bias": Weight("float32", (1025,), 0)},
        "tokenizer": File("tokenizer.model", "2" * 64, 5),
        "checkpoint": {"source": "voice.nemo", "sha256": "3" * 64},
        "parity": {"80ms": {"steps": 12, "encoder": 1e-6}},
        "versions": {"onnx": "1.20"},
    }
    return Manifest(**(fields | changes))


def field(number: int, content: bytes) -> bytes:
    """Encode a length-delimited protobuf field of less than 128 bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def model_reading(location: str) -> bytes:
    """Return a serialized ONNX model with one initializer stored in the file `location`."""
    entry = field(1, b"location") + field(2, location.encode())
    return b"\x08\x09" + field(7, field(5, b"\x10\x01" + field(13, entry)))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A minimal bundle: three files, and a manifest with their hashes."""
    contents = {"joint.onnx": model_reading("weights.bin"), "weights.bin": bytes(range(205)) * 20}
    contents["tokenizer.model"] = b"piece"
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    manifest = make_manifest(
        graphs=graphs(sha256(tmp_path / "joint.onnx")),
        weights=File("weights.bin", sha256(tmp_path / "weights.bin"), 4100),
        tokenizer=File("tokenizer.model", sha256(tmp_path / "tokenizer.model"), 5),
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(tmp_path, manifest)


# -- serialization -----------------------------------------------------------------------------------------------------


def test_round_trip() -> None:
    manifest = make_manifest()
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    # Lists of JSON must become tuples, so that the manifest is immutable.
    assert isinstance(again.chunks, tuple) and isinstance(again.graphs["joint"].inputs, tuple)
    assert again.graphs["joint"].inputs[0].shape == ("B", 640)


def test_round_trip_of_an_exported_manifest(demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.chunks == tuple(sorted(CHUNKS, key=lambda chunk: chunk.ms))
    assert set(manifest.graphs) == {
        *(f"{kind}-{chunk.ms}ms" for kind in ("features", "encoder") for chunk in CHUNKS),
        "decoder",
        "joint",
    }


TWO = {"default": "de", "prompts": {"en": 0, "de": 1}, "count": 2}
PROMPT = {"name": "prompt", "dtype": "int64", "shape": ["B"]}


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    """Return a serialized manifest after `change`."""
    document = json.loads(make_manifest().to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a nemostream manifest"),
        ('"nemostream-bundle"', "not a nemostream manifest"),
        (edited(lambda d: d.update(format="other")), "not a nemostream manifest"),
        (edited(lambda d: d.update(version=1)), "version 1, but this nemostream reads version 3"),
        (edited(lambda d: d.pop("version")), "version None"),
        (edited(lambda d: d.pop("chunks")), "'chunks'"),
        (edited(lambda d: d["encoder"].pop("layers")), "layers"),
        (edited(lambda d: d["encoder"].update(extra=1)), "extra"),
        (edited(lambda d: d["graphs"]["joint"].pop("sha256")), "'sha256'"),
        (edited(lambda d: d.update(graphs=[])), "export the checkpoint again"),
        (
            edited(lambda d: d.update(languages=TWO)),
            "graph 'encoder-80ms' has no input 'prompt', but languages.count is 2",
        ),
        (
            edited(lambda d: d["graphs"]["encoder-80ms"]["inputs"].append(PROMPT)),
            "graph 'encoder-80ms' has an input 'prompt', but languages.count is 0",
        ),
    ],
)
def test_invalid_manifests(text: str, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text, "somewhere/manifest.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("somewhere/manifest.json ")


def test_open_verifies_every_file(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path)
    assert opened == bundle
    assert opened.file("joint") == bundle.path / "joint.onnx"


@pytest.mark.parametrize("name", ["joint.onnx", "weights.bin", "tokenizer.model"])
def test_a_damaged_or_missing_file_is_named(bundle: Bundle, name: str) -> None:
    file = bundle.path / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        Bundle.open(bundle.path)
    file.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle.open(bundle.path)
    assert Bundle.open(bundle.path, verify=False) == bundle


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"no readable manifest\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match=r"no readable manifest\.json"):
        Bundle.open(tmp_path)


def test_an_unknown_chunk_size_lists_the_available_ones() -> None:
    manifest = make_manifest()
    assert [manifest.chunk(chunk.ms) for chunk in CHUNKS] == list(CHUNKS)
    with pytest.raises(OptionError, match=r"chunk size 100 ms .* one of 80, 160, 560, 1120"):
        manifest.chunk(100)


def test_errors_inherit_builtins_and_have_unique_exit_codes() -> None:
    kinds = NemostreamError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes and NemostreamError.exit_code not in codes
    assert all(len(kind.__bases__) == 2 and kind.__bases__[1].__module__ == "builtins" for kind in kinds)


# -- time axis---------------------------------------------------------------------------------------------------------


def test_constants_of_a_400_160_front_end() -> None:
    manifest = make_manifest()
    assert manifest.features.tail == 239
    assert manifest.encoder.mel_cache == 9
    assert manifest.samples_per_frame == 1280
    assert manifest.lead == 1081
    assert manifest.decoder.blank == 1024
    assert [manifest.seconds(frame) for frame in (0, 1, 25)] == [0.0, 0.08, 2.0]


@pytest.mark.parametrize(
    ("samples", "mel", "encoder"),
    [
        (-1, 0, 0),
        (0, 0, 0),
        (159, 0, 0),  # less than one mel frame
        (160, 1, 1),  # 1 -> 1 -> 1 -> 1
        (319, 1, 1),
        (320, 2, 2),  # 2 -> 2 -> 2 -> 2
        (1120, 7, 2),  # 7 -> 4 -> 3 -> 2
        (1280, 8, 2),  # 8 -> 5 -> 3 -> 2
        (16000, 100, 14),  # 100 -> 51 -> 26 -> 14
        (160000, 1000, 126),  # 1000 -> 501 -> 251 -> 126
    ],
)
def test_frames_of_a_recording(samples: int, mel: int, encoder: int) -> None:
    manifest = make_manifest()
    assert manifest.mel_frames(samples) == mel
    assert manifest.encoder_frames(samples) == encoder


@given(samples=st.integers(160, 10**9), subsampling=st.sampled_from([2, 4, 8, 16]))
def test_encoder_frames_are_those_of_strided_convolutions(samples: int, subsampling: int) -> None:
    """NeMo's causal convolution: kernel 3, stride 2, two frames of padding before and one after."""
    encoder = dataclasses.replace(make_manifest().encoder, subsampling=subsampling)
    manifest = make_manifest(encoder=encoder)
    frames, factor = manifest.mel_frames(samples), subsampling
    while factor > 1:
        frames = (frames + 2 + 1 - 3) // 2 + 1
        factor //= 2
    assert manifest.encoder_frames(samples) == frames


@given(samples=st.integers(160, 10**8), chunk=st.sampled_from(CHUNKS))
def test_the_steps_cover_the_whole_recording(samples: int, chunk: ChunkConfig) -> None:
    """The last step ends after the last sample of the last mel frame, which is 198 after its centre."""
    manifest = make_manifest()
    steps = -(-manifest.encoder_frames(samples) // chunk.frames)
    last = 160 * (manifest.mel_frames(samples) - 1) + 198
    assert steps * chunk.samples - manifest.lead > last


# -- malformed ---------------------------------------------------------------------------------------------------------


def with_value(path: str, value: Any) -> str:
    """Return a serialized manifest with the value at a path ("encoder/layers", "chunks/0/ms") replaced."""

    def change(document: Any) -> None:
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            document = document[key]
        document[last] = value

    return edited(change)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("tensors/joint.out.bias/dtype", kind) for kind in ("O", "object", "V8", "bfloat16", "<f4", "", 5, None)),
        *(("tensors/joint.out.bias/offset", value) for value in (-1, 1, 2**63, 0.0, True, "0", None)),
        *(("tensors/joint.out.bias/shape", value) for value in ([1024], [-1025], [2**40, 2**40], [True], ["B"], 5)),
        ("weights/bytes", 4099),
        *(("graphs/joint/inputs/0/dtype", kind) for kind in ("O", "string", None, [])),
        *(("graphs/joint/inputs/0/shape", value) for value in ([0], [-1], [2**40], [1.0], [None], [[1]], {}, "B" * 99)),
        *(("weights/file", name) for name in ("/etc/passwd", "../x", "a/../../x", "", ".", "a\0b", "a\\b", "a//b", 5)),
        ("graphs/joint/file", "../joint.onnx"),
        ("tokenizer/file", "/etc/passwd"),
        *(("weights/sha256", value) for value in ("", "0" * 63, "g" * 64, 5, None)),
        *(("encoder/layers", value) for value in (0, -1, 1.0, True, "24", None, 10**30, [24])),
        ("encoder/heads", 7),
        ("encoder/subsampling", 3),
        ("encoder/cache", 69),
        *(("features/preemphasis", value) for value in (float("nan"), float("inf"), "0.97", None, 2)),
        *(("features/window", value) for value in (401, 160, 1 << 20)),
        ("features/hop", 0),
        ("decoder/activation", "gelu"),
        ("chunks", []),
        ("chunks", {}),
        ("chunks/0/samples", 1281),
        ("chunks/0/ms", 81),
        ("chunks/1", {"ms": 80, "frames": 1, "left": 70, "samples": 1280}),
        ("name", "\x1b[2J"),
        ("name", 5),
        ("parity/80ms", {"encoder": "small"}),
        ("versions/onnx", 1),
        ("version", 2.0),
    ],
)
def test_malformed_fields_raise_one_sentence(path: str, value: Any) -> None:
    with pytest.raises(BundleError, match="export the checkpoint again") as caught:
        Manifest.from_json(with_value(path, value), "manifest.json")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, '{"format": "\\ud800"}', " " * (16 * 2**20 + 1), "9" * 5000, "NaN"],
    ids=["lists", "objects", "surrogate", "large", "digits", "NaN"],
)
def test_excessive_json_raises_one_sentence(text: str) -> None:
    with pytest.raises(BundleError, match=r"export the checkpoint again|not a nemostream manifest"):
        Manifest.from_json(text)


@pytest.mark.parametrize("name", ["joint.onnx", "weights.bin", "tokenizer.model", "manifest.json"])
@pytest.mark.parametrize("kind", ["link outside", "FIFO", "folder", "device", "dangling link"])
def test_only_regular_files_inside_the_bundle_are_read(bundle: Bundle, tmp_path: Path, name: str, kind: str) -> None:
    file, outside = bundle.path / name, tmp_path.parent / f"{tmp_path.name}-outside"
    file.rename(outside)
    if kind == "link outside":
        file.symlink_to(outside)
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "dangling link":
        file.symlink_to("nothing")
    else:
        file.mkdir()
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle.path)
    if name == "weights.bin":
        with pytest.raises(BundleError, match=name):
            bundle.weight("joint.out.bias")


def test_a_link_inside_the_bundle_is_followed(bundle: Bundle) -> None:
    (bundle.path / "weights.bin").rename(bundle.path / "data")
    (bundle.path / "weights.bin").symlink_to("data")
    assert Bundle.open(bundle.path).weight("joint.out.bias").shape == (1025,)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "other.bin", "./weights.bin", ""])
def test_graphs_may_only_read_the_weights_file(bundle: Bundle, location: str) -> None:
    (bundle.path / "joint.onnx").write_bytes(model_reading(location))
    manifest = dataclasses.replace(bundle.manifest, graphs=graphs(sha256(bundle.path / "joint.onnx")))
    (bundle.path / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(BundleError, match=r"joint\.onnx reads weights from"):
        Bundle.open(bundle.path)


def test_external_files_of_all_kinds_of_tensors(tmp_path: Path) -> None:
    """Tensors in initializers, attributes, subgraphs, functions and sparse tensors are found."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")

    def tensor(name: str) -> Any:
        proto = onnx.TensorProto(name=name, data_type=1, dims=[4], data_location=1)
        proto.external_data.add(key="offset", value="0")
        proto.external_data.add(key="location", value=name)
        return proto

    inner = onnx.helper.make_graph([], "inner", [], [], [tensor("subgraph")])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    constant = onnx.helper.make_node("Constant", [], ["z"], value=tensor("attribute"))
    graph = onnx.helper.make_graph([node, constant], "graph", [], [], [tensor("initializer")])
    graph.sparse_initializer.add(values=tensor("sparse"), indices=tensor("indices"))
    function = onnx.helper.make_function("d", "f", [], ["z"], [constant], [onnx.helper.make_opsetid("", 17)])
    function.node[0].attribute[0].t.CopyFrom(tensor("function"))
    model = onnx.helper.make_model(graph, functions=[function])
    wanted = {"subgraph", "attribute", "initializer", "sparse", "indices", "function"}
    assert external_files(model.SerializeToString()) == wanted


def test_names_of_languages_in_all_spellings() -> None:
    """Checkpoints write names with "-" or "_"; so do users, in any case."""
    languages = LanguageConfig("pt_BR", {"pt_BR": 0, "pt": 0, "zh_CN": 1, "zh-TW": 2, "auto": 3}, 4)
    assert languages.name(None) == "pt_BR"
    for spelling in ("pt_BR", "pt-BR", "PT_br", "pt"):
        assert languages.name(spelling) == "pt_BR" and languages.prompt(spelling) == 0
    assert languages.name("zh") == "zh_CN" and languages.name("ZH_tw") == "zh-TW"
    with pytest.raises(OptionError, match="similar ones are zh_CN, zh-TW"):
        languages.name("zh-HK")
