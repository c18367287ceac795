"""Train the demo model on a CPU in well under an hour.

    python train.py --data WORK --out demo.nemo [--minutes 40]

Training has two parts, because a transducer trained from scratch sits on its blank plateau for hours at this size:

1. *Aligned.* Strings are built from single words, so every word's end is known, and with it one good path through the
   transducer's lattice: blank, but for each word's label right after its end. Cross-entropy along that path, and an
   auxiliary classifier that says which digit an encoder frame is in, teach encoder, prediction net and joint at once.
2. *Transducer.* The full RNNT loss, half of it on strings synthesised in one breath, whose times nobody knows.

Resumes from `WORK/state.pt`. Seeds are fixed; a run that was interrupted differs in its random numbers, not in kind.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import numpy as np
import torch
from evaluate import Clips, evaluate
from model import DIGITS, make_model, make_tokenizer
from rnnt_loss import rnnt_loss
from scipy.signal import butter, resample_poly, sosfilt
from torch.nn import functional

RATE, FRAME = 16000, 1280
TEST_SPEAKER = "human-yweweler"
LABEL_WEIGHT = 4.0  # labels are one cell in ten of an aligned path


@dataclass
class Example:
    audio: np.ndarray  # float32
    labels: list[int]  # digit numbers
    ends: list[int] | None  # sample after each word, if known
    starts: list[int] | None


class Mixer:
    """Makes training audio: strings of single words, and whole strings, then augments them."""

    def __init__(self, data: Path, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        words = Clips(data / "words.npz")
        self.words, self.strings = words, Clips(data / "strings.npz")
        human = np.char.startswith(words.voice, "human-")
        by_word = {word: np.flatnonzero((words.text == word) & ~human) for word in DIGITS}
        spoken = {word: np.flatnonzero((words.text == word) & human & (words.voice != TEST_SPEAKER)) for word in DIGITS}
        self.pools = [(by_word[word], spoken[word]) for word in DIGITS]

    def built(self) -> Example:
        rng = self.rng
        count = int(rng.choice((0, 1, 2, 3, 4, 5, 6, 8), p=(0.04, 0.18, 0.13, 0.15, 0.15, 0.15, 0.12, 0.08)))
        human, speaker = rng.random() < 0.4, None
        pieces, labels, starts, ends = [self._silence(0.0, 0.8)], [], [], []
        length = len(pieces[0])
        for _ in range(count):
            digit = int(rng.integers(10))
            pool = self.pools[digit][1 if human and len(self.pools[digit][1]) else 0]
            if human and speaker is not None and rng.random() < 0.9:
                same = pool[self.words.voice[pool] == speaker]
                pool = same if len(same) else pool
            pick = int(rng.choice(pool))
            speaker = self.words.voice[pick]
            clip = self.words[pick]
            clip = clip / max(float(np.abs(clip).max()), 1e-3) * float(rng.uniform(0.3, 0.6))
            if rng.random() < 0.5:
                clip = _speed(clip, float(rng.uniform(0.88, 1.12)))
            labels.append(digit)
            starts.append(length)
            ends.append(length + len(clip))
            gap = self._silence(0.0, 0.08) if rng.random() < 0.6 else self._silence(0.05, 0.45)
            pieces += [clip, gap]
            length += len(clip) + len(gap)
        pieces.append(self._silence(0.0, 0.6) if count else self._silence(0.5, 3.0))
        return Example(self._augment(np.concatenate(pieces)), labels, ends, starts)

    def whole(self) -> Example:
        pick = int(self.rng.integers(len(self.strings.text)))
        clip = self.strings[pick]
        clip = clip / max(float(np.abs(clip).max()), 1e-3) * float(self.rng.uniform(0.3, 0.6))
        if self.rng.random() < 0.5:
            clip = _speed(clip, float(self.rng.uniform(0.88, 1.12)))
        audio = np.concatenate([self._silence(0.0, 0.6), clip, self._silence(0.0, 0.5)])
        labels = [DIGITS.index(word) for word in str(self.strings.text[pick]).split()]
        return Example(self._augment(audio), labels, None, None)

    def batch(self, size: int, whole: float) -> list[Example]:
        return [self.whole() if self.rng.random() < whole else self.built() for _ in range(size)]

    def _silence(self, low: float, high: float) -> np.ndarray:
        return np.zeros(int(self.rng.uniform(low, high) * RATE), np.float32)

    def _augment(self, audio: np.ndarray) -> np.ndarray:
        rng = self.rng
        if rng.random() < 0.2:  # a small room: a few decaying echoes
            room = np.zeros(int(0.12 * RATE), np.float32)
            room[0] = 1.0
            room[rng.integers(80, len(room), 20)] = rng.standard_normal(20) * np.linspace(0.3, 0.02, 20)
            audio = np.convolve(audio, room)[: len(audio)]
        if rng.random() < 0.3:  # telephone
            band = (rng.uniform(150, 350), rng.uniform(3000, 3800))
            audio = sosfilt(butter(4, band, "band", fs=RATE, output="sos"), audio)
        elif rng.random() < 0.3:
            audio = sosfilt(butter(2, rng.uniform(3500, 7500), "low", fs=RATE, output="sos"), audio)
        level = float(np.sqrt(np.mean(audio**2))) if len(audio) else 0.0
        noise = rng.standard_normal(len(audio))
        if rng.random() < 0.5:  # pinkish
            noise = sosfilt(butter(1, 500, "low", fs=RATE, output="sos"), noise)
        noise /= max(float(np.sqrt(np.mean(noise**2))), 1e-6) if len(audio) else 1.0
        if rng.random() < 0.75:
            loudness = max(level, 1e-3) * 10 ** (-rng.uniform(8, 40) / 20)
        else:
            loudness = 10 ** (-rng.uniform(70, 110) / 20)
        audio = audio + noise * loudness
        return (audio * 10 ** (rng.uniform(-20, 4) / 20)).astype(np.float32)


def _speed(clip: np.ndarray, rate: float) -> np.ndarray:
    up, down = 100, round(100 * rate)
    return resample_poly(clip, up, down).astype(np.float32)


def aligned_path(example: Example, frames: int, ids: list[int], blank: int) -> tuple[list, list, list]:
    """Cells (frame, labels so far) of one good path and what to say in each: a label comes just after its word."""
    times, cells, says = [], [], []
    said = 0
    emit = [min(end // FRAME + 1, frames - 1) for end in example.ends or []]
    for frame in range(frames):
        while said < len(emit) and emit[said] <= frame:
            times.append(frame)
            cells.append(said)
            says.append(ids[said])
            said += 1
        times.append(frame)
        cells.append(said)
        says.append(blank)
    return times, cells, says


def _depthwise(conv: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A depthwise convolution as windows times weights. PyTorch's own backward loops over the channels on a CPU."""
    for axis, (size, stride) in enumerate(zip(weight.shape[2:], conv.stride, strict=True), 2):
        x = x.unfold(axis, size, stride)
    out = torch.einsum("bct...k,ck->bct..." if weight.dim() == 3 else "bcthij,cij->bcth", x, weight[:, 0])
    return out if bias is None else out + bias.view(1, -1, *[1] * (weight.dim() - 2))


