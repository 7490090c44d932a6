"""Successive elimination of candidates on growing blocks of prompts, by paired comparisons.

All candidates face the same prompts, so what tells them apart is the difference on each prompt, whose standard error is
far smaller than that of either score. After Hoeffding races (Maron & Moore 1994) and F-Race (Birattari et al. 2002), with
Student's t on the jackknife (Efron 1982), which also serves values that are no mean, such as the worst objective.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import t as student

Array = np.ndarray


def blocks(prompts: int, first: int) -> list[int]:
    """How many prompts have been seen after each round: `first`, then double, and at last all.

    >>> blocks(32, 8), blocks(40, 8), blocks(10, 8)
    ([8, 16, 32], [8, 16, 40], [10])
    """
    sizes = []
    while 2 * first <= prompts:
        sizes.append(first)
        first *= 2
    return [*sizes, prompts]


def survivors(scores: Array, value: Callable[[Array], Array], confidence: float, comparisons: int) -> Array:
    """Which candidates may still be the best: (C,) booleans.

    A candidate is dropped only if its value lies below the best one's by more than the one-sided t quantile times the
    paired standard error over prompts.

    Args:
        scores: (C, N, O), of C candidates on the same N prompts; NaN where an objective could not score.
        value: mean scores (..., O) -> values (...,), maximised.
        confidence: that the whole race drops no candidate which is as good as the best.
        comparisons: of the whole race (candidates times rounds); their risks are added up (Bonferroni).
    """
    values = value(np.nanmean(scores, 1))  # (C,)
    best = int(values.argmax())
    prompts = scores.shape[1]
    if prompts < 2:
        return np.ones(len(scores), bool)
    without = value(_means_without_each(scores))  # (C, N)
    differences = without - without[best]
    spread = ((differences - differences.mean(1, keepdims=True)) ** 2).sum(1)
    error = np.sqrt((prompts - 1) / prompts * spread)  # jackknife, (C,)
    quantile = float(student.ppf(1 - (1 - confidence) / comparisons, prompts - 1))
    kept = ~(values - values[best] < -quantile * error)  # NaN: cannot be told, so kept
    kept[best] = True
    return kept


def _means_without_each(scores: Array) -> Array:
    """Means over all prompts but one, for each prompt: (C, N, O)."""
    known = ~np.isnan(scores)
    total, count = np.nansum(scores, 1, keepdims=True), known.sum(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (total - np.nan_to_num(scores)) / (count - known)
