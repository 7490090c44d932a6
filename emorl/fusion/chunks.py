"""Tensors of several models in chunks that stay in the processor's cache: their inner products and weighted sums."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 16  # entries


def gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Inner products (K, K) in float64 of the tensors, or of their differences to `base`."""
    products = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
    for _, vectors in chunks(tensors, base):
        products += (vectors @ vectors.T).double()
    return products


def combine(
    tensors: Sequence[Tensor], coefficients: Sequence[float], base: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """sum c_i x_i, or base + sum c_i (x_i - base); in `out`, if that is given. A tensor whose coefficient is 0 is not read."""
    fused = torch.empty(tensors[0].shape) if out is None else out
    flat = fused.view(-1)
    terms = [(tensor, factor) for tensor, factor in zip(tensors, coefficients, strict=True) if factor != 0]
    read, (first, *others) = zip(*(terms or [(tensors[0], 0.0)]), strict=True)
    for part, vectors in _views(read) if base is None else chunks(read, base):
        entries = flat[part]
        torch.mul(vectors[0], first, out=entries)
        for vector, coefficient in zip(vectors[1:], others, strict=True):
            entries.add_(vector, alpha=coefficient)
        if base is not None:
            entries += base.flatten()[part]
    return fused


def chunks(tensors: Sequence[Tensor], base: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the flattened tensors as float32 rows (K, n), less the base's: a new block each, free to be changed."""
    flat = [tensor.flatten() for tensor in tensors]
    flat_base = None if base is None else base.flatten()
    for part in _parts(flat[0].numel()):
        rows = torch.empty(len(flat), part.stop - part.start)
        for row, vector in zip(rows, flat, strict=True):
            row.copy_(vector[part])
        yield part, rows if flat_base is None else rows.sub_(flat_base[part].float())


def _views(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Parts of the flattened tensors in float32, K of (n,): the tensors' own memory where they have that type."""
    flat = [tensor.flatten() for tensor in tensors]
    for part in _parts(flat[0].numel()):
        yield part, [vector[part].float() for vector in flat]


def _parts(entries: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, entries)) for start in range(0, entries, _CHUNK))
