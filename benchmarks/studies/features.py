"""What the features on top of greedy decoding cost: which share of a step is confidence, which is boosting?

    python -m nemostream.benchmarks.studies.features --bundle BUNDLE --batch 64 --out benchmarks/results

Steps of many streams on a CPU, in the steady state. The encoder runs once a step; what comes after it is run once for
every case of `CASES`, in shuffled order, from the same state, and its time is laid beside the first case's of the same
step. So every figure is a ratio within one step, and what the machine does meanwhile hits all cases alike. Boosted
streams have `PHRASES` phrases each, all different, at `WEIGHT`, over what the streams say.

What the host does with a step's tokens is measured with a backend that only says again what was said: from there on to
the last stream's results, as `push` gives them, or its events (`HOST`). Its time is laid beside results' in the same
way, and `both` is that of everything on: all streams boosted, and every event's words.

Random weights do not stop talking, or do not begin: with `--random-weights` chance decides what is blank (`Lifelike`).
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast
from unittest import mock

import numpy as np

import nemostream
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.random_weights import TOKENS_PER_SECOND
from nemostream.benchmarks.harness.records import OtherWork, Record
from nemostream.benchmarks.harness.runners import Feed
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.bundle import Bundle
from nemostream.runtime.backends.base import Backend, Batch, Emissions
from nemostream.runtime.backends.cpu import CompletedStep, OrtBackend
from nemostream.runtime.decoding import greedy
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.greedy import Floats, Ints, Labels, Predictions, label_looping
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.session import StreamSession
from nemostream.runtime.text.endpointing import Endpoint

PHRASES, WEIGHT = 300, 1.0
GOAL = 0.03  # of a step, with everything on
_WARM_UP = 3


@dataclass(frozen=True)
class Moment:
    """A step whose encoder has run: what a case starts from. It may change `state`."""

    net: Any
    encoded: Floats
    counts: Ints
    state: Predictions
    boosts: Sequence[Boosting]  # for every row


def _scores_alone(logits: Floats, largest: Ints) -> tuple[Any, Any]:
    """`greedy.confidence` as it would be if tokens had a score only."""
    about = logits.astype(np.float64)
    about -= about[np.arange(len(about)), largest, None]
    score = -np.log(np.exp(about).sum(axis=1))
    return score, np.zeros(len(score))


def _decode(moment: Moment, boosted: float) -> list[Labels]:
    rows = len(moment.encoded)
    boosts = [boosting if row < boosted * rows else None for row, boosting in enumerate(moment.boosts)]
    return label_looping(moment.net, moment.encoded, moment.counts, moment.state, boosts if boosted else ())[0]


def _plain(moment: Moment) -> list[Labels]:
    with mock.patch.object(greedy, "confidence", _scores_alone):
        return _decode(moment, 0)


# What runs after the encoder, by name; the first is what the others are laid beside.
CASES: dict[str, Callable[[Moment], list[Labels]]] = {
    "plain": _plain,
    "confidence": lambda moment: _decode(moment, 0),
    "confidence, half of the streams boosted": lambda moment: _decode(moment, 0.5),
    "confidence, all streams boosted": lambda moment: _decode(moment, 1),
}


class _Hold:
    """Keeps a model's scheduler from its work until `end` is set."""

    def __init__(self, model: Model) -> None:
        self._begun, self.end = Event(), Event()
        self._thread = Thread(target=model._scheduler.call, args=(self._wait,))
        self._thread.start()
        self._begun.wait()

    def _wait(self, backend: Backend) -> None:
        self._begun.set()
        self.end.wait()

    def join(self) -> None:
        self._thread.join()


class Replay:
    """A backend that says, step by step, what was said before."""

    asynchronous = False

    def __init__(self, spoken: Sequence[Emissions], rows: int) -> None:
        self.capacity = self.max_batch = rows
        self._spoken, self._at = spoken, [0] * rows

    def submit(self, batch: Batch) -> CompletedStep:
        slots, rows = batch.slots.tolist(), []
        for slot in slots:
            said = self._spoken[self._at[slot]]
            rows.append((said.tokens[slot], said.frames[slot], said.scores[slot], said.sum_p_alpha[slot]))
            self._at[slot] += 1
        tokens, frames, scores, sum_p_alpha = (tuple(part) for part in zip(*rows, strict=True))
        return CompletedStep(Emissions(tokens, frames, scores, sum_p_alpha, np.zeros(len(slots), bool)))

    def reset(self, slots: Ints) -> None: ...

    def reset_decoder(self, slots: Ints) -> None: ...

    def close(self) -> None: ...


def _results(stream: StreamSession) -> None:
    stream.collect()


def _events(stream: StreamSession) -> None:
    stream.events()


def _words(stream: StreamSession) -> None:
    for event in stream.events():
        event.words  # noqa: B018 - grouped when asked for


