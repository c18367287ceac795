"""Train a tiny model of two languages whose text depends on the prompt, on a CPU in a minute.

    python train.py --speech SPEECH --out two_languages.nemo

The model writes spoken digits in English (prompt `en-US`) or German (`de-DE`), whatever was spoken. With `auto` it
writes the language in `SPEAKERS`, depending on the voice, and a language tag after each group of digits.

The encoder is that of the demo model (`../demo_model`) without its upper layers. It is not trained further, so that its
output is computed once. The transducer loss and the file format of the demo model are used here as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
import torch
from nemo.collections.asr.models import ASRModel, EncDecRNNTBPEModelWithPrompt
from scipy.signal import resample_poly
from torch.nn import functional

from nemostream.benchmarks.harness.synthetic import Sizes, model_config

sys.path.insert(0, str(Path(__file__).parents[1] / "demo_model"))
from model import FRAME, save
from rnnt_loss import band, band_loss

RATE = 16000
SEED, BATCH, LEARNING_RATE = 5, 12, 4e-3
EARLY, LATE = 0, 3  # frames around the end of a digit in which its token may be emitted
DIGITS = {
    "en-US": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "de-DE": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
}
SPEAKERS = {"jackson": "en-US", "lucas": "de-DE"}  # and the language that `auto` writes
PROMPTS = {"en-US": 0, "en": 0, "de-DE": 1, "de": 1, "auto": 2}
SIZES = Sizes(
    n_layers=2,
    d_model=128,
    n_heads=4,
    conv_channels=32,
    contexts=((56, 3), (56, 0), (56, 6), (56, 13)),
    pred_hidden=64,
    pred_layers=1,
    joint_hidden=96,
    prompts=PROMPTS,
    num_prompts=4,
)


@dataclass
class Example:
    """Audio with the times and values of its labels."""

    audio: np.ndarray
    speaker: str
    digits: list[int | None]  # None: the end of a group, where a tag belongs
    times: list[int]  # encoder frames


@dataclass
class Batch:
    """Examples and their encoder frames."""

    examples: list[Example]
    encoded: torch.Tensor  # [B, T, D]
    frames: torch.Tensor  # [B], valid ones


class Recordings:
    """The digits of the Free Spoken Digit Dataset, at 16 kHz without silence."""

    def __init__(self, speech: Path) -> None:
        self.training: dict[tuple[str, int], list[np.ndarray]] = {}
        self.held_out: dict[tuple[str, int], list[np.ndarray]] = {}
        for speaker in SPEAKERS:
            rows = [json.loads(line) for line in (speech / "digits" / f"{speaker}.jsonl").read_text().splitlines()]
            audio, rate = soundfile.read(speech / rows[0]["audio_filepath"], dtype="float32")
            for row in rows:
                begin = round(row["offset"] * rate)
                clip = resample_poly(audio[begin : begin + round(row["duration"] * rate)], RATE, rate)
                key = (speaker, DIGITS["en-US"].index(row["text"]))
                clips = self.training.setdefault(key, [])
                clips.append(trim(clip.astype(np.float32)))
        for key, clips in self.training.items():  # a tenth of the recordings is for testing
            self.held_out[key] = clips[::10]
            del clips[::10]

    def example(
        self, rng: np.random.Generator, held_out: bool, speaker: str = "", groups: list[list[int]] | None = None
    ) -> Example:
        """Join recordings of a speaker to groups of digits, without repetition of a digit."""
        clips = self.held_out if held_out else self.training
        speaker = speaker or str(rng.choice([*SPEAKERS]))
        if groups is None:
            groups, last = [], -1
            for size in rng.integers(1, 5, 3):
                groups.append([])
                for _ in range(size):
                    last = int(rng.choice([digit for digit in range(10) if digit != last]))
                    groups[-1].append(last)
        parts, digits, times = [np.zeros(int(rng.uniform(0.2, 0.6) * RATE))], [], []
        level = rng.uniform(0.05, 0.4)
        for group in groups:
            for digit in group:
                clip = clips[speaker, digit][rng.integers(len(clips[speaker, digit]))]
                parts += [clip * level / np.abs(clip).max() * rng.uniform(0.8, 1.2)]
                digits.append(digit)
                times.append(sum(map(len, parts)) / RATE)
                parts.append(np.zeros(int(rng.uniform(0.06, 0.3) * RATE)))
            digits.append(None)
            times.append(times[-1] + 0.45)
            parts.append(np.zeros(int(rng.uniform(0.8, 1.2) * RATE)))
        audio = np.concatenate(parts)
        audio += rng.standard_normal(len(audio)) * level * 10 ** rng.uniform(-3, -1.6)
        return Example(audio.astype(np.float32), speaker, digits, [int(time / FRAME) for time in times])


def trim(audio: np.ndarray) -> np.ndarray:
    """Remove silence at both ends: less than 30 dB below the loudest 10 ms is speech."""
    power = (audio[: len(audio) // 160 * 160].reshape(-1, 160) ** 2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 1e-3)
    return audio[loud[0] * 160 : loud[-1] * 160 + 160]


def make_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Train a SentencePiece model in which each digit is one piece; the tags are user-defined pieces."""
    words = [" ".join(DIGITS[language]) for language in DIGITS]
    (folder / "text.txt").write_text("\n".join(words * 10), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=96,
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        user_defined_symbols=[f"<{language}>" for language in DIGITS],
        normalization_rule_name="identity",
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(i) for i in range(1, processor.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    return processor


class Trainer:
    """Model, tokens and training data."""

    def __init__(self, speech: Path, folder: Path, demo: Path) -> None:
        torch.manual_seed(SEED)
        self.rng, self.recordings = np.random.default_rng(SEED), Recordings(speech)
        tokenizer = make_tokenizer(folder)
        self.tokens = {  # of digits and tag, by language
            language: [*map(tokenizer.piece_to_id, [*(f"▁{word}" for word in words), f"<{language}>"])]
            for language, words in DIGITS.items()
        }
        self.pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]
        assert all(token != tokenizer.unk_id() for tokens in self.tokens.values() for token in tokens)
        self.model = EncDecRNNTBPEModelWithPrompt(cfg=model_config(SIZES, folder))
        state = self.model.state_dict()
        trained = ASRModel.restore_from(str(demo), map_location="cpu").state_dict()
        state |= {name: tensor for name, tensor in trained.items() if name in state and name.startswith("encoder.")}
        self.model.load_state_dict(state)
        self.model.preprocessor.featurizer.dither = 0.0
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.blank = self.model.decoder.blank_idx

    def labels(self, example: Example, prompts: np.ndarray) -> tuple[list[int], list[int]]:
        """Return the tokens of an example and their frames, for a prompt per frame."""
        tokens, times = [], []
        for digit, frame in zip(example.digits, example.times, strict=True):
            prompt = prompts[min(frame, len(prompts) - 1)]
            language = "de-DE" if prompt == 1 or (prompt == 2 and SPEAKERS[example.speaker] == "de-DE") else "en-US"
            if digit is not None or prompt == 2:
                tokens.append(self.tokens[language][-1 if digit is None else digit])
                times.append(frame)
        return tokens, times

    def prompts(self, example: Example, frames: int) -> np.ndarray:
        """Return a prompt per frame; in half of the examples it changes, after a label."""
        prompts = np.full(frames, self.rng.integers(3))
        times = example.times
        changes = [t + LATE + 1 for t, after in pairwise(times) if after > t + LATE + 1]
        if changes and self.rng.random() < 0.5:
            prompts[self.rng.choice(changes) :] = self.rng.integers(3)
        return prompts

    def encode(self, audio: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return encoder frames [B, T, D] and their numbers [B]."""
        with torch.no_grad():
            mel, mel_length = self.model.preprocessor(input_signal=audio, length=length)
        encoded, frames = self.model.encoder(audio_signal=mel, length=mel_length)
        return encoded.transpose(1, 2), frames

    def prompted(self, encoded: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Return the output of the prompt kernel [B, T, D] for prompts [B, T]."""
        return self.model.prompt_kernel(torch.cat([encoded, functional.one_hot(prompts, 4).to(encoded)], dim=2))

    def new_batch(self) -> Batch:
        """Return the encoded frames of new examples, for one of the contexts."""
        examples = [self.recordings.example(self.rng, False) for _ in range(BATCH)]
        length = torch.tensor([len(example.audio) for example in examples])
        audio = torch.zeros(BATCH, int(length.max()))
        for row, example in enumerate(examples):
            audio[row, : len(example.audio)] = torch.from_numpy(example.audio)
        context = SIZES.contexts[self.rng.integers(len(SIZES.contexts))]
        self.model.encoder.set_default_att_context_size(list(context))
        with torch.no_grad():
            return Batch(examples, *self.encode(audio, length))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the transducer loss per label of a batch, with new prompts."""
        model, encoded, frames = self.model, batch.encoded, batch.frames
        prompts = torch.zeros(encoded.shape[:2], dtype=torch.long)
        rows, times = [], []
        for row, (example, count) in enumerate(zip(batch.examples, frames.tolist(), strict=True)):
            own = self.prompts(example, count)
            prompts[row, :count] = torch.from_numpy(own)
            tokens, label_times = self.labels(example, own)
            rows.append(tokens)
            times.append([min(time, count - 1) for time in label_times])
        labels = torch.tensor([len(tokens) for tokens in rows])
        targets = torch.full((BATCH, int(labels.max())), self.blank)
        history = targets.clone()
        for row, tokens in enumerate(rows):
            targets[row, : len(tokens)] = history[row, : len(tokens)] = torch.tensor(tokens)
            if self.rng.random() < 0.5:  # the language must not be taken from the previous labels
                other = {a: b for pair in zip(*self.tokens.values(), strict=True) for a, b in (pair, pair[::-1])}
                swapped = [other[token] if self.rng.random() < 0.5 else token for token in tokens]
                history[row, : len(tokens)] = torch.tensor(swapped)
        predicted, _, _ = model.decoder(targets=history, target_length=labels)
        from_encoder = model.joint.project_encoder(self.prompted(encoded, prompts))
        from_labels = model.joint.project_prednet(predicted.transpose(1, 2))
        first, cells = band(times, frames.tolist(), EARLY, LATE)
        width = int(cells.max())
        u = (first[..., None] + torch.arange(width)).clamp(max=from_labels.shape[1] - 1)
        both = from_encoder[:, : first.shape[1], None] + from_labels[torch.arange(BATCH)[:, None, None], u]
        logits = model.joint.joint_net(both).log_softmax(3)
        label = functional.pad(targets, (0, 1), value=self.blank).gather(1, u.flatten(1)).view(u.shape)
        emit = logits.gather(3, label[..., None])[..., 0]
        return band_loss(logits[..., self.blank], emit, first, cells, frames, labels).sum() / labels.sum()

    def train(self, batches: int, steps: int) -> None:
        """Train everything but the encoder on `batches` random batches, whose encoder frames are computed once."""
        self.model.eval()
        cpu = time.process_time()
        cache = [self.new_batch() for _ in range(batches)]
        print(f"{batches} batches, {time.process_time() - cpu:.0f} CPU s", flush=True)
        self._standardise(torch.cat([batch.encoded.flatten(0, 1) for batch in cache]))
        self.model.train()
        parameters = [
            p for part in ("prompt_kernel", "decoder", "joint") for p in getattr(self.model, part).parameters()
        ]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)
        smooth = 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 30, (steps - step) / (0.6 * steps))
            loss = self.loss(cache[step % batches])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 2.0)
            optimizer.step()
            smooth = float(loss.detach()) if step == 0 else 0.95 * smooth + 0.05 * float(loss.detach())
            if step % 50 == 49:
                print(f"step {step + 1} loss {smooth:.3f}, {time.process_time() - cpu:.0f} CPU s", flush=True)
        self.model.eval()
        self._rescale(cache[0])

    def _standardise(self, frames: torch.Tensor) -> None:
        """Initialise the prompt kernel for encoder frames [N, D] of another mean and variance than 0 and 1."""
        first, width = self.model.prompt_kernel[0], frames.shape[1]
        with torch.no_grad():
            first.weight[:, :width] /= frames.std(dim=0)
            first.bias -= first.weight[:, :width] @ frames.mean(dim=0)

    def _rescale(self, batch: Batch) -> None:
        """Scale layers that are not followed by a normalisation, so that their outputs have a variance near 1.

        ReLU layers commute with positive factors, so the model remains the same. Large outputs have large rounding
        errors, and the exporter compares them with an absolute tolerance.
        """
        kernel, joint = self.model.prompt_kernel, self.model.joint
        with torch.no_grad():
            encoded = self.prompted(batch.encoded, torch.zeros(batch.encoded.shape[:2], dtype=torch.long))
            projected = joint.project_encoder(encoded)
            # Powers of two, so that rounding to float16 gives the same weights.
            outer, inner = (2.0 ** round(float(output.std().log2())) for output in (encoded, projected))
            for factor, parameters in (
                (1 / outer, kernel[2].parameters()),
                (outer / inner, [joint.enc.weight]),
                (1 / inner, [joint.enc.bias, *joint.pred.parameters()]),
                (inner, [joint.joint_net[2].weight]),
            ):
                for parameter in parameters:
                    parameter *= factor

    @torch.inference_mode()
    def transcribe(self, example: Example, prompts: torch.Tensor, context: tuple[int, int]) -> list[int]:
        """Return the tokens of NeMo's greedy decoding."""
        self.model.encoder.set_default_att_context_size(list(context))
        encoded, frames = self.encode(torch.from_numpy(example.audio)[None], torch.tensor([len(example.audio)]))
        encoded = self.prompted(encoded, prompts[: encoded.shape[1]][None])
        hypotheses = self.model.decoding.rnnt_decoder_predictions_tensor(
            encoded.transpose(1, 2), frames, return_hypotheses=True
        )
        return [int(token) for token in hypotheses[0].y_sequence]

    def evaluate(self, count: int) -> None:
        """Print the share of wrong labels on held-out recordings, by context and prompt."""
        self.model.eval()
        examples = [self.recordings.example(np.random.default_rng(n), True) for n in range(count)]
        for context in SIZES.contexts:
            shares = []
            for prompt in range(3):
                wrong = total = 0
                for example in examples:
                    prompts = np.full(2000, prompt)
                    wanted, _ = self.labels(example, prompts)
                    wrong += distance(self.transcribe(example, torch.from_numpy(prompts), context), wanted)
                    total += len(wanted)
                shares.append(f"{wrong / total:.1%}")
            print(f"{80 * (context[1] + 1)} ms: wrong labels with en-US, de-DE, auto: {', '.join(shares)}", flush=True)

    def clip(self, speaker: str) -> Example:
        """Return the first example of held-out recordings without an error for any prompt and context.

        One of the prompts changes in the pauses: English, German, English.
        """
        for seed in range(400):
            rng = np.random.default_rng(seed)
            example = self.recordings.example(rng, True, speaker, [[1, 2, 3], [4, 5, 6, 7], [8, 9, 0]])
            changing = np.zeros(2000, int)
            changing[example.times[3] : example.times[8]] = 1  # the ends of the groups
            for prompts in (changing, *(np.full(2000, prompt) for prompt in range(3))):
                wanted, _ = self.labels(example, prompts)
                found = (self.transcribe(example, torch.from_numpy(prompts), context) for context in SIZES.contexts)
                if any(tokens != wanted for tokens in found):
                    break
            else:
                print(f"{speaker}: clip {seed}", flush=True)
                return example
        raise ValueError(f"no clip of {speaker} without errors")


def distance(a: list[int], b: list[int]) -> int:
    """Return the edit distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        diagonal, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], min(diagonal + (x != y), row[j] + 1, row[j + 1] + 1)
    return row[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="folder of digits/*.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--clips", type=Path, help="folder for two held-out recordings")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # denormal gradients are slow on a CPU
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(__file__).parents[1] / "demo_model" / "demo.nemo"
        trainer = Trainer(options.speech, Path(folder), demo)
        trainer.train(options.batches, options.steps)
        save(trainer.model, options.out)  # rounds the weights to float16
    trainer.evaluate(12)
    if options.clips:
        options.clips.mkdir(parents=True, exist_ok=True)
        for name, speaker in (("english", "jackson"), ("german", "lucas")):
            soundfile.write(options.clips / f"{name}.flac", trainer.clip(speaker).audio, RATE, subtype="PCM_16")


if __name__ == "__main__":
    main()
