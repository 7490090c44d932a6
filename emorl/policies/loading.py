"""Loads a base model with its tokenizer; safetensors only, never a pickle."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from emorl.config import UserError
from emorl.experiment import BaseConfig


@dataclass(frozen=True)
class Base:
    """A frozen language model in evaluation mode and its tokenizer (padding on the left)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(config: BaseConfig) -> Base:
    """The base model on the GPU where there is one.

    Raises:
        UserError: no such folder or hub id, not a decoder-only model, no safetensors weights.
    """
    tokenizer = load_tokenizer(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.dtype), use_safetensors=True)
    model.requires_grad_(False)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    return Base(model.eval(), tokenizer)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, padding on the left with the end token where it has no pad token.

    Checks first, cheaply, that `model` exists and is a decoder-only language model.
    """
    try:
        kind = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        what = "the folder holds no model" if Path(model).is_dir() else "neither a folder here nor a model on the hub"
        raise UserError(f"base.model {model!r}: {what} ({str(error).splitlines()[0]:.160})") from None
    if kind.is_encoder_decoder:
        raise UserError(f"base.model {model!r} is an encoder-decoder; only decoder-only models are supported yet")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer
