"""Audio containers by their bytes: which one begins here, what a WAV header states.

The magic numbers are long enough that raw samples do not match by chance; the two formats without one (MP3, AAC) need
two consecutive frame headers that agree. What the module does not know: decoders, numpy.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import BinaryIO

from nemostream.errors import AudioError

_GUID_ASF = bytes.fromhex("3026b2758e66cf11")
_GUID_W64 = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
# Name, and the bytes at each offset.
_MAGIC: tuple[tuple[str, tuple[tuple[int, bytes], ...]], ...] = (
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
_LONGEST_HEADER = 1 << 16  # of a WAV stream, before its samples
# Programs that write into a pipe cannot know a size and state the largest one (sox, ffmpeg, arecord).
_NO_SIZE = 0x7FFFF000


def container_of(begin: bytes) -> str | None:
    """Return the container that these first bytes of a file or stream belong to; None if they are raw samples."""
    for name, parts in _MAGIC:
        if all(begin[at : at + len(magic)] == magic for at, magic in parts):
            return name
    for name, frame in (("MP3", mpeg_frame), ("AAC", adts_frame)):
        first = frame(begin[:7])
        if first:
            second = frame(begin[first[0] : first[0] + 7])
            if second and second[1] == first[1]:
                return name
    return None


def undecided(begin: bytes) -> bool:
    """Whether `container_of` may find a container when more bytes follow these."""
    if container_of(begin):
        return False
    for _, parts in _MAGIC:
        if len(begin) < max(at + len(magic) for at, magic in parts) and all(
            begin[at : at + len(magic)] == magic[: max(0, len(begin) - at)] for at, magic in parts
        ):
            return True
    if len(begin) < 7:
        return begin[:1] == b"\xff" and (len(begin) < 2 or begin[1] & 0xE0 == 0xE0)
    return any(first and len(begin) < first[0] + 7 for first in (mpeg_frame(begin[:7]), adts_frame(begin[:7])))


# -- MPEG frames -------------------------------------------------------------------------------------------------------

_KBITS = {  # by (version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _mpeg_sizes() -> dict[int, tuple[int, int]]:
    """Second and third byte of a header -> bytes of the frame, and what all frames of a stream have in common."""
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
    """Bytes of the MPEG audio frame (ISO 11172-3, 13818-3) that these begin, and version, layer and rate in one number;
    None if they begin none."""
    if len(header) < 4 or header[0] != 0xFF or header[3] & 3 == 2:  # an emphasis that does not exist
        return None
    return MPEG.get(header[1] << 8 | header[2])


def adts_frame(header: bytes) -> tuple[int, int] | None:
    """As `mpeg_frame`, of AAC in ADTS (ISO 13818-7)."""
    if len(header) < 7 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0 or header[2] >> 2 & 15 > 12:
        return None
    size = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    return (size, header[1] << 16 | header[2] << 8 | header[3] & 0xC0) if size > 7 else None


# -- WAV ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WavHeader:
    """The bytes before the samples of a WAV file (RIFF, RIFX, RF64)."""

    tag: int  # of the format
    bits: int
    sample_rate: int
    channels: int
    bytes_per_second: int
    start: int  # of the samples, from the file's first byte
    claimed: int | None  # bytes of samples; None where the header does not know
    end: int | None  # of the file as its header states it
    sizes: dict[int, int] = field(default_factory=dict)  # where the sizes of the data and the file stand: bytes
    order: str = "<"

    @property
    def encoding(self) -> str:
        """The name of the samples' encoding. Raises `AudioError` if these samples cannot be streamed."""
        found = STREAMABLE.get((self.tag, self.bits)) if self.order == "<" else None
        if found is None:
            raise AudioError(
                f"WAV samples of format {self.tag} with {self.bits} bits cannot be streamed; send 16-bit PCM, "
                "32-bit float, A-law or mu-law."
            )
        return found


