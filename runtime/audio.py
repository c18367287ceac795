"""From what a caller has (array, file, pipe) to what a stream wants: mono float32 at the model's rate.

What the module does not know: chunks, streams, the model. N counts samples of one channel.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import AsyncIterable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from nemostream.errors import AudioError, OptionError
from nemostream.runtime.spool import Readable, is_file_content, spooled

Floats = NDArray[np.float32]
Content = bytes | bytearray | memoryview | Readable  # of an audio file
Source = str | Path | os.PathLike[str] | NDArray[Any] | Content | Iterable[NDArray[Any]] | AsyncIterable[NDArray[Any]]

# Beyond these a rate is a mistake (kHz for Hz, samples for a rate), and soxr would make huge buffers of it.
RATES = range(4_000, 768_001)
_SHORT = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE)
CHANNELS = 64  # more is an array on its side
BLOCK = 1 << 16  # samples of one channel handled at a time; bounds what a huge array or file costs beside itself


class Intake:
    """One stream's audio on its way in: checked, scaled, mixed down and resampled.

    The output is the same however the input is cut into pushes. Raises `OptionError` for a rate or a number of channels
    that cannot be.
    """

    def __init__(self, sample_rate: int, channels: int, model_rate: int) -> None:
        if not RATES.start <= sample_rate < RATES.stop or sample_rate != int(sample_rate):
            raise OptionError(f"sample_rate is {sample_rate}; it must be whole Hz from {RATES[0]} to {RATES[-1]}.")
        if not 1 <= channels <= CHANNELS:
            raise OptionError(f"channels is {channels}, not 1 to {CHANNELS}; arrays are [samples, channels].")
        self.sample_rate, self.channels = int(sample_rate), channels
        self.received = 0  # samples of one channel, at the input's rate
        self._resampler = None
        if self.sample_rate != model_rate:
            self._resampler = soxr.ResampleStream(self.sample_rate, model_rate, 1, dtype="float32", quality="HQ")

    @property
    def seconds(self) -> float:
        """Audio received so far."""
        return self.received / self.sample_rate

    def push(self, pcm: NDArray[np.generic]) -> Iterator[Floats]:
        """Take in [N] or [N, channels] of int16, int32 (full scale) or float (in [-1, 1]); yield mono blocks.

        All of `pcm` is checked before the first sample is taken: after an `AudioError` the stream is as it was. A block
        may share memory with `pcm`.
        """
        self.check(pcm)
        self.received += len(pcm)
        return self._blocks(pcm)

    def finish(self) -> Floats:
        """What the resampler still holds back."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        return self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)

    def cut(self) -> Floats:
        """As `finish`; what is pushed then is resampled as another recording."""
        rest = self.finish()
        if self._resampler is not None:
            self._resampler.clear()
        return rest

    def check(self, pcm: NDArray[np.generic]) -> None:
        """Raise `AudioError` if `pcm` is not audio that this stream takes."""
        if not isinstance(pcm, np.ndarray):
            raise AudioError(
                f"audio must be a numpy array, not {type(pcm).__name__}; wrap raw 16-bit PCM with "
                "np.frombuffer(data, np.int16)."
            )
        if not (pcm.dtype.kind == "f" or (pcm.dtype.kind == "i" and pcm.dtype.itemsize in (2, 4))):
            raise AudioError(f"audio must be int16, int32 or float, not {pcm.dtype}; convert it, floats in [-1, 1].")
        channels = pcm.shape[1] if pcm.ndim == 2 else 1
        if pcm.ndim not in (1, 2) or channels != self.channels:
            raise AudioError(
                f"audio of shape {list(pcm.shape)} came to a stream of {self.channels} channel(s); "
                f"push [samples{', ' + str(self.channels) if self.channels > 1 else ''}] or open it with channels=..."
            )
        if pcm.dtype.kind == "f":
            for start in range(0, len(pcm), BLOCK):
                # Checked as float32: what overflows it is as useless as inf.
                finite = np.isfinite(_float32(pcm[start : start + BLOCK]))
                if not finite.all():
                    where = start + int(np.argmin(finite if finite.ndim == 1 else finite.all(axis=1)))
                    raise AudioError(f"audio has NaN or infinity at sample {where} of this push; none of it was taken.")

    def _blocks(self, frames: NDArray[np.generic]) -> Iterator[Floats]:
        for start in range(0, len(frames), BLOCK):
            block = _float32(frames[start : start + BLOCK])
            if block.ndim == 2:
                block = block.mean(axis=1, dtype=np.float32)
            if self._resampler is not None:
                block = self._resampler.resample_chunk(np.ascontiguousarray(block))
            yield block


