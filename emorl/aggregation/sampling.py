"""How tokens are chosen from logits: greedily, or by uniform numbers of each text's own, whatever is decoded beside it."""

import torch
from torch import Tensor

from emorl.aggregation.prefixes import highest

_CANDIDATES = 1024  # most nuclei are smaller, and finding the largest few is far faster than sorting a vocabulary


def choose(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) for logits (B, V): inverse of the cumulative distribution in the order of the vocabulary, without the tails
    that `top_k` and then `top_p` cut off.

    Args:
        temperature: (B,), 0 for the token of the highest logit.
        top_p: (B,), a share in (0, 1].
        top_k: (B,), 0 for all tokens.
        uniform: (B,), numbers in [0, 1).
    """
    temperature, top_p, top_k, uniform = (given.to(logits.device) for given in (temperature, top_p, top_k, uniform))
    tokens, rows = highest(logits), (temperature > 0).nonzero().squeeze(1)
    if not len(rows):
        return tokens
    below = logits[rows].float() - logits[rows].float().amax(-1, keepdim=True)  # a tiny temperature gives no infinity
    probabilities = torch.softmax(below / temperature[rows, None], -1)
    cut = ((top_p < 1) | (top_k > 0))[rows].nonzero().squeeze(1)
    if len(cut):
        probabilities[cut] = _nucleus(probabilities[cut], top_p[rows[cut]], top_k[rows[cut]])
    cumulative = probabilities.cumsum(-1)  # (B', V)
    wanted = uniform[rows, None].to(cumulative.dtype) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, wanted, right=True)  # (B', 1)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())  # beyond it nothing has a probability
    return tokens.index_copy(0, rows, torch.minimum(place, last).squeeze(-1))


def _nucleus(probabilities: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """The probabilities (B, V) with 0 for what is cut off."""
    ranked, order = probabilities.topk(min(_CANDIDATES, probabilities.shape[-1]), dim=-1)
    enough = torch.where(top_k > 0, top_k <= ranked.shape[-1], ranked.sum(-1) >= top_p)
    if not bool(enough.all()):
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if bool((top_k > 0).any()):
        place = torch.arange(ranked.shape[-1], device=ranked.device)
        ranked = ranked.masked_fill((top_k[:, None] > 0) & (place >= top_k[:, None]), 0.0)
        ranked = ranked / torch.where(top_k > 0, ranked.sum(-1), 1.0)[:, None]
    outside = ranked.cumsum(-1) - ranked >= top_p[:, None]
    outside[:, 0] = False  # also where a share is too small for a float32
    return torch.zeros_like(probabilities).scatter(-1, order, ranked.masked_fill(outside, 0.0))
