"""RL-Fusion's Q-learning: its moves stay on the lattice, credit goes to the move that earned it, and it finds a known best."""

import numpy as np
import pytest

from emorl.search.proposers.optuna_samplers import OptunaProposer
from emorl.search.proposers.q_learning import QLearning, QSettings
from emorl.search.spaces.fusion_space import METHOD, SCALE, FusionSpace
from emorl.search.study import Budget, Finished, Scored, open_study, search

PAIR = FusionSpace(("a", "b"), ("slerp", "ties"), (0.5, 1.0, 2.0))
TRIPLE = FusionSpace(("a", "b", "c"), ("slerp", "ties"), (0.5, 1.0, 2.0), step=0.1)


def values_of(finished):
    return [trial.scores[0] for trial in finished]


def finished_of(candidates, value):
    return [Finished(number, one, (value(one),), {}) for number, one in enumerate(candidates)]


def toy(space, target):
    """The best is `target` (weights), by TIES at a scale of 2."""

    def value(params):
        distance = np.abs(np.array(space.weights(params)) - target).sum()
        return -distance + 0.5 * (params[METHOD] == "ties") + 0.2 * (params[SCALE] == 2.0)

    return value


def run(proposer, value, trials):
    finished = []
    while len(finished) < trials and (proposed := proposer(finished)) is not None:
        known = [trial.params for trial in finished]
        new = [one for one in proposed if one not in known]
        assert new, "a proposer must not propose what is known"
        finished += [Finished(len(finished) + i, one, (value(one),), {}) for i, one in enumerate(new)]
    return finished


def test_two_models_have_the_paper_s_five_actions():
    proposer = QLearning(PAIR, values_of, 100, seed=0)
    assert len(proposer._actions()) == 5


@pytest.mark.parametrize("binding", ["scale", "step"])
def test_every_candidate_lies_on_the_lattice_and_sums_to_one(binding):
    proposer = QLearning(TRIPLE, values_of, 60, seed=1, settings=QSettings(binding=binding))
    finished = run(proposer, lambda params: float(np.sin(7 * sum(TRIPLE.vector(params)))), 60)
    for trial in finished:
        weights = np.array(TRIPLE.weights(trial.params))
        np.testing.assert_allclose(weights.sum(), 1.0, atol=1e-9)
        np.testing.assert_allclose(weights / TRIPLE.step, np.round(weights / TRIPLE.step), atol=1e-6)
        assert TRIPLE.canonical(trial.params) == trial.params
        assert trial.params[METHOD] == "ties" or trial.params[SCALE] == 1.0
    if binding == "scale":
        assert {trial.params[SCALE] for trial in finished} == {0.5, 1.0, 2.0}


def test_the_gain_goes_to_the_move_that_earned_it():
    value = toy(PAIR, [1.0, 0.0])
    proposer = QLearning(PAIR, values_of, 100, seed=0)
    finished = finished_of(PAIR.corners(), value)
    [first] = proposer(finished)
    finished += [Finished(3, first, (value(first),), {})]
    proposer(finished)
    start = proposer._start()
    row = proposer.table[start]
    fresh = proposer._row(start)
    [action] = np.flatnonzero(~np.isclose(row, fresh, equal_nan=True))
    gain = value(first) - value(PAIR.corners()[-1])
    assert proposer._params(proposer._moved(start, action)) == first
    assert row[action] == pytest.approx(1e-3 + 0.3 * (gain + 0.9 * 1e-3 - 1e-3))


@pytest.mark.parametrize("space", [PAIR, TRIPLE])
def test_it_finds_the_known_best(space):
    target = [0.75, 0.25] if space is PAIR else [0.2, 0.7, 0.1]
    value = toy(space, target)
    best = max(value(one) for one in (space.params(u, m, s) for u, m, s in all_of(space)))
    for seed in range(3):
        finished = run(QLearning(space, values_of, 100, seed=seed), value, 150)
        assert max(values_of(finished)) == pytest.approx(best)


def all_of(space):
    units = space.units
    points = [(i, units - i) for i in range(units + 1)] if len(space.models) == 2 else [
        (i, j, units - i - j) for i in range(units + 1) for j in range(units + 1 - i)
    ]  # fmt: skip
    return [(point, method, scale) for point in points for method in space.methods for scale in space.scales]


def test_it_ends_when_everything_is_known():
    space = FusionSpace(("a", "b"), ("slerp",), step=0.25)
    finished = run(QLearning(space, values_of, 10, seed=0), lambda params: params["weight_a"], 100)
    assert len(finished) == 5


def test_a_stopped_search_goes_on_as_if_it_had_not(tmp_path):
    value = toy(TRIPLE, [0.2, 0.7, 0.1])

    def evaluate(candidates):
        return [Scored((value(one),)) for one in candidates]

    def searched(path, stops):
        for trials in stops:
            study = open_study(path, ["value"], "fusion")
            proposer = QLearning(TRIPLE, values_of, 40, seed=3)
            found = search(study, proposer, evaluate, TRIPLE.distributions, budget=Budget(trials=trials))
        return [trial.params for trial in found]

    assert searched(tmp_path / "whole.log", [30]) == searched(tmp_path / "parts.log", [7, 8, 21, 30])


def test_a_gain_of_one_s_own_replaces_the_difference_of_values():
    seen = []

    def gain(here, there):
        seen.append((here.number, there.number))
        return 0.0

    value = toy(PAIR, [1.0, 0.0])
    finished = run(QLearning(PAIR, values_of, 20, seed=0, gain=gain), value, 10)
    assert seen
    assert all(number < len(finished) for pair in seen for number in pair)


@pytest.mark.parametrize("sampler", ["random", "tpe", "cma_es"])
def test_optuna_s_samplers_are_rivals_on_the_same_space(sampler):
    value = toy(TRIPLE, [0.2, 0.7, 0.1])
    finished = run(OptunaProposer(sampler, TRIPLE, 1, values_of, seed=0), value, 25)
    assert len(finished) == 25
    assert all(TRIPLE.canonical(trial.params) == trial.params for trial in finished)
