"""Snapshots: a restored stream continues exactly like the saved one, and every saved value matters.

Tokens and probabilities of speech are checksums of everything before them, so that a difference in any part of the
state shows in later results. `SCENARIOS` are streams that are saved where a part of the state is in use.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemostream.bundle import Bundle, LanguageConfig
from nemostream.errors import OptionError
from nemostream.runtime.audio.vad import VadFilter
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.snapshot import Checkpointer, StreamSnapshot
from nemostream.runtime.text.endpointing import Endpoint

FRAME, LEAD = 1280, 1081
QUIET, SPEECH, MARK, LOOP = 0.01, 0.1, 0.2, 0.4  # mean absolute values of samples
LANGUAGES = LanguageConfig("de-DE", {"en-US": 0, "de-DE": 3, "fr-FR": 4}, 5)


def sound(seed: int, frames: float, level: float) -> np.ndarray:
    """Return samples of either sign with a constant absolute value; the backend's tokens depend on the value."""
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), round(FRAME * frames))
    return signs * np.float32(level)


class Detector:
    """A substitute for silero's graph: the probability of speech is a checksum of all audio so far.

    3 % of the windows start speech, 37 % continue it.
    """

    def speech_probability(self, window_N: np.ndarray, state: np.ndarray) -> tuple[float, np.ndarray]:
        value = zlib.crc32(window_N.tobytes(), zlib.crc32(state.tobytes()))
        probability = 0.9 if value % 100 < 3 else 0.4 if value % 100 < 40 else 0.0
        return probability, np.random.default_rng(value).standard_normal(state.shape, np.float32)


@pytest.fixture(scope="module")
def prompted(tagged_bundle) -> Bundle:
    return Bundle(tagged_bundle.path, dataclasses.replace(tagged_bundle.manifest, languages=LANGUAGES))


@pytest.fixture(scope="module")
def model(fake, prompted, tagged) -> Iterator[Model]:
    """A model whose tokens depend on the level of each frame.

    QUIET: none; SPEECH: two tokens of text, a checksum of everything since the last decoder reset; MARK: a comma;
    LOOP: three tokens of an endless repetition.
    """
    (comma,) = (i for i in range(tagged.vocabulary) if tagged.piece(i) == ",")
    words = [i for i in range(tagged.vocabulary) if tagged.piece(i).strip().isalpha()]

    class Story(fake.FakeBackend):
        def reset_decoder(self, slots):
            super().reset_decoder(slots)
            for slot in slots.tolist():
                self.checksum[slot] = zlib.crc32(b"reset", self.checksum[slot])

        def submit(self, batch):
            starts = [self.position[slot] for slot in batch.slots.tolist()]
            step = super().submit(batch)
            rows = list(zip(*(getattr(step.emissions, name) for name in ("tokens", "frames")), strict=True))
            tokens, frames = [], []
            for audio, start, (digits, at) in zip(batch.audio, starts, rows, strict=True):
                row = []
                for frame in sorted(set(at.tolist())):
                    level = np.abs(audio[FRAME * (frame - start) : FRAME * (frame - start + 1)]).mean()
                    if level > (MARK + LOOP) / 2:
                        row += [(words[(3 * frame + k) % 7], frame) for k in range(3)]
                    elif level > (SPEECH + MARK) / 2:
                        row.append((comma, frame))
                    elif level > (QUIET + SPEECH) / 2:
                        row += [(words[digit % len(words)], frame) for digit in digits[at == frame][:2].tolist()]
                tokens.append(np.array([token for token, _ in row], np.int32))
                frames.append(np.array([frame for _, frame in row], np.int64))
            scores = tuple(-0.01 * (row + 1).astype(np.float32) for row in tokens)
            sums = tuple(1 + 0.001 * row.astype(np.float32) for row in tokens)
            step.emissions = step.emissions.of_rows(tokens, frames, scores, sums, step.emissions.failed)
            return step

    with Model(prompted, Story(prompted.manifest, capacity=2)) as model:
        model._new_vad_filter = lambda: VadFilter(Detector())
        yield model


@pytest.fixture(autouse=True)
def files_are_not_synchronized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save time: hundreds of snapshot files are written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@dataclass(frozen=True)
class Scenario:
    """Operations before and after a snapshot: audio, a chunk size (int) or a language (str)."""

    before: list[Any]
    after: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    # Whether a new language or recording has begun that no step covers yet. The saved stream's result then describes
    # the last step, that of the restored stream the state after it, until the next step.
    pending: bool = False


