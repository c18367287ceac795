"""Decode M4A, MP4, WebM, AAC, AMR, WMA and other formats with FFmpeg, through PyAV (the `av` extra)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import AudioError

_BLOCK = 1 << 16  # samples per channel
# Demuxers of self-contained files. Playlists and similar formats would let the sender of a file open other files and
# addresses.
_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,eac3,flac,flv,g722,loas,m4v,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,"
    "mp3,mpeg,mpegts,nistsphere,ogg,rm,tak,tta,voc,w64,wav,wv"
)
_TOLERANCE = 0.2  # seconds of audio that may be missing from a Matroska file


class UnsupportedFormat(Exception):
    """FFmpeg does not recognize the format of the file."""


class AvReader:
    """Decoder of the first audio track of a file.

    Raises `ImportError` if PyAV is not installed, `UnsupportedFormat` for an unknown format, and `AudioError` if the
    file contains no audio.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        import av

        self._name, self._failure = name, av.error.FFmpegError
        try:
            self._file = av.open(
                file,
                metadata_errors="replace",
                container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"},
            )
        except self._failure as error:
            raise UnsupportedFormat(f"{error.strerror}.") from error
        try:
            if not self._file.streams.audio:
                raise AudioError(f"{name} has no audio track.")
            self._stream = self._file.streams.audio[0]
            self._end = 0.0  # seconds: the end of the latest packet, by its timestamp
            self._decoded = self._read = 0
            self._blocks = self._decode()
            self._first = next(self._blocks, None)
            if self._first is None:
                raise AudioError(f"{name} contains no audio.")
        except BaseException:
            self._file.close()
            raise
        self.channels = self._first.shape[1]
        self.frames = round((self._duration or 0.0) * self.sample_rate)

    @property
    def _duration(self) -> float | None:
        """Duration in seconds, or None if the file does not state it."""
        if self._stream.duration is not None and self._stream.time_base is not None:
            return float(self._stream.duration * self._stream.time_base)
        return self._file.duration / 1e6 if self._file.duration is not None else None

    def read(self) -> NDArray[np.float32]:
        """Return about `_BLOCK` samples as [n, channels]; n is 0 at the end. Raises `AudioError` for damaged data."""
        blocks, size = [], 0
        if self._first is not None:
            blocks, size, self._first = [self._first], len(self._first), None
        while size < _BLOCK and (block := next(self._blocks, None)) is not None:
            blocks.append(block)
            size += len(block)
        return np.concatenate(blocks) if blocks else np.zeros((0, self.channels), np.float32)

    def check(self, read: int) -> None:
        """Raise `AudioError` if the header of a Matroska file states more audio than the file contains."""
        # Other formats state an estimate or the duration of an edit; their demuxers fail if samples are missing.
        if "matroska" in self._file.format.name and not self._file.streams.video and self._file.duration is not None:
            stated = self._file.duration / 1e6
            if self._end < stated - _TOLERANCE:
                raise AudioError(
                    f"{self._name} is cut short: it contains {self._end:.2f} s of the {stated:.2f} s stated in its "
                    "header; copy it again."
                )

    def close(self) -> None:
        self._file.close()

    def _decode(self) -> Iterator[NDArray[np.float32]]:
        shape = None
        try:
            for packet in self._file.demux(self._stream):
                if packet.is_corrupt:
                    raise self._damaged_error()
                if packet.pts is not None and packet.time_base is not None:
                    self._end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                for frame in packet.decode():
                    samples = _to_float(frame)
                    if shape is None:
                        self.sample_rate: int = frame.sample_rate
                        shape = frame.sample_rate, samples.shape[1]
                    elif shape != (frame.sample_rate, samples.shape[1]):
                        raise AudioError(
                            f"{self._name} changes from {shape[0]} Hz and {shape[1]} channel(s) to {frame.sample_rate} "
                            f"Hz and {samples.shape[1]} channel(s) after {self._decoded / shape[0]:.2f} s; convert it: "
                            "ffmpeg -i RECORDING talk.flac."
                        )
                    self._decoded += len(samples)
                    if len(samples):
                        yield samples
        except self._failure as error:
            raise self._damaged_error() from error

    def _damaged_error(self) -> AudioError:
        seconds = self._decoded / self.sample_rate if self._decoded else 0.0
        return AudioError(f"{self._name} is damaged or cut short after {seconds:.2f} s; copy it again.")


def _to_float(frame: Any) -> NDArray[np.float32]:
    """Return the samples of a frame as [n, channels] in [-1, 1]."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    scaled = samples.astype(np.float32)
    if samples.dtype.kind == "u":  # unsigned 8-bit: silence is 128
        return (scaled - 128) / 128
    return scaled * np.float32(2.0 ** (1 - 8 * samples.dtype.itemsize))
