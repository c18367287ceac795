"""Train the demo model, on a CPU or a GPU.

    python train.py --data WORK --sentences sentences.jsonl --out demo.nemo [--steps 40000]

A transducer of this size that is trained from scratch emits only blank for hours. Two measures reduce this to minutes:

1. *Sounds.* A classifier on a middle layer predicts the sound of each half frame; the targets are the timings of the
   synthesisers.
2. *A narrow band.* The transducer loss covers only the lattice around the known time of each label. At first a label
   may be emitted in its frame or one of the next two; after `NARROW_STEPS` slightly earlier, or half a second later.

The learning rate warms up, stays constant, and decays over the last three quarters of `--steps`; a finished run can be
resumed with more steps. A moving average of the weights is evaluated and saved. `--processes` copies with one thread
each process one batch per step and average their gradients, which is faster on a CPU than as many threads. Training
resumes from `WORK/state.pt`, also after SIGTERM; the randomness of a step depends on the seed and its number. Only the
log uses the clock.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from mixer import Batch, Mixer, Sounds, seed_everything
from model import LAYERS, convolve_fast, make_model, make_tokenizer, save
from rnnt_loss import band, band_loss
from score import dev_clips, word_errors
from torch import distributed, multiprocessing
from torch.nn import functional
from torch.utils.data import DataLoader

SEED = 7
NARROW_STEPS = 4000
PROMPTS_FROM_BLOCK = 500  # clips without word times are used when the model can align them
RATE = 1.2e-3
# Shares of labels and of rows; they decay with the learning rate. See `Trainer.losses`.
WRONG_HISTORY, NO_HISTORY = 0.25, 0.4
AVERAGE = 0.9995
REPORT_STEPS = 2500
SOUNDS_LAYER = LAYERS // 2


class Trainer:
    """Training state: model, optimizer, average and progress."""

    def __init__(
        self,
        data: Path,
        sentences: Path,
        out: Path,
        threads: int | None,
        workers: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.rank, self.processes = rank, processes
        seed_everything(SEED)
        if threads:
            torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # denormal gradients are slow on a CPU
        self.data, self.out, self.workers = data, out, workers
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not (data / "tokenizer" / "tokenizer.model").is_file():
            rows = [json.loads(line) for line in sentences.read_text().splitlines()]
            make_tokenizer(data / "tokenizer", [row["text"] for row in rows if not row["held_out"]])
        self.model = make_model(data / "tokenizer").to(self.device)
        self.model.preprocessor.featurizer.dither = 0.0  # the mixer adds noise
        if self.device.type == "cpu":
            convolve_fast(self.model)
        self.model.encoder.layers[SOUNDS_LAYER].register_forward_hook(self._middle)
        self.middle: torch.Tensor | None = None
        self.sounds = torch.nn.Linear(self.model.encoder.d_model, 2 * Sounds.SIZE).to(self.device)
        set_mask = torch.full((len(Sounds.SETS), Sounds.SIZE), -1e4)
        set_mask[:, 0] = 0.0
        for number in range(len(Sounds.SETS)):
            set_mask[number, 1 + number * Sounds.SET_SIZE : 1 + (number + 1) * Sounds.SET_SIZE] = 0.0
        self.set_mask = set_mask.to(self.device)
        self.blank = self.model.decoder.blank_idx
        self.parameters = [*self.model.parameters(), *self.sounds.parameters()]
        matrices = [p for p in self.parameters if p.dim() > 1]
        others = [p for p in self.parameters if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 1e-2}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)
        # All gradients are in one tensor: one norm, one message between processes.
        self.gradients = torch.zeros(sum(p.numel() for p in self.parameters) + 1, device=self.device)
        for parameter, part in zip(
            self.parameters, self.gradients[:-1].split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.step, self.block, self.seen_seconds = 0, 0, 0.0
        if (data / "state.pt").is_file():
            saved = torch.load(data / "state.pt", map_location=self.device, weights_only=False)
            self.model.load_state_dict(saved["model"])
            self.sounds.load_state_dict(saved["sounds"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for group in self.optimizer.param_groups:
                group["fused"] = True  # the loaded state has its own value
            self.average = saved["average"]
            self.step, self.block, self.seen_seconds = saved["step"], saved["block"], saved["seen_seconds"]
            print(f"resuming at step {self.step}, {self.seen_seconds / 3600:.0f} hours of audio", flush=True)

    def _middle(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.middle = output[0] if isinstance(output, tuple) else output

    def losses(self, batch: Batch, decay: float) -> dict[str, torch.Tensor]:
        """Return the losses of a batch; `decay` scales the corruption of the label history."""
        model, device = self.model, self.device
        with torch.no_grad():
            mel, mel_length = model.preprocessor(input_signal=batch.audio.to(device), length=batch.length.to(device))
        with torch.autocast(device.type, torch.bfloat16):
            encoded, frames = model.encoder(audio_signal=mel, length=mel_length)
            labels = torch.tensor([len(t) for t in batch.tokens], device=device)
            targets = torch.full((len(batch.tokens), max(int(labels.max()), 1)), self.blank)
            for row, tokens in enumerate(batch.tokens):
                targets[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            targets = targets.to(device)
            # A small model relies on the previous labels more than on the audio, and then errors propagate. So some
            # labels of the history are replaced, and for some rows it is removed. Both decrease during training,
            # because only the history can distinguish a repeated word.
            wrong = torch.rand(targets.shape, device=device) < WRONG_HISTORY * decay
            history = torch.where(wrong, torch.randint_like(targets, self.blank), targets)
            predicted, _, _ = model.decoder(targets=history, target_length=labels)
            predicted = predicted * (torch.rand(len(labels), 1, 1, device=device) >= NO_HISTORY * decay)
            from_encoder = model.joint.project_encoder(encoded.transpose(1, 2))
            from_labels = model.joint.project_prednet(predicted.transpose(1, 2))
            sound_logits = self.sounds(self.middle).float()
        steps = min(sound_logits.shape[1], batch.sounds.shape[1])
        logits = (
            sound_logits[:, :steps].unflatten(2, (2, Sounds.SIZE)) + self.set_mask[batch.sets.to(device)][:, None, None]
        )
        wanted = batch.sounds[:, :steps].to(device)
        loss = {"sounds": functional.cross_entropy(logits.flatten(0, 2), wanted.flatten(), ignore_index=-100)}
        early, late = (0, 2) if self.step < NARROW_STEPS else (2, 6)
        timed = [row for row, t in enumerate(batch.frames) if not t or t[0] >= 0]
        free = [row for row in range(len(batch.frames)) if row not in timed]
        nll = torch.zeros(len(batch.frames), device=device)
        for rows in (timed, free):
            if rows:
                nll[rows] = self._transducer(
                    batch, rows, from_encoder, from_labels, targets, frames, labels, early, late
                )
        loss["transducer"] = nll.sum() / (labels.sum() + 1)
        return loss

    def _transducer(
        self, batch: Batch, rows: list[int], from_encoder, from_labels, targets, frames, labels, early: int, late: int
    ) -> torch.Tensor:
        device = self.device
        counts = [int(frames[row]) for row in rows]
        times = [[min(t, count - 1) for t in batch.frames[row]] for row, count in zip(rows, counts, strict=True)]
        first, cells = (part.to(device) for part in band(times, counts, early, late))
        width = int(cells.max())
        u = (first[..., None] + torch.arange(width, device=device)).clamp(max=from_labels.shape[1] - 1)
        row = torch.tensor(rows, device=device)
        steps = first.shape[1]
        both = from_encoder[row, :steps, None] + from_labels[row[:, None, None], u]
        # The corners of the band that no path visits (a third of the cells) need no logits.
        inside = torch.arange(width, device=device) < cells[..., None]
        inside &= torch.arange(steps, device=device)[None, :, None] < frames[row][:, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            logits = self.model.joint.joint_net(both[inside])
        logits = logits.float()
        label = functional.pad(targets[row], (0, 1), value=self.blank).gather(1, u.flatten(1)).view(u.shape)[inside]
        total = logits.logsumexp(1)
        stay = torch.zeros(inside.shape, device=device)
        emit = stay.clone()
        stay[inside] = logits[:, self.blank] - total
        emit[inside] = logits.gather(1, label[:, None])[:, 0] - total
        return band_loss(stay, emit, first, cells, frames[row], labels[row])

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of this process."""
        mixer = Mixer(self.data, self.data / "tokenizer", SEED, PROMPTS_FROM_BLOCK)
        blocks = range(self.block + self.rank, 10**7, self.processes)
        loader = DataLoader(
            mixer,
            batch_size=None,
            sampler=blocks,
            num_workers=self.workers,
            prefetch_factor=1 if self.workers else None,
            collate_fn=None,
        )
        for block in loader:
            yield from block
            self.block += self.processes

    def average_gradients(self, stop: bool) -> bool:
        """Average the gradients over all processes; return whether any process received SIGTERM."""
        if self.processes > 1:
            self.gradients[-1] = float(stop)
            distributed.all_reduce(self.gradients)
            stop = bool(self.gradients[-1] > 0)
            self.gradients /= self.processes
        return stop

    def run(self, steps: int) -> None:
        """Train until `steps` or SIGTERM."""
        smooth: dict[str, float] = {}
        start, cpu_start = time.monotonic(), time.process_time()
        signals: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))  # finish the step, then save
        stop, reports = False, []
        for batch in self.batches():
            if self.step >= steps or stop:
                break
            seed_everything(SEED + self.step * self.processes + self.rank)
            decay = min(1.0, (steps - self.step) / (0.75 * steps))
            rate = RATE * min(1.0, (self.step + 1) / 500) * decay
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.model.train()
            loss = self.losses(batch, decay)
            total = loss["transducer"] + (1.0 if self.step < NARROW_STEPS else 0.5) * loss["sounds"].nan_to_num()
            self.gradients.zero_()
            total.backward()
            stop = self.average_gradients(bool(signals))
            norm = self.gradients[:-1].norm()
            if torch.isfinite(norm):
                self.gradients *= min(1.0, 2.0 / (float(norm) + 1e-6))
                self.optimizer.step()
            self.step += 1
            self.seen_seconds += float(batch.length.sum()) / 16000 * self.processes
            if self.rank:
                continue  # only the first process keeps the average and the log
            if self.step % 4 == 0:
                weight = min(AVERAGE**4, 1 - 10 / (10 + self.step))
                with torch.no_grad():
                    for name, parameter in self.model.named_parameters():
                        self.average[name].lerp_(parameter, 1 - weight)
            for key, value in loss.items():
                current = float(value.detach().nan_to_num())
                smooth[key] = 0.98 * smooth.get(key, current) + 0.02 * current
            if self.step % 50 == 0:
                figures = " ".join(f"{key} {value:.3f}" for key, value in smooth.items())
                clock = f"{time.monotonic() - start:.0f} s, {time.process_time() - cpu_start:.0f} CPU s"
                print(
                    f"step {self.step} {self.seen_seconds / 3600:.1f} h of audio, {clock}, lr {rate:.1e} "
                    f"gradient {float(norm):.2f} {figures}",
                    flush=True,
                )
            if self.step % 500 == 0:
                self.save()
            if self.step % REPORT_STEPS == 0:
                reports.append(self.start_report())
        if self.rank == 0:
            self.save()
            if not stop:
                reports.append(self.start_report())
            for report in reports:
                report.wait()

    def start_report(self) -> subprocess.Popen:
        """Start a report in another process, so that training continues.

        NeMo communicates with all processes of a group when it saves, and that process is in none.
        """
        command = [sys.executable, __file__, "--report", "--data", self.data, "--sentences", "-", "--out", self.out]
        return subprocess.Popen([*map(str, command), "--threads", "1"])

    def report(self) -> None:
        """Print the WER of the averaged weights on the validation set in 560 ms chunks, and write the .nemo file."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.average[name])
            figures = word_errors(self.model, dev_clips(self.data), [70, 6])
            save(self.model, self.out)
        wer = " ".join(f"{kind} {value:.1%}" for kind, value in figures.items())
        print(f"step {self.step} held-out WER at 560 ms: {wer}", flush=True)

    def save(self) -> None:
        """Write the training state."""
        state = {
            "model": self.model.state_dict(),
            "sounds": self.sounds.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "block": self.block,
            "seen_seconds": self.seen_seconds,
        }
        torch.save(state, self.data / "state.partial")
        (self.data / "state.partial").rename(self.data / "state.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--report", action="store_true", help="write OUT from the state and print its word error rate, without training"
    )
    parser.add_argument("--tag", help="ignored; identifies the process in a list")
    options = parser.parse_args()
    if options.report:
        Trainer(options.data, options.sentences, options.out, options.threads, 0).report()
    elif options.processes == 1:
        train(0, options)
    else:
        (options.data / "rendezvous").unlink(missing_ok=True)
        trainers = multiprocessing.spawn(train, (options,), options.processes, join=False)
        signal.signal(signal.SIGTERM, lambda number, _: [process.terminate() for process in trainers.processes])
        while not trainers.join():
            pass


def train(rank: int, options: argparse.Namespace) -> None:
    if options.processes > 1:
        rendezvous = f"file://{(options.data / 'rendezvous').absolute()}"
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=options.processes)
    threads = options.threads or (1 if options.processes > 1 else None)
    trainer = Trainer(options.data, options.sentences, options.out, threads, options.workers, rank, options.processes)
    trainer.run(options.steps)
    if options.processes > 1:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
