"""The guard against decoders that repeat themselves: the rule by hand, and streams over a backend with a loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import RepetitionGuard

FRAME = 1280


def resets(manifest, tokens, gaps=None, frames=7):
    """Counts of tokens at which the guard resets; a token each `gaps` frames, in steps of so many frames."""
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
def test_a_sequence_of_up_to_32_tokens_over_and_over_is_a_loop(manifest, cycle, frames):
    before = list(range(1000, 1050))
    found = resets(manifest, before + list(range(cycle)) * (600 // cycle + 1), frames=frames)
    # At the end of the second step that has 192 of them; then they are counted anew.
    assert found[0] in range(50 + 192, 50 + 192 + 2 * frames + 1)
    assert found[1] - found[0] in range(192, 192 + 2 * frames + 1)


def test_what_is_no_loop(manifest):
    assert resets(manifest, list(range(33)) * 20) == []  # a longer sequence
    assert resets(manifest, [0] * 191) == []
    assert resets(manifest, ([5, 6, 7] * 60 + [8]) * 4) == []  # something else now and then
    assert resets(manifest, [5, 6, 7] * 50, frames=1) == []  # a word said 50 times
    pauses = itertools.cycle([1] * 99 + [27])  # of more than 2 s
    assert resets(manifest, [5] * 1000, pauses) == []
    assert resets(manifest, [5] * 1000, itertools.cycle([1] * 99 + [24])) != []


def test_a_guard_goes_on_as_the_one_that_was_saved(manifest):
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
    """A fake whose slots repeat five tokens, one a frame, until their decoder is reset; then they go on as usual."""

    class Looping(fake.FakeBackend):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.cured = set()

        def reset(self, slots):
            super().reset(slots)
            self.cured -= set(slots.tolist())

        def reset_decoder(self, slots):
            super().reset_decoder(slots)
            assert not any(self.in_flight[slot] for slot in slots.tolist()), "reset beside a step under way"
            self.cured |= set(slots.tolist())

        def submit(self, batch):
            step = super().submit(batch)
            said = step.emissions
            tokens, frames = list(said.tokens), list(said.frames)
            for row, slot in enumerate(batch.slots.tolist()):
                if slot not in self.cured:
                    frames[row] = frames[row][:: fake.DIGITS]
                    tokens[row] = np.array(frames[row] % 5, np.int32)
            scores = tuple(np.zeros(len(row), np.float32) for row in tokens)
            step.emissions = type(said)(tuple(tokens), tuple(frames), scores, scores, said.failed)
            return step

    return Looping


@pytest.mark.parametrize("ms", [80, 560, 1120])
def test_a_looping_stream_is_reset_at_the_same_place_whatever_the_pushes(bundle, looping, ms):
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
