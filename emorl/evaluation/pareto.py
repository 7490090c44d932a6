"""Pareto fronts and hypervolume of score vectors (maximised), by moocore."""

from collections.abc import Sequence

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray

from emorl.config import UserError
from emorl.runs.results import Point


def front(scores: ArrayLike) -> NDArray[np.bool_]:
    """Mask (N,) of the score vectors (N, O) that no other one dominates; of equal vectors the first is kept.

    Raises:
        UserError: a score that is NaN, which nothing can be compared with.
    """
    found = np.asarray(scores, dtype=float)
    if np.isnan(found).any():
        row = int(np.isnan(found).any(1).argmax())
        raise UserError(f"score vector {row} holds NaN ({found[row].tolist()}); an objective could not score it: leave it out")
    return moocore.is_nondominated(found, maximise=True)


def reference_point(scores: ArrayLike) -> list[float]:
    """A point (O,) for the hypervolumes of score vectors (N, O): below the worst score of each objective by a tenth of their
    range, so that the extremes of a front count too; by 0.1 where all are equal, so that this objective multiplies all volumes
    alike."""
    found = np.asarray(scores, dtype=float)
    worst, width = found.min(0), np.ptp(found, 0)
    return (worst - 0.1 * np.where(width > 0, width, 1.0)).tolist()


def hypervolume(scores: ArrayLike, reference: Sequence[float]) -> float:
    """Volume that the score vectors (N, O) dominate above the reference point (O,); larger is better.

    Vectors that do not exceed the reference in every objective add nothing.
    """
    return float(moocore.hypervolume(np.asarray(scores, dtype=float), ref=list(reference), maximise=True))


def chosen_points(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points of a front: the best of each objective, then always the one farthest from those chosen."""
    objectives = list(points[0].scores)
    return [points[index] for index in spread([[point.scores[name] for name in objectives] for point in points], most)]


def spread(scores: Sequence[Sequence[float]], most: int) -> list[int]:
    """Indices of at most `most` points with scores (N, O), as `chosen_points` chooses them."""
    points = np.array(scores)  # (N, O)
    scaled = (points - points.min(0)) / np.maximum(points.max(0) - points.min(0), 1e-12)
    chosen = list(dict.fromkeys(int(index) for index in points.argmax(0)))[:most]
    while len(chosen) < min(most, len(points)):
        distance = np.linalg.norm(scaled[:, None] - scaled[chosen][None], axis=-1).min(1)  # (N,)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return sorted(chosen, key=lambda index: tuple(-points[index]))
