"""Output of typed graphs compared with the fp32 graph, on consecutive steps of speech."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from prompted import LANGUAGES, prompted_bundle

from nemostream.bundle import Bundle, ChunkConfig
from nemostream.engine.calibration import measure_ranges
from nemostream.engine.precision import CACHE_DTYPES, quantisable, read_encoder, write_int8_for_cpu, write_typed
from nemostream.engines import speech
from nemostream.errors import BackendError

STEPS = 14
PROMPT_WEIGHTS = ("prompt.table", "prompt.in.weight", "prompt.out.weight", "prompt.out.bias")
PROMPTS = sorted(LANGUAGES.prompts.values())
MIN_COSINE = {"fp32": 0.99999, "fp16": 0.9995, "bf16": 0.998, "int8": 0.99, "fp8": 0.99}


@pytest.fixture(scope="module")
def ranges(demo_bundle: Bundle) -> dict[str, float]:
    return measure_ranges(demo_bundle, demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest))


def session(model: Path | bytes, folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # optimisations would remove casts
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def as_fp32(path: Path, kind: int = TensorProto.BFLOAT16) -> bytes:
    """Convert a 16-bit graph to fp32 with the result of every node rounded to 16 bit.

    CPUs cannot run bf16, and ONNX Runtime computes chains of fp16 nodes on a CPU in fp32, where nothing overflows.
    """
    model = onnx.load(path)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == kind:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *graph.input, *graph.output)}
    nodes = []
    for node in graph.node:
        outputs = list(node.output)
        rounded = [name for name in outputs if types.get(name) == kind]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == kind:
                attribute.i = TensorProto.FLOAT
        for index, name in enumerate(outputs):
            if name in rounded:
                node.output[index] = f"{name}/fp32"
        nodes.append(node)
        for name in rounded:
            nodes.append(helper.make_node("Cast", [f"{name}/fp32"], [f"{name}/rounded"], to=kind))
            nodes.append(helper.make_node("Cast", [f"{name}/rounded"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == kind:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    model.opset_import[0].version = 21
    return model.SerializeToString()


def encode(
    encoder: Any, bundle: Bundle, chunk: ChunkConfig, audio: np.ndarray, rows: int = 1, steps: int = STEPS
) -> np.ndarray:
    """Return `encoded_joint` [steps, B, T, J] of `rows` streams with the same audio.

    They have increasing volumes, or, if the model is prompted, the prompts `PROMPTS`.
    """
    manifest, spec = bundle.manifest, bundle.manifest.encoder
    features = ort.InferenceSession(bundle.file(f"features-{chunk.ms}ms"), providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    state: dict[str, Any] = {
        value.name: np.zeros([rows, *value.shape[1:]], kinds[value.type])
        for value in encoder.get_inputs()
        if "cache" in value.name
    }
    gains = np.linspace(1, 1 if manifest.languages.count else 3, rows, dtype=np.float32)[:, None]
    tail = np.zeros((rows, manifest.features.tail), np.float32)
    samples = np.concatenate([np.zeros(manifest.lead, np.float32), audio])
    names, found = [output.name for output in encoder.get_outputs()], []
    for step in range(steps):
        part = gains * samples[None, step * chunk.samples : (step + 1) * chunk.samples]
        lengths, position = np.full(rows, chunk.samples), step * chunk.frames
        mel, tail = features.run(["mel", "audio_tail_next"], {"audio": part, "audio_tail": tail, "lengths": lengths})
        valid = np.full(rows, spec.mel_cache + spec.subsampling * chunk.frames)
        inputs = {"mel": mel, "position": np.full(rows, position), "valid": valid, **state}
        if manifest.languages.count:
            inputs["prompt"] = np.resize(PROMPTS, rows)
        outputs = dict(zip(names, encoder.run(names, inputs), strict=True))
        ring = (position + np.arange(chunk.frames)) % spec.cache
        state["mel_cache"] = outputs["mel_cache_next"]
        for layer in range(spec.layers):
            state[f"k_cache.{layer}"][:, :, ring] = outputs["k_new"][layer]
            state[f"v_cache.{layer}"][:, :, ring] = outputs["v_new"][layer]
            state[f"conv_cache.{layer}"] = outputs["conv_next"][layer]
        found.append(outputs["encoded_joint"])
    return np.stack(found)


def cosines(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    return (got * wanted).sum(-1) / (np.linalg.norm(got, axis=-1) * np.linalg.norm(wanted, axis=-1))


@pytest.mark.parametrize("ms", [80, 560, 1120])
@pytest.mark.parametrize("precision", [*CACHE_DTYPES])
def test_typed_graph_output(
    precision: str, ms: int, demo_bundle: Bundle, ranges: dict[str, float], tmp_path: Path
) -> None:
    chunk, audio = demo_bundle.manifest.chunk(ms), speech(demo_bundle.manifest)[0]
    wanted = encode(session(demo_bundle.file(f"encoder-{ms}ms"), demo_bundle.path), demo_bundle, chunk, audio)
    path, weights = write_typed(demo_bundle, chunk, precision, ranges, tmp_path, "test")
    assert {path.name, weights.name} == {"test.onnx", "test.bin"} == {file.name for file in tmp_path.iterdir()}
    onnx.checker.check_model(path, full_check=True)
    got = encode(session(as_fp32(path) if precision == "bf16" else path, tmp_path), demo_bundle, chunk, audio)
    cosine = float(cosines(got, wanted).min())
    assert cosine > MIN_COSINE[precision]
    if precision != "fp32":
        assert not np.array_equal(got, wanted), "the precision has no effect"
    else:
        np.testing.assert_array_equal(got, wanted)


class TappedEncoder:
    """A session that also collects the values of one tensor in every step."""

    def __init__(self, model: onnx.ModelProto, folder: Path, name: str) -> None:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
        self._session, self._name = session(model.SerializeToString(), folder), name
        self.get_inputs = self._session.get_inputs
        self.values: list[np.ndarray] = []

    def get_outputs(self) -> list[Any]:
        return [output for output in self._session.get_outputs() if output.name != self._name]

    def run(self, names: list[str], inputs: Any) -> list[np.ndarray]:
        *outputs, value = self._session.run([*names, self._name], inputs)
        self.values.append(value.astype(np.float64))
        return outputs


def with_xscaling(bundle: Bundle, folder: Path, factor: float) -> Bundle:
    """Return a copy of a bundle whose subsampling output is multiplied, as that of models with xscaling."""
    shutil.copytree(bundle.path, folder)
    graph = onnx.load(bundle.file("encoder-560ms"), load_external_data=False).graph
    for tensor in (tensor for tensor in graph.initializer if tensor.name.startswith("encoder.pre_encode.out.")):
        where = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
        array = np.memmap(folder / "weights.bin", np.float32, "r+", where["offset"], tuple(tensor.dims))
        array *= np.float32(factor)
        array.flush()
    return Bundle(folder, bundle.manifest)


@pytest.mark.parametrize(("precision", "error"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_large_subsampling_outputs(precision: str, error: float, demo_bundle: Bundle, tmp_path: Path) -> None:
    """Models with xscaling have outputs of several thousand, times 22.6: above 65504, the largest fp16 number."""
    bundle = with_xscaling(demo_bundle, tmp_path / "bundle", 40 * 22.6)
    chunk, audio = bundle.manifest.chunk(560), speech(bundle.manifest)[0]
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    path, _ = write_typed(bundle, chunk, precision, None, tmp_path, "test")
    plain, typed = read_encoder(bundle, chunk), onnx.load_from_string(as_fp32(path, kind))
    found = []
    for model, folder in ((plain, bundle.path), (typed, tmp_path)):
        (product,) = (n for n in model.graph.node if any("pre_encode.out.bias" in name for name in n.input))
        encoder = TappedEncoder(model, folder, product.output[0])
        found.append((encode(encoder, bundle, chunk, audio), np.stack(encoder.values)))
    (wanted, subsampled), (got, rounded) = found
    assert np.abs(subsampled).max() > 1.2e5
    difference = np.linalg.norm(rounded - subsampled, axis=-1) / np.linalg.norm(subsampled, axis=-1)
    assert difference.max() < error
    assert cosines(got, wanted).min() > MIN_COSINE[precision]


@pytest.mark.parametrize("precision", [*CACHE_DTYPES])
def test_prompted_model(precision: str, demo_bundle: Bundle, ranges: dict[str, float], tmp_path: Path) -> None:
    """Rows with different prompts, compared with fp32; ids stay integers, layers are 16 bit and not quantised."""
    bundle = prompted_bundle(demo_bundle, tmp_path / "bundle")
    chunk, audio = bundle.manifest.chunk(560), speech(bundle.manifest)[0]
    plain = session(bundle.file("encoder-560ms"), bundle.path)
    wanted = encode(plain, bundle, chunk, audio, rows=4, steps=6)
    assert all(np.abs(wanted[:, 0] - wanted[:, row]).max() > 1 for row in (1, 2, 3)), "rows depend on their prompts"
    path, _ = write_typed(bundle, chunk, precision, ranges, tmp_path, "test")
    onnx.checker.check_model(path, full_check=True)
    typed = session(as_fp32(path) if precision == "bf16" else path, tmp_path)
    got = encode(typed, bundle, chunk, audio, rows=4, steps=6)
    assert cosines(got, wanted).min() > MIN_COSINE[precision]
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert kinds["prompt"] == TensorProto.INT64
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    stored = {t.name: t.data_type for t in graph.initializer if t.name.startswith("prompt.")}
    assert stored == {f"{name}:{CACHE_DTYPES[precision]}": kind[CACHE_DTYPES[precision]] for name in PROMPT_WEIGHTS}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_types_of_operations(precision: str, demo_bundle: Bundle, ranges: dict[str, float], tmp_path: Path) -> None:
    path, _ = write_typed(demo_bundle, demo_bundle.manifest.chunk(160), precision, ranges, tmp_path, "test")
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {t.name: t.data_type for t in inferred.initializer}
    cache_dtype = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[CACHE_DTYPES[precision]]
    layers = demo_bundle.manifest.encoder.layers
    kinds: dict[str, list[int]] = {}
    for node in model.graph.node:
        kinds.setdefault(node.op_type, []).append(types[node.input[0]])
    assert set(kinds["LayerNormalization"]) == set(kinds["Softmax"]) == {TensorProto.FLOAT}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    (subsampled,) = (node for node in products if types[node.input[0]] == TensorProto.FLOAT)
    assert subsampled.input[1] == "encoder.pre_encode.out.weight:float32"
    assert set(kinds["MatMul"]) == {TensorProto.FLOAT, cache_dtype}
    assert len(kinds["Softmax"]) == layers
    assert kinds["Conv"].count(TensorProto.FLOAT) == 1  # the first, on mel
    assert set(kinds["Conv"]) == {TensorProto.FLOAT, cache_dtype}
    for value in (*model.graph.input, *model.graph.output):
        kind, name = value.type.tensor_type.elem_type, value.name
        if name.startswith(("k_", "v_", "conv_")):
            assert kind == cache_dtype, name
        elif name not in ("position", "valid"):
            assert kind == TensorProto.FLOAT, name
    assert {output.name for output in model.graph.output} == {
        "encoded_joint",
        "mel_cache_next",
        "k_new",
        "v_new",
        "conv_next",
    }
    quantised = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == (8 * layers if precision in ("int8", "fp8") else 0)
    eight = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}.get(precision)
    weights = [t.name for t in model.graph.initializer if t.data_type == eight and len(t.dims) == 2]
    assert len(weights) == len(quantised)
    for name in weights:
        assert not any(part in name for part in ("position", "linear_pos", "pre_encode", "joint", "depthwise")), name


def test_int8_on_a_cpu(demo_bundle: Bundle, tmp_path: Path) -> None:
    """The output is close to fp32 and does not depend on the other streams of the batch."""
    chunk, audio = demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest)[0]
    path, _ = write_int8_for_cpu(demo_bundle, chunk, tmp_path, "test")
    encoder = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = encode(session(demo_bundle.file("encoder-560ms"), demo_bundle.path), demo_bundle, chunk, audio)
    alone = encode(encoder, demo_bundle, chunk, audio)
    assert cosines(alone, wanted).min() > 0.999
    batch = encode(encoder, demo_bundle, chunk, audio, rows=5)
    np.testing.assert_allclose(batch[:, :1], alone, atol=2e-4)  # fp32 parts of the graph sum in another order
    model = onnx.load(path, load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 8 * demo_bundle.manifest.encoder.layers
    assert not any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.node)


def test_ranges_are_the_largest_inputs(demo_bundle: Bundle, ranges: dict[str, float]) -> None:
    """Compared with the largest input of one layer in steps run by the test."""
    chunk, audio = demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest)[1]
    model = read_encoder(demo_bundle, chunk)
    names = quantisable(model)
    assert ranges.keys() == names.keys()
    weight = next(name for name in names if "layers.3.feed_forward2.linear1" in name)
    model.graph.output.append(helper.make_tensor_value_info(names[weight], TensorProto.FLOAT, None))
    found = []
    encoder = session(model.SerializeToString(), demo_bundle.path)

    class RecordingEncoder:
        def __getattr__(self, name: str) -> Any:
            return getattr(encoder, name)

        def run(self, outputs: Any, inputs: Any) -> Any:
            values = encoder.run(outputs, inputs)
            found.append(np.abs(values[outputs.index(names[weight])]).max())
            return values

    steps = len(audio) // chunk.samples
    assert steps >= 4
    encode(RecordingEncoder(), demo_bundle, chunk, audio, steps=steps)
    assert measure_ranges(demo_bundle, chunk, [audio])[weight] == pytest.approx(max(found), rel=1e-5)
    assert all(math.isfinite(value) and value > 0 for value in ranges.values())


def test_ranges_of_a_prompted_model(demo_bundle: Bundle, tmp_path: Path) -> None:
    """All quantised layers come before the prompt, so the prompt does not change their inputs."""
    bundle, clips = prompted_bundle(demo_bundle, tmp_path / "bundle"), speech(demo_bundle.manifest)[1:]
    chunk = bundle.manifest.chunk(560)
    assert measure_ranges(bundle, chunk, clips) == measure_ranges(demo_bundle, chunk, clips)


def test_invalid_range(demo_bundle: Bundle, ranges: dict[str, float], tmp_path: Path) -> None:
    chunk = demo_bundle.manifest.chunk(80)
    for value in (0.0, math.nan, math.inf):
        invalid = dict.fromkeys(ranges, value)
        for precision in ("int8", "fp8"):
            with pytest.raises(BackendError, match="calibrate on other audio"):
                write_typed(demo_bundle, chunk, precision, invalid, tmp_path, "test")
