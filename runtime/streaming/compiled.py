"""The fields of the hot path's objects, and the choice between its methods in C and in Python.

Tens of thousands of chunks per second pass through a few methods. They exist twice: in Python, where they are defined,
and in C (`host.c`), which is compiled when the package is installed, if there is a C compiler. If it is not compiled,
the Python methods are used; the results are the same.

A class of the hot path is derived from the class of its fields. That is a C struct, whose members are attributes, or a
class with slots of the same names. A method with the decorator `compiled` is replaced by the one in C.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

Queue = deque  # or a class with the methods that are used, and less memory

F = TypeVar("F", bound=Callable[..., Any])


class BlockFields:
    __slots__ = ("audio", "chunks")


class RecordingFields:
    __slots__ = ("begin_sample", "end_sample", "reset_slot", "run_frames", "skipped_samples")


class ChunkerFields:
    __slots__ = (
        "_at",
        "_audio",
        "_begin",
        "_block",
        "_block_end",
        "_chunk_end",
        "_config",
        "_direct",
        "_frame",
        "_lead",
        "_number",
        "_queue",
        "_recording",
        "_scale",
        "_spare",
        "chunk",
        "prompt",
        "samples",
        "taken",
    )


class HypothesisFields:
    __slots__ = ("sample_positions", "scores", "sum_p_alpha", "tokens")


class EndpointerFields:
    __slots__ = (
        "_at_reset",
        "_backchannel",
        "_count",
        "_end_of_utterance",
        "_first",
        "_last",
        "_max_length",
        "_silence",
        "_word",
        "next_end",
    )


class GuardFields:
    __slots__ = ("_pause", "_start", "loop_suspected")


class StreamFields:
    __slots__ = (
        "chunker",
        "ended",
        "endpointer",
        "error",
        "guard",
        "hypothesis",
        "in_flight",
        "items",
        "outputs",
        "progress",
        "quiet_count",
        "quiet_until",
        "slot",
        "source",
        "trace",
    )


class SchedulerFields:
    __slots__ = ("_idle", "_lock", "_ready", "_rows")


class RemoteFields:
    __slots__ = ("_chunks", "_flushing", "_lock")


class RegionFields:
    __slots__ = ("_audio", "_begin", "_count", "_end", "_wrapped")


class PreprocessorFields:
    __slots__ = ("_heads", "_max_unchanged", "received", "sample_rate")


class SilenceFields:
    __slots__ = ("_max_zeros", "_zeros")


class SessionFields:
    __slots__ = (
        "_accepts_unchanged",
        "_end_sample",
        "_ended",
        "_event_builder",
        "_lanes",
        "_language_names",
        "_pending_outputs",
        "_prompt",
        "_received",
        "_scheduler",
        "_silence",
        "_stream",
        "_tokens",
        "chunk_ms",
        "preprocessor",
        "steps",
    )


class TokenFields:
    __slots__ = ("confidence", "end", "id", "language", "score", "tag", "text", "time")


class TranscriptFields:
    __slots__ = ("_cache", "parts", "tokens")


class DetokenizerFields:
    __slots__ = ("_added_texts", "_begun", "_incomplete", "_last", "_space", "_tokenizer", "_window", "text")


class UtteranceFields:
    __slots__ = (
        "_aggregation",
        "_detokenizer",
        "_invisible",
        "_text_end",
        "event_length",
        "event_parts",
        "event_tokens",
        "grouper",
        "language",
        "last_visible",
        "length",
        "set_language",
        "stable_length",
        "start",
        "transcript",
    )


class EventBuilderFields:
    __slots__ = (
        "_aggregation",
        "_backchannel",
        "_between_utterances",
        "_current",
        "_end_sample",
        "_first_token",
        "_number",
        "_rate",
        "_tokenizer",
        "token_count",
    )


class TokenListFields:
    __slots__ = (
        "_confidence_of",
        "_delay",
        "_frame",
        "_language_of_tag",
        "_rate",
        "_tags",
        "_texts",
        "languages",
        "tokens",
    )


if not TYPE_CHECKING:
    try:
        from nemostream.runtime.streaming._host import (  # noqa: F401
            BlockFields,
            ChunkerFields,
            DetokenizerFields,
            EndpointerFields,
            EventBuilderFields,
            GuardFields,
            HypothesisFields,
            PreprocessorFields,
            Queue,
            RecordingFields,
            RegionFields,
            RemoteFields,
            SchedulerFields,
            SessionFields,
            SilenceFields,
            StreamFields,
            TokenFields,
            TokenListFields,
            TranscriptFields,
            UtteranceFields,
            count_fork,
        )
    except ImportError:  # it was not compiled
        pass
    else:
        if hasattr(os, "register_at_fork"):  # Windows has no forks
            os.register_at_fork(after_in_child=count_fork)


def compiled(fields: type) -> Callable[[F], F]:
    """Return a decorator of a method: it returns the method of the same name of `fields`, if there is one."""
    return lambda method: fields.__dict__.get(method.__name__, method)
