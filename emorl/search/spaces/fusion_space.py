"""Candidates that are fusion settings: weights on a lattice of the simplex, the method and its scale (RL-Fusion's actions,
Appl. Sci. 2025, 15(4), 2186)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from emorl.fusion.operators import OPERATORS, Fusion
from emorl.search.study import Params

METHOD, SCALE = "method", "scale"
_WEIGHT = "weight_"


@dataclass(frozen=True)
class FusionSpace:
    """Weights of the models in whole steps, summing to 1; one of `methods`; one of `scales` where the method has a scale.

    >>> FusionSpace(("a", "b"), ("slerp",), (1.0,)).canonical({"weight_a": 2, "weight_b": 2, "method": "slerp", "scale": 1.0})
    {'weight_a': 0.5, 'weight_b': 0.5, 'method': 'slerp', 'scale': 1.0}
    """

    models: tuple[str, ...]
    methods: tuple[str, ...]
    scales: tuple[float, ...] = (1.0,)
    step: float = 0.05
    settings: Mapping[str, Any] = field(default_factory=dict)
    """of every method that has them, such as a density"""

    @property
    def units(self) -> int:
        """Steps from 0 to 1."""
        return round(1 / self.step)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        weights = {f"{_WEIGHT}{name}": FloatDistribution(0.0, 1.0) for name in self.models}
        return {
            **weights,
            METHOD: CategoricalDistribution(self.methods),
            SCALE: CategoricalDistribution(self.scales),
        }

    def params(self, units: Sequence[int], method: str, scale: float) -> dict[str, Any]:
        """The candidate with these weights in steps (K,)."""
        weights = {f"{_WEIGHT}{name}": round(unit / self.units, 9) for name, unit in zip(self.models, units, strict=True)}
        return {**weights, METHOD: method, SCALE: scale if has_scale(method) else self.default_scale}

    @property
    def default_scale(self) -> float:
        """The scale closest to 1: where nobody has changed it."""
        return min(self.scales, key=lambda scale: abs(math.log(scale)))

    def canonical(self, params: Params) -> dict[str, Any] | None:
        """The lattice point nearest to the direction of the weights; None for the zero vector."""
        weights = self.weights(params)
        total = sum(weights)
        if total <= 0:
            return None
        exact = [weight / total * self.units for weight in weights]
        units = [math.floor(one + 1e-9) for one in exact]
        by_rest = sorted(range(len(exact)), key=lambda index: units[index] - exact[index])
        for index in by_rest[: self.units - sum(units)]:  # largest remainders first
            units[index] += 1
        return self.params(units, params[METHOD], params[SCALE])

    def corners(self) -> list[dict[str, Any]]:
        """Each model alone, then equal weights, by the first method: every search begins with them."""
        first, scale = self.methods[0], self.default_scale
        alone = [[self.units * (name == other) for other in self.models] for name in self.models]
        equal = self.canonical({**{f"{_WEIGHT}{name}": 1.0 for name in self.models}, METHOD: first, SCALE: scale})
        return [*(self.params(units, first, scale) for units in alone), *([equal] if equal and len(self.models) > 1 else [])]

    def weights(self, params: Params) -> list[float]:
        """(K,), in the order of the models."""
        return [params[f"{_WEIGHT}{name}"] for name in self.models]

    def vector(self, params: Params) -> list[float]:
        """Numbers that tell candidates apart."""
        return [*self.weights(params), float(self.methods.index(params[METHOD])), params[SCALE]]

    def fusion(self, params: Params) -> Fusion:
        """What the candidate does to every module."""
        known = OPERATORS[params[METHOD]].settings
        settings = {name: value for name, value in self.settings.items() if name in known}
        if has_scale(params[METHOD]):
            settings[SCALE] = params[SCALE]
        return Fusion(params[METHOD], tuple(self.weights(params)), settings)

    def fusion_of(self, params: Params) -> Callable[[str], Fusion]:
        """A module's name -> what the candidate does to it: to all the same."""
        fusion = self.fusion(params)
        return lambda module: fusion

    def describe(self, params: Params) -> dict[str, Any]:
        """For `result.json`."""
        fusion = self.fusion(params)
        weights = dict(zip(self.models, fusion.weights, strict=True))
        return {"method": fusion.method, "weights": weights, "settings": dict(fusion.settings)}


def has_scale(method: str) -> bool:
    return SCALE in OPERATORS[method].settings
