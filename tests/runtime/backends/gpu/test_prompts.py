"""Prompt ids of the rows of a step: tokens equal those of the CPU backend, invalid ids do not reach the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_cpu import MISSING
from host_device import HostDevice, OrtEncoder
from prompted import LANGUAGES, prompted_bundle

from nemostream.bundle import Bundle
from nemostream.errors import BundleError, OptionError
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.backends.gpu.backend import GpuBackend
from nemostream.runtime.backends.gpu.memory import encoder_sizes

CAPACITY, IDS = 5, sorted(LANGUAGES.prompts.values())


@pytest.fixture(scope="module")
def prompted(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return prompted_bundle(small_bundle, tmp_path_factory.mktemp("prompted") / "bundle")


def make_backend(bundle: Bundle, device: Any, **options: Any) -> GpuBackend:
    encoders = {ms: OrtEncoder(bundle, bundle.manifest.chunk(ms), device) for ms in (80, 560)}
    return GpuBackend(bundle, device, encoders, capacity=CAPACITY, **options)


@pytest.fixture
def gpu(prompted: Bundle, make_device: Any) -> Iterator[GpuBackend]:
    backend = make_backend(prompted, make_device())
    yield backend
    backend.close()


def speech(clips: dict[str, np.ndarray], chunk: Any, step: int, slots: list[int]) -> np.ndarray:
    """Return the audio [B, N] of a step; all streams have their own."""
    audio = [np.resize(clip, 40 * chunk.samples) for clip in [*clips.values()][:CAPACITY]]
    return np.stack([audio[slot][step * chunk.samples :][: chunk.samples] for slot in slots])


def tokens(emissions: Any) -> list[tuple[list[int], list[int]]]:
    rows = zip(emissions.tokens, emissions.frames, strict=True)
    return [(row.tolist(), frames.tolist()) for row, frames in rows]


def test_rows_with_different_prompts(gpu: GpuBackend, prompted: Bundle, clips: dict[str, np.ndarray]) -> None:
    """Two pending steps, in place and gathered, both chunk sizes; a stream has other prompts in later steps."""
    rng = np.random.default_rng(0)
    cpu, other = (OrtBackend(prompted, capacity=CAPACITY, threads=1) for _ in range(2))
    for backend in (gpu, cpu, other):
        backend.reset(np.arange(CAPACITY))
    pending, emitted, changed = [], 0, 0
    for step, slots in enumerate(
        [[0, 1, 2, 3, 4], [0, 1, 3, 4], [1, 3], [4], [0, 1, 3], [0, 4], [1, 2, 4], [0, 1, 2, 3, 4]]
    ):
        chunk = prompted.manifest.chunk((560, 80)[step % 2])
        audio, lengths = speech(clips, chunk, step, slots), np.full(len(slots), chunk.samples)
        prompts = rng.choice(IDS, len(slots))
        batch = Batch(chunk, np.array(slots), audio, lengths, prompts)
        pending.append((gpu.submit(batch), cpu.submit(batch).result()))
        another = dataclasses.replace(batch, prompts=np.roll(IDS, 1)[np.searchsorted(IDS, prompts)])
        changed += tokens(other.submit(another).result()) != tokens(pending[-1][1])
        while len(pending) > step % 2:
            got, wanted = pending.pop(0)
            got = got.result()
            assert tokens(got) == tokens(wanted)
            for value, expected in zip(got.scores, wanted.scores, strict=True):
                np.testing.assert_allclose(value, expected, atol=1e-3)
            emitted += sum(map(len, got.tokens))
    assert emitted > 20 and changed > 4, "the tokens depend on the prompts"


def test_encoder_output(gpu: GpuBackend, prompted: Bundle, clips: dict[str, np.ndarray]) -> None:
    """Rows have their own prompts; without prompts, and in idle rows, it is that of the default language."""
    cpu, chunk = OrtBackend(prompted, capacity=CAPACITY, threads=1), prompted.manifest.chunk(560)
    default = LANGUAGES.prompt(None)
    assert default
    for step, (slots, prompts, rows) in enumerate(
        [
            ([0, 1, 2, 3, 4], [6, 3, 0, 4, 6], [6, 3, 0, 4, 6]),
            ([0, 1, 3], [6, 0, 4], [6, 0, default, 4]),  # in place
            ([1, 2, 4], [4, 0, 6], [4, 0, 6, default]),  # gathered
            ([1, 3], None, [default] * 2),
        ]
    ):
        backends: list[Any] = [gpu, cpu]
        found = []
        for backend in backends:
            backend.reset(np.arange(CAPACITY))
            audio = speech(clips, chunk, step, slots)
            ids = None if prompts is None else np.array(prompts)
            batch = Batch(chunk, np.array(slots), audio, np.full(len(slots), chunk.samples), ids)
            found.append(backend.encode(batch)[0].copy())
        np.testing.assert_allclose(*found, atol=2e-5)
        used = np.empty(len(rows), np.int64)
        gpu.arena.read("row_prompt", used)
        assert used.tolist() == rows


@pytest.mark.skipif(MISSING, reason="needs g++ to run the kernels on a CPU")
def test_exported_model(tmp_path: Path, clips: dict[str, np.ndarray]) -> None:
    """A model that the exporter wrote, with the chunk sizes and the left context of nemotron-3.5-asr-streaming-0.6b."""
    pytest.importorskip("onnx")
    from nemostream.benchmarks.harness.random_bundle import random_bundle
    from nemostream.benchmarks.harness.synthetic import Sizes

    sizes = Sizes(
        n_layers=2,
        d_model=64,
        n_heads=4,
        conv_channels=8,
        pred_hidden=48,
        joint_hidden=48,
        vocab=300,
        contexts=((56, 3), (56, 0), (56, 6), (56, 13)),
    )
    bundle = random_bundle(tmp_path / "bundle", sizes=sizes, languages=LANGUAGES)
    assert (bundle.manifest.encoder.cache, [chunk.ms for chunk in bundle.manifest.chunks]) == (56, [80, 320, 560, 1120])
    decoder = dataclasses.replace(bundle.manifest.decoder, max_symbols=2)  # random weights emit as many as they can
    bundle = Bundle(bundle.path, dataclasses.replace(bundle.manifest, decoder=decoder))
    chunk, device = bundle.manifest.chunk(320), HostDevice()
    gpu = GpuBackend(bundle, device, {320: OrtEncoder(bundle, chunk, device)}, capacity=3)
    cpu, found = OrtBackend(bundle, capacity=3, threads=1), set()
    cpu.reset(np.arange(3))
    for step in range(16):  # until the ring of 56 frames has wrapped around
        audio, lengths = speech(clips, chunk, step, [0, 1, 2]), np.full(3, chunk.samples)
        batch = Batch(chunk, np.arange(3), audio, lengths, np.array([0, 6, IDS[step % len(IDS)]]))
        got = tokens(gpu.submit(batch).result())
        assert got == tokens(cpu.submit(batch).result())
        found.update(token for row, _ in got for token in row)
    assert len(found) > 5
    gpu.close()


@pytest.mark.parametrize("invalid", [-1, LANGUAGES.count, 1 << 32])
def test_invalid_prompt_ids(invalid: int, gpu: GpuBackend, prompted: Bundle, clips: dict[str, np.ndarray]) -> None:
    """They are rejected before anything is launched, and the streams continue."""
    cpu, chunk = OrtBackend(prompted, capacity=CAPACITY, threads=1), prompted.manifest.chunk(560)
    cpu.reset(np.arange(2))
    for step in range(4):
        audio, lengths = speech(clips, chunk, step, [0, 1]), np.full(2, chunk.samples)
        batch = Batch(chunk, np.arange(2), audio, lengths, np.array([3, 0]))
        backends: list[Any] = [gpu, cpu]
        for backend in backends:
            queued = getattr(gpu.device, "queued", 0)
            with pytest.raises(OptionError, match=f"a prompt id is {invalid}; this model has the ids 0 to 6"):
                backend.submit(dataclasses.replace(batch, prompts=np.array([3, invalid])))
            assert getattr(gpu.device, "queued", 0) == queued
        assert tokens(gpu.submit(batch).result()) == tokens(cpu.submit(batch).result())


def test_model_of_one_language(make_device: Any, small_bundle: Bundle, clips: dict[str, np.ndarray]) -> None:
    """Its graphs have no input for prompts; ids have no effect."""
    gpu, chunk = make_backend(small_bundle, make_device()), small_bundle.manifest.chunk(560)
    batch = Batch(chunk, np.arange(2), speech(clips, chunk, 1, [0, 1]), np.full(2, chunk.samples))
    plain = gpu.encode(batch)[0]
    gpu.reset(np.arange(2))
    np.testing.assert_array_equal(gpu.encode(dataclasses.replace(batch, prompts=np.array([9, -1])))[0], plain)
    gpu.close()


def test_table_of_another_size(prompted: Bundle, small_bundle: Bundle) -> None:
    """A device would read beyond the table."""
    for bundle, count, table in ((prompted, 128, 7), (prompted, 0, 7), (small_bundle, 7, 0)):
        languages = dataclasses.replace(LANGUAGES, count=count)
        changed = Bundle(bundle.path, dataclasses.replace(bundle.manifest, languages=languages))
        with pytest.raises(BundleError, match=f"a table of {table} prompt ids, the manifest states {count}"):
            encoder_sizes(changed, changed.manifest.chunks[0])
