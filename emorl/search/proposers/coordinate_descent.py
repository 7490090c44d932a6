"""Rivals of reinforced merging on the same maps: greedy coordinate descent over the layers, and plans at random.

Coordinate descent begins with the best single column and goes through the layers: where another column's block makes the
plan better, the best of them is taken. It ends when a whole sweep changes nothing; it neither skips nor goes back. Random
plans take legal actions with equal chance, as reinforced merging does before it has learnt anything.
"""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from emorl.fusion.merging_map import MergingMap, MergingSpace, action_mask, is_finished, step
from emorl.search.study import Finished, Params, Valuation

_MOST_REPEATS = 1000  # random plans in a row that are known, before the space counts as exhausted


@dataclass(frozen=True)
class CoordinateDescent:
    """A proposer: the K - 1 other blocks of one layer at a time. A function of the finished trials alone."""

    space: MergingSpace
    value: Valuation

    def __call__(self, finished: Sequence[Finished]) -> list[Params] | None:
        values = dict(zip((self._key(trial.params) for trial in finished), self.value(finished), strict=True))
        corners = self.space.corners()
        if missing := self._missing(corners, values):
            return missing
        best, before = self._best(corners, values), None
        while best != before:
            before = best
            for layer in range(self.space.layers):
                candidates = [best, *self._others(best, layer)]
                if missing := self._missing(candidates, values):
                    return missing
                best = self._best(candidates, values)
        return None

    @property
    def expected_trials(self) -> int:
        """About how many candidates there will be, with one sweep that changes something and one that does not."""
        return self.space.columns + 2 * self.space.layers * (self.space.columns - 1)

    def _missing(self, candidates: Sequence[Params], values: Mapping[tuple[int, ...], float]) -> list[Params]:
        return [params for params in candidates if self._key(params) not in values]

    def _best(self, candidates: Sequence[Params], values: Mapping[tuple[int, ...], float]) -> Params:
        """The first of equal ones."""
        return max(candidates, key=lambda params: values[self._key(params)])

    def _key(self, params: Params) -> tuple[int, ...]:
        return tuple(self.space.vector(params))

    def _others(self, params: Params, layer: int) -> list[Params]:
        """With each other column at one layer."""
        plan = self.space.plan(params)
        assert plan is not None, "a candidate"
        columns = [column for column in range(self.space.columns) if column != plan[layer][1]]
        return [self.space.params((*plan[:layer], (layer, column), *plan[layer + 1 :])) for column in columns]


class RandomPlans:
    """A proposer: each column alone, then new plans at random, one at a time, for as long as there are any."""

    def __init__(self, space: MergingSpace, seed: int) -> None:
        self._space = space
        self._stream = self._draw(seed)
        self._drawn: list[Params] = []  # so far, in the order of the stream: the proposals depend on the seed alone

    def __call__(self, finished: Sequence[Finished]) -> list[Params] | None:
        known = {tuple(self._space.vector(trial.params)) for trial in finished}
        for params in itertools.chain(self._drawn, self._stream):
            if tuple(self._space.vector(params)) not in known:
                return [params]
        return None

    def _draw(self, seed: int) -> Iterator[Params]:
        """Distinct plans."""
        generator, seen, repeats = random.Random(seed), set[tuple[int, ...]](), 0
        candidates = itertools.chain(self._space.corners(), (self._play(generator) for _ in itertools.count()))
        while repeats < _MOST_REPEATS:
            params = next(candidates)
            key = tuple(self._space.vector(params))
            repeats = repeats + 1 if key in seen else 0
            if not repeats:
                seen.add(key)
                self._drawn.append(params)
                yield params

    def _play(self, generator: random.Random) -> Params:
        at = MergingMap()
        while not is_finished(self._space, at):
            legal = [action for action, allowed in enumerate(action_mask(self._space, at)) if allowed]
            at = step(self._space, at, generator.choice(legal))
        return self._space.params(at.plan)
