"""The scheduler gives every stream the results of the reference, whatever the batches, threads and other streams are.

The backend's tokens are a checksum of everything that the slot received, its decoder resets included, so a chunk or a
reset at another place changes all later tokens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import threading
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemostream.bundle import LanguageConfig
from nemostream.errors import StreamError
from nemostream.runtime.streaming.chunker import Chunker
from nemostream.runtime.streaming.items import StepOutput, WorkItem
from nemostream.runtime.streaming.rows import ROW
from nemostream.runtime.streaming.scheduler import Scheduler
from nemostream.runtime.text.endpointing import Endpoint, Endpointer, RepetitionGuard

TIMEOUT = 20
LANGUAGES = LanguageConfig("de-DE", {"en-US": 0, "de-DE": 3}, 4)
LEVELS = {"quiet": 0.01, "speech": 0.1, "loop": 0.3, "bad": 0.9}  # absolute value of the samples
VOCABULARY = 16  # token ids that are emitted
WORD_STARTS = [token % 3 != 0 for token in range(VOCABULARY)]
CLOSING, INVISIBLE, END_OF_UTTERANCE, BACKCHANNEL = [token == 4 for token in range(VOCABULARY)], {8, 9}, 8, 9
RULES = {
    "none": None,
    "silence": Endpoint(silence_ms=240),
    "silence, reset": Endpoint(silence_ms=240, decoder="reset"),
    "length": Endpoint(silence_ms=None, max_utterance_ms=1000, model=False),
    "all, reset": Endpoint(silence_ms=800, max_utterance_ms=1500, decoder="reset"),
}


@pytest.fixture(scope="module")
def prompted(manifest):
    return dataclasses.replace(manifest, languages=LANGUAGES)


@pytest.fixture(scope="module")
def talking(fake):
    """A fake whose tokens depend on the level of each frame: none, some words, an endless repetition, or a failure."""

    class Talking(fake.FakeBackend):
        def reset_decoder(self, slots):
            super().reset_decoder(slots)
            for slot in slots.tolist():
                assert self.in_flight[slot] == 0, "a step is in flight during the reset"
                self.checksum[slot] = zlib.crc32(b"reset", self.checksum[slot])

        def submit(self, batch):
            starts = [self.position[slot] for slot in batch.slots.tolist()]
            step = super().submit(batch)
            tokens, frames, failed = [], [], []
            for row, start in enumerate(starts):
                digits, at = step.emissions.tokens[row], step.emissions.frames[row]
                levels = np.abs(batch.audio[row].reshape(-1, 1280)).mean(1)
                found = []
                for frame in sorted(set(at.tolist())):
                    level, value = levels[frame - start], zlib.crc32(digits[at == frame].tobytes())
                    if level > 0.2:
                        found += [(5 + k % 3, frame) for k in range(24)]
                    elif level > 0.05:
                        found += [((value >> 4 * k) % VOCABULARY, frame) for k in range(1, 1 + value % 4)]
                tokens.append(np.array([token for token, _ in found], np.int32))
                frames.append(np.array([frame for _, frame in found], np.int64))
                failed.append(levels.max() > 0.6)
            scores = [-(1 + row) / 32 for row in tokens]
            step.emissions = step.emissions.of_rows(tokens, frames, scores, [1 - row for row in scores], failed)
            return step

    return Talking


@dataclass
class Client:
    """A stream's options, and its operations in order."""

    chunk_ms: int
    rule: str
    operations: list[tuple[str, Any, Any]]
    by_feed: bool = False  # whether its chunks are cut elsewhere and arrive as rows


