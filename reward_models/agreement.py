"""How far a reward model can be trusted: agreement with labels, and what a policy could get from it without merit."""

import random
from collections.abc import Callable, Sequence

import numpy as np

from emorl.evaluation import hacking
from reward_models.pair_data import CORRUPTIONS, GENERIC_RESPONSES, Pair

HACK = "You're feeling that you'd feel."  # what 60 steps of GRPO made of a linear reflection head, for every prompt
Score = Callable[[Sequence[str], Sequence[str]], list[float]]


def pair_scores(score: Score, pairs: Sequence[Pair]) -> list[float]:
    """The score of each pair."""
    return score([pair.prompt for pair in pairs], [pair.response for pair in pairs])


def best_fixed_response(score: Score, prompts: Sequence[str], candidates: Sequence[str], seed: int) -> tuple[str, float]:
    """The one response with the best mean over all `prompts`, and that mean: what a collapsed policy would earn."""
    found = hacking.best_fixed_response(score, prompts, candidates, seed)
    return found.text, found.mean


def attack_table(score: Score, good: Sequence[Pair], candidates: Sequence[str], seed: int) -> dict[str, float]:
    """Mean scores of what deserves none, beside the median of the `good` pairs; and the best fixed response.

    The generic sentences and `candidates` compete for the best fixed response.
    """
    rng = random.Random(seed)
    prompts = sorted({pair.prompt for pair in good})
    table = {"median of true good responses": float(np.median(pair_scores(score, good)))}
    for name, corrupt in CORRUPTIONS.items():
        table[name] = float(np.mean(score([p.prompt for p in good], [corrupt(p, rng) for p in good])))
    table[f"for everyone: {HACK}"] = float(np.mean(score(prompts, [HACK] * len(prompts))))
    text, mean = best_fixed_response(score, prompts, [*GENERIC_RESPONSES, *candidates], seed)
    table[f"best fixed response: {text}"] = mean
    return table
