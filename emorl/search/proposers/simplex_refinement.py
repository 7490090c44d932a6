"""A grid refined on the simplex of weights: pattern search, whose levels cost d (d - 1) points instead of 3^d.

Begins with each policy alone, equal weights, and the points half-way between them; then polls around the best points found,
moving `step` of weight from one policy to another, and halves the step when no such move is better. That is generalised
pattern search (Torczon 1997; Audet & Dennis 2003) with the positive basis e_i - e_j of the simplex. Departures: several
centres are polled at once, against local optima and noise, and all their moves are one batch; a level has a bounded number
of polls, so that the search ends under noise too. `benchmarks/proposers.py` chose the numbers.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Finished, Params, Valuation

Point = tuple[int, ...]
"""Weights in whole units of 1 / (d 2^levels), so that equal points are equal exactly."""

_CENTRES = 3
_POLLS = 2  # of one level, at most


@dataclass(frozen=True)
class SimplexRefinement:
    """A proposer: one poll at a time, None after the last. A function of the finished trials alone.

    `levels` counts halvings of the step as the box grid counts those of its box: 5 reach steps of 1/32.
    """

    space: WeightSpace
    levels: int
    value: Valuation

    def __call__(self, finished: Sequence[Finished]) -> list[Params] | None:
        values = {
            tuple(self.space.vector(trial.params)): value for trial, value in zip(finished, self.value(finished), strict=True)
        }
        visited: dict[Point, float] = {}  # only what this search itself would have seen, so that it can be repeated
        missing = self._visit(self._first_points(), visited, values)
        for level in range(2, self.levels + 1):
            polled: set[Point] = set()
            for _ in range(_POLLS):
                centres = [centre for centre in self._best(visited) if centre not in polled]
                if missing or not centres:
                    break
                polled.update(centres)
                moves = [move for centre in centres for move in self._moves(centre, self._unit >> level)]
                missing = self._visit(moves, visited, values)
        return missing or None

    @property
    def expected_trials(self) -> int:
        """About how many candidates there will be; it depends on how often a level moves on."""
        policies = len(self.space.policies)
        return len(self._first_points()) + (self.levels - 1) * _CENTRES * policies * (policies - 1)

    @property
    def _unit(self) -> int:
        """All weight there is."""
        return len(self.space.policies) << self.levels

    def _first_points(self) -> list[Point]:
        policies = range(len(self.space.policies))
        single = [tuple(self._unit * (name == alone) for name in policies) for alone in policies]
        equal = tuple(1 << self.levels for _ in policies)
        halfway = [tuple((self._unit * (name == near) + (1 << self.levels)) // 2 for name in policies) for near in policies]
        return [*single, equal, *halfway]

    def _visit(
        self, points: Sequence[Point], visited: dict[Point, float], values: Mapping[tuple[float, ...], float]
    ) -> list[Params]:
        """Enters the known values of points; the candidates whose value is not known."""
        missing: dict[tuple[float, ...], Params] = {}
        for point in points:
            candidate = self.space.canonical(dict(zip(self.space.policies, map(float, point), strict=True)))
            assert candidate is not None, "all weight is given to some policy"
            key = tuple(self.space.vector(candidate))
            if key in values:
                visited[point] = values[key]
            else:
                missing[key] = candidate
        return list(missing.values())

    def _best(self, visited: Mapping[Point, float]) -> list[Point]:
        """The centres of the next poll: the best points; the first of equal ones."""
        return sorted(visited, key=lambda point: -visited[point])[:_CENTRES]

    def _moves(self, centre: Point, step: int) -> list[Point]:
        """All points that give one policy `step` of another's weight, or all it has if that is less."""
        moves = []
        for giver, taker in itertools.permutations(range(len(centre)), 2):
            amount = min(step, centre[giver])
            if amount > 0:
                moved = list(centre)
                moved[giver] -= amount
                moved[taker] += amount
                moves.append(tuple(moved))
        return moves
