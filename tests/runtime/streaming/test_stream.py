from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import StreamError
from nemostream.runtime.streaming.stream import Stream

LENGTHS = [0, 1, 159, 160, 198, 199, 200, 1279, 1280, 1478, 1479, 7878, 7879, 7880, 16839, 16840, 50_000]


def drain(stream: Stream) -> list[tuple[np.ndarray, int]]:
    return [(piece.audio, piece.length) for piece in (stream.take() for _ in range(stream.queued))]


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
        piece = stream.take()
        sizes.append(piece.chunk)
        chunks.append((piece.audio, piece.length))
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
    assert stream.queued == 1 and stream.head.chunk.ms == 80
    stream.accept(np.ones(1000, np.float32))
    stream.use(manifest.chunk(560))
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


def pieces(stream: Stream) -> list:
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
    stream, at = Stream(manifest, chunk, gate), 0
    audio = np.arange(1, samples + 1, dtype=np.float32)
    for size in itertools.cycle(sizes):
        if at >= samples:
            break
        stream.accept(audio[at : at + size])
        at += size
    stream.end()
    found = pieces(stream)
    # Worked out from the definition: chunks of the stream's own grid, the first with the lead silence in it.
    whole = (samples + 1081) // chunk.samples
    edges = [max(k * chunk.samples - 1081, 0) for k in range(whole + 1)]
    passed = [k == 0 or k in loud for k in range(whole)]
    rest = whole == 0 or whole in loud  # whether the rest, which is no whole chunk, is
    before = max(1, -(-lead // chunk.ms))
    run = [passed[k] or any(passed[k + 1 : k + 1 + before]) or (rest and k + before >= whole) for k in range(whole)]
    assert [piece.kind for piece in found[:whole]] == ["run" if ran else "skip" for ran in run]
    assert [piece.reach for piece in found[:whole]] == [(k + 1) * chunk.samples for k in range(whole)]
    heard = [audio[edges[k] : edges[k + 1]] for k in range(whole) if run[k]]
    heard = np.concatenate([np.zeros(0, np.float32), *heard, *([audio[edges[-1] :]] if rest else [])])
    ran = [piece for piece in found if piece.kind == "run"]
    frames_run = sum(piece.chunk.frames for piece in ran)
    total = fake.encoder_frames(len(heard))
    assert total <= frames_run < total + chunk.frames or frames_run == total == 0
    got = np.concatenate([np.zeros(0, np.float32), *(piece.audio[: piece.length] for piece in ran)])
    assert np.array_equal(got[1081:], heard[: max(len(got) - 1081, 0)])
    covered = 0
    for piece in ran:  # frame `covered` of what the slot hears stands where this chunk stands in the stream
        place = piece.origin + 1280 * covered
        first = int(piece.audio[: piece.length].max(initial=0)) - np.count_nonzero(piece.audio) + 1
        if covered and piece.audio.any():
            assert place - 1081 == first - 1
        covered += piece.chunk.frames
    assert gate.asked == [(edges[k], edges[k + 1]) for k in range(1, whole)] + ([(edges[-1], samples)] if whole else [])


@given(
    parts=st.lists(st.tuples(st.integers(0, 20_000), st.sampled_from([80, 160, 560])), min_size=1, max_size=5),
    size=st.integers(100, 9000),
)
@settings(max_examples=60, deadline=None)
def test_a_cut_stream_is_several_streams_with_one_clock(manifest, parts, size):
    stream, began, wanted = Stream(manifest, manifest.chunk(parts[0][1])), 0, []
    for number, (samples, ms) in enumerate(parts):
        audio = np.random.default_rng(number).standard_normal(samples).astype(np.float32)
        alone = Stream(manifest, manifest.chunk(ms))
        stream.use(manifest.chunk(ms))
        for at in range(0, samples, size):
            stream.accept(audio[at : at + size])
            alone.accept(audio[at : at + size])
        alone.end()
        part = [(piece.audio, piece.length, piece.reach + began, began) for piece in pieces(alone)]
        began += samples
        wanted.append((part, began))
        if number < len(parts) - 1:
            stream.cut()
    stream.end()
    stream.cut()  # changes nothing any more
    found = pieces(stream)
    for number, (part, end) in enumerate(wanted):
        for first, (audio, length, reach, origin) in zip([True] + [False] * len(part), part, strict=False):
            piece = found.pop(0)
            assert np.array_equal(piece.audio, audio)
            assert (piece.kind, piece.length, piece.reach, piece.origin) == ("run", length, reach, origin)
            assert piece.fresh == (first and number > 0)
        if number < len(parts) - 1:
            piece = found.pop(0)
            assert (piece.kind, piece.reach) == ("cut", end)
    assert not found


def test_a_cut_opens_the_gate(manifest):
    gate = Script(80, set())
    stream = Stream(manifest, manifest.chunk(80), gate)
    stream.accept(np.ones(5000, np.float32))
    stream.cut()
    stream.accept(np.ones(5000, np.float32))
    assert gate.began == [5000]
    assert [piece.kind for piece in pieces(stream)] == ["run", "skip", "skip", "skip", "cut", "run", "skip", "skip"]
