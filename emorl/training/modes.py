"""What `train.mode` trains: the objectives that reward each policy, and how their rewards become one advantage.

`ensemble` is EMORL (one policy per objective). The others are its single-policy rivals: `uniform` and `weighted` maximise a
weighted mean of the rewards (EMORL's Uniform Weighted), `gdpo` normalises each reward within its group before they are summed
(GDPO, arXiv 2601.05242, as TRL implements it), `dynaopt` lets a bandit move the weights (training/dynaopt.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emorl.config.train import Method, TrainConfig
from emorl.objectives.scalarize import importance_of


@dataclass(frozen=True)
class PolicyPlan:
    """One policy: its objectives, the `reward_weights` (O,), which sum to 1, and what happens to them.

    `method` is how it is trained; `aggregation` is TRL's `multi_objective_aggregation`; `adaptive` lets DynaOpt's bandit move
    the weights.
    """

    name: str
    objectives: tuple[str, ...]
    reward_weights: tuple[float, ...]
    method: Method
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    adaptive: bool = False


def plan_of(train: TrainConfig, objectives: Sequence[str], name: str, method: Method) -> PolicyPlan:
    """How the policy `name` is trained: an objective's, or the one of the mode."""
    if train.mode == "ensemble":
        return PolicyPlan(name, (name,), (1.0,), method)
    preferences = train.preferences if train.mode == "weighted" else {}
    weights = tuple(importance_of(objectives, preferences).tolist())
    aggregation = "normalize_then_sum" if train.mode == "gdpo" else "sum_then_normalize"
    return PolicyPlan(name, tuple(objectives), weights, method, aggregation, adaptive=train.mode == "dynaopt")
