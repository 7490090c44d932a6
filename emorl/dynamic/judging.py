"""What answers are worth: the experiment's objectives, as one value for each answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from emorl.config import UserError
from emorl.config.experiment import Experiment
from emorl.dynamic.rollout import Answer
from emorl.objectives.loading import Objective, load_objective
from emorl.objectives.scalarize import importance_of, scalarize
from emorl.policies.conversation import as_completion


@dataclass(frozen=True)
class Judge:
    """Scores answers to the rows of a data set.

    Raises:
        UserError: `value.scalarize: chebyshev`, which has no value of a single answer.
    """

    objectives: Sequence[Objective]
    method: str
    importance: NDArray[np.float64]

    @classmethod
    def load(cls, experiment: Experiment) -> "Judge":
        """With the objectives of an experiment, and its `value.scalarize` and preferences."""
        if experiment.value.scalarize == "chebyshev":
            raise UserError("value.scalarize: chebyshev is no reward of a single answer; use mean, weighted or minimum")
        objectives = [load_objective(name, config) for name, config in experiment.objectives.items()]
        return cls(
            objectives,
            experiment.value.scalarize,
            importance_of(list(experiment.objectives), experiment.value.preferences),
        )

    def scores(self, data: Dataset, answers: Sequence[Answer]) -> NDArray[np.float64]:
        """(N, O) of N answers, whose `row` counts rows of the data; each in the light of the prompt it answers.

        Raises:
            UserError: an objective that cannot score an answer.
        """
        rows = data.select([answer.row for answer in answers])
        columns: dict[str, Any] = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
        prompts = [answer.prompt for answer in answers]
        texts = [as_completion(answer.prompt, answer.text) for answer in answers]
        found = []
        for objective in self.objectives:
            scores = objective(prompts, texts, **columns)
            if None in scores:
                at = scores.index(None)
                raise UserError(f"objective {objective.name!r} has no score for {answers[at].text!r:.60}; a reward is needed")
            found.append(scores)
        return np.array(found, dtype=float).T

    def values(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) of scores (N, O)."""
        return scalarize(scores, self.method, self.importance, scores)
