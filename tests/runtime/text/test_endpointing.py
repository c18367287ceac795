"""Ends of utterances, compared with the rule frame by frame, with NeMo's code, and with expected results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import OptionError
from nemostream.runtime.text.endpointing import NEVER, Endpoint, Endpointer, UtteranceEnd

FRAME = 1280
WORD_STARTS = (True, False, False, False, False)  # token 0 starts a word, token 1 continues it
EOU, EOB, LANGUAGE = 2, 3, 4


def make_pointer(manifest, rule: Endpoint) -> Endpointer:
    return Endpointer(
        rule, manifest, WORD_STARTS, invisible={EOU, EOB, LANGUAGE}, end_of_utterance=EOU, backchannel=EOB
    )


def run(manifest, rule: Endpoint, tokens: dict[int, list[int]], frames: int, steps: list[int], resets=None):
    """Return the ends as (tokens, frame, reason), for steps of these numbers of frames.

    Appends the frames after which the decoder must be reset to `resets`.
    """
    pointer, ends, at, step, count = make_pointer(manifest, rule), [], 0, 0, 0
    while at < frames:
        upto = min(at + steps[step % len(steps)], frames)
        new = [(token, frame * FRAME) for frame in range(at, upto) for token in tokens.get(frame, [])]
        found = pointer.step([token for token, _ in new], [sample_pos for _, sample_pos in new], upto * FRAME)
        if step % 3 == 2:  # saved and loaded
            state, pointer_before = pointer.save(), pointer
            pointer = make_pointer(manifest, rule)
            pointer.load(state)
            assert pointer.between_utterances == pointer_before.between_utterances
        else:
            pointer_before = pointer
        # Where the decoder may be reset: after an end or a mark without text after it in the step.
        places = [end.token_count for end in found]
        places += [count + i + 1 for i, (token, _) in enumerate(new) if rule.model and token in (EOU, EOB)]
        text = [count + i for i, (token, _) in enumerate(new) if token < EOU]
        due = rule.decoder == "reset" and bool(places) and (not text or max(places) > text[-1])
        assert pointer_before.reset_due == due
        if due and resets is not None:
            resets.append(upto)
        ends += found
        count += len(new)
        at, step = upto, step + 1
    return [(end.token_count, end.end_sample / FRAME, end.reason) for end in ends]


def reference(rule: Endpoint, tokens: dict[int, list[int]], frames: int):
    """The rules, frame by frame."""
    ends, first, blanks, count = [], None, 0, 0
    for frame in range(frames):
        blanks += 1
        for token in tokens.get(frame, []):
            if first is None and token >= EOU:  # a tag does not start an utterance
                count += 1
                continue
            long = (
                first is not None
                and rule.max_utterance_ms is not None
                and 80 * (frame - first) >= rule.max_utterance_ms
            )
            if long and token == 0:
                ends.append((count, frame, "length"))
                first = None
            first, blanks, count = frame if first is None else first, 0, count + 1
            if token == EOU and rule.model:
                ends.append((count, frame + 1, "model"))
                first = None
        if first is None:
            continue
        if rule.silence_ms is not None and blanks * 80 > -(-rule.silence_ms // 80) * 80:
            ends.append((count, frame + 1, "silence"))
            first = None
        elif rule.max_utterance_ms is not None and blanks >= 5 and 80 * (frame + 1 - first) >= rule.max_utterance_ms:
            ends.append((count, frame + 1, "length"))
            first = None
    return ends


TOKENS = st.dictionaries(st.integers(0, 120), st.lists(st.integers(0, 1), min_size=1, max_size=3), max_size=40)
TAGGED_TOKENS = st.dictionaries(
    st.integers(0, 120),
    st.lists(st.sampled_from([0, 1, 0, 1, EOU, EOB, LANGUAGE]), min_size=1, max_size=4),
    max_size=40,
)
RULES = st.builds(
    Endpoint,
    model=st.booleans(),
    decoder=st.sampled_from(["keep", "reset"]),
    silence_ms=st.one_of(st.none(), st.integers(80, 2000)),
    max_utterance_ms=st.one_of(st.none(), st.integers(13, 40).map(lambda frames: 80 * frames)),
)


@given(
    rule=RULES,
    tokens=st.one_of(TOKENS, TAGGED_TOKENS),
    frames=st.integers(1, 150),
    steps=st.lists(st.integers(1, 14), min_size=1, max_size=5),
)
@settings(max_examples=400, deadline=None)
def test_ends_do_not_depend_on_the_steps(manifest, rule, tokens, frames, steps):
    assert run(manifest, rule, tokens, frames, steps) == reference(rule, tokens, frames)


def test_expected_ends(manifest):
    silence = Endpoint(silence_ms=800)
    # Ten silent frames are not more than 800 ms, eleven are.
    assert run(manifest, silence, {3: [0]}, 14, [7]) == []
    assert run(manifest, silence, {3: [0]}, 15, [7]) == [(1, 15, "silence")]
    assert run(manifest, silence, {3: [0], 14: [0]}, 20, [20]) == []
    assert run(manifest, silence, {3: [0], 15: [0]}, 20, [20]) == [(1, 15, "silence")]
    assert run(manifest, silence, {}, 100, [7]) == []  # no tokens: no utterance
    assert run(manifest, Endpoint(silence_ms=801), {3: [0]}, 15, [7]) == []
    assert run(manifest, Endpoint(silence_ms=None), {3: [0]}, 1000, [7]) == []
    # An utterance of the maximum length ends before the next word, or where the current word is complete.
    long = Endpoint(silence_ms=None, max_utterance_ms=1600)
    assert run(manifest, long, {0: [0], 18: [1], 20: [1], 22: [0]}, 27, [7]) == [(3, 22, "length")]
    assert run(manifest, long, {0: [0], 18: [1], 20: [1]}, 40, [7]) == [(3, 26, "length")]


def test_expected_ends_by_the_model(manifest):
    rule = Endpoint(silence_ms=None, decoder="reset")
    resets: list[int] = []
    assert run(manifest, rule, {3: [0], 5: [EOU], 9: [0, EOU]}, 20, [7], resets) == [
        (2, 6, "model"),
        (4, 10, "model"),
    ]
    assert resets == [7, 14]
    # Text of the next utterance in the same step: the decoder is not reset, as it has begun that utterance.
    resets = []
    assert run(manifest, rule, {3: [0, EOU, 0]}, 20, [7], resets) == [(2, 4, "model")] and resets == []
    # A backchannel does not end the utterance. NeMo resets the decoder there too.
    assert run(manifest, rule, {3: [0, EOB], 8: [0, EOU]}, 20, [7], resets) == [(4, 9, "model")] and resets == [7, 14]
    # Without text there is no utterance to end; an utterance that ended by silence is not ended again.
    assert run(manifest, rule, {3: [EOU], 9: [LANGUAGE, EOU]}, 20, [7]) == []
    assert run(manifest, Endpoint(), {3: [0], 15: [EOU], 17: [0], 18: [EOU]}, 20, [7]) == [
        (1, 15, "silence"),
        (4, 19, "model"),
    ]
    ignored = Endpoint(silence_ms=None, model=False, decoder="reset")
    resets = []
    assert run(manifest, ignored, {3: [0, EOU, EOB]}, 200, [7], resets) == [] and resets == []


@pytest.mark.parametrize(
    ("rate", "rule", "end_sample", "reason"),
    [
        # The frame of the token, the silence rounded up to frames of 80 ms, and one frame more: NeMo's rule.
        (16000, Endpoint(silence_ms=80), 3 * FRAME, "silence"),
        (16000, Endpoint(silence_ms=81), 4 * FRAME, "silence"),
        (16000, Endpoint(silence_ms=1040), 15 * FRAME, "silence"),
        (16000, Endpoint(silence_ms=1041), 16 * FRAME, "silence"),
        (16000, Endpoint(silence_ms=80_001), 1003 * FRAME, "silence"),
        # Frames of 160 ms.
        (8000, Endpoint(silence_ms=160), 3 * FRAME, "silence"),
        (8000, Endpoint(silence_ms=801), 8 * FRAME, "silence"),
        # The maximum length begins with the first token and is exact to the sample.
        (16000, Endpoint(silence_ms=None, max_utterance_ms=1000), 16_000, "length"),
        (16000, Endpoint(silence_ms=None, max_utterance_ms=1003), 16_048, "length"),
        (8000, Endpoint(silence_ms=None, max_utterance_ms=1003), 8_024, "length"),
        (44100, Endpoint(silence_ms=None, max_utterance_ms=1001), 44_144, "length"),
        # The earlier rule applies; at the same sample that is silence.
        (16000, Endpoint(silence_ms=1040, max_utterance_ms=1199), 19_184, "length"),
        (16000, Endpoint(silence_ms=1040, max_utterance_ms=1200), 15 * FRAME, "silence"),
        (16000, Endpoint(silence_ms=1040, max_utterance_ms=1201), 15 * FRAME, "silence"),
    ],
)
def test_limits_are_exact_to_the_sample(manifest, rate, rule, end_sample, reason):
    manifest = replace(manifest, features=replace(manifest.features, sample_rate=rate))
    for first in (0, 7 * FRAME):
        expected = UtteranceEnd(1, first + end_sample, reason)
        assert make_pointer(manifest, rule).step([0], [first], first + end_sample) == [expected]
        pointer = make_pointer(manifest, rule)
        assert pointer.step([0], [first], first + end_sample - 1) == []
        assert pointer.step([], [], first + end_sample) == [expected]
        assert pointer.step([], [], first + 10 * end_sample) == []  # only once


def test_utterance_of_the_maximum_length_ends_after_its_word(manifest):
    """A word is complete before a token that begins another one, or after five frames without a token."""
    rule = Endpoint(silence_ms=None, max_utterance_ms=1000)
    for token, position, expected in (
        (0, 16_000, UtteranceEnd(2, 16_000, "length")),
        (0, 15_999, None),
        (1, 16_000, None),
    ):
        pointer = make_pointer(manifest, rule)
        assert pointer.step([0, 1], [0, 10 * FRAME], 15_999) == []
        found = pointer.step([token], [position], position)
        assert found == ([] if expected is None else [expected])
        # The token belongs to the next utterance if one has ended.
        last = position + (16_000 if expected else 6 * FRAME)
        assert pointer.step([], [], last - 1) == []
        assert pointer.step([], [], last) == [UtteranceEnd(3, last, "length")]


def test_every_saved_field_is_restored(manifest):
    """Each decides a later end: the count, the first and the last token, and whether there was an utterance."""
    closing = 2

    def make(**rule):
        return Endpointer(Endpoint(**rule), manifest, (True, False, False), (False, False, True))

    def resume(pointer, **rule):
        restored = make(**rule)
        restored.load(pointer.save())
        assert restored.between_utterances == pointer.between_utterances
        return restored

    silence, length = {"silence_ms": 800}, {"silence_ms": None, "max_utterance_ms": 2000}
    for rule, end in ((silence, 20 * FRAME), (length, 2 * FRAME + 32_000)):
        pointer = make(**rule)
        assert pointer.step([0, 1, 1], [2 * FRAME, 5 * FRAME, 8 * FRAME], 9 * FRAME) == []
        pointer = resume(pointer, **rule)
        assert pointer.step([], [], end - 1) == []
        (found,) = pointer.step([], [], end)
        assert (found.token_count, found.end_sample) == (3, end)
        # After an utterance, closing punctuation does not start another one; before the first utterance it does.
        pointer = resume(pointer, **rule)
        assert pointer.step([closing], [end], end + 100 * FRAME) == []
        (found,) = resume(pointer, **rule).step([0], [end + 101 * FRAME], end + 200 * FRAME)
        assert found.token_count == 5
        (found,) = resume(make(**rule), **rule).step([closing], [FRAME], 100 * FRAME)
        assert found.token_count == 1


def test_utterance_that_starts_at_the_first_sample_is_restored(manifest):
    pointer = make_pointer(manifest, Endpoint())
    pointer.step([0], [0], FRAME)
    restored = make_pointer(manifest, Endpoint())
    restored.load(pointer.save())
    assert not restored.between_utterances and restored.step([], [], 12 * FRAME) == [
        UtteranceEnd(1, 12 * FRAME, "silence")
    ]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([-1, -1, 0, 0], r"counts of utterances are \[-1, -1, 0\]"),
        ([1 << 53, -1, 0, 0], "counts of utterances are"),
        ([0, -2, 0, 0], "counts of utterances are"),
        ([0, 1 << 53, 1 << 53, 1], "counts of utterances are"),
        ([0, -1, -1, 0], "counts of utterances are"),
        ([1, 5, 4, 1], r"counts of utterances are \[1, 5, 4\]"),
        ([1, 5, 1 << 53, 1], "counts of utterances are"),
        ([1, 5, 5, 2], "the flag 2; it must be 0 or 1"),
        ([1, 5, 5, -1], "the flag -1; it must be 0 or 1"),
        ([1, 5, 5], "counts has the shape"),
        ([1, 5, 5, 1, 0], "counts has the shape"),
        ([[1, 5, 5, 1]], "counts is not an array of 1 dimensions of int64"),
    ],
)
def test_invalid_state_is_rejected(manifest, counts, message):
    pointer = make_pointer(manifest, Endpoint())
    pointer.step([0, 1], [FRAME, 2 * FRAME], 3 * FRAME)
    before = pointer.save()
    with pytest.raises(ValueError, match=message):
        pointer.load({"counts": np.array(counts, np.int64)})
    np.testing.assert_array_equal(pointer.save()["counts"], before["counts"])


@pytest.mark.parametrize("counts", [[0, -1, 0, 0], [(1 << 53) - 1, -1, (1 << 53) - 1, 1], [1, 5, 5, 1], [3, 0, 0, 1]])
def test_saved_state_equals_the_loaded_one(manifest, counts):
    pointer = make_pointer(manifest, Endpoint())
    assert pointer.save()["counts"].tolist() == [0, -1, 0, 0]
    pointer.load({"counts": np.array(counts, np.int64)})
    assert pointer.save()["counts"].tolist() == counts and pointer.save()["counts"].dtype == np.int64
    with pytest.raises(ValueError, match="int64"):
        pointer.load({"counts": np.array(counts, np.float64)})


def test_punctuation_after_a_reset_does_not_start_an_utterance(manifest):
    """The client may request an end before the first token."""
    pointer = Endpointer(Endpoint(), manifest, (True, False), (False, True))
    pointer.reset()
    assert pointer.step([1], [0], 100 * FRAME) == [] and pointer.between_utterances


def test_reset_starts_a_new_utterance(manifest):
    pointer = Endpointer(Endpoint(), manifest, WORD_STARTS)
    assert pointer.step([0], [0], 5 * FRAME) == [] and not pointer.between_utterances
    pointer.reset()
    assert pointer.between_utterances and pointer.step([], [], 50 * FRAME) == []
    (end,) = pointer.step([0, 1], [50 * FRAME, 51 * FRAME], 100 * FRAME)
    assert (end.token_count, end.end_sample, end.reason) == (3, 63 * FRAME, "silence")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"silence_ms": 79}, "silence_ms is 79; it must be at least 80 ms, or None"),
        ({"silence_ms": 0.8}, r"silence_ms is 0\.8"),
        ({"silence_ms": True}, "silence_ms is True"),
        ({"silence_ms": 800.0}, r"silence_ms is 800\.0; it must be at least 80 ms"),
        ({"silence_ms": "800"}, "silence_ms is '800'"),
        ({"max_utterance_ms": 2000.0}, r"max_utterance_ms is 2000\.0"),
        ({"max_utterance_ms": 999}, "max_utterance_ms is 999; it must be at least 1000 ms"),
        ({"decoder": "forget"}, "decoder is 'forget'; choose one of keep, reset"),
        ({"model": "yes"}, "model is 'yes'; it must be True or False"),
    ],
)
def test_invalid_rule_is_rejected(options, message):
    with pytest.raises(OptionError, match=message):
        Endpoint(**options)


def test_smallest_values_are_valid():
    assert (Endpoint(silence_ms=80).silence_ms, Endpoint(max_utterance_ms=1000).max_utterance_ms) == (80, 1000)


def test_no_reset_is_due_before_the_first_step(manifest):
    pointer = make_pointer(manifest, Endpoint(decoder="reset"))
    assert not pointer.reset_due and pointer.between_utterances
    assert pointer.step([0, EOU], [0, 0], FRAME) and pointer.reset_due
    assert pointer.step([], [], 2 * FRAME) == [] and not pointer.reset_due  # only after the step of the end


def test_every_token_has_a_position(manifest):
    for tokens, positions in (([0, 1], [0]), ([0], [0, FRAME])):
        with pytest.raises(ValueError, match="zip"):
            make_pointer(manifest, Endpoint()).step(tokens, positions, 2 * FRAME)


def test_default_rule():
    """NeMo's silence of 800 ms and the ends of the model; the decoder is kept."""
    rule = Endpoint()
    assert (rule.silence_ms, rule.max_utterance_ms, rule.decoder, rule.model) == (800, None, "keep", True)


