"""Detection of repetition loops: the rule on expected results, and streams on a backend that loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import RepetitionGuard

FRAME = 1280


def resets(manifest, tokens, gaps=None, frames=7):
    """Return the token counts at which the guard resets; tokens are `gaps` frames apart, steps have `frames` frames."""
    sample_positions = [
        FRAME * (sample_pos - 1)
        for sample_pos in itertools.accumulate(itertools.islice(gaps or itertools.repeat(1), len(tokens)))
    ]
    guard, found, count = RepetitionGuard(manifest), [], 0
    for end_sample in range(frames * FRAME, sample_positions[-1] + 1 + 50 * FRAME, frames * FRAME):
        while count < len(sample_positions) and sample_positions[count] < end_sample:
            count += 1
        if count and guard.step(tokens[:count], sample_positions[:count], end_sample):
            found.append(count)
    return found


@pytest.mark.parametrize("cycle", [1, 2, 3, 7, 31, 32])
@pytest.mark.parametrize("frames", [1, 7, 14])
def test_repeated_sequence_of_up_to_32_tokens_is_a_loop(manifest, cycle, frames):
    before = list(range(1000, 1050))
    found = resets(manifest, before + list(range(cycle)) * (600 // cycle + 1), frames=frames)
    # At the end of the second step with 192 of them; the count then restarts.
    assert found[0] in range(50 + 192, 50 + 192 + 2 * frames + 1)
    assert found[1] - found[0] in range(192, 192 + 2 * frames + 1)


def test_sequences_that_are_not_a_loop(manifest):
    assert resets(manifest, list(range(33)) * 20) == []  # a longer sequence
    assert resets(manifest, [0] * 191) == []
    assert resets(manifest, ([5, 6, 7] * 60 + [8]) * 4) == []  # interrupted by other tokens
    assert resets(manifest, [5, 6, 7] * 50, frames=1) == []  # a word repeated 50 times
    pauses = itertools.cycle([1] * 99 + [27])  # of more than 2 s
    assert resets(manifest, [5] * 1000, pauses) == []
    assert resets(manifest, [5] * 1000, itertools.cycle([1] * 99 + [24])) != []


def test_reset_is_after_the_second_step_with_192_tokens(manifest):
    """With a token in each step of one frame; the tokens before a reset are not counted again."""
    assert resets(manifest, [5] * 600, frames=1) == [193, 386, 579]
    assert resets(manifest, [0, 1, 2, 3, 4, 5, 6] * 86, frames=1) == [193, 386, 579]
    # The last 192 tokens decide: those before them may differ.
    assert resets(manifest, [8, 9, *[5] * 200], frames=1) == [195]


def test_pauses_of_two_seconds_do_not_interrupt_a_loop(manifest):
    """Between two tokens, and between the last token and the end of a step: 32,000 samples, and one more."""
    tokens = [5] * 192
    for pause, loop in ((32_000, True), (32_001, False)):
        for at in (1, 100, 191):  # the pause is before this token
            positions = [index + (pause - 1 if index >= at else 0) for index in range(192)]
            guard = RepetitionGuard(manifest)
            assert [guard.step(tokens, positions, positions[-1] + 1) for _ in range(2)] == [False, loop]
        guard = RepetitionGuard(manifest)
        assert [guard.step(tokens, list(range(192)), 191 + pause) for _ in range(2)] == [False, loop]


def test_loop_must_last_for_two_consecutive_steps(manifest):
    loop, other = [5] * 192, [5] * 191 + [6]
    positions = [FRAME * index for index in range(192)]
    guard, end_sample = RepetitionGuard(manifest), 192 * FRAME
    assert not guard.step(loop, positions, end_sample) and guard.loop_suspected
    assert not guard.step(other, positions, end_sample) and not guard.loop_suspected
    assert not guard.step(loop, positions, end_sample) and guard.loop_suspected
    assert guard.step(loop, positions, end_sample) and not guard.loop_suspected
    assert not guard.step(loop, positions, end_sample) and not guard.loop_suspected  # the tokens are not counted again


def test_every_saved_field_is_restored(manifest):
    tokens, positions = [5] * 400, [FRAME * index for index in range(400)]

    def resume(guard):
        restored = RepetitionGuard(manifest)
        restored.load(guard.save())
        assert restored.loop_suspected == guard.loop_suspected
        return restored

    guard = RepetitionGuard(manifest)
    guard.restart(100)
    guard = resume(guard)
    assert not guard.step(tokens[:291], positions[:291], 291 * FRAME) and not guard.loop_suspected
    assert not guard.step(tokens[:292], positions[:292], 292 * FRAME) and guard.loop_suspected
    guard = resume(guard)
    assert guard.step(tokens[:293], positions[:293], 293 * FRAME)
    # A reset for another reason starts the detection again.
    guard = RepetitionGuard(manifest)
    assert not guard.step(tokens[:192], positions[:192], 192 * FRAME) and guard.loop_suspected
    guard.restart(0)
    assert not guard.loop_suspected and not guard.step(tokens[:192], positions[:192], 192 * FRAME)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([-1, 0], "counter must be in"),
        ([1 << 53, 0], "counter must be in"),
        ([0, -1], "counter must be in"),
        ([7, 2], r"the repetition guard's counts are \[7, 2\]"),
        ([7], "shape"),
        ([7, 1, 0], "shape"),
    ],
)
def test_invalid_state_is_rejected(manifest, counts, message):
    with pytest.raises(ValueError, match=message):
        RepetitionGuard(manifest).load({"counts": np.array(counts, np.int64)})


def test_restored_guard_equals_the_saved_one(manifest):
    tokens, sample_positions = [4] * 400, [FRAME * i for i in range(400)]
    guards = [RepetitionGuard(manifest), RepetitionGuard(manifest)]
    for count in range(7, 400, 7):
        one, other = guards
        other.load(one.save())
        found = [guard.step(tokens[:count], sample_positions[:count], FRAME * count) for guard in guards]
        assert found[0] == found[1] and one.loop_suspected == other.loop_suspected
    one.restart(396)
    assert not one.step(tokens, sample_positions, FRAME * 400)


@pytest.fixture(scope="module")
def looping(fake):
    """A fake whose slots repeat five tokens, one per frame, until their decoder is reset."""

    class Looping(fake.FakeBackend):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.recovered = set()

        def reset(self, slots):
            super().reset(slots)
            self.recovered -= set(slots.tolist())

        def reset_decoder(self, slots):
            super().reset_decoder(slots)
            assert not any(self.in_flight[slot] for slot in slots.tolist()), "reset during a step"
            self.recovered |= set(slots.tolist())

        def submit(self, batch):
            step = super().submit(batch)
            emissions = step.emissions
            tokens, frames = list(emissions.tokens), list(emissions.frames)
            for row, slot in enumerate(batch.slots.tolist()):
                if slot not in self.recovered:
                    frames[row] = frames[row][:: fake.DIGITS]
                    tokens[row] = np.array(frames[row] % 5, np.int32)
            scores = tuple(np.zeros(len(row), np.float32) for row in tokens)
            step.emissions = emissions.of_rows(tokens, frames, scores, scores, emissions.failed)
            return step

    return Looping


@pytest.mark.parametrize("ms", [80, 560, 1120])
def test_reset_position_does_not_depend_on_the_pushes(bundle, looping, ms):
    audio = np.random.default_rng(0).standard_normal(25 * 16000).astype(np.float32) * 0.1
    found = []
    for overlap, size in ((False, len(audio)), (True, len(audio)), (True, 1000), (False, 1280)):
        backend = looping(bundle.manifest, 2, 2)
        backend.asynchronous = overlap
        with Model(bundle, backend) as model, model.stream(chunk_ms=ms) as stream:
            for at in range(0, len(audio), size):
                stream.push(audio[at : at + size])
            result = stream.finish()
        found.append((backend.decoder_resets, [token.id for token in result.tokens]))
    assert found[1:] == found[:1] * 3
    ((_, frame),) = found[0][0]
    assert 192 < frame <= 192 + 2 * (ms // 80)
    tokens = found[0][1]
    assert tokens[:frame] == [i % 5 for i in range(frame)] and tokens[frame : frame + 5] != [0, 1, 2, 3, 4]
