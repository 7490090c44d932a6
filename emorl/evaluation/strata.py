"""An evaluation set that moves during a search and still gives scores that can be compared: strata, pools, allocation.

RL-Fusion (Wang et al. 2025, Appl. Sci. 15(4), 2186) adjusts its evaluation set by the search's results and compares scores of
different sets as if they were of one. Departures:

- strata (subjects, topics, skills) keep their weights; only how many items of each are used moves (Neyman 1934);
- in a stratum, items stand in one fixed random order and a prefix of it is used, so that two sets share items;
- the allocation reads scores on the anchor alone, which every candidate sees whole, and the anchor's share of a stratum's mean
  is that of the first set for good. Were it to follow the counts, an allocation that adds items where a candidate looks weak
  would thin out bad luck, keep good luck, and so raise scores;
- the holdout is for the report: the best of many candidates owes part of its score to luck.

Standard errors are those for all questions of the kind, not for these files (no finite population correction): else the error
would be 0 once the pool is used up, as if nothing else could be asked.

Shapes: S strata, N items, O objectives, C candidates. Scores (N, O) are NaN where an item was not seen or could not be scored.

>>> pools = split(stratify(["law"] * 10 + ["art"] * 10), anchor=0.2, adaptive=0.5, seed=0)
>>> first_set(pools, Allocation(total=6))
EvaluationSet(version=0, counts=(3, 3), first=(3, 3))
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scores = NDArray[np.float64]
Items = NDArray[np.int64]

_LEAST_NEED = 1e-9  # of the largest: what no needy stratum can take goes to the others by their weights


@dataclass(frozen=True)
class Strata:
    """Each item's stratum, and the strata's weights, which sum to 1 and never change."""

    names: tuple[str, ...]
    of_item: Items  # (N,)
    weights: Scores  # (S,)


@dataclass(frozen=True)
class Pools:
    """Disjoint items of each stratum in their fixed random order: seen by every candidate, by the allocation's counts, and
    never by the search."""

    strata: Strata
    anchor: tuple[Items, ...]
    adaptive: tuple[Items, ...]
    holdout: tuple[Items, ...]

    def used(self, chosen: "EvaluationSet") -> Items:
        """The items that a candidate is scored on, ascending."""
        prefixes = [items[:count] for items, count in zip(self.adaptive, chosen.counts, strict=True)]
        return np.sort(np.concatenate([*self.anchor, *prefixes]))


@dataclass(frozen=True)
class EvaluationSet:
    """How many adaptive items of each stratum are used; equal versions of one search are equal sets.

    `first` are the counts of version 0: they fix how much the anchor counts in a stratum's mean.
    """

    version: int
    counts: tuple[int, ...]
    first: tuple[int, ...]


@dataclass(frozen=True)
class Allocation:
    """The allocation's settings.

    `total` adaptive items per candidate, at least `floor` of each stratum, moved after every `every` candidates towards
    strata whose scores vary (`deviation`: Neyman's allocation) or are low (`weakness`, for scores in [0, 1]).
    """

    total: int
    floor: int = 1
    by: Literal["deviation", "weakness"] = "deviation"
    every: int = 10

    def __post_init__(self) -> None:
        if min(self.total, self.floor, self.every) < 1:
            raise ValueError(f"expected total, floor and every of at least 1, got {self.total}, {self.floor} and {self.every}")
        if self.by not in ("deviation", "weakness"):
            raise ValueError(f"by: expected deviation or weakness, got {self.by!r}")


@dataclass(frozen=True)
class Estimate:
    """A score, its standard error, both (O,), and what they are made of: mean, standard deviation and number of scored items
    of each stratum, all (S, O). `score` is the weighted sum of `means`."""

    score: Scores
    error: Scores
    means: Scores
    deviations: Scores
    counts: Items


def stratify(labels: Sequence[str], weights: Literal["share", "equal"] | Mapping[str, float] = "share") -> Strata:
    """Strata by name, in sorted order.

    Args:
        labels: the stratum of each item, (N,).
        weights: their shares of the items, all equal, or by name.

    Raises:
        ValueError: given weights that do not name exactly the strata, are not positive or do not sum to 1.
    """
    names, of_item, sizes = np.unique(np.asarray(labels, dtype=str), return_inverse=True, return_counts=True)
    if isinstance(weights, Mapping):
        if set(weights) != set(names.tolist()):
            raise ValueError(f"weights are given for {sorted(weights)}, the strata are {names.tolist()}")
        found = np.array([weights[name] for name in names.tolist()], dtype=float)
    elif weights in ("share", "equal"):
        found = sizes / sizes.sum() if weights == "share" else np.full(len(names), 1 / len(names))
    else:
        raise ValueError(f"weights: expected share, equal or a weight by stratum, got {weights!r}")
    if not (found > 0).all() or not math.isclose(found.sum(), 1, abs_tol=1e-6):
        raise ValueError(f"expected positive weights that sum to 1, got {found.tolist()}")
    return Strata(tuple(names.tolist()), of_item.astype(np.int64), found)


def split(strata: Strata, *, anchor: float, adaptive: float, seed: int) -> Pools:
    """Pools with these shares of every stratum; the rest is the holdout.

    Raises:
        ValueError: impossible shares, or a stratum too small for 2 anchor items (one has no deviation), 1 adaptive one and,
            where the shares leave a holdout, 1 of it.
    """
    if anchor <= 0 or adaptive <= 0 or anchor + adaptive > 1 + 1e-9:
        raise ValueError(f"expected positive shares of anchor and adaptive, at most 1 together, got {anchor} and {adaptive}")
    least = (2, 1, 0 if math.isclose(anchor + adaptive, 1) else 1)
    rng = np.random.default_rng(seed)
    parts = []
    for index, name in enumerate(strata.names):
        items = rng.permutation(np.flatnonzero(strata.of_item == index))
        cuts = [round(anchor * len(items)), round((anchor + adaptive) * len(items))]
        pools = np.split(items, cuts)
        sizes = tuple(len(pool) for pool in pools)
        if any(size < needed for size, needed in zip(sizes, least, strict=True)):
            raise ValueError(
                f"stratum {name!r} has {len(items)} items, {sizes} of them for anchor, adaptive and holdout; expected at "
                f"least {least}: join small strata or change the shares"
            )
        parts.append(pools)
    return Pools(strata, *(tuple(pool) for pool in zip(*parts, strict=True)))


def allocate(total: int, weights: ArrayLike, need: ArrayLike, floor: int, ceilings: ArrayLike) -> Items:
    """Counts (S,) that sum to `total`, proportional to weight times need as far as floor and ceilings allow.

    With standard deviations as need it is Neyman's allocation, the one with the smallest error of the weighted mean for as
    many items; with 1 - mean it follows weakness. Where need is 0 everywhere, the weights decide. Remainders go to the largest
    fractions.

    Args:
        need: (S,), not negative.
        floor: least items of a stratum, or all where it has fewer.
        ceilings: items there are of each stratum, (S,).

    Raises:
        ValueError: fewer items than the floors take, or more than there are; a negative or unknown need.

    >>> allocate(10, [0.5, 0.5], [0.4, 0.1], floor=1, ceilings=[20, 20])
    array([8, 2])
    """
    high, required = np.asarray(ceilings, dtype=float), np.asarray(need, dtype=float)
    low = np.minimum(floor, high)
    if not low.sum() <= total <= high.sum():
        raise ValueError(f"{total} items: the strata take at least {low.sum():.0f} (floor {floor}) and have {high.sum():.0f}")
    if not (required >= 0).all():
        raise ValueError(f"expected needs of at least 0, got {required.tolist()}")
    slope = np.asarray(weights, dtype=float) * np.maximum(required, _LEAST_NEED * (required.max() or 1.0))
    levels = np.unique(np.concatenate([low / slope, high / slope]))  # where a stratum leaves its floor or meets its ceiling
    sums = np.clip(levels[:, None] * slope, low, high).sum(1)  # linear in between, so that the level can be read off
    exact = np.clip(np.interp(total, sums, levels) * slope, low, high)
    counts = np.floor(exact + 1e-6).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: total - counts.sum()]] += 1
    return counts


def first_set(pools: Pools, allocation: Allocation) -> EvaluationSet:
    """Version 0: items by the strata's weights."""
    counts = _counts(pools, allocation, np.ones(len(pools.strata.names)))
    return EvaluationSet(0, counts, counts)


def next_set(current: EvaluationSet, scores: Scores, pools: Pools, allocation: Allocation) -> EvaluationSet:
    """The set for the next candidate: `current`, or one version further where the counts move.

    A function of its arguments alone: called after every candidate, a resumed search comes by the same sets.

    Args:
        scores: (C, N, O) of all candidates so far, of the objectives that may steer; only anchor items are read.
    """
    if len(scores) == 0 or len(scores) % allocation.every:
        return current
    need = np.array([_need(scores[:, items], allocation.by) for items in pools.anchor])
    if allocation.by == "deviation":
        need *= 1 - _anchor_shares(pools, current)  # items can lower the error of the rest only
    if np.isnan(need).any():
        name = pools.strata.names[int(np.isnan(need).argmax())]
        raise ValueError(f"stratum {name!r}: no candidate has enough scored anchor items")
    counts = _counts(pools, allocation, need)
    return current if counts == current.counts else EvaluationSet(current.version + 1, counts, current.first)


def _counts(pools: Pools, allocation: Allocation, need: Scores) -> tuple[int, ...]:
    sizes = [len(items) for items in pools.adaptive]
    return tuple(allocate(allocation.total, pools.strata.weights, need, allocation.floor, sizes).tolist())


def _need(scores: Scores, by: str) -> float:
    """Of one stratum's scores (C, n, O): the root of the mean variance over candidates and objectives, which minimises the
    objectives' mean squared error (Cochran 1977, 5A.4); or 1 - mean."""
    if by == "deviation":
        return math.sqrt(_mean_known(np.stack([_deviation(own) ** 2 for own in scores])))
    mean = _mean_known(scores)
    if not math.isnan(mean) and not 0 <= mean <= 1:
        raise ValueError(f"weakness: expected scores in [0, 1], got the mean {mean:g}")
    return 1 - mean


def _mean_known(values: Scores) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _deviation(scores: Scores) -> Scores:
    """Standard deviation (O,) of the known scores (n, O); NaN of fewer than two."""
    known = (~np.isnan(scores)).sum(0)
    mean = np.nansum(scores, 0) / np.maximum(known, 1)
    return np.sqrt(np.nansum((scores - mean) ** 2, 0) / np.where(known > 1, known - 1, np.nan))


def estimate(scores: Scores, pools: Pools, chosen: EvaluationSet) -> Estimate:
    """The score over all strata by their weights, unbiased whatever counts the anchor's scores led to.

    Raises:
        ValueError: an objective has no score in a stratum's anchor or adaptive items.
    """
    strata = zip(_anchor_shares(pools, chosen), pools.anchor, pools.adaptive, chosen.counts, strict=True)
    parts = [[(share, anchor), (1 - share, adaptive[:count])] for share, anchor, adaptive, count in strata]
    return _estimate(scores, pools.strata, parts)


def _anchor_shares(pools: Pools, chosen: EvaluationSet) -> Scores:
    """How much the anchor counts in each stratum's mean, (S,): by its items in the first set, not in the present one."""
    anchors = np.array([len(items) for items in pools.anchor])
    return anchors / (anchors + np.array(chosen.first))


def holdout_estimate(scores: Scores, pools: Pools) -> Estimate:
    """The score on items that the search has not seen."""
    return _estimate(scores, pools.strata, [[(1.0, items)] for items in pools.holdout])


def paired_difference(
    scores: Scores, others: Scores, pools: Pools, chosen: EvaluationSet, other_chosen: EvaluationSet
) -> Estimate:
    """One candidate less another one over the items of both sets: all where versions are equal, else the shared prefixes.

    Differences are taken item by item, so that items which are hard for both do not add to the error.

    Raises:
        ValueError: the sets are not of one search.
    """
    same = chosen.version == other_chosen.version
    if chosen.first != other_chosen.first or (same and chosen.counts != other_chosen.counts):
        raise ValueError(f"sets of different searches cannot be compared: {chosen} and {other_chosen}")
    shared = tuple(map(min, chosen.counts, other_chosen.counts))
    return estimate(scores - others, pools, EvaluationSet(chosen.version, shared, chosen.first))


def _estimate(scores: Scores, strata: Strata, parts: Sequence[Sequence[tuple[float, Items]]]) -> Estimate:
    """From the parts of each stratum, each with its share of the stratum's mean."""
    means, deviations, counts, variances = [], [], [], []
    for name, own in zip(strata.names, parts, strict=True):
        known = np.array([(~np.isnan(scores[items])).sum(0) for _, items in own])  # (parts, O)
        if not known.all():
            raise ValueError(f"stratum {name!r} has no scored item for one of the objectives")
        shares = np.array([share for share, _ in own])[:, None]
        sums = np.array([np.nansum(scores[items], 0) for _, items in own])
        means.append((shares * sums / known).sum(0))
        deviations.append(_deviation(scores[np.concatenate([items for _, items in own])]))
        counts.append(known.sum(0))
        variances.append(deviations[-1] ** 2 * (shares**2 / known).sum(0))
    weights = strata.weights
    return Estimate(
        score=weights @ np.array(means),
        error=np.sqrt(weights**2 @ np.array(variances)),
        means=np.array(means),
        deviations=np.array(deviations),
        counts=np.array(counts),
    )
