"""Output of typed graphs compared with the fp32 graph, on consecutive steps of speech."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
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
from nemostream.engine.fusion import fuse_for_cpu
from nemostream.engine.precision import (
    CACHE_DTYPES,
    quantisable,
    read_encoder,
    write_int8_for_cpu,
    write_typed,
)
from nemostream.engine.weights import WeightFile
from nemostream.engines import speech
from nemostream.errors import BackendError
from nemostream.runtime.backends import operators

LINEAR = "Int8Linear"

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

    They have increasing volumes, or, if the model is prompted, the prompts `PROMPTS`. An encoder with the input `slots`
    updates the caches itself; their slots are in reverse order.
    """
    slots = np.arange(rows)[::-1].copy()
    in_place = any(value.name == "slots" for value in encoder.get_inputs())
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
        if in_place:
            inputs["slots"] = slots
        outputs = dict(zip(names, encoder.run(names, inputs), strict=True))
        found.append(outputs["encoded_joint"])
        ring = (position + np.arange(chunk.frames)) % spec.cache
        state["mel_cache"] = outputs["mel_cache_next"]
        for layer in range(0 if in_place else spec.layers):
            state[f"k_cache.{layer}"][:, :, ring] = outputs["k_new"][layer]
            state[f"v_cache.{layer}"][:, :, ring] = outputs["v_new"][layer]
            state[f"conv_cache.{layer}"] = outputs["conv_next"][layer]
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


@pytest.mark.skipif(not operators.library(), reason="the operator has no fast code for this processor")
@pytest.mark.parametrize("instructions", ["amx", "vnni", "portable"])
def test_fused_int8_on_a_cpu(instructions: str, demo_bundle: Bundle, tmp_path: Path) -> None:
    """The output is close to fp32 and to ONNX Runtime's operators, and does not depend on the batch."""
    library = operators.library()
    assert library
    if not operators.select(library, instructions):
        pytest.skip(f"this processor does not have {instructions}")
    try:
        chunk, audio = demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest)[0]
        path, *_ = write_int8_for_cpu(demo_bundle, chunk, tmp_path, "fused", fused=True)
        separate, _ = write_int8_for_cpu(demo_bundle, chunk, tmp_path, "separate")
        options = ort.SessionOptions()
        options.register_custom_ops_library(str(library))
        encoder = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        alone = encode(encoder, demo_bundle, chunk, audio)
        wanted = encode(session(demo_bundle.file("encoder-560ms"), demo_bundle.path), demo_bundle, chunk, audio)
        assert cosines(alone, wanted).min() > 0.999
        assert cosines(alone, encode(session(separate, tmp_path), demo_bundle, chunk, audio)).min() > 0.9995
        batch = encode(encoder, demo_bundle, chunk, audio, rows=5)
        np.testing.assert_allclose(batch[:, :1], alone, atol=2e-4)  # fp32 parts of the graph sum in another order
    finally:
        operators.select(library, None)


