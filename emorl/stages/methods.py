"""What a comparison of methods consists of: one experiment for each policy or ensemble that a method trains, per seed.

Equal budgets: a method's policies together train as many steps, with as many prompts and samples each, as the ensemble's
policies together, and none stops when it has converged (when it would have is reported). Only a collapse ends one early.
"""

from dataclasses import dataclass, replace
from typing import Any

from emorl.config import UserError
from emorl.config.experiment import Experiment, TrainConfig
from emorl.runs.layout import Layout

COMBINED = ("ensemble", "soups", "scaled_ensemble", "scaled_soups")
"""methods that combine policies by weights, which are searched; all others train policies that are used as they are"""

TABLE_COLUMNS = frozenset(
    {"method", "seed", "point", "best", "points", "hypervolume", "decode_cost", "prompts", "converged_prompts", "all_prompts",
     "reward_calls", "seconds", "search_seconds"}
)  # fmt: skip
"""columns of the comparison beside those of every summary"""


@dataclass(frozen=True)
class MethodRun:
    """A method with one seed; `experiments` holds a single one, but for `weighted`, which trains a policy per preference."""

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
    if experiment.search.storage is not None:
        raise UserError("compare searches once per method and seed, each in its own journal: leave out `search.storage`")
    taken = sorted(TABLE_COLUMNS & set(experiment.objectives))
    if taken:
        raise UserError(f"objectives: {taken[0]!r} is a column of compare's tables; give that objective another name")
    seeds = experiment.compare.seeds
    methods = sorted(experiment.compare.methods, key=lambda method: method != "ensemble")  # others use its policies
    return [MethodRun(method, seed, _experiments(experiment, method, seed)) for seed in seeds for method in methods]


def _experiments(experiment: Experiment, method: str, seed: int) -> tuple[Experiment, ...]:
    home = Layout(experiment.output).seed(seed)
    split_seed = experiment.seed if experiment.data.seed is None else experiment.data.seed
    train = replace(experiment.train, convergence=replace(experiment.train.convergence, threshold=0.0))
    data = replace(experiment.data, seed=split_seed)
    child = replace(experiment, output=home / method, seed=seed, data=data, train=train)
    policies = len(experiment.objectives)
    if method == "ensemble":
        return (child,)
    if method in COMBINED:
        aggregate = "parameters" if method.endswith("soups") else "hidden_states"
        scale = experiment.compare.adapter_scale if method.startswith("scaled") else experiment.ensemble.adapter_scale
        ensemble = replace(experiment.ensemble, aggregate=aggregate, adapter_scale=scale)
        return (replace(child, policies=home / "ensemble", ensemble=ensemble),)
    tuning = experiment.compare.tuning
    if method == "weighted":
        preferences = experiment.compare.preferences
        factor = policies / len(preferences)
        return tuple(
            replace(
                child,
                output=home / f"weighted-{number}",
                train=_longer(child, factor, tuning=tuning, mode="weighted", preferences=dict(preference)),
            )
            for number, preference in enumerate(preferences, 1)
        )
    return (replace(child, train=_longer(child, policies, tuning=tuning, mode=method)),)


def _longer(experiment: Experiment, factor: float, **changes: Any) -> TrainConfig:
    """The training of a method that trains one policy: `factor` times as many steps, and other changes."""
    from emorl.training.trainers import training_block, training_steps

    name, block = training_block(experiment.train, experiment.base)
    steps, _ = training_steps(name, block)
    longer = {**block, "max_steps": max(1, round(steps * factor))}
    return replace(experiment.train, **{name.removeprefix("train."): longer}, **changes)
