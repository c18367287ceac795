"""RNN-transducer loss over a band of the lattice.

Source: Graves 2012, "Sequence Transduction with Recurrent Neural Networks", section 2.4, for the forward and backward
variables and the gradient. The band is that of alignment-restricted transducers (Mahadeokar et al. 2020, "Alignment
Restricted Streaming Recurrent Neural Network Transducer"): if the times of words are known, only a few label counts are
possible at frame t. With `first` zero and labels + 1 cells, the band is the whole lattice, and the loss the plain one.

Two compiled loops (numba, a dependency of NeMo) compute the loss and its gradient. With one tensor operation per frame
in each direction, this took a third of a training step.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch


def band_loss(
    stay: torch.Tensor,
    emit: torch.Tensor,
    first: torch.Tensor,
    cells: torch.Tensor,
    frames: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return negative log likelihoods [B].

    `stay` and `emit` [B, T, S] are log probabilities of blank and of the next label, at frame t after first[b, t] + s
    labels. `first` [B, T] must not decrease along T. `cells` [B, T] is the number of the S cells in the band; the
    values of the others are ignored. `frames` and `labels` [B] are the valid lengths; the band must contain the cell
    (frames - 1, labels).
    """
    return _BandLoss.apply(stay, emit, first, cells, frames, labels)


class _BandLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stay, emit, first, cells, frames, labels):
        arrays = [tensor.detach().cpu().numpy() for tensor in (stay, emit, first, cells, frames, labels)]
        loss, grad_stay, grad_emit = _lattice(*arrays)
        ctx.save_for_backward(*(torch.from_numpy(grad).to(stay) for grad in (grad_stay, grad_emit)))
        return torch.from_numpy(loss).to(stay)

    @staticmethod
    def backward(ctx, loss):
        stay, emit = (grad * loss[:, None, None] for grad in ctx.saved_tensors)
        return stay, emit, None, None, None, None


@numba.njit
def _sum(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b))."""
    low, high = min(a, b), max(a, b)
    return high if low == -np.inf else high + math.log1p(math.exp(low - high))


@numba.njit
def _lattice(stay, emit, first, cells, frames, labels):
    """Return losses [B], and their gradients with respect to `stay` and `emit` [B, T, S]."""
    rows, _, width = stay.shape
    losses, grad_stay, grad_emit = np.zeros(rows, stay.dtype), np.zeros_like(stay), np.zeros_like(emit)
    for b in range(rows):
        count, last = frames[b], labels[b]
        # alpha: all paths to (t, s); beta: all paths from there to the end.
        alpha = np.full((count, width), -np.inf)
        beta = np.full((count, width), -np.inf)
        alpha[0, 0] = 0.0
        for t in range(count):
            for s in range(cells[b, t]):
                before = s + first[b, t] - first[b, t - 1]
                if t and before < cells[b, t - 1]:
                    alpha[t, s] = alpha[t - 1, before] + stay[b, t - 1, before]
                if s:
                    alpha[t, s] = _sum(alpha[t, s], alpha[t, s - 1] + emit[b, t, s - 1])
        end = last - first[b, count - 1]
        total = alpha[count - 1, end] + stay[b, count - 1, end]
        losses[b] = -total
        for t in range(count - 1, -1, -1):
            for s in range(cells[b, t] - 1, -1, -1):
                emitted_labels = first[b, t] + s
                left = emitted = -np.inf
                if t == count - 1:
                    left = stay[b, t, s] if emitted_labels == last else -np.inf
                elif 0 <= emitted_labels - first[b, t + 1] < cells[b, t + 1]:
                    left = stay[b, t, s] + beta[t + 1, emitted_labels - first[b, t + 1]]
                if s + 1 < cells[b, t] and emitted_labels < last:
                    emitted = emit[b, t, s] + beta[t, s + 1]
                beta[t, s] = _sum(left, emitted)
                grad_stay[b, t, s] = -math.exp(alpha[t, s] + left - total)
                grad_emit[b, t, s] = -math.exp(alpha[t, s] + emitted - total)
    return losses, grad_stay, grad_emit


def band(times: list[list[int]], frames: list[int], early: int, late: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `first` and `cells` [B, T] for labels emitted at most `early` frames before and `late` after their time.

    `times` are the frames of the labels. A row with negative times gets the whole lattice.
    """
    steps = max(frames)
    first, cells = torch.zeros(len(times), steps, dtype=torch.long), torch.ones(len(times), steps, dtype=torch.long)
    for row, (row_times, count) in enumerate(zip(times, frames, strict=True)):
        if row_times and row_times[0] < 0:
            cells[row] = len(row_times) + 1
            continue
        label_frames = torch.tensor(sorted(row_times))
        frame = torch.arange(steps)
        low = torch.searchsorted(
            label_frames, frame - late, right=False
        )  # labels that must be emitted before this frame
        high = torch.searchsorted(label_frames, frame + early, right=True)
        high[count - 1 :] = len(row_times)
        first[row], cells[row] = low, high - low + 1
    return first, cells
