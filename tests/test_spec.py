"""The contract: what a manifest says comes back as it was, damage is named, and the formulas of time are NeMo's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemostream.errors import BundleError, NemostreamError, OptionError
from nemostream.spec import (
    Bundle,
    Chunk,
    Decoder,
    Encoder,
    Features,
    File,
    Graph,
    Manifest,
    Tensor,
    Weight,
    sha256,
)

CHUNKS = tuple(Chunk(ms=80 * frames, frames=frames, left=70, samples=1280 * frames) for frames in (1, 2, 7, 14))


def graphs(sha256: str) -> dict[str, Graph]:
    """One of every graph that a bundle has, described as if each were a joint."""
    inputs = (Tensor("encoded_joint", "float32", ("B", 640)), Tensor("predicted", "float32", ("B", 640)))
    outputs = (Tensor("logits", "float32", ("B", 1025)),)
    names = [f"{kind}-{chunk.ms}ms" for chunk in CHUNKS for kind in ("features", "encoder")]
    return {name: Graph("joint.onnx", sha256, inputs, outputs) for name in (*names, "decoder", "joint")}


def make_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": "contract",
        "features": Features(sample_rate=16000, mels=128, window=400, hop=160, n_fft=512, preemphasis=0.97),
        "encoder": Encoder(layers=24, d_model=1024, heads=8, subsampling=8, cache=70, conv_cache=8),
        "decoder": Decoder(layers=2, hidden=640, joint=640, vocabulary=1024, max_symbols=10, activation="relu"),
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
    """A length-delimited field of protobuf's wire format, of less than 128 bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def model_reading(location: str) -> bytes:
    """A serialized ONNX model with one initializer, whose values are in the file `location`."""
    entry = field(1, b"location") + field(2, location.encode())
    return b"\x08\x09" + field(7, field(5, b"\x10\x01" + field(13, entry)))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A whole bundle as far as the contract can tell: three files and a manifest with their hashes."""
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


# -- the file ----------------------------------------------------------------------------------------------------------


def test_round_trip() -> None:
    manifest = make_manifest()
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    # Equal is not enough: JSON's lists must be tuples again, or a frozen manifest could be changed.
    assert isinstance(again.chunks, tuple) and isinstance(again.graphs["joint"].inputs, tuple)
    assert again.graphs["joint"].inputs[0].shape == ("B", 640)


def test_round_trip_of_what_the_exporter_wrote(demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.chunks == tuple(sorted(CHUNKS, key=lambda chunk: chunk.ms))
    assert set(manifest.graphs) == {
        *(f"{kind}-{chunk.ms}ms" for kind in ("features", "encoder") for chunk in CHUNKS),
        "decoder",
        "joint",
    }


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    document = json.loads(make_manifest().to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a nemostream manifest"),
        ('"nemostream-bundle"', "not a nemostream manifest"),
        (edited(lambda d: d.update(format="other")), "not a nemostream manifest"),
        (edited(lambda d: d.update(version=1)), "version 1, this nemostream reads version 2"),
        (edited(lambda d: d.pop("version")), "version None"),
        (edited(lambda d: d.pop("chunks")), "'chunks'"),
        (edited(lambda d: d["encoder"].pop("layers")), "layers"),
        (edited(lambda d: d["encoder"].update(surprise=1)), "surprise"),
        (edited(lambda d: d["graphs"]["joint"].pop("sha256")), "'sha256'"),
        (edited(lambda d: d.update(graphs=[])), "export the checkpoint again"),
    ],
)
def test_a_manifest_that_is_none_says_why(text: str, says: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text, "somewhere/manifest.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("somewhere/manifest.json ")


def test_open_checks_every_file(bundle: Bundle) -> None:
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


def test_an_unknown_chunk_size_names_the_known_ones() -> None:
    manifest = make_manifest()
    assert [manifest.chunk(chunk.ms) for chunk in CHUNKS] == list(CHUNKS)
    with pytest.raises(OptionError, match=r"chunk size 100 ms .* one of 80, 160, 560, 1120"):
        manifest.chunk(100)


def test_errors_are_what_they_replace_and_have_their_own_exit_codes() -> None:
    kinds = NemostreamError.__subclasses__()
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes and NemostreamError.exit_code not in codes
    assert all(len(kind.__bases__) == 2 and kind.__bases__[1].__module__ == "builtins" for kind in kinds)


# -- time --------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_400_160_front_end() -> None:
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
        (159, 0, 0),  # less than one mel frame: nothing to say
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
    """Kernel 3, stride 2, two frames of padding before and one after: NeMo's causal convolution, counted by hand."""
    encoder = dataclasses.replace(make_manifest().encoder, subsampling=subsampling)
    manifest = make_manifest(encoder=encoder)
    frames, factor = manifest.mel_frames(samples), subsampling
    while factor > 1:
        frames = (frames + 2 + 1 - 3) // 2 + 1
        factor //= 2
    assert manifest.encoder_frames(samples) == frames


@given(samples=st.integers(160, 10**8), chunk=st.sampled_from(CHUNKS))
def test_the_steps_of_a_recording_hear_all_of_it(samples: int, chunk: Chunk) -> None:
    """The last step ends after the last sample that the last mel frame reads: 198 past its centre."""
    manifest = make_manifest()
    steps = -(-manifest.encoder_frames(samples) // chunk.frames)
    last = 160 * (manifest.mel_frames(samples) - 1) + 198
    assert steps * chunk.samples - manifest.lead > last