RULES = Endpoint(silence_ms=400, max_utterance_ms=2000, decoder="reset")
HELD = sound(7, 40, SPEECH)  # speech begins shortly after its end
START = [np.ones(FRAME - LEAD, np.float32) * QUIET]  # frame boundaries follow

SCENARIOS = {
    "within an utterance": Scenario(
        [*START, sound(1, 6, SPEECH), "en-US", sound(2, 12, QUIET), sound(3, 9, SPEECH), sound(4, 1.4, QUIET)],
        [sound(5, 0.6, QUIET), sound(6, 20, SPEECH), sound(7, 12, QUIET), sound(8, 5, SPEECH)],
        {"chunk_ms": 80, "endpoint": RULES, "phrases": ["go on"], "language": "fr"},
    ),
    "silence at the end of an utterance": Scenario(
        [*START, sound(1, 6, SPEECH), sound(2, 5, QUIET)],
        [sound(3, 12, QUIET), sound(4, 6, SPEECH)],
        {"chunk_ms": 80, "endpoint": RULES},
    ),
    "between utterances": Scenario(
        [*START, sound(1, 6, SPEECH), sound(2, 14, QUIET)],
        [sound(3, 1, MARK), sound(4, 9, QUIET), sound(5, 6, SPEECH), sound(6, 22, QUIET)],
        {"chunk_ms": 80, "endpoint": RULES},
    ),
    "before the first utterance": Scenario(
        [*START, sound(2, 14, QUIET)],
        [sound(3, 1, MARK), sound(4, 9, QUIET), sound(5, 6, SPEECH), sound(6, 22, QUIET)],
        {"chunk_ms": 80, "endpoint": RULES},
    ),
    "in a loop": Scenario(
        [*START, sound(1, 3, SPEECH), sound(2, 64, LOOP)],
        [sound(3, 9, LOOP), sound(4, 5, SPEECH)],
        {"chunk_ms": 80},
    ),
    "in a loop after a reset": Scenario(
        [*START, sound(1, 5, SPEECH), sound(2, 90, LOOP)],
        [sound(3, 60, LOOP), sound(4, 5, SPEECH)],
        {"chunk_ms": 160},
    ),
    "chunks held by the filter": Scenario(
        [HELD[:46_000], "en-US", HELD[46_000:48_000], "fr", HELD[48_000:], "de"],
        [sound(1000, 40, SPEECH)],
        {"chunk_ms": 80, "vad": True, "language": "fr"},
        pending=True,
    ),
    "during speech": Scenario([sound(987, 40, SPEECH)], [sound(1000, 40, SPEECH)], {"chunk_ms": 80, "vad": True}),
    "after speech": Scenario([sound(16, 40, SPEECH)], [sound(1000, 40, SPEECH)], {"chunk_ms": 560, "vad": True}),
    "without speech": Scenario([sound(2001, 20.5, SPEECH)], [sound(7001, 14, SPEECH)], {"chunk_ms": 80, "vad": True}),
    "within digital silence": Scenario(
        [*START, sound(1, 6, SPEECH), np.zeros(FRAME * 130, np.float32)],
        [np.zeros(3000, np.float32), sound(2, 9, SPEECH), sound(3, 9, SPEECH)],
        {"chunk_ms": 560, "endpoint": RULES},
    ),
    "at the beginning of digital silence": Scenario(
        [sound(1, 6.25, SPEECH), np.zeros(160_100, np.float32)],  # the last frame ends 2240 samples after its audio
        [np.zeros(9000, np.float32), sound(2, 9, SPEECH)],
        {"chunk_ms": 80},
    ),
    "after digital silence": Scenario(
        [*START, sound(1, 6, SPEECH), np.zeros(FRAME * 126 + 77, np.float32), sound(2, 2, SPEECH)],
        [sound(3, 9, SPEECH), sound(4, 9, SPEECH)],
        {"chunk_ms": 560, "endpoint": RULES, "phrases": ["stop"]},
        pending=True,
    ),
    "another recording": Scenario(
        [*START, sound(1, 6, SPEECH), np.zeros(FRAME * 126 + 77, np.float32), sound(2, 12, SPEECH)],
        [sound(3, 9, SPEECH), sound(4, 9, SPEECH)],
        {"chunk_ms": 560, "endpoint": RULES, "phrases": ["stop"]},
    ),
    "another chunk size": Scenario(
        # The chunk being filled has 6 of 7 frames, so it is not made shorter.
        [*START, sound(1, 9, SPEECH), sound(2, 3, SPEECH), 80, "en-US"],
        [sound(3, 3, SPEECH), sound(4, 9, SPEECH)],
        {"chunk_ms": 560},
        pending=True,
    ),
}


