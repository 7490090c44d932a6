"""Which weights a conditional distillation is trained on, and which it is never shown.

Drawn are uniform ones (Dirichlet), single policies, and points of the search's front, all in the whole units in which the line
says them. None comes near a held-out one, so that what the student does there is its own.
"""

from collections.abc import Sequence

import numpy as np

from emorl.policies.preference_line import shares

_CORNERS, _POINTS = 0.2, 0.3
"""shares of single policies, and of the front's points"""
_NEAR = 0.051  # the largest difference of any weight
_TRIES = 10_000

Vector = tuple[float, ...]


def held_out_preferences(
    points: Sequence[Sequence[float]], policies: int, count: int, units: int, seed: int
) -> list[list[float]]:
    """Weights (count, K), uniform, away from each other, from single policies and from the points (N, K).

    Fewer than `count` where so many do not fit beside them.

    Args:
        units: of which every weight is a whole number.
    """
    rng, found = np.random.default_rng([seed, 1]), list[Vector]()
    taken = [*_corners(policies), *map(tuple, points)]
    for _ in range(_TRIES):
        if len(found) == count:
            break
        drawn = _uniform(rng, policies, units)
        if not _is_near(drawn, [*taken, *found]):
            found.append(drawn)
    return [list(one) for one in found]


def drawn_preferences(
    points: Sequence[Sequence[float]], held_out: Sequence[Sequence[float]], policies: int, count: int, units: int, seed: int
) -> list[list[float]]:
    """Weights (count, K) to train on, none near a held-out one."""
    rng, kinds = np.random.default_rng([seed, 2]), {0: _corners(policies), 1: [tuple(point) for point in points]}
    drawn = []
    for kind in rng.choice(3, size=count, p=[_CORNERS, _POINTS, 1 - _CORNERS - _POINTS]):
        choices = kinds.get(int(kind), [])
        one = choices[int(rng.integers(len(choices)))] if choices else _uniform(rng, policies, units)
        while not choices and _is_near(one, held_out):
            one = _uniform(rng, policies, units)
        drawn.append(list(one))
    return drawn


def _uniform(rng: np.random.Generator, policies: int, units: int) -> Vector:
    return tuple(share / units for share in shares(rng.dirichlet(np.ones(policies)).tolist(), units))


def _corners(policies: int) -> list[Vector]:
    return [tuple(float(other == policy) for other in range(policies)) for policy in range(policies)]


def _is_near(one: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
    return any(max(abs(a - b) for a, b in zip(one, other, strict=True)) < _NEAR for other in others)
