"""The audio of timed steps: each stream begins at another sample of the clip, and steps follow each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nemostream import engines
from nemostream.benchmarks.harness import timed
from nemostream.benchmarks.harness.timed import AudioFeed, longest, timed_backend
from nemostream.bundle import Bundle
from nemostream.errors import BackendError
from nemostream.runtime.backends.gpu import cuda


def test_steps_are_consecutive_parts_of_the_streams(demo_bundle: Bundle) -> None:
    manifest, chunk = demo_bundle.manifest, demo_bundle.manifest.chunk(160)
    clip = np.arange(1, 6001, dtype=np.float32)
    feed = AudioFeed(manifest, clip, 3, 6)
    assert feed.audio.shape == (3, 6 * 1280)
    assert feed.audio[:, 0].tolist() == [1, 2001, 4001]  # a third of the clip apart
    assert feed.audio[1, 3999] == 6000 and feed.audio[1, 4000] == 1  # the clip is repeated
    steps = [feed.batch(chunk, position) for position in (0, 2, 4)]
    received = np.concatenate([step.audio for step in steps], axis=1)
    assert not received[:, : manifest.lead].any()  # silence before the audio
    assert np.array_equal(received[:, manifest.lead :], feed.audio[:, : 6 * 1280 - manifest.lead])
    for step in steps:
        assert step.chunk == chunk and step.slots.tolist() == [0, 1, 2] and step.lengths.tolist() == [2560] * 3
    with pytest.raises(IndexError, match="ends before frame 8"):
        feed.batch(chunk, 6)


class Featurizer:
    """The interface of NeMo's featurizer that is used: magnitudes of a short-time Fourier transform."""

    n_fft, hop_length, win_length = 8, 4, 6

    def __init__(self, window: Any) -> None:
        self.window, self.calls, self.converted = window, list[Any](), list[str]()
        self.stft: Callable[[Any], Any] = lambda samples: pytest.fail("the transform is that of NeMo, in fp32")

    def cpu(self) -> Featurizer:
        self.converted.append("cpu")
        return self

    def double(self) -> Featurizer:
        self.converted.append("double")
        return self

    def __call__(self, samples: Any, lengths: Any) -> Any:
        assert self.converted == ["cpu", "double"] and lengths.tolist() == [samples.shape[1]] * len(samples)
        self.calls.append(samples)
        return self.stft(samples).abs(), lengths


def test_features_of_nemo_are_computed_in_double_precision(demo_bundle: Bundle) -> None:
    """The transform pads with zeros, so that frame n is around sample 4 n; a window of 6 is in the middle of 8."""
    torch = pytest.importorskip("torch")
    window = torch.hann_window(6, periodic=False)
    featurizer = Featurizer(window)
    model: Any = SimpleNamespace(preprocessor=SimpleNamespace(featurizer=featurizer))
    clip = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    feed = AudioFeed(demo_bundle.manifest, clip, 2, 1)
    found = feed.mel(model)
    padded = np.pad(feed.audio.astype(np.float64), ((0, 0), (4, 4)))
    taps = np.pad(window.numpy().astype(np.float64), 1)
    frames = np.stack([padded[:, start : start + 8] for start in range(0, 1280 + 1, 4)], axis=1)
    expected = np.abs(np.fft.rfft(frames * taps)).transpose(0, 2, 1)
    assert found.dtype == torch.float32 and found.is_contiguous()
    # Within the rounding to fp32 of the result, except where it is nearly 0.
    np.testing.assert_allclose(found.numpy(), expected, rtol=6e-8, atol=1e-12)
    assert feed.mel(model) is found  # computed once
    assert featurizer.converted == [] and featurizer.calls == []  # the model is not changed


def test_window_of_a_step(demo_bundle: Bundle) -> None:
    """Nine mel frames of history, and eight for each encoder frame."""
    manifest = demo_bundle.manifest
    feed = AudioFeed(manifest, np.ones(1000, np.float32), 1, 1)
    assert feed.window(manifest.chunk(560), 0) == slice(-16, 49)
    assert feed.window(manifest.chunk(80), 5) == slice(24, 41)


def test_longest_chunk_has_the_same_left_context(demo_bundle: Bundle) -> None:
    from dataclasses import replace

    chunks = [replace(chunk, left=56 if chunk.ms == 1120 else chunk.left) for chunk in demo_bundle.manifest.chunks]
    manifest = replace(demo_bundle.manifest, chunks=tuple(chunks))
    assert longest(demo_bundle.manifest, demo_bundle.manifest.chunk(80)).ms == 1120
    assert longest(manifest, manifest.chunk(80)).ms == 560
    assert longest(manifest, manifest.chunk(1120)).ms == 1120


