"""Events: increments that add up to the whole, in linear space; punctuation after an utterance's end."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import tracemalloc

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.runtime.text.endpointing import Endpoint, Endpointer, UtteranceEnd
from nemostream.runtime.text.events import Event, EventBuilder
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.runtime.text.words import Token, group_words

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


def tokens_of(tokenizer, ids, frames=None):
    frames = range(len(ids)) if frames is None else frames
    return [
        Token(i, tokenizer.piece(i), 0.08 * frame, 0.08 * (frame + 1), -1.0, 0.5)
        for i, frame in zip(ids, frames, strict=True)
    ]


def collect(events: list[Event]) -> None:
    """Check that increments add up, and that everything is what its definition says."""
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
        stable = text if event.kind == "final" else (text.rsplit(maxsplit=1)[:-1] or [""])[0]
        assert event.stable == stable and event.stable_length == len(stable)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_increments_add_up_to_the_whole(tokenizer, data):
    """Any tokens at all, bytes of divided characters too; events are read at once, late, or backwards."""
    vocabulary = tokenizer.vocabulary
    steps = data.draw(st.lists(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=4), max_size=12))
    ends = data.draw(st.sets(st.integers(0, 12)))
    tokens, clipped = tokens_of(tokenizer, [i for step in steps for i in step]), None
    if tokens and data.draw(st.booleans()):
        last = dataclasses.replace(tokens[-1], end=tokens[-1].time + 0.01)
        clipped = [*tokens[:-1], last]
    order = data.draw(st.sampled_from(["now", "late", "backwards"]))
    makes, count, events = EventBuilder(tokenizer, "min", 16000), 0, []
    for number, step in enumerate(steps):
        cut = [UtteranceEnd(count, FRAME * count, "forced")] if number in ends else []
        count += len(step)
        events += makes.step(tokens, count, cut, 0.0, 80)
        if order == "now":
            collect(events)
    events += makes.finish(clipped or tokens, FRAME * count, 0.0, 80)
    if order == "backwards":
        for event in reversed(events):
            assert event.words == group_words(event.tokens, final=event.kind == "final")
    collect(events)
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


def test_an_event_made_by_hand_is_all_new(tokenizer):
    tokens = tuple(tokens_of(tokenizer, tokenizer.encode("the quick fox")))
    event = Event("partial", 0, "the quick fox", "the quick", 0.0, 1.0, 1.0, 80, tokens)
    assert (event.new_text, event.new_tokens, event.words_from) == (event.text, tokens, 0)
    assert event.new_words == event.words == group_words(tokens) and event.stable_length == 9


def test_an_hours_utterance_takes_memory_and_increments_in_proportion_to_it(tokenizer):
    """3.5 tokens a second without an end, a partial for each, all kept."""
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog again and again")

    def keep(count: int) -> tuple[int, list[Event]]:
        tokens = tokens_of(tokenizer, (ids * (count // len(ids) + 1))[:count])
        makes, events = EventBuilder(tokenizer, "min", 16000), []
        tracemalloc.start()
        for number in range(1, count + 1):
            events += makes.step(tokens, number, [], 0.0, 80)
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
    collect(events[:300])
    assert last.words == group_words(last.tokens, final=False)


# -- punctuation -------------------------------------------------------------------------------------------------------


def run(tokenizer, manifest, said, frames, steps, rule):
    """Events of tokens given by frame, through the rule and the events, in steps of so many frames."""
    pointer = Endpointer(rule, manifest, tokenizer.word_starts, tokenizer.closing_punctuation)
    makes, events, tokens, at = EventBuilder(tokenizer, "min", 16000), [], [], 0
    for step in range(1000):
        upto = min(at + steps[step % len(steps)], frames)
        new = [(piece, frame) for frame in range(at, upto) for piece in said.get(frame, [])]
        ids = [tokenizer._model.piece_to_id(piece) for piece, _ in new]
        assert tokenizer.unknown not in ids
        sample_positions = [frame for _, frame in new]
        ends = pointer.step(ids, [FRAME * sample_pos for sample_pos in sample_positions], FRAME * upto)
        tokens += tokens_of(tokenizer, ids, sample_positions)
        events += makes.step(tokens, len(tokens), ends, 0.0, 80)
        if (at := upto) == frames:
            break
    events += makes.finish(tokens, FRAME * frames, 0.0, 80)
    collect(events)
    finals = [(e.utterance, e.text, round(e.start / 0.08)) for e in events if e.kind == "final"]
    return finals, [(e.utterance, e.reason) for e in events if e.kind == "end"]


@pytest.mark.parametrize("mark", [".", "?", "\u2581?", "\u3002", "\u2581\u3002", "\u061f"])
@pytest.mark.parametrize("steps", [[1], [7], [40], [3, 5]])
def test_punctuation_after_the_end_starts_no_utterance(punctuated, manifest, mark, steps):
    no = [(0, "yes", 0), (1, "no", 30)]
    said = {0: ["\u2581yes"], 20: [mark], 30: ["\u2581no"]}
    two = [(0, "silence"), (1, "silence"), (2, "finish")]
    assert run(punctuated, manifest, said, 60, steps, Endpoint()) == (no, two)
    # Several marks, in the frame of the next word too; and none that follows.
    said = {0: ["\u2581yes"], 20: [mark, mark], 30: [mark, "\u2581no"]}
    assert run(punctuated, manifest, said, 60, steps, Endpoint()) == (no, two)
    said = {0: ["\u2581yes"], 20: [mark]}
    assert run(punctuated, manifest, said, 60, steps, Endpoint()) == (no[:1], [(0, "silence"), (1, "finish")])


def test_punctuation_that_comes_in_time_belongs_to_its_utterance(punctuated, manifest):
    said = {0: ["\u2581yes"], 10: ["\u2581?"], 30: ["\u2581no", "."]}
    finals, _ = run(punctuated, manifest, said, 60, [7], Endpoint())
    assert [text.replace(" ?", "?") for _, text, _ in finals] == ["yes?", "no."]
    # An utterance that is too long ends after the punctuation of its last word.
    said = {0: ["\u2581yes"], 12: ["\u2581no"], 14: ["\u2581?", "\u2581yes"]}
    finals, _ = run(punctuated, manifest, said, 20, [7], Endpoint(silence_ms=None, max_utterance_ms=1000))
    assert [(text, start) for _, text, start in finals] == [("yes no ?", 0), ("yes", 14)]


def test_marks_that_open_and_first_ones_start_an_utterance(punctuated, manifest):
    said = {0: ["\u2581yes"], 20: ["\u00bf"], 21: ["\u2581no"]}
    assert [text for _, text, _ in run(punctuated, manifest, said, 60, [7], Endpoint())[0]] == ["yes", "\u00bf no"]
    said = {0: ["-"], 20: ["."], 30: ["\u2581no"]}
    assert [text for _, text, _ in run(punctuated, manifest, said, 60, [7], Endpoint())[0]] == ["-", "no"]
    said = {0: ["."], 20: ["\u2581no"]}  # nothing is before it
    assert [text for _, text, _ in run(punctuated, manifest, said, 60, [7], Endpoint())[0]] == [".", "no"]


def test_punctuation_after_a_forced_end_starts_no_utterance(punctuated):
    tokens = tokens_of(punctuated, [punctuated._model.piece_to_id(piece) for piece in ("\u2581yes", ".", "\u2581no")])
    makes = EventBuilder(punctuated, "min", 16000)
    events = makes.step(tokens, 1, [], 0.0, 80)
    events += makes.step(tokens, 1, [UtteranceEnd(1, FRAME, "forced")], 0.0, 80)
    events += makes.step(tokens, 2, [], 0.0, 80)
    assert [event.kind for event in events] == ["partial", "final", "end"]
    events += makes.step(tokens, 3, [], 0.0, 80) + makes.finish(tokens, 3 * FRAME, 0.0, 80)
    assert [(event.utterance, event.text) for event in events if event.kind == "final"] == [(0, "yes"), (1, "no")]
