"""Weights as a caller gives them, by name or in policy order, for all sequences or for each: read, checked, and remarked on."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emorl.config import UserError, nearest

logger = logging.getLogger(__name__)

Vector = Sequence[float] | Mapping[str, float]
"""one weight for each policy: in policy order (K,), or by name"""

Weights = Vector | Sequence[Vector] | Tensor


def in_order(weights: Any, names: Sequence[str]) -> Any:
    """Weights by policy name, or a sequence of such mappings, as numbers in policy order; what is not named is 0."""
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in names]
        if unknown:
            raise UserError(f"weights name {unknown[0]!r}, which is no policy; {nearest(unknown[0], names)}")
        return [float(weights.get(name, 0.0)) for name in names]
    if isinstance(weights, Sequence) and any(isinstance(row, Mapping) for row in weights):
        return [in_order(row, names) for row in weights]
    return weights


def weight_rows(weights: Weights, batch: int, names: Sequence[str], may_be_negative: bool) -> Tensor:
    """Checked weights (B, K) in float32.

    Raises:
        ValueError: another shape, numbers that are not finite, a row of zeros, negative ones where they may not be.
    """
    rows = torch.as_tensor(in_order(weights, names), dtype=torch.float32)
    policies = len(names)
    if tuple(rows.shape) not in ((policies,), (batch, policies)):
        raise ValueError(
            f"Got weights of shape {tuple(rows.shape)}; expected {(policies,)}, one for each policy of "
            f"{list(names)}, or {(batch, policies)}, one such row for each sequence."
        )
    rows = rows.expand(batch, policies)
    if not bool(rows.isfinite().all()):
        raise ValueError(f"Got weights {rows.tolist()}; expected finite numbers.")
    if bool((rows == 0).all(1).any()):
        raise ValueError(f"Got weights {rows.tolist()}; a row of zeros gives no policy any weight.")
    if not may_be_negative and bool((rows < 0).any()):
        raise ValueError(f"Got weights {rows.tolist()}; expected at least 0: to subtract, set include_base=True.")
    return rows


def active_policies(rows: Tensor) -> tuple[int, ...]:
    """Those that have any weight in rows (B, K)."""
    return tuple((rows != 0).any(0).nonzero().flatten().tolist())


def say_other_sum(rows: Tensor) -> bool:
    """Says what it does that weights (B, K) do not sum to 1; whether there was anything to say."""
    sums = rows.sum(1)
    off = sums[(sums - 1).abs() > 1e-3].tolist()
    if off:
        logger.warning("weights sum to %.3g, not 1: greedy decoding heeds their direction only; sampling gets sharper", off[0])
    return bool(off)
