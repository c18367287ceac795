"""The link between a transport and the engine: a socket for packed messages, and shared memory for audio.

The socket carries frames ``<kind: uint32> <size: uint32> <payload>``, in both directions in order:

=============== ============ =======================================================================
from            kind         payload
=============== ============ =======================================================================
transport       `OPEN`       stream (uint32), then the stream's fields (`dump_fields`)
transport       `ITEMS`      `ITEM` records: work items, and branches, ends and cancellations of streams
engine          `RESULTS`    `Results`: the outputs of one step, and its times if the server records them
engine          `ERROR`      stream (uint32), then JSON: name of the class and message
engine          `CLOSED`     streams (uint32 each) whose slots are released
engine          `SAVED`      stream (uint32), then the answer to `SAVE`: parts of a snapshot (`dump_parts`) or nothing
=============== ============ =======================================================================

Audio is in anonymous shared memory, which both processes map: a region for each stream, in which the transport places
chunks (`Region`), as int16 if it was received as int16. The transport writes a chunk before it sends the item, and
reuses the space after it has received the item's output, so the socket orders the accesses. At the end of either
process the other one reads end-of-file.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import socket
import struct
from array import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from nemostream.bundle import Manifest
from nemostream.errors import NemostreamError
from nemostream.runtime.streaming.compiled import RegionFields, compiled
from nemostream.runtime.streaming.snapshot import SavedArrays
from nemostream.runtime.streaming.state import Hypothesis, StepTimes
from nemostream.runtime.text.endpointing import Reason, UtteranceEnd
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.serving.errors import error_of

FRAME = struct.Struct("=II")
OPEN, ITEMS, RESULTS, ERROR, CLOSED, SAVED = range(1, 7)

# Both processes run on one machine, so the byte order is that of the machine.
# kind, reset_slot, index of the chunk size, stream, prompt, offset in the region (int16 words), length, end_sample,
# origin_sample
ITEM = struct.Struct("=BBHIiIIqq")
ITEM_DTYPE = np.dtype(
    {
        "names": ["kind", "reset_slot", "size", "stream", "prompt", "offset", "length", "end_sample", "origin_sample"],
        "formats": ["u1", "u1", "u2", "u4", "i4", "u4", "u4", "i8", "i8"],
    }
)
# Kinds of items: chunks of float32 and of int16 audio to run, and others; no items follow `LAST` and `CANCEL`.
# `BRANCH` opens a stream whose number is `offset`, with the fields of the other; `reset_slot` is its `may_branch`.
# `SAVE` requests the state of a stream after the items before it.
RUN, RUN_INT16, SKIP, END_OF_UTTERANCE, RESET_DECODER, BRANCH, SAVE, LAST, CANCEL = range(9)
ITEM_KINDS = {"run": RUN, "skip": SKIP, "end_of_utterance": END_OF_UTTERANCE, "reset_decoder": RESET_DECODER}
ITEM_NAMES: dict[int, Any] = {number: name for name, number in ITEM_KINDS.items()}
STREAM = struct.Struct("=I")

_REASONS: tuple[Reason, ...] = get_args(Reason)
_RESULTS_HEAD = struct.Struct("=IIIddI")  # number of outputs, tokens, ends; `StepTimes`
_SOCKET_BYTES = 4 << 20
_REGION_CHUNKS = 2  # of the largest size that fit in a region
_MODULES = ("nemostream.runtime.", "numpy.")  # whose classes a stream's fields may have


# -- audio -------------------------------------------------------------------------------------------------------------


class SharedAudio:
    """Shared memory for the audio of a transport's streams: `regions` [regions, words], words of 16 bits."""

    def __init__(self, file: int, manifest: Manifest) -> None:
        """Map the memory with descriptor `file`, which may be closed afterwards."""
        size = os.fstat(file).st_size
        self.regions: NDArray[np.int16] = np.frombuffer(mmap.mmap(file, size), np.int16).reshape(
            -1, 2 * _REGION_CHUNKS * max(chunk.samples for chunk in manifest.chunks)
        )

    @staticmethod
    def create(regions: int, manifest: Manifest) -> int:
        """Create the memory and return its descriptor. Pages that are never used take no space."""
        file = os.memfd_create("nemostream-audio", os.MFD_CLOEXEC)
        os.ftruncate(file, regions * _REGION_CHUNKS * max(chunk.samples for chunk in manifest.chunks) * 4)
        return file


