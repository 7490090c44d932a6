"""What a comparison of methods consists of: one experiment for each policy or ensemble that a method trains, per seed.

Equal budgets: a method's policies together train as many steps, with as many prompts and samples each, as the ensemble's
policies together. Kept free of torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from emorl.config import UserError
from emorl.experiment import Experiment, TrainConfig

COMBINED = ("ensemble", "soups", "scaled_ensemble", "scaled_soups")
"""methods that combine policies by weights, which are searched; all others train policies that are used as they are"""


@dataclass(frozen=True)
class MethodRun:
    """One method with one seed; `experiments` is one, but for `weighted`, which trains a policy per preference."""

    method: str
    seed: int
    experiments: tuple[Experiment, ...]


def method_runs(experiment: Experiment) -> list[MethodRun]:
    """All methods of the first seed, then of the next; each experiment has its own folder in the experiment's output.

    Raises:
        UserError: what the experiment's file says contradicts a comparison.
    """
    if experiment.policies is not None or experiment.train.mode != "ensemble":
        raise UserError("compare trains all methods itself: leave out `policies` and `train.mode`")
    methods, seeds = experiment.compare.methods, experiment.compare.seeds
    return [MethodRun(method, seed, _experiments(experiment, method, seed)) for seed in seeds for method in methods]


def _experiments(experiment: Experiment, method: str, seed: int) -> tuple[Experiment, ...]:
    home = experiment.output / f"seed-{seed}"
    split_seed = experiment.seed if experiment.data.seed is None else experiment.data.seed
    own = replace(experiment, output=home / method, seed=seed, data=replace(experiment.data, seed=split_seed))
    policies = len(experiment.objectives)
    if method == "ensemble":
        return (own,)
    if method in COMBINED:
        aggregate = "parameters" if method.endswith("soups") else "hidden_states"
        scale = experiment.compare.adapter_scale if method.startswith("scaled") else experiment.search.adapter_scale
        search = replace(experiment.search, aggregate=aggregate, adapter_scale=scale)
        return (replace(own, policies=home / "ensemble", search=search),)
    train = experiment.train
    if method == "weighted":
        preferences = experiment.compare.preferences
        return tuple(
            replace(
                own,
                output=home / f"weighted-{number}",
                train=replace(_longer(train, policies / len(preferences)), mode="weighted", preferences=dict(one)),
            )
            for number, one in enumerate(preferences, 1)
        )
    return (replace(own, train=replace(_longer(train, policies), mode=method)),)


def _longer(train: TrainConfig, factor: float) -> TrainConfig:
    def scaled(block: Mapping[str, Any]) -> dict[str, Any]:
        return {**block, "max_steps": max(1, round(block.get("max_steps", 400) * factor))}

    return replace(train, grpo=scaled(train.grpo), scst=scaled(train.scst))
