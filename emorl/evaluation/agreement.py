"""How well scores agree with labels."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

Numbers = Sequence[float] | np.ndarray


def auc(higher: Numbers, lower: Numbers) -> float:
    """P(a draw of `higher` beats a draw of `lower`), ties half: the area under the ROC curve."""
    if len(higher) == 0 or len(lower) == 0:
        raise ValueError(f"an AUC needs scores on both sides, got {len(higher)} and {len(lower)}")
    ranks = rankdata([*higher, *lower])
    return float((ranks[: len(higher)].sum() / len(higher) - (len(higher) + 1) / 2) / len(lower))


def rank_correlation(scores: Numbers, labels: Numbers) -> float:
    """Spearman's correlation; NaN where one side does not vary."""
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(labels) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(scores), rankdata(labels))[0, 1])


def calibration_error(scores: Numbers, targets: Numbers, bins: int = 10) -> float:
    """Expected calibration error: mean distance of mean score and mean target, over equally filled bins."""
    order = np.argsort(scores)
    parts = [part for part in np.array_split(order, bins) if len(part)]
    score, target = np.asarray(scores), np.asarray(targets)
    return float(sum(len(part) * abs(score[part].mean() - target[part].mean()) for part in parts) / len(order))


def ordered_share(scores: Numbers, grades: Numbers, groups: Sequence[str]) -> float:
    """Share of (higher, lower) grade pairs of a group that the scores put in order, ties half: pairwise accuracy.

    Raises:
        ValueError: no group has two grades.
    """
    score, grade = np.asarray(scores), np.asarray(grades)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    right = pairs = 0.0
    for rows in members.values():
        higher = grade[rows][:, None] > grade[rows][None]  # (n, n)
        gap = np.sign(score[rows][:, None] - score[rows][None])
        right += float(((gap + 1) / 2)[higher].sum())
        pairs += float(higher.sum())
    if pairs == 0:
        raise ValueError("a pairwise accuracy needs a group with two different grades")
    return right / pairs
