"""TIES (arXiv 2306.01708): trim each task vector, elect a sign for each entry, take the mean of those that agree.

Departures from the authors: each tensor is trimmed by itself, as in mergekit (they trim the whole model: pass that
`thresholds`); the sign is that of the weighted sum, and a sum of exactly 0 is positive (theirs: the majority's).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emorl.fusion.chunks import chunks
from emorl.fusion.methods.method import SCALE, Density, EntryWise, Setting, density, each, is_number, normalize


def ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    _: Sequence[int],
    *,
    density: Density,
    scale: float,
    normalize: bool,
    thresholds: Sequence[float] | None,
) -> Tensor:
    """The base plus what of the task vectors is large and agrees."""
    if thresholds is None:
        shares = each(density, len(tensors))
        thresholds = [trim_threshold(tensor, base, share) for tensor, share in zip(tensors, shares, strict=True)]
    floors = torch.tensor(thresholds, dtype=torch.float32)[:, None]  # (K, 1)
    return merge_signs(tensors, weights, base, scale, normalize, lambda deltas, part: deltas.mul_(deltas.abs().ge_(floors)))


def trim_threshold(tensor: Tensor, base: Tensor, density: float) -> float:
    """The smallest magnitude among the share `density` of largest entries of the task vector; 0 where all are kept."""
    if density >= 1:
        return 0.0
    magnitudes = np.empty(tensor.numel(), np.float32)
    for part, deltas in chunks([tensor], base):
        torch.abs(deltas[0], out=torch.from_numpy(magnitudes[part]))
    kept = max(1, int(density * len(magnitudes)))
    magnitudes.view(np.int32).partition(len(magnitudes) - kept)  # bits are ordered like the numbers, and faster to compare
    return float(magnitudes[len(magnitudes) - kept])


def merge_signs(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    scale: float,
    normalize: bool,
    sparsify: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """TIES' election and disjoint merge of task vectors that `sparsify` has thinned out, in place, chunk by chunk.

    Comparisons are in place, that is 0.0 or 1.0: torch takes five times as long over tensors of bool."""
    factors, unit = torch.tensor(weights, dtype=torch.float32), torch.ones(())  # (K,)
    total = torch.empty(tensors[0].numel())
    for part, deltas in chunks(tensors, base):
        weighted = sparsify(deltas, part).mul_(factors[:, None])  # (K, n)
        sign = torch.copysign(unit, weighted.sum(0))  # (n,)
        agreeing = weighted.mul_(sign).clamp_(min=0)  # (K, n), magnitudes
        merged = agreeing.sum(0).mul_(sign)
        if normalize:
            divisor = torch.mv(agreeing.gt_(0).T, factors)
            merged /= divisor.add_(divisor.abs().lt_(1e-8))  # 1 where none agree
        total[part] = merged.mul_(scale).add_(base.flatten()[part])
    return total.view(tensors[0].shape)


def _are_thresholds(value: Any, models: int) -> bool:
    return value is None or (
        isinstance(value, list | tuple) and len(value) == models and all(is_number(floor) and floor >= 0 for floor in value)
    )


AGREEING = normalize(True, "whether an entry's sum is divided by the weights of the models that agree")
TIES = EntryWise(
    summary="Trims each task vector to its largest entries, elects a sign for each entry, and adds the weighted mean of those "
    "that have it to the base.",
    paper="TIES-Merging, arXiv 2306.01708",
    settings={
        "density": density(0.2),
        "scale": SCALE,
        "normalize": AGREEING,
        "thresholds": Setting(
            None,
            "the magnitudes from which entries are kept, instead of a density of each tensor; in a file of checkpoints "
            "`trim: global` finds those of the whole model, as the authors do",
            "none, or a number of at least 0 for each model",
            _are_thresholds,
        ),
    },
    fuse=ties,
)
