"""Ends of utterances and backchannels by tokens of the model: compared with NeMo's voice agent; events; streams."""

from __future__ import annotations

import ast
import asyncio
import enum
import functools
import importlib.util
import itertools
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nemostream
from nemostream.runtime.model import Model
from nemostream.runtime.text.endpointing import Endpoint, Endpointer, UtteranceEnd
from nemostream.runtime.text.events import EventBuilder
from nemostream.runtime.text.words import Token, group_words

FRAME = 1280
WORDS = ["\u2581yes", "\u2581no", "on", "\u2581", "o", "\u4f60"]
LANGUAGES = ["<en-US>", "<de-DE>", "\u2581<zh-CN>"]
MARKS = ["<EOU>", "<EOB>"]


def make_tokens(tokenizer, frames: list[list[str]]) -> list[tuple[Token, int]]:
    """Return the tokens of pieces by frame, and their frames."""
    found = []
    for frame, pieces in enumerate(frames):
        for piece in pieces:
            token = tokenizer._model.piece_to_id(piece)
            assert token != tokenizer.unknown
            language = tokenizer.languages.get(token)
            text, tag = tokenizer.piece(token), token in tokenizer.tags
            found.append((Token(token, text, 0.08 * frame, 0.08 * (frame + 1), -1.0, 0.5, language, tag), frame))
    return found


def follow(
    tokenizer, manifest, frames: list[list[str]], rule: Endpoint, steps: list[int], language="auto", backchannels=True
):
    """Return the events of pieces by frame, processed in steps of these numbers of frames."""
    pointer = Endpointer.of_tokenizer(rule, manifest, tokenizer)
    builder = EventBuilder(tokenizer, "min", 16000, rule.model and backchannels)
    placed, events, at = make_tokens(tokenizer, frames), [], 0
    tokens = [token for token, _ in placed]
    sizes = itertools.cycle(steps)
    while at < len(frames):
        upto = min(at + next(sizes), len(frames))
        new = [(token.id, FRAME * frame) for token, frame in placed if at <= frame < upto]
        ends = pointer.step([token for token, _ in new], [position for _, position in new], FRAME * upto)
        count = sum(frame < upto for _, frame in placed)
        events += builder.step(tokens, count, ends, 0.0, 80, language)
        at = upto
    return events + builder.finish(tokens, FRAME * len(frames), 0.0, 80, language)


# -- NeMo's voice agent ------------------------------------------------------------------------------------------------


class Direction(enum.Enum):
    UPSTREAM, DOWNSTREAM = range(2)


class VoiceAgent:
    """The methods of NeMo's `NeMoTurnTakingService`, from its source: the module needs pipecat."""

    def __init__(self, bot_speaking: bool) -> None:
        self._handle_transcription, self._handle_completed_text, self._handle_backchannel_text = (
            function.__get__(self) for function in nemo_functions()[1:]
        )
        self.eou_string, self.eob_string, self.max_buffer_size = "<EOU>", "<EOB>", 1 << 30
        self.language = self._audio_logger = self._prev_speaker_id = None
        self.use_diar = self._have_sent_user_started_speaking = False
        self._vad_user_speaking, self._bot_speaking = True, bot_speaking
        self._user_speaking_buffer = ""
        self.output: list[tuple[str, str]] = []

    def is_backchannel(self, text: str) -> bool:
        return False  # no list of phrases

    async def push_frame(self, frame: dict, direction) -> None:
        text = frame["text"]
        self.output.append(("backchannel", text[1:-1]) if direction is Direction.UPSTREAM else ("turn", text))

    async def _handle_user_interruption(self, frame) -> None: ...

    def step(self, pieces: list[str]) -> None:
        """Process the pieces of a step."""
        get_text_from_tokens, *_ = nemo_functions()
        service = SimpleNamespace(blank_id=-1, tokenizer=SimpleNamespace(ids_to_tokens=lambda ids: pieces))
        if text := get_text_from_tokens(service, range(len(pieces))):  # as in `stt.py`
            asyncio.run(self._handle_transcription(SimpleNamespace(text=text), Direction.DOWNSTREAM))


@functools.cache
def nemo_functions() -> tuple:
    """Compile the functions of NeMo's voice agent that the oracle uses."""
    folder = Path(importlib.util.find_spec("nemo").submodule_search_locations[0])
    folder /= "agents/voice_agent/pipecat/services/nemo"
    names = "get_text_from_tokens", "_handle_transcription", "_handle_completed_text", "_handle_backchannel_text"
    space = {
        "logger": logging.getLogger("nemo"),
        "FrameDirection": Direction,
        "Language": SimpleNamespace(EN_US="en-US"),
        "time_now_iso8601": str,
        "TranscriptionFrame": dict,
        "UserStoppedSpeakingFrame": dict,
        "UserStartedSpeakingFrame": dict,
    }
    for file in ("streaming_asr.py", "turn_taking.py"):
        tree = ast.parse((folder / file).read_text())
        body = [node for node in ast.walk(tree) if getattr(node, "name", None) in names]
        exec(compile(ast.Module(body, []), str(folder / file), "exec"), space)  # annotations are not evaluated
    return tuple(space[name] for name in names)


def nemo_turns(frames: list[list[str]], bot_speaking: bool) -> list[tuple[str, str]]:
    """Return the turns and backchannels of NeMo's voice agent, with steps of one frame; without those without text."""
    agent = VoiceAgent(bot_speaking)
    for pieces in frames:
        agent.step(pieces)
    texts = [(kind, text.replace("<EOB>", "").strip()) for kind, text in agent.output]
    return [(kind, text) for kind, text in texts if text]


def agent_turns(events, bot_speaking: bool) -> list[tuple[str, str]]:
    """Return the turns and backchannels of an agent that uses events; backchannels count only while it plays audio."""
    turns, text, handled = [], "", 0
    for event in events:
        if event.kind == "backchannel" and bot_speaking:
            turns.append(("backchannel", event.text[handled:].strip()))
            handled = len(event.text)
        elif event.kind == "final":
            text = event.text[handled:].strip()
        elif event.kind == "end":
            if event.reason == "model":
                turns.append(("turn", text))
            text, handled = "", 0
    return [(kind, text) for kind, text in turns if text]


# NeMo examines the end of a step's text only, so a mark is the last piece of its frame.
AGENT_FRAMES = st.lists(
    st.tuples(st.lists(st.sampled_from(WORDS), max_size=2), st.sampled_from([[], [], ["<EOU>"], ["<EOB>"]])).map(
        lambda parts: [*parts[0], *parts[1]]
    ),
    max_size=25,
)


