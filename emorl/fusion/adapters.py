"""Several LoRA adapters fused into one ordinary PEFT adapter, by what they add to the base: their deltas.

Averaging A and B matrices is not averaging adapters: sum A_i times sum B_i has cross terms, and any invertible matrix between A
and B changes the average but not the adapter. Linear mixing, SLERP and Model Stock are weighted sums of deltas, whose
weights follow from the deltas' inner products; the factors are concatenated along the rank, exactly, and compressed if asked.
TIES and DARE work entry by entry: the deltas of one module at a time are formed, fused, and factorised again. PEFT's
`add_weighted_adapter` does the like inside a loaded model; this needs no model and keeps negative weights exact.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from emorl.config import UserError
from emorl.fusion.adapter_card import AdapterFusion, adapter_card
from emorl.fusion.low_rank import Factors, LowRank, check_truncation, compress, concatenate, factor_gram, factorize
from emorl.fusion.operators import Fusion, check_fusion, coefficients_of, fuse_tensor
from emorl.policies.adapters import Adapter
from emorl.runs.layout import POLICY_CARD, WEIGHTS
from emorl.runs.run import write_json, write_text, written_whole_directory


def concatenate_adapters(adapters: Sequence[Adapter], weights: Sequence[float], output_dir: str | Path) -> Path:
    """Write the PEFT LoRA adapter whose delta is the weighted sum of the adapters' deltas; returns its directory.

    Any finite weights are allowed. Weights and scalings are folded into B, so the written scaling is 1.
    """
    if not adapters or len(weights) != len(adapters):
        raise UserError(f"Got {len(adapters)} adapters and {len(weights)} weights; expected one weight per adapter.")
    if not torch.tensor(weights, dtype=torch.float64).isfinite().all():
        raise UserError(f"Got weights {list(weights)}; expected finite numbers.")
    fingerprint = common_fingerprint(adapters)
    factors = {name: concatenate(_module_factors(name, adapters), weights) for name in _module_names(adapters)}
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_adapter(directory, factors, adapters[0], fingerprint)
    return directory


def fuse_adapters(
    adapters: Sequence[Adapter],
    fusion: Fusion,
    output_dir: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    by_module: Mapping[str, Fusion] | None = None,
    origin: str = "",
) -> Path:
    """Write the PEFT LoRA adapter of the fused deltas; returns its directory. Its README.md says how it was made and what
    was lost.

    An adapter that lacks a module adds a zero delta there. A module that no adapter contributes to is left out.

    >>> fuse_adapters([read_adapter("one"), read_adapter("two")], Fusion("ties", (0.5, 0.5)), "fused", rank=16)

    Args:
        fusion: its base is a delta of zero, so `slerp` is always between deltas.
        rank: of every module, at most. Default: nothing is truncated where the result is a weighted sum; for TIES and DARE,
            whose results have full rank, the sum of the adapters' ranks, the size of their concatenation.
        energy: instead of a rank: each module keeps at least this share of its squared Frobenius norm.
        seed: of DARE's random masks; they are those of a fusion of the whole models.
        by_module: module -> the fusion that it has instead of `fusion`.
        origin: for the card: who chose the settings.

    Raises:
        UserError: unknown method, setting out of range, adapters that do not go together, or `output_dir` is not empty.
    """
    wanted = AdapterFusion(fusion, by_module or {}, rank, energy, seed, origin)
    _check(wanted, len(adapters))
    fingerprint = common_fingerprint(adapters)
    output = Path(output_dir)
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; give another output, or move it away")
    with written_whole_directory(output) as partial:
        modules = {name: _fused_module(name, adapters, wanted) for name in _module_names(adapters)}
        fused = {name: module for name, module in modules.items() if module is not None}
        if not fused:
            raise UserError(f"{fusion.method} with the weights {list(fusion.weights)} leaves nothing of these adapters")
        write_adapter(partial, {name: (module.a, module.b) for name, module in fused.items()}, adapters[0], fingerprint)
        write_text(partial / "README.md", adapter_card(adapters, wanted, fused))
    return output


def weighted_sum(
    adapters: Sequence[Adapter], weights: Sequence[float], ranks: Mapping[str, int] | None = None
) -> dict[str, LowRank]:
    """Module -> factors of the weighted sum of the adapters' deltas: exact where it has no more than the module's rank, else
    the best approximation of that rank. A module that no weight reaches is left out.

    Args:
        weights: one for each adapter; they may sum to anything.
        ranks: of the modules that are wanted; others are left out. By default all are exact.
    """
    wanted = [name for name in _module_names(adapters) if ranks is None or name in ranks]
    summed = {name: _summed(_module_factors(name, adapters), weights) for name in wanted}
    return {
        name: LowRank(*pair) if ranks is None or pair[0].shape[1] <= ranks[name] else compress(*pair, rank=ranks[name])
        for name, pair in summed.items()
        if pair is not None
    }


def _check(wanted: AdapterFusion, adapters: int) -> None:
    check_truncation(wanted.rank, wanted.energy)
    for fusion in (wanted.fusion, *wanted.by_module.values()):
        check_fusion(fusion, adapters, has_base=True)
        if fusion.settings.get("space", "task_vectors") != "task_vectors":
            raise UserError("slerp of adapters is between their deltas: set `space` to task_vectors or leave it out")


def _fused_module(name: str, adapters: Sequence[Adapter], wanted: AdapterFusion) -> LowRank | None:
    """None where all coefficients are 0."""
    fusion, factors = wanted.fusion_of(name), _module_factors(name, adapters)
    coefficients = coefficients_of(fusion, lambda: factor_gram(factors))
    if coefficients is None:
        delta = _fused_delta(f"{name}.weight", factors, fusion, wanted.seed, adapters[0].fan_in_fan_out)
        rank = sum(a.shape[1] for a, _ in factors) if wanted.is_complete else wanted.rank
        return factorize(delta, rank=rank, energy=wanted.energy)
    summed = _summed(factors, coefficients)
    if summed is None or wanted.is_complete:
        return None if summed is None else LowRank(*summed)
    return compress(*summed, rank=wanted.rank, energy=wanted.energy)


def _summed(factors: Sequence[Factors], coefficients: Sequence[float]) -> Factors | None:
    """Factors of the weighted sum, exactly; None where all coefficients are 0."""
    weighted = zip(factors, coefficients, strict=True)
    chosen = [((a, b), coefficient) for (a, b), coefficient in weighted if coefficient != 0 and a.shape[1] > 0]
    return concatenate([pair for pair, _ in chosen], [coefficient for _, coefficient in chosen]) if chosen else None


def _fused_delta(name: str, factors: Sequence[Factors], fusion: Fusion, seed: int, fan_in_fan_out: bool) -> Tensor:
    """(in, out). The deltas are fused in the layout and under the name of the weight they change, which decide DARE's masks."""
    deltas = [a @ b if fan_in_fan_out else b.T @ a.T for a, b in factors]
    fused = fuse_tensor(fusion, deltas, torch.zeros_like(deltas[0]), name=name, seed=seed)
    return fused if fan_in_fan_out else fused.T


