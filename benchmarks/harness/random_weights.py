"""Calibration of a transducer with random weights to the token rate and rhythm of English speech.

Decoding runs the joint once per label or blank, and an LSTM step per label, so a benchmark needs a realistic token
rate. Calibrating only the bias of blank is not enough: because frame and prediction hardly interact, the model emits
bursts of `MAX_SYMBOLS` labels at one frame and then none for a long time. Two units of the joint therefore form a
Schmitt trigger:

* Labels have two classes, even and odd ids. A vector added to the embeddings of one class separates them. A linear
  function of the prediction network's output, fitted by ridge regression, gives the class of the last label: c = +1 or
  -1.
* A linear function of the encoder frame gives z: the direction that changes fastest among the 16 principal components
  on a clip of speech. z crosses zero a few times per second, independent of the volume.
* Unit 0 is active if c = +1 and z > 0, and increases the logits of odd labels; unit 1 is active if c = -1 and z < 0,
  and increases the logits of even labels. The model therefore emits a label when z has crossed zero, rarely two at one
  frame, and each label determines the class of the next.

All other units stay random, standardised on the clip, and select the label within the class. The bias of blank
determines how far z must cross zero; it is searched so that greedy decoding of the clip emits `TOKENS_PER_SECOND`.

The clip is processed twice and only the second half is counted: while the caches of a stream fill, a deep encoder with
random weights has large activations and the model emits several times as many tokens as later.

Shapes: N clips (conditions), T encoder frames, D encoder width, J joint width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_PER_SECOND = 3.5  # word pieces of English speech
MAX_SYMBOLS = 10  # labels per frame, as in NeMo's configuration
_COMPONENTS = 16
_VETO = 3.0  # inhibition of a trigger unit by the wrong class, in standard deviations of z
_FRAME_SHARE = 0.1  # standard deviation of the random units' frame part; that of the prediction part is 1
_GAIN = 4.0  # logits per standard deviation of z beyond the threshold
_SPREAD = 0.3  # standard deviation of the random logits that select the label; too small to exceed blank alone


def calibrate_random_weights(model: Any, clips: Tensor, seconds: float) -> None:
    """Calibrate embedding, LSTM and joint of a NeMo model in place.

    `clips` [N, T, D] are encoder outputs on speech, at several chunk sizes and volumes so that the trigger does not
    depend on them. Only their second halves are counted; `seconds` is their total duration.
    """
    import torch

    joint, blank, frames = model.joint, model.joint.num_classes_with_blank - 1, clips.flatten(0, 1)
    parity = 1.0 - 2.0 * (torch.arange(blank) % 2)  # even +1, odd -1
    embedding = model.decoder.prediction["embed"].weight
    embedding[:blank] += 3 * parity[:, None] * torch.randn(embedding.shape[1])

    for name, parameter in model.decoder.prediction["dec_rnn"].named_parameters():
        if "weight" in name:
            parameter *= 2
        elif "bias_ih" in name:  # input, forget, cell and output gate: the last label dominates
            parameter += torch.tensor([1.0, -3.0, 0.0, 1.0]).repeat_interleave(len(parameter) // 4)

    # Label sequences [128, 16] with alternating classes, as emitted by the trigger, after the start state.
    labels = torch.randint(0, blank // 2, (128, 16)) * 2 + torch.arange(1, 17) % 2
    predictions, _ = model.decoder.predict(labels, None, add_sos=True)
    targets = torch.cat([torch.ones(128, 1), parity[labels]], dim=1).flatten()
    predictions = predictions.flatten(0, 1)
    _standardise(joint.enc, frames, _FRAME_SHARE)
    _standardise(joint.pred, predictions, 1.0)

    z, z_offset = _fastest_direction(clips)
    c, c_offset = _ridge(predictions, targets)
    for unit, sign in ((0, 1.0), (1, -1.0)):
        joint.enc.weight[unit], joint.enc.bias[unit] = sign * z, sign * z_offset
        joint.pred.weight[unit], joint.pred.bias[unit] = sign * _VETO * c, sign * _VETO * c_offset - _VETO

    clips = joint.project_encoder(clips)
    frames, predictions = clips.flatten(0, 1), joint.project_prednet(predictions)
    pairs = (frames[torch.randint(len(frames), (4096,))] + predictions[torch.randint(len(predictions), (4096,))]).relu()
    out = joint.joint_net[-1]
    out.weight.normal_()
    out.weight[:, :2] = 0
    out.weight /= (pairs @ out.weight.T).std(dim=0)[:, None] / _SPREAD
    out.bias.copy_(-out.weight @ pairs.mean(dim=0))
    out.weight[1:blank:2, 0] = out.weight[0:blank:2, 1] = _GAIN
    _calibrate_blank(model, clips, seconds)


def _calibrate_blank(model: Any, clips: Tensor, seconds: float) -> None:
    """Search the bias of blank: 16 values over the whole range, then 16 around the best (rates are not monotonic)."""
    import torch

    bias = model.joint.joint_net[-1].bias
    centre, best = float(bias[-1]), (float("inf"), 0.0)
    for low, high in ((0.5, 8.0), (-0.25, 0.25)):
        tried = centre + torch.linspace(low, high, 16)
        bias[-1] = 0
        counts = _count_labels(model, clips.repeat(len(tried), 1, 1), tried.repeat_interleave(len(clips)))
        rates = counts.view(len(tried), len(clips)).sum(dim=1) / seconds
        best = min(best, *zip((rates - TOKENS_PER_SECOND).abs().tolist(), tried.tolist(), strict=True))
        centre = best[1]
    bias[-1] = centre


def _count_labels(model: Any, frames: Tensor, blank_bias: Tensor) -> Tensor:
    """Return the number of labels [N] that greedy decoding emits in the second half of projected frames [N, T, J].

    `blank_bias` [N] is added to the logit of blank.
    """
    import torch

    joint, blank = model.joint, model.joint.num_classes_with_blank - 1
    output, state = model.decoder.predict(torch.full((len(frames), 1), blank), None, add_sos=False)
    predicted, counts = joint.project_prednet(output)[:, 0], torch.zeros(len(frames))
    for t in range(frames.shape[1]):
        rows = torch.arange(len(frames))  # that have not emitted blank at this frame
        for _ in range(MAX_SYMBOLS):
            logits = joint.joint_net(frames[rows, t] + predicted[rows])
            logits[:, blank] += blank_bias[rows]
            labels = logits.argmax(dim=1)
            rows, labels = rows[labels != blank], labels[labels != blank]
            if not len(rows):
                break
            counts[rows] += t >= frames.shape[1] // 2
            output, after = model.decoder.predict(labels[:, None], [part[:, rows] for part in state], add_sos=False)
            predicted[rows] = joint.project_prednet(output)[:, 0]
            for part, new in zip(state, after, strict=True):
                part[:, rows] = new
    return counts


def _standardise(linear: Any, inputs: Tensor, scale: float) -> None:
    """Scale `linear` in place so that each output has mean 0 and standard deviation `scale` over `inputs` [N, in]."""
    outputs = linear(inputs)
    deviation = outputs.std(dim=0) / scale
    linear.weight /= deviation[:, None]
    linear.bias -= outputs.mean(dim=0)
    linear.bias /= deviation


def _fastest_direction(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [D] and offset of the direction that changes most between frames, with unit variance.

    Changes are measured in the second half of the clips. The variance includes the first half, in which the caches are
    still empty and activations are large, so that directions with large activations there are avoided.
    """
    import torch

    settled = clips[:, clips.shape[1] // 2 :]
    centre = settled.flatten(0, 1).mean(dim=0)
    components = torch.linalg.svd(settled.flatten(0, 1) - centre, full_matrices=False).Vh[:_COMPONENTS]
    scores = (clips - centre) @ components.T
    steps = scores[:, -settled.shape[1] :].diff(dim=1).flatten(0, 1)
    spread = scores.flatten(0, 1)
    inverse = torch.linalg.inv(torch.linalg.cholesky(spread.T @ spread))
    direction = torch.linalg.eigh(inverse @ (steps.T @ steps) @ inverse.T).eigenvectors[:, -1] @ inverse @ components
    direction /= ((settled - centre) @ direction).std()
    return direction, -direction @ centre


def _ridge(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [in] and offset of the ridge regression from `inputs` [N, in] to `targets` [N]."""
    import torch

    centre = inputs.mean(dim=0)
    centred = inputs - centre
    covariance = centred.T @ centred
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance, centred.T @ (targets - targets.mean()))
    return weight, targets.mean() - weight @ centre
