"""How far a policy has moved from its base: the exact KL divergence per token, measured apart from any trainer's estimate.

EMORL's authors penalise one KL of the whole batch times advantages that sum to zero: identically zero, value and gradient.
TRL's `beta` weighs a KL estimate of every token, with the adapter switched off as the reference; this measures its effect.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from emorl.policies.prompts import encode

_ROWS = 4  # texts in one forward pass: two sets of logits over a large vocabulary are kept


@torch.no_grad()
def kl_to_base(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], completions: Sequence[str]) -> float:
    """KL(policy || base) of the next token, in nats, averaged over the completions' tokens and the end token of each.

    Args:
        model: a PEFT model in evaluation mode; its adapter switched off is the base.
        prompts: as the policy was asked, texts or conversations.
        completions: what the divergence is averaged over, such as the policy's own answers.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    total, tokens = 0.0, 0
    for start in range(0, len(prompts), _ROWS):
        before = [encode(tokenizer, [prompt])["input_ids"][0].tolist() for prompt in prompts[start : start + _ROWS]]
        after = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in completions[start : start + _ROWS]]
        length = max(len(one) + len(other) for one, other in zip(before, after, strict=True))
        ids = torch.zeros((len(before), length), dtype=torch.long)  # (B, T), padded right: causal, so padding changes nothing
        counted = torch.zeros((len(before), length - 1), dtype=torch.bool)  # position t predicts token t + 1
        for row, (one, other) in enumerate(zip(before, after, strict=True)):
            ids[row, : len(one) + len(other)] = torch.tensor(one + other)
            counted[row, len(one) - 1 : len(one) + len(other) - 1] = True
        policy = _log_probabilities(model, ids, counted)  # (N, V)
        with model.disable_adapter():
            base = _log_probabilities(model, ids, counted)
        total += float((policy.exp() * (policy - base)).sum())
        tokens += len(policy)
    return total / tokens


def _log_probabilities(model: Any, ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Of the next token at the counted positions: (N, V)."""
    logits = model(input_ids=ids.to(model.device)).logits[:, :-1]  # (B, T-1, V)
    return logits[counted.to(model.device)].float().log_softmax(-1)
