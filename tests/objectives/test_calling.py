"""Reward functions as people write them: called as TRL calls them, and one line where they go wrong."""

import sys
import textwrap

import pytest
import torch
import trl.rewards
from transformers import AutoModelForSequenceClassification, LlamaConfig

from emorl.config import UserError
from emorl.config.experiment import ObjectiveConfig
from emorl.objectives.loading import Objective, check_objectives, load_objective

PROMPTS = [[{"role": "user", "content": "why?"}]] * 2
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("a b a b a b", "<think>x</think> y")]


def tokens(texts):
    return [list(range(len(text))) for text in texts]


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (trl.rewards.get_soft_overlong_punishment(10, 5), {}),
        (trl.rewards.get_repetition_penalty_reward(2, -1.0), {}),
        (trl.rewards.think_format_reward, {}),
    ],
)
def test_trls_own_rewards_score_outside_of_its_trainer(function, columns):
    mine = Objective("x", function, tokenize=tokens)(PROMPTS, COMPLETIONS, **columns)
    theirs = function(
        prompts=PROMPTS, completions=COMPLETIONS, completion_ids=tokens([c[0]["content"] for c in COMPLETIONS]), **columns
    )
    assert mine == pytest.approx(list(theirs))


def test_everything_that_trl_hands_on_is_there_and_harmless():
    def asks(completions, completion_ids, trainer_state, log_metric, log_extra, **columns):
        log_metric("a", 1.0)
        log_extra("b", ["x"] * len(completions))
        assert trainer_state.global_step == 0
        return [float(len(ids)) for ids in completion_ids]

    assert Objective("x", asks, tokenize=tokens)(PROMPTS, COMPLETIONS) == [11.0, 18.0]
    known = Objective("x", asks, tokenize=tokens)(PROMPTS, COMPLETIONS, completion_ids=[[1], [1, 2]])
    assert known == [1.0, 2.0]  # in training they are


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"a": 1.0, "b": 2.0}, "returned {'a': 1.0.*; expected a list with one score per completion"),
        ("good", "returned 'good'; expected a list"),
        (None, "returned None; expected a list"),
        (3.0, "returned 3.0; expected a list"),
        ([1.0], "returned 1 scores for 2 completions"),
        ([[1.0], [2.0]], r"returned \[1.0\] for completion 0; expected a finite number"),
        (torch.ones(2, 2), "expected a finite number"),
        ([1.0, float("nan")], "returned nan for completion 1"),
        (["1", "2"], "returned '1' for completion 0"),
    ],
)
def test_what_is_no_list_of_scores_is_one_line(returned, message):
    with pytest.raises(UserError, match=message):
        Objective("x", lambda prompts, completions, **columns: returned)(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("returned", [torch.tensor([1.0, 2.0]), [torch.tensor(1.0), 2], (1, 2.0), iter([1.0, 2.0])])
def test_whatever_gives_two_numbers_is_two_scores(returned):
    assert Objective("x", lambda prompts, completions, **columns: returned)(PROMPTS, COMPLETIONS) == [1.0, 2.0]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a user's, and gives its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text):
        name = f"theirs_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        sys.modules.pop(name, None)
        return name

    return write


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1 / 0]", "objective 'x' raised ZeroDivisionError at theirs_0.py:2: division by zero"),
        ("return [columns['grade']]", "raised KeyError at theirs_0.py:2: 'grade'"),
        ("import sys; sys.exit(0)", r"objective 'x' ended the program \(sys.exit\)"),
        ("raise SystemExit", "ended the program"),
        ("assert False, 'no'", "raised AssertionError at theirs_0.py:2: no"),
        ("import json; return json.loads('{')", "raised JSONDecodeError at"),
    ],
)
def test_what_a_function_raises_is_one_line_with_its_place(module, body, message):
    name = module(f"def f(prompts, completions, **columns):\n    {body}\n")
    objective = load_objective("x", ObjectiveConfig(function=f"{name}:f"))
    with pytest.raises(UserError, match=message) as caught:
        objective(PROMPTS, COMPLETIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", r"theirs_0.py:1 is no Python \(invalid syntax\)"),
        ("1 / 0", "importing theirs_0 raised ZeroDivisionError at theirs_0.py:1"),
        ("import sys; sys.exit(3)", "ended the program"),
        ("import nothing_of_that_name", "cannot import 'theirs_0'"),
        ("g = 1", "has no 'f'"),
        ("def f(): return []", r"cannot be given prompts and completions by name; end its arguments with \*\*columns"),
        ("def f(a, b): return []", "cannot be given prompts and completions by name"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_line_before_anything_else(module, text, message):
    with pytest.raises(UserError, match=message) as caught:
        check_objectives({"x": ObjectiveConfig(function=f"{module(text)}:f")})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["runs/nope", "runs/empty", "./nowhere", "/nowhere", "a/b/c"])
def test_a_reward_model_that_is_not_there_is_found_before_anything_is_trained(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is not a folder|holds no model"):
        check_objectives({"x": ObjectiveConfig(function="classifier", options={"model": name})})
    check_objectives({"x": ObjectiveConfig(function="classifier", options={"model": "owner/on-the-hub"})})


def test_a_decoder_without_a_pad_token_scores_batches(tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    objective = load_objective("x", ObjectiveConfig(function="classifier", options={"model": str(tmp_path)}))
    together = objective(PROMPTS, COMPLETIONS)
    alone = [objective(PROMPTS[:1], [completion])[0] for completion in COMPLETIONS]
    assert together == pytest.approx(alone, abs=1e-5)
