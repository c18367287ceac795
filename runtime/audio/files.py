"""Audio files in any container, decoded to float32 in blocks of bounded size.

libsndfile decodes WAV, FLAC, Ogg, MP3 and similar formats; PyAV (the `av` extra) decodes the rest.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Protocol, cast

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from nemostream.errors import AudioError, TruncatedAudioError
from nemostream.runtime.audio.parts import AudioPart, find_parts

Floats = NDArray[np.float32]

# Supported sample rates in Hz. Others are mistakes (kHz instead of Hz, a sample count), for which soxr would allocate
# huge buffers.
RATES = range(4_000, 768_001)
MAX_CHANNELS = 64  # more channels indicate a transposed array
BLOCK = 1 << 16  # samples per channel processed at a time; bounds the extra memory for a huge array or file
# Floats beyond +-1 come from a recording that clips; beyond this value they are integers that were not scaled.
MAX_PEAK = 32.0
TOLERANCE = 0.02  # seconds of audio that may be missing from a WAV file
_NO_MPEG = 7  # libsndfile's code if libmpg123 finds no frame; its text is "File does not exist ..."
_SNDFILE = {"WAV", "FLAC", "MP3", "Ogg", "AIFF", "AU", "CAF", "W64", "VOC", "SPHERE"}
_SHORTENED = re.compile(r"^\s*(?:SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_SIZE = 0x7FFFF000  # programs that write to a pipe do not know the size and state this or more


class Reader(Protocol):
    """Decoder of one stream of a file. Its errors name the file."""

    sample_rate: int  # Hz
    channels: int
    frames: int  # samples per channel according to the header; 0 if unknown

    def read(self) -> Floats:
        """Return about `BLOCK` samples as [n, channels]; n is 0 at the end. Raises `AudioError` for damaged data."""

    def check(self, read: int) -> None:
        """Raise `AudioError` if the stream should have more than the `read` samples per channel."""

    def close(self) -> None: ...


def find_implausible(block: NDArray[np.floating]) -> tuple[str, str] | None:
    """Return the fault of floats that cannot be audio in [-1, 1], and its remedy; None if there is no fault."""
    if not block.size:
        return None
    low, high = float(block.min()), float(block.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        return "NaN or infinity", ""
    peak = max(-low, high)
    if peak <= MAX_PEAK:
        return None
    scale = "int16 scale: divide by 32768" if peak <= 1 << 16 else "scale of larger integers: divide by 2**23 or 2**31"
    return f"the value {peak:.6g}", f" (floats must be in [-1, 1]; these seem to be on the {scale})"


def truncated(name: str, missing: float, seconds: float) -> TruncatedAudioError:
    """Return the error for a WAV file that contains `seconds` of audio and lacks `missing` more."""
    return TruncatedAudioError(
        f"{name} is cut short: {missing:.2f} s of the {seconds + missing:.2f} s stated in its header are missing; "
        "the audio before was processed."
    )


class AudioFile:
    """An audio file, read in blocks of bounded size. A context manager.

    A file of several consecutive streams (chained Ogg, concatenated MP3 or FLAC files) is read to its end; later
    streams are converted to the sample rate and channel count of the first. `channel` (from 1) selects a single
    channel. A file that is not a regular file, or an open binary file without a descriptor, is first copied to an
    anonymous temporary file.

    Raises `AudioError` if the file is missing, unreadable, not audio, lacks the channel, is cut short, is empty, or
    contains NaN or values on an integer scale; the last four may be raised only while reading. A WAV file that is cut
    short raises `TruncatedAudioError` after all available blocks. Errors refer to the file by `name` (default: its
    path).
    """

    def __init__(
        self, path: str | os.PathLike[str] | BinaryIO, name: str | None = None, channel: int | None = None
    ) -> None:
        self._reader: Reader | None = None
        self._channel = channel
        self._mixed_energy = self._channel_energy = 0.0
        self._bytes: BinaryIO | None = None
        if isinstance(path, str | os.PathLike):
            self.path: Path | None = Path(path)
            self._name = name or str(path)
            file = _open_path(self.path, self._name)
        else:
            self.path, self._name, file = None, name or "the audio", path
        try:
            self._bytes = _make_seekable(file, self._name)
            if self._bytes is not file:
                self.path = None
            try:
                self._parts = find_parts(self._bytes)
            except AudioError as error:
                raise AudioError(f"{self._name} cannot be read as audio: {error}") from error
            self._reader = self._open(self._parts[0])
            self.sample_rate, self._channels = self._reader.sample_rate, self._reader.channels
            if channel is not None and not 1 <= channel <= self._channels:
                raise AudioError(f"{self._name} has {self._channels} channel(s); there is no channel {channel}.")
            self.channels = self._channels if channel is None else 1
            self.duration = self._reader.frames / self.sample_rate  # seconds according to the headers; 0 if unknown
            for part in self._parts[1:]:
                reader = self._open(part)
                self.duration += reader.frames / reader.sample_rate
                reader.close()
        except BaseException:
            self.close()
            raise

    @property
    def cancels(self) -> bool:
        """Whether the channels read so far cancel out when mixed to mono, as channels in opposite phase do.

        The mix of C unrelated channels has 1/C of their mean energy. The criterion is less than a tenth of that.
        """
        audible = self._channel_energy > 1e-12
        return audible and self._mixed_energy * self.channels < 0.1 * self._channel_energy

    def __fspath__(self) -> str:
        return str(self.path or self._name)

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Later calls have no effect."""
        if self._reader:
            self._reader.close()
        if self._bytes:
            self._bytes.close()

    def blocks(self) -> Generator[Floats]:
        """Yield the audio as [n, channels], n > 0."""
        assert self._reader is not None
        seconds = 0.0
        for index, part in enumerate(self._parts):
            if index:
                self._reader.close()
                self._reader = self._open(part)
            reader = self._reader
            blocks = self._read_checked(reader, seconds)
            if (reader.sample_rate, reader.channels) != (self.sample_rate, self._channels):
                blocks = _convert(blocks, reader.sample_rate, self.sample_rate, self._channels)
            for block in blocks:
                if self._channel is not None:
                    block = block[:, self._channel - 1 : self._channel]
                elif self.channels > 1:
                    mixed = block.mean(axis=1)
                    self._mixed_energy += float(mixed @ mixed)
                    self._channel_energy += float(np.vdot(block, block)) / self.channels
                seconds += len(block) / self.sample_rate
                yield block
        if not seconds:
            raise AudioError(f"{self._name} contains no audio.")
        if (missing := self._parts[-1].missing) > TOLERANCE:
            raise truncated(self._name, missing, seconds)

    def _read_checked(self, reader: Reader, offset: float) -> Iterator[Floats]:
        """Yield the blocks of a stream that begins at `offset` seconds. Raises `AudioError` for invalid samples."""
        read = 0
        while len(block := reader.read()):
            if fault := find_implausible(block):
                what, remedy = fault
                seconds = offset + read / reader.sample_rate
                raise AudioError(f"{self._name} contains {what} near {seconds:.2f} s{remedy}.")
            read += len(block)
            yield block
        reader.check(read)

    def _open(self, part: AudioPart) -> Reader:
        assert self._bytes is not None
        section = cast(BinaryIO, _Section(self._bytes, part))
        whole = len(self._parts) == 1 and not part.patches and not part.prefix and self.path is not None
        reader: Reader | None = None
        reason = ""  # why libsndfile cannot read it
        if part.container in _SNDFILE or part.container is None:
            try:
                reader = _Sndfile(self.path if whole and self.path else section, part, self._name)
            except TypeError as error:  # soundfile treats .raw as headerless audio and requires its sample rate
                raise AudioError(f"{self._name} has no header; send raw 16-bit PCM through a pipe instead.") from error
            except (soundfile.LibsndfileError, OSError) as error:
                reason = str(getattr(error, "error_string", error))  # without the path that soundfile prepends
                if getattr(error, "code", None) == _NO_MPEG:
                    reason = "No MPEG frame found."
        if reader is None:
            reader = self._open_with_av(section, part, reason)
        rate = reader.sample_rate
        if rate not in RATES:
            reader.close()
            raise AudioError(
                f"{self._name} has a sample rate of {rate} Hz; it must be from {RATES[0]} to {RATES[-1]} Hz."
            )
        return reader

    def _open_with_av(self, section: BinaryIO, part: AudioPart, reason: str) -> Reader:
        from nemostream.runtime.audio.libav import AvReader, UnsupportedFormat  # an optional dependency

        try:
            return AvReader(section, self._name)
        except ImportError as error:
            if part.container is None or part.container in _SNDFILE:
                problem = f"cannot be read as audio (damaged, not audio, or a format that needs PyAV): {reason} "
            else:
                problem = f"is a {part.container} file, which needs PyAV. "
            raise AudioError(
                f"{self._name} {problem}Install the `av` extra (pip install av), or convert the file: "
                "ffmpeg -i RECORDING talk.flac."
            ) from error
        except UnsupportedFormat as error:
            raise AudioError(
                f"{self._name} cannot be read as audio (damaged, or not audio): {reason or error}"
            ) from error


