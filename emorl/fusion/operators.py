"""Fusion operators: one tensor of several models becomes one tensor. Any float dtype in, float32 out.

Linear mixing, SLERP, Karcher means and Model Stock are all weighted sums, whose coefficients depend on the tensors only through
their inner products. TIES and DARE work entry by entry, on task vectors (a model less its base). `fuse_tensor` is the one door;
`OPERATORS` is the registry behind it, of the methods in `emorl/fusion/methods/`.
"""

import textwrap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emorl.config import UserError, nearest
from emorl.fusion.chunks import combine, gram
from emorl.fusion.methods.dare import DARE_LINEAR, DARE_TIES
from emorl.fusion.methods.linear import KEEP, LINEAR, TASK_ARITHMETIC
from emorl.fusion.methods.method import EntryWise, Products, WeightedSum, is_number
from emorl.fusion.methods.model_stock import MODEL_STOCK
from emorl.fusion.methods.spherical import SLERP, TASK_VECTORS
from emorl.fusion.methods.ties import TIES

OPERATORS: dict[str, WeightedSum | EntryWise] = {
    "linear": LINEAR,
    "task_arithmetic": TASK_ARITHMETIC,
    "slerp": SLERP,
    "ties": TIES,
    "dare_linear": DARE_LINEAR,
    "dare_ties": DARE_TIES,
    "model_stock": MODEL_STOCK,
    "keep": KEEP,
}
"""name -> method"""

_PAGE = """# Fusion methods

`emorl fuse --methods` prints this page. `method` and `settings` stand in the `fuse` block of an experiment,
whose policies always have a base, or in a file of checkpoints. A task vector is a model less its base. Behind
the name of a setting: its default, what it is, and what is allowed.
"""
_RANK = {
    WeightedSum: "exact, at the sum of their ranks, or cut",
    EntryWise: "of full rank, cut to the sum of their ranks, or",
}
_MOST_WORKERS = 4  # each holds tensors, and more gain little


@dataclass(frozen=True)
class Fusion:
    """How one tensor is fused: the method's name, one weight for each model, and the method's settings."""

    method: str
    weights: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_base(self) -> bool:
        """Whether task vectors are fused."""
        return OPERATORS[self.method].needs_base or self.settings.get("space") == TASK_VECTORS


def check_fusion(fusion: Fusion, models: int, has_base: bool) -> None:
    """Raises UserError for an unknown method or setting, a number out of range, or a base that is missing."""
    method = fusion.method
    if method not in OPERATORS:
        raise UserError(f"no fusion method is called {method!r}; {nearest(method, OPERATORS)}")
    operator = OPERATORS[method]
    for name, value in fusion.settings.items():
        setting = operator.settings.get(name)
        if setting is None:
            raise UserError(f"{method} has no setting {name!r}; {_place_of(name, operator.settings)}")
        if not setting.allows(value, models):
            raise UserError(f"{method}: {name} is {setting.meaning}, {setting.expected}; got {value!r}")
    if fusion.needs_base and not has_base:
        raise UserError(f"{method} works on differences to a base model: name one")
    if models < operator.least_models or len(fusion.weights) != models:
        raise UserError(
            f"{method}: got {len(fusion.weights)} weights for {models} models; it takes one per model, of at least "
            f"{operator.least_models}"
        )
    if not all(is_number(weight) for weight in fusion.weights):
        raise UserError(f"{method}: weights must be finite, got {list(fusion.weights)}")
    coefficients_of(fusion, lambda: torch.eye(models, dtype=torch.float64))  # raises what the method itself refuses


def _place_of(name: str, settings: Mapping[str, Any]) -> str:
    others = ", ".join(method for method, other in OPERATORS.items() if name in other.settings)
    return f"take it out of the settings (it is one of {others})" if others else nearest(name, settings)


def coefficients_of(fusion: Fusion, products: Products) -> list[float] | None:
    """(K,) of the weighted sum of tensors with these inner products; None for a method that works entry by entry."""
    operator = OPERATORS[fusion.method]
    if isinstance(operator, EntryWise):
        return None
    return operator.coefficients(products, fusion.weights, **operator.complete(fusion.settings))


def fuse_tensor(
    fusion: Fusion,
    tensors: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    name: str = "",
    seed: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The fused tensor in float32, of the same shape.

    >>> fuse_tensor(Fusion("linear", (3.0, 1.0)), [torch.zeros(2), torch.ones(2)])
    tensor([0.2500, 0.2500])

    Args:
        name: of the tensor; random masks depend on it and on `seed`, so any tensor can be fused again alone.
        out: contiguous float32 that the result is written to; none of the tensors it is made of.
    """
    operator = OPERATORS[fusion.method]
    if isinstance(operator, EntryWise):
        seeds = [zlib.crc32(f"{seed}/{index}/{name}".encode()) for index in range(len(tensors))]
        fused = operator.fuse(tensors, fusion.weights, base, seeds, **operator.complete(fusion.settings))
        return fused if out is None else out.copy_(fused)
    origin = base if fusion.needs_base else None
    coefficients = operator.coefficients(lambda: gram(tensors, origin), fusion.weights, **operator.complete(fusion.settings))
    return combine(tensors, coefficients, origin, out)


def methods_markdown() -> str:
    """The page of all methods and their settings, made of the registry."""
    return "\n".join([_PAGE, *(_section(name, operator) for name, operator in OPERATORS.items())])


def _section(name: str, operator: WeightedSum | EntryWise) -> str:
    facts = {
        "paper": operator.paper or "none",
        "base": "needed" if operator.needs_base else "not needed",
        "models": f"{operator.least_models} or more",
        "adapters": f"{_RANK[type(operator)]} to `rank` or `energy`",
    }
    settings = {
        f"`{setting_name}` ({str(setting.default).lower()})": f"{setting.meaning}; {setting.expected}"
        for setting_name, setting in operator.settings.items()
    }
    items = (_wrapped(f"- {key}: {text}", "  ") for key, text in {**facts, **settings}.items())
    return "\n".join([f"## {name}", "", _wrapped(operator.summary), "", *items, ""])


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 110, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


@contextmanager
def tensor_workers() -> Iterator[Executor]:
    """Threads to fuse a tensor each. Torch's own, off inside the block, wait for each other after each of the many small
    operations, which takes 20 times as long where other processes keep a core busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(min(threads, _MOST_WORKERS))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
