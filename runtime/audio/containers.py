"""Detect audio containers by their first bytes, and parse WAV headers.

The signatures are long enough that raw samples do not match by chance. The two formats without one (MP3, AAC) require
two consecutive frame headers that agree. This module does not depend on decoders or numpy.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from nemostream.errors import AudioError

_GUID_ASF = bytes.fromhex("3026b2758e66cf11")
_GUID_W64 = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
# Container name, and its signature: the bytes at each offset.
_SIGNATURES: tuple[tuple[str, tuple[tuple[int, bytes], ...]], ...] = (
    *(("WAV", ((0, head), (8, b"WAVE"))) for head in (b"RIFF", b"RIFX", b"RF64", b"BW64")),
    ("AVI", ((0, b"RIFF"), (8, b"AVI "))),
    ("FLAC", ((0, b"fLaC"),)),
    ("Ogg", ((0, b"OggS"),)),
    *(("MP3", ((0, b"ID3" + bytes([version])),)) for version in (2, 3, 4)),
    *(("AIFF", ((0, b"FORM"), (8, kind))) for kind in (b"AIFF", b"AIFC")),
    ("AU", ((0, b".snd\0"),)),
    ("CAF", ((0, b"caff\0\1"),)),
    ("W64", ((0, _GUID_W64),)),
    ("WebM", ((0, b"\x1a\x45\xdf\xa3"),)),
    *(("MP4", ((0, b"\0"), (4, kind))) for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"styp", b"moof")),
    ("AMR", ((0, b"#!AMR"),)),
    ("WMA", ((0, _GUID_ASF),)),
    ("FLV", ((0, b"FLV\1"),)),
    ("WavPack", ((0, b"wvpk"),)),
    ("Monkey's Audio", ((0, b"MAC "),)),
    ("VOC", ((0, b"Creative Voice File"),)),
    ("SPHERE", ((0, b"NIST_1A\n"),)),
)
STREAMABLE = {(1, 16): "pcm_s16le", (3, 32): "pcm_f32le", (6, 8): "alaw", (7, 8): "mulaw"}  # (format tag, bits)
_MAX_HEADER_SIZE = 1 << 16  # bytes before the samples of a WAV stream
# Programs that write to a pipe do not know the size and state the largest one (sox, ffmpeg, arecord).
_UNKNOWN_SIZE = 0x7FFFF000


def container_of(head: bytes) -> str | None:
    """Return the container that a file or stream with these first bytes has; None if they are raw samples."""
    for name, signature in _SIGNATURES:
        if all(head[offset : offset + len(magic)] == magic for offset, magic in signature):
            return name
    for name, parse_frame in (("MP3", mpeg_frame), ("AAC", adts_frame)):
        first = parse_frame(head[:7])
        if first:
            second = parse_frame(head[first[0] : first[0] + 7])
            if second and second[1] == first[1]:
                return name
    return None


def undecided(head: bytes) -> bool:
    """Return whether `container_of` needs more bytes to exclude every container."""
    if container_of(head):
        return False
    for _, signature in _SIGNATURES:
        if len(head) < max(offset + len(magic) for offset, magic in signature) and all(
            head[offset : offset + len(magic)] == magic[: max(0, len(head) - offset)] for offset, magic in signature
        ):
            return True
    if len(head) < 7:
        return head[:1] == b"\xff" and (len(head) < 2 or head[1] & 0xE0 == 0xE0)
    return any(first and len(head) < first[0] + 7 for first in (mpeg_frame(head[:7]), adts_frame(head[:7])))


# -- MPEG frames -------------------------------------------------------------------------------------------------------

_KBITS = {  # bit rates by (whether MPEG version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _mpeg_sizes() -> dict[int, tuple[int, int]]:
    """Map bytes 1 and 2 of a header to the frame size and to the bits that all frames of a stream share."""
    sizes = {}
    for second in range(0xE0, 0x100):
        version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
        if version == 1 or layer == 4:
            continue
        for third in range(0x100):
            kbit, rate, padding = third >> 4, third >> 2 & 3, third >> 1 & 1
            if kbit in (0, 15) or rate == 3:
                continue
            hz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
            bits = 1000 * _KBITS[version == 3, layer][kbit - 1]
            if layer == 1:
                size = (12 * bits // hz + padding) * 4
            else:
                size = (72 if layer == 3 and version != 3 else 144) * bits // hz + padding
            sizes[second << 8 | third] = size, (second & 0xFE) << 8 | third & 0x0C
    return sizes


MPEG = _mpeg_sizes()


def mpeg_frame(header: bytes) -> tuple[int, int] | None:
    """Parse the header of an MPEG audio frame (ISO 11172-3, 13818-3).

    Return the frame size in bytes, and version, layer and sample rate as one number; None if it is not a frame.
    """
    if len(header) < 4 or header[0] != 0xFF or header[3] & 3 == 2:  # 2 is a reserved emphasis
        return None
    return MPEG.get(header[1] << 8 | header[2])


def adts_frame(header: bytes) -> tuple[int, int] | None:
    """As `mpeg_frame`, for AAC in ADTS (ISO 13818-7)."""
    if len(header) < 7 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0 or header[2] >> 2 & 15 > 12:
        return None
    size = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    return (size, header[1] << 16 | header[2] << 8 | header[3] & 0xC0) if size > 7 else None


# -- WAV ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WavHeader:
    """The header of a WAV file (RIFF, RIFX, RF64). Offsets are bytes from the start of the file."""

    format_tag: int
    bits: int  # per sample
    sample_rate: int  # Hz
    channels: int
    bytes_per_second: int
    data_start: int  # offset of the samples
    data_size: int | None  # bytes of samples; None if the header does not state it
    file_end: int | None  # end of the file according to the header; None if not stated
    size_fields: dict[int, int] = field(default_factory=dict)  # offset -> width: the size of the file, of the data
    byte_order: str = "<"  # as in `struct`

    @property
    def encoding(self) -> str:
        """The name of the samples' encoding. Raises `AudioError` if it cannot be streamed."""
        encoding = STREAMABLE.get((self.format_tag, self.bits)) if self.byte_order == "<" else None
        if encoding is None:
            raise AudioError(
                f"WAV samples of format {self.format_tag} with {self.bits} bits cannot be streamed; send 16-bit PCM, "
                "32-bit float, A-law or mu-law."
            )
        return encoding


