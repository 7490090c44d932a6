"""Policies of pairs that people made: files in TRL's formats, graded answers, and what search asks of such an objective."""

import dataclasses
import json

import pytest
import yaml
from datasets import Dataset

from emorl.cli import main
from emorl.config import UserError
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.config.objective import PairsConfig
from emorl.config.train import CollapseConfig, ConvergenceConfig
from emorl.config.yaml import to_yaml
from emorl.runs.layout import Layout
from emorl.runs.run import read_cost
from emorl.training.pair_files import read_pairs
from tests.training.test_dpo import result_of
from tests.training.trained import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
USER = [{"role": "user", "content": "say 1"}]
GOOD, BAD = [{"role": "assistant", "content": "aaaa"}], [{"role": "assistant", "content": "zzzz"}]


def a_share(prompts, completions, **columns):
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [text.count("a") / max(1, len(text)) for text in texts]


def read(table, tokenizer, model_config, apart=(), system_prompt=None, **config):
    path = Dataset.from_list(table)
    settings = PairsConfig(path=path, **config)
    return read_pairs(settings, tokenizer, model_config, system_prompt=system_prompt, apart=apart, seed=0)


@pytest.fixture
def config(make_causal_model):
    return make_causal_model().config


def rows(count=6, **row):
    return [{**row, "prompt": f"say {number}"} for number in range(count)]


FORMATS = {
    "texts": {"prompt": "say 1", "chosen": "aaaa", "rejected": "zzzz"},
    "turns": {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    "a prompt in turns, answers as texts": {"prompt": USER, "chosen": "aaaa", "rejected": "zzzz"},
    "whole conversations": {"chosen": USER + GOOD, "rejected": USER + BAD},
    "whole conversations beside a prompt": {"prompt": "say 1", "chosen": USER + GOOD, "rejected": USER + BAD},
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_every_format_of_trl_is_the_same_pair(row, tokenizer, config):
    other = json.loads(json.dumps(row).replace("say 1", "say 2"))
    pairs, lines = read([row, other], tokenizer, config, validation=0.5)
    assert lines == []
    [pair] = [pair for part in (pairs.train, pairs.held_out) for pair in part if pair["prompt"] == USER]
    assert pair == {"prompt": USER, "chosen": GOOD, "rejected": BAD}


def test_a_base_without_a_template_reads_texts_and_refuses_conversations(plain_tokenizer, config):
    table = rows(chosen="aaaa", rejected="zzzz")
    pairs, _ = read(table, plain_tokenizer, config)
    assert pairs.train[0]["chosen"] == "aaaa"
    with pytest.raises(UserError, match=r"row 1 is a conversation, and the base has no chat template"):
        read([{"prompt": USER, "chosen": GOOD, "rejected": BAD}] * 2, plain_tokenizer, config)


def test_texts_are_asked_behind_the_system_prompt(tokenizer, config):
    pairs, _ = read(rows(chosen="a", rejected="z"), tokenizer, config, system_prompt="Be kind.")
    assert pairs.train[0]["prompt"][0] == {"role": "system", "content": "Be kind."}


def test_pairs_of_one_prompt_are_on_one_side(tokenizer, config):
    table = [{"prompt": f"say {n % 5}", "chosen": f"a{n}", "rejected": f"z{n}"} for n in range(40)]
    pairs, _ = read(table, tokenizer, config, validation=0.4)
    sides = [{repr(pair["prompt"]) for pair in part} for part in (pairs.train, pairs.held_out)]
    assert [len(side) for side in sides] == [3, 2]
    assert not sides[0] & sides[1]


def test_what_is_of_no_use_is_left_out_and_counted(tokenizer, config):
    table = [
        *rows(4, chosen="a b", rejected="z y"),
        {"prompt": "say 9", "chosen": "same", "rejected": "same "},
        {"prompt": "kept for test", "chosen": "a b", "rejected": "z y"},
        {"prompt": "say 8", "chosen": "a b c d", "rejected": "z"},
        {"prompt": "say 7", "chosen": "a " * 3000, "rejected": "z " * 3000},
    ]
    apart = [[{"role": "user", "content": "kept for test"}]]
    pairs, lines = read(table, tokenizer, config, apart=apart, length_ratio=2, validation=0.25)
    assert len(pairs.train) + len(pairs.held_out) == 4
    assert sorted(lines) == [
        "1 pairs left out: both answers are the same",
        "1 pairs left out: one answer has more than 2 times the words of the other (length_ratio)",
        "1 pairs left out: their prompts are kept for validation and test",
        "1 pairs left out: they are longer than the base's 2,048 positions",
    ]


def test_graded_answers_become_pairs_that_differ_enough(tokenizer, config):
    table = [
        {"question": f"say {n}", "answer": text, "warmth": grade}
        for n in range(3)
        for text, grade in (("aaaa", 2), ("bbbb", 1), ("zzzz", 0), ("yyyy", 0))
    ]
    named = {"prompt_column": "question", "response_column": "answer", "grade_column": "warmth", "validation": 0.4}
    pairs, _ = read(table, tokenizer, config, **named)
    texts = {(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs.train}
    assert texts == {("aaaa", "bbbb"), ("aaaa", "zzzz"), ("aaaa", "yyyy"), ("bbbb", "zzzz"), ("bbbb", "yyyy")}
    pairs, _ = read(table, tokenizer, config, margin=1, **named)
    assert {(pair["chosen"][0]["content"]) for pair in pairs.train} == {"aaaa"}


def test_a_prompt_is_told_apart_by_what_the_user_says(tokenizer, config):
    table = [*rows(4, chosen="a b", rejected="z y"), {"prompt": "kept  for test", "chosen": "a b", "rejected": "z y"}]
    apart = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "kept for test"}]]
    pairs, lines = read(table, tokenizer, config, apart=apart)
    assert lines == ["1 pairs left out: their prompts are kept for validation and test"]
    assert len(pairs.train) + len(pairs.held_out) == 4


