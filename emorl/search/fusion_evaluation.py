"""Candidates that are fusions become scores: fused in memory, into the loaded base, and only where they differ from the last
one; every one answers the same validation prompts, or those of a moving set."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from emorl.config import UserError
from emorl.data import Splits
from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.scoring import cost_of, generate, mean_and_error, score
from emorl.fusion.loaded import LoadedFusion
from emorl.fusion.operators import Fusion
from emorl.objectives.loading import Objective
from emorl.search.moving_set import MovingSet
from emorl.search.spaces.fusion_space import FusionSpace
from emorl.search.spaces.layer_space import LayerSpace
from emorl.search.study import Finished, Params, Scored

FusionOf = Callable[[str], Fusion]
"""A module's name -> what is done to it."""


class FusionEvaluator:
    """Some candidates -> their scores on the validation prompts, or on those of `moving_set`; notes hold the standard errors
    and the cost."""

    def __init__(
        self,
        loaded: LoadedFusion,
        tokenizer: PreTrainedTokenizerBase,
        space: FusionSpace | LayerSpace,
        splits: Splits,
        objectives: Sequence[Objective],
        *,
        generation: Mapping[str, Any],
        samples: int,
        seed: int,
        moving_set: MovingSet | None,
        memo: ScoreMemo,
    ) -> None:
        self._loaded, self._tokenizer, self._space, self._objectives = loaded, tokenizer, space, objectives
        self._data, self._test, self._memo = splits.validation, splits.test, memo
        self._generation, self._samples, self._seed = generation, samples, seed
        self.moving_set = moving_set

    def remember(self, finished: Sequence[Finished]) -> None:
        """Takes in the trials of earlier runs."""
        if self.moving_set is not None:
            self.moving_set.remember(finished)

    def __call__(self, candidates: Sequence[Params]) -> list[Scored]:
        return [self._scored(candidate) for candidate in candidates]

    def _scored(self, candidate: Params) -> Scored:
        start, names = time.perf_counter(), self._names
        rows = list(range(len(self._data))) if self.moving_set is None else self.moving_set.items
        table = self._answered(self._space.fusion_of(candidate), rows)
        by_item = table.groupby("prompt_index")[names].mean().to_numpy()  # (n, O)
        for name, known in zip(names, (~np.isnan(by_item)).any(0), strict=True):
            if not known:
                raise UserError(f"objective {name!r} returned None for every prompt; a search needs scores")
        notes: dict[str, Any] = {"cost": asdict(cost_of(table, len(names), time.perf_counter() - start))}
        if self.moving_set is None:
            means, errors = mean_and_error(table, names)
        else:
            found, noted = self.moving_set.record(by_item)
            means, errors, notes = found.score.tolist(), found.error.tolist(), {**notes, **noted}
        return Scored(tuple(means), {"errors": errors, **notes})

    def holdout_scores(self, fusion_of: FusionOf) -> tuple[dict[str, float], dict[str, float]]:
        """Objective -> score on the prompts that no candidate answered, and its standard error."""
        assert self.moving_set is not None
        by_item = self._answered(fusion_of, self.moving_set.holdout).groupby("prompt_index")[self._names].mean().to_numpy()
        found = self.moving_set.on_holdout(by_item)
        scores, errors = (dict(zip(self._names, values.tolist(), strict=True)) for values in (found.score, found.error))
        return scores, errors

    def test_scores(self, fusion_of: FusionOf) -> dict[str, float]:
        """Objective -> score on the test prompts, which neither training nor search saw."""
        means, _ = mean_and_error(self._answered(fusion_of, range(len(self._test)), self._test), self._names)
        return dict(zip(self._names, means, strict=True))

    @property
    def _names(self) -> list[str]:
        return [objective.name for objective in self._objectives]

    def _answered(self, fusion_of: FusionOf, rows: Sequence[int], test: Dataset | None = None) -> pd.DataFrame:
        """Scored completions of some rows of the validation data, or of the test data."""
        data = self._data if test is None else test
        self._loaded.apply(lambda name: fusion_of(name.removesuffix(".weight")))
        prompts = list(data["prompt"])
        completions = generate(
            self._loaded.model,
            self._tokenizer,
            [prompts[row] for row in rows],
            self._generation,
            samples=self._samples,
            seed=self._seed,
        )
        completions["prompt_index"] = completions["prompt_index"].map(dict(enumerate(rows)))
        return score(completions, data, self._objectives, self._memo if test is None else None)
