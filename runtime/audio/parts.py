"""The streams of an audio file: some files are several, one after the other, and some do not state their length.

What the module does not know: decoders, numpy.
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
from nemostream.runtime.audio.containers import MPEG, WavHeader, container_of, mpeg_frame, wav_header

_MOST_PARTS = 4096  # streams of one file: days of a radio station's, a stream a song
_RESYNC = 1 << 22  # bytes searched for the next MPEG frame


@dataclass(frozen=True)
class AudioPart:
    """One stream of a file: some files are several, one after the other."""

    container: str | None
    start: int
    end: int
    patches: dict[int, bytes] = field(default_factory=dict)  # bytes to read in place of the file's, by offset
    prefix: bytes = b""  # to read before the file's
    missing: float = 0.0  # seconds that a WAV header promises beyond the end of the file
    promise: bool = True  # whether the header knows the length


def find_parts(file: BinaryIO) -> list[AudioPart]:
    """Return the streams of a file, in order; bytes after the last one belong to no stream. Raises `AudioError`."""
    size = file.seek(0, io.SEEK_END)
    if not size:
        return [AudioPart(None, 0, 0)]
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parts: list[AudioPart] = []
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


def _walk(container: str | None, file: BinaryIO, data: mmap.mmap, at: int, size: int) -> Iterator[AudioPart]:
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
        yield AudioPart(container, at, end)


def _joined(data: mmap.mmap, end: int, size: int) -> int:
    """`end` if another file begins there, at an even byte or not; else all there is."""
    for border in (end, end + end % 2):
        if border < size and container_of(data[border : border + 4096]):
            return border
    return size


def _wav_part(file: BinaryIO, data: mmap.mmap, at: int, size: int) -> AudioPart:
    header = wav_header(file, at)
    if header is None:
        return AudioPart("WAV", at, size)
    if header.end is not None:
        end = _joined(data, header.end, size)
    else:
        end = size
        if (other := data.find(b"WAVEfmt ", header.start)) >= 0 and data[other - 8 : other - 4] in (b"RIFF", b"RF64"):
            end = other - 8
    there = max(0, end - header.start)
    if header.claimed is not None:
        missing = (header.claimed - there) / max(header.bytes_per_second, 1)
        return AudioPart("WAV", at, end, missing=max(0.0, missing))
    if not there or _only_chunks(data, header, end):
        return AudioPart("WAV", at, end)
    # The program that wrote it was killed, or wrote into a pipe: the samples go on to the end of the file.
    order = "big" if header.order == ">" else "little"
    values = (end - at - 8, there)
    patches = {
        offset: min(value, 256**width - 1).to_bytes(width, order)
        for (offset, width), value in zip(header.sizes.items(), values, strict=True)
    }
    return AudioPart("WAV", at, end, patches, promise=False)


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


def _flac_part(data: mmap.mmap, at: int, size: int) -> AudioPart:
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
        return AudioPart("FLAC", at, end, {samples: high + low})
    return AudioPart("FLAC", at, end)


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


def _mp3_parts(data: mmap.mmap, at: int, size: int) -> Iterator[AudioPart]:
    """A new stream begins at a frame with a table of its length (Xing, VBRI), at another format, after as many frames
    as the table states, and after bytes that are no frame.

    A stream without a table gets one: libsndfile estimates the length without, and reads no further.
    """
    heads = _mp3_heads(data, at, size)
    start, first, frames, key, promised = at, at, 0, -1, 0

    def part(end: int) -> AudioPart:
        table = b"" if promised or not frames else _xing(data[first : first + 4], frames)
        return AudioPart("MP3", first if table else start, end, prefix=table, promise=promised > 0)

    while True:
        entry = None
        if at + 4 <= size and data[at] == 0xFF:
            entry = MPEG.get(data[at + 1] << 8 | data[at + 2])
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
