"""What answers are worth: objectives as one value for each answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from emorl.config import UserError
from emorl.dynamic.rollout import Answer
from emorl.objectives.loading import Objective
from emorl.objectives.scalarize import Value
from emorl.policies.conversation import as_completion


@dataclass(frozen=True)
class AnswerValue:
    """Scores answers, and values their scores. `chebyshev` has no value of a single answer."""

    objectives: Sequence[Objective]
    of_scores: Value

    def scores(self, data: Dataset, answers: Sequence[Answer]) -> NDArray[np.float64]:
        """(N, O) of N answers, whose `row` counts rows of the data; each in the light of the prompt it answers.

        Raises:
            UserError: an objective that cannot score an answer.
        """
        rows = data.select([answer.row for answer in answers])
        columns: dict[str, Any] = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
        prompts = [answer.prompt for answer in answers]
        texts = [as_completion(answer.prompt, answer.text) for answer in answers]
        by_objective = []
        for objective in self.objectives:
            scores = objective(prompts, texts, **columns)
            if None in scores:
                text = answers[scores.index(None)].text
                raise UserError(f"objective {objective.name!r} has no score for {text!r:.60}; a reward is needed")
            by_objective.append(scores)
        return np.array(by_objective, dtype=float).T

    def values(self, data: Dataset, answers: Sequence[Answer], rows: Sequence[int]) -> NDArray[np.float64]:
        """(N,) of N answers to some `rows` of the data, which their own `row` counts."""
        return self.of_scores(self.scores(data, [replace(answer, row=rows[answer.row]) for answer in answers]))


def mean_by_row(values: NDArray[np.float64], answers: Sequence[Answer], count: int) -> NDArray[np.float64]:
    """Mean (R,) of the values (N,) of answers to each of `count` rows, over its turns."""
    rows = np.array([answer.row for answer in answers])
    return np.bincount(rows, values, minlength=count) / np.bincount(rows, minlength=count)
