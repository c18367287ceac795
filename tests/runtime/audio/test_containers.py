"""Container detection (including false positives), the streams of a file, WAV headers, PyAV, implausible samples."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import AudioError, OptionError, TruncatedAudioError
from nemostream.runtime.audio import files
from nemostream.runtime.audio.containers import WavStream, container_of, undecided
from nemostream.runtime.audio.files import AudioFile
from nemostream.runtime.audio.parts import find_parts
from nemostream.runtime.audio.preprocessor import AudioPreprocessor
from nemostream.runtime.audio.sources import open_pipe, open_source, read_pcm16

RNG = np.random.default_rng(5)
# Noise of varying level: MP3 and Opus encoders write frames of many sizes.
NOISE = (RNG.standard_normal(96_000) * (0.02 + 0.1 * np.sin(np.arange(96_000) / 9000) ** 2)).astype(np.float32)
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "rf64": ("RF64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
NAMES = {
    "wav": "WAV",
    "rf64": "WAV",
    "aiff": "AIFF",
    "au": "AU",
    "caf": "CAF",
    "w64": "W64",
    "flac": "FLAC",
    "ogg": "Ogg",
    "opus": "Ogg",
    "mp3": "MP3",
}
# Formats of browsers and phones, and lossless containers: (codec, container, name that `container_of` returns).
PYAV = {
    "a.m4a": ("aac", "mp4", "MP4"),
    "a.webm": ("libopus", "webm", "WebM"),
    "a.aac": ("aac", "adts", "AAC"),
    "alac.m4a": ("alac", "mp4", "MP4"),
    "flac.mkv": ("flac", "matroska", "WebM"),
    "flac.mp4": ("flac", "mp4", "MP4"),
    "pcm.mov": ("pcm_s16le", "mov", "MP4"),
    "a.avi": ("pcm_s16le", "avi", "AVI"),
}
LOSSLESS = ("alac.m4a", "flac.mkv", "flac.mp4", "pcm.mov", "a.avi")


def encoded(kind: str, pcm: np.ndarray = NOISE[:48_000], rate: int = 16000, **options: Any) -> bytes:
    file = io.BytesIO()
    container, subtype = FORMATS[kind]
    soundfile.write(file, pcm, rate, format=container, subtype=options.pop("subtype", subtype), **options)
    return file.getvalue()


def muxed(name: str, pcm: np.ndarray = NOISE[:48_000], rate: int = 16000, **options: str) -> bytes:
    av = pytest.importorskip("av", reason="needs the av extra")
    codec, container, _ = PYAV[name]
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        stream.format = stream.codec.audio_formats[0].name
        resampler = av.AudioResampler(stream.format.name, "mono", stream.rate)
        frame = av.AudioFrame.from_ndarray(np.rint(pcm * 32767).astype("<i2")[None], "s16", "mono")
        frame.sample_rate, frame.pts = rate, 0
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(part))
    return file.getvalue()


def moov_first(mp4: bytes) -> bytes:
    """Rewrite an MP4 file for streaming: move the index before the samples and adjust its offsets."""
    boxes, at = {}, 0
    while at < len(mp4):
        size = int.from_bytes(mp4[at : at + 4], "big")
        boxes[mp4[at + 4 : at + 8]] = at, mp4[at : at + size]
        at += size
    moov = bytearray(boxes.pop(b"moov")[1])
    at = moov.index(b"stco") + 8
    head = boxes[b"ftyp"][1]
    before, _ = boxes[b"mdat"]
    after = len(head) + len(moov)
    for entry in range(at + 4, at + 4 + 4 * int.from_bytes(moov[at : at + 4], "big"), 4):
        offset = int.from_bytes(moov[entry : entry + 4], "big") - before + after
        moov[entry : entry + 4] = offset.to_bytes(4, "big")
    return head + bytes(moov) + boxes[b"mdat"][1]


def read(path: Path) -> np.ndarray:
    with AudioFile(path) as recording:
        return np.concatenate(list(recording.blocks()))


def decoded(data: bytes) -> np.ndarray:
    """Decode with libsndfile only."""
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0]


def assert_same(actual: np.ndarray, expected: np.ndarray, kind: str) -> None:
    """Compare bit-exactly, except MP3: rounding in libmpg123 depends on buffer alignment."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= (1e-6 if kind == "mp3" else 0)


