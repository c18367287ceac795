"""Audio containers by their bytes: which one begins here, where its streams end, what a WAV header states.

The magic numbers are long enough that raw samples do not match by chance; the two formats without one (MP3, AAC) need
two consecutive frame headers that agree. What the module does not know: decoders, numpy.
"""

from __future__ import annotations

import io
import mmap
import re
import struct
from collections.abc import Iterator
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
_MOST_PARTS = 4096  # streams of one file: days of a radio station's, a stream a song
_RESYNC = 1 << 22  # bytes searched for the next MPEG frame


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


_MPEG = _mpeg_sizes()


def mpeg_frame(header: bytes) -> tuple[int, int] | None:
    """Bytes of the MPEG audio frame (ISO 11172-3, 13818-3) that these begin, and version, layer and rate in one number;
    None if they begin none."""
    if len(header) < 4 or header[0] != 0xFF or header[3] & 3 == 2:  # an emphasis that does not exist
        return None
    return _MPEG.get(header[1] << 8 | header[2])


def adts_frame(header: bytes) -> tuple[int, int] | None:
    """As `mpeg_frame`, of AAC in ADTS (ISO 13818-7)."""
    if len(header) < 7 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0 or header[2] >> 2 & 15 > 12:
        return None
    size = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    return (size, header[1] << 16 | header[2] << 8 | header[3] & 0xC0) if size > 7 else None


# -- WAV ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WavHeader:
    """What stands before the samples of a WAV file (RIFF, RIFX, RF64)."""

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
        *shape, start=where + 8, claimed=size if known else None, order=order, sizes=sizes,
        end=at + 8 + riff + riff % 2 if known and 0 < riff < limit else None,
    )  # fmt: skip


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
            header.encoding, header.sample_rate, header.channels,
        ):  # fmt: skip
            raise AudioError(
                f"a WAV file of {header.sample_rate} Hz and {header.channels} channel(s) follows one of "
                f"{old.sample_rate} Hz and {old.channels}; open a new stream for it."
            )
        self.header, self._left = header, header.claimed
        # The byte that makes an odd chunk even is skipped with the next chunk's header: no format here has odd sizes
        # but 8-bit ones, where `_skip` begins after the samples.
        self._skip = (header.claimed or 0) % 2


# -- the streams in a file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One stream of a file: some files are several, one after the other."""

    container: str | None
    start: int
    end: int
    patches: dict[int, bytes] = field(default_factory=dict)  # bytes to read in place of the file's, by offset
    prefix: bytes = b""  # to read before the file's
    missing: float = 0.0  # seconds that a WAV header promises beyond the end of the file
    promise: bool = True  # whether the header knows the length


def parts_of(file: BinaryIO) -> list[Part]:
    """Return the streams of a file, in order; bytes after the last one belong to no stream. Raises `AudioError`."""
    size = file.seek(0, io.SEEK_END)
    if not size:
        return [Part(None, 0, 0)]
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parts: list[Part] = []
        at = 0
        while at < size:
            begin = data[at : at + 4096]
            container = container_of(begin)
            if container == "MP3" and begin.startswith(b"ID3"):
                audio = _after_id3(data, at)
                container = container_of(data[audio : audio + 4096]) or container
            if container is None and parts:
                break  # tags, or nothing known
            for part in _walk(container, file, data, at, size):
                parts.append(part)
                if len(parts) > _MOST_PARTS:
                    raise AudioError(f"it holds more than {_MOST_PARTS} streams one after the other.")
            at = parts[-1].end
        return parts


def _walk(container: str | None, file: BinaryIO, data: mmap.mmap, at: int, size: int) -> Iterator[Part]:
    """The part at `at`, or several where the container shows their borders."""
    if container == "WAV":
        yield _wav_part(file, data, at, size)
    elif container == "FLAC":
        yield _flac_part(data, at, size)
    elif container == "MP3":
        yield from _mp3_parts(data, at, size)
    else:
        end = size
        if container == "Ogg":
            end = _ogg_end(data, at, size)
        elif container == "MP4":
            end = _mp4_end(data, at, size)
        elif container == "AIFF":
            end = _joined(data, at + 8 + int.from_bytes(data[at + 4 : at + 8], "big"), size)
        elif container == "W64":
            end = _joined(data, at + int.from_bytes(data[at + 16 : at + 24], "little"), size)
        elif container == "AU":
            start, length = struct.unpack(">II", data[at + 4 : at + 12])
            end = _joined(data, at + start + length, size) if length != 0xFFFFFFFF else size
        elif container == "CAF":
            end = _caf_end(data, at, size)
        yield Part(container, at, end)


def _joined(data: mmap.mmap, end: int, size: int) -> int:
    """`end` if another file begins there, at an even byte or not; else all there is."""
    for border in (end, end + end % 2):
        if border < size and container_of(data[border : border + 4096]):
            return border
    return size


def _wav_part(file: BinaryIO, data: mmap.mmap, at: int, size: int) -> Part:
    header = wav_header(file, at)
    if header is None:
        return Part("WAV", at, size)
    if header.end is not None:
        end = _joined(data, header.end, size)
    else:
        end = size
        if (other := data.find(b"WAVEfmt ", header.start)) >= 0 and data[other - 8 : other - 4] in (b"RIFF", b"RF64"):
            end = other - 8
    there = max(0, end - header.start)
    if header.claimed is not None:
        missing = (header.claimed - there) / max(header.bytes_per_second, 1)
        return Part("WAV", at, end, missing=max(0.0, missing))
    if not there or _only_chunks(data, header, end):
        return Part("WAV", at, end)
    # The program that wrote it was killed, or wrote into a pipe: the samples go on to the end of the file.
    order = "big" if header.order == ">" else "little"
    values = (end - at - 8, there)
    patches = {
        offset: min(value, 256**width - 1).to_bytes(width, order)
        for (offset, width), value in zip(header.sizes.items(), values, strict=True)
    }
    return Part("WAV", at, end, patches, promise=False)


def _only_chunks(data: mmap.mmap, header: WavHeader, end: int) -> bool:
    """Whether a data chunk of no bytes is followed by chunks that end where the file does: then it is empty."""
    (claimed,) = (data[offset : offset + width] for offset, width in [list(header.sizes.items())[1]])
    if any(claimed):
        return False
    at = header.start
    while at + 8 <= end and data[at : at + 4].isascii() and data[at : at + 4].decode().isprintable():
        size = int.from_bytes(data[at + 4 : at + 8], "big" if header.order == ">" else "little")
        at += 8 + size + size % 2
    return at in (end, end + 1)


def _flac_part(data: mmap.mmap, at: int, size: int) -> Part:
    begin = audio = data.find(b"fLaC", at)  # after an ID3 tag, in some files
    last, audio = False, audio + 4
    while not last and audio + 4 <= size:
        last, audio = bool(data[audio] & 0x80), audio + 4 + int.from_bytes(data[audio + 1 : audio + 4], "big")
    # The next STREAMINFO: eight bytes that compressed audio does not contain by chance.
    found = [data.find(b"fLaC" + first + b"\0\0\x22", audio) for first in (b"\0", b"\x80")]
    end = min((other for other in found if other >= 0), default=size)
    samples = begin + 21  # 4 bits there and 32 that follow; 0: the program that wrote it into a pipe did not know
    unknown = end > samples + 5 and not data[samples] & 0x0F and not any(data[samples + 1 : samples + 5])
    if unknown and (total := _flac_samples(data, begin, end)):  # libsndfile does not read 0
        high, low = bytes([data[samples] | total >> 32]), (total & 0xFFFFFFFF).to_bytes(4, "big")
        return Part("FLAC", at, end, {samples: high + low})
    return Part("FLAC", at, end)


_LARGEST_FRAME = 1 << 17  # bytes of a FLAC frame; more than any encoder writes of two channels


def _flac_samples(data: mmap.mmap, begin: int, end: int) -> int | None:
    """Samples of a FLAC stream by its last frame (RFC 9639, 9.1); None if no whole frame ends where the stream does."""
    at, largest, tries = end, int.from_bytes(data[begin + 10 : begin + 12], "big"), 16
    while tries and (at := data.rfind(b"\xff", max(begin, end - _LARGEST_FRAME), at)) >= 0:
        head = data[at : at + 16]
        if len(head) < 6 or head[1] & 0xFE != 0xF8:
            continue
        length = max(1, 8 - (head[4] ^ 0xFF).bit_length())  # of a number written as UTF-8 writes one
        number = head[4] & (0x7F >> length if length > 1 else 0x7F)
        for byte in head[5 : 4 + length]:
            number = number << 6 | byte & 0x3F
        size_code, rate_code, rest = head[2] >> 4, head[2] & 15, 4 + length
        extra = {6: 1, 7: 2}.get(size_code, 0)
        size = int.from_bytes(head[rest : rest + extra], "big") + 1
        if not extra:
            size = 192 if size_code == 1 else 144 << size_code if size_code < 6 else 1 << size_code
        rest += extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
        if rest < len(head) and _crc(head[: rest + 1], 8) == 0:
            if _crc(data[at:end], 16) == 0:
                return number * (1 if head[1] & 1 else largest) + size
            tries -= 1
    return None


def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = (value << 1 & (1 << bits) - 1) ^ (polynomial if value >> (bits - 1) else 0)
        table.append(value)
    return table


_CRC = {8: _crc_table(8, 0x07), 16: _crc_table(16, 0x8005)}  # of a frame's header, of a frame


def _crc(data: bytes, bits: int) -> int:
    table, value, low = _CRC[bits], 0, (1 << (bits - 8)) - 1
    for byte in data:
        value = table[(value >> (bits - 8) ^ byte) & 0xFF] ^ (value & low) << 8
    return value


def _ogg_end(data: mmap.mmap, at: int, size: int) -> int:
    """Where the next link of a chain begins: at the first page of a stream after a page that is none."""
    seen, before = False, at
    while at + 27 <= size:
        if data[at : at + 4] != b"OggS":  # a page is damaged, or cut short before another link
            at = data.find(b"OggS", before + 27)
            if at < 0:
                return size
        before = at
        first = bool(data[at + 5] & 2)
        if first and seen:
            return at
        seen = seen or not first
        segments = data[at + 26]
        at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
    return size


