"""How many words are wrong, per chunk size and precision, and whether NeMo gets the same ones wrong.

    nemostream bench accuracy --manifest heldout.jsonl --precision fp32 int8 --normalizer basic
    nemostream bench accuracy --bundle BUNDLE --dataset librispeech-clean ami --checkpoint model.nemo

Sets: NeMo manifests (`audio_filepath`, `text`, perhaps `offset` and `duration`, a JSON object a line); the eight of the
Open ASR leaderboard by name; any data set of the Hugging Face hub as `name:config:split` (with columns `audio` and
`text`; the `datasets` package); without any of these the clip that is packaged. Word error rate is `jiwer`'s, summed
over a set, of texts normalised by `whisper-normalizer` as the leaderboard does (`english`); strings of digits are
better counted with `basic`, since `english` makes one number, one word, of them. Utterances whose text is empty after
that are left out, as there.

With `--checkpoint` NeMo hears the same samples (offline, with the same chunk size's attention), one recording at a
time: its own word error rate, and the share of its tokens that we say too. Beside the leaderboard's sets stands what
the model's card says.

Latency, for the plot of both, is a chunk and the median time from its last sample to its text, of one live stream.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import nemostream
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import CARD_CHUNKS, LEADERBOARD, Hub, Utterance, packaged, read_manifest
from nemostream.benchmarks.harness.records import Record, Row, Say, agreement
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import Feed
from nemostream.benchmarks.latency import push_times
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError, OptionError
from nemostream.extras import install_command

NORMALIZERS = ("english", "basic", "none")
_TOGETHER = 16
_REPEATS = 20  # chunks whose latency is measured
_WARM_UP = 5


@cache
def normalizer(name: str) -> Callable[[str], str]:
    """Raises `OptionError` for an unknown name."""
    if name not in NORMALIZERS:
        raise OptionError(f"normalizer is {name!r}; choose one of {', '.join(NORMALIZERS)}.")
    if name == "none":
        return lambda text: text
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer() if name == "english" else BasicTextNormalizer()


def plain(text: str) -> str:
    """Without case and punctuation."""
    return normalizer("basic")(text).strip()


def word_errors(wanted: Sequence[str], said: Sequence[str], normalise: Callable[[str], str]) -> dict[str, Any]:
    """Errors, words and their rate over all pairs whose wanted text is not empty once normalised; and of each pair its
    errors and words (`by_utterance`)."""
    import jiwer

    pairs = [
        (a, normalise(b)) for a, b in ((normalise(text), got) for text, got in zip(wanted, said, strict=True)) if a
    ]
    if not pairs:
        return {"wer": 0.0, "errors": 0, "words": 0, "utterances": 0, "by_utterance": []}
    found = jiwer.process_words(*(list(side) for side in zip(*pairs, strict=True)))
    each = [
        [
            sum(
                max(p.ref_end_idx - p.ref_start_idx, p.hyp_end_idx - p.hyp_start_idx)
                for p in parts
                if p.type != "equal"
            ),
            len(reference),
        ]
        for parts, reference in zip(found.alignments, found.references, strict=True)
    ]
    errors = found.substitutions + found.deletions + found.insertions
    words = found.hits + found.substitutions + found.deletions
    return {"wer": errors / words, "errors": errors, "words": words, "utterances": len(pairs), "by_utterance": each}


def measure_accuracy(
    bundle: Bundle,
    sets: Mapping[str, Iterable[Utterance]],
    precisions: Sequence[str] = ("fp32",),
    chunk_ms: Sequence[int] | None = None,
    *,
    normalise: str = "english",
    checkpoint: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    say: Say = lambda message: None,
) -> Record:
    """The result. `sets` are gone through once for each chunk size and precision, a few recordings at a time.

    Engines are built (and gated) if the folder of engines has none. Raises `OptionError` for what cannot be,
    `AudioError` for a recording that cannot be read, `BackendError` if something is missing, `EngineValidationError` for an engine
    that is not as good as fp32.
    """
    if find_spec("jiwer") is None or find_spec("whisper_normalizer") is None:
        raise BackendError(f"counting words needs jiwer and whisper-normalizer: {install_command('bench')}")
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    rule, rate = normalizer(normalise), bundle.manifest.features.sample_rate
    if checkpoint:
        from nemostream.benchmarks.harness.nemo import NemoOffline

        theirs = NemoOffline(checkpoint, device)
    rows: list[Row] = []
    for chunk in chunks:
        references: dict[str, list[tuple[list[int], str]]] = {}
        for name, utterances in sets.items() if checkpoint else ():
            say(f"{name}, {chunk.ms} ms, NeMo")
            references[name] = [theirs.transcribe(utterance.samples(rate), chunk) for utterance in utterances]
        for precision in precisions:
            with _model(bundle, chunk, precision, device, threads, engines) as model:
                late = _result_times(model, chunk)
                for name, utterances in sets.items():
                    say(f"{name}, {chunk.ms} ms, {precision}")
                    wanted, results = _transcribe(model, utterances, rate)
                    values = word_errors(wanted, [result.text for result in results], rule)
                    values["audio_seconds"] = sum(result.duration for result in results)
                    if name in references:
                        values |= _beside_nemo(references[name], wanted, results, rule)
                    if name in LEADERBOARD and chunk.ms in CARD_CHUNKS:
                        values["card_wer"] = LEADERBOARD[name][1][CARD_CHUNKS.index(chunk.ms)] / 100
                    case = {"set": name, "chunk_ms": chunk.ms, "precision": precision}
                    rows.append(records.row(case, {"result": late}, values))
    rows.sort(key=lambda row: list(sets).index(row["case"]["set"]))
    return records.record(
        "accuracy",
        rows,
        model={
            "name": bundle.manifest.name,
            "layers": bundle.manifest.encoder.layers,
            "d_model": bundle.manifest.encoder.d_model,
            "checkpoint": dict(bundle.manifest.checkpoint),
        },
        method={"normalizer": normalise, "device": device, "nemo": bool(checkpoint), "repeats": _REPEATS},
    )


def _model(
    bundle: Bundle, chunk: ChunkConfig, precision: str, device: str, threads: int | None, engines: Path | None
) -> nemostream.Model:
    from nemostream.engines import build_engine, open_backend
    from nemostream.plans import PlanStore

    if (device, precision) != ("cpu", "fp32"):
        maker = "onnxruntime" if device == "cpu" else "tensorrt"
        build_engine(bundle, chunk, precision, PlanStore(engines), backend=maker, max_batch=_TOGETHER)
    backend = open_backend(
        bundle,
        device=device,
        precision=precision,
        capacity=2 * _TOGETHER,
        max_batch=_TOGETHER,
        threads=threads,
        engines=engines,
    )
    return nemostream.Model(bundle, backend, chunk.ms)


def _result_times(model: nemostream.Model, chunk: ChunkConfig) -> list[float]:
    before = -(-chunk.left // chunk.frames) + _WARM_UP
    feed = Feed(model.manifest, speech(), 1, (before + _REPEATS) * chunk.frames)
    return push_times(model, feed, chunk, before, _REPEATS)


def _transcribe(
    model: nemostream.Model, utterances: Iterable[Utterance], rate: int
) -> tuple[list[str], list[nemostream.Result]]:
    """Wanted texts and results. A set may be larger than the memory: no more than a few recordings are read ahead."""
    wanted, results, rest = list[str](), list[nemostream.Result](), iter(utterances)
    with ThreadPoolExecutor(_TOGETHER) as pool:
        while block := list(islice(rest, 4 * _TOGETHER)):
            wanted += [utterance.text for utterance in block]
            results += pool.map(lambda each: model.transcribe(each.samples(rate), sample_rate=rate), block)
    return wanted, results


def _beside_nemo(
    reference: Sequence[tuple[list[int], str]],
    wanted: Sequence[str],
    results: Sequence[nemostream.Result],
    rule: Callable[[str], str],
) -> dict[str, Any]:
    said = [[token.id for token in result.tokens] for result in results]
    return {
        "nemo_wer": word_errors(wanted, [text for _, text in reference], rule)["wer"],
        "same_tokens": agreement([tokens for tokens, _ in reference], said),
        "same_utterances": sum(a == b for (a, _), b in zip(reference, said, strict=True)),
        "heard": len(said),
    }


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Table and plot of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    head = ["set", "words", "chunk", "precision", "latency, ms", "WER", "NeMo", "change", "same tokens"]
    head += ["same utterances", "model card"]
    lines = []
    for row in result["rows"]:
        case, values = row["case"], row["values"]
        nemo = values.get("nemo_wer")
        line = [case["set"], values["words"], f"{case['chunk_ms']} ms", case["precision"], f"{latency(row):.0f}"]
        line += [tables.percent(values["wer"]), tables.percent(nemo)]
        line.append("" if nemo is None else f"{100 * (values['wer'] - nemo):+.2f}")
        line.append(tables.percent(values.get("same_tokens")))
        same = values.get("same_utterances")
        line.append("" if same is None else f"{same} of {values['heard']}")
        lines.append([*line, tables.percent(values.get("card_wer"))])
    _draw(result["rows"], plot("pareto"))
    return (
        f"Texts normalised: {result['method']['normalizer']}. Latency: a chunk, and the median time from its last "
        f"sample to its text, of one live stream.\n\n{tables.markdown(head, lines)}\n"
    )


def latency(row: Row) -> float:
    """Milliseconds from a chunk's first sample until its text is there."""
    return float(row["case"]["chunk_ms"] + row["figures"]["result"]["p50"])


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (latency, errors) that no other beats in one without losing in the other, by latency."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _draw(rows: Sequence[Row], axes: Any) -> None:
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        kind = row["case"]["set"], row["case"]["precision"]
        points.setdefault(kind, []).append((latency(row), 100 * row["values"]["wer"]))
    for (name, precision), mine in points.items():
        axes.plot(*zip(*sorted(mine), strict=True), marker="o", linestyle=":", label=f"{name}, {precision}")
    for name in dict.fromkeys(name for name, _ in points):
        best = frontier(point for (other, _), mine in points.items() if other == name for point in mine)
        axes.step(*zip(*best, strict=True), where="post", color="black", linewidth=0.8, label=f"{name}, best")
        if name in LEADERBOARD:
            axes.plot(CARD_CHUNKS, LEADERBOARD[name][1], "--", marker="x", label=f"{name}, model card (chunk alone)")
    axes.set(
        xlabel="ms from a chunk's first sample to its text", ylabel="WER, %", xscale="log", title="Latency and accuracy"
    )
    axes.legend(fontsize=7)


