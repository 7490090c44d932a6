import functools

import pytest

from emorl.config import UserError
from emorl.config.experiment import Experiment, ObjectiveConfig
from emorl.config.objects import callable_name, shown_name
from emorl.config.yaml import as_mapping, parse

BLOCKS = {"output": "o", "base": {"model": "m"}, "data": {"path": "p"}}


def reward(prompts, completions, **columns):
    return [1.0 for _ in completions]


class Scorer:
    def score(self, prompts, completions, **columns):
        return [1.0 for _ in completions]

    __call__ = score


def inner():
    return lambda prompts, completions, **columns: [1.0 for _ in completions]


@functools.wraps(reward)
def impostor(*args, **kwargs):
    return reward(*args, **kwargs)


@pytest.mark.parametrize(("function", "name"), [(reward, "reward"), (Scorer, "Scorer"), (Scorer.score, "Scorer.score")])
def test_a_callable_is_named_where_that_name_imports_it(function, name):
    assert callable_name(function) == shown_name(function) == f"{__name__}:{name}"


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (inner(), f"<{__name__}:inner.<locals>.<lambda>>"),
        (Scorer(), f"<{__name__}:Scorer>"),
        (Scorer().score, f"<{__name__}:Scorer.score>"),
        (impostor, f"<{__name__}:reward>"),
        (functools.partial(reward), "<functools:partial>"),
    ],
)
def test_what_cannot_be_imported_again_has_no_name_and_is_written_as_nothing_that_can(function, shown):
    assert callable_name(function) is None
    assert shown_name(function) == shown


@pytest.mark.parametrize("function", [reward, Scorer, Scorer(), inner()])
def test_an_experiment_takes_a_callable_and_writes_its_name(function):
    for given in (function, {"function": function}, ObjectiveConfig(function=function)):
        experiment = parse(Experiment, {**BLOCKS, "objectives": {"x": given}}, "here")
        assert experiment.objectives["x"].function is function
        assert as_mapping(experiment)["objectives"]["x"]["function"] == shown_name(function)


def test_options_stand_beside_a_callable():
    experiment = parse(Experiment, {**BLOCKS, "objectives": {"x": {"function": reward, "bonus": 1}}}, "here")
    assert experiment.objectives["x"].options == {"bonus": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"function": 3}, r"^here: objectives\.x\.function: expected a text, got 3$"),
        ({"minimum": 3}, r"^here: objectives\.x: name a function that scores answers, or a file of pairs"),
    ],
)
def test_what_is_neither_text_nor_callable_is_a_mistake_in_a_text(given, message):
    with pytest.raises(UserError, match=message):
        parse(Experiment, {**BLOCKS, "objectives": {"x": given}}, "here")
