"""Weighted sums whose coefficients are the weights, whatever the tensors: linear mixing, task arithmetic, one model alone."""

from collections.abc import Sequence

from emorl.config import UserError
from emorl.fusion.methods.method import SCALE, Products, WeightedSum, normalize, normalized


def linear(_: Products, weights: Sequence[float], *, normalize: bool) -> list[float]:
    return normalized(weights) if normalize else list(weights)


def task_arithmetic(_: Products, weights: Sequence[float], *, scale: float, normalize: bool) -> list[float]:
    return [scale * weight for weight in (normalized(weights) if normalize else weights)]


def keep(_: Products, weights: Sequence[float]) -> list[float]:
    if sum(weight != 0 for weight in weights) != 1:
        raise UserError(f"keep takes one model, whose weight alone is not 0; got the weights {list(weights)}")
    return [float(weight != 0) for weight in weights]


LINEAR = WeightedSum(
    summary="The weighted mean of the models; without `normalize`, their weighted sum.",
    paper="Model soups, arXiv 2203.05482",
    settings={"normalize": normalize(True)},
    coefficients=linear,
)
TASK_ARITHMETIC = WeightedSum(
    summary="The base plus the weighted sum of the task vectors; a negative weight takes a task away. With many tasks its "
    "authors find a scale of 0.3 to 0.4 best.",
    paper="Editing models with task arithmetic, arXiv 2212.04089",
    needs_base=True,
    settings={"scale": SCALE, "normalize": normalize(False)},
    coefficients=task_arithmetic,
)
KEEP = WeightedSum(summary="The one model whose weight is not 0, as it is.", coefficients=keep)
