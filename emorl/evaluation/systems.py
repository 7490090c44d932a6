"""Compared systems: each one's table of scored completions, and what they add up to."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from emorl.config.experiment import EvaluateConfig
from emorl.evaluation.pareto import front, hypervolume, reference_point
from emorl.evaluation.scoring import Evaluation, cost_of, evaluate, summarize
from emorl.objectives.loading import Objective
from emorl.runs.results import Kind, System

OFFERS = {
    "base": [Kind.BASE],
    "policies alone": [Kind.POLICY],
    "parameter average": [Kind.PARAMETER_AVERAGE],
    "ensemble": [Kind.POLICY, Kind.ENSEMBLE, Kind.FRONT],  # one-hot weights are the policies alone
    "distilled adapter": [Kind.DISTILLED],
}
"""what offers trade-offs -> the systems whose hypervolume that is"""


def table_file(name: str, weights: Mapping[str, float], samples: int) -> str:
    """Name of a system's table, after all that its completions depend on and no run's settings say: a search may go on and find
    other weights."""
    digest = hashlib.sha256(json.dumps([dict(weights), samples]).encode()).hexdigest()[:8]
    return f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest}.parquet"


def evaluate_weights(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    objectives: Sequence[Objective],
    generation: Mapping[str, Any],
    config: EvaluateConfig,
    weights: Mapping[str, float],
    seed: int,
) -> Evaluation:
    """As `evaluate`, with weights by policy name; none for a model that mixes nothing."""
    vector = torch.tensor([weights.get(name, 0.0) for name in model.policy_names]) if weights else None  # (K,)
    return evaluate(
        model,
        tokenizer,
        data,
        objectives,
        generation,
        samples=config.samples,
        batch=config.batch,
        seed=seed,
        per_prompt=None if vector is None else {"weights": vector.expand(len(data), -1)},
    )


def summary_table(
    systems: Sequence[System], tables: Mapping[str, pd.DataFrame], objectives: Sequence[str], collapse_share: float
) -> pd.DataFrame:
    """One row per system: system, kind, weight_<policy>, what `summarize` gives, completions, tokens; `all_above_median`, the
    share of prompts whose answer is better in every objective than half of all systems' answers (a mixture of answers that are
    each good at one thing has few); `collapsed` where distinct completions fell under `collapse_share` of the base's."""
    names = list(objectives)
    medians = pd.concat([table[names] for table in tables.values()]).median()
    rows = [
        {
            "system": system.name,
            "kind": str(system.kind),
            **{f"weight_{name}": weight for name, weight in system.weights.items()},
            **summarize(tables[system.name], objectives),
            "all_above_median": _share_above(tables[system.name], medians),
            "completions": len(tables[system.name]),
            "tokens": cost_of(tables[system.name], 0, 0.0).tokens,
        }
        for system in systems
    ]
    summary = pd.DataFrame(rows)
    base_share = summary.loc[summary["kind"] == Kind.BASE, "distinct_share"].iloc[0]
    return summary.assign(
        collapsed=summary["distinct_share"] < collapse_share * base_share, front=front(summary[list(objectives)])
    )


def _share_above(table: pd.DataFrame, medians: pd.Series) -> float:
    """The share of prompts whose answers, on average, are above the medians of all objectives."""
    per_prompt = table.groupby("prompt_index")[list(medians.index)].mean()
    return float((per_prompt > medians).all(axis=1).mean())


def hypervolumes(summary: pd.DataFrame, objectives: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Hypervolume (direction: maximise) of what each of `OFFERS` offers, and its reference point: that of all systems."""
    names = list(objectives)
    reference = reference_point(summary[names])
    offered = {label: summary.loc[summary["kind"].isin(kinds), names] for label, kinds in OFFERS.items()}
    volumes = {label: hypervolume(scores, reference) for label, scores in offered.items() if len(scores)}
    return volumes, dict(zip(names, reference, strict=True))


def read_tables(folder: Path, systems: Sequence[System], samples: int) -> dict[str, pd.DataFrame]:
    """Name -> table of each system's scored completions."""
    return {system.name: pd.read_parquet(folder / file_of(system, samples)) for system in systems}


def file_of(system: System, samples: int) -> str:
    """Name of a compared system's table."""
    return table_file(f"{system.name} {system.adapter}".rstrip(), system.weights, samples)
