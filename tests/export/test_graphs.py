"""Single graphs compared with PyTorch's and NeMo's layers, shapes of tensors, and the storage of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, DecoderConfig, FeatureConfig, LanguageConfig
from nemostream.errors import CheckpointError, OptionError

pytest.importorskip("nemostream.export.checkpoint", reason="needs the export extra")

from nemostream.export.bundle import export_checkpoint, write_bundle
from nemostream.export.checkpoint import Checkpoint, open_checkpoint
from nemostream.export.decoder import write_decoder, write_joint
from nemostream.export.features import write_features
from nemostream.export.graph import WeightStore

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "demo.nemo"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(DEMO, tmp_path_factory.mktemp("demo"))


def session(
    folder: Path, write: Callable[[WeightStore], onnx.ModelProto]
) -> tuple[onnxruntime.InferenceSession, WeightStore]:
    """Write a graph and its weights to a folder; return its session and the store."""
    folder.mkdir(parents=True)
    store = WeightStore(folder / "weights.bin")
    model = write(store)
    store.close()
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"]), store


def with_state(checkpoint: Checkpoint, state: Mapping[str, Any], **changes: Any) -> Checkpoint:
    return dataclasses.replace(checkpoint, state={**checkpoint.state, **state}, **changes)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_prediction_network_equals_pytorchs(layers: int, demo: Checkpoint, tmp_path: Path) -> None:
    """Embedding, LSTM with a state per row, and projection; hidden and joint sizes differ."""
    torch = pytest.importorskip("torch", reason="the oracle")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        embedding, linear = torch.nn.Embedding(12, 24), torch.nn.Linear(24, 20)
        lstm = torch.nn.LSTM(24, 24, layers)
        h, c = torch.randn(2, layers, 3, 24)
        tokens = torch.tensor([11, 0, 5])
        output, (next_h, next_c) = lstm(embedding(tokens)[None], (h, c))
        wanted = linear(output[0])
    state = {"decoder.prediction.embed.weight": embedding.weight, "joint.pred.weight": linear.weight}
    state |= {"joint.pred.bias": linear.bias}
    state |= {f"decoder.prediction.dec_rnn.lstm.{name}": value for name, value in lstm.named_parameters()}
    net = DecoderConfig(layers, 24, 20, 11, 10, "relu")
    checkpoint = with_state(demo, {n: t.detach().numpy() for n, t in state.items()}, decoder=net)
    graph, store = session(tmp_path / "x", lambda store: write_decoder(checkpoint, store))
    rows = {name: value.transpose(0, 1).numpy() for name, value in (("h", h), ("c", c))}
    got = graph.run(["predicted", "h_next", "c_next"], {"token": tokens.numpy(), **rows})
    for array, oracle in zip(got, (wanted, next_h.transpose(0, 1), next_c.transpose(0, 1)), strict=True):
        np.testing.assert_allclose(array, oracle.numpy(), rtol=0, atol=2e-6)
    tensors = store.tensors("decoder.", "joint.")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wanted_shapes: dict[str, Any] = {"decoder.embedding": (12, 24), "joint.pred.weight": (24, 20)}
    wanted_shapes |= {f"decoder.lstm.{layer}.weight": (48, 96) for layer in range(layers)}
    wanted_shapes |= {f"decoder.lstm.{layer}.bias": (96,) for layer in range(layers)} | {"joint.pred.bias": (20,)}
    assert shapes == wanted_shapes
    stored = np.memmap(tmp_path / "x" / "weights.bin", np.float32, "r", tensors["joint.pred.bias"].offset, (20,))
    np.testing.assert_array_equal(stored, linear.bias.detach().numpy())


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_the_joint(activation: str, demo: Checkpoint, tmp_path: Path) -> None:
    """With the activation of the configuration, and the last of several layers named `joint_net`."""
    rng = np.random.default_rng(0)
    arrays = {"joint.joint_net.2.weight": rng.standard_normal((12, 20)), "joint.joint_net.2.bias": rng.random(12)}
    net = DecoderConfig(1, 24, 20, 11, 10, activation)
    state = {name: array.astype(np.float32) for name, array in arrays.items()}
    state["joint.joint_net.0.weight"] = np.zeros((3, 3), np.float32)
    checkpoint = with_state(demo, state, decoder=net)
    assert checkpoint.joint_output == "joint.joint_net.2"
    graph, _ = session(tmp_path / "x", lambda store: write_joint(checkpoint, store))
    encoded, predicted = rng.standard_normal((2, 5, 20)).astype(np.float32)
    (logits,) = graph.run(["logits"], {"encoded_joint": encoded, "predicted": predicted})
    x = (encoded + predicted).astype(np.float64)
    x = {"relu": np.maximum(x, 0), "sigmoid": 1 / (1 + np.exp(-x)), "tanh": np.tanh(x)}[activation]
    wanted = x @ arrays["joint.joint_net.2.weight"].T + arrays["joint.joint_net.2.bias"]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)


FRONT_ENDS: list[dict[str, Any]] = [
    {},
    {"preemph": None},
    {"preemph": 0.5, "log_zero_guard_value": 1e-3},
    {"n_fft": 1024, "features": 40},
    {"sample_rate": 8000, "window_size": 0.032, "window_stride": 0.0125},
]


@pytest.mark.nemo
@pytest.mark.parametrize("options", FRONT_ENDS, ids=str)
def test_features_equal_nemos_front_end(options: dict[str, Any], demo: Checkpoint, tmp_path: Path) -> None:
    """Two rows with other lengths, in two steps with the tail of the first; NeMo's code runs in fp64."""
    import torch
    from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

    settings = {"sample_rate": 16000, "window_size": 0.025, "window_stride": 0.01, "features": 80, "n_fft": None}
    settings |= {"preemph": 0.97, "log_zero_guard_value": 2**-24} | options
    module = AudioToMelSpectrogramPreprocessor(**settings, normalize="NA", dither=0.0, pad_to=0).featurizer.eval()
    state = {
        "preprocessor.featurizer.window": module.window.float().numpy(),
        "preprocessor.featurizer.fb": module.fb.float().numpy(),
    }
    rate = settings["sample_rate"]
    hop, window = round(rate * settings["window_stride"]), round(rate * settings["window_size"])
    front = FeatureConfig(rate, settings["features"], window, hop, module.n_fft, settings["preemph"] or 0.0)
    frames = 4  # encoder frames of a step, 32 mel frames
    chunk = ChunkConfig(round(1000 * frames * 8 * hop / rate), frames, 70, frames * 8 * hop)
    checkpoint = with_state(demo, state, features=front, chunks=(chunk,), log_guard=settings["log_zero_guard_value"])
    graph, _ = session(tmp_path / "x", lambda store: write_features(checkpoint, chunk, store))
    lead = 8 * hop - (window // 2 - 1)
    rng = np.random.default_rng(0)
    samples = [2 * chunk.samples - lead, 2 * chunk.samples - lead - 5 * hop - 17]
    mels, tail = [], np.zeros((2, front.tail), np.float32)
    audio = np.zeros((2, 2 * chunk.samples), np.float32)
    for row, count in enumerate(samples):
        audio[row, lead : lead + count] = rng.uniform(-0.5, 0.5, count)
    for step in range(2):
        part = audio[:, step * chunk.samples : (step + 1) * chunk.samples]
        lengths = np.clip(np.array(samples) + lead - step * chunk.samples, 0, chunk.samples)
        mel, tail = graph.run(["mel", "audio_tail_next"], {"audio": part, "audio_tail": tail, "lengths": lengths})
        assert mel.shape == (2, 32, front.mels)
        np.testing.assert_array_equal(tail, part[:, -front.tail :])
        mels.append(mel)
    got = np.concatenate(mels, axis=1)
    exact = module.double()
    stft_window = exact.window.double()
    exact.stft = lambda x: torch.stft(
        x, exact.n_fft, hop, window, stft_window, center=True, pad_mode="constant", return_complex=True
    )
    for row, count in enumerate(samples):
        signal = torch.from_numpy(audio[row, lead : lead + count].astype(np.float64))[None]
        with torch.inference_mode():
            wanted, number = exact(signal, torch.tensor([count]))
        oracle = wanted[0, :, : int(number[0])].T.numpy()
        # The first window begins 7 mel frames before the audio.
        np.testing.assert_allclose(got[row, 7 : 7 + len(oracle)], oracle, rtol=0, atol=2e-5)
        assert len(oracle) == count // hop >= 40


# -- tensors of a checkpoint -------------------------------------------------------------------------------------------


def every_kind(demo: Checkpoint) -> Checkpoint:
    """Return the demo checkpoint with biases, prompt and speaker kernels as of other models; their values are zero."""
    width, count = demo.encoder.d_model, 5
    shapes = {"prompt_kernel.0": (48, width + count), "prompt_kernel.2": (width, 48)}
    for kernel in ("spk_kernels.0", "bg_spk_kernels.0"):
        shapes |= {f"{kernel}.0": (40, width), f"{kernel}.3": (width, 40)}
    state = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    state |= {f"{name}.bias": np.zeros(shape[0], np.float32) for name, shape in shapes.items()}
    for name, array in demo.state.items():
        layer = name.removesuffix(".weight")
        if name.startswith("encoder.layers.0.") and name.endswith(".weight") and f"{layer}.bias" not in demo.state:
            state[f"{layer}.bias"] = np.zeros(array.shape[0], np.float32)
        if name.endswith("0.conv.batch_norm.weight"):
            state |= {f"{layer}.{part}": np.ones(width, np.float32) for part in ("running_mean", "running_var")}
    languages = LanguageConfig("en", {"en": 0}, count)
    return with_state(demo, state, languages=languages, speaker_kernels=("spk_kernels.0", "bg_spk_kernels.0"))


# The widths that the configuration does not determine, (tensor, axis); those of later tensors must agree.
FREE = {
    ("encoder.pre_encode.conv.0.weight", 0),
    ("prompt_kernel.0.weight", 0),
    ("spk_kernels.0.0.weight", 0),
    ("bg_spk_kernels.0.0.weight", 0),
    *((f"encoder.layers.0.feed_forward{which}.linear1.weight", 0) for which in (1, 2)),
}


def test_the_shape_of_every_tensor_is_checked(demo: Checkpoint) -> None:
    """Each axis of each tensor that the graphs use, one value longer, is rejected with both shapes."""
    checkpoint = every_kind(demo)
    names = [name for name in checkpoint.state if not name.startswith("encoder.layers.") or ".layers.0." in name]
    assert len(names) > 60
    accepted = set()
    for name in names:
        array = checkpoint.state[name]
        assert checkpoint.array(name).shape == array.shape and checkpoint.has(name)
        for axis in range(array.ndim):
            shape = [size + (index == axis) for index, size in enumerate(array.shape)]
            changed = with_state(checkpoint, {name: np.zeros(shape, np.float32)})
            if (name, axis) in FREE:
                accepted.add((name, axis))
                assert changed.array(name).shape == tuple(shape)
                continue
            with pytest.raises(CheckpointError) as caught:
                changed.array(name)
            assert f"'{name}' of the checkpoint has the shape {shape}, but its configuration requires" in str(
                caught.value
            )
            assert str(caught.value).endswith(f"requires {list(array.shape)}.")
    assert accepted == FREE


def test_widths_agree_between_tensors(demo: Checkpoint) -> None:
    """The second tensor of a pair must have the width of the first."""
    checkpoint = every_kind(demo)
    for name, axis in FREE:
        array = checkpoint.state[name]
        shape = [size + (index == axis) for index, size in enumerate(array.shape)]
        changed = with_state(checkpoint, {name: np.zeros(shape, np.float32)})
        bias = name.replace(".weight", ".bias")
        with pytest.raises(CheckpointError, match=rf"'{bias}' .* requires \[{shape[0]}\]"):
            changed.array(bias)


def test_types_of_tensors(demo: Checkpoint) -> None:
    """Floating-point types become fp32; others are rejected, except of tensors that no graph uses."""
    name, unused = "joint.enc.bias", "encoder.layers.0.conv.batch_norm.num_batches_tracked"
    array = demo.state[name]
    for kind in (np.float16, np.float64, np.float32):
        found = with_state(demo, {name: array.astype(kind)}).array(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, array.astype(kind).astype(np.float32))
    for kind in (np.int8, np.int64, np.bool_):
        with pytest.raises(CheckpointError, match=f"has the type {np.dtype(kind).name}, but weights must be floating"):
            with_state(demo, {name: array.astype(kind)}).array(name)
    counted = with_state(demo, {unused: np.array(7)})
    assert counted.array(unused) == 7 and counted.array(unused).dtype == np.int64
    assert not demo.has(unused)
    with pytest.raises(CheckpointError, match=f"the checkpoint has no tensor '{unused}', which its configuration"):
        demo.array(unused)


def test_pieces_are_those_of_the_tokenizer(demo: Checkpoint) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(demo.tokenizer))
    assert demo.pieces() == [model.id_to_piece(index) for index in range(model.get_piece_size())]


