"""What the demo model gets right, streamed through nemostream's own runtime at every chunk size.

    nemostream export demo.nemo BUNDLE
    python evaluate.py --data WORK --bundle BUNDLE --out demo.json [--speech SPEECH] [--clips heldout]

Sets, none heard in training: the grammar's held-out sentences by the training voices (the `test-*` shards but
`test-002`, which training's log follows), held-out sentences of free texts by the same voices, strings of the left-out
human speaker's digits, the left-out human prompts, and recordings of people that SPEECH/human.jsonl lists. Beside word
error rates (lower case, no punctuation): how long after a word's end its last token is out, words made of ten minutes
of silence and noise, and how the tokens come, for tests that need speech-like load.
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
    """The left-out speaker's single digits in rows, a quarter of a second apart on average."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        picks = rng.choice(len(clips), int(rng.integers(2, 8)))
        pieces = [_silence(rng, 0.1, 0.4)]
        for pick in picks:
            pieces += [clips[pick].audio, _silence(rng, 0.1, 0.4)]
        text = " ".join(clips[pick].text for pick in picks)
        made.append(Scored(np.concatenate(pieces), text, "digits", clips[0].voice))
    return made


def _silence(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    return np.zeros(int(rng.uniform(low, high) * RATE), np.float32)


def people(speech: Path) -> list[Scored]:
    found = []
    for line in (speech / "human.jsonl").read_text().splitlines():
        row = json.loads(line)
        audio, rate = soundfile.read(speech / row["audio_filepath"], dtype="float32")
        found.append(Scored(soxr.resample(audio, rate, RATE), row["text"], "people", Path(row["audio_filepath"]).stem))
    return found


def noises(seed: int = 0) -> Iterable[tuple[str, np.ndarray]]:
    """Ten minutes: silence, and white and brownish noise from faint to loud."""
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


def hear(model: Model, clips: list[Scored], chunk_ms: int) -> list[Result]:
    def one(clip: Scored) -> Result:
        return model.transcribe(clip.audio, sample_rate=RATE, chunk_ms=chunk_ms)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, clips))


def rate(clips: list[Scored], results: list[Result]) -> dict[str, float]:
    pairs = [(words(clip.text), words(result.text)) for clip, result in zip(clips, results, strict=True) if clip.text]
    wrong = sum(errors(wanted, got) for wanted, got in pairs)
    count = sum(len(wanted) for wanted, _ in pairs)
    exact = sum(clip.text == result.text for clip, result in zip(clips, results, strict=True))
    return {
        "wer": round(wrong / count, 4),
        "errors": wrong,
        "words": count,
        "clips": len(clips),
        "right_to_the_last_comma": round(exact / len(clips), 4),
    }


def delays(clips: list[Scored], results: list[Result], chunk_ms: int) -> dict[str, float]:
    """Seconds from a word's end to the end of the chunk in which its last token came, in clips all right."""
    late, frames = [], []
    for clip, result in zip(clips, results, strict=True):
        if clip.ends is None or words(clip.text) != words(result.text) or len(clip.text.split()) != len(clip.ends):
            continue
        last: list[float] = []
        for token in result.tokens:
            if token.text.startswith(" ") or not last:
                last.append(token.time)
            elif any(c.isalnum() for c in token.text):
                last[-1] = token.time  # punctuation may wait
        if len(last) != len(clip.ends):
            continue
        for at, end in zip(last, clip.ends, strict=True):
            frames.append(at - end)
            late.append((np.floor(round(at / FRAME) * FRAME / (chunk_ms / 1000) + 1e-6) + 1) * chunk_ms / 1000 - end)
    if not late:
        return {}
    return {
        "words": len(late),
        "median": round(float(np.median(late)), 3),
        "p95": round(float(np.quantile(late, 0.95)), 3),
        "median_to_token_time": round(float(np.median(frames)), 3),
    }


def manner(clips: list[Scored], results: list[Result]) -> dict[str, float]:
    seconds = sum(len(clip.audio) for clip in clips) / RATE
    tokens = [token for result in results for token in result.tokens]
    scores = np.exp([token.score for token in tokens])
    said = sum(len({round(t.time / FRAME) for t in result.tokens}) for result in results)
    return {
        "tokens_per_second": round(len(tokens) / seconds, 3),
        "words_per_second": round(sum(len(r.text.split()) for r in results) / seconds, 3),
        "frames_without_a_token": round(1 - said / (seconds / FRAME), 4),
        "mean_token_probability": round(float(scores.mean()), 3),
    }


def write_clips(folder: Path, sources: list[tuple[str, list[Scored]]]) -> None:
    """FLAC files and a NeMo manifest. Clips are taken at a fixed stride, none for what the model makes of it."""
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
    parser.add_argument("--limit", type=int, help="only so many held-out sentences")
    parser.add_argument("--clips", type=Path, help="also write a few held-out clips into this folder, for tests")
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
                results = hear(model, clips, chunk)
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
                    found["delay"], found["manner"] = delays(clips, results, chunk), manner(clips, results)
                elif name == "people" and chunk == 560:
                    found["heard"] = {clip.voice: [clip.text, r.text] for clip, r in zip(clips, results, strict=True)}
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