def save(folder: Path, data: bytes, name: str = "a.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# -- container detection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_container_is_detected_from_the_first_bytes(kind: str) -> None:
    data = encoded(kind)
    assert container_of(data[:4096]) == NAMES[kind]
    decided = next(size for size in range(4096) if not undecided(data[:size]))
    assert decided <= 3000 and container_of(data[:decided]) == NAMES[kind]
    assert all(container_of(data[:size]) is None for size in range(decided))


@pytest.mark.parametrize("name", PYAV)
def test_containers_of_browsers_and_phones_are_detected(name: str) -> None:
    assert container_of(muxed(name)[:4096]) == PYAV[name][2]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("MP3", b"ID3\x04\0\0\0\0\0\0"),
        ("MP3", b"ID3\x03\0\0\0\0\0\0"),
        ("AMR", b"#!AMR\n"),
        ("AMR", b"#!AMR-WB\n"),
        ("WMA", bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")),
        ("WebM", b"\x1a\x45\xdf\xa3"),
        ("WAV", b"RIFX\0\0\0\0WAVE"),
        ("WAV", b"RF64\xff\xff\xff\xffWAVE"),
        ("MP4", b"\0\0\0\x1cftypM4A "),
    ],
)
def test_signatures(name: str, data: bytes) -> None:
    assert container_of(data) == name and not undecided(data)


def make_raw_samples() -> dict[str, bytes]:
    time = np.arange(16000) / 16000
    tones = {f"{hz} Hz": np.sin(2 * np.pi * hz * time) for hz in (50, 440, 1000, 3999)}
    steps = {"silence": np.zeros(16000), "square": np.sign(np.sin(2 * np.pi * 100 * time)), "full": np.ones(16000)}
    samples = {}
    for name, signal in {**tones, **steps, "noise": NOISE[:16000] * 5}.items():
        for scale in (1.0, 0.5, 1e-3, -1.0):
            samples[f"{name} {scale} int16"] = (
                np.clip(np.rint(signal * scale * 32767), -32768, 32767).astype("<i2").tobytes()
            )
            samples[f"{name} {scale} float"] = (signal * scale).astype("<f4").tobytes()
    for byte in range(256):  # G.711: silence is 0xFF or 0xD5
        samples[f"byte {byte}"] = bytes([byte]) * 8192
    return samples


def test_raw_samples_are_not_detected_as_a_container() -> None:
    for name, data in make_raw_samples().items():
        assert container_of(data[:4096]) is None, name
        assert not undecided(data[:4096]), name
        for start in range(2, 200, 2):
            assert container_of(data[start : start + 4096]) is None, (name, start)


def test_speech_in_every_encoding_is_not_detected_as_a_container() -> None:
    speech = Path(__file__).parents[2] / "speech" / "human"
    for path in sorted(speech.glob("*.flac"))[:20]:
        for dtype in ("int16", "float32", "int32"):
            data = soundfile.read(path, dtype=dtype, frames=40_000)[0].tobytes()
            for start in range(0, 16_000, 16):
                assert container_of(data[start : start + 4096]) is None, (path, dtype, start)


@given(st.binary(max_size=64))
@settings(max_examples=300, deadline=None)
def test_detection_needs_no_more_bytes_than_a_container_header(data: bytes) -> None:
    if undecided(data):
        assert len(data) < 20 or data[0] == 0xFF


# -- samples that are the bytes of a file ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [1, 3, 5000])
@pytest.mark.parametrize("form", ["int16", "int32", "float 32768", "float 32767", "float64", "bits"])
def test_array_with_the_bytes_of_a_file_is_rejected(kind: str, size: int, form: str) -> None:
    data = encoded(kind)[:8192]
    pcm: np.ndarray = np.frombuffer(data, "<i2")
    if form == "int32":
        pcm = np.frombuffer(data, "<i4")
    elif form == "bits":
        pcm = np.frombuffer(data, "<f4")
    elif form != "int16":
        pcm = pcm.astype(np.float64 if form == "float64" else np.float32) / (32767 if form.endswith("7") else 32768)
    preprocessor = AudioPreprocessor(16000, 1, 16000)
    with (
        np.errstate(all="ignore"),
        pytest.raises(AudioError, match=f"bytes of a {NAMES[kind]} file|integers|int16|NaN"),
    ):
        for start in range(0, len(pcm), size):
            for _ in preprocessor.push(pcm[start : start + size]):
                pass


