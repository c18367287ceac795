"""FFmpeg's decoders through PyAV (the extra `av`): M4A, MP4, WebM, AAC, AMR, WMA and so on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import AudioError

_BLOCK = 1 << 16  # samples of one channel
# Demuxers of single files. Playlists and the like open other files and addresses: whoever sends one chooses which.
_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,eac3,flac,flv,g722,loas,m4v,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,"
    "mp3,mpeg,mpegts,nistsphere,ogg,rm,tak,tta,voc,w64,wav,wv"
)
_TOLERATED = 0.2  # seconds that a Matroska header may promise too much


class Unreadable(Exception):
    """The file is in no format that FFmpeg knows."""


class AvReader:
    """The first audio track of a file. Raises `ImportError` without PyAV, `Unreadable`, and `AudioError`."""

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
            raise Unreadable(f"{error.strerror}.") from error
        try:
            if not self._file.streams.audio:
                raise AudioError(f"{name} has no audio track.")
            self._stream = self._file.streams.audio[0]
            self._reached = 0.0  # seconds, by the timestamps of its packets
            self._decoded = self._read = 0
            self._blocks = self._decode()
            self._first = next(self._blocks, None)
            if self._first is None:
                raise AudioError(f"{name} holds no audio.")
        except BaseException:
            self._file.close()
            raise
        self.channels = self._first.shape[1]
        self.frames = round((self._duration or 0.0) * self.sample_rate)

    @property
    def _duration(self) -> float | None:
        """Seconds, as far as the file states them."""
        if self._stream.duration is not None and self._stream.time_base is not None:
            return float(self._stream.duration * self._stream.time_base)
        return self._file.duration / 1e6 if self._file.duration is not None else None

    def read(self) -> NDArray[np.float32]:
        """Return about a block of samples as [n, channels]; none at the end. Raises `AudioError` for damaged ones."""
        blocks, size = [], 0
        if self._first is not None:
            blocks, size, self._first = [self._first], len(self._first), None
        while size < _BLOCK and (block := next(self._blocks, None)) is not None:
            blocks.append(block)
            size += len(block)
        return np.concatenate(blocks) if blocks else np.zeros((0, self.channels), np.float32)

    def check(self, read: int) -> None:
        """Raise `AudioError` if the file promises more than the `read` samples that came."""
        # Others' durations are estimates, or those of an edit; where samples are missing their demuxers fail.
        if "matroska" in self._file.format.name and not self._file.streams.video and self._file.duration is not None:
            promised = self._file.duration / 1e6
            if self._reached < promised - _TOLERATED:
                raise AudioError(
                    f"{self._name} is cut short: {self._reached:.2f} s of the {promised:.2f} s its header promises are "
                    "there; copy it again."
                )

    def close(self) -> None:
        self._file.close()

    def _decode(self) -> Iterator[NDArray[np.float32]]:
        shape = None
        try:
            for packet in self._file.demux(self._stream):
                if packet.is_corrupt:
                    raise self._damaged()
                if packet.pts is not None and packet.time_base is not None:
                    self._reached = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                for frame in packet.decode():
                    samples = _floats(frame)
                    if shape is None:
                        self.sample_rate: int = frame.sample_rate
                        shape = frame.sample_rate, samples.shape[1]
                    elif shape != (frame.sample_rate, samples.shape[1]):
                        raise AudioError(
                            f"{self._name} changes from {shape[0]} Hz and {shape[1]} channel(s) to {frame.sample_rate} "
                            f"Hz and {samples.shape[1]} after {self._decoded / shape[0]:.2f} s; convert it: "
                            "ffmpeg -i RECORDING talk.flac."
                        )
                    self._decoded += len(samples)
                    if len(samples):
                        yield samples
        except self._failure as error:
            raise self._damaged() from error

    def _damaged(self) -> AudioError:
        where = f"{self._decoded / self.sample_rate:.2f} s" if self._decoded else "0.00 s"
        return AudioError(f"{self._name} is damaged or cut short after {where}; copy it again.")


def _floats(frame: Any) -> NDArray[np.float32]:
    """A frame's samples as [n, channels] in [-1, 1]."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    scaled = samples.astype(np.float32)
    if samples.dtype.kind == "u":  # 8 bits, silence in the middle
        return (scaled - 128) / 128
    return scaled * np.float32(2.0 ** (1 - 8 * samples.dtype.itemsize))
