"""Pareto fronts and hypervolume of score vectors (maximised), by moocore."""

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray


def front(scores: ArrayLike) -> NDArray[np.bool_]:
    """Mask (N,) of the score vectors (N, O) that no other one dominates; of equal vectors the first is kept."""
    return moocore.is_nondominated(np.asarray(scores, dtype=float), maximise=True)


def reference_point(scores: ArrayLike) -> list[float]:
    """A point (O,) for the hypervolumes of score vectors (N, O): below the worst score of each objective by a tenth of their
    range, so that the extremes of a front count too."""
    found = np.asarray(scores, dtype=float)
    worst, best = found.min(0), found.max(0)
    return (worst - 0.1 * (best - worst)).tolist()


def hypervolume(scores: ArrayLike, reference: Sequence[float]) -> float:
    """Volume that the score vectors (N, O) dominate above the reference point (O,); larger is better.

    Vectors that do not exceed the reference in every objective add nothing.
    """
    return float(moocore.hypervolume(np.asarray(scores, dtype=float), ref=list(reference), maximise=True))
