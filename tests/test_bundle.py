"""Bundles: serialization, damaged and malformed files, and the formulas of the time axis."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream import errors, untrusted
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
from nemostream.errors import BackendError, BundleError, NemostreamError, OptionError
from nemostream.external_data import external_files, initializer_shapes

CHUNKS = tuple(ChunkConfig(ms=80 * frames, frames=frames, left=70, samples=1280 * frames) for frames in (1, 2, 7, 14))


def graphs(sha256: str) -> dict[str, Graph]:
    """Return all graphs of a bundle, each with the inputs and outputs of the joint."""
    inputs = (Tensor("encoded_joint", "float32", ("B", 640)), Tensor("predicted", "float32", ("B", 640)))
    outputs = (Tensor("logits", "float32", ("B", 1025)),)
    names = [f"{kind}-{chunk.ms}ms" for chunk in CHUNKS for kind in ("features", "encoder")]
    return {name: Graph(f"{name}.onnx", sha256, inputs, outputs) for name in (*names, "decoder", "joint")}


GRAPHS = tuple(graphs(""))
FILES = (*(f"{name}.onnx" for name in GRAPHS), "weights.bin", "tokenizer.model")


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
    """A minimal bundle: equal graphs, weights, tokenizer, and a manifest with their hashes."""
    contents = {f"{name}.onnx": model_reading("weights.bin") for name in GRAPHS}
    contents |= {"weights.bin": bytes(range(205)) * 20, "tokenizer.model": b"piece"}
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


@pytest.mark.parametrize("name", FILES)
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


def test_a_file_of_another_size_is_reported_with_both_sizes(bundle: Bundle) -> None:
    """Before its hash is computed. Graphs have no size in the manifest."""
    for name, size in (("weights.bin", 4100), ("tokenizer.model", 5)):
        content = (bundle.path / name).read_bytes()
        (bundle.path / name).write_bytes(content + b"x")
        with pytest.raises(BundleError, match=f"it has {size + 1} bytes; the manifest states {size}"):
            Bundle.open(bundle.path)
        (bundle.path / name).write_bytes(content)
    assert Bundle.open(bundle.path) == bundle


def test_a_graph_that_is_not_onnx_is_a_backend_error(bundle: Bundle) -> None:
    (bundle.path / "decoder.onnx").write_bytes(b"\xff" * 20)
    decoder = dataclasses.replace(bundle.manifest.graphs["decoder"], sha256=sha256(bundle.path / "decoder.onnx"))
    manifest = dataclasses.replace(bundle.manifest, graphs={**bundle.manifest.graphs, "decoder": decoder})
    (bundle.path / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(BackendError, match=r"cannot load .*decoder\.onnx: it is .*; export the checkpoint again"):
        Bundle.open(bundle.path)


def test_weights_are_read_at_their_offset(bundle: Bundle) -> None:
    """Values, shape and type of tensors, read-only; the file has the bytes 0 to 204, 20 times."""
    tensors = {"a": Weight("uint8", (2, 3), 7), "b": Weight("int16", (), 102), "c": Weight("float32", (1024,), 4)}
    opened = Bundle(bundle.path, dataclasses.replace(bundle.manifest, tensors=tensors))
    content = (bundle.path / "weights.bin").read_bytes()
    assert opened.weight("a").tolist() == [[7, 8, 9], [10, 11, 12]] and opened.weight("a").dtype == np.uint8
    assert opened.weight("b").tolist() == 102 + 256 * 103
    np.testing.assert_array_equal(opened.weight("c"), np.frombuffer(content[4:], np.float32))
    with pytest.raises(ValueError, match="read-only"):
        opened.weight("a")[0, 0] = 1
    with pytest.raises(BundleError, match="has no tensor 'd'; export the checkpoint again"):
        opened.weight("d")
    with pytest.raises(BundleError, match="has no graph 'encoder-90ms'; export the checkpoint again"):
        opened.file("encoder-90ms")


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"no readable manifest\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match=r"no readable manifest\.json"):
        Bundle.open(tmp_path)


def test_bundles_of_version_2_have_one_language() -> None:
    """Version 2 is version 3 without languages; versions are whole numbers."""
    document = json.loads(make_manifest().to_json())
    assert (document["format"], document["version"]) == ("nemostream-bundle", 3)
    del document["languages"]
    assert Manifest.from_json(json.dumps(document | {"version": 2})) == make_manifest(languages=LanguageConfig("en"))
    with pytest.raises(BundleError, match="'languages' is missing"):
        Manifest.from_json(json.dumps(document))
    for version in (2.0, 3.0, True, "3", 1, 4, None):
        with pytest.raises(BundleError, match=r"has bundle version .*, but this nemostream reads version 3"):
            Manifest.from_json(edited(lambda d, version=version: d.update(version=version)))


EXIT_CODES = {
    "NemostreamError": (1, Exception),
    "OptionError": (2, ValueError),
    "AudioError": (3, ValueError),
    "BundleError": (4, ValueError),
    "CheckpointError": (5, ValueError),
    "ParityError": (6, ArithmeticError),
    "BackendError": (7, RuntimeError),
    "CapacityError": (8, RuntimeError),
    "StreamError": (9, RuntimeError),
    "EngineValidationError": (10, ArithmeticError),
    "TruncatedAudioError": (11, ValueError),
}


def test_exit_codes_and_bases_of_errors_are_those_of_the_documentation() -> None:
    """Programs test the codes, so they never change."""
    kinds = [NemostreamError, *NemostreamError.__subclasses__(), errors.TruncatedAudioError]
    assert {kind.__name__: kind.exit_code for kind in kinds} == {name: code for name, (code, _) in EXIT_CODES.items()}
    for kind in kinds:
        assert issubclass(kind, EXIT_CODES[kind.__name__][1]) and issubclass(kind, NemostreamError)
        assert f"Exit code {kind.exit_code}." in (kind.__doc__ or "")
    assert issubclass(errors.TruncatedAudioError, errors.AudioError) and errors.TruncatedAudioError("x").result is None
    rows = re.findall(r"^(\d+) +`(\w+)`$", errors.__doc__ or "", re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {name: code for name, (code, _) in EXIT_CODES.items()}


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


# Field -> the lowest and the highest value of its range; None for a range that other fields limit first.
RANGES: dict[str, tuple[Any, Any]] = {
    "features/sample_rate": (1000, 384_000),
    "features/mels": (1, 4096),
    "features/window": (2, 1 << 16),
    "features/hop": (1, 1 << 16),
    "features/n_fft": (2, 1 << 17),
    "features/preemphasis": (0, 1),
    "encoder/layers": (1, 1000),
    "encoder/d_model": (1, 1 << 16),
    "encoder/heads": (1, 1024),
    "encoder/cache": (1, 1 << 16),
    "encoder/conv_cache": (0, 4096),
    "decoder/layers": (1, 100),
    "decoder/hidden": (1, 1 << 16),
    "decoder/joint": (1, 1 << 16),
    "decoder/vocabulary": (1, 1 << 20),
    "decoder/max_symbols": (1, 10_000),
    "chunks/1/ms": (1, 600_000),
    "chunks/1/frames": (1, 10_000),
    "chunks/1/left": (0, 1 << 16),
    "chunks/1/samples": (1, 1 << 24),
    "graphs/joint/inputs/0/shape/1": (1, 1 << 24),
    "weights/bytes": (1, 1 << 42),
    "tokenizer/bytes": (1, 1 << 42),
    "tensors/joint.out.bias/offset": (0, 1 << 42),
    "tensors/joint.out.bias/shape/0": (1, 1 << 24),
    "languages/count": (0, 1 << 16),
    "languages/prompts/en": (0, (1 << 16) - 1),
    "parity/joint": (0, 1e12),
    "parity/80ms/encoder": (0, 1e12),
}


@pytest.mark.parametrize("path", RANGES)
def test_numbers_out_of_range_are_rejected_by_name(path: str) -> None:
    """One below and one above the range are rejected by the range, both ends of it only by other fields."""
    low, high = RANGES[path]
    name = path.replace("/", ".")
    for number in range(10):
        name = name.replace(f".{number}.", f"[{number}].").removesuffix(f".{number}") + (
            f"[{number}]" if name.endswith(f".{number}") else ""
        )
    stated = (
        f" from {low:g} to {high:g}"
        if isinstance(high, float) or path.endswith("emphasis")
        else f" from {low} to {high}"
    )
    for value, rejected in ((low - 1, True), (high + 1 if high != 1e12 else 1e13, True), (low, False), (high, False)):
        try:
            Manifest.from_json(with_value(path, value))
        except BundleError as error:
            assert (stated in str(error)) == rejected, (value, error)
            assert not rejected or f"{name} is {value}" in str(error)
        else:
            assert not rejected, value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path of every field of a document, and its value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield f"{path}{key}", entry
        yield from leaves(entry, f"{path}{key}/")


# Objects with any names, and fields with values of several types.
NAMED = ("checkpoint", "versions", "parity", "parity/80ms", "tensors", "graphs", "languages/prompts")
OTHER_TYPES: list[Any] = [None, True, [5], {"x": 5}, "\x1b", 0.5]
ALLOWED: dict[str, list[Any]] = {
    "shape": [[5]],
    "versions": [{"x": 5}],  # rejected, but by the name in it
    "checkpoint": [{"x": 5}],
    "parity": [{"x": 5}],
    "80ms": [0.5, {"x": 5}],
    "steps": [0.5],
    "encoder": [0.5],
    "preemphasis": [0.5],
}


def test_missing_unknown_and_mistyped_fields_are_rejected() -> None:
    """Every field of a manifest: without it, with another one beside it, and with values of other types."""
    document = json.loads(make_manifest().to_json())
    needed = ("encoder-80ms", "features-80ms", "decoder", "joint")
    document["graphs"] = {name: document["graphs"][name] for name in needed}
    document["chunks"] = document["chunks"][:1]
    Manifest.from_json(json.dumps(document))
    checked = 0

    def reject(change: Callable[[Any], Any], section: list[Any], message: str) -> None:
        nonlocal checked
        other = json.loads(json.dumps(document))
        inner = other
        for key in section:
            inner = inner[key]
        change(inner)
        with pytest.raises(BundleError) as caught:
            Manifest.from_json(json.dumps(other))
        assert message in str(caught.value), (section, caught.value)
        checked += 1

    for path, value in [("", document), *leaves(document)]:
        keys: list[Any] = [int(key) if key.isdigit() else key for key in path.split("/") if key]
        section, last = keys[:-1], keys[-1] if keys else ""
        if path.startswith(("checkpoint/", "format", "version/")) or path == "version":
            continue
        if isinstance(value, dict) and path not in NAMED:
            reject(lambda inner: inner.update(colour="red"), keys, "'colour'")
        if not keys:
            continue
        if isinstance(last, str) and "/".join(map(str, section)) not in NAMED:
            reject(lambda inner, last=last: inner.pop(last), section, f"'{last}'")
        for other in OTHER_TYPES:
            parity = path.startswith("parity") or last not in ("encoder",)
            if not (parity and other in ALLOWED.get(str(last), []) and type(other) is not bool):
                change = lambda inner, last=last, other=other: inner.__setitem__(last, other)  # noqa: E731
                reject(change, section, str(last).partition(".")[0])
    assert checked > 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features/window": 401}, "features.window is 401; it must be even, larger than hop and at most n_fft"),
        ({"features/window": 160}, "features.window is 160; it must be even, larger than hop and at most n_fft"),
        ({"features/n_fft": 398}, "features.window is 400; it must be even, larger than hop and at most n_fft"),
        ({"features/n_fft": 400}, None),
        ({"encoder/d_model": 1020}, "encoder.d_model is 1020; it must be a multiple of heads, which is 8"),
        ({"encoder/layers": 1000, "encoder/conv_cache": 122}, None),  # 1000 * 1024 * 262 values, below 2**28
        ({"encoder/layers": 1000, "encoder/conv_cache": 123}, "its caches have 269312000 values for each stream"),
        (
            {"features/window": 2564, "features/n_fft": 4096},
            "features.window is 2564; it must be at most 2560 samples, two frames",
        ),
        ({"features/window": 2562, "features/n_fft": 4096}, None),  # lead 0
        ({"chunks/1/ms": 80}, "chunks[1].ms is 80; it must be different from the other chunks'"),
        ({"chunks/1/ms": 161}, "chunks[1].ms is 161; it must be the duration of 2560 samples"),
        ({"chunks/1/samples": 2561}, "chunks[1].samples is 2561; it must be frames times 1280"),
        ({"chunks/3/left": 71}, "chunks[3].left is 71; it must be at most encoder.cache, which is 70"),
        ({"chunks/3/left": 0}, None),
        (
            {"languages/prompts": {"en": 0}},
            "languages.prompts.en is 0; it must be less than languages.count, which is 0",
        ),
        ({"languages/count": 2}, "languages.default is 'en'; it must be one of languages.prompts"),
        (
            {"languages/prompts": {"de": 0}, "languages/count": 1},
            "languages.default is 'en'; it must be one of languages.prompts",
        ),
        ({"languages/prompts": {"en": 2}, "languages/count": 2}, "languages.prompts.en is 2; it must be less than"),
        (
            {"languages/prompts": {"e": 0}, "languages/count": 1},
            "languages.prompts is 'e'; it must be the name of a language",
        ),
        ({"languages/default": "e n"}, "languages.default is 'e n'; it must be the name of a language"),
        ({"graphs/joint/inputs/0/shape": ["B", 1 << 14, 1 << 14]}, None),
        (
            {"graphs/joint/outputs/0/shape": ["B", 1 << 14, 1 << 14, 2]},
            "graphs.joint: the shape of logits is ['B', 16384, 16384, 2]; it must be smaller",
        ),
        ({"weights/bytes": 4099}, "tensors.joint.out.bias ends at byte 4100 of 'weights.bin', of 4099 bytes"),
        ({"tensors/joint.out.bias/dtype": "float64"}, "tensors.joint.out.bias ends at byte 8200"),
        ({"tensors/joint.out.bias/offset": 4}, "tensors.joint.out.bias ends at byte 4104"),
    ],
)
def test_sizes_that_contradict_each_other(changes: dict[str, Any], message: str | None) -> None:
    document = json.loads(make_manifest().to_json())
    for path, value in changes.items():
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        section = document
        for key in keys:
            section = section[key]
        section[last] = value
    if message is None:
        Manifest.from_json(json.dumps(document))
        return
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(document))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [*GRAPHS])
def test_every_graph_is_required(name: str) -> None:
    with pytest.raises(BundleError, match=f"it has no graph '{name}'"):
        Manifest.from_json(edited(lambda d: d["graphs"].pop(name)))


def test_shapes_of_known_weights_follow_from_the_sizes_of_the_model(demo_bundle: Bundle) -> None:
    """Every axis of every tensor of the manifest is changed; those of the tables of the front end are free."""
    document = json.loads(demo_bundle.manifest.to_json())
    layers = demo_bundle.manifest.decoder.layers
    joint = [f"joint.{layer}.{part}" for layer in ("pred", "enc", "out") for part in ("weight", "bias")]
    lstm = [f"decoder.lstm.{layer}.{part}" for layer in range(layers) for part in ("weight", "bias")]
    known = {"features.filters", "decoder.embedding", *joint, *lstm}
    assert known <= document["tensors"].keys()
    for name, tensor in document["tensors"].items():
        for axis, size in enumerate(tensor["shape"]):
            shape = [*tensor["shape"]]
            shape[axis] = size - 1 if size > 1 else 2
            other = document | {"tensors": {name: tensor | {"shape": shape, "offset": 0}}}
            if name in known:
                with pytest.raises(BundleError) as caught:
                    Manifest.from_json(json.dumps(other))
                message = f"tensors.{name}.shape is {shape}; it must be {tensor['shape']}, given the sizes of the model"
                assert message in str(caught.value)
            else:
                Manifest.from_json(json.dumps(other))


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
    joint = dataclasses.replace(bundle.manifest.graphs["joint"], sha256=sha256(bundle.path / "joint.onnx"))
    manifest = dataclasses.replace(bundle.manifest, graphs=bundle.manifest.graphs | {"joint": joint})  # type: ignore[operator]
    (bundle.path / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(BundleError, match=r"joint\.onnx reads weights from"):
        Bundle.open(bundle.path)


def test_external_files_of_all_kinds_of_tensors(tmp_path: Path) -> None:
    """Tensors in initializers, attributes, subgraphs, functions, training graphs and sparse tensors are found."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    names = set()

    def tensor(name: str) -> Any:
        names.add(name)
        proto = onnx.TensorProto(name=f"not {name}", data_type=1, dims=[4], data_location=1)
        proto.external_data.add(key="offset", value="0")
        proto.external_data.add(key="location", value=name)
        proto.external_data.add(key="checksum", value="checksum")
        return proto

    def sparse(name: str) -> Any:
        return onnx.SparseTensorProto(values=tensor(name), indices=tensor(f"{name} indices"))

    def graph(name: str) -> Any:
        return onnx.helper.make_graph([], name, [], [], [tensor(name)])

    attributes = [
        onnx.AttributeProto(name="t", type=4, t=tensor("attribute")),
        onnx.AttributeProto(name="g", type=5, g=graph("subgraph")),
        onnx.AttributeProto(name="s", type=11, sparse_tensor=sparse("sparse attribute")),
        onnx.AttributeProto(name="ts", type=9, tensors=[tensor("first of a list"), tensor("second of a list")]),
        onnx.AttributeProto(name="gs", type=10, graphs=[graph("graph of a list")]),
        onnx.AttributeProto(name="ss", type=12, sparse_tensors=[sparse("sparse of a list")]),
        onnx.AttributeProto(name="f", type=1, f=0.5),
        onnx.AttributeProto(name="i", type=2, i=1 << 40),
    ]
    nodes = [onnx.NodeProto(op_type="X", output=[a.name], attribute=[a]) for a in attributes]
    main = onnx.helper.make_graph(nodes, "graph", [], [], [tensor("initializer"), tensor("other initializer")])
    main.sparse_initializer.append(sparse("sparse initializer"))
    function = onnx.helper.make_function("d", "f", [], ["z"], [], [onnx.helper.make_opsetid("", 17)])
    function.node.add(op_type="X").attribute.append(onnx.AttributeProto(name="t", type=4, t=tensor("function")))
    function.attribute_proto.append(onnx.AttributeProto(name="t", type=4, t=tensor("default of a function")))
    model = onnx.helper.make_model(main, functions=[function])
    model.training_info.add(initialization=graph("initialization"), algorithm=graph("algorithm"))
    assert len(names) == 17 and external_files(model.SerializeToString()) == names
    empty = onnx.TensorProto(name="x", data_type=1, dims=[4], data_location=1)
    empty.external_data.add(key="location")
    model.graph.initializer.append(empty)
    assert external_files(model.SerializeToString()) == names | {""}