def _float32(pcm: NDArray[np.generic]) -> Floats:
    with np.errstate(over="ignore"):
        samples = pcm.astype(np.float32, copy=False)
    if pcm.dtype.kind == "i":
        samples *= np.float32(2.0 ** (1 - 8 * pcm.dtype.itemsize))  # a fresh array: the conversion made it
    return samples


class Recording:
    """An audio file, read in blocks of bounded size. A context manager.

    `channel`, from 1, reads only that one of several. A pipe (a FIFO, /dev/stdin, <(...)) is copied to a temporary file
    first, to its end, because containers are read at more than one place. Raises `AudioError` if the file is missing,
    may not be read, is not audio, cut short, empty, lacks the channel or holds NaN; some of it may show only while
    reading. The error names the file: as `name`, where its path is not what the user knows it by.
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None, channel: int | None = None) -> None:
        self._name = name or str(path)
        self._copy = _copy_of_pipe(path, self._name)
        self.path = Path(self._copy.name if self._copy else path)
        self._channel = channel
        self._mixed_energy = self._channel_energy = 0.0
        try:
            self._open()
        except BaseException:
            self._delete_copy()
            raise

    def _open(self) -> None:
        try:
            # As bytes where paths are bytes: a name need not be text.
            self._file = soundfile.SoundFile(str(self.path) if os.name == "nt" else os.fsencode(self.path))
        except TypeError as error:  # soundfile takes .raw for headerless audio and asks for its rate
            raise AudioError(f"{self._name} has no header; feed raw 16-bit PCM through a pipe instead.") from error
        except (soundfile.LibsndfileError, OSError) as error:
            raise AudioError(
                f"{self._name} cannot be read as audio (damaged, not audio at all, or neither WAV, FLAC, Ogg nor MP3, "
                f"which ffmpeg -i RECORDING talk.flac would mend): {_why(error)}"
            ) from error
        self.sample_rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        if self._channel is not None:
            if not 1 <= self._channel <= self.channels:
                count = self.channels
                self._file.close()
                raise AudioError(f"{self._name} has {count} channel(s); there is no channel {self._channel}.")
            self.channels = 1
        self._promised: int = self._file.frames
        self._log: str = self._file.extra_info
        try:
            self._check_header()
        except AudioError:
            self._file.close()
            raise

    @property
    def duration(self) -> float:
        """Seconds the header promises."""
        return self._promised / self.sample_rate

    @property
    def cancels(self) -> bool:
        """Whether the channels read so far cancel out when they are mixed to one, as those in opposite phase do.

        The mix of C unrelated channels has 1/C of their mean energy; this is less than a tenth of that.
        """
        audible = self._channel_energy > 1e-12
        return audible and self._mixed_energy * self.channels < 0.1 * self._channel_energy

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._delete_copy()

    def _delete_copy(self) -> None:
        if self._copy is not None:
            self._copy.close()

    def blocks(self) -> Generator[Floats]:
        """Yield all of it as [n, channels], n > 0."""
        read = 0
        while True:
            try:
                block = self._file.read(BLOCK, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                where = f"{read / self.sample_rate:.2f} s"
                raise AudioError(f"{self._name} is damaged or cut short after {where}; copy it again.") from error
            if not len(block):
                break
            if self._channel is not None:
                block = block[:, self._channel - 1 : self._channel]
            if not np.isfinite(block).all():
                raise AudioError(f"{self._name} holds NaN or infinity near {read / self.sample_rate:.2f} s.")
            if self.channels > 1:
                mixed = block.mean(axis=1)
                self._mixed_energy += float(mixed @ mixed)
                self._channel_energy += float(np.vdot(block, block)) / self.channels
            read += len(block)
            yield block
        if read < self._promised and not (self._file.format == "MP3" and not _mp3_knows_its_length(self.path)):
            self._cut_short(self._promised / self.sample_rate, read / self.sample_rate)
        # Ogg promises no length: without its end-of-stream mark it is cut if it stops within a page, and a live rip if
        # not. libsndfile says this at opening (Vorbis) or while reading (Opus), and keeps only the newer lines.
        log = self._log + self._file.extra_info
        if "Junk after the last page" in log and "end-of-stream" in log.lower():
            self._cut_short(0.0, read / self.sample_rate)
        if not read:
            raise AudioError(f"{self._name} holds no audio.")

    def _check_header(self) -> None:
        if self.sample_rate not in RATES:
            raise AudioError(f"{self._name} has a sample rate of {self.sample_rate} Hz; {RATES[0]} is the least.")
        # Where the file's size shows that audio is missing, libsndfile corrects `frames` and says so in its log only.
        for claimed, found in _SHORT.findall(self._log):
            # Writers into a pipe cannot know the size and claim the most there is (sox, ffmpeg): no promise.
            if int(found) < int(claimed) < 0x7FFFF000:
                self._cut_short(self.duration * int(claimed) / max(int(found), 1), self.duration)

    def _cut_short(self, promised: float, found: float) -> None:
        claim = f"of the {promised:.2f} s its header promises" if promised else "of a longer recording"
        raise AudioError(f"{self._name} is cut short: {found:.2f} s {claim} are there; copy it again.")


def _copy_of_pipe(path: str | os.PathLike[str], name: str) -> tempfile._TemporaryFileWrapper[bytes] | None:
    """A temporary file with all that comes through a pipe; None for a file. Raises `AudioError`."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{name} is a folder, not an audio file.")
        if stat.S_ISREG(mode):
            with open(path, "rb"):  # libsndfile does not tell why it cannot
                return None
        if not stat.S_ISFIFO(mode):
            raise AudioError(f"{name} is a device or a socket; give an audio file or a pipe.")
        with open(path, "rb") as pipe, contextlib.ExitStack() as stack:
            copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="nemostream-"))
            shutil.copyfileobj(pipe, copy)
            copy.flush()
            if not copy.tell():
                raise AudioError(f"{name} is a pipe that nothing came through.")
            stack.pop_all()  # the caller's now
        return copy
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AudioError(f"{name} does not exist.") from error
    except (OSError, ValueError) as error:  # a name that the system cannot take is a ValueError
        if isinstance(error, AudioError):
            raise
        raise AudioError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _mp3_knows_its_length(path: Path) -> bool:
    """Whether an MP3 carries the frame count (a Xing or Info tag); without, its length is an estimate."""
    with path.open("rb") as file:
        head = file.read(10)
        tag = 0
        if head[:3] == b"ID3":
            tag = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        file.seek(tag)
        frame = file.read(200)
    return b"Xing" in frame or b"Info" in frame


