"""Where a base's layers compute, which `device_map` may spread over GPUs, the CPU's memory and disk (accelerate's hooks)."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from emorl.config import UserError


def device_of(module: nn.Module) -> torch.device:
    """Where a layer computes: where it lies, or where an offloaded one is brought for its forward."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def input_device(model: Any) -> torch.device:
    """Where a model takes its tokens."""
    return device_of(model.get_input_embeddings()) if model.device.type == "meta" else model.device


def check_offloaded(model: nn.Module) -> None:
    """Refuses a tied parameter that is offloaded without the one it is tied to: accelerate would not find it (UserError)."""
    for name, module in model.named_modules():
        for stored in [hook.weights_map for hook in _hooks(module) if getattr(hook, "weights_map", None) is not None]:
            for key, _ in module.named_parameters(recurse=False):
                if f"{stored.prefix}{key}" not in stored.dataset:
                    raise UserError(f"base.device_map: {name}.{key} is tied to another parameter; put both in one place")


def check_in_memory(model: nn.Module, what: str) -> None:
    """Refuses a base with offloaded layers for what changes it: UserError, with what that is."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(
            f"base.device_map: {what} needs the whole base on GPUs, or all in the CPU's memory, and some of its layers are "
            "offloaded; take more GPUs, a smaller base, or base.quantization"
        )


def parameters_in_memory(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What `named_parameters` gives, with the values of offloaded ones, in memory until the next one is asked for."""
    tied = getattr(model, "all_tied_weights_keys", {})  # which are one parameter no longer, once they are offloaded
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        offloaded = {key for key, value in module.named_parameters(recurse=False) if value.is_meta}
        with align_module_device(module):
            for key, parameter in module.named_parameters(recurse=False):
                name = f"{prefix}{key}"
                if id(parameter) not in seen and not (key in offloaded and name in tied):
                    yield name, parameter
        seen |= {id(value) for key, value in module.named_parameters(recurse=False) if key not in offloaded}


def shared_with_copies(model: nn.Module) -> dict[int, object]:
    """For `deepcopy`: parameters, buffers, and what offloaded or quantised layers keep of them beside, by id."""
    shared: list[object] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        kept = [getattr(hook, name, None) for hook in _hooks(module) for name in ("weights_map", "tied_params_map")]
        if type(module).__name__ == "Linear8bitLt":  # bitsandbytes moves its numbers there when it is first used
            kept.append(module.state)
        shared += [one for one in kept if one is not None]
    return {id(one): one for one in shared}


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))
