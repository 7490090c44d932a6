"""Stratified scores: by hand, unbiased under counts that play against them, and the same sets when a search resumes."""

import itertools

import numpy as np
import pytest

from emorl.evaluation.strata import (
    Allocation,
    EvaluationSet,
    allocate,
    estimate,
    first_set,
    holdout_estimate,
    next_set,
    paired_difference,
    split,
    stratify,
)

LABELS = ["law"] * 40 + ["art"] * 20 + ["math"] * 60
ALLOCATION = Allocation(total=24, floor=2, every=1)


def made_pools(labels=LABELS, weights="share", anchor=0.2, adaptive=0.6, seed=0):
    return split(stratify(labels, weights), anchor=anchor, adaptive=adaptive, seed=seed)


def only(scores, pools, chosen):
    """Scores with NaN where the set does not reach, as a search has them."""
    seen = np.full_like(scores, np.nan)
    used = pools.used(chosen)
    seen[used] = scores[used]
    return seen


def test_weights_are_shares_or_equal_or_given():
    assert stratify(LABELS).names == ("art", "law", "math")
    np.testing.assert_allclose(stratify(LABELS).weights, [1 / 6, 1 / 3, 1 / 2])
    np.testing.assert_allclose(stratify(LABELS, "equal").weights, 1 / 3)
    np.testing.assert_allclose(stratify(LABELS, {"math": 0.5, "art": 0.2, "law": 0.3}).weights, [0.2, 0.3, 0.5])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"law": 1.0}, "the strata are"),
        ({"law": 0.5, "art": 0.5, "math": 0.5}, "sum to 1"),
        ({"law": 0.5, "art": 0.5, "math": 0.0}, "expected positive weights"),
        ("size", "expected share, equal"),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        stratify(LABELS, weights)


def test_pools_are_disjoint_whole_and_of_their_strata_by_seed():
    pools = made_pools()
    every = np.concatenate([*pools.anchor, *pools.adaptive, *pools.holdout])
    assert sorted(every) == list(range(len(LABELS)))
    assert [len(items) for items in pools.anchor] == [4, 8, 12]
    assert [len(items) for items in pools.adaptive] == [12, 24, 36]
    assert {LABELS[item] for item in [*pools.anchor[0], *pools.adaptive[0], *pools.holdout[0]]} == {"art"}
    again, other = made_pools(), made_pools(seed=1)
    assert all((one == two).all() for one, two in zip(pools.adaptive, again.adaptive, strict=True))
    assert any((one != two).any() for one, two in zip(pools.adaptive, other.adaptive, strict=True))


def test_sets_hold_the_whole_anchor_and_prefixes_so_that_they_share_items():
    pools = made_pools()
    small, large = (pools.used(EvaluationSet(0, counts, counts)) for counts in ((2, 3, 4), (2, 5, 9)))
    assert len(small) == 24 + 9
    assert set(np.concatenate(pools.anchor)) < set(small) < set(large)
    assert not set(large) & set(np.concatenate(pools.holdout))


def test_small_strata_and_impossible_shares_are_refused():
    with pytest.raises(ValueError, match=r"stratum 'art' has 4 items.*join small strata"):
        made_pools(["law"] * 40 + ["art"] * 4)
    with pytest.raises(ValueError, match="at most 1 together"):
        made_pools(anchor=0.5, adaptive=0.6)


def test_allocation_by_hand():
    half = [0.5, 0.5]
    assert allocate(10, half, [0.4, 0.1], 1, [20, 20]).tolist() == [8, 2]
    assert allocate(10, [0.8, 0.2], [0.1, 0.4], 1, [20, 20]).tolist() == [5, 5]
    assert allocate(10, half, [0.4, 0.0], 3, [20, 20]).tolist() == [7, 3]  # the floor
    assert allocate(10, half, [0.4, 0.1], 1, [5, 20]).tolist() == [5, 5]  # the ceiling
    assert allocate(10, half, [0.4, 0.0], 1, [5, 20]).tolist() == [5, 5]  # what the first cannot take
    assert allocate(10, [0.7, 0.3], [0.0, 0.0], 1, [20, 20]).tolist() == [7, 3]
    assert allocate(10, [0.5, 0.3, 0.2], [1, 1, 1], 4, [9, 9, 2]).tolist() == [4, 4, 2]  # all of the smallest
    assert allocate(7, [0.25, 0.35, 0.4], [1, 1, 1], 1, [9, 9, 9]).tolist() == [2, 2, 3]  # 1.75, 2.45, 2.8


