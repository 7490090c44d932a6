"""The base model with its tokenizer, loaded as the block `base` says, and the policies trained on it."""

import functools
import importlib.util
import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.config.objects import is_object
from emorl.policies.adapters import Adapter, read_adapter
from emorl.policies.loading import read_config, read_model, read_tokenizer
from emorl.policies.placement import check_offloaded, shared_with_copies

_WHAT = "base.model"


@dataclass(frozen=True)
class Base:
    """A frozen language model in evaluation mode and its tokenizer (padding on the left; an encoder's on the right)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool = False
    """whether code that comes with it may run, which a policy's copy of the tokenizer asks for again"""


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
        copied = deepcopy(config.model, {} if is_changed else shared_with_copies(config.model))
        return Base((copied.requires_grad_(False) if is_changed else copied).eval(), tokenizer)
    return Base(load_model(config), tokenizer, config.trust_remote_code)


def load_model(config: BaseConfig, **options: Any) -> Any:
    """The model of a folder, hub id or GGUF file, frozen, where and as the block says.

    Args:
        options: go to transformers' `from_pretrained`, before those of the block.

    Raises:
        UserError: as `load_base` does.
    """
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    block = {
        "dtype": dtype_of(config),
        "device_map": config.device_map or (None if config.quantization is None else {"": device}),
        "quantization_config": _quantization(config),
        **{key: getattr(config, key) for key in ("attn_implementation", "offload_folder")},
    }
    given = {key: value for key, value in {**block, **options}.items() if value is not None}
    model = read_model(kind, config.model, _WHAT, **{**_origin(config), **given})
    if "device_map" not in given:
        return model.to(device)
    check_offloaded(model)
    return model


def dtype_of(config: BaseConfig) -> torch.dtype:
    """The precision in which the base computes on this machine."""
    if is_object(config.model):
        return config.model.dtype
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    own: Any = config_of(config).get_text_config().dtype
    return own or torch.float32 if torch.cuda.is_available() else torch.float32


def _quantization(config: BaseConfig) -> BitsAndBytesConfig | None:
    if config.quantization is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("base.quantization needs bitsandbytes: pip install 'emorl[quantised]'")
    if config.quantization.bits == 8:
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns at every product
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype_of(config))


def quantization_of(model: PreTrainedModel) -> dict[str, int] | None:
    """The block `base.quantization` that a loaded model was loaded with; None where it is not quantised."""
    bits = 4 * getattr(model, "is_loaded_in_4bit", False) + 8 * getattr(model, "is_loaded_in_8bit", False)
    return {"bits": bits} if bits else None


def _origin(config: BaseConfig) -> dict[str, Any]:
    return {"trust_remote_code": config.trust_remote_code, **({"revision": config.revision} if config.revision else {})}


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
        if not (directory / "tokenizer_config.json").is_file():
            continue
        what = f"policy {name!r}: the tokenizer in"
        if read_tokenizer(str(directory), what, trust_remote_code=base.trust_remote_code).get_vocab() != vocabulary:
            raise UserError(f"policy {name!r} in {directory} was trained with another tokenizer than the base's; train it anew")
    return adapters


def load_tokenizer(config: BaseConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding with the end token where it has no pad token; on the left, but for an encoder, which may
    count positions from the first token.
    """
    padding_side = "right" if is_encoder_decoder(config) else "left"
    if config.tokenizer is not None and is_object(config.tokenizer):
        tokenizer = deepcopy(config.tokenizer)
    elif config.tokenizer is not None:
        tokenizer = read_tokenizer(config.tokenizer, "base.tokenizer", trust_remote_code=config.trust_remote_code)
    elif is_object(config.model):
        try:
            tokenizer = read_tokenizer(config.model.name_or_path, _WHAT)
        except UserError:
            raise UserError("base.tokenizer: a model made in memory has no tokenizer of its own; give one") from None
    else:
        tokenizer = read_tokenizer(config.model, _WHAT, **_origin(config))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = padding_side
    return tokenizer


def is_encoder_decoder(config: BaseConfig) -> bool:
    """Whether the base reads its prompts with an encoder, as T5 and BART do; the errors of `config_of`."""
    return bool(config_of(config).is_encoder_decoder)


def config_of(config: BaseConfig) -> PreTrainedConfig:
    """transformers' configuration of the base, loaded or in a folder or on the hub.

    Raises:
        UserError: no model is there.
    """
    model = config.model
    if not is_object(model):
        return _read_once(model, config.revision, config.trust_remote_code)
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"base.model: expected a language model of transformers, a folder or a hub id, got {model!r:.60}")
    return model.config


@functools.cache  # one run asks often, and a hub answers slowly
def _read_once(model: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    return read_config(model, _WHAT, trust_remote_code=trust_remote_code, **({"revision": revision} if revision else {}))
