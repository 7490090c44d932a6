"""Accuracy by subject: by hand, on the paper's table, and against the strata's estimate."""

import numpy as np
import pandas as pd
import pytest

from emorl.evaluation.strata import Allocation, estimate, first_set, split, stratify
from emorl.evaluation.subjects import accuracy_by_subject


def table(**scores):
    return pd.DataFrame([(subject, score) for subject, own in scores.items() for score in own], columns=["subject", "score"])


def test_both_means_and_errors_by_hand():
    found = accuracy_by_subject(table(law=[1, 1, 0, 0], art=[1, 1, 1, 0, 1, 1, 1, 0]))
    assert found.subjects["subject"].tolist() == ["art", "law"]
    assert found.subjects["accuracy"].tolist() == [0.75, 0.5]
    assert found.subjects["items"].tolist() == [8, 4]
    errors = np.array([(0.75 * 0.25 / 7) ** 0.5, (0.5 * 0.5 / 3) ** 0.5])
    np.testing.assert_allclose(found.subjects["error"], errors)
    assert found.plain_mean == 0.625
    assert found.weighted_mean == pytest.approx(8 / 12)
    assert found.plain_error == pytest.approx(np.hypot(*errors) / 2)
    assert found.weighted_error == pytest.approx(np.hypot(errors[0] * 2 / 3, errors[1] / 3))


def test_the_papers_weighted_accuracy_is_the_plain_mean():
    subjects = {"logic": (126, 0.532), "government": (193, 0.948), "international": (121, 0.868), "jurisprudence": (108, 0.82)}
    subjects |= {"fallacies": (163, 0.761), "management": (103, 0.825), "marketing": (234, 0.915)}
    found = accuracy_by_subject(table(**{k: [1] * round(n * p) + [0] * (n - round(n * p)) for k, (n, p) in subjects.items()}))
    assert round(100 * found.plain_mean, 1) == 81.0  # printed as "Weighted_accuracy"
    assert round(100 * found.weighted_mean, 1) == 82.7
    assert 0.01 < found.weighted_error < 0.015


def test_the_strata_say_the_same_where_everything_is_used():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"subject": rng.choice(["a", "b", "c"], 60), "right": rng.integers(0, 2, 60)})
    found = accuracy_by_subject(data, "right")
    scores = data[["right"]].to_numpy(float)
    for weights, mean, error in (
        ("equal", found.plain_mean, found.plain_error),
        ("share", found.weighted_mean, found.weighted_error),
    ):
        pools = split(stratify(data["subject"].tolist(), weights), anchor=0.4, adaptive=0.6, seed=0)
        total = sum(map(len, pools.adaptive))
        same = estimate(scores, pools, first_set(pools, Allocation(total)))
        assert (same.score[0], same.error[0]) == (pytest.approx(mean), pytest.approx(error))


def test_the_error_of_a_single_question_is_unknown():
    found = accuracy_by_subject(table(law=[1], art=[0, 1]))
    assert found.plain_mean == 0.75
    assert np.isnan(found.plain_error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pd.DataFrame({"subjects": ["a"], "score": [1]}), "no column 'subject'; did you mean 'subjects'"),
        (table(a=[1, 0.5]), "expected 0 or 1, got 0.5"),
        (table(a=[1, float("nan")]), "expected 0 or 1, got nan"),
        (table(), "at least one row"),
        (pd.DataFrame({"subject": ["a", None], "score": [1, 0]}), "a subject in each"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        accuracy_by_subject(data)
