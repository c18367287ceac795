from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import AudioError, OptionError, TruncatedAudioError
from nemostream.runtime.audio import sources
from nemostream.runtime.audio.files import AudioFile
from nemostream.runtime.audio.preprocessor import AudioPreprocessor, as_float32
from nemostream.runtime.audio.sources import open_pipe, open_source, read_pcm16

RNG = np.random.default_rng(3)
NOISE = (RNG.standard_normal(200_000) * 0.1).astype(np.float32)


def process(preprocessor: AudioPreprocessor, *pushes: np.ndarray) -> np.ndarray:
    blocks = [as_float32(block) for pcm in pushes for block in preprocessor.push(pcm)]
    return np.concatenate([np.zeros(0, np.float32), *blocks, preprocessor.finish()])


def test_integers_are_scaled_and_floats_are_unchanged():
    for pcm, scale in ((np.array([-32768, 0, 16384], np.int16), 32768), (np.array([-(2**31), 2**30], np.int32), 2**31)):
        assert process(AudioPreprocessor(16000, 1, 16000), pcm).tolist() == (pcm / scale).tolist()
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        assert process(AudioPreprocessor(16000, 1, 16000), np.array([-1, 0.5], dtype)).tolist() == [-1, 0.5]
    assert process(AudioPreprocessor(16000, 1, 16000), np.array([16384], ">i2")).tolist() == [0.5]


@pytest.mark.parametrize(
    ("dtype", "shape", "rate", "unchanged"),
    [
        (np.int16, (3,), 16000, True),
        (">i2", (3,), 16000, False),
        (np.int16, (3, 1), 16000, False),
        (np.int16, (3,), 8000, False),
        (np.int32, (3,), 16000, False),
    ],
)
def test_only_int16_that_needs_no_conversion_is_returned_unchanged(dtype, shape, rate, unchanged):
    pcm = np.ones(shape, dtype)
    (block,) = AudioPreprocessor(rate, 1, 16000).push(pcm)
    assert (block is pcm) == unchanged
    assert block.dtype == (np.int16 if unchanged else np.float32) and block.ndim == 1


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
    oracle = soxr.resample(whole, rate, 16000, quality="HQ")
    assert len(streamed) == len(oracle) and np.abs(streamed - oracle).max(initial=0) < 5e-7
    assert np.array_equal(streamed, process(AudioPreprocessor(rate, 1, 16000), whole))
    assert preprocessor.seconds == len(whole) / rate


