"""The parity check fails if a graph is wrong: every reference, prompts, and the tolerance of the joint."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from nemostream.benchmarks.harness.synthetic import Sizes, model_config, train_tokenizer
from nemostream.bundle import Bundle, LanguageConfig, Manifest
from nemostream.errors import BundleError, ParityError
from nemostream.export.bundle import write_bundle
from nemostream.export.parity import measure_parity, prompt_order
from nemostream.export.reference import NemoReference, NumpyReference, Reference, TransformersReference, open_reference
from nemostream.export.sources import Source

pytestmark = pytest.mark.nemo

SIZES = {"n_layers": 1, "d_model": 32, "n_heads": 2, "conv_channels": 16, "pred_hidden": 24, "joint_hidden": 24}
PROMPTS = {"en-US": 0, "en": 0, "de-DE": 3, "auto": 6}


def quiet(message: str) -> None:
    pass


@pytest.fixture(scope="module")
def prompted_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompted model that NeMo's own class wrote."""
    import torch
    from nemo.collections.asr.models import EncDecRNNTBPEModelWithPrompt
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("nemo")
    sizes = Sizes(**SIZES, vocab=96, contexts=((56, 3), (56, 0)))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        train_tokenizer(folder, sizes.vocab, 0)
        defaults = {"initialize_prompt_feature": True, "num_prompts": 7, "prompt_dictionary": PROMPTS}
        target = "nemo.collections.asr.models.rnnt_bpe_models_prompt.EncDecRNNTBPEModelWithPrompt"
        config = OmegaConf.merge(model_config(sizes, folder), {"target": target, "model_defaults": defaults})
        model = EncDecRNNTBPEModelWithPrompt(cfg=config).eval()
        model.save_to(str(folder / "prompted.nemo"))
    return folder / "prompted.nemo"


def written(source: Source, folder: Path) -> Bundle:
    (folder / "bundle").mkdir()
    return write_bundle(source.open(folder / "unpacked"), folder / "bundle", source.describe())


def skip_prompt(bundle: Bundle, graph: str) -> None:
    """Connect the encoder's outputs to the input of the prompt layer, as NeMo does while no prompt is set."""
    path = bundle.file(graph)
    model = onnx.load(path, load_external_data=False)
    (before,) = (node.input[0] for node in model.graph.node if "prompt.in.weight" in node.input)
    (after,) = (node.output[0] for node in model.graph.node if "prompt.out.bias" in node.input)
    changed = 0
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == after:
                node.input[index] = before
                changed += 1
    assert changed >= 2
    path.write_bytes(model.SerializeToString())