def test_array_of_samples_is_accepted() -> None:
    for name, data in make_raw_samples().items():
        pcm = np.frombuffer(data, "<f4" if name.endswith("float") else "<i2")
        for size, count in ((1, 600), (4096, 4096)):
            preprocessor = AudioPreprocessor(16000, 1, 16000)
            pieces = (pcm[start : start + size] for start in range(0, count, size))
            assert sum(len(block) for piece in pieces for block in preprocessor.push(piece)) == count


# -- the streams of a file ---------------------------------------------------------------------------------------------

TAG_V1 = b"TAG" + bytes(125)
TAG_V2 = b"ID3\x03\0\0" + bytes([0, 0, 7, 104]) + bytes(1000)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("times", [2, 5])
def test_concatenated_files_are_read_to_the_end(tmp_path: Path, kind: str, times: int) -> None:
    pieces = [
        encoded(kind, NOISE[start : start + 20_000 + 1000 * start // 9000]) for start in range(0, 9000 * times, 9000)
    ]
    expected = np.concatenate([decoded(piece) for piece in pieces])
    with AudioFile(save(tmp_path, b"".join(pieces))) as recording:
        assert recording.duration == pytest.approx(len(expected) / 16000)
        actual = np.concatenate(list(recording.blocks()))
    assert_same(actual, expected, kind)


@pytest.mark.parametrize("kind", ["ogg", "opus", "flac", "mp3", "wav"])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (48000, 1), (16000, 2), (24000, 2)])
def test_later_streams_are_converted_to_the_rate_and_channels_of_the_first(
    tmp_path: Path, kind: str, rate: int, channels: int
) -> None:
    first, other = encoded(kind), encoded(kind, np.stack([NOISE[:30_000]] * channels, 1), rate)
    mono = decoded(other).mean(axis=1)
    expected = np.concatenate([decoded(first)[:, 0], soxr.resample(mono, rate, 16000, quality="HQ")])
    actual = read(save(tmp_path, first + other))
    assert actual.shape[1] == 1 and abs(len(actual) - len(expected)) <= 1
    assert np.abs(actual[: len(expected), 0] - expected[: len(actual)]).max() < 1e-6
    stereo = read(save(tmp_path, other + first))
    assert stereo.shape[1] == channels
    assert_same(stereo[: len(mono)], decoded(other), kind)


def without_table(mp3: bytes) -> bytes:
    """Return an MP3 without its first frame, which contains the length table."""
    for name in (b"Xing", b"Info"):
        if name in mp3[:200]:
            return mp3[mp3.index(mp3[:2], mp3.index(name)) :]
    return mp3


@pytest.mark.parametrize("between", [b"", TAG_V1, TAG_V2, TAG_V1 + TAG_V2, bytes(5000)])
@pytest.mark.parametrize("tables", ["both", "first", "second", "none"])
def test_concatenated_mp3s(tmp_path: Path, between: bytes, tables: str) -> None:
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.3}
    mp3s = [encoded("mp3", NOISE[start : start + 40_000], **options) for start in (0, 40_000)]
    assert all(b"Xing" in mp3[:200] or b"Info" in mp3[:200] for mp3 in mp3s)
    if tables in ("second", "none"):
        mp3s[0] = without_table(mp3s[0])
    if tables in ("first", "none"):
        mp3s[1] = without_table(mp3s[1])
    actual = read(save(tmp_path, TAG_V2 + mp3s[0] + between + mp3s[1] + TAG_V1))[:, 0]
    # Without its table the encoder delay is kept: one to three more frames.
    assert 80_000 <= len(actual) <= 80_000 + 8 * 1152
    second = NOISE[60_000:70_000]
    window = actual[len(actual) - 40_000 :]
    at = int(np.argmax(np.correlate(window, second, "valid")))
    assert np.corrcoef(second, window[at : at + 10_000])[0, 1] > 0.6


