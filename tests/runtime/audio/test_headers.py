"""Signatures, MPEG and ADTS frames and WAV headers, byte by byte, made from their specifications."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemostream.errors import AudioError
from nemostream.runtime.audio.containers import (
    WavHeader,
    WavStream,
    adts_frame,
    container_of,
    mpeg_frame,
    undecided,
    wav_header,
)

# -- signatures --------------------------------------------------------------------------------------------------------

# Container, and its first bytes in hexadecimal; ".." is any byte.
SIGNATURES = [
    ("WAV", "52494646 ........ 57415645"),
    ("WAV", "52494658 ........ 57415645"),
    ("WAV", "52463634 ........ 57415645"),
    ("WAV", "42573634 ........ 57415645"),
    ("AVI", "52494646 ........ 41564920"),
    ("FLAC", "664c6143"),
    ("Ogg", "4f676753"),
    ("MP3", "494433 02"),
    ("MP3", "494433 03"),
    ("MP3", "494433 04"),
    ("AIFF", "464f524d ........ 41494646"),
    ("AIFF", "464f524d ........ 41494643"),
    ("AU", "2e736e64 00"),
    ("CAF", "63616666 0001"),
    ("W64", "72696666 2e91 cf11 a5d628db04c10000"),
    ("WebM", "1a45dfa3"),
    *(("MP4", f"00...... {kind.encode().hex()}") for kind in ("ftyp", "moov", "mdat", "wide", "free", "styp", "moof")),
    ("AMR", "2321414d52"),
    ("WMA", "3026b275 8e66 cf11"),
    ("FLV", "464c5601"),
    ("WavPack", "7776706b"),
    ("Monkey's Audio", "4d414320"),
    ("VOC", b"Creative Voice File".hex()),
    ("SPHERE", b"NIST_1A\n".hex()),
]
TEMPLATES = [
    (name, [None if pair == ".." else int(pair, 16) for pair in re.findall("..", text.replace(" ", ""))])
    for name, text in SIGNATURES
]


def matches(template: list[int | None], data: bytes) -> bool:
    return all(wanted in (None, found) for wanted, found in zip(template, data, strict=False))


@pytest.mark.parametrize("filler", [0x01, 0x00, 0x52])
@pytest.mark.parametrize(("name", "template"), TEMPLATES)
def test_signature_is_exact(name: str, template: list[int | None], filler: int) -> None:
    """Every byte of a signature counts, and detection waits for its last byte, but no longer."""
    head = bytes(filler if byte is None else byte for byte in template)
    assert container_of(head) == container_of(head + b"\x99" * 4000) == name and not undecided(head)
    for size in range(len(head)):
        for change in (0, 0x01, 0x80):
            for data in (head[:size] + bytes([head[size] ^ change]), head[:size]):
                full = [found for found, other in TEMPLATES if len(other) <= len(data) and matches(other, data)]
                part = [found for found, other in TEMPLATES if len(other) > len(data) and matches(other, data)]
                assert container_of(data) == (full[0] if full else None), data
                assert undecided(data) == (not full and bool(part)), data
        changed = bytearray(head + b"\x99" * 20)
        changed[size] ^= 0x40
        assert template[size] is None or container_of(changed) != name


# -- MPEG audio --------------------------------------------------------------------------------------------------------

# kbit/s by index 1 to 14 (ISO 11172-3, table in 2.4.2.3; ISO 13818-3, 2.4.2.3): version 1 with layers 1, 2 and 3,
# version 2 with layer 1, and with layers 2 and 3.
KBITS = """
 32  32  32  32   8
 64  48  40  48  16
 96  56  48  56  24