def test_equal_answers_without_a_prompt_are_left_out_whatever_the_base_reads(plain_tokenizer, config):
    table = [{"chosen": f"say {n}: aaaa", "rejected": f"say {n}: zzzz"} for n in range(4)]
    pairs, lines = read([*table, {"chosen": "say 9: same", "rejected": "say 9: same"}], plain_tokenizer, config)
    assert lines == ["1 pairs left out: both answers are the same"]
    assert len(pairs.train) + len(pairs.held_out) == 4


def test_held_out_pairs_may_have_a_file_of_their_own(tokenizer, config):
    held_out = Dataset.from_list([{"prompt": "say 1", "chosen": "a", "rejected": "z"}])
    pairs, lines = read(rows(3, chosen="a", rejected="z"), tokenizer, config, validation_path=held_out)
    assert (len(pairs.train), len(pairs.held_out)) == (2, 1)
    assert lines == ["1 pairs left out: their prompts are in the file of held-out pairs"]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, {}, "has no column 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, {}, "row 1: 'rejected' is None; expected a text or a list"),
        ({"prompt": "p", "chosen": "a", "rejected": BAD}, {}, "row 1: one answer is a text, the other a list of turns"),
        ({"chosen": "a", "rejected": "z"}, {}, "row 1: the answers begin differently, so no prompt is in them"),
        ({"prompt": "p", "response": "a", "grade": "high"}, {"grade_column": "grade"}, "row 1: expected a number as 'grade'"),
        ({"prompt": "p", "response": "a", "grade": 1}, {"grade_column": "grades"}, "no column 'grades'; did you mean 'grade'"),
    ],
)
def test_rows_that_are_no_pairs_are_one_line(row, settings, message, tokenizer, config):
    with pytest.raises(UserError, match=message):
        read([row, row], tokenizer, config, **settings)


