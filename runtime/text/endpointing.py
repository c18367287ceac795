"""When an utterance ends, and when a decoder repeats itself.

Both are decided on frames and tokens alone: the decisions are the same however and whenever audio comes.

The rule of silence is NeMo's: more than `silence_ms` of frames in a row that said nothing
(`nemo/collections/asr/inference/streaming/endpointing/greedy/greedy_endpointing.py`, `detect_eou_given_timestamps`).
NeMo looks at the end of each step only; here every frame is looked at, so the chunk size changes nothing.

What the module does not know: text, time other than samples, the scheduler.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Manifest
from nemostream.errors import OptionError
from nemostream.runtime.streaming.snapshot import saved_array, saved_counts

Reason = Literal["silence", "forced", "length", "finish"]

_NEVER = 1 << 62
_WORD = 5  # frames that nothing was added to a word for, after which it is taken as whole


@dataclass(frozen=True)
class Endpoint:
    """When utterances end by themselves, and what the decoder remembers of one in the next.

    `silence_ms`: an utterance ends when more than this was silent since its last token; None: never by silence.
    `max_utterance_ms`: one that is longer ends after the word that it is in. `decoder`: "keep" decodes on, "reset" lets the
    decoder forget, at the end of the step that an utterance ended in, whatever it said (what was heard is kept), which
    cures a stream that got stuck in a manner of writing. Raises `OptionError` naming what cannot be.
    """

    silence_ms: int | None = 800
    max_utterance_ms: int | None = None
    decoder: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        for name, least in (("silence_ms", 80), ("max_utterance_ms", 1000)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise OptionError(f"{name} is {value!r}; it must be at least {least} ms, or None.")
        if self.decoder not in ("keep", "reset"):
            raise OptionError(f"decoder is {self.decoder!r}; choose one of keep, reset.")


@dataclass(frozen=True)
class UtteranceEnd:
    count: int  # tokens of the stream up to there
    at: int  # sample of the stream
    reason: Reason


class Endpointer:
    """One stream's utterances.

    `begins` states for each token id whether a word begins with it, `closes` whether it is punctuation that belongs to
    the word before it. Such punctuation neither ends nor starts an utterance: where one has ended it belongs to that.
    """

    def __init__(
        self, rule: Endpoint, manifest: Manifest, begins: Sequence[bool], closes: Sequence[bool] | None = None
    ) -> None:
        rate, self._frame = manifest.features.sample_rate, manifest.samples_per_frame
        self.resets_decoder = rule.decoder == "reset"
        # Samples from the last token's place to where the rule has its say: NeMo's `millisecond_to_frames`, one frame
        # more than that, and the token's own.
        self._silence = self._longest = _NEVER
        if rule.silence_ms is not None:
            self._silence = (-(-rule.silence_ms * rate // (1000 * self._frame)) + 2) * self._frame
        if rule.max_utterance_ms is not None:  # from the first token's place
            self._longest = rule.max_utterance_ms * rate // 1000
        self._begins, self._closes = begins, closes or (False,) * len(begins)
        self._any = False  # whether an utterance has begun
        self._count = 0  # tokens of the stream
        self._first: int | None = None  # of the utterance: where its first token stands, if it has one
        self._last = 0  # and its last one

    @property
    def between_utterances(self) -> bool:
        """Whether no utterance is under way."""
        return self._first is None

    def step(self, tokens: Sequence[int], sample_positions: Sequence[int], end_sample: int) -> list[UtteranceEnd]:
        """Take in a step: its tokens, the sample that each stands at, and how far the model has heard with it."""
        ends: list[UtteranceEnd] = []
        for token, sample_pos in zip(tokens, sample_positions, strict=True):
            self._end_before(sample_pos, ends)
            closes = self._closes[token]
            whole = self._begins[token] and not closes
            if self._first is not None and whole and sample_pos - self._first >= self._longest:
                self._end(sample_pos, "length", ends)
            if self._first is None and not (closes and self._any):
                self._first, self._any = sample_pos, True
            if self._first is not None:
                self._last = sample_pos
            self._count += 1
        self._end_before(end_sample, ends)
        return ends

    def save(self) -> dict[str, NDArray[Any]]:
        first = -1 if self._first is None else self._first
        return {"counts": np.array([self._count, first, self._last, self._any], np.int64)}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on as the one that was saved. Raises `ValueError` if it is not what `save` gives."""
        count, first, last, begun = saved_array(state, "counts", np.int64, 4).tolist()
        if not 0 <= count < 1 << 53 or not -1 <= first < 1 << 53 or not max(first, 0) <= last < 1 << 53:
            raise ValueError(f"the counts of utterances are {[count, first, last]}")
        if begun not in (0, 1):
            raise ValueError(f"the counts of utterances have {begun} for whether one has begun")
        self._count, self._last, self._any = count, last, bool(begun)
        self._first = None if first < 0 else first

    def reset(self) -> None:
        """The client ended the utterance."""
        self._first, self._any = None, True

    def _end_before(self, sample_pos: int, ends: list[UtteranceEnd]) -> None:
        """End the utterance if a rule says so of the silence from its last token up to `sample_pos`."""
        if self._first is None:
            return
        silent = self._last + self._silence
        whole = max(self._first + self._longest, self._last + (1 + _WORD) * self._frame)
        if sample_pos >= min(silent, whole):
            self._end(min(silent, whole), "length" if whole < silent else "silence", ends)

    def _end(self, at: int, reason: Reason, ends: list[UtteranceEnd]) -> None:
        self._first = None
        ends.append(UtteranceEnd(self._count, at, reason))


