"""How a token is chosen from log-probabilities: greedily, or by random numbers that belong to each text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from emorl.aggregation import sampling
from emorl.dynamic.engines.engine import Decoding


def random_numbers(decoding: Decoding, seeds: Sequence[int]) -> Tensor:
    """One uniform number for each token a text may get, (B, max_new_tokens): the same for a text in any batch."""
    if decoding.temperature == 0:
        return torch.zeros(len(seeds), decoding.max_new_tokens)
    return torch.stack(
        [torch.rand(decoding.max_new_tokens, generator=torch.Generator().manual_seed(decoding.seed + seed)) for seed in seeds]
    )


def choose(logits: Tensor, decoding: Decoding, uniform: Tensor) -> Tensor:
    """Tokens (B,) for logits (B, V), by uniform numbers (B,) where the temperature is above 0."""
    temperature, top_p, top_k = (torch.full_like(uniform, value) for value in (decoding.temperature, decoding.top_p, 0))
    return sampling.choose(logits, temperature, top_p, top_k, uniform)
