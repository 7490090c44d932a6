"""Optuna's samplers as proposers.

The sampler works on a private study in memory that is rebuilt from the finished trials: asking it again with the same seed
reproduces what it proposed before, so a resumed search goes on as if it had never stopped. (Optuna does not store a sampler's
state, and its CMA-ES would unpickle one.) With several workers the order of results may differ; their trials are then added
as they are. TPE, GP, CMA-ES and random see the scalarised value, NSGA-II the vector of scores; QMC sees none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState, create_trial

from emorl.search.study import Finished, Params, Space, Valuation

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed),
    "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=20),
    "cma_es": lambda seed: CmaEsSampler(seed=seed),
    "qmc": lambda seed: QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False),
    "random": lambda seed: RandomSampler(seed=seed),
}
_WANTS_VECTOR = frozenset({"nsga2"})
_MOST_ASKS = 100  # of one proposal, before a sampler that repeats itself counts as exhausted


class OptunaProposer:
    """A proposer: the space's corners first, then one candidate at a time from the named sampler."""

    def __init__(self, sampler: str, space: Space, objectives: int, value: Valuation, seed: int) -> None:
        self._space, self._value, self._vector = space, value, sampler in _WANTS_VECTOR
        self._shadow = optuna.create_study(
            directions=[StudyDirection.MAXIMIZE] * (objectives if self._vector else 1), sampler=SAMPLERS[sampler](seed)
        )
        self._asked: tuple[Trial, Params] | None = None
        self._told = 0

    def __call__(self, finished: Sequence[Finished]) -> list[Params] | None:
        missing = [corner for corner in self._space.corners() if corner not in [trial.params for trial in finished]]
        if missing:
            return list(missing)
        self._replay(finished)
        asked = self._ask(dict(zip(map(self._key, finished), self._values(finished), strict=True)))
        return None if asked is None else [asked]

    def _key(self, trial: Finished) -> tuple[float, ...]:
        return tuple(self._space.vector(trial.params))

    def _values(self, finished: Sequence[Finished]) -> list[list[float]]:
        """What the sampler is told of each trial."""
        return [list(trial.scores) for trial in finished] if self._vector else [[v] for v in self._value(finished)]

    def _replay(self, finished: Sequence[Finished]) -> None:
        """Tells the private study what it does not know yet, in order."""
        values, corners = self._values(finished), self._space.corners()
        known = dict(zip(map(self._key, finished[: self._told]), values, strict=False))
        for trial, value in zip(finished[self._told :], values[self._told :], strict=True):
            asked = None if trial.params in corners else self._ask(known)
            if asked == trial.params and self._asked is not None:
                self._shadow.tell(self._asked[0], value)
                self._asked = None
            else:
                self._add(trial, value)
            known[self._key(trial)] = value
        self._told = len(finished)

    def _ask(self, known: Mapping[tuple[float, ...], list[float]]) -> Params | None:
        """The sampler's pending proposal, or its next one that is a new direction; of known ones it is told the value."""
        for _ in range(_MOST_ASKS):
            if self._asked is None:
                trial = self._shadow.ask(dict[str, Any](self._space.distributions))
                candidate = self._space.canonical(trial.params)
                if candidate is None:
                    self._shadow.tell(trial, state=TrialState.FAIL)
                    continue
                self._asked = (trial, candidate)
            trial, candidate = self._asked
            value = known.get(tuple(self._space.vector(candidate)))
            if value is None:
                return candidate
            self._shadow.tell(trial, value)
            self._asked = None
        return None

    def _add(self, trial: Finished, values: list[float]) -> None:
        self._shadow.add_trial(
            create_trial(params=dict(trial.params), distributions=dict[str, Any](self._space.distributions), values=values)
        )
