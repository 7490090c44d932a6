"""The rivals of reinforced merging."""

import numpy as np
import pytest

from emorl.fusion.merging_map import MergingSpace
from emorl.search.proposers.coordinate_descent import CoordinateDescent, RandomPlans
from emorl.search.study import Finished, Scored, open_study, search

SPACE = MergingSpace(3, 5)
TABLE = np.random.default_rng(0).normal(size=(5, 3))  # what each block adds


def value(finished):
    return [trial.scores[0] for trial in finished]


def score(params):
    return float(sum(TABLE[layer, column] for layer, column in SPACE.plan(params)))


def run(proposer, finished=(), limit=1000):
    finished = list(finished)
    while len(finished) < limit and (proposed := proposer(finished)) is not None:
        finished.append(Finished(len(finished), proposed[0], (score(proposed[0]),), {}))
    return finished


def test_coordinate_descent_finds_the_best_plan_where_layers_do_not_interact():
    proposer = CoordinateDescent(SPACE, value)
    finished = run(proposer)
    best = max(finished, key=lambda trial: trial.scores)
    assert SPACE.vector(best.params) == TABLE.argmax(1).tolist()
    assert len(finished) <= proposer.expected_trials == 3 + 2 * 5 * 2


def test_it_begins_with_the_columns_and_then_takes_the_best_one_layer_by_layer():
    columns = [Finished(number, params, (score(params),), {}) for number, params in enumerate(SPACE.corners())]
    proposer = CoordinateDescent(SPACE, value)
    assert proposer([]) == SPACE.corners()
    best = int(TABLE.sum(0).argmax())
    others = [column for column in range(3) if column != best]
    assert [SPACE.vector(params) for params in proposer(columns)] == [[other, *[best] * 4] for other in others]


def test_it_ends_at_once_where_no_other_block_is_better():
    finished, proposer = [], CoordinateDescent(SPACE, value)
    while (proposed := proposer(finished)) is not None:
        finished += [Finished(len(finished) + i, params, (1.0,), {}) for i, params in enumerate(proposed)]
    assert len(finished) == 3 + 5 * 2  # equal is not better


@pytest.mark.parametrize("make", [lambda: CoordinateDescent(SPACE, value), lambda: RandomPlans(SPACE, seed=0)])
def test_a_search_resumed_from_its_trials_goes_on_as_if_it_had_not_stopped(make):
    whole = run(make(), limit=20)
    assert [trial.params for trial in whole[:3]] == SPACE.corners()
    for stop in (2, 4, 11):
        assert run(make(), whole[:stop], limit=20) == whole


def test_coordinate_descent_stopped_and_resumed_makes_the_same_trials(tmp_path):
    def evaluate(candidates):
        return [Scored((score(params),)) for params in candidates]

    def run_study(path, evaluate=evaluate):
        study = open_study(path, ["score"], "plans")
        return search(study, CoordinateDescent(SPACE, value), evaluate, SPACE.distributions, batch=2)

    def stops(candidates, left=[4]):  # noqa: B006
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return evaluate(candidates)

    whole = run_study(tmp_path / "whole.log")
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path / "stopped.log", stops)
    resumed = run_study(tmp_path / "stopped.log")
    assert [(trial.params, trial.scores) for trial in resumed] == [(trial.params, trial.scores) for trial in whole]


@pytest.mark.parametrize("space", [MergingSpace(2, 3), MergingSpace(2, 2, allow_skip=True)])
def test_random_plans_are_new_until_there_are_no_more(space):
    finished, proposer = [], RandomPlans(space, seed=1)
    while (proposed := proposer(finished)) is not None:
        finished += [Finished(len(finished), params, (0.0,), {}) for params in proposed]
    assert len({tuple(space.vector(trial.params)) for trial in finished}) == len(finished) == 8


def test_random_plans_differ_by_seed_and_stay_within_the_bounds():
    space = MergingSpace(2, 4, allow_skip=True, allow_back=True, min_depth=3, max_depth=6)
    searches = [[space.plan(trial.params) for trial in _draw(RandomPlans(space, seed), space, 30)] for seed in (0, 1)]
    assert searches[0] != searches[1]
    assert all(3 <= len(plan) <= 6 for plans in searches for plan in plans)


def _draw(proposer, space, count):
    finished = []
    while len(finished) < count:
        finished.append(Finished(len(finished), proposer(finished)[0], (0.0,), {}))
    return finished
