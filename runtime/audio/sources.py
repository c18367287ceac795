"""From what a caller has (array, file, pipe) to what a stream wants: mono float32 at the model's rate.

What the module does not know: chunks, streams, the model. N counts samples of one channel.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterable, Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import AudioError, TruncatedAudioError
from nemostream.runtime.audio.containers import STREAMABLE, WavStream, container_of, undecided
from nemostream.runtime.audio.files import BLOCK, TOLERATED, AudioFile, truncated
from nemostream.runtime.audio.preprocessor import checked_rate
from nemostream.runtime.audio.spool import Readable, is_file_content, spool

Content = bytes | bytearray | memoryview | Readable  # of an audio file
SourceLike = (
    str | Path | os.PathLike[str] | NDArray[Any] | Content | Iterable[NDArray[Any]] | AsyncIterable[NDArray[Any]]
)

_TYPES = {"pcm_s16le": "<i2", "pcm_f32le": "<f4"}  # of WAV samples that need no decoder


@dataclass(frozen=True)
class AudioSource:
    """A source that was opened."""

    sample_rate: int
    channels: int
    blocks: Iterable[NDArray[Any]]
    duration: float = 0.0  # seconds, as far as is known


@contextmanager
def open_source(source: SourceLike, sample_rate: int, channels: int) -> Iterator[AudioSource]:
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
    elif isinstance(source, AudioFile):  # the caller's
        with defer_truncation(source.blocks()) as there:
            yield AudioSource(source.sample_rate, source.channels, there, source.duration)
    elif isinstance(source, bytes | bytearray | memoryview) or is_file_content(source):
        with spool(source) as (path, name), AudioFile(path, name) as file, defer_truncation(file.blocks()) as there:
            yield AudioSource(file.sample_rate, file.channels, there, file.duration)
    elif isinstance(source, str | os.PathLike):
        with AudioFile(source) as file, defer_truncation(file.blocks()) as there:
            yield AudioSource(file.sample_rate, file.channels, there, file.duration)
    elif isinstance(source, Iterable):
        yield AudioSource(sample_rate, channels, source)
    elif isinstance(source, AsyncIterable):
        raise AudioError("an asynchronous source needs `async for`.")
    else:
        raise AudioError(f"a source is a path, a numpy array, or gives arrays; {type(source).__name__} is none.")


@contextmanager
def open_pipe(stream: BinaryIO, sample_rate: int, channels: int = 1) -> Iterator[AudioSource]:
    """What arrives on a binary stream (`sys.stdin.buffer`): raw 16-bit PCM at `sample_rate`, or a file.

    Raw PCM and simple WAV files are processed as they arrive; other files are first read to their end, into a temporary
    file without a name. Raises `AudioError` if it is empty or cannot be read; leaving it raises as `open_source` does.
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
            with defer_truncation(_wav_samples(wav, samples, read)) as blocks:
                yield AudioSource(header.sample_rate, header.channels, blocks)
            return
    with tempfile.TemporaryFile(prefix="nemostream-") as file:
        file.write(begin)
        while data := read(BLOCK):
            file.write(data)
        file.flush()
        with AudioFile(file, "standard input") as recording, defer_truncation(recording.blocks()) as blocks:
            yield AudioSource(recording.sample_rate, recording.channels, blocks, recording.duration)


def read_pcm16(stream: BinaryIO, channels: int = 1) -> Iterator[NDArray[np.int16]]:
    """Yield [n, channels] of raw little-endian 16-bit PCM as it arrives on a binary stream.

    Raises `AudioError` if it is empty, ends in the middle of a sample or begins with a container (use `open_pipe`).
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
def defer_truncation(blocks: Iterator[NDArray[Any]]) -> Iterator[Iterator[NDArray[Any]]]:
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
