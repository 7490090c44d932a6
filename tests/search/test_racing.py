"""Racing: closed forms, and what the stated confidence promises, by simulation."""

import numpy as np
import pytest
from scipy.stats import t as student

from emorl.search.racing import blocks, survivors


def mean(scores):
    return scores.mean(-1)


def worst(scores):
    return scores.min(-1)


def test_blocks_double_and_end_with_all_prompts():
    assert blocks(32, 8) == [8, 16, 32]
    assert blocks(40, 8) == [8, 16, 40]
    assert blocks(10, 8) == [10]
    assert blocks(8, 8) == [8]
    assert blocks(64, 3) == [3, 6, 12, 24, 64]


def test_the_bound_is_the_paired_t_test_for_a_linear_value():
    generator = np.random.default_rng(0)
    best, prompts = generator.normal(1.0, 1.0, (20, 2)), 20
    difference = generator.normal(0, 1, (20, 2))
    difference -= difference.mean(0)
    error = difference.mean(1).std(ddof=1) / np.sqrt(prompts)
    edge = student.ppf(0.95, prompts - 1) * error
    for shift, kept in ((0.999 * edge, True), (1.001 * edge, False)):
        scores = np.stack([best, best + difference - shift])
        assert survivors(scores, mean, 0.95, 1).tolist() == [True, kept]


def test_equal_texts_and_the_best_survive_and_a_constant_gap_does_not():
    best = np.random.default_rng(1).normal(size=(8, 3))
    scores = np.stack([best, best, best - 0.1])
    assert survivors(scores, mean, 0.99, 50).tolist() == [True, True, False]


def test_one_prompt_or_unknown_scores_drop_nobody():
    scores = np.random.default_rng(2).normal(size=(5, 1, 2))
    assert survivors(scores, mean, 0.9, 1).all()
    unknown = np.random.default_rng(2).normal(size=(2, 6, 2))
    unknown[0, :, 0] += 100
    unknown[1, 1:, 1] = np.nan
    assert survivors(unknown, mean, 0.9, 1).tolist() == [True, True]


@pytest.mark.parametrize("value", [mean, worst])
@pytest.mark.parametrize("gap", [0.0, 0.02])
def test_the_true_best_is_dropped_no_more_often_than_stated(value, gap):
    """12 candidates, correlated over prompts as real ones are; the first is the best by `gap`."""
    confidence, rounds, races, lost = 0.95, blocks(32, 8), 300, 0
    generator = np.random.default_rng(3)
    for _ in range(races):
        difficulty = generator.normal(0, 0.3, (1, 32, 2))
        scores = difficulty + generator.normal(0, 0.1, (12, 32, 2))
        scores[1:] -= gap
        alive = np.arange(12)
        for seen in rounds:
            alive = alive[survivors(scores[alive, :seen], value, confidence, 12 * len(rounds))]
        lost += 0 not in alive
    assert lost / races <= 1 - confidence + 0.03


def test_clearly_worse_candidates_leave_early():
    generator = np.random.default_rng(4)
    scores = generator.normal(0, 0.3, (1, 32, 3)) + generator.normal(0, 0.05, (20, 32, 3))
    scores[5:] -= 0.3
    kept = survivors(scores[:, :8], mean, 0.95, 60)
    assert kept[:5].all()
    assert not kept[5:].any()
