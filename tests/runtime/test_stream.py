from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import StreamError
from nemostream.runtime.stream import Stream

LENGTHS = [0, 1, 159, 160, 198, 199, 200, 1279, 1280, 1478, 1479, 7878, 7879, 7880, 16839, 16840, 50_000]


def drain(stream: Stream) -> list[tuple[np.ndarray, int]]:
    return [stream.take() for _ in range(stream.queued)]


@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
@pytest.mark.parametrize("samples", LENGTHS)
def test_chunks_hold_the_lead_and_every_sample_that_a_frame_needs(manifest, fake, ms, samples):
    chunk = manifest.chunk(ms)
    audio = np.arange(1, samples + 1, dtype=np.float32)
    stream = Stream(manifest, chunk)
    stream.accept(audio)
    stream.end()
    chunks = drain(stream)
    frames = fake.encoder_frames(samples)
    assert len(chunks) == -(-frames // chunk.frames)
    heard = np.concatenate([np.zeros(0, np.float32), *(row[:length] for row, length in chunks)])
    whole = np.concatenate([np.zeros(1081, np.float32), audio])
    assert np.array_equal(heard, whole[: len(chunks) * chunk.samples])
    assert all(length == chunk.samples for _, length in chunks[:-1])
    assert not any(row[length:].any() for row, length in chunks)


@given(
    samples=st.integers(0, 40_000),
    frames=st.sampled_from([1, 2, 7, 14]),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=9),
)
@settings(max_examples=40, deadline=None)
def test_pushes_of_any_size_make_the_same_chunks(manifest, samples, frames, sizes):
    audio = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    whole, cut = (Stream(manifest, manifest.chunk(80 * frames)) for _ in range(2))
    whole.accept(audio)
    at = 0
    for size in itertools.cycle(sizes):
        if at >= samples:
            break
        cut.accept(audio[at : at + size])
        at += size
    for stream in (whole, cut):
        stream.end()
        assert stream.samples == samples
    one, other = drain(whole), drain(cut)
    assert [length for _, length in one] == [length for _, length in other]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


@given(samples=st.integers(0, 10**7))
def test_encoder_frames_by_counting_convolution_windows(manifest, fake, samples):
    assert manifest.encoder_frames(samples) == fake.encoder_frames(samples)


def test_a_chunk_is_ready_at_its_last_sample_and_not_before(manifest):
    stream = Stream(manifest, manifest.chunk(80))
    stream.accept(np.ones(198, np.float32))
    assert stream.queued == 0
    stream.accept(np.ones(1, np.float32))
    assert stream.queued == 1


def test_the_callers_array_is_free_after_accept(manifest):
    stream = Stream(manifest, manifest.chunk(560))
    audio = np.ones(1000, np.float32)
    stream.accept(audio)
    audio[:] = 7
    stream.end()
    (row, length), *_ = drain(stream)
    assert set(row[1081:length]) == {1.0}


def test_audio_after_the_end_is_refused_and_ending_twice_adds_nothing(manifest):
    stream = Stream(manifest, manifest.chunk(560))
    stream.accept(np.ones(5000, np.float32))
    stream.end()
    stream.end()
    assert stream.queued == 1
    with pytest.raises(StreamError, match="was finished; open a new one"):
        stream.accept(np.ones(1, np.float32))


@given(changes=st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([80, 160, 560, 1120])), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_stream_may_change_its_chunk_size_and_loses_nothing(manifest, fake, changes):
    stream, samples, sizes = Stream(manifest, manifest.chunk(160)), 0, []
    audio = np.arange(1, 1 + sum(length for length, _ in changes), dtype=np.float32)
    for length, ms in changes:
        stream.accept(audio[samples : samples + length])
        samples += length
        stream.use(manifest.chunk(ms))
    stream.end()
    chunks = []
    while stream.queued:
        sizes.append(stream.head)
        chunks.append(stream.take())
    covered, frames = sum(size.frames for size in sizes), fake.encoder_frames(samples)
    assert covered >= frames and (not sizes or covered - sizes[-1].frames < frames)
    assert [len(row) for row, _ in chunks] == [size.samples for size in sizes]
    heard = np.concatenate([np.zeros(0, np.float32), *(row[:length] for row, length in chunks)])
    whole = np.concatenate([np.zeros(1081, np.float32), audio])
    assert np.array_equal(heard, whole[: sum(size.samples for size in sizes)])


def test_another_chunk_size_counts_from_the_chunk_being_filled(manifest):
    stream = Stream(manifest, manifest.chunk(560))
    stream.accept(np.ones(100, np.float32))
    stream.use(manifest.chunk(80))
    stream.accept(np.ones(99, np.float32))
    assert stream.queued == 1 and stream.head.ms == 80
    stream.accept(np.ones(1000, np.float32))
    stream.use(manifest.chunk(560))
    stream.accept(np.ones(280, np.float32))
    assert stream.queued == 1
