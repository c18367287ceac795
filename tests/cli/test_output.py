"""`Output`: every field of the transcript, targets and their checks, encodings, failed writes."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemostream.cli import output as module
from nemostream.cli.output import Output, check_writable
from nemostream.cli.standard_streams import write_all
from nemostream.errors import NemostreamError, OptionError
from nemostream.runtime.text.events import Event
from nemostream.runtime.text.formats import Format
from nemostream.runtime.text.words import Result, Token, Word


def tokens(*words: str, start: float = 1.0, tag: str | None = None) -> tuple[Token, ...]:
    found = [
        Token(10 + k, f" {word}", start + k, start + k + 0.08, -0.5 - k, 0.9 - k / 10) for k, word in enumerate(words)
    ]
    if tag:
        end = start + len(words)
        found.append(Token(99, "", end, end + 0.08, -0.25, 1.0, tag, tag=True))
    return tuple(found)


def final(*words: str, start: float = 1.0, tag: str | None = None) -> Event:
    text = " ".join(words)
    return Event("final", 0, text, text, start, start, 9.0, 560, tokens(*words, start=start, tag=tag), language=tag)


def result(*words: str, language: str | None = None) -> Result:
    return Result(" ".join(words), tokens(*words), 9.0, 560, True, language=language)


def row(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found = json.loads(capfd.readouterr().out)
    assert isinstance(found, dict)
    return found


# -- fields ------------------------------------------------------------------------------------------------------------


def normalize(words: Sequence[Word]) -> tuple[Word, ...]:
    return tuple(Word(word.text.upper(), word.start + 100, word.end, word.confidence) for word in words)


@pytest.mark.parametrize("itn", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_every_field_of_a_transcript(capfd: pytest.CaptureFixture[str], split: bool, itn: bool) -> None:
    """Utterances in German and French, one of white space (which is no word), and one without a language."""
    parts = [
        final("eins", "zwei", start=1.0, tag="de-DE"),
        final("trois", start=4.0, tag="fr-FR"),
        Event("final", 1, "", "", 6.0, 6.0, 9.0, 560, (Token(7, " ", 6.0, 6.08, -0.1, 0.5),)),
        final("four", start=7.0),
    ]
    options: Any = {"split_utterances": split, "itn": normalize if itn else None, "channel": 2}
    with Output(["x/a.wav"], Format.json, **options) as output:
        output.write("x/a.wav", parts, 9.0625, 160)
    shown, shift = (str.upper, 100) if itn else (str, 0)
    texts = ["eins", "zwei", "trois", "four"]
    starts, ends = [1.0, 2.0, 4.0, 7.0], [1.08, 2.08, 4.08, 7.08]
    confidences = [0.9, 0.8, 0.9, 0.9]
    languages = ["de-DE", "de-DE", "fr-FR", None] if not itn else [None] * 4
    expected: dict[str, Any] = {
        "file": "x/a.wav",
        "duration": 9.062,
        "text": shown("eins zwei trois four"),
        "words": [
            {"text": shown(text), "start": start + shift, "end": end, "confidence": confidence}
            | ({"language": language} if language else {})
            for text, start, end, confidence, language in zip(texts, starts, ends, confidences, languages, strict=True)
        ],
        "tokens": [
            {"id": t.id, "text": t.text, "time": t.time, "score": t.score, "confidence": round(t.confidence, 4)}
            for part in parts
            for t in part.tokens
        ],
        "chunk_ms": 160,
        "language": "fr-FR",
        "channel": 2,
    }
    if split:
        expected["utterances"] = [
            {"text": shown("eins zwei"), "start": 1.0, "end": 2.08, "language": "de-DE"},
            {"text": shown("trois"), "start": 4.0, "end": 4.08, "language": "fr-FR"},
            {"text": shown("four"), "start": 7.0, "end": 7.08},
        ]
    if itn:
        expected["spoken"] = "eins zwei trois four"
    assert row(capfd) == expected


def test_manifest_has_absolute_names(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, expected in (("a.wav", str(tmp_path / "a.wav")), ("-", "-"), ("microphone", "microphone")):
        for format, key in ((Format.manifest, expected), (Format.json, name)):
            Output([name], format).write(name, [result("one")], 9.0, 560)
            found = row(capfd)
            assert found.get("audio_filepath", found.get("file")) == key


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["a"], False, "one two\n"),
        (["a"], True, "one two\nthree\n"),
        (["a", "b"], False, "a: one two\n"),
        (["a", "b"], True, "a: one two\na: three\n"),
        (["a", "microphone"], False, "one two\n"),
    ],
)
def test_lines_of_text(
    names: list[str], split: bool, expected: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parts = [final("one", "two"), final("three", start=5.0)] if split else [result("one", "two")]
    Output(names, Format.text, split_utterances=split).write("a", parts, 9.0, 560)
    assert capfd.readouterr().out == expected
    with Output(names, Format.text, f"{tmp_path}/", split_utterances=split) as output:
        output.write("a", parts, 9.0, 560)
    assert (tmp_path / "a.txt").read_text() == expected.replace("a: ", "")  # the file's name identifies it


def test_empty_transcripts(capfd: pytest.CaptureFixture[str]) -> None:
    for names, split, expected in (
        (["a"], False, "\n"),
        (["a", "b"], False, "a: \n"),
        (["a"], True, ""),
        (["a", "b"], True, "a: \n"),
    ):
        Output(names, Format.text, split_utterances=split).write("a", [] if split else [result()], 9.0, 560)
        assert capfd.readouterr().out == expected
    output = Output(["a", "b", "microphone"], Format.text)
    output.write("microphone", [result("one")], 9.0, 560)
    assert capfd.readouterr().out == "one\n"


def test_utterances_are_written_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, two = final("one"), final("two", start=5.0)
    output = Output(["a"], Format.text, split_utterances=True, itn=normalize)  # type: ignore[arg-type]
    assert output.write_utterance("a", one) and output.write_utterance("a", two)
    assert capfd.readouterr().out == "ONE\nTWO\n"
    output.write("a", [one, two], 9.0, 560)
    assert capfd.readouterr().out == ""
    for names, format, out, split in (
        (["a"], Format.text, None, False),
        (["a"], Format.json, None, True),
        (["a", "b"], Format.text, None, True),  # the lines of several inputs would mix
        (["a"], Format.text, f"{tmp_path}/", True),
    ):
        assert not Output(names, format, out, split_utterances=split).write_utterance("a", one)
    assert capfd.readouterr().out == "" and list(tmp_path.iterdir()) == []
    with Output(["a", "microphone"], Format.text, str(tmp_path / "x"), split_utterances=True) as output:
        assert output.write_utterance("microphone", one) and output.write_utterance("a", two)
    assert (tmp_path / "x").read_text() == "one\ntwo\n"


# -- encodings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-16", "ascii", "latin-1", None])
def test_encoding_of_standard_output(encoding: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text has the encoding of the terminal, JSON is ASCII unless that is UTF-8, subtitles are always UTF-8."""
    text = "f\u00fcr \u4f60"
    for format in (Format.text, Format.json, Format.vtt):
        written = io.BytesIO()
        if encoding:
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
            output = Output(["a"], format)
            output.write("a", [result(text)], 9.0, 560)
            output.write("a", [result(text)], 9.0, 560)
            found = written.getvalue()
        else:  # a text stream without bytes, as of a notebook
            monkeypatch.setattr(sys, "stdout", io.StringIO())
            Output(["a"], format).write("a", [result(text)], 9.0, 560)
            found = sys.stdout.getvalue().encode("utf-8") * 2  # type: ignore[attr-defined]
        if format is Format.text:
            assert found == f"{text}\n{text}\n".encode(encoding or "utf-8", "backslashreplace")
        elif format is Format.json:
            lines = found.splitlines()
            assert [json.loads(line)["text"] for line in lines] == [text] * 2
            assert found.isascii() == (encoding not in ("utf-8", "UTF8"))
        else:
            assert text in found.decode("utf-8")