def test_mp3_and_flac_with_tags(tmp_path: Path) -> None:
    for kind in ("mp3", "flac"):
        data = encoded(kind)
        assert_same(read(save(tmp_path, TAG_V2 + data + TAG_V1)), decoded(data), kind)


def test_flac_without_a_length(tmp_path: Path) -> None:
    data = bytearray(encoded("flac"))
    expected = decoded(bytes(data))
    data[21] &= 0xF0  # the number of samples in STREAMINFO, as ffmpeg writes it to a pipe
    data[22:26] = bytes(4)
    with AudioFile(save(tmp_path, data)) as recording:
        assert recording.duration == 3.0
        assert np.array_equal(np.concatenate(list(recording.blocks())), expected)
    assert np.array_equal(read(save(tmp_path, bytes(data) * 2)), np.concatenate([expected, expected]))


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_ogg_stream_cut_within_a_page_is_an_error(tmp_path: Path, kind: str) -> None:
    data = encoded(kind, NOISE)
    with pytest.raises(AudioError, match="cut short"):
        read(save(tmp_path, data[: len(data) * 3 // 4] + data))


def test_long_ogg_chain(tmp_path: Path) -> None:
    data = encoded("opus", NOISE[:1600])
    path = save(tmp_path, data * 300)
    with path.open("rb") as file:
        parts = find_parts(file)
    assert [part.start for part in parts] == list(range(0, len(data) * 300, len(data)))
    assert len(read(path)) == 300 * len(decoded(data))


# -- WAV ---------------------------------------------------------------------------------------------------------------


def wav(pcm: bytes, size: int | None = None, after: bytes = b"", riff: int | None = None, **fields: int) -> bytes:
    """Make a WAV file with arbitrary sizes in its header."""
    rate, channels, bits, tag = (
        fields.get(name, value) for name, value in (("rate", 16000), ("channels", 1), ("bits", 16), ("tag", 1))
    )
    frame = channels * bits // 8
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, tag, channels, rate, rate * frame, frame, bits)
    head += b"LIST" + struct.pack("<I", 5) + b"INFOx\0"  # an odd chunk and its padding
    head += b"data" + struct.pack("<I", len(pcm) if size is None else size)
    body = head + pcm + after
    return b"RIFF" + struct.pack("<I", len(body) if riff is None else riff) + body


PCM = np.rint(NOISE[:32_000] * 32767).astype("<i2")
TAIL = b"LIST" + struct.pack("<I", 4000) + b"INFO" + RNG.bytes(3996)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
@pytest.mark.parametrize("riff", [0, 36, 0xFFFFFFFF, 0x7FFFF024])
def test_unset_size_means_the_end_of_the_file(tmp_path: Path, size: int, riff: int) -> None:
    path = save(tmp_path, wav(PCM.tobytes(), size, riff=riff))
    assert np.array_equal(read(path)[:, 0], PCM / np.float32(32768))
    with AudioFile(path) as recording:
        assert recording.duration == 2.0


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW"])
@pytest.mark.parametrize("kind", ["wav", "rf64"])
@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
def test_unset_sizes_in_every_sample_format(tmp_path: Path, subtype: str, kind: str, endian: str) -> None:
    if kind == "rf64" and endian == "BIG":
        pytest.skip("RF64 is little-endian only")
    data = bytearray(encoded(kind, subtype=subtype, endian=endian))
    expected = decoded(bytes(data))
    at = data.index(b"data") + 4
    if kind == "rf64" and b"ds64" in data:
        ds64 = data.index(b"ds64") + 8
        data[ds64 : ds64 + 16] = bytes(16)
        data[at : at + 4] = b"\xff" * 4
    else:
        data[at : at + 4] = bytes(4)
        data[4:8] = bytes(4)
    actual = read(save(tmp_path, data))
    assert np.array_equal(actual[: len(expected)], expected)
    assert len(actual) - len(expected) <= 4  # a PEAK chunk after the samples would be read as well


def test_empty_wav_contains_no_audio_whatever_follows(tmp_path: Path) -> None:
    for data in (wav(b""), wav(b"", after=TAIL), wav(b"", after=b"LIST" + struct.pack("<I", 3) + b"abc\0")):
        with pytest.raises(AudioError, match="contains no audio"):
            read(save(tmp_path, data))


def test_bytes_after_the_data_chunk_are_ignored(tmp_path: Path) -> None:
    for data in (wav(PCM.tobytes(), after=TAIL), wav(PCM.tobytes()) + TAG_V1, wav(PCM.tobytes(), after=TAIL, riff=0)):
        assert np.array_equal(read(save(tmp_path, data))[:, 0], PCM / np.float32(32768))


@pytest.mark.parametrize("too_many", [2, 100, 640])
def test_size_a_few_milliseconds_too_large_is_tolerated(tmp_path: Path, too_many: int) -> None:
    path = save(tmp_path, wav(PCM.tobytes(), 2 * len(PCM) + too_many))
    assert len(read(path)) == len(PCM)


def test_truncation_is_raised_after_all_available_audio(tmp_path: Path) -> None:
    path = save(tmp_path, wav(PCM.tobytes(), 5 * len(PCM)))
    blocks = []
    with AudioFile(path) as recording, pytest.raises(TruncatedAudioError) as caught:
        for block in recording.blocks():
            blocks.append(block)
    assert np.array_equal(np.concatenate(blocks)[:, 0], PCM / np.float32(32768))
    assert "3.00 s of the 5.00 s" in str(caught.value) and str(path) in str(caught.value)
    assert isinstance(caught.value, AudioError) and caught.value.exit_code == 11 != AudioError.exit_code
    with pytest.raises(TruncatedAudioError), open_source(path, 16000, 1) as source:  # raised on exit
        assert sum(len(block) for block in source.blocks) == len(PCM)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"RIFF\x24\0\0\0WAVEdata" + struct.pack("<I", 1000) + bytes(1000), "no fmt chunk"),
        (b"RIFF\x24\0\0\0WAVEfmt \2\0\0\0\1\0data" + struct.pack("<I", 1000) + bytes(1000), "fmt chunk has 2 bytes"),
    ],
)
def test_damaged_wav_header_is_an_error_that_names_the_file(tmp_path: Path, data: bytes, message: str) -> None:
    path = save(tmp_path, data)
    with pytest.raises(AudioError, match=f"{path}.*{message}"):
        read(path)


