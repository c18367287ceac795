"""`AudioFile`: channels, duration, the position in errors, what is closed; samples decoded by FFmpeg."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from nemostream.errors import AudioError
from nemostream.runtime.audio.files import BLOCK, AudioFile, find_implausible, truncated

NOISE = (np.random.default_rng(8).standard_normal(3 * BLOCK) * 0.1).astype(np.float32)


def encoded(pcm: np.ndarray, rate: int = 16000, format: str = "WAV", subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, pcm, rate, format=format, subtype=subtype)
    return file.getvalue()


def save(folder: Path, data: bytes) -> Path:
    path = folder / "a.bin"
    path.write_bytes(data)
    return path


def read(path: Path, **options: Any) -> np.ndarray:
    with AudioFile(path, **options) as file:
        return np.concatenate(list(file.blocks()))


# -- channels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_rate", [16000, 8000])
def test_channel_is_selected(second_rate: int, tmp_path: Path) -> None:
    """Of the first stream; a later one of another format is mixed down for every channel."""
    pcm, later = NOISE[:9000].reshape(-1, 3), NOISE[20_000:26_000].reshape(-1, 3)
    mixed = soxr.resample(later.mean(axis=1), 8000, 16000, quality="HQ")
    path = save(tmp_path, encoded(pcm) + encoded(later, second_rate))
    for channel in (1, 2, 3):
        with AudioFile(path, channel=channel) as file:
            assert file.channels == 1 and not file.cancels
            found = np.concatenate(list(file.blocks()))
            assert not file.cancels
        rest = later[:, channel - 1] if second_rate == 16000 else mixed
        assert np.array_equal(found, np.concatenate([pcm[:, channel - 1], rest])[:, None])
    assert read(path).shape[1] == 3
    for channel in (0, 4):
        with pytest.raises(AudioError, match=rf"{path} has 3 channel\(s\); there is no channel {channel}\."):
            AudioFile(path, channel=channel)


@pytest.mark.parametrize(
    ("gains", "cancel"),
    [
        ((1.0, -1.0), True),
        ((1.0, -0.63), True),  # (1 - g)**2 < 0.1 * (1 + g**2): the mix has a tenth of the energy of unrelated channels
        ((1.0, -0.62), False),
        ((1.0, -0.73, 1.0, -0.73), True),  # (1 - g)**2 < 0.05 * (1 + g**2)
        ((1.0, -0.72, 1.0, -0.72), False),
        ((1.0, 0.0), False),
        ((1.0,), False),
        ((0.0, 0.0), False),
        ((1e-5, -1e-5), True),  # quiet, but audible
        ((1e-10, -1e-10), False),
    ],
)
def test_channels_that_cancel_out_when_mixed(gains: tuple[float, ...], cancel: bool, tmp_path: Path) -> None:
    audio = NOISE[: 2 * BLOCK]
    with AudioFile(save(tmp_path, encoded(audio[:, None] * np.float32(gains)))) as file:
        assert not file.cancels  # nothing was read
        assert sum(map(len, file.blocks())) == 2 * BLOCK
        assert file.cancels == cancel


@pytest.mark.parametrize("first", [0, 1])
def test_channels_that_cancel_out_in_half_of_a_recording(first: int, tmp_path: Path) -> None:
    halves = [NOISE[:BLOCK, None] * np.float32([1, -1]), NOISE[BLOCK : 2 * BLOCK, None] * np.float32([1, 1])]
    with AudioFile(save(tmp_path, encoded(np.concatenate([halves[first], halves[1 - first]])))) as file:
        assert sum(map(len, file.blocks())) == 2 * BLOCK and not file.cancels


# -- time --------------------------------------------------------------------------------------------------------------


def test_duration_of_streams_of_different_rates(tmp_path: Path) -> None:
    data = encoded(NOISE[:40_000], 16000) + encoded(NOISE[:40_000], 8000) + encoded(NOISE[:48_000], 48000)
    with AudioFile(save(tmp_path, data)) as file:
        assert (file.sample_rate, file.channels, file.duration) == (16000, 1, 2.5 + 5 + 1)
        blocks = list(file.blocks())
    assert sum(map(len, blocks)) == 8.5 * 16000 and min(map(len, blocks)) > 0
    assert max(map(len, blocks)) <= 2 * BLOCK  # a block at 8 kHz


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.nan, r"NaN or infinity near 13\.19 s\."),
        (
            -4321.5,
            r"the value 4321\.5 near 13\.19 s \(floats must be in \[-1, 1\]; these seem to be on the int16 scale: "
            r"divide by 32768\)\.",
        ),
    ],
)
def test_invalid_samples_are_reported_with_the_time_of_their_block(bad: float, message: str, tmp_path: Path) -> None:
    """The second block of the second stream: 3 s, 2 s of silence in another format, and 65,536 samples at 8 kHz."""
    pcm = NOISE.copy()
    pcm[BLOCK + 4321] = bad
    data = encoded(NOISE[:48_000]) + encoded(np.zeros((88_200, 2), np.float32), 44100) + encoded(pcm, 8000)
    blocks = []
    with AudioFile(save(tmp_path, data), "talk") as file, pytest.raises(AudioError, match=f"^talk contains {message}$"):
        for block in file.blocks():
            blocks.append(block)
    assert sum(map(len, blocks)) >= 3 * 16000 + 2 * 16000


@pytest.mark.parametrize(
    ("pcm", "fault"),
    [
        ([], None),
        ([32.0, -32.0], None),
        ([0.0, 32.5], ("the value 32.5", "int16 scale: divide by 32768")),
        ([65536.0, -1.0], ("the value 65536", "int16 scale: divide by 32768")),
        ([1.0, -65540.0], ("the value 65540", "scale of larger integers: divide by 2**23 or 2**31")),
        ([np.inf], ("NaN or infinity", "")),
        ([-np.inf, 99.0], ("NaN or infinity", "")),
        ([np.nan, 0.0], ("NaN or infinity", "")),
    ],
)
def test_values_that_are_not_audio(pcm: list[float], fault: tuple[str, str] | None) -> None:
    found = find_implausible(np.array(pcm, np.float32))
    if fault is None or found is None:
        assert found == fault
    else:
        assert found[0] == fault[0] and fault[1] in found[1]


def test_error_of_a_truncated_file() -> None:
    error = truncated("talk.wav", 1.5, 2.25)
    assert str(error).startswith("talk.wav is cut short: 1.50 s of the 3.75 s stated in its header are missing;")


@pytest.mark.parametrize("format", ["AIFF", "AU", "W64", "FLAC"])
def test_error_of_a_file_that_is_cut_short_states_both_durations(format: str, tmp_path: Path) -> None:
    """Half of ten seconds. FLAC has no size in bytes: decoding stops somewhere before."""
    data = encoded(NOISE[:160_000], 16000, format, "PCM_16")
    path = save(tmp_path, data[: len(data) - 160_000] if format != "FLAC" else data[: len(data) // 2])
    with pytest.raises(AudioError) as caught:
        read(path)
    found = re.search(r"contains ([\d.]+) s of the ([\d.]+) s|after ([\d.]+) s", str(caught.value))
    assert found and str(caught.value).startswith(str(path))
    if format == "FLAC":
        assert 3.5 < float(found[1] or found[3]) < 6
    else:
        assert float(found[1]) == pytest.approx(5, abs=0.01) and float(found[2]) == pytest.approx(10, abs=0.02)


@pytest.mark.parametrize(("stated", "cut_short"), [(0x7FFFEFFE, True), (0x7FFFF008, False), (0xFFFFFFF6, False)])
def test_aiff_file_whose_size_was_not_known(stated: int, cut_short: bool, tmp_path: Path) -> None:
    """Programs that write to a pipe state the largest size."""
    data = bytearray(encoded(NOISE[:16_000], 16000, "AIFF", "PCM_16"))
    at = data.index(b"SSND") + 4
    data[4:8] = data[at : at + 4] = stated.to_bytes(4, "big")
    path = save(tmp_path, data)
    if cut_short:
        with pytest.raises(AudioError, match=r"is cut short: it contains 1\.00 s of the 6\d+\.\d+ s"):
            read(path)
    else:
        assert len(read(path)) == 16_000


# -- what is opened and closed -----------------------------------------------------------------------------------------


def test_file_objects(tmp_path: Path) -> None:
    """A regular file is read in place; other content is copied. `AudioFile` closes what it was given."""
    data = encoded(NOISE[:1000])
    path = save(tmp_path, data)
    for opened in (path.open("rb"), io.BytesIO(data)):
        with AudioFile(opened) as file:
            assert np.array_equal(np.concatenate(list(file.blocks()))[:, 0], NOISE[:1000])
            assert file.path is None and os.fspath(file) == "the audio"
        assert opened.closed
        file.close()  # has no effect
    with AudioFile(path) as file:
        assert file.path == path and os.fspath(file) == str(path)
    with AudioFile(path, "talk") as file:
        assert file.path == path and os.fspath(file) == str(path)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"no audio at all", {}, "^the audio cannot be read as audio"),
        (encoded(NOISE[:100]), {"channel": 2}, "^talk has 1 channel"),
        (encoded(NOISE[:100], 1000), {}, "has a sample rate of 1000 Hz; it must be from 4000 to 768000 Hz"),
        (encoded(NOISE[:100]) + encoded(NOISE[:100], 1000), {}, "has a sample rate of 1000 Hz"),
        (b"fLaC\x80\0\0\x22" + bytes(34), {}, "talk cannot be read as audio"),
        (encoded(NOISE[:0]) * 4097, {}, "talk cannot be read as audio: it contains more than 4096 streams"),
        (b"", {}, "^talk cannot be read as audio: it is empty\\.$"),
    ],
)
def test_file_that_is_rejected_is_closed(data: bytes, options: Any, message: str, tmp_path: Path) -> None:
    opened = save(tmp_path, data).open("rb")
    with pytest.raises(AudioError, match=message):
        AudioFile(opened, *[] if message.startswith("^the audio") else ["talk"], **options)
    assert opened.closed


@pytest.mark.parametrize("data", [b"\xff\xfb\x90\x64" + bytes(96), bytes(range(256)) * 8], ids=["header", "junk"])
def test_mp3_without_a_frame_is_not_reported_as_missing(tmp_path: Path, data: bytes) -> None:
    """libsndfile's text for such a file is "File does not exist or is not a regular file"."""
    path = tmp_path / "talk.mp3"
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"talk\.mp3 cannot be read as audio .*No MPEG frame found\."):
        AudioFile(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.wav", "does not exist."),
        ("a.bin/x", "does not exist."),  # below a file
        (".", "is a folder, not an audio file."),
        ("/dev/null", "is a device or a socket; use an audio file or a pipe."),
        ("a\0b", "cannot be read: embedded null byte."),
        ("x" * 300, "cannot be read: File name too long."),
        ("a.bin", "contains no audio."),
        ("a.raw", "has no header; send raw 16-bit PCM through a pipe instead."),
    ],
)
def test_path_that_cannot_be_read(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.bin", "a.raw"):
        Path(name).write_bytes(encoded(NOISE[:0]) if name == "a.bin" else bytes(100))
    for options, shown in (({}, path), ({"name": "talk"}, "talk")):
        with pytest.raises(AudioError) as caught:
            read(Path(path), **options)
        assert str(caught.value) == f"{shown} {message}"


def test_empty_file_object_is_an_error() -> None:
    with pytest.raises(AudioError, match="upload is a pipe that was closed without any data"):
        AudioFile(io.BytesIO(), "upload")


# -- FFmpeg ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def av() -> Any:
    return pytest.importorskip("av", reason="needs the av extra")


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("format", "dtype", "zero", "full"),
    [
        ("u8", np.uint8, 128, 128),
        ("s16", np.int16, 0, 1 << 15),
        ("s32", np.int32, 0, 1 << 31),
        ("flt", np.float32, 0, 1),
        ("dbl", np.float64, 0, 1),
    ],
)
def test_every_sample_format_of_ffmpeg_is_scaled(
    av: Any, format: str, dtype: Any, zero: int, full: int, planar: bool
) -> None:
    from nemostream.runtime.audio.libav import _to_float

    values = np.array([[-1.0, 0.5, 0.25], [0.0, -0.25, 0.125]])  # two channels of three samples
    samples = (values * full + zero).astype(dtype)
    array = samples if planar else samples.T.reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(array), format + "p" * planar, "stereo")
    found = _to_float(frame)
    assert found.tolist() == values.T.tolist() and found.dtype == np.float32


