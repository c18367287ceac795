"""From what a caller has (array, file, pipe) to what a stream wants: mono float32 at the model's rate.

What the module does not know: chunks, streams, the model. N counts samples of one channel.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterable, Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import soxr
from numpy.typing import NDArray

from nemostream.errors import AudioError, OptionError, TruncatedAudioError
from nemostream.runtime.audio.containers import STREAMABLE, WavStream, container_of, undecided
from nemostream.runtime.audio.files import (
    BLOCK,
    CHANNELS,
    LOUDEST,
    RATES,
    TOLERATED,
    Floats,
    Recording,
    implausible,
    truncated,
)
from nemostream.runtime.audio.spool import Readable, is_file_content, spooled

Content = bytes | bytearray | memoryview | Readable  # of an audio file
Source = str | Path | os.PathLike[str] | NDArray[Any] | Content | Iterable[NDArray[Any]] | AsyncIterable[NDArray[Any]]

_TYPES = {"pcm_s16le": "<i2", "pcm_f32le": "<f4"}  # of WAV samples that need no decoder
_HEAD = 4096  # first samples of a stream that may be the bytes of a container


class AudioPreprocessor:
    """One stream's audio on its way in: checked, scaled, mixed down and resampled.

    The output is the same however the input is cut into pushes. Raises `OptionError` for a rate or a number of channels
    that cannot be.
    """

    def __init__(self, sample_rate: int, channels: int, model_rate: int) -> None:
        self.sample_rate = checked_rate(sample_rate)
        if not _is_number(channels) or not 1 <= channels <= CHANNELS or channels != int(channels):
            raise OptionError(f"channels is {channels!r}, not 1 to {CHANNELS}; arrays are [samples, channels].")
        self.channels = int(channels)
        self.received = 0  # samples of one channel, at the input's rate
        self._begin: dict[str, bytes] = {}  # first bytes, while they may be a container's
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
        if not self.received or self._begin:
            self._reject_container(pcm)
        self.received += len(pcm)
        return self._blocks(pcm)

    def finish(self) -> Floats:
        """What the resampler still holds back."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        return self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)

    def flush(self) -> Floats:
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
                block = _float32(pcm[start : start + BLOCK])
                if fault := implausible(block):
                    what, remedy = fault
                    wrong = ~(np.abs(block) <= LOUDEST if what.startswith("the value") else np.isfinite(block))
                    where = start + int(np.argmax(wrong if wrong.ndim == 1 else wrong.any(axis=1)))
                    raise AudioError(f"audio has {what} at sample {where} of this push{remedy}; none of it was taken.")

    def _reject_container(self, pcm: NDArray[np.generic]) -> None:
        """Raise `AudioError` if the stream's first samples are the bytes of a file."""
        first = pcm[:_HEAD]
        views = {"as they are": first.tobytes()}
        if first.dtype.kind == "f":  # int16 that became floats
            for scale in (32768, 32767):
                samples = np.rint(np.clip(_float32(first) * np.float32(scale), -32768, 32767))
                views[f"times {scale}"] = samples.astype("<i2").tobytes()
        begin = {way: (self._begin.get(way, b"") + data)[:_HEAD] for way, data in views.items()}
        if name := next(filter(None, map(container_of, begin.values())), None):
            raise AudioError(
                f"the audio is the bytes of a {name} file, not samples; give its path, or decode it first "
                "(soundfile.read, or ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -)."
            )
        self._begin = {way: data for way, data in begin.items() if undecided(data)}

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


def checked_rate(sample_rate: object) -> int:
    """Raise `OptionError` if this is no rate that a stream can have."""
    if not _is_number(sample_rate) or not RATES.start <= sample_rate < RATES.stop or sample_rate != int(sample_rate):
        raise OptionError(f"sample_rate is {sample_rate!r}; it must be whole Hz from {RATES[0]} to {RATES[-1]}.")
    return int(sample_rate)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class AudioSource:
    """A source that was opened."""

    sample_rate: int
    channels: int
    blocks: Iterable[NDArray[Any]]
    duration: float = 0.0  # seconds, as far as is known


@contextmanager
def opened(source: Source, sample_rate: int, channels: int) -> Iterator[AudioSource]:
    """What a source gives; `sample_rate` and `channels` are those of one that does not know its own.

    Leaving it raises `TruncatedAudioError` if all of a file was read and its header promises more.
    """
    if isinstance(source, np.ndarray):
        if not source.size:
            raise AudioError("the audio is empty.")
        if source.ndim not in (1, 2):
            raise AudioError(f"an array of shape {list(source.shape)} is no audio; it must be [N] or [N, channels].")
        rate = checked_rate(sample_rate)
        channels = source.shape[1] if source.ndim == 2 else 1
        blocks = (source[start : start + BLOCK] for start in range(0, len(source), BLOCK))
        yield AudioSource(rate, channels, blocks, len(source) / rate)
    elif isinstance(source, Recording):  # the caller's
        with truncation_last(source.blocks()) as there:
            yield AudioSource(source.sample_rate, source.channels, there, source.duration)
    elif isinstance(source, bytes | bytearray | memoryview) or is_file_content(source):
        with spooled(source) as (path, name), Recording(path, name) as file, truncation_last(file.blocks()) as there:
            yield AudioSource(file.sample_rate, file.channels, there, file.duration)
    elif isinstance(source, str | os.PathLike):
        with Recording(source) as file, truncation_last(file.blocks()) as there:
            yield AudioSource(file.sample_rate, file.channels, there, file.duration)
    elif isinstance(source, Iterable):
        yield AudioSource(sample_rate, channels, source)
    elif isinstance(source, AsyncIterable):
        raise AudioError("an asynchronous source needs `async for`.")
    else:
        raise AudioError(f"a source is a path, a numpy array, or gives arrays; {type(source).__name__} is none.")


