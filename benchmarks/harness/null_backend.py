"""A backend without a model: it emits a fixed text at a realistic rate, to measure everything around the model.

Each stream emits 3.5 tokens per second on average: in each period of `PERIOD_FRAMES` frames, one token in every third
frame until there are `PERIOD_TOKENS`, and none in the rest, so that utterances end as in speech. The tokens of a stream
depend on its frames only, and neither on its audio nor on the batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Bundle, Manifest
from nemostream.runtime.backends.base import Batch, Emissions
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.text.tokenizer import Tokenizer

Ints = NDArray[np.int64]

PERIOD_FRAMES = 100  # after which the rhythm repeats: 8 s with frames of 80 ms
PERIOD_TOKENS = 28  # in a period, so 3.5 tokens per second
TOKEN_FRAMES = 3  # from one token to the next; the last 18 frames of a period (1.44 s) have none
SCORE, SUM_P_ALPHA = np.float32(-0.05), np.float32(1.2)  # of each token
# Words of the packaged model, which other tokenizers divide into more or fewer tokens.
TEXT = (
    "please call me on the fifth of march at twenty past seven in the evening. the number is four eight one five "
    "nine two six. turn the light in the kitchen off and open the window. we meet on monday the third of june at "
    "half past ten. how are you today? thank you very much, i am fine. the train leaves at nine forty five from "
    "platform eleven. please say yes or no after the tone. what is the weather like in the north?"
)


def script(bundle: Bundle) -> NDArray[np.int32]:
    """Return the tokens that every stream emits again and again: a whole number of periods."""
    tokens = Tokenizer.of_bundle(bundle).encode(TEXT)
    tokens *= -(-3 * PERIOD_TOKENS // len(tokens))  # longer than the cycles that the repetition guard detects
    return np.array(tokens[: len(tokens) // PERIOD_TOKENS * PERIOD_TOKENS], np.int32)


class NullBackend:
    """A `Backend` without a model; the state of a slot is its number of frames.

    With `asynchronous`, `submit` returns at once and steps are completed one after another, each `step_ms` after it
    was started, as on a device; otherwise `submit` takes `step_ms`. Waiting takes no CPU time. With `spread`, streams
    are at different places of their text, as if they had started at different times.
    """

    def __init__(
        self,
        manifest: Manifest,
        script: NDArray[np.int32],
        capacity: int = 64,
        max_batch: int | None = None,
        *,
        asynchronous: bool = True,
        step_ms: float = 0.0,
        spread: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.manifest, self.capacity, self.asynchronous = manifest, capacity, asynchronous
        self.max_batch = min(max_batch or capacity, capacity)
        self._script, self._seconds, self._spread = script, step_ms / 1000, spread
        self._clock, self._sleep = clock, sleep
        self._frames = np.zeros(capacity, np.int64)  # of each slot
        self._end = 0.0  # time at which the device has completed all steps

    def reset(self, slots: Ints) -> None:
        self._frames[slots] = 0

    def reset_decoder(self, slots: Ints) -> None:
        """The decoder has no state."""

    def set_phrases(self, slot: int, phrases: Boosting | None) -> None:
        """Phrases have no effect."""

    def save(self, slot: int) -> dict[str, NDArray[Any]]:
        return {"frames": self._frames[slot : slot + 1].copy()}

    def load(self, slot: int, state: Mapping[str, NDArray[Any]]) -> None:
        self._frames[slot] = state["frames"][0]

    def copy(self, sources: Ints, targets: Ints) -> None:
        self._frames[targets] = self._frames[sources]

    def submit(self, batch: Batch) -> _PendingStep:
        begin = self._frames[batch.slots]
        self._frames[batch.slots] += batch.chunk.frames
        self._end = max(self._end, self._clock()) + self._seconds
        step = _PendingStep(self, begin, batch.slots, batch.chunk.frames, self._end)
        if not self.asynchronous:
            self.wait(self._end)
        return step

    def wait(self, end: float) -> None:
        """Wait until the device has completed the step that ends at `end`."""
        if (remaining := end - self._clock()) > 0:
            self._sleep(remaining)

    def emissions(self, begin: Ints, slots: Ints, frames: int) -> Emissions:
        """Return the emissions of rows whose slots have run `begin` frames, and now run `frames` more."""
        place = begin + slots * 37 if self._spread else begin  # 37 has no factor in common with the period
        first, last = tokens_before(place), tokens_before(place + frames)
        counts = last - first
        row = np.repeat(np.arange(len(slots)), counts)
        number = np.arange(len(row)) - (np.cumsum(counts) - counts)[row] + first[row]  # of each token in its stream
        frame = number // PERIOD_TOKENS * PERIOD_FRAMES + number % PERIOD_TOKENS * TOKEN_FRAMES - (place - begin)[row]
        tokens = self._script[number % len(self._script)]
        scores, sums = np.full(len(tokens), SCORE), np.full(len(tokens), SUM_P_ALPHA)
        return Emissions(counts, tokens, frame, scores, sums, np.zeros(len(slots), np.bool_))

    def close(self) -> None: ...


@dataclass(frozen=True)
class _PendingStep:
    backend: NullBackend
    begin: Ints
    slots: Ints
    frames: int
    end: float

    def result(self) -> Emissions:
        if self.backend.asynchronous:
            self.backend.wait(self.end)
        return self.backend.emissions(self.begin, self.slots, self.frames)


def tokens_before(frames: Ints) -> Ints:
    """Return the number of tokens in the first `frames` frames of a stream."""
    inside = np.minimum(-(-(frames % PERIOD_FRAMES) // TOKEN_FRAMES), PERIOD_TOKENS)
    return frames // PERIOD_FRAMES * PERIOD_TOKENS + inside
