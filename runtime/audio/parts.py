"""Find the streams of an audio file: a file may contain several in sequence, and may not state its length.

This module does not depend on decoders or numpy. `at` is the offset at which a stream begins, `size` the size of the
file, both in bytes.
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

_MAX_PARTS = 4096  # streams per file: days of an internet radio recording with one stream per song
_RESYNC = 1 << 22  # bytes searched for the next MPEG frame


@dataclass(frozen=True)
class AudioPart:
    """One stream of a file. Offsets are bytes from the start of the file."""

    container: str | None
    start: int
    end: int
    patches: dict[int, bytes] = field(default_factory=dict)  # bytes that replace those of the file, by offset
    prefix: bytes = b""  # bytes inserted before `start`
    missing: float = 0.0  # seconds of audio that a WAV header announces beyond the end of the file
    length_known: bool = True  # whether the header states the length


def find_parts(file: BinaryIO) -> list[AudioPart]:
    """Return the streams of a file in order; bytes after the last one belong to no stream.

    Raises `AudioError` if the file is empty or contains too many.
    """
    size = file.seek(0, io.SEEK_END)
    if not size:
        raise AudioError("it is empty.")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parts: list[AudioPart] = []
        at = 0
        while at < size:
            head = data[at : at + 4096]
            container = container_of(head)
            if container == "MP3" and head.startswith(b"ID3"):
                audio = _after_id3(data, at)
                container = container_of(data[audio : audio + 4096]) or container
            if container is None and parts:
                break  # tags or unknown data
            for part in _parts_at(container, file, data, at, size):
                parts.append(part)
                if len(parts) > _MAX_PARTS:
                    raise AudioError(f"it contains more than {_MAX_PARTS} streams in sequence.")
            at = parts[-1].end
        return parts


def _parts_at(container: str | None, file: BinaryIO, data: mmap.mmap, at: int, size: int) -> Iterator[AudioPart]:
    """Yield the part at `at`, and the parts after it if the same pass over the container finds them."""
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
            end = _end_of_file(data, at + 8 + int.from_bytes(data[at + 4 : at + 8], "big"), size)
        elif container == "W64":
            end = _end_of_file(data, at + int.from_bytes(data[at + 16 : at + 24], "little"), size)
        elif container == "AU":
            start, length = struct.unpack(">II", data[at + 4 : at + 12])
            end = _end_of_file(data, at + start + length, size) if length != 0xFFFFFFFF else size
        elif container == "CAF":
            end = _caf_end(data, at, size)
        yield AudioPart(container, at, end)


def _end_of_file(data: mmap.mmap, end: int, size: int) -> int:
    """Return `end`, or the next even offset, if another file begins there; otherwise `size`."""
    for boundary in (end, end + end % 2):
        if boundary < size and container_of(data[boundary : boundary + 4096]):
            return boundary
    return size


def _wav_part(file: BinaryIO, data: mmap.mmap, at: int, size: int) -> AudioPart:
    header = wav_header(file, at)
    if header is None:
        return AudioPart("WAV", at, size)
    if header.file_end is not None:
        end = _end_of_file(data, header.file_end, size)
    else:
        end = size
        if (other := data.find(b"WAVEfmt ", header.data_start)) >= 0 and data[other - 8 : other - 4] in (
            b"RIFF",
            b"RF64",
        ):
            end = other - 8
    available = max(0, end - header.data_start)
    if header.data_size is not None:
        missing = (header.data_size - available) / max(header.bytes_per_second, 1)
        return AudioPart("WAV", at, end, missing=max(0.0, missing))
    if not available or _has_only_chunks(data, header, end):
        return AudioPart("WAV", at, end)
    # The writing program was killed or wrote to a pipe: the samples extend to the end of the file.
    order = "big" if header.byte_order == ">" else "little"
    values = (end - at - 8, available)
    patches = {
        offset: min(value, 256**width - 1).to_bytes(width, order)
        for (offset, width), value in zip(header.size_fields.items(), values, strict=True)
    }
    return AudioPart("WAV", at, end, patches, length_known=False)


def _has_only_chunks(data: mmap.mmap, header: WavHeader, end: int) -> bool:
    """Return whether the data chunk is empty: its stated size is 0, and other chunks fill the file up to its end."""
    offset, width = list(header.size_fields.items())[1]
    if any(data[offset : offset + width]):
        return False
    at = header.data_start
    while at + 8 <= end and data[at : at + 4].isascii() and data[at : at + 4].decode().isprintable():
        size = int.from_bytes(data[at + 4 : at + 8], "big" if header.byte_order == ">" else "little")
        at += 8 + size + size % 2
    return at in (end, end + 1)


def _flac_part(data: mmap.mmap, at: int, size: int) -> AudioPart:
    begin = data.find(b"fLaC", at)  # some files start with an ID3 tag
    last, audio = False, begin + 4
    while not last and audio + 4 <= size:  # metadata blocks
        last, audio = bool(data[audio] & 0x80), audio + 4 + int.from_bytes(data[audio + 1 : audio + 4], "big")
    # The next STREAMINFO: eight bytes that compressed audio does not contain by chance.
    found = [data.find(b"fLaC" + first + b"\0\0\x22", audio) for first in (b"\0", b"\x80")]
    end = min((offset for offset in found if offset >= 0), default=size)
    at_total = begin + 21  # the number of samples: the low 4 bits of this byte and the next 4 bytes; 0 if unknown
    unknown = end > at_total + 5 and not data[at_total] & 0x0F and not any(data[at_total + 1 : at_total + 5])
    total = _count_flac_samples(data, begin, end) if unknown else None  # libsndfile does not accept 0
    if total and total < 1 << 36:  # the field has 36 bits; a damaged frame may state more
        high, low = bytes([data[at_total] | total >> 32]), (total & 0xFFFFFFFF).to_bytes(4, "big")
        return AudioPart("FLAC", at, end, {at_total: high + low})
    return AudioPart("FLAC", at, end)


_MAX_FLAC_FRAME = 1 << 17  # bytes; more than any encoder writes for two channels


def _count_flac_samples(data: mmap.mmap, begin: int, end: int) -> int | None:
    """Return the number of samples per channel, from the header of the last frame (RFC 9639, 9.1).

    Return None if no complete frame ends where the stream ends.
    """
    at, block_size, tries = end, int.from_bytes(data[begin + 10 : begin + 12], "big"), 16
    while tries and (at := data.rfind(b"\xff", max(begin, end - _MAX_FLAC_FRAME), at)) >= 0:
        head = data[at : at + 16]
        if len(head) < 6 or head[1] & 0xFE != 0xF8:
            continue
        length = max(1, 8 - (head[4] ^ 0xFF).bit_length())  # bytes of the frame or sample number, encoded like UTF-8
        number = head[4] & (0x7F >> length if length > 1 else 0x7F)
        for byte in head[5 : 4 + length]:
            number = number << 6 | byte & 0x3F
        size_code, rate_code, offset = head[2] >> 4, head[2] & 15, 4 + length
        extra = {6: 1, 7: 2}.get(size_code, 0)
        size = int.from_bytes(head[offset : offset + extra], "big") + 1
        if not extra:
            size = 192 if size_code == 1 else 144 << size_code if size_code < 6 else 1 << size_code
        offset += extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
        if offset < len(head) and _crc(head[: offset + 1], 8) == 0:
            if _crc(data[at:end], 16) == 0:
                return number * (1 if head[1] & 1 else block_size) + size
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


_CRC = {8: _crc_table(8, 0x07), 16: _crc_table(16, 0x8005)}  # of a FLAC frame's header, of the whole frame


def _crc(data: bytes, bits: int) -> int:
    table, value, low = _CRC[bits], 0, (1 << (bits - 8)) - 1
    for byte in data:
        value = table[(value >> (bits - 8) ^ byte) & 0xFF] ^ (value & low) << 8
    return value


def _ogg_end(data: mmap.mmap, at: int, size: int) -> int:
    """Return the offset of the next stream of a chain: the first beginning-of-stream page after other pages."""
    begun, previous = False, at
    while at + 27 <= size:
        if data[at : at + 4] != b"OggS":  # the previous page is damaged or cut short
            at = data.find(b"OggS", previous + 27)
            if at < 0:
                return size
        previous = at
        first = bool(data[at + 5] & 2)
        if first and begun:
            return at
        begun = begun or not first
        segments = data[at + 26]
        at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
    return size


def _mp4_end(data: mmap.mmap, at: int, size: int) -> int:
    """Return the offset of the box with which a second file begins, or `size`."""
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
    """Return the offset after the ID3v2 tags at `at`."""
    while data[at : at + 3] == b"ID3" and len(head := data[at : at + 10]) == 10:
        at += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        at += 10 * bool(head[5] & 0x10)  # the footer
    return at


_SYNC = re.compile(rb"\xff[\xe2-\xff][\x10-\xef]")
_TABLE = re.compile(rb"\xff[\xe2-\xff].{11}(?:.{8}|.{23})?(Xing|Info|VBRI)", re.DOTALL)
_MIN_FRAMES = 4  # of a stream


def _mp3_parts(data: mmap.mmap, at: int, size: int) -> Iterator[AudioPart]:
    """Yield the MP3 streams from `at` on.

    A new stream begins at a frame with a length table (Xing, VBRI), where the format changes, after the number of
    frames that the table states, and after bytes that are not a frame. A stream without a table is given one, because
    libsndfile would estimate the length and stop there.
    """
    tables = _mp3_tables(data, at, size)
    start, first, frames, key, stated = at, at, 0, -1, 0  # of the current stream; `stated`: frames by its table

    def part(end: int) -> AudioPart:
        table = b"" if stated or not frames else _make_xing_frame(data[first : first + 4], frames)
        return AudioPart("MP3", first if table else start, end, prefix=table, length_known=stated > 0)

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
            if frames >= _MIN_FRAMES:
                yield part(at)
                start, frames, stated = found, 0, 0
            at = found
            continue
        over = stated and frames > stated and _count_frames(data, at) >= _MIN_FRAMES
        if frames >= _MIN_FRAMES and (at in tables or entry[1] != key or over):
            yield part(at)
            start, frames, stated = at, 0, 0
        if not frames:
            first, key, stated = at, entry[1], tables.get(at, 0)
        frames += 1
        at += entry[0]


def _make_xing_frame(header: bytes, frames: int) -> bytes:
    """Return a frame without audio that states how many frames follow; empty for layers that do not support it."""
    mono, version_1 = header[3] >> 6 == 3, header[1] & 0x08
    side = (17 if mono else 32) if version_1 else (9 if mono else 17)
    table = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    for kbit in range(1, 15):
        head = bytes([0xFF, header[1] | 1, kbit << 4 | header[2] & 0x0C, header[3] & 0xC0])  # without a CRC
        found = mpeg_frame(head)
        if found and header[1] >> 1 & 3 == 1 and found[0] >= 4 + side + len(table):
            return (head + bytes(side) + table).ljust(found[0], b"\0")
    return b""


def _mp3_tables(data: mmap.mmap, at: int, size: int) -> dict[int, int]:
    """Return the offset of each frame that contains a length table, and the number of frames in it.

    The number is 0 if libmpg123 does not read it.
    """
    tables = {}
    for found in _TABLE.finditer(data, at):
        offset = found.end() - 4
        for distance in (36, 21, 13):  # after the frame's header and side information
            begin = offset - distance
            if begin < at or not (frame := mpeg_frame(data[begin : begin + 4])):
                continue
            following = begin + frame[0]
            if following >= size or mpeg_frame(data[following : following + 4]):
                counted = found[1] != b"VBRI" and offset + 12 <= size and data[offset + 7] & 1
                tables[begin] = int.from_bytes(data[offset + 8 : offset + 12], "big") if counted else 0
                break
    return tables


def _resync(data: mmap.mmap, at: int, size: int) -> int | None:
    """Return the offset of the next frame that is followed by another one of its format; None if there is none."""
    for found in _SYNC.finditer(data, at, min(size, at + _RESYNC)):
        if _count_frames(data, found.start(), 2) == 2:
            return found.start()
    return None


def _count_frames(data: mmap.mmap, at: int, limit: int = _MIN_FRAMES) -> int:
    """Return the number of consecutive frames of one format from `at` on, up to `limit`."""
    count, key = 0, None
    while count < limit and (frame := mpeg_frame(data[at : at + 4])) and key in (None, frame[1]):
        count, key, at = count + 1, frame[1], at + frame[0]
    return count
