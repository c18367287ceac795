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


def take(preprocessor: AudioPreprocessor, *pushes: np.ndarray) -> np.ndarray:
    blocks = [block for pcm in pushes for block in preprocessor.push(pcm)]
    return np.concatenate([np.zeros(0, np.float32), *blocks, preprocessor.finish()])


def test_integers_are_scaled_by_their_full_range_and_floats_kept():
    for pcm, scale in ((np.array([-32768, 0, 16384], np.int16), 32768), (np.array([-(2**31), 2**30], np.int32), 2**31)):
        assert take(AudioPreprocessor(16000, 1, 16000), pcm).tolist() == (pcm / scale).tolist()
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        assert take(AudioPreprocessor(16000, 1, 16000), np.array([-1, 0.5], dtype)).tolist() == [-1, 0.5]
    assert take(AudioPreprocessor(16000, 1, 16000), np.array([16384], ">i2")).tolist() == [0.5]


def test_channels_are_averaged():
    assert take(AudioPreprocessor(16000, 2, 16000), np.array([[16384, 0], [-16384, 16384]], np.int16)).tolist() == [
        0.25,
        0,
    ]
    assert take(AudioPreprocessor(16000, 1, 16000), np.array([[0.5], [0.25]], np.float32)).tolist() == [0.5, 0.25]


def test_a_push_larger_than_a_block_loses_nothing():
    assert len(NOISE) > 3 * sources.BLOCK
    assert np.array_equal(take(AudioPreprocessor(16000, 1, 16000), NOISE), NOISE)


@given(
    rate=st.sampled_from([8000, 11025, 22050, 44100, 44101, 48000]),
    sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_resampling_does_not_depend_on_the_pushes(rate, sizes):
    pushes = np.split(NOISE[: sum(sizes)] if sum(sizes) <= len(NOISE) else NOISE, np.cumsum(sizes)[:-1])
    preprocessor = AudioPreprocessor(rate, 1, 16000)
    streamed = take(preprocessor, *pushes)
    whole = np.concatenate(pushes)
    assert np.array_equal(streamed, soxr.resample(whole, rate, 16000, quality="HQ"))
    assert preprocessor.seconds == len(whole) / rate


def test_a_large_push_is_resampled_like_many_small_ones():
    small = take(AudioPreprocessor(48000, 1, 16000), *np.array_split(NOISE, 999))
    assert np.array_equal(take(AudioPreprocessor(48000, 1, 16000), NOISE), small)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, sources.BLOCK + 5])
def test_nan_and_infinity_are_refused_before_anything_is_taken(bad, at):
    hurt = NOISE[: sources.BLOCK * 2].copy()
    hurt[at] = bad
    preprocessor = AudioPreprocessor(44100, 1, 16000)
    head = list(preprocessor.push(NOISE[:1000]))
    with pytest.raises(AudioError, match=f"NaN or infinity at sample {at} of this push; none of it was taken"):
        preprocessor.push(hurt)
    rest = take(preprocessor, NOISE[1000:5000])
    assert np.array_equal(np.concatenate([*head, rest]), soxr.resample(NOISE[:5000], 44100, 16000))


def test_nan_in_one_channel_and_what_float32_cannot_hold_are_refused():
    with pytest.raises(AudioError, match="at sample 1 of"):
        AudioPreprocessor(16000, 2, 16000).push(np.array([[0, 0], [0, np.nan]]))
    with pytest.raises(AudioError, match="at sample 0 of"):
        AudioPreprocessor(16000, 1, 16000).push(np.array([1e300]))


@pytest.mark.parametrize(
    ("pcm", "channels", "sentence"),
    [
        (b"\0\0", 1, r"not bytes; wrap raw 16-bit PCM with np.frombuffer"),
        ([0.0], 1, "must be a numpy array, not list"),
        (np.zeros(4, np.int64), 1, "must be int16, int32 or float, not int64"),
        (np.zeros(4, np.uint8), 1, "not uint8"),
        (np.zeros(4, bool), 1, "not bool"),
        (np.zeros(4, complex), 1, "not complex128"),
        (np.zeros((4, 2), np.float32), 1, r"shape \[4, 2\] came to a stream of 1 channel"),
        (np.zeros(4, np.float32), 2, r"shape \[4\] came to a stream of 2 channel.*\[samples, 2\]"),
        (np.zeros((4, 1, 1), np.float32), 1, r"shape \[4, 1, 1\]"),
        (np.float32(1) * np.ones(()), 1, r"must be a numpy array|shape \[\]"),
    ],
)
def test_what_is_no_audio_is_refused_by_a_sentence(pcm, channels, sentence):
    with pytest.raises(AudioError, match=sentence):
        AudioPreprocessor(16000, channels, 16000).push(pcm)


