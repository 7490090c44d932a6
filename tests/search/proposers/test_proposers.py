"""Every proposer: the same contract. Then what only one of them promises."""

import itertools

import numpy as np
import pytest

from emorl.search.proposers.hierarchical_grid import HierarchicalGrid
from emorl.search.proposers.optuna_samplers import SAMPLERS, OptunaProposer
from emorl.search.proposers.simplex_refinement import SimplexRefinement
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Finished

SPACE = WeightSpace(("a", "b", "c"))
BEST = np.array([0.5, 0.3, 0.2])
LIMIT = 40
GRIDS = {"hierarchical_grid": HierarchicalGrid, "simplex_refinement": SimplexRefinement}


def mean(finished):
    return [float(np.mean(trial.scores)) for trial in finished]


def scores_of(params):
    """Two objectives whose mean is highest at BEST."""
    distance = float(np.abs(np.array(SPACE.vector(params)) - BEST).sum())
    return (1 - distance, 1 - distance**2)


def make(name, seed=0):
    if name in GRIDS:
        return GRIDS[name](SPACE, levels=3, value=mean)
    return OptunaProposer(name, SPACE, objectives=2, value=mean, seed=seed)


def run(proposer, limit=LIMIT, finished=()):
    """A one-worker search, one candidate at a time."""
    finished = list(finished)
    while len(finished) < limit:
        proposed = proposer(finished)
        if proposed is None:
            return finished
        known = [trial.params for trial in finished]
        params = next(params for params in proposed if params not in known)
        finished.append(Finished(len(finished), params, scores_of(params), {}))
    return finished


NAMES = [*GRIDS, *SAMPLERS]
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_new_directions_and_start_with_each_policy_alone(name):
    params = [trial.params for trial in run(make(name), 20 if name == "gp" else LIMIT)]
    assert params[:4] == SPACE.corners()
    assert all(sum(p.values()) == pytest.approx(1, abs=1e-6) and min(p.values()) >= 0 for p in params)
    vectors = np.array([SPACE.vector(p) for p in params])
    pairs = itertools.combinations(vectors, 2)
    assert min(np.abs(one - other).max() for one, other in pairs) > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_search(name):
    assert run(make(name, seed=3), 16) == run(make(name, seed=3), 16)


@pytest.mark.parametrize("name", NAMES)
def test_a_search_resumed_from_its_trials_goes_on_as_if_it_had_not_stopped(name):
    limit, stops = (17, (2, 14)) if name == "gp" else (30, (2, 4, 17))  # GP fits a model at every trial
    whole = run(make(name), limit)
    for stop in stops:
        assert run(make(name), limit, whole[:stop]) == whole


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("random", "qmc")])
def test_it_finds_better_weights_than_random_ones(name):
    best = max(mean(run(make(name), 24 if name == "gp" else 60)))
    assert best > 0.9
    assert best > float(np.mean([max(mean(run(make("random", seed), 15))) for seed in range(5)]))


@pytest.mark.parametrize("name", NAMES)
def test_trials_of_another_worker_are_taken_in(name):
    theirs = run(make("random", seed=9), 12)
    continued = run(make(name), 20, theirs)
    assert continued[:12] == theirs
    assert len(continued) == 20


def grid(levels, names=("a", "b", "c"), value=mean):
    return HierarchicalGrid(WeightSpace(names), levels=levels, value=value)


def test_level_one_at_three_policies_has_nineteen_directions():
    assert len(grid(1)([])) == 19


def test_five_levels_take_about_ninety_two_evaluations_instead_of_135():
    assert 80 <= len(run(grid(5), 500)) <= grid(5).expected_trials == 19 + 4 * 19


def test_the_grid_narrows_to_the_best_weights():
    best = max(run(grid(5), 500), key=lambda trial: np.mean(trial.scores))
    assert np.abs(np.array(SPACE.vector(best.params)) - BEST).max() < 0.04


@pytest.mark.parametrize("policies", [1, 2, 4, 5])
def test_the_grid_works_for_any_number_of_policies(policies):
    space = WeightSpace(tuple("abcde"[:policies]))
    proposer = HierarchicalGrid(space, levels=2, value=mean)
    finished = []
    while (proposed := proposer(finished)) is not None:
        finished += [Finished(len(finished) + i, p, (p["a"], 0.5), {}) for i, p in enumerate(proposed)]
    assert max(finished, key=lambda trial: trial.scores[0]).params["a"] == 1.0
    assert len(finished) == 1 if policies == 1 else len(finished) > 2**policies


def test_the_grid_proposes_what_is_left_of_a_level():
    whole = grid(1)([])
    finished = [Finished(i, params, (0.0, 0.0), {}) for i, params in enumerate(whole[:5])]
    assert grid(1)(finished) == whole[5:]


def test_equal_directions_are_one_candidate():
    assert SPACE.canonical({"a": 1, "b": 1, "c": 0}) == SPACE.canonical({"a": 0.5, "b": 0.5, "c": 0})
    assert SPACE.canonical({"a": 0, "b": 0, "c": 0}) is None