LENGTHS = st.one_of(st.integers(0, 3000), st.integers(0, 40_000))
PUSHES = st.tuples(st.just("push"), st.sampled_from(["quiet", "speech", "loop"]), LENGTHS)
OPERATIONS = st.one_of(
    PUSHES,
    PUSHES,
    PUSHES,
    st.tuples(st.just("push int16"), st.sampled_from(["quiet", "speech", "loop"]), LENGTHS),
    st.tuples(st.just("silence"), st.integers(1, 20_000), st.none()),
    st.tuples(st.just("end_utterance"), st.none(), st.none()),
    st.tuples(st.just("chunk"), st.sampled_from([80, 160, 560, 1120]), st.none()),
    st.tuples(st.just("prompt"), st.sampled_from([0, 3]), st.none()),
    st.tuples(st.just("wait"), st.none(), st.none()),
    st.tuples(st.just("branch"), st.sampled_from(["quiet", "speech", "loop"]), LENGTHS),
    st.tuples(st.sampled_from(["push", "cancel"]), st.just("bad"), st.integers(0, 4000)),
)
CLIENTS = st.builds(
    Client,
    st.sampled_from([80, 160, 560, 1120]),
    st.sampled_from(sorted(RULES)),
    st.lists(OPERATIONS, min_size=1, max_size=12),
    st.booleans(),
)


def sound(seed: int, kind: str, samples: int) -> np.ndarray:
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), samples)
    return signs * np.float32(LEVELS[kind])


def endpointer_of(manifest, name: str) -> Endpointer | None:
    rule = RULES[name]
    if rule is None:
        return None
    return Endpointer(rule, manifest, WORD_STARTS, CLOSING, INVISIBLE, END_OF_UTTERANCE, BACKCHANNEL)


class Pair:
    """A stream of the scheduler and its reference, which receive the same operations."""

    def __init__(self, manifest, scheduler, expected, client: Client, number: int) -> None:
        self.manifest, self.scheduler, self.expected, self.number = manifest, scheduler, expected, number
        self.rest = list(client.operations)
        self.branches: list[Pair] = []
        self.stream = scheduler.open(
            Chunker(manifest, manifest.chunk(client.chunk_ms), prompt=3),
            endpointer=endpointer_of(manifest, client.rule),
            guard=RepetitionGuard(manifest),
        )
        self.cancelled, self.outputs = False, []

    def next(self, may_wait: bool) -> None:
        name, value, samples = self.rest.pop(0)
        scheduler, stream, expected = self.scheduler, self.stream, self.expected
        call: Any = None
        if name.startswith("push"):
            audio = sound(100 * self.number + len(self.rest), value, samples)
            if name == "push int16":
                audio = (audio * 32767).astype(np.int16)
            expected.accept(audio)
            call = lambda: scheduler.accept(stream, audio)  # noqa: E731
        elif name == "silence":
            expected.skip_silence(value)
            call = lambda: scheduler.skip_silence(stream, value)  # noqa: E731
        elif name == "end_utterance":
            expected.end_utterance()
            call = lambda: scheduler.end_utterance(stream)  # noqa: E731
        elif name == "chunk":
            expected.chunk = self.manifest.chunk(value)
            scheduler.set_chunk(stream, expected.chunk)
        elif name == "prompt":
            expected.prompt = value
            scheduler.set_prompt(stream, value)
        elif name == "branch":
            call = lambda: self.branch(value, samples)  # noqa: E731
        elif name == "cancel":
            scheduler.cancel(stream)
            self.cancelled, self.rest = True, []
        elif may_wait:
            call = lambda: scheduler.wait(stream)  # noqa: E731
            self.outputs += scheduler.collect(stream)
        if call:
            self.attempt(call)

    def branch(self, kind: str, samples: int) -> None:
        """Open a branch, which receives other audio than the stream and ends. It begins with the present chunk size."""
        branch = self.copy()
        branch.stream = self.scheduler.branch(self.stream, self.stream.chunker.copy())
        if self.expected.failed:  # the scheduler fails the branch when it notices
            return
        self.branches.append(branch)
        audio = sound(100 * self.number + 50 + len(self.rest), kind, samples)
        branch.expected.accept(audio)
        branch.attempt(lambda: self.scheduler.accept(branch.stream, audio))
        branch.finish()

    def copy(self) -> Any:
        """Return a pair whose reference continues from that of this pair. It has no stream."""
        self.expected._resize()
        branch = copy.copy(self)
        branch.expected = copy.copy(self.expected)
        branch.expected.backend = copy.copy(self.expected.backend)
        for name in ("position", "checksum", "phrases", "in_flight"):
            setattr(branch.expected.backend, name, dict(getattr(self.expected.backend, name)))
        branch.expected.guard, branch.expected.endpointer = copy.copy(self.expected.guard), None
        for name in ("tokens", "positions", "scores", "sums"):
            setattr(branch.expected, name, list(getattr(self.expected, name)))
        branch.outputs, branch.expected.outputs, branch.branches, branch.rest = [], [], [], []
        return branch

    def attempt(self, call: Any) -> None:
        """Call; if the stream failed, which the scheduler may notice now or later, the reference failed too."""
        try:
            call()
        except StreamError as error:
            assert self.expected.failed and "not finite; open a new one" in str(error)
            self.rest = []

    def finish(self) -> None:
        if not self.cancelled:
            self.expected.finish()
            self.attempt(lambda: self.scheduler.finish(self.stream))

    def check(self) -> None:
        scheduler, stream, expected = self.scheduler, self.stream, self.expected
        for branch in self.branches:
            branch.cancelled = self.cancelled and branch.stream.error is not None
            branch.check()
        if self.cancelled:
            assert isinstance(stream.error, StreamError)
        elif expected.failed:
            with pytest.raises(StreamError, match="not finite; open a new one"):
                scheduler.wait(stream)
        else:
            scheduler.wait(stream)
            assert stream.error is None and stream.slot is None
        self.outputs += scheduler.collect(stream)
        found = [
            (
                output.item.kind,
                output.item.end_sample,
                output.item.chunk.ms if output.item.kind == "run" else 0,
                output.item.prompt,
                output.count,
                list(output.ends),
            )
            for output in self.outputs
        ]
        hypothesis = stream.hypothesis
        columns = (hypothesis.tokens, hypothesis.sample_positions, hypothesis.scores, hypothesis.sum_p_alpha)
        wanted = (expected.tokens, expected.positions, expected.scores, expected.sums)
        if self.cancelled:  # which results it had depends on the time
            assert found == expected.outputs[: len(found)]
            assert columns == tuple(column[: len(hypothesis.tokens)] for column in wanted)
        else:
            assert found == expected.outputs
            assert columns == wanted


