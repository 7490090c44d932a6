"""The regret benchmark measures what it says, on problems whose answer is known."""

import numpy as np
import pytest

from benchmarks.proposers import GRIDS, Problem, make, measure, recorded, regrets, search, synthetic
from benchmarks.record_scores import lattice


def test_the_lattice_is_all_of_the_simplex():
    weights = lattice(3, 4)
    assert weights.shape == (15, 3)
    assert np.allclose(weights.sum(1), 1)
    assert len({tuple(row) for row in weights.tolist()}) == 15


def test_nothing_is_lost_when_everything_was_seen_without_noise():
    problem = next(iter(synthetic(2, [0.0])))
    everything = list(range(len(problem.weights)))
    assert regrets(problem, everything, seed=0)[-1] == 0
    assert regrets(problem, everything[::-1][:1], seed=0)[-1] > 0


def test_recorded_tables_and_their_faces_are_problems(tmp_path):
    weights = lattice(3, 4)
    scores = np.random.default_rng(0).random((15, 6, 2)).astype(np.float16)
    np.savez(tmp_path / "t.npz", weights=weights, scores=scores)
    found = {problem.name: problem for problem in recorded(tmp_path)}
    assert list(found) == ["t", "t-0", "t-1", "t-2"]
    assert found["t-1"].weights.shape == (5, 2)
    assert np.allclose(found["t-1"].weights.sum(1), 1)
    assert found["t"].observed(0).shape == (15, 2)
    assert not np.array_equal(found["t"].observed(0), found["t"].observed(1))


@pytest.mark.parametrize("name", [*GRIDS, "random"])
def test_regret_is_never_negative_and_repeats_with_its_seed(name):
    problem = Problem("p", "synthetic", lattice(2, 16), np.linspace(0, 1, 17)[:, None, None], noise=0.05)
    results = measure(name, problem, seeds=2)
    assert all(regret >= 0 for values, _ in results for regret in values)
    assert results == measure(name, problem, seeds=2)
    assert len(search(make(name, problem, 0), problem, 0, 5)) == 5
