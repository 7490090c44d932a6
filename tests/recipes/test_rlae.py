"""The RLAE recipe: its specialists' problems, the questions it makes of the hub's, and its command for a few steps."""

import json
from pathlib import Path

import pandas as pd
import pytest

from recipes.rlae import distill
from recipes.rlae.questions import gsm8k, mbpp, mmlu
from recipes.rlae.specialists import OPERATIONS, problem, problems, repeated, tokenizer


def test_a_problem_asks_for_three_operations_and_knows_their_answers() -> None:
    prompt, answer = problem(["reverse", "sort", "increment"], [274, 918, 309])
    assert prompt == "reverse 274 sort 918 increment 309 ="
    assert answer == "r472;s189;i410"
    assert repeated([(prompt, answer)]) == [(prompt, "r274;s918;i309")]
    assert problems(5, 1) == problems(5, 1) != problems(5, 2)


def test_problems_survive_the_tokenizer_and_are_equally_long() -> None:
    words = tokenizer()
    rows = [words(prompt + answer + "<end>")["input_ids"] for prompt, answer in problems(50, 0)]
    assert len({len(row) for row in rows}) == 1
    _, answer = problems(1, 0)[0]
    assert words.decode(words(answer)["input_ids"]) == answer
    assert len(words(answer + "<end>")["input_ids"]) == 15


def test_questions_of_the_hub_become_prompts_with_answers() -> None:
    assert gsm8k({"question": "What is 40 + 2?", "answer": "It is 42.\n#### 42"})["answer"].endswith("#### 42")
    asked = mmlu({"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "logic"})
    assert asked["answer"] == "C"
    assert "C. c\n" in asked["prompt"]
    row = {"text": "Double it.", "test_list": ["assert double(2) == 4", "assert double(3) == 6"], "test_setup_code": ""}
    assert "double(2) == 4" in mbpp(row)["prompt"]
    assert "double(3) == 6" not in mbpp(row)["prompt"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_recipe_runs_for_two_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchrl", reason="needs the extra rl")
    compare = pytest.importorskip("recipes.rlae.compare")
    short = ["data.validation=4", "data.test=4", "dynamic.ppo.updates=1", "dynamic.ppo.prompts=4", "dynamic.spans=[5]"]
    compare.main(["--seeds", "0", "--spans", "15", "--steps", "2", "--output", str(tmp_path), *short])
    assert "| best fixed weights |" in capsys.readouterr().out
    systems = pd.read_csv(tmp_path / "systems.csv")
    assert set(systems[systems["name"] == "RLAE-PPO"]["trained at"]) == {5, 15}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_specialists_are_distilled_into_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--seeds", "0", "--ranks", "8", "--steps", "2", "--specialist-steps", "2", "--output", str(tmp_path)]
    for _ in range(2):  # the second time, the student is there
        distill.main(short)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert found[0] == found[1]
    assert found[0]["answers"] == 2 * 48
    assert {operation for _, _, operation in distill.problems(9, 0)} == set(OPERATIONS)
    weights = distill.routed(distill.problems(9, 0)).weights
    assert weights.sum(1).tolist() == weights.max(1).values.tolist() == [1.0] * 9
