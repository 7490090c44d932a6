"""SLERP between two tensors, and the Karcher mean on the sphere of more; both from the tensors' inner products alone."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from emorl.fusion.methods.method import Products, Setting, WeightedSum, normalized

_PARALLEL = 0.9995  # |cosine| from which SLERP is linear, as in mergekit
_KARCHER_ROUNDS, _KARCHER_TOLERANCE = 50, 1e-12
TASK_VECTORS = "task_vectors"


def slerp(products: Products, weights: Sequence[float], *, space: str) -> list[float]:
    """`space` decides what the products are of: the weights, or the task vectors, which are near-orthogonal."""
    coefficients = slerp_coefficients if len(weights) == 2 else karcher_coefficients
    return coefficients(products(), normalized(weights))


def slerp_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """Of SLERP between two tensors with inner products (2, 2); the weights sum to 1."""
    first, second = weights
    norms = products.diagonal().sqrt()
    if norms.min() == 0:
        return [first, second]
    cosine = float(products[0, 1] / norms.prod())
    if abs(cosine) > _PARALLEL:
        return [first, second]
    angle = math.acos(cosine)
    return [math.sin(first * angle) / math.sin(angle), math.sin(second * angle) / math.sin(angle)]


def karcher_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """Of the weighted Karcher mean on the sphere of K tensors with inner products (K, K), times the weighted mean of their
    lengths. The mean is a combination of the tensors, so only its coefficients are iterated."""
    norms = products.diagonal().sqrt().numpy()
    share = np.asarray(weights)
    if norms[share != 0].min() == 0:
        return list(weights)  # no direction: linear
    lengths = np.where(norms > 0, norms, 1.0)
    cosines = products.numpy() / np.outer(lengths, lengths)
    mean = share / math.sqrt(share @ cosines @ share) if share @ cosines @ share > 0 else np.eye(len(share))[share.argmax()]
    for _ in range(_KARCHER_ROUNDS):
        towards = np.clip(cosines @ mean, -1.0, 1.0)  # of each unit vector with the mean
        angles = np.arccos(towards)
        ratio = share / np.sinc(angles / np.pi)  # w_i angle_i / sin(angle_i)
        tangent = ratio - (ratio @ towards) * mean
        length = math.sqrt(max(0.0, tangent @ cosines @ tangent))
        if length < _KARCHER_TOLERANCE:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
    return (share @ norms * mean / lengths).tolist()


SLERP = WeightedSum(
    summary="Along the arc between two tensors, from the first to the second by the second's share of the weights; linear "
    "where they are nearly parallel (|cosine| > 0.9995: whole parameters of most fine-tunes). Of more tensors: the weighted "
    "Karcher mean on the sphere, as long as the weighted mean of their lengths.",
    paper="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
    least_models=2,
    settings={
        "space": Setting(
            "weights",
            "where the arc is: between the models, or (task_vectors, as always for adapters) their changes to the base",
            f"weights or {TASK_VECTORS}",
            lambda value, _: value in ("weights", TASK_VECTORS),
        )
    },
    coefficients=slerp,
)
