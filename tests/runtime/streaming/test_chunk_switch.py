"""A live stream that changes its chunk size, against NeMo's encoder with the same changes and its caches kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import nemostream
from nemostream.bundle import Bundle, ChunkConfig, Manifest
from nemostream.runtime.backends.base import Batch
from nemostream.runtime.backends.cpu import OrtBackend
from nemostream.runtime.model import Model

pytestmark = pytest.mark.nemo

Floats = NDArray[np.float32]
CHUNKS = (80, 160, 560, 1120)


def steps_of(manifest: Manifest, samples: int, sizes: list[int]) -> list[ChunkConfig]:
    """Return the chunks of a recording: the sizes in order, then the last one repeatedly."""
    frames, found = manifest.encoder_frames(samples), []
    while sum(chunk.frames for chunk in found) < frames:
        found.append(manifest.chunk(sizes[min(len(found), len(sizes) - 1)]))
    return found


def nemo_frames(oracle: Any, mel: Floats, steps: list[ChunkConfig], frames: int) -> Floats:
    """Return [T, D] of NeMo's encoder, run step by step with its caches over the window of each chunk."""
    import torch

    encoder = oracle.model.encoder
    caches = encoder.get_initial_cache_state(batch_size=1)
    found, at = [], 0
    for chunk in steps:
        encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        encoder.setup_streaming_params()
        begin, end = 8 * at - 16, min(8 * (at + chunk.frames) - 7, len(mel))
        window = torch.from_numpy(mel[max(begin, 0) : end].T[None].copy())
        with torch.inference_mode():
            encoded, length, *caches = encoder.cache_aware_stream_step(
                window,
                torch.tensor([window.shape[2]]),
                *caches,
                keep_all_outputs=True,
                drop_extra_pre_encoded=0 if at == 0 else 2,
            )
        found.append(encoded[0, :, : int(length[0])].T.numpy())
        at += chunk.frames
    return np.concatenate(found)[:frames]


def our_frames(bundle: Bundle, audio: Floats, steps: list[ChunkConfig]) -> Floats:
    """Return [T, J] of the backend's encoder, projected for the joint. The chunks are cut here."""
    manifest, backend, found = bundle.manifest, OrtBackend(bundle, capacity=1), []
    backend.reset(np.array([0]))
    padded = np.concatenate([np.zeros(manifest.lead, np.float32), audio])
    at = 0
    for chunk in steps:
        part = padded[at : at + chunk.samples]
        whole = np.pad(part, (0, chunk.samples - len(part)))
        encoded, counts = backend.encode(Batch(chunk, np.array([0]), whole[None], np.array([len(part)])))
        found.append(encoded[0, : counts[0]].copy())
        at += chunk.samples
    return np.concatenate(found)


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def models(request: pytest.FixtureRequest) -> Iterator[tuple[Model, Bundle, Any]]:
    bundle = request.getfixturevalue(f"{request.param}_bundle")
    with nemostream.load(bundle.path, capacity=2) as model:
        yield model, bundle, request.getfixturevalue(f"{request.param}_oracle")


# The first chunk has more than one frame: after a first step of one frame, NeMo treats the frames before the stream's
# start as silence of the stream. `tests/test_exactness.py` compares 80 ms from the start with NeMo's offline forward.
SIZES = st.tuples(st.sampled_from(CHUNKS[1:]), st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=60)).map(
    lambda pair: [pair[0], *pair[1]]
)


@given(sizes=SIZES, begin=st.integers(0, 40_000), length=st.integers(30_000, 110_000))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_that_changes_its_chunk_size_equals_nemo(
    models: tuple[Model, Bundle, Any], clips: dict[str, Floats], sizes: list[int], begin: int, length: int
) -> None:
    import torch

    model, bundle, oracle = models
    speech = np.concatenate([clips["librivox-sense-0870"], clips["cards-002"], clips["cards-001"]])
    audio = speech[begin : begin + length]
    manifest = bundle.manifest
    frames = manifest.encoder_frames(len(audio))
    steps = steps_of(manifest, len(audio), sizes)
    nemo = nemo_frames(oracle, oracle.features(audio, exact=True), steps, frames)
    with torch.inference_mode():
        projected = oracle.model.joint.project_encoder(torch.from_numpy(nemo[None].copy()))[0].numpy()
        hypothesis = oracle.model.decoding.rnnt_decoder_predictions_tensor(
            torch.from_numpy(nemo.T[None].copy()), torch.tensor([frames]), return_hypotheses=True
        )[0]
    np.testing.assert_allclose(our_frames(bundle, audio, steps), projected, rtol=0, atol=2e-4)
    # The same changes in a live stream, with pushes of any size.
    at, edge, rng = 0, -manifest.lead, np.random.default_rng(length)
    with model.stream(chunk_ms=steps[0].ms) as stream:
        for number, chunk in enumerate(steps):
            edge += chunk.samples
            while at < min(edge, len(audio)):
                size = int(rng.integers(1, 9000))
                stream.push(audio[at : min(at + size, edge)])
                at = min(at + size, edge)
            if number + 1 < len(steps):
                stream.set_chunk_ms(steps[number + 1].ms)
        found = stream.finish()
    assert [token.id for token in found.tokens] == [int(token) for token in hypothesis.y_sequence]
    assert [round(token.time / 0.08) for token in found.tokens] == [int(frame) for frame in hypothesis.timestamp]


@given(sizes=st.lists(st.sampled_from(CHUNKS), min_size=2, max_size=40), data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_moment_of_set_chunk_ms_within_a_chunk_does_not_matter(
    tiny_bundle: Bundle, clips: dict[str, Floats], sizes: list[int], data: st.DataObject
) -> None:
    """`set_chunk_ms` anywhere within the previous chunk has the same effect; the reference is the backend alone."""
    audio = clips["librivox-sense-0870"][:90_000]
    manifest = tiny_bundle.manifest
    steps = steps_of(manifest, len(audio), sizes)
    backend, wanted, at = OrtBackend(tiny_bundle, capacity=1), [], 0
    backend.reset(np.array([0]))
    padded = np.concatenate([np.zeros(manifest.lead, np.float32), audio])
    for chunk in steps:
        part = padded[at : at + chunk.samples]
        whole = np.pad(part, (0, chunk.samples - len(part)))
        emissions = backend.submit(Batch(chunk, np.array([0]), whole[None], np.array([len(part)]))).result()
        wanted += emissions.tokens[0].tolist()
        at += chunk.samples
    with nemostream.load(tiny_bundle.path, capacity=1) as model, model.stream(chunk_ms=steps[0].ms) as stream:
        at, edge = 0, -manifest.lead
        for number, chunk in enumerate(steps):
            edge += chunk.samples
            # The chunk being filled changes its size too, unless it already contains more samples.
            earliest = edge - (chunk.samples - steps[number + 1].samples if number + 1 < len(steps) else 0)
            change = edge if earliest > edge else data.draw(st.integers(max(earliest, at), max(edge, at)))
            stream.push(audio[at : max(change, at)])
            at = max(at, min(change, len(audio)))
            if number + 1 < len(steps):
                stream.set_chunk_ms(steps[number + 1].ms)
            stream.push(audio[at : max(edge, at)])
            at = max(at, min(edge, len(audio)))
        assert [token.id for token in stream.finish().tokens] == wanted
