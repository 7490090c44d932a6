"""DARE (arXiv 2311.03099): entries of task vectors survive by chance, and are divided by that chance.

Departure from mergekit, which scales the survivors to the L1 norm that all entries had: the same in expectation only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from emorl.fusion.chunks import chunks
from emorl.fusion.methods.method import SCALE, Density, EntryWise, density, each
from emorl.fusion.methods.ties import AGREEING, merge_signs


def dare_linear(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor, seeds: Sequence[int], *, density: Density, scale: float
) -> Tensor:
    shares = each(density, len(tensors))
    masks = _random_masks(tensors, shares, seeds)
    total = torch.empty(tensors[0].numel())
    factors = torch.tensor(weights, dtype=torch.float32) * scale / torch.tensor(shares)  # (K,)
    for part, deltas in chunks(tensors, base):
        total[part] = factors @ deltas.mul_(masks[:, part])
        total[part] += base.flatten()[part]
    return total.view(tensors[0].shape)


def dare_ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor,
    seeds: Sequence[int],
    *,
    density: Density,
    scale: float,
    normalize: bool,
) -> Tensor:
    shares = each(density, len(tensors))
    masks, divisors = _random_masks(tensors, shares, seeds), torch.tensor(shares)[:, None]  # (K, N), (K, 1)
    return merge_signs(
        tensors, weights, base, scale, normalize, lambda deltas, part: deltas.mul_(masks[:, part]).div_(divisors)
    )


def _random_masks(tensors: Sequence[Tensor], shares: Sequence[float], seeds: Sequence[int]) -> Tensor:
    """(K, N) of bool."""
    masks = torch.empty(len(tensors), tensors[0].numel(), dtype=torch.bool)
    for mask, share, seed in zip(masks, shares, seeds, strict=True):
        mask.bernoulli_(share, generator=torch.Generator().manual_seed(seed))
    return masks


DARE_LINEAR = EntryWise(
    summary="Keeps random entries of the task vectors, divided by the density, and adds their weighted sum to the base.",
    paper="DARE, arXiv 2311.03099",
    settings={"density": density(0.5), "scale": SCALE},
    fuse=dare_linear,
)
DARE_TIES = EntryWise(
    summary="DARE's random entries instead of TIES' largest ones, then TIES' signs and mean.",
    paper="DARE, arXiv 2311.03099, with TIES-Merging, arXiv 2306.01708",
    settings={"density": density(0.5), "scale": SCALE, "normalize": AGREEING},
    fuse=dare_ties,
)