# What the host does after a step, by name, and when utterances end; the first is what the others are laid beside.
HOST: dict[str, tuple[Callable[[StreamSession], None], Endpoint | None]] = {
    "results": (_results, None),
    "events, utterances that end": (_events, Endpoint(decoder="reset")),
    "events, utterances that end, words": (_words, Endpoint(decoder="reset")),
}


def _host(bundle: Bundle, spoken: Sequence[Emissions], ms: int, batch: int) -> dict[str, list[float]]:
    """Milliseconds after each step, of every kind of `HOST`; they take turns within a step."""
    chunk, shuffle = bundle.manifest.chunk(ms), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in HOST}
    audio = np.zeros(chunk.samples, np.float32)
    with ExitStack() as stack:
        sides = {}
        for name, (_, endpoint) in HOST.items():
            model = stack.enter_context(Model(bundle, cast(Backend, Replay(spoken, batch)), ms))
            sides[name] = model, [StreamSession(model, 16000, 1, endpoint=endpoint) for _ in range(batch)]
        for step in range(len(spoken)):
            names = list(HOST)
            shuffle.shuffle(names)
            for name in names:
                model, streams = sides[name]
                # The scheduler waits until all have fed it, so that it makes one step of them.
                holding = _Hold(model)
                for stream in streams:
                    stream.feed(audio[bundle.manifest.lead if step == 0 else 0 :])
                began = time.perf_counter()
                holding.end.set()
                for stream in streams:
                    stream.wait()
                    HOST[name][0](stream)
                times[name].append(1000 * (time.perf_counter() - began))
                holding.join()
    return times


class Lifelike:
    """A transducer of random weights that says about `TOKENS_PER_SECOND`: chance decides what is blank, drawn from the
    frame and the prediction; which label it is otherwise, the weights decide."""

    def __init__(self, net: Any, frames_per_second: float) -> None:
        self._net, self.blank, self.max_symbols = net, net.blank, net.max_symbols
        rate = TOKENS_PER_SECOND / frames_per_second
        self._share = rate / (1 + rate)  # of verdicts that are labels: each frame has one more than labels

    def predict(self, tokens: Ints, h: Floats, c: Floats) -> tuple[Floats, Floats, Floats]:
        return self._net.predict(tokens, h, c)

    def join(self, encoded: Floats, predicted: Floats) -> Floats:
        logits = self._net.join(encoded, predicted)
        drawn = 1e4 * np.abs(encoded[:, 0] + predicted[:, 0]) % 1
        logits[:, self.blank] = np.where(drawn < self._share, -1e4, 1e4)
        return logits


def measure_features(
    bundle: Bundle,
    batch: int = 64,
    ms: int = 560,
    steps: int = 30,
    *,
    threads: int | None = None,
    random_weights: bool = False,
    say: records.Say = lambda message: None,
) -> Record:
    """The result; `random_weights` for models of such."""
    threads = threads or records.cores()
    backend = OrtBackend(bundle, capacity=batch, threads=threads)
    chunk, manifest = bundle.manifest.chunk(ms), bundle.manifest
    feed = Feed(manifest, speech(), batch, (_WARM_UP + steps) * chunk.frames)
    net: Any = backend.transducer
    if random_weights:
        net = Lifelike(net, manifest.features.sample_rate / manifest.samples_per_frame)
    backend.reset(np.arange(batch))
    start = Predictions.start(net, manifest.decoder.layers, manifest.decoder.hidden)
    state, shuffle, others = start.repeated(batch), random.Random(0), OtherWork()
    times: dict[str, list[float]] = {"encode": [], **{name: [] for name in CASES}}
    labels = dict.fromkeys(CASES, 0)
    heard: list[int] = []
    spoken: list[Emissions] = []
    boosts: list[Boosting] = []
    for step in range(_WARM_UP + steps):
        inputs = feed.batch(chunk, step * chunk.frames)
        began = time.perf_counter()
        encoded, counts = backend.encode(inputs)
        encode = time.perf_counter() - began
        if step < _WARM_UP:
            for row in label_looping(net, encoded, counts, state)[0]:
                heard += row.tokens
            continue
        if not boosts:
            boosts = [some_phrases(row, heard, manifest.decoder.vocabulary) for row in range(batch)]
        say(f"step {step - _WARM_UP + 1} of {steps}")
        times["encode"].append(1000 * encode)
        names = list(CASES)
        shuffle.shuffle(names)
        ends = {}
        for name in names:
            ends[name] = Predictions(*(part.copy() for part in vars(state).values()))
            moment = Moment(net, encoded, counts, ends[name], boosts)
            began = time.perf_counter()
            said = CASES[name](moment)
            times[name].append(1000 * (time.perf_counter() - began))
            labels[name] += sum(len(row.tokens) for row in said)
            if name == "confidence":
                spoken.append(_emissions(said, (step - _WARM_UP) * chunk.frames))
        state = ends[names[0]]  # any: so that boosted streams are met in the middle of their phrases too
        state.node[:] = np.where(state.node < [len(boosting) for boosting in boosts], state.node, 0)
    first = next(iter(CASES))
    rows = []
    whole = statistics.median(encode + plain for encode, plain in zip(times["encode"], times[first], strict=True))
    for name in CASES:
        more = [mine - plain for mine, plain in zip(times[name], times[first], strict=True)]
        values = {
            "labels_per_second": labels[name] / (batch * steps * ms / 1000),
            "step_ms": whole,
            "share": statistics.median(more) / whole,
        }
        case = {"features": name, "chunk_ms": ms, "batch": batch}
        rows.append(records.row(case, {"decode": times[name], "more": more}, values))
    host = _host(bundle, spoken, ms, batch)
    boosted = statistics.median(mine - plain for mine, plain in zip(times[name], times[first], strict=True))
    plainly = host[next(iter(HOST))]
    for name in HOST:
        more = [mine - plain for mine, plain in zip(host[name], plainly, strict=True)]
        values = {
            "share": statistics.median(more) / whole,
            "both": (statistics.median(more) + boosted) / whole,
            "step_ms": whole,
        }
        case = {"host": name, "chunk_ms": ms, "batch": batch}
        rows.append(records.row(case, {"host": host[name], "more": more}, values))
    return records.record(
        "features",
        rows,
        model={"name": manifest.name, "layers": manifest.encoder.layers, "d_model": manifest.encoder.d_model},
        method={
            "steps": steps,
            "warm_up": _WARM_UP,
            "threads": threads,
            "phrases": PHRASES,
            "weight": WEIGHT,
            "other_work_cores": round(others.cores(), 3),
        },
    )