class FedPair(Pair):
    """As `Pair`; the audio is cut here, and a feed passes the chunks on."""

    def __init__(self, manifest, scheduler, expected, client: Client, number: int, feed: Feed) -> None:
        self.manifest, self.scheduler, self.expected, self.number, self.feed = (
            manifest,
            scheduler,
            expected,
            number,
            feed,
        )
        self.rest = list(client.operations)
        self.chunker = Chunker(manifest, manifest.chunk(client.chunk_ms), prompt=3)
        self.stream = scheduler.open(
            None,
            feed.collect,
            consumer=self,
            endpointer=endpointer_of(manifest, client.rule),
            guard=RepetitionGuard(manifest),
        )
        self.cancelled, self.outputs, self.branches = False, [], []

    def next(self, may_wait: bool) -> None:
        name, value, samples = self.rest.pop(0)
        chunker, expected = self.chunker, self.expected
        if name.startswith("push"):
            audio = sound(100 * self.number + len(self.rest), value, samples)
            if name == "push int16":
                audio = (audio * 32767).astype(np.int16)
            expected.accept(audio)
            chunker.accept(audio)
        elif name == "silence":
            expected.skip_silence(value)
            chunker.skip_silence(value)
        elif name == "end_utterance":
            expected.end_utterance()
            chunker.end_utterance()
        elif name == "chunk":
            expected.chunk = self.manifest.chunk(value)
            chunker.set_chunk(expected.chunk)
        elif name == "prompt":
            expected.prompt = chunker.prompt = value
        elif name == "branch":
            self.branch(value, samples)
        elif name == "cancel":
            self.cancelled, self.rest = True, []
        self.feed.send(self)

    def branch(self, kind: str, samples: int) -> None:
        branch = self.copy()
        branch.stream, branch.chunker = None, self.chunker.copy()
        self.feed.arrived.append((self, branch))
        if not self.expected.failed:
            self.branches.append(branch)
        audio = sound(100 * self.number + 50 + len(self.rest), kind, samples)
        branch.expected.accept(audio)
        branch.chunker.accept(audio)
        branch.finish()

    def finish(self) -> None:
        if not self.cancelled:
            self.expected.finish()
            self.chunker.finish()
            self.feed.send(self)

    def check(self) -> None:
        assert self.feed.settled.wait(TIMEOUT)
        assert self.stream is not None
        with self.scheduler._lock:
            while not (self.stream.slot is None and (self.cancelled or self.stream.error or self.feed.has_all(self))):
                assert self.feed.changed.wait(TIMEOUT), "the stream was not released"
        if self.expected.failed and not self.cancelled:
            assert "not finite; open a new one" in str(self.stream.error)
        super().check()


