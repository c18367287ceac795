from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import AudioError, OptionError
from nemostream.runtime.audio import sources
from nemostream.runtime.audio.files import AudioFile
from nemostream.runtime.audio.preprocessor import AudioPreprocessor
from nemostream.runtime.audio.sources import read_pcm16

RNG = np.random.default_rng(3)
NOISE = (RNG.standard_normal(200_000) * 0.1).astype(np.float32)


def process(preprocessor: AudioPreprocessor, *pushes: np.ndarray) -> np.ndarray:
    blocks = [block for pcm in pushes for block in preprocessor.push(pcm)]
    return np.concatenate([np.zeros(0, np.float32), *blocks, preprocessor.finish()])


def test_integers_are_scaled_and_floats_are_unchanged():
    for pcm, scale in ((np.array([-32768, 0, 16384], np.int16), 32768), (np.array([-(2**31), 2**30], np.int32), 2**31)):
        assert process(AudioPreprocessor(16000, 1, 16000), pcm).tolist() == (pcm / scale).tolist()
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        assert process(AudioPreprocessor(16000, 1, 16000), np.array([-1, 0.5], dtype)).tolist() == [-1, 0.5]
    assert process(AudioPreprocessor(16000, 1, 16000), np.array([16384], ">i2")).tolist() == [0.5]


def test_channels_are_averaged():
    assert process(AudioPreprocessor(16000, 2, 16000), np.array([[16384, 0], [-16384, 16384]], np.int16)).tolist() == [
        0.25,
        0,
    ]
    assert process(AudioPreprocessor(16000, 1, 16000), np.array([[0.5], [0.25]], np.float32)).tolist() == [0.5, 0.25]


def test_push_larger_than_a_block():
    assert len(NOISE) > 3 * sources.BLOCK
    assert np.array_equal(process(AudioPreprocessor(16000, 1, 16000), NOISE), NOISE)


@given(
    rate=st.sampled_from([8000, 11025, 22050, 44100, 44101, 48000]),
    sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_resampling_does_not_depend_on_the_pushes(rate, sizes):
    pushes = np.split(NOISE[: sum(sizes)] if sum(sizes) <= len(NOISE) else NOISE, np.cumsum(sizes)[:-1])
    preprocessor = AudioPreprocessor(rate, 1, 16000)
    streamed = process(preprocessor, *pushes)
    whole = np.concatenate(pushes)
    assert np.array_equal(streamed, soxr.resample(whole, rate, 16000, quality="HQ"))
    assert preprocessor.seconds == len(whole) / rate


def test_large_push_is_resampled_like_many_small_ones():
    small = process(AudioPreprocessor(48000, 1, 16000), *np.array_split(NOISE, 999))
    assert np.array_equal(process(AudioPreprocessor(48000, 1, 16000), NOISE), small)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, sources.BLOCK + 5])
def test_nan_and_infinity_are_rejected_before_processing(bad, at):
    invalid = NOISE[: sources.BLOCK * 2].copy()
    invalid[at] = bad
    preprocessor = AudioPreprocessor(44100, 1, 16000)
    head = list(preprocessor.push(NOISE[:1000]))
    with pytest.raises(AudioError, match=f"NaN or infinity at sample {at} of this push; the push was rejected"):
        preprocessor.push(invalid)
    tail = process(preprocessor, NOISE[1000:5000])
    assert np.array_equal(np.concatenate([*head, tail]), soxr.resample(NOISE[:5000], 44100, 16000))


def test_nan_in_one_channel_and_float32_overflow_are_rejected():
    with pytest.raises(AudioError, match="at sample 1 of"):
        AudioPreprocessor(16000, 2, 16000).push(np.array([[0, 0], [0, np.nan]]))
    with pytest.raises(AudioError, match="at sample 0 of"):
        AudioPreprocessor(16000, 1, 16000).push(np.array([1e300]))


@pytest.mark.parametrize(
    ("pcm", "channels", "message"),
    [
        (b"\0\0", 1, r"not bytes; wrap raw 16-bit PCM with np.frombuffer"),
        ([0.0], 1, "must be a numpy array, not list"),
        (np.zeros(4, np.int64), 1, "must be int16, int32 or float, not int64"),
        (np.zeros(4, np.uint8), 1, "not uint8"),
        (np.zeros(4, bool), 1, "not bool"),
        (np.zeros(4, complex), 1, "not complex128"),
        (np.zeros((4, 2), np.float32), 1, r"shape \[4, 2\], but the stream has 1 channel"),
        (np.zeros(4, np.float32), 2, r"shape \[4\], but the stream has 2 channel.*\[samples, 2\]"),
        (np.zeros((4, 1, 1), np.float32), 1, r"shape \[4, 1, 1\]"),
        (np.float32(1) * np.ones(()), 1, r"must be a numpy array|shape \[\]"),
    ],
)
def test_invalid_audio_is_rejected(pcm, channels, message):
    with pytest.raises(AudioError, match=message):
        AudioPreprocessor(16000, channels, 16000).push(pcm)


@pytest.mark.parametrize("rate", [0, -16000, 16, 3999, 768_001, 44100.5, float("nan"), float("inf")])
def test_unsupported_rates(rate):
    with pytest.raises(OptionError, match="sample_rate is"):
        AudioPreprocessor(rate, 1, 16000)


@pytest.mark.parametrize("channels", [0, -1, 48000])
def test_unsupported_channel_counts(channels):
    with pytest.raises(OptionError, match=f"channels is {channels}"):
        AudioPreprocessor(16000, channels, 16000)


