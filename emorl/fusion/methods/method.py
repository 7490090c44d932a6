"""What a fusion method says of itself: its checks, its page and its search are made of this."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from emorl.config import UserError

Density = float | Sequence[float]
"""share of the entries of a task vector that are kept, in (0, 1]; one for all models, or one for each"""
Products = Callable[[], Tensor]
"""-> inner products (K, K) in float64 of what is fused; a pass over the tensors, for methods that need it"""


@dataclass(frozen=True)
class Setting:
    """What can be set: its default, what it is, the values expected in words, and whether a value is one, for K models."""

    default: Any
    meaning: str
    expected: str
    allows: Callable[[Any, int], bool]


@dataclass(frozen=True, kw_only=True)
class Method:
    """An entry of the registry: a sentence, the paper, whether it works on task vectors (a model less its base), how many
    models it takes at least, and its settings."""

    summary: str
    paper: str = ""
    needs_base: bool = False
    least_models: int = 1
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings with the defaults of the others."""
        return {**{name: setting.default for name, setting in self.settings.items()}, **settings}


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Method):
    """Of the tensors, or the base and a weighted sum of task vectors: of adapters it is exact at the sum of their ranks."""

    coefficients: Callable[..., list[float]]
    """products, weights, settings by name -> (K,); raises UserError for weights that the method refuses"""


@dataclass(frozen=True, kw_only=True)
class EntryWise(Method):
    """Works on each entry of the task vectors: of adapters it has full rank, and is cut to one that is asked for."""

    fuse: Callable[..., Tensor]
    """tensors, weights, base, seeds (one of each model), settings by name -> the fused tensor in float32"""
    needs_base: bool = True


def is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def each(value: Density, models: int) -> list[float]:
    """A setting's value for each model."""
    return [value] * models if isinstance(value, float | int) else list(value)


def normalized(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise UserError(f"the weights {list(weights)} sum to 0 and cannot be normalised")
    return [weight / total for weight in weights]


def normalize(default: bool, meaning: str = "whether the weights are divided by their sum") -> Setting:
    return Setting(default, meaning, "true or false", lambda value, _: isinstance(value, bool))


def density(default: float) -> Setting:
    def allows(value: Any, models: int) -> bool:
        shares = value if isinstance(value, list | tuple) else [value] * models
        return len(shares) == models and all(is_number(share) and 0 < share <= 1 for share in shares)

    return Setting(default, "the share of entries kept", "in (0, 1], for all models or each", allows)


SCALE = Setting(1.0, "the factor of what is added to the base", "a finite number", lambda value, _: is_number(value))
