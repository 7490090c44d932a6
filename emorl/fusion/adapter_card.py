"""The model card of a fused adapter: what went in, the settings that make it again, and what was lost on the way."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import yaml

from emorl.fusion.low_rank import LowRank, factor_gram
from emorl.fusion.operators import OPERATORS, Fusion
from emorl.policies.adapters import Adapter

_CARD = """---
{front_matter}---
# {method}: {count} LoRA adapter{plural}

An ordinary PEFT adapter, written by `emorl.fusion.adapters.fuse_adapters` ({versions}); the same adapters and settings
give the same again.
{origin}
| adapter | weight | scale | trained on |
|---|---|---|---|
{sources}

| setting | value |
|---|---|
{settings}

*Retained* is the share of the fused delta's squared Frobenius norm that is left at the rank written: {total:.6f} in all.

| module | fusion | rank | retained |
|---|---|---|---|
{modules}
"""


def adapter_card(
    adapters: Sequence[Adapter],
    fusion: Fusion,
    modules: Mapping[str, LowRank],
    rank: int | None,
    energy: float | None,
    seed: int,
    by_module: Mapping[str, Fusion],
    origin: str,
) -> str:
    """The text of README.md; `by_module` are the modules with a fusion of their own, `origin` who chose the settings."""
    front_matter = {"library_name": "peft", "tags": ["emorl", "lora", "merge", fusion.method]}
    if adapters[0].base_name:
        front_matter["base_model"] = adapters[0].base_name
    settings = {
        "method": fusion.method,
        **OPERATORS[fusion.method].settings,
        **fusion.settings,
        "rank": rank,
        "energy": energy,
        "seed": seed,
    }
    if fusion.method == "slerp":
        settings["space"] = "task_vectors"
    weighted = zip(adapters, fusion.weights, strict=True)
    return _CARD.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False),
        method=fusion.method,
        count=len(adapters),
        plural="s" if len(adapters) > 1 else "",
        versions=", ".join(f"{name} {version(name)}" for name in ("emorl", "torch", "peft")),
        origin=f"\n{origin}\n" if origin else "",
        sources="\n".join(
            f"| {one.path} | {weight} | {one.scale} | {one.base_name or 'not recorded'} |" for one, weight in weighted
        ),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
        total=_kept_in_all(modules),
        modules="\n".join(
            f"| {name} | {_described(by_module.get(name))} | {one.a.shape[1]} | {one.kept_energy:.6f} |"
            for name, one in modules.items()
        ),
    )


def _described(own: Fusion | None) -> str:
    return "as above" if own is None else f"{own.method} {', '.join(f'{weight:g}' for weight in own.weights)}"


def _kept_in_all(modules: Mapping[str, LowRank]) -> float:
    left = {name: float(factor_gram([(one.a, one.b)])) for name, one in modules.items()}
    before = sum(left[name] / one.kept_energy for name, one in modules.items())
    return sum(left.values()) / before if before > 0 else 1.0
