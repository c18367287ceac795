"""Word error rate by chunk size and precision, compared with NeMo.

    nemostream bench accuracy --manifest heldout.jsonl --precision fp32 int8 --normalizer basic
    nemostream bench accuracy --bundle BUNDLE --dataset librispeech-clean ami --checkpoint model.nemo

Data sets: NeMo manifests (`audio_filepath`, `text`, optional `offset` and `duration`; JSON Lines), the eight sets of
the Open ASR leaderboard by name, or any data set of the Hugging Face hub as `name:config:split` (columns `audio` and
`text`; needs the `datasets` package). The default is the packaged clip. The word error rate is computed by `jiwer` over
all utterances of a set. Texts are normalised by `whisper-normalizer` like on the leaderboard (`english`); use `basic`
for other languages, and for strings of digits, because `english` joins them to one number, which is one word. `basic`
removes case and punctuation and keeps marks, which are vowels in Hindi and Thai; the dotted and the dotless i of
Turkish are the same. Utterances whose reference is empty after normalisation are skipped, like on the leaderboard.

Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words: each of their characters counts as a word,
so the rate is a character error rate, and a mixed one for text with words of other scripts.

With `--checkpoint`, NeMo transcribes the same samples offline with the attention mask of the same chunk size, one
recording at a time. The table shows its word error rate and the share of its tokens that nemostream emits too. For the
sets of the leaderboard, the table also shows the figures of the model card.

Latency is the chunk duration plus the median time from the last sample of a chunk to its text, for one live stream.
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

import numpy as np

import nemostream
from nemostream.benchmarks import command
from nemostream.benchmarks.harness import records, tables
from nemostream.benchmarks.harness.corpora import (
    CARD_CHUNKS,
    LEADERBOARD,
    CorpusUtterance,
    Hub,
    packaged,
    read_manifest,
)
from nemostream.benchmarks.harness.plots import Chart, Curve, CurveChart, CurvePanel
from nemostream.benchmarks.harness.records import Progress, Record, Row, agreement, no_progress, rate_interval
from nemostream.benchmarks.harness.synthetic import speech
from nemostream.benchmarks.harness.timed import AudioFeed
from nemostream.benchmarks.latency import push_times
from nemostream.bundle import Bundle, ChunkConfig
from nemostream.errors import BackendError, OptionError
from nemostream.extras import install_command
from nemostream.runtime.text.scripts import separate_characters

NORMALIZERS = ("english", "basic", "none")
_CONCURRENT = 16  # recordings transcribed at the same time
_REPEATS = 20  # chunks whose latency is measured
_WARM_UP = 5  # chunks


@cache
def normalizer(name: str) -> Callable[[str], str]:
    """Return a function that normalises texts and separates characters of scripts without spaces.

    Raises `OptionError` for an unknown name.
    """
    if name not in NORMALIZERS:
        raise OptionError(f"normalizer is {name!r}; choose one of {', '.join(NORMALIZERS)}.")
    if name == "none":
        return separate_characters
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    normalise = EnglishTextNormalizer() if name == "english" else BasicTextNormalizer(preserve_marks=True)
    fold = str.maketrans("İı", "ii")  # the language is not known, and lower case of "İ" would be two characters
    return lambda text: separate_characters(normalise(text.translate(fold)))


def require_word_errors() -> None:
    """Raise `BackendError` if a package for word error rates is missing."""
    if find_spec("jiwer") is None or find_spec("whisper_normalizer") is None:
        raise BackendError(f"word error rates need jiwer and whisper-normalizer: {install_command('bench')}")


def plain(text: str) -> str:
    """Return the text without case and punctuation."""
    return normalizer("basic")(text).strip()


def word_errors(references: Sequence[str], texts: Sequence[str], normalise: Callable[[str], str]) -> dict[str, Any]:
    """Return errors, words, word error rate and number of utterances, and [errors, words] of each (`by_utterance`).

    Pairs whose normalised reference is empty are skipped.
    """
    import jiwer

    normalised = [(normalise(reference), text) for reference, text in zip(references, texts, strict=True)]
    pairs = [(reference, normalise(text)) for reference, text in normalised if reference]
    if not pairs:
        return {"wer": 0.0, "errors": 0, "words": 0, "utterances": 0, "by_utterance": []}
    found = jiwer.process_words(*(list(column) for column in zip(*pairs, strict=True)))
    by_utterance = [
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
    return {
        "wer": errors / words,
        "errors": errors,
        "words": words,
        "utterances": len(pairs),
        "by_utterance": by_utterance,
    }


def measure_accuracy(
    bundle: Bundle,
    sets: Mapping[str, Iterable[CorpusUtterance]],
    precisions: Sequence[str] = ("fp32",),
    chunk_ms: Sequence[int] | None = None,
    *,
    normalise: str = "english",
    checkpoint: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    engines: Path | None = None,
    progress: Progress = no_progress,
) -> Record:
    """Measure word error rates and return the result.

    `sets` are iterated once for each chunk size and precision. Engines that the folder does not contain are built and
    validated. Raises `OptionError` for invalid options, `AudioError` if a recording cannot be read, `BackendError` if a
    package, device or engine is missing, and `EngineValidationError` if an engine does not match fp32.
    """
    require_word_errors()
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    normalise_text, rate = normalizer(normalise), bundle.manifest.features.sample_rate
    if checkpoint:
        from nemostream.benchmarks.harness.nemo import NemoOffline

        nemo = NemoOffline(checkpoint, device)
    rows: list[Row] = []
    for chunk in chunks:
        references: dict[str, list[tuple[list[int], str]]] = {}
        for name, utterances in sets.items() if checkpoint else ():
            progress(f"{name}, {chunk.ms} ms, NeMo")
            references[name] = [nemo.transcribe(utterance.samples(rate), chunk) for utterance in utterances]
        for precision in precisions:
            with _model(bundle, chunk, precision, device, threads, engines) as model:
                latencies = _result_times(model, chunk)
                for name, utterances in sets.items():
                    progress(f"{name}, {chunk.ms} ms, {precision}")
                    texts, results = _transcribe(model, utterances, rate)
                    values = word_errors(texts, [result.text for result in results], normalise_text)
                    values["audio_seconds"] = sum(result.duration for result in results)
                    if name in references:
                        values |= _compare_with_nemo(references[name], texts, results, normalise_text)
                    if name in LEADERBOARD and chunk.ms in CARD_CHUNKS:
                        values["card_wer"] = LEADERBOARD[name][1][CARD_CHUNKS.index(chunk.ms)] / 100
                    case = {"set": name, "chunk_ms": chunk.ms, "precision": precision}
                    rows.append(records.row(case, {"result": latencies}, values))
    rows.sort(key=lambda row: list(sets).index(row["case"]["set"]))
    return records.record(
        "accuracy",
        rows,
        model=records.model_of(bundle.manifest) | {"checkpoint": dict(bundle.manifest.checkpoint)},
        method={"normalizer": normalise, "device": device, "nemo": bool(checkpoint), "repeats": _REPEATS},
    )


def _model(
    bundle: Bundle, chunk: ChunkConfig, precision: str, device: str, threads: int | None, engines: Path | None
) -> nemostream.Model:
    from nemostream.engines import build_engine, open_backend
    from nemostream.plans import PlanStore

    if (device, precision) != ("cpu", "fp32"):
        maker = "onnxruntime" if device == "cpu" else "tensorrt"
        build_engine(bundle, chunk, precision, PlanStore(engines), backend=maker, max_batch=_CONCURRENT)
    backend = open_backend(
        bundle,
        device=device,
        precision=precision,
        capacity=2 * _CONCURRENT,
        max_batch=_CONCURRENT,
        threads=threads,
        engines=engines,
    )
    return nemostream.Model(bundle, backend, chunk.ms)


def _result_times(model: nemostream.Model, chunk: ChunkConfig) -> list[float]:
    warm_up = -(-chunk.left // chunk.frames) + _WARM_UP  # until the caches are full, and more
    feed = AudioFeed(model.manifest, speech(), 1, (warm_up + _REPEATS) * chunk.frames)
    return push_times(model, feed, chunk, warm_up, _REPEATS)


def _transcribe(
    model: nemostream.Model, utterances: Iterable[CorpusUtterance], rate: int
) -> tuple[list[str], list[nemostream.Result]]:
    """Return reference texts and results. Only a few recordings are in memory at the same time."""
    texts, results, rest = list[str](), list[nemostream.Result](), iter(utterances)
    with ThreadPoolExecutor(_CONCURRENT) as pool:
        while block := list(islice(rest, 4 * _CONCURRENT)):
            texts += [utterance.text for utterance in block]
            results += pool.map(lambda each: model.transcribe(each.samples(rate), sample_rate=rate), block)
    return texts, results


def _compare_with_nemo(
    nemo: Sequence[tuple[list[int], str]],
    texts: Sequence[str],
    results: Sequence[nemostream.Result],
    normalise: Callable[[str], str],
) -> dict[str, Any]:
    """Compare results with NeMo's tokens and texts of the same recordings; `texts` are the references."""
    tokens = [[token.id for token in result.tokens] for result in results]
    return {
        "nemo_wer": word_errors(texts, [text for _, text in nemo], normalise)["wer"],
        "same_tokens": agreement([nemo_tokens for nemo_tokens, _ in nemo], tokens),
        "same_utterances": sum(a == b for (a, _), b in zip(nemo, tokens, strict=True)),
        "compared_utterances": len(tokens),
    }


