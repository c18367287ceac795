"""`bench load`: its arithmetic on known measurements, its search on a scripted server, and a real run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")
pytest.importorskip("jiwer", reason="needs the bench extra")

from nemostream.benchmarks import load
from nemostream.benchmarks.accuracy import normalizer
from nemostream.benchmarks.harness import records
from nemostream.benchmarks.harness.corpora import CorpusUtterance, packaged
from nemostream.benchmarks.harness.paced_streams import Recording, RunResult, StreamResult
from nemostream.benchmarks.harness.plots import BarChart, CurveChart
from nemostream.benchmarks.harness.server_process import server_process
from nemostream.bundle import Bundle
from nemostream.clips import read_clip
from nemostream.errors import NemostreamError, OptionError, StreamError

HELDOUT = Path(__file__).parents[2] / "examples" / "demo_model" / "heldout" / "heldout.jsonl"
BASIC = normalizer("basic")
ENDS = [("one", 0.5), ("two", 1.0), ("three", 1.5)]
ITEM = load.Item(Recording(b"", 1.6), "One two three.", ENDS)
CASE = {"server": "s", "streams": 1, "phase": "probe"}


def stream(start: float = 5.0, latency: float = 0.1, final: float | None = 0.7, **changes: Any) -> StreamResult:
    """A stream whose words arrive `latency` seconds after their end, and the final `final` seconds after speech."""
    texts = [(start + 0.5 + latency, "one"), (start + 1.0 + latency, "one two")]
    texts.append((start + 1.5 + latency, "One two three."))
    found = StreamResult(0, start, start + 4.0, texts, None if final is None else start + 1.6 + final)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def run(*streams: StreamResult, **changes: Any) -> RunResult:
    passing = {"lateness": [0.001] * 100, "ticks": [0.001] * 100, "audio_seconds": 4.0, "max_open": 1}
    return RunResult(list(streams), **(passing | changes))


BASELINE = load.Baseline(["One two three."], {"partial": 100.0, "final": 700.0})


def evaluate(measured: RunResult, baseline: load.Baseline | None = BASELINE, **case: Any) -> records.Row:
    return load.evaluate(measured, [ITEM], CASE | case, 20.0, baseline, 500.0, BASIC)


# -- latencies ---------------------------------------------------------------------------------------------------------


def test_words_are_settled_when_they_no_longer_change() -> None:
    """ "hel" is not yet "hello"; "to" is revised twice, and counts from its last change; case does not matter."""
    texts = [(1.0, "hel"), (2.0, "Hello two"), (3.0, "hello to"), (4.0, "hello two you"), (5.0, "Hello, to you.")]
    assert load.settled_words(texts) == [("hello", 2.0), ("to", 5.0), ("you", 4.0)]
    assert load.settled_words([]) == []


def test_words_are_compared_without_case_and_punctuation() -> None:
    """Characters of scripts without spaces are words; the vowel signs of Hindi are kept."""
    texts = [(1.0, "ÜBER-fluß, 中"), (2.0, "über fluß 中文。 दिन -")]
    assert load.settled_words(texts) == [("über", 1.0), ("fluß", 1.0), ("中", 1.0), ("文", 2.0), ("दिन", 2.0)]


def test_latency_of_words_that_the_alignment_has() -> None:
    """A word that the server has not, and one that only the server has, are not timed."""
    measured = StreamResult(0, 10.0, 14.0, [(10.8, "uh one"), (12.0, "uh one three")])
    assert load.word_latencies(measured, ENDS) == [
        (pytest.approx(10.5), pytest.approx(0.3)),
        (pytest.approx(11.5), pytest.approx(0.5)),
    ]


def test_latencies_of_a_run() -> None:
    values = evaluate(run(stream(), stream(9.0, 0.3, 0.9)))
    assert values["ms"]["partial"] == pytest.approx([100.0] * 3 + [300.0] * 3)
    assert values["ms"]["final"] == pytest.approx([700.0, 900.0])
    assert values["values"]["passed"] and values["values"]["failures"] == []
    assert values["values"]["matched_words"] == 1.0 and values["values"]["finals_by_request"] == 0


def test_only_times_between_settling_and_the_end_count() -> None:
    """The first three seconds and the time after the end of the run are not timed; the unloaded run is whole."""
    early, late = stream(1.9), stream(18.7)
    row = evaluate(run(early, late, max_open=1))
    assert len(row["ms"]["partial"]) == 1 + 2  # ends at 3.4; 19.2 and 19.7
    assert len(row["ms"]["final"]) == 1  # speech ends at 3.5 and 20.3
    assert row["values"]["texts"] == 2
    row = evaluate(run(early, late), baseline=None)
    assert len(row["ms"]["partial"]) == 6 and len(row["ms"]["final"]) == 2


def test_finals_after_the_end_of_the_audio_are_by_request() -> None:
    row = evaluate(run(stream(final=2.4), stream(final=2.3)))
    assert row["values"]["finals_by_request"] == 1  # the audio ends 2.4 s after speech


def test_an_alignment_of_another_text_gives_no_partial_latency() -> None:
    other = stream(texts=[(6.0, "four five one")])
    row = evaluate(run(other))
    assert "partial" not in row["figures"] and row["values"]["matched_words"] == pytest.approx(0.333)


# -- accuracy, equality and failures -----------------------------------------------------------------------------------


def test_word_error_rate_and_equality() -> None:
    """A recording counts once, with the mean of its errors, however often it was sent."""
    items = [ITEM, load.Item(Recording(b"", 1.0), "four", [("four", 0.9)])]
    wrong = stream(texts=[(6.0, "one too three")])
    four = StreamResult(1, 5.0, 9.0, [(6.0, "four")], 6.5)
    baseline = load.Baseline(["One two three.", "five"], {})
    row = load.evaluate(run(stream(), stream(), stream(), wrong, four), items, CASE, 20.0, baseline, 500.0, BASIC)
    assert row["values"]["by_utterance"] == [[0.25, 3], [0, 1]] and row["values"]["wer"] == pytest.approx(0.25 / 4)
    assert (row["values"]["texts"], row["values"]["differing"]) == (5, 2)


@pytest.mark.parametrize(
    ("measured", "failure"),
    [
        (run(stream(latency=0.6)), None),
        (run(stream(latency=0.601)), "p95 of speech to text is 601 ms, unloaded 100 ms"),
        (run(stream(final=1.201)), "p95 of end of speech to final is 1201 ms, unloaded 700 ms"),
        (run(stream(), stream(error="full")), "1 failed stream, first: full"),
        (run(stream(final=None)), "no finals"),
        (run(stream(texts=[(6.0, "four five one")])), "only 1 of 3 words were received"),
        (run(stream(), max_open=0), "only 0 streams were open at the same time"),
        (run(stream(), blocked=[0.01]), None),
        (run(stream(), blocked=[0.01, 0.03]), "the server did not accept 2 messages in time"),
        (run(stream(5.0, 0.0), stream(9.0, 0.25), stream(13.0, 0.25)), None),
        (run(stream(5.0, 0.0), stream(9.0, 0.251), stream(13.0, 0.251)), "the partial latency grew by 251 ms"),
    ],
)
def test_failures(measured: RunResult, failure: str | None) -> None:
    values = evaluate(measured)["values"]
    assert values["failures"] == ([failure] if failure else []) and values["passed"] == (failure is None)


def test_errors_and_disconnects_are_counted() -> None:
    lost = stream(error="gone", disconnected=True)
    values = evaluate(run(stream(), lost, lost, stream(error="full")))["values"]
    assert (values["errors"], values["disconnects"], values["messages"]) == (1, 2, ["gone", "full"])
    assert values["texts"] == 1


@pytest.mark.parametrize("late", ["lateness", "ticks"])
def test_a_late_generator_has_no_figures(late: str) -> None:
    assert evaluate(run(stream(), **{late: [0.0] * 98 + [0.02] * 2}))["values"]["valid"]
    row = evaluate(run(stream(), **{late: [0.0] * 98 + [0.021] * 2}))
    assert row["figures"] == row["ms"] == {} and not row["values"]["passed"] and not row["values"]["valid"]
    assert row["values"]["failures"] == ["the load generator was late (p99 21 ms)"] and "wer" not in row["values"]


def test_cost() -> None:
    assert load.cost(2.5, 50) == 50.0  # 1,000 stream hours are 20 hours of the machine


# -- search ------------------------------------------------------------------------------------------------------------


class Generator:
    """Measures a server that serves `capacity` streams; more than that are late by a second."""

    capacity, on_time, errors_above = 37, 1000, 1000
    runs: list[tuple[int, float]]

    def __init__(self, target: str, recordings: Any, packet: float, processes: int) -> None:
        assert (target, packet, processes) == ("sherpa+ws://host:1", 0.04, 1)
        type(self).runs, self.recordings = [], recordings

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *error: object) -> None: ...

    def run(self, streams: int, seconds: float, *, seed: int = 0, once: bool = False) -> RunResult:
        self.runs.append((streams, seconds))
        latency = 0.1 if streams <= self.capacity else 1.1
        end = self.recordings[0].speech_end
        words = [(5.0 + end + latency, CLIP_WORDS)]
        found = StreamResult(0, 5.0, 5.0 + end + 2.5, words, 5.0 + end + 0.6)
        if streams > self.errors_above and not once:
            found.error = "full"
        lateness = 0.0 if streams <= self.on_time else 0.05
        return RunResult([found], [lateness], [0.0], [], audio_seconds=10.0 * streams, max_open=streams)


CLIP_WORDS = "after the tone say your busy message and then press the pound key"


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> type[Generator]:
    for name in ("capacity", "on_time", "errors_above"):
        monkeypatch.setattr(Generator, name, getattr(Generator, name))
    monkeypatch.setattr(load, "Generator", Generator)
    return Generator


def measure(bundle: Bundle, **options: Any) -> records.Record:
    utterances = packaged(bundle.manifest)
    return load.measure_load("sherpa+ws://host:1", utterances, bundle, **({"normalise": "basic"} | options))


def test_the_largest_number_is_held_for_two_minutes(demo_bundle: Bundle, generator: Any) -> None:
    result = measure(demo_bundle, price=0.74, label="sherpa")
    assert [number for number, _ in generator.runs] == [1, 8, 16, 32, 64, 64, 48, 48, 40, 40, 36, 38, 38, 37, 37]
    found = result["method"]["streams"]
    assert found == 37 and generator.runs[-1] == (37, 120.0)
    hold = result["rows"][-1]
    assert hold["case"] == {"server": "sherpa", "streams": found, "phase": "hold"} and hold["values"]["passed"]
    assert hold["values"]["cost_per_1000_stream_hours"] == pytest.approx(740 / found)
    assert result["method"]["delay_ms"] == 220  # of the packaged model
    assert result["rows"][0]["case"]["phase"] == "unloaded" and result["rows"][0]["values"]["wer"] == 0
    text = load.show(result)
    assert text.count("\n| hold |") == 1 and f"sherpa: {found} real-time streams, speech to text p95" in text
    assert json.loads(json.dumps(result)) == result


def test_a_late_generator_that_limits_the_search_is_an_error(demo_bundle: Bundle, generator: Any) -> None:
    generator.on_time = 20
    with pytest.raises(NemostreamError, match=r"was late with 2\d streams: p99 50 ms.*--processes.*20 streams"):
        measure(demo_bundle)


def test_a_late_generator_above_the_limit_of_the_server_is_no_error(demo_bundle: Bundle, generator: Any) -> None:
    generator.on_time = 40
    result = measure(demo_bundle)
    assert 36 <= result["method"]["streams"] <= 37
    late = [row for row in result["rows"] if not row["values"]["valid"]]
    assert late and not any(row["figures"] for row in late)


def test_a_late_generator_without_load_or_with_given_numbers(demo_bundle: Bundle, generator: Any) -> None:
    generator.on_time = 5
    with pytest.raises(NemostreamError, match="late with 6 streams"):
        measure(demo_bundle, streams=[6, 7], seconds=10.0)
    result = measure(demo_bundle, streams=[4, 6], seconds=10.0)
    assert result["method"]["streams"] == 4 and "no: the load generator was late" in load.show(result)
    assert [bool(row["figures"]) for row in result["rows"]] == [True, True, False]
    generator.on_time = 0
    with pytest.raises(NemostreamError, match="late with 1 stream:"):
        measure(demo_bundle)


def test_no_number_passes(demo_bundle: Bundle, generator: Any) -> None:
    generator.errors_above = 0
    result = measure(demo_bundle)
    assert result["method"]["streams"] == 0 and [number for number, _ in generator.runs] == [1, 8, 8, 4, 4, 2, 2, 1, 1]
    assert "No number of streams passed" in load.show(result) and "first: full" in load.show(result)


def test_a_server_that_fails_without_load(demo_bundle: Bundle, generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> RunResult:
        return run(stream(error="ConnectionRefusedError: no server"))

    monkeypatch.setattr(generator, "run", failing)
    with pytest.raises(StreamError, match=r"failed without load: ConnectionRefusedError: no server; check .* TARGET"):
        measure(demo_bundle)
    monkeypatch.setattr(generator, "run", lambda *arguments, **options: run(stream(texts=[], final=None)))
    with pytest.raises(StreamError, match="no text without load"):
        measure(demo_bundle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 60.0}, "seconds is 60; a hold takes at least 120 s"),
        ({"packet_ms": 0}, "must be positive"),
        ({"streams": [4, 0]}, "must be positive"),
        ({"price": 0.0}, "the price must be positive"),
        ({"pids": [2**22 + 1]}, "there is no process 4194305"),
        ({"normalise": "x"}, "normalizer"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str, demo_bundle: Bundle, generator: Any) -> None:
    with pytest.raises(OptionError, match=message):
        measure(demo_bundle, **options)


def test_alignment(demo_bundle: Bundle) -> None:
    """Recordings begin after a lead and end with the pause; the ends of words move with the lead."""
    clip = read_clip("clip", 16000)
    utterances = [CorpusUtterance(clip, "a"), CorpusUtterance(clip, "b")]
    first, second = load.align(utterances, demo_bundle, 16000, pause=1.0)
    assert [word for word, _ in first.ends] == CLIP_WORDS.split()
    assert [end + 0.28 for _, end in first.ends] == pytest.approx([end for _, end in second.ends])
    assert second.recording.speech_end == pytest.approx(first.recording.speech_end + 0.28)
    assert len(first.recording.pcm) == 2 * (len(clip) + 16000) and len(clip) / 16000 >= first.recording.speech_end
    samples = np.frombuffer(second.recording.pcm, "<i2")[4480 : 4480 + len(clip)]
    assert np.abs(samples - 32768 * clip).max() <= 1
    (earlier,) = load.align(utterances[:1], demo_bundle, 16000, pause=1.0, delay_ms=80)
    # The end of the last word is that of the recording.
    assert [end + 0.08 for _, end in earlier.ends[:-1]] == pytest.approx([end for _, end in first.ends[:-1]])
    (resampled,) = load.align(utterances[:1], demo_bundle, 24000, pause=1.0)
    assert len(resampled.recording.pcm) == pytest.approx(1.5 * len(first.recording.pcm), abs=4)
    assert resampled.recording.speech_end == first.recording.speech_end and resampled.ends == first.ends


# -- CPU time ----------------------------------------------------------------------------------------------------------


def test_usage_per_audio_hour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two GPUs of 50 and 25 % for 8 seconds are 6 GPU seconds."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 50\necho 25\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cpu, now = iter([100.0, 103.0]), iter([1000.0, 1008.0])
    monkeypatch.setattr(load, "descendants", lambda pids: [os.getpid()])
    monkeypatch.setattr(load, "cpu_seconds", lambda pid: next(cpu))
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with load.Usage([os.getpid()]) as usage:
        while not usage._utilisations:
            pass
    monkeypatch.undo()
    assert usage.per_audio_hour(60.0) == {"cpu_seconds_per_audio_hour": 180.0, "gpu_seconds_per_audio_hour": 360.0}
    with load.Usage([]) as usage:
        pass
    assert usage.per_audio_hour(60.0) == {}


# -- report ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(demo_bundle: Bundle, generator: Any) -> list[records.Record]:
    first = measure(demo_bundle, label="nemostream fp32", price=1.0)
    generator.capacity = 12
    return [measure(demo_bundle, label="sherpa-onnx fp32", price=1.0), first]


def test_comparison(results: list[records.Record]) -> None:
    result = load.compare(results)
    text, charts = load.show(result), load.charts(result)
    lines = [line for line in text.splitlines() if line.startswith("| nemostream fp32 | 3") or "| sherpa-onnx" in line]
    assert lines[0].startswith("| nemostream fp32 |") and lines[1].startswith("| sherpa-onnx fp32 | 12 |")
    bars, curves = charts["servers"], charts["latency"]
    assert result["model"] == {"name": "2 servers"}
    assert isinstance(bars, BarChart) and bars.rows == ["nemostream fp32", "sherpa-onnx fp32"]
    assert bars.emphasised == ["nemostream fp32"] and bars.title.endswith("times as many as sherpa-onnx fp32")
    streams, partial, final = (panel.bars[1] for panel in bars.panels)
    assert streams and streams.parts == [12] and partial and partial.parts[0] > 0 and final and final.parts == [0.6]
    assert isinstance(curves, CurveChart) and curves.title == bars.title
    given = [each | {"method": each["method"] | {"searched": False}} for each in results]
    compared = load.compare(given)  # not the capacities of the servers
    assert {name: chart.title for name, chart in load.charts(compared).items()} == {
        "latency": "Latencies of 2 servers by number of streams"
    }
    assert "The numbers of streams were given: the servers may hold more" in load.show(compared)
    assert "were given" not in load.show(result)
    assert [curve.label for curve in curves.panels[0].curves if curve.label] == ["sherpa-onnx fp32", "nemostream fp32"]


def test_servers_of_the_same_model(results: list[records.Record]) -> None:
    same = [result | {"model": {"name": "demo"}} for result in results]
    assert load.compare(same)["model"] == {"name": "demo"}


def test_results_that_cannot_be_compared(results: list[records.Record]) -> None:
    with pytest.raises(OptionError, match="two results have the label 'nemostream fp32'"):
        load.compare([results[1], results[1]])
    other = results[0] | {"method": results[0]["method"] | {"corpus": "x"}}
    with pytest.raises(OptionError, match="differ in corpus"):
        load.compare([other, results[1]])
    with pytest.raises(OptionError, match="only results of `nemostream bench load`"):
        load.compare([results[0] | {"benchmark": "serve"}])


def test_plot_of_one_server(results: list[records.Record]) -> None:
    chart = load.charts(results[0])["latency"]
    assert isinstance(chart, CurveChart) and chart.title.startswith("sherpa-onnx fp32: 12 real-time streams, ")
    assert [panel.heading for panel in chart.panels] == ["speech to text", "end of speech to final"]
    assert [curve.label for curve in chart.panels[0].curves if curve.label] == ["p99", "p95", "p50"]
    styles = {curve.style for curve in chart.panels[0].curves}
    assert styles == {"plain", "points", "crosses"}


# -- command -----------------------------------------------------------------------------------------------------------


def test_options_reach_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    def capture(*given: Any, **options: Any) -> None:
        found.update(options, given=given)

    monkeypatch.setattr(load, "measure_load", capture)
    monkeypatch.setattr(load.command, "run", lambda measure, options: measure())
    load.main(["riva://h:1"])
    target, utterances, bundle = found.pop("given")
    assert (target, len(utterances), bundle.manifest.name) == ("riva://h:1", 1, "demo")
    assert found.pop("progress") is records.report_progress
    assert found == {
        "label": None,
        "streams": None,
        "first_streams": 8,
        "max_streams": 1024,
        "seconds": 120.0,
        "probe_seconds": 15.0,
        "limit_ms": 500.0,
        "packet_ms": 40,
        "pause": 2.5,
        "delay_ms": None,
        "processes": 1,
        "pids": [],
        "price": None,
        "normalise": "english",
    }
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"audio_filepath": "a", "text": "a"}\n' * 3)
    line = "riva://h:1 --label l --streams 2 3 --first-streams 4 --max-streams 5 --seconds 6 --probe-seconds 7"
    line += (
        " --limit-ms 8 --packet-ms 9 --pause 1 --delay-ms 2 --processes 10 --pid 11 12 --price 13 --normalizer basic"
    )
    load.main([*line.split(), "--manifest", str(manifest), "--recordings", "2"])
    assert len(found.pop("given")[1]) == 2
    assert list(found.values())[:-1] == ["l", [2, 3], 4, 5, 6.0, 7.0, 8.0, 9, 1.0, 2, 10, [11, 12], 13.0, "basic"]
    for arguments in ([], ["riva://h:1", "--compare", "a.json"]):
        with pytest.raises(SystemExit):
            load.main(arguments)


def test_a_real_server(demo_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """All texts under load are those of the unloaded run."""
    # On a busy machine the generator is late; here only texts and counts are tested.
    monkeypatch.setattr(load, "MAX_LATENESS", float("inf"))
    command = [sys.executable, "-m", "nemostream", "serve", "--bundle", str(demo_bundle.path), "--no-measure"]
    with server_process([*command, "--port", "0", "--grpc-port", "-1"]) as (process, url):
        line = f"nemostream+ws{url[4:]} --streams 3 --seconds 1 --pause 1.6 --normalizer basic --manifest {HELDOUT}"
        line += " --recordings 1"
        load.main([*line.split(), "--pid", str(process.pid), "--label", "ours", "--out", str(tmp_path)])
    result = records.read(tmp_path / "load.json")
    unloaded, hold = result["rows"]
    for row in (unloaded, hold):
        values = row["values"]
        assert values["valid"] and (values["errors"], values["disconnects"]) == (0, 0)
        assert values["by_utterance"] == unloaded["values"]["by_utterance"] and values["matched_words"] > 0.5
        assert values["cpu_seconds_per_audio_hour"] > 0
    assert (unloaded["values"]["texts"], hold["values"]["texts"], hold["values"]["differing"]) == (1, 3, 0)
    assert len(unloaded["ms"]["partial"]) > 2 and len(unloaded["ms"]["final"]) == 1
    assert unloaded["values"]["finals_by_request"] == 0  # the server ends utterances after 0.8 s of silence
    assert (tmp_path / "load-latency.svg").exists() and "| hold | 3 |" in capsys.readouterr().out
