"""What `train.mode` trains: the objectives that reward each policy, and how their rewards become one advantage.

`ensemble` is EMORL (one policy per objective). The others are its single-policy rivals: `uniform` and `weighted` maximise a
weighted mean of the rewards (EMORL's Uniform Weighted), `gdpo` normalises each reward within its group before they are summed
(GDPO, arXiv 2601.05242, as TRL implements it), `dynaopt` lets a bandit move the weights (training/dynaopt.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment, ObjectiveConfig
from emorl.objectives.scalarize import importance_of


@dataclass(frozen=True)
class PolicyPlan:
    """One policy: its objectives, the `reward_weights` (O,), which sum to 1, and what happens to them.

    `aggregation` is TRL's `multi_objective_aggregation`; `adaptive` lets DynaOpt's bandit move the weights.
    """

    name: str
    objectives: Mapping[str, ObjectiveConfig]
    reward_weights: tuple[float, ...]
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    adaptive: bool = False


def plan_of(experiment: Experiment, name: str) -> PolicyPlan:
    """How the policy `name` is trained.

    Raises:
        UserError: the experiment's mode trains no such policy.
    """
    if name not in experiment.policy_names:
        kind = "objective" if experiment.train.mode == "ensemble" else "policy"
        raise UserError(f"no {kind} {name!r} in this experiment; {nearest(name, experiment.policy_names)}")
    mode, objectives = experiment.train.mode, experiment.objectives
    if mode == "ensemble":
        return PolicyPlan(name, {name: objectives[name]}, (1.0,))
    preferences = experiment.train.preferences if mode == "weighted" else {}
    weights = tuple(importance_of(list(objectives), preferences).tolist())
    aggregation = "normalize_then_sum" if mode == "gdpo" else "sum_then_normalize"
    return PolicyPlan(name, objectives, weights, aggregation, adaptive=mode == "dynaopt")
