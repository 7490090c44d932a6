"""Loads a base model with its tokenizer, and the policies trained on it; safetensors only, never a pickle."""

import functools
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from emorl.config.objects import is_object
from emorl.policies.adapters import Adapter, read_adapter


@dataclass(frozen=True)
class Base:
    """A frozen language model in evaluation mode and its tokenizer (padding on the left; an encoder's on the right)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(config: BaseConfig, is_changed: bool = False) -> Base:
    """The base model on the GPU where there is one. A model that is given as an object stays where it is, and as it is.

    Args:
        is_changed: the caller will change the model's parameters or modules; of an object, all is then copied, else only the
            modules are.

    Raises:
        UserError: no such folder or hub id, no language model, no safetensors weights.
    """
    tokenizer = load_tokenizer(config)
    if is_object(config.model):
        tensors = [] if is_changed else [*config.model.parameters(), *config.model.buffers()]
        copied = deepcopy(config.model, {id(tensor): tensor for tensor in tensors})
        return Base((copied.requires_grad_(False) if is_changed else copied).eval(), tokenizer)
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


def load_tokenizer(config: BaseConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding with the end token where it has no pad token; on the left, but for an encoder, which may
    count positions from the first token.
    """
    padding_side = "right" if is_encoder_decoder(config.model) else "left"
    if config.tokenizer is not None and is_object(config.tokenizer):
        tokenizer = deepcopy(config.tokenizer)
    else:
        name = config.tokenizer or (config.model.name_or_path if is_object(config.model) else config.model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            if config.tokenizer is None and is_object(config.model):
                raise UserError("base.tokenizer: a model made in memory has no tokenizer of its own; give one") from None
            raise _not_found(name, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = padding_side
    return tokenizer


def is_encoder_decoder(model: Any) -> bool:
    """Whether the base, loaded or in a folder or on the hub, reads its prompts with an encoder, as T5 and BART do.

    Raises:
        UserError: no model is there.
    """
    if not is_object(model):
        return _is_encoder_decoder(model)
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"base.model: expected a language model of transformers, a folder or a hub id, got {model!r:.60}")
    return bool(model.config.is_encoder_decoder)


@functools.cache  # one run asks often, and a hub answers slowly
def _is_encoder_decoder(model: str) -> bool:
    try:
        return bool(AutoConfig.from_pretrained(model).is_encoder_decoder)
    except (OSError, ValueError) as error:
        raise _not_found(model, error) from None


def _not_found(model: str, error: Exception) -> UserError:
    what = "the folder holds no model" if Path(model).is_dir() else "neither a folder here nor a model on the hub"
    return UserError(f"base.model {model!r}: {what} ({str(error).splitlines()[0]:.160})")
