"""The chunker: chunks, filters and forced ends of utterances against their definitions."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemostream.bundle import LanguageConfig
from nemostream.errors import StreamError
from nemostream.runtime.streaming.chunker import Chunker

LENGTHS = [0, 1, 159, 160, 198, 199, 200, 1279, 1280, 1478, 1479, 7878, 7879, 7880, 16839, 16840, 50_000]


def drain(chunker: Chunker) -> list[tuple[np.ndarray, int]]:
    return [(item.audio, item.length) for item in chunker.take()]


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
    assert len(chunker.take()) == 0
    chunker.accept(np.ones(1, np.float32))
    assert len(chunker.take()) == 1


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
    assert len(chunker.take()) == 1
    with pytest.raises(StreamError, match="was finished; open a new one"):
        chunker.accept(np.ones(1, np.float32))


@given(changes=st.lists(st.tuples(st.integers(0, 9000), st.sampled_from([80, 160, 560, 1120])), max_size=12))
@settings(max_examples=60, deadline=None)
def test_changes_of_the_chunk_size_lose_no_audio(manifest, fake, changes):
    chunker, samples = Chunker(manifest, manifest.chunk(160)), 0
    audio = np.arange(1, 1 + sum(length for length, _ in changes), dtype=np.float32)
    for length, ms in changes:
        chunker.accept(audio[samples : samples + length])
        samples += length
        chunker.set_chunk(manifest.chunk(ms))
    chunker.finish()
    items = chunker.take()
    sizes = [item.chunk for item in items]
    chunks = [(item.audio, item.length) for item in items]
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
    assert [item.chunk.ms for item in chunker.take()] == [80]
    chunker.accept(np.ones(1000, np.float32))
    chunker.set_chunk(manifest.chunk(560))
    chunker.accept(np.ones(280, np.float32))
    assert not chunker.take()
    chunker.accept(np.ones(8960 - 1280, np.float32))
    assert [item.chunk.ms for item in chunker.take()] == [560]


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
    return chunker.take()


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


@pytest.mark.parametrize("end", ["finish", "end_utterance"])
def test_digital_silence_is_skipped_in_whole_chunks_and_its_rest_at_the_end(manifest, end):
    chunker, found = Chunker(manifest, manifest.chunk(560)), []
    chunker.prompt = 3
    chunker.accept(np.ones(5000, np.float32))
    for samples in (1, 1400, 8958, 1, 17_921):  # the recording's five frames end at sample 6400
        chunker.skip_silence(samples)
        found.append([(item.kind, item.end_sample, item.chunk.ms, item.prompt) for item in items(chunker)])
    assert found == [[("run", 6400, 560, 3)], [], [], [("skip", 15_360, 560, 3)], [("skip", 33_280, 560, 3)]]
    assert (chunker.samples, chunker.end_sample) == (33_281, 33_280)
    getattr(chunker, end)()
    last = [("end_of_utterance", 33_281)] if end == "end_utterance" else []
    assert [(item.kind, item.end_sample) for item in items(chunker)] == [("skip", 33_281), *last]
    if end == "finish":
        with pytest.raises(StreamError, match="was finished"):
            chunker.skip_silence(1)
        return
    chunker.accept(np.ones(5000, np.float32))
    chunker.finish()
    (item,) = items(chunker)
    assert (item.kind, item.origin_sample, item.end_sample, item.reset_slot) == ("run", 33_281, 39_681, True)


# -- saved states ------------------------------------------------------------------------------------------------------


class PassesFrom:
    """A filter that passes chunks that begin at a multiple of `every` samples or later, up to `length` after it."""

    lead_ms = 400

    def __init__(self, every: int, length: int) -> None:
        self.every, self.length = every, length

    def passes(self, begin: int, end: int) -> bool:
        return begin % self.every < self.length

    def restart(self, at: int) -> None: ...


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("accept"), st.integers(0, 9000)),
        st.tuples(st.just("set_chunk"), st.sampled_from([80, 160, 560, 1120])),
        st.tuples(st.just("skip_silence"), st.integers(1, 9000)),
        st.tuples(st.just("end_utterance"), st.just(0)),
        st.tuples(st.just("set_prompt"), st.sampled_from([0, 3])),
    ),
    max_size=12,
)


def apply(manifest, chunker: Chunker, operations: list, seed: int) -> list:
    for number, (name, value) in enumerate(operations):
        if name == "accept":
            chunker.accept(np.random.default_rng(seed + number).standard_normal(value).astype(np.float32))
        elif name == "set_chunk":
            chunker.set_chunk(manifest.chunk(value))
        elif name == "set_prompt":
            chunker.prompt = value
        else:
            getattr(chunker, name)(*([value] if name == "skip_silence" else []))
    return [item._replace(audio=item.audio.tolist(), block=None) for item in items(chunker)]


@given(
    before=OPERATIONS,
    after=OPERATIONS,
    ms=st.sampled_from([80, 560]),
    chunk_filter=st.sampled_from([None, PassesFrom(30_000, 6000), PassesFrom(20_000, 12_000)]),
)
# The last frame of a recording can end 2240 samples after its audio.
@example(before=[("accept", 4160), ("skip_silence", 1)], after=[("accept", 9000)], ms=80, chunk_filter=None)
@settings(max_examples=150, deadline=None)
def test_a_restored_chunker_continues_like_the_saved_one(manifest, before, after, ms, chunk_filter):
    languages = LanguageConfig("de-DE", {"en-US": 0, "de-DE": 3}, 4)
    manifest = dataclasses.replace(manifest, languages=languages)
    chunker, restored = (Chunker(manifest, manifest.chunk(ms), chunk_filter) for _ in range(2))
    apply(manifest, chunker, before, 0)
    state = chunker.save()
    kept = {name: array.copy() for name, array in state.items()}
    restored.load(state)
    assert (restored.samples, restored.end_sample, restored.chunk) == (
        chunker.samples,
        chunker.end_sample,
        chunker.chunk,
    )
    assert {name: array.tolist() for name, array in restored.save().items()} == {
        name: array.tolist() for name, array in kept.items()
    }
    for operations, seed in ((after, 100), ([("finish", 0)], 0)):
        assert apply(manifest, restored, operations, seed) == apply(manifest, chunker, operations, seed)
    assert all(np.array_equal(state[name], array) for name, array in kept.items())  # the state is a copy


def counters(samples, begin, end, run, skipped, length, chunk_begin):
    return {
        "counts": np.array([samples, begin, end, run, skipped, length, chunk_begin], np.int64),
        "filling": np.zeros(length, np.float32),
    }


# Each state violates one condition only. The chunk size is 560 ms (8960 samples), the lead has 1081 samples.
CONTRADICTIONS = {
    "more audio than the chunk being filled has": counters(20_000, 0, 8960, 7, 0, 12_121, 7879),
    "as much audio as the chunk being filled has": counters(16_839, 0, 8960, 7, 0, 8960, 7879),
    "a recording that begins after the last sample": counters(100, 1181, 1181, 0, 0, 0, 1181),
    "less audio than chunks": counters(20_000, 1, 17_921, 14, 0, 3161, 16_839),
    "another end": counters(20_000, 0, 17_919, 14, 0, 3161, 16_839),
    "another begin of the chunk being filled": counters(20_000, 0, 17_920, 14, 0, 3161, 16_838),
    "a first chunk without the lead": counters(5500, 5000, 5000, 0, 0, 1581, 3919),
    "a second chunk with the lead": counters(20_000, 0, 17_920, 14, 0, 3161, 17_920),
}
CONSISTENT = {
    "two chunks": counters(20_000, 0, 17_920, 14, 0, 3161, 16_839),
    "the first chunk": counters(5500, 5000, 5000, 0, 0, 1581, 5000),
    "skipped audio": counters(20_000, 0, 17_920, 7, 8960, 3161, 16_839),
    "a later recording": counters(25_000, 5000, 22_920, 14, 0, 3161, 21_839),
}


@pytest.mark.parametrize("name", CONTRADICTIONS | CONSISTENT)
def test_counters_that_contradict_each_other_are_rejected(manifest, name):
    chunker = Chunker(manifest, manifest.chunk(560))
    state = {**chunker.save(), **(CONTRADICTIONS | CONSISTENT)[name]}
    if name in CONSISTENT:
        chunker.load(state)
        return
    with pytest.raises(ValueError, match="counters contradict each other"):
        chunker.load(state)
    fresh = Chunker(manifest, manifest.chunk(560))
    assert apply(manifest, chunker, [("accept", 20_000)], 1) == apply(manifest, fresh, [("accept", 20_000)], 1)


def test_counters_within_silence_that_contradict_each_other_are_rejected(manifest):
    chunker = Chunker(manifest, manifest.chunk(560))
    chunker.accept(np.ones(5000, np.float32))
    chunker.skip_silence(10_000)
    items(chunker)
    state = chunker.save()
    samples, begin, *_, chunk_begin = state["counts"].tolist()
    assert (samples, begin, chunk_begin) == (15_000, 0, 15_000)
    for index, accepted, rejected in ((1, chunk_begin, chunk_begin + 1), (6, samples, samples + 1)):
        for value in (accepted, rejected):
            counts = state["counts"].copy()
            counts[index] = value
            restored = Chunker(manifest, manifest.chunk(560))
            if value == accepted:
                restored.load({**state, "counts": counts})
                continue
            with pytest.raises(ValueError, match="counters contradict each other"):
                restored.load({**state, "counts": counts})
    held = {"sizes": np.array([560, 560, 560]), "prompts": np.zeros(2, np.int64), "held": np.zeros(8960, np.float32)}
    counts = state["counts"].copy()
    counts[5] = 1
    for change in (held, {"counts": counts, "filling": np.zeros(1, np.float32)}):
        with pytest.raises(ValueError, match="counters contradict each other"):
            Chunker(manifest, manifest.chunk(560)).load({**state, **change})
    for value, valid in ((samples + 2 * 1280, True), (samples + 2 * 1280 + 1, False)):
        counts = state["counts"].copy()
        counts[2] = value
        restored = Chunker(manifest, manifest.chunk(560))
        if valid:
            restored.load({**state, "counts": counts})
            continue
        with pytest.raises(ValueError, match="counters contradict each other"):
            restored.load({**state, "counts": counts})


# -- memory ------------------------------------------------------------------------------------------------------------


def without_memory(item) -> tuple:
    """Return an item as a step sees it: its audio multiplied by its scale, and everything but the memory."""
    audio = item.audio * np.float32(item.scale)
    assert audio.dtype == np.float32
    return item._replace(audio=audio.tobytes(), scale=1.0, block=None)


PARTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["int16", "float"]), st.integers(0, 9000)),
        st.tuples(st.just("set_chunk"), st.sampled_from([80, 160, 560, 1120])),
        st.tuples(st.just("skip_silence"), st.integers(1, 9000)),
        st.tuples(st.just("end_utterance"), st.just(0)),
    ),
    max_size=16,
)


@given(parts=PARTS, ms=st.sampled_from([80, 560]), chunk_filter=st.sampled_from([None, PassesFrom(30_000, 6000)]))
@settings(max_examples=150, deadline=None)
def test_int16_audio_gives_the_same_items_as_float_audio(manifest, parts, ms, chunk_filter):
    """Also if both alternate within a chunk, bit for bit."""
    mixed, floats = (Chunker(manifest, manifest.chunk(ms), chunk_filter) for _ in range(2))
    for number, (name, value) in enumerate(parts):
        rng = np.random.default_rng(number)
        if name == "int16":
            audio = rng.integers(-32768, 32768, value).astype(np.int16)
            mixed.accept(audio)
            floats.accept((audio / 32768).astype(np.float32))
        elif name == "float":
            audio = rng.uniform(-1, 1, value).astype(np.float32) * np.float32(2.0) ** rng.integers(-30, 1)
            mixed.accept(audio)
            floats.accept(audio)
        else:
            for chunker in (mixed, floats):
                if name == "set_chunk":
                    chunker.set_chunk(manifest.chunk(value))
                else:
                    getattr(chunker, name)(*([value] if name == "skip_silence" else []))
    states = [{name: array.tolist() for name, array in chunker.save().items()} for chunker in (mixed, floats)]
    assert states[0] == states[1]
    for chunker in (mixed, floats):
        chunker.finish()
    assert [without_memory(item) for item in mixed.take()] == [without_memory(item) for item in floats.take()]


class Consumer:
    """Takes items as the scheduler does: some time after they are complete, in order; recycles blocks later still."""

    def __init__(self, chunker: Chunker) -> None:
        self.chunker, self.waiting, self.recyclable = chunker, [], []
        # For each recording, the audio of its items that are run, when they are in batches
        self.received: list[list[np.ndarray]] = []
        self.memory: list[int] = []  # address of the audio of each item

    def take(self) -> None:
        self.waiting += self.chunker.take()

    def batch(self, count: int) -> None:
        for item in self.waiting[:count]:
            if item.kind == "run":
                assert not item.audio[item.length :].any()
                if item.reset_slot or not self.received:
                    self.received.append([])
                self.received[-1].append(item.audio[: item.length] * np.float32(item.scale))
                self.memory.append(item.audio.ctypes.data)
            if item.block is not None:
                self.recyclable.append(item.block)
        del self.waiting[:count]

    def recycle(self, count: int) -> None:
        for block in self.recyclable[:count]:
            self.chunker.recycle(block)
        del self.recyclable[:count]


CONSUMPTION = st.lists(
    st.one_of(
        st.tuples(st.just("float"), st.integers(0, 6000)),
        st.tuples(st.just("int16"), st.integers(0, 6000)),
        st.tuples(st.just("take"), st.just(0)),
        st.tuples(st.just("batch"), st.integers(1, 9)),
        st.tuples(st.just("recycle"), st.integers(1, 3)),
        st.tuples(st.just("set_chunk"), st.sampled_from([80, 160, 560, 1120])),
        st.tuples(st.just("end_utterance"), st.just(0)),
    ),
    max_size=60,
)


@given(operations=CONSUMPTION, ms=st.sampled_from([80, 160, 560]))
@settings(max_examples=200, deadline=None)
def test_recycled_memory_is_not_used_before_its_items_are_in_batches(manifest, fake, operations, ms):
    chunker = Chunker(manifest, manifest.chunk(ms))
    consumer, recordings = Consumer(chunker), [[]]
    for number, (name, value) in enumerate(operations):
        rng = np.random.default_rng(number)
        if name == "float":
            recordings[-1].append(rng.uniform(-1, 1, value).astype(np.float32))
            chunker.accept(recordings[-1][-1])
        elif name == "int16":
            audio = rng.integers(-32768, 32768, value).astype(np.int16)
            recordings[-1].append((audio / 32768).astype(np.float32))
            chunker.accept(audio)
        elif name == "set_chunk":
            chunker.set_chunk(manifest.chunk(value))
        elif name == "end_utterance":
            chunker.end_utterance()
            recordings.append([])
        elif name == "take":
            consumer.take()
        else:
            getattr(consumer, name)(value)
    chunker.finish()
    consumer.take()
    consumer.batch(len(consumer.waiting))
    wholes = [np.concatenate([np.zeros(1081, np.float32), *parts]) for parts in recordings]
    wholes = [whole for whole in wholes if fake.encoder_frames(len(whole) - 1081)]  # shorter ones have no items
    assert len(consumer.received) == len(wholes)
    for received, whole in zip(consumer.received, wholes, strict=True):
        audio, frames = np.concatenate(received), fake.encoder_frames(len(whole) - 1081)
        assert len(audio) >= min(1280 * frames, len(whole)) and np.array_equal(audio, whole[: len(audio)])


def test_a_stream_whose_blocks_are_recycled_needs_no_new_memory(manifest):
    for ms in (80, 160, 560, 1120):
        chunker = Chunker(manifest, manifest.chunk(ms))
        consumer = Consumer(chunker)
        for number in range(400):
            chunker.accept(np.full(manifest.chunk(ms).samples, number, np.float32))
            consumer.take()
            consumer.batch(1)
            consumer.recycle(1)
        assert len(consumer.memory) == 400
        # One block is filled while another one is in a batch.
        assert len(set(consumer.memory)) <= 2 * len(chunker._block.chunks), ms


# -- changes of the chunk size by another thread -----------------------------------------------------------------------


class Switching(Chunker):
    """A chunker whose chunk size another thread may have changed at every read of it."""

    __slots__ = ("choices", "sizes")

    def __init__(self, manifest, sizes: list[int], choices: np.random.Generator) -> None:
        self.sizes, self.choices = [manifest.chunk(ms) for ms in sizes], choices
        super().__init__(manifest, self.sizes[0])

    @property
    def chunk(self):
        return self.sizes[self.choices.integers(len(self.sizes))]

    @chunk.setter
    def chunk(self, chunk) -> None: ...


@given(
    sizes=st.lists(st.sampled_from([80, 160, 560, 1120]), min_size=2, max_size=4),
    pushes=st.lists(st.tuples(st.sampled_from(["accept", "accept", "skip_silence"]), st.integers(0, 9000)), max_size=9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_a_chunk_size_that_changes_at_any_time_loses_no_audio(manifest, fake, sizes, pushes, seed):
    chunker = Switching(manifest, sizes, np.random.default_rng(seed))
    recordings, silent, at = [[0, np.zeros(0, np.float32)]], False, 0
    for name, samples in pushes:
        if name == "skip_silence":
            chunker.skip_silence(samples)
            silent = True
            assert chunker.end_sample <= chunker.samples + 2 * 1280  # its last frame may end after its audio
        else:
            audio = np.arange(at + 1, at + samples + 1, dtype=np.float32)
            chunker.accept(audio)
            if silent and samples:
                recordings.append([at, np.zeros(0, np.float32)])
                silent = False
            recordings[-1][1] = np.concatenate([recordings[-1][1], audio])
        at += samples
        assert chunker.samples == at
    chunker.finish()
    found = items(chunker)
    for begin, audio in recordings:
        frames, ran = fake.encoder_frames(len(audio)), []
        while frames and found and (found[0].kind != "run" or not found[0].reset_slot or not ran):
            item = found.pop(0)
            if item.kind == "run":
                assert item.origin_sample == begin and len(item.audio) == item.chunk.samples
                ran.append(item)
        whole = np.concatenate([np.zeros(1081, np.float32), audio])
        received = np.concatenate([np.zeros(0, np.float32), *(item.audio[: item.length] for item in ran)])
        assert np.array_equal(received, whole[: len(received)])
        covered = sum(item.chunk.frames for item in ran)
        assert covered >= frames and (not ran or covered - ran[-1].chunk.frames < frames)
    assert all(item.kind == "skip" for item in found)
