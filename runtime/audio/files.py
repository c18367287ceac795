"""Audio files: every container, decoded to float32 in blocks of bounded size.

libsndfile decodes WAV, FLAC, Ogg, MP3 and their like, PyAV (the extra `av`) the rest.
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
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from nemostream.errors import AudioError, TruncatedAudioError
from nemostream.runtime.audio.parts import AudioPart, find_parts

Floats = NDArray[np.float32]

# Beyond these a rate is a mistake (kHz for Hz, samples for a rate), and soxr would make huge buffers of it.
RATES = range(4_000, 768_001)
CHANNELS = 64  # more is an array on its side
BLOCK = 1 << 16  # samples of one channel handled at a time; bounds what a huge array or file costs beside itself
# Floats beyond +-1 are a recording that clips; beyond this they are integers that were never divided.
LOUDEST = 32.0
TOLERATED = 0.02  # seconds that a WAV header may promise too much
_SNDFILE = {"WAV", "FLAC", "MP3", "Ogg", "AIFF", "AU", "CAF", "W64", "VOC", "SPHERE"}
_SHORT = re.compile(r"^\s*(?:SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
_LARGEST_CLAIM = 0x7FFFF000  # of writers into a pipe, who cannot know the size


class Reader(Protocol):
    """A decoder of one stream of a file. Its errors name the file."""

    sample_rate: int
    channels: int
    frames: int  # that the header promises; 0 if it does not

    def read(self) -> Floats:
        """Return about `BLOCK` samples as [n, channels], none at the end. Raises `AudioError` for damaged ones."""

    def check(self, read: int) -> None:
        """Raise `AudioError` if the stream should have had more than `read` samples."""

    def close(self) -> None: ...


def implausible(block: NDArray[np.floating]) -> tuple[str, str] | None:
    """What is wrong with floats that cannot be audio in [-1, 1], and what to do; None if nothing is."""
    if not block.size:
        return None
    low, high = float(block.min()), float(block.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        return "NaN or infinity", ""
    peak = max(-low, high)
    if peak <= LOUDEST:
        return None
    scale = "int16 scale: divide by 32768" if peak <= 1 << 16 else "scale of larger integers: divide by 2**23 or 2**31"
    return f"the value {peak:.6g}", f" (floats must be in [-1, 1]; these seem to be on the {scale})"


def truncated(name: str, missing: float, seconds: float) -> TruncatedAudioError:
    """The error for a WAV file that has `seconds` and should have `missing` more."""
    return TruncatedAudioError(
        f"{name} is cut short: {missing:.2f} s of the {seconds + missing:.2f} s its header promises are missing; "
        "what is there was processed."
    )


class AudioFile:
    """An audio file, read in blocks of bounded size. A context manager.

    A file of several streams one after the other (chained Ogg, joined MP3 or FLAC files) is read to its end; later
    streams take the rate and the channels of the first one. `channel`, from 1, reads only that one of several. A file
    that is no regular one is read into an anonymous temporary file first, and so is an open binary file without a
    descriptor.

    Raises `AudioError` if it is missing, may not be read, is not audio, lacks the channel, is cut short, empty, or
    holds NaN or values on the scale of integers; the last four may show only while reading. A WAV file that is cut
    short raises `TruncatedAudioError`, and only after all blocks that are there. The error names the file: as `name`,
    where its path is not what the user knows it by.
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
            opened = _opened(self.path, self._name)
        else:
            self.path, self._name, opened = None, name or "the audio", path
        try:
            self._bytes = _seekable(opened, self._name)
            if self._bytes is not opened:
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
            self.duration = self._reader.frames / self.sample_rate  # seconds that the headers promise, 0 if they do not
            for part in self._parts[1:]:
                reader = self._open(part)
                self.duration += reader.frames / reader.sample_rate
                reader.close()
        except BaseException:
            self.close()
            raise

    @property
    def cancels(self) -> bool:
        """Whether the channels read so far cancel out when they are mixed to one, as those in opposite phase do.

        The mix of C unrelated channels has 1/C of their mean energy; this is less than a tenth of that.
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
        """Close the file. Does nothing the second time."""
        if self._reader:
            self._reader.close()
        if self._bytes:
            self._bytes.close()

    def blocks(self) -> Generator[Floats]:
        """Yield all of it as [n, channels], n > 0."""
        assert self._reader is not None
        seconds = 0.0
        for index, part in enumerate(self._parts):
            if index:
                self._reader.close()
                self._reader = self._open(part)
            reader = self._reader
            blocks = self._checked(reader, seconds)
            if (reader.sample_rate, reader.channels) != (self.sample_rate, self._channels):
                blocks = _converted(blocks, reader.sample_rate, self.sample_rate, self._channels)
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
            raise AudioError(f"{self._name} holds no audio.")
        if (missing := self._parts[-1].missing) > TOLERATED:
            raise truncated(self._name, missing, seconds)

    def _checked(self, reader: Reader, before: float) -> Iterator[Floats]:
        read = 0
        while len(block := reader.read()):
            if fault := implausible(block):
                what, remedy = fault
                where = before + read / reader.sample_rate
                raise AudioError(f"{self._name} holds {what} near {where:.2f} s{remedy}.")
            read += len(block)
            yield block
        reader.check(read)

    def _open(self, part: AudioPart) -> Reader:
        assert self._bytes is not None
        section = cast(BinaryIO, _Section(self._bytes, part))
        whole = len(self._parts) == 1 and not part.patches and not part.prefix and self.path is not None
        reader: Reader | None = None
        why = ""
        if part.container in _SNDFILE or part.container is None:
            try:
                reader = _Sndfile(self.path if whole and self.path else section, part, self._name)
            except TypeError as error:  # soundfile takes .raw for headerless audio and asks for its rate
                raise AudioError(f"{self._name} has no header; feed raw 16-bit PCM through a pipe instead.") from error
            except (soundfile.LibsndfileError, OSError) as error:
                why = str(getattr(error, "error_string", error))  # without the path that soundfile puts before it
        if reader is None:
            reader = self._open_with_av(section, part, why)
        rate = reader.sample_rate
        if rate not in RATES:
            reader.close()
            raise AudioError(
                f"{self._name} has a sample rate of {rate} Hz; it must be from {RATES[0]} to {RATES[-1]} Hz."
            )
        return reader

    def _open_with_av(self, section: BinaryIO, part: AudioPart, why: str) -> Reader:
        from nemostream.runtime.audio.libav import AvReader, Unreadable  # needs an extra

        try:
            return AvReader(section, self._name)
        except ImportError as error:
            if part.container is None or part.container in _SNDFILE:
                missing = f"cannot be read as audio (damaged, not audio at all, or of a kind that needs PyAV): {why} "
            else:
                missing = f"is a file of the kind {part.container}, which needs PyAV. "
            raise AudioError(
                f"{self._name} {missing}Install the extra `av` (pip install av), or convert it: "
                "ffmpeg -i RECORDING talk.flac."
            ) from error
        except Unreadable as error:
            raise AudioError(
                f"{self._name} cannot be read as audio (damaged, or not audio at all): {why or error}"
            ) from error


def _converted(blocks: Iterable[Floats], rate: int, wanted: int, channels: int) -> Iterator[Floats]:
    """Samples at another rate, mixed down and given to every channel: a stream of them is mixed down all the same."""
    resampler = soxr.ResampleStream(rate, wanted, 1, dtype="float32", quality="HQ") if rate != wanted else None
    for block in itertools.chain(blocks, [None]):
        mono = np.zeros(0, np.float32) if block is None else block.mean(axis=1, dtype=np.float32)
        if resampler:
            mono = resampler.resample_chunk(mono, last=block is None)
        if len(mono):
            yield np.repeat(mono[:, None], channels, axis=1)


class _Section(io.RawIOBase):
    """The bytes of a part, as a file."""

    def __init__(self, file: BinaryIO, part: AudioPart) -> None:
        self._file, self._part, self._at = file, part, 0
        self._shift = part.start - len(part.prefix)  # from here to the file's offsets

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._part.end - self._shift}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._part.prefix[self._at : self._at + len(view)]
        if not data:
            at = self._at + self._shift
            self._file.seek(at)
            data = self._patched(at, self._file.read(max(0, min(len(view), self._part.end - at))))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _patched(self, at: int, data: bytes) -> bytes:
        for offset, patch in self._part.patches.items():
            begin, end = max(offset, at), min(offset + len(patch), at + len(data))
            if begin < end:
                data = data[: begin - at] + patch[begin - offset : end - offset] + data[end - at :]
        return data


class _Sndfile:
    """libsndfile's decoders."""

    def __init__(self, file: Path | BinaryIO, part: AudioPart, name: str) -> None:
        if isinstance(file, Path):  # as bytes where paths are bytes: a name need not be text
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
            where = f"{self._read / self.sample_rate:.2f} s"
            raise AudioError(f"{self._name} is damaged or cut short after {where}; copy it again.") from error
        self._read += len(block)
        return block

    def check(self, read: int) -> None:
        if read < self.frames and self._part.promise:
            self._cut_short(self.frames / self.sample_rate, read / self.sample_rate)
        # Ogg promises no length: without its end-of-stream mark it is cut if it stops within a page, and a live rip if
        # not. libsndfile logs this at opening (Vorbis) or while reading (Opus), and keeps only the newer lines.
        log = self._log + self._file.extra_info
        if "Junk after the last page" in log and "end-of-stream" in log.lower():
            self._cut_short(0.0, read / self.sample_rate)

    def close(self) -> None:
        self._file.close()

    def _check_header(self) -> None:
        # Where the file's size shows that audio is missing, libsndfile corrects `frames` and only logs it.
        for claimed, found in _SHORT.findall(self._log):
            # Writers into a pipe cannot know the size and claim the most there is (sox, ffmpeg): no promise.
            if int(found) < int(claimed) < _LARGEST_CLAIM and self._part.container != "WAV":
                there = self.frames / self.sample_rate
                self._cut_short(there * int(claimed) / max(int(found), 1), there)

    def _cut_short(self, promised: float, found: float) -> None:
        claim = f"of the {promised:.2f} s its header promises" if promised else "of a longer recording"
        raise AudioError(f"{self._name} is cut short: {found:.2f} s {claim} are there; copy it again.")


def _opened(path: Path, name: str) -> BinaryIO:
    """Open a file or a pipe. Raises `AudioError`."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{name} is a folder, not an audio file.")
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise AudioError(f"{name} is a device or a socket; give an audio file or a pipe.")
        return open(os.fsencode(path), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioError(f"{name} does not exist.") from error
    except (OSError, ValueError) as error:  # a name that the system cannot take is a ValueError
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _seekable(file: BinaryIO, name: str) -> BinaryIO:
    """The file itself if it is a regular one, else a temporary one with all that it gives."""
    try:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
    except OSError:  # it has no descriptor
        pass
    copy: BinaryIO = tempfile.TemporaryFile(prefix="nemostream-")  # noqa: SIM115 (the `AudioFile` closes it)
    shutil.copyfileobj(file, copy)
    file.close()
    if not copy.tell():
        copy.close()
        raise AudioError(f"{name} is a pipe that nothing came through.")
    return copy