@dataclass(frozen=True)
class Sound:
    """A source that was opened."""

    sample_rate: int
    channels: int
    blocks: Iterable[NDArray[Any]]
    duration: float = 0.0  # seconds, as far as is known


@contextmanager
def opened(source: Source, sample_rate: int, channels: int) -> Iterator[Sound]:
    """What a source gives; `sample_rate` and `channels` are those of one that does not know its own."""
    if isinstance(source, np.ndarray):
        if not source.size:
            raise AudioError("the audio is empty.")
        channels = source.shape[1] if source.ndim == 2 else 1
        blocks = (source[start : start + BLOCK] for start in range(0, len(source), BLOCK))
        yield Sound(sample_rate, channels, blocks, len(source) / max(sample_rate, 1))
    elif isinstance(source, Recording):  # the caller's
        yield Sound(source.sample_rate, source.channels, source.blocks(), source.duration)
    elif isinstance(source, str | os.PathLike):
        with Recording(source) as file:
            yield Sound(file.sample_rate, file.channels, file.blocks(), file.duration)
    elif isinstance(source, bytes | bytearray | memoryview) or is_file_content(source):
        with spooled(source) as (path, name), Recording(path, name) as file:
            yield Sound(file.sample_rate, file.channels, file.blocks(), file.duration)
    elif isinstance(source, Iterable):
        yield Sound(sample_rate, channels, source)
    elif isinstance(source, AsyncIterable):
        raise AudioError("an asynchronous source needs `async for`.")
    else:
        raise AudioError(f"a source is a path, a numpy array, or gives arrays; {type(source).__name__} is none.")


def read_pcm16(stream: BinaryIO, channels: int = 1) -> Iterator[NDArray[np.int16]]:
    """Yield [n, channels] of raw little-endian 16-bit PCM as it arrives on a binary stream (`sys.stdin.buffer`).

    Raises `AudioError` if it is empty or ends in the middle of a sample.
    """
    width = 2 * channels
    read = getattr(stream, "read1", stream.read)  # what is there now, instead of waiting for a full block
    rest, empty = b"", True
    while data := read(BLOCK * 2):
        data = rest + data
        whole = len(data) - len(data) % width
        rest = data[whole:]
        if whole:
            empty = False
            yield np.frombuffer(data[:whole], "<i2").astype(np.int16, copy=False).reshape(-1, channels)
    if rest:
        raise AudioError(
            f"raw PCM ended in the middle of a sample: {len(rest)} byte(s) left over, {width} make one; "
            f"is it 16-bit with {channels} channel(s)?"
        )
    if empty:
        raise AudioError("no raw PCM came: the stream is empty.")


def _why(error: Exception) -> str:
    """libsndfile's own words, without the path that soundfile puts before them."""
    return str(getattr(error, "error_string", error))