def test_allocations_sum_up_and_respect_all_bounds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        strata, floor = rng.integers(1, 7), int(rng.integers(0, 4))
        weights, need, sizes = rng.dirichlet(np.ones(strata)), rng.random(strata).round(1), rng.integers(1, 20, strata)
        low = np.minimum(floor, sizes)
        total = int(rng.integers(low.sum(), sizes.sum() + 1))
        counts = allocate(total, weights, need, floor, sizes)
        assert counts.sum() == total
        assert ((low <= counts) & (counts <= sizes)).all()


def test_allocation_has_almost_the_smallest_error_of_all_whole_numbers():
    rng = np.random.default_rng(1)
    counts = np.array([c for c in itertools.product(range(2, 16), repeat=3) if sum(c) == 24])
    for _ in range(20):
        weights, deviations = rng.dirichlet(np.ones(3)), rng.random(3)
        variances = ((weights * deviations) ** 2 / counts).sum(1)
        found = ((weights * deviations) ** 2 / allocate(24, weights, deviations, 2, [15, 15, 15])).sum()
        assert variances.min() <= found * (1 + 1e-9) <= 1.02 * variances.min()


@pytest.mark.parametrize(
    ("total", "need", "message"),
    [(3, [1, 1], r"at least 4 \(floor 2\)"), (31, [1, 1], "have 30"), (9, [1, -1], "needs"), (9, [1, np.nan], "needs")],
)
def test_impossible_allocations_are_refused(total, need, message):
    with pytest.raises(ValueError, match=message):
        allocate(total, [0.5, 0.5], need, 2, [10, 20])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        Allocation(total=5, floor=0)
    with pytest.raises(ValueError, match="expected deviation or weakness"):
        Allocation(total=5, by="luck")  # type: ignore[arg-type]


def test_the_first_set_estimates_the_plain_stratified_mean_with_its_textbook_error():
    pools, scores = made_pools(), np.random.default_rng(0).random((len(LABELS), 2))
    chosen = first_set(pools, ALLOCATION)
    assert chosen.counts == (4, 8, 12)
    found = estimate(only(scores, pools, chosen), pools, chosen)
    own = [scores[np.r_[a, b[:n]]] for a, b, n in zip(pools.anchor, pools.adaptive, chosen.counts, strict=True)]
    np.testing.assert_allclose(found.means, [part.mean(0) for part in own])
    np.testing.assert_allclose(found.deviations, [part.std(0, ddof=1) for part in own])
    assert found.counts.tolist() == [[8, 8], [16, 16], [24, 24]]
    weights = pools.strata.weights[:, None]
    np.testing.assert_allclose(found.score, (weights * found.means).sum(0))
    np.testing.assert_allclose(found.error, np.sqrt((weights**2 * found.deviations**2 / found.counts).sum(0)))


def test_one_stratum_is_the_mean_and_its_standard_error():
    pools, scores = made_pools(["all"] * 20), np.arange(20.0)[:, None]
    chosen = EvaluationSet(0, (12,), (12,))
    found, used = estimate(scores, pools, chosen), scores[pools.used(chosen)]
    assert found.score[0] == pytest.approx(used.mean())
    assert found.error[0] == pytest.approx(used.std(ddof=1) / 4)


def test_the_anchor_counts_as_in_the_first_set_when_counts_have_moved():
    pools = made_pools(["all"] * 20, anchor=0.2)
    scores = np.full((20, 1), np.nan)
    scores[pools.anchor[0], 0] = [1, 1, 0, 0]
    scores[pools.adaptive[0][:8], 0] = [1, 1, 1, 1, 1, 1, 1, 0]
    found = estimate(scores, pools, EvaluationSet(3, (8,), (4,)))
    assert found.score[0] == pytest.approx(0.5 * 0.5 + 0.5 * 7 / 8)
    variance = 9 / 12 * 3 / 12 * 12 / 11
    assert found.error[0] == pytest.approx(np.sqrt(variance * (0.25 / 4 + 0.25 / 8)))