# -- report ------------------------------------------------------------------------------------------------------------


def show(result: Record) -> str:
    """Return the table of a result as Markdown."""
    head = ["set", "words", "chunk", "precision", "latency, ms", "WER", "WER of NeMo", "difference, points"]
    head += ["same tokens", "same utterances", "WER in model card"]
    lines = []
    for row in result["rows"]:
        case, values = row["case"], row["values"]
        nemo = values.get("nemo_wer")
        line = [case["set"], values["words"], f"{case['chunk_ms']} ms", case["precision"], f"{latency(row):.0f}"]
        line += [tables.percent(values["wer"]), tables.percent(nemo)]
        line.append("" if nemo is None else f"{100 * (values['wer'] - nemo):+.2f}")
        line.append(tables.percent(values.get("same_tokens")))
        same = values.get("same_utterances")
        line.append("" if same is None else f"{same} of {values['compared_utterances']}")
        lines.append([*line, tables.percent(values.get("card_wer"))])
    return (
        f"Text normaliser: {result['method']['normalizer']}. Latency: chunk duration plus the median time from the "
        "last sample of a chunk to its text, for one live stream. Same tokens: share of NeMo's tokens that nemostream "
        f"emits, in order.\n\n{tables.markdown(head, lines)}\n"
    )


def latency(row: Row) -> float:
    """Return the milliseconds from the first sample of a chunk to its text."""
    return float(row["case"]["chunk_ms"] + row["figures"]["result"]["p50"])