def test_files_are_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    for out in (str(tmp_path / "a.json"), f"{tmp_path}/folder/"):
        with Output(["a"], Format.json, out) as output:
            output.write("a", [result("f\u00fcr")], 9.0, 560)
    for path in (tmp_path / "a.json", tmp_path / "folder" / "a.json"):
        assert '"text": "f\u00fcr"' in path.read_text("utf-8")


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [None, "-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_has_several_names(out: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not opened again, which would overwrite a file that it is redirected to."""
    monkeypatch.chdir(tmp_path)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    with Output(["a"], Format.text, out) as output:
        output.write("a", [result("one")], 9.0, 560)
    assert written.getvalue() == b"one\n" and list(tmp_path.iterdir()) == []


def test_standard_output_must_be_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(OptionError, match="standard output is closed: give --out FILE"):
        Output(["a"], Format.text)
    for out in (str(tmp_path / "x"), f"{tmp_path}/"):
        with Output(["a"], Format.json, out) as output:
            output.write("a", [result("one")], 9.0, 560)


def is_open(path: Path) -> bool:
    """Return whether this process has the file open."""
    descriptors = os.listdir("/proc/self/fd")
    return str(path.resolve()) in [os.path.realpath(f"/proc/self/fd/{descriptor}") for descriptor in descriptors]


def test_file_is_overwritten_by_the_first_transcript(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("old content that is longer than the transcript")
    for path in (old, new):
        with Output(["a", "b"], Format.text, str(path)) as output:
            assert new.exists() is False and old.read_text().startswith(("old", "a: "))
            if path == new:
                continue
            output.write("a", [result("one")], 9.0, 560)
            assert path.read_text() == "a: one\n"
            output.write("b", [result("two")], 9.0, 560)
            assert is_open(path)
        assert not is_open(path)
    assert old.read_text() == "a: one\nb: two\n" and not new.exists()


def test_subtitles_need_a_file_per_recording(tmp_path: Path) -> None:
    for format in Format:
        for names, out in ((["a"], None), (["a", "b"], None), (["a", "b"], "x"), (["a", "b"], f"{tmp_path}/")):
            if format.one_per_file and len(names) > 1 and out in (None, "x"):
                with pytest.raises(OptionError, match=f"--format {format} needs one file per recording"):
                    Output(names, format, out)
            else:
                Output(names, format, out and str(tmp_path / out)).__exit__(None, None, None)


def test_targets_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is created; each conflict concerns a single input, whose index has an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.wav").write_text("recording")
    (tmp_path / "out").mkdir()
    for name in ("talk.json", "kept.json"):
        (tmp_path / "out" / name).write_text("old")
    (tmp_path / "out" / "d.json").mkdir()
    os.symlink(tmp_path / "b.wav", tmp_path / "out" / "c.json")
    names = ["x/talk.wav", "y/talk.mp3", "-", "b.wav", "c.wav", "d.wav", "talk.flac", "long" * 80, "e.wav"]
    with Output(names, Format.json, "out") as output:
        assert {index: str(error) for index, error in output.errors.items()} == {
            1: "x/talk.wav and y/talk.mp3 would both be written to out/talk.json; use another folder for y/talk.mp3.",
            4: "--out would overwrite b.wav.",
            5: "--out: out/d.json is a folder; give a file.",
            6: "x/talk.wav and talk.flac would both be written to out/talk.json; use another folder for talk.flac.",
            7: f"--out: out/{'long' * 80}.json cannot be written: File name too long.",
        }
        assert (tmp_path / "out" / "talk.json").read_text() == "old"
        for name in ("x/talk.wav", "-", "b.wav", "e.wav"):
            output.write(name, [result("one")], 9.0, 560)
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["b.json", "c.json", "d.json", "e.json", "kept.json", "stdin.json", "talk.json"]
    assert json.loads((tmp_path / "out" / "talk.json").read_text())["file"] == "x/talk.wav"
    assert (tmp_path / "out" / "kept.json").read_text() == "old"
    with Output(["a"], Format.text, "new/deep/") as output:
        assert (tmp_path / "new" / "deep").is_dir() and not output.errors


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/x.txt", "--out: there is no folder none for x.txt"),
        ("a.wav", "--out would overwrite a.wav"),
        ("link", "--out would overwrite a.wav"),
        ("a.wav/", "--out: cannot write into a.wav: File exists"),
        ("a.wav/x/", "--out: cannot write into a.wav/x: Not a directory"),
    ],
)
def test_targets_that_cannot_be_written(
    out: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_text("recording")
    os.link("a.wav", "link")
    with pytest.raises(OptionError, match=f"^{message}"):
        Output(["-", "a.wav", "gone.wav"], Format.text, out)
    assert (tmp_path / "a.wav").read_text() == "recording" and len(list(tmp_path.iterdir())) == 2


def test_check_of_a_file_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, fifo = tmp_path / "old", tmp_path / "new", tmp_path / "fifo"
    old.write_text("old")
    os.mkfifo(fifo)
    for path in (old, new, fifo):  # opening the pipe would wait for a reader
        check_writable(path, "--x")
    assert old.read_text() == "old" and not new.exists()
    with pytest.raises(OptionError, match=f"--x: {tmp_path} is a folder; give a file"):
        check_writable(tmp_path, "--x")
    with pytest.raises(OptionError, match=r"--x: .* cannot be written: File name too long"):
        check_writable(tmp_path / ("x" * 300), "--x")
    checked: list[Any] = []
    monkeypatch.setattr(os, "access", lambda path, mode: checked.append((path, mode)))
    for path in (old, new):
        with pytest.raises(OptionError, match=f"--x: {path} cannot be written: permission denied"):
            check_writable(path, "--x")
    assert checked == [(old, os.W_OK), (tmp_path, os.W_OK)]


# -- failed writes -----------------------------------------------------------------------------------------------------


def test_failed_write_leaves_no_half_of_a_transcript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after three bytes, and has space again later."""
    path, full = tmp_path / "x", [False, True, False]

    def write(file: io.FileIO, data: bytes) -> None:
        if full.pop(0):
            file.write(data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(file, data)

    monkeypatch.setattr(module, "write_all", write)
    with Output(["a", "b", "c"], Format.text, str(path)) as output:
        output.write("a", [result("one")], 9.0, 560)
        with pytest.raises(NemostreamError) as caught:
            output.write("b", [result("two")], 9.0, 560)
        assert str(caught.value) == f"the transcript of b cannot be written to {path}: No space left on device."
        assert path.read_text() == "a: one\n"
        output.write("c", [result("three")], 9.0, 560)
    assert path.read_text() == "a: one\nc: three\n"


@pytest.mark.parametrize(("out", "target"), [("folder/", "folder/a.txt"), ("file", "file"), (None, "standard output")])
def test_failed_write_names_the_target(
    out: str | None, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for error, message in ((OSError(5, "Input/output error"), "Input/output error"), (OSError("odd"), "odd")):

        def fail(*arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(module, "write_all", fail)
        monkeypatch.setattr(module, "write_unbuffered", fail)
        with Output(["a"], Format.text, out) as output, pytest.raises(NemostreamError) as caught:
            output.write("a", [result("one")], 9.0, 560)
        assert str(caught.value) == f"the transcript of a cannot be written to {target}: {message}."
        with Output(["a"], Format.text, out) as output, pytest.raises(BrokenPipeError):
            monkeypatch.setattr(module, "write_all", closed_pipe)
            monkeypatch.setattr(module, "write_unbuffered", closed_pipe)
            output.write("a", [result("one")], 9.0, 560)


def closed_pipe(*arguments: Any) -> None:
    raise BrokenPipeError