def _mp4_end(data: mmap.mmap, at: int, size: int) -> int:
    """Where a second file begins among the boxes."""
    begun = False
    while at + 8 <= size:
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"ftyp" and begun:
            return at
        begun = begun or kind == b"moov"
        if length == 1:
            length = int.from_bytes(data[at + 8 : at + 16], "big")
        if length < 8:
            break
        at += length
    return size


def _caf_end(data: mmap.mmap, at: int, size: int) -> int:
    at += 8
    while at + 12 <= size and not container_of(data[at : at + 16]):
        length = int.from_bytes(data[at + 4 : at + 12], "big", signed=True)
        if length < 0:
            return size
        at += 12 + length
    return min(at, size) if at + 12 <= size else size


def _after_id3(data: mmap.mmap, at: int) -> int:
    """What follows ID3v2 tags."""
    while data[at : at + 3] == b"ID3" and len(head := data[at : at + 10]) == 10:
        at += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        at += 10 * bool(head[5] & 0x10)  # a footer
    return at


_SYNC = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]")
_TABLE = re.compile(rb"\xff[\xe2-\xff].{11}(?:.{8}|.{23})?(Xing|Info|VBRI)", re.DOTALL)
_FEWEST = 4  # frames; fewer are no stream of their own


def _mp3_parts(data: mmap.mmap, at: int, size: int) -> Iterator[Part]:
    """A new stream begins at a frame with a table of its length (Xing, VBRI), at another format, after as many frames
    as the table states, and after bytes that are no frame.

    A stream without a table gets one: libsndfile estimates the length without, and reads no further.
    """
    heads = _mp3_heads(data, at, size)
    start, first, frames, key, promised = at, at, 0, -1, 0

    def part(end: int) -> Part:
        table = b"" if promised or not frames else _xing(data[first : first + 4], frames)
        return Part("MP3", first if table else start, end, prefix=table, promise=promised > 0)

    while True:
        entry = None
        if at + 4 <= size and data[at] == 0xFF:
            entry = _MPEG.get(data[at + 1] << 8 | data[at + 2])
        if entry is None:
            if at + 10 <= size and data[at : at + 3] == b"ID3":
                at = min(_after_id3(data, at), size)
                continue
            found = _resync(data, at, size)
            if found is None:
                yield part(size)
                return
            if frames >= _FEWEST:
                yield part(at)
                start, frames, promised = found, 0, 0
            at = found
            continue
        over = promised and frames > promised and _run(data, at, size) >= _FEWEST
        if frames >= _FEWEST and (at in heads or entry[1] != key or over):
            yield part(at)
            start, frames, promised = at, 0, 0
        if not frames:
            first, key, promised = at, entry[1], heads.get(at, 0)
        frames += 1
        at += entry[0]


def _xing(header: bytes, frames: int) -> bytes:
    """A frame of no audio that states how many frames follow; nothing for layers that have none."""
    mono, version_1 = header[3] >> 6 == 3, header[1] & 0x08
    side = (17 if mono else 32) if version_1 else (9 if mono else 17)
    table = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    for kbit in range(1, 15):
        head = bytes([0xFF, header[1] | 1, kbit << 4 | header[2] & 0x0C, header[3] & 0xC0])  # without a CRC
        found = mpeg_frame(head)
        if found and header[1] >> 1 & 3 == 1 and found[0] >= 4 + side + len(table):
            return (head + bytes(side) + table).ljust(found[0], b"\0")
    return b""


def _mp3_heads(data: mmap.mmap, at: int, size: int) -> dict[int, int]:
    """Frames that hold no audio but the length of the stream they begin: their offset, and the number of frames; 0
    where libmpg123 does not read it."""
    heads = {}
    for found in _TABLE.finditer(data, at):
        where = found.end() - 4
        for distance in (36, 21, 13):  # after the frame's header and side information
            begin = where - distance
            if begin < at or not (frame := mpeg_frame(data[begin : begin + 4])):
                continue
            following = begin + frame[0]
            if following >= size or mpeg_frame(data[following : following + 4]):
                counted = found[1] != b"VBRI" and where + 12 <= size and data[where + 7] & 1
                heads[begin] = int.from_bytes(data[where + 8 : where + 12], "big") if counted else 0
                break
    return heads


def _resync(data: mmap.mmap, at: int, size: int) -> int | None:
    """The next frame that another one like it follows."""
    for found in _SYNC.finditer(data, at, min(size, at + _RESYNC)):
        if _run(data, found.start(), size, 2) == 2:
            return found.start()
    return None


def _run(data: mmap.mmap, at: int, size: int, most: int = _FEWEST) -> int:
    """How many frames of one format follow each other from here, up to `most`."""
    count, key = 0, None
    while count < most and (frame := mpeg_frame(data[at : at + 4])) and key in (None, frame[1]):
        count, key, at = count + 1, frame[1], at + frame[0]
    return count