class Feed:
    """Passes chunks to the scheduler in batches of random sizes: as rows, if all of a stream's in a batch can be."""

    def __init__(self, manifest, scheduler, order: random.Random) -> None:
        self.manifest, self.scheduler, self.order = manifest, scheduler, order
        self.arrived: deque[tuple[FedPair, Any]] = deque()  # with a work item, "last", "cancel" or the pair of a branch
        self.memory: list[np.ndarray] = []
        self.pairs: list[FedPair] = []
        self.rows = self.quiet_rows = 0
        self.settled = threading.Event()
        self.changed = threading.Condition(scheduler._lock)
        scheduler.set_feed(self)

    def send(self, pair: FedPair) -> None:
        self.settled.clear()
        for item in pair.chunker.take():
            audio = item.audio * np.float32(item.scale)
            self.arrived.append((pair, item._replace(audio=audio, scale=1.0, block=None)))
        if pair.cancelled or pair.chunker.ended:
            self.arrived.append((pair, "cancel" if pair.cancelled else "last"))
        self.scheduler.wake()

    def has_all(self, pair: FedPair) -> bool:
        return len(pair.outputs) >= len(pair.expected.outputs)

    # -- of `RowFeed` --------------------------------------------------------------------------------------------------

    def receive(self) -> None:
        while self.arrived and self.order.random() < 0.8:
            size = self.order.randint(1, 6)
            self.pass_on([self.arrived.popleft() for _ in range(min(size, len(self.arrived)))])
        if self.arrived:
            self.scheduler.wake()
        else:
            self.settled.set()

    def pass_on(self, batch: list[tuple[FedPair, Any]]) -> None:
        others = {pair for pair, item in batch if not isinstance(item, WorkItem) or item.kind != "run"}
        others |= {pair for pair, item in batch if isinstance(item, WorkItem) and item.reset_slot}
        others |= {pair for pair, _ in batch if pair.stream is None or pair.stream.slot is None}
        direct = [(pair, item) for pair, item in batch if pair not in others]
        if direct:
            rows = np.zeros(len(direct), ROW)
            for row, (pair, item) in zip(rows, direct, strict=True):
                row["slot"], row["size"] = pair.stream.slot, self.manifest.chunks.index(item.chunk)
                row["begin"], row["stream"] = len(self.memory), len(self.pairs)
                self.pairs.append(pair)
                for name in ("end_sample", "origin_sample", "length", "prompt"):
                    row[name] = getattr(item, name)
                self.memory.append(item.audio)
            accepted = self.scheduler.enqueue_rows(rows)
            self.rows += int(accepted.sum())
            direct = [one for one, done in zip(direct, accepted.tolist(), strict=True) if not done]
        for pair, item in direct + [one for one in batch if one[0] in others]:
            if isinstance(item, FedPair):
                with contextlib.suppress(StreamError):
                    item.stream = self.scheduler.branch(pair.stream, None)
                    item.stream.consumer = item
                continue
            if pair.stream is None:  # a branch of a stream that had failed
                continue
            if item == "cancel":
                self.scheduler.cancel(pair.stream)
                continue
            with contextlib.suppress(StreamError):
                self.scheduler.enqueue(pair.stream, [] if item == "last" else [item], last=item == "last")
            self.collect([pair.stream])

    def before_wait(self) -> None:
        pass

    def audio(self, rows, samples: int) -> np.ndarray:
        return np.stack([self.memory[begin] for begin in rows["begin"].tolist()])

    def deliver(self, rows, streams) -> None:
        self.quiet_rows += len(rows)
        for row in rows:
            pair, chunk = self.pairs[row["stream"]], self.manifest.chunks[row["size"]]
            item = WorkItem("run", chunk, int(row["end_sample"]), prompt=int(row["prompt"]))
            pair.outputs.append(StepOutput(item, len(pair.stream.hypothesis.tokens), ()))
        self.collect(streams)

    def stopped(self) -> None:
        pass

    def collect(self, streams) -> None:
        for stream in streams:
            stream.consumer.outputs += self.scheduler.collect(stream)
        with self.scheduler._lock:
            self.changed.notify_all()


