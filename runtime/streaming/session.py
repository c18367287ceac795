"""One open stream: audio in, results or events out. Only `wait`, `save` and opening with `block=True` block.

This module does not depend on the kind of backend, on batches or on asyncio.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig, Manifest
from nemostream.errors import OptionError, StreamError
from nemostream.runtime.audio.preprocessor import BLOCK, AudioPreprocessor
from nemostream.runtime.audio.silence import SilenceSplitter
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.scheduler import Scheduler
from nemostream.runtime.streaming.snapshot import Checkpointer, Digest, Stateful, StreamSnapshot
from nemostream.runtime.streaming.state import Hypothesis, StepOutput
from nemostream.runtime.text.endpointing import Endpoint, Endpointer, RepetitionGuard
from nemostream.runtime.text.events import Event, EventBuilder
from nemostream.runtime.text.languages import LanguageTags, reported_language
from nemostream.runtime.text.tokenizer import Detokenizer, Tokenizer
from nemostream.runtime.text.words import Result, Token

if TYPE_CHECKING:
    from nemostream.runtime.audio.vad import VadFilter

P = ParamSpec("P")
T = TypeVar("T")

Pcm = NDArray[Any]  # [N] or [N, channels]: int16, int32, or float in [-1, 1]


class Options(TypedDict, total=False):
    """
    chunk_ms: chunk size in milliseconds (default: the model's).
    endpoint: an `Endpoint`, the rules for the end of an utterance (default: none; for `listen`: `Endpoint()`).
    phrases: a list of phrases to boost, or a mapping of phrases to weights.
    confidence: a `Confidence`, the confidence measure (default: the model's).
    vad: skip chunks without speech; requires the `vad` extra (default: False).
    language: one of the model's `languages`, such as "de" or "de-DE" (default: the model's).
    """

    chunk_ms: int | None
    endpoint: Endpoint | None
    phrases: Mapping[str, float] | Sequence[str] | Boosting | None
    confidence: Confidence | None
    vad: bool
    language: str | None


_OPTIONS: dict[str, Any] = dict.fromkeys(Options.__annotations__) | {"vad": False}


def with_options(method: Callable[P, T]) -> Callable[P, T]:
    """Add the `Options` to the signature and the documentation of a method with `**options: Unpack[Options]`.

    The method raises a `TypeError` that lists the valid options for an unknown one, and an `OptionError` for a value of
    the wrong type.
    """
    signature = inspect.signature(method)
    parameters = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_OPTIONS[name], annotation=annotation)
        for name, annotation in Options.__annotations__.items()
    ]
    valid = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    names = {one.name for one in parameters}

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in names:
                raise TypeError(f"{method.__name__}() has no option {name!r}; its options are {', '.join(valid)}.")
        for name in ("sample_rate", "channels"):
            value: object = kwargs.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise OptionError(f"{name} is {value!r}; it must be a number, not {type(value).__name__}.")
        for name, type_ in (("endpoint", Endpoint), ("confidence", Confidence)):
            if not isinstance(value := kwargs.get(name), type_ | None):
                raise OptionError(f"{name} is {value!r}; it must be nemostream.{type_.__name__}(...) or None.")
        return method(*args, **kwargs)

    checked.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    checked.__doc__ = f"{inspect.getdoc(method)}\n\nOptions:\n\n{inspect.cleandoc(Options.__doc__ or '')}"
    return checked


class OpenSession(Protocol):
    """Opens a session with options that are already set."""

    def __call__(
        self, sample_rate: int, channels: int, listener: Callable[[], None] | None = None
    ) -> StreamSession: ...


@dataclass(frozen=True)
class SessionContext:
    """What all sessions of a model share."""

    scheduler: Scheduler
    manifest: Manifest
    tokenizer: Tokenizer
    delay_ms: int  # subtracted from the time of every token


class StreamSession:
    """An open stream. Opened by `Model.open_session`. For one thread at a time, except `close`.

    `listener` is called on the scheduler's thread when results may be available. With a `checkpointer`, the stream
    continues from its snapshot: the same audio must be fed again from the start, and is not run again. `block=True`
    waits for a free slot.
    """

    def __init__(
        self,
        context: SessionContext,
        sample_rate: int,
        channels: int,
        listener: Callable[[], None] | None = None,
        *,
        chunk: ChunkConfig,
        confidence: Confidence,
        endpoint: Endpoint | None = None,
        phrases: Boosting | None = None,
        vad: VadFilter | None = None,
        language: str | None = None,
        checkpointer: Checkpointer | None = None,
        block: bool = False,
    ) -> None:
        manifest, tokenizer = context.manifest, context.tokenizer
        self._scheduler, self._manifest, self._tokenizer = context.scheduler, manifest, tokenizer
        self._rate = manifest.features.sample_rate
        self._language_names = manifest.languages.by_prompt
        # Audio
        self.preprocessor = AudioPreprocessor(sample_rate, channels, self._rate)
        self._silence = SilenceSplitter(self.preprocessor.sample_rate)
        self._vad = vad
        self._ended = False  # `finish` was called
        # Results
        self._tokens = _TokenList(manifest, tokenizer, confidence, context.delay_ms)
        self._aggregation = confidence.aggregation
        self._pending_outputs: deque[StepOutput] = deque()  # of steps that no result or event covers yet
        self._end_sample = 0  # processed samples, up to the last output that was returned
        self.steps = 0  # chunks run, up to the last output that was returned
        self.chunk_ms = chunk.ms  # size of the last of these chunks
        self._prompt = manifest.languages.prompt(language)  # of the last output that was returned
        self._detokenizer = Detokenizer(tokenizer)
        self._text_tokens = 0  # tokens in the detokenizer's text
        self._last = Result("", (), 0.0, chunk.ms, False, aggregation=confidence.aggregation)
        self._event_builder = EventBuilder(
            tokenizer, confidence.aggregation, self._rate, backchannels=endpoint is not None and endpoint.model
        )
        self._end_reported = False  # whether `events` returned the stream's last event
        # State, restored from a snapshot if there is one
        self._endpointer = (
            Endpointer(
                endpoint,
                manifest,
                tokenizer.word_starts,
                tokenizer.closing_punctuation,
                tokenizer.invisible,
                tokenizer.end_of_utterance,
                tokenizer.backchannel,
            )
            if endpoint
            else None
        )
        self._guard = RepetitionGuard(manifest)
        hypothesis, chunker = Hypothesis(), Chunker(manifest, chunk, vad, self._prompt)
        self._checkpointer, self._digest = checkpointer, Digest()
        self._snapshot = checkpointer.load() if checkpointer else None  # None once its audio has been fed again
        if checkpointer and self._snapshot:
            nodes = len(phrases.fail) if phrases else 1
            parts = self._parts(chunker, hypothesis)
            checkpointer.restore(self._snapshot, parts, manifest.decoder.vocabulary, nodes)
            self._end_sample, self._prompt = chunker.end_sample, chunker.prompt
        # Last, so that an error above does not take a slot.
        self._stream = self._scheduler.open(
            chunker,
            listener,
            block,
            hypothesis=hypothesis,
            endpointer=self._endpointer,
            guard=self._guard,
            phrases=phrases,
            saved_slot=self._snapshot.parts["slot"] if self._snapshot else None,
        )
        self._tokens.extend(hypothesis, len(hypothesis.tokens))

    # -- audio ---------------------------------------------------------------------------------------------------------

    def feed(self, pcm: Pcm) -> None:
        """Queue audio at the scheduler.

        Raises `AudioError` if `pcm` is invalid (none of it is queued), `StreamError` after `finish`.
        """
        self._scheduler.check_process()  # first, because a forked child has no threads for the VAD either
        self._check_open()
        self.preprocessor.check(pcm)
        for begin in range(0, max(len(pcm), 1), BLOCK):
            for part, silent in self._silence.split(pcm[begin : begin + BLOCK]):
                if silent:
                    self._skip_silence(len(part))
                    continue
                for block in self.preprocessor.push(part):
                    self._accept(block)

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """Change the chunk size. Raises `OptionError` if the model does not support it."""
        self._scheduler.set_chunk(self._stream, self._manifest.chunk(chunk_ms))

    @property
    def language(self) -> str:
        """The name of the language that is set."""
        return self._language_names[self._stream.chunker.prompt]

    def set_language(self, language: str | None) -> None:
        """Change the language; None: to the model's default. Raises `OptionError` if the model does not support it."""
        self._scheduler.set_prompt(self._stream, self._manifest.languages.prompt(language))

    def end_utterance(self) -> None:
        """End the utterance. Raises `StreamError` after `finish`."""
        self._scheduler.check_process()
        self._check_open()
        self._accept(self.preprocessor.flush())
        self._silence.restart()
        self._scheduler.end_utterance(self._stream)

    def finish(self) -> None:
        """End the audio. Does nothing if already ended."""
        self._scheduler.check_process()
        if self._ended:
            return
        self._ended = True
        self._accept(self.preprocessor.finish())
        self._scheduler.finish(self._stream)

    def _check_open(self) -> None:
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")

    def _accept(self, block: NDArray[Any]) -> None:
        if self._in_snapshot(block):
            return
        if self._vad:
            self._vad.push(block)  # on this thread: on the scheduler's it would delay other streams
        self._scheduler.accept(self._stream, block)

    def _skip_silence(self, samples: int) -> None:
        """Accept digital silence of `samples` input samples, which is not run (`runtime/audio/silence.py`)."""
        self._accept(self.preprocessor.flush())
        rate = self.preprocessor.sample_rate
        before, self.preprocessor.received = self.preprocessor.received, self.preprocessor.received + samples
        count = self.preprocessor.received * self._rate // rate - before * self._rate // rate
        silence = np.zeros(count, np.float32)
        if self._in_snapshot(silence):
            return
        if self._vad:
            self._vad.push(silence)
        self._scheduler.skip_silence(self._stream, count)

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def save(self) -> StreamSnapshot:
        """Return a snapshot. Every complete chunk must have been processed."""
        stream, slot = self._stream, self._stream.slot
        assert slot is not None, "a stream that was not finished has a slot"
        parts = {name: part.save() for name, part in self._parts(stream.chunker, stream.hypothesis).items()}
        parts["slot"] = self._scheduler.call(lambda backend: backend.save(slot))
        return StreamSnapshot(parts, self._digest.samples, self._digest.value)

    @property
    def replaying(self) -> bool:
        """Whether audio that the snapshot already contains is still being fed."""
        return self._snapshot is not None

    def _parts(self, chunker: Chunker, hypothesis: Hypothesis) -> dict[str, Stateful]:
        """Return the parts of a snapshot except the slot."""
        parts: dict[str, Stateful | None] = {
            "chunker": chunker,
            "hypothesis": hypothesis,
            "guard": self._guard,
            "endpoint": self._endpointer,
            "vad": self._vad,
        }
        return {name: part for name, part in parts.items() if part}

    def _in_snapshot(self, block: NDArray[Any]) -> bool:
        """Return whether the snapshot already contains this audio. Raises `OptionError` if its audio differs."""
        if self._checkpointer is None:
            return False
        self._digest.add(block)
        snapshot = self._snapshot
        if snapshot is None:
            return False
        if self._digest.samples < snapshot.samples and not self._ended:
            return True
        if (self._digest.samples, self._digest.value) != (snapshot.samples, snapshot.digest):
            raise self._checkpointer.wrong_recording()
        self._snapshot = None
        return True

    # -- waiting -------------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether `finish` was called. Once the session has settled, the result is then final."""
        return self._ended

    @property
    def has_vad(self) -> bool:
        """Whether `feed` runs the VAD, which takes time."""
        return self._vad is not None

    def settled(self) -> bool:
        """Return whether every complete chunk was processed. Raises the stream's error if it failed."""
        return self._scheduler.settled(self._stream)

    def wait(self, backlog: int = 0) -> None:
        """Block until at most `backlog` complete chunks are unprocessed. Raises the stream's error if it failed."""
        self._scheduler.wait(self._stream, backlog)

    def close(self) -> None:
        """Release the slot without waiting for pending audio. Does nothing if it is released."""
        self._scheduler.cancel(self._stream)

    # -- results -------------------------------------------------------------------------------------------------------

    @property
    def result(self) -> Result:
        """The current result, from all audio processed so far. Does not consume pending results or events."""
        if self._last.final:
            return self._last
        self._fetch_outputs()
        tokens = self._tokens.tokens
        text = self._last.text
        if len(tokens) > len(self._last.tokens):
            text = Detokenizer(self._tokenizer).push([token.id for token in tokens])
        return self._current_result(text)

    def collect(self) -> list[Result]:
        """Return one partial result for each step since the last call."""
        self._fetch_outputs()
        results = []
        while self._pending_outputs:
            output = self._next_output()
            if output.item.kind != "run":
                continue
            text = self._last.text
            if output.count > self._text_tokens:  # without new tokens, share the string of the previous result
                new = self._tokens.tokens[self._text_tokens : output.count]
                text = self._detokenizer.push([token.id for token in new])
                self._text_tokens = output.count
            self._last = self._partial(text, output.count, self._end_sample, self.chunk_ms, self._prompt)
            results.append(self._last)
        return results

    def events(self) -> list[Event]:
        """Return the events since the last call. The last event of the stream follows when all steps are done."""
        self._fetch_outputs()
        tokens, seconds = self._tokens.tokens, self.preprocessor.seconds
        done = self._ended and self.settled()
        if done:
            self._tokens.clip(len(tokens), seconds)
        events: list[Event] = []
        while self._pending_outputs:
            output = self._next_output()
            language = self._language_names[self._prompt]
            events += self._event_builder.step(tokens, output.count, output.ends, seconds, self.chunk_ms, language)
        if done and not self._end_reported:
            self._end_reported = True
            samples, language = self._stream.chunker.samples, self._language_names[self._prompt]
            events += self._event_builder.finish(tokens, samples, seconds, self.chunk_ms, language)
        return events

    def final(self) -> Result:
        """Return the final result. All steps must be done."""
        if not self._last.final:
            self._fetch_outputs()
            tokens = self._tokens.tokens
            self._tokens.clip(len(tokens), self.preprocessor.seconds)
            result = self._current_result(self._tokenizer.decode([token.id for token in tokens]))
            self._last = dataclasses.replace(result, tokens=tuple(tokens), final=True)
        return self._last

    def discard_results(self) -> None:
        """Discard pending results."""
        self._fetch_outputs()
        while self._pending_outputs:
            self._next_output()

    @property
    def decoded(self) -> float:
        """Seconds of audio processed up to the last result. After `finish`: all, as the last steps cover the rest."""
        return self._decoded(self._end_sample)

    def _decoded(self, end_sample: int) -> float:
        seconds = self.preprocessor.seconds
        return seconds if self._ended else min(end_sample / self._rate, seconds)

    def _current_result(self, text: str) -> Result:
        """Return the result up to the newest output, which may be pending."""
        end_sample, chunk_ms, prompt = self._end_sample, self.chunk_ms, self._prompt
        for output in self._pending_outputs:
            end_sample, prompt = output.item.end_sample, output.item.prompt
            if output.item.kind == "run":
                chunk_ms = output.item.chunk.ms
        return self._partial(text, len(self._tokens.tokens), end_sample, chunk_ms, prompt)

    def _partial(self, text: str, count: int, end_sample: int, chunk_ms: int, prompt: int) -> Result:
        """Return a result that is not final, with the first `count` tokens."""
        tokens = self._last.tokens
        if count > len(tokens):
            tokens = tuple(self._tokens.tokens[:count])
        language = reported_language(self._language_names[prompt], self._tokens.languages.last(count))
        return Result(
            text,
            tokens,
            self.preprocessor.seconds,
            chunk_ms,
            False,
            self._decoded(end_sample),
            self._aggregation,
            language,
        )

    def _next_output(self) -> StepOutput:
        """Consume the next pending output."""
        output = self._pending_outputs.popleft()
        self._end_sample, self._prompt = output.item.end_sample, output.item.prompt
        if output.item.kind == "run":
            self.steps += 1
            self.chunk_ms = output.item.chunk.ms
        return output

    def _fetch_outputs(self) -> None:
        """Move the stream's outputs from the scheduler to the pending ones, and add their tokens."""
        outputs = self._scheduler.collect(self._stream)
        if not outputs:
            return
        self._pending_outputs += outputs
        self._tokens.extend(self._stream.hypothesis, outputs[-1].count)
        for output in outputs:
            if output.item.kind == "end_of_utterance":
                self._tokens.clip(output.count, output.item.end_sample / self._rate)


class _TokenList:
    """The `Token`s of a stream, made from its hypothesis, and its language tags. `tokens` is appended to in place."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, confidence: Confidence, delay_ms: int) -> None:
        self.tokens: list[Token] = []
        self.languages = LanguageTags()
        self._rate, self._frame = manifest.features.sample_rate, manifest.samples_per_frame
        self._delay = delay_ms * self._rate // 1000  # samples
        self._piece, self._tags, self._language_of_tag = tokenizer.piece, tokenizer.tags, tokenizer.languages.get
        self._confidence_of = confidence.token_measure(manifest.decoder.vocabulary + 1)

    def extend(self, hypothesis: Hypothesis, count: int) -> None:
        """Append the tokens of the hypothesis up to the first `count`."""
        new = slice(len(self.tokens), count)
        rate, frame = self._rate, self._frame
        positions = hypothesis.sample_positions[new]
        if self._delay:
            positions = [max(position - self._delay, 0) for position in positions]
        self.tokens += [
            Token(
                id_,
                self._piece(id_),
                position / rate,
                (position + frame) / rate,
                score,
                self._confidence_of(score, sum_p_alpha),
                self._language_of_tag(id_),
                id_ in self._tags,
            )
            for id_, position, score, sum_p_alpha in zip(
                hypothesis.tokens[new], positions, hypothesis.scores[new], hypothesis.sum_p_alpha[new], strict=True
            )
        ]
        self.languages.extend(map(self._language_of_tag, hypothesis.tokens[new]))

    def clip(self, count: int, end: float) -> None:
        """Clip the first `count` tokens to the end of their recording (seconds). Its last frames extend beyond it."""
        while count and self.tokens[count - 1].end > end:
            count -= 1
            self.tokens[count] = dataclasses.replace(self.tokens[count], end=end)
