"""Methods at equal budgets: every number of a comparison of two seeds by hand."""

import math

import pandas as pd
import pytest

from emorl.evaluation.methods import ALONE, ONE_POLICY, OfferedPoint, _winner, methods_tables
from emorl.runs.results import BASE, Spread

SECONDS = {BASE: 1.0, ONE_POLICY: 2.0, "ensemble": 3.0, "uniform": 2.0}


@pytest.fixture
def point(tmp_path):
    def tested(file, *scores, **weights):
        """A point whose completions, one for each prompt, have these scores."""
        count = range(len(scores))
        table = pd.DataFrame(scores, columns=["a", "b"]).assign(
            prompt_index=count, sample=0, prompt="say", completion=[f"answer {number}" for number in count]
        )
        table.to_parquet(tmp_path / file)
        return OfferedPoint(file, weights, tmp_path / file)

    return tested


@pytest.fixture
def tables(point):
    """The ensemble offers two points with the first seed, its best one first."""
    offered = {
        BASE: {0: [point("base-0", (0.0, 0.0), (0.0, 0.0))], 1: [point("base-1", (0.0, 0.0), (0.0, 0.0))]},
        ALONE: {0: [point("alone-0", (0.2, 0.2), (0.2, 0.2))], 1: [point("alone-1", (0.2, 0.2), (0.2, 0.2))]},
        "ensemble": {
            0: [point("best", (0.4, 0.8), (0.6, 1.0), a=0.5, b=0.5), point("front", (0.9, 0.3), (0.7, 0.5), a=1.0, b=0.0)],
            1: [point("single", (0.6, 0.6), (0.6, 0.6), a=0.5, b=0.5)],
        },
        "uniform": {0: [point("uniform-0", (0.5, 0.5), (0.5, 0.5))], 1: [point("uniform-1", (0.5, 0.5), (0.5, 0.5))]},
    }
    consumed = pd.DataFrame(
        {
            "method": ["ensemble", "uniform", "ensemble", "uniform"],
            "seed": [0, 0, 1, 1],
            "prompts": [8, 8, 8, 8],
            "converged_prompts": [4.0, 4.0, math.nan, 6.0],
        }
    )
    return methods_tables(offered, ["a", "b"], consumed, SECONDS, resamples=50, seed=0)


def test_a_method_is_its_best_point_and_its_hypervolume_that_of_all_it_offers(tables):
    methods, reference = tables.result.methods, tables.result.reference_point
    assert methods["ensemble"]["a"].mean == pytest.approx((0.5 + 0.6) / 2)
    assert methods["ensemble"]["mean"].mean == pytest.approx((0.7 + 0.6) / 2)
    assert methods["ensemble"]["mean"].deviation == pytest.approx(math.sqrt(0.005))
    left, low = reference["a"], reference["b"]
    two = (0.5 - left) * (0.9 - low) + (0.8 - 0.5) * (0.4 - low)
    assert methods["ensemble"]["hypervolume"].mean == pytest.approx((two + (0.6 - left) * (0.6 - low)) / 2)
    assert methods["ensemble"]["points"].mean == 1.5
    assert tables.points["best"].sum() == len(tables.seeds) == 8
    assert (tables.result.seeds, tables.result.test_prompts) == ([0, 1], 2)


def test_costs_are_relative_to_one_policy_and_convergence_is_that_of_all_seeds(tables):
    methods = tables.result.methods
    costs = {method: row["decode_cost"].mean for method, row in methods.items()}
    assert costs == {BASE: 0.5, ALONE: 1.0, "ensemble": 1.5, "uniform": 1.0}
    assert methods["ensemble"]["converged_prompts"].mean is None
    assert methods["uniform"]["converged_prompts"] == Spread(5.0, pytest.approx(math.sqrt(2)))
    assert methods[BASE]["prompts"] == Spread(None, None)


def test_differences_are_the_ensembles_and_only_what_was_trained_is_a_rival(tables):
    result = tables.result
    assert result.first == "ensemble"
    assert list(result.differences) == [BASE, ALONE, "uniform"]
    assert result.differences["uniform"]["mean"].difference == pytest.approx(0.65 - 0.5)
    assert result.differences["uniform"]["mean"].above == 1
    assert result.best_rival == {"mean": "uniform", "hypervolume": "uniform"}


def test_there_is_no_winner_among_ties():
    assert _winner({"soups": 0.0, "uniform": 0.0, "gdpo": -1.0}) is None
    assert _winner({"soups": 0.1, "uniform": 0.2}) == "uniform"
    assert _winner({}) is None