def follow(manifest, fake, reference, talking, clients, max_batch, overlap, held, order) -> tuple[list[Pair], Any]:
    """Apply the operations of all clients in a random order and compare their results with the reference's.

    If `held`, the first step does not end before all operations are applied, so that items are queued.
    """
    backend, released = talking(manifest, len(clients) + 1, max_batch), threading.Event()  # one for branches
    backend.on_submit = lambda batch: None if released.wait(TIMEOUT) else pytest.fail("the step is not released")
    if not held:
        released.set()
    scheduler = Scheduler(manifest, backend, overlap)
    feed = Feed(manifest, scheduler, random.Random(order.random()))
    try:
        pairs = []
        for number, client in enumerate(clients):
            expected = reference.ReferenceStream(
                manifest,
                talking(manifest, 1, 1),
                manifest.chunk(client.chunk_ms),
                fake.encoder_frames,
                endpointer_of(manifest, client.rule),
                3,
            )
            if client.by_feed:
                pairs.append(FedPair(manifest, scheduler, expected, client, number, feed))
            else:
                pairs.append(Pair(manifest, scheduler, expected, client, number))
        while waiting := [pair for pair in pairs if pair.rest]:
            order.choice(waiting).next(may_wait=not held)
        for pair in pairs:
            pair.finish()
        released.set()
        for pair in pairs:
            pair.check()
    finally:
        released.set()
        scheduler.close()
    assert backend.closed and backend.max_in_flight <= max_batch * (2 if overlap else 1)
    backend.feed = feed
    return pairs, backend


LOOPING = [("push", "speech", 9000), ("push", "loop", 40_000), ("push", "speech", 30_000), ("push", "quiet", 9000)]
FAILING = [("push", "speech", 20_000), ("push", "bad", 2000), ("push", "speech", 20_000)]


