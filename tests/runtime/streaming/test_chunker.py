from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import StreamError
from nemostream.runtime.streaming.chunker import Chunker

LENGTHS = [0, 1, 159, 160, 198, 199, 200, 1279, 1280, 1478, 1479, 7878, 7879, 7880, 16839, 16840, 50_000]


def drain(stream: Chunker) -> list[tuple[np.ndarray, int]]:
    return [(item.audio, item.length) for item in (stream.take() for _ in range(stream.queued))]


@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
@pytest.mark.parametrize("samples", LENGTHS)
def test_chunks_hold_the_lead_and_every_sample_that_a_frame_needs(manifest, fake, ms, samples):
    chunk = manifest.chunk(ms)
    audio = np.arange(1, samples + 1, dtype=np.float32)
    stream = Chunker(manifest, chunk)
    stream.accept(audio)
    stream.finish()
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
    whole, cut = (Chunker(manifest, manifest.chunk(80 * frames)) for _ in range(2))
    whole.accept(audio)
    at = 0
    for size in itertools.cycle(sizes):
        if at >= samples:
            break
        cut.accept(audio[at : at + size])
        at += size
    for stream in (whole, cut):
        stream.finish()
        assert stream.samples == samples
    one, other = drain(whole), drain(cut)
    assert [length for _, length in one] == [length for _, length in other]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


@given(samples=st.integers(0, 10**7))
def test_encoder_frames_by_counting_convolution_windows(manifest, fake, samples):
    assert manifest.encoder_frames(samples) == fake.encoder_frames(samples)


def test_a_chunk_is_ready_at_its_last_sample_and_not_before(manifest):
    stream = Chunker(manifest, manifest.chunk(80))
    stream.accept(np.ones(198, np.float32))
    assert stream.queued == 0
    stream.accept(np.ones(1, np.float32))
    assert stream.queued == 1


def test_the_callers_array_is_free_after_accept(manifest):
    stream = Chunker(manifest, manifest.chunk(560))
    audio = np.ones(1000, np.float32)
    stream.accept(audio)
    audio[:] = 7
    stream.finish()
    (row, length), *_ = drain(stream)
    assert set(row[1081:length]) == {1.0}


def test_audio_after_the_end_is_refused_and_ending_twice_adds_nothing(manifest):
    stream = Chunker(manifest, manifest.chunk(560))
    stream.accept(np.ones(5000, np.float32))
    stream.finish()
    stream.finish()
    assert stream.queued == 1
    with pytest.raises(StreamError, match="was finished; open a new one"):
        stream.accept(np.ones(1, np.float32))


@given(changes=st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([80, 160, 560, 1120])), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_stream_may_change_its_chunk_size_and_loses_nothing(manifest, fake, changes):
    stream, samples, sizes = Chunker(manifest, manifest.chunk(160)), 0, []
    audio = np.arange(1, 1 + sum(length for length, _ in changes), dtype=np.float32)
    for length, ms in changes:
        stream.accept(audio[samples : samples + length])
        samples += length
        stream.set_chunk(manifest.chunk(ms))
    stream.finish()
    chunks = []
    while stream.queued:
        item = stream.take()
        sizes.append(item.chunk)
        chunks.append((item.audio, item.length))
    covered, frames = sum(size.frames for size in sizes), fake.encoder_frames(samples)
    assert covered >= frames and (not sizes or covered - sizes[-1].frames < frames)
    assert [len(row) for row, _ in chunks] == [size.samples for size in sizes]
    heard = np.concatenate([np.zeros(0, np.float32), *(row[:length] for row, length in chunks)])
    whole = np.concatenate([np.zeros(1081, np.float32), audio])
    assert np.array_equal(heard, whole[: sum(size.samples for size in sizes)])


def test_another_chunk_size_counts_from_the_chunk_being_filled(manifest):
    stream = Chunker(manifest, manifest.chunk(560))
    stream.accept(np.ones(100, np.float32))
    stream.set_chunk(manifest.chunk(80))
    stream.accept(np.ones(99, np.float32))
    assert stream.queued == 1 and stream.head.chunk.ms == 80
    stream.accept(np.ones(1000, np.float32))
    stream.set_chunk(manifest.chunk(560))
    stream.accept(np.ones(280, np.float32))
    assert stream.queued == 1


# -- gates and cuts ----------------------------------------------------------------------------------------------------


class Script:
    """A gate that lets the chunks through that it was told to, by the sample that they end at or after."""

    def __init__(self, lead_ms: int, loud: set[int]) -> None:
        self.lead_ms, self.loud, self.asked, self.began = lead_ms, loud, [], []

    def passes(self, begin: int, end: int) -> bool:
        self.asked.append((begin, end))
        return len(self.asked) in self.loud

    def restart(self, at: int) -> None:
        self.began.append(at)


def items(stream: Chunker) -> list:
    return [stream.take() for _ in range(stream.queued)]


