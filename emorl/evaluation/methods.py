"""Methods at equal budgets, from the tables of their scored completions: points, seeds, differences with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emorl.evaluation.bootstrap import Offer, difference, resampled
from emorl.evaluation.pareto import hypervolume, reference_point
from emorl.evaluation.scoring import summarize
from emorl.evaluation.tables import read_table
from emorl.runs.results import BASE, MethodsResult, Spread

FIRST = "ensemble"
"""the method that all others are compared with, where it takes part"""
ALONE = "policies alone"
ONE_POLICY = "one policy"
"""its first policy as PEFT runs it, which decode costs are relative to"""


@dataclass(frozen=True)
class OfferedPoint:
    """One trade-off that a method offers: weights of its policies (none: a policy as it is), and its scored completions."""

    name: str
    weights: Mapping[str, float]
    table: Path


Offered = Mapping[str, Mapping[int, Sequence[OfferedPoint]]]
"""method -> seed -> its points, the best first"""


@dataclass(frozen=True)
class MethodsTables:
    """`points` has a row for each point offered, `seeds` one for each method and seed; `result` sums them up."""

    points: pd.DataFrame
    seeds: pd.DataFrame
    result: MethodsResult


def methods_tables(
    offered: Offered,
    objectives: Sequence[str],
    consumed: pd.DataFrame,
    decode: Mapping[str, float],
    *,
    resamples: int,
    seed: int,
) -> MethodsTables:
    """What methods offer on the same test prompts.

    Args:
        consumed: a row for each method and seed that trained something.
        decode: seconds of decoding by method.
    """
    names = list(objectives)
    every = [point for seeds in offered.values() for of_seed in seeds.values() for point in of_seed]
    tables = {point.table: read_table(point.table, ["completion"], "move it away: it is scored again") for point in every}
    points = pd.DataFrame(
        {
            "method": method,
            "seed": number,
            "point": point.name,
            "best": index == 0,
            **{f"weight_{name}": weight for name, weight in point.weights.items()},
            **summarize(tables[point.table], names),
        }
        for method, seeds in offered.items()
        for number, of_seed in seeds.items()
        for index, point in enumerate(of_seed)
    )
    reference = reference_point(points[names])
    offers = {
        method: [Offer(_scores([tables[point.table] for point in of_seed], names), 0) for of_seed in seeds.values()]
        for method, seeds in offered.items()
    }
    by_run = points.groupby(["method", "seed"])
    volumes = {key: hypervolume(of_run[names], reference) for key, of_run in by_run}
    chosen = points[points["best"]].drop(columns=["best", "point"])
    seeds = chosen.assign(
        hypervolume=[volumes[key] for key in zip(chosen["method"], chosen["seed"], strict=True)],
        points=by_run["point"].transform("size"),  # aligned by row
        decode_cost=[_decode_cost(decode, method) for method in chosen["method"]],
    ).merge(consumed, on=["method", "seed"], how="left")
    [prompts] = {offer.scores.shape[1] for of_method in offers.values() for offer in of_method}
    statistics = resampled(offers, reference, resamples, seed)
    return MethodsTables(points, seeds, _result(names, seeds, statistics, reference, prompts))


def _scores(tables: Sequence[pd.DataFrame], names: Sequence[str]) -> np.ndarray:
    """(N, P, O): a prompt's samples are averaged."""
    return np.stack([table.groupby("prompt_index")[list(names)].mean().to_numpy() for table in tables])


def _decode_cost(seconds: Mapping[str, float], method: str) -> float:
    """Relative to one policy."""
    of_method = ONE_POLICY if method == ALONE else method
    return seconds[of_method] / seconds.get(ONE_POLICY, seconds[BASE])


def _result(
    objectives: Sequence[str],
    seeds: pd.DataFrame,
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]],
    reference: Sequence[float],
    test_prompts: int,
) -> MethodsResult:
    """Means and standard deviations over seeds, differences from the first method, and its best rivals."""
    numbers = seeds.drop(columns=["seed"]).groupby("method", sort=False)
    mean, deviation = numbers.mean(), numbers.std()
    mean["converged_prompts"] = numbers["converged_prompts"].agg(lambda known: known.mean(skipna=False))  # all seeds, or none
    first = FIRST if FIRST in statistics else next(iter(statistics))
    rivals = [method for method in statistics if method != first]
    trained = [method for method in rivals if method not in (BASE, ALONE)] or rivals
    measures = ("mean", "hypervolume")
    return MethodsResult(
        objectives=list(objectives),
        seeds=seeds["seed"].drop_duplicates().tolist(),
        test_prompts=test_prompts,
        first=first,
        methods={
            method: {
                column: Spread(_known(mean.loc[method, column]), _known(deviation.loc[method, column]))
                for column in mean.columns
            }
            for method in mean.index
        },
        differences={
            method: {
                measure: difference(statistics[first][index], statistics[method][index])
                for index, measure in enumerate(measures)
            }
            for method in rivals
        },
        best_rival={
            measure: _winner({method: float(statistics[method][index][0]) for method in trained})
            for index, measure in enumerate(measures)
        },
        reference_point=dict(zip(objectives, reference, strict=True)),
    )


def _winner(values: Mapping[str, float]) -> str | None:
    """The highest; none where the two highest are equal."""
    ranked = sorted(values, key=lambda method: values[method], reverse=True)
    if len(ranked) > 1 and math.isclose(values[ranked[0]], values[ranked[1]], abs_tol=1e-12):
        return None
    return ranked[0] if ranked else None


def _known(number: Any) -> float | None:
    """A number as JSON knows it: one seed has no standard deviation."""
    return None if pd.isna(number) else float(number)