def apply(session: Any, operation: Any) -> None:
    if isinstance(operation, np.ndarray):
        session.feed(operation)
    elif isinstance(operation, int):
        session.set_chunk_ms(operation)
    else:
        session.set_language(operation)
    session.wait()


def observed(session: Any, operations: list[Any]) -> list[Any]:
    """Apply operations; return everything that a client can observe, from before the first until after `finish`."""
    found: list[Any] = []

    def observe() -> None:
        result = session.result
        ends = [(event.reason, event.end) for event in session.events() if event.kind == "end"]
        found.append((session.language, session.decoded, dataclasses.astuple(result), ends))

    observe()
    for operation in operations:
        apply(session, operation)
        observe()
    session.finish()
    session.wait()
    observe()
    session.final()
    observe()
    return found


def save(model: Model, scenario: Scenario, path: Path) -> tuple[StreamSnapshot, list[Any]]:
    """Return the snapshot of a scenario, and what is observed in the stream that continues after it."""
    with closing(model.open_session(16000, 1, checkpointer=Checkpointer(path, {}), **scenario.options)) as session:
        for operation in scenario.before:
            apply(session, operation)
        session.events()
        return session.save(), observed(session, scenario.after)


def reopen(model: Model, scenario: Scenario, path: Path, snapshot: StreamSnapshot) -> Any:
    """Return a session that is restored from a file with the snapshot."""
    checkpointer = Checkpointer(path, {})
    checkpointer.save(snapshot)
    session = model.open_session(16000, 1, checkpointer=checkpointer, **scenario.options)
    try:
        for operation in scenario.before:
            if isinstance(operation, np.ndarray):
                assert session.replaying
                session.feed(operation)
        assert not session.replaying
    except BaseException:
        session.close()
        raise
    return session


def restore(model: Model, scenario: Scenario, path: Path, snapshot: StreamSnapshot) -> list[Any]:
    """Return what is observed in a restored stream."""
    with closing(reopen(model, scenario, path, snapshot)) as session:
        return observed(session, scenario.after)


def values(snapshot: StreamSnapshot) -> Any:
    arrays = {
        (part, name): (array.dtype.str, array.shape, array.tolist())
        for part, saved in snapshot.parts.items()
        for name, array in saved.items()
    }
    return snapshot.samples, snapshot.digest, arrays


