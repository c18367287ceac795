"""Events: increments that add up to the whole transcript in linear space; punctuation after the end of an utterance."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import re
import string
import tracemalloc
import unicodedata

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.runtime.text.endpointing import Endpoint, Endpointer, UtteranceEnd
from nemostream.runtime.text.events import Event, EventBuilder
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.runtime.text.words import Token, Word, group_words

FRAME = 1280


@pytest.fixture(scope="session")
def punctuated(tmp_path_factory) -> Tokenizer:
    """A tokenizer with punctuation, alone and after a space, of several scripts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["yes, no. go on? \u3002 stop! \u00bf que ? \u061f wait - now"] * 20),
        model_writer=model,
        vocab_size=90,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=[".", ",", "?", "!", "\u3002", "\u061f", "\u00bf", "-", "\u2581?", "\u2581\u3002"],
    )
    path = tmp_path_factory.mktemp("punctuated") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size())


@pytest.fixture(scope="session")
def tokenizer(bundle) -> Tokenizer:
    return Tokenizer(bundle.path / "tokenizer.model", bundle.manifest.decoder.vocabulary)


def make_tokens(tokenizer, ids, frames=None):
    frames = range(len(ids)) if frames is None else frames
    return [
        Token(i, tokenizer.piece(i), 0.08 * frame, 0.08 * (frame + 1), -1.0, 0.5)
        for i, frame in zip(ids, frames, strict=True)
    ]


def before_last_word(text: str) -> str:
    """Return a text of a script with spaces up to its last word.

    Closing punctuation after a space belongs to the word before it; what follows it begins a word.
    """
    marks = "".join(mark for mark in string.punctuation if unicodedata.category(mark) not in ("Ps", "Sm", "Sc", "Sk"))
    begin = len(text) - len(text.lstrip())
    gaps = re.finditer(rf"(?<=\S)\s+(?:[.,?!:;)\]}}][{re.escape(marks)}]*)?(?=\S)", text[begin:])
    return text[: max((begin + gap.end() for gap in gaps), default=0)].rstrip()


def check(events: list[Event]) -> None:
    """Check that increments add up, and that every field equals its definition."""
    text, tokens, words = "", (), ()
    for event in events:
        if event.kind == "end":
            assert (event.text, event.tokens, event.words, event.new_text) == ("", (), (), "")
            text, tokens, words = "", (), ()
            continue
        assert event.text_from == len(text)
        text = text[: event.text_from] + event.new_text
        tokens = tokens[: event.tokens_from] + event.new_tokens
        words = words[: event.words_from] + event.new_words
        assert (text, tokens, words) == (event.text, event.tokens, event.words)
        assert [token.end for token in tokens] == [token.end for token in event.tokens]
        assert words == group_words(tokens, final=event.kind == "final")
        assert text.startswith(event.stable) and event.stable_length == len(event.stable)
        if event.kind == "final" or all(each < "\u0e00" or each == "\ufffd" for each in text):
            assert event.stable == (text if event.kind == "final" else before_last_word(text))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_increments_add_up_to_the_transcript(tokenizer, data):
    """For arbitrary tokens, including byte pieces; events are read immediately, later, or in reverse order."""
    vocabulary = tokenizer.vocabulary
    steps = data.draw(st.lists(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=4), max_size=12))
    ends = data.draw(st.sets(st.integers(0, 12)))
    tokens, clipped = make_tokens(tokenizer, [i for step in steps for i in step]), None
    if tokens and data.draw(st.booleans()):
        end = tokens[-1].time - 0.03  # the last two tokens extend beyond the recording
        clipped = [
            dataclasses.replace(token, end=min(token.end, end)) if token.end > end else token for token in tokens
        ]
    order = data.draw(st.sampled_from(["immediately", "later", "reversed"]))
    builder, count, events = EventBuilder(tokenizer, "min", 16000), 0, []
    for number, step in enumerate(steps):
        cut = [UtteranceEnd(count, FRAME * count, "forced")] if number in ends else []
        count += len(step)
        events += builder.step(tokens, count, cut, 0.0, 80)
        if order == "immediately":
            check(events)
    events += builder.finish(clipped or tokens, FRAME * count, 0.0, 80)
    if order == "reversed":
        for event in reversed(events):
            assert event.words == group_words(event.tokens, final=event.kind == "final")
    check(events)
    finals = [event for event in events if event.kind == "final"]
    assert [token for event in finals for token in event.tokens] == tokens
    if clipped:
        assert finals[-1].end == clipped[-1].end
    for event in events:
        for twin in (copy.copy(event), copy.deepcopy(event), pickle.loads(pickle.dumps(event))):
            assert twin == event and twin.words == event.words and twin.new_text == event.new_text
            assert (twin.words_from, twin.new_words, twin.stable_length) == (
                event.words_from,
                event.new_words,
                event.stable_length,
            )
        assert repr(event) == repr(pickle.loads(pickle.dumps(event))) and event.text in dataclasses.astuple(event)