# -- files -----------------------------------------------------------------------------------------------------------

FORMATS = [
    ("wav", "WAV", "PCM_16"),
    ("wav", "WAV", "PCM_24"),
    ("wav", "WAV", "FLOAT"),
    ("flac", "FLAC", "PCM_16"),
    ("aiff", "AIFF", "PCM_16"),
    ("au", "AU", "PCM_16"),
    ("w64", "W64", "PCM_16"),
    ("rf64", "RF64", "PCM_16"),
    ("caf", "CAF", "PCM_16"),
    ("ogg", "OGG", "VORBIS"),
    ("ogg", "OGG", "OPUS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
]


def make(path, format_="WAV", subtype="PCM_16", seconds=3, rate=16000, channels=1):
    pcm = NOISE[: seconds * rate * channels].reshape(-1, channels)
    soundfile.write(path, pcm, rate, format=format_, subtype=subtype)
    return pcm


def read(path) -> np.ndarray:
    with AudioFile(path) as recording:
        return np.concatenate(list(recording.blocks()))


@pytest.mark.parametrize(("suffix", "format_", "subtype"), FORMATS)
def test_every_format_is_read_completely(tmp_path, suffix, format_, subtype):
    path = tmp_path / f"a.{suffix}"
    pcm = make(path, format_, subtype)
    with AudioFile(path) as recording:
        assert (recording.sample_rate, recording.channels, recording.duration) == (16000, 1, 3.0)
    actual = read(path)
    assert actual.shape == pcm.shape
    if format_ not in ("OGG", "MP3"):
        assert np.abs(actual - pcm).max() <= 1 / 32768


@pytest.mark.parametrize("keep", [0.4, 0.9])
@pytest.mark.parametrize(("suffix", "format_", "subtype"), FORMATS)
def test_truncated_file_is_an_error_that_names_it(tmp_path, suffix, format_, subtype, keep):
    path = tmp_path / f"a.{suffix}"
    make(path, format_, subtype)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(AudioError, match=f"{path}.*(is cut short|damaged)"):
        read(path)


@pytest.mark.parametrize("stated", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
def test_wav_written_to_a_pipe_states_no_length(tmp_path, stated):
    path = tmp_path / "a.wav"
    pcm = make(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", stated)
    path.write_bytes(data)
    assert read(path).shape == pcm.shape


def test_mp3_without_a_length_table_is_read_completely(tmp_path):
    path = tmp_path / "a.mp3"
    loud = (NOISE[:160_000] * np.repeat(np.linspace(0, 4, 10), 16_000)).astype(np.float32)
    soundfile.write(path, loud, 16000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    data = path.read_bytes()
    path.write_bytes(data[data.index(data[:2], data.index(b"Xing")) :])
    with soundfile.SoundFile(path) as file:
        assert file.frames > len(loud) * 1.5  # the wrong estimate
    assert len(read(path)) >= len(loud)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_a_file(tmp_path, bad):
    path = tmp_path / "a.wav"
    pcm = NOISE[:48000].copy()
    pcm[40000] = bad
    soundfile.write(path, pcm, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=f"{path} contains NaN or infinity"):
        read(path)


def test_files_that_are_missing_or_not_audio(tmp_path):
    text, empty, raw = tmp_path / "a.txt", tmp_path / "empty.wav", tmp_path / "a.raw"
    text.write_text("hello " * 100)
    raw.write_bytes(bytes(100))
    soundfile.write(empty, np.zeros(0), 16000)
    slow = tmp_path / "slow.wav"
    soundfile.write(slow, np.zeros(100), 1000)
    for path, message in (
        (tmp_path / "no.wav", "does not exist"),
        (tmp_path, "is a folder"),
        (text, "cannot be read as audio"),
        (empty, "contains no audio"),
        (raw, "has no header"),
        (slow, "sample rate of 1000 Hz"),
    ):
        with pytest.raises(AudioError, match=f"{path} {message}|{path} has a {message}"):
            read(path)


# -- pipes -----------------------------------------------------------------------------------------------------------


class Dribble(io.RawIOBase):
    """A pipe that returns blocks of the given sizes."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data, self.sizes = data, sizes

    def read1(self, size: int) -> bytes:
        size = min(size, self.sizes.pop() if self.sizes else size)
        self.data, out = self.data[size:], self.data[:size]
        return out


@given(frames=st.integers(1, 300), channels=st.integers(1, 3), sizes=st.lists(st.integers(1, 50), max_size=40))
def test_raw_pcm_does_not_depend_on_how_it_arrives(frames, channels, sizes):
    pcm = RNG.integers(-32768, 32768, (frames, channels)).astype(np.int16)
    blocks = list(read_pcm16(Dribble(pcm.astype("<i2").tobytes(), sizes), channels))
    assert np.array_equal(np.concatenate(blocks), pcm)


def test_raw_pcm_from_a_plain_file_object():
    assert [b.tolist() for b in read_pcm16(io.BytesIO(b"\1\0\2\0"))] == [[[1], [2]]]


@pytest.mark.parametrize(("data", "channels", "extra"), [(b"\0\0\0", 1, 1), (b"\0" * 6, 2, 2)])
def test_raw_pcm_that_ends_within_a_sample(data, channels, extra):
    with pytest.raises(AudioError, match=rf"middle of a sample: {extra} byte\(s\) left over"):
        list(read_pcm16(io.BytesIO(data), channels))


def test_empty_raw_pcm():
    with pytest.raises(AudioError, match="no raw PCM received"):
        list(read_pcm16(io.BytesIO(b"")))
