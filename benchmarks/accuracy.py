"""How many words are wrong, per chunk size and precision, and whether NeMo gets the same ones wrong.

    nemostream bench accuracy --manifest heldout.jsonl --precision fp32 int8 --normalizer basic
    nemostream bench accuracy --bundle BUNDLE --dataset librispeech-clean ami --checkpoint model.nemo

Sets: NeMo manifests (`audio_filepath`, `text`, a JSON object a line); the eight of the Open ASR leaderboard by name;
any data set of the Hugging Face hub as `name:config:split` (with columns `audio` and `text`; the `datasets` package);
without any of these the clip that is packaged. Word error rate is `jiwer`'s, summed over a set, of texts normalised by
`whisper-normalizer` as the leaderboard does (`english`); strings of digits are better counted with `basic`, since
`english` makes one number, one word, of them. Utterances whose text is empty after that are left out, as there.

With `--checkpoint` NeMo hears the same audio (offline, with the same chunk size's attention), one recording at a time:
its own word error rate, and the share of its tokens that we say too. Beside the leaderboard's sets stands what the
model's card says.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nemostream
from nemostream.benchmarks import record, tables
from nemostream.benchmarks.record import Record, Say, agreement
from nemostream.clips import read_clip
from nemostream.errors import BackendError, OptionError
from nemostream.spec import Bundle, Chunk, Manifest

NORMALIZERS = ("english", "basic", "none")
_TOGETHER = 16

# By name: configuration and split of hf-audio/esb-datasets-test-only-sorted, which the leaderboard is computed on, and
# the published model's WER in percent at 1120, 560, 160 and 80 ms.
# Source: model card of nvidia/nemotron-speech-streaming-en-0.6b, March 2026.
LEADERBOARD = {
    "ami": (("ami", "test"), (11.73, 11.88, 14.71, 18.29)),
    "earnings22": (("earnings22", "test"), (12.52, 12.82, 13.01, 13.16)),
    "gigaspeech": (("gigaspeech", "test"), (9.66, 9.78, 10.34, 11.17)),
    "librispeech-clean": (("librispeech", "test.clean"), (2.32, 2.46, 2.56, 2.80)),
    "librispeech-other": (("librispeech", "test.other"), (4.84, 5.07, 5.57, 6.01)),
    "spgispeech": (("spgispeech", "test"), (2.97, 3.03, 3.25, 3.43)),
    "tedlium": (("tedlium", "test"), (3.50, 3.54, 3.77, 4.10)),
    "voxpopuli": (("voxpopuli", "test"), (7.91, 8.00, 8.18, 8.46)),
}
_HUB = "hf-audio/esb-datasets-test-only-sorted"
_CARD_CHUNKS = (1120, 560, 160, 80)


@dataclass(frozen=True)
class Utterance:
    """A recording, a path or samples at the model's rate, and what is said in it."""

    audio: Any
    text: str