class RepetitionGuard:
    """Find a decoder that repeats itself without end.

    A transducer can get into a loop: the labels that it emitted make it emit them again, whatever the audio is. The
    rule: if the last `WINDOW` tokens are one sequence of at most `CYCLE` tokens over and over (at least six times),
    without a pause of more than `PAUSE_MS` between two tokens or after the last one, at the end of two steps in a row,
    the decoder is reset and tokens are counted anew. People repeat words too, but not as often: the same digit 50 times
    in a row, of up to three tokens each, is not a loop.

    After the first of the two steps the stream's next step waits for the results of the one before. So the reset has
    the same place with overlapping steps and without, and however audio is pushed.
    """

    WINDOW, CYCLE, PAUSE_MS = 192, 32, 2000

    def __init__(self, manifest: Manifest) -> None:
        self._pause = self.PAUSE_MS * manifest.features.sample_rate // 1000
        self._since = 0  # tokens before the last reset
        self.loop_suspected = False  # whether the last step ended in a repetition

    def step(self, tokens: Sequence[int], sample_positions: Sequence[int], end_sample: int) -> bool:
        """Return whether the decoder must be reset after a step up to the sample `end_sample`; given all tokens so far."""
        loops = self._repeats(tokens, sample_positions, end_sample)
        reset, self.loop_suspected = loops and self.loop_suspected, loops and not self.loop_suspected
        if reset:
            self._since = len(tokens)
        return reset

    def restart(self, count: int) -> None:
        """The decoder was reset after `count` tokens."""
        self._since, self.loop_suspected = count, False

    def save(self) -> dict[str, NDArray[Any]]:
        return {"counts": np.array([self._since, self.loop_suspected], np.int64)}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on as the one that was saved. Raises `ValueError` if it is not what `save` gives."""
        since, suspects = saved_counts(state, "counts", 2)
        if suspects > 1:
            raise ValueError(f"the repetition guard's counts are {[since, suspects]}")
        self._since, self.loop_suspected = since, bool(suspects)

    def _repeats(self, tokens: Sequence[int], sample_positions: Sequence[int], end_sample: int) -> bool:
        if len(tokens) - self._since < self.WINDOW or end_sample - sample_positions[-1] > self._pause:
            return False
        tail = tokens[-self.WINDOW :]
        if not any(tail[-1 - c] == tail[-1] and tail[c:] == tail[:-c] for c in range(1, self.CYCLE + 1)):
            return False
        where = sample_positions[-self.WINDOW :]
        return all(after - before <= self._pause for before, after in itertools.pairwise(where))
