"""The adapter that is distilled, before its first step: on a tree of modules of its own over the base's tensors.

It begins as the policies' soup: the exact weighted sum of what they add to the base, cut to the student's rank. That is near
the ensemble of the same weights, and where all weight is on one policy of the same rank, it is that policy.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from emorl.fusion.adapters import weighted_sum
from emorl.fusion.low_rank import LowRank, factor_gram
from emorl.policies.adapters import Adapter
from emorl.policies.placement import check_in_memory, shared_with_copies

_PREFIX = "base_model.model."  # PEFT's, before the base's names of modules
_ADAPTER = "default"


def make_student(base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """A new adapter on the base, whose modules stay as they are; its parameters are shared, not copied, and frozen.

    Raises:
        UserError: the base is offloaded in parts.
    """
    check_in_memory(base, "training")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = get_peft_model(deepcopy(base, shared_with_copies(base)), lora)
    assert isinstance(student, PeftModel), "PEFT gives another class only to mixed adapters"
    return student


@torch.no_grad()
def begin_as_soup(student: PeftModel, adapters: Sequence[Adapter], weights: Sequence[float]) -> float:
    """Gives the student's adapter the weighted sum of these; returns the share of that sum's squared Frobenius norm which its
    rank and modules can hold.

    What its rank leaves free stays as PEFT makes it: random in A, zero in B, so that it adds nothing and can learn.
    """
    layers = {name.removeprefix(_PREFIX): one for name, one in student.named_modules() if isinstance(one, LoraLayer)}
    fused = weighted_sum(adapters, weights, {name: layer.r[_ADAPTER] for name, layer in layers.items()})
    for name, factors in fused.items():
        a: Any = layers[name].lora_A[_ADAPTER].weight  # (r, in), as PEFT stores it
        b: Any = layers[name].lora_B[_ADAPTER].weight  # (out, r)
        rank = factors.a.shape[1]
        a[:rank] = factors.a.T.to(a)
        b[:, :rank] = factors.b.T.to(b) / layers[name].scaling[_ADAPTER]
    whole = _energy(weighted_sum(adapters, weights))
    return _energy(fused) / whole if whole > 0 else 1.0


def _energy(modules: Mapping[str, LowRank]) -> float:
    """Squared Frobenius norm of all of them."""
    return sum(float(factor_gram([(one.a, one.b)])) for one in modules.values())