def read_manifest(path: Path) -> list[Utterance]:
    """A NeMo manifest; relative paths are meant from its folder. Raises `OptionError` naming the line that is none."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(Utterance(path.parent / row["audio_filepath"], row["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"{path}, line {number}, is not a manifest's: it needs audio_filepath and text."
            ) from error
    if not found:
        raise OptionError(f"{path} names no recording.")
    return found


def packaged(manifest: Manifest) -> list[Utterance]:
    """The voice that comes with the package."""
    return [Utterance(read_clip("clip", manifest.features.sample_rate), "two zero two six four one five eight")]


def read_hub(name: str, rate: int) -> Iterable[Utterance]:
    """A data set of the hub: one of `LEADERBOARD`, or `name:config:split`."""
    if find_spec("datasets") is None:
        raise BackendError("data sets of the hub need the datasets package: pip install datasets")
    import datasets

    if name in LEADERBOARD:
        path, (config, split) = _HUB, LEADERBOARD[name][0]
    elif name.count(":") == 2:
        path, config, split = name.split(":")
    else:
        known = ", ".join(LEADERBOARD)
        raise OptionError(
            f"there is no set {name!r}: choose of {known}, or give name:config:split, or --manifest FILE."
        )
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
        # Decoded here: their own decoding wants PyTorch and FFmpeg.
        for row in rows.cast_column("audio", datasets.Audio(decode=False)):
            text = row.get("text") or row.get("sentence") or row.get("normalized_text") or ""
            audio = row["audio"]
            yield Utterance(_samples(io.BytesIO(audio["bytes"]) if audio["bytes"] else audio["path"], rate), text)
    except (OSError, ValueError, KeyError) as error:
        raise BackendError(f"{name} cannot be had from the hub: {error}") from error


def normalizer(name: str) -> Callable[[str], str]:
    """Raises `OptionError` for an unknown name."""
    if name not in NORMALIZERS:
        raise OptionError(f"normalizer is {name!r}; choose one of {', '.join(NORMALIZERS)}.")
    if name == "none":
        return lambda text: text
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer() if name == "english" else BasicTextNormalizer()


def word_errors(wanted: Sequence[str], said: Sequence[str], normalise: Callable[[str], str]) -> dict[str, Any]:
    """Errors, words and their rate over all pairs whose wanted text is not empty once normalised."""
    import jiwer

    pairs = [
        (a, normalise(b)) for a, b in ((normalise(text), got) for text, got in zip(wanted, said, strict=True)) if a
    ]
    if not pairs:
        return {"wer": 0.0, "errors": 0, "words": 0, "utterances": 0}
    found = jiwer.process_words(*(list(side) for side in zip(*pairs, strict=True)))
    errors = found.substitutions + found.deletions + found.insertions
    words = found.hits + found.substitutions + found.deletions
    return {"wer": errors / words, "errors": errors, "words": words, "utterances": len(pairs)}


def measure_accuracy(
    bundle: Bundle,
    sets: dict[str, Sequence[Utterance]],
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
    """The result. int8 for a CPU is built (and gated) if the folder of engines has none."""
    from nemostream.engines import build_engine, open_backend
    from nemostream.plans import PlanStore

    if find_spec("jiwer") is None or find_spec("whisper_normalizer") is None:
        raise BackendError("counting words needs jiwer and whisper-normalizer: pip install 'nemostream[bench]'")
    chunks = [bundle.manifest.chunk(ms) for ms in chunk_ms] if chunk_ms else list(bundle.manifest.chunks)
    rule = normalizer(normalise)
    theirs = _Nemo(checkpoint, bundle.manifest) if checkpoint else None
    rows = []
    for name, utterances in sets.items():
        wanted = [utterance.text for utterance in utterances]
        for chunk in chunks:
            reference: list[tuple[list[int], str]] | None = None
            if theirs:
                say(f"{name}, {chunk.ms} ms, NeMo")
                reference = [theirs.transcribe(utterance.audio, chunk) for utterance in utterances]
            for precision in precisions:
                say(f"{name}, {chunk.ms} ms, {precision}")
                if device == "cpu" and precision != "fp32":
                    build_engine(bundle, chunk, precision, PlanStore(engines), backend="onnxruntime")
                backend = open_backend(
                    bundle, device=device, precision=precision, capacity=2 * _TOGETHER, max_batch=_TOGETHER,
                    threads=threads, engines=engines,
                )  # fmt: skip
                with nemostream.Model(bundle, backend, chunk.ms) as model, ThreadPoolExecutor(_TOGETHER) as pool:
                    results = list(pool.map(lambda each, model=model: model.transcribe(each.audio), utterances))
                values = word_errors(wanted, [result.text for result in results], rule)
                values["audio_seconds"] = sum(result.duration for result in results)
                if reference:
                    values["nemo_wer"] = word_errors(wanted, [text for _, text in reference], rule)["wer"]
                    said = [[token.id for token in result.tokens] for result in results]
                    values["same_tokens"] = agreement([tokens for tokens, _ in reference], said)
                    values["same_utterances"] = sum(a == b for (a, _), b in zip(reference, said, strict=True))
                if name in LEADERBOARD and chunk.ms in _CARD_CHUNKS:
                    values["card_wer"] = LEADERBOARD[name][1][_CARD_CHUNKS.index(chunk.ms)] / 100
                rows.append(record.row({"set": name, "chunk_ms": chunk.ms, "precision": precision}, {}, values))
    return record.record(
        "accuracy", rows,
        model={"name": bundle.manifest.name, "layers": bundle.manifest.encoder.layers,
               "d_model": bundle.manifest.encoder.d_model, "checkpoint": dict(bundle.manifest.checkpoint)},
        method={"normalizer": normalise, "device": device, "nemo": bool(checkpoint)},
    )  # fmt: skip


def _samples(file: Any, rate: int) -> NDArray[np.float32]:
    """A whole recording [N], one channel, at the model's rate."""
    import soundfile
    import soxr

    samples, its_rate = soundfile.read(file, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), its_rate, rate)


class _Nemo:
    """NeMo itself: the offline forward with a chunk size's mask, and its greedy decoding."""

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        from nemostream.benchmarks.sides import load_nemo

        self._model, self._rate = load_nemo(checkpoint), manifest.features.sample_rate

    def transcribe(self, audio: Any, chunk: Chunk) -> tuple[list[int], str]:
        import torch

        if not isinstance(audio, np.ndarray):
            audio = _samples(audio, self._rate)
        model, device = self._model, next(self._model.parameters()).device
        model.encoder.set_default_att_context_size([chunk.left, chunk.frames - 1])
        model.preprocessor.featurizer.dither = 0.0
        with torch.inference_mode():
            samples = torch.from_numpy(audio.astype(np.float32))[None].to(device)
            mel, length = model.preprocessor(
                input_signal=samples, length=torch.tensor([samples.shape[1]], device=device)
            )
            encoded, length = model.encoder(audio_signal=mel, length=length)
            hypothesis = model.decoding.rnnt_decoder_predictions_tensor(encoded, length, return_hypotheses=True)[0]
        tokens = [int(token) for token in hypothesis.y_sequence]
        return tokens, model.tokenizer.ids_to_text(tokens)


