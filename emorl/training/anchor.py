"""How far a policy has moved from its base: the exact KL divergence per token, measured apart from any trainer's estimate.

EMORL's authors penalise one KL of the whole batch times advantages that sum to zero: identically zero, value and gradient.
TRL's `beta` weighs a KL estimate of every token, SCSTTrainer's the exact divergence, with the adapter switched off as the
reference; this measures their effect.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from emorl.policies.prompts import encode, token_ids

_ROWS = 4  # texts in one forward pass: two sets of logits over a large vocabulary are kept


@torch.no_grad()
def kl_to_base(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    completions: Sequence[str],
    base: Any = None,
) -> float | None:
    """KL(policy || base) of the next token, in nats, averaged over the completions' tokens and the end token of each.

    Args:
        model: a PEFT model in evaluation mode; its adapter switched off is the base. Or any policy, with its `base`.
        prompts: as the policy was asked, texts or conversations.
        completions: what the divergence is averaged over, such as the policy's own answers.

    Returns:
        None where there is neither an adapter nor a base to compare with.
    """
    if base is None and not isinstance(model, PeftModel):
        return None
    read = _read_target if model.config.is_encoder_decoder else _read_text
    total, tokens = 0.0, 0
    for start in range(0, len(prompts), _ROWS):
        rows = slice(start, start + _ROWS)
        inputs, counted = read(model, tokenizer, prompts[rows], completions[rows])
        policy = log_probabilities(model, inputs, counted)  # (N, V)
        if base is None:
            with model.disable_adapter():
                reference = log_probabilities(model, inputs, counted)
        else:
            reference = log_probabilities(base, inputs, counted)
        total += float((policy.exp() * (policy - reference)).sum())
        tokens += len(policy)
    return total / tokens


def _completion_ids(tokenizer: PreTrainedTokenizerBase, completions: Sequence[str]) -> list[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in completions]  # type: ignore[operator]


def _read_text(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], completions: Sequence[str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As `rows_of_tokens`, of texts."""
    before = [token_ids(tokenizer, prompt) for prompt in prompts]
    return rows_of_tokens(before, _completion_ids(tokenizer, completions))


def rows_of_tokens(
    before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A decoder's inputs, and which positions (B, T) predict a token of a completion.

    Args:
        before, after: the tokens of each prompt and of its completion.
    """
    length = max(len(one) + len(other) for one, other in zip(before, after, strict=True))
    ids = torch.zeros((len(before), length), dtype=torch.long)  # padded right: causal, so padding changes nothing
    counted = torch.zeros((len(before), length), dtype=torch.bool)  # position t predicts token t + 1
    for row, (one, other) in enumerate(zip(before, after, strict=True)):
        ids[row, : len(one) + len(other)] = torch.tensor([*one, *other])
        counted[row, len(one) - 1 : len(one) + len(other) - 1] = True
    return {"input_ids": ids}, counted


def _read_target(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], completions: Sequence[str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """An encoder-decoder's inputs, and which of the decoder's positions predict a token of a completion."""
    after = _completion_ids(tokenizer, completions)
    start = model.config.decoder_start_token_id
    ids = torch.zeros((len(after), max(map(len, after))), dtype=torch.long)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(after):
        ids[row, : len(one)] = torch.tensor([start, *one[:-1]])
        counted[row, : len(one)] = True
    return {**encode(tokenizer, prompts), "decoder_input_ids": ids}, counted


def log_probabilities(model: Any, inputs: Mapping[str, torch.Tensor], counted: torch.Tensor, **options: Any) -> torch.Tensor:
    """Of the next token at the counted positions: (N, V). `options` go to the model's forward."""
    logits = model(**{name: value.to(model.device) for name, value in inputs.items()}, **options).logits  # (B, T, V)
    return logits[counted.to(model.device)].float().log_softmax(-1)
