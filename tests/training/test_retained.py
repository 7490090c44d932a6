"""What an adapter for the whole front does over its trade-offs: does it follow, and what does it offer?"""

import math

import pytest

from emorl.runs.results import TradeOff
from emorl.training.retained import follows, hypervolumes


def trade_off(ensemble, distilled, held_out=False):
    scores = {"ensemble": ensemble, "soup": dict.fromkeys(ensemble, 0.1), "distilled": distilled}
    return TradeOff("any", {"a": 1.0}, held_out, scores)


FOUND = [
    trade_off({"a": 0.1, "b": 0.9, "c": 0.5}, {"a": 0.2, "b": 0.5, "c": 0.1}),
    trade_off({"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 0.4, "b": 0.5, "c": 0.2}),
    trade_off({"a": 0.9, "b": 0.1, "c": 0.5}, {"a": 0.6, "b": 0.5, "c": 0.3}, held_out=True),
]


def test_an_adapter_that_obeys_follows_and_one_that_does_not_read_has_no_correlation():
    found = follows(FOUND, ["a", "b", "c"])
    assert found["a"] == pytest.approx(1.0)  # half as far, but in order
    assert math.isnan(found["b"])  # the same everywhere
    assert math.isnan(found["c"])  # there is nothing to follow
    turned = [
        trade_off(one.scores["ensemble"], {**one.scores["distilled"], "a": -one.scores["distilled"]["a"]}) for one in FOUND
    ]
    assert follows(turned, ["a"])["a"] == pytest.approx(-1.0)


def test_hypervolumes_are_of_the_front_alone_above_one_reference():
    volumes, reference = hypervolumes(FOUND, ["a", "b"])
    assert reference == {"a": pytest.approx(0.1 - 0.1 * 0.4), "b": pytest.approx(0.1 - 0.1 * 0.8)}  # below the worst by a tenth
    low_a, low_b = reference["a"], reference["b"]
    corners = (0.1 - low_a) * (0.9 - low_b) + (0.5 - 0.1) * (0.5 - low_b)  # a staircase of two points
    assert volumes["ensemble"] == pytest.approx(corners)
    assert volumes["distilled"] == pytest.approx((0.4 - low_a) * (0.5 - low_b))
