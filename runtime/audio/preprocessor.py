"""Convert pushed audio to the model's input: mono at the model's sample rate, float32 or unchanged int16.

This module does not depend on chunks, streams or the model. N is the number of samples per channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import gcd
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import soxr
from numpy.typing import NDArray

from nemostream.errors import AudioError, OptionError
from nemostream.runtime.audio.containers import container_of, undecided
from nemostream.runtime.audio.files import BLOCK, MAX_CHANNELS, MAX_PEAK, RATES, Floats, find_implausible
from nemostream.runtime.streaming.compiled import PreprocessorFields
from nemostream.runtime.streaming.snapshot import SavedArrays, saved_array, saved_counts

_INT16 = np.dtype(np.int16)
_HEAD_SIZE = 4096  # leading samples, or bytes, of a stream that are searched for a container signature
_NO_AUDIO: Floats = np.empty(0, np.float32)
_SEGMENT_SECONDS = 4  # of input between two starts of the resampler
_LEAD_SECONDS = 0.25  # of input before a segment, many times the length of the resampler's filter


class AudioPreprocessor(PreprocessorFields):
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
        self._resampler: _Resampler | None = None
        # Samples of a push of int16 that needs no conversion but the scale
        self._max_unchanged = BLOCK if self.channels == 1 and self.sample_rate == model_rate else 0
        if self.sample_rate != model_rate:
            self._resampler = _Resampler(self.sample_rate, model_rate)

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
            and len(pcm) <= self._max_unchanged
            and not self._heads
            and self.received > 0
        )

    def finish(self) -> Floats:
        """Return the samples that the resampler still holds, [n]."""
        if self._resampler is None:
            return _NO_AUDIO
        return self._resampler.finish()

    def flush(self) -> Floats:
        """As `finish`, and reset the resampler: audio pushed afterwards is resampled as a new recording."""
        remainder = self.finish()
        if self._resampler is not None:
            self._resampler = self._resampler.restarted()
        return remainder

    def save(self) -> dict[str, NDArray[Any]]:
        """Return the state for `load`."""
        if (resampler := self._resampler) is None:
            return {"counts": np.array([self.received], np.int64), "history": _NO_AUDIO}
        counts = [self.received, resampler.begin, resampler.returned]
        return {"counts": np.array(counts, np.int64), "history": resampler.history}

    def load(self, state: SavedArrays) -> None:
        """Restore a saved state. Raises `ValueError` if it does not come from `save` with the same sample rates."""
        self.received, *position = saved_counts(state, "counts", 1 if self._resampler is None else 3)
        history = saved_array(state, "history", np.float32, None)
        if self._resampler is not None:
            self._resampler = self._resampler.restarted(*position, history)
        elif len(history):
            raise ValueError("it has audio to resample, but the sample rate is that of the model")
        self._heads = {}

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
                block = self._resampler.push(np.ascontiguousarray(block))
            yield block


class _Segment:
    """A soxr stream that resamples from input sample `begin` on; output `first` is the first that is used."""

    def __init__(self, rate: int, model_rate: int, begin: int, first: int) -> None:
        self.begin, self.first = begin, first
        self.end = begin * model_rate // rate  # of its output so far
        self._stream = soxr.ResampleStream(rate, model_rate, 1, dtype="float32", quality="HQ")

    def push(self, audio: Floats, last: bool = False) -> Floats:
        output: Floats = self._stream.resample_chunk(audio, last=last)
        unused = max(self.first - self.end, 0)
        self.end += len(output)
        return output[unused:]


class _Resampler:
    """Resamples one stream; its state can be saved, although that of soxr cannot.

    Every few seconds of input, a new soxr stream takes over. It begins a little earlier, so that its filter covers the
    same input; its output differs from that of the previous one by rounding (1e-7). The output thus depends on the
    input since then only. That input is the state: `history`, from sample `begin` on. `returned` is the number of
    output samples so far. Raises `ValueError` if these do not belong together.
    """

    def __init__(
        self, rate: int, model_rate: int, begin: int = 0, returned: int = 0, history: Floats = _NO_AUDIO
    ) -> None:
        self.begin, self.returned = begin, returned
        self._rates = rate, model_rate
        self._spacing = _SEGMENT_SECONDS * rate
        unit = rate // gcd(rate, model_rate)  # input samples that are a whole number of output samples
        self._lead = -(-int(_LEAD_SECONDS * rate) // unit) * unit
        self._received = begin
        self._boundary = begin + self._lead + self._spacing if begin else self._spacing  # where the next segment begins
        self._produced = begin * model_rate // rate  # output samples, of which the first `returned` were returned
        self._history: list[Floats] = []
        self._segments = [_Segment(rate, model_rate, begin, self._produced)]
        self._following: list[Floats] = []  # output of the second segment, while the first one is not complete
        self._output: list[Floats] = []  # produced and not returned
        if begin and ((begin + self._lead) % self._spacing or len(history) < self._lead):
            raise ValueError(f"the resampler begins at sample {begin} with {len(history)} samples")
        self._resample(history)
        if not self._produced <= returned + rate or returned > self._received * model_rate // rate:
            raise ValueError(f"the resampler has returned {returned} of {self._produced} samples")

    @property
    def history(self) -> Floats:
        return np.concatenate([_NO_AUDIO, *self._history])

    def restarted(self, *state: Any) -> _Resampler:
        """Return a resampler in a saved state (`begin`, `returned`, `history`), by default at the start of a stream."""
        return _Resampler(*self._rates, *state)

    def push(self, audio: Floats) -> Floats:
        """Append input [N]; return the output that is complete [n]."""
        self._resample(audio)
        return self._take()

    def finish(self) -> Floats:
        """End the input; return the rest of the output [n]."""
        first, *others = self._segments
        self._add(first.push(_NO_AUDIO, last=True), others[0].first if others else None)
        for segment in others:
            for output in (*self._following, segment.push(_NO_AUDIO, last=True)):
                self._add(output)
        return self._take()

    def _resample(self, audio: Floats) -> None:
        while len(audio):
            part, audio = audio[: self._boundary - self._received], audio[self._boundary - self._received :]
            self._history.append(part.copy())  # the caller may reuse its array
            self._received += len(part)
            self._push(part)
            if self._received == self._boundary:
                self._begin_segment()

    def _push(self, part: Floats) -> None:
        first, *others = self._segments
        output = first.push(part)
        if not others:
            return self._add(output)
        (second,) = others
        self._following.append(second.push(part))
        self._add(output, second.first)
        if first.end >= second.first:
            self._segments, following, self._following = [second], self._following, []
            self._history, self.begin = [self.history[second.begin - self.begin :]], second.begin
            for output in following:
                self._add(output)

    def _begin_segment(self) -> None:
        rate, model_rate = self._rates
        segment = _Segment(rate, model_rate, self._received - self._lead, self._received * model_rate // rate)
        self._segments.append(segment)
        self._following = [segment.push(self.history[-self._lead :])]
        self._boundary += self._spacing

    def _add(self, output: Floats, limit: int | None = None) -> None:
        """Append output, up to output sample `limit`."""
        if limit is not None:
            output = output[: max(limit - self._produced, 0)]
        begin, self._produced = self._produced, self._produced + len(output)
        if self._produced > self.returned:
            self._output.append(output[max(self.returned - begin, 0) :])

    def _take(self) -> Floats:
        outputs, self._output = self._output, []
        output = outputs[0] if len(outputs) == 1 else np.concatenate([_NO_AUDIO, *outputs])
        self.returned += len(output)
        return output


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