@given(
    rate=st.sampled_from([8000, 11025, 22050, 44100, 44101, 48000]),
    sizes=st.lists(st.integers(0, 90_000), min_size=1, max_size=12),
    flushes=st.sets(st.integers(0, 11), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_a_saved_state_continues_with_the_same_samples(rate, sizes, flushes):
    """Saved before each push, also while two segments of the resampler overlap, and before its first output."""
    noise = np.concatenate([NOISE, NOISE, NOISE])
    whole, saved = AudioPreprocessor(rate, 1, 16000), AudioPreprocessor(rate, 1, 16000)
    at = 0
    for number, size in enumerate(sizes):
        state, saved = saved.save(), AudioPreprocessor(rate, 1, 16000)
        saved.load({name: array.copy() for name, array in state.items()})
        found, expected = (
            [*one.push(noise[at : at + size]), *([one.flush()] if number in flushes else [])] for one in (saved, whole)
        )
        assert np.array_equal(np.concatenate([NOISE[:0], *found]), np.concatenate([NOISE[:0], *expected]))
        assert saved.seconds == whole.seconds
        at += size
    assert np.array_equal(saved.finish(), whole.finish())


def test_the_callers_array_may_be_reused():
    """Also by the next segment of the resampler, which begins with earlier input."""
    noise = np.concatenate([NOISE, NOISE])
    reused, preprocessor, found = np.zeros(50, np.float32), AudioPreprocessor(8000, 1, 16000), []
    for at in range(0, len(noise), len(reused)):
        reused[:] = noise[at : at + len(reused)]
        found += [block.copy() for block in preprocessor.push(reused)]
    found.append(preprocessor.finish())
    assert np.array_equal(np.concatenate(found), process(AudioPreprocessor(8000, 1, 16000), noise))


@pytest.mark.parametrize(
    ("rate", "counts", "history"),
    [
        (8000, [5, 0, 11], 5),
        (8000, [40_000, 7, 0], 30_000),
        (8000, [40_000, 30_000, 80_000], 100),
        (8000, [5], 5),
        (16000, [5], 5),
        (16000, [5, 0, 5], 0),
        (8000, [-1, 0, 0], 0),
    ],
)
def test_invalid_states_are_rejected(rate, counts, history):
    with pytest.raises(ValueError):
        AudioPreprocessor(rate, 1, 16000).load({"counts": np.array(counts), "history": NOISE[:history]})


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


def test_limits_are_inclusive():
    for rate in (4000, 768_000):
        assert AudioPreprocessor(rate, 64, 16000).sample_rate == rate
    with pytest.raises(OptionError, match="channels is 65, not 1 to 64"):
        AudioPreprocessor(16000, 65, 16000)
    loudest = np.array([32.0, -32.0], np.float32)
    assert process(AudioPreprocessor(16000, 1, 16000), loudest).tolist() == [32, -32]
    for value, scale in ((-40.0, "int16 scale"), (65536.0, "int16 scale"), (-65537.0, "larger integers")):
        with pytest.raises(AudioError, match=f"the value {abs(value):.6g} at sample 2 of this push .*{scale}"):
            AudioPreprocessor(16000, 1, 16000).push(np.array([*loudest, value], np.float32))


@given(
    channels=st.integers(1, 4),
    dtype=st.sampled_from(["<i2", ">i2", "<i4", "<f4", "<f8"]),
    rates=st.sampled_from([(16000, 16000), (44100, 16000), (16000, 8000), (8000, 16000)]),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
)
@settings(max_examples=40)
def test_samples_are_scaled_mixed_and_then_resampled(channels, dtype, rates, cuts):
    pcm = NOISE[: 3000 * channels].reshape(-1, channels)
    if dtype[1] == "i":
        pcm = np.rint(pcm * 2.0 ** (8 * int(dtype[2]) - 1))
    pcm = pcm.astype(dtype)
    scaled = pcm.astype(np.float32) / np.float32(1 if dtype[1] == "f" else 2.0 ** (8 * int(dtype[2]) - 1))
    expected = scaled.mean(axis=1)
    if rates[0] != rates[1]:
        expected = soxr.resample(expected, *rates, quality="HQ")
    preprocessor, before = AudioPreprocessor(rates[0], channels, rates[1]), pcm.copy()
    actual = process(preprocessor, *np.split(pcm, sorted(cuts)))
    assert np.array_equal(actual, expected) and actual.dtype == np.float32
    assert preprocessor.received == 3000 and preprocessor.seconds == 3000 / rates[0]
    assert np.array_equal(pcm, before)  # the caller's samples are unchanged


@pytest.mark.parametrize("rate", [16000, 44100])
def test_audio_after_a_flush_is_a_new_recording(rate):
    preprocessor = AudioPreprocessor(rate, 1, 16000)
    for part in (NOISE[:5000], NOISE[5000:12_000]):
        blocks = [*preprocessor.push(part), preprocessor.flush()]
        alone = soxr.resample(part, rate, 16000, quality="HQ") if rate != 16000 else part
        assert np.array_equal(np.concatenate(blocks), alone)
    assert preprocessor.received == 12_000


def test_files_are_recognized_only_at_the_start_of_a_stream():
    """A rejected push leaves the stream unchanged, including its record of the first bytes."""
    file = io.BytesIO()
    soundfile.write(file, NOISE[:4000], 16000, format="FLAC")
    content = np.frombuffer(file.getvalue()[:4000], "<i2")
    preprocessor = AudioPreprocessor(16000, 1, 16000)
    assert len(process(preprocessor, content[:1])) == 1  # "fL" is not a container yet
    for _ in range(2):
        with pytest.raises(AudioError, match="bytes of a FLAC file"):
            preprocessor.push(content[1:])
        assert preprocessor.received == 1
    assert len(process(preprocessor, np.zeros(2, np.int16))) == 2
    assert len(process(preprocessor, content)) == len(content)  # later in the stream, these are samples
    preprocessor = AudioPreprocessor(16000, 1, 16000)
    assert len(process(preprocessor, NOISE[:4096], content)) == 4096 + len(content)


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


# -- sources ---------------------------------------------------------------------------------------------------------


def wav_file(stated: int, pcm: np.ndarray = NOISE[:32_000]) -> bytes:
    """Return a 16-bit WAV file at 8 kHz whose header states `stated` samples."""
    file = io.BytesIO()
    soundfile.write(file, pcm, 8000, format="WAV", subtype="PCM_16")
    data = bytearray(file.getvalue())
    data[40:44] = struct.pack("<I", 2 * stated * (1 if pcm.ndim == 1 else pcm.shape[1]))
    return bytes(data)


def every_kind_of_source(data: bytes, folder: Path) -> Iterator[tuple[Any, int, int]]:
    """Yield the file as each kind of source, and a sample rate and number of channels that do not apply to it."""
    path = folder / "a.wav"
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), path.open("rb")):
        yield source, 16000, 7
    yield AudioFile(path), 16000, 7


def test_sources_of_a_file_have_its_rate_channels_and_samples(tmp_path):
    pcm = NOISE[:60_000].reshape(-1, 2)
    for source, rate, channels in every_kind_of_source(wav_file(30_000, pcm), tmp_path):
        with open_source(source, rate, channels) as opened:
            assert (opened.sample_rate, opened.channels, opened.duration) == (8000, 2, 3.75), source
            assert np.abs(np.concatenate(list(opened.blocks)) - pcm).max() <= 1 / 32768
        if isinstance(source, AudioFile):
            with open_source(source, rate, channels) as again:  # the caller closes it
                assert again.duration == 3.75
            source.close()


