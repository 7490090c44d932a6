"""Picks the point of a finished search's front that suits a preference best: no search, no training, no model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emorl.config import UserError, nearest
from emorl.objectives.scalarize import importance_of
from emorl.runs.results import BASE

_MOST = 1e6  # beyond it, float32 overflows in hidden states; below 1 / it, nothing of them is left


def parse_numbers(option: str, text: str) -> dict[str, float]:
    """`reflection=0.7,empathy=0.3` as a mapping."""
    numbers = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        if name.strip() in numbers:
            raise UserError(f"{option} {text!r:.200}: {name.strip()!r:.80} is named twice")
        try:
            numbers[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator or not name.strip():
            raise UserError(f"{option} {text!r}: expected objective=number pairs, for example reflection=0.7,empathy=0.3")
    return numbers


def check_weights(option: str, given: Mapping[str, float], policies: Sequence[str]) -> dict[str, float]:
    """One weight for each policy; what is not named is 0.

    Args:
        option: for the message.
        policies: where the base is one of them, weights may be negative.

    Raises:
        UserError: no such policy, numbers that are not finite, negative, all 0, or all too small or any too large for float32.
    """
    unknown = [name for name in given if name not in policies]
    if unknown:
        raise UserError(f"{option}: no policy is called {unknown[0]!r:.80}; {nearest(unknown[0], policies)}")
    weights = {name: given.get(name, 0.0) for name in policies}
    numbers, may_subtract = list(weights.values()), BASE in policies
    is_sized = all(map(math.isfinite, numbers)) and 1 / _MOST <= max(map(abs, numbers)) <= _MOST
    if not is_sized or (min(numbers) < 0 and not may_subtract):
        sign = "" if may_subtract else ", none below 0 (ensemble.include_base would allow that)"
        raise UserError(f"{option}: expected finite numbers, not all 0{sign}, the largest in [1e-6, 1e6], got {dict(given)}")
    return weights


def choose(front: Sequence[Mapping[str, Any]], preferences: Mapping[str, float]) -> Mapping[str, Any]:
    """The front's point with the highest preference-weighted score; of equals, the one that is worth most.

    Scores are scaled to [0, 1] over the front first, so that a preference means the same whatever an objective's range.

    Args:
        front: points with `scores` (objective -> score), `weights` and `value`, as in a search's `result.json`.
        preferences: objective -> importance; what is not named counts 0.
    """
    objectives = list(front[0]["scores"])
    try:
        importance = importance_of(objectives, preferences)  # (O,)
    except ValueError as error:
        raise UserError(f"prefer: {error}") from None
    scores = np.array([[point["scores"][name] for name in objectives] for point in front])  # (N, O)
    span = np.maximum(scores.max(0) - scores.min(0), 1e-12)
    suits = (scores - scores.min(0)) / span @ importance  # (N,)
    return max((front[place] for place in np.flatnonzero(suits == suits.max()).tolist()), key=lambda point: point["value"])