@pytest.mark.nemo
@given(frames=AGENT_FRAMES, bot_speaking=st.booleans(), steps=st.lists(st.integers(1, 14), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_turns_equal_nemos_voice_agent(tagged, manifest, frames, bot_speaking, steps):
    events = follow(tagged, manifest, frames, Endpoint(silence_ms=None), steps)
    assert agent_turns(events, bot_speaking) == nemo_turns(frames, bot_speaking)


@pytest.mark.nemo
@pytest.mark.parametrize(
    ("frames", "speaking", "silent"),
    [
        ([["\u2581yes"], ["<EOU>"], ["\u2581no"], ["<EOU>"]], [("turn", "yes"), ("turn", "no")], None),
        (
            [["\u2581yes"], ["<EOB>"], ["\u2581no", "<EOU>"]],
            [("backchannel", "yes"), ("turn", "no")],
            [("turn", "yes no")],
        ),
        ([["\u2581yes"], ["<EOB>"], ["<EOB>"], ["<EOU>"]], [("backchannel", "yes")], [("turn", "yes")]),
        ([["<EOU>"], ["<EOB>"], ["\u2581no"]], [], None),
        ([["\u2581yes", "\u2581", "<EOU>"]], [("turn", "yes")], None),
    ],
)
def test_expected_turns(tagged, manifest, frames, speaking, silent):
    for bot_speaking, expected in ((True, speaking), (False, speaking if silent is None else silent)):
        events = follow(tagged, manifest, frames, Endpoint(silence_ms=None), [1])
        assert agent_turns(events, bot_speaking) == nemo_turns(frames, bot_speaking) == expected


# -- events ------------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from([*WORDS, ".", "?", "<0xE4>", "<s>", *LANGUAGES, *MARKS, *MARKS])
FRAMES = st.lists(st.lists(PIECES, max_size=3), max_size=30)
RULES = st.builds(
    Endpoint,
    silence_ms=st.sampled_from([None, 80, 240, 800]),
    max_utterance_ms=st.sampled_from([None, 1000]),
    model=st.booleans(),
)


def summary(events) -> list[tuple]:
    """Return what does not depend on the steps."""
    return [
        (e.kind, e.utterance, e.text, e.start, e.end, e.reason, e.language, e.tokens, e.words)
        for e in events
        if e.kind != "partial"
    ]


@given(frames=FRAMES, rule=RULES, steps=st.lists(st.integers(1, 14), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_events_of_arbitrary_tokens(tagged, manifest, frames, rule, steps):
    events = follow(tagged, manifest, frames, rule, steps)
    kept: list[Token] = []
    text, tokens, words, number = "", (), (), 0
    for event in events:
        assert event.utterance == number
        if event.kind == "end":
            assert (event.text, event.tokens, event.language) == ("", (), None)
            number += bool(tokens)
            text, tokens, words = "", (), ()
            continue
        new_text = text[: event.text_from] + event.new_text
        new_tokens = tokens[: event.tokens_from] + event.new_tokens
        new_words = words[: event.words_from] + event.new_words
        assert (new_text, new_tokens, new_words) == (event.text, event.tokens, event.words)
        assert new_words == group_words(new_tokens, final=event.kind == "final")
        assert event.text == event.text.strip() and event.text.startswith(event.stable) and event.text.startswith(text)
        assert event.start == event.tokens[0].time
        languages = [token.language for token in event.tokens if token.language]
        assert event.language == (languages[-1] if languages else None)
        if event.kind == "backchannel":  # may be ignored: later events refer to the partial before it
            assert rule.model and event.tokens[-1].id == tagged.backchannel and event.end == event.tokens[-1].end
            continue
        assert event.end == [token for token in event.tokens if token.id not in tagged.invisible][-1].end
        text, tokens, words = new_text, new_tokens, new_words
        if event.kind == "final":
            assert event.text == event.stable == tagged.decode([token.id for token in tokens])
            kept += tokens
    # Only tags, white space and closing punctuation are in no event.
    dropped = [token for token, _ in make_tokens(tagged, frames)]
    for token in kept:
        dropped.remove(token)
    assert all(token.id in tagged.invisible or tagged.closing_punctuation[token.id] for token in dropped)
    # Finals, ends and backchannels do not depend on the steps.
    assert summary(follow(tagged, manifest, frames, rule, [1])) == summary(events)
    # Without backchannels, the other events are the same.
    without = follow(tagged, manifest, frames, rule, steps, backchannels=False)
    assert without == [event for event in events if event.kind != "backchannel"]
    marks = sum(token.id == tagged.backchannel for token in kept)
    assert sum(event.kind == "backchannel" for event in events) == marks * rule.model


def test_expected_events(tagged, manifest):
    frames = [
        ["\u2581yes"],
        ["<EOB>"],
        [],
        ["\u2581no", "\u2581"],
        ["<en-US>"],
        ["<EOU>"],
        ["."],
        ["\u2581"],
        ["\u4f60", "<EOU>"],
    ]
    events = follow(tagged, manifest, frames, Endpoint(), [3])
    assert [
        (e.kind, e.utterance, e.text, round(e.start / 0.08), round(e.end / 0.08), e.language, e.reason) for e in events
    ] == [
        ("backchannel", 0, "yes", 0, 2, None, None),
        ("partial", 0, "yes", 0, 1, None, None),
        ("final", 0, "yes no", 0, 4, "en-US", None),
        ("end", 0, "", 6, 6, None, "model"),
        ("final", 1, "\u4f60", 7, 9, None, None),
        ("end", 1, "", 9, 9, None, "model"),
        ("end", 2, "", 9, 9, None, "finish"),
    ]
    (final,) = (e for e in follow(tagged, manifest, frames, Endpoint(model=False), [3], "de-DE") if e.kind == "final")
    assert (final.text, final.language) == ("yes no. \u4f60", "de-DE")


def test_language_of_the_text_and_not_of_the_silence_after_it(tagged):
    """The language changes at the chunk in which the utterance ends."""
    tokens = [token for token, _ in make_tokens(tagged, [["\u2581yes"], ["<de-DE>"], ["\u2581"], ["\u2581no"]])]
    for first, then, expected in (
        ("en-US", "de-DE", [("en-US", "en-US"), ("de-DE", "de-DE")]),
        ("en-US", "auto", [("en-US", "en-US"), (None, "auto")]),
        ("auto", "en-US", [("de-DE", "auto"), ("en-US", "en-US")]),
    ):
        builder = EventBuilder(tagged, "min", 16000)
        events = builder.step(tokens, 1, [], 0.0, 80, first)
        events += builder.step(tokens, 3, [UtteranceEnd(3, 3 * FRAME, "silence")], 0.0, 80, then)
        events += builder.step(tokens, 4, [], 0.0, 80, then)
        partial, final, end, following = events
        assert (partial.kind, final.kind, end.kind) == ("partial", "final", "end")
        assert [(event.language, event.set_language) for event in (final, following)] == expected
        assert pickle.loads(pickle.dumps(final)).set_language == first
        assert (partial.language, partial.set_language) == (None if first == "auto" else first, first)


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripted(fake):
    """A backend that emits the pieces of a script, by frame of the stream. A decoder reset does not change them."""

    class Scripted(fake.FakeBackend):
        script: list[list[int]]

        def reset_decoder(self, slots):
            super().reset_decoder(slots)
            assert not any(self.in_flight[slot] for slot in slots.tolist()), "a step is in flight during the reset"

        def submit(self, batch):
            starts = [self.position[slot] for slot in batch.slots.tolist()]
            step = super().submit(batch)
            tokens, frames = [], []
            for start, length in zip(starts, batch.lengths.tolist(), strict=True):
                total = fake.encoder_frames(start * FRAME - 1081 + length)
                emitted = [
                    (token, frame)
                    for frame in range(start, min(start + batch.chunk.frames, total, len(self.script)))
                    for token in self.script[frame]
                ]
                tokens.append(np.array([token for token, _ in emitted], np.int32))
                frames.append(np.array([frame for _, frame in emitted], np.int64))
            scores = tuple(np.full(len(row), -0.5, np.float32) for row in tokens)
            step.emissions = step.emissions.of_rows(tokens, frames, scores, scores, step.emissions.failed)
            return step

    return Scripted


def read(stream, audio: np.ndarray, sizes: list[int]) -> list:
    events, at = [], 0
    for size in itertools.cycle(sizes):
        if at >= len(audio):
            return events + stream.finish_events()
        events += stream.push_events(audio[at : at + size])
        at += size


@given(
    frames=st.lists(st.lists(PIECES, max_size=2), min_size=1, max_size=30),
    sizes=st.lists(st.integers(700, 20_000), min_size=1, max_size=3),
    decoder=st.sampled_from(["keep", "reset"]),
    overlap=st.booleans(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streams_do_not_depend_on_pushes_and_chunk_size(
    tagged, tagged_bundle, manifest, scripted, frames, sizes, decoder, overlap
):
    backend = scripted(tagged_bundle.manifest, 2, 2)
    backend.asynchronous, backend.script = (
        overlap,
        [[tagged._model.piece_to_id(piece) for piece in row] for row in frames],
    )
    audio = np.full(FRAME * (len(frames) + 2), 0.1, np.float32)
    rule = Endpoint(silence_ms=240, decoder=decoder)
    expected = [
        (e.kind, e.utterance, e.text, e.start, e.end)
        for e in follow(tagged, manifest, frames, rule, [1])
        if e.kind in ("backchannel", "final")
    ]
    with Model(tagged_bundle, backend) as model:
        for ms in (80, 160, 560, 1120):
            with model.stream(chunk_ms=ms, endpoint=rule) as stream:
                events = read(stream, audio, sizes)
                result = stream.result
            found = [event for event in events if event.kind in ("backchannel", "final")]
            assert [(e.kind, e.utterance, e.text, e.start, e.end) for e in found] == expected
            ids = [token for row in backend.script for token in row]
            assert [token.id for token in result.tokens] == ids and result.text == tagged.decode(ids)
        assert bool(backend.decoder_resets) <= (decoder == "reset")


def test_the_decoder_is_reset_after_the_model_ended_an_utterance(tagged, tagged_bundle, scripted):
    pieces = {2: ["\u2581yes"], 4: ["<EOU>"], 9: ["\u2581no"], 10: ["<EOB>"], 16: ["\u2581ja", "<EOU>", "\u2581nein"]}
    for overlap, decoder in itertools.product((False, True), ("keep", "reset")):
        backend = scripted(tagged_bundle.manifest, 1, 1)
        backend.asynchronous = overlap
        backend.script = [[tagged._model.piece_to_id(piece) for piece in pieces.get(frame, [])] for frame in range(30)]
        with Model(tagged_bundle, backend) as model:
            with model.stream(chunk_ms=80, endpoint=nemostream.Endpoint(None, None, decoder)) as stream:
                events = read(stream, np.full(FRAME * 30, 0.1, np.float32), [3000])
            with model.stream(chunk_ms=80) as stream:  # without a rule there are no ends
                plain = read(stream, np.full(FRAME * 30, 0.1, np.float32), [3000])
        assert [(e.kind, e.text or e.reason) for e in events if e.kind != "partial"] == [
            ("final", "yes"),
            ("end", "model"),
            ("backchannel", "no"),
            ("final", "no ja"),
            ("end", "model"),
            ("final", "nein"),
            ("end", "finish"),
        ]
        assert [(e.kind, e.text or e.reason) for e in plain if e.kind != "partial"] == [
            ("final", "yes no ja nein"),
            ("end", "finish"),
        ]
        assert backend.decoder_resets == ([] if decoder == "keep" else [(0, 5), (0, 11)])
