"""Advantages of k samples per prompt: self-critical (the other samples are the baseline), or GDPO over several rewards."""

import torch
from torch import Tensor

BASELINES = ("leave_one_out", "group_mean")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
_EPSILON = 1e-4  # TRL's, added to standard deviations


def advantages_of(
    rewards: Tensor,
    reward_weights: Tensor,
    samples: int,
    *,
    baseline: str = "leave_one_out",
    aggregation: str = "sum_then_normalize",
    scale: bool = False,
) -> Tensor:
    """Advantages (N,) of rewards (N, O), those of a prompt's samples together; NaN is no reward.

    A sample that nothing could score has advantage 0 and is in no baseline; equal rewards have advantage 0.

    Args:
        reward_weights: (O,).
        samples: G, per prompt.
        baseline: the mean of the prompt's other samples, or of all of them.
        aggregation: the weighted sum less its baseline, or each objective less its group's mean, over its standard
            deviation, then the weighted sum, which is normalised over the batch (GDPO; TRL's batch is that of all
            processes).
        scale: divide the former by the standard deviation of the prompt's rewards.
    """
    unscored = rewards.isnan().all(1)
    if aggregation == "normalize_then_sum":
        grouped = rewards.unflatten(0, (-1, samples))  # (B, G, O)
        normalized = ((grouped - grouped.nanmean(1, keepdim=True)) / (_nanstd(grouped, 1) + _EPSILON)).flatten(0, 1)
        total = (normalized * reward_weights).nansum(1).masked_fill(unscored, torch.nan)
        advantages = (total - total.nanmean()) / (_nanstd(total, 0) + _EPSILON)
        return advantages.nan_to_num(0.0)
    total = (rewards * reward_weights).nansum(1).masked_fill(unscored, torch.nan).unflatten(0, (-1, samples))  # (B, G)
    count = (~total.isnan()).sum(1, keepdim=True)
    advantages = total - total.nanmean(1, keepdim=True)
    if baseline == "leave_one_out":
        advantages = advantages * count / (count - 1).clamp(min=1)
    if scale:
        advantages = advantages / (_nanstd(total, 1) + _EPSILON)
    return advantages.flatten().nan_to_num(0.0)


def _nanstd(values: Tensor, dimension: int) -> Tensor:
    """Standard deviation (with n - 1) along a dimension, which is kept; 0 where there are fewer than two numbers."""
    mean = values.nanmean(dimension, keepdim=True)
    count = (~values.isnan()).sum(dimension, keepdim=True)
    return ((values - mean).square().nansum(dimension, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