class Region(RegionFields):
    """The space for the audio of a stream, in words: chunks are written and released in order.

    An empty region is used from its beginning again, so a stream without a backlog uses few pages.
    """

    def __init__(self, audio: NDArray[np.int16]) -> None:
        self._audio = audio  # the memory
        self._begin = self._end = 0  # of the oldest chunk, and of the newest
        self._wrapped = 0  # if newer chunks are before the oldest one: where the chunks behind it end
        self._count = 0  # chunks

    @compiled(RegionFields)
    def write(self, words: NDArray[np.int16]) -> int | None:
        """Write a chunk and return its offset; None if there is no space now."""
        offset, count = 0, len(words)
        if not self._count:
            self._begin = 0
        elif self._wrapped:  # free: between the newest and the oldest
            if self._end + count > self._begin:
                return None
            offset = self._end
        elif self._end + count <= len(self._audio):
            offset = self._end
        elif count <= self._begin:
            self._wrapped = self._end
        else:
            return None
        self._audio[offset : offset + count] = words
        self._end = offset + count
        self._count += 1
        return offset

    @compiled(RegionFields)
    def release(self, words: int) -> None:
        """Release the oldest chunk, which has `words` words."""
        self._count -= 1
        self._begin += words
        if self._wrapped and self._begin == self._wrapped:
            self._begin = self._wrapped = 0


# -- frames ------------------------------------------------------------------------------------------------------------


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a link."""
    pair = socket.socketpair()
    for end in pair:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return pair


def frame(kind: int, payload: bytes | bytearray) -> bytes:
    """Return a frame."""
    return FRAME.pack(kind, len(payload)) + payload


class FrameReader:
    """Splits received bytes into frames."""

    def __init__(self) -> None:
        self._rest = b""
        self._parts: list[bytes] = []  # of a long frame, after `_rest`: they are joined once, when it is complete
        self._missing = 0  # bytes of it

    def __call__(self, data: bytes) -> list[tuple[int, memoryview]]:
        """Return the complete frames: kind and payload."""
        if self._missing > len(data):
            self._parts.append(data)
            self._missing -= len(data)
            return []
        if self._rest:
            data = b"".join([self._rest, *self._parts, data])
            self._parts, self._missing = [], 0
        view, at, frames = memoryview(data), 0, []
        while at + FRAME.size <= len(data):
            kind, size = FRAME.unpack_from(data, at)
            end = at + FRAME.size + size
            if end > len(data):
                self._missing = end - len(data)
                break
            frames.append((kind, view[at + FRAME.size : end]))
            at = end
        self._rest = data[at:]
        return frames


class FrameWriter:
    """Sends frames without blocking. Not thread-safe."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._rest = bytearray()

    @property
    def is_done(self) -> bool:
        """Whether the data of all calls of `send` was sent."""
        return not self._rest

    def send(self, data: bytes | bytearray) -> bool:
        """Send, after what is left of earlier calls. Return whether all was sent; call again when the link is writable.

        Raises `OSError` if the other process ended.
        """
        if self._rest:
            self._rest += data
            data = self._rest
        sent = 0
        try:
            while sent < len(data):
                sent += self._link.send(memoryview(data)[sent:])
        except BlockingIOError:
            pass
        self._rest = bytearray(memoryview(data)[sent:])
        return self.is_done


# -- results -----------------------------------------------------------------------------------------------------------


