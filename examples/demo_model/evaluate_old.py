"""Word error rate of the demo model, decoded by NeMo as it would be streamed (`chunked_limited` masks)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
import torch

RATE = 16000


class Clips:
    """One of `make_data.py`'s files: clips by number, as float32."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as data:
            self.audio, self.start, self.length = data["audio"], data["start"], data["length"]
            self.text, self.voice = data["text"], data["voice"]

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, number: int) -> np.ndarray:
        start = self.start[number]
        return self.audio[start : start + self.length[number]].astype(np.float32) / 32768


def errors(wanted: list[str], got: list[str]) -> int:
    """Word edit distance (Levenshtein)."""
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(got, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


@torch.inference_mode()
def transcribe(model, clips: list[np.ndarray], context: list[int]) -> list[str]:
    model.eval()
    model.encoder.set_default_att_context_size(context)
    device = next(model.parameters()).device
    texts = []
    for first in range(0, len(clips), 16):
        part = clips[first : first + 16]
        length = torch.tensor([len(clip) for clip in part])
        audio = torch.zeros(len(part), int(length.max()))
        for row, clip in enumerate(part):
            audio[row, : len(clip)] = torch.from_numpy(clip)
        mel, mel_length = model.preprocessor(input_signal=audio.to(device), length=length.to(device))
        encoded, frames = model.encoder(audio_signal=mel, length=mel_length)
        hypotheses = model.decoding.rnnt_decoder_predictions_tensor(encoded, frames, return_hypotheses=True)
        texts += [hypothesis.text for hypothesis in hypotheses]
    return texts


def evaluate(model, clips: Clips, context: list[int], limit: int | None = None) -> float:
    numbers = range(len(clips))[:limit]
    got = transcribe(model, [clips[n] for n in numbers], context)
    wrong = sum(errors(str(clips.text[n]).split(), text.split()) for n, text in zip(numbers, got, strict=True))
    return wrong / sum(len(str(clips.text[n]).split()) for n in numbers)


def human_strings(words: Clips, speaker: str, count: int = 60, seed: int = 3) -> Clips:
    """Strings of the left-out speaker's single digits, a quarter second apart on average."""
    rng = np.random.default_rng(seed)
    pool = np.flatnonzero(words.voice == speaker)
    made = Clips.__new__(Clips)
    audio, text = [], []
    for _ in range(count):
        picks = rng.choice(pool, int(rng.integers(2, 8)))
        gaps = [np.zeros(int(rng.uniform(0.1, 0.4) * RATE), np.float32) for _ in range(len(picks) + 1)]
        pieces = [gaps[0]]
        for pick, gap in zip(picks, gaps[1:], strict=True):
            pieces += [words[pick], gap]
        audio.append((np.concatenate(pieces) * 32767).astype(np.int16))
        text.append(" ".join(words.text[picks]))
    made.length = np.array([len(clip) for clip in audio])
    made.start = np.cumsum(made.length) - made.length
    made.audio, made.text, made.voice = np.concatenate(audio), np.array(text), np.array([speaker] * count)
    return made


def write_clips(folder: Path, sources: list[tuple[Clips, range]]) -> None:
    """FLAC files and a NeMo manifest. Clips are taken at a fixed stride, none for what the model makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for clips, numbers in sources:
        for number in numbers:
            voice = str(clips.voice[number])
            name = f"{voice.replace('+', '-')}-{number:03}.flac"
            soundfile.write(folder / name, clips[number], RATE)
            duration = round(float(clips.length[number]) / RATE, 3)
            rows.append({"audio_filepath": name, "duration": duration, "text": str(clips.text[number]), "voice": voice})
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    from nemo.collections.asr.models import ASRModel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("demo.json"))
    parser.add_argument("--clips", type=Path, help="also write a few held-out clips into this folder, for tests")
    options = parser.parse_args()
    model = ASRModel.restore_from(str(options.checkpoint), map_location="cpu")
    heldout, words = Clips(options.data / "heldout.npz"), Clips(options.data / "words.npz")
    human = human_strings(words, "human-yweweler")
    noise = np.random.default_rng(0).standard_normal(60 * RATE).astype(np.float32)
    figures: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_clips": len(heldout),
        "held_out_minutes": round(float(heldout.length.sum()) / RATE / 60, 1),
        "training_minutes": round(
            float(words.length.sum() + Clips(options.data / "strings.npz").length.sum()) / RATE / 60, 1
        ),
        "wer": {},
    }
    for context in ([70, 13], [70, 6], [70, 1], [70, 0]):
        chunk = f"{80 * (context[1] + 1)}ms"
        figures["wer"][chunk] = {
            "held_out_synthetic": round(evaluate(model, heldout, context), 4),
            "left_out_human": round(evaluate(model, human, context), 4),
            "words_in_a_minute_of_noise": sum(
                len(text.split()) for text in transcribe(model, [noise * 1e-3, noise * 0.03, noise * 0], context)
            ),
        }
        print(chunk, figures["wer"][chunk], flush=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    if options.clips:
        write_clips(options.clips, [(heldout, range(0, len(heldout), 12)), (human, range(6))])


if __name__ == "__main__":
    main()
