"""Candidates that are aggregation weights: directions, because under greedy decoding nothing else of a vector matters."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optuna.distributions import FloatDistribution

from emorl.search.study import Params


@dataclass(frozen=True)
class WeightSpace:
    """Weights of the named policies, not negative, scaled to sum to 1; the zero vector is none of them.

    >>> WeightSpace(("a", "b")).canonical({"a": 1.0, "b": 1.0})
    {'a': 0.5, 'b': 0.5}
    """

    policies: tuple[str, ...]

    @property
    def distributions(self) -> dict[str, FloatDistribution]:
        return {name: FloatDistribution(0.0, 1.0) for name in self.policies}

    def canonical(self, params: Params) -> dict[str, float] | None:
        """The one candidate that stands for all weights of this direction; None for the zero vector."""
        total = sum(params[name] for name in self.policies)
        return {name: round(params[name] / total, 9) for name in self.policies} if total > 0 else None

    def corners(self) -> list[dict[str, float]]:
        """Each policy alone, then equal weights: every search begins with them."""
        single = [{name: float(name == alone) for name in self.policies} for alone in self.policies]
        equal = self.canonical(dict.fromkeys(self.policies, 1.0))
        return [*single, *([equal] if equal and len(self.policies) > 1 else [])]

    def vector(self, params: Mapping[str, float]) -> list[float]:
        """Weights in policy order."""
        return [params[name] for name in self.policies]

    def lattice(self, low: Sequence[float], high: Sequence[float]) -> list[tuple[float, ...]]:
        """The 3^K points of {low, middle, high} per policy."""
        axes = [(lo, (lo + hi) / 2, hi) for lo, hi in zip(low, high, strict=True)]
        return list(itertools.product(*axes))