def wav_header(file: BinaryIO, at: int = 0) -> WavHeader | None:
    """Read the WAV header that begins at byte `at`; None if the file ends before the samples. Raises `AudioError`."""
    file.seek(at)
    head = file.read(12)
    if len(head) < 12:
        return None
    order = ">" if head[:4] == b"RIFX" else "<"
    (riff,) = struct.unpack(order + "I", head[4:8])
    shape, large, where = None, None, at + 12
    while True:
        file.seek(where)
        part = file.read(8)
        if len(part) < 8:
            return None
        name, (size,) = part[:4], struct.unpack(order + "I", part[4:])
        if name == b"data":
            break
        if name == b"fmt ":
            body = file.read(26)
            if len(body) < min(size, 26):
                return None
            if size < 16:
                raise AudioError(f"the WAV header's fmt chunk has {size} bytes; it must have 16 or more.")
            tag, channels, rate, per_second, _, bits = struct.unpack(order + "HHIIHH", body[:16])
            if tag == 0xFFFE and size >= 26:  # extensible: the format is the first part of its GUID
                (tag,) = struct.unpack(order + "H", body[24:26])
            shape = tag, bits, rate, channels, per_second
        elif name == b"ds64":
            body = file.read(16)
            if len(body) < 16:
                return None
            large = where + 8, *struct.unpack("<QQ", body)
        where += 8 + size + size % 2
    if shape is None:
        raise AudioError("the WAV header has no fmt chunk before its data chunk.")
    sizes, limit = {at + 4: 4, where + 4: 4}, _NO_SIZE
    if large and size == 0xFFFFFFFF:  # RF64 has its sizes elsewhere
        riff, size, limit = large[1], large[2], 1 << 62
        sizes = {large[0]: 8, large[0] + 8: 8}
    known = 0 < size < limit
    return WavHeader(
        *shape,
        start=where + 8,
        claimed=size if known else None,
        order=order,
        sizes=sizes,
        end=at + 8 + riff + riff % 2 if known and 0 < riff < limit else None,
    )


class WavStream:
    """A WAV file that arrives in pieces: takes its bytes, gives those of its samples.

    Other chunks are left out wherever they stand. A second WAV file may follow the first. Raises `AudioError` for a
    header that cannot be.
    """

    def __init__(self) -> None:
        self.header: WavHeader | None = None  # once all of it came
        self._buffer = b""
        self._left: int | None = 0  # bytes of samples still to come; None: all bytes
        self._skip = 0

    @property
    def missing(self) -> float:
        """Seconds that the header promises and that did not come yet."""
        return (self._left or 0) / max(self.header.bytes_per_second, 1) if self.header else 0.0

    @property
    def complete(self) -> bool:
        """Whether all samples that the header promises came, and nothing that is not whole follows them."""
        return self.header is not None and self._left == 0 and not self._skip and not self._buffer

    def push(self, data: bytes) -> bytes:
        """Take the next bytes; return those that are samples."""
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
                    if len(data) > _LONGEST_HEADER:
                        raise AudioError(f"the WAV header is longer than {_LONGEST_HEADER >> 10} KiB.")
                    self._buffer = data
                    break
                self._begin(header)
                data = data[header.start :]
            elif len(data) < 8:
                self._buffer = data
                break
            else:
                size = int.from_bytes(data[4:8], "little")
                self._skip = 8 + size + size % 2
        return b"".join(samples)

    def _begin(self, header: WavHeader) -> None:
        old = self.header
        if old and (old.encoding, old.sample_rate, old.channels) != (
            header.encoding,
            header.sample_rate,
            header.channels,
        ):
            raise AudioError(
                f"a WAV file of {header.sample_rate} Hz and {header.channels} channel(s) follows one of "
                f"{old.sample_rate} Hz and {old.channels}; open a new stream for it."
            )
        self.header, self._left = header, header.claimed
        # The byte that makes an odd chunk even is skipped with the next chunk's header: no format here has odd sizes
        # but 8-bit ones, where `_skip` begins after the samples.
        self._skip = (header.claimed or 0) % 2
