"""The simplex refinement finds known optima for any number of policies, cheaply, and always ends."""

import numpy as np
import pytest

from emorl.search.proposers.simplex_refinement import SimplexRefinement
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Finished


def best_value(finished):
    return [trial.scores[0] for trial in finished]


def run(policies, score, levels=5):
    space = WeightSpace(tuple("abcdefgh"[:policies]))
    proposer, finished = SimplexRefinement(space, levels, best_value), []
    while (proposed := proposer(finished)) is not None:
        assert proposed
        finished += [Finished(len(finished) + i, p, (score(space.vector(p)),), {}) for i, p in enumerate(proposed)]
    return space, finished


@pytest.mark.parametrize("policies", range(1, 7))
@pytest.mark.parametrize("place", ["inside", "edge", "corner"])
def test_it_finds_the_optimum_of_a_smooth_function(policies, place):
    optimum = np.arange(1.0, policies + 1)
    optimum[: {"inside": 0, "edge": max(0, policies - 2), "corner": policies - 1}[place]] = 0
    optimum /= optimum.sum()
    space, finished = run(policies, lambda vector: -float(((np.array(vector) - optimum) ** 2).sum()))
    best = max(finished, key=lambda trial: trial.scores[0])
    assert np.abs(np.array(space.vector(best.params)) - optimum).max() <= 1 / 16
    assert len(finished) <= 3**policies * 5 if policies < 4 else len(finished) < 3**policies * 2
    assert len({tuple(space.vector(trial.params)) for trial in finished}) == len(finished)


def test_the_better_of_two_bumps_is_found():
    def bumps(vector):
        x = np.array(vector)
        return float(np.exp(-20 * ((x - [0.8, 0.1, 0.1]) ** 2).sum()) + 1.2 * np.exp(-20 * ((x - [0.1, 0.2, 0.7]) ** 2).sum()))

    _, finished = run(3, bumps)
    assert max(trial.scores[0] for trial in finished) > 1.18


@pytest.mark.parametrize("policies", [1, 3, 6])
def test_it_ends_on_a_constant_and_on_noise(policies):
    generator = np.random.default_rng(0)
    for score in (lambda vector: 0.5, lambda vector: float(generator.normal())):
        _, finished = run(policies, score)
        assert len(finished) < 30 + 5 * 3 * 2 * policies * (policies - 1)
