"""Which trade-off a model's name, weights or a preference mean."""

import pytest

from emorl.config import UserError
from emorl.runs.results import Point
from emorl.serving.models import Model, Models, Steered, UnknownModelError

FRONT = [
    Point({"kind": 0.8, "short": 0.2}, {"kind": 0.9, "short": 0.1}, 0.6),
    Point({"kind": 0.3, "short": 0.7}, {"kind": 0.4, "short": 0.8}, 0.5),
]


@pytest.fixture
def models():
    def steered(prefix):
        return Steered(prefix, FRONT, FRONT[0], ["kind", "short"], lambda weights: (prefix, dict(weights)))

    return Models(
        [steered(""), steered("soup")], [Model("emorl/policy/kind", "policy", "alone"), Model("emorl/base", "base", "bare")]
    )


@pytest.mark.parametrize(
    ("name", "voice"),
    [
        ("emorl", ("", {"kind": 0.8, "short": 0.2})),
        ("emorl/best", ("", {"kind": 0.8, "short": 0.2})),
        ("emorl/front/2", ("", {"kind": 0.3, "short": 0.7})),
        ("emorl/kind=0.5,short=0.5", ("", {"kind": 0.5, "short": 0.5})),
        ("emorl/short=2", ("", {"kind": 0.0, "short": 2.0})),
        ("emorl/soup", ("soup", {"kind": 0.8, "short": 0.2})),
        ("emorl/soup/best", ("soup", {"kind": 0.8, "short": 0.2})),
        ("emorl/soup/front/1", ("soup", {"kind": 0.8, "short": 0.2})),
        ("emorl/soup/kind=1,short=3", ("soup", {"kind": 1.0, "short": 3.0})),
        ("emorl/policy/kind", "alone"),
        ("emorl/base", "bare"),
    ],
)
def test_a_name_means_one_voice(models, name, voice):
    assert models.find(name).voice == voice


def test_weights_and_preferences_are_fields_too(models):
    assert models.find("emorl", {"short": 0.4, "kind": 0.6}).voice == ("", {"kind": 0.6, "short": 0.4})
    found = models.find("emorl/soup", None, {"short": 1.0})
    assert (found.name, found.voice, found.scores) == ("emorl/soup/front/2", ("soup", dict(FRONT[1].weights)), FRONT[1].scores)


def test_weights_of_a_known_point_are_told_with_its_scores(models):
    assert models.find("emorl/kind=0.8,short=0.2").described == {
        "model": "emorl/kind=0.8,short=0.2",
        "kind": "front",
        "weights": {"kind": 0.8, "short": 0.2},
        "scores": {"kind": 0.9, "short": 0.1},
        "value": 0.6,
    }
    assert models.find("emorl/kind=0.81,short=0.19").scores is None


def test_the_list_names_what_can_be_found(models):
    names = [model.name for model in models.listed()]
    assert names == [
        "emorl/best", "emorl/front/1", "emorl/front/2",
        "emorl/soup/best", "emorl/soup/front/1", "emorl/soup/front/2",
        "emorl/policy/kind", "emorl/base",
    ]  # fmt: skip
    assert [models.find(name).name for name in names] == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("emorl/bets", "did you mean 'emorl/best'"),
        ("gpt-4", "no model is called 'gpt-4'"),
        ("", "no model is called ''"),
        ("emorl/policy/short", "no model is called 'emorl/policy/short'"),
        ("emorl/front/3", "points 1 to 2, got '3'"),
        ("emorl/front/0", "points 1 to 2"),
        ("emorl/front/²", "points 1 to 2"),
        ("emorl/front/" + "9" * 5000, "points 1 to 2"),
        ("emorl/front/0000000002", "points 1 to 2"),
        ("emorl/front/1" + "0" * 9, "points 1 to 2"),
        ("emorl/soup/nothing", "no model is called 'emorl/soup/nothing'"),
        ("emorlx", "no model is called"),
    ],
)
def test_an_unknown_name_is_refused(models, name, message):
    with pytest.raises(UnknownModelError, match=message):
        models.find(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("emorl", {"kind": 1.0}, {"short": 1.0}), "send one of both"),
        (("emorl/front/1", {"kind": 1.0}), "names a trade-off already"),
        (("emorl/kind=1", None, {"kind": 1.0}), "names a trade-off already"),
        (("emorl/base", {"kind": 1.0}), "is one policy, without a trade-off"),
        (("emorl", {"kin": 1.0}), "no policy is called 'kin'; did you mean 'kind'"),
        (("emorl", None, {"long": 1.0}), "prefer"),
        (("emorl", {"kind": 0.0}), "not all 0"),
        (("emorl", {"kind": -1.0, "short": 2.0}), "none below 0"),
        (("emorl/kind=x",), "expected objective=number pairs"),
        (("emorl/kind=nan",), "expected finite numbers"),
        (("emorl/kind=1e400",), "expected finite numbers"),
    ],
)
def test_a_trade_off_that_is_none_is_refused(models, arguments, message):
    with pytest.raises(UserError, match=message):
        models.find(*arguments)


def test_where_nothing_has_the_plain_name_emorl_means_what_takes_weights():
    distilled = Steered("distilled", FRONT, FRONT[0], ["kind", "short"], dict)
    only = Models([distilled], [Model("emorl/fused", "fused", "alone")])
    assert only.find("emorl", {"kind": 1.0}).name == "emorl/distilled/kind=1,short=0"
    assert only.find("emorl").name == "emorl/distilled/best"
    assert only.find("emorl/distilled/front/2").scores == FRONT[1].scores


def test_where_nothing_takes_weights_emorl_means_the_one_thing_there_is():
    only = Models([], [Model("emorl/fused", "fused", "alone")])
    assert only.find("emorl").voice == "alone"
    with pytest.raises(UserError, match="is one policy"):
        only.find("emorl", {"kind": 1.0})
