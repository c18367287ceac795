"""Inputs of `nemostream transcribe`: chained files, standard input, truncated files, files of phones."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

import nemostream

COMMAND = [sys.executable, "-m", "nemostream", "transcribe"]
SPEECH, RATE = soundfile.read(nemostream.demo_clip(), dtype="float32")


def run(*arguments: object, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *map(str, arguments)], input=data, capture_output=True, timeout=120)


def encoded(container: str, subtype: str, pcm: np.ndarray = SPEECH, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, pcm, rate, format=container, subtype=subtype)
    return file.getvalue()


@pytest.fixture(scope="module")
def text() -> str:
    with nemostream.load() as model:
        return model.transcribe(nemostream.demo_clip()).text


@pytest.mark.parametrize(("container", "subtype"), [("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("FLAC", "PCM_16")])
def test_chained_files_are_transcribed_completely(tmp_path: Path, container: str, subtype: str) -> None:
    path = tmp_path / "two"
    path.write_bytes(encoded(container, subtype) * 2)
    done = run(path, "--format", "json")
    row = json.loads(done.stdout)
    assert done.returncode == 0 and row["duration"] == pytest.approx(2 * len(SPEECH) / RATE, abs=0.01)
    assert row["text"].count("pound") == 2


@pytest.mark.parametrize(
    ("container", "subtype", "rate"),
    [
        ("WAV", "PCM_16", 48000),
        ("WAV", "PCM_24", 44100),
        ("WAV", "FLOAT", 16000),
        ("FLAC", "PCM_16", 16000),
        ("MP3", "MPEG_LAYER_III", 48000),
        ("OGG", "VORBIS", 16000),
        ("AIFF", "PCM_16", 22050),
        ("CAF", "PCM_16", 16000),
    ],
)
def test_a_file_on_standard_input(tmp_path: Path, container: str, subtype: str, rate: int) -> None:
    data = encoded(container, subtype, soxr.resample(SPEECH, RATE, rate), rate)
    path = tmp_path / "a"
    path.write_bytes(data)
    piped, named = run("-", data=data), run(path)
    assert piped.returncode == 0 and piped.stdout == named.stdout and b"pound key" in piped.stdout


def test_raw_samples_on_standard_input(text: str) -> None:
    with nemostream.load() as model:
        pcm = np.rint(SPEECH * 32767).astype("<i2")
        wanted = model.transcribe(pcm).text
    done = run("-", data=pcm.tobytes())
    assert (done.returncode, done.stdout.decode()) == (0, wanted + "\n") and text.split()[0] in wanted


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_wav_files_of_an_interrupted_recorder(tmp_path: Path, text: str, size: int) -> None:
    data = bytearray(encoded("WAV", "PCM_16"))
    offset = data.index(b"data") + 4
    data[offset : offset + 4], data[4:8] = struct.pack("<I", size), struct.pack("<I", 36)
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    for done in (run(path), run("-", data=bytes(data))):
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, text + "\n", b"")


@pytest.mark.parametrize("options", [[], ["--realtime"], ["--endpoint-ms", "800"], ["stdin"]])
def test_a_truncated_wav_is_transcribed_and_reported(tmp_path: Path, text: str, options: list[str]) -> None:
    data = bytearray(encoded("WAV", "PCM_16"))
    offset = data.index(b"data") + 4
    data[offset : offset + 4] = struct.pack("<I", 2 * len(SPEECH) + 2 * RATE * 3)
    path = tmp_path / "cut.wav"
    path.write_bytes(data)
    stdin = options == ["stdin"]
    done = run("-", data=bytes(data)) if stdin else run(path, *options)
    assert done.stdout.decode() == text + "\n"
    error = done.stderr.decode()
    assert error.count("\n") == 1 and "3.00 s of the" in error and ("standard input" if stdin else str(path)) in error
    assert done.returncode == nemostream.TruncatedAudioError.exit_code != nemostream.AudioError.exit_code


def test_a_truncated_wav_does_not_stop_the_run(tmp_path: Path, text: str) -> None:
    data = encoded("WAV", "PCM_16")
    whole, cut = tmp_path / "whole.wav", tmp_path / "cut.wav"
    whole.write_bytes(data)
    cut.write_bytes(data[: -len(data) // 4])
    done = run(cut, whole, "--format", "json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["cut.wav", "whole.wav"]
    assert rows[1]["text"] == text and text.startswith(rows[0]["text"][:20]) and done.returncode == 11


def test_the_error_has_the_partial_result(tmp_path: Path) -> None:
    data = encoded("WAV", "PCM_16")
    cut = tmp_path / "cut.wav"
    cut.write_bytes(data[: len(data) // 2])
    partial = np.frombuffer(data[44 : len(data) // 2], "<i2")
    with nemostream.load() as model:
        wanted = model.transcribe(partial)
        with pytest.raises(nemostream.TruncatedAudioError) as caught:
            model.transcribe(cut)
        assert caught.value.result == wanted and wanted.final
        (outcome,) = model.transcribe_many([cut])
        assert isinstance(outcome, nemostream.TruncatedAudioError) and outcome.result == wanted
        events = []
        with pytest.raises(nemostream.TruncatedAudioError):
            for event in model.listen(cut):
                events.append(event)
        assert [event.text for event in events if event.kind == "final"] == [wanted.text]
        with pytest.raises(nemostream.TruncatedAudioError):  # no checkpoint is written
            model.transcribe(cut, resume=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_implausible_arrays(text: str) -> None:
    big = SPEECH * 32768
    with nemostream.load() as model:
        for call in (
            lambda: model.transcribe(big),
            lambda: list(model.listen(big)),
            lambda: model.stream().push(big),
            lambda: list(model.listen(iter([big]))),
        ):
            with pytest.raises(nemostream.AudioError, match="divide by 32768"):
                call()
        assert model.transcribe(SPEECH * 8).text  # a recording that clips
        for invalid in (np.array(0.5), np.zeros((2, 3, 4), np.float32)):
            with pytest.raises(nemostream.AudioError):
                model.transcribe(invalid)
        for rate in ("16000", 0, 10**7, None):
            with pytest.raises(nemostream.OptionError, match="sample_rate"):
                model.transcribe(SPEECH, sample_rate=rate)  # type: ignore[arg-type]
        data = np.frombuffer(encoded("WAV", "PCM_16"), "<i2")
        with pytest.raises(nemostream.AudioError, match="bytes of a WAV file"):
            model.transcribe(data)


def test_a_file_of_a_phone(tmp_path: Path, text: str) -> None:
    av = pytest.importorskip("av", reason="needs the av extra")
    path = tmp_path / "memo.m4a"
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("alac", rate=RATE, layout="mono")
        stream.format = "s16p"
        frame = av.AudioFrame.from_ndarray(np.rint(SPEECH * 32768).astype("<i2")[None], "s16p", "mono")
        frame.sample_rate, frame.pts = RATE, 0
        resampler = av.AudioResampler("s16p", "mono", RATE, 4096)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(part))
    for done in (run(path), run("-", data=path.read_bytes())):
        assert (done.returncode, done.stdout.decode(), done.stderr) == (0, text + "\n", b"")