def test_the_changed_words_do_not_depend_on_when_they_are_read(tokenizer):
    """A character that is incomplete in one event is a word of the next; reading that one first changes nothing."""
    ids = {tokenizer.piece(i): i for i in range(tokenizer.vocabulary)}
    tokens = make_tokens(tokenizer, [0, *(ids[piece] for piece in (" ", "<0xE1>", "<0x80>", "<0x80>")), 0])

    def events() -> list[Event]:
        builder = EventBuilder(tokenizer, "min", 16000)
        return [event for count in range(1, 7) for event in builder.step(tokens, count, [], 0.0, 80)]

    in_order = [(event.words_from, event.new_words) for event in events()]
    reverse = [(event.words_from, event.new_words) for event in reversed(events())][::-1]
    assert in_order == reverse


def test_stable_text_of_a_script_without_spaces(character_tokenizer):
    text = "我用iPhone打电话，好吗？ Да, 好"
    tokenizer = character_tokenizer(text)
    tokens = make_tokens(tokenizer, tokenizer.encode(text))
    builder = EventBuilder(tokenizer, "min", 16000)
    events = [event for count in range(1, len(tokens) + 1) for event in builder.step(tokens, count, [], 0.0, 80)]
    stable = dict.fromkeys(event.stable for event in events)
    assert list(stable) == [
        *(
            "",
            "我",
            "我用",
            "我用iPhone",
            "我用iPhone打",
            "我用iPhone打电",
            "我用iPhone打电话，",
            "我用iPhone打电话，好",
        ),
        *("我用iPhone打电话，好吗？", "我用iPhone打电话，好吗？ Да,"),
    ]
    events += builder.finish(tokens, FRAME * len(tokens), 0.0, 80)
    check(events)
    assert [word.text for word in events[-2].words] == [
        "我",
        "用",
        "iPhone",
        "打",
        "电",
        "话，",
        "好",
        "吗？",
        "Да,",
        "好",
    ]


def test_event_created_directly_is_entirely_new(tokenizer):
    tokens = tuple(make_tokens(tokenizer, tokenizer.encode("the quick fox")))
    event = Event("partial", 0, "the quick fox", "the quick", 0.0, 1.0, 1.0, 80, tokens)
    assert (event.new_text, event.new_tokens, event.words_from) == (event.text, tokens, 0)
    assert event.new_words == event.words == group_words(tokens) and event.stable_length == 9
    assert (event.reason, event.tokens_from, event.text_from) == (None, 0, 0)
    assert (event.language, event.set_language) == (None, "auto")
    shown = repr(event)
    assert "the quick fox" in shown and not any(name in shown for name in ("Token(", "grouper", "_from"))
    with pytest.raises(AttributeError, match="'Event' object has no attribute 'speaker'"):
        event.speaker  # noqa: B018


def test_events_have_the_audio_and_the_chunk_size_of_their_step(tagged):
    """Also the end of an utterance, which `rate` converts from samples to seconds and which is never before another."""
    pieces = ["\u2581yes", "<EOB>", "\u2581no"]
    tokens = make_tokens(tagged, [tagged._model.piece_to_id(piece) for piece in pieces])
    builder = EventBuilder(tagged, "min", 8000, backchannels=True)
    events = builder.step(tokens, 1, [], 0.25, 80)
    events += builder.step(tokens, 2, [], 1.5, 560)
    events += builder.step(tokens, 3, [UtteranceEnd(2, 10_000, "silence")], 2.75, 1120)
    events += builder.finish(tokens, 9_000, 3.125, 160)
    assert [(e.kind, e.utterance, e.audio, e.chunk_ms, e.reason) for e in events] == [
        ("partial", 0, 0.25, 80, None),
        ("backchannel", 0, 1.5, 560, None),
        ("partial", 0, 1.5, 560, None),
        ("final", 0, 2.75, 1120, None),
        ("end", 0, 2.75, 1120, "silence"),
        ("partial", 1, 2.75, 1120, None),
        ("final", 1, 3.125, 160, None),
        ("end", 1, 3.125, 160, "finish"),
    ]
    ends = [event for event in events if event.kind == "end"]
    assert [(event.start, event.end) for event in ends] == [(1.25, 1.25), (1.25, 1.25)]


