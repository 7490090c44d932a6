"""What every search does around the loop and with its trials: progress, one value of each, a table, what they cost."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import optuna
import pandas as pd

from emorl.evaluation.pareto import front
from emorl.objectives.scalarize import Value
from emorl.runs.progress import Progress
from emorl.runs.run import Cost
from emorl.search.study import Budget, Finished, Params, Proposer, Scored, Space, Valuation, finished_trials, search


class Evaluator(Protocol):
    """Some candidates -> their scores, in the same order."""

    def remember(self, finished: Sequence[Finished]) -> None:
        """Takes in the trials of earlier runs, in order."""
        ...

    def __call__(self, candidates: Sequence[Params]) -> list[Scored]: ...


def search_on(
    study: optuna.Study,
    proposer: Proposer,
    evaluator: Evaluator,
    space: Space,
    value: Valuation,
    *,
    title: str,
    expected: int,
    progress: Progress,
    budget: Budget,
    batch: int = 1,
) -> list[Finished]:
    """All finished trials of a search that goes on behind what the study holds, with a bar and the best value so far.

    Args:
        title: whose search it is, such as `fuse`.
        expected: about how many trials there will be.
    """
    known = finished_trials(study)
    if known:
        progress.say(f"{title}: continues behind {len(known)} candidates")
    evaluator.remember(known)
    with progress.bar(f"search {title}", expected, done=len(known)) as bar:
        seen = len(known)

        def on_finished(finished: Sequence[Finished]) -> None:
            nonlocal seen
            bar.advance(len(finished) - seen, _best_so_far(finished, value))
            seen = len(finished)

        return search(study, proposer, evaluator, space.distributions, batch=batch, budget=budget, on_finished=on_finished)


def _best_so_far(finished: Sequence[Finished], value: Valuation) -> str:
    if not finished:
        return ""
    best, trial = best_trial(finished, value(finished))
    numbers = (f"{name} {number:.2f}" for name, number in trial.params.items() if isinstance(number, float))
    return f"best {best:.3f} at {' '.join(numbers)}"


def best_trial(finished: Sequence[Finished], values: Sequence[float]) -> tuple[float, Finished]:
    """The highest value and its trial, the first of equals."""
    return max(zip(values, finished, strict=True), key=lambda pair: pair[0])


def valuation(value: Value, alone: Sequence[Params]) -> Valuation:
    """The value of finished trials. `alone` are the candidates that are one policy each: until they are evaluated, Chebyshev is
    the mean."""

    def values(finished: Sequence[Finished]) -> Sequence[float]:
        if not finished:
            return []
        scores = np.array([trial.scores for trial in finished])
        references = np.array([trial.scores for trial in finished if trial.params in alone])
        if value.method == "chebyshev" and len(references) < len(alone):
            return scores.mean(1).tolist()
        return value(scores, references).tolist()

    return values


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
