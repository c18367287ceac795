"""What a stream consists of for the scheduler: work items, the blocks of their audio, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import ChunkConfig

if TYPE_CHECKING:
    from nemostream.runtime.text.endpointing import UtteranceEnd

Floats = NDArray[np.float32]
Samples = NDArray[np.float32] | NDArray[np.int16]

INT16_SCALE = 2.0**-15  # of int16 samples; a power of two, so all products are exact
_NO_AUDIO: Floats = np.zeros(0, np.float32)


class WorkItem(NamedTuple):
    """The next item of a stream: a chunk to run, a chunk to skip, the forced end of an utterance, or a change of state.

    A change is a copy of the stream ("branch") or a reset of its decoder; it has no output.

    Samples count from the stream's start. The slot counts frames from its last reset and only those that were run: its
    frame f begins at sample `origin_sample` + f * `Manifest.samples_per_frame`.
    """

    kind: Literal["run", "skip", "end_of_utterance", "branch", "reset_decoder"]
    chunk: ChunkConfig
    end_sample: int  # samples of the stream processed or skipped, this item included
    origin_sample: int = 0
    audio: Samples = _NO_AUDIO  # [chunk.samples]; valid until `block`, which contains it, is recycled
    length: int = 0  # leading samples of `audio` that belong to the stream; the rest is zero
    reset_slot: bool = False  # the slot must be reset before the item is run
    prompt: int = 0  # id of the language (`LanguageConfig.prompts`)
    scale: float = 1.0  # by which `audio` must be multiplied: a step scales all its rows at once
    block: Any = None  # the `Block` of `audio`, if it is the last item in it (`Chunker.recycle`)


class StepOutput(NamedTuple):
    """The result of one work item. Its audio is not valid any more."""

    item: WorkItem
    count: int  # type: ignore[assignment]  # tokens in the stream's hypothesis after the item; hides `tuple.count`
    ends: Sequence[UtteranceEnd] = ()  # ends of utterances found with it


# Named tuples are created by tuple's constructor where every chunk of every stream passes, with a tuple of all fields:
# it is three times as fast.
new_item = partial(tuple.__new__, WorkItem)
new_output = partial(tuple.__new__, StepOutput)
