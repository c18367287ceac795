"""The link between a transport and the engine: space for audio, frames, results, fields and errors."""

from __future__ import annotations

import os
import pickle
import socket
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nemostream
from nemostream.bundle import Bundle
from nemostream.errors import AudioError, BackendError, CapacityError, StreamError
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.streaming.state import Hypothesis, StepTimes
from nemostream.runtime.text.endpointing import Endpoint, Endpointer, RepetitionGuard, UtteranceEnd
from nemostream.runtime.text.tokenizer import Tokenizer
from nemostream.serving.processes import link

# Chunks of a few sizes are placed (True) and released in any order of the two operations.
OPERATIONS = st.lists(st.one_of(st.sampled_from([1, 2, 7, 14]), st.just(0)), max_size=200)


@given(OPERATIONS)
def test_chunks_in_a_region_never_overlap(operations: list[int]) -> None:
    """The model: a set of occupied positions. A chunk that fits behind the newest or at the beginning is placed."""
    size = 28
    audio = np.zeros(size, np.int16)
    region, held = link.Region(audio), list[tuple[int, int]]()
    for samples in operations:
        if samples == 0:
            if held:
                offset, length = held.pop(0)
                assert set(audio[offset : offset + length].tolist()) == {length}
                region.release(length)
            continue
        occupied = {position for offset, length in held for position in range(offset, offset + length)}
        place = region.write(np.full(samples, samples, np.int16))
        end = sum(held[-1]) if held else 0
        candidates = [
            start for start in (end, 0) if start + samples <= size and not occupied & set(range(start, start + samples))
        ]
        if place is None:
            # No space where the next chunk of a ring can be: behind the newest, or at the beginning if that is not
            # used since the newest chunk was placed.
            assert held and (not candidates or (candidates == [0] and end <= held[0][0]))
        else:
            assert place in candidates
            held.append((place, samples))


def test_an_empty_region_begins_anew() -> None:
    region = link.Region(np.zeros(28, np.int16))

    def write(words: int) -> int | None:
        return region.write(np.zeros(words, np.int16))

    for _ in range(5):
        assert write(7) == 0
        region.release(7)
    assert [write(14), write(14), write(1)] == [0, 14, None]
    region.release(14)
    assert [write(14), write(1)] == [0, None]


@given(st.lists(st.tuples(st.integers(1, 5), st.binary(max_size=40)), max_size=20), st.data())
def test_frames_are_received_in_any_parts(frames: list[tuple[int, bytes]], data: Any) -> None:
    stream = b"".join(link.frame(kind, payload) for kind, payload in frames)
    reader, received = link.FrameReader(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += [(kind, bytes(payload)) for kind, payload in reader(stream[:size])]
        stream = stream[size:]
    assert received == frames


def test_what_a_socket_does_not_take_is_sent_later() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        writer, data = link.FrameWriter(ours), os.urandom(1 << 20)
        done = writer.send(data) or writer.send(b"end")
        assert not done
        received = bytearray()
        while not done:
            received += theirs.recv(1 << 16)
            done = writer.send(b"")
        theirs.setblocking(True)
        while len(received) < len(data) + 3:
            received += theirs.recv(1 << 16)
        assert bytes(received) == data + b"end"
        assert writer.send(b"x") and theirs.recv(9) == b"x"


FLOATS = st.floats(width=32, allow_nan=False)
TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**50), FLOATS, FLOATS), max_size=5)
ENDS = st.lists(
    st.builds(UtteranceEnd, st.integers(0, 2**40), st.integers(0, 2**50), st.sampled_from(link._REASONS)), max_size=2
)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), TOKENS, ENDS), max_size=10))
def test_results_are_equal_after_packing(outputs: list[Any]) -> None:
    step = StepTimes(1.25, 2.5, len(outputs))
    results, hypothesis = link.Results(step), Hypothesis()
    for stream, tokens, ends in outputs:
        begin = len(hypothesis.tokens)
        if tokens:
            hypothesis.extend(*map(list, zip(*tokens, strict=True)))
        results.add(stream, hypothesis, begin, len(hypothesis.tokens), ends)
    found = link.Results.unpack(memoryview(results.pack()))
    assert found.step == step
    assert list(found.streams) == [stream for stream, _, _ in outputs]
    assert list(found.counts) == [len(tokens) for _, tokens, _ in outputs]
    assert found.tokens.tolist() == hypothesis.tokens and found.positions.tolist() == hypothesis.sample_positions
    assert found.scores.tolist() == hypothesis.scores and found.sum_p_alpha.tolist() == hypothesis.sum_p_alpha
    at = 0
    for (_, _, ends), count in zip(outputs, found.ends, strict=True):
        assert found.utterance_ends(at, count) == ends
        at += count


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Tokenizer]:
    bundle = Bundle.open(nemostream.demo_bundle())
    return bundle.manifest, Tokenizer(bundle.path / "tokenizer.model", bundle.manifest.decoder.vocabulary)