def _emissions(said: Sequence[Labels], begin: int) -> Emissions:
    return Emissions(
        tuple(np.array(row.tokens, np.int32) for row in said),
        tuple(np.array(row.frames, np.int64) + begin for row in said),
        tuple(np.array(row.scores, np.float32) for row in said),
        tuple(np.array(row.sum_p_alpha, np.float32) for row in said),
        np.zeros(len(said), bool),
    )


def some_phrases(seed: int, heard: Sequence[int], vocabulary: int) -> Boosting:
    """Different for every seed; half of their tokens are those that were heard."""
    rng = np.random.default_rng(seed)
    pool = np.array([*heard, *rng.integers(0, vocabulary, max(len(heard), 100))])
    return Boosting([(rng.choice(pool, rng.integers(2, 8)).tolist(), WEIGHT) for _ in range(PHRASES)], vocabulary)


def table(result: Record) -> str:
    head = ("after the encoder", "decode, ms", "more, ms", "share of a step", "labels/s")
    lines, hosts = [], []
    for row in result["rows"]:
        values = row["values"]
        if "host" in row["case"]:
            hosts.append(
                (
                    row["case"]["host"],
                    tables.spread(row["ms"]["host"]),
                    tables.spread(row["ms"]["more"]),
                    f"{100 * values['share']:.2f} %",
                    f"{100 * values['both']:.2f} %",
                )
            )
            continue
        lines.append(
            (
                row["case"]["features"],
                tables.spread(row["ms"]["decode"]),
                tables.spread(row["ms"]["more"]),
                f"{100 * values['share']:.2f} %",
                tables.digits(values["labels_per_second"]),
            )
        )
    case, model = result["rows"][0]["case"], result["model"]
    return (
        f"{model['layers']} layers of {model['d_model']}, batch {case['batch']}, {case['chunk_ms']} ms, a step of "
        f"{tables.digits(result['rows'][0]['values']['step_ms'])} ms; {result['method']['phrases']} phrases a stream; "
        f"{result['hardware']['cpu']}, {result['hardware']['cores']} cores.\n\n{tables.markdown(head, lines)}\n\n"
        f"{tables.markdown(('after a step, on the host', 'ms', 'more, ms', 'share of a step', 'both'), hosts)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.studies.features", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--bundle", type=Path, help="what to run (default: the packaged model)")
    parser.add_argument("--random-weights", action="store_true", help="the bundle is one of `random_bundle`")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--chunk-ms", type=int, default=560)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, help="default: every core")
    parser.add_argument("--out", type=Path, default=records.FOLDER)
    parser.add_argument("--name", default="features")
    options = parser.parse_args(arguments)
    result = measure_features(
        Bundle.open(options.bundle or nemostream.demo_bundle()),
        options.batch,
        options.chunk_ms,
        options.steps,
        threads=options.threads,
        random_weights=options.random_weights,
        say=records.say,
    )
    records.write(result, options.out / f"{options.name}.json")
    (options.out / f"{options.name}.md").write_text(table(result), encoding="utf-8")
    print(table(result), end="")


if __name__ == "__main__":
    main()