@contextmanager
def piped(stream: BinaryIO, sample_rate: int, channels: int = 1) -> Iterator[AudioSource]:
    """What arrives on a binary stream (`sys.stdin.buffer`): raw 16-bit PCM at `sample_rate`, or a file.

    Raw PCM and simple WAV files are processed as they arrive; other files are first read to their end, into a temporary
    file without a name. Raises `AudioError` if it is empty or cannot be read; leaving it raises as `opened` does.
    """
    read = getattr(stream, "read1", stream.read)  # what is there now, instead of waiting for a full block
    begin = _beginning(read)
    container = container_of(begin)
    if container is None:
        yield AudioSource(sample_rate, channels, _pcm16(begin, read, channels))
        return
    if container == "WAV":
        wav, samples = WavStream(), b""
        with suppress(AudioError):  # a header that cannot be streamed: the file is read to its end
            data = begin
            while data and not wav.header:
                samples = wav.push(data)
                data = b"" if wav.header else read(BLOCK)
                begin += data
        if (header := wav.header) and header.order == "<" and STREAMABLE.get((header.tag, header.bits)) in _TYPES:
            with truncation_last(_wav_samples(wav, samples, read)) as blocks:
                yield AudioSource(header.sample_rate, header.channels, blocks)
            return
    with tempfile.TemporaryFile(prefix="nemostream-") as file:
        file.write(begin)
        while data := read(BLOCK):
            file.write(data)
        file.flush()
        with Recording(file, "standard input") as recording, truncation_last(recording.blocks()) as blocks:
            yield AudioSource(recording.sample_rate, recording.channels, blocks, recording.duration)


def read_pcm16(stream: BinaryIO, channels: int = 1) -> Iterator[NDArray[np.int16]]:
    """Yield [n, channels] of raw little-endian 16-bit PCM as it arrives on a binary stream.

    Raises `AudioError` if it is empty, ends in the middle of a sample or begins with a container (use `piped`).
    """
    read = getattr(stream, "read1", stream.read)
    begin = _beginning(read)
    if container := container_of(begin):
        raise AudioError(f"the stream is a {container} file, not raw 16-bit PCM; decode it first.")
    yield from _pcm16(begin, read, channels)


def _beginning(read: Callable[[int], bytes]) -> bytes:
    """As many bytes as it takes to see whether a container begins."""
    begin = b""
    while undecided(begin) and (data := read(2 * BLOCK)):
        begin += data
    return begin


def _pcm16(data: bytes, read: Callable[[int], bytes], channels: int) -> Iterator[NDArray[np.int16]]:
    """Yield the samples of `data` and of all that is read."""
    width = 2 * channels
    rest, empty = b"", True
    while data:
        data = rest + data
        whole = len(data) - len(data) % width
        rest = data[whole:]
        if whole:
            empty = False
            yield np.frombuffer(data[:whole], "<i2").astype(np.int16, copy=False).reshape(-1, channels)
        data = read(2 * BLOCK)
    if rest:
        raise AudioError(
            f"raw PCM ended in the middle of a sample: {len(rest)} byte(s) left over, {width} make one; "
            f"is it 16-bit with {channels} channel(s)?"
        )
    if empty:
        raise AudioError("no raw PCM came: the stream is empty.")


def _wav_samples(wav: WavStream, samples: bytes, read: Callable[[int], bytes]) -> Iterator[NDArray[Any]]:
    """Yield the samples of a WAV file as they arrive, `samples` first. Raises `TruncatedAudioError` at the end."""
    header = wav.header
    assert header is not None
    type_ = np.dtype(_TYPES[header.encoding])
    width, seconds = type_.itemsize * header.channels, 0.0
    more = True
    while more:
        whole = len(samples) - len(samples) % width
        if whole:
            block = np.frombuffer(samples[:whole], type_).reshape(-1, header.channels)
            seconds += len(block) / header.sample_rate
            yield block
        data = read(2 * BLOCK)
        more = bool(data)
        samples = samples[whole:] + wav.push(data)
    if not seconds:
        raise AudioError("the WAV file on standard input holds no audio.")
    if wav.missing > TOLERATED:
        raise truncated("standard input", wav.missing, seconds)


@contextmanager
def truncation_last(blocks: Iterator[NDArray[Any]]) -> Iterator[Iterator[NDArray[Any]]]:
    """Give all blocks, and raise the `TruncatedAudioError` at their end when the caller is done with them."""
    errors: list[TruncatedAudioError] = []

    def there() -> Generator[NDArray[Any]]:
        try:
            yield from blocks
        except TruncatedAudioError as error:
            errors.append(error)

    with closing(there()) as given:
        yield given
    if errors:
        raise errors[0]
