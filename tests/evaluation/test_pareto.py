import itertools

import numpy as np
import pytest

from emorl.config import UserError
from emorl.evaluation.pareto import front, hypervolume, reference_point


def test_hypervolume_of_a_staircase_by_hand():
    assert hypervolume([[1, 3], [2, 2], [3, 1]], reference=[0, 0]) == pytest.approx(6.0)
    assert hypervolume([[1, 3], [2, 2], [3, 1], [1, 1]], reference=[0, 0]) == pytest.approx(6.0)
    assert hypervolume([[0.5, 0.5, 0.5]], reference=[0, 0, 0]) == pytest.approx(0.125)


def test_vectors_below_the_reference_add_nothing():
    assert hypervolume([[1, 1], [-1, 5]], reference=[0, 0]) == pytest.approx(1.0)


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_front_and_volume_agree_with_counting(dimensions):
    points = np.random.default_rng(dimensions).integers(0, 5, size=(30, dimensions)).astype(float)
    dominated = [
        any((other >= point).all() and (other > point).any() for other in points)
        or any((other == point).all() for other in points[:index])
        for index, point in enumerate(points)
    ]
    assert front(points).tolist() == [not value for value in dominated]
    cells = itertools.product(range(5), repeat=dimensions)
    covered = sum(any(all(p > c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells)
    assert hypervolume(points, [0] * dimensions) == pytest.approx(covered)


def test_a_score_that_is_none_is_in_no_front():
    with pytest.raises(UserError, match="score vector 1 holds NaN"):
        front([[0.1, 0.2], [0.3, float("nan")], [0.2, 0.1]])


def test_a_tie_of_all_in_one_objective_leaves_the_others_comparable():
    scores = [[0.5, 0.1], [0.5, 0.4], [0.5, 0.2]]
    reference = reference_point(scores)
    assert reference[0] == pytest.approx(0.4)
    volumes = [hypervolume([one], reference) for one in scores]
    assert sorted(volumes) == [volumes[0], volumes[2], volumes[1]]
    assert min(volumes) > 0
