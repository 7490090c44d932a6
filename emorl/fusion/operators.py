"""Fusion operators: one tensor of several models becomes one tensor. Pure functions; any float dtype in, float32 out.

Linear mixing, SLERP, Karcher means and Model Stock are all linear combinations, whose coefficients depend on the tensors only
through their inner products (`gram`). TIES and DARE work entry by entry, on task vectors (a model less its base).
`fuse_tensor` is the one door; `OPERATORS` is the registry behind it.
"""

import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emorl.config import UserError, nearest

_CHUNK = 1 << 16  # entries worked on at once: they stay in the processor's cache
_MOST_WORKERS = 4  # each holds tensors, and more gain little
_PARALLEL = 0.9995  # |cosine| from which SLERP is linear, as in mergekit
_KARCHER_ROUNDS, _KARCHER_TOLERANCE = 50, 1e-12

Density = float | Sequence[float]
"""share of the entries of a task vector that are kept, in (0, 1]; one for all models, or one for each"""


@dataclass(frozen=True)
class Fusion:
    """How one tensor is fused: the method's name, one weight for each model, and the method's settings."""

    method: str
    weights: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operator:
    """A method: its function, whether it needs the base model, and how many models it takes at least."""

    function: Callable[..., Tensor]
    needs_base: bool
    least_models: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """Names and defaults of what can be set."""
        parameters = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY and one.name not in _GIVEN}


_GIVEN = ("base", "seeds", "out")  # comes from the caller, not from the settings


