"""Evaluate the demo model with nemostream, at every chunk size.

    nemostream export demo.nemo BUNDLE
    python evaluate.py --data WORK --bundle BUNDLE --out demo.json [--speech SPEECH] [--clips heldout]

Test sets, none used in training: held-out grammar sentences by the training voices (all `test-*` shards except
`test-002`, the validation set of training), held-out sentences of free texts by the same voices, strings of digits by
the held-out human speaker, the held-out human prompts, and the recordings listed in SPEECH/human.jsonl. Besides word
error rates (lower case, no punctuation), it measures the delay from the end of a word to the emission of its last
token, the words emitted for ten minutes of silence and noise, and the rate of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile
import soxr
from score import RATE, Scored, errors, read_shard, words

import nemostream
from nemostream.bundle import Bundle
from nemostream.runtime.model import Model
from nemostream.runtime.text.words import Result

FRAME = 0.08
CHUNKS = (1120, 560, 160, 80)


def digit_strings(clips: list[Scored], count: int = 80, seed: int = 3) -> list[Scored]:
    """Join single digits of the held-out speaker to strings, with pauses of 0.25 s on average."""
    rng = np.random.default_rng(seed)
    strings = []
    for _ in range(count):
        indices = rng.choice(len(clips), int(rng.integers(2, 8)))
        pieces = [_silence(rng, 0.1, 0.4)]
        for index in indices:
            pieces += [clips[index].audio, _silence(rng, 0.1, 0.4)]
        text = " ".join(clips[index].text for index in indices)
        strings.append(Scored(np.concatenate(pieces), text, "digits", clips[0].voice))
    return strings


def _silence(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    return np.zeros(int(rng.uniform(low, high) * RATE), np.float32)


def people(speech: Path) -> list[Scored]:
    """Read the recordings listed in human.jsonl."""
    found = []
    for line in (speech / "human.jsonl").read_text().splitlines():
        row = json.loads(line)
        audio, rate = soundfile.read(speech / row["audio_filepath"], dtype="float32")
        found.append(Scored(soxr.resample(audio, rate, RATE), row["text"], "people", Path(row["audio_filepath"]).stem))
    return found


def noises(seed: int = 0) -> Iterable[tuple[str, np.ndarray]]:
    """Yield ten minutes of audio: silence, and white and brown noise at several levels."""
    rng = np.random.default_rng(seed)
    white = rng.standard_normal(120 * RATE).astype(np.float32)
    brown = np.convolve(white, np.exp(-np.arange(400) / 40.0), "same").astype(np.float32)
    brown /= brown.std()
    yield "silence", np.zeros(120 * RATE, np.float32)
    for name, noise, level in (
        ("white -60 dBFS", white, -60),
        ("white -30 dBFS", white, -30),
        ("brown -45 dBFS", brown, -45),
        ("brown -25 dBFS", brown, -25),
    ):
        yield name, noise * np.float32(10 ** (level / 20))


def transcribe(model: Model, clips: list[Scored], chunk_ms: int) -> list[Result]:
    """Transcribe clips, up to 16 at a time."""

    def transcribe_one(clip: Scored) -> Result:
        return model.transcribe(clip.audio, sample_rate=RATE, chunk_ms=chunk_ms)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(transcribe_one, clips))


def rate(clips: list[Scored], results: list[Result]) -> dict[str, float]:
    """Return the word error rate, its counts, and the share of clips that match exactly."""
    pairs = [(words(clip.text), words(result.text)) for clip, result in zip(clips, results, strict=True) if clip.text]
    word_errors = sum(errors(wanted, got) for wanted, got in pairs)
    count = sum(len(wanted) for wanted, _ in pairs)
    exact = sum(clip.text == result.text for clip, result in zip(clips, results, strict=True))
    return {
        "wer": round(word_errors / count, 4),
        "errors": word_errors,
        "words": count,
        "clips": len(clips),
        "exact_match": round(exact / len(clips), 4),
    }


def delays(clips: list[Scored], results: list[Result], chunk_ms: int) -> dict[str, float]:
    """Return statistics of the delay (s) from the end of a word to the end of the chunk that emits its last token.

    Only clips without errors count.
    """
    chunk_delays, token_delays = [], []
    for clip, result in zip(clips, results, strict=True):
        if clip.ends is None or words(clip.text) != words(result.text) or len(clip.text.split()) != len(clip.ends):
            continue
        last: list[float] = []
        for token in result.tokens:
            if token.text.startswith(" ") or not last:
                last.append(token.time)
            elif any(c.isalnum() for c in token.text):
                last[-1] = token.time  # punctuation does not count
        if len(last) != len(clip.ends):
            continue
        for time, end in zip(last, clip.ends, strict=True):
            token_delays.append(time - end)
            chunk = np.floor(round(time / FRAME) * FRAME / (chunk_ms / 1000) + 1e-6)
            chunk_delays.append((chunk + 1) * chunk_ms / 1000 - end)
    if not chunk_delays:
        return {}
    return {
        "words": len(chunk_delays),
        "median": round(float(np.median(chunk_delays)), 3),
        "p95": round(float(np.quantile(chunk_delays, 0.95)), 3),
        "median_to_token_time": round(float(np.median(token_delays)), 3),
    }


def emission(clips: list[Scored], results: list[Result]) -> dict[str, float]:
    """Return rates of tokens and words, and the mean token probability."""
    seconds = sum(len(clip.audio) for clip in clips) / RATE
    tokens = [token for result in results for token in result.tokens]
    scores = np.exp([token.score for token in tokens])
    frames = sum(len({round(t.time / FRAME) for t in result.tokens}) for result in results)
    return {
        "tokens_per_second": round(len(tokens) / seconds, 3),
        "words_per_second": round(sum(len(r.text.split()) for r in results) / seconds, 3),
        "frames_without_a_token": round(1 - frames / (seconds / FRAME), 4),
        "mean_token_probability": round(float(scores.mean()), 3),
    }


def write_clips(folder: Path, sources: list[tuple[str, list[Scored]]]) -> None:
    """Write FLAC files and a NeMo manifest. The clips do not depend on the model's results."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, clips in sources:
        for number, clip in enumerate(clips):
            file = f"{name}-{number:03}.flac"
            soundfile.write(folder / file, clip.audio, RATE)
            rows.append(
                {
                    "audio_filepath": file,
                    "duration": round(len(clip.audio) / RATE, 3),
                    "text": clip.text,
                    "kind": clip.kind,
                    "voice": clip.voice,
                }
            )
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("demo.json"))
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--limit", type=int, help="maximum number of held-out sentences")
    parser.add_argument("--clips", type=Path, help="folder for a few held-out clips, which tests use")
    options = parser.parse_args()
    shards = ["test-000", "test-001", *sorted(path.stem for path in options.data.glob("test-kokoro-*.jsonl"))]
    heldout = [clip for name in shards for clip in read_shard(options.data, name)][: options.limit]
    sets = {
        "held_out": [clip for clip in heldout if clip.kind != "text"],
        "free": [clip for clip in heldout if clip.kind == "text"],
        "digits": digit_strings(read_shard(options.data, "test-digits")),
        "prompts": read_shard(options.data, "test-prompts"),
    }
    if options.speech:
        sets["people"] = people(options.speech)
    figures: dict = {"chunks": {}}
    figures["bundle_bytes"] = sum(file.stat().st_size for file in Bundle.open(options.bundle).path.iterdir())
    figures["backend"] = f"onnxruntime {version('onnxruntime')} on {os.cpu_count()} cores of a CPU"
    with nemostream.load(options.bundle, capacity=16) as model:
        for chunk in CHUNKS:
            figures["chunks"][f"{chunk}ms"] = found = {}
            for name, clips in sets.items():
                results = transcribe(model, clips, chunk)
                found[name] = rate(clips, results)
                if name == "held_out":
                    kinds = sorted({clip.kind for clip in clips})
                    picks = {kind: [n for n, clip in enumerate(clips) if clip.kind == kind] for kind in kinds}
                    found["by_kind"] = {
                        kind: rate([clips[n] for n in part], [results[n] for n in part])["wer"]
                        for kind, part in picks.items()
                    }
                    voices = sorted({clip.voice.split("-")[0] for clip in clips})
                    by = {v: [n for n, clip in enumerate(clips) if clip.voice.startswith(v)] for v in voices}
                    found["by_voice"] = {
                        voice: rate([clips[n] for n in part], [results[n] for n in part])["wer"]
                        for voice, part in by.items()
                    }
                    found["delay"], found["emission"] = delays(clips, results, chunk), emission(clips, results)
                elif name == "people" and chunk == 560:
                    pairs = zip(clips, results, strict=True)
                    found["transcripts"] = {clip.voice: [clip.text, result.text] for clip, result in pairs}
            found["words_in_noise"] = {
                name: len(model.transcribe(noise, sample_rate=RATE, chunk_ms=chunk).text.split())
                for name, noise in noises()
            }
            print(chunk, json.dumps({name: found[name] for name in (*sets, "delay", "words_in_noise")}), flush=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    if options.clips:
        write_clips(options.clips, [("sentence", heldout[::33]), ("digits", sets["digits"][:6])])


if __name__ == "__main__":
    main()
