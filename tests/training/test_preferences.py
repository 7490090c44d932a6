"""Which weights a conditional distillation is trained on: corners, the front's points, and nothing near what is held out."""

import numpy as np
import pytest

from emorl.training.preferences import drawn_preferences, held_out_preferences

POINTS = [[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]]


def farthest(one, other):
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("seed", "units"), [(0, 100), (1, 100), (2, 100), (0, 20), (1, 20)])
def test_nothing_that_is_trained_on_comes_near_what_is_held_out(seed, units):
    held_out = held_out_preferences(POINTS, 3, 6, units, seed)
    drawn = drawn_preferences(POINTS, held_out, 3, 2000, units, seed)
    assert len(held_out) == 6
    assert len(drawn) == 2000
    corners = np.eye(3).tolist()
    for one in held_out:
        assert min(farthest(one, other) for other in [*drawn, *POINTS, *corners]) > 0.0501
    assert min(farthest(a, b) for i, a in enumerate(held_out) for b in held_out[:i]) > 0.0501
    assert all(sum(one) == pytest.approx(1) and min(one) >= 0 for one in [*drawn, *held_out])
    assert all(round(units * weight, 6) == round(units * weight) for one in drawn for weight in one)  # as the line says them
    shares = [np.mean([one in kind for one in drawn]) for kind in (corners, POINTS)]
    assert shares == [pytest.approx(0.2, abs=0.04), pytest.approx(0.3, abs=0.04)]
    assert len({tuple(one) for one in drawn}) > {100: 500, 20: 60}[units]


def test_the_same_seed_draws_the_same_and_another_one_others():
    assert drawn_preferences(POINTS, [], 3, 50, 100, 1) == drawn_preferences(POINTS, [], 3, 50, 100, 1)
    assert drawn_preferences(POINTS, [], 3, 50, 100, 1) != drawn_preferences(POINTS, [], 3, 50, 100, 2)


def test_where_so_many_do_not_fit_there_are_fewer():
    found = held_out_preferences([], 2, 1000, 100, 0)  # on a line of 101 places
    assert 5 < len(found) < 20