class Results:
    """The outputs of one step, packed row by row."""

    def __init__(self, step: StepTimes) -> None:
        self.step = step
        self.streams, self.counts, self.ends = array("I"), array("I"), array("I")  # per output
        self.tokens, self.scores, self.sum_p_alpha = array("i"), array("f"), array("f")  # per token
        self.positions = array("q")
        self.end_counts, self.end_samples, self.end_reasons = array("q"), array("q"), array("B")  # per end

    def add_empty(self, streams: NDArray[Any]) -> None:
        """Add outputs without tokens and ends, one for each stream of the array."""
        self.streams.frombytes(streams.astype(np.uint32).tobytes())
        for column in (self.counts, self.ends):
            column.frombytes(bytes(len(streams) * column.itemsize))

    def add(self, stream: int, hypothesis: Hypothesis, begin: int, end: int, ends: Sequence[UtteranceEnd]) -> None:
        """Add an output with the tokens [begin, end) of a hypothesis, and the ends of utterances found with them."""
        self.streams.append(stream)
        self.counts.append(end - begin)
        self.ends.append(len(ends))
        if end == begin + 1:  # most often
            self.tokens.append(hypothesis.tokens[begin])
            self.positions.append(hypothesis.sample_positions[begin])
            self.scores.append(hypothesis.scores[begin])
            self.sum_p_alpha.append(hypothesis.sum_p_alpha[begin])
        elif end > begin:
            self.tokens.extend(hypothesis.tokens[begin:end])
            self.positions.extend(hypothesis.sample_positions[begin:end])
            self.scores.extend(hypothesis.scores[begin:end])
            self.sum_p_alpha.extend(hypothesis.sum_p_alpha[begin:end])
        for one in ends:
            self.end_counts.append(one.token_count)
            self.end_samples.append(one.end_sample)
            self.end_reasons.append(_REASONS.index(one.reason))

    def pack(self) -> bytes:
        """Return the payload of a frame."""
        columns = self._columns()
        head = _RESULTS_HEAD.pack(len(self.streams), len(self.tokens), len(self.end_counts), *self.step)
        return head + b"".join([column.tobytes() for column in columns])

    @classmethod
    def unpack(cls, payload: memoryview) -> Results:
        """Return the results of which `payload` was packed."""
        *sizes, started, ended, streams = _RESULTS_HEAD.unpack_from(payload)
        results = cls(StepTimes(started, ended, streams))
        at = _RESULTS_HEAD.size
        for column, size in zip(results._columns(), [sizes[0]] * 3 + [sizes[1]] * 4 + [sizes[2]] * 3, strict=True):
            end = at + size * column.itemsize
            column.frombytes(payload[at:end])
            at = end
        return results

    def utterance_ends(self, begin: int, count: int) -> list[UtteranceEnd]:
        """Return the ends [begin, begin + count)."""
        return [
            UtteranceEnd(self.end_counts[at], self.end_samples[at], _REASONS[self.end_reasons[at]])
            for at in range(begin, begin + count)
        ]

    def _columns(self) -> tuple[array[Any], ...]:
        tokens = (self.tokens, self.positions, self.scores, self.sum_p_alpha)
        return (self.streams, self.counts, self.ends, *tokens, self.end_counts, self.end_samples, self.end_reasons)


# -- opening and errors ------------------------------------------------------------------------------------------------


def dump_fields(fields: Mapping[str, Any], manifest: Manifest, tokenizer: Tokenizer) -> bytes:
    """Return the fields of a stream's state for the other process.

    Tables of the tokenizer, which all streams share, are replaced by their names.
    """
    names = {id(table): name for name, table in _shared_objects(manifest, tokenizer).items()}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> str | None:
            return names.get(id(value))

    # Phrases refer to no table, and may have tens of thousands of nodes: they are written without the calls above.
    phrases = pickle.dumps(fields.get("phrases"), pickle.HIGHEST_PROTOCOL)
    buffer = io.BytesIO()
    Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump({**fields, "phrases": phrases})
    return buffer.getvalue()


def dump_parts(parts: Mapping[str, SavedArrays]) -> bytes:
    """Return parts of a snapshot for the other process."""
    return pickle.dumps(parts, pickle.HIGHEST_PROTOCOL)


def load_parts(data: memoryview) -> dict[str, SavedArrays]:
    """Return the parts that `dump_parts` was called with. Raises `UnpicklingError` for classes of other modules."""
    parts: dict[str, SavedArrays] = _Unpickler(data).load()
    return parts


def load_fields(data: bytes | memoryview, manifest: Manifest, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the fields that `dump_fields` was called with. Raises `UnpicklingError` for classes of other modules."""
    fields: dict[str, Any] = _Unpickler(data, _shared_objects(manifest, tokenizer)).load()
    fields["phrases"] = _Unpickler(fields["phrases"]).load()
    return fields


class _Unpickler(pickle.Unpickler):
    """Loads objects of this package's runtime and of NumPy only; `shared` are those that were replaced by names."""

    def __init__(self, data: bytes | memoryview, shared: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(io.BytesIO(data))
        self._shared = shared

    def persistent_load(self, name: str) -> Any:
        return self._shared[name]

    def find_class(self, module: str, name: str) -> Any:
        if not f"{module}.".startswith(_MODULES):
            raise pickle.UnpicklingError(f"the fields of a stream have an object of {module}.{name}.")
        return super().find_class(module, name)


def _shared_objects(manifest: Manifest, tokenizer: Tokenizer) -> dict[str, Any]:
    tables = ("word_starts", "closing_punctuation", "invisible")
    return {"manifest": manifest} | {name: getattr(tokenizer, name) for name in tables}


def dump_error(error: NemostreamError) -> bytes:
    """Return an error for the other process."""
    return json.dumps([type(error).__name__, str(error)]).encode()


def load_error(data: bytes) -> NemostreamError:
    """Return the error that `dump_error` was called with."""
    return error_of(*json.loads(data))
