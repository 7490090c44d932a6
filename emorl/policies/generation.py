"""Settings of decoding: what `generate()` would refuse, or answer with something else than one text per prompt."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from emorl.config import UserError, nearest
from emorl.config.library import REFUSALS, refused
from emorl.policies.tiny import tiny_model, tiny_tokenizer

_VOCABULARY = 2**18  # settings may name tokens of any real tokenizer
_STEPS = 2
_LENGTHS = ("max_new_tokens", "min_new_tokens")


def check_generation(generation: Mapping[str, Any], where: str = "generation") -> None:
    """Tries the settings on a tiny model.

    Args:
        where: the settings' block, for the message.

    Raises:
        UserError: an unknown setting, an impossible value, or settings that give no single text for each prompt.
    """
    for name in _LENGTHS:
        if type(generation.get(name, 1)) is not int:
            raise UserError(f"{where}.{name}: expected a whole number, got {generation[name]!r:.60}")
    config = GenerationConfig()
    try:
        unknown = config.update(**generation)
    except REFUSALS as error:
        raise refused(where, error) from None
    for name in unknown:
        raise UserError(f"{where}: unknown setting {name!r}; {nearest(name, config.to_dict())}")
    top_p = generation.get("top_p")
    if isinstance(top_p, int | float) and not 0 < top_p <= 1:
        raise UserError(f"{where}.top_p: expected a share above 0 and at most 1, got {top_p}")
    try:
        written = _tried(json.dumps({**generation, **_shortened(generation)}, sort_keys=True, default=repr))
    except REFUSALS as error:
        raise refused(where, error) from None
    if written != 1:
        raise UserError(
            f"{where}: these settings give no single text for a prompt; leave out num_return_sequences and "
            "return_dict_in_generate"
        )


def asked_for(generation: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `generate()` needs beside these settings: a tokenizer, to know texts that end an answer."""
    return {"tokenizer": tokenizer} if generation.get("stop_strings") else {}


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a model's text: those of its generation settings, else the tokenizer's."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]


def _shortened(generation: Mapping[str, Any]) -> dict[str, int]:
    """Lengths for a trial: a token or two."""
    return {name: min(generation[name], _STEPS) for name in _LENGTHS if name in generation}


@functools.cache
def _tried(settings: str) -> int:
    """How many texts a tiny model writes for one prompt; 0 where it answers with another thing."""
    generation, tokenizer = json.loads(settings), tiny_tokenizer()
    with torch.random.fork_rng():
        model: Any = _model()
        inputs = tokenizer(["abc"], return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, **{"max_new_tokens": _STEPS, **generation}, **asked_for(generation, tokenizer))
    return len(output) if torch.is_tensor(output) else 0


@functools.cache
def _model() -> Any:
    return tiny_model(vocabulary=_VOCABULARY).eval()