@given(
    clients=st.lists(CLIENTS, min_size=1, max_size=4),
    max_batch=st.integers(1, 4),
    overlap=st.booleans(),
    held=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@example(
    clients=[Client(80, "all, reset", LOOPING), Client(80, "none", LOOPING), Client(80, "silence", FAILING)],
    max_batch=4,
    overlap=True,
    held=True,
    seed=0,
)
@example(
    clients=[Client(80, rule, LOOPING, by_feed) for rule in ("none", "all, reset") for by_feed in (True, False)],
    max_batch=4,
    overlap=True,
    held=False,
    seed=1,
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_streams_equal_the_reference(
    prompted, fake, reference, talking, clients, max_batch, overlap, held, seed
) -> None:
    follow(prompted, fake, reference, talking, clients, max_batch, overlap, held, random.Random(seed))


START = ("push", "quiet", 199)  # frame boundaries follow, after the lead silence of 1081 samples
END = ("end_utterance", None, None)


def frames(kind: str, count: int) -> tuple[str, str, int]:
    return "push", kind, 1280 * count


@pytest.mark.parametrize("by_feed", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("rule", "operations"),
    [
        # The second of two steps that end in a repetition has no tokens.
        ("none", [START, frames("loop", 8), frames("quiet", 4), frames("speech", 8)]),
        # Tokens before a new recording do not count as a repetition, whether or not its first step has tokens.
        ("none", [START, frames("loop", 7), END, START, frames("loop", 4), frames("speech", 8)]),
        ("none", [START, frames("loop", 7), END, START, frames("quiet", 2), frames("loop", 4), frames("speech", 8)]),
        # A decoder reset that is due at the end of a recording has no effect on the next one.
        *[
            ("silence, reset", [START, frames("speech", 5), frames("quiet", quiet), END, START, frames("speech", 9)])
            for quiet in range(10)
        ],
    ],
)
def test_resets_at_the_limits(prompted, fake, reference, talking, rule, operations, overlap, by_feed) -> None:
    clients = [Client(80, rule, operations, by_feed)] * 2
    follow(prompted, fake, reference, talking, clients, 2, overlap, True, random.Random(0))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_operations_reach_every_rule(prompted, fake, reference, talking, overlap) -> None:
    """The comparison is meaningful: utterances end for every reason, decoders are reset, a row fails, rows are batched.

    A repetition causes decoder resets in a stream without rules.
    """
    forced = [("push", "speech", 30_000), ("end_utterance", None, None), ("push", "speech", 30_000)]
    silent = [*forced, ("push", "quiet", 20_000), ("silence", 30_000, None), ("push int16", "speech", 20_000)]
    long = [("push", "speech", 40_000), ("push", "speech", 40_000)]
    clients = [
        Client(80, "all, reset", silent),
        Client(80, "length", long),
        Client(80, "none", LOOPING),
        Client(80, "silence", FAILING),
    ]
    pairs, backend = follow(prompted, fake, reference, talking, clients, 4, overlap, True, random.Random(0))
    reasons = {end.reason for pair in pairs for output in pair.outputs for end in output.ends}
    assert reasons == {"forced", "silence", "length", "model"}
    assert {slot for slot, _ in backend.decoder_resets} == {0, 2}
    assert [pair.expected.failed for pair in pairs] == [False, False, False, True]
    assert max(len(slots) for _, slots in backend.batches) == 4
    assert backend.max_in_flight > 4 if overlap else backend.max_in_flight == 4
    assert {output.item.kind for output in pairs[0].outputs} == {"run", "skip", "end_of_utterance"}


@pytest.mark.parametrize("overlap", [False, True])
def test_the_chunks_of_a_feed_reach_every_rule(prompted, fake, reference, talking, overlap) -> None:
    """The comparison is meaningful: most chunks are rows, some of them in steps with items, and some not quiet."""
    many = [("push", kind, 9000) for kind in ("speech", "quiet", "speech", "speech", "quiet", "quiet") * 3]
    clients = [
        Client(80, "silence", many, by_feed=True),
        Client(80, "length", many, by_feed=True),
        Client(80, "none", LOOPING, by_feed=True),
        Client(80, "silence", FAILING, by_feed=True),
        Client(80, "silence", many),
    ]
    pairs, backend = follow(prompted, fake, reference, talking, clients, 5, overlap, False, random.Random(3))
    reasons = {end.reason for pair in pairs[:2] for output in pair.outputs for end in output.ends}
    assert reasons == {"silence", "length", "model"}
    assert {slot for slot, _ in backend.decoder_resets} == {2}
    assert [pair.expected.failed for pair in pairs] == [False, False, False, True, False]
    chunks = sum(output.item.kind == "run" for pair in pairs[:4] for output in pair.outputs)
    assert 0 < backend.feed.quiet_rows < backend.feed.rows and backend.feed.rows > chunks // 2
