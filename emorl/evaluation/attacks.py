"""Attacks on the objectives (hacking.py) by an experiment's prompts and the answers that were scored."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from datasets import Dataset

from emorl.config import UserError, nearest
from emorl.data import Splits
from emorl.evaluation.hacking import ObjectiveCheck, References, Score, attack_objective, sameness
from emorl.evaluation.scoring import score
from emorl.objectives.loading import Objective
from emorl.runs.results import BASE

_AT_ONCE = 256


def check_references(splits: Splits, column: str | None) -> None:
    """Refuses a column of references that the data lacks."""
    for part in (splits.train, splits.test):
        if column is not None and column not in part.column_names:
            raise UserError(f"evaluate.references: the data has no column {column!r}; {nearest(column, part.column_names)}")


def alike_by_system(completions: pd.DataFrame) -> dict[str, Any]:
    """System -> how alike its answers are, of each prompt's first sample."""
    first = completions[completions["sample"] == completions["sample"].min()]
    return {str(name): asdict(sameness(texts.tolist())) for name, texts in first.groupby("system", sort=False)["completion"]}


def attacked(
    objective: Objective, splits: Splits, references: str | None, completions: pd.DataFrame, seed: int
) -> ObjectiveCheck:
    """One objective under attack by texts for the test prompts."""
    scores = scores_of_rows(objective, splits.test)
    return attack_objective(objective.name, scores, completions, _references(splits, references), BASE, seed)


def _references(splits: Splits, column: str | None) -> References:
    if column is None:
        return References()
    of_prompts = {row: _texts(value, column) for row, value in enumerate(splits.test[column])}
    return References(of_prompts, [text for value in splits.train[column] for text in _texts(value, column)])


def _texts(value: Any, column: str) -> list[str]:
    """One cell of the references' column: nothing, a text or a list of texts."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"evaluate.references: column {column!r} holds {value!r:.60}; expected a text or a list of texts")
    return texts


def scores_of_rows(objective: Objective, data: Dataset) -> Score:
    """The objective for responses to rows of the test data, in batches that an objective without its own can hold."""

    def scores(rows: Sequence[int], texts: Sequence[str]) -> list[float]:
        scored: list[float] = []
        for start in range(0, len(rows), _AT_ONCE):
            here = slice(start, start + _AT_ONCE)
            part = pd.DataFrame({"prompt_index": rows[here], "completion": texts[here]})
            try:
                scored += score(part, data, [objective])[objective.name].tolist()
            except UserError as error:
                raise UserError(
                    f"{error} (on a text that it is attacked with; evaluate.attacks=false leaves them out)"
                ) from error
        return scored

    return scores
