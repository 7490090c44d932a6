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
    raw_slope = torch.zeros(1 if joint else outputs, requires_grad=True)
    offset = torch.zeros(outputs, requires_grad=not joint)
    optimizer = torch.optim.LBFGS([raw_slope] if joint else [raw_slope, offset], max_iter=200, line_search_fn="strong_wolfe")

    def slope(raw: Tensor) -> Tensor:
        """In [0.01, 100]: separable rows would drive it to infinity."""
        return 100 ** raw.tanh()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _cross_entropy(logits * slope(raw_slope) + offset, targets, joint)
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return torch.stack([slope(raw_slope.detach()).expand(outputs), offset.detach()], 1).tolist()


def calibrated_loss(logits: Tensor, targets: Tensor, joint: bool) -> float:
    """Mean cross-entropy of the rows that is left when they are calibrated on themselves; arguments as in `calibrate`.

    Overconfidence, which calibration takes away, does not count in it, so it goes on falling where the plain validation
    loss already rises.
    """
    return _cross_entropy(_scaled(logits, calibrate(logits, targets, joint)), targets, joint).item()


def calibrated(logits: Tensor, calibration: Sequence[Sequence[float]], loss: str) -> Tensor:
    """Scores (N, outputs) in [0, 1], as the objective `classifier` gives them."""
    scaled = _scaled(logits, calibration)
    return scaled.softmax(1) if loss == "classification" else scaled.sigmoid()


def _scaled(logits: Tensor, calibration: Sequence[Sequence[float]]) -> Tensor:
    slopes, offsets = torch.tensor(calibration).T
    return logits * slopes + offsets


def _cross_entropy(logits: Tensor, targets: Tensor, joint: bool) -> Tensor:
    if joint:
        return functional.cross_entropy(logits, targets.argmax(1))
    return functional.binary_cross_entropy_with_logits(logits, targets)
