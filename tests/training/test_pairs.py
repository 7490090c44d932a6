"""Pairs of scored answers: which are made, and what orders them."""

import math

import numpy as np
import pytest

from emorl.training.modes import PolicyPlan
from emorl.training.pairs import held_out_of, ordered_pairs, values_of

TEXTS = ["go for a walk", "call your sister today", "try to sleep more", "breathe"]


def test_the_best_answer_is_chosen_against_the_worst():
    assert ordered_pairs([0.2, 0.9, 0.5, 0.1], TEXTS) == [(1, 3)]


def test_all_pairs_come_furthest_apart_first_and_are_ordered_by_worth():
    values = [0.2, 0.9, 0.5, 0.1]
    pairs = ordered_pairs(values, TEXTS, choose="all")
    assert len(pairs) == 6
    gaps = [values[chosen] - values[rejected] for chosen, rejected in pairs]
    assert gaps == sorted(gaps, reverse=True)
    assert min(gaps) > 0


def test_ties_are_no_pairs_and_a_margin_must_be_passed():
    assert ordered_pairs([0.5, 0.5, 0.5, 0.5], TEXTS, choose="all") == []
    assert ordered_pairs([0.5, 0.75, 0.5, 0.5], TEXTS, choose="all", margin=0.25) == []
    assert ordered_pairs([0.5, 0.8, 0.5, 0.5], TEXTS, choose="all", margin=0.25) == [(1, 0), (1, 2), (1, 3)]


def test_an_answer_without_a_score_is_in_no_pair():
    assert ordered_pairs([math.nan, 0.9, 0.5, math.nan], TEXTS, choose="all") == [(1, 2)]
    assert ordered_pairs([math.nan] * 4, TEXTS) == []


def test_near_duplicates_are_no_pair_so_that_the_next_ones_are():
    texts = ["you feel lost since your son moved out", "You feel lost since your son moved away", "call him"]
    assert ordered_pairs([0.9, 0.1, 0.4], texts) == [(0, 2)]


def test_lengths_may_be_matched():
    texts = ["one two three four five six", "go", "seven eight nine ten eleven"]
    assert ordered_pairs([0.9, 0.1, 0.5], texts) == [(0, 1)]
    assert ordered_pairs([0.9, 0.1, 0.5], texts, length_ratio=1.2) == [(0, 2)]
    assert ordered_pairs([0.9, 0.1, 0.5], ["a b", "", "c d e f g"], choose="all", length_ratio=1.2) == []


def plan(weights, aggregation="sum_then_normalize"):
    names = tuple(f"o{number}" for number in range(len(weights)))
    return PolicyPlan("policy", names, weights, "dpo", aggregation)


def test_what_an_answer_is_worth_differs_as_the_weighted_score_does():
    rewards = np.random.default_rng(0).random((8, 2))
    values = values_of(rewards, plan((0.25, 0.75)), samples=4).reshape(2, 4)
    weighted = (rewards @ [0.25, 0.75]).reshape(2, 4)
    assert values[:, 1:] - values[:, :1] == pytest.approx(weighted[:, 1:] - weighted[:, :1])


def test_gdpo_orders_by_scores_that_are_normalised_among_a_prompts_answers():
    rewards = np.array([[0.0, 0.9], [1.0, 0.0], [0.5, 0.4], [0.5, 0.5]])
    scaled = rewards * [1.0, 1000.0]  # an objective's unit does not matter
    one, other = (values_of(r, plan((0.5, 0.5), "normalize_then_sum"), samples=4) for r in (rewards, scaled))
    assert np.argsort(one).tolist() == np.argsort(other).tolist()


def test_an_answer_that_one_objective_cannot_score_is_worth_nothing_known():
    rewards = np.array([[0.5, np.nan], [0.5, 0.5], [0.1, 0.2]])
    assert np.isnan(values_of(rewards, plan((0.5, 0.5)), samples=3)).tolist() == [True, False, False]


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.1, 1), (10, 0.01, 1), (10, 0.99, 9), (2, 0.5, 1), (1, 0.5, 0)])
def test_some_prompts_are_held_out_and_never_all(count, share, expected):
    groups = list(range(100, 100 + count))
    held_out = held_out_of(groups, share, seed=0)
    assert len(held_out) == expected
    assert held_out <= set(groups)
    assert held_out == held_out_of(groups, share, seed=0)
