"""Logits -> scores in [0, 1] that mean what the labels mean."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def calibrate(logits: Tensor, targets: Tensor, joint: bool) -> list[list[float]]:
    """[slope, offset] of each output's logit, with the lowest cross-entropy on these rows; slopes are positive.

    Args:
        logits: (N, outputs).
        targets: (N, outputs) in [0, 1].
        joint: outputs are classes under a softmax, which get one common slope (temperature scaling, Guo et al. 2017); otherwise
            each has a slope and offset of its own (Platt 1999).
    """
    outputs = logits.shape[1]
    log_slope = torch.zeros(1 if joint else outputs, requires_grad=True)
    offset = torch.zeros(outputs, requires_grad=not joint)
    optimizer = torch.optim.LBFGS([log_slope] if joint else [log_slope, offset], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scaled = logits * log_slope.exp() + offset
        value = (
            functional.cross_entropy(scaled, targets.argmax(1))
            if joint
            else functional.binary_cross_entropy_with_logits(scaled, targets)
        )
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    slopes = log_slope.detach().exp().clamp(1e-2, 1e2).expand(outputs)  # separable rows would drive it to infinity
    return torch.stack([slopes, offset.detach()], 1).tolist()


def calibrated(logits: Tensor, calibration: Sequence[Sequence[float]], loss: str) -> Tensor:
    """Scores (N, outputs) in [0, 1], as the objective `classifier` gives them."""
    slopes, offsets = torch.tensor(calibration).T
    scaled = logits * slopes + offsets
    return scaled.softmax(1) if loss == "classification" else scaled.sigmoid()