class Trainer:
    def __init__(self, data: Path, out: Path, minutes: float) -> None:
        torch.manual_seed(7)
        torch.set_num_threads(2)
        torch.set_flush_denormal(True)  # vanishing gradients would make a CPU crawl
        self.data, self.out, self.seconds = data, out, minutes * 60
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = make_model(make_tokenizer(data / "tokenizer")).to(self.device)
        if self.device.type == "cpu":
            for module in self.model.modules():
                if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d) and module.groups == module.in_channels > 1:
                    module._conv_forward = MethodType(_depthwise, module)
        self.digit_ids = [self.model.tokenizer.text_to_ids(digit)[0] for digit in DIGITS]
        self.blank = self.model.decoder.blank_idx
        self.framewise = torch.nn.Linear(self.model.encoder.d_model, 11).to(self.device)
        self.mixer = Mixer(data, seed=11)
        parameters = [*self.model.parameters(), *self.framewise.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-3)
        self.step, self.spent = 0, 0.0
        state = data / "state.pt"
        if state.is_file():
            saved = torch.load(state, map_location=self.device, weights_only=False)
            self.model.load_state_dict(saved["model"])
            self.framewise.load_state_dict(saved["framewise"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.spent = saved["step"], saved["spent"]
            self.mixer.rng = np.random.default_rng(11 + self.step)
            print(f"resuming at step {self.step}, {self.spent / 60:.1f} minutes in")

    def losses(self, batch: list[Example], transducer: float) -> tuple[torch.Tensor, dict[str, float]]:
        model = self.model
        length = torch.tensor([len(e.audio) for e in batch], device=self.device)
        audio = torch.zeros(len(batch), int(length.max()), device=self.device)
        for row, example in enumerate(batch):
            audio[row, : len(example.audio)] = torch.from_numpy(example.audio)
        with torch.no_grad():
            mel, mel_length = model.preprocessor(input_signal=audio, length=length)
        encoded, frames = model.encoder(audio_signal=mel, length=mel_length)
        encoded = encoded.transpose(1, 2)
        ids = [[self.digit_ids[d] for d in e.labels] for e in batch]
        labels = torch.tensor([len(i) for i in ids], device=self.device)
        targets = torch.full((len(batch), int(labels.max())), self.blank, device=self.device)
        for row, i in enumerate(ids):
            targets[row, : len(i)] = torch.tensor(i, device=self.device)
        predicted, _, _ = model.decoder(targets=targets, target_length=labels)
        from_encoder = model.joint.project_encoder(encoded)
        from_labels = model.joint.project_prednet(predicted.transpose(1, 2))
        total, said = torch.zeros((), device=self.device), {}

        known = [row for row, e in enumerate(batch) if e.ends is not None]
        if known:
            rows, times, cells, says, classes = [], [], [], [], []
            for row in known:
                n = int(frames[row])
                t, u, s = aligned_path(batch[row], n, ids[row], self.blank)
                rows += [row] * len(t)
                times, cells, says = times + t, cells + u, says + s
                inside = torch.full((encoded.shape[1],), 10)
                for digit, a, b in zip(batch[row].labels, batch[row].starts, batch[row].ends, strict=True):
                    inside[a // FRAME + 1 : b // FRAME + 1] = digit
                inside[n:] = -100
                classes.append(inside)
            auxiliary = functional.cross_entropy(
                self.framewise(encoded[known]).flatten(0, 1), torch.cat(classes).to(self.device), ignore_index=-100
            )
            said["frames"] = float(auxiliary.detach())
            total = total + 0.3 * auxiliary
            if transducer < 1.0:
                logits = model.joint.joint_net(from_encoder[rows, times] + from_labels[rows, cells])
                wanted = torch.tensor(says, device=self.device)
                weight = torch.where(wanted == self.blank, 1.0, LABEL_WEIGHT)
                path = (functional.cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum()
                said["path"] = float(path.detach())
                total = total + (1.0 - transducer) * path
        if transducer > 0.0:
            logits = model.joint.joint_net(from_encoder[:, :, None] + from_labels[:, None])
            nll = rnnt_loss(logits.log_softmax(-1), targets.clamp(max=self.blank - 1), frames, labels, self.blank)
            each = (nll / (labels + 1)).mean()
            said["rnnt"] = float(each.detach())
            total = total + transducer * each
        return total, said

    def run(self) -> None:
        begun, best, smooth = time.monotonic() - self.spent, 1.0, {}
        while self.spent < self.seconds:
            part = self.spent / self.seconds
            transducer = 0.0 if part < 0.4 else 0.7
            rate = 2e-3 * min(1.0, (self.step + 1) / 150) * (1 - part) ** 0.9 + 1e-5
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.model.train()
            loss, said = self.losses(self.mixer.batch(16, 0.0 if transducer == 0 else 0.5), transducer)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.spent = time.monotonic() - begun
            for key, value in said.items():
                smooth[key] = 0.95 * smooth.get(key, value) + 0.05 * value
            if self.step % 25 == 0:
                figures = " ".join(f"{key} {value:.3f}" for key, value in smooth.items())
                print(f"step {self.step} {self.spent / 60:.1f} min lr {rate:.1e} {figures}", flush=True)
            if self.step % 300 == 0:
                wer = evaluate(self.model, Clips(self.data / "heldout.npz"), [70, 6], limit=80)
                print(f"step {self.step} held-out WER at 560 ms {wer:.1%}", flush=True)
                self.save()
                if wer <= best:
                    best = wer
                    self.model.save_to(str(self.out))
        self.save()
        self.model.save_to(str(self.out))

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "framewise": self.framewise.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "spent": self.spent}
        torch.save(state, self.data / "state.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    options = parser.parse_args()
    Trainer(options.data, options.out, options.minutes).run()


if __name__ == "__main__":
    main()
