"""What all searches make of their trials: a value by the configured scalarisation, a table, what they cost."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from emorl.config.experiment import Experiment
from emorl.evaluation.pareto import front
from emorl.objectives.scalarize import importance_of, scalarize
from emorl.runs.run import Cost
from emorl.search.study import Finished, Params, Valuation


def valuation(experiment: Experiment, alone: Sequence[Params]) -> Valuation:
    """The configured scalarisation of finished trials. `alone` are the candidates that are one policy each: until they are
    evaluated, Chebyshev is the mean."""
    importance = importance_of(list(experiment.objectives), experiment.value.preferences)

    def value(finished: Sequence[Finished]) -> Sequence[float]:
        if not finished:
            return []
        scores = np.array([trial.scores for trial in finished])
        references = np.array([trial.scores for trial in finished if trial.params in alone])
        known = experiment.value.scalarize != "chebyshev" or len(references) == len(alone)
        return scalarize(scores, experiment.value.scalarize if known else "mean", importance, references).tolist()

    return value


def trials_table(finished: Sequence[Finished], objectives: Sequence[str], values: Sequence[float]) -> pd.DataFrame:
    """One row per trial: trial, its parameters, score_<objective>, error_<objective>, prompts, seconds, value, front (not
    dominated among those that saw all prompts)."""
    rows = [
        {
            "trial": trial.number,
            **trial.params,
            **{f"score_{name}": score for name, score in zip(objectives, trial.scores, strict=True)},
            **{f"error_{name}": error for name, error in zip(objectives, trial.notes["errors"], strict=True)},
            "prompts": trial.notes["cost"]["prompts"],
            "seconds": trial.notes["cost"]["seconds"],
        }
        for trial in finished
    ]
    table = pd.DataFrame(rows).assign(value=list(values), front=False)
    whole = table["prompts"] == table["prompts"].max()
    table.loc[whole, "front"] = front(table.loc[whole, [f"score_{name}" for name in objectives]].to_numpy())
    return table


def total_cost(finished: Sequence[Finished]) -> Cost:
    return sum((Cost(**trial.notes["cost"]) for trial in finished), Cost())