def charts(result: Record) -> dict[str, Chart]:
    """Return the plot of the word error rates by chunk size, with a panel for each set."""
    sizes = sorted({row["case"]["chunk_ms"] for row in result["rows"]})
    sets: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(result["rows"], key=lambda row: row["case"]["chunk_ms"]):
        sets.setdefault(row["case"]["set"], {}).setdefault(row["case"]["precision"], []).append(row)
    panels = []
    for name, precisions in sets.items():
        curves = []
        for series, (precision, rows) in enumerate(precisions.items()):
            shift = 0.12 * (series - (len(precisions) - 1) / 2)  # side by side, because they differ little
            rates = [[100 * rate for rate in rate_interval(row["values"]["by_utterance"])] for row in rows]
            x = [sizes.index(row["case"]["chunk_ms"]) + shift for row in rows]
            points = [(at, rate) for at, (rate, _, _) in zip(x, rates, strict=True)]
            curves.append(Curve(precision, points, [(low, high) for _, low, high in rates], series=series))
        if name in LEADERBOARD:
            card = dict(zip(CARD_CHUNKS, LEADERBOARD[name][1], strict=True))
            points = [(float(sizes.index(ms)), card[ms]) for ms in sizes if ms in card]
            curves.append(Curve("model card", points, style="points", series=len(curves)))
        values = rows[0]["values"]
        panels.append(CurvePanel(f"{name}: {values['utterances']} recordings, {values['words']} words", curves))
    subtitle = "Word error rate of the whole text by chunk size. Whiskers: 95 % bootstrap interval over the recordings."
    ticks = {float(index): f"{ms} ms" for index, ms in enumerate(sizes)}  # equidistant
    return {"wer": CurveChart(_finding(sets), subtitle, panels, "chunk size", " %", ticks)}


def _finding(sets: Mapping[str, Mapping[str, Sequence[Row]]]) -> str:
    """Return whether the error rates of the smallest and the largest chunk size differ, on the first set."""
    name, precisions = next(iter(sets.items()))
    rows = next(iter(precisions.values()))
    small, large = rows[0], rows[-1]
    errors, other = (np.array(row["values"]["by_utterance"]) for row in (small, large))
    _, low, high = rate_interval(np.stack([errors[:, 0] - other[:, 0], errors[:, 1]], axis=1))
    before, after = (
        f"{tables.percent(row['values']['wer'], 1)} at {row['case']['chunk_ms']} ms" for row in (small, large)
    )
    if low <= 0 <= high:
        return f"No significant difference between chunk sizes on {name}: WER {before}, {after}"
    return f"On {name}, WER is {before} and {after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.make_parser("accuracy", __doc__)
    command.add_engine_options(parser, engines="a temporary one for a CPU, ~/.cache/nemostream/engines for a GPU")
    command.add_chunk_option(parser)
    parser.add_argument("--manifest", type=Path, nargs="+", default=[], help="NeMo manifests")
    parser.add_argument(
        "--dataset", nargs="+", default=[], help=f"name:config:split, or one of {', '.join(LEADERBOARD)}"
    )
    parser.add_argument("--limit", type=int, help="maximum number of utterances of each set")
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="precisions of the engines")
    parser.add_argument("--normalizer", default="english", choices=NORMALIZERS, help="text normaliser")
    parser.add_argument("--checkpoint", type=Path, help="source .nemo file of the bundle, to compare with NeMo")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = command.open_bundle(options.bundle)
        sets: dict[str, Iterable[CorpusUtterance]] = {}
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
                progress=records.report_progress,
            )

    command.run(measure, options)


if __name__ == "__main__":
    main()
