import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from emorl.config import UserError
from emorl.config.experiment import ObjectiveConfig
from emorl.objectives import REGISTRY, registered
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
        ("emorl.objectives.rules.text:Length.scor", {}, "has no 'Length.scor'; did you mean '_score'"),
        ("no.such.module:", {}, "expected package.module:attribute, got 'no.such.module:'$"),
        ("a/b:f", {}, "expected package.module:attribute, got 'a/b:f'$"),
        ("<m:f.<locals>.g>", {}, "got '<m:f.<locals>.g>'; a lambda, closure, method or instance has to be given in Python"),
        ("emorl.objectives:REGISTRY", {}, "expected a function or class"),
        ("length", {"maximun": 3}, "unknown option 'maximun'; did you mean 'maximum'"),
        ("classifier", {}, "option 'model' is missing"),
        ("classifier", {"model": "./not/there"}, "model './not/there' is not a folder"),
    ],
)
def test_a_wrong_objective_is_refused_before_any_model_loads(function, options, message):
    with pytest.raises(UserError, match=message):
        check_objectives({"x": config(function, **options)})


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (config("lenght"), "objective 'b': no objective function is called 'lenght'"),
        (config("no.such.module:"), "objective 'b': expected package.module:attribute"),
        (config("classifier", model="./not/there"), "objective 'b': model './not/there' is not a folder"),
    ],
)
def test_all_names_are_right_before_anything_is_imported(later, message):
    with pytest.raises(UserError, match=message):
        check_objectives({"a": config("no.such.module:f"), "b": later})


def test_all_functions_are_there_before_an_option_is_looked_at():
    with pytest.raises(UserError, match=r"objective 'b': cannot import 'no\.such\.module'"):
        check_objectives({"a": config("length", maximun=3), "b": config("no.such.module:f")})


def test_a_wrong_option_value_is_one_line():
    with pytest.raises(UserError, match=r"objective 'x': length: expected 0 <= minimum"):
        load_objective("x", config("length", minimum=9, maximum=1))


def test_a_hub_id_is_a_classifier():
    with pytest.raises(UserError, match=r"objective 'x': .*") as caught:
        load_objective("x", config("nobody/no-such-model"))
    assert "nobody/no-such-model" in str(caught.value)


class Scorer:
    """A reward function with a state."""

    range = (0.0, 10.0)

    def __init__(self, value=5.0):
        self.value = value

    def __call__(self, prompts, completions, bonus=0.0, **columns):
        return [self.value + bonus for _ in completions]

    @staticmethod
    def fixed(prompts, completions, **columns):
        return [0.25 for _ in completions]


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        (by_column, {"bonus": 0.5}, [1.5, 1.5]),
        (later, {}, [0.5, 0.5]),
        (lambda prompts, completions, **columns: [0.75, None], {}, [0.75, None]),
        (Scorer, {}, [0.5, 0.5]),
        (Scorer, {"value": 2.0}, [0.2, 0.2]),
        (Scorer(1.0), {}, [0.1, 0.1]),
        (Scorer(1.0), {"bonus": 2.0}, [0.3, 0.3]),
        (Scorer.fixed, {}, [0.25, 0.25]),
        (f"{__name__}:Scorer.fixed", {}, [0.25, 0.25]),
        (registered("length"), {"minimum": 4}, [0.5, 0.5]),
    ],
)
def test_a_callable_is_resolved_as_itself_with_its_options_and_range(function, options, expected):
    given = config(function, **options)
    check_objectives({"x": given})
    assert score(load_objective("x", given), topic=["a", "b"]) == expected


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (Scorer, {"valeu": 1.0}, "objective 'x': unknown option 'valeu'; did you mean 'value'"),
        (registered("classifier"), {}, "objective 'x': option 'model' is missing"),
        (registered("unit_tests"), {"tests_column": 3}, "objective 'x': tests_column: expected a text, got 3"),
        (dict, {}, "objective 'x': builtins:dict has no signature to read"),
    ],
)
def test_a_callables_options_are_checked(function, options, message):
    with pytest.raises(UserError, match=message):
        check_objectives({"x": config(function, **options)})


LIGHT = "rules.columns rules.text rules.exact_match rules.multiple_choice rules.numeric_answer code.unit_tests scale scalarize "
LIGHT += "preference loading catalogue check"


def test_rules_need_no_torch():
    rules = {"length": {}, "exact_match": {"answer_column": "x"}, "emorl.objectives.rules.text:Distinct2": {}}
    code = f"""
import importlib, sys
for name in {LIGHT.split()}: importlib.import_module(f"emorl.objectives.{{name}}")
from emorl.config.experiment import ObjectiveConfig
from emorl.objectives.loading import check_objectives
check_objectives({{name: ObjectiveConfig(function=name, options=options) for name, options in {rules}.items()}})
print([name for name in ("torch", "transformers", "datasets", "pandas") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("name", REGISTRY)
def test_every_registered_name_is_a_class(name):
    assert isinstance(registered(name), type)
