"""The adapter that a policy is trained as: PEFT's settings, tried on an empty copy of the base before anything is loaded."""

from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from emorl.config import UserError
from emorl.config.experiment import BaseConfig, TrainConfig
from emorl.config.library import REFUSALS, library_settings, refused
from emorl.config.objects import is_object
from emorl.policies.adapters import check_plain_lora
from emorl.policies.base import config_of, dtype_of, is_encoder_decoder

_EVERYTHING = "all-linear"


def lora_config(train: TrainConfig, base: BaseConfig) -> LoraConfig | None:
    """The `lora:` block; None where every parameter is tuned. Of a mixture of experts, `all-linear` leaves out the blocks
    of experts, which route each token by itself, and so could not be stacked.

    Raises:
        UserError: a setting that PEFT does not know, that does not suit the base, or with which policies could not be combined.
    """
    if train.tuning == "full":
        if dtype_of(base) != torch.float32 or base.quantization is not None:
            raise UserError("train.tuning: full needs base.dtype: float32 and no quantization; else small steps are lost")
        return None
    task = "SEQ_2_SEQ_LM" if is_encoder_decoder(base) else "CAUSAL_LM"
    lora = library_settings(LoraConfig, train.lora, "train.lora", "peft.LoraConfig", {"task_type": task})
    try:
        check_plain_lora(lora.to_dict(), "train.lora")
        empty = _empty(base)
        if leaves_out_experts(train, base):
            lora.target_modules = _linear_layers(empty)
        adapted = get_peft_model(empty, deepcopy(lora), low_cpu_mem_usage=True)  # which changes the settings it is given
    except UserError:
        raise
    except REFUSALS as error:
        raise refused("train.lora: PEFT refuses it", error) from error
    _check_adapted(adapted)
    return lora


def leaves_out_experts(train: TrainConfig, base: BaseConfig) -> bool:
    """Whether the base is a mixture of experts whose layers the `lora:` block would otherwise adapt."""
    everything = str(train.lora.get("target_modules")).lower() == _EVERYTHING
    return train.tuning == "lora" and everything and bool(_expert_blocks(_empty(base)))


def _empty(base: BaseConfig) -> PreTrainedModel:
    """The base without values: its layers take no memory and no time."""
    kind = AutoModelForSeq2SeqLM if is_encoder_decoder(base) else AutoModelForCausalLM
    with torch.device("meta"):
        if is_object(base.model):
            return type(base.model)._from_config(deepcopy(base.model.config))
        return kind.from_config(config_of(base), trust_remote_code=base.trust_remote_code)


def _expert_blocks(model: nn.Module) -> set[str]:
    """What the modules are called that have experts in them, each with its router: mlp, block_sparse_moe, …"""
    return {
        name.split(".")[-2]
        for name, module in model.named_modules()
        if "." in name and ("experts" in name.rpartition(".")[2] or "experts" in type(module).__name__.lower())
    }


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of what `all-linear` means, but for what is in a block of experts, or in its place in a layer without any: PEFT
    takes the one for the other."""
    blocks, head = _expert_blocks(model), model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and blocks.isdisjoint(name.split("."))
    ]


def _check_adapted(model: Any) -> None:
    base = model.get_base_model()
    shared = (base.get_input_embeddings(), base.get_output_embeddings())
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if any(module is one for one in shared):
            raise UserError(
                f"train.lora adapts {name!r}, an embedding or output head, which all policies must share; leave it out of "
                "target_modules"
            )
        layer = module.get_base_layer()
        if not isinstance(layer, nn.Linear | Conv1D):
            raise UserError(
                f"train.lora adapts {name!r}, a {type(layer).__name__}; only linear layers can be combined: leave it out of "
                "target_modules"
            )
