"""Cost of confidence, boosting and events relative to a step.

    python -m nemostream.benchmarks.studies.features --bundle BUNDLE --batch 64 --out benchmarks/results

Steps of many streams on a CPU with full caches. The encoder runs once per step. Decoding then runs once for each case
of `DECODE_CASES`, in random order, from the same state, and its time is compared with the first case of the same step.
Load on the machine therefore affects all cases in the same way. Each boosted stream has `PHRASES` different phrases at
`WEIGHT`, made of the tokens of the streams.

The work of the host after a step is measured with a backend that replays the tokens: from the end of the step to the
results of the last stream (`collect`), or its events (`HOST_CASES`). Its time is compared with the first case in the
same way. *Total* is the share with all features: all streams boosted, plus the host case.

A model with random weights emits tokens all the time or never: with `--random-weights`, blanks are drawn at random
(`RandomBlankTransducer`).
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
from typing import Any, cast
from unittest import mock

import numpy as np

from nemostream.benchmarks import command
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.random_weights import TOKENS_PER_SECOND
from nemostream.benchmarks.harness.records import OtherWork, Progress, Record, Row, no_progress
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import AudioFeed, blocked
from nemostream.bundle import Bundle
from nemostream.runtime.backends.base import Backend, Batch, Emissions
from nemostream.runtime.backends.cpu import CompletedStep, OrtBackend
from nemostream.runtime.decoding import greedy
from nemostream.runtime.decoding.boosting import Boosting
from nemostream.runtime.decoding.greedy import DecoderState, Floats, Ints, Labels, label_looping
from nemostream.runtime.model import Model
from nemostream.runtime.streaming.session import StreamSession
from nemostream.runtime.text.endpointing import Endpoint

PHRASES, WEIGHT = 300, 1.0  # per stream
_WARM_UP = 3  # steps


@dataclass(frozen=True)
class DecodeInput:
    """Input of decoding: a step after its encoder. Decoding may change `state`."""

    net: Any
    encoded: Floats
    counts: Ints
    state: DecoderState
    boosts: Sequence[Boosting]  # of each row


def _score_only(logits: Floats, largest: Ints) -> tuple[Any, Any]:
    """Replacement of `greedy.label_scores` that computes only the score of a token."""
    centred = logits.astype(np.float64)
    centred -= centred[np.arange(len(centred)), largest, None]
    score = -np.log(np.exp(centred).sum(axis=1))
    return score, np.zeros(len(score))


def _decode(inputs: DecodeInput, boosted: float) -> list[Labels]:
    """Decode with boosting for a share `boosted` of the rows."""
    rows = len(inputs.encoded)
    boosts = [boosting if row < boosted * rows else None for row, boosting in enumerate(inputs.boosts)]
    phrases, max_pairs = boosts if boosted else (), inputs.net.max_pairs
    return label_looping(inputs.net, inputs.encoded, inputs.counts, inputs.state, phrases, max_pairs)[0]


def _decode_without_confidence(inputs: DecodeInput) -> list[Labels]:
    with mock.patch.object(greedy, "label_scores", _score_only):
        return _decode(inputs, 0)


# Decoding by name; the others are compared with the first.
DECODE_CASES: dict[str, Callable[[DecodeInput], list[Labels]]] = {
    "scores only": _decode_without_confidence,
    "confidence": lambda inputs: _decode(inputs, 0),
    "confidence, half of the streams boosted": lambda inputs: _decode(inputs, 0.5),
    "confidence, all streams boosted": lambda inputs: _decode(inputs, 1),
}


class ReplayBackend:
    """A backend that emits recorded emissions, step by step for each slot."""

    asynchronous = False

    def __init__(self, emissions: Sequence[Emissions], rows: int) -> None:
        self.capacity = self.max_batch = rows
        self._emissions, self._step = emissions, [0] * rows

    def submit(self, batch: Batch) -> CompletedStep:
        slots, rows = batch.slots.tolist(), []
        for slot in slots:
            step = self._emissions[self._step[slot]]
            rows.append((step.tokens[slot], step.frames[slot], step.scores[slot], step.sum_p_alpha[slot]))
            self._step[slot] += 1
        tokens, frames, scores, sum_p_alpha = zip(*rows, strict=True)
        return CompletedStep(Emissions.of_rows(tokens, frames, scores, sum_p_alpha, np.zeros(len(slots), bool)))

    def reset(self, slots: Ints) -> None: ...

    def reset_decoder(self, slots: Ints) -> None: ...

    def close(self) -> None: ...


def _results(stream: StreamSession) -> None:
    stream.collect()


def _events(stream: StreamSession) -> None:
    stream.events()


def _words(stream: StreamSession) -> None:
    for event in stream.events():
        event.words  # noqa: B018 - computed on access


# Work of the host after a step, and the rule for utterance ends, by name; the others are compared with the first.
HOST_CASES: dict[str, tuple[Callable[[StreamSession], None], Endpoint | None]] = {
    "results": (_results, None),
    "events, utterance ends": (_events, Endpoint(decoder="reset")),
    "events, utterance ends, words": (_words, Endpoint(decoder="reset")),
}


def _measure_host(bundle: Bundle, emissions: Sequence[Emissions], ms: int, batch: int) -> dict[str, list[float]]:
    """Return the milliseconds of the host after each step for each case of `HOST_CASES`; their order is random."""
    chunk, shuffle = bundle.manifest.chunk(ms), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in HOST_CASES}
    audio = np.zeros(chunk.samples, np.float32)
    with ExitStack() as stack:
        sessions = {}
        for name, (_, endpoint) in HOST_CASES.items():
            model = stack.enter_context(Model(bundle, cast(Backend, ReplayBackend(emissions, batch)), ms))
            sessions[name] = model, [model.open_session(16000, 1, endpoint=endpoint) for _ in range(batch)]
        for step in range(len(emissions)):
            names = list(HOST_CASES)
            shuffle.shuffle(names)
            for name in names:
                model, streams = sessions[name]
                with blocked(model._scheduler) as resume:  # so that one step processes all streams
                    for stream in streams:
                        stream.feed(audio[bundle.manifest.lead if step == 0 else 0 :])
                    start = time.perf_counter()
                    resume.set()
                    for stream in streams:
                        stream.wait()
                        HOST_CASES[name][0](stream)
                    times[name].append(1000 * (time.perf_counter() - start))
    return times


class RandomBlankTransducer:
    """A transducer with random weights that emits about `TOKENS_PER_SECOND`.

    Whether the result of the joint is blank is drawn from a hash of frame and prediction; the weights select the label.
    """

    def __init__(self, net: Any, frames_per_second: float) -> None:
        self._net, self.blank, self.max_symbols, self.max_pairs = net, net.blank, net.max_symbols, net.max_pairs
        rate = TOKENS_PER_SECOND / frames_per_second
        self._share = rate / (1 + rate)  # of joint results that are labels: each frame also has one blank

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
    progress: Progress = no_progress,
) -> Record:
    """Measure all cases and return the result; set `random_weights` for a model with random weights."""
    threads = threads or records.cores()
    backend = OrtBackend(bundle, capacity=batch, threads=threads)
    chunk, manifest = bundle.manifest.chunk(ms), bundle.manifest
    feed = AudioFeed(manifest, speech(), batch, (_WARM_UP + steps) * chunk.frames)
    net: Any = backend.transducer
    if random_weights:
        net = RandomBlankTransducer(net, manifest.features.sample_rate / manifest.samples_per_frame)
    backend.reset(np.arange(batch))
    start = DecoderState.initial(net, manifest.decoder.layers, manifest.decoder.hidden)
    state, shuffle, others = start.repeat(batch), random.Random(0), OtherWork()
    times: dict[str, list[float]] = {"encode": [], **{name: [] for name in DECODE_CASES}}
    labels = dict.fromkeys(DECODE_CASES, 0)
    warm_up_tokens: list[int] = []
    emissions: list[Emissions] = []
    boosts: list[Boosting] = []
    for step in range(_WARM_UP + steps):
        inputs = feed.batch(chunk, step * chunk.frames)
        begin = time.perf_counter()
        encoded, counts = backend.encode(inputs)
        encode = time.perf_counter() - begin
        if step < _WARM_UP:
            for row in label_looping(net, encoded, counts, state)[0]:
                warm_up_tokens += row.tokens
            continue
        if not boosts:
            boosts = [random_phrases(row, warm_up_tokens, manifest.decoder.vocabulary) for row in range(batch)]
        progress(f"step {step - _WARM_UP + 1} of {steps}")
        times["encode"].append(1000 * encode)
        names = list(DECODE_CASES)
        shuffle.shuffle(names)
        ends = {}
        for name in names:
            ends[name] = DecoderState(*(part.copy() for part in vars(state).values()))
            decode_input = DecodeInput(net, encoded, counts, ends[name], boosts)
            begin = time.perf_counter()
            decoded = DECODE_CASES[name](decode_input)
            times[name].append(1000 * (time.perf_counter() - begin))
            labels[name] += sum(len(row.tokens) for row in decoded)
            if name == "confidence":
                emissions.append(_emissions(decoded, (step - _WARM_UP) * chunk.frames))
        state = ends[names[0]]  # of a random case, so that boosted streams are sometimes within a phrase
        state.node[:] = np.where(state.node < [len(boosting) for boosting in boosts], state.node, 0)
    rates = {name: count / (batch * steps * ms / 1000) for name, count in labels.items()}
    rows = _rows(times, rates, _measure_host(bundle, emissions, ms, batch), {"chunk_ms": ms, "batch": batch})
    return records.record(
        "features",
        rows,
        model=records.model_of(manifest),
        method={
            "steps": steps,
            "warm_up": _WARM_UP,
            "threads": threads,
            "phrases": PHRASES,
            "weight": WEIGHT,
            "other_work_cores": round(others.cores(), 3),
        },
    )


def _rows(
    times: dict[str, list[float]], rates: dict[str, float], host: dict[str, list[float]], case: dict[str, Any]
) -> list[Row]:
    """Return the rows of all cases, with their added time relative to the first case of the same step."""
    baseline, host_baseline = times[next(iter(DECODE_CASES))], host[next(iter(HOST_CASES))]
    step_ms = statistics.median(encode + decode for encode, decode in zip(times["encode"], baseline, strict=True))
    rows, added_ms = [], 0.0
    for name in DECODE_CASES:
        added = [time - reference for time, reference in zip(times[name], baseline, strict=True)]
        added_ms = statistics.median(added)  # of the last case, with all features, for `total_share`
        values = {"labels_per_second": rates[name], "step_ms": step_ms, "share": added_ms / step_ms}
        rows.append(records.row({"decode": name, **case}, {"decode": times[name], "added": added}, values))
    for name in HOST_CASES:
        added = [time - reference for time, reference in zip(host[name], host_baseline, strict=True)]
        host_ms = statistics.median(added)
        values = {"share": host_ms / step_ms, "total_share": (host_ms + added_ms) / step_ms, "step_ms": step_ms}
        rows.append(records.row({"host": name, **case}, {"host": host[name], "added": added}, values))
    return rows


def _emissions(decoded: Sequence[Labels], begin: int) -> Emissions:
    """Return the emissions of a step whose first frame is `begin`."""
    return Emissions.of_rows(
        [row.tokens for row in decoded],
        [[frame + begin for frame in row.frames] for row in decoded],
        [row.scores for row in decoded],
        [row.sum_p_alpha for row in decoded],
        np.zeros(len(decoded), bool),
    )


def random_phrases(seed: int, tokens: Sequence[int], vocabulary: int) -> Boosting:
    """Return `PHRASES` random phrases of 2 to 7 tokens; about half of their tokens are drawn from `tokens`."""
    rng = np.random.default_rng(seed)
    pool = np.array([*tokens, *rng.integers(0, vocabulary, max(len(tokens), 100))])
    return Boosting([(rng.choice(pool, rng.integers(2, 8)).tolist(), WEIGHT) for _ in range(PHRASES)], vocabulary)


def table(result: Record) -> str:
    """Return the result as Markdown."""
    decoding, host = [], []
    for row in result["rows"]:
        values, kind = row["values"], "host" if "host" in row["case"] else "decode"
        line = [row["case"][kind], tables.spread(row["ms"][kind]), tables.spread(row["ms"]["added"])]
        line.append(tables.percent(values["share"]))
        if kind == "host":
            host.append([*line, tables.percent(values["total_share"])])
        else:
            decoding.append([*line, tables.digits(values["labels_per_second"])])
    case, model = result["rows"][0]["case"], result["model"]
    decoding_head = ("decoding", "time, ms", "added, ms", "share of a step", "tokens/s per stream")
    host_head = ("host, after a step", "time, ms", "added, ms", "share of a step", "share with all streams boosted")
    return (
        f"{model['layers']} layers, d_model {model['d_model']}, batch {case['batch']}, {case['chunk_ms']} ms chunks, "
        f"{tables.digits(result['rows'][0]['values']['step_ms'])} ms per step; {result['method']['phrases']} phrases "
        f"per stream; {result['hardware']['cpu']}, {result['hardware']['cores']} cores. Times: median "
        "[minimum–maximum].\n\n"
        f"{tables.markdown(decoding_head, decoding)}\n\n{tables.markdown(host_head, host)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nemostream.benchmarks.studies.features", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--bundle", type=Path, help="bundle to run (default: the packaged model)")
    parser.add_argument("--random-weights", action="store_true", help="the bundle has random weights")
    parser.add_argument("--batch", type=int, default=64, help="streams per step")
    parser.add_argument("--chunk-ms", type=int, default=560, help="chunk size in ms")
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder for the result")
    parser.add_argument("--name", default="features", help="name of the output files, without suffix")
    options = parser.parse_args(arguments)
    result = measure_features(
        command.open_bundle(options.bundle),
        options.batch,
        options.chunk_ms,
        options.steps,
        threads=options.threads,
        random_weights=options.random_weights,
        progress=records.report_progress,
    )
    command.write_study(result, table(result), options)


if __name__ == "__main__":
    main()
