"""The evaluation set of a fusion search, moved by its results (RL-Fusion's feedback), with scores that stay comparable.

What each candidate scored on each prompt is in its trial's notes: sets and gains are functions of the finished trials.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from emorl.config import UserError, nearest
from emorl.config.fuse import StrataConfig
from emorl.evaluation.strata import (
    Allocation,
    Estimate,
    EvaluationSet,
    estimate,
    first_set,
    holdout_estimate,
    next_set,
    paired_difference,
    split,
    stratify,
)
from emorl.search.proposers.q_learning import Gain
from emorl.search.study import Finished


class MovingSet:
    """Which prompts the next candidate answers.

    Raises:
        UserError: no such column, strata that are too small.
    """

    def __init__(self, data: Dataset, config: StrataConfig, seed: int) -> None:
        if config.column not in data.column_names:
            raise UserError(
                f"fuse.strata.column {config.column!r} is no column of the data; {nearest(config.column, data.column_names)}"
            )
        try:
            self.pools = split(
                stratify([str(label) for label in data[config.column]], config.weights),
                anchor=config.anchor,
                adaptive=config.adaptive,
                seed=seed,
            )
            adaptive = sum(map(len, self.pools.adaptive))
            self._allocation = Allocation(config.total or max(1, adaptive // 2), config.floor, config.by, config.every)
            self.chosen = first_set(self.pools, self._allocation)
        except ValueError as error:
            raise UserError(f"fuse.strata: {error}") from None
        self._count = len(data)
        self._recorded: list[NDArray[np.float64]] = []

    @property
    def items(self) -> list[int]:
        """Rows of the data that the next candidate answers."""
        return self.pools.used(self.chosen).tolist()

    @property
    def holdout(self) -> list[int]:
        """Rows that no candidate answers while the search runs."""
        return np.sort(np.concatenate(self.pools.holdout)).tolist()

    def remember(self, finished: Sequence[Finished]) -> None:
        """Takes in the trials of earlier runs, in order."""
        for trial in finished:
            self._record(self._scattered(self.pools.used(_set_of(trial)), trial.notes["by_item"]))

    def record(self, by_item: NDArray[np.float64]) -> tuple[Estimate, dict[str, Any]]:
        """A candidate's scores (n, O) on `items` -> its estimate, and what its trial must note. The set may move."""
        scores, chosen = self._scattered(np.array(self.items), by_item), self.chosen
        found = estimate(scores, self.pools, chosen)
        self._record(scores)
        return found, {"set": asdict(chosen), "by_item": np.round(by_item, 6).tolist()}

    def on_holdout(self, by_item: NDArray[np.float64]) -> Estimate:
        """Of scores (n, O) on the prompts that the search has not seen."""
        return holdout_estimate(self._scattered(np.array(self.holdout), by_item), self.pools)

    def gain(self, importance: NDArray[np.float64]) -> Gain:
        """By how much a trial is better than another one on the prompts that both answered; importance (O,)."""

        def gain(here: Finished, there: Finished) -> float:
            better, worse = (self._scattered(self.pools.used(_set_of(one)), one.notes["by_item"]) for one in (there, here))
            return float(paired_difference(better, worse, self.pools, _set_of(there), _set_of(here)).score @ importance)

        return gain

    def _record(self, scores: NDArray[np.float64]) -> None:
        self._recorded.append(scores)
        self.chosen = next_set(self.chosen, np.stack(self._recorded), self.pools, self._allocation)

    def _scattered(self, items: NDArray[np.int64], by_item: Any) -> NDArray[np.float64]:
        """Scores of some prompts among all of them (N, O); NaN elsewhere."""
        known = np.array(by_item, dtype=float)
        scores = np.full((self._count, known.shape[1]), np.nan)
        scores[items] = known
        return scores


def _set_of(trial: Finished) -> EvaluationSet:
    noted = trial.notes["set"]
    return EvaluationSet(noted["version"], tuple(noted["counts"]), tuple(noted["first"]))
