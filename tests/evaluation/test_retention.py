"""The share of a gain that is kept: known values, and none where the gain may be nothing."""

import numpy as np
import pytest

from emorl.evaluation.retention import kept_divergence, kept_value

RNG = np.random.default_rng(0)
SOUP = RNG.normal(0.4, 0.05, (60, 2))
GAIN = np.abs(RNG.normal(0.2, 0.02, (60, 2)))


def test_a_student_half_way_keeps_half_and_one_beyond_keeps_more():
    for share in (0.0, 0.5, 0.8, 1.2, -0.3):
        kept = kept_value({"ensemble": SOUP + GAIN, "soup": SOUP, "distilled": SOUP + share * GAIN}, [0.5, 0.5], 500, 0)
        assert kept.gain == pytest.approx(GAIN.mean())
        assert kept.share == pytest.approx(share, abs=1e-9)
        assert kept.low == pytest.approx(share, abs=1e-9)  # exactly that share on every prompt
        assert kept.high == pytest.approx(share, abs=1e-9)
    noisy = SOUP + RNG.normal(0.5, 0.3, GAIN.shape) * GAIN
    kept = kept_value({"ensemble": SOUP + GAIN, "soup": SOUP, "distilled": noisy}, [1.0, 0.0], 500, 0)
    expected = (noisy - SOUP)[:, 0].mean() / GAIN[:, 0].mean()  # the second objective counts nothing
    assert kept.share == pytest.approx(expected)
    assert kept.low < expected < kept.high


def test_a_loss_can_be_kept_too():
    kept = kept_value({"ensemble": SOUP - GAIN, "soup": SOUP, "distilled": SOUP - 0.7 * GAIN}, [0.5, 0.5], 500, 0)
    assert kept.gain == pytest.approx(-GAIN.mean())
    assert kept.share == pytest.approx(0.7)


def test_a_gain_that_may_be_nothing_has_no_share():
    noise = RNG.normal(0, 0.2, SOUP.shape)
    kept = kept_value({"ensemble": SOUP + noise, "soup": SOUP, "distilled": SOUP}, [0.5, 0.5], 500, 0)
    assert kept.gain_low < 0 < kept.gain_high
    assert kept.share is kept.low is kept.high is None
    same = kept_value({"ensemble": SOUP, "soup": SOUP, "distilled": SOUP}, [0.5, 0.5], 500, 0)
    assert same.share is None


def test_prompts_that_one_system_could_not_be_scored_on_are_left_out():
    students = SOUP + 0.5 * GAIN
    students[3] = np.nan
    kept = kept_value({"ensemble": SOUP + GAIN, "soup": SOUP, "distilled": students}, [0.5, 0.5], 500, 0)
    assert kept.gain == pytest.approx(GAIN[np.arange(60) != 3].mean())
    assert kept.share == pytest.approx(0.5)
    students[:, 0] = np.nan
    of_other = kept_value({"ensemble": SOUP + GAIN, "soup": SOUP, "distilled": students}, [0.0, 1.0], 500, 0)
    assert of_other.share == pytest.approx(0.5)  # an objective of no importance has no say
    nothing = kept_value({"ensemble": SOUP + GAIN, "soup": SOUP, "distilled": students}, [0.5, 0.5], 500, 0)
    assert np.isnan(nothing.gain)
    assert nothing.share is None


def test_divergence_is_weighed_by_tokens_and_its_gain_is_all_of_the_soup_s():
    tokens = RNG.integers(5, 30, 40).astype(float)
    soup = np.stack([tokens * 0.2, tokens], 1)  # 0.2 nats per token
    student = np.stack([tokens * 0.05, tokens], 1)
    kept = kept_divergence(soup, student, 500, 0)
    assert kept.gain == pytest.approx(0.2)
    assert kept.share == pytest.approx(0.75)
    uneven = soup.copy()
    uneven[0] = [100.0, 1.0]
    assert kept_divergence(uneven, student, 500, 0).gain == pytest.approx(uneven[:, 0].sum() / uneven[:, 1].sum())