def wav_header(file: BinaryIO, at: int = 0) -> WavHeader | None:
    """Read the WAV header at offset `at`; return None if the file ends before the samples.

    Raises `AudioError` if the header is invalid.
    """
    file.seek(at)
    head = file.read(12)
    if len(head) < 12:
        return None
    order = ">" if head[:4] == b"RIFX" else "<"
    (riff,) = struct.unpack(order + "I", head[4:8])
    sample_format, ds64, offset = None, None, at + 12
    while True:
        file.seek(offset)
        chunk = file.read(8)
        if len(chunk) < 8:
            return None
        name, (size,) = chunk[:4], struct.unpack(order + "I", chunk[4:])
        if name == b"data":
            break
        if name == b"fmt ":
            body = file.read(26)
            if len(body) < min(size, 26):
                return None
            if size < 16:
                raise AudioError(f"the WAV header's fmt chunk has {size} bytes; it must have 16 or more.")
            tag, channels, rate, per_second, _, bits = struct.unpack(order + "HHIIHH", body[:16])
            if tag == 0xFFFE and size >= 26:  # extensible: the format tag is the first field of the GUID
                (tag,) = struct.unpack(order + "H", body[24:26])
            sample_format = tag, bits, rate, channels, per_second
        elif name == b"ds64":
            body = file.read(16)
            if len(body) < 16:
                return None
            ds64 = offset + 8, *struct.unpack("<QQ", body)
        offset += 8 + size + size % 2
    if sample_format is None:
        raise AudioError("the WAV header has no fmt chunk before its data chunk.")
    size_fields, limit = {at + 4: 4, offset + 4: 4}, _UNKNOWN_SIZE
    if ds64 and size == 0xFFFFFFFF:  # RF64 states its sizes in the ds64 chunk
        riff, size, limit = ds64[1], ds64[2], 1 << 62
        size_fields = {ds64[0]: 8, ds64[0] + 8: 8}
    known = 0 < size < limit
    return WavHeader(
        *sample_format,
        data_start=offset + 8,
        data_size=size if known else None,
        file_end=at + 8 + riff + riff % 2 if known and 0 < riff < limit else None,
        size_fields=size_fields,
        byte_order=order,
    )


