"""RNN-transducer loss in plain PyTorch, vectorised over anti-diagonals.

Source: A. Graves, "Sequence Transduction with Recurrent Neural Networks", 2012 (arXiv:1211.3711), section 2.4. The
lattice has a cell (t, u) for every frame t and number of labels u said so far; blank leads to (t + 1, u), the next
label to (t, u + 1). All cells with t + u = n depend only on those with t + u = n - 1, so the forward recursion takes
T + U vector steps; autograd supplies the backward pass. On a CPU this is many times faster than NeMo's numba loss.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_NEVER = -1e30  # log 0; finite, so that no gradient becomes NaN


def rnnt_loss(
    log_probs: torch.Tensor, targets: torch.Tensor, frames: torch.Tensor, labels: torch.Tensor, blank: int
) -> torch.Tensor:
    """-log P(targets) of every row, [B].

    `log_probs` [B, T, U + 1, V] is normalised over V; `targets` [B, U] is padded with any valid label; `frames` and
    `labels` [B] count each row's valid frames (at least 1) and labels.
    """
    rows, steps, states, _ = log_probs.shape
    blanks = log_probs[..., blank]
    index = targets.long()[:, None, :, None].expand(-1, steps, -1, 1)
    emits = log_probs[:, :, :-1].gather(3, index).squeeze(3)
    emits = functional.pad(emits, (0, 1), value=_NEVER)  # nothing left to say after the last label

    # Skew: entry [n, u] of these is cell (n - u, u), so that row n is an anti-diagonal.
    u = torch.arange(states, device=log_probs.device)
    t = torch.arange(steps + states - 1, device=log_probs.device)[:, None] - u
    outside = (t < 0) | (t >= steps)
    t = t.clamp(0, steps - 1)
    blanks = blanks[:, t, u].masked_fill(outside, _NEVER)
    emits = emits[:, t, u].masked_fill(outside, _NEVER)

    alpha = torch.where(u == 0, 0.0, _NEVER).to(log_probs).expand(rows, -1)
    alphas = [alpha]
    for n in range(steps + states - 2):
        arriving = functional.pad((alpha + emits[:, n])[:, :-1], (1, 0), value=_NEVER)
        alpha = torch.logaddexp(alpha + blanks[:, n], arriving)
        alphas.append(alpha)
    row = torch.arange(rows, device=log_probs.device)
    last = frames.long() - 1 + labels.long()
    return -(torch.stack(alphas, dim=1)[row, last, labels.long()] + blanks[row, last, labels.long()])