# -- storage -----------------------------------------------------------------------------------------------------------


def test_weights_are_stored_once_and_aligned(tmp_path: Path) -> None:
    """Sizes, offsets, ranges of rows, and the locations that a manifest lists."""
    store, made = WeightStore(tmp_path / "weights.bin"), []

    def make(array: NDArray[Any]) -> Callable[[], NDArray[Any]]:
        return lambda: made.append(array.shape) or array  # type: ignore[func-returns-value]

    arrays = {
        "a.first": np.arange(5, dtype=np.float32),
        "b.second": np.arange(24, dtype=np.int32).reshape(6, 2, 2).transpose(0, 2, 1),  # not contiguous
        "a.third": np.array([2.5]),
        "c": np.ones((3, 3), np.float16),
    }
    for name, array in arrays.items():
        for _ in range(2):
            store.add(name, make(array))
    assert made == [array.shape for array in arrays.values()]
    rows = store.tensor("b.second", slice(2, 5))
    whole = {name: store.tensor(name) for name in arrays}
    store.close()
    content = (tmp_path / "weights.bin").read_bytes()
    assert len(content) == store.size == 256 + 18
    for name, array in arrays.items():
        entries = {entry.key: entry.value for entry in whole[name].external_data}
        offset = int(entries["offset"])
        assert offset % 64 == 0 and entries["location"] == "weights.bin" and int(entries["length"]) == array.nbytes
        assert content[offset : offset + array.nbytes] == np.ascontiguousarray(array).tobytes()
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(whole[name], str(tmp_path)), array)
    assert rows.name == "b.second[2:5]"
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(rows, str(tmp_path)), arrays["b.second"][2:5])
    listed = store.tensors("a.", "c")
    assert list(listed) == ["a.first", "a.third", "c"]
    assert {name: (w.dtype, w.shape) for name, w in listed.items()} == {
        name: (arrays[name].dtype.name, arrays[name].shape) for name in listed
    }
    assert all(
        content[w.offset : w.offset + arrays[name].nbytes] == arrays[name].tobytes() for name, w in listed.items()
    )