@pytest.mark.parametrize("rate", [0, -16000, 16, 3999, 768_001, 44100.5, float("nan"), float("inf")])
def test_rates_that_cannot_be(rate):
    with pytest.raises(OptionError, match="sample_rate is"):
        AudioPreprocessor(rate, 1, 16000)


@pytest.mark.parametrize("channels", [0, -1, 48000])
def test_channels_that_cannot_be(channels):
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
def test_every_format_gives_all_it_promises(tmp_path, suffix, format_, subtype):
    path = tmp_path / f"a.{suffix}"
    pcm = make(path, format_, subtype)
    with AudioFile(path) as recording:
        assert (recording.sample_rate, recording.channels, recording.duration) == (16000, 1, 3.0)
    got = read(path)
    assert got.shape == pcm.shape
    if format_ not in ("OGG", "MP3"):
        assert np.abs(got - pcm).max() <= 1 / 32768


@pytest.mark.parametrize("keep", [0.4, 0.9])
@pytest.mark.parametrize(("suffix", "format_", "subtype"), FORMATS)
def test_a_file_cut_short_is_an_error_that_names_it(tmp_path, suffix, format_, subtype, keep):
    path = tmp_path / f"a.{suffix}"
    make(path, format_, subtype)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(AudioError, match=f"{path}.*(is cut short|damaged)"):
        read(path)


@pytest.mark.parametrize("claim", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
def test_a_wav_written_into_a_pipe_promises_nothing(tmp_path, claim):
    path = tmp_path / "a.wav"
    pcm = make(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", claim)
    path.write_bytes(data)
    assert read(path).shape == pcm.shape


def test_an_mp3_without_a_frame_count_promises_nothing(tmp_path):
    path = tmp_path / "a.mp3"
    loud = (NOISE[:160_000] * np.repeat(np.linspace(0, 4, 10), 16_000)).astype(np.float32)
    soundfile.write(path, loud, 16000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    data = path.read_bytes()
    path.write_bytes(data[data.index(data[:2], data.index(b"Xing")) :])
    with soundfile.SoundFile(path) as file:
        assert file.frames > len(loud) * 1.5  # the estimate that must not be believed
    assert len(read(path)) >= len(loud)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_a_file(tmp_path, bad):
    path = tmp_path / "a.wav"
    pcm = NOISE[:48000].copy()
    pcm[40000] = bad
    soundfile.write(path, pcm, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=f"{path} holds NaN or infinity"):
        read(path)


def test_files_that_are_not_there_or_not_audio(tmp_path):
    text, empty, raw = tmp_path / "a.txt", tmp_path / "empty.wav", tmp_path / "a.raw"
    text.write_text("hello " * 100)
    raw.write_bytes(bytes(100))
    soundfile.write(empty, np.zeros(0), 16000)
    slow = tmp_path / "slow.wav"
    soundfile.write(slow, np.zeros(100), 1000)
    for path, sentence in (
        (tmp_path / "no.wav", "does not exist"),
        (tmp_path, "is a folder"),
        (text, "cannot be read as audio"),
        (empty, "holds no audio"),
        (raw, "has no header"),
        (slow, "sample rate of 1000 Hz"),
    ):
        with pytest.raises(AudioError, match=f"{path} {sentence}|{path} has a {sentence}"):
            read(path)


# -- pipes -----------------------------------------------------------------------------------------------------------


class Dribble(io.RawIOBase):
    """A pipe that gives what it likes."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data, self.sizes = data, sizes

    def read1(self, size: int) -> bytes:
        size = min(size, self.sizes.pop() if self.sizes else size)
        self.data, out = self.data[size:], self.data[:size]
        return out


@given(frames=st.integers(1, 300), channels=st.integers(1, 3), sizes=st.lists(st.integers(1, 50), max_size=40))
def test_raw_pcm_comes_out_whole_however_it_arrives(frames, channels, sizes):
    pcm = RNG.integers(-32768, 32768, (frames, channels)).astype(np.int16)
    blocks = list(read_pcm16(Dribble(pcm.astype("<i2").tobytes(), sizes), channels))
    assert np.array_equal(np.concatenate(blocks), pcm)


def test_raw_pcm_from_a_plain_file_object():
    assert [b.tolist() for b in read_pcm16(io.BytesIO(b"\1\0\2\0"))] == [[[1], [2]]]


@pytest.mark.parametrize(("data", "channels", "rest"), [(b"\0\0\0", 1, 1), (b"\0" * 6, 2, 2)])
def test_raw_pcm_that_ends_within_a_sample(data, channels, rest):
    with pytest.raises(AudioError, match=rf"middle of a sample: {rest} byte\(s\) left over"):
        list(read_pcm16(io.BytesIO(data), channels))


def test_no_raw_pcm_at_all():
    with pytest.raises(AudioError, match="no raw PCM came"):
        list(read_pcm16(io.BytesIO(b"")))
