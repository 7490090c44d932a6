"""EMORL's hierarchical grid search (arXiv 2505.02579) over aggregation weights, for any number of policies.

Each level lays {low, middle, high} over the box per policy, values the 2^K sub-boxes by their corners and goes on in the
best one; 5 levels reach a precision of 1/32. Departures from the authors' code, which is fixed to 3 policies and evaluates
135 points: points of one direction are one candidate (greedy decoding cannot tell them apart) and are evaluated once, about
92 remain at K=3; the zero vector is never evaluated and left out of its sub-box's mean; sub-boxes are compared by mean
instead of sum for that reason.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Finished, Params, Valuation

Point = tuple[float, ...]
_Key = tuple[float, ...]


@dataclass(frozen=True)
class HierarchicalGrid:
    """A proposer: one level at a time, None after the last. A function of the finished trials alone."""

    space: WeightSpace
    levels: int
    value: Valuation

    def __call__(self, finished: Sequence[Finished]) -> list[Params] | None:
        values = {
            tuple(self.space.vector(trial.params)): value for trial, value in zip(finished, self.value(finished), strict=True)
        }
        low, high = (0.0,) * len(self.space.policies), (1.0,) * len(self.space.policies)
        for _ in range(self.levels):
            missing = [key for key in self._keys(self.space.lattice(low, high)) if key not in values]
            if missing:
                return [dict(zip(self.space.policies, key, strict=True)) for key in missing]
            low, high = self._best_box(low, high, values)
        return None

    @property
    def expected_trials(self) -> int:
        """About how many candidates there will be; later levels share some points with earlier ones."""
        count = len(self.space.policies)
        first = self._keys(self.space.lattice((0.0,) * count, (1.0,) * count))
        return len(first) + (self.levels - 1) * (3**count - 2**count)

    def _keys(self, points: Sequence[Point]) -> list[_Key]:
        """The distinct directions of the points, the policies alone and equal weights first."""
        candidates = [self.space.canonical(dict(zip(self.space.policies, point, strict=True))) for point in points]
        keys = dict.fromkeys(tuple(self.space.vector(candidate)) for candidate in candidates if candidate is not None)
        first = [key for corner in self.space.corners() if (key := tuple(self.space.vector(corner))) in keys]
        return [*first, *(key for key in keys if key not in first)]

    def _best_box(self, low: Point, high: Point, values: dict[_Key, float]) -> tuple[Point, Point]:
        """The sub-box of half the side whose corners have the highest mean value; the first of equal ones."""
        middle = tuple((lo + hi) / 2 for lo, hi in zip(low, high, strict=True))
        boxes = []
        for upper in itertools.product((False, True), repeat=len(low)):
            box_low = tuple(mid if up else lo for up, lo, mid in zip(upper, low, middle, strict=True))
            box_high = tuple(hi if up else mid for up, mid, hi in zip(upper, middle, high, strict=True))
            corners = list(itertools.product(*zip(box_low, box_high, strict=True)))
            known = [values[key] for corner in corners for key in self._keys([corner])]
            boxes.append((sum(known) / len(known), box_low, box_high))
        _, best_low, best_high = max(boxes, key=lambda box: box[0])
        return best_low, best_high
