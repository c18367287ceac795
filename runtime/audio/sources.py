"""Audio sources: turn what a caller has (array, file, file content, iterable, pipe) into blocks of samples.

This module does not depend on chunks, streams or the model.
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
from nemostream.runtime.audio.files import BLOCK, TOLERANCE, AudioFile, truncated
from nemostream.runtime.audio.preprocessor import checked_rate
from nemostream.runtime.audio.spool import Readable, is_file_content, spool

Content = bytes | bytearray | memoryview | Readable  # content of an audio file
SourceLike = (
    str | Path | os.PathLike[str] | NDArray[Any] | Content | Iterable[NDArray[Any]] | AsyncIterable[NDArray[Any]]
)

_TYPES = {"pcm_s16le": "<i2", "pcm_f32le": "<f4"}  # dtypes of WAV samples that need no decoder


@dataclass(frozen=True)
class AudioSource:
    """An opened source."""

    sample_rate: int  # Hz
    channels: int
    blocks: Iterable[NDArray[Any]]  # [n] or [n, channels]
    duration: float = 0.0  # seconds; 0 if unknown


@contextmanager
def open_source(source: SourceLike, sample_rate: int, channels: int) -> Iterator[AudioSource]:
    """Open a source. A context manager.

    `sample_rate` (Hz) applies to arrays and iterables of arrays, `channels` to iterables; other sources state both.
    Raises `AudioError` for an unsupported or unreadable source. On exit, raises `TruncatedAudioError` if all of a file
    was read and its header announces more audio.
    """
    if isinstance(source, np.ndarray):
        if not source.size:
            raise AudioError("the audio is empty.")
        if source.ndim not in (1, 2):
            raise AudioError(f"audio has shape {list(source.shape)}; it must be [N] or [N, channels].")
        rate = checked_rate(sample_rate)
        channels = source.shape[1] if source.ndim == 2 else 1
        parts = (source[start : start + BLOCK] for start in range(0, len(source), BLOCK))
        yield AudioSource(rate, channels, parts, len(source) / rate)
    elif isinstance(source, AudioFile):  # the caller closes it
        with defer_truncation(source.blocks()) as blocks:
            yield AudioSource(source.sample_rate, source.channels, blocks, source.duration)
    elif isinstance(source, bytes | bytearray | memoryview) or is_file_content(source):
        with spool(source) as (path, name), AudioFile(path, name) as file, defer_truncation(file.blocks()) as blocks:
            yield AudioSource(file.sample_rate, file.channels, blocks, file.duration)
    elif isinstance(source, str | os.PathLike):
        with AudioFile(source) as file, defer_truncation(file.blocks()) as blocks:
            yield AudioSource(file.sample_rate, file.channels, blocks, file.duration)
    elif isinstance(source, Iterable):
        yield AudioSource(sample_rate, channels, source)
    elif isinstance(source, AsyncIterable):
        raise AudioError("an asynchronous source needs `async for`.")
    else:
        raise AudioError(
            f"unsupported audio source of type {type(source).__name__}; pass a path, a numpy array, the content of a "
            "file, or an iterable of arrays."
        )


@contextmanager
def open_pipe(stream: BinaryIO, sample_rate: int, channels: int = 1) -> Iterator[AudioSource]:
    """Open a binary stream (`sys.stdin.buffer`) of raw 16-bit PCM at `sample_rate`, or of a file. A context manager.

    Raw PCM and simple WAV files are processed as they arrive. Other files are first copied to an anonymous temporary
    file. Raises `AudioError` if the stream is empty or cannot be read. On exit, raises as `open_source` does.
    """
    read = getattr(stream, "read1", stream.read)  # `read1` returns available data, `read` waits for a full block
    head = _read_head(read)
    container = container_of(head)
    if container is None:
        yield AudioSource(sample_rate, channels, _pcm16(head, read, channels))
        return
    if container == "WAV":
        wav, samples = WavStream(), b""
        with suppress(AudioError):  # an unsupported header: the whole file is read below
            data = head
            while data and not wav.header:
                samples = wav.push(data)
                data = b"" if wav.header else read(BLOCK)
                head += data
        if (
            (header := wav.header)
            and header.byte_order == "<"
            and STREAMABLE.get((header.format_tag, header.bits)) in _TYPES
        ):
            with defer_truncation(_wav_samples(wav, samples, read)) as blocks:
                yield AudioSource(header.sample_rate, header.channels, blocks)
            return
    with tempfile.TemporaryFile(prefix="nemostream-") as file:
        file.write(head)
        while data := read(BLOCK):
            file.write(data)
        file.flush()
        with AudioFile(file, "standard input") as audio, defer_truncation(audio.blocks()) as blocks:
            yield AudioSource(audio.sample_rate, audio.channels, blocks, audio.duration)


def read_pcm16(stream: BinaryIO, channels: int = 1) -> Iterator[NDArray[np.int16]]:
    """Yield raw little-endian 16-bit PCM as it arrives on a binary stream, as [n, channels].

    Raises `AudioError` if the stream is empty, ends within a sample, or begins with a container (use `open_pipe`).
    """
    read = getattr(stream, "read1", stream.read)
    head = _read_head(read)
    if container := container_of(head):
        raise AudioError(f"the stream is a {container} file, not raw 16-bit PCM; decode it first.")
    yield from _pcm16(head, read, channels)


def _read_head(read: Callable[[int], bytes]) -> bytes:
    """Read until the container, if any, can be identified."""
    head = b""
    while undecided(head) and (data := read(2 * BLOCK)):
        head += data
    return head


def _pcm16(data: bytes, read: Callable[[int], bytes], channels: int) -> Iterator[NDArray[np.int16]]:
    """Yield the samples of `data` and of everything that `read` returns."""
    width = 2 * channels
    remainder, empty = b"", True
    while data:
        data = remainder + data
        whole = len(data) - len(data) % width
        remainder = data[whole:]
        if whole:
            empty = False
            yield np.frombuffer(data[:whole], "<i2").astype(np.int16, copy=False).reshape(-1, channels)
        data = read(2 * BLOCK)
    if remainder:
        raise AudioError(
            f"raw PCM ended in the middle of a sample: {len(remainder)} byte(s) left over, a sample has {width}; "
            f"check that it is 16-bit with {channels} channel(s)."
        )
    if empty:
        raise AudioError("no raw PCM received: the stream is empty.")


def _wav_samples(wav: WavStream, samples: bytes, read: Callable[[int], bytes]) -> Iterator[NDArray[Any]]:
    """Yield the samples of a WAV file as they arrive, starting with `samples`.

    Raises `AudioError` if there are none, and `TruncatedAudioError` at the end if some are missing.
    """
    header = wav.header
    assert header is not None
    dtype = np.dtype(_TYPES[header.encoding])
    width, seconds = dtype.itemsize * header.channels, 0.0
    more = True
    while more:
        whole = len(samples) - len(samples) % width
        if whole:
            block = np.frombuffer(samples[:whole], dtype).reshape(-1, header.channels)
            seconds += len(block) / header.sample_rate
            yield block
        data = read(2 * BLOCK)
        more = bool(data)
        samples = samples[whole:] + wav.push(data)
    if not seconds:
        raise AudioError("the WAV file on standard input contains no audio.")
    if wav.missing > TOLERANCE:
        raise truncated("standard input", wav.missing, seconds)


@contextmanager
def defer_truncation(blocks: Iterator[NDArray[Any]]) -> Iterator[Iterator[NDArray[Any]]]:
    """Yield an iterator over all blocks; on exit, raise the `TruncatedAudioError` that ended them, if any."""
    errors: list[TruncatedAudioError] = []

    def complete() -> Generator[NDArray[Any]]:
        try:
            yield from blocks
        except TruncatedAudioError as error:
            errors.append(error)

    with closing(complete()) as iterator:
        yield iterator
    if errors:
        raise errors[0]