def change_weight(bundle: Bundle, graph: str, name: str, index: tuple[int, ...]) -> None:
    """Add 1 to an element of a weight."""
    model = onnx.load(bundle.file(graph), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    if tensor.external_data:
        offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        weights = np.memmap(bundle.path / bundle.manifest.weights.file, np.float32, "r+", offset, tuple(tensor.dims))
        weights[index] += 1
        weights.flush()
    else:
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[index] += 1
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        bundle.file(graph).write_bytes(model.SerializeToString())


@pytest.mark.parametrize("library", ["NeMo", "transformers", "NumPy"])
def test_prompted_models(library: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Every prompt at every chunk size; a graph without the prompt layer, or with a wrong row of the table, fails."""
    fixture = "prompted_checkpoint" if library == "NeMo" else "prompted_folder"
    source = Source("x", request.getfixturevalue(fixture))
    reference: Reference
    if library == "NumPy":
        reference = NumpyReference(source.open(tmp_path / "reference"))
    else:
        reference = open_reference(source, tmp_path / "reference")
    assert isinstance(
        reference, {"NeMo": NemoReference, "transformers": TransformersReference}.get(library, NumpyReference)
    )
    bundle = written(source, tmp_path)
    manifest = measure_parity(bundle, reference, quiet)
    assert manifest.parity["reference"] == f"{library} {reference.version}".strip()
    names = set(bundle.manifest.languages.names)
    assert len(names) >= 3 and prompt_order(manifest)[0] == manifest.languages.prompts["auto"]
    for chunk in manifest.chunks:
        figures = manifest.parity[f"{chunk.ms}ms"]
        assert figures["steps"] >= 12 and figures["prompts"] == len(names)
        assert 0 < figures["encoder"] < 1e-5 and 0 < figures["projection"] < 1e-5

    slowest = f"encoder-{manifest.chunks[-1].ms}ms"
    copy = Bundle(tmp_path / "copy", dataclasses.replace(manifest, chunks=manifest.chunks[-1:]))
    shutil.copytree(bundle.path, copy.path)
    skip_prompt(copy, slowest)
    with pytest.raises(ParityError, match=f"{slowest} differs from {library} by"):
        measure_parity(copy, reference, quiet)
    shutil.rmtree(copy.path)
    shutil.copytree(bundle.path, copy.path)
    change_weight(copy, slowest, "prompt.table", (manifest.languages.prompts["de-DE"], 2))
    with pytest.raises(ParityError, match=f"differs from {library} by"):
        measure_parity(copy, reference, quiet)


def test_a_bundle_without_the_prompts_of_the_model(prompted_folder: Path, tmp_path: Path) -> None:
    source = Source("x", prompted_folder)
    bundle = written(source, tmp_path)
    bundle = Bundle(bundle.path, dataclasses.replace(bundle.manifest, languages=LanguageConfig()))
    with pytest.raises(ParityError, match="the bundle has 0 prompt ids, but the model in NumPy has 7"):
        measure_parity(bundle, NumpyReference(source.open(tmp_path / "reference")), quiet)


class Scaled(Mapping[str, NDArray[Any]]):
    """The state of a checkpoint whose weights with `part` in their name are multiplied by `factor`."""

    def __init__(self, state: Mapping[str, NDArray[Any]], part: str, factor: float) -> None:
        self._state, self._part, self._factor = state, part, factor

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._state[name] * np.float32(self._factor if self._part in name else 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class Noisy(NumpyReference):
    """A reference whose log-probabilities, or prompted encoder frames, are off by `noise`."""

    noise = prompt_noise = 0.0

    def join(self, projected: NDArray[Any], predicted: NDArray[Any]) -> NDArray[Any]:
        joined = super().join(projected, predicted)
        joined[3, 5] += self.noise
        return joined

    def apply_prompt(self, encoded: NDArray[Any], prompts: NDArray[np.int64]) -> NDArray[Any]:
        prompted = super().apply_prompt(encoded, prompts)
        self.largest = float(np.abs(prompted).max())
        prompted[3, 5] += self.prompt_noise
        return prompted


def test_the_tolerance_of_the_joint_is_relative_to_large_logits(transformers_folder: Path, tmp_path: Path) -> None:
    """1e-4 absolute up to 10, and 1e-5 of the largest log-probability above."""
    checkpoint = Source("x", transformers_folder).open(tmp_path / "unpacked")
    for factor in (1.0, 200.0):
        scaled = dataclasses.replace(checkpoint, state=Scaled(checkpoint.state, "joint_net", factor))
        folder = tmp_path / str(factor)
        folder.mkdir()
        bundle = write_bundle(scaled, folder, {})
        bundle = Bundle(folder, dataclasses.replace(bundle.manifest, chunks=bundle.manifest.chunks[-1:]))
        reference = Noisy(scaled)
        largest = float(np.abs(reference.join(np.zeros((4, 24)), reference.predict([96, 1, 2, 3]))).max())
        assert (largest < 10) == (factor == 1)
        assert measure_parity(bundle, reference, quiet).parity["joint"] < 1e-5 * max(largest, 10) / 3
        reference.noise = 1.5e-4
        if factor == 1:
            with pytest.raises(ParityError, match=r"joint differs from NumPy by 0\.00015 .allowed: 0\.0001"):
                measure_parity(bundle, reference, quiet)
        else:
            assert largest > 40
            measure_parity(bundle, reference, quiet)
            reference.noise = 4e-5 * largest
            with pytest.raises(ParityError, match="joint differs from NumPy by"):
                measure_parity(bundle, reference, quiet)


def test_the_tolerance_of_prompted_frames_is_relative_to_large_values(prompted_folder: Path, tmp_path: Path) -> None:
    """Other encoders end with a layer norm; the prompt layers do not."""
    checkpoint = Source("x", prompted_folder).open(tmp_path / "unpacked")
    for factor, noise, fails in ((1.0, 1.5e-4, True), (1000.0, 1.5e-4, False), (1000.0, None, True)):
        scaled = dataclasses.replace(checkpoint, state=Scaled(checkpoint.state, "prompt_kernel.2", factor))
        folder = tmp_path / f"{factor}-{noise}"
        folder.mkdir()
        bundle = write_bundle(scaled, folder, {})
        bundle = Bundle(folder, dataclasses.replace(bundle.manifest, chunks=bundle.manifest.chunks[-1:]))
        reference = Noisy(scaled)
        measure_parity(bundle, reference, quiet)
        assert (reference.largest < 10) == (factor == 1) and (factor == 1 or reference.largest > 40)
        reference.prompt_noise = noise or 4e-5 * reference.largest
        with pytest.raises(ParityError, match=r"encoder-\d+ms differs") if fails else nullcontext():
            measure_parity(bundle, reference, quiet)


def test_the_manifest_accepts_the_name_of_the_reference(demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    for name in ("NumPy", "NeMo 3.0.0"):
        named = dataclasses.replace(manifest, parity=manifest.parity | {"reference": name})
        assert Manifest.from_json(named.to_json()).parity["reference"] == name
    for value in (5, "", "a\nb", "x" * 101, {}):
        other = dataclasses.replace(manifest, parity=manifest.parity | {"reference": value})
        with pytest.raises(BundleError, match=r"parity\.reference"):
            Manifest.from_json(other.to_json())
    text = dataclasses.replace(manifest, parity=manifest.parity | {"joint": "small"})
    with pytest.raises(BundleError, match=r"parity\.joint"):
        Manifest.from_json(text.to_json())