def headline(result: Record) -> str:
    """For the README: word error rates by set and precision, over chunk sizes."""
    sizes = sorted({row["case"]["chunk_ms"] for row in result["rows"]})
    found = {
        (row["case"]["set"], row["case"]["precision"], row["case"]["chunk_ms"]): row["values"] for row in result["rows"]
    }
    lines = []
    for name, precision in dict.fromkeys(key[:2] for key in found):
        mine = [found.get((name, precision, ms)) for ms in sizes]
        lines.append([f"{name}, {precision}", *(tables.percent(values["wer"]) if values else "" for values in mine)])
        nemo = [tables.percent(values.get("nemo_wer")) if values else "" for values in mine]
        if any(nemo) and precision == "fp32":
            lines.append([f"{name}, NeMo", *nemo])
    table = tables.markdown(["word error rate", *(f"{ms} ms" for ms in sizes)], lines)
    return f"Words, model *{result['model']['name']}*:\n\n{table}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = records.parser("accuracy", __doc__)
    records.engine_options(parser)
    parser.add_argument("--manifest", type=Path, nargs="+", default=[], help="NeMo manifests")
    parser.add_argument("--dataset", nargs="+", default=[], help=f"name:config:split, or of {', '.join(LEADERBOARD)}")
    parser.add_argument("--limit", type=int, help="utterances of each set")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--normalizer", default="english", choices=NORMALIZERS)
    parser.add_argument("--checkpoint", type=Path, help="the .nemo file the bundle was made of, to compare with NeMo")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = Bundle.open(options.bundle or nemostream.demo_bundle())
        sets: dict[str, Iterable[Utterance]] = {}
        for path in options.manifest:
            sets[path.stem] = read_manifest(path)[: options.limit]
        for name in options.dataset:
            sets[name] = Hub(name, options.limit)
        with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
            return measure_accuracy(
                bundle,
                sets or {"packaged": packaged(bundle.manifest)},
                options.precision,
                options.chunk_ms,
                normalise=options.normalizer,
                checkpoint=options.checkpoint,
                device=options.device,
                threads=options.threads,
                engines=options.engines or (Path(folder) if options.device == "cpu" else None),
                say=records.say,
            )

    records.run(measure, options)


if __name__ == "__main__":
    main()
