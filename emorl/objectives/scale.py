"""One scale for all objectives: raw score -> score in [0, 1] -> training reward.

    score  = clip((raw - low) / (high - low))     with a range [low, high], declared by the function or the experiment
    score  = clip(1 / (1 + exp((mean - raw) / std)))     with mean and std, for a function without a range
    score  = raw                                  with neither: nothing is made up
    reward = log(score) with `log`, else the score

Training maximises the reward; validation, search, evaluation and report show the score. EMORL (arXiv 2505.02579) trains on
the log of scores that are clipped to [1e-4, 0.9999], and searches and tests on the scores themselves.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emorl.config.objective import TransformConfig

UNIT = (0.0, 1.0)
PAPER_CLIP = (1e-4, 0.9999)
_ROUNDING = 1e-6  # of a range's width: a float32 probability may be 1.0000001


@dataclass(frozen=True)
class Scale:
    """How one objective's raw scores become scores and training rewards; without arguments, not at all.

    >>> Scale(range=(1.0, 5.0), clip=(0.0, 1.0)).score(2.0)
    0.25
    """

    range: tuple[float, float] | None = None
    mean: float | None = None
    std: float = 1.0
    clip: tuple[float, float] | None = None
    log: bool = False

    def score(self, raw: float) -> float:
        """What everything but training sees."""
        value = raw
        if self.range is not None:
            value = (raw - self.range[0]) / (self.range[1] - self.range[0])
        elif self.mean is not None:
            value = 0.5 + 0.5 * math.tanh(0.5 * (raw - self.mean) / self.std)  # the logistic, without overflow
        return value if self.clip is None else min(max(value, self.clip[0]), self.clip[1])

    def reward(self, score: float) -> float:
        """What training maximises."""
        return math.log(score) if self.log else score

    def is_outside(self, raw: float) -> bool:
        """Whether a raw score lies outside the range by more than rounding."""
        if self.range is None:
            return False
        slack = _ROUNDING * (self.range[1] - self.range[0])
        return not self.range[0] - slack <= raw <= self.range[1] + slack

    def __str__(self) -> str:
        """The whole transform in words."""
        if self.range is None and self.mean is None:
            return "raw score, no range declared"
        cut = "" if self.clip in (None, UNIT) else f", clipped to {interval(self.clip)}"
        if self.mean is not None:
            formula = f"logistic((raw - {self.mean:g}) / {self.std:g})"
        else:
            formula = f"raw score in {interval(self.range)}" + ("" if self.range == UNIT else " mapped onto [0, 1]")
        return f"{formula}{cut}{'; training reward log(score)' if self.log else ''}"


RAW = Scale()


def interval(bounds: tuple[float, float] | None) -> str:
    return "not declared" if bounds is None else f"[{bounds[0]:g}, {bounds[1]:g}]"


def declared_range(function: Callable[..., Any]) -> tuple[float, float] | None:
    """The lowest and highest raw score in an objective function's or class's attribute `range`; None without one."""
    declared = getattr(function, "range", None)
    if not isinstance(declared, (tuple, list)) or len(declared) != 2:
        return None  # another library's attribute or method of that name
    low, high = declared
    if not all(isinstance(bound, numbers.Real) and math.isfinite(bound) for bound in (low, high)) or low >= high:
        raise ValueError(f"its function declares the range {declared!r}; expected two finite numbers, the lower first")
    return float(low), float(high)


def resolve(transform: TransformConfig | None, declared: tuple[float, float] | None) -> Scale:
    """The scale of an objective from its `transform:` block and the range its function declares.

    Raises:
        ValueError: a transform of a function without a range, that brings neither a range nor mean and std.
    """
    if transform is None:
        return RAW if declared is None else Scale(range=declared, clip=UNIT)
    clip = transform.clip or (PAPER_CLIP if transform.log else UNIT)
    if transform.mean is not None and transform.std is not None:
        return Scale(mean=transform.mean, std=transform.std, clip=clip, log=transform.log)
    bounds = transform.range or declared
    if bounds is None:
        raise ValueError("transform: its function declares no range; give `range: [low, high]`, or `mean` and `std`")
    return Scale(range=bounds, clip=clip, log=transform.log)
