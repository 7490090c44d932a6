"""Intervals of a method's mean score and hypervolume, and of differences between methods, from few seeds and few prompts.

Seeds and prompts are resampled independently of each other (the crossed or pigeonhole bootstrap, Owen 2007), the same ones for
all methods, so that differences are paired. With three seeds an interval is a rough guide. Noise raises a hypervolume, that of
many points more than that of one: a front's is biased upwards, and its interval with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emorl.evaluation.pareto import hypervolume
from emorl.runs.results import Interval

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Offer:
    """What one method offers with one seed: scores (N, P, O) of its points on the same prompts, NaN where nothing could be
    scored; `best` is the point it chose."""

    scores: Scores
    best: int


def resampled(
    offers: Mapping[str, Sequence[Offer]], reference: Sequence[float], resamples: int, seed: int
) -> dict[str, tuple[Scores, Scores]]:
    """Method -> mean score of its best point, and hypervolume of all its points, both (R + 1,): first as measured, then of each
    resample; averaged over seeds.

    Args:
        offers: of each method, one for each seed in the same order, all on the same prompts.
        reference: the hypervolumes' point, (O,).
    """
    first = next(iter(offers.values()))
    seeds, prompts = len(first), first[0].scores.shape[1]
    rng = np.random.default_rng(seed)
    of_seeds, of_prompts = drawn_shares(rng, seeds, resamples), drawn_shares(rng, prompts, resamples)
    return {method: _statistics(of_method, of_seeds, of_prompts, reference) for method, of_method in offers.items()}


def drawn_shares(rng: np.random.Generator, count: int, resamples: int) -> Scores:
    """How much each of `count` things weighs, (R + 1, count): all alike, then as drawn in each resample."""
    return np.vstack([np.ones(count), rng.multinomial(count, np.full(count, 1 / count), resamples)]) / count


def _statistics(
    offers: Sequence[Offer], of_seeds: Scores, of_prompts: Scores, reference: Sequence[float]
) -> tuple[Scores, Scores]:
    """Both statistics (R,) under weights of seeds (R, S) and of prompts (R, P)."""
    means, volumes = [], []
    for index, offer in enumerate(offers):
        points = _means(offer.scores, of_prompts)  # (R, N, O)
        means.append(points[:, offer.best].mean(-1))
        drawn = of_seeds[:, index] > 0  # the others count nothing
        volumes.append(np.array([hypervolume(p, reference) if used else 0.0 for p, used in zip(points, drawn, strict=True)]))
    return np.einsum("rs,sr->r", of_seeds, np.array(means)), np.einsum("rs,sr->r", of_seeds, np.array(volumes))


def _means(scores: Scores, of_prompts: Scores) -> Scores:
    """Means (R, N, O) over the prompts that have a score, of scores (N, P, O) and weights of the prompts (R, P)."""
    known = ~np.isnan(scores)
    total = np.einsum("rp,npo->rno", of_prompts, np.where(known, scores, 0.0))
    return total / np.einsum("rp,npo->rno", of_prompts, known.astype(float))


def difference(first: Scores, other: Scores) -> Interval:
    """Of two statistics (R + 1,) of `resampled`."""
    gap = first - other
    low, high = np.quantile(gap[1:], [0.025, 0.975])
    return Interval(float(gap[0]), float(low), float(high), float((gap[1:] > 0).mean()))
