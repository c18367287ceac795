"""Texts and times of partials and finals, from streams whose events arrive at known packets, and from real streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nemostream
from nemostream.benchmarks import finals, report
from nemostream.benchmarks.finals import Mode, Take, Transcript
from nemostream.benchmarks.harness import corpora, records
from nemostream.bundle import Bundle
from nemostream.errors import OptionError
from nemostream.runtime.text.endpointing import Endpoint

pytest.importorskip("jiwer", reason="needs the bench extra")
pytest.importorskip("whisper_normalizer", reason="needs the bench extra")

HELD_OUT = Path(__file__).parents[2] / "examples" / "demo_model" / "heldout" / "heldout.jsonl"
RATE, PACKET = 16000, 320  # Hz, samples of 20 ms


def test_modes() -> None:
    assert [Mode.of("80"), Mode.of("80+1120")] == [Mode(80, None), Mode(80, 1120)]
    assert [str(Mode(80)), str(Mode(160, 560))] == ["80", "160+560"]
    for text in ("", "80+", "80+560+1120", "fast", "-80"):
        with pytest.raises(OptionError, match="must be a chunk size, or two"):
            Mode.of(text)


@pytest.mark.parametrize(
    ("before", "after", "revised"),
    [
        ("", "one", 0),
        ("one tw", "one two three", 0),  # the last word grew
        ("one two", "one two", 0),
        ("one two", "one too", 1),
        ("one two three", "one too three four", 2),  # all words from the first change on
        ("one two", "one", 1),
        ("one t", "one", 1),
        ("on two", "one two", 2),  # only the last word may grow
        ("one two", "", 2),
    ],
)
def test_revised_words(before: str, after: str, revised: int) -> None:
    assert finals.revised_words(before, after) == revised


def test_end_of_speech() -> None:
    """Blocks of 20 ms; 0.02 is 34 dB below 1, and 0.04 is 28 dB below."""
    clip = np.repeat(np.array([0.0, 1.0, 0.04, 0.02, 0.02], np.float32), PACKET)
    assert finals.speech_end(clip, RATE) == 3 * PACKET
    assert finals.speech_end(clip[: 2 * PACKET + 100], RATE) == 2 * PACKET + 100  # a shorter last block
    assert finals.speech_end(np.zeros(1000, np.float32), RATE) == finals.speech_end(clip[:0], RATE) == 0


def test_takes() -> None:
    """A recording lies between noise; the same recording has the same noise at each lead."""
    clip = np.sin(np.arange(RATE) / 10).astype(np.float32)
    clip[-1600:] = 0
    take = finals.make_take(clip, "text", 0.25, RATE)
    assert (take.speech_end, take.recording_end, take.text) == (4000 + RATE - 1600, 4000 + RATE, "text")
    assert np.array_equal(take.samples[4000 : 4000 + RATE], clip)
    around = np.concatenate([take.samples[:4000], take.samples[4000 + RATE :]])
    assert len(around) == 4000 + finals.PAUSE * RATE and around.std() == pytest.approx(1e-3, rel=0.02)
    noisy = finals.make_take(clip, "text", 0.25, RATE, 10, 3)
    assert np.array_equal(noisy.samples[4000 : 4000 + RATE], corpora.add_noise(clip, 10, 3))
    around = np.concatenate([noisy.samples[:4000], noisy.samples[4000 + RATE :]])
    assert around.var() == pytest.approx((clip**2).mean() / 10, rel=0.03)
    takes = finals._takes([(clip, "a"), (clip[:8000], "b")], (0.0, 0.1), RATE, False)
    assert [(take.text, take.recording_end) for take in takes] == [
        ("a", RATE),
        ("b", 8000),
        ("a", RATE + 1600),
        ("b", 9600),
    ]


def test_each_recording_has_all_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(finals, "make_take", lambda *arguments: made.append(arguments))
    finals._takes([(np.zeros(1, np.float32), text) for text in "abcde"], (0, 1, 2, 3), RATE, True)
    assert len(made) == 20
    for text in "abcde":
        assert {decibels for _, each, _, _, decibels, _ in made if each == text} == set(finals.DECIBELS)
        assert [seed for _, each, _, _, _, seed in made if each == text] == [0, 1, 2, 3]


class Stream:
    """Returns the events of `script` by the number of the packet; each packet takes 3 ms, a request 7 ms."""

    def __init__(self, script: dict[int, list[tuple[str, str]]], clock: Any, options: dict[str, Any]) -> None:
        self.script, self.clock, self.options = script, clock, options
        self.packets: list[np.ndarray] = []
        self.requested_at = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def push_events(self, packet: np.ndarray) -> list[Any]:
        self.clock.sleep(0.003)
        self.packets.append(packet)
        return self._events(len(self.packets))

    def finish_events(self) -> list[Any]:
        self.clock.sleep(0.005)
        return self._events(-1)

    def end_utterance(self) -> list[Any]:
        self.clock.sleep(0.007)
        self.requested_at = sum(map(len, self.packets))
        return []

    def _events(self, number: int) -> list[Any]:
        return [SimpleNamespace(kind=kind, text=text) for kind, text in self.script.get(number, [])]


def a_model(script: dict[int, list[tuple[str, str]]], clock: Any) -> Any:
    streams: list[Stream] = []

    def stream(**options: Any) -> Stream:
        streams.append(Stream(script, clock, options))
        return streams[-1]

    manifest = SimpleNamespace(features=SimpleNamespace(sample_rate=RATE))
    return SimpleNamespace(stream=stream, streams=streams, manifest=manifest)


def a_take(packets: float, speech_end: int = 0, recording_end: int = 0, text: str = "") -> Take:
    return Take(np.arange(round(packets * PACKET), dtype=np.float32), speech_end, recording_end, text)


def test_texts_are_visible_from_their_packet_on(clock: Any) -> None:
    script = {
        2: [("partial", "one")],
        4: [("partial", "one tow")],
        5: [("partial", "one two th"), ("backchannel", "ignored")],  # one word revised
        6: [("final", "one too three"), ("end", ""), ("partial", "fo")],  # two words
        8: [("final", "four"), ("end", "")],
    }
    model, take = a_model(script, clock), a_take(9.5)
    found = finals.run_stream(model, take, Mode(80, 560), clock)
    assert found.finals == ["one too three", "four"] and found.revised == 3
    assert [(since, found.at(since)) for since in (0.039, 0.04, 0.1, 0.12, 0.159, 0.16, 9.0)] == [
        (0.039, ""),
        (0.04, "one"),
        (0.1, "one two th"),
        (0.12, "one too three fo"),
        (0.159, "one too three fo"),
        (0.16, "one too three four"),
        (9.0, "one too three four"),
    ]
    assert (found.final_audio, found.final_seconds) == (pytest.approx(0.16), pytest.approx(0.003))
    (stream,) = model.streams
    assert np.array_equal(np.concatenate(stream.packets), take.samples)
    assert {len(packet) for packet in stream.packets[:-1]} == {PACKET} and len(stream.packets[-1]) == PACKET // 2
    expected = {"sample_rate": RATE, "chunk_ms": 80, "final_chunk_ms": 560, "endpoint": Endpoint()}
    assert stream.options == expected


@pytest.mark.parametrize("packets", [3, 3.5])
def test_finals_at_the_end_of_the_audio(packets: float, clock: Any) -> None:
    model = a_model({2: [("partial", "on")], -1: [("final", "one"), ("end", "")]}, clock)
    found = finals.run_stream(model, a_take(packets), Mode(80), clock)
    assert found.finals == ["one"] and found.at(packets * 0.02) == "one" and found.revised == 0
    assert found.final_seconds == pytest.approx(0.008)  # the last push, and the end


def test_time_of_a_request(clock: Any) -> None:
    model = a_model({}, clock)
    assert finals.time_request(model, a_take(9, recording_end=1000), Mode(160), clock) == pytest.approx(0.007)
    (stream,) = model.streams
    assert stream.requested_at == 1000 and stream.options["chunk_ms"] == 160


def test_requests_are_timed_for_the_first_recordings(clock: Any) -> None:
    model, takes = a_model({1: [("final", "a")]}, clock), [a_take(2, recording_end=PACKET)] * 3
    found = finals.transcribe(model, takes, Mode(80), timed=True, requests=2, clock=clock)
    assert [each.requested_seconds for each in found] == pytest.approx([0.007, 0.007, 0.0])
    assert len(model.streams) == 1 + 3 + 2  # one to warm up


def test_figures_of_a_row() -> None:
    """Two recordings at two leads; speech ends at 1 s."""
    takes = [a_take(1, RATE, RATE, text) for text in ("a b", "c d e", "a b", "c d e")]
    visible = [(0.5, "a"), (1.4, "a b"), (1.6, "a x")]
    transcripts = [
        Transcript(["a", "x"], 2, visible, 2.0, 0.010, 0.020),  # one error; none is visible at 0.5 s
        Transcript(["c d e"], 0, [(0.9, "c d e")], 2.5, 0.030, 0.040),
        Transcript(["a b"], 1, [(1.7, "a b")], 1.5, 0.050, 0.0),  # nothing at 0.5 s: two errors
        Transcript([], 0, [], 0.0, 0.0, 0.0),  # no final: three errors, and no time
    ]
    normalise = finals.normalizer("basic")
    row = finals._row({"set": "clean"}, takes, transcripts, normalise, 2, RATE, True)
    values = row["values"]
    assert values["by_utterance"] == [[1, 4], [3, 6]] and values["partial_by_utterance"] == [[2, 4], [3, 6]]
    assert (values["wer"], values["errors"], values["words"]) == (0.4, 4, 10)
    assert (values["streams"], values["utterances"]) == (4, 4) and values["revised"] == 3 / 7
    # Errors at 0, 0.1, ... s: 1 + 0 + 2 + 3 until 1.4 s, one less until 1.6 s, one more, two less from 1.7 s.
    assert values["visible_wer"][:9] == [0.6, 0.6, 0.6, 0.6, 0.5, 0.5, 0.6, 0.4, 0.4]
    assert row["ms"] == {"final": [1010.0, 1530.0, 550.0], "requested": [20.0, 40.0]}
    assert values["audio_ms"] == {"p50": 1000.0, "p95": 1500.0, "p99": 1500.0}
    assert values["compute_ms"] == {"p50": 30.0, "p95": 50.0, "p99": 50.0}
    untimed = finals._row({"set": "noise"}, takes, transcripts, normalise, 2, RATE, False)
    assert untimed["ms"] == {} and "compute_ms" not in untimed["values"]


# -- with the packaged model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(demo_bundle: Bundle) -> records.Record:
    utterances = corpora.read_manifest(HELD_OUT)[:2]
    modes = ("80", "1120", "80+1120")
    return finals.measure_finals(demo_bundle, utterances, modes, leads=(0.0, 0.2), noise=True, normalise="basic")


def _expected(model: Any, takes: Sequence[Take], mode: Mode) -> list[str]:
    options: Any = {"chunk_ms": mode.chunk_ms, "final_chunk_ms": mode.final_chunk_ms}
    return [
        " ".join(event.text for event in model.listen(take.samples, **options) if event.kind == "final")
        for take in takes
    ]


def test_errors_are_those_of_the_finals(measured: records.Record, demo_bundle: Bundle) -> None:
    """The same audio pushed at once has the same finals."""
    utterances = corpora.read_manifest(HELD_OUT)[:2]
    clips = [(each.samples(RATE), each.text) for each in utterances]
    with nemostream.load() as model:
        for row in measured["rows"]:
            takes = finals._takes(clips, (0.0, 0.2), RATE, row["case"]["set"] == "noise")
            texts = _expected(model, takes, Mode.of(row["case"]["mode"]))
            found = finals.word_errors([take.text for take in takes], texts, finals.normalizer("basic"))
            assert (row["values"]["errors"], row["values"]["words"]) == (found["errors"], found["words"])


def test_times_follow_from_the_audio(measured: records.Record) -> None:
    """A final needs more than 800 ms of silence, and comes at the end of a chunk that is processed by then."""
    clean = {row["case"]["mode"]: row for row in measured["rows"] if row["case"]["set"] == "clean"}
    assert len(measured["rows"]) == 6 and not any(
        row["ms"] for row in measured["rows"] if row["case"]["set"] == "noise"
    )
    for row in clean.values():
        assert len(row["ms"]["final"]) == 4 and len(row["ms"]["requested"]) == 2
        assert min(row["ms"]["requested"]) > 0 and row["values"]["compute_ms"]["p50"] > 0
        assert row["values"]["visible_wer"][-1] == pytest.approx(row["values"]["wer"], abs=5e-5)
    # The accurate lane does not delay the final: the fast lane decides when it is complete.
    assert clean["80+1120"]["values"]["audio_ms"] == clean["80"]["values"]["audio_ms"]
    assert clean["1120"]["values"]["audio_ms"]["p50"] > clean["80"]["values"]["audio_ms"]["p50"]
    assert clean["80"]["values"]["revised"] == clean["1120"]["values"]["revised"] == 0


def test_report(measured: records.Record, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    text, _ = report.write_report([measured], tmp_path / "x.md")
    for part in ("Set *clean*: 2 recordings, 4 streams", "Set *noise*, white noise at 20, 15, 10, 5 dB: 2 recordings"):
        assert part in text
    assert text.count("| 80 + 1120 ms |") == 3  # both sets, and the times
    for name in ("finals", "visible"):
        assert (tmp_path / f"x-{name}.png").exists() and (tmp_path / f"x-{name}.svg").exists()
    changed = {**measured, "rows": [dict(row) for row in measured["rows"]]}
    assert {change.verdict for change in report.compare(changed, measured)} == {""}


def test_invalid_mode(demo_bundle: Bundle) -> None:
    clips = corpora.packaged(demo_bundle.manifest)
    with pytest.raises(OptionError, match="mode is 'fast'"):
        finals.measure_finals(demo_bundle, clips, ("80", "fast"))
    with pytest.raises(OptionError, match="81"):
        finals.measure_finals(demo_bundle, clips, ("81",))