@given(
    loud=st.sets(st.integers(1, 40)),
    samples=st.integers(0, 60_000),
    frames=st.sampled_from([1, 2, 7]),
    lead=st.sampled_from([1, 80, 400, 1200]),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_a_gate_leaves_out_whole_chunks_and_keeps_their_time(manifest, fake, loud, samples, frames, lead, sizes):
    """What is run is the lead, the first chunk, those let through and enough before them, as one recording; the origin
    tells where in the stream each of it was."""
    chunk, gate = manifest.chunk(80 * frames), Script(lead, loud)
    stream, at = Chunker(manifest, chunk, gate), 0
    audio = np.arange(1, samples + 1, dtype=np.float32)
    for size in itertools.cycle(sizes):
        if at >= samples:
            break
        stream.accept(audio[at : at + size])
        at += size
    stream.finish()
    found = items(stream)
    # Worked out from the definition: chunks of the stream's own grid, the first with the lead silence in it.
    whole = (samples + 1081) // chunk.samples
    edges = [max(k * chunk.samples - 1081, 0) for k in range(whole + 1)]
    passed = [k == 0 or k in loud for k in range(whole)]
    rest = whole == 0 or whole in loud  # whether the rest, which is no whole chunk, is
    before = max(1, -(-lead // chunk.ms))
    run = [passed[k] or any(passed[k + 1 : k + 1 + before]) or (rest and k + before >= whole) for k in range(whole)]
    assert [item.kind for item in found[:whole]] == ["run" if ran else "skip" for ran in run]
    assert [item.end_sample for item in found[:whole]] == [(k + 1) * chunk.samples for k in range(whole)]
    heard = [audio[edges[k] : edges[k + 1]] for k in range(whole) if run[k]]
    heard = np.concatenate([np.zeros(0, np.float32), *heard, *([audio[edges[-1] :]] if rest else [])])
    ran = [item for item in found if item.kind == "run"]
    frames_run = sum(item.chunk.frames for item in ran)
    total = fake.encoder_frames(len(heard))
    assert total <= frames_run < total + chunk.frames or frames_run == total == 0
    got = np.concatenate([np.zeros(0, np.float32), *(item.audio[: item.length] for item in ran)])
    assert np.array_equal(got[1081:], heard[: max(len(got) - 1081, 0)])
    covered = 0
    for item in ran:  # frame `covered` of what the slot hears stands where this chunk stands in the stream
        sample_pos = item.origin_sample + 1280 * covered
        first = int(item.audio[: item.length].max(initial=0)) - np.count_nonzero(item.audio) + 1
        if covered and item.audio.any():
            assert sample_pos - 1081 == first - 1
        covered += item.chunk.frames
    assert gate.asked == [(edges[k], edges[k + 1]) for k in range(1, whole)] + ([(edges[-1], samples)] if whole else [])


@given(
    parts=st.lists(st.tuples(st.integers(0, 20_000), st.sampled_from([80, 160, 560])), min_size=1, max_size=5),
    size=st.integers(100, 9000),
)
@settings(max_examples=60, deadline=None)
def test_a_cut_stream_is_several_streams_with_one_clock(manifest, parts, size):
    stream, began, wanted = Chunker(manifest, manifest.chunk(parts[0][1])), 0, []
    for number, (samples, ms) in enumerate(parts):
        audio = np.random.default_rng(number).standard_normal(samples).astype(np.float32)
        alone = Chunker(manifest, manifest.chunk(ms))
        stream.set_chunk(manifest.chunk(ms))
        for at in range(0, samples, size):
            stream.accept(audio[at : at + size])
            alone.accept(audio[at : at + size])
        alone.finish()
        part = [(item.audio, item.length, item.end_sample + began, began) for item in items(alone)]
        began += samples
        wanted.append((part, began))
        if number < len(parts) - 1:
            stream.end_utterance()
    stream.finish()
    stream.end_utterance()  # changes nothing any more
    found = items(stream)
    for number, (part, end) in enumerate(wanted):
        for first, (audio, length, end_sample, origin_sample) in zip([True] + [False] * len(part), part, strict=False):
            item = found.pop(0)
            assert np.array_equal(item.audio, audio)
            assert (item.kind, item.length, item.end_sample, item.origin_sample) == (
                "run",
                length,
                end_sample,
                origin_sample,
            )
            assert item.fresh == (first and number > 0)
        if number < len(parts) - 1:
            item = found.pop(0)
            assert (item.kind, item.end_sample) == ("end_of_utterance", end)
    assert not found


def test_a_cut_opens_the_gate(manifest):
    gate = Script(80, set())
    stream = Chunker(manifest, manifest.chunk(80), gate)
    stream.accept(np.ones(5000, np.float32))
    stream.end_utterance()
    stream.accept(np.ones(5000, np.float32))
    assert gate.began == [5000]
    assert [item.kind for item in items(stream)] == [
        "run",
        "skip",
        "skip",
        "skip",
        "end_of_utterance",
        "run",
        "skip",
        "skip",
    ]