def _convert(blocks: Iterable[Floats], rate: int, target_rate: int, channels: int) -> Iterator[Floats]:
    """Resample to `target_rate` (Hz), mix down to mono, and copy it to every channel; the consumer mixes down again."""
    resampler = None
    if rate != target_rate:
        resampler = soxr.ResampleStream(rate, target_rate, 1, dtype="float32", quality="HQ")
    for block in itertools.chain(blocks, [None]):
        mono = np.zeros(0, np.float32) if block is None else block.mean(axis=1, dtype=np.float32)
        if resampler:
            mono = resampler.resample_chunk(mono, last=block is None)
        if len(mono):
            yield np.repeat(mono[:, None], channels, axis=1)


class _Section(io.RawIOBase):
    """The bytes of a part, as a read-only file object."""

    def __init__(self, file: BinaryIO, part: AudioPart) -> None:
        self._file, self._part, self._position = file, part, 0
        self._shift = part.start - len(part.prefix)  # add to a position to get an offset in the file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._part.end - self._shift}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._part.prefix[self._position : self._position + len(view)]
        if not data:
            start = self._position + self._shift
            self._file.seek(start)
            data = self._apply_patches(start, self._file.read(max(0, min(len(view), self._part.end - start))))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _apply_patches(self, start: int, data: bytes) -> bytes:
        """Return `data`, read at the file offset `start`, with the part's patches applied."""
        for offset, patch in self._part.patches.items():
            begin, end = max(offset, start), min(offset + len(patch), start + len(data))
            if begin < end:
                data = data[: begin - start] + patch[begin - offset : end - offset] + data[end - start :]
        return data