@pytest.mark.nemo
@given(tokens=TOKENS, silence=st.integers(80, 1500), frames=st.integers(1, 150))
@settings(max_examples=300, deadline=None)
def test_silence_rule_equals_nemo(manifest, tokens, silence, frames):
    """NeMo's detector, called after every frame with the tokens since the last end."""
    torch = pytest.importorskip("torch")
    greedy = pytest.importorskip("nemo.collections.asr.inference.streaming.endpointing.greedy.greedy_endpointing")
    nemo, expected, begin, count = greedy.GreedyEndpointing(["a", "b"], 80, stop_history_eou=silence), [], -1, 0
    for frame in range(frames):
        new = [(f, token) for f in range(begin + 1, frame + 1) for token in tokens.get(f, [])]
        found, _ = nemo.detect_eou_given_timestamps(
            torch.tensor([f for f, _ in new]), torch.tensor([token for _, token in new]), frame + 1
        )
        if found:
            begin, count = frame, count + len(new)
            expected.append((count, frame + 1, "silence"))
    assert run(manifest, Endpoint(silence_ms=silence), tokens, frames, [7, 2, 14]) == expected


STEPS = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 4)), max_size=3)), max_size=6
)


@given(
    steps=STEPS,
    rule=st.builds(
        Endpoint,
        silence_ms=st.sampled_from([None, 80, 240, 800]),
        max_utterance_ms=st.sampled_from([None, 1000, 1500]),
        decoder=st.sampled_from(["keep", "reset"]),
    ),
    silent=st.lists(st.integers(0, 1 << 20), max_size=4),
    forced=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_steps_without_tokens_before_the_next_end_change_nothing_and_a_step_to_it_ends(
    manifest, steps, rule, silent, forced
):
    pointer, at = make_pointer(manifest, rule), 0
    for frames, tokens in steps:
        new = sorted((at + frame % frames * FRAME, token) for frame, token in tokens)
        at += frames * FRAME
        pointer.step([token for _, token in new], [sample_pos for sample_pos, _ in new], at)
    if forced:
        pointer.reset()
    end = pointer.next_end
    state = pointer.save()["counts"].tolist()
    if pointer.between_utterances:
        assert end == NEVER
    else:
        assert end > at or forced
    limit = min(end, at + (1 << 21))
    for sample in [*sorted(at + offset % (limit - at) for offset in silent), limit - 1]:
        assert pointer.step([], [], sample) == []
        assert not pointer.reset_due and pointer.next_end == end and pointer.save()["counts"].tolist() == state
    if end < NEVER:
        (found,) = pointer.step([], [], end)
        assert (found.end_sample, found.token_count) == (end, state[0]) and found.reason in ("silence", "length")
        assert pointer.next_end == NEVER and pointer.reset_due == (rule.decoder == "reset")


def test_an_utterance_without_rules_has_no_next_end(manifest):
    pointer = make_pointer(manifest, Endpoint(silence_ms=None))
    pointer.step([0], [0], FRAME)
    assert not pointer.between_utterances and pointer.next_end >= NEVER
    assert pointer.step([], [], 1 << 60) == []
