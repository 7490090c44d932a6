"""Accuracy by subject of a multiple-choice set such as MMLU or C-Eval, and both of its means over subjects.

RL-Fusion (Wang et al. 2025, Appl. Sci. 15(4), 2186) calls its last row "Weighted_accuracy"; recomputed from its seven subjects
of MMLU it is their plain mean (81.0, where weighting by size gives 82.7). Here each mean has its own name, and both have
standard errors, which for those seven subjects exceed one point.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from emorl.config import nearest


@dataclass(frozen=True)
class SubjectAccuracy:
    """`subjects` has the columns subject, accuracy, error and items; the means are over subjects, plain or weighted by their
    items (the accuracy over all items).

    Errors are standard errors over questions of the given subjects: NaN where a subject has one item, 0 for one that is all
    right or all wrong.
    """

    subjects: pd.DataFrame
    plain_mean: float
    plain_error: float
    weighted_mean: float
    weighted_error: float


def accuracy_by_subject(table: pd.DataFrame, score: str = "score") -> SubjectAccuracy:
    """Accuracy of a table with one row per question: the columns `subject` and `score`, which is 1 if right, 0 if wrong.

    Raises:
        ValueError: no rows, a missing column, a row without a subject, a score other than 0 or 1.
    """
    for column in ("subject", score):
        if column not in table:
            raise ValueError(f"the table has no column {column!r}; {nearest(column, map(str, table))}")
    if table.empty or table["subject"].isna().any():
        raise ValueError("expected at least one row, and a subject in each")
    wrong = ~table[score].isin([0, 1])
    if wrong.any():
        raise ValueError(f"column {score!r}: expected 0 or 1, got {table[score][wrong].iloc[0]}")
    own = table.astype({score: float}).groupby("subject")[score]
    subjects = pd.DataFrame({"accuracy": own.mean(), "error": own.sem(), "items": own.size()}).reset_index()
    plain = np.full(len(subjects), 1 / len(subjects))
    weighted = subjects["items"].to_numpy() / len(table)
    return SubjectAccuracy(subjects, *_mean(subjects, plain), *_mean(subjects, weighted))


def _mean(subjects: pd.DataFrame, weights: np.ndarray) -> tuple[float, float]:
    """Weighted mean over subjects and its standard error."""
    variance = weights**2 @ subjects["error"].to_numpy() ** 2
    return float(weights @ subjects["accuracy"].to_numpy()), math.sqrt(variance)