@pytest.fixture
def experiment(tmp_path, tiny_base_dir):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"ask {i}"}) + "\n" for i in range(12)))
    pairs = [{"prompt": f"say {i}", "chosen": "aaaaaa", "rejected": "zzzzzz"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dpo = {"max_steps": 30, "per_device_train_batch_size": 8, "eval_steps": 10, "learning_rate": 1e-2}
    return Experiment(
        output=tmp_path / "run",
        base=BaseConfig(model=str(tiny_base_dir)),
        data=DataConfig(path=str(tmp_path / "prompts.jsonl"), validation=4, test=4),
        objectives={"liked": ObjectiveConfig(pairs=PairsConfig(path=str(tmp_path / "pairs.jsonl")))},
        generation={"max_new_tokens": 8, "do_sample": False},
        train=TrainConfig(
            lora={"r": 4, "target_modules": "all-linear"},
            dpo=dpo,
            grpo={"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4},
            convergence=ConvergenceConfig(threshold=0.0),
            collapse=CollapseConfig(share=0.0),
        ),
    )


def test_a_policy_learns_what_people_chose_without_any_function(experiment):
    path = train(experiment, "liked")
    result = result_of(path)
    assert result["base_reward"] == 0.5
    assert result["reward"] == result["pair_accuracy"] == 1.0
    assert result["scores"] == {}
    assert result["pairs"] == 18
    assert not Layout(experiment.output).samples.exists()
    assert read_cost(path).reward_calls == 0


def test_a_function_that_comes_later_leaves_the_policy_as_it_is(experiment):
    path = train(experiment, "liked")
    written = (path / "policy" / "adapter_model.safetensors").stat().st_mtime_ns
    scored = dataclasses.replace(experiment.objectives["liked"], function=f"{__name__}:a_share")
    later = dataclasses.replace(experiment, objectives={"liked": scored})
    assert train(later, "liked") == path
    assert (path / "policy" / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_search_refuses_an_objective_without_a_function_and_names_the_command(experiment, tmp_path, capsys):
    file = tmp_path / "experiment.yaml"
    file.write_text(to_yaml(experiment))
    for command in ("search", "evaluate", "run", "compare"):
        assert main([command, str(file)]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "'liked' has pairs, and no function that scores answers" in line, (command, line)
        assert "`emorl train-reward`" in line


def test_nothing_is_sampled_for_policies_of_peoples_pairs(experiment, tmp_path, capsys):
    file = tmp_path / "experiment.yaml"
    file.write_text(to_yaml(experiment))
    assert main(["samples", str(file)]) == 2
    assert "no policy of this experiment makes pairs of samples" in capsys.readouterr().err


def test_a_column_that_is_not_there_is_said_before_anything_is_trained(experiment, tmp_path, capsys):
    content = yaml.safe_load(to_yaml(experiment))
    content["objectives"] = {"short": {"function": "length"}, **content["objectives"]}
    content["objectives"]["liked"]["pairs"]["prompt_column"] = "qestion"
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["train", str(file)]) == 2
    assert "has no column 'qestion'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_policies_trained_online_and_offline_are_searched_together(experiment, tmp_path, capsys):
    content = yaml.safe_load(to_yaml(experiment))
    content["objectives"]["liked"]["function"] = f"{__name__}:a_share"
    content["objectives"]["short"] = {"function": "length", "minimum": 0, "maximum": 1}
    content["train"]["dpo"]["max_steps"] = 2
    content["search"] = {"levels": 1}
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["train", str(file)]) == 0
    assert "held-out" in capsys.readouterr().out
    layout = Layout(tmp_path / "run")
    assert [result_of(layout.training(name))["method"] for name in ("liked", "short")] == ["dpo", "grpo"]
    assert main(["search", str(file)]) == 0
    assert {"liked", "short"} == set(result_of(layout.search)["best"]["weights"])
    assert main(["report", str(tmp_path / "run")]) == 0


def test_pairs_may_be_given_as_a_data_set(experiment):
    table = Dataset.from_list([{"prompt": f"say {i}", "chosen": "aaaaaa", "rejected": "zzzzzz"} for i in range(20)])
    given = dataclasses.replace(experiment, objectives={"liked": ObjectiveConfig(pairs=PairsConfig(path=table))})
    path = train(given, "liked")
    assert result_of(path)["pairs"] == 18
    assert train(given, "liked") == path  # finished, and known again
