"""The only place a prompt is rendered: TRL's rendering (chat template with generation prompt), padded as the tokenizer says."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase


def is_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts of this model are conversations."""
    return tokenizer.chat_template is not None


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> BatchEncoding:
    """Token ids as `GRPOTrainer` makes them: `input_ids` and `attention_mask` of (B, T), padded on the tokenizer's side.

    Args:
        prompts: texts, or conversations (lists of role/content turns); not both in one call.
    """
    if isinstance(prompts[0], str):
        ids = tokenizer(text=list(prompts))["input_ids"]
    else:
        encoded: Any = tokenizer.apply_chat_template(list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = encoded["input_ids"]
    rows: Any = {"input_ids": ids}
    return tokenizer.pad(rows, return_tensors="pt")


def decode(tokenizer: PreTrainedTokenizerBase, ids: Any) -> list[str]:
    """Generated ids (B, T) as texts without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
