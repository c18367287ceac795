"""One stream as its user sees it, all but the waiting: audio in; results, or events, out.

What the module does not know: which backend, batches, asyncio.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemostream.errors import OptionError, StreamError
from nemostream.runtime.audio.preprocessor import BLOCK, AudioPreprocessor
from nemostream.runtime.audio.silence import SilenceSplitter
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.confidence import Confidence
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.snapshot import Checkpointer, Digest, Stateful, StreamSnapshot
from nemostream.runtime.streaming.state import StepOutput
from nemostream.runtime.text.endpointing import Endpoint, Endpointer, RepetitionGuard
from nemostream.runtime.text.events import Event, EventBuilder
from nemostream.runtime.text.tokenizer import Detokenizer
from nemostream.runtime.text.words import Result, Token

if TYPE_CHECKING:
    from nemostream.runtime.model import Model

P = ParamSpec("P")
T = TypeVar("T")

Pcm = NDArray[Any]  # [N] or [N, channels]: int16, int32, or float in [-1, 1]


class Options(TypedDict, total=False):
    """
    chunk_ms: chunk size in milliseconds (default: the model's).
    endpoint: an `Endpoint`, the rule by which utterances end (default: never by themselves; of `listen`: `Endpoint()`).
    phrases: a list of phrases to boost, or a mapping of phrases to weights.
    confidence: a `Confidence`, the measure of confidence (default: the model's).
    vad: whether chunks without speech are passed over; needs the `vad` extra (default: False).
    """

    chunk_ms: int | None
    endpoint: Endpoint | None
    phrases: Mapping[str, float] | Sequence[str] | Boosting | None
    confidence: Confidence | None
    vad: bool


_OPTIONS: dict[str, Any] = dict.fromkeys(Options.__annotations__) | {"vad": False}


def with_options(method: Callable[P, T]) -> Callable[P, T]:
    """Give a method that takes `**options: Unpack[Options]` their names in its signature and in its documentation.

    An unknown option raises a `TypeError` that lists those there are, before anything is done; a number that is none
    raises an `OptionError`.
    """
    signature = inspect.signature(method)
    parameters = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_OPTIONS[name], annotation=annotation)
        for name, annotation in Options.__annotations__.items()
    ]
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    names = {one.name for one in parameters}

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in names:
                raise TypeError(f"{method.__name__}() has no option {name!r}; its options are {', '.join(known)}.")
        for name in ("sample_rate", "channels"):
            value: object = kwargs.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise OptionError(f"{name} is {value!r}; it must be a number, not {type(value).__name__}.")
        for name, kind in (("endpoint", Endpoint), ("confidence", Confidence)):
            if not isinstance(value := kwargs.get(name), kind | None):
                raise OptionError(f"{name} is {value!r}; it must be nemostream.{kind.__name__}(...) or None.")
        return method(*args, **kwargs)

    checked.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    checked.__doc__ = f"{inspect.getdoc(method)}\n\nOptions:\n\n{inspect.cleandoc(Options.__doc__ or '')}"
    return checked


class StreamSession:
    """A stream that was opened. For one thread at a time (`close` may come from another).

    With a `checkpointer` the stream goes on from what that has saved, once the same audio was fed again. Who is `block`
    waits for a slot if none is free.
    """

    def __init__(
        self,
        model: Model,
        sample_rate: int,
        channels: int,
        listener: Callable[[], None] | None = None,
        *,
        chunk_ms: int | None = None,
        endpoint: Endpoint | None = None,
        phrases: Mapping[str, float] | Sequence[str] | Boosting | None = None,
        confidence: Confidence | None = None,
        vad: bool = False,
        checkpointer: Checkpointer | None = None,
        block: bool = False,
    ) -> None:
        model._scheduler.check_process()
        manifest, tokenizer = model.manifest, model._tokenizer
        chunk = manifest.chunk(model.chunk_ms if chunk_ms is None else chunk_ms)
        sure = confidence or model.confidence
        self.preprocessor = AudioPreprocessor(sample_rate, channels, manifest.features.sample_rate)
        self._scheduler, self._manifest, self._tokenizer = model._scheduler, manifest, tokenizer
        self._sure = sure.token_measure(manifest.decoder.vocabulary + 1)
        self._aggregation = sure.aggregation
        self._rate, self._frame = manifest.features.sample_rate, manifest.samples_per_frame
        self._late = model.delay_ms * self._rate // 1000  # samples taken off every token's place
        self._tokens: list[Token] = []
        self._untold: deque[StepOutput] = deque()
        self._shown = 0  # tokens in `_text`
        self._text = Detokenizer(tokenizer)
        self._utterances = EventBuilder(tokenizer, sure.aggregation, self._rate)
        self._ended = self._over = False
        self._end_sample = 0  # samples
        self.steps = 0  # that were told of
        self.chunk_ms = chunk.ms  # of the last of them
        self._last = Result("", (), 0.0, chunk.ms, False, aggregation=sure.aggregation)
        self._gate = model._gate() if vad else None
        self._endpointer = (
            Endpointer(endpoint, manifest, tokenizer.word_starts, tokenizer.closing_punctuation) if endpoint else None
        )
        self._guard = RepetitionGuard(manifest)
        self._silence = SilenceSplitter(self.preprocessor.sample_rate)
        stream = Chunker(manifest, chunk, self._gate)
        self._checkpointer, self._digest = checkpointer, Digest()
        self._saved = (
            checkpointer.load() if checkpointer else None
        )  # until the audio that it was saved of was fed again
        boosting = (
            phrases if phrases is None or isinstance(phrases, Boosting) else Boosting.from_phrases(phrases, tokenizer)
        )
        if checkpointer and self._saved:
            nodes = len(boosting.fail) if boosting else 1
            checkpointer.restore(self._saved, self._parts(stream), manifest.decoder.vocabulary, nodes)
            self._end_sample = stream.end_sample
        slot = self._saved.parts["slot"] if self._saved else None
        # Last: whatever fails above must not cost a slot.
        self._state = self._scheduler.open(
            stream, listener, block, endpointer=self._endpointer, guard=self._guard, phrases=boosting, saved=slot
        )
        self._remember(len(stream.hypothesis.tokens))

    # -- audio ---------------------------------------------------------------------------------------------------------

    def feed(self, pcm: Pcm) -> None:
        """Hand audio to the scheduler. Raises `AudioError` before, and `StreamError` after the end of the stream."""
        self._scheduler.check_process()  # first: the VAD's threads are missing in a forked child too
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")
        self.preprocessor.check(pcm)  # all of it, before any is taken
        for begin in range(0, max(len(pcm), 1), BLOCK):
            for part, silent in self._silence.split(pcm[begin : begin + BLOCK]):
                if silent:
                    self._pass_over(len(part))
                    continue
                for block in self.preprocessor.push(part):
                    self._accept(block)

    def set_chunk_ms(self, chunk_ms: int) -> None:
        """Go on in chunks of another size. Raises `OptionError` if the model was not trained for it."""
        self._scheduler.set_chunk(self._state, self._manifest.chunk(chunk_ms))

    def end_utterance(self) -> None:
        """End the utterance here."""
        self._scheduler.check_process()
        if self._ended:
            raise StreamError("the stream was finished; open a new one for more audio.")
        self._accept(self.preprocessor.flush())
        self._silence.restart()
        self._scheduler.end_utterance(self._state)

    def finish(self) -> None:
        """No more audio. Does nothing the second time."""
        self._scheduler.check_process()
        if self._ended:
            return
        self._ended = True
        self._accept(self.preprocessor.finish())
        self._scheduler.finish(self._state)

    def _parts(self, stream: Chunker) -> dict[str, Stateful]:
        """What is saved of a stream, but for its slot."""
        parts: dict[str, Stateful | None] = {
            "stream": stream,
            "hypothesis": stream.hypothesis,
            "guard": self._guard,
            "endpoint": self._endpointer,
            "gate": self._gate,
        }
        return {name: part for name, part in parts.items() if part}

    def save(self) -> StreamSnapshot:
        """What the stream is, every complete chunk being decoded."""
        stream, slot = self._state.chunker, self._state.slot
        assert slot is not None, "a stream that goes on has a slot"
        parts = {name: part.save() for name, part in self._parts(stream).items()}
        parts["slot"] = self._scheduler.call(lambda backend: backend.save(slot))
        return StreamSnapshot(parts, self._digest.samples, self._digest.value)

    def _heard_before(self, block: NDArray[Any]) -> bool:
        """Whether this audio is in what was saved. Raises `OptionError` if other audio is."""
        if self._checkpointer is None:
            return False
        self._digest.add(block)
        if self._saved is None:
            return False
        if self._digest.samples < self._saved.samples and not self._ended:
            return True
        if (self._digest.samples, self._digest.value) != (self._saved.samples, self._saved.digest):
            raise self._checkpointer.refuse_audio()
        self._saved = None
        return True

    def _accept(self, block: NDArray[Any]) -> None:
        if self._heard_before(block):
            return
        if self._gate:
            self._gate.push(block)  # here and not at the scheduler, where others would wait for it
        self._scheduler.accept(self._state, block)

    def _pass_over(self, samples: int) -> None:
        """Take in digital silence of so many samples of the input, which is not run (`runtime/audio/silence.py`)."""
        self._accept(self.preprocessor.flush())
        rate = self.preprocessor.sample_rate
        before, self.preprocessor.received = self.preprocessor.received, self.preprocessor.received + samples
        count = self.preprocessor.received * self._rate // rate - before * self._rate // rate
        silence = np.zeros(count, np.float32)
        if self._heard_before(silence):
            return
        if self._gate:
            self._gate.push(silence)
        self._scheduler.pass_over(self._state, count)

    # -- waiting -------------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether `finish` was called: when it has settled, the result is final."""
        return self._ended

    @property
    def gated(self) -> bool:
        """Whether audio is looked through for speech as it is fed, which is work."""
        return self._gate is not None

    @property
    def behind(self) -> bool:
        """Whether what was saved is still being fed again."""
        return self._saved is not None

    def settled(self) -> bool:
        """Whether every chunk that is complete is decoded. Raises what the stream died of."""
        return self._scheduler.settled(self._state)

    def wait(self, backlog: int = 0) -> None:
        """Block until all but `backlog` complete chunks are decoded. Raises what the stream died of."""
        self._scheduler.wait(self._state, backlog)

    def close(self) -> None:
        """Give the slot back, now. Does nothing if that is done."""
        self._scheduler.cancel(self._state)

    # -- what was said -------------------------------------------------------------------------------------------------

    @property
    def result(self) -> Result:
        """What was said up to now, of all the audio received up to now. Takes nothing from `collect` and `events`."""
        if self._last.final:
            return self._last
        self._take_in()
        text = self._last.text
        if len(self._tokens) > len(self._last.tokens):
            text = Detokenizer(self._tokenizer).push([token.id for token in self._tokens])
        return self._result(text, len(self._tokens), *self._newest())

    def collect(self) -> list[Result]:
        """A partial result of every step since the last call."""
        self._take_in()
        results = []
        while self._untold:
            heard = self._next()
            if heard.item.kind != "run":
                continue
            text = self._last.text
            if heard.count > self._shown:  # a step that said nothing shares its text with the one before
                text = self._text.push([token.id for token in self._tokens[self._shown : heard.count]])
                self._shown = heard.count
            self._last = self._result(text, heard.count, self._end_sample, self.chunk_ms)
            results.append(self._last)
        return results

    def events(self) -> list[Event]:
        """What became known since the last call; the stream's last event, once every step of it is in."""
        self._take_in()
        over = self._ended and self.settled()
        if over:
            self._clip(len(self._tokens), self.preprocessor.seconds)
        events: list[Event] = []
        while self._untold:
            heard = self._next()
            events += self._utterances.step(
                self._tokens, heard.count, heard.ends, self.preprocessor.seconds, self.chunk_ms
            )
        if over and not self._over:
            self._over = True
            at = self._state.chunker.samples
            events += self._utterances.finish(self._tokens, at, self.preprocessor.seconds, self.chunk_ms)
        return events

    def final(self) -> Result:
        """The final result, once every step is in."""
        if not self._last.final:
            self._take_in()
            self._clip(len(self._tokens), self.preprocessor.seconds)
            text = self._tokenizer.decode([token.id for token in self._tokens])
            newest = self._result(text, len(self._tokens), *self._newest())
            self._last = dataclasses.replace(newest, tokens=tuple(self._tokens), final=True)
        return self._last

    def discard_results(self) -> None:
        """As `collect`, for nobody."""
        self._take_in()
        while self._untold:
            self._next()

    @property
    def decoded(self) -> float:
        """Seconds of audio decoded so far. The last steps, which run when the stream has ended, leave nothing over."""
        return self._decoded(self._end_sample)

    def _decoded(self, end_sample: int) -> float:
        seconds = self.preprocessor.seconds
        return seconds if self._ended else min(end_sample / self._rate, seconds)

    def _result(self, text: str, count: int, end_sample: int, chunk_ms: int) -> Result:
        tokens = self._last.tokens
        if count > len(tokens):
            tokens = tuple(self._tokens[:count])
        return Result(
            text, tokens, self.preprocessor.seconds, chunk_ms, False, self._decoded(end_sample), self._aggregation
        )

    def _next(self) -> StepOutput:
        """What is to be told of next."""
        heard = self._untold.popleft()
        self._end_sample = heard.item.end_sample
        if heard.item.kind == "run":
            self.steps += 1
            self.chunk_ms = heard.item.chunk.ms
        return heard

    def _newest(self) -> tuple[int, int]:
        """How far the model has heard (samples), and its last chunk's size, be it told of or not."""
        sizes = [heard.item.chunk.ms for heard in self._untold if heard.item.kind == "run"]
        return self._untold[-1].item.end_sample if self._untold else self._end_sample, sizes[
            -1
        ] if sizes else self.chunk_ms

    def _take_in(self) -> None:
        heard = self._scheduler.collect(self._state)
        if not heard:
            return
        self._untold += heard
        self._remember(heard[-1].count)
        for one in heard:
            if one.item.kind == "end_of_utterance":
                self._clip(one.count, one.item.end_sample / self._rate)

    def _clip(self, count: int, end: float) -> None:
        """A recording ends there, with the first `count` tokens. Its last frames reach beyond it; tokens must not."""
        while count and self._tokens[count - 1].end > end:
            count -= 1
            self._tokens[count] = dataclasses.replace(self._tokens[count], end=end)

    def _remember(self, count: int) -> None:
        """Make tokens of the first `count` of the hypothesis."""
        new = slice(len(self._tokens), count)
        said = self._state.chunker.hypothesis
        piece, sure, rate, frame = self._tokenizer.piece, self._sure, self._rate, self._frame
        sample_positions = (
            [max(sample_pos - self._late, 0) for sample_pos in said.sample_positions[new]]
            if self._late
            else said.sample_positions[new]
        )
        self._tokens += [
            Token(i, piece(i), sample_pos / rate, (sample_pos + frame) / rate, score, sure(score, sum_p_alpha))
            for i, sample_pos, score, sum_p_alpha in zip(
                said.tokens[new], sample_positions, said.scores[new], said.sum_p_alpha[new], strict=True
            )
        ]