@pytest.mark.parametrize(("depth", "accepted"), [(1, True), (31, True), (32, True), (33, False), (1000, False)])
def test_nested_graphs_are_limited(depth: int, accepted: bool) -> None:
    """A tensor of the innermost of at most 32 graphs is found."""

    def message(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(content)) + content

    graph = message(5, message(13, field(1, b"location") + field(2, b"deep")))
    for _ in range(depth - 1):
        graph = message(1, message(5, message(6, graph)))  # node, attribute, graph
    if accepted:
        assert external_files(message(7, graph)) == {"deep"}
    else:
        with pytest.raises(ValueError, match="nested more than 32 deep"):
            external_files(message(7, graph))


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


DIMENSIONS = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 300), max_size=5)


@given(shapes=st.dictionaries(st.text(max_size=20), DIMENSIONS, max_size=4), packed=st.booleans())
def test_shapes_of_initializers_equal_onnxs(shapes: dict[str, list[int]], packed: bool) -> None:
    """Dimensions are stored as a field each, or packed, which protobuf readers must accept too."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    tensors = b""
    for name, shape in shapes.items():
        dimensions = b"".join(map(varint, shape))
        stored = (
            b"\x0a" + varint(len(dimensions)) + dimensions if packed else b"".join(b"\x08" + varint(n) for n in shape)
        )
        text = name.encode()
        # Fields that are skipped: data_type, a 64-bit and a 32-bit number of an unknown field, raw_data.
        tensor = b"\x10\x01" + b"\xf9\x06" + b"\xff" * 8 + b"\xfd\x06" + b"\xff" * 4
        tensor += stored + b"\x42" + varint(len(text)) + text + b"\x4a\x03abc"
        tensors += b"\x2a" + varint(len(tensor)) + tensor
    model = b"\x08\x0a\x3a" + varint(len(tensors)) + tensors
    wanted = {tensor.name: tuple(tensor.dims) for tensor in onnx.load_from_string(model).graph.initializer}
    assert initializer_shapes(model) == wanted == {name: tuple(shape) for name, shape in shapes.items()}
    assert external_files(model) == set()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"\x3a\x05ab", "truncated"),  # a graph of 5 bytes
        (b"\x08", "truncated"),  # a number that is missing
        (b"\x08\xff", "truncated"),
        (b"\x08" + b"\xff" * 10, "truncated"),  # more than 10 bytes
        (b"\x09" + bytes(7), "truncated"),
        (b"\x0d" + bytes(3), "truncated"),
        (b"\x0b", "not a serialized ONNX model"),  # a group
        (b"\x3a\x03\x2a\x01\x08", "truncated"),  # in a tensor
    ],
)
def test_damaged_graphs_are_rejected(model: bytes, message: str) -> None:
    for read in (external_files, initializer_shapes):
        with pytest.raises(ValueError, match=message):
            read(model)
    assert external_files(b"\x09" + bytes(8) + b"\x0d" + bytes(4) + b"\x08" + b"\xff" * 9 + b"\x01") == set()
    with pytest.raises(ValueError, match="not UTF-8"):
        external_files(b"\x3a\x15\x2a\x13\x6a\x11\x0a\x08location\x12\x05" + b"ab\xff\xffc")


def test_names_of_languages_in_all_spellings() -> None:
    """Checkpoints write names with "-" or "_"; so do users, in any case."""
    languages = LanguageConfig("pt_BR", {"pt_BR": 0, "pt": 0, "zh_CN": 1, "zh-TW": 2, "auto": 3}, 4)
    assert languages.name(None) == "pt_BR"
    for spelling in ("pt_BR", "pt-BR", "PT_br", "pt"):
        assert languages.name(spelling) == "pt_BR" and languages.prompt(spelling) == 0
    assert languages.name("zh") == "zh_CN" and languages.name("ZH_tw") == "zh-TW"
    with pytest.raises(OptionError, match="similar ones are zh_CN, zh-TW"):
        languages.name("zh-HK")


def test_the_choice_of_a_language() -> None:
    languages = LanguageConfig("auto", {"en-US": 0, "en": 0, "en-GB": 4, "zh-TW": 5, "zh_CN": 6, "auto": 9}, 10)
    assert languages.names == ("en-US", "en-GB", "zh-TW", "zh_CN", "auto")
    assert dict(languages.by_prompt) == {0: "en-US", 4: "en-GB", 5: "zh-TW", 6: "zh_CN", 9: "auto"}
    cases = {None: 9, "AUTO": 9, "en": 0, "EN_gb": 4, "en-us": 0, "zh": 5, "zh-cn": 6}
    assert {name: languages.prompt(name) for name in cases} == cases
    assert [languages.name(name) for name in cases] == ["auto", "auto", "en-US", "en-GB", "en-US", "zh-TW", "zh_CN"]
    for name, hint in {
        "zh-HK": "similar ones are zh-TW, zh_CN",
        "en-AU": "similar ones are en-US, en-GB",
        "aut": "similar ones are auto",
        "fr": "choose one of auto, en-GB, en-US, zh-TW, zh_CN",
        "e": "choose one of",
    }.items():
        with pytest.raises(OptionError, match=f"^language is '{name}', which this model does not support; {hint}"):
            languages.name(name)
    similar = LanguageConfig("lang-a", {f"lang-{letter}": index for index, letter in enumerate("abcde")}, 5)
    with pytest.raises(OptionError, match=r"not support; similar ones are lang-\w, lang-\w, lang-\w\.$"):
        similar.name("lung")
    with pytest.raises(OptionError, match=r"^language is 5; it must be a text such as 'en-US'"):
        languages.name(5)  # type: ignore[arg-type]


def test_the_language_of_a_model_of_one_language() -> None:
    hindi = LanguageConfig("hi-IN")
    assert hindi.names == ("hi-IN",) and hindi.by_prompt == {0: "hi-IN"}
    for name in (None, "hi", "HI_in", "hi-XX"):
        assert hindi.name(name) == "hi-IN" and hindi.prompt(name) == 0
    with pytest.raises(OptionError, match=r"^language is 'en'; this model supports 'hi-IN' only"):
        hindi.name("en")


# -- checks of untrusted documents -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "accepted", "rejected"),
    [
        (untrusted.integer(2, 5), [2, 5], [1, 6, 2.0, True, "3", None, [3]]),
        (untrusted.number(-1, 2.5), [-1, 2.5, 0], [-1.001, 2.6, True, "1", None, float("nan"), 10**400]),
        (untrusted.text("[ab]+", "letters"), ["a", "abba"], ["", "c", "ab\n", "xaby", 5, None, b"a"]),
        (untrusted.text(), ["", "x" * 1000], ["x" * 1001, "\x1b", "a\nb", "\u202e"]),
        (untrusted.SHA256, ["0123456789abcdef" * 4], ["A" * 64, "a" * 63, "a" * 65, "a" * 63 + "g"]),
        (untrusted.one_of(1, "a", None), [1, "a", None], [True, 1.0, "b", "1", [1]]),
        (untrusted.relative_name, ["a", "a/b.c", "..a", "a" * 255, "é" * 127], ["a" * 256, "é" * 128, "a//b"]),
        (untrusted.relative_name, ["/".join(["a" * 99] * 10)], ["/".join(["a" * 99] * 10) + "/a", "", "/a", "a/"]),
        (untrusted.relative_name, ["a-b_c"], [".", "..", "a/../b", "a/./b", "...", "a\\b", "c:a", "a\0b", 5, None]),
        (untrusted.plain_name, ["a", "a.b"], ["a/b", "/a", "", "..", 5]),
        (untrusted.mapping, [{}, {"a": 1}], [[], None, "a"]),
        (
            untrusted.mapping_of(untrusted.integer(0, 3), 2),
            [{}, {"a": 1, "b": 3}],
            [{"a": 4}, dict.fromkeys("abc", 1), []],
        ),
        (untrusted.list_of(untrusted.integer(0, 3), 1, 2), [[0], [1, 3]], [[], [1, 2, 3], [4], {"a": 1}, "12", (1,)]),
    ],
)
def test_checks(check: untrusted.Check, accepted: list[Any], rejected: list[Any]) -> None:
    for value in accepted:
        result = check(value, "x")
        assert result == (tuple(value) if isinstance(value, list) else value)
    for value in rejected:
        with pytest.raises(ValueError) as caught:
            check(value, "field")
        assert re.match(r"field(\[\d\]|\.\w)? is ", str(caught.value)) and "; it must be " in str(caught.value)
        assert len(str(caught.value)) < 300


def test_fields_are_checked_by_name() -> None:
    checks = {"a": untrusted.integer(0, 3), "b": untrusted.list_of(untrusted.integer(0, 3))}
    assert untrusted.fields({"a": 1, "b": [2]}, "x", checks) == {"a": 1, "b": (2,)}
    for document, name, message in (
        ({"a": 1}, "x", "the field 'b' of x is missing"),
        ({"a": 1}, "", "the field 'b' is missing"),
        ({"a": 1, "b": [], "c": 1}, "x", "the field 'c' of x is unknown"),
        ({"a": 1, "b": [], "c": 1}, "", "the field 'c' is unknown"),
        ({"a": 1, "b": [1, 9]}, "x", "x.b[1] is 9; it must be a whole number from 0 to 3"),
        ({"a": 1, "b": [1, 9]}, "", "b[1] is 9; it must be"),
        ([], "", "the document is []; it must be an object"),
        (5, "x", "x is 5; it must be an object"),
    ):
        with pytest.raises(ValueError) as caught:
            untrusted.fields(document, name, checks)
        assert str(caught.value).startswith(message)


def test_files_are_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert untrusted.read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="larger than the limit of 4 bytes"):
        untrusted.read_regular(tmp_path / "a", 4)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "in").symlink_to("../folder")
    (tmp_path / "folder" / "up").symlink_to("../a")
    for name, message in (("in", "is not a regular file"), ("up", "leads outside the folder"), ("none", "is missing")):
        with pytest.raises(ValueError, match=message):
            untrusted.regular_inside(tmp_path / "folder", name)
    for name in ("../a", "/etc/passwd"):
        with pytest.raises(ValueError, match="name of a file inside the folder"):
            untrusted.regular_inside(tmp_path / "folder", name)
    assert untrusted.regular_inside(tmp_path, "folder/up") == tmp_path / "folder/up"
    os.mkfifo(tmp_path / "pipe")
    opened: list[int] = []

    def recorded(*arguments: Any) -> int:
        opened.append(os.open(*arguments))
        return opened[-1]

    replaced = SimpleNamespace(**{**vars(os), "open": recorded})
    monkeypatch.setattr(untrusted, "os", replaced)
    for name in ("pipe", "folder"):
        with pytest.raises(OSError):
            untrusted.open_regular(tmp_path / name)
        with pytest.raises(OSError, match="Bad file descriptor"):  # that of a rejected file is closed
            os.fstat(opened[-1])
    assert len(opened) == 2


def test_json_documents() -> None:
    assert untrusted.parse_json('{"a": [1, 2.5, null, true, "é"]}'.encode()) == {"a": [1, 2.5, None, True, "é"]}
    for content in ("NaN", "[Infinity]", '{"a": -Infinity}', '"\\ud800"', "[1e999]", "", "{", "[" * 10_000, b"\xff"):
        with pytest.raises(ValueError):
            untrusted.parse_json(content)


def test_short_representations() -> None:
    assert untrusted.short_repr("x" * 78) == "'" + "x" * 78 + "'"
    assert untrusted.short_repr("x" * 79) == "'" + "x" * 76 + "..."
    assert untrusted.short_repr([1] * 50, 10) == "[1, 1, ..." and untrusted.short_repr(10**5000) == "a int"
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert untrusted.short_repr(nested) == "a list"