@pytest.mark.parametrize("rate", [1, 3999, 768_001, 4_000_000])
def test_rate_out_of_range(tmp_path: Path, rate: int) -> None:
    with pytest.raises(AudioError, match=f"rate of {rate} Hz; it must be from 4000 to 768000 Hz"):
        read(save(tmp_path, wav(PCM.tobytes(), rate=rate)))


@given(cuts=st.lists(st.integers(1, 300), max_size=60), after=st.sampled_from([b"", TAIL, b"id3 " + bytes(30), b"x"]))
@settings(max_examples=60, deadline=None)
def test_wav_stream_returns_its_samples_for_any_division(cuts: list[int], after: bytes) -> None:
    data = wav(PCM[:3000].tobytes(), after=after)
    stream, actual = WavStream(), b""
    at = 0
    for size in [*cuts, len(data)]:
        actual += stream.push(data[at : at + size])
        at += size
    assert actual == PCM[:3000].tobytes() and stream.missing == 0
    assert stream.header and (stream.header.sample_rate, stream.header.encoding) == (16000, "pcm_s16le")


def test_consecutive_wav_files_in_a_stream() -> None:
    one, two = wav(PCM[:999].tobytes(), after=TAIL), wav(PCM[999:2000].tobytes())
    odd = wav(bytes(range(255)), bits=8, tag=7)
    for size in (1, 7, 10_000):
        stream, data = WavStream(), one + two
        actual = b"".join(stream.push(data[at : at + size]) for at in range(0, len(data), size))
        assert actual == PCM[:2000].tobytes()
        stream, data = WavStream(), odd + b"\0" + odd
        assert b"".join(stream.push(data[at : at + size]) for at in range(0, len(data), size)) == bytes(range(255)) * 2
    stream = WavStream()
    with pytest.raises(AudioError, match=r"8000 Hz.*16000 Hz"):
        stream.push(one + wav(PCM.tobytes(), rate=8000))


