"""Log-probabilities of tokens as the mixture gives them: before temperature, penalties and what else sampling does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_LEAST = -9999.0  # JSON has neither infinity nor NaN


@dataclass(frozen=True)
class TokenScore:
    """A token as text, its natural log-probability, and the most probable ones in its place, best first."""

    text: str
    logprob: float
    top: Sequence[tuple[str, float]] = ()


def token_scores(tokenizer: PreTrainedTokenizerBase, logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Of tokens (T,), for the logits (T, V) that they were chosen by, with the `top` most probable ones."""
    logprobs = torch.log_softmax(logits.float(), -1).nan_to_num(_LEAST).clamp(min=_LEAST)
    own = logprobs[torch.arange(len(tokens)), list(tokens)].tolist()
    values, ids = (found.tolist() for found in logprobs.topk(min(top, logprobs.shape[-1]), dim=-1))
    texts = {token: str(tokenizer.decode([token])) for token in {*tokens, *(token for row in ids for token in row)}}
    tops = [[(texts[token], value) for token, value in zip(*best, strict=True)] for best in zip(ids, values, strict=True)]
    scored = zip(tokens, own, tops, strict=True)
    return [TokenScore(texts[token], logprob, best) for token, logprob, best in scored]