def test_scores_stay_unbiased_when_counts_play_against_them_and_errors_are_right():
    labels, runs = ["a"] * 60 + ["b"] * 90, 20_000
    pools, rng = made_pools(labels), np.random.default_rng(0)
    chances = np.where(np.array(labels) == "a", 0.3, 0.8)
    scores = (rng.random((len(labels), runs)) < chances[:, None]).astype(float)  # a search in each column
    lucky = scores[pools.anchor[0]].mean(0) > 0.3
    few, many = (EvaluationSet(1, counts, (6, 9)) for counts in ((1, 14), (14, 1)))
    kept, diluted = estimate(scores, pools, few), estimate(scores, pools, many)
    found = np.where(lucky, kept.score, diluted.score)  # good luck is kept, bad luck gets more items
    truth = 0.4 * 0.3 + 0.6 * 0.8
    assert found.mean() == pytest.approx(truth, abs=4 * found.std() / runs**0.5)
    for one in (kept, diluted):
        assert (one.error**2).mean() == pytest.approx(one.score.var(), rel=0.05)
    pooled = [
        sum(
            w * scores[np.r_[a, b[:n]]].mean(0)
            for w, a, b, n in zip((0.4, 0.6), pools.anchor, pools.adaptive, counts, strict=True)
        )
        for counts in (few.counts, many.counts)
    ]
    assert np.where(lucky, *pooled).mean() - truth > 0.01  # what the anchor's fixed share is for


def test_scores_stay_unbiased_under_the_allocation():
    labels = ["a"] * 30 + ["b"] * 30
    pools, rng, found, sets = made_pools(labels, anchor=0.2, adaptive=0.8), np.random.default_rng(0), [], set()
    allocation = Allocation(total=16, floor=2, by="weakness", every=1)
    for _ in range(1500):
        scores = (rng.random((60, 1)) < 0.5).astype(float)
        chosen = next_set(first_set(pools, allocation), scores[None], pools, allocation)
        found.append(estimate(scores, pools, chosen).score[0])
        sets.add(chosen.counts)
    assert len(sets) > 5
    assert np.mean(found) == pytest.approx(0.5, abs=3.5 * np.std(found) / 1500**0.5)


def test_items_without_a_score_are_left_out_and_a_stratum_without_any_is_an_error():
    pools = made_pools()
    chosen = first_set(pools, ALLOCATION)
    scores = np.random.default_rng(0).random((len(LABELS), 2))
    missing = scores.copy()
    missing[pools.adaptive[0][0], 1] = np.nan
    found = estimate(missing, pools, chosen)
    assert found.counts[0].tolist() == [8, 7]
    assert found.score[0] == estimate(scores, pools, chosen).score[0]
    missing[pools.anchor[2], 1] = np.nan
    with pytest.raises(ValueError, match="stratum 'math' has no scored item"):
        estimate(missing, pools, chosen)


def test_a_candidate_does_not_differ_from_itself_and_a_constant_is_found_exactly():
    pools, scores = made_pools(), np.random.default_rng(0).random((len(LABELS), 2))
    one, other = EvaluationSet(1, (3, 9, 12), (4, 8, 12)), EvaluationSet(2, (8, 4, 12), (4, 8, 12))
    seen, others = only(scores, pools, one), only(scores, pools, other)
    same = paired_difference(seen, others, pools, one, other)
    assert (same.score == 0).all()
    assert (same.error == 0).all()
    assert same.counts[:, 0].tolist() == [4 + 3, 8 + 4, 12 + 12]  # the shared prefixes
    shifted = paired_difference(seen + np.array([0.1, -0.2]), others, pools, one, other)
    np.testing.assert_allclose(shifted.score, [0.1, -0.2])
    np.testing.assert_allclose(shifted.error, 0, atol=1e-12)


def test_paired_differences_are_those_of_the_scores_on_one_set_with_a_smaller_error():
    pools, rng = made_pools(), np.random.default_rng(0)
    chosen, hardness = first_set(pools, ALLOCATION), rng.normal(size=(len(LABELS), 1))
    scores, others = (hardness + 0.1 * rng.normal(size=hardness.shape) for _ in range(2))
    one, other = estimate(scores, pools, chosen), estimate(others, pools, chosen)
    found = paired_difference(scores, others, pools, chosen, chosen)
    np.testing.assert_allclose(found.score, one.score - other.score)
    assert found.error[0] < 0.3 * np.hypot(one.error[0], other.error[0])


