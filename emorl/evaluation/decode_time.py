"""How long models take to write the same number of tokens for the same prompts."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from emorl.policies.placement import input_device
from emorl.policies.prompts import encode

_TOKENS, _ROUNDS = 24, 3


def decode_seconds(models: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> dict[str, float]:
    """Seconds by model to write 24 tokens for all prompts in one batch: the least of three rounds, in which they take turns."""
    fastest = dict.fromkeys(models, math.inf)
    length = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    for _ in range(_ROUNDS):
        for name, model in models.items():
            inputs = encode(tokenizer, list(prompts)).to(input_device(model))
            start = time.perf_counter()
            with torch.no_grad():
                model.generate(**inputs, **length)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest
