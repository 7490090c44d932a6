"""How far a reward model can be trusted: agreement with labels, and what a policy could get from it without merit."""

import random
from collections.abc import Callable, Sequence

import numpy as np

from reward_models.pair_data import CORRUPTIONS, GENERIC_RESPONSES, Pair

HACK = "You're feeling that you'd feel."  # what 60 steps of GRPO made of a linear reflection head, for every prompt
Score = Callable[[Sequence[str], Sequence[str]], list[float]]


def pair_scores(score: Score, pairs: Sequence[Pair]) -> list[float]:
    """The score of each pair."""
    return score([pair.prompt for pair in pairs], [pair.response for pair in pairs])


def best_fixed_response(score: Score, prompts: Sequence[str], candidates: Sequence[str], seed: int) -> tuple[str, float]:
    """The one response with the best mean over all `prompts`, and that mean: what a collapsed policy would earn.

    Every candidate meets 4 prompts, the best 50 then meet all.
    """
    texts = sorted(set(candidates))
    few = random.Random(seed).sample(list(prompts), min(4, len(prompts)))

    def means(responses: Sequence[str], asked: Sequence[str]) -> np.ndarray:
        grid = score([p for _ in responses for p in asked], [r for r in responses for _ in asked])
        return np.array(grid).reshape(len(responses), len(asked)).mean(axis=1)

    finalists = [texts[i] for i in np.argsort(-means(texts, few))[:50]]
    final = means(finalists, prompts)
    return finalists[int(final.argmax())], float(final.max())


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