def test_sets_of_different_searches_are_not_compared():
    pools, scores = made_pools(), np.zeros((len(LABELS), 1))
    one = EvaluationSet(1, (3, 9, 12), (4, 8, 12))
    for other in (EvaluationSet(1, (4, 8, 12), (4, 8, 12)), EvaluationSet(2, (3, 9, 12), (3, 9, 12))):
        with pytest.raises(ValueError, match="different searches"):
            paired_difference(scores, scores, pools, one, other)


def test_the_allocation_moves_items_to_what_varies_or_is_weak():
    labels = ["flat"] * 50 + ["wild"] * 50
    pools, scores = made_pools(labels), np.full((2, 100, 1), 0.9)
    scores[:, 50:, 0] = np.tile([0.0, 1.0], 25)
    for by, counts in (("deviation", (2, 22)), ("weakness", None)):
        allocation = Allocation(total=24, floor=2, by=by, every=1)
        current = first_set(pools, allocation)
        assert current == EvaluationSet(0, (12, 12), (12, 12))
        found = next_set(current, scores, pools, allocation)
        assert (found.version, found.first, sum(found.counts)) == (1, (12, 12), 24)
        weak = 1 - scores[0, pools.anchor[1], 0].mean()
        assert found.counts == (counts or (round(24 * 0.1 / (0.1 + weak)), round(24 * weak / (0.1 + weak))))


def test_a_version_is_new_only_where_counts_move_and_only_every_so_many_candidates():
    pools, scores = made_pools(), np.random.default_rng(0).random((6, len(LABELS), 2))
    scores[:, :40] *= 0.2  # law varies less
    allocation = Allocation(total=24, floor=2, every=3)
    current = first_set(pools, allocation)
    for seen in (0, 1, 2, 4, 5):
        assert next_set(current, scores[:seen], pools, allocation) is current
    moved = next_set(current, scores[:3], pools, allocation)
    assert moved.version == 1
    assert next_set(moved, scores[:3], pools, allocation) is moved


def test_the_allocation_reads_the_anchor_alone_so_a_resumed_search_gets_the_same_sets():
    pools, rng = made_pools(), np.random.default_rng(0)
    scores = rng.random((8, len(LABELS), 2)) * rng.random((8, len(LABELS), 1))
    other = rng.random(scores.shape)
    for items in pools.anchor:
        other[:, items] = scores[:, items]

    def sets(recorded, start, begin=0):
        found = [start]
        for seen in range(begin, len(recorded)):
            found.append(next_set(found[-1], recorded[: seen + 1], pools, ALLOCATION))
        return found

    whole = sets(scores, first_set(pools, ALLOCATION))
    assert len({chosen.counts for chosen in whole}) > 2
    assert whole == sets(other, first_set(pools, ALLOCATION))
    assert whole[4:] == sets(scores, whole[4], begin=4)  # stopped after four candidates


def test_scores_the_allocation_cannot_use_are_refused():
    pools = made_pools()
    weak = Allocation(total=24, by="weakness", every=1)
    with pytest.raises(ValueError, match=r"expected scores in \[0, 1\], got the mean 7"):
        next_set(first_set(pools, weak), np.full((1, len(LABELS), 1), 7.0), pools, weak)
    for allocation in (weak, ALLOCATION):
        with pytest.raises(ValueError, match="stratum 'art': no candidate has enough scored anchor items"):
            next_set(first_set(pools, allocation), np.full((1, len(LABELS), 1), np.nan), pools, allocation)


def test_the_holdout_has_its_own_score():
    pools, scores = made_pools(), np.full((len(LABELS), 1), np.nan)
    for items, level in zip(pools.holdout, (0.1, 0.2, 0.3), strict=True):
        scores[items] = level
    found = holdout_estimate(scores, pools)
    assert found.score[0] == pytest.approx(0.1 / 6 + 0.2 / 3 + 0.3 / 2)
    assert found.counts[:, 0].tolist() == [len(items) for items in pools.holdout]
    whole = made_pools(anchor=0.4, adaptive=0.6)
    with pytest.raises(ValueError, match="no scored item"):
        holdout_estimate(scores, whole)