def test_fields_of_a_stream_share_the_tables_of_the_other_process(demo: Any) -> None:
    manifest, tokenizer = demo
    other = Tokenizer(nemostream.demo_bundle() / "tokenizer.model", manifest.decoder.vocabulary)
    endpointer = Endpointer.of_tokenizer(Endpoint(decoder="reset"), manifest, tokenizer)
    phrases = Boosting.from_phrases(["twenty"], tokenizer)
    fields = {"endpointer": endpointer, "guard": RepetitionGuard(manifest), "phrases": phrases, "saved_slot": None}
    data = link.dump_fields(fields, manifest, tokenizer)
    assert len(data) < 20_000  # without the tables
    found = link.load_fields(memoryview(data), manifest, other)
    assert set(found) == set(fields) and found["saved_slot"] is None
    assert vars(found["guard"]) == vars(fields["guard"])
    copy = found["endpointer"]
    assert copy._word_starts is other.word_starts and copy._closing_punctuation is other.closing_punctuation
    tables = ("_word_starts", "_closing_punctuation", "_invisible")
    assert {k: v for k, v in vars(copy).items() if k not in tables} == {
        k: v for k, v in vars(endpointer).items() if k not in tables
    }
    assert (found["phrases"].digest == phrases.digest).all() and len(found["phrases"]) == len(phrases)
    assert (found["phrases"].bias(1) == phrases.bias(1)).all()


def test_fields_have_classes_of_the_runtime_only(demo: Any) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    for fields in ({"guard": Harmful()}, {"phrases": Harmful()}):
        with pytest.raises(pickle.UnpicklingError, match="system"):
            link.load_fields(link.dump_fields(fields, *demo), *demo)


@pytest.mark.parametrize("error", [StreamError("a."), BackendError("b é."), CapacityError("c."), AudioError("d.")])
def test_errors_keep_their_class_and_sentence(error: Any) -> None:
    found = link.load_error(link.dump_error(error))
    assert type(found) is type(error) and str(found) == str(error)


def test_errors_of_other_classes_are_backend_errors() -> None:
    class OwnError(nemostream.NemostreamError):
        pass

    found = link.load_error(link.dump_error(OwnError("x.")))
    assert type(found) is BackendError and str(found) == "x."
    assert type(link.load_error(b'["Any", "x."]')) is BackendError


def test_shared_audio_is_one_memory(demo: Any) -> None:
    manifest, _ = demo
    file = link.SharedAudio.create(3, manifest)
    one, two = link.SharedAudio(file, manifest), link.SharedAudio(file, manifest)
    os.close(file)
    assert one.regions.shape == (3, 2 * 2 * max(chunk.samples for chunk in manifest.chunks))  # float32 has two words
    one.regions[1, 5:7] = 9
    assert two.regions[1, 4:8].tolist() == [0, 9, 9, 0] and not np.any(two.regions[[0, 2]])