def test_truncated_sources(tmp_path):
    """All available samples come first; nothing is raised if the consumer stops before the end."""
    for source, rate, channels in every_kind_of_source(wav_file(40_000), tmp_path):
        blocks = []
        with (
            pytest.raises(TruncatedAudioError, match=r"1\.00 s of the 5\.00 s"),
            open_source(source, rate, channels) as opened,
        ):
            blocks = list(opened.blocks)
        assert sum(map(len, blocks)) == 32_000
    for source, rate, channels in every_kind_of_source(wav_file(400_000, NOISE), tmp_path):
        with open_source(source, rate, channels) as opened:
            assert len(next(iter(opened.blocks))) < len(NOISE)


def test_arrays_are_divided_into_blocks():
    mono, stereo = NOISE[: sources.BLOCK + 5], NOISE[:200_000].reshape(-1, 2)
    for array, channels in ((mono, 1), (stereo, 2), (stereo.astype(np.int16), 2), (mono[:, None], 1)):
        with open_source(array, 8000, 3) as opened:
            assert (opened.sample_rate, opened.channels, opened.duration) == (8000, channels, len(array) / 8000)
            blocks = list(opened.blocks)
            assert [len(block) for block in blocks] == [sources.BLOCK, len(array) - sources.BLOCK]
            assert np.array_equal(np.concatenate(blocks), array) and blocks[0].dtype == array.dtype


def test_iterables_have_the_given_rate_and_channels():
    arrays = [NOISE[:100], NOISE[:7]]
    with open_source(iter(arrays), 44100, 2) as opened:
        assert (opened.sample_rate, opened.channels, opened.duration) == (44100, 2, 0.0)
        assert list(opened.blocks) == arrays


class Asynchronous:
    async def __aiter__(self):
        yield NOISE


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros(0, np.int16), "the audio is empty"),
        (np.zeros((0, 2)), "the audio is empty"),
        (np.zeros((2, 2, 2)), r"shape \[2, 2, 2\]"),
        (Asynchronous(), "needs `async for`"),
        (5, "unsupported audio source of type int; pass a path, "),
        (b"", "is empty"),
    ],
)
def test_invalid_sources(source, message):
    with pytest.raises(AudioError, match=message), open_source(source, 16000, 1):
        pass


# -- WAV files on standard input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("subtype", "endian", "streamed"),
    [
        ("PCM_16", "LITTLE", True),
        ("FLOAT", "LITTLE", True),
        ("PCM_16", "BIG", False),
        ("FLOAT", "BIG", False),
        ("PCM_24", "LITTLE", False),
        ("ALAW", "LITTLE", False),
        ("DOUBLE", "LITTLE", False),
    ],
)
def test_wav_on_standard_input_equals_the_file(subtype, endian, streamed, size):
    """Only sample formats that need no decoder are processed before the end of the input."""
    file, stereo = io.BytesIO(), NOISE[:3000].reshape(-1, 2)
    soundfile.write(file, stereo, 24000, format="WAV", subtype=subtype, endian=endian)
    pipe = Dribble(file.getvalue(), [size] * (10_000 // size))
    with open_pipe(pipe, 16000, 7) as opened:
        assert (len(pipe.data) > 0) == (streamed and size < 1 << 20)
        assert (opened.sample_rate, opened.channels) == (24000, 2)
        actual = np.concatenate(list(opened.blocks))
        assert opened.duration == (0.0 if streamed else 1500 / 24000)
    file.seek(0)
    expected = soundfile.read(file, dtype="float32")[0]
    assert np.array_equal(actual / np.float32(32768) if actual.dtype == np.int16 else actual, expected)


def test_wav_on_standard_input_may_lack_20_ms(tmp_path):
    """As in a file."""
    for missing, raises in ((160, False), (161, True)):
        data = wav_file(32_000 + missing)
        for source in (Dribble(data, [1000] * 50), io.BytesIO(data)):
            opener = open_pipe(source, 16000) if isinstance(source, Dribble) else open_source(source, 16000, 1)
            count, truncated = 0, False
            try:
                with opener as opened:
                    count = sum(map(len, opened.blocks))
            except TruncatedAudioError:
                truncated = True
            assert (count, truncated) == (32_000, raises)


def test_wav_without_samples_on_standard_input():
    for data in (wav_file(0)[:44], wav_file(1)[:45]):
        with (
            pytest.raises(AudioError, match="standard input contains no audio"),
            open_pipe(io.BytesIO(data), 16000) as opened,
        ):
            list(opened.blocks)


def test_raw_pcm_on_standard_input_has_the_given_rate_and_channels():
    pcm = RNG.integers(-32768, 32768, (200_000, 3)).astype("<i2")
    with open_pipe(io.BytesIO(pcm.tobytes()), 44100, 3) as opened:
        assert (opened.sample_rate, opened.channels, opened.duration) == (44100, 3, 0.0)
        blocks = list(opened.blocks)
    assert len(blocks) > 1 and np.array_equal(np.concatenate(blocks), pcm) and blocks[0].dtype == np.int16
