"""Fuses models into a loaded one, in place and in memory: how a search tries a candidate without a process or a checkpoint.

Only the tensors whose fusion differs from the last one are fused again, by several threads and straight into a model in
float32 on the CPU. Fusing is done on the CPU, wherever the model is.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from emorl.config import UserError
from emorl.fusion.operators import Fusion, fuse_tensor, tensor_workers
from emorl.policies.adapters import Adapter
from emorl.policies.placement import check_in_memory

FuseParameter = Callable[[str, Fusion, Tensor], None]
"""Writes a parameter's fusion, by its name, to a contiguous float32 tensor of its shape."""


class LoadedFusion:
    """A model whose named parameters are a fusion of several models'; the others stay as they are.

    >>> loaded = loaded_adapters(base.model, adapters)
    >>> loaded.apply(lambda name: Fusion("ties", (0.5, 0.5)))
    >>> loaded.model.generate(...)
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], fuse_parameter: FuseParameter) -> None:
        self.model = model
        parameters = dict(model.named_parameters())
        self._parameters = {name: parameters[name] for name in names}
        self._fuse_parameter = fuse_parameter
        self._applied: dict[str, Fusion] = {}

    @property
    def names(self) -> list[str]:
        """The parameters that are fused."""
        return list(self._parameters)

    def apply(self, fusion_of: Callable[[str], Fusion]) -> int:
        """Changes the model's parameters to what `fusion_of` says of each; returns how many were fused anew."""
        changed = {name: fusion for name in self._parameters if self._applied.get(name) != (fusion := fusion_of(name))}
        with tensor_workers() as pool:
            for _ in pool.map(self._change, changed, changed.values()):
                pass
        return len(changed)

    @torch.no_grad()  # is each thread's own
    def _change(self, name: str, fusion: Fusion) -> None:
        parameter = self._parameters[name]
        direct = parameter.dtype == torch.float32 and parameter.device.type == "cpu" and parameter.is_contiguous()
        fused = parameter if direct else torch.empty(parameter.shape)
        self._applied.pop(name, None)  # not known, should this one fail
        self._fuse_parameter(name, fusion, fused)
        if not direct:
            parameter.copy_(fused)
        self._applied[name] = fusion


def loaded_models(
    model: PreTrainedModel, models: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None = None, seed: int = 0
) -> LoadedFusion:
    """Whole models, by their state dicts (those that safetensors maps into memory will do); `model` is one of their
    architecture, and none of them."""
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]

    def fuse_parameter(name: str, fusion: Fusion, out: Tensor) -> None:
        start = None if base is None else base[name]
        fuse_tensor(fusion, [model[name] for model in models], start, name=name, seed=seed, out=out)

    return LoadedFusion(model, names, fuse_parameter)


def loaded_adapters(model: PreTrainedModel, adapters: Sequence[Adapter], seed: int = 0) -> LoadedFusion:
    """LoRA policies of the base `model`: what their adapters add is fused (SLERP too is between those) and added to the base.

    The base's adapted weights are copied, and the adapters' full deltas kept in float32: K + 1 times the adapted modules.

    Raises:
        UserError: the base is quantised or offloaded in parts.
    """
    check_in_memory(model, "a search of fusions")
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.factors))
    if not all(model.get_parameter(f"{name}.weight").is_floating_point() for name in modules):
        raise UserError("base.quantization: a search of fusions changes the base's own parameters; search on the base as it is")
    starts = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().cpu().clone() for name in modules}
    deltas = {f"{name}.weight": [_delta(adapter, name, starts[f"{name}.weight"]) for adapter in adapters] for name in modules}

    def fuse_parameter(name: str, fusion: Fusion, out: Tensor) -> None:
        fuse_tensor(fusion, deltas[name], torch.zeros_like(deltas[name][0]), name=name, seed=seed, out=out)
        out += starts[name]

    return LoadedFusion(model, list(starts), fuse_parameter)


def _delta(adapter: Adapter, module: str, weight: Tensor) -> Tensor:
    """What an adapter adds to a module's weight, in its shape; zero where it adapts it not."""
    if module not in adapter.factors:
        return torch.zeros(weight.shape)
    a, b = adapter.factors[module]
    delta = a @ b  # (in, out)
    return (delta if adapter.fan_in_fan_out else delta.T).contiguous()
