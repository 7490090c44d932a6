"""Several LoRA adapters fused into one, exactly: their factors are concatenated along the rank.

Averaging A and B matrices is not averaging adapters (sum A_i times sum B_i has cross terms); concatenation has none.
The price is the sum of the ranks. PEFT's `add_weighted_adapter(combination_type="cat")` does the same inside a loaded
model; this needs no model and keeps negative weights exact.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from emorl.policies.adapters import Adapter


def concatenate_adapters(adapters: Sequence[Adapter], weights: Sequence[float], output_dir: str | Path) -> Path:
    """Write the PEFT LoRA adapter whose delta is the weighted sum of the adapters' deltas; returns its directory.

    Any finite weights are allowed. Weights and scalings are folded into B, so the written scaling is 1.
    """
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"Got {len(adapters)} adapters and {len(weights)} weights; expected one weight per adapter.")
    if not torch.tensor(weights, dtype=torch.float64).isfinite().all():
        raise ValueError(f"Got weights {list(weights)}; expected finite numbers.")
    fingerprint = _common_fingerprint(adapters)
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.factors))
    factors = {name: _concatenated(name, adapters, weights) for name in modules}

    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.T.contiguous()  # PEFT stores (r, in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.T.contiguous()  # and (out, r)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    _lora_config({name: a.shape[1] for name, (a, _) in factors.items()}, adapters[0]).save_pretrained(str(directory))
    if fingerprint is not None:
        (directory / "policy.json").write_text(json.dumps({"base_fingerprint": fingerprint}, indent=2) + "\n")
    return directory


def _common_fingerprint(adapters: Sequence[Adapter]) -> str | None:
    """The fingerprint all adapters that have one agree on; only recorded if every adapter has it."""
    recorded = {adapter.base_fingerprint: adapter for adapter in adapters if adapter.base_fingerprint is not None}
    if len(recorded) > 1:
        places = " and ".join(str(adapter.path) for adapter in recorded.values())
        raise ValueError(f"The adapters in {places} were trained on different bases; fuse adapters of one base.")
    complete = all(adapter.base_fingerprint is not None for adapter in adapters)
    return next(iter(recorded)) if complete else None


def _concatenated(name: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A (in, R) and B (R, out) of one module, R the sum of the ranks of the adapters that have it; in float32."""
    weighted = zip(adapters, weights, strict=True)
    pairs = [(*adapter.factors[name], weight) for adapter, weight in weighted if name in adapter.factors]
    shapes = {(a.shape[0], b.shape[1]) for a, b, _ in pairs}
    if len(shapes) > 1:
        raise ValueError(f"The adapters map different shapes {sorted(shapes)} at {name!r}; fuse adapters of one base.")
    return torch.cat([a for a, _, _ in pairs], 1), torch.cat([b * weight for _, b, weight in pairs], 0)


def _lora_config(ranks: dict[str, int], like: Adapter) -> LoraConfig:
    """A config with scaling alpha / r = 1 everywhere; modules whose rank is not the commonest are listed in the
    patterns."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads the keys as regular expressions.
    others = {f"^{re.escape(name)}": other for name, other in ranks.items() if other != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=like.fan_in_fan_out,
        task_type=like.task_type,
        base_model_name_or_path=like.base_name,
        inference_mode=True,
    )