class _Sndfile:
    """A stream decoded by libsndfile."""

    def __init__(self, file: Path | BinaryIO, part: AudioPart, name: str) -> None:
        if isinstance(file, Path):  # as bytes on POSIX, where a file name need not be valid text
            self._file = soundfile.SoundFile(str(file) if os.name == "nt" else os.fsencode(file))
        else:
            self._file = soundfile.SoundFile(file)
        self._part, self._name = part, name
        self.sample_rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.frames: int = self._file.frames
        self._log: str = self._file.extra_info
        self._read = 0
        try:
            self._check_header()
        except AudioError:
            self._file.close()
            raise

    def read(self) -> Floats:
        try:
            block: Floats = self._file.read(BLOCK, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            seconds = self._read / self.sample_rate
            raise AudioError(f"{self._name} is damaged or cut short after {seconds:.2f} s; copy it again.") from error
        self._read += len(block)
        return block

    def check(self, read: int) -> None:
        if read < self.frames and self._part.length_known:
            self._raise_cut_short(self.frames / self.sample_rate, read / self.sample_rate)
        # Ogg states no length. A stream without an end-of-stream mark is cut short if it stops within a page, and a
        # recorded live stream otherwise. libsndfile logs this when opening (Vorbis) or reading (Opus), and keeps only
        # the latest lines.
        log = self._log + self._file.extra_info
        if "Junk after the last page" in log and "end-of-stream" in log.lower():
            self._raise_cut_short(0.0, read / self.sample_rate)

    def close(self) -> None:
        self._file.close()

    def _check_header(self) -> None:
        """Raise `AudioError` if the file is shorter than its header states."""
        # libsndfile corrects `frames` by the size of the file and only logs the difference.
        for stated, actual in _SHORTENED.findall(self._log):
            if int(actual) < int(stated) < _UNKNOWN_SIZE and self._part.container != "WAV":
                seconds = self.frames / self.sample_rate
                self._raise_cut_short(seconds * int(stated) / max(int(actual), 1), seconds)

    def _raise_cut_short(self, stated: float, found: float) -> NoReturn:
        total = f"of the {stated:.2f} s stated in its header" if stated else "of a longer recording"
        raise AudioError(f"{self._name} is cut short: it contains {found:.2f} s {total}; copy it again.")


def _open_path(path: Path, name: str) -> BinaryIO:
    """Open a file or a pipe. Raises `AudioError`."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{name} is a folder, not an audio file.")
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise AudioError(f"{name} is a device or a socket; use an audio file or a pipe.")
        return open(os.fsencode(path), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioError(f"{name} does not exist.") from error
    except (OSError, ValueError) as error:  # a path that the system does not support raises ValueError
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _make_seekable(file: BinaryIO, name: str) -> BinaryIO:
    """Return the file if it is a regular file, else a temporary file with its content. Raises `AudioError` if empty."""
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
    except OSError:  # no descriptor
        pass
    copy: BinaryIO = tempfile.TemporaryFile(prefix="nemostream-")  # noqa: SIM115 (the `AudioFile` closes it)
    shutil.copyfileobj(file, copy)
    file.close()
    if not copy.tell():
        copy.close()
        raise AudioError(f"{name} is a pipe that was closed without any data.")
    return copy
