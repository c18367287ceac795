"""Where the streams of a file begin and end, with files that are made byte by byte from the formats' specifications."""

from __future__ import annotations

import io
import itertools
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import AudioError
from nemostream.runtime.audio.files import _Section
from nemostream.runtime.audio.parts import AudioPart, find_parts


def parts_of(data: bytes, folder: Path) -> list[AudioPart]:
    path = folder / "a.bin"
    path.write_bytes(data)
    with path.open("rb") as file:
        return find_parts(file)


def spans(parts: list[AudioPart]) -> list[tuple[str | None, int, int]]:
    return [(part.container, part.start, part.end) for part in parts]


def expected_spans(*files: tuple[str, bytes]) -> list[tuple[str | None, int, int]]:
    ends = list(itertools.accumulate(len(data) for _, data in files))
    return [(name, end - len(data), end) for (name, data), end in zip(files, ends, strict=True)]


# Bytes with which a file of another container would begin, inside a file.
DECOY = b"fLaC\0\0\0\x22RIFF\x20\0\0\0WAVEOggS\0\2"

# -- containers that state their size ----------------------------------------------------------------------------------


def wav(body: bytes = DECOY * 40, order: str = "<") -> bytes:
    format = struct.pack(order + "IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
    chunks = b"WAVEfmt " + format + b"data" + struct.pack(order + "I", len(body)) + body + b"\0" * (len(body) % 2)
    return (b"RIFX" if order == ">" else b"RIFF") + struct.pack(order + "I", len(chunks)) + chunks


def aiff(body: bytes = DECOY * 40) -> bytes:
    return b"FORM" + struct.pack(">I", 4 + len(body)) + b"AIFF" + body


def w64(body: bytes = DECOY * 40) -> bytes:
    return b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000") + struct.pack("<Q", 24 + len(body)) + body


def au(body: bytes = DECOY * 40, start: int = 0x0128, length: int | None = None) -> bytes:
    return (b".snd" + struct.pack(">II", start, len(body) if length is None else length)).ljust(start, b"\1") + body


def caf(body: bytes = DECOY * 40, length: int | None = None) -> bytes:
    data = b"data" + struct.pack(">q", len(body) if length is None else length) + body
    return b"caff\0\1\0\0" + b"desc" + struct.pack(">q", 0x0103) + DECOY.ljust(0x0103, b"\2") + data


def mp4(body: bytes = DECOY * 40, wide: bool = False) -> bytes:
    """Boxes of 32-bit or 64-bit sizes, the index before or after the samples."""
    size = struct.pack(">I4sQ", 1, b"mdat", 16 + len(body)) if wide else struct.pack(">I4s", 8 + len(body), b"mdat")
    index = struct.pack(">I4s", 8 + 0x0102, b"moov") + b"ftyp".ljust(0x0102, b"\3")
    head = struct.pack(">I4s", 16, b"ftyp") + b"M4A \0\0\0\0"
    return head + (size + body + index if wide else index + size + body)


def ogg_page(body: bytes, first: bool = False) -> bytes:
    count = len(body) // 255 + 1
    sizes = b"\xff" * (count - 1) + bytes([len(body) % 255])
    return b"OggS\0" + bytes([2 * first]) + b"\5" * 20 + bytes([count]) + sizes + body


def ogg(body: bytes = b"OggS\0\2" * 100) -> bytes:
    """Two multiplexed streams, as of a video: both begin before the first other page."""
    return ogg_page(b"OpusHead", True) + ogg_page(b"theora" + bytes(300), True) + ogg_page(body) + ogg_page(bytes(600))


def flac(frames: bytes = b"\xff\xf8" + b"\1" * 200, total: int = 7, rate: int = 16000) -> bytes:
    """Blocks of 4096 samples, one channel of 16 bits, and a picture that begins like a file."""
    info = struct.pack(">HH", 4096, 4096) + bytes(6) + struct.pack(">Q", rate << 44 | 15 << 36 | total) + bytes(16)
    picture = b"fLaC\0\0\0\x22" + b"\4" * 0x0102
    return b"fLaC" + b"\0\0\0\x22" + info + b"\x86" + len(picture).to_bytes(3, "big") + picture + frames


FILES = [
    ("WAV", wav()),
    ("WAV", wav(DECOY * 40 + b"\0", ">")),
    ("AIFF", aiff()),
    ("W64", w64()),
    ("AU", au()),
    ("CAF", caf()),
    ("MP4", mp4()),
    ("MP4", mp4(wide=True)),
    ("Ogg", ogg()),
    ("FLAC", flac()),
]


@pytest.mark.parametrize("first", FILES, ids=lambda file: file[0])
def test_streams_in_sequence_begin_where_the_previous_one_ends(first: tuple[str, bytes], tmp_path: Path) -> None:
    followed_by_any = {"WAV", "AIFF", "W64", "AU", "CAF"}  # the others continue with files of their own kind
    for second in FILES:
        if first[0] in followed_by_any or first[0] == second[0]:
            files = (first, first, second)
            assert spans(parts_of(b"".join(data for _, data in files), tmp_path)) == expected_spans(*files)
    for rest in (b"TAG" + bytes(125), b"\0", b"no audio" * 1000):  # part of the last stream
        data = first[1] * 2 + rest
        assert spans(parts_of(data, tmp_path)) == [
            (first[0], 0, len(first[1])),
            (first[0], len(first[1]), len(data)),
        ]


@pytest.mark.parametrize(("name", "make"), [("AIFF", aiff), ("W64", w64), ("AU", au)])
def test_padding_between_files_belongs_to_the_first(name: str, make: Any, tmp_path: Path) -> None:
    first, second = make(b"abc"), make()
    for padding in (b"", b"\0"):
        data = first + padding + second
        assert spans(parts_of(data, tmp_path)) == expected_spans((name, first + padding), (name, second))
    assert spans(parts_of(first + b"\0\0" + second, tmp_path)) == [(name, 0, len(first + second) + 2)]


def test_streams_without_a_length_extend_to_the_end(tmp_path: Path) -> None:
    for name, data in (
        ("AU", au(length=0xFFFFFFFF) + aiff()),
        ("CAF", caf(length=-1) + caf()),
        ("CAF", caf(b"abc" + struct.pack(">q", 5) + bytes(5), length=-1) + caf()),
        ("MP4", mp4() + struct.pack(">I4s", 0, b"free") + mp4()),  # a size of 0: to the end of the file
        ("MP4", mp4() + struct.pack(">I4s", 7, b"free") + mp4()),
        ("AIFF", aiff()[:-1]),
        ("W64", w64()[:-1]),
        ("AU", au()[:-1]),
        ("CAF", caf()[:-1]),
        ("MP4", mp4()[:-1]),
        ("Ogg", ogg()[:-1]),
        ("WAV", b"RIFF\0\0\0\0WAVEfmt "),
    ):
        assert spans(parts_of(data, tmp_path)) == [(name, 0, len(data))], name
    with pytest.raises(AudioError, match="it is empty"):
        parts_of(b"", tmp_path)
    assert spans(parts_of(b"text", tmp_path)) == [(None, 0, 4)]


def test_small_boxes_of_mp4_files(tmp_path: Path) -> None:
    empty = struct.pack(">I4s", 8, b"free")
    files = (("MP4", mp4() + empty), ("MP4", mp4(b"") + empty))
    assert spans(parts_of(files[0][1] + files[1][1], tmp_path)) == expected_spans(*files)
    fragment = struct.pack(">I4s", 12, b"ftyp") + b"M4A "  # before an index: the same file
    assert spans(parts_of(fragment * 2 + mp4(), tmp_path)) == [("MP4", 0, 24 + len(mp4()))]


def test_damaged_ogg_pages_are_skipped(tmp_path: Path) -> None:
    page, first = ogg_page(bytes(40)), ogg_page(b"OpusHead", True)
    for damaged in (first + page[:-5], first + page + b"noise" * 30, first + b"OggS" + page[4:30], first + b"x" + page):
        data = damaged + first + page + first + page
        starts = [0, len(damaged), len(damaged + first + page)]
        assert [part.start for part in parts_of(data, tmp_path)] == starts
    assert spans(parts_of(first + page + b"noise" * 30, tmp_path)) == [("Ogg", 0, len(first + page) + 150)]


# -- WAV files without a length ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, len(aiff())])
@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("kind", ["RIFF", "RIFX", "RF64"])
def test_sizes_of_a_wav_file_without_a_length_are_patched(kind: str, size: int, at: int, tmp_path: Path) -> None:
    order = ">" if kind == "RIFX" else "<"
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, 0, 0, 0, 0) if kind == "RF64" else b""
    format = b"fmt " + struct.pack(order + "IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
    if kind == "RF64":
        size = 0xFFFFFFFF
    head = kind.encode() + struct.pack(order + "I", size) + b"WAVE" + ds64 + format + b"data"
    data = head + struct.pack(order + "I", size) + b"\x80" * 0x010203
    part = parts_of((aiff() if at else b"") + data, tmp_path)[-1]
    whole, samples = len(data) - 8, 0x010203
    if kind == "RF64":
        patches = {at + 20: struct.pack("<Q", whole), at + 28: struct.pack("<Q", samples)}
    else:
        patches = {at + 4: struct.pack(order + "I", whole), at + len(head): struct.pack(order + "I", samples)}
    assert part == AudioPart("WAV", at, at + len(data), patches, length_known=False)


def unfinished(body: bytes, kind: bytes = b"RIFF") -> bytes:
    data = bytearray(wav(body))
    data[:4], data[40:44] = kind, bytes(4)
    return bytes(data)


def test_wav_files_without_a_length_in_sequence(tmp_path: Path) -> None:
    one, two = unfinished(b"\x80" * 501), unfinished(b"\x81" * 300, b"RF64")
    for files in (("WAV", one), ("WAV", two)), (("WAV", one), ("WAV", one), ("WAV", one)), (("WAV", two), ("WAV", one)):
        parts = parts_of(b"".join(data for _, data in files), tmp_path)
        assert spans(parts) == expected_spans(*files) and not any(part.length_known for part in parts)
    for decoy in (b"RIFX\0\0\0\0WAVEfmt ", b"WAVEfmt ", b"RIFF\0\0\0\0WAVEfmt", b"RIFF\0\0WAVEfmt "):
        data = unfinished(b"\x80" * 100 + decoy + b"\x80" * 100)
        assert spans(parts_of(data, tmp_path)) == [("WAV", 0, len(data))]


@pytest.mark.parametrize("order", ["<", ">"])
def test_empty_data_chunk_before_other_chunks(order: str, tmp_path: Path) -> None:
    """The chunks must fill the file; otherwise the bytes are samples whose size was not written."""

    def chunk(name: bytes, size: int, stated: int | None = None) -> bytes:
        return name + struct.pack(order + "I", size if stated is None else stated) + b"\1" * size

    long = 0x0102
    for body, empty in (
        (b"", True),
        (chunk(b"LIST", 0), True),
        (chunk(b"LIST", long) + chunk(b"id3 ", 2), True),
        (chunk(b"LIST", 3) + b"\0" + chunk(b"junk", 4), True),
        (chunk(b"LIST", 4) + chunk(b"junk", 3), True),  # without its padding
        (chunk(b"LIST", 4) + chunk(b"junk", 3) + b"\0", True),
        (chunk(b"LIST", 4, 5), False),
        (chunk(b"LIST", 4, 3), True),
        (chunk(b"LIST", 4, 2), False),
        (chunk(b"LIST", 4, 6), False),
        (chunk(b"LI\0T", 4), False),
        (chunk(b"LIS\xe9", 4), False),
        (b"\1" * 7, False),
        (chunk(b"LIST", 4) + b"LIST\0\0\0", False),
    ):
        data = bytearray(wav(b"", order) + body)
        (part,) = parts_of(bytes(data), tmp_path)
        assert part.length_known == empty and bool(part.patches) != empty, body
        data[40:44] = b"\xff" * 4  # this size is not 0, so the rest is samples
        (part,) = parts_of(bytes(data), tmp_path)
        assert part.length_known == (not body)


@pytest.mark.parametrize("at", [0, len(aiff())])
def test_seconds_that_a_wav_file_lacks(at: int, tmp_path: Path) -> None:
    """16 kHz, 16 bits: 32,000 bytes a second."""
    for size, missing in ((400, 0.0), (399, 0.0), (32_400, 1.0), (64_400, 2.0), (401, 1 / 32_000)):
        data = bytearray(wav(b"\x80" * 400))
        data[40:44] = struct.pack("<I", size)
        (*_, part) = parts_of((aiff() if at else b"") + bytes(data), tmp_path)
        assert part == AudioPart("WAV", at, at + 444, missing=missing)
    data[28:32] = bytes(4)  # an invalid byte rate
    data[40:44] = struct.pack("<I", 402)
    assert parts_of(bytes(data), tmp_path)[0].missing == 2.0
    data[4:8] = struct.pack("<I", 36 + 402)  # the next file begins before the end that the header states
    assert parts_of(bytes(data) + aiff(), tmp_path)[0].end == len(data) + len(aiff())


# -- FLAC --------------------------------------------------------------------------------------------------------------


def crc(data: bytes, bits: int, polynomial: int) -> bytes:
    """Bit by bit (RFC 9639, 9.1.8 and 9.3)."""
    value = 0
    for byte in data:
        for bit in range(7, -1, -1):
            top = value >> (bits - 1) & 1
            value = (value << 1 & (1 << bits) - 1) ^ (polynomial if top ^ (byte >> bit & 1) else 0)
    return value.to_bytes(bits // 8, "big")


def coded_number(number: int) -> bytes:
    """Encode a number of up to 36 bits like UTF-8."""
    if number < 0x80:
        return bytes([number])
    length = next(n for n in range(2, 8) if number < 1 << (5 * n + 1))
    tail = [0x80 | number >> 6 * k & 0x3F for k in range(length - 1)][::-1]
    return bytes([(0xFF00 >> length & 0xFF) | number >> 6 * (length - 1), *tail])


def frame(
    number: int, size_code: int, extra: bytes, *, variable: bool = False, rate: int = 0, body: int = 120
) -> bytes:
    tail = {12: b"\x10", 13: b"\x3e\x80", 14: b"\x06\x40"}.get(rate, b"")
    head = bytes([0xFF, 0xF8 | variable, size_code << 4 | rate, 0x08]) + coded_number(number) + extra + tail
    data = head + crc(head, 8, 0x07) + b"\xff\xf8\x11" * (body // 3)
    return data + crc(data, 16, 0x8005)


# Size codes of RFC 9639, 9.1.1; 6 and 7 store the size minus one in 8 or 16 bits.
SIZES = {1: 192, 2: 576, 3: 1152, 4: 2304, 5: 4608} | {code: 256 << code - 8 for code in range(8, 16)}


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize(
    "number", [0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x1FFFFF, 0x200001, 0x3FFFFFF, 1 << 30, (1 << 36) - 1]
)
def test_length_of_a_flac_stream_is_that_of_its_last_frame(number: int, variable: bool, tmp_path: Path) -> None:
    frames = [(code, b"", size) for code, size in SIZES.items()]
    frames += [(6, b"\x00", 1), (6, b"\xfe", 255), (7, b"\x12\x34", 0x1235), (7, b"\xff\xff", 0x10000)]
    for (code, extra, size), rate in zip(frames, itertools.cycle([0, 5, 12, 13, 14])):
        last = frame(number, code, extra, variable=variable, rate=rate)
        data = flac(frame(3, 12, b"") + last, total=0)
        total = size + number * (1 if variable else 4096)
        patches = {21: (15 << 36 | total).to_bytes(8, "big")[3:]} if total < 1 << 36 else {}  # the field has 36 bits
        assert parts_of(data, tmp_path) == [AudioPart("FLAC", 0, len(data), patches)], (code, rate)


def test_second_flac_stream_without_a_length(tmp_path: Path) -> None:
    """With a tag before the first."""
    tag = b"ID3\4\0\0\0\0\0\4abcd"
    one, two = flac(frame(5, 1, b""), total=0), flac(frame(2**20 + 7, 2, b""), total=0)
    begin = len(tag + one)
    patches = [(15 << 36 | total).to_bytes(8, "big")[3:] for total in (5 * 4096 + 192, (2**20 + 7) * 4096 + 576)]
    assert parts_of(tag + one + two, tmp_path) == [
        AudioPart("FLAC", 0, begin, {len(tag) + 21: patches[0]}),
        AudioPart("FLAC", begin, begin + len(two), {begin + 21: patches[1]}),
    ]


@pytest.mark.parametrize("candidates", [16, 17])
def test_flac_stream_that_ends_within_a_frame_has_no_length(candidates: int, tmp_path: Path) -> None:
    good = frame(5, 1, b"")
    for data in (flac(good[:-1], 0), flac(good + b"\1", 0), flac(good[:-1] + b"\xee", 0), flac(good, 9), flac(b"", 0)):
        assert parts_of(data, tmp_path) == [AudioPart("FLAC", 0, len(data))]
    header = bytes([0xFF, 0xF8, 0x10, 0x08, 5])
    decoys = (header + crc(header, 8, 0x07)) * (candidates - 1)  # headers that are part of a frame's samples
    last = bytes([0xFF, 0xF8, 0x10, 0x08, 9])
    last += crc(last, 8, 0x07) + decoys
    data = flac(last + crc(last, 16, 0x8005), total=0)
    assert bool(parts_of(data, tmp_path)[0].patches) == (candidates == 16)


# -- ID3 tags ----------------------------------------------------------------------------------------------------------


def tag(size: int, content: bytes = b"", footer: bool = False) -> bytes:
    """An ID3v2.4 tag of `size` bytes after its header (7 bits per byte), which begins with `content`."""
    digits = bytes(size >> shift & 0x7F for shift in range(21, -1, -7))
    head = bytes([4, 0, 0x10 * footer]) + digits
    return b"ID3" + head + content.ljust(size, b"\5") + (b"3DI" + head) * footer


@pytest.mark.parametrize("size", [0, 127, 128, 0x3FFF, 0x4001, 0x1FFFFF, 0x200000 + 0x4000 + 0x80 + 1])
@pytest.mark.parametrize("footer", [False, True])
def test_audio_begins_after_tags_of_any_size(size: int, footer: bool, tmp_path: Path) -> None:
    """A tag may contain a picture, which may contain anything."""
    content = (mp3(9) if size > 10_000 else DECOY if size > 100 else b"")[:size]
    tags = tag(size, content, footer) + tag(3)
    assert spans(parts_of(tags + flac(), tmp_path)) == [("FLAC", 0, len(tags + flac()))]
    (part,) = parts_of(tags + mp3(7), tmp_path)
    assert part == AudioPart("MP3", len(tags), len(tags + mp3(7)), prefix=xing(7), length_known=False)


# -- MP3 ---------------------------------------------------------------------------------------------------------------

# Header, frame size, and size of header and side information of version 1 and 2, stereo and mono.
STEREO, MONO = (b"\xff\xfb\x90\x0d", 417, 36), (b"\xff\xfb\x90\xc0", 417, 21)
STEREO_2, MONO_2 = (b"\xff\xf3\x80\x00", 208, 21), (b"\xff\xf3\x80\xc0", 208, 13)
LAYER_2 = (b"\xff\xfd\x80\x00", 417, 36)
KINDS = {"stereo": STEREO, "mono": MONO, "stereo, version 2": STEREO_2, "mono, version 2": MONO_2}


def mp3(count: int, kind: tuple[bytes, int, int] = STEREO) -> bytes:
    return kind[0].ljust(kind[1], b"\7") * count


def table(name: bytes, frames: int, kind: tuple[bytes, int, int] = STEREO, flags: int = 1) -> bytes:
    head, size, distance = kind
    return (head.ljust(distance, b"\0") + name + struct.pack(">II", flags, frames)).ljust(size, b"\0")


def xing(frames: int, kind: tuple[bytes, int, int] = STEREO) -> bytes:
    """The smallest frame of the same format with room for the table: at least 25 to 48 bytes."""
    head = {STEREO: b"\xff\xfb\x10", MONO: b"\xff\xfb\x10", STEREO_2: b"\xff\xf3\x20", MONO_2: b"\xff\xf3\x10"}[kind]
    size = {STEREO: 104, MONO: 104, STEREO_2: 52, MONO_2: 26}[kind]
    return table(b"Xing", frames, (head + bytes([kind[0][3] & 0xC0]), size, kind[2]))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("count", [2, 3, 300])
def test_mp3_stream_without_a_table_is_given_one(kind: tuple[bytes, int, int], count: int, tmp_path: Path) -> None:
    data = mp3(count, kind)
    for rest, more in ((b"", 0), (b"TAG" + bytes(125), 0), (tag(50), 0), (data[:3], 0), (data[:4], 1), (data[:100], 1)):
        assert parts_of(data + rest, tmp_path) == [
            AudioPart("MP3", 0, len(data + rest), prefix=xing(count + more, kind), length_known=False)
        ]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", [b"Xing", b"Info"])
def test_mp3_streams_with_tables(kind: tuple[bytes, int, int], name: bytes, tmp_path: Path) -> None:
    """Each table begins a stream, whatever number of frames it states."""
    one, two = table(name, 5, kind) + mp3(5, kind), table(name, 0x01020304, kind) + mp3(6, kind)
    for files in ((one, one), (one, two), (two, one, two)):
        parts = parts_of(b"".join(files), tmp_path)
        assert spans(parts) == expected_spans(*(("MP3", file) for file in files))
        assert all(part.length_known and not part.prefix for part in parts)
    # More frames than the table states are a stream without a table, if they are enough for one.
    for more, streams in ((3, 1), (4, 2), (9, 2)):
        parts = parts_of(one + mp3(more, kind), tmp_path)
        assert len(parts) == streams and parts[0].length_known and parts[0].start == 0
        if streams == 2:
            assert parts[1] == AudioPart(
                "MP3", len(one), len(one + mp3(more, kind)), prefix=xing(more, kind), length_known=False
            )


def test_mp3_tables_that_state_no_number_of_frames(tmp_path: Path) -> None:
    """They begin a stream, which is given a table, too."""
    for name, flags in ((b"Xing", 0), (b"Xing", 0xFFFFFFFE), (b"VBRI", 1)):
        stream = table(name, 5, flags=flags) + mp3(5)
        parts = parts_of(stream * 2, tmp_path)
        assert parts == [
            AudioPart("MP3", start, start + len(stream), prefix=xing(6), length_known=False)
            for start in (0, len(stream))
        ]
    cut = table(b"Xing", 0x01010101)[:46]  # the file ends within the number
    assert parts_of(mp3(5) + cut, tmp_path)[1:] == [
        AudioPart("MP3", len(mp3(5)), len(mp3(5)) + 46, prefix=xing(1), length_known=False)
    ]
    first = mp3(5) + table(b"Xing", 5)  # not a table: no frame follows
    starts = [part.start for part in parts_of(first + bytes(100) + mp3(5), tmp_path)]
    assert starts == [0, len(first) + 100]
    # Not tables either: at another distance, with another name, too few frames before it.
    for data in (
        mp3(5) + table(b"Xing", 5, (*STEREO[:2], 35)) + mp3(5),
        mp3(5) + table(b"xing", 5) + mp3(5),
        mp3(3) + table(b"Xing", 2) + mp3(7),
    ):
        assert parts_of(data, tmp_path) == [AudioPart("MP3", 0, len(data), prefix=xing(11), length_known=False)]


def test_mp3_format_changes_begin_a_stream(tmp_path: Path) -> None:
    for kinds in ((STEREO, STEREO_2), (MONO_2, MONO), (STEREO_2, MONO)):
        files = [mp3(count, kind) for count, kind in zip((4, 9), kinds, strict=True)]
        parts = parts_of(b"".join(files), tmp_path)
        assert spans(parts) == expected_spans(*(("MP3", file) for file in files))
        assert [part.prefix for part in parts] == [xing(4, kinds[0]), xing(9, kinds[1])]
    data = mp3(3) + mp3(9, STEREO_2)  # three frames are not a stream
    assert len(mp3(3)) not in [part.start for part in parts_of(data, tmp_path)]
    data = mp3(9) + mp3(9, LAYER_2)
    assert [part.prefix for part in parts_of(data, tmp_path)] == [xing(9), b""]  # only layer 3 has tables


@pytest.mark.parametrize("before", [2, 3, 4, 9])
@pytest.mark.parametrize("between", [bytes(5000), b"\xff", b"\0" + mp3(1)[:-7] + b"\0", b"\xff\xfb\xf0\0" * 9])
def test_mp3_streams_with_other_bytes_between_them(before: int, between: bytes, tmp_path: Path) -> None:
    """The second stream begins at the next frame that another one follows."""
    first, second = mp3(before), mp3(6)
    parts = parts_of(first + between + second, tmp_path)
    start = len(first + between)
    if before >= 4:
        assert parts == [
            AudioPart("MP3", 0, len(first), prefix=xing(before), length_known=False),
            AudioPart("MP3", start, start + len(second), prefix=xing(6), length_known=False),
        ]
    else:
        whole = len(first + between + second)
        assert parts == [AudioPart("MP3", 0, whole, prefix=xing(before + 6), length_known=False)]
    (tagged,) = parts_of(first + tag(len(between) + 9, between) + second, tmp_path)  # tags do not end a stream
    assert tagged.prefix == xing(before + 6)


@pytest.mark.parametrize(("distance", "found"), [((1 << 22) - 3, True), ((1 << 22) - 2, False)])
def test_bytes_searched_for_the_next_mp3_frame(distance: int, found: bool, tmp_path: Path) -> None:
    assert len(parts_of(mp3(5) + bytes(distance) + mp3(5), tmp_path)) == 1 + found


# -- reading a part ----------------------------------------------------------------------------------------------------


@given(
    size=st.integers(0, 40),
    start=st.integers(0, 20),
    prefix=st.binary(max_size=9),
    patches=st.dictionaries(st.integers(0, 45), st.binary(min_size=1, max_size=6), max_size=3),
    calls=st.lists(
        st.tuples(st.sampled_from(["read", "set", "current", "end"]), st.integers(-30, 60)), min_size=1, max_size=12
    ),
)
@settings(max_examples=100)
def test_part_reads_like_a_file(
    size: int, start: int, prefix: bytes, patches: dict[int, bytes], calls: list[tuple[str, int]]
) -> None:
    """The part of a file between two offsets, with bytes replaced and inserted before it."""
    content = bytes(range(100))
    patched = bytearray(content)
    for offset, patch in patches.items():
        patched[offset : offset + len(patch)] = patch
    expected = io.BytesIO(prefix + bytes(patched[start : start + size]))
    part = _Section(io.BytesIO(content), AudioPart("WAV", start, start + size, patches, prefix))
    assert part.readable() and part.seekable()
    for call, number in calls:
        if call == "read":
            wanted = b""
            while abs(number) > len(wanted):  # a read may return less: the prefix, then the file
                more = part.read(abs(number) - len(wanted))
                wanted += more
                if not more:
                    break
            assert wanted == expected.read(abs(number))
        else:
            whence = {"set": os.SEEK_SET, "current": os.SEEK_CUR, "end": os.SEEK_END}[call]
            target = max(0, number + {"set": 0, "current": expected.tell(), "end": len(expected.getvalue())}[call])
            assert part.seek(number, whence) == target == expected.seek(target)
        assert part.tell() == expected.tell()
