import numpy as np
import pytest

from emorl.objectives.scalarize import SCALARIZATIONS, importance_of, scalarize

SCORES = np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]])
REFERENCES = np.array([[1.0, 0.0], [0.0, 1.0]])


def values(method, importance=(0.5, 0.5)):
    return scalarize(SCORES, method, np.array(importance), REFERENCES)


def test_values_by_hand():
    assert values("mean") == pytest.approx([0.5, 0.5, 0.5])
    assert values("weighted", (0.75, 0.25)) == pytest.approx([0.7, 0.45, 0.5])
    assert values("minimum") == pytest.approx([0.1, 0.4, 0.5])
    assert values("chebyshev") == pytest.approx([-0.45 - 5e-4, -0.3 - 5e-4, -0.25 - 5e-4])


def test_chebyshev_finds_a_point_off_the_convex_hull_that_no_weighted_mean_finds():
    scores = np.array([[1.0, 0.0], [0.45, 0.45], [0.0, 1.0]])
    assert all(scalarize(scores, "weighted", np.array([w, 1 - w]), scores).argmax() != 1 for w in np.linspace(0, 1, 101))
    assert scalarize(scores, "chebyshev", np.array([0.5, 0.5]), scores).argmax() == 1


@pytest.mark.parametrize("method", SCALARIZATIONS)
def test_better_in_everything_is_never_worth_less(method):
    better = scalarize(SCORES + 0.05, method, np.array([0.3, 0.7]), REFERENCES)
    assert (better > scalarize(SCORES, method, np.array([0.3, 0.7]), REFERENCES)).all()


def test_preferences_become_importance():
    assert importance_of(["a", "b"], {}).tolist() == [0.5, 0.5]
    assert importance_of(["a", "b", "c"], {"c": 3, "a": 1}).tolist() == [0.25, 0.0, 0.75]


@pytest.mark.parametrize(
    ("preferences", "message"),
    [({"q": 1}, "preferences name q; valid: a, b"), ({"a": -1}, "not negative"), ({"a": 0}, "not all 0"),
     ({"a": float("nan")}, "must be finite")],
)  # fmt: skip
def test_impossible_preferences_are_refused(preferences, message):
    with pytest.raises(ValueError, match=message):
        importance_of(["a", "b"], preferences)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="expected one of mean, weighted"):
        values("median")
