"""Fuzz the parsers of files with mutated valid documents and random bytes: they succeed or raise nemostream's errors.

`NEMOSTREAM_FUZZ_EXAMPLES` sets the number of examples per test (300 by default).
"""

from __future__ import annotations

import copy
import io
import json
import math
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.bundle import Bundle, Manifest
from nemostream.errors import NemostreamError
from nemostream.external_data import external_files, initializer_shapes
from nemostream.plans import VERSION as PLAN_VERSION
from nemostream.plans import PlanStore, Recipe
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.snapshot import Checkpointer, StreamSnapshot
from nemostream.runtime.streaming.state import Hypothesis

fuzz = settings(settings.get_profile("fuzz"))

NESTED = "[" * 100_000
LEAVES: Any = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.integers(-3, 3)
    | st.sampled_from(
        [
            "O",
            "object",
            "float32",
            "../../etc/passwd",
            "/etc/passwd",
            "weights.bin",
            "a/../b",
            ".",
            "",
            "\0",
            "\ud800",
            "0" * 64,
            "f" * 64,
            2**31,
            2**63,
            2**64,
            -(2**63),
            10**400,
            1e308,
            "B",
            "cpu",
            "fp16",
            "*a",
            "${x}",
            [],
            {},
        ]
    )
)
VALUES: Any = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def paths(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a document."""
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from paths(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """Draw the document with one to three values replaced or removed, or fields added."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in paths(result) if path] or [("a",)]))
        parent = result
        for key in path:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove" and isinstance(parent, dict | list):
            parent.pop(last)
        elif change == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            parent[last] = draw(VALUES)
    return result


def as_json(value: Any) -> str:
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):
        return NESTED


def check_message(error: NemostreamError) -> None:
    """Check that the message has a reasonable length and no traceback."""
    assert 10 < len(str(error)) < 3000 and "Traceback" not in str(error)


# -- manifests ---------------------------------------------------------------------------------------------------------

MANIFEST = json.loads((nemostream.demo_bundle() / "manifest.json").read_text())
MANIFEST["graphs"] = {  # the minimum, so that mutations reach all parts of the document
    name: MANIFEST["graphs"][name] | {"inputs": MANIFEST["graphs"]["joint"]["inputs"]}
    for name in ("features-80ms", "encoder-80ms", "decoder", "joint")
}
for graph in MANIFEST["graphs"].values():
    graph["outputs"] = graph["outputs"][:1]
MANIFEST["chunks"] = MANIFEST["chunks"][:1]
TEXTS = mutated(MANIFEST).map(as_json) | VALUES.map(as_json) | st.text() | st.just(NESTED) | st.just('{"a":' * 50_000)


def test_the_original_manifest_is_valid() -> None:
    assert Manifest.from_json(json.dumps(MANIFEST)).chunks[0].ms == 80


@fuzz
@given(text=TEXTS)
def test_manifests(text: str, tmp_path: Path) -> None:
    try:
        manifest = Manifest.from_json(text)
    except NemostreamError as error:
        check_message(error)
        return
    # An accepted manifest is usable: it can be serialized, and its files and weights are inside the folder.
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.encoder_frames(16000) > 0 and math.isfinite(manifest.seconds(7))
    for weight in manifest.tensors.values():
        assert np.dtype(weight.dtype).hasobject is False
        assert weight.offset >= 0 and weight.offset + math.prod(weight.shape) <= manifest.weights.bytes
    for entry in (*manifest.graphs.values(), manifest.weights, manifest.tokenizer):
        assert (tmp_path / entry.file).resolve().is_relative_to(tmp_path.resolve())
    Chunker(manifest, manifest.chunks[0]).accept(np.zeros(3000, np.float32))