def test_fused_layers(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Of a layer's eight products, two have a SiLU and four are added to the residual path."""
    path, *_ = write_int8_for_cpu(demo_bundle, demo_bundle.manifest.chunk(80), tmp_path, "test", fused=True)
    model, layers = onnx.load(path, load_external_data=False), demo_bundle.manifest.encoder.layers
    nodes = [node for node in model.graph.node if node.op_type == LINEAR]
    found = Counter((silu(node), *(bool(name) for name in node.input[3:6])) for node in nodes)
    biases = any(bias for _, bias, _, _ in found)
    assert found == {  # SiLU, bias, sum, norm
        (True, biases, False, True): 2 * layers,  # first product of a feed forward module
        (False, biases, True, False): 4 * layers,  # its second product, the attention's output, the last convolution
        (False, biases, False, True): 2 * layers,  # queries, keys and values; the first convolution
    }
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["RelativeAttention"] == kinds["CausalConvolution"] == layers
    assert not {"Softmax", "MatMulIntegerToFloat", "GatherElements", "Split"} & kinds.keys()
    assert kinds["LayerNormalization"] == layers  # the last of each layer, which two nodes use


def silu(node: onnx.NodeProto) -> bool:
    return next(bool(attribute.i) for attribute in node.attribute if attribute.name == "silu")


def test_fused_steps_share_their_weights(demo_bundle: Bundle, tmp_path: Path) -> None:
    """The file of all products is the same for all chunk sizes, and has another name for other weights."""
    written = [
        write_int8_for_cpu(demo_bundle, demo_bundle.manifest.chunk(ms), tmp_path, str(ms), fused=True)
        for ms in (80, 560)
    ]
    (shared,) = {files[2] for files in written}
    for graph, own, _ in written:
        tensors = onnx.load(graph, load_external_data=False).graph.initializer
        names = {t.name: e.value for t in tensors for e in t.external_data if e.key == "location"}
        assert {name for name, file in names.items() if file == shared.name} == {operators.WEIGHTS}
        assert {*names.values()} == {shared.name, own.name}
        (quantised,) = (tensor for tensor in tensors if tensor.name == operators.WEIGHTS)
        assert quantised.dims[0] == shared.stat().st_size
        layers = [node for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type == LINEAR]
        assert len(layers) == 8 * demo_bundle.manifest.encoder.layers
        assert {node.input[1] for node in layers} == {operators.WEIGHTS}
        assert own.stat().st_size < shared.stat().st_size
    columns = np.ones((weights_of(demo_bundle, demo_bundle.manifest.chunk(80))[ROUNDED].shape[0], 1), np.float32)
    other = edited_weight(demo_bundle, tmp_path / "bundle", ROUNDED, columns)
    *_, changed = write_int8_for_cpu(other, other.manifest.chunk(80), tmp_path, "other", fused=True)
    assert changed.name != shared.name


@pytest.mark.skipif(not operators.library(), reason="needs the operators")
def test_a_session_uses_weights_where_they_are(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Without a copy: a change of the array changes the next results."""
    chunk = demo_bundle.manifest.chunk(80)
    graph, _, shared = write_int8_for_cpu(demo_bundle, chunk, tmp_path, "80", fused=True)
    weights = np.fromfile(shared, np.uint8)
    value = ort.OrtValue.ortvalue_from_numpy(weights)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(operators.library()))
    options.add_initializer(operators.WEIGHTS, value)
    encoder = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    audio = speech(demo_bundle.manifest)[0][: 2 * chunk.samples]
    first = encode(encoder, demo_bundle, chunk, audio, steps=1)
    weights[:] = 128  # all weights are 0
    second = encode(encoder, demo_bundle, chunk, audio, steps=1)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("is_scalar", [False, True])
def test_fused_biases(is_scalar: bool, demo_bundle: Bundle, tmp_path: Path) -> None:
    """A vector that is added to a product is the layer's bias, a scalar remains a sum of its own."""
    name = "encoder.layers.0.feed_forward1.linear1.weight"
    model = read_encoder(demo_bundle, demo_bundle.manifest.chunk(80))
    node = next(node for node in model.graph.node if name in node.input)
    (y,) = node.output
    for user in model.graph.node:
        user.input[:] = [f"{each}:biased" if each == y else each for each in user.input]
    width = next(tensor.dims[1] for tensor in model.graph.initializer if tensor.name == name)
    bias = np.linspace(-2, 2, 1 if is_scalar else width, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(bias, "bias"))
    position = list(model.graph.node).index(node) + 1
    model.graph.node.insert(position, helper.make_node("Add", ["bias", y], [f"{y}:biased"]))
    with WeightFile(demo_bundle, model, tmp_path / "test.bin") as weights, open(os.devnull, "wb") as quantised:
        fuse_for_cpu(model.graph, [name], weights, quantised)
    (fused,) = (node for node in model.graph.node if node.op_type == LINEAR)
    assert fused.input[1:3] == [operators.WEIGHTS, f"{name}:scale"]
    assert (fused.input[3], silu(fused)) == (("", False) if is_scalar else ("bias", True))
    sums = [node for node in model.graph.node if f"{y}:biased" in node.output]
    assert len(sums) == is_scalar and all("bias" in node.input and y in node.input for node in sums)


def test_ranges_are_the_largest_inputs(demo_bundle: Bundle, ranges: dict[str, float]) -> None:
    """Compared with the largest magnitudes of the inputs of all layers in steps run by the test."""
    chunk, audio = demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest)[1]
    model = read_encoder(demo_bundle, chunk)
    names = quantisable(model)
    assert ranges.keys() == names.keys()
    for name in dict.fromkeys(names.values()):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    lowest, highest = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    encoder = session(model.SerializeToString(), demo_bundle.path)

    class RecordingEncoder:
        def __getattr__(self, name: str) -> Any:
            return getattr(encoder, name)

        def run(self, outputs: Any, inputs: Any) -> Any:
            values = encoder.run(outputs, inputs)
            for weight, name in names.items():
                array = values[outputs.index(name)]
                lowest[weight] = min(lowest[weight], float(array.min()))
                highest[weight] = max(highest[weight], float(array.max()))
            return values

    steps = len(audio) // chunk.samples
    assert steps >= 4
    encode(RecordingEncoder(), demo_bundle, chunk, audio, steps=steps)
    wanted = {name: max(-lowest[name], highest[name]) for name in names}
    assert any(-lowest[name] > highest[name] for name in names)
    assert measure_ranges(demo_bundle, chunk, [audio]) == pytest.approx(wanted, rel=1e-5)
    assert all(math.isfinite(value) and value > 0 for value in ranges.values())


def test_ranges_over_several_clips(demo_bundle: Bundle) -> None:
    """The largest of all clips, in any order; the last chunk of a clip, which is padded, is not measured."""
    chunk, audio = demo_bundle.manifest.chunk(560), speech(demo_bundle.manifest)[1]
    size = chunk.samples
    loud, quiet = audio[: 2 * size], audio[: 3 * size] * np.float32(0.02)
    each = [measure_ranges(demo_bundle, chunk, [clip]) for clip in (loud, quiet)]
    wanted = {name: max(ranges[name] for ranges in each) for name in each[0]}
    assert wanted not in each, "each clip has the largest input of some layer"
    shares: list[float] = []
    for clips in ([loud, quiet], [quiet, loud]):
        assert measure_ranges(demo_bundle, chunk, clips, shares.append) == wanted
    # Whole chunks end at 560 ms less the lead, so the last chunk of each clip is a part: 2 and 3 chunks are measured.
    assert shares[:5] == [0, pytest.approx(1 / 5), pytest.approx(2 / 5), pytest.approx(3 / 5), pytest.approx(4 / 5)]
    padded = np.concatenate([loud, np.full(size // 2, 0.9, np.float32)])
    assert measure_ranges(demo_bundle, chunk, [padded]) == measure_ranges(demo_bundle, chunk, [padded[: 2 * size]])


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


# -- stored values -----------------------------------------------------------------------------------------------------


def stored(path: Path) -> dict[str, np.ndarray]:
    """Return the initializers of a graph by name."""
    return {t.name: onnx.numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(path).graph.initializer}


def weights_of(bundle: Bundle, chunk: ChunkConfig) -> dict[str, np.ndarray]:
    return stored(bundle.file(f"encoder-{chunk.ms}ms"))


def edited_weight(bundle: Bundle, folder: Path, name: str, columns: np.ndarray) -> Bundle:
    """Return a copy of a bundle with the first columns of a weight of the encoder replaced."""
    shutil.copytree(bundle.path, folder)
    graph = onnx.load(bundle.file("encoder-80ms"), load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    where = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    array = np.memmap(folder / "weights.bin", np.float32, "r+", where["offset"], tuple(tensor.dims))
    array[:, : columns.shape[1]] = columns
    array.flush()
    return Bundle(folder, bundle.manifest)


ROUNDED = "encoder.layers.0.self_attn.linear_out.weight"


@pytest.fixture(scope="module")
def hand_made(demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a weight whose first columns have a scale of 1, of 2, of 0 (all zeros), and of 448 / 127."""
    rows = next(iter(weights_of(demo_bundle, demo_bundle.manifest.chunk(80))[ROUNDED].shape))
    columns = np.zeros((rows, 4), np.float32)
    columns[:8, 0] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -3.4]
    columns[:8, 1] = [-254, 3, 5, 1, -1, 2.98, 253, 0]
    columns[:4, 3] = [448, -448, 17, 0.001]
    return edited_weight(demo_bundle, tmp_path_factory.mktemp("hand made") / "bundle", ROUNDED, columns)


def test_int8_weights_are_rounded_to_nearest_even(hand_made: Bundle, ranges: dict[str, float], tmp_path: Path) -> None:
    """Hand-computed columns, and for all weights the error is at most half a step; the largest value is 127."""
    chunk = hand_made.manifest.chunk(80)
    for_cpu, _ = write_int8_for_cpu(hand_made, chunk, tmp_path, "cpu")
    for_gpu, _ = write_typed(hand_made, chunk, "int8", ranges, tmp_path, "gpu")
    original = weights_of(hand_made, chunk)
    for found, suffix in ((stored(for_cpu), "int8"), (stored(for_gpu), "values")):
        values, scale = found[f"{ROUNDED}:{suffix}"], found[f"{ROUNDED}:scale"].astype(np.float64)
        assert values.dtype == np.int8
        assert values[:8, 0].tolist() == [127, 0, 2, 2, 0, -2, 126, -3]
        assert values[:8, 1].tolist() == [-127, 2, 2, 0, 0, 1, 126, 0]
        assert not values[:, 2].any() and np.isfinite(scale).all()
        assert values[:4, 3].tolist() == [127, -127, 5, 0]
        assert scale[[0, 1, 3]] == pytest.approx([1, 2, 448 / 127], rel=1e-3)
        names = [name.removesuffix(f":{suffix}") for name in found if name.endswith(f":{suffix}")]
        assert len(names) == 8 * hand_made.manifest.encoder.layers
        for name in names:
            weight, values = original[name].astype(np.float64), found[f"{name}:{suffix}"].astype(np.float64)
            scale = np.maximum(np.abs(weight).max(axis=0) / 127, 1e-30)
            np.testing.assert_allclose(values, weight / scale, rtol=0, atol=0.5 + 1e-4)
            used = np.abs(weight).max(axis=0) > 0
            assert (np.abs(values).max(axis=0) == 127 * used).all()
            stored_scale = found[f"{name}:scale"]
            assert stored_scale.dtype == (np.float32 if suffix == "int8" else np.float16)
            np.testing.assert_allclose(stored_scale[used], scale[used], rtol=1e-6 if suffix == "int8" else 1e-3)


@pytest.mark.parametrize(("precision", "largest"), [("int8", 127), ("fp8", 448)])
def test_steps_are_the_measured_range_over_the_largest_value(
    precision: str, largest: float, hand_made: Bundle, ranges: dict[str, float], tmp_path: Path
) -> None:
    chunk = hand_made.manifest.chunk(80)
    path, _ = write_typed(hand_made, chunk, precision, ranges, tmp_path, "test")
    found = stored(path)
    for name, value in ranges.items():
        assert found[f"{name}:step"].dtype == np.float16
        assert float(found[f"{name}:step"]) == pytest.approx(value / largest, rel=1e-3)
        assert not found[f"{name}:zero"].astype(np.float32).any()
        assert found[f"{name}:zeros"].shape == found[f"{name}:scale"].shape == (found[f"{name}:values"].shape[1],)
        assert not found[f"{name}:zeros"].astype(np.float32).any()
    if precision == "fp8":
        values = found[f"{ROUNDED}:values"].astype(np.float32)
        assert values[:4, 3].tolist() == [448, -448, 16, 2**-9]  # E4M3: ties to even, and the smallest number
        assert np.isfinite(values).all() and np.abs(values).max() == 448
        assert float(found[f"{ROUNDED}:scale"][3]) == 1


def test_int8_products_on_a_cpu_equal_integer_arithmetic(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Inputs and outputs of one layer, compared with NumPy: inputs have a scale per frame and the zero point 128."""
    chunk = demo_bundle.manifest.chunk(560)
    path, _ = write_int8_for_cpu(demo_bundle, chunk, tmp_path, "test")
    model, found = onnx.load(path, load_external_data=False), stored(path)
    name = "encoder.layers.1.feed_forward1.linear2.weight"
    product = next(n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat" and n.input[1] == f"{name}:int8")
    y = product.output[0].removesuffix(":product")
    (x,) = (n.input[0] for n in model.graph.node if n.op_type == "Abs" and n.output[0] == f"{y}:magnitude")
    for value in (x, f"{y}:x8", y):
        model.graph.output.append(onnx.ValueInfoProto(name=value))
    encoder = session(model.SerializeToString(), tmp_path)
    frames = chunk.frames
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {}
    for value in encoder.get_inputs():
        shape = [2 if axis == "B" else axis for axis in value.shape]
        if value.type == "tensor(float)":
            inputs[value.name] = rng.standard_normal(shape).astype(np.float32)
    inputs |= {"position": np.array([70, 700]), "valid": np.full(2, 9 + 8 * frames)}
    got_x, got_x8, got_y = encoder.run([x, f"{y}:x8", y], inputs)
    unit = np.maximum(np.abs(got_x).max(axis=-1, keepdims=True) / np.float32(127), np.float32(1e-9))
    quantised = np.clip(np.rint(got_x / unit), -128, 127)
    assert got_x8.dtype == np.uint8
    # The division may be rounded differently at a boundary between two steps.
    assert np.abs(got_x8.astype(int) - 128 - quantised).max() <= 1
    assert (got_x8.astype(int) - 128 == quantised).mean() > 0.999
    assert np.abs(got_x8.astype(int) - 128).max(axis=-1).min() == 127
    exact = (got_x8.astype(np.int64) - 128) @ found[f"{name}:int8"].astype(np.int64)
    np.testing.assert_allclose(got_y, exact * found[f"{name}:scale"] * unit, rtol=1e-5, atol=1e-6)


def test_silence_is_quantised_on_a_cpu(demo_bundle: Bundle, tmp_path: Path) -> None:
    """Frames of zeros are divided by the smallest scale: the output is finite."""
    chunk = demo_bundle.manifest.chunk(80)
    path, _ = write_int8_for_cpu(demo_bundle, chunk, tmp_path, "test")
    model = onnx.load(path, load_external_data=False)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith("int8/")}
    assert {name: array.tolist() for name, array in constants.items()} == {
        "int8/share": pytest.approx(1 / 127),
        "int8/min_scale": pytest.approx(1e-9),
        "int8/one": 1,
        "int8/middle": 128,
        "int8/zero": 0,
        "int8/last": [-1],
    }
    encoder = session(path, tmp_path)
    inputs = {
        value.name: np.zeros([1 if axis == "B" else axis for axis in value.shape], np.float32)
        for value in encoder.get_inputs()
        if value.type == "tensor(float)"
    }
    for output in encoder.run(None, inputs | {"position": np.array([0]), "valid": np.array([17])}):
        assert np.isfinite(output).all()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_sums_that_need_a_wide_range_are_fp32(
    precision: str, demo_bundle: Bundle, ranges: dict[str, float], tmp_path: Path
) -> None:
    """All sums on the residual path, and both sums of attention scores, whose terms may be large and cancel."""
    path, _ = write_typed(demo_bundle, demo_bundle.manifest.chunk(160), precision, ranges, tmp_path, "test")
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {t.name: t.data_type for t in inferred.initializer}
    sources = {output: node for node in model.graph.node for output in node.output}

    def sums(value: str) -> list[str]:
        """Return the sums that a value consists of, through casts."""
        node = sources.get(value)
        if node is None or node.op_type not in ("Add", "Cast"):
            return []
        inner = [output for name in node.input for output in sums(name)]
        return [*inner, node.output[0]] if node.op_type == "Add" else inner

    layers = demo_bundle.manifest.encoder.layers
    scores = [sums(node.input[0]) for node in model.graph.node if node.op_type == "Softmax"]
    assert [len(found) for found in scores] == [2] * layers
    residual = [sums(node.input[0]) for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert max(len(found) for found in residual) >= 3
    wide = {name for found in (*scores, *residual) for name in found}
    # Biases of linear layers are added before the residual path begins, in 16 bit.
    biases = {name for name in wide if any(".bias" in value for value in sources[name].input)}
    first = {name for name in biases if any("pre_encode.out.bias" in value for value in sources[name].input)}
    assert {types[name] for name in wide - biases | first} == {TensorProto.FLOAT}
    for name in wide - biases:
        assert {types[value] for value in sources[name].input} == {TensorProto.FLOAT}, name
    masks = [
        node for node in model.graph.node if node.op_type == "Where" or types.get(node.input[0]) == TensorProto.BOOL
    ]
    masks = [node for node in masks if types[node.output[0]] not in (TensorProto.BOOL, TensorProto.INT64)]
    assert {node.op_type for node in masks} == {"Where", "Cast"}
    assert {types[node.output[0]] for node in masks} == {TensorProto.FLOAT}
    # A value is cast once to each type, however many nodes read it.
    casts = [(node.input[0], node.attribute[0].i) for node in model.graph.node if node.op_type == "Cast"]
    assert len(set(casts)) == len(casts)


def test_weights_of_an_engine_are_aligned_and_complete(
    demo_bundle: Bundle, ranges: dict[str, float], tmp_path: Path
) -> None:
    """Every external tensor begins at a multiple of 64 bytes, overlaps no other, and the file ends after the last."""
    bundle = Bundle(tmp_path / "bundle", demo_bundle.manifest)
    shutil.copytree(demo_bundle.path, bundle.path)
    model = onnx.load(bundle.file("encoder-80ms"), load_external_data=False)
    # The first weight has an odd size in every precision; that of all others is a multiple of 64 bytes.
    odd = np.arange(1, 132, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(odd, "odd"))
    model.graph.node.insert(0, helper.make_node("Add", ["odd", "odd"], ["twice"], name="twice"))
    model.graph.output.append(helper.make_tensor_value_info("twice", TensorProto.FLOAT, [131]))
    bundle.file("encoder-80ms").write_bytes(model.SerializeToString())
    for precision in ("fp32", "fp16", "int8"):
        path, weights = write_typed(bundle, bundle.manifest.chunk(80), precision, ranges, tmp_path, precision)
        end = 0
        graph, arrays = onnx.load(path, load_external_data=False).graph, stored(path)
        kind = "float32" if precision == "fp32" else "float16"
        assert arrays[f"odd:{kind}"].tolist() == odd.tolist()
        external = []
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                assert entries["location"] == weights.name
                assert int(entries["length"]) == arrays[tensor.name].nbytes > 256
                external.append((int(entries["offset"]), int(entries["length"])))
        for offset, length in sorted(external):
            assert offset % 64 == 0 and 0 <= offset - end < 64
            end = offset + length
        assert end == weights.stat().st_size and len(external) > 50
        # Each name once, and none that no node reads.
        names = [tensor.name for tensor in graph.initializer]
        assert len(set(names)) == len(names)
        assert set(names) <= {name for node in graph.node for name in node.input}
        original = weights_of(bundle, bundle.manifest.chunk(80))
        for name in ("encoder.layers.0.norm_out.weight", "joint.enc.bias"):
            np.testing.assert_array_equal(
                next(array for key, array in arrays.items() if key.startswith(f"{name}:")),
                original[name].astype(next(key for key in arrays if key.startswith(f"{name}:")).rpartition(":")[2]),
            )