def test_utterance_does_not_start_after_the_end_of_the_recording(tokenizer):
    (token,) = make_tokens(tokenizer, tokenizer.encode("the"), [10])
    builder = EventBuilder(tokenizer, "min", 16000)
    (partial,) = builder.step([token], 1, [], 0.0, 80)
    final, _ = builder.finish([dataclasses.replace(token, end=0.75)], 12_000, 0.0, 80)
    assert [(event.start, event.end) for event in (partial, final)] == [(0.8, pytest.approx(0.88)), (0.75, 0.75)]


def test_confidence_of_words_is_aggregated_as_requested(tokenizer):
    """By the event, by a copy of it, and by its increments."""
    tokens = [
        dataclasses.replace(token, confidence=0.5 + 0.125 * index)
        for index, token in enumerate(make_tokens(tokenizer, [*tokenizer.encode("zz"), *tokenizer.encode("zz")]))
    ]
    for aggregation in ("min", "max", "mean", "prod"):
        builder = EventBuilder(tokenizer, aggregation, 16000)
        events = builder.step(tokens, len(tokens) - 1, [], 0.0, 80)
        events += builder.step(tokens, len(tokens), [UtteranceEnd(len(tokens), FRAME, "forced")], 0.0, 80)
        events += builder.step([*tokens, *tokens], 2 * len(tokens), [], 0.0, 80)  # the next utterance
        partial, final, _, other = events
        for event, count in ((partial, len(tokens) - 1), (final, len(tokens)), (other, len(tokens))):
            expected = group_words(tokens[:count], aggregation)
            assert event.words == pickle.loads(pickle.dumps(event)).words == copy.copy(event).words == expected
            assert event.new_words == expected[event.words_from :]
    assert len({group_words(tokens, aggregation)[0].confidence for aggregation in ("min", "max", "mean", "prod")}) == 4


def test_words_of_a_final_can_be_replaced(tokenizer):
    """The tokens, and everything else, are those of the original; all words and the whole text are new."""
    tokens = make_tokens(tokenizer, tokenizer.encode("the quick fox"))
    builder = EventBuilder(tokenizer, "max", 16000)
    builder.step(tokens, 2, [], 0.0, 80)
    final, _ = builder.finish(tokens, 7 * FRAME, 1.5, 560, "de-DE")
    assert final.text_from > 0 and final.tokens_from == 2
    written = [Word("the", 0.0, 0.1, 0.5), Word("42", 0.1, 0.9, 0.25), Word("!", 0.9, 1.0, 1.0, after_space=False)]
    event = final.with_words(written)
    assert (event.text, event.stable, event.words) == ("the 42!", "the 42!", tuple(written))
    assert (event.text_from, event.new_text, event.stable_length) == (0, "the 42!", 7)
    assert (event.words_from, event.new_words) == (0, tuple(written))
    assert (event.tokens, event.tokens_from, event.new_tokens) == (tuple(tokens), 2, tuple(tokens[2:]))
    changed = {"text", "stable", "text_from"}
    for item in dataclasses.fields(Event):
        if item.name not in changed:
            assert getattr(event, item.name) == getattr(final, item.name)
    for twin in (copy.copy(event), copy.deepcopy(event), pickle.loads(pickle.dumps(event))):
        assert (twin, twin.words, twin.new_words) == (event, event.words, event.new_words)
    assert final.with_words([]).text == "" and final.with_words([]).words == ()
    assert final.words == group_words(tokens, "max")  # the original is unchanged