@pytest.mark.parametrize("name", SCENARIOS)
def test_restored_stream_continues_like_the_saved_one(model: Model, tmp_path: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    snapshot, expected = save(model, scenario, tmp_path / "state")
    with model.stream():  # the restored stream has another slot
        with closing(reopen(model, scenario, tmp_path / "state", snapshot)) as session:
            assert values(session.save()) == values(snapshot)
        found = restore(model, scenario, tmp_path / "state", snapshot)
    assert found[scenario.pending :] == expected[scenario.pending :]


# Values that are checked when they are loaded, and the scenarios in which another value is accepted.
# Within digital silence a recording is complete and the next one has not begun.
DURING_SILENCE = {"within digital silence", "at the beginning of digital silence"}
CHECKED: dict[str, set[str]] = {
    "chunker.counts[0]": set(),
    **dict.fromkeys((f"chunker.counts[{i}]" for i in (1, 2, 4, 6)), DURING_SILENCE),
    "chunker.counts[3]": set(),
    "chunker.counts[5]": set(),
    "endpoint.counts[0]": set(),
    # The slot is reset before its next step.
    "slot.position": {"after digital silence"},
    "slot.phrases[first]": {"after digital silence", *DURING_SILENCE},
    "vad.counts[0]": set(),
}


def leaves(snapshot: StreamSnapshot) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """Yield name, part, array and index of saved values: of long arrays, three of them."""
    for part, arrays in snapshot.parts.items():
        for name, array in arrays.items():
            if array.size < 9:
                places = {at: f"[{at}]" if array.ndim else "" for at in range(array.size)}
            else:
                places = {0: "[first]", array.size // 2: "[middle]", array.size - 1: "[last]"}
            for at, place in places.items():
                yield f"{part}.{name}{place}", part, name, tuple(map(int, np.unravel_index(at, array.shape)))


def another(name: str, value: Any) -> Any:
    """Return another value of a saved field, one that is possible if the field is not checked against others."""
    if "sizes" in name:
        return 560 if value == 1120 else 1120
    if "prompts" in name:
        return {0: 3, 3: 4, 4: 0}[value]
    if isinstance(value, bool) or name in ("guard.counts[1]", "endpoint.counts[3]", "vad.counts[2]"):
        return 1 - value
    return value + (6000 if name == "vad.counts[1]" else 1)


def changed(snapshot: StreamSnapshot, part: str, name: str, array: np.ndarray | None) -> StreamSnapshot:
    """Return the snapshot with another array, or without it."""
    arrays = {**snapshot.parts[part], name: array}
    parts = {**snapshot.parts, part: {key: value for key, value in arrays.items() if value is not None}}
    return dataclasses.replace(snapshot, parts=parts)


def with_value(snapshot: StreamSnapshot, part: str, name: str, index: tuple[int, ...], value: Any) -> StreamSnapshot:
    array = snapshot.parts[part][name].copy()
    array[index] = value
    return changed(snapshot, part, name, array)


def test_every_saved_value_is_checked_or_changes_a_later_result(model: Model, tmp_path: Path) -> None:
    outcomes: dict[str, set[str]] = {}
    for title, scenario in SCENARIOS.items():
        snapshot, _ = save(model, scenario, tmp_path / title)
        expected = restore(model, scenario, tmp_path / "state", snapshot)
        for leaf, part, name, index in leaves(snapshot):
            found = outcomes.setdefault(leaf, set())
            if leaf not in CHECKED and "differs" in found:
                continue
            value = another(leaf, snapshot.parts[part][name][index].item())
            try:
                observations = restore(
                    model, scenario, tmp_path / "state", with_value(snapshot, part, name, index, value)
                )
            except OptionError:
                found.add("rejected")
            else:
                assert leaf not in CHECKED or title in CHECKED[leaf], f"another {leaf} is accepted {title}"
                found.add("same" if observations[1:] == expected[1:] else "differs")
    assert outcomes.keys() >= CHECKED.keys() and len(outcomes) > 50
    without_effect = {leaf for leaf, found in outcomes.items() if not found & {"rejected", "differs"}}
    assert not without_effect


@pytest.mark.parametrize("title", ["within an utterance", "chunks held by the filter"])
def test_impossible_values_are_rejected(model: Model, tmp_path: Path, title: str) -> None:
    scenario, state = SCENARIOS[title], tmp_path / "state"
    snapshot, _ = save(model, scenario, tmp_path / "saved")

    def check(what: str, part: str, name: str, array: np.ndarray | None) -> None:
        with pytest.raises(OptionError, match=r"is damaged \(|the saved state is from another model"):
            restore(model, scenario, state, changed(snapshot, part, name, array))
            pytest.fail(f"{part}.{name} is accepted {what}")

    for part, arrays in snapshot.parts.items():
        for name, array in arrays.items():
            check("if it is missing", part, name, None)
            check("in another type", part, name, array.astype(np.uint16))
            check("in another shape", part, name, array[None])
            if array.ndim:
                check("with one value more", part, name, np.concatenate([array, array[:1] if array.size else [0]]))
    for leaf, part, name, index in leaves(snapshot):
        array = snapshot.parts[part][name]
        if array.dtype == np.float32:
            impossible: list[Any] = [np.nan, np.inf]
        elif array.dtype in (np.int64, np.int32) and part != "slot":
            impossible = [-2, 1 << 53 if array.dtype == np.int64 else model.manifest.decoder.vocabulary]
        else:
            continue
        for value in impossible:
            copy = array.copy()
            copy[index] = value
            check(f"with {value} in {leaf}", part, name, copy)
