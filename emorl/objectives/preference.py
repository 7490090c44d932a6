"""Picks the point of a finished search's front that suits a preference best: no search, no training, no model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emorl.config import UserError
from emorl.objectives.scalarize import importance_of


def parse_numbers(option: str, text: str) -> dict[str, float]:
    """`reflection=0.7,empathy=0.3` as a mapping."""
    numbers = {}
    for part in filter(None, text.split(",")):
        name, separator, value = part.partition("=")
        try:
            numbers[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator or not name.strip():
            raise UserError(f"{option} {text!r}: expected objective=number pairs, for example reflection=0.7,empathy=0.3")
    return numbers


def choose(front: Sequence[Mapping[str, Any]], preferences: Mapping[str, float]) -> Mapping[str, Any]:
    """The front's point with the highest preference-weighted score.

    Scores are scaled to [0, 1] over the front first, so that a preference means the same whatever an objective's range.

    Args:
        front: points with `scores` (objective -> score) and `weights`, as in a search's `result.json`.
        preferences: objective -> importance; what is not named counts 0.
    """
    objectives = list(front[0]["scores"])
    try:
        importance = importance_of(objectives, preferences)  # (O,)
    except ValueError as error:
        raise UserError(f"prefer: {error}") from None
    scores = np.array([[point["scores"][name] for name in objectives] for point in front])  # (N, O)
    span = np.maximum(scores.max(0) - scores.min(0), 1e-12)
    return front[int(((scores - scores.min(0)) / span @ importance).argmax())]
