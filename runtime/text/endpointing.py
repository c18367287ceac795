"""Utterance endpointing and detection of repetition loops.

Decisions depend on frames and tokens only, so they do not depend on how or when audio is pushed.

The silence rule is NeMo's: more than `silence_ms` of consecutive frames without a token
(`nemo/collections/asr/inference/streaming/endpointing/greedy/greedy_endpointing.py`, `detect_eou_given_timestamps`).
NeMo applies it at the end of each step only; here it applies to every frame, so it does not depend on the chunk size.

The model rule is that of NeMo's voice agent (`nemo/agents/voice_agent/pipecat/services/nemo/`: `streaming_asr.py`,
`NemoStreamingASRService.transcribe`, and `turn_taking.py`, `_handle_transcription`): an utterance ends where the model
emits `<EOU>`. NeMo examines the text of each step, and resets the decoder, the encoder caches and the features after
it. Here the rule applies to every token, and only the decoder is reset, if `decoder` is "reset".

This module does not depend on text or the scheduler. Positions are samples of the stream at the model's sample rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Manifest
from nemostream.errors import OptionError
from nemostream.runtime.streaming.compiled import EndpointerFields, GuardFields
from nemostream.runtime.streaming.snapshot import saved_array, saved_counts

if TYPE_CHECKING:
    from nemostream.runtime.text.tokenizer import Tokenizer

Reason = Literal["model", "silence", "forced", "length", "finish"]

NEVER = 1 << 62  # a sample after the end of every stream
_WORD_FRAMES = 5  # frames without a token after which a word is considered complete


@dataclass(frozen=True)
class Endpoint:
    """Rules that end utterances automatically, and the treatment of the decoder at an end.

    `silence_ms`: an utterance ends after more than this duration without a token; None disables the rule.
    `max_utterance_ms`: an utterance of this duration ends after its current word; None disables the rule.
    `decoder`: "keep" continues with the decoder state; "reset" resets it at the end of the step in which an utterance
    ended, or a backchannel was marked, and keeps the encoder caches, which recovers a decoder that is stuck in one
    output style.
    `model`: an utterance ends where the model emits `<EOU>`, and `<EOB>` marks a backchannel, if the model has these
    tokens; False ignores them.

    Raises `OptionError` for an invalid value.
    """

    silence_ms: int | None = 800
    max_utterance_ms: int | None = None
    decoder: Literal["keep", "reset"] = "keep"
    model: bool = True

    def __post_init__(self) -> None:
        for name, minimum in (("silence_ms", 80), ("max_utterance_ms", 1000)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise OptionError(f"{name} is {value!r}; it must be at least {minimum} ms, or None.")
        if self.decoder not in ("keep", "reset"):
            raise OptionError(f"decoder is {self.decoder!r}; choose one of keep, reset.")
        if not isinstance(self.model, bool):
            raise OptionError(f"model is {self.model!r}; it must be True or False.")


@dataclass(frozen=True)
class UtteranceEnd:
    """The end of an utterance."""

    token_count: int  # tokens of the stream before the end
    end_sample: int
    reason: Reason


class Endpointer(EndpointerFields):
    """Find the ends of utterances in one stream.

    `word_starts` states for each token id whether a word begins with it, `closing_punctuation` whether it is
    punctuation that belongs to the preceding word. Such punctuation neither ends nor starts an utterance: after the
    end of an utterance, it still belongs to that utterance. `invisible` tokens never start an utterance.
    `end_of_utterance` and `backchannel` are the ids of `<EOU>` and `<EOB>`, if the model has them.
    """

    def __init__(
        self,
        rule: Endpoint,
        manifest: Manifest,
        word_starts: Sequence[bool],
        closing_punctuation: Sequence[bool] | None = None,
        invisible: Collection[int] = (),
        end_of_utterance: int | None = None,
        backchannel: int | None = None,
    ) -> None:
        rate, self._frame = manifest.features.sample_rate, manifest.samples_per_frame
        self.resets_decoder = rule.decoder == "reset"
        # Samples from the start of the last token's frame to the end of the utterance: NeMo's `millisecond_to_frames`,
        # one frame more, and the frame of the token.
        self._silence = self._max_length = NEVER
        self._word = (1 + _WORD_FRAMES) * self._frame  # as `_silence`, to the end of the last word
        if rule.silence_ms is not None:
            self._silence = (-(-rule.silence_ms * rate // (1000 * self._frame)) + 2) * self._frame
        if rule.max_utterance_ms is not None:  # samples from the first token
            self._max_length = rule.max_utterance_ms * rate // 1000
        self._word_starts = word_starts
        self._closing_punctuation = closing_punctuation or (False,) * len(word_starts)
        self._invisible = invisible
        self._end_of_utterance, self._backchannel = (end_of_utterance, backchannel) if rule.model else (None, None)
        # Whether an utterance ended, or `<EOU>` or `<EOB>` was emitted, in the last step and no text follows in it
        self._at_reset = False
        self._begun = False  # whether the stream has had an utterance
        self._count = 0  # tokens of the stream
        self._first: int | None = None  # sample of the utterance's first token; None between utterances
        self._last = 0  # sample of its last token
        self.next_end = NEVER  # sample at which the current utterance ends if no tokens follow

    @classmethod
    def of_tokenizer(cls, rule: Endpoint, manifest: Manifest, tokenizer: Tokenizer) -> Endpointer:
        """Return the endpointer of a model's tokens."""
        return cls(
            rule,
            manifest,
            tokenizer.word_starts,
            tokenizer.closing_punctuation,
            tokenizer.invisible,
            tokenizer.end_of_utterance,
            tokenizer.backchannel,
        )

    @property
    def between_utterances(self) -> bool:
        """Whether there is no current utterance."""
        return self._first is None

    @property
    def reset_due(self) -> bool:
        """Whether the decoder must be reset after the last step.

        That is so if an utterance ended, or the model emitted `<EOU>` or `<EOB>`, and no text follows in the step.
        """
        return self.resets_decoder and self._at_reset

    def step(self, tokens: Sequence[int], sample_positions: Sequence[int], end_sample: int) -> list[UtteranceEnd]:
        """Process a step; return the ends of utterances in it.

        `sample_positions` has the sample of each token, `end_sample` is the end of the audio processed so far.
        """
        ends: list[UtteranceEnd] = []
        if self._continues(tokens, sample_positions, end_sample):
            return ends
        self._at_reset = False
        for token, sample_pos in zip(tokens, sample_positions, strict=True):
            self._end_before(sample_pos, ends)
            closing = self._closing_punctuation[token]
            new_word = self._word_starts[token] and not closing
            if self._first is not None and new_word and sample_pos - self._first >= self._max_length:
                self._end(sample_pos, "length", ends)
            if self._first is None and token not in self._invisible and not (closing and self._begun):
                self._first, self._begun = sample_pos, True
            if self._first is not None:
                self._last = sample_pos
                self._at_reset = self._at_reset and token in self._invisible
            self._count += 1
            if token in (self._end_of_utterance, self._backchannel):
                self._at_reset = True
            if token == self._end_of_utterance and self._first is not None:
                self._end(sample_pos + self._frame, "model", ends)
        self._end_before(end_sample, ends)
        self._set_next_end()
        return ends

    def _continues(self, tokens: Sequence[int], sample_positions: Sequence[int], end_sample: int) -> bool:
        """Process a step in which the utterance only continues, as in most steps with tokens.

        Return False, and change nothing, if an utterance may begin or end in it.
        """
        first, next_end, silence = self._first, self.next_end, self._silence
        if first is None:
            return False
        last, longest = self._last, first + self._max_length
        for token, sample_pos in zip(tokens, sample_positions, strict=True):
            if sample_pos >= next_end or sample_pos >= longest:
                return False
            if token == self._end_of_utterance or token == self._backchannel:
                return False
            last = sample_pos
            next_end, by_length = last + silence, last + self._word
            if by_length < longest:
                by_length = longest
            if by_length < next_end:
                next_end = by_length
        if end_sample >= next_end:
            return False
        self._last, self._at_reset, self.next_end = last, False, next_end
        self._count += len(tokens)
        return True

    def _set_next_end(self) -> None:
        first = self._first
        self.next_end = NEVER if first is None else min(self._end_by_silence(), self._end_by_length(first))

    def save(self) -> dict[str, NDArray[Any]]:
        """Return the state that `load` restores."""
        first = -1 if self._first is None else self._first
        return {"counts": np.array([self._count, first, self._last, self._begun], np.int64)}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a saved state. Raises `ValueError` if it is invalid."""
        count, first, last, begun = saved_array(state, "counts", np.int64, 4).tolist()
        if not 0 <= count < 1 << 53 or first < -1 or not max(first, 0) <= last < 1 << 53:
            raise ValueError(f"the counts of utterances are {[count, first, last]}")
        if begun not in (0, 1):
            raise ValueError(f"the counts of utterances have the flag {begun}; it must be 0 or 1")
        self._count, self._last, self._begun = count, last, bool(begun)
        self._first = None if first < 0 else first
        self._set_next_end()

    def reset(self) -> None:
        """End the current utterance, on request of the client."""
        self._first, self._begun, self.next_end = None, True, NEVER

    def _end_before(self, sample_pos: int, ends: list[UtteranceEnd]) -> None:
        """End the utterance if a rule applies to the silence between its last token and `sample_pos`."""
        if self._first is None:
            return
        by_silence, by_length = self._end_by_silence(), self._end_by_length(self._first)
        if sample_pos >= min(by_silence, by_length):
            self._end(min(by_silence, by_length), "length" if by_length < by_silence else "silence", ends)

    def _end_by_silence(self) -> int:
        return self._last + self._silence

    def _end_by_length(self, first: int) -> int:
        return max(first + self._max_length, self._last + self._word)

    def _end(self, at: int, reason: Reason, ends: list[UtteranceEnd]) -> None:
        self._first, self._at_reset = None, True
        ends.append(UtteranceEnd(self._count, at, reason))


class RepetitionGuard(GuardFields):
    """Detect a decoder that is stuck in a repetition loop.

    A transducer can enter a loop in which the emitted labels cause it to emit them again, whatever the audio is. The
    rule: the decoder is reset if, at the end of two consecutive steps, the last `WINDOW` tokens are a sequence of at
    most `CYCLE` tokens repeated (at least six times) without a pause of more than `PAUSE_MS` between two tokens or
    after the last one. Tokens before a reset are not counted again. Speakers repeat words less often: the same digit 50
    times, with up to three tokens each, is not a loop.

    After the first of the two steps, the next step of the stream waits for the results of the previous one. The reset
    therefore occurs at the same position with and without overlapping steps, and does not depend on the pushes.
    """

    WINDOW, CYCLE, PAUSE_MS = 192, 32, 2000

    def __init__(self, manifest: Manifest) -> None:
        self._pause = self.PAUSE_MS * manifest.features.sample_rate // 1000
        self._start = 0  # tokens before the last reset
        self.loop_suspected = False  # whether the last step ended in a repetition

    def step(self, tokens: Sequence[int], sample_positions: Sequence[int], end_sample: int) -> bool:
        """Return whether the decoder must be reset after a step.

        `tokens` and `sample_positions` are those of the whole stream, `end_sample` is the end of the step.
        """
        if len(tokens) - self._start < self.WINDOW:
            self.loop_suspected = False
            return False
        loop = self._is_loop(tokens, sample_positions, end_sample)
        reset, self.loop_suspected = loop and self.loop_suspected, loop and not self.loop_suspected
        if reset:
            self._start = len(tokens)
        return reset

    def restart(self, count: int) -> None:
        """Ignore the first `count` tokens, after which the decoder was reset."""
        self._start, self.loop_suspected = count, False

    def save(self) -> dict[str, NDArray[Any]]:
        """Return the state that `load` restores."""
        return {"counts": np.array([self._start, self.loop_suspected], np.int64)}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a saved state. Raises `ValueError` if it is invalid."""
        start, suspected = saved_counts(state, "counts", 2)
        if suspected > 1:
            raise ValueError(f"the repetition guard's counts are {[start, suspected]}")
        self._start, self.loop_suspected = start, bool(suspected)

    def _is_loop(self, tokens: Sequence[int], sample_positions: Sequence[int], end_sample: int) -> bool:
        if end_sample - sample_positions[-1] > self._pause:
            return False
        if tokens[-1] not in tokens[-1 - self.CYCLE : -1]:  # most often; the test below takes longer
            return False
        tail = tokens[-self.WINDOW :]
        if not any(tail[-1 - c] == tail[-1] and tail[c:] == tail[:-c] for c in range(1, self.CYCLE + 1)):
            return False
        positions = sample_positions[-self.WINDOW :]
        return all(after - before <= self._pause for before, after in itertools.pairwise(positions))
