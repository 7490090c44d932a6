"""How a token is chosen from log-probabilities: greedily, or by random numbers that belong to each text."""

from collections.abc import Sequence

import torch
from torch import Tensor

from emorl.dynamic.engines.engine import Decoding


def random_numbers(decoding: Decoding, seeds: Sequence[int]) -> Tensor:
    """One uniform number for each token a text may get, (B, max_new_tokens): the same for a text in any batch."""
    if decoding.temperature == 0:
        return torch.zeros(len(seeds), decoding.max_new_tokens)
    return torch.stack(
        [torch.rand(decoding.max_new_tokens, generator=torch.Generator().manual_seed(decoding.seed + seed)) for seed in seeds]
    )


def choose(logits: Tensor, decoding: Decoding, uniform: Tensor) -> Tensor:
    """Tokens (B,) for logits (B, V), by uniform numbers (B,) where the temperature is above 0: inverse of the cumulative
    distribution in the order of the vocabulary, without the tail that `top_p` cuts off."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / decoding.temperature, -1)
    if decoding.top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        outside = ranked.cumsum(-1) - ranked >= decoding.top_p  # never the first
        probabilities = probabilities.scatter(-1, order, ranked.masked_fill(outside, 0.0))
    cumulative = probabilities.cumsum(-1)  # (B, V)
    wanted = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, wanted, right=True)  # (B, 1)
    return place.clamp(max=logits.shape[-1] - 1).squeeze(-1)
