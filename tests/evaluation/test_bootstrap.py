"""Intervals: the measured statistics by hand, pairing, and coverage of a known difference."""

import numpy as np
import pytest

from emorl.evaluation.bootstrap import Offer, difference, resampled

REFERENCE = [0.0, 0.0]


def test_the_first_row_is_what_was_measured():
    points = np.array([[[0.2, 0.8], [0.4, 0.6]], [[0.6, 0.2], [0.6, 0.4]]])  # two points, two prompts, two objectives
    mean, volume = resampled({"a": [Offer(points, best=1)]}, REFERENCE, 10, seed=0)["a"]
    assert mean.shape == volume.shape == (11,)
    assert mean[0] == pytest.approx((0.6 + 0.3) / 2)
    assert volume[0] == pytest.approx(0.3 * 0.7 + 0.3 * 0.3)  # the points' means are (0.3, 0.7) and (0.6, 0.3)


def test_a_prompt_that_could_not_be_scored_is_left_out():
    points = np.array([[[0.2, 0.8], [np.nan, 0.6]]])
    mean, volume = resampled({"a": [Offer(points, best=0)]}, REFERENCE, 0, seed=0)["a"]
    assert mean[0] == pytest.approx((0.2 + 0.7) / 2)
    assert volume[0] == pytest.approx(0.2 * 0.7)


def test_seeds_are_averaged():
    offers = [Offer(np.full((1, 3, 2), level), 0) for level in (0.2, 0.6)]
    mean, volume = resampled({"a": offers}, REFERENCE, 50, seed=0)["a"]
    assert mean[0] == pytest.approx(0.4)
    assert volume[0] == pytest.approx((0.04 + 0.36) / 2)
    assert {round(value, 6) for value in mean[1:]} == {0.2, 0.4, 0.6}


def test_equal_methods_differ_nowhere_and_differences_are_paired():
    scores = np.random.default_rng(0).random((1, 20, 2))
    found = resampled({"a": [Offer(scores, 0)], "b": [Offer(scores, 0)], "c": [Offer(scores - 0.1, 0)]}, REFERENCE, 200, seed=1)
    same, lower = difference(found["a"][0], found["b"][0]), difference(found["a"][0], found["c"][0])
    assert (same.difference, same.low, same.high, same.above) == (0, 0, 0, 0)
    assert (lower.low, lower.high) == pytest.approx((0.1, 0.1))
    assert lower.above == 1


def test_intervals_cover_the_true_difference_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(100):
        noise = rng.normal(size=(2, 1, 60, 1))
        offers = {"a": [Offer(noise[0] + 0.5, 0)], "b": [Offer(noise[1], 0)]}
        found = resampled(offers, [-9.0], 300, seed=trial)
        gap = difference(found["a"][0], found["b"][0])
        covered += gap.low <= 0.5 <= gap.high
    assert 85 <= covered <= 99