def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, out: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Weighted sum; with `normalize` divided by the sum of the weights (model soups, arXiv 2203.05482)."""
    return combine(tensors, _normalized(weights) if normalize else weights, out=out)


def task_arithmetic(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    out: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """base + scale * sum w_i tau_i (arXiv 2212.04089, which finds a scale of 0.3 to 0.4 best for many tasks)."""
    return combine(tensors, [scale * weight for weight in (_normalized(weights) if normalize else weights)], base, out)


def slerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    out: Tensor | None = None,
    space: str = "weights",
) -> Tensor:
    """Along the arc between two tensors, from the first (t = 0) to the second; t is the second's share of the weights.

    Nearly parallel tensors (|cosine| > 0.9995: whole weights of most fine-tunes) are mixed linearly; in `space` task_vectors
    the arc is between the changes to the base, which are near-orthogonal. More than two tensors: the weighted Karcher mean
    on the sphere, its length the weighted mean of theirs; for two of equal length that is the same.
    """
    if space not in ("weights", "task_vectors"):
        raise UserError(f"space {space!r}: expected 'weights' or 'task_vectors'")
    if space == "task_vectors" and base is None:
        raise UserError("space 'task_vectors' needs a base model")
    origin = base if space == "task_vectors" else None
    products = gram(tensors, origin)
    coefficients = slerp_coefficients if len(tensors) == 2 else karcher_coefficients
    return combine(tensors, coefficients(products, _normalized(weights)), origin, out)


def ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    density: Density = 0.2,
    scale: float = 1.0,
    normalize: bool = True,
    thresholds: Sequence[float] | None = None,
) -> Tensor:
    """TIES (arXiv 2306.01708): trim each task vector to its largest entries, elect a sign per entry, mean of those that agree.

    Trims this tensor to its share `density` (mergekit; the authors trim the whole model: pass that `thresholds`, one
    magnitude per model). The sign is that of the weighted sum, a sum of exactly 0 is positive (the authors: the majority's).
    `normalize` divides by the weights of those that agree; without it they are summed.
    """
    if thresholds is None:
        thresholds = [trim_threshold(tensor, base, one) for tensor, one in zip(tensors, _each(density, tensors), strict=True)]
    floors = torch.tensor(thresholds, dtype=torch.float32)[:, None]  # (K, 1)
    return _merge_signs(tensors, base, weights, scale, normalize, lambda deltas, part: deltas.mul_(deltas.abs().ge_(floors)))


def dare_linear(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    seeds: Sequence[int],
    density: Density = 0.5,
    scale: float = 1.0,
) -> Tensor:
    """DARE (arXiv 2311.03099): entries of task vectors survive with probability `density` and are divided by it; then their
    weighted sum. (mergekit scales them to the L1 norm they had, which is the same in expectation only.)"""
    keep = _random_masks(tensors, density, seeds)
    total = torch.empty(tensors[0].numel())
    factors = torch.tensor(weights, dtype=torch.float32) * scale / torch.tensor(_each(density, tensors))  # (K,)
    for part, deltas in _chunks(tensors, base):
        total[part] = factors @ deltas.mul_(keep[:, part])
        total[part] += base.flatten()[part]
    return total.view(tensors[0].shape)


def dare_ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor,
    seeds: Sequence[int],
    density: Density = 0.5,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """DARE's random entries instead of TIES' largest ones, then TIES' election and mean."""
    keep, shares = _random_masks(tensors, density, seeds), torch.tensor(_each(density, tensors))[:, None]  # (K, N), (K, 1)
    return _merge_signs(tensors, base, weights, scale, normalize, lambda deltas, part: deltas.mul_(keep[:, part]).div_(shares))


def model_stock(tensors: Sequence[Tensor], weights: Sequence[float], *, base: Tensor, out: Tensor | None = None) -> Tensor:
    """Model Stock (arXiv 2403.19522): from the base towards the mean of the models, as far as their task vectors agree.

    t = K cos / (1 + (K - 1) cos) with the mean cosine between task vectors. All models count alike.
    """
    if len(set(weights)) > 1:
        raise UserError(f"model_stock treats all models alike: leave the weights out; got {list(weights)}")
    return combine(tensors, stock_coefficients(gram(tensors, base)), base, out)


def keep_one(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The tensor of the one model whose weight is not 0."""
    chosen = [index for index, weight in enumerate(weights) if weight != 0]
    if len(chosen) != 1:
        raise UserError(f"keep takes one model, whose weight alone is not 0; got the weights {list(weights)}")
    return tensors[chosen[0]].float()


OPERATORS = {
    "linear": Operator(linear, needs_base=False),
    "task_arithmetic": Operator(task_arithmetic, needs_base=True),
    "slerp": Operator(slerp, needs_base=False, least_models=2),
    "ties": Operator(ties, needs_base=True),
    "dare_linear": Operator(dare_linear, needs_base=True),
    "dare_ties": Operator(dare_ties, needs_base=True),
    "model_stock": Operator(model_stock, needs_base=True, least_models=2),
    "keep": Operator(keep_one, needs_base=False),
}
"""method -> operator"""


def check_fusion(fusion: Fusion, models: int, has_base: bool) -> None:
    """Raises UserError for an unknown method or setting, a number out of range, or a base that is missing."""
    operator = OPERATORS.get(fusion.method)
    if operator is None:
        raise UserError(f"no fusion method is called {fusion.method!r}; {nearest(fusion.method, OPERATORS)}")
    for name in fusion.settings:
        if name not in operator.settings:
            others = ", ".join(method for method, other in OPERATORS.items() if name in other.settings)
            remedy = f"take it out of the settings (it is one of {others})" if others else nearest(name, operator.settings)
            raise UserError(f"{fusion.method} has no setting {name!r}; {remedy}")
    if operator.needs_base and not has_base:
        raise UserError(f"{fusion.method} works on differences to a base model: name one")
    if models < operator.least_models or len(fusion.weights) != models:
        raise UserError(
            f"{fusion.method}: got {len(fusion.weights)} weights for {models} models; it takes one per model, of at least "
            f"{operator.least_models}"
        )
    if fusion.method == "keep" and sum(weight != 0 for weight in fusion.weights) != 1:
        raise UserError(f"keep takes one model, whose weight alone is not 0; got the weights {list(fusion.weights)}")
    numbers = [*fusion.weights, *(value for value in fusion.settings.values() if isinstance(value, float | int))]
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{fusion.method}: weights and settings must be finite, got {numbers}")
    given = fusion.settings.get("density", 1.0)
    densities = [given] if isinstance(given, float | int) else list(given)
    if len(densities) not in (1, models) or not all(0 < density <= 1 for density in densities):
        raise UserError(
            f"{fusion.method}: density is the share of entries kept, in (0, 1], for all models or each; got {given}"
        )


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
    given: dict[str, Any] = {}
    parameters = inspect.signature(operator.function).parameters
    if "base" in parameters:
        given["base"] = base
    if "seeds" in parameters:
        given["seeds"] = [zlib.crc32(f"{seed}/{index}/{name}".encode()) for index in range(len(tensors))]
    if "out" in parameters:
        given["out"] = out
    fused = operator.function(tensors, fusion.weights, **given, **fusion.settings)
    return fused if out is None or fused is out else out.copy_(fused)


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


def gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Inner products (K, K) in float64 of the tensors, or of their differences to `base`."""
    products = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for _, vectors in _chunks(tensors, base):
        products += (vectors @ vectors.T).double()
    return products


def combine(
    tensors: Sequence[Tensor], coefficients: Sequence[float], base: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """sum c_i x_i, or base + sum c_i (x_i - base); in `out`, if that is given."""
    fused = torch.empty(tensors[0].shape) if out is None else out
    flat = fused.view(-1)
    for part, vectors in _views(tensors) if base is None else _chunks(tensors, base):
        entries = flat[part]
        torch.mul(vectors[0], coefficients[0], out=entries)
        for vector, coefficient in zip(vectors[1:], coefficients[1:], strict=True):
            entries.add_(vector, alpha=coefficient)
        if base is not None:
            entries += base.flatten()[part]
    return fused


def slerp_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """Of SLERP between two tensors with inner products (2, 2); the weights sum to 1."""
    first, second = weights
    norms = products.diagonal().sqrt()
    if norms.min() == 0:
        return [first, second]
    cosine = float(products[0, 1] / norms.prod())
    if abs(cosine) > _PARALLEL:
        return [first, second]
    angle = math.acos(cosine)
    return [math.sin(first * angle) / math.sin(angle), math.sin(second * angle) / math.sin(angle)]


def karcher_coefficients(products: Tensor, weights: Sequence[float]) -> list[float]:
    """Of the weighted Karcher mean on the sphere of K tensors with inner products (K, K), times the weighted mean of their
    lengths. The mean is a combination of the tensors, so only its coefficients are iterated."""
    norms = products.diagonal().sqrt().numpy()
    share = np.asarray(weights)
    if norms[share != 0].min() == 0:
        return list(weights)  # no direction: linear
    lengths = np.where(norms > 0, norms, 1.0)
    cosines = products.numpy() / np.outer(lengths, lengths)
    mean = share / math.sqrt(share @ cosines @ share) if share @ cosines @ share > 0 else np.eye(len(share))[share.argmax()]
    for _ in range(_KARCHER_ROUNDS):
        towards = np.clip(cosines @ mean, -1.0, 1.0)  # of each unit vector with the mean
        angles = np.arccos(towards)
        ratio = share / np.sinc(angles / np.pi)  # w_i angle_i / sin(angle_i)
        tangent = ratio - (ratio @ towards) * mean
        length = math.sqrt(max(0.0, tangent @ cosines @ tangent))
        if length < _KARCHER_TOLERANCE:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
    return (share @ norms * mean / lengths).tolist()


def stock_coefficients(products: Tensor) -> list[float]:
    """Of Model Stock for task vectors with inner products (K, K)."""
    count = len(products)
    norms = products.diagonal().sqrt().clamp(min=1e-150)  # a product of two is no 0
    cosines = products / torch.outer(norms, norms)
    cosine = float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))
    share = count * cosine / (1 + (count - 1) * cosine)
    return [share / count] * count


def trim_threshold(tensor: Tensor, base: Tensor, density: float) -> float:
    """The smallest magnitude among the share `density` of largest entries of the task vector; 0 where all are kept."""
    if density >= 1:
        return 0.0
    magnitudes = np.empty(tensor.numel(), np.float32)
    for part, deltas in _chunks([tensor], base):
        torch.abs(deltas[0], out=torch.from_numpy(magnitudes[part]))
    kept = max(1, int(density * len(magnitudes)))
    magnitudes.view(np.int32).partition(len(magnitudes) - kept)  # bits are ordered like the numbers, and faster to compare
    return float(magnitudes[len(magnitudes) - kept])


def _merge_signs(
    tensors: Sequence[Tensor],
    base: Tensor,
    weights: Sequence[float],
    scale: float,
    normalize: bool,
    sparsify: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """TIES' election and disjoint merge of task vectors that `sparsify` has thinned out, in place, chunk by chunk.

    Comparisons are in place, that is 0.0 or 1.0: torch takes five times as long over tensors of bool."""
    factors, one = torch.tensor(weights, dtype=torch.float32), torch.ones(())  # (K,)
    total = torch.empty(tensors[0].numel())
    for part, deltas in _chunks(tensors, base):
        weighted = sparsify(deltas, part).mul_(factors[:, None])  # (K, n)
        sign = torch.copysign(one, weighted.sum(0))  # (n,)
        agreeing = weighted.mul_(sign).clamp_(min=0)  # (K, n), magnitudes
        merged = agreeing.sum(0).mul_(sign)
        if normalize:
            divisor = torch.mv(agreeing.gt_(0).T, factors)
            merged /= divisor.add_(divisor.abs().lt_(1e-8))  # 1 where none agree
        total[part] = merged.mul_(scale).add_(base.flatten()[part])
    return total.view(tensors[0].shape)


def _parts(entries: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, entries)) for start in range(0, entries, _CHUNK))


