"""One value from a vector of objective scores, to be maximised.

`mean` and `weighted` find only points on the front's convex hull; `chebyshev` can reach every point of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from emorl.config import nearest
from emorl.config.experiment import ValueConfig

SCALARIZATIONS = ("mean", "weighted", "minimum", "chebyshev")


def scalarize(
    scores: NDArray[np.float64],
    method: str,
    importance: NDArray[np.float64],
    references: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Values (N,) of score vectors (N, O).

    Args:
        scores: (N, O).
        method: `mean` (EMORL), `weighted` (mean with `importance`), `minimum`, or `chebyshev`: the augmented weighted
            Chebyshev distance to the ideal point of the references, negated (Steuer and Choo 1983).
        importance: (O,), not negative, summing to 1.
        references: (M, O) scores of the single policies; their best and worst per objective scale `chebyshev`.
    """
    if method == "mean":
        return scores.mean(1)
    if method == "weighted":
        return scores @ importance
    if method == "minimum":
        return scores.min(1)
    if method != "chebyshev":
        raise ValueError(f"scalarize: expected one of {', '.join(SCALARIZATIONS)}, got {method!r}")
    ideal, worst = references.max(0), references.min(0)
    shortfall = importance * (ideal - scores) / np.maximum(ideal - worst, 1e-9)  # (N, O), 0 at the ideal
    return -(shortfall.max(1) + 1e-3 * shortfall.sum(1))


def importance_of(objectives: Sequence[str], preferences: Mapping[str, float]) -> NDArray[np.float64]:
    """Preferences as a vector (O,) summing to 1; objectives without one get 0, no preferences at all mean equal ones.

    Raises:
        ValueError: an unknown objective, a negative preference, none above 0, or a sum that is not finite.
    """
    unknown = sorted(set(preferences) - set(objectives))
    if unknown:
        raise ValueError(f"preferences name {', '.join(unknown)}; {nearest(unknown[0], objectives)}")
    if not preferences:
        return np.full(len(objectives), 1 / len(objectives))
    importance = np.array([float(preferences.get(name, 0.0)) for name in objectives])
    if not math.isfinite(sum(importance.tolist())) or (importance < 0).any() or importance.sum() <= 0:
        raise ValueError(f"preferences must be finite, not negative and not all 0, got {dict(preferences)}")
    return importance / importance.sum()


@dataclass(frozen=True)
class Value:
    """What trade-offs are worth: scores (N, O) as values (N,), by a method and the importance (O,) of the objectives."""

    method: str
    importance: NDArray[np.float64]

    @classmethod
    def of(cls, config: ValueConfig, objectives: Sequence[str]) -> Self:
        """As a block `value` says."""
        return cls(config.scalarize, importance_of(objectives, config.preferences))

    def __call__(self, scores: NDArray[np.float64], references: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Values (...) of scores (..., O). `chebyshev` is scaled by scores of the single policies, `references` (M, O), or by
        the scores themselves."""
        flat = scores.reshape(-1, scores.shape[-1])
        values = scalarize(flat, self.method, self.importance, flat if references is None else references)
        return values.reshape(scores.shape[:-1])