def _module_names(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.factors))


def _module_factors(name: str, adapters: Sequence[Adapter]) -> list[Factors]:
    """A (in, r), B (r, out) of one module by adapter; r = 0 for an adapter that lacks it."""
    present = {index: adapter.factors[name] for index, adapter in enumerate(adapters) if name in adapter.factors}
    shapes = sorted({(a.shape[0], b.shape[1]) for a, b in present.values()})
    if len(shapes) > 1:
        raise UserError(f"The adapters map different shapes {shapes} at {name!r}; fuse adapters of one base.")
    for index, factors in present.items():
        if not all(factor.isfinite().all() for factor in factors):
            raise UserError(f"The adapter in {adapters[index].path} holds NaN or infinity at {name!r}; train it again.")
    ((inputs, outputs),) = shapes
    absent = torch.zeros(inputs, 0), torch.zeros(0, outputs)
    return [present.get(index, absent) for index in range(len(adapters))]


def common_fingerprint(adapters: Sequence[Adapter]) -> str | None:
    """The fingerprint all adapters that have one agree on; only recorded if every adapter has it."""
    recorded = {adapter.base_fingerprint: adapter for adapter in adapters if adapter.base_fingerprint is not None}
    if len(recorded) > 1:
        places = " and ".join(str(adapter.path) for adapter in recorded.values())
        raise UserError(f"The adapters in {places} were trained on different bases; fuse adapters of one base.")
    complete = all(adapter.base_fingerprint is not None for adapter in adapters)
    return next(iter(recorded)) if complete else None


def write_adapter(directory: Path, factors: Mapping[str, Factors], like: Adapter, fingerprint: str | None) -> None:
    """Module -> factors as an adapter of PEFT's, of the base and the kind of `like`, with a scaling of 1."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.T.contiguous()  # PEFT stores (r, in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.T.contiguous()  # and (out, r)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    _lora_config({name: a.shape[1] for name, (a, _) in factors.items()}, like).save_pretrained(str(directory))
    if fingerprint is not None:
        write_json(directory / POLICY_CARD, {"base_fingerprint": fingerprint})


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