# -- standard input ----------------------------------------------------------------------------------------------------


class Pipe(io.RawIOBase):
    """A pipe that returns at most `size` bytes per read."""

    def __init__(self, data: bytes, size: int) -> None:
        self.data, self.size = data, size

    def read1(self, size: int) -> bytes:
        data, self.data = self.data[: min(size, self.size)], self.data[min(size, self.size) :]
        return data


def from_pipe(data: bytes, size: int = 1000, channels: int = 1) -> tuple[int, np.ndarray]:
    with open_pipe(Pipe(data, size), 16000, channels) as source:
        return source.sample_rate, np.concatenate(list(source.blocks))


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
@pytest.mark.parametrize("kind", FORMATS)
def test_file_on_standard_input_is_decoded(kind: str, size: int) -> None:
    data = encoded(kind, NOISE[:20_000], 24000)
    rate, actual = from_pipe(data, size)
    if actual.dtype != np.float32:
        actual = actual / np.float32(32768)
    expected = decoded(data)
    assert rate == 24000
    assert_same(actual, expected, kind)


@pytest.mark.parametrize("size", [1, 999, 1 << 20])
def test_raw_pcm_on_standard_input_is_unchanged(size: int) -> None:
    for data in (PCM.tobytes(), bytes(8000), b"RIFF" + PCM.tobytes(), b"\xff\xfb" + PCM.tobytes(), b"RI"):
        rate, actual = from_pipe(data, size)
        assert rate == 16000 and actual.astype("<i2").tobytes() == data


def test_wav_on_standard_input_is_processed_as_it_arrives() -> None:
    """Not only at its end: the writing program may never end."""

    class Endless(Pipe):
        def read1(self, size: int) -> bytes:
            return super().read1(size) or PCM[:1000].tobytes()

    with open_pipe(Endless(wav(b"", 0xFFFFFFFF), 100), 16000) as source:
        blocks = iter(source.blocks)
        assert [len(next(blocks)) for _ in range(20)] == [1000] * 20


def test_truncated_wav_on_standard_input() -> None:
    blocks = []
    cut = Pipe(wav(PCM.tobytes(), 4 * len(PCM)), 1000)
    message = r"standard input is cut short: 2\.00 s of the 4\.00 s"
    with pytest.raises(TruncatedAudioError, match=message), open_pipe(cut, 16000) as source:
        blocks.extend(source.blocks)
    assert sum(map(len, blocks)) == len(PCM)
    assert len(from_pipe(wav(PCM.tobytes(), 2 * len(PCM) + 64))[1]) == len(PCM)
    assert len(from_pipe(wav(PCM.tobytes(), after=TAIL))[1]) == len(PCM)


@pytest.mark.parametrize("kind", FORMATS)
def test_read_pcm16_rejects_files(kind: str) -> None:
    with pytest.raises(AudioError, match=f"is a {NAMES[kind]} file"):
        list(read_pcm16(io.BytesIO(encoded(kind))))


# -- PyAV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PYAV)
def test_files_of_browsers_and_phones_are_decoded(tmp_path: Path, name: str) -> None:
    data = muxed(name)
    with AudioFile(save(tmp_path, data, name)) as recording:
        assert recording.sample_rate == (48000 if name == "a.webm" else 16000) and recording.channels == 1
        assert recording.duration == pytest.approx(3.0, abs=0.15)
        actual = np.concatenate(list(recording.blocks()))[:, 0]
    if name in LOSSLESS:
        assert np.array_equal(actual, np.rint(NOISE[:48_000] * 32767).astype(np.int16) / np.float32(32768))
        return
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(data)) as file:  # FFmpeg's own conversion to float, by its resampler
        resampler = av.AudioResampler("fltp", "mono", recording.sample_rate)
        frames = [part for frame in file.decode(audio=0) for part in resampler.resample(frame)]
    assert np.array_equal(actual, np.concatenate([frame.to_ndarray()[0] for frame in frames]))
    tone = soxr.resample(actual, recording.sample_rate, 16000)[:40_000]
    lags = [np.corrcoef(tone[1100:], NOISE[1100 - lag : 40_000 - lag])[0, 1] for lag in range(1100)]
    assert max(lags) > 0.6