class WavStream:
    """Incremental WAV parser: receives the bytes of a file and returns those of its samples.

    Other chunks are dropped. A second WAV file may follow the first. Raises `AudioError` for an invalid header.
    """

    def __init__(self) -> None:
        self.header: WavHeader | None = None  # set once it is complete
        self._buffer = b""
        self._left: int | None = 0  # bytes of samples still to be received; None: until the end
        self._skip = 0  # bytes of other chunks still to be dropped

    @property
    def missing(self) -> float:
        """Seconds of audio that the header announces and that have not been received."""
        return (self._left or 0) / max(self.header.bytes_per_second, 1) if self.header else 0.0

    @property
    def pending(self) -> int:
        """Number of bytes received last that are the beginning of a header or chunk."""
        return len(self._buffer)

    def state(self) -> list[int | None]:
        """Return the state for `resumed`, without the pending bytes; empty before the first header."""
        if (header := self.header) is None:
            return []
        return [header.format_tag, header.bits, header.sample_rate, header.channels, self._left, self._skip]

    @classmethod
    def resumed(cls, state: Sequence[Any]) -> WavStream:
        """Return a parser in a saved state. Raises `ValueError` if it is not valid."""
        stream = cls()
        if not state:
            return stream
        tag, bits, rate, channels, left, skip = state
        if not all(type(number) is int and number >= 0 for number in (tag, bits, rate, channels, left or 0, skip)):
            raise ValueError(f"the state of a WAV file is {list(state)}")
        stream.header = WavHeader(tag, bits, rate, channels, rate * channels * bits // 8, 0, None, None)
        stream._left, stream._skip = left, skip
        return stream

    @property
    def complete(self) -> bool:
        """Whether all announced samples have been received, and no incomplete chunk follows them."""
        return self.header is not None and self._left == 0 and not self._skip and not self._buffer

    def push(self, data: bytes) -> bytes:
        """Process the next bytes; return those that are samples."""
        data, samples = self._buffer + data, []
        self._buffer = b""
        while data:
            if self._left is None or self._left:
                taken, data = data[: self._left], data[len(data) if self._left is None else self._left :]
                samples.append(taken)
                if self._left is not None:
                    self._left -= len(taken)
            elif self._skip:
                data, self._skip = data[self._skip :], max(0, self._skip - len(data))
            elif self.header is None or data[:4] == b"RIFF"[: len(data)]:
                header = wav_header(io.BytesIO(data)) if data[8:12] in (b"", b"WAVE") else None
                if header is None:
                    if len(data) > _MAX_HEADER_SIZE:
                        raise AudioError(f"the WAV header is longer than {_MAX_HEADER_SIZE >> 10} KiB.")
                    self._buffer = data
                    break
                self._begin(header)
                data = data[header.data_start :]
            elif len(data) < 8:
                self._buffer = data
                break
            else:
                size = int.from_bytes(data[4:8], "little")
                self._skip = 8 + size + size % 2
        return b"".join(samples)

    def _begin(self, header: WavHeader) -> None:
        """Start a WAV file, whose samples must have the same format as those of the file before."""
        if not header.channels:
            raise AudioError("the WAV header states 0 channels; it must state at least 1.")
        old = self.header
        if old and (old.encoding, old.sample_rate, old.channels) != (
            header.encoding,
            header.sample_rate,
            header.channels,
        ):
            raise AudioError(
                f"a WAV file of {header.sample_rate} Hz and {header.channels} channel(s) follows one of "
                f"{old.sample_rate} Hz and {old.channels} channel(s); open a new stream for it."
            )
        self.header, self._left = header, header.data_size
        # A data chunk of odd size (possible with 8-bit formats only) is followed by a padding byte, which is dropped
        # after the samples.
        self._skip = (header.data_size or 0) % 2
