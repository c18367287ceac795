"""The chunker: chunks, filters and forced ends of utterances against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import StreamError
from nemostream.runtime.streaming.chunker import Chunker

LENGTHS = [0, 1, 159, 160, 198, 199, 200, 1279, 1280, 1478, 1479, 7878, 7879, 7880, 16839, 16840, 50_000]


def drain(chunker: Chunker) -> list[tuple[np.ndarray, int]]:
    return [(item.audio, item.length) for item in (chunker.take() for _ in range(chunker.queued))]


@pytest.mark.parametrize("ms", [80, 160, 560, 1120])
@pytest.mark.parametrize("samples", LENGTHS)
def test_chunks_contain_the_lead_and_every_sample_that_a_frame_needs(manifest, fake, ms, samples):
    chunk = manifest.chunk(ms)
    audio = np.arange(1, samples + 1, dtype=np.float32)
    chunker = Chunker(manifest, chunk)
    chunker.accept(audio)
    chunker.finish()
    chunks = drain(chunker)
    frames = fake.encoder_frames(samples)
    assert len(chunks) == -(-frames // chunk.frames)
    received = np.concatenate([np.zeros(0, np.float32), *(row[:length] for row, length in chunks)])
    whole = np.concatenate([np.zeros(1081, np.float32), audio])
    assert np.array_equal(received, whole[: len(chunks) * chunk.samples])
    assert all(length == chunk.samples for _, length in chunks[:-1])
    assert not any(row[length:].any() for row, length in chunks)


@given(
    samples=st.integers(0, 40_000),
    frames=st.sampled_from([1, 2, 7, 14]),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=9),
)
@settings(max_examples=40, deadline=None)
def test_chunks_do_not_depend_on_the_size_of_pushes(manifest, samples, frames, sizes):
    audio = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    whole, cut = (Chunker(manifest, manifest.chunk(80 * frames)) for _ in range(2))
    whole.accept(audio)
    at = 0
    for size in itertools.cycle(sizes):
        if at >= samples:
            break
        cut.accept(audio[at : at + size])
        at += size
    for chunker in (whole, cut):
        chunker.finish()
        assert chunker.samples == samples
    one, other = drain(whole), drain(cut)
    assert [length for _, length in one] == [length for _, length in other]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


@given(samples=st.integers(0, 10**7))
def test_encoder_frames_equal_counted_convolution_windows(manifest, fake, samples):
    assert manifest.encoder_frames(samples) == fake.encoder_frames(samples)


def test_a_chunk_is_queued_at_its_last_sample(manifest):
    chunker = Chunker(manifest, manifest.chunk(80))
    chunker.accept(np.ones(198, np.float32))
    assert chunker.queued == 0
    chunker.accept(np.ones(1, np.float32))
    assert chunker.queued == 1


def test_the_callers_array_can_be_reused_after_accept(manifest):
    chunker = Chunker(manifest, manifest.chunk(560))
    audio = np.ones(1000, np.float32)
    chunker.accept(audio)
    audio[:] = 7
    chunker.finish()
    (row, length), *_ = drain(chunker)
    assert set(row[1081:length]) == {1.0}


def test_audio_after_finish_is_rejected_and_a_second_finish_has_no_effect(manifest):
    chunker = Chunker(manifest, manifest.chunk(560))
    chunker.accept(np.ones(5000, np.float32))
    chunker.finish()
    chunker.finish()
    assert chunker.queued == 1
    with pytest.raises(StreamError, match="was finished; open a new one"):
        chunker.accept(np.ones(1, np.float32))


@given(changes=st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([80, 160, 560, 1120])), max_size=12))
@settings(max_examples=60, deadline=None)
def test_changes_of_the_chunk_size_lose_no_audio(manifest, fake, changes):
    chunker, samples, sizes = Chunker(manifest, manifest.chunk(160)), 0, []
    audio = np.arange(1, 1 + sum(length for length, _ in changes), dtype=np.float32)
    for length, ms in changes:
        chunker.accept(audio[samples : samples + length])
        samples += length
        chunker.set_chunk(manifest.chunk(ms))
    chunker.finish()
    chunks = []
    while chunker.queued:
        item = chunker.take()
        sizes.append(item.chunk)
        chunks.append((item.audio, item.length))
    covered, frames = sum(size.frames for size in sizes), fake.encoder_frames(samples)
    assert covered >= frames and (not sizes or covered - sizes[-1].frames < frames)
    assert [len(row) for row, _ in chunks] == [size.samples for size in sizes]
    received = np.concatenate([np.zeros(0, np.float32), *(row[:length] for row, length in chunks)])
    whole = np.concatenate([np.zeros(1081, np.float32), audio])
    assert np.array_equal(received, whole[: sum(size.samples for size in sizes)])


def test_a_new_chunk_size_applies_to_the_chunk_being_filled(manifest):
    chunker = Chunker(manifest, manifest.chunk(560))
    chunker.accept(np.ones(100, np.float32))
    chunker.set_chunk(manifest.chunk(80))
    chunker.accept(np.ones(99, np.float32))
    assert chunker.queued == 1 and chunker.head.chunk.ms == 80
    chunker.accept(np.ones(1000, np.float32))
    chunker.set_chunk(manifest.chunk(560))
    chunker.accept(np.ones(280, np.float32))
    assert chunker.queued == 1


# -- filters and forced ends of utterances -----------------------------------------------------------------------------


class ScriptedFilter:
    """A filter that passes the chunks with the given numbers, counted from 1, and records its calls."""

    def __init__(self, lead_ms: int, passing: set[int]) -> None:
        self.lead_ms, self.passing, self.calls, self.restarts = lead_ms, passing, [], []

    def passes(self, begin: int, end: int) -> bool:
        self.calls.append((begin, end))
        return len(self.calls) in self.passing

    def restart(self, at: int) -> None:
        self.restarts.append(at)


def items(chunker: Chunker) -> list:
    return [chunker.take() for _ in range(chunker.queued)]


@given(
    passing=st.sets(st.integers(1, 40)),
    samples=st.integers(0, 60_000),
    frames=st.sampled_from([1, 2, 7]),
    lead=st.sampled_from([1, 80, 400, 1200]),
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_a_filter_skips_whole_chunks_and_keeps_their_time(manifest, fake, passing, samples, frames, lead, sizes):
    """The first chunk, the chunks that pass and the lead before them are run as one recording.

    `origin_sample` gives the position of each of them in the stream.
    """
    chunk, chunk_filter = manifest.chunk(80 * frames), ScriptedFilter(lead, passing)
    chunker, at = Chunker(manifest, chunk, chunk_filter), 0
    audio = np.arange(1, samples + 1, dtype=np.float32)
    for size in itertools.cycle(sizes):
        if at >= samples:
            break
        chunker.accept(audio[at : at + size])
        at += size
    chunker.finish()
    found = items(chunker)
    # Computed from the definition: the stream's chunks, the first with the lead silence in it.
    whole = (samples + 1081) // chunk.samples
    edges = [max(k * chunk.samples - 1081, 0) for k in range(whole + 1)]
    passed = [k == 0 or k in passing for k in range(whole)]
    rest = whole == 0 or whole in passing  # whether the rest, an incomplete chunk, passes
    before = max(1, -(-lead // chunk.ms))
    run = [passed[k] or any(passed[k + 1 : k + 1 + before]) or (rest and k + before >= whole) for k in range(whole)]
    assert [item.kind for item in found[:whole]] == ["run" if ran else "skip" for ran in run]
    assert [item.end_sample for item in found[:whole]] == [(k + 1) * chunk.samples for k in range(whole)]
    received = [audio[edges[k] : edges[k + 1]] for k in range(whole) if run[k]]
    received = np.concatenate([np.zeros(0, np.float32), *received, *([audio[edges[-1] :]] if rest else [])])
    ran = [item for item in found if item.kind == "run"]
    frames_run = sum(item.chunk.frames for item in ran)
    total = fake.encoder_frames(len(received))
    assert total <= frames_run < total + chunk.frames or frames_run == total == 0
    got = np.concatenate([np.zeros(0, np.float32), *(item.audio[: item.length] for item in ran)])
    assert np.array_equal(got[1081:], received[: max(len(got) - 1081, 0)])
    covered = 0
    for item in ran:  # frame `covered` of the slot begins where this chunk begins in the stream
        sample_pos = item.origin_sample + 1280 * covered
        first = int(item.audio[: item.length].max(initial=0)) - np.count_nonzero(item.audio) + 1
        if covered and item.audio.any():
            assert sample_pos - 1081 == first - 1
        covered += item.chunk.frames
    assert chunk_filter.calls == [(edges[k], edges[k + 1]) for k in range(1, whole)] + (
        [(edges[-1], samples)] if whole else []
    )


@given(
    parts=st.lists(st.tuples(st.integers(0, 20_000), st.sampled_from([80, 160, 560])), min_size=1, max_size=5),
    size=st.integers(100, 9000),
)
@settings(max_examples=60, deadline=None)
def test_forced_ends_of_utterances_make_several_streams_with_one_clock(manifest, parts, size):
    chunker, begin, wanted = Chunker(manifest, manifest.chunk(parts[0][1])), 0, []
    for number, (samples, ms) in enumerate(parts):
        audio = np.random.default_rng(number).standard_normal(samples).astype(np.float32)
        alone = Chunker(manifest, manifest.chunk(ms))
        chunker.set_chunk(manifest.chunk(ms))
        for at in range(0, samples, size):
            chunker.accept(audio[at : at + size])
            alone.accept(audio[at : at + size])
        alone.finish()
        part = [(item.audio, item.length, item.end_sample + begin, begin) for item in items(alone)]
        begin += samples
        wanted.append((part, begin))
        if number < len(parts) - 1:
            chunker.end_utterance()
    chunker.finish()
    chunker.end_utterance()  # has no effect after `finish`
    found = items(chunker)
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
            assert item.reset_slot == (first and number > 0)
        if number < len(parts) - 1:
            item = found.pop(0)
            assert (item.kind, item.end_sample) == ("end_of_utterance", end)
    assert not found


def test_a_forced_end_restarts_the_filter(manifest):
    chunk_filter = ScriptedFilter(80, set())
    chunker = Chunker(manifest, manifest.chunk(80), chunk_filter)
    chunker.accept(np.ones(5000, np.float32))
    chunker.end_utterance()
    chunker.accept(np.ones(5000, np.float32))
    assert chunk_filter.restarts == [5000]
    assert [item.kind for item in items(chunker)] == [
        "run",
        "skip",
        "skip",
        "skip",
        "end_of_utterance",
        "run",
        "skip",
        "skip",
    ]
