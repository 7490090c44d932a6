"""Pairs of answers, chosen and rejected, out of answers that were scored or graded.

Scores of one prompt's answers are compared, never those of two prompts. A pair of near-duplicates teaches noise, and a pair of
a long and a short answer teaches length: the former are never made, the latter can be left out.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from rapidfuzz.distance import Levenshtein

from emorl.config.train import SamplesConfig
from emorl.evaluation.hacking import NEAR_DUPLICATE
from emorl.evaluation.text_metrics import word_tokens
from emorl.training.advantages import advantages_of
from emorl.training.modes import PolicyPlan

Group = TypeVar("Group", int, str)


def ordered_pairs(
    values: Sequence[float],
    texts: Sequence[str],
    *,
    choose: Literal["best_worst", "all"] = "best_worst",
    margin: float = 0.0,
    length_ratio: float | None = None,
) -> list[tuple[int, int]]:
    """(chosen, rejected) positions among the answers to one prompt, those furthest apart first; one at most with `best_worst`.

    Args:
        values: what each answer is worth; NaN where nothing is known, and such an answer is in no pair.
        margin: how much more the chosen one must be worth; equal ones are never a pair.
        length_ratio: most words of the longer one / words of the shorter one.
    """
    pairs = list(_apart(values, margin))
    pairs.sort(key=lambda pair: values[pair[1]] - values[pair[0]])  # stable: earlier answers first among equals
    words = [word_tokens(text.lower()) for text in texts]
    kept = ((a, b) for a, b in pairs if _differ(words[a], words[b], length_ratio))
    if choose == "all":
        return list(kept)
    first = next(kept, None)
    return [] if first is None else [first]


def _apart(values: Sequence[float], margin: float) -> Iterator[tuple[int, int]]:
    for one, other in combinations(range(len(values)), 2):
        difference = values[one] - values[other]
        if abs(difference) > margin:  # false of NaN
            yield (one, other) if difference > 0 else (other, one)


def _differ(one: Sequence[str], other: Sequence[str], length_ratio: float | None) -> bool:
    """Whether two answers, as words, are no near-duplicates, and alike in length where that is asked for."""
    if length_ratio is not None and max(len(one), len(other)) > length_ratio * min(len(one), len(other)):
        return False
    return Levenshtein.normalized_similarity(one, other) < NEAR_DUPLICATE


def values_of(rewards: np.ndarray, plan: PolicyPlan, samples: int) -> np.ndarray:
    """What each answer is worth to a policy, (N,): differences between answers to one prompt are those of the plan's weighted
    reward (`gdpo`: of rewards normalised among a prompt's answers). NaN where one of its objectives gives no score.

    Args:
        rewards: (N, O), the answers to a prompt together.
        samples: G, per prompt.
    """
    worth = advantages_of(
        torch.from_numpy(rewards),
        torch.tensor(plan.reward_weights, dtype=torch.float64),
        samples,
        baseline="group_mean",
        aggregation=plan.aggregation,
    ).numpy()
    return np.where(np.isnan(rewards).any(1), np.nan, worth)


def sampled_pairs(samples: pd.DataFrame, values: np.ndarray, config: SamplesConfig, seed: int) -> pd.DataFrame:
    """Pairs of sampled answers, with the columns prompt_index, chosen, rejected (texts), chosen_ids, rejected_ids (their tokens
    as they were sampled), chosen_value, rejected_value and held_out.

    Args:
        samples: from `sample_answers`, in its order.
        values: (N,), from `values_of`.
        seed: draws the prompts whose pairs are held out, the same for all objectives.
    """
    rows = []
    for prompt, positions in samples.groupby("prompt_index").indices.items():
        texts = samples["completion"].iloc[positions].tolist()
        pairs = ordered_pairs(
            values[positions].tolist(), texts, choose=config.choose, margin=config.margin, length_ratio=config.length_ratio
        )
        for chosen, rejected in pairs:
            sides = {"chosen": positions[chosen], "rejected": positions[rejected]}
            rows.append(
                {
                    "prompt_index": prompt,
                    **{side: samples["completion"].iloc[at] for side, at in sides.items()},
                    **{f"{side}_ids": samples["ids"].iloc[at] for side, at in sides.items()},
                    **{f"{side}_value": values[at] for side, at in sides.items()},
                }
            )
    columns = [f"{side}{of}" for of in ("", "_ids", "_value") for side in ("chosen", "rejected")]
    table = pd.DataFrame(rows, columns=["prompt_index", *columns])
    held_out = held_out_of(sorted(samples["prompt_index"].unique()), config.validation, seed)
    return table.assign(held_out=table["prompt_index"].isin(held_out))


def held_out_of(groups: Sequence[Group], share: float, seed: int) -> set[Group]:
    """The groups, of pairs of one prompt, that are not trained on: at least one, and never all."""
    count = min(len(groups) - 1, max(1, round(share * len(groups))))
    return {groups[position] for position in np.random.default_rng(seed).permutation(len(groups))[:count]}


def at_most(pairs: Dataset, count: int, seed: int) -> Dataset:
    """So many pairs, drawn by the seed: a training that never comes to the others need not read them."""
    return pairs if len(pairs) <= count else pairs.shuffle(seed=seed).select(range(count))
