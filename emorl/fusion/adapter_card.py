"""The model card of a fused adapter: what went in, the settings that make it again, and what was lost on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class AdapterFusion:
    """What is asked for: a fusion of all modules, others of some, a rank or an energy to keep, the seed of random masks;
    `origin` says who chose the settings."""

    fusion: Fusion
    by_module: Mapping[str, Fusion] = field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    seed: int = 0
    origin: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is cut off what the method gives."""
        return self.rank is None and self.energy is None

    def fusion_of(self, module: str) -> Fusion:
        return self.by_module.get(module, self.fusion)


def adapter_card(adapters: Sequence[Adapter], wanted: AdapterFusion, modules: Mapping[str, LowRank]) -> str:
    """The text of README.md."""
    fusion = wanted.fusion
    front_matter = {"library_name": "peft", "tags": ["emorl", "lora", "merge", fusion.method]}
    if adapters[0].base_name:
        front_matter["base_model"] = adapters[0].base_name
    settings = {
        "method": fusion.method,
        **OPERATORS[fusion.method].complete(fusion.settings),
        "rank": wanted.rank,
        "energy": wanted.energy,
        "seed": wanted.seed,
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
        origin=f"\n{wanted.origin}\n" if wanted.origin else "",
        sources="\n".join(
            f"| {adapter.path} | {weight} | {adapter.scale} | {adapter.base_name or 'not recorded'} |"
            for adapter, weight in weighted
        ),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items() if value is not None),
        total=kept_in_all(modules),
        modules="\n".join(
            f"| {name} | {_described(wanted.by_module.get(name))} | {module.a.shape[1]} | {module.kept_energy:.6f} |"
            for name, module in modules.items()
        ),
    )


def _described(fusion: Fusion | None) -> str:
    return "as above" if fusion is None else f"{fusion.method} {', '.join(f'{weight:g}' for weight in fusion.weights)}"


def kept_in_all(modules: Mapping[str, LowRank]) -> float:
    """The share of the squared Frobenius norm that all modules together keep of what they approximate."""
    left = {name: float(factor_gram([(module.a, module.b)])) for name, module in modules.items()}
    before = sum(left[name] / module.kept_energy for name, module in modules.items())
    return sum(left.values()) / before if before > 0 else 1.0
