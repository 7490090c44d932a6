"""How much of a gain is kept: the ensemble's over its soup, by one adapter, with intervals of resampled prompts.

The share of a gain that may be nothing is no number: where the gain's interval holds 0, there is none. Systems answer the same
prompts, and are resampled together. Open-MOPD (arXiv 2608.19098) reports such a share of a routed ensemble's gain.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from emorl.evaluation.bootstrap import drawn_shares
from emorl.runs.results import Retention

ENSEMBLE, SOUP, DISTILLED = "ensemble", "soup", "distilled"
SYSTEMS = (ENSEMBLE, SOUP, DISTILLED)

Table = NDArray[np.float64]


def kept_value(scores: Mapping[str, Table], importance: Sequence[float], resamples: int, seed: int) -> Retention:
    """Of the value, the mean of the objectives with their importance (O,).

    Args:
        scores: of each of `SYSTEMS`, (P, O); prompts with a NaN are left out.
    """
    shares = np.asarray(importance)
    counted = shares > 0
    values = {name: table[:, counted] @ shares[counted] for name, table in scores.items()}  # (P,)
    known = ~np.isnan(np.array([values[name] for name in SYSTEMS])).any(0)
    if not known.any():
        return Retention(math.nan, math.nan, math.nan, None, None, None)
    drawn = drawn_shares(np.random.default_rng(seed), int(known.sum()), resamples)  # (R + 1, P)
    ensemble, soup, distilled = (drawn @ values[name][known] for name in SYSTEMS)
    return _retention(ensemble - soup, distilled - soup)


def kept_divergence(soup: Table, distilled: Table, resamples: int, seed: int) -> Retention:
    """Of the divergence: the ensemble's gain is all that its soup is away from it.

    Args:
        soup, distilled: nats from the ensemble and tokens of each prompt, (P, 2).
    """
    drawn = drawn_shares(np.random.default_rng(seed), len(soup), resamples)
    soups, students = (_per_token(drawn, table) for table in (soup, distilled))
    return _retention(soups, soups - students)


def _per_token(drawn: Table, table: Table) -> Table:
    """Nats per token (R + 1,) of nats and tokens (P, 2), under weights of the prompts (R + 1, P)."""
    nats, tokens = (drawn @ table).T
    return nats / tokens


def _retention(gain: Table, kept: Table) -> Retention:
    """Of a gain and what is kept of it, (R + 1,): first as measured."""
    low, high = (float(bound) for bound in np.quantile(gain[1:], [0.025, 0.975]))
    if low <= 0 <= high:
        return Retention(float(gain[0]), low, high, None, None, None)
    has_gain = gain[1:] != 0  # few prompts, drawn again and again, may have none
    bounds = np.quantile(kept[1:][has_gain] / gain[1:][has_gain], [0.025, 0.975])
    return Retention(float(gain[0]), low, high, float(kept[0] / gain[0]), float(bounds[0]), float(bounds[1]))