def _views(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Parts of the flattened tensors in float32, K of (n,): the tensors' own memory where they have that type."""
    flat = [tensor.flatten() for tensor in tensors]
    for part in _parts(flat[0].numel()):
        yield part, [vector[part].float() for vector in flat]


def _chunks(tensors: Sequence[Tensor], base: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the flattened tensors as float32 rows (K, n), less the base's: a new block each, free to be changed."""
    flat = [tensor.flatten() for tensor in tensors]
    flat_base = None if base is None else base.flatten()
    for part in _parts(flat[0].numel()):
        rows = torch.empty(len(flat), part.stop - part.start)
        for row, vector in zip(rows, flat, strict=True):
            row.copy_(vector[part])
        yield part, rows if flat_base is None else rows.sub_(flat_base[part].float())


def _each(density: Density, tensors: Sequence[Tensor]) -> list[float]:
    return [density] * len(tensors) if isinstance(density, float | int) else list(density)


def _random_masks(tensors: Sequence[Tensor], density: Density, seeds: Sequence[int]) -> Tensor:
    """(K, N) of bool."""
    masks = torch.empty(len(tensors), tensors[0].numel(), dtype=torch.bool)
    for mask, share, seed in zip(masks, _each(density, tensors), seeds, strict=True):
        mask.bernoulli_(share, generator=torch.Generator().manual_seed(seed))
    return masks


def _normalized(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    if abs(total) < 1e-8:
        raise UserError(f"the weights {list(weights)} sum to 0 and cannot be normalised")
    return [weight / total for weight in weights]
