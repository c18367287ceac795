"""Ends of utterances, compared with the rule frame by frame, with NeMo's code, and with expected results."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import OptionError
from nemostream.runtime.text.endpointing import Endpoint, Endpointer

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
        ({"max_utterance_ms": 999}, "max_utterance_ms is 999; it must be at least 1000 ms"),
        ({"decoder": "forget"}, "decoder is 'forget'; choose one of keep, reset"),
        ({"model": "yes"}, "model is 'yes'; it must be True or False"),
    ],
)
def test_invalid_rule_is_rejected(options, message):
    with pytest.raises(OptionError, match=message):
        Endpoint(**options)


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