def test_memory_and_increments_of_an_hour_are_linear(tokenizer):
    """3.5 tokens per second in one utterance, with a partial for each; all events are kept."""
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog again and again")

    def keep(count: int) -> tuple[int, list[Event]]:
        tokens = make_tokens(tokenizer, (ids * (count // len(ids) + 1))[:count])
        builder, events = EventBuilder(tokenizer, "min", 16000), []
        tracemalloc.start()
        for number in range(1, count + 1):
            events += builder.step(tokens, number, [], 0.0, 80)
            events[-1].new_words  # noqa: B018 - as a server that sends increments
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return used, events

    (small, _), (large, events) = keep(3150), keep(12600)
    assert large < 5 * small
    last = events[-1]
    assert sum(len(event.new_text) for event in events) == len(last.text) > 20_000
    assert sum(len(event.new_tokens) for event in events) == len(last.tokens) == 12600
    assert sum(len(event.new_words) for event in events) <= 2 * len(events)
    check(events[:300])
    assert last.words == group_words(last.tokens, final=False)


# -- punctuation -------------------------------------------------------------------------------------------------------


def run(tokenizer, manifest, pieces, frames, steps, rule):
    """Return the finals and ends for pieces by frame, processed in steps of these numbers of frames."""
    pointer = Endpointer(rule, manifest, tokenizer.word_starts, tokenizer.closing_punctuation)
    builder, events, tokens, at = EventBuilder(tokenizer, "min", 16000), [], [], 0
    for step in range(1000):
        upto = min(at + steps[step % len(steps)], frames)
        new = [(piece, frame) for frame in range(at, upto) for piece in pieces.get(frame, [])]
        ids = [tokenizer._model.piece_to_id(piece) for piece, _ in new]
        assert tokenizer.unknown not in ids
        sample_positions = [frame for _, frame in new]
        ends = pointer.step(ids, [FRAME * sample_pos for sample_pos in sample_positions], FRAME * upto)
        tokens += make_tokens(tokenizer, ids, sample_positions)
        events += builder.step(tokens, len(tokens), ends, 0.0, 80)
        if (at := upto) == frames:
            break
    events += builder.finish(tokens, FRAME * frames, 0.0, 80)
    check(events)
    finals = [(e.utterance, e.text, round(e.start / 0.08)) for e in events if e.kind == "final"]
    return finals, [(e.utterance, e.reason) for e in events if e.kind == "end"]


@pytest.mark.parametrize("mark", [".", "?", "\u2581?", "\u3002", "\u2581\u3002", "\u061f"])
@pytest.mark.parametrize("steps", [[1], [7], [40], [3, 5]])
def test_punctuation_after_the_end_does_not_start_an_utterance(punctuated, manifest, mark, steps):
    no = [(0, "yes", 0), (1, "no", 30)]
    pieces = {0: ["\u2581yes"], 20: [mark], 30: ["\u2581no"]}
    two = [(0, "silence"), (1, "silence"), (2, "finish")]
    assert run(punctuated, manifest, pieces, 60, steps, Endpoint()) == (no, two)
    # Several marks, one in the frame of the next word; then marks without a next word.
    pieces = {0: ["\u2581yes"], 20: [mark, mark], 30: [mark, "\u2581no"]}
    assert run(punctuated, manifest, pieces, 60, steps, Endpoint()) == (no, two)
    pieces = {0: ["\u2581yes"], 20: [mark]}
    assert run(punctuated, manifest, pieces, 60, steps, Endpoint()) == (no[:1], [(0, "silence"), (1, "finish")])


def test_punctuation_before_the_end_belongs_to_its_utterance(punctuated, manifest):
    pieces = {0: ["\u2581yes"], 10: ["\u2581?"], 30: ["\u2581no", "."]}
    finals, _ = run(punctuated, manifest, pieces, 60, [7], Endpoint())
    assert [text.replace(" ?", "?") for _, text, _ in finals] == ["yes?", "no."]
    # An utterance of the maximum length ends after the punctuation of its last word.
    pieces = {0: ["\u2581yes"], 12: ["\u2581no"], 14: ["\u2581?", "\u2581yes"]}
    finals, _ = run(punctuated, manifest, pieces, 20, [7], Endpoint(silence_ms=None, max_utterance_ms=1000))
    assert [(text, start) for _, text, start in finals] == [("yes no ?", 0), ("yes", 14)]


def test_opening_and_initial_marks_start_an_utterance(punctuated, manifest):
    pieces = {0: ["\u2581yes"], 20: ["\u00bf"], 21: ["\u2581no"]}
    assert [text for _, text, _ in run(punctuated, manifest, pieces, 60, [7], Endpoint())[0]] == ["yes", "\u00bf no"]
    pieces = {0: ["-"], 20: ["."], 30: ["\u2581no"]}
    assert [text for _, text, _ in run(punctuated, manifest, pieces, 60, [7], Endpoint())[0]] == ["-", "no"]
    pieces = {0: ["."], 20: ["\u2581no"]}  # no preceding utterance
    assert [text for _, text, _ in run(punctuated, manifest, pieces, 60, [7], Endpoint())[0]] == [".", "no"]


def test_punctuation_after_a_forced_end_does_not_start_an_utterance(punctuated):
    tokens = make_tokens(punctuated, [punctuated._model.piece_to_id(piece) for piece in ("\u2581yes", ".", "\u2581no")])
    builder = EventBuilder(punctuated, "min", 16000)
    events = builder.step(tokens, 1, [], 0.0, 80)
    events += builder.step(tokens, 1, [UtteranceEnd(1, FRAME, "forced")], 0.0, 80)
    events += builder.step(tokens, 2, [], 0.0, 80)
    assert [event.kind for event in events] == ["partial", "final", "end"]
    events += builder.step(tokens, 3, [], 0.0, 80) + builder.finish(tokens, 3 * FRAME, 0.0, 80)
    assert [(event.utterance, event.text) for event in events if event.kind == "final"] == [(0, "yes"), (1, "no")]
