"""Raw score -> score -> reward: the pure transform, and what an experiment file may say about it."""

import math

import pytest

from emorl.config import UserError
from emorl.config.objective import ObjectiveConfig, TransformConfig
from emorl.objectives import REGISTRY, registered
from emorl.objectives.loading import Objective, check_objectives, load_objective, outside_range
from emorl.objectives.scale import PAPER_CLIP, Scale, declared_range, resolve


def stars(prompts, completions, **columns):
    """A rule whose raw scores are the numbers written."""
    return [None if text == "none" else float(text) for text in completions]


def graded(prompts, completions, **columns):
    return stars(prompts, completions)


graded.range = (1, 5)


class Graded:
    range = (5, 1)

    def __call__(self, prompts, completions, **columns):
        return stars(prompts, completions)


def load(function="stars", **transform):
    return load_objective("x", ObjectiveConfig(function=f"{__name__}:{function}", transform=transform or None))


def scores(objective, *texts):
    return objective(["p"] * len(texts), list(texts))


def test_scores_and_rewards_by_hand():
    objective = load(range=[0, 5], log=True)
    found = scores(objective, "0", "1", "2.5", "5", "none")
    assert found == [1e-4, 0.2, 0.5, 0.9999, None]
    assert objective.rewards(found) == [math.log(1e-4), math.log(0.2), math.log(0.5), math.log(0.9999), None]
    assert scores(load(range=[-1, 1]), "-1", "0", "0.5", "1") == [0.0, 0.5, 0.75, 1.0]
    assert scores(load(range=[0, 1], clip=[0.1, 0.8]), "0", "0.5", "1") == [0.1, 0.5, 0.8]


def test_mean_and_standard_deviation_are_a_logistic_without_overflow():
    expected = [1 / (1 + math.exp(1.5)), 0.5, 1 / (1 + math.exp(-2))]
    assert scores(load(mean=3, std=2), "0", "3", "7") == pytest.approx(expected, abs=1e-12)
    assert scores(load(mean=0, std=1e-3), "-1e6", "1e6") == [0.0, 1.0]
    assert scores(load(mean=0, std=1, log=True), "-1e6", "1e6") == list(PAPER_CLIP)


def test_a_better_raw_score_is_never_worth_less():
    raws = [x / 7 for x in range(-21, 22)]
    for scale in (Scale(range=(-2, 2), clip=(0.0, 1.0)), Scale(mean=0.3, std=2.0, clip=PAPER_CLIP, log=True)):
        rewards = [scale.reward(scale.score(raw)) for raw in raws]
        assert rewards == sorted(rewards)


def test_without_a_transform_undeclared_scores_stay_and_declared_ranges_become_0_to_1():
    assert scores(load(), "-3", "7", "none") == [-3.0, 7.0, None]
    assert scores(load("graded"), "1", "2", "5") == [0.0, 0.25, 1.0]
    assert scores(load("graded", log=True), "1", "2", "5") == [1e-4, 0.25, 0.9999]
    assert scores(load("graded", range=[0, 10]), "1", "5") == [0.1, 0.5]


@pytest.mark.parametrize("name", REGISTRY)
def test_every_registered_objective_declares_0_to_1_and_so_keeps_its_scores(name):
    scale = resolve(None, declared_range(registered(name)))
    assert scale.range == (0.0, 1.0)
    assert [scale.score(raw) for raw in (0.0, 0.1, 1 / 3, 1.0)] == [0.0, 0.1, 1 / 3, 1.0]
    assert not scale.log


def test_raw_scores_outside_the_range_are_clipped_counted_and_said_in_one_line():
    objective = load("graded")
    assert outside_range([objective]) == []
    assert scores(objective, "0", "5.0000001", "5", "9", "none") == [0.0, 1.0, 1.0, 1.0, None]
    scores(objective, "3")
    (line,) = outside_range([objective, load()])
    assert line.startswith("objective 'x': 2 of 6 raw scores were outside its range [1, 5] and were clipped")


def test_scores_of_another_scale_are_filed_under_another_key():
    keys = {load().key, load("graded").key, load("graded", log=True).key, load(range=[0, 5]).key, load(mean=0, std=1).key}
    assert len(keys) == 5
    assert load("graded").key == load("graded", range=[1, 5]).key  # the same scores
    assert Objective("x", stars).key == "x"


def test_the_scale_in_words():
    assert str(load().scale) == "raw score, no range declared"
    assert str(resolve(None, (0.0, 1.0))) == "raw score in [0, 1]"
    words = "raw score in [0, 5] mapped onto [0, 1], clipped to [0.0001, 0.9999]; training reward log(score)"
    assert str(load(range=[0, 5], log=True).scale) == words
    assert str(load(mean=1, std=2).scale) == "logistic((raw - 1) / 2)"


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ({"range": [5, 0]}, "the lower first"),
        ({"range": [0, math.inf]}, "finite number"),
        ({"clip": [0, 2]}, r"clip: expected two numbers in \[0, 1\]"),
        ({"clip": [0, 1], "log": True}, "must begin above 0 where log is on"),
        ({"mean": 1}, "mean and std go together"),
        ({"mean": 1, "std": 2, "range": [0, 1]}, "either a range, or mean and std"),
        ({"mean": math.nan, "std": 2}, "finite number"),
        ({"mean": 1, "std": 0}, "greater than 0"),
    ],
)
def test_an_impossible_transform_is_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        TransformConfig(**transform)


def test_a_log_needs_a_range_and_a_declared_range_must_be_one():
    with pytest.raises(UserError, match=r"objective 'x': transform: its function declares no range; give `range: \[low"):
        check_objectives({"x": ObjectiveConfig(function=f"{__name__}:stars", transform=TransformConfig(log=True))})
    with pytest.raises(UserError, match=r"objective 'x': its function declares the range \(5, 1\)"):
        check_objectives({"x": ObjectiveConfig(function=f"{__name__}:Graded")})


def test_another_meaning_of_range_is_no_declaration():
    class Other:
        def range(self):
            return 3

    assert declared_range(Other) is None
    assert declared_range(len) is None
