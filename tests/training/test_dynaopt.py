"""DynaOpt's bandits: Exp3 by hand, weights that follow what improves, and the same weights from the same log."""

import math
import random

import pytest
from transformers import TrainerState

from emorl.training.dynaopt import DynaOptCallback, Exp3, reward_weights


def test_exp3_by_hand():
    bandit = Exp3(3, gamma=0.3)
    assert bandit.probabilities.tolist() == pytest.approx([1 / 3] * 3)
    bandit.pay(1, 1.0)
    weight = math.exp(0.3 * 3 / 3)
    assert bandit.weights.tolist() == pytest.approx([1, weight, 1])
    assert bandit.probabilities[1] == pytest.approx(0.7 * weight / (2 + weight) + 0.1)
    assert bandit.probabilities.sum() == pytest.approx(1)


def test_weights_start_equal_sum_to_one_and_repeat_with_their_seed():
    rng = random.Random(0)
    seen = [[rng.random() for _ in range(3)] for _ in range(40)]
    weights = reward_weights(seen, gamma=0.07, seed=5)
    assert sum(weights) == pytest.approx(1)
    assert weights == reward_weights(seen, gamma=0.07, seed=5)
    assert weights != reward_weights(seen, gamma=0.07, seed=6)
    first = reward_weights(seen[:1], gamma=0.07, seed=5)
    moved = [index for index, weight in enumerate(first) if weight != pytest.approx(min(first))]
    assert len(moved) <= 1  # one step per interval, of one arm at most


def test_the_bandit_finds_the_arm_that_helps():
    """Scores rise only behind intervals in which the first objective's weight rose: over many steps it becomes the largest."""
    found = []
    for seed in range(5):
        seen, level = [[0.0, 0.0]], 0.0
        before = 0.5
        for _ in range(120):
            weight = reward_weights(seen, gamma=0.3, seed=seed)[0]
            level += 0.5 if weight > before else -0.1
            before = weight
            seen.append([level, level])
        found.append(before)
    assert sum(found) / 5 > 0.8


def test_the_callback_sets_weights_from_the_log_and_writes_them_there():
    state, given = TrainerState(), []
    callback = DynaOptCallback(["a", "b"], gamma=0.5, seed=0, set_weights=given.append)
    callback.on_train_begin(None, state, None)
    assert given == []
    for step in range(6):
        state.log_history.append({"eval_score_a": 0.1 * step, "eval_score_b": 0.0, "step": step})
        callback.on_evaluate(None, state, None)
    assert [entry["weight_a"] for entry in state.log_history] == [weights[0] for weights in given]
    resumed = []
    DynaOptCallback(["a", "b"], gamma=0.5, seed=0, set_weights=resumed.append).on_train_begin(None, state, None)
    assert resumed == given[-1:]
