import math

import numpy as np
import pytest
import torch

from emorl.config import UserError
from emorl.config.experiment import ObjectiveConfig
from emorl.objectives.catalogue import catalogue
from emorl.objectives.loading import Objective, check_objectives, load_objective


def config(function, **options):
    return ObjectiveConfig(function=function, options=options)


def score(objective, count=2, **columns):
    return objective(prompts=["p"] * count, completions=["c d"] * count, **columns)


async def later(prompts, completions, **columns):
    return [0.5 for _ in completions]


def by_column(prompts, completions, topic, bonus=0.0, **columns):
    return [len(value) + bonus for value in topic]


@pytest.mark.parametrize("name", [entry.name for entry in catalogue() if not entry.needs])
def test_every_rule_scores_texts_and_conversations_alike_in_its_range(name):
    objective = load_objective(name, config(name))
    texts = ["", "a", "a b a b a b", "word " * 100]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [[{"role": "user", "content": "hi"}]] * 4
    scores = objective(["hi"] * 4, texts)
    assert scores == objective(prompts, turns)
    assert all(0 <= value <= 1 for value in scores if value is not None)


def test_trl_reward_functions_work_unchanged():
    objective = load_objective("thinks", config("trl.rewards:think_format_reward"))
    good, bad = "<think>a</think>b", "b"
    assert objective(["p"] * 2, [[{"role": "assistant", "content": text}] for text in (good, bad)]) == [1.0, 0.0]


def test_columns_and_options_reach_the_function():
    objective = load_objective("topic", config(f"{__name__}:by_column", bonus=0.5))
    assert score(objective, topic=["a", "bcd"], other=[1, 2]) == [1.5, 3.5]


def test_asynchronous_reward_functions_are_awaited():
    assert score(load_objective("later", config(f"{__name__}:later"))) == [0.5, 0.5]


@pytest.mark.parametrize("scores", [np.array([0.1, 0.2]), torch.tensor([0.1, 0.2]), [np.float32(0.1), 0.2], (0.1, 0.2)])
def test_numbers_of_any_library_become_floats(scores):
    result = score(Objective("f", lambda **_: scores))
    assert result == pytest.approx([0.1, 0.2])
    assert all(type(value) is float for value in result)


def test_none_means_cannot_be_scored():
    assert score(Objective("f", lambda **_: [None, 1])) == [None, 1.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.1], "objective 'f' returned 1 scores for 2 completions"),
        ([0.1, math.nan], "objective 'f' returned nan for completion 1"),
        ([math.inf, 0.1], "objective 'f' returned inf for completion 0"),
        ([0.1, "high"], "objective 'f' returned 'high' for completion 1"),
        ("0.5", "objective 'f' returned '0.5'; expected a list"),
        (0.5, "objective 'f' returned 0.5; expected a list"),
        (None, "objective 'f' returned None; expected a list"),
    ],
)
def test_wrong_scores_are_refused_by_name_and_value(scores, message):
    with pytest.raises(UserError, match=message):
        score(Objective("f", lambda **_: scores))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("clasifier", {}, "objective 'x': no objective function is called 'clasifier'; did you mean 'classifier'"),
        ("zzz", {}, "valid: 'classifier|valid: classifier, distinct_2"),
        ("no.such.module:f", {}, "cannot import 'no.such.module'"),
        ("emorl.objectives.rules.text:Lenght", {}, "has no 'Lenght'; did you mean 'Length'"),
        ("emorl.objectives:REGISTRY", {}, "expected a function or class"),
        ("length", {"maximun": 3}, "unknown option 'maximun'; did you mean 'maximum'"),
        ("classifier", {}, "option 'model' is missing"),
        ("classifier", {"model": "./not/there"}, "model './not/there' is not a folder"),
    ],
)
def test_a_wrong_objective_is_refused_before_any_model_loads(function, options, message):
    with pytest.raises(UserError, match=message):
        check_objectives({"x": config(function, **options)})


def test_a_wrong_option_value_is_one_line():
    with pytest.raises(UserError, match=r"objective 'x': length: expected 0 <= minimum"):
        load_objective("x", config("length", minimum=9, maximum=1))


def test_a_hub_id_is_a_classifier():
    with pytest.raises(UserError, match=r"objective 'x': .*") as caught:
        load_objective("x", config("nobody/no-such-model"))
    assert "nobody/no-such-model" in str(caught.value)