# -- report ------------------------------------------------------------------------------------------------------------


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def show(result: Record, plot: Callable[[str], Any]) -> str:
    """Table and plot of a result, as Markdown; `plot(name)` gives axes and keeps the picture."""
    head = [
        "set",
        "words",
        "chunk",
        "precision",
        "WER",
        "NeMo",
        "change",
        "same tokens",
        "same utterances",
        "model card",
    ]
    lines = []
    for row in result["rows"]:
        case, values = row["case"], row["values"]
        nemo = values.get("nemo_wer")
        line = [case["set"], values["words"], f"{case['chunk_ms']} ms", case["precision"], _percent(values["wer"])]
        line += [_percent(nemo), "" if nemo is None else f"{100 * (values['wer'] - nemo):+.2f}"]
        line.append(_percent(values.get("same_tokens")))
        same = values.get("same_utterances")
        line.append("" if same is None else f"{same} of {values['utterances']}")
        lines.append([*line, _percent(values.get("card_wer"))])
    axes = plot("pareto")
    for name, precision in dict.fromkeys((row["case"]["set"], row["case"]["precision"]) for row in result["rows"]):
        points = sorted(
            (row["case"]["chunk_ms"], 100 * row["values"]["wer"]) for row in result["rows"]
            if (row["case"]["set"], row["case"]["precision"]) == (name, precision)
        )  # fmt: skip
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {precision}")
    for name in dict.fromkeys(row["case"]["set"] for row in result["rows"]):
        if name in LEADERBOARD:
            axes.plot(_CARD_CHUNKS, LEADERBOARD[name][1], ":", marker="x", label=f"{name}, model card")
    axes.set(xlabel="chunk, ms (the longest wait for a chunk to fill)", ylabel="WER, %", xscale="log",
             title="Latency and accuracy")  # fmt: skip
    axes.legend(fontsize=7)
    return f"Texts normalised: {result['method']['normalizer']}.\n\n{tables.markdown(head, lines)}\n"


def headline(result: Record) -> str:
    """For the README: word error rates by set and precision, over chunk sizes."""
    sizes = sorted({row["case"]["chunk_ms"] for row in result["rows"]})
    found = {(row["case"]["set"], row["case"]["precision"], row["case"]["chunk_ms"]): row["values"]
             for row in result["rows"]}  # fmt: skip
    lines = []
    for name, precision in dict.fromkeys(key[:2] for key in found):
        mine = [found.get((name, precision, ms)) for ms in sizes]
        lines.append([f"{name}, {precision}", *(_percent(values["wer"]) if values else "" for values in mine)])
        nemo = [_percent(values.get("nemo_wer")) if values else "" for values in mine]
        if any(nemo) and precision == "fp32":
            lines.append([f"{name}, NeMo", *nemo])
    table = tables.markdown(["word error rate", *(f"{ms} ms" for ms in sizes)], lines)
    return f"Words, model *{result['model']['name']}*:\n\n{table}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.parser("accuracy", __doc__)
    record.engine_options(parser)
    parser.add_argument("--manifest", type=Path, nargs="+", default=[], help="NeMo manifests")
    parser.add_argument("--dataset", nargs="+", default=[], help=f"name:config:split, or of {', '.join(LEADERBOARD)}")
    parser.add_argument("--limit", type=int, help="utterances of each set")
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--normalizer", default="english", choices=NORMALIZERS)
    parser.add_argument("--checkpoint", type=Path, help="the .nemo file the bundle was made of, to compare with NeMo")
    options = parser.parse_args(arguments)

    def measure() -> Record:
        bundle = Bundle.open(options.bundle or nemostream.demo_bundle())
        sets: dict[str, Sequence[Utterance]] = {path.stem: read_manifest(path) for path in options.manifest}
        for name in options.dataset:
            sets[name] = list(_first(read_hub(name, bundle.manifest.features.sample_rate), options.limit))
        sets = sets or {"packaged": packaged(bundle.manifest)}
        sets = {name: list(_first(utterances, options.limit)) for name, utterances in sets.items()}
        with tempfile.TemporaryDirectory(prefix="nemostream-") as folder:
            return measure_accuracy(
                bundle, sets, options.precision, options.chunk_ms, normalise=options.normalizer,
                checkpoint=options.checkpoint, device=options.device, threads=options.threads,
                engines=options.engines or (Path(folder) if options.device == "cpu" else None), say=record.say,
            )  # fmt: skip

    record.run(measure, options)


def _first(utterances: Iterable[Utterance], most: int | None) -> Iterable[Utterance]:
    for index, utterance in enumerate(utterances):
        if most is not None and index >= most:
            return
        yield utterance


if __name__ == "__main__":
    main()
