"""Convert pushed audio to the model's input: mono at the model's sample rate, float32 or unchanged int16.

This module does not depend on chunks, streams or the model. N is the number of samples per channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import soxr
from numpy.typing import NDArray

from nemostream.errors import AudioError, OptionError
from nemostream.runtime.audio.containers import container_of, undecided
from nemostream.runtime.audio.files import BLOCK, MAX_CHANNELS, MAX_PEAK, RATES, Floats, find_implausible

_INT16 = np.dtype(np.int16)
_HEAD_SIZE = 4096  # leading samples, or bytes, of a stream that are searched for a container signature


class AudioPreprocessor:
    """Validate, scale, mix down and resample the audio of one stream.

    The output does not depend on how the input is divided into pushes. Raises `OptionError` for an invalid
    `sample_rate` (Hz, of the input) or `channels`.
    """

    def __init__(self, sample_rate: int, channels: int, model_rate: int) -> None:
        self.sample_rate = checked_rate(sample_rate)
        if not _is_number(channels) or not 1 <= channels <= MAX_CHANNELS or channels != int(channels):
            raise OptionError(f"channels is {channels!r}, not 1 to {MAX_CHANNELS}; arrays are [samples, channels].")
        self.channels = int(channels)
        self.received = 0  # samples of one channel, at the input's rate
        self._heads: dict[str, bytes] = {}  # leading bytes by view, while they may be a container's
        self._resampler = None
        self._direct = self.channels == 1 and self.sample_rate == model_rate  # int16 needs no conversion but the scale
        if self.sample_rate != model_rate:
            self._resampler = soxr.ResampleStream(self.sample_rate, model_rate, 1, dtype="float32", quality="HQ")

    @property
    def seconds(self) -> float:
        """Seconds of audio received so far."""
        return self.received / self.sample_rate

    def push(self, pcm: NDArray[Any]) -> Iterable[NDArray[Any]]:
        """Process [N] or [N, channels] of int16, int32 (full scale) or float (in [-1, 1]); return mono blocks.

        All of `pcm` is validated first: an `AudioError` leaves the stream unchanged. The blocks are float32, and may
        share memory with `pcm`; int16 that needs no conversion but the scale is returned unchanged.
        """
        self.check(pcm)
        if not self.received or self._heads:
            self._reject_container(pcm)
        self.received += len(pcm)
        if pcm.dtype is _INT16 and pcm.ndim == 1 and self._resampler is None:
            return (pcm,)
        return self._blocks(pcm)

    def keeps(self, pcm: NDArray[Any]) -> bool:
        """Return whether `push` would return `pcm` as the only block, without examining it."""
        return (
            type(pcm) is np.ndarray
            and pcm.dtype is _INT16
            and pcm.ndim == 1
            and len(pcm) <= BLOCK
            and self._direct
            and not self._heads
            and self.received > 0
        )

    def finish(self) -> Floats:
        """Return the samples that the resampler still holds, [n]."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        return self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)

    def flush(self) -> Floats:
        """As `finish`, and reset the resampler: audio pushed afterwards is resampled as a new recording."""
        remainder = self.finish()
        if self._resampler is not None:
            self._resampler.clear()
        return remainder

    def check(self, pcm: NDArray[np.generic]) -> None:
        """Raise `AudioError` if `pcm` is not valid audio for this stream."""
        if type(pcm) is np.ndarray and pcm.dtype is _INT16 and pcm.ndim == 1 and self.channels == 1:
            return
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
                f"audio has shape {list(pcm.shape)}, but the stream has {self.channels} channel(s); "
                f"push [samples{', ' + str(self.channels) if self.channels > 1 else ''}] or open it with channels=..."
            )
        if pcm.dtype.kind == "f":
            for start in range(0, len(pcm), BLOCK):
                # Checked as float32: values that overflow it count as infinite.
                block = as_float32(pcm[start : start + BLOCK])
                if fault := find_implausible(block):
                    what, remedy = fault
                    invalid = ~(np.abs(block) <= MAX_PEAK if what.startswith("the value") else np.isfinite(block))
                    index = start + int(np.argmax(invalid if invalid.ndim == 1 else invalid.any(axis=1)))
                    raise AudioError(f"audio has {what} at sample {index} of this push{remedy}; the push was rejected.")

    def _reject_container(self, pcm: NDArray[np.generic]) -> None:
        """Raise `AudioError` if the stream's first samples are the bytes of a file."""
        first = pcm[:_HEAD_SIZE]
        views = {"unscaled": first.tobytes()}
        if first.dtype.kind == "f":  # int16 converted to float
            for scale in (32768, 32767):
                samples = np.rint(np.clip(as_float32(first) * np.float32(scale), -32768, 32767))
                views[f"scaled by {scale}"] = samples.astype("<i2").tobytes()
        heads = {view: (self._heads.get(view, b"") + data)[:_HEAD_SIZE] for view, data in views.items()}
        if name := next(filter(None, map(container_of, heads.values())), None):
            raise AudioError(
                f"the samples are the bytes of a {name} file; pass its path, or decode it first "
                "(soundfile.read, or ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -)."
            )
        self._heads = {view: data for view, data in heads.items() if undecided(data)}

    def _blocks(self, frames: NDArray[np.generic]) -> Iterator[Floats]:
        for start in range(0, len(frames), BLOCK):
            block = as_float32(frames[start : start + BLOCK])
            if block.ndim == 2:
                block = block.mean(axis=1, dtype=np.float32)
            if self._resampler is not None:
                block = self._resampler.resample_chunk(np.ascontiguousarray(block))
            yield block


def as_float32(pcm: NDArray[Any]) -> Floats:
    """Return samples as float32 in [-1, 1]."""
    with np.errstate(over="ignore"):
        samples = pcm.astype(np.float32, copy=False)
    if pcm.dtype.kind == "i":
        samples *= np.float32(2.0 ** (1 - 8 * pcm.dtype.itemsize))  # in place: the conversion made a copy
    return samples


def checked_rate(sample_rate: object) -> int:
    """Return the sample rate in Hz as an int. Raises `OptionError` for an unsupported one."""
    if not _is_number(sample_rate) or not RATES.start <= sample_rate < RATES.stop or sample_rate != int(sample_rate):
        raise OptionError(f"sample_rate is {sample_rate!r}; it must be an integer from {RATES[0]} to {RATES[-1]} (Hz).")
    return int(sample_rate)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)