@fuzz
@given(content=st.binary(max_size=300) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_folders_with_malformed_manifests(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(NemostreamError) as caught:
        Bundle.open(tmp_path)
    check_message(caught.value)


GRAPH = (nemostream.demo_bundle() / "joint.onnx").read_bytes()


@fuzz
@given(data=st.data())
def test_graphs(data: st.DataObject) -> None:
    """The readers of external file names and of weight shapes accept a graph, or raise one of their errors."""
    graph = bytearray(GRAPH)
    for _ in range(data.draw(st.integers(0, 4))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    content = data.draw(st.sampled_from([bytes(graph), bytes(graph[: data.draw(st.integers(0, len(graph)))])]))
    for model in (content, data.draw(st.binary(max_size=100))):
        try:
            assert all(isinstance(name, str) for name in external_files(model))
            assert all(isinstance(name, str) for name in initializer_shapes(model))
        except ValueError as error:
            assert "ONNX" in str(error) or "UTF-8" in str(error) or "nested" in str(error)


# -- engines -----------------------------------------------------------------------------------------------------------

RECIPE = {
    "graph": "encoder-80ms",
    "graph_sha256": "a" * 64,
    "weights_sha256": "b" * 64,
    "backend": "tensorrt",
    "library": "11.0",
    "precision": "fp16",
    "device": "sm90",
    "max_batch": 64,
    "cache_dtype": "float16",
}
PLAN = {
    "format": "nemostream-plan",
    "version": PLAN_VERSION,
    "recipe": RECIPE,
    "seconds": 1.5,
    "validation": {"cosine": 1.0},
    "files": [{"file": "a.engine", "sha256": "c" * 64, "bytes": 3}],
}


@fuzz
@given(content=(mutated(PLAN).map(as_json) | VALUES.map(as_json) | st.just(NESTED)).map(str.encode) | st.binary())
def test_engine_descriptions(content: bytes, tmp_path: Path) -> None:
    store, recipe = PlanStore(tmp_path), Recipe(**RECIPE)
    (tmp_path / "a.engine").write_bytes(b"abc")
    (tmp_path / "any.json").write_bytes(content)
    description = tmp_path / f"{recipe.stem}.json"
    description.write_bytes(content)
    assert all(plan.folder == tmp_path and plan.recipe.stem == recipe.stem for plan in store.all())
    with pytest.raises(NemostreamError) as caught:  # the hashes never match
        store.find(recipe)
    check_message(caught.value)


# -- snapshots ---------------------------------------------------------------------------------------------------------

DEMO = Manifest.from_json((nemostream.demo_bundle() / "manifest.json").read_text())
ABOUT = {"model": "demo", "chunk_ms": 560}


def make_snapshot() -> StreamSnapshot:
    stream = Chunker(DEMO, DEMO.chunk(560))
    stream.accept(np.full(20_000, 0.1, np.float32))
    covered = sum(item.chunk.frames for item in stream.take())
    hypothesis = Hypothesis()
    hypothesis.extend([5, 6], [1280, 2560], [-0.5, -0.25], [1.5, 1.25])
    slot = {"position": np.array(covered), "node": np.array(0), "h": np.zeros((1, 4), np.float32)}
    guard = {"counts": np.array([0, 0], np.int64)}
    parts = {"chunker": stream.save(), "hypothesis": hypothesis.save(), "guard": guard, "slot": slot}
    return StreamSnapshot(parts, 20_000, "ab" * 16)


SNAPSHOT = make_snapshot()


class Guard:
    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: Any) -> None: ...


def restore(path: Path) -> tuple[Chunker, Hypothesis] | None:
    """Restore a stream's chunker and hypothesis from a snapshot file."""
    checkpointer = Checkpointer(path, ABOUT)
    snapshot = checkpointer.load()
    if snapshot is None:
        return None
    chunker, hypothesis = Chunker(DEMO, DEMO.chunk(560)), Hypothesis()
    checkpointer.restore(snapshot, {"chunker": chunker, "hypothesis": hypothesis, "guard": Guard()}, 896, 1)
    return chunker, hypothesis


def write(path: Path, snapshot: StreamSnapshot) -> bytes:
    """Write a snapshot; return the content of the file."""
    Checkpointer(path, ABOUT).save(snapshot)
    return path.read_bytes()


def test_the_original_snapshot_is_valid(tmp_path: Path) -> None:
    write(tmp_path / "state", SNAPSHOT)
    restored = restore(tmp_path / "state")
    assert restored is not None
    chunker, hypothesis = restored
    assert hypothesis.tokens == [5, 6] and chunker.samples == 20_000


ARRAYS = [(part, name) for part, arrays in SNAPSHOT.parts.items() for name in arrays]
NUMBERS = st.integers(-3, 3) | st.sampled_from([2**31, 2**53, 2**62, -(2**62)]) | st.integers(0, 40_000)


@st.composite
def mutated_array(draw: st.DrawFn, original: np.ndarray) -> np.ndarray:
    """Draw the array with changed values, or another length, type or shape."""
    change = draw(st.sampled_from(["values", "values", "length", "type", "shape", "nan"]))
    array = original.copy()
    if change == "values" and array.size and array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        array.flat[draw(st.integers(0, array.size - 1))] = np.clip(draw(NUMBERS), limits.min, limits.max)
    elif change == "nan" and array.size and array.dtype.kind == "f":
        array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from([math.nan, math.inf, 1e30]))
    elif change == "length":
        array = np.resize(array, draw(st.integers(0, 12)))
    elif change == "shape":
        array = array.reshape((1, *array.shape))
    else:
        array = array.astype(draw(st.sampled_from(["f8", "i8", "i4", "?", "u1", "S3", "c8", ">f4"])))
    return array


@fuzz
@given(data=st.data())
def test_snapshots_with_mutated_arrays(data: st.DataObject, tmp_path: Path) -> None:
    parts = {part: dict(arrays) for part, arrays in SNAPSHOT.parts.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        part, name = data.draw(st.sampled_from(ARRAYS))
        if data.draw(st.integers(0, 4)) == 0:
            parts[part].pop(name, None)
        else:
            parts[part][name] = data.draw(mutated_array(SNAPSHOT.parts[part][name]))
    samples = data.draw(st.sampled_from([20_000, 20_000, 0, -1, 2**60]))
    write(
        tmp_path / "state", StreamSnapshot(parts, samples, data.draw(st.sampled_from(["ab" * 16, "", "é", "x" * 1000])))
    )
    try:
        restored = restore(tmp_path / "state")
    except NemostreamError as error:
        check_message(error)
        return
    assert restored is not None
    chunker, hypothesis = restored
    assert chunker.samples == 20_000
    chunker.accept(np.zeros(30_000, np.float32))  # an accepted stream can continue and finish
    chunker.finish()
    assert len(chunker.take()) < 100 and all(0 <= token < 896 for token in hypothesis.tokens)


@fuzz
@given(data=st.data())
def test_snapshots_with_random_bytes(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(write(tmp_path / "state", SNAPSHOT))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    (tmp_path / "state").write_bytes(data.draw(st.just(bytes(content[:cut])) | st.binary(max_size=200)))
    try:
        restore(tmp_path / "state")
    except NemostreamError as error:
        check_message(error)


@fuzz
@given(header=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("latin1", "replace")), doc=VALUES)
def test_snapshots_with_malformed_headers(header: bytes, doc: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "state", "w") as archive:
        archive.writestr("chunker.counts.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        document = io.BytesIO()
        np.save(document, np.frombuffer(as_json(doc).encode() or b"0", np.uint8))
        archive.writestr("document.npy", document.getvalue())
    with pytest.raises(NemostreamError) as caught:
        restore(tmp_path / "state")
    check_message(caught.value)


# -- checkpoints -------------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "target": "nemo.collections.asr.models.rnnt_bpe_models.EncDecRNNTBPEModel",
    "tokenizer": {"type": "bpe", "model_path": "nemo:tokenizer.model"},
    "preprocessor": {
        "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
        "sample_rate": 16000,
        "normalize": "NA",
        "window_size": 0.025,
        "window_stride": 0.01,
        "window": "hann",
        "features": 80,
        "n_fft": 512,
        "log": True,
        "frame_splicing": 1,
        "preemph": 0.97,
        "log_zero_guard_value": 1e-8,
    },
    "encoder": {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder",
        "feat_in": 80,
        "feat_out": -1,
        "n_layers": 2,
        "d_model": 64,
        "subsampling": "dw_striding",
        "subsampling_factor": 8,
        "causal_downsampling": True,
        "att_context_style": "chunked_limited",
        "att_context_size": [[70, 6], [70, 0]],
        "conv_kernel_size": 9,
        "conv_context_size": "causal",
        "conv_norm_type": "layer_norm",
        "n_heads": 4,
        "xscaling": False,
        "self_attention_model": "rel_pos",
    },
    "decoder": {
        "_target_": "nemo.collections.asr.modules.RNNTDecoder",
        "normalization_mode": None,
        "blank_as_pad": True,
        "prednet": {"pred_hidden": 48, "pred_rnn_layers": 1},
        "vocab_size": 128,
    },
    "joint": {
        "_target_": "nemo.collections.asr.modules.RNNTJoint",
        "num_classes": 128,
        "vocabulary": ["a", "b"],
        "jointnet": {"joint_hidden": 48, "activation": "relu"},
    },
    "decoding": {"greedy": {"max_symbols": 10}},
}


@fuzz
@given(config=mutated(CONFIG))
def test_configurations(config: Any) -> None:
    checkpoint = pytest.importorskip("nemostream.export.checkpoint", reason="needs the export extra")
    checkpoint.check_config(CONFIG)
    try:
        model = checkpoint.check_config(config)
    except NemostreamError as error:
        check_message(error)
        return
    # An accepted configuration can be exported: no size is too large to allocate.
    for spec in (model.features, model.encoder, model.decoder, *model.chunks):
        for name, value in vars(spec).items():
            assert isinstance(value, int | float | str) and not isinstance(value, bool), name
            assert isinstance(value, str) or 0 <= value < 1 << 30, name


YAML = st.text(max_size=200) | st.sampled_from(
    [
        "a: &a [1,1,1,1]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]",
        "&a [*a]",
        "a: 1e999",
        "a: !!python/object:os.x 1",
        "[" * 50_000,
        "{a: " * 5_000,
        "- " * 5_000,
        "2020-13-45",
        "? [a]\n: b",
        "!!binary x",
        "<<: [1]",
        "{[]: 1}",
        "1:2:3:4:5",
        "!!timestamp 9999-99-99",
        "!!int x",
        "!!float .",
        "!!set {a, b}",
        "!!omap [1]",
        "\x00",
        "%YAML 9.9\n---",
    ]
)


@fuzz
@given(content=st.binary(max_size=2000), text=YAML, valid_tar=st.booleans(), name=st.text(max_size=30))
def test_archives(content: bytes, text: str, valid_tar: bool, name: str, tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("nemostream.export.checkpoint", reason="needs the export extra")
    path = tmp_path / "any.nemo"
    if valid_tar:
        document = text.encode("utf-8", "surrogatepass")
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("./model_config.yaml")
            member.size = len(document)
            archive.addfile(member, io.BytesIO(document))
        data = bytearray(path.read_bytes())
        for index, byte in enumerate(content[:3]):  # of the header, or of the document
            data[byte * (index + 1) % len(data)] = byte
        path.write_bytes(data if len(content) % 2 else path.read_bytes())
    else:
        path.write_bytes(content)
    try:
        config = checkpoint.read_config(path)
        checkpoint.check_config(config)
    except NemostreamError as error:
        check_message(error)
