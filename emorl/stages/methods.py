"""What a comparison of methods consists of: one experiment for each policy or ensemble that a method trains, per seed.

Equal budgets: a method's policies together train as many steps, with as many prompts and samples each, as the ensemble's
policies together, and none stops when it has converged (when it would have is reported). Only a collapse ends one early.
What is trained offline shares one set of samples of the base, as many as `train.samples` says.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emorl.config import UserError
from emorl.config.experiment import Experiment
from emorl.config.objective import ObjectiveConfig
from emorl.config.train import TrainConfig
from emorl.runs.layout import Layout

_OFFLINE = "_dpo"

COMBINED = ("ensemble", "soups", "scaled_ensemble", "scaled_soups", "ensemble_dpo", "soups_dpo")
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
    methods = sorted(experiment.compare.methods, key=_turn)
    return [MethodRun(method, seed, _experiments(experiment, method, seed)) for seed in seeds for method in methods]


def _turn(method: str) -> int:
    """Ensembles come first, as others use their policies and samples; then those that have one experiment."""
    return 0 if method.startswith("ensemble") else 2 if method.startswith("weighted") else 1


def _experiments(experiment: Experiment, method: str, seed: int) -> tuple[Experiment, ...]:
    home = Layout(experiment.output).seed(seed)
    split_seed = experiment.seed if experiment.data.seed is None else experiment.data.seed
    train = replace(experiment.train, convergence=replace(experiment.train.convergence, threshold=0.0))
    data = replace(experiment.data, seed=split_seed)
    child = replace(experiment, output=home / method, seed=seed, data=data, train=train)
    name = method.removesuffix(_OFFLINE)
    if method != name:
        child = _offline(child, home, method)
    policies = len(experiment.objectives)
    if name == "ensemble":
        return (child,)
    if method in COMBINED:
        aggregate = "parameters" if name.endswith("soups") else "hidden_states"
        scale = experiment.compare.adapter_scale if name.startswith("scaled") else experiment.ensemble.adapter_scale
        ensemble = replace(experiment.ensemble, aggregate=aggregate, adapter_scale=scale)
        return (replace(child, policies=home / f"ensemble{method.removeprefix(name)}", ensemble=ensemble),)
    tuning = experiment.compare.tuning
    child = replace(child, objectives=_as_scores(experiment))
    if name == "weighted":
        return _weighted(child, method, policies / len(experiment.compare.preferences))
    return (replace(child, train=_longer(child, policies, tuning=tuning, mode=name)),)


def _weighted(child: Experiment, method: str, factor: float) -> tuple[Experiment, ...]:
    """One policy for each preference."""
    config, home = child.compare, child.output.parent
    children = []
    for number, preference in enumerate(config.preferences, 1):
        output = home / f"{method}-{number}"
        train = _longer(child, factor, tuning=config.tuning, mode="weighted", preferences=dict(preference))
        if child.train.samples.reuse == child.output:  # no other method has sampled
            train = replace(train, samples=replace(train.samples, reuse=None if number == 1 else home / f"{method}-1"))
        children.append(replace(child, output=output, train=train))
    return tuple(children)


def _as_scores(experiment: Experiment) -> dict[str, ObjectiveConfig]:
    """The objectives as functions alone, without people's pairs."""
    return {name: replace(objective, method=None, pairs=None) for name, objective in experiment.objectives.items()}


def _offline(child: Experiment, home: Path, method: str) -> Experiment:
    """The experiment whose policies are all trained by DPO, on samples of the first such method."""
    offline = sorted((other for other in child.compare.methods if other.endswith(_OFFLINE)), key=_turn)
    is_first = method == offline[0] and method != f"weighted{_OFFLINE}"
    samples = replace(child.train.samples, reuse=None if is_first else home / offline[0])
    return replace(child, objectives=_as_scores(child), train=replace(child.train, method="dpo", samples=samples))


def _longer(experiment: Experiment, factor: float, **changes: Any) -> TrainConfig:
    """The training of a method that trains one policy: `factor` times as many steps, and other changes."""
    from emorl.training.trainers import training_block, training_method, training_steps

    name, block = training_block(experiment.train, training_method(experiment.train.method, experiment.train, experiment.base))
    steps, _ = training_steps(name, block)
    longer = {**block, "max_steps": max(1, round(steps * factor))}
    return replace(experiment.train, **{name.removeprefix("train."): longer}, **changes)