@pytest.mark.parametrize("bits", [16, 24])
def test_flac_in_matroska_equals_flac_read_by_libsndfile(tmp_path: Path, bits: int) -> None:
    av = pytest.importorskip("av", reason="needs the av extra")
    flac = io.BytesIO()
    stereo = NOISE[:60_000].reshape(-1, 2)
    soundfile.write(flac, stereo, 16000, format="FLAC", subtype=f"PCM_{bits}")
    flac.seek(0)
    path = tmp_path / "a.mkv"
    with av.open(flac) as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    assert np.array_equal(read(path), decoded(flac.getvalue()))


@pytest.mark.parametrize("name", [name for name in PYAV if name != "a.avi"])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_files_of_browsers_and_phones_are_an_error(tmp_path: Path, name: str, keep: float) -> None:
    data = muxed(name)
    for whole in (data, moov_first(data) if PYAV[name][1] in ("mp4", "mov") else data):
        path = save(tmp_path, whole[: int(len(whole) * keep)])
        with pytest.raises(AudioError, match=f"{path}.*(cut short|cannot be read)"):
            read(path)


@pytest.mark.parametrize("name", ["a.m4a", "a.webm", "a.aac", "alac.m4a"])
def test_concatenated_files_of_browsers_and_phones(tmp_path: Path, name: str) -> None:
    data = muxed(name)
    once, twice = len(read(save(tmp_path, data))), len(read(save(tmp_path, data * 2)))
    assert abs(twice - 2 * once) <= 0.02 * once


def test_first_audio_track_of_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs the av extra")
    path = tmp_path / "a.mkv"
    pcm = np.rint(NOISE[:32_000] * 32767).astype("<i2")
    with av.open(str(path), "w") as output:
        video = output.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = output.add_stream("pcm_s16le", rate=16000, layout="mono")
        for number in range(40):  # the video is longer
            picture = av.VideoFrame(64, 64, "yuv420p")
            picture.pts = number
            output.mux(video.encode(picture))
        frame = av.AudioFrame.from_ndarray(pcm[None], "s16", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        output.mux(audio.encode(frame))
        output.mux(video.encode(None))
        output.mux(audio.encode(None))
    assert np.array_equal(read(path)[:, 0], pcm / np.float32(32768))
    silent = tmp_path / "silent.mkv"
    with av.open(str(silent), "w") as output:
        video = output.add_stream("mpeg4", rate=10)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        picture = av.VideoFrame(64, 64, "yuv420p")
        picture.pts = 0
        output.mux(video.encode(picture))
        output.mux(video.encode(None))
    with pytest.raises(AudioError, match="has no audio track"):
        read(silent)


def test_playlists_are_rejected(tmp_path: Path) -> None:
    """Playlists would let their sender open arbitrary files and addresses."""
    save(tmp_path, encoded("wav"), "a.wav")
    for text in ("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.wav\n", "ffconcat version 1.0\nfile a.wav\n"):
        with pytest.raises(AudioError, match="cannot be read as audio"):
            read(save(tmp_path, text.encode(), "list.m3u8"))


@pytest.mark.parametrize("name", PYAV)
def test_without_pyav_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = save(tmp_path, muxed(name), name)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(AudioError, match=f"{path}.*{PYAV[name][2]}.*`av` extra \\(pip install av\\)"):
        read(path)
    with pytest.raises(AudioError, match=r"cannot be read as audio.*`av` extra"):
        read(save(tmp_path, b"no audio at all " * 100))


def test_blocks_of_long_compressed_files_are_bounded(tmp_path: Path) -> None:
    path = save(tmp_path, muxed("alac.m4a", np.zeros(1_000_000, np.float32)))
    with AudioFile(path) as recording:
        assert max(len(block) for block in recording.blocks()) <= 2 * files.BLOCK


# -- implausible samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("at", [0, files.BLOCK + 5])
def test_floats_on_an_integer_scale_are_rejected_before_processing(dtype: type, at: int) -> None:
    pcm = np.zeros(files.BLOCK * 2, dtype)
    pcm[at] = -20_000
    preprocessor = AudioPreprocessor(16000, 1, 16000)
    with pytest.raises(
        AudioError, match=f"value 20000 at sample {at} .*int16 scale: divide by 32768.*the push was rejected"
    ):
        preprocessor.push(pcm)
    assert preprocessor.received == 0


def test_error_names_the_scale() -> None:
    with pytest.raises(AudioError, match=r"divide by 2\*\*23 or 2\*\*31"):
        AudioPreprocessor(16000, 1, 16000).push(np.array([0.0, 5e6]))
    with pytest.raises(AudioError, match=r"at sample 1 of.*int16 scale"):
        AudioPreprocessor(16000, 2, 16000).push(np.array([[0.0, 0.0], [0.0, 900.0]]))


def test_clipping_audio_is_accepted(tmp_path: Path) -> None:
    loud = np.array([-8.0, 8.0, 3.0], np.float32)
    assert np.concatenate(list(AudioPreprocessor(16000, 1, 16000).push(loud))).tolist() == loud.tolist()
    path = tmp_path / "a.wav"
    soundfile.write(path, loud, 16000, subtype="FLOAT")
    assert read(path)[:, 0].tolist() == loud.tolist()


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_float_file_on_an_integer_scale_is_rejected(tmp_path: Path, subtype: str) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, NOISE * 32768, 16000, subtype=subtype)
    with pytest.raises(AudioError, match=f"{path} contains the value .*int16 scale: divide by 32768"):
        read(path)


# -- invalid numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["16000", b"16000", None, True, [16000], 16000 + 0j])
def test_rate_that_is_not_a_number(rate: Any) -> None:
    with pytest.raises(OptionError, match="sample_rate is "):
        AudioPreprocessor(rate, 1, 16000)
    with pytest.raises(OptionError, match="sample_rate is "), open_source(NOISE, rate, 1):
        pass


@pytest.mark.parametrize("channels", ["1", None, 1.5, True, float("nan")])
def test_channels_that_are_not_a_number(channels: Any) -> None:
    with pytest.raises(OptionError, match="channels is "):
        AudioPreprocessor(16000, channels, 16000)


@pytest.mark.parametrize("rate", [np.int64(16000), np.float32(16000), 16000.0])
def test_numpy_numbers_are_accepted(rate: Any) -> None:
    preprocessor = AudioPreprocessor(rate, np.int8(1), 16000)
    assert (preprocessor.sample_rate, preprocessor.channels) == (16000, 1)


@pytest.mark.parametrize("shape", [(), (1, 1, 5), (2, 3, 4)])
def test_arrays_of_invalid_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(AudioError, match="must be \\[N\\]"), open_source(np.zeros(shape, np.float32), 16000, 1):
        pass


# -- hostile files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [wav(b""), b"fLaC\x80\0\0\x22" + bytes(34)])
def test_file_with_too_many_streams_is_rejected(tmp_path: Path, stream: bytes) -> None:
    with pytest.raises(AudioError, match="more than 4096 streams"):
        read(save(tmp_path, stream * 5000))


@pytest.mark.parametrize("filling", [b"\xff", b"Xing", b"\xff\xfb\x90", b"OggS", b"TAG", b"\0\0\0\x08ftyp", b"ID3\3\0"])
@pytest.mark.parametrize("kind", ["mp3", "ogg", "flac", "wav"])
def test_garbage_after_a_stream_is_ignored_or_rejected(tmp_path: Path, kind: str, filling: bytes) -> None:
    path = save(tmp_path, encoded(kind, NOISE[:8000]) + filling * (200_000 // len(filling)))
    try:
        assert len(read(path)) >= 8000
    except AudioError as error:
        assert str(path) in str(error)
