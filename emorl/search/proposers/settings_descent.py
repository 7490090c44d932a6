"""Greedy coordinate descent over fusion settings: a rival of RL-Fusion's Q-learning on the same lattice.

Begins with the best of the single models and equal weights, and changes one setting at a time: the method, the scale, what
one model gives to another. Where one of the changes makes it better, the best is taken. Weights move in steps of a quarter
first, which halve whenever a sweep over all settings changes nothing, down to the lattice's own.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emorl.search.spaces.fusion_space import METHOD, SCALE, FusionSpace, has_scale
from emorl.search.study import Finished, Params, Valuation


@dataclass(frozen=True)
class SettingsDescent:
    """A proposer: the changes of one setting at a time. A function of the finished trials alone."""

    space: FusionSpace
    value: Valuation

    def __call__(self, finished: Sequence[Finished]) -> list[Params] | None:
        values = dict(zip((self._key(trial.params) for trial in finished), self.value(finished), strict=True))

        def missing(candidates: Sequence[Params]) -> list[Params]:
            return [params for params in candidates if self._key(params) not in values]

        def best_of(candidates: Sequence[Params]) -> Params:
            return max(candidates, key=lambda params: values[self._key(params)])  # the first of equal ones

        if new := missing(self.space.corners()):
            return new
        best, stride = best_of(self.space.corners()), max(1, self.space.units // 4)
        while stride:
            before = best
            for setting in range(2 + len(self.space.models)):
                candidates = [best, *self._changed(best, setting, stride)]
                if new := missing(candidates):
                    return new
                best = best_of(candidates)
            stride = stride if best != before else stride // 2
        return None

    def _changed(self, params: Params, setting: int, stride: int) -> list[Params]:
        """Other candidates that differ in one setting; of the weights, what one model gives to or takes from each other."""
        units = [round(weight * self.space.units) for weight in self.space.weights(params)]
        method, scale = params[METHOD], params[SCALE]
        if setting == 0:
            return [self.space.params(units, other, scale) for other in self.space.methods if other != method]
        if setting == 1:
            others = self.space.scales if has_scale(method) else ()
            return [self.space.params(units, method, other) for other in others if other != scale]
        return [self.space.params(moved, method, scale) for moved in _moves(units, setting - 2, stride)]

    def _key(self, params: Params) -> tuple[float, ...]:
        return tuple(self.space.vector(params))


def _moves(units: Sequence[int], model: int, stride: int) -> Iterator[list[int]]:
    """Weights in steps after `model` has given up to `stride` to another one, or taken it."""
    others = [other for other in range(len(units)) if other != model]
    for giver, taker in itertools.chain(((model, other) for other in others), ((other, model) for other in others)):
        given = min(stride, units[giver])
        if given:
            moved = list(units)
            moved[giver], moved[taker] = units[giver] - given, units[taker] + given
            yield moved
