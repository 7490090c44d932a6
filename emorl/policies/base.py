"""Loads a base model with its tokenizer, and the policies trained on it; safetensors only, never a pickle."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.policies.adapters import Adapter, read_adapter


@dataclass(frozen=True)
class Base:
    """A frozen language model in evaluation mode and its tokenizer (padding on the left; an encoder's on the right)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(config: BaseConfig) -> Base:
    """The base model on the GPU where there is one.

    Raises:
        UserError: no such folder or hub id, no language model, no safetensors weights.
    """
    tokenizer = load_tokenizer(config.model)
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder(config.model) else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(config.model, dtype=getattr(torch, config.dtype), use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"base.model {config.model!r} cannot be loaded from safetensors: {reason:.160}") from None
    model.requires_grad_(False)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    return Base(model.eval(), tokenizer)


def read_policies(directories: Mapping[str, Path], base: Base, scale: float = 1.0) -> dict[str, Adapter]:
    """The adapters of several policies by name, in order, each multiplied by `scale`.

    Raises:
        UserError: what is there is no plain LoRA adapter, or was trained with another tokenizer than the base's.
    """
    vocabulary, adapters = base.tokenizer.get_vocab(), {}
    for name, directory in directories.items():
        try:
            adapters[name] = read_adapter(directory, scale)
        except ValueError as error:
            raise UserError(f"policy {name!r}: {error}") from None
        saved = (directory / "tokenizer_config.json").is_file()
        if saved and AutoTokenizer.from_pretrained(directory).get_vocab() != vocabulary:
            raise UserError(f"policy {name!r} in {directory} was trained with another tokenizer than the base's; train it anew")
    return adapters


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, padding with the end token where it has no pad token; on the left, but for an encoder, which
    may count positions from the first token.
    """
    padding_side = "right" if is_encoder_decoder(model) else "left"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _not_found(model, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = padding_side
    return tokenizer


@functools.cache  # one run asks often, and a hub answers slowly
def is_encoder_decoder(model: str) -> bool:
    """Whether the base in a folder or on the hub reads its prompts with an encoder, as T5 and BART do.

    Raises:
        UserError: no model is there.
    """
    try:
        return bool(AutoConfig.from_pretrained(model).is_encoder_decoder)
    except (OSError, ValueError) as error:
        raise _not_found(model, error) from None


def _not_found(model: str, error: Exception) -> UserError:
    what = "the folder holds no model" if Path(model).is_dir() else "neither a folder here nor a model on the hub"
    return UserError(f"base.model {model!r}: {what} ({str(error).splitlines()[0]:.160})")