128  64  56  64  32
160  80  64  80  40
192  96  80  96  48
224 112  96 112  56
256 128 112 128  64
288 160 128 144  80
320 192 160 160  96
352 224 192 176 112
384 256 224 192 128
416 320 256 224 144
448 384 320 256 160
"""
ROWS = [list(map(int, row.split())) for row in KBITS.split("\n")[1:-1]]
VERSIONS = {0: 2.5, 2: 2.0, 3: 1.0}  # by their two bits
RATES = {1.0: (44100, 48000, 32000), 2.0: (22050, 24000, 16000), 2.5: (11025, 12000, 8000)}


def mpeg_header(second: int, third: int) -> tuple[int, tuple[Any, ...]] | None:
    """Return the frame size, and version, layer and sample rate."""
    version, layer, index, rate = VERSIONS.get(second >> 3 & 3), 4 - (second >> 1 & 3), third >> 4, third >> 2 & 3
    if second < 0xE0 or version is None or layer == 4 or index in (0, 15) or rate == 3:
        return None
    hz = RATES[version][rate]
    column = layer - 1 if version == 1 else 3 if layer == 1 else 4
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 1 else 1152
    slot = 4 if layer == 1 else 1  # bytes
    slots = samples * ROWS[index - 1][column] * 1000 // (8 * slot * hz) + (third >> 1 & 1)
    return slots * slot, (version, layer, hz)


def test_every_mpeg_frame_header() -> None:
    kinds: dict[tuple[Any, ...], int] = {}
    for second in range(256):
        for third in range(256):
            found, wanted = mpeg_frame(bytes([0xFF, second, third, 0])), mpeg_header(second, third)
            assert (found and found[0]) == (wanted and wanted[0]), (second, third)
            if found and wanted:  # equal for frames of one stream
                assert kinds.setdefault(wanted[1], found[1]) == found[1]
    assert len(set(kinds.values())) == len(kinds) == 27
    header = bytes([0xFF, 0xFB, 0x90, 0x64])
    assert mpeg_frame(header) == mpeg_frame(header + b"\0" * 9) is not None
    assert mpeg_frame(header[:3]) is None and mpeg_frame(b"\xfe" + header[1:]) is None
    assert [mpeg_frame(header[:3] + bytes([emphasis])) is None for emphasis in range(4)] == [False, False, True, False]


def adts(size: int, *, profile: int = 1, rate: int = 4, channels: int = 2, sync: int = 0xFFF, layer: int = 0) -> bytes:
    """Pack the fields of ISO 13818-7, 6.2: syncword, ID, layer, protection_absent; profile to home; copyright to
    number_of_raw_data_blocks."""
    bits = f"{sync:012b}0{layer:02b}1{profile:02b}{rate:04b}0{channels:03b}00" + f"00{size:013b}{0x7FF:011b}00"
    return int(bits, 2).to_bytes(7, "big")


def test_adts_frame_headers() -> None:
    for size in (8, 9, 0x7F, 0x80, 0x7FF, 0x800, 0x1234 & 0x1FFF, 0x1FFF):
        found = adts_frame(adts(size))
        assert found is not None and found[0] == size
        assert found[1] == adts_frame(adts(100))[1]  # type: ignore[index]
        assert adts_frame(adts(size) + b"\0") == found and adts_frame(adts(size)[:6]) is None
    kinds = [
        adts_frame(adts(100, profile=profile, rate=rate, channels=channels))
        for profile in range(4)
        for rate in range(13)
        for channels in range(8)
    ]
    assert None not in kinds and len({kind[1] for kind in kinds if kind}) == 4 * 13 * 8
    for invalid in (
        adts(7),
        adts(0),
        adts(100, rate=13),
        adts(100, rate=15),
        adts(100, sync=0x7FF),
        adts(100, sync=0xFFE),
        adts(100, sync=0xFEF),
        adts(100, layer=1),
        adts(100, layer=2),
    ):
        assert adts_frame(invalid) is None, invalid.hex()


MP3 = bytes([0xFF, 0xFB, 0x90, 0x64])  # version 1, layer 3, 128 kbit/s, 44.1 kHz, without a CRC: 417 bytes


@pytest.mark.parametrize(
    ("name", "first", "size", "second", "same"),
    [
        ("MP3", MP3, 417, MP3, True),
        ("MP3", MP3, 417, b"\xff\xfa\x50\x64", True),  # with a CRC, 64 kbit/s
        ("MP3", b"\xff\xfb\x92\x64", 418, MP3, True),  # padded
        ("MP3", MP3, 417, b"\xff\xfb\x94\x64", False),  # 48 kHz
        ("MP3", MP3, 417, b"\xff\xf3\x90\x64", False),  # version 2
        ("MP3", MP3, 417, b"\xff\xfd\x90\x64", False),  # layer 2
        ("MP3", MP3, 417, b"\xff\xfb\xf0\x64", False),  # an invalid bit rate
        ("AAC", adts(371), 371, adts(9), True),
        ("AAC", adts(371), 371, adts(371, rate=5), False),
        ("AAC", adts(371), 371, adts(371, channels=1), False),
        ("AAC", adts(8), 8, adts(8), True),
    ],
)
def test_two_frames_that_agree_are_a_stream(name: str, first: bytes, size: int, second: bytes, same: bool) -> None:
    data = first.ljust(size, b"\0") + second.ljust(7, b"\0")
    decided = size + (4 if name == "MP3" and same else 7)  # the size of a header; 7 excludes both formats
    for length in range(len(data) + 2):
        head = (data + b"ab")[:length]
        assert undecided(head) == (length < decided)
        assert container_of(head) == (name if same and length >= decided else None)
    assert container_of(data + bytes(5000)) == (name if same else None) and not undecided(data + bytes(5000))
    assert container_of(b"\0" + data) is None and not undecided(b"\1" + data)


def test_bytes_that_cannot_begin_a_frame_are_decided_at_once() -> None:
    assert undecided(b"\xff") and undecided(b"\xff\xe0") and undecided(b"\xff\xff\xff\xff\xff\xff") and undecided(b"")
    for data in (b"\xfe", b"\xff\xc0", b"\xff\x60", b"\xfe\xe0", b"\xff" * 7, b"\xff\xe0" + bytes(5)):
        assert not undecided(data), data


# -- WAV headers -------------------------------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes, order: str = "<", size: int | None = None) -> bytes:
    return name + struct.pack(order + "I", len(body) if size is None else size) + body + b"\0" * (len(body) % 2)


# Every byte of a field differs from the others.
FIELDS = {
    "tag": 0x0102,
    "channels": 0x0304,
    "rate": 0x05060708,
    "per_second": 0x090A0B0C,
    "align": 0x0D0E,
    "bits": 0x0F10,
}


def fmt(order: str = "<", extra: bytes = b"", **fields: int) -> bytes:
    return struct.pack(order + "HHIIHH", *(FIELDS | fields).values()) + extra


def expected(data_start: int, **fields: Any) -> WavHeader:
    values = {
        "format_tag": 0x0102,
        "bits": 0x0F10,
        "sample_rate": 0x05060708,
        "channels": 0x0304,
        "bytes_per_second": 0x090A0B0C,
        "data_start": data_start,
        "size_fields": {4: 4, data_start - 4: 4},
        "byte_order": "<",
    }
    return WavHeader(**values | fields)


@pytest.mark.parametrize("at", [0, 21])
@pytest.mark.parametrize(("order", "form"), [("<", b"RIFF"), (">", b"RIFX"), ("<", b"RF64"), ("<", b"BW64")])
@pytest.mark.parametrize("extra", [b"", b"\0\0", b"x", bytes(24)])
@pytest.mark.parametrize("others", [[], [0], [1], [3, 2, 5]])
def test_every_field_of_a_wav_header(at: int, order: str, form: bytes, extra: bytes, others: list[int]) -> None:
    """In both byte orders, with chunks of odd sizes before the samples; cut anywhere, the header is incomplete."""
    head = form + struct.pack(order + "I", 0x01020304) + b"WAVE"
    head += b"".join(chunk(b"LIST", b"\xee" * size, order) for size in others)
    head += chunk(b"fmt ", fmt(order, extra), order)
    head += b"".join(chunk(b"junk", b"data" * size, order) for size in others)
    head += b"data" + struct.pack(order + "I", 0x01000203)
    start = at + len(head)
    header = wav_header(io.BytesIO(b"\x55" * at + head + b"data"), at)
    assert header == expected(
        start,
        data_size=0x01000203,
        file_end=at + 8 + 0x01020304,
        size_fields={at + 4: 4, start - 4: 4},
        byte_order=order,
    )
    for length in range(len(head)):
        assert wav_header(io.BytesIO(b"\x55" * at + head[:length]), at) is None


@pytest.mark.parametrize(
    ("riff", "size", "file_end", "data_size"),
    [
        (1000, 900, 1008, 900),
        (1001, 901, 1010, 901),  # padded
        (0, 900, None, 900),
        (0x7FFFEFFF, 900, 0x7FFFEFFF + 9, 900),
        (0x7FFFF000, 900, None, 900),
        (0xFFFFFFFF, 900, None, 900),
        (1000, 0, None, None),
        (1000, 1, 1008, 1),
        (1000, 0x7FFFEFFF, 1008, 0x7FFFEFFF),
        (1000, 0x7FFFF000, None, None),
        (1000, 0xFFFFFFFF, None, None),
    ],
)
def test_sizes_that_a_program_did_not_know(riff: int, size: int, file_end: int | None, data_size: int | None) -> None:
    for order, form in (("<", b"RIFF"), (">", b"RIFX")):
        head = form + struct.pack(order + "I", riff) + b"WAVE" + chunk(b"fmt ", fmt(order), order)
        header = wav_header(io.BytesIO(head + chunk(b"data", b"", order, size)))
        assert header == expected(len(head) + 8, data_size=data_size, file_end=file_end, byte_order=order)


@pytest.mark.parametrize(
    ("sizes", "stated", "file_end", "data_size"),
    [
        ((0x0102030405060708, 0x1112131415161718), 0xFFFFFFFF, 0x0102030405060708 + 8, 0x1112131415161718),
        ((0xFFFFFFFF, 0xFFFFFFFE), 0xFFFFFFFF, 0xFFFFFFFF + 9, 0xFFFFFFFE),
        (((1 << 62) - 2, (1 << 62) - 1), 0xFFFFFFFF, (1 << 62) + 6, (1 << 62) - 1),
        ((1 << 62, 7), 0xFFFFFFFF, None, 7),
        ((7, 1 << 62), 0xFFFFFFFF, None, None),
        ((0, 7), 0xFFFFFFFF, None, 7),
        ((7, 0), 0xFFFFFFFF, None, None),
        ((7, 8), 900, 1008, 900),  # the chunk's own size is stated
    ],
)
def test_sizes_of_rf64(sizes: tuple[int, int], stated: int, file_end: int | None, data_size: int | None) -> None:
    ds64 = chunk(b"ds64", struct.pack("<QQQI", *sizes, 12345, 0))
    head = b"RF64" + struct.pack("<I", 1000) + b"WAVE" + ds64 + chunk(b"fmt ", fmt())
    data = head + chunk(b"data", b"", size=stated)
    for at in (0, 3):
        fields = {at + 4: 4, at + len(head) + 4: 4} if stated == 900 else {at + 20: 8, at + 28: 8}
        assert wav_header(io.BytesIO(bytes(at) + data), at) == expected(
            at + len(head) + 8, data_size=data_size, file_end=file_end and at + file_end, size_fields=fields
        )
    for length in range(len(data)):
        assert wav_header(io.BytesIO(data[:length])) is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_extensible_format(order: str) -> None:
    """The tag is the first field of the GUID, if the chunk has it."""
    rest = struct.pack(order + "HHI", 22, 0x1111, 0x22222222) + struct.pack(order + "H", 0x0304) + b"\x99" * 14
    form = b"RIFX" if order == ">" else b"RIFF"
    for length, tag, wanted in ((24, 0xFFFE, 0x0304), (10, 0xFFFE, 0x0304), (9, 0xFFFE, 0xFFFE), (24, 0xFFFD, 0xFFFD)):
        head = form + bytes(4) + b"WAVE" + chunk(b"fmt ", fmt(order, rest[:length], tag=tag), order)
        header = wav_header(io.BytesIO(head + chunk(b"data", b"ab", order)))
        assert header and (header.format_tag, header.bits, header.data_size) == (wanted, 0x0F10, 2)


def test_invalid_wav_headers() -> None:
    head = b"RIFF" + bytes(4) + b"WAVE"
    with pytest.raises(AudioError, match=r"fmt chunk has 15 bytes; it must have 16 or more"):
        wav_header(io.BytesIO(head + chunk(b"fmt ", fmt()[:15]) + chunk(b"data", b"ab")))
    with pytest.raises(AudioError, match="no fmt chunk before its data chunk"):
        wav_header(io.BytesIO(head + chunk(b"data", b"ab") + chunk(b"fmt ", fmt())))


def test_encodings_that_can_be_streamed() -> None:
    names = {(1, 16): "pcm_s16le", (3, 32): "pcm_f32le", (6, 8): "alaw", (7, 8): "mulaw"}
    for tag in range(9):
        for bits in (8, 16, 24, 32, 64):
            header = WavHeader(tag, bits, 16000, 1, 32000, 44, None, None)
            if (tag, bits) in names:
                assert header.encoding == names[tag, bits]
            else:
                with pytest.raises(AudioError, match=f"format {tag} with {bits} bits cannot be streamed"):
                    _ = header.encoding
            with pytest.raises(AudioError, match="cannot be streamed"):
                _ = WavHeader(tag, bits, 16000, 1, 32000, 44, None, None, byte_order=">").encoding


# -- WAV streams -------------------------------------------------------------------------------------------------------


def stream_head(others: list[int], **fields: int) -> bytes:
    values = {"tag": 7, "channels": 1, "rate": 8000, "per_second": 8000, "align": 1, "bits": 8} | fields
    return (
        b"RIFF"
        + bytes(4)
        + b"WAVE"
        + b"".join(chunk(b"LIST", bytes(n)) for n in others)
        + chunk(b"fmt ", fmt(**values))
    )


@st.composite
def wav_streams(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """One or two files of 8-bit samples, with chunks of any size around the samples."""
    sizes, elements = st.lists(st.integers(0, 9), max_size=3), []
    for _ in range(draw(st.integers(1, 2))):
        samples = draw(st.binary(min_size=1, max_size=12))
        elements += [("head", stream_head(draw(sizes)) + b"data" + struct.pack("<I", len(samples)))]
        elements += [("samples", samples), ("padding", b"\x77" * (len(samples) % 2))]
        elements += [("chunk", chunk(b"RIF " if n == 4 else b"LIST", b"RIFF"[:n].ljust(n))) for n in draw(sizes)]
    return elements


@given(elements=wav_streams(), cuts=st.lists(st.integers(0, 300), max_size=12))
@settings(max_examples=150)
def test_state_of_a_wav_stream_after_every_push(elements: list[tuple[str, bytes]], cuts: list[int]) -> None:
    data, samples, ends, at = b"".join(body for _, body in elements), [], set(), 0
    for number, (kind, body) in enumerate(elements):
        samples += [(at + k, body[k : k + 1]) for k in range(len(body))] * (kind == "samples")
        at += len(body)
        if kind in ("padding", "chunk"):
            ends.add(at)
        if kind == "samples" and not elements[number + 1][1]:
            ends.add(at)
    stream, previous = WavStream(), 0
    assert (stream.missing, stream.complete, stream.header) == (0, False, None)
    for cut in sorted({*(min(cut, len(data)) for cut in cuts), len(data)}):
        assert stream.push(data[previous:cut]) == b"".join(byte for where, byte in samples if previous <= where < cut)
        previous, at, left = cut, 0, 0
        for number, (kind, body) in enumerate(elements):
            if kind == "head" and at + len(body) <= cut:
                left = max(0, len(elements[number + 1][1]) - (cut - at - len(body)))
            at += len(body)
        assert stream.missing == left / 8000
        assert stream.complete == (cut in ends)
        assert (stream.header is not None) == (cut >= len(elements[0][1]))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_wav_stream_without_a_length(size: int) -> None:
    stream = WavStream()
    head = stream_head([]) + b"data" + struct.pack("<I", size)
    assert stream.push(head + b"abc") == b"abc"
    assert stream.push(b"RIFF1234WAVE") == b"RIFF1234WAVE"
    assert stream.missing == 0 and not stream.complete


def test_invalid_wav_streams() -> None:
    first = stream_head([]) + chunk(b"data", b"ab")
    for changes, message in (
        ({"rate": 16000}, r"16000 Hz and 1 channel\(s\) follows one of 8000 Hz and 1 channel"),
        ({"channels": 2}, r"8000 Hz and 2 channel\(s\) follows one of 8000 Hz and 1 channel"),
        ({"tag": 6}, "follows one of"),
        ({"channels": 0}, "states 0 channels; it must state at least 1"),
        ({"bits": 16}, "format 7 with 16 bits cannot be streamed"),
    ):
        with pytest.raises(AudioError, match=message):
            WavStream().push(first + stream_head([], **changes) + chunk(b"data", b"ab"))
    stream = WavStream()  # other fields may differ
    assert stream.push(first + stream_head([3], per_second=1, align=9) + chunk(b"data", b"cd")) == b"abcd"
    assert stream.push(b"") == b"" and stream.complete
    with pytest.raises(AudioError, match="states 0 channels"):
        WavStream().push(stream_head([], channels=0) + chunk(b"data", b"ab"))


def in_pieces(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


@pytest.mark.parametrize("extra", [0, 2])
def test_longest_header_of_a_wav_stream(extra: int) -> None:
    """64 KiB before the samples."""
    fixed = len(stream_head([0])) + 8
    data = stream_head([65_536 - fixed + extra]) + chunk(b"data", b"ab")
    stream = WavStream()
    assert stream.push(data[:65_500]) == b""
    if extra:
        with pytest.raises(AudioError, match="longer than 64 KiB"):
            for piece in in_pieces(data[65_500:]):
                stream.push(piece)
    else:
        assert b"".join(map(stream.push, in_pieces(data[65_500:]))) == b"ab"


@pytest.mark.parametrize("data", [b"RIFX", b"RIFF1234AVI ", b"RIFFabcdWAVX", b"junk" * 20_000])
def test_wav_stream_waits_for_a_wav_header(data: bytes) -> None:
    stream = WavStream()
    if len(data) < 65_536:
        assert stream.push(data) == b"" and stream.header is None
    else:
        with pytest.raises(AudioError, match="longer than 64 KiB"):
            stream.push(data)
