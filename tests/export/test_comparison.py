"""The comparison with a reference: every output, NaN, shapes, tolerances, and the place that a message names."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemostream.bundle import Bundle, ChunkConfig, LanguageConfig
from nemostream.errors import ParityError

pytest.importorskip("nemostream.export.checkpoint", reason="needs the export extra")

from nemostream.export.checkpoint import open_checkpoint
from nemostream.export.parity import measure_parity, prompt_order, stream_encoder
from nemostream.export.reference import NumpyReference

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "demo.nemo"
STAGES = ("features", "encode", "project", "predict", "join")
GRAPHS = dict(zip(STAGES, ("features-1120ms", "encoder-1120ms", "encoder-1120ms", "decoder", "joint"), strict=True))
FRAMES_PER_STEP = {"features": 112, "encode": 14, "project": 14, "predict": 1, "join": 1}


class Perturbed:
    """The outputs of a reference, computed once, with one value of one of them changed."""

    library, version, prompts = "NumPy", "", 0

    def __init__(self, reference: NumpyReference) -> None:
        self.unchanged, self._outputs = reference, dict[str, NDArray[Any]]()
        self.stage, self.frame, self.change = "", 0, 0.0
        self.cut = 0  # last frames of the stage that are missing

    def _output(self, stage: str, *inputs: Any) -> NDArray[Any]:
        if stage not in self._outputs:
            self._outputs[stage] = getattr(self.unchanged, stage)(*inputs)
        output = self._outputs[stage].astype(np.float64)
        if stage == self.stage:
            output[self.frame, 3] += self.change
            output = output[: len(output) - self.cut]
        return output

    def features(self, audio: NDArray[Any]) -> NDArray[Any]:
        return self._output("features", audio)

    def encode(self, mel: NDArray[Any], chunk: ChunkConfig) -> NDArray[Any]:
        return self._output("encode", mel, chunk)

    def apply_prompt(self, encoded: NDArray[Any], prompts: NDArray[np.int64]) -> NDArray[Any]:
        raise AssertionError("the model has no prompts")

    def predict(self, tokens: Sequence[int]) -> NDArray[Any]:
        return self._output("predict", tokens)

    def project(self, encoded: NDArray[Any]) -> NDArray[Any]:
        return self._output("project", encoded)

    def join(self, projected: NDArray[Any], predicted: NDArray[Any]) -> NDArray[Any]:
        return self._output("join", projected, predicted)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, demo_bundle: Bundle) -> tuple[Bundle, Perturbed]:
    """The demo bundle with its largest chunk size only, and the reference of its checkpoint."""
    checkpoint = open_checkpoint(DEMO, tmp_path_factory.mktemp("demo") / "unpacked")
    manifest = dataclasses.replace(demo_bundle.manifest, chunks=demo_bundle.manifest.chunks[-1:], parity={})
    return Bundle(demo_bundle.path, manifest), Perturbed(NumpyReference(checkpoint))


@pytest.fixture
def reference(demo: tuple[Bundle, Perturbed]) -> Iterator[Perturbed]:
    _, reference = demo
    yield reference
    reference.stage, reference.cut = "", 0


def measure(bundle: Bundle, reference: Perturbed) -> dict[str, Any]:
    return dict(measure_parity(bundle, reference, lambda message: None).parity)


def test_the_figures_are_the_largest_differences(demo: tuple[Bundle, Perturbed], reference: Perturbed) -> None:
    bundle, _ = demo
    figures = measure(bundle, reference)
    audio = 18.0  # seconds of the packaged recording, at least 12 steps of 1.12 s
    assert figures["reference"] == "NumPy" and 12 * 1.12 <= figures["audio_seconds"] <= 2 * audio
    chunk = figures["1120ms"]
    assert chunk.keys() == {"steps", "features", "encoder", "projection"}
    frames = bundle.manifest.encoder_frames(round(figures["audio_seconds"] * 16000))
    assert chunk["steps"] == -(-frames // 14) >= 12
    plain = {stage: chunk[name] for stage, name in zip(STAGES, ("features", "encoder", "projection"), strict=False)}
    plain |= {"predict": figures["decoder"], "join": figures["joint"]}
    assert all(difference > 0 for stage, difference in plain.items() if stage != "features")
    reference.stage, reference.frame, reference.change = "encode", 5, 8e-5
    changed = measure(bundle, reference)["1120ms"]
    assert changed["encoder"] == pytest.approx(8e-5, abs=1.1 * plain["encode"])
    assert changed["features"] == chunk["features"]


def test_the_outputs_of_a_recording(demo: tuple[Bundle, Perturbed], clips: dict[str, NDArray[Any]]) -> None:
    """Of 1.54 s, in two steps of 1.12 s: those of the reference, without frames after the end."""
    bundle, reference = demo
    (chunk,) = bundle.manifest.chunks
    audio = clips["cards-003"]
    mel, encoded, steps = stream_encoder(bundle, chunk, audio)
    assert (len(mel), len(encoded), steps) == (153, 20, 2)
    wanted = reference.unchanged.features(audio)
    np.testing.assert_allclose(mel, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoded, reference.unchanged.encode(wanted, chunk), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        *((stage, change) for stage in STAGES for change in (4e-4, np.nan)),
        ("encode", -4e-4),
        ("project", np.inf),
        ("join", -np.inf),
    ],
)
def test_a_difference_in_any_output_fails(
    stage: str, change: float, demo: tuple[Bundle, Perturbed], reference: Perturbed
) -> None:
    """The message names the graph, and frame and step of the largest difference, or of a value that is not finite."""
    bundle, _ = demo
    frame = 7 if stage in ("predict", "join") else 2 * FRAMES_PER_STEP[stage] + 3
    if stage == "join":
        change *= 10  # its tolerance is relative to log-probabilities of more than 10
    reference.stage, reference.frame, reference.change = stage, frame, change
    with pytest.raises(ParityError) as caught:
        measure(bundle, reference)
    message = str(caught.value)
    assert message.startswith(f"{GRAPHS[stage]} differs from NumPy by ") and "the bundle was not written" in message
    assert f", most at frame {frame}, step {frame // FRAMES_PER_STEP[stage]};" in message
    difference = float(message.split(" by ")[1].split()[0])
    assert difference == pytest.approx(abs(change), rel=0.1, nan_ok=True)


@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_frames_fails(stage: str, demo: tuple[Bundle, Perturbed], reference: Perturbed) -> None:
    bundle, _ = demo
    reference.stage, reference.change, reference.cut = stage, 0.0, 1
    with pytest.raises((ParityError, ValueError)) as caught:
        measure(bundle, reference)
    if stage in ("features", "encode", "join"):  # the shapes of the others follow from their inputs
        assert f"the output of {GRAPHS[stage]} has the shape (" in str(caught.value)


def test_a_graph_that_computes_nan_fails(demo: tuple[Bundle, Perturbed], reference: Perturbed, tmp_path: Path) -> None:
    bundle, _ = demo
    shutil.copytree(bundle.path, tmp_path / "bundle")
    copy = Bundle(tmp_path / "bundle", bundle.manifest)
    bias = bundle.manifest.tensors["joint.out.bias"]
    values = np.memmap(copy.path / "weights.bin", np.float32, "r+", bias.offset, bias.shape)
    values[4] = np.nan
    values.flush()
    with pytest.raises(ParityError, match=r"^joint differs from NumPy by nan .* at frame 0, step 0"):
        measure(copy, reference)


def test_the_order_of_prompts(demo_bundle: Bundle) -> None:
    """The default first, then `auto`, then the others in the order of the manifest, each id once."""
    names = {"en-US": 0, "en": 0, "de-DE": 3, "auto": 6, "fr": 5}
    for default, order in (("de-DE", [3, 6, 0, 5]), ("auto", [6, 0, 3, 5]), ("en", [0, 6, 3, 5])):
        manifest = dataclasses.replace(demo_bundle.manifest, languages=LanguageConfig(default, names, 7))
        assert prompt_order(manifest) == order
    without = LanguageConfig("fr", {"de": 1, "fr": 0}, 2)
    assert prompt_order(dataclasses.replace(demo_bundle.manifest, languages=without)) == [0, 1]
    assert prompt_order(demo_bundle.manifest) == []