class Opened:
    """Replaces engines, backends and the GPU, and records how they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[Any] = []
        self.log: list[Any] = []
        self.folders: set[Path] = set()
        monkeypatch.setattr(engines, "build_engine", self.build_engine)
        monkeypatch.setattr(engines, "open_gpu", self.open_gpu)
        monkeypatch.setattr(timed, "OrtBackend", self.open_cpu)
        monkeypatch.setattr(cuda, "CudaDevice", lambda: SimpleNamespace(close=lambda: self.log.append("GPU closed")))

    def build_engine(self, bundle: Bundle, chunk: Any, precision: str, store: Any, **options: Any) -> Any:
        self.built.append((chunk.ms, precision, options))
        self.folders.add(store.folder)
        return f"engine {chunk.ms}", True

    def backend(self, bundle: Bundle, **options: Any) -> Any:
        self.log.append((bundle.manifest.name, options))
        prepare = lambda chunk: self.log.append(f"prepared {chunk.ms}")  # noqa: E731
        return SimpleNamespace(prepare=prepare, close=lambda: self.log.append("closed"))

    def open_cpu(self, bundle: Bundle, **options: Any) -> Any:
        return self.backend(bundle, **options)

    def open_gpu(self, bundle: Bundle, device: Any, plans: Any, capacity: int, max_batch: int) -> Any:
        assert device.close
        return self.backend(bundle, plans=plans, capacity=capacity, max_batch=max_batch)


PLANS = {80: "engine 80", 560: "engine 560"}


@pytest.mark.parametrize(
    ("device", "precision", "building", "plans"),
    [
        ("cpu", "fp32", None, None),
        ("cpu", "int8", {"backend": "onnxruntime"}, PLANS),
        ("cuda", "fp8", {"backend": "tensorrt", "target": None, "max_batch": 4}, PLANS),
        ("cuda:onnxruntime", "fp16", {"backend": "onnxruntime", "target": "cuda", "max_batch": 4}, PLANS),
    ],
)
def test_backends_for_timing(
    device: str, precision: str, building: Any, plans: Any, demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing engines are built, without validation, into a folder that is removed; the backend is closed."""
    opened = Opened(monkeypatch)
    chunks = [demo_bundle.manifest.chunk(ms) for ms in PLANS]
    with timed_backend(demo_bundle, chunks, precision, 6, device=device, threads=3, max_batch=4):
        opened.log.append("used")
    assert opened.built == [(ms, precision, {**building, "validate": False}) for ms in PLANS if building]
    options = {"capacity": 6, "max_batch": 4, "plans": plans}
    if device == "cpu":
        prepared = [f"prepared {ms}" for ms in PLANS]
        assert opened.log == [("demo", {**options, "threads": 3}), *prepared, "used", "closed"]
    else:
        assert opened.log == [("demo", options), "used", "closed"]
    assert len(opened.folders) == bool(building) and not any(folder.exists() for folder in opened.folders)


def test_slots_and_folder_of_a_backend(demo_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default all streams share a step, and engines may be kept in a folder. An error closes the backend."""
    opened, chunk = Opened(monkeypatch), demo_bundle.manifest.chunk(80)
    for device in ("cpu", "cuda"):
        with (
            pytest.raises(ZeroDivisionError),
            timed_backend(demo_bundle, [chunk], "int8", 6, device=device, engines=tmp_path / device),
        ):
            _ = 1 / 0
    assert opened.folders == {tmp_path / "cpu", tmp_path / "cuda"}
    used = [
        (entry[1]["capacity"], entry[1]["max_batch"]) if isinstance(entry, tuple) else entry for entry in opened.log
    ]
    assert used == [(6, 6), "prepared 80", "closed", (6, 6), "closed"]


def test_the_gpu_is_closed_if_an_engine_cannot_be_built(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(monkeypatch)

    def fail(*arguments: Any, **options: Any) -> None:
        raise BackendError("no TensorRT.")

    monkeypatch.setattr(engines, "build_engine", fail)
    with (
        pytest.raises(BackendError, match="no TensorRT"),
        timed_backend(demo_bundle, [demo_bundle.manifest.chunk(80)], "fp16", 1, device="cuda"),
    ):
        pytest.fail("the backend is used")
    assert opened.log == ["GPU closed"]