def matroska(av: Any, pcm: np.ndarray, rate: int = 16000, video_seconds: int = 0) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        audio = output.add_stream("pcm_s16le", rate=rate, layout="stereo")
        if video_seconds:
            video = output.add_stream("mpeg4", rate=1)
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
            for number in range(video_seconds):
                picture = av.VideoFrame(32, 32, "yuv420p")
                picture.pts = number
                output.mux(video.encode(picture))
            output.mux(video.encode(None))
        for at in range(0, len(pcm), 1600):
            block = np.ascontiguousarray(pcm[at : at + 1600].reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(block, "s16", "stereo")
            frame.sample_rate, frame.pts = rate, at
            output.mux(audio.encode(frame))
        output.mux(audio.encode(None))
    return file.getvalue()


PCM = np.rint(NOISE[:160_000].reshape(-1, 2) * 32767).astype(np.int16)  # five seconds


def test_file_decoded_by_ffmpeg_is_read_in_blocks(av: Any, tmp_path: Path) -> None:
    path = save(tmp_path, matroska(av, PCM))
    with AudioFile(path) as file:
        assert (file.sample_rate, file.channels) == (16000, 2) and file.duration == pytest.approx(5, abs=0.001)
        blocks = list(file.blocks())
    assert np.array_equal(np.concatenate(blocks), PCM / np.float32(32768))
    assert [len(block) for block in blocks] == [41 * 1600, 9 * 1600]  # the first packets that have 65,536 samples
    assert np.array_equal(read(path, channel=2)[:, 0], PCM[:, 1] / np.float32(32768))


@pytest.mark.parametrize(("seconds", "cut_short"), [(5.2, False), (5.21, True), (60.0, True)])
def test_matroska_file_that_states_more_audio_than_it_has(
    av: Any, seconds: float, cut_short: bool, tmp_path: Path
) -> None:
    data = bytearray(matroska(av, PCM))
    at = data.index(b"\x44\x89\x88") + 3  # the duration in milliseconds, as a double
    data[at : at + 8] = np.array(1000 * seconds, ">f8").tobytes()
    path = save(tmp_path, data)
    if cut_short:
        with pytest.raises(AudioError, match=f"contains 5.00 s of the {seconds:.2f} s stated in its header"):
            read(path)
    else:
        assert len(read(path)) == len(PCM)
    video = bytearray(matroska(av, PCM, video_seconds=2))  # a video may be longer than its audio
    at = video.index(b"\x44\x89\x88") + 3
    video[at : at + 8] = np.array(1000 * seconds, ">f8").tobytes()
    assert len(read(save(tmp_path, video))) == len(PCM)


@pytest.mark.parametrize(
    ("second", "text"),
    [((32000, "mono"), r"32000 Hz and 1 channel\(s\)"), ((16000, "stereo"), r"16000 Hz and 2 channel\(s\)")],
)
def test_change_of_the_format_within_a_file(av: Any, second: tuple[int, str], text: str, tmp_path: Path) -> None:
    """AAC frames of another sample rate or number of channels follow in the same ADTS stream."""
    parts = []
    for rate, layout in ((16000, "mono"), second):
        file = io.BytesIO()
        with av.open(file, "w", format="adts") as output:
            stream = output.add_stream("aac", rate=rate, layout=layout)
            channels = 1 if layout == "mono" else 2
            audio = np.ascontiguousarray(NOISE[: 20 * 1024 * channels].reshape(channels, -1))
            frame = av.AudioFrame.from_ndarray(audio, "fltp", layout)
            frame.sample_rate, frame.pts = rate, 0
            for packet in (*stream.encode(frame), *stream.encode(None)):
                output.mux(packet)
        parts.append(file.getvalue())
    with pytest.raises(AudioError) as caught:
        read(save(tmp_path, b"".join(parts)))
    found = re.search(rf"changes from 16000 Hz and 1 channel\(s\) to {text} after ([\d.]+) s", str(caught.value))
    assert found and 1.2 < float(found[1]) < 1.45  # 20 frames and the encoder's delay: 1.28 s and more


def test_damaged_file_decoded_by_ffmpeg(av: Any, tmp_path: Path) -> None:
    """The error states the audio before the damage."""
    data = matroska(av, PCM)
    path = save(tmp_path, data[: len(data) // 2])
    with pytest.raises(AudioError, match=rf"^{path} is (damaged or )?cut short") as caught:
        read(path)
    seconds = float(re.search(r"([\d.]+) s", str(caught.value))[1])  # type: ignore[index]
    assert seconds == pytest.approx(2.5, abs=0.15)


def test_mp4_file_that_is_cut_short(av: Any, tmp_path: Path) -> None:
    """Its index comes first, so that decoding begins; the error states the audio before the cut."""
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as output:
        stream = output.add_stream("alac", rate=16000, layout="mono")
        stream.format = "s16p"
        for at in range(0, 81_920, 4096):
            frame = av.AudioFrame.from_ndarray(PCM[None, at : at + 4096, 0].copy(), "s16p", "mono")
            frame.sample_rate, frame.pts = 16000, at
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    data = path.read_bytes()
    assert len(read(path)) >= len(PCM)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AudioError, match=r"^\S+ is damaged or cut short after ([\d.]+) s; copy it again\.$") as caught:
        read(path)
    assert float(str(caught.value).split()[-5]) == pytest.approx(2.5, abs=0.3)
    path.write_bytes(data[: data.index(b"mdat") + 100])  # before the first frame
    with pytest.raises(AudioError, match=r"is damaged or cut short after 0\.00 s; copy it again\.$"):
        read(path)


def test_metadata_of_unknown_encoding(av: Any, tmp_path: Path) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        output.metadata["title"] = "Interview"
        stream = output.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(PCM[None, :1600, 0].copy(), "s16", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    data = file.getvalue().replace(b"Interview", b"\xc4\xd6\xdc Latin")
    assert np.array_equal(read(save(tmp_path, data))[:, 0], PCM[:1600, 0] / np.float32(32768))