def test_the_manifest_of_a_bundle(demo: Checkpoint, tmp_path: Path) -> None:
    """Its files, and what the checkpoint states; the weights of a prompted encoder depend on its languages."""
    import hashlib
    from importlib.metadata import version

    folder, messages = tmp_path / "bundle", list[str]()
    folder.mkdir()
    chunk = demo.chunks[2]
    checkpoint = dataclasses.replace(demo, chunks=(chunk,), name="voice")
    origin = {"source": "voice.nemo", "sha256": "0" * 64}
    bundle = write_bundle(checkpoint, folder, origin, messages.append, "hi_IN")
    manifest = bundle.manifest
    assert (manifest.name, dict(manifest.checkpoint), manifest.languages) == ("voice", origin, LanguageConfig("hi-IN"))
    for field in ("features", "encoder", "decoder", "chunks"):
        assert getattr(manifest, field) == getattr(checkpoint, field)
    assert messages == [f"writing {name}" for name in ("features-560ms", "encoder-560ms", "decoder", "joint")]
    for name in ("nemostream", "onnx", "onnxruntime", "numpy"):
        assert manifest.versions[name] == version(name)
    assert manifest.versions.keys() <= {"nemostream", "nemo_toolkit", "torch", "onnx", "onnxruntime", "numpy"}
    for file in (manifest.weights, manifest.tokenizer):
        content = (folder / file.file).read_bytes()
        assert (file.sha256, file.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (folder / "tokenizer.model").read_bytes() == demo.tokenizer.read_bytes()
    for graph in manifest.graphs.values():
        assert graph.sha256 == hashlib.sha256((folder / graph.file).read_bytes()).hexdigest()
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "weights.bin",
        "tokenizer.model",
        *(f"{name}.onnx" for name in manifest.graphs),
    }
    assert {name.partition(".")[0] for name in manifest.tensors} == {"features", "decoder", "joint"}
    assert type(bundle).open(folder).manifest == manifest


def test_a_graph_whose_shapes_disagree_is_not_written(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes that it declares are compared with those that follow from its operations."""

    def write(checkpoint: Checkpoint, store: WeightStore) -> onnx.ModelProto:
        model = write_joint(checkpoint, store)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value += 1
        return model

    monkeypatch.setattr("nemostream.export.bundle.write_joint", write)
    with pytest.raises(onnx.shape_inference.InferenceError):
        write_bundle(demo, tmp_path, {})


@pytest.mark.parametrize("existing", ["file", "folder"])
def test_other_files_are_not_overwritten(existing: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if existing == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "precious").write_text("precious")
    with pytest.raises(OptionError, match="out exists and is not a bundle; choose another folder"):
        export_checkpoint(DEMO, out)
    assert (out if existing == "file" else out / "precious").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_options_are_checked_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="must be the code of a language"):
        export_checkpoint(DEMO, tmp_path / "new" / "out", language="not a language")
    assert list(tmp_path.iterdir()) == []
