"""Candidates that say, layer by layer, which policy's adapter counts there, or which merge of all: RMM's merging maps
(arXiv 2503.21272) of LoRA policies. Depth stays, so that the result is an adapter of the same base."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution

from emorl.config import UserError
from emorl.fusion.merging_map import MergingSpace
from emorl.fusion.operators import Fusion
from emorl.search.study import Params

_LAYER = re.compile(r"^(?P<stack>.*?\b(?:layers?|h|blocks?))\.(?P<number>\d+)\.")


@dataclass(frozen=True)
class LayerSpace:
    """One column for each layer: a policy alone, or one of `methods` with equal weights. Modules outside all layers have the
    first method's.

    Args:
        modules: names of the adapted modules.
    """

    policies: tuple[str, ...]
    methods: tuple[str, ...]
    modules: tuple[str, ...]

    @property
    def columns(self) -> dict[str, Fusion]:
        """Name -> what it does to a layer."""
        alone = {name: Fusion("keep", tuple(float(name == other) for other in self.policies)) for name in self.policies}
        return {**alone, **{method: Fusion(method, (1 / len(self.policies),) * len(self.policies)) for method in self.methods}}

    @property
    def layers(self) -> list[tuple[str, int]]:
        """(stack, number) of each layer, an encoder's before a decoder's."""
        found = dict.fromkeys(layer for module in self.modules if (layer := _layer_of(module)) is not None)
        if not found:
            raise UserError(f"no layers among the adapted modules, such as {self.modules[0]!r}: plans need layers")
        stacks = sorted(dict.fromkeys(stack for stack, _ in found), key=lambda stack: "decoder" in stack)
        return sorted(found, key=lambda layer: (stacks.index(layer[0]), layer[1]))

    @property
    def merging(self) -> MergingSpace:
        return MergingSpace(len(self.columns), len(self.layers))

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return dict(self.merging.distributions)

    def canonical(self, params: Params) -> Params | None:
        return self.merging.canonical(params)

    def corners(self) -> Sequence[Params]:
        """Each column alone."""
        return self.merging.corners()

    def vector(self, params: Params) -> Sequence[float]:
        return self.merging.vector(params)

    def fusion_of(self, params: Params) -> Callable[[str], Fusion]:
        """A module's name -> what the candidate does to it."""
        columns, at = list(self.columns.values()), {layer: index for index, layer in enumerate(self.layers)}
        plan = self.merging.plan(params)
        assert plan is not None, "a candidate"
        chosen = [columns[column] for _, column in plan]
        outside = self.columns[self.methods[0]]

        def fusion_of(module: str) -> Fusion:
            layer = _layer_of(module)
            return outside if layer is None else chosen[at[layer]]

        return fusion_of

    def describe(self, params: Params) -> dict[str, Any]:
        """For `result.json`: the column of each layer."""
        names, plan = list(self.columns), self.merging.plan(params)
        assert plan is not None, "a candidate"
        return {
            "layers": {
                f"{stack}.{number}": names[column] for (stack, number), (_, column) in zip(self.layers, plan, strict=True)
            }
        }

    def in_words(self, params: Params) -> str:
        """The columns of the layers, from the first to the last, such as `slerp, 2 x empathy, slerp`."""
        runs = [(name, len(list(same))) for name, same in itertools.groupby(self.describe(params)["layers"].values())]
        return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in runs)


def _layer_of(module: str) -> tuple[str, int] | None:
    matched = _LAYER.match(f"{module}.")
    return None if matched is None else (matched["stack"], int(matched["number"]))
