"""Making a transducer of random weights say about as much as a speaker does, and in the same rhythm.

Decoding costs a joint per verdict and an LSTM step per label, so a benchmark needs labels at a lifelike rate. Random
weights with a calibrated blank do not give them: they fall into bursts of the ten labels that one frame may have and
then into silence, because frame and prediction hardly interact. So two of the joint's units are made a Schmitt trigger:

* Labels are of two classes, even and odd ids, told apart by a vector added to their embeddings, and so by the
  prediction of a forgetful LSTM: c = +1 or -1 for the class of the last label, by ridge regression on its outputs.
* The frame gives z, the fastest-changing direction among its 16 principal components on a clip of speech, which
  crosses zero a few times a second however loud the speaker is.
* Unit 0 fires when c = +1 and z > 0 and favours odd labels; unit 1 fires when c = -1 and z < 0 and favours even ones.
  So a label is said whenever z has crossed over, seldom two at one frame, and what was said decides what comes next.

All other units stay random, standardised on the clip, and choose *which* label. Blank's bias is how far z must cross:
it is found by trying, so that greedy decoding of the clip gives `TOKENS_PER_SECOND`.

The clip is heard twice, and only the second time is counted: while the caches of a stream fill, a deep encoder of
random weights swings widely and says several times as much as for the hour after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_PER_SECOND = 3.5  # English speech in word pieces
MAX_SYMBOLS = 10
_COMPONENTS = 16
_VETO = 3.0  # how much a unit is held down by the wrong class, in deviations of z
_FRAME_SHARE = 0.1  # deviation of the frame's random part beside the prediction's, which is 1
_GAIN = 4.0  # logits per deviation of z beyond the trigger's threshold
_SPREAD = 0.3  # deviation of the random logits that choose the label: too little to beat blank without the trigger


def calibrate_random_weights(model: Any, clips: Tensor, seconds: float) -> None:
    """Change the model's embedding, LSTM and joint in place.

    `clips` [N, T, D] are its encoder's outputs on speech; their second halves, which count, are of so many `seconds`
    together. Several chunk sizes and levels of loudness make the trigger indifferent to them.
    """
    import torch

    joint, blank, frames = model.joint, model.joint.num_classes_with_blank - 1, clips.flatten(0, 1)
    parity = 1.0 - 2.0 * (torch.arange(blank) % 2)  # even +1, odd -1
    embedding = model.decoder.prediction["embed"].weight
    embedding[:blank] += 3 * parity[:, None] * torch.randn(embedding.shape[1])

    for name, parameter in model.decoder.prediction["dec_rnn"].named_parameters():
        if "weight" in name:
            parameter *= 2
        elif "bias_ih" in name:  # input, forget, cell and output gate: let the last label prevail
            parameter += torch.tensor([1.0, -3.0, 0.0, 1.0]).repeat_interleave(len(parameter) // 4)

    # Sequences whose classes alternate, as the trigger makes them. Each begins with the state before any label.
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
    """Try 16 biases at once: all that make sense, then around the best, for rates are not quite monotonic."""
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
    """Labels that plain greedy decoding makes of projected frames [N, T, J], `blank_bias` [N] added, in each row's
    second half."""
    import torch

    joint, blank = model.joint, model.joint.num_classes_with_blank - 1
    output, state = model.decoder.predict(torch.full((len(frames), 1), blank), None, add_sos=False)
    predicted, counts = joint.project_prednet(output)[:, 0], torch.zeros(len(frames))
    for t in range(frames.shape[1]):
        active = torch.ones(len(frames), dtype=torch.bool)
        for _ in range(MAX_SYMBOLS):
            logits = joint.joint_net(frames[:, t] + predicted)
            logits[:, blank] += blank_bias
            labels = logits.argmax(dim=1)
            active &= labels != blank
            if not active.any():
                break
            counts += active & (t >= frames.shape[1] // 2)
            output, after = model.decoder.predict(torch.where(active, labels, blank)[:, None], state, add_sos=False)
            predicted = torch.where(active[:, None], joint.project_prednet(output)[:, 0], predicted)
            state = [torch.where(active[:, None], new, old) for new, old in zip(after, state, strict=True)]
    return counts


def _standardise(linear: Any, inputs: Tensor, scale: float) -> None:
    """Give each output of `linear` mean 0 and deviation `scale` over `inputs` [N, in]."""
    outputs = linear(inputs)
    deviation = outputs.std(dim=0) / scale
    linear.weight /= deviation[:, None]
    linear.bias -= outputs.mean(dim=0)
    linear.bias /= deviation


def _fastest_direction(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [D] and offset of the direction that changes most between frames of a settled stream.

    It has unit variance there. The first seconds of a stream swing widely, its caches being empty: directions that
    take part in that are avoided, by counting the swing as spread without speed.
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
    """Weight and offset of the linear function of `inputs` [N, in] nearest to `targets` [N]."""
    import torch

    centre = inputs.mean(dim=0)
    centred = inputs - centre
    covariance = centred.T @ centred
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance, centred.T @ (targets - targets.mean()))
    return weight, targets.mean() - weight @ centre
