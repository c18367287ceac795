"""The graph with fused attention, compared with the plain graph. The CUDA kernel on the CPU computes its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from attention_kernel import CpuAttention
from cuda_on_cpu import MISSING
from prompted import prompted_bundle

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engine.attention import DOMAIN, INPUTS, OP, fuse_attention
from nemostream.engine.precision import CACHE_DTYPES, quantisable, read_encoder, write_typed
from nemostream.engines import speech
from nemostream.errors import BackendError
from nemostream.step_loop import padded_chunks, run_steps

needs_compiler = pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")
KINDS: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


def session(model: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # optimisations would remove casts
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def split_nodes(model: onnx.ModelProto) -> tuple[list[onnx.NodeProto], onnx.ModelProto]:
    """Return the fused nodes, and the graph without them: their outputs are its inputs, their inputs its outputs."""
    graph, rest = model.graph, onnx.ModelProto()
    rest.CopyFrom(model)
    nodes = [node for node in graph.node if node.op_type == OP]
    others = [node for node in graph.node if node.op_type != OP]
    del rest.graph.node[:]
    rest.graph.node.extend(others)
    cache = next(value for value in graph.input if value.name == "k_cache.0").type.tensor_type
    _, heads, _, d_k = (axis.dim_value for axis in cache.shape.dim)
    frames = (
        next(value for value in graph.output if value.name == "encoded_joint").type.tensor_type.shape.dim[1].dim_value
    )
    for node in nodes:
        shape = ["B", frames, heads * d_k]
        rest.graph.input.append(onnx.helper.make_tensor_value_info(node.output[0], cache.elem_type, shape))
    computed = {name for node in others for name in node.output}
    wanted = [name for node in nodes for name in node.input if name in computed]
    rest.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(wanted))
    return nodes, rest


class FusedEncoder:
    """A graph with fused attention: ONNX Runtime runs all other nodes, up to the next fused node at a time."""

    def __init__(self, bundle: Bundle, chunk: ChunkConfig, model: onnx.ModelProto, folder: Path) -> None:
        spec, graph = bundle.manifest.encoder, model.graph
        self.nodes, rest = split_nodes(model)
        self.names = [value.name for value in graph.output]
        self._session = session(rest, folder)
        self._constants = {}
        for tensor in graph.initializer:
            if any(tensor.name in node.input for node in self.nodes):
                self._constants[tensor.name] = read_tensor(tensor, folder)
        outputs = {value.name for value in self._session.get_outputs()}
        self._computed = [[name for name in node.input if name in outputs] for node in self.nodes]
        fused = {node.output[0] for node in self.nodes}
        self.inputs = {
            value.name: (value.shape, KINDS[value.type])
            for value in self._session.get_inputs()
            if value.name not in fused
        }
        self._shape, self._dtype = (chunk.frames, spec.d_model), self.inputs["k_cache.0"][1]
        sizes = (chunk.frames, spec.cache, spec.heads, spec.d_model // spec.heads)
        self._kernel = CpuAttention(*sizes, np.dtype(self._dtype).name)

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = len(feed["row_slot"])
        attended = {node.output[0]: np.zeros([rows, *self._shape], self._dtype) for node in self.nodes}
        for node, computed in zip(self.nodes, self._computed, strict=True):
            values = dict(zip(computed, self._session.run(computed, {**feed, **attended}), strict=True))
            values = {**self._constants, **feed, **values}
            inputs = {name: values[value] for name, value in zip(INPUTS, node.input, strict=True)}
            attended[node.output[0]] = self._kernel(inputs)
        return dict(zip(self.names, self._session.run(self.names, {**feed, **attended}), strict=True))


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """Return a copy of an initializer, which may be stored in a file in `folder`."""
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    if copy.external_data:
        onnx.external_data_helper.load_external_data_for_tensor(copy, str(folder))
    return onnx.numpy_helper.to_array(copy)


def fused_graph(bundle: Bundle, chunk: ChunkConfig) -> onnx.ModelProto:
    model = read_encoder(bundle, chunk)
    fuse_attention(model)
    return model


def test_structure(demo_bundle: Bundle) -> None:
    """The replaced nodes are removed; caches are slot arrays; all other inputs and outputs are unchanged."""
    chunk = demo_bundle.manifest.chunk(560)
    plain, fused = read_encoder(demo_bundle, chunk).graph, fused_graph(demo_bundle, chunk)
    kinds = [node.op_type for node in fused.graph.node]
    layers = demo_bundle.manifest.encoder.layers
    assert kinds.count(OP) == layers
    assert not {"Softmax", "GatherElements", "Mod", "Where"} & set(kinds)
    kept = {node.name for node in fused.graph.node}
    assert sum(node.name.startswith("layers.0/") and node.name not in kept for node in plain.node) == 23
    assert {opset.domain for opset in fused.opset_import} == {"", DOMAIN}
    used = {name for node in fused.graph.node for name in node.input}
    assert {tensor.name for tensor in fused.graph.initializer} <= used
    shapes = [
        {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
        for graph in (plain, fused.graph)
    ]
    assert shapes[1].pop("row_slot") == ["B"]
    assert shapes[1] == {name: ["S", *shape[1:]] if "cache" in name else shape for name, shape in shapes[0].items()}
    assert [value.name for value in fused.graph.output] == [value.name for value in plain.output]


def test_another_graph_is_rejected(demo_bundle: Bundle) -> None:
    chunk = demo_bundle.manifest.chunk(80)
    model = read_encoder(demo_bundle, chunk)
    next(node for node in model.graph.node if node.op_type == "GatherElements").op_type = "Gather"
    with pytest.raises(BackendError, match=r"cannot be fused .* is not the output of a GatherElements.*export"):
        fuse_attention(model)
    model = fused_graph(demo_bundle, chunk)
    with pytest.raises(BackendError, match=r"cannot be fused .it has no Softmax"):
        fuse_attention(model)


@needs_compiler
@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
def test_step_equals_the_plain_graph(ms: int, demo_bundle: Bundle) -> None:
    """Rows at different positions, in permuted slots, next to idle rows; slots that no row uses are not read."""
    compare_step(ms, demo_bundle)


@needs_compiler
def test_step_of_a_prompted_model(demo_bundle: Bundle, tmp_path: Path) -> None:
    compare_step(560, prompted_bundle(demo_bundle, tmp_path / "bundle"))


def compare_step(ms: int, bundle: Bundle) -> None:
    """Compare all outputs of a step of the fused graph with those of the plain graph."""
    chunk, spec = bundle.manifest.chunk(ms), bundle.manifest.encoder
    plain = session(read_encoder(bundle, chunk), bundle.path)
    fused = FusedEncoder(bundle, chunk, fused_graph(bundle, chunk), bundle.path)
    rng = np.random.default_rng(ms)
    position = np.array([0, 1, chunk.frames, 69, 70, 71, 500])
    window = spec.mel_cache + spec.subsampling * chunk.frames
    valid = np.array([window, window - 1, window, 20, window, 10, window - 9])
    rows, slots = len(position), len(position) + 3
    used = rng.permutation(slots)[:rows].astype(np.int32)
    feed: dict[str, Any] = {"position": position, "valid": valid}
    if bundle.manifest.languages.count:
        feed["prompt"] = np.arange(rows) % bundle.manifest.languages.count
    for value in plain.get_inputs():
        if value.name not in feed:
            feed[value.name] = rng.standard_normal([rows, *value.shape[1:]]).astype(KINDS[value.type])
    with_slots = {}
    for name, (shape, dtype) in fused.inputs.items():
        if shape[0] == "S":
            unused = np.nan if name.startswith(("k_cache", "v_cache")) else 0
            with_slots[name] = np.full([slots, *shape[1:]], unused, dtype)
            with_slots[name][used] = feed[name]
        elif name != "row_slot":
            with_slots[name] = np.concatenate([feed[name], feed[name][:1]])
    with_slots["row_slot"] = np.append(used, np.int32(-1))
    got = fused.run(with_slots)
    wanted = dict(zip(fused.names, plain.run(fused.names, feed), strict=True))
    for name in fused.names:
        rows_of = got[name][:, :rows] if name in ("k_new", "v_new", "conv_next") else got[name][:rows]
        np.testing.assert_allclose(rows_of, wanted[name], atol=5e-5, rtol=1e-4, err_msg=name)
    assert all(np.isfinite(array).all() for array in got.values())


def stream(
    bundle: Bundle, chunk: ChunkConfig, encoder: FusedEncoder, audio: np.ndarray, slots: list[int]
) -> np.ndarray:
    """Return `encoded_joint` [B, frames, J] of one recording in each of `slots`, the last ones starting later."""
    manifest, spec = bundle.manifest, bundle.manifest.encoder
    features = ort.InferenceSession(bundle.file(f"features-{chunk.ms}ms"), providers=["CPUExecutionProvider"])
    state = {
        name: np.zeros([9, *shape[1:]], dtype) for name, (shape, dtype) in encoder.inputs.items() if shape[0] == "S"
    }
    steps = list(padded_chunks(manifest, chunk, audio))
    tails = {slot: np.zeros((1, manifest.features.tail), np.float32) for slot in slots}
    found: dict[int, list[np.ndarray]] = {slot: [] for slot in slots}
    for turn in range(len(steps) + len(slots) - 1):
        active = [(slot, steps[turn - late]) for late, slot in enumerate(slots) if 0 <= turn - late < len(steps)]
        mels = []
        for slot, step in active:
            audio_in = {"audio": step.audio[None], "audio_tail": tails[slot], "lengths": np.array([step.length])}
            mel, tails[slot] = features.run(["mel", "audio_tail_next"], audio_in)
            mels.append(mel)
        rows = np.array([slot for slot, _ in active], np.int32)
        position = np.array([step.position for _, step in active])
        window = {"mel": np.concatenate(mels), "position": position, "valid": np.array([s.valid for _, s in active])}
        outputs = encoder.run({**window, **state, "row_slot": rows})
        for row, (slot, step) in enumerate(active):
            found[slot].append(outputs["encoded_joint"][row])
            ring = (step.position + np.arange(chunk.frames)) % spec.cache
            state["mel_cache"][slot] = outputs["mel_cache_next"][row]
            for layer in range(spec.layers):
                state[f"k_cache.{layer}"][slot][:, ring] = outputs["k_new"][layer, row]
                state[f"v_cache.{layer}"][slot][:, ring] = outputs["v_new"][layer, row]
                state[f"conv_cache.{layer}"][slot] = outputs["conv_next"][layer, row]
    return np.stack([np.concatenate(found[slot]) for slot in slots])


@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_typed_graph_on_speech(precision: str, demo_bundle: Bundle, tmp_path: Path) -> None:
    """Streams that start one step apart, in slots 5 and 2, until their rings have wrapped around."""
    manifest, chunk = demo_bundle.manifest, demo_bundle.manifest.chunk(560)
    audio = speech(manifest)[0][: 12 * chunk.samples]
    features = ort.InferenceSession(demo_bundle.file("features-560ms"), providers=["CPUExecutionProvider"])
    plain = ort.InferenceSession(demo_bundle.file("encoder-560ms"), providers=["CPUExecutionProvider"])
    steps = list(padded_chunks(manifest, chunk, audio))
    assert len(steps) * chunk.frames > manifest.encoder.cache + chunk.frames
    wanted = np.concatenate(
        [outputs["encoded_joint"][0] for outputs in run_steps(manifest, chunk, steps, features, plain)]
    )
    path, _ = write_typed(demo_bundle, chunk, precision, None, tmp_path, "test", fused_attention=True)
    onnx.checker.check_model(path)
    encoder = FusedEncoder(demo_bundle, chunk, onnx.load(path, load_external_data=False), tmp_path)
    got = stream(demo_bundle, chunk, encoder, audio, [5, 2])
    for row in got.astype(np.float64):
        cosine = (row * wanted).sum(-1) / (np.linalg.norm(row, axis=-1) * np.linalg.norm(wanted, axis=-1))
        assert cosine.min() >= (0.9999999 if precision == "fp32" else 0.9995)
    if precision == "fp32":
        np.testing.assert_allclose(got, np.broadcast_to(wanted, got.shape), atol=1e-4)


@pytest.mark.parametrize("precision", [*CACHE_DTYPES])
def test_types_of_the_fused_node(precision: str, demo_bundle: Bundle, tmp_path: Path) -> None:
    """Its tensors other than integers have the type of the caches, as the kernel requires."""
    chunk = demo_bundle.manifest.chunk(80)
    ranges = dict.fromkeys(quantisable(read_encoder(demo_bundle, chunk)), 1.0)
    path, _ = write_typed(demo_bundle, chunk, precision, ranges, tmp_path, "test", fused_attention=True)
    model = onnx.load(path, load_external_data=False)
    kind = getattr(onnx.TensorProto, {"float32": "FLOAT"}.get(CACHE_DTYPES[precision], CACHE_DTYPES[precision].upper()))
    nodes, rest = split_nodes(model)
    graph = onnx.shape_inference.infer_shapes(rest, check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    expected = {"row_slot": onnx.TensorProto.INT32} | dict.fromkeys(
        ("position", "old_frames", "new_frames"), onnx.TensorProto.INT64
    )
    for node in nodes:
        found = {name: types[value] for name, value in zip(INPUTS, node.input, strict=True)}
        assert found == {name: expected.get(name, kind) for name in INPUTS}
