"""RNN-transducer loss in plain PyTorch, over a band of the lattice.

Source: Graves 2012, "Sequence Transduction with Recurrent Neural Networks", section 2.4, for the recursion; the band is
that of alignment-restricted transducers (Mahadeokar et al. 2020, "Alignment Restricted Streaming Recurrent Neural
Network Transducer"): where the words' times are known, frame t need only look at the few label counts that may have
been reached by then. With `first` all zero and as many cells as labels + 1, it is the whole lattice and the plain loss.

One vector step per frame: within a frame, emitting several labels in a row is a cumulative sum, so all paths through
the frame are one `logcumsumexp`. On a CPU this is far faster than NeMo's numba loss.
"""

from __future__ import annotations

import torch

_IMPOSSIBLE = -60.0  # log probability of a step outside the band: small next to any path, and harmless in a sum


def band_loss(
    stay: torch.Tensor, emit: torch.Tensor, first: torch.Tensor, cells: torch.Tensor, frames: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Negative log likelihood [B].

    `stay`, `emit` [B, T, S]: log probability of blank, and of the next label, at frame t with first[b, t] + s labels
    said. `first` [B, T] does not decrease; `cells` [B, T]: how many of the S are in the band. `frames`, `labels` [B]
    are the valid lengths; the band must hold (frames - 1, labels).
    """
    rows, steps, width = stay.shape
    s = torch.arange(width, device=stay.device)
    count = first[..., None] + s
    # The last cell of a frame's band cannot emit out of it, nor can all labels said be followed by one more.
    closed = (s >= cells[..., None] - 1) | (count >= labels[:, None, None])
    emit = emit.masked_fill(closed, _IMPOSSIBLE)
    stay = stay.masked_fill(s >= cells[..., None], _IMPOSSIBLE)
    before = torch.nn.functional.pad(emit.cumsum(2)[..., :-1], (1, 0))  # to reach cell s from cell 0 of the frame
    shift = torch.nn.functional.pad(first[:, 1:] - first[:, :-1], (0, 1))
    index = s + shift[..., None]  # where next frame's cells are in this frame's band
    outside = index >= width
    index = index.clamp(max=width - 1)

    alpha = torch.full((rows, width), 10 * _IMPOSSIBLE, device=stay.device)
    alpha[:, 0] = 0.0
    reached = []
    for t in range(steps):
        alpha = (alpha - before[:, t]).logcumsumexp(1) + before[:, t]
        left = alpha + stay[:, t]
        reached.append(left)
        alpha = left.gather(1, index[:, t]).masked_fill(outside[:, t], 10 * _IMPOSSIBLE)
    final = torch.stack(reached, dim=1)[torch.arange(rows, device=stay.device), frames - 1]
    place = (labels - first.gather(1, frames[:, None] - 1)[:, 0])[:, None]
    return -final.gather(1, place)[:, 0]


def band(times: list[list[int]], frames: list[int], early: int, late: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`first` and `cells` [B, T] for labels whose frames are `times`: each may come `early` frames sooner or `late`
    frames later. A row whose times are negative gets the whole lattice."""
    steps = max(frames)
    first, cells = torch.zeros(len(times), steps, dtype=torch.long), torch.ones(len(times), steps, dtype=torch.long)
    for row, (row_times, count) in enumerate(zip(times, frames, strict=True)):
        if row_times and row_times[0] < 0:
            cells[row] = len(row_times) + 1
            continue
        at = torch.tensor(sorted(row_times))
        frame = torch.arange(steps)
        low = torch.searchsorted(at, frame - late, right=False)  # labels that must have been said before this frame
        high = torch.searchsorted(at, frame + early, right=True)
        high[count - 1 :] = len(row_times)
        first[row], cells[row] = low, high - low + 1
    return first, cells
