"""What a trained method offers on the test prompts: its points, their scored completions on disk, and what they cost."""

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel

from emorl.aggregation.ensemble import MIXTURES
from emorl.config.experiment import BaseConfig, ConvergenceConfig, Experiment
from emorl.objectives.loading import Objective
from emorl.policies.base import load_base, read_policies
from emorl.policies.prompts import encode
from emorl.reporting.comparison import evaluate_weights, spread
from emorl.reporting.methods import COMBINED
from emorl.runs.layout import POLICY_DIRECTORY, policy_directories
from emorl.runs.progress import Progress
from emorl.runs.run import Cost, read_json, written_whole
from emorl.search.weight_search import read_result
from emorl.training.callbacks import has_converged

EVALUATION_SEED = 10_000
"""added to the seed where decoding samples: training and search have drawn none of these"""
BASE_METHOD, ALONE_METHOD = "base", "policies alone"
_TIMED_TOKENS, _TIMED_ROUNDS = 24, 3


@dataclass(frozen=True)
class Point:
    """One trade-off: weights of an experiment's policies (none: a policy as it is), and the table of its completions."""

    name: str
    weights: Mapping[str, float]
    table: Path


def points_of(experiment: Experiment, method: str) -> list[Point]:
    """The points that a method chose on the validation prompts, its best one first."""
    names = list(experiment.objectives)
    if method == BASE_METHOD:
        chosen: dict[str, Mapping[str, float]] = {BASE_METHOD: {}}
    elif method == ALONE_METHOD:
        chosen = {name: {other: float(other == name) for other in names} for name in _best_alone_first(experiment)}
    elif method in COMBINED:
        found = read_result(experiment)
        front = spread(
            [[point["scores"][name] for name in names] for point in found["front"]], experiment.evaluate.front_points
        )
        others = [found["front"][index]["weights"] for index in front]
        chosen = {"best found": found["best"]["weights"]}
        chosen |= {f"front {number}": weights for number, weights in enumerate(others, 1) if weights != chosen["best found"]}
    else:
        chosen = {method: {}}
    return [Point(name, weights, _table_of(experiment, name, weights)) for name, weights in chosen.items()]


def _table_of(experiment: Experiment, name: str, weights: Mapping[str, float]) -> Path:
    """Named after all that its completions depend on and no run in this output says: a search may go on and find others."""
    digest = hashlib.sha256(json.dumps([dict(weights), experiment.evaluate.samples]).encode()).hexdigest()[:8]
    return experiment.output / "test" / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest}.parquet"


def _best_alone_first(experiment: Experiment) -> list[str]:
    """Policies by their value in the ensemble's search, which evaluated each alone."""
    trials = pd.read_csv(experiment.output / "search" / "trials.csv")
    value = {
        name: float(trials.loc[np.isclose(trials[f"weight_{name}"], 1.0), "value"].max()) for name in experiment.objectives
    }
    return sorted(value, key=lambda name: -value[name])


def score_points(
    experiment: Experiment, points: Sequence[Point], data: Dataset, objectives: Sequence[Objective], progress: Progress
) -> None:
    """Writes the table of every point that has none yet."""
    missing = [point for point in points if not point.table.exists()]
    if not missing:
        return
    model, tokenizer = load_policy(experiment, bare=all(point.name == BASE_METHOD for point in missing))
    with progress.bar(f"test {missing[0].table.parents[1].name}", len(missing)) as bar:
        for point in missing:
            seed = EVALUATION_SEED + experiment.seed
            table = evaluate_weights(experiment, model, tokenizer, data, objectives, point.weights, seed=seed).table
            with written_whole(point.table) as temporary:
                table.to_parquet(temporary, index=False)
            bar.advance(1, point.name)


def load_policy(experiment: Experiment, bare: bool = False) -> tuple[Any, Any]:
    """What answers for a trained experiment (its mixture, its one policy, or the bare base), and the tokenizer."""
    base = load_base(experiment.base)
    if bare:
        return base.model, base.tokenizer
    directories = policy_directories(experiment)
    if experiment.train.mode == "ensemble":
        mixture = MIXTURES[experiment.ensemble.aggregate]
        adapters = read_policies(directories, base, experiment.ensemble.adapter_scale)
        return mixture(base.model, adapters, include_base=experiment.ensemble.include_base), base.tokenizer
    [directory] = directories.values()
    if experiment.train.tuning == "full":
        return load_base(BaseConfig(str(directory), experiment.base.dtype)).model, base.tokenizer
    return PeftModel.from_pretrained(base.model, str(directory)).eval(), base.tokenizer


def consumption(experiment: Experiment, method: str) -> dict[str, float]:
    """What a method consumed: `prompts` as the paper counts them (training prompts drawn), then all of it with validation and
    search: completions, tokens, reward_calls, seconds. `converged_prompts` is where the paper's rule would have stopped, NaN
    where one of the policies never got there."""
    trained = [_training(experiment, name) for name in experiment.policy_names]
    search = Cost(**read_json(experiment.output / "search" / "cost.json")) if method in COMBINED else Cost()
    whole = sum((cost for cost, *_ in trained), search)
    return {
        "prompts": sum(prompts for _, prompts, _ in trained),
        "converged_prompts": sum(converged for *_, converged in trained),
        "all_prompts": whole.prompts,
        "completions": whole.completions,
        "tokens": whole.tokens,
        "reward_calls": whole.reward_calls,
        "seconds": whole.seconds,
        "search_seconds": search.seconds,
    }


def _training(experiment: Experiment, name: str) -> tuple[Cost, int, float]:
    """Cost of a policy's training, prompts drawn, and prompts until it converged."""
    folder = experiment.training_of(name)
    result, rule = read_json(folder / "result.json"), experiment.train.convergence
    threshold = rule.threshold or ConvergenceConfig().threshold
    validations = [entry for entry in result["log"] if "eval_reward" in entry]
    rewards = [entry["eval_reward"] for entry in validations]
    reached = (
        entry["step"] for end, entry in enumerate(validations, 1) if has_converged(rewards[:end], rule.window, threshold)
    )
    per_step = result["prompts_per_step"]
    cost = Cost(**read_json(folder / "cost.json"))
    return cost, result["steps"] * per_step, next(reached, math.nan) * per_step


def decode_seconds(experiments: Mapping[str, Experiment], prompts: Sequence[Any]) -> dict[str, float]:
    """Seconds to write 24 tokens for all prompts in one batch: the least of three rounds, in which the methods take turns.

    `base` is the bare base, and `one policy` its first policy as PEFT runs it.
    """
    first = next(iter(experiments.values()))
    models = {BASE_METHOD: load_policy(first, bare=True), **{name: load_policy(one) for name, one in experiments.items()}}
    if first.train.mode == "ensemble":
        base, directory = load_base(first.base), first.training_of(next(iter(first.objectives))) / POLICY_DIRECTORY
        models["one policy"] = PeftModel.from_pretrained(base.model, str(directory)).eval(), base.tokenizer
    fastest = dict.fromkeys(models, math.inf)
    length = {"max_new_tokens": _TIMED_TOKENS, "min_new_tokens": _TIMED_TOKENS, "do_sample": False}
    for _ in range(_TIMED_ROUNDS):
        for name, (model, tokenizer) in models.items():
            inputs = encode(tokenizer, list(prompts)).to(model.device)
            start = time.perf_counter()
            with torch.no_grad():
                model.generate(**inputs, **length)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest
