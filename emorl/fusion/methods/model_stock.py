"""Model Stock (arXiv 2403.19522): t = K cos / (1 + (K - 1) cos), with the mean cosine between task vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from emorl.config import UserError
from emorl.fusion.methods.method import Products, WeightedSum


def model_stock(products: Products, weights: Sequence[float]) -> list[float]:
    if len(set(weights)) > 1:
        raise UserError(f"model_stock treats all models alike: leave the weights out; got {list(weights)}")
    return stock_coefficients(products())


def stock_coefficients(products: Tensor) -> list[float]:
    """Of Model Stock for task vectors with inner products (K, K)."""
    count = len(products)
    norms = products.diagonal().sqrt().clamp(min=1e-150)  # a product of two is no 0
    cosines = products / torch.outer(norms, norms)
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
    spread = 1 + (count - 1) * cosine  # 0 where the task vectors cancel out: then the base is as near as their mean
    share = count * cosine / spread if spread > 1e-9 else 0.0
    return [max(0.0, share) / count] * count


MODEL_STOCK = WeightedSum(
    summary="From the base towards the mean of the models, as far as their task vectors agree; all models count alike.",
    paper="Model Stock, arXiv 2403.19522",
    needs_base=True,
    least_models=2,
    coefficients=model_stock,
)
